//! One run's requests: let through, written down, settled.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Tokens,
    budget::{self, Breach, Decision, Level, Limit, Purse, Stand, Warning},
    ledger::{Ledger, lock},
    purses::{OpenRequest, Purses},
    reservation::Reservation,
    row::Request,
};
use crate::{domain::Account, task::BlockingError};

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

/// The most that something may come to that is to be reserved.
#[derive(Debug, Clone)]
struct Most {
    model: String,
    tokens: Tokens,
    usd: f64,
    is_uncounted: bool,
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
pub struct Meter(pub(super) Arc<MeterInner>);

#[derive(Debug)]
pub(super) struct MeterInner {
    pub(super) ledger: Ledger,
    pub(super) account: Account,
    pub(super) run: Mutex<Run>,
    pub(super) news: watch::Sender<News>,
}

#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) spent: Spent,
    /// What the same turn has cost before, in US dollars: for its budget alone.
    pub(super) before: f64,
    pub(super) held: f64,
    pub(super) was_warned: bool,
}

/// Is it what a turn's own budget is about? Images are made before their turn begins.
pub(super) fn is_of_a_turn(account: &Account) -> bool {
    account.kind == Account::TURN || account.kind == Account::IMAGES
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
        let prices = &self.0.ledger.0.prices;
        let usd = prices.worst(&ask.model, ask.prompt, ask.answer);
        let tokens = Tokens {
            input: ask.prompt,
            output: ask.answer,
            ..Tokens::default()
        };
        let is_uncounted = false;
        self.reserve_most(Most {
            model: ask.model,
            tokens,
            usd,
            is_uncounted,
        })
        .await
    }

    /// The same for what is not paid by tokens, as a prediction is. `most_usd`: `None` where nobody
    /// knows what it may cost; then it counts nothing.
    ///
    /// # Errors
    /// [`Denied`]; nothing is reserved then.
    pub async fn reserve_paid(
        &self,
        model: &str,
        most_usd: Option<f64>,
    ) -> Result<Reservation, Denied> {
        let most = Most {
            model: model.to_owned(),
            tokens: Tokens::default(),
            usd: most_usd.unwrap_or_default(),
            is_uncounted: most_usd.is_none(),
        };
        self.reserve_most(most).await
    }

    /// The run's turn has cost so much before it began: that counts for the turn's own budget, and
    /// stands in the ledger already.
    pub fn spent_before(&self, usd: f64) {
        lock(&self.0.run).before += usd;
    }

    async fn reserve_most(&self, most: Most) -> Result<Reservation, Denied> {
        let inner = &self.0.ledger.0;
        let is_shared = inner.budgets.are_shared();
        let deadline = tokio::time::Instant::now() + HELD_PATIENCE;
        loop {
            let freed = inner.freed.notified();
            if is_shared {
                inner.refresh(&self.0.account, false).await?;
            }
            let breach = match self.hold(&most) {
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
        let before = but.map(|but| (but.request().at, but.request().id.as_str()));
        let limits = self.0.ledger.0.budgets.limits.iter();
        let stand = |limit: &Limit| {
            let (spent, held) = if limit.level == Level::Turn {
                // Nobody else can have taken of it meanwhile.
                let held = if but.is_some() { 0.0 } else { run.held };
                is_of_a_turn(&self.0.account).then_some((run.before + run.spent.usd, held))?
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
    fn hold(&self, most: &Most) -> Result<Reservation, Decision> {
        let inner = &self.0.ledger.0;
        let usd = most.usd;
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
            model: most.model.clone(),
            message: None,
            tokens: most.tokens,
            cost_usd: usd,
            duration_ms: 0,
            is_estimated: false,
            is_unpriced: false,
            is_uncounted: most.is_uncounted,
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
        Ok(Reservation::new(self, request, purses))
    }
}
