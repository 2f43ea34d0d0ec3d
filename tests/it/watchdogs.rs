//! Every way in which the CLI goes wrong, acted out by a stand-in: each ends with its outcome, its
//! edits committed, nothing left running, and the thread goes on.

use std::{
    fs,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, Who, git, processes_below, wait_for, who,
};

/// The program with stand-ins as its agents, and the thread `acme/alice/main`.
struct Stage {
    folders: Folders,
    greenroom: TestGreenroom,
    alice: Who,
}

impl Stage {
    async fn new() -> Self {
        Self::with(|options| options).await
    }

    async fn with(adapt: impl FnOnce(Options) -> Options) -> Self {
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let greenroom = TestGreenroom::start(adapt(Options::new(&folders).acting())).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            folders,
            greenroom,
            alice,
        }
    }

    /// Runs a script to its end: the turn's result.
    async fn play(&self, script: &str) -> Value {
        let id = self.greenroom.begin(&self.alice, script).await;
        self.greenroom.ended(&id).await
    }

    fn has(&self, file: &str) -> bool {
        self.folders.worktree(&self.alice).join(file).exists()
    }

    async fn cancel(&self, id: &str) -> Value {
        let path = format!("/api/turns/{id}/cancel");
        let answer = self.greenroom.api("POST", &path, Value::Null).await;
        answer.ok()["result"].take()
    }

    /// What runs of the thread, but its idle agent and wardens.
    fn commands(&self) -> Vec<String> {
        let running = processes_below(&self.folders.worktree(&self.alice));
        running
            .into_iter()
            .map(|process| process.command)
            .filter(|command| !command.contains("--permission-prompt-tool"))
            .collect()
    }

    /// Every edit is committed and nothing runs: it was so when the outcome was told.
    fn is_settled(&self, after: &str) {
        assert_eq!(self.commands(), Vec::<String>::new(), "left by {after}");
        let status = git(
            self.folders.worktree(&self.alice),
            &["status", "--porcelain"],
        );
        assert_eq!(status, "", "after {after}");
    }

    /// The conversation goes on.
    async fn goes_on(&self, after: &str) {
        let result = self.play("recall\nwrite next.txt x").await;
        assert_eq!(result["status"], "completed", "after {after}: {result}");
        assert_eq!(result["text"], "Done.", "after {after}");
        let result = self.play("recall").await;
        assert_eq!(result["text"], "You told me: Rex.", "after {after}");
        assert_eq!(result["continuity"], "native", "after {after}");
        self.is_settled(after);
    }

    fn log_holds(&self, text: &str) -> bool {
        self.greenroom.log().iter().any(|line| line.contains(text))
    }
}

fn paths(result: &Value) -> Vec<&str> {
    let files = result["commit"]["files"].as_array();
    files
        .into_iter()
        .flatten()
        .filter_map(|file| file["path"].as_str())
        .collect()
}

#[tokio::test]
async fn a_stand_in_makes_a_turn() {
    let stage = Stage::new().await;
    let script = "remember Rex\nwrite a.txt one\\n\nappend a.txt two\\n\n\
                  run echo three >> a.txt\ntext All done.";
    let result = stage.play(script).await;
    assert_eq!(result["text"], "All done.");
    assert_eq!(paths(&result), ["a.txt"]);
    assert_eq!(result["processesLeft"], false);
    let file = stage.folders.worktree(&stage.alice).join("a.txt");
    assert_eq!(fs::read_to_string(file).unwrap(), "one\ntwo\nthree\n");
    stage.goes_on("a turn").await;
}

#[tokio::test]
async fn whatever_the_agent_does_its_turn_ends_and_the_next_one_works() {
    const OK: Result<&str, &str> = Ok("Done.");
    let again = |what| Err::<&str, &str>(what);
    let stage = Stage::new().await;
    stage.play("remember Rex").await;
    let table = [
        ("exit 3", again("exit status 3")),
        ("exit 0", again("exit status 0")),
        ("die", again("signal 9")),
        ("half-line\nexit 1", again("exit status 1")),
        ("half-line\ndie", again("signal 9")),
        ("close-stdout", again("stopped talking")),
        ("break", again("could not finish")),
        ("fail 400", again("status 400")),
        ("fail 401", again("ANTHROPIC_API_KEY")),
        ("fail 404", again("model")),
        ("fail 413", again("new thread")),
        ("fail 429", again("limits the rate")),
        ("fail 500", again("overloaded or down")),
        ("fail 529", again("overloaded or down")),
        ("retry 401 60000", again("ANTHROPIC_API_KEY")),
        ("retry 529 30", OK),
        ("retry 429 30\nfail 429", again("limits the rate")),
        ("long-line 50", OK),
        ("flood-stderr 50", OK),
        ("flood-stderr 1\nexit 1", again("exit status 1")),
        ("unknown-event", OK),
        ("unknown-request", OK),
        ("result-twice", OK),
        // The half of a line eats what the next one tells, and no more.
        ("half-line\ntext Done.", OK),
        (
            "leave while :; do date >> left.txt; sleep 0.02; done\nrun sleep 0.1",
            OK,
        ),
        ("leave sleep 300\nexit 1", again("exit status 1")),
        ("leave sleep 300\ndie", again("signal 9")),
        ("leave sleep 300\nfail 400", again("status 400")),
        ("permit touch permitted.txt", OK),
    ];
    for (index, (act, expected)) in table.into_iter().enumerate() {
        let file = format!("before-{index}.txt");
        let result = stage.play(&format!("write {file} x\n{act}")).await;
        assert!(paths(&result).contains(&file.as_str()), "{act}: {result}");
        match expected {
            Ok(text) => {
                assert_eq!(result["status"], "completed", "{act}: {result}");
                assert_eq!(result["text"], text, "{act}");
            }
            Err(part) => {
                assert_eq!(result["status"], "failed", "{act}: {result}");
                assert_eq!(result["code"], "agent_failed", "{act}");
                let sentence = result["error"].as_str().unwrap();
                assert!(sentence.contains(part), "{act}: {sentence}");
            }
        }
        assert_eq!(result["processesLeft"], false, "{act}");
        // What was used is told, also where no result told it.
        let output = result["usage"]["outputTokens"].as_u64().unwrap();
        assert!(output >= 20, "{act}: {}", result["usage"]);
        stage.is_settled(act);
        let result = stage.play("recall").await;
        assert_eq!(result["text"], "You told me: Rex.", "after {act}: {result}");
        assert_eq!(result["continuity"], "native", "after {act}");
    }
    assert!(stage.has("permitted.txt"));
}

#[tokio::test]
async fn the_cost_of_a_turn_is_its_own_also_after_a_restart() {
    let mut stage = Stage::new().await;
    let cost = |result: &Value| result["usage"]["costUsd"].as_f64().unwrap();
    let is = |result: &Value, dollars: f64| {
        assert!((cost(result) - dollars).abs() < 1e-9, "{}", result["usage"]);
    };
    is(&stage.play("write a.txt x").await, 0.002);
    is(&stage.play("text hello").await, 0.001);
    // The agent's process ends in peace, and tells the next one what it all cost.
    assert_eq!(stage.greenroom.stop().await.code(), Some(0));
    stage.greenroom = stage.greenroom.restart().await;
    is(&stage.play("text hello").await, 0.001);
}

#[tokio::test]
async fn a_turn_that_nobody_asked_for_is_stopped_and_is_not_the_next_one() {
    let stage = Stage::new().await;
    stage.play("remember Rex").await;

    // Between turns.
    let result = stage.play("self-turn 1 touch own.txt; sleep 300").await;
    assert_eq!(result["text"], "Done.");
    wait_for("it is noticed", || {
        stage.log_holds("started a turn by itself").then_some(())
    })
    .await;
    wait_for("its command ends", || {
        stage.commands().is_empty().then_some(())
    })
    .await;
    let result = stage.play("text Mine.").await;
    assert_eq!(result["text"], "Mine.");
    assert_eq!(result["numTurns"], 1);

    // While ours waits for its turn.
    for delay in [0, 5, 20, 40] {
        stage.play(&format!("self-turn {delay} sleep 300")).await;
        let result = stage.play("write mine.txt x\ntext Mine.").await;
        assert_eq!(result["status"], "completed", "{result}");
        assert_eq!(result["text"], "Mine.");
        // It may have begun after ours was over, and is ended then as above.
        wait_for("its command ends", || {
            stage.commands().is_empty().then_some(())
        })
        .await;
        stage.is_settled("a turn of its own");
    }
    stage.goes_on("turns of its own").await;

    // One that does not stop costs the process, and nothing else. It begins long after our own turn
    // was cleaned up, which would end its command, and so it.
    stage.play("stubborn\nself-turn 3000 sleep 300").await;
    wait_for("it is noticed", || {
        stage.log_holds("does not stop").then_some(())
    })
    .await;
    stage.goes_on("a stubborn turn of its own").await;
}

#[tokio::test]
async fn an_agent_that_hears_nothing_any_more_is_replaced() {
    let stage = Stage::new().await;
    stage.play("remember Rex").await;
    let result = stage.play("write a.txt x\nresult-no-exit").await;
    assert_eq!(result["status"], "completed");
    stage.is_settled("a result without an exit");
    stage.goes_on("a result without an exit").await;
}

#[tokio::test]
async fn a_garbage_transcript_is_replaced_by_a_summary() {
    let mut stage = Stage::new().await;
    stage.play("remember Rex").await;
    assert_eq!(stage.greenroom.stop().await.code(), Some(0));
    let sessions = stage.folders.user(&stage.alice).join(".claude/sessions");
    for file in crate::support::files_below(&sessions) {
        if file.extension().is_some_and(|ext| ext == "jsonl") {
            fs::write(file, "garbage\n").unwrap();
        }
    }
    stage.greenroom = stage.greenroom.restart().await;
    let result = stage.play("write a.txt x\ntext Fine.").await;
    assert_eq!(
        (&result["status"], &result["text"]),
        (&json!("completed"), &json!("Fine."))
    );
    assert_eq!(result["continuity"], "replayed");
}

#[tokio::test]
async fn what_could_not_be_ended_is_not_denied() {
    let stage = Stage::new().await;
    let script = "leave echo $$ > left.pid; exec sleep 300\nrun while [ ! -s left.pid ]; do \
                  sleep 0.02; done; touch begun.txt; sleep 300";
    let id = stage.greenroom.begin(&stage.alice, script).await;
    wait_for("the command runs", || stage.has("begun.txt").then_some(())).await;
    let left = fs::read_to_string(stage.folders.worktree(&stage.alice).join("left.pid")).unwrap();
    let left = Pid::from_raw(left.trim().parse().unwrap());
    // Whoever would have ended it is gone.
    let running = processes_below(&stage.folders.workspace());
    let warden = running
        .iter()
        .find(|process| {
            process.command.contains(" child ") && process.command.contains("--session-id")
        })
        .unwrap_or_else(|| panic!("{running:?}"));
    kill(Pid::from_raw(warden.pid), Signal::SIGKILL).unwrap();
    let result = stage.greenroom.ended(&id).await;
    kill(left, Signal::SIGKILL).ok();
    assert_eq!(
        (&result["status"], &result["processesLeft"]),
        (&json!("failed"), &json!(true))
    );
    let sentence = result["error"].as_str().unwrap();
    assert!(sentence.contains("may still run"), "{sentence}");
    wait_for("the log tells it", || {
        stage.log_holds("does not end").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_turn_over_its_time_is_interrupted_then_terminated_then_killed() {
    let stage = Stage::new().await;
    stage.play("remember Rex").await;
    let acts = [
        ("run touch ran.txt; sleep 300", true),
        ("silent", true),
        ("stubborn\npause 300000", false),
        ("immortal\npause 300000", false),
    ];
    for (index, (act, obeys)) in acts.into_iter().enumerate() {
        let script = format!("write half.txt {index}\n{act}");
        let fields = json!({"instruction": script, "timeoutSeconds": 3});
        let answer = stage
            .greenroom
            .execute_with(&stage.alice, fields)
            .await
            .answer;
        let result = answer.body["result"].clone();
        answer.error(504, "turn_timeout");
        assert!(paths(&result).contains(&"half.txt"), "{act}: {result}");
        let usage = &result["usage"];
        assert!(
            usage["outputTokens"].as_u64().unwrap() >= 20,
            "{act}: {usage}"
        );
        assert_eq!(
            usage["costUsd"].as_f64().unwrap() > 0.0,
            obeys,
            "{act}: {usage}"
        );
        stage.goes_on(act).await;
    }
}

/// Cancels in all states, and how long their answers take.
#[tokio::test]
async fn a_cancel_ends_every_kind_of_turn() {
    const ROUNDS: usize = 4;
    let stage = Stage::new().await;
    stage.play("remember Rex").await;
    let acts = [
        // What it does, and whether an interrupt is enough.
        ("run sleep 300", true),
        ("run trap '' TERM INT; sleep 300", true),
        ("leave sleep 300\nrun sleep 300", true),
        ("pause 300000", true),
        ("silent", true),
        ("retry 529 300000", true),
        ("half-line\nsilent", true),
        ("stubborn\nsilent", false),
        ("immortal\nleave sleep 300\nsilent", false),
        ("stubborn\nclose-stdout", false),
    ];
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        for (index, (act, obeys)) in acts.into_iter().enumerate() {
            let script = format!("write ready.txt {round}-{index}\n{act}");
            let id = stage.greenroom.begin(&stage.alice, &script).await;
            // The later the round, the further the turn has come.
            if round > 0 {
                let mut events = stage.greenroom.events(&id, 0).await;
                events.until("tool.finished").await;
            }
            let begun = Instant::now();
            let result = stage.cancel(&id).await;
            times.push(begun.elapsed());
            // One whose output closes may have failed before.
            if !act.ends_with("close-stdout") {
                assert_eq!(result["status"], "cancelled", "{act}: {result}");
            }
            assert_eq!(result["processesLeft"], false, "{act}");
            if round > 0 {
                assert_eq!(paths(&result), ["ready.txt"], "{act}: {result}");
                let usage = &result["usage"];
                assert!(
                    usage["outputTokens"].as_u64().unwrap() > 0,
                    "{act}: {usage}"
                );
                if obeys {
                    assert!(usage["costUsd"].as_f64().unwrap() > 0.0, "{act}: {usage}");
                }
            }
            stage.is_settled(act);
            let last = stage.greenroom.events(&id, 0).await.all().await.pop();
            assert_eq!(last.unwrap().data["result"], result);
        }
    }
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!(
        "{} cancels: median {:?}, p90 {:?}, p99 {:?}",
        times.len(),
        at(50),
        at(90),
        at(99)
    );
    stage.goes_on("forty cancels").await;
}

#[tokio::test]
async fn a_pause_of_minutes_is_told_and_can_be_cancelled() {
    let act = |seconds: u64| json!({"status": {"status": 429, "retry_after": seconds}});
    let script = json!({"rules": [
        {"match": "minutes", "steps": [{"act": act(90)}]},
        {"match": "an hour", "steps": [{"act": act(3600)}]},
    ]});
    let api = StandIn::start(script).await;
    let stage = Stage::with(|options| options.without_rehearsal().api(&api)).await;
    stage.play("remember Rex").await;

    let id = stage
        .greenroom
        .begin(&stage.alice, "write a.txt x\nask for minutes")
        .await;
    let mut events = stage.greenroom.events(&id, 0).await;
    let waiting = events.until("turn.waiting").await.data;
    let until: jiff::Timestamp = waiting["until"].as_str().unwrap().parse().unwrap();
    let ahead = until.duration_since(jiff::Timestamp::now());
    assert!((60..=90).contains(&ahead.as_secs()), "{waiting}");
    assert!(
        waiting["reason"].as_str().unwrap().contains("rate"),
        "{waiting}"
    );
    let result = stage.cancel(&id).await;
    assert_eq!(result["status"], "cancelled");
    assert_eq!(paths(&result), ["a.txt"]);

    // Longer than the turn may take, or the agent waits: it fails at once and says until when.
    let short = json!({"instruction": "ask for minutes", "timeoutSeconds": 30});
    let long = json!({"instruction": "ask for an hour"});
    for fields in [short, long] {
        let begun = Instant::now();
        let answer = stage
            .greenroom
            .execute_with(&stage.alice, fields)
            .await
            .answer;
        let sentence = answer.error(502, "agent_failed");
        assert!(
            sentence.contains("limits the rate") && sentence.contains(" UTC"),
            "{sentence}"
        );
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    stage.goes_on("long pauses").await;
}
