//! All attempts of `hostile` to reach what is not an agent's, in random order and many at once.

use std::fs;

use serde_json::json;

use super::{Dice, rounds};
use crate::{
    hostile::{attempts, port_of, town},
    support::{StandIn, Who, who},
};

#[tokio::test]
async fn nothing_is_reached_in_any_order_or_at_once() {
    let rounds = rounds(2);
    let mut dice = Dice::new();
    let api = StandIn::start(json!({})).await;
    let (folders, mut greenroom, others) = town(&api).await;
    let alice = who("acme", "alice", "main");
    greenroom
        .init(&alice, json!({"repoUrl": folders.join("repos/site")}))
        .await
        .ok();
    let others: Vec<&Who> = others.iter().collect();
    let all = attempts(&folders, &greenroom, &others, port_of(&api.url()));
    let out = folders.worktree(&alice).join("out");
    let mut tried = 0;
    for round in 1..=rounds {
        fs::remove_dir_all(&out).ok();
        let mut order: Vec<usize> = (0..all.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, dice.below(at as u64 + 1) as usize);
        }
        let mut script = String::from("#!/bin/bash\nmkdir -p out\ncat package.json > out/own\n");
        for number in &order {
            let command = &all[*number].1;
            // By itself, out of its group and session, or a grandchild of nobody.
            let started = match dice.below(3) {
                0 => format!("( {command} ) > out/{number} 2>/dev/null &\n"),
                1 => format!(
                    "setsid bash -c '( {} ) > out/{number} 2>/dev/null' &\n",
                    command.replace('\'', "'\\''")
                ),
                _ => format!("( ( {command} ) > out/{number} 2>/dev/null & )\n"),
            };
            script.push_str(&started);
        }
        let count = all.len();
        // Orphans are nobody's to wait for: until each has a file that it opened, and a moment.
        script.push_str(&format!(
            "wait; for i in $(seq 100); do [ $(ls out | wc -l) -gt {count} ] && break; sleep 0.05; done; sleep 0.5\n"
        ));
        fs::write(folders.worktree(&alice).join("try.sh"), script).unwrap();
        greenroom.execute(&alice, "Run `bash try.sh`").await.ok();
        assert_eq!(greenroom.exited(), None, "it runs on");
        let found = |name: &str| fs::read_to_string(out.join(name)).unwrap_or_default();
        assert!(found("own").contains("node server.mjs"));
        for (number, (name, command)) in all.iter().enumerate() {
            assert_eq!(
                found(&number.to_string()),
                "",
                "round {round}: {name}: {command}"
            );
            tried += 1;
        }
        for other in &others {
            assert!(!folders.worktree(other).join("escaped.txt").exists());
        }
        assert!(!folders.join("outside/escaped.txt").exists());
    }
    println!("{rounds} rounds, {tried} attempts, nothing reached");
}
