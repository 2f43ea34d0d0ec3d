//! The transport against the real git behind a few lines of HTTP.

use std::{
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use super::*;
use crate::repository::tests::git;

pub(in crate::repository) const TOKEN: &str = "hunter2-canary";

/// Path and `Authorization` of each request.
type Seen = Vec<(String, Option<String>)>;

/// A git server on loopback: the real `git upload-pack` and `git receive-pack` behind a few lines
/// of HTTP. The first part of a path says how it behaves; the repository is always the same.
pub(in crate::repository) struct Server {
    root: tempfile::TempDir,
    port: u16,
    seen: Arc<Mutex<Seen>>,
}

impl Server {
    pub(in crate::repository) fn start() -> Self {
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

    /// The repository that it serves.
    pub(in crate::repository) fn site(&self) -> PathBuf {
        self.root.path().join("site")
    }

    /// How often it was asked, and whether each time with the token.
    pub(in crate::repository) fn asked(&self) -> (usize, bool) {
        let seen = lock(&self.seen);
        let all = seen
            .iter()
            .all(|(_, authorization)| authorization.is_some());
        (seen.len(), all)
    }

    /// The paths that it was asked for.
    pub(in crate::repository) fn paths(&self) -> Vec<String> {
        lock(&self.seen)
            .iter()
            .map(|(path, _)| path.clone())
            .collect()
    }

    pub(in crate::repository) fn url(&self, path: &str) -> Url {
        Url::parse(&format!("http://127.0.0.1:{}{path}", self.port)).unwrap()
    }

    pub(in crate::repository) fn remotes(&self) -> Remotes {
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
    remotes.session(url, RemoteUse::Fetch, |link| {
        let mut options = git2::FetchOptions::new();
        options.remote_callbacks(link.callbacks());
        let mut remote = repo.remote_anonymous(link.url)?;
        remote.fetch(
            &["+refs/heads/*:refs/remotes/origin/*"],
            Some(&mut options),
            None,
        )
    })
}

impl Remotes {
    pub(in crate::repository) fn without_token(&self) -> Self {
        Self::new(None, self.hosts.clone())
    }
}

fn read_body(reader: &mut impl BufRead, length: Option<usize>) -> Vec<u8> {
    let mut body = Vec::new();
    if let Some(length) = length {
        reader.take(length as u64).read_to_end(&mut body).unwrap();
        return body;
    }
    loop {
        let mut size = String::new();
        reader.read_line(&mut size).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&chunk[..size]);
    }
}

fn answer(stream: &TcpStream, root: &Path, seen: &Mutex<Seen>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut length, mut authorization) = (Some(0), None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = Some(value.parse().unwrap()),
            "transfer-encoding" => length = None,
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let body = read_body(&mut reader, length);
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
    let service = if target.contains("git-receive-pack") {
        "receive-pack"
    } else {
        "upload-pack"
    };
    let is_first = lock(seen).iter().filter(|(t, _)| *t == target).count() == 1;
    match name {
        "private" if authorization.is_none() => return reply("401 Unauthorized", "X: y", b""),
        "gone" => return reply("404 Not Found", "X: y", b""),
        "down" => return reply("503 Service Unavailable", "X: y", b""),
        "flaky" if is_first => return reply("502 Bad Gateway", "X: y", b""),
        "page" => return reply("200 OK", "Content-Type: text/html", b"<html>"),
        "readonly" if service == "receive-pack" => {
            let words = format!("remote: Write access \u{1b}[31mnot granted to {TOKEN}.\n");
            let kind = "Content-Type: text/plain";
            return reply("403 Forbidden", kind, words.as_bytes());
        }
        "garbage" => {
            let kind = format!("Content-Type: application/x-git-{service}-advertisement");
            return reply("200 OK", &kind, b"not a packet line");
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
    let site = root.join("site");
    #[expect(clippy::disallowed_methods, reason = "a test against the real program")]
    let mut command = Command::new("git");
    command.args([service, "--stateless-rpc"]);
    if rest.starts_with("info/refs") {
        let output = command.arg("--advertise-refs").arg(site).output().unwrap();
        let line = format!("# service=git-{service}\n");
        let mut body = format!("{:04x}{line}0000", line.len() + 4).into_bytes();
        body.extend(output.stdout);
        let kind = format!("Content-Type: application/x-git-{service}-advertisement");
        reply("200 OK", &kind, &body);
        return;
    }
    if name == "race" && service == "receive-pack" && is_first {
        // Somebody else's push gets there between the listing and ours.
        let tree = git(&site, &["rev-parse", "client/acme^{tree}"]);
        let args = [
            "commit-tree",
            "-p",
            "client/acme",
            "-m",
            "quicker",
            tree.trim(),
        ];
        let quicker = git(&site, &args);
        git(
            &site,
            &["update-ref", "refs/heads/client/acme", quicker.trim()],
        );
    }
    let mut child = command
        .arg(site)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&body).unwrap();
    let output = child.wait_with_output().unwrap();
    let whole = &output.stdout;
    let cut = if name == "cut" || name == "cut-once" && is_first {
        &whole[..whole.len() / 2]
    } else {
        whole
    };
    let kind = format!(
        "Content-Type: application/x-git-{service}-result\r\nContent-Length: {}",
        whole.len()
    );
    reply("200 OK", &kind, cut);
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
    let fetch = |link: &Link<'_>| {
        repo.remote_anonymous(link.url)?
            .fetch(&["HEAD"], None, None)
    };
    let error = server
        .remotes()
        .session(&server.url("/site"), RemoteUse::Fetch, fetch)
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
