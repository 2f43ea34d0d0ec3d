//! Accepting connections, with the limits that `axum::serve` has not.

use std::{net::SocketAddr, time::Duration};

use axum::Router;
use http::Request;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::TcpListener;
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
    let token = tasks.token();
    let connection = |stream, peer: SocketAddr, permit| {
        let from = Peer(peer.ip());
        let named = move |mut request: Request<_>| {
            request.extensions_mut().insert(from);
            request
        };
        let service = TowerToHyperService::new(router.clone().map_request(named));
        let token = token.clone();
        async move {
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
            drop(permit);
        }
    };
    let name = "api connection";
    tasks
        .accept(name, listener, MAX_CONNECTIONS, connection)
        .await;
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
