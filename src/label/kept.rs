//! A batch on the disk. All of it blocks.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    Code, Image, Job, Outcome,
    journal::{self, Known},
};
use crate::{
    domain::Account,
    workspace::{WorkspaceError, make_private_dir, read_bounded, write_atomic},
};

pub(super) const JOURNAL: &str = "journal.jsonl";
pub(super) const CANCELLED: &str = "cancelled";
const JOB: &str = "job.json";
const MAX_JOB: u64 = 8 << 20;
/// What is older is removed at the next start.
const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A job as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Kept {
    pub(super) batch_id: String,
    pub(super) created_at: Timestamp,
    /// In the order of their files.
    pub(super) names: Vec<String>,
    #[serde(flatten)]
    pub(super) job: Job,
    /// Also about what failed and was paid.
    #[serde(default)]
    pub(super) asks_again: bool,
}

/// A batch's images, as they are kept.
pub(super) fn images(folder: &Path, names: &[String]) -> Vec<Image> {
    let images = names.iter().enumerate().map(|(at, name)| Image {
        name: name.clone(),
        path: file(folder, at),
        caption: None,
        prompt: None,
    });
    images.collect()
}

/// Names of files are ours: those of images are whatever somebody wrote.
fn file(folder: &Path, at: usize) -> PathBuf {
    folder.join("images").join(format!("{at:06}"))
}

/// Puts a batch on the disk. Blocking.
pub(super) fn keep(folder: &Path, kept: &Kept, files: &[Bytes]) -> Result<(), WorkspaceError> {
    make_private_dir(&folder.join("images"))?;
    for (at, bytes) in files.iter().enumerate() {
        write_atomic(&file(folder, at), bytes)?;
    }
    write_job(folder, kept)
}

pub(super) fn write_job(folder: &Path, kept: &Kept) -> Result<(), WorkspaceError> {
    let job = serde_json::to_vec(kept).expect("our own plain data serialises");
    write_atomic(&folder.join(JOB), &job)
}

pub(super) fn read_job(folder: &Path) -> Result<Option<Kept>, WorkspaceError> {
    let path = folder.join(JOB);
    let Some(bytes) = read_bounded(&path, MAX_JOB)? else {
        return Ok(None);
    };
    let kept = serde_json::from_slice(&bytes);
    kept.map(Some)
        .map_err(|source| WorkspaceError::Malformed { path, source })
}

/// The batches that have not ended. What is old, or was never wholly taken, is removed.
pub(super) fn find_open(
    folder: &Path,
    is_ours: impl Fn(&Account) -> bool,
) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let entry = entry?;
        let folder = entry.path();
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        let Ok(Some(kept)) = read_job(&folder) else {
            if age > KEPT {
                fs::remove_dir_all(&folder).ok();
            }
            continue;
        };
        if !is_ours(&kept.job.account) {
            continue;
        }
        let past = journal::look(&folder.join(JOURNAL)).ok().flatten();
        let is_over = past
            .and_then(|past| past.summary)
            .is_some_and(|summary| summary.is_complete());
        if is_over || folder.join(CANCELLED).exists() {
            if age > KEPT {
                fs::remove_dir_all(&folder).ok();
            }
            continue;
        }
        ids.push(kept.batch_id);
    }
    // They carry the time of their making.
    ids.sort();
    Ok(ids)
}

/// Removes the files that nobody will be asked about again.
pub(super) fn remove_needless(folder: &Path, images: &[Image]) {
    let past = journal::look(&folder.join(JOURNAL)).ok().flatten();
    let known = past.unwrap_or_default().images;
    for image in images {
        let is_needless = match known.get(&image.name) {
            Some(Known::Done { entry, .. }) => match &entry.outcome {
                Outcome::Labelled { .. } => true,
                Outcome::Failed(failed) => failed.code == Code::InvalidImage,
            },
            _ => false,
        };
        if is_needless {
            fs::remove_file(&image.path).ok();
        }
    }
}
