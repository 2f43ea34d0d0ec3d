//! The driver of one preview: owns the dev server's process from spawn to exit.
//!
//! It is `Idle` (nothing wanted), `Asleep` (another one needed the room), `Broken` (a start failed or the server ended; perhaps a restart
//! is due) or `Running` (a child lives; live once it has proved itself). Events come from the
//! handle, the child and the clock; whether a failure is tried again is decided in `restart`.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Ground, PreviewSite,
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

/// From SIGTERM to SIGKILL where the caller names no grace. Astro ends in 30 to 70 ms.
const GRACE: Duration = Duration::from_secs(5);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// Errors that are kept, the newest.
const MAX_ERRORS: usize = 20;
/// Words that wait for the driver, which is busy for moments only while a server runs.
const WORDS: usize = 64;

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
}

type ProofFuture = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

enum Event {
    Intent(Intent),
    Proved(Result<(), String>),
    Ended(Exit),
    Said(Word),
    StartDue,
    /// Another one needs the room.
    SleepDue,
    /// Somebody wants to see the site.
    Asked,
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
            notes,
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
                    },
                },
            }
        };
        tokio::select! {
            biased;
            () = self.ground.tasks.token().cancelled() => Event::Closing,
            intent = intents.recv() => intent.map_or(Event::Closing, Event::Intent),
            event = child => event,
            // Taken in every phase, so that none is left over for a later one.
            () = retry.notified() => Event::Asked,
        }
    }

    async fn handle(&mut self, phase: Phase, event: Event) -> Phase {
        match (event, phase) {
            (Event::Intent(Intent::Start), running @ Phase::Running(_)) => running,
            (Event::Intent(Intent::Start) | Event::StartDue, _)
            | (Event::Asked, Phase::Broken { .. } | Phase::Asleep) => self.start().await,
            (Event::Intent(Intent::Restart { reason, done }), phase) => {
                tracing::info!(slug = self.site.slug, reason, "restarting the dev server");
                self.restarts = Restarts::default();
                self.set(
                    PreviewState::Starting,
                    Vec::new(),
                    None,
                    &format!("Restarting: {reason}"),
                );
                self.end(phase, GRACE).await;
                let phase = self.start().await;
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
                let token = self.ground.tasks.token().clone();
                self.ground.tasks.spawn("preview warm-up", async move {
                    token.run_until_cancelled(probe::warm_up(port)).await;
                });
                let (worktree, tell) = (self.site.worktree.clone(), run.tell.clone());
                let token = self.ground.tasks.token().clone();
                self.ground.tasks.spawn("preview listener", async move {
                    token
                        .run_until_cancelled(hmr::listen(port, worktree, tell))
                        .await;
                });
                Phase::Running(run)
            }
            (Event::Proved(Err(why)), Phase::Running(run)) => {
                run.process.terminate(GRACE).await;
                self.broken(*run, None, Some(why)).await
            }
            (Event::Ended(exit), Phase::Running(run)) => self.broken(*run, Some(exit), None).await,
            (Event::Said(word), Phase::Running(run)) => {
                self.hear(word, &run);
                Phase::Running(run)
            }
            (
                Event::Asked
                | Event::SleepDue
                | Event::Said(_)
                | Event::Intent(Intent::Progress(_))
                | Event::Proved(_)
                | Event::Ended(_)
                | Event::Closing,
                phase,
            ) => phase,
        }
    }

    /// Takes in what the server says while it serves.
    fn hear(&mut self, word: Word, run: &Run) {
        let mut is_to_check = false;
        self.publish.send_if_modified(|status| {
            match word {
                Word::Updated => {
                    status.updates += 1;
                    is_to_check = status.state == PreviewState::Error;
                }
                Word::Error(error) => {
                    // A browser that tries again makes the server say it again.
                    let is_known = status.errors.contains(&error);
                    if is_known && status.told_at == status.updates {
                        return false;
                    }
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
                }
                Word::Fine { generation } if generation == status.generation => {
                    status.errors.clear();
                    status.state = PreviewState::Live;
                }
                Word::Fine { .. } => return false,
            }
            status.generation += 1;
            true
        });
        if is_to_check {
            self.check(run);
        }
    }

    /// Nothing says that an error is gone: after a change the pages that it may have been on are
    /// asked for, once what comes late has come.
    fn check(&self, run: &Run) {
        let (status, notes) = (self.publish.subscribe(), self.notes.clone());
        let (port, tell) = (self.site.port, run.tell.clone());
        let check = async move {
            sleep(probe::LATE).await;
            // Only now: an error of before the change may have come after it.
            let (generation, pages) = {
                let status = status.borrow();
                let files = status
                    .errors
                    .iter()
                    .filter_map(|error| error.file.as_deref());
                (status.generation, notes.last_page().and_pages_of(files))
            };
            let answers = probe::pages(port, &pages, probe::PATIENCE).await;
            if answers
                .iter()
                .all(|status| status.is_some_and(|code| !code.is_server_error()))
            {
                sleep(probe::LATE).await;
                tell.send(Word::Fine { generation }).await.ok();
            }
        };
        let token = self.ground.tasks.token().clone();
        self.ground.tasks.spawn("preview check", async move {
            token.run_until_cancelled(check).await;
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

    async fn launch(&self) -> Result<Run, StartError> {
        let slot = self.ground.slots.take(&self.notes).await.ok_or_else(|| {
            StartError::Machine("there was no room for one more dev server".to_owned())
        })?;
        let (site, settings) = (self.site.clone(), self.ground.settings.clone());
        let notes = self.notes.clone();
        let prepared = blocking("preparing the dev server", DISK_DEADLINE, move || {
            notes.resolve_folders(&site);
            prepare(&site, &settings)
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
        })
    }

    /// The run is over though nobody asked: says why, and decides about the next.
    async fn broken(&mut self, run: Run, exit: Option<Exit>, why: Option<String>) -> Phase {
        let was_live = run.proof.is_none();
        let ran_for = run.since.elapsed();
        let output = run.output.clone();
        run.drain().await;
        let words = output.last_words();
        let cause = why.unwrap_or_else(|| match exit {
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
        error.message = if error.message.trim().is_empty() {
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
