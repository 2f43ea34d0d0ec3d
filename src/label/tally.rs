//! How far a batch is, and what it cost.

use std::time::Instant;

use super::outcome::{Code, Outcome, Progress, Summary};
use crate::domain::Usage;

#[derive(Debug)]
pub(super) struct Tally {
    total: usize,
    success: usize,
    failed: usize,
    cached: usize,
    interrupted: usize,
    /// Labelled by this start, and not known before.
    labelled: usize,
    captions_kept: usize,
    usage: Usage,
    reason: Option<String>,
    begun: Instant,
}

impl Tally {
    /// Of so many images, on which `usage` was spent before.
    pub(super) fn new(total: usize, usage: Usage) -> Self {
        Self {
            total,
            success: 0,
            failed: 0,
            cached: 0,
            interrupted: 0,
            labelled: 0,
            captions_kept: 0,
            usage,
            reason: None,
            begun: Instant::now(),
        }
    }

    /// What was spent, on all starts together.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// It stops before its end; the first reason counts.
    pub(super) fn stopped(&mut self, reason: String) {
        self.reason.get_or_insert(reason);
    }

    /// A caption stays as a person wrote it.
    pub(super) fn kept_a_caption(&mut self) {
        self.captions_kept += 1;
    }

    /// Counts an outcome; one that is not new was paid by an earlier start.
    pub(super) fn count(&mut self, outcome: &Outcome, is_new: bool) -> Progress {
        match outcome {
            Outcome::Labelled { cached, .. } => {
                self.success += 1;
                self.cached += usize::from(*cached);
                self.labelled += usize::from(is_new && !cached);
            }
            Outcome::Failed(failed) => {
                self.failed += 1;
                self.interrupted += usize::from(failed.code == Code::Interrupted);
            }
        }
        if is_new {
            self.usage = self.usage + outcome.usage();
        }
        self.progress()
    }

    fn progress(&self) -> Progress {
        let elapsed = self.begun.elapsed();
        let per_minute = match elapsed.as_secs_f64() {
            seconds if seconds > 0.0 => self.labelled as f64 * 60.0 / seconds,
            _ => 0.0,
        };
        let left = self.left() as f64;
        Progress {
            total: self.total,
            done: self.success + self.failed,
            success: self.success,
            failed: self.failed,
            cached: self.cached,
            cost_usd: self.usage.cost_usd,
            elapsed_ms: elapsed.as_millis() as u64,
            per_minute: (per_minute * 100.0).round() / 100.0,
            remaining_ms: (per_minute > 0.0).then(|| (left / per_minute * 60e3) as u64),
        }
    }

    fn left(&self) -> usize {
        self.total.saturating_sub(self.success + self.failed)
    }

    pub(super) fn summary(&self, batch: &str) -> Summary {
        let left = self.left();
        Summary {
            batch_id: batch.to_owned(),
            total: self.total,
            success: self.success,
            failed: self.failed,
            cached: self.cached,
            interrupted: self.interrupted,
            left,
            captions_kept: self.captions_kept,
            usage: self.usage,
            duration_ms: self.begun.elapsed().as_millis() as u64,
            reason: self.reason.clone().filter(|_| left > 0),
        }
    }
}
