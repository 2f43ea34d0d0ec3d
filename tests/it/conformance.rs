//! The stand-in for the CLI beside the real one, through the same cases: what greenroom makes of
//! them is the same, and so is what they say by themselves. So the stand-in stays honest.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::support::{
    Folders, Options, PATIENCE, SITE, ServerEvent, StandIn, TestGreenroom, Who, acting_claude,
    files_below, processes_below, rule, runs, tools, wait_for, who, writes,
};

/// One case: what the stand-in is told, and what the API tells the real one at an instruction with
/// the case's name in it.
struct Case {
    name: &'static str,
    script: &'static str,
    steps: Value,
    fields: Value,
    /// Once there is a file `begun.txt` somebody does this.
    meddle: Meddle,
}

#[derive(Clone, Copy, PartialEq)]
enum Meddle {
    No,
    Cancel,
    /// The same, but only once the command has ended.
    CancelTalk,
    /// SIGTERM to the CLI.
    Terminate,
}

fn case(name: &'static str, script: &'static str, steps: Value) -> Case {
    Case {
        name,
        script,
        steps,
        fields: json!({}),
        meddle: Meddle::No,
    }
}

fn steps(calls: &[(&str, Value)]) -> Value {
    rule("", calls)["steps"].clone()
}

fn cases() -> Vec<Case> {
    // The real one passes over an interrupt of the moment in which its command begins, at times.
    let begins = || runs("sleep 1; touch begun.txt; sleep 300");
    let status = |status: u16| json!({"status": {"status": status}});
    vec![
        case(
            "talk only",
            "text Hello there.",
            json!([{"text": "Hello there."}]),
        ),
        case(
            "a file and a command",
            "write a.txt one\\n\nwrite new/b.txt two\nrun echo three > c.txt\ntext All done.",
            json!([
                {"tool": {"name": "Write", "input": writes("a.txt", "one\n").1}},
                {"tool": {"name": "Write", "input": writes("new/b.txt", "two").1}},
                {"tool": {"name": "Bash", "input": runs("echo three > c.txt").1}},
                {"text": "All done."},
            ]),
        ),
        case(
            "a command that fails",
            "run exit 7",
            steps(&[runs("exit 7")]),
        ),
        case(
            "a command that asks",
            "permit sh -c 'touch permitted.txt'",
            steps(&[runs("sh -c 'touch permitted.txt'")]),
        ),
        case(
            "left behind",
            "leave exec sleep 300",
            steps(&[runs("setsid sleep 300 > /dev/null 2>&1 &")]),
        ),
        case("refused", "fail 400", json!([{"act": status(400)}])),
        case("no such model", "fail 404", json!([{"act": status(404)}])),
        case(
            "tried again",
            "retry 529 1000\ntext Now.",
            json!([{"act": {"status": {"status": 529, "retry_after": 1}}, "times": 1, "text": "Now."}]),
        ),
        case("expired", "retry 401 60000", json!([{"act": status(401)}])),
        Case {
            fields: json!({"mode": "plan"}),
            ..case(
                "a plan",
                "write planned.txt x\ntext A plan.",
                json!([
                    {"tool": {"name": "Write", "input": writes("planned.txt", "x").1}},
                    {"text": "A plan."},
                ]),
            )
        },
        Case {
            fields: json!({"model": "claude-haiku-5-5"}),
            ..case("another model", "text Small.", json!([{"text": "Small."}]))
        },
        Case {
            meddle: Meddle::Cancel,
            ..case(
                "stopped at a command",
                "write half.txt x\nrun sleep 1; touch begun.txt; sleep 300",
                steps(&[writes("half.txt", "x"), begins()]),
            )
        },
        Case {
            meddle: Meddle::CancelTalk,
            ..case(
                "stopped at talk",
                "run touch begun.txt\nsilent",
                json!([{"tool": {"name": "Bash", "input": runs("touch begun.txt").1}},
                    {"act": "no_bytes"}]),
            )
        },
        Case {
            meddle: Meddle::Terminate,
            ..case(
                "terminated",
                "write half2.txt x\nrun sleep 1; touch begun.txt; sleep 300",
                steps(&[writes("half2.txt", "x"), begins()]),
            )
        },
        case(
            "after all that",
            "write after.txt x\ntext Fine.",
            json!([
                {"tool": {"name": "Write", "input": writes("after.txt", "x").1}},
                {"text": "Fine."},
            ]),
        ),
    ]
}

/// The program with one of the two as its agent.
struct Stage {
    _api: StandIn,
    folders: Folders,
    greenroom: TestGreenroom,
    alice: Who,
    is_acting: bool,
}

impl Stage {
    async fn new(is_acting: bool, cases: &[Case]) -> Self {
        let rules: Vec<Value> = cases
            .iter()
            .map(|case| json!({"match": case.name, "steps": case.steps}))
            .collect();
        let api = StandIn::start(json!({"rules": rules})).await;
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let mut options = Options::new(&folders).api(&api);
        if is_acting {
            options = options.env("CLAUDE_BIN", acting_claude());
        }
        let greenroom = TestGreenroom::start(options).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            _api: api,
            folders,
            greenroom,
            alice,
            is_acting,
        }
    }

    /// What greenroom makes of a case.
    async fn play(&self, case: &Case) -> Value {
        let begun = self.folders.worktree(&self.alice).join("begun.txt");
        std::fs::remove_file(&begun).ok();
        let mut fields = case.fields.clone();
        let script = if self.is_acting {
            case.script
        } else {
            case.name
        };
        fields["instruction"] = json!(script);
        fields["async"] = json!(true);
        let body = self.alice.body(fields);
        let answer = self.greenroom.api("POST", "/api/execute", body).await.ok();
        let id = answer["turnId"].as_str().unwrap();
        if case.meddle != Meddle::No {
            wait_for("the turn is under way", || begun.exists().then_some(())).await;
        }
        match case.meddle {
            Meddle::No => {}
            Meddle::Cancel | Meddle::CancelTalk => {
                if case.meddle == Meddle::CancelTalk {
                    let mut events = self.greenroom.events(id, 0).await;
                    events.until("tool.finished").await;
                }
                let path = format!("/api/turns/{id}/cancel");
                self.greenroom.api("POST", &path, Value::Null).await.ok();
            }
            Meddle::Terminate => {
                for process in processes_below(&self.folders.workspace()) {
                    if process.is_program("claude") || process.is_program("acting-claude") {
                        kill(Pid::from_raw(process.pid), Signal::SIGTERM).ok();
                    }
                }
            }
        }
        let events = self.greenroom.events(id, 0).await.all().await;
        let mut summary = summary(&events);
        if case.meddle == Meddle::Terminate {
            // Whether it still tells how the command ended is a matter of luck.
            let events = summary["events"].as_array_mut().unwrap();
            events.retain(|event| event["ok"] != json!(false));
        }
        summary
    }
}

/// Events and result, without what differs by its nature: ids, times, tokens, a tool's words.
fn summary(events: &[ServerEvent]) -> Value {
    let mut names: Vec<Value> = Vec::new();
    for event in events {
        let data = &event.data;
        let mut shown = json!({"event": event.name});
        for field in ["name", "ok", "path", "status", "reason"] {
            if !data[field].is_null() {
                shown[field] = data[field].clone();
            }
        }
        // In how many pieces a text comes, and how much of one that is cut, says nothing.
        if event.name != "text.delta" {
            names.push(shown);
        }
    }
    let result = &events.last().unwrap().data["result"];
    let usage = &result["usage"];
    let mut kept = json!({
        "events": names,
        "usesTokens": usage["outputTokens"].as_u64() > Some(0),
        "files": result["commit"]["files"],
    });
    for field in [
        "status",
        "code",
        "error",
        "mode",
        "continuity",
        "heldBack",
        "processesLeft",
    ] {
        kept[field] = result[field].clone();
    }
    if result["status"] == "completed" {
        kept["text"] = result["text"].clone();
        kept["numTurns"] = result["numTurns"].clone();
        // Without a result of the CLI's the cost is what the gateway counted, and the acting one asks
        // no gateway.
        kept["costs"] = json!(usage["costUsd"].as_f64() > Some(0.0));
    }
    kept
}

#[tokio::test]
async fn greenroom_makes_the_same_of_both() {
    let cases = cases();
    let real = Stage::new(false, &cases).await;
    let acting = Stage::new(true, &cases).await;
    let mut differences = Vec::new();
    for case in &cases {
        let (one, other) = tokio::join!(real.play(case), acting.play(case));
        if one != other {
            differences.push(format!("{}:\n real   {one}\n acting {other}", case.name));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// The program by itself, without greenroom.
struct Bare {
    /// With its arguments, for messages.
    name: String,
    /// The id of the last message.
    asked: String,
    /// A result that came while something else was waited for: it may overtake the answer to what ended
    /// its turn.
    result: Option<Value>,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Bare {
    fn start(program: &Path, folders: &Folders, api: &StandIn, more: &[&str]) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "a test drives the program by itself"
        )]
        let mut child = Command::new(program)
            .args([
                "-p",
                "--input-format",
                "stream-json",
                "--output-format",
                "stream-json",
            ])
            .args([
                "--verbose",
                "--include-partial-messages",
                "--setting-sources",
                "",
            ])
            .args(["--strict-mcp-config", "--permission-mode", "acceptEdits"])
            .args(["--permission-prompt-tool", "stdio", "--tools", "Write,Bash"])
            .args(more)
            .current_dir(folders.join("repos"))
            .env_clear()
            .env("HOME", folders.join("home"))
            .env("PATH", "/usr/bin:/bin")
            .env("TMPDIR", folders.join("tmp"))
            .env("CLAUDE_CONFIG_DIR", folders.join("home/config"))
            .env("ANTHROPIC_BASE_URL", api.url())
            .env("ANTHROPIC_AUTH_TOKEN", "token")
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("DISABLE_AUTOUPDATER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self {
            name: format!("{} {more:?}", program.display()),
            asked: String::new(),
            result: None,
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
        }
    }

    async fn send(&mut self, line: &str) {
        self.input
            .write_all(format!("{line}\n").as_bytes())
            .await
            .unwrap();
    }

    async fn ask(&mut self, words: &str) {
        // The real one passes over a message whose id it has seen in this conversation.
        self.asked = uuid::Uuid::new_v4().to_string();
        self.result = None;
        let line = json!({"type": "user", "uuid": self.asked,
            "message": {"role": "user", "content": [{"type": "text", "text": words}]}});
        self.send(&line.to_string()).await;
    }

    /// The next line of this type, as far as greenroom relies on it.
    async fn until(&mut self, kind: &str) -> Value {
        if kind == "result"
            && let Some(result) = self.result.take()
        {
            return result;
        }
        let read = async {
            while let Some(line) = self.output.next_line().await.unwrap() {
                // Ids are random; what matters is whose it is.
                let line = if self.asked.is_empty() {
                    line
                } else {
                    line.replace(&self.asked, "OURS")
                };
                let value: Value = serde_json::from_str(&line).unwrap();
                if value["type"] == kind {
                    return value;
                }
                if value["type"] == "result" {
                    self.result = Some(value);
                }
            }
            Value::Null
        };
        let said = timeout(PATIENCE, read).await;
        said.unwrap_or_else(|_| panic!("{} says no {kind}", self.name))
    }

    async fn init(&mut self) -> Value {
        loop {
            let line = self.until("system").await;
            if line["subtype"] == "init" || line.is_null() {
                return line;
            }
        }
    }

    async fn control(&mut self, request: Value) -> Value {
        let line = json!({"type": "control_request", "request_id": "r", "request": request});
        self.send(&line.to_string()).await;
        self.until("control_response").await["response"].take()
    }

    /// What it says until it ends by itself: lines, the end of its errors, its status.
    async fn end(mut self) -> (usize, String, Option<i32>) {
        let mut lines = 0;
        while timeout(PATIENCE, self.output.next_line())
            .await
            .unwrap()
            .unwrap()
            .is_some()
        {
            lines += 1;
        }
        let mut errors = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut errors).await.unwrap();
        let status = timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
        (lines, errors.trim().to_owned(), status.code())
    }
}

const SESSION: &str = "7b0f1f9e-6a7d-4c8f-9a51-1f2f3a4b5c6d";
const UNKNOWN: &str = "9b0f1f9e-6a7d-4c8f-9a51-1f2f3a4b5c6d";

/// What a program says by itself in cases that greenroom can't be brought to.
async fn bare(program: PathBuf, is_acting: bool) -> Vec<(&'static str, Value)> {
    let rules = json!({"rules": [
        {"match": "hello", "steps": [{"text": "Hello."}]},
        {"match": "sleep", "steps": [{"tool": {"name": "Bash", "input": runs("sleep 300").1}}]},
        {"match": "bad", "steps": [{"act": {"status": {"status": 400}}}]},
    ]});
    let api = StandIn::start(rules).await;
    let folders = Folders::new();
    std::fs::create_dir(folders.join("home/config")).unwrap();
    let start = |more: &[&str]| Bare::start(&program, &folders, &api, more);
    let words = |name: &'static str, script: &'static str| if is_acting { script } else { name };
    let hello = words("hello", "text Hello.");
    let sleep = words("sleep", "run sleep 300");
    let mut said = Vec::new();
    let keep = |value: &Value, fields: &[&str]| -> Value {
        let fields = fields
            .iter()
            .map(|field| ((*field).to_owned(), value[*field].clone()));
        Value::Object(fields.collect())
    };
    const RESULT: [&str; 9] = [
        "subtype",
        "is_error",
        "result",
        "num_turns",
        "session_id",
        "user_message_uuid",
        "terminal_reason",
        "api_error_status",
        "permission_denials",
    ];

    let mut one = start(&["--session-id", SESSION]);
    one.ask(hello).await;
    let init = one.init().await;
    said.push((
        "init",
        keep(
            &init,
            &[
                "subtype",
                "session_id",
                "user_message_uuids",
                "permissionMode",
                "model",
                "claude_code_version",
            ],
        ),
    ));
    let result = one.until("result").await;
    said.push(("result", keep(&result, &RESULT)));
    let first_cost = result["total_cost_usd"].as_f64().unwrap();
    for (name, request) in [
        (
            "plan",
            json!({"subtype": "set_permission_mode", "mode": "plan"}),
        ),
        (
            "bad mode",
            json!({"subtype": "set_permission_mode", "mode": "bogus"}),
        ),
        (
            "execute",
            json!({"subtype": "set_permission_mode", "mode": "acceptEdits"}),
        ),
        ("unknown request", json!({"subtype": "nonsense"})),
        ("idle interrupt", json!({"subtype": "interrupt"})),
    ] {
        said.push((name, one.control(request).await));
    }
    let model = one
        .control(json!({"subtype": "set_model", "model": "claude-haiku-5-5"}))
        .await;
    said.push(("another model", keep(&model, &["subtype"])));
    one.ask(sleep).await;
    let init = one.init().await;
    said.push(("its init", keep(&init, &["subtype", "model"])));
    one.until("assistant").await;
    said.push((
        "interrupt",
        one.control(json!({"subtype": "interrupt"})).await,
    ));
    // The real one passes over an interrupt of the moment in which its command begins, at times.
    let mut tries = 0;
    let result = loop {
        match timeout(PATIENCE / 30, one.until("result")).await {
            Ok(result) => break result,
            Err(_) if tries == 12 => panic!("{} says no result", one.name),
            Err(_) => {
                // Its answer is not waited for: the result of the one before may come first.
                let again = json!({"type": "control_request", "request_id": "again",
                    "request": {"subtype": "interrupt"}});
                one.send(&again.to_string()).await;
            }
        }
        tries += 1;
    };
    said.push((
        "interrupted",
        keep(
            &result,
            &["subtype", "is_error", "result", "user_message_uuid"],
        ),
    ));
    one.ask(hello).await;
    let result = one.until("result").await;
    said.push(("goes on", keep(&result, &RESULT)));
    let total = result["total_cost_usd"].as_f64().unwrap();
    assert!(total > first_cost, "cumulative");
    drop(one.input);
    let status = timeout(PATIENCE, one.child.wait()).await.unwrap().unwrap();
    said.push(("end of input", json!(status.code())));

    // What ended in peace tells the next one its cost; since the last result it is its own.
    let mut two = start(&["--resume", SESSION]);
    two.ask(hello).await;
    let result = two.until("result").await;
    said.push(("resumed", keep(&result, &RESULT)));
    let since = result["model_usage_since_last_result"].as_object().unwrap();
    let own: f64 = since
        .values()
        .map(|model| model["costUSD"].as_f64().unwrap())
        .sum();
    said.push((
        "cumulative over processes",
        json!(result["total_cost_usd"].as_f64().unwrap() > total && own < total),
    ));
    two.ask(sleep).await;
    two.until("assistant").await;
    kill(
        Pid::from_raw(two.child.id().unwrap().cast_signed()),
        Signal::SIGTERM,
    )
    .unwrap();
    said.push(("SIGTERM", json!(two.end().await.2)));
    let two = start(&["--resume", SESSION]);
    // Its signals are set once it reads; until then SIGTERM just kills it.
    let mut two = two;
    two.ask(hello).await;
    two.until("result").await;
    kill(
        Pid::from_raw(two.child.id().unwrap().cast_signed()),
        Signal::SIGTERM,
    )
    .unwrap();
    said.push(("idle SIGTERM", json!(two.end().await.2)));

    let mut three = start(&["--resume", SESSION]);
    three.ask(words("bad", "fail 400")).await;
    let result = three.until("result").await;
    said.push((
        "refused",
        keep(
            &result,
            &[
                "subtype",
                "is_error",
                "num_turns",
                "api_error_status",
                "terminal_reason",
                "user_message_uuid",
            ],
        ),
    ));
    drop(three.input);
    let status = timeout(PATIENCE, three.child.wait())
        .await
        .unwrap()
        .unwrap();
    said.push(("end after a failure", json!(status.code())));

    let (lines, errors, status) = start(&["--session-id", SESSION]).end().await;
    said.push(("used id", json!([lines, errors, status])));
    let mut lost = start(&["--resume", UNKNOWN]);
    let result = lost.until("result").await;
    said.push((
        "unknown session",
        keep(
            &result,
            &["subtype", "is_error", "num_turns", "errors", "session_id"],
        ),
    ));
    let (lines, errors, status) = lost.end().await;
    said.push(("its end", json!([lines, errors, status])));
    let (lines, _, status) = start(&["--no-such-flag"]).end().await;
    said.push(("bad flag", json!([lines, status])));
    let mut garbage = start(&["--resume", SESSION]);
    garbage.send("nope").await;
    let (lines, errors, status) = garbage.end().await;
    said.push(("garbage", json!([lines, errors, status])));

    let transcripts = files_below(&folders.join("home/config/projects"));
    let name = format!("{SESSION}.jsonl");
    let found = transcripts
        .iter()
        .find(|file| file.ends_with(&name))
        .unwrap();
    let folder = found
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    let cwd = folders
        .join("repos")
        .to_str()
        .unwrap()
        .replace(['/', '.'], "-");
    said.push(("transcript", json!(folder == cwd)));
    said
}

#[tokio::test]
async fn both_say_the_same() {
    let (real, acting) = tokio::join!(
        bare(tools().claude.clone(), false),
        bare(acting_claude(), true)
    );
    let mut differences = Vec::new();
    assert_eq!(real.len(), acting.len());
    for (one, other) in real.iter().zip(&acting) {
        if one != other {
            differences.push(format!(
                "{}:\n real   {}\n acting {}",
                one.0, one.1, other.1
            ));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test]
async fn both_are_of_the_version_that_was_tested() {
    for program in [tools().claude.clone(), acting_claude()] {
        #[expect(clippy::disallowed_methods, reason = "asks for a version")]
        let output = Command::new(&program)
            .arg("--version")
            .output()
            .await
            .unwrap();
        let version = String::from_utf8(output.stdout).unwrap();
        let tested = greenroom::config::TESTED_CLAUDE_VERSION;
        assert_eq!(version.trim(), format!("{tested} (Claude Code)"));
    }
}
