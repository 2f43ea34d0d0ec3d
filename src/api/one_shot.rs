//! `POST /execute`: one prompt of another service, one answer of the CLI.

use std::time::{Duration, Instant};

use axum::{Json as Answer, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ApiError, Base,
    body::{Json, check_pins},
    error::request_id,
};
use crate::{
    domain::Account,
    service::{self, Args, RunSite, Shot},
    supervisor::{Cwd, OneShot},
};

const DEFAULT_TIMEOUT_MS: u64 = 60_000;
const MAX_TIMEOUT_MS: u64 = 600_000;
/// Longer than any path.
const MAX_CWD: usize = 4096;

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct OneShotBody {
    #[schema(required)]
    prompt: Option<String>,
    /// Arguments of the CLI: `-p`, `--print`, `--output-format text|json|stream-json`, `--model`,
    /// `--max-turns`, `--append-system-prompt`, `--permission-mode`, `--tools`,
    /// `--dangerously-skip-permissions` (mapped to the service's own confinement).
    args: Option<Vec<String>>,
    /// A folder inside the workspace, absolute or relative to it; a throw-away one without.
    cwd: Option<String>,
    /// Milliseconds, from 1 to 600,000 (by default 60,000), from the run's start.
    timeout: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct OneShotResponse {
    success: bool,
    result: OneShotResult,
    /// Milliseconds, with the time in line.
    execution_time: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct OneShotResult {
    /// The CLI's standard output.
    output: String,
    /// Of the run, in milliseconds.
    duration: u64,
}

/// Runs the CLI once.
#[utoipa::path(post, path = "/execute", request_body = OneShotBody,
    responses((status = 200, body = OneShotResponse),
              (status = 400, description = "`invalid_request`"),
              (status = 401, description = "`unauthenticated`"),
              (status = 403, description = "`not_this_tenant`, `forbidden_origin`"),
              (status = 409, description = "`thread_busy_elsewhere`"),
              (status = 429, description = "`rate_limited`, `queue_full`, `budget_exceeded`"),
              (status = 502, description = "`agent_failed`, with `exitCode`, `stderr` and `output`"),
              (status = 503, description = "`circuit_open`, `draining`"),
              (status = 504, description = "`turn_timeout`, with `exitCode`, `stderr` and `output`")))]
pub(super) async fn execute(
    State(base): State<Base>,
    Json(body): Json<OneShotBody>,
) -> Result<Answer<OneShotResponse>, ApiError> {
    let began = Instant::now();
    let service = &base.service;
    let prompt = body.prompt.unwrap_or_default();
    if prompt.trim().is_empty() {
        return Err(ApiError::invalid("prompt is missing or empty"));
    }
    let timeout = body.timeout.unwrap_or(DEFAULT_TIMEOUT_MS);
    if !(1..=MAX_TIMEOUT_MS).contains(&timeout) {
        return Err(ApiError::invalid(format!(
            "timeout has to be from 1 to {MAX_TIMEOUT_MS} milliseconds"
        )));
    }
    let args = Args::parse(&body.args.unwrap_or_default(), service.tools())
        .map_err(|error| ApiError::invalid(error.to_string()))?;
    let mut shot = Shot {
        prompt,
        args,
        timeout: Duration::from_millis(timeout),
        account: Account::of_kind(Account::SERVICE),
        gate: None,
    };
    let place = match body.cwd.filter(|cwd| !cwd.is_empty()) {
        None => None,
        Some(cwd) => Some(locate(&base, &cwd).await?),
    };
    let answer = match (place, &base.supervisor) {
        (Some(Cwd::Thread { key, folder }), Some(supervisor)) => {
            let one_shot = OneShot {
                ticket: service.admit().await?,
                shot,
                folder,
                request_id: request_id(),
            };
            supervisor.run_one_shot(&key, one_shot).await??
        }
        (Some(Cwd::Folder { user, folder }), _) => {
            if let Some(user) = user {
                shot.account.client = Some(user.client);
                shot.account.user = Some(user.user);
            }
            let site = RunSite {
                cwd: Some(folder.clone()),
                write: vec![folder],
                ..RunSite::default()
            };
            service.execute(shot, site).await?
        }
        _ => service.execute(shot, RunSite::default()).await?,
    };
    let milliseconds = |took: Duration| took.as_millis() as u64;
    let service::Answer {
        output, duration, ..
    } = answer;
    Ok(Answer(OneShotResponse {
        success: true,
        result: OneShotResult {
            output,
            duration: milliseconds(duration),
        },
        execution_time: milliseconds(began.elapsed()),
    }))
}

async fn locate(base: &Base, cwd: &str) -> Result<Cwd, ApiError> {
    let Some(supervisor) = &base.supervisor else {
        return Err(ApiError::invalid(
            "cwd: this service has no workspace; leave it out",
        ));
    };
    if cwd.len() > MAX_CWD || cwd.chars().any(char::is_control) {
        return Err(ApiError::invalid("cwd is no path of a folder"));
    }
    let place = supervisor.cwd(cwd).await?;
    match &place {
        Cwd::Thread { key, .. } => check_pins(&base.pins, &key.user_key())?,
        Cwd::Folder {
            user: Some(user), ..
        } => check_pins(&base.pins, user)?,
        Cwd::Folder { user: None, .. } => {}
    }
    Ok(place)
}
