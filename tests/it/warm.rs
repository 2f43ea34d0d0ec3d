//! An agent that stayed up between turns does what one that is started anew would.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{collections::BTreeMap, fs};

use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, git, processes_below, rule, runs, wait_for,
    who, writes,
};

/// What a script of turns leaves behind.
#[derive(Debug, PartialEq)]
struct Traces {
    results: Vec<Value>,
    costs: Vec<f64>,
    files: BTreeMap<String, String>,
    subjects: String,
    requests: Vec<Value>,
}

async fn play(adapt: impl FnOnce(Options) -> Options) -> Traces {
    let api = StandIn::start(json!({"rules": [
        rule("first", &[writes("a.txt", "one\n"), runs("wc -c < a.txt > size.txt")]),
        rule("think", &[writes("never.txt", "no\n")]),
        rule("second", &[runs("echo two >> a.txt; rm size.txt")]),
        rule("third", &[writes("b.txt", "three\n")]),
    ]}))
    .await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let greenroom = TestGreenroom::start(adapt(Options::new(&folders).api(&api))).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let (mut results, mut costs) = (Vec::new(), Vec::new());
    for fields in [
        json!({"instruction": "first"}),
        json!({"instruction": "think", "mode": "plan"}),
        json!({"instruction": "second", "model": "claude-other"}),
        json!({"instruction": "third"}),
    ] {
        let result = greenroom.execute_with(&alice, fields).await.ok();
        costs.push(result["usage"]["costUsd"].as_f64().unwrap());
        results.push(json!({
            "text": result["text"], "mode": result["mode"], "continuity": result["continuity"],
            "numTurns": result["numTurns"],
            "files": result["commit"]["files"],
            "history": result["context"]["history"].as_array().unwrap().iter().map(|entry| {
                json!([entry["instruction"], entry["text"], entry["status"], entry["mode"]])
            }).collect::<Vec<_>>(),
        }));
    }
    let worktree = folders.worktree(&alice);
    let files = ["a.txt", "b.txt", "size.txt", "never.txt"].map(|name| {
        let content = fs::read_to_string(worktree.join(name));
        (name.to_owned(), content.unwrap_or_else(|_| "none".into()))
    });
    let requests = api.requests().into_iter().map(|request| {
        json!([
            request.path,
            request.instruction,
            request.model,
            request.messages,
            request.tools
        ])
    });
    Traces {
        results,
        costs,
        files: BTreeMap::from(files),
        subjects: git(&worktree, &["log", "--format=%s"]),
        requests: requests.collect(),
    }
}

#[tokio::test]
async fn warm_and_cold_agents_leave_the_same() {
    let warm = play(|options| options).await;
    let cold = play(|options| options.env("MAX_WARM_AGENTS", "0")).await;
    assert_eq!(warm.results, cold.results);
    // To a token or two: a conversation that is read from its transcript has other ids in it.
    for (warm, cold) in warm.costs.iter().zip(&cold.costs) {
        assert!((warm - cold).abs() < warm * 0.01, "{warm} became {cold}");
    }
    assert_eq!(warm.files, cold.files);
    assert_eq!(warm.subjects, cold.subjects);
    assert_eq!(warm.requests.len(), cold.requests.len());
    for (warm, cold) in warm.requests.iter().zip(&cold.requests) {
        assert_eq!(warm, cold);
    }
    assert_eq!(warm.files["never.txt"], "none", "a plan writes nothing");
}

/// The processes of the CLI that run now.
fn agents(folders: &Folders) -> Vec<i32> {
    let below = processes_below(&folders.workspace());
    let agents = below.iter().filter(|process| process.is_program("claude"));
    agents.map(|process| process.pid).collect()
}

#[tokio::test]
async fn an_agent_that_grew_or_is_old_is_started_anew_between_turns() {
    // Every one holds more than 1 MB, and none is less than 0 minutes old; a day is neither.
    for (setting, value, is_replaced) in [
        ("WARM_AGENT_MEMORY_MB", "1", true),
        ("WARM_AGENT_MINUTES", "0.00001", true),
        ("WARM_AGENT_MINUTES", "1440", false),
    ] {
        let api = StandIn::start(json!({})).await;
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let alice = who("acme", "alice", "main");
        let options = Options::new(&folders).api(&api).env(setting, value);
        let greenroom = TestGreenroom::start(options).await;
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        // What it starts is called as it is for a moment.
        let one = || Some(agents(&folders)).filter(|agents| agents.len() == 1);
        let first = wait_for("an agent waits", one).await;
        greenroom
            .execute(&alice, "Change the heading to One")
            .await
            .ok();
        let second = if is_replaced {
            wait_for("another agent waits", || {
                let now = agents(&folders);
                (now.len() == 1 && now != first).then_some(now)
            })
            .await
        } else {
            wait_for("the agent waits", one).await
        };
        assert_eq!(second == first, !is_replaced, "{setting}={value}");
        let said = api.requests().last().unwrap().messages;
        let result = greenroom.execute(&alice, "Change the heading to Two").await;
        assert_eq!(result.ok()["continuity"], "native", "{setting}={value}");
        let goes_on = api.requests().last().unwrap().messages > said;
        assert!(goes_on, "{setting}={value}: the conversation goes on");
    }
}

#[tokio::test]
async fn no_more_agents_stay_up_than_may() {
    let api = StandIn::start(json!({})).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).api(&api).env("MAX_WARM_AGENTS", "1");
    let greenroom = TestGreenroom::start(options).await;
    for thread in ["one", "two", "three"] {
        let alice = who("acme", "alice", thread);
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        greenroom
            .execute(&alice, "Change the heading to Hello")
            .await
            .ok();
    }
    let is_one = || (agents(&folders).len() == 1).then_some(());
    wait_for("one agent is left", is_one).await;
}
