//! A workspace that an agent fills to the last byte.
use std::fs;

use serde_json::{Value, json};

use crate::support::{Folders, Options, SITE, TestGreenroom, wait_for_async, who};

/// The workspace is a small disk of its own, which only the program sees. Somebody makes room there
/// when he is asked to.
const SMALL_DISK: &str = "exec unshare --mount sh -c \
    'mount -t tmpfs -o size=24m,mode=700 none \"$WORKSPACE_PATH\" && { \
       while [ ! -e \"$HOME/make-room\" ] && kill -0 $$; do sleep 0.1; done; \
       rm -f \"$WORKSPACE_PATH\"/acme/alice/threads/main/fill.bin; } 2>/dev/null & \
     while ! mountpoint -q \"$WORKSPACE_PATH\"; do sleep 0.02; done; exec \"$@\"' sh \"$@\"";

#[tokio::test]
async fn a_full_disk_is_told_and_hangs_nothing_and_no_edit_is_lost() {
    let folders = Folders::new();
    fs::create_dir_all(folders.workspace()).unwrap();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).acting().started_by(SMALL_DISK);
    let mut greenroom = TestGreenroom::start(options).await;
    let (alice, bob) = (who("acme", "alice", "main"), who("acme", "bob", "main"));
    for who in [&alice, &bob] {
        greenroom.init(who, json!({"repoUrl": site})).await.ok();
    }
    greenroom.execute(&alice, "write a.txt one").await.ok();
    let fill = "write b.txt two\nrun head -c 60000000 /dev/zero > fill.bin; true";
    let filled = greenroom.execute(&alice, fill).await.answer;
    let sentence = filled.error(507, "insufficient_storage");
    assert!(sentence.contains("stays where it is"), "{sentence}");
    // Everybody on this disk is told so, and what needs no room goes on.
    for who in [&alice, &bob] {
        let next = greenroom.execute(who, "write c.txt three").await.answer;
        next.error(507, "insufficient_storage");
    }
    let undo = format!("{}/undo", alice.path());
    let undone = greenroom.api("POST", &undo, json!({})).await;
    undone.error(507, "insufficient_storage");
    assert_eq!(greenroom.get("/health").await.status, 200);
    greenroom.get(&bob.path()).await.ok();
    let ready = greenroom.get("/ready").await;
    assert_eq!(ready.status, 503, "{}", ready.text);
    assert!(
        ready.text.contains("the workspace's disk is full"),
        "{}",
        ready.text
    );

    fs::write(folders.join("home/make-room"), "").unwrap();
    wait_for_async("room", async || {
        (greenroom.get("/ready").await.status == 200).then_some(())
    })
    .await;
    greenroom.init(&alice, json!({})).await.ok();
    let result = greenroom.execute(&alice, "write d.txt four").await.ok();
    let files = |result: &Value| {
        let files = result["commit"]["files"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| panic!("{result}"));
        let paths = files
            .iter()
            .map(|file| file["path"].as_str().unwrap().to_owned());
        paths.collect::<Vec<_>>()
    };
    assert_eq!(files(&result), ["d.txt"]);
    let history = greenroom
        .get(&format!("{}/history", alice.path()))
        .await
        .ok();
    let turns = history["result"]["turns"].as_array().unwrap();
    let cut = turns
        .iter()
        .find(|turn| turn["instruction"].to_string().contains("fill.bin"))
        .unwrap_or_else(|| panic!("{history}"));
    assert_eq!(
        (&cut["status"], files(cut)),
        (&json!("recovered"), vec!["b.txt".to_owned()]),
        "{history}"
    );
    // What was refused has left nothing.
    assert_eq!(turns.len(), 3, "{history}");
    greenroom.execute(&bob, "write c.txt three").await.ok();
    assert!(greenroom.stop().await.success());
}
