//! Gives each user and each thread their numbers, and their folders to them: the layout of
//! [`crate::owner`]. Done at each init; where all is as it should be it costs a dozen looks.

use std::{
    collections::HashSet,
    fs::{self, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown},
    path::Path,
};

use super::{ThreadPaths, WorkspaceError};
use crate::{
    identity::ThreadKey,
    owner::{self, Owner},
};

/// Who may enter a user's own folder, beside root: whoever has its group. And what lies in it on the
/// way to threads and sessions, which nobody may list.
const USERS: u32 = 0o750;
const ON_THE_WAY: u32 = 0o710;

/// Makes a thread's folders passable for its programs and closed to all others, and takes over what
/// was there before anybody had a number. `cache` is the user's on the container's own disk.
///
/// To be called under the lease on the user's repository, while nothing of the thread runs. The
/// worktree may still be missing: it is to be made for the owner that this answers.
///
/// # Errors
/// The disk's. Some of it is done then; another call does the rest.
pub fn settle_owners(
    workspace: &Path,
    cache: &Path,
    paths: &ThreadPaths,
    key: &ThreadKey,
) -> Result<Owner, WorkspaceError> {
    let root = paths.user.root();
    let settle = || -> io::Result<Owner> {
        owner::let_pass(workspace)?;
        owner::let_pass(root.parent().unwrap_or(workspace))?;
        let user = settle_user(workspace, root, key)?;
        for folder in [paths.user.project(), paths.user.state()] {
            give_back(&folder)?;
        }
        let threads = root.join("threads");
        let claude = paths.user.claude();
        give_back(&claude.join("threads"))?;
        let sessions = claude.join("sessions");
        for folder in [&threads, &claude, &sessions] {
            fs::create_dir_all(folder)?;
            open_to(folder, user, ON_THE_WAY)?;
        }
        settle_cache(cache, user)?;

        let worktree = paths.worktree();
        let thread = match Owner::of(&worktree) {
            Some(owner) if owner.gid() == user.gid() => owner,
            _ => {
                let taken = uids_in(&threads)?;
                user.new_thread(&key.to_string(), |uid| taken.contains(&uid))
            }
        };
        for folder in [worktree, paths.session()] {
            if folder.is_dir() && Owner::of(&folder) != Some(thread) {
                owner::take_over(&folder, Some(thread))?;
                fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
            }
        }
        Ok(thread)
    };
    settle().map_err(WorkspaceError::io("hand over the folders of", root))
}

/// The number of a user: the group of the folder, or a new one.
fn settle_user(workspace: &Path, root: &Path, key: &ThreadKey) -> io::Result<Owner> {
    let user = match Owner::of_user(root) {
        Some(user) => user,
        None => {
            let taken = groups_below(workspace)?;
            Owner::new_user(&key.user_key().to_string(), |gid| taken.contains(&gid))
        }
    };
    open_to(root, user, USERS)?;
    Ok(user)
}

/// Makes a folder root's, with the user's group.
fn open_to(folder: &Path, user: Owner, mode: u32) -> io::Result<()> {
    let found = fs::symlink_metadata(folder)?;
    if (found.uid(), found.gid()) != (0, user.gid()) {
        // Nobody gets in by the old mode and the new group.
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        lchown(folder, Some(0), Some(user.gid()))?;
    } else if found.permissions().mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(folder, Permissions::from_mode(mode))
}

/// Gives what is greenroom's own back to root, once.
fn give_back(folder: &Path) -> io::Result<()> {
    match fs::symlink_metadata(folder) {
        Ok(found) if found.uid() != 0 => owner::take_over(folder, None),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn settle_cache(cache: &Path, user: Owner) -> io::Result<()> {
    fs::create_dir_all(cache)?;
    for folder in cache.ancestors().skip(1).take(2) {
        owner::let_pass(folder)?;
    }
    open_to(cache, user, ON_THE_WAY)
}

/// The groups of all users' folders.
fn groups_below(workspace: &Path) -> io::Result<HashSet<u32>> {
    let mut groups = HashSet::new();
    for client in fs::read_dir(workspace)?.flatten() {
        for user in fs::read_dir(client.path()).into_iter().flatten().flatten() {
            // Of the entry itself: links are not followed.
            groups.extend(user.metadata().map(|found| found.gid()));
        }
    }
    Ok(groups)
}

/// The owners of what lies in a folder.
fn uids_in(folder: &Path) -> io::Result<HashSet<u32>> {
    let entries = fs::read_dir(folder)?.flatten();
    Ok(entries
        .filter_map(|entry| Some(entry.metadata().ok()?.uid()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Room {
        root: tempfile::TempDir,
    }

    impl Room {
        /// `None` where files cannot be given away.
        fn new() -> Option<Self> {
            let is_root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
            if !is_root {
                eprintln!("skipped: only root gives files away");
                return None;
            }
            let root = tempfile::tempdir().unwrap();
            Some(Self { root })
        }

        fn at(&self, path: &str) -> std::path::PathBuf {
            self.root.path().join("workspace/acme").join(path)
        }

        fn make(&self, path: &str, owner: (u32, u32)) {
            fs::create_dir_all(self.at(path)).unwrap();
            lchown(self.at(path), Some(owner.0), Some(owner.1)).unwrap();
        }

        fn settle(&self, user: &str, thread: &str) -> Owner {
            let workspace = self.root.path().join("workspace");
            let key = ThreadKey::parse("acme", user, thread).unwrap();
            let paths = ThreadPaths::new(&workspace, &key);
            for folder in [paths.user.root().to_owned(), paths.worktree()] {
                fs::create_dir_all(folder).unwrap();
            }
            let cache = self.root.path().join("cache/users").join(user);
            settle_owners(&workspace, &cache, &paths, &key).unwrap()
        }

        fn place(&self, path: &str) -> (u32, u32, u32) {
            let found = fs::symlink_metadata(self.at(path)).unwrap();
            let mode = found.permissions().mode() & 0o7777;
            (found.uid(), found.gid(), mode)
        }
    }

    #[test]
    fn a_number_that_is_taken_is_nobody_elses() {
        let Some(room) = Room::new() else { return };
        let none = |_| false;
        // Somebody else has the very numbers that the names stand for.
        let user = Owner::new_user("acme/alice", none);
        let thread = user.new_thread("acme/alice/main", none);
        room.make("bob", (0, user.gid()));
        let alice = Owner::new_user("acme/alice", |gid| gid == user.gid());
        room.make("alice/threads/other", (thread.uid(), alice.gid()));
        let main = room.settle("alice", "main");
        assert_eq!(main.gid(), alice.gid());
        let next = alice.new_thread("acme/alice/main", |uid| uid == thread.uid());
        assert_eq!(main, next);
        // They keep them.
        assert_eq!(room.settle("alice", "main"), main);
        assert_eq!(room.place("alice").1, alice.gid());
        // A folder that was copied from another user's is no way to that one's files.
        let theirs = room.settle("bob", "main");
        room.make("alice/threads/copied", (theirs.uid(), theirs.gid()));
        let copied = room.settle("alice", "copied");
        assert_eq!(copied.gid(), alice.gid());
        assert!(![theirs.uid(), main.uid()].contains(&copied.uid()));
        assert_eq!(Owner::of(&room.at("alice/threads/copied")), Some(copied));
    }

    #[test]
    fn what_was_there_before_is_closed_and_given_away() {
        let Some(room) = Room::new() else { return };
        for folder in [
            "alice",
            "alice/threads/main",
            "alice/threads/main/src",
            "alice/.claude/sessions/main",
            "alice/.claude/threads",
            "alice/project",
            "alice/project/src",
            "alice/.greenroom",
        ] {
            room.make(folder, (1000, 1000));
            let open = Permissions::from_mode(0o777);
            fs::set_permissions(room.at(folder), open).unwrap();
        }
        let owner = room.settle("alice", "main");
        let (uid, gid) = (owner.uid(), owner.gid());
        for (path, expected) in [
            ("alice", (0, gid, 0o750)),
            ("alice/threads", (0, gid, 0o710)),
            ("alice/threads/main", (uid, gid, 0o700)),
            ("alice/.claude", (0, gid, 0o710)),
            ("alice/.claude/sessions", (0, gid, 0o710)),
            ("alice/.claude/sessions/main", (uid, gid, 0o700)),
        ] {
            assert_eq!(room.place(path), expected, "{path}");
        }
        for (path, expected) in [
            ("alice/threads/main/src", (uid, gid)),
            ("alice/.claude/threads", (0, 0)),
            ("alice/project", (0, 0)),
            ("alice/project/src", (0, 0)),
            ("alice/.greenroom", (0, 0)),
        ] {
            let (uid, gid, _) = room.place(path);
            assert_eq!((uid, gid), expected, "{path}");
        }
        let cache = fs::metadata(room.root.path().join("cache/users/alice")).unwrap();
        let mode = cache.permissions().mode() & 0o7777;
        assert_eq!((cache.uid(), cache.gid(), mode), (0, gid, 0o710));
    }
}
