//! `metadata.json` and the preview's place: small files, replaced as a whole.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{WorkspaceError, read_bounded, write_atomic};

/// No file of ours that is read whole is larger.
const LIMIT: u64 = 16 << 20;

/// What is known of a user's workspace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    pub created: Timestamp,
    pub last_accessed: Timestamp,
    /// Without credentials; `None` for the built-in template.
    pub repo_url: Option<String>,
    /// Where the client's work goes in the end; `None`: the repository's default branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_branch: Option<String>,
}

/// Where a thread's preview is, for life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewPlace {
    pub slug: String,
    /// Loopback port of the dev server: another one makes Astro clear its content store.
    pub port: u16,
}

/// Reads a JSON file of ours; `None` if there is none.
///
/// # Errors
/// [`WorkspaceError::Malformed`] if someone else wrote there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, WorkspaceError> {
    let Some(content) = read_bounded(path, LIMIT)? else {
        return Ok(None);
    };
    serde_json::from_slice(&content)
        .map(Some)
        .map_err(|source| WorkspaceError::Malformed {
            path: path.to_owned(),
            source,
        })
}

/// Writes a JSON file as a whole.
///
/// # Errors
/// [`WorkspaceError::Io`].
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), WorkspaceError> {
    let mut text = serde_json::to_vec_pretty(value).expect("our own plain data serialises");
    text.push(b'\n');
    write_atomic(path, &text)
}

impl Metadata {
    /// Reads it; `None` in a workspace that is new.
    ///
    /// # Errors
    /// See [`WorkspaceError`].
    pub fn load(path: &Path) -> Result<Option<Self>, WorkspaceError> {
        read_json(path)
    }

    /// Replaces it.
    ///
    /// # Errors
    /// See [`WorkspaceError`].
    pub fn save(&self, path: &Path) -> Result<(), WorkspaceError> {
        write_json(path, self)
    }
}

impl PreviewPlace {
    /// Reads it; `None` for a thread that is new.
    ///
    /// # Errors
    /// See [`WorkspaceError`].
    pub fn load(path: &Path) -> Result<Option<Self>, WorkspaceError> {
        read_json(path)
    }

    /// Replaces it.
    ///
    /// # Errors
    /// See [`WorkspaceError`].
    pub fn save(&self, path: &Path) -> Result<(), WorkspaceError> {
        write_json(path, self)
    }
}
