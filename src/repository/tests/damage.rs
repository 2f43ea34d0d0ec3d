//! What a person, an agent or a crash does to git's state: found by the guard at the start of a
//! turn, at init, and at a turn's end. The same is asked each time: nothing of the worktree and no
//! commit is lost, and the git program finds nothing wrong.

use std::collections::BTreeMap;

use super::*;

/// When the guard meets the damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Init,
    End,
}

/// A thread with one turn's commit behind it and an edit in the worktree.
struct Case {
    place: Place,
    site: Site,
    /// The commit that greenroom made.
    ours: String,
}

impl Case {
    fn new() -> Self {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        write(site.dir.join("ours.txt"), "of an earlier turn\n");
        site.commit("An earlier turn");
        let ours = site.worktree.head().unwrap();
        write(site.dir.join("edit.txt"), "not committed yet\n");
        Self { place, site, ours }
    }

    fn dir(&self) -> &Path {
        &self.site.dir
    }

    fn git_dir(&self) -> PathBuf {
        self.place.home("alice").join("project/.git")
    }

    fn admin(&self) -> PathBuf {
        self.git_dir().join("worktrees/main")
    }

    fn git(&self, args: &[&str]) -> String {
        git(self.dir(), args)
    }

    /// Makes a branch `other` with a commit that clashes with `edit.txt` and `src/pages/about.astro`.
    fn clashing_branch(&self) -> String {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-qm", "mine"]);
        self.git(&["branch", "other", "HEAD~1"]);
        self.git(&["switch", "-q", "other"]);
        write(self.dir().join("edit.txt"), "theirs\n");
        write(self.dir().join("src/pages/about.astro"), "theirs\n");
        self.git(&["add", "-A"]);
        self.git(&["commit", "-qm", "theirs"]);
        let other = self.git(&["rev-parse", "HEAD"]).trim().to_owned();
        self.git(&["switch", "-q", "thread/acme/alice/main"]);
        write(self.dir().join("src/pages/about.astro"), "mine\n");
        self.git(&["commit", "-qam", "mine again"]);
        other
    }

    /// Every file of the worktree.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.dir().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.file_name() == ".git" {
                    continue;
                }
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                } else {
                    let name = entry.path().strip_prefix(self.dir()).unwrap().to_owned();
                    files.insert(name, fs::read(entry.path()).unwrap());
                }
            }
        }
        files
    }

    /// Lets the guard meet the damage; what it said.
    fn meet(&self, at: At) -> Result<Vec<Repair>> {
        if at == At::Init {
            let repository = UserRepository::open(&self.place.home("alice").join("project"))?;
            let key = key("acme", "alice", "main");
            repository.ensure_thread(&key, self.dir(), &Fence::open())?;
        }
        let strangers = match at {
            At::End => Strangers::Fold,
            At::Start | At::Init => Strangers::Keep,
        };
        Ok(self.site.try_commit("A turn", strangers)?.repairs)
    }

    /// Nothing is lost and nothing is broken.
    fn is_sound(&self, before: &BTreeMap<PathBuf, Vec<u8>>) {
        assert_eq!(&self.files(), before, "the files are as they were");
        for (name, content) in before {
            let spec = format!("HEAD:{}", name.display());
            assert_eq!(
                self.git(&["cat-file", "blob", &spec]).as_bytes(),
                content,
                "{spec}"
            );
        }
        assert_eq!(self.site.status(), "");
        let long = self.git(&["status"]);
        assert!(
            long.starts_with("On branch thread/acme/alice/main\nnothing to commit"),
            "{long}"
        );
        self.git(&["fsck", "--strict"]);
        self.git(&["merge-base", "--is-ancestor", &self.ours, "HEAD"]);
        // And it goes on.
        write(self.dir().join("next.txt"), "next\n");
        assert_eq!(
            self.site.commit_cleanly(),
            [("next.txt".into(), FileStatus::Added)]
        );
        assert_eq!(self.site.commit("Nothing").repairs, []);
    }

    /// Is this commit named by some ref?
    fn is_kept(&self, commit: &str) -> bool {
        !self.git(&["for-each-ref", "--contains", commit]).is_empty()
    }
}

/// Spoils a thread, and judges what the guard makes of it each time that it may meet it.
fn repaired(spoil: impl Fn(&Case), says: &str) {
    for at in [At::Start, At::Init, At::End] {
        let case = Case::new();
        spoil(&case);
        let before = case.files();
        let repairs: Vec<_> = case
            .meet(at)
            .unwrap()
            .iter()
            .map(Repair::to_string)
            .collect();
        // At init it goes to the log.
        let is_said = repairs.iter().any(|text| text.contains(says));
        assert!(is_said || at == At::Init, "{at:?}: {repairs:?}");
        case.is_sound(&before);
    }
}

#[test]
fn a_merge_under_way() {
    repaired(
        |case| {
            let other = case.clashing_branch();
            try_git(case.dir(), &["merge", "-q", &other]).unwrap_err();
            assert!(case.admin().join("MERGE_HEAD").exists());
        },
        "A merge was under way",
    );
}

#[test]
fn a_rebase_under_way() {
    repaired(
        |case| {
            let other = case.clashing_branch();
            write(case.dir().join("dirty.txt"), "of an autostash\n");
            case.git(&["add", "dirty.txt"]);
            let before = case.git(&["rev-parse", "HEAD"]).trim().to_owned();
            try_git(case.dir(), &["rebase", "-q", "--autostash", &other]).unwrap_err();
            assert!(case.admin().join("rebase-merge").exists());
            let stash = fs::read_to_string(case.admin().join("rebase-merge/autostash")).unwrap();
            case.meet(At::Start).unwrap();
            assert!(case.is_kept(&before) && case.is_kept(stash.trim()));
            // And once more, for the caller.
            try_git(case.dir(), &["rebase", "-q", &other]).unwrap_err();
            write(case.dir().join("edit.txt"), "in the middle\n");
        },
        "A rebase was under way",
    );
}

#[test]
fn a_cherry_pick_or_revert_under_way() {
    for command in ["cherry-pick", "revert"] {
        repaired(
            |case| {
                let other = case.clashing_branch();
                try_git(case.dir(), &[command, &other]).unwrap_err();
            },
            &format!("A {command} was under way"),
        );
    }
}

#[test]
fn a_detached_head_with_a_commit_of_its_own() {
    repaired(
        |case| {
            case.git(&["switch", "-q", "--detach"]);
            case.git(&["commit", "-q", "--allow-empty", "-m", "on nothing"]);
            let lonely = case.git(&["rev-parse", "HEAD"]).trim().to_owned();
            // Anything that only reads leaves HEAD as it is.
            case.site.worktree.head().unwrap();
            assert_eq!(case.git(&["rev-parse", "HEAD"]).trim(), lonely);
            case.meet(At::Start).unwrap();
            assert!(case.is_kept(&lonely));
            case.git(&["switch", "-q", "--detach", &lonely]);
        },
        "stood on a commit instead of its branch",
    );
}

#[test]
fn a_head_on_another_branch() {
    repaired(
        |case| {
            case.git(&["switch", "-qc", "other", "HEAD~1"]);
            write(case.dir().join("there.txt"), "there\n");
            case.git(&["add", "there.txt"]);
            case.git(&["commit", "-qm", "there"]);
            write(case.dir().join("more.txt"), "more\n");
        },
        "had been switched to the branch other",
    );
}

#[test]
fn a_deleted_branch() {
    repaired(
        |case| {
            case.git(&["switch", "-q", "--detach"]);
            case.git(&["branch", "-qD", "thread/acme/alice/main"]);
            case.git(&["reflog", "expire", "--all", "--expire=now"]);
            case.git(&["gc", "-q", "--prune=now"]);
        },
        "The thread's branch was gone",
    );
    // As after a loss of power.
    repaired(
        |case| {
            let branch = case.git_dir().join("refs/heads/thread/acme/alice/main");
            fs::write(branch, "").unwrap();
        },
        "The thread's branch was gone",
    );
}

#[test]
fn a_rewritten_history() {
    repaired(
        |case| {
            case.git(&["commit", "-q", "--amend", "-m", "mine now"]);
            let amended = case.git(&["rev-parse", "HEAD"]).trim().to_owned();
            case.meet(At::Start).unwrap();
            assert!(case.is_kept(&amended));
            case.git(&["reset", "-q", "--hard", "HEAD~1"]);
            write(case.dir().join("after.txt"), "after\n");
        },
        "history of the thread's branch had been rewritten",
    );
    // To a history that shares nothing with ours.
    repaired(
        |case| {
            case.git(&["switch", "-q", "--orphan", "island"]);
            write(case.dir().join("island.txt"), "island\n");
            case.git(&["add", "-A"]);
            case.git(&["commit", "-qm", "island"]);
            case.git(&["branch", "-qM", "island", "thread/acme/alice/main"]);
        },
        "history of the thread's branch had been rewritten",
    );
}

#[test]
fn commits_of_others_stay_between_turns_and_are_folded_within_one() {
    for (at, count) in [(At::Start, 4), (At::Init, 4), (At::End, 3)] {
        let case = Case::new();
        case.git(&["add", "-A"]);
        case.git(&["commit", "-qm", "sneaked"]);
        let theirs = case.git(&["rev-parse", "HEAD"]).trim().to_owned();
        write(case.dir().join("more.txt"), "more\n");
        let before = case.files();
        let repairs = case.meet(at).unwrap();
        assert_eq!(repairs.contains(&Repair::Folded), at == At::End);
        let commits = case.git(&["rev-list", "--count", "HEAD"]);
        assert_eq!(commits.trim(), count.to_string(), "{at:?}");
        assert!(case.is_kept(&theirs));
        if at == At::End {
            // What was sneaked in is the turn's.
            let files = case.git(&["show", "--format=", "--name-only", "HEAD"]);
            assert_eq!(files, "edit.txt\nmore.txt\n");
        }
        case.is_sound(&before);
    }
}

#[test]
fn a_commit_of_ours_that_was_cut_off_is_finished() {
    let case = Case::new();
    let before = case.files();
    case.site.commit("A turn");
    let new = case.site.worktree.head().unwrap();
    // Killed after our own ref had moved, before the branch did.
    case.git(&[
        "update-ref",
        "refs/heads/thread/acme/alice/main",
        &case.ours,
    ]);
    case.meet(At::Init).unwrap();
    assert_eq!(case.site.worktree.head().unwrap(), new);
    case.is_sound(&before);
}

#[test]
fn locks_of_the_dead() {
    for lock in [
        "worktrees/main/index.lock",
        "worktrees/main/HEAD.lock",
        "refs/heads/thread/acme/alice/main.lock",
        "packed-refs.lock",
    ] {
        let case = Case::new();
        write(case.git_dir().join(lock), "");
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(90);
        let file = fs::File::options()
            .write(true)
            .open(case.git_dir().join(lock))
            .unwrap();
        file.set_modified(long_ago).unwrap();
        drop(file);
        let before = case.files();
        let repairs = case.meet(At::Start).unwrap();
        assert_eq!(repairs, [Repair::Lock], "{lock}");
        case.is_sound(&before);
    }
    // A fresh one is watched for a while.
    let case = Case::new();
    write(case.admin().join("index.lock"), "half an index");
    let before = case.files();
    assert_eq!(case.meet(At::Init).unwrap(), []);
    case.is_sound(&before);
}

#[test]
fn a_live_lock_is_refused_and_left_alone() {
    let case = Case::new();
    let lock = case.admin().join("index.lock");
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(90);
    let held = fs::File::create(&lock).unwrap();
    held.set_modified(long_ago).unwrap();
    for at in [At::Start, At::Init] {
        let refused = case.meet(at).unwrap_err();
        assert!(matches!(refused, RepositoryError::Locked), "{refused:?}");
        assert!(refused.to_string().contains("try again"), "{refused}");
        assert!(lock.exists());
    }
    drop(held);
    let before = case.files();
    case.meet(At::Start).unwrap();
    case.is_sound(&before);
}

#[test]
fn a_git_command_that_waits_for_its_editor_is_alive() {
    let case = Case::new();
    let opened = case.place.root.path().join("opened");
    let done = case.place.root.path().join("done");
    let editor = format!(
        "touch {}; for i in $(seq 600); do [ -e {} ] && break; sleep 0.1; done; echo edited >",
        opened.display(),
        done.display()
    );
    let dir = case.dir().to_owned();
    let person = std::thread::spawn(move || {
        let editor = format!("core.editor={editor}");
        try_git(&dir, &["-c", &editor, "commit", "-a", "--allow-empty"])
    });
    for _ in 0..600 {
        if opened.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(case.admin().join("index.lock").exists());
    let refused = case.meet(At::Start).unwrap_err();
    assert!(matches!(refused, RepositoryError::Locked), "{refused:?}");
    write(&done, "");
    person.join().unwrap().unwrap();
    let before = case.files();
    case.meet(At::Start).unwrap();
    case.is_sound(&before);
    assert!(case.git(&["log", "--format=%s"]).contains("edited"));
}

#[test]
fn a_damaged_index() {
    repaired(
        |case| fs::write(case.admin().join("index"), "garbage").unwrap(),
        "index was damaged",
    );
    // One bit, and half of it.
    repaired(
        |case| {
            let mut index = fs::read(case.admin().join("index")).unwrap();
            let middle = index.len() / 2;
            index[middle] ^= 1;
            fs::write(case.admin().join("index"), index).unwrap();
        },
        "index was damaged",
    );
    repaired(
        |case| {
            let index = fs::read(case.admin().join("index")).unwrap();
            fs::write(case.admin().join("index"), &index[..index.len() / 2]).unwrap();
        },
        "index was damaged",
    );
}

#[test]
fn a_lost_index_or_entry() {
    for at in [At::Start, At::Init, At::End] {
        let case = Case::new();
        fs::remove_file(case.admin().join("index")).unwrap();
        let before = case.files();
        case.meet(at).unwrap();
        case.is_sound(&before);
    }
    repaired(
        |case| {
            case.git(&["worktree", "unlock", "."]);
            fs::rename(case.dir(), case.dir().with_file_name("away")).unwrap();
            git(
                &case.place.home("alice").join("project"),
                &["worktree", "prune", "--expire=now"],
            );
            fs::rename(case.dir().with_file_name("away"), case.dir()).unwrap();
            assert!(!case.admin().exists(), "the git program pruned it");
        },
        "git had forgotten",
    );
}

#[test]
fn a_missing_folder() {
    for at in [At::Start, At::Init, At::End] {
        let case = Case::new();
        fs::remove_file(case.dir().join("edit.txt")).unwrap();
        let before = case.files();
        fs::remove_dir_all(case.dir()).unwrap();
        // Whoever only asks is answered.
        assert_eq!(case.site.worktree.head().unwrap(), case.ours);
        let repairs = case.meet(at).unwrap();
        assert_eq!(repairs.contains(&Repair::Folder), at != At::Init);
        case.is_sound(&before);
    }
    // An empty one is a loss before a turn, and the agent's doing after one.
    for at in [At::Start, At::End] {
        let case = Case::new();
        fs::remove_dir_all(case.dir()).unwrap();
        fs::create_dir(case.dir()).unwrap();
        case.meet(at).unwrap();
        assert_eq!(case.files().is_empty(), at == At::End);
        assert_eq!(case.site.status(), "");
        case.git(&["fsck", "--strict"]);
    }
}

#[test]
fn marks_of_a_conflict_that_were_staged() {
    repaired(
        |case| {
            let other = case.clashing_branch();
            try_git(case.dir(), &["merge", "-q", &other]).unwrap_err();
            for paper in ["MERGE_HEAD", "MERGE_MSG", "MERGE_MODE"] {
                fs::remove_file(case.admin().join(paper)).ok();
            }
            let index = case.git(&["ls-files", "-u"]);
            assert!(index.contains("edit.txt"), "{index}");
        },
        "A merge had been left unsettled in edit.txt, src/pages/about.astro",
    );
}
