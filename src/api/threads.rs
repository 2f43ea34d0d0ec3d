//! `/api/init`, `/api/execute` and what can be asked of threads.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    Json as Answer,
    extract::State,
    http::{
        HeaderMap,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::{Json, success, thread_key},
    calls::CallView,
    error::request_id,
    operations::commit_id,
    params::{Path, Query},
    sse,
    turns::{self, last_event_id, turn_id},
};
use crate::{
    domain::{Author, FileChange, TurnMode, TurnResult},
    identity::ThreadKey,
    supervisor::{
        ExecuteRequest, History, HistoryPage, InitRequest, PreviewView, Removal, ThreadView,
    },
};

/// Longest turn that a request may ask for.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct InitBody {
    client_id: Option<String>,
    user_id: Option<String>,
    thread_id: Option<String>,
    repo_url: Option<String>,
    base_branch: Option<String>,
    wait_for_preview: Option<bool>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct InitResponse {
    success: bool,
    workspace: WorkspaceView,
    resumed: bool,
    branch: String,
    head: String,
    preview: PreviewView,
    /// What took how long, in milliseconds.
    timings: BTreeMap<&'static str, f64>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct WorkspaceView {
    user_path: String,
    /// The thread's worktree.
    project_path: String,
    claude_path: String,
    branch: String,
    resumed: bool,
}

/// Makes a thread ready; idempotent.
#[utoipa::path(post, path = "/api/init", request_body = InitBody,
    responses((status = 200, body = InitResponse),
              (status = 400, description = "`invalid_id`, `invalid_request`"),
              (status = 409, description = "`repo_mismatch`"),
              (status = 422, description = "`clone_failed`, `install_failed`")))]
pub(super) async fn init(
    State(state): State<Shared>,
    Json(body): Json<InitBody>,
) -> Result<Answer<InitResponse>, ApiError> {
    let started = std::time::Instant::now();
    let key = thread_key(
        &state.pins,
        body.client_id.as_deref(),
        body.user_id.as_deref(),
        body.thread_id.as_deref(),
    )?;
    let base_branch = not_empty("baseBranch", body.base_branch, 250)?;
    let answer = state
        .supervisor
        .init(InitRequest {
            key,
            repo_url: not_empty("repoUrl", body.repo_url, 2048)?,
            base_branch,
            wait_for_preview: body.wait_for_preview.unwrap_or(true),
        })
        .await?;
    let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e5).round() / 100.0;
    let mut timings: BTreeMap<_, _> = answer
        .timings
        .into_iter()
        .map(|(name, took)| (name, milliseconds(took)))
        .collect();
    timings.insert("totalMs", milliseconds(started.elapsed()));
    let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
    Ok(Answer(InitResponse {
        success: true,
        workspace: WorkspaceView {
            user_path: text(answer.paths.user.root().to_owned()),
            project_path: text(answer.paths.worktree()),
            claude_path: text(answer.paths.user.claude()),
            branch: answer.branch.clone(),
            resumed: answer.resumed,
        },
        resumed: answer.resumed,
        branch: answer.branch,
        head: answer.head,
        preview: answer.preview,
        timings,
    }))
}

/// An optional text that, if it is there, says something.
pub(super) fn not_empty(
    field: &str,
    value: Option<String>,
    longest: usize,
) -> Result<Option<String>, ApiError> {
    match value {
        None => Ok(None),
        Some(text) if text.trim().is_empty() => Err(ApiError::invalid(format!(
            "{field} is empty; leave it out instead"
        ))),
        Some(text) if text.len() > longest || text.chars().any(char::is_control) => {
            Err(ApiError::invalid(format!(
                "{field} has to be at most {longest} bytes without control characters"
            )))
        }
        Some(text) => Ok(Some(text.trim().to_owned())),
    }
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ExecuteBody {
    client_id: Option<String>,
    user_id: Option<String>,
    thread_id: Option<String>,
    instruction: Option<String>,
    mode: Option<TurnMode>,
    model: Option<String>,
    timeout_seconds: Option<f64>,
    #[serde(rename = "async")]
    is_async: Option<bool>,
    author: Option<Author>,
}

impl ExecuteBody {
    fn into_request(self, state: &Shared) -> Result<ExecuteRequest, ApiError> {
        let key = thread_key(
            &state.pins,
            self.client_id.as_deref(),
            self.user_id.as_deref(),
            self.thread_id.as_deref(),
        )?;
        let instruction = self
            .instruction
            .filter(|text| !text.trim().is_empty())
            .ok_or_else(|| ApiError::invalid("instruction is missing: say what should change"))?;
        if instruction.contains('\0') {
            return Err(ApiError::invalid("instruction holds a NUL character"));
        }
        let timeout = match self.timeout_seconds {
            None => None,
            Some(seconds) if seconds > 0.0 && seconds <= MAX_TIMEOUT.as_secs_f64() => {
                Some(Duration::from_secs_f64(seconds))
            }
            Some(_) => {
                return Err(ApiError::invalid(
                    "timeoutSeconds has to be more than 0 and at most 86400",
                ));
            }
        };
        let model = not_empty("model", self.model, 200)?;
        if model
            .as_ref()
            .is_some_and(|model| model.starts_with('-') || model.contains(char::is_whitespace))
        {
            return Err(ApiError::invalid("model is not the name of a model"));
        }
        Ok(ExecuteRequest {
            key,
            instruction,
            mode: self.mode.unwrap_or_default(),
            model,
            timeout,
            author: self.author.map(check_author).transpose()?,
            idempotency_key: None,
            request_id: request_id(),
            brings: Vec::new(),
            report: None,
            usage: None,
        })
    }
}

/// Git's own rules for a signature: no line ends, no angle brackets.
pub(super) fn check_author(author: Author) -> Result<Author, ApiError> {
    for (field, text) in [
        ("author.name", &author.name),
        ("author.email", &author.email),
    ] {
        let bad = text.trim().is_empty()
            || text.len() > 200
            || text
                .chars()
                .any(|c| c.is_control() || matches!(c, '<' | '>'));
        if bad {
            return Err(ApiError::invalid(format!(
                "{field} has to be 1 to 200 bytes without control characters, < and >"
            )));
        }
    }
    Ok(author)
}

/// Runs one instruction; answers when it is done, or at once with `async`, or as a stream of
/// events with `Accept: text/event-stream`.
#[utoipa::path(post, path = "/api/execute", request_body = ExecuteBody,
    responses((status = 200, description = "`{success, result}`", body = TurnResult),
              (status = 202, description = "`{turnId}`, with `async`"),
              (status = 400, description = "`invalid_id`, `invalid_request`"),
              (status = 404, description = "`not_found`: the thread was never initialised"),
              (status = 429, description = "`queue_full`, `budget_exceeded`"),
              (status = 502, description = "`agent_failed`"),
              (status = 504, description = "`turn_timeout`")))]
pub(super) async fn execute(
    State(state): State<Shared>,
    headers: HeaderMap,
    Json(body): Json<ExecuteBody>,
) -> Result<Response, ApiError> {
    let is_async = body.is_async.unwrap_or(false);
    let mut request = body.into_request(&state)?;
    request.idempotency_key = idempotency_key(&headers)?;
    let record = state.supervisor.execute(request).await?;
    let id = record.file().id().clone();
    if is_async {
        return Ok(turns::accepted(&id));
    }
    if accepts(&headers, "text/event-stream") {
        return Ok(sse::events(id, &record, last_event_id(&headers)));
    }
    Ok(success(turns::outcome(&state, &record).await?))
}

/// Does the caller name this kind of answer?
pub(super) fn accepts(headers: &HeaderMap, kind: &str) -> bool {
    let accepted = headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    accepted
        .split(',')
        .any(|accepted| accepted.trim().starts_with(kind))
}

pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(ApiError::invalid(
            "Idempotency-Key has to be 1 to 255 printable characters",
        )),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct UserQuery {
    #[serde(rename = "clientId")]
    client: Option<String>,
    #[serde(rename = "userId")]
    user: Option<String>,
}

/// All threads of a user.
#[utoipa::path(get, path = "/api/threads",
    params(("clientId" = String, Query), ("userId" = String, Query)),
    responses((status = 200, description = "`{success, result}`", body = Vec<ThreadView>)))]
pub(super) async fn list(
    State(state): State<Shared>,
    Query(query): Query<UserQuery>,
) -> Result<Response, ApiError> {
    // Any thread id will do: only the user is asked about.
    let key = thread_key(
        &state.pins,
        query.client.as_deref(),
        query.user.as_deref(),
        Some("any"),
    )?;
    let threads = state.supervisor.threads(&key.user_key()).await?;
    Ok(success(threads))
}

pub(super) type ThreadPath = Path<(String, String, String)>;

pub(super) fn path_key(state: &Shared, path: &ThreadPath) -> Result<ThreadKey, ApiError> {
    let (client, user, thread) = &path.0;
    thread_key(&state.pins, Some(client), Some(user), Some(thread))
}

/// A thread with what is done to it beside its turns.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OneThread {
    #[serde(flatten)]
    thread: ThreadView,
    /// Calls of `…/images` and `…/alt-text` whose turn does not exist yet, or runs: each can be
    /// cancelled by its `callId`.
    calls: Vec<CallView>,
}

/// One thread.
#[utoipa::path(get, path = "/api/clients/{client}/users/{user}/threads/{thread}",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = OneThread)))]
pub(super) async fn one(
    State(state): State<Shared>,
    path: ThreadPath,
) -> Result<Response, ApiError> {
    let key = path_key(&state, &path)?;
    Ok(success(OneThread {
        thread: state.supervisor.thread_view(&key).await?,
        calls: state.calls.of(&key),
    }))
}

#[derive(Debug, Deserialize)]
pub(super) struct RemoveQuery {
    branch: Option<String>,
    discard: Option<String>,
}

/// Takes a thread away once the turns that wait have run: stops its preview, commits what is in
/// its worktree, removes it. The branch stays, and with it what the thread remembers, unless
/// `branch=true`: then the thread is as if it had never been. Files that the commit leaves out (see
/// `heldBack`) are 409 `held_back`, and nothing is removed, unless `discard=true`.
#[utoipa::path(delete, path = "/api/clients/{client}/users/{user}/threads/{thread}",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path),
           ("branch" = Option<bool>, Query), ("discard" = Option<bool>, Query)),
    responses((status = 200, description = "`{success, result: {threadId, branch, branchRemoved}}`"),
              (status = 404, description = "`not_found`"),
              (status = 409, description = "`held_back` with `files`, `thread_busy_elsewhere`")))]
pub(super) async fn remove(
    State(state): State<Shared>,
    path: ThreadPath,
    Query(query): Query<RemoveQuery>,
) -> Result<Response, ApiError> {
    let key = path_key(&state, &path)?;
    let removal = Removal {
        branch: flag("branch", query.branch.as_deref())?,
        discard: flag("discard", query.discard.as_deref())?,
    };
    state.supervisor.remove(&key, removal).await?;
    Ok(success(json!({
        "threadId": key.thread, "branch": key.branch(), "branchRemoved": removal.branch,
    })))
}

/// A yes or no in an address.
fn flag(field: &str, value: Option<&str>) -> Result<bool, ApiError> {
    match value {
        Some("true" | "1" | "") => Ok(true),
        None | Some("false" | "0") => Ok(false),
        Some(_) => Err(ApiError::invalid(format!(
            "{field} has to be true or false"
        ))),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct HistoryQuery {
    limit: Option<String>,
    before: Option<String>,
}

/// The thread's turns, newest first: the agent's, and undo, redo, restore and sync. `undoneBy`
/// names the turn that took one back. `edits` are the commits of what was edited outside of turns
/// in the same time; they are no turns and have no turn id.
#[utoipa::path(get, path = "/api/clients/{client}/users/{user}/threads/{thread}/history",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path),
           ("limit" = Option<usize>, Query, description = "1 to 200 turns, 50 by default"),
           ("before" = Option<String>, Query, description = "a turn id: begin with the turn before it")),
    responses((status = 200, description = "`{success, result}`", body = History),
              (status = 400, description = "`invalid_request`"),
              (status = 404, description = "`not_found`")))]
pub(super) async fn history(
    State(state): State<Shared>,
    path: ThreadPath,
    Query(query): Query<HistoryQuery>,
) -> Result<Response, ApiError> {
    const LIMIT: usize = 50;
    const MAX_LIMIT: usize = 200;
    let limit = match query.limit.as_deref().map(str::parse) {
        None => LIMIT,
        Some(Ok(limit)) if (1..=MAX_LIMIT).contains(&limit) => limit,
        Some(_) => {
            return Err(ApiError::invalid(format!(
                "limit has to be a number from 1 to {MAX_LIMIT}"
            )));
        }
    };
    let key = path_key(&state, &path)?;
    let before = query.before.map(|id| turn_id(&state, &id)).transpose()?;
    if before.as_ref().is_some_and(|turn| *turn.key() != key) {
        return Err(ApiError::invalid("before is a turn of another thread"));
    }
    let page = HistoryPage { limit, before };
    let history = state.supervisor.history(&key, page).await?;
    Ok(success(history))
}

#[derive(Debug, Deserialize)]
pub(super) struct DiffQuery {
    from: Option<String>,
    to: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DiffView {
    /// Full ids of the commits that were compared.
    from: String,
    to: String,
    /// Unified.
    diff: String,
    files: Vec<FileChange>,
    /// The diff was cut (a line that begins with a backslash says where), or not all files are
    /// listed.
    truncated: bool,
}

/// What differs between two commits. Without `from` and `to`: all changes of this thread since its
/// branch left the user's. With `to` alone: what that commit changed. With `from` alone: all since
/// that commit. Edits that are in no commit yet do not show. A file's diff is cut at 200 kB, the
/// whole at 1 MB.
#[utoipa::path(get, path = "/api/clients/{client}/users/{user}/threads/{thread}/diff",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path),
           ("from" = Option<String>, Query, description = "a commit: its id, or the first 4 digits of it or more"),
           ("to" = Option<String>, Query, description = "the same")),
    responses((status = 200, description = "`{success, result}`; with `Accept: text/x-diff` the text alone", body = DiffView),
              (status = 400, description = "`invalid_request`: that is no commit id, or begins more than one"),
              (status = 404, description = "`not_found`")))]
pub(super) async fn diff(
    State(state): State<Shared>,
    path: ThreadPath,
    Query(query): Query<DiffQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let key = path_key(&state, &path)?;
    let id = |field, id: Option<String>| {
        let id = id.filter(|id| !id.is_empty());
        id.map(|id| commit_id(field, id)).transpose()
    };
    let (from, to) = (id("from", query.from)?, id("to", query.to)?);
    let found = state.supervisor.diff(&key, from, to).await?;
    if accepts(&headers, "text/x-diff") {
        let kind = (CONTENT_TYPE, "text/x-diff; charset=utf-8");
        return Ok(([kind], found.diff.text).into_response());
    }
    let view = DiffView {
        from: found.from,
        to: found.to,
        diff: found.diff.text,
        files: found.files,
        truncated: found.diff.truncated,
    };
    Ok(success(view))
}

/// The thread's preview.
#[utoipa::path(get, path = "/api/clients/{client}/users/{user}/threads/{thread}/preview",
    params(("client" = String, Path), ("user" = String, Path), ("thread" = String, Path)),
    responses((status = 200, description = "`{success, result}`", body = PreviewView)))]
pub(super) async fn preview(
    State(state): State<Shared>,
    path: ThreadPath,
) -> Result<Response, ApiError> {
    let view = state.supervisor.preview(&path_key(&state, &path)?).await?;
    let errors = view.errors.clone();
    Ok(success(json!({
        "state": view.state, "url": view.url, "previewUrl": view.preview_url, "errors": errors,
    })))
}
