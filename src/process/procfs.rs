//! What `/proc` knows: who descends from whom, and who listens where.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use nix::unistd::SysconfVar;

use super::limits::Load;
use crate::owner::Owner;

/// A line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    /// Ended, but not reaped yet.
    pub(super) is_zombie: bool,
}

/// Every process that this one can see. One that ends during the look may be missing or listed.
pub(super) fn processes() -> Vec<Process> {
    let Ok(folder) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    folder
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?))
        .collect()
}

/// The living processes below `ancestor`, nearest first. A zombie is nobody's parent and no
/// descendant: there is nothing left of it to end.
pub(super) fn descendants(ancestor: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for process in processes().into_iter().filter(|process| !process.is_zombie) {
        children
            .entry(process.parent)
            .or_default()
            .push(process.pid);
    }
    // Taking each list out makes a loop impossible, whatever the kernel showed us.
    let mut found = children.remove(&ancestor).unwrap_or_default();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let below = children.remove(pid).unwrap_or_default();
        found.extend(below);
        next += 1;
    }
    found
}

/// What all that descends from `ancestor` takes. Shared pages count for each that shares them; the
/// processor time is that of the living and of those whose end somebody waited for.
pub(super) fn load_below(ancestor: i32) -> Load {
    let page = sysconf(SysconfVar::PAGE_SIZE).unwrap_or(4096);
    let ticks = sysconf(SysconfVar::CLK_TCK).unwrap_or(100).max(1);
    let below = children_below(ancestor).unwrap_or_else(|| descendants(ancestor));
    let (mut pages, mut used) = (0, times(ancestor).map_or(0, |(_, waited_for)| waited_for));
    for pid in &below {
        let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        // Size, resident, shared, …: in pages.
        let resident = statm.split_ascii_whitespace().nth(1);
        pages += resident.and_then(|text| text.parse().ok()).unwrap_or(0);
        used += times(*pid).map_or(0, |(own, waited_for)| own + waited_for);
    }
    Load {
        memory: pages * page,
        processor: Duration::from_secs_f64(used as f64 / ticks as f64),
        processes: below.len(),
    }
}

fn sysconf(name: SysconfVar) -> Option<u64> {
    let value = nix::unistd::sysconf(name).ok().flatten();
    value.map(i64::unsigned_abs)
}

/// The processes below `ancestor`, ended ones that nobody has waited for among them, without a look
/// at everybody else's. `None` where the kernel keeps no lists of children.
fn children_below(ancestor: i32) -> Option<Vec<i32>> {
    let mut found = children(ancestor)?;
    // A number that is given away meanwhile must not make it a loop.
    let mut seen: HashSet<i32> = found.iter().copied().collect();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let below = children(*pid).unwrap_or_default();
        found.extend(below.into_iter().filter(|pid| seen.insert(*pid)));
        next += 1;
    }
    Some(found)
}

/// The kernel has a list for each thread of a process.
fn children(pid: i32) -> Option<Vec<i32>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let list = match fs::read_to_string(thread.path().join("children")) {
            Ok(list) => list,
            // Of a thread that ended meanwhile; or there is none, and then of no thread.
            Err(_) if thread.path().exists() => return None,
            Err(_) => continue,
        };
        found.extend(
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    Some(found)
}

/// The processor time of a process and of those that it waited for, in ticks.
fn times(pid: i32) -> Option<(u64, u64)> {
    parse_times(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The 14th to 17th field of `stat`.
fn parse_times(stat: &[u8]) -> Option<(u64, u64)> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace().skip(14 - 3);
    let mut next = || fields.next()?.parse::<u64>().ok();
    let (user, system, waited_user, waited_system) = (next()?, next()?, next()?, next()?);
    Some((user + system, waited_user + waited_system))
}

/// `pid (name) state parent …`; the name may hold anything, parentheses too.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    Some(Process {
        pid,
        parent,
        is_zombie: matches!(state, "Z" | "X"),
    })
}

/// Whether a connection to `address` would reach a descendant of `ancestor`.
pub(super) fn listens(ancestor: i32, address: SocketAddr) -> bool {
    let mut table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table.push_str(&fs::read_to_string("/proc/net/tcp6").unwrap_or_default());
    let wanted = listeners(&table, address);
    if wanted.is_empty() {
        return false;
    }
    let (mut owned, mut uids) = (HashSet::new(), HashSet::new());
    for pid in descendants(ancestor) {
        match socket_inodes(pid) {
            Some(inodes) => owned.extend(inodes),
            // Of another uid, which is one thread's alone; without CAP_SYS_PTRACE that is all there
            // is to see.
            None => uids.extend(uid_of(pid)),
        }
    }
    // All of them: with SO_REUSEPORT the kernel picks one.
    wanted
        .iter()
        .all(|listener| owned.contains(&listener.inode) || uids.contains(&listener.uid))
}

/// A line of the table of sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listener {
    inode: u64,
    uid: u32,
}

/// The uid that a process runs as, if that is one of those that greenroom gives.
fn uid_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let uid: u32 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Owner::new(uid, uid).map(Owner::uid)
}

/// The listeners that a connection to `address` could reach: those bound to the
/// very address, else those bound to all.
fn listeners(table: &str, address: SocketAddr) -> Vec<Listener> {
    const LISTEN: &str = "0A";
    let (mut exact, mut any) = (Vec::new(), Vec::new());
    for line in table.lines() {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (Some(local), Some(_), Some(LISTEN)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        // tx:rx queue, timer and retransmits come before the uid, the timeout before the inode.
        let uid = fields.nth(3).and_then(|uid| uid.parse().ok());
        let inode = fields.nth(1).and_then(|inode| inode.parse().ok());
        let (Some(uid), Some(inode)) = (uid, inode) else {
            continue;
        };
        let listener = Listener { inode, uid };
        let Some(bound) = parse_address(local) else {
            continue;
        };
        if bound.port() != address.port() {
            continue;
        }
        if bound.ip().to_canonical() == address.ip().to_canonical() {
            exact.push(listener);
        // `::` takes IPv4 connections too, unless told otherwise.
        } else if bound.ip().is_unspecified() && (bound.is_ipv6() || address.is_ipv4()) {
            any.push(listener);
        }
    }
    if exact.is_empty() { any } else { exact }
}

/// `0100007F:10E1`: groups of 32 bits as this machine stores them.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let groups = ip
        .as_bytes()
        .chunks(8)
        .map(|group| u32::from_str_radix(str::from_utf8(group).ok()?, 16).ok())
        .collect::<Option<Vec<_>>>()?;
    let bytes: Vec<u8> = groups.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip: IpAddr = if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
        Ipv4Addr::from(v4).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?).into()
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// `None` where we may not look.
fn socket_inodes(pid: i32) -> Option<Vec<u64>> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let mut inodes = Vec::new();
    for entry in folder {
        let target = match fs::read_link(entry.path()) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
            Err(_) => continue,
            Ok(target) => target,
        };
        let inode = target.to_str().and_then(|target| {
            let inode = target.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse::<u64>().ok()
        });
        inodes.extend(inode);
    }
    Some(inodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let process = parse_stat(7, b"7 (a) Z 1 (b)) S 42 7 7 0").unwrap();
        assert_eq!(
            process,
            Process {
                pid: 7,
                parent: 42,
                is_zombie: false
            }
        );
        assert!(parse_stat(7, b"7 (a) Z 42").unwrap().is_zombie);
        assert_eq!(parse_stat(7, b"7 (a"), None);
    }

    #[test]
    fn processor_time_is_found_behind_a_name_with_blanks() {
        let stat = b"7 (a b) c) S 42 7 7 0 -1 0 1 2 3 4 10 20 300 400 20 0 1 0 5";
        assert_eq!(parse_times(stat), Some((30, 700)));
        assert_eq!(parse_times(b"7 (a) S 42"), None);
    }

    #[test]
    fn what_descends_from_us_is_counted_and_nobody_else() {
        let parent = std::os::unix::process::parent_id().cast_signed();
        let load = load_below(parent);
        assert!(load.processes >= 1 && load.memory > 1 << 20, "{load:?}");
        assert!(load.memory < 1 << 40 && load.processor < Duration::from_secs(1 << 20));
        assert_eq!(load_below(i32::MAX), Load::default());
        let us = std::process::id().cast_signed();
        assert!(children_below(parent).is_none_or(|below| below.contains(&us)));
    }

    #[test]
    fn the_listener_that_a_connection_reaches() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:10E1 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 111 1\n\
            1: 00000000:10E1 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 222 1\n\
            2: 0100007F:10E1 0100007F:9999 01 00000000:00000000 00:00000000 00000000  1000        0 333 1\n\
            0: 00000000000000000000000001000000:10E2 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 444 1\n\
            1: 00000000000000000000000000000000:10E3 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 555 1\n";
        let none: [u64; 0] = [];
        let found = |address: &str| -> Vec<u64> {
            let found = listeners(table, address.parse().unwrap());
            assert!(found.iter().all(|listener| listener.uid == 1000));
            found.iter().map(|listener| listener.inode).collect()
        };
        assert_eq!(found("127.0.0.1:4321"), [111]);
        assert_eq!(found("127.0.0.2:4321"), [222]);
        assert_eq!(found("[::1]:4321"), none);
        assert_eq!(found("[::1]:4322"), [444]);
        assert_eq!(found("127.0.0.1:4322"), none);
        assert_eq!(found("127.0.0.1:4323"), [555]);
    }

    #[test]
    fn a_listener_of_ones_own_is_no_descendants() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(!listens(pid, listener.local_addr().unwrap()));
    }
}
