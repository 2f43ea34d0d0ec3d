//! What a person gets to see, whatever the dev server does.

use super::*;

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

#[tokio::test]
async fn a_broken_page_is_shown_as_it_was() {
    let bench = Bench::with(true).await;
    let is_broken = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let broken = is_broken.clone();
    let status = bench
        .upstream(A, move |stream| {
            let broken = broken.clone();
            async move {
                let mut stream = Client(stream);
                loop {
                    let head = stream.until("\r\n\r\n").await;
                    if head.is_empty() {
                        return;
                    }
                    let (code, more, body) = if broken.load(Ordering::SeqCst) {
                        ("500 No", "", "<title>CompilerError</title>")
                    } else if head.contains("/private") {
                        ("200 OK", "Set-Cookie: a=b\r\n", "<p>yours</p>")
                    } else {
                        ("200 OK", "", "<p>good</p>")
                    };
                    let length = body.len();
                    let answer = format!(
                        "HTTP/1.1 {code}\r\nContent-Type: text/html\r\n{more}\
                         Content-Length: {length}\r\n\r\n{body}"
                    );
                    stream.send(&answer).await;
                }
            }
        })
        .await;
    let get = async |path: &str, dest: &str| {
        bench
            .ask(&format!(
                "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\
                 Sec-Fetch-Dest: {dest}\r\n\r\n"
            ))
            .await
    };
    let whole = get("/?q=1", "document").await;
    assert!(whole.body.starts_with("<p>good</p>") && whole.body.contains("banner.js\" defer"));
    get("/private", "document").await;

    is_broken.store(true, Ordering::SeqCst);
    let shown = get("/?q=1", "document").await;
    assert_eq!(shown.status, 500, "it is broken all the same");
    assert!(shown.body.starts_with("<p>good</p>"), "{}", shown.body);
    assert!(shown.body.contains("data-last-good") && shown.body.contains("presence.js"));
    for (path, dest) in [
        ("/?q=2", "document"),
        ("/private", "document"),
        ("/?q=1", "empty"),
    ] {
        let shown = get(path, dest).await;
        assert_eq!(shown.body, "<title>CompilerError</title>", "{path} {dest}");
    }

    // The same where the whole server is down for a reason.
    status.send_replace(PreviewStatus {
        state: PreviewState::Error,
        upstream: None,
        ..PreviewStatus::off()
    });
    let shown = get("/?q=1", "document").await;
    assert_eq!(shown.status, 503);
    assert!(shown.body.starts_with("<p>good</p>"), "{}", shown.body);
    assert!(get("/?q=2", "document").await.body.contains("holding.js"));
    status.send_replace(starting("soon"));
    assert!(get("/?q=1", "document").await.body.contains("holding.js"));
}

/// Greets on the HMR socket, and then says nothing.
async fn greet(stream: TcpStream) {
    #[expect(clippy::result_large_err, reason = "tungstenite's own type")]
    let answer = |request: &WsRequest, mut response: WsResponse| {
        let protocol = request.headers()["sec-websocket-protocol"].clone();
        response
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        Ok(response)
    };
    let socket = tokio_tungstenite::accept_hdr_async(stream, answer).await;
    let Ok(mut socket) = socket else { return };
    let greeting = Message::text(r#"{"type":"connected"}"#);
    socket.send(greeting).await.ok();
    while let Some(Ok(_)) = socket.next().await {}
}

#[tokio::test]
async fn a_page_that_has_been_deaf_for_a_while_is_loaded_again() {
    let bench = Bench::new().await;
    bench.upstream(A, greet).await;
    let say = async |hears: &str| {
        let text = format!(
            "POST /__greenroom/presence HTTP/1.1\r\nHost: localhost\r\nX-Greenroom-Hears: {hears}\r\n\
             Content-Length: 0\r\n\r\n"
        );
        bench.ask(&text).await.status
    };
    assert_eq!(say("1").await, 204, "none has heard anything yet");
    let url = format!("ws://{}/", bench.proxy);
    let mut request = url.into_client_request().unwrap();
    let protocol = "vite-hmr".parse().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", protocol);
    let stream = TcpStream::connect(bench.proxy).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .unwrap();
    let greeting = timeout(SOON, socket.next()).await.unwrap();
    assert!(
        greeting
            .unwrap()
            .unwrap()
            .to_text()
            .unwrap()
            .contains("connected")
    );
    assert_eq!(say("1").await, 204, "it hears");
    let begun = std::time::Instant::now();
    drop(socket);
    assert_eq!(say("1").await, 204, "it may be on its way to another");
    while say("1").await != 205 {
        assert!(begun.elapsed() < SOON * 3);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(9));
    assert_eq!(
        say("0").await,
        204,
        "a page without Vite's client wants none"
    );
}

#[tokio::test]
async fn fonts_of_packages_on_another_disk_are_served() {
    let bench = Bench::new().await;
    let disk = tempfile::tempdir().unwrap();
    let package = disk.path().join("threads/t/node_modules/font");
    std::fs::create_dir_all(&package).unwrap();
    std::fs::write(package.join("a.woff2"), "a font").unwrap();
    std::fs::write(package.join("secret.js"), "code").unwrap();
    let refused = |stream| {
        say(
            stream,
            "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
        )
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    bench.tasks.spawn("upstream", async move {
        while let Ok((stream, _)) = listener.accept().await {
            refused(stream).await;
        }
    });
    let (_publish, status) = watch::channel(live(port));
    let site = PreviewSite {
        slug: A.to_owned(),
        worktree: "/nowhere".into(),
        port,
        hosts: Vec::new(),
        readable: Vec::new(),
        writable: vec![disk.path().join("threads/t")],
    };
    bench.previews.adopt(site, status);
    bench.previews.set_default(A);
    let below = package.display();
    let ask = async |method: &str, path: &str| {
        let text =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        bench.ask(&text).await
    };
    let font = ask("GET", &format!("/@fs{below}/a.woff2")).await;
    assert_eq!((font.status, font.body.as_str()), (200, "a font"));
    assert!(
        font.head.contains("content-type: font/woff2"),
        "{}",
        font.head
    );
    let head = ask("HEAD", &format!("/@fs{below}/a.woff2")).await;
    assert!(head.head.contains("content-length: 6"), "{}", head.head);
    for (method, path) in [
        ("GET", format!("/@fs{below}/secret.js")),
        ("GET", format!("/@fs{below}/none.woff2")),
        ("POST", format!("/@fs{below}/a.woff2")),
        ("GET", "/@fs/etc/a.woff2".to_owned()),
    ] {
        assert_eq!(ask(method, &path).await.status, 403, "{path}");
    }
}
