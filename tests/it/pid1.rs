//! greenroom as PID 1 of a process namespace, as in its container: who else is there falls to it.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::support::{Folders, Options, PATIENCE, SITE, TestGreenroom, wait_for, who};

/// Whether a namespace of processes can be had; says so where not.
#[expect(clippy::disallowed_methods, reason = "asks the system")]
pub(crate) fn has_namespaces() -> bool {
    let words = [
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--mount-proc",
    ];
    let asked = std::process::Command::new("unshare")
        .args(words)
        .arg("true")
        .output();
    let is_there = asked.is_ok_and(|output| output.status.success());
    if !is_there {
        eprintln!("skipped: this system makes no process namespace for a test (unshare --pid)");
    }
    is_there
}

/// It is PID 1 of a namespace in which this script of `sh` was started before, as a child of its.
pub(crate) fn beside(options: Options, script: &str) -> Options {
    let file = options.folders.join("home/beside.sh");
    fs::write(file, script).unwrap();
    options.started_by(
        "exec unshare --pid --fork --kill-child --mount-proc \
         sh -c 'sh \"$HOME/beside.sh\" & exec \"$@\"' sh \"$@\"",
    )
}

/// What `/proc` says of a process: its parent, and whether it waits to be reaped.
fn parent(pid: &str) -> Option<(u32, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let is_zombie = fields.next()? == "Z";
    Some((fields.next()?.parse().ok()?, is_zombie))
}

fn children(of: u32) -> Vec<(u32, bool)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| {
            let (parent, is_zombie) = parent(&name)?;
            (parent == of).then_some((name.parse().ok()?, is_zombie))
        })
        .collect()
}

/// The program itself: what was started is the namespace's door.
pub(crate) fn program(greenroom: &TestGreenroom) -> u32 {
    let below = children(greenroom.pid());
    assert_eq!(below.len(), 1, "{below:?}");
    below[0].0
}

/// Children of the program that have ended and that nobody has waited for.
pub(crate) fn zombies(greenroom: &TestGreenroom) -> usize {
    let below = children(program(greenroom));
    below.iter().filter(|(_, is_zombie)| *is_zombie).count()
}

#[tokio::test]
async fn what_fell_to_it_is_told_of_the_end_whatever_the_signal() {
    if !has_namespaces() {
        return;
    }
    let daemon = "trap 'touch \"$HOME/told\"; exit 0' TERM
        (trap 'touch \"$HOME/told-below\"; exit 0' TERM; touch \"$HOME/below\"; while :; do sleep 0.05; done) &
        touch \"$HOME/runs\"; while :; do sleep 0.05; done";
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ] {
        let folders = Folders::new();
        let options = beside(Options::new(&folders).acting(), daemon);
        let mut greenroom = TestGreenroom::start(options).await;
        for name in ["runs", "below"] {
            let file = folders.join("home").join(name);
            wait_for("what is beside it runs", || file.exists().then_some(())).await;
        }
        kill(Pid::from_raw(program(&greenroom).cast_signed()), signal).unwrap();
        let status = greenroom.wait_exit(PATIENCE).await;
        assert_eq!(status.code(), Some(0), "{signal}");
        for name in ["told", "told-below"] {
            assert!(folders.join("home").join(name).exists(), "{signal}: {name}");
        }
    }
}

#[tokio::test]
async fn a_stop_keeps_to_the_platform_s_patience_and_the_next_start_tells_what_was_cut() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders)
        .acting()
        .env("DRAIN_SECONDS", "600")
        .env("STOP_TIMEOUT_SECONDS", "20");
    let alice = who("acme", "alice", "main");
    let mut greenroom = TestGreenroom::start(options).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let turn = greenroom
        .begin(&alice, "write half.txt half\nrun sleep 300")
        .await;
    let half = folders.worktree(&alice).join("half.txt");
    wait_for("the turn has written", || half.exists().then_some(())).await;
    let asked = Instant::now();
    assert_eq!(greenroom.stop().await.code(), Some(0));
    let took = asked.elapsed();
    assert!(
        took > Duration::from_secs(2),
        "the turn had its share: {took:?}"
    );
    assert!(took < Duration::from_secs(20), "before the kill: {took:?}");

    let mut greenroom = greenroom.restart().await;
    let told = |greenroom: &TestGreenroom, what: &str| {
        let log = greenroom.log();
        log.iter().any(|line| line.contains(what)).then_some(())
    };
    wait_for("the log tells what was cut", || {
        told(&greenroom, "1 running turns were interrupted")
    })
    .await;
    let result = greenroom.turn(&turn).await;
    assert_eq!(result["status"], "cancelled", "{result}");

    // Killed amid its stop, as a platform does whose patience is over.
    greenroom
        .begin(&alice, "write more.txt more\nrun sleep 300")
        .await;
    let more = folders.worktree(&alice).join("more.txt");
    wait_for("the turn has written", || more.exists().then_some(())).await;
    greenroom.signal(Signal::SIGTERM);
    let notes = folders.workspace().join(".greenroom/stops");
    wait_for("the stop is noted", || {
        let mut notes = fs::read_dir(&notes).ok()?.flatten();
        notes
            .any(|note| note.path().extension().is_some_and(|end| end == "json"))
            .then_some(())
    })
    .await;
    greenroom.kill().await;
    let mut greenroom = greenroom.restart().await;
    wait_for("the log tells of the kill", || {
        told(&greenroom, "it was killed while turns were running")
    })
    .await;
    // Once.
    assert_eq!(greenroom.stop().await.code(), Some(0));
    let greenroom = greenroom.restart().await;
    greenroom.get("/ready").await;
    assert!(told(&greenroom, "the stop of").is_none());
    assert_eq!(fs::read_dir(&notes).unwrap().count(), 0);
}
