//! `POST /api/label`: one image in, its label out.

use std::str::FromStr;

use axum::{
    Json as Answer,
    body::Bytes,
    extract::{FromRequest, Multipart, Request, State},
    http::header::CONTENT_TYPE,
};
use base64::{
    Engine,
    engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ApiError, Pins, Shared,
    body::{self, check_tenants},
};
use crate::{
    domain::Account,
    label::{DEFAULT, Label, Labels, Prompt, Question},
    picture, service,
    usage::Tenants,
};

/// Base64 as callers write it: with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
);
/// Longest value of a form's field that is no image; prompts are the longest.
const MAX_FIELD: usize = crate::label::MAX_PROMPT + 1;
/// Fields of a form.
const MAX_FIELDS: usize = 32;

/// An image as JSON carries it.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ImageBody {
    /// The file in base64, at most 10 MiB of it; the beginning of a data URL is passed over.
    #[schema(required)]
    pub(super) data: Option<String>,
    /// What the caller takes it for; the file itself says what it is.
    #[serde(rename = "mediaType")]
    _media_type: Option<String>,
}

/// The same as a form (`multipart/form-data`), the file as the field `image`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct LabelBody {
    #[schema(required)]
    image: Option<ImageBody>,
    /// `default`, `sd_training`, or one of the operator's own.
    prompt_type: Option<String>,
    /// Instead: a prompt of the caller's own. One that lays down lines (`DESCRIPTION:`, `NSFW:`,
    /// `TAGS:`) is asked as it is; to any other the form of the answer is added.
    prompt: Option<String>,
    model: Option<String>,
    /// Who pays; by default whom the container is pinned to.
    client_id: Option<String>,
    user_id: Option<String>,
}

/// What is asked about images, and for whom.
#[derive(Debug, Default, Clone)]
pub(super) struct Asked {
    pub(super) prompt_type: Option<String>,
    pub(super) prompt: Option<String>,
    pub(super) model: Option<String>,
    pub(super) client_id: Option<String>,
    pub(super) user_id: Option<String>,
    // Of batches alone.
    pub(super) workers: Option<u64>,
    pub(super) max_cost_usd: Option<f64>,
    pub(super) cache: Option<bool>,
    pub(super) dry_run: Option<bool>,
}

/// A label.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LabelView {
    success: bool,
    #[serde(flatten)]
    label: Label,
}

/// A request that was read.
#[derive(Debug)]
pub(super) struct LabelRequest {
    image: Bytes,
    asked: Asked,
}

impl<S: Send + Sync> FromRequest<S> for LabelRequest {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match is_form(&request) {
            true => from_form(request, state).await,
            false => from_json(request, state).await,
        }
    }
}

pub(super) fn is_form(request: &Request) -> bool {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("multipart/form-data")
}

async fn from_json<S: Send + Sync>(request: Request, state: &S) -> Result<LabelRequest, ApiError> {
    let body::Json(body) = body::Json::<LabelBody>::from_request(request, state).await?;
    let image = body.image.unwrap_or_default();
    let data = image.data.ok_or_else(no_image)?;
    Ok(LabelRequest {
        image: decoded("image.data", &data)?,
        asked: Asked {
            prompt_type: body.prompt_type,
            prompt: body.prompt,
            model: body.model,
            client_id: body.client_id,
            user_id: body.user_id,
            ..Asked::default()
        },
    })
}

async fn from_form<S: Send + Sync>(request: Request, state: &S) -> Result<LabelRequest, ApiError> {
    let (images, asked) = read_form(request, state, 1).await?;
    let image = images.into_iter().next();
    let (_, image) = image.ok_or_else(no_image)?;
    Ok(LabelRequest { image, asked })
}

/// The files of a form by their names, and what is asked about them.
pub(super) async fn read_form<S: Send + Sync>(
    request: Request,
    state: &S,
    most: usize,
) -> Result<(Vec<(String, Bytes)>, Asked), ApiError> {
    let broken = || ApiError::invalid("the form is broken: it is no multipart/form-data");
    let mut form = Multipart::from_request(request, state)
        .await
        .map_err(|_| broken())?;
    let (mut images, mut asked) = (Vec::new(), Asked::default());
    for _ in 0..MAX_FIELDS + most {
        let Some(field) = form.next_field().await.map_err(|_| broken())? else {
            return Ok((images, asked));
        };
        let name = field.name().unwrap_or_default().to_owned();
        let file = field.file_name().unwrap_or_default().to_owned();
        let value = field.bytes().await.map_err(|_| broken())?;
        if name != "image" {
            asked.set(&name, &value)?;
            continue;
        }
        if images.len() == most {
            let why = match most {
                1 => "image: there is more than one; ask about each by itself".to_owned(),
                most => format!("image: there are more than {most}; make several batches of them"),
            };
            return Err(ApiError::invalid(why));
        }
        images.push((file, value));
    }
    Err(ApiError::invalid("the form has too many fields"))
}

fn no_image() -> ApiError {
    ApiError::invalid("image is missing: send a file as the form's field, or {data, mediaType}")
}

pub(super) fn decoded(field: &str, data: &str) -> Result<Bytes, ApiError> {
    let data = match data.split_once(";base64,") {
        Some((start, data)) if start.starts_with("data:") => data,
        _ => data,
    };
    let plain: Vec<u8> = data.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let bytes = BASE64.decode(plain);
    let bytes = bytes.map_err(|_| ApiError::invalid(format!("{field}: it is no base64")))?;
    Ok(bytes.into())
}

impl Asked {
    /// Takes in a field of a form; an unknown one is passed over, like one of JSON.
    fn set(&mut self, name: &str, value: &[u8]) -> Result<(), ApiError> {
        const KNOWN: [&str; 9] = [
            "promptType",
            "prompt",
            "model",
            "clientId",
            "userId",
            "workers",
            "maxCostUsd",
            "cache",
            "dryRun",
        ];
        if !KNOWN.contains(&name) {
            return Ok(());
        }
        if value.len() > MAX_FIELD {
            return Err(ApiError::invalid(format!("{name}: it is too long")));
        }
        let text = str::from_utf8(value);
        let text = text.map_err(|_| ApiError::invalid(format!("{name}: it is no UTF-8")))?;
        match name {
            "promptType" => self.prompt_type = Some(text.to_owned()),
            "prompt" => self.prompt = Some(text.to_owned()),
            "model" => self.model = Some(text.to_owned()),
            "clientId" => self.client_id = Some(text.to_owned()),
            "userId" => self.user_id = Some(text.to_owned()),
            "workers" => self.workers = Some(plain(name, text, "a whole number")?),
            "maxCostUsd" => self.max_cost_usd = Some(plain(name, text, "a number")?),
            "cache" => self.cache = Some(plain(name, text, "true or false")?),
            "dryRun" => self.dry_run = Some(plain(name, text, "true or false")?),
            _ => {}
        }
        Ok(())
    }

    /// What is asked, checked.
    pub(super) fn question(self, pins: &Pins, labels: &Labels) -> Result<Question, ApiError> {
        let tenants = Tenants {
            client: self.client_id.as_deref().map(str::parse).transpose()?,
            user: self.user_id.as_deref().map(str::parse).transpose()?,
        };
        let Tenants { client, user } = check_tenants(pins, tenants)?;
        if user.is_some() && client.is_none() {
            return Err(ApiError::invalid(
                "clientId is missing: a user is a client's",
            ));
        }
        let invalid =
            |field: &str, why: &dyn std::fmt::Display| ApiError::invalid(format!("{field}: {why}"));
        let prompt = match (self.prompt, self.prompt_type) {
            (Some(_), Some(_)) => {
                return Err(ApiError::invalid(
                    "prompt and promptType: name one, or send one of your own",
                ));
            }
            (Some(text), None) => Prompt::own(&text).map_err(|why| invalid("prompt", &why))?,
            (None, name) => labels
                .prompts()
                .named(name.as_deref().unwrap_or(DEFAULT))
                .map_err(|why| invalid("promptType", &why))?,
        };
        if let Some(model) = &self.model
            && !service::is_model_name(model)
        {
            return Err(ApiError::invalid("model: it is no name of a model"));
        }
        Ok(Question {
            prompt,
            model: self.model,
            account: Account {
                client,
                user,
                ..Account::of_kind(Account::LABEL)
            },
            timeout: None,
        })
    }
}

/// A value of a form that is no text.
fn plain<T: FromStr>(name: &str, text: &str, kind: &str) -> Result<T, ApiError> {
    let wrong = |_| ApiError::invalid(format!("{name}: it has to be {kind}"));
    text.trim().parse().map_err(wrong)
}

/// Says what an image shows (`description`, `tags`) and for whom it is fit (`nsfw_rating`). PNG,
/// JPEG, WebP, GIF and BMP of at most 10 MiB; as JSON, or as a form with the file as the field
/// `image`. The image is turned upright and scaled down before it goes to the model; one that
/// cannot be decoded, is animated or has too many pixels is refused before anything is paid. An
/// error has `status: "error"` and `message` besides.
#[utoipa::path(post, path = "/api/label",
    request_body(content((LabelBody = "application/json"), (LabelBody = "multipart/form-data"))),
    responses((status = 200, body = LabelView),
              (status = 400, description = "`invalid_request`, `invalid_id`"),
              (status = 401, description = "`unauthenticated`"),
              (status = 403, description = "`not_this_tenant`, `forbidden_origin`"),
              (status = 413, description = "`payload_too_large`: more than 10 MiB"),
              (status = 415, description = "`unsupported_media_type`"),
              (status = 422, description = "`invalid_image`"),
              (status = 429, description = "`rate_limited`, `queue_full`, `budget_exceeded`"),
              (status = 502, description = "`agent_failed`; with `raw_response` where the model answered something else"),
              (status = 503, description = "`circuit_open`, `draining`"),
              (status = 504, description = "`turn_timeout`")))]
pub(super) async fn one(
    State(state): State<Shared>,
    request: LabelRequest,
) -> Result<Answer<LabelView>, ApiError> {
    let question = request.asked.question(&state.pins, &state.labels)?;
    let label = state.labels.label(request.image, &question).await?;
    Ok(Answer(LabelView {
        success: true,
        label,
    }))
}

/// Largest body: an image of 10 MiB in base64, with the line ends that some write (`\r\n` in JSON after
/// 76 characters are a twentieth), and what is around it.
pub(super) const MAX_BODY: usize = picture::MAX_BYTES / 3 * 4 / 100 * 106 + (256 << 10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_callers_write_it() {
        for data in [
            "aGVsbG8=",
            "aGVsbG8",
            "data:image/png;base64,aGVsbG8=",
            "aGVs\r\nbG8=\n",
        ] {
            assert_eq!(decoded("data", data).unwrap(), "hello", "{data}");
        }
        for data in ["*", "aGVsbG8=aGVs", "aGVsb"] {
            assert!(decoded("data", data).is_err(), "{data}");
        }
    }
}
