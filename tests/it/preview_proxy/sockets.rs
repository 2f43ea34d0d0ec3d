//! WebSockets through the proxy.

use super::*;

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

fn handshake(host: &str, more: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                        Upgrade: websocket\r\nSec-WebSocket-Protocol: vite-hmr\r\n\r\n";

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
