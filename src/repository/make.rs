//! A user's repository in the making: its objects and branches, the files of the user's branch, and
//! the first thread with its own, all of it where nobody looks until it is whole.
//!
//! libgit2 does one thing after the other. So where the workspace is on a slow disk it works on the
//! local one, and what it made is copied, all files at once, while both checkouts are written.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use git2::{
    AutotagOption, FetchOptions, ObjectType, Oid, Repository, RepositoryInitOptions,
    RepositoryOpenFlags,
};

use super::{
    Operation as _, Remotes, RepositoryError, Result, Source, TemplateFile, Worktree, checkout,
    files,
    gitdir::{self, GitDir},
    message,
    objects::{NewObjects, commit_text},
    remote::{Link, RemoteUse},
    tree,
    user::{
        TEMPLATE_BRANCH, UserRepository, branch_tip, default_tip, legacy_branch, make_branch,
        remote_tip, vetted,
    },
};
use crate::{
    domain::Signature,
    identity::{ThreadKey, UserKey},
    lease::Fence,
    owner::Owner,
    task,
};

/// Making a folder takes a network disk longer than that, and a local one a twentieth.
const SLOW: Duration = Duration::from_millis(1);

/// Where a repository is made, before it is put in its place, and for whom.
#[derive(Debug, Clone, Copy)]
pub struct Workshop<'a> {
    /// On the file system where it will be; what is there is removed.
    pub scratch: &'a Path,
    /// A name that is free, of this call alone, on this machine's own disk, which is used where the
    /// other one is slow; `None` where there is none.
    pub local: Option<&'a Path>,
    /// Made along with it, which costs little more than the longer of both.
    pub thread: Option<FirstThread<'a>>,
}

/// The thread that a repository is made for.
#[derive(Debug, Clone, Copy)]
pub struct FirstThread<'a> {
    pub key: &'a ThreadKey,
    /// Where its files belong.
    pub worktree: &'a Path,
    /// For whom they are made.
    pub owner: Option<Owner>,
    /// Asked right before it is put in its place.
    pub fence: &'a Fence,
}

/// What a repository is made from.
pub(super) struct Plan<'a> {
    pub(super) source: &'a Source,
    pub(super) remotes: &'a Remotes,
    pub(super) key: &'a UserKey,
    pub(super) base_branch: Option<&'a str>,
    pub(super) committer: &'a Signature,
}

impl Plan<'_> {
    /// Makes it and puts it in its place, where nothing is. Says whether the thread came along: one that
    /// began elsewhere, or whose files are there, is left to [`UserRepository::ensure_thread`]. So is one
    /// that a crash parts from its repository.
    pub(super) fn make(&self, repository: &UserRepository, workshop: Workshop<'_>) -> Result<bool> {
        const LEFTOVERS: &str = "remove the leftovers of an earlier attempt";
        const MAKE: &str = "make the repository's folder";
        let scratch = workshop.scratch;
        files::remove_all(scratch).during(LEFTOVERS)?;
        if let Some(above) = scratch.parent() {
            fs::create_dir_all(above).during(MAKE)?;
        }
        let begun = Instant::now();
        fs::create_dir(scratch).during(MAKE)?;
        let local = workshop.local.filter(|_| begun.elapsed() > SLOW);
        let thread = workshop.thread.map(|first| {
            let repository = repository.clone().making_for(first.owner);
            (repository.worktree(first.key, first.worktree), first)
        });
        let make = || {
            if let Some(local) = local {
                sweep(local);
                let private = || DirBuilder::new().recursive(true).mode(0o700).create(local);
                private().during(MAKE)?;
            }
            let bench = local.unwrap_or(scratch);
            let (repo, tip) = self.build(bench)?;
            let thread = match &thread {
                Some((worktree, first)) if begins_here(&repo, first)? => {
                    add_thread(&repo, bench, worktree, tip)?;
                    Some((worktree, first.fence))
                }
                _ => None,
            };
            drop(repo);
            furnish(bench, scratch, tip, thread.map(|(worktree, _)| worktree))?;
            // The rename replaces an empty folder, and fails on anything else.
            let place =
                |from: &Path, to: &Path| fs::rename(from, to).during("put the repository in place");
            place(scratch, &repository.project)?;
            if let Some((worktree, fence)) = thread {
                fence.check()?;
                place(&worktree.partial(), worktree.path())?;
            }
            Ok(thread.is_some())
        };
        let made = make();
        if let Some(local) = local {
            files::remove_all(local).ok();
        }
        if made.is_err() {
            files::remove_all(scratch).ok();
            if let Some((worktree, _)) = &thread {
                files::remove_all(&worktree.partial()).ok();
            }
        }
        made
    }

    /// Makes a whole repository in the empty folder `project`, but for its files. Answers the commit that
    /// those are of.
    fn build(&self, project: &Path) -> Result<(Repository, Oid)> {
        super::init();
        let (key, base_branch) = (self.key, self.base_branch);
        let mut options = RepositoryInitOptions::new();
        options
            .no_reinit(true)
            .external_template(false)
            .initial_head(&key.user_branch());
        Repository::init_opts(project, &options).during("start the repository")?;
        let git = GitDir::of_project(project);
        let config = gitdir::render_config(self.source.url().as_deref());
        files::put(&git.path().join("config"), config.as_bytes())
            .during("write the configuration")?;
        let repo = git.open(project)?;

        let start = match self.source {
            Source::Template(site) => commit_template(&repo, site, self.committer)?,
            Source::Remote(url) => {
                let fetch = |link: &Link<'_>| fetch(&repo, link);
                self.remotes.session(url, RemoteUse::Clone, fetch)?;
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
}

/// Has the thread no branch of an older layout at the origin, and no files here?
fn begins_here(repo: &Repository, first: &FirstThread<'_>) -> Result<bool> {
    let earlier = remote_tip(repo, &legacy_branch(first.key))?;
    let present = files::kind_of(first.worktree).during("look for the worktree")?;
    Ok(earlier.is_none() && present.is_none())
}

/// Gives a thread its branch and its entry in the git directory.
fn add_thread(repo: &Repository, bench: &Path, worktree: &Worktree, tip: Oid) -> Result<()> {
    make_branch(repo, &worktree.branch, tip)?;
    worktree.remember(repo, tip)?;
    let entry = entry_in(bench, worktree);
    let [_, links @ ..] = worktree.links();
    let link = || {
        fs::create_dir_all(&entry)?;
        let named = |(file, content): (PathBuf, Vec<u8>)| {
            let name = file.file_name().expect("each has a name in the entry");
            fs::write(entry.join(name), content)
        };
        links.into_iter().try_for_each(named)
    };
    link().during("link the worktree")
}

/// A worktree's entry in the git directory of a repository in the making.
fn entry_in(project: &Path, worktree: &Worktree) -> PathBuf {
    let git = GitDir::of_project(project);
    git.path().join("worktrees").join(worktree.name())
}

/// Brings a repository that was built on a bench to its scratch folder, if that is another one, and
/// writes its files there and the thread's beside where they belong; all of it at the same time.
fn furnish(bench: &Path, scratch: &Path, commit: Oid, thread: Option<&Worktree>) -> Result<()> {
    let (from, to) = (GitDir::of_project(bench), GitDir::of_project(scratch));
    if bench != scratch {
        fs::create_dir(to.path()).during("make the repository's folder")?;
    }
    let copy = || match bench == scratch {
        true => Ok(()),
        false => files::copy_all(from.path(), to.path()).during("copy the repository"),
    };
    let fill = |folder: &Path| {
        let repo = from.open(bench)?;
        let tree = first_tree(&repo, commit)?;
        Ok::<_, RepositoryError>((checkout::fill(&repo, &tree, folder)?, tree.id()))
    };
    let fill_thread = |worktree: &Worktree| {
        let folder = worktree.begin_partial()?;
        let filled = fill(&folder)?;
        let [(link, content), ..] = worktree.links();
        let link = folder.join(link.file_name().expect("it has a name in the worktree"));
        fs::write(link, content).during("link the worktree")?;
        Ok::<_, RepositoryError>(filled)
    };
    let (copied, project, threads) = std::thread::scope(|scope| {
        let copied = scope.spawn(copy);
        let thread = thread.map(|worktree| scope.spawn(|| fill_thread(worktree)));
        let project = fill(scratch);
        (task::end(copied), project, thread.map(task::end))
    });
    copied?;
    let mut indexes = vec![(to.path().join("index"), project?)];
    if let (Some(worktree), Some(filled)) = (thread, threads) {
        indexes.push((entry_in(scratch, worktree).join("index"), filled?));
    }
    let written = task::side_by_side(&indexes, |(file, (index, tree))| {
        index.write(file, *tree, &BTreeMap::new())
    });
    let mut written = written.into_iter();
    written.try_for_each(|written| written.during("write the index"))
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

fn first_tree(repo: &Repository, commit: Oid) -> Result<git2::Tree<'_>> {
    repo.find_commit(commit)
        .and_then(|commit| commit.tree())
        .during("read the first commit")
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
