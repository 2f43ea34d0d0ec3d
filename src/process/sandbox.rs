//! What a program may touch, as data, and Landlock to hold it to that.
//!
//! Landlock's rules are by open file: a folder that is replaced after the start loses its rule.
//! It does not hold `stat` and `chmod`, and of the network it knows ports alone; the
//! [system call filter](super::seccomp) holds the rest of that where both are there. Don't grant `/proc`: no program of ours needs it, and a root that
//! has CAP_PERFMON or CAP_SYS_ADMIN reads every process's environment there, Landlock or not
//! (measured on Linux 6.18).

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use serde::{Deserialize, Serialize};

use super::{seccomp, uid};

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
    /// Where TCP may lead.
    pub connect: Peers,
    /// TCP ports that may be listened on.
    pub bind: Ports,
    /// Signals and abstract sockets reach only processes started from within.
    pub scoped: bool,
    /// Where programs run as users of their own: the folder whose owner this one runs as. Without
    /// one it runs as nobody, who owns nothing.
    pub owner: Option<PathBuf>,
}

/// Hosts and TCP ports. Landlock alone holds a program to the ports, of any host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peers {
    Any,
    Only {
        /// Ports of this machine's loopback addresses.
        here: Vec<u16>,
        /// Ports of other machines, but for link-local addresses: there clouds keep credentials.
        /// Names may be resolved if there are any.
        elsewhere: Vec<u16>,
    },
}

impl Peers {
    /// Programs on this machine alone.
    pub fn here(ports: Vec<u16>) -> Self {
        Self::Only {
            here: ports,
            elsewhere: Vec::new(),
        }
    }

    pub(super) fn allows(&self, ip: IpAddr, port: u16) -> bool {
        match self {
            Self::Any => true,
            // What is bound to all addresses is reached by the unspecified one too.
            Self::Only { here, .. } if ip.is_loopback() || ip.is_unspecified() => {
                here.contains(&port)
            }
            Self::Only { elsewhere, .. } => is_elsewhere(ip) && elsewhere.contains(&port),
        }
    }

    pub(super) fn may_resolve(&self) -> bool {
        match self {
            Self::Any => true,
            Self::Only { elsewhere, .. } => !elsewhere.is_empty(),
        }
    }

    fn ports(&self) -> Ports {
        match self {
            Self::Any => Ports::Any,
            Self::Only { here, elsewhere } => Ports::Only([here.as_slice(), elsewhere].concat()),
        }
    }
}

fn is_elsewhere(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_multicast() && !ip.is_broadcast(),
        // Clouds that speak IPv6 answer at `fd00:ec2::/32` too.
        IpAddr::V6(ip) => {
            !ip.is_unicast_link_local()
                && !ip.is_multicast()
                && ip.segments()[..2] != [0xfd00, 0x0ec2]
        }
    }
}

/// A set of TCP ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ports {
    Any,
    Only(Vec<u16>),
}

impl Ports {
    pub(super) fn allows(&self, port: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Only(ports) => ports.contains(&port),
        }
    }
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
            connect: Peers::here(Vec::new()),
            bind: Ports::Only(Vec::new()),
            scoped: true,
            owner: None,
        }
    }

    /// Anything the supervisor may do.
    pub fn unconfined() -> Self {
        Self {
            read: Vec::new(),
            write: vec!["/".into()],
            connect: Peers::Any,
            bind: Ports::Any,
            scoped: false,
            owner: None,
        }
    }

    fn confines_files(&self) -> bool {
        !self.write.iter().any(|path| path == Path::new("/"))
    }

    pub(super) fn confines_network(&self) -> bool {
        self.connect != Peers::Any || self.bind != Ports::Any
    }
}

/// What there is on this machine to hold programs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Means {
    pub(super) landlock: bool,
    /// The system call filter and a broker of connections.
    pub(super) broker: bool,
    /// Each program runs as the owner of its folder.
    pub(super) owners: bool,
}

impl Means {
    pub(super) const NONE: Self = Self {
        landlock: false,
        broker: false,
        owners: false,
    };

    /// Asks the kernel. Uids are the second choice: they need a supervisor that is root and folders
    /// that were handed over, and hold less (a path's `stat`, `/tmp` and others' command lines are
    /// open). So they come in where Landlock, if there is any, leaves files or processes free; then
    /// both hold.
    pub(super) fn detect(with_landlock: bool) -> Self {
        let means = Self {
            landlock: with_landlock,
            broker: seccomp::is_supported(),
            owners: false,
        };
        let held = Confinement::by(means);
        let is_held = |part| part != ConfinedBy::None;
        Self {
            owners: !(is_held(held.files) && is_held(held.processes)) && uid::is_possible(),
            ..means
        }
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
    /// A user of the system for each thread.
    Uid,
    /// A system call filter, and a broker that decides on connections.
    Seccomp,
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
    /// What these means hold on this kernel.
    ///
    /// Files count as held from Landlock's interface 3 on (Linux 6.2): before it `truncate` is
    /// free, which empties any file that the uid may write.
    pub(super) fn by(means: Means) -> Self {
        let no_files = BitFlags::EMPTY;
        let landlock = |held: bool| match means.landlock && held {
            true => ConfinedBy::Landlock,
            false => ConfinedBy::None,
        };
        let files = landlock(supports(
            AccessFs::from_all(ABI::V3),
            BitFlags::EMPTY,
            BitFlags::EMPTY,
        ));
        let network = landlock(supports(
            no_files,
            AccessNet::from_all(ABI::V4),
            BitFlags::EMPTY,
        ));
        let processes = landlock(supports(
            no_files,
            BitFlags::EMPTY,
            Scope::from_all(ABI::V6),
        ));
        let or = |held, is_there, other| match held {
            ConfinedBy::None if is_there => other,
            held => held,
        };
        Self::of(
            or(files, means.owners, ConfinedBy::Uid),
            or(network, means.broker, ConfinedBy::Seccomp),
            or(processes, means.owners, ConfinedBy::Uid),
        )
    }

    const fn of(files: ConfinedBy, network: ConfinedBy, processes: ConfinedBy) -> Self {
        let bash = match (files, network, processes) {
            (ConfinedBy::None, _, _) | (_, ConfinedBy::None, _) | (_, _, ConfinedBy::None) => {
                Bash::FilesOnly
            }
            _ => Bash::All,
        };
        Self {
            files,
            network,
            processes,
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

/// Whether the kernel has any Landlock.
fn is_there() -> bool {
    supports(
        AccessFs::from_all(ABI::V1),
        BitFlags::EMPTY,
        BitFlags::EMPTY,
    )
}

/// Holds this thread, and what it becomes and starts, to the profile, as far as the kernel can.
pub(super) fn confine(profile: &Profile) -> io::Result<()> {
    let connect = profile.connect.ports();
    let (files, network) = (profile.confines_files(), |ports: &Ports| {
        *ports != Ports::Any
    });
    if !(files || network(&connect) || network(&profile.bind) || profile.scoped) {
        return Ok(());
    }
    let status = enforce(profile, files).map_err(io::Error::other)?;
    // The launcher says what it detected; running with less would make that a lie.
    if status == RulesetStatus::NotEnforced && is_there() {
        return Err(io::Error::other("the kernel did not apply the rules"));
    }
    Ok(())
}

fn enforce(profile: &Profile, files: bool) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    if files {
        ruleset = ruleset.handle_access(AccessFs::from_all(TESTED))?;
    }
    let connect = profile.connect.ports();
    let ports = [
        (AccessNet::ConnectTcp, &connect),
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
        use ConfinedBy::{Landlock, None, Seccomp, Uid};
        assert_eq!(
            Confinement::of(Landlock, Landlock, Landlock).bash,
            Bash::All
        );
        assert_eq!(Confinement::of(Landlock, Seccomp, Landlock).bash, Bash::All);
        assert_eq!(Confinement::of(Uid, Seccomp, Uid).bash, Bash::All);
        for held in 0..7 {
            let part = |bit: u8| match held & (1 << bit) {
                0 => None,
                _ => Landlock,
            };
            assert_eq!(
                Confinement::of(part(0), part(1), part(2)).bash,
                Bash::FilesOnly
            );
        }
        assert_eq!(
            serde_json::to_string(&Confinement::of(Landlock, Seccomp, None)).unwrap(),
            r#"{"files":"landlock","network":"seccomp","processes":"none","bash":"files-only"}"#
        );
    }

    #[test]
    fn uids_hold_what_landlock_does_not() {
        let by = |landlock, owners| {
            Confinement::by(Means {
                landlock,
                broker: true,
                owners,
            })
        };
        let held = by(false, true);
        assert_eq!(
            serde_json::to_string(&held).unwrap(),
            r#"{"files":"uid","network":"seccomp","processes":"uid","bash":"all"}"#
        );
        assert_eq!(by(false, false).bash, Bash::FilesOnly);
        let whole = by(true, false);
        if whole.bash == Bash::All {
            assert_eq!(by(true, true), whole, "Landlock comes first");
            assert!(!Means::detect(true).owners, "and needs no uids beside it");
        }
    }

    #[test]
    fn where_a_connection_may_lead() {
        let peers = Peers::Only {
            here: vec![4321],
            elsewhere: vec![443],
        };
        for (address, allowed) in [
            ("127.0.0.1:4321", true),
            ("127.8.9.1:4321", true),
            ("[::1]:4321", true),
            ("0.0.0.0:4321", true),
            ("127.0.0.1:8080", false),
            ("0.0.0.0:8080", false),
            ("127.0.0.1:443", false),
            ("[::]:443", false),
            ("203.0.113.9:443", true),
            ("10.0.0.9:443", true),
            ("[2001:db8::1]:443", true),
            ("203.0.113.9:4321", false),
            ("169.254.170.2:443", false),
            ("[fe80::1]:443", false),
            ("[fd00:ec2::254]:443", false),
        ] {
            let address: std::net::SocketAddr = address.parse().unwrap();
            assert_eq!(
                peers.allows(address.ip(), address.port()),
                allowed,
                "{address}"
            );
        }
        assert!(peers.may_resolve());
        assert!(!Peers::here(vec![1]).may_resolve());
    }
}
