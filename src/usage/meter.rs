//! One run's requests: let through, written down, settled.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use super::{
    Tokens,
    budget::{self, Breach, Decision, Level, Limit, Purse, Stand, Warning},
    file::Place,
    ledger::{DISK_DEADLINE, Ledger, lock},
    purses::{OpenRequest, Purses},
    row::{Request, Row},
};
use crate::{
    domain::Account,
    task::{self, BlockingError},
};

/// How long a request waits for others that hold what is left of a budget.
const HELD_PATIENCE: Duration = Duration::from_secs(60);
/// How often it looks whether another container's are over.
const HELD_LOOK: Duration = Duration::from_millis(250);

/// A request that wants to go up.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    pub model: String,
    /// The most tokens that its prompt may have.
    pub prompt: u64,
    /// The most tokens that its answer may have.
    pub answer: u64,
}

/// Why a request may not go up.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("{0}")]
    OverBudget(Breach),
    /// Other requests hold what is left, and went on for too long.
    #[error("{0}; other requests hold the rest of it")]
    Held(Breach),
    #[error("the usage ledger on the workspace cannot be written")]
    Ledger(#[source] io::Error),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Answered to its end.
    Settled,
    /// Cut off in the middle.
    Aborted,
    /// Not taken by the upstream: it costs nothing.
    Refused,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub verdict: Verdict,
    /// As the answer names it; `None`: as it was asked for.
    pub model: Option<String>,
    /// The provider's id of the answer.
    pub message: Option<String>,
    pub tokens: Tokens,
    /// Some of the tokens were reckoned from bytes.
    pub is_estimated: bool,
}

impl Outcome {
    /// It did not go up, or was not taken.
    pub fn refused() -> Self {
        Self {
            verdict: Verdict::Refused,
            model: None,
            message: None,
            tokens: Tokens::default(),
            is_estimated: false,
        }
    }
}

/// What a run has spent so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spent {
    /// Requests that were answered, wholly or in part.
    pub requests: u64,
    /// Those of them that were cut off.
    pub aborted: u64,
    pub tokens: Tokens,
    pub usd: f64,
}

/// What a run should hear of its budgets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct News {
    /// In the order in which they came.
    pub warnings: Vec<Warning>,
    /// The run is over its budget: no request of its goes up any more.
    pub breach: Option<Breach>,
}

/// Counts one run's requests. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Meter(Arc<MeterInner>);

#[derive(Debug)]
struct MeterInner {
    ledger: Ledger,
    account: Account,
    run: Mutex<Run>,
    news: watch::Sender<News>,
}

#[derive(Debug, Default)]
struct Run {
    spent: Spent,
    held: f64,
    was_warned: bool,
}

impl Meter {
    pub(super) fn new(ledger: Ledger, account: Account) -> Self {
        Self(Arc::new(MeterInner {
            ledger,
            account,
            run: Mutex::default(),
            news: watch::Sender::default(),
        }))
    }

    /// Whose requests are counted.
    pub fn account(&self) -> &Account {
        &self.0.account
    }

    /// What the run has spent so far.
    pub fn spent(&self) -> Spent {
        lock(&self.0.run).spent
    }

    /// What the run should hear of its budgets.
    pub fn news(&self) -> watch::Receiver<News> {
        self.0.news.subscribe()
    }

    /// Is anything left to spend? Reads what other containers wrote.
    ///
    /// # Errors
    /// [`Denied::OverBudget`], or what keeps the ledgers from being read.
    pub async fn check(&self) -> Result<(), Denied> {
        self.0.ledger.0.refresh(&self.0.account, false).await?;
        match self.decide(None) {
            Decision::Refuse(breach) => Err(self.breached(breach)),
            Decision::Allow | Decision::Wait(_) => Ok(()),
        }
    }

    /// The same by what is known already: costs no time.
    ///
    /// # Errors
    /// [`Denied::OverBudget`].
    pub fn check_now(&self) -> Result<(), Denied> {
        match self.decide(None) {
            Decision::Refuse(breach) => Err(self.breached(breach)),
            Decision::Allow | Decision::Wait(_) => Ok(()),
        }
    }

    /// Lets a request go up, once it is written down at the most it may cost. Waits where other
    /// requests may use up what is left.
    ///
    /// Cancel safe: what was reserved is then given back.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn reserve(&self, ask: Ask) -> Result<Reservation, Denied> {
        let inner = &self.0.ledger.0;
        let is_shared = inner.budgets.are_shared();
        let deadline = tokio::time::Instant::now() + HELD_PATIENCE;
        loop {
            let freed = inner.freed.notified();
            if is_shared {
                inner.refresh(&self.0.account, false).await?;
            }
            let breach = match self.hold(&ask) {
                Ok(reservation) => {
                    let reservation = reservation.write().await?;
                    if !is_shared {
                        return Ok(reservation);
                    }
                    // Another container may have asked in the same moment; then the earlier one
                    // goes first. Both have written it down by now, so that one of them sees it.
                    inner.refresh(&self.0.account, true).await?;
                    match self.decide(Some(&reservation)) {
                        Decision::Allow => return Ok(reservation),
                        Decision::Wait(breach) => {
                            drop(reservation);
                            breach
                        }
                        Decision::Refuse(breach) => return Err(self.breached(breach)),
                    }
                }
                Err(Decision::Refuse(breach)) => return Err(self.breached(breach)),
                Err(Decision::Wait(breach)) => breach,
                Err(Decision::Allow) => unreachable!("then it is held"),
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(Denied::Held(breach));
            }
            tokio::time::timeout(HELD_LOOK, freed).await.ok();
        }
    }

    fn breached(&self, breach: Breach) -> Denied {
        tracing::warn!(account = %self.0.account, "{breach}");
        lock(&self.0.ledger.0.tally).over_budget += 1;
        self.0
            .news
            .send_modify(|news| news.breach = Some(breach.clone()));
        Denied::OverBudget(breach)
    }

    /// Decides by what is known; `but` is a reservation that was made and is asked about again.
    fn decide(&self, but: Option<&Reservation>) -> Decision {
        let purses = lock(&self.0.ledger.0.purses);
        budget::decide(&self.stands(&purses, but))
    }

    fn stands(&self, purses: &Purses, but: Option<&Reservation>) -> Vec<Stand> {
        let now = self.0.ledger.now();
        let run = lock(&self.0.run);
        let before = but.map(|but| (but.request.at, but.request.id.as_str()));
        let limits = self.0.ledger.0.budgets.limits.iter();
        let stand = |limit: &Limit| {
            let (spent, held) = if limit.level == Level::Turn {
                let is_turn = self.0.account.kind == Account::TURN;
                // Nobody else can have taken of it meanwhile.
                let held = if but.is_some() { 0.0 } else { run.held };
                is_turn.then_some((run.spent.usd, held))?
            } else {
                let purse = Purse::of(limit.level, limit.term, &self.0.account, &now)?;
                (purses.spent(&purse), purses.held(&purse, before))
            };
            Some(Stand {
                limit: *limit,
                spent,
                held,
                ends: limit.term.end(&now),
            })
        };
        limits.filter_map(stand).collect()
    }

    /// Holds the most that a request may cost, if that may be.
    fn hold(&self, ask: &Ask) -> Result<Reservation, Decision> {
        let inner = &self.0.ledger.0;
        let usd = inner.prices.worst(&ask.model, ask.prompt, ask.answer);
        let now = self.0.ledger.now();
        let purses = inner.purses(&self.0.account, &now);
        let mut all = lock(&inner.purses);
        match budget::decide(&self.stands(&all, None)) {
            Decision::Allow => {}
            denied => return Err(denied),
        }
        for purse in &purses {
            if all.known.insert(purse.clone()) {
                // Who was near the limit before we came was told then.
                let spent = all.spent(purse);
                let is_told = inner
                    .limit_of(purse)
                    .is_some_and(|limit| budget::is_nearly_spent(limit, spent));
                if is_told {
                    all.warned.insert(purse.clone());
                }
            }
        }
        let request = Request {
            at: now.timestamp(),
            id: uuid::Uuid::now_v7().simple().to_string(),
            account: self.0.account.clone(),
            model: ask.model.clone(),
            message: None,
            tokens: Tokens {
                input: ask.prompt,
                output: ask.answer,
                ..Tokens::default()
            },
            cost_usd: usd,
            duration_ms: 0,
            is_estimated: false,
            is_unpriced: false,
        };
        let open = OpenRequest {
            purses: purses.clone(),
            usd,
            at: request.at,
            owner: None,
            is_lost: false,
        };
        all.open.insert(request.id.clone(), open);
        drop(all);
        lock(&self.0.run).held += usd;
        Ok(Reservation {
            meter: self.clone(),
            request,
            purses,
            place: None,
            synced: None,
            begun: Instant::now(),
            is_over: false,
        })
    }
}

/// A request that may go up. Dropped without a settlement it is given back: then it did not go up.
#[derive(Debug)]
pub struct Reservation {
    meter: Meter,
    request: Request,
    purses: Vec<Purse>,
    place: Option<Place>,
    synced: Option<oneshot::Receiver<()>>,
    begun: Instant,
    is_over: bool,
}

impl Reservation {
    /// Writes the line, and begins to bring it to the disk.
    ///
    /// The request waits for this: one thread does both, and nothing else stands between.
    async fn write(mut self) -> Result<Self, Denied> {
        let inner = self.meter.0.ledger.0.clone();
        if inner.writer.is_none() {
            return Ok(self);
        }
        let (on_disk, synced) = oneshot::channel::<()>();
        self.synced = Some(synced);
        let (sender, mut written) = oneshot::channel();
        let tasks = inner.tasks.clone();
        let write = move || {
            let writer = inner.writer.as_ref().expect("it was there a moment ago");
            let row = Row::Reserved(self.request.clone());
            let place = match writer.begin(&row, &self.request) {
                Ok(place) => place,
                Err(error) => {
                    sender.send(Err(error)).ok();
                    return;
                }
            };
            self.place = Some(place.clone());
            // Where nobody waits any more it is dropped here, and with that given back.
            drop(sender.send(Ok(self)));
            if let Err(error) = place.sync() {
                tracing::error!(%error, "the usage ledger does not reach the disk");
            }
        };
        let lost = || io::Error::other("the line was not written");
        let mut work = Box::pin(task::blocking_apart(
            "writing the usage ledger",
            DISK_DEADLINE,
            write,
        ));
        let written = tokio::select! {
            biased;
            written = &mut written => {
                tasks.spawn("syncing the ledger", async move {
                    work.await.ok();
                    drop(on_disk);
                });
                written.unwrap_or_else(|_| Err(lost()))
            }
            done = &mut work => {
                done?;
                written.try_recv().unwrap_or_else(|_| Err(lost()))
            }
        };
        written.map_err(Denied::Ledger)
    }

    /// The most tokens that were thought of.
    pub fn worst(&self) -> Tokens {
        self.request.tokens
    }

    /// Waits until the reservation has reached the disk, so that it outlives the machine too.
    /// Bounded.
    pub async fn on_disk(&mut self) {
        if let Some(synced) = self.synced.take() {
            synced.await.ok();
        }
    }

    /// The request is over. What comes back is done when the line is written; nobody has to wait
    /// for it.
    pub fn settle(mut self, outcome: Outcome) -> oneshot::Receiver<()> {
        self.conclude(outcome)
    }

    fn conclude(&mut self, outcome: Outcome) -> oneshot::Receiver<()> {
        self.is_over = true;
        let (sender, written) = oneshot::channel();
        let inner = self.meter.0.ledger.0.clone();
        let worst = self.request.cost_usd;
        let mut request = self.request.clone();
        if let Some(model) = outcome.model {
            request.model = model;
        }
        let cost = inner.prices.cost(&request.model, &outcome.tokens);
        let is_charged = outcome.verdict != Verdict::Refused;
        request.cost_usd = if is_charged { cost.usd } else { 0.0 };
        request.is_unpriced = is_charged && !cost.is_known;
        request.message = outcome.message;
        request.tokens = outcome.tokens;
        request.is_estimated = outcome.is_estimated;
        request.duration_ms = self.begun.elapsed().as_millis() as u64;
        if request.is_unpriced {
            tracing::warn!(
                model = request.model,
                "the price list does not know this model; it is counted at the dearest price"
            );
        }
        self.count(&request, outcome.verdict, worst);
        inner.freed.notify_waiters();
        let row = match outcome.verdict {
            Verdict::Settled => Row::Settled(request),
            Verdict::Aborted => Row::Aborted(request),
            Verdict::Refused => Row::Refused(request),
        };
        let Some(place) = self.place.take() else {
            sender.send(()).ok();
            return written;
        };
        inner.tasks.spawn("settling", async move {
            let write =
                task::blocking_apart("writing the usage ledger", DISK_DEADLINE, move || {
                    place.append(&row)
                });
            match write.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "a request is not settled in the usage ledger");
                }
                Err(error) => {
                    tracing::error!(%error, "a request is not settled in the usage ledger");
                }
            }
            sender.send(()).ok();
        });
        written
    }

    /// Takes the request's cost into the budgets, and warns.
    fn count(&self, request: &Request, verdict: Verdict, worst: f64) {
        let inner = &self.meter.0.ledger.0;
        let usd = request.cost_usd;
        let mut warnings = Vec::new();
        {
            let mut all = lock(&inner.purses);
            all.close(&request.id);
            for purse in &self.purses {
                let spent = all.spent.entry(purse.clone()).or_default();
                *spent += usd;
                let spent_usd = *spent;
                if let Some(limit) = inner.limit_of(purse)
                    && budget::is_nearly_spent(limit, spent_usd)
                    && all.warned.insert(purse.clone())
                {
                    warnings.push(Warning { limit, spent_usd });
                }
            }
        }
        {
            let tally = &mut lock(&inner.tally);
            match verdict {
                Verdict::Settled => tally.settled += 1,
                Verdict::Aborted => tally.aborted += 1,
                Verdict::Refused => tally.refused += 1,
            }
            tally.unpriced += u64::from(request.is_unpriced);
            tally.tokens += request.tokens;
            tally.cost_usd += usd;
        }
        if verdict != Verdict::Refused {
            measure_client(request);
        }
        {
            let mut run = lock(&self.meter.0.run);
            run.held = (run.held - worst).max(0.0);
            if verdict != Verdict::Refused {
                run.spent.requests += 1;
                run.spent.aborted += u64::from(verdict == Verdict::Aborted);
                run.spent.tokens += request.tokens;
                run.spent.usd += usd;
            }
            let is_turn = request.account.kind == Account::TURN;
            let limits = inner.budgets.limits.iter();
            for limit in limits.filter(|limit| is_turn && limit.level == Level::Turn) {
                if budget::is_nearly_spent(*limit, run.spent.usd) && !run.was_warned {
                    run.was_warned = true;
                    warnings.push(Warning {
                        limit: *limit,
                        spent_usd: run.spent.usd,
                    });
                }
            }
        }
        if warnings.is_empty() {
            return;
        }
        for Warning { limit, spent_usd } in &warnings {
            tracing::warn!(
                account = %request.account,
                spent_usd, limit_usd = limit.usd,
                "{limit} is nearly used up"
            );
        }
        self.meter
            .0
            .news
            .send_modify(|news| news.warnings.extend(warnings));
    }
}

/// For the figures by client.
fn measure_client(request: &Request) {
    let Some(client) = &request.account.client else {
        return;
    };
    for (kind, tokens) in request.tokens.by_kind() {
        let client = client.to_string();
        metrics::counter!("greenroom_client_tokens_total", "client" => client, "kind" => kind)
            .increment(tokens);
    }
    metrics::histogram!("greenroom_client_request_cost_usd", "client" => client.to_string())
        .record(request.cost_usd);
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_over {
            drop(self.conclude(Outcome::refused()));
        }
    }
}
