//! The preview proxy between raw clients and raw upstreams on real sockets.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::{
    any::Any,
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use greenroom::{
    domain::{PreviewError, PreviewState, PreviewStatus},
    preview::{ActivitySink, PreviewSettings, PreviewSite, Previews, Proxy, ProxyKind},
    process::{ConfinementMode, Launcher},
    task::Tasks,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{
    Message,
    client::IntoClientRequest,
    handshake::server::{Request as WsRequest, Response as WsResponse},
    protocol::WebSocketConfig,
};

const SOON: Duration = Duration::from_secs(10);
const A: &str = "acme-alice-main-0123456789ab";
const B: &str = "acme-alice-blue-ba9876543210";

/// Confined as far as this kernel can. Its silence is longer than a test.
fn launcher() -> Launcher {
    let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
    Launcher::start_with_binary(binary, SOON * 10, ConfinementMode::Auto).unwrap()
}

#[derive(Default)]
struct Seen {
    in_flight: Arc<AtomicUsize>,
    requests: AtomicUsize,
    people: Mutex<Vec<String>>,
}

struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ActivitySink for Seen {
    fn request(&self) -> Box<dyn Any + Send + Sync> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Box::new(InFlight(self.in_flight.clone()))
    }

    fn person(&self, slug: &str) {
        self.people.lock().unwrap().push(slug.to_owned());
    }
}

/// A proxy with both listeners, and previews that the test reports on.
struct Bench {
    previews: Previews,
    tasks: Tasks,
    seen: Arc<Seen>,
    proxy: SocketAddr,
    hmr: SocketAddr,
}

impl Bench {
    async fn new() -> Self {
        let tasks = Tasks::new();
        let settings = PreviewSettings {
            access: greenroom::preview::Access::open(),
            node: "/nowhere/node".into(),
            private_root: "/nowhere".into(),
            most_awake: 3,
        };
        let previews = Previews::new(launcher(), settings, tasks.clone());
        let seen = Arc::new(Seen::default());
        let mut addresses = Vec::new();
        for kind in [ProxyKind::Preview, ProxyKind::HmrOnly] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            Proxy::serve(listener, kind, previews.clone(), seen.clone(), &tasks);
        }
        Self {
            previews,
            tasks,
            seen,
            proxy: addresses[0],
            hmr: addresses[1],
        }
    }

    fn adopt(&self, slug: &str, status: PreviewStatus) -> watch::Sender<PreviewStatus> {
        let (publish, seen) = watch::channel(status);
        let site = PreviewSite {
            slug: slug.to_owned(),
            worktree: "/nowhere".into(),
            port: 1,
            hosts: vec!["site.preview.example.com".to_owned()],
            readable: Vec::new(),
            writable: Vec::new(),
        };
        self.previews.adopt(site, seen);
        publish
    }

    /// Starts an upstream and a live, default preview before it.
    async fn upstream<F, Fut>(&self, slug: &str, serve: F) -> watch::Sender<PreviewStatus>
    where
        F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tasks = self.tasks.clone();
        self.tasks.spawn("upstream", async move {
            let token = tasks.token().clone();
            let accept = async {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tasks.spawn("upstream connection", serve(stream));
                }
            };
            token.run_until_cancelled(accept).await;
        });
        self.previews.set_default(slug);
        self.adopt(slug, live(port))
    }

    async fn connect(&self) -> Client {
        Client(TcpStream::connect(self.proxy).await.unwrap())
    }

    /// One request on a connection of its own.
    async fn ask(&self, request: &str) -> Answer {
        let mut client = self.connect().await;
        client.send(request).await;
        client.answer(!request.starts_with("HEAD")).await
    }
}

fn live(port: u16) -> PreviewStatus {
    PreviewStatus {
        state: PreviewState::Live,
        upstream: Some(port),
        ..PreviewStatus::off()
    }
}

fn starting(progress: &str) -> PreviewStatus {
    PreviewStatus {
        state: PreviewState::Starting,
        progress: progress.to_owned(),
        ..PreviewStatus::off()
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

struct Client(TcpStream);

impl Client {
    async fn send(&mut self, text: &str) {
        timeout(SOON, self.0.write_all(text.as_bytes()))
            .await
            .unwrap()
            .unwrap();
    }

    /// Reads until the text has been seen.
    async fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let byte = timeout(SOON, self.0.read_u8()).await;
            let byte = byte.unwrap_or_else(|_| {
                panic!("no {end:?} after {:?}", String::from_utf8_lossy(&text))
            });
            match byte {
                Ok(byte) => text.push(byte),
                Err(_) => break,
            }
        }
        String::from_utf8(text).unwrap()
    }

    async fn answer(&mut self, with_body: bool) -> Answer {
        let head = self.until("\r\n\r\n").await.to_ascii_lowercase();
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        let length = head
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        let mut body = String::new();
        if with_body && head.contains("transfer-encoding: chunked") {
            loop {
                let size = self.until("\r\n").await;
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                body.push_str(&self.exactly(size).await);
                assert_eq!(self.exactly(2).await, "\r\n");
                if size == 0 {
                    break;
                }
            }
        } else if with_body && let Some(length) = length {
            body = self.exactly(length.parse().unwrap()).await;
        }
        Answer { status, head, body }
    }

    async fn exactly(&mut self, length: usize) -> String {
        let mut bytes = vec![0; length];
        timeout(SOON, self.0.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

/// Answers every request on a connection with its own head, as text.
async fn echo_heads(stream: TcpStream) {
    let mut stream = Client(stream);
    loop {
        let head = stream.until("\r\n\r\n").await;
        if head.is_empty() {
            return;
        }
        let length = head.to_ascii_lowercase();
        let length = length
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        if let Some(length) = length {
            stream.exactly(length.parse().unwrap()).await;
        }
        stream
            .send(&format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{head}",
                head.len()
            ))
            .await;
    }
}

/// Answers every request on a connection with these bytes.
async fn say(stream: TcpStream, answer: &'static str) {
    let mut stream = Client(stream);
    while !stream.until("\r\n\r\n").await.is_empty() {
        stream.send(answer).await;
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, all)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn bodies_stream_both_ways_before_they_end() {
    let bench = Bench::new().await;
    bench
        .upstream(A, |stream| async move {
            let mut stream = Client(stream);
            stream.until("\r\n\r\n").await;
            stream.until("one\r\n").await;
            stream
                .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ngot one\r\n")
                .await;
            stream.until("two\r\n0\r\n\r\n").await;
            stream.send("7\r\ngot two\r\n0\r\n\r\n").await;
        })
        .await;
    let mut client = bench.connect().await;
    client.send("POST /up HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.until("got one\r\n").await;
    assert_eq!(
        bench.seen.in_flight.load(Ordering::SeqCst),
        1,
        "somebody is served"
    );
    client.send("3\r\ntwo\r\n0\r\n\r\n").await;
    client.until("got two\r\n0\r\n\r\n").await;
    eventually("nobody is served any more", || {
        bench.seen.in_flight.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn events_arrive_as_they_are_sent_and_hold_nobody_awake() {
    let bench = Bench::new().await;
    let (go, gone) = watch::channel(false);
    bench
        .upstream(A, move |stream| {
            let mut gone = gone.clone();
            async move {
                let mut stream = Client(stream);
                stream.until("\r\n\r\n").await;
                stream
                    .send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
                    .await;
                gone.wait_for(|go| *go).await.unwrap();
                stream.send("data: 2\n\n").await;
            }
        })
        .await;
    let mut client = bench.connect().await;
    client
        .send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    client.until("data: 1\n\n").await;
    assert_eq!(bench.seen.in_flight.load(Ordering::SeqCst), 0);
    go.send_replace(true);
    client.until("data: 2\n\n").await;
}

async fn echo_websocket(stream: TcpStream) {
    #[expect(clippy::result_large_err, reason = "tungstenite's own type")]
    let answer = |request: &WsRequest, mut response: WsResponse| {
        assert_eq!(
            request.uri().to_string(),
            "/socket?token=a%20b",
            "path and query as sent"
        );
        let protocol = request.headers()["sec-websocket-protocol"].clone();
        response
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        Ok(response)
    };
    let big = WebSocketConfig::default()
        .max_message_size(None)
        .max_frame_size(None);
    let socket = tokio_tungstenite::accept_hdr_async_with_config(stream, answer, Some(big)).await;
    let Ok(mut socket) = socket else { return };
    while let Some(Ok(message)) = socket.next().await {
        if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_websocket_is_a_tunnel_for_frames_of_any_size() {
    let bench = Bench::new().await;
    bench.upstream(A, echo_websocket).await;
    let mut request = format!("ws://{}/socket?token=a%20b", bench.proxy)
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", "vite-hmr".parse().unwrap());
    let origin = format!("http://{}", bench.proxy);
    request
        .headers_mut()
        .insert("origin", origin.parse().unwrap());
    let big = WebSocketConfig::default()
        .max_message_size(None)
        .max_frame_size(None);
    let stream = TcpStream::connect(bench.proxy).await.unwrap();
    let (mut socket, response) =
        tokio_tungstenite::client_async_with_config(request, stream, Some(big))
            .await
            .unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "vite-hmr");
    let large = "x".repeat(17_000_000);
    for text in ["hello", &large] {
        timeout(SOON, socket.send(Message::text(text)))
            .await
            .unwrap()
            .unwrap();
        let back = timeout(SOON * 3, socket.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(
            back.to_text().unwrap() == text,
            "{} bytes came back",
            back.len()
        );
    }
    assert_eq!(
        bench.seen.requests.load(Ordering::SeqCst),
        0,
        "a socket holds nobody awake"
    );
    // The program stops: the tunnel ends with it.
    assert!(bench.tasks.stop(SOON).await, "every task ended");
    let end = timeout(SOON, socket.next()).await.unwrap();
    assert!(!matches!(end, Some(Ok(Message::Text(_)))), "{end:?}");
}

fn handshake(host: &str, more: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                        Upgrade: websocket\r\nSec-WebSocket-Protocol: vite-hmr\r\n\r\n";

#[tokio::test]
async fn sockets_of_other_sites_are_refused() {
    let bench = Bench::new().await;
    bench.upstream(A, |stream| say(stream, SWITCHED)).await;
    let host = format!("{A}.localhost:4321");
    for (origin, status) in [
        ("", 101),
        (
            "Origin: http://acme-alice-main-0123456789ab.localhost:4321\r\n",
            101,
        ),
        ("Origin: null\r\n", 403),
        ("Origin: http://evil.example\r\n", 403),
        (
            "Origin: http://acme-alice-blue-ba9876543210.localhost:4321\r\n",
            403,
        ),
        (
            "Origin: http://acme-alice-main-0123456789ab.localhost:4321\r\nOrigin: null\r\n",
            403,
        ),
    ] {
        assert_eq!(
            bench.ask(&handshake(&host, origin)).await.status,
            status,
            "{origin:?}"
        );
    }
}

#[tokio::test]
async fn a_ping_of_vite_is_answered_by_a_server_that_is_there_alone() {
    let bench = Bench::new().await;
    let preview = bench.upstream(A, |stream| say(stream, SWITCHED)).await;
    let ping = handshake("localhost", "Sec-WebSocket-Protocol: vite-ping\r\n");
    assert_eq!(bench.ask(&ping).await.status, 101);
    for state in [
        PreviewState::Starting,
        PreviewState::Error,
        PreviewState::Asleep,
    ] {
        preview.send_replace(PreviewStatus {
            state,
            ..PreviewStatus::off()
        });
        assert_eq!(bench.ask(&ping).await.status, 503, "{state:?}");
    }
}

#[tokio::test]
async fn what_is_no_101_becomes_no_tunnel() {
    let bench = Bench::new().await;
    bench
        .upstream(A, |stream| {
            say(
                stream,
                "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno",
            )
        })
        .await;
    let answer = bench.ask(&handshake("localhost", "")).await;
    assert_eq!((answer.status, answer.body.as_str()), (426, "no"));

    let bench = Bench::new().await;
    bench.upstream(A, echo_heads).await;
    let h2c = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n\
               Upgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n";
    let answer = bench.ask(h2c).await;
    assert_eq!(answer.status, 200);
    let seen = answer.body.to_ascii_lowercase();
    assert!(
        !seen.contains("upgrade") && !seen.contains("http2-settings"),
        "{seen}"
    );
}

#[tokio::test]
async fn the_hmr_port_bridges_clients_that_name_no_subprotocol() {
    let bench = Bench::new().await;
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = heads.clone();
    bench
        .upstream(A, move |stream| {
            let seen = seen.clone();
            async move {
                let mut stream = Client(stream);
                let head = stream.until("\r\n\r\n").await.to_ascii_lowercase();
                seen.lock().unwrap().push(head);
                stream.send(SWITCHED).await;
                stream.send("bytes").await;
            }
        })
        .await;
    let ask = async |request: String| {
        let mut client = Client(TcpStream::connect(bench.hmr).await.unwrap());
        client.send(&request).await;
        let answer = client.answer(false).await;
        if answer.status == 101 {
            assert_eq!(client.exactly(5).await, "bytes");
        }
        answer
    };
    let page = "Origin: http://a.localhost:4321\r\n";
    let bridged = handshake("a.localhost:4322", page).replace("GET /", "GET /any/path?x=1");
    let answer = ask(bridged).await;
    assert_eq!(answer.status, 101);
    assert!(
        !answer.head.contains("sec-websocket-protocol"),
        "{}",
        answer.head
    );
    let head = heads.lock().unwrap().pop().unwrap();
    assert!(head.starts_with("get /?x=1 http/1.1\r\n"), "{head}");
    assert!(
        head.contains("sec-websocket-protocol: vite-hmr") && !head.contains("origin:"),
        "{head}"
    );

    let named = format!("{page}Sec-WebSocket-Protocol: vite-hmr\r\n");
    let answer = ask(handshake("a.localhost:4322", &named)).await;
    assert!(answer.head.contains("sec-websocket-protocol: vite-hmr"));
    assert!(
        heads
            .lock()
            .unwrap()
            .pop()
            .unwrap()
            .contains("origin: http://a.localhost:4321")
    );

    let foreign = handshake("a.localhost:4322", "Origin: http://evil.example\r\n");
    assert_eq!(ask(foreign).await.status, 403);
    let plain = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned();
    assert_eq!(ask(plain).await.status, 426);
}

#[tokio::test]
async fn head_and_ranges_pass_untouched() {
    let bench = Bench::new().await;
    bench
        .upstream(A, |stream| async move {
            let mut stream = Client(stream);
            loop {
                let head = stream.until("\r\n\r\n").await.to_ascii_lowercase();
                if head.is_empty() {
                    return;
                }
                let answer = if head.starts_with("head") {
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1234\r\n\r\n"
                } else {
                    assert!(head.contains("range: bytes=0-3"), "{head}");
                    "HTTP/1.1 206 Partial Content\r\nContent-Type: text/html\r\n\
                     Content-Range: bytes 0-3/99\r\nContent-Length: 4\r\n\r\n<htm"
                };
                stream.send(answer).await;
            }
        })
        .await;
    let mut client = bench.connect().await;
    for _ in 0..2 {
        client
            .send("HEAD / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Dest: document\r\n\r\n")
            .await;
        let answer = client.answer(false).await;
        assert!(
            answer.head.contains("content-length: 1234"),
            "{}",
            answer.head
        );
        client
            .send("GET / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Dest: document\r\nRange: bytes=0-3\r\n\r\n")
            .await;
        let answer = client.answer(true).await;
        assert_eq!((answer.status, answer.body.as_str()), (206, "<htm"));
        assert!(answer.head.contains("content-range: bytes 0-3/99"));
    }
}

#[tokio::test]
async fn connection_takes_nothing_from_the_site() {
    let bench = Bench::new().await;
    bench.upstream(A, echo_heads).await;
    let answer = bench
        .ask(
            "GET /p?q=1 HTTP/1.1\r\nHost: a.localhost:4321\r\nCookie: c=d\r\nX-Mine: 1\r\n\
             Sec-Fetch-Site: cross-site\r\nConnection: Host, Cookie, X-Mine, keep-alive\r\n\r\n",
        )
        .await;
    let seen = answer.body.to_ascii_lowercase();
    for kept in [
        "get /p?q=1 http/1.1\r\n",
        "host: a.localhost:4321\r\n",
        "cookie: c=d\r\n",
        "sec-fetch-site: cross-site\r\n",
        "x-forwarded-for: 127.0.0.1\r\n",
        "x-forwarded-host: a.localhost:4321\r\n",
        "x-forwarded-proto: http\r\n",
    ] {
        assert!(seen.contains(kept), "{kept:?} in {seen}");
    }
    assert!(
        !seen.contains("x-mine") && !seen.contains("\r\nconnection:"),
        "{seen}"
    );
}

#[tokio::test]
async fn unclear_requests_reach_the_site_once_or_not_at_all() {
    let bench = Bench::new().await;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    bench
        .upstream(A, move |stream| {
            let counted = counted.clone();
            async move {
                let mut stream = Client(stream);
                // Bytes after the head are looked through for what a smuggled request brings.
                let mut text = stream.until("\r\n\r\n").await;
                while let Ok(Ok(byte)) =
                    timeout(Duration::from_millis(150), stream.0.read_u8()).await
                {
                    text.push(char::from(byte));
                }
                counted.fetch_add(text.matches("HTTP/1.1\r\n").count(), Ordering::SeqCst);
                stream
                    .send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    .await;
            }
        })
        .await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (fields, body) in [
        (
            "Content-Length: 48\r\nTransfer-Encoding: chunked",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 4",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "Content-Length: 5\r\nContent-Length: 6",
            "abcdef".to_owned(),
        ),
        ("Content-Length: +5", "abcde".to_owned()),
        ("Content-Length: -1", String::new()),
        ("Content-Length: 0x5", "abcde".to_owned()),
        (
            "Transfer-Encoding: chunked, identity",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "Transfer-Encoding: xchunked",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "Transfer-Encoding: \u{b}chunked",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "Transfer-Encoding : chunked",
            format!("0\r\n\r\n{smuggled}"),
        ),
        (
            "X: a\r\n Transfer-Encoding: chunked",
            format!("0\r\n\r\n{smuggled}"),
        ),
        ("X: a\rTransfer-Encoding: chunked", String::new()),
        ("X(: a", String::new()),
        ("X: a\0b", String::new()),
        ("Host: other", String::new()),
    ] {
        count.store(0, Ordering::SeqCst);
        let mut client = bench.connect().await;
        client
            .send(&format!(
                "POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n\r\n{body}"
            ))
            .await;
        let answer = client.answer(true).await;
        let reached = count.load(Ordering::SeqCst);
        // What a peer sent beyond its request makes the kernel reset the connection as it is
        // closed: then no status is seen, and one request at most got through.
        assert!(
            matches!((answer.status, reached), (400, 0) | (200, 1) | (0, 0 | 1)),
            "{fields:?}: status {}, {reached} requests",
            answer.status
        );
    }
    for (line, host) in [
        ("GET http://other/ HTTP/1.1", "Host: localhost\r\n"),
        ("GET / HTTP/1.1", ""),
        ("GET / HTTP/1.1", "Host:\r\n"),
    ] {
        assert_eq!(
            bench.ask(&format!("{line}\r\n{host}\r\n")).await.status,
            400,
            "{line} {host}"
        );
    }
    let connect = bench
        .ask("CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n")
        .await;
    assert_eq!(connect.status, 405);
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(70_000)
    );
    count.store(0, Ordering::SeqCst);
    assert!(matches!(bench.ask(&long).await.status, 431 | 0), "too long");
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X: y\r\n".repeat(1000)
    );
    assert!(matches!(bench.ask(&many).await.status, 431 | 0), "too many");
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connection_that_the_site_closed_is_replaced_unseen() {
    let bench = Bench::new().await;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    bench
        .upstream(A, move |stream| {
            let counted = counted.clone();
            async move {
                // One answer that promises to stay; the next request is read and dropped.
                let mut stream = Client(stream);
                stream.until("\r\n\r\n").await;
                counted.fetch_add(1, Ordering::SeqCst);
                stream
                    .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    .await;
                stream.until("\r\n\r\n").await;
            }
        })
        .await;
    let mut client = bench.connect().await;
    for _ in 0..5 {
        client
            .send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await;
        assert_eq!(client.answer(true).await.body, "ok");
    }
    assert_eq!(count.load(Ordering::SeqCst), 5);
    client
        .send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi")
        .await;
    let answer = client.answer(true).await;
    assert_eq!(
        answer.status, 502,
        "what may have had an effect is not repeated"
    );
    assert_eq!(count.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn one_upstream_connection_serves_one_downstream_connection() {
    let bench = Bench::new().await;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    bench
        .upstream(A, move |stream| {
            counted.fetch_add(1, Ordering::SeqCst);
            echo_heads(stream)
        })
        .await;
    let mut client = bench.connect().await;
    for _ in 0..50 {
        client
            .send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi")
            .await;
        assert_eq!(client.answer(true).await.status, 200);
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_holding_page_becomes_the_site() {
    let bench = Bench::new().await;
    let site = bench.upstream(A, echo_heads).await;
    let live = site.borrow().clone();
    site.send_replace(starting("Installing <dependencies>"));
    let page = "GET /about HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n";
    let answer = bench.ask(page).await;
    assert_eq!(answer.status, 503);
    assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
    assert!(
        answer.body.contains("Installing &lt;dependencies&gt;"),
        "{}",
        answer.body
    );
    let script = bench
        .ask("GET /__greenroom/holding.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    assert!(script.body.contains("/__greenroom/status"));
    let status = "GET /__greenroom/status HTTP/1.1\r\nHost: localhost\r\n\r\n";
    assert!(
        bench
            .ask(status)
            .await
            .body
            .contains("\"state\":\"starting\"")
    );

    // What can't be shown a page waits for the site.
    let mut waiting = bench.connect().await;
    waiting
        .send("GET /data.json HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
        .await;
    eventually("the request waits", || {
        bench.seen.in_flight.load(Ordering::SeqCst) == 1
    })
    .await;
    site.send_replace(live);
    assert!(
        waiting
            .answer(true)
            .await
            .body
            .starts_with("GET /data.json")
    );
    assert!(bench.ask(status).await.body.contains("\"state\":\"live\""));
    assert!(bench.ask(page).await.body.starts_with("GET /about"));

    let broken = PreviewError {
        message: "no <such> file".to_owned(),
        ..PreviewError::default()
    };
    site.send_replace(PreviewStatus {
        state: PreviewState::Error,
        errors: vec![broken],
        ..PreviewStatus::off()
    });
    let answer = bench.ask(page).await;
    assert!(answer.status == 503 && answer.body.contains("no &lt;such&gt; file"));
    site.send_replace(PreviewStatus::off());
    assert_eq!(
        bench
            .ask("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await
            .status,
        503
    );
}

#[tokio::test]
async fn a_server_that_is_gone_before_its_news_gets_the_holding_page() {
    let bench = Bench::new().await;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let _site = bench.adopt(A, live(port));
    bench.previews.set_default(A);
    let page = "GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n";
    assert_eq!(bench.ask(page).await.status, 503);
}

#[tokio::test]
async fn threads_live_side_by_side_under_their_names() {
    let bench = Bench::new().await;
    let _a = bench
        .upstream(A, |s| {
            say(s, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nA")
        })
        .await;
    let _b = bench
        .upstream(B, |s| {
            say(s, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nB")
        })
        .await;
    let body = async |host: &str| {
        let answer = bench
            .ask(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .await;
        (answer.status, answer.body)
    };
    let page = |text: &str| (200, text.to_owned());
    assert_eq!(body(&format!("{A}.localhost:4321")).await, page("A"));
    assert_eq!(body(&format!("{B}.localhost:4321")).await, page("B"));
    assert_eq!(
        body("localhost:4321").await,
        page("B"),
        "the thread last initialised"
    );
    assert_eq!(body(&format!("{A}.preview.example.com")).await, page("A"));
    // One connection, several threads (a load balancer does that).
    let mut client = bench.connect().await;
    for (slug, text) in [(A, "A"), (B, "B"), (A, "A")] {
        client
            .send(&format!("GET / HTTP/1.1\r\nHost: {slug}.localhost\r\n\r\n"))
            .await;
        assert_eq!(client.answer(true).await.body, text);
    }
    let unknown =
        "GET / HTTP/1.1\r\nHost: acme-bob-x-00112233aabb.localhost\r\nAccept: text/html\r\n\r\n";
    let answer = bench.ask(unknown).await;
    assert!(
        answer.status == 404 && answer.body.contains("<h1"),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn vite_gets_a_host_that_it_serves() {
    let bench = Bench::new().await;
    let site = bench.upstream(A, echo_heads).await;
    let port = site.borrow().upstream.unwrap();
    for (host, upstream) in [
        ("x.localhost:4321", "x.localhost:4321".to_owned()),
        (
            "site.preview.example.com",
            "site.preview.example.com".to_owned(),
        ),
        ("rebound.evil.example", format!("localhost:{port}")),
    ] {
        let answer = bench
            .ask(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .await;
        let seen = answer.body.to_ascii_lowercase();
        assert!(
            seen.contains(&format!("\r\nhost: {upstream}\r\n")),
            "{host}: {seen}"
        );
        assert!(
            seen.contains(&format!("x-forwarded-host: {host}\r\n")),
            "{host}: {seen}"
        );
    }
}

#[tokio::test]
async fn pages_tell_that_a_person_looks() {
    let bench = Bench::new().await;
    bench
        .upstream(A, |stream| async move {
            let mut stream = Client(stream);
            loop {
                let head = stream.until("\r\n\r\n").await;
                if head.is_empty() {
                    return;
                }
                let answer = if head.starts_with("GET /chunked") {
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n\
                     6\r\n<html>\r\n7\r\n</html>\r\n0\r\n\r\n"
                } else if head.starts_with("GET /zipped") {
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\
                     Content-Length: 3\r\n\r\nzip"
                } else {
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"
                };
                stream.send(answer).await;
            }
        })
        .await;
    let get = async |path: &str, dest: &str| {
        let text =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Dest: {dest}\r\n\r\n");
        bench.ask(&text).await.body
    };
    let with_script = "<html></html>\n<script src=\"/__greenroom/presence.js\" defer></script>\n";
    assert_eq!(get("/", "document").await, with_script);
    assert_eq!(get("/chunked", "iframe").await, with_script);
    assert_eq!(
        get("/", "empty").await,
        "<html></html>",
        "a fetch gets the bytes as they are"
    );
    assert_eq!(get("/zipped", "document").await, "zip");
    assert!(
        get("/__greenroom/presence.js", "script")
            .await
            .contains("visibilityState")
    );

    let say = async |origin: &str| {
        let text = format!(
            "POST /__greenroom/presence HTTP/1.1\r\nHost: localhost:4321\r\n{origin}Content-Length: 0\r\n\r\n"
        );
        bench.ask(&text).await.status
    };
    assert_eq!(say("Origin: http://evil.example\r\n").await, 403);
    assert!(bench.seen.people.lock().unwrap().is_empty());
    assert_eq!(say("Origin: http://localhost:4321\r\n").await, 204);
    assert_eq!(*bench.seen.people.lock().unwrap(), [A]);
}
