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
