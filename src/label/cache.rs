//! Labels that are known already: of the same bytes, asked about in the same words, by the same
//! model, for the same client. On the container's own disk; what is here can be lost.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest, Sha256};

use super::{Label, Question};
use crate::{
    domain::Usage,
    task,
    workspace::{read_bounded, write_atomic},
};

/// A label is a few kilobytes.
const MAX_BYTES: u64 = 256 << 10;
/// Labels in one of the 256 folders; the older half goes when there are more.
const MAX_IN_FOLDER: usize = 400;
const DISK_DEADLINE: Duration = Duration::from_secs(10);

/// A folder of labels. Nothing depends on it: what it cannot do it does not.
#[derive(Debug, Clone)]
pub struct Cache(PathBuf);

impl Cache {
    /// Below this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    fn path(&self, digest: &str, question: &Question, model: &str) -> PathBuf {
        let mut hash = Sha256::new();
        let account = &question.account;
        let owner = format!("{:?}/{:?}", account.client, account.user);
        let prompt = &question.prompt;
        let schema = prompt.schema().unwrap_or_default();
        // Each with its length: no two questions are written alike.
        for part in [
            digest,
            &owner,
            model,
            prompt.system(),
            prompt.text(),
            schema,
        ] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let name = hex::encode(hash.finalize());
        self.0.join(&name[..2]).join(format!("{}.json", &name[2..]))
    }

    /// The label, which costs nothing this time.
    pub(super) async fn get(
        &self,
        digest: &str,
        question: &Question,
        model: &str,
    ) -> Option<Label> {
        let path = self.path(digest, question, model);
        let read = move || read_bounded(&path, MAX_BYTES).ok().flatten();
        let bytes = task::blocking("reading a label", DISK_DEADLINE, read)
            .await
            .ok()??;
        let label: Label = serde_json::from_slice(&bytes).ok()?;
        Some(Label {
            usage: Usage::default(),
            ..label
        })
    }

    /// Keeps a label.
    pub(super) async fn put(&self, digest: &str, question: &Question, model: &str, label: &Label) {
        let path = self.path(digest, question, model);
        let bytes = serde_json::to_vec(label).expect("our own plain data serialises");
        let write = move || {
            if let Some(folder) = path.parent() {
                make_room(folder);
            }
            write_atomic(&path, &bytes)
        };
        let kept = task::blocking("keeping a label", DISK_DEADLINE, write).await;
        if !matches!(kept, Ok(Ok(()))) {
            tracing::debug!(?kept, "a label is not kept for the next time");
        }
    }
}

/// Removes the older half of a folder that is full.
fn make_room(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    if files.len() >= MAX_IN_FOLDER {
        files.sort();
        for (_, file) in &files[..MAX_IN_FOLDER / 2] {
            fs::remove_file(file).ok();
        }
    }
}
