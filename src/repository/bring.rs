//! Files that come into a worktree from outside of it, for a turn to work with: an image that was made.

use std::{fs::File, io::Write as _, path::Path};

use git2::Oid;
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use serde::{Deserialize, Serialize};

use super::{Operation as _, Result, files::Root, site, worktree::Worktree};

/// A file that a turn brings along. What is in it is kept by the repository, so that a turn which waits
/// has it after a restart too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BroughtFile {
    /// Relative to the site's root, with `/`.
    pub path: String,
    /// Id of its blob.
    pub blob: String,
}

impl Worktree {
    /// Keeps a content for [`Worktree::bring`].
    ///
    /// # Errors
    /// [`RepositoryError::Unfit`] for a path that git does not allow.
    pub fn keep_for(&self, path: &str, content: &[u8]) -> Result<BroughtFile> {
        site::check_path(path)?;
        let repo = self.open()?;
        let blob = repo.blob(content).during("store a file")?;
        Ok(BroughtFile {
            path: path.to_owned(),
            blob: blob.to_string(),
        })
    }

    /// Writes files into the worktree, each if there is nothing in its place. No link is followed on
    /// the way there.
    ///
    /// # Errors
    /// If the disk does not take them.
    pub fn bring(&self, files: &[BroughtFile]) -> Result<()> {
        let repo = self.open()?;
        let root = Root::open(self.path()).during("open the worktree")?;
        for file in files {
            site::check_path(&file.path)?;
            let id = Oid::from_str(&file.blob).during("read the id of a file")?;
            let blob = repo.find_blob(id).during("read a file")?;
            put(&root, Path::new(&file.path), blob.content()).during("write a file")?;
        }
        Ok(())
    }
}

fn put(root: &Root, path: &Path, content: &[u8]) -> std::io::Result<()> {
    let (Some(folder), Some(name)) = (root.folder_of(path, true)?, path.file_name()) else {
        return Err(std::io::ErrorKind::NotADirectory.into());
    };
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = match openat(&folder, name, flags, Mode::from_bits_truncate(0o666)) {
        // Of the same turn, before it was cut off.
        Err(Errno::EEXIST) => return Ok(()),
        made => made?,
    };
    root.give_away(&made)?;
    File::from(made).write_all(content)
}
