//! Taking a thread away: its agent, its preview, its worktree, and with it, where that is asked
//! for, its branch and its past.

use std::{fs, path::Path, sync::Arc, time::Duration};

use super::{Inner, PREVIEW_GRACE, SupervisorError, prepare::Prepared};
use crate::{
    agent::Agent,
    domain::{Continuity, HeldBack},
    repository::UserRepository,
    workspace::{ThreadPaths, linked_folder},
};

/// Removing a large worktree from a slow disk.
const REMOVE_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// How a thread is to be taken away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Removal {
    /// Its branch too, and what the thread remembers.
    pub branch: bool,
    /// Files that are in no commit go with the worktree.
    pub discard: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Removed {
    Done,
    /// Nothing was touched.
    Refused(SupervisorError, Box<Option<(Agent, Continuity)>>),
    /// It broke off: the thread has to be prepared anew.
    Failed(SupervisorError),
}

/// Takes the thread away.
pub(super) async fn run(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    agent: Option<(Agent, Continuity)>,
    removal: Removal,
) -> Removed {
    let site = &prepared.site;
    let committed = match site.commit_outside_edits().await {
        Ok(committed) => committed,
        Err(error) => return Removed::Refused(error.into(), Box::new(agent)),
    };
    let mut held_back = committed.held_back;
    held_back.retain(|file| !is_installed(file));
    if !held_back.is_empty() && !removal.discard {
        return Removed::Refused(
            SupervisorError::HeldBack { files: held_back },
            Box::new(agent),
        );
    }
    if let Some((agent, _)) = agent {
        agent.stop().await;
    }
    prepared.attach.stop().await;
    inner.previews.remove(&site.key.slug(), PREVIEW_GRACE).await;
    let removed = async {
        let repository = inner.lock_repository(&site.key.user_key()).await?;
        let (key, paths, fence) = (site.key.clone(), site.paths.clone(), site.fence.clone());
        let linked = linked_folder(&inner.cache().user(&key.user_key()), &paths.worktree());
        let remove = move || {
            UserRepository::open(&paths.user.project())?.remove_thread(
                &key,
                &paths.worktree(),
                removal.branch,
                &fence,
            )?;
            // Of the container's own disk: can be lost, and can be left.
            fs::remove_dir_all(linked).ok();
            forget(&paths, removal.branch)
        };
        let fence = &site.fence;
        let removed = fence
            .write("removing a thread", REMOVE_DEADLINE, remove)
            .await;
        repository.release().await;
        removed
    };
    match removed.await {
        Ok(()) => Removed::Done,
        Err(error) => Removed::Failed(error),
    }
}

/// Is it something that an install brings back?
fn is_installed(file: &HeldBack) -> bool {
    Path::new(&file.path).ends_with("node_modules")
}

/// Removes the mark that there is such a thread, as the last step; what it remembers before that.
fn forget(paths: &ThreadPaths, everything: bool) -> Result<(), SupervisorError> {
    let remove = |path: &Path| {
        let removed = match fs::symlink_metadata(path) {
            Err(error) => Err(error),
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
        };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, "failed to remove what a thread remembered");
                Err(SupervisorError::Internal(
                    "what the thread remembered could not be removed".into(),
                ))
            }
            _ => Ok(()),
        }
    };
    if everything {
        for path in [
            paths.open_turns(),
            paths.turns(),
            paths.idempotency(),
            paths.context(),
            paths.session(),
        ] {
            remove(&path)?;
        }
    }
    remove(&paths.preview_place())
}
