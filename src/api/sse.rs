//! A turn's events as server-sent events.

use std::{convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::{StreamExt, stream};

use crate::{identity::TurnId, turn::TurnRecord};

/// By the contract.
pub(super) const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// Streams the events after `last_id`, to the outcome.
pub(super) fn events(id: TurnId, record: &TurnRecord, last_id: u64) -> Response {
    let batches = stream::unfold(record.events(last_id), move |mut events| {
        let id = id.clone();
        async move {
            let lines = match events.next().await {
                Ok(lines) if lines.is_empty() => return None,
                Ok(lines) => lines,
                Err(error) => {
                    tracing::warn!(%error, "failed to read a turn's events");
                    return None;
                }
            };
            let batch: Vec<Result<Event, Infallible>> = lines
                .iter()
                .map(|line| {
                    Ok(Event::default()
                        .id(line.id.to_string())
                        .event(line.name())
                        .data(line.data(&id)))
                })
                .collect();
            Some((stream::iter(batch), events))
        }
    });
    Sse::new(batches.flatten())
        .keep_alive(KeepAlive::new().interval(COMMENT_EVERY))
        .into_response()
}
