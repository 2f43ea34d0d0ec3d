//! Two independent WebSocket peers through the proxy, npm's `ws` and PyPI's `websockets`: after the
//! handshake it is a tunnel, so all that comes back is what comes without it, byte for byte.

use std::{ffi::OsString, process::Stdio};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::*;
use crate::support::{tools, websocket_peers};

/// A browser's and a server's part of it take seconds, on a busy machine more.
const PATIENCE: Duration = Duration::from_secs(120);

/// One of the programs in `tests/it/websockets`.
fn program(file: &str, args: &[&str]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/websockets")
        .join(file);
    let is_python = file.ends_with(".py");
    #[expect(clippy::disallowed_methods, reason = "a peer of the test")]
    let mut command = Command::new(if is_python { "python3" } else { "node" });
    command.arg(script);
    if !is_python {
        command.arg(websocket_peers());
    }
    command
        .args(args)
        .env("PYTHONPATH", websocket_peers().join("python"))
        .env("PATH", path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// With the Node that all tests use first.
fn path() -> OsString {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let tests = tools().path.clone();
    [tests, own].join(&OsString::from(":"))
}

/// Starts an echoing server; it says its port.
async fn echo(file: &str) -> (Child, u16) {
    let mut server = program(file, &[]).spawn().unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let port = timeout(PATIENCE, lines.next_line()).await.unwrap();
    (server, port.unwrap().unwrap().parse().unwrap())
}

/// What a client says of the server at a port.
async fn run(file: &str, args: &[&str]) -> String {
    let output = timeout(PATIENCE, program(file, args).output()).await;
    let output = output.expect("it ends").unwrap();
    assert!(output.status.success(), "{file} {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A proxy before a server.
async fn before(port: u16) -> (Bench, watch::Sender<PreviewStatus>) {
    let bench = Bench::new().await;
    let status = bench.adopt(A, live(port));
    bench.previews.set_default(A);
    (bench, status)
}

#[tokio::test]
async fn frames_of_every_kind_come_back_as_they_do_without_a_proxy() {
    for (server, more) in [("echo.mjs", &[][..]), ("echo.py", &["alone"][..])] {
        let (_server, port) = echo(server).await;
        let (bench, _status) = before(port).await;
        let through = bench.proxy.port().to_string();
        let port = port.to_string();
        let direct = [&["127.0.0.1", &port], more].concat();
        let through = [&["127.0.0.1", &through], more].concat();
        let (direct, through) = tokio::join!(run("raw.py", &direct), run("raw.py", &through));
        assert!(direct.lines().count() > 40, "{direct}");
        for (direct, through) in direct.lines().zip(through.lines()) {
            assert_eq!(direct, through, "{server}");
        }
        assert_eq!(direct.lines().count(), through.lines().count());
    }
}

#[tokio::test]
async fn strict_peers_understand_each_other_through_the_proxy() {
    for (server, client) in [("echo.mjs", "client.py"), ("echo.py", "client.mjs")] {
        let (_server, port) = echo(server).await;
        let (bench, _status) = before(port).await;
        let through = bench.proxy.port().to_string();
        assert_eq!(run(client, &[&through]).await.trim(), "fine", "{client}");
    }
}
