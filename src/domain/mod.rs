//! Plain data and pure decisions that every room may use: no async, no I/O, no clock.
//!
//! The shapes here are the contract's: they are serialised as they are, into answers, events,
//! journals and contexts.

mod account;
mod breaker;
mod idle;
mod publish;
mod turn;

pub use account::Account;
pub use breaker::{Breaker, BreakerState, Pass, Verdict};
pub use idle::{IdleDecision, IdleFacts, decide_idle};
pub use publish::{Between, ConflictKind, MergeStep};
pub use turn::{
    Author, CommitSummary, Conflict, Continuity, Effect, ErrorCode, HistoryEntry, Plan, Signature,
    ThreadContext, TurnEvent, TurnFailure, TurnKind, TurnMode, TurnPreview, TurnResult, TurnStatus,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What happened to one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FileStatus {
    Added,
    Modified,
    Deleted,
    Renamed,
}

/// One file of a commit, with line counts (0 for binary files).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FileChange {
    /// Relative to the site's root, with `/`.
    pub path: String,
    /// Where a renamed file was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_path: Option<String>,
    pub status: FileStatus,
    pub additions: u64,
    pub deletions: u64,
    /// It is no text, or too large to be compared line by line.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub binary: bool,
}

/// A file that a commit left out on purpose; it stays in the worktree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldBack {
    pub path: String,
    /// One sentence for a person.
    pub reason: String,
}

/// Tokens and money of one turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub cache_read_tokens: u64,
    pub cache_creation_tokens: u64,
    /// US dollars.
    pub cost_usd: f64,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens + other.input_tokens,
            output_tokens: self.output_tokens + other.output_tokens,
            cache_read_tokens: self.cache_read_tokens + other.cache_read_tokens,
            cache_creation_tokens: self.cache_creation_tokens + other.cache_creation_tokens,
            cost_usd: self.cost_usd + other.cost_usd,
        }
    }
}

/// What a preview is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PreviewState {
    /// No dev server is wanted (`ASTRO_DEV_MODE=false`, or the thread was never initialised here).
    Off,
    Starting,
    Live,
    /// Put to sleep; the next request wakes it.
    Asleep,
    Error,
    /// It runs, but what it shows is known to be old.
    Stale,
}

impl PreviewState {
    /// All of them, for figures.
    pub const ALL: [Self; 6] = [
        Self::Off,
        Self::Starting,
        Self::Live,
        Self::Asleep,
        Self::Error,
        Self::Stale,
    ];

    /// As in the contract.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Asleep => "asleep",
            Self::Error => "error",
            Self::Stale => "stale",
        }
    }
}

/// One thing that is wrong with a preview. `line` and `column` count from 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PreviewError {
    /// Relative to the site's root, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
    pub message: String,
}

/// What is true of a thread's preview now. Published through a `watch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewStatus {
    pub state: PreviewState,
    pub errors: Vec<PreviewError>,
    /// Loopback port of the dev server, while one is up and verified.
    pub upstream: Option<u16>,
    /// Grows with every change, so that a waiter can tell a new state from an old one.
    pub generation: u64,
    /// How often the dev server told its browsers of a change.
    pub updates: u64,
    /// What `updates` was when the newest error was told: after a change an error is in doubt.
    pub told_at: u64,
    /// What a holding page may say: "Installing dependencies", "Starting the dev server".
    pub progress: String,
}

impl PreviewStatus {
    /// No dev server, nothing wrong.
    pub fn off() -> Self {
        Self {
            state: PreviewState::Off,
            errors: Vec::new(),
            upstream: None,
            generation: 0,
            updates: 0,
            told_at: 0,
            progress: String::new(),
        }
    }
}
