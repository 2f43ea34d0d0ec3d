//! The journal of a batch: one append-only file of JSON lines, each an event with a growing number.
//!
//! What must not be lost is on the disk before it is believed: that a request about an image goes
//! up ([`Event::Sent`]), and what came of it ([`Event::Labelled`], [`Event::Failed`]). So a batch
//! that was killed knows of each image whether it was asked about, and asks about none again that
//! may have been paid.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use super::outcome::{Entry, Outcome, Progress, Summary};
use crate::{
    domain::Usage,
    lease::{Fence, LeaseLost},
    task::{self, BlockingError},
    workspace::{append_line, make_private_dir},
};

/// For a line to reach the disk.
const DISK_DEADLINE: Duration = Duration::from_secs(60);
/// A batch that was cancelled has ended a moment before the last of its calls, which holds the journal
/// as well, and so does a child between its fork and its program.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(50);
/// Longest line that is read back; what is written is far shorter.
const MAX_LINE: u64 = 4 << 20;
/// Lines that are read at once for somebody who follows.
const AT_ONCE: usize = 256;

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("failed to {operation} the batch's journal {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another greenroom works on this batch ({} is locked)", path.display())]
    Busy { path: PathBuf },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error(transparent)]
    Lost(#[from] LeaseLost),
}

/// What happens in a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data")]
pub enum Event {
    /// A process begins to work on it, for the first time or again.
    #[serde(rename = "batch.started", rename_all = "camelCase")]
    Started {
        batch_id: String,
        total: usize,
        /// Images whose outcome is known from before.
        done: usize,
        /// Nothing of what stands above counts any more: it was over, and is done once more.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        anew: bool,
    },
    #[serde(rename = "image.sent")]
    Sent { image: String, digest: String },
    #[serde(rename = "image.labelled")]
    Labelled(Box<Done>),
    #[serde(rename = "image.failed")]
    Failed(Box<Done>),
    #[serde(rename = "batch.completed")]
    Completed(Summary),
    /// It stopped before its end, and goes on when it is started again.
    #[serde(rename = "batch.stopped")]
    Stopped(Summary),
    /// Of a newer version: passed over.
    #[serde(other)]
    Unknown,
}

/// An image's outcome, and how far the batch is with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// SHA-256 of the file; `None` where it could not be read.
    pub digest: Option<String>,
    pub result: Entry,
    pub progress: Progress,
}

impl Event {
    /// As it is called.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "batch.started",
            Self::Sent { .. } => "image.sent",
            Self::Labelled(_) => "image.labelled",
            Self::Failed(_) => "image.failed",
            Self::Completed(_) => "batch.completed",
            Self::Stopped(_) => "batch.stopped",
            Self::Unknown => "unknown",
        }
    }
}

/// One event as it stands in the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    /// Grows by one, from 1.
    pub id: u64,
    pub at: Timestamp,
    #[serde(flatten)]
    pub event: Event,
}

/// What a journal tells of one image.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Known {
    /// Its request went up, and nobody knows what came of it.
    Sent { digest: String },
    Done {
        digest: Option<String>,
        entry: Entry,
    },
}

/// What a journal tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Past {
    pub(super) images: HashMap<String, Known>,
    /// What was spent, also on outcomes that were replaced since.
    pub(super) usage: Usage,
    /// How it ended, if that is the last word.
    pub(super) summary: Option<Summary>,
    /// What was last said of each image, whatever came of it since: a caption of these words is ours.
    pub(super) said: HashMap<String, String>,
}

impl Past {
    /// Forgets what came of images: they are asked about once more.
    pub(super) fn begin_anew(&mut self) {
        self.images.clear();
        self.usage = Usage::default();
    }

    fn take_in(&mut self, event: Event) {
        self.summary = None;
        match event {
            Event::Sent { image, digest } => {
                self.images.insert(image, Known::Sent { digest });
            }
            Event::Labelled(done) | Event::Failed(done) => {
                let done = *done;
                self.usage = self.usage + done.result.outcome.usage();
                let image = done.result.image.clone();
                if let Outcome::Labelled { label, .. } = &done.result.outcome {
                    self.said.insert(image.clone(), label.description.clone());
                }
                let known = Known::Done {
                    digest: done.digest,
                    entry: done.result,
                };
                self.images.insert(image, known);
            }
            Event::Completed(summary) | Event::Stopped(summary) => self.summary = Some(summary),
            Event::Started { anew: true, .. } => self.begin_anew(),
            Event::Started { .. } | Event::Unknown => {}
        }
    }
}

/// The writing end. One process has it at a time.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: Arc<File>,
    fence: Fence,
    next_id: Mutex<u64>,
}

impl Journal {
    /// Opens a journal, or begins one. A torn last line is cut off.
    ///
    /// # Errors
    /// [`JournalError`].
    pub(super) async fn open(path: PathBuf, fence: Fence) -> Result<(Self, Past), JournalError> {
        let patience = Instant::now() + PATIENCE;
        let (file, past, last_id) = loop {
            let at = path.clone();
            let open = move || open(&at);
            match task::blocking("opening a batch's journal", DISK_DEADLINE, open).await? {
                Err(JournalError::Busy { .. }) if Instant::now() < patience => sleep(AGAIN).await,
                opened => break opened?,
            }
        };
        let journal = Self {
            path,
            file: Arc::new(file),
            fence,
            next_id: Mutex::new(last_id + 1),
        };
        Ok((journal, past))
    }

    /// Appends an event; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`JournalError`]; whether the event is in the file is then not known.
    pub(super) async fn append(&self, event: Event) -> Result<(), JournalError> {
        let mut next_id = self.next_id.lock().await;
        let line = EventLine {
            id: *next_id,
            at: Timestamp::now(),
            event,
        };
        let mut text = serde_json::to_vec(&line).expect("our own plain data serialises");
        text.push(b'\n');
        let (file, path) = (self.file.clone(), self.path.clone());
        let write = move || append_line(&file, &text, true).map_err(io_error("write", &path));
        self.fence
            .write("writing a batch's journal", DISK_DEADLINE, write)
            .await?;
        *next_id += 1;
        Ok(())
    }
}

/// The events from an offset on, a bounded number of them, and the offset after the last one.
/// Blocking.
pub(super) fn read(path: &Path, from: u64) -> Result<(Vec<EventLine>, u64), JournalError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    file.seek(SeekFrom::Start(from))
        .map_err(io_error("read", path))?;
    let mut lines = Vec::new();
    let end = each_line(file, |line| {
        lines.extend(line);
        lines.len() < AT_ONCE
    });
    Ok((lines, from + end.map_err(io_error("read", path))?))
}

/// What a journal tells; `None` if there is none. Blocking.
pub(super) fn look(path: &Path) -> Result<Option<Past>, JournalError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mut past = Past::default();
    each_line(file, |line| {
        line.into_iter().for_each(|line| past.take_in(line.event));
        true
    })
    .map_err(io_error("read", path))?;
    Ok(Some(past))
}

fn open(path: &Path) -> Result<(File, Past, u64), JournalError> {
    if let Some(folder) = path.parent() {
        make_private_dir(folder)
            .map_err(|error| io_error("make the folder of", path)(io::Error::other(error)))?;
    }
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("open", path))?;
    if file.try_lock().is_err() {
        return Err(JournalError::Busy {
            path: path.to_owned(),
        });
    }
    let (mut past, mut last_id) = (Past::default(), 0);
    let end = each_line(&file, |line| {
        if let Some(line) = line {
            last_id = line.id;
            past.take_in(line.event);
        }
        true
    })
    .map_err(io_error("read", path))?;
    file.set_len(end).map_err(io_error("mend", path))?;
    Ok((file, past, last_id))
}

/// Calls `visit` with each whole line (`None`: it cannot be read) until it answers false; answers
/// the offset after the last one.
fn each_line(file: impl Read, mut visit: impl FnMut(Option<EventLine>) -> bool) -> io::Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut offset, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Ok(offset);
        }
        offset += read as u64;
        if !visit(serde_json::from_slice(&line).ok()) {
            return Ok(offset);
        }
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label::outcome::tests::labelled;

    fn done(image: &str) -> Event {
        Event::Labelled(Box::new(Done {
            digest: Some("d1".into()),
            result: labelled(image),
            progress: Progress::default(),
        }))
    }

    /// A batch that was cancelled and goes on at once finds its own last call there.
    #[tokio::test]
    async fn who_holds_a_journal_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.jsonl");
        let open = || Journal::open(path.clone(), Fence::open());
        let (held, _) = open().await.unwrap();
        let mut second = std::pin::pin!(open());
        let early = tokio::time::timeout(AGAIN * 4, &mut second).await;
        assert!(early.is_err(), "it is held");
        drop(held);
        let (_held, _) = second.await.unwrap();
        let refused = open().await;
        assert!(matches!(refused, Err(JournalError::Busy { .. })));
    }

    #[tokio::test]
    async fn what_was_written_is_known_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batches/b.jsonl");
        let (journal, past) = Journal::open(path.clone(), Fence::open()).await.unwrap();
        assert_eq!(past, Past::default());
        journal.append(done("a.png")).await.unwrap();
        let sent = Event::Sent {
            image: "b.png".into(),
            digest: "d2".into(),
        };
        journal.append(sent).await.unwrap();
        drop(journal);
        let mut raw = OpenOptions::new().append(true).open(&path).unwrap();
        io::Write::write_all(&mut raw, b"{\"id\":3,\"event\":\"image.la").unwrap();

        let (journal, past) = Journal::open(path.clone(), Fence::open()).await.unwrap();
        let sent = Known::Sent {
            digest: "d2".into(),
        };
        assert_eq!(past.images["b.png"], sent);
        let Known::Done { digest, entry } = &past.images["a.png"] else {
            panic!("{past:?}");
        };
        assert_eq!((digest.as_deref(), entry), (Some("d1"), &labelled("a.png")));
        assert_eq!(past.usage.cost_usd, 0.25);
        journal.append(done("b.png")).await.unwrap();
        let (lines, end) = read(&path, 0).unwrap();
        let ids: Vec<u64> = lines.iter().map(|line| line.id).collect();
        assert_eq!(
            (ids, end),
            (vec![1, 2, 3], std::fs::metadata(&path).unwrap().len())
        );
        assert_eq!(look(&path).unwrap().unwrap().images.len(), 2);

        // One that is begun anew knows nothing but what it said.
        let anew = Event::Started {
            batch_id: "b".into(),
            total: 2,
            done: 0,
            anew: true,
        };
        journal.append(anew).await.unwrap();
        journal.append(done("b.png")).await.unwrap();
        let past = look(&path).unwrap().unwrap();
        assert_eq!((past.images.len(), past.usage.cost_usd), (1, 0.25));
        assert_eq!(past.said["a.png"], "A shoe.");
        assert_eq!(look(&folder.path().join("none")).unwrap(), None);
    }
}
