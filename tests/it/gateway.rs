//! The real CLI, through the gateway, with the rehearsal as its upstream.
//!
//! Runs where `CLAUDE_BIN` names the CLI's native program; says so and passes where it does not.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use greenroom::{
    domain::Account,
    gateway::{AgentToken, Credential, Gateway, GatewayConfig, OAuthSettings},
    rehearsal::{Ended, Rehearsal, Script},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

/// For one turn of the CLI on a slow machine.
const PATIENCE: Duration = Duration::from_secs(90);

fn claude() -> Option<PathBuf> {
    let found = std::env::var_os("CLAUDE_BIN")
        .map(PathBuf::from)
        .filter(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: CLAUDE_BIN names no Claude Code CLI");
    }
    found
}

/// The built-in template where it is at hand, else a site with the same landmarks.
fn make_site(at: &Path) {
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("workspace-template");
    if template.is_dir() {
        copy(&template, at);
        return;
    }
    for (path, text) in [
        (
            "src/pages/index.astro",
            "---\nimport Base from '../layouts/Base.astro';\n---\n<Base>\n  <h1>Pots</h1>\n</Base>\n",
        ),
        (
            "src/layouts/Base.astro",
            "<html><body><slot /></body></html>\n",
        ),
        (
            "src/styles/global.css",
            ":root {\n  --accent: #2340a0;\n}\n",
        ),
    ] {
        let path = at.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_name() == "node_modules" {
            continue;
        } else if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

struct Room {
    tasks: Tasks,
    rehearsal: Rehearsal,
    gateway: Gateway,
    scratch: tempfile::TempDir,
    program: PathBuf,
}

impl Room {
    async fn start(program: PathBuf, script: Script) -> Self {
        let tasks = Tasks::new();
        let rehearsal = Rehearsal::start(script, &tasks).await.unwrap();
        let upstream = rehearsal.url().parse().unwrap();
        let config = GatewayConfig {
            upstream,
            credential: Credential::Rehearsal,
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(LedgerSettings::default(), &tasks),
        };
        let gateway = Gateway::start(config, &tasks).await.unwrap();
        let scratch = tempfile::tempdir().unwrap();
        make_site(&scratch.path().join("site"));
        Self {
            tasks,
            rehearsal,
            gateway,
            scratch,
            program,
        }
    }

    fn file(&self, path: &str) -> String {
        fs::read_to_string(self.scratch.path().join("site").join(path)).unwrap()
    }

    fn cli(&self, more: &[&str]) -> Cli {
        let token = self.gateway.issue();
        let dir = |name: &str| {
            let dir = self.scratch.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            dir
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "a test drives the real program by itself"
        )]
        let mut command = Command::new(&self.program);
        let mut child = command
            .args([
                "-p",
                "--input-format",
                "stream-json",
                "--output-format",
                "stream-json",
            ])
            .args(["--verbose", "--include-partial-messages"])
            .args(["--setting-sources", "", "--strict-mcp-config"])
            .args(["--tools", "Read,Edit,Write,Bash,Glob,Grep"])
            .args([
                "--permission-mode",
                "acceptEdits",
                "--permission-prompt-tool",
                "stdio",
            ])
            .args(more)
            .current_dir(dir("site"))
            .env_clear()
            .env("HOME", dir("home"))
            .env("PATH", "/usr/bin:/bin")
            .env("LANG", "C.UTF-8")
            .env("TMPDIR", dir("tmp"))
            .env("CLAUDE_CONFIG_DIR", dir("config"))
            .env("ANTHROPIC_BASE_URL", self.gateway.base_url())
            .env("ANTHROPIC_AUTH_TOKEN", token.as_str())
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("DISABLE_AUTOUPDATER", "1")
            .env("CLAUDE_CODE_DISABLE_BACKGROUND_TASKS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Cli {
            child,
            input,
            output,
            token,
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

struct Cli {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    token: AgentToken,
}

impl Cli {
    async fn send(&mut self, line: Value) {
        self.input
            .write_all(format!("{line}\n").as_bytes())
            .await
            .unwrap();
    }

    /// One turn; returns its result event. What needs permission is denied.
    async fn turn(&mut self, instruction: &str) -> Value {
        let _run = self.token.begin(Account::of_kind("test"));
        self.say(instruction).await;
        self.result().await
    }

    async fn say(&mut self, instruction: &str) {
        let message = json!({"role": "user", "content": instruction});
        self.send(json!({"type": "user", "message": message})).await;
    }

    async fn result(&mut self) -> Value {
        let wait = async {
            loop {
                let line = self
                    .output
                    .next_line()
                    .await
                    .unwrap()
                    .expect("no result, but an end");
                let event: Value = serde_json::from_str(&line).unwrap();
                if event["type"] == "control_request" {
                    let denied = json!({"behavior": "deny", "message": "not in this test"});
                    let response = json!({"subtype": "success",
                        "request_id": event["request_id"], "response": denied});
                    self.send(json!({"type": "control_response", "response": response}))
                        .await;
                }
                if event["type"] == "result" {
                    return event;
                }
            }
        };
        timeout(PATIENCE, wait).await.expect("a turn ends")
    }

    async fn set_mode(&mut self, mode: &str) {
        let request = json!({"subtype": "set_permission_mode", "mode": mode});
        self.send(json!({"type": "control_request", "request_id": mode, "request": request}))
            .await;
    }

    async fn close(self) {
        let Self {
            mut child,
            input,
            output,
            ..
        } = self;
        drop(input);
        timeout(PATIENCE, child.wait())
            .await
            .expect("it ends without input")
            .unwrap();
        drop(output);
    }
}

fn text(result: &Value) -> String {
    assert_eq!(result["is_error"], false, "{result}");
    result["result"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_cli_edits_a_site_and_remembers() {
    let Some(program) = claude() else { return };
    let room = Room::start(program, Script::default()).await;
    let mut cli = room.cli(&[]);

    let result = cli
        .turn("Change the heading to “Made slowly, used daily”")
        .await;
    assert!(text(&result).contains("now reads"), "{result}");
    assert!(
        room.file("src/pages/index.astro")
            .contains("<h1>Made slowly, used daily</h1>")
    );
    let session = result["session_id"].as_str().unwrap().to_owned();

    let result = cli.turn("Make the accent colour teal").await;
    assert!(text(&result).contains("teal"), "{result}");
    assert!(
        room.file("src/styles/global.css")
            .contains("--accent: #0f766e;")
    );

    let result = cli.turn("Add a page called Workshops").await;
    assert!(text(&result).contains("/workshops"), "{result}");
    assert!(
        room.file("src/pages/workshops.astro")
            .contains("<h1>Workshops</h1>")
    );

    cli.set_mode("plan").await;
    let before = room.file("src/pages/index.astro");
    let result = cli.turn("Change the heading to Nothing of this").await;
    assert!(
        text(&result).starts_with("Here is what I would do"),
        "{result}"
    );
    assert_eq!(room.file("src/pages/index.astro"), before);
    cli.set_mode("acceptEdits").await;

    let result = cli.turn("Use a tool that fails").await;
    assert!(text(&result).contains("The tool failed"), "{result}");
    let result = cli.turn("Run `ls src`").await;
    assert!(text(&result).contains("pages"), "{result}");
    let result = cli.turn("Break the page on purpose").await;
    assert!(text(&result).contains("broken now"), "{result}");
    let result = cli.turn("Repair it").await;
    assert!(text(&result).contains("is repaired"), "{result}");
    assert_eq!(room.file("src/pages/index.astro"), before);
    cli.turn("Remember that our dog is called Rex").await;
    cli.close().await;

    let mut again = room.cli(&["--resume", &session]);
    let result = again.turn("What is our dog called?").await;
    assert_eq!(text(&result), "You told me: our dog is called Rex.");
    again.close().await;

    assert!(
        room.rehearsal
            .requests()
            .iter()
            .all(|request| request.session.is_some())
    );
}

#[tokio::test]
async fn the_cli_meets_what_an_upstream_does_wrong() {
    let Some(program) = claude() else { return };
    let long = "one two three four five six";
    // The instruction, how the upstream fails the first time, what the turn's text is at the end
    // (`None`: the turn fails).
    let cases = [
        ("bad request", json!({"status": {"status": 400}}), None),
        (
            "overloaded",
            json!({"status": {"status": 529, "retry_after": 1}}),
            Some(long),
        ),
        ("a portal", json!("html"), Some(long)),
        ("broken", json!("broken_sse"), Some(long)),
        ("cut off", json!("cut"), Some(long)),
        (
            "an event",
            json!({"error_event": {"kind": "overloaded_error"}}),
            Some(long),
        ),
        ("too long", json!("max_tokens"), Some("Done.")),
        ("refused", json!("refusal"), Some("Done.")),
    ];
    let rule = |(says, act, ends): &(&str, Value, Option<&str>)| {
        // A failed turn is one where trying again does not help.
        let times = ends.map(|_| 1);
        json!({"match": says, "steps": [{"act": act, "times": times, "text": long}]})
    };
    let rules: Vec<Value> = cases.iter().map(rule).collect();
    let script = serde_json::from_value(json!({"rules": rules})).unwrap();
    let room = Room::start(program, script).await;
    let mut cli = room.cli(&[]);
    for (index, (says, _, ends)) in cases.iter().enumerate() {
        let result = cli.turn(says).await;
        assert_eq!(result["is_error"], ends.is_none(), "{says}: {result}");
        if let Some(ends) = ends {
            assert_eq!(result["result"], *ends, "{says}");
        }
        // What went wrong stays in the conversation, and must not confuse the next turn.
        let heading = format!("Heading {index}");
        text(&cli.turn(&format!("Change the heading to {heading}")).await);
        assert!(
            room.file("src/pages/index.astro").contains(&heading),
            "{says}"
        );
    }
    cli.close().await;
}

#[tokio::test]
async fn an_interrupt_reaches_the_upstream_and_a_stray_request_is_refused() {
    let Some(program) = claude() else { return };
    let room = Room::start(program, Script::default()).await;
    let mut cli = room.cli(&[]);
    let slow = "Think slowly for 300 seconds";
    let run = cli.token.begin(Account::of_kind("interrupted"));
    cli.say(slow).await;
    wait_for(|| run.last_upstream_status() == Some(200)).await;
    cli.send(json!({"type": "control_request", "request_id": "stop",
        "request": {"subtype": "interrupt"}}))
        .await;
    assert_eq!(cli.result().await["subtype"], "error_during_execution");
    let last = || room.rehearsal.requests().pop().unwrap();
    wait_for(|| last().ended == Some(Ended::Abandoned)).await;
    assert_eq!(last().instruction, slow);
    drop(run);

    // No run is active: the CLI's request is refused and nothing goes up.
    let before = room.rehearsal.requests().len();
    cli.say("Change the heading to Stray").await;
    let result = cli.result().await;
    assert_eq!(result["is_error"], true, "{result}");
    assert_eq!(result["api_error_status"], 403, "{result}");
    assert_eq!(room.rehearsal.requests().len(), before);

    // It serves the next turn as if nothing had happened.
    text(&cli.turn("Change the heading to Fine").await);
    assert!(room.file("src/pages/index.astro").contains("<h1>Fine</h1>"));
    cli.close().await;
}

async fn wait_for(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("it should have happened by now");
}
