//! What `/proc` knows: who descends from whom, and who listens where.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

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

/// The resident memory of all that descends from `ancestor`, in bytes. Shared pages count for each
/// that shares them.
pub(super) fn memory_below(ancestor: i32) -> u64 {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let page = page.ok().flatten().map_or(4096, i64::unsigned_abs);
    descendants(ancestor)
        .into_iter()
        .filter_map(|pid| {
            let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            // Size, resident, shared, …: in pages.
            statm.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .sum::<u64>()
        * page
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
