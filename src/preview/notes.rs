//! What the proxy, the driver and the supervisor tell each other of one preview beside its status:
//! who uses it, what they were shown last, where its files are.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use http::StatusCode;
use tokio::{sync::watch, time::Instant};

use super::{PreviewSite, filter::Folders, last_good::LastGood, probe, touched::LastPage};

/// A visible page says so every 30 s; it counts for half as long again.
pub(crate) const PERSON_STAYS: Duration = Duration::from_secs(45);

/// Milliseconds without any HMR socket after which pages that want one are taken for deaf: Vite's
/// client tries again each second.
const SOCKET_ABSENCE: u64 = 10_000;

/// Milliseconds in which an update is heard of even on a busy machine, though a browser that heard of
/// it too is back already.
const HEARD_WITHIN: u64 = 2_000;

/// Shared by all of them. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    since: Instant,
    /// Milliseconds after `since`: written with every request.
    last_used: AtomicU64,
    person_until: Mutex<Option<Instant>>,
    turns: AtomicUsize,
    last_page: LastPage,
    last_good: LastGood,
    /// When a page was asked for last, as `last_used`.
    last_document: AtomicU64,
    /// When the dev server last told of something new, as `last_used`; 0 if it never did.
    last_update: AtomicU64,
    /// Grows with each of these.
    updates: watch::Sender<u64>,
    /// When a browser was last told of an error that it had missed, as `last_used`; 0 if none was.
    last_replay: AtomicU64,
    /// Grows when browsers are to load their page again.
    reloads: watch::Sender<u64>,
    /// Has somebody a page that hears of no changes?
    deaf: watch::Sender<bool>,
    sockets: AtomicUsize,
    /// When the last HMR socket went, as `last_used`; 0 if none did.
    last_socket: AtomicU64,
    folders: OnceLock<Folders>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            last_used: AtomicU64::new(0),
            person_until: Mutex::default(),
            turns: AtomicUsize::new(0),
            last_page: LastPage::default(),
            last_good: LastGood::default(),
            last_document: AtomicU64::new(0),
            last_update: AtomicU64::new(0),
            updates: watch::channel(0).0,
            last_replay: AtomicU64::new(0),
            reloads: watch::channel(0).0,
            deaf: watch::channel(false).0,
            sockets: AtomicUsize::new(0),
            last_socket: AtomicU64::new(0),
            folders: OnceLock::new(),
        }
    }
}

impl Inner {
    /// Milliseconds after `since`.
    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A browser that hears of changes.
#[derive(Debug)]
pub(crate) struct HmrSocket {
    notes: Notes,
    /// Changes when the browser is to load its page again.
    pub(crate) reloads: watch::Receiver<u64>,
    /// Changes when the dev server tells of something new.
    pub(crate) updates: watch::Receiver<u64>,
}

impl Drop for HmrSocket {
    fn drop(&mut self) {
        let inner = &self.notes.0;
        inner
            .last_socket
            .store(inner.now().max(1), Ordering::Relaxed);
        inner.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Held while a turn works on the site.
#[derive(Debug)]
pub struct InTurn(Notes);

impl Drop for InTurn {
    fn drop(&mut self) {
        self.0.0.turns.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Notes {
    /// Somebody asks for something of the site.
    pub(crate) fn note_used(&self) {
        self.0.last_used.store(self.0.now(), Ordering::Relaxed);
    }

    pub(crate) fn last_used(&self) -> Instant {
        self.0.since + Duration::from_millis(self.0.last_used.load(Ordering::Relaxed))
    }

    /// A person has a page of it before them.
    pub(crate) fn note_person(&self) {
        let until = Instant::now() + PERSON_STAYS;
        *self.person_until() = Some(until);
    }

    pub(crate) fn has_person(&self, now: Instant) -> bool {
        self.person_until().is_some_and(|until| until > now)
    }

    fn person_until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        let until = self.0.person_until.lock();
        until.expect("no panic while it is held")
    }

    /// A turn works on the site until the guard is dropped.
    pub(crate) fn begin_turn(&self) -> InTurn {
        self.0.turns.fetch_add(1, Ordering::Relaxed);
        self.note_used();
        InTurn(self.clone())
    }

    pub(crate) fn has_turn(&self) -> bool {
        self.0.turns.load(Ordering::Relaxed) > 0
    }

    /// Its pages as they were when they were whole.
    pub(crate) fn last_good(&self) -> &LastGood {
        &self.0.last_good
    }

    /// Somebody asks for a page.
    pub(crate) fn note_document(&self) {
        self.0
            .last_document
            .store(self.0.now().max(1), Ordering::Relaxed);
    }

    /// How long ago that was.
    pub(crate) fn last_document_age(&self, now: Instant) -> Duration {
        let at = self.0.since + Duration::from_millis(self.0.last_document.load(Ordering::Relaxed));
        now.saturating_duration_since(at)
    }

    /// The dev server told its browsers of something new.
    pub(crate) fn note_update(&self) {
        self.0
            .last_update
            .store(self.0.now().max(1), Ordering::Relaxed);
        self.0.updates.send_modify(|count| *count += 1);
    }

    /// A browser that came is told of an error that it had missed.
    pub(crate) fn note_replay(&self) {
        self.0
            .last_replay
            .store(self.0.now().max(1), Ordering::Relaxed);
    }

    /// Was one told when the error was over for the dev server and not yet for us? Then its page shows
    /// the error, and nothing takes it away. Answers once.
    pub(crate) fn has_replayed_too_late(&self) -> bool {
        let replayed = self.0.last_replay.swap(0, Ordering::Relaxed);
        replayed > 0 && replayed + HEARD_WITHIN > self.0.last_update.load(Ordering::Relaxed)
    }

    /// Has that happened since a page was asked for last? Then who comes for news now has missed it:
    /// Vite keeps none for those who come later, since greenroom listens.
    pub(crate) fn has_news_since_the_last_document(&self) -> bool {
        let asked = self.0.last_document.load(Ordering::Relaxed);
        asked > 0 && self.0.last_update.load(Ordering::Relaxed) > asked
    }

    /// Somebody has a page that hears of no changes, or nobody any more.
    pub(crate) fn set_deaf(&self, is_deaf: bool) {
        self.0
            .deaf
            .send_if_modified(|was| std::mem::replace(was, is_deaf) != is_deaf);
    }

    pub(crate) fn deafness(&self) -> watch::Receiver<bool> {
        self.0.deaf.subscribe()
    }

    /// Has all browsers load their page again.
    pub(crate) fn reload(&self) {
        self.0.reloads.send_modify(|count| *count += 1);
    }

    pub(crate) fn open_socket(&self) -> HmrSocket {
        self.0.sockets.fetch_add(1, Ordering::Relaxed);
        self.set_deaf(false);
        HmrSocket {
            notes: self.clone(),
            reloads: self.0.reloads.subscribe(),
            updates: self.0.updates.subscribe(),
        }
    }

    /// Some had one, and none has one any more, for longer than it takes to open another.
    pub(crate) fn has_lost_its_sockets(&self) -> bool {
        let last = self.0.last_socket.load(Ordering::Relaxed);
        self.0.sockets.load(Ordering::Relaxed) == 0
            && last > 0
            && self.0.now() > last.saturating_add(SOCKET_ABSENCE)
    }

    /// The pages that somebody was shown.
    pub(crate) fn last_page(&self) -> &LastPage {
        &self.0.last_page
    }

    /// What these pages answer, asked for side by side.
    pub(crate) async fn ask_for(
        &self,
        port: u16,
        pages: &[String],
        deadline: Duration,
    ) -> Vec<Option<StatusCode>> {
        let asked = pages.iter().map(async |path| {
            let answer = probe::page(port, path, deadline).await;
            if answer.is_some() {
                self.last_page().note_answer(path);
            }
            answer
        });
        join_all(asked).await
    }

    /// Looks where the site's folders really are. Blocking; before a server is up.
    pub(crate) fn resolve_folders(&self, site: &PreviewSite) {
        self.0.folders.get_or_init(|| {
            let others = site.readable.iter().chain(&site.writable);
            Folders::resolve(
                [&site.worktree]
                    .into_iter()
                    .chain(others)
                    .map(AsRef::as_ref),
            )
        });
    }

    /// The folders whose files may be named by their whole path; none before a server was up.
    pub(crate) fn folders(&self) -> Option<&Folders> {
        self.0.folders.get()
    }
}
