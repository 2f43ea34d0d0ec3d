//! Merges as people and threads bring them about, judged by the git program.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::*;
use crate::{
    domain::{Conflict, ConflictKind},
    identity::ThreadKey,
    repository::{loss::Owner, tests::git},
};

/// A repository with the branches `user` (what others see) and `thread` (acme/alice/main's).
struct Lanes(tempfile::TempDir);

const PAGE: &str = "<h1>Hello</h1>\n<p>one</p>\n<p>two</p>\n<p>three</p>\n<p>four</p>\n";

impl Lanes {
    fn new() -> Self {
        let lanes = Self(tempfile::tempdir().unwrap());
        git(lanes.dir(), &["init", "-q", "-b", "user"]);
        lanes.write("page.astro", PAGE);
        lanes.write("style.css", "body { color: red }\n");
        lanes.commit("first", "");
        lanes.git(&["branch", "thread"]);
        lanes
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn git(&self, args: &[&str]) -> String {
        git(self.dir(), args)
    }

    fn on(&self, branch: &str) -> &Self {
        self.git(&["checkout", "-q", branch]);
        self
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.path(file), content).unwrap();
    }

    fn replace(&self, file: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(file)).unwrap();
        assert!(text.contains(from), "{text}");
        self.write(file, &text.replace(from, to));
    }

    fn commit(&self, subject: &str, trailers: &str) {
        self.git(&["add", "-A"]);
        let message = format!("{subject}\n\n{trailers}");
        self.git(&["commit", "-qm", &message]);
    }

    /// A turn of the thread.
    fn turn(&self, subject: &str) {
        self.commit(
            subject,
            "Turn-Id: acme~alice~main~1\nThread: acme/alice/main\nStatus: completed",
        );
    }

    /// An undo or restore of the thread.
    fn mechanical(&self, kind: &str) {
        let trailers = format!("Turn-Id: acme~alice~main~2\nThread: acme/alice/main\nKind: {kind}");
        self.commit(kind, &trailers);
    }

    /// Somebody else's work, published.
    fn others(&self, from: &str, to: &str) {
        self.on("user").replace("page.astro", from, to);
        self.commit(
            "others",
            "Turn-Id: acme~alice~other~1\nThread: acme/alice/other",
        );
    }

    /// Brings the user's branch into the thread, as a sync does.
    fn sync(&self) {
        self.on("thread");
        let message = "Sync\n\nTurn-Id: acme~alice~main~3\nThread: acme/alice/main\nKind: sync";
        self.git(&["merge", "-q", "--no-ff", "-m", message, "user"]);
    }

    fn tip(&self, branch: &str) -> Tip {
        Tip {
            branch: branch.into(),
            id: Oid::from_str(self.git(&["rev-parse", branch]).trim()).unwrap(),
        }
    }

    fn try_publish(&self, message: Option<&str>) -> Result<Merged> {
        self.merge(
            message,
            Some(&Owner::Thread(
                ThreadKey::parse("acme", "alice", "main").unwrap(),
            )),
        )
    }

    fn merge(&self, message: Option<&str>, owner: Option<&Owner>) -> Result<Merged> {
        super::super::init();
        let repo = Repository::open(self.dir()).unwrap();
        let who = Signature {
            name: "greenroom".into(),
            email: "greenroom@localhost".into(),
        };
        let how = How {
            message,
            trailers: &[("Thread", "acme/alice/main".into())],
            author: &who,
            committer: &who,
            always_commits: message.is_some(),
        };
        merge(&repo, &self.tip("thread"), &self.tip("user"), &how, owner)
    }

    /// Publishes, as far as the user's branch.
    fn publish(&self) -> Merged {
        let merged = self.try_publish(None).unwrap();
        if let Some(id) = merged.moves_to() {
            self.on("user")
                .git(&["merge", "-q", "--ff-only", &id.to_string()]);
        }
        self.git(&["fsck", "--strict"]);
        self.on("thread");
        merged
    }

    fn conflict(&self) -> Vec<Conflict> {
        let (user, thread) = (self.tip("user"), self.tip("thread"));
        let error = self.try_publish(None).unwrap_err();
        assert_eq!((self.tip("user"), self.tip("thread")), (user, thread));
        let RepositoryError::Conflict { between, files } = error else {
            panic!("{error}");
        };
        let between = between.unwrap();
        assert_eq!(
            (between.from.as_str(), between.to.as_str()),
            ("thread", "user")
        );
        files
    }

    /// The lines that would be lost.
    fn lost(&self) -> Vec<String> {
        let files = self.conflict();
        assert!(
            files
                .iter()
                .all(|file| file.kind == ConflictKind::SilentLoss)
        );
        files.into_iter().flat_map(|file| file.lines).collect()
    }
}

#[test]
fn a_branch_moves_along_merges_or_stays() {
    let lanes = Lanes::new();
    assert_eq!(lanes.publish(), Merged::UpToDate);
    lanes.on("thread").replace("page.astro", "Hello", "Welcome");
    lanes.turn("Change the heading");
    let tip = lanes.tip("thread").id;
    let commit = lanes
        .try_publish(Some("Spring campaign\n\nApproved"))
        .unwrap();
    let Merged::Commit(id) = commit else {
        panic!("{commit:?}")
    };
    let shown = lanes.git(&[
        "log",
        "-1",
        "--format=%P|%s|%an|%(trailers:key=Thread,valueonly)",
        &id.to_string(),
    ]);
    let user = lanes.tip("user").id;
    assert_eq!(
        shown.trim(),
        format!("{user} {tip}|Spring campaign|greenroom|acme/alice/main")
    );
    assert_eq!(lanes.publish(), Merged::Forward(tip));
    assert_eq!(lanes.publish(), Merged::UpToDate);

    lanes.others("four", "FOUR");
    lanes.on("thread").replace("page.astro", "Welcome", "Hi");
    lanes.turn("Shorter");
    assert!(matches!(lanes.publish(), Merged::Commit(_)));
    lanes.on("user");
    let page = fs::read_to_string(lanes.path("page.astro")).unwrap();
    assert!(page.contains("Hi") && page.contains("FOUR"), "{page}");
    assert_eq!(lanes.git(&["status", "--porcelain"]), "");
}

#[test]
fn conflicts_are_data() {
    let lanes = Lanes::new();
    lanes.on("user").write("gone.txt", "x\n");
    lanes.write("kept.txt", "x\n");
    lanes.commit("more", "");
    lanes.sync();
    lanes.replace("page.astro", "two", "ours");
    lanes.write("new.txt", "ours");
    fs::remove_file(lanes.path("gone.txt")).unwrap();
    lanes.write("kept.txt", "ours\n");
    lanes.turn("Everything");
    lanes.on("user").replace("page.astro", "two", "theirs");
    lanes.write("new.txt", "theirs");
    lanes.write("gone.txt", "theirs\n");
    fs::remove_file(lanes.path("kept.txt")).unwrap();
    lanes.commit("others", "");
    let files = lanes.conflict().into_iter();
    let mut files: Vec<_> = files.map(|file| (file.path, file.kind)).collect();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(
        files,
        [
            ("gone.txt".to_owned(), ConflictKind::DeletedInFrom),
            ("kept.txt".into(), ConflictKind::DeletedInTo),
            ("new.txt".into(), ConflictKind::BothAdded),
            ("page.astro".into(), ConflictKind::BothModified),
        ]
    );
    assert_eq!(lanes.git(&["status", "--porcelain"]), "");
}

#[test]
fn a_reverted_merge_does_not_take_others_work_along() {
    let lanes = Lanes::new();
    lanes.on("thread").replace("page.astro", "Hello", "Welcome");
    lanes.turn("Change the heading");
    lanes.others("four", "<b>theirs</b>");
    lanes.sync();
    lanes.git(&["revert", "-m", "1", "--no-edit", "HEAD"]);
    lanes.replace("page.astro", "one", "ONE");
    lanes.turn("More");
    assert_eq!(lanes.lost(), ["<p><b>theirs</b></p>"]);
    // It is the others' line, so it makes no difference whether the merge was published before.
    let lanes = Lanes::new();
    lanes.on("thread").replace("page.astro", "Hello", "Welcome");
    lanes.turn("Change the heading");
    lanes.others("four", "<b>theirs</b>");
    lanes.sync();
    lanes.publish();
    lanes.git(&["revert", "-m", "1", "--no-edit", "HEAD"]);
    assert_eq!(lanes.lost(), ["<p><b>theirs</b></p>"]);
    // Whoever wants it nevertheless can have it.
    assert!(lanes.merge(None, None).unwrap().moves_to().is_some());
}

#[test]
fn a_merge_that_kept_only_ours_is_found() {
    let lanes = Lanes::new();
    lanes.on("thread").replace("page.astro", "Hello", "Welcome");
    lanes.turn("Change the heading");
    lanes.others("four", "<b>theirs</b>");
    lanes.on("user").write("logo.svg", "<svg>theirs</svg>\n");
    fs::write(lanes.path("photo.bin"), b"\0theirs").unwrap();
    lanes.commit("others", "");
    lanes
        .on("thread")
        .git(&["merge", "-q", "-s", "ours", "--no-edit", "user"]);
    let files = lanes.conflict();
    let paths: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["logo.svg", "page.astro", "photo.bin"]);
    assert_eq!(files[0].lines, ["<svg>theirs</svg>"]);
    assert!(files[2].lines[0].contains("binary"), "{files:?}");
}

#[test]
fn a_restored_tree_takes_back_ones_own_work_only() {
    for is_published in [false, true] {
        let lanes = Lanes::new();
        lanes.on("thread").replace("page.astro", "Hello", "Welcome");
        lanes.turn("Change the heading");
        let before = lanes.git(&["rev-parse", "HEAD"]);
        lanes.others("four", "<b>theirs</b>");
        lanes.sync();
        lanes.replace("page.astro", "one", "our own");
        lanes.turn("More of ours");
        if is_published {
            lanes.publish();
        }
        lanes.git(&["checkout", "-q", before.trim(), "--", "."]);
        lanes.mechanical("restore");
        assert_eq!(
            lanes.lost(),
            ["<p><b>theirs</b></p>"],
            "published: {is_published}"
        );
        // Without the others' work in between there is nothing to be said against it.
        lanes.replace("page.astro", "four", "<b>theirs</b>");
        lanes.turn("Put it back");
        lanes.publish();
    }
}

#[test]
fn stale_states_of_whole_files_are_found() {
    // The thread's file as it was before the sync, written over the merged one by hand of nobody.
    let lanes = Lanes::new();
    lanes.on("thread").replace("page.astro", "Hello", "Welcome");
    lanes.turn("Change the heading");
    let stale = fs::read_to_string(lanes.path("page.astro")).unwrap();
    lanes.others("two", "theirs: two\n<p>and more of it</p>");
    lanes.sync();
    lanes.write("page.astro", &stale);
    lanes.commit("put the old file back", "");
    assert_eq!(
        lanes.lost(),
        ["<p>theirs: two", "<p>and more of it</p></p>"]
    );
}

#[test]
fn ordinary_work_raises_no_alarm() {
    let lanes = Lanes::new();
    // Deleting what was there, moving it, renaming, while others edit.
    lanes
        .on("thread")
        .replace("page.astro", "<p>three</p>\n", "");
    lanes.turn("Delete a paragraph");
    lanes.others("Hello", "Welcome");
    lanes.publish();
    lanes.sync();
    lanes.replace("page.astro", "Welcome", "Good day");
    lanes.turn("Change what others wrote, on purpose");
    lanes.publish();
    // Taken back, and once more: an undo of a turn that had touched their line.
    lanes.replace("page.astro", "Good day", "Welcome");
    lanes.mechanical("undo");
    lanes.publish();
    lanes.replace("page.astro", "Welcome", "Good day");
    lanes.mechanical("redo");
    lanes.publish();
    // A file renamed here and edited there.
    lanes.git(&["mv", "page.astro", "home.astro"]);
    lanes.turn("Rename");
    lanes.on("user").replace("page.astro", "two", "TWO, theirs");
    lanes.commit("others", "");
    lanes.publish();
    lanes.on("user");
    assert!(
        fs::read_to_string(lanes.path("home.astro"))
            .unwrap()
            .contains("TWO, theirs")
    );
    // Deleted as a whole, and others' edits brought down and edited over and over.
    lanes.sync();
    fs::remove_file(lanes.path("style.css")).unwrap();
    lanes.turn("No style");
    lanes.publish();
    for round in 0..5 {
        lanes
            .on("user")
            .write("notes.md", &format!("theirs {round}\n"));
        lanes.commit("others", "");
        lanes.sync();
        lanes.write("notes.md", &format!("ours {round}\n"));
        lanes.turn("Edit");
        lanes.publish();
    }
    // Edits by hand in the thread's folder count as somebody's.
    lanes.on("user").write("notes.md", "theirs again\n");
    lanes.commit("others", "");
    lanes.sync();
    lanes.write("notes.md", "by hand\n");
    lanes.commit(
        "Edits made outside of a turn",
        "Thread: acme/alice/main\nStatus: outside",
    );
    lanes.publish();
}

#[test]
fn a_thread_that_began_elsewhere_publishes() {
    // Of an older layout: commits that say nothing of themselves.
    let lanes = Lanes::new();
    lanes
        .on("thread")
        .replace("page.astro", "<p>three</p>\n", "");
    lanes.commit("old work", "");
    lanes.write("page.astro", "all new\n");
    lanes.commit("old work", "");
    lanes.on("user").write("other.txt", "x\n");
    lanes.commit("others", "");
    lanes.publish();
    assert_eq!(lanes.publish(), Merged::UpToDate);
}
