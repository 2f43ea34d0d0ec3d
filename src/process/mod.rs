//! Starting, confining and ending child processes: the one room that does any of it.
//!
//! ```text
//! supervisor ──SEQPACKET socket──► warden (`greenroom child tend`)  single-threaded, subreaper
//!     ▲                               │ starts
//!     └────── stdout, stderr ──── program (`greenroom child exec`, confines itself, then execs;
//!                                     │    before that it leaves its broker between, if it is
//!                                     │    held to some connections)
//!                                     └── whatever it starts, setsid or not
//! ```
//!
//! [`Launcher`] starts every child through a **warden**: this same binary, branching off in `main`
//! ([`run_child_if_asked`]) before any runtime. The warden is child subreaper, so a descendant
//! that leaves the program's group or forks twice is still found below it. It hears a heartbeat
//! over its socket; at end of file, or after a silence of half a lease, it ends every descendant:
//! a supervisor that was killed or stopped leaves nothing running.
//!
//! Descriptor 0 of both stages is the socket over which their orders come, so nothing has to run
//! between fork and exec, and the environment is the program's own from the start.
//!
//! **Invariant:** nothing outside this room starts or signals a process. The supervisor's direct
//! children are wardens alone.

mod attached;
mod broker;
mod child;
mod environment;
mod exec;
mod launcher;
mod limits;
mod procfs;
mod sandbox;
mod seccomp;
mod uid;
mod warden;
mod wire;

use std::{io, process::ExitCode, time::Duration};

pub use self::{
    attached::{Attached, run_attached},
    child::{Child, Exit, ProcessHandle},
    environment::hide_environment,
    launcher::{ConfinementMode, Launcher, Output, Spec, Stdin},
    limits::{Allowance, Excess, Load},
    sandbox::{Bash, ConfinedBy, Confinement, Peers, Ports, Profile},
};

/// Runs a stage of a child if the command line asks for one; called first thing in `main`,
/// while there is one thread.
pub fn run_child_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != wire::CHILD {
        return None;
    }
    let (stage, program) = (args.next(), args.next());
    let (Some(stage), Some(program)) = (stage, program) else {
        eprintln!("`greenroom child` is for greenroom's own use");
        return Some(ExitCode::from(2));
    };
    Some(match stage.to_str() {
        Some(wire::TEND) => warden::tend(program, args.collect()),
        Some(wire::EXEC) => exec::exec(&program, args),
        _ => ExitCode::from(2),
    })
}

/// Makes this process's memory, environment and descriptors unreadable to others of its uid.
///
/// # Errors
/// If the kernel refuses, which Linux does not.
pub fn harden_self() -> Result<(), ProcessError> {
    nix::sys::prctl::set_dumpable(false).map_err(|errno| ProcessError::Harden {
        source: errno.into(),
    })
}

/// What can go wrong with a child. Programs are named by their file name alone.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program does not exist, may not be executed, or its arguments are too long.
    #[error("failed to start {program}")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    /// The working directory does not exist or may not be entered.
    #[error("failed to enter the working directory of {program}")]
    EnterFolder {
        program: String,
        #[source]
        source: io::Error,
    },
    /// The program was not started because it could not be confined.
    #[error("failed to confine {program}")]
    Confine {
        program: String,
        #[source]
        source: io::Error,
    },
    /// The warden could not be started or died: nothing of the program runs.
    #[error("failed to launch the warden of {program}")]
    Launch {
        program: String,
        #[source]
        source: io::Error,
    },
    /// The heartbeat's thread could not be started.
    #[error("failed to start the heartbeat")]
    Heartbeat {
        #[source]
        source: io::Error,
    },
    /// The process could not protect its own memory.
    #[error("failed to harden the supervisor")]
    Harden {
        #[source]
        source: io::Error,
    },
    /// [`Launcher::run`] ended the program at its deadline. Holds the end of its standard error.
    #[error("{program} took longer than {} s", deadline.as_secs_f64())]
    TimedOut {
        program: String,
        deadline: Duration,
        stderr: String,
    },
    /// Some of a program's descendants outlived a sweep.
    #[error("failed to end what {program} left behind")]
    Sweep { program: String },
    /// [`Launcher::stop`] was called.
    #[error("no more programs are started")]
    Stopped,
}
