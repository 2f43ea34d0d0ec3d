//! `/api/label/batches`: many images, as a job with a journal.

use std::collections::HashSet;

use axum::{
    Json as Answer,
    body::Bytes,
    extract::{FromRequest, Request, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::json;
use utoipa::ToSchema;

use super::{
    ApiError, Pins, Shared,
    body::{self, JsonOrNothing, success},
    label::{Asked, decoded, is_form, read_form},
    params::Path,
    sse,
    turns::last_event_id,
};
use crate::{
    domain::Account,
    label::{BatchView, BatchesError, Job, MAX_UPLOADED},
};

/// Largest body: so many images as are in it.
pub(super) const MAX_BODY: usize = 64 << 20;
/// Of a batch that says nothing.
const WORKERS: usize = 3;
const MAX_WORKERS: u64 = 64;
/// Longest name of an image, in characters.
const MAX_NAME: usize = 200;

/// One image of a batch.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NamedImage {
    /// What it is called in the answer.
    name: Option<String>,
    /// The file in base64, at most 10 MiB of it; the beginning of a data URL is passed over.
    #[schema(required)]
    data: Option<String>,
    /// What the caller takes it for; the file itself says what it is.
    #[serde(rename = "mediaType")]
    _media_type: Option<String>,
}

/// The same as a form (`multipart/form-data`), each file as a field `image`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct BatchBody {
    #[schema(required)]
    images: Option<Vec<NamedImage>>,
    /// `default`, `sd_training`, or one of the operator's own.
    prompt_type: Option<String>,
    /// Instead: a prompt of the caller's own.
    prompt: Option<String>,
    model: Option<String>,
    /// Who pays; by default whom the container is pinned to.
    client_id: Option<String>,
    user_id: Option<String>,
    /// Images at once (3), at most one fewer than `LABEL_MAX_CONCURRENT`.
    workers: Option<u64>,
    /// It stops before more than this could be spent, in US dollars.
    max_cost_usd: Option<f64>,
    /// The same bytes are asked about once (true).
    cache: Option<bool>,
    /// Say what it may cost at most, and do nothing.
    dry_run: Option<bool>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ResumeBody {
    /// Ask again also about what failed and was, or may have been, paid.
    retry_failed: Option<bool>,
}

/// A request that was read.
#[derive(Debug)]
pub(super) struct BatchRequest {
    images: Vec<(String, Bytes)>,
    asked: Asked,
}

impl<S: Send + Sync> FromRequest<S> for BatchRequest {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let (images, asked) = if is_form(&request) {
            read_form(request, state, MAX_UPLOADED).await?
        } else {
            let body::Json(body) = body::Json::<BatchBody>::from_request(request, state).await?;
            let mut images = Vec::new();
            for (at, named) in body.images.unwrap_or_default().into_iter().enumerate() {
                let field = format!("images[{at}].data");
                let missing = || ApiError::invalid(format!("{field} is missing"));
                let data = named.data.ok_or_else(missing)?;
                images.push((named.name.unwrap_or_default(), decoded(&field, &data)?));
            }
            let asked = Asked {
                prompt_type: body.prompt_type,
                prompt: body.prompt,
                model: body.model,
                client_id: body.client_id,
                user_id: body.user_id,
                workers: body.workers,
                max_cost_usd: body.max_cost_usd,
                cache: body.cache,
                dry_run: body.dry_run,
            };
            (images, asked)
        };
        if images.is_empty() {
            return Err(ApiError::invalid(
                "images is missing: send files as the form's fields image, or [{name, data}]",
            ));
        }
        if images.len() > MAX_UPLOADED {
            return Err(ApiError::invalid(format!(
                "images: there are more than {MAX_UPLOADED}; make several batches of them"
            )));
        }
        Ok(Self {
            images: named_apart(images),
            asked,
        })
    }
}

/// Gives each image a name of its own.
fn named_apart(images: Vec<(String, Bytes)>) -> Vec<(String, Bytes)> {
    let mut seen = HashSet::new();
    let images = images.into_iter().enumerate().map(|(at, (name, bytes))| {
        let plain: String = name
            .chars()
            .filter(|c| !c.is_control())
            .take(MAX_NAME)
            .collect();
        let first = match plain.trim() {
            "" => format!("image {}", at + 1),
            name => name.to_owned(),
        };
        let mut name = first.clone();
        let mut count = 1;
        while !seen.insert(name.clone()) {
            count += 1;
            name = format!("{first} ({count})");
        }
        (name, bytes)
    });
    images.collect()
}

/// Takes a batch of images (up to 1000, 64 MiB in all), to be labelled a few at a time beside other
/// work. It is on the disk when this answers, and goes on after a restart; no image is paid twice.
/// Single images that are no good fail by themselves.
#[utoipa::path(post, path = "/api/label/batches",
    request_body(content((BatchBody = "application/json"), (BatchBody = "multipart/form-data"))),
    responses((status = 202, description = "`{success, result: {batchId, total, worstCaseUsd}}`"),
              (status = 200, description = "with `dryRun`: `{success, result: {dryRun, total, worstCaseUsd}}`"),
              (status = 400, description = "`invalid_request`, `invalid_id`"),
              (status = 403, description = "`not_this_tenant`"),
              (status = 413, description = "`payload_too_large`: more than 64 MiB"),
              (status = 429, description = "`queue_full`, `rate_limited`"),
              (status = 503, description = "`draining`")))]
pub(super) async fn submit(
    State(state): State<Shared>,
    request: BatchRequest,
) -> Result<Response, ApiError> {
    let BatchRequest { images, asked } = request;
    let workers = asked.workers.unwrap_or(WORKERS as u64);
    if !(1..=MAX_WORKERS).contains(&workers) {
        return Err(ApiError::invalid(format!(
            "workers has to be from 1 to {MAX_WORKERS}"
        )));
    }
    let most_usd = asked.max_cost_usd;
    if most_usd.is_some_and(|most| !(most.is_finite() && most > 0.0)) {
        return Err(ApiError::invalid(
            "maxCostUsd has to be a number of dollars above 0",
        ));
    }
    let (uses_cache, is_dry) = (asked.cache.unwrap_or(true), asked.dry_run.unwrap_or(false));
    let question = asked.question(&state.pins, &state.labels)?;
    let total = images.len();
    let worst = state.labels.worst(&question) * total as f64;
    if is_dry {
        return Ok(success(
            json!({"dryRun": true, "total": total, "worstCaseUsd": worst}),
        ));
    }
    let job = Job {
        prompt: question.prompt,
        model: question.model,
        account: question.account,
        workers: usize::try_from(workers).unwrap_or(WORKERS),
        uses_cache,
        most_usd,
    };
    let id = state.batches.submit(job, images).await?;
    let result = json!({"batchId": id, "total": total, "worstCaseUsd": worst});
    let body = Answer(json!({"success": true, "batchId": id, "result": result}));
    Ok((StatusCode::ACCEPTED, body).into_response())
}

/// Is a batch one of those that this container is pinned to?
pub fn is_ours(pins: &Pins, account: &Account) -> bool {
    (pins.client.is_none() || pins.client == account.client)
        && (pins.user.is_none() || pins.user == account.user)
}

async fn check(state: &Shared, id: &str) -> Result<(), ApiError> {
    let account = state.batches.account(id).await?;
    match is_ours(&state.pins, &account) {
        true => Ok(()),
        false => Err(ApiError::not_this_tenant()),
    }
}

/// How a batch stands, with what came of its images so far.
#[utoipa::path(get, path = "/api/label/batches/{batch}", params(("batch" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = BatchView),
              (status = 404, description = "`not_found`")))]
pub(super) async fn one(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    check(&state, &id).await?;
    Ok(success(state.batches.view(&id).await?))
}

/// A batch's events, whole, from `Last-Event-ID` on, as long as it is under way: `batch.started`,
/// `image.sent`, `image.labelled` and `image.failed` (with `result`, and `progress`: done of total,
/// images a minute, cost so far, time left), then `batch.completed` or `batch.stopped`.
#[utoipa::path(get, path = "/api/label/batches/{batch}/events", params(("batch" = String, Path)),
    responses((status = 200, description = "server-sent events", content_type = "text/event-stream"),
              (status = 404, description = "`not_found`")))]
pub(super) async fn events(
    State(state): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    check(&state, &id).await?;
    let events = state.batches.events(&id, last_event_id(&headers)).await?;
    Ok(sse::follow((id, events), |(id, events)| {
        Box::pin(async move {
            let lines = events.next().await?;
            let told = lines.iter().map(|line| {
                let id = ("batchId", id.clone());
                sse::told(line.id, line.event.name(), &line.event, id)
            });
            Ok::<_, BatchesError>(told.collect())
        })
    }))
}

/// Stops a batch for good; what is under way ends first. Idempotent.
#[utoipa::path(post, path = "/api/label/batches/{batch}/cancel", params(("batch" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = BatchView),
              (status = 404, description = "`not_found`")))]
pub(super) async fn cancel(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    check(&state, &id).await?;
    state.batches.cancel(&id).await?;
    Ok(success(state.batches.view(&id).await?))
}

/// Takes a batch up again that stopped, was cancelled, or has images to be asked about again.
#[utoipa::path(post, path = "/api/label/batches/{batch}/resume", params(("batch" = String, Path)),
    request_body = ResumeBody,
    responses((status = 200, description = "`{success, result}`", body = BatchView),
              (status = 404, description = "`not_found`"),
              (status = 503, description = "`draining`")))]
pub(super) async fn resume(
    State(state): State<Shared>,
    Path(id): Path<String>,
    JsonOrNothing(body): JsonOrNothing<ResumeBody>,
) -> Result<Response, ApiError> {
    check(&state, &id).await?;
    let asks_again = body.retry_failed.unwrap_or(false);
    state.batches.resume(&id, asks_again).await?;
    Ok(success(state.batches.view(&id).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_has_a_name_of_its_own() {
        let names = ["a.png", "", "a.png", "a.png (2)", " \n", "image 2"];
        let images = names.map(|name| (name.to_owned(), Bytes::new())).to_vec();
        let named: Vec<String> = named_apart(images)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(named[..3], ["a.png", "image 2", "a.png (2)"]);
        let apart: HashSet<&String> = named.iter().collect();
        assert_eq!(apart.len(), names.len(), "{named:?}");
    }
}
