//! The HTTP edge: routes, checks and answers of the control plane's API and of the page at `/`.
//! Thin: it parses, calls the supervisor and translates what comes back.
//!
//! **Invariant:** no handler decides anything about turns, git or processes; the only place that
//! picks a status or a code is `error.rs`.

mod access;
mod alt_text;
mod batches;
mod body;
mod calls;
mod cli;
mod error;
mod health;
mod images;
mod label;
mod one_shot;
mod operations;
mod page;
mod params;
mod publish;
mod rate;
mod serve;
mod sse;
mod threads;
mod turns;
mod usage;

use std::{ops::Deref, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{DefaultBodyLimit, FromRef},
    http::{Method, StatusCode},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;

pub use access::{Access, AccessSettings};
pub use batches::is_ours;
pub use calls::Calls;
pub use error::ApiError;
pub use health::{Facts, Readiness};
pub use rate::RateLimit;
pub use serve::serve;

use crate::{
    alt_text::AltTexts,
    figures::Figures,
    identity::{ClientId, ThreadId, UserId},
    images::Images,
    label::{Batches, Labels},
    lifecycle::Activity,
    service::Service,
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

/// What every listener's handlers share: who may come in, what operators ask, one-shot runs.
#[derive(Debug)]
pub struct BaseState {
    pub access: Access,
    /// Of one-shot calls.
    pub rate: RateLimit,
    pub activity: Activity,
    pub service: Service,
    pub ledger: Ledger,
    pub figures: Figures,
    pub pins: Pins,
    pub facts: Facts,
    pub readiness: Readiness,
    pub started: Instant,
    /// Cancelled when a shutdown begins.
    pub draining: CancellationToken,
    /// `None` where the one-shot service runs alone.
    pub supervisor: Option<Supervisor>,
}

/// [`BaseState`] as handlers take it.
#[derive(Debug, Clone)]
pub struct Base(Arc<BaseState>);

impl From<BaseState> for Base {
    fn from(state: BaseState) -> Self {
        Self(Arc::new(state))
    }
}

impl Deref for Base {
    type Target = BaseState;

    fn deref(&self) -> &BaseState {
        &self.0
    }
}

/// What the handlers of the API share.
#[derive(Debug)]
pub struct ApiState {
    pub base: Base,
    pub supervisor: Supervisor,
    pub books: Books,
    pub pins: Pins,
    pub labels: Labels,
    pub batches: Batches,
    pub alt_texts: AltTexts,
    pub images: Images,
    pub calls: Calls,
}

/// The state as handlers take it.
pub type Shared = Arc<ApiState>;

impl FromRef<Shared> for Base {
    fn from_ref(state: &Shared) -> Self {
        state.base.clone()
    }
}

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
        alt_text::write,
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
        one_shot::execute,
        label::one,
        batches::submit,
        batches::one,
        batches::events,
        batches::cancel,
        batches::resume,
        images::make,
        calls::cancel,
        cli::open,
    ),
    components(schemas(
        error::ErrorBody,
        crate::domain::TurnResult,
        crate::supervisor::ThreadView,
        crate::supervisor::TurnSummary,
        crate::supervisor::PreviewView,
        operations::DryRunView,
        operations::Unchanged,
        calls::CancelledView,
        crate::alt_text::Report,
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
        .route(&format!("{thread}/alt-text"), post(alt_text::write))
        .route(&format!("{thread}/undo"), post(operations::undo))
        .route(&format!("{thread}/redo"), post(operations::redo))
        .route(&format!("{thread}/restore"), post(operations::restore))
        .route(&format!("{thread}/publish"), post(publish::publish))
        .route(&format!("{thread}/sync"), post(publish::sync))
        .route(&format!("{thread}/images"), post(images::make))
        .route("/api/turns/{turn}", get(turns::one))
        .route("/api/turns/{turn}/events", get(turns::events))
        .route("/api/turns/{turn}/cancel", post(turns::cancel))
        .route("/api/calls/{call}/cancel", post(calls::cancel))
        .route("/api/usage", get(usage::report))
        .route("/api/usage/live", get(usage::live))
        .route("/execute", post(one_shot::execute))
        // What a body may have is bounded by `access`.
        .route(
            access::LABEL,
            post(label::one).layer(DefaultBodyLimit::disable()),
        )
        .route(
            access::BATCHES,
            post(batches::submit).layer(DefaultBodyLimit::disable()),
        )
        .route("/api/label/batches/{batch}", get(batches::one))
        .route("/api/label/batches/{batch}/events", get(batches::events))
        .route("/api/label/batches/{batch}/cancel", post(batches::cancel))
        .route("/api/label/batches/{batch}/resume", post(batches::resume))
        .route("/api/cli", post(cli::open))
        .route("/api/idle", get(health::idle))
        .route("/api/idle/touch", post(health::touch))
        .route("/", get(page::index))
        .route("/{file}", get(page::file))
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_possible)
        .layer(middleware::from_fn_with_state(
            state.base.clone(),
            access::check,
        ))
        .with_state(state)
}

/// The routes of the one-shot service alone.
pub fn service_router(base: Base) -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/metrics", get(health::service_metrics))
        .route("/execute", post(one_shot::execute))
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_possible)
        .layer(middleware::from_fn_with_state(base.clone(), access::check))
        .with_state(base)
}

async fn nothing_here() -> ApiError {
    ApiError::not_found("there is nothing at this address")
}

async fn not_possible(method: Method) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request",
        format!("{method} is not possible at this address"),
    )
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
            "/execute",
            "/api/label",
            "/api/label/batches",
            "/api/clients/{client}/users/{user}/threads/{thread}/images",
        ] {
            assert!(document["paths"][path].is_object(), "{path} is described");
        }
    }
}
