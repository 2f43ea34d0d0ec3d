//! What the service did so far: calls, how they ended, how long they took.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use utoipa::ToSchema;

/// What the service did so far, as its callers' monitors read it. Times in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Well-formed calls, those that were refused included.
    pub total_requests: u64,
    pub successful_requests: u64,
    pub failed_requests: u64,
    /// Of the successful ones.
    pub average_execution_time: f64,
    /// Under way now, those in line included.
    pub active_requests: u64,
}

/// All calls. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    figures: Figures,
    took: Duration,
}

/// One call; one that is dropped before its end was cancelled.
#[derive(Debug)]
pub(super) struct Call {
    calls: Calls,
    began: Instant,
    is_over: bool,
}

impl Calls {
    pub(super) fn begin(&self) -> Call {
        let mut counts = self.counts();
        counts.figures.total_requests += 1;
        counts.figures.active_requests += 1;
        drop(counts);
        Call {
            calls: self.clone(),
            began: Instant::now(),
            is_over: false,
        }
    }

    pub(super) fn figures(&self) -> Figures {
        let counts = self.counts();
        let mut figures = counts.figures;
        if figures.successful_requests > 0 {
            let mean = counts.took.as_secs_f64() * 1e3 / figures.successful_requests as f64;
            figures.average_execution_time = (mean * 100.0).round() / 100.0;
        }
        figures
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Call {
    /// How it ended; `run` is how long its run took, where that succeeded.
    pub(super) fn end(&mut self, outcome: &'static str, run: Option<Duration>) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        let mut counts = self.calls.counts();
        counts.figures.active_requests -= 1;
        match run {
            Some(took) => {
                counts.figures.successful_requests += 1;
                counts.took += took;
            }
            None => counts.figures.failed_requests += 1,
        }
        drop(counts);
        metrics::counter!("greenroom_service_calls_total", "outcome" => outcome).increment(1);
        if let Some(took) = run {
            metrics::histogram!("greenroom_service_run_duration_seconds")
                .record(took.as_secs_f64());
        }
        tracing::info!(
            outcome,
            elapsed_ms = self.began.elapsed().as_millis() as u64,
            "a one-shot call ended"
        );
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end("cancelled", None);
    }
}
