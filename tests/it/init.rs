//! `POST /api/init`, seen from outside.

use serde_json::json;

use crate::support::{Folders, Options, SITE, StandIn, TestGreenroom, git, who};

#[tokio::test]
async fn a_thread_is_made_and_an_instruction_is_done() {
    let api = StandIn::start(json!({})).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let result = greenroom
        .execute(&alice, "Change the heading to Hello")
        .await
        .ok();
    assert_eq!(
        result["commit"]["files"][0]["path"],
        "src/pages/index.astro"
    );
    let head = git(folders.worktree(&alice), &["rev-parse", "HEAD"]);
    assert_eq!(result["commit"]["id"], head);
}
