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
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex},
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
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};

use super::{
    ActivitySink, PreviewHandle, Previews,
    access::{Verdict, hide_cookies},
    body::{RequestBody, ResponseBody},
    header_deadline::HeaderDeadline,
    headers,
    pages::{self, Page},
    refusals::{
        UpstreamError, bad_request, names_no_host, not_yet, refused, upgrade_required,
        upstream_problem,
    },
    routing::{Host, SameSite, is_own_origin},
    tunnel::tunnel,
    upstream::Upstream,
};
use crate::{
    domain::{PreviewState, PreviewStatus},
    task::Tasks,
    text::status_class,
};

/// Connections at once on one listener, tunnels included; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Of one request's head, in bytes (request line and fields). Of fields hyper takes 100; another
/// number would be allocated anew for every request.
const MAX_HEAD: usize = 64 * 1024;
/// How long a request that can't be shown a page waits for a server that starts.
const WAIT_FOR_LIVE: Duration = Duration::from_secs(30);
/// Of that, how long a request waits for a server that has failed to be started again: a page that is
/// shown as it was asks for much that would hold all of the browser's connections.
const WAIT_FOR_RESTART: Duration = Duration::from_secs(2);
/// Vite leaves handshakes that it doesn't know without an answer.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(15);
/// For requests in flight when the program stops.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
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
            upstream: Upstream::new(self.tasks.clone()),
            proxy: self,
            peer: headers::forwarded_for(peer.ip()),
            permit: Arc::new(permit),
            last_host: Mutex::default(),
        });
        let service = service_fn(move |request| {
            let downstream = downstream.clone();
            let in_request = switch.begin();
            async move {
                let mut response = match downstream.answer(request).await {
                    Ok(response) => response,
                    Err(page) => page.map(ResponseBody::whole),
                };
                let class = status_class(response.status().as_u16());
                metrics::counter!("greenroom_preview_requests_total", "status" => class)
                    .increment(1);
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
    upstream: Upstream,
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
        if !headers::is_vite_ping(request.headers()) {
            preview.note_used();
        }
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
            (&Method::GET, pages::STATUS) => {
                // A holding page, which has a person before it.
                preview.wake();
                pages::status(&preview.status().borrow())
            }
            (&Method::GET, pages::PRESENCE_SCRIPT) => pages::presence_script(),
            (&Method::GET, pages::BANNER_SCRIPT) => pages::banner_script(),
            (&Method::GET, pages::HOLDING_SCRIPT) => pages::holding_script(),
            (&Method::POST, pages::PRESENCE) => {
                // Another site's page must not keep the container awake.
                match self.check_origin(request.headers(), host) {
                    Ok(()) => {
                        self.proxy.activity.person(preview.slug());
                        preview.note_person();
                        let wants_socket = request
                            .headers()
                            .get("x-greenroom-hears")
                            .is_some_and(|hears| hears == "1");
                        if wants_socket && preview.has_lost_its_sockets() {
                            // The script loads the page again.
                            return pages::empty(StatusCode::RESET_CONTENT);
                        }
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
            None if to.as_page => return Err(self.hold(head, to)),
            None => Box::pin(await_upstream(&to.preview)).await?,
        };
        // RFC 9110 9.2.2.
        let is_repeatable = head.method.is_idempotent() && body.is_end_stream();
        let request = self.to_upstream(head, RequestBody::streamed(body), to, port);
        let again =
            is_repeatable.then_some(|| self.to_upstream(head, RequestBody::Empty, to, port));
        let response = match self.upstream.exchange(port, request, again).await {
            Ok(response) => response,
            Err(UpstreamError::Unreachable) if to.as_page => return Err(self.hold(head, to)),
            Err(error) => return Err(upstream_problem(&error, to.as_page)),
        };
        if to.as_page {
            to.preview.note_answer(head.uri.path());
        }
        let mut response = response.map(ResponseBody::streamed);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked for it.
            return Err(upstream_problem(&UpstreamError::Closed, to.as_page));
        }
        headers::strip_hop_by_hop(response.headers_mut());
        *response.version_mut() = Version::HTTP_11;
        if headers::asks_for_document(&head.method, &head.headers) {
            self.keep_or_replace(head, &mut response, to)?;
        }
        if !headers::is_event_stream(response.headers()) {
            response.body_mut().guard = Some(guard);
        }
        Ok(response)
    }

    /// What is added to a page that people look at; a broken one is shown as it was before.
    fn keep_or_replace(
        &self,
        head: &Parts,
        response: &mut Response<ResponseBody>,
        to: &Destination,
    ) -> Result<(), Page> {
        let shows_banner = self.proxy.previews.shows_banner();
        if response.status().is_server_error() {
            return match self.last_good(head, to) {
                Some(html) => Err(pages::last_good(response.status(), &html)),
                None => Ok(()),
            };
        }
        if !headers::is_plain_html(response.status(), response.headers()) {
            return Ok(());
        }
        let is_for_all = headers::is_for_all(&head.headers, response.headers());
        if shows_banner && is_for_all {
            let rendering = to.preview.last_good().begin(target(head));
            response.body_mut().rendering = Some(rendering);
        }
        let tag = if shows_banner {
            pages::BANNER_TAG
        } else {
            pages::PRESENCE_TAG
        };
        headers::lengthen(response.headers_mut(), tag.len());
        response.body_mut().tail = Some(Bytes::from_static(tag.as_bytes()));
        Ok(())
    }

    /// A page as it was before it broke, where that is wanted and known.
    fn last_good(&self, head: &Parts, to: &Destination) -> Option<Bytes> {
        let is_wanted = self.proxy.previews.shows_banner()
            && headers::asks_for_document(&head.method, &head.headers);
        is_wanted.then(|| to.preview.last_good().page(target(head)))?
    }

    /// A page where there is no server to ask: one that sleeps wakes, and one that failed is tried
    /// once more, because somebody looks.
    fn hold(&self, head: &Parts, to: &Destination) -> Page {
        let status = to.preview.status();
        let status = status.borrow();
        let has_failed = status.state == PreviewState::Error;
        if has_failed || status.state == PreviewState::Asleep {
            to.preview.retry();
        }
        match self.last_good(head, to) {
            Some(html) if has_failed => pages::last_good(StatusCode::SERVICE_UNAVAILABLE, &html),
            _ => pages::holding(&status),
        }
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
            let mut sender = self.upstream.connect(port).await?;
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
        let late = is_hmr.then(|| to.preview.error_to_replay()).flatten();
        let hmr = is_hmr.then(|| to.preview.open_socket());
        if is_bridged {
            // A client that named none must not be given one (RFC 6455 4.1).
            head.headers.remove(SEC_WEBSOCKET_PROTOCOL);
        }
        let tunnel = tunnel(
            on_downstream,
            on_upstream,
            hmr,
            late,
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

/// Waits for a server that starts, wakes or is being repaired.
async fn await_upstream(preview: &PreviewHandle) -> Result<u16, Page> {
    let mut status = preview.status();
    if status.borrow().state == PreviewState::Off {
        return Err(not_yet(false));
    }
    preview.wake();
    let has_failed = |status: &PreviewStatus| status.state == PreviewState::Error;
    let live = async {
        loop {
            let seen = status.wait_for(|status| status.upstream.is_some() || has_failed(status));
            if let Some(port) = seen.await.ok()?.upstream {
                return Some(port);
            }
            let next = status.wait_for(|status| status.upstream.is_some() || !has_failed(status));
            timeout(WAIT_FOR_RESTART, next).await.ok()?.ok()?;
        }
    };
    timeout(WAIT_FOR_LIVE, live)
        .await
        .ok()
        .flatten()
        .ok_or_else(|| not_yet(false))
}

/// A page's address, with its query.
fn target(head: &Parts) -> &str {
    head.uri.path_and_query().map_or("/", PathAndQuery::as_str)
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
