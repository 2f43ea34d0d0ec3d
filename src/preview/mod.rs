//! A thread's site in the browser: its dev server, and the way there.
//!
//! [`Previews`] knows every preview of this container by its host label. Each has one driver task
//! (`dev_server`) that owns the child process and publishes a [`PreviewStatus`] through a `watch`;
//! a [`PreviewHandle`] asks it to start, restart or stop. The proxy (`proxy`) listens on the
//! preview port and the HMR port, finds the preview for a request (`routing`), and streams to the
//! loopback port that the status names; while there is none it serves a holding page (`pages`).
//! Who looks at a preview is told to an [`ActivitySink`]: the idle decision is not made here.

mod access;
mod alarm;
mod body;
mod command;
mod css;
mod dev_server;
mod eyes;
mod filter;
mod frames;
mod header_deadline;
mod headers;
mod hmr;
mod last_good;
mod launch;
mod notes;
mod nudge;
mod output;
mod pace;
mod package_files;
mod pages;
mod port;
mod probe;
mod proxy;
mod refusals;
mod restart;
mod routing;
mod served;
mod slots;
mod touched;
mod tunnel;
mod upstream;

use std::{
    any::Any,
    collections::{BTreeMap, HashSet},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use http::StatusCode;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::sleep,
};

pub use self::{
    access::Access,
    command::{DevCommand, PlanError, plan},
    notes::InTurn,
    port::pick_port,
    proxy::{Proxy, ProxyKind},
    touched::is_configuration,
};
use crate::{
    domain::{PreviewError, PreviewState, PreviewStatus},
    egress::Door,
    preview::{
        dev_server::{DevServer, Intent},
        filter::{Folders, Refusal},
        last_good::LastGood,
        notes::{HmrSocket, Notes},
        slots::Slots,
    },
    process::Launcher,
    task::Tasks,
};

/// Held while somebody needs the container awake; dropping it ends that.
pub type ActivityGuard = Box<dyn Any + Send + Sync>;

/// Told who uses the previews. Called for every request: must not block.
pub trait ActivitySink: Send + Sync + 'static {
    /// A request (no WebSocket, no event stream) is in flight until the guard is dropped.
    fn request(&self) -> ActivityGuard;
    /// A person has this thread's page visible before them: counts for 45 s, said every 30 s.
    fn person(&self, slug: &str);
}

/// What all dev servers of this container share.
#[derive(Debug, Clone)]
pub struct PreviewSettings {
    /// The Node program; its folder comes on PATH.
    pub node: PathBuf,
    /// Who may look.
    pub access: Access,
    /// The dev servers' way out of this machine; without one they reach any host on 443.
    pub egress: Option<Door>,
    /// Below it each preview gets a private HOME and TMPDIR. Not readable by other threads.
    pub private_root: PathBuf,
    /// Dev servers at once; the least recently used one sleeps where another is needed.
    pub most_awake: usize,
    /// A broken page is shown as it was before, with a line that says so, instead of under Vite's
    /// overlay.
    pub shows_banner: bool,
}

/// One thread's site. Fixed for the life of its handle.
#[derive(Debug, Clone)]
pub struct PreviewSite {
    /// The host label, as `ThreadKey::slug` gives it.
    pub slug: String,
    pub worktree: PathBuf,
    /// Loopback port of the dev server, the same one for the life of the worktree: see
    /// [`pick_port`].
    pub port: u16,
    /// Host names besides `*.localhost` under which browsers open this preview.
    pub hosts: Vec<String>,
    /// Folders outside the worktree that the dev server may read (dependency masters).
    pub readable: Vec<PathBuf>,
    /// Folders outside the worktree that it may write (a `node_modules` that is a link).
    pub writable: Vec<PathBuf>,
}

/// All previews of this container. Cheap to clone.
#[derive(Clone)]
pub struct Previews {
    shared: Arc<Shared>,
}

struct Shared {
    ground: Ground,
    registry: Mutex<Registry>,
}

/// What every preview stands on.
#[derive(Clone)]
pub(crate) struct Ground {
    launcher: Launcher,
    settings: Arc<PreviewSettings>,
    tasks: Tasks,
    slots: Slots,
}

#[derive(Default)]
struct Registry {
    by_slug: BTreeMap<String, PreviewHandle>,
    default: Option<String>,
}

impl fmt::Debug for Previews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Previews")
            .field("settings", &self.shared.ground.settings)
            .finish_non_exhaustive()
    }
}

impl Previews {
    /// No previews yet. The drivers run in `tasks`; when those are stopped each ends its child.
    pub fn new(launcher: Launcher, settings: PreviewSettings, tasks: Tasks) -> Self {
        let ground = Ground {
            launcher,
            slots: Slots::new(settings.most_awake),
            settings: Arc::new(settings),
            tasks,
        };
        let shared = Shared {
            ground,
            registry: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The ports of all dev servers, running or not.
    pub fn ports(&self) -> HashSet<u16> {
        self.registry()
            .by_slug
            .values()
            .map(|handle| handle.site().port)
            .collect()
    }

    /// The states that previews are in, one for each.
    pub fn states(&self) -> Vec<PreviewState> {
        let registry = self.registry();
        let handles = registry.by_slug.values();
        handles
            .map(|handle| handle.status().borrow().state)
            .collect()
    }

    /// A preview's address with what opens it.
    pub fn with_token(&self, url: &str, slug: &str) -> String {
        self.access()
            .link(url, slug, jiff::Timestamp::now().as_second())
    }

    pub(crate) fn shows_banner(&self) -> bool {
        self.shared.ground.settings.shows_banner
    }

    pub(crate) fn access(&self) -> &Access {
        &self.shared.ground.settings.access
    }

    /// The preview of a site: the one that is there, else a new one in the state `Off`.
    pub fn ensure(&self, site: PreviewSite) -> PreviewHandle {
        let mut registry = self.registry();
        if let Some(handle) = registry.by_slug.get(&site.slug) {
            return handle.clone();
        }
        let slug = site.slug.clone();
        let handle = PreviewHandle::spawn(site, &self.shared.ground);
        registry.by_slug.insert(slug, handle.clone());
        handle
    }

    /// A preview whose dev server somebody else runs and reports on: the proxy serves it, asking
    /// it to start or stop does nothing.
    pub fn adopt(
        &self,
        site: PreviewSite,
        status: watch::Receiver<PreviewStatus>,
    ) -> PreviewHandle {
        let notes = Notes::default();
        notes.resolve_folders(&site);
        let handle = PreviewHandle(Arc::new(Handle {
            site: Arc::new(site),
            intents: mpsc::channel(1).0,
            retry: Arc::new(Notify::new()),
            status,
            notes,
            slots: self.shared.ground.slots.clone(),
        }));
        self.registry()
            .by_slug
            .insert(handle.slug().to_owned(), handle.clone());
        handle
    }

    /// A known preview.
    pub fn get(&self, slug: &str) -> Option<PreviewHandle> {
        self.registry().by_slug.get(slug).cloned()
    }

    /// Makes this the preview of requests that name none: the thread last initialised.
    pub fn set_default(&self, slug: &str) {
        self.registry().default = Some(slug.to_owned());
    }

    /// The preview that a request is for: by the first `label` of its Host, else by its cookie's
    /// thread, else the default one. A label that is the slug of a thread nobody knows here is
    /// for none: its address must not show another thread's site.
    pub fn route(&self, label: Option<&str>, cookie: Option<&str>) -> Option<PreviewHandle> {
        let registry = self.registry();
        let default = registry.default.as_deref();
        routing::choose(label, cookie, default, |slug| registry.by_slug.get(slug)).cloned()
    }

    /// Ends a preview's dev server and forgets the preview.
    pub async fn remove(&self, slug: &str, grace: Duration) {
        let removed = {
            let mut registry = self.registry();
            if registry.default.as_deref() == Some(slug) {
                registry.default = None;
            }
            registry.by_slug.remove(slug)
        };
        if let Some(handle) = removed {
            handle.stop(grace).await;
        }
    }

    /// Ends all dev servers side by side: SIGTERM to each group, SIGKILL after `grace`.
    pub async fn stop_all(&self, grace: Duration) {
        let handles: Vec<_> = self.registry().by_slug.values().cloned().collect();
        join_all(handles.iter().map(|handle| handle.stop(grace))).await;
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.shared
            .registry
            .lock()
            .expect("no panic while the registry is held")
    }
}

/// One preview. Cheap to clone; its driver ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct PreviewHandle(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    site: Arc<PreviewSite>,
    intents: mpsc::Sender<Intent>,
    retry: Arc<Notify>,
    status: watch::Receiver<PreviewStatus>,
    notes: Notes,
    slots: Slots,
}

/// The supervisor's thread driver asks a few things per init and turn; the preview's driver is
/// away from its inbox only while it starts or ends a child, some seconds at most.
const INTENTS: usize = 64;

impl PreviewHandle {
    fn spawn(site: PreviewSite, ground: &Ground) -> Self {
        let site = Arc::new(site);
        let (intents, inbox) = mpsc::channel(INTENTS);
        let (publish, status) = watch::channel(PreviewStatus::off());
        let retry = Arc::new(Notify::new());
        let notes = Notes::default();
        let driver = DevServer::new(
            site.clone(),
            ground.clone(),
            dev_server::Inbox {
                intents: inbox,
                retry: retry.clone(),
            },
            publish,
            notes.clone(),
        );
        ground.tasks.spawn("preview", driver.drive());
        Self(Arc::new(Handle {
            site,
            intents,
            retry,
            status,
            notes,
            slots: ground.slots.clone(),
        }))
    }

    /// The host label.
    pub fn slug(&self) -> &str {
        &self.0.site.slug
    }

    /// The site as it was given.
    pub fn site(&self) -> &PreviewSite {
        &self.0.site
    }

    /// What is true of the preview now, and news of it.
    pub fn status(&self) -> watch::Receiver<PreviewStatus> {
        self.0.status.clone()
    }

    /// The loopback port of a server that can be asked now.
    pub(crate) fn upstream(&self) -> Option<u16> {
        self.0.status.borrow().upstream
    }

    /// May a dev server be asked for this?
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn may_ask(&self, path: &str, query: Option<&str>) -> Result<(), Refusal> {
        static NONE: Folders = Folders::none();
        filter::judge(path, query, self.0.notes.folders().unwrap_or(&NONE))
    }

    /// Somebody asks for something of the site.
    pub(crate) fn note_used(&self) {
        self.0.notes.note_used();
    }

    /// A person has a page of it before them.
    pub(crate) fn note_person(&self) {
        self.0.notes.note_person();
    }

    /// A turn works on the site until the guard is dropped. Its dev server is woken where that
    /// takes the room from nobody who needs it.
    pub fn begin_turn(&self) -> InTurn {
        if self.0.slots.has_room() {
            self.wake();
        }
        self.0.notes.begin_turn()
    }

    /// Its pages as they were when they were whole.
    pub(crate) fn last_good(&self) -> &LastGood {
        self.0.notes.last_good()
    }

    /// A browser hears the dev server until this is dropped.
    pub(crate) fn open_socket(&self) -> HmrSocket {
        self.0.notes.open_socket()
    }

    /// Has no browser heard of changes for a while, though some did and a page wants to? Then it
    /// is said, too, until one hears again.
    pub(crate) fn is_deaf(&self) -> bool {
        let is_deaf = self.upstream().is_some() && self.0.notes.has_lost_its_sockets();
        if is_deaf {
            self.0.notes.set_deaf(true);
        }
        is_deaf
    }

    /// Somebody asks for this page.
    pub(crate) fn note_page(&self, path: &str) {
        self.0.notes.note_document();
        self.0.notes.last_page().note(path);
    }

    /// The dev server has answered it.
    pub(crate) fn note_answer(&self, path: &str) {
        self.0.notes.last_page().note_answer(path);
    }

    /// What a browser that comes now has missed: Vite keeps nothing for it, since greenroom listens.
    /// The last error of a server that goes on serving (not after a change: a page that is still
    /// broken says so), or that its page is an old one.
    pub(crate) fn missed_word(&self) -> Option<String> {
        let status = self.0.status.borrow();
        status.upstream?;
        let error = status.errors.last();
        let error = error
            .filter(|_| status.state == PreviewState::Error && status.told_at == status.updates);
        let has_news = self.0.notes.has_news_since_the_last_document();
        match error {
            Some(newest) => {
                self.0.notes.note_replay();
                Some(hmr::replay(newest))
            }
            None => has_news.then(|| hmr::RELOAD.to_owned()),
        }
    }

    /// Looks at the pages on which a change of `files` would show, so that the server meets their
    /// errors; then waits until it has said something, `patience` at most. `updates` is what the
    /// status said before the change was made. Answers with a page that can't be shown.
    pub async fn look(&self, files: &[String], updates: u64, patience: Duration) -> Option<String> {
        let port = self.upstream()?;
        let mut status = self.status();
        // Those of known errors too: has the turn mended them?
        let (generation, known) = {
            let status = status.borrow();
            let files = status.errors.iter().filter_map(|error| error.file.clone());
            (status.generation, files.collect::<Vec<_>>())
        };
        let files_of_interest = files.iter().chain(&known).map(String::as_str);
        let pages = self.0.notes.last_page().and_pages_of(files_of_interest);
        let mut broken = None;
        let word = async {
            let answers = self.0.notes.ask_for(port, &pages, patience).await;
            let fails = |answer: &Option<StatusCode>| answer.is_some_and(|s| s.is_server_error());
            broken = answers.iter().position(fails).map(|at| pages[at].clone());
            let is_broken = broken.is_some();
            if !known.is_empty() && answers.iter().all(Option::is_some) && !is_broken {
                sleep(probe::LATE).await;
                self.send(Intent::Seen { generation });
            }
            let is_content = files.iter().any(|file| file.starts_with("src/content/"));
            let heard = |status: &PreviewStatus| match status.state {
                // Is it the old one? What was mended is seen to be so a moment later.
                PreviewState::Error => is_broken,
                PreviewState::Live => !is_broken && (!is_content || status.updates > updates),
                _ => true,
            };
            status.wait_for(heard).await.ok();
        };
        tokio::time::timeout(patience, word).await.ok();
        broken
    }

    /// Starts the dev server unless it runs; asking for it also ends a wait between restarts.
    pub fn start(&self) {
        self.send(Intent::Start);
    }

    /// Ends the dev server, if there is one, and starts it again with a fresh count of failures.
    /// `reason` is for the log and the holding page ("astro.config.mjs changed"). Returns once the
    /// state says what came of the start: `Starting`, or `Error`.
    pub async fn restart(&self, reason: &str) {
        let (done, started) = oneshot::channel();
        let reason = reason.to_owned();
        // A driver that is gone starts nothing any more.
        if self
            .0
            .intents
            .send(Intent::Restart { reason, done })
            .await
            .is_ok()
        {
            started.await.ok();
        }
    }

    /// Starts a dev server that sleeps.
    pub fn wake(&self) {
        if self.0.status.borrow().state == PreviewState::Asleep {
            self.0.retry.notify_one();
        }
    }

    /// Tries once more if the dev server is down after a failure; else does nothing.
    pub fn retry(&self) {
        self.0.retry.notify_one();
    }

    /// Says what is being prepared before the dev server can start: `Starting` with this text.
    /// Does nothing while a dev server runs.
    pub fn set_progress(&self, text: &str) {
        self.send(Intent::Progress(text.to_owned()));
    }

    /// Says that the dev server can't be started and why (the dependencies did not install).
    pub fn fail(&self, error: PreviewError) {
        self.send(Intent::Fail(error));
    }

    /// Ends the dev server, SIGTERM first and SIGKILL after `grace`; the state is `Off` then.
    pub async fn stop(&self, grace: Duration) {
        let (done, ended) = oneshot::channel();
        // A driver that is gone has ended its child.
        if self
            .0
            .intents
            .send(Intent::Stop { grace, done })
            .await
            .is_ok()
        {
            ended.await.ok();
        }
    }

    fn send(&self, intent: Intent) {
        if let Err(error) = self.0.intents.try_send(intent) {
            tracing::warn!(slug = self.slug(), %error, "the preview's driver doesn't listen");
        }
    }
}
