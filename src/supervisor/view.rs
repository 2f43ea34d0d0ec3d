//! What the supervisor is asked for and what it answers: plain data of its edges.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{
        Author, CommitSummary, Effect, ErrorCode, PreviewState, TurnKind, TurnMode, TurnStatus,
        Usage,
    },
    identity::{ClientId, ThreadId, ThreadKey, TurnId, UserId},
    repository::{LogEntry, RepositoryError, Worktree},
    turn::{Past, PastTurn, Undone},
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
    /// Files that are in the worktree when the agent begins, of the turn like what it writes.
    pub brings: Vec<Brought>,
    /// For the turn's result: what greenroom did before.
    pub report: Option<serde_json::Value>,
    /// What that cost, for the result and the turn's budget; the ledger has it already.
    pub usage: Option<Usage>,
}

/// A file that a turn brings into the site.
#[derive(Debug, Clone)]
pub struct Brought {
    /// Relative to the site's root, with `/`.
    pub path: String,
    pub content: bytes::Bytes,
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
    pub kind: TurnKind,
    pub mode: TurnMode,
    pub instruction: String,
    pub status: TurnStatus,
    pub text: String,
    pub author: Option<Author>,
    #[schema(value_type = String)]
    pub started_at: Timestamp,
    pub duration_ms: u64,
    pub commit: Option<CommitSummary>,
    pub usage: Usage,
    #[serde(flatten)]
    pub effect: Effect,
    /// The turn that took this one's changes back, while that is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub undone_by: Option<TurnId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
}

/// A commit of edits that no turn made.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutsideEdit {
    pub commit: CommitSummary,
    /// When it was committed: before the turn or operation that found the edits.
    #[schema(value_type = String)]
    pub at: Timestamp,
}

/// A page of a thread's history.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct History {
    /// Newest first.
    pub turns: Vec<TurnSummary>,
    /// Commits from the time of these turns that belong to none of them, newest first.
    pub edits: Vec<OutsideEdit>,
}

/// What part of a thread's history is asked for.
#[derive(Debug, Clone)]
pub struct HistoryPage {
    /// Most turns of it.
    pub limit: usize,
    /// Begin with the turn before this one.
    pub before: Option<TurnId>,
}

impl History {
    /// Reads a page. Blocking.
    pub(super) fn read(
        past: Past,
        worktree: &Worktree,
        page: &HistoryPage,
        running: &[TurnId],
    ) -> Self {
        let mut undone = Undone::default();
        let mut turns = Vec::new();
        let mut end = None;
        for turn in past {
            let undone_by = undone.by(&turn);
            // What is newer than the page still tells what of the page is undone.
            if page
                .before
                .as_ref()
                .is_some_and(|before| turn.id() >= before)
            {
                end = Some(turn.accepted.accepted_at);
                continue;
            }
            turns.push(TurnSummary::new(turn, undone_by, running));
            if turns.len() == page.limit {
                break;
            }
        }
        let oldest = turns.last().filter(|_| turns.len() == page.limit);
        let begin = oldest.map(|turn| turn.started_at);
        let edits = outside_edits(worktree, page.limit, begin, end).unwrap_or_else(|error| {
            tracing::warn!(%error, "outside edits are left out of the history");
            Vec::new()
        });
        Self { turns, edits }
    }
}

fn outside_edits(
    worktree: &Worktree,
    limit: usize,
    begin: Option<Timestamp>,
    end: Option<Timestamp>,
) -> Result<Vec<OutsideEdit>, RepositoryError> {
    // A turn is two commits at most: its own and what was there before it. Commits know seconds
    // alone.
    let log = worktree.log(2 * limit + 10)?;
    let is_in_time = |entry: &LogEntry| {
        begin.is_none_or(|begin| entry.time.as_second() >= begin.as_second())
            && end.is_none_or(|end| entry.time < end)
    };
    let is_outside = |entry: &LogEntry| {
        let mut trailers = entry.trailers.iter();
        trailers.any(|(name, value)| name == "Status" && value == "outside")
    };
    let found = log
        .iter()
        .filter(|entry| is_in_time(entry) && is_outside(entry));
    found
        .take(limit)
        .map(|entry| {
            Ok(OutsideEdit {
                commit: worktree.summary(&entry.id)?,
                at: entry.time,
            })
        })
        .collect()
}

impl TurnSummary {
    fn new(turn: PastTurn, undone_by: Option<TurnId>, running: &[TurnId]) -> Self {
        let PastTurn { accepted, outcome } = turn;
        let pending = if running.contains(&accepted.turn_id) {
            TurnStatus::Running
        } else {
            TurnStatus::Queued
        };
        let mut summary = Self {
            kind: accepted.kind,
            mode: accepted.mode,
            instruction: accepted.instruction,
            status: pending,
            text: String::new(),
            author: accepted.author,
            started_at: accepted.accepted_at,
            duration_ms: 0,
            commit: None,
            usage: Usage::default(),
            effect: accepted.effect,
            undone_by,
            error: None,
            code: None,
            turn_id: accepted.turn_id,
        };
        if let Some(outcome) = outcome {
            summary.status = outcome.status;
            summary.text = outcome.text;
            summary.duration_ms = outcome.duration_ms;
            summary.commit = outcome.commit;
            summary.usage = outcome.usage;
            summary.effect = Effect {
                undone: outcome.undone,
                redone: outcome.redone,
                restored: outcome.restored,
            };
            summary.error = outcome.error;
            summary.code = outcome.code;
        }
        summary
    }
}
