//! `greenroom claude`: the real CLI where its caller is, with a token instead of a credential.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    CANARY, Folders, Options, PATIENCE, StandIn, TestGreenroom, files_below, holds, rule, runs,
    tools, wait_for, wait_for_async,
};

/// `greenroom claude` as a person starts it, in a folder of the person's.
struct Terminal {
    folder: PathBuf,
    env: Vec<(String, std::ffi::OsString)>,
}

impl Terminal {
    fn new(folders: &Folders) -> Self {
        let folder = folders.join("mine");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("notes.txt"), "mine").unwrap();
        let mut terminal = Self {
            folder,
            env: Vec::new(),
        };
        terminal.set("HOME", folders.join("home"));
        terminal.set("TMPDIR", folders.join("tmp"));
        terminal.set("PATH", &tools().path);
        terminal.set("CLAUDE_BIN", &tools().claude);
        terminal.set("WORKSPACE_PATH", folders.workspace());
        terminal.set("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1");
        terminal
    }

    fn set(&mut self, name: &str, value: impl Into<std::ffi::OsString>) {
        self.env.push((name.to_owned(), value.into()));
    }

    /// To its end, off the async workers.
    async fn run(&self, args: &[&str], input: &str) -> Output {
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
        command
            .arg("claude")
            .args(args)
            .current_dir(&self.folder)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let input = input.to_owned();
        let run = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            child
                .stdin
                .take()
                .unwrap()
                .write_all(input.as_bytes())
                .unwrap();
            child.wait_with_output().unwrap()
        });
        tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The ledgers' lines.
fn ledger(folders: &Folders) -> String {
    files_below(&folders.workspace())
        .iter()
        .filter(|file| file.extension().is_some_and(|ext| ext == "jsonl"))
        .map(|file| fs::read_to_string(file).unwrap())
        .collect()
}

#[tokio::test]
async fn with_a_supervisor_it_uses_its_gateway_and_keeps_it_awake() {
    let api = StandIn::start(json!({"rules": [
        rule("look around", &[runs("env; pwd; cat notes.txt; cat /proc/$PPID/environ /proc/1/environ; true")]),
        {"match": "slowly", "steps": [{"text": "Here.", "delay_ms": 1500}]},
    ]}))
    .await;
    let folders = Folders::new();
    let greenroom = TestGreenroom::start(
        Options::new(&folders)
            .api(&api)
            .env("GREENROOM_API_TOKEN", "t0ken-of-the-plane")
            .env("CLAUDE_SERVICE_SECRET", "s3cret-of-the-service")
            .env("BIND", "127.0.0.1"),
    )
    .await;
    let mut terminal = Terminal::new(&folders);
    terminal.set("API_PORT", greenroom.api_port.to_string());
    terminal.set("HF_TOKEN", "hf-canary-17");

    // Who has no secret is told which.
    let refused = terminal.run(&["-p", "hello"], "").await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("GREENROOM_API_TOKEN"),
        "{}",
        text(&refused.stderr)
    );

    terminal.set("CLAUDE_SERVICE_SECRET", "s3cret-of-the-service");
    let looked = terminal
        .run(
            &[
                "-p",
                "--output-format",
                "stream-json",
                "--verbose",
                "--allowedTools",
                "Bash",
            ],
            "Please look around",
        )
        .await;
    let (out, err) = (text(&looked.stdout), text(&looked.stderr));
    assert!(looked.status.success(), "{out}\n{err}");
    let last: Value = serde_json::from_str(out.trim().lines().next_back().unwrap()).unwrap();
    assert_eq!(last["is_error"], false, "{last}");
    assert!(out.contains("mine"), "in its caller's folder: {out}");
    for secret in [
        CANARY,
        "hf-canary-17",
        "s3cret-of-the-service",
        "t0ken-of-the-plane",
    ] {
        assert!(
            !out.contains(secret) && !err.contains(secret),
            "{secret}: {out}"
        );
    }
    // The supervisor may be slower with its books than the CLI with its end.
    wait_for("the ledger has it", || {
        ledger(&folders).contains("\"kind\":\"cli\"").then_some(())
    })
    .await;

    let slowly = terminal.run(&["-p", "Answer slowly"], "");
    let holds_it = wait_for_async("a holder", async || {
        let sent = crate::support::Sent::new("GET", "/api/idle", &Value::Null)
            .header("authorization", "Bearer t0ken-of-the-plane");
        let answer = greenroom.send(sent).await.body;
        let holders = answer["holders"].as_array()?;
        let held = holders.iter().any(|holder| holder["who"] == "/api/cli");
        held.then_some(())
    });
    let (slowly, ()) = tokio::join!(slowly, holds_it);
    assert_eq!(
        text(&slowly.stdout).trim(),
        "Here.",
        "{}",
        text(&slowly.stderr)
    );

    // Its exit status is the CLI's.
    let wrong = terminal.run(&["-p", "--no-such-flag"], "").await;
    assert_eq!(wrong.status.code(), Some(1));
    assert!(
        text(&wrong.stderr).contains("--no-such-flag"),
        "{}",
        text(&wrong.stderr)
    );
    let version = terminal.run(&["--version"], "").await;
    assert!(text(&version.stdout).contains("Claude Code"));
    for file in files_below(&folders.join("home")) {
        assert!(!holds(&file, CANARY), "{}", file.display());
    }
}

#[tokio::test]
async fn without_one_it_has_a_gateway_of_its_own() {
    let api = StandIn::start(json!({"rules": [
        rule("look around", &[runs("env; cat /proc/$PPID/environ; cat /proc/*/environ | tr '\\0' '\\n'; true")]),
    ]}))
    .await;
    let folders = Folders::new();
    let mut terminal = Terminal::new(&folders);
    // Nobody listens there.
    terminal.set("API_PORT", "1");
    let none = terminal.run(&["-p", "hello"], "").await;
    assert_eq!(none.status.code(), Some(1));
    assert!(
        text(&none.stderr).contains("ANTHROPIC_API_KEY"),
        "{}",
        text(&none.stderr)
    );

    terminal.set("ANTHROPIC_API_KEY", CANARY);
    terminal.set("ANTHROPIC_BASE_URL", api.url());
    fs::create_dir_all(folders.workspace()).unwrap();
    let looked = terminal
        .run(
            &[
                "-p",
                "--output-format",
                "stream-json",
                "--verbose",
                "--allowedTools",
                "Bash",
            ],
            "Please look around",
        )
        .await;
    let out = text(&looked.stdout);
    assert!(looked.status.success(), "{out}\n{}", text(&looked.stderr));
    assert!(out.contains("ANTHROPIC_AUTH_TOKEN"), "it has looked: {out}");
    // What runs as root reads what it wants of other processes; as itself it finds no key.
    let own = out.split("ANTHROPIC_AUTH_TOKEN").next().unwrap_or_default();
    assert!(!own.contains(CANARY), "{own}");
    assert!(
        ledger(&folders).contains("\"kind\":\"cli\""),
        "{}",
        ledger(&folders)
    );
}

#[tokio::test]
async fn on_a_terminal_the_cli_has_the_terminal() {
    let folders = Folders::new();
    let program = folders.join("cli/claude");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    let script = "#!/bin/sh\nif [ -t 0 ] && [ -t 1 ]; then echo a-terminal; fi\n\
                  trap 'echo interrupted; exit 9' INT\necho \"args: $*\"\nread -r line\n\
                  echo \"said: $line\"\nexit 5\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut terminal = Terminal::new(&folders);
    terminal.set("CLAUDE_BIN", &program);
    terminal.set("ANTHROPIC_API_KEY", CANARY);
    terminal.set("API_PORT", "1");
    #[expect(clippy::disallowed_methods, reason = "makes a terminal")]
    let mut command = Command::new("script");
    let line = format!(
        "{} claude --resume x 'two words'",
        env!("CARGO_BIN_EXE_greenroom")
    );
    command
        .args(["-qec", &line, "/dev/null"])
        .current_dir(&terminal.folder)
        .env_clear()
        .envs(terminal.env.iter().map(|(name, value)| (name, value)))
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let run = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
        child.wait_with_output().unwrap()
    });
    let output = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap();
    let out = text(&output.stdout);
    assert!(out.contains("a-terminal"), "{out}");
    assert!(out.contains("args: --resume x two words"), "{out}");
    assert!(out.contains("said: hello"), "{out}");
    assert_eq!(output.status.code(), Some(5), "{out}");
}
