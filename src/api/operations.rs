//! Undo, redo, restore: what is done to a thread beside its agent's turns.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::{JsonOrNothing, success},
    error::request_id,
    publish::{PublishView, SyncView},
    threads::{ThreadPath, check_author, idempotency_key, path_key},
    turns::{succeeded, turn_id},
};
use crate::{
    domain::{Author, CommitSummary, Effect, FileChange, TurnKind, TurnResult},
    identity::TurnId,
    supervisor::{DryRun, Operation, OperationAnswer, OperationRequest},
};

/// All of it may be left out, the body too.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct UndoBody {
    /// The turn to take back (or, for a redo, to bring back).
    turn_id: Option<String>,
    /// Refuse (409 `stale_head`) if the thread's commit is another one: an id in hex, or the first
    /// 4 digits of it or more. Edits that are not committed yet do not make it another one.
    expected_head: Option<String>,
    /// Say what would change, and change nothing.
    dry_run: Option<bool>,
    /// The author of the commit.
    author: Option<Author>,
}

impl UndoBody {
    fn unpack(self, state: &Shared) -> Result<(Option<TurnId>, Wishes), ApiError> {
        let turn = self.turn_id.map(|id| turn_id(state, &id)).transpose()?;
        let wishes = Wishes::new(self.expected_head, self.dry_run, self.author)?;
        Ok((turn, wishes))
    }
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RestoreBody {
    /// A commit of this thread: its id in hex, or the first 4 digits of it or more.
    #[schema(required)]
    commit: Option<String>,
    expected_head: Option<String>,
    dry_run: Option<bool>,
    author: Option<Author>,
}

/// What an operation would do: the `result` of a request with `dryRun`.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DryRunView {
    /// Always true.
    dry_run: bool,
    kind: TurnKind,
    #[serde(flatten)]
    effect: Effect,
    /// The thread's commit, to be sent as `expectedHead`.
    head: String,
    files: Vec<FileChange>,
    /// Unified.
    diff: String,
    /// The diff was cut.
    truncated: bool,
    /// What would be done and what would be left, of an edit that greenroom itself makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    report: Option<serde_json::Value>,
}

impl From<DryRun> for DryRunView {
    fn from(run: DryRun) -> Self {
        Self {
            dry_run: true,
            kind: run.kind,
            effect: run.effect,
            head: run.head,
            files: run.files,
            diff: run.diff.text,
            truncated: run.diff.truncated,
            report: run.report,
        }
    }
}

/// There was nothing to change: the `result` where no turn was made.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Unchanged {
    /// Always null.
    #[schema(value_type = Option<String>)]
    turn_id: Option<TurnId>,
    /// Always null.
    commit: Option<CommitSummary>,
    /// What a person is told.
    text: String,
    #[schema(value_type = Option<Object>)]
    report: Option<serde_json::Value>,
}

/// Takes one turn's changes back, by a new commit: those of `turnId`, else of the newest turn that
/// changed files and is not undone (undo and redo themselves do not count; restore and sync do).
/// Later turns' changes stay. What later turns built on, and files in no commit that are in the
/// way, are 409 `undo_conflict` with `files`, and nothing is changed. Runs after the turns that
/// wait already. With `Idempotency-Key` a second call answers with the first one's turn.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/undo",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = UndoBody,
    responses((status = 200, description = "`{success, result}`: a turn of kind `undo` with `undone`; with `dryRun` a `DryRunView`", body = TurnResult),
              (status = 400, description = "`invalid_request`: the turn is undone already, changed nothing, or has not ended"),
              (status = 404, description = "`not_found`: no such thread or turn, or nothing left to undo"),
              (status = 409, description = "`undo_conflict` with `files`, `stale_head` with `head`, `thread_busy_elsewhere`"),
              (status = 429, description = "`queue_full`")))]
pub(super) async fn undo(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    JsonOrNothing(body): JsonOrNothing<UndoBody>,
) -> Result<Response, ApiError> {
    let (turn, wishes) = body.unpack(&state)?;
    let operation = Operation::Undo { turn };
    operate(&state, &path, Some(&headers), wishes, operation).await
}

/// Takes the newest undo that is in force back (or the one of `turnId`), by a new commit. Turns
/// that came after it stay.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/redo",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = UndoBody,
    responses((status = 200, description = "`{success, result}`: a turn of kind `redo` with `redone` (the turn) and `undone` (the undo); with `dryRun` a `DryRunView`", body = TurnResult),
              (status = 400, description = "`invalid_request`: the turn is not undone"),
              (status = 404, description = "`not_found`: no such thread or turn, or nothing left to redo"),
              (status = 409, description = "`undo_conflict` with `files`, `stale_head` with `head`, `thread_busy_elsewhere`"),
              (status = 429, description = "`queue_full`")))]
pub(super) async fn redo(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    JsonOrNothing(body): JsonOrNothing<UndoBody>,
) -> Result<Response, ApiError> {
    let (turn, wishes) = body.unpack(&state)?;
    let operation = Operation::Redo { turn };
    operate(&state, &path, Some(&headers), wishes, operation).await
}

/// Sets the site to the state of an earlier commit of this thread, by a new commit. Files that are
/// in no commit (ignored, held back) stay; where one is in the way it is 409 `undo_conflict`.
#[utoipa::path(post, path = "/api/clients/{client}/users/{user}/threads/{thread}/restore",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    request_body = RestoreBody,
    responses((status = 200, description = "`{success, result}`: a turn of kind `restore` with `restored`; with `dryRun` a `DryRunView`", body = TurnResult),
              (status = 400, description = "`invalid_request`: that is no commit id, or begins more than one"),
              (status = 404, description = "`not_found`: no such thread, or the commit is not in its history"),
              (status = 409, description = "`undo_conflict` with `files`, `stale_head` with `head`, `thread_busy_elsewhere`"),
              (status = 429, description = "`queue_full`")))]
pub(super) async fn restore(
    State(state): State<Shared>,
    path: ThreadPath,
    headers: HeaderMap,
    JsonOrNothing(body): JsonOrNothing<RestoreBody>,
) -> Result<Response, ApiError> {
    let commit = body
        .commit
        .ok_or_else(|| ApiError::invalid("commit is missing: name the state to go back to"))?;
    let commit = commit_id("commit", commit)?;
    let wishes = Wishes::new(body.expected_head, body.dry_run, body.author)?;
    let operation = Operation::Restore { commit };
    operate(&state, &path, Some(&headers), wishes, operation).await
}

/// The id of a commit in hex, or the beginning of one, as git writes it.
pub(super) fn commit_id(field: &str, text: String) -> Result<String, ApiError> {
    let is_id = (4..=40).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(ApiError::invalid(format!(
            "{field} has to be the id of a commit: 4 to 40 hexadecimal digits"
        )))
    }
}

/// What may be said about any operation.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    pub(super) expected_head: Option<String>,
    pub(super) dry_run: bool,
    pub(super) author: Option<Author>,
}

impl Wishes {
    pub(super) fn new(
        expected_head: Option<String>,
        dry_run: Option<bool>,
        author: Option<Author>,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            expected_head: expected_head
                .map(|id| commit_id("expectedHead", id))
                .transpose()?,
            dry_run: dry_run.unwrap_or(false),
            author: author.map(check_author).transpose()?,
        })
    }
}

/// Has it done. `headers` are those of one that is done once for each idempotency key.
pub(super) async fn operate(
    state: &Shared,
    path: &ThreadPath,
    headers: Option<&HeaderMap>,
    wishes: Wishes,
    operation: Operation,
) -> Result<Response, ApiError> {
    let request = OperationRequest {
        key: path_key(state, path)?,
        operation,
        expected_head: wishes.expected_head,
        dry_run: wishes.dry_run,
        author: wishes.author,
        idempotency_key: headers.map(idempotency_key).transpose()?.flatten(),
        request_id: request_id(),
    };
    match state.supervisor.operate(request).await? {
        OperationAnswer::Done(turn) => {
            let turn = succeeded(turn)?;
            Ok(match turn.kind {
                // Of an earlier call with its key.
                TurnKind::Sync => success(SyncView::new(Vec::new(), Some(turn))),
                _ => success(turn),
            })
        }
        OperationAnswer::Synced(merged, turn) => {
            let turn = turn.map(succeeded).transpose()?;
            Ok(success(SyncView::new(merged, turn)))
        }
        OperationAnswer::DryRun(run) => Ok(success(DryRunView::from(*run))),
        OperationAnswer::Unchanged(text, report) => Ok(success(unchanged(text, report))),
        OperationAnswer::Published(answer) => Ok(success(PublishView::from(*answer))),
        OperationAnswer::Seen(_) => unreachable!("the supervisor answers with its turn"),
    }
}

pub(super) fn unchanged(text: String, report: Option<serde_json::Value>) -> Unchanged {
    Unchanged {
        turn_id: None,
        commit: None,
        text,
        report,
    }
}
