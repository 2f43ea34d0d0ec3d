//! One instruction, from admission to outcome: its journal, its run, and what the thread
//! remembers of it.
//!
//! **Invariant:** an event is in the journal before anyone sees it. Whoever follows a turn reads
//! the journal's file up to the committed length, so what is seen live and what is replayed after
//! a restart are the same bytes, and a slow reader slows nobody.

mod apart;
mod context;
mod history;
mod journal;
mod operation;
mod reconcile;
mod run;

pub use context::{StoredContext, replay_summary};
pub use history::{Past, PastTurn, Undone, redo_target, undo_target};
pub use journal::{
    Accepted, Committed, EventLine, Events, Journal, JournalError, TurnFile, TurnRecord,
};
pub use run::{
    Folder, Outcome, Outcomes, RunEnd, RunError, TurnSite, blank_result, run_turn, tell_outcome,
};
