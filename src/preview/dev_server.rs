//! The driver of one preview: owns the dev server's process from spawn to exit.
//!
//! It is `Idle` (nothing wanted), `Broken` (a start failed or the server ended; perhaps a restart
//! is due) or `Running` (a child lives; live once it has proved itself). Events come from the
//! handle, the child and the clock; whether a failure is tried again is decided in `restart`.

use std::{
    ffi::OsString,
    future::Future,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    PreviewSettings, PreviewSite,
    command::{DevCommand, Proof, plan},
    hmr::{self, Word},
    notes::Notes,
    output::{Output, Stream, error_from},
    port::is_free,
    probe,
    restart::{Failure, Next, Restarts},
};
use crate::{
    domain::{PreviewError, PreviewState, PreviewStatus},
    process::{Exit, Launcher, Ports, ProcessHandle, Profile, Spec, Stdin},
    task::{Tasks, blocking},
};

/// From spawn to proven ready.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// From SIGTERM to SIGKILL where the caller names no grace. Astro ends in 30 to 70 ms.
const GRACE: Duration = Duration::from_secs(5);
/// How long a fresh start waits for a port that the server before it still holds.
const PORT_WAIT: Duration = Duration::from_secs(3);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// Errors that are kept, the newest.
const MAX_ERRORS: usize = 20;
/// Words that wait for the driver, which is busy for moments only while a server runs.
const WORDS: usize = 64;
const MAX_PACKAGE_JSON: u64 = 1024 * 1024;

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
    settings: Arc<PreviewSettings>,
    launcher: Launcher,
    tasks: Tasks,
    inbox: Inbox,
    publish: watch::Sender<PreviewStatus>,
    restarts: Restarts,
    notes: Notes,
}

enum Phase {
    Idle,
    Broken { restart_at: Option<Instant> },
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
}

type ProofFuture = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

enum Event {
    Intent(Intent),
    Proved(Result<(), String>),
    Ended(Exit),
    Said(Word),
    StartDue,
    /// Somebody wants to see the site.
    Asked,
    /// No handle is left, or the program ends.
    Closing,
}

impl DevServer {
    pub(crate) fn new(
        site: Arc<PreviewSite>,
        settings: Arc<PreviewSettings>,
        launcher: Launcher,
        tasks: Tasks,
        inbox: Inbox,
        publish: watch::Sender<PreviewStatus>,
        notes: Notes,
    ) -> Self {
        let restarts = Restarts::default();
        Self {
            site,
            settings,
            launcher,
            tasks,
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
                Phase::Idle | Phase::Broken { restart_at: None } => std::future::pending().await,
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
                        proved = proof => Event::Proved(proved),
                    },
                    None => tokio::select! {
                        biased;
                        exit = run.process.wait() => Event::Ended(exit),
                        Some(word) = run.words.recv() => Event::Said(word),
                    },
                },
            }
        };
        tokio::select! {
            biased;
            () = self.tasks.token().cancelled() => Event::Closing,
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
            | (Event::Asked, Phase::Broken { .. }) => self.start().await,
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
            (Event::Intent(Intent::Progress(text)), Phase::Idle | Phase::Broken { .. }) => {
                self.set(PreviewState::Starting, Vec::new(), None, &text);
                // What is prepared will be followed by a start; no restart runs into it.
                Phase::Idle
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
                let token = self.tasks.token().clone();
                self.tasks.spawn("preview warm-up", async move {
                    token.run_until_cancelled(probe::warm_up(port)).await;
                });
                let (worktree, tell) = (self.site.worktree.clone(), run.tell.clone());
                let token = self.tasks.token().clone();
                self.tasks.spawn("preview listener", async move {
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
        let token = self.tasks.token().clone();
        self.tasks.spawn("preview check", async move {
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
        let (site, settings) = (self.site.clone(), self.settings.clone());
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
            .launcher
            .spawn(spec)
            .await
            .map_err(|error| StartError::Machine(chain(&error)))?;
        let process = child.handle();
        drop(child.stdin.take());
        let (tell, words) = mpsc::channel(WORDS);
        let output = Output::new().telling(&self.site.worktree, tell.clone());
        let readers = vec![
            self.tasks.spawn(
                "dev server stdout",
                output.clone().read(Stream::Stdout, child.stdout),
            ),
            self.tasks.spawn(
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

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// Something in the site has to change first.
    #[error("{0}")]
    Site(String),
    /// It may work later.
    #[error("{0}")]
    Machine(String),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Reads the site's script and readies the disk. Blocking.
fn prepare(site: &PreviewSite, settings: &PreviewSettings) -> Result<(Spec, Proof), StartError> {
    let machine = |what: &'static str| {
        move |error: io::Error| StartError::Machine(format!("{what}: {}", error.kind()))
    };
    let package = read_small(&site.worktree.join("package.json")).map_err(|error| {
        StartError::Site(match error.kind() {
            io::ErrorKind::NotFound => "this site has no package.json".to_owned(),
            kind => format!("package.json can't be read: {kind}"),
        })
    })?;
    let command = plan(&package).map_err(|error| StartError::Site(error.to_string()))?;
    // Written by servers that were not told to ignore it, and never removed by any.
    std::fs::remove_file(site.worktree.join(".astro/dev.json")).ok();
    let private = settings.private_root.join(&site.slug);
    let (home, tmp) = (private.join("home"), private.join("tmp"));
    for folder in [&home, &tmp] {
        std::fs::create_dir_all(folder).map_err(machine("making the dev server's folders"))?;
    }
    let (program, mut args) = program(&command, &site.worktree, &settings.node)?;
    args.extend(command.args(site.port));
    await_port(site.port)?;
    let mut profile = Profile::system();
    // The program may be a link out of the folder that PATH names.
    for node in [
        Some(settings.node.clone()),
        settings.node.canonicalize().ok(),
    ] {
        let folder = node.as_deref().and_then(Path::parent);
        profile.read.extend(folder.map(Path::to_owned));
    }
    profile.read.extend(site.readable.iter().cloned());
    profile
        .write
        .extend([site.worktree.clone(), home.clone(), tmp.clone()]);
    profile.write.extend(site.writable.iter().cloned());
    // Sites fetch from APIs while they render; they may ask themselves too.
    profile.connect = Ports::Only(vec![443, site.port]);
    profile.bind = Ports::Only(vec![site.port]);
    let spec = Spec {
        name: "dev server",
        program,
        args,
        env: environment(site, settings, &home, &tmp),
        cwd: site.worktree.clone(),
        stdin: Stdin::Null,
        profile,
    };
    Ok((spec, command.proof()))
}

/// What is started, and the arguments before the command's own.
fn program(
    command: &DevCommand,
    worktree: &Path,
    node: &Path,
) -> Result<(PathBuf, Vec<OsString>), StartError> {
    let Some(bin) = command.bin() else {
        return Ok(("/bin/sh".into(), vec!["-c".into()]));
    };
    let path = format!("node_modules/.bin/{bin}");
    let kind = worktree.join(&path).symlink_metadata().map_err(|_| {
        StartError::Site(format!(
            "the site's `dev` script runs `{bin}`, which isn't installed: is it among the \
             dependencies in package.json?"
        ))
    })?;
    // npm and yarn link to the program; pnpm writes a shell script that ends in `exec node`.
    let interpreter = if kind.is_symlink() {
        node.to_owned()
    } else {
        "/bin/sh".into()
    };
    Ok((interpreter, vec![path.into()]))
}

/// All that a dev server gets to see. Nothing of the supervisor's own environment: variables that
/// tell of an agent send Astro 7 to the background and turn on Vite's console forwarding.
fn environment(
    site: &PreviewSite,
    settings: &PreviewSettings,
    home: &Path,
    tmp: &Path,
) -> Vec<(OsString, OsString)> {
    let mut path = site.worktree.join("node_modules/.bin").into_os_string();
    for folder in settings.node.parent().into_iter().chain([
        Path::new("/usr/local/bin"),
        Path::new("/usr/bin"),
        Path::new("/bin"),
    ]) {
        path.push(":");
        path.push(folder);
    }
    let port = site.port.to_string();
    let mut env: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), path),
        ("HOME".into(), home.into()),
        ("TMPDIR".into(), tmp.into()),
    ];
    env.extend(
        [
            ("LANG", "C.UTF-8"),
            ("HOST", "127.0.0.1"),
            ("PORT", port.as_str()),
            // With any other value Vite opens the HMR socket and never says a word on it.
            ("NODE_ENV", "development"),
            ("NO_COLOR", "1"),
            ("ASTRO_TELEMETRY_DISABLED", "1"),
            ("ASTRO_DISABLE_UPDATE_CHECK", "true"),
        ]
        .map(|(name, value)| (name.into(), value.into())),
    );
    if !site.hosts.is_empty() {
        env.push((
            "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS".into(),
            site.hosts.join(",").into(),
        ));
    }
    env
}

/// Reads a file that the agent may have replaced by anything: only a regular one, only so much.
fn read_small(path: &Path) -> io::Result<String> {
    if !path.symlink_metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_PACKAGE_JSON)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Waits for the port, which a server that was just ended may still hold. Blocking.
fn await_port(port: u16) -> Result<(), StartError> {
    let deadline = std::time::Instant::now() + PORT_WAIT;
    while !is_free(port) {
        if std::time::Instant::now() > deadline {
            return Err(StartError::Machine(format!(
                "port {port} of this preview is in use by another program"
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends well once the listener on `port` is our child's and answers; ends badly when it went to
/// another port or the deadline passed. What it prints is no proof.
async fn prove(
    process: ProcessHandle,
    port: u16,
    proof: Proof,
    output: Output,
) -> Result<(), String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let deadline = Instant::now() + START_DEADLINE;
    while Instant::now() < deadline {
        if output.moved_port() {
            return Err(format!("the dev server went to another port than {port}"));
        }
        if TcpStream::connect(address).await.is_ok() {
            let child = process.clone();
            let ours = blocking(
                "looking for the listener's owner",
                DISK_DEADLINE,
                move || child.owns_listener(address),
            );
            if ours.await.unwrap_or(false) && probe::answers(port, proof).await {
                return Ok(());
            }
        }
        sleep(Duration::from_millis(25)).await;
    }
    Err(format!(
        "the dev server did not answer on port {port} within {} s",
        START_DEADLINE.as_secs()
    ))
}
