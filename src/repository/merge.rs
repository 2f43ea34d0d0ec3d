//! Merging one branch into another, in memory: objects are written, no branch moves and no file
//! changes.

use git2::{MergeOptions, Oid, Repository};

use super::{
    CommitText, Operation as _, RepositoryError, Result, draft,
    loss::{self, Owner},
    worktree::write_commit,
};
use crate::domain::{Between, Signature};

/// Merge bases that cross each other are merged themselves, so deep.
const MAX_RECURSION: u32 = 8;

/// A branch and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tip {
    pub(super) branch: String,
    pub(super) id: Oid,
}

/// How the commit of a merge is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct How<'a> {
    /// Becomes the subject; `None`: "Merge … into …".
    pub(super) message: Option<&'a str>,
    pub(super) trailers: &'a [(&'a str, String)],
    pub(super) author: &'a Signature,
    pub(super) committer: &'a Signature,
    /// Make a commit where moving the branch along would do.
    pub(super) always_commits: bool,
}

/// What became of a merge that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Merged {
    /// There was nothing to merge.
    UpToDate,
    /// The branch only has to move along.
    Forward(Oid),
    /// A new commit with both as parents.
    Commit(Oid),
}

impl Merged {
    /// Where the branch stands then, if it moves.
    pub(super) fn moves_to(self) -> Option<Oid> {
        match self {
            Self::UpToDate => None,
            Self::Forward(id) | Self::Commit(id) => Some(id),
        }
    }
}

/// The tree of a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Combined {
    UpToDate,
    /// It is the other side's.
    Forward(Oid),
    Mixed(Oid),
}

/// Merges `from` into `to`, as trees. With `owner`, lines of others that would vanish although
/// none of the owner's turns touched them stop it.
///
/// # Errors
/// [`RepositoryError::Conflict`] names the files.
pub(super) fn combine(
    repo: &Repository,
    from: &Tip,
    to: &Tip,
    owner: Option<&Owner>,
) -> Result<Combined> {
    let is_in = |old: Oid, new: Oid| -> Result<bool, git2::Error> {
        Ok(old == new || repo.graph_descendant_of(new, old)?)
    };
    if is_in(from.id, to.id).during("compare two branches")? {
        return Ok(Combined::UpToDate);
    }
    let commit = |id| repo.find_commit(id).during("read a branch's commit");
    let (ours, theirs) = (commit(to.id)?, commit(from.id)?);
    let combined = if is_in(to.id, from.id).during("compare two branches")? {
        Combined::Forward(theirs.tree_id())
    } else {
        let mut options = MergeOptions::new();
        options.recursion_limit(MAX_RECURSION).skip_reuc(true);
        let mut index = repo
            .merge_commits(&ours, &theirs, Some(&options))
            .during("merge two branches")?;
        if index.has_conflicts() {
            return Err(draft::conflicts(&index)?.between(from, to));
        }
        Combined::Mixed(index.write_tree_to(repo).during("write the merged tree")?)
    };
    if let (Some(owner), Combined::Forward(tree) | Combined::Mixed(tree)) = (owner, combined) {
        let merged = repo.find_tree(tree).during("read the merged tree")?;
        let files = loss::find(repo, &ours, &theirs, &merged, owner)?;
        if !files.is_empty() {
            let between = None;
            return Err(RepositoryError::Conflict { between, files }.between(from, to));
        }
    }
    Ok(combined)
}

/// As [`combine`], and makes the commit where one is needed. No branch has it.
///
/// # Errors
/// The same.
pub(super) fn merge(
    repo: &Repository,
    from: &Tip,
    to: &Tip,
    how: &How<'_>,
    owner: Option<&Owner>,
) -> Result<Merged> {
    let tree = match combine(repo, from, to, owner)? {
        Combined::UpToDate => return Ok(Merged::UpToDate),
        Combined::Forward(_) if !how.always_commits => return Ok(Merged::Forward(from.id)),
        Combined::Forward(tree) | Combined::Mixed(tree) => tree,
    };
    let usual = format!("Merge {} into {}", from.branch, to.branch);
    let text = CommitText {
        instruction: how.message.unwrap_or(&usual),
        trailers: how.trailers,
        author: how.author,
        committer: how.committer,
    };
    write_commit(repo, tree, &[to.id, from.id], &text).map(Merged::Commit)
}

impl RepositoryError {
    /// Says which branches do not go together.
    pub(super) fn between(self, from: &Tip, to: &Tip) -> Self {
        let branches = Between {
            from: from.branch.clone(),
            to: to.branch.clone(),
        };
        match self {
            Self::Conflict { files, .. } => Self::Conflict {
                between: Some(branches),
                files,
            },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests;
