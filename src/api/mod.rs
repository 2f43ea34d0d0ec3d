//! The HTTP edge: routes, checks and answers of the control plane's API and of the page at `/`.
//! Thin: it parses, calls the supervisor and translates what comes back.
//!
//! **Invariant:** no handler decides anything about turns, git or processes; the only place that
//! picks a status or a code is `error.rs`.

mod access;
mod body;
mod error;
mod health;
mod operations;
mod page;
mod publish;
mod serve;
mod sse;
mod threads;
mod turns;
mod usage;

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    http::{Method, StatusCode},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use utoipa::OpenApi;

pub use access::{Access, AccessSettings};
pub use error::ApiError;
pub use health::{Facts, Readiness};
pub use serve::serve;

use crate::{
    identity::{ClientId, ThreadId, UserId},
    lifecycle::Activity,
    supervisor::Supervisor,
    usage::{Books, Ledger},
};

/// Ids that requests may omit, and tenants that this container is pinned to.
#[derive(Debug, Clone, Default)]
pub struct Pins {
    pub client: Option<ClientId>,
    pub user: Option<UserId>,
    pub thread: Option<ThreadId>,
}

/// What all handlers share.
#[derive(Debug)]
pub struct ApiState {
    pub supervisor: Supervisor,
    pub ledger: Ledger,
    pub books: Books,
    pub activity: Activity,
    pub access: Access,
    pub pins: Pins,
    pub facts: Facts,
    pub readiness: Readiness,
    pub started: Instant,
}

/// The state as handlers take it.
pub type Shared = Arc<ApiState>;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "greenroom",
        description = "Customers edit their websites by talking."
    ),
    paths(
        health::health,
        health::ready,
        health::metrics,
        threads::init,
        threads::execute,
        threads::list,
        threads::one,
        threads::remove,
        threads::history,
        threads::diff,
        threads::preview,
        operations::undo,
        operations::redo,
        operations::restore,
        publish::publish,
        publish::sync,
        turns::one,
        turns::events,
        turns::cancel,
        health::idle,
        health::touch,
        usage::report,
        usage::live,
    ),
    components(schemas(
        error::ErrorBody,
        crate::domain::TurnResult,
        crate::supervisor::ThreadView,
        crate::supervisor::TurnSummary,
        crate::supervisor::PreviewView,
        operations::DryRunView,
        publish::PublishView,
        publish::SyncView,
    ))
)]
struct Document;

/// The OpenAPI document, as `/openapi.json` serves it.
pub fn openapi_json() -> String {
    Document::openapi()
        .to_pretty_json()
        .expect("the document is plain data")
}

async fn openapi() -> Response {
    ([("content-type", "application/json")], openapi_json()).into_response()
}

/// All routes, with their checks.
pub fn router(state: Shared) -> Router {
    let thread = "/api/clients/{client}/users/{user}/threads/{thread}";
    Router::new()
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi))
        .route("/api/init", post(threads::init))
        .route("/api/execute", post(threads::execute))
        .route("/api/threads", get(threads::list))
        .route(thread, get(threads::one).delete(threads::remove))
        .route(&format!("{thread}/history"), get(threads::history))
        .route(&format!("{thread}/diff"), get(threads::diff))
        .route(&format!("{thread}/preview"), get(threads::preview))
        .route(&format!("{thread}/undo"), post(operations::undo))
        .route(&format!("{thread}/redo"), post(operations::redo))
        .route(&format!("{thread}/restore"), post(operations::restore))
        .route(&format!("{thread}/publish"), post(publish::publish))
        .route(&format!("{thread}/sync"), post(publish::sync))
        .route("/api/turns/{turn}", get(turns::one))
        .route("/api/turns/{turn}/events", get(turns::events))
        .route("/api/turns/{turn}/cancel", post(turns::cancel))
        .route("/api/usage", get(usage::report))
        .route("/api/usage/live", get(usage::live))
        .route("/api/idle", get(health::idle))
        .route("/api/idle/touch", post(health::touch))
        .route("/", get(page::index))
        .route("/{file}", get(page::file))
        .fallback(async || ApiError::not_found("there is nothing at this address"))
        .method_not_allowed_fallback(async |method: Method| {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request",
                format!("{method} is not possible at this address"),
            )
        })
        .layer(middleware::from_fn_with_state(state.clone(), access::check))
        .with_state(state)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_document_describes_the_contract() {
        let document: serde_json::Value = serde_json::from_str(&super::openapi_json()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        for path in [
            "/health",
            "/api/init",
            "/api/execute",
            "/api/turns/{turn}/events",
            "/api/usage",
        ] {
            assert!(document["paths"][path].is_object(), "{path} is described");
        }
    }
}
