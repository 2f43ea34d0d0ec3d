//! How many images of a batch are under way, and how many get ready meanwhile.
//!
//! ```text
//! get ready (as many as workers) ─► CLI, picture, request ─► held at the gateway ─► turn ─► sent ─► answered
//! ```
//!
//! Half a second of a processor goes by before a CLI asks, and a model thinks for longer: so the run of
//! the next image begins while this one's request is answered, and its own request waits at the
//! gateway ([`Gate::after`]) until it has its turn. It is as fresh as any other and confined like it.
//! Nobody is started ahead while somebody waits for an answer of theirs ([`Busy`]); and whoever has
//! waited for [`IDLE`] is ended, and begun again with its turn.
//!
//! [`Gate::after`]: crate::gateway::Gate::after

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::batch::Busy;
use crate::{gateway::Pass, service::Service};

/// One that waits holds as much memory as one that works.
pub(super) const IDLE: Duration = Duration::from_secs(60);
/// How often it is looked whether somebody may go on whom nobody tells.
const LOOK: Duration = Duration::from_millis(100);
pub(super) const STOPPED: &str =
    "it was stopped before its end, and goes on when it is started again or resumed";

/// The pace of a batch.
#[derive(Debug)]
pub(super) struct Pace {
    /// Images under way at once, at most.
    workers: usize,
    /// Most that the batch may spend, in US dollars.
    most_usd: Option<f64>,
    busy: Busy,
    preparing: Semaphore,
    under_way: Mutex<usize>,
    freed: Notify,
    stop: CancellationToken,
}

impl Pace {
    pub(super) fn new(
        workers: usize,
        most_usd: Option<f64>,
        busy: Busy,
        stop: CancellationToken,
    ) -> Self {
        let workers = workers.max(1);
        Self {
            workers,
            most_usd,
            busy,
            preparing: Semaphore::new(workers),
            under_way: Mutex::new(0),
            freed: Notify::new(),
            stop,
        }
    }

    fn under_way(&self) -> MutexGuard<'_, usize> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does somebody wait who comes first?
    pub(super) fn is_busy(&self) -> bool {
        (self.busy.0)()
    }

    /// Is a turn over with the answer, though its cost is not counted yet? Not where that decides
    /// who comes next.
    pub(super) fn ends_with_answer(&self) -> bool {
        self.most_usd.is_none()
    }

    /// Waits until one more may get ready; `None`: the batch stops.
    pub(super) async fn prepare(&self) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            permit = self.preparing.acquire() => permit.ok(),
        }
    }

    /// Waits until one more image may be under way, which costs `worst` at most, in US dollars, and of
    /// which the batch has spent so much.
    ///
    /// # Errors
    /// Why there will be no more.
    pub(super) async fn turn(
        &self,
        worst: f64,
        spent: impl Fn() -> f64,
    ) -> Result<Turn<'_>, String> {
        loop {
            // Heard also where it comes between the look and the wait.
            let freed = self.freed.notified();
            if self.stop.is_cancelled() {
                return Err(STOPPED.to_owned());
            }
            let spent = spent();
            let is_over = |count: usize| {
                let held = worst * count as f64;
                self.most_usd.is_some_and(|most| spent + held > most)
            };
            if is_over(1) {
                let most = self.most_usd.unwrap_or_default();
                return Err(format!(
                    "one more image might cost ${worst:.4}, and of the batch's own limit of \
                     ${most:.2} ${spent:.4} is spent; raise it, or leave it out"
                ));
            }
            let is_busy = self.is_busy();
            {
                let mut under_way = self.under_way();
                let may = *under_way < self.workers
                    && (*under_way == 0 || !(is_busy || is_over(*under_way + 1)));
                if may {
                    *under_way += 1;
                    return Ok(Turn(self));
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = freed => {}
                () = sleep(LOOK) => {}
            }
        }
    }
}

/// An image is under way.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Pace);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.under_way() -= 1;
        self.0.freed.notify_one();
    }
}

/// Where the request of one run waits for its turn.
#[derive(Debug)]
pub(super) struct Door {
    open: watch::Sender<bool>,
    knocked: Arc<Notify>,
    answered: Arc<Notify>,
}

impl Door {
    pub(super) fn new() -> Self {
        Self {
            open: watch::Sender::new(false),
            knocked: Arc::default(),
            answered: Arc::default(),
        }
    }

    /// What a request waits for: that it is opened, and for one of the service's slots.
    pub(super) fn waiting(
        &self,
        service: &Service,
    ) -> impl Fn() -> BoxFuture<'static, Pass> + Send + Sync + 'static {
        let (opened, service) = (self.open.subscribe(), service.clone());
        let (knocked, answered) = (self.knocked.clone(), self.answered.clone());
        move || {
            let (mut opened, service) = (opened.clone(), service.clone());
            let (knocked, answered) = (knocked.clone(), answered.clone());
            Box::pin(async move {
                knocked.notify_one();
                if opened.wait_for(|is_open| *is_open).await.is_err() {
                    // Nobody opens it any more: the run is being ended.
                    std::future::pending::<()>().await;
                }
                let slot = service.slot().await;
                Pass::new(move || {
                    drop(slot);
                    answered.notify_one();
                })
            })
        }
    }

    /// A request waits.
    pub(super) async fn knocked(&self) {
        self.knocked.notified().await;
    }

    /// Lets this request through, and any that follows it.
    pub(super) fn open(&self) {
        self.open.send_replace(true);
    }

    /// One was answered.
    pub(super) async fn answered(&self) {
        self.answered.notified().await;
    }
}
