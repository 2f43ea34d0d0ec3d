//! All of git: one repository per user, one worktree per thread, one commit per turn.
//!
//! [`UserRepository`] is made once from a [`Source`] and opened from then on; it gives each
//! thread a branch and a [`Worktree`]. Every function blocks (disk, and network in
//! [`UserRepository::create`]): callers run them through `task::blocking` and hold the lease that
//! guards what they change. Nothing is kept open between calls, so handles are plain paths, cheap
//! to clone, and right after a move or a repair.
//!
//! **Invariant:** a repository is opened by a git directory that we know, with a working
//! directory that we set and a configuration that we wrote (see `gitdir`); nothing that the agent
//! leaves in a worktree can point git elsewhere.
//!
//! **Invariant:** nothing here resets, cleans or stashes. The only files ever written into a
//! worktree are those of a first checkout, into a folder that nobody has seen yet, and those that
//! differ between a branch's commit and the next one (`landing`), which never overwrites what is
//! in neither.

mod bring;
mod checkout;
mod commit;
mod diff;
mod draft;
mod files;
mod gate;
mod gitdir;
mod github;
mod guard;
mod index;
mod landing;
mod look;
mod loss;
mod make;
mod merge;
mod message;
mod objects;
mod publish;
mod refs;
mod remote;
mod scan;
mod site;
mod source;
mod spare;
mod stage;
#[cfg(test)]
mod tests;
mod tree;
mod uplink;
mod user;
mod vet;
mod watch;
mod worktree;

use std::{io, sync::Once};

use crate::{
    domain::{Between, Conflict},
    lease::LeaseLost,
};

pub use bring::BroughtFile;
pub use diff::{DiffText, SiteDiff};
pub use draft::{Draft, Snapshot};
pub use github::{GitHub, GitHubRepository, NoPullRequests, PullRequest, PullRequestText};
pub use guard::{Repair, Strangers};
pub use make::{FirstThread, Workshop};
pub use publish::{Destination, Mover, Origin, PublishRequest, Published, PushedBranch, Synced};
pub use remote::{RemoteError, RemoteErrorKind, RemoteUse, Remotes};
pub use site::SiteFiles;
pub use source::{Source, SourceError, TemplateFile, parse_source};
pub use user::{Created, ThreadState, UserRepository};
pub use watch::Watch;
pub use worktree::{CommitRequest, CommitText, Committed, LogEntry, Scope, Worktree};

/// Why something with a repository did not work.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The remote could not be fetched from.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// What lies at an allowed local path could not be fetched from.
    #[error("the local folder holds no git repository that can be read")]
    Local {
        #[source]
        source: git2::Error,
    },
    #[error("the repository is empty; push a first commit to it, then try again")]
    Empty,
    #[error("the repository has no branch \"{branch}\"")]
    NoSuchBranch { branch: String },
    /// There is no single branch that could be the default one.
    #[error("the repository names no default branch; name one as baseBranch")]
    NoDefaultBranch,
    /// `project/` is missing or holds something that is no repository of ours.
    #[error("the workspace holds no repository")]
    Missing,
    /// Something in the git directory was changed in a way that cannot be put right safely.
    #[error("the repository was tampered with: {what}")]
    Tampered { what: String },
    /// A live git command is at work in the thread's worktree; asking again later helps.
    #[error(
        "another git command is at work in this thread's worktree; wait until it is done, then \
         try again"
    )]
    Locked,
    /// Somebody else moved the branch; nothing was committed, and a second try may work.
    #[error("the branch {branch} was moved by somebody else")]
    HeadMoved { branch: String },
    /// A change that does not fit what is there now; nothing of it was applied.
    #[error("the change does not fit what is there now")]
    Conflict {
        /// The branches that were to be merged, if it was that.
        between: Option<Between>,
        files: Vec<Conflict>,
    },
    /// A file that greenroom itself was to write and that must not be committed.
    #[error("{path} cannot be written: {reason}")]
    Unfit { path: String, reason: String },
    /// No commit of this id, or none of this thread.
    #[error("there is no commit {commit} in this thread")]
    NoSuchCommit { commit: String },
    #[error("more than one commit begins with {commit}; give more of its id")]
    AmbiguousCommit { commit: String },
    /// There is nowhere to publish to.
    #[error(
        "this site came from no repository, so there is no origin; publish to \"user\" or \"client\""
    )]
    NoOrigin,
    #[error(
        "a merge or rebase that somebody began in project/ is not finished; finish or abort it, \
         then try again"
    )]
    Unfinished,
    /// Another process may write by now; the branch was not touched.
    #[error(transparent)]
    Lost(#[from] LeaseLost),
    #[error("failed to {operation}")]
    Git {
        operation: &'static str,
        source: git2::Error,
    },
    #[error("failed to {operation}")]
    Disk {
        operation: &'static str,
        source: io::Error,
    },
}

type Result<T, E = RepositoryError> = std::result::Result<T, E>;

/// Names the operation that a lower-level error broke.
trait Operation<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> Operation<T> for std::result::Result<T, git2::Error> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| RepositoryError::Git { operation, source })
    }
}

impl<T> Operation<T> for io::Result<T> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| RepositoryError::Disk { operation, source })
    }
}

/// Sets libgit2 up for the whole process. Takes well under a millisecond; every way into this
/// room calls it, so calling it at the start of the program only moves the cost.
pub fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = set_up() {
            tracing::error!(%error, "libgit2 could not be set up");
        }
    });
}

#[expect(
    unsafe_code,
    reason = "libgit2's global options; set once, before it is used"
)]
fn set_up() -> std::result::Result<(), git2::Error> {
    use git2::{ConfigLevel, ObjectType, opts};
    // SAFETY: these write globals of libgit2 without a lock. `Once` makes this the only writer,
    // and no repository is opened before `init` has returned.
    unsafe {
        // What a person or a system configured for git on this machine must not reach sites.
        for level in [
            ConfigLevel::ProgramData,
            ConfigLevel::System,
            ConfigLevel::XDG,
            ConfigLevel::Global,
        ] {
            opts::set_search_path(level, "")?;
        }
        // The check protects people who walk into a foreign folder. We open paths that we made,
        // by a configuration that we wrote, and with a uid per client they are owned by others.
        opts::set_verify_owner_validation(false)?;
        // The defaults (256 MB of objects, 8 GB of mapped packs) are a workstation's.
        opts::set_cache_max_size(32 << 20)?;
        // A folder of a hundred files is larger than the default (4 KB), and would be read each time.
        opts::set_cache_object_limit(ObjectType::Tree, 256 << 10)?;
        opts::set_mwindow_size(16 << 20)?;
        opts::set_mwindow_mapped_limit(256 << 20)?;
        // Each object that a new one names would be looked for on the disk. We name what we have just
        // read, or written, or are about to write (see `objects`).
        opts::strict_object_creation(false);
    }
    remote::register_transports()
}
