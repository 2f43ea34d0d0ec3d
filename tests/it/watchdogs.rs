//! Every way in which the CLI goes wrong, acted out by a stand-in: each ends with its outcome, its
//! edits committed, nothing left running, and the thread goes on.

use std::fs;

use serde_json::json;

use crate::support::{Folders, Options, SITE, TestGreenroom, Who, who};

/// The program with stand-ins as its agents, and the thread `acme/alice/main`.
struct Stage {
    folders: Folders,
    greenroom: TestGreenroom,
    alice: Who,
}

impl Stage {
    async fn new() -> Self {
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let greenroom = TestGreenroom::start(Options::new(&folders).acting()).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            folders,
            greenroom,
            alice,
        }
    }
}

#[tokio::test]
async fn a_stand_in_makes_a_turn() {
    let stage = Stage::new().await;
    let script = "remember Rex\nwrite a.txt one\\n\nappend a.txt two\\n\nrun echo three >> a.txt\ntext All done.";
    let result = stage.greenroom.execute(&stage.alice, script).await.ok();
    assert_eq!(result["text"], "All done.");
    assert_eq!(result["commit"]["files"][0]["path"], "a.txt");
    let file = stage.folders.worktree(&stage.alice).join("a.txt");
    assert_eq!(fs::read_to_string(file).unwrap(), "one\ntwo\nthree\n");
    let result = stage.greenroom.execute(&stage.alice, "recall").await.ok();
    assert_eq!(result["text"], "You told me: Rex.");
}
