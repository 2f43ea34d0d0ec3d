//! A turn as the outside sees it: its states, events and result.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ConflictKind, FileChange, FileStatus, HeldBack, PreviewError, PreviewState, Usage};
use crate::identity::{ThreadId, TurnId};

/// May the turn write?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TurnMode {
    #[default]
    Execute,
    /// Reads and answers; changes nothing.
    Plan,
}

/// What kind of work a turn is. More may come; readers take one that they do not know for `Other`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TurnKind {
    /// An instruction to the agent.
    #[default]
    Turn,
    /// One turn's changes were taken back.
    Undo,
    /// An undo was taken back.
    Redo,
    /// The site was set to an earlier state.
    Restore,
    /// Changes of the branches above were brought down.
    Sync,
    /// Images got texts for those who do not see them.
    AltText,
    /// Images were made and put into the site.
    Images,
    /// A one-shot run of another service worked in the thread's worktree.
    Service,
    #[serde(other)]
    Other,
}

impl TurnKind {
    /// Did a model edit the files? Else the turn is an operation of greenroom's own.
    pub fn is_run(self) -> bool {
        matches!(self, Self::Turn | Self::Service)
    }

    /// As in the contract and in the commit's `Kind` trailer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Turn => "turn",
            Self::Undo => "undo",
            Self::Redo => "redo",
            Self::Restore => "restore",
            Self::Sync => "sync",
            Self::AltText => "alt-text",
            Self::Images => "images",
            Self::Service => "service",
            Self::Other => "other",
        }
    }
}

/// What an operation did, beside its commit. Empty for a turn of the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Effect {
    /// The turn whose changes are gone by this: of an undo its target, of a redo the undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub undone: Option<TurnId>,
    /// The turn whose changes are there again by this redo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub redone: Option<TurnId>,
    /// The commit (full id) whose state is there again by this restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<String>,
}

/// A file that keeps an operation from being carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Conflict {
    /// Relative to the site's root, with `/`.
    pub path: String,
    /// One sentence for a person.
    pub reason: String,
    pub kind: ConflictKind,
    /// Of a silent loss: some of the lines that would vanish.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

impl From<HeldBack> for Conflict {
    fn from(file: HeldBack) -> Self {
        Self {
            path: file.path,
            reason: file.reason,
            kind: ConflictKind::InTheWay,
            lines: Vec::new(),
        }
    }
}

/// Where a turn stands. The last four are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TurnStatus {
    Queued,
    Running,
    Completed,
    Failed,
    Cancelled,
    /// Its supervisor died; the edits were found and committed afterwards.
    Recovered,
}

impl TurnStatus {
    /// Will it never change again?
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }

    /// As in the contract and in the commit's `Status` trailer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Recovered => "recovered",
        }
    }
}

/// How the agent got at the conversation so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Continuity {
    /// The CLI resumed its own transcript.
    Native,
    /// The transcript was lost; the turn began with a summary of the history.
    Replayed,
    /// There was no conversation before.
    Fresh,
}

/// Codes of turns that failed, as in the contract's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    AgentFailed,
    TurnTimeout,
    BudgetExceeded,
    /// Somebody else's git command is at work in the worktree.
    ThreadBusyElsewhere,
    Internal,
}

impl ErrorCode {
    /// As in the contract.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AgentFailed => "agent_failed",
            Self::TurnTimeout => "turn_timeout",
            Self::BudgetExceeded => "budget_exceeded",
            Self::ThreadBusyElsewhere => "thread_busy_elsewhere",
            Self::Internal => "internal",
        }
    }
}

/// Why a turn failed: a code for programs, a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnFailure {
    pub code: ErrorCode,
    pub message: String,
}

/// The person a commit is by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Author {
    pub name: String,
    pub email: String,
}

/// Author or committer of a commit.
pub type Signature = Author;

/// The commit that a turn made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CommitSummary {
    /// Full object id in hex.
    pub id: String,
    /// First line of the message.
    pub message: String,
    /// The first ten thousand.
    pub files: Vec<FileChange>,
    /// How many more there are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub files_omitted: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The preview at the end of a turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TurnPreview {
    pub state: PreviewState,
    pub errors: Vec<PreviewError>,
}

/// One line of a thread's memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    #[schema(value_type = String)]
    pub turn_id: TurnId,
    #[serde(default)]
    pub kind: TurnKind,
    pub mode: TurnMode,
    pub status: TurnStatus,
    pub instruction: String,
    /// The agent's answer, or why there is none.
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// RFC 3339, UTC.
    #[schema(value_type = String)]
    pub at: jiff::Timestamp,
}

/// A plan that the agent made without changing anything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    #[schema(value_type = String)]
    pub turn_id: TurnId,
    pub instruction: String,
    pub text: String,
    #[schema(value_type = String)]
    pub at: jiff::Timestamp,
}

/// What the thread remembers, as answers show it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThreadContext {
    #[schema(value_type = String)]
    pub thread_id: ThreadId,
    pub branch: String,
    /// Oldest first; answers carry the last 20.
    pub history: Vec<HistoryEntry>,
    pub plans: Vec<Plan>,
}

/// How a turn stands or ended: what `execute` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TurnResult {
    #[schema(value_type = String)]
    pub turn_id: TurnId,
    #[serde(default)]
    pub kind: TurnKind,
    #[serde(flatten)]
    pub effect: Effect,
    pub status: TurnStatus,
    pub mode: TurnMode,
    pub text: String,
    pub session_id: Option<String>,
    pub commit: Option<CommitSummary>,
    pub usage: Usage,
    /// Of a turn that greenroom made by itself: what it did and what it left, by its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub report: Option<serde_json::Value>,
    pub num_turns: u64,
    pub duration_ms: u64,
    pub preview: TurnPreview,
    pub held_back: Vec<HeldBack>,
    /// What had to be put right in the site's repository, before the turn or after it; a sentence
    /// each.
    #[serde(default)]
    pub repairs: Vec<String>,
    pub continuity: Continuity,
    pub context: ThreadContext,
    /// Something that the turn had started could not be ended (stuck in the kernel) and may still
    /// run. False: no process of it is left.
    #[serde(default)]
    pub processes_left: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
    /// From when on the same would work: the budget that was used up begins anew then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub retry_at: Option<jiff::Timestamp>,
}

/// What happens during a turn, in the order in which it happened. The serialised form is
/// `{"event": name, "data": {…}}`; the journal adds the number and the turn's id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data")]
pub enum TurnEvent {
    #[serde(rename = "turn.queued")]
    Queued { position: usize },
    #[serde(rename = "turn.started")]
    Started {},
    #[serde(rename = "turn.waiting")]
    Waiting {
        until: jiff::Timestamp,
        reason: String,
    },
    #[serde(rename = "text.delta")]
    TextDelta { text: String },
    #[serde(rename = "tool.started")]
    ToolStarted {
        id: String,
        name: String,
        input: serde_json::Value,
    },
    #[serde(rename = "tool.finished")]
    ToolFinished {
        id: String,
        ok: bool,
        summary: String,
    },
    #[serde(rename = "file.changed")]
    FileChanged { path: String, status: FileStatus },
    #[serde(rename = "budget.warning", rename_all = "camelCase")]
    BudgetWarning {
        spent_usd: f64,
        limit_usd: f64,
        /// Which limit, in words.
        limit: String,
    },
    #[serde(rename = "preview.updated")]
    PreviewUpdated {},
    #[serde(rename = "preview.error")]
    PreviewError { errors: Vec<PreviewError> },
    #[serde(rename = "commit.created")]
    CommitCreated { commit: CommitSummary },
    #[serde(rename = "turn.completed")]
    Completed { result: Box<TurnResult> },
    #[serde(rename = "turn.failed")]
    Failed { result: Box<TurnResult> },
    #[serde(rename = "turn.cancelled")]
    Cancelled { result: Box<TurnResult> },
    #[serde(rename = "turn.recovered")]
    Recovered { result: Box<TurnResult> },
}

impl TurnEvent {
    /// The final event that fits a result.
    pub fn terminal(result: TurnResult) -> Self {
        let result = Box::new(result);
        match result.status {
            TurnStatus::Completed => Self::Completed { result },
            TurnStatus::Cancelled => Self::Cancelled { result },
            TurnStatus::Recovered => Self::Recovered { result },
            TurnStatus::Failed | TurnStatus::Queued | TurnStatus::Running => {
                Self::Failed { result }
            }
        }
    }
}
