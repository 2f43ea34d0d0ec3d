//! CLIs that are started before there is anything to ask them.
//!
//! A start takes half a second of a processor that has nothing else to do while a model thinks. In a
//! [`Series`] of runs that is the time in which the CLI of the next one starts. Each is as fresh as
//! any other, and confined like it, with folders and a token of its own that opens nothing yet; it
//! serves one run or none. It is ended where nobody took it for [`IDLE`], where no more runs are to
//! come than are under way, and with its series.
//!
//! Each has a task that holds it until it is claimed.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::sleep};

use super::{Args, RunSite, Service, ServiceError, run, scratch::Scratch};
use crate::{gateway::AgentToken, process::Child};

/// One that waits holds as much memory as one that works: [`Series::waiting`].
const IDLE: Duration = Duration::from_secs(60);

/// A CLI that runs and was not told anything.
#[derive(Debug)]
pub(super) struct Fresh {
    pub(super) child: Child,
    pub(super) scratch: Scratch,
    pub(super) token: AgentToken,
}

impl Fresh {
    pub(super) async fn start(
        service: &Service,
        args: &Args,
        site: &RunSite,
    ) -> Result<Self, ServiceError> {
        let inner = &*service.0;
        let agent = inner.settings.agent.as_ref();
        let agent = agent.ok_or(ServiceError::NotInstalled)?;
        let owners = inner.launcher.runs_as_owners();
        let place = site.write.first().cloned();
        let scratch = Scratch::make(&inner.settings.scratch, owners, place).await;
        let scratch = scratch.map_err(ServiceError::Folder)?;
        let token = inner.gateway.issue();
        let spec = run::spec(agent, site, &scratch, args, token.as_str());
        match inner.launcher.spawn(spec).await {
            Ok(child) => Ok(Self {
                child,
                scratch,
                token,
            }),
            Err(error) => {
                scratch.remove().await;
                Err(ServiceError::Start(error))
            }
        }
    }

    async fn end(self) {
        self.child.handle().kill().await;
        self.scratch.remove().await;
    }
}

/// Runs that come one after another, or a few at a time, in throw-away folders. Cheap to clone; with
/// the last clone all that waits is ended.
#[derive(Debug, Clone)]
pub struct Series(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    service: Service,
    at_once: usize,
    /// A CLI that nobody takes for so long is ended.
    idle: Duration,
    /// Runs without an end, those under way among them.
    left: usize,
    under_way: usize,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    args: Args,
    /// Where it is to be handed to. Dropped, it is ended.
    claim: oneshot::Sender<oneshot::Sender<Fresh>>,
}

/// A run of a series. Dropping it tells the series that it is over.
#[derive(Debug)]
pub(super) struct Member<'a> {
    series: &'a Series,
    args: &'a Args,
}

impl Service {
    /// A series of `left` runs, `at_once` of them under way together at most.
    pub fn series(&self, at_once: usize, left: usize) -> Series {
        Series(Arc::new(Mutex::new(State {
            service: self.clone(),
            at_once,
            idle: IDLE,
            left,
            under_way: 0,
            waiting: VecDeque::new(),
        })))
    }
}

impl Series {
    /// The same where a CLI waits so long at most for a run that takes it; a minute else.
    pub fn waiting(self, at_most: Duration) -> Self {
        self.state().idle = at_most;
        self
    }

    /// Only so many runs are without an end by now, those under way among them.
    pub fn set_left(&self, left: usize) {
        let mut state = self.state();
        state.left = left;
        let most = state.wanted();
        state.waiting.truncate(most);
    }

    /// Counts a run in.
    pub(super) fn enter<'a>(&'a self, args: &'a Args) -> Member<'a> {
        self.state().under_way += 1;
        Member { series: self, args }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// How many CLIs may wait.
    fn wanted(&self) -> usize {
        self.at_once.min(self.left.saturating_sub(self.under_way))
    }
}

impl Member<'_> {
    /// A CLI that waits with this very command line, if there is one.
    pub(super) async fn take(&self) -> Option<Fresh> {
        loop {
            let waiting = {
                let mut state = self.series.state();
                let at = state
                    .waiting
                    .iter()
                    .position(|waiting| waiting.args == *self.args)?;
                state.waiting.remove(at)?
            };
            let (reply, fresh) = oneshot::channel();
            // Else it ended meanwhile, or could not be started.
            if waiting.claim.send(reply).is_ok()
                && let Ok(fresh) = fresh.await
            {
                return Some(fresh);
            }
        }
    }

    /// Starts the CLI of one more run, if there will be one.
    pub(super) fn start_next(&self) {
        let (claim, claimed) = oneshot::channel();
        let (service, idle) = {
            let mut state = self.series.state();
            state.waiting.retain(|waiting| !waiting.claim.is_closed());
            if state.waiting.len() >= state.wanted() {
                return;
            }
            let args = self.args.clone();
            state.waiting.push_back(Waiting { args, claim });
            (state.service.clone(), state.idle)
        };
        let (args, tasks) = (self.args.clone(), service.0.tasks.clone());
        tasks.spawn("a CLI started ahead", async move {
            match Fresh::start(&service, &args, &RunSite::default()).await {
                Ok(fresh) => hold(fresh, claimed, idle).await,
                // The run that would have had it says so.
                Err(error) => tracing::debug!(%error, "no CLI could be started ahead"),
            }
        });
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.series.state().under_way -= 1;
    }
}

/// Hands it over to whoever claims it.
async fn hold(fresh: Fresh, claimed: oneshot::Receiver<oneshot::Sender<Fresh>>, idle: Duration) {
    let process = fresh.child.handle();
    let reply = tokio::select! {
        biased;
        reply = claimed => reply.ok(),
        _ = process.wait() => None,
        () = sleep(idle) => None,
    };
    let left = match reply {
        Some(reply) => reply.send(fresh).err(),
        None => Some(fresh),
    };
    if let Some(fresh) = left {
        fresh.end().await;
    }
}
