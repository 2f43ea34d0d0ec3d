//! The service's core: who asks for which thread, and one driver for each.
//!
//! The edges call [`Supervisor`]; it keeps a registry of threads, each with one driver task
//! (`thread.rs`) that owns the thread's queue, agent and preparation. News comes back as return
//! values, journals and `watch`es. It knows nothing of HTTP.

mod edit;
mod one_shot;
mod operation;
mod prepare;
mod preview_word;
mod publish;
mod removal;
mod thread;
mod view;
mod warm;

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedMutexGuard, Semaphore, broadcast, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::AgentSettings,
    domain::{
        Account, Between, Conflict, ConflictKind, HeldBack, PreviewState, PreviewStatus, Signature,
        TurnResult, TurnStatus,
    },
    gateway::{ActiveRun, AgentToken, Gateway},
    identity::{ThreadId, ThreadKey, TurnId, UserKey},
    lease::{Fence, Lease, LeaseError, LeaseLost, Patience},
    lifecycle::{Activity, HolderKind, Memory},
    preview::Previews,
    process::Launcher,
    repository::{
        GitHub, NoPullRequests, RemoteError, Remotes, RepositoryError, SiteDiff, SourceError,
        UserRepository, Worktree,
    },
    task::{self, BlockingError, Tasks},
    turn::{
        JournalError, Outcome, Outcomes, Past, RunError, StoredContext, TurnFile, TurnRecord,
        blank_result,
    },
    workspace::{Cache, Dependencies, InstallError, ThreadPaths, UserPaths, WorkspaceError},
};

pub use edit::{SiteChange, SiteEdit};
pub use one_shot::{Cwd, OneShot, OneShotAnswer};
pub use operation::{DryRun, Operation, OperationAnswer, OperationRequest};
pub use publish::{PublishAnswer, PublishWish, PullRequestWish};
pub use removal::Removal;
pub use view::{
    ExecuteRequest, History, HistoryPage, InitAnswer, InitRequest, OutsideEdit, PreviewView,
    ThreadView, TurnSummary,
};

use thread::{Request, ThreadHandle};
use warm::WarmAgents;

/// Outcomes that wait for whoever listens to them.
const KEPT_OUTCOMES: usize = 256;

/// Reading small files of the workspace.
const DISK_DEADLINE: Duration = Duration::from_secs(30);

/// The longest that somebody else's clone or merge is waited for.
const REPOSITORY_PATIENCE: Duration = Duration::from_secs(15 * 60);

/// How often the memory that is left is looked at.
const MEMORY_LOOK: Duration = Duration::from_secs(5);

/// A dev server ends within milliseconds of its SIGTERM; then it is killed.
const PREVIEW_GRACE: Duration = Duration::from_secs(2);

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("greenroom is shutting down; ask again in a moment")]
    Draining,
    #[error("{0}")]
    NotFound(&'static str),
    #[error(
        "the workspace of {user} holds another repository ({present}); use another user or thread for this one"
    )]
    RepoMismatch { user: UserKey, present: String },
    #[error("{limit} turns are waiting in this thread already; ask again when one is done")]
    QueueFull { limit: usize },
    #[error("another container works on this thread; ask there, or again once it is done")]
    BusyElsewhere,
    /// The branch's commit is another one than the caller knows.
    #[error(
        "the thread has changed since (its head is {head} now); look at it again, then decide anew"
    )]
    StaleHead { head: String },
    #[error(
        "that cannot be taken back by itself, because later changes build on it or files are in the \
         way; nothing was changed"
    )]
    UndoConflict { files: Vec<Conflict> },
    #[error("{}; nothing was changed", conflict_text(between.as_ref(), files))]
    MergeConflict {
        /// The branches that were to be merged, if it was that.
        between: Option<Between>,
        files: Vec<Conflict>,
    },
    #[error(
        "the worktree holds files that are in no commit; save them elsewhere, or add ?discard=true \
         to let them go"
    )]
    HeldBack { files: Vec<HeldBack> },
    /// What was asked for makes no sense here.
    #[error("{0}")]
    Refused(&'static str),
    /// What greenroom was to write into the site does not fit it.
    #[error("{0}")]
    EditRefused(String),
    #[error(transparent)]
    NoPullRequests(#[from] NoPullRequests),
    #[error("{error}; all else was published, and publishing again goes on from there")]
    PullRequest {
        error: RemoteError,
        /// What was done before.
        published: Box<PublishAnswer>,
    },
    #[error(transparent)]
    Lease(Arc<LeaseError>),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Repository(Arc<RepositoryError>),
    #[error(transparent)]
    Install(#[from] Arc<InstallError>),
    #[error(transparent)]
    Workspace(#[from] Arc<WorkspaceError>),
    #[error(transparent)]
    Journal(Arc<JournalError>),
    #[error(transparent)]
    Blocking(#[from] Arc<BlockingError>),
    #[error("{0}")]
    Internal(String),
}

macro_rules! shared_error {
    ($($error:ty),*) => {$(
        impl From<$error> for SupervisorError {
            fn from(error: $error) -> Self {
                Arc::new(error).into()
            }
        }
    )*};
}
shared_error!(InstallError, WorkspaceError, BlockingError);

fn conflict_text(between: Option<&Between>, files: &[Conflict]) -> String {
    let lost = files
        .iter()
        .any(|file| file.kind == ConflictKind::SilentLoss);
    match between {
        Some(Between { from, to }) if lost => format!(
            "merging {from} into {to} would take away what others wrote and nobody here touched; \
             look at the lines, and publish with acceptLoss if they are to go"
        ),
        Some(Between { from, to }) => format!(
            "{from} and {to} changed the same places; sync the thread, or let its agent bring the \
             files into agreement, then try again"
        ),
        None => "the changes of both sides do not go together".into(),
    }
}

impl From<LeaseLost> for SupervisorError {
    fn from(_: LeaseLost) -> Self {
        Self::BusyElsewhere
    }
}

impl From<LeaseError> for SupervisorError {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Held { .. } => {
                tracing::warn!(%error, "the thread is another process's");
                Self::BusyElsewhere
            }
            error => Self::Lease(Arc::new(error)),
        }
    }
}

impl From<JournalError> for SupervisorError {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Lost(lost) => lost.into(),
            error => Self::Journal(Arc::new(error)),
        }
    }
}

impl From<RemoteError> for SupervisorError {
    fn from(error: RemoteError) -> Self {
        RepositoryError::from(error).into()
    }
}

impl From<RepositoryError> for SupervisorError {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Lost(lost) => lost.into(),
            RepositoryError::Conflict { between, files } => Self::MergeConflict { between, files },
            error => Self::Repository(Arc::new(error)),
        }
    }
}

impl From<RunError> for SupervisorError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Journal(error) => error.into(),
            RunError::Repository(error) => error.into(),
            RunError::Workspace(error) => error.into(),
            RunError::Blocking(error) => error.into(),
            RunError::Lost(lost) => lost.into(),
            RunError::Agent(error) => Self::Internal(error.to_string()),
        }
    }
}

impl Clone for SupervisorError {
    fn clone(&self) -> Self {
        match self {
            Self::Draining => Self::Draining,
            Self::NotFound(what) => Self::NotFound(what),
            Self::RepoMismatch { user, present } => Self::RepoMismatch {
                user: user.clone(),
                present: present.clone(),
            },
            Self::QueueFull { limit } => Self::QueueFull { limit: *limit },
            Self::BusyElsewhere => Self::BusyElsewhere,
            Self::StaleHead { head } => Self::StaleHead { head: head.clone() },
            Self::UndoConflict { files } => Self::UndoConflict {
                files: files.clone(),
            },
            Self::MergeConflict { between, files } => Self::MergeConflict {
                between: between.clone(),
                files: files.clone(),
            },
            Self::HeldBack { files } => Self::HeldBack {
                files: files.clone(),
            },
            Self::Refused(why) => Self::Refused(why),
            Self::EditRefused(why) => Self::EditRefused(why.clone()),
            Self::NoPullRequests(why) => Self::NoPullRequests(*why),
            Self::PullRequest { error, published } => Self::PullRequest {
                error: error.clone(),
                published: published.clone(),
            },
            Self::Lease(error) => Self::Lease(error.clone()),
            Self::Source(error) => Self::Source(error.clone()),
            Self::Repository(error) => Self::Repository(error.clone()),
            Self::Install(error) => Self::Install(error.clone()),
            Self::Workspace(error) => Self::Workspace(error.clone()),
            Self::Journal(error) => Self::Journal(error.clone()),
            Self::Blocking(error) => Self::Blocking(error.clone()),
            Self::Internal(text) => Self::Internal(text.clone()),
        }
    }
}

/// What the supervisor works by.
#[derive(Debug, Clone)]
pub struct SupervisorSettings {
    pub workspace: PathBuf,
    pub cache: PathBuf,
    /// Private, of this process.
    pub runtime: PathBuf,
    /// Repository for a first init that names none.
    pub repo_url: Option<String>,
    pub allowed_local_repos: Option<PathBuf>,
    pub remotes: Remotes,
    pub github: GitHub,
    pub committer: Signature,
    /// Run dev servers at all.
    pub runs_previews: bool,
    pub preview_ready: Duration,
    /// `{slug}` stands for the thread's label.
    pub preview_base_url: String,
    /// Host names of that address which are not `*.localhost`; `.example.com` means all below it.
    pub preview_hosts: Vec<String>,
    pub max_concurrent_turns: usize,
    pub max_queued_turns: usize,
    pub max_warm_agents: usize,
    /// A lease without a beat for so long is stale.
    pub lease: Duration,
    pub turn_timeout: Duration,
    /// Node's version, or what to do about it; empty until it was asked.
    pub node: Arc<OnceLock<Result<String, String>>>,
    /// `None`: the CLI is missing; turns then fail with a sentence.
    pub agent: Option<Arc<AgentSettings>>,
}

/// Clone, worktree changes and what else touches what all threads of a user share: one at a time.
#[derive(Debug)]
struct RepositoryLock {
    lease: Lease,
    _guard: OwnedMutexGuard<()>,
}

impl RepositoryLock {
    /// Closed for good once it is released.
    fn fence(&self) -> &Fence {
        self.lease.fence()
    }

    async fn release(self) {
        self.lease.release().await;
    }
}

/// What of a shutdown did not come to its own end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drained {
    /// Turns that were interrupted; what they wrote is committed.
    pub interrupted: usize,
    /// Threads that were still busy with that when their time was over.
    pub unsaved: Vec<String>,
}

/// A turn that somebody can still stop.
#[derive(Debug, Clone)]
struct LiveTurn {
    record: TurnRecord,
    cancel: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    settings: SupervisorSettings,
    launcher: Launcher,
    gateway: Gateway,
    previews: Previews,
    /// `None`: Node is missing; `/ready` says so.
    dependencies: Option<Dependencies>,
    activity: Activity,
    tasks: Tasks,
    threads: Mutex<HashMap<ThreadKey, ThreadHandle>>,
    /// Threads of a user share one repository: clone and worktree changes are one at a time.
    repositories: Mutex<HashMap<UserKey, Arc<tokio::sync::Mutex<()>>>>,
    live: Mutex<HashMap<TurnId, LiveTurn>>,
    turns: Arc<Semaphore>,
    warm: WarmAgents,
    draining: CancellationToken,
    outcomes: Outcomes,
}

/// The core's handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Supervisor(Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn paths(&self, key: &ThreadKey) -> ThreadPaths {
        ThreadPaths::new(&self.settings.workspace, key)
    }

    fn cache(&self) -> Cache {
        Cache::new(&self.settings.cache)
    }

    /// Waits for its turn among the threads of the user, here and in other containers.
    async fn lock_repository(&self, user: &UserKey) -> Result<RepositoryLock, LeaseError> {
        let mutex = lock(&self.repositories)
            .entry(user.clone())
            .or_default()
            .clone();
        let guard = mutex.lock_owned().await;
        let folder = UserPaths::new(&self.settings.workspace, user).lease();
        let patience = Patience::UpTo(REPOSITORY_PATIENCE);
        let lease = Lease::acquire(&folder, self.settings.lease, patience, &self.tasks).await?;
        Ok(RepositoryLock {
            lease,
            _guard: guard,
        })
    }

    fn preview_view(&self, key: &ThreadKey, status: &PreviewStatus) -> PreviewView {
        let slug = key.slug();
        let url = self.settings.preview_base_url.replace("{slug}", &slug);
        PreviewView {
            state: status.state,
            preview_url: self.previews.with_token(&url, &slug),
            url,
            errors: status.errors.clone(),
        }
    }

    fn preview_status(&self, key: &ThreadKey) -> PreviewStatus {
        self.previews
            .get(&key.slug())
            .map_or_else(PreviewStatus::off, |p| p.status().borrow().clone())
    }
}

/// What a CLI on a terminal needs of the gateway. Dropped, it is of no use any more.
#[derive(Debug)]
pub struct Terminal {
    base_url: String,
    _run: ActiveRun,
    token: AgentToken,
}

impl Terminal {
    /// For `ANTHROPIC_BASE_URL`.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// For `ANTHROPIC_AUTH_TOKEN`.
    pub fn token(&self) -> &str {
        self.token.as_str()
    }
}

impl Supervisor {
    /// A supervisor without threads; they come with the first requests for them.
    pub fn new(
        settings: SupervisorSettings,
        launcher: Launcher,
        gateway: Gateway,
        previews: Previews,
        dependencies: Option<Dependencies>,
        activity: Activity,
        tasks: Tasks,
    ) -> Self {
        let turns = Arc::new(Semaphore::new(settings.max_concurrent_turns));
        let warm = WarmAgents::new(settings.max_warm_agents);
        let supervisor = Self(Arc::new(Inner {
            settings,
            launcher,
            gateway,
            previews,
            dependencies,
            activity,
            tasks,
            threads: Mutex::default(),
            repositories: Mutex::default(),
            live: Mutex::default(),
            turns,
            warm,
            draining: CancellationToken::new(),
            outcomes: broadcast::Sender::new(KEPT_OUTCOMES),
        }));
        let watch = supervisor.clone().watch_memory();
        supervisor.0.tasks.spawn("memory", watch);
        supervisor
    }

    /// Idle agents are the first to go when memory is short: one, then another look.
    async fn watch_memory(self) {
        let token = self.0.tasks.token().clone();
        let watch = async {
            loop {
                tokio::time::sleep(MEMORY_LOOK).await;
                if !Memory::now().is_some_and(Memory::is_short) {
                    continue;
                }
                if let Some(key) = self.0.warm.give_up_oldest()
                    && let Some(thread) = lock(&self.0.threads).get(&key)
                {
                    tracing::warn!(thread = %key, "memory is short: an idle agent ends");
                    thread.try_rest();
                }
            }
        };
        token.run_until_cancelled(watch).await;
    }

    fn thread(&self, key: &ThreadKey) -> Result<ThreadHandle, SupervisorError> {
        if self.is_draining() {
            return Err(SupervisorError::Draining);
        }
        let mut threads = lock(&self.0.threads);
        let handle = threads
            .entry(key.clone())
            .or_insert_with(|| thread::start(self.0.clone(), key.clone()));
        Ok(handle.clone())
    }

    async fn ask<T>(
        &self,
        key: &ThreadKey,
        request: impl FnOnce(oneshot::Sender<Result<T, SupervisorError>>) -> Request,
    ) -> Result<T, SupervisorError> {
        let (reply, answer) = oneshot::channel();
        self.thread(key)?.send(request(reply)).await?;
        answer.await.map_err(|_| SupervisorError::Draining)?
    }

    /// The states that the previews are in, one for each.
    pub fn preview_states(&self) -> Vec<PreviewState> {
        self.0.previews.states()
    }

    /// Opens the gateway for the CLI on somebody's terminal, while what this answers lives.
    ///
    /// # Errors
    /// [`SupervisorError::Draining`].
    pub fn open_terminal(&self, account: Account) -> Result<Terminal, SupervisorError> {
        if self.is_draining() {
            return Err(SupervisorError::Draining);
        }
        let token = self.0.gateway.issue();
        Ok(Terminal {
            base_url: self.0.gateway.base_url(),
            _run: token.begin(account),
            token,
        })
    }

    /// Turns' outcomes from now on. Who is slow misses some.
    pub fn outcomes(&self) -> broadcast::Receiver<Arc<Outcome>> {
        self.0.outcomes.subscribe()
    }

    /// Cancelled when a shutdown begins.
    pub fn draining(&self) -> CancellationToken {
        self.0.draining.clone()
    }

    /// Is a shutdown under way?
    pub fn is_draining(&self) -> bool {
        self.0.draining.is_cancelled()
    }

    /// Turns that run now.
    pub fn active_turns(&self) -> usize {
        self.0.activity.count(HolderKind::Turn)
    }

    /// Makes a thread ready: repository, branches, worktree, dependencies, dev server, agent.
    /// Idempotent; two callers at once get the same thread.
    ///
    /// # Errors
    /// See [`SupervisorError`]. A dev server that fails is no error: the answer's preview says so.
    pub async fn init(&self, request: InitRequest) -> Result<InitAnswer, SupervisorError> {
        let key = request.key.clone();
        self.ask(&key, |reply| Request::Init(request, reply)).await
    }

    /// Prepares a thread that was initialised earlier, perhaps by another process.
    async fn revive(&self, key: &ThreadKey) -> Result<(), SupervisorError> {
        let handle = lock(&self.0.threads).get(key).cloned();
        if !handle.is_some_and(|handle| handle.is_prepared()) && !self.is_initialised(key).await? {
            return Err(SupervisorError::NotFound(
                "there is no such thread; call /api/init for it first",
            ));
        }
        self.ask(key, Request::Revive).await
    }

    async fn is_initialised(&self, key: &ThreadKey) -> Result<bool, SupervisorError> {
        let place = self.0.paths(key).preview_place();
        Ok(
            task::blocking("looking for the thread", DISK_DEADLINE, move || {
                place.exists()
            })
            .await?,
        )
    }

    /// Admits a turn: it is in its journal when this returns, and will run whether or not anybody
    /// waits for it. An idempotency key seen before answers with that turn.
    ///
    /// # Errors
    /// See [`SupervisorError`]; then nothing was accepted.
    pub async fn execute(&self, request: ExecuteRequest) -> Result<TurnRecord, SupervisorError> {
        let key = request.key.clone();
        self.revive(&key).await?;
        self.ask(&key, |reply| Request::Execute(Box::new(request), reply))
            .await
    }

    /// Does something to a thread in its turn's place: after what was asked for before, never
    /// beside a turn. Nothing is accepted until its time comes: a caller that goes away before
    /// that takes its wish along. An idempotency key seen before answers with that turn's outcome.
    ///
    /// # Errors
    /// See [`SupervisorError`]; then nothing was changed, but for outside edits being committed.
    pub async fn operate(
        &self,
        request: OperationRequest,
    ) -> Result<OperationAnswer, SupervisorError> {
        let key = request.key.clone();
        self.revive(&key).await?;
        let asked = self.ask(&key, |reply| Request::Operate(Box::new(request), reply));
        match asked.await? {
            OperationAnswer::Seen(turn) => {
                Ok(OperationAnswer::Done(Box::new(turn.outcome().await?)))
            }
            answer => Ok(answer),
        }
    }

    /// Runs another service's one-shot call in a thread's worktree, in its turn's place and as a
    /// turn of its own. A caller that goes away ends it.
    ///
    /// # Errors
    /// See [`SupervisorError`]; how the run itself went is in the answer.
    pub async fn run_one_shot(
        &self,
        key: &ThreadKey,
        shot: OneShot,
    ) -> Result<OneShotAnswer, SupervisorError> {
        self.revive(key).await?;
        self.ask(key, |reply| Request::Run(Box::new(shot), reply))
            .await
    }

    /// Takes a thread away, after what was asked of it before; nothing more is admitted
    /// meanwhile. What is in its worktree is committed first.
    ///
    /// # Errors
    /// [`SupervisorError::HeldBack`] if there are files that would be lost: nothing was removed.
    pub async fn remove(&self, key: &ThreadKey, removal: Removal) -> Result<(), SupervisorError> {
        self.revive(key).await?;
        self.ask(key, |reply| Request::Remove(removal, reply)).await
    }

    /// A turn, live or at rest.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn turn(&self, id: &TurnId) -> Result<TurnRecord, SupervisorError> {
        if let Some(live) = lock(&self.0.live).get(id) {
            return Ok(live.record.clone());
        }
        let file = TurnFile::new(&self.0.paths(id.key()), id.clone());
        let look = file.clone();
        let (exists, is_over) = task::blocking("looking for the turn", DISK_DEADLINE, move || {
            (look.exists(), matches!(look.outcome(), Ok(Some(_))))
        })
        .await?;
        if !exists {
            return Err(SupervisorError::NotFound("there is no such turn"));
        }
        if !is_over {
            // Its supervisor died: preparing the thread gives it an outcome, or its place in line.
            match self.revive(id.key()).await {
                Err(SupervisorError::BusyElsewhere) => {
                    return Ok(TurnRecord::elsewhere(file, &self.0.tasks).await?);
                }
                revived => revived?,
            }
            if let Some(live) = lock(&self.0.live).get(id) {
                return Ok(live.record.clone());
            }
        }
        Ok(TurnRecord::at_rest(file))
    }

    /// How a turn stands, without waiting for its end.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn turn_result(&self, id: &TurnId) -> Result<TurnResult, SupervisorError> {
        let record = self.turn(id).await?;
        if !record.is_live() {
            return Ok(record.outcome().await?);
        }
        let (file, context, key) = (
            record.file().clone(),
            self.0.paths(id.key()).context(),
            id.key().clone(),
        );
        let mut result = task::blocking("reading a turn", DISK_DEADLINE, move || {
            let context = StoredContext::load(&context, &key).map_err(JournalError::from)?;
            Ok::<_, JournalError>(blank_result(&file.accepted()?, &context))
        })
        .await??;
        result.status = if record.has_started() {
            TurnStatus::Running
        } else {
            TurnStatus::Queued
        };
        let status = self.0.preview_status(id.key());
        result.preview.state = status.state;
        result.preview.errors = status.errors;
        Ok(result)
    }

    /// Stops a turn, and waits until it has its outcome. A turn that is over stays as it is.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn cancel(&self, id: &TurnId) -> Result<TurnResult, SupervisorError> {
        let record = self.turn(id).await?;
        let live = lock(&self.0.live).get(id).cloned();
        if let Some(live) = live {
            live.cancel.cancel();
            self.thread(id.key())?.send(Request::Wake).await?;
        } else if record.is_live() {
            return Err(SupervisorError::BusyElsewhere);
        }
        Ok(record.outcome().await?)
    }

    /// The preview of a thread that was initialised.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn preview(&self, key: &ThreadKey) -> Result<PreviewView, SupervisorError> {
        if self.0.previews.get(&key.slug()).is_none() && !self.is_initialised(key).await? {
            return Err(SupervisorError::NotFound("there is no such thread"));
        }
        Ok(self.0.preview_view(key, &self.0.preview_status(key)))
    }

    /// One thread.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn thread_view(&self, key: &ThreadKey) -> Result<ThreadView, SupervisorError> {
        let preview = self.preview(key).await?;
        let (paths, at) = (self.0.paths(key), key.clone());
        let (head, last_activity) = task::blocking("reading a thread", DISK_DEADLINE, move || {
            let head = UserRepository::open(&paths.user.project())
                .and_then(|repository| repository.worktree(&at, &paths.worktree()).head())
                .ok();
            let context = StoredContext::load(&paths.context(), &at).ok();
            (head, context.map(|context| context.updated))
        })
        .await?;
        let running_turn = lock(&self.0.live)
            .iter()
            .find(|(id, live)| {
                id.key() == key && live.record.is_live() && live.record.has_started()
            })
            .map(|(id, _)| id.clone());
        Ok(ThreadView {
            client_id: key.client.clone(),
            user_id: key.user.clone(),
            thread_id: key.thread.clone(),
            branch: key.branch(),
            head,
            last_activity,
            preview,
            running_turn,
        })
    }

    /// All threads of a user, by name.
    ///
    /// # Errors
    /// If the workspace cannot be read.
    pub async fn threads(&self, user: &UserKey) -> Result<Vec<ThreadView>, SupervisorError> {
        let folder = UserPaths::new(&self.0.settings.workspace, user)
            .state()
            .join("threads");
        let names = task::blocking("listing threads", DISK_DEADLINE, move || {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let mut names: Vec<ThreadId> = entries
                .filter(|entry| entry.path().join("preview.json").exists())
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .collect();
            names.sort();
            names
        })
        .await?;
        let mut views = Vec::new();
        for thread in names {
            let key = ThreadKey {
                client: user.client.clone(),
                user: user.user.clone(),
                thread,
            };
            views.push(self.thread_view(&key).await?);
        }
        Ok(views)
    }

    /// A page of the thread's turns, newest first.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn history(
        &self,
        key: &ThreadKey,
        page: HistoryPage,
    ) -> Result<History, SupervisorError> {
        let running: Vec<TurnId> = lock(&self.0.live)
            .iter()
            .filter(|(id, live)| id.key() == key && live.record.has_started())
            .map(|(id, _)| id.clone())
            .collect();
        let (paths, at) = (self.0.paths(key), key.clone());
        self.look(key, "reading the history", move |worktree| {
            let past = Past::of(&paths, &at);
            Ok(History::read(past, worktree, &page, &running))
        })
        .await
    }

    /// What differs between two commits of a thread; see [`Worktree::diff`].
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub async fn diff(
        &self,
        key: &ThreadKey,
        from: Option<String>,
        to: Option<String>,
    ) -> Result<SiteDiff, SupervisorError> {
        let trunk = key.user_key().user_branch();
        self.look(key, "comparing two commits", move |worktree| {
            Ok(worktree.diff(&trunk, from.as_deref(), to.as_deref())?)
        })
        .await
    }

    /// Reads something of a thread that was initialised; writes nothing, and asks for no lease.
    async fn look<T: Send + 'static>(
        &self,
        key: &ThreadKey,
        what: &'static str,
        read: impl FnOnce(&Worktree) -> Result<T, SupervisorError> + Send + 'static,
    ) -> Result<T, SupervisorError> {
        if !self.is_initialised(key).await? {
            return Err(SupervisorError::NotFound("there is no such thread"));
        }
        let (paths, key) = (self.0.paths(key), key.clone());
        task::blocking(what, DISK_DEADLINE, move || {
            let repository = UserRepository::open(&paths.user.project())?;
            read(&repository.worktree(&key, &paths.worktree()))
        })
        .await?
    }

    /// Ends the service's core: refuses new work, lets running turns end until `deadline`, then
    /// interrupts them; their edits are committed in either case. Agents and dev servers are gone
    /// when this returns, unless that took longer than until `save`.
    pub async fn drain(&self, deadline: Instant, save: Instant) -> Drained {
        let mut drained = Drained::default();
        self.0.draining.cancel();
        let wait_for_turns = async {
            while self.active_turns() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout_at(deadline, wait_for_turns)
            .await
            .is_err()
        {
            drained.interrupted = self.active_turns();
            tracing::warn!(
                turns = drained.interrupted,
                "interrupting turns that still run"
            );
            for live in lock(&self.0.live).values() {
                live.cancel.cancel();
            }
        }
        let handles: Vec<(ThreadKey, ThreadHandle)> = lock(&self.0.threads).drain().collect();
        let open: Mutex<BTreeSet<String>> =
            Mutex::new(handles.iter().map(|(key, _)| key.to_string()).collect());
        let save_all = handles.into_iter().map(|(key, handle)| {
            let open = &open;
            async move {
                handle.stop().await;
                lock(open).remove(&key.to_string());
            }
        });
        let all = async {
            futures_util::future::join_all(save_all).await;
            self.0.previews.stop_all(PREVIEW_GRACE).await;
        };
        if tokio::time::timeout_at(save, all).await.is_err() {
            drained.unsaved = std::mem::take(&mut *lock(&open)).into_iter().collect();
            tracing::warn!(
                threads = ?drained.unsaved,
                "threads did not come to their end in time; the next init finishes them"
            );
        }
        drained
    }
}
