//! One run: what happens during it, how it ends, and what is gathered meanwhile.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::{sync::mpsc, time::Instant};

use super::{Limits, protocol::CliResult};
use crate::{
    domain::{TurnMode, Usage},
    gateway::UpstreamNote,
    usage::{Breach, Spent, Warning},
};

/// Most text of one run that is gathered for its result.
const MAX_TEXT: usize = 256 << 10;

/// What happens during a run.
#[derive(Debug, Clone, PartialEq)]
pub enum RunEvent {
    Text(String),
    ToolStarted {
        id: String,
        name: String,
        input: Value,
    },
    ToolFinished {
        id: String,
        ok: bool,
        summary: String,
    },
    /// Absolute path, as the CLI names it.
    FileTouched {
        path: String,
        is_new: bool,
    },
    Waiting {
        until: Timestamp,
        reason: String,
    },
    /// A budget is nearly used up.
    BudgetWarning(Warning),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    Completed,
    /// With a sentence for a person.
    Failed(String),
    Cancelled,
    TimedOut,
    /// No request of its goes up any more.
    OverBudget(Breach),
    /// The CLI does not know the conversation that it was to resume; nothing was done.
    SessionLost,
}

/// All that is known of a run that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct RunOutcome {
    pub ending: Ending,
    pub text: String,
    /// What was used, also by a run that was cut off. It is what the CLI told; of a process that
    /// ended without a result the tokens are those seen on their way, and the cost is the gateway's.
    pub usage: Usage,
    pub num_turns: u64,
    pub session_id: Option<String>,
    pub model: Option<String>,
    /// Absolute paths of files that tools wrote.
    pub touched: BTreeSet<String>,
    /// Something that it started could not be ended (stuck in the kernel) and may still run.
    pub left_running: bool,
    /// What the gateway counted of it.
    pub counted: Spent,
}

/// Whose turn the CLI is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has not begun ours yet.
    Before,
    /// It is at one of its own, and ours waits in its queue.
    Foreign,
    Ours,
}

/// What is gathered while a run goes on.
pub(super) struct Run {
    pub(super) mode: TurnMode,
    /// The id that our message has.
    pub(super) message: String,
    pub(super) stage: Stage,
    pub(super) session_id: Option<String>,
    pub(super) model: Option<String>,
    pub(super) touched: BTreeSet<String>,
    pub(super) open_tools: BTreeSet<String>,
    /// No silence counts before this.
    pub(super) heard: Instant,
    events: mpsc::Sender<RunEvent>,
    text: String,
    usage: Usage,
    /// The answers before the one under way, and that one.
    counted: (Usage, Usage),
    num_turns: u64,
}

impl Run {
    pub(super) fn new(mode: TurnMode, message: String, events: mpsc::Sender<RunEvent>) -> Self {
        Self {
            mode,
            message,
            stage: Stage::Before,
            session_id: None,
            model: None,
            touched: BTreeSet::new(),
            open_tools: BTreeSet::new(),
            heard: Instant::now(),
            events,
            text: String::new(),
            usage: Usage::default(),
            counted: Default::default(),
            num_turns: 0,
        }
    }

    /// When silence becomes a failure; `begin` is for a turn that has not begun. A tool may take as
    /// long as the turn may.
    pub(super) fn stall_at(&self, limits: Limits, begin: Duration) -> Instant {
        match self.stage {
            Stage::Before | Stage::Foreign => self.heard + begin,
            Stage::Ours if self.open_tools.is_empty() => self.heard + limits.stall,
            Stage::Ours => self.heard + Duration::from_secs(86_400),
        }
    }

    pub(super) async fn tell(&self, event: RunEvent) {
        // The turn reads until the run is over.
        self.events.send(event).await.ok();
    }

    pub(super) fn add_text(&mut self, text: &str) {
        if self.text.len() + text.len() <= MAX_TEXT {
            self.text.push_str(text);
        }
    }

    /// Text before a tool call and after it are two paragraphs.
    pub(super) fn end_paragraph(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push_str("\n\n");
        }
    }

    /// The model begins another answer.
    pub(super) fn start_answer(&mut self, usage: Usage) {
        self.num_turns += 1;
        self.counted.0 = self.counted_usage();
        self.counted.1 = usage;
    }

    /// The tokens of the answer under way, as far as it has come.
    pub(super) fn count_answer(&mut self, usage: Usage) {
        let now = &mut self.counted.1;
        now.input_tokens = now.input_tokens.max(usage.input_tokens);
        now.output_tokens = now.output_tokens.max(usage.output_tokens);
        now.cache_read_tokens = now.cache_read_tokens.max(usage.cache_read_tokens);
        now.cache_creation_tokens = now.cache_creation_tokens.max(usage.cache_creation_tokens);
    }

    fn counted_usage(&self) -> Usage {
        let (before, now) = self.counted;
        Usage {
            cost_usd: 0.0,
            ..before + now
        }
    }

    /// Takes the CLI's result in. `cost_before` is what the process had told before this turn, for
    /// a CLI that does not tell the turn's own cost.
    pub(super) fn take_in(&mut self, result: &CliResult, cost_before: f64) {
        self.usage = result.since_last.unwrap_or(Usage {
            cost_usd: (result.usage.cost_usd - cost_before).max(0.0),
            ..result.usage
        });
        self.num_turns = result.num_turns;
        if !result.session_id.is_empty() {
            self.session_id = Some(result.session_id.clone());
        }
        if !result.is_error {
            let end = result.text.floor_char_boundary(MAX_TEXT);
            result.text[..end].clone_into(&mut self.text);
        }
    }

    pub(super) fn outcome(self, ending: Ending, left_running: bool, counted: Spent) -> RunOutcome {
        let seen = self.counted_usage();
        let tokens = |usage: &Usage| {
            usage.input_tokens
                + usage.output_tokens
                + usage.cache_read_tokens
                + usage.cache_creation_tokens
        };
        // Without a result, or with one that counts nothing of an aborted stream.
        let mut usage = if tokens(&self.usage) == 0 {
            Usage {
                cost_usd: self.usage.cost_usd,
                ..seen
            }
        } else {
            self.usage
        };
        if usage.cost_usd == 0.0 {
            usage.cost_usd = counted.usd;
        }
        RunOutcome {
            ending,
            text: self.text,
            usage,
            num_turns: self.num_turns,
            session_id: self.session_id,
            model: self.model,
            touched: self.touched,
            left_running,
            counted,
        }
    }
}

const CONVERSATION_LOST: &str = "No conversation found";

/// Does the CLI say that it does not know the conversation?
pub(super) fn is_conversation_lost(text: &str) -> bool {
    text.contains(CONVERSATION_LOST)
}

pub(super) fn stalled() -> Ending {
    failed("The model stopped answering in the middle. The edits so far are kept")
}

pub(super) fn never_began() -> Ending {
    failed("The agent's program did not begin with the instruction")
}

/// What the CLI did wrong, without a full stop: what to do is the same.
pub(super) fn failed(what: &str) -> Ending {
    Ending::Failed(format!("{what}; please send the instruction again."))
}

pub(super) fn credential_refused() -> Ending {
    Ending::Failed(
        "The model API refused the credential. The operator has to set a valid ANTHROPIC_API_KEY \
         or CLAUDE_CREDENTIALS_FILE."
            .into(),
    )
}

/// What a result that is an error means to a person. `note` is how the upstream last met the run.
pub(super) fn failure(result: &CliResult, note: Option<UpstreamNote>) -> Ending {
    let wait = match note {
        Some(UpstreamNote::Answered {
            retry_after: Some(pause),
            ..
        }) => Some(format!("please try again after {}", clock(pause))),
        _ => None,
    };
    let wait = wait.as_deref().unwrap_or("please try again in a while");
    let sentence = match result.api_error_status {
        Some(401 | 403) => return credential_refused(),
        Some(429) => format!("The model API limits the rate; {wait}."),
        Some(500..) => format!("The model API is overloaded or down; {wait}."),
        Some(413) => "The conversation has become too long for the model; please begin a new \
                      thread for what comes next."
            .into(),
        Some(404) => "The model API does not know the model; please choose another one.".into(),
        Some(status) => format!(
            "The model API refused the request (status {status}); the operator finds its reason \
             in the log."
        ),
        None if result.subtype == "error_max_budget_usd" => {
            "The turn has used up its budget; the edits so far are kept.".into()
        }
        None if result.terminal_reason.starts_with("aborted") => {
            return failed("The turn was stopped. The edits so far are kept");
        }
        None => return failed("The agent could not finish. The edits so far are kept"),
    };
    Ending::Failed(sentence)
}

/// A time of the day that lies so far ahead, rounded up to a minute.
fn clock(ahead: Duration) -> String {
    let at = SystemTime::now() + ahead + Duration::from_secs(59);
    Timestamp::try_from(at).map_or_else(
        |_| "a long time".into(),
        |at| at.strftime("%H:%M UTC").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(input: u64, output: u64) -> Usage {
        Usage {
            input_tokens: input,
            output_tokens: output,
            ..Usage::default()
        }
    }

    fn run() -> Run {
        Run::new(TurnMode::Execute, "m".into(), mpsc::channel(1).0)
    }

    #[test]
    fn a_run_without_a_result_has_the_tokens_that_were_seen() {
        let mut run = run();
        run.start_answer(tokens(100, 1));
        run.count_answer(tokens(100, 40));
        run.start_answer(tokens(200, 1));
        run.count_answer(tokens(0, 7));
        let counted = Spent {
            usd: 0.5,
            ..Spent::default()
        };
        let outcome = run.outcome(Ending::Cancelled, false, counted);
        let expected = Usage {
            cost_usd: 0.5,
            ..tokens(300, 47)
        };
        assert_eq!(outcome.usage, expected);
        assert_eq!(outcome.num_turns, 2);
    }

    #[test]
    fn the_cost_of_a_resumed_conversation_is_not_counted_again() {
        let mut run = run();
        let since_last = Usage {
            cost_usd: 0.25,
            ..tokens(1, 2)
        };
        let result = CliResult {
            usage: Usage {
                cost_usd: 7.25,
                ..tokens(0, 0)
            },
            since_last: Some(since_last),
            ..CliResult::default()
        };
        run.take_in(&result, 0.0);
        assert_eq!(
            run.outcome(Ending::Completed, false, Spent::default())
                .usage,
            since_last
        );
    }

    #[test]
    fn a_failure_says_what_to_do() {
        let sentence = |status, retry_after: Option<u64>| {
            let result = CliResult {
                is_error: true,
                api_error_status: status,
                ..CliResult::default()
            };
            let note = UpstreamNote::Answered {
                status: status.unwrap_or(200) as u16,
                retry_after: retry_after.map(Duration::from_secs),
            };
            match failure(&result, Some(note)) {
                Ending::Failed(sentence) => sentence,
                other => panic!("{other:?}"),
            }
        };
        let until = sentence(Some(429), Some(3600));
        assert!(
            until.contains("try again after") && until.contains("UTC"),
            "{until}"
        );
        assert!(sentence(Some(529), None).contains("in a while"));
        assert!(sentence(Some(401), None).contains("ANTHROPIC_API_KEY"));
        assert!(sentence(Some(400), None).contains("status 400"));
        assert!(sentence(None, None).contains("send the instruction again"));
    }
}
