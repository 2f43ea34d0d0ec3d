//! The way from a browser to a dev server: HTTP/1.1 and WebSocket, streamed.
//!
//! ```text
//! accept ─ permit ─► connection task ─► answer_own          /__greenroom/…
//!                       │ one pinned    ├► hold or refuse   no server to ask
//!                       │ upstream      ├► forward ─► dev server, body both ways
//!                       └ connection    └► upgrade ─► tunnel task, bytes both ways
//! ```
//!
//! A downstream connection keeps one upstream connection of its own, so no pool is shared. After
//! a true 101 of the upstream a WebSocket is a byte tunnel that keeps the connection's permit and
//! ends with the tasks' token; it holds nobody awake.

use std::{
    convert::Infallible,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{HOST, ORIGIN, SEC_WEBSOCKET_PROTOCOL},
    request::Parts,
    uri::PathAndQuery,
};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1::SendRequest,
    server::conn::http1,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    ActivityGuard, ActivitySink, PreviewHandle, Previews,
    access::{Verdict, hide_cookies},
    alarm::{Alarm, Elapsed},
    filter::Refusal,
    header_deadline::{HeaderDeadline, InRequest},
    headers, hmr,
    pages::{self, Page},
    routing::{Host, SameSite, is_own_origin},
};
use crate::{domain::PreviewState, task::Tasks};

/// Connections at once on one listener, tunnels included; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Of one request's head, in bytes (request line and fields). Of fields hyper takes 100; another
/// number would be allocated anew for every request.
const MAX_HEAD: usize = 64 * 1024;
/// How long a request that can't be shown a page waits for a server that starts.
const WAIT_FOR_LIVE: Duration = Duration::from_secs(30);
/// A server that restarts itself in place refuses connections for about a second.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
/// From request to the answer's head; a broken configuration alone blocks Vite for 6 s.
const HEAD_DEADLINE: Duration = Duration::from_secs(300);
/// Vite leaves handshakes that it doesn't know without an answer.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(15);
/// For requests in flight when the program stops.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
const TUNNEL_BUFFER: usize = 32 * 1024;
/// The Host of a request that needs none.
static LOCALHOST: HeaderValue = HeaderValue::from_static("localhost");

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyKind {
    /// HTTP and WebSocket.
    Preview,
    /// WebSocket alone, any path; a client that names no subprotocol gets the HMR socket.
    HmrOnly,
}

/// The reverse proxy behind one listener.
pub struct Proxy {
    kind: ProxyKind,
    previews: Previews,
    activity: Arc<dyn ActivitySink>,
    tasks: Tasks,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Proxy {
    /// Serves a listener in a task until `tasks` are stopped.
    pub fn serve(
        listener: TcpListener,
        kind: ProxyKind,
        previews: Previews,
        activity: Arc<dyn ActivitySink>,
        tasks: &Tasks,
    ) {
        let proxy = Arc::new(Self {
            kind,
            previews,
            activity,
            tasks: tasks.clone(),
        });
        tasks.spawn("preview proxy", proxy.accept(listener));
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let token = self.tasks.token().clone();
        let accept = async {
            loop {
                let permit = permits
                    .clone()
                    .acquire_owned()
                    .await
                    .expect("the semaphore is never closed");
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        let connection = self.clone().connection(stream, peer, permit);
                        self.tasks.spawn("preview connection", connection);
                    }
                    Err(error) => {
                        // Out of file descriptors, or a peer that is gone: go on, but don't spin.
                        tracing::warn!(%error, "a preview connection was not accepted");
                        sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        };
        token.run_until_cancelled(accept).await;
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) {
        stream.set_nodelay(true).ok();
        let token = self.tasks.token().clone();
        let stream = HeaderDeadline::new(stream);
        let switch = stream.switch();
        let downstream = Arc::new(Downstream {
            proxy: self,
            peer: headers::forwarded_for(peer.ip()),
            permit: Arc::new(permit),
            last_host: Mutex::default(),
            pinned: Mutex::default(),
        });
        let service = service_fn(move |request| {
            let downstream = downstream.clone();
            let in_request = switch.begin();
            async move {
                let mut response = match downstream.answer(request).await {
                    Ok(response) => response,
                    Err(page) => page.map(ResponseBody::whole),
                };
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    in_request.make_last();
                } else {
                    response.body_mut().in_request = Some(in_request);
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .header_read_timeout(None)
            .half_close(true)
            .pipeline_flush(true)
            .max_header_size(MAX_HEAD)
            .max_buf_size(2 * MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        tokio::select! {
            biased;
            // A connection that breaks is the browser's business: nothing to say about it.
            _ = connection.as_mut() => return,
            () = token.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        timeout(LAST_REQUESTS, connection).await.ok();
    }
}

/// One connection from a browser.
struct Downstream {
    proxy: Arc<Proxy>,
    /// As `X-Forwarded-For` has it.
    peer: HeaderValue,
    permit: Arc<OwnedSemaphorePermit>,
    /// The last request's, most likely also the next one's.
    last_host: Mutex<Option<Arc<Host>>>,
    /// The upstream connection of the last request, for the next one.
    pinned: Mutex<Option<Pinned>>,
}

/// Where a request goes that may pass.
struct Destination {
    /// What the browser called it.
    host: Arc<Host>,
    preview: PreviewHandle,
    /// A person looks at the answer, and can be shown another page meanwhile.
    as_page: bool,
    is_websocket: bool,
}

struct Pinned {
    port: u16,
    sender: SendRequest<RequestBody>,
    /// For answers that don't come.
    alarm: Alarm,
}

/// Why the dev server gave no answer.
#[derive(Debug)]
enum UpstreamError {
    /// No connection: it is down or restarts.
    Unreachable,
    /// The connection ended before an answer.
    Closed,
    TimedOut,
}

impl From<Elapsed> for UpstreamError {
    fn from(_: Elapsed) -> Self {
        Self::TimedOut
    }
}

impl Downstream {
    /// `Err` is an answer of our own: no upstream had a part in it.
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<ResponseBody>, Page> {
        let to = self.admit(&request)?;
        if to.is_websocket {
            // Boxed, as all that is rare here: a future is as large as its largest part, and one
            // is moved with every request.
            return Box::pin(self.upgrade(request, &to)).await;
        }
        let (head, body) = request.into_parts();
        self.forward(&head, body, &to).await
    }

    /// Finds out which preview a request is for and whether it may pass; what needs no dev server
    /// is answered at once.
    fn admit(&self, request: &Request<Incoming>) -> Result<Destination, Page> {
        let host = self.host_of(request)?;
        let as_page = headers::is_navigation(request.method(), request.headers());
        let is_websocket =
            headers::is_websocket(request.method(), request.version(), request.headers());
        if self.proxy.kind == ProxyKind::HmrOnly && !is_websocket {
            return Err(upgrade_required());
        }
        let now = jiff::Timestamp::now().as_second();
        let access = self.proxy.previews.access();
        let query = request.uri().query();
        let named = access.named(query, request.headers(), now);
        let preview = self
            .proxy
            .previews
            .route(host.label(), named)
            .ok_or_else(|| {
                pages::problem(
                    StatusCode::NOT_FOUND,
                    "There is no preview here",
                    "This address belongs to no site that is open at the moment. Open the preview \
                 again from where you edit the site.",
                    as_page,
                )
            })?;
        let path = request.uri().path();
        match access.judge(preview.slug(), path, query, request.headers(), now) {
            Verdict::Open | Verdict::Granted => {}
            Verdict::Exchange { cookies, location } => {
                return Err(pages::redirect(&location, &cookies));
            }
            Verdict::Refused => {
                return Err(pages::problem(
                    StatusCode::UNAUTHORIZED,
                    "This preview is private",
                    "Your link to it has expired or is for another site. Open the preview again \
                     from where you edit the site.",
                    as_page,
                ));
            }
        }
        if is_websocket {
            self.check_origin(request.headers(), &host)?;
        } else if path.starts_with(pages::OWN_PREFIX) {
            return Err(self.answer_own(request, &host, &preview));
        }
        preview
            .may_ask(path, query)
            .map_err(|refusal| refused(refusal, as_page))?;
        if as_page && !is_websocket {
            preview.note_page(path);
        }
        Ok(Destination {
            host,
            preview,
            as_page,
            is_websocket,
        })
    }

    fn host_of(&self, request: &Request<Incoming>) -> Result<Arc<Host>, Page> {
        let value = host_value(request)?;
        let mut last = self.last_host.lock().expect("no panic while it is held");
        if let Some(last) = &*last
            && last.value() == value
        {
            return Ok(last.clone());
        }
        let host = Host::read(value).ok_or_else(names_no_host)?;
        Ok(last.insert(Arc::new(host)).clone())
    }

    /// The proxy's own paths.
    fn answer_own(
        &self,
        request: &Request<Incoming>,
        host: &Host,
        preview: &PreviewHandle,
    ) -> Page {
        match (request.method(), request.uri().path()) {
            (&Method::GET, pages::STATUS) => pages::status(&preview.status().borrow()),
            (&Method::GET, pages::PRESENCE_SCRIPT) => pages::presence_script(),
            (&Method::GET, pages::HOLDING_SCRIPT) => pages::holding_script(),
            (&Method::POST, pages::PRESENCE) => {
                // Another site's page must not keep the container awake.
                match self.check_origin(request.headers(), host) {
                    Ok(()) => {
                        self.proxy.activity.person(preview.slug());
                        pages::empty(StatusCode::NO_CONTENT)
                    }
                    Err(refused) => refused,
                }
            }
            _ => pages::problem(
                StatusCode::NOT_FOUND,
                "Not found",
                "There is nothing here.",
                false,
            ),
        }
    }

    /// A page's Origin must be ours; programs send none.
    fn check_origin(&self, headers: &HeaderMap, host: &Host) -> Result<(), Page> {
        let same = match self.proxy.kind {
            ProxyKind::Preview => SameSite::NameAndPort,
            ProxyKind::HmrOnly => SameSite::Name,
        };
        let is_ours = |origin: &HeaderValue| {
            origin
                .to_str()
                .is_ok_and(|origin| is_own_origin(origin, host.text(), same))
        };
        if headers.get_all(ORIGIN).iter().all(is_ours) {
            return Ok(());
        }
        Err(pages::problem(
            StatusCode::FORBIDDEN,
            "Refused",
            "a page of another site may not speak to this preview",
            false,
        ))
    }

    async fn forward(
        &self,
        head: &Parts,
        body: Incoming,
        to: &Destination,
    ) -> Result<Response<ResponseBody>, Page> {
        let guard = self.proxy.activity.request();
        let port = match to.preview.upstream() {
            Some(port) => port,
            None if to.as_page => return Err(hold(&to.preview)),
            None => Box::pin(await_upstream(&to.preview)).await?,
        };
        let response = match self.exchange(head, body, to, port).await {
            Ok(response) => response,
            Err(UpstreamError::Unreachable) if to.as_page => return Err(hold(&to.preview)),
            Err(error) => return Err(upstream_problem(&error, to.as_page)),
        };
        let mut response = response.map(ResponseBody::streamed);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked for it.
            return Err(upstream_problem(&UpstreamError::Closed, to.as_page));
        }
        headers::strip_hop_by_hop(response.headers_mut());
        *response.version_mut() = Version::HTTP_11;
        if headers::asks_for_document(&head.method, &head.headers)
            && headers::is_plain_html(response.status(), response.headers())
        {
            headers::lengthen(response.headers_mut(), pages::PRESENCE_TAG.len());
            response.body_mut().tail = Some(Bytes::from_static(pages::PRESENCE_TAG.as_bytes()));
        }
        if !headers::is_event_stream(response.headers()) {
            response.body_mut().guard = Some(guard);
        }
        Ok(response)
    }

    /// The request that the dev server gets for the browser's. That one stays as it was: another
    /// can be made of it.
    fn to_upstream(
        &self,
        head: &Parts,
        body: RequestBody,
        to: &Destination,
        port: u16,
    ) -> Request<RequestBody> {
        let passes = to.host.passes_host_check(&to.preview.site().hosts);
        let rewritten = (!passes).then(|| local_host(port));
        let mut request = Request::new(body);
        request.method_mut().clone_from(&head.method);
        *request.uri_mut() = match head.uri.authority() {
            None => head.uri.clone(),
            Some(_) => {
                let path = head.uri.path_and_query().cloned();
                path.unwrap_or(PathAndQuery::from_static("/")).into()
            }
        };
        let headers = request.headers_mut();
        *headers = headers::to_upstream(&head.headers, &self.peer, to.host.value(), rewritten);
        hide_cookies(headers);
        request
    }

    /// One request and its answer's head, over the pinned connection if it still lives. What
    /// never left, and what may be repeated (RFC 9110 9.2.2) and has no body, goes out once more
    /// over a fresh one: the dev server may close an idle connection at any time.
    async fn exchange(
        &self,
        head: &Parts,
        body: Incoming,
        to: &Destination,
        port: u16,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let deadline = Instant::now() + HEAD_DEADLINE;
        let is_repeatable = head.method.is_idempotent() && body.is_end_stream();
        let pinned = self.take_pinned(port).await;
        let mut request = self.to_upstream(head, RequestBody::Streamed(body), to, port);
        if let Some(mut pinned) = pinned {
            let sent = pin!(pinned.sender.try_send_request(request));
            match pinned.alarm.limit(deadline, sent).await? {
                Ok(response) => {
                    self.pin(pinned);
                    return Ok(response);
                }
                Err(mut error) => {
                    let again = || self.to_upstream(head, RequestBody::Empty, to, port);
                    request = error
                        .take_message()
                        .or_else(|| is_repeatable.then(again))
                        .ok_or(UpstreamError::Closed)?;
                }
            }
        }
        Box::pin(self.exchange_afresh(port, request, deadline)).await
    }

    /// The same over a fresh connection.
    async fn exchange_afresh(
        &self,
        port: u16,
        request: Request<RequestBody>,
        deadline: Instant,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let mut fresh = Pinned {
            port,
            sender: self.connect(port).await?,
            alarm: Alarm::default(),
        };
        let sent = pin!(fresh.sender.send_request(request));
        let response = fresh.alarm.limit(deadline, sent).await?;
        let response = response.map_err(|_| UpstreamError::Closed)?;
        self.pin(fresh);
        Ok(response)
    }

    async fn take_pinned(&self, port: u16) -> Option<Pinned> {
        let mut pinned = self
            .pinned
            .lock()
            .expect("no panic while it is held")
            .take()?;
        if pinned.port != port || pinned.sender.is_closed() {
            return None;
        }
        if !pinned.sender.is_ready() {
            // The last answer has been passed on; its connection is about to notice. One whose
            // request body is still on its way never becomes ready.
            let ready = timeout(Duration::from_millis(20), pinned.sender.ready());
            Box::pin(ready).await.ok()?.ok()?;
        }
        Some(pinned)
    }

    fn pin(&self, pinned: Pinned) {
        *self.pinned.lock().expect("no panic while it is held") = Some(pinned);
    }

    /// A fresh connection to the dev server, with patience for one that restarts in place.
    async fn connect(&self, port: u16) -> Result<SendRequest<RequestBody>, UpstreamError> {
        let deadline = Instant::now() + CONNECT_PATIENCE;
        let stream = loop {
            match timeout_at(deadline, TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await {
                Ok(Ok(stream)) => break stream,
                Ok(Err(_)) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Ok(Err(_)) | Err(_) => return Err(UpstreamError::Unreachable),
            }
        };
        stream.set_nodelay(true).ok();
        // One buffer, one plain write: nearly all requests have no body, and bodies cost no more.
        let handshake = hyper::client::conn::http1::Builder::new()
            .writev(false)
            .handshake(TokioIo::new(stream))
            .await;
        let (sender, connection) = handshake.map_err(|_| UpstreamError::Unreachable)?;
        // Ends when the sender and the bodies are dropped: with the downstream connection.
        self.proxy.tasks.spawn("preview upstream", async move {
            connection.with_upgrades().await.ok();
        });
        Ok(sender)
    }

    async fn upgrade(
        &self,
        mut request: Request<Incoming>,
        to: &Destination,
    ) -> Result<Response<ResponseBody>, Page> {
        let port = match to.preview.upstream() {
            Some(port) => port,
            // The browser takes a 101 for "it is back" and reloads.
            None if headers::is_vite_ping(request.headers()) => return Err(not_yet(false)),
            None => await_upstream(&to.preview).await?,
        };
        let on_downstream = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let mut asked = self.to_upstream(&head, RequestBody::Empty, to, port);
        headers::ask_for_websocket(asked.headers_mut());
        let mut is_bridged = false;
        if self.proxy.kind == ProxyKind::HmrOnly {
            *asked.uri_mut() = root_of(asked.uri());
            let headers = asked.headers_mut();
            if !headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
                is_bridged = true;
                let hmr = HeaderValue::from_static("vite-hmr");
                headers.insert(SEC_WEBSOCKET_PROTOCOL, hmr);
                // We have checked it; with one, Vite also wants the token of its own client.
                headers.remove(ORIGIN);
            }
        }
        let exchange = async {
            let mut sender = self.connect(port).await?;
            sender
                .send_request(asked)
                .await
                .map_err(|_| UpstreamError::Closed)
        };
        let answered = timeout(UPGRADE_DEADLINE, exchange).await;
        let mut response = answered
            .unwrap_or(Err(UpstreamError::TimedOut))
            .map_err(|error| upstream_problem(&error, false))?;
        let is_tunnel = headers::is_switched_to_websocket(response.status(), response.headers());
        let on_upstream = is_tunnel.then(|| hyper::upgrade::on(&mut response));
        let (mut head, body) = response.into_parts();
        headers::strip_hop_by_hop(&mut head.headers);
        head.version = Version::HTTP_11;
        let Some(on_upstream) = on_upstream else {
            if head.status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(upstream_problem(&UpstreamError::Closed, false));
            }
            return Ok(Response::from_parts(head, ResponseBody::streamed(body)));
        };
        headers::ask_for_websocket(&mut head.headers);
        let is_hmr = head
            .headers
            .get(SEC_WEBSOCKET_PROTOCOL)
            .is_some_and(|protocol| protocol == "vite-hmr");
        let first = is_hmr.then(|| to.preview.error_to_replay()).flatten();
        if is_bridged {
            // A client that named none must not be given one (RFC 6455 4.1).
            head.headers.remove(SEC_WEBSOCKET_PROTOCOL);
        }
        let tunnel = tunnel(
            on_downstream,
            on_upstream,
            first,
            self.proxy.tasks.clone(),
            self.permit.clone(),
        );
        self.proxy.tasks.spawn("preview tunnel", tunnel);
        Ok(Response::from_parts(
            head,
            ResponseBody::whole(Bytes::new()),
        ))
    }
}

/// Carries bytes both ways until one side is done or the program stops; `first` is told to the
/// browser after the dev server's greeting.
async fn tunnel(
    on_downstream: OnUpgrade,
    on_upstream: OnUpgrade,
    first: Option<String>,
    tasks: Tasks,
    permit: Arc<OwnedSemaphorePermit>,
) {
    let carry = async {
        let both = async { tokio::try_join!(on_downstream, on_upstream) };
        let Ok(Ok((down, up))) = timeout(UPGRADE_DEADLINE, both).await else {
            return;
        };
        let (mut down, mut up) = (TokioIo::new(down), TokioIo::new(up));
        if let Some(first) = first {
            let greeted = timeout(UPGRADE_DEADLINE, hmr::greet(&mut up, &mut down, &first));
            if !matches!(greeted.await, Ok(Ok(()))) {
                return;
            }
        }
        tokio::io::copy_bidirectional_with_sizes(&mut down, &mut up, TUNNEL_BUFFER, TUNNEL_BUFFER)
            .await
            .ok();
    };
    tasks.token().run_until_cancelled(carry).await;
    drop(permit);
}

/// The one host that a request names (RFC 9112 3.2): a request that is unclear about it could be
/// routed by one name and served by another.
fn host_value(request: &Request<Incoming>) -> Result<&HeaderValue, Page> {
    if *request.method() == Method::CONNECT {
        let text = "this is no forward proxy";
        return Err(pages::problem(
            StatusCode::METHOD_NOT_ALLOWED,
            "Refused",
            text,
            false,
        ));
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next(), request.uri().authority()) {
        (Some(_), Some(_), _) => Err(bad_request("the request names two hosts")),
        (Some(host), None, Some(authority))
            if !host
                .as_bytes()
                .eq_ignore_ascii_case(authority.as_str().as_bytes()) =>
        {
            Err(bad_request("the request names two hosts"))
        }
        (Some(host), None, _) => Ok(host),
        // HTTP/1.0 needs none: the default preview.
        (None, _, None) if request.version() == Version::HTTP_10 => Ok(&LOCALHOST),
        _ => Err(names_no_host()),
    }
}

fn refused(refusal: Refusal, as_page: bool) -> Page {
    let (status, text) = match refusal {
        Refusal::Unclear => (
            StatusCode::BAD_REQUEST,
            "This address is spelled in an unusual way. Open the page from the site's own links.",
        ),
        Refusal::Private => (
            StatusCode::FORBIDDEN,
            "This file is not part of the site that visitors see.",
        ),
    };
    pages::problem(status, "Not shown", text, as_page)
}

fn names_no_host() -> Page {
    bad_request("the request names no host")
}

/// Waits for a server that starts, wakes or is being repaired.
async fn await_upstream(preview: &PreviewHandle) -> Result<u16, Page> {
    let mut status = preview.status();
    if status.borrow().state == PreviewState::Off {
        return Err(not_yet(false));
    }
    let live = async {
        status
            .wait_for(|status| status.upstream.is_some())
            .await
            .ok()
            .and_then(|live| live.upstream)
    };
    timeout(WAIT_FOR_LIVE, live)
        .await
        .ok()
        .flatten()
        .ok_or_else(|| not_yet(false))
}

/// The holding page; a server that failed is tried once more, because somebody looks.
fn hold(preview: &PreviewHandle) -> Page {
    let status = preview.status();
    let status = status.borrow();
    if status.state == PreviewState::Error {
        preview.retry();
    }
    pages::holding(&status)
}

fn not_yet(as_page: bool) -> Page {
    let text = "the dev server of this site is not running yet";
    pages::problem(StatusCode::SERVICE_UNAVAILABLE, "Not ready", text, as_page)
}

fn upstream_problem(error: &UpstreamError, as_page: bool) -> Page {
    let (status, text) = match error {
        UpstreamError::Unreachable => return not_yet(as_page),
        UpstreamError::Closed => (
            StatusCode::BAD_GATEWAY,
            "The site's dev server broke off before it answered.",
        ),
        UpstreamError::TimedOut => (
            StatusCode::GATEWAY_TIMEOUT,
            "The site's dev server did not answer in time.",
        ),
    };
    pages::problem(status, "The preview has a problem", text, as_page)
}

fn bad_request(text: &str) -> Page {
    pages::problem(StatusCode::BAD_REQUEST, "Bad request", text, false)
}

fn upgrade_required() -> Page {
    let text = "this port speaks WebSocket alone";
    let mut response = pages::problem(
        StatusCode::UPGRADE_REQUIRED,
        "Upgrade required",
        text,
        false,
    );
    headers::ask_for_websocket(response.headers_mut());
    response
}

fn local_host(port: u16) -> HeaderValue {
    HeaderValue::from_str(&format!("localhost:{port}")).expect("letters and digits")
}

/// `/` with the query of a request: the HMR socket is at the root whatever the site's base.
fn root_of(uri: &Uri) -> Uri {
    let root = match uri.query() {
        Some(query) => PathAndQuery::try_from(format!("/?{query}")),
        None => Ok(PathAndQuery::from_static("/")),
    };
    root.expect("the query was part of a valid target").into()
}

/// A request's body on its way up.
enum RequestBody {
    Streamed(Incoming),
    Empty,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Streamed(body) => Pin::new(body).poll_frame(cx),
            Self::Empty => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Streamed(body) => body.is_end_stream(),
            Self::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Streamed(body) => body.size_hint(),
            Self::Empty => SizeHint::with_exact(0),
        }
    }
}

/// An answer's body on its way down: the upstream's, then perhaps some bytes of ours.
struct ResponseBody {
    stream: Option<Incoming>,
    tail: Option<Bytes>,
    /// Dropped with the body, when the last byte was handed over or the browser is gone.
    guard: Option<ActivityGuard>,
    in_request: Option<InRequest>,
}

impl ResponseBody {
    fn whole(body: Bytes) -> Self {
        let tail = (!body.is_empty()).then_some(body);
        Self {
            stream: None,
            tail,
            guard: None,
            in_request: None,
        }
    }

    fn streamed(stream: Incoming) -> Self {
        Self {
            stream: Some(stream),
            tail: None,
            guard: None,
            in_request: None,
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(stream) = &mut this.stream {
            match Pin::new(stream).poll_frame(cx) {
                Poll::Ready(None) => this.stream = None,
                // Trailers would come before our bytes; no server sends them with a page.
                Poll::Ready(Some(Ok(frame))) if frame.is_trailers() && this.tail.is_some() => {
                    this.stream = None;
                }
                other => return other,
            }
        }
        Poll::Ready(this.tail.take().map(|tail| Ok(Frame::data(tail))))
    }

    fn is_end_stream(&self) -> bool {
        self.tail.is_none() && self.stream.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self
            .stream
            .as_ref()
            .map_or(SizeHint::with_exact(0), Body::size_hint);
        if let Some(tail) = &self.tail {
            let more = tail.len() as u64;
            let exact = hint.upper();
            let lower = hint.lower() + more;
            hint = SizeHint::new();
            hint.set_lower(lower);
            if let Some(upper) = exact {
                hint.set_upper(upper + more);
            }
        }
        hint
    }
}
