//! The one-shot service: a prompt in, the Claude Code CLI's answer out, in a throw-away folder or
//! in a place that the caller of this room prepared.
//!
//! ```text
//! admit (draining? circuit? room in line?) ─► wait for a slot ─► circuit ─► folder, token, CLI ─► answer
//! ```
//!
//! A run starts through the same launcher, confinement and gateway as an agent's turn; what it may
//! touch is data ([`RunSite`]). So many run at once, so many more wait in line, the rest is refused.
//! [`Service::execute`] runs it in a task of its own, so that it ends in order (SIGTERM, 5 s,
//! SIGKILL) when its caller goes away. State: the slots, the [breaker](Breaker), the figures.

mod args;
mod error;
mod figures;
mod run;
mod scratch;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use args::{Args, BadArgs, Lean, is_model_name};
pub use error::{Remains, ServiceError};
pub use figures::Figures;
pub use run::RunSite;

use figures::{Call, Calls};
use run::End;
use scratch::Scratch;

use crate::{
    agent::AgentSettings,
    domain::{Account, Breaker, BreakerState, Pass, Usage, Verdict},
    gateway::{ActiveRun, Gate, Gateway},
    process::{Allowance, Exit, Launcher},
    task::Tasks,
    usage::{Denied, Ledger, Spent},
};

/// Runs that may wait for a slot, by the contract.
const MAX_WAITING: usize = 100;
/// A failed run's output is told from its end.
const OUTPUT_TAIL: usize = 8 << 10;
/// For a connection's end to be noticed.
const LAST_COUNT: Duration = Duration::from_secs(2);
/// How often it is looked at what a run sent.
const LOOK: Duration = Duration::from_millis(5);
/// The answer of [`Service::probe`] is good for so long: anybody may ask for it.
const PROBE_LASTS: Duration = Duration::from_secs(60);
const FAILED_PROBE_LASTS: Duration = Duration::from_secs(10);
const PROBE_LIMIT: Duration = Duration::from_secs(60);
const PROBE: &str = "This is a health check. Answer with the one word: OK";

/// What the service works by.
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    /// `None`: the CLI is missing.
    pub agent: Option<Arc<AgentSettings>>,
    /// Runs at once.
    pub max_concurrent: usize,
    /// Where throw-away folders are made; private, on the container's own disk.
    pub scratch: PathBuf,
    /// What one run may take of the machine; `None`: as much as any child.
    pub allowance: Option<Allowance>,
    /// Takes secrets out of a text.
    pub mask: fn(&str) -> String,
}

/// What is asked of the CLI.
#[derive(Debug, Clone)]
pub struct Shot {
    pub prompt: String,
    pub args: Args,
    /// From the run's start; waiting in line does not count.
    pub timeout: Duration,
    /// Who pays.
    pub account: Account,
    /// Asked about each of its requests. A run that has one is over with its first answer: it
    /// succeeded then, however the CLI ends.
    /// One that waits ([`Gate::after`]) is a run that is started ahead: it has no slot, and takes one
    /// ([`Service::slot`]) when it lets a request pass.
    pub gate: Option<Gate>,
}

/// What the CLI answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Its standard output.
    pub output: String,
    /// Of the run itself.
    pub duration: Duration,
}

/// A run that is over.
#[derive(Debug)]
pub struct Ran {
    pub answer: Result<Answer, ServiceError>,
    /// What it spent, also where there is no answer.
    pub usage: Usage,
    /// Requests that were answered, wholly or in part: those that cost something.
    pub answered: u64,
}

impl From<ServiceError> for Ran {
    /// One that spent nothing.
    fn from(error: ServiceError) -> Self {
        Self {
            answer: Err(error),
            usage: Usage::default(),
            answered: 0,
        }
    }
}

impl Answer {
    /// What the model said last, whatever form was asked for.
    pub fn text(&self) -> String {
        let last = self.output.trim().lines().next_back().unwrap_or_default();
        let result = serde_json::from_str::<serde_json::Value>(last)
            .ok()
            .and_then(|event| event.get("result")?.as_str().map(str::to_owned));
        result.unwrap_or_else(|| self.output.trim().to_owned())
    }
}

#[derive(Debug)]
struct Inner {
    settings: ServiceSettings,
    launcher: Launcher,
    gateway: Gateway,
    tasks: Tasks,
    /// Runs at once, and runs with those in line.
    slots: Arc<Semaphore>,
    line: Arc<Semaphore>,
    breaker: Mutex<Breaker>,
    /// Where the breaker stood when a run last met it.
    circuit: watch::Sender<BreakerState>,
    calls: Calls,
    probe: tokio::sync::Mutex<Option<(Instant, Result<String, String>)>>,
    draining: CancellationToken,
    /// Ends what runs.
    stop: CancellationToken,
}

/// The service's handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service(Arc<Inner>);

/// A call that was admitted, and has a slot unless it is started ahead.
#[derive(Debug)]
pub struct Ticket {
    service: Service,
    _line: OwnedSemaphorePermit,
    _slot: Option<OwnedSemaphorePermit>,
    call: Call,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run's place in the breaker's count.
struct Passage<'a> {
    service: &'a Service,
    pass: Pass,
    verdict: Verdict,
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let (pass, verdict) = (self.pass, self.verdict);
        self.service
            .with_breaker(|breaker, now| breaker.leave(pass, verdict, now));
    }
}

impl Service {
    /// A service without runs.
    pub fn new(
        settings: ServiceSettings,
        launcher: Launcher,
        gateway: Gateway,
        tasks: Tasks,
    ) -> Self {
        let (slots, line) = (
            settings.max_concurrent,
            settings.max_concurrent + MAX_WAITING,
        );
        Self(Arc::new(Inner {
            settings,
            launcher,
            gateway,
            tasks,
            slots: Arc::new(Semaphore::new(slots)),
            line: Arc::new(Semaphore::new(line)),
            breaker: Mutex::new(Breaker::new()),
            circuit: watch::Sender::new(BreakerState::Closed),
            calls: Calls::default(),
            probe: tokio::sync::Mutex::default(),
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Where its runs are counted.
    pub fn ledger(&self) -> &Ledger {
        self.0.gateway.ledger()
    }

    /// Runs at once.
    pub fn max_concurrent(&self) -> usize {
        self.0.settings.max_concurrent
    }

    /// The model of a run that names none; `None`: the CLI's own choice.
    pub fn model(&self) -> Option<&str> {
        self.0.settings.agent.as_ref()?.model.as_deref()
    }

    /// The tools that a caller may ask for.
    pub fn tools(&self) -> &[String] {
        self.0
            .settings
            .agent
            .as_ref()
            .map_or(&[], |agent| &agent.tools)
    }

    /// What was done so far.
    pub fn figures(&self) -> Figures {
        self.0.calls.figures()
    }

    /// Where the circuit breaker stands.
    pub fn circuit(&self) -> BreakerState {
        lock(&self.0.breaker).state(Instant::now())
    }

    /// The same, for whoever wants to hear of changes. It half-opens with the run that is tried.
    pub fn circuit_changes(&self) -> watch::Receiver<BreakerState> {
        self.0.circuit.subscribe()
    }

    /// Does something with the breaker, and tells of a change.
    fn with_breaker<T>(&self, act: impl FnOnce(&mut Breaker, Instant) -> T) -> T {
        let now = Instant::now();
        let mut breaker = lock(&self.0.breaker);
        let done = act(&mut breaker, now);
        let state = breaker.state(now);
        self.0.circuit.send_if_modified(|told| {
            let before = std::mem::replace(told, state);
            if before == state {
                return false;
            }
            let (from, to) = (before.as_str(), state.as_str());
            metrics::counter!("greenroom_service_breaker_changes_total", "to" => to).increment(1);
            match state {
                BreakerState::Open => tracing::warn!(
                    from,
                    to,
                    "the one-shot service's circuit breaker opened: most runs fail"
                ),
                _ => tracing::info!(from, to, "the one-shot service's circuit breaker changed"),
            }
            true
        });
        done
    }

    /// Runs under way, and calls that wait for a slot.
    pub fn load(&self) -> (usize, usize) {
        let max = self.0.settings.max_concurrent;
        let running = max - self.0.slots.available_permits().min(max);
        let within = max + MAX_WAITING - self.0.line.available_permits();
        (running, within.saturating_sub(running))
    }

    /// Waits in line for a slot.
    ///
    /// # Errors
    /// Where it is of no use to wait: see [`ServiceError`].
    pub async fn admit(&self) -> Result<Ticket, ServiceError> {
        let call = self.0.calls.begin();
        let admitted = async {
            let line = self.stand_in_line()?;
            Ok((line, Some(self.wait_for_a_slot().await?)))
        };
        self.ticket(call, admitted.await)
    }

    /// The same for a run that is started ahead: it waits for its slot later.
    fn admit_ahead(&self) -> Result<Ticket, ServiceError> {
        let call = self.0.calls.begin();
        self.ticket(call, self.stand_in_line().map(|line| (line, None)))
    }

    fn ticket(
        &self,
        mut call: Call,
        admitted: Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), ServiceError>,
    ) -> Result<Ticket, ServiceError> {
        match admitted {
            Ok((line, slot)) => Ok(Ticket {
                service: self.clone(),
                _line: line,
                _slot: slot,
                call,
            }),
            Err(error) => {
                call.end(error.outcome(), None);
                Err(error)
            }
        }
    }

    fn stand_in_line(&self) -> Result<OwnedSemaphorePermit, ServiceError> {
        if self.0.draining.is_cancelled() {
            return Err(ServiceError::Draining);
        }
        if let Some(retry_after) = lock(&self.0.breaker).refusal(Instant::now()) {
            return Err(ServiceError::CircuitOpen { retry_after });
        }
        let line = self.0.line.clone().try_acquire_owned();
        line.map_err(|_| ServiceError::QueueFull)
    }

    async fn wait_for_a_slot(&self) -> Result<OwnedSemaphorePermit, ServiceError> {
        tokio::select! {
            biased;
            () = self.0.draining.cancelled() => Err(ServiceError::Draining),
            slot = self.slot() => Ok(slot),
        }
    }

    /// One of the places for runs that are at work, for a run that was started ahead.
    pub async fn slot(&self) -> OwnedSemaphorePermit {
        let slot = self.0.slots.clone().acquire_owned().await;
        slot.expect("the semaphore is never closed")
    }

    /// Runs in a throw-away folder or in `site`, to its end or until the caller goes away: dropping
    /// the future ends the run in order.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn execute(&self, shot: Shot, site: RunSite) -> Result<Answer, ServiceError> {
        self.run_alone(shot, site).await.answer
    }

    /// The same, for whoever wants to know what it cost.
    pub async fn run_alone(&self, shot: Shot, site: RunSite) -> Ran {
        let ticket = match shot.gate.as_ref().is_some_and(Gate::waits) {
            true => self.admit_ahead(),
            false => self.admit().await,
        };
        let ticket = match ticket {
            Ok(ticket) => ticket,
            Err(error) => return error.into(),
        };
        let (reply, ran) = oneshot::channel();
        let gone = CancellationToken::new();
        let guard = gone.clone().drop_guard();
        self.0.tasks.spawn("one-shot run", async move {
            reply.send(ticket.run(shot, site, &gone).await).ok();
        });
        let ran = ran.await.unwrap_or_else(|_| ServiceError::Cancelled.into());
        drop(guard.disarm());
        ran
    }

    /// Does the CLI answer? Asks it, at most once a minute; beside the line, so that a busy service
    /// is no sick one.
    ///
    /// # Errors
    /// A sentence that says why it does not.
    pub async fn probe(&self) -> Result<String, String> {
        let mut last = self.0.probe.lock().await;
        if let Some((at, answer)) = &*last {
            let lasts = match answer {
                Ok(_) => PROBE_LASTS,
                Err(_) => FAILED_PROBE_LASTS,
            };
            if at.elapsed() < lasts {
                return answer.clone();
            }
        }
        let shot = Shot {
            prompt: PROBE.to_owned(),
            args: Args::default(),
            timeout: PROBE_LIMIT,
            account: Account::of_kind(Account::HEALTH),
            gate: None,
        };
        let ran = self.run(&shot, &RunSite::default(), &self.0.stop).await;
        let answer = match ran.answer {
            Ok(answer) => Ok(answer.output.trim().to_owned()),
            Err(error) => {
                tracing::warn!(%error, "the CLI did not answer a health check");
                Err(error.to_string())
            }
        };
        *last = Some((Instant::now(), answer.clone()));
        answer
    }

    /// Cancelled when a shutdown begins.
    pub fn draining(&self) -> CancellationToken {
        self.0.draining.clone()
    }

    /// Refuses new calls, lets those under way end until `deadline`, then ends them. Answers how many
    /// had to be ended.
    pub async fn drain(&self, deadline: tokio::time::Instant) -> usize {
        self.0.draining.cancel();
        let all = u32::try_from(self.0.settings.max_concurrent).unwrap_or(u32::MAX);
        let over = self.0.slots.acquire_many(all);
        if tokio::time::timeout_at(deadline, over).await.is_ok() {
            return 0;
        }
        let ended = self.0.settings.max_concurrent - self.0.slots.available_permits();
        tracing::warn!(runs = ended, "ending one-shot runs that still go on");
        self.0.stop.cancel();
        let over = self.0.slots.acquire_many(all);
        tokio::time::timeout(Duration::from_secs(6), over)
            .await
            .ok();
        ended
    }

    async fn run(&self, shot: &Shot, site: &RunSite, cancel: &CancellationToken) -> Ran {
        let mut spent = Spent::default();
        let answer = self.attempt(shot, site, cancel, &mut spent).await;
        Ran {
            answer,
            usage: usage_of(&spent),
            answered: spent.requests,
        }
    }

    async fn attempt(
        &self,
        shot: &Shot,
        site: &RunSite,
        cancel: &CancellationToken,
        spent: &mut Spent,
    ) -> Result<Answer, ServiceError> {
        let inner = &*self.0;
        let meter = inner.gateway.ledger().meter(shot.account.clone());
        // Where it cannot be known now the gateway asks again, and knows what to do.
        if let Err(Denied::OverBudget(breach)) = meter.check().await {
            return Err(ServiceError::OverBudget { breach });
        }
        let agent = inner.settings.agent.as_ref();
        let agent = agent.ok_or(ServiceError::NotInstalled)?;
        let began = Instant::now();
        let deadline = tokio::time::Instant::now() + shot.timeout;
        let owners = inner.launcher.runs_as_owners();
        let place = site.write.first().cloned();
        let scratch = Scratch::make(&inner.settings.scratch, owners, place).await;
        let scratch = scratch.map_err(ServiceError::Folder)?;
        let token = inner.gateway.issue();
        let spec = run::spec(agent, site, &scratch, &shot.args, token.as_str());
        let child = match inner.launcher.spawn(spec).await {
            Ok(child) => child,
            Err(error) => {
                scratch.remove().await;
                return Err(ServiceError::Start(error));
            }
        };
        let active = match shot.gate.clone() {
            None => token.begin_until(shot.account.clone(), deadline),
            Some(gate) => token.begin_gated(shot.account.clone(), deadline, gate),
        };
        let limits = run::Limits {
            deadline,
            ends_with_result: shot.gate.is_some(),
            allowance: inner.settings.allowance,
            cancel,
        };
        let raw = run::follow(child, &shot.prompt, &active, limits).await;
        let duration = began.elapsed().saturating_sub(active.held());
        if shot.gate.is_some() {
            settled(&active).await;
        }
        *spent = active.spent();
        drop(active);
        let is_answered = shot.gate.is_some() && spent.requests > 0;
        // It may have printed its environment: the token is worthless by now, and a token.
        let masked = |text: &str| (inner.settings.mask)(&text.replace(token.as_str(), "***"));
        let clean = |text: &str| masked(&text.replace(&*scratch.root().to_string_lossy(), ""));
        let remains = |exit: Exit| Remains {
            exit_code: exit.code.or(exit.signal.map(|signal| 128 + signal)),
            stderr: clean(&raw.stderr),
            output: clean(tail(&String::from_utf8_lossy(&raw.stdout), OUTPUT_TAIL)),
        };
        let answered = || Answer {
            output: masked(&String::from_utf8_lossy(&raw.stdout)),
            duration,
        };
        let answer = match raw.end {
            End::Told => Ok(answered()),
            End::Exited(exit) if exit.is_success() || is_answered => Ok(answered()),
            // Its one answer used the budget up.
            End::OverBudget(_) if is_answered => Ok(answered()),
            End::Exited(exit) => Err(ServiceError::Failed {
                exit,
                remains: remains(exit),
            }),
            End::TimedOut(exit) => Err(ServiceError::TimedOut {
                timeout: shot.timeout,
                remains: remains(exit),
            }),
            End::Cancelled => Err(ServiceError::Cancelled),
            End::OverBudget(ref breach) => Err(ServiceError::OverBudget {
                breach: breach.clone(),
            }),
            End::CredentialRefused(exit) => Err(ServiceError::CredentialRefused(remains(exit))),
            End::TooMuch => Err(ServiceError::TooMuchOutput),
            End::Exceeded(excess) => Err(ServiceError::Exceeded { excess }),
        };
        scratch.remove().await;
        answer
    }
}

impl Ticket {
    /// Runs in `site`, to its end or until `cancel`. Dropped, it is killed at once.
    pub async fn run(mut self, shot: Shot, site: RunSite, cancel: &CancellationToken) -> Ran {
        let service = self.service.clone();
        let entered = service.with_breaker(Breaker::enter);
        let ran = match entered {
            Err(retry_after) => ServiceError::CircuitOpen { retry_after }.into(),
            Ok(pass) => {
                let mut passage = Passage {
                    service: &service,
                    pass,
                    verdict: Verdict::Unknown,
                };
                let stop = service.0.stop.child_token();
                let mut run = std::pin::pin!(service.run(&shot, &site, &stop));
                let ran = tokio::select! {
                    ran = &mut run => ran,
                    () = cancel.cancelled() => {
                        stop.cancel();
                        run.await
                    }
                };
                passage.verdict = match &ran.answer {
                    Ok(_) => Verdict::Success,
                    Err(error) => error.verdict(),
                };
                ran
            }
        };
        match &ran.answer {
            Ok(answer) => self.call.end("success", Some(answer.duration)),
            Err(error) => {
                if let Some(cause) = std::error::Error::source(error) {
                    tracing::warn!(%error, %cause, "a one-shot run did not work");
                }
                self.call.end(error.outcome(), None);
            }
        }
        ran
    }
}

/// Waits until what a run sent is counted: its CLI is gone, and its connections with it.
async fn settled(active: &ActiveRun) {
    let counted = async {
        while active.under_way() > 0 {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(LAST_COUNT, counted).await.ok();
}

fn usage_of(spent: &Spent) -> Usage {
    let tokens = spent.tokens;
    Usage {
        input_tokens: tokens.input,
        output_tokens: tokens.output,
        cache_read_tokens: tokens.cache_read,
        cache_creation_tokens: tokens.cache_write_5m + tokens.cache_write_1h,
        cost_usd: spent.usd,
    }
}

/// The end of a text, from a character's beginning on.
fn tail(text: &str, bytes: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(bytes))..]
}
