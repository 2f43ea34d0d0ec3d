//! From a WebSocket's handshake to its tunnel.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{ORIGIN, SEC_WEBSOCKET_PROTOCOL},
    uri::PathAndQuery,
};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::{Destination, Downstream, ProxyKind, forward::await_upstream};
use crate::preview::{
    body::{RequestBody, ResponseBody},
    headers,
    pages::Page,
    refusals::{UpstreamError, not_yet, upstream_problem},
    tunnel::tunnel,
};

/// Vite leaves handshakes that it doesn't know without an answer.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(15);

impl Downstream {
    pub(super) async fn upgrade(
        &self,
        mut request: Request<Incoming>,
        to: &Destination,
    ) -> Result<Response<ResponseBody>, Page> {
        let port = match to.preview.upstream() {
            Some(port) => port,
            // The browser takes a 101 for "it is back" and reloads.
            None if headers::is_vite_ping(request.headers()) => return Err(not_yet(false)),
            None => await_upstream(&to.preview).await?,
        };
        let on_downstream = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let mut asked = self.to_upstream(&head, RequestBody::Empty, to, port);
        headers::ask_for_websocket(asked.headers_mut());
        let mut is_bridged = false;
        if self.proxy.kind == ProxyKind::HmrOnly {
            *asked.uri_mut() = root_of(asked.uri());
            let headers = asked.headers_mut();
            if !headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
                is_bridged = true;
                let hmr = HeaderValue::from_static("vite-hmr");
                headers.insert(SEC_WEBSOCKET_PROTOCOL, hmr);
                // We have checked it; with one, Vite also wants the token of its own client.
                headers.remove(ORIGIN);
            }
        }
        let exchange = async {
            let mut sender = self.upstream.connect(port).await?;
            sender
                .send_request(asked)
                .await
                .map_err(|_| UpstreamError::Closed)
        };
        let answered = timeout(UPGRADE_DEADLINE, exchange).await;
        let mut response = answered
            .unwrap_or(Err(UpstreamError::TimedOut))
            .map_err(|error| upstream_problem(&error, false))?;
        let is_tunnel = headers::is_switched_to_websocket(response.status(), response.headers());
        let on_upstream = is_tunnel.then(|| hyper::upgrade::on(&mut response));
        let (mut head, body) = response.into_parts();
        headers::strip_hop_by_hop(&mut head.headers);
        head.version = Version::HTTP_11;
        let Some(on_upstream) = on_upstream else {
            if head.status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(upstream_problem(&UpstreamError::Closed, false));
            }
            return Ok(Response::from_parts(head, ResponseBody::streamed(body)));
        };
        headers::ask_for_websocket(&mut head.headers);
        let is_hmr = head
            .headers
            .get(SEC_WEBSOCKET_PROTOCOL)
            .is_some_and(|protocol| protocol == "vite-hmr");
        // In this order: of what is told in between it hears twice, and not never.
        let hmr = is_hmr.then(|| to.preview.open_socket());
        let late = is_hmr.then(|| to.preview.missed_word()).flatten();
        if is_bridged {
            // A client that named none must not be given one (RFC 6455 4.1).
            head.headers.remove(SEC_WEBSOCKET_PROTOCOL);
        }
        let tunnel = tunnel(
            on_downstream,
            on_upstream,
            hmr,
            late,
            self.proxy.tasks.clone(),
            self.permit.clone(),
        );
        self.proxy.tasks.spawn("preview tunnel", tunnel);
        Ok(Response::from_parts(
            head,
            ResponseBody::whole(Bytes::new()),
        ))
    }
}

/// `/` with the query of a request: the HMR socket is at the root whatever the site's base.
fn root_of(uri: &Uri) -> Uri {
    let root = match uri.query() {
        Some(query) => PathAndQuery::try_from(format!("/?{query}")),
        None => Ok(PathAndQuery::from_static("/")),
    };
    root.expect("the query was part of a valid target").into()
}
