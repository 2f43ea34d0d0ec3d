//! Which addresses are inside: of this machine, of its network, of its cloud. A customer's word must
//! not reach them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether an address leads to something that only machines in here can reach, or to nobody.
pub fn is_inside(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(ip) => is_inside_v4(ip),
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                // Clouds keep credentials there too (`fd00:ec2::/32`).
                || ip.is_unique_local()
                || ip.is_unicast_link_local()
                || carried(ip).is_some_and(is_inside_v4)
        }
    }
}

fn is_inside_v4(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || a == 0
        || a >= 240
        // Shared by carriers and clouds (RFC 6598).
        || a == 100 && (64..128).contains(&b)
}

/// The IPv4 address in one that a translator leads to: NAT64's (RFC 6052), 6to4's.
fn carried(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = ip.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match (a, b, [c, d, e, f]) {
        (0x64, 0xff9b, [0, 0, 0, 0]) => Some(v4(g, h)),
        (0x2002, ..) => Some(v4(b, c)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inside_is_told_from_outside_in_every_spelling() {
        for inside in [
            "10.1.2.3",
            "127.8.9.1",
            "0.0.0.0",
            "169.254.170.2",
            "100.64.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fd00::1",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
        ] {
            assert!(is_inside(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "140.82.121.4",
            "100.128.0.1",
            "2606:50c0::1",
            "64:ff9b::8c52:7904",
        ] {
            assert!(!is_inside(outside.parse().unwrap()), "{outside}");
        }
    }
}
