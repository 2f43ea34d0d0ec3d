//! `/api/turns/…`: looking at turns, following and stopping them.

use axum::{
    Json as Answer,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{
    ApiError, Shared,
    body::{check_pins, success},
    params::Path,
    sse,
};
use crate::{
    domain::{TurnResult, TurnStatus},
    identity::TurnId,
    supervisor::SupervisorError,
    turn::TurnRecord,
};

pub(super) fn turn_id(state: &Shared, text: &str) -> Result<TurnId, ApiError> {
    let id: TurnId = text
        .parse()
        .map_err(|_| ApiError::not_found("there is no such turn"))?;
    check_pins(&state.pins, &id.key().user_key())?;
    Ok(id)
}

/// The answer to whoever does not wait for a turn.
pub(super) fn accepted(id: &TurnId) -> Response {
    let told = json!({"success": true, "turnId": id});
    (StatusCode::ACCEPTED, Answer(told)).into_response()
}

/// A turn's outcome, however long that takes; of one that failed an error.
pub(super) async fn outcome(
    state: &Shared,
    record: &TurnRecord,
) -> Result<Box<TurnResult>, ApiError> {
    match record.outcome().await {
        Ok(outcome) => succeeded(Box::new(outcome)),
        // Still in line when the program stopped: it runs after the next start.
        Err(_) if state.supervisor.is_draining() => Err(SupervisorError::Draining.into()),
        Err(error) => Err(SupervisorError::from(error).into()),
    }
}

/// A turn's result, unless it failed.
pub(super) fn succeeded(turn: Box<TurnResult>) -> Result<Box<TurnResult>, ApiError> {
    match turn.status {
        TurnStatus::Failed => Err(ApiError::turn(*turn)),
        _ => Ok(turn),
    }
}

/// How a turn stands or ended.
#[utoipa::path(get, path = "/api/turns/{turn}", params(("turn" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = crate::domain::TurnResult),
              (status = 404, description = "`not_found`")))]
pub(super) async fn one(
    State(state): State<Shared>,
    Path(turn): Path<String>,
) -> Result<Response, ApiError> {
    let id = turn_id(&state, &turn)?;
    let result = state.supervisor.turn_result(&id).await?;
    Ok(success(result))
}

/// The turn's events, whole, from `Last-Event-ID` on.
#[utoipa::path(get, path = "/api/turns/{turn}/events", params(("turn" = String, Path)),
    responses((status = 200, description = "server-sent events", content_type = "text/event-stream"),
              (status = 404, description = "`not_found`")))]
pub(super) async fn events(
    State(state): State<Shared>,
    Path(turn): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = turn_id(&state, &turn)?;
    let record = state.supervisor.turn(&id).await?;
    Ok(sse::events(id, &record, last_event_id(&headers)))
}

/// The number after which a reader goes on.
pub(super) fn last_event_id(headers: &HeaderMap) -> u64 {
    headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .unwrap_or(0)
}

/// Stops a turn; answers when it has its outcome.
#[utoipa::path(post, path = "/api/turns/{turn}/cancel", params(("turn" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = crate::domain::TurnResult),
              (status = 404, description = "`not_found`")))]
pub(super) async fn cancel(
    State(state): State<Shared>,
    Path(turn): Path<String>,
) -> Result<Response, ApiError> {
    let id = turn_id(&state, &turn)?;
    let result = state.supervisor.cancel(&id).await?;
    Ok(success(result))
}
