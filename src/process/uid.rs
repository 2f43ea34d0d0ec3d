//! The road without Landlock: a supervisor that is root starts each program as the owner of the
//! program's folder, a user of the system that has nothing else.
//!
//! What that holds is the kernel's oldest wall: files by their modes, signals, `/proc` and tracing
//! by the uid. The network is the [broker](super::broker)'s.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt as _, fchown},
    },
    path::Path,
};

use nix::{
    sys::{
        prctl,
        signal::Signal,
        stat::{Mode, umask},
    },
    unistd::{Gid, Uid, geteuid, getppid, setgroups, setresgid, setresuid},
};

use crate::owner::Owner;

/// CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID and SETUID, by their bits in `/proc/self/status`.
const NEEDED: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7;

/// Is this process root, with the capabilities that it takes, and are the numbers there to be had?
pub(super) fn is_possible() -> bool {
    geteuid().is_root() && capabilities().is_some_and(|all| all & NEEDED == NEEDED) && has_numbers()
}

fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// In a user namespace there may be a few thousand uids only.
fn has_numbers() -> bool {
    ["uid_map", "gid_map"].iter().all(|map| {
        let map = fs::read_to_string(format!("/proc/self/{map}")).unwrap_or_default();
        map.lines().any(|line| {
            let mut fields = line.split_ascii_whitespace();
            let first = fields.next().and_then(|field| field.parse::<u64>().ok());
            let length = fields.nth(1).and_then(|field| field.parse::<u64>().ok());
            let last = u64::from(Owner::NOBODY.uid());
            matches!((first, length), (Some(0), Some(length)) if length > last)
        })
    })
}

/// What this process makes without saying for whom (a git directory's files) can be read by whoever
/// gets into its folder.
pub(super) fn let_others_read() {
    umask(Mode::from_bits_truncate(0o022));
}

/// Makes this process, which has one thread, the folder's owner for good: no capability is left.
/// `None`, or a folder that has no owner of ours: nobody.
pub(super) fn become_owner(folder: Option<&Path>) -> io::Result<()> {
    let owner = folder.and_then(Owner::of).unwrap_or(Owner::NOBODY);
    let (uid, gid) = (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()));
    // Who writes to /dev/stderr opens the pipe anew.
    give_pipe(io::stdin().as_fd(), owner)?;
    give_pipe(io::stdout().as_fd(), owner)?;
    give_pipe(io::stderr().as_fd(), owner)?;
    let parent = getppid();
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    // A change of uid takes it away; the parent may have died before it is back.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    // What it leaves in a folder that is everybody's is its own.
    umask(Mode::from_bits_truncate(0o077));
    Ok(())
}

fn give_pipe(stream: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
    let is_pipe = fs::File::from(stream.try_clone_to_owned()?)
        .metadata()?
        .file_type()
        .is_fifo();
    match is_pipe {
        true => fchown(stream, Some(owner.uid()), Some(owner.gid())),
        false => Ok(()),
    }
}
