//! Damaged git state, seen from outside: a turn puts it right, says so, and loses nothing; what it
//! cannot put right is refused with a code.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::fs;

use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, Who, git, rule, runs, who, writes,
};

const EDIT: &str = "Change the heading to Mine";

async fn thread(script: Value) -> (StandIn, Folders, TestGreenroom, Who) {
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    (api, folders, greenroom, alice)
}

fn says(result: &Value, text: &str) -> bool {
    let repairs = result["repairs"].as_array().unwrap();
    repairs
        .iter()
        .any(|repair| repair.as_str().unwrap().contains(text))
}

#[tokio::test]
async fn a_turn_puts_right_what_others_left_and_says_so() {
    let (_api, folders, greenroom, alice) = thread(json!({})).await;
    let tree = folders.worktree(&alice);
    let first = greenroom.execute(&alice, EDIT).await.ok();
    assert_eq!(first["repairs"], json!([]));

    // A merge in the middle of its conflict, on another branch, with an edit beside it.
    git(&tree, &["branch", "other", "HEAD~1"]);
    git(&tree, &["switch", "-q", "other"]);
    fs::write(tree.join("src/pages/index.astro"), "<h1>Theirs</h1>\n").unwrap();
    git(&tree, &["commit", "-qam", "theirs"]);
    let merge = std::panic::catch_unwind(|| git(&tree, &["merge", "-q", &alice.branch()]));
    assert!(merge.is_err(), "it clashes");
    fs::write(tree.join("edit.txt"), "an edit\n").unwrap();
    fs::write(tree.join("src/pages/index.astro"), "<h1>Settled</h1>\n").unwrap();
    let result = greenroom
        .execute(&alice, "Change the heading to Again")
        .await
        .ok();
    assert!(says(&result, "A merge was under way"), "{result}");
    assert_eq!(git(&tree, &["status", "--porcelain"]), "");
    assert_eq!(
        git(&tree, &["symbolic-ref", "HEAD"]),
        format!("refs/heads/{}", alice.branch())
    );
    assert_eq!(git(&tree, &["show", "HEAD~1:edit.txt"]), "an edit");
    assert!(git(&tree, &["show", "HEAD:src/pages/index.astro"]).contains("Again"));

    // The branch deleted, and an index of garbage.
    git(
        &tree,
        &[
            "update-ref",
            "-d",
            &format!("refs/heads/{}", alice.branch()),
        ],
    );
    let admin = folders.user(&alice).join("project/.git/worktrees/main");
    fs::write(admin.join("index"), "garbage").unwrap();
    let result = greenroom.execute(&alice, EDIT).await.ok();
    assert!(says(&result, "branch was gone"), "{result}");
    assert!(says(&result, "index was damaged"), "{result}");
    assert_eq!(git(&tree, &["rev-list", "--count", "HEAD"]), "5");
    assert_eq!(git(&tree, &["status", "--porcelain"]), "");
    git(&tree, &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_site_whose_folder_is_gone_is_checked_out_again() {
    let (_api, folders, greenroom, alice) = thread(json!({"rules": [
        rule("where", &[runs("pwd -P > here.txt && cat src/pages/index.astro > copy.txt")]),
    ]}))
    .await;
    let tree = folders.worktree(&alice);
    greenroom.execute(&alice, EDIT).await.ok();
    // The agent waits in it for its next instruction.
    fs::remove_dir_all(&tree).unwrap();
    let result = greenroom.execute(&alice, "where").await.ok();
    assert!(says(&result, "folder was gone"), "{result}");
    let files = result["commit"]["files"].to_string();
    assert!(files.contains("here.txt"), "{result}");
    let copy = fs::read_to_string(tree.join("copy.txt")).unwrap();
    assert!(copy.contains("<h1>Mine</h1>"), "{copy}");
    assert_eq!(git(&tree, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_live_lock_is_refused_with_a_code_and_tried_again_later() {
    let (_api, folders, greenroom, alice) = thread(json!({"rules": [
        rule("hello", &[writes("hello.txt", "hello\n")]),
    ]}))
    .await;
    let tree = folders.worktree(&alice);
    fs::write(tree.join("edit.txt"), "an edit\n").unwrap();
    let lock = folders
        .user(&alice)
        .join("project/.git/worktrees/main/index.lock");
    let held = fs::File::create(&lock).unwrap();
    let refused = greenroom.execute(&alice, "hello").await;
    assert_eq!(refused.answer.status, 409);
    assert_eq!(refused.answer.body["code"], "thread_busy_elsewhere");
    let error = refused.answer.body["error"].as_str().unwrap();
    assert!(error.contains("try again"), "{error}");
    assert!(lock.exists() && !tree.join("hello.txt").exists());

    drop(held);
    let greenroom = greenroom.restart().await;
    greenroom.init(&alice, json!({})).await.ok();
    assert!(!lock.exists());
    greenroom.execute(&alice, "hello").await.ok();
    assert_eq!(git(&tree, &["show", "HEAD~1:edit.txt"]), "an edit");
    assert_eq!(git(&tree, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_repository_that_leads_elsewhere_is_refused_with_a_sentence() {
    let (_api, folders, greenroom, alice) = thread(json!({})).await;
    let objects = folders.user(&alice).join("project/.git/objects");
    fs::create_dir_all(objects.join("info")).unwrap();
    fs::write(objects.join("info/alternates"), "/elsewhere\n").unwrap();
    let refused = greenroom.execute(&alice, EDIT).await;
    assert_eq!(refused.answer.status, 500);
    let error = refused.answer.body["error"].as_str().unwrap();
    assert!(
        error.contains("borrows objects from another repository"),
        "{error}"
    );
    let greenroom = greenroom.restart().await;
    let refused = greenroom.init(&alice, json!({})).await;
    let error = refused.body["error"].as_str().unwrap();
    assert!(error.contains("borrows objects"), "{error}");
    assert_eq!(refused.body["code"], "internal");
}
