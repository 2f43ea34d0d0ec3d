//! What was paid for a call that has an idempotency key, so that the same call goes on with it after a
//! crash and pays for nothing twice.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{identity::ThreadKey, task};

/// How long notes are kept; Replicate keeps what a prediction made for an hour.
const KEPT: Duration = Duration::from_secs(24 * 3600);
const DEADLINE: Duration = Duration::from_secs(30);
/// Largest note.
const MAX_NOTE: u64 = 64 << 10;

/// The note of one call. Without a key nothing is written.
#[derive(Debug)]
pub(super) struct Note {
    path: Option<PathBuf>,
    pub(super) known: Known,
}

/// What is known of it.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Known {
    /// Predictions that were started, in order.
    #[serde(default)]
    pub(super) predictions: Vec<String>,
    /// The turn that came of it.
    #[serde(default)]
    pub(super) turn: Option<String>,
}

impl Note {
    /// The note of a call, as far as there is one. Others that are old go.
    pub(super) async fn open(
        folder: &Path,
        key: &ThreadKey,
        call: Option<&str>,
    ) -> io::Result<Self> {
        let Some(call) = call else {
            return Ok(Self {
                path: None,
                known: Known::default(),
            });
        };
        let mut hash = Sha256::new();
        hash.update(format!("{key}\n{call}"));
        let name = format!("{}.json", hex::encode(hash.finalize()));
        let (folder, path) = (folder.to_owned(), folder.join(name));
        let at = path.clone();
        let read = move || {
            fs::create_dir_all(&folder)?;
            sweep(&folder)?;
            match fs::metadata(&at) {
                Ok(about) if about.is_file() && about.len() <= MAX_NOTE => {
                    let text = fs::read(&at)?;
                    Ok(serde_json::from_slice(&text).unwrap_or_default())
                }
                Ok(_) => Ok(Known::default()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Known::default()),
                Err(error) => Err(error),
            }
        };
        let known = blocking("reading what was paid", read).await?;
        Ok(Self {
            path: Some(path),
            known,
        })
    }

    /// Whether it is written down.
    pub(super) fn is_kept(&self) -> bool {
        self.path.is_some()
    }

    /// Writes down what is known, durably.
    pub(super) async fn write(&self) -> io::Result<()> {
        let Some(path) = self.path.clone() else {
            return Ok(());
        };
        let text = serde_json::to_vec(&self.known).expect("plain data serialises");
        blocking("writing down what was paid", move || {
            let new = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
            let mut file = fs::File::create_new(&new)?;
            io::Write::write_all(&mut file, &text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match task::blocking(what, DEADLINE, work).await {
        Ok(done) => done,
        Err(error) => Err(io::Error::other(error)),
    }
}

fn sweep(folder: &Path) -> io::Result<()> {
    let now = SystemTime::now();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let age = entry.metadata().and_then(|about| about.modified());
        let age = age.ok().and_then(|at| now.duration_since(at).ok());
        if age.is_some_and(|age| age > KEPT) {
            fs::remove_file(entry.path()).ok();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_finds_what_it_paid_for_and_no_other_does() {
        let folder = tempfile::tempdir().unwrap();
        let thread = |name: &str| ThreadKey {
            client: "acme".parse().unwrap(),
            user: "alice".parse().unwrap(),
            thread: name.parse().unwrap(),
        };
        let open = async |name: &str, call| {
            Note::open(folder.path(), &thread(name), call)
                .await
                .unwrap()
        };
        let mut note = open("main", Some("k")).await;
        note.known.predictions.push("p1".to_owned());
        note.write().await.unwrap();
        assert_eq!(open("main", Some("k")).await.known.predictions, ["p1"]);
        assert!(
            open("main", Some("other"))
                .await
                .known
                .predictions
                .is_empty()
        );
        assert!(open("other", Some("k")).await.known.predictions.is_empty());
        let mut none = open("main", None).await;
        none.known.predictions.push("p2".to_owned());
        none.write().await.unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
