//! What was paid for one call, so that somebody who comes after a crash goes on with it, or ends it,
//! and nobody pays twice.
//!
//! ```text
//! .greenroom/images/{call}/note.json   what was begun
//!                          lease/      who works on it
//! ```
//!
//! A call with an idempotency key has a name of its own, and its note is kept for a day. Any other
//! one's goes as soon as all that it began is settled; what is left then is of a call that was killed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    domain::Account,
    identity::ThreadKey,
    lease::{Lease, LeaseError, Patience},
    replicate::{Price, Sent},
    task::{self, Tasks},
    usage::Noted,
};

/// How long notes are kept; Replicate keeps what a prediction made for an hour.
const KEPT: Duration = Duration::from_secs(24 * 3600);
const DEADLINE: Duration = Duration::from_secs(30);
/// Largest note.
const MAX_NOTE: u64 = 256 << 10;
const NOTE: &str = "note.json";

/// Where notes are, and how somebody is told to be alive.
#[derive(Debug, Clone)]
pub(super) struct Notes {
    pub(super) store: PathBuf,
    /// Of a note's lease.
    pub(super) lease: Duration,
    pub(super) tasks: Tasks,
}

/// The note of one call, which nobody else has as long as this lives.
#[derive(Debug)]
pub(super) struct Note {
    folder: PathBuf,
    lease: Lease,
    pub(super) known: Known,
}

/// What is known of it.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Known {
    /// Who pays.
    pub(super) account: Option<Account>,
    /// Somebody may come back for it.
    pub(super) is_kept: bool,
    /// Predictions, in order.
    pub(super) runs: Vec<Begun>,
    /// The turn that came of it.
    pub(super) turn: Option<String>,
}

/// A prediction that was, or was about to be, begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Begun {
    /// In the ledger.
    pub(super) reserved: Noted,
    pub(super) sent: Sent,
    pub(super) price: Option<Price>,
    /// Replicate ends it by then.
    pub(super) until: Timestamp,
    /// Its id, once that was told.
    pub(super) prediction: Option<String>,
    /// The ledger has what it cost.
    pub(super) is_settled: bool,
}

/// Names a call. Two with the same key in the same thread are the same.
pub(super) fn name(key: &ThreadKey, call: Option<&str>) -> String {
    let Some(call) = call else {
        return uuid::Uuid::now_v7().simple().to_string();
    };
    hex::encode(Sha256::digest(format!("{key}\n{call}")))
}

impl Notes {
    /// The note of a call, as far as there is one. Others that are old go.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if another process is at work on it.
    pub(super) async fn open(&self, name: &str) -> Result<Note, LeaseError> {
        let folder = self.store.join(name);
        let (store, at) = (self.store.clone(), folder.clone());
        let prepare = move || {
            fs::create_dir_all(&at)?;
            // What cannot be removed now is for the next time.
            sweep(&store).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })
        };
        let failed = |source| LeaseError::Io {
            operation: "open",
            path: folder.clone(),
            source,
        };
        task::blocking("looking for what was paid", DEADLINE, prepare)
            .await?
            .map_err(failed)?;
        let place = folder.join("lease");
        let lease = Lease::acquire(&place, self.lease, Patience::None, &self.tasks).await?;
        let at = folder.join(NOTE);
        let known = task::blocking("reading what was paid", DEADLINE, move || read(&at))
            .await?
            .map_err(failed)?;
        Ok(Note {
            folder,
            lease,
            known,
        })
    }

    /// Calls that have begun something that is not settled, whoever works on them. Blocking.
    pub(super) fn open_ones(&self, is_ours: impl Fn(&Account) -> bool) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.store) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(known) = read(&entry.path().join(NOTE)) else {
                continue;
            };
            let is_open = known.runs.iter().any(|run| !run.is_settled);
            if is_open && known.account.as_ref().is_some_and(&is_ours) {
                names.extend(entry.file_name().into_string());
            }
        }
        Ok(names)
    }
}

impl Note {
    /// Writes down what is known, durably.
    pub(super) async fn write(&self) -> io::Result<()> {
        let path = self.folder.join(NOTE);
        let text = serde_json::to_vec(&self.known).expect("plain data serialises");
        let fence = self.lease.fence().clone();
        let write = move || {
            fence.check().map_err(io::Error::other)?;
            let new = path.with_extension("new");
            let mut file = fs::File::create(&new)?;
            io::Write::write_all(&mut file, &text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        let written = task::blocking("writing down what was paid", DEADLINE, write).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Gives it back. What nobody needs any more goes.
    pub(super) async fn close(self) {
        let is_settled = self.known.runs.iter().all(|run| run.is_settled);
        let is_needless = is_settled && !self.known.is_kept;
        self.lease.release().await;
        if is_needless {
            let folder = self.folder;
            let remove = move || fs::remove_dir_all(&folder).ok();
            task::blocking("removing a note", DEADLINE, remove)
                .await
                .ok();
        }
    }
}

/// Blocking. What cannot be understood is as good as nothing.
fn read(path: &Path) -> io::Result<Known> {
    match fs::metadata(path) {
        Ok(about) if about.is_file() && about.len() <= MAX_NOTE => {
            Ok(serde_json::from_slice(&fs::read(path)?).unwrap_or_default())
        }
        Ok(_) => Ok(Known::default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Known::default()),
        Err(error) => Err(error),
    }
}

/// Removes what is old. Blocking.
fn sweep(store: &Path) -> io::Result<()> {
    let now = SystemTime::now();
    for entry in fs::read_dir(store)? {
        let path = entry?.path();
        // The folder's own time is that of its files' coming and going.
        let about = fs::metadata(path.join(NOTE)).or_else(|_| fs::metadata(&path));
        let age = about.and_then(|about| about.modified());
        let age = age.ok().and_then(|at| now.duration_since(at).ok());
        if age.is_some_and(|age| age > KEPT) {
            fs::remove_dir_all(&path)
                .or_else(|_| fs::remove_file(&path))
                .ok();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(name: &str) -> ThreadKey {
        ThreadKey::parse("acme", "alice", name).unwrap()
    }

    #[tokio::test]
    async fn a_call_finds_what_it_paid_for_and_no_other_does() {
        let folder = tempfile::tempdir().unwrap();
        let notes = Notes {
            store: folder.path().join("images"),
            lease: Duration::from_secs(30),
            tasks: Tasks::new(),
        };
        let mine = name(&thread("main"), Some("k"));
        assert_eq!(mine, name(&thread("main"), Some("k")));
        assert_ne!(mine, name(&thread("main"), Some("other")));
        assert_ne!(mine, name(&thread("other"), Some("k")));
        assert_ne!(name(&thread("main"), None), name(&thread("main"), None));

        let mut note = notes.open(&mine).await.unwrap();
        note.known.is_kept = true;
        note.known.turn = Some("t".to_owned());
        note.write().await.unwrap();
        note.close().await;
        let again = notes.open(&mine).await.unwrap();
        assert_eq!(again.known.turn.as_deref(), Some("t"));
        again.close().await;
        // One without a key leaves nothing behind.
        let other = notes.open(&name(&thread("main"), None)).await.unwrap();
        other.write().await.unwrap();
        other.close().await;
        assert_eq!(fs::read_dir(&notes.store).unwrap().count(), 1);
        assert!(notes.open_ones(|_| true).unwrap().is_empty());
    }
}
