//! Accepting connections, with the limits that `axum::serve` has not.

use std::{sync::Arc, time::Duration};

use axum::Router;
use http::Request;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tower::ServiceExt;

use super::rate::Peer;
use crate::task::Tasks;

/// Connections at once.
const MAX_CONNECTIONS: usize = 1024;
/// A request's head has to be here in this time; also how long an idle connection is kept.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// Largest head.
const MAX_HEAD: usize = 64 << 10;
/// After the stop, answers get out in this time.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Serves until the tasks are stopped.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let token = tasks.token().clone();
    loop {
        let slot = tokio::select! {
            () = token.cancelled() => return,
            slot = slots.clone().acquire_owned() => slot.expect("never closed"),
        };
        let accepted = tokio::select! {
            () = token.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: it passes, and must not become a busy loop.
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        stream.set_nodelay(true).ok();
        let from = Peer(peer.ip());
        let named = move |mut request: Request<_>| {
            request.extensions_mut().insert(from);
            request
        };
        let service = TowerToHyperService::new(router.clone().map_request(named));
        let token = token.clone();
        tasks.spawn("api connection", async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_DEADLINE)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = token.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    tokio::time::timeout(LAST_ANSWERS, connection).await.unwrap_or(Ok(()))
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke off");
            }
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::{Extension, routing::get};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_request_knows_where_it_came_from() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let whence = async |Extension(Peer(peer)): Extension<Peer>| peer.to_string();
        let router = Router::new().route("/", get(whence));
        let tasks = Tasks::new();
        tasks.spawn("api", serve(listener, router, tasks.clone()));
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        socket.write_all(request).await.unwrap();
        let mut answer = String::new();
        let read = socket.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .unwrap()
            .unwrap();
        assert!(answer.ends_with("\r\n\r\n127.0.0.1"), "{answer}");
        tasks.cancel();
    }
}
