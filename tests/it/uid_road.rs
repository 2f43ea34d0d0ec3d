//! As on Fargate: a supervisor that is root with six capabilities, a kernel without Landlock, and a
//! user of the system for each thread. The escapes that both roads have to stop are in `hostile`.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use greenroom::owner::Owner;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    images::Stage,
    support::{
        Folders, Options, SITE, Sent, StandIn, TestGreenroom, Who, files_below, git, has_uid_road,
        processes_below, request, rule, runs, wait_for, who, writes,
    },
};

const PAGE: &str = "src/pages/index.astro";

fn options(folders: &Folders, api: &StandIn) -> Options {
    Options::new(folders).api(api).on_the_uid_road()
}

fn place(path: &Path) -> (u32, u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (
        found.uid(),
        found.gid(),
        found.permissions().mode() & 0o7777,
    )
}

/// What is in a worktree belongs to the thread, but for git's own link.
fn all_is_of(worktree: &Path, owner: Owner) {
    for file in files_below(worktree) {
        if !file.ends_with(".git") {
            assert_eq!(Owner::of(&file), Some(owner), "{}", file.display());
        }
    }
}

/// A script that the agent runs by Bash, and what it printed.
async fn told(greenroom: &TestGreenroom, folders: &Folders, thread: &Who, script: &str) -> String {
    let worktree = folders.worktree(thread);
    fs::write(worktree.join("try.sh"), script).unwrap();
    greenroom
        .execute(thread, "Run `bash try.sh > told.txt 2>&1`")
        .await
        .ok();
    fs::read_to_string(worktree.join("told.txt")).unwrap()
}

#[tokio::test]
async fn each_thread_is_a_user_with_nothing_but_its_own() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({})).await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    let alice = who("acme", "alice", "main");
    let others = [who("acme", "alice", "two"), who("acme", "bob", "main")];
    for thread in [&alice, &others[0], &others[1]] {
        greenroom.init(thread, json!({"repoUrl": site})).await.ok();
    }

    let owner = Owner::of(&folders.worktree(&alice)).expect("it was given away");
    let (uid, gid) = (owner.uid(), owner.gid());
    let script = "id -u; id -g; id -G; grep -E '^(Cap|NoNew)' /proc/self/status; umask; ulimit -u
        touch file; mkdir folder; stat -c %u:%g file folder";
    let said = told(&greenroom, &folders, &alice, script).await;
    let nothing = "0000000000000000";
    let expected = [
        format!("{uid}"),
        format!("{gid}"),
        format!("{gid}"),
        format!("CapInh:\t{nothing}"),
        format!("CapPrm:\t{nothing}"),
        format!("CapEff:\t{nothing}"),
    ];
    assert!(said.starts_with(&expected.join("\n")), "{said}");
    assert!(
        said.contains("CapAmb:\t0000000000000000\nNoNewPrivs:\t1\n0077\n1024\n"),
        "{said}"
    );
    assert!(
        said.ends_with(&format!("{uid}:{gid}\n{uid}:{gid}\n")),
        "{said}"
    );

    // Who is who, on disk.
    let user = folders.user(&alice);
    for (path, expected) in [
        ("", (0, gid, 0o750)),
        ("threads", (0, gid, 0o710)),
        ("threads/main", (uid, gid, 0o700)),
        (".claude", (0, gid, 0o710)),
        (".claude/sessions", (0, gid, 0o710)),
        (".claude/sessions/main", (uid, gid, 0o700)),
        (".claude/threads", (0, 0, 0o700)),
        (".greenroom", (0, 0, 0o700)),
        ("metadata.json", (0, 0, 0o600)),
        ("project", (0, 0, 0o755)),
        ("project/.git", (0, 0, 0o755)),
    ] {
        assert_eq!(place(&user.join(path)), expected, "{path}");
    }
    let [two, bob] = others
        .each_ref()
        .map(|other| Owner::of(&folders.worktree(other)).unwrap());
    assert_eq!(
        (two.gid(), two.uid() == uid),
        (gid, false),
        "threads of one user"
    );
    assert!(bob.gid() != gid && bob.uid() != uid);
    for folder in [folders.workspace(), folders.workspace().join("acme")] {
        assert_eq!(place(&folder), (0, 0, 0o711));
    }
    for file in files_below(&user.join("project")) {
        assert_eq!(place(&file).0, 0, "{}", file.display());
    }

    // Files that greenroom checked out are the agent's as if it had made them, and its git reads.
    let script = "chmod 755 package.json && touch -d yesterday package.json && echo >> .gitignore && echo done
        git status --porcelain && git log --format=%s | head -n 1 && git diff --stat | tail -n 1
        git commit --quiet --allow-empty -m sneaked || echo refused";
    let said = told(&greenroom, &folders, &alice, script).await;
    assert!(said.starts_with("done\n"), "{said}");
    assert!(
        said.contains(" M .gitignore\n") && said.contains("files changed"),
        "{said}"
    );
    assert!(said.ends_with("refused\n"), "{said}");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );

    // Another container sees the same numbers.
    let greenroom = greenroom.restart().await;
    greenroom
        .execute(&alice, "Change the heading to Again")
        .await
        .ok();
    assert_eq!(Owner::of(&folders.worktree(&alice)), Some(owner));
}

#[tokio::test]
async fn what_greenroom_puts_into_a_worktree_is_the_threads() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({"rules": [
        rule("a folder", &[
            runs("mkdir -p docs/deep && echo 1 > docs/deep/page.md && rm src/pages/index.astro"),
        ]),
        rule("in place", &[
            runs("echo more >> docs/deep/page.md && chmod +x docs/deep/page.md && rm server.mjs && mkdir docs/new"),
            writes("docs/deep/other.md", "2\n"),
        ]),
    ]}))
    .await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let worktree = folders.worktree(&alice);
    let owner = Owner::of(&worktree).unwrap();
    all_is_of(&worktree, owner);

    let post = async |what: &str| {
        let path = format!("{}/{what}", alice.path());
        greenroom.api("POST", &path, json!({})).await.ok()
    };
    // So is what an operator puts there, but for a file that has another name somewhere.
    let secret = folders.join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::hard_link(&secret, worktree.join("planted")).unwrap();
    fs::create_dir(worktree.join("by-hand")).unwrap();
    fs::write(worktree.join("by-hand/note.md"), "note\n").unwrap();
    greenroom.execute(&alice, "Make a folder").await.ok();
    assert_eq!(place(&secret).0, 0);
    fs::remove_file(worktree.join("planted")).unwrap();
    all_is_of(&worktree, owner);
    assert_eq!(Owner::of(&worktree.join("by-hand")), Some(owner));
    post("undo").await;
    assert!(worktree.join(PAGE).exists() && !worktree.join("docs").exists());
    all_is_of(&worktree, owner);
    // The folders that it makes are the thread's too.
    post("redo").await;
    all_is_of(&worktree, owner);
    assert_eq!(Owner::of(&worktree.join("docs/deep")), Some(owner));
    let turn = greenroom.execute(&alice, "Write in place").await.ok();
    assert_eq!(
        turn["commit"]["files"].as_array().unwrap().len(),
        3,
        "{turn}"
    );
    all_is_of(&worktree, owner);
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    let head = git(&worktree, &["rev-parse", "HEAD~2"]);
    let restore = format!("{}/restore", alice.path());
    greenroom
        .api("POST", &restore, json!({"commit": head}))
        .await
        .ok();
    all_is_of(&worktree, owner);
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
}

/// Not only once it is committed: the agent has to be able to change it.
#[tokio::test]
async fn what_a_turn_brings_is_the_threads_from_the_beginning() {
    if !has_uid_road() {
        return;
    }
    let looks = "stat -c %u src/images/*shoe* > owners.txt";
    let rules = [rule("below the heading", &[runs(looks)])];
    let stage = Stage::with(&rules, Options::on_the_uid_road).await;
    let wish = json!({
        "prompt": "a red shoe", "instruction": "Show it below the heading", "alt": "A shoe",
        "folder": "src/images",
    });
    stage.make(wish).await.ok();
    let worktree = stage.folders.worktree(&stage.alice);
    let owner = Owner::of(&worktree).unwrap();
    let said = fs::read_to_string(worktree.join("owners.txt")).unwrap();
    assert_eq!(said.trim(), owner.uid().to_string());
    all_is_of(&worktree, owner);
}

#[tokio::test]
async fn a_workspace_of_before_is_taken_over_once() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({})).await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let mut begun = TestGreenroom::start(options(&folders, &api).on_this_kernel()).await;
    begun.init(&alice, json!({"repoUrl": site})).await.ok();
    begun
        .execute(&alice, "Change the heading to Before")
        .await
        .ok();
    let worktree = folders.worktree(&alice);
    assert_eq!(Owner::of(&worktree), None);
    begun.kill().await;
    // Its agent writes to the end.
    wait_for("nothing of it is left", || {
        processes_below(&folders.join("")).is_empty().then_some(())
    })
    .await;
    // As it is where the image's own user made it; and somebody planted a second name.
    let secret = folders.join("secret");
    fs::write(&secret, "secret").unwrap();
    for path in files_below(&folders.user(&alice)) {
        std::os::unix::fs::lchown(path, Some(1000), Some(1000)).unwrap();
    }
    for folder in [
        folders.user(&alice),
        worktree.clone(),
        folders.user(&alice).join("project"),
    ] {
        std::os::unix::fs::lchown(folder, Some(1000), Some(1000)).unwrap();
    }
    fs::hard_link(&secret, worktree.join("planted")).unwrap();

    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    greenroom.init(&alice, json!({})).await.ok();
    let owner = Owner::of(&worktree).expect("it was taken over");
    assert_eq!(place(&secret).0, 0, "a second name is no way to a file");
    fs::remove_file(worktree.join("planted")).unwrap();
    all_is_of(&worktree, owner);
    for file in files_below(&folders.user(&alice).join("project")) {
        assert_eq!(place(&file).0, 0, "{}", file.display());
    }
    let turn = greenroom
        .execute(&alice, "Change the heading to After")
        .await
        .ok();
    assert_eq!(
        turn["continuity"], "native",
        "its transcript went along: {turn}"
    );

    // The next start changes nothing any more.
    let watched = worktree.join("package.json");
    let before = fs::metadata(&watched).unwrap().ctime_nsec();
    let greenroom = greenroom.restart().await;
    greenroom.init(&alice, json!({})).await.ok();
    assert_eq!(fs::metadata(&watched).unwrap().ctime_nsec(), before);
}

#[tokio::test]
async fn dev_servers_run_and_end_and_what_they_are_is_known() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({})).await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let mut greenroom = TestGreenroom::start(options(&folders, &api).previews()).await;
    // Numbers follow from names, and other tests run beside this one, which signals all it may.
    let client = format!("killer-{}", std::process::id());
    let (alice, bob) = (who(&client, "alice", "main"), who(&client, "bob", "main"));
    for thread in [&alice, &bob] {
        let init = greenroom.init(thread, json!({"repoUrl": site})).await.ok();
        // Its listener is told by its uid: greenroom may not look into it.
        assert_eq!(init["preview"]["state"], "live", "{init}");
    }
    let uids = |name: &str| {
        let all = processes_below(&folders.join(""));
        let named = all.iter().filter(|process| process.command.contains(name));
        let places = named.map(|process| format!("/proc/{}", process.pid));
        let uids = places.filter_map(|place| Some(fs::metadata(place).ok()?.uid()));
        uids.collect::<Vec<_>>()
    };
    let owner = Owner::of(&folders.worktree(&alice)).unwrap();
    assert!(uids("server.mjs").contains(&owner.uid()));

    // Whatever it may signal is its own: the others, the wardens and greenroom go on.
    let said = greenroom
        // Not where the test has failed already: it would end this machine's.
        .execute(&alice, "Run `[ $(id -u) -ge 1879048192 ] && kill -9 -1`")
        .await;
    assert!(
        [200, 502].contains(&said.answer.status),
        "{}",
        said.answer.text
    );
    assert_eq!(greenroom.exited(), None);
    let shown = greenroom.get(&format!("{}/preview", bob.path())).await.ok();
    assert_eq!(shown["result"]["state"], "live", "{shown}");
    greenroom
        .execute(&alice, "Change the heading to Mine")
        .await
        .ok();

    // A killed supervisor's wardens end them, who have another uid.
    greenroom.signal(Signal::SIGKILL);
    greenroom.wait_exit(crate::support::PATIENCE).await;
    wait_for("they end", || uids("server.mjs").is_empty().then_some(())).await;
}

/// The real Astro: an installer with the operator's settings for npm, which are in nobody's reach,
/// links to files of root's, and Vite's cache beside them.
#[tokio::test]
async fn a_site_of_astro_is_installed_shown_and_edited() {
    if !has_uid_road() {
        return;
    }
    let folders = Folders::open();
    // Not the one that tests share: here it is installed.
    let options = Options::new(&folders).rehearsal().astro();
    let options = options
        .env("CACHE_PATH", folders.join("cache"))
        .on_the_uid_road();
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let init = greenroom.init(&alice, json!({})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    let worktree = folders.worktree(&alice);
    let owner = Owner::of(&worktree).unwrap();
    let modules = worktree.join("node_modules");
    for its in [modules.clone(), modules.join("astro")] {
        assert_eq!(Owner::of(&its), Some(owner), "{}", its.display());
    }
    let linked = fs::metadata(modules.join("astro/package.json")).unwrap();
    assert_eq!((linked.uid(), linked.mode() & 0o777), (0, 0o444));
    assert!(linked.nlink() > 1, "a master's file");

    let turn = greenroom
        .execute(&alice, "Change the heading to A user of its own")
        .await
        .ok();
    assert_eq!(turn["preview"]["state"], "live", "{turn}");
    let url = init["preview"]["url"].as_str().unwrap();
    let host = url.strip_prefix("http://").unwrap();
    let sent = Sent::new("GET", "/", &Value::Null).header("host", host);
    let page = request(greenroom.preview_port, sent).await.unwrap();
    assert!(page.text.contains("A user of its own"), "{}", page.text);
}

#[tokio::test]
async fn no_program_makes_more_of_itself() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({})).await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let outside = folders.join("outside");
    fs::create_dir(&outside).unwrap();
    // A program of root's that makes whoever runs it root, and one of a group's.
    let rooted = outside.join("rooted");
    fs::copy("/usr/bin/id", &rooted).unwrap();
    fs::set_permissions(&rooted, fs::Permissions::from_mode(0o6755)).unwrap();
    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let owner = Owner::of(&folders.worktree(&alice)).unwrap();
    let script = format!(
        "{0}/rooted -u; {0}/rooted -g
        cp /usr/bin/id planted; chmod 6755 planted; stat -c %a:%u:%g planted
        chown 0:0 planted || echo no chown; chgrp 0 planted || echo no chgrp
        python3 -c 'import os; os.setuid(0)' 2>&1 | tail -n 1
        python3 -c 'import os; os.setgroups([0])' 2>&1 | tail -n 1
        unshare --user --map-root-user true && unshare --user --map-root-user id -u > inside
        mount -t tmpfs none . || echo no mount
        echo 1000 > /proc/self/oom_score_adj; echo -1000 > /proc/self/oom_score_adj || echo no score",
        outside.display()
    );
    let said = told(&greenroom, &folders, &alice, &script).await;
    let (uid, gid) = (owner.uid(), owner.gid());
    assert!(
        said.starts_with(&format!("{uid}\n{gid}\n6755:{uid}:{gid}\n")),
        "{said}"
    );
    for refused in ["no chown", "no chgrp", "no mount", "no score"] {
        assert!(said.contains(refused), "{refused}: {said}");
    }
    assert_eq!(said.matches("PermissionError").count(), 2, "{said}");

    // What it planted is a file like others to us: nothing of it is kept but that it can be run.
    let mode = git(folders.worktree(&alice), &["ls-tree", "HEAD", "planted"]);
    assert!(mode.starts_with("100755"), "{mode}");
}

#[tokio::test]
async fn one_shot_runs_are_users_of_their_own() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({"rules": [
        rule("who", &[runs("id -u > who.txt; cat who.txt")]),
    ]}))
    .await;
    let folders = Folders::open();
    let site = folders.site("site", SITE);
    let imports = folders.workspace().join("imports/today");
    fs::create_dir_all(&imports).unwrap();
    fs::write(imports.join("old.txt"), "old").unwrap();
    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let run = async |cwd: Option<&str>| {
        let body = json!({"prompt": "Say who you are", "cwd": cwd,
            "args": ["--dangerously-skip-permissions"]});
        greenroom.api("POST", "/execute", body).await.ok()
    };
    run(None).await;
    let in_place: Value = run(Some("acme/alice/threads/main")).await;
    let uid = |file: &Path| {
        fs::read_to_string(file)
            .unwrap()
            .trim()
            .parse::<u32>()
            .unwrap()
    };
    let owner = Owner::of(&folders.worktree(&alice)).unwrap();
    assert_eq!(
        uid(&folders.worktree(&alice).join("who.txt")),
        owner.uid(),
        "{in_place}"
    );
    run(Some("imports/today")).await;
    let runs = uid(&imports.join("who.txt"));
    assert!(Owner::of(&imports).is_some_and(|owner| owner.uid() == runs));
    assert!(Owner::of(&imports.join("old.txt")).is_some_and(|owner| owner.uid() == runs));
}

#[tokio::test]
async fn where_others_do_not_get_through_it_says_so_and_works_without() {
    if !has_uid_road() {
        return;
    }
    let api = StandIn::start(json!({})).await;
    let folders = Folders::new();
    let closed = fs::Permissions::from_mode(0o700);
    fs::set_permissions(folders.join(""), closed).unwrap();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(options(&folders, &api)).await;
    let ready = greenroom.get("/ready").await;
    let confinement = &ready.body["confinement"];
    assert_eq!(confinement["files"], "none", "{}", ready.text);
    assert_eq!(confinement["bash"], "files-only", "{}", ready.text);
    let log = greenroom.log().join("\n");
    assert!(log.contains("does not get through to this path"), "{log}");
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    greenroom
        .execute(&alice, "Change the heading to Mine")
        .await
        .ok();
    assert_eq!(Owner::of(&folders.worktree(&alice)), None);
}
