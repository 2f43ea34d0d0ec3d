//! How far a publication is. Written by the one that publishes, looked at by whoever shows it.

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The Hub is asked what it has.
    Asking,
    /// Files are read for their sums.
    Reading,
    Uploading,
    Committing,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub stage: Stage,
    /// The file under way, by its name in the repository.
    pub file: String,
    /// Bytes of the stage.
    pub done: u64,
    pub total: u64,
    /// Since the stage began.
    pub elapsed: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Meter(Mutex<State>);

#[derive(Debug)]
struct State {
    stage: Stage,
    file: String,
    done: u64,
    total: u64,
    begun: Instant,
    moved: Instant,
}

impl Default for Meter {
    fn default() -> Self {
        let now = Instant::now();
        Self(Mutex::new(State {
            stage: Stage::Asking,
            file: String::new(),
            done: 0,
            total: 0,
            begun: now,
            moved: now,
        }))
    }
}

impl Meter {
    /// Where it stands now.
    pub fn progress(&self) -> Progress {
        let state = self.state();
        Progress {
            stage: state.stage,
            file: state.file.clone(),
            done: state.done,
            total: state.total,
            elapsed: state.begun.elapsed(),
        }
    }

    pub(super) fn begin(&self, stage: Stage, total: u64) {
        let now = Instant::now();
        *self.state() = State {
            stage,
            file: String::new(),
            done: 0,
            total,
            begun: now,
            moved: now,
        };
    }

    pub(super) fn file(&self, name: &str) {
        name.clone_into(&mut self.state().file);
    }

    /// Bytes of the stage that are done; answers them.
    pub(super) fn done(&self) -> u64 {
        self.state().done
    }

    /// Goes to a place, backwards too where something is done again.
    pub(super) fn set(&self, done: u64) {
        let mut state = self.state();
        state.done = done;
        state.moved = Instant::now();
    }

    pub(super) fn add(&self, bytes: u64) {
        let mut state = self.state();
        state.done += bytes;
        state.moved = Instant::now();
    }

    /// Leaves out what needs not be done.
    pub(super) fn skip(&self, bytes: u64) {
        let mut state = self.state();
        state.total = state.total.saturating_sub(bytes);
    }

    /// For how long it has not moved.
    pub(super) fn still(&self) -> Duration {
        self.state().moved.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
