//! A branch's next commit: the branch, our own note of where it is, and git's record of both, written
//! as git writes them, in as few waits for the disk as there can be.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use git2::Oid;
use nix::fcntl::OFlag;

use super::files;
use crate::task;

/// A branch of one worktree, whose references are files of their own with nothing odd on the way there
/// (the guard has seen that).
pub(super) struct Branch<'a> {
    /// The git directory.
    pub(super) git: &'a Path,
    /// The worktree's entry in it.
    pub(super) admin: &'a Path,
    /// Full names: the branch, and the reference that notes where we left it.
    pub(super) name: &'a str,
    pub(super) note: &'a str,
}

/// A lock file; removed unless it became its reference.
struct Lock {
    path: PathBuf,
    is_there: bool,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.is_there {
            fs::remove_file(&self.path).ok();
        }
    }
}

impl<'a> Branch<'a> {
    /// Locks the branch and its note for a move from one commit to the next. `None` where somebody else
    /// holds a lock, or either is at another commit.
    pub(super) fn begin(&self, from: Oid, to: Oid) -> io::Result<Option<Move>> {
        let references = [self.note, self.name].map(|name| self.git.join(name));
        let locks = task::side_by_side(&references, |reference| lock(reference, to));
        let locks: Vec<_> = locks.into_iter().collect::<io::Result<_>>()?;
        if locks.iter().any(|lock| !lock.is_there) {
            return Ok(None);
        }
        // Under the locks.
        let at = task::side_by_side(&references, |reference| read(reference));
        if at.iter().any(|at| *at != Some(from)) {
            return Ok(None);
        }
        let logs = [
            self.git.join("logs").join(self.name),
            self.admin.join("logs/HEAD"),
        ];
        Ok(Some(Move {
            from,
            to,
            references,
            locks,
            logs,
        }))
    }
}

/// A move that was begun. Dropped, nothing has changed.
pub(super) struct Move {
    from: Oid,
    to: Oid,
    references: [PathBuf; 2],
    locks: Vec<Lock>,
    logs: [PathBuf; 2],
}

impl Move {
    /// Moves the note and then the branch. (A crash between the two is put right by moving the branch;
    /// the other way round the guard would take our commit for somebody else's.)
    pub(super) fn finish(&mut self) -> io::Result<()> {
        for (lock, reference) in self.locks.iter_mut().zip(&self.references) {
            fs::rename(&lock.path, reference)?;
            lock.is_there = false;
        }
        Ok(())
    }

    /// Tells git's record of it. `who` as in a commit.
    pub(super) fn tell(&self, who: &[u8]) {
        let (from, to) = (self.from, self.to);
        let line = [format!("{from} {to} ").as_bytes(), who, b"\tcommit\n"].concat();
        let told = task::side_by_side(&self.logs, |log| append(log, &line));
        for (told, log) in told.into_iter().zip(&self.logs) {
            // It is for people who look.
            if let Err(error) = told {
                tracing::debug!(%error, log = %log.display(), "git's record was not written");
            }
        }
    }
}

fn lock(reference: &Path, to: Oid) -> io::Result<Lock> {
    let mut path = reference.as_os_str().to_owned();
    path.push(".lock");
    let mut lock = Lock {
        path: path.into(),
        is_there: false,
    };
    let mut file = match File::options()
        .write(true)
        .create_new(true)
        .open(&lock.path)
    {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(lock),
        file => file?,
    };
    lock.is_there = true;
    file.write_all(format!("{to}\n").as_bytes())?;
    Ok(lock)
}

/// The commit in a reference's own file; `None` for all else.
pub(super) fn read(reference: &Path) -> Option<Oid> {
    parse(&files::read_small(reference)?)
}

/// The commit that such a file's content names.
pub(super) fn parse(content: &[u8]) -> Option<Oid> {
    let text = str::from_utf8(content).ok()?.strip_suffix('\n')?;
    Oid::from_str(text).ok().filter(|_| text.len() == 40)
}

fn append(log: &Path, line: &[u8]) -> io::Result<()> {
    let mut file = File::options()
        .append(true)
        .create(true)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(log)?;
    file.write_all(line)
}
