//! Events of a journal as server-sent events: a turn's, and a batch's.

use std::{convert::Infallible, fmt, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::{StreamExt, future::BoxFuture, stream};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{identity::TurnId, turn::TurnRecord};

/// By the contract.
pub(super) const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// Streams a turn's events after `last_id`, to the outcome.
pub(super) fn events(id: TurnId, record: &TurnRecord, last_id: u64) -> Response {
    follow((id, record.events(last_id)), |(id, events)| {
        Box::pin(async move {
            let lines = events.next().await?;
            let told = lines.iter().map(|line| {
                let id = ("turnId", id.to_string());
                told(line.id, line.name(), &line.event, id)
            });
            Ok::<_, crate::turn::JournalError>(told.collect())
        })
    })
}

/// One event, its `data` with the id of what it belongs to.
pub(super) fn told(
    number: u64,
    name: &str,
    event: &impl Serialize,
    (of, id): (&str, String),
) -> Event {
    let mut event = serde_json::to_value(event).expect("our own plain data serialises");
    let mut data = event.get_mut("data").map_or(json!({}), Value::take);
    if let Some(object) = data.as_object_mut() {
        object.insert(of.to_owned(), id.into());
    }
    let event = Event::default().id(number.to_string()).event(name);
    event.data(data.to_string())
}

/// The next events of a source; none at its end.
type Next<S, E> = for<'a> fn(&'a mut S) -> BoxFuture<'a, Result<Vec<Event>, E>>;

/// Streams what `next` brings, until it brings nothing or fails.
pub(super) fn follow<S, E>(source: S, next: Next<S, E>) -> Response
where
    S: Send + 'static,
    E: fmt::Display + 'static,
{
    let bunches = stream::unfold(source, move |mut source| async move {
        match next(&mut source).await {
            Ok(events) if events.is_empty() => None,
            Ok(events) => {
                let events = events.into_iter().map(Ok::<_, Infallible>);
                Some((stream::iter(events), source))
            }
            Err(error) => {
                tracing::warn!(%error, "failed to read a journal's events");
                None
            }
        }
    });
    Sse::new(bunches.flatten())
        .keep_alive(KeepAlive::new().interval(COMMENT_EVERY))
        .into_response()
}
