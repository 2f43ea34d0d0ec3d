//! A running child, as the supervisor sees it.
//!
//! [`ProcessHandle`]s are clones of one connection to the child's warden; the task in [`attend`]
//! hears its reports and publishes them as a [`Status`]. The last handle's end is the child's.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::unix::pipe,
    process::{ChildStderr, ChildStdout},
    sync::watch,
    time::timeout,
};

use super::{
    ProcessError,
    launcher::Wardens,
    limits::Load,
    procfs,
    wire::{Command, Failure, Report, Reports, Wire},
};
use crate::task;

/// A warden that did not do as told for so long (somebody stopped it) is ended by force.
const STUCK_AFTER: Duration = Duration::from_secs(10);
/// A sweep takes at most 3 s by the warden's own clock.
const SWEEP_ANSWER: Duration = Duration::from_secs(6);
const FORCE_LIMIT: Duration = Duration::from_secs(5);
const FORCE_TICK: Duration = Duration::from_millis(5);

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its status, if it exited.
    pub code: Option<i32>,
    /// The signal's number, if one killed it.
    pub signal: Option<i32>,
}

impl Exit {
    /// It ended, nobody knows how: its warden was killed.
    pub(super) const UNKNOWN: Self = Self {
        code: None,
        signal: None,
    };

    /// Whether it exited with status 0.
    pub fn is_success(self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit status {code}"),
            (None, Some(signal)) => write!(f, "killed by signal {signal}"),
            (None, None) => f.write_str("lost"),
        }
    }
}

/// A started program: its streams, and a handle to it. Dropped with all handles, it ends the
/// program and everything that the program started.
///
/// Read `stdout` and `stderr` all the time, or take and drop them: a full pipe stops the program.
#[derive(Debug)]
pub struct Child {
    /// `Some` if it was asked for; dropping it is end of file to the program.
    pub stdin: Option<pipe::Sender>,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
    pub(super) handle: ProcessHandle,
}

impl Child {
    /// Another hold on the process, apart from its streams.
    pub fn handle(&self) -> ProcessHandle {
        self.handle.clone()
    }

    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.handle.pid()
    }
}

/// A hold on a process and all its descendants. Cheap to clone. While one is left they live.
///
/// Every method may be called at any time and again, also after the exit; all futures are
/// cancel-safe (what was asked for still happens).
#[derive(Debug, Clone)]
pub struct ProcessHandle {
    pub(super) connection: Arc<Connection>,
    pub(super) pid: u32,
}

impl ProcessHandle {
    /// The program's process id. After its exit it may be another's: only for logs.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGTERM to the program's group, SIGKILL to it and all descendants after the grace.
    /// A second call can only shorten the grace. Returns once all are gone.
    pub async fn terminate(&self, grace: Duration) -> Exit {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX / 2);
        self.connection.tell(&Command::Terminate { grace_ms });
        if let Ok(exit) = timeout(grace.saturating_add(STUCK_AFTER), self.wait()).await {
            return exit;
        }
        let connection = self.connection.clone();
        tracing::warn!(
            program = connection.program,
            pid = self.pid,
            "its warden is stuck; ended by force"
        );
        task::blocking("ending a process by force", FORCE_LIMIT, move || {
            connection.force()
        })
        .await
        .ok();
        timeout(FORCE_LIMIT, self.wait())
            .await
            .unwrap_or(Exit::UNKNOWN)
    }

    /// SIGKILL to the program and all descendants. Returns once all are gone.
    pub async fn kill(&self) -> Exit {
        self.terminate(Duration::ZERO).await
    }

    /// SIGINT to the program's group.
    pub fn interrupt(&self) {
        self.connection.tell(&Command::Interrupt);
    }

    /// SIGKILL to every descendant of the program, also those in sessions of their own, but not
    /// to the program: ends what a turn left behind. Returns once they are gone. After the exit it
    /// only tells whether all were gone by then.
    ///
    /// # Errors
    /// [`ProcessError::Sweep`] if some are still there after seconds, or were at the exit.
    pub async fn sweep(&self) -> Result<(), ProcessError> {
        let id = self.connection.next_sweep.fetch_add(1, Ordering::Relaxed) + 1;
        self.connection.tell(&Command::Sweep { id });
        let mut status = self.connection.status.clone();
        let swept = status.wait_for(|status| status.exit.is_some() || status.swept.0 >= id);
        let clean = match timeout(SWEEP_ANSWER, swept).await {
            Ok(Ok(status)) if status.exit.is_some() => !status.is_left_over,
            Ok(Ok(status)) => status.swept.1,
            // Without the task that hears it there is no warden either.
            Ok(Err(_)) => true,
            Err(_) => false,
        };
        let program = || self.connection.program.clone();
        if clean {
            Ok(())
        } else {
            Err(ProcessError::Sweep { program: program() })
        }
    }

    /// Waits until the program and all its descendants are gone.
    pub async fn wait(&self) -> Exit {
        let mut status = self.connection.status.clone();
        let exited = status.wait_for(|status| status.exit.is_some()).await;
        exited
            .ok()
            .and_then(|status| status.exit)
            .unwrap_or(Exit::UNKNOWN)
    }

    /// How it ended, if it did.
    pub fn try_exit(&self) -> Option<Exit> {
        self.connection.status.borrow().exit
    }

    /// What the program and its descendants take.
    ///
    /// Reads `/proc`: call it through [`task::blocking`].
    pub fn load(&self) -> Load {
        procfs::load_below(self.connection.warden)
    }

    /// Whether a connection to `address` reaches this program or a descendant of it.
    ///
    /// Reads `/proc`: call it through [`task::blocking`].
    pub fn owns_listener(&self, address: SocketAddr) -> bool {
        self.try_exit().is_none() && procfs::listens(self.connection.warden, address)
    }
}

/// The line to a warden; at its end the warden ends everything and goes.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) program: String,
    pub(super) warden: i32,
    pub(super) wire: Arc<Wire>,
    pub(super) status: watch::Receiver<Status>,
    pub(super) next_sweep: AtomicU64,
    /// The heartbeat goes on as long as a child needs it.
    pub(super) wardens: Arc<Wardens>,
}

impl Connection {
    fn tell(&self, command: &Command) {
        // Fails only where the warden is gone, or stopped with its queue full: `terminate` sees
        // to the second, and the first has nothing left to be told.
        self.wire.send(command).ok();
    }

    /// Does the warden's work where it can't. Blocks.
    fn force(&self) {
        let kill = |pid| signal::kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        let until = Instant::now() + FORCE_LIMIT / 2;
        self.wardens.while_owned(self.warden, || {
            loop {
                let doomed = procfs::descendants(self.warden);
                if doomed.is_empty() || Instant::now() >= until {
                    break;
                }
                for pid in doomed {
                    kill(pid);
                }
                std::thread::sleep(FORCE_TICK);
            }
            kill(self.warden);
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.wire.finish();
    }
}

/// What a warden reported so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Status {
    pub(super) started: Option<u32>,
    pub(super) failure: Option<Failure>,
    pub(super) exit: Option<Exit>,
    /// At the exit something was there that did not end, or that nobody could look for.
    is_left_over: bool,
    /// The last sweep that is over, and whether it left nothing.
    swept: (u64, bool),
}

impl Status {
    pub(super) fn is_decided(&self) -> bool {
        self.started.is_some() || self.exit.is_some()
    }
}

/// Hears a warden out, to its very end, and reaps it.
pub(super) async fn attend(
    program: String,
    reports: Reports,
    mut warden: tokio::process::Child,
    status: watch::Sender<Status>,
    wardens: Arc<Wardens>,
) {
    let pid = warden.id().map_or(0, u32::cast_signed);
    while let Ok(Some(report)) = reports.next().await {
        status.send_modify(|status| match report {
            Report::Started { pid } => status.started = Some(pid),
            Report::Failed(failure) => {
                status.failure = Some(failure);
                status.exit = Some(Exit::UNKNOWN);
            }
            Report::Exited { exit, clean } => {
                status.exit = Some(exit);
                status.is_left_over = !clean;
            }
            Report::Swept { id, clean } => status.swept = (id, clean),
        });
    }
    if let Err(error) = warden.wait().await {
        tracing::warn!(program, %error, "failed to reap a warden");
    }
    wardens.forget(pid);
    let exit = status.borrow().exit;
    if exit.is_none() {
        // The kernel killed the program with it; its group is what else we know of.
        tracing::warn!(program, "its warden was killed");
        if let Some(pid) = status.borrow().started {
            signal::killpg(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).ok();
        }
        status.send_modify(|status| {
            status.exit = Some(Exit::UNKNOWN);
            // What left the group lives on, and nobody can find it any more.
            status.is_left_over = true;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reads_as_people_say_it() {
        assert_eq!(
            Exit {
                code: Some(1),
                signal: None
            }
            .to_string(),
            "exit status 1"
        );
        assert_eq!(
            Exit {
                code: None,
                signal: Some(9)
            }
            .to_string(),
            "killed by signal 9"
        );
    }
}
