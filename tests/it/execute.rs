//! `POST /api/execute` and turns, seen from outside: the real CLI on real repositories.

use std::{fs, path::Path, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, Sent, StandIn, TestGreenroom, Who, git, processes_below, rule, runs,
    stream, wait_for, who, writes,
};

const PAGE: &str = "src/pages/index.astro";

/// The program, its upstream, and the thread `acme/alice/main` of one site.
struct Stage {
    api: StandIn,
    folders: Folders,
    site: String,
    greenroom: TestGreenroom,
    alice: Who,
}

impl Stage {
    async fn new(script: Value) -> Self {
        Self::with(script, |options| options).await
    }

    async fn with(script: Value, adapt: impl FnOnce(Options) -> Options) -> Self {
        let api = StandIn::start(script).await;
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let greenroom = TestGreenroom::start(adapt(Options::new(&folders).api(&api))).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            api,
            folders,
            site,
            greenroom,
            alice,
        }
    }

    fn git(&self, args: &[&str]) -> String {
        git(self.folders.worktree(&self.alice), args)
    }

    /// Subjects of the thread's commits, newest first, without the site's own.
    fn subjects(&self) -> Vec<String> {
        let log = self.git(&["log", "--format=%s", "client/acme..HEAD"]);
        log.lines().map(str::to_owned).collect()
    }

    fn file(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.folders.worktree(&self.alice).join(path)).ok()
    }

    fn is_clean(&self) {
        assert_eq!(self.git(&["status", "--porcelain"]), "");
    }

    /// Nothing of the thread runs but its idle agent.
    async fn nothing_runs(&self, name: &str) {
        wait_for(&format!("{name} ends"), || {
            let running = processes_below(&self.folders.workspace());
            running
                .iter()
                .all(|process| !process.command.contains(name))
                .then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_turn_is_one_commit_of_exactly_its_edits() {
    let stage = Stage::new(json!({})).await;
    let before = stage.git(&["rev-parse", "HEAD"]);
    let author = json!({"name": "Alice Liddell", "email": "alice@acme.example"});
    let instruction = "Change the heading to Hello";
    let turn = stage
        .greenroom
        .execute_with(
            &stage.alice,
            json!({"instruction": instruction, "author": author}),
        )
        .await;
    let result = turn.ok();

    let id = result["turnId"].as_str().unwrap();
    assert!(id.starts_with("acme~alice~main~"), "{id}");
    assert_eq!(result["mode"], "execute");
    assert!(
        result["text"].as_str().unwrap().contains("Hello"),
        "{result}"
    );
    assert_eq!(result["continuity"], "fresh");
    assert_eq!(result["heldBack"], json!([]));
    assert_eq!(result["preview"]["state"], "off");
    assert!(result["numTurns"].as_u64().unwrap() >= 2, "{result}");
    assert!(result["durationMs"].as_u64().unwrap() > 0);
    let usage = &result["usage"];
    for name in [
        "inputTokens",
        "outputTokens",
        "cacheReadTokens",
        "cacheCreationTokens",
    ] {
        assert!(usage[name].is_u64(), "{usage}");
    }
    assert!(
        usage["outputTokens"].as_u64().unwrap() > 0 && usage["costUsd"].is_number(),
        "{usage}"
    );
    let session = result["sessionId"].as_str().unwrap();
    let context = &result["context"];
    assert_eq!(
        (&context["threadId"], &context["branch"]),
        (&json!("main"), &json!(stage.alice.branch()))
    );
    assert_eq!(context["history"][0]["instruction"], instruction);
    assert_eq!(context["history"][0]["turnId"], id);
    assert_eq!(context["plans"], json!([]));

    let commit = &result["commit"];
    assert_eq!(
        *commit,
        json!({
            "id": stage.git(&["rev-parse", "HEAD"]),
            "message": instruction,
            "files": [{"path": PAGE, "status": "modified", "additions": 1, "deletions": 1}],
        })
    );
    assert_eq!(stage.git(&["rev-parse", "HEAD~1"]), before, "one commit");
    assert_eq!(
        stage.git(&["diff", "--name-status", "HEAD~1", "HEAD"]),
        format!("M\t{PAGE}")
    );
    let patch = stage.git(&["diff", "--unified=0", "HEAD~1", "HEAD"]);
    let changed: Vec<&str> = patch
        .lines()
        .filter(|line| {
            line.starts_with(['+', '-']) && !line.starts_with("+++") && !line.starts_with("---")
        })
        .collect();
    assert_eq!(changed, ["-  <h1>Pots</h1>", "+  <h1>Hello</h1>"]);
    let format = "--format=%an <%ae>%n%cn <%ce>";
    assert_eq!(
        stage.git(&["log", "-1", format]),
        "Alice Liddell <alice@acme.example>\ngreenroom <greenroom@localhost>"
    );
    let trailers = stage.git(&["log", "-1", "--format=%(trailers:only,unfold)"]);
    let trailer = |name: &str| {
        let value = trailers
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value
            .unwrap_or_else(|| panic!("{name}: {trailers}"))
            .to_owned()
    };
    assert_eq!(trailer("Turn-Id"), id);
    assert_eq!(trailer("Thread"), "acme/alice/main");
    assert_eq!(trailer("Session-Id"), session);
    assert_eq!(trailer("Status"), "completed");
    assert!(trailer("Model").starts_with("claude-"), "{trailers}");
    trailer("Cost-USD").parse::<f64>().unwrap();
    stage.is_clean();
    // The user's branch and checkout are as they were.
    assert_eq!(stage.git(&["rev-parse", "user/acme/alice"]), before);

    // What is asked of the turn later is the same, and stands in the history.
    let mut later = stage.greenroom.turn(id).await;
    assert_eq!(later["commit"], *commit);
    assert_eq!(later["status"], "completed");
    let history = stage
        .greenroom
        .get(&format!("{}/history", stage.alice.path()))
        .await
        .ok();
    let entry = &history["result"]["turns"][0];
    assert_eq!(
        (&entry["turnId"], &entry["kind"], &entry["mode"]),
        (&json!(id), &json!("turn"), &json!("execute"))
    );
    assert_eq!(
        (&entry["instruction"], &entry["author"]),
        (&json!(instruction), &author)
    );
    assert_eq!(
        (&entry["commit"], &entry["status"]),
        (commit, &json!("completed"))
    );
    let one = stage.greenroom.get(&stage.alice.path()).await.ok();
    assert_eq!(one["result"]["head"], commit["id"]);
    let threads = stage
        .greenroom
        .get("/api/threads?clientId=acme&userId=alice")
        .await
        .ok();
    assert_eq!(threads["result"].as_array().unwrap().len(), 1);
    assert_eq!(threads["result"][0]["head"], commit["id"]);
    assert_eq!(later["durationMs"].take(), result["durationMs"]);

    // A question changes nothing, and makes no commit.
    let result = stage
        .greenroom
        .execute(&stage.alice, "What can you do?")
        .await
        .ok();
    assert_eq!(result["commit"], Value::Null);
    assert_eq!(
        stage.git(&["rev-parse", "HEAD"]),
        commit["id"].as_str().unwrap()
    );
}

#[tokio::test]
async fn edits_of_a_person_are_a_commit_of_their_own() {
    let stage = Stage::new(json!({})).await;
    let worktree = stage.folders.worktree(&stage.alice);
    fs::write(worktree.join("by-hand.txt"), "a person wrote this\n").unwrap();
    fs::remove_file(worktree.join(".gitignore")).unwrap();
    stage
        .greenroom
        .execute(&stage.alice, "Change the heading to Hello")
        .await
        .ok();
    assert_eq!(
        stage.subjects(),
        [
            "Change the heading to Hello",
            "Edits made outside of a turn"
        ]
    );
    assert_eq!(stage.git(&["diff", "--name-only", "HEAD~1", "HEAD"]), PAGE);
    assert_eq!(
        stage.git(&["diff", "--name-status", "HEAD~2", "HEAD~1"]),
        "D\t.gitignore\nA\tby-hand.txt"
    );
    let trailers = stage.git(&["log", "-1", "--format=%(trailers:only)", "HEAD~1"]);
    assert!(!trailers.contains("Turn-Id"), "{trailers}");
    stage.is_clean();
}

#[tokio::test]
async fn a_conversation_goes_on_over_turns_restarts_and_a_killed_agent() {
    let mut stage = Stage::new(json!({})).await;
    let told = "Remember that our dog is called Rex";
    let first = stage.greenroom.execute(&stage.alice, told).await.ok();
    let recall = async |greenroom: &TestGreenroom, alice: &Who| {
        let result = greenroom
            .execute(alice, "What is our dog called?")
            .await
            .ok();
        assert_eq!(result["text"], "You told me: our dog is called Rex.");
        assert_eq!(result["continuity"], "native");
        assert_eq!(result["sessionId"], first["sessionId"]);
    };
    recall(&stage.greenroom, &stage.alice).await;

    stage.greenroom = stage.greenroom.restart().await;
    // No init in this process: execute needs none.
    recall(&stage.greenroom, &stage.alice).await;

    // What it starts is called as it is for a moment.
    let agent = wait_for("one warm agent", || {
        let agents = claude_below(&stage.folders.workspace());
        (agents.len() == 1).then(|| agents[0])
    })
    .await;
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    recall(&stage.greenroom, &stage.alice).await;

    // With its transcript gone the conversation goes on from a summary, and says so.
    assert_eq!(stage.greenroom.stop().await.code(), Some(0));
    let sessions = stage
        .folders
        .user(&stage.alice)
        .join(".claude/sessions/main/projects");
    fs::remove_dir_all(sessions).unwrap();
    stage.greenroom = stage.greenroom.restart().await;
    let result = stage
        .greenroom
        .execute(&stage.alice, "Change the heading to Rex")
        .await
        .ok();
    assert_eq!(result["continuity"], "replayed");
    assert_ne!(result["sessionId"], first["sessionId"]);
}

fn claude_below(workspace: &Path) -> Vec<i32> {
    let running = processes_below(workspace);
    let agents = running
        .iter()
        .filter(|process| process.is_program("claude"));
    agents.map(|process| process.pid).collect()
}

#[tokio::test]
async fn a_plan_changes_nothing() {
    let script = json!({"rules": [
        rule("sneak", &[
            writes("sneaked.txt", "x\n"),
            runs("touch sneaked-too.txt"),
            runs("node -e \"require('fs').writeFileSync('sneaked-three.txt', '')\""),
        ]),
    ]});
    let stage = Stage::new(script).await;
    let before = stage.git(&["rev-parse", "HEAD"]);
    for instruction in ["Change the heading to Planned", "sneak"] {
        let fields = json!({"instruction": instruction, "mode": "plan"});
        let result = stage
            .greenroom
            .execute_with(&stage.alice, fields)
            .await
            .ok();
        assert_eq!(
            (&result["mode"], &result["commit"]),
            (&json!("plan"), &Value::Null)
        );
        assert_eq!(
            result["context"]["plans"]
                .as_array()
                .unwrap()
                .last()
                .unwrap()["instruction"],
            instruction
        );
        stage.is_clean();
        assert_eq!(stage.git(&["rev-parse", "HEAD"]), before);
    }
    // The same agent may write again in the next turn.
    let result = stage
        .greenroom
        .execute(&stage.alice, "Change the heading to Done")
        .await
        .ok();
    assert!(result["commit"].is_object());
    assert_eq!(result["continuity"], "native");
}

#[tokio::test]
async fn turns_of_a_thread_wait_in_line() {
    let slow = json!({"rules": [
        rule("first", &[runs("until [ -e go ]; do sleep 0.05; done; rm go; echo 1 > 1.txt")]),
        rule("second", &[writes("2.txt", "2\n")]),
        rule("third", &[writes("3.txt", "3\n")]),
    ]});
    let stage = Stage::with(slow, |options| options.env("MAX_QUEUED_TURNS", "2")).await;
    let first = stage.greenroom.begin(&stage.alice, "first").await;
    let mut events = stage.greenroom.events(&first, 0).await;
    events.until("turn.started").await;
    let second = stage.greenroom.begin(&stage.alice, "second").await;
    let third = stage.greenroom.begin(&stage.alice, "third").await;
    let fields = stage.alice.body(json!({"instruction": "fourth"}));
    let refused = stage.greenroom.api("POST", "/api/execute", fields).await;
    assert!(refused.headers.contains_key("retry-after"));
    refused.error(429, "queue_full");
    for (id, position) in [(&second, 1), (&third, 2)] {
        let queued = stage.greenroom.events(id, 0).await.next().await.unwrap();
        assert_eq!((queued.name.as_str(), queued.id), ("turn.queued", 1));
        assert_eq!(queued.data, json!({"position": position, "turnId": id}));
    }
    assert_eq!(stage.greenroom.turn(&third).await["status"], "queued");
    assert_eq!(stage.greenroom.turn(&first).await["status"], "running");
    let health = stage.greenroom.get("/health").await.body;
    assert_eq!(health["activeTurns"], 1, "{health}");
    fs::write(stage.folders.worktree(&stage.alice).join("go"), "").unwrap();
    for id in [&first, &second, &third] {
        assert_eq!(stage.greenroom.ended(id).await["status"], "completed");
    }
    assert_eq!(stage.subjects(), ["third", "second", "first"]);
    let history = stage
        .greenroom
        .get(&format!("{}/history", stage.alice.path()))
        .await
        .ok();
    let ids = history["result"]["turns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|turn| &turn["turnId"]);
    assert_eq!(ids.collect::<Vec<_>>(), [&third, &second, &first]);
}

#[tokio::test]
async fn turns_of_two_threads_run_side_by_side() {
    let stage = Stage::new(json!({})).await;
    let other = who("acme", "alice", "other");
    stage.greenroom.init(&other, json!({})).await.ok();
    // Neither ends by itself before the other was asked for at the API: they overlap, or this
    // never gets on.
    let one = stage
        .greenroom
        .begin(&stage.alice, "Think slowly for 300 seconds about one")
        .await;
    let two = stage
        .greenroom
        .begin(&other, "Think slowly for 300 seconds about two")
        .await;
    wait_for("both are being answered", || {
        let open = |text| {
            let requests = stage.api.requests_about(text);
            requests.iter().any(|request| request.ended.is_none())
        };
        (open("about one") && open("about two")).then_some(())
    })
    .await;
    let health = stage.greenroom.get("/health").await.body;
    assert_eq!(health["activeTurns"], 2);
    let running = stage.greenroom.get(&other.path()).await.ok();
    assert_eq!(running["result"]["runningTurn"], two);

    for id in [&one, &two] {
        // Once cancelled, always cancelled.
        for _ in 0..2 {
            let answer = stage
                .greenroom
                .api("POST", &format!("/api/turns/{id}/cancel"), Value::Null)
                .await;
            assert_eq!(answer.ok()["result"]["status"], "cancelled");
        }
    }
    wait_for("the upstream is left", || {
        stage
            .api
            .requests()
            .iter()
            .all(|request| request.ended.is_some())
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_turn_that_is_cancelled_keeps_its_edits() {
    let script = json!({"rules": [
        rule("cancel me", &[
            writes("half.txt", "half\n"),
            runs("touch begun.txt; sleep 300"),
        ]),
        rule("waits", &[writes("never.txt", "x\n")]),
    ]});
    let stage = Stage::new(script).await;
    let running = stage.greenroom.begin(&stage.alice, "cancel me").await;
    let waiting = stage.greenroom.begin(&stage.alice, "waits").await;
    wait_for("the command runs", || stage.file("begun.txt")).await;
    let cancel = async |id: &str| {
        let answer = stage
            .greenroom
            .api("POST", &format!("/api/turns/{id}/cancel"), Value::Null)
            .await;
        answer.ok()["result"].take()
    };
    let result = cancel(&waiting).await;
    assert_eq!(
        (&result["status"], &result["commit"]),
        (&json!("cancelled"), &Value::Null)
    );
    let result = cancel(&running).await;
    assert_eq!(result["status"], "cancelled");
    let files: Vec<_> = result["commit"]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| &f["path"])
        .collect();
    assert_eq!(files, ["begun.txt", "half.txt"]);
    stage.is_clean();
    stage.nothing_runs("sleep").await;
    let trailers = stage.git(&["log", "-1", "--format=%(trailers:only)"]);
    assert!(trailers.contains("Status: cancelled"), "{trailers}");
    let last = stage
        .greenroom
        .events(&running, 0)
        .await
        .all()
        .await
        .pop()
        .unwrap();
    assert_eq!(last.name, "turn.cancelled");
    // The thread goes on.
    stage
        .greenroom
        .execute(&stage.alice, "Change the heading to After")
        .await
        .ok();
    assert_eq!(stage.file("never.txt"), None);
}

#[tokio::test]
async fn a_turn_over_its_time_is_stopped_and_keeps_its_edits() {
    let script = json!({"rules": [
        rule("too long", &[
            writes("half.txt", "half\n"),
            runs("setsid sleep 301 & sleep 300"),
        ]),
    ]});
    let stage = Stage::new(script).await;
    // A slow machine needs longer until anything is written.
    let mut body = Value::Null;
    for seconds in [4, 20, 60] {
        let fields = json!({"instruction": "too long", "timeoutSeconds": seconds});
        let answer = stage
            .greenroom
            .execute_with(&stage.alice, fields)
            .await
            .answer;
        body = answer.body.clone();
        let sentence = answer.error(504, "turn_timeout");
        assert!(sentence.contains(&format!("{seconds} s")), "{sentence}");
        if body["result"]["commit"].is_object() {
            break;
        }
    }
    let result = &body["result"];
    assert_eq!(body["turnId"], result["turnId"]);
    assert_eq!(
        (&result["status"], &result["code"]),
        (&json!("failed"), &json!("turn_timeout"))
    );
    assert_eq!(result["commit"]["files"][0]["path"], "half.txt");
    stage.is_clean();
    stage.nothing_runs("sleep").await;
    let later = stage
        .greenroom
        .turn(result["turnId"].as_str().unwrap())
        .await;
    assert_eq!(
        (&later["status"], &later["code"]),
        (&json!("failed"), &json!("turn_timeout"))
    );
    let result = stage
        .greenroom
        .execute(&stage.alice, "Change the heading to After")
        .await
        .ok();
    assert_eq!(result["commit"]["files"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_wrong_credential_fails_at_once_and_keeps_edits() {
    let script = json!({"rules": [{"match": "expires", "steps": [
        {"tool": {"name": "Write", "input": {"file_path": "{cwd}/half.txt", "content": "half\n"}}},
        {"act": {"status": {"status": 401}}},
    ]}]});
    let stage = Stage::new(script).await;
    let begun = std::time::Instant::now();
    let answer = stage
        .greenroom
        .execute(&stage.alice, "expires")
        .await
        .answer;
    assert!(
        begun.elapsed() < Duration::from_secs(100),
        "the CLI alone tries for three minutes"
    );
    let result = answer.body["result"].clone();
    let sentence = answer.error(502, "agent_failed");
    assert!(sentence.contains("credential"), "{sentence}");
    assert_eq!(result["commit"]["files"][0]["path"], "half.txt");
    stage.is_clean();
    stage
        .greenroom
        .execute(&stage.alice, "Change the heading to After")
        .await
        .ok();

    // The key is wrong from the start.
    let api = StandIn::start(json!({"wrong_keys": [crate::support::CANARY]})).await;
    let greenroom = TestGreenroom::start(stage.greenroom.options.clone().api(&api)).await;
    let bob = who("acme", "bob", "main");
    greenroom
        .init(&bob, json!({"repoUrl": stage.site}))
        .await
        .ok();
    let begun = std::time::Instant::now();
    let answer = greenroom
        .execute(&bob, "Change the heading to X")
        .await
        .answer;
    assert!(begun.elapsed() < Duration::from_secs(100));
    answer.error(502, "agent_failed");
    assert!(!api.requests().is_empty(), "it was asked");
}

#[tokio::test]
async fn events_are_the_same_live_after_and_after_a_restart() {
    let mut stage = Stage::new(json!({"rules": [
        {"match": "edit", "steps": [
            {"text": "First this.", "tool": {"name": "Write", "input": {"file_path": "{cwd}/a.txt", "content": "a\n"}}},
            {"tool": {"name": "Bash", "input": {"command": "touch b.txt", "description": "b"}}, "delay_ms": 500},
            {"text": "All of it is done now.", "chunk_delay_ms": 5},
        ]},
    ]}))
    .await;
    let id = stage.greenroom.begin(&stage.alice, "edit").await;
    let live = stage.greenroom.events(&id, 0).await.all().await;
    let names: Vec<&str> = live.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names[..2], ["turn.queued", "turn.started"]);
    assert_eq!(
        names[names.len() - 2..],
        ["commit.created", "turn.completed"]
    );
    for name in [
        "text.delta",
        "tool.started",
        "tool.finished",
        "file.changed",
    ] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    let ids: Vec<u64> = live.iter().map(|event| event.id).collect();
    assert_eq!(ids, (1..=live.len() as u64).collect::<Vec<_>>());
    assert!(live.iter().all(|event| event.data["turnId"] == id));
    let text: String = live
        .iter()
        .filter_map(|event| event.data["text"].as_str())
        .collect();
    assert!(
        text.contains("First this.") && text.contains("All of it is done now."),
        "{text}"
    );
    let touched: Vec<_> = live
        .iter()
        .filter(|e| e.name == "file.changed")
        .map(|e| (&e.data["path"], &e.data["status"]))
        .collect();
    assert_eq!(
        touched,
        [
            (&json!("a.txt"), &json!("added")),
            (&json!("b.txt"), &json!("added"))
        ]
    );
    assert_eq!(
        live.last().unwrap().data["result"],
        stage.greenroom.turn(&id).await
    );

    let after = stage.greenroom.events(&id, 0).await.all().await;
    assert_eq!(after, live);
    let half = live.len() / 2;
    assert_eq!(
        stage.greenroom.events(&id, ids[half]).await.all().await,
        live[half + 1..]
    );
    stage.greenroom = stage.greenroom.restart().await;
    assert_eq!(stage.greenroom.events(&id, 0).await.all().await, live);
    assert_eq!(
        stage.greenroom.events(&id, ids[half]).await.all().await,
        live[half + 1..]
    );
    let beyond = stage.greenroom.events(&id, 10_000).await.all().await;
    assert_eq!(beyond, []);

    // Execute itself answers in the same shape, to whoever asks for it.
    let body = stage.alice.body(json!({"instruction": "edit"}));
    let events = stream(
        stage.greenroom.api_port,
        Sent::new("POST", "/api/execute", &body),
    )
    .await;
    let events = events.all().await;
    assert_eq!(events[0].name, "turn.queued");
    assert_eq!(events.last().unwrap().name, "turn.completed");

    // A caller that goes away changes nothing.
    let mut events = stream(
        stage.greenroom.api_port,
        Sent::new("POST", "/api/execute", &body),
    )
    .await;
    let id = events.next().await.unwrap().data["turnId"]
        .as_str()
        .unwrap()
        .to_owned();
    drop(events);
    assert_eq!(stage.greenroom.ended(&id).await["status"], "completed");
}

#[tokio::test]
async fn an_idempotency_key_runs_one_turn() {
    let mut stage =
        Stage::new(json!({"rules": [rule("once", &[writes("once.txt", "x\n")])]})).await;
    let call = |who: &Who, fields: Value, key: &str| {
        Sent::new("POST", "/api/execute", &who.body(fields)).header("idempotency-key", key)
    };
    let once = json!({"instruction": "once"});
    let (a, b) = tokio::join!(
        stage.greenroom.send(call(&stage.alice, once.clone(), "k1")),
        stage.greenroom.send(call(&stage.alice, once.clone(), "k1")),
    );
    let first = a.ok();
    assert_eq!(first["result"], b.ok()["result"]);
    let id = first["result"]["turnId"].as_str().unwrap().to_owned();
    // Whatever the body, in the shape now asked for, also after a crash.
    stage.greenroom = stage.greenroom.restart().await;
    let other = json!({"instruction": "something else", "async": true});
    let again = stage.greenroom.send(call(&stage.alice, other, "k1")).await;
    assert_eq!(again.status, 202);
    assert_eq!(again.ok()["turnId"], id);
    let again = stage
        .greenroom
        .send(call(&stage.alice, once.clone(), "k1"))
        .await
        .ok();
    assert_eq!(again["result"], first["result"]);
    let events = stream(
        stage.greenroom.api_port,
        call(&stage.alice, once.clone(), "k1"),
    )
    .await;
    assert_eq!(
        events.all().await.last().unwrap().data["result"],
        first["result"]
    );
    assert_eq!(stage.subjects(), ["once"]);
    assert_eq!(stage.api.requests_about("something else").len(), 0);
    // Its scope is the thread; another key is another turn.
    let two = who("acme", "alice", "two");
    stage.greenroom.init(&two, json!({})).await.ok();
    for sent in [
        call(&two, once.clone(), "k1"),
        call(
            &stage.alice,
            json!({"instruction": "What can you do?"}),
            "k2",
        ),
    ] {
        let answer = stage.greenroom.send(sent).await.ok();
        assert_ne!(answer["result"]["turnId"], id);
    }
    for bad in ["x".repeat(256), "ä".to_owned()] {
        let refused = stage
            .greenroom
            .send(call(&stage.alice, once.clone(), &bad))
            .await;
        refused.error(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_killed_supervisor_loses_nothing() {
    let script = json!({"rules": [
        rule("cut off", &[
            writes("half.txt", "half\n"),
            runs("touch begun.txt; sleep 300"),
        ]),
        rule("in line", &[writes("later.txt", "later\n")]),
    ]});
    let mut stage = Stage::new(script).await;
    let cut = stage.greenroom.begin(&stage.alice, "cut off").await;
    let waiting = stage.greenroom.begin(&stage.alice, "in line").await;
    wait_for("the command runs", || stage.file("begun.txt")).await;
    stage.greenroom = stage.greenroom.restart().await;
    stage.nothing_runs("sleep").await;

    let answer = stage.greenroom.init(&stage.alice, json!({})).await.ok();
    assert_eq!(answer["resumed"], true);
    let result = stage.greenroom.turn(&cut).await;
    assert_eq!(result["status"], "recovered");
    let files: Vec<_> = result["commit"]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| &f["path"])
        .collect();
    assert_eq!(files, ["begun.txt", "half.txt"]);
    let events = stage.greenroom.events(&cut, 0).await.all().await;
    let outcomes = events
        .iter()
        .filter(|event| event.data["result"].is_object())
        .count();
    assert_eq!(
        (outcomes, events.last().unwrap().name.as_str()),
        (1, "turn.recovered")
    );
    // What was admitted and never began runs now.
    assert_eq!(stage.greenroom.ended(&waiting).await["status"], "completed");
    assert_eq!(stage.subjects(), ["in line", "cut off"]);
    let trailers = stage.git(&["log", "-1", "--format=%(trailers:only)", "HEAD~1"]);
    assert!(
        trailers.contains(&format!("Turn-Id: {cut}")) && trailers.contains("Status: recovered"),
        "{trailers}"
    );
    stage.is_clean();
    let result = stage
        .greenroom
        .execute(&stage.alice, "What can you do?")
        .await
        .ok();
    assert_eq!(result["continuity"], "native", "the transcript resumes");
    let history = result["context"]["history"].as_array().unwrap().clone();
    let statuses: Vec<_> = history
        .iter()
        .map(|entry| entry["status"].as_str().unwrap())
        .collect();
    assert_eq!(statuses, ["recovered", "completed", "completed"]);
}

#[tokio::test]
async fn those_in_line_keep_their_order_over_a_restart_and_a_failure() {
    let script = json!({"rules": [
        rule("cut off", &[runs("touch begun.txt; sleep 300")]),
        {"match": "fails", "steps": [
            {"tool": {"name": "Write", "input": {"file_path": "{cwd}/half.txt", "content": "half\n"}}},
            {"act": {"status": {"status": 400}}},
        ]},
        rule("appends", &[runs("cat order.txt half.txt > all.txt; echo one >> order.txt")]),
        rule("adds", &[runs("echo two >> order.txt")]),
    ]});
    let mut stage = Stage::new(script).await;
    let mut turns = Vec::new();
    for instruction in ["cut off", "fails", "appends", "adds"] {
        turns.push(stage.greenroom.begin(&stage.alice, instruction).await);
    }
    wait_for("the command runs", || stage.file("begun.txt")).await;
    stage.greenroom = stage.greenroom.restart().await;
    stage.greenroom.init(&stage.alice, json!({})).await.ok();
    let mut statuses = Vec::new();
    for id in &turns {
        statuses.push(stage.greenroom.ended(id).await["status"].clone());
    }
    assert_eq!(
        statuses,
        ["recovered", "failed", "completed", "completed"],
        "each has its own outcome"
    );
    assert_eq!(stage.subjects(), ["adds", "appends", "fails", "cut off"]);
    assert_eq!(stage.file("order.txt").unwrap(), "one\ntwo\n");
    assert_eq!(stage.file("all.txt").unwrap(), "half\n");
    stage.is_clean();
}

#[tokio::test]
async fn a_killed_agent_fails_its_turn_alone() {
    let script = json!({"rules": [rule("doomed", &[
        writes("half.txt", "half\n"),
        runs("touch begun.txt; sleep 300"),
    ])]});
    let stage = Stage::new(script).await;
    let doomed = stage.greenroom.begin(&stage.alice, "doomed").await;
    wait_for("the command runs", || stage.file("begun.txt")).await;
    for pid in claude_below(&stage.folders.workspace()) {
        // What it just started may be gone.
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
    }
    let result = stage.greenroom.ended(&doomed).await;
    assert_eq!(
        (&result["status"], &result["code"]),
        (&json!("failed"), &json!("agent_failed"))
    );
    assert_eq!(result["commit"]["files"].as_array().unwrap().len(), 2);
    stage.is_clean();
    stage.nothing_runs("sleep").await;
    let result = stage
        .greenroom
        .execute(&stage.alice, "Change the heading to After")
        .await
        .ok();
    assert_eq!(result["continuity"], "native");
}

#[tokio::test]
async fn secrets_in_files_are_held_back_and_kept() {
    let script = json!({"rules": [rule("secret", &[
        writes(".env", "TOKEN=canary-of-the-site\n"),
        writes("fine.txt", "fine\n"),
    ])]});
    let stage = Stage::new(script).await;
    let result = stage.greenroom.execute(&stage.alice, "secret").await.ok();
    let files: Vec<_> = result["commit"]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| &f["path"])
        .collect();
    assert_eq!(files, ["fine.txt"]);
    assert_eq!(result["heldBack"][0]["path"], ".env");
    assert!(
        result["heldBack"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("secret")
    );
    let kept = stage.folders.user(&stage.alice).join(".greenroom/held");
    let kept = kept.join(result["turnId"].as_str().unwrap()).join(".env");
    assert_eq!(
        fs::read_to_string(kept).unwrap(),
        "TOKEN=canary-of-the-site\n"
    );
    assert!(stage.file(".env").is_some());
    assert_eq!(stage.git(&["status", "--porcelain"]), "?? .env");
    assert_eq!(
        stage.git(&["log", "--all", "-S", "canary-of-the-site", "--format=%h"]),
        ""
    );
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let stage = Stage::new(json!({})).await;
    for nobody in [
        who("acme", "alice", "other"),
        who("acme", "bob", "main"),
        who("nobody", "alice", "main"),
    ] {
        stage
            .greenroom
            .execute(&nobody, "hello")
            .await
            .answer
            .error(404, "not_found");
        for path in ["", "/history", "/preview"] {
            let answer = stage
                .greenroom
                .get(&format!("{}{path}", nobody.path()))
                .await;
            answer.error(404, "not_found");
        }
        if nobody.client != "acme" || nobody.user != "alice" {
            assert!(!stage.folders.user(&nobody).exists(), "nothing was written");
        }
    }
    let id = stage
        .greenroom
        .begin(&stage.alice, "Change the heading to X")
        .await;
    stage.greenroom.ended(&id).await;
    // The same sequence under other names is no turn.
    let sequence = id.rsplit('~').next().unwrap();
    let foreign = [
        format!("acme~bob~main~{sequence}"),
        format!("acme~alice~other~{sequence}"),
        format!("acme~alice~main~{}", "0".repeat(32)),
        "acme~alice~main~..%2F..%2Fx".to_owned(),
        "..~..~..~x".to_owned(),
        sequence.to_owned(),
    ];
    for id in foreign {
        for (method, path) in [("GET", ""), ("GET", "/events"), ("POST", "/cancel")] {
            let answer = stage
                .greenroom
                .api(method, &format!("/api/turns/{id}{path}"), Value::Null)
                .await;
            answer.error(404, "not_found");
        }
    }
    let none = stage
        .greenroom
        .get("/api/threads?clientId=acme&userId=bob")
        .await
        .ok();
    assert_eq!(none["result"], json!([]));
}

#[tokio::test]
async fn a_pinned_container_serves_its_tenant_alone() {
    let stage = Stage::with(json!({}), |options| {
        options.env("CLIENT_ID", "acme").env("THREAD_ID", "main")
    })
    .await;
    let fields = json!({"userId": "alice", "instruction": "Change the heading to X"});
    stage
        .greenroom
        .api("POST", "/api/execute", fields)
        .await
        .ok();
    let globex = who("globex", "alice", "main");
    stage
        .greenroom
        .init(&globex, json!({}))
        .await
        .error(403, "not_this_tenant");
    stage
        .greenroom
        .get(&globex.path())
        .await
        .error(403, "not_this_tenant");
    let id = format!("globex~alice~main~{}", "0".repeat(32));
    stage
        .greenroom
        .get(&format!("/api/turns/{id}"))
        .await
        .error(403, "not_this_tenant");
    assert!(!stage.folders.workspace().join("globex").exists());
}
