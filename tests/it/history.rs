//! The history of a thread, undo, redo and restore, seen from outside and by the real git program.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::fs;

use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, Options, SITE, StandIn, TestGreenroom, Who, git, rule, runs, who,
};

/// A file of twelve lines that are far enough apart to be changed one by one.
fn poem() -> String {
    let lines = (1..=12).map(|n| format!("line {n}\nbetween {n}\nand more {n}\n"));
    lines.collect()
}

/// The model's way to change one line of the poem.
fn changes(says: &str, line: u32, to: &str) -> Value {
    rule(
        says,
        &[runs(&format!("sed -i 's/^line {line}$/{to}/' poem.txt"))],
    )
}

struct Stage {
    _api: StandIn,
    folders: Folders,
    greenroom: TestGreenroom,
    alice: Who,
}

impl Stage {
    async fn new(rules: &[Value]) -> Self {
        let api = StandIn::start(json!({"rules": rules})).await;
        let folders = Folders::new();
        let poem = poem();
        let mut files = SITE.to_vec();
        files.push(("poem.txt", &poem));
        let site = folders.site("site", &files);
        let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            _api: api,
            folders,
            greenroom,
            alice,
        }
    }

    fn git(&self, args: &[&str]) -> String {
        git(self.folders.worktree(&self.alice), args)
    }

    fn file(&self, path: &str) -> String {
        fs::read_to_string(self.folders.worktree(&self.alice).join(path)).unwrap()
    }

    /// An instruction that completes: its turn's id.
    async fn turn(&self, instruction: &str) -> String {
        let result = self.greenroom.execute(&self.alice, instruction).await.ok();
        result["turnId"].as_str().unwrap().to_owned()
    }

    async fn ask(&self, what: &str, body: Value) -> Answer {
        let path = format!("{}/{what}", self.alice.path());
        self.greenroom.api("POST", &path, body).await
    }

    /// An operation that completes: its result.
    async fn does(&self, what: &str, body: Value) -> Value {
        let mut answer = self.ask(what, body).await.ok();
        assert_eq!(answer["result"]["status"], "completed", "{answer}");
        self.is_sound();
        answer["result"].take()
    }

    async fn history(&self) -> Vec<Value> {
        let path = format!("{}/history", self.alice.path());
        let mut answer = self.greenroom.get(&path).await.ok();
        answer["result"]["turns"].take().as_array().unwrap().clone()
    }

    /// The git program finds nothing to complain about and nothing left over.
    fn is_sound(&self) {
        assert_eq!(self.git(&["status", "--porcelain"]), "");
        self.git(&["fsck", "--strict", "--no-dangling"]);
    }
}

#[tokio::test]
async fn an_undone_turn_leaves_the_later_ones_byte_for_byte() {
    let stage = Stage::new(&[
        changes("A1", 1, "first of A"),
        changes("B1", 5, "first of B"),
        changes("A2", 9, "second of A"),
    ])
    .await;
    let a1 = stage.turn("A1").await;
    stage.turn("B1").await;
    let a2 = stage.turn("A2").await;
    let all = stage.file("poem.txt");
    let before = stage.git(&["rev-parse", "HEAD"]);

    let undo = stage.does("undo", json!({"turnId": a1})).await;
    let expected = all.replace("first of A\n", "line 1\n");
    assert_ne!(expected, all);
    assert_eq!(stage.file("poem.txt"), expected);
    assert_eq!(
        (&undo["kind"], &undo["undone"]),
        (&json!("undo"), &json!(a1))
    );
    assert_eq!(
        undo["commit"],
        json!({
            "id": stage.git(&["rev-parse", "HEAD"]),
            "message": "Undo \u{201c}A1\u{201d}",
            "files": [{"path": "poem.txt", "status": "modified", "additions": 1, "deletions": 1}],
        })
    );
    assert_eq!(stage.git(&["rev-parse", "HEAD~1"]), before);
    let trailers = stage.git(&["log", "-1", "--format=%(trailers:only,unfold)"]);
    let id = undo["turnId"].as_str().unwrap();
    assert_eq!(
        trailers,
        format!(
            "Turn-Id: {id}\nThread: acme/alice/main\nKind: undo\nUndoes: {a1}\nStatus: completed"
        )
    );
    // It is a turn like any other.
    assert_eq!(stage.greenroom.turn(id).await["commit"], undo["commit"]);
    let events = stage.greenroom.events(id, 0).await.all().await;
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "turn.started",
            "file.changed",
            "commit.created",
            "turn.completed"
        ]
    );
    let history = stage.history().await;
    let row = |at: usize| (&history[at]["kind"], &history[at]["undoneBy"]);
    assert_eq!(row(0), (&json!("undo"), &Value::Null));
    assert_eq!(row(1), (&json!("turn"), &Value::Null));
    assert_eq!(row(3), (&json!("turn"), &json!(id)));

    // The default takes the newest one that is not undone, and walks back.
    let undo = stage.does("undo", Value::Null).await;
    assert_eq!(undo["undone"], json!(a2));
    let redo = stage.does("redo", json!({})).await;
    assert_eq!(redo["redone"], json!(a2));
    let redo = stage.does("redo", json!({})).await;
    assert_eq!(redo["redone"], json!(a1));
    assert_eq!(stage.file("poem.txt"), all);
    stage.ask("redo", json!({})).await.error(404, "not_found");
    let restored = stage.does("restore", json!({"commit": &before[..8]})).await;
    assert_eq!(restored["commit"], Value::Null);
    stage
        .does(
            "restore",
            json!({"commit": stage.git(&["rev-parse", "user/acme/alice"])}),
        )
        .await;
    assert_eq!(stage.file("poem.txt"), poem());
}
