//! What one request, or prediction, holds of the budgets until it is over, and what came of it.

use std::{
    io,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    Tokens,
    budget::{self, Level, Purse, Warning},
    file::Place,
    ledger::{DISK_DEADLINE, Ledger, lock},
    meter::{Denied, Meter, Outcome, Verdict, is_of_a_turn},
    row::{Request, Row},
};
use crate::{domain::Account, task};

/// A reservation as it is noted by whoever has to know it after this process: see
/// [`Ledger::take_up`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Noted(Request);

impl Ledger {
    /// A reservation that was made before and left, by a process that is gone as a rule: to be
    /// settled here instead. It must not be settled anywhere else.
    pub fn take_up(&self, noted: Noted) -> Reservation {
        let Noted(request) = noted;
        let inner = &self.0;
        let at = request.at.to_zoned(inner.budgets.zone.clone());
        let took = Timestamp::now().duration_since(request.at);
        let took = Duration::try_from(took).unwrap_or_default();
        Reservation {
            meter: self.meter(request.account.clone()),
            purses: inner.purses(&request.account, &at),
            request,
            place: None,
            synced: None,
            begun: Instant::now()
                .checked_sub(took)
                .unwrap_or_else(Instant::now),
            is_left: true,
            is_over: false,
        }
    }
}

/// A request that may go up. Dropped without a settlement it is given back: then it did not go up;
/// but once it was [left](Self::leave).
#[derive(Debug)]
pub struct Reservation {
    meter: Meter,
    request: Request,
    purses: Vec<Purse>,
    place: Option<Place>,
    synced: Option<oneshot::Receiver<()>>,
    begun: Instant,
    /// Dropped, it stays as it is written.
    is_left: bool,
    is_over: bool,
}

impl Reservation {
    /// One that is held already, and not written yet.
    pub(super) fn new(meter: &Meter, request: Request, purses: Vec<Purse>) -> Self {
        Self {
            meter: meter.clone(),
            request,
            purses,
            place: None,
            synced: None,
            begun: Instant::now(),
            is_left: false,
            is_over: false,
        }
    }

    /// The request as it was written down.
    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    /// From here on it may be paid whatever becomes of us: dropped without a settlement it stays at
    /// the most that it may cost, until somebody [takes it up](Ledger::take_up) who noted this.
    pub fn leave(&mut self) -> Noted {
        self.is_left = true;
        Noted(self.request.clone())
    }

    /// It is over, and was not paid by tokens but by so many dollars; `None`: nobody knows, and it
    /// counts nothing. `id`: the provider's own. What comes back is done when the line is written.
    pub fn settle_paid(
        mut self,
        verdict: Verdict,
        id: Option<String>,
        usd: Option<f64>,
    ) -> oneshot::Receiver<()> {
        let is_charged = verdict != Verdict::Refused;
        let mut request = self.request.clone();
        request.cost_usd = usd.filter(|_| is_charged).unwrap_or_default();
        request.is_uncounted = is_charged && usd.is_none();
        request.message = id;
        self.close(request, verdict)
    }

    /// Writes the line, and begins to bring it to the disk.
    ///
    /// The request waits for this: one thread does both, and nothing else stands between.
    pub(super) async fn write(mut self) -> Result<Self, Denied> {
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
        let inner = &self.meter.0.ledger.0;
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
        request.is_uncounted = false;
        if request.is_unpriced {
            tracing::warn!(
                model = request.model,
                "the price list does not know this model; it is counted at the dearest price"
            );
        }
        self.close(request, outcome.verdict)
    }

    /// Counts and writes what came of it.
    fn close(&mut self, mut request: Request, verdict: Verdict) -> oneshot::Receiver<()> {
        self.is_over = true;
        let (sender, written) = oneshot::channel();
        let inner = self.meter.0.ledger.0.clone();
        let worst = self.request.cost_usd;
        request.duration_ms = self.begun.elapsed().as_millis() as u64;
        self.count(&request, verdict, worst);
        inner.freed.notify_waiters();
        let row = match verdict {
            Verdict::Settled => Row::Settled(request.clone()),
            Verdict::Aborted => Row::Aborted(request.clone()),
            Verdict::Refused => Row::Refused(request.clone()),
        };
        let place = self.place.take();
        // One that was taken up has its first line in a file of somebody else's.
        if inner.writer.is_none() || (place.is_none() && !self.is_left) {
            sender.send(()).ok();
            return written;
        }
        let tasks = inner.tasks.clone();
        tasks.spawn("settling", async move {
            let write =
                task::blocking_apart("writing the usage ledger", DISK_DEADLINE, move || {
                    match (place, &inner.writer) {
                        (Some(place), _) => place.append(&row),
                        (None, Some(writer)) => writer.begin(&row, &request)?.sync(),
                        (None, None) => Ok(()),
                    }
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
            if !all.close(&request.id) {
                all.settled_first.insert(request.id.clone());
            }
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
            let is_prediction = request.account.kind == Account::IMAGES;
            match verdict {
                Verdict::Settled | Verdict::Aborted if is_prediction => {
                    tally.predictions += 1;
                    tally.uncounted += u64::from(request.is_uncounted);
                    tally.prediction_cost_usd += usd;
                }
                Verdict::Refused if is_prediction => {}
                Verdict::Settled => tally.settled += 1,
                Verdict::Aborted => tally.aborted += 1,
                Verdict::Refused => tally.refused += 1,
            }
            tally.unpriced += u64::from(request.is_unpriced);
            tally.tokens += request.tokens;
            tally.cost_usd += if is_prediction { 0.0 } else { usd };
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
            let is_turn = is_of_a_turn(&request.account);
            let spent_usd = run.before + run.spent.usd;
            let limits = inner.budgets.limits.iter();
            for limit in limits.filter(|limit| is_turn && limit.level == Level::Turn) {
                if budget::is_nearly_spent(*limit, spent_usd) && !run.was_warned {
                    run.was_warned = true;
                    warnings.push(Warning {
                        limit: *limit,
                        spent_usd,
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
        if !self.is_over && !self.is_left {
            drop(self.conclude(Outcome::refused()));
        }
    }
}
