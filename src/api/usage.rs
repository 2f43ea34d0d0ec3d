//! `/api/usage`: what model requests cost, by whom, and right now.

use std::{convert::Infallible, time::Duration};

use axum::{
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use jiff::{civil::Date, tz::TimeZone};
use serde::Deserialize;

use super::{
    ApiError, Shared,
    body::{check_tenants, success},
    params::Query,
};
use crate::usage::{Live, Question, Report, Tenants};

/// How often the live view is told anew.
const EVERY: Duration = Duration::from_secs(1);
/// By the contract.
const COMMENT_EVERY: Duration = Duration::from_secs(15);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct UsageQuery {
    period: Option<String>,
    by: Option<String>,
    time_zone: Option<String>,
    client_id: Option<String>,
    user_id: Option<String>,
    thread_id: Option<String>,
    from: Option<String>,
    to: Option<String>,
}

impl UsageQuery {
    fn question(self, state: &Shared) -> Result<Question, ApiError> {
        fn word<T: std::str::FromStr<Err: std::fmt::Display> + Default>(
            field: &str,
            text: Option<String>,
        ) -> Result<T, ApiError> {
            let parsed = text.map(|text| text.parse()).transpose();
            Ok(parsed
                .map_err(|error| ApiError::invalid(format!("{field}: {error}")))?
                .unwrap_or_default())
        }
        let day = |field: &str, text: Option<String>| {
            let parsed = text.map(|text| text.parse::<Date>()).transpose();
            parsed.map_err(|_| ApiError::invalid(format!("{field} has to be a day, as 2026-11-21")))
        };
        let zone = match self.time_zone {
            None => state.books.zone().clone(),
            Some(name) => TimeZone::get(&name).map_err(|_| {
                ApiError::invalid(
                    "timeZone has to be a name of the IANA database, as Europe/Berlin",
                )
            })?,
        };
        let asked = Tenants {
            client: self.client_id.as_deref().map(str::parse).transpose()?,
            user: self.user_id.as_deref().map(str::parse).transpose()?,
        };
        Ok(Question {
            period: word("period", self.period)?,
            by: word("by", self.by)?,
            zone,
            tenants: check_tenants(&state.pins, asked)?,
            thread: self.thread_id.as_deref().map(str::parse).transpose()?,
            from: day("from", self.from)?,
            to: day("to", self.to)?,
        })
    }
}

/// What model requests cost. Of a container that is pinned to a client or user only theirs.
#[utoipa::path(get, path = "/api/usage", params(
    ("period" = Option<String>, Query, description = "`daily` (default), `weekly`, `monthly`"),
    ("by" = Option<String>, Query, description = "`client` (default), `user`, `thread`, `model`"),
    ("timeZone" = Option<String>, Query, description = "where days begin; `USAGE_TIME_ZONE` by default"),
    ("clientId" = Option<String>, Query), ("userId" = Option<String>, Query),
    ("threadId" = Option<String>, Query),
    ("from" = Option<String>, Query, description = "first day"),
    ("to" = Option<String>, Query, description = "last day")),
    responses((status = 200, description = "`{success, result}`", body = Report),
              (status = 400, description = "`invalid_request`, `invalid_id`")))]
pub(super) async fn report(
    State(state): State<Shared>,
    Query(query): Query<UsageQuery>,
) -> Result<Response, ApiError> {
    let question = query.question(&state)?;
    let report = state.books.report(question).await?;
    Ok(success(report))
}

/// What is spent right now: an event `usage` each second.
#[utoipa::path(get, path = "/api/usage/live",
    responses((status = 200, description = "server-sent events named `usage`", body = Live,
               content_type = "text/event-stream")))]
pub(super) async fn live(State(state): State<Shared>) -> Result<Response, ApiError> {
    // The first one now, so that what is wrong is told as an error.
    let first = state.books.live().await?;
    let views = stream::unfold((state, Some(first)), |(state, first)| async move {
        let view = match first {
            Some(first) => first,
            None => {
                tokio::time::sleep(EVERY).await;
                if state.supervisor.is_draining() {
                    return None;
                }
                match state.books.live().await {
                    Ok(view) => view,
                    Err(error) => {
                        tracing::warn!(%error, "failed to read the ledgers for a live view");
                        return None;
                    }
                }
            }
        };
        let data = serde_json::to_string(&view).expect("plain data serialises");
        let event: Result<Event, Infallible> = Ok(Event::default()
            .id(view.at.as_millisecond().to_string())
            .event("usage")
            .data(data));
        Some((event, (state, None)))
    });
    Ok(Sse::new(views)
        .keep_alive(KeepAlive::new().interval(COMMENT_EVERY))
        .into_response())
}
