//! Questions to a dev server on loopback: does it answer, and with what?

use std::{net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Collected, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::command::Proof;

/// An answer's body is read up to here; the rest is dropped with the connection.
const MAX_BODY: usize = 4 * 1024 * 1024;

/// Asks once; nothing if there is no whole answer within `deadline`.
async fn get(
    port: u16,
    path: &str,
    accept: &'static str,
    deadline: Duration,
) -> Option<(StatusCode, Bytes)> {
    let ask = async {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
        let request = Request::get(path)
            .header(header::HOST, format!("localhost:{port}"))
            .header(header::ACCEPT, accept)
            .body(Empty::<Bytes>::new())
            .expect("the parts are constants and a number");
        let answer = async {
            let response = sender.send_request(request).await.ok()?;
            let (head, body) = response.into_parts();
            // A stream without an end still is an answer.
            let body = tokio::time::timeout(deadline / 2, Limited::new(body, MAX_BODY).collect());
            let body = body
                .await
                .ok()
                .and_then(Result::ok)
                .map(Collected::to_bytes);
            Some((head.status, body.unwrap_or_default()))
        };
        // The connection has to be driven; it may end first, with the last bytes handed over.
        let drive = async {
            connection.await.ok();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = answer => answer,
            () = drive => None,
        }
    };
    tokio::time::timeout(deadline, ask).await.ok().flatten()
}

/// Does the server answer as one that is ready does? One question or two.
pub(crate) async fn answers(port: u16, proof: Proof) -> bool {
    const QUICK: Duration = Duration::from_secs(3);
    match proof {
        Proof::Vite => {
            let status = get(port, "/_astro/status", "*/*", QUICK).await;
            if status.is_some_and(|(code, body)| code == StatusCode::OK && is_ok(&body)) {
                return true;
            }
            // Older Astro and plain Vite; with a `base` it is a 404, from a server that is up.
            let client = get(port, "/@vite/client", "*/*", QUICK).await;
            client.is_some_and(|(code, _)| !code.is_server_error())
        }
        Proof::AnyAnswer => {
            // It may render a whole page first.
            get(port, "/", "text/html,*/*", Duration::from_secs(30))
                .await
                .is_some()
        }
    }
}

fn is_ok(body: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(body)
        .is_ok_and(|status| status.get("ok") == Some(&serde_json::Value::Bool(true)))
}

/// An error is told so much after the request that met it.
pub(crate) const LATE: Duration = Duration::from_millis(350);
/// For a page that is rendered for the first time, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// For a server's first page, which loads the site's module graph: about a second that a person
/// would wait for.
pub(crate) const WARM_UP: Duration = Duration::from_secs(60);

/// What a page answers within `deadline`, as a browser would ask for it.
pub(crate) async fn page(port: u16, path: &str, deadline: Duration) -> Option<StatusCode> {
    get(port, path, "text/html", deadline)
        .await
        .map(|(status, _)| status)
}

/// Does the server know this file? `path` must be one that a request may have as it is.
pub(crate) async fn has_file(port: u16, path: &str, deadline: Duration) -> bool {
    let answer = get(port, path, "*/*", deadline).await;
    answer.is_some_and(|(status, _)| status != StatusCode::NOT_FOUND)
}

/// Waits until the server has got through what it is doing, as far as it does so within `deadline`.
pub(crate) async fn turn_round(port: u16, deadline: Duration) {
    get(port, "/@vite/env", "*/*", deadline).await;
}
