//! What a thread's branch is to become next, worked out before anything of it is applied: a
//! turn's changes taken back, an earlier state, a merge. [`Worktree::apply`] makes it so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use git2::{Commit, ErrorCode, Index, IndexEntry, MergeOptions, Oid, Repository, Tree};

use super::{
    DiffText, Operation as _, RepositoryError, Result, diff,
    files::{Found, Root},
    gate::Keeper,
    landing::{self, State, Step},
    worktree::{self, CommitText, Worktree},
};
use crate::domain::{Conflict, ConflictKind, FileChange};

/// Most files that are named when something does not fit.
const MAX_CONFLICTS: usize = 200;

/// A state of a thread that a draft starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    head: Oid,
    tree: Oid,
}

impl Snapshot {
    pub(super) fn head_id(&self) -> Oid {
        self.head
    }

    pub(super) fn tree_id(&self) -> Oid {
        self.tree
    }

    /// Full id of the branch's commit.
    pub fn head(&self) -> String {
        self.head.to_string()
    }
}

/// A tree that fits a thread's branch and worktree as its next state. Nothing of it is applied.
#[derive(Debug, Clone)]
pub struct Draft {
    base: Snapshot,
    tree: Oid,
    /// Further parents of its commit.
    merged: Vec<Oid>,
    files: Vec<FileChange>,
}

impl Draft {
    /// Would nothing change?
    pub fn is_empty(&self) -> bool {
        self.tree == self.base.tree && self.merged.is_empty()
    }

    /// What would change.
    pub fn files(&self) -> &[FileChange] {
        &self.files
    }
}

impl Worktree {
    /// The thread as it is committed.
    pub fn committed(&self) -> Result<Snapshot> {
        let repo = self.open()?;
        let head = self.tip(&repo)?;
        let tree = self.tree(&repo, head)?.id();
        Ok(Snapshot { head, tree })
    }

    /// The thread as it would be if what is in the worktree were committed. Nothing is.
    pub fn uncommitted(&self) -> Result<Snapshot> {
        let repo = self.open()?;
        let head = self.tip(&repo)?;
        let head_tree = self.tree(&repo, head)?;
        let mut staged = self.stage(&repo, &head_tree, Keeper::none())?;
        let (tree, new) = staged.stage.tree()?;
        new.write()?;
        Ok(Snapshot { head, tree })
    }

    /// `base` without what one commit changed (against its first parent), by three-way merge.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] where later changes build on it, or where a file that is in
    /// no commit is in the way.
    pub fn draft_without(&self, base: &Snapshot, commit: &str) -> Result<Draft> {
        let repo = self.open()?;
        let commit = find_commit(&repo, commit)?;
        let trees = || -> Result<_, git2::Error> {
            let with = commit.tree()?;
            let without = commit.parent(0)?.tree()?;
            Ok((with, without, repo.find_tree(base.tree)?))
        };
        let (with, without, ours) = trees().during("read what a commit changed")?;
        let mut merged = repo
            .merge_trees(&with, &ours, &without, Some(&MergeOptions::new()))
            .during("take a commit's changes back")?;
        if merged.has_conflicts() {
            return Err(conflicts(&merged)?);
        }
        let tree = merged.write_tree_to(&repo).during("write the tree")?;
        self.draft(&repo, base, tree, Vec::new())
    }

    /// `base` set to the state of an earlier commit of this thread's branch, which may be named by
    /// the beginning of its id. Answers the full id too.
    ///
    /// # Errors
    /// [`RepositoryError::NoSuchCommit`] if the branch does not come from it;
    /// [`RepositoryError::Conflict`] where a file that is in no commit is in the way.
    pub fn draft_restored(&self, base: &Snapshot, commit: &str) -> Result<(Draft, String)> {
        let repo = self.open()?;
        let found = find_commit(&repo, commit)?;
        let is_ours = found.id() == base.head
            || repo
                .graph_descendant_of(base.head, found.id())
                .during("look for a commit in the history")?;
        if !is_ours {
            return Err(no_such(commit));
        }
        let draft = self.draft(&repo, base, found.tree_id(), Vec::new())?;
        Ok((draft, found.id().to_string()))
    }

    /// `base` as it is: of an operation that has nothing to change.
    pub fn draft_nothing(&self, base: &Snapshot) -> Result<Draft> {
        self.draft(&self.open()?, base, base.tree, Vec::new())
    }

    /// A draft of `tree`, if it fits the worktree. `merged` become further parents of the commit.
    pub(super) fn draft(
        &self,
        repo: &Repository,
        base: &Snapshot,
        tree: Oid,
        merged: Vec<Oid>,
    ) -> Result<Draft> {
        let trees = || Ok::<_, git2::Error>((repo.find_tree(base.tree)?, repo.find_tree(tree)?));
        let (before, after) = trees().during("read the trees")?;
        self.check_room(repo, &before, &after)?;
        let (files, _) =
            diff::changed_files(repo, Some(&before), &after).during("read what would change")?;
        Ok(Draft {
            base: *base,
            tree,
            merged,
            files,
        })
    }

    /// What the draft would change, as text.
    pub fn diff_of(&self, draft: &Draft) -> Result<DiffText> {
        let repo = self.open()?;
        let trees = || {
            Ok::<_, git2::Error>((
                repo.find_tree(draft.base.tree)?,
                repo.find_tree(draft.tree)?,
            ))
        };
        let (before, after) = trees().during("read the trees")?;
        diff::text(&repo, &before, &after).during("compare two states")
    }

    /// Makes the draft's commit. No branch has it yet: see [`Worktree::apply`].
    pub fn write_draft(&self, draft: &Draft, text: &CommitText<'_>) -> Result<String> {
        let repo = self.open()?;
        let mut parents = vec![draft.base.head];
        parents.extend(&draft.merged);
        worktree::write_commit(&repo, draft.tree, &parents, text).map(|id| id.to_string())
    }

    /// Refuses a change that would overwrite what is in no commit: ignored and held-back files,
    /// edits that came in a moment ago.
    pub(super) fn check_room(
        &self,
        repo: &Repository,
        before: &Tree<'_>,
        after: &Tree<'_>,
    ) -> Result<()> {
        let steps = landing::steps(repo, before, after)?;
        let root = Root::open(self.path()).during("open the worktree")?;
        let mut blocked = BTreeMap::new();
        for (path, step) in &steps {
            let state = landing::state(repo, &root, path, step)?;
            let is_old = match (&state, step.old) {
                (State::Absent, None) => true,
                (State::Blob(present), Some(old)) => *present == old,
                _ => false,
            };
            let is_new = matches!((&state, step.new), (State::Blob(a), Some(b)) if *a == b)
                || matches!((&state, step.new), (State::Absent, None));
            if !is_old && !is_new {
                match state {
                    State::Folder => self.list_strangers(path, &steps, &mut blocked)?,
                    _ => block(&mut blocked, path),
                }
            } else if step.new.is_some() && !is_new {
                // What stands where one of its folders should be?
                let in_the_way = path.ancestors().skip(1).find(|folder| {
                    let found = root.look(folder);
                    !matches!(found, Ok(Found::Nothing | Found::Directory))
                });
                if let Some(folder) = in_the_way
                    && steps.get(folder).is_none_or(|step| step.new.is_some())
                {
                    block(&mut blocked, folder);
                }
            }
            if blocked.len() >= MAX_CONFLICTS {
                break;
            }
        }
        if blocked.is_empty() {
            return Ok(());
        }
        Err(RepositoryError::Conflict {
            between: None,
            files: blocked.into_values().collect(),
        })
    }

    /// Files in a folder that has to make room, which the change itself does not take away.
    fn list_strangers(
        &self,
        folder: &Path,
        steps: &BTreeMap<PathBuf, Step>,
        blocked: &mut BTreeMap<PathBuf, Conflict>,
    ) -> Result<()> {
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(self.path().join(&folder)).during("read a folder")?;
            for entry in entries {
                let entry = entry.during("read a folder")?;
                let path = folder.join(entry.file_name());
                if entry.file_type().during("read a folder")?.is_dir() {
                    folders.push(path);
                } else if steps.get(&path).is_none_or(|step| step.new.is_some()) {
                    block(blocked, &path);
                }
                if blocked.len() >= MAX_CONFLICTS {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn block(blocked: &mut BTreeMap<PathBuf, Conflict>, path: &Path) {
    let conflict = Conflict {
        path: path.to_string_lossy().into_owned(),
        reason: "What is there now is in no commit (ignored, held back, or just being edited) and \
                 would be overwritten."
            .into(),
        kind: ConflictKind::InTheWay,
        lines: Vec::new(),
    };
    blocked.insert(path.to_owned(), conflict);
}

fn no_such(commit: &str) -> RepositoryError {
    RepositoryError::NoSuchCommit {
        commit: commit.to_owned(),
    }
}

/// A commit by its id in hex or an unambiguous beginning of it.
pub(super) fn find_commit<'r>(repo: &'r Repository, id: &str) -> Result<Commit<'r>> {
    match repo.find_commit_by_prefix(id) {
        Ok(commit) => Ok(commit),
        Err(error) => match error.code() {
            ErrorCode::Ambiguous => Err(RepositoryError::AmbiguousCommit {
                commit: id.to_owned(),
            }),
            // Of another kind, or no id at all.
            ErrorCode::NotFound | ErrorCode::InvalidSpec | ErrorCode::GenericError => {
                Err(no_such(id))
            }
            _ => Err(error).during("look for a commit"),
        },
    }
}

/// The files of a merge that did not come out.
pub(super) fn conflicts(index: &Index) -> Result<RepositoryError> {
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let list = index.conflicts().during("read a merge's conflicts")?;
    for conflict in list {
        let conflict = conflict.during("read a merge's conflicts")?;
        let kind = match (&conflict.ancestor, &conflict.our, &conflict.their) {
            (Some(_), Some(_), Some(_)) => ConflictKind::BothModified,
            (None, Some(_), Some(_)) => ConflictKind::BothAdded,
            (Some(_), Some(_), None) => ConflictKind::DeletedInFrom,
            (Some(_), None, Some(_)) => ConflictKind::DeletedInTo,
            _ => ConflictKind::Renamed,
        };
        let reason = match (&conflict.our, &conflict.their) {
            (Some(_), Some(_)) => "The same places were changed by both.",
            (None, _) => "It was changed on one side, and removed or renamed here.",
            (_, None) => "It was changed here, and is not there on the other side.",
        };
        let entry = conflict.our.or(conflict.their).or(conflict.ancestor);
        let path = entry.map(|IndexEntry { path, .. }| String::from_utf8_lossy(&path).into_owned());
        let Some(path) = path.filter(|path| seen.insert(path.clone())) else {
            continue;
        };
        if files.len() < MAX_CONFLICTS {
            files.push(Conflict {
                path,
                reason: reason.into(),
                kind,
                lines: Vec::new(),
            });
        }
    }
    Ok(RepositoryError::Conflict {
        between: None,
        files,
    })
}
