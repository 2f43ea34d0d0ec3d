//! What the proxy, the driver and the supervisor tell each other of one preview beside its status:
//! who uses it, what they were shown last, where its files are.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{PreviewSite, filter::Folders, touched::LastPage};

/// A visible page says so every 30 s; it counts for half as long again.
const PERSON_STAYS: Duration = Duration::from_secs(45);

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
            folders: OnceLock::new(),
        }
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
        let now = self.0.since.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.0.last_used.store(now, Ordering::Relaxed);
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

    /// The page that somebody was shown last.
    pub(crate) fn last_page(&self) -> &LastPage {
        &self.0.last_page
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
