//! What a program may touch, as data, and Landlock to hold it to that.
//!
//! Landlock's rules are by open file: a folder that is replaced after the start loses its rule.
//! It does not hold UDP, `stat`, `chmod` or sockets with a path name; keep those behind a folder
//! that the program may not read. Don't grant `/proc`: no program of ours needs it, and a root that
//! has CAP_PERFMON or CAP_SYS_ADMIN reads every process's environment there, Landlock or not
//! (measured on Linux 6.18).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use serde::{Deserialize, Serialize};

/// The newest interface of which every right was tried with the programs that we run.
const TESTED: ABI = ABI::V6;

/// Programs, libraries and settings that nearly every program reads.
const SYSTEM: [&str; 8] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt",
];
/// What programs ask about the machine and about themselves: without it Node's `memoryUsage` fails
/// (and Yarn 1 with it) and `os.cpus()` is empty. `/proc/self` is the program's own folder when the
/// rule is made; its descendants' and everybody else's stay closed.
const ABOUT_ITSELF: [&str; 5] = [
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/loadavg",
];
/// Devices that hold nothing of anybody's.
const DEVICES: [&str; 6] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];

/// What a program and its descendants may do. Paths that do not exist are skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Files that may be read and executed, and folders with all beneath them.
    pub read: Vec<PathBuf>,
    /// The same for every use: write, create, remove, move. `/` leaves files unconfined.
    pub write: Vec<PathBuf>,
    /// TCP ports, of any host, that may be connected to.
    pub connect: Ports,
    /// TCP ports that may be listened on.
    pub bind: Ports,
    /// Signals and abstract sockets reach only processes started from within.
    pub scoped: bool,
}

/// A set of TCP ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ports {
    Any,
    Only(Vec<u16>),
}

impl Profile {
    /// What every program needs and nothing more: system files to read, harmless devices, no
    /// network. Add to it.
    pub fn system() -> Self {
        Self {
            read: SYSTEM
                .iter()
                .chain(&ABOUT_ITSELF)
                .map(PathBuf::from)
                .collect(),
            write: DEVICES.map(PathBuf::from).to_vec(),
            connect: Ports::Only(Vec::new()),
            bind: Ports::Only(Vec::new()),
            scoped: true,
        }
    }

    /// Anything the supervisor may do.
    pub fn unconfined() -> Self {
        Self {
            read: Vec::new(),
            write: vec!["/".into()],
            connect: Ports::Any,
            bind: Ports::Any,
            scoped: false,
        }
    }

    fn confines_files(&self) -> bool {
        !self.write.iter().any(|path| path == Path::new("/"))
    }
}

/// What holds confined programs, part by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Confinement {
    pub files: ConfinedBy,
    pub network: ConfinedBy,
    pub processes: ConfinedBy,
    pub bash: Bash,
}

/// The means that holds one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConfinedBy {
    Landlock,
    None,
}

/// What an agent may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bash {
    /// Every command: the kernel holds it.
    All,
    /// File commands alone: something is not held.
    FilesOnly,
}

impl Confinement {
    /// Nothing is confined.
    pub const NONE: Self = Self::of(false, false, false);

    /// Asks the kernel.
    ///
    /// Files count as held from interface 3 on (Linux 6.2): before it `truncate` is free, which
    /// empties any file that the uid may write.
    pub(super) fn detect() -> Self {
        let files = supports(
            AccessFs::from_all(ABI::V3),
            BitFlags::EMPTY,
            BitFlags::EMPTY,
        );
        let net = supports(
            BitFlags::EMPTY,
            AccessNet::from_all(ABI::V4),
            BitFlags::EMPTY,
        );
        let scope = supports(BitFlags::EMPTY, BitFlags::EMPTY, Scope::from_all(ABI::V6));
        Self::of(files, net, scope)
    }

    const fn of(files: bool, network: bool, processes: bool) -> Self {
        const fn by(held: bool) -> ConfinedBy {
            if held {
                ConfinedBy::Landlock
            } else {
                ConfinedBy::None
            }
        }
        let bash = if files && network && processes {
            Bash::All
        } else {
            Bash::FilesOnly
        };
        Self {
            files: by(files),
            network: by(network),
            processes: by(processes),
            bash,
        }
    }
}

/// Whether the kernel makes a rule set that handles all of it. None is applied.
fn supports(files: BitFlags<AccessFs>, net: BitFlags<AccessNet>, scope: BitFlags<Scope>) -> bool {
    let ruleset = || -> Result<_, RulesetError> {
        let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        if !files.is_empty() {
            ruleset = ruleset.handle_access(files)?;
        }
        if !net.is_empty() {
            ruleset = ruleset.handle_access(net)?;
        }
        if !scope.is_empty() {
            ruleset = ruleset.scope(scope)?;
        }
        ruleset.create()
    };
    ruleset().is_ok()
}

/// Holds this thread, and what it becomes and starts, to the profile, as far as the kernel can.
pub(super) fn confine(profile: &Profile) -> io::Result<()> {
    let (files, network) = (profile.confines_files(), |ports: &Ports| {
        *ports != Ports::Any
    });
    if !(files || network(&profile.connect) || network(&profile.bind) || profile.scoped) {
        return Ok(());
    }
    let status = enforce(profile, files).map_err(io::Error::other)?;
    // The launcher says what it detected; running with less would make that a lie.
    if status == RulesetStatus::NotEnforced && Confinement::detect() != Confinement::NONE {
        return Err(io::Error::other("the kernel did not apply the rules"));
    }
    Ok(())
}

fn enforce(profile: &Profile, files: bool) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    if files {
        ruleset = ruleset.handle_access(AccessFs::from_all(TESTED))?;
    }
    let ports = [
        (AccessNet::ConnectTcp, &profile.connect),
        (AccessNet::BindTcp, &profile.bind),
    ];
    for (access, allowed) in ports {
        if let Ports::Only(_) = allowed {
            ruleset = ruleset.handle_access(access)?;
        }
    }
    if profile.scoped {
        ruleset = ruleset.scope(Scope::from_all(TESTED))?;
    }
    let mut ruleset = ruleset.create()?;
    if files {
        let read = profile
            .read
            .iter()
            .map(|path| (path, AccessFs::from_read(TESTED)));
        let write = profile
            .write
            .iter()
            .map(|path| (path, AccessFs::from_all(TESTED)));
        for (path, access) in read.chain(write) {
            // One that can't be opened stays refused, which is the safe side.
            let (Ok(opened), Ok(about)) = (PathFd::new(path), fs::metadata(path)) else {
                continue;
            };
            let fitting = if about.is_dir() {
                access
            } else {
                access & AccessFs::from_file(TESTED)
            };
            ruleset = ruleset.add_rule(PathBeneath::new(opened, fitting))?;
        }
    }
    for (access, allowed) in ports {
        if let Ports::Only(ports) = allowed {
            for port in ports {
                ruleset = ruleset.add_rule(NetPort::new(*port, access))?;
            }
        }
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bash_is_all_only_where_everything_is_held() {
        assert_eq!(Confinement::of(true, true, true).bash, Bash::All);
        for held in 0..7 {
            let part = |bit: u8| held & (1 << bit) != 0;
            assert_eq!(
                Confinement::of(part(0), part(1), part(2)).bash,
                Bash::FilesOnly
            );
        }
        assert_eq!(
            serde_json::to_string(&Confinement::of(true, false, true)).unwrap(),
            r#"{"files":"landlock","network":"none","processes":"landlock","bash":"files-only"}"#
        );
    }
}
