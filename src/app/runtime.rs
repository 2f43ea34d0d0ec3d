//! The folder of this process alone: sockets, agents' temporary files, one-shot runs. It goes with its
//! process; what a killed one left behind goes at the next start.
//!
//! ```text
//! greenroom-1000/          config::runtime_folder, shared by this user's supervisors on this machine
//!   3f2a9c1b.lock          held for as long as its process lives
//!   3f2a9c1b/              made after, and removed before its lock
//! ```
//!
//! A lock, not a process id: as PID 1 each container has the same one, and ids come again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    owner,
    task::{self, Tasks},
    workspace::make_private_dir,
};

/// For what a run that filled the disk left behind.
const SWEEP_DEADLINE: Duration = Duration::from_secs(600);
/// Names are random; somebody may sweep between the making of a lock and its taking.
const TRIES: usize = 16;

/// Removed with its value.
#[derive(Debug)]
pub(super) struct RuntimeFolder {
    path: PathBuf,
    lock: PathBuf,
    _held: File,
}

impl RuntimeFolder {
    /// A new folder below the shared one.
    pub(super) fn claim(shared: &Path) -> io::Result<Self> {
        for _ in 0..TRIES {
            let id = uuid::Uuid::new_v4().simple().to_string();
            // A socket's path has 108 bytes.
            let path = shared.join(&id[..8]);
            let lock = path.with_extension("lock");
            let held = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&lock)?;
            if held.try_lock().is_err() || !is_at(&held, &lock) {
                continue;
            }
            make_private_dir(&path).map_err(io::Error::other)?;
            return Ok(Self {
                path,
                lock,
                _held: held,
            });
        }
        Err(io::Error::other("others sweep it without end"))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets programs that are users of their own through to their folders in it.
    pub(super) fn let_pass(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), owner::let_pass)?;
        owner::let_pass(&self.path)
    }

    /// Removes what dead processes left beside it, off the async workers.
    pub(super) fn sweep_others(&self, tasks: &Tasks) {
        let shared = self.path.parent().map(Path::to_owned).unwrap_or_default();
        let stop = tasks.token().clone();
        tasks.spawn("sweeping", async move {
            let sweep = move || sweep(&shared);
            let sweep = task::blocking_apart("removing what is left", SWEEP_DEADLINE, sweep);
            let Some(swept) = stop.run_until_cancelled(sweep).await else {
                return;
            };
            match swept {
                Ok(Ok(0)) => {}
                Ok(Ok(swept)) => tracing::info!(
                    folders = swept,
                    "removed what supervisors left that were killed"
                ),
                Ok(Err(error)) => tracing::warn!(%error, "could not look for what is left"),
                Err(error) => tracing::warn!(%error, "could not remove what is left"),
            }
        });
    }
}

impl Drop for RuntimeFolder {
    fn drop(&mut self) {
        if remove(&self.path) {
            fs::remove_file(&self.lock).ok();
        }
    }
}

/// Removes the folders whose process is dead; how many. What cannot be removed (a child that is
/// just ending writes into it) is left to the next start.
fn sweep(shared: &Path) -> io::Result<usize> {
    let mut swept = 0;
    for entry in fs::read_dir(shared)? {
        let lock = entry?.path();
        if lock.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        // No link is followed: the folder is ours alone, as `config` saw to.
        let Ok(held) = OpenOptions::new().write(true).open(&lock) else {
            continue;
        };
        if held.try_lock().is_err() || !is_at(&held, &lock) {
            continue;
        }
        if remove(&lock.with_extension("")) {
            fs::remove_file(&lock).ok();
            swept += 1;
        }
    }
    Ok(swept)
}

fn remove(folder: &Path) -> bool {
    match fs::remove_dir_all(folder) {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// Is it still the file of that name? Else somebody removed it before it was locked.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(named)) = (file.metadata(), fs::symlink_metadata(path)) else {
        return false;
    };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_keep_theirs_and_the_dead_do_not() {
        let shared = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(shared.path()).unwrap().count();
        let living = RuntimeFolder::claim(shared.path()).unwrap();
        fs::write(living.path().join("mine"), "").unwrap();
        // Of one that was killed: its lock fell with it.
        let run = shared.path().join("0badcafe/runs/1");
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join("big"), "x").unwrap();
        fs::write(shared.path().join("0badcafe.lock"), "").unwrap();
        // Somebody else's, without a lock.
        fs::create_dir(shared.path().join("other")).unwrap();
        assert_eq!(names(), 5);
        assert_eq!(sweep(shared.path()).unwrap(), 1);
        assert!(!run.exists() && living.path().join("mine").exists());
        assert!(shared.path().join("other").exists());
        assert_eq!(names(), 3);
        drop(living);
        assert_eq!(names(), 1);
    }

    #[test]
    fn whoever_claims_while_others_sweep_has_a_folder() {
        let shared = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                for _ in 0..300 {
                    sweep(shared.path()).unwrap();
                }
            });
            let claims = scope.spawn(|| {
                for _ in 0..100 {
                    let claimed = RuntimeFolder::claim(shared.path()).unwrap();
                    assert!(claimed.path().is_dir());
                    assert!(fs::write(claimed.path().join("a"), "").is_ok());
                }
            });
            sweeper.join().unwrap();
            claims.join().unwrap();
        });
    }
}
