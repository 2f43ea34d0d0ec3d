//! Repositories that mean harm: as an origin that is cloned or fetched from, and as an agent without
//! any confinement could leave a user's. Nothing of theirs runs, nothing is written or read outside,
//! no edit is lost, and the git program agrees with what we say.

use std::{
    io::Write as _,
    os::unix::ffi::OsStrExt as _,
    process::Stdio,
    time::{Duration, Instant},
};

use super::*;

/// What the git program says to this input.
fn git_fed(dir: &Path, args: &[&str], input: &[u8]) -> String {
    #[expect(clippy::disallowed_methods, reason = "a test against the real program")]
    let mut child = Command::new("git")
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Writes objects that no git command would make by itself.
struct Forge<'a>(&'a Path);

impl Forge<'_> {
    fn blob(&self, content: &[u8]) -> String {
        git_fed(self.0, &["hash-object", "-w", "--stdin"], content)
    }

    fn tree(&self, entries: &[(&str, &[u8], &str)]) -> String {
        let mut raw = Vec::new();
        for (mode, name, id) in entries {
            raw.extend_from_slice(mode.as_bytes());
            raw.push(b' ');
            raw.extend_from_slice(name);
            raw.push(0);
            raw.extend(hex::decode(id).unwrap());
        }
        let args = ["hash-object", "-t", "tree", "-w", "--literally", "--stdin"];
        git_fed(self.0, &args, &raw)
    }

    /// A file by this name, in a folder by that one.
    fn file_at(&self, folder: &[u8], name: &[u8]) -> String {
        let inner = self.tree(&[("100644", name, &self.blob(b"planted\n"))]);
        self.tree(&[("40000", folder, &inner)])
    }

    /// Makes a commit of a tree, on top of `parent`.
    fn commit(&self, tree: &str, parent: &str) -> String {
        let args = ["commit-tree", "-p", parent, "-m", "harmless", tree];
        git(self.0, &args).trim().to_owned()
    }
}

/// Trees that may not become files, and what is said of them.
fn unfit(forge: &Forge<'_>) -> Vec<(String, &'static str)> {
    let names_kept = "git keeps for itself";
    let leads_out = "leads out of its folder";
    let empty = forge.tree(&[]);
    let blob = forge.blob(b"planted\n");
    let mut bomb = forge.tree(&[("100644", b"x", &blob)]);
    for _ in 0..8 {
        let ten: Vec<_> = (0..10).map(|n| format!("{n}")).collect();
        let ten: Vec<_> = ten
            .iter()
            .map(|name| ("40000", name.as_bytes(), bomb.as_str()))
            .collect();
        bomb = forge.tree(&ten);
    }
    let mut deep = empty.clone();
    for _ in 0..1_100 {
        deep = forge.tree(&[("40000", b"d", &deep)]);
    }
    let mut wide = forge.tree(&[("100644", b"x", &blob)]);
    for _ in 0..10 {
        wide = forge.tree(&[("40000", &[b'w'; 250], &wide)]);
    }
    let giant = forge.blob(&vec![0; (100 << 20) + 1]);
    let long_link = forge.blob(&[b'x'; 4_096]);
    let folder = forge.tree(&[("100644", b"evil", &blob)]);
    vec![
        (forge.file_at(b".git", b"config"), names_kept),
        (forge.file_at(b".GIT", b"config"), names_kept),
        (forge.file_at(b"git~1", b"config"), names_kept),
        (
            forge.file_at(".g\u{200c}it".as_bytes(), b"config"),
            names_kept,
        ),
        (forge.file_at(b".git ", b"config"), names_kept),
        (forge.file_at(b"sub", b".git"), names_kept),
        (forge.file_at(b"sub", b".git\\config"), names_kept),
        (forge.file_at(b"..", b"package.json"), leads_out),
        (forge.file_at(b"sub", b".."), leads_out),
        (forge.file_at(b".", b"x"), leads_out),
        (forge.file_at(b"/tmp", b"x"), leads_out),
        (forge.file_at(b"a/b", b"x"), leads_out),
        (forge.file_at(b"a", &[b'x'; 256]), "more than 255 bytes"),
        (deep, "90 folders"),
        (wide, "more than 2048 bytes"),
        (bomb, "more than 500000 files"),
        (
            forge.tree(&[("100644", b"film.mp4", &giant)]),
            "film.mp4\" is larger than 100 MB",
        ),
        // A symlink and a folder of one name: what is in the one would be written through the other.
        (
            forge.tree(&[
                ("120000", b"a", &forge.blob(b"/tmp")),
                ("40000", b"a", &folder),
            ]),
            "is broken",
        ),
        (forge.tree(&[("120000", b"a", &long_link)]), "no disk takes"),
        (
            forge.tree(&[("120000", b"a", &forge.blob(b""))]),
            "no disk takes",
        ),
        (
            forge.tree(&[("120000", b"a", &forge.blob(b"a\0b"))]),
            "no disk takes",
        ),
        (forge.tree(&[("100644", b"a", &empty)]), "is broken"),
        (
            forge.tree(&[("120000", b".gitattributes", &forge.blob(b"/etc/passwd"))]),
            "is no regular file",
        ),
        (
            forge.tree(&[(
                "100644",
                b".gitignore",
                &forge.blob(&vec![b'#'; (1 << 20) + 1]),
            )]),
            "is larger than 1 MB",
        ),
        (
            forge.tree(&[("100644", b"a\n\x1b[31mb/../", &blob)]),
            leads_out,
        ),
    ]
}

/// As the supervisor syncs, as far as the user's branch.
fn sync(place: &Place, site: &Site) -> Result<()> {
    let repository = UserRepository::open(&place.home("alice").join("project")).unwrap();
    let (key, who, fence) = (key("acme", "alice", "main"), greenroom(), Fence::open());
    let (source, remotes) = (place.source(), Remotes::default());
    let mover = Mover {
        key: &key,
        committer: &who,
        held_dir: &place.home("alice").join(".greenroom/held/outside"),
        fence: &fence,
    };
    let origin = Origin {
        source: &source,
        remotes: &remotes,
        base_branch: None,
        folder: &place.home("alice").join(".greenroom/uplink"),
        deadline: Instant::now() + Duration::from_secs(60),
    };
    let base = site.worktree.committed()?;
    repository
        .sync(&mover, Some(&origin), &site.worktree, &base)
        .map(drop)
}

/// The repository of `alice` and her thread are as they should be.
fn is_sound(place: &Place, site: &Site) {
    let project = place.home("alice").join("project");
    for folder in [&project, &site.dir] {
        assert_eq!(git(folder, &["status", "--porcelain"]), "");
        git(folder, &["fsck", "--strict", "--no-dangling"]);
    }
    write(site.dir.join("next.txt"), "next\n");
    site.commit_cleanly();
}

#[test]
fn a_tree_that_may_not_become_files_is_refused_in_a_clone_and_in_a_fetch() {
    let place = Place::new();
    let origin = place.origin();
    let (before, site) = place.thread("alice", "main");
    let trees = unfit(&Forge(&origin));
    for (number, (tree, says)) in trees.iter().enumerate() {
        let forge = Forge(&origin);
        // Nested, too.
        let tree = match number % 2 {
            0 => tree.clone(),
            _ => forge.tree(&[("40000", b"public", tree)]),
        };
        let commit = forge.commit(&tree, &before.head);
        git(&origin, &["update-ref", "refs/heads/trunk", &commit]);
        let is_refused = |error: RepositoryError, during: RemoteUse| match error {
            RepositoryError::Remote(error) => {
                assert_eq!(
                    (error.during, error.kind),
                    (during, RemoteErrorKind::Rejected)
                );
                assert!(error.message.contains(says), "{says}: {}", error.message);
                assert!(!error.message.contains('\x1b'), "{:?}", error.message);
            }
            error => panic!("{says}: {error:?}"),
        };
        let error = place.create_from("bob", &place.source(), None).unwrap_err();
        is_refused(error, RemoteUse::Clone);
        assert!(!place.home("bob").join("project").exists());
        assert!(!place.home("bob").join(".greenroom/scratch").exists());

        is_refused(sync(&place, &site).unwrap_err(), RemoteUse::Fetch);
        assert_eq!(site.worktree.head().unwrap(), before.head);
        let project = place.home("alice").join("project");
        assert!(
            try_git(&project, &["cat-file", "-e", &commit]).is_err(),
            "not even kept"
        );
    }
    git(&origin, &["update-ref", "refs/heads/trunk", &before.head]);
    sync(&place, &site).unwrap();
    is_sound(&place, &site);
    for entry in fs::read_dir(place.root.path()).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            name == "origin" || name == "workspace",
            "{name:?} was written outside"
        );
    }
}

#[test]
fn a_tree_that_an_agent_forged_is_not_taken_over() {
    for strangers in [Strangers::Keep, Strangers::Fold] {
        let place = Place::new();
        let (before, site) = place.thread("alice", "main");
        write(site.dir.join("edit.txt"), "an edit\n");
        // Somebody else's file, with a content that is known.
        write(place.home("alice").join("threads/victim.txt"), "planted\n");
        let forge = Forge(&site.dir);
        let tree = forge.tree(&[
            (
                "40000",
                b"..",
                &forge.tree(&[("100644", b"victim.txt", &forge.blob(b"planted\n"))]),
            ),
            (
                "40000",
                b".git",
                &forge.tree(&[("100644", b"config", &forge.blob(b"x"))]),
            ),
        ]);
        let forged = forge.commit(&tree, &before.head);
        let branch = "refs/heads/thread/acme/alice/main";
        git(&site.dir, &["update-ref", branch, &forged]);
        let committed = site.try_commit("A turn", strangers).unwrap();
        assert!(!committed.repairs.is_empty());
        let files = committed.commit.unwrap().files;
        assert_eq!(files.len(), 1, "{files:?}");
        assert_eq!(git(&site.dir, &["rev-parse", "HEAD~1"]).trim(), before.head);
        let victim = place.home("alice").join("threads/victim.txt");
        assert_eq!(fs::read(victim).unwrap(), b"planted\n");
        // What it made is kept, as whatever falls off a branch is.
        assert!(git(&site.dir, &["for-each-ref", "--contains", &forged]).contains("rescued"));
    }
}

/// The last line of defence: a state like that is neither gone to nor left.
#[test]
fn a_state_with_paths_that_lead_out_is_never_applied() {
    let place = Place::new();
    let (before, site) = place.thread("alice", "main");
    let victim = place.home("alice").join("threads/victim.txt");
    write(&victim, "planted\n");
    let forge = Forge(&site.dir);
    let inner = forge.tree(&[("100644", b"victim.txt", &forge.blob(b"planted\n"))]);
    let tree = forge.tree(&[("40000", b"..", &inner)]);
    let forged = forge.commit(&tree, &before.head);
    let branch = "refs/heads/thread/acme/alice/main";
    git(&site.dir, &["update-ref", branch, &forged]);
    let base = site.worktree.committed().unwrap();
    let refused = site.worktree.draft_without(&base, &forged).unwrap_err();
    assert!(
        matches!(refused, RepositoryError::Tampered { .. }),
        "{refused:?}"
    );
    assert_eq!(fs::read(&victim).unwrap(), b"planted\n");
}

#[test]
fn odd_names_and_links_of_an_origin_are_files_like_others() {
    let place = Place::new();
    let origin = place.origin();
    let long = "l".repeat(255);
    let deep = format!("{}/x", vec!["d"; 80].join("/"));
    for name in [
        "new\nline",
        "tab\there",
        "bell\x07",
        "\u{202e}cod.exe",
        "a\\b",
        "-x",
        "--help",
        " ",
        "é",
        "e\u{301}",
        "con",
        "a:b",
        "...",
        "*",
        "\"quoted\"",
        &long,
        &deep,
    ] {
        write(origin.join(name), name);
    }
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe\x80");
    write(origin.join(odd), "odd");
    for (name, target) in [
        ("passwd", "/etc/passwd"),
        ("up", "../../.."),
        ("loop", "loop"),
        ("none", "nowhere"),
    ] {
        symlink(target, origin.join(name)).unwrap();
    }
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "odd"]);
    let (_, site) = place.thread("alice", "main");
    assert_eq!(site.status(), "");
    let listed = |dir: &Path| git(dir, &["ls-files", "-z", "-s"]);
    assert_eq!(listed(&site.dir), listed(&origin));
    assert_eq!(
        fs::read_link(site.dir.join("passwd")).unwrap(),
        Path::new("/etc/passwd")
    );
    for name in ["new\nline", "bell\x07", &long, &deep] {
        write(site.dir.join(name), "edited");
    }
    write(site.dir.join(odd), "edited");
    let turn = site.commit_cleanly();
    assert_eq!(turn.len(), 5, "{turn:?}");

    // And back again.
    let head = site.worktree.head().unwrap();
    let base = site.worktree.committed().unwrap();
    let draft = site.worktree.draft_without(&base, &head).unwrap();
    let undo = site.write(&draft);
    site.worktree.apply(&undo, &Fence::open()).unwrap();
    assert_eq!(
        fs::read_to_string(site.dir.join("new\nline")).unwrap(),
        "new\nline"
    );
    assert_eq!(fs::read(site.dir.join(odd)).unwrap(), b"odd");
    is_sound(&place, &site);
}

#[test]
fn odd_names_of_an_agent_are_committed_or_reported() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let long = "l".repeat(255);
    for name in ["new\nline", "bell\x07", "-x", "a\\b", "sub/dir/*", &long] {
        write(site.dir.join(name), "x");
    }
    assert_eq!(site.commit_cleanly().len(), 6);

    for name in [
        ".GIT/config",
        "git~1/config",
        "sub/.Git",
        "x/.g\u{200c}it",
        "sub\\.git",
    ] {
        write(site.dir.join(name), "kept");
    }
    write(site.dir.join("fine.txt"), "fine");
    let committed = site.commit("Odd names");
    assert_eq!(committed.commit.unwrap().files.len(), 1);
    let mut held: Vec<_> = committed
        .held_back
        .iter()
        .map(|held| held.path.as_str())
        .collect();
    held.sort_unstable();
    assert_eq!(
        held,
        [
            ".GIT/config",
            "git~1/config",
            "sub/.Git",
            "sub\\.git",
            "x/.g\u{200c}it"
        ]
    );
    assert_eq!(fs::read(site.dir.join(".GIT/config")).unwrap(), b"kept");
    git(&site.dir, &["fsck", "--strict"]);
}

/// A path that is longer than any call to the system takes, made folder by folder.
#[test]
fn a_path_without_end_stops_nothing() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let name = "d".repeat(200);
    let mut at: std::os::fd::OwnedFd = fs::File::open(&site.dir).unwrap().into();
    use nix::{
        fcntl::{OFlag, openat},
        sys::stat::{Mode, mkdirat},
    };
    for _ in 0..40 {
        mkdirat(&at, name.as_str(), Mode::S_IRWXU).unwrap();
        at = openat(&at, name.as_str(), OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    }
    let file = openat(
        &at,
        "end.txt",
        OFlag::O_CREAT | OFlag::O_WRONLY,
        Mode::S_IRWXU,
    )
    .unwrap();
    fs::File::from(file).write_all(b"far down").unwrap();
    write(site.dir.join("fine.txt"), "fine");
    let committed = site.commit("Deep");
    let files = committed.commit.unwrap().files;
    assert_eq!(
        files
            .iter()
            .map(|file| file.path.as_str())
            .collect::<Vec<_>>(),
        ["fine.txt"]
    );
    assert_eq!(
        committed.held_back.len(),
        1,
        "{:?}",
        committed.held_back.len()
    );
}

#[test]
fn repositories_inside_are_files_like_others() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let dir = &site.dir;
    // Where files of the site are already.
    git(&dir.join("src"), &["init", "-q"]);
    git(&dir.join("src"), &["add", "-A"]);
    git(&dir.join("src"), &["commit", "-qm", "inner"]);
    write(dir.join("src/pages/index.astro"), "edited\n");
    write(dir.join("src/pages/new.astro"), "new\n");
    // A bare one; one whose `.git` leads to another; an empty `.git`; one in one.
    git(dir, &["init", "-q", "--bare", "bare.git"]);
    write(
        dir.join("linked/.git"),
        format!("gitdir: {}/.git\n", place.origin().display()),
    );
    write(dir.join("linked/a.txt"), "a");
    fs::create_dir_all(dir.join("hollow/.git")).unwrap();
    write(dir.join("hollow/b.txt"), "b");
    git(&dir.join("hollow"), &["init", "-q", "inner"]);
    write(dir.join("hollow/inner/c.txt"), "c");
    let committed = site.commit("Nested");
    assert_eq!(committed.held_back, []);
    let files: Vec<_> = committed
        .commit
        .unwrap()
        .files
        .into_iter()
        .map(|file| file.path)
        .collect();
    for name in [
        "src/pages/index.astro",
        "src/pages/new.astro",
        "bare.git/HEAD",
        "linked/a.txt",
        "hollow/b.txt",
        "hollow/inner/c.txt",
    ] {
        assert!(files.iter().any(|file| file == name), "{name}: {files:?}");
        let spec = format!("HEAD:{name}");
        assert_eq!(
            git(dir, &["cat-file", "blob", &spec]).as_bytes(),
            fs::read(dir.join(name)).unwrap()
        );
    }
    assert!(
        !files.iter().any(|file| file.contains("/.git/")),
        "{files:?}"
    );
    assert!(!git(dir, &["ls-files", "-s"]).contains("160000"));
    git(dir, &["fsck", "--strict"]);
}

#[test]
fn submodules_stay_off_and_edits_in_their_place_are_kept() {
    let place = Place::new();
    let origin = place.origin();
    let head = git(&origin, &["rev-parse", "HEAD"]).trim().to_owned();
    write(
        origin.join(".gitmodules"),
        "[submodule \"x\"]\n\tpath = sub\n\turl = ext::sh -c 'touch ran'\n",
    );
    git(&origin, &["add", ".gitmodules"]);
    let link = format!("160000,{head},sub");
    git(&origin, &["update-index", "--add", "--cacheinfo", &link]);
    let other = format!("160000,{head},other");
    git(&origin, &["update-index", "--add", "--cacheinfo", &other]);
    git(&origin, &["commit", "-qm", "submodules"]);
    let (_, site) = place.thread("alice", "main");
    assert_eq!(site.status(), "");
    write(site.dir.join("sub/page.md"), "an edit\n");
    write(site.dir.join("fine.txt"), "fine\n");
    let committed = site.commit("Edit");
    let files = committed.commit.unwrap().files;
    assert_eq!(
        files
            .iter()
            .map(|file| file.path.as_str())
            .collect::<Vec<_>>(),
        ["fine.txt"]
    );
    let held: Vec<_> = committed
        .held_back
        .iter()
        .map(|held| held.path.as_str())
        .collect();
    assert!(held.iter().any(|path| path.starts_with("sub")), "{held:?}");
    assert_eq!(
        fs::read(site.dir.join("sub/page.md")).unwrap(),
        b"an edit\n"
    );
    assert!(git(&site.dir, &["ls-tree", "HEAD", "sub"]).starts_with("160000"));
    assert!(git(&site.dir, &["ls-tree", "HEAD", "other"]).starts_with("160000"));
    assert_eq!(site.status(), "");
    for folder in [&site.dir, &place.home("alice").join("project")] {
        assert!(!folder.join("ran").exists() && !folder.join("sub/ran").exists());
    }
}

/// Rules of the worktree are read whenever it is looked at.
#[test]
fn rules_that_are_no_plain_files_are_refused_and_wait_for_nobody() {
    type Plant = fn(&Path);
    let plants: [(Plant, &str); 4] = [
        (
            |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            "is no regular file",
        ),
        (
            |path| symlink("/etc/passwd", path).unwrap(),
            "is no regular file",
        ),
        (
            |path| symlink("/dev/zero", path).unwrap(),
            "is no regular file",
        ),
        (
            |path| fs::File::create(path).unwrap().set_len(1 << 40).unwrap(),
            "is larger than 1 MB",
        ),
    ];
    for (plant, says) in plants {
        for name in [
            ".gitignore",
            ".gitattributes",
            "src/.gitignore",
            "new/er/.gitattributes",
            "src/new/.gitignore",
        ] {
            let place = Place::new();
            let (_, site) = place.thread("alice", "main");
            let path = site.dir.join(name);
            write(path.with_file_name("a.txt"), "an edit\n");
            fs::remove_file(&path).ok();
            plant(&path);
            let refused = site.try_commit("A turn", Strangers::Fold).unwrap_err();
            let is_told = matches!(&refused, RepositoryError::Tampered { what }
                if what.contains(name) && what.contains(says));
            assert!(is_told, "{name}: {refused:?}");
            fs::remove_file(&path).unwrap();
            let files = site.commit("Again").commit.unwrap().files;
            assert!(files.iter().any(|file| file.path.ends_with("a.txt")));
        }
    }
    // A folder of that name is one like others.
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("src/.gitignore/a.txt"), "a");
    assert_eq!(site.commit_cleanly().len(), 1);
}

/// Everything that git lets a repository name as a program to be run.
#[test]
fn no_program_that_a_repository_names_is_run() {
    let place = Place::new();
    let ran = place.root.path().join("ran");
    let origin = place.origin();
    write(
        origin.join(".gitattributes"),
        "* filter=evil diff=evil merge=evil\n*.lfs filter=lfs diff=lfs merge=lfs -text\n",
    );
    write(
        origin.join("a.lfs"),
        "version https://git-lfs.github.com/spec/v1\n",
    );
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "attributes"]);
    let touch = format!("touch {}", ran.display());
    let settings = [
        "core.fsmonitor",
        "core.editor",
        "core.pager",
        "core.sshCommand",
        "core.askPass",
        "core.gitProxy",
        "core.alternateRefsCommand",
        "filter.evil.clean",
        "filter.evil.smudge",
        "filter.evil.process",
        "filter.lfs.process",
        "diff.evil.command",
        "diff.evil.textconv",
        "diff.external",
        "merge.evil.driver",
        "gpg.program",
        "gpg.ssh.program",
        "credential.helper",
        "uploadpack.packObjectsHook",
        "sequence.editor",
        "trailer.x.command",
        "remote.origin.uploadpack",
        "remote.origin.receivepack",
    ];
    let plant = |git_dir: &Path| {
        for name in settings {
            git(
                git_dir,
                &[
                    "config",
                    "--file",
                    git_dir.join("config").to_str().unwrap(),
                    name,
                    &touch,
                ],
            );
        }
        for flag in [
            "commit.gpgSign",
            "tag.gpgSign",
            "filter.evil.required",
            "filter.lfs.required",
        ] {
            git(
                git_dir,
                &[
                    "config",
                    "--file",
                    git_dir.join("config").to_str().unwrap(),
                    flag,
                    "true",
                ],
            );
        }
        for hook in [
            "pre-commit",
            "post-commit",
            "post-checkout",
            "post-merge",
            "reference-transaction",
            "pre-push",
            "post-index-change",
            "update",
            "pre-receive",
            "post-receive",
            "post-update",
            "push-to-checkout",
            "fsmonitor-watchman",
            "proc-receive",
        ] {
            let hook = git_dir.join("hooks").join(hook);
            write(&hook, format!("#!/bin/sh\n{touch}\n"));
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        }
    };
    plant(&origin.join(".git"));
    let (_, site) = place.thread("alice", "main");
    let git_dir = place.home("alice").join("project/.git");
    for number in 0..3 {
        plant(&git_dir);
        write(
            site.dir.join("src/pages/about.astro"),
            format!("about {number}\n"),
        );
        write(site.dir.join("b.lfs"), format!("{number}\n"));
        site.commit("Edit");
    }
    plant(&git_dir);
    let head = site.worktree.head().unwrap();
    site.worktree.diff("user/acme/alice", None, None).unwrap();
    let base = site.worktree.committed().unwrap();
    let draft = site.worktree.draft_without(&base, &head).unwrap();
    let undo = site.write(&draft);
    plant(&git_dir);
    site.worktree.apply(&undo, &Fence::open()).unwrap();
    plant(&git_dir);
    sync(&place, &site).unwrap();
    site.worktree
        .export(&place.root.path().join("copy"))
        .unwrap();
    assert!(!ran.exists(), "something ran");
    // Nor by the git program, of the hooks that are still there.
    git(
        &site.dir,
        &["commit", "-q", "--allow-empty", "-m", "a person's"],
    );
    assert!(!ran.exists(), "a hook ran");
    assert_eq!(fs::read_to_string(site.dir.join("b.lfs")).unwrap(), "1\n");
    is_sound(&place, &site);
}

#[test]
fn what_bends_history_or_contents_is_set_aside() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("a.txt"), "one\r\n");
    site.commit_cleanly();
    let ours = site.worktree.head().unwrap();
    let git_dir = place.home("alice").join("project/.git");
    write(
        git_dir.join("info/attributes"),
        "* text eol=crlf ident working-tree-encoding=UTF-16\n",
    );
    write(git_dir.join("info/grafts"), format!("{ours}\n"));
    write(git_dir.join("shallow"), format!("{ours}\n"));
    write(git_dir.join("info/sparse-checkout"), "/nothing\n");
    write(git_dir.join("info/exclude"), "*\n");
    git(&site.dir, &["config", "core.sparseCheckout", "true"]);
    git(&site.dir, &["config", "core.excludesFile", "/dev/stdin"]);
    // Another commit in the place of ours.
    let island = Forge(&site.dir).tree(&[]);
    let island = git(&site.dir, &["commit-tree", "-m", "island", &island]);
    write(git_dir.join("refs/replace").join(&ours), island.as_bytes());

    write(site.dir.join("b.txt"), "$Id$\r\n");
    assert_eq!(site.commit_cleanly(), [("b.txt".into(), FileStatus::Added)]);
    assert_eq!(
        git(&site.dir, &["cat-file", "blob", "HEAD:b.txt"]),
        "$Id$\r\n"
    );
    assert_eq!(site.worktree.log(10).unwrap().len(), 3);
    assert_eq!(git(&site.dir, &["rev-list", "--count", "HEAD"]), "3\n");
    assert!(git(&site.dir, &["ls-tree", "--name-only", &ours]).contains("a.txt"));
    // Nothing of it is thrown away.
    let kept: Vec<_> = fs::read_dir(git_dir.join("info"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        kept.iter()
            .any(|name| name.as_bytes().starts_with(b"grafts.")),
        "{kept:?}"
    );
    is_sound(&place, &site);
}

#[test]
fn a_branch_that_leads_to_another_is_made_one_of_its_own() {
    for strangers in [Strangers::Keep, Strangers::Fold] {
        let place = Place::new();
        let (before, site) = place.thread("alice", "main");
        for edit in ["one", "two"] {
            git(
                &site.dir,
                &[
                    "symbolic-ref",
                    "refs/heads/thread/acme/alice/main",
                    "refs/heads/client/acme",
                ],
            );
            write(site.dir.join("edit.txt"), edit);
            site.try_commit("A turn", strangers).unwrap();
        }
        assert_eq!(
            git(&site.dir, &["rev-parse", "client/acme"]).trim(),
            before.head
        );
        assert_eq!(git(&site.dir, &["rev-list", "--count", "HEAD"]), "3\n");
        is_sound(&place, &site);
    }
}

/// Links and pipes in the git directory, each in the place of something.
#[test]
fn links_and_pipes_in_the_git_directory_are_refused() {
    for name in [
        "HEAD",
        "config",
        "index",
        "packed-refs",
        "info",
        "info/exclude",
        "objects",
        "objects/info",
        "objects/pack",
        "objects/pack/pack-1.pack",
        "objects/ab",
        "refs",
        "refs/heads",
        "refs/heads/client",
        "refs/heads/other",
        "refs/remotes/origin/x",
        "refs/heads/thread/acme/alice/main",
        "refs/greenroom/heads",
        "logs",
        "logs/refs/heads",
        "logs/refs/heads/thread/acme/alice/main",
        "worktrees",
        "worktrees/main",
        "worktrees/main/HEAD",
        "worktrees/main/index",
        "worktrees/main/commondir",
        "worktrees/main/logs/HEAD",
    ] {
        for is_pipe in [false, true] {
            let place = Place::new();
            let (_, site) = place.thread("alice", "main");
            let git_dir = place.home("alice").join("project/.git");
            let victim = place.root.path().join("victim");
            fs::create_dir(&victim).unwrap();
            let path = git_dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            // What was there is where the link leads, so that all would go well.
            let there = victim.join("there");
            if path.exists() {
                fs::rename(&path, &there).unwrap();
            }
            if is_pipe {
                nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            } else {
                symlink(&there, &path).unwrap();
            }
            let listed = || -> Vec<_> {
                fs::read_dir(&victim)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name())
                    .collect()
            };
            let before = listed();
            write(site.dir.join("a.txt"), "a");
            let refused = site.try_commit("A turn", Strangers::Keep).unwrap_err();
            assert!(
                matches!(&refused, RepositoryError::Tampered { what } if what.contains(" is ")),
                "{name}: {refused:?}"
            );
            assert_eq!(listed(), before, "{name}");
            assert_eq!(fs::read(site.dir.join("a.txt")).unwrap(), b"a");
        }
    }
}

#[test]
fn links_that_leave_the_tree_are_followed_nowhere() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    let dir = &site.dir;
    let victim = place.root.path().join("victim");
    write(victim.join("a.txt"), "victim's\n");
    write(victim.join("secret.pem"), "victim's\n");
    write(dir.join("folder/a.txt"), "one\n");
    site.commit_cleanly();
    write(dir.join("folder/a.txt"), "two\n");
    site.commit_cleanly();
    let turn = site.worktree.head().unwrap();

    // Links with names that are held back, and a file that is held back behind one.
    symlink(victim.join("secret.pem"), dir.join("key.pem")).unwrap();
    symlink(&victim, dir.join("out")).unwrap();
    symlink("/proc/self/environ", dir.join("environ")).unwrap();
    let committed = site.commit("Links");
    let held: Vec<_> = committed
        .held_back
        .iter()
        .map(|held| held.path.as_str())
        .collect();
    assert_eq!(held, ["key.pem"]);
    assert!(
        !place
            .home("alice")
            .join(".greenroom/held/1/key.pem")
            .exists()
    );
    let text = site
        .worktree
        .diff("user/acme/alice", None, None)
        .unwrap()
        .diff
        .text;
    assert!(
        !text.contains("victim's") && !text.contains("PATH="),
        "{text}"
    );

    // The folder of a file that is to change is a link by now.
    fs::rename(dir.join("folder"), dir.join("moved")).unwrap();
    fs::write(victim.join("a.txt"), "two\n").unwrap();
    symlink(&victim, dir.join("folder")).unwrap();
    let base = site.worktree.committed().unwrap();
    let refused = site.worktree.draft_without(&base, &turn).unwrap_err();
    assert!(
        matches!(refused, RepositoryError::Conflict { .. }),
        "{refused:?}"
    );
    // Not even if it became one a moment ago.
    fs::remove_file(dir.join("folder")).unwrap();
    fs::rename(dir.join("moved"), dir.join("folder")).unwrap();
    let base = site.worktree.committed().unwrap();
    let draft = site.worktree.draft_without(&base, &turn).unwrap();
    let undo = site.write(&draft);
    fs::rename(dir.join("folder"), dir.join("moved")).unwrap();
    symlink(&victim, dir.join("folder")).unwrap();
    site.worktree.apply(&undo, &Fence::open()).unwrap();
    assert_eq!(fs::read(victim.join("a.txt")).unwrap(), b"two\n");
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 2);
    site.commit("What came of it");
    assert!(git(dir, &["ls-tree", "HEAD", "folder"]).starts_with("120000"));
    git(dir, &["fsck", "--strict"]);
}

#[test]
fn an_origin_with_settings_of_its_own_gives_its_commits_and_no_more() {
    let place = Place::new();
    let origin = place.origin();
    let first = git(&origin, &["rev-parse", "HEAD"]);
    let victim = place.root.path().join("victim");
    write(victim.join("theirs.txt"), "theirs");
    git(
        &origin,
        &["config", "core.worktree", victim.to_str().unwrap()],
    );
    git(
        &origin,
        &[
            "config",
            &format!("url.{}.insteadOf", victim.display()),
            "/",
        ],
    );
    write(origin.join(".git/info/attributes"), "* text eol=crlf\n");
    write(origin.join(".git/info/grafts"), &first);
    let island = Forge(&origin).tree(&[]);
    let island = git(&origin, &["commit-tree", "-m", "island", &island]);
    write(origin.join(".git/refs/replace").join(first.trim()), &island);
    // Its objects are another's.
    let lender = place.root.path().join("lender");
    fs::rename(origin.join(".git/objects"), &lender).unwrap();
    fs::create_dir_all(origin.join(".git/objects/info")).unwrap();
    write(
        origin.join(".git/objects/info/alternates"),
        lender.to_str().unwrap(),
    );
    let (state, site) = place.thread("alice", "main");
    assert_eq!(state.head, first.trim());
    assert!(site.dir.join("package.json").exists() && !site.dir.join("theirs.txt").exists());
    fs::remove_dir_all(&lender).unwrap();
    is_sound(&place, &site);

    // A reference that is a link to somewhere.
    let place = Place::new();
    let branch = place.origin().join(".git/refs/heads/linked");
    symlink("/etc/passwd", &branch).unwrap();
    nix::unistd::mkfifo(&branch.with_file_name("tag"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::remove_file(branch.with_file_name("tag")).unwrap();
    let (_, site) = place.thread("alice", "main");
    let known = git(&site.dir, &["for-each-ref", "--format=%(refname)"]);
    assert!(!known.contains("linked"), "{known}");
    is_sound(&place, &site);
}

#[test]
fn an_origin_without_all_of_its_history_is_refused() {
    let place = Place::new();
    let origin = place.origin();
    write(origin.join("b.txt"), "b");
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "second"]);
    let shallow = place.root.path().join("shallow");
    let url = format!("file://{}", origin.display());
    git(
        place.root.path(),
        &["clone", "-q", "--depth=1", &url, shallow.to_str().unwrap()],
    );
    let source = parse_source(shallow.to_str().unwrap(), Some(place.root.path())).unwrap();
    let error = place.create_from("alice", &source, None).unwrap_err();
    assert!(
        error.to_string().contains("history is cut off"),
        "{error:?}"
    );
    assert!(!place.home("alice").join("project").exists());
}

#[test]
fn repositories_of_another_owner_are_used() {
    // Only root may give files away.
    if !nix::unistd::Uid::effective().is_root() {
        return;
    }
    let place = Place::new();
    let give = |folder: &Path| {
        let mut folders = vec![folder.to_owned()];
        while let Some(path) = folders.pop() {
            std::os::unix::fs::lchown(&path, Some(4_321), Some(4_321)).unwrap();
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                folders.extend(
                    fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
            }
        }
    };
    give(&place.origin());
    let (_, site) = place.thread("alice", "main");
    give(&place.home("alice"));
    write(site.dir.join("a.txt"), "a");
    let committed = site.commit("Edit");
    assert_eq!(committed.commit.unwrap().files.len(), 1);
    sync(&place, &site).unwrap();
    // The git program wants to be told that it may.
    assert!(try_git(&site.dir, &["status"]).is_err(), "it is another's");
    #[expect(clippy::disallowed_methods, reason = "a test against the real program")]
    let status = Command::new("git")
        .args(["status", "--porcelain"])
        .current_dir(&site.dir)
        .envs([
            ("GIT_CONFIG_COUNT", "1"),
            ("GIT_CONFIG_KEY_0", "safe.directory"),
            ("GIT_CONFIG_VALUE_0", "*"),
        ])
        .output()
        .unwrap();
    assert_eq!((status.status.success(), status.stdout), (true, Vec::new()));
}
