//! Batches that are handed in over the API: kept on the workspace, run one after another, taken up
//! again by whoever starts next.
//!
//! ```text
//! .greenroom/labels/{batch}/job.json         what was asked, written last: without it there is no batch
//!                           journal.jsonl    what came of it
//!                           images/000001    the files, for as long as they may be needed
//!                           lease/           who works on it
//!                           cancelled        nobody is to take it up again
//! ```

use std::{
    any::Any,
    collections::HashMap,
    fmt, fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::{
    Busy, Cache, Entry, EventLine, JournalError, Labels, Outcome, Plan, Prompt, Question, Summary,
    journal::{self, Known},
    kept::{
        CANCELLED, JOURNAL, Kept, find_open, images, keep, read_job, remove_needless, write_job,
    },
};
use crate::{
    domain::{Account, Usage},
    lease::{Lease, LeaseError, Patience},
    task::{self, BlockingError, Tasks},
    workspace::{WorkspaceError, write_atomic},
};

/// Images of one batch that come in one request.
pub const MAX_UPLOADED: usize = 1000;
/// Batches that wait for their turn, with the one that runs.
const MAX_OPEN: usize = 20;
/// For a batch's files to be written or removed on a slow disk.
const DISK_DEADLINE: Duration = Duration::from_secs(120);
/// Why a batch that was cancelled is not done.
const CANCELLED_BEFORE: &str = "it was cancelled before its end; resume takes it up again";
/// How often somebody who follows is told.
const LOOK: Duration = Duration::from_millis(250);

/// What somebody who needs us holds.
pub type Awake = Arc<dyn Fn() -> Box<dyn Any + Send + Sync> + Send + Sync>;

/// What the batches live by.
#[derive(Clone)]
pub struct BatchSettings {
    /// Where they are kept.
    pub folder: PathBuf,
    pub labels: Labels,
    pub cache: Cache,
    pub busy: Busy,
    /// Of a batch's lease.
    pub lease: Duration,
    /// What it answers is held while a batch runs.
    pub awake: Awake,
}

impl fmt::Debug for BatchSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchSettings")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    pub prompt: Prompt,
    pub model: Option<String>,
    pub account: Account,
    pub workers: usize,
    pub uses_cache: bool,
    pub most_usd: Option<f64>,
}

/// How a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It waits for its turn, or for a start of greenroom.
    Queued,
    Running,
    /// Every image has its outcome.
    Completed,
    /// It stopped before its end, and can be resumed.
    Stopped,
    Cancelled,
}

/// A batch as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct BatchView {
    pub batch_id: String,
    pub status: Standing,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    pub total: usize,
    pub success: usize,
    pub failed: usize,
    /// Without an outcome so far.
    pub left: usize,
    pub usage: Usage,
    /// Why it stopped before its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// In the order in which they were handed in; those that have an outcome.
    pub results: Vec<Entry>,
}

/// Why a batch was not had.
#[derive(Debug, thiserror::Error)]
pub enum BatchesError {
    #[error("there is no such batch")]
    NotFound,
    #[error("{MAX_OPEN} batches wait already; hand it in when some are done")]
    Full,
    #[error("greenroom is shutting down; ask again in a moment")]
    Draining,
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}

#[derive(Debug)]
struct Inner {
    settings: BatchSettings,
    tasks: Tasks,
    /// Those that run or wait in this process, with what stops them.
    open: Mutex<HashMap<String, Open>>,
    /// One runs at a time: then there is always a slot for somebody with one image.
    line: Semaphore,
}

#[derive(Debug)]
struct Open {
    stop: CancellationToken,
    is_running: bool,
    /// It was stopped, and is to go on once what is under way has ended.
    goes_on: bool,
}

/// The batches of a workspace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Batches(Arc<Inner>);

impl Batches {
    /// See [`BatchSettings`]. Touches no disk yet.
    pub fn new(settings: BatchSettings, tasks: &Tasks) -> Self {
        Self(Arc::new(Inner {
            settings,
            tasks: tasks.clone(),
            open: Mutex::default(),
            line: Semaphore::new(1),
        }))
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, id: &str) -> Result<PathBuf, BatchesError> {
        // As ids are made; nothing else becomes a path.
        let is_id = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
        match is_id {
            true => Ok(self.0.settings.folder.join(id.to_ascii_lowercase())),
            false => Err(BatchesError::NotFound),
        }
    }

    /// Takes a batch: when this returns, it is on the disk. Answers its id.
    ///
    /// # Errors
    /// [`BatchesError`]; nothing was taken then.
    pub async fn submit(
        &self,
        job: Job,
        files: Vec<(String, Bytes)>,
    ) -> Result<String, BatchesError> {
        if self.is_draining() {
            return Err(BatchesError::Draining);
        }
        if self.open().len() >= MAX_OPEN {
            return Err(BatchesError::Full);
        }
        let id = uuid::Uuid::now_v7().simple().to_string();
        let folder = self.folder(&id)?;
        let (names, files): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let kept = Kept {
            batch_id: id.clone(),
            created_at: Timestamp::now(),
            names,
            job,
            asks_again: false,
        };
        let write = move || -> Result<(), WorkspaceError> {
            let written = keep(&folder, &kept, &files);
            if written.is_err() {
                fs::remove_dir_all(&folder).ok();
            }
            written
        };
        task::blocking("keeping a batch", DISK_DEADLINE, write).await??;
        self.begin(id.clone());
        Ok(id)
    }

    /// Who pays for a batch.
    ///
    /// # Errors
    /// [`BatchesError::NotFound`], or the disk's.
    pub async fn account(&self, id: &str) -> Result<Account, BatchesError> {
        Ok(self.kept(id).await?.job.account)
    }

    /// How a batch stands, and what came of its images.
    ///
    /// # Errors
    /// [`BatchesError::NotFound`], or the disk's.
    pub async fn view(&self, id: &str) -> Result<BatchView, BatchesError> {
        let kept = self.kept(id).await?;
        let folder = self.folder(id)?;
        let running = self.open().get(&kept.batch_id).map(|open| open.is_running);
        let look = move || -> Result<_, JournalError> {
            let is_cancelled = folder.join(CANCELLED).exists();
            Ok((journal::look(&folder.join(JOURNAL))?, is_cancelled))
        };
        let (past, is_cancelled) =
            task::blocking("reading a batch's journal", DISK_DEADLINE, look).await??;
        let past = past.unwrap_or_default();
        let status = match (running, &past.summary) {
            (Some(true), _) => Standing::Running,
            (_, Some(summary)) if summary.is_complete() => Standing::Completed,
            (_, _) if is_cancelled => Standing::Cancelled,
            (Some(false), _) => Standing::Queued,
            (None, Some(_)) => Standing::Stopped,
            (None, None) => Standing::Queued,
        };
        let mut images = past.images;
        let results: Vec<Entry> = kept
            .names
            .iter()
            .filter_map(|name| match images.remove(name)? {
                Known::Done { entry, .. } => Some(entry),
                Known::Sent { .. } => None,
            })
            .collect();
        let is_labelled = |entry: &&Entry| matches!(entry.outcome, Outcome::Labelled { .. });
        let success = results.iter().filter(is_labelled).count();
        let reason = past.summary.and_then(|summary| summary.reason);
        let reason = match status {
            // Unlike any other it does not go on by itself.
            Standing::Cancelled => Some(CANCELLED_BEFORE.to_owned()),
            _ => reason,
        };
        Ok(BatchView {
            batch_id: kept.batch_id,
            status,
            created_at: kept.created_at,
            total: kept.names.len(),
            success,
            failed: results.len() - success,
            left: kept.names.len() - results.len(),
            usage: past.usage,
            reason: reason.filter(|_| !matches!(status, Standing::Running | Standing::Queued)),
            results,
        })
    }

    /// Stops a batch for good; what is under way ends first.
    ///
    /// # Errors
    /// [`BatchesError::NotFound`], or the disk's.
    pub async fn cancel(&self, id: &str) -> Result<(), BatchesError> {
        let kept = self.kept(id).await?;
        let mark = self.folder(id)?.join(CANCELLED);
        let write = move || write_atomic(&mark, b"");
        task::blocking("cancelling a batch", DISK_DEADLINE, write).await??;
        if let Some(open) = self.open().get_mut(&kept.batch_id) {
            open.goes_on = false;
            open.stop.cancel();
        }
        Ok(())
    }

    /// Takes a batch up again; with `asks_again` also what failed although that was, or may have
    /// been, paid. One that is under way goes on as it is; one that is being cancelled goes on once
    /// what is under way has ended.
    ///
    /// # Errors
    /// [`BatchesError`].
    pub async fn resume(&self, id: &str, asks_again: bool) -> Result<(), BatchesError> {
        let mut kept = self.kept(id).await?;
        if self.is_draining() {
            return Err(BatchesError::Draining);
        }
        let is_on = |open: &Open| !open.stop.is_cancelled();
        if self.open().get(&kept.batch_id).is_some_and(is_on) {
            return Ok(());
        }
        let folder = self.folder(id)?;
        kept.asks_again = asks_again;
        let write = move || -> Result<(), WorkspaceError> {
            let mark = folder.join(CANCELLED);
            match fs::remove_file(&mark) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(WorkspaceError::io("remove", &mark)(error))
                }
                _ => write_job(&folder, &kept),
            }
        };
        task::blocking("resuming a batch", DISK_DEADLINE, write).await??;
        self.begin(id.to_ascii_lowercase());
        Ok(())
    }

    /// Takes up what others left, and removes what is old. To be called once, at the start.
    pub async fn take_up(&self, is_ours: impl Fn(&Account) -> bool + Send + 'static) {
        let folder = self.0.settings.folder.clone();
        let look = move || find_open(&folder, is_ours);
        match task::blocking_apart("looking for batches", DISK_DEADLINE, look).await {
            Ok(Ok(ids)) => {
                for id in ids {
                    tracing::info!(batch = id, "a batch of images goes on");
                    self.begin(id);
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "could not look for batches"),
            Err(error) => tracing::warn!(%error, "could not look for batches"),
        }
    }

    /// The events after the one of this number.
    ///
    /// # Errors
    /// [`BatchesError::NotFound`], or the disk's.
    pub async fn events(&self, id: &str, after: u64) -> Result<BatchEvents, BatchesError> {
        let kept = self.kept(id).await?;
        Ok(BatchEvents {
            journal: self.folder(id)?.join(JOURNAL),
            id: kept.batch_id,
            batches: self.clone(),
            offset: 0,
            after,
        })
    }

    fn is_draining(&self) -> bool {
        self.0.settings.labels.service().draining().is_cancelled()
    }

    async fn kept(&self, id: &str) -> Result<Kept, BatchesError> {
        let folder = self.folder(id)?;
        let read = move || read_job(&folder);
        let kept = task::blocking("reading a batch", DISK_DEADLINE, read).await??;
        kept.ok_or(BatchesError::NotFound)
    }

    /// Puts a batch in line, unless it is there. One that ends because it was cancelled is put there
    /// again afterwards.
    fn begin(&self, id: String) {
        let mut stop = self.0.settings.labels.service().draining().child_token();
        {
            let mut open = self.open();
            if let Some(there) = open.get_mut(&id) {
                there.goes_on = there.stop.is_cancelled();
                return;
            }
            let entry = Open {
                stop: stop.clone(),
                is_running: false,
                goes_on: false,
            };
            open.insert(id.clone(), entry);
        }
        let batches = self.clone();
        self.0.tasks.spawn("a batch of images", async move {
            loop {
                if let Err(error) = batches.run(&id, &stop).await {
                    tracing::error!(batch = id, error = %error, "a batch of images cannot go on");
                }
                match batches.ended(&id) {
                    Some(again) => stop = again,
                    None => return,
                }
            }
        });
    }

    /// A batch has ended for now; what stops it from now on, if it goes on at once. It is never out of
    /// the list in between, so that whoever follows it stays.
    fn ended(&self, id: &str) -> Option<CancellationToken> {
        let mut all = self.open();
        let open = all.get_mut(id).filter(|open| open.goes_on);
        let Some(open) = open.filter(|_| !self.is_draining()) else {
            all.remove(id);
            return None;
        };
        *open = Open {
            stop: self.0.settings.labels.service().draining().child_token(),
            is_running: false,
            goes_on: false,
        };
        Some(open.stop.clone())
    }

    async fn run(&self, id: &str, stop: &CancellationToken) -> Result<(), BatchesError> {
        let settings = &self.0.settings;
        let _turn = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            turn = self.0.line.acquire() => turn.expect("the semaphore is never closed"),
        };
        let _awake = (settings.awake)();
        let folder = self.folder(id)?;
        let place = folder.join("lease");
        let lease = Lease::acquire(&place, settings.lease, Patience::None, &self.0.tasks);
        let lease = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            lease = lease => match lease {
                Ok(lease) => lease,
                Err(LeaseError::Held { .. }) => {
                    tracing::info!(batch = id, "another greenroom works on this batch");
                    return Ok(());
                }
                Err(LeaseError::Blocking(error)) => return Err(error.into()),
                Err(LeaseError::Io { path, source, .. }) => {
                    return Err(WorkspaceError::io("take the lease", &path)(source).into());
                }
            },
        };
        if let Some(open) = self.open().get_mut(id) {
            open.is_running = true;
        }
        let kept = self.kept(id).await?;
        let most = settings.labels.service().max_concurrent();
        let plan = Plan {
            id: id.to_owned(),
            images: images(&folder, &kept.names),
            question: Question {
                prompt: kept.job.prompt,
                model: kept.job.model,
                account: kept.job.account,
                timeout: None,
            },
            // One is left for whoever asks about a single image.
            workers: kept.job.workers.min(most.saturating_sub(1)).max(1),
            cache: kept.job.uses_cache.then(|| settings.cache.clone()),
            asks_again: kept.asks_again,
            begins_anew: false,
            replaces_captions: false,
            most_usd: kept.job.most_usd,
            busy: settings.busy.clone(),
        };
        let run = settings.labels.run_batch(
            &plan,
            folder.join(JOURNAL),
            lease.fence().clone(),
            stop,
            |_, _| true,
        );
        // Somebody else goes on with it, and finds what is under way noted.
        let ran = tokio::select! {
            () = lease.fence().lost() => return Ok(()),
            ran = run => ran,
        };
        let summary = match ran {
            Ok(summary) => summary,
            Err(super::BatchError::Journal(error)) => return Err(error.into()),
        };
        tell(id, &summary);
        let clean = move || remove_needless(&folder, &plan.images);
        if task::blocking("removing a batch's images", DISK_DEADLINE, clean)
            .await
            .is_err()
        {
            tracing::warn!(batch = id, "a batch's images could not be removed");
        }
        lease.release().await;
        Ok(())
    }
}

/// Reads a batch's events, waiting for those to come.
#[derive(Debug)]
pub struct BatchEvents {
    id: String,
    journal: PathBuf,
    batches: Batches,
    offset: u64,
    after: u64,
}

impl BatchEvents {
    /// The next events; empty once nobody writes any more.
    ///
    /// # Errors
    /// [`BatchesError`].
    pub async fn next(&mut self) -> Result<Vec<EventLine>, BatchesError> {
        loop {
            // Before the look: what is written after it is then seen.
            let is_open = self.batches.open().contains_key(&self.id);
            let (path, from) = (self.journal.clone(), self.offset);
            let read = move || match journal::read(&path, from) {
                Err(JournalError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    Ok((Vec::new(), from))
                }
                read => read,
            };
            let (lines, end) =
                task::blocking("reading a batch's events", DISK_DEADLINE, read).await??;
            let is_at_end = end == self.offset;
            self.offset = end;
            let fresh: Vec<_> = lines
                .into_iter()
                .filter(|line| line.id > self.after)
                .collect();
            if !fresh.is_empty() {
                return Ok(fresh);
            }
            if is_at_end {
                if !is_open {
                    return Ok(Vec::new());
                }
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

fn tell(id: &str, summary: &Summary) {
    tracing::info!(
        batch = id,
        total = summary.total,
        success = summary.success,
        failed = summary.failed,
        left = summary.left,
        cost_usd = summary.usage.cost_usd,
        elapsed_ms = summary.duration_ms,
        "a batch of images ended"
    );
}
