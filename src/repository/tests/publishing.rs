//! A thread's work on its way up, and others' on its way down: what moves, what stays, and that
//! the git program agrees.

use std::time::{Duration, Instant};

use super::*;
use crate::domain::{ConflictKind, MergeStep};

/// One user of `acme`, with a thread.
struct User<'a> {
    place: &'a Place,
    name: &'static str,
    repository: UserRepository,
}

impl<'a> User<'a> {
    fn new(place: &'a Place, name: &'static str) -> Self {
        Self {
            place,
            name,
            repository: place.create(name),
        }
    }

    fn home(&self) -> PathBuf {
        self.place.home(self.name)
    }

    fn project(&self) -> PathBuf {
        self.home().join("project")
    }

    fn key(&self, thread: &str) -> ThreadKey {
        key("acme", self.name, thread)
    }

    fn thread(&self, thread: &str) -> Site {
        self.place.thread(self.name, thread).1
    }

    /// A turn that leaves this content in a file.
    fn turn(&self, thread: &str, file: &str, content: &str) -> String {
        let site = self.thread(thread);
        write(site.dir.join(file), content);
        let committed = site.worktree.commit(&CommitRequest {
            text: CommitText {
                instruction: "Edit",
                trailers: &[
                    ("Turn-Id", format!("acme~{}~{thread}~1", self.name)),
                    ("Thread", self.key(thread).to_string()),
                ],
                author: &greenroom(),
                committer: &greenroom(),
            },
            scope: Scope::All,
            strangers: Strangers::Keep,
            held_dir: &self.home().join(".greenroom/held/1"),
            fence: &Fence::open(),
        });
        committed.unwrap().commit.unwrap().id
    }

    fn with<T>(&self, thread: &str, work: impl FnOnce(Mover<'_>, Origin<'_>) -> T) -> T {
        let (key, who, fence) = (self.key(thread), greenroom(), Fence::open());
        let (source, remotes) = (self.place.source(), Remotes::default());
        let mover = Mover {
            key: &key,
            committer: &who,
            held_dir: &self.home().join(".greenroom/held/outside"),
            fence: &fence,
        };
        let origin = Origin {
            source: &source,
            remotes: &remotes,
            base_branch: None,
            folder: &self.home().join(".greenroom/uplink"),
            deadline: Instant::now() + Duration::from_secs(60),
        };
        let outcome = work(mover, origin);
        assert!(!origin.folder.exists());
        for folder in [self.project(), self.place.origin()] {
            git(&folder, &["fsck", "--strict"]);
        }
        outcome
    }

    fn try_publish(&self, thread: &str, to: Destination) -> Result<Published> {
        self.with(thread, |mover, origin| {
            self.repository.publish(&PublishRequest {
                mover,
                to,
                message: None,
                accepts_loss: false,
                origin: Some(origin),
            })
        })
    }

    fn publish(&self, thread: &str, to: Destination) -> Published {
        self.try_publish(thread, to).unwrap()
    }

    /// As the supervisor does it.
    fn try_sync(&self, thread: &str) -> Result<Vec<MergeStep>> {
        let worktree = self.thread(thread).worktree;
        self.with(thread, |mover, origin| {
            let base = worktree.committed()?;
            let synced = self
                .repository
                .sync(&mover, Some(&origin), &worktree, &base)?;
            if let Some(draft) = &synced.draft {
                let who = greenroom();
                let text = CommitText {
                    instruction: "Sync",
                    trailers: &[
                        ("Turn-Id", "acme~x~y~2".into()),
                        ("Thread", mover.key.to_string()),
                        ("Kind", "sync".into()),
                    ],
                    author: &who,
                    committer: &who,
                };
                let commit = worktree.write_draft(draft, &text)?;
                worktree.apply(&commit, mover.fence)?;
            }
            Ok(synced.merged)
        })
    }

    fn git(&self, args: &[&str]) -> String {
        git(&self.project(), args).trim().to_owned()
    }

    fn at(&self, branch: &str) -> String {
        self.git(&["rev-parse", branch])
    }

    /// All references, to see that nothing moved.
    fn refs(&self) -> String {
        self.git(&["for-each-ref"]) + &git(&self.place.origin(), &["for-each-ref"])
    }

    fn is_clean(&self) {
        assert_eq!(self.git(&["status", "--porcelain"]), "");
        let head = self.git(&["symbolic-ref", "HEAD"]);
        assert_eq!(head, format!("refs/heads/user/acme/{}", self.name));
    }
}

fn at_origin(place: &Place, branch: &str) -> String {
    git(&place.origin(), &["rev-parse", branch])
        .trim()
        .to_owned()
}

/// Somebody pushes to the origin.
fn upstream(place: &Place, branch: &str, file: &str, content: &str) {
    let origin = place.origin();
    let present = git(&origin, &["branch", "--list", branch]);
    if present.is_empty() {
        git(&origin, &["branch", branch]);
    }
    git(&origin, &["switch", "-q", branch]);
    write(origin.join(file), content);
    git(&origin, &["add", "-fA"]);
    git(&origin, &["commit", "-qm", "upstream"]);
    git(&origin, &["switch", "-q", "--detach"]);
}

fn files_of(error: RepositoryError) -> (String, String, Vec<(String, ConflictKind)>) {
    match error {
        RepositoryError::Conflict { between, files } => {
            let between = between.expect("two branches");
            let files = files.into_iter().map(|file| (file.path, file.kind));
            (between.from, between.to, files.collect())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn work_goes_up_level_by_level() {
    let place = Place::new();
    git(&place.origin(), &["switch", "-q", "--detach"]);
    let alice = User::new(&place, "alice");
    let before = alice.at("client/acme");
    let first = alice.turn("main", "src/new/page.astro", "one\n");
    let done = alice.publish("main", Destination::User);
    assert_eq!(
        done.merged,
        [MergeStep {
            from: "thread/acme/alice/main".into(),
            to: "user/acme/alice".into(),
            commit: Some(first.clone()),
            up_to_date: false,
        }]
    );
    assert_eq!(done.pushed, None);
    assert_eq!(
        (alice.at("HEAD"), alice.at("client/acme")),
        (first.clone(), before)
    );
    assert!(alice.project().join("src/new/page.astro").exists());
    alice.is_clean();

    let done = alice.publish("main", Destination::Client);
    assert_eq!(done.merged.len(), 2);
    assert!(done.merged[0].up_to_date && done.merged[0].commit.is_none());
    assert_eq!(alice.at("client/acme"), first);
    assert!(
        !git(&place.origin(), &["branch"]).contains("acme"),
        "local until pushed"
    );

    let second = alice.turn("main", "src/new/page.astro", "two\n");
    let done = alice.publish("main", Destination::Origin);
    let pushed = done.pushed.unwrap();
    assert_eq!(
        (pushed.branch.as_str(), &pushed.commit),
        ("client/acme", &second)
    );
    assert!(!pushed.up_to_date);
    for branch in ["client/acme", "user/acme/alice", "origin/client/acme"] {
        assert_eq!(alice.at(branch), second, "{branch}");
    }
    assert_eq!(at_origin(&place, "client/acme"), second);
    alice.is_clean();

    // Nothing new is no failure, and changes nothing.
    let refs = alice.refs();
    let done = alice.publish("main", Destination::Origin);
    assert!(done.merged.iter().all(|step| step.up_to_date), "{done:?}");
    assert!(done.pushed.unwrap().up_to_date);
    assert_eq!(alice.refs(), refs);
    assert_eq!(alice.thread("main").status(), "");
}

#[test]
fn a_message_makes_a_commit_of_the_last_branch() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    let turn = alice.turn("main", "a.txt", "a\n");
    let before = alice.at("client/acme");
    let done = alice.with("main", |mover, _| {
        alice.repository.publish(&PublishRequest {
            mover,
            to: Destination::Client,
            message: Some("Spring campaign\n\nApproved by Carol"),
            accepts_loss: false,
            origin: None,
        })
    });
    let done = done.unwrap();
    assert_eq!(alice.at("user/acme/alice"), turn, "it only moved along");
    let commit = done.merged[1].commit.clone().unwrap();
    assert_eq!(alice.at("client/acme"), commit);
    let shown = alice.git(&[
        "log",
        "-1",
        "--format=%s|%P|%(trailers:key=Thread,valueonly)",
        &commit,
    ]);
    assert_eq!(
        shown,
        format!("Spring campaign|{before} {turn}|acme/alice/main")
    );
}

#[test]
fn threads_of_a_user_meet_in_its_branch_or_say_where_not() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    alice.thread("beside");
    for (thread, file) in [("main", "a.txt"), ("beside", "b.txt")] {
        alice.turn(thread, file, "x\n");
        alice.publish(thread, Destination::User);
        alice.is_clean();
    }
    assert!(alice.project().join("a.txt").exists() && alice.project().join("b.txt").exists());
    assert_eq!(
        alice.git(&["log", "-1", "--format=%s"]),
        "Merge thread/acme/alice/beside into user/acme/alice"
    );

    alice.turn("main", "src/pages/about.astro", "ours\n");
    alice.turn("beside", "src/pages/about.astro", "theirs\n");
    alice.publish("main", Destination::Client);
    let refs = alice.refs();
    let (from, to, files) = files_of(
        alice
            .try_publish("beside", Destination::Origin)
            .unwrap_err(),
    );
    assert_eq!(
        (from.as_str(), to.as_str()),
        ("thread/acme/alice/beside", "user/acme/alice")
    );
    assert_eq!(
        files,
        [("src/pages/about.astro".into(), ConflictKind::BothModified)]
    );
    assert_eq!(alice.refs(), refs);
    alice.is_clean();
    assert_eq!(alice.thread("beside").status(), "");
}

#[test]
fn a_conflict_further_up_leaves_everything_below_where_it_was() {
    let place = Place::new();
    let (alice, bob) = (User::new(&place, "alice"), User::new(&place, "bob"));
    bob.turn("main", "src/pages/about.astro", "from bob\n");
    bob.turn("main", "only-bob.txt", "x\n");
    alice.turn("main", "src/pages/about.astro", "from alice\n");
    bob.publish("main", Destination::Origin);
    let refs = alice.refs();
    let error = alice.try_publish("main", Destination::Origin).unwrap_err();
    let (from, to, files) = files_of(error);
    assert_eq!(
        (from.as_str(), to.as_str()),
        ("origin/client/acme", "client/acme")
    );
    assert_eq!(
        files,
        [("src/pages/about.astro".into(), ConflictKind::BothModified)]
    );
    assert_eq!(alice.refs(), refs, "here and there");
    alice.is_clean();
    assert!(!alice.project().join("only-bob.txt").exists());
}

#[test]
fn users_of_a_client_meet_at_the_origin() {
    let place = Place::new();
    let (alice, bob) = (User::new(&place, "alice"), User::new(&place, "bob"));
    bob.turn("main", "from-bob.txt", "x\n");
    bob.publish("main", Destination::Origin);
    alice.turn("main", "from-alice.txt", "x\n");
    let done = alice.publish("main", Destination::Origin);
    let last = done.merged.last().unwrap();
    assert_eq!(
        (last.from.as_str(), last.to.as_str()),
        ("origin/client/acme", "client/acme")
    );
    let pushed = done.pushed.unwrap().commit;
    assert_eq!(at_origin(&place, "client/acme"), pushed);
    assert_eq!(alice.at("client/acme"), pushed);
    let files = git(&place.origin(), &["ls-tree", "--name-only", "client/acme"]);
    assert!(
        files.contains("from-alice.txt") && files.contains("from-bob.txt"),
        "{files}"
    );
    assert!(
        !alice.project().join("from-bob.txt").exists(),
        "only a sync brings it down"
    );
    alice.is_clean();
}

#[test]
fn what_others_did_comes_down_to_the_thread_that_asked() {
    let place = Place::new();
    let (alice, bob) = (User::new(&place, "alice"), User::new(&place, "bob"));
    alice.turn("main", "a.txt", "a\n");
    let beside = alice.thread("beside").worktree.head().unwrap();
    // The origin has no branch of the client yet: its default branch counts.
    upstream(
        &place,
        "trunk",
        "src/pages/index.astro",
        "<h1>Upstream</h1>\n",
    );
    let steps = alice.try_sync("main").unwrap();
    let ways: Vec<_> = steps
        .iter()
        .map(|step| (step.from.as_str(), step.up_to_date))
        .collect();
    assert_eq!(
        ways,
        [
            ("origin/trunk", false),
            ("client/acme", false),
            ("user/acme/alice", false)
        ]
    );
    let site = alice.thread("main");
    assert_eq!(site.status(), "");
    let page = fs::read_to_string(site.dir.join("src/pages/index.astro")).unwrap();
    assert_eq!(page, "<h1>Upstream</h1>\n");
    assert!(site.dir.join("a.txt").exists());
    assert_eq!(alice.at("user/acme/alice"), at_origin(&place, "trunk"));
    alice.is_clean();
    assert_eq!(
        alice.thread("beside").worktree.head().unwrap(),
        beside,
        "nobody asked for it"
    );

    // Then the client's branch there counts, and nothing else.
    bob.turn("main", "from-bob.txt", "x\n");
    bob.publish("main", Destination::Origin);
    upstream(&place, "trunk", "later.txt", "x\n");
    let steps = alice.try_sync("main").unwrap();
    assert_eq!(steps[0].from, "origin/client/acme");
    let dir = alice.thread("main").dir;
    assert!(dir.join("from-bob.txt").exists() && !dir.join("later.txt").exists());
    alice.is_clean();

    // Again: nothing.
    let (refs, head) = (alice.refs(), alice.thread("main").worktree.head().unwrap());
    let steps = alice.try_sync("main").unwrap();
    assert!(steps.iter().all(|step| step.up_to_date), "{steps:?}");
    assert_eq!(alice.refs(), refs);
    assert_eq!(alice.thread("main").worktree.head().unwrap(), head);

    // Merged there and deleted: the default branch again, and no trace of the other.
    git(&place.origin(), &["branch", "-qf", "trunk", "client/acme"]);
    upstream(&place, "trunk", "merged.txt", "x\n");
    git(&place.origin(), &["branch", "-qD", "client/acme"]);
    let steps = alice.try_sync("main").unwrap();
    assert_eq!(steps[0].from, "origin/trunk");
    assert!(alice.thread("main").dir.join("merged.txt").exists());
    assert!(!alice.git(&["branch", "-r"]).contains("origin/client/acme"));
    // What it then publishes is there again.
    alice.publish("main", Destination::Origin);
    assert_eq!(at_origin(&place, "client/acme"), alice.at("client/acme"));
}

#[test]
fn a_sync_that_does_not_fit_changes_nothing() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    alice.turn("main", "src/pages/about.astro", "ours\n");
    upstream(&place, "trunk", "src/pages/about.astro", "upstream\n");
    upstream(&place, "trunk", "more.txt", "x\n");
    let refs = alice.refs();
    let (from, to, files) = files_of(alice.try_sync("main").unwrap_err());
    assert_eq!(
        (from.as_str(), to.as_str()),
        ("user/acme/alice", "thread/acme/alice/main")
    );
    assert_eq!(
        files,
        [("src/pages/about.astro".into(), ConflictKind::BothModified)]
    );
    assert_eq!(alice.refs(), refs);
    alice.is_clean();

    // Files that are in no commit are never overwritten.
    let other = alice.thread("other");
    write(other.dir.join("dist/page.html"), "built here");
    upstream(&place, "trunk", "dist/page.html", "theirs\n");
    let refs = alice.refs();
    let (from, to, files) = files_of(alice.try_sync("other").unwrap_err());
    assert_eq!(
        (from.as_str(), to.as_str()),
        ("user/acme/alice", "thread/acme/alice/other")
    );
    assert_eq!(files, [("dist/page.html".into(), ConflictKind::InTheWay)]);
    assert_eq!(alice.refs(), refs);
    let kept = fs::read_to_string(other.dir.join("dist/page.html")).unwrap();
    assert_eq!(kept, "built here");
}

#[test]
fn edits_in_project_are_kept_and_published_along() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    alice.turn("main", "src/pages/index.astro", "<h1>Turn</h1>\n");
    write(alice.project().join("by-hand.txt"), "by hand\n");
    fs::remove_file(alice.project().join("src/pages/about.astro")).unwrap();
    alice.publish("main", Destination::Client);
    alice.is_clean();
    let names = alice.git(&["ls-tree", "-r", "--name-only", "client/acme"]);
    assert!(
        names.contains("by-hand.txt") && !names.contains("about.astro"),
        "{names}"
    );
    assert!(
        alice
            .git(&["log", "--format=%s", "client/acme"])
            .contains("Edits made in project/")
    );

    // An ignored file is in no commit: it stays, and the publication does not happen.
    write(alice.project().join("note.log"), "mine");
    let site = alice.thread("main");
    fs::remove_file(site.dir.join(".gitignore")).unwrap();
    alice.turn("main", "note.log", "the thread's\n");
    let refs = alice.refs();
    let (_, to, files) = files_of(alice.try_publish("main", Destination::Origin).unwrap_err());
    assert_eq!(to, "user/acme/alice");
    assert_eq!(files, [("note.log".into(), ConflictKind::InTheWay)]);
    assert_eq!(alice.refs(), refs);
    assert_eq!(fs::read(alice.project().join("note.log")).unwrap(), b"mine");
}

#[test]
fn a_project_that_somebody_switched_is_left_alone() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    alice.git(&["switch", "-q", "-c", "experiment"]);
    write(alice.project().join("wip.txt"), "mine");
    let turn = alice.turn("main", "a.txt", "a\n");
    alice.publish("main", Destination::Client);
    assert_eq!(alice.at("user/acme/alice"), turn);
    assert_eq!(
        alice.git(&["symbolic-ref", "--short", "HEAD"]),
        "experiment"
    );
    assert_eq!(alice.git(&["status", "--porcelain"]), "?? wip.txt");

    alice.git(&["add", "-A"]);
    alice.git(&["commit", "-qm", "wip"]);
    alice.git(&["switch", "-q", "user/acme/alice"]);
    write(alice.project().join("wip.txt"), "other");
    alice.git(&["add", "-A"]);
    alice.git(&["commit", "-qm", "other"]);
    try_git(&alice.project(), &["merge", "experiment"]).unwrap_err();
    alice.turn("main", "b.txt", "b\n");
    let error = alice.try_publish("main", Destination::User).unwrap_err();
    assert!(matches!(error, RepositoryError::Unfinished), "{error:?}");
}

#[test]
fn what_a_crash_left_half_done_is_finished() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    let before = alice.at("HEAD");
    let turn = alice.turn("main", "src/pages/index.astro", "<h1>Turn</h1>\n");
    alice.turn("main", "new.txt", "new\n");
    let to = alice.at("thread/acme/alice/main");
    let user = alice.key("main").user_key();
    let git_dir = gitdir::GitDir::of_project(&alice.project());
    let project = Worktree::of_user(git_dir, &user, &alice.project());
    let crash = |moves: bool| {
        let id = |text: &str| git2::Oid::from_str(text).unwrap();
        let (from, to) = (id(&before), id(&to));
        let go = || {
            if moves {
                alice.git(&["update-ref", "refs/heads/user/acme/alice", &to.to_string()]);
            }
            panic!("the power is gone")
        };
        let follow = || project.follow(from, to, &Fence::open(), go);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(follow)).unwrap_err();
    };
    crash(false);
    assert!(
        alice.publish("main", Destination::User).merged[0]
            .commit
            .is_some()
    );
    alice.is_clean();
    alice.git(&["update-ref", "refs/heads/user/acme/alice", &before]);
    alice.git(&["reset", "-q", "--hard"]);
    crash(true);
    assert_ne!(alice.git(&["status", "--porcelain"]), "");
    let finish = alice.repository.finish_publication(&user, &Fence::open());
    finish.unwrap();
    alice.is_clean();
    assert!(alice.publish("main", Destination::User).merged[0].up_to_date);
    alice.is_clean();
    assert_eq!(alice.at("HEAD"), to, "nothing was committed for it");
    assert!(alice.project().join("new.txt").exists());
    drop(turn);
}

#[test]
fn a_branch_that_somebody_else_moves_meanwhile_is_not_overwritten() {
    let place = Place::new();
    let alice = User::new(&place, "alice");
    alice.turn("main", "a.txt", "a\n");
    write(alice.project().join(".git/refs/heads/client/acme.lock"), "");
    // A dead process left the lock: it goes, and the work is done.
    alice.publish("main", Destination::Client);
    let lost = alice.with("main", |mover, _| {
        let mut request = PublishRequest {
            mover,
            to: Destination::Client,
            message: Some("x"),
            accepts_loss: false,
            origin: None,
        };
        request.to = Destination::Origin;
        alice.repository.publish(&request)
    });
    assert!(matches!(lost, Err(RepositoryError::NoOrigin)), "{lost:?}");
    // Out of the git directory a link must not lead.
    let outside = place.root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let branch = alice.project().join(".git/refs/heads/client");
    fs::remove_dir_all(&branch).unwrap();
    symlink(&outside, &branch).unwrap();
    let error = alice.try_publish("main", Destination::Client).unwrap_err();
    assert!(
        matches!(error, RepositoryError::Tampered { .. }),
        "{error:?}"
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}
