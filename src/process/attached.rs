//! A program on its caller's own terminal or pipes: it sees what its caller sees, in the caller's
//! folder, and nothing of ours holds it. For a person's own CLI, never for an agent.

use std::{ffi::OsString, path::PathBuf};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};

use super::{Exit, ProcessError};

/// What to run, with the differences of its environment from ours.
pub struct Attached {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub unset: Vec<String>,
    /// Once the others are gone.
    pub set: Vec<(OsString, OsString)>,
}

impl std::fmt::Debug for Attached {
    /// Leaves out arguments and environment, which may hold tokens and instructions.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attached")
            .field("program", &self.program)
            .finish_non_exhaustive()
    }
}

/// Runs it to its end. What a terminal sends to everybody on it (an interrupt, a quit) is the
/// program's to act on; what is sent to us alone is passed on.
///
/// # Errors
/// [`ProcessError::Start`].
pub async fn run_attached(what: Attached) -> Result<Exit, ProcessError> {
    let program = what.program.file_name().unwrap_or_default();
    let program = program.to_string_lossy().into_owned();
    let start = |source| ProcessError::Start {
        program: program.clone(),
        source,
    };
    // Heard, so that they do not end us; a program that is executed hears them anew.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start)?;
    let mut quit = signal(SignalKind::quit()).map_err(start)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(start)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(start)?;
    #[expect(clippy::disallowed_methods, reason = "the room that starts processes")]
    let mut command = tokio::process::Command::new(&what.program);
    command.args(what.args);
    for name in what.unset {
        command.env_remove(name);
    }
    command.envs(what.set);
    let mut child = command.spawn().map_err(start)?;
    let pid = child.id().map(|pid| Pid::from_raw(pid.cast_signed()));
    let pass_on = |which| {
        if let Some(pid) = pid {
            // It is not reaped before its end is taken below, so the number is its own.
            signal::kill(pid, which).ok();
        }
    };
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(start)?,
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
            _ = terminate.recv() => pass_on(Signal::SIGTERM),
            _ = hang_up.recv() => pass_on(Signal::SIGHUP),
        }
    };
    Ok(Exit {
        code: status.code(),
        signal: std::os::unix::process::ExitStatusExt::signal(&status),
    })
}
