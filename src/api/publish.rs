//! Publishing a thread's work, and bringing others' work down to it.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::JsonOrNothing,
    operations::{Wishes, operate},
    threads::{ThreadPath, not_empty},
};
use crate::{
    domain::{Author, HeldBack, MergeStep, TurnKind, TurnResult},
    repository::{Destination, PullRequest, PushedBranch},
    supervisor::{Operation, PublishAnswer, PublishWish, PullRequestWish},
};

/// How far up the work goes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum To {
    User,
    Client,
    Origin,
}

impl From<To> for Destination {
    fn from(to: To) -> Self {
        match to {
            To::User => Self::User,
            To::Client => Self::Client,
            To::Origin => Self::Origin,
        }
    }
}

impl From<Destination> for To {
    fn from(to: Destination) -> Self {
        match to {
            Destination::User => Self::User,
            Destination::Client => Self::Client,
            Destination::Origin => Self::Origin,
        }
    }
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct PublishBody {
    /// `user`: into the user's branch. `client`: and from there into the client's, which other
    /// users see once it is pushed. `origin`: and push that.
    #[schema(required)]
    to: Option<To>,
    /// With `to: "origin"` and a repository on GitHub: open a pull request, or find the open one.
    pull_request: Option<PullRequestBody>,
    /// Message of a merge commit of the last branch; without one a branch just moves along where
    /// it can.
    message: Option<String>,
    /// Publish although lines of others vanish that no turn touched (409 `merge_conflict` with the
    /// kind `silent_loss`).
    accept_loss: Option<bool>,
    /// Refuse (409 `stale_head`) if the thread's commit is another one.
    expected_head: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum PullRequestBody {
    Wanted(bool),
    Text {
        title: Option<String>,
        body: Option<String>,
        /// The branch to be merged into; else `baseBranch` of the first init, else the
        /// repository's default branch.
        base: Option<String>,
    },
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SyncBody {
    /// Refuse (409 `stale_head`) if the thread's commit is another one.
    expected_head: Option<String>,
    /// The author of the commit.
    author: Option<Author>,
}

/// What was published.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct PublishView {
    to: To,
    /// In the order in which they were made.
    merged: Vec<MergeStep>,
    pushed: Option<PushedView>,
    /// Null also where the base branch has everything already.
    pull_request: Option<PullRequestView>,
    /// Files of the thread that are in no commit, and so were not published.
    held_back: Vec<HeldBack>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct PushedView {
    branch: String,
    /// Full id.
    commit: String,
    /// The origin had it before.
    up_to_date: bool,
}

#[derive(Debug, Serialize, ToSchema)]
struct PullRequestView {
    url: String,
    number: u64,
    /// False: it was open already.
    created: bool,
}

impl From<PublishAnswer> for PublishView {
    fn from(answer: PublishAnswer) -> Self {
        let pushed = |pushed: PushedBranch| PushedView {
            branch: pushed.branch,
            commit: pushed.commit,
            up_to_date: pushed.up_to_date,
        };
        let pull_request = |found: PullRequest| PullRequestView {
            url: found.url,
            number: found.number,
            created: found.created,
        };
        Self {
            to: answer.to.into(),
            merged: answer.merged,
            pushed: answer.pushed.map(pushed),
            pull_request: answer.pull_request.map(pull_request),
            held_back: answer.held_back,
        }
    }
}

/// What a sync did. The fields of its turn stand beside these where the thread changed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SyncView {
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<TurnKind>,
    /// The thread had it all: there is no turn.
    up_to_date: bool,
    merged: Vec<MergeStep>,
    #[serde(flatten)]
    turn: Option<Box<TurnResult>>,
}

impl SyncView {
    /// `turn`: where the thread changed.
    pub(super) fn new(merged: Vec<MergeStep>, turn: Option<Box<TurnResult>>) -> Self {
        Self {
            // The turn has one of its own.
            kind: turn.is_none().then_some(TurnKind::Sync),
            up_to_date: turn.is_none(),
            merged,
            turn,
        }
    }
}

/// Brings the thread's work up. What is in the worktree is committed first; files that are in no
/// commit are not published. It runs after the turns that wait already. Whatever stops it changes
/// nothing, here or at the origin; asking again is safe.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/publish",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = PublishBody,
    responses((status = 200, description = "`{success, result}`", body = PublishView),
              (status = 400, description = "`invalid_request`: also a site without an origin, or pullRequest without GitHub or a token"),
              (status = 404, description = "`not_found`: no such thread"),
              (status = 409, description = "`merge_conflict` with `from`, `to` and `files` (each with `kind`; of kind `silent_loss` with `lines`), `stale_head`, `thread_busy_elsewhere`"),
              (status = 422, description = "`push_failed`, `fetch_failed`, `pull_request_failed` with `reason` `auth` or `rejected`: the origin says no; the last with `published`"),
              (status = 429, description = "`queue_full`"),
              (status = 502, description = "the same codes with `reason` `network`: try again")))]
pub(super) async fn publish(
    State(state): State<Shared>,
    path: ThreadPath,
    JsonOrNothing(body): JsonOrNothing<PublishBody>,
) -> Result<Response, ApiError> {
    let to = body.to.ok_or_else(|| {
        ApiError::invalid("to is missing: publish to \"user\", \"client\" or \"origin\"")
    })?;
    let pull_request = match body.pull_request {
        None | Some(PullRequestBody::Wanted(false)) => None,
        Some(_) if !matches!(to, To::Origin) => {
            return Err(ApiError::invalid(
                "pullRequest needs a publication to \"origin\"",
            ));
        }
        Some(PullRequestBody::Wanted(true)) => Some(PullRequestWish::default()),
        Some(PullRequestBody::Text { title, body, base }) => Some(PullRequestWish {
            title: not_empty("pullRequest.title", title, 256)?,
            body: lines("pullRequest.body", body, 60_000)?,
            base: not_empty("pullRequest.base", base, 250)?,
        }),
    };
    let wish = PublishWish {
        to: to.into(),
        message: lines("message", body.message, 10_000)?,
        accepts_loss: body.accept_loss.unwrap_or(false),
        pull_request,
    };
    let wishes = Wishes::new(body.expected_head, None, None)?;
    let operation = Operation::Publish(Box::new(wish));
    // Asking again does nothing anew, so there are no keys.
    operate(&state, &path, None, wishes, operation).await
}

/// Brings others' work down: from the origin (its branch of the client, else the base branch) into
/// the client's and the user's branch and this thread; without an origin from the client's branch
/// on. Only this thread's files change. Whatever does not fit stops it, and nothing is changed.
/// With `Idempotency-Key` a second call answers with the first one's turn.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/sync",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = SyncBody,
    responses((status = 200, description = "`{success, result}`: a turn of kind `sync` where the thread changed, with `merged` and `upToDate`", body = SyncView),
              (status = 404, description = "`not_found`: no such thread"),
              (status = 409, description = "`merge_conflict` with `from`, `to` and `files`, `stale_head`, `thread_busy_elsewhere`"),
              (status = 422, description = "`fetch_failed` with `reason` `auth` or `rejected`"),
              (status = 429, description = "`queue_full`"),
              (status = 502, description = "`fetch_failed` with `reason` `network`: try again")))]
pub(super) async fn sync(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    JsonOrNothing(body): JsonOrNothing<SyncBody>,
) -> Result<Response, ApiError> {
    let wishes = Wishes::new(body.expected_head, None, body.author)?;
    operate(&state, &path, Some(&headers), wishes, Operation::Sync).await
}

/// As `not_empty`, of a text that may have more than one line.
fn lines(field: &str, value: Option<String>, longest: usize) -> Result<Option<String>, ApiError> {
    let plain = value
        .as_ref()
        .map(|text| text.replace(['\n', '\r', '\t'], " "));
    not_empty(field, plain, longest)?;
    Ok(value)
}
