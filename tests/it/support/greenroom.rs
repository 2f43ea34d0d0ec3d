//! The program under test, as an operator starts it and callers meet it.

use std::{
    ffi::OsString,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};

use super::{
    Answer, CANARY, Events, Folders, PATIENCE, Sent, StandIn, Who, acting_claude, request, stream,
    tools, wait_for,
};

/// How to start it.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) folders: Folders,
    command: &'static str,
    /// What starts the program in its own place.
    starter: Vec<String>,
    args: Vec<String>,
    env: Vec<(String, OsString)>,
}

impl Options {
    /// `serve` with a cleared environment: all folders in `folders`, free ports, no idle shutdown,
    /// no previews, local repositories below `repos`. There is no credential yet: see
    /// [`Options::api`] and [`Options::rehearsal`].
    pub(crate) fn new(folders: &Folders) -> Self {
        let tools = tools();
        let options = Self {
            folders: folders.clone(),
            command: "serve",
            starter: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
        };
        options
            .env("HOME", folders.join("home"))
            .env("TMPDIR", folders.join("tmp"))
            .env("PATH", &tools.path)
            .env("CLAUDE_BIN", &tools.claude)
            .env("WORKSPACE_PATH", folders.workspace())
            .env("CACHE_PATH", folders.join("cache"))
            .env("GREENROOM_ALLOWED_LOCAL_REPOS", folders.join("repos"))
            .env("API_PORT", "0")
            .env("PREVIEW_PORT", "0")
            .env("HMR_PORT", "0")
            .env("AUTO_SHUTDOWN_MINUTES", "0")
            .env("ASTRO_DEV_MODE", "false")
            .env("LOG_FORMAT", "json")
    }

    /// `service` instead: the one-shot service alone.
    pub(crate) fn service(mut self) -> Self {
        self.command = "service";
        self.env("CLAUDE_SERVICE_PORT", "0")
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self = self.without(name);
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Takes a variable away.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.env.retain(|(other, _)| other != name);
        self
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// It is started by this shell script, in a user namespace of its own; `exec "$@"` at the
    /// script's end makes it the program.
    pub(crate) fn started_by(mut self, script: &str) -> Self {
        let words = [
            "unshare",
            "--user",
            "--map-root-user",
            "sh",
            "-c",
            script,
            "sh",
        ];
        self.starter = words.map(str::to_owned).to_vec();
        self
    }

    /// It runs as on Fargate: as root with six capabilities, on a kernel without Landlock. Its folders
    /// have to be [open](Folders::open).
    pub(crate) fn on_the_uid_road(mut self) -> Self {
        let words = ["/usr/bin/python3", "-c", include_str!("old_kernel.py")];
        self.starter = words.map(str::to_owned).to_vec();
        self
    }

    /// As ordinary again.
    pub(crate) fn on_this_kernel(mut self) -> Self {
        self.starter.clear();
        self
    }

    /// Its upstream is this stand-in, its key [`CANARY`].
    pub(crate) fn api(self, api: &StandIn) -> Self {
        self.env("ANTHROPIC_BASE_URL", api.url())
            .env("ANTHROPIC_API_KEY", CANARY)
    }

    /// It has a model behind it after all, as [`Options::api`] says.
    pub(crate) fn without_rehearsal(mut self) -> Self {
        self.args.retain(|arg| arg != "--rehearsal");
        self
    }

    /// Its agents are stand-ins that act out what an instruction says; no model is behind them.
    pub(crate) fn acting(self) -> Self {
        self.env("CLAUDE_BIN", acting_claude()).rehearsal()
    }

    /// It plays the model by itself.
    pub(crate) fn rehearsal(self) -> Self {
        self.arg("--rehearsal")
    }

    /// It runs dev servers.
    pub(crate) fn previews(self) -> Self {
        self.env("ASTRO_DEV_MODE", "true")
            // A slow machine is no failure.
            .env("PREVIEW_READY_SECONDS", "250")
    }

    /// It runs dev servers, and installs what they need from npm once for all tests.
    pub(crate) fn astro(mut self) -> Self {
        // Of one file system with the workspaces, and there from test to test. That takes one
        // client and user (`demo`, `me`), since masters are not shared between tenants.
        let cache =
            std::env::temp_dir().join(format!("greenroom-test-cache-{}", nix::unistd::getuid()));
        for (name, value) in npm_settings() {
            self = self.env(&name, value);
        }
        self.previews().env("CACHE_PATH", cache)
    }

    fn spawn(&self) -> Child {
        let program = env!("CARGO_BIN_EXE_greenroom").to_owned();
        let words = self.starter.iter().cloned().chain([program]);
        let words: Vec<String> = words.collect();
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg(self.command)
            .args(&self.args)
            .current_dir(self.folders.join("home"))
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Starts it where it cannot start: its exit status and the last line on standard error.
    pub(crate) async fn fails(&self) -> (Option<i32>, String) {
        let output = timeout(PATIENCE, self.spawn().wait_with_output()).await;
        let output = output.expect("it does not stay").unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let line = text.lines().next_back().unwrap_or_default().to_owned();
        (output.status.code(), line)
    }
}

/// How a turn was asked for, and what came of it.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub(crate) answer: Answer,
}

impl Turn {
    /// The result of a turn that completed.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        let mut body = self.answer.ok();
        assert_eq!(body["result"]["status"], "completed", "{body}");
        body["result"].take()
    }
}

/// The running program. It is killed when this value goes; its children end by themselves then.
pub(crate) struct TestGreenroom {
    pub(crate) options: Options,
    pub(crate) api_port: u16,
    pub(crate) preview_port: u16,
    pub(crate) hmr_port: u16,
    /// 0 where there is none.
    pub(crate) service_port: u16,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Ends with the log.
    reading: Option<JoinHandle<()>>,
}

impl TestGreenroom {
    /// Starts it, and waits until it says where it listens.
    pub(crate) async fn start(options: Options) -> Self {
        let mut child = options.spawn();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().unwrap();
        #[expect(clippy::disallowed_methods, reason = "it ends with the program")]
        let reading = tokio::spawn(read_log(stderr, log.clone()));
        let mut greenroom = Self {
            options,
            api_port: 0,
            preview_port: 0,
            hmr_port: 0,
            service_port: 0,
            child,
            log,
            reading: Some(reading),
        };
        let lines = greenroom.log.clone();
        let child = &mut greenroom.child;
        let ready = wait_for("the line that says where it listens", || {
            let lines = lines.lock().unwrap();
            let found = lines
                .iter()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .find(|line| line["api_port"].is_u64() || line["service_port"].is_u64());
            let ended = child.try_wait().unwrap();
            assert!(
                found.is_some() || ended.is_none(),
                "it ended: {ended:?} {lines:?}"
            );
            found
        })
        .await;
        let port = |name: &str| u16::try_from(ready[name].as_u64().unwrap_or(0)).unwrap();
        greenroom.api_port = port("api_port");
        greenroom.service_port = port("service_port");
        if greenroom.options.command == "service" {
            // Its only one.
            greenroom.api_port = greenroom.service_port;
        }
        greenroom.preview_port = port("preview_port");
        greenroom.hmr_port = port("hmr_port");
        greenroom
    }

    /// Another one on the same folders, once this one has ended or was killed.
    pub(crate) async fn restart(mut self) -> Self {
        if self.child.try_wait().unwrap().is_none() {
            self.kill().await;
        }
        Self::start(self.options.clone()).await
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// The log so far, one JSON object a line.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Sends a request with nothing but its own headers.
    pub(crate) async fn send(&self, sent: Sent) -> Answer {
        request(self.api_port, sent).await.expect("an answer")
    }

    /// A call of the API; `Value::Null` is no body.
    pub(crate) async fn api(&self, method: &str, path: &str, body: Value) -> Answer {
        self.send(Sent::new(method, path, &body)).await
    }

    /// Gets something.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.api("GET", path, Value::Null).await
    }

    /// Gets something of a program that may have ended; then there is no answer.
    pub(crate) async fn ask(&self, path: &str) -> Option<Answer> {
        let sent = Sent::new("GET", path, &Value::Null);
        request(self.api_port, sent).await.ok()
    }

    /// `POST /api/init` with more fields than the ids.
    pub(crate) async fn init(&self, who: &Who, fields: Value) -> Answer {
        self.api("POST", "/api/init", who.body(fields)).await
    }

    /// `POST /api/execute`, answered when it is done.
    pub(crate) async fn execute(&self, who: &Who, instruction: &str) -> Turn {
        self.execute_with(who, json!({"instruction": instruction}))
            .await
    }

    /// `POST /api/execute` with more fields than the ids.
    pub(crate) async fn execute_with(&self, who: &Who, fields: Value) -> Turn {
        let answer = self.api("POST", "/api/execute", who.body(fields)).await;
        Turn { answer }
    }

    /// `POST /api/execute` with `async`: the turn's id.
    pub(crate) async fn begin(&self, who: &Who, instruction: &str) -> String {
        let fields = json!({"instruction": instruction, "async": true});
        let answer = self.api("POST", "/api/execute", who.body(fields)).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.ok()["turnId"].as_str().unwrap().to_owned()
    }

    /// How a turn stands: its `result`.
    pub(crate) async fn turn(&self, id: &str) -> Value {
        self.get(&format!("/api/turns/{id}")).await.ok()["result"].take()
    }

    /// A turn's events after the one of this number.
    pub(crate) async fn events(&self, id: &str, after: u64) -> Events {
        let sent = Sent::new("GET", &format!("/api/turns/{id}/events"), &Value::Null);
        stream(
            self.api_port,
            sent.header("last-event-id", &after.to_string()),
        )
        .await
    }

    /// Waits for a turn's end: its `result`.
    pub(crate) async fn ended(&self, id: &str) -> Value {
        let mut events = self.events(id, 0).await.all().await;
        let mut last = events.pop().expect("a turn has events");
        assert!(last.data["result"].is_object(), "{last:?}");
        last.data["result"].take()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// How it ended, if it did.
    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end; then all of its log is there.
    pub(crate) async fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let ended = timeout(limit, self.child.wait()).await;
        let ended = ended.expect("it ends").unwrap();
        if let Some(reading) = self.reading.take() {
            // Somebody that it left behind may hold the pipe.
            timeout(Duration::from_secs(5), reading).await.ok();
        }
        ended
    }

    /// SIGTERM, and its end.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_exit(PATIENCE).await
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }
}

impl Drop for TestGreenroom {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the program's log:\n{}", self.log().join("\n"));
        }
    }
}

async fn read_log(stderr: impl AsyncRead + Unpin, log: Arc<Mutex<Vec<String>>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        log.lock().unwrap().push(line);
    }
}

/// What npm was told where the tests were started.
fn npm_settings() -> Vec<(String, OsString)> {
    let mut settings: Vec<(String, OsString)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| {
            let name = name.to_ascii_lowercase();
            name.starts_with("npm_config_")
                || [
                    "http_proxy",
                    "https_proxy",
                    "no_proxy",
                    "node_extra_ca_certs",
                ]
                .contains(&name.as_str())
        })
        .collect();
    let config = std::env::home_dir().unwrap_or_default().join(".npmrc");
    if config.is_file() {
        settings.push(("npm_config_userconfig".to_owned(), config.into()));
    }
    settings
}
