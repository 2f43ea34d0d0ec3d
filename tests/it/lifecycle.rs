//! How it stops: idle, by signals, killed. Seen from outside.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{
    Folders, Options, PATIENCE, SITE, StandIn, TestGreenroom, git, processes_below, rule, runs,
    wait_for, wait_for_async, who, writes,
};

/// Three seconds.
const SOON: &str = "0.05";

/// No process is left whose folders are the test's.
async fn nothing_is_left(folders: &Folders) {
    let root = folders.join("");
    wait_for("every child has ended", || {
        let left = processes_below(&root);
        left.is_empty().then_some(())
    })
    .await;
}

async fn start(
    script: Value,
    adapt: impl FnOnce(Options) -> Options,
) -> (StandIn, Folders, String, TestGreenroom) {
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(adapt(Options::new(&folders).api(&api))).await;
    (api, folders, site, greenroom)
}

#[tokio::test]
async fn an_idle_one_ends_with_all_its_children() {
    let (_api, folders, site, mut greenroom) = start(json!({}), |options| {
        options.previews().env("AUTO_SHUTDOWN_MINUTES", SOON)
    })
    .await;
    let alice = who("acme", "alice", "main");
    let answer = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(answer["preview"]["state"], "live", "{answer}");
    greenroom
        .execute(&alice, "Change the heading to Hello")
        .await
        .ok();
    // Its agent and its dev server run, each below a warden.
    assert!(processes_below(&folders.workspace()).len() >= 2);
    let since = Instant::now();
    // Asking after it keeps nobody awake.
    let mut idle = Value::Null;
    let mut stopped = None;
    while stopped.is_none() {
        assert!(since.elapsed() < PATIENCE, "it never stops");
        let asked = greenroom.ask("/api/idle").await;
        if let Some(answer) = asked.filter(|answer| answer.body["stopsAt"].is_string()) {
            idle = answer.body;
        }
        for path in ["/health", "/ready", "/metrics", "/openapi.json"] {
            greenroom.ask(path).await;
        }
        stopped = greenroom.exited();
    }
    let idle_since: jiff::Timestamp = idle["idleSince"].as_str().unwrap().parse().unwrap();
    let idle_for = jiff::Timestamp::now().duration_since(idle_since);
    assert!(idle_for.as_millis() >= 2500, "not before its time: {idle}");
    assert_eq!(idle["holders"], json!([]), "{idle}");
    assert_eq!(stopped.unwrap().code(), Some(0));
    greenroom.wait_exit(PATIENCE).await;
    nothing_is_left(&folders).await;
    let log = greenroom.log().join("\n");
    assert!(log.contains("idle-timeout"), "{log}");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );
}

#[tokio::test]
async fn a_touch_and_a_running_turn_keep_it_awake() {
    let script = json!({"rules": [{"match": "slowly", "steps": [{"delay_ms": 5000}]}]});
    let (_api, _folders, site, mut greenroom) =
        start(script, |options| options.env("AUTO_SHUTDOWN_MINUTES", SOON)).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        greenroom
            .api("POST", "/api/idle/touch", Value::Null)
            .await
            .status_is(200);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(greenroom.exited(), None, "it was touched");
    }
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    // Nobody waits for this turn, and it takes longer than the idle time.
    let since = Instant::now();
    let id = greenroom.begin(&alice, "slowly").await;
    let idle = greenroom.get("/api/idle").await.body;
    assert_eq!(
        (&idle["idleSince"], &idle["stopsAt"]),
        (&Value::Null, &Value::Null)
    );
    let kind = idle["holders"][0]["kind"].as_str().unwrap();
    assert!(
        matches!(kind, "turn" | "queue") && idle["holders"][0]["who"] == id,
        "{idle}"
    );
    let status = greenroom.wait_exit(PATIENCE).await;
    assert!(
        since.elapsed() >= Duration::from_secs(7),
        "the turn, then the idle time"
    );
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn sigterm_lets_a_turn_end_and_refuses_new_work() {
    let wait = "touch begun; until [ -e go ]; do sleep 0.05; done; rm begun go";
    let script = json!({"rules": [rule("slowly", &[runs(wait), writes("done.txt", "done\n")])]});
    let (_api, folders, site, mut greenroom) = start(script, |options| options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let id = greenroom.begin(&alice, "slowly").await;
    let begun = folders.worktree(&alice).join("begun");
    wait_for("the turn works", || begun.exists().then_some(())).await;
    let waiting = greenroom.begin(&alice, "Change the heading to Later").await;
    greenroom.signal(Signal::SIGTERM);
    let health = wait_for_async("it says that it is draining", async || {
        let health = greenroom.get("/health").await;
        (health.status == 503).then_some(health)
    })
    .await;
    assert_eq!(
        (&health.body["draining"], &health.body["code"]),
        (&json!(true), &json!("draining"))
    );
    greenroom
        .execute(&alice, "more")
        .await
        .answer
        .error(503, "draining");
    let refused = greenroom
        .init(&who("acme", "bob", "main"), json!({"repoUrl": site}))
        .await;
    assert!(refused.headers.contains_key("retry-after"));
    refused.error(503, "draining");
    // Whoever follows the turn sees its end.
    let events = greenroom.events(&id, 0).await;
    std::fs::write(folders.worktree(&alice).join("go"), "").unwrap();
    let last = events.all().await.pop().unwrap();
    assert_eq!(last.name, "turn.completed", "{last:?}");
    assert_eq!(greenroom.wait_exit(PATIENCE).await.code(), Some(0));
    nothing_is_left(&folders).await;
    assert_eq!(
        git(folders.worktree(&alice), &["log", "-1", "--format=%s"]),
        "slowly"
    );
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );

    // What never began runs after the next start.
    let greenroom = greenroom.restart().await;
    assert_eq!(greenroom.ended(&waiting).await["status"], "completed");
}

/// A turn that writes a file and then never ends.
fn endless() -> Value {
    json!({"rules": [rule("endless", &[
        writes("half.txt", "half\n"),
        runs("touch begun.txt; setsid sleep 301 & sleep 300"),
    ])]})
}

#[tokio::test]
async fn a_drain_that_takes_too_long_interrupts_and_commits() {
    let (_api, folders, site, mut greenroom) =
        start(endless(), |options| options.arg("--drain-seconds=1")).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let id = greenroom.begin(&alice, "endless").await;
    let begun = folders.worktree(&alice).join("begun.txt");
    wait_for("the command runs", || begun.exists().then_some(())).await;
    let asked = Instant::now();
    assert_eq!(greenroom.stop().await.code(), Some(0));
    assert!(
        asked.elapsed() < Duration::from_secs(25),
        "within the platform's patience"
    );
    nothing_is_left(&folders).await;
    let worktree = folders.worktree(&alice);
    assert_eq!(
        git(&worktree, &["show", "--name-only", "--format=%s", "HEAD"]),
        "endless\n\nbegun.txt\nhalf.txt"
    );
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    let greenroom = greenroom.restart().await;
    let result = greenroom.turn(&id).await;
    assert_eq!(result["status"], "cancelled");
    assert_eq!(result["commit"]["files"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let (_api, folders, site, mut greenroom) = start(endless(), |options| options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    greenroom.begin(&alice, "endless").await;
    let begun = folders.worktree(&alice).join("begun.txt");
    wait_for("the command runs", || begun.exists().then_some(())).await;
    greenroom.signal(Signal::SIGINT);
    wait_for_async("it is draining", async || {
        (greenroom.get("/health").await.status == 503).then_some(())
    })
    .await;
    greenroom.signal(Signal::SIGTERM);
    let asked = Instant::now();
    greenroom.wait_exit(PATIENCE).await;
    assert!(
        asked.elapsed() < Duration::from_secs(20),
        "the drain would take 25 s"
    );
    nothing_is_left(&folders).await;
}

#[tokio::test]
async fn a_killed_one_leaves_no_child() {
    let (_api, folders, site, mut greenroom) = start(endless(), |options| options.previews()).await;
    let alice = who("acme", "alice", "main");
    let answer = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(answer["preview"]["state"], "live", "{answer}");
    greenroom.begin(&alice, "endless").await;
    let begun = folders.worktree(&alice).join("begun.txt");
    wait_for("the command runs", || begun.exists().then_some(())).await;
    let sleeps = || {
        let running = processes_below(&folders.join(""));
        running
            .iter()
            .filter(|process| process.is_program("sleep"))
            .count()
    };
    wait_for("both commands run", || (sleeps() == 2).then_some(())).await;
    greenroom.kill().await;
    let killed = Instant::now();
    nothing_is_left(&folders).await;
    assert!(
        killed.elapsed() < Duration::from_secs(60),
        "by themselves, and soon: the commands would go on for five minutes"
    );
}
