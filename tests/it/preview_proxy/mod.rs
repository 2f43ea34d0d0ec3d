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

mod bench;
mod conformance;
mod framing;
mod pages;
mod sockets;

use bench::{Bench, Client, echo_heads, eventually, live, say, starting};

const SOON: Duration = Duration::from_secs(60);
const A: &str = "acme-alice-main-0123456789ab";
const B: &str = "acme-alice-blue-ba9876543210";

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

#[tokio::test]
async fn trailers_and_interim_answers_confuse_nobody() {
    let bench = Bench::new().await;
    bench
        .upstream(A, |stream| async move {
            let mut stream = Client(stream);
            stream.until("\r\n\r\n").await;
            stream
                .send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
                .await;
            stream.send("HTTP/1.1 100 Continue\r\n\r\n").await;
            stream.until("body\r\n0\r\n\r\n").await;
            stream
                .send(
                    "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n\
                     3\r\none\r\n0\r\nX-Sum: 42\r\n\r\n",
                )
                .await;
        })
        .await;
    let mut client = bench.connect().await;
    client
        .send(
            "POST / HTTP/1.1\r\nHost: localhost\r\nTE: trailers\r\nConnection: TE\r\n\
             Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .await;
    let go_on = client.until("\r\n\r\n").await;
    assert!(go_on.starts_with("HTTP/1.1 100 "), "{go_on}");
    client.send("4\r\nbody\r\n0\r\n\r\n").await;
    let head = client.until("\r\n\r\n").await.to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 200 ") && head.contains("trailer: x-sum"),
        "{head}"
    );
    let rest = client.until("\r\n\r\n").await.to_ascii_lowercase();
    assert!(rest.ends_with("0\r\nx-sum: 42\r\n\r\n"), "{rest}");
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
