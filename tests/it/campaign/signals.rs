//! Signals at random moments of starts, inits, turns and stops.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::json;

use super::{Dice, is_at_rest, is_enough, rounds, try_begin};
use crate::support::{
    Folders, Options, PATIENCE, SITE, TestGreenroom, git, processes_below, wait_for, who,
};

/// The platform's patience in these rounds.
const PATIENCE_OF_ALL: u64 = 15;

#[tokio::test]
async fn signals_end_it_in_order_whenever_they_come() {
    let rounds = rounds(8);
    let mut dice = Dice::new();
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let worktree = folders.worktree(&alice);
    let options = Options::new(&folders)
        .acting()
        .previews()
        .env("DRAIN_SECONDS", "1")
        .env("STOP_TIMEOUT_SECONDS", PATIENCE_OF_ALL.to_string());
    let mut greenroom = TestGreenroom::start(options).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let (mut longest, mut seen) = (Duration::ZERO, BTreeMap::<String, usize>::new());
    let mut accepted = Vec::new();
    let begun = Instant::now();
    for round in 1..=rounds {
        if is_enough(round, begun) {
            break;
        }
        let port = greenroom.api_port;
        let first = [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGHUP,
        ][dice.below(4) as usize];
        let second = (dice.below(4) == 0).then(|| Duration::from_millis(dice.below(1500)));
        let moment = Duration::from_millis(dice.below(1200));
        // Half of them end by themselves, half have to be interrupted. One that never began runs after
        // the next start.
        let length = ["0.3", "15"][dice.below(2) as usize];
        let work = format!("append log.txt {round}\\n\nrun sleep {length}\nappend log.txt end\\n");
        let begin = try_begin(port, &alice, &work);
        let strike = async {
            tokio::time::sleep(moment).await;
            greenroom.signal(first);
            let asked = Instant::now();
            if let Some(later) = second {
                tokio::time::sleep(later).await;
                if greenroom.exited().is_none() {
                    greenroom.signal(Signal::SIGTERM);
                }
            }
            (asked, greenroom.wait_exit(PATIENCE).await)
        };
        let (turn, (asked, status)) = tokio::join!(begin, strike);
        let took = asked.elapsed();
        longest = longest.max(took);
        assert_eq!(status.code(), Some(0), "round {round}: {first}");
        assert!(
            took < Duration::from_secs(PATIENCE_OF_ALL),
            "round {round}: {took:?}"
        );
        let left = || processes_below(&folders.join("")).is_empty().then_some(());
        wait_for("every child has ended", left).await;
        let written = fs::read_to_string(worktree.join("log.txt")).unwrap_or_default();

        greenroom = greenroom.restart().await;
        if dice.below(4) == 0 {
            // Amid a start and an init.
            let fields = alice.body(json!({}));
            let init = crate::support::Sent::new("POST", "/api/init", &fields);
            let asking = crate::support::request(greenroom.api_port, init);
            let moment = Duration::from_millis(dice.below(600));
            let strike = async {
                tokio::time::sleep(moment).await;
                greenroom.signal(first);
            };
            let (answer, ()) = tokio::join!(asking, strike);
            drop(answer);
            let status = greenroom.wait_exit(PATIENCE).await;
            assert_eq!(status.code(), Some(0), "round {round}: amid an init");
            greenroom = greenroom.restart().await;
        }
        greenroom.init(&alice, json!({})).await.ok();
        accepted.extend(turn);
        for turn in &accepted {
            let result = greenroom.ended(turn).await;
            *seen.entry(result["status"].to_string()).or_default() += 1;
        }
        accepted.clear();
        is_at_rest(&greenroom, &alice).await;
        let kept = fs::read_to_string(worktree.join("log.txt")).unwrap_or_default();
        assert!(
            kept.starts_with(&written),
            "round {round}: {written:?} {kept:?}"
        );
        assert_eq!(
            git(&worktree, &["status", "--porcelain"]),
            "",
            "round {round}"
        );
        if round % 10 == 0 {
            println!("{round} rounds: longest stop {longest:?}, {seen:?}");
        }
    }
    git(
        folders.workspace().join("acme/alice/project"),
        &["fsck", "--strict"],
    );
    println!("{rounds} rounds: longest stop {longest:?}, {seen:?}, nothing lost, nothing left");
}
