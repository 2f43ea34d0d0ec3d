//! A commit of what a watch has seen is the one that a look at every file would have made.

use super::{scanning::Dice, *};

fn begin(site: &Site, watch: &Watch) -> Committed {
    site.commit_in(Scope::AllAndWatch(watch), "Before", Strangers::Keep)
        .unwrap()
}

fn end(site: &Site, watch: &Watch) -> Committed {
    site.commit_in(Scope::Since(watch), "Turn", Strangers::Fold)
        .unwrap()
}

/// A place with a site of some folders and files.
fn place() -> (Place, Site) {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    for number in 0..60 {
        let folder = format!("a{}/b{}", number % 4, number % 3);
        write(
            site.dir.join(folder).join(format!("{number}.md")),
            format!("{number}\n"),
        );
    }
    site.commit("Files");
    (place, site)
}

#[test]
fn whatever_changes_is_in_the_turns_commit() {
    for seed in 0..12 {
        let (_place, site) = place();
        let mut dice = Dice(0x2545_f491_4f6c_dd1d ^ (seed << 7));
        let watch = Watch::default();
        // A folder without a file that counts, and one that git does not know.
        fs::create_dir_all(site.dir.join("empty/inner")).unwrap();
        write(site.dir.join("dist/made.js"), "ignored\n");
        write(site.dir.join("logs/today.log"), "ignored\n");
        for _ in 0..6 {
            begin(&site, &watch);
            for _ in 0..=dice.roll(12) {
                let folders = [
                    "a0",
                    "a1/b1",
                    "a2",
                    "new",
                    "new/deep/er",
                    "empty",
                    "empty/inner",
                ];
                let more = ["logs", "dist", ".", "a3/b0", "a9"];
                let folders: Vec<_> = folders.into_iter().chain(more).collect();
                let folder = site.dir.join(folders[dice.roll(folders.len())]);
                let path = folder.join(format!("{}.md", dice.roll(60)));
                let other = site.dir.join(folders[dice.roll(folders.len())]);
                match dice.roll(12) {
                    0..=4 => {
                        fs::create_dir_all(&folder).ok();
                        fs::write(&path, format!("{}\n", dice.roll(1_000))).ok();
                    }
                    5 => drop(fs::remove_file(&path)),
                    6 => drop(fs::rename(&path, other.join("moved.md"))),
                    7 if folder != site.dir.join(".") => drop(fs::remove_dir_all(&folder)),
                    8 => drop(fs::rename(
                        &folder,
                        site.dir.join(format!("m{}", dice.roll(3))),
                    )),
                    9 => {
                        fs::remove_file(&path).ok();
                        symlink("package.json", &path).ok();
                    }
                    10 => {
                        let mode = [0o644, 0o755, 0o400][dice.roll(3)];
                        if fs::symlink_metadata(&path).is_ok_and(|about| about.is_file()) {
                            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                        }
                    }
                    _ => {
                        let rules = ["dist/\n", "dist/\n*.log\n", "*.log\nnew/\n"];
                        fs::write(site.dir.join(".gitignore"), rules[dice.roll(3)]).unwrap();
                    }
                }
            }
            end(&site, &watch);
            assert_eq!(site.status(), "", "seed {seed}");
            assert_eq!(site.commit("Nothing").commit, None, "seed {seed}");
        }
        git(&site.dir, &["fsck", "--strict"]);
    }
}

#[test]
fn it_costs_what_changed() {
    let (place, site) = place();
    let watch = Watch::default();
    // By another name of the same file a change is not seen: so the others were not looked at.
    let elsewhere = place.root.path().join("elsewhere");
    fs::hard_link(site.dir.join("a1/b1/1.md"), &elsewhere).unwrap();
    begin(&site, &watch);
    fs::write(&elsewhere, "by its other name\n").unwrap();
    fs::write(site.dir.join("a2/b2/2.md"), "two\n").unwrap();
    let files = |committed: Committed| -> Vec<String> {
        let files = committed.commit.into_iter().flat_map(|commit| commit.files);
        files.map(|file| file.path).collect()
    };
    assert_eq!(files(end(&site, &watch)), ["a2/b2/2.md"]);
    // And nothing is lost by that.
    assert_eq!(files(begin(&site, &watch)), ["a1/b1/1.md"]);
}

#[test]
fn what_was_held_back_is_told_of_each_time() {
    let (_place, site) = place();
    let watch = Watch::default();
    write(site.dir.join(".env"), "KEY=1\n");
    write(site.dir.join("sub/node_modules/x/index.js"), "x\n");
    let held = |committed: Committed| -> Vec<String> {
        let held = committed.held_back.into_iter();
        held.map(|held| held.path).collect()
    };
    assert_eq!(held(begin(&site, &watch)), [".env", "sub/node_modules"]);
    write(site.dir.join("a0/b0/0.md"), "zero\n");
    write(site.dir.join("a0/.env.local"), "KEY=2\n");
    let committed = end(&site, &watch);
    assert_eq!(committed.commit.as_ref().unwrap().files.len(), 1);
    assert_eq!(
        held(committed),
        [".env", "a0/.env.local", "sub/node_modules"]
    );
}

#[test]
fn a_queue_that_ran_over_is_no_excuse() {
    let (_place, site) = place();
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    assert!(
        limit < 1 << 20,
        "this kernel's queue is too long for the test"
    );
    let watch = Watch::default();
    begin(&site, &watch);
    let (one, two) = (site.dir.join("a1/b1/1.md"), site.dir.join("a1/b1/13.md"));
    for round in 0..=limit / 4 {
        // Two by turns: equal events in a row are one.
        fs::write(&one, format!("{round}\n")).unwrap();
        fs::write(&two, format!("{round}\n")).unwrap();
    }
    write(site.dir.join("a2/b2/2.md"), "after the queue was full\n");
    let committed = end(&site, &watch);
    assert_eq!(committed.commit.unwrap().files.len(), 3);
    assert_eq!(site.status(), "");
}

#[test]
fn a_worktree_that_is_another_one_is_looked_at_as_a_whole() {
    let (_place, site) = place();
    let watch = Watch::default();
    begin(&site, &watch);
    let aside = site.dir.with_file_name("aside");
    fs::rename(&site.dir, &aside).unwrap();
    // The edits of the new one are not in the queue.
    for path in [
        "package.json",
        "src/pages/index.astro",
        "src/pages/about.astro",
    ] {
        write(site.dir.join(path), fs::read(aside.join(path)).unwrap());
    }
    let committed = end(&site, &watch);
    assert!(committed.commit.unwrap().files.len() >= 60);
    assert_eq!(site.status(), "");
}

#[test]
fn what_was_seen_ahead_counts_only_for_the_commit_that_it_was_compared_with() {
    let (_place, site) = place();
    let watch = Watch::default();
    let index = site.worktree.index_file();
    // As a crash leaves it: the index knows nothing of the last commit, whose files come first in it.
    let behind = fs::read(&index).unwrap();
    write(site.dir.join("a/first.md"), "first\n");
    site.commit("First");
    fs::write(&index, behind).unwrap();
    write(site.dir.join("a2/b2/2.md"), "by hand\n");
    let committed = begin(&site, &watch).commit.unwrap();
    let paths: Vec<_> = committed.files.iter().map(|file| &file.path).collect();
    assert_eq!(paths, ["a2/b2/2.md"]);
    write(site.dir.join("a1/b1/1.md"), "by the turn\n");
    assert_eq!(end(&site, &watch).commit.unwrap().files.len(), 1);
    assert_eq!(site.status(), "");

    // Its folder was gone: what is watched from then on is the new one.
    fs::remove_dir_all(&site.dir).unwrap();
    let begun = begin(&site, &watch);
    assert_eq!((begun.commit, begun.repairs), (None, vec![Repair::Folder]));
    write(site.dir.join("a1/b1/1.md"), "once more\n");
    assert_eq!(end(&site, &watch).commit.unwrap().files.len(), 1);
    assert_eq!(site.status(), "");
}
