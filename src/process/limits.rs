//! What a program may take of the machine. Generous: they stop a loop that forks, writes or opens
//! without end, and no site that works.
//!
//! Memory is none of them: Node and the CLI map gigabytes that they never use, so that a limit on
//! addresses fails them at random. The container has one, and the order of dying is ours.

use std::fs;

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, rlim_t, setrlimit},
};

/// Children go first when memory runs out, the supervisor last.
const OOM_SCORE: &str = "500";
/// Size of one file, in bytes: beyond it a write fails, or the signal that comes with it ends the
/// program. The largest of an honest one is a package manager's store.
const FILE_BYTES: rlim_t = 8 << 30;
/// Open descriptors. Node takes as many as it may.
const DESCRIPTORS: rlim_t = 65_536;
/// Processes and threads of the program's uid where that is a thread's own: a CLI, a dev server and
/// what they start have some dozens.
const OWN_PROCESSES: rlim_t = 1024;
/// The same where it is shared: the kernel counts the supervisor's too, other containers', and on a
/// laptop a whole desktop's. For root it counts none.
const SHARED_PROCESSES: rlim_t = 8192;

/// Holds this process, and what it becomes and starts, to the limits for good. Where there are
/// tighter ones they stay. `is_own`: it gets a uid of its own.
pub(super) fn apply(is_own: bool) -> Result<(), Errno> {
    let processes = match is_own {
        true => OWN_PROCESSES,
        false => SHARED_PROCESSES,
    };
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_FSIZE, FILE_BYTES)?;
    lower(Resource::RLIMIT_NOFILE, DESCRIPTORS)?;
    lower(Resource::RLIMIT_NPROC, processes)?;
    // A container may hide the file: an order of dying, not a wall.
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).ok();
    Ok(())
}

fn lower(resource: Resource, most: rlim_t) -> Result<(), Errno> {
    let (soft, hard) = getrlimit(resource)?;
    setrlimit(resource, soft.min(most), hard.min(most))
}
