//! One connection to the proxy: `CONNECT`, or requests with a whole address that are not encrypted.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{CONNECTION, HOST, PROXY_AUTHORIZATION},
};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, client, server, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    Door,
    reach::ReachError,
    rules::{Refusal, Target},
};
use crate::task::Tasks;

/// For a request's head, and how long a connection is kept that asks for nothing.
const HEAD: Duration = Duration::from_secs(30);
/// Most of a head, in bytes.
const HEAD_BYTES: usize = 32 * 1024;
const BUFFER: usize = 16 * 1024;
/// Between this connection and the one to the target, for what is not encrypted.
const IN_BETWEEN: usize = 32 * 1024;

/// How long connections may last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Without a byte in either direction; it may be twice as long.
    pub(super) idle: Duration,
    /// Whatever happens on it.
    pub(super) total: Duration,
}

impl Default for Limits {
    /// A registry may take a minute for a large package's first byte; whoever polls comes again.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(120),
            total: Duration::from_secs(60 * 60),
        }
    }
}

type Body = BoxBody<Bytes, hyper::Error>;

/// What is to become of a connection after its `CONNECT`.
type Promised = Arc<Mutex<Option<(OnUpgrade, TcpStream)>>>;

/// Serves a child's connection to its end.
pub(super) async fn serve(stream: TcpStream, door: Door, tasks: Tasks) {
    let limits = door.limits();
    let promised = Promised::default();
    let (to_promise, inner) = (promised.clone(), tasks.clone());
    let answer = service_fn(move |request| {
        let (door, promised, tasks) = (door.clone(), to_promise.clone(), inner.clone());
        async move { Ok::<_, Infallible>(answer(&door, request, &promised, &tasks).await) }
    });
    let connection = server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), answer)
        .with_upgrades();
    let all = async {
        // A child that goes away, or no HTTP.
        connection.await.ok();
        let promise = take(&promised);
        if let Some((upgrade, target)) = promise
            && let Ok(child) = upgrade.await
        {
            carry(TokioIo::new(child), target, limits).await;
        }
    };
    // The limit of a tunnel is its own; this one is for a connection that asks again and again.
    let all = tokio::time::timeout(limits.total.saturating_mul(2), all);
    tasks.token().run_until_cancelled(all).await;
}

fn take(promised: &Promised) -> Option<(OnUpgrade, TcpStream)> {
    promised
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
}

async fn answer(
    door: &Door,
    request: Request<Incoming>,
    promised: &Promised,
    tasks: &Tasks,
) -> Response<Body> {
    let target = match request.method() {
        &Method::CONNECT => tunnel_target(request.uri()),
        _ => plain_target(request.uri()),
    };
    let Some(target) = target else {
        return say(
            StatusCode::BAD_REQUEST,
            "this is greenroom's proxy: it takes CONNECT host:port, and http:// addresses",
        );
    };
    let ground = match door.judge(&target) {
        Ok(ground) => ground,
        Err(refusal) => return refused(door, &target, refusal),
    };
    let answered = match request.method() {
        &Method::CONNECT => match door.way_out().tunnel(&target, ground).await {
            Ok(stream) => {
                stream.set_nodelay(true).ok();
                let upgrade = hyper::upgrade::on(request);
                *promised.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, stream));
                Ok(Response::new(empty()))
            }
            Err(error) => Err(error),
        },
        _ => match door.way_out().plain(&target, ground).await {
            Ok(reached) => {
                let (stream, proxy) = (reached.stream, reached.proxy);
                let asked = forward(request, &target, proxy, stream, door.limits(), tasks).await;
                Ok(asked.unwrap_or_else(|| broken("it broke the connection off")))
            }
            Err(error) => Err(error),
        },
    };
    match answered {
        Ok(response) => {
            door.count("allowed");
            response
        }
        Err(ReachError::Refused(refusal)) => refused(door, &target, refusal),
        Err(error) => {
            door.count("unreachable");
            tracing::info!(
                host = %target.host, port = target.port, from = door.name(),
                error = %crate::text::plain(&error.to_string()),
                "a host could not be reached for a child"
            );
            broken(&error.to_string())
        }
    }
}

fn refused(door: &Door, target: &Target, refusal: Refusal) -> Response<Body> {
    door.count(refusal.as_str());
    door.note_refusal(target, refusal);
    let what = match refusal {
        Refusal::Host => "is not among the hosts that may be reached from here (EGRESS_ALLOW)",
        Refusal::Port => "may be reached from here on the ports 443 and 80 alone",
        Refusal::Address => "is an address; from here only names may be reached (EGRESS_ALLOW)",
        Refusal::Inside => "leads to an address inside a private network",
    };
    say(
        StatusCode::FORBIDDEN,
        &format!("{}:{} {what}", target.host, target.port),
    )
}

fn broken(why: &str) -> Response<Body> {
    say(StatusCode::BAD_GATEWAY, why)
}

fn say(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::new(Bytes::from(format!("greenroom: {text}\n")));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, plain);
    response
}

fn empty() -> Body {
    http_body_util::Empty::new()
        .map_err(|never| match never {})
        .boxed()
}

/// `host:port`, and nothing else.
fn tunnel_target(uri: &Uri) -> Option<Target> {
    let authority = uri.authority()?;
    if uri.path_and_query().is_some() || authority.as_str().contains('@') {
        return None;
    }
    Target::new(authority.host(), authority.port_u16()?)
}

/// `http://host/…`; one without a scheme asks us, and we serve nothing.
fn plain_target(uri: &Uri) -> Option<Target> {
    let authority = uri.authority()?;
    if uri.scheme_str() != Some("http") || authority.as_str().contains('@') {
        return None;
    }
    Target::new(authority.host(), authority.port_u16().unwrap_or(80))
}

/// Sends one request on, and its answer back as it comes. `None` where the target broke off.
async fn forward(
    request: Request<Incoming>,
    target: &Target,
    proxy: Option<Option<HeaderValue>>,
    stream: TcpStream,
    limits: Limits,
    tasks: &Tasks,
) -> Option<Response<Body>> {
    let (mut head, body) = request.into_parts();
    strip(&mut head.headers);
    // The one that was judged, whatever the child writes here.
    let host = match target.port {
        80 => target.host.to_string(),
        port => format!("{}:{port}", target.host),
    };
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let uri = match &proxy {
        Some(_) => format!("http://{host}{path}"),
        None => path.to_owned(),
    };
    head.uri = uri.parse().ok()?;
    head.headers.insert(HOST, host.parse().ok()?);
    if let Some(Some(proof)) = proxy {
        head.headers.insert(PROXY_AUTHORIZATION, proof);
    }
    let (near, far) = tokio::io::duplex(IN_BETWEEN);
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(near))
        .await
        .ok()?;
    let stop = tasks.token().clone();
    tasks.spawn("egress-request", async move {
        let both = async { tokio::join!(connection, carry(far, stream, limits)) };
        stop.run_until_cancelled(both).await;
    });
    let request = Request::from_parts(head, body);
    let mut response = sender.send_request(request).await.ok()?;
    strip(response.headers_mut());
    Some(response.map(|body| body.boxed()))
}

/// Removes what belongs to one connection, and what was said to us.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // Framing is hyper's.
        .filter(|name| name != http::header::CONTENT_LENGTH)
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    ] {
        headers.remove(name);
    }
}

/// Bytes both ways, until both are done or a limit is reached.
async fn carry(
    child: impl AsyncRead + AsyncWrite,
    target: impl AsyncRead + AsyncWrite,
    limits: Limits,
) {
    let (from_child, to_child) = tokio::io::split(child);
    let (from_target, to_target) = tokio::io::split(target);
    let moved = AtomicU64::new(0);
    let both = async {
        tokio::join!(
            pump(from_child, to_target, &moved),
            pump(from_target, to_child, &moved)
        );
    };
    let idle = async {
        let mut before = u64::MAX;
        loop {
            let now = moved.load(Ordering::Relaxed);
            if now == before {
                return;
            }
            before = now;
            tokio::time::sleep(limits.idle).await;
        }
    };
    tokio::select! {
        () = both => {}
        () = idle => {}
        () = tokio::time::sleep(limits.total) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &AtomicU64,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                moved.fetch_add(read as u64, Ordering::Relaxed);
                if to.write_all(&buffer[..read]).await.is_err() || to.flush().await.is_err() {
                    break;
                }
            }
        }
    }
    to.shutdown().await.ok();
}
