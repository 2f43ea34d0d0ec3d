//! The workspace on disk: where everything of a user lies, what is remembered there, and the
//! files that a new site begins with. Called by the supervisor and by turns, always on blocking
//! threads.
//!
//! **Invariant:** greenroom's own names at a workspace's root begin with a dot, and every path is
//! made of validated ids.

mod dependencies;
mod files;
mod layout;
mod metadata;
mod owners;
mod template;

pub use dependencies::{
    Attached, AttachedKind, Dependencies, DependencyRequest, InstallError, NodeTools, Unkept,
    linked_folder,
};
pub(crate) use files::create_in;
pub use files::{append_line, make_private_dir, read_bounded, write_atomic};
pub use layout::{Cache, ThreadPaths, UserPaths};
pub use metadata::{Metadata, PreviewPlace};
pub(crate) use metadata::{read_json, write_json};
pub use owners::settle_owners;
pub use template::template_files;

use std::path::PathBuf;

/// A disk operation of the workspace that failed.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    #[error("failed to {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not what greenroom wrote there", path.display())]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error(transparent)]
    Blocking(#[from] crate::task::BlockingError),
}

impl WorkspaceError {
    pub(crate) fn io(
        operation: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// Is the disk full?
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull
            || source.kind() == std::io::ErrorKind::QuotaExceeded)
    }
}
