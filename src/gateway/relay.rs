//! One request from the CLI to the upstream and its answer back.

use std::{
    convert::Infallible,
    error::Error,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, Incoming};
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::OnceCell;
use url::Url;

use super::{
    ActivityGuard, GatewayConfig, GatewayError,
    network::ClientTokens,
    run::{Admission, Exchange, Tokens},
    toll::{Stopped, Toll},
    vault::Vault,
};
use crate::{
    outbound::{self, retry_after},
    task::{self, Tasks},
    usage::Denied,
};

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// The largest request body; the API itself takes 32 MB.
pub(super) const MAX_BODY: u64 = 64 << 20;
const COUNT_TOKENS: &str = "/v1/messages/count_tokens";
/// A request body that stands still for so long is given up.
const UPLOAD_IDLE: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Reading the platform's certificates.
const CLIENT_DEADLINE: Duration = Duration::from_secs(20);
/// A stream with no byte for so long is probed, so that a dead connection is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// "Overloaded": of this API alone.
const OVERLOADED: u16 = 529;

/// Headers that are about one connection only (RFC 9110 section 7.6.1), and those of proxies.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// What else of the CLI's headers stays here: its own credentials, and what is ours to decide.
const NOT_UP: [&str; 6] = [
    "authorization",
    "x-api-key",
    "cookie",
    "host",
    "accept-encoding",
    "expect",
];
/// What else of the upstream's headers stays here: its cookies belong to our connection.
const NOT_DOWN: [&str; 1] = ["set-cookie"];

/// Keeps the container awake while what it answers is held.
#[derive(Clone)]
pub(super) struct Awake(pub(super) Arc<dyn Fn() -> ActivityGuard + Send + Sync>);

impl fmt::Debug for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Awake")
    }
}

/// Where requests come in, and who may.
#[derive(Debug, Clone)]
pub(super) enum Door {
    /// The CLIs that we started.
    Agents(Arc<Tokens>),
    /// Other containers'. Their requests keep this one awake.
    Clients(Arc<ClientTokens>, Awake),
}

impl Door {
    fn admit(&self, token: &str) -> Admission {
        match self {
            Self::Agents(tokens) => tokens.admit(token),
            Self::Clients(tokens, _) => tokens.admit(token),
        }
    }

    fn is_for_network(&self) -> bool {
        matches!(self, Self::Clients(..))
    }

    fn hold(&self) -> Option<ActivityGuard> {
        match self {
            Self::Agents(_) => None,
            Self::Clients(_, awake) => Some((awake.0)()),
        }
    }
}

#[derive(Debug)]
pub(super) struct Relay {
    upstream: Url,
    vault: Vault,
    client: OnceCell<reqwest::Client>,
}

impl Relay {
    pub(super) fn new(config: GatewayConfig, tasks: &Tasks) -> Result<Self, GatewayError> {
        let GatewayConfig {
            upstream,
            credential,
            oauth,
            ledger: _,
        } = config;
        if !matches!(upstream.scheme(), "http" | "https") || upstream.host().is_none() {
            return Err(GatewayError::UnusableUpstream);
        }
        // Found out now, not at the first request.
        let vault = Vault::new(credential, oauth, tasks);
        vault.check()?;
        Ok(Self {
            upstream,
            vault,
            client: OnceCell::new(),
        })
    }

    pub(super) async fn serve(&self, door: &Door, request: Request<Incoming>) -> Answer {
        if door.is_for_network() && request.uri().path() == "/health" {
            return healthy();
        }
        if request.uri().path() == "/" && matches!(*request.method(), Method::GET | Method::HEAD) {
            // The CLI opens a connection ahead with it. Nothing is told and nothing forwarded.
            return Response::new(empty());
        }
        let admission = match presented_token(request.headers()) {
            Some(token) => door.admit(token),
            None => Admission::UnknownToken,
        };
        if matches!(admission, Admission::UnknownToken) {
            return refuse(
                StatusCode::UNAUTHORIZED,
                "this token is not known to the gateway",
            );
        }
        if !is_needed(request.method(), request.uri().path()) {
            return refuse(
                StatusCode::NOT_FOUND,
                "the gateway serves nothing at this path",
            );
        }
        let Admission::Run(run) = admission else {
            return refuse(StatusCode::FORBIDDEN, "no run is active for this token");
        };
        let is_model_request =
            *request.method() == Method::POST && request.uri().path() == "/v1/messages";
        if is_model_request && let Err(denied) = run.meter.check_now() {
            return deny(&denied);
        }
        if request.uri().path() == COUNT_TOKENS && run.is_before_its_first_message() {
            return refuse(
                StatusCode::FORBIDDEN,
                "nothing is counted before the first message",
            );
        }
        let toll = is_model_request.then(|| Toll::new(run.meter.clone(), run.gate.clone()));
        let over = run.over.clone();
        let answer = async {
            let pass = match is_model_request {
                true => run.wait_for_a_pass().await,
                false => None,
            };
            let exchange = Exchange::start(run, toll.clone(), pass, door.hold());
            self.forward(request, toll, exchange).await
        };
        tokio::select! {
            biased;
            () = over.cancelled() => refuse(StatusCode::FORBIDDEN, "the run is over"),
            answer = answer => answer,
        }
    }

    async fn forward(
        &self,
        request: Request<Incoming>,
        toll: Option<Arc<Toll>>,
        mut exchange: Exchange,
    ) -> Answer {
        if request.body().size_hint().lower() > MAX_BODY {
            return too_large();
        }
        let client = match self
            .client
            .get_or_try_init(|| build_client(&self.upstream))
            .await
        {
            Ok(client) => client,
            Err(why) => {
                tracing::error!(why, "the gateway has no HTTPS client");
                exchange.unreachable(false);
                return refuse(StatusCode::BAD_GATEWAY, &why);
            }
        };
        let (head, body) = request.into_parts();
        let mut headers = passing(&head.headers, &NOT_UP);
        // Plain text, so that what passes can be counted.
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        let credential = self.vault.current().await;
        let mut presented = headers.clone();
        if let Err(error) = credential.apply(&mut presented) {
            return refuse(StatusCode::BAD_GATEWAY, &error.to_string());
        }
        let (method, target) = (head.method, target(&self.upstream, &head.uri));
        let stopped = Arc::new(Stopping::default());
        // What went up, for the one case in which it has to go up again.
        let copy = self
            .vault
            .is_renewable()
            .then(|| Arc::new(Copied::default()));
        let mut upstream = client.request(method.clone(), target.clone());
        if !body.is_end_stream() {
            let body = upload(body, toll, stopped.clone(), copy.clone());
            upstream = upstream.body(reqwest::Body::wrap_stream(body));
        }
        let mut sent = upstream.headers(presented).send().await;
        if let (Ok(answer), Some(copy)) = (&sent, copy)
            && answer.status() == StatusCode::UNAUTHORIZED
            && self.vault.renew(&credential).await
        {
            let Some(body) = copy.whole() else {
                // The CLI has it still, and asks again.
                return again_soon();
            };
            if let Err(error) = self.vault.current().await.apply(&mut headers) {
                return refuse(StatusCode::BAD_GATEWAY, &error.to_string());
            }
            let again = client.request(method, target).headers(headers).body(body);
            sent = again.send().await;
        }
        match sent {
            Ok(answer) if answer.status().is_redirection() => {
                // Following it would carry the credential to an address that nobody configured.
                exchange.head(answer.status(), answer.headers()).await;
                refuse(
                    StatusCode::BAD_GATEWAY,
                    "the model API answered with a redirect; configure its final address",
                )
            }
            Ok(answer) => {
                exchange.head(answer.status(), answer.headers()).await;
                let pause = retry_after(answer.headers());
                let is_over = match pause {
                    Some(pause) => exchange.run().wait_out(answer.status(), pause).await,
                    None => false,
                };
                let mut relayed =
                    if exchange.run().waits() && answer.status().as_u16() == OVERLOADED {
                        exchange.complete().await;
                        overloaded(answer.headers())
                    } else {
                        relayed(answer, exchange)
                    };
                if is_over {
                    // The CLI asks again by itself: its body did not have to be kept here.
                    let soon = HeaderValue::from_static("1");
                    relayed.headers_mut().insert(header::RETRY_AFTER, soon);
                }
                relayed
            }
            Err(error) => {
                match stopped.take() {
                    Some(Stopped::TooLarge) => return too_large(),
                    Some(Stopped::Denied(denied)) => return deny(&denied),
                    Some(Stopped::TurnedAway(why)) => return turn_away(why),
                    None => {}
                }
                exchange.unreachable(!error.is_connect());
                let why = reason(&error);
                let host = self.upstream.host_str().unwrap_or_default();
                tracing::warn!(host, error = chain(&error.without_url()), "{why}");
                refuse(StatusCode::BAD_GATEWAY, why)
            }
        }
    }
}

/// The CLI sends its token as a bearer; `x-api-key` is what other clients of the API use.
fn presented_token(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        scheme
            .eq_ignore_ascii_case("bearer")
            .then_some(token.trim())
    });
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok())
}

/// Whether the CLI needs this call. Model ids are held to plain characters, because `..` in a path
/// would be resolved on its way up.
fn is_needed(method: &Method, path: &str) -> bool {
    let is_model_id = |id: &str| {
        !id.is_empty()
            && !id.starts_with('.')
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._:@-".contains(&b))
    };
    match (method, path) {
        (&Method::POST, "/v1/messages" | COUNT_TOKENS) => true,
        (&Method::GET, "/v1/models") => true,
        (&Method::GET, path) => path.strip_prefix("/v1/models/").is_some_and(is_model_id),
        _ => false,
    }
}

fn target(base: &Url, request: &Uri) -> Url {
    let mut url = base.clone();
    url.set_path(&format!(
        "{}{}",
        base.path().trim_end_matches('/'),
        request.path()
    ));
    url.set_query(request.query());
    url.set_fragment(None);
    url
}

/// The headers that may go on: neither those of one connection (named by `Connection` too) nor
/// those in `kept`.
fn passing(headers: &HeaderMap, kept: &[&str]) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    headers
        .iter()
        .filter(|(name, _)| {
            let name = name.as_str();
            !HOP_BY_HOP.contains(&name) && !kept.contains(&name) && !named.iter().any(|n| n == name)
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

pub(super) async fn build_client(upstream: &Url) -> Result<reqwest::Client, String> {
    let builder = {
        let upstream = upstream.clone();
        move || {
            outbound::client_builder(&upstream)
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_keepalive(KEEP_ALIVE)
                .http2_keep_alive_interval(KEEP_ALIVE)
                .build()
        }
    };
    match task::blocking("loading the certificates", CLIENT_DEADLINE, builder).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(format!("failed to set up HTTPS: {}", error.without_url())),
        Err(error) => Err(error.to_string()),
    }
}

/// Why an upload was stopped by us.
#[derive(Debug, Default)]
struct Stopping(Mutex<Option<Stopped>>);

impl Stopping {
    fn set(&self, why: Stopped) -> io::Error {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        io::Error::other("the gateway stopped it")
    }

    fn take(&self) -> Option<Stopped> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The pieces of a body that went up; they are shared, not copied.
#[derive(Debug, Default)]
struct Copied(Mutex<(Vec<Bytes>, bool)>);

/// Longer bodies are not kept: the CLI sends them again.
const MAX_COPY: u64 = 8 << 20;

impl Copied {
    fn add(&self, piece: &Bytes, sent: u64) {
        let mut copied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sent <= MAX_COPY {
            copied.0.push(piece.clone());
        } else {
            *copied = (Vec::new(), false);
        }
    }

    fn end(&self, sent: u64) {
        let mut copied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        copied.1 = sent <= MAX_COPY;
    }

    /// The body, if all of it is here.
    fn whole(&self) -> Option<Vec<u8>> {
        let copied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        copied.1.then(|| copied.0.concat())
    }
}

/// The CLI's body on its way up, piece by piece; ends with an error past [`MAX_BODY`] or after a
/// standstill. Its last piece is held back until the request is paid for: without it the upstream
/// has nothing to answer.
fn upload(
    body: Incoming,
    toll: Option<Arc<Toll>>,
    stopping: Arc<Stopping>,
    copy: Option<Arc<Copied>>,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let scan = toll.map(|toll| {
        let request = toll.request();
        (toll, request)
    });
    let begin = (body, 0_u64, None::<Bytes>, scan);
    stream::try_unfold(begin, move |(mut body, mut sent, mut held, mut scan)| {
        let (stopping, copy) = (stopping.clone(), copy.clone());
        async move {
            loop {
                let frame = tokio::time::timeout(UPLOAD_IDLE, body.frame())
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
                let Some(frame) = frame.transpose().map_err(io::Error::other)? else {
                    if let Some((toll, request)) = scan.take() {
                        let paid = toll.pay(&request).await;
                        paid.map_err(|why| stopping.set(why))?;
                    }
                    if let Some(copy) = &copy {
                        copy.end(sent);
                    }
                    return Ok(held.take().map(|last| (last, (body, sent, None, None))));
                };
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                sent += data.len() as u64;
                if sent > MAX_BODY {
                    return Err(stopping.set(Stopped::TooLarge));
                }
                if let Some((_, request)) = &mut scan {
                    request.feed(&data);
                }
                if let Some(copy) = &copy {
                    copy.add(&data, sent);
                }
                if let Some(ready) = held.replace(data) {
                    return Ok(Some((ready, (body, sent, held, scan))));
                }
            }
        }
    })
}

/// The upstream's answer on its way down: status, headers, and each chunk as it comes.
fn relayed(answer: reqwest::Response, exchange: Exchange) -> Answer {
    let status = answer.status();
    let headers = passing(answer.headers(), &NOT_DOWN);
    let over = exchange.run().over.clone();
    let chunks = answer.bytes_stream().boxed();
    let body = stream::try_unfold(
        (chunks, exchange, over),
        |(mut chunks, mut exchange, over)| {
            async move {
                let chunk = tokio::select! {
                    biased;
                    () = over.cancelled() => return Err(io::Error::other("the run is over")),
                    chunk = chunks.next() => chunk,
                };
                match chunk {
                    Some(Ok(chunk)) => {
                        exchange.chunk(&chunk).await;
                        Ok(Some((Frame::data(chunk), (chunks, exchange, over))))
                    }
                    // The client must see a cut stream as one: end with an error, not in peace.
                    Some(Err(error)) => Err(io::Error::other(error.without_url())),
                    None => {
                        exchange.complete().await;
                        Ok(None)
                    }
                }
            }
        },
    );
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn reason(error: &reqwest::Error) -> &'static str {
    if error.is_timeout() {
        "the model API did not answer in time"
    } else if error.is_connect() {
        "the model API could not be reached"
    } else {
        "the connection to the model API broke off"
    }
}

/// An error and its causes. reqwest's own text leaves the causes out.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

fn too_large() -> Answer {
    refuse(
        StatusCode::PAYLOAD_TOO_LARGE,
        "the request is larger than 64 MiB",
    )
}

/// A request that its run's gate does not let through. The CLI gives up at once.
fn turn_away(why: &str) -> Answer {
    let mut answer = refuse(StatusCode::FORBIDDEN, why);
    let headers = answer.headers_mut();
    headers.insert("x-should-retry", HeaderValue::from_static("false"));
    answer
}

/// A request that may not be paid for. The CLI must not try again by itself: its run is told, and
/// ends.
fn deny(denied: &Denied) -> Answer {
    match denied {
        Denied::OverBudget(breach) => {
            let mut answer = refuse(StatusCode::TOO_MANY_REQUESTS, &sentence(denied));
            let headers = answer.headers_mut();
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
            if let Some(at) = breach.resets {
                let seconds = at.duration_since(Timestamp::now()).as_secs().max(1);
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            answer
        }
        Denied::Held(_) => {
            let mut answer = refuse(StatusCode::TOO_MANY_REQUESTS, &sentence(denied));
            let soon = HeaderValue::from_static("10");
            answer.headers_mut().insert(header::RETRY_AFTER, soon);
            answer
        }
        Denied::Ledger(_) | Denied::Blocking(_) => {
            tracing::error!(
                error = chain(denied),
                "a model request could not be reserved"
            );
            refuse(StatusCode::SERVICE_UNAVAILABLE, &sentence(denied))
        }
    }
}

fn sentence(denied: &Denied) -> String {
    format!("greenroom let no request through: {denied}")
}

/// The CLI gives up at the third 529 in a row, within seconds, and asks ten times over three minutes
/// after any other refusal of this kind (measured with 2.1.329). Its turn is worth the three minutes.
fn overloaded(upstream: &HeaderMap) -> Answer {
    let why = "the model API is busy (status 529)";
    let mut answer = refuse(StatusCode::SERVICE_UNAVAILABLE, why);
    if let Some(pause) = upstream.get(header::RETRY_AFTER) {
        answer
            .headers_mut()
            .insert(header::RETRY_AFTER, pause.clone());
    }
    answer
}

/// The same request would be taken now. The CLI asks again by itself.
fn again_soon() -> Answer {
    let why = "the credential was renewed; please ask again";
    let mut answer = refuse(StatusCode::SERVICE_UNAVAILABLE, why);
    let headers = answer.headers_mut();
    headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    answer
}

fn healthy() -> Answer {
    let body = json!({"status": "healthy"}).to_string();
    let mut answer = Response::new(Full::from(body).map_err(never).boxed_unsync());
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}

fn empty() -> UnsyncBoxBody<Bytes, io::Error> {
    Full::default().map_err(never).boxed_unsync()
}

fn never(error: Infallible) -> io::Error {
    match error {}
}

/// An error of our own, in the API's shape: the CLI shows its message.
fn refuse(status: StatusCode, message: &str) -> Answer {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        _ => "api_error",
    };
    let body = json!({"type": "error", "error": {"type": kind, "message": message}}).to_string();
    let mut response = Response::new(Full::from(body).map_err(never).boxed_unsync());
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_needed_paths_pass() {
        for (method, path, passes) in [
            (Method::POST, "/v1/messages", true),
            (Method::POST, "/v1/messages/count_tokens", true),
            (Method::GET, "/v1/models", true),
            (Method::GET, "/v1/models/claude-opus-5-5", true),
            (Method::GET, "/v1/messages", false),
            (Method::POST, "/v1/models", false),
            (Method::POST, "/v1/messages/", false),
            (Method::POST, "/v1/messages/batches", false),
            (Method::GET, "/v1/models/../files", false),
            (Method::GET, "/v1/models/%2e%2e/files", false),
            (Method::GET, "/v1/models/..", false),
            (Method::GET, "/v1/organizations", false),
            (Method::POST, "//v1/messages", false),
        ] {
            assert_eq!(is_needed(&method, path), passes, "{method} {path}");
        }
    }

    #[test]
    fn the_base_path_is_kept() {
        for (base, expected) in [
            (
                "https://api.example.com",
                "https://api.example.com/v1/messages?beta=true",
            ),
            (
                "https://p.example.com/a/b/?x=1#y",
                "https://p.example.com/a/b/v1/messages?beta=true",
            ),
        ] {
            let url = target(
                &base.parse().unwrap(),
                &Uri::from_static("/v1/messages?beta=true"),
            );
            assert_eq!(url.as_str(), expected);
        }
    }
}
