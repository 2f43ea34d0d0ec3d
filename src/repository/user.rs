//! A user's repository: made once, then opened; its branches.

use std::path::{Path, PathBuf};

use git2::{BranchType, ErrorCode, Oid, Repository};

use super::{
    Operation as _, Remotes, RepositoryError, Result, Source, Worktree, files,
    gitdir::GitDir,
    guard::Strangers,
    make::{Plan, Workshop},
    objects,
    remote::RemoteUse,
    spare::Spare,
    vet,
};
use crate::{
    domain::Signature,
    identity::{ThreadKey, UserKey},
    lease::Fence,
    owner::Owner,
};

/// The branch that the built-in template starts.
pub(super) const TEMPLATE_BRANCH: &str = "main";

/// The one repository of a user: a plain path, checked at each use.
#[derive(Debug, Clone)]
pub struct UserRepository {
    pub(super) project: PathBuf,
    pub(super) git: GitDir,
    /// For whom worktrees are made.
    pub(super) owner: Option<Owner>,
}

/// What [`UserRepository::create`] did.
#[derive(Debug)]
pub struct Created {
    pub repository: UserRepository,
    /// The workshop's thread was made along with it: branch, files and all.
    pub has_thread: bool,
}

/// A thread's branch after [`UserRepository::ensure_thread`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadState {
    /// The thread's branch (in today's or in the older layout) existed before the call.
    pub resumed: bool,
    pub branch: String,
    /// Full id of the branch's commit.
    pub head: String,
}

impl UserRepository {
    /// Makes the repository at `project` from `source`, with the branches of client and user,
    /// the user's checked out, and along with it the workshop's thread. If there is one already it is
    /// opened and `source` is not looked at.
    ///
    /// It is built in the workshop and then renamed, so `project` is never seen half made and a crash
    /// costs nothing but time. `base_branch` is what the client's branch starts from where the remote
    /// has none of that name; the remote's default branch otherwise.
    ///
    /// # Errors
    /// [`RepositoryError::Remote`], `Local`, `Empty`, `NoSuchBranch` and `NoDefaultBranch` are
    /// about the source; nothing is left behind then.
    pub fn create(
        project: &Path,
        workshop: Workshop<'_>,
        source: &Source,
        remotes: &Remotes,
        key: &UserKey,
        base_branch: Option<&str>,
        committer: &Signature,
    ) -> Result<Created> {
        let repository = Self {
            project: project.to_owned(),
            git: GitDir::of_project(project),
            owner: None,
        };
        let present = files::kind_of(repository.git.path()).during("look for the repository")?;
        if present.is_some() {
            let repo = repository.git.open(project)?;
            repository.ensure_user_branch(&repo, key)?;
            return Ok(Created {
                repository,
                has_thread: false,
            });
        }
        let plan = Plan {
            source,
            remotes,
            key,
            base_branch,
            committer,
        };
        let has_thread = plan.make(&repository, workshop)?;
        Ok(Created {
            repository,
            has_thread,
        })
    }

    /// Opens what [`UserRepository::create`] made.
    ///
    /// # Errors
    /// [`RepositoryError::Missing`] if there is none, [`RepositoryError::Tampered`] if it would
    /// lead git elsewhere.
    pub fn open(project: &Path) -> Result<Self> {
        let repository = Self {
            project: project.to_owned(),
            git: GitDir::of_project(project),
            owner: None,
        };
        repository.git.open(project)?;
        Ok(repository)
    }

    /// Worktrees that are made from here on are made for this owner.
    pub fn making_for(mut self, owner: Option<Owner>) -> Self {
        self.owner = owner;
        self
    }

    /// The worktree of a thread at `path`; see [`UserRepository::ensure_thread`]. Does not touch
    /// the disk.
    pub fn worktree(&self, key: &ThreadKey, path: &Path) -> Worktree {
        Worktree::new(self.git.clone(), key, path, self.owner)
    }

    /// Makes sure that the thread has its branch and, at `worktree`, its files. Idempotent; whatever
    /// of it is missing or damaged is made anew, and no file that is there is changed.
    ///
    /// The branch starts at `thread-{thread}` where an older layout left one here or at the
    /// origin, else at the user's branch (which is made off the client's, if need be).
    /// Uncommitted edits stay what they are, also after a move of the whole workspace.
    ///
    /// # Errors
    /// [`RepositoryError::Locked`] and [`RepositoryError::Tampered`] for what the guard refuses.
    pub fn ensure_thread(
        &self,
        key: &ThreadKey,
        worktree: &Path,
        fence: &Fence,
    ) -> Result<ThreadState> {
        self.ensure_worktree(key, &self.worktree(key, worktree), fence)
    }

    /// The same of a worktree that goes on being used: it keeps what it had to read.
    ///
    /// # Errors
    /// As [`ensure_thread`](Self::ensure_thread).
    pub fn ensure_worktree(
        &self,
        key: &ThreadKey,
        worktree: &Worktree,
        fence: &Fence,
    ) -> Result<ThreadState> {
        let branch = key.branch();
        if let Some(head) = worktree.ensure_as_left()? {
            return Ok(ThreadState {
                resumed: true,
                branch,
                head: head.to_string(),
            });
        }
        let repo = self.git.open(&self.project)?;
        let (head, resumed) = match worktree.settle_branch(&repo, Strangers::Keep, fence) {
            Ok((head, _)) => (head, true),
            Err(RepositoryError::NoSuchBranch { .. }) => {
                let legacy = legacy_branch(key);
                let earlier = match branch_tip(&repo, &legacy)? {
                    Some(tip) => Some(tip),
                    None => remote_tip(&repo, &legacy)?,
                };
                let users = self.ensure_user_branch(&repo, &key.user_key())?;
                let start = match earlier {
                    Some(tip) => vetted(&repo, tip, Some(users))?,
                    None => users,
                };
                fence.check()?;
                make_branch(&repo, &branch, start)?;
                (start, earlier.is_some())
            }
            Err(error) => return Err(error),
        };
        worktree.ensure(fence)?;
        Ok(ThreadState {
            resumed,
            branch,
            head: head.to_string(),
        })
    }

    /// What is done ahead, while nobody waits: the folders of git's objects, on a slow disk, and the
    /// files of the user's branch for the next thread. With those [`ensure_thread`]
    /// renames a folder instead of writing each file. They take as much disk as one more thread.
    /// Nothing happens where they are there already, nor where threads have owners: the files would
    /// be ours. Needs no lease.
    ///
    /// # Errors
    /// The disk's; nothing is left behind then.
    ///
    /// [`ensure_thread`]: Self::ensure_thread
    pub fn keep_spare(&self, key: &UserKey) -> Result<()> {
        objects::make_folders(self.git.path()).during("make the folders of objects")?;
        if self.project.parent().and_then(Owner::of_user).is_some() {
            return Ok(());
        }
        let repo = self.git.open(&self.project)?;
        let branch = key.user_branch();
        let tip = branch_tip(&repo, &branch)?;
        let tip = tip.ok_or(RepositoryError::NoSuchBranch { branch })?;
        let tree = repo
            .find_commit(tip)
            .and_then(|commit| commit.tree())
            .during("read the user's branch")?;
        Spare::of(self.git.path()).make(&repo, &tree)
    }

    /// Takes a thread's worktree away, and its branch if `with_branch`; commits that are on no other
    /// branch then keep a name below `refs/greenroom/rescued`. What is there already gone is fine.
    ///
    /// # Errors
    /// The disk's. A folder that cannot be emptied is moved out of the way and left.
    pub fn remove_thread(
        &self,
        key: &ThreadKey,
        worktree: &Path,
        with_branch: bool,
        fence: &Fence,
    ) -> Result<()> {
        let repo = self.git.open(&self.project)?;
        fence.check()?;
        self.worktree(key, worktree).remove()?;
        if with_branch {
            fence.check()?;
            let trunk = branch_tip(&repo, &key.user_key().user_branch())?;
            self.worktree(key, worktree).remove_branch(&repo, trunk)?;
        }
        Ok(())
    }

    /// The commit of the user's branch; the branch, and the client's, are made if missing.
    pub(super) fn ensure_user_branch(&self, repo: &Repository, key: &UserKey) -> Result<Oid> {
        let (client, user) = (key.client_branch(), key.user_branch());
        self.git.check_branch(&client)?;
        self.git.check_branch(&user)?;
        let user_tip = branch_tip(repo, &user)?;
        let client_tip = match branch_tip(repo, &client)? {
            Some(tip) => tip,
            None => {
                let start = match remote_tip(repo, &client)? {
                    Some(tip) => Some(tip),
                    None => default_tip(repo)?.or(user_tip),
                };
                let start = start.ok_or(RepositoryError::NoDefaultBranch)?;
                let start = vetted(repo, start, user_tip)?;
                make_branch(repo, &client, start)?;
                start
            }
        };
        match user_tip {
            Some(tip) => Ok(tip),
            None => make_branch(repo, &user, client_tip).map(|()| client_tip),
        }
    }
}

/// The thread's branch in an older layout.
pub(super) fn legacy_branch(key: &ThreadKey) -> String {
    format!("thread-{}", key.thread)
}

/// A commit that came from outside, if it can be had as files.
pub(super) fn vetted(repo: &Repository, commit: Oid, known: Option<Oid>) -> Result<Oid> {
    match vet::check(repo, commit, known) {
        Ok(()) => Ok(commit),
        Err(unfit) => Err(unfit.during(RemoteUse::Clone).into()),
    }
}

/// The commit of a local branch.
pub(super) fn branch_tip(repo: &Repository, branch: &str) -> Result<Option<Oid>> {
    tip(repo, branch, BranchType::Local)
}

pub(super) fn remote_tip(repo: &Repository, branch: &str) -> Result<Option<Oid>> {
    tip(repo, &format!("origin/{branch}"), BranchType::Remote)
}

fn tip(repo: &Repository, name: &str, kind: BranchType) -> Result<Option<Oid>> {
    let found = repo
        .find_branch(name, kind)
        .and_then(|branch| branch.into_reference().peel_to_commit())
        .map(|commit| Some(commit.id()));
    match found {
        // A name that can be no branch is no branch.
        Err(e) if matches!(e.code(), ErrorCode::NotFound | ErrorCode::InvalidSpec) => Ok(None),
        found => found.during("read a branch"),
    }
}

/// Where the origin's default branch stands: the one it named, the template's, or the only one.
pub(super) fn default_tip(repo: &Repository) -> Result<Option<Oid>> {
    for name in ["HEAD", "main", "master"] {
        if let Some(tip) = remote_tip(repo, name)? {
            return Ok(Some(tip));
        }
    }
    if let Some(tip) = branch_tip(repo, TEMPLATE_BRANCH)? {
        return Ok(Some(tip));
    }
    let fetched = repo
        .branches(Some(BranchType::Remote))
        .during("list the branches")?;
    let mut tips = fetched.filter_map(|branch| branch.ok()?.0.get().target());
    Ok(tips.next().filter(|_| tips.next().is_none()))
}

pub(super) fn make_branch(repo: &Repository, branch: &str, at: Oid) -> Result<()> {
    repo.reference(
        &format!("refs/heads/{branch}"),
        at,
        false,
        "greenroom: branch",
    )
    .map(drop)
    .during("make a branch")
}
