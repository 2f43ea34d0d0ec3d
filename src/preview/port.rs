//! One loopback port for each worktree, for life: another port makes Astro clear its content
//! store and optimise the dependencies anew.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, TcpListener},
};

use sha2::{Digest, Sha256};

const FIRST: u16 = 20_000;
const COUNT: u16 = 10_000;

/// Picks a dev server's port: the one it had (`preferred`), else one derived from the slug, so
/// that a container that forgot it finds the same one again. `taken` are the ports of other
/// threads. Binds for a moment to see that the port is free; blocks only on system calls.
pub fn pick_port(preferred: Option<u16>, taken: &HashSet<u16>, slug: &str) -> u16 {
    let digest = Sha256::digest(slug);
    let start = u16::from_be_bytes([digest[0], digest[1]]) % COUNT;
    let derived = (0..COUNT).map(|step| FIRST + (start + step) % COUNT);
    let first = preferred.unwrap_or(FIRST + start);
    preferred
        .into_iter()
        .chain(derived)
        .find(|port| !taken.contains(port) && is_free(*port))
        // Ten thousand ports in use: let the start fail and say so.
        .unwrap_or(first)
}

/// Could a server listen here now?
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_port_unless_somebody_has_it() {
        let none = HashSet::new();
        let port = pick_port(None, &none, "acme-alice-main-0123456789ab");
        assert!((FIRST..FIRST + COUNT).contains(&port));
        assert_eq!(pick_port(None, &none, "acme-alice-main-0123456789ab"), port);
        assert_eq!(
            pick_port(Some(port), &none, "other"),
            port,
            "what it had comes first"
        );

        let taken = HashSet::from([port]);
        assert_ne!(
            pick_port(Some(port), &taken, "acme-alice-main-0123456789ab"),
            port
        );

        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let busy = held.local_addr().unwrap().port();
        assert_ne!(pick_port(Some(busy), &none, "x"), busy);
    }
}
