//! Why a run gave no answer.

use std::{io, time::Duration};

use super::{MAX_WAITING, run::MAX_OUTPUT};
use crate::{
    domain::Verdict,
    process::{Excess, Exit, ProcessError},
    usage::Breach,
};

/// What a run left behind that did not succeed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// As a shell counts: 128 and the signal's number where one ended it.
    pub exit_code: Option<i32>,
    /// The end of its standard error, without secrets.
    pub stderr: String,
    /// The same of its standard output, where the CLI says most of its errors.
    pub output: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("greenroom is shutting down; ask again in a moment")]
    Draining,
    #[error("{MAX_WAITING} calls are waiting already; ask again when some are done")]
    QueueFull,
    #[error("most of the last runs failed, so none is tried for a moment; ask again then")]
    CircuitOpen { retry_after: Duration },
    #[error("the Claude Code CLI is not installed here; /ready and the log say what to do")]
    NotInstalled,
    #[error("the Claude Code CLI could not be started; /ready and the log say what is missing")]
    Start(#[source] ProcessError),
    #[error("failed to make the run's folder")]
    Folder(#[source] io::Error),
    #[error("{breach}; the operator can raise it")]
    OverBudget { breach: Breach },
    #[error(
        "the model API refused the credential; the operator has to set a valid ANTHROPIC_API_KEY \
         or CLAUDE_CREDENTIALS_FILE"
    )]
    CredentialRefused(Remains),
    #[error("the Claude Code CLI ended with {exit}; stderr and output have its own words")]
    Failed { exit: Exit, remains: Remains },
    #[error("the run took longer than {} s and was stopped", timeout.as_secs_f64())]
    TimedOut { timeout: Duration, remains: Remains },
    #[error("the run printed more than {} MB and was stopped", MAX_OUTPUT >> 20)]
    TooMuchOutput,
    #[error("the run {excess} and was stopped; the operator can allow more by {}", setting(*excess))]
    Exceeded { excess: Excess },
    /// Its caller went away, or the program stops.
    #[error("the run was stopped before its end")]
    Cancelled,
}

impl ServiceError {
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            Self::Draining
            | Self::QueueFull
            | Self::CircuitOpen { .. }
            | Self::OverBudget { .. }
            | Self::Cancelled => Verdict::Unknown,
            Self::NotInstalled
            | Self::Start(_)
            | Self::Folder(_)
            | Self::CredentialRefused(_)
            | Self::Failed { .. }
            | Self::TimedOut { .. }
            | Self::TooMuchOutput
            | Self::Exceeded { .. } => Verdict::Failure,
        }
    }

    /// A label for figures.
    pub(super) fn outcome(&self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::QueueFull => "queue_full",
            Self::CircuitOpen { .. } => "circuit_open",
            Self::OverBudget { .. } => "over_budget",
            Self::TimedOut { .. } => "timed_out",
            Self::Cancelled => "cancelled",
            Self::Exceeded { .. } => "exceeded",
            _ => "failed",
        }
    }
}

/// Only labels have an allowance.
fn setting(excess: Excess) -> &'static str {
    match excess {
        Excess::Memory { .. } => "LABEL_MEMORY_MB",
        Excess::Processor { .. } => "LABEL_CPU_SECONDS",
        Excess::Processes { .. } => "LABEL_MAX_PROCESSES",
    }
}
