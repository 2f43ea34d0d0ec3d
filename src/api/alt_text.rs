//! `…/alt-text`: texts for the images of a thread's site.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde::Deserialize;
use serde_json::{Value, json, to_value};
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::JsonOrNothing,
    calls::{CallKind, Ended, NewCall, Running},
    error::request_id,
    operations::{Wishes, unchanged},
    threads::{ThreadPath, idempotency_key, path_key},
    turns::succeeded,
};
use crate::{
    alt_text::{AltTextAnswer, AltTextError, AltTextWish, Progress, is_language},
    domain::Author,
    label,
    supervisor::OperationAnswer,
};

/// All of it may be left out, the body too.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct AltTextBody {
    /// Of all texts, as a tag (`de`, `pt-BR`); by default what the page, its path or the site says.
    language: Option<String>,
    model: Option<String>,
    /// Stop before more than this could be spent, in US dollars.
    max_cost_usd: Option<f64>,
    /// Say which images would be described and what that may cost at most, and do nothing.
    dry_run: Option<bool>,
    expected_head: Option<String>,
    /// The author of the commit.
    author: Option<Author>,
}

/// Gives images of the site that have no `alt` or an empty one a text, in the language of their
/// page, as one turn of kind `alt-text`. Decorative images stay as they are. `result.report` says
/// what was `done` (`file`, `line`, `image`, `alt`), what needs a `person` (and `why`), and how many
/// are `decorative`. Images are described outside of the thread's queue; the pages are changed by
/// one commit, as they are by then. Where there is nothing to change no turn is made (`commit` is
/// null). With `Accept: text/event-stream`: `alt_text.started` (`callId`), `alt_text.progress` (done of
/// total, cost so far), then `alt_text.completed` or `alt_text.cancelled` with `result`, or
/// `alt_text.failed` with the error. A caller who goes away cancels it, and so does
/// `POST /api/calls/{callId}/cancel`; a call with an `Idempotency-Key` goes on without its caller. What
/// was described is known when it is asked for again, and is not paid twice.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/alt-text",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = AltTextBody,
    responses((status = 200, description = "`{success, result}`: a turn of kind `alt-text` with `report`; without anything to change, or cancelled, `turnId` and `commit` are null; with `dryRun` `{dryRun, images, worstCaseUsd, report}`", body = crate::domain::TurnResult),
              (status = 400, description = "`invalid_request`"),
              (status = 404, description = "`not_found`: no such thread"),
              (status = 409, description = "`stale_head` with `head`, `merge_conflict` with `files`, `thread_busy_elsewhere`"),
              (status = 429, description = "`queue_full`, `budget_exceeded`"),
              (status = 502, description = "`agent_failed`: not one image could be described"),
              (status = 503, description = "`draining`")))]
pub(super) async fn write(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    JsonOrNothing(body): JsonOrNothing<AltTextBody>,
) -> Result<Response, ApiError> {
    let wish = wish(&state, &path, &headers, body)?;
    let call = NewCall {
        kind: CallKind::AltText,
        key: wish.key.clone(),
        is_kept: wish.idempotency_key.is_some(),
    };
    let shared = state.clone();
    let work = async move |call: Running| run(&shared, wish, &call).await;
    state.calls.run(call, &headers, work).await
}

fn wish(
    state: &Shared,
    path: &ThreadPath,
    headers: &HeaderMap,
    body: AltTextBody,
) -> Result<AltTextWish, ApiError> {
    if let Some(language) = &body.language
        && !is_language(language)
    {
        return Err(ApiError::invalid(
            "language has to be a tag like de or pt-BR",
        ));
    }
    if let Some(model) = &body.model
        && !label::is_model_name(model)
    {
        return Err(ApiError::invalid("model: it is no name of a model"));
    }
    let most_usd = body.max_cost_usd;
    if most_usd.is_some_and(|most| !(most.is_finite() && most > 0.0)) {
        return Err(ApiError::invalid(
            "maxCostUsd has to be a number of dollars above 0",
        ));
    }
    let wishes = Wishes::new(body.expected_head, body.dry_run, body.author)?;
    Ok(AltTextWish {
        key: path_key(state, path)?,
        language: body.language,
        model: body.model,
        most_usd,
        dry_run: wishes.dry_run,
        expected_head: wishes.expected_head,
        author: wishes.author,
        idempotency_key: idempotency_key(headers)?,
        request_id: request_id(),
    })
}

async fn run(state: &Shared, wish: AltTextWish, call: &Running) -> Result<Ended, ApiError> {
    let mut tell = |progress: &Progress| call.tell("progress", &json!(progress));
    let texts = &state.alt_texts;
    let written = texts.write(&state.supervisor, wish, call.stop(), &mut tell);
    let result = match written.await {
        Ok(AltTextAnswer::DryRun {
            report,
            images,
            worst_usd,
        }) => json!({
            "dryRun": true,
            "images": images,
            "worstCaseUsd": worst_usd,
            "report": report,
        }),
        Ok(AltTextAnswer::Written(OperationAnswer::Done(turn))) => plain(&succeeded(turn)?),
        Ok(AltTextAnswer::Written(OperationAnswer::Unchanged(text, report))) => {
            plain(&unchanged(text, report))
        }
        Ok(AltTextAnswer::Written(_)) => {
            unreachable!("an edit that is no dry run is done, or not")
        }
        Err(AltTextError::Cancelled) => return Ok(Ended::Cancelled),
        Err(error) => return Err(error.into()),
    };
    Ok(Ended::Done(result))
}

fn plain(result: &impl serde::Serialize) -> Value {
    to_value(result).expect("plain data serialises")
}
