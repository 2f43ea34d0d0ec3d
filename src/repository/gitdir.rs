//! A user's git directory and its worktree entries: opened by known paths, checked before each
//! use, put right where that is safe and refused where it is not.
//!
//! libgit2 runs no hooks, filters or other programs, but it obeys what it reads:
//! `core.worktree`, `url.*.insteadOf`, alternates, a replaced `.git`, symlinked refs. So the
//! configuration is compared with ours and rewritten, the working directory is set by us, links
//! between worktree and git directory are rewritten, what bends history or contents is set aside,
//! and symlinks and alternates are refused.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
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

    /// The folder that it stands in, whose files are those of the user's branch.
    pub(super) fn project(&self) -> &Path {
        self.0.parent().expect("it is made from its project's path")
    }

    /// Opens it with `workdir` as the working directory.
    pub(super) fn open(&self, workdir: &Path) -> Result<Repository> {
        self.check()?;
        self.check_below()?;
        self.open_at(&self.0, workdir)
    }

    /// Opens `admin`, one of its worktree entries, with `workdir` as the working directory.
    pub(super) fn open_worktree(&self, admin: &Path, workdir: &Path) -> Result<Repository> {
        self.check()?;
        self.check_entry(admin)?;
        self.open_at(admin, workdir)
    }

    /// Refuses a worktree entry that leads elsewhere.
    pub(super) fn check_entry(&self, admin: &Path) -> Result<()> {
        // (With a `.` at its end a path is looked at through a link.)
        let name = admin.strip_prefix(&self.0).unwrap_or(admin);
        refuse_links(&self.0, &[&name.to_string_lossy()])?;
        refuse_links(
            admin,
            &[
                "HEAD",
                "index",
                "commondir",
                "gitdir",
                "logs",
                "logs/HEAD",
                "refs",
                "set-aside",
            ],
        )
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
                "refs/greenroom",
                "refs/greenroom/heads",
                "refs/greenroom/rescued",
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
        ] {
            if self.has(file)? {
                return Err(tampered(what));
            }
        }
        for file in BENDING {
            if self.has(file)? {
                let aside = dir.join(format!("{file}.{}", uuid::Uuid::now_v7().simple()));
                tracing::warn!(file, "what steers git was found in a repository; set aside");
                fs::rename(dir.join(file), aside).during("set aside what steers git")?;
            }
        }
        let config = dir.join("config");
        let present = fs::read_to_string(&config).unwrap_or_default();
        let expected = render_config(origin_in(&present).as_deref());
        if present != expected {
            tracing::warn!("the configuration of a repository was changed; put right");
            files::put(&config, expected.as_bytes()).during("write the configuration")?;
        }
        let exclude = || {
            fs::create_dir_all(dir.join("info"))?;
            files::put(&dir.join("info/exclude"), EXCLUDE.as_bytes())
        };
        exclude().during("write the exclusions")
    }

    fn has(&self, file: &str) -> Result<bool> {
        let found = files::kind_of(&self.0.join(file)).during("look at the repository")?;
        Ok(found.is_some())
    }

    /// Refuses links, pipes and the like among the objects and references, wherever they are: an
    /// object would be read from, or written to, another place, and a pipe is waited for.
    fn check_below(&self) -> Result<()> {
        let mut folders: Vec<_> = ["objects", "objects/info", "objects/pack"]
            .map(|name| (PathBuf::from(name), false))
            .into();
        folders.push(("refs".into(), true));
        while let Some((folder, is_deep)) = folders.pop() {
            let entries = match fs::read_dir(self.0.join(&folder)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.during("look at the repository")?,
            };
            for entry in entries {
                let entry = entry.during("look at the repository")?;
                let path = folder.join(entry.file_name());
                match entry.file_type().during("look at the repository")? {
                    kind if kind.is_dir() && is_deep => folders.push((path, true)),
                    kind if kind.is_dir() || kind.is_file() => {}
                    kind => return Err(strange(&path.to_string_lossy(), kind)),
                }
            }
        }
        Ok(())
    }

    /// Refuses a branch whose files in the git directory lead out through a symlink: libgit2
    /// would write to where they point.
    pub(super) fn check_branch(&self, branch: &str) -> Result<()> {
        self.check_reference(&format!("refs/heads/{branch}"))?;
        self.check_reference(&format!("refs/greenroom/heads/{branch}"))
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

/// Of a symlink, or of a pipe and the like: reading that would wait for ever.
fn strange(name: &str, kind: fs::FileType) -> RepositoryError {
    let is = match kind.is_symlink() {
        true => "is a symlink",
        false => "is no file",
    };
    tampered(format!("{} {is}", super::message::one_line(name, 200)))
}

fn refuse_links(dir: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        match files::kind_of(&dir.join(name)).during("look at the repository")? {
            Some(kind) if !kind.is_file() && !kind.is_dir() => return Err(strange(name, kind)),
            _ => {}
        }
    }
    Ok(())
}

/// Files by which git (and libgit2) sees another history, other contents or fewer files than there
/// are. Ours has none of them.
const BENDING: [&str; 4] = [
    "info/attributes",
    "info/grafts",
    "info/sparse-checkout",
    "shallow",
];

/// The whole of `info/exclude`, for all threads: what greenroom itself puts into worktrees, so that
/// installing a site's dependencies shows nowhere in git. (`node_modules/` in a site's `.gitignore`
/// does not match a symlink, and a new tree of packages has a name of its own until it is complete.)
const EXCLUDE: &str = "\
# Written by greenroom, which puts it back as it is.
/node_modules
/.node_modules-*
";

/// Hooks and replaced objects are the git program's alone: whoever uses that here shall see what we
/// see, and start nothing.
const CONFIG: &str = "\
# Written by greenroom, which puts it back as it is: what stands here steers git.
[core]
\trepositoryformatversion = 0
\tbare = false
\tfilemode = true
\tsymlinks = true
\tlogallrefupdates = true
\thooksPath = /dev/null
\tuseReplaceRefs = false
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

/// Removes a lock file whose owner died; `true` if there was one. The caller holds the lease, so
/// nobody else of ours writes; a person's git command holds a lock for moments, or as long as its
/// editor is open.
///
/// A lock is dead if no process that can be seen here holds it, and it is a minute old or does not
/// change while it is watched (which needs no agreement of clocks).
///
/// # Errors
/// [`RepositoryError::Locked`] if it is alive.
pub(super) fn clear_lock(lock: &Path, worktree: &Path) -> Result<bool> {
    let look = || fs::symlink_metadata(lock).ok();
    let state = |found: &fs::Metadata| (found.ino(), found.len(), found.modified().ok());
    let Some(first) = look() else {
        return Ok(false);
    };
    let age = first.modified().ok().and_then(|at| at.elapsed().ok());
    let is_old = age.is_some_and(|age| age > LOCK_OLD);
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut is_alive = is_held(lock, worktree);
    while (!is_old || is_alive) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        match look() {
            None => return Ok(false),
            Some(now) => is_alive = state(&now) != state(&first) || is_held(lock, worktree),
        }
    }
    if is_alive {
        return Err(RepositoryError::Locked);
    }
    files::remove_all(lock).during("remove a dead lock")?;
    Ok(true)
}

/// Does a process that we can see have this lock open, or is a git command at work in the
/// worktree? (One that waits for its editor has closed its lock.)
fn is_held(lock: &Path, worktree: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .map(|process| process.path())
        .filter(|process| process.join("fd").is_dir())
        .any(|process| {
            let is_git = || fs::read(process.join("comm")).is_ok_and(|name| name == b"git\n");
            let works_there = || {
                fs::read_link(process.join("cwd")).is_ok_and(|folder| folder.starts_with(worktree))
            };
            let mut open = fs::read_dir(process.join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            is_git() && works_there()
                || open.any(|file| fs::read_link(file.path()).is_ok_and(|target| target == lock))
        })
}
