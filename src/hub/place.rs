//! Where files may be sent: what the Hub names is its word alone, and a Hub that is not what it says (or
//! whoever stands for it) must not lead us to what only this machine can reach.

use std::{
    error::Error,
    fmt,
    net::{IpAddr, SocketAddr},
};

use reqwest::{
    Client,
    dns::{Addrs, Name, Resolve, Resolving},
};
use url::{Host, Url};

use super::{
    client::{Hub, built},
    error::HubError,
};
use crate::{
    address::is_inside,
    outbound::{self, is_loopback},
};

/// An address to which a file may be sent: another host by https, this machine only where the Hub is
/// on it too. A name is judged again by what it stands for, as it is connected to: [`client`].
pub(super) fn storage(hub: &Hub, href: &str) -> Result<Url, &'static str> {
    if let Some(url) = hub.on_hub(href) {
        return Ok(url);
    }
    let url: Url = href.parse().map_err(|_| "it is none")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it holds a password");
    }
    if is_loopback(&url) {
        return match is_loopback(&hub.url) {
            true => Ok(url),
            false => Err("it is of this machine"),
        };
    }
    if literal(&url).is_some_and(|address| !may_hold(address, literal(&hub.url))) {
        return Err(INSIDE);
    }
    match url.scheme() == "https" {
        true => Ok(url),
        false => Err("it is not https"),
    }
}

/// A client for such an address. Where a proxy is in between the name is the proxy's to look up.
pub(super) async fn client(hub: &Hub, url: &Url) -> Result<Client, HubError> {
    let builder = outbound::client_builder(url);
    let Some(Host::Domain(storage)) = url.host() else {
        return built(builder).await;
    };
    // This machine was judged already.
    if is_loopback(url) {
        return built(builder).await;
    }
    let judged = Judged {
        storage: storage.to_owned(),
        hub: hub.url.clone(),
    };
    built(builder.dns_resolver(judged)).await
}

/// Did an upload go nowhere because its address stands for one inside?
pub(super) fn is_refusal(error: &reqwest::Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.any(|cause| cause.is::<Inside>())
}

/// Why it is refused.
pub(super) const INSIDE: &str = "it is of a network inside";

#[derive(Debug)]
struct Inside;

impl fmt::Display for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(INSIDE)
    }
}

impl Error for Inside {}

/// Looks names up, and refuses the storage's where that leads inside. A proxy's own name is looked up here
/// too, and may.
#[derive(Debug)]
struct Judged {
    storage: String,
    hub: Url,
}

impl Resolve for Judged {
    fn resolve(&self, name: Name) -> Resolving {
        let name = name.as_str().to_owned();
        let is_judged = name.eq_ignore_ascii_case(&self.storage);
        let hub = self.hub.clone();
        Box::pin(async move {
            let found = lookup(&name).await?;
            if is_judged && found.iter().any(|found| is_inside(found.ip())) {
                let hub = address_of(&hub).await;
                if found.iter().any(|found| !may_hold(found.ip(), hub)) {
                    return Err(Inside.into());
                }
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

async fn lookup(name: &str) -> std::io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host((name, 0)).await?.collect())
}

async fn address_of(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Domain(name) => Some(lookup(name).await.ok()?.first()?.ip()),
        _ => literal(url),
    }
}

fn literal(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(ip) => Some(ip.into()),
        Host::Ipv6(ip) => Some(ip.into()),
        Host::Domain(_) => None,
    }
}

/// May a storage be at this address? Inside only where the Hub is inside of the same network, as one that
/// a company keeps for itself; never where machines are told their credentials, nor on this one.
fn may_hold(address: IpAddr, hub: Option<IpAddr>) -> bool {
    let is_own = |address: IpAddr| match address.to_canonical() {
        IpAddr::V4(ip) => ip.is_private(),
        // What clouds keep for themselves is in this range as well.
        IpAddr::V6(ip) => ip.is_unique_local() && ip.segments()[..2] != [0xfd00, 0xec2],
    };
    !is_inside(address) || is_own(address) && hub.is_some_and(is_own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{HubSettings, STILL};

    async fn hub(endpoint: &str) -> Hub {
        let settings = HubSettings {
            endpoint: endpoint.to_owned(),
            token: None,
            still: STILL,
            unfinished: None,
        };
        Hub::new(settings).await.unwrap()
    }

    #[tokio::test]
    async fn files_go_to_addresses_outside_by_https_alone() {
        let public = hub("https://huggingface.co").await;
        for (href, is_fine) in [
            ("https://s3.example.com/bucket/x?signature=1", true),
            ("https://huggingface.co/x", true),
            ("http://s3.example.com/x", false),
            ("http://huggingface.co/x", false),
            ("https://127.0.0.1/x", false),
            ("http://127.0.0.1:8080/x", false),
            ("https://localhost/x", false),
            ("https://169.254.169.254/x", false),
            ("https://10.0.0.1/x", false),
            ("https://[fd00::1]/x", false),
            ("https://[::ffff:10.0.0.1]/x", false),
            (concat!("https://user:", "word@s3.example.com/x"), false),
            ("file:///etc/passwd", false),
            ("data:,x", false),
        ] {
            assert_eq!(storage(&public, href).is_ok(), is_fine, "{href}");
        }
        // A stand-in on this machine may name another port of it.
        let here = hub("http://127.0.0.1:9").await;
        assert!(storage(&here, "http://127.0.0.1:10/x").is_ok());
        assert!(storage(&here, "http://10.0.0.1/x").is_err());
        assert!(storage(&here, "https://10.0.0.1/x").is_err());
        // One that a company keeps has its storage beside it, and nothing else.
        let own = hub("https://10.1.1.1").await;
        for (href, is_fine) in [
            ("https://10.0.0.1/x", true),
            ("https://169.254.169.254/x", false),
            ("https://[fd00:ec2::254]/x", false),
            ("https://127.0.0.1/x", false),
            ("https://100.64.0.1/x", false),
        ] {
            assert_eq!(storage(&own, href).is_ok(), is_fine, "{href}");
        }
    }

    #[tokio::test]
    async fn a_name_that_stands_for_an_address_inside_is_not_connected_to() {
        // The one name that is certain to lead inside, taken for a storage's.
        let judged = |hub: &str| Judged {
            storage: "localhost".to_owned(),
            hub: hub.parse().unwrap(),
        };
        for hub in [
            "https://192.0.2.1",
            "https://10.0.0.1",
            "https://127.0.0.1",
            "https://localhost",
        ] {
            let resolving = judged(hub).resolve("LocalHost".parse().unwrap());
            let error = resolving.await.err().expect("it leads inside");
            assert!(error.is::<Inside>(), "{error}");
        }
        // A proxy's is the operator's word.
        let proxy = Judged {
            storage: "s3.example.com".to_owned(),
            hub: "https://192.0.2.1".parse().unwrap(),
        };
        assert!(proxy.resolve("localhost".parse().unwrap()).await.is_ok());
        // And it is told from a host that cannot be reached.
        let here = "http://localhost:9/".parse().unwrap();
        let client = outbound::client_builder(&here)
            .dns_resolver(judged("https://192.0.2.1"))
            .build()
            .unwrap();
        let error = client.get("http://localhost:9/").send().await.unwrap_err();
        assert!(is_refusal(&error), "{error:?}");
        let error = client.get("http://127.0.0.1:9/").send().await.unwrap_err();
        assert!(!is_refusal(&error), "{error:?}");
    }
}
