//! Who may be asked for: pure, of names and addresses alone.

use std::net::IpAddr;

use url::{Host, Url};

use crate::address::is_inside;

/// Where a child wants to: the host in its one spelling (lower case, no dot at its end, IDNA, an
/// address in whatever notation as an address).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) host: Host,
    pub(super) port: u16,
}

impl Target {
    /// `None` for what names no host.
    pub(super) fn new(host: &str, port: u16) -> Option<Self> {
        let host = host.strip_suffix('.').unwrap_or(host);
        let host = Host::parse(host).ok()?;
        Some(Self { host, port })
    }

    pub(super) fn of(url: &Url) -> Option<Self> {
        Self::new(url.host_str()?, url.port_or_known_default()?)
    }

    pub(super) fn address(&self) -> Option<IpAddr> {
        match self.host {
            Host::Ipv4(ip) => Some(ip.into()),
            Host::Ipv6(ip) => Some(ip.into()),
            Host::Domain(_) => None,
        }
    }
}

/// Why a child does not get where it wants to. One word each, for logs and figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No rule names it.
    Host,
    /// It is named, and not asked for on 443 or 80.
    Port,
    /// It is an address: only names are allowed.
    Address,
    /// Its name leads to an address inside.
    Inside,
}

impl Refusal {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Port => "port",
            Self::Address => "address",
            Self::Inside => "inside",
        }
    }
}

/// What allows a connection, and with it how far it may lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    /// A name of the list: to the outside alone.
    Listed,
    /// A registry that npm's settings name, which are the operator's: inside too.
    Registry,
}

/// Names that may be asked for; a leading dot means every name below, and not the name itself.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) names: Vec<String>,
    pub(super) registries: Vec<Target>,
}

impl Rules {
    pub(super) fn judge(&self, target: &Target) -> Result<Ground, Refusal> {
        if self.registries.contains(target) {
            return Ok(Ground::Registry);
        }
        let Host::Domain(host) = &target.host else {
            return Err(Refusal::Address);
        };
        let is_named = self.names.iter().any(|name| match name.strip_prefix('.') {
            Some(_) => host.len() > name.len() && host.ends_with(name),
            None => host == name,
        });
        match (is_named, target.port) {
            (true, 443 | 80) => Ok(Ground::Listed),
            (true, _) => Err(Refusal::Port),
            (false, _) => Err(Refusal::Host),
        }
    }
}

impl Ground {
    /// Whether a connection may be made to this address of the target's.
    pub(super) fn leads_to(self, target: &Target, address: IpAddr) -> bool {
        match self {
            Self::Listed => !is_inside(address),
            Self::Registry => {
                let is_loopback_meant = match &target.host {
                    Host::Domain(name) => name == "localhost",
                    Host::Ipv4(ip) => ip.is_loopback(),
                    Host::Ipv6(ip) => ip.is_loopback(),
                };
                let address = address.to_canonical();
                let is_nobody = match address {
                    IpAddr::V4(ip) => ip.is_link_local(),
                    IpAddr::V6(ip) => {
                        ip.is_unicast_link_local() || ip.segments()[..2] == [0xfd00, 0x0ec2]
                    }
                };
                let is_here = address.is_loopback() || address.is_unspecified();
                !is_nobody && !address.is_multicast() && (is_loopback_meant || !is_here)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(rules: &Rules, host: &str, port: u16) -> Result<Ground, Refusal> {
        rules.judge(&Target::new(host, port).unwrap())
    }

    fn rules() -> Rules {
        let registry = Url::parse("http://127.0.0.1:4873/npm/").unwrap();
        Rules {
            names: vec!["api.example.com".into(), ".example.org".into()],
            registries: vec![Target::of(&registry).unwrap()],
        }
    }

    #[test]
    fn names_are_taken_by_the_letter_in_all_their_spellings() {
        let rules = rules();
        for host in [
            "api.example.com",
            "API.Example.COM",
            "api.example.com.",
            "a.example.org",
            "a.b.example.org",
        ] {
            assert_eq!(judge(&rules, host, 443), Ok(Ground::Listed), "{host}");
        }
        for host in [
            "example.com",
            "xapi.example.com",
            "a.api.example.com",
            "api.example.com.evil.example",
            "example.org",
            "xexample.org",
            ".example.org",
            "api.example.com..",
            "localhost",
            "registry.example",
        ] {
            // Or it is no name at all.
            let judged = Target::new(host, 443).map(|target| rules.judge(&target));
            assert!(!matches!(judged, Some(Ok(_))), "{host}: {judged:?}");
        }
    }

    #[test]
    fn addresses_are_refused_in_every_notation_but_where_the_operator_s_registry_is() {
        let rules = rules();
        for host in [
            "93.184.216.34",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "169.254.170.2",
        ] {
            assert_eq!(judge(&rules, host, 443), Err(Refusal::Address), "{host}");
        }
        assert_eq!(judge(&rules, "127.0.0.1", 4873), Ok(Ground::Registry));
        assert_eq!(judge(&rules, "127.0.0.1", 8080), Err(Refusal::Address));
    }

    #[test]
    fn only_the_web_s_ports_are_open() {
        let rules = rules();
        assert_eq!(judge(&rules, "api.example.com", 80), Ok(Ground::Listed));
        for port in [0, 22, 25, 4873, 8080, 8443] {
            assert_eq!(judge(&rules, "api.example.com", port), Err(Refusal::Port));
        }
    }

    #[test]
    fn a_name_that_leads_inside_leads_nowhere() {
        let may = |ground: Ground, host: &str, address: &str| {
            let target = Target::new(host, 443).unwrap();
            ground.leads_to(&target, address.parse().unwrap())
        };
        assert!(may(Ground::Listed, "api.example.com", "140.82.121.4"));
        for inside in ["127.0.0.1", "10.0.0.8", "169.254.170.2", "::1", "fd00::1"] {
            assert!(!may(Ground::Listed, "api.example.com", inside), "{inside}");
        }
        // The operator's registry may be next door, and on this machine where that is what it says.
        assert!(may(Ground::Registry, "npm.corp.example", "10.0.0.8"));
        assert!(may(Ground::Registry, "localhost", "127.0.0.1"));
        for (host, address) in [
            ("npm.corp.example", "127.0.0.1"),
            ("npm.corp.example", "0.0.0.0"),
            ("npm.corp.example", "169.254.170.2"),
            ("npm.corp.example", "::ffff:169.254.170.2"),
            ("npm.corp.example", "fd00:ec2::254"),
        ] {
            assert!(!may(Ground::Registry, host, address), "{host} {address}");
        }
    }
}
