//! `POST …/threads/{thread}/images`: images made for a site.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde::Deserialize;
use serde_json::{Map, Value, json, to_value};
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::Json,
    calls::{CallKind, Ended, NewCall, Running},
    error::request_id,
    threads::{ThreadPath, check_author, idempotency_key, not_empty, path_key},
    turns::{outcome, succeeded},
};
use crate::{
    domain::{Author, TurnResult},
    images::{ImageAnswer, ImageError, ImageNews, ImageWish, MAX_ALT, MAX_COUNT, MAX_TEXT},
};

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ImagesBody {
    /// What the image shows.
    #[schema(required)]
    prompt: Option<String>,
    /// Where the site is to show it, in words: an agent's turn places it. Without this the image
    /// only lies in the site.
    instruction: Option<String>,
    /// 1 to 4.
    count: Option<u64>,
    /// `OWNER/MODEL` or `OWNER/MODEL:VERSION` on Replicate; else the client's own, else
    /// `IMAGE_MODEL`.
    model: Option<String>,
    /// Further parameters of the model, as its schema has them.
    #[schema(value_type = Option<Object>)]
    params: Option<Map<String, Value>>,
    /// The alt text; else a model describes the image.
    alt: Option<String>,
    /// The folder for it, below `src`, `public` or `static`; else the one where the site's images
    /// are.
    folder: Option<String>,
    /// With `instruction`: answer when the image is made and the agent's turn is accepted.
    #[serde(rename = "async")]
    is_async: Option<bool>,
    author: Option<Author>,
}

impl ImagesBody {
    fn into_wish(self, state: &Shared, path: &ThreadPath) -> Result<ImageWish, ApiError> {
        let text = |field: &str, value: Option<String>| match value {
            Some(text)
                if text.trim().is_empty() || text.len() > MAX_TEXT || text.contains('\0') =>
            {
                let why = format!("{field} has to be 1 to {MAX_TEXT} bytes of text");
                Err(ApiError::invalid(why))
            }
            text => Ok(text),
        };
        let prompt = text("prompt", self.prompt)?;
        let prompt =
            prompt.ok_or_else(|| ApiError::invalid("prompt is missing: say what to make"))?;
        let count = match usize::try_from(self.count.unwrap_or(1)) {
            Ok(count @ 1..=MAX_COUNT) => count,
            _ => {
                let why = format!("count has to be 1 to {MAX_COUNT}");
                return Err(ApiError::invalid(why));
            }
        };
        let alt = match self.alt {
            Some(alt) if alt.chars().count() > MAX_ALT || alt.contains(char::is_control) => {
                let why = format!("alt has to be at most {MAX_ALT} characters in one line");
                return Err(ApiError::invalid(why));
            }
            alt => not_empty("alt", alt, usize::MAX)?,
        };
        let instruction = text("instruction", self.instruction)?;
        if self.is_async == Some(true) && instruction.is_none() {
            return Err(ApiError::invalid(
                "async: only the turn that an instruction asks for can be waited for elsewhere",
            ));
        }
        Ok(ImageWish {
            key: path_key(state, path)?,
            prompt,
            instruction,
            count,
            model: not_empty("model", self.model, 300)?,
            params: self.params.unwrap_or_default(),
            alt,
            folder: not_empty("folder", self.folder, 200)?,
            author: self.author.map(check_author).transpose()?,
            idempotency_key: None,
            request_id: request_id(),
        })
    }
}

/// Makes one to four images on Replicate and puts them into the site's own folder for images, scaled
/// down, without metadata, with an alt text. Without `instruction` that is a turn of kind `images`;
/// with it an agent's turn shows them where it says. Image and reference are one commit, and one
/// undo. `result.report` tells paths, alt texts, model, time and cost. Parameters are checked by the
/// model's schema before anything is paid; what is paid is in the ledger and counts for budgets.
/// With `Accept: text/event-stream`: `images.started` (`callId`), `images.progress` (prediction,
/// status, percent), `budget.warning`, `images.turn` (`turnId`, with `instruction`), then
/// `images.completed` or `images.cancelled` with `result`, or `images.failed` with the error. A caller
/// who goes away before the turn exists cancels it, and so does `POST /api/calls/{callId}/cancel`; a
/// call with an `Idempotency-Key` goes on without its caller, and made again goes on with what was
/// paid, also after a crash.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/images",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = ImagesBody,
    responses((status = 200, description = "`{success, result}`: the turn, or a `CancelledView`", body = TurnResult),
              (status = 202, description = "`{turnId}`, with `async`"),
              (status = 400, description = "`invalid_request`: also parameters that the model does not take"),
              (status = 404, description = "`not_found`: no such thread"),
              (status = 409, description = "`thread_busy_elsewhere`: also a call of the same key in another container"),
              (status = 429, description = "`queue_full`, `rate_limited`, `budget_exceeded`"),
              (status = 502, description = "`image_failed`, `agent_failed`"),
              (status = 503, description = "`images_unavailable`: not set up, not paid, or Replicate is down; `draining`"),
              (status = 504, description = "`image_failed`: it took too long; `turn_timeout`")))]
pub(super) async fn make(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    Json(body): Json<ImagesBody>,
) -> Result<Response, ApiError> {
    let is_async = body.is_async.unwrap_or(false);
    let mut wish = body.into_wish(&state, &path)?;
    wish.idempotency_key = idempotency_key(&headers)?;
    let call = NewCall {
        kind: CallKind::Images,
        key: wish.key.clone(),
        is_kept: wish.idempotency_key.is_some(),
    };
    let shared = state.clone();
    let work = async move |call: Running| run(&shared, wish, is_async, &call).await;
    state.calls.run(call, &headers, work).await
}

async fn run(
    state: &Shared,
    wish: ImageWish,
    is_async: bool,
    call: &Running,
) -> Result<Ended, ApiError> {
    let mut tell = |news| match news {
        ImageNews::Prediction {
            id,
            status,
            percent,
        } => call.tell(
            "progress",
            &json!({"predictionId": id, "status": status, "percent": percent}),
        ),
        ImageNews::Warning(warning) => call.tell_as(
            "budget.warning",
            &json!({
                "spentUsd": warning.spent_usd,
                "limitUsd": warning.limit.usd,
                "limit": warning.limit.to_string(),
            }),
        ),
    };
    let turn = match state.images.make(wish, call.stop(), &mut tell).await {
        Ok(ImageAnswer::Done(turn)) => succeeded(turn)?,
        Ok(ImageAnswer::Turn(record)) => {
            let id = record.file().id();
            call.became(id);
            if is_async {
                return Ok(Ended::Accepted(id.clone()));
            }
            outcome(state, &record).await?
        }
        Err(ImageError::Cancelled) => return Ok(Ended::Cancelled),
        Err(error) => return Err(error.into()),
    };
    Ok(Ended::Done(to_value(turn).expect("plain data serialises")))
}
