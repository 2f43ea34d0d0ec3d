//! The proxy over real sockets: who gets through, and how it ends.

use std::{net::SocketAddr, time::Duration};

use hyper_util::client::proxy::matcher::Matcher;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// Answers each connection with what it was sent, in capitals, until the other side is done.
async fn shouting(tasks: &Tasks) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let inner = tasks.clone();
    tasks.spawn("shouting", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            inner.spawn("shout", async move {
                let mut buffer = [0; 1024];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    buffer[..read].make_ascii_uppercase();
                    if stream.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A server that answers each request by its head.
async fn telling(tasks: &Tasks) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn("telling", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let head = until(&mut stream, "\r\n\r\n").await;
            let answer = format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{head}",
                head.len()
            );
            stream.write_all(answer.as_bytes()).await.ok();
        }
    });
    address
}

async fn door(names: &[&str], limits: Limits, tasks: &Tasks) -> Door {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let way_out = WayOut::by(Matcher::builder().build());
    Door::open_by("site", true, &names, way_out, limits, tasks)
        .await
        .unwrap()
}

fn registry(address: SocketAddr) -> Url {
    format!("http://{address}/").parse().unwrap()
}

async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut all = Vec::new();
    let read = async {
        while !all.ends_with(end.as_bytes()) {
            match stream.read_u8().await {
                Ok(byte) => all.push(byte),
                Err(_) => break,
            }
        }
    };
    timeout(SOON, read).await.expect("it ends");
    String::from_utf8(all).unwrap()
}

/// What is answered to a head, to the end of the connection's or the answer's head.
async fn ask(door: &Door, head: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, door.port()))
        .await
        .unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut stream, "\r\n\r\n").await;
    (stream, answer)
}

async fn status(door: &Door, head: &str) -> u16 {
    let (_, answer) = ask(door, head).await;
    answer.split(' ').nth(1).unwrap_or("0").parse().unwrap()
}

fn connect(place: &str) -> String {
    format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n")
}

#[tokio::test]
async fn a_tunnel_leads_to_who_may_be_reached_and_to_nobody_else() {
    let (tasks, others) = (Tasks::new(), Tasks::new());
    let server = shouting(&others).await;
    let door = door(&["localhost"], Limits::default(), &tasks).await;
    for place in [
        server.to_string(),
        format!("localhost:{}", server.port()),
        // Its name leads here, which is inside.
        "localhost:443".to_owned(),
        "example.com:443".to_owned(),
        "[::1]:443".to_owned(),
        "169.254.170.2:80".to_owned(),
    ] {
        assert_eq!(status(&door, &connect(&place)).await, 403, "{place}");
    }
    door.admit_registries([&registry(server)]);
    let (mut stream, answer) = ask(&door, &connect(&server.to_string())).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for word in ["hello", "again"] {
        stream.write_all(word.as_bytes()).await.unwrap();
        let heard = until(&mut stream, &word.to_uppercase()).await;
        assert_eq!(heard, word.to_uppercase());
    }
    // The end goes through as well.
    stream.shutdown().await.unwrap();
    assert_eq!(until(&mut stream, "never").await, "");
    assert!(tasks.stop(SOON).await, "nothing is left");
}

#[tokio::test]
async fn what_is_no_request_for_a_proxy_is_told_so() {
    let tasks = Tasks::new();
    let server = telling(&tasks).await;
    let door = door(&[], Limits::default(), &tasks).await;
    door.admit_registries([&registry(server)]);
    for head in [
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        format!("GET https://{server}/ HTTP/1.1\r\nHost: x\r\n\r\n"),
        format!("GET http://user@{server}/ HTTP/1.1\r\nHost: x\r\n\r\n"),
        "CONNECT localhost HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "CONNECT user@localhost:443 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "CONNECT /:443 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "nonsense\r\n\r\n".to_owned(),
        format!(
            "CONNECT x:443 HTTP/1.1\r\nX: {}\r\n\r\n",
            "x".repeat(60_000)
        ),
    ] {
        let status = status(&door, &head).await;
        assert!(
            matches!(status, 400 | 403 | 431 | 0),
            "{status}: {head:.60}"
        );
        assert_ne!(status, 403, "{head:.60}");
    }
}

#[tokio::test]
async fn a_plain_request_goes_to_the_host_that_was_judged() {
    let tasks = Tasks::new();
    let server = telling(&tasks).await;
    let door = door(&[], Limits::default(), &tasks).await;
    door.admit_registries([&registry(server)]);
    let head = format!(
        "GET http://{server}/a?b=c HTTP/1.1\r\nHost: other.example\r\nProxy-Authorization: Basic c2VjcmV0\r\n\
         Connection: close, X-Hop\r\nX-Hop: 1\r\nAccept: x/y\r\n\r\n"
    );
    let (mut stream, answer) = ask(&door, &head).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let told = until(&mut stream, "never").await;
    assert!(told.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{told}");
    let told = told.to_lowercase();
    assert!(told.contains(&format!("host: {server}\r\n")), "{told}");
    assert!(told.contains("accept: x/y"), "{told}");
    for gone in ["other.example", "c2vjcmv0", "x-hop"] {
        assert!(!told.contains(gone), "{gone}: {told}");
    }
}

#[tokio::test]
async fn a_connection_that_is_silent_or_too_old_is_ended() {
    let tasks = Tasks::new();
    let server = shouting(&tasks).await;
    let hour = Duration::from_secs(3600);
    let idle = Limits {
        idle: Duration::from_millis(100),
        total: hour,
    };
    let old = Limits {
        idle: hour,
        total: Duration::from_millis(300),
    };
    for limits in [idle, old] {
        let door = door(&[], limits, &tasks).await;
        door.admit_registries([&registry(server)]);
        let (mut stream, answer) = ask(&door, &connect(&server.to_string())).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(until(&mut stream, "never").await, "", "{limits:?}");
    }
}

#[tokio::test]
async fn connections_are_bounded_and_the_rest_waits() {
    let tasks = Tasks::new();
    let server = shouting(&tasks).await;
    let door = door(&[], Limits::default(), &tasks).await;
    door.admit_registries([&registry(server)]);
    let mut open = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let (stream, answer) = ask(&door, &connect(&server.to_string())).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        open.push(stream);
    }
    let place = connect(&server.to_string());
    let one_more = ask(&door, &place);
    tokio::pin!(one_more);
    let early = timeout(Duration::from_millis(300), &mut one_more).await;
    assert!(early.is_err(), "it waits");
    open.pop();
    let (_, answer) = timeout(SOON, one_more).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn the_operator_s_proxy_is_the_way_out() {
    let tasks = Tasks::new();
    // It answers whatever it is asked with 200 and the question.
    let proxy = telling(&tasks).await;
    let through = Matcher::builder()
        .all(format!("http://user:secret@{proxy}"))
        .no("direct.example")
        .build();
    let names = ["far.example".to_owned(), "direct.example".to_owned()];
    let limits = Limits::default();
    let door = Door::open_by("site", true, &names, WayOut::by(through), limits, &tasks)
        .await
        .unwrap();
    let (mut stream, answer) = ask(&door, &connect("far.example:443")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let told = until(&mut stream, "never").await;
    assert!(
        told.starts_with("CONNECT far.example:443 HTTP/1.1\r\n"),
        "{told}"
    );
    assert!(told.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ="));
    let plain =
        "GET http://far.example/x HTTP/1.1\r\nHost: far.example\r\nConnection: close\r\n\r\n";
    let (mut stream, _) = ask(&door, plain).await;
    let told = until(&mut stream, "never").await;
    assert!(
        told.starts_with("GET http://far.example/x HTTP/1.1\r\n"),
        "{told}"
    );
    // The list is ours all the same, and what the operator excepts goes by itself (to nobody, here).
    assert_eq!(status(&door, &connect("other.example:443")).await, 403);
    assert_eq!(status(&door, &connect("direct.example:443")).await, 502);
}

#[test]
fn children_are_told_in_every_spelling() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let tasks = Tasks::new();
        let egress = Egress::start(&[], &tasks).await.unwrap();
        assert_ne!(egress.sites.port(), egress.installer.port());
        let has = |door: &Door, name: &str| {
            let env = door.environment();
            env.into_iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value.into_string().unwrap())
        };
        let url = format!("http://127.0.0.1:{}", egress.sites.port());
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            assert_eq!(has(&egress.sites, name).as_ref(), Some(&url));
        }
        // A dev server asks itself for pages; an installer has nobody here.
        assert!(
            has(&egress.sites, "NO_PROXY")
                .unwrap()
                .contains("127.0.0.1")
        );
        assert_eq!(has(&egress.installer, "NO_PROXY"), None);
    });
}
