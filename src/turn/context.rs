//! What a thread remembers between turns: `.claude/threads/{thread}.json`. Derived from the
//! journals, kept for quick answers and for people who look.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    domain::{HistoryEntry, Plan, ThreadContext, TurnMode, TurnResult},
    identity::{ThreadId, ThreadKey},
    turn::journal::Accepted,
    workspace::WorkspaceError,
};

/// Entries that are kept; answers carry fewer.
const KEPT: usize = 500;
/// Entries that an answer carries, by the contract.
const ANSWERED: usize = 20;
/// Longest text of an entry, in bytes; the journal has it whole.
const MAX_TEXT: usize = 16 << 10;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredContext {
    pub thread_id: ThreadId,
    pub branch: String,
    /// The CLI's session, which the next turn resumes.
    pub session_id: Option<String>,
    pub history: Vec<HistoryEntry>,
    pub plans: Vec<Plan>,
    pub created: Timestamp,
    pub updated: Timestamp,
}

impl StoredContext {
    /// Of a thread without turns.
    pub fn new(key: &ThreadKey) -> Self {
        let now = Timestamp::now();
        Self {
            thread_id: key.thread.clone(),
            branch: key.branch(),
            session_id: None,
            history: Vec::new(),
            plans: Vec::new(),
            created: now,
            updated: now,
        }
    }

    /// Reads it; a new one if there is none. Blocking.
    ///
    /// # Errors
    /// [`WorkspaceError`].
    pub fn load(path: &Path, key: &ThreadKey) -> Result<Self, WorkspaceError> {
        Ok(crate::workspace::read_json(path)?.unwrap_or_else(|| Self::new(key)))
    }

    /// Replaces it. Blocking.
    ///
    /// # Errors
    /// [`WorkspaceError`].
    pub fn save(&self, path: &Path) -> Result<(), WorkspaceError> {
        crate::workspace::write_json(path, self)
    }

    /// Takes a turn's outcome in.
    pub fn record(&mut self, accepted: &Accepted, result: &TurnResult) {
        let at = Timestamp::now();
        let text = result.error.as_deref().filter(|_| result.text.is_empty());
        let text = cut(text.unwrap_or(&result.text));
        self.history.push(HistoryEntry {
            turn_id: result.turn_id.clone(),
            kind: result.kind,
            mode: result.mode,
            status: result.status,
            instruction: cut(&accepted.instruction),
            text: text.clone(),
            commit: result.commit.as_ref().map(|commit| commit.id.clone()),
            at,
        });
        if result.mode == TurnMode::Plan && result.error.is_none() {
            self.plans.push(Plan {
                turn_id: result.turn_id.clone(),
                instruction: cut(&accepted.instruction),
                text,
                at,
            });
        }
        keep_last(&mut self.history, KEPT);
        keep_last(&mut self.plans, KEPT);
        if let Some(session) = &result.session_id {
            self.session_id = Some(session.clone());
        }
        self.updated = at;
    }

    /// As answers show it.
    pub fn answer(&self) -> ThreadContext {
        let last = |len: usize| len.saturating_sub(ANSWERED);
        ThreadContext {
            thread_id: self.thread_id.clone(),
            branch: self.branch.clone(),
            history: self.history[last(self.history.len())..].to_vec(),
            plans: self.plans[last(self.plans.len())..].to_vec(),
        }
    }
}

fn keep_last<T>(entries: &mut Vec<T>, limit: usize) {
    let surplus = entries.len().saturating_sub(limit);
    entries.drain(..surplus);
}

/// The text, cut at a character's boundary, with a mark.
fn cut(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(MAX_TEXT);
    format!("{}…", &text[..end])
}

/// What a turn begins with when the CLI's own transcript is lost: the conversation so far, short.
pub fn replay_summary(context: &StoredContext) -> String {
    let mut summary = String::from(
        "<conversation-so-far>\nThe earlier conversation of this thread, oldest first. \
         Its edits are in the site already.\n",
    );
    for entry in &context.answer().history {
        let shorten = |text: &str| text[..text.floor_char_boundary(2000)].to_owned();
        summary.push_str(&format!(
            "\nThe person said: {}\nYou answered ({}): {}\n",
            shorten(&entry.instruction),
            entry.status.as_str(),
            shorten(&entry.text)
        ));
    }
    summary.push_str("</conversation-so-far>\n\n");
    summary
}
