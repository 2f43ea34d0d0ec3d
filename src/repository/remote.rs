//! git over HTTPS, by a transport of our own: libgit2 is built without one.
//!
//! A [`Remotes::session`] is one fetch from one address or one push to it. It stands in a
//! thread-local while libgit2 works, because libgit2 makes transports by itself and on the calling
//! thread. The transport talks to that address and nothing else, whatever a repository's
//! configuration may rewrite it to, and sends the token only to hosts that may have it.
//!
//! Other network protocols are refused: libgit2's own `http`, `git` and `ssh` are replaced by a
//! transport that always fails.

use std::{
    cell::RefCell,
    fmt,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::Engine as _;
use bytes::{Buf as _, Bytes};
use futures_util::stream;
use git2::{
    ErrorClass, ErrorCode, RemoteCallbacks,
    transport::{Service, SmartSubtransport, SmartSubtransportStream, Transport},
};
use http::{HeaderValue, StatusCode, header};
use reqwest::{Body, Client, ClientBuilder, Response, redirect};
use tokio::sync::mpsc;
use url::{Host, Url};

use super::message::one_line;
use crate::address::is_inside;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server: it may have to pack a large repository before it says a word.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest session as a whole.
const SESSION_TIMEOUT: Duration = Duration::from_secs(600);
/// Most bytes of one session, each way. Hosting services take no larger push.
const MAX_RECEIVED: u64 = 4 << 30;
const MAX_SENT: u64 = 2 << 30;
/// A request that is longer is sent while it is made, so that no push stands in memory.
const CHUNK: usize = 1 << 20;
const MAX_REDIRECTS: usize = 5;
/// Most of what a server says about its refusal that is read, and shown.
const MAX_WORDS: usize = 4096;
const SHOWN_WORDS: usize = 300;

/// Who gets our token.
#[derive(Clone, Default)]
pub struct Remotes {
    token: Option<String>,
    hosts: Vec<String>,
}

impl fmt::Debug for Remotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "***");
        f.debug_struct("Remotes")
            .field("token", &token)
            .field("hosts", &self.hosts)
            .finish()
    }
}

/// What an operation with a remote is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteUse {
    /// The first fetch, for a new workspace.
    Clone,
    Fetch,
    Push,
    PullRequest,
}

/// What kept us from it, by what a person can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteErrorKind {
    /// Private, or not there: servers answer alike.
    Auth,
    /// Not reachable, or too slow; trying again may help.
    Network,
    /// The server (or a rule of ours) says no; trying again does not help.
    Rejected,
}

/// A fetch, push or pull request that failed. The text is for the person who asked and holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    pub during: RemoteUse,
    pub kind: RemoteErrorKind,
    pub message: String,
}

/// Cleans what a server says for a person: one line without control characters and without
/// `secret`, bounded.
pub(super) fn words(said: &str, secret: Option<&str>) -> String {
    let said = match secret {
        Some(secret) => said.replace(secret, "***"),
        None => said.to_owned(),
    };
    let lines: Vec<_> = said.lines().map(crate::text::plain).collect();
    one_line(&lines.join(" "), SHOWN_WORDS)
}

impl Remotes {
    /// `token` goes to github.com and to `hosts` alone (a host name each, or `name:port`).
    /// Addresses inside private networks are fetched from only where `hosts` names them.
    pub fn new(token: Option<String>, hosts: Vec<String>) -> Self {
        Self {
            token: token.filter(|token| !token.is_empty()),
            hosts,
        }
    }

    fn is_named(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else {
            return false;
        };
        let with_port = url
            .port_or_known_default()
            .map(|port| format!("{host}:{port}"));
        self.hosts.iter().any(|named| {
            named.eq_ignore_ascii_case(host)
                || with_port
                    .as_ref()
                    .is_some_and(|host| named.eq_ignore_ascii_case(host))
        })
    }

    /// The header that carries the token to `url`, if its host may have it.
    fn authorization(&self, url: &Url) -> Option<HeaderValue> {
        let is_github = url.host_str() == Some("github.com") && url.port().is_none();
        let is_allowed = url.scheme() == "https" || is_test_address(url);
        let token = self
            .token
            .as_ref()
            .filter(|_| is_allowed && (is_github || self.is_named(url)))?;
        let pair = format!("x-access-token:{token}");
        let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
        let mut value = HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// The token itself: to be kept out of what is shown.
    pub(super) fn secret(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Is `url` on GitHub, or on a host that the operator named?
    pub(super) fn knows(&self, url: &Url) -> bool {
        url.host_str() == Some("github.com") || self.is_named(url)
    }

    /// Runs one operation against `url`: `work` gets the address and the callbacks for libgit2.
    pub(super) fn session<T>(
        &self,
        url: &Url,
        during: RemoteUse,
        work: impl FnOnce(&Link<'_>) -> Result<T, git2::Error>,
    ) -> Result<T, RemoteError> {
        super::init();
        let session = Arc::new(Session::new(self, url, during)?);
        let current = Current::enter(Arc::clone(&session));
        let outcome = work(&Link {
            url: url.as_str(),
            session: Some(&session),
        });
        drop(current);
        outcome.map_err(|error| {
            // What the transport found is nearer to the cause than what libgit2 made of it.
            session
                .take_failure()
                .unwrap_or_else(|| session.unexpected(&error))
        })
    }
}

/// An address while an operation with it runs.
pub(super) struct Link<'a> {
    pub(super) url: &'a str,
    session: Option<&'a Arc<Session>>,
}

impl<'a> Link<'a> {
    /// A folder of this machine: there is nothing to be watched.
    pub(super) fn local(path: &'a str) -> Self {
        Self {
            url: path,
            session: None,
        }
    }

    /// Callbacks that end the operation at its deadline.
    pub(super) fn callbacks(&self) -> RemoteCallbacks<'static> {
        let mut callbacks = RemoteCallbacks::new();
        if let Some(session) = self.session {
            let watched = Arc::clone(session);
            callbacks.transfer_progress(move |_| Instant::now() < watched.deadline);
        }
        callbacks
    }
}

/// In the tests of this room a git server without TLS stands on loopback.
fn is_test_address(url: &Url) -> bool {
    cfg!(test) && url.scheme() == "http" && url.host_str() == Some("127.0.0.1")
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Session>>> = const { RefCell::new(None) };
}

/// Makes a session the calling thread's, until dropped.
struct Current;

impl Current {
    fn enter(session: Arc<Session>) -> Self {
        CURRENT.set(Some(session));
        Self
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}

/// One operation against one address.
struct Session {
    url: Url,
    during: RemoteUse,
    /// Where requests go: the address, or what the server redirected it to.
    base: Mutex<String>,
    authorization: Option<HeaderValue>,
    secret: Option<String>,
    client: Client,
    /// Of this session alone, so that no task of it outlives it. `Some` until dropped.
    runtime: Option<tokio::runtime::Runtime>,
    deadline: Instant,
    received: Mutex<u64>,
    sent: Mutex<u64>,
    failure: Mutex<Option<RemoteError>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A look-up of a name may hang; nobody waits for it.
            runtime.shutdown_background();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The builder that every request of this room starts from. No redirect is followed unless the
/// caller says which.
pub(super) fn client() -> ClientBuilder {
    // One that is installed already is as good.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .referer(false)
        .redirect(redirect::Policy::none())
}

impl Session {
    fn new(remotes: &Remotes, url: &Url, during: RemoteUse) -> Result<Self, RemoteError> {
        let broken = |error: &dyn fmt::Display| RemoteError {
            during,
            kind: RemoteErrorKind::Network,
            message: format!("HTTPS could not be set up: {error}"),
        };
        let is_trusted = remotes.is_named(url);
        let host = url.host_str().unwrap_or_default();
        let address = match url.host() {
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
            _ => None,
        };
        if !is_trusted && address.is_some_and(is_inside) {
            return Err(RemoteError {
                during,
                kind: RemoteErrorKind::Rejected,
                message: private_text(host),
            });
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| broken(&error))?;
        let mut client = client()
            // Hosting services answer git only to clients that name themselves like it.
            .user_agent(concat!(
                "git/2.0 (greenroom ",
                env!("CARGO_PKG_VERSION"),
                ")"
            ))
            .redirect(redirect::Policy::custom(follow));
        if !is_test_address(url) {
            client = client.https_only(true);
        }
        client = if is_trusted {
            // A host that the operator named may be inside, where no proxy leads.
            if address.is_some_and(|ip| ip.is_loopback()) {
                client.no_proxy()
            } else {
                client
            }
        } else {
            client.dns_resolver(PublicOnly)
        };
        let client = client.build().map_err(|error| broken(&innermost(&error)))?;
        Ok(Self {
            url: url.clone(),
            during,
            base: Mutex::new(url.as_str().trim_end_matches('/').to_owned()),
            authorization: remotes.authorization(url),
            secret: remotes.token.clone(),
            client,
            runtime: Some(runtime),
            deadline: Instant::now() + SESSION_TIMEOUT,
            received: Mutex::new(0),
            sent: Mutex::new(0),
            failure: Mutex::new(None),
        })
    }

    fn host(&self) -> &str {
        self.url.host_str().unwrap_or("the server")
    }

    /// Remembers the first failure and gives libgit2 and `io` something to carry.
    fn fail(&self, kind: RemoteErrorKind, message: String) -> io::Error {
        let text = message.clone();
        let during = self.during;
        lock(&self.failure).get_or_insert(RemoteError {
            during,
            kind,
            message,
        });
        io::Error::other(text)
    }

    fn take_failure(&self) -> Option<RemoteError> {
        lock(&self.failure).take()
    }

    fn unexpected(&self, error: &git2::Error) -> RemoteError {
        let (host, during) = (self.host(), self.during);
        tracing::warn!(%error, host, ?during, "an operation with a remote failed");
        let message = if Instant::now() >= self.deadline {
            format!("{host} took too long; try again")
        } else if during == RemoteUse::Push {
            format!("{host} broke the push off; try again")
        } else {
            format!("{host} sent something that is no git repository")
        };
        RemoteError {
            during,
            kind: RemoteErrorKind::Network,
            message,
        }
    }

    /// Waits for `work` on this session's runtime, not beyond its deadline.
    fn wait<T>(&self, work: impl Future<Output = Result<T, reqwest::Error>>) -> io::Result<T> {
        let runtime = self.runtime.as_ref().expect("taken by drop alone");
        let deadline = tokio::time::Instant::from_std(self.deadline);
        let bounded = async { tokio::time::timeout_at(deadline, work).await };
        match runtime.block_on(bounded) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed_request(&error)),
            Err(_) => {
                let message = format!("{} took too long to answer; try again", self.host());
                Err(self.fail(RemoteErrorKind::Network, message))
            }
        }
    }

    fn failed_request(&self, error: &reqwest::Error) -> io::Error {
        let cause = innermost(error);
        if error.is_redirect() {
            let message = format!(
                "{} redirects this repository to another place; use its present address",
                self.host()
            );
            return self.fail(RemoteErrorKind::Rejected, message);
        }
        if cause.contains(PRIVATE) {
            return self.fail(RemoteErrorKind::Rejected, private_text(self.host()));
        }
        let message = format!("{} could not be reached ({cause})", self.host());
        self.fail(RemoteErrorKind::Network, message)
    }

    /// Turns an answer that is not what git expects into its failure.
    fn check(&self, response: &mut Response, expected: &str) -> io::Result<()> {
        let host = self.host();
        let (kind, mut message) = match response.status() {
            StatusCode::OK => {
                if content_type(response) == Some(expected) {
                    return Ok(());
                }
                (
                    RemoteErrorKind::Rejected,
                    format!("{host} has no git repository at this address"),
                )
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
                (RemoteErrorKind::Auth, self.refusal())
            }
            StatusCode::PAYLOAD_TOO_LARGE => (
                RemoteErrorKind::Rejected,
                format!("{host} does not take so much at once"),
            ),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => (
                RemoteErrorKind::Network,
                format!("{host} is not available ({status}); try again"),
            ),
            status => (
                RemoteErrorKind::Rejected,
                format!("{host} refused the request ({status})"),
            ),
        };
        if !response.status().is_success() && content_type(response) == Some("text/plain") {
            let said = self.read_words(response);
            if !said.is_empty() {
                message = format!("{message}; it says: {said}");
            }
        }
        Err(self.fail(kind, message))
    }

    /// What it means that a server does not know us.
    fn refusal(&self) -> String {
        let host = self.host();
        let has_token = self.authorization.is_some();
        match (self.during, has_token) {
            (RemoteUse::Clone | RemoteUse::Fetch, true) => format!(
                "{host} does not let us read this repository: it is private or does not exist; \
                 check the address, and that the access token may read it"
            ),
            (RemoteUse::Clone | RemoteUse::Fetch, false) => format!(
                "{host} does not let us read this repository: it is private or does not exist; \
                 check the address; a private repository needs an access token for this host"
            ),
            (RemoteUse::Push | RemoteUse::PullRequest, true) => format!(
                "{host} does not let us write to this repository; check that the access token \
                 may write to it"
            ),
            (RemoteUse::Push | RemoteUse::PullRequest, false) => format!(
                "{host} does not let us write to this repository without an access token; the \
                 operator must set GITHUB_TOKEN, and for other hosts than github.com \
                 GIT_TOKEN_HOSTS"
            ),
        }
    }

    fn read_words(&self, response: &mut Response) -> String {
        let mut said = Vec::new();
        let read = async {
            while said.len() < MAX_WORDS {
                match response.chunk().await {
                    Ok(Some(chunk)) => said.extend_from_slice(&chunk),
                    Ok(None) | Err(_) => break,
                }
            }
            Ok(())
        };
        // What has come so far is worth as much.
        self.wait(read).ok();
        said.truncate(MAX_WORDS);
        words(&String::from_utf8_lossy(&said), self.secret.as_deref())
    }
}

fn content_type(response: &Response) -> Option<&str> {
    let value = response.headers().get(header::CONTENT_TYPE)?;
    value.to_str().ok()?.split(';').next().map(str::trim)
}

/// Redirects stay on the host, its port and its scheme: what is behind them gets the token.
pub(super) fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from = attempt.previous().first().map(Url::origin);
    if attempt.previous().len() > MAX_REDIRECTS || from != Some(attempt.url().origin()) {
        return attempt.error("redirected elsewhere");
    }
    attempt.follow()
}

/// The text of the deepest cause; the outer ones repeat the address.
pub(super) fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    one_line(&cause.to_string(), 200)
}

const PRIVATE: &str = "an address inside a private network";

fn private_text(host: &str) -> String {
    format!("{host} is {PRIVATE}; the operator must name it in GIT_TOKEN_HOSTS first")
}

/// Looks names up and refuses those that lead inside: a customer's `repoUrl` must not reach what
/// only the container can.
struct PublicOnly;

impl reqwest::dns::Resolve for PublicOnly {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let name = name.as_str().to_owned();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
            if found.iter().any(|address| is_inside(address.ip())) {
                return Err(PRIVATE.into());
            }
            Ok(Box::new(found.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// Teaches libgit2 our transports. To be called once, before any use of a remote.
#[expect(unsafe_code, reason = "libgit2's table of transports has no lock")]
pub(super) fn register_transports() -> Result<(), git2::Error> {
    for prefix in ["https", "http", "git", "ssh", "ssh+git", "git+ssh"] {
        // SAFETY: called under `Once` before any remote is made, so nothing reads the table.
        unsafe {
            git2::transport::register(prefix, |remote| {
                let session = CURRENT.with_borrow(Option::clone).ok_or_else(|| {
                    refusal("this repository's address is not allowed outside of a session")
                })?;
                Transport::smart(remote, true, HttpTransport(session))
            })?;
        }
    }
    Ok(())
}

fn refusal(text: &str) -> git2::Error {
    git2::Error::new(ErrorCode::GenericError, ErrorClass::Net, text)
}

struct HttpTransport(Arc<Session>);

impl SmartSubtransport for HttpTransport {
    fn action(
        &self,
        url: &str,
        action: Service,
    ) -> Result<Box<dyn SmartSubtransportStream>, git2::Error> {
        let session = &self.0;
        let is_ours = url.trim_end_matches('/') == session.url.as_str().trim_end_matches('/');
        let is_allowed = session.url.scheme() == "https" || is_test_address(&session.url);
        if !is_ours || !is_allowed {
            let message = "the repository's configuration leads to another address".to_owned();
            let error = session.fail(RemoteErrorKind::Rejected, message);
            return Err(refusal(&error.to_string()));
        }
        let (service, is_listing) = match action {
            Service::UploadPackLs => ("git-upload-pack", true),
            Service::UploadPack => ("git-upload-pack", false),
            Service::ReceivePackLs => ("git-receive-pack", true),
            Service::ReceivePack => ("git-receive-pack", false),
        };
        Ok(Box::new(Exchange {
            session: Arc::clone(session),
            service,
            is_listing,
            request: Vec::new(),
            upload: None,
            response: None,
            is_checked: false,
            rest: Bytes::new(),
        }))
    }

    fn close(&self) -> Result<(), git2::Error> {
        Ok(())
    }
}

/// One request and its answer: written first, sent by the first read, read as it comes. A long
/// request is on its way while it is written.
struct Exchange {
    session: Arc<Session>,
    service: &'static str,
    /// The list of branches, which is asked for without a body.
    is_listing: bool,
    request: Vec<u8>,
    upload: Option<Upload>,
    response: Option<Response>,
    is_checked: bool,
    rest: Bytes,
}

/// A request that is being sent.
struct Upload {
    chunks: mpsc::Sender<Bytes>,
    answer: Pin<Box<dyn Future<Output = Result<Response, reqwest::Error>> + Send>>,
}

/// The end of a listing's address; what stands before it is the repository's.
const LISTING: &str = "/info/refs";

impl Exchange {
    fn request(&self) -> reqwest::RequestBuilder {
        let (session, service) = (&self.session, self.service);
        let base = lock(&session.base).clone();
        let request = if self.is_listing {
            session
                .client
                .get(format!("{base}{LISTING}?service={service}"))
        } else {
            session
                .client
                .post(format!("{base}/{service}"))
                .header(
                    header::CONTENT_TYPE,
                    format!("application/x-{service}-request"),
                )
                .header(header::ACCEPT, format!("application/x-{service}-result"))
        };
        match &session.authorization {
            Some(value) => request.header(header::AUTHORIZATION, value.clone()),
            None => request,
        }
    }

    /// Passes on what was written so far, as the next part of the request.
    fn pass_on(&mut self) -> io::Result<()> {
        if self.response.is_some() {
            // The server did not wait for the end.
            self.request.clear();
            return Ok(());
        }
        let mut upload = match self.upload.take() {
            Some(upload) => upload,
            None => {
                let (chunks, next) = mpsc::channel(1);
                let body = stream::unfold(next, |mut next: mpsc::Receiver<Bytes>| async {
                    let chunk = next.recv().await?;
                    Some((Ok::<_, io::Error>(chunk), next))
                });
                let request = self.request().body(Body::wrap_stream(body));
                Upload {
                    chunks,
                    answer: Box::pin(async { request.send().await }),
                }
            }
        };
        let chunk = Bytes::from(std::mem::take(&mut self.request));
        let step = async {
            tokio::select! {
                biased;
                answer = &mut upload.answer => answer.map(Some),
                _ = upload.chunks.send(chunk) => Ok(None),
            }
        };
        self.response = self.session.wait(step)?;
        self.upload = Some(upload);
        Ok(())
    }

    /// Sends what is left of the request and waits for the answer.
    fn finish(&mut self) -> io::Result<Response> {
        if self.upload.is_some() && !self.request.is_empty() {
            self.pass_on()?;
        }
        if let Some(response) = self.response.take() {
            return Ok(response);
        }
        match self.upload.take() {
            Some(Upload { chunks, answer }) => {
                drop(chunks);
                self.session.wait(answer)
            }
            None => {
                let mut request = self.request();
                if !self.is_listing {
                    request = request.body(std::mem::take(&mut self.request));
                }
                self.session.wait(async { request.send().await })
            }
        }
    }

    fn answer(&mut self) -> io::Result<Response> {
        let mut response = self.finish()?;
        let kind = if self.is_listing {
            "advertisement"
        } else {
            "result"
        };
        let expected = format!("application/x-{}-{kind}", self.service);
        self.session.check(&mut response, &expected)?;
        if self.is_listing {
            // A renamed repository: the redirect was followed, what comes next goes there.
            let mut found = response.url().clone();
            found.set_query(None);
            if let Some(base) = found.as_str().strip_suffix(LISTING) {
                *lock(&self.session.base) = base.to_owned();
            }
        }
        Ok(response)
    }
}

impl Write for Exchange {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let is_too_large = {
            let mut sent = lock(&self.session.sent);
            *sent += bytes.len() as u64;
            *sent > MAX_SENT
        };
        if is_too_large {
            let message = "there is too much to send at once".to_owned();
            return Err(self.session.fail(RemoteErrorKind::Rejected, message));
        }
        self.request.extend_from_slice(bytes);
        if self.request.len() >= CHUNK {
            self.pass_on()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Exchange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.is_checked {
            self.response = Some(self.answer()?);
            self.is_checked = true;
        }
        let response = self.response.as_mut().expect("it was just answered");
        while self.rest.is_empty() {
            match self.session.wait(response.chunk())? {
                Some(chunk) => self.rest = chunk,
                None => break,
            }
            let mut received = lock(&self.session.received);
            *received += self.rest.len() as u64;
            if *received > MAX_RECEIVED {
                let message = "the repository is too large".to_owned();
                return Err(self.session.fail(RemoteErrorKind::Rejected, message));
            }
        }
        let count = self.rest.len().min(buffer.len());
        self.rest.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
pub(super) mod tests;
