//! Pushing to and fetching from a real git, and from a user's repository that lies.

use std::path::PathBuf;

use url::Url;

use super::*;
use crate::repository::{
    remote::tests::{Server, TOKEN},
    tests::{git, try_git},
};

/// A user's repository (made by the git program), with one commit more than the server's.
struct Home {
    root: tempfile::TempDir,
    git: GitDir,
}

impl Home {
    fn of(server: &Server) -> Self {
        let root = tempfile::tempdir().unwrap();
        let from = server.site().to_str().unwrap().to_owned();
        git(root.path(), &["clone", "-q", &from, "project"]);
        let project = root.path().join("project");
        let home = Self {
            git: GitDir::of_project(&project),
            root,
        };
        home.commit("ours.txt", "ours");
        home
    }

    fn project(&self) -> PathBuf {
        self.root.path().join("project")
    }

    fn commit(&self, file: &str, content: &str) -> Oid {
        fs::write(self.project().join(file), content).unwrap();
        git(&self.project(), &["add", "-A"]);
        git(&self.project(), &["commit", "-qm", file]);
        self.head()
    }

    fn head(&self) -> Oid {
        Oid::from_str(git(&self.project(), &["rev-parse", "HEAD"]).trim()).unwrap()
    }

    fn with<T>(
        &self,
        origin: &Source,
        remotes: &Remotes,
        work: impl FnOnce(&Uplink<'_>) -> T,
    ) -> T {
        let place = self.root.path().join("uplink");
        let deadline = Instant::now() + Duration::from_secs(60);
        let have = [self.head()];
        let uplink = Uplink::open(&place, &self.git, origin, remotes, &have, deadline).unwrap();
        let outcome = work(&uplink);
        drop(uplink);
        assert!(!place.exists(), "nothing stays");
        outcome
    }

    fn push(&self, server: &Server, path: &str) -> Result<Pushed, RemoteError> {
        let origin = Source::Remote(server.url(path));
        self.with(&origin, &server.remotes(), |uplink| {
            uplink.push("client/acme", self.head())
        })
    }
}

fn tip(site: &Path) -> Option<String> {
    let found = try_git(site, &["rev-parse", "--verify", "-q", "client/acme"]);
    found.ok().map(|id| id.trim().to_owned())
}

#[test]
fn a_push_reaches_the_server_once() {
    let server = Server::start();
    let home = Home::of(&server);
    for path in ["/site", "/renamed", "/private"] {
        let commit = home.commit("more.txt", path).to_string();
        assert_eq!(home.push(&server, path), Ok(Pushed::Done), "{path}");
        assert_eq!(tip(&server.site()), Some(commit), "{path}");
    }
    assert_eq!(home.push(&server, "/site"), Ok(Pushed::UpToDate));
    git(&server.site(), &["fsck", "--strict"]);
    assert!(server.asked().1, "the token was sent each time");
    // Too large for memory's liking: it is streamed.
    let noise: String = (0..150_000)
        .map(|_| uuid::Uuid::new_v4().to_string())
        .collect();
    let commit = home.commit("large.txt", &noise).to_string();
    assert_eq!(home.push(&server, "/site"), Ok(Pushed::Done));
    assert_eq!(tip(&server.site()), Some(commit));
    git(&server.site(), &["fsck", "--strict"]);
}

#[test]
fn a_network_that_fails_is_tried_again_and_nothing_is_done_twice() {
    let server = Server::start();
    let home = Home::of(&server);
    assert_eq!(home.push(&server, "/flaky"), Ok(Pushed::Done));
    // The server has it, but its word was lost.
    let commit = home.commit("more.txt", "x").to_string();
    assert_eq!(home.push(&server, "/cut-once"), Ok(Pushed::UpToDate));
    assert_eq!(tip(&server.site()), Some(commit));
    let error = home.push(&server, "/down").unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Network, "{error}");
    let down = |path: &str| path.starts_with("/down");
    assert_eq!(server.paths().iter().filter(|path| down(path)).count(), 3);
}

#[test]
fn refusals_are_told_apart_in_the_servers_words_without_secrets() {
    use RemoteErrorKind::{Auth, Rejected};
    let server = Server::start();
    let home = Home::of(&server);
    let error = home.push(&server, "/readonly").unwrap_err();
    assert_eq!(error.kind, Auth, "{error}");
    assert!(
        error.message.contains("Write access not granted to ***."),
        "{error}"
    );
    let origin = Source::Remote(server.url("/private"));
    let without = server.remotes().without_token();
    let error = home
        .with(&origin, &without, |uplink| {
            uplink.push("client/acme", home.head())
        })
        .unwrap_err();
    assert_eq!(error.kind, Auth, "{error}");
    assert!(error.message.contains("GITHUB_TOKEN"), "{error}");

    let hook = server.site().join(".git/hooks/pre-receive");
    fs::create_dir_all(hook.parent().unwrap()).unwrap();
    let words = format!("#!/bin/sh\nprintf 'Protected \\033[1mbranch\\n{TOKEN}\\n' >&2\nexit 1\n");
    fs::write(&hook, words).unwrap();
    fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = home.push(&server, "/site").unwrap_err();
    assert_eq!(error.kind, Rejected, "{error}");
    assert!(error.message.contains("Protected branch ***"), "{error}");
    assert!(error.message.contains("declined"), "{error}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    assert_eq!(tip(&server.site()), None);
}

#[test]
fn a_branch_that_moved_is_never_overwritten() {
    let server = Server::start();
    let home = Home::of(&server);
    assert_eq!(home.push(&server, "/site"), Ok(Pushed::Done));
    home.commit("more.txt", "x");
    // Between the listing and the push.
    assert_eq!(home.push(&server, "/race"), Ok(Pushed::Behind));
    let theirs = tip(&server.site()).unwrap();
    let subject = git(&server.site(), &["log", "-1", "--format=%s", "client/acme"]);
    assert_eq!(subject, "quicker\n");
    // Long before it.
    assert_eq!(home.push(&server, "/site"), Ok(Pushed::Behind));
    assert_eq!(tip(&server.site()), Some(theirs.clone()));

    // What the origin has comes down as it is; then ours is no longer behind.
    let origin = Source::Remote(server.url("/site"));
    let upstream = home.with(&origin, &server.remotes(), |uplink| {
        uplink.fetch("client/acme", None).unwrap()
    });
    assert_eq!(upstream.client.unwrap().to_string(), theirs);
    assert_eq!(upstream.base.as_ref().unwrap().0, "trunk");
    git(&home.project(), &["merge", "-q", "--no-edit", &theirs]);
    assert_eq!(home.push(&server, "/site"), Ok(Pushed::Done));
    git(&home.project(), &["fsck", "--strict"]);
    git(&server.site(), &["fsck", "--strict"]);
}

#[test]
fn a_fetch_asks_for_what_is_missing_only() {
    let server = Server::start();
    let home = Home::of(&server);
    let origin = Source::Remote(server.url("/site"));
    let fetch = |base: Option<&str>| {
        home.with(&origin, &server.remotes(), |uplink| {
            uplink.fetch("client/acme", base).unwrap()
        })
    };
    let before = fetch(None);
    assert_eq!(before.client, None);
    let packs = || {
        fs::read_dir(home.project().join(".git/objects/pack"))
            .unwrap()
            .count()
    };
    let there = packs();
    assert_eq!(server.asked().0, 1, "the list was enough");

    git(&server.site(), &["checkout", "-qb", "staging"]);
    fs::write(server.site().join("new.txt"), "new").unwrap();
    git(&server.site(), &["add", "-A"]);
    git(&server.site(), &["commit", "-qm", "new"]);
    git(&server.site(), &["checkout", "-q", "trunk"]);
    let after = fetch(Some("staging"));
    let (name, id) = after.base.unwrap();
    assert_eq!(name, "staging");
    assert_eq!(
        git(
            &home.project(),
            &["cat-file", "-p", &format!("{id}:new.txt")]
        ),
        "new"
    );
    assert_eq!(packs(), there + 2, "one pack and its index");
    let size = |entry: fs::DirEntry| entry.metadata().unwrap().len();
    let packs = fs::read_dir(home.project().join(".git/objects/pack")).unwrap();
    let smallest = packs.map(|entry| size(entry.unwrap())).min().unwrap();
    assert!(smallest < 2000, "not the whole history: {smallest}");
    assert_eq!(fetch(Some("no-such-branch")).base, before.base);
    git(&home.project(), &["fsck", "--strict"]);
}

#[test]
fn nothing_in_the_users_repository_leads_elsewhere() {
    let server = Server::start();
    let home = Home::of(&server);
    let elsewhere = server.url("/elsewhere/").to_string();
    let here = server.url("/").to_string();
    let proof = home.root.path().join("proof");
    let touch = format!("touch {}", proof.display());
    for (name, value) in [
        (format!("url.{elsewhere}.insteadOf"), here.as_str()),
        (format!("url.{elsewhere}.pushInsteadOf"), here.as_str()),
        ("url./tmp/.insteadOf".into(), here.as_str()),
        ("remote.origin.pushurl".into(), elsewhere.as_str()),
        ("http.proxy".into(), here.as_str()),
        ("core.sshCommand".into(), touch.as_str()),
        ("core.gitProxy".into(), touch.as_str()),
        ("credential.helper".into(), touch.as_str()),
        ("core.worktree".into(), "/"),
        ("extensions.worktreeConfig".into(), "true"),
    ] {
        git(&home.project(), &["config", &name, value]);
    }
    let planted = home.project().join(".git/config");
    fs::copy(&planted, planted.with_extension("worktree")).unwrap();
    let origin = Source::Remote(server.url("/site"));
    let head = Oid::from_str(
        fs::read_to_string(home.project().join(".git/refs/heads/trunk"))
            .unwrap()
            .trim(),
    )
    .unwrap();
    let place = home.root.path().join("uplink");
    let deadline = Instant::now() + Duration::from_secs(60);
    let remotes = server.remotes();
    let uplink = Uplink::open(&place, &home.git, &origin, &remotes, &[head], deadline).unwrap();
    uplink.fetch("client/acme", None).unwrap();
    assert_eq!(uplink.push("client/acme", head), Ok(Pushed::Done));
    let paths = server.paths();
    assert!(
        paths.iter().all(|path| path.starts_with("/site/")),
        "{paths:?}"
    );
    assert!(!proof.exists(), "nothing was run");
}

#[test]
fn a_local_origin_is_pushed_to_by_comparison() {
    let server = Server::start();
    let home = Home::of(&server);
    let bare = home.root.path().join("bare.git");
    let from = server.site().to_str().unwrap().to_owned();
    git(
        home.root.path(),
        &["clone", "-q", "--bare", &from, "bare.git"],
    );
    let remotes = Remotes::default();
    let push = |path: &Path, branch: &str| {
        let origin = Source::Local(path.to_owned());
        home.with(&origin, &remotes, |uplink| uplink.push(branch, home.head()))
    };
    for path in [&bare, &server.site()] {
        assert_eq!(push(path, "client/acme"), Ok(Pushed::Done));
        assert_eq!(push(path, "client/acme"), Ok(Pushed::UpToDate));
        assert_eq!(tip(path), Some(home.head().to_string()));
        git(path, &["fsck", "--strict"]);
    }
    let error = push(&server.site(), "trunk").unwrap_err();
    assert!(error.message.contains("checked out"), "{error}");
    let tree = git(&bare, &["rev-parse", "trunk^{tree}"]);
    let other = git(&bare, &["commit-tree", "-m", "other", tree.trim()]);
    git(
        &bare,
        &["update-ref", "refs/heads/client/acme", other.trim()],
    );
    assert_eq!(push(&bare, "client/acme"), Ok(Pushed::Behind));
    assert_eq!(tip(&bare).unwrap(), other.trim());
    let error = push(Path::new("/nowhere"), "client/acme").unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Rejected, "{error}");
}

#[test]
fn a_template_has_nowhere_to_go() {
    let server = Server::start();
    let home = Home::of(&server);
    let origin = Source::Template(Vec::new());
    let remotes = server.remotes();
    let error = home.with(&origin, &remotes, |uplink| {
        uplink.push("client/acme", home.head()).unwrap_err()
    });
    assert_eq!(error.kind, RemoteErrorKind::Rejected);
    let nobody = Source::Remote(Url::parse("http://127.0.0.1:1/x").unwrap());
    let remotes = Remotes::new(None, vec!["127.0.0.1".into()]);
    let error = home.with(&nobody, &remotes, |uplink| {
        uplink.fetch("client/acme", None).unwrap_err()
    });
    assert!(
        error.to_string().contains("could not be reached"),
        "{error}"
    );
}
