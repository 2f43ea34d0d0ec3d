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

mod forward;
mod upgrade;

use std::{
    convert::Infallible,
    fmt,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{HOST, ORIGIN},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
    time::timeout,
};

use super::{
    ActivitySink, PreviewHandle, Previews,
    access::Verdict,
    body::ResponseBody,
    header_deadline::HeaderDeadline,
    headers,
    pages::{self, Page},
    refusals::{bad_request, names_no_host, refused, upgrade_required},
    routing::{Host, SameSite, is_own_origin},
    upstream::Upstream,
};
use crate::{task::Tasks, text::status_class};

/// A browser that is gone without a word is noticed after a quiet minute.
const QUIET_BEFORE_PROBE: u32 = 30;
const PROBE_EVERY: u32 = 10;
const MOST_PROBES: u32 = 3;
/// Connections at once on one listener, tunnels included; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Of one request's head, in bytes (request line and fields). Of fields hyper takes 100; another
/// number would be allocated anew for every request.
const MAX_HEAD: usize = 64 * 1024;
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
        let serve = |stream, peer, permit| self.clone().connection(stream, peer, permit);
        let name = "preview connection";
        self.tasks
            .accept(name, listener, MAX_CONNECTIONS, serve)
            .await;
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) {
        notice_death(&stream);
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
                        if wants_socket && preview.is_deaf() {
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
}

/// Has the kernel ask a silent browser whether it is there: what sleeps or went out of reach says no
/// goodbye, and its HMR socket would count as one that hears for ever.
fn notice_death(stream: &TcpStream) {
    // A browser is served without that too.
    setsockopt(stream, sockopt::TcpKeepIdle, &QUIET_BEFORE_PROBE).ok();
    setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_EVERY).ok();
    setsockopt(stream, sockopt::TcpKeepCount, &MOST_PROBES).ok();
    setsockopt(stream, sockopt::KeepAlive, &true).ok();
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
