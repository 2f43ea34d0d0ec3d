//! A request and its answer, between a browser and a dev server.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Version, request::Parts, uri::PathAndQuery,
};
use hyper::body::{Body, Incoming};
use tokio::time::timeout;

use super::{Destination, Downstream};
use crate::{
    domain::{PreviewState, PreviewStatus},
    preview::{
        PreviewHandle,
        access::hide_cookies,
        body::{RequestBody, ResponseBody},
        headers, package_files,
        pages::{self, Page},
        refusals::{UpstreamError, not_yet, upstream_problem},
    },
};

/// How long a request that can't be shown a page waits for a server that starts.
const WAIT_FOR_LIVE: Duration = Duration::from_secs(30);
/// Of that, how long a request waits for a server that has failed to be started again: a page that is
/// shown as it was asks for much that would hold all of the browser's connections.
const WAIT_FOR_RESTART: Duration = Duration::from_secs(2);

impl Downstream {
    pub(super) async fn forward(
        &self,
        head: &Parts,
        body: Incoming,
        to: &Destination,
    ) -> Result<Response<ResponseBody>, Page> {
        let guard = self.proxy.activity.request();
        let port = match to.preview.upstream() {
            Some(port) => port,
            None if to.as_page => return Err(self.hold(head, to)),
            None => Box::pin(await_upstream(&to.preview)).await?,
        };
        // RFC 9110 9.2.2.
        let is_repeatable = head.method.is_idempotent() && body.is_end_stream();
        let request = self.to_upstream(head, RequestBody::streamed(body), to, port);
        let again =
            is_repeatable.then_some(|| self.to_upstream(head, RequestBody::Empty, to, port));
        let response = match self.upstream.exchange(port, request, again).await {
            Ok(response) => response,
            Err(UpstreamError::Unreachable) if to.as_page => return Err(self.hold(head, to)),
            Err(error) => return Err(upstream_problem(&error, to.as_page)),
        };
        if to.as_page {
            to.preview.note_answer(head.uri.path());
        }
        if response.status() == StatusCode::FORBIDDEN
            && let Some(file) = Box::pin(package_file(head, &to.preview)).await
        {
            return Err(file);
        }
        let mut response = response.map(ResponseBody::streamed);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked for it.
            return Err(upstream_problem(&UpstreamError::Closed, to.as_page));
        }
        headers::strip_hop_by_hop(response.headers_mut());
        *response.version_mut() = Version::HTTP_11;
        if headers::asks_for_document(&head.method, &head.headers) {
            self.keep_or_replace(head, &mut response, to)?;
        }
        if !headers::is_event_stream(response.headers()) {
            response.body_mut().guard = Some(guard);
        }
        Ok(response)
    }

    /// What is added to a page that people look at; a broken one is shown as it was before.
    fn keep_or_replace(
        &self,
        head: &Parts,
        response: &mut Response<ResponseBody>,
        to: &Destination,
    ) -> Result<(), Page> {
        let shows_banner = self.proxy.previews.shows_banner();
        if response.status().is_server_error() {
            return match self.last_good(head, to) {
                Some(html) => Err(pages::last_good(response.status(), &html)),
                None => Ok(()),
            };
        }
        if !headers::is_plain_html(response.status(), response.headers()) {
            return Ok(());
        }
        let is_for_all = headers::is_for_all(&head.headers, response.headers());
        if shows_banner && is_for_all {
            let rendering = to.preview.last_good().begin(target(head));
            response.body_mut().rendering = Some(rendering);
        }
        let tag = if shows_banner {
            pages::BANNER_TAG
        } else {
            pages::PRESENCE_TAG
        };
        headers::lengthen(response.headers_mut(), tag.len());
        response.body_mut().tail = Some(Bytes::from_static(tag.as_bytes()));
        Ok(())
    }

    /// A page as it was before it broke, where that is wanted and known.
    fn last_good(&self, head: &Parts, to: &Destination) -> Option<Bytes> {
        let is_wanted = self.proxy.previews.shows_banner()
            && headers::asks_for_document(&head.method, &head.headers);
        is_wanted.then(|| to.preview.last_good().page(target(head)))?
    }

    /// A page where there is no server to ask: one that sleeps wakes, and one that failed is tried
    /// once more, because somebody looks.
    fn hold(&self, head: &Parts, to: &Destination) -> Page {
        let status = to.preview.status();
        let status = status.borrow();
        let has_failed = status.state == PreviewState::Error;
        if has_failed || status.state == PreviewState::Asleep {
            to.preview.retry();
        }
        match self.last_good(head, to) {
            Some(html) if has_failed => pages::last_good(StatusCode::SERVICE_UNAVAILABLE, &html),
            _ => pages::holding(&status),
        }
    }

    /// The request that the dev server gets for the browser's. That one stays as it was: another
    /// can be made of it.
    pub(super) fn to_upstream(
        &self,
        head: &Parts,
        body: RequestBody,
        to: &Destination,
        port: u16,
    ) -> Request<RequestBody> {
        let passes = to.host.passes_host_check(&to.preview.site().hosts);
        let rewritten = (!passes).then(|| local_host(port));
        let mut request = Request::new(body);
        request.method_mut().clone_from(&head.method);
        *request.uri_mut() = match head.uri.authority() {
            None => head.uri.clone(),
            Some(_) => {
                let path = head.uri.path_and_query().cloned();
                path.unwrap_or(PathAndQuery::from_static("/")).into()
            }
        };
        let headers = request.headers_mut();
        *headers = headers::to_upstream(&head.headers, &self.peer, to.host.value(), rewritten);
        hide_cookies(headers);
        request
    }
}

/// A font or image of a package that Vite refuses because it lies on another disk than the site.
async fn package_file(head: &Parts, preview: &PreviewHandle) -> Option<Page> {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return None;
    }
    let folders = &preview.site().writable;
    let file = package_files::named(head.uri.path(), folders.iter().map(AsRef::as_ref))?;
    let kind = file.kind;
    Some(pages::file(kind, file.read().await.ok()?))
}

/// Waits for a server that starts, wakes or is being repaired.
pub(super) async fn await_upstream(preview: &PreviewHandle) -> Result<u16, Page> {
    let mut status = preview.status();
    if status.borrow().state == PreviewState::Off {
        return Err(not_yet(false));
    }
    preview.wake();
    let has_failed = |status: &PreviewStatus| status.state == PreviewState::Error;
    let live = async {
        loop {
            let seen = status.wait_for(|status| status.upstream.is_some() || has_failed(status));
            if let Some(port) = seen.await.ok()?.upstream {
                return Some(port);
            }
            let next = status.wait_for(|status| status.upstream.is_some() || !has_failed(status));
            timeout(WAIT_FOR_RESTART, next).await.ok()?.ok()?;
        }
    };
    timeout(WAIT_FOR_LIVE, live)
        .await
        .ok()
        .flatten()
        .ok_or_else(|| not_yet(false))
}

/// A page's address, with its query.
fn target(head: &Parts) -> &str {
    head.uri.path_and_query().map_or("/", PathAndQuery::as_str)
}

fn local_host(port: u16) -> HeaderValue {
    HeaderValue::from_str(&format!("localhost:{port}")).expect("letters and digits")
}
