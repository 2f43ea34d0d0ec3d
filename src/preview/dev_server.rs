//! The driver of one preview: owns the dev server's process from spawn to exit.
//!
//! It is `Idle` (nothing wanted), `Asleep` (another one needed the room), `Broken` (a start failed or the server ended; perhaps a restart
//! is due) or `Running` (a child lives; live once it has proved itself). Events come from the
//! handle, the child and the clock; whether a failure is tried again is decided in `restart`.

mod truth;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Ground, PreviewSite,
    eyes::{self, Change},
    hmr::{self, Word},
    launch::{StartError, chain, prepare, prove},
    notes::Notes,
    output::{Output, Stream, error_from},
    probe,
    restart::{Failure, Next, Restarts},
    slots::Slot,
};
use crate::{
    domain::{PreviewError, PreviewState, PreviewStatus},
    process::{Exit, ProcessHandle},
    task::blocking,
};
use truth::Truth;

/// From SIGTERM to SIGKILL where the caller names no grace. Astro ends in 30 to 70 ms.
const GRACE: Duration = Duration::from_secs(5);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
const SIGKILL: i32 = 9;
/// Errors that are kept, the newest.
const MAX_ERRORS: usize = 20;
/// Words that wait for the driver, which is busy for moments only while a server runs.
const WORDS: usize = 64;
/// Changes that wait for the driver; the rest waits where they are seen.
const CHANGES: usize = 256;
/// From a change to another try of a server that is down.
const AFTER_CHANGE: Duration = Duration::from_secs(1);

/// What a handle asks for.
#[derive(Debug)]
pub(crate) enum Intent {
    Start,
    Restart {
        reason: String,
        /// Told when the state says what came of it.
        done: oneshot::Sender<()>,
    },
    Progress(String),
    Fail(PreviewError),
    /// All pages in question answered well, and no error came since the state had this generation.
    Seen {
        generation: u64,
    },
    Stop {
        grace: Duration,
        done: oneshot::Sender<()>,
    },
}

/// Where wishes arrive: the handle's, in their order, and that somebody wants to see the site,
/// which the proxy says for every request and which counts once.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) intents: mpsc::Receiver<Intent>,
    pub(crate) retry: Arc<Notify>,
}

/// The driver.
pub(crate) struct DevServer {
    site: Arc<PreviewSite>,
    ground: Ground,
    inbox: Inbox,
    publish: watch::Sender<PreviewStatus>,
    restarts: Restarts,
    notes: Notes,
    /// What changes in the worktree, once a server was wanted.
    changes: Option<mpsc::Receiver<Change>>,
    /// Its events did not reach it: it looks at its files by itself.
    polls: bool,
    /// It was started anew for missing a change.
    was_deaf: bool,
    /// Has somebody a page that hears of no changes?
    deafness: watch::Receiver<bool>,
}

enum Phase {
    Idle,
    /// Wakes when somebody asks for the site.
    Asleep,
    Broken {
        restart_at: Option<Instant>,
    },
    Running(Box<Run>),
}

struct Run {
    process: ProcessHandle,
    since: Instant,
    output: Output,
    readers: Vec<JoinHandle<()>>,
    /// Ends with the word on readiness; none once it was given.
    proof: Option<ProofFuture>,
    /// What the server says of the site, once it listens.
    words: mpsc::Receiver<Word>,
    tell: mpsc::Sender<Word>,
    slot: Slot,
    truth: Truth,
}

type ProofFuture = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

enum Event {
    Intent(Intent),
    Proved(Result<(), String>),
    Ended(Exit),
    Said(Word),
    Changed(Change),
    /// What is known of the running server's honesty asks for a look.
    LookDue,
    StartDue,
    /// Another one needs the room.
    SleepDue,
    /// Somebody wants to see the site.
    Asked,
    /// Somebody has a page that hears of no changes, or nobody any more.
    Deaf(bool),
    /// No handle is left, or the program ends.
    Closing,
}

impl DevServer {
    pub(crate) fn new(
        site: Arc<PreviewSite>,
        ground: Ground,
        inbox: Inbox,
        publish: watch::Sender<PreviewStatus>,
        notes: Notes,
    ) -> Self {
        let restarts = Restarts::default();
        Self {
            site,
            ground,
            inbox,
            publish,
            restarts,
            deafness: notes.deafness(),
            notes,
            changes: None,
            polls: false,
            was_deaf: false,
        }
    }

    /// Runs until the last handle is dropped or the tasks are stopped; leaves no child behind.
    pub(crate) async fn drive(mut self) {
        let mut phase = Phase::Idle;
        loop {
            let event = self.next_event(&mut phase).await;
            if matches!(event, Event::Closing) {
                break;
            }
            phase = self.handle(phase, event).await;
        }
        self.inbox.intents.close();
        self.end(phase, GRACE).await;
        self.set(PreviewState::Off, Vec::new(), None, "");
        while let Some(intent) = self.inbox.intents.recv().await {
            drop(intent); // A waiting `stop` sees its sender go: there is no child any more.
        }
    }

    async fn next_event(&mut self, phase: &mut Phase) -> Event {
        let Inbox { intents, retry } = &mut self.inbox;
        let deafness = &mut self.deafness;
        let child = async {
            match phase {
                Phase::Idle | Phase::Asleep | Phase::Broken { restart_at: None } => {
                    std::future::pending().await
                }
                Phase::Broken {
                    restart_at: Some(at),
                } => {
                    sleep_until(*at).await;
                    Event::StartDue
                }
                Phase::Running(run) => match &mut run.proof {
                    Some(proof) => tokio::select! {
                        biased;
                        exit = run.process.wait() => Event::Ended(exit),
                        () = run.slot.is_wanted() => Event::SleepDue,
                        proved = proof => Event::Proved(proved),
                    },
                    None => tokio::select! {
                        biased;
                        exit = run.process.wait() => Event::Ended(exit),
                        () = run.slot.is_wanted() => Event::SleepDue,
                        Some(word) = run.words.recv() => Event::Said(word),
                        () = until(run.truth.due()) => Event::LookDue,
                    },
                },
            }
        };
        tokio::select! {
            biased;
            () = self.ground.tasks.token().cancelled() => Event::Closing,
            intent = intents.recv() => intent.map_or(Event::Closing, Event::Intent),
            event = child => event,
            Some(change) = next(&mut self.changes) => Event::Changed(change),
            // Taken in every phase, so that none is left over for a later one.
            () = retry.notified() => Event::Asked,
            Ok(()) = deafness.changed() => Event::Deaf(*deafness.borrow_and_update()),
        }
    }

    async fn handle(&mut self, phase: Phase, event: Event) -> Phase {
        match (event, phase) {
            (Event::Intent(Intent::Start), running @ Phase::Running(_)) => running,
            (Event::Intent(Intent::Start) | Event::StartDue, _)
            | (Event::Asked, Phase::Broken { .. } | Phase::Asleep) => self.start().await,
            (Event::Intent(Intent::Restart { reason, done }), phase) => {
                let phase = self.restart(phase, &reason).await;
                done.send(()).ok();
                phase
            }
            (Event::Intent(Intent::Fail(error)), phase) => {
                self.end(phase, GRACE).await;
                self.set(
                    PreviewState::Error,
                    vec![error],
                    None,
                    "The site can't be shown yet",
                );
                Phase::Broken { restart_at: None }
            }
            (Event::Intent(Intent::Stop { grace, done }), phase) => {
                // Off first: no request is sent to a server that is about to end.
                self.set(PreviewState::Off, Vec::new(), None, "");
                self.end(phase, grace).await;
                done.send(()).ok();
                Phase::Idle
            }
            (
                Event::Intent(Intent::Progress(text)),
                Phase::Idle | Phase::Asleep | Phase::Broken { .. },
            ) => {
                self.set(PreviewState::Starting, Vec::new(), None, &text);
                // What is prepared will be followed by a start; no restart runs into it.
                Phase::Idle
            }
            (Event::SleepDue, phase @ Phase::Running(_)) => {
                // First of all: no request is sent to a server that is about to end.
                self.set(
                    PreviewState::Asleep,
                    Vec::new(),
                    None,
                    "Asleep while other sites are looked at",
                );
                self.end(phase, GRACE).await;
                Phase::Asleep
            }
            (Event::Proved(Ok(())), Phase::Running(mut run)) => {
                let elapsed_ms = u64::try_from(run.since.elapsed().as_millis()).unwrap_or(u64::MAX);
                let port = self.site.port;
                tracing::info!(
                    slug = self.site.slug,
                    port,
                    elapsed_ms,
                    "the dev server is ready"
                );
                run.proof = None;
                self.set(PreviewState::Live, Vec::new(), Some(port), "");
                self.notes.last_page().begin();
                let notes = self.notes.clone();
                self.aside("preview warm-up", async move {
                    let first = ["/".to_owned()];
                    notes.ask_for(port, &first, probe::WARM_UP).await;
                });
                let (worktree, tell) = (self.site.worktree.clone(), run.tell.clone());
                let notes = self.notes.clone();
                self.aside("preview listener", hmr::listen(port, worktree, notes, tell));
                Phase::Running(run)
            }
            (Event::Proved(Err(why)), Phase::Running(run)) => {
                run.process.terminate(GRACE).await;
                self.broken(*run, None, Some(why)).await
            }
            (Event::Ended(exit), Phase::Running(run)) => self.broken(*run, Some(exit), None).await,
            (Event::Said(word), Phase::Running(mut run)) => {
                let reason = self.hear(word, &mut run);
                self.go_on(run, reason).await
            }
            (Event::LookDue, Phase::Running(mut run)) => {
                let reason = self.look_again(&mut run);
                self.go_on(run, reason).await
            }
            (Event::Changed(change), Phase::Running(mut run)) => {
                if run.proof.is_none() {
                    self.notice(&change, &mut run);
                }
                Phase::Running(run)
            }
            (Event::Intent(Intent::Seen { generation }), Phase::Running(mut run)) => {
                if run.proof.is_none() {
                    self.hear(Word::Fine { generation }, &mut run);
                }
                Phase::Running(run)
            }
            (Event::Deaf(is_deaf), Phase::Running(mut run)) => {
                self.note_deafness(is_deaf, &mut run);
                Phase::Running(run)
            }
            // Perhaps that was what it failed for. A turn says so itself, once it is done.
            (Event::Changed(_), Phase::Broken { restart_at }) if !self.notes.has_turn() => {
                let soon = Instant::now() + AFTER_CHANGE;
                Phase::Broken {
                    restart_at: Some(restart_at.map_or(soon, |at| at.min(soon))),
                }
            }
            (
                Event::Asked
                | Event::SleepDue
                | Event::LookDue
                | Event::Changed(_)
                | Event::Said(_)
                | Event::Intent(Intent::Progress(_) | Intent::Seen { .. })
                | Event::Deaf(_)
                | Event::Proved(_)
                | Event::Ended(_)
                | Event::Closing,
                phase,
            ) => phase,
        }
    }

    async fn go_on(&mut self, run: Box<Run>, reason: Option<truth::Reason>) -> Phase {
        match reason {
            None => Phase::Running(run),
            Some(reason) => self.restart(Phase::Running(run), &reason).await,
        }
    }

    async fn restart(&mut self, phase: Phase, reason: &str) -> Phase {
        tracing::info!(slug = self.site.slug, reason, "restarting the dev server");
        self.restarts = Restarts::default();
        self.set(
            PreviewState::Starting,
            Vec::new(),
            None,
            &format!("Restarting: {reason}"),
        );
        self.end(phase, GRACE).await;
        self.start().await
    }

    /// Does work beside the driver, at most as long as the program runs.
    fn aside(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let token = self.ground.tasks.token().clone();
        self.ground.tasks.spawn(name, async move {
            token.run_until_cancelled(work).await;
        });
    }

    async fn end(&mut self, phase: Phase, grace: Duration) {
        if let Phase::Running(run) = phase {
            let exit = run.process.terminate(grace).await;
            run.drain().await;
            tracing::info!(slug = self.site.slug, %exit, "the dev server was stopped");
        }
    }

    async fn start(&mut self) -> Phase {
        self.set(
            PreviewState::Starting,
            Vec::new(),
            None,
            "Starting the dev server",
        );
        match self.launch().await {
            Ok(run) => Phase::Running(Box::new(run)),
            Err(error) => {
                tracing::warn!(slug = self.site.slug, %error, "the dev server was not started");
                let message = error.to_string();
                self.set(
                    PreviewState::Error,
                    vec![PreviewError {
                        message: message.clone(),
                        ..PreviewError::default()
                    }],
                    None,
                    "",
                );
                let failure = Failure {
                    ran_for: Duration::ZERO,
                    code: None,
                    was_live: false,
                    text: message,
                };
                let restart_at = match error {
                    // The same package.json gives the same answer.
                    StartError::Site(_) => None,
                    StartError::Machine(_) => self.next_try(&failure),
                };
                Phase::Broken { restart_at }
            }
        }
    }

    async fn launch(&mut self) -> Result<Run, StartError> {
        if self.changes.is_none() {
            let (tell, changes) = mpsc::channel(CHANGES);
            self.changes = Some(changes);
            self.aside(
                "preview watch",
                eyes::watch(self.site.worktree.clone(), tell),
            );
        }
        let take = self.ground.slots.take(&self.notes);
        let token = self.ground.tasks.token();
        // Nobody waits for room when the program ends.
        let slot = token.run_until_cancelled(take).await.flatten();
        let slot = slot.ok_or_else(|| {
            StartError::Machine("there was no room for one more dev server".to_owned())
        })?;
        let (site, settings) = (self.site.clone(), self.ground.settings.clone());
        let (notes, polls) = (self.notes.clone(), self.polls);
        let prepared = blocking("preparing the dev server", DISK_DEADLINE, move || {
            notes.resolve_folders(&site);
            prepare(&site, &settings, polls)
        });
        let (spec, proof) = prepared
            .await
            .map_err(|e| StartError::Machine(e.to_string()))??;
        let since = Instant::now();
        let mut child = self
            .ground
            .launcher
            .spawn(spec)
            .await
            .map_err(|error| StartError::Machine(chain(&error)))?;
        let process = child.handle();
        drop(child.stdin.take());
        let (tell, words) = mpsc::channel(WORDS);
        let output = Output::new().telling(&self.site.worktree, tell.clone());
        let readers = vec![
            self.ground.tasks.spawn(
                "dev server stdout",
                output.clone().read(Stream::Stdout, child.stdout),
            ),
            self.ground.tasks.spawn(
                "dev server stderr",
                output.clone().read(Stream::Stderr, child.stderr),
            ),
        ];
        let proof = prove(process.clone(), self.site.port, proof, output.clone());
        Ok(Run {
            process,
            since,
            output,
            readers,
            proof: Some(Box::pin(proof)),
            words,
            tell,
            slot,
            truth: Truth::default(),
        })
    }

    /// The run is over though nobody asked: says why, and decides about the next.
    async fn broken(&mut self, run: Run, exit: Option<Exit>, why: Option<String>) -> Phase {
        let was_live = run.proof.is_none();
        let ran_for = run.since.elapsed();
        let output = run.output.clone();
        run.drain().await;
        let words = output.last_words();
        let was_killed = exit
            .is_some_and(|exit| exit.signal == Some(SIGKILL) || exit.code == Some(128 + SIGKILL));
        let ran_out = output.ran_out_of_memory() || was_killed;
        let cause = why.unwrap_or_else(|| match exit {
            Some(exit) if output.ran_out_of_memory() => {
                format!("the dev server ran out of memory ({exit})")
            }
            // Not by us: that is how a system takes memory back. (A shell says so by its status.)
            Some(exit) if was_killed => {
                format!("the dev server was ended, most likely for want of memory ({exit})")
            }
            Some(exit) => format!("the dev server ended by itself ({exit})"),
            None => "the dev server ended".to_owned(),
        });
        tracing::warn!(
            slug = self.site.slug,
            cause,
            was_live,
            "the dev server is down"
        );
        let mut error = error_from(&words, &self.site.worktree);
        // What is printed about memory is of no use to those who build the site.
        error.message = if ran_out || error.message.trim().is_empty() {
            cause
        } else {
            format!("{cause}\n{}", error.message)
        };
        let failure = Failure {
            ran_for,
            code: exit.and_then(|e| e.code),
            was_live,
            text: words,
        };
        let restart_at = self.next_try(&failure);
        let progress = match restart_at {
            Some(_) => "The dev server stopped; it is started again",
            None => "The dev server doesn't start",
        };
        self.set(PreviewState::Error, vec![error], None, progress);
        Phase::Broken { restart_at }
    }

    fn next_try(&mut self, failure: &Failure) -> Option<Instant> {
        match self.restarts.after(failure) {
            Next::RestartAfter(wait) => Some(Instant::now() + wait),
            Next::WaitToBeAsked => None,
        }
    }

    fn set(
        &self,
        state: PreviewState,
        errors: Vec<PreviewError>,
        upstream: Option<u16>,
        progress: &str,
    ) {
        self.publish.send_modify(|status| {
            let generation = status.generation + 1;
            *status = PreviewStatus {
                state,
                errors,
                upstream,
                generation,
                updates: status.updates,
                told_at: status.updates,
                progress: progress.to_owned(),
            };
        });
    }
}

pub(super) async fn until(due: Option<Instant>) {
    match due {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next(changes: &mut Option<mpsc::Receiver<Change>>) -> Option<Change> {
    match changes {
        Some(changes) => changes.recv().await,
        None => None,
    }
}

impl Run {
    /// Waits for the last lines, briefly: a grandchild may hold the pipes open.
    async fn drain(mut self) {
        for reader in &mut self.readers {
            if timeout(Duration::from_millis(500), &mut *reader)
                .await
                .is_err()
            {
                reader.abort();
            }
        }
    }
}
