//! What a running dev server says of its site, beside what changes there: is what it shows true?
//!
//! ```text
//! change ─► the server says something within 1.5 s, or soon after     fine
//!        └► it is silent ─► it is nudged, and: it serves the file?
//!             no, or only of late ─► rightly so; browsers load their page again
//!                             yes ─► `stale`; browsers load their page again;
//!                     is a page answered (8 s), and nothing said yet? ─► a new server
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{DevServer, MAX_ERRORS, Run};
use crate::{
    domain::{PreviewError, PreviewState},
    preview::{
        css,
        eyes::{Change, Kind},
        hmr::Word,
        launch::read_small,
        notes::PERSON_STAYS,
        nudge::nudge,
        probe,
        served::is_served,
        touched::is_configuration,
    },
    task::blocking,
};

/// A change of content is told after 0.5 s, most others at once.
const QUIET: Duration = Duration::from_millis(1500);
/// A server that has been silent for so long may be busy (with its first page, say): until it
/// answers something small, this long at most, it is not in doubt. One that is deaf has the time to
/// answer at once.
const BUSY: Duration = Duration::from_secs(5);
/// Several files are written at once.
const SETTLE: Duration = Duration::from_millis(300);
/// A broken configuration alone keeps Vite from answering for 6 s.
const ANSWER: Duration = Duration::from_secs(8);
/// Looks at the pages after one change, each after twice the time: an error may be told late, of
/// what is mended by then, each look may bring another, and some mend themselves (of what a page
/// fetches). The last one is 90 s after the change.
const MOST_CHECKS: u32 = 8;
/// A change so soon after a page was shown may be the page's own doing.
const OWN_DOING: Duration = Duration::from_secs(2);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// From the last of quick changes until the server is made to look once more: later than any event of
/// theirs is dropped.
const NUDGE: Duration = Duration::from_millis(200);
/// A server may be quicker than greenroom to see a change, and have spoken already. A word that is
/// older than that was of something else.
const HEAD_START: Duration = Duration::from_millis(100);
const MOST_FILES: usize = 64;
/// New files that a reload waits for, at most, and for how long.
const MOST_NEW_FILES: usize = 8;
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
/// Files that a server is made to look at once more, at most.
const MOST_NUDGES: usize = 1024;
const DEAF: &str =
    "a browser has lost its connection and hears of no changes; its page is loaded again";

/// What is known of one run's honesty.
#[derive(Debug, Default)]
pub(super) struct Truth {
    /// Somebody hears it: else its silence means nothing.
    is_heard: bool,
    /// How often it said anything of the site.
    words: u64,
    last_word: Option<Instant>,
    /// Looks since the last update.
    checks: u32,
    /// Looks of this run: only the newest one counts.
    looks: u32,
    /// When it may be forgotten that a browser was deaf.
    deaf_until: Option<Instant>,
    /// Files that changed and that it has said nothing of, and when that was seen.
    unheard: BTreeMap<String, Instant>,
    unheard_due: Option<Instant>,
    /// Files that were changed twice in quick succession, and when the server is to look at each once
    /// more.
    overlooked: BTreeMap<String, Instant>,
    reload_due: Option<Instant>,
    /// New files of `public/`, by their address, that the server may not know yet.
    new_files: BTreeSet<String>,
    restart_due: Option<(Instant, String)>,
    /// Broken files that pages answer well with all the same: content entries, by their names in its
    /// log, and stylesheets.
    broken_quietly: BTreeSet<String>,
    /// The newest look at each stylesheet that changed: an older one may have seen it half written.
    style_looks: BTreeMap<String, u32>,
    last_style_look: u32,
}

impl Truth {
    /// When [`DevServer::look_again`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let restart = self.restart_due.as_ref().map(|(at, _)| *at);
        [
            self.unheard_due,
            self.overlooked.values().min().copied(),
            self.reload_due,
            self.deaf_until,
            restart,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn said_something(&mut self) {
        self.words += 1;
        self.last_word = Some(Instant::now());
        self.unheard.clear();
        self.unheard_due = None;
    }
}

/// Why a server is to be started anew.
pub(super) type Reason = String;

impl DevServer {
    /// Takes in what the server says while it serves.
    pub(super) fn hear(&mut self, word: Word, run: &mut Run) -> Option<Reason> {
        let truth = &mut run.truth;
        if let Word::Unsaid { error, look } = &word
            && error
                .file
                .as_ref()
                .and_then(|file| truth.style_looks.get(file))
                != Some(look)
        {
            return None;
        }
        let mut is_to_check = false;
        let mut reason = None;
        let mut is_doubted = None;
        let mut is_unaware = false;
        let is_polling = self.polls;
        let is_blind = matches!(word, Word::Blind(_));
        let quietly = match &word {
            Word::Logged(error) => entry_named(&error.message).map(str::to_owned),
            Word::Unsaid { error, .. } => error.file.clone(),
            _ => None,
        };
        truth.broken_quietly.extend(quietly);
        if matches!(
            word,
            Word::Error(_) | Word::Logged(_) | Word::Reloaded { .. } | Word::Updated
        ) {
            truth.said_something();
        }
        self.publish.send_if_modified(|status| {
            match word {
                Word::Listening(is_heard) => {
                    truth.is_heard = is_heard;
                    truth.unheard.clear();
                    truth.unheard_due = None;
                    return false;
                }
                Word::Updated => {
                    truth.checks = 0;
                    status.updates += 1;
                    is_to_check = matches!(status.state, PreviewState::Error | PreviewState::Stale);
                }
                Word::Reloaded { name } => {
                    is_to_check = truth.broken_quietly.remove(&name);
                    return false;
                }
                Word::Error(error) | Word::Logged(error) | Word::Unsaid { error, .. } => {
                    // A browser that tries again makes the server say it again.
                    let is_known = status.errors.contains(&error);
                    if is_known && status.told_at == status.updates {
                        return false;
                    }
                    // Of what was mended meanwhile?
                    is_to_check = true;
                    status.told_at = status.updates;
                    status.errors.retain(|known| known.file != error.file);
                    status.errors.push(error);
                    let surplus = status.errors.len().saturating_sub(MAX_ERRORS);
                    status.errors.drain(..surplus);
                    status.state = PreviewState::Error;
                }
                Word::Blind(error) => {
                    status.errors = vec![error];
                    status.state = PreviewState::Stale;
                    if !is_polling {
                        reason = Some("it can't watch the site's files".to_owned());
                    }
                }
                Word::Silent { words, file } => {
                    if words != truth.words || status.state == PreviewState::Starting {
                        return false;
                    }
                    is_doubted = Some(words);
                    status.errors.push(PreviewError {
                        message: format!(
                            "what the preview shows may be old: the dev server has said nothing of \
                             a change of {file}"
                        ),
                        file: Some(file),
                        ..PreviewError::default()
                    });
                    status.state = PreviewState::Stale;
                }
                Word::Unaware { words } => {
                    is_unaware = words == truth.words;
                    return false;
                }
                Word::StillSilent { words } => {
                    if words == truth.words {
                        reason = Some("it doesn't see changes".to_owned());
                    } else {
                        is_to_check = true;
                    }
                    return false;
                }
                Word::Fine { generation } if generation == status.generation => {
                    let broken = &truth.broken_quietly;
                    let is_broken = |error: &PreviewError, name: &String| {
                        error.file.as_ref() == Some(name) || error.message.contains(name)
                    };
                    status
                        .errors
                        .retain(|error| broken.iter().any(|name| is_broken(error, name)));
                    if status.errors.is_empty() {
                        status.state = PreviewState::Live;
                        if self.notes.has_replayed_too_late() {
                            self.notes.reload();
                        }
                        // What fails now and then is not asked about all the time.
                        truth.checks = truth.checks.min(MOST_CHECKS / 2);
                    }
                }
                Word::Fine { .. } => {
                    is_to_check = matches!(status.state, PreviewState::Error | PreviewState::Stale);
                    return false;
                }
                Word::StillBroken { look } => {
                    is_to_check = look == truth.looks && status.state == PreviewState::Error;
                    return false;
                }
            }
            status.generation += 1;
            true
        });
        if let Some(words) = is_doubted {
            tracing::warn!(slug = self.site.slug, "the dev server misses changes");
            self.notes.reload();
            self.wait_for_a_word(words, run.tell.clone());
        }
        if is_unaware {
            self.notes.reload();
        }
        if is_to_check && run.truth.checks < MOST_CHECKS {
            let pause = probe::LATE * (1 << run.truth.checks);
            run.truth.checks += 1;
            run.truth.looks += 1;
            self.check(run, pause);
        }
        if reason.is_some() {
            // What was tried and did not help is not tried again.
            self.polls = self.polls || is_blind || self.was_deaf;
            self.was_deaf = true;
        }
        reason
    }

    /// A file of the site has changed.
    pub(super) fn notice(&self, change: &Change, run: &mut Run) {
        let now = Instant::now();
        let truth = &mut run.truth;
        let Change { path, kind, at } = change;
        if *kind == Kind::Again {
            if truth.overlooked.len() < MOST_NUDGES && !is_configuration(path) {
                truth.overlooked.insert(path.clone(), now + NUDGE);
            }
            return;
        }
        let has_turn = self.notes.has_turn();
        let quiet = truth.broken_quietly.len();
        truth
            .broken_quietly
            .retain(|name| !path.ends_with(name.as_str()));
        if truth.broken_quietly.len() < quiet {
            // The server may have spoken of it already, and have been asked when it was known as
            // broken still.
            truth.looks += 1;
            self.check(run, probe::LATE);
        }
        let truth = &mut run.truth;
        if is_configuration(path) {
            // A turn's own word does that at its end.
            if !has_turn {
                truth.restart_due = Some((now + SETTLE, format!("{path} changed")));
            }
            return;
        }
        if path.ends_with(".css") && *kind != Kind::Gone {
            if truth.style_looks.len() >= MOST_FILES {
                truth.style_looks.clear();
            }
            truth.last_style_look += 1;
            let look = truth.last_style_look;
            truth.style_looks.insert(path.clone(), look);
            self.look_at_style(path, look, run.tell.clone());
        }
        let is_new_page = *kind == Kind::New && path.starts_with("src/pages/");
        if is_new_page {
            self.notes.last_page().forget(path);
        }
        if is_new_page || path.starts_with("public/") {
            // Vite tells nobody.
            let is_own = !has_turn && self.notes.last_document_age(now) < OWN_DOING;
            if !is_own {
                truth.reload_due = Some(now + SETTLE);
                truth
                    .new_files
                    .extend(address_of(change).filter(|_| truth.new_files.len() < MOST_NEW_FILES));
            }
        } else if *kind == Kind::Changed
            && truth.is_heard
            && truth.last_word.is_none_or(|word| word + HEAD_START < *at)
            && truth.unheard.len() < MOST_FILES
        {
            truth.unheard.entry(path.clone()).or_insert(now);
            truth.unheard_due.get_or_insert(now + QUIET);
        }
    }

    /// Something is due.
    pub(super) fn look_again(&self, run: &mut Run) -> Option<Reason> {
        let now = Instant::now();
        let truth = &mut run.truth;
        if truth.reload_due.is_some_and(|at| at <= now) {
            truth.reload_due = None;
            match std::mem::take(&mut truth.new_files) {
                new if new.is_empty() => self.notes.reload(),
                new => self.reload_once_known(new),
            }
        }
        let overlooked: Vec<String> = truth
            .overlooked
            .extract_if(.., |_, due| *due <= now)
            .map(|(file, _)| file)
            .collect();
        if !overlooked.is_empty() {
            self.nudge(overlooked);
        }
        if truth.unheard_due.is_some_and(|at| at <= now) {
            truth.unheard_due = None;
            let files = std::mem::take(&mut truth.unheard);
            self.nudge(files.keys().cloned().collect());
            self.ask_whether_served(files, truth.words, run.tell.clone());
        }
        if truth.deaf_until.is_some_and(|at| at <= now) {
            // Nobody is there any more who said so.
            truth.deaf_until = None;
            self.notes.set_deaf(false);
        }
        let is_due = truth.restart_due.as_ref().is_some_and(|(at, _)| *at <= now);
        truth.restart_due.take_if(|_| is_due).map(|(_, why)| why)
    }

    /// Vite lists the files of `public/` and hears of new ones by its watcher: until then they are 404,
    /// and a page that was loaded would stay without them.
    fn reload_once_known(&self, files: BTreeSet<String>) {
        let (port, notes) = (self.site.port, self.notes.clone());
        self.aside("preview files", async move {
            let known = async {
                for file in &files {
                    while !probe::has_file(port, file, KNOWN_WITHIN).await {
                        sleep(SETTLE).await;
                    }
                }
            };
            // With a `base` they have another address, and are known by then.
            timeout(KNOWN_WITHIN, known).await.ok();
            notes.reload();
        });
    }

    /// Has the server look at these files once more; it may speak of them then.
    fn nudge(&self, files: Vec<String>) {
        let worktree = self.site.worktree.clone();
        self.aside("preview nudge", async move {
            let nudge = move || {
                for file in files {
                    // It may be gone by now, or be nothing that a site is made of.
                    nudge(&worktree, &file).ok();
                }
            };
            blocking("having a dev server look again", DISK_DEADLINE, nudge)
                .await
                .ok();
        });
    }

    /// Is it silent of files that it serves? Only what it had rendered before the change it has
    /// to speak of.
    fn ask_whether_served(
        &self,
        files: BTreeMap<String, Instant>,
        words: u64,
        tell: mpsc::Sender<Word>,
    ) {
        let (port, notes) = (self.site.port, self.notes.clone());
        let worktree = self.site.worktree.clone();
        self.aside("preview doubt", async move {
            let pages = notes.last_page();
            let files = files
                .into_iter()
                .map(|(file, seen)| (file, pages.answered_by(seen)));
            let (files, shown) = (files.collect::<Vec<_>>(), pages.shown_to_anybody());
            let look = blocking("looking for who uses a file", DISK_DEADLINE, move || {
                let served = |file: &str, pages| is_served(&worktree, file, pages);
                let unsaid = files.iter().find(|(file, pages)| served(file, pages));
                if let Some((file, _)) = unsaid {
                    let file = file.clone();
                    return Some(Word::Silent { words, file });
                }
                let is_shown = files.iter().any(|(file, _)| served(file, &shown));
                is_shown.then_some(Word::Unaware { words })
            });
            let busy = async {
                probe::turn_round(port, BUSY).await;
                sleep(probe::LATE).await;
            };
            if let (Ok(Some(word)), ()) = tokio::join!(look, busy) {
                tell.send(word).await.ok();
            }
        });
    }

    /// It may only be slow: does it say something once it has answered?
    fn wait_for_a_word(&self, words: u64, tell: mpsc::Sender<Word>) {
        let port = self.site.port;
        let notes = self.notes.clone();
        self.aside("preview doubt", async move {
            let page = notes.last_page().and_pages_of([]);
            notes.ask_for(port, &page, ANSWER).await;
            sleep(probe::LATE).await;
            tell.send(Word::StillSilent { words }).await.ok();
        });
    }

    /// A stylesheet has changed, and may be cut off, of which nobody says a word.
    fn look_at_style(&self, file: &str, look: u32, tell: mpsc::Sender<Word>) {
        let (worktree, file) = (self.site.worktree.clone(), file.to_owned());
        let shown = self.notes.last_page().shown_to_anybody();
        self.aside("preview style", async move {
            let seen = blocking("looking at a stylesheet", DISK_DEADLINE, move || {
                let text = read_small(&worktree.join(&file)).ok()?;
                let fault = css::first_fault(&text)?;
                let is_public = file.starts_with("public/");
                (is_public || is_served(&worktree, &file, &shown)).then(|| PreviewError {
                    file: Some(file),
                    line: Some(fault.line),
                    column: Some(fault.column),
                    message: fault.what.to_owned(),
                })
            });
            if let Ok(Some(error)) = seen.await {
                tell.send(Word::Unsaid { error, look }).await.ok();
            }
        });
    }

    /// Somebody looks at a page that hears nothing of changes, or hears again.
    pub(super) fn note_deafness(&self, is_deaf: bool, run: &mut Run) {
        let until = is_deaf.then(|| Instant::now() + PERSON_STAYS);
        run.truth.deaf_until = until;
        self.publish.send_if_modified(|status| {
            match (is_deaf, status.state) {
                (true, PreviewState::Live) => {
                    status.errors.push(PreviewError {
                        message: DEAF.to_owned(),
                        ..PreviewError::default()
                    });
                    status.state = PreviewState::Stale;
                }
                (false, PreviewState::Stale) => {
                    status.errors.retain(|error| error.message != DEAF);
                    if !status.errors.is_empty() {
                        return false;
                    }
                    status.state = PreviewState::Live;
                }
                _ => return false,
            }
            status.generation += 1;
            true
        });
    }

    /// Nothing says that an error is gone: after a change the pages that it may have been on are
    /// asked for, once what comes late has come.
    fn check(&self, run: &Run, pause: Duration) {
        let (status, notes) = (self.publish.subscribe(), self.notes.clone());
        let (port, tell, look) = (self.site.port, run.tell.clone(), run.truth.looks);
        self.aside("preview check", async move {
            sleep(pause).await;
            // Only now: an error of before the change may have come after it.
            let (generation, pages) = {
                let status = status.borrow();
                let files = status
                    .errors
                    .iter()
                    .filter_map(|error| error.file.as_deref());
                (status.generation, notes.last_page().and_pages_of(files))
            };
            let answers = notes.ask_for(port, &pages, probe::PATIENCE).await;
            if answers
                .iter()
                .all(|status| status.is_some_and(|code| !code.is_server_error()))
            {
                sleep(probe::LATE).await;
                tell.send(Word::Fine { generation }).await.ok();
            } else {
                tell.send(Word::StillBroken { look }).await.ok();
            }
        });
    }
}

/// Where a new file of `public/` is to be had, if its name can be asked for as it is.
fn address_of(change: &Change) -> Option<String> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(byte);
    let name = change.path.strip_prefix("public")?;
    (change.kind == Kind::New && name.as_bytes().iter().all(is_plain)).then(|| name.to_owned())
}

/// The entry that a line of Astro's content loader is about.
fn entry_named(message: &str) -> Option<&str> {
    let words = message.split_whitespace();
    let mut names = words.map(|word| word.trim_end_matches([':', ',', '.']));
    names.find(|word| word.contains('.') && !word.starts_with('.'))
}
