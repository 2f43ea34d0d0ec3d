//! The page at `/`: static files without any data, embedded in the binary.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{ApiError, params::Path};

/// The page talks to its own origin alone; previews are frames of other origins.
const POLICY: &str = "default-src 'self'; frame-src http: https:; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'self'";

fn asset(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}

/// The page.
pub(super) async fn index() -> Response {
    asset(
        "text/html; charset=utf-8",
        include_str!("../studio/index.html"),
    )
}

/// Its files.
pub(super) async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    match name.as_str() {
        "studio.css" => Ok(asset(
            "text/css; charset=utf-8",
            include_str!("../studio/studio.css"),
        )),
        "studio.js" => Ok(asset(
            "text/javascript; charset=utf-8",
            include_str!("../studio/studio.js"),
        )),
        "describe.js" => Ok(asset(
            "text/javascript; charset=utf-8",
            include_str!("../studio/describe.js"),
        )),
        // Browsers ask for it unasked.
        "favicon.ico" => Ok(StatusCode::NO_CONTENT.into_response()),
        _ => Err(ApiError::not_found("there is nothing at this address")),
    }
}
