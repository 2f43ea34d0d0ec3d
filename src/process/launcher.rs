//! Starts children through wardens, and keeps those hearing that the supervisor lives.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsString,
    fmt, fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    pin::pin,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicU64, mpsc},
    time::Duration,
};

use nix::{
    sys::{
        signal::{self, Signal},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    ProcessError,
    child::{self, Child, Connection, Exit, ProcessHandle, Status},
    procfs,
    sandbox::{Confinement, Means, Profile},
    uid,
    wire::{self, Command, Setup, Step, Wire},
};
use crate::task::Tasks;

/// Two execs of a binary that is in memory already: milliseconds, seconds on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);
/// After a program's exit nobody is left who could write; what is in the pipes is read in that.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Beats are this far apart at most.
const BEAT: Duration = Duration::from_secs(1);

/// What to start, and how.
pub struct Spec {
    /// What it is to us, for logs.
    pub name: &'static str,
    /// A path, or a name that is looked for in the `PATH` of `env`.
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// The whole environment: nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    pub cwd: PathBuf,
    pub stdin: Stdin,
    pub profile: Profile,
}

impl fmt::Debug for Spec {
    /// Leaves out arguments and environment, which may hold tokens and instructions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spec")
            .field("name", &self.name)
            .field("program", &self.program)
            .field("cwd", &self.cwd)
            .finish_non_exhaustive()
    }
}

/// A program's standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// `/dev/null`.
    Null,
    /// A pipe of which [`Child`] holds the other end.
    Piped,
}

/// Whether profiles are enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfinementMode {
    /// As far as the kernel can.
    Auto,
    /// As on a kernel that has no Landlock.
    WithoutLandlock,
    /// Not at all: for tests and debugging.
    Off,
}

/// What a short program ([`Launcher::run`]) did.
#[derive(Debug, Clone)]
pub struct Output {
    pub exit: Exit,
    /// The end of its standard output, at most as long as asked for.
    pub stdout: String,
    /// The same of its standard error.
    pub stderr: String,
    /// Whether the beginning of either was dropped.
    pub truncated: bool,
}

/// Starts programs, confined, each under a warden of its own. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Launcher {
    wardens: Arc<Wardens>,
    tasks: Tasks,
    binary: Arc<Path>,
    silence: Duration,
    means: Means,
    confinement: Confinement,
}

impl Launcher {
    /// Starts the heartbeat. Children end by themselves when it stops for `silence`, which is
    /// half a lease.
    ///
    /// # Errors
    /// [`ProcessError::Heartbeat`] if no thread can be had.
    pub fn start(silence: Duration, mode: ConfinementMode) -> Result<Self, ProcessError> {
        Self::start_with_binary(Path::new("/proc/self/exe"), silence, mode)
    }

    /// The same where greenroom's binary is another than the one that runs: in tests.
    ///
    /// # Errors
    /// As [`Launcher::start`].
    pub fn start_with_binary(
        binary: &Path,
        silence: Duration,
        mode: ConfinementMode,
    ) -> Result<Self, ProcessError> {
        let means = match mode {
            ConfinementMode::Auto => Means::detect(true),
            ConfinementMode::WithoutLandlock => Means::detect(false),
            ConfinementMode::Off => Means::NONE,
        };
        if means.owners {
            uid::let_others_read();
        }
        let interval = BEAT.min(silence / 5);
        let wardens =
            Wardens::start(interval).map_err(|source| ProcessError::Heartbeat { source })?;
        Ok(Self {
            wardens,
            tasks: Tasks::new(),
            binary: binary.into(),
            silence,
            means,
            confinement: Confinement::by(means),
        })
    }

    /// Does each program run as the owner of its folder? Then folders have to be handed over: see
    /// [`crate::owner`].
    pub fn runs_as_owners(&self) -> bool {
        self.means.owners
    }

    /// The same without that, where the owners could not reach their folders.
    pub fn without_owners(mut self) -> Self {
        self.means.owners = false;
        self.confinement = Confinement::by(self.means);
        self
    }

    /// What holds the programs that are started.
    pub fn confinement(&self) -> Confinement {
        self.confinement
    }

    /// Starts a program; returns once it runs.
    ///
    /// # Errors
    /// [`ProcessError::Start`], [`ProcessError::EnterFolder`] or [`ProcessError::Confine`] if it
    /// can't be, [`ProcessError::Launch`] if its warden can't, [`ProcessError::Stopped`] after
    /// [`Launcher::stop`].
    pub async fn spawn(&self, spec: Spec) -> Result<Child, ProcessError> {
        if self.tasks.token().is_cancelled() {
            return Err(ProcessError::Stopped);
        }
        let program = program_name(&spec.program);
        let name = spec.name;
        let mut child = self
            .launch(spec, &program)
            .map_err(|source| ProcessError::Launch {
                program: program.clone(),
                source,
            })?;

        let mut status = child.handle.connection.status.clone();
        let decided = timeout(START_LIMIT, status.wait_for(Status::is_decided)).await;
        let status = match decided {
            Ok(Ok(status)) => status.clone(),
            _ => Status::default(),
        };
        if let Some(pid) = status.started {
            tracing::debug!(child = name, program, pid, "started a program");
            child.handle.pid = pid;
            return Ok(child);
        }
        let Some(failure) = status.failure else {
            let source = io::ErrorKind::TimedOut.into();
            return Err(ProcessError::Launch { program, source });
        };
        let (step, source) = (failure.step, failure.into_io());
        Err(match step {
            Step::Launch => ProcessError::Launch { program, source },
            Step::EnterFolder => ProcessError::EnterFolder { program, source },
            Step::Confine => ProcessError::Confine { program, source },
            Step::Start => ProcessError::Start { program, source },
        })
    }

    /// Starts the warden and the task that hears it. The program's id is not known yet.
    fn launch(&self, spec: Spec, program: &str) -> io::Result<Child> {
        let (ours, theirs) = Wire::pair()?;
        let (stdin, input): (OwnedFd, _) = match spec.stdin {
            Stdin::Null => (fs::File::open("/dev/null")?.into(), None),
            Stdin::Piped => {
                let (reader, writer) = io::pipe()?;
                (
                    reader.into(),
                    Some(pipe::Sender::from_owned_fd(writer.into())?),
                )
            }
        };
        let setup = Setup {
            cwd: spec.cwd,
            silence_ms: u64::try_from(self.silence.as_millis()).unwrap_or(u64::MAX / 2),
            profile: spec.profile,
            means: self.means,
        };
        // It waits in the socket: a warden that starts has its orders.
        ours.send_setup(&setup, stdin.as_fd())?;

        #[expect(clippy::disallowed_methods, reason = "the room that starts processes")]
        let mut command = tokio::process::Command::new(&*self.binary);
        command
            .args([wire::CHILD, wire::TEND])
            .arg(&spec.program)
            .args(spec.args)
            .env_clear()
            .envs(spec.env)
            .current_dir("/")
            .stdin(theirs.into_fd())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A terminal's interrupt is for us alone; we end the children in order.
            .process_group(0);
        let reports = ours.reports()?;
        let wire = Arc::new(ours);
        let mut warden = self.wardens.adopt(&wire, || command.spawn())?;
        // Its copy of the socket must be the only one, or the end of it would never come.
        drop(command);

        let pid = warden.id().map_or(0, u32::cast_signed);
        let streams = warden.stdout.take().zip(warden.stderr.take());
        let (sender, status) = watch::channel(Status::default());
        let connection = Arc::new(Connection {
            program: program.to_owned(),
            warden: pid,
            wire,
            status,
            next_sweep: AtomicU64::new(0),
            wardens: self.wardens.clone(),
        });
        let attended = child::attend(
            program.to_owned(),
            reports,
            warden,
            sender,
            self.wardens.clone(),
        );
        // The tracker waits for it; nobody else has to.
        drop(self.tasks.spawn(spec.name, attended));
        let (stdout, stderr) = streams.expect("both were asked for");
        let handle = ProcessHandle { connection, pid: 0 };
        Ok(Child {
            stdin: input,
            stdout,
            stderr,
            handle,
        })
    }

    /// Runs a short program to its end, keeping at most `max_output` bytes of each stream: the
    /// last ones. What the program's status means is the caller's business.
    ///
    /// Dropping the future ends the program.
    ///
    /// # Errors
    /// As [`Launcher::spawn`], and [`ProcessError::TimedOut`] past the deadline, when the program
    /// was killed.
    pub async fn run(
        &self,
        spec: Spec,
        deadline: Duration,
        max_output: usize,
    ) -> Result<Output, ProcessError> {
        let program = program_name(&spec.program);
        let Child {
            stdin,
            stdout,
            stderr,
            handle,
        } = self.spawn(spec).await?;
        drop(stdin);
        let (mut out, mut err) = (Tail::new(max_output), Tail::new(max_output));
        let exit = {
            let mut reading = pin!(async { tokio::join!(out.fill(stdout), err.fill(stderr)) });
            let mut late = pin!(sleep(deadline));
            let mut has_read = false;
            let exit = loop {
                tokio::select! {
                    _ = &mut reading, if !has_read => has_read = true,
                    exit = handle.wait() => break Some(exit),
                    () = &mut late => break None,
                }
            };
            if exit.is_none() {
                handle.kill().await;
            }
            if !has_read {
                timeout(LAST_WORDS, reading).await.ok();
            }
            exit
        };
        let truncated = out.truncated || err.truncated;
        let (stdout, stderr) = (out.into_text(), err.into_text());
        match exit {
            Some(exit) => Ok(Output {
                exit,
                stdout,
                stderr,
                truncated,
            }),
            None => Err(ProcessError::TimedOut {
                program,
                deadline,
                stderr,
            }),
        }
    }

    /// Reaps what fell to this process as PID 1 or subreaper, and leaves its own children to
    /// those who wait for them. Returns how many. To be called on SIGCHLD and every second or so.
    ///
    /// Reads `/proc`: call it through [`crate::task::blocking`].
    pub fn reap_orphans(&self) -> usize {
        let us = std::process::id().cast_signed();
        // Under the lock: a warden that is just being started is not in the list yet.
        let live = self.wardens.live();
        procfs::processes()
            .into_iter()
            .filter(|process| process.is_zombie && process.parent == us)
            .filter(|process| !live.contains(&process.pid))
            .filter(|process| {
                waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG)).is_ok()
            })
            .count()
    }

    /// SIGTERM to what fell to this process as PID 1: nobody else will tell it. Reads `/proc`.
    pub fn terminate_orphans(&self) {
        for orphan in self.orphans() {
            for pid in [orphan].into_iter().chain(procfs::descendants(orphan)) {
                signal::kill(Pid::from_raw(pid), Signal::SIGTERM).ok();
            }
        }
    }

    /// Is any of them still running? Reads `/proc`.
    pub fn has_orphans(&self) -> bool {
        !self.orphans().is_empty()
    }

    fn orphans(&self) -> Vec<i32> {
        let us = std::process::id().cast_signed();
        let live = self.wardens.live();
        procfs::processes()
            .into_iter()
            .filter(|process| !process.is_zombie && process.parent == us)
            .map(|process| process.pid)
            .filter(|pid| !live.contains(pid))
            .collect()
    }

    /// Starts nothing more, terminates all that runs, and waits for the end of it.
    /// Returns whether all ended.
    pub async fn stop(&self, grace: Duration) -> bool {
        self.tasks.cancel();
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX / 2);
        for wire in self.wardens.wires() {
            wire.send(&Command::Terminate { grace_ms }).ok();
        }
        self.tasks
            .stop(grace.saturating_add(Duration::from_secs(2)))
            .await
    }
}

/// The wardens that were started and not yet reaped, and the heartbeat that keeps them going.
#[derive(Debug)]
pub(super) struct Wardens {
    /// By process id. Held while one is started, so that no reaper meets one it does not know.
    live: Mutex<HashSet<i32>>,
    /// What the heartbeat goes to: apart, so that it never waits for a start.
    wires: Arc<Mutex<Vec<Weak<Wire>>>>,
    /// Dropped, it ends the heartbeat's thread.
    _stop: mpsc::Sender<()>,
}

impl Wardens {
    fn start(interval: Duration) -> io::Result<Arc<Self>> {
        let (stop, stopped) = mpsc::channel::<()>();
        let wires = Arc::new(Mutex::new(Vec::<Weak<Wire>>::new()));
        let beaten = wires.clone();
        // A thread of its own that touches no disk and no runtime: whatever is stuck, it beats.
        std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                while stopped.recv_timeout(interval) == Err(mpsc::RecvTimeoutError::Timeout) {
                    for wire in upgrade(&beaten) {
                        // A full queue means a stopped warden; the next beat tries again.
                        wire.send(&Command::Beat).ok();
                    }
                }
            })?;
        Ok(Arc::new(Self {
            live: Mutex::default(),
            wires,
            _stop: stop,
        }))
    }

    fn live(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wires(&self) -> Vec<Arc<Wire>> {
        upgrade(&self.wires)
    }

    fn adopt(
        &self,
        wire: &Arc<Wire>,
        start: impl FnOnce() -> io::Result<tokio::process::Child>,
    ) -> io::Result<tokio::process::Child> {
        let mut live = self.live();
        let warden = start()?;
        live.insert(warden.id().map_or(0, u32::cast_signed));
        self.wires
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(wire));
        Ok(warden)
    }

    pub(super) fn forget(&self, pid: i32) {
        self.live().remove(&pid);
    }

    /// Does something to a warden that is not reaped yet, so that its number is its own.
    pub(super) fn while_owned(&self, pid: i32, work: impl FnOnce()) {
        let live = self.live();
        if live.contains(&pid) {
            work();
        }
    }
}

/// Those that still are; the others are struck off.
fn upgrade(wires: &Mutex<Vec<Weak<Wire>>>) -> Vec<Arc<Wire>> {
    let mut wires = wires.lock().unwrap_or_else(PoisonError::into_inner);
    wires.retain(|wire| wire.strong_count() > 0);
    wires.iter().filter_map(Weak::upgrade).collect()
}

fn program_name(program: &Path) -> String {
    program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// The last bytes of a stream.
struct Tail {
    bytes: VecDeque<u8>,
    limit: usize,
    truncated: bool,
}

impl Tail {
    fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
            truncated: false,
        }
    }

    /// Reads to the end, or to an error, which on a pipe is as good.
    async fn fill(&mut self, mut stream: impl AsyncRead + Unpin) {
        let mut chunk = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = stream.read(&mut chunk).await {
            self.push(&chunk[..length]);
        }
    }

    fn push(&mut self, chunk: &[u8]) {
        let excess = (self.bytes.len() + chunk.len()).saturating_sub(self.limit);
        self.truncated |= excess > 0;
        self.bytes.drain(..excess.min(self.bytes.len()));
        self.bytes
            .extend(&chunk[chunk.len().saturating_sub(self.limit)..]);
    }

    fn into_text(self) -> String {
        String::from_utf8_lossy(&Vec::from(self.bytes)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::new(4);
        tail.push(b"ab");
        assert!(!tail.truncated);
        tail.push(b"cde");
        assert!(tail.truncated);
        tail.push(b"0123456789");
        assert_eq!(tail.into_text(), "6789");
    }

    #[test]
    fn a_specs_debug_form_holds_no_secret() {
        let spec = Spec {
            name: "test",
            program: "x".into(),
            args: vec!["hidden".into()],
            env: vec![("TOKEN".into(), "hidden".into())],
            cwd: "/".into(),
            stdin: Stdin::Null,
            profile: Profile::unconfined(),
        };
        assert!(!format!("{spec:?}").contains("hidden"));
    }
}
