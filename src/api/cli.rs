//! `POST /api/cli`: a token of the gateway for the CLI on somebody's terminal (`greenroom claude`).

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use futures_util::stream::{self, StreamExt};
use serde_json::json;

use super::{ApiError, Shared};
use crate::domain::Account;

/// A line without anything, so that a caller that is gone is noticed.
const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// A token that is good while the answer is being read: its first line is
/// `{"success":true,"baseUrl":…,"token":…}`, then come empty ones. Both are of use on this machine
/// alone. The container stays awake meanwhile.
#[utoipa::path(post, path = "/api/cli",
    responses((status = 200, content_type = "application/x-ndjson"),
              (status = 503, description = "`draining`")))]
pub(super) async fn open(State(state): State<Shared>) -> Result<Response, ApiError> {
    let account = Account {
        client: state.pins.client.clone(),
        user: state.pins.user.clone(),
        ..Account::of_kind(Account::CLI)
    };
    let terminal = state.supervisor.open_terminal(account)?;
    let first = json!({
        "success": true,
        "baseUrl": terminal.base_url(),
        "token": terminal.token(),
    });
    let first = stream::iter([Bytes::from(format!("{first}\n"))]);
    let draining = state.base.draining.clone();
    let rest = stream::unfold(terminal, async |terminal| {
        tokio::time::sleep(COMMENT_EVERY).await;
        Some((Bytes::from_static(b"\n"), terminal))
    });
    let lines = first
        .chain(rest)
        .take_until(draining.cancelled_owned())
        .map(Ok::<_, Infallible>);
    Ok((
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response())
}
