//! What lies on disk after a checkout is what the git program would have put there.

use std::os::unix::fs::MetadataExt as _;

use super::*;

/// Everything below a folder but `.git`: path, kind and content.
fn listing(folder: &Path) -> Vec<(PathBuf, String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().to_owned();
            let about = fs::symlink_metadata(&path).unwrap();
            if name == Path::new(".git") {
                continue;
            }
            if about.is_dir() {
                folders.push(path);
                found.push((name, "folder".into(), Vec::new()));
            } else if about.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.push((name, "link".into(), target.to_str().unwrap().into()));
            } else {
                let mode = format!("{:o}", about.permissions().mode());
                found.push((name, mode, fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn it_is_what_git_would_have_checked_out() {
    let place = Place::new();
    let origin = place.origin();
    for number in 0..700 {
        let folder = format!("pages{}/deep/{}", number % 7, number % 3);
        write(
            origin.join(folder).join(format!("{number}.md")),
            format!("{number}\n"),
        );
    }
    // A file that sorts before the folder whose name it begins with.
    write(origin.join("src/pages.config.ts"), "export {}\n");
    write(origin.join("src/pages-old/x"), "x\n");
    write(origin.join("empty"), "");
    write(origin.join("run.sh"), "#!/bin/sh\n");
    fs::set_permissions(origin.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("src/pages", origin.join("pages")).unwrap();
    symlink("/etc/hostname", origin.join("pages1/out")).unwrap();
    let bytes: Vec<u8> = (0..6 << 20).map(|n: u32| (n % 251) as u8).collect();
    write(origin.join("public/film.bin"), bytes);
    write(
        origin.join(".gitattributes"),
        "* text=auto\n*.bat eol=crlf\n*.sh eol=lf\n",
    );
    write(origin.join("make.bat"), "one\r\ntwo\r\n");
    write(origin.join("inner/.gitattributes"), "*.md ident\n");
    write(origin.join("inner/made.md"), "$Id$\n");
    write(origin.join("inner/other.txt"), "$Id$\n");
    git(&origin, &["add", "-A"]);
    let head = git(&origin, &["rev-parse", "HEAD"]);
    let gitlink = format!("160000,{},module", head.trim());
    git(&origin, &["update-index", "--add", "--cacheinfo", &gitlink]);
    git(&origin, &["commit", "-qm", "all kinds"]);
    let by_git = place.root.path().join("by-git");
    let by_git_text = by_git.to_str().unwrap();
    git(
        &origin,
        &["worktree", "add", "-q", "-b", "hand", by_git_text],
    );

    let (_, site) = place.thread("alice", "main");
    let expected = listing(&by_git);
    assert!(listing(&site.dir) == expected, "the thread's worktree");
    let project = place.home("alice").join("project");
    assert!(listing(&project) == expected, "the user's");
    assert_eq!(site.status(), "");
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    // Nothing was edited, so there is nothing to commit, also for our own scan.
    let committed = site.commit("Nothing");
    assert_eq!((committed.commit, committed.held_back), (None, vec![]));

    let copy = place.root.path().join("copy");
    site.worktree.export(&copy).unwrap();
    assert!(listing(&copy) == expected, "a copy");
}

#[test]
fn an_edit_right_after_the_checkout_is_found() {
    for round in 0..20 {
        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        // The same size, in the same tick of the clock.
        let edit = format!("{round:<5}\n");
        fs::write(site.dir.join("src/pages/about.astro"), edit).unwrap();
        assert_eq!(site.commit_cleanly().len(), 1);
    }
}

/// A user's threads, and what is kept ready for the next one.
struct Kept {
    place: Place,
    repository: UserRepository,
    threads: u32,
}

impl Kept {
    fn new() -> Self {
        let place = Place::new();
        for number in 0..150 {
            write(
                place.origin().join(format!("many/{number}.md")),
                format!("{number}\n"),
            );
        }
        git(&place.origin(), &["add", "-A"]);
        git(&place.origin(), &["commit", "-qm", "many"]);
        let repository = place.create("alice");
        Self {
            place,
            repository,
            threads: 0,
        }
    }

    fn project(&self) -> PathBuf {
        self.place.home("alice").join("project")
    }

    fn spare(&self) -> PathBuf {
        self.project().join(".git/spare")
    }

    fn keep(&self) {
        let key = key("acme", "alice", "any");
        self.repository.keep_spare(&key.user_key()).unwrap();
    }

    /// The user's branch goes on.
    fn go_on(&self, edit: impl FnOnce(&Path)) {
        edit(&self.project());
        git(&self.project(), &["add", "-A"]);
        git(&self.project(), &["commit", "-qm", "go on"]);
    }

    /// A new thread, whose files are the branch's and whose index says so; its site, and an inode of
    /// a file that never changes.
    fn thread(&mut self) -> (Site, u64) {
        self.threads += 1;
        let name = format!("t{}", self.threads);
        let by_git = self.place.root.path().join(format!("by-git-{name}"));
        let text = by_git.to_str().unwrap();
        git(
            &self.project(),
            &["worktree", "add", "-q", "--detach", text],
        );
        let (_, site) = self.place.thread("alice", &name);
        assert!(listing(&site.dir) == listing(&by_git), "{name}");
        assert_eq!(site.status(), "");
        let committed = site.commit("Nothing");
        assert_eq!((committed.commit, committed.held_back), (None, vec![]));
        let ino = fs::metadata(site.dir.join("many/149.md")).unwrap().ino();
        (site, ino)
    }
}

#[test]
fn a_new_thread_takes_what_was_kept_ready() {
    let mut kept = Kept::new();
    kept.keep();
    let ready = kept.spare().join("files");
    assert!(ready.join("src/pages/about.astro").exists());
    let ino = fs::metadata(ready.join("many/149.md")).unwrap().ino();
    // Made once.
    kept.keep();
    let (site, taken) = kept.thread();
    assert_eq!(taken, ino);
    assert!(!kept.spare().exists());
    // An edit of the same size is found, though its file was written long before.
    write(site.dir.join("many/7.md"), "8\n");
    assert_eq!(site.commit_cleanly().len(), 1);
    let (_, other) = kept.thread();
    assert_ne!(other, ino, "nothing was kept for this one");

    // What came to the branch meanwhile is in it.
    kept.keep();
    let ino = fs::metadata(ready.join("many/149.md")).unwrap().ino();
    kept.go_on(|project| {
        write(project.join("many/1.md"), "one\n");
        fs::remove_file(project.join("many/2.md")).unwrap();
        fs::remove_file(project.join("many/3.md")).unwrap();
        write(project.join("many/3.md/inner.md"), "three\n");
        write(project.join("new/deep/4.md"), "four\n");
        let run = fs::Permissions::from_mode(0o755);
        fs::set_permissions(project.join("many/5.md"), run).unwrap();
        fs::remove_file(project.join("many/6.md")).unwrap();
        symlink("../new", project.join("many/6.md")).unwrap();
    });
    let (_, taken) = kept.thread();
    assert_eq!(taken, ino);
    kept.keep();
    kept.go_on(|project| {
        fs::remove_dir_all(project.join("many/3.md")).unwrap();
        write(project.join("many/3.md"), "3\n");
        fs::remove_dir_all(project.join("new")).unwrap();
    });
    kept.thread();
    git(&kept.project(), &["fsck", "--strict"]);
}

#[test]
fn what_is_of_no_use_is_not_taken() {
    let mut kept = Kept::new();
    // Held open: else the number would be free again, and the new file might get it.
    let mut held = Vec::new();
    let mut ino = |kept: &Kept| {
        let file = fs::File::open(kept.spare().join("files/many/149.md")).unwrap();
        let ino = file.metadata().unwrap().ino();
        held.push(file);
        ino
    };
    kept.keep();
    let before = ino(&kept);
    kept.go_on(|project| {
        for number in 0..120 {
            write(project.join(format!("many/{number}.md")), "another\n");
        }
    });
    assert_ne!(kept.thread().1, before, "too different");

    kept.keep();
    let before = ino(&kept);
    kept.go_on(|project| write(project.join(".gitattributes"), "*.md eol=crlf\n"));
    assert_ne!(kept.thread().1, before, "all is written otherwise now");

    kept.keep();
    let before = ino(&kept);
    write(kept.spare().join("index"), "nothing of the kind");
    assert_ne!(kept.thread().1, before, "nothing is known of it");

    // What somebody put there instead leads nowhere.
    let outside = kept.place.root.path().join("outside");
    write(outside.join("files/mine"), "mine\n");
    kept.keep();
    fs::remove_dir_all(kept.spare().join("files")).unwrap();
    symlink(&outside, kept.spare().join("files")).unwrap();
    kept.thread();
    symlink(&outside, kept.spare()).unwrap();
    kept.thread();
    write(kept.spare(), "no folder");
    kept.thread();
    assert!(outside.join("files/mine").exists());

    // A process that was killed leaves its half behind: for a while.
    let half = kept.project().join(".git/spare-of-one-that-was-killed");
    write(half.join("files/a"), "a\n");
    kept.keep();
    assert!(half.exists(), "it may be at it still");
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 60 * 60);
    let opened = fs::File::open(&half).unwrap();
    opened.set_modified(long_ago).unwrap();
    fs::remove_dir_all(kept.spare()).unwrap();
    kept.keep();
    assert!(!half.exists());
    assert!(kept.spare().exists());
}

/// Trees that git itself would never write: nothing of them may land outside the worktree.
#[test]
fn a_commit_that_leads_out_of_the_worktree_is_refused() {
    let place = Place::new();
    let origin = place.origin();
    let outside = place.root.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    let object = |kind: &str, content: &[u8]| {
        let file = place.root.path().join("object");
        fs::write(&file, content).unwrap();
        let id = git(
            &origin,
            &[
                "hash-object",
                "-w",
                "--literally",
                "-t",
                kind,
                file.to_str().unwrap(),
            ],
        );
        hex::decode(id.trim()).unwrap()
    };
    let tree = |entries: &[(&str, &str, &[u8])]| {
        let mut content = Vec::new();
        for (mode, name, id) in entries {
            content.extend_from_slice(format!("{mode} {name}\0").as_bytes());
            content.extend_from_slice(id);
        }
        object("tree", &content)
    };
    let file = object("blob", b"mine\n");
    let link = object("blob", outside.to_str().unwrap().as_bytes());
    let folder = tree(&[("100644", "planted", &file)]);
    let trees = [
        (
            "a link and a folder",
            tree(&[("120000", "a", &link), ("40000", "a", &folder)]),
        ),
        ("..", tree(&[("40000", "..", &folder)])),
        (
            "a path as a name",
            tree(&[("100644", "../../planted", &file)]),
        ),
        (".git", tree(&[("40000", ".git", &folder)])),
        (".GIT", tree(&[("40000", ".GIT", &folder)])),
        ("an empty name", tree(&[("40000", "", &folder)])),
        (
            "twice the same",
            tree(&[("100644", "a", &file), ("100644", "a", &link)]),
        ),
    ];
    for (number, (what, id)) in trees.iter().enumerate() {
        let commit = git(&origin, &["commit-tree", "-m", what, &hex::encode(id)]);
        git(&origin, &["update-ref", "refs/heads/trunk", commit.trim()]);
        let user = format!("u{number}");
        let created = place.create_from(&user, &place.source(), None);
        assert!(created.is_err(), "{what}");
        assert!(fs::read_dir(&outside).unwrap().next().is_none(), "{what}");
        let home = place.home(&user);
        assert!(!home.join("project").exists(), "{what}");
        for folder in [home.clone(), home.parent().unwrap().to_owned()] {
            assert!(!folder.join("planted").exists(), "{what}");
        }
    }
}
