//! Many images, a few at a time, each labelled once whatever happens on the way.
//!
//! ```text
//! file ─► digest ─► known? (journal, twin, cache) ─► picture ─► turn? budget? ─► sent ─► label ─► journal
//! ```
//!
//! Its journal is the truth ([`super::journal`]): a batch that was killed is begun again over the
//! same one. An image whose request was under way when it was killed may have been paid, and its
//! answer is lost: it is a failure (`interrupted`), and asked about again only by
//! [`Plan::asks_again`]. So is whatever was paid and not understood. What cost nothing is tried
//! again by itself.
//!
//! It takes slots of [`Labels`] like anybody else and leaves one for others; while somebody's turn
//! runs it has one image at a time under way ([`Pace`]). A limit of money, or a CLI that is not there, stops
//! it; so does its stop token. Then what is under way ends in peace, and the rest waits for the
//! next time.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    path::PathBuf,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    BeforeSending, Failure, Label, Labels, Prompt, Question,
    cache::Cache,
    caption, gate,
    journal::{Done, Event, Journal, JournalError, Known, Past},
    outcome::{Code, Entry, Failed, Outcome, Progress, Summary},
    pace::{Door, IDLE, Pace, STOPPED, Turn},
    retry::{Next, next},
    tally::Tally,
};
use crate::{
    picture::{self, Picture, PictureError},
    task,
    workspace::{WorkspaceError, read_bounded},
};

/// Images of one batch.
pub const MAX_IMAGES: usize = 100_000;
/// How often an image is tried, as long as that costs nothing.
const TRIES: u32 = 4;
/// Before the second try; four times as long before each further one.
const PAUSE: Duration = Duration::from_secs(2);
const MAX_PAUSE: Duration = Duration::from_secs(120);
const DISK_DEADLINE: Duration = Duration::from_secs(60);

/// Does somebody wait for an answer who comes first?
#[derive(Clone)]
pub struct Busy(pub(super) Arc<dyn Fn() -> bool + Send + Sync>);

impl Busy {
    /// As this says.
    pub fn new(is_busy: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(is_busy))
    }
}

impl Default for Busy {
    /// Nobody ever does.
    fn default() -> Self {
        Self::new(|| false)
    }
}

impl fmt::Debug for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Busy")
    }
}

/// One image of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What it is called in answers and in the journal; no two are called alike.
    pub name: String,
    pub path: PathBuf,
    /// Where its caption is written, as trainers of image models read it.
    pub caption: Option<PathBuf>,
    /// What is asked about it, where that is not what is asked about all.
    pub prompt: Option<Prompt>,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    pub id: String,
    pub images: Vec<Image>,
    pub question: Question,
    /// Images under way at once, at most.
    pub workers: usize,
    /// `None`: the same bytes are asked about as often as they come.
    pub cache: Option<Cache>,
    /// Also about what failed and was paid.
    pub asks_again: bool,
    /// All of it is asked about once more where it was over. One that was not goes on.
    pub begins_anew: bool,
    /// Captions are written over whatever is there.
    pub replaces_captions: bool,
    /// Most that it may spend, in US dollars, on all its starts together.
    pub most_usd: Option<f64>,
    pub busy: Busy,
}

/// A batch that could not go on.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What is known of a file's bytes in this batch. Who holds the lock asks about them.
type Twin = Arc<tokio::sync::Mutex<Option<Outcome>>>;

struct Run<'a> {
    labels: &'a Labels,
    plan: &'a Plan,
    journal: &'a Arc<Journal>,
    past: HashMap<String, Known>,
    /// What was said of images before, for their captions.
    said: HashMap<String, String>,
    /// Who answers: labels are known by it.
    model: String,
    twins: Mutex<HashMap<String, Twin>>,
    pace: Pace,
    tally: Mutex<Tally>,
    stop: CancellationToken,
}

/// Why an image has no outcome yet.
enum Pause {
    /// The whole batch stops.
    Stop(String),
    Journal(JournalError),
}

impl From<JournalError> for Pause {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a batch to its end, or until `stop`; `tell` hears of each outcome, also of those that are
/// known from before, and stops it by answering false.
///
/// # Errors
/// If its journal cannot be written: then nothing more is asked.
pub(super) async fn run(
    labels: &Labels,
    plan: &Plan,
    journal: Arc<Journal>,
    mut past: Past,
    stop: &CancellationToken,
    mut tell: impl FnMut(&Entry, &Progress) -> bool,
) -> Result<Summary, BatchError> {
    let model = plan.question.model.as_deref().or(labels.service().model());
    let is_over = past.summary.as_ref().is_some_and(Summary::is_complete);
    let anew = plan.begins_anew && is_over;
    if anew {
        past.begin_anew();
    }
    let stop = stop.child_token();
    let run = Run {
        labels,
        plan,
        journal: &journal,
        model: match labels.is_rehearsal() {
            true => "a rehearsal".to_owned(),
            false => model.unwrap_or_default().to_owned(),
        },
        twins: Mutex::new(twins_of(&past, plan.asks_again)),
        past: past.images,
        said: past.said,
        pace: Pace::new(plan.workers, plan.most_usd, plan.busy.clone(), stop.clone()),
        tally: Mutex::new(Tally::new(plan.images.len(), past.usage)),
        stop,
    };
    let done = plan
        .images
        .iter()
        .filter(|image| matches!(run.past.get(&image.name), Some(Known::Done { .. })));
    let started = Event::Started {
        batch_id: plan.id.clone(),
        total: plan.images.len(),
        done: done.count(),
        anew,
    };
    journal.append(started).await?;
    let ended = {
        let run = &run;
        let mut outcomes = stream::iter(0..plan.images.len())
            .map(move |at| run.one(&run.plan.images[at]))
            // Those that get ready too.
            .buffer_unordered(plan.workers.max(1) * 2);
        let mut ended = Ok(());
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Ok((entry, progress)) => {
                    if !tell(&entry, &progress) {
                        run.stop.cancel();
                    }
                }
                Err(Pause::Stop(reason)) => {
                    lock(&run.tally).stopped(reason);
                    run.stop.cancel();
                }
                Err(Pause::Journal(error)) => {
                    run.stop.cancel();
                    ended = Err(error);
                }
            }
        }
        ended
    };
    ended?;
    let summary = lock(&run.tally).summary(&plan.id);
    journal
        .append(match summary.is_complete() {
            true => Event::Completed(summary.clone()),
            false => Event::Stopped(summary.clone()),
        })
        .await?;
    Ok(summary)
}

/// What is known already by a file's bytes: labels, and what may have been paid.
fn twins_of(past: &Past, asks_again: bool) -> HashMap<String, Twin> {
    let mut known: HashMap<&str, Outcome> = HashMap::new();
    for image in past.images.values() {
        let (digest, outcome) = match image {
            Known::Sent { digest } => (digest, Outcome::Failed(Failed::interrupted())),
            Known::Done {
                digest: Some(digest),
                entry,
            } => (digest, entry.outcome.clone()),
            Known::Done { digest: None, .. } => continue,
        };
        let is_label = matches!(outcome, Outcome::Labelled { .. });
        let is_paid = matches!(&outcome, Outcome::Failed(failed) if failed.paid);
        if is_label {
            known.insert(digest, outcome);
        } else if is_paid && !asks_again {
            known.entry(digest).or_insert(outcome);
        }
    }
    let twins = known.into_iter().map(|(digest, outcome)| {
        let twin = Arc::new(tokio::sync::Mutex::new(Some(outcome)));
        (digest.to_owned(), twin)
    });
    twins.collect()
}

impl Run<'_> {
    /// The outcome of one image.
    async fn one(&self, image: &Image) -> Result<(Entry, Progress), Pause> {
        if self.stop.is_cancelled() {
            return Err(Pause::Stop(STOPPED.to_owned()));
        }
        let path = image.path.clone();
        let limit = picture::MAX_BYTES as u64;
        let read = task::blocking("reading an image", DISK_DEADLINE, move || {
            let bytes = read_bounded(&path, limit)?;
            Ok(bytes.map(|bytes| (hex::encode(Sha256::digest(&bytes)), bytes)))
        });
        let (digest, bytes) = match read.await {
            Ok(Ok(Some(read))) => read,
            Ok(Ok(None)) => {
                // Removed since, because nobody needs it any more.
                if let Some(Known::Done { entry, .. }) = self.past.get(&image.name) {
                    let progress = self.count(&entry.outcome, false);
                    return Ok((entry.clone(), progress));
                }
                let failed = Failed::not_read("there is no such file");
                return self.fail(image, None, failed).await;
            }
            Ok(Err(WorkspaceError::TooLarge { .. })) => {
                let too_large = PictureError::TooLarge {
                    bytes: picture::MAX_BYTES + 1,
                    most: picture::MAX_BYTES,
                };
                return self.fail(image, None, too_large.into()).await;
            }
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let said = cause.unwrap_or_else(|| error.to_string());
                return self.fail(image, None, Failed::not_read(&said)).await;
            }
            Err(error) => {
                return self
                    .fail(image, None, Failed::not_read(&error.to_string()))
                    .await;
            }
        };
        if let Some(known) = self.known(image, &digest) {
            return self.keep(image, &digest, known).await;
        }
        let Some(cache) = &self.plan.cache else {
            let outcome = self.ask(image, &digest, bytes.into()).await?;
            return self.end(image, &digest, outcome).await;
        };
        // Twins wait for the first of them.
        let question = self.question(image);
        let alike = match &image.prompt {
            None => digest.clone(),
            Some(prompt) => format!("{digest} {}", prompt.text()),
        };
        let twin = lock(&self.twins).entry(alike).or_default().clone();
        let mut twin = twin.lock().await;
        let outcome = match &*twin {
            Some(known) => known.clone().free(),
            None => match cache.get(&digest, &question, &self.model).await {
                Some(label) => Outcome::Labelled {
                    label: Box::new(label),
                    cached: true,
                },
                None => {
                    let outcome = self.ask(image, &digest, bytes.into()).await?;
                    if let Outcome::Labelled { label, .. } = &outcome {
                        cache.put(&digest, &question, &self.model, label).await;
                    }
                    outcome
                }
            },
        };
        let is_settled = match &outcome {
            Outcome::Labelled { .. } => true,
            // Of its bytes, or paid: its twins fare alike.
            Outcome::Failed(failed) => failed.paid || failed.code == Code::InvalidImage,
        };
        if is_settled {
            *twin = Some(outcome.clone());
        }
        drop(twin);
        self.end(image, &digest, outcome).await
    }

    /// What is asked about an image.
    fn question(&self, image: &Image) -> Cow<'_, Question> {
        match &image.prompt {
            None => Cow::Borrowed(&self.plan.question),
            Some(prompt) => Cow::Owned(Question {
                prompt: prompt.clone(),
                ..self.plan.question.clone()
            }),
        }
    }

    /// What the journal has of an image, if that still holds.
    fn known(&self, image: &Image, digest: &str) -> Option<Outcome> {
        match self.past.get(&image.name)? {
            Known::Done {
                digest: Some(then),
                entry,
            } if then == digest => match &entry.outcome {
                labelled @ Outcome::Labelled { .. } => Some(labelled.clone()),
                Outcome::Failed(failed) => {
                    (failed.paid && !self.plan.asks_again).then(|| entry.outcome.clone())
                }
            },
            Known::Sent { digest: then } if then == digest && !self.plan.asks_again => {
                Some(Outcome::Failed(Failed::interrupted()))
            }
            // Another file by now, or never asked.
            Known::Done { .. } | Known::Sent { .. } => None,
        }
    }

    /// Takes over what is known from before.
    async fn keep(
        &self,
        image: &Image,
        digest: &str,
        outcome: Outcome,
    ) -> Result<(Entry, Progress), Pause> {
        if matches!(self.past.get(&image.name), Some(Known::Sent { .. })) {
            return self.end(image, digest, outcome).await;
        }
        let entry = Entry {
            image: image.name.clone(),
            outcome,
        };
        let progress = self.count(&entry.outcome, false);
        self.caption(image, &entry.outcome).await;
        Ok((entry, progress))
    }

    async fn fail(
        &self,
        image: &Image,
        digest: Option<&str>,
        failed: Failed,
    ) -> Result<(Entry, Progress), Pause> {
        self.write(image, digest, Outcome::Failed(failed)).await
    }

    async fn end(
        &self,
        image: &Image,
        digest: &str,
        outcome: Outcome,
    ) -> Result<(Entry, Progress), Pause> {
        let written = self.write(image, Some(digest), outcome).await?;
        // After it is noted: what a kill leaves beside an image is then known as ours.
        self.caption(image, &written.0.outcome).await;
        Ok(written)
    }

    /// Writes an outcome down.
    async fn write(
        &self,
        image: &Image,
        digest: Option<&str>,
        outcome: Outcome,
    ) -> Result<(Entry, Progress), Pause> {
        let progress = self.count(&outcome, true);
        let is_labelled = matches!(outcome, Outcome::Labelled { .. });
        let entry = Entry {
            image: image.name.clone(),
            outcome,
        };
        let done = Box::new(Done {
            digest: digest.map(str::to_owned),
            result: entry.clone(),
            progress,
        });
        let event = match is_labelled {
            true => Event::Labelled(done),
            false => Event::Failed(done),
        };
        self.journal.append(event).await?;
        Ok((entry, progress))
    }

    /// Writes a caption beside its image, if that is wanted and nobody's own words are there.
    async fn caption(&self, image: &Image, outcome: &Outcome) {
        let (Some(path), Outcome::Labelled { label, .. }) = (image.caption.clone(), outcome) else {
            return;
        };
        let (at, description) = (path.clone(), label.description.clone());
        let before = self.said.get(&image.name).cloned();
        let replaces = self.plan.replaces_captions;
        let write = move || caption::write(&at, &description, before.as_deref(), replaces);
        match task::blocking("writing a caption", DISK_DEADLINE, write).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                lock(&self.tally).kept_a_caption();
                tracing::warn!(
                    image = image.name,
                    caption = %path.display(),
                    "a caption was left as it is, since it is not what was written there; \
                     --replace-captions replaces it"
                );
            }
            written => tracing::warn!(
                image = image.name,
                ?written,
                "a caption could not be written"
            ),
        }
    }

    /// Has it labelled.
    async fn ask(&self, image: &Image, digest: &str, bytes: Bytes) -> Result<Outcome, Pause> {
        let picture = match picture::develop(bytes).await {
            Ok(picture) => picture,
            Err(error) => return Ok(Outcome::Failed(error.into())),
        };
        let mut pause = PAUSE;
        for attempt in 1.. {
            let asked = self.ask_once(image, digest, &picture).await?;
            let failure = match asked {
                Ok(label) => {
                    return Ok(Outcome::Labelled {
                        label: Box::new(label),
                        cached: false,
                    });
                }
                Err(failure) => failure,
            };
            if failure.is_paid {
                return Ok(Outcome::Failed(failure.into()));
            }
            let wait = match next(&failure.error) {
                Next::GiveUp => return Ok(Outcome::Failed(failure.into())),
                Next::Stop => return Err(Pause::Stop(failure.to_string())),
                Next::Again(_) if attempt >= TRIES => {
                    return Ok(Outcome::Failed(failure.into()));
                }
                Next::Again(wait) => wait.unwrap_or(pause),
            };
            tracing::info!(
                image = image.name,
                attempt,
                pause_ms = wait.as_millis() as u64,
                error = %failure,
                "an image is tried again; it has cost nothing"
            );
            tokio::select! {
                () = self.stop.cancelled() => return Err(Pause::Stop(STOPPED.to_owned())),
                () = sleep(wait) => {}
            }
            pause = (pause * 4).min(MAX_PAUSE);
        }
        unreachable!("it ends after so many tries")
    }

    /// The same, once.
    async fn ask_once(
        &self,
        image: &Image,
        digest: &str,
        picture: &Picture,
    ) -> Result<Result<Label, Failure>, Pause> {
        let first = match self.pace.is_busy() {
            true => Some(self.turn(image).await?),
            false => None,
        };
        if let Some(asked) = self.ask_ahead(image, digest, picture, first).await? {
            return Ok(asked);
        }
        let turn = self.turn(image).await?;
        let asked = self.ask_ahead(image, digest, picture, Some(turn)).await?;
        Ok(asked.expect("who has its turn does not wait for it"))
    }

    /// Begins its run, whose request waits for its turn; `None`: for too long, and it was ended.
    async fn ask_ahead<'a>(
        &'a self,
        image: &Image,
        digest: &str,
        picture: &Picture,
        turn: Option<Turn<'a>>,
    ) -> Result<Option<Result<Label, Failure>>, Pause> {
        // Those that get ready wait for a turn: who has one must not wait for them.
        let preparing = match turn {
            Some(_) => None,
            None => match self.pace.prepare().await {
                Some(permit) => Some(permit),
                None => return Err(Pause::Stop(STOPPED.to_owned())),
            },
        };
        let door = Door::new();
        let question = self.question(image);
        let gate = gate(&question.prompt, self.before(image, digest));
        let gate = gate.after(door.waiting(self.labels.service()));
        let mut asked = pin!(self.labels.ask(picture, &question, gate));
        let turn = match turn {
            Some(turn) => turn,
            None => {
                let wait = async {
                    tokio::select! {
                        () = door.knocked() => {}
                        () = self.stop.cancelled() => return Err(Pause::Stop(STOPPED.to_owned())),
                    }
                    timeout(IDLE, self.turn(image)).await.ok().transpose()
                };
                let turn = tokio::select! {
                    // It ended before it asked.
                    asked = &mut asked => return Ok(Some(asked)),
                    turn = wait => turn?,
                };
                let Some(turn) = turn else { return Ok(None) };
                turn
            }
        };
        door.open();
        drop(preparing);
        let mut turn = Some(turn);
        loop {
            tokio::select! {
                asked = &mut asked => return Ok(Some(asked)),
                () = door.answered(), if turn.is_some() && self.pace.ends_with_answer() => turn = None,
            }
        }
    }

    /// What is written before a request about an image goes up.
    fn before(&self, image: &Image, digest: &str) -> Arc<BeforeSending> {
        let (journal, name, digest) = (self.journal.clone(), image.name.clone(), digest.to_owned());
        Arc::new(move || {
            let journal = journal.clone();
            let event = Event::Sent {
                image: name.clone(),
                digest: digest.clone(),
            };
            Box::pin(async move {
                let written = journal.append(event).await;
                written.map_err(|_| "the batch's journal cannot be written")
            })
        })
    }

    /// Waits until one more image may be under way.
    async fn turn(&self, image: &Image) -> Result<Turn<'_>, Pause> {
        let worst = self.labels.worst(&self.question(image));
        let spent = || lock(&self.tally).usage().cost_usd;
        self.pace.turn(worst, spent).await.map_err(Pause::Stop)
    }

    fn count(&self, outcome: &Outcome, is_new: bool) -> Progress {
        lock(&self.tally).count(outcome, is_new)
    }
}
