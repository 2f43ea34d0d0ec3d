//! A commit of what a [`Stage`](super::stage::Stage) found: its objects, the branch's move, the index, each as
//! early as it may be and no earlier.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use git2::{ObjectType, Oid, Repository};

use super::{
    Operation as _, Result,
    gate::Keeper,
    guard::Repair,
    index::{Damaged, Entry, Index, Moment},
    look::Memory,
    message,
    objects::{NewObjects, commit_text, signed},
    refs::Branch,
    scan::Unfinished,
    worktree::{CommitRequest, Committed, Known, Scope, Worktree, summarise},
};
use crate::{domain::CommitSummary, lease::Fence, task};

/// Changed files whose folders are read ahead, at most.
const READ_AHEAD: usize = 20;

/// What an index has to be told; `None`: the file is gone.
type Changes = BTreeMap<Vec<u8>, Option<Entry>>;

/// A thread's repository, kept open from one commit to the next for the objects that it holds in memory:
/// on a network disk reading a branch's trees again takes longer than all else of a commit. Whoever
/// takes it has looked at the disk first; what it knows are objects, which never change, and the
/// configuration, which is ours. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Kept(Arc<Held>);

#[derive(Default)]
struct Held(Mutex<Holding>);

#[derive(Default)]
struct Holding {
    repo: Option<Repository>,
    /// Has the repository while it reads ahead.
    reader: Option<JoinHandle<Repository>>,
    memory: Memory,
}

impl Drop for Held {
    fn drop(&mut self) {
        let held = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (repo, reader) = (held.repo.take(), held.reader.take());
        if repo.is_none() && reader.is_none() {
            return;
        }
        // A disk that does not answer keeps whoever closes a file of it waiting, and this may be
        // dropped where nobody has to wait. (A reader that is through holds its repository until it is
        // joined or dropped.)
        let closer = std::thread::Builder::new().name("repository's end".into());
        let close = move || drop((repo, reader.map(JoinHandle::join)));
        closer.spawn(close).ok();
    }
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

impl Kept {
    pub(super) fn take(&self) -> Option<Repository> {
        let (kept, reader) = {
            let mut held = self.lock();
            (held.repo.take(), held.reader.take())
        };
        kept.or_else(|| reader?.join().ok())
    }

    pub(super) fn put(&self, repo: Repository) {
        self.lock().repo = Some(repo);
    }

    /// The same after a commit of ours, which libgit2 has not seen: what the next one begins with is read
    /// ahead where that takes a while. Whoever takes it waits for that.
    fn put_after(&self, repo: Repository, commit: &CommitSummary) {
        if !task::is_disk_slow() {
            return self.put(repo);
        }
        let id = commit.id.clone();
        let changed = commit.files.iter().take(READ_AHEAD);
        let changed: Vec<_> = changed.map(|file| PathBuf::from(&file.path)).collect();
        let read = move || {
            let ahead = || -> std::result::Result<(), git2::Error> {
                let tree = repo.find_commit(Oid::from_str(&id)?)?.tree()?;
                for path in &changed {
                    // One that is gone leads there as well.
                    tree.get_path(path).ok();
                }
                Ok(())
            };
            // Whoever needs it finds out what is amiss.
            ahead().ok();
            repo
        };
        let reader = std::thread::Builder::new().name("reads ahead".into());
        self.lock().reader = reader.spawn(read).ok();
    }

    /// What earlier looks at the git directory have seen.
    pub(super) fn memory(&self) -> Memory {
        self.lock().memory.clone()
    }

    pub(super) fn remember(&self, memory: Memory) {
        self.lock().memory = memory;
    }

    fn lock(&self) -> MutexGuard<'_, Holding> {
        (self.0.0).lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worktree from which a commit can be made.
pub(super) struct Opened {
    pub(super) repo: Repository,
    pub(super) head: Oid,
    /// The file system's time, if it was asked for.
    pub(super) now: Option<Moment>,
    /// The index's file, if it was read.
    pub(super) index: Option<Result<Index, Damaged>>,
    /// What a scan by that index has found, if there was one.
    pub(super) ahead: Option<Unfinished>,
    /// Nothing odd was seen on the way to the branch.
    pub(super) is_as_left: bool,
    pub(super) repairs: Vec<Repair>,
}

/// A branch's way from one commit to the next.
struct Step<'a> {
    from: Oid,
    to: Oid,
    tree: Oid,
    /// As in a commit.
    who: Vec<u8>,
    is_as_left: bool,
    fence: &'a Fence,
}

impl Worktree {
    /// Keeps the repository for the next commit, after this one.
    pub(super) fn keep_after(&self, repo: Repository, commit: Option<&CommitSummary>) {
        match commit {
            Some(commit) => self.kept.put_after(repo, commit),
            None => self.kept.put(repo),
        }
    }

    pub(super) fn commit_onto(
        &self,
        opened: &mut Opened,
        request: &CommitRequest<'_>,
    ) -> Result<Committed> {
        let mut known = Known {
            index: opened.index.take(),
            ahead: opened.ahead.take(),
        };
        let (repo, head) = (&opened.repo, opened.head);
        let head_tree = self.tree(repo, head)?;
        let keeper = Keeper::new(request.held_dir);
        let now = match opened.now {
            Some(now) => now,
            None => self.now()?,
        };
        let mut found = self.stage_in(repo, &head_tree, keeper, request.scope, now, &mut known)?;
        let (tree, mut new) = found.stage.tree()?;
        let changes = std::mem::take(found.stage.changes());
        let mut index = found.index.take();
        if index.is_none() && (tree != head_tree.id() || !changes.is_empty()) {
            let known = known.index;
            let known = known.unwrap_or_else(|| Index::read(&self.index_file()));
            // Nothing of the index may make it look as if the commit had failed.
            match Index::of_known(known, repo, &head_tree) {
                Ok((read, _)) => index = Some(read),
                Err(error) => {
                    tracing::warn!(%error, branch = self.branch, "the index could not be read");
                }
            }
        }
        self.adopt(&changes);
        let next = index
            .filter(|index| !changes.is_empty() || !index.is_of(tree))
            .map(|index| (index, changes));
        let commit = if tree == head_tree.id() {
            if let Some((index, changes)) = next {
                self.write_index(&index, tree, &changes);
            }
            None
        } else {
            let text = &request.text;
            let message = message::compose(text.instruction, text.trailers);
            let author = message::signature(text.author).during("commit")?;
            let committer = message::signature(text.committer).during("commit")?;
            let content = commit_text(tree, &[head], &author, &committer, &message);
            let id = new.add(ObjectType::Commit, content)?;
            let step = Step {
                from: head,
                to: id,
                tree,
                who: signed(&committer),
                is_as_left: opened.is_as_left,
                fence: request.fence,
            };
            let files = self.take(&step, repo, &new, next, || found.stage.summary(&new))?;
            Some(match files {
                Some(files) => CommitSummary {
                    id: id.to_string(),
                    message: message.lines().next().unwrap_or_default().to_owned(),
                    files,
                    files_omitted: 0,
                },
                None => summarise(repo, id)?,
            })
        };
        if let Scope::AllAndWatch(watch) = request.scope {
            watch.count_from(tree);
        }
        Ok(Committed {
            commit,
            held_back: found.stage.held_back(),
            repairs: found.repairs,
        })
    }

    /// Writes a commit's objects, moves the branch to it and then brings the index there: an index that
    /// is behind is mended by the next commit, one that is ahead would show work that is in no commit.
    /// What can be written before its turn comes is, all at once. `meanwhile` runs beside that.
    fn take<T>(
        &self,
        step: &Step<'_>,
        repo: &Repository,
        new: &NewObjects,
        next: Option<(Index, Changes)>,
        meanwhile: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        step.fence.check()?;
        let (name, note) = self.references();
        let branch = Branch {
            git: self.git.path(),
            admin: &self.admin,
            name: &name,
            note: &note,
        };
        let file = self.index_file();
        let ((written, begun), prepared, meant) = std::thread::scope(|scope| {
            let prepared = next
                .as_ref()
                .map(|(index, changes)| scope.spawn(|| index.prepare(&file, step.tree, changes)));
            let written = scope.spawn(|| new.write());
            let begun = step
                .is_as_left
                .then(|| scope.spawn(|| branch.begin(step.from, step.to)));
            let meant = meanwhile();
            (
                (task::end(written), begun.map(task::end)),
                prepared.map(task::end),
                meant,
            )
        });
        written?;
        step.fence.check()?;
        // git's own way says what is amiss, where the branch could not be locked.
        let moved = match begun {
            Some(Ok(Some(mut begun))) => {
                begun.finish().during("move a branch")?;
                Some(begun)
            }
            _ => {
                self.move_branch(repo, step.from, step.to, step.fence)?;
                None
            }
        };
        std::thread::scope(|scope| {
            if let Some(moved) = &moved {
                scope.spawn(|| moved.tell(&step.who));
            }
            let is_done = matches!(prepared.map(|next| next?.finish()), Some(Ok(())));
            if let (false, Some((index, changes))) = (is_done, next) {
                self.write_index(&index, step.tree, &changes);
            }
        });
        meant
    }
}
