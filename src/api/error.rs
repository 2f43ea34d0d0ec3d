//! Where errors meet the outside: the one file that picks a status, a code and a sentence, by what
//! the reader will do: mend the request, ask again later, call someone.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::publish::PublishView;
use crate::{
    alt_text::AltTextError,
    domain::{Between, Conflict, ErrorCode, TurnResult},
    identity::{InvalidId, TurnId},
    images::ImageError,
    label::{BatchesError, Failure, LabelError, Status},
    lease::LeaseError,
    picture::PictureError,
    replicate::ReplicateError,
    repository::{RemoteError, RemoteErrorKind, RemoteUse, RepositoryError, SourceError},
    service::{Remains, ServiceError},
    supervisor::{PublishAnswer, SupervisorError},
    task::BlockingError,
    turn::JournalError,
    usage::ReadError,
};

/// After so many seconds it is worth asking again of a disk that did not answer: a restart of what
/// stands between a container and EFS takes that long.
const STALL_SECONDS: u64 = 10;

tokio::task_local! {
    /// The request being answered.
    pub(super) static REQUEST: Asking;
}

/// What an error says of the request that it answers.
#[derive(Debug, Clone, Default)]
pub(super) struct Asking {
    /// In its error, and on its log lines.
    pub(super) id: String,
    /// Is it about labels? Their callers read an error's `status` and `message`.
    pub(super) is_label: bool,
}

impl Asking {
    /// The request being answered by this task; elsewhere it has no id.
    pub(super) fn now() -> Self {
        REQUEST.try_with(Self::clone).unwrap_or_default()
    }
}

/// The id of the request being answered.
pub(super) fn request_id() -> Option<String> {
    REQUEST.try_with(|asking| asking.id.clone()).ok()
}

/// An error's body.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ErrorBody {
    success: bool,
    /// One sentence that a person understands.
    error: String,
    /// For programs.
    code: &'static str,
    request_id: String,
    #[serde(flatten)]
    details: Details,
}

/// What some errors say besides.
#[derive(Debug, Default, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Details {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    turn_id: Option<TurnId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<TurnResult>>,
    /// With `undo_conflict`, `merge_conflict` and `held_back`: the files that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<Vec<Conflict>>,
    /// With `merge_conflict`: the branches that were to be merged.
    #[serde(flatten)]
    between: Option<Between>,
    /// With `fetch_failed`, `push_failed` and `pull_request_failed`: `auth`, `rejected` or
    /// `network`; the last may succeed later.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// With `pull_request_failed`: what was published before, as the `result` of a publication.
    #[serde(skip_serializing_if = "Option::is_none")]
    published: Option<PublishView>,
    /// With `stale_head`: the commit that the thread is at now.
    #[serde(skip_serializing_if = "Option::is_none")]
    head: Option<String>,
    /// Of a one-shot run that failed: the CLI's status, as a shell counts (128 and the signal's
    /// number where one ended it).
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    /// The end of its standard error, and of its standard output; secrets are masked.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<String>,
    /// Of `/api/label`: always `error`, and the sentence again, as its callers read them.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    /// What the model answered, where no label could be read out of it.
    #[serde(rename = "raw_response", skip_serializing_if = "Option::is_none")]
    raw_response: Option<String>,
}

/// An answer that is no success.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    retry_after: Option<u64>,
    details: Box<Details>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after: None,
            details: Box::default(),
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(super) fn too_large(limit: &str) -> Self {
        let message = format!("the request's body is larger than {limit}");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", message)
    }

    /// For who is not told otherwise.
    fn cancelled(message: String) -> Self {
        Self::new(StatusCode::CONFLICT, "cancelled", message)
    }

    pub(super) fn not_this_tenant() -> Self {
        let message = "this container serves another client or user";
        Self::new(StatusCode::FORBIDDEN, "not_this_tenant", message)
    }

    pub(super) fn rate_limited(wait: Duration) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limited",
            "that is too many calls; ask again in a moment",
        )
        .retry(whole_seconds(wait))
    }

    /// A turn that did not succeed.
    pub(super) fn turn(result: TurnResult) -> Self {
        let code = result.code.unwrap_or(ErrorCode::Internal);
        let status = match code {
            ErrorCode::AgentFailed => StatusCode::BAD_GATEWAY,
            ErrorCode::TurnTimeout => StatusCode::GATEWAY_TIMEOUT,
            ErrorCode::BudgetExceeded => StatusCode::TOO_MANY_REQUESTS,
            ErrorCode::ThreadBusyElsewhere => StatusCode::CONFLICT,
            ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let message = result
            .error
            .clone()
            .unwrap_or_else(|| "the turn failed".into());
        let retry_after = result.retry_at.map(seconds_until);
        Self {
            retry_after,
            ..Self::new(status, code.as_str(), message).with(Details {
                turn_id: Some(result.turn_id.clone()),
                result: Some(Box::new(result)),
                ..Details::default()
            })
        }
    }

    fn with(self, details: Details) -> Self {
        Self {
            details: Box::new(details),
            ..self
        }
    }

    fn retry(self, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..self
        }
    }

    fn internal(error: &dyn std::error::Error) -> Self {
        let mut chain = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            chain.push_str(&format!(": {error}"));
            source = error.source();
        }
        if is_of_a_full_disk(&chain) {
            tracing::error!(error = chain, "the disk is full");
            return Self::no_space();
        }
        tracing::error!(error = chain, "a request failed inside greenroom");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "something failed inside greenroom; the log has the reason under this request's id",
        )
    }
}

impl From<InvalidId> for ApiError {
    fn from(error: InvalidId) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_id", error.to_string())
    }
}

impl From<SupervisorError> for ApiError {
    fn from(error: SupervisorError) -> Self {
        use SupervisorError as E;
        match error {
            E::Draining => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "draining",
                "greenroom is shutting down; ask again in a moment",
            )
            .retry(5),
            E::NotFound(what) => Self::not_found(what),
            E::RepoMismatch { .. } => {
                Self::new(StatusCode::CONFLICT, "repo_mismatch", error.to_string())
            }
            E::QueueFull { .. } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "queue_full",
                error.to_string(),
            )
            .retry(10),
            E::BusyElsewhere => Self::new(
                StatusCode::CONFLICT,
                "thread_busy_elsewhere",
                error.to_string(),
            ),
            E::StaleHead { ref head } => {
                Self::new(StatusCode::CONFLICT, "stale_head", error.to_string()).with(Details {
                    head: Some(head.clone()),
                    ..Details::default()
                })
            }
            E::UndoConflict { ref files } => {
                Self::new(StatusCode::CONFLICT, "undo_conflict", error.to_string()).with(Details {
                    files: Some(files.clone()),
                    ..Details::default()
                })
            }
            E::MergeConflict {
                ref between,
                ref files,
            } => {
                Self::new(StatusCode::CONFLICT, "merge_conflict", error.to_string()).with(Details {
                    between: between.clone(),
                    files: Some(files.clone()),
                    ..Details::default()
                })
            }
            E::HeldBack { ref files } => {
                let files = files.iter().cloned().map(Conflict::from).collect();
                Self::new(StatusCode::CONFLICT, "held_back", error.to_string()).with(Details {
                    files: Some(files),
                    ..Details::default()
                })
            }
            E::Refused(why) => Self::invalid(why),
            E::EditRefused(why) => Self::invalid(why),
            E::NoPullRequests(why) => Self::invalid(why.to_string()),
            E::PullRequest {
                error: ref failed,
                ref published,
            } => {
                let mut refused = Self::remote(failed);
                refused.message = error.to_string();
                refused.details.published = Some(PublishAnswer::clone(published).into());
                refused
            }
            E::Lease(error) => match &*error {
                LeaseError::Blocking(error) => Self::blocking(error),
                error => Self::internal(error),
            },
            E::Source(missing @ SourceError::LocalMissing) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "clone_failed",
                missing.to_string(),
            ),
            E::Source(source) => Self::invalid(source.to_string()),
            E::Install(error) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "install_failed",
                error.to_string(),
            ),
            E::Repository(error) => Self::repository(&error),
            E::Workspace(error) => Self::internal(&*error),
            E::Journal(error) => match &*error {
                JournalError::Blocking(error) => Self::blocking(error),
                error => Self::internal(error),
            },
            E::Blocking(error) => Self::blocking(&error),
            E::Internal(_) => Self::internal(&error),
        }
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        use ServiceError as E;
        let said = error.to_string();
        match error {
            E::Draining | E::Cancelled => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", said).retry(5)
            }
            E::QueueFull => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", said).retry(10),
            E::CircuitOpen { retry_after } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "circuit_open", said)
                    .retry(whole_seconds(retry_after))
            }
            E::OverBudget { breach } => Self {
                retry_after: breach.resets.map(seconds_until),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "budget_exceeded", said)
            },
            E::NotInstalled | E::Start(_) | E::TooMuchOutput | E::Exceeded { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "agent_failed", said)
            }
            E::CredentialRefused(remains) | E::Failed { remains, .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "agent_failed", said).with(of_a_run(remains))
            }
            E::TimedOut { remains, .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "turn_timeout", said).with(of_a_run(remains))
            }
            E::Folder(_) => Self::internal(&error),
        }
    }
}

impl From<AltTextError> for ApiError {
    fn from(error: AltTextError) -> Self {
        match error {
            AltTextError::Supervisor(error) => error.into(),
            AltTextError::Service(error) => error.into(),
            AltTextError::Describe(error) => Self::internal(&error),
            AltTextError::TooLittle { .. } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "budget_exceeded",
                error.to_string(),
            ),
            AltTextError::Cancelled => Self::cancelled(error.to_string()),
            AltTextError::Stopped(_) => {
                Self::new(StatusCode::BAD_GATEWAY, "agent_failed", error.to_string())
            }
        }
    }
}

impl From<BatchesError> for ApiError {
    fn from(error: BatchesError) -> Self {
        let said = error.to_string();
        match error {
            BatchesError::NotFound => Self::not_found(said),
            BatchesError::Full => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", said).retry(60)
            }
            BatchesError::Draining => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", said).retry(5)
            }
            BatchesError::Workspace(_) | BatchesError::Journal(_) | BatchesError::Blocking(_) => {
                Self::internal(&error)
            }
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let said = failure.to_string();
        match failure.error {
            LabelError::Picture(PictureError::TooLarge { .. }) => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", said)
            }
            LabelError::Picture(PictureError::Blocking(error)) => Self::internal(&error),
            LabelError::Picture(_) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_image", said)
            }
            LabelError::Service(error) => error.into(),
            LabelError::Unreadable { raw, .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "agent_failed", said).with(Details {
                    raw_response: Some(raw),
                    ..Details::default()
                })
            }
        }
    }
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        use ReplicateError as R;
        let said = error.to_string();
        let failed = |status| Self::new(status, "image_failed", said.clone());
        let off = || {
            Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "images_unavailable",
                said.clone(),
            )
        };
        match error {
            ImageError::Off => off(),
            ImageError::NoModel | ImageError::NoLora { .. } | ImageError::Folder => {
                Self::invalid(said)
            }
            ImageError::NoImage | ImageError::Picture(_) => failed(StatusCode::BAD_GATEWAY),
            ImageError::Supervisor(error) => error.into(),
            ImageError::OverBudget(breach) => Self {
                retry_after: breach.resets.map(seconds_until),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "budget_exceeded", said)
            },
            ImageError::Note(_) | ImageError::Notes(_) | ImageError::Budgets(_) => {
                Self::internal(&error)
            }
            ImageError::Cancelled => Self::cancelled(said),
            ImageError::Replicate(error) => match error {
                R::BadName { .. } | R::Input(_) | R::NotFound { .. } | R::Refused { .. } => {
                    Self::invalid(said)
                }
                R::NoToken
                | R::Unauthenticated
                | R::Unpaid { .. }
                | R::Unreachable { .. }
                | R::Faulty { .. }
                | R::Https { .. } => {
                    tracing::warn!(error = said, "images cannot be made");
                    off()
                }
                R::Throttled { .. } => off().retry(30),
                R::TimedOut { .. } => failed(StatusCode::GATEWAY_TIMEOUT),
                // The operator's files: their places are no business of a caller.
                R::Configs { .. } | R::File { .. } | R::BadFile { .. } => Self::internal(&error),
                R::Unclear
                | R::Answer { .. }
                | R::Failed { .. }
                | R::Cancelled { .. }
                | R::NotCancelled { .. }
                | R::Download { .. } => failed(StatusCode::BAD_GATEWAY),
            },
        }
    }
}

/// By its words: libgit2 has no other way to say it.
fn is_of_a_full_disk(chain: &str) -> bool {
    [
        "No space left on device",
        "Disk quota exceeded",
        // As Rust says it where there is no more than the kind.
        "no storage space",
    ]
    .iter()
    .any(|words| chain.contains(words))
}

fn of_a_run(remains: Remains) -> Details {
    Details {
        exit_code: remains.exit_code,
        stderr: Some(remains.stderr),
        output: Some(remains.output),
        ..Details::default()
    }
}

/// Rounded up, so that who comes back then is not early.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

fn seconds_until(at: jiff::Timestamp) -> u64 {
    let wait = at.duration_since(jiff::Timestamp::now()).as_secs();
    u64::try_from(wait).unwrap_or(0)
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        Self::internal(&error)
    }
}

impl ApiError {
    fn repository(error: &RepositoryError) -> Self {
        use RepositoryError as E;
        if let Some(cause) = std::error::Error::source(error) {
            // The sentence is for the caller; what git or the disk said is for the operator.
            tracing::warn!(%error, %cause, "an operation on a repository failed");
        }
        match error {
            E::Remote(error) if error.during != RemoteUse::Clone => Self::remote(error),
            E::NoOrigin | E::Unfinished | E::Unfit { .. } => Self::invalid(error.to_string()),
            E::Remote(_)
            | E::Local { .. }
            | E::Empty
            | E::NoSuchBranch { .. }
            | E::NoDefaultBranch => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "clone_failed",
                error.to_string(),
            ),
            E::HeadMoved { .. } | E::Locked => Self::new(
                StatusCode::CONFLICT,
                "thread_busy_elsewhere",
                error.to_string(),
            ),
            E::NoSuchCommit { .. } => Self::not_found(error.to_string()),
            E::AmbiguousCommit { .. } => Self::invalid(error.to_string()),
            E::Tampered { .. } => {
                tracing::error!(%error, "a repository is refused");
                let message = format!("{error}; the operator has to look at it");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
            }
            E::Lost(_) | E::Conflict { .. } | E::Missing | E::Git { .. } | E::Disk { .. } => {
                Self::internal(error)
            }
        }
    }

    /// What a hosting service did not do for us.
    fn remote(error: &RemoteError) -> Self {
        let code = match error.during {
            RemoteUse::Clone => "clone_failed",
            RemoteUse::Fetch => "fetch_failed",
            RemoteUse::Push => "push_failed",
            RemoteUse::PullRequest => "pull_request_failed",
        };
        let (status, reason, retry_after) = match error.kind {
            RemoteErrorKind::Auth => (StatusCode::UNPROCESSABLE_ENTITY, "auth", None),
            RemoteErrorKind::Rejected => (StatusCode::UNPROCESSABLE_ENTITY, "rejected", None),
            RemoteErrorKind::Network => (StatusCode::BAD_GATEWAY, "network", Some(10)),
        };
        let details = Details {
            reason: Some(reason),
            ..Details::default()
        };
        Self {
            retry_after,
            ..Self::new(status, code, error.to_string()).with(details)
        }
    }

    /// Work on the disk that did not come back. It may have been done by the time of the next try, which
    /// finds that: everything asked of a thread can be asked again.
    fn blocking(error: &BlockingError) -> Self {
        match error {
            BlockingError::Panicked { .. } => Self::internal(error),
            BlockingError::TimedOut { .. } => {
                tracing::error!(%error, "the disk does not answer");
                Self::new(
                    // What the contract has with this code.
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    "the workspace's disk does not answer at the moment; ask again once it does",
                )
                .retry(STALL_SECONDS)
            }
        }
    }

    fn no_space() -> Self {
        Self::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "insufficient_storage",
            "the disk is full; what was edited stays where it is and is committed once whoever runs \
             greenroom has made room",
        )
    }
}

impl ApiError {
    fn into_body(mut self) -> ErrorBody {
        let asking = Asking::now();
        if asking.is_label {
            self.details.status = Some(Status::Error);
            self.details.message = Some(self.message.clone());
        }
        ErrorBody {
            success: false,
            error: self.message,
            code: self.code,
            request_id: asking.id,
            details: *self.details,
        }
    }

    /// As the last event of a stream that began well.
    pub(super) fn into_json(self) -> serde_json::Value {
        serde_json::to_value(self.into_body()).expect("plain data serialises")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, retry_after) = (self.status, self.retry_after);
        let mut response = (status, Json(self.into_body())).into_response();
        if let Some(seconds) = retry_after {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
