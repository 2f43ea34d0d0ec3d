//! What the supervisor is asked for and what it answers: plain data of its edges.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{Author, PreviewState, TurnMode, TurnStatus, Usage},
    identity::{ClientId, ThreadId, ThreadKey, TurnId, UserId},
    turn::TurnFile,
    workspace::ThreadPaths,
};

/// A request to make a thread ready.
#[derive(Debug, Clone)]
pub struct InitRequest {
    pub key: ThreadKey,
    pub repo_url: Option<String>,
    pub base_branch: Option<String>,
    pub wait_for_preview: bool,
}

/// A thread that is ready.
#[derive(Debug, Clone)]
pub struct InitAnswer {
    pub paths: ThreadPaths,
    pub branch: String,
    pub head: String,
    /// The thread's branch existed before this call.
    pub resumed: bool,
    pub preview: PreviewView,
    pub timings: BTreeMap<&'static str, Duration>,
}

/// A thread's preview, as answers show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreviewView {
    pub state: PreviewState,
    /// Stable for the life of the thread.
    pub url: String,
    /// The same with a short-lived access token, where one is needed.
    pub preview_url: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<crate::domain::PreviewError>,
}

/// An instruction for a thread.
#[derive(Debug, Clone)]
pub struct ExecuteRequest {
    pub key: ThreadKey,
    pub instruction: String,
    pub mode: TurnMode,
    pub model: Option<String>,
    pub timeout: Option<Duration>,
    pub author: Option<Author>,
    pub idempotency_key: Option<String>,
    /// For the log.
    pub request_id: Option<String>,
}

/// One thread in a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThreadView {
    #[schema(value_type = String)]
    pub client_id: ClientId,
    #[schema(value_type = String)]
    pub user_id: UserId,
    #[schema(value_type = String)]
    pub thread_id: ThreadId,
    pub branch: String,
    pub head: Option<String>,
    #[schema(value_type = Option<String>)]
    pub last_activity: Option<Timestamp>,
    pub preview: PreviewView,
    #[schema(value_type = Option<String>)]
    pub running_turn: Option<TurnId>,
}

/// One turn in a thread's history.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TurnSummary {
    #[schema(value_type = String)]
    pub turn_id: TurnId,
    /// `execute` or `plan`.
    pub kind: TurnMode,
    pub instruction: String,
    pub status: TurnStatus,
    pub text: String,
    pub author: Option<Author>,
    #[schema(value_type = String)]
    pub started_at: Timestamp,
    pub duration_ms: u64,
    pub commit: Option<crate::domain::CommitSummary>,
    pub usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The thread's turns, newest first, of their journals. Blocking.
pub(super) fn read_history(
    paths: &ThreadPaths,
    key: &ThreadKey,
    limit: usize,
    running: &[TurnId],
) -> Vec<TurnSummary> {
    let entries = std::fs::read_dir(paths.turns())
        .into_iter()
        .flatten()
        .flatten();
    let mut ids: Vec<TurnId> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            format!(
                "{}~{}~{}~{}",
                key.client,
                key.user,
                key.thread,
                name.strip_suffix(".jsonl")?
            )
            .parse()
            .ok()
        })
        .collect();
    ids.sort_by(|a, b| b.cmp(a));
    ids.into_iter()
        .take(limit)
        .filter_map(|id| {
            let file = TurnFile::new(paths, id.clone());
            let accepted = file.accepted().ok()?;
            let outcome = file.outcome().ok().flatten();
            let pending = if running.contains(&id) {
                TurnStatus::Running
            } else {
                TurnStatus::Queued
            };
            Some(TurnSummary {
                kind: accepted.mode,
                instruction: accepted.instruction,
                author: accepted.author,
                started_at: accepted.accepted_at,
                status: outcome.as_ref().map_or(pending, |result| result.status),
                text: outcome
                    .as_ref()
                    .map(|result| result.text.clone())
                    .unwrap_or_default(),
                duration_ms: outcome.as_ref().map_or(0, |result| result.duration_ms),
                usage: outcome
                    .as_ref()
                    .map(|result| result.usage)
                    .unwrap_or_default(),
                error: outcome.as_ref().and_then(|result| result.error.clone()),
                commit: outcome.and_then(|result| result.commit),
                turn_id: id,
            })
        })
        .collect()
}
