//! Taking commits back, going back to earlier ones, and being killed while files are put in place.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;

impl Site {
    pub(in crate::repository) fn head(&self) -> String {
        git(&self.dir, &["rev-parse", "HEAD"]).trim().to_owned()
    }

    fn tree(&self, commit: &str) -> String {
        git(&self.dir, &["rev-parse", &format!("{commit}^{{tree}}")])
    }

    fn without(&self, commit: &str) -> Result<Draft> {
        let base = self.worktree.committed().unwrap();
        self.worktree.draft_without(&base, commit)
    }

    fn restored(&self, commit: &str) -> Result<Draft> {
        let base = self.worktree.committed().unwrap();
        let drafted = self.worktree.draft_restored(&base, commit);
        drafted.map(|(draft, _)| draft)
    }

    /// Makes the draft's commit, and does not apply it.
    pub(in crate::repository) fn write(&self, draft: &Draft) -> String {
        let who = greenroom();
        let text = CommitText {
            instruction: "Undo",
            trailers: &[],
            author: &who,
            committer: &who,
        };
        self.worktree.write_draft(draft, &text).unwrap()
    }

    fn land(&self, draft: &Draft) {
        let commit = self.write(draft);
        let summary = self.worktree.apply(&commit, &Fence::open()).unwrap();
        assert_eq!(summary.id, commit);
        self.is_at(&commit);
    }

    /// Branch, index and files are this commit's, and nothing is left behind.
    fn is_at(&self, commit: &str) {
        assert_eq!(self.head(), commit);
        assert_eq!(self.status(), "");
        git(&self.dir, &["fsck", "--strict", "--no-dangling"]);
        assert!(!self.worktree.admin.join("landing").exists());
    }

    fn conflicts(&self, draft: Result<Draft>) -> Vec<String> {
        match draft {
            Err(RepositoryError::Conflict { files, .. }) => {
                files.into_iter().map(|file| file.path).collect()
            }
            other => panic!("no conflict: {other:?}"),
        }
    }
}

/// Everything below a folder but git's, as it is on disk.
fn files(dir: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let (path, metadata) = (entry.path(), entry.metadata().unwrap());
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if metadata.is_dir() {
                found.insert(name, (1, Vec::new()));
                folders.push(path);
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.insert(name, (2, target.into_os_string().into_encoded_bytes()));
            } else if name != Path::new(".git") {
                let mode = metadata.permissions().mode() & 0o111;
                found.insert(name, (mode | 4, fs::read(&path).unwrap()));
            }
        }
    }
    found
}

/// The same without folders, of which git knows nothing: an empty one may go or stay.
fn contents(dir: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = files(dir);
    found.retain(|_, (kind, _)| *kind != 1);
    found
}

#[test]
fn every_kind_of_change_is_taken_back_and_brought_again() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let at = |path: &str| site.dir.join(path);
    write(at(".gitattributes"), "*.crlf text eol=crlf\n");
    write(at("lines.crlf"), "a\r\nb\r\n");
    write(at("alone/in/a/folder.txt"), "x\n");
    write(at("run.sh"), "#!/bin/sh\n");
    write(at("photo.png"), b"\x89PNG\0\x01\x02");
    write(at("thing/a.txt"), "a\n");
    write(at("thing/b.txt"), "b\n");
    write(at("file"), "file\n");
    write(at("become-link"), "text\n");
    write(at("Case.txt"), "case\n");
    write(at("long.md"), "one\ntwo\nthree\nfour\nfive\nsix\nseven\n");
    symlink("file", at("link")).unwrap();
    site.commit("Before");
    let before = (site.head(), files(&site.dir));

    write(at("lines.crlf"), "a\r\nb\r\nc\r\n");
    fs::remove_dir_all(at("alone")).unwrap();
    fs::set_permissions(at("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    write(at("photo.png"), b"\x89PNG\0\x03");
    fs::remove_dir_all(at("thing")).unwrap();
    write(at("thing"), "a file now\n");
    fs::remove_file(at("file")).unwrap();
    write(at("file/in/it.txt"), "a folder now\n");
    fs::remove_file(at("become-link")).unwrap();
    symlink("run.sh", at("become-link")).unwrap();
    fs::remove_file(at("link")).unwrap();
    symlink("elsewhere", at("link")).unwrap();
    fs::rename(at("Case.txt"), at("case.txt")).unwrap();
    fs::rename(at("long.md"), at("longer.md")).unwrap();
    write(at("new/deep/down.txt"), "new\n");
    write(at("a name with spaces & ünïcode [*].txt"), "x\n");
    site.commit("All kinds");
    let after = (site.head(), files(&site.dir));

    site.land(&site.without(&after.0).unwrap());
    assert_eq!(site.tree("HEAD"), site.tree(&before.0));
    assert_eq!(
        files(&site.dir),
        before.1,
        "byte for byte, no empty folder left"
    );
    site.land(&site.without(&site.head()).unwrap());
    assert_eq!(site.tree("HEAD"), site.tree(&after.0));
    assert_eq!(files(&site.dir), after.1);
    site.land(&site.restored(&before.0[..10]).unwrap());
    assert_eq!(files(&site.dir), before.1);
    assert!(site.restored(&before.0).unwrap().is_empty());
}

#[test]
fn later_changes_stay_also_in_a_renamed_file() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let at = |path: &str| site.dir.join(path);
    let page = |changed: &[(usize, &str)]| -> String {
        let line = |n: usize| {
            let change = changed.iter().find(|(at, _)| *at == n);
            change.map_or(format!("line {n}\n"), |(_, text)| format!("{text}\n"))
        };
        (0..30).map(line).collect()
    };
    write(at("page.md"), page(&[]));
    site.commit("Page");
    write(at("page.md"), page(&[(3, "A1")]));
    let a1 = site.commit("A1").commit.unwrap().id;
    write(at("page.md"), page(&[(3, "A1"), (12, "B1")]));
    site.commit("B1");
    fs::rename(at("page.md"), at("story.md")).unwrap();
    write(at("story.md"), page(&[(3, "A1"), (12, "B1"), (20, "A2")]));
    site.commit("A2, and another name");

    site.land(&site.without(&a1).unwrap());
    assert!(!at("page.md").exists());
    let expected = page(&[(12, "B1"), (20, "A2")]);
    assert_eq!(fs::read_to_string(at("story.md")).unwrap(), expected);
}

#[test]
fn what_later_changes_build_on_is_named_and_nothing_happens() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let at = |path: &str| site.dir.join(path);
    write(at("index.md"), "mine\n");
    write(at("added.md"), "added\n");
    write(at("fine.md"), "fine\n");
    let first = site.commit("First").commit.unwrap().id;
    write(at("index.md"), "yours\n");
    write(at("added.md"), "added\nand more\n");
    site.commit("Second");
    let before = (site.head(), files(&site.dir));
    let mut names = site.conflicts(site.without(&first));
    names.sort();
    assert_eq!(names, ["added.md", "index.md"]);
    assert_eq!((site.head(), files(&site.dir)), before);
    assert_eq!(site.status(), "");
}

#[test]
fn what_is_in_no_commit_is_never_overwritten() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let at = |path: &str| site.dir.join(path);
    write(at("notes.log.md"), "notes\n");
    write(at("dist.md"), "x\n");
    write(at("keep/a.md"), "a\n");
    write(at("keep/b.md"), "b\n");
    site.commit("Before");
    let before = site.head();

    // The file that would come back is there, ignored.
    fs::remove_file(at("notes.log.md")).unwrap();
    write(at(".gitignore"), "dist/\n*.log\n*.log.md\n");
    let gone = site.commit("Away").commit.unwrap().id;
    write(at("notes.log.md"), "a person's own\n");
    assert_eq!(site.conflicts(site.without(&gone)), ["notes.log.md"]);
    assert_eq!(site.conflicts(site.restored(&before)), ["notes.log.md"]);
    // Of the same content it is no loss.
    write(at("notes.log.md"), "notes\n");
    site.without(&gone).unwrap();
    fs::remove_file(at("notes.log.md")).unwrap();
    site.land(&site.without(&gone).unwrap());

    // A folder has to become a file again, and something is in it.
    fs::remove_file(at("dist.md")).unwrap();
    write(at("dist.md/page.md"), "x\n");
    let folder = site.commit("A folder").commit.unwrap().id;
    write(at("dist.md/build.log"), "ignored\n");
    assert_eq!(site.conflicts(site.without(&folder)), ["dist.md/build.log"]);
    fs::remove_file(at("dist.md/build.log")).unwrap();
    fs::create_dir_all(at("dist.md/empty/folders")).unwrap();
    site.land(&site.without(&folder).unwrap());
    assert_eq!(fs::read_to_string(at("dist.md")).unwrap(), "x\n");

    // A folder has to come back where an ignored file or a symlink is.
    fs::remove_dir_all(at("keep")).unwrap();
    write(at(".gitignore"), "keep\n*.log\n");
    let removed = site.commit("No folder").commit.unwrap().id;
    write(at("keep"), "mine\n");
    assert_eq!(site.conflicts(site.without(&removed)), ["keep"]);
    fs::remove_file(at("keep")).unwrap();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), at("keep")).unwrap();
    assert_eq!(site.conflicts(site.without(&removed)), ["keep"]);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    fs::remove_file(at("keep")).unwrap();

    // A file that the gate holds back differs from its commit.
    write(at("key.txt"), "nothing yet\n");
    site.commit("A file");
    write(at("key.txt"), "something\n");
    let edited = site.commit("An edit").commit.unwrap().id;
    let secret = format!("-----BEGIN {}\n", "PRIVATE KEY-----");
    write(at("key.txt"), &secret);
    assert_eq!(site.commit("A secret").held_back.len(), 1);
    assert_eq!(site.conflicts(site.without(&edited)), ["key.txt"]);
    assert_eq!(fs::read_to_string(at("key.txt")).unwrap(), secret);
}

#[test]
fn only_commits_of_the_branch_are_gone_back_to() {
    let place = Place::new();
    let (_, alice) = place.thread("alice", "main");
    let (_, other) = place.thread("alice", "other");
    write(other.dir.join("other.md"), "x");
    let theirs = other.commit("Theirs").commit.unwrap().id;
    let refused = |id: &str| alice.restored(id).unwrap_err();
    for id in [theirs.as_str(), &theirs[..8], "0123456789", "zzzz", ""] {
        assert!(
            matches!(refused(id), RepositoryError::NoSuchCommit { .. }),
            "{id}: {:?}",
            refused(id)
        );
    }
    let tree = alice.tree("HEAD");
    assert!(matches!(
        refused(tree.trim()),
        RepositoryError::NoSuchCommit { .. }
    ));
}

#[test]
fn a_branch_that_moved_is_left_alone() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("a.md"), "a\n");
    let added = site.commit("Add").commit.unwrap().id;
    let commit = site.write(&site.without(&added).unwrap());
    write(site.dir.join("b.md"), "b\n");
    site.commit("Meanwhile");
    let before = files(&site.dir);
    let error = site.worktree.apply(&commit, &Fence::open()).unwrap_err();
    assert!(
        matches!(error, RepositoryError::HeadMoved { .. }),
        "{error:?}"
    );
    assert_eq!(files(&site.dir), before);
    assert_eq!(site.status(), "");
}

/// Edits that come in after the draft: merged where they fit, else left as they are.
#[test]
fn edits_of_the_last_moment_are_kept() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let at = |path: &str| site.dir.join(path);
    let lines = |first: &str, last: &str| format!("{first}\n2\n3\n4\n5\n6\n7\n{last}\n");
    for name in ["merged.md", "clash.md", "deleted.md", "removed.md"] {
        write(at(name), lines("old", "end"));
    }
    site.commit("Before");
    for name in ["merged.md", "clash.md", "deleted.md"] {
        write(at(name), lines("new", "end"));
    }
    write(at("removed.md"), lines("old", "end"));
    write(at("came.md"), "came\n");
    write(at("went/came-too.md"), "came\n");
    let turn = site.commit("Turn").commit.unwrap().id;
    let commit = site.write(&site.without(&turn).unwrap());

    write(at("merged.md"), lines("new", "a person's"));
    write(at("clash.md"), lines("a person's", "end"));
    fs::remove_file(at("deleted.md")).unwrap();
    write(at("came.md"), "came, and was edited\n");
    write(at("went/untracked.md"), "just made\n");
    site.worktree.apply(&commit, &Fence::open()).unwrap();

    let read = |name: &str| fs::read_to_string(at(name)).unwrap();
    assert_eq!(read("merged.md"), lines("old", "a person's"));
    assert_eq!(read("clash.md"), lines("a person's", "end"));
    assert!(!at("deleted.md").exists());
    assert_eq!(read("came.md"), "came, and was edited\n");
    assert_eq!(read("went/untracked.md"), "just made\n");
    assert!(!at("went/came-too.md").exists());
    assert_eq!(site.head(), commit);
    assert_eq!(
        site.status(),
        " M clash.md\n D deleted.md\n M merged.md\n?? came.md\n?? went/\n"
    );
    site.commit("Outside edits");
    assert_eq!(site.status(), "");
}

const CHILD: &str = "GREENROOM_TEST_APPLY";

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "run by another test"]
fn child_that_applies() {
    let Ok(asked) = std::env::var(CHILD) else {
        return;
    };
    let (project, rest) = asked.split_once('|').unwrap();
    let (worktree, commit) = rest.split_once('|').unwrap();
    let repository = UserRepository::open(Path::new(project)).unwrap();
    let worktree = repository.worktree(&key("acme", "alice", "main"), Path::new(worktree));
    println!("begin");
    worktree.apply(commit, &Fence::open()).unwrap();
}

/// A restore of many files is killed at any moment; somebody goes on where it was.
#[test]
fn a_kill_at_any_moment_is_finished_by_the_next_owner() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let state = |round: usize| {
        for n in 0..60 {
            let path = site.dir.join(format!("pages/{}/{n}.md", (n + round) % 3));
            write(path, format!("round {round}\nfile {n}\n"));
        }
    };
    state(0);
    site.commit("First");
    let first = site.head();
    fs::remove_dir_all(site.dir.join("pages")).unwrap();
    state(1);
    write(site.dir.join("pages/edited.md"), "0\n1\n2\n3\n4\n5\n6\n7\n");
    site.commit("Second");
    let second = site.head();
    write(
        site.dir.join("pages/edited.md"),
        "0\n1\n2\n3\n4\n5\n6\nseven\n",
    );
    site.commit("Third");

    let project = place.home("alice").join("project");
    let mut outcomes = BTreeMap::<&str, usize>::new();
    let took = {
        let begun = Instant::now();
        site.land(&site.restored(&first).unwrap());
        site.land(&site.restored(&second).unwrap());
        begun.elapsed() / 2
    };
    // Until the kill has met what it is about: later where it came too early, earlier where too late,
    // so that a slow machine only takes more rounds.
    const ENOUGH: usize = 4;
    const MOST: usize = 100;
    let mut delay = took / 9;
    for round in 0..MOST {
        if outcomes.get("half done") >= Some(&ENOUGH) {
            break;
        }
        let to = if round % 2 == 0 { &first } else { &second };
        let before = site.head();
        let commit = site.write(&site.restored(to).unwrap());
        let asked = format!("{}|{}|{commit}", project.display(), site.dir.display());
        #[expect(
            clippy::disallowed_methods,
            reason = "this program itself, to be killed"
        )]
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "repository::tests::drafts::child_that_applies"])
            .args(["--ignored", "--nocapture"])
            .env(CHILD, asked)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        assert!(lines.any(|line| line.ends_with("begin")));
        std::thread::sleep(delay);
        child.kill().unwrap();
        child.wait().unwrap();

        let moved = site.head();
        let (outcome, next) = match (moved == before, site.status().is_empty()) {
            (true, _) => ("not begun", delay * 5 / 4 + Duration::from_millis(1)),
            (false, false) => ("half done", delay),
            (false, true) => ("done", delay * 4 / 5),
        };
        delay = next;
        *outcomes.entry(outcome).or_default() += 1;
        if moved == before {
            assert_eq!(
                site.status(),
                "",
                "nothing was touched before the branch moved"
            );
        }
        // The next owner's guard removes what locks the dead one has left; it waits longer.
        let git = project.join(".git");
        for lock in files(&git)
            .into_keys()
            .filter(|path| path.extension() == Some("lock".as_ref()))
        {
            fs::remove_file(git.join(lock)).unwrap();
        }
        site.worktree.apply(&commit, &Fence::open()).unwrap();
        site.is_at(&commit);
        assert_eq!(site.tree("HEAD"), site.tree(to));
    }
    assert!(outcomes.contains_key("half done"), "{outcomes:?}");
}

/// What a turn, or the person beside it, may do to a few files.
#[derive(Debug, Clone)]
enum Act {
    /// Write one line of one file.
    Line {
        file: u8,
        line: u8,
        text: u8,
    },
    Remove {
        file: u8,
    },
    /// Replace a file by a folder, or the reverse.
    Swap {
        file: u8,
    },
    Mode {
        file: u8,
    },
    /// Take back the nth commit from the end.
    Undo {
        back: usize,
    },
    Restore {
        back: usize,
    },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        5 => (0..4_u8, 0..12_u8, 0..5_u8).prop_map(|(file, line, text)| Act::Line { file, line, text }),
        1 => (0..4_u8).prop_map(|file| Act::Remove { file }),
        1 => (0..4_u8).prop_map(|file| Act::Swap { file }),
        1 => (0..4_u8).prop_map(|file| Act::Mode { file }),
        4 => (0..6_usize).prop_map(|back| Act::Undo { back }),
        1 => (0..6_usize).prop_map(|back| Act::Restore { back }),
    ];
    proptest::collection::vec(act, 1..14)
}

fn edit(dir: &Path, act: &Act) {
    let path = |file: u8| dir.join(["a.md", "b.md", "deep/c.md", "deep/er/d.md"][file as usize]);
    match *act {
        Act::Line { file, line, text } => {
            let path = path(file);
            let blank = (0..12).map(|n| format!("line {n}\n\n")).collect();
            let before = fs::read_to_string(&path).unwrap_or(blank);
            let mut lines: Vec<_> = before.lines().map(str::to_owned).collect();
            if let Some(line) = lines.get_mut(2 * usize::from(line)) {
                *line = format!("text {text}");
            }
            if !path.is_dir() {
                write(path, lines.join("\n") + "\n");
            }
        }
        Act::Remove { file } => {
            fs::remove_file(path(file)).ok();
            // git knows no empty folders, so nothing is promised of them.
            for folder in ["deep/er", "deep"] {
                fs::remove_dir(dir.join(folder)).ok();
            }
        }
        Act::Swap { file } => {
            let path = path(file);
            if path.is_dir() {
                fs::remove_dir_all(&path).unwrap();
                write(path, "a file\n");
            } else if path.exists() {
                fs::remove_file(&path).unwrap();
                write(path.join("inside.md"), "a folder\n");
            }
        }
        Act::Mode { file } => {
            let path = path(file);
            if path.is_file() {
                fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        Act::Undo { .. } | Act::Restore { .. } => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    /// History only grows, branch, index and files agree after each step, a refusal changes
    /// nothing, and an undo that is taken back at once is as if it had never been.
    #[test]
    fn any_sequence_keeps_its_promises(acts in acts()) {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        let begin = site.head();
        let mut commits = vec![begin.clone()];
        for act in &acts {
            let before = (site.head(), contents(&site.dir));
            let nth = |back: usize| commits[commits.len().saturating_sub(1 + back)].clone();
            let draft = match act {
                Act::Undo { back } if nth(*back) != begin => Some(site.without(&nth(*back))),
                Act::Restore { back } => Some(site.restored(&nth(*back))),
                _ => None,
            };
            match draft {
                None => {
                    edit(&site.dir, act);
                    site.commit("Edit");
                }
                Some(Ok(draft)) if draft.is_empty() => {}
                Some(Ok(draft)) => {
                    let land = |draft: &Draft| {
                        let commit = site.write(draft);
                        site.worktree.apply(&commit, &Fence::open()).unwrap();
                    };
                    land(&draft);
                    land(&site.without(&site.head()).unwrap());
                    prop_assert_eq!(contents(&site.dir), before.1);
                    prop_assert_eq!(site.tree("HEAD"), site.tree(&before.0));
                    land(&site.without(&site.head()).unwrap());
                }
                Some(Err(RepositoryError::Conflict { files: named, .. })) => {
                    prop_assert!(!named.is_empty());
                    prop_assert_eq!((site.head(), contents(&site.dir)), before.clone());
                }
                Some(Err(error)) => panic!("{error:?}"),
            }
            prop_assert_eq!(site.status(), "");
            let head = site.head();
            if head != before.0 {
                git(&site.dir, &["merge-base", "--is-ancestor", &before.0, &head]);
                commits.push(head);
            }
        }
        git(&site.dir, &["fsck", "--strict", "--no-dangling"]);
    }
}
