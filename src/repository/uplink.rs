//! The way to a user's origin and back, past everything that the user's repository says.
//!
//! An [`Uplink`] is a bare git directory of our own, made for one operation: its configuration is
//! ours alone, and it borrows the user's objects as an alternate. So no `insteadOf`, `pushurl`,
//! proxy, helper or command that somebody planted in `project/.git` is ever read while a token is
//! at hand. What is fetched is moved into the user's repository as whole packs; refs are the
//! caller's business.
//!
//! **Invariant:** nothing here forces anything on the origin.

use std::{
    cell::RefCell,
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use git2::{
    AutotagOption, Config, Direction, ErrorCode, FetchOptions, Oid, PushOptions, RemoteHead,
    Repository, RepositoryInitOptions, RepositoryOpenFlags,
};

use super::{
    Operation as _, RemoteError, RemoteErrorKind, RemoteUse, Remotes, Result, Source, files,
    gitdir::GitDir,
    remote::{Link, words},
    vet,
};

const CONFIG: &str = "\
# Written by greenroom for one fetch or push.
[core]
\trepositoryformatversion = 0
\tbare = true
\tlogallrefupdates = false
";

/// Waits before another try at a network that failed.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// Most of what a server says beside its answer that is kept, in bytes.
const MAX_SAID: usize = 4096;

/// See the module.
pub(super) struct Uplink<'a> {
    repo: Repository,
    /// Of this operation alone: one that is stuck must not touch its successor's.
    place: PathBuf,
    git: &'a GitDir,
    origin: &'a Source,
    remotes: &'a Remotes,
    /// A commit of the user's, whose files were looked at before.
    known: Option<Oid>,
    /// No further try begins after it.
    deadline: Instant,
}

/// Where the origin's branches stand. The commits are in the user's repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Upstream {
    /// The client's branch; `None`: the origin has none.
    pub(super) client: Option<Oid>,
    /// The branch that the client's work goes to in the end, and its commit.
    pub(super) base: Option<(String, Oid)>,
}

/// How a push ended that the origin did not refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    Done,
    /// The origin's branch was there already.
    UpToDate,
    /// The origin's branch has commits that ours has not; nothing was changed.
    Behind,
}

impl<'a> Uplink<'a> {
    /// Makes the git directory below `folder` (what is there is removed). `have` are commits of the
    /// user's repository that the origin may know: what they lead to is not fetched again; the first
    /// is one whose files are fine.
    pub(super) fn open(
        folder: &Path,
        git: &'a GitDir,
        origin: &'a Source,
        remotes: &'a Remotes,
        have: &[Oid],
        deadline: Instant,
    ) -> Result<Self> {
        super::init();
        files::remove_all(folder).during("remove the leftovers of an earlier operation")?;
        let place = folder.join(uuid::Uuid::new_v4().simple().to_string());
        fs::create_dir_all(&place).during("make an isolated git directory")?;
        let mut options = RepositoryInitOptions::new();
        options
            .bare(true)
            .no_reinit(true)
            .external_template(false)
            .initial_head("none");
        Repository::init_opts(&place, &options).during("make an isolated git directory")?;
        let write = || -> io::Result<()> {
            files::put(&place.join("config"), CONFIG.as_bytes())?;
            let mut alternates = git.path().join("objects").as_os_str().as_bytes().to_vec();
            alternates.push(b'\n');
            fs::create_dir_all(place.join("objects/info"))?;
            files::put(&place.join("objects/info/alternates"), &alternates)
        };
        write().during("make an isolated git directory")?;
        let open = || -> Result<_, git2::Error> {
            let flags = RepositoryOpenFlags::NO_SEARCH
                | RepositoryOpenFlags::NO_DOTGIT
                | RepositoryOpenFlags::BARE;
            let repo = Repository::open_ext(&place, flags, &[] as &[&Path])?;
            repo.set_config(&Config::open(&place.join("config"))?)?;
            for (at, id) in have.iter().enumerate() {
                repo.reference(&format!("refs/have/{at}"), *id, true, "")?;
            }
            Ok(repo)
        };
        Ok(Self {
            repo: open().during("open an isolated git directory")?,
            place,
            git,
            origin,
            remotes,
            known: have.first().copied(),
            deadline,
        })
    }

    /// Brings the client's branch and the base branch (`base_branch`, where the origin has one of
    /// that name, else its default one) into the user's repository, unless their files cannot be
    /// had (see `vet`).
    pub(super) fn fetch(&self, client_branch: &str, base_branch: Option<&str>) -> Result<Upstream> {
        let upstream = self.persistently(|| {
            self.session(RemoteUse::Fetch, |link| {
                let mut remote = self.repo.remote_anonymous(link.url)?;
                let mut connection =
                    remote.connect_auth(Direction::Fetch, Some(link.callbacks()), None)?;
                let default = connection.default_branch().ok();
                let default = default
                    .as_ref()
                    .and_then(|name| name.as_str().ok()?.strip_prefix("refs/heads/"));
                let heads = connection.list()?;
                let base = [base_branch, default]
                    .into_iter()
                    .flatten()
                    .find_map(|name| Some((name.to_owned(), tip_in(heads, name)?)));
                let client = tip_in(heads, client_branch);
                let names = base.iter().map(|(name, _)| name.as_str());
                let wanted: Vec<_> = client
                    .map(|_| client_branch)
                    .into_iter()
                    .chain(names)
                    .map(|name| format!("+refs/heads/{name}:refs/fetched/{name}"))
                    .collect();
                if !wanted.is_empty() {
                    let mut options = FetchOptions::new();
                    options
                        .remote_callbacks(link.callbacks())
                        .download_tags(AutotagOption::None);
                    connection.remote().download(&wanted, Some(&mut options))?;
                }
                for tip in client.iter().chain(base.iter().map(|(_, tip)| tip)) {
                    self.repo.find_commit(*tip)?;
                }
                Ok(Upstream { client, base })
            })
        })?;
        let tips = upstream.base.iter().map(|(_, tip)| tip);
        for tip in upstream.client.iter().chain(tips) {
            let judged = vet::check(&self.repo, *tip, self.known);
            judged.map_err(|unfit| unfit.during(RemoteUse::Fetch))?;
        }
        self.hand_over().during("keep what was fetched")?;
        Ok(upstream)
    }

    /// Moves the origin's `branch` to `commit`, if that only adds to it.
    pub(super) fn push(&self, branch: &str, commit: Oid) -> Result<Pushed, RemoteError> {
        self.persistently(|| match self.origin {
            Source::Local(path) => self.push_locally(path, branch, commit),
            _ => self.push_once(branch, commit),
        })
    }

    fn push_once(&self, branch: &str, commit: Oid) -> Result<Pushed, RemoteError> {
        let (seen, attempt) = self.session(RemoteUse::Push, |link| {
            let mut remote = self.repo.remote_anonymous(link.url)?;
            let mut connection =
                remote.connect_auth(Direction::Push, Some(link.callbacks()), None)?;
            let seen = tip_in(connection.list()?, branch);
            if seen == Some(commit) {
                return Ok((seen, Ok(Pushed::UpToDate)));
            }
            let said = RefCell::new(Vec::new());
            let refused = RefCell::new(None);
            let mut callbacks = link.callbacks();
            callbacks
                .sideband_progress(|bytes| {
                    let mut said = said.borrow_mut();
                    let room = MAX_SAID.saturating_sub(said.len());
                    said.extend_from_slice(&bytes[..bytes.len().min(room)]);
                    true
                })
                .push_update_reference(|_, status| {
                    *refused.borrow_mut() = status.map(str::to_owned);
                    Ok(())
                });
            let mut options = PushOptions::new();
            options.remote_callbacks(callbacks);
            let spec = format!("{commit}:refs/heads/{branch}");
            let outcome = connection.remote().push(&[spec], Some(&mut options));
            drop(options);
            let refused = refused.take();
            match outcome {
                Ok(()) if refused.is_none() => return Ok((seen, Ok(Pushed::Done))),
                Err(error) if error.code() == ErrorCode::NotFastForward => {
                    return Ok((seen, Ok(Pushed::Behind)));
                }
                // The server has our objects and an opinion of them, or could not keep them.
                Err(error) if refused.is_none() && !error.message().starts_with("unpack") => {
                    return Err(error);
                }
                Ok(()) | Err(_) => {}
            }
            let said = String::from_utf8_lossy(&said.take()).into_owned();
            let why = format!("{} {said}", refused.unwrap_or_default());
            Ok((seen, Err(why)))
        })?;
        let why = match attempt {
            Ok(pushed) => return Ok(pushed),
            Err(why) => why,
        };
        // Somebody else's push came between the listing and ours: the words for that differ from
        // server to server, the branch does not lie.
        let now = self.session(RemoteUse::Fetch, |link| {
            let mut remote = self.repo.remote_anonymous(link.url)?;
            let connection = remote.connect_auth(Direction::Fetch, Some(link.callbacks()), None)?;
            Ok(tip_in(connection.list()?, branch))
        })?;
        if now == Some(commit) {
            return Ok(Pushed::Done);
        }
        if now.is_some() && now != seen {
            return Ok(Pushed::Behind);
        }
        let why = words(&why, self.remotes.secret());
        Err(self.refusal(format!("{} refuses the push: {why}", self.host())))
    }

    /// As git's own push does it, without its hooks: libgit2's moves the branch by force.
    fn push_locally(&self, path: &Path, branch: &str, commit: Oid) -> Result<Pushed, RemoteError> {
        let push = || -> Result<Pushed, git2::Error> {
            let there = Repository::open(path)?;
            let name = format!("refs/heads/{branch}");
            let seen = match there.refname_to_id(&name) {
                Ok(id) => Some(id),
                Err(error) if error.code() == ErrorCode::NotFound => None,
                Err(error) => return Err(error),
            };
            match seen {
                Some(seen) if seen == commit => return Ok(Pushed::UpToDate),
                Some(seen) if !self.is_ours(seen, commit)? => return Ok(Pushed::Behind),
                _ => {}
            }
            if !there.is_bare()
                && there
                    .head()
                    .is_ok_and(|head| head.name() == Ok(name.as_str()))
            {
                return Err(git2::Error::from_str("the branch is checked out there"));
            }
            let mut walk = self.repo.revwalk()?;
            walk.push(commit)?;
            for reference in there.references()?.flatten() {
                if let Some(known) = reference.target()
                    && self.repo.find_commit(known).is_ok()
                {
                    walk.hide(known)?;
                }
            }
            let mut pack = self.repo.packbuilder()?;
            pack.insert_walk(&mut walk)?;
            if pack.object_count() > 0 {
                let odb = there.odb()?;
                let mut writer = odb.packwriter()?;
                let mut written = Ok(());
                pack.foreach(|bytes| {
                    written = writer.write_all(bytes);
                    written.is_ok()
                })?;
                written.map_err(|error| git2::Error::from_str(&error.to_string()))?;
                writer.commit()?;
            }
            let moved = match seen {
                Some(seen) => there.reference_matching(&name, commit, true, seen, "push"),
                None => there.reference(&name, commit, false, "push"),
            };
            match moved.map(drop) {
                Ok(()) => Ok(Pushed::Done),
                Err(error) => match error.code() {
                    ErrorCode::Modified | ErrorCode::Exists | ErrorCode::Locked => {
                        Ok(Pushed::Behind)
                    }
                    _ => Err(error),
                },
            }
        };
        push().map_err(|error| {
            let why = words(error.message(), None);
            self.refusal(format!("the local repository refuses the push: {why}"))
        })
    }

    /// Is `old` part of `new`'s history here?
    fn is_ours(&self, old: Oid, new: Oid) -> Result<bool, git2::Error> {
        Ok(self.repo.find_commit(old).is_ok() && self.repo.graph_descendant_of(new, old)?)
    }

    fn refusal(&self, message: String) -> RemoteError {
        RemoteError {
            during: RemoteUse::Push,
            kind: RemoteErrorKind::Rejected,
            message,
        }
    }

    fn host(&self) -> &str {
        match self.origin {
            Source::Remote(url) => url.host_str().unwrap_or("the server"),
            Source::Local(_) | Source::Template(_) => "the local repository",
        }
    }

    fn session<T>(
        &self,
        during: RemoteUse,
        work: impl FnOnce(&Link<'_>) -> Result<T, git2::Error>,
    ) -> Result<T, RemoteError> {
        let refused = |message: &str| RemoteError {
            during,
            kind: RemoteErrorKind::Rejected,
            message: message.to_owned(),
        };
        match self.origin {
            Source::Remote(url) => self.remotes.session(url, during, work),
            Source::Local(path) => work(&Link::local(&path.to_string_lossy())).map_err(|error| {
                tracing::warn!(%error, "a local repository could not be used");
                refused("the local folder holds no git repository that can be read")
            }),
            Source::Template(_) => Err(refused("the site has no repository that it came from")),
        }
    }

    /// Tries again where the network failed.
    fn persistently<T>(
        &self,
        mut work: impl FnMut() -> Result<T, RemoteError>,
    ) -> Result<T, RemoteError> {
        for pause in PAUSES {
            match work() {
                Err(error)
                    if error.kind == RemoteErrorKind::Network
                        && Instant::now() + pause < self.deadline =>
                {
                    tracing::warn!(%error, "the network failed; another try follows");
                    std::thread::sleep(pause);
                }
                outcome => return outcome,
            }
        }
        work()
    }

    /// Moves fetched packs to the user's: the pack first, so that no index is without one.
    fn hand_over(&self) -> io::Result<()> {
        let (from, to) = (
            self.place.join("objects/pack"),
            self.git.path().join("objects/pack"),
        );
        fs::create_dir_all(&to)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&from)? {
            let name = entry?.file_name();
            // What a try that failed had begun stays behind.
            if ["pack", "idx"].map(Some).contains(&extension(&name)) {
                names.push(name);
            }
        }
        names.sort_by_key(|name| extension(name) != Some("pack"));
        for name in names {
            fs::rename(from.join(&name), to.join(&name))?;
        }
        Ok(())
    }
}

impl Drop for Uplink<'_> {
    fn drop(&mut self) {
        if let Err(error) = files::remove_all(&self.place) {
            tracing::warn!(%error, "an isolated git directory could not be removed");
        }
        // Unless another one is in it by now.
        self.place.parent().map(fs::remove_dir);
    }
}

fn extension(name: &OsStr) -> Option<&str> {
    Path::new(name).extension()?.to_str()
}

fn tip_in(heads: &[RemoteHead<'_>], branch: &str) -> Option<Oid> {
    let head = heads
        .iter()
        .find(|head| head.name().strip_prefix("refs/heads/") == Some(branch))?;
    Some(head.oid())
}

#[cfg(test)]
mod tests;
