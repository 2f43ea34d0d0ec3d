//! Nothing that differs is missed, whatever wrote the index and however quickly files change.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use super::*;

/// Numbers that look random and are the same each time.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }
}

fn index_of(place: &Place) -> PathBuf {
    place
        .home("alice")
        .join("project/.git/worktrees/main/index")
}

#[test]
fn whatever_wrote_the_index_every_edit_is_found() {
    let ways: [&[&[&str]]; 8] = [
        &[&["update-index", "--index-version", "2"]],
        &[&["update-index", "--index-version", "3"]],
        &[&["update-index", "--index-version", "4"]],
        &[&["update-index", "--untracked-cache"]],
        &[&["update-index", "--split-index"]],
        &[&[
            "-c",
            "index.skipHash=true",
            "update-index",
            "--force-write-index",
        ]],
        &[&["add", "-N", "."]],
        &[
            &["update-index", "--assume-unchanged", "package.json"],
            &["update-index", "--skip-worktree", "src/pages/about.astro"],
            &["update-index", "--index-version", "4"],
        ],
    ];
    for commands in ways {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        for number in 0..40 {
            write(
                site.dir
                    .join(format!("deep/{}/er/file-{number}.txt", number % 7)),
                "x\n",
            );
        }
        site.commit("Files");
        write(site.dir.join("fresh.txt"), "something new\n");
        for command in commands {
            git(&site.dir, command);
        }
        write(site.dir.join("package.json"), "[]\n");
        write(site.dir.join("src/pages/about.astro"), "ABOUT\n");
        write(site.dir.join("deep/3/er/file-10.txt"), "y\n");
        fs::remove_file(site.dir.join("deep/4/er/file-11.txt")).unwrap();
        let names: Vec<_> = site
            .commit_cleanly()
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        assert_eq!(
            names,
            [
                "deep/3/er/file-10.txt",
                "deep/4/er/file-11.txt",
                "fresh.txt",
                "package.json",
                "src/pages/about.astro"
            ],
            "{commands:?}"
        );
    }
}

#[test]
fn git_goes_on_with_the_index_that_we_write() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    for number in 0..300 {
        write(
            site.dir.join(format!("a{}/b/{number}.txt", number % 9)),
            format!("{number}\n"),
        );
    }
    site.commit("Files");
    let dir = &site.dir;
    let head = git(dir, &["rev-parse", "HEAD^{tree}"]);
    assert_eq!(git(dir, &["write-tree"]), head);
    assert_eq!(git(dir, &["diff-index", "--cached", "HEAD"]), "");
    assert_eq!(git(dir, &["ls-files"]).lines().count(), 304);
    // A person goes on with it.
    write(dir.join("a1/b/1.txt"), "one\n");
    write(dir.join("a1/new.txt"), "new\n");
    git(dir, &["add", "a1"]);
    git(dir, &["rm", "-q", "a2/b/2.txt"]);
    git(dir, &["commit", "-qm", "a person's"]);
    assert_eq!(git(dir, &["status", "--porcelain"]), "");
    git(dir, &["fsck", "--strict"]);
    write(dir.join("a1/b/10.txt"), "ten\n");
    assert_eq!(site.commit_cleanly().len(), 1);
    git(dir, &["stash", "list"]);
    git(dir, &["mv", "a3", "a33"]);
    let moved = site.commit_cleanly();
    assert!(
        moved
            .iter()
            .all(|(_, status)| *status == FileStatus::Renamed)
    );
}

#[test]
fn edits_in_the_same_tick_of_the_clock_are_found() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let file = site.dir.join("file.txt");
    for number in 0..300 {
        // The same size each time, and right behind the commit before.
        write(&file, format!("{number:06}\n"));
        let commit = site
            .commit("Edit")
            .commit
            .unwrap_or_else(|| panic!("edit {number} is lost"));
        assert_eq!(commit.files.len(), 1);
    }
    assert_eq!(git(&site.dir, &["show", "HEAD:file.txt"]), "000299\n");
    assert_eq!(site.status(), "");
}

#[test]
fn an_edit_whose_time_was_set_back_is_found() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let file = site.dir.join("file.txt");
    write(&file, "one\n");
    site.commit("One");
    // Twice, so that the index vouches for it.
    std::thread::sleep(Duration::from_millis(30));
    write(site.dir.join("other.txt"), "x");
    site.commit("Other");
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    fs::write(&file, "two\n").unwrap();
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(modified)
        .unwrap();
    assert_eq!(
        site.commit_cleanly(),
        [("file.txt".into(), FileStatus::Modified)]
    );
    // And one whose time lies ahead.
    let ahead = SystemTime::now() + Duration::from_secs(3600);
    for text in ["ten\n", "six\n"] {
        fs::write(&file, text).unwrap();
        fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_modified(ahead)
            .unwrap();
        assert_eq!(site.commit("Edit").commit.unwrap().files.len(), 1, "{text}");
    }
}

#[test]
fn nothing_is_lost_while_others_write_all_the_time() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let files: Vec<_> = (0..20)
        .map(|number| site.dir.join(format!("live/{number}.txt")))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) || number < 500 {
                write(&files[number % files.len()], format!("{number:08}\n"));
                number += 1;
            }
        });
        for _ in 0..60 {
            site.commit("Meanwhile");
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    site.commit("At the end");
    assert_eq!(site.status(), "");
    for file in &files {
        let name = file.strip_prefix(&site.dir).unwrap().display().to_string();
        let committed = git(&site.dir, &["show", &format!("HEAD:{name}")]);
        assert_eq!(committed, fs::read_to_string(file).unwrap(), "{name}");
    }
}

#[test]
fn random_changes_to_many_files_are_committed_as_git_would() {
    for seed in [1, 2, 3] {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ seed);
        let name = |dice: &mut Dice| {
            let depth = dice.roll(4);
            let folders: String = (0..depth).map(|_| format!("d{}/", dice.roll(5))).collect();
            let kinds = ["", ".txt", "-x", ".d", "0"];
            format!(
                "{folders}f{}{}",
                dice.roll(60),
                kinds[dice.roll(kinds.len())]
            )
        };
        for round in 0..6 {
            let count = if round == 0 { 900 } else { 60 };
            let mut done = BTreeSet::new();
            for _ in 0..count {
                let path = site.dir.join(name(&mut dice));
                match dice.roll(if round == 0 { 2 } else { 7 }) {
                    0..=2 => {
                        fs::create_dir_all(path.parent().unwrap()).ok();
                        fs::write(&path, format!("{}\n", dice.roll(5))).ok();
                    }
                    3 => drop(fs::remove_file(&path)),
                    4 => {
                        fs::remove_file(&path).ok();
                        symlink(format!("f{}", dice.roll(9)), &path).ok();
                    }
                    5 => {
                        let mode = [0o644, 0o755, 0o600, 0o444][dice.roll(4)];
                        if fs::symlink_metadata(&path).is_ok_and(|about| about.is_file()) {
                            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                        }
                    }
                    _ => {
                        // A folder where a file was, or the reverse.
                        if path.is_dir() {
                            fs::remove_dir_all(&path).unwrap();
                            write(&path, "a file now\n");
                        } else if fs::remove_file(&path).is_ok() {
                            write(path.join("inner"), "x\n");
                        }
                    }
                }
                done.insert(path);
            }
            if site.status().is_empty() {
                continue;
            }
            site.commit_cleanly();
        }
        assert!(git(&site.dir, &["ls-files"]).lines().count() > 250);
    }
}

#[test]
fn what_was_made_read_only_can_be_edited_again_and_is_committed() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let dir = &site.dir;
    write(dir.join("kept/one.txt"), "one\n");
    write(dir.join("shut/two.txt"), "two\n");
    site.commit("Files");
    let mode = |name: &str, mode: u32| {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    write(dir.join("kept/one.txt"), "ONE\n");
    write(dir.join("new/three.txt"), "three\n");
    mode("kept/one.txt", 0o000);
    mode("package.json", 0o444);
    mode("shut/two.txt", 0o400);
    mode("shut", 0o000);
    mode("new/three.txt", 0o000);
    mode("new", 0o555);
    mode("src", 0o500);
    mode(".", 0o555);
    let committed = site.commit("A turn");
    let names: Vec<_> = committed
        .commit
        .unwrap()
        .files
        .into_iter()
        .map(|f| f.path)
        .collect();
    assert_eq!(names, ["kept/one.txt", "new/three.txt"]);
    assert_eq!(committed.repairs, [Repair::ReadOnly { count: 8 }]);
    for name in [".", "src", "shut", "new"] {
        let mode = fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o700, 0o700, "{name}");
    }
    for name in [
        "kept/one.txt",
        "package.json",
        "shut/two.txt",
        "new/three.txt",
    ] {
        let mode = fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o700, 0o600, "{name}");
    }
    assert_eq!(site.status(), "");
    assert_eq!(site.commit("Again").repairs, []);
    // A symlink's target is nobody's of ours.
    let outside = place.root.path().join("outside");
    write(&outside, "x");
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o400)).unwrap();
    symlink(&outside, dir.join("link")).unwrap();
    site.commit_cleanly();
    assert_eq!(
        fs::metadata(&outside).unwrap().permissions().mode() & 0o777,
        0o400
    );
}

#[test]
fn an_index_is_written_only_where_it_says_something_new() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("a.txt"), "a");
    site.commit("A");
    std::thread::sleep(Duration::from_millis(30));
    // Now all of it is settled.
    site.commit("Nothing");
    let before = fs::read(index_of(&place)).unwrap();
    let written = fs::metadata(index_of(&place)).unwrap().modified().unwrap();
    for _ in 0..3 {
        assert_eq!(site.commit("Nothing").commit, None);
    }
    assert_eq!(
        fs::metadata(index_of(&place)).unwrap().modified().unwrap(),
        written
    );
    assert_eq!(fs::read(index_of(&place)).unwrap(), before);
}
