//! The history of a thread, undo, redo and restore, seen from outside and by the real git program.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, Options, SITE, Sent, StandIn, TestGreenroom, Who, git, request, rule, runs,
    wait_for, wait_for_async, who, writes,
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
        Self::with(rules, |options| options).await
    }

    async fn with(rules: &[Value], adapt: impl FnOnce(Options) -> Options) -> Self {
        let api = StandIn::start(json!({"rules": rules})).await;
        let folders = Folders::new();
        let poem = poem();
        let mut files = SITE.to_vec();
        files.push(("poem.txt", &poem));
        let site = folders.site("site", &files);
        let greenroom = TestGreenroom::start(adapt(Options::new(&folders).api(&api))).await;
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

    fn at(&self, path: &str) -> PathBuf {
        self.folders.worktree(&self.alice).join(path)
    }

    fn file(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"])
    }

    /// All that may not change when something is refused.
    async fn everything(&self) -> (String, String, String, Vec<Value>) {
        let status = self.git(&["status", "--porcelain", "--ignored"]);
        (
            self.head(),
            status,
            self.file("poem.txt"),
            self.history().await,
        )
    }

    async fn get(&self, what: &str) -> Answer {
        let path = format!("{}/{what}", self.alice.path());
        self.greenroom.get(&path).await
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
        let mut answer = self.get("history").await.ok();
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

#[tokio::test]
async fn what_cannot_be_undone_is_refused_and_leaves_no_trace() {
    let stage = Stage::new(&[
        changes("A1", 1, "first of A"),
        rule(
            "B1",
            &[runs("sed -i 's/^first of A$/B was here/' poem.txt")],
        ),
        rule("look", &[]),
    ])
    .await;
    stage.ask("undo", json!({})).await.error(404, "not_found");
    let looked = stage.turn("look").await;
    let a1 = stage.turn("A1").await;
    stage.turn("B1").await;
    let before = stage.everything().await;

    let answer = stage.ask("undo", json!({"turnId": a1})).await;
    assert_eq!(
        answer.body["files"][0]["path"], "poem.txt",
        "{}",
        answer.text
    );
    answer.error(409, "undo_conflict");
    let dry = json!({"turnId": a1, "dryRun": true});
    stage.ask("undo", dry).await.error(409, "undo_conflict");
    let stale = json!({"expectedHead": stage.git(&["rev-parse", "HEAD~1"])});
    for what in ["undo", "redo"] {
        let answer = stage.ask(what, stale.clone()).await;
        assert_eq!(answer.body["head"], json!(before.0), "{}", answer.text);
        answer.error(409, "stale_head");
    }
    let unknown = a1.replace(|c: char| c.is_ascii_digit(), "0");
    for (what, body, status, code) in [
        ("undo", json!({"turnId": looked}), 400, "invalid_request"),
        ("undo", json!({"turnId": unknown}), 404, "not_found"),
        (
            "undo",
            json!({"turnId": a1.replace("main", "other")}),
            404,
            "not_found",
        ),
        ("undo", json!({"turnId": "x"}), 404, "not_found"),
        ("undo", json!({"turnId": 5}), 400, "invalid_request"),
        (
            "undo",
            json!({"expectedHead": "HEAD"}),
            400,
            "invalid_request",
        ),
        (
            "undo",
            json!({"author": {"name": "a<b", "email": "x"}}),
            400,
            "invalid_request",
        ),
        ("redo", json!({}), 404, "not_found"),
        ("redo", json!({"turnId": a1}), 400, "invalid_request"),
        ("restore", json!({}), 400, "invalid_request"),
        ("restore", json!({"commit": "main"}), 400, "invalid_request"),
        ("restore", json!({"commit": "abc"}), 400, "invalid_request"),
        ("restore", json!({"commit": "0123456789"}), 404, "not_found"),
    ] {
        eprintln!("{what} {body}");
        stage.ask(what, body).await.error(status, code);
    }
    // A file of the turn's is ignored now, and a person's.
    fs::write(stage.at("poem.txt"), before.2.clone()).unwrap();
    assert_eq!(stage.everything().await, before);
    let nobody = who("acme", "alice", "nobody");
    for what in ["undo", "redo", "restore"] {
        let path = format!("{}/{what}", nobody.path());
        let body = json!({"commit": "0123456789"});
        let answer = stage.greenroom.api("POST", &path, body).await;
        answer.error(404, "not_found");
    }
    assert!(!stage.folders.worktree(&nobody).exists());
}

#[tokio::test]
async fn a_dry_run_says_what_would_change_and_changes_nothing() {
    let stage = Stage::new(&[changes("A1", 1, "first of A")]).await;
    let a1 = stage.turn("A1").await;
    // An edit that is not committed yet is looked at, and stays uncommitted.
    let edited = stage.file("poem.txt").replace("line 12\n", "by hand\n");
    fs::write(stage.at("poem.txt"), &edited).unwrap();
    let before = stage.everything().await;
    let mut answer = stage.ask("undo", json!({"dryRun": true})).await.ok();
    let dry = answer["result"].take();
    assert_eq!(stage.everything().await, before);
    let change =
        json!([{"path": "poem.txt", "status": "modified", "additions": 1, "deletions": 1}]);
    assert_eq!(
        (&dry["dryRun"], &dry["kind"], &dry["undone"], &dry["files"]),
        (&json!(true), &json!("undo"), &json!(a1), &change)
    );
    assert!(
        dry.get("turnId").is_none() && dry.get("commit").is_none(),
        "{dry}"
    );
    let diff = dry["diff"].as_str().unwrap();
    assert!(diff.contains("-first of A\n+line 1\n"), "{diff}");
    assert!(!diff.contains("by hand"), "{diff}");

    // The commit that it was based on is the one to expect; the edit does not make it stale.
    let head = dry["head"].as_str().unwrap();
    let author = json!({"name": "Alice", "email": "alice@acme.example"});
    let body = json!({"expectedHead": &head[..12], "author": author});
    let undo = stage.does("undo", body).await;
    assert_eq!(undo["commit"]["files"], change);
    assert_eq!(
        stage.file("poem.txt"),
        edited.replace("first of A\n", "line 1\n")
    );
    assert_eq!(
        stage.git(&["log", "-2", "--format=%an: %s"]),
        "Alice: Undo \u{201c}A1\u{201d}\ngreenroom: Edits made outside of a turn"
    );
    let history = stage.get("history").await.ok();
    assert_eq!(history["result"]["turns"][0]["author"], author);
    let edits = history["result"]["edits"].as_array().unwrap();
    assert_eq!(edits.len(), 1, "{edits:?}");
    assert_eq!(
        edits[0]["commit"]["id"],
        json!(stage.git(&["rev-parse", "HEAD~1"]))
    );
    assert_eq!(edits[0]["commit"]["files"], change);
}

/// Turns of every ending can be taken back, also by a process that has seen no init; a call that
/// is sent again is answered with the first one's turn.
#[tokio::test]
async fn any_turn_with_a_commit_can_be_undone_after_a_restart_and_once() {
    let mut stage = Stage::new(&[
        rule("slow", &[writes("slow.txt", "slow\n"), runs("sleep 100")]),
        rule("keep", &[writes("keep.txt", "keep\n")]),
        rule("crash", &[writes("crash.txt", "x\n"), runs("sleep 100")]),
    ])
    .await;
    let slow = stage.greenroom.begin(&stage.alice, "slow").await;
    let file = stage.at("slow.txt");
    wait_for("the file is written", || file.exists().then_some(())).await;
    // What is asked for while a turn runs comes after it.
    let path = format!("{}/undo", stage.alice.path());
    let keyed = Sent::new("POST", &path, &json!({})).header("idempotency-key", "once");
    #[expect(clippy::disallowed_methods, reason = "awaited below")]
    let undo = tokio::spawn(request(stage.greenroom.api_port, keyed.clone()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!undo.is_finished(), "it waits for its turn");
    let cancel = format!("/api/turns/{slow}/cancel");
    let cancelled = stage.greenroom.api("POST", &cancel, Value::Null).await.ok();
    assert_eq!(cancelled["result"]["status"], "cancelled");
    let mut undo = undo.await.unwrap().unwrap().ok();
    let undo = undo["result"].take();
    assert_eq!(
        (&undo["undone"], &undo["status"]),
        (&json!(slow), &json!("completed"))
    );
    assert!(!file.exists());
    stage.is_sound();
    let again = stage.greenroom.send(keyed.clone()).await.ok();
    assert_eq!(again["result"]["turnId"], undo["turnId"]);
    let head = stage.head();

    stage.greenroom = stage.greenroom.restart().await;
    let again = stage.greenroom.send(keyed).await.ok();
    assert_eq!(again["result"]["turnId"], undo["turnId"]);
    assert_eq!(stage.head(), head);
    stage.greenroom = stage.greenroom.restart().await;
    let redo = stage.does("redo", json!({})).await;
    assert_eq!(redo["redone"], json!(slow));
    assert_eq!(stage.file("slow.txt"), "slow\n");

    // A turn of a dead supervisor: it is recovered first.
    stage.turn("keep").await;
    let cut_off = stage.greenroom.begin(&stage.alice, "crash").await;
    let file = stage.at("crash.txt");
    wait_for("the file is written", || file.exists().then_some(())).await;
    stage.greenroom.kill().await;
    stage.greenroom = stage.greenroom.restart().await;
    let undo = stage.does("undo", Value::Null).await;
    assert_eq!(undo["undone"], json!(cut_off));
    let recovered = stage.greenroom.turn(&cut_off).await;
    assert_eq!(recovered["status"], "recovered", "{recovered}");
    assert_eq!(recovered["commit"]["files"][0]["path"], "crash.txt");
    assert!(!file.exists());
}

/// A key names one turn, whatever it is asked for with the second time: also a turn that stands in
/// line behind the very operation that asks.
#[tokio::test]
async fn a_key_that_a_waiting_turn_has_answers_with_that_turn() {
    let stage = Stage::new(&[
        rule(
            "first",
            &[runs("until [ -e go ]; do sleep 0.05; done; rm go")],
        ),
        rule("second", &[writes("second.txt", "second\n")]),
    ])
    .await;
    let port = stage.greenroom.api_port;
    let first = stage.greenroom.begin(&stage.alice, "first").await;
    let undo = Sent::new("POST", &format!("{}/undo", stage.alice.path()), &json!({}));
    let undo = undo.header("idempotency-key", "shared");
    #[expect(clippy::disallowed_methods, reason = "awaited below")]
    let undo = tokio::spawn(request(port, undo));
    wait_for_async("the undo waits in line", async || {
        let idle = stage.greenroom.get("/api/idle").await.text;
        idle.contains("an operation on").then_some(())
    })
    .await;
    let body = stage
        .alice
        .body(json!({"instruction": "second", "async": true}));
    let second = Sent::new("POST", "/api/execute", &body).header("idempotency-key", "shared");
    let second = stage.greenroom.send(second).await;
    assert_eq!(second.status, 202, "{}", second.text);
    std::fs::write(stage.at("go"), "").unwrap();
    let answered = undo.await.unwrap().unwrap().ok();
    assert_eq!(answered["result"]["turnId"], second.body["turnId"]);
    assert_eq!(answered["result"]["status"], "completed", "{answered}");
    assert_eq!(stage.file("second.txt"), "second\n");
    assert_eq!(stage.greenroom.turn(&first).await["status"], "completed");
    stage.is_sound();
}

#[tokio::test]
async fn renames_binaries_modes_and_long_diffs_are_shown_as_what_they_are() {
    let stage = Stage::new(&[
        rule(
            "all kinds",
            &[runs(
                "mv poem.txt song.txt && printf 'a\\0b' > photo.bin && chmod +x server.mjs && rm -r \
                 src && mkdir -p a/b && echo deep > a/b/c.txt && ln -s song.txt link",
            )],
        ),
        rule("long", &[runs("seq 1 60000 > long.txt")]),
    ])
    .await;
    let begin = stage.head();
    stage.turn("all kinds").await;
    let turn = stage.head();
    let files = json!([
        {"path": "a/b/c.txt", "status": "added", "additions": 1, "deletions": 0},
        {"path": "link", "status": "added", "additions": 1, "deletions": 0},
        {"path": "photo.bin", "status": "added", "additions": 0, "deletions": 0, "binary": true},
        {"path": "song.txt", "oldPath": "poem.txt", "status": "renamed", "additions": 0, "deletions": 0},
        {"path": "server.mjs", "status": "modified", "additions": 0, "deletions": 0},
        {"path": "src/pages/index.astro", "status": "deleted", "additions": 0, "deletions": 6},
    ]);
    let sorted = |files: &Value| {
        let mut files = files.as_array().unwrap().clone();
        files.sort_by_key(|file| file["path"].as_str().unwrap().to_owned());
        files
    };
    let history = stage.history().await;
    assert_eq!(sorted(&history[0]["commit"]["files"]), sorted(&files));
    let diff = stage.get("diff").await.ok();
    let shown = &diff["result"];
    assert_eq!(
        (&shown["from"], &shown["to"]),
        (&json!(begin), &json!(turn))
    );
    assert_eq!(sorted(&shown["files"]), sorted(&files));
    assert_eq!(shown["truncated"], false);
    let text = shown["diff"].as_str().unwrap();
    for line in [
        "rename from poem.txt",
        "rename to song.txt",
        "Binary files /dev/null and b/photo.bin differ",
        "old mode 100644",
        "new mode 100755",
        "new file mode 120000",
        "-  <h1>Pots</h1>",
        "+deep",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    // The git program takes it as it is.
    let plain = stage.greenroom.send(
        Sent::new(
            "GET",
            &format!("{}/diff?from={}", stage.alice.path(), &begin[..9]),
            &Value::Null,
        )
        .header("accept", "text/x-diff"),
    );
    let plain = plain.await;
    assert_eq!(plain.headers["content-type"], "text/x-diff; charset=utf-8");
    assert_eq!(plain.text, text);
    for (query, status, code) in [
        ("from=main", 400, "invalid_request"),
        ("to=00112233", 404, "not_found"),
        ("from=..%2f", 400, "invalid_request"),
    ] {
        stage
            .get(&format!("diff?{query}"))
            .await
            .error(status, code);
    }

    stage.turn("long").await;
    let diff = stage.get(&format!("diff?to={}", stage.head())).await.ok();
    let shown = &diff["result"];
    assert_eq!(
        (&shown["from"], &shown["truncated"]),
        (&json!(turn), &json!(true))
    );
    assert_eq!(shown["files"][0]["additions"], 60000);
    let text = shown["diff"].as_str().unwrap();
    assert!(
        text.len() < 210_000 && text.contains("\n+30000\n"),
        "{}",
        text.len()
    );
    assert_eq!(
        text.lines().next_back(),
        Some("\\ Cut here: This file has more changes.")
    );

    // All of it is taken back, and brought again; what git knows nothing of stays.
    fs::create_dir(stage.at("dist")).unwrap();
    fs::write(stage.at("dist/mine.local"), "mine").unwrap();
    stage.does("undo", json!({})).await;
    stage.does("undo", json!({})).await;
    assert_eq!(stage.git(&["diff", "--stat", &begin, "HEAD"]), "");
    assert!(!stage.at("a").exists() && !stage.at("link").exists());
    assert_eq!(
        fs::metadata(stage.at("server.mjs"))
            .unwrap()
            .permissions()
            .mode()
            & 0o111,
        0
    );
    stage.does("redo", json!({})).await;
    assert_eq!(stage.git(&["diff", "--stat", &turn, "HEAD"]), "");
    assert_eq!(
        fs::read_link(stage.at("link")).unwrap().to_str(),
        Some("song.txt")
    );
    let restore = stage.does("restore", json!({"commit": begin})).await;
    assert_eq!(restore["restored"], json!(begin));
    let undo = stage.does("undo", json!({})).await;
    assert_eq!(undo["undone"], restore["turnId"]);
    assert_eq!(stage.git(&["diff", "--stat", &turn, "HEAD"]), "");
    assert_eq!(stage.file("dist/mine.local"), "mine");
}

#[tokio::test]
async fn the_history_comes_in_pages_and_reads_older_journals() {
    let mut stage = Stage::new(&[changes("A1", 1, "A"), changes("B1", 5, "B")]).await;
    let a1 = stage.turn("A1").await;
    let b1 = stage.turn("B1").await;
    let undo = stage.does("undo", json!({"turnId": a1})).await;
    let undo = undo["turnId"].as_str().unwrap().to_owned();
    let page = async |stage: &Stage, query: &str| -> Vec<String> {
        let answer = stage.get(&format!("history?{query}")).await.ok();
        let turns = answer["result"]["turns"].as_array().unwrap();
        let ids = turns
            .iter()
            .map(|turn| turn["turnId"].as_str().unwrap().to_owned());
        ids.collect()
    };
    assert_eq!(page(&stage, "limit=2").await, [undo.clone(), b1.clone()]);
    assert_eq!(
        page(&stage, &format!("limit=2&before={b1}")).await,
        [a1.as_str()]
    );
    assert_eq!(
        page(&stage, &format!("before={a1}")).await,
        Vec::<String>::new()
    );
    let older = stage.get(&format!("history?before={b1}")).await.ok();
    assert_eq!(older["result"]["turns"][0]["undoneBy"], json!(undo));
    for query in [
        "limit=0",
        "limit=201",
        "limit=x",
        "before=acme~alice~other~0",
    ] {
        let answer = stage.get(&format!("history?{query}")).await;
        assert!(
            (400..500).contains(&answer.status),
            "{query}: {}",
            answer.text
        );
    }

    // Journals from before there were kinds.
    assert_eq!(stage.greenroom.stop().await.code(), Some(0));
    let turns = stage
        .folders
        .user(&stage.alice)
        .join(".greenroom/threads/main/turns");
    for entry in fs::read_dir(turns).unwrap().map(Result::unwrap) {
        let text = fs::read_to_string(entry.path()).unwrap();
        fs::write(entry.path(), text.replace("\"kind\":\"turn\",", "")).unwrap();
    }
    stage.greenroom = stage.greenroom.restart().await;
    let kinds: Vec<Value> = stage
        .history()
        .await
        .iter()
        .map(|row| row["kind"].clone())
        .collect();
    assert_eq!(kinds, ["undo", "turn", "turn"]);
    let undone = stage.does("undo", json!({})).await;
    assert_eq!(undone["undone"], json!(b1));
    assert_eq!(stage.file("poem.txt"), poem());
}

/// Killed at any moment of an undo, the thread is at the state before it or after it, never
/// between, and the history says which.
#[tokio::test]
async fn a_kill_in_an_undo_is_all_or_nothing() {
    const ROUNDS: usize = 8;
    let mut stage = Stage::new(&[rule(
        "many",
        &[runs(
            "sed -i 's/^line 1$/first of A/' poem.txt; for i in $(seq 300); do echo $i > f$i.txt; done",
        )],
    )])
    .await;
    let without = stage.head();
    stage.turn("many").await;
    let with = stage.head();
    let mut applied = 0;
    let begun = Instant::now();
    stage.does("undo", json!({})).await;
    stage.does("redo", json!({})).await;
    let took = begun.elapsed() / 2;
    // A busy machine may need more time than was measured: until some got through.
    for round in 0..ROUNDS * 5 {
        if round >= ROUNDS && applied > 0 {
            break;
        }
        let is_undone = stage
            .history()
            .await
            .iter()
            .any(|row| row["instruction"] == "many" && row["undoneBy"].is_string());
        let what = if is_undone { "redo" } else { "undo" };
        let before = stage.head();
        let path = format!("{}/{what}", stage.alice.path());
        let asked = request(
            stage.greenroom.api_port,
            Sent::new("POST", &path, &json!({})),
        );
        #[expect(clippy::disallowed_methods, reason = "it ends with the program")]
        let asked = tokio::spawn(asked);
        tokio::time::sleep(took * u32::try_from(round + 1).unwrap() / 6).await;
        stage.greenroom.kill().await;
        asked.abort();
        stage.greenroom = stage.greenroom.restart().await;
        stage.greenroom.init(&stage.alice, json!({})).await.ok();
        stage.is_sound();

        let newest = stage.history().await[0].clone();
        if stage.head() == before {
            assert_ne!(
                newest["kind"],
                json!(what),
                "what was accepted is carried out"
            );
        } else {
            applied += 1;
            assert_eq!(
                (&newest["kind"], &newest["status"]),
                (&json!(what), &json!("completed"))
            );
            assert_eq!(newest["commit"]["id"], json!(stage.head()));
            let now = if is_undone { &with } else { &without };
            assert_eq!(stage.git(&["diff", "--stat", now, "HEAD"]), "");
            let id = newest["turnId"].as_str().unwrap();
            let events = stage.greenroom.events(id, 0).await.all().await;
            let commits = events.iter().filter(|event| event.name == "commit.created");
            assert_eq!(commits.count(), 1);
        }
    }
    assert!(applied > 0, "some got through");
}

#[tokio::test]
async fn another_container_s_thread_is_not_touched() {
    let stage = Stage::new(&[changes("A1", 1, "A")]).await;
    let a1 = stage.turn("A1").await;
    let options = stage.greenroom.options.clone();
    let second = TestGreenroom::start(options.env("TMPDIR", stage.folders.join("home"))).await;
    for (what, body) in [
        ("undo", json!({"turnId": a1})),
        ("redo", json!({})),
        ("restore", json!({"commit": stage.head()})),
    ] {
        let path = format!("{}/{what}", stage.alice.path());
        let answer = second.api("POST", &path, body).await;
        answer.error(409, "thread_busy_elsewhere");
    }
    let answer = second.api("DELETE", &stage.alice.path(), Value::Null).await;
    answer.error(409, "thread_busy_elsewhere");
    // Looking is free.
    let path = format!("{}/diff", stage.alice.path());
    let diff = second.get(&path).await.ok();
    assert_eq!(diff["result"]["files"][0]["path"], "poem.txt");
    stage.is_sound();
}

#[tokio::test]
async fn the_preview_follows_an_undo() {
    let stage = Stage::with(
        &[rule(
            "Hello",
            &[runs("sed -i s/Pots/Hello/ src/pages/index.astro")],
        )],
        Options::previews,
    )
    .await;
    let page = async || {
        let sent = Sent::new("GET", "/", &Value::Null).header("accept", "text/html");
        request(stage.greenroom.preview_port, sent)
            .await
            .unwrap()
            .text
    };
    stage.turn("Hello").await;
    assert!(page().await.contains("<h1>Hello</h1>"), "{}", page().await);
    let undo = stage.does("undo", json!({})).await;
    assert_eq!(undo["preview"]["state"], "live");
    assert!(page().await.contains("<h1>Pots</h1>"), "{}", page().await);
}

#[tokio::test]
async fn a_thread_is_taken_away_with_nothing_lost() {
    let stage = Stage::with(&[changes("A1", 1, "A")], Options::previews).await;
    let a1 = stage.turn("A1").await;
    fs::write(stage.at("by-hand.txt"), "by hand\n").unwrap();
    fs::write(stage.at("secret.pem"), "not really\n").unwrap();
    symlink("/etc", stage.at("etc")).unwrap();
    let path = stage.alice.path();
    let answer = stage.greenroom.api("DELETE", &path, Value::Null).await;
    assert_eq!(
        answer.body["files"][0]["path"], "secret.pem",
        "{}",
        answer.text
    );
    answer.error(409, "held_back");
    assert!(stage.at("secret.pem").exists());
    // It goes on as if nothing had been.
    stage
        .greenroom
        .execute(&stage.alice, "What is this?")
        .await
        .ok();
    let bad = stage
        .greenroom
        .api("DELETE", &format!("{path}?discard=perhaps"), Value::Null)
        .await;
    bad.error(400, "invalid_request");

    let project = stage.folders.user(&stage.alice).join("project");
    let removed = format!("{path}?discard=true");
    let answer = stage
        .greenroom
        .api("DELETE", &removed, Value::Null)
        .await
        .ok();
    assert_eq!(answer["result"]["branchRemoved"], false);
    assert!(!stage.folders.worktree(&stage.alice).exists());
    let branch = stage.alice.branch();
    assert_eq!(
        git(&project, &["show", &format!("{branch}:by-hand.txt")]),
        "by hand"
    );
    assert_eq!(git(&project, &["worktree", "list"]).lines().count(), 1);
    git(&project, &["fsck", "--strict", "--no-dangling"]);
    let threads = stage.folders.user(&stage.alice).join("threads");
    assert_eq!(
        fs::read_dir(threads).unwrap().count(),
        0,
        "nothing is left over"
    );
    assert!(PathBuf::from("/etc/passwd").exists());
    for what in ["", "/history", "/diff", "/preview"] {
        stage
            .greenroom
            .get(&format!("{path}{what}"))
            .await
            .error(404, "not_found");
    }
    stage.ask("undo", json!({})).await.error(404, "not_found");
    stage
        .greenroom
        .api("DELETE", &path, Value::Null)
        .await
        .error(404, "not_found");
    let list = stage
        .greenroom
        .get("/api/threads?clientId=acme&userId=alice")
        .await
        .ok();
    assert_eq!(list["result"], json!([]));
    let preview = request(
        stage.greenroom.preview_port,
        Sent::new("GET", "/", &Value::Null),
    )
    .await;
    assert!(preview.unwrap().status >= 400);

    // Made anew it has its branch, and what was there before.
    let again = stage.greenroom.init(&stage.alice, json!({})).await.ok();
    assert_eq!(again["resumed"], true);
    assert!(stage.at("by-hand.txt").exists() && !stage.at("secret.pem").exists());
    let undo = stage.does("undo", json!({})).await;
    assert_eq!(undo["undone"], json!(a1));

    let gone = stage.head();
    let removed = format!("{path}?branch=true");
    let answer = stage
        .greenroom
        .api("DELETE", &removed, Value::Null)
        .await
        .ok();
    assert_eq!(answer["result"]["branchRemoved"], true);
    assert_eq!(git(&project, &["branch", "--list", &branch]), "");
    assert_eq!(
        git(&project, &["cat-file", "-t", &gone]),
        "commit",
        "an operator finds it"
    );
    let again = stage.greenroom.init(&stage.alice, json!({})).await.ok();
    assert_eq!(again["resumed"], false);
    assert_eq!(stage.history().await, Vec::<Value>::new());
    assert_eq!(stage.file("poem.txt"), poem());
}
