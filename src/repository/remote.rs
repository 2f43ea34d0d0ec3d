//! git over HTTPS, by a transport of our own: libgit2 is built without one.
//!
//! A [`Remotes::session`] is one fetch from one address. It stands in a thread-local while
//! libgit2 works, because libgit2 makes transports by itself and on the calling thread. The
//! transport talks to that address and nothing else, whatever a repository's configuration may
//! rewrite it to, and sends the token only to hosts that may have it.
//!
//! Other network protocols are refused: libgit2's own `http`, `git` and `ssh` are replaced by a
//! transport that always fails.

use std::{
    cell::RefCell,
    fmt,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::Engine as _;
use bytes::{Buf as _, Bytes};
use git2::{
    ErrorClass, ErrorCode, FetchOptions, RemoteCallbacks,
    transport::{Service, SmartSubtransport, SmartSubtransportStream, Transport},
};
use http::{HeaderValue, StatusCode, header};
use reqwest::{Client, Response, redirect};
use url::{Host, Url};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server: it may have to pack a large repository before it says a word.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest session as a whole.
const SESSION_TIMEOUT: Duration = Duration::from_secs(600);
/// Most bytes of one session, received or (what we ask for) sent.
const MAX_RECEIVED: u64 = 4 << 30;
const MAX_SENT: usize = 64 << 20;
const MAX_REDIRECTS: usize = 5;

/// Who gets our token.
#[derive(Clone, Default)]
pub struct Remotes {
    token: Option<String>,
    hosts: Vec<String>,
}

impl fmt::Debug for Remotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "***");
        f.debug_struct("Remotes")
            .field("token", &token)
            .field("hosts", &self.hosts)
            .finish()
    }
}

/// What kept us from fetching, by what a person can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteErrorKind {
    /// Private, or not there: servers answer alike.
    Auth,
    /// Not reachable, or too slow; trying again may help.
    Network,
    /// The server (or a rule of ours) says no; trying again does not help.
    Rejected,
}

/// A fetch that failed. The text is for the person who asked and holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    pub kind: RemoteErrorKind,
    pub message: String,
}

impl Remotes {
    /// `token` goes to github.com and to `hosts` alone (a host name each, or `name:port`).
    /// Addresses inside private networks are fetched from only where `hosts` names them.
    pub fn new(token: Option<String>, hosts: Vec<String>) -> Self {
        Self {
            token: token.filter(|token| !token.is_empty()),
            hosts,
        }
    }

    fn is_named(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else {
            return false;
        };
        let with_port = url
            .port_or_known_default()
            .map(|port| format!("{host}:{port}"));
        self.hosts.iter().any(|named| {
            named.eq_ignore_ascii_case(host)
                || with_port
                    .as_ref()
                    .is_some_and(|host| named.eq_ignore_ascii_case(host))
        })
    }

    /// The header that carries the token to `url`, if its host may have it.
    fn authorization(&self, url: &Url) -> Option<HeaderValue> {
        let is_github = url.host_str() == Some("github.com") && url.port().is_none();
        let is_allowed = url.scheme() == "https" || is_test_address(url);
        let token = self
            .token
            .as_ref()
            .filter(|_| is_allowed && (is_github || self.is_named(url)))?;
        let pair = format!("x-access-token:{token}");
        let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
        let mut value = HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Runs one operation against `url`: `work` gets the address and options for libgit2.
    pub(super) fn session<T>(
        &self,
        url: &Url,
        work: impl FnOnce(&str, &mut FetchOptions<'_>) -> Result<T, git2::Error>,
    ) -> Result<T, RemoteError> {
        super::init();
        let session = Arc::new(Session::new(self, url)?);
        let current = Current::enter(Arc::clone(&session));
        let mut callbacks = RemoteCallbacks::new();
        let watched = Arc::clone(&session);
        callbacks.transfer_progress(move |_| Instant::now() < watched.deadline);
        let mut options = FetchOptions::new();
        options.remote_callbacks(callbacks);
        let outcome = work(url.as_str(), &mut options);
        drop(options);
        drop(current);
        outcome.map_err(|error| {
            // What the transport found is nearer to the cause than what libgit2 made of it.
            session
                .take_failure()
                .unwrap_or_else(|| session.unexpected(&error))
        })
    }
}

/// In the tests of this room a git server without TLS stands on loopback.
fn is_test_address(url: &Url) -> bool {
    cfg!(test) && url.scheme() == "http" && url.host_str() == Some("127.0.0.1")
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Session>>> = const { RefCell::new(None) };
}

/// Makes a session the calling thread's, until dropped.
struct Current;

impl Current {
    fn enter(session: Arc<Session>) -> Self {
        CURRENT.set(Some(session));
        Self
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}

/// One operation against one address.
struct Session {
    url: Url,
    /// Where requests go: the address, or what the server redirected it to.
    base: Mutex<String>,
    authorization: Option<HeaderValue>,
    client: Client,
    /// Of this session alone, so that no task of it outlives it. `Some` until dropped.
    runtime: Option<tokio::runtime::Runtime>,
    deadline: Instant,
    received: Mutex<u64>,
    failure: Mutex<Option<RemoteError>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A look-up of a name may hang; nobody waits for it.
            runtime.shutdown_background();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn new(remotes: &Remotes, url: &Url) -> Result<Self, RemoteError> {
        let broken = |error: &dyn fmt::Display| RemoteError {
            kind: RemoteErrorKind::Network,
            message: format!("HTTPS could not be set up: {error}"),
        };
        let is_trusted = remotes.is_named(url);
        let host = url.host_str().unwrap_or_default();
        let address = match url.host() {
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
            _ => None,
        };
        if !is_trusted && address.is_some_and(is_private) {
            return Err(RemoteError {
                kind: RemoteErrorKind::Rejected,
                message: private_text(host),
            });
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| broken(&error))?;
        let mut client = Client::builder()
            // Hosting services answer git only to clients that name themselves like it.
            .user_agent(concat!(
                "git/2.0 (greenroom ",
                env!("CARGO_PKG_VERSION"),
                ")"
            ))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .referer(false)
            .redirect(redirect::Policy::custom(follow));
        if !is_test_address(url) {
            client = client.https_only(true);
        }
        client = if is_trusted {
            // A host that the operator named may be inside, where no proxy leads.
            if address.is_some_and(|ip| ip.is_loopback()) {
                client.no_proxy()
            } else {
                client
            }
        } else {
            client.dns_resolver(PublicOnly)
        };
        // One that is installed already is as good.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let client = client.build().map_err(|error| broken(&innermost(&error)))?;
        Ok(Self {
            url: url.clone(),
            base: Mutex::new(url.as_str().trim_end_matches('/').to_owned()),
            authorization: remotes.authorization(url),
            client,
            runtime: Some(runtime),
            deadline: Instant::now() + SESSION_TIMEOUT,
            received: Mutex::new(0),
            failure: Mutex::new(None),
        })
    }

    fn host(&self) -> &str {
        self.url.host_str().unwrap_or("the server")
    }

    /// Remembers the first failure and gives libgit2 and `io` something to carry.
    fn fail(&self, kind: RemoteErrorKind, message: String) -> io::Error {
        let text = message.clone();
        lock(&self.failure).get_or_insert(RemoteError { kind, message });
        io::Error::other(text)
    }

    fn take_failure(&self) -> Option<RemoteError> {
        lock(&self.failure).take()
    }

    fn unexpected(&self, error: &git2::Error) -> RemoteError {
        tracing::warn!(%error, host = self.host(), "a fetch failed");
        let message = if Instant::now() >= self.deadline {
            format!(
                "{} took too long to send the repository; try again",
                self.host()
            )
        } else {
            format!("{} sent something that is no git repository", self.host())
        };
        RemoteError {
            kind: RemoteErrorKind::Network,
            message,
        }
    }

    /// Waits for `work` on this session's runtime, not beyond its deadline.
    fn wait<T>(&self, work: impl Future<Output = Result<T, reqwest::Error>>) -> io::Result<T> {
        let runtime = self.runtime.as_ref().expect("taken by drop alone");
        let deadline = tokio::time::Instant::from_std(self.deadline);
        let bounded = async { tokio::time::timeout_at(deadline, work).await };
        match runtime.block_on(bounded) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed_request(&error)),
            Err(_) => {
                let message = format!("{} took too long to answer; try again", self.host());
                Err(self.fail(RemoteErrorKind::Network, message))
            }
        }
    }

    fn failed_request(&self, error: &reqwest::Error) -> io::Error {
        let cause = innermost(error);
        if error.is_redirect() {
            let message = format!(
                "{} redirects this repository to another place; use its present address",
                self.host()
            );
            return self.fail(RemoteErrorKind::Rejected, message);
        }
        if cause.contains(PRIVATE) {
            return self.fail(RemoteErrorKind::Rejected, private_text(self.host()));
        }
        let message = format!("{} could not be reached ({cause})", self.host());
        self.fail(RemoteErrorKind::Network, message)
    }

    /// Turns an answer that is not what git expects into its failure.
    fn check(&self, response: &Response, expected: &str) -> io::Result<()> {
        let host = self.host();
        let (kind, message) = match response.status() {
            StatusCode::OK => {
                let found = response.headers().get(header::CONTENT_TYPE);
                let found = found
                    .and_then(|value| value.to_str().ok())
                    .unwrap_or_default();
                if found
                    .split(';')
                    .next()
                    .is_some_and(|t| t.trim() == expected)
                {
                    return Ok(());
                }
                (
                    RemoteErrorKind::Rejected,
                    format!("{host} has no git repository at this address"),
                )
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
                let advice = if self.authorization.is_some() {
                    "check the address, and that the access token may read it"
                } else {
                    "check the address; a private repository needs an access token for this host"
                };
                let message = format!(
                    "{host} does not let us read this repository: it is private or does not \
                     exist; {advice}"
                );
                (RemoteErrorKind::Auth, message)
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => (
                RemoteErrorKind::Network,
                format!("{host} is not available ({status}); try again"),
            ),
            status => (
                RemoteErrorKind::Rejected,
                format!("{host} refused the request ({status})"),
            ),
        };
        Err(self.fail(kind, message))
    }
}

/// Redirects stay on the host, its port and its scheme: what is behind them gets the token.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from = attempt.previous().first().map(Url::origin);
    if attempt.previous().len() > MAX_REDIRECTS || from != Some(attempt.url().origin()) {
        return attempt.error("redirected elsewhere");
    }
    attempt.follow()
}

/// The text of the deepest cause; the outer ones repeat the address.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    super::message::one_line(&cause.to_string(), 200)
}

const PRIVATE: &str = "an address inside a private network";

fn private_text(host: &str) -> String {
    format!("{host} is {PRIVATE}; the operator must name it in GIT_TOKEN_HOSTS first")
}

/// Looks names up and refuses those that lead inside: a customer's `repoUrl` must not reach what
/// only the container can.
struct PublicOnly;

impl reqwest::dns::Resolve for PublicOnly {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let name = name.as_str().to_owned();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
            if found.iter().any(|address| is_private(address.ip())) {
                return Err(PRIVATE.into());
            }
            Ok(Box::new(found.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(ip) => {
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
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unique_local()
                || ip.is_unicast_link_local()
        }
    }
}

/// Teaches libgit2 our transports. To be called once, before any use of a remote.
#[expect(unsafe_code, reason = "libgit2's table of transports has no lock")]
pub(super) fn register_transports() -> Result<(), git2::Error> {
    for prefix in ["https", "http", "git", "ssh", "ssh+git", "git+ssh"] {
        // SAFETY: called under `Once` before any remote is made, so nothing reads the table.
        unsafe {
            git2::transport::register(prefix, |remote| {
                let session = CURRENT.with_borrow(Option::clone).ok_or_else(|| {
                    refusal("this repository's address is not allowed outside of a fetch")
                })?;
                Transport::smart(remote, true, HttpTransport(session))
            })?;
        }
    }
    Ok(())
}

fn refusal(text: &str) -> git2::Error {
    git2::Error::new(ErrorCode::GenericError, ErrorClass::Net, text)
}

struct HttpTransport(Arc<Session>);

impl SmartSubtransport for HttpTransport {
    fn action(
        &self,
        url: &str,
        action: Service,
    ) -> Result<Box<dyn SmartSubtransportStream>, git2::Error> {
        let session = &self.0;
        let is_ours = url.trim_end_matches('/') == session.url.as_str().trim_end_matches('/');
        let is_allowed = session.url.scheme() == "https" || is_test_address(&session.url);
        if !is_ours || !is_allowed {
            let message = "the repository's configuration leads to another address".to_owned();
            let error = session.fail(RemoteErrorKind::Rejected, message);
            return Err(refusal(&error.to_string()));
        }
        let (service, is_listing) = match action {
            Service::UploadPackLs => ("git-upload-pack", true),
            Service::UploadPack => ("git-upload-pack", false),
            Service::ReceivePackLs => ("git-receive-pack", true),
            Service::ReceivePack => ("git-receive-pack", false),
        };
        Ok(Box::new(Exchange {
            session: Arc::clone(session),
            service,
            is_listing,
            request: Vec::new(),
            response: None,
            rest: Bytes::new(),
        }))
    }

    fn close(&self) -> Result<(), git2::Error> {
        Ok(())
    }
}

/// One request and its answer: written first, sent by the first read, read as it comes.
struct Exchange {
    session: Arc<Session>,
    service: &'static str,
    /// The list of branches, which is asked for without a body.
    is_listing: bool,
    request: Vec<u8>,
    response: Option<Response>,
    rest: Bytes,
}

/// The end of a listing's address; what stands before it is the repository's.
const LISTING: &str = "/info/refs";

impl Exchange {
    fn send(&mut self) -> io::Result<Response> {
        let (session, service) = (&self.session, self.service);
        let base = lock(&session.base).clone();
        let request = if self.is_listing {
            session
                .client
                .get(format!("{base}{LISTING}?service={service}"))
        } else {
            session
                .client
                .post(format!("{base}/{service}"))
                .header(
                    header::CONTENT_TYPE,
                    format!("application/x-{service}-request"),
                )
                .header(header::ACCEPT, format!("application/x-{service}-result"))
                .body(std::mem::take(&mut self.request))
        };
        let request = match &session.authorization {
            Some(value) => request.header(header::AUTHORIZATION, value.clone()),
            None => request,
        };
        let response = session.wait(async { request.send().await })?;
        let kind = if self.is_listing {
            "advertisement"
        } else {
            "result"
        };
        session.check(&response, &format!("application/x-{service}-{kind}"))?;
        if self.is_listing {
            // A renamed repository: the redirect was followed, what comes next goes there.
            let mut found = response.url().clone();
            found.set_query(None);
            if let Some(base) = found.as_str().strip_suffix(LISTING) {
                *lock(&session.base) = base.to_owned();
            }
        }
        Ok(response)
    }
}

impl Write for Exchange {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.request.len() + bytes.len() > MAX_SENT {
            let message = "the request is too large".to_owned();
            return Err(self.session.fail(RemoteErrorKind::Rejected, message));
        }
        self.request.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Exchange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut response = match self.response.take() {
            Some(response) => response,
            None => self.send()?,
        };
        while self.rest.is_empty() {
            match self.session.wait(response.chunk())? {
                Some(chunk) => self.rest = chunk,
                None => break,
            }
            let mut received = lock(&self.session.received);
            *received += self.rest.len() as u64;
            if *received > MAX_RECEIVED {
                let message = "the repository is too large".to_owned();
                return Err(self.session.fail(RemoteErrorKind::Rejected, message));
            }
        }
        self.response = Some(response);
        let count = self.rest.len().min(buffer.len());
        self.rest.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        net::{TcpListener, TcpStream},
        path::{Path, PathBuf},
        process::{Command, Stdio},
        thread,
    };

    use super::*;
    use crate::repository::tests::git;

    const TOKEN: &str = "hunter2-canary";

    /// Path and `Authorization` of each request.
    type Seen = Vec<(String, Option<String>)>;

    /// A git server on loopback: the real `git upload-pack` behind a few lines of HTTP.
    struct Server {
        root: tempfile::TempDir,
        port: u16,
        seen: Arc<Mutex<Seen>>,
    }

    impl Server {
        fn start() -> Self {
            let root = tempfile::tempdir().unwrap();
            let site = root.path().join("site");
            std::fs::create_dir(&site).unwrap();
            git(&site, &["init", "-q", "-b", "trunk"]);
            // More than one chunk, and incompressible.
            let noise: String = (0..10_000)
                .map(|_| uuid::Uuid::new_v4().to_string())
                .collect();
            std::fs::write(site.join("noise.txt"), noise).unwrap();
            git(&site, &["add", "-A"]);
            git(&site, &["commit", "-qm", "first"]);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let (log, path) = (Arc::clone(&seen), root.path().to_owned());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (log, path) = (Arc::clone(&log), path.clone());
                    thread::spawn(move || answer(&stream.unwrap(), &path, &log));
                }
            });
            Self { root, port, seen }
        }

        fn url(&self, path: &str) -> Url {
            Url::parse(&format!("http://127.0.0.1:{}{path}", self.port)).unwrap()
        }

        fn remotes(&self) -> Remotes {
            Remotes::new(Some(TOKEN.into()), vec![format!("127.0.0.1:{}", self.port)])
        }

        fn fetch(&self, remotes: &Remotes, path: &str) -> Result<PathBuf, RemoteError> {
            let into = self
                .root
                .path()
                .join(format!("into-{}", uuid::Uuid::new_v4()));
            fetch_into(&into, remotes, &self.url(path)).map(|()| into)
        }
    }

    fn fetch_into(into: &Path, remotes: &Remotes, url: &Url) -> Result<(), RemoteError> {
        crate::repository::init();
        let repo = git2::Repository::init(into).unwrap();
        remotes.session(url, |url, options| {
            let mut remote = repo.remote_anonymous(url)?;
            remote.fetch(
                &["+refs/heads/*:refs/remotes/origin/*"],
                Some(options),
                None,
            )
        })
    }

    fn answer(stream: &TcpStream, root: &Path, seen: &Mutex<Seen>) {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let (mut length, mut authorization) = (0, None);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap(),
                "authorization" => authorization = Some(value.to_owned()),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        lock(seen).push((target.clone(), authorization.clone()));

        let reply = |status: &str, kind: &str, body: &[u8]| {
            let mut stream = stream;
            write!(
                stream,
                "HTTP/1.1 {status}\r\n{kind}\r\nConnection: close\r\n\r\n"
            )
            .ok();
            stream.write_all(body).ok();
        };
        let (_, rest) = target.split_at(1);
        let (name, rest) = rest.split_once('/').unwrap();
        match name {
            "private" if authorization.is_none() => return reply("401 Unauthorized", "X: y", b""),
            "gone" => return reply("404 Not Found", "X: y", b""),
            "down" => return reply("503 Service Unavailable", "X: y", b""),
            "page" => return reply("200 OK", "Content-Type: text/html", b"<html>"),
            "garbage" => {
                let kind = "Content-Type: application/x-git-upload-pack-advertisement";
                return reply("200 OK", kind, b"not a packet line");
            }
            "renamed" => {
                return reply("301 Moved", &format!("Location: /site/{rest}"), b"");
            }
            "away" => {
                let elsewhere = format!("Location: https://evil.example/site/{rest}");
                return reply("302 Found", &elsewhere, b"");
            }
            _ => {}
        }
        #[expect(clippy::disallowed_methods, reason = "a test against the real program")]
        let mut command = Command::new("git");
        command.args(["upload-pack", "--stateless-rpc"]);
        if rest.starts_with("info/refs") {
            let output = command
                .arg("--advertise-refs")
                .arg(root.join("site"))
                .output()
                .unwrap();
            let mut body = b"001e# service=git-upload-pack\n0000".to_vec();
            body.extend(output.stdout);
            reply(
                "200 OK",
                "Content-Type: application/x-git-upload-pack-advertisement",
                &body,
            );
        } else {
            let mut child = command
                .arg(root.join("site"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(&body).unwrap();
            let output = child.wait_with_output().unwrap();
            let whole = &output.stdout;
            let cut = if name == "cut" {
                &whole[..whole.len() / 2]
            } else {
                whole
            };
            let kind = format!(
                "Content-Type: application/x-git-upload-pack-result\r\nContent-Length: {}",
                whole.len()
            );
            reply("200 OK", &kind, cut);
        }
    }

    #[test]
    fn a_repository_comes_over_http_with_the_token_for_its_host() {
        let server = Server::start();
        for path in ["/site", "/site/", "/renamed", "/private"] {
            let into = server.fetch(&server.remotes(), path).unwrap();
            let (here, there) = ("refs/remotes/origin/trunk", "refs/heads/trunk");
            let origin = server.root.path().join("site");
            assert_eq!(
                git(&into, &["rev-parse", here]),
                git(&origin, &["rev-parse", there])
            );
            git(&into, &["fsck", "--strict"]);
        }
        let seen = lock(&server.seen);
        assert!(
            seen.iter()
                .all(|(_, auth)| auth.as_ref().is_some_and(|a| a.starts_with("Basic ")))
        );
        // Once redirected, the rest goes to the new place.
        assert!(
            !seen
                .iter()
                .any(|(path, _)| path == "/renamed/git-upload-pack")
        );
    }

    #[test]
    fn failures_are_told_apart_and_name_no_secret() {
        use RemoteErrorKind::{Auth, Network, Rejected};
        let server = Server::start();
        let without = Remotes::new(None, server.remotes().hosts);
        for (remotes, path, kind) in [
            (&without, "/private", Auth),
            (&server.remotes(), "/gone", Auth),
            (&server.remotes(), "/down", Network),
            (&server.remotes(), "/page", Rejected),
            (&server.remotes(), "/garbage", Network),
            (&server.remotes(), "/cut", Network),
            (&server.remotes(), "/away", Rejected),
        ] {
            let error = server.fetch(remotes, path).unwrap_err();
            assert_eq!(error.kind, kind, "{path}: {error}");
            assert!(error.message.contains("127.0.0.1"), "{path}: {error}");
            assert!(
                !format!("{error:?} {remotes:?}").contains("hunter2"),
                "{error:?}"
            );
        }
        let nobody = Url::parse("http://127.0.0.1:1/x").unwrap();
        let remotes = Remotes::new(None, vec!["127.0.0.1".into()]);
        let error = fetch_into(&server.root.path().join("x"), &remotes, &nobody).unwrap_err();
        assert!(error.message.contains("could not be reached"), "{error}");
        assert_eq!(error.kind, Network, "{error}");
    }

    #[test]
    fn addresses_inside_are_fetched_from_only_where_named() {
        let server = Server::start();
        for hosts in [
            vec![],
            vec!["github.com".into()],
            vec!["127.0.0.1:1".into()],
        ] {
            let remotes = Remotes::new(Some(TOKEN.into()), hosts);
            let error = server.fetch(&remotes, "/site").unwrap_err();
            assert_eq!(error.kind, RemoteErrorKind::Rejected, "{error}");
        }
        assert_eq!(lock(&server.seen).len(), 0);
        let by_name = Url::parse("https://localhost:1/site").unwrap();
        let into = server.root.path().join("x");
        let error = fetch_into(&into, &Remotes::default(), &by_name).unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Rejected, "{error}");
        for inside in [
            "10.1.2.3",
            "169.254.170.2",
            "100.64.0.1",
            "::1",
            "fd00::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(is_private(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["140.82.121.4", "2606:50c0::1"] {
            assert!(!is_private(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn the_token_goes_to_its_hosts_alone() {
        let remotes = Remotes::new(
            Some(TOKEN.into()),
            vec!["git.acme.com".into(), "b.com:8443".into()],
        );
        let gets = |url: &str| remotes.authorization(&Url::parse(url).unwrap()).is_some();
        for url in [
            "https://github.com/a/b",
            "https://git.acme.com/a",
            "https://b.com:8443/a",
        ] {
            assert!(gets(url), "{url}");
        }
        for url in [
            "https://github.com.evil.example/a",
            "https://evil.example/github.com",
            "https://github.com:8443/a",
            "https://api.github.com/a",
            "https://b.com/a",
            "http://github.com/a",
        ] {
            assert!(!gets(url), "{url}");
        }
    }

    #[test]
    fn a_repositorys_settings_lead_nowhere_else() {
        let server = Server::start();
        crate::repository::init();
        let into = server.root.path().join("hostile");
        let repo = git2::Repository::init(&into).unwrap();
        let mut config = repo.config().unwrap();
        let elsewhere = server.url("/elsewhere/").to_string();
        config
            .set_str(
                &format!("url.{elsewhere}.insteadOf"),
                server.url("/").as_str(),
            )
            .unwrap();
        let fetch = |url: &str, options: &mut FetchOptions<'_>| {
            repo.remote_anonymous(url)?
                .fetch(&["HEAD"], Some(options), None)
        };
        let error = server
            .remotes()
            .session(&server.url("/site"), fetch)
            .unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Rejected, "{error}");
        assert_eq!(lock(&server.seen).len(), 0);

        // And without a session there is no network at all.
        for url in [
            "https://github.com/a/b",
            "http://127.0.0.1/a",
            "git://x/y",
            "git@x:y",
            "ssh://x/y",
        ] {
            let mut remote = repo.remote_anonymous(url).unwrap();
            assert!(remote.connect(git2::Direction::Fetch).is_err(), "{url}");
        }
    }
}
