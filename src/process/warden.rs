//! The first stage of a child: a tiny single-threaded parent that outlives the supervisor by
//! seconds and the program by nothing.
//!
//! It starts the second stage, reaps whatever falls to it as child subreaper, obeys the
//! supervisor's socket, and does not exit before its last descendant did.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io,
    os::fd::AsFd,
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout},
    sys::{
        prctl,
        signal::{self, SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    child::Exit,
    procfs,
    wire::{self, Command, Failure, Opening, Report, Setup, Step, Wire},
};

/// SIGTERM to SIGKILL once the supervisor is gone; shorter where a lease is.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);
/// How often the tree is looked at while something in it has to die.
const TICK: Duration = Duration::from_millis(10);
/// The same once the exit was reported: only a process stuck in the kernel is left by then.
const SLOW_TICK: Duration = Duration::from_millis(500);
/// A descendant that SIGKILL does not end (stuck in the kernel) holds up the report so long.
const REPORT_WAIT: Duration = Duration::from_secs(5);
/// A sweep that is not done by then says so.
const SWEEP_LIMIT: Duration = Duration::from_secs(3);

/// Starts the program and tends it to its end.
pub(super) fn tend(program: OsString, args: Vec<OsString>) -> ExitCode {
    close_inherited();
    let Ok(control) = Wire::from_stdin() else {
        return ExitCode::from(2);
    };
    match Warden::start(&control, program, args) {
        Ok(warden) => warden.run(control),
        Err(error) => {
            control
                .send(&Report::Failed(Failure::new(Step::Launch, &error)))
                .ok();
        }
    }
    ExitCode::SUCCESS
}

/// Closes what whoever started the supervisor left open: nothing of it is the program's business.
fn close_inherited() {
    let Ok(folder) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let inherited: Vec<i32> = folder
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in inherited {
        // The folder's own is closed by now.
        nix::unistd::close(fd).ok();
    }
}

struct Warden {
    /// The second stage: the program, or its broker and parent, which ends as the program does.
    child: Pid,
    program: Pid,
    /// To the second stage, until it became the program or said why not.
    opening: Option<Wire>,
    signals: SignalFd,
    silence: Duration,
    last_word: Instant,
    /// The supervisor is gone or silent; there is no way back from it.
    is_orphan: bool,
    /// When everything is killed, once that was asked for.
    kill_at: Option<Instant>,
    sweep: Option<Sweep>,
    exited: Option<(Exit, Instant)>,
    failure: Option<Failure>,
    has_reported: bool,
}

struct Sweep {
    id: u64,
    until: Instant,
}

impl Warden {
    fn start(control: &Wire, program: OsString, args: Vec<OsString>) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        // The program has our uid and may not be confined: keep it out of our memory.
        prctl::set_dumpable(false)?;
        // Only the socket ends us. A mask, as an ignored signal would stay ignored after exec.
        SigSet::all().thread_block()?;
        let mut child_signal = SigSet::empty();
        child_signal.add(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&child_signal, flags)?;

        let (setup, stdin) = control.receive_setup()?;
        let (ours, theirs) = Wire::pair()?;
        ours.send_setup(&setup, stdin.as_fd())?;
        #[expect(clippy::disallowed_methods, reason = "the room that starts processes")]
        let child = std::process::Command::new("/proc/self/exe")
            .args([wire::CHILD, wire::EXEC])
            .arg(program)
            .args(args)
            .stdin(theirs.into_fd())
            .spawn()?;
        let child = Pid::from_raw(child.id().cast_signed());
        // The program's streams and the socket's copy are not ours to hold open.
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;

        let Setup { silence_ms, .. } = setup;
        Ok(Self {
            child,
            program: child,
            opening: Some(ours),
            signals,
            silence: Duration::from_millis(silence_ms),
            last_word: Instant::now(),
            is_orphan: false,
            kill_at: None,
            sweep: None,
            exited: None,
            failure: None,
            has_reported: false,
        })
    }

    fn run(mut self, control: Wire) {
        let mut control = Some(control);
        loop {
            self.hear_program(control.as_ref());
            let is_connected = control
                .as_ref()
                .is_some_and(|control| self.hear_commands(control));
            if !is_connected {
                control = None;
            }
            let is_alone = self.reap();
            let now = Instant::now();
            if !self.is_orphan && (control.is_none() || now >= self.last_word + self.silence) {
                self.is_orphan = true;
                for pid in self.descendants() {
                    signal::kill(pid, Signal::SIGTERM).ok();
                }
                self.kill_by(now + ORPHAN_GRACE.min(self.silence / 2));
            }
            if let Some((exit, since)) = self.exited {
                if !self.has_reported && (is_alone || now >= since + REPORT_WAIT) {
                    self.hear_program(control.as_ref());
                    let report = self.failure.take().map_or(
                        Report::Exited {
                            exit,
                            clean: is_alone,
                        },
                        Report::Failed,
                    );
                    tell(control.as_ref(), &report);
                    self.has_reported = true;
                }
                if is_alone {
                    return;
                }
            }
            self.kill_and_sweep(control.as_ref(), now);
            self.pause(control.as_ref());
        }
    }

    /// End of file from the second stage means that it became the program.
    fn hear_program(&mut self, control: Option<&Wire>) {
        let Some(opening) = &self.opening else { return };
        match opening.receive() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Ok(Some(Opening::Split { pid })) => {
                self.program = Pid::from_raw(pid);
                return self.hear_program(control);
            }
            Ok(Some(Opening::Failed(failure))) => self.failure = Some(failure),
            Ok(None) => tell(
                control,
                &Report::Started {
                    pid: self.program.as_raw().cast_unsigned(),
                },
            ),
            Err(error) => self.failure = Some(Failure::new(Step::Launch, &error)),
        }
        self.opening = None;
    }

    /// Obeys what the supervisor said; whether it is still there.
    fn hear_commands(&mut self, control: &Wire) -> bool {
        loop {
            match control.receive() {
                Ok(Some(command)) => {
                    self.last_word = Instant::now();
                    self.obey(&command);
                }
                Ok(None) => return false,
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    fn obey(&mut self, command: &Command) {
        let now = Instant::now();
        match *command {
            Command::Beat => {}
            Command::Interrupt => self.signal_group(Signal::SIGINT),
            Command::Terminate { grace_ms } => {
                self.signal_group(Signal::SIGTERM);
                self.kill_by(now + Duration::from_millis(grace_ms));
            }
            Command::Sweep { id } => {
                self.sweep = Some(Sweep {
                    id,
                    until: now + SWEEP_LIMIT,
                })
            }
        }
    }

    /// A second order only ever shortens the first one's grace.
    fn kill_by(&mut self, at: Instant) {
        self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn signal_group(&self, signal: Signal) {
        // Once reaped its number may be another's.
        if self.exited.is_none() && signal::killpg(self.program, signal).is_err() {
            // It has no group of its own yet.
            signal::kill(self.program, signal).ok();
        }
    }

    /// Takes the statuses of all that ended; whether no child is left.
    fn reap(&mut self) -> bool {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let exit = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return false,
                Ok(WaitStatus::Exited(pid, code)) => (
                    pid,
                    Exit {
                        code: Some(code),
                        signal: None,
                    },
                ),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (
                    pid,
                    Exit {
                        code: None,
                        signal: Some(signal as i32),
                    },
                ),
                Ok(_) | Err(Errno::EINTR) => continue,
                // A status that has no name (a real-time signal): somebody was reaped, maybe the
                // program.
                Err(Errno::EINVAL) => {
                    if signal::kill(self.child, None).is_ok() {
                        continue;
                    }
                    (self.child, Exit::UNKNOWN)
                }
                Err(_) => {
                    self.exited.get_or_insert((Exit::UNKNOWN, Instant::now()));
                    return true;
                }
            };
            if exit.0 == self.child && self.exited.is_none() {
                self.exited = Some((exit.1, Instant::now()));
            }
        }
    }

    /// A descendant may end and its number be given away between look and signal only if its own
    /// parent reaps it then and the numbers wrap around in the same instant. Our own children
    /// keep theirs until [`Warden::reap`].
    fn descendants(&self) -> Vec<Pid> {
        procfs::descendants(std::process::id().cast_signed())
            .into_iter()
            .map(Pid::from_raw)
            .collect()
    }

    fn kill_and_sweep(&mut self, control: Option<&Wire>, now: Instant) {
        let kills_all = self.exited.is_some() || self.kill_at.is_some_and(|at| now >= at);
        if !kills_all && self.sweep.is_none() {
            return;
        }
        let doomed: Vec<Pid> = self
            .descendants()
            .into_iter()
            .filter(|pid| kills_all || (*pid != self.program && *pid != self.child))
            .collect();
        for pid in &doomed {
            signal::kill(*pid, Signal::SIGKILL).ok();
        }
        // Done only when a look finds nobody: a kill takes effect a little later.
        if let Some(sweep) = self
            .sweep
            .take_if(|sweep| doomed.is_empty() || now >= sweep.until)
        {
            tell(
                control,
                &Report::Swept {
                    id: sweep.id,
                    clean: doomed.is_empty(),
                },
            );
        }
    }

    /// Waits for a signal, a word or the next thing to do.
    fn pause(&self, control: Option<&Wire>) {
        let now = Instant::now();
        let wait = if self.has_reported {
            SLOW_TICK
        } else if self.exited.is_some() || self.sweep.is_some() {
            TICK
        } else {
            let silent = (!self.is_orphan).then_some(self.last_word + self.silence);
            let next = self.kill_at.into_iter().chain(silent).min().unwrap_or(now);
            next.saturating_duration_since(now).max(TICK)
        };
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(self.signals.as_fd())];
        fds.extend(control.map(|wire| readable(wire.as_fd())));
        fds.extend(self.opening.as_ref().map(|wire| readable(wire.as_fd())));
        // Rounded up, so that a deadline is over when we wake for it.
        let millis = i32::try_from(wait.as_millis() + 1).unwrap_or(i32::MAX);
        nix::poll::poll(
            &mut fds,
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
        )
        .ok();
    }
}

/// A supervisor that does not listen any more misses nothing it could use.
fn tell(control: Option<&Wire>, report: &Report) {
    if let Some(control) = control {
        control.send(report).ok();
    }
}
