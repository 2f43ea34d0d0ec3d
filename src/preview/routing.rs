//! Which preview a request is for, and which page may speak to it. Pure.

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr},
};

use http::HeaderValue;

/// A Host as browsers send it, read once: a browser sends the same one with every request.
#[derive(Debug)]
pub(crate) struct Host {
    value: HeaderValue,
    /// By [`host_name`].
    name: String,
    /// The first of several labels; an address has none.
    label: Option<String>,
    /// `localhost`, a name below it, or an address.
    is_local: bool,
}

impl Host {
    /// `None` if this names no host.
    pub(crate) fn read(value: &HeaderValue) -> Option<Self> {
        let name = host_name(value.to_str().ok()?).into_owned();
        if name.is_empty() {
            return None;
        }
        let v6 = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
        let is_local = name == "localhost"
            || name.ends_with(".localhost")
            || name.parse::<Ipv4Addr>().is_ok()
            || v6.is_some_and(|v6| v6.parse::<Ipv6Addr>().is_ok());
        Some(Self {
            label: first_label(&name).map(str::to_owned),
            is_local,
            name,
            value: value.clone(),
        })
    }

    /// As the browser sent it.
    pub(crate) fn value(&self) -> &HeaderValue {
        &self.value
    }

    /// The same as text.
    pub(crate) fn text(&self) -> &str {
        self.value.to_str().expect("it was read as text")
    }

    pub(crate) fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// Does Vite serve this Host? `localhost` and names below it, addresses, and the names that
    /// the dev server was told (measured with Vite 8.3.8).
    pub(crate) fn passes_host_check(&self, allowed: &[String]) -> bool {
        self.is_local || allowed.iter().any(|n| n.eq_ignore_ascii_case(&self.name))
    }
}

/// What `find` knows: by the first label of the host name, else the cookie's thread, else the
/// default.
pub(crate) fn choose<T>(
    label: Option<&str>,
    cookie: Option<&str>,
    default: Option<&str>,
    find: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    if let Some(label) = label {
        let found = find(label);
        if found.is_some() || is_slug(label) {
            return found;
        }
    }
    [cookie, default].into_iter().flatten().find_map(find)
}

/// A host without its port, in lower case, and without the dot of a full name.
fn host_name(host: &str) -> Cow<'_, str> {
    let before_digits = host.trim_end_matches(|c: char| c.is_ascii_digit());
    let name = match before_digits.strip_suffix(':') {
        Some(name) if !ends_inside_v6(name) => name,
        _ => host,
    };
    let name = name.trim_end_matches('.');
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        name.to_ascii_lowercase().into()
    } else {
        name.into()
    }
}

/// `[::1` of an address without a port.
fn ends_inside_v6(name: &str) -> bool {
    name.starts_with('[') && !name.ends_with(']')
}

fn first_label(name: &str) -> Option<&str> {
    let (label, rest) = name.split_once('.')?;
    let is_address = name.starts_with('[') || rest.rsplit('.').next()?.parse::<u8>().is_ok();
    (!is_address && !label.is_empty()).then_some(label)
}

/// Is this a label that `ThreadKey::slug` makes: a dash and 12 hex digits at its end?
fn is_slug(label: &str) -> bool {
    label.rsplit_once('-').is_some_and(|(_, digest)| {
        digest.len() == 12
            && digest
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

/// How much of an Origin must be that of the Host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SameSite {
    /// Name and port: the page and the request came through the same listener.
    NameAndPort,
    /// The name alone: the page came through the listener next door.
    Name,
}

/// Does a page of this Origin belong to this Host? `null` belongs to none (RFC 6454 7.1).
pub(crate) fn is_own_origin(origin: &str, host: &str, same: SameSite) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else {
        return false;
    };
    let default_port = match scheme {
        "http" => "80",
        "https" => "443",
        _ => return false,
    };
    if authority.contains(['/', '@', '?', '#']) || host_name(authority) != host_name(host) {
        return false;
    }
    // A Host without a port has the page's default one: TLS may end before us.
    same == SameSite::Name
        || port_of(authority).unwrap_or(default_port) == port_of(host).unwrap_or(default_port)
}

fn port_of(authority: &str) -> Option<&str> {
    let (name, port) = authority.rsplit_once(':')?;
    (!ends_inside_v6(name) && !port.is_empty()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::ThreadKey;

    const A: &str = "acme-alice-main-0123456789ab";
    const B: &str = "acme-alice-blue-ba9876543210";

    fn read(host: &str) -> Option<Host> {
        Host::read(&HeaderValue::from_str(host).unwrap())
    }

    fn passes_host_check(host: &str, allowed: &[String]) -> bool {
        read(host).is_some_and(|host| host.passes_host_check(allowed))
    }

    fn known(slug: &str) -> Option<String> {
        [A, B].contains(&slug).then(|| slug.to_owned())
    }

    fn chosen(host: &str, cookie: Option<&str>, default: Option<&str>) -> Option<String> {
        let host = read(host);
        let label = host.as_ref().and_then(Host::label);
        choose(label, cookie, default, known)
    }

    #[test]
    fn host_label_then_cookie_then_default() {
        let a = Some(A.to_owned());
        let b = Some(B.to_owned());
        for host in [
            format!("{A}.localhost:4321"),
            format!("{A}.preview.example.com"),
            format!("{}.LocalHost", A.to_uppercase()),
            format!("{A}.localhost.:4321"),
        ] {
            assert_eq!(chosen(&host, Some(B), Some(B)), a, "{host}");
        }
        for host in [
            "localhost:4321",
            "127.0.0.1:4321",
            "[::1]:4321",
            "preview.example.com",
            "",
        ] {
            assert_eq!(chosen(host, Some(B), Some(A)), b, "{host}");
            assert_eq!(chosen(host, None, Some(A)), a, "{host}");
            assert_eq!(chosen(host, Some("gone"), Some(A)), a, "{host}");
            assert_eq!(chosen(host, None, None), None, "{host}");
        }
        assert_eq!(choose(None, None, Some(A), known), Some(A.to_owned()));
    }

    #[test]
    fn the_address_of_an_unknown_thread_shows_no_other() {
        assert_eq!(
            chosen("acme-bob-x-00112233aabb.localhost:4321", Some(A), Some(A)),
            None
        );
        let slug = ThreadKey::parse("a", "b", "c").unwrap().slug();
        assert!(is_slug(&slug));
    }

    #[test]
    fn hosts_that_vite_serves() {
        let allowed = ["site.preview.example.com".to_owned()];
        for host in [
            "localhost",
            "localhost:4321",
            "a.localhost:1",
            "10.0.0.7:80",
            "[::1]:4321",
            "[fe80::1]",
            "Site.preview.example.com:443",
        ] {
            assert!(passes_host_check(host, &allowed), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "",
            "xlocalhost",
            "[nonsense]",
        ] {
            assert!(!passes_host_check(host, &allowed), "{host}");
        }
    }

    #[test]
    fn only_a_page_of_the_same_host_may_open_a_socket() {
        for (origin, host) in [
            ("http://a.localhost:4321", "a.localhost:4321"),
            ("https://a.preview.example.com", "a.preview.example.com"),
            ("https://a.preview.example.com", "a.preview.example.com:443"),
            ("http://[::1]:4321", "[::1]:4321"),
        ] {
            assert!(
                is_own_origin(origin, host, SameSite::NameAndPort),
                "{origin} {host}"
            );
        }
        for (origin, host) in [
            ("null", "a.localhost:4321"),
            ("http://b.localhost:4321", "a.localhost:4321"),
            ("http://a.localhost:4322", "a.localhost:4321"),
            ("http://a.localhost", "a.localhost:4321"),
            ("http://a.localhost:4321.evil.example", "a.localhost:4321"),
            ("http://a.localhost:4321@evil.example", "a.localhost:4321"),
            ("file://a.localhost:4321", "a.localhost:4321"),
            ("", "a.localhost:4321"),
        ] {
            assert!(
                !is_own_origin(origin, host, SameSite::NameAndPort),
                "{origin} {host}"
            );
        }
        assert!(is_own_origin(
            "http://a.localhost:4321",
            "a.localhost:4322",
            SameSite::Name
        ));
        assert!(!is_own_origin(
            "http://b.localhost:4321",
            "a.localhost:4322",
            SameSite::Name
        ));
    }
}
