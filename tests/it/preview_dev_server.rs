//! The dev server's driver with real children, and the whole way with a real site.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::{
    any::Any,
    net::{Ipv4Addr, TcpListener as StdListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use greenroom::{
    domain::{PreviewError, PreviewState, PreviewStatus},
    preview::{
        ActivitySink, PreviewHandle, PreviewSettings, PreviewSite, Previews, Proxy, ProxyKind,
        pick_port,
    },
    process::{ConfinementMode, Launcher},
    task::Tasks,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::support::wait_for;

const SOON: Duration = Duration::from_secs(60);
const SLUG: &str = "acme-alice-main-0123456789ab";

/// Answers every path with its environment.
const SERVER: &str = "require('http').createServer((q, a) => a.end(JSON.stringify(process.env)))
    .listen(process.env.PORT, process.env.HOST)";

/// Confined as far as this kernel can. Its silence is longer than a test.
fn launcher() -> Launcher {
    let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
    Launcher::start_with_binary(binary, SOON * 10, ConfinementMode::Auto).unwrap()
}

struct Nobody;

impl ActivitySink for Nobody {
    fn request(&self) -> Box<dyn Any + Send + Sync> {
        Box::new(())
    }

    fn person(&self, _slug: &str) {}
}

struct Bench {
    disk: tempfile::TempDir,
    tasks: Tasks,
    previews: Previews,
    handle: PreviewHandle,
    port: u16,
}

fn node() -> PathBuf {
    if let Some(node) = std::env::var_os("GREENROOM_TEST_NODE") {
        return node.into();
    }
    let path = std::env::var_os("PATH").expect("a PATH");
    std::env::split_paths(&path)
        .map(|p| p.join("node"))
        .find(|p| p.is_file())
        .expect("Node on PATH")
}

impl Bench {
    fn new(dev: Option<&str>) -> Self {
        let disk = tempfile::tempdir().unwrap();
        let scripts = dev.map_or(
            serde_json::json!({}),
            |dev| serde_json::json!({ "dev": dev }),
        );
        let package = serde_json::json!({ "scripts": scripts }).to_string();
        std::fs::create_dir(disk.path().join("site")).unwrap();
        std::fs::write(disk.path().join("site/package.json"), package).unwrap();
        std::fs::write(disk.path().join("site/server.cjs"), SERVER).unwrap();
        let settings = PreviewSettings {
            egress: None,
            access: greenroom::preview::Access::open(),
            node: node(),
            private_root: disk.path().join("private"),
            most_awake: 3,
            shows_banner: false,
        };
        let tasks = Tasks::new();
        let previews = Previews::new(launcher(), settings, tasks.clone());
        let port = free_port();
        let handle = previews.ensure(site(&disk.path().join("site"), port));
        previews.set_default(SLUG);
        Self {
            disk,
            tasks,
            previews,
            handle,
            port,
        }
    }

    async fn until(&self, holds: impl Fn(&PreviewStatus) -> bool) -> PreviewStatus {
        until(&self.handle, holds).await
    }
}

fn site(worktree: &Path, port: u16) -> PreviewSite {
    PreviewSite {
        slug: SLUG.to_owned(),
        worktree: worktree.to_owned(),
        port,
        hosts: Vec::new(),
        readable: Vec::new(),
        writable: Vec::new(),
    }
}

/// A port of this test alone: tests run side by side.
fn free_port() -> u16 {
    let own = format!("{:?}", std::thread::current().id());
    pick_port(
        None,
        &std::collections::HashSet::new(),
        &format!("{own}{}", std::process::id()),
    )
}

async fn until(handle: &PreviewHandle, holds: impl Fn(&PreviewStatus) -> bool) -> PreviewStatus {
    let mut status = handle.status();
    match timeout(SOON, status.wait_for(holds)).await {
        Ok(seen) => seen.unwrap().clone(),
        Err(_) => panic!("still {:?}", handle.status().borrow()),
    }
}

async fn get(port: u16, path: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .await
        .unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON * 2, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn is_free(port: u16) -> bool {
    StdListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[tokio::test]
async fn a_script_that_listens_on_port_is_served_until_it_is_stopped() {
    let bench = Bench::new(Some("node server.cjs"));
    assert_eq!(bench.handle.status().borrow().state, PreviewState::Off);
    bench.handle.start();
    let live = bench.until(|s| s.state == PreviewState::Live).await;
    assert_eq!(live.upstream, Some(bench.port));
    let answer = get(bench.port, "/", "*/*").await;
    let env: serde_json::Value = serde_json::from_str(
        answer
            .split("\r\n\r\n")
            .nth(1)
            .unwrap()
            .lines()
            .find(|l| l.starts_with('{'))
            .unwrap(),
    )
    .unwrap();
    let mut names: Vec<_> = env
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    names.retain(|name| !matches!(*name, "PWD" | "SHLVL" | "_" | "OLDPWD"));
    assert_eq!(
        names,
        [
            "ASTRO_DISABLE_UPDATE_CHECK",
            "ASTRO_TELEMETRY_DISABLED",
            "HOME",
            "HOST",
            "LANG",
            "NODE_ENV",
            "NO_COLOR",
            "PATH",
            "PORT",
            "TMPDIR"
        ],
        "nothing of ours"
    );
    let own = bench.disk.path().to_str().unwrap();
    assert!(env["HOME"].as_str().unwrap().starts_with(own));
    assert!(
        env["PATH"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{own}/site/node_modules/.bin:"))
    );

    bench.handle.start();
    bench.handle.stop(SOON).await;
    assert_eq!(bench.handle.status().borrow().state, PreviewState::Off);
    assert!(is_free(bench.port));
    bench.handle.start();
    bench.until(|s| s.state == PreviewState::Live).await;
    bench.handle.restart("package.json changed").await;
    bench.until(|s| s.state == PreviewState::Starting).await;
    bench.until(|s| s.state == PreviewState::Live).await;
    // The program ends: so does the child.
    assert!(bench.tasks.stop(SOON).await);
    assert!(is_free(bench.port));
}

#[tokio::test]
async fn a_server_that_dies_comes_back() {
    let bench = Bench::new(Some("node server.cjs & echo $! > pid; wait $!"));
    bench.handle.start();
    let first = bench.until(|s| s.state == PreviewState::Live).await;
    // The shell may be slower than what it started.
    let pid = wait_for("its number", || {
        let text = std::fs::read_to_string(bench.disk.path().join("site/pid")).ok()?;
        text.strip_suffix('\n')?.parse().ok()
    })
    .await;
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let dead = bench.until(|s| s.state == PreviewState::Error).await;
    assert_eq!(dead.upstream, None);
    assert!(
        dead.errors[0]
            .message
            .contains("ended, most likely for want of memory"),
        "{dead:?}"
    );
    bench
        .until(|s| s.state == PreviewState::Live && s.generation > first.generation)
        .await;
    bench.previews.stop_all(SOON).await;
    assert!(is_free(bench.port));
}

#[tokio::test]
async fn a_broken_site_says_what_is_wrong_and_waits_for_somebody_to_look() {
    let bench = Bench::new(Some(
        // Beside the site, where no change is a reason to try again.
        "test -f ../fixed && exec node server.cjs; echo \"$PWD/src/x.astro:3:7 oh no\" >&2; exit 1",
    ));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let proxy = listener.local_addr().unwrap().port();
    Proxy::serve(
        listener,
        ProxyKind::Preview,
        bench.previews.clone(),
        Arc::new(Nobody),
        &bench.tasks,
    );
    bench.handle.start();
    let broken = bench
        .until(|s| s.progress == "The dev server doesn't start")
        .await;
    assert_eq!(broken.state, PreviewState::Error);
    let error = &broken.errors[0];
    assert_eq!(
        (error.file.as_deref(), error.line, error.column),
        (Some("src/x.astro"), Some(3), Some(7))
    );
    assert!(
        error.message.contains("exit status 1") && error.message.contains("oh no"),
        "{error:?}"
    );
    assert!(
        !error.message.contains(bench.disk.path().to_str().unwrap()),
        "{error:?}"
    );

    std::fs::write(bench.disk.path().join("fixed"), "").unwrap();
    let page = get(proxy, "/", "text/html").await;
    assert!(
        page.starts_with("HTTP/1.1 503") && page.contains("oh no"),
        "{page}"
    );
    bench.until(|s| s.state == PreviewState::Live).await;
    assert!(
        get(proxy, "/", "text/html")
            .await
            .starts_with("HTTP/1.1 200")
    );
    bench.previews.remove(SLUG, SOON).await;
    assert!(
        get(proxy, "/", "text/html")
            .await
            .starts_with("HTTP/1.1 404")
    );
}

#[tokio::test]
async fn a_server_that_runs_out_of_memory_is_told_apart() {
    let eats = "const all = []; for (;;) all.push(new Array(1e5).fill(all.length))";
    let dev = format!("node --max-old-space-size=24 -e '{eats}'");
    let bench = Bench::new(Some(&dev));
    bench.handle.start();
    let dead = bench.until(|s| s.state == PreviewState::Error).await;
    let message = &dead.errors[0].message;
    assert!(
        message.starts_with("the dev server ran out of memory") && message.lines().count() == 1,
        "{dead:?}"
    );
    bench.previews.stop_all(SOON).await;

    let bench = Bench::new(Some("echo no memory of it >&2; exit 3"));
    bench.handle.start();
    let dead = bench.until(|s| s.state == PreviewState::Error).await;
    assert!(
        dead.errors[0]
            .message
            .starts_with("the dev server ended by itself (exit status 3)"),
        "{dead:?}"
    );
    bench.previews.stop_all(SOON).await;
}

#[tokio::test]
async fn a_server_that_gave_up_tries_again_with_the_next_change() {
    let bench = Bench::new(Some(
        "test -f .astro/dev.json && exit 4; test -f fixed && exec node server.cjs; exit 1",
    ));
    let site = bench.disk.path().join("site");
    std::fs::create_dir(site.join(".astro")).unwrap();
    // Of another container: its number may be somebody else's by now.
    std::fs::write(site.join(".astro/dev.json"), r#"{"pid":1,"port":1}"#).unwrap();
    bench.handle.start();
    let broken = bench
        .until(|s| s.progress == "The dev server doesn't start")
        .await;
    assert!(
        broken.errors[0].message.contains("exit status 1"),
        "{broken:?}"
    );
    std::fs::write(site.join("fixed"), "").unwrap();
    bench.until(|s| s.state == PreviewState::Live).await;
    bench.previews.stop_all(SOON).await;
}

#[tokio::test]
async fn a_site_that_cannot_start_says_why() {
    let bench = Bench::new(None);
    bench.handle.start();
    let broken = bench.until(|s| s.state == PreviewState::Error).await;
    assert!(
        broken.errors[0].message.contains("no `dev` script"),
        "{broken:?}"
    );

    let bench = Bench::new(Some("astro dev"));
    bench.handle.start();
    let broken = bench.until(|s| s.state == PreviewState::Error).await;
    assert!(
        broken.errors[0].message.contains("isn't installed"),
        "{broken:?}"
    );

    let bench = Bench::new(Some(
        "echo 'Port 1 is in use, trying another one...'; exec sleep 60",
    ));
    bench.handle.start();
    let moved = bench.until(|s| s.state == PreviewState::Error).await;
    assert!(
        moved.errors[0].message.contains("another port"),
        "{moved:?}"
    );
    bench.previews.stop_all(SOON).await;

    let bench = Bench::new(Some("node server.cjs"));
    let _squatter = StdListener::bind((Ipv4Addr::LOCALHOST, bench.port)).unwrap();
    bench.handle.start();
    let taken = bench.until(|s| s.state == PreviewState::Error).await;
    assert!(
        taken.errors[0]
            .message
            .contains("in use by another program"),
        "{taken:?}"
    );
}

#[tokio::test]
async fn preparations_show_before_the_start() {
    let bench = Bench::new(Some("node server.cjs"));
    bench.handle.set_progress("Installing dependencies");
    let status = bench.until(|s| s.state == PreviewState::Starting).await;
    assert_eq!(status.progress, "Installing dependencies");
    bench.handle.fail(PreviewError {
        message: "npm broke".to_owned(),
        ..PreviewError::default()
    });
    let status = bench.until(|s| s.state == PreviewState::Error).await;
    assert_eq!(status.errors[0].message, "npm broke");
    bench.handle.start();
    bench.until(|s| s.state == PreviewState::Live).await;
    bench.handle.set_progress("too late");
    bench.handle.stop(SOON).await;
    assert_eq!(
        bench.handle.status().borrow().state,
        PreviewState::Off,
        "not Starting"
    );
}

/// What a browser asks of a thread by its name.
async fn ask(proxy: u16, slug: &str, line: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy))
        .await
        .unwrap();
    let request = format!(
        "{line} HTTP/1.1\r\nHost: {slug}.localhost:{proxy}\r\nAccept: {accept}\r\nContent-Length: 0\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON * 2, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn the_least_recently_used_server_sleeps_and_wakes_when_it_is_asked() {
    let bench = Bench::new(Some("node server.cjs"));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let proxy = listener.local_addr().unwrap().port();
    let settings = PreviewSettings {
        egress: None,
        access: greenroom::preview::Access::open(),
        node: node(),
        private_root: bench.disk.path().join("private"),
        most_awake: 2,
        shows_banner: false,
    };
    let previews = Previews::new(launcher(), settings, bench.tasks.clone());
    Proxy::serve(
        listener,
        ProxyKind::Preview,
        previews.clone(),
        Arc::new(Nobody),
        &bench.tasks,
    );
    let names = ["a", "b", "c"].map(|name| format!("acme-alice-{name}-0123456789ab"));
    let mut taken = std::collections::HashSet::new();
    let handles: Vec<PreviewHandle> = names
        .iter()
        .map(|slug| {
            let port = pick_port(None, &taken, &format!("{slug}{}", std::process::id()));
            taken.insert(port);
            previews.ensure(PreviewSite {
                slug: slug.clone(),
                ..site(&bench.disk.path().join("site"), port)
            })
        })
        .collect();
    let [a, b, c] = handles.as_slice() else {
        unreachable!()
    };
    let state = |handle: &PreviewHandle| handle.status().borrow().state;
    for handle in [a, b] {
        handle.start();
        until(handle, |s| s.state == PreviewState::Live).await;
    }
    // A was used after B, so B gives its room to C.
    assert!(
        ask(proxy, a.slug(), "GET /", "*/*")
            .await
            .starts_with("HTTP/1.1 200")
    );
    c.start();
    until(c, |s| s.state == PreviewState::Live).await;
    let asleep = until(b, |s| s.state == PreviewState::Asleep).await;
    assert_eq!((asleep.upstream, state(a)), (None, PreviewState::Live));
    assert!(is_free(b.site().port));

    // Vite's question whether it is back wakes nobody; a page that is opened does, and others wait.
    let ping = "*/*\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                Sec-WebSocket-Protocol: vite-ping\r\nSec-WebSocket-Version: 13\r\n\
                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    let refused = ask(proxy, b.slug(), "GET /", ping).await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(state(b), PreviewState::Asleep);
    let page = ask(proxy, b.slug(), "GET /", "text/html").await;
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("holding.js"));
    until(a, |s| s.state == PreviewState::Asleep).await;
    let back = until(b, |s| s.state == PreviewState::Live).await;
    assert_eq!(back.upstream, Some(b.site().port), "where it was before");
    assert!(
        ask(proxy, b.slug(), "GET /", "text/html")
            .await
            .starts_with("HTTP/1.1 200")
    );

    // With a person before C and a turn in B, the person is left in peace.
    let person = ask(proxy, c.slug(), "POST /__greenroom/presence", "*/*").await;
    assert!(person.starts_with("HTTP/1.1 204"), "{person}");
    let turn = b.begin_turn();
    let waited = ask(proxy, a.slug(), "GET /data.json", "*/*").await;
    assert!(waited.starts_with("HTTP/1.1 200"), "{waited}");
    assert_eq!(
        (state(b), state(c)),
        (PreviewState::Asleep, PreviewState::Live)
    );
    drop(turn);
    // A new turn in B would wake it, but for the two that are needed.
    let other = a.begin_turn();
    let _turn = b.begin_turn();
    ask(proxy, a.slug(), "GET /", "*/*").await;
    assert_eq!(state(b), PreviewState::Asleep);
    drop(other);
    let _again = b.begin_turn();
    until(b, |s| s.state == PreviewState::Live).await;
    until(a, |s| s.state == PreviewState::Asleep).await;
    previews.stop_all(SOON).await;
}

/// Needs the network, a Node of at least 22.12 (`GREENROOM_TEST_NODE`), npm on PATH and an Astro
/// site with a lockfile (`GREENROOM_TEST_SITE`).
#[tokio::test]
#[ignore = "installs a real site"]
async fn an_astro_site_is_installed_served_and_updated() {
    use futures_util::StreamExt;
    use greenroom::workspace::{AttachedKind, Dependencies, DependencyRequest, NodeTools};
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;

    let source = PathBuf::from(std::env::var_os("GREENROOM_TEST_SITE").expect("a site"));
    let disk = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let npm = std::env::split_paths(&path)
        .map(|p| p.join("npm"))
        .find(|p| p.exists())
        .unwrap();
    let passed = |name: &str| {
        name.to_ascii_lowercase().starts_with("npm_config_")
            || [
                "HTTPS_PROXY",
                "NO_PROXY",
                "NODE_EXTRA_CA_CERTS",
                "SSL_CERT_FILE",
            ]
            .contains(&name)
    };
    let mut env: Vec<_> = std::env::vars_os()
        .filter(|(name, _)| name.to_str().is_some_and(passed))
        .collect();
    let home = PathBuf::from(std::env::var_os("HOME").unwrap());
    env.push(("NPM_CONFIG_USERCONFIG".into(), home.join(".npmrc").into()));
    let tools = NodeTools {
        egress: None,
        node: node(),
        npm,
        env,
        readable: vec![home.join(".npmrc")],
    };
    let dependencies = Dependencies::new(launcher(), tools);
    let settings = PreviewSettings {
        egress: None,
        access: greenroom::preview::Access::open(),
        node: node(),
        private_root: disk.path().join("private"),
        most_awake: 3,
        shows_banner: false,
    };
    let tasks = Tasks::new();
    let previews = Previews::new(launcher(), settings, tasks.clone());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let proxy = listener.local_addr().unwrap().port();
    Proxy::serve(
        listener,
        ProxyKind::Preview,
        previews.clone(),
        Arc::new(Nobody),
        &tasks,
    );

    let mut handles = Vec::new();
    for (number, expected) in [(1, AttachedKind::Installed), (2, AttachedKind::Cached)] {
        let worktree = disk.path().join(format!("site{number}"));
        copy(&source, &worktree);
        let from = source.clone();
        let ensure = || {
            let from = from.clone();
            dependencies.ensure(
                DependencyRequest {
                    worktree: worktree.clone(),
                    export: move |to: &Path| {
                        copy(&from, to);
                        Ok(())
                    },
                    cache: disk.path().join("cache"),
                    archives: None,
                },
                |text| println!("{text}"),
            )
        };
        let attached = ensure().await.unwrap_or_else(|error| panic!("{error}"));
        println!("{number}: {attached:?}");
        assert_eq!(attached.kind, expected);
        assert_eq!(ensure().await.unwrap().kind, AttachedKind::Current);
        let slug = format!("acme-alice-t{number}-0123456789a{number}");
        let port = pick_port(None, &std::collections::HashSet::new(), &slug);
        let handle = previews.ensure(PreviewSite {
            slug: slug.clone(),
            ..site(&worktree, port)
        });
        previews.set_default(&slug);
        let began = std::time::Instant::now();
        handle.start();
        until(&handle, |s| s.state == PreviewState::Live).await;
        println!("{number}: ready after {:?}", began.elapsed());
        let began = std::time::Instant::now();
        let page = get(proxy, "/", "text/html").await;
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        println!("{number}: first page after {:?}", began.elapsed());
        handles.push((handle, worktree, slug));
    }

    let (handle, worktree, slug) = &handles[0];
    let mut request = format!("ws://127.0.0.1:{proxy}/")
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert("host", format!("{slug}.localhost:{proxy}").parse().unwrap());
    request
        .headers_mut()
        .insert("sec-websocket-protocol", "vite-hmr".parse().unwrap());
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy))
        .await
        .unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .unwrap();
    let hello = timeout(SOON, socket.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    println!("HMR: {hello}");
    let index = worktree.join("src/pages/index.astro");
    let text = std::fs::read_to_string(&index).unwrap();
    let mut edit = 0;
    // A cold server sends one stale reload first; look for one that follows an edit.
    let began = loop {
        edit += 1;
        let began = std::time::Instant::now();
        std::fs::write(&index, format!("{text}\n<p>edit {edit}</p>\n")).unwrap();
        let news = timeout(Duration::from_secs(2), socket.next()).await;
        println!("HMR: {news:?} after {:?}", began.elapsed());
        if news.is_ok() && edit >= 3 {
            break began;
        }
        assert!(edit < 10, "no news of the edits");
    };
    println!("edit to message: {:?}", began.elapsed());
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy))
        .await
        .unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {slug}.localhost:{proxy}\r\nSec-Fetch-Dest: document\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    timeout(SOON, stream.read_to_string(&mut page))
        .await
        .unwrap()
        .unwrap();
    assert!(
        page.contains(&format!("edit {edit}")) && page.contains("presence.js"),
        "{page}"
    );
    let other = get(proxy, "/", "text/html").await;
    assert!(!other.contains("<p>edit"), "the other thread keeps its own");

    if let Ok(seconds) = std::env::var("GREENROOM_TEST_HOLD") {
        println!("http://{slug}.localhost:{proxy}/ shows {}", index.display());
        tokio::time::sleep(Duration::from_secs(seconds.parse().unwrap())).await;
    }
    let began = std::time::Instant::now();
    let port = handle.site().port;
    previews.stop_all(SOON).await;
    println!("stopped after {:?}", began.elapsed());
    assert!(is_free(port));
}

/// A folder's files without what is made from them.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let name = entry.file_name();
        if ["node_modules", ".astro", "dist"]
            .iter()
            .any(|made| name == *made)
        {
            continue;
        }
        let target = to.join(name);
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
