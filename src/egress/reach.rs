//! Ways out: a name becomes addresses once, each is judged, and what was judged is what is connected
//! to. Where the operator has a proxy of their own, it is the way out.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use http::{HeaderValue, Uri, uri::Scheme};
use hyper_util::client::proxy::matcher::Matcher;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use url::Host;

use super::rules::{Ground, Refusal, Target};

/// For the name.
const LOOK_UP: Duration = Duration::from_secs(10);
/// For all of its addresses together, and for one where there are more.
const CONNECT: Duration = Duration::from_secs(20);
const CONNECT_ONE: Duration = Duration::from_secs(5);
/// Addresses that are tried; a name may have hundreds.
const TRIED: usize = 8;
/// For the operator's proxy to answer, and the longest head of its answer.
const PROXY_ANSWER: Duration = Duration::from_secs(20);
const PROXY_HEAD: usize = 8 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReachError {
    #[error("it leads to an address inside a private network")]
    Refused(Refusal),
    #[error("its name could not be looked up")]
    LookUp(#[source] io::Error),
    #[error("it could not be connected to")]
    Connect(#[source] io::Error),
    /// Never repeated: its address may hold a password.
    #[error("the operator's proxy did not let it through: {0}")]
    Proxy(String),
}

/// A connection, and how to ask on it for what is not tunnelled.
pub(super) struct Reached {
    pub(super) stream: TcpStream,
    /// It leads to the operator's proxy, which has to be told the whole address, with this proof.
    pub(super) proxy: Option<Option<HeaderValue>>,
}

/// How connections leave this machine.
#[derive(Debug)]
pub(super) struct WayOut {
    proxies: Matcher,
}

impl WayOut {
    /// By `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` of this process.
    pub(super) fn from_env() -> Self {
        Self {
            proxies: Matcher::from_env(),
        }
    }

    #[cfg(test)]
    pub(super) fn by(proxies: Matcher) -> Self {
        Self { proxies }
    }

    /// A connection that bytes can be sent on as if it were the target's own.
    pub(super) async fn tunnel(
        &self,
        target: &Target,
        ground: Ground,
    ) -> Result<TcpStream, ReachError> {
        // By its port: 80 is for what is not encrypted, whoever tunnels it.
        let scheme = match target.port {
            80 => Scheme::HTTP,
            _ => Scheme::HTTPS,
        };
        let Some((mut stream, proof)) = self.operators_proxy(target, scheme).await? else {
            return direct(target, ground).await;
        };
        let ask = ask_for_tunnel(&mut stream, target, proof);
        match timeout(PROXY_ANSWER, ask).await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => Err(ReachError::Proxy(error.to_string())),
            Err(_) => Err(ReachError::Proxy("no answer".to_owned())),
        }
    }

    /// A connection for one request that is not encrypted.
    pub(super) async fn plain(
        &self,
        target: &Target,
        ground: Ground,
    ) -> Result<Reached, ReachError> {
        match self.operators_proxy(target, Scheme::HTTP).await? {
            Some((stream, proof)) => Ok(Reached {
                stream,
                proxy: Some(proof),
            }),
            None => Ok(Reached {
                stream: direct(target, ground).await?,
                proxy: None,
            }),
        }
    }

    /// A connection to the proxy that the operator wants to be used for this target. Names are
    /// looked up there: this machine may be unable to.
    async fn operators_proxy(
        &self,
        target: &Target,
        scheme: Scheme,
    ) -> Result<Option<(TcpStream, Option<HeaderValue>)>, ReachError> {
        let to_loopback = match &target.host {
            Host::Domain(name) => name == "localhost",
            Host::Ipv4(ip) => ip.is_loopback(),
            Host::Ipv6(ip) => ip.is_loopback(),
        };
        let uri = Uri::builder()
            .scheme(scheme)
            .authority(format!("{}:{}", target.host, target.port))
            .path_and_query("/")
            .build();
        let proxy = uri.ok().and_then(|uri| self.proxies.intercept(&uri));
        let Some(proxy) = proxy.filter(|_| !to_loopback) else {
            return Ok(None);
        };
        if proxy.uri().scheme() != Some(&Scheme::HTTP) {
            return Err(ReachError::Proxy(
                "only a proxy whose address begins with http:// can be used here".to_owned(),
            ));
        }
        let host = proxy.uri().host().unwrap_or_default();
        let port = proxy.uri().port_u16().unwrap_or(80);
        let connect = TcpStream::connect((host.trim_matches(['[', ']']), port));
        match timeout(CONNECT, connect).await {
            Ok(Ok(stream)) => Ok(Some((stream, proxy.basic_auth().cloned()))),
            Ok(Err(error)) => Err(ReachError::Proxy(error.kind().to_string())),
            Err(_) => Err(ReachError::Proxy("no answer".to_owned())),
        }
    }
}

async fn direct(target: &Target, ground: Ground) -> Result<TcpStream, ReachError> {
    let found = match target.address() {
        Some(ip) => vec![SocketAddr::new(ip, target.port)],
        None => look_up(target).await.map_err(ReachError::LookUp)?,
    };
    let mut addresses: Vec<_> = found
        .into_iter()
        .filter(|address| ground.leads_to(target, address.ip()))
        .collect();
    if addresses.is_empty() {
        return Err(ReachError::Refused(Refusal::Inside));
    }
    addresses.truncate(TRIED);
    connect(&addresses).await.map_err(ReachError::Connect)
}

async fn look_up(target: &Target) -> io::Result<Vec<SocketAddr>> {
    let look = tokio::net::lookup_host((target.host.to_string(), target.port));
    let found: Vec<_> = timeout(LOOK_UP, look).await??.collect();
    match found.is_empty() {
        true => Err(io::ErrorKind::NotFound.into()),
        false => Ok(found),
    }
}

/// The first that answers, in the resolver's order.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let until = Instant::now() + CONNECT;
    let mut failure = io::Error::from(io::ErrorKind::TimedOut);
    for (number, address) in addresses.iter().enumerate() {
        let left = until.saturating_duration_since(Instant::now());
        let limit = match number + 1 == addresses.len() {
            true => left,
            false => left.min(CONNECT_ONE),
        };
        match timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failure = error,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure)
}

/// `CONNECT` of the operator's proxy, up to the end of its answer's head.
async fn ask_for_tunnel(
    stream: &mut TcpStream,
    target: &Target,
    proof: Option<HeaderValue>,
) -> io::Result<()> {
    let place = format!("{}:{}", target.host, target.port);
    let mut head = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n").into_bytes();
    if let Some(proof) = proof {
        head.extend_from_slice(b"Proxy-Authorization: ");
        head.extend_from_slice(proof.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    stream.write_all(&head).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the head is the target's.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= PROXY_HEAD {
            return Err(io::Error::other("an answer without end"));
        }
        answer.push(stream.read_u8().await?);
    }
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split(' ').nth(1).unwrap_or_default();
    match status.parse::<u16>() {
        Ok(200..=299) => Ok(()),
        Ok(status) => Err(io::Error::other(format!("status {status}"))),
        Err(_) => Err(io::Error::other("no HTTP")),
    }
}
