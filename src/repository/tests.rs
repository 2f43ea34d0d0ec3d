//! The room against the real git program: whatever we do, its `status`, `fsck` and `log` agree.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use super::*;
use crate::{
    domain::{FileStatus, Signature},
    identity::{ThreadKey, UserKey},
    lease::Fence,
};

mod along;
mod checkout;
mod drafts;

/// Runs the git program, shut off from the machine's settings.
pub(super) fn try_git(dir: &Path, args: &[&str]) -> Result<String, String> {
    #[expect(clippy::disallowed_methods, reason = "a test against the real program")]
    let output = Command::new("git")
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_AUTHOR_NAME", "Dev")
        .env("GIT_AUTHOR_EMAIL", "dev@example.com")
        .env("GIT_COMMITTER_NAME", "Dev")
        .env("GIT_COMMITTER_EMAIL", "dev@example.com")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(text(output.stderr))
    }
}

pub(super) fn git(dir: &Path, args: &[&str]) -> String {
    try_git(dir, args).unwrap_or_else(|error| panic!("git {args:?}: {error}"))
}

pub(super) fn write(path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    let path = path.as_ref();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn key(client: &str, user: &str, thread: &str) -> ThreadKey {
    ThreadKey::parse(client, user, thread).unwrap()
}

pub(super) fn greenroom() -> Signature {
    Signature {
        name: "greenroom".into(),
        email: "greenroom@localhost".into(),
    }
}

/// An origin made by the git program, and one user's folder beside it.
pub(super) struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn empty() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    /// The origin has one commit on `trunk`, its default branch.
    pub(super) fn new() -> Self {
        let place = Self::empty();
        let origin = place.origin();
        fs::create_dir_all(&origin).unwrap();
        git(&origin, &["init", "-q", "-b", "trunk"]);
        write(origin.join("package.json"), "{}\n");
        write(
            origin.join("src/pages/index.astro"),
            "<h1>Hello</h1>\n<p>one</p>\n<p>two</p>\n",
        );
        write(origin.join("src/pages/about.astro"), "about\n");
        write(origin.join(".gitignore"), "dist/\n*.log\n");
        git(&origin, &["add", "-A"]);
        git(&origin, &["commit", "-qm", "first"]);
        place
    }

    fn origin(&self) -> PathBuf {
        self.root.path().join("origin")
    }

    fn home(&self, user: &str) -> PathBuf {
        self.root.path().join("workspace/acme").join(user)
    }

    fn source(&self) -> Source {
        parse_source(self.origin().to_str().unwrap(), Some(self.root.path())).unwrap()
    }

    fn create_from(
        &self,
        user: &str,
        source: &Source,
        base_branch: Option<&str>,
    ) -> Result<UserRepository> {
        let key = UserKey {
            client: "acme".parse().unwrap(),
            user: user.parse().unwrap(),
        };
        let home = self.home(user);
        let scratch = home.join(".greenroom/scratch");
        let (remotes, who) = (Remotes::default(), greenroom());
        let project = home.join("project");
        UserRepository::create(
            &project,
            Workshop {
                scratch: &scratch,
                local: None,
                thread: None,
            },
            source,
            &remotes,
            &key,
            base_branch,
            &who,
        )
        .map(|created| created.repository)
    }

    fn create(&self, user: &str) -> UserRepository {
        self.create_from(user, &self.source(), None).unwrap()
    }

    pub(super) fn thread(&self, user: &str, thread: &str) -> (ThreadState, Site) {
        let repository = self.create(user);
        let path = self.home(user).join("threads").join(thread);
        let key = key("acme", user, thread);
        let state = repository
            .ensure_thread(&key, &path, &Fence::open())
            .unwrap();
        (
            state,
            Site {
                worktree: repository.worktree(&key, &path),
                dir: path,
            },
        )
    }
}

/// A worktree and the means to judge it.
pub(super) struct Site {
    pub(super) worktree: Worktree,
    pub(super) dir: PathBuf,
}

impl Site {
    pub(super) fn commit(&self, instruction: &str) -> Committed {
        self.try_commit(instruction, Strangers::Keep).unwrap()
    }

    fn try_commit(&self, instruction: &str, strangers: Strangers) -> Result<Committed> {
        self.commit_in(Scope::All, instruction, strangers)
    }

    fn commit_in(
        &self,
        scope: Scope<'_>,
        instruction: &str,
        strangers: Strangers,
    ) -> Result<Committed> {
        let home = self.dir.parent().unwrap().parent().unwrap();
        self.worktree.commit(&CommitRequest {
            text: CommitText {
                instruction,
                trailers: &[
                    ("Turn-Id", "a~b~c~1".into()),
                    ("Status", "completed".into()),
                ],
                author: &Signature {
                    name: "Alice".into(),
                    email: "alice@example.com".into(),
                },
                committer: &greenroom(),
            },
            scope,
            strangers,
            held_dir: &home.join(".greenroom/held/1"),
            fence: &Fence::open(),
        })
    }

    pub(super) fn status(&self) -> String {
        git(&self.dir, &["status", "--porcelain"])
    }

    /// Commits, and the git program finds nothing left and nothing broken.
    fn commit_cleanly(&self) -> Vec<(String, FileStatus)> {
        let committed = self.commit("Edit");
        assert_eq!(committed.held_back, []);
        assert_eq!(self.status(), "");
        git(&self.dir, &["fsck", "--strict"]);
        let summary = committed.commit.expect("something changed");
        assert_eq!(git(&self.dir, &["rev-parse", "HEAD"]).trim(), summary.id);
        // What is told from memory is what the objects on the disk say.
        assert_eq!(self.worktree.summary(&summary.id).unwrap(), summary);
        // The tree is the one that git itself writes of these files.
        let ours = git(&self.dir, &["rev-parse", "HEAD^{tree}"]);
        git(&self.dir, &["read-tree", "--empty"]);
        git(
            &self.dir,
            &["-c", "advice.addEmbeddedRepo=false", "add", "-A", "."],
        );
        if !self.dir.join("nested/.git").exists() {
            assert_eq!(git(&self.dir, &["write-tree"]), ours);
        }
        git(&self.dir, &["read-tree", "HEAD"]);
        summary
            .files
            .into_iter()
            .map(|file| (file.path, file.status))
            .collect()
    }
}

#[test]
fn a_local_repository_is_cloned_with_its_branches() {
    let place = Place::new();
    let first = git(&place.origin(), &["rev-parse", "HEAD"]);
    let repository = place.create("alice");
    let project = place.home("alice").join("project");
    assert_eq!(
        git(&project, &["symbolic-ref", "HEAD"]).trim(),
        "refs/heads/user/acme/alice"
    );
    for branch in [
        "client/acme",
        "user/acme/alice",
        "origin/trunk",
        "origin/HEAD",
    ] {
        assert_eq!(git(&project, &["rev-parse", branch]), first, "{branch}");
    }
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    git(&project, &["fsck", "--strict"]);
    assert!(!place.home("alice").join(".greenroom/scratch").exists());

    // Again: nothing changes, and the source is not even looked at.
    fs::remove_dir_all(place.origin()).unwrap();
    let gone = Source::Local(place.origin());
    place.create_from("alice", &gone, None).unwrap();
    assert_eq!(git(&project, &["rev-parse", "HEAD"]), first);
    drop(repository);
}

#[test]
fn the_clients_branch_of_the_origin_comes_first_then_the_base_branch() {
    let place = Place::new();
    let origin = place.origin();
    git(&origin, &["branch", "staging"]);
    write(origin.join("later.txt"), "x");
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "later"]);
    let staging = git(&origin, &["rev-parse", "staging"]);
    let head = |user: &str| git(&place.home(user).join("project"), &["rev-parse", "HEAD"]);

    place
        .create_from("alice", &place.source(), Some("staging"))
        .unwrap();
    assert_eq!(head("alice"), staging);
    let error = place
        .create_from("bob", &place.source(), Some("nope"))
        .unwrap_err();
    assert!(matches!(&error, RepositoryError::NoSuchBranch { branch } if branch == "nope"));
    assert!(!place.home("bob").join("project").exists());

    git(&origin, &["checkout", "-qb", "client/acme"]);
    write(origin.join("clients.txt"), "x");
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "client's"]);
    let clients = git(&origin, &["rev-parse", "HEAD"]);
    git(&origin, &["checkout", "-q", "trunk"]);
    place
        .create_from("carol", &place.source(), Some("staging"))
        .unwrap();
    assert_eq!(head("carol"), clients);
    assert!(place.home("carol").join("project/clients.txt").exists());
}

#[test]
fn a_bare_repository_without_a_default_branch_is_cloned() {
    let place = Place::new();
    let bare = place.root.path().join("site.git");
    let from = place.origin();
    git(
        &from,
        &["clone", "-q", "--bare", ".", bare.to_str().unwrap()],
    );
    git(&bare, &["symbolic-ref", "HEAD", "refs/heads/unborn"]);
    let source = parse_source(bare.to_str().unwrap(), Some(place.root.path())).unwrap();
    place.create_from("alice", &source, None).unwrap();
    let project = place.home("alice").join("project");
    let head = git(&project, &["rev-parse", "HEAD"]);
    assert_eq!(head, git(&from, &["rev-parse", "trunk"]));

    git(&bare, &["branch", "another", "trunk"]);
    let error = place.create_from("bob", &source, None).unwrap_err();
    assert!(
        matches!(error, RepositoryError::NoDefaultBranch),
        "{error:?}"
    );
}

#[test]
fn an_empty_repository_and_a_crash_leave_nothing_behind() {
    let place = Place::empty();
    fs::create_dir_all(place.origin()).unwrap();
    git(&place.origin(), &["init", "-q"]);
    let error = place
        .create_from("alice", &place.source(), None)
        .unwrap_err();
    assert!(matches!(error, RepositoryError::Empty), "{error:?}");
    assert!(!place.home("alice").join("project").exists());

    let place = Place::new();
    let home = place.home("alice");
    write(home.join(".greenroom/scratch/.git/half"), "made");
    fs::create_dir_all(home.join("project")).unwrap();
    place.create("alice");
    assert!(!home.join(".greenroom/scratch").exists());

    write(place.home("bob").join("project/thesis.doc"), "mine");
    place.create_from("bob", &place.source(), None).unwrap_err();
    assert!(
        place.home("bob").join("project/thesis.doc").exists(),
        "not ours to remove"
    );
}

#[test]
fn a_template_becomes_a_repository() {
    let place = Place::empty();
    let file = |path: &str, content: &'static str, executable| TemplateFile {
        path: path.into(),
        content: content.as_bytes().into(),
        executable,
    };
    let site = Source::Template(vec![
        file("package.json", "{}", false),
        file("src/pages/index.astro", "<h1>Hi</h1>", false),
        file("run.sh", "#!/bin/sh\n", true),
    ]);
    place.create_from("alice", &site, None).unwrap();
    let project = place.home("alice").join("project");
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    git(&project, &["fsck", "--strict"]);
    assert_eq!(
        git(&project, &["log", "--format=%s|%cn"]).trim(),
        "Start from the built-in template|greenroom"
    );
    assert!(git(&project, &["ls-files", "-s", "run.sh"]).starts_with("100755"));
}

#[test]
fn threads_of_two_users_are_apart_and_resumed() {
    let place = Place::new();
    let (state, alice) = place.thread("alice", "main");
    assert!(!state.resumed);
    assert_eq!(state.branch, "thread/acme/alice/main");
    let (other_state, other) = place.thread("alice", "Main");
    assert!(
        !other_state.resumed,
        "ids that differ in case are two threads"
    );
    let (_, bob) = place.thread("bob", "main");

    write(alice.dir.join("new.txt"), "from alice");
    assert_eq!(
        alice.commit_cleanly(),
        [("new.txt".into(), FileStatus::Added)]
    );
    assert!(!other.dir.join("new.txt").exists() && !bob.dir.join("new.txt").exists());
    assert_eq!(other.status() + &bob.status(), "");
    let project = place.home("alice").join("project");
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    let list = git(&project, &["worktree", "list", "--porcelain"]);
    assert!(
        !list.contains("prunable") && list.matches("locked").count() == 2,
        "{list}"
    );
    git(&project, &["worktree", "prune", "-v", "--expire=now"]);

    let (again, alice) = place.thread("alice", "main");
    assert!(again.resumed);
    assert_eq!(again.head, alice.worktree.head().unwrap());
    assert_ne!(again.head, state.head);
    assert_eq!(alice.status(), "");
}

#[test]
fn a_branch_of_the_older_layout_is_the_threads_start() {
    let place = Place::new();
    let origin = place.origin();
    git(&origin, &["checkout", "-qb", "thread-old"]);
    write(origin.join("old.txt"), "x");
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "old work"]);
    let old = git(&origin, &["rev-parse", "HEAD"]);
    git(&origin, &["checkout", "-q", "trunk"]);
    let (state, site) = place.thread("alice", "old");
    assert_eq!((state.resumed, state.head.as_str()), (true, old.trim()));
    assert!(site.dir.join("old.txt").exists());

    let project = place.home("alice").join("project");
    git(&project, &["branch", "thread-local", "origin/thread-old"]);
    let (state, _) = place.thread("alice", "local");
    assert_eq!((state.resumed, state.head.as_str()), (true, old.trim()));
}

#[test]
fn branches_that_vanished_are_made_again() {
    let place = Place::new();
    let (state, site) = place.thread("alice", "main");
    let project = place.home("alice").join("project");
    git(&project, &["update-ref", "-d", "refs/heads/client/acme"]);
    git(
        &project,
        &["update-ref", "-d", "refs/heads/user/acme/alice"],
    );
    git(
        &project,
        &["update-ref", "-d", "refs/heads/thread/acme/alice/main"],
    );
    assert!(matches!(
        site.worktree.head(),
        Err(RepositoryError::NoSuchBranch { .. })
    ));
    write(site.dir.join("edit.txt"), "kept");
    let (again, site) = place.thread("alice", "main");
    assert_eq!((again.resumed, again.head), (true, state.head));
    assert_eq!(site.status(), "?? edit.txt\n");
}

#[test]
fn every_kind_of_change_is_committed_as_git_would() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let dir = &site.dir;

    write(dir.join("src/new/deep/a.txt"), "a\n");
    write(dir.join("src/pages/über uns ☕.astro"), "ü\n");
    write(
        dir.join("src/pages/index.astro"),
        "<h1>Hello</h1>\n<p>one</p>\n<p>2</p>\n<p>3</p>\n",
    );
    fs::remove_file(dir.join("src/pages/about.astro")).unwrap();
    write(dir.join("dist/ignored.html"), "x");
    let expected = [
        ("src/new/deep/a.txt".to_owned(), FileStatus::Added),
        ("src/pages/about.astro".into(), FileStatus::Deleted),
        ("src/pages/index.astro".into(), FileStatus::Modified),
        ("src/pages/über uns ☕.astro".into(), FileStatus::Added),
    ];
    assert_eq!(site.commit_cleanly(), expected);
    let head = site.worktree.head().unwrap();
    let counted = site.worktree.summary(&head).unwrap().files;
    let index = counted
        .iter()
        .find(|f| f.path.ends_with("index.astro"))
        .unwrap();
    assert_eq!((index.additions, index.deletions), (2, 1));

    // Renamed, executable, a symlink (also one that leads out), bytes that are no UTF-8.
    fs::rename(
        dir.join("src/pages/index.astro"),
        dir.join("src/pages/home.astro"),
    )
    .unwrap();
    fs::set_permissions(dir.join("package.json"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/etc/passwd", dir.join("passwd")).unwrap();
    let odd: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"odd-\xff.txt");
    write(dir.join(odd), "odd");
    assert_eq!(
        site.commit_cleanly(),
        [
            ("odd-\u{fffd}.txt".to_owned(), FileStatus::Added),
            ("package.json".into(), FileStatus::Modified),
            ("passwd".into(), FileStatus::Added),
            ("src/pages/home.astro".into(), FileStatus::Renamed),
        ]
    );
    assert!(git(dir, &["ls-files", "-s", "package.json"]).starts_with("100755"));
    assert_eq!(git(dir, &["cat-file", "-p", "HEAD:passwd"]), "/etc/passwd");

    // A folder where a file was, a file where a folder was, a link where a folder was.
    fs::remove_file(dir.join("package.json")).unwrap();
    write(dir.join("package.json/inner.txt"), "x");
    fs::remove_dir_all(dir.join("src/new")).unwrap();
    write(dir.join("src/new"), "a file now");
    site.commit_cleanly();
    fs::remove_dir_all(dir.join("src/pages")).unwrap();
    symlink("/usr", dir.join("src/pages")).unwrap();
    fs::remove_dir_all(dir.join("package.json")).unwrap();
    site.commit_cleanly();
    assert_eq!(git(dir, &["ls-files", "src"]), "src/new\nsrc/pages\n");

    // Everything gone: an empty tree.
    for name in [".gitignore", "odd"] {
        fs::remove_file(dir.join(name)).ok();
    }
    fs::remove_dir_all(dir.join("src")).unwrap();
    fs::remove_dir_all(dir.join("dist")).unwrap();
    fs::remove_file(dir.join("passwd")).unwrap();
    fs::remove_file(dir.join(odd)).unwrap();
    site.commit_cleanly();
    assert_eq!(git(dir, &["ls-files"]), "");
}

#[test]
fn no_change_is_no_commit() {
    let place = Place::new();
    let (state, site) = place.thread("alice", "main");
    assert_eq!(
        site.commit("Nothing"),
        Committed {
            commit: None,
            held_back: vec![],
            repairs: vec![]
        }
    );
    // Written again with what was in it, staged and taken back, ignored.
    let page = site.dir.join("src/pages/index.astro");
    write(&page, fs::read(&page).unwrap());
    write(site.dir.join("staged.txt"), "x");
    git(&site.dir, &["add", "staged.txt"]);
    fs::remove_file(site.dir.join("staged.txt")).unwrap();
    write(site.dir.join("debug.log"), "x");
    assert_eq!(
        site.commit("Nothing"),
        Committed {
            commit: None,
            held_back: vec![],
            repairs: vec![]
        }
    );
    assert_eq!(site.worktree.head().unwrap(), state.head);
    assert_eq!(site.status(), "");
}

#[test]
fn line_endings_follow_the_attributes_as_in_git() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(
        site.dir.join(".gitattributes"),
        "*.txt text\n*.bat text eol=crlf\n",
    );
    write(site.dir.join("a.txt"), "one\r\ntwo\r\n");
    write(site.dir.join("b.bat"), "one\r\n");
    write(site.dir.join("c.md"), "one\r\n");
    site.commit_cleanly();
    assert_eq!(
        git(&site.dir, &["cat-file", "-p", "HEAD:a.txt"]),
        "one\ntwo\n"
    );
    assert_eq!(git(&site.dir, &["cat-file", "-p", "HEAD:c.md"]), "one\r\n");
}

#[test]
fn a_repository_inside_is_committed_file_by_file() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let nested = site.dir.join("nested");
    write(nested.join("a/b.txt"), "1");
    write(nested.join("x.log"), "ignored");
    git(&nested, &["init", "-q"]);
    git(&nested, &["add", "-A"]);
    git(&nested, &["commit", "-qm", "inner"]);
    assert_eq!(
        site.commit_cleanly(),
        [("nested/a/b.txt".into(), FileStatus::Added)]
    );
    write(nested.join("a/b.txt"), "2");
    write(nested.join("c.txt"), "3");
    assert_eq!(
        site.commit_cleanly(),
        [
            ("nested/a/b.txt".into(), FileStatus::Modified),
            ("nested/c.txt".into(), FileStatus::Added)
        ]
    );
    fs::remove_file(nested.join("c.txt")).unwrap();
    assert_eq!(
        site.commit_cleanly(),
        [("nested/c.txt".into(), FileStatus::Deleted)]
    );
}

#[test]
fn commits_say_who_what_and_why() {
    let place = Place::new();
    let (state, site) = place.thread("alice", "main");
    write(site.dir.join("a.txt"), "a");
    let summary = site
        .commit("Make it blue\nand bold, please")
        .commit
        .unwrap();
    assert_eq!(summary.message, "Make it blue");
    let format = "%an <%ae>|%cn <%ce>|%s|%b";
    assert_eq!(
        git(&site.dir, &["log", "-1", &format!("--format={format}")]).trim(),
        "Alice <alice@example.com>|greenroom <greenroom@localhost>|Make it blue|\
         Make it blue\nand bold, please\n\nTurn-Id: a~b~c~1\nStatus: completed"
    );
    assert_eq!(
        git(
            &site.dir,
            &["log", "-1", "--format=%(trailers:key=Turn-Id,valueonly)"]
        )
        .trim(),
        "a~b~c~1"
    );
    let log = site.worktree.log(10).unwrap();
    assert_eq!(log.len(), 2);
    assert_eq!(
        (log[0].id.as_str(), log[0].subject.as_str()),
        (summary.id.as_str(), "Make it blue")
    );
    assert_eq!(log[0].author.name, "Alice");
    assert_eq!(
        log[0].trailers[1],
        ("Status".to_owned(), "completed".to_owned())
    );
    assert_eq!(
        (log[1].id.as_str(), log[1].trailers.len()),
        (state.head.as_str(), 0)
    );
    assert_eq!(site.worktree.log(1).unwrap().len(), 1);
    assert_eq!(
        site.worktree.summary(&log[1].id).unwrap().files.len(),
        4,
        "the first commit"
    );

    let read = |path: &str| site.worktree.read_at_head(path, 3).unwrap();
    write(site.dir.join("a.txt"), "not committed");
    assert_eq!(read("src/pages/about.astro").as_deref(), Some(&b"abo"[..]));
    assert_eq!(read("a.txt").as_deref(), Some(&b"a"[..]));
    assert_eq!((read("src"), read("none")), (None, None));
    let copy = place.root.path().join("copy");
    site.worktree.export(&copy).unwrap();
    assert_eq!(fs::read(copy.join("a.txt")).unwrap(), b"a");
    assert!(!copy.join(".git").exists());
    assert_eq!(site.status(), " M a.txt\n", "a copy changes nothing here");
}

#[test]
fn secrets_and_giants_stay_out_and_are_kept() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let dir = &site.dir;
    write(dir.join(".env"), "KEY=1");
    write(dir.join(".env.example"), "KEY=");
    write(
        dir.join("notes.txt"),
        format!("-----BEGIN {}\nabc\n", "PRIVATE KEY-----"),
    );
    write(dir.join("big.bin"), vec![7; 20_000_001]);
    write(dir.join("app/node_modules/x/index.js"), "x");
    write(dir.join("good.txt"), "good");
    git(dir, &["add", "-f", ".env"]);
    let committed = site.commit("Many things");
    let held: Vec<_> = committed
        .held_back
        .iter()
        .map(|h| h.path.as_str())
        .collect();
    assert_eq!(held, [".env", "app/node_modules", "big.bin", "notes.txt"]);
    let files = committed.commit.unwrap().files;
    assert_eq!(
        files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(),
        [".env.example", "good.txt"]
    );
    assert_eq!(
        site.status(),
        "?? .env\n?? app/\n?? big.bin\n?? notes.txt\n"
    );

    let kept = place.home("alice").join(".greenroom/held/1");
    assert_eq!(fs::read(kept.join(".env")).unwrap(), b"KEY=1");
    assert_eq!(
        fs::metadata(kept.join(".env"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        fs::metadata(kept.join("big.bin")).unwrap().len(),
        20_000_001
    );
    let again = site.commit("Nothing new");
    assert_eq!((again.commit, again.held_back.len()), (None, 4));
    for (_, held) in ["big.bin", "notes.txt"].iter().zip(&again.held_back[2..]) {
        assert!(held.reason.starts_with("Not committed: "), "{held:?}");
    }

    // What history holds already is not held back for its name; new secrets in it are.
    git(dir, &["add", "-f", ".env"]);
    git(dir, &["commit", "-qm", "a person insists"]);
    write(dir.join(".env"), "KEY=2");
    write(
        dir.join("good.txt"),
        format!("-----BEGIN {}\nabc\n", "PRIVATE KEY-----"),
    );
    let committed = site.commit("Edit");
    let files = committed.commit.unwrap().files;
    assert_eq!(
        files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(),
        [".env"]
    );
    assert_eq!(
        site.status(),
        " M good.txt\n?? app/\n?? big.bin\n?? notes.txt\n"
    );
    fs::remove_file(dir.join(".env")).unwrap();
    assert_eq!(
        site.commit("Away with it").commit.unwrap().files[0].status,
        FileStatus::Deleted
    );
    git(dir, &["fsck", "--strict"]);
}

#[test]
fn no_secret_of_any_form_is_committed() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let samples = gate::secret_samples();
    assert!(samples.len() >= 50, "{}", samples.len());
    let endings = ["yaml", "txt", "env.example", "conf"];
    for (number, (_, content)) in samples.iter().enumerate() {
        let name = format!("secrets/{number:03}.{}", endings[number % endings.len()]);
        write(site.dir.join(name), content);
    }
    // And in the middle of what was there before.
    let page = site.dir.join("src/pages/index.astro");
    let before = fs::read_to_string(&page).unwrap();
    write(&page, format!("{before}<!-- {} -->\n", samples[0].1.trim()));
    write(site.dir.join("fine.txt"), "fine");
    let committed = site.commit("Secrets");
    let files = committed.commit.unwrap().files;
    let names: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["fine.txt"]);
    assert_eq!(committed.held_back.len(), samples.len() + 1);
    for (held, (kind, content)) in committed.held_back.iter().zip(&samples) {
        assert!(held.reason.contains(" (line "), "{}: {kind}", held.reason);
        let longest = content
            .split(|c: char| !c.is_ascii_alphanumeric())
            .max_by_key(|part| part.len())
            .unwrap();
        assert!(!held.reason.contains(longest), "{}", held.reason);
    }
    let objects = git(
        &site.dir,
        &["cat-file", "--batch-all-objects", "--batch-check"],
    );
    let blobs = objects
        .lines()
        .filter(|line| line.contains(" blob "))
        .count();
    assert_eq!(blobs, 5, "not even an object of them was written");
    // They stay where they are, are copied aside, and nobody's later commit takes them.
    let kept = place.home("alice").join(".greenroom/held/1");
    assert!(kept.join("secrets/000.yaml").exists() && kept.join("src/pages/index.astro").exists());
    assert_eq!(site.status(), " M src/pages/index.astro\n?? secrets/\n");
    write(site.dir.join("more.txt"), "more");
    let again = site.commit("More");
    assert_eq!(again.commit.unwrap().files.len(), 1);
    assert_eq!(again.held_back.len(), samples.len() + 1);

    // Taken out, renamed or deleted it passes.
    write(&page, format!("{before}<!-- nothing -->\n"));
    fs::remove_dir_all(site.dir.join("secrets")).unwrap();
    let clean = site.commit("Clean");
    assert_eq!(clean.commit.unwrap().files.len(), 1);
    assert_eq!((clean.held_back, site.status()), (vec![], String::new()));
}

#[test]
fn a_file_whose_history_holds_a_secret_may_be_edited_renamed_and_deleted() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let (_, secret) = &gate::secret_samples()[0];
    write(site.dir.join("old.txt"), format!("one\n{secret}two\n"));
    git(&site.dir, &["add", "old.txt"]);
    git(&site.dir, &["commit", "-qm", "a person insists"]);
    write(site.dir.join("old.txt"), format!("ONE\n{secret}two\n"));
    site.commit_cleanly();
    fs::rename(site.dir.join("old.txt"), site.dir.join("new.txt")).unwrap();
    assert_eq!(
        site.commit_cleanly(),
        [("new.txt".into(), FileStatus::Renamed)]
    );
    fs::remove_file(site.dir.join("new.txt")).unwrap();
    site.commit_cleanly();
}

#[test]
fn names_that_git_refuses_spoil_nothing() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("git~1/config"), "x");
    write(site.dir.join("sub/.GIT/config"), "x");
    write(site.dir.join(".g\u{200c}it/config"), "x");
    write(site.dir.join("fine.txt"), "x");
    nix::unistd::mkfifo(&site.dir.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let committed = site.commit("Odd names");
    let files = committed.commit.unwrap().files;
    assert_eq!(
        files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(),
        ["fine.txt"]
    );
    assert!(!committed.held_back.is_empty());
    git(&site.dir, &["fsck", "--strict"]);
}

#[test]
fn what_hides_edits_is_taken_away() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    git(
        &site.dir,
        &["update-index", "--assume-unchanged", "package.json"],
    );
    git(
        &site.dir,
        &["update-index", "--skip-worktree", "src/pages/about.astro"],
    );
    write(site.dir.join("package.json"), "{\"a\":1}");
    write(site.dir.join("src/pages/about.astro"), "changed");
    assert_eq!(site.commit_cleanly().len(), 2);
}

#[test]
fn the_workspace_may_move() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("before.txt"), "uncommitted");
    drop(site);
    let (old, new) = (
        place.root.path().join("workspace"),
        place.root.path().join("elsewhere"),
    );
    fs::rename(&old, &new).unwrap();
    let home = new.join("acme/alice");
    let repository = UserRepository::open(&home.join("project")).unwrap();
    let key = key("acme", "alice", "main");
    let dir = home.join("threads/main");
    let state = repository
        .ensure_thread(&key, &dir, &Fence::open())
        .unwrap();
    assert!(state.resumed);
    let site = Site {
        worktree: repository.worktree(&key, &dir),
        dir,
    };
    assert_eq!(site.status(), "?? before.txt\n");
    site.commit_cleanly();
    let list = git(&home.join("project"), &["worktree", "list", "--porcelain"]);
    assert!(
        list.contains("elsewhere/acme/alice/threads/main") && !list.contains("prunable"),
        "{list}"
    );
}

#[test]
fn a_lost_half_is_made_again_and_nothing_present_is_lost() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let admin = place.home("alice").join("project/.git/worktrees/main");
    write(site.dir.join("edit.txt"), "mine");

    fs::remove_dir_all(&admin).unwrap();
    let (_, site) = place.thread("alice", "main");
    assert_eq!(site.status(), "?? edit.txt\n");

    fs::write(admin.join("index"), "garbage").unwrap();
    let (_, site) = place.thread("alice", "main");
    assert_eq!(site.status(), "?? edit.txt\n");

    // As after a crash in a first checkout.
    fs::remove_dir_all(&site.dir).unwrap();
    write(
        site.dir
            .with_file_name(".main.partial")
            .join("package.json"),
        "half",
    );
    let (state, site) = place.thread("alice", "main");
    assert!(state.resumed);
    assert_eq!(site.status(), "");
    assert_eq!(fs::read(site.dir.join("package.json")).unwrap(), b"{}\n");
    assert_eq!(fs::read_dir(site.dir.parent().unwrap()).unwrap().count(), 1);

    // As after a crash between the branch and the index, and with a lock left over.
    write(site.dir.join("package.json"), "{\"b\":1}");
    let index = fs::read(admin.join("index")).unwrap();
    site.commit("Edit");
    fs::write(admin.join("index"), index).unwrap();
    fs::write(admin.join("index.lock"), "").unwrap();
    let (_, site) = place.thread("alice", "main");
    assert_eq!(site.status(), "");
}

#[test]
fn a_branch_that_moved_meanwhile_is_not_overwritten() {
    let place = Place::new();
    let (state, site) = place.thread("alice", "main");
    write(site.dir.join("a.txt"), "a");
    let base = git2::Oid::from_str(&state.head).unwrap();
    git(
        &site.dir,
        &["commit", "-q", "--allow-empty", "-m", "somebody else"],
    );
    let moved = site.worktree.head().unwrap();
    let outcome = site.worktree.commit_from(base);
    assert!(
        matches!(outcome, Err(RepositoryError::HeadMoved { .. })),
        "{outcome:?}"
    );
    assert_eq!(site.worktree.head().unwrap(), moved);
    assert_eq!(site.commit_cleanly().len(), 1);
}

#[test]
fn hostile_settings_are_put_right() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let git_dir = place.home("alice").join("project/.git");
    let victim = place.root.path().join("victim");
    write(victim.join("secret.txt"), "other tenant");
    let original = fs::read(git_dir.join("config")).unwrap();

    let hostile = format!(
        "{}\n[core]\n\tworktree = {}\n[url \"https://evil.example/\"]\n\tinsteadOf = https://\n\
         [extensions]\n\tworktreeConfig = true\n",
        String::from_utf8_lossy(&original),
        victim.display()
    );
    fs::write(git_dir.join("config"), hostile).unwrap();
    write(
        git_dir.join("worktrees/main/config.worktree"),
        "[core]\n\tworktree = /\n",
    );
    write(site.dir.join("a.txt"), "a");
    assert_eq!(site.commit_cleanly(), [("a.txt".into(), FileStatus::Added)]);
    assert_eq!(fs::read(git_dir.join("config")).unwrap(), original);
    fs::write(git_dir.join("config"), "no configuration at all [").unwrap();
    UserRepository::open(&place.home("alice").join("project")).unwrap();

    // The worktree's link leads to another repository: it is put back and nothing goes there.
    git(&victim, &["init", "-q"]);
    fs::write(
        site.dir.join(".git"),
        format!("gitdir: {}/.git\n", victim.display()),
    )
    .unwrap();
    write(site.dir.join("b.txt"), "b");
    assert_eq!(site.commit_cleanly(), [("b.txt".into(), FileStatus::Added)]);
    assert!(
        try_git(&victim, &["rev-parse", "HEAD"]).is_err(),
        "nothing was committed there"
    );

    // A git directory of its own in place of the link: kept, out of the way.
    fs::remove_file(site.dir.join(".git")).unwrap();
    git(&site.dir, &["init", "-q"]);
    write(site.dir.join("c.txt"), "c");
    assert_eq!(site.commit_cleanly(), [("c.txt".into(), FileStatus::Added)]);

    // The entry's links and HEAD.
    let admin = git_dir.join("worktrees/main");
    fs::write(
        admin.join("commondir"),
        victim.join(".git").to_str().unwrap(),
    )
    .unwrap();
    fs::write(admin.join("HEAD"), "ref: refs/heads/user/acme/alice\n").unwrap();
    write(site.dir.join("d.txt"), "d");
    assert_eq!(site.commit_cleanly(), [("d.txt".into(), FileStatus::Added)]);
}

#[test]
fn what_cannot_be_put_right_is_refused() {
    let refused = |spoil: fn(&Path, &Path)| {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        let git_dir = place.home("alice").join("project/.git");
        let victim = place.root.path().join("victim");
        write(victim.join("file"), "safe");
        spoil(&git_dir, &victim);
        write(site.dir.join("a.txt"), "a");
        let key = key("acme", "alice", "main");
        let ensured = UserRepository::open(&place.home("alice").join("project"))
            .and_then(|repository| repository.ensure_thread(&key, &site.dir, &Fence::open()));
        assert!(
            matches!(ensured, Err(RepositoryError::Tampered { .. })),
            "{ensured:?}"
        );
        assert_eq!(fs::read(victim.join("file")).unwrap(), b"safe");
    };
    refused(|git_dir, victim| {
        write(
            git_dir.join("objects/info/alternates"),
            victim.to_str().unwrap(),
        );
    });
    refused(|git_dir, victim| write(git_dir.join("commondir"), victim.to_str().unwrap()));
    refused(|git_dir, victim| {
        let branch = git_dir.join("refs/heads/thread/acme/alice/main");
        fs::remove_file(&branch).unwrap();
        symlink(victim.join("file"), branch).unwrap();
    });
    refused(|git_dir, victim| {
        fs::remove_file(git_dir.join("worktrees/main/index")).unwrap();
        symlink(victim.join("file"), git_dir.join("worktrees/main/index")).unwrap();
    });
    refused(|git_dir, victim| {
        fs::rename(git_dir, victim.join("moved")).unwrap();
        symlink(victim.join("moved"), git_dir).unwrap();
    });
}

#[test]
fn what_we_put_into_worktrees_is_not_seen() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    symlink("/usr", site.dir.join("node_modules")).unwrap();
    assert_eq!(site.status(), "");
    assert_eq!(
        site.commit("Nothing"),
        Committed {
            commit: None,
            held_back: vec![],
            repairs: vec![]
        }
    );
}

/// The twelve kinds of damage, done by the git program or by hand.
mod damage;
mod hostile;
mod publishing;
/// What a scan has to find.
mod scanning;
mod watching;
mod written;
