//! Who may call the API, seen from outside.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use hmac::{Hmac, Mac};
use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::Sha256;

use crate::support::{Folders, Options, SITE, Sent, TestGreenroom, who};

const TOKEN: &str = "t0ken-of-the-control-plane";
const SECRET: &str = "s3cret-of-the-service";

fn idle() -> Sent {
    Sent::new("GET", "/api/idle", &Value::Null)
}

fn bearer(sent: Sent, token: &str) -> Sent {
    sent.header("authorization", &format!("Bearer {token}"))
}

/// As a control plane signs: by the contract, not by our code.
fn signed(sent: Sent, secret: &str, at: i64, nonce: Option<&str>) -> Sent {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    let nonce_part = nonce.map(|nonce| format!("{nonce}:")).unwrap_or_default();
    mac.update(format!("{at}:{nonce_part}").as_bytes());
    mac.update(&sent.body);
    let signature = hex::encode(mac.finalize().into_bytes());
    let sent = sent
        .header("x-claude-timestamp", &at.to_string())
        .header("x-claude-signature", &signature);
    match nonce {
        Some(nonce) => sent.header("x-claude-nonce", nonce),
        None => sent,
    }
}

async fn start(adapt: impl FnOnce(Options) -> Options) -> (Folders, TestGreenroom) {
    let folders = Folders::new();
    let options = adapt(Options::new(&folders).rehearsal());
    let greenroom = TestGreenroom::start(options).await;
    (folders, greenroom)
}

#[tokio::test]
async fn with_secrets_every_call_needs_one() {
    let (folders, greenroom) = start(|options| {
        options
            .env("GREENROOM_API_TOKEN", TOKEN)
            .env("CLAUDE_SERVICE_SECRET", SECRET)
            .env("BIND", "127.0.0.1")
    })
    .await;
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let init = Sent::new("POST", "/api/init", &alice.body(json!({"repoUrl": site})));
    let now = || Timestamp::now().as_millisecond();

    let turn = "/api/turns/acme~alice~main~00000000000000000000000000000000";
    for (method, path) in [
        ("POST", "/api/init"),
        ("POST", "/api/execute"),
        ("GET", "/api/threads?clientId=acme&userId=alice"),
        ("GET", &alice.path()),
        ("GET", &format!("{}/history", alice.path())),
        ("GET", &format!("{}/preview", alice.path())),
        ("GET", turn),
        ("GET", &format!("{turn}/events")),
        ("POST", &format!("{turn}/cancel")),
        ("GET", "/api/idle"),
        ("POST", "/api/idle/touch"),
        ("GET", "/api/nothing"),
        ("DELETE", "/api/init"),
    ] {
        let answer = greenroom.api(method, path, alice.body(json!({}))).await;
        let sentence = answer.error(401, "unauthenticated");
        assert!(
            !sentence.contains("expired") && !sentence.contains("replay"),
            "{sentence}"
        );
    }
    for wrong in [
        bearer(init.clone(), "wrong"),
        bearer(init.clone(), ""),
        bearer(init.clone(), &TOKEN[1..]),
        bearer(init.clone(), SECRET),
        init.clone().header("authorization", TOKEN),
        init.clone()
            .header("authorization", &format!("Basic {TOKEN}")),
        signed(init.clone(), "wrong", now(), None),
        signed(init.clone(), TOKEN, now(), None),
        signed(init.clone(), SECRET, now() - 31_000, None),
        signed(init.clone(), SECRET, now() + 40_000, None),
        Sent {
            body: b"{}".to_vec(),
            ..signed(init.clone(), SECRET, now(), None)
        },
    ] {
        greenroom.send(wrong).await.error(401, "unauthenticated");
    }
    assert!(
        !folders.workspace().join("acme").exists(),
        "nothing was done"
    );

    greenroom.send(bearer(idle(), TOKEN)).await.status_is(200);
    let call = signed(init.clone(), SECRET, now(), None);
    greenroom.send(call.clone()).await.ok();
    greenroom.send(call).await.error(401, "unauthenticated");
    let at = now();
    greenroom
        .send(signed(idle(), SECRET, at, Some("a")))
        .await
        .status_is(200);
    greenroom
        .send(signed(idle(), SECRET, at, Some("b")))
        .await
        .status_is(200);
    greenroom
        .send(signed(idle(), SECRET, at, Some("a")))
        .await
        .error(401, "unauthenticated");

    for path in ["/health", "/ready", "/metrics", "/openapi.json", "/"] {
        let answer = greenroom.get(path).await;
        assert_ne!(answer.status, 401, "{path} is open");
        for secret in [TOKEN, SECRET] {
            assert!(!answer.text.contains(secret), "{path}");
        }
        let tenant = path == "/metrics" && answer.text.contains("acme");
        assert!(!tenant, "metrics name no tenant");
    }
    // Any host may be asked where a secret is needed; other sites' pages stay out.
    let call = bearer(idle().header("host", "greenroom.example.com"), TOKEN);
    greenroom.send(call).await.status_is(200);
    let call = bearer(idle().header("origin", "https://evil.example"), TOKEN);
    greenroom.send(call).await.error(403, "forbidden_origin");
    let log = greenroom.log().concat();
    assert!(!log.contains(TOKEN) && !log.contains(SECRET), "{log}");
}

/// Raw bytes in, the first line of the answer out.
async fn raw(port: u16, bytes: &[u8]) -> String {
    // Who is refused early may find the connection closed before all is sent.
    raw_with(port, bytes, drop).await
}

async fn raw_with(port: u16, bytes: &[u8], sent: impl FnOnce(std::io::Result<()>)) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap();
    sent(socket.write_all(bytes).await);
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    let read = async {
        while !answer.contains(&b'\n') {
            match socket.read(&mut chunk).await.unwrap_or(0) {
                0 => break,
                n => answer.extend_from_slice(&chunk[..n]),
            }
        }
    };
    tokio::time::timeout(crate::support::PATIENCE, read)
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&answer).into_owned();
    text.lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn whoever_proves_nothing_sends_no_body() {
    let (_folders, greenroom) = start(|options| {
        options
            .env("CLAUDE_SERVICE_SECRET", SECRET)
            .env("BIND", "127.0.0.1")
    })
    .await;
    let port = greenroom.api_port;
    let head = |path: &str, more: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}\r\n")
    };
    let now = || Timestamp::now().as_millisecond();
    let claim = |at: i64| {
        format!(
            "X-Claude-Timestamp: {at}\r\nX-Claude-Signature: {}\r\n",
            "ab".repeat(32)
        )
    };
    // Answered with not a byte of the body sent: by its length, in chunks, on both paths.
    for (path, more, status) in [
        ("/api/execute", "Content-Length: 1000\r\n".to_owned(), "401"),
        ("/execute", "Content-Length: 1000\r\n".to_owned(), "401"),
        (
            "/execute",
            "Transfer-Encoding: chunked\r\n".to_owned(),
            "401",
        ),
        (
            "/execute",
            format!("Content-Length: 1000\r\n{}", claim(now() - 40_000)),
            "401",
        ),
        (
            "/execute",
            "Content-Length: 1000\r\nAuthorization: Bearer x\r\n".to_owned(),
            "401",
        ),
        (
            "/execute",
            format!("Content-Length: 99999999\r\n{}", claim(now())),
            "413",
        ),
    ] {
        let answer = raw(port, head(path, &more).as_bytes()).await;
        assert!(answer.contains(status), "{path} {more}: {answer}");
    }
    // In chunks a body may grow: it is cut off at its limit, proven or not.
    let mut endless = head(
        "/execute",
        &format!("Transfer-Encoding: chunked\r\n{}", claim(now())),
    );
    for _ in 0..20 {
        endless.push_str(&format!("10000\r\n{}\r\n", "x".repeat(0x10000)));
    }
    let answer = raw(port, endless.as_bytes()).await;
    assert!(answer.contains("413"), "{answer}");
    // Who sends it all before listening hears why it was refused, whatever the route.
    let large = "x".repeat(8 << 20);
    for (path, times) in [("/execute", 1), ("/api/init", 1), ("/api/label", 3)] {
        let body = large.repeat(times);
        let declared = format!("Content-Length: {}\r\n{}", body.len(), claim(now()));
        let chunked = format!("Transfer-Encoding: chunked\r\n{}", claim(now()));
        for sent in [
            head(path, &declared) + &body,
            head(path, &chunked) + &format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()),
        ] {
            let answer = raw_with(port, sent.as_bytes(), Result::unwrap).await;
            assert!(answer.contains("413"), "{path}: {answer}");
        }
    }
    // A signed body in chunks is the same body.
    let body = "{}";
    let at = now();
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    mac.update(format!("{at}:{body}").as_bytes());
    let signature = hex::encode(mac.finalize().into_bytes());
    let more = format!(
        "Transfer-Encoding: chunked\r\nX-Claude-Timestamp: {at}\r\nX-Claude-Signature: {signature}\r\n"
    );
    let whole = head("/execute", &more) + "1\r\n{\r\n1\r\n}\r\n0\r\n\r\n";
    let answer = raw(port, whole.as_bytes()).await;
    assert!(
        answer.contains("400"),
        "let in, and without a prompt: {answer}"
    );
}

#[tokio::test]
async fn without_a_secret_it_answers_this_machine_alone() {
    let (folders, greenroom) =
        start(|options| options.env("API_ALLOWED_HOSTS", "studio.example")).await;
    let port = greenroom.api_port;
    for host in [
        "localhost",
        "127.0.0.1",
        "[::1]",
        "studio.example",
        "LOCALHOST",
        "studio.example:80",
    ] {
        greenroom
            .send(idle().header("host", host))
            .await
            .status_is(200);
    }
    for host in [
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "xn--localhost",
        "studio.example.evil",
    ] {
        for path in ["/api/idle", "/api/init", "/health", "/"] {
            let sent = Sent::new("GET", path, &Value::Null);
            greenroom
                .send(sent.header("host", host))
                .await
                .error(421, "wrong_host");
        }
    }
    for origin in [
        "null",
        "https://evil.example",
        &format!("http://localhost:{}", port.wrapping_add(1)),
        "http://localhost",
        &format!("http://127.0.0.1:{port}"),
    ] {
        let alice = who("acme", "alice", "main").body(json!({}));
        let call = Sent::new("POST", "/api/init", &alice).header("origin", origin);
        greenroom.send(call).await.error(403, "forbidden_origin");
    }
    let own = format!("http://localhost:{port}");
    greenroom
        .send(idle().header("origin", &own))
        .await
        .status_is(200);
    // What a form or a simple cross-site request can send.
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
    ] {
        let alice = who("acme", "alice", "main").body(json!({}));
        let call = Sent::new("POST", "/api/init", &alice).header("content-type", kind);
        greenroom
            .send(call)
            .await
            .error(415, "unsupported_media_type");
    }
    assert!(
        !folders.workspace().join("acme").exists(),
        "nothing was done"
    );
    let call = Sent::new("POST", "/api/execute", &json!({}));
    let answer = greenroom
        .send(call.header("content-type", "application/json; charset=utf-8"))
        .await;
    answer.error(400, "invalid_request");
}

#[tokio::test]
async fn the_wide_world_needs_a_secret_or_a_word() {
    let folders = Folders::new();
    let options = Options::new(&folders).rehearsal().env("BIND", "0.0.0.0");
    let (status, line) = options.fails().await;
    assert_eq!(status, Some(1), "{line}");
    assert!(line.contains("BIND") && line.contains("insecure"), "{line}");
    let greenroom = TestGreenroom::start(options.clone().arg("--insecure")).await;
    assert!(
        greenroom.log()[0].contains("ANYBODY"),
        "{:?}",
        greenroom.log()
    );
    drop(greenroom);
    let greenroom = TestGreenroom::start(options.env("GREENROOM_API_TOKEN", TOKEN)).await;
    assert!(
        greenroom.log()[0].contains("token"),
        "{:?}",
        greenroom.log()
    );
}
