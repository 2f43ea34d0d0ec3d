//! What a program may take of the machine. Generous: they stop a loop that forks, writes or opens
//! without end, and no site that works.
//!
//! Memory is none of them: Node and the CLI map gigabytes that they never use, so that a limit on
//! addresses fails them at random. The container has one, and the order of dying is ours. Where more is
//! known of a program, it has an [`Allowance`], and whoever runs it looks at its [`Load`]: that holds
//! without a cgroup that we might write to, whoever's uid it has, and for all its descendants together.

use std::{fmt, fs, time::Duration};

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

/// What a program and its descendants take together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Resident, in bytes.
    pub memory: u64,
    /// Processor time since the start.
    pub processor: Duration,
    pub processes: usize,
}

/// What they may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Resident, in bytes.
    pub memory: u64,
    /// Processor time since the start.
    pub processor: Duration,
    pub processes: usize,
}

/// What they took more of than they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excess {
    Memory { most: u64 },
    Processor { most: Duration },
    Processes { most: usize },
}

impl Allowance {
    /// What this load has too much of.
    pub fn exceeded_by(&self, load: &Load) -> Option<Excess> {
        let Self {
            memory,
            processor,
            processes,
        } = *self;
        if load.memory > memory {
            Some(Excess::Memory { most: memory })
        } else if load.processor > processor {
            Some(Excess::Processor { most: processor })
        } else if load.processes > processes {
            Some(Excess::Processes { most: processes })
        } else {
            None
        }
    }
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { most } => write!(f, "held more than {} MB of memory", most >> 20),
            Self::Processor { most } => {
                write!(
                    f,
                    "used more than {} s of processor time",
                    most.as_secs_f64()
                )
            }
            Self::Processes { most } => write!(f, "had more than {most} processes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_excess_is_told_by_itself() {
        let allowance = Allowance {
            memory: 64 << 20,
            processor: Duration::from_secs(3),
            processes: 5,
        };
        let within = Load {
            memory: 64 << 20,
            processor: Duration::from_secs(3),
            processes: 5,
        };
        assert_eq!(allowance.exceeded_by(&within), None);
        let told = |load: Load| allowance.exceeded_by(&load).unwrap().to_string();
        let memory = (64 << 20) + 1;
        assert_eq!(
            told(Load { memory, ..within }),
            "held more than 64 MB of memory"
        );
        let processor = Duration::from_millis(3001);
        assert_eq!(
            told(Load {
                processor,
                ..within
            }),
            "used more than 3 s of processor time"
        );
        assert_eq!(
            told(Load {
                processes: 6,
                ..within
            }),
            "had more than 5 processes"
        );
    }
}
