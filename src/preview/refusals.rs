//! What the proxy says where there is nothing to pass on.

use http::StatusCode;

use super::{
    alarm::Elapsed,
    body::BodyError,
    filter::Refusal,
    headers,
    pages::{self, Page},
};

/// Why the dev server gave no answer.
#[derive(Debug)]
pub(crate) enum UpstreamError {
    /// No connection: it is down or restarts.
    Unreachable,
    /// The connection ended before an answer.
    Closed,
    TimedOut,
    /// The request's body is none.
    BrokenBody,
    /// The browser took too long to send its body.
    SlowBody,
}

impl From<hyper::Error> for UpstreamError {
    fn from(error: hyper::Error) -> Self {
        let source = std::error::Error::source(&error);
        match source.and_then(|source| source.downcast_ref()) {
            Some(BodyError::TooSlow) => Self::SlowBody,
            Some(BodyError::Broken(_)) => Self::BrokenBody,
            _ => Self::Closed,
        }
    }
}

impl From<Elapsed> for UpstreamError {
    fn from(_: Elapsed) -> Self {
        Self::TimedOut
    }
}

pub(crate) fn refused(refusal: Refusal, as_page: bool) -> Page {
    let (status, text) = match refusal {
        Refusal::Unclear => (
            StatusCode::BAD_REQUEST,
            "This address is spelled in an unusual way. Open the page from the site's own links.",
        ),
        Refusal::Private => (
            StatusCode::FORBIDDEN,
            "This file is not part of the site that visitors see.",
        ),
    };
    pages::problem(status, "Not shown", text, as_page)
}

pub(crate) fn names_no_host() -> Page {
    bad_request("the request names no host")
}

pub(crate) fn not_yet(as_page: bool) -> Page {
    let text = "the dev server of this site is not running yet";
    pages::problem(StatusCode::SERVICE_UNAVAILABLE, "Not ready", text, as_page)
}

pub(crate) fn upstream_problem(error: &UpstreamError, as_page: bool) -> Page {
    let (status, text) = match error {
        UpstreamError::Unreachable => return not_yet(as_page),
        UpstreamError::Closed => (
            StatusCode::BAD_GATEWAY,
            "The site's dev server broke off before it answered.",
        ),
        UpstreamError::BrokenBody => return bad_request("the body can't be read"),
        UpstreamError::SlowBody => (
            StatusCode::REQUEST_TIMEOUT,
            "The upload came too slowly. Try it again.",
        ),
        UpstreamError::TimedOut => (
            StatusCode::GATEWAY_TIMEOUT,
            "The site's dev server did not answer in time.",
        ),
    };
    pages::problem(status, "The preview has a problem", text, as_page)
}

pub(crate) fn bad_request(text: &str) -> Page {
    pages::problem(StatusCode::BAD_REQUEST, "Bad request", text, false)
}

pub(crate) fn upgrade_required() -> Page {
    let text = "this port speaks WebSocket alone";
    let mut response = pages::problem(
        StatusCode::UPGRADE_REQUIRED,
        "Upgrade required",
        text,
        false,
    );
    headers::ask_for_websocket(response.headers_mut());
    response
}
