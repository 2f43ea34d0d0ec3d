//! The second stage of a child: confines itself, then becomes the program.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::CommandExt,
    process::ExitCode,
};

use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
};

use super::{
    broker, limits, sandbox, seccomp, uid,
    wire::{Failure, Opening, Setup, Step, Wire},
};

/// Becomes the program; comes back only if that failed, having said why over descriptor 0.
pub(super) fn exec(program: &OsStr, args: impl Iterator<Item = OsString>) -> ExitCode {
    // Our copy of the socket closes as the program starts: that is how the warden knows it did.
    let Ok(opening) = Wire::from_stdin() else {
        return ExitCode::from(2);
    };
    let failure = become_program(&opening, program, args);
    opening.send(&Opening::Failed(failure)).ok();
    ExitCode::from(127)
}

fn become_program(
    opening: &Wire,
    program: &OsStr,
    args: impl Iterator<Item = OsString>,
) -> Failure {
    let setup = match prepare(opening) {
        Ok(setup) => setup,
        Err(error) => return Failure::new(Step::Launch, &error),
    };
    let is_own = setup.means.owners;
    if let Err(error) = limits::apply(is_own) {
        return Failure::new(Step::Launch, &error.into());
    }
    if is_own && let Err(error) = uid::become_owner(setup.profile.owner.as_deref()) {
        return Failure::new(Step::Confine, &error);
    }
    // As its own user: into a folder of somebody else's it does not get.
    if let Err(error) = std::env::set_current_dir(&setup.cwd) {
        return Failure::new(Step::EnterFolder, &error);
    }
    if let Err(error) = confine(opening, &setup) {
        return Failure::new(Step::Confine, &error);
    }
    #[expect(clippy::disallowed_methods, reason = "the room that starts processes")]
    let error = std::process::Command::new(program).args(args).exec();
    Failure::new(Step::Start, &error)
}

fn prepare(opening: &Wire) -> io::Result<Setup> {
    let (setup, stdin) = opening.receive_setup()?;
    // The warden blocks signals to itself, and that is inherited.
    SigSet::all().thread_unblock()?;
    // The last net, should the warden be killed (out of memory, say).
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    nix::unistd::setsid()?;
    nix::unistd::dup2_stdin(stdin)?;
    Ok(setup)
}

fn confine(opening: &Wire, setup: &Setup) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    let broker = match setup.means.broker && setup.profile.confines_network() {
        true => Some(broker::split(&setup.profile, opening)?),
        false => None,
    };
    if setup.means.landlock {
        sandbox::confine(&setup.profile)?;
    }
    if let Some(broker) = broker {
        let listener = seccomp::install(setup.profile.connect.may_resolve())?;
        broker::hand_over(&broker, &listener)?;
    }
    Ok(())
}
