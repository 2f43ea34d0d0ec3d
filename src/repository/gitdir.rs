//! A user's git directory and its worktree entries: opened by known paths, checked before each
//! use, put right where that is safe and refused where it is not.
//!
//! libgit2 runs no hooks, filters or other programs, but it obeys what it reads:
//! `core.worktree`, `url.*.insteadOf`, alternates, a replaced `.git`, symlinked refs. So the
//! configuration is compared with ours and rewritten, the working directory is set by us, links
//! between worktree and git directory are rewritten, and symlinks and alternates are refused.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use git2::{Config, Repository, RepositoryOpenFlags};

use super::{Operation as _, RepositoryError, Result, files};

/// The git directory of one user (`project/.git`).
#[derive(Debug, Clone)]
pub(super) struct GitDir(PathBuf);

impl GitDir {
    pub(super) fn of_project(project: &Path) -> Self {
        Self(project.join(".git"))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Opens it with `workdir` as the working directory.
    pub(super) fn open(&self, workdir: &Path) -> Result<Repository> {
        self.check()?;
        self.open_at(&self.0, workdir)
    }

    /// Opens `admin`, one of its worktree entries, with `workdir` as the working directory.
    pub(super) fn open_worktree(&self, admin: &Path, workdir: &Path) -> Result<Repository> {
        self.check()?;
        refuse_links(
            admin,
            &[
                ".",
                "HEAD",
                "index",
                "commondir",
                "gitdir",
                "logs",
                "logs/HEAD",
                "refs",
            ],
        )?;
        self.open_at(admin, workdir)
    }

    fn open_at(&self, path: &Path, workdir: &Path) -> Result<Repository> {
        super::init();
        // As a bare repository, so that `core.worktree` and `.git` files have no say.
        let flags = RepositoryOpenFlags::NO_SEARCH
            | RepositoryOpenFlags::NO_DOTGIT
            | RepositoryOpenFlags::BARE;
        let open = || -> std::result::Result<_, git2::Error> {
            let repo = Repository::open_ext(path, flags, &[] as &[&Path])?;
            repo.set_config(&Config::open(&self.0.join("config"))?)?;
            repo.set_workdir(workdir, false)?;
            Ok(repo)
        };
        open().during("open the repository")
    }

    /// Checks what libgit2 would obey, and writes the configuration anew if it is not ours.
    fn check(&self) -> Result<()> {
        let dir = &self.0;
        match files::kind_of(dir).during("look at the repository")? {
            None => return Err(RepositoryError::Missing),
            Some(kind) if !kind.is_dir() => return Err(tampered(".git is no folder")),
            Some(_) => {}
        }
        refuse_links(
            dir,
            &[
                "HEAD",
                "config",
                "index",
                "packed-refs",
                "info",
                "info/exclude",
                "objects",
                "objects/info",
                "objects/pack",
                "refs",
                "refs/heads",
                "refs/remotes",
                "logs",
                "logs/refs",
                "logs/refs/heads",
                "worktrees",
            ],
        )?;
        for (file, what) in [
            (
                "objects/info/alternates",
                "it borrows objects from another repository",
            ),
            ("commondir", "it points to another git directory"),
            ("info/grafts", "its history is rewritten by grafts"),
        ] {
            if files::kind_of(&dir.join(file))
                .during("look at the repository")?
                .is_some()
            {
                return Err(tampered(what));
            }
        }
        let config = dir.join("config");
        let present = fs::read_to_string(&config).unwrap_or_default();
        let expected = render_config(origin_in(&present).as_deref());
        if present != expected {
            tracing::warn!("the configuration of a repository was changed; put right");
            files::put(&config, expected.as_bytes()).during("write the configuration")?;
        }
        Ok(())
    }

    /// Refuses a branch whose files in the git directory lead out through a symlink: libgit2
    /// would write to where they point.
    pub(super) fn check_branch(&self, branch: &str) -> Result<()> {
        self.check_reference(&format!("refs/heads/{branch}"))
    }

    /// The same for any reference, by its full name.
    pub(super) fn check_reference(&self, reference: &str) -> Result<()> {
        let mut names = Vec::new();
        for base in ["", "logs/"] {
            let ends = reference.match_indices('/').map(|(at, _)| at);
            names.extend(ends.map(|at| format!("{base}{}", &reference[..at])));
            names.push(format!("{base}{reference}"));
        }
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        refuse_links(&self.0, &names)
    }
}

fn tampered(what: impl Into<String>) -> RepositoryError {
    RepositoryError::Tampered { what: what.into() }
}

fn refuse_links(dir: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        let kind = files::kind_of(&dir.join(name)).during("look at the repository")?;
        if kind.is_some_and(|kind| kind.is_symlink()) {
            return Err(tampered(format!("{name} is a symlink")));
        }
    }
    Ok(())
}

const CONFIG: &str = "\
# Written by greenroom, which puts it back as it is: what stands here steers git.
[core]
\trepositoryformatversion = 0
\tbare = false
\tfilemode = true
\tsymlinks = true
\tlogallrefupdates = true
\tautocrlf = false
\tprotectNTFS = true
\tprotectHFS = true
[gc]
\tauto = 0
\tworktreePruneExpire = never
";

/// The whole configuration of a repository that came from `origin`.
pub(super) fn render_config(origin: Option<&str>) -> String {
    let mut config = CONFIG.to_owned();
    if let Some(origin) = origin.filter(|origin| is_plain_origin(origin)) {
        config.push_str(&format!(
            "[remote \"origin\"]\n\turl = \"{origin}\"\n\
             \tfetch = +refs/heads/*:refs/remotes/origin/*\n"
        ));
    }
    config
}

/// The origin that [`render_config`] wrote. Only kept for people who use git in the project:
/// network operations take the address from the caller.
fn origin_in(config: &str) -> Option<String> {
    let origin = config
        .lines()
        .find_map(|line| line.strip_prefix("\turl = \"")?.strip_suffix('"'));
    origin
        .filter(|origin| is_plain_origin(origin))
        .map(str::to_owned)
}

fn is_plain_origin(origin: &str) -> bool {
    (origin.starts_with("https://") && !origin.contains('@') || origin.starts_with('/'))
        && !origin.contains(['"', '\\'])
        && !origin.chars().any(char::is_control)
}

/// How long a lock is watched before its owner counts as dead.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_OLD: Duration = Duration::from_secs(60);

/// Removes a lock file whose owner died. The caller holds the lease, so nobody else of ours
/// writes; a person's git command holds a lock for moments.
///
/// A lock is dead if it is a minute old, or does not change while it is watched (which needs no
/// agreement of clocks).
pub(super) fn clear_dead_lock(lock: &Path) -> Result<()> {
    let modified = || fs::symlink_metadata(lock).and_then(|m| m.modified()).ok();
    let Some(first) = modified() else {
        return Ok(());
    };
    let is_old = SystemTime::now()
        .duration_since(first)
        .is_ok_and(|age| age > LOCK_OLD);
    let deadline = Instant::now() + LOCK_PATIENCE;
    while !is_old && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        if modified() != Some(first) {
            return Ok(());
        }
    }
    tracing::warn!(lock = ?lock.file_name(), "removed a lock that a dead process left behind");
    files::remove_all(lock).during("remove a dead lock")
}
