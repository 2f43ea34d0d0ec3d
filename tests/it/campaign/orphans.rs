//! A flood of grandchildren that nobody waits for, while turns end with statuses that somebody does.

use std::time::Instant;

use serde_json::json;

use super::rounds;
use crate::{
    pid1::{beside, has_namespaces, zombies},
    support::{Folders, Options, SITE, TestGreenroom, wait_for, wait_for_async, who},
};

#[tokio::test]
async fn orphans_leave_no_zombie_and_no_status_is_lost() {
    if !has_namespaces() {
        return;
    }
    let orphans = rounds(10_000);
    // Each is the child of a shell that is gone at once, and falls to PID 1.
    let flood = format!(
        "i=0; while [ $i -lt {orphans} ]; do ( : & ); i=$((i+1)); done; touch \"$HOME/flooded\""
    );
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let options = beside(Options::new(&folders).acting(), &flood);
    let begun = Instant::now();
    let greenroom = TestGreenroom::start(options).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let (mut turns, mut most) = (0, 0);
    let is_over = || folders.join("home/flooded").exists();
    while !is_over() || turns < 10 {
        turns += 1;
        let code = 1 + turns % 120;
        // The stand-in is started anew for each: its status is a child's that was just started.
        let answer = greenroom
            .execute(&alice, &format!("exit {code}"))
            .await
            .answer;
        assert!(
            answer.text.contains(&format!("exit status {code}")),
            "{}",
            answer.text
        );
        most = most.max(zombies(&greenroom));
    }
    let reaped = wait_for_async("all were reaped", async || {
        let figures = greenroom.get("/metrics").await.text;
        let mut lines = figures.lines();
        let count = lines.find_map(|line| line.strip_prefix("greenroom_orphans_reaped_total "));
        let count: usize = count?.parse().ok()?;
        // The flood's own shell too.
        (count > orphans).then_some(count)
    })
    .await;
    wait_for("no zombie is left", || {
        (zombies(&greenroom) == 0).then_some(())
    })
    .await;
    println!(
        "{reaped} orphans in {:?} beside {turns} turns, each with its status; at most {most} \
         zombies at a look, none at the end",
        begun.elapsed()
    );
}
