//! A thread's past, newest turn first, read of its journals: of each its first and its last line
//! alone, and of no more turns than are looked at.

use std::collections::HashMap;

use super::journal::{Accepted, JournalError, TurnFile};
use crate::{
    domain::{CommitSummary, ErrorCode, TurnKind, TurnStatus, Usage},
    identity::{ThreadKey, TurnId},
    workspace::ThreadPaths,
};

/// One turn.
#[derive(Debug, Clone)]
pub struct PastTurn {
    pub accepted: Accepted,
    /// `None` while it waits or runs.
    pub outcome: Option<PastOutcome>,
}

/// How a turn ended: its result without what an answer adds.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PastOutcome {
    pub status: TurnStatus,
    pub text: String,
    pub commit: Option<CommitSummary>,
    pub usage: Usage,
    pub duration_ms: u64,
    /// See [`Effect`](crate::domain::Effect).
    pub undone: Option<TurnId>,
    pub redone: Option<TurnId>,
    pub restored: Option<String>,
    pub error: Option<String>,
    pub code: Option<ErrorCode>,
}

impl PastTurn {
    /// The turn.
    pub fn id(&self) -> &TurnId {
        &self.accepted.turn_id
    }

    /// The commit that it made.
    pub fn commit(&self) -> Option<&CommitSummary> {
        self.outcome.as_ref()?.commit.as_ref()
    }
}

/// The turns of a thread, newest first. Reading blocks; a journal that cannot be read is left out.
#[derive(Debug)]
pub struct Past(std::vec::IntoIter<TurnFile>);

impl Past {
    /// Lists them. Blocking.
    pub fn of(paths: &ThreadPaths, key: &ThreadKey) -> Self {
        let entries = std::fs::read_dir(paths.turns()).into_iter().flatten();
        let mut ids: Vec<TurnId> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                TurnId::of_sequence(key, name.strip_suffix(".jsonl")?).ok()
            })
            .collect();
        ids.sort_unstable_by(|a, b| b.cmp(a));
        let files: Vec<_> = ids.into_iter().map(|id| TurnFile::new(paths, id)).collect();
        Self(files.into_iter())
    }
}

impl Iterator for Past {
    type Item = PastTurn;

    fn next(&mut self) -> Option<PastTurn> {
        loop {
            let file = self.0.next()?;
            let read = || -> Result<_, JournalError> {
                Ok(PastTurn {
                    accepted: file.accepted()?,
                    outcome: file.past_outcome()?,
                })
            };
            match read() {
                Ok(turn) => return Some(turn),
                Err(error) => tracing::warn!(%error, "a turn is left out of the history"),
            }
        }
    }
}

/// Which turns were taken back. An operation comes after what it takes back, so walking newest
/// first one look at each turn tells.
#[derive(Debug, Default)]
pub struct Undone(HashMap<TurnId, TurnId>);

impl Undone {
    /// The turn that took this one back, if any. To be asked of each turn, newest first.
    ///
    /// What a turn had taken back is in force again once that turn is itself taken back.
    pub fn by(&mut self, turn: &PastTurn) -> Option<TurnId> {
        let by = self.0.get(turn.id()).cloned();
        if by.is_none()
            && let Some(undone) = turn.outcome.as_ref().and_then(|end| end.undone.clone())
        {
            self.0.entry(undone).or_insert_with(|| turn.id().clone());
        }
        by
    }
}

/// The turn that an undo is for: the newest one that is not undone, or a named one. With the one
/// that undid it, if it is undone already; the default one never is.
pub fn undo_target(past: Past, named: Option<&TurnId>) -> Option<(PastTurn, Option<TurnId>)> {
    let mut undone = Undone::default();
    for turn in past {
        let by = undone.by(&turn);
        let is_meant = match named {
            Some(id) => turn.id() == id,
            None => {
                let is_change = !matches!(turn.accepted.kind, TurnKind::Undo | TurnKind::Redo);
                is_change && by.is_none() && turn.commit().is_some()
            }
        };
        if is_meant {
            return Some((turn, by));
        }
    }
    None
}

/// The undo that a redo is for: the newest one that is in force, or the one of a named turn.
pub fn redo_target(past: Past, named: Option<&TurnId>) -> Option<PastTurn> {
    let mut undone = Undone::default();
    for turn in past {
        if undone.by(&turn).is_some() || turn.accepted.kind != TurnKind::Undo {
            continue;
        }
        let Some(outcome) = &turn.outcome else {
            continue;
        };
        let is_meant = match named {
            Some(id) => turn.id() == id || outcome.undone.as_ref() == Some(id),
            None => outcome.undone.is_some(),
        };
        if is_meant {
            return Some(turn);
        }
    }
    None
}
