//! A user's git directory and its worktree entries: opened by known paths, checked before each
//! use, put right where that is safe and refused where it is not.
//!
//! libgit2 runs no hooks, filters or other programs, but it obeys what it reads:
//! `core.worktree`, `url.*.insteadOf`, alternates, a replaced `.git`, symlinked refs. So the
//! configuration is compared with ours and rewritten, the working directory is set by us, links
//! between worktree and git directory are rewritten, what bends history or contents is set aside,
//! and symlinks and alternates are refused.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use git2::{Config, Repository, RepositoryOpenFlags};

use super::{
    Operation as _, RepositoryError, Result, files,
    look::{Look, Memory, Wanted},
};
use crate::task;

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
        self.check(&self.look(Vec::new(), &Memory::default()))?;
        self.open_at(&self.0, workdir)
    }

    /// Opens `admin`, one of its worktree entries, with `workdir` as the working directory.
    pub(super) fn open_worktree(&self, admin: &Path, workdir: &Path) -> Result<Repository> {
        let folders = [admin.to_owned(), admin.join("logs")].map(Wanted::Folder);
        let look = self.look(folders.into(), &Memory::default());
        self.check(&look)?;
        self.check_entry(&look, admin)?;
        self.open_at(admin, workdir)
    }

    /// Refuses a worktree entry that leads elsewhere.
    pub(super) fn check_entry(&self, look: &Look, admin: &Path) -> Result<()> {
        refuse_link(look, admin)?;
        for name in [
            "HEAD",
            "index",
            "commondir",
            "gitdir",
            "logs",
            "logs/HEAD",
            "refs",
            "set-aside",
        ] {
            refuse_link(look, &admin.join(name))?;
        }
        Ok(())
    }

    /// Opens `admin` without a look: what leads there was just seen to be right.
    pub(super) fn open_seen(&self, admin: &Path, workdir: &Path) -> Result<Repository> {
        self.open_at(admin, workdir)
    }

    /// Looks at all that steers libgit2 here, and at what else is wanted. What `memory` holds of folders
    /// that stand as they did is not listed again.
    pub(super) fn look(&self, mut wanted: Vec<Wanted>, memory: &Memory) -> Look {
        const FOLDERS: [&str; 14] = [
            "",
            "info",
            "objects",
            "objects/info",
            "objects/pack",
            "refs",
            "refs/heads",
            "refs/remotes",
            "refs/greenroom",
            "refs/greenroom/heads",
            "logs",
            "logs/refs",
            "logs/refs/heads",
            "worktrees",
        ];
        wanted.extend(FOLDERS.map(|name| Wanted::Folder(self.0.join(name))));
        wanted.extend(["config", "info/exclude"].map(|name| Wanted::File(self.0.join(name))));
        wanted.push(Wanted::Kind(self.0.clone()));
        wanted.sort_unstable();
        wanted.dedup();
        let mut look = Look::default();
        look.take(&wanted, memory);
        // All references, however deep: those of folders that nobody asked for level by level.
        loop {
            let deeper = look.unseen_below(&self.0.join("refs"));
            if deeper.is_empty() {
                return look;
            }
            let deeper: Vec<_> = deeper.into_iter().map(Wanted::Folder).collect();
            look.take(&deeper, memory);
        }
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
    pub(super) fn check(&self, look: &Look) -> Result<()> {
        const WHAT: &str = "look at the repository";
        let dir = &self.0;
        match look.kind_of(dir).during(WHAT)? {
            None => return Err(RepositoryError::Missing),
            Some(kind) if !kind.is_dir() => return Err(tampered(".git is no folder")),
            Some(_) => {}
        }
        for name in [
            "HEAD",
            "config",
            "index",
            "packed-refs",
            "info",
            "info/exclude",
            "objects",
            "refs",
            "logs",
            "logs/refs",
            "logs/refs/heads",
            "worktrees",
        ] {
            refuse_link(look, &dir.join(name))?;
        }
        // Links, pipes and the like among the objects and references, wherever they are: an object
        // would be read from, or written to, another place, and a pipe is waited for.
        let refs = dir.join("refs");
        for (folder, listing) in look.folders() {
            let objects = ["objects", "objects/info", "objects/pack"];
            let is_of_objects = || objects.iter().any(|name| *folder == dir.join(name));
            if !folder.starts_with(&refs) && !is_of_objects() {
                continue;
            }
            for (name, kind) in listing.during(WHAT)? {
                if !kind.is_file() && !kind.is_dir() {
                    let path = folder.join(name);
                    let path = path.strip_prefix(dir).unwrap_or(&path);
                    return Err(strange(&path.to_string_lossy(), *kind));
                }
            }
        }
        for (file, what) in [
            (
                "objects/info/alternates",
                "it borrows objects from another repository",
            ),
            ("commondir", "it points to another git directory"),
        ] {
            if look.kind_of(&dir.join(file)).during(WHAT)?.is_some() {
                return Err(tampered(what));
            }
        }
        for file in BENDING {
            if look.kind_of(&dir.join(file)).during(WHAT)?.is_some() {
                let aside = dir.join(format!("{file}.{}", uuid::Uuid::now_v7().simple()));
                tracing::warn!(file, "what steers git was found in a repository; set aside");
                fs::rename(dir.join(file), aside).during("set aside what steers git")?;
            }
        }
        let config = dir.join("config");
        let present = look.text_of(&config).unwrap_or_default();
        let expected = render_config(origin_in(present).as_deref());
        if present != expected {
            tracing::warn!("the configuration of a repository was changed; put right");
            files::put(&config, expected.as_bytes()).during("write the configuration")?;
        }
        if look.text_of(&dir.join("info/exclude")) == Some(EXCLUDE) {
            return Ok(());
        }
        let exclude = || {
            fs::create_dir_all(dir.join("info"))?;
            files::put(&dir.join("info/exclude"), EXCLUDE.as_bytes())
        };
        exclude().during("write the exclusions")
    }

    /// Would [`check`](Self::check) leave everything as it is?
    pub(super) fn is_right(&self, look: &Look) -> bool {
        let has = |file: &str| !matches!(look.kind_of(&self.0.join(file)), Ok(None));
        let config = look.text_of(&self.0.join("config"));
        let is_ours = |text: &str| text == render_config(origin_in(text).as_deref());
        !BENDING.iter().any(|file| has(file))
            && config.is_some_and(is_ours)
            && look.text_of(&self.0.join("info/exclude")) == Some(EXCLUDE)
            && self.check(look).is_ok()
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
        let kinds = task::side_by_side(&names, |name| files::kind_of(&self.0.join(name)));
        for (name, kind) in names.iter().zip(kinds) {
            match kind.during("look at the repository")? {
                Some(kind) if !kind.is_file() && !kind.is_dir() => return Err(strange(name, kind)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn refuse_link(look: &Look, path: &Path) -> Result<()> {
    match look.kind_of(path).during("look at the repository")? {
        Some(kind) if !kind.is_file() && !kind.is_dir() => {
            let name = path.file_name().unwrap_or_default();
            Err(strange(&name.to_string_lossy(), kind))
        }
        _ => Ok(()),
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
