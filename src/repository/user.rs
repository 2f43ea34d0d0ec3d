//! A user's repository: made once, then opened; its branches.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use git2::{
    AutotagOption, BranchType, ErrorCode, FetchOptions, ObjectType, Oid, Repository,
    RepositoryInitOptions, RepositoryOpenFlags,
};

use super::{
    Operation as _, Remotes, RepositoryError, Result, Source, TemplateFile, Worktree, checkout,
    files,
    gitdir::{self, GitDir},
    guard::Strangers,
    message,
    objects::{self, NewObjects, commit_text},
    remote::{Link, RemoteUse},
    spare::Spare,
    tree, vet,
};
use crate::{
    domain::Signature,
    identity::{ThreadKey, UserKey},
    lease::Fence,
    owner::Owner,
};

/// The branch that the built-in template starts.
const TEMPLATE_BRANCH: &str = "main";

/// The one repository of a user: a plain path, checked at each use.
#[derive(Debug, Clone)]
pub struct UserRepository {
    pub(super) project: PathBuf,
    pub(super) git: GitDir,
    /// For whom worktrees are made.
    pub(super) owner: Option<Owner>,
}

/// Where a repository is made, before it is put in its place.
#[derive(Debug, Clone, Copy)]
pub struct Workshop<'a> {
    /// On the file system where it will be; what is there is removed.
    pub scratch: &'a Path,
    /// A name that is free, of this call alone, on this machine's own disk; `None` where there is none.
    pub local: Option<&'a Path>,
    /// The files of the first thread are to be written along with the repository's.
    pub with_spare: bool,
}

/// Making a folder takes a network disk longer than that, and a local one a twentieth.
const SLOW: Duration = Duration::from_millis(1);

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
    /// the user's checked out. If there is one already it is opened and `source` is not looked
    /// at.
    ///
    /// It is built in the workshop and then renamed, so `project` is never seen half made and a crash
    /// costs nothing but time. libgit2 does one thing after the other, so where the workspace is on
    /// a slow disk it works on the local one, and what it made is copied, all files at once.
    /// `base_branch` is what the client's branch starts from where the remote has none of that
    /// name; the remote's default branch otherwise.
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
    ) -> Result<Self> {
        let repository = Self {
            project: project.to_owned(),
            git: GitDir::of_project(project),
            owner: None,
        };
        let present = files::kind_of(repository.git.path()).during("look for the repository")?;
        if present.is_some() {
            let repo = repository.git.open(project)?;
            repository.ensure_user_branch(&repo, key)?;
            return Ok(repository);
        }
        const LEFTOVERS: &str = "remove the leftovers of an earlier attempt";
        const MAKE: &str = "make the repository's folder";
        let scratch = workshop.scratch;
        files::remove_all(scratch).during(LEFTOVERS)?;
        if let Some(above) = scratch.parent() {
            fs::create_dir_all(above).during(MAKE)?;
        }
        let begun = Instant::now();
        fs::create_dir(scratch).during(MAKE)?;
        let built = match workshop.local.filter(|_| begun.elapsed() > SLOW) {
            None => build(scratch, source, remotes, key, base_branch, committer)
                .and_then(|(repo, tip)| fill(&repo, tip, scratch)),
            Some(local) => {
                sweep(local);
                let private = || DirBuilder::new().recursive(true).mode(0o700).create(local);
                private().during(MAKE)?;
                let built = build(local, source, remotes, key, base_branch, committer);
                let moved = built.and_then(|(_, tip)| move_over(local, tip, workshop));
                files::remove_all(local).ok();
                moved
            }
        };
        // The rename replaces an empty folder, and fails on anything else.
        let outcome =
            built.and_then(|()| fs::rename(scratch, project).during("put the repository in place"));
        if let Err(error) = outcome {
            files::remove_all(scratch).ok();
            return Err(error);
        }
        Ok(repository)
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
                let legacy = format!("thread-{}", key.thread);
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

/// Makes a whole repository in the empty folder `project`, but for its files. Answers the commit that
/// those are of.
fn build(
    project: &Path,
    source: &Source,
    remotes: &Remotes,
    key: &UserKey,
    base_branch: Option<&str>,
    committer: &Signature,
) -> Result<(Repository, Oid)> {
    super::init();
    let mut options = RepositoryInitOptions::new();
    options
        .no_reinit(true)
        .external_template(false)
        .initial_head(&key.user_branch());
    Repository::init_opts(project, &options).during("start the repository")?;
    let git = GitDir::of_project(project);
    let config = gitdir::render_config(source.url().as_deref());
    files::put(&git.path().join("config"), config.as_bytes()).during("write the configuration")?;
    let repo = git.open(project)?;

    let start = match source {
        Source::Template(site) => commit_template(&repo, site, committer)?,
        Source::Remote(url) => {
            remotes.session(url, RemoteUse::Clone, |link| fetch(&repo, link))?;
            vetted(&repo, first_commit(&repo, key, base_branch)?, None)?
        }
        Source::Local(path) => {
            look_ahead(path, key, base_branch)?;
            let path = path.to_string_lossy();
            fetch(&repo, &Link::local(&path))
                .map_err(|source| RepositoryError::Local { source })?;
            vetted(&repo, first_commit(&repo, key, base_branch)?, None)?
        }
    };
    make_branch(&repo, &key.client_branch(), start)?;
    make_branch(&repo, &key.user_branch(), start)?;
    Ok((repo, start))
}

/// Removes what killed processes have left beside this folder.
fn sweep(local: &Path) {
    const LEFT: Duration = Duration::from_secs(60 * 60);
    let entries = local.parent().and_then(|above| fs::read_dir(above).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let changed = entry.metadata().and_then(|about| about.modified());
        let age = changed.ok().and_then(|changed| changed.elapsed().ok());
        if age.is_some_and(|age| age > LEFT) {
            files::remove_all(&entry.path()).ok();
        }
    }
}

/// Writes a commit's files into `project`, and their index.
fn fill(repo: &Repository, commit: Oid, project: &Path) -> Result<()> {
    let tree = first_tree(repo, commit)?;
    let index = checkout::fill(repo, &tree, project)?;
    index
        .write(&project.join(".git/index"), tree.id(), &BTreeMap::new())
        .during("write the index")
}

fn first_tree(repo: &Repository, commit: Oid) -> Result<git2::Tree<'_>> {
    repo.find_commit(commit)
        .and_then(|commit| commit.tree())
        .during("read the first commit")
}

/// Brings a repository that was built at `local` to its scratch folder, and its files with it; all of
/// it at the same time.
fn move_over(local: &Path, commit: Oid, workshop: Workshop<'_>) -> Result<()> {
    let git = GitDir::of_project(local);
    let to = workshop.scratch.join(".git");
    fs::create_dir(&to).during("make the repository's folder")?;
    let copy = || files::copy_all(git.path(), &to).during("copy the repository");
    let ahead = || -> Result<()> {
        let repo = git.open(local)?;
        Spare::of(&to).make(&repo, &first_tree(&repo, commit)?)
    };
    std::thread::scope(|scope| {
        let copied = scope.spawn(copy);
        let spare = workshop.with_spare.then(|| scope.spawn(ahead));
        let filled = git
            .open(local)
            .and_then(|repo| fill(&repo, commit, workshop.scratch));
        let end = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        if let Some(Err(error)) = spare.map(end) {
            // The first thread's are written when it is made.
            tracing::warn!(%error, "no worktree is kept ready");
        }
        end(copied).and(filled)
    })
}

/// Brings all branches of an address here as `origin`'s, and notes which is the default one. Into
/// a repository that is being made, which nobody has touched; later operations with the origin go
/// through an `Uplink`.
fn fetch(repo: &Repository, link: &Link<'_>) -> Result<(), git2::Error> {
    let mut remote = repo.remote_anonymous(link.url)?;
    let mut options = FetchOptions::new();
    options
        .remote_callbacks(link.callbacks())
        .download_tags(AutotagOption::None);
    remote.fetch(
        &["+refs/heads/*:refs/remotes/origin/*"],
        Some(&mut options),
        None,
    )?;
    // No default branch (HEAD is detached or names a branch without commits) is no error: the
    // caller may have named one.
    let default = remote.default_branch().ok();
    let default = default
        .as_ref()
        .and_then(|name| name.as_str().ok()?.strip_prefix("refs/heads/"));
    if let Some(name) = default {
        let target = format!("refs/remotes/origin/{name}");
        repo.reference_symbolic("refs/remotes/origin/HEAD", &target, true, "clone")?;
    }
    Ok(())
}

/// Where the client's branch starts in a repository that was just fetched.
fn first_commit(repo: &Repository, key: &UserKey, base_branch: Option<&str>) -> Result<Oid> {
    let fetched = repo
        .references_glob("refs/remotes/origin/*")
        .during("list the branches")?;
    if fetched.count() == 0 {
        return Err(RepositoryError::Empty);
    }
    if let Some(tip) = remote_tip(repo, &key.client_branch())? {
        return Ok(tip);
    }
    match base_branch {
        Some(name) => remote_tip(repo, name)?.ok_or_else(|| RepositoryError::NoSuchBranch {
            branch: name.to_owned(),
        }),
        None => default_tip(repo)?.ok_or(RepositoryError::NoDefaultBranch),
    }
}

/// Judges what will be fetched from a folder, before: libgit2 holds each object of it in memory to
/// pack it. What cannot be found or read here is the fetch's to tell.
fn look_ahead(path: &Path, key: &UserKey, base_branch: Option<&str>) -> Result<()> {
    let flags = RepositoryOpenFlags::NO_SEARCH;
    let Ok(there) = Repository::open_ext(path, flags, &[] as &[&Path]) else {
        return Ok(());
    };
    let client = key.client_branch();
    let names = [Some(client.as_str()), base_branch].into_iter().flatten();
    let named = names.filter_map(|name| branch_tip(&there, name).ok().flatten());
    let default = || there.head().and_then(|head| head.peel_to_commit());
    let start = named.map(Some).next();
    match start.unwrap_or_else(|| default().ok().map(|commit| commit.id())) {
        Some(commit) => vetted(&there, commit, None).map(drop),
        None => Ok(()),
    }
}

/// A commit that came from outside, if it can be had as files.
fn vetted(repo: &Repository, commit: Oid, known: Option<Oid>) -> Result<Oid> {
    match vet::check(repo, commit, known) {
        Ok(()) => Ok(commit),
        Err(unfit) => Err(unfit.during(RemoteUse::Clone).into()),
    }
}

/// The built-in site as the first commit of a branch of its own.
fn commit_template(repo: &Repository, site: &[TemplateFile], committer: &Signature) -> Result<Oid> {
    let mut new = NewObjects::of(repo);
    let mut edits = BTreeMap::new();
    for file in site {
        let mode = if file.executable { 0o100755 } else { 0o100644 };
        let id = new.add(ObjectType::Blob, file.content.to_vec())?;
        edits.insert(file.path.clone().into_bytes(), Some((id, mode)));
    }
    let tree = tree::edit(repo, &mut new, None, &edits)?;
    let who = message::signature(committer).during("commit the template")?;
    let text = message::compose("Start from the built-in template", &[]);
    let content = commit_text(tree, &[], &who, &who, &text);
    let commit = new.add(ObjectType::Commit, content)?;
    new.write()?;
    make_branch(repo, TEMPLATE_BRANCH, commit)?;
    Ok(commit)
}

/// The commit of a local branch.
pub(super) fn branch_tip(repo: &Repository, branch: &str) -> Result<Option<Oid>> {
    tip(repo, branch, BranchType::Local)
}

fn remote_tip(repo: &Repository, branch: &str) -> Result<Option<Oid>> {
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
fn default_tip(repo: &Repository) -> Result<Option<Oid>> {
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

fn make_branch(repo: &Repository, branch: &str, at: Oid) -> Result<()> {
    repo.reference(
        &format!("refs/heads/{branch}"),
        at,
        false,
        "greenroom: branch",
    )
    .map(drop)
    .during("make a branch")
}
