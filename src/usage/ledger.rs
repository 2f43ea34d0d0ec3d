//! The ledger of this process: what is spent by its own requests and, from their files, by those of other
//! containers.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::{Timestamp, Zoned, civil::Date};
use tokio::sync::Notify;

use super::{
    Tokens,
    budget::{Budgets, Level, Limit, Purse, Term},
    compare::{self, Counts},
    file::{Look, Tail, Tenants, Writer},
    meter::{Denied, Meter, Spent},
    price::Prices,
    purses::Purses,
};
use crate::{
    domain::Account,
    task::{self, Tasks},
};

/// For a line to get into the kernel's hands, and to the disk.
pub(super) const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// How often new files of other containers are looked for where nothing is reserved.
const FIND_EVERY: Duration = Duration::from_secs(5);

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
pub struct Ledger(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) prices: Prices,
    pub(super) budgets: Budgets,
    root: Option<PathBuf>,
    pub(super) writer: Option<Writer>,
    pub(super) purses: Mutex<Purses>,
    pub(super) tally: Mutex<Tally>,
    /// Held while files are read, on blocking threads alone.
    others: Mutex<Others>,
    /// A request of ours is over.
    pub(super) freed: Notify,
    pub(super) tasks: Tasks,
}

/// The files of other containers, and of earlier processes of this one.
#[derive(Debug, Default)]
struct Others {
    tail: Tail,
    found: HashMap<Tenants, Instant>,
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
    /// Predictions that were made, wholly or in part; not among the requests above.
    pub predictions: u64,
    /// Those of them whose cost nobody knows.
    pub uncounted: u64,
    /// Their cost; not part of the one below.
    pub prediction_cost_usd: f64,
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
            purses: Mutex::default(),
            tally: Mutex::default(),
            others: Mutex::default(),
            freed: Notify::new(),
            tasks: tasks.clone(),
        }))
    }

    /// Counts the requests of one run.
    pub fn meter(&self, account: Account) -> Meter {
        Meter::new(self.clone(), account)
    }

    /// The most that a request may cost, in US dollars; of a model that the price list does not
    /// know, the most of any.
    pub fn worst(&self, model: &str, prompt_tokens: u64, answer_tokens: u64) -> f64 {
        self.0.prices.worst(model, prompt_tokens, answer_tokens)
    }

    /// What this process did so far.
    pub fn tally(&self) -> Tally {
        *lock(&self.0.tally)
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
        let tally = &mut lock(&self.0.tally);
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

    pub(super) fn now(&self) -> Zoned {
        Timestamp::now().to_zoned(self.0.budgets.zone.clone())
    }
}

impl Inner {
    pub(super) fn purses(&self, account: &Account, at: &Zoned) -> Vec<Purse> {
        let limits = self.budgets.limits.iter();
        limits
            .filter_map(|limit| Purse::of(limit.level, limit.term, account, at))
            .collect()
    }

    pub(super) fn limit_of(&self, purse: &Purse) -> Option<Limit> {
        self.budgets
            .limits
            .iter()
            .find(|limit| purse.is_about(limit.level, limit.term))
            .copied()
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
        let mut known = lock(&self.purses);
        for (row, owner) in rows {
            known.take_in(row, owner, |request| {
                let at = request.at.to_zoned(self.budgets.zone.clone());
                let mut purses = self.purses(&request.account, &at);
                purses.retain(|purse| !purse.is_over(&now));
                purses
            });
        }
        known.find_lost(now.timestamp());
        known.forget_over(&now);
        Ok(())
    }

    /// Takes in what other containers wrote. `thoroughly`: also what is in files that are new.
    pub(super) async fn refresh(
        self: &Arc<Self>,
        account: &Account,
        thoroughly: bool,
    ) -> Result<(), Denied> {
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
