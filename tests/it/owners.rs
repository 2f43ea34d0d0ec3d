//! Two containers on one workspace: one owner per thread, whatever happens to it.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, Sent, ServerEvent, StandIn, TestGreenroom, Who, git, processes_below,
    request, rule, runs, wait_for, who, writes,
};

/// A command of the agent's that writes until it is killed.
const TICKS: &str = "i=0; while true; do i=$((i+1)); echo $i >> ticks.txt; sleep 0.02; done";

/// A container's own folders beside the shared workspace.
fn container(folders: &Folders, name: &str, api: &StandIn, term: &str) -> Options {
    let tmp = folders.join(format!("tmp-{name}"));
    fs::create_dir_all(&tmp).unwrap();
    Options::new(folders)
        .api(api)
        .env("TMPDIR", tmp)
        .env("CACHE_PATH", folders.join(format!("cache-{name}")))
        .env("MAX_WARM_AGENTS", "0")
        .env("LEASE_SECONDS", term)
        .env("DRAIN_SECONDS", "0")
}

/// Whoever wants what a silent one holds waits for `term`, in seconds.
async fn two(script: Value, term: &str) -> (StandIn, Folders, TestGreenroom, TestGreenroom, Who) {
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let first = TestGreenroom::start(container(&folders, "first", &api, term)).await;
    let second = TestGreenroom::start(container(&folders, "second", &api, term)).await;
    let alice = who("acme", "alice", "main");
    first.init(&alice, json!({"repoUrl": site})).await.ok();
    (api, folders, first, second, alice)
}

/// Every file but the leases, with its content and the time of its last change.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let about = fs::symlink_metadata(&path).unwrap();
            if about.is_dir() {
                if !path.ends_with("lease") {
                    folders.push(path);
                }
            } else if about.is_file() {
                let content = fs::read(&path).unwrap();
                files.insert(path, (about.modified().unwrap(), content));
            }
        }
    }
    files
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[tokio::test]
async fn a_stopped_owner_is_followed_and_writes_nothing_when_it_wakes() {
    let (_api, folders, first, second, alice) = two(
        json!({"rules": [
            rule("tick", &[runs(TICKS)]),
            rule("hello", &[writes("hello.txt", "hello\n")]),
        ]}),
        "6",
    )
    .await;
    let worktree = folders.worktree(&alice);
    let ticks = worktree.join("ticks.txt");
    let port = first.api_port;
    let waits = Sent::new(
        "POST",
        "/api/execute",
        &alice.body(json!({"instruction": "tick"})),
    );
    #[expect(clippy::disallowed_methods, reason = "awaited below")]
    let waits = tokio::spawn(request(port, waits));
    wait_for("the command writes", || (lines(&ticks) > 10).then_some(())).await;
    let turn =
        first.get(&format!("{}/history", alice.path())).await.ok()["result"]["turns"][0]["turnId"]
            .as_str()
            .unwrap()
            .to_owned();

    first.signal(Signal::SIGSTOP);
    // It says nothing any more: its children end by themselves, then the other one takes over.
    second.init(&alice, json!({})).await.ok();
    let at_takeover = lines(&ticks);
    let recovered = second.turn(&turn).await;
    assert_eq!(recovered["status"], "recovered", "{recovered}");
    assert!(recovered["commit"]["id"].is_string(), "{recovered}");
    let committed = git(&worktree, &["show", "HEAD:ticks.txt"]);
    assert_eq!(
        committed.lines().count(),
        at_takeover,
        "all that was written"
    );
    second.execute(&alice, "hello").await.ok();
    assert_eq!(lines(&ticks), at_takeover, "nobody writes any more");
    let mut left = processes_below(&folders.join("tmp-first"));
    left.retain(|process| process.pid.cast_unsigned() != first.pid());
    assert!(left.is_empty(), "{left:?}");

    let agents = || {
        let below = processes_below(&folders.join("tmp-second"));
        below.iter().all(|process| !process.is_program("claude"))
    };
    wait_for("its own agent ends", || agents().then_some(())).await;
    let before = snapshot(&folders.workspace());
    first.signal(Signal::SIGCONT);
    let answer = waits.await.unwrap().unwrap();
    answer.error(409, "thread_busy_elsewhere");
    first
        .execute(&alice, "hello")
        .await
        .answer
        .error(409, "thread_busy_elsewhere");
    first
        .init(&alice, json!({}))
        .await
        .error(409, "thread_busy_elsewhere");
    let after = snapshot(&folders.workspace());
    let changed: Vec<_> = after
        .iter()
        .filter(|(path, file)| before.get(*path) != Some(file))
        .map(|(path, _)| path)
        .chain(before.keys().filter(|path| !after.contains_key(*path)))
        .collect();
    assert!(changed.is_empty(), "the old owner wrote: {changed:?}");
    // The new one goes on as if nothing had been.
    second.execute(&alice, "hello again").await.ok();
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    git(&worktree, &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_beating_owner_keeps_its_thread_and_others_may_look() {
    let (_api, folders, first, second, alice) = two(
        json!({"rules": [
            rule("tick", &[runs(TICKS)]),
        ]}),
        "12",
    )
    .await;
    let turn = first.begin(&alice, "tick").await;
    let ticks = folders.worktree(&alice).join("ticks.txt");
    wait_for("the command writes", || (lines(&ticks) > 0).then_some(())).await;

    let refused = second.init(&alice, json!({})).await;
    let sentence = refused.error(409, "thread_busy_elsewhere");
    assert!(sentence.contains("another container"), "{sentence}");
    let path = format!("/api/turns/{turn}/cancel");
    let cancel = second.api("POST", &path, Value::Null).await;
    cancel.error(409, "thread_busy_elsewhere");
    assert_eq!(second.turn(&turn).await["status"], "running");
    for (operation, body) in [
        ("undo", json!({"dryRun": true})),
        ("redo", json!({})),
        ("restore", json!({"commit": "abcd"})),
        ("sync", json!({})),
        ("publish", json!({"to": "user"})),
    ] {
        let path = format!("{}/{operation}", alice.path());
        let refused = second.api("POST", &path, body).await;
        refused.error(409, "thread_busy_elsewhere");
    }

    // Another thread of the same user, in the other container: they share the repository.
    let beside = who("acme", "alice", "beside");
    second.init(&beside, json!({})).await.ok();
    second
        .execute(&beside, "Change the heading to Beside")
        .await
        .ok();

    // Whoever follows in the other container sees the same events.
    let follows = second.events(&turn, 0).await;
    first.api("POST", &path, Value::Null).await.ok();
    let seen = follows.all().await;
    let own = first.events(&turn, 0).await.all().await;
    let ids = |events: &[ServerEvent]| -> Vec<_> {
        events
            .iter()
            .map(|event| (event.id, event.name.clone()))
            .collect()
    };
    assert_eq!(ids(&seen), ids(&own));
    assert_eq!(seen.last().unwrap().name, "turn.cancelled");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );
}

#[tokio::test]
async fn a_stopping_owner_hands_over_at_once_and_a_killed_one_nearly() {
    let (_api, folders, mut first, mut second, alice) = two(
        json!({"rules": [
            rule("tick", &[runs(TICKS)]),
            rule("recall", &[]),
        ]}),
        "6",
    )
    .await;
    let ticks = folders.worktree(&alice).join("ticks.txt");
    let turn = first.begin(&alice, "tick").await;
    wait_for("the command writes", || (lines(&ticks) > 0).then_some(())).await;
    // Nothing holds a stopped one's threads, so the next one does not wait for a beat.
    first.signal(Signal::SIGTERM);
    let ended = first.wait_exit(crate::support::PATIENCE).await;
    assert_eq!(ended.code(), Some(0));
    second.init(&alice, json!({})).await.ok();
    assert_eq!(second.turn(&turn).await["status"], "cancelled");
    let lease = folders
        .workspace()
        .join("acme/alice/.greenroom/threads/main/lease");
    let generation = fs::read_dir(&lease).unwrap().count();
    assert_eq!(generation, 1, "one owner");

    let turn = second.begin(&alice, "tick").await;
    let before = lines(&ticks);
    wait_for("the command writes", || {
        (lines(&ticks) > before).then_some(())
    })
    .await;
    second.kill().await;
    let third = first.restart().await;
    third.init(&alice, json!({})).await.ok();
    assert_eq!(third.turn(&turn).await["status"], "recovered");
    let result = third.execute(&alice, "recall").await.ok();
    assert_eq!(result["continuity"], "native", "{result}");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );
}
