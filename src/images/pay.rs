//! Predictions and their money: each is reserved in the ledger and noted before it is asked for, and
//! settled when it is over, by this process or by the next one.
//!
//! ```text
//! reserved ─► noted ─► asked for ─► its id noted ─► followed ─► settled ─► fetched
//!     └ a kill from here on ──► the next start: looked for, ended unless somebody may come back, settled
//! ```
//!
//! Nothing here may be dropped half-way: it runs in a task of its own, and ends by its token.

use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::{
    ImageError, ImageNews, Images, Tell, account,
    note::{Begun, Note},
    plan::Plan,
};
use crate::{
    domain::Account,
    identity::ThreadKey,
    lease::LeaseError,
    replicate::{News, Prediction, Replicate, ReplicateError, Sent, Status, Traced},
    task,
    usage::{Denied, Meter, Reservation, Verdict},
};

/// Largest file that a model may make.
const MAX_MADE: u64 = 32 << 20;
/// For all files of one prediction to arrive.
const FETCHING: Duration = Duration::from_secs(300);
const DISK_DEADLINE: Duration = Duration::from_secs(60);

/// What was paid for, and what it gave.
#[derive(Default)]
pub(super) struct Made {
    pub(super) files: Vec<Bytes>,
    /// Images beyond those that were asked for.
    pub(super) left: usize,
    pub(super) predictions: Vec<String>,
    pub(super) predict_seconds: f64,
    /// `None`: nobody knows.
    pub(super) cost_usd: Option<f64>,
}

impl From<Denied> for ImageError {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::OverBudget(breach) | Denied::Held(breach) => Self::OverBudget(breach),
            other => Self::Budgets(other),
        }
    }
}

impl Images {
    /// Runs the model, or goes on with what an earlier call of the same key has begun.
    pub(super) async fn pay(
        &self,
        key: &ThreadKey,
        plan: &Plan,
        note: &mut Note,
        stop: &CancellationToken,
        tell: Tell<'_>,
    ) -> Result<Made, ImageError> {
        let replicate = self.replicate().await?;
        let meter = self.0.ledger.meter(account(key, Account::IMAGES));
        let mut made = Made {
            cost_usd: Some(0.0),
            ..Made::default()
        };
        let mut warned = 0;
        for run in 0..plan.runs {
            let earlier = self
                .unless(stop, self.earlier(replicate, note, run))
                .await??;
            let (begun, reservation) = match earlier {
                Some(earlier) => earlier,
                // There are enough already.
                None if made.files.len() >= plan.count => break,
                None => self.begin(replicate, plan, &meter, note, stop).await?,
            };
            let done = self.follow(replicate, begun, plan.limit, stop, tell).await;
            let ended = done.as_ref().map_or_else(|(_, ended)| ended.as_ref(), Some);
            if let Some(ended) = ended {
                self.settle(note, run, reservation, ended).await;
            }
            let news = meter.news().borrow().clone();
            for warning in news.warnings.iter().skip(warned) {
                tell(ImageNews::Warning(*warning));
            }
            warned = news.warnings.len();
            let done = done.map_err(|(error, _)| match error {
                ReplicateError::Cancelled { .. } if stop.is_cancelled() => self.stopped(),
                error => error.into(),
            })?;
            let fetched = self.fetch(replicate, plan, &done, &mut made);
            self.unless(stop, fetched).await??;
            let cost = plan.price.and_then(|price| price.cost_of(&done));
            made.cost_usd = made.cost_usd.zip(cost).map(|(sum, cost)| sum + cost);
        }
        Ok(made)
    }

    /// What an earlier call of the same key has begun and what still may give something, with its
    /// reservation where that is not settled. What gives nothing more is settled and forgotten.
    async fn earlier(
        &self,
        replicate: &Replicate,
        note: &mut Note,
        run: usize,
    ) -> Result<Option<(Prediction, Option<Reservation>)>, ImageError> {
        let Some(noted) = note.known.runs.get(run) else {
            return Ok(None);
        };
        let found = match look_for(replicate, note, noted).await {
            Err(ReplicateError::NotFound { .. }) => None,
            found => found?,
        };
        let reservation =
            (!noted.is_settled).then(|| self.0.ledger.take_up(noted.reserved.clone()));
        let is_of_use = |prediction: &Prediction| {
            !prediction.status.is_final()
                // What it made is gone after an hour, with its address.
                || prediction.status == Status::Succeeded && !prediction.output.is_null()
        };
        if let Some(found) = found.as_ref().filter(|found| is_of_use(found)) {
            note.known.runs[run].prediction = Some(found.id.clone());
            return Ok(Some((found.clone(), reservation)));
        }
        match found {
            Some(ended) => self.settle(note, run, reservation, &ended).await,
            None => self.forget(note, run, reservation).await,
        }
        note.known.runs.truncate(run);
        Ok(None)
    }

    /// Reserves a prediction, notes it and asks for it.
    async fn begin(
        &self,
        replicate: &Replicate,
        plan: &Plan,
        meter: &Meter,
        note: &mut Note,
        stop: &CancellationToken,
    ) -> Result<(Prediction, Option<Reservation>), ImageError> {
        let model = plan.model.name.to_string();
        let reserving = meter.reserve_paid(&model, plan.worst());
        let mut reservation = self.unless(stop, reserving).await??;
        reservation.on_disk().await;
        let limit = SignedDuration::try_from(plan.limit).unwrap_or(SignedDuration::MAX);
        let run = note.known.runs.len();
        note.known.runs.push(Begun {
            reserved: reservation.leave(),
            sent: Sent::now(&plan.input),
            price: plan.price,
            until: Timestamp::now()
                .checked_add(limit)
                .unwrap_or(Timestamp::MAX),
            prediction: None,
            is_settled: false,
        });
        if let Err(error) = note.write().await {
            self.forget(note, run, Some(reservation)).await;
            return Err(ImageError::Note(error));
        }
        match replicate.create(&plan.model, &plan.input, plan.limit).await {
            Ok(prediction) => {
                note.known.runs[run].prediction = Some(prediction.id.clone());
                if let Err(error) = note.write().await {
                    // It can be found again without.
                    tracing::warn!(prediction = prediction.id, %error, "a prediction is not noted");
                }
                Ok((prediction, Some(reservation)))
            }
            // It may run: it counts at its worst until somebody finds out.
            Err(error @ ReplicateError::Unclear) => Err(error.into()),
            Err(error) => {
                self.forget(note, run, Some(reservation)).await;
                note.known.runs.truncate(run);
                Err(error.into())
            }
        }
    }

    /// Follows a prediction to its end. An error comes with how it ended, where that is known.
    async fn follow(
        &self,
        replicate: &Replicate,
        begun: Prediction,
        limit: Duration,
        stop: &CancellationToken,
        tell: Tell<'_>,
    ) -> Result<Prediction, (ReplicateError, Option<Prediction>)> {
        let id = begun.id.clone();
        let (mut status, mut percent) = (begun.status, None);
        let told = |news| {
            match news {
                News::Status(now) => status = now,
                News::Percent(done) => percent = Some(done),
                News::Log(_) | News::Silent | News::Ending => return,
            }
            let id = id.clone();
            tell(ImageNews::Prediction {
                id,
                status,
                percent,
            });
        };
        match replicate.follow(begun, limit, stop, told).await {
            Ok(done) => Ok(done),
            Err(error) => {
                let last = replicate.prediction(&id).await.ok();
                Err((error, last.filter(|last| last.status.is_final())))
            }
        }
    }

    /// Writes down what a prediction that is over did cost.
    async fn settle(
        &self,
        note: &mut Note,
        run: usize,
        reservation: Option<Reservation>,
        ended: &Prediction,
    ) {
        let Some(reservation) = reservation else {
            return;
        };
        let has_run = ended.has_run();
        let usd = match note.known.runs[run].price {
            Some(price) => price.cost_of(ended),
            None if has_run => None,
            None => Some(0.0),
        };
        let verdict = match ended.status {
            Status::Succeeded => Verdict::Settled,
            _ if has_run => Verdict::Aborted,
            _ => Verdict::Refused,
        };
        tracing::info!(
            prediction = ended.id,
            status = ended.status.as_str(),
            seconds = ended.measured.predict_seconds,
            cost_usd = usd,
            "a prediction is over"
        );
        reservation
            .settle_paid(verdict, Some(ended.id.clone()), usd)
            .await
            .ok();
        self.is_settled(note, run).await;
    }

    /// It never began: it costs nothing.
    async fn forget(&self, note: &mut Note, run: usize, reservation: Option<Reservation>) {
        let Some(reservation) = reservation else {
            return;
        };
        reservation
            .settle_paid(Verdict::Refused, None, None)
            .await
            .ok();
        self.is_settled(note, run).await;
    }

    async fn is_settled(&self, note: &mut Note, run: usize) {
        note.known.runs[run].is_settled = true;
        if let Err(error) = note.write().await {
            tracing::warn!(%error, "it is not noted that a prediction is settled");
        }
    }

    async fn fetch(
        &self,
        replicate: &Replicate,
        plan: &Plan,
        done: &Prediction,
        made: &mut Made,
    ) -> Result<(), ImageError> {
        let output = done.made(&plan.model);
        let most = plan.count.saturating_sub(made.files.len());
        made.left += output.files().saturating_sub(most);
        let fetching = replicate.fetch(&output, MAX_MADE, most);
        let files = tokio::time::timeout(FETCHING, fetching).await;
        let files = files.map_err(|_| ReplicateError::Download {
            why: format!("it took longer than {} s; try again", FETCHING.as_secs()),
        })?;
        made.files.extend(files?);
        made.predictions.push(done.id.clone());
        made.predict_seconds += done.measured.predict_seconds.unwrap_or_default();
        Ok(())
    }

    /// Looks after what processes that were killed have begun: settles it, and ends what nobody will
    /// come back for. To be called once, at the start; what cannot be done now is left for the next.
    pub async fn take_up(&self, is_ours: impl Fn(&Account) -> bool + Send + 'static) {
        let notes = self.0.notes.clone();
        let look = move || notes.open_ones(is_ours);
        let names = match task::blocking_apart("looking for notes", DISK_DEADLINE, look).await {
            Ok(Ok(names)) => names,
            Ok(Err(error)) => return tracing::warn!(%error, "could not look for predictions"),
            Err(error) => return tracing::warn!(%error, "could not look for predictions"),
        };
        for name in names {
            let images = self.clone();
            self.0.tasks.spawn("looking after a prediction", async move {
                let stop = images.0.supervisor.draining();
                let done = stop.run_until_cancelled(images.look_after(&name)).await;
                if let Some(Err(error)) = done {
                    tracing::warn!(
                        error = %error,
                        "a prediction of an earlier process is not settled: it counts at the most it may cost"
                    );
                }
            });
        }
    }

    async fn look_after(&self, name: &str) -> Result<(), ImageError> {
        let _noted = self.0.noted.lock(name.to_owned()).await;
        let mut note = match self.0.notes.open(name).await {
            Ok(note) => note,
            // Somebody is at it.
            Err(LeaseError::Held { .. }) => return Ok(()),
            Err(error) => return Err(ImageError::Notes(error)),
        };
        let settled = self.settle_left(&mut note).await;
        note.close().await;
        settled
    }

    async fn settle_left(&self, note: &mut Note) -> Result<(), ImageError> {
        let replicate = self.replicate().await?;
        for run in 0..note.known.runs.len() {
            let noted = note.known.runs[run].clone();
            if noted.is_settled {
                continue;
            }
            let found = look_for(replicate, note, &noted).await?;
            let reservation = Some(self.0.ledger.take_up(noted.reserved));
            let Some(found) = found else {
                self.forget(note, run, reservation).await;
                continue;
            };
            note.known.runs[run].prediction = Some(found.id.clone());
            let stop = CancellationToken::new();
            let ended = if found.status.is_final() {
                found
            } else {
                if !note.known.is_kept {
                    tracing::warn!(
                        prediction = found.id,
                        "an image was being made when greenroom was killed; its prediction is cancelled"
                    );
                    stop.cancel();
                }
                let left = noted.until.duration_since(Timestamp::now());
                let left = Duration::try_from(left).unwrap_or_default();
                let mut nobody = |_| {};
                let followed = self.follow(replicate, found, left, &stop, &mut nobody);
                match followed.await {
                    Ok(ended) | Err((_, Some(ended))) => ended,
                    Err((error, None)) => return Err(error.into()),
                }
            };
            self.settle(note, run, reservation, &ended).await;
        }
        Ok(())
    }
}

/// The prediction of a note; `None`: it was never begun.
async fn look_for(
    replicate: &Replicate,
    note: &Note,
    noted: &Begun,
) -> Result<Option<Prediction>, ReplicateError> {
    if let Some(id) = &noted.prediction {
        return Ok(Some(replicate.prediction(id).await?));
    }
    let others = note.known.runs.iter();
    let others: Vec<String> = others.filter_map(|run| run.prediction.clone()).collect();
    match replicate.trace(&noted.sent, &others).await? {
        Traced::Found(found) => Ok(Some(*found)),
        Traced::Never => Ok(None),
        Traced::Unknown => Err(ReplicateError::Unclear),
    }
}
