//! The ledger: reservations before a request goes up, settlements after, budgets in between.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp, Zoned, civil::Date};
use tokio::sync::{Notify, oneshot, watch};

use super::{
    Tokens,
    budget::{self, Breach, Budgets, Decision, Level, Limit, Purse, Stand, Term, Warning},
    compare::{self, Counts},
    file::{Look, Place, Tail, Tenants, Writer},
    price::Prices,
    row::{Request, Row},
};
use crate::{
    domain::Account,
    lease::Owner,
    task::{self, BlockingError, Tasks},
};

/// For a line to get into the kernel's hands, and to the disk.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// How long a request waits for others that hold what is left of a budget.
const HELD_PATIENCE: Duration = Duration::from_secs(60);
/// How often it looks whether another container's are over.
const HELD_LOOK: Duration = Duration::from_millis(250);
/// How often new files of other containers are looked for where nothing is reserved.
const FIND_EVERY: Duration = Duration::from_secs(5);
/// A reservation that nobody settled for so long counts as spent: no request lasts so long.
pub(super) const LOST_AFTER: SignedDuration = SignedDuration::from_mins(15);

/// What the ledger works by.
#[derive(Debug, Clone, Default)]
pub struct LedgerSettings {
    /// Root of the workspaces; `None`: nothing is kept.
    pub workspace: Option<PathBuf>,
    pub prices: Prices,
    pub budgets: Budgets,
}

/// Writes down what is spent, and knows what may be. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    prices: Prices,
    budgets: Budgets,
    root: Option<PathBuf>,
    writer: Option<Writer>,
    state: Mutex<State>,
    /// Held while files are read, on blocking threads alone.
    others: Mutex<Others>,
    /// A request of ours is over.
    freed: Notify,
    tasks: Tasks,
}

/// The files of other containers, and of earlier processes of this one.
#[derive(Debug, Default)]
struct Others {
    tail: Tail,
    found: HashMap<Tenants, Instant>,
}

#[derive(Debug, Default)]
struct State {
    /// By all containers, as far as their files were read.
    spent: HashMap<Purse, f64>,
    /// Requests that are not settled, ours and other containers'.
    open: HashMap<String, OpenRequest>,
    /// Limits that were told to be nearly spent.
    warned: HashSet<Purse>,
    /// Purses that were looked into before.
    known: HashSet<Purse>,
    tally: Tally,
}

#[derive(Debug)]
struct OpenRequest {
    purses: Vec<Purse>,
    usd: f64,
    at: Timestamp,
    owner: Option<Arc<Owner>>,
    /// It counts as spent already.
    is_lost: bool,
}

/// What this process did, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tally {
    pub settled: u64,
    pub aborted: u64,
    pub refused: u64,
    /// Asked for and denied by a budget.
    pub over_budget: u64,
    /// Of models that the price table does not know.
    pub unpriced: u64,
    /// Turns whose usage was compared with the CLI's.
    pub compared: u64,
    /// By how many dollars their costs differ, in all.
    pub difference_usd: f64,
    /// Turns of which the CLI tells another usage than the ledger.
    pub differs_from_cli: u64,
    /// Turns whose transcript tells another usage than the ledger.
    pub differs_from_transcript: u64,
    pub tokens: Tokens,
    pub cost_usd: f64,
}

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    /// A ledger; touches no disk yet.
    pub fn new(settings: LedgerSettings, tasks: &Tasks) -> Self {
        Self(Arc::new(Inner {
            prices: settings.prices,
            budgets: settings.budgets,
            writer: settings.workspace.as_deref().map(Writer::new),
            root: settings.workspace,
            state: Mutex::default(),
            others: Mutex::default(),
            freed: Notify::new(),
            tasks: tasks.clone(),
        }))
    }

    /// Counts the requests of one run.
    pub fn meter(&self, account: Account) -> Meter {
        Meter(Arc::new(MeterInner {
            ledger: self.clone(),
            account,
            run: Mutex::default(),
            news: watch::Sender::default(),
        }))
    }

    /// What this process did so far.
    pub fn tally(&self) -> Tally {
        lock(&self.0.state).tally
    }

    /// Compares what was counted of a turn with what the CLI tells of it, and with its transcript.
    pub fn compare(
        &self,
        account: &Account,
        counted: &Spent,
        cli: Counts,
        cli_usd: f64,
        transcript: Option<Counts>,
    ) {
        let ours = Counts::from(counted.tokens);
        let cost_differs = compare::cost_differs(cli_usd, counted.usd);
        let by_cli = cli.differs_from(&ours) || cost_differs;
        let by_transcript = transcript.is_some_and(|told| told.differs_from(&ours));
        let tally = &mut lock(&self.0.state).tally;
        tally.compared += 1;
        tally.differs_from_cli += u64::from(by_cli);
        tally.differs_from_transcript += u64::from(by_transcript);
        tally.difference_usd += (cli_usd - counted.usd).abs();
        if by_cli || by_transcript {
            tracing::warn!(
                %account, ledger = ?ours, ledger_usd = counted.usd, ?cli, cli_usd, ?transcript,
                "the usage of a turn is another one by the ledger than by the CLI"
            );
        }
    }

    fn now(&self) -> Zoned {
        Timestamp::now().to_zoned(self.0.budgets.zone.clone())
    }
}

impl Inner {
    fn purses(&self, account: &Account, at: &Zoned) -> Vec<Purse> {
        let limits = self.budgets.limits.iter();
        limits
            .filter_map(|limit| Purse::of(limit.level, limit.term, account, at))
            .collect()
    }

    /// Whose ledgers an account's budgets depend on.
    fn tenants(&self, account: &Account) -> Option<Tenants> {
        let client = account.client.clone()?;
        let is_shared = |limit: &&Limit| limit.term != Term::Whole;
        let widest = self.budgets.limits.iter().filter(is_shared);
        match widest.map(|limit| limit.level).max()? {
            Level::Client => Some(Tenants {
                client: Some(client),
                user: None,
            }),
            _ => Some(Tenants {
                client: Some(client),
                user: Some(account.user.clone()?),
            }),
        }
    }

    /// Takes in what other containers wrote. Blocking.
    fn read_others(&self, tenants: &Tenants, thoroughly: bool) -> io::Result<()> {
        let (Some(root), Some(writer)) = (&self.root, &self.writer) else {
            return Ok(());
        };
        let now = Timestamp::now().to_zoned(self.budgets.zone.clone());
        let mut others = lock(&self.others);
        let others = &mut *others;
        let is_due = others
            .found
            .get(tenants)
            .is_none_or(|at| thoroughly || at.elapsed() >= FIND_EVERY);
        if is_due {
            // A file's day is UTC's.
            let since = first_file_day(&now);
            others
                .tail
                .find(root, tenants, Some(since), |path| !writer.wrote(path))?;
            others.tail.forget_before(since);
        }
        let look = if is_due { Look::All } else { Look::Lively };
        let mut rows = Vec::new();
        others
            .tail
            .read(look, |entry| rows.push((entry.row, entry.owner.cloned())))?;
        if is_due {
            others.found.insert(tenants.clone(), Instant::now());
        }
        let mut state = lock(&self.state);
        for (row, owner) in rows {
            state.take_in(row, owner, |request| {
                let at = request.at.to_zoned(self.budgets.zone.clone());
                let mut purses = self.purses(&request.account, &at);
                purses.retain(|purse| !purse.is_over(&now));
                purses
            });
        }
        state.find_lost(now.timestamp());
        state.forget_over(&now);
        Ok(())
    }

    /// Takes in what other containers wrote. `thoroughly`: also what is in files that are new.
    async fn refresh(self: &Arc<Self>, account: &Account, thoroughly: bool) -> Result<(), Denied> {
        let Some(tenants) = self.tenants(account) else {
            return Ok(());
        };
        let inner = self.clone();
        let read = task::blocking_apart("reading the usage ledgers", DISK_DEADLINE, move || {
            inner.read_others(&tenants, thoroughly)
        });
        read.await?.map_err(Denied::Ledger)
    }
}

/// Files of earlier days hold nothing of this month, in any time zone.
fn first_file_day(now: &Zoned) -> Date {
    let first = now.date().first_of_month();
    first.yesterday().unwrap_or(first)
}

impl State {
    fn take_in(
        &mut self,
        row: Row,
        owner: Option<Arc<Owner>>,
        purses: impl FnOnce(&Request) -> Vec<Purse>,
    ) {
        match row {
            Row::Reserved(request) => {
                let open = OpenRequest {
                    purses: purses(&request),
                    usd: request.cost_usd,
                    at: request.at,
                    owner,
                    is_lost: false,
                };
                self.open.insert(request.id, open);
            }
            Row::Settled(request) | Row::Aborted(request) | Row::Refused(request) => {
                self.close(&request.id);
                for purse in purses(&request) {
                    *self.spent.entry(purse).or_default() += request.cost_usd;
                }
            }
            Row::Opened { .. } | Row::Unknown => {}
        }
    }

    /// Reservations that nobody will settle any more are spent.
    fn find_lost(&mut self, now: Timestamp) {
        for open in self.open.values_mut().filter(|open| !open.is_lost) {
            let is_dead = open.owner.as_ref().is_some_and(|owner| owner.is_gone());
            if is_dead || now.duration_since(open.at) > LOST_AFTER {
                open.is_lost = true;
                for purse in &open.purses {
                    *self.spent.entry(purse.clone()).or_default() += open.usd;
                }
            }
        }
    }

    fn forget_over(&mut self, now: &Zoned) {
        self.spent.retain(|purse, _| !purse.is_over(now));
        self.warned.retain(|purse| !purse.is_over(now));
        self.known.retain(|purse| !purse.is_over(now));
        self.open
            .retain(|_, open| !open.is_lost || open.purses.iter().any(|purse| !purse.is_over(now)));
    }

    fn spent(&self, purse: &Purse) -> f64 {
        self.spent.get(purse).copied().unwrap_or_default()
    }

    /// The most that open requests may come to; only those before `before`, where that is given.
    fn held(&self, purse: &Purse, before: Option<(Timestamp, &str)>) -> f64 {
        self.open
            .iter()
            .filter(|(id, open)| {
                let is_before = before.is_none_or(|before| (open.at, id.as_str()) < before);
                !open.is_lost && is_before && open.purses.contains(purse)
            })
            .map(|(_, open)| open.usd)
            .sum()
    }

    /// The request is over: what it held is free, and what it was thought to have cost.
    fn close(&mut self, id: &str) {
        let Some(open) = self.open.remove(id) else {
            return;
        };
        for purse in open.purses.iter().filter(|_| open.is_lost) {
            if let Some(spent) = self.spent.get_mut(purse) {
                *spent -= open.usd;
            }
        }
    }
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
        let (sender, reserved) = oneshot::channel();
        let meter = self.clone();
        // In a task of its own, which nobody cuts off between the line and its place.
        self.tasks().spawn("reserving", async move {
            // Nobody waits any more: dropped, it is given back.
            drop(sender.send(meter.reserve_patiently(ask).await));
        });
        reserved.await.unwrap_or_else(|_| {
            let stopping = io::Error::other("greenroom is stopping");
            Err(Denied::Ledger(stopping))
        })
    }

    fn tasks(&self) -> &Tasks {
        &self.0.ledger.0.tasks
    }

    async fn reserve_patiently(&self, ask: Ask) -> Result<Reservation, Denied> {
        let inner = &self.0.ledger.0;
        let is_shared = inner.budgets.are_shared();
        let deadline = tokio::time::Instant::now() + HELD_PATIENCE;
        loop {
            let freed = inner.freed.notified();
            if is_shared {
                inner.refresh(&self.0.account, false).await?;
            }
            let breach = match self.hold(&ask) {
                Ok(mut reservation) => {
                    reservation.write().await?;
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
        lock(&self.0.ledger.0.state).tally.over_budget += 1;
        self.0
            .news
            .send_modify(|news| news.breach = Some(breach.clone()));
        Denied::OverBudget(breach)
    }

    /// Decides by what is known; `but` is a reservation that was made and is asked about again.
    fn decide(&self, but: Option<&Reservation>) -> Decision {
        let state = lock(&self.0.ledger.0.state);
        budget::decide(&self.stands(&state, but))
    }

    fn stands(&self, state: &State, but: Option<&Reservation>) -> Vec<Stand> {
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
                (state.spent(&purse), state.held(&purse, before))
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
        let mut state = lock(&inner.state);
        match budget::decide(&self.stands(&state, None)) {
            Decision::Allow => {}
            denied => return Err(denied),
        }
        for purse in &purses {
            if state.known.insert(purse.clone()) {
                // Who was near the limit before we came was told then.
                let spent = state.spent(purse);
                let is_told = inner
                    .limit_of(purse)
                    .is_some_and(|limit| budget::is_nearly_spent(limit, spent));
                if is_told {
                    state.warned.insert(purse.clone());
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
        state.open.insert(request.id.clone(), open);
        drop(state);
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

impl Inner {
    fn limit_of(&self, purse: &Purse) -> Option<Limit> {
        self.budgets
            .limits
            .iter()
            .find(|limit| purse.is_about(limit.level, limit.term))
            .copied()
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
    async fn write(&mut self) -> Result<(), Denied> {
        let inner = self.meter.0.ledger.0.clone();
        if inner.writer.is_none() {
            return Ok(());
        }
        let request = self.request.clone();
        let tasks = inner.tasks.clone();
        let write = move || match &inner.writer {
            Some(writer) => writer
                .begin(&Row::Reserved(request.clone()), &request)
                .map(Some),
            None => Ok(None),
        };
        let written = task::blocking_apart("writing the usage ledger", DISK_DEADLINE, write);
        self.place = written.await?.map_err(Denied::Ledger)?;
        if let Some(place) = self.place.clone() {
            let (sender, synced) = oneshot::channel();
            self.synced = Some(synced);
            tasks.spawn("syncing the ledger", async move {
                let sync =
                    task::blocking_apart("syncing the usage ledger", DISK_DEADLINE, move || {
                        place.sync()
                    });
                if let Ok(Err(error)) = sync.await {
                    tracing::error!(%error, "the usage ledger does not reach the disk");
                }
                sender.send(()).ok();
            });
        }
        Ok(())
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
            let mut state = lock(&inner.state);
            state.close(&request.id);
            for purse in &self.purses {
                let spent = state.spent.entry(purse.clone()).or_default();
                *spent += usd;
                let spent_usd = *spent;
                if let Some(limit) = inner.limit_of(purse)
                    && budget::is_nearly_spent(limit, spent_usd)
                    && state.warned.insert(purse.clone())
                {
                    warnings.push(Warning { limit, spent_usd });
                }
            }
            let tally = &mut state.tally;
            match verdict {
                Verdict::Settled => tally.settled += 1,
                Verdict::Aborted => tally.aborted += 1,
                Verdict::Refused => tally.refused += 1,
            }
            tally.unpriced += u64::from(request.is_unpriced);
            tally.tokens += request.tokens;
            tally.cost_usd += usd;
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

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_over {
            drop(self.conclude(Outcome::refused()));
        }
    }
}
