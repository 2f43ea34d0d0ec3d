//! `POST …/threads/{thread}/images`: images made for a site.

use axum::{
    Json as Answer,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::{Json, success},
    error::request_id,
    threads::{ThreadPath, check_author, idempotency_key, not_empty, path_key},
};
use crate::{
    domain::{Author, TurnResult, TurnStatus},
    images::{ImageAnswer, ImageWish, MAX_ALT, MAX_COUNT, MAX_TEXT},
    supervisor::SupervisorError,
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
            alt: not_empty("alt", self.alt, MAX_ALT)?,
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
/// model's schema before anything is paid. A caller who goes away before the images are made cancels
/// them; with `Idempotency-Key` a call that is made again goes on with what was paid.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/images",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = ImagesBody,
    responses((status = 200, description = "`{success, result}`: the turn", body = TurnResult),
              (status = 202, description = "`{turnId}`, with `async`"),
              (status = 400, description = "`invalid_request`: also parameters that the model does not take"),
              (status = 404, description = "`not_found`: no such thread"),
              (status = 429, description = "`queue_full`, `rate_limited`"),
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
    let outcome = match state.images.make(wish).await? {
        ImageAnswer::Done(turn) => *turn,
        ImageAnswer::Turn(record) if is_async => {
            let told = json!({"success": true, "turnId": record.file().id()});
            return Ok((StatusCode::ACCEPTED, Answer(told)).into_response());
        }
        ImageAnswer::Turn(record) => match record.outcome().await {
            Ok(outcome) => outcome,
            // Still in line when the program stopped: it runs after the next start.
            Err(_) if state.supervisor.is_draining() => {
                return Err(SupervisorError::Draining.into());
            }
            Err(error) => return Err(SupervisorError::from(error).into()),
        },
    };
    match outcome.status {
        TurnStatus::Failed => Err(ApiError::turn(outcome)),
        _ => Ok(success(outcome)),
    }
}
