//! The CLI as a process that serves one run after another.
//!
//! A run is over at its result event, its exit or its deadline, whichever comes first: we decide.
//! Two tasks read what the process prints, all the time and bounded; they end with its pipes.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    net::unix::pipe::Sender,
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    command::{AgentSettings, AgentSite, SessionStart, spec},
    permission::{self, Question},
    protocol::{self, CliResult, Line},
};
use crate::{
    domain::{TurnMode, Usage},
    gateway::{AgentToken, Gateway},
    process::{Launcher, ProcessError, ProcessHandle},
    task::{self, BlockingError, Tasks},
};

/// A handful of small files.
const SETTINGS_DEADLINE: Duration = Duration::from_secs(30);
/// Longest output line that is read; a longer one is passed over.
const MAX_LINE: usize = 16 << 20;
/// Lines that wait for us; more and the CLI waits for its pipe.
const LINES: usize = 256;
/// What is kept of the standard error, from its end.
const STDERR_TAIL: usize = 8 << 10;
/// Most text of one run that is gathered for its result.
const MAX_TEXT: usize = 256 << 10;
/// The CLI answers a control request in milliseconds.
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);
/// An interrupt takes 30 ms; the whole cancel has to fit into 6 s.
const INTERRUPT_GRACE: Duration = Duration::from_secs(2);
const TERMINATE_GRACE: Duration = Duration::from_secs(2);
/// By the contract: SIGTERM, 5 s later SIGKILL.
const TIMEOUT_GRACE: Duration = Duration::from_secs(5);
/// Silence with no tool running; the CLI itself would wait five minutes and then call half an
/// answer a success.
const STALL: Duration = Duration::from_secs(150);

/// The agent could not be started.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the Claude Code CLI is not installed")]
    NotInstalled,
    #[error("failed to clear what was planted among the agent's settings")]
    Settings { source: std::io::Error },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// One instruction for the CLI.
#[derive(Debug, Clone)]
pub struct RunRequest {
    /// Names the run at the gateway.
    pub label: String,
    pub instruction: String,
    pub mode: TurnMode,
    /// `None`: the default of the settings.
    pub model: Option<String>,
    pub deadline: Instant,
}

/// What happens during a run.
#[derive(Debug, Clone, PartialEq)]
pub enum RunEvent {
    Text(String),
    ToolStarted {
        id: String,
        name: String,
        input: Value,
    },
    ToolFinished {
        id: String,
        ok: bool,
        summary: String,
    },
    /// Absolute path, as the CLI names it.
    FileTouched {
        path: String,
        is_new: bool,
    },
    Waiting {
        until: Timestamp,
        reason: String,
    },
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Completed,
    /// With a sentence for a person.
    Failed(String),
    Cancelled,
    TimedOut,
    /// The CLI does not know the conversation that it was to resume; nothing was done.
    SessionLost,
}

/// All that is known of a run that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct RunOutcome {
    pub ending: Ending,
    pub text: String,
    pub usage: Usage,
    pub num_turns: u64,
    pub session_id: Option<String>,
    pub model: Option<String>,
    /// Absolute paths of files that tools wrote.
    pub touched: BTreeSet<String>,
}

type Tail = Arc<Mutex<Vec<u8>>>;

/// A running CLI. Dropping it ends the process and all that it started.
#[derive(Debug)]
pub struct Agent {
    process: ProcessHandle,
    stdin: Sender,
    lines: mpsc::Receiver<Line>,
    stderr: Tail,
    token: AgentToken,
    site: AgentSite,
    is_confined: bool,
    default_model: Option<String>,
    mode: TurnMode,
    model: Option<String>,
    /// The CLI's own cost is cumulative over the process.
    cost_before: f64,
    next_request: u64,
    is_broken: bool,
}

impl Agent {
    /// Starts the CLI; it then waits for its first instruction.
    ///
    /// # Errors
    /// [`AgentError`] if the program cannot be started.
    pub async fn start(
        launcher: &Launcher,
        gateway: &Gateway,
        settings: &AgentSettings,
        site: AgentSite,
        session: &SessionStart,
        tasks: &Tasks,
    ) -> Result<Self, AgentError> {
        let config_dir = site.config_dir.clone();
        task::blocking(
            "clearing the agent's settings",
            SETTINGS_DEADLINE,
            move || clear_settings(&config_dir),
        )
        .await?
        .map_err(|source| AgentError::Settings { source })?;
        let token = gateway.issue();
        let child = launcher
            .spawn(spec(settings, &site, session, token.as_str()))
            .await?;
        let process = child.handle();
        let (sender, lines) = mpsc::channel(LINES);
        let stderr = Tail::default();
        tasks.spawn("agent output", read_lines(child.stdout, sender));
        tasks.spawn("agent errors", keep_tail(child.stderr, stderr.clone()));
        Ok(Self {
            process,
            stdin: child.stdin.expect("the spec asks for a pipe"),
            lines,
            stderr,
            token,
            site,
            is_confined: settings.is_confined,
            default_model: settings.model.clone(),
            mode: TurnMode::Execute,
            model: settings.model.clone(),
            cost_before: 0.0,
            next_request: 0,
            is_broken: false,
        })
    }

    /// Can it serve another run?
    pub fn is_usable(&self) -> bool {
        !self.is_broken && self.process.try_exit().is_none()
    }

    /// Ends the process and all that it started.
    pub async fn stop(self) {
        drop(self.stdin);
        self.process.terminate(TERMINATE_GRACE).await;
    }

    /// Serves one instruction. Whatever the ending, nothing that the run started is left, and the
    /// process is either usable or gone.
    ///
    /// Not cancel safe: cancel through the token.
    pub async fn run(
        &mut self,
        request: RunRequest,
        events: mpsc::Sender<RunEvent>,
        cancel: &CancellationToken,
    ) -> RunOutcome {
        let active = self.token.begin(&request.label);
        let mut run = Run {
            events,
            ..Run::new(request.mode)
        };
        let ending = match self.prepare(&request).await {
            Ok(()) => self.follow(&request, &mut run, cancel).await,
            Err(problem) => problem,
        };
        if self.is_broken {
            self.process.terminate(TERMINATE_GRACE).await;
            self.log_errors();
        } else {
            // What a command left behind must not outlive the run.
            if let Err(error) = self.process.sweep().await {
                tracing::warn!(%error, "ending the agent's process");
                self.is_broken = true;
                self.process.kill().await;
            }
        }
        drop(active);
        run.outcome(ending)
    }

    /// Gets the mode and model right and hands the instruction over.
    async fn prepare(&mut self, request: &RunRequest) -> Result<(), Ending> {
        while let Ok(line) = self.lines.try_recv() {
            tracing::warn!(?line, "the agent spoke outside of a turn");
        }
        if self.mode != request.mode {
            let id = self.request_id();
            self.control(&id, protocol::set_mode(&id, request.mode))
                .await?;
            self.mode = request.mode;
        }
        let model = request.model.clone().or_else(|| self.default_model.clone());
        if self.model != model {
            let id = self.request_id();
            self.control(&id, protocol::set_model(&id, model.as_deref()))
                .await?;
            self.model = model;
        }
        self.write(protocol::user_message(&request.instruction))
            .await
    }

    fn request_id(&mut self) -> String {
        self.next_request += 1;
        format!("greenroom-{}", self.next_request)
    }

    async fn write(&mut self, message: Value) -> Result<(), Ending> {
        let mut line = message.to_string();
        line.push('\n');
        let write = async {
            self.stdin.write_all(line.as_bytes()).await?;
            self.stdin.flush().await
        };
        match timeout(CONTROL_DEADLINE, write).await {
            Ok(Ok(())) => Ok(()),
            _ => {
                self.is_broken = true;
                Err(self.gone().await)
            }
        }
    }

    /// Sends a control request and waits for its answer.
    async fn control(&mut self, id: &str, message: Value) -> Result<(), Ending> {
        self.write(message).await?;
        let answer = async {
            while let Some(line) = self.lines.recv().await {
                if let Line::ControlResponse { request_id, error } = line
                    && request_id == id
                {
                    return Some(error);
                }
            }
            None
        };
        match timeout(CONTROL_DEADLINE, answer).await {
            Ok(Some(None)) => Ok(()),
            Ok(Some(Some(error))) => {
                tracing::warn!(%error, "the agent refused a setting");
                Err(Ending::Failed(
                    "The agent refused the mode or model asked for.".into(),
                ))
            }
            Ok(None) | Err(_) => {
                self.is_broken = true;
                Err(self.gone().await)
            }
        }
    }

    /// Why nothing more comes from the process.
    async fn gone(&mut self) -> Ending {
        let exit = timeout(CONTROL_DEADLINE, self.process.terminate(TERMINATE_GRACE)).await;
        let how = exit.map_or_else(|_| "it does not end".into(), |exit| exit.to_string());
        let errors = self.stderr_text();
        if errors.contains("No conversation found") {
            return Ending::SessionLost;
        }
        Ending::Failed(format!(
            "The agent's program ended unexpectedly ({how}). The edits so far are kept; \
             please send the instruction again."
        ))
    }

    async fn follow(
        &mut self,
        request: &RunRequest,
        run: &mut Run,
        cancel: &CancellationToken,
    ) -> Ending {
        // Set once the run was interrupted: how it then ends, and until when it may.
        let mut interrupted: Option<(Ending, Instant)> = None;
        loop {
            let stall_at = run.stall_at();
            tokio::select! {
                biased;
                () = cancel.cancelled(), if interrupted.is_none() => {
                    interrupted = Some(self.interrupt(Ending::Cancelled).await);
                }
                () = sleep_until(request.deadline), if interrupted.is_none() => {
                    self.is_broken = true;
                    self.process.terminate(TIMEOUT_GRACE).await;
                    return Ending::TimedOut;
                }
                () = until(interrupted.as_ref().map(|(_, at)| *at)) => {
                    self.is_broken = true;
                    return interrupted.map_or(Ending::Cancelled, |(ending, _)| ending);
                }
                () = sleep_until(stall_at), if interrupted.is_none() => {
                    interrupted = Some(self.interrupt(Ending::Failed(
                        "The model stopped answering in the middle. The edits so far are kept; \
                         please send the instruction again."
                            .into(),
                    )).await);
                }
                line = self.lines.recv() => {
                    let Some(line) = line else {
                        self.is_broken = true;
                        let gone = self.gone().await;
                        return interrupted.map_or(gone, |(ending, _)| ending);
                    };
                    match self.handle(line, run).await {
                        Next::Go => {}
                        Next::Interrupt(ending) if interrupted.is_none() => {
                            interrupted = Some(self.interrupt(ending).await);
                        }
                        Next::Interrupt(_) => {}
                        Next::End(ending) => {
                            return interrupted.map_or(ending, |(ending, _)| ending);
                        }
                    }
                }
            }
        }
    }

    async fn interrupt(&mut self, ending: Ending) -> (Ending, Instant) {
        let id = self.request_id();
        let written = self.write(protocol::interrupt(&id)).await.is_ok();
        let grace = if written {
            INTERRUPT_GRACE
        } else {
            Duration::ZERO
        };
        (ending, Instant::now() + grace)
    }

    async fn handle(&mut self, line: Line, run: &mut Run) -> Next {
        run.last_line = Instant::now();
        match line {
            Line::Init { session_id, model } => {
                run.session_id = Some(session_id);
                run.model = Some(model);
            }
            Line::TextDelta(text) => {
                if run.text.len() + text.len() <= MAX_TEXT {
                    run.text.push_str(&text);
                }
                run.tell(RunEvent::Text(text)).await;
            }
            Line::ToolUse { id, name, input } => {
                run.open_tools.insert(id.clone());
                // Text before a tool call and after it are two paragraphs.
                if !run.text.is_empty() && !run.text.ends_with('\n') {
                    run.text.push_str("\n\n");
                }
                run.tell(RunEvent::ToolStarted {
                    id,
                    name,
                    input: shorten(input),
                })
                .await;
            }
            Line::ToolResult {
                id,
                ok,
                summary,
                file,
            } => {
                run.open_tools.remove(&id);
                run.tell(RunEvent::ToolFinished { id, ok, summary }).await;
                if let Some(file) = file {
                    run.touched.insert(file.path.clone());
                    run.tell(RunEvent::FileTouched {
                        path: file.path,
                        is_new: file.is_new,
                    })
                    .await;
                }
            }
            Line::ApiRetry {
                status: Some(401 | 403),
                ..
            } => {
                // The CLI would try ten times, for three minutes.
                return Next::Interrupt(Ending::Failed(credential_refused()));
            }
            Line::ApiRetry {
                status,
                delay_ms,
                error,
            } => {
                tracing::warn!(?status, delay_ms, %error, "the model API failed; the agent tries again");
                let delay = Duration::from_millis(delay_ms.min(3_600_000));
                run.last_line += delay;
                let until = Timestamp::now() + delay;
                let reason = match status {
                    Some(429) => "the model API limits the rate",
                    Some(529) => "the model API is overloaded",
                    _ => "the model API did not answer",
                };
                run.tell(RunEvent::Waiting {
                    until,
                    reason: reason.into(),
                })
                .await;
            }
            Line::PermissionRequest {
                request_id,
                tool,
                input,
            } => {
                let decision = permission::decide(Question {
                    tool: &tool,
                    input: &input,
                    mode: run.mode,
                    is_confined: self.is_confined,
                    worktree: &self.site.worktree,
                });
                let answer = protocol::permission_response(&request_id, decision.map(|()| input));
                if let Err(ending) = self.write(answer).await {
                    return Next::End(ending);
                }
            }
            Line::Result(result) => return Next::End(self.end(*result, run)),
            Line::ControlResponse { .. } | Line::Other => {}
        }
        Next::Go
    }

    fn end(&mut self, result: CliResult, run: &mut Run) -> Ending {
        run.usage = result.usage;
        run.usage.cost_usd = (result.usage.cost_usd - self.cost_before).max(0.0);
        self.cost_before = result.usage.cost_usd;
        run.num_turns = result.num_turns;
        if !result.session_id.is_empty() {
            run.session_id = Some(result.session_id.clone());
        }
        if !result.is_error {
            run.text.clone_from(&result.text);
            return Ending::Completed;
        }
        if result
            .errors
            .iter()
            .any(|error| error.contains("No conversation found"))
        {
            self.is_broken = true;
            return Ending::SessionLost;
        }
        tracing::warn!(
            subtype = result.subtype, terminal_reason = result.terminal_reason,
            status = ?result.api_error_status, text = result.text, errors = ?result.errors,
            "the agent failed"
        );
        Ending::Failed(match result.api_error_status {
            Some(401 | 403) => credential_refused(),
            Some(429) => "The model API limits the rate; please try again in a while.".into(),
            Some(500..) => {
                "The model API is overloaded or down; please try again in a while.".into()
            }
            Some(413) => "The conversation has become too long for the model.".into(),
            Some(status) => format!("The model API refused the request (status {status})."),
            None if result.terminal_reason.starts_with("aborted") => "The turn was stopped.".into(),
            None => "The agent could not finish; the edits so far are kept.".into(),
        })
    }

    fn stderr_text(&self) -> String {
        let tail = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&tail).trim().to_owned()
    }

    fn log_errors(&self) {
        let errors = self.stderr_text();
        if !errors.is_empty() {
            tracing::warn!(stderr = errors, "what the agent's program said last");
        }
    }
}

fn credential_refused() -> String {
    "The model API refused the credential. The operator has to set a valid ANTHROPIC_API_KEY or \
     CLAUDE_CREDENTIALS_FILE."
        .into()
}

enum Next {
    Go,
    Interrupt(Ending),
    End(Ending),
}

/// What is gathered while a run goes on.
struct Run {
    mode: TurnMode,
    events: mpsc::Sender<RunEvent>,
    text: String,
    usage: Usage,
    num_turns: u64,
    session_id: Option<String>,
    model: Option<String>,
    touched: BTreeSet<String>,
    open_tools: BTreeSet<String>,
    last_line: Instant,
}

impl Run {
    fn new(mode: TurnMode) -> Self {
        Self {
            mode,
            events: mpsc::channel(1).0,
            text: String::new(),
            usage: Usage::default(),
            num_turns: 0,
            session_id: None,
            model: None,
            touched: BTreeSet::new(),
            open_tools: BTreeSet::new(),
            last_line: Instant::now(),
        }
    }

    /// When silence becomes a failure. A tool may take as long as the turn may.
    fn stall_at(&self) -> Instant {
        if self.open_tools.is_empty() {
            self.last_line + STALL
        } else {
            self.last_line + Duration::from_secs(86_400)
        }
    }

    async fn tell(&self, event: RunEvent) {
        // The turn reads until the run is over.
        self.events.send(event).await.ok();
    }

    fn outcome(self, ending: Ending) -> RunOutcome {
        RunOutcome {
            ending,
            text: self.text,
            usage: self.usage,
            num_turns: self.num_turns,
            session_id: self.session_id,
            model: self.model,
            touched: self.touched,
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Long strings of a tool's input are cut: events are for people, and are kept for good.
fn shorten(input: Value) -> Value {
    const LENGTH: usize = 2000;
    match input {
        Value::String(text) if text.len() > LENGTH => {
            Value::String(format!("{}…", &text[..text.floor_char_boundary(LENGTH)]))
        }
        Value::Array(items) => Value::Array(items.into_iter().take(50).map(shorten).collect()),
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .take(50)
                .map(|(k, v)| (k, shorten(v)))
                .collect(),
        ),
        other => other,
    }
}

/// Leaves of the config folder the transcripts alone. The agent may write there, and the CLI obeys
/// what it finds whatever its flags say: an `env` in `.claude.json` moved the API elsewhere
/// (measured with 2.1.329). Nothing else in it is needed to resume.
fn clear_settings(config_dir: &Path) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(config_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        // Of the entry itself: a link is removed, not followed.
        let is_folder = entry.file_type()?.is_dir();
        if entry.file_name() == "projects" && is_folder {
            continue;
        }
        if is_folder {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

async fn read_lines(stdout: impl AsyncRead + Unpin, lines: mpsc::Sender<Line>) {
    let mut reader = BufReader::with_capacity(64 << 10, stdout);
    let mut line = Vec::new();
    let mut is_too_long = false;
    loop {
        let (used, is_whole) = match reader.fill_buf().await {
            Ok(buffer) if !buffer.is_empty() => {
                let end = buffer.iter().position(|byte| *byte == b'\n');
                let part = &buffer[..end.unwrap_or(buffer.len())];
                is_too_long |= line.len() + part.len() > MAX_LINE;
                if is_too_long {
                    line = Vec::new();
                } else {
                    line.extend_from_slice(part);
                }
                (part.len() + usize::from(end.is_some()), end.is_some())
            }
            _ => return,
        };
        reader.consume(used);
        if !is_whole {
            continue;
        }
        if is_too_long {
            tracing::warn!(
                limit = MAX_LINE,
                "the agent printed a line that is too long"
            );
        } else if let Some(parsed) = protocol::parse(&line) {
            if parsed != Line::Other && lines.send(parsed).await.is_err() {
                return;
            }
        } else if !line.is_empty() {
            tracing::warn!(
                bytes = line.len(),
                "the agent printed a line that is no JSON"
            );
        }
        is_too_long = false;
        line.clear();
        line.shrink_to(1 << 20);
    }
}

async fn keep_tail(stderr: impl AsyncRead + Unpin, tail: Tail) {
    let mut reader = BufReader::new(stderr);
    while let Ok(buffer) = reader.fill_buf().await {
        if buffer.is_empty() {
            return;
        }
        let used = buffer.len();
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(buffer);
        let surplus = tail.len().saturating_sub(STDERR_TAIL);
        tail.drain(..surplus);
        drop(tail);
        reader.consume(used);
    }
}
