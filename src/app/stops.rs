//! What a stop did not get done: noted on the workspace while it goes on, told at the next start.
//!
//! ```text
//! .greenroom/stops/{id}.json      made as a stop begins, removed when it is over and nothing was cut
//! ```
//!
//! So a note that is found tells of a stop that was cut short, by its own deadlines or by the platform's
//! SIGKILL. Notes are news, no state: nothing depends on them, and a disk that does not answer costs a
//! stop a second.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    lease::Owner,
    task::{self, Tasks},
    text::{cut, plain},
    workspace::{WorkspaceError, read_bounded, write_atomic},
};

/// For one small file.
const WRITE: Duration = Duration::from_secs(1);
/// For a folder of them, at the start.
const READ: Duration = Duration::from_secs(5);
/// Of one note: lines, and bytes of each.
const MOST_CUTS: usize = 20;
const MOST_BYTES: usize = 200;
/// Notes that are told; more were left by stops that nobody looked at.
const MOST_NOTES: usize = 20;
const NOTE_BYTES: u64 = 64 << 10;

/// Where a stop has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    Turns,
    Children,
    Answers,
    Tasks,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    owner: Owner,
    reason: String,
    began: Timestamp,
    /// By then the platform has killed it, if it was not over.
    killed_by: Timestamp,
    step: Step,
    is_over: bool,
    cut: Vec<String>,
}

impl Record {
    /// Blocking.
    fn write(&self, file: &Path) -> Result<(), WorkspaceError> {
        if self.is_over && self.cut.is_empty() {
            fs::remove_file(file).ok();
            return Ok(());
        }
        let text = serde_json::to_vec(self).expect("our own plain data serialises");
        write_atomic(file, &text)
    }

    /// Can nothing more become of it?
    fn is_settled(&self, now: Timestamp) -> bool {
        self.is_over || now >= self.killed_by || self.owner.is_gone()
    }

    /// One line for people.
    fn told(&self) -> String {
        let mut cuts: Vec<_> = self
            .cut
            .iter()
            .take(MOST_CUTS)
            .map(|text| cut(&plain(text), MOST_BYTES).to_owned())
            .collect();
        if !self.is_over {
            let step = match self.step {
                Step::Turns => "turns were running or being saved",
                Step::Children => "children were being ended",
                Step::Answers => "answers were on their way",
                Step::Tasks => "tasks were being ended",
            };
            cuts.push(format!("it was killed while {step}"));
        }
        let (began, reason) = (self.began, plain(&self.reason));
        format!("the stop of {began} ({reason}): {}", cuts.join("; "))
    }
}

/// The note of the stop that goes on. Writing never holds it up.
#[derive(Debug)]
pub(super) struct StopNote {
    record: watch::Sender<Record>,
    /// Of its own: it outlives all others.
    tasks: Tasks,
}

impl StopNote {
    /// Begins one in this folder, if there is one to write to. The platform kills after `patience`.
    pub(super) fn begin(folder: Option<PathBuf>, reason: &str, patience: Duration) -> Self {
        let began = Timestamp::now();
        let patience = SignedDuration::try_from(patience).unwrap_or(SignedDuration::from_hours(1));
        let (record, changes) = watch::channel(Record {
            owner: Owner::this().clone(),
            reason: reason.to_owned(),
            began,
            killed_by: began.checked_add(patience).unwrap_or(began),
            step: Step::Turns,
            is_over: false,
            cut: Vec::new(),
        });
        let tasks = Tasks::new();
        if let Some(folder) = folder {
            let file = folder.join(format!("{}.json", uuid::Uuid::now_v7()));
            tasks.spawn("stop note", write_down(file, changes));
        }
        Self { record, tasks }
    }

    /// The stop goes on with this step.
    pub(super) fn reached(&self, step: Step) {
        self.record.send_modify(|record| record.step = step);
    }

    /// Something was not done. A sentence without a full stop.
    pub(super) fn cut(&self, what: impl Into<String>) {
        self.record.send_modify(|record| {
            if record.cut.len() < MOST_CUTS {
                record.cut.push(what.into());
            }
        });
    }

    /// The stop is over.
    pub(super) async fn end(self) {
        self.record.send_modify(|record| record.is_over = true);
        drop(self.record);
        if !self.tasks.stop(WRITE * 2).await {
            tracing::warn!("the stop could not be noted: the workspace's disk does not answer");
        }
    }
}

/// Keeps the file as the record is, to its end.
async fn write_down(file: PathBuf, mut record: watch::Receiver<Record>) {
    loop {
        let (now, to) = (record.borrow_and_update().clone(), file.clone());
        let is_over = now.is_over;
        let write = task::blocking_apart("noting the stop", WRITE, move || now.write(&to));
        match write.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the stop could not be noted"),
            Err(error) => tracing::debug!(%error, "the stop could not be noted"),
        }
        if is_over || record.changed().await.is_err() {
            return;
        }
    }
}

/// What stops before this start left undone, one sentence each, the oldest first. Says so in the log,
/// and forgets it.
pub(super) async fn report(folder: Option<PathBuf>) -> Vec<String> {
    let Some(folder) = folder else {
        return Vec::new();
    };
    let read = move || take(&folder, Timestamp::now());
    let told = task::blocking("looking for what stops left undone", READ, read).await;
    let told = told.unwrap_or_default();
    for sentence in &told {
        tracing::warn!("{sentence}");
    }
    told
}

/// Reads the notes of stops that are over and removes them.
fn take(folder: &Path, now: Timestamp) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let files = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<_> = files
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "json")
        })
        .collect();
    // Their names begin with the time.
    files.sort();
    let mut told = Vec::new();
    for file in files {
        let read = read_bounded(&file, NOTE_BYTES).ok().flatten();
        let record = read.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
        match record {
            // Of another container, whose stop goes on.
            Some(record) if !record.is_settled(now) => continue,
            Some(record) if told.len() < MOST_NOTES => told.push(record.told()),
            Some(_) | None => {}
        }
        fs::remove_file(&file).ok();
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn later() -> Timestamp {
        Timestamp::now() + SignedDuration::from_mins(10)
    }

    #[tokio::test]
    async fn a_stop_that_did_all_leaves_nothing_and_one_that_did_not_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let stops = || Some(folder.path().join("stops"));
        let note = StopNote::begin(stops(), "signal", PATIENCE);
        note.reached(Step::Children);
        note.end().await;
        assert_eq!(report(stops()).await, [""; 0]);
        let left = fs::read_dir(stops().unwrap()).map_or(0, Iterator::count);
        assert_eq!(left, 0);

        let note = StopNote::begin(stops(), "signal", PATIENCE);
        note.cut("2 running turns were interrupted");
        note.cut("children were left that did not end");
        note.end().await;
        let told = report(stops()).await;
        assert_eq!(told.len(), 1);
        assert!(
            told[0].ends_with(
                "(signal): 2 running turns were interrupted; children were left that did not end"
            ),
            "{told:?}"
        );
        assert_eq!(report(stops()).await, [""; 0]);
    }

    #[tokio::test]
    async fn one_that_was_killed_is_told_by_its_step_once_that_is_certain() {
        let folder = tempfile::tempdir().unwrap();
        let note = StopNote::begin(Some(folder.path().to_owned()), "idle-timeout", PATIENCE);
        note.reached(Step::Tasks);
        let written = || {
            let files = fs::read_dir(folder.path()).unwrap().flatten();
            files
                .map(|file| file.path())
                // The others are on their way to that name.
                .filter(|file| file.extension().is_some_and(|end| end == "json"))
                .filter_map(|file| fs::read_to_string(file).ok())
                .any(|text| text.contains("tasks"))
        };
        while !written() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Its owner lives, and has time.
        assert_eq!(take(folder.path(), Timestamp::now()), [""; 0]);
        let told = take(folder.path(), later());
        assert_eq!(told.len(), 1);
        assert!(
            told[0].ends_with("(idle-timeout): it was killed while tasks were being ended"),
            "{told:?}"
        );
    }

    #[test]
    fn what_is_no_note_of_ours_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("x.json"), "{").unwrap();
        fs::write(folder.path().join("other"), "stays").unwrap();
        assert_eq!(take(folder.path(), later()), [""; 0]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(take(&folder.path().join("none"), later()), [""; 0]);
    }
}
