//! The agent: one Claude Code CLI process on one thread's worktree, driven over its stream-json
//! protocol in both directions. It outlives turns; the thread's driver owns it.
//!
//! Facts about the CLI (events, endings, control requests) were measured with version 2.1.329.

mod command;
mod idle;
mod permission;
mod process;
mod protocol;
mod run;
mod wire;

pub use command::{AgentSettings, AgentSite, Ceiling, Limits, SessionStart};
pub use process::{Agent, AgentError, RunRequest};
pub use run::{Ending, RunEvent, RunOutcome};
