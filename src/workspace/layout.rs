//! Where things lie. Three roots: the workspace (slow, shared, kept), the cache (local, can be
//! lost) and the runtime folder (private, of this process).

use std::path::{Path, PathBuf};

use crate::identity::{ThreadKey, TurnId, UserKey};

/// The folders of one user of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserPaths {
    root: PathBuf,
}

impl UserPaths {
    /// Below the workspace's root.
    pub fn new(workspace: &Path, key: &UserKey) -> Self {
        Self {
            root: workspace.join(key.client.as_str()).join(key.user.as_str()),
        }
    }

    /// `{workspace}/{client}/{user}`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The user's one repository.
    pub fn project(&self) -> PathBuf {
        self.root.join("project")
    }

    /// Contexts and CLI sessions.
    pub fn claude(&self) -> PathBuf {
        self.root.join(".claude")
    }

    /// The supervisor's own state.
    pub fn state(&self) -> PathBuf {
        self.root.join(".greenroom")
    }

    /// Half-made things; on the same file system, so that they can be renamed into place.
    pub fn scratch(&self) -> PathBuf {
        self.state().join("scratch")
    }

    /// For isolated git directories, each of one fetch or push.
    pub fn uplink(&self) -> PathBuf {
        self.state().join("uplink")
    }

    /// Copies of what is held back of edits in `project/`.
    pub fn held_outside(&self) -> PathBuf {
        self.state().join("held").join("outside")
    }

    /// Who may change what all threads of the user share.
    pub fn lease(&self) -> PathBuf {
        self.state().join("lease")
    }

    /// Installed dependencies, packed for other containers.
    pub fn dependency_archives(&self) -> PathBuf {
        self.state().join("dependencies")
    }

    /// Created, last accessed, repository.
    pub fn metadata(&self) -> PathBuf {
        self.root.join("metadata.json")
    }
}

/// The folders and files of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadPaths {
    /// Those of its user.
    pub user: UserPaths,
    thread: String,
}

impl ThreadPaths {
    /// Below the workspace's root.
    pub fn new(workspace: &Path, key: &ThreadKey) -> Self {
        Self {
            user: UserPaths::new(workspace, &key.user_key()),
            thread: key.thread.as_str().to_owned(),
        }
    }

    /// Where the agent edits and the dev server runs.
    pub fn worktree(&self) -> PathBuf {
        self.user.root.join("threads").join(&self.thread)
    }

    /// History, plans, session.
    pub fn context(&self) -> PathBuf {
        self.user
            .claude()
            .join("threads")
            .join(format!("{}.json", self.thread))
    }

    /// `CLAUDE_CONFIG_DIR` of the thread's CLI.
    pub fn session(&self) -> PathBuf {
        self.user.claude().join("sessions").join(&self.thread)
    }

    /// The supervisor's own state of this thread.
    pub fn state(&self) -> PathBuf {
        self.user.state().join("threads").join(&self.thread)
    }

    /// Who may write to the thread.
    pub fn lease(&self) -> PathBuf {
        self.state().join("lease")
    }

    /// Slug and port, stored at the first init.
    pub fn preview_place(&self) -> PathBuf {
        self.state().join("preview.json")
    }

    /// Journals of the thread's turns, one file each.
    pub fn turns(&self) -> PathBuf {
        self.state().join("turns")
    }

    /// One empty file for each turn that has no outcome yet.
    pub fn open_turns(&self) -> PathBuf {
        self.state().join("open")
    }

    /// Which turn an idempotency key stands for.
    pub fn idempotency(&self) -> PathBuf {
        self.state().join("idempotency")
    }

    /// The same of edits that no turn made.
    pub fn held_outside(&self) -> PathBuf {
        self.user
            .state()
            .join("held")
            .join(format!("outside~{}", self.thread))
    }

    /// Copies of what a turn's commit left out.
    pub fn held(&self, turn: &TurnId) -> PathBuf {
        self.user.state().join("held").join(turn.to_string())
    }
}

/// The container's own disk: what is here can be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Below `CACHE_PATH`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Dependencies and package-manager caches of one user: never shared between tenants, since
    /// hard-linked files can be written from inside a worktree.
    pub fn user(&self, key: &UserKey) -> PathBuf {
        self.root.join(key.client.as_str()).join(key.user.as_str())
    }

    /// For something half made, of this call alone; no program of anybody's may come here. (No client's
    /// name begins with a dot.)
    pub fn scratch(&self) -> PathBuf {
        let name = uuid::Uuid::now_v7().simple().to_string();
        self.root.join(".scratch").join(name)
    }
}
