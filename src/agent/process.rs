//! The CLI as a process that serves one run after another.
//!
//! A run is over at its result event, its exit or its deadline, whichever comes first: we decide.
//! Which turn a line belongs to is known by the id of our message, which the CLI repeats at the
//! turn's beginning and in its result: a turn that it starts by itself has none, and one from
//! before has another.

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use serde_json::Value;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Limits,
    command::{AgentSettings, AgentSite, Ceiling, SessionStart, spec},
    idle::Idle,
    permission::{self, Question},
    protocol::{self, CliResult, Line},
    run::{self, Ending, Run, RunEvent, RunOutcome, Stage},
    wire::{self, Tail, Wire},
};
use crate::{
    domain::{Account, TurnMode},
    gateway::{ActiveRun, AgentToken, Gateway, Hold},
    process::{Exit, Launcher, ProcessError, ProcessHandle},
    task::{self, BlockingError, Tasks},
};

/// A handful of small files.
const SETTINGS_DEADLINE: Duration = Duration::from_secs(30);
/// `/proc` alone.
const MEMORY_DEADLINE: Duration = Duration::from_secs(5);
/// Once the process has ended its last words are in the pipe; one that somebody holds open does
/// not count.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
    /// Who pays for the run at the gateway.
    pub account: Account,
    pub instruction: String,
    pub mode: TurnMode,
    /// `None`: the default of the settings.
    pub model: Option<String>,
    pub deadline: Instant,
    /// What its turn has cost before, in US dollars: of the turn's budget.
    pub spent_before_usd: f64,
}

/// A running CLI. Dropping it ends the process and all that it started.
#[derive(Debug)]
pub struct Agent {
    process: ProcessHandle,
    /// `None` while a run has the pipes, and once they are of no use.
    idle: Option<Idle>,
    stderr: Tail,
    token: AgentToken,
    site: AgentSite,
    is_confined: bool,
    limits: Limits,
    default_model: Option<String>,
    mode: TurnMode,
    /// `None`: not known. A resumed conversation goes on with the model that it had last, whatever
    /// the command line says (measured with 2.1.329).
    model: Option<Option<String>>,
    /// The CLI's own cost is cumulative.
    cost_before: f64,
    /// The CLI repeats the ids of our messages; one that never did so is believed without.
    names_messages: bool,
    has_served: bool,
    is_broken: bool,
    started: Instant,
    ceiling: Ceiling,
    tasks: Tasks,
}

impl Agent {
    /// Has it had an instruction before?
    pub fn has_served(&self) -> bool {
        self.has_served
    }

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
        metrics::counter!("greenroom_agent_starts_total").increment(1);
        let (wire, stderr, process) = wire::connect(child, tasks);
        let limits = settings.limits;
        Ok(Self {
            idle: Some(Idle::listen(wire, process.clone(), limits, tasks)),
            process,
            stderr,
            token,
            site,
            is_confined: settings.is_confined,
            limits,
            default_model: settings.model.clone(),
            mode: TurnMode::Execute,
            model: matches!(session, SessionStart::New(_)).then(|| settings.model.clone()),
            cost_before: 0.0,
            names_messages: false,
            has_served: false,
            is_broken: false,
            started: Instant::now(),
            ceiling: settings.ceiling,
            tasks: tasks.clone(),
        })
    }

    /// Has a CLI that waits for its first instruction do now what it would do then: that takes a
    /// fifth off its first turn (measured with 2.1.329: 25 ms of 120). One that does not know the
    /// request says so, and nothing is lost.
    pub async fn warm_up(&mut self) {
        let Some(mut wire) = self.take_wire().await else {
            return;
        };
        let id = wire.request_id();
        let asked = wire
            .write(&protocol::get_context_usage(&id), self.limits.control)
            .await;
        self.is_broken |= asked.is_err();
        self.listen(wire);
    }

    /// The pipes, from whoever listens between runs; `None` if they are of no use any more.
    async fn take_wire(&mut self) -> Option<Wire> {
        self.idle.take()?.take_back().await
    }

    fn listen(&mut self, wire: Wire) {
        let process = self.process.clone();
        self.idle = Some(Idle::listen(wire, process, self.limits, &self.tasks));
    }

    /// Can it serve another run?
    pub fn is_usable(&self) -> bool {
        !self.is_broken && self.idle.is_some() && self.process.try_exit().is_none()
    }

    /// Why it should be started anew before another run: too old, or grown too large.
    pub async fn worn(&self) -> Option<&'static str> {
        if self
            .ceiling
            .age
            .is_some_and(|age| self.started.elapsed() > age)
        {
            return Some("age");
        }
        let process = self.process.clone();
        let look = move || process.load().memory;
        let held = task::blocking("looking at the agent's memory", MEMORY_DEADLINE, look).await;
        (held.ok()? > self.ceiling.memory).then_some("memory")
    }

    /// Ends the process and all that it started.
    pub async fn stop(self) {
        self.process.terminate(self.limits.terminate).await;
    }

    /// Serves one instruction. Whatever the ending, nothing that the run started is left (or
    /// [`RunOutcome::left_running`] says so), and the process is either usable or gone.
    ///
    /// Not cancel safe: cancel through the token.
    pub async fn run(
        &mut self,
        request: RunRequest,
        events: mpsc::Sender<RunEvent>,
        cancel: &CancellationToken,
    ) -> RunOutcome {
        let active = self
            .token
            .begin_until(request.account.clone(), request.deadline);
        active.spent_before(request.spent_before_usd);
        let message = uuid::Uuid::new_v4().to_string();
        let mut run = Run::new(request.mode, message, events);
        let prepared = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Ending::Cancelled),
            () = sleep_until(request.deadline) => Err(Ending::TimedOut),
            prepared = self.prepare(&request, &run) => prepared,
        };
        let ending = match prepared {
            Ok(mut wire) => {
                let ending = self
                    .follow(&mut wire, &request, &mut run, &active, cancel)
                    .await;
                if !self.is_broken {
                    self.listen(wire);
                }
                ending
            }
            Err(ending) => {
                // Nobody knows how much of what it was to be told has reached it.
                self.is_broken = true;
                ending
            }
        };
        let left_running = !self.clean_up(&ending).await;
        let counted = active.spent();
        drop(active);
        run.outcome(ending, left_running, counted)
    }

    /// Ends what the run left behind, and a process that is of no more use; whether all is gone.
    async fn clean_up(&mut self, ending: &Ending) -> bool {
        let mut swept = Ok(());
        if !self.is_broken {
            swept = self.process.sweep().await;
            self.is_broken = swept.is_err();
        }
        if self.is_broken {
            self.idle = None;
            let grace = if *ending == Ending::TimedOut {
                self.limits.timeout
            } else {
                self.limits.terminate
            };
            self.process.terminate(grace).await;
            let errors = self.stderr.text();
            if !errors.is_empty() {
                tracing::warn!(stderr = errors, "what the agent's program said last");
            }
            swept = self.process.sweep().await;
        }
        if let Err(error) = &swept {
            tracing::error!(%error, "something that the agent started does not end");
        }
        swept.is_ok()
    }

    /// Gets the mode and model right and hands the instruction over.
    async fn prepare(&mut self, request: &RunRequest, run: &Run) -> Result<Wire, Ending> {
        let Some(mut wire) = self.take_wire().await else {
            return Err(self.gone().await);
        };
        if self.mode != request.mode {
            let id = wire.request_id();
            self.control(&mut wire, &id, protocol::set_mode(&id, request.mode))
                .await?;
            self.mode = request.mode;
        }
        let model = request.model.clone().or_else(|| self.default_model.clone());
        if self.model.as_ref() != Some(&model) {
            let id = wire.request_id();
            let message = protocol::set_model(&id, model.as_deref());
            let is_known = self.model.is_some();
            let chosen = self.control(&mut wire, &id, message).await;
            // The first thing that a resumed one is asked: it could not read the conversation.
            chosen.map_err(|ending| {
                if is_known {
                    ending
                } else {
                    Ending::SessionLost
                }
            })?;
            self.model = Some(model);
        }
        let message = protocol::user_message(&run.message, &request.instruction);
        match wire.write(&message, self.begin_limit()).await {
            Ok(()) => Ok(wire),
            Err(wire::Deaf) => Err(self.gone().await),
        }
    }

    fn begin_limit(&self) -> Duration {
        if self.has_served {
            self.limits.begin_again
        } else {
            self.limits.begin
        }
    }

    /// Sends a control request and waits for its answer.
    async fn control(&mut self, wire: &mut Wire, id: &str, message: Value) -> Result<(), Ending> {
        let answer = async {
            wire.write(&message, self.limits.control).await.ok()?;
            while let Some(line) = wire.lines.recv().await {
                if let Line::ControlResponse { request_id, error } = line
                    && request_id == id
                {
                    return Some(error);
                }
            }
            None
        };
        match timeout(self.limits.control, answer).await {
            Ok(Some(None)) => Ok(()),
            Ok(Some(Some(error))) => {
                tracing::warn!(%error, "the agent refused a setting");
                Err(Ending::Failed(
                    "The agent refused the mode or model asked for; please choose another one."
                        .into(),
                ))
            }
            Ok(None) => Err(self.gone().await),
            Err(_) => Err(run::never_began()),
        }
    }

    /// Why nothing more comes from the process.
    async fn gone(&mut self) -> Ending {
        self.is_broken = true;
        let own = timeout(LAST_WORDS, self.process.wait()).await;
        let how = match own {
            Ok(Exit {
                code: None,
                signal: None,
            }) => "ended unexpectedly".to_owned(),
            Ok(exit) => format!("ended unexpectedly ({exit})"),
            Err(_) => {
                self.process.terminate(self.limits.terminate).await;
                "stopped talking to greenroom".to_owned()
            }
        };
        if run::is_conversation_lost(&self.stderr.text()) {
            return Ending::SessionLost;
        }
        run::failed(&format!(
            "The agent's program {how}. The edits so far are kept"
        ))
    }

    async fn follow(
        &mut self,
        wire: &mut Wire,
        request: &RunRequest,
        run: &mut Run,
        active: &ActiveRun,
        cancel: &CancellationToken,
    ) -> Ending {
        // Set once the run was interrupted: how it then ends, and until when it may.
        let mut interrupted: Option<(Ending, Instant)> = None;
        let mut holds = active.holds();
        let mut budget = active.budget_news();
        let mut warned = 0;
        let process = self.process.clone();
        let last_words = async {
            process.wait().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::pin!(last_words);
        run.heard = Instant::now();
        loop {
            let stall_at = run.stall_at(self.limits, self.begin_limit());
            let next = tokio::select! {
                biased;
                () = cancel.cancelled(), if interrupted.is_none() => {
                    Next::Interrupt(Ending::Cancelled)
                }
                () = sleep_until(request.deadline), if interrupted.is_none() => {
                    // By the contract its process ends too; interrupted, it tells the cost before.
                    self.is_broken = true;
                    Next::Interrupt(Ending::TimedOut)
                }
                () = until(interrupted.as_ref().map(|(_, at)| *at)) => {
                    tracing::warn!("the agent does not obey; its process is ended");
                    self.is_broken = true;
                    Next::End(Ending::Cancelled)
                }
                () = sleep_until(stall_at), if interrupted.is_none() => {
                    if run.stage == Stage::Ours {
                        Next::Interrupt(run::stalled())
                    } else {
                        self.is_broken = true;
                        Next::End(run::never_began())
                    }
                }
                Ok(()) = holds.changed() => {
                    let hold = *holds.borrow_and_update();
                    if let Some(hold) = hold {
                        self.wait_for_upstream(hold, run).await;
                    }
                    Next::Go
                }
                Ok(()) = budget.changed() => {
                    let news = budget.borrow_and_update().clone();
                    for warning in &news.warnings[warned..] {
                        run.tell(RunEvent::BudgetWarning(*warning)).await;
                    }
                    warned = news.warnings.len();
                    match news.breach {
                        Some(breach) => Next::Interrupt(Ending::OverBudget(breach)),
                        None => Next::Go,
                    }
                }
                line = wire.lines.recv() => match line {
                    Some(line) => self.handle(wire, line, run, active, interrupted.is_some()).await,
                    None => Next::End(self.gone().await),
                },
                () = &mut last_words => Next::End(self.gone().await),
            };
            match next {
                Next::Go => {}
                Next::Interrupt(ending) if interrupted.is_none() => {
                    let until = Instant::now() + self.limits.interrupt;
                    // One that cannot be written is as one that is not obeyed.
                    wire.interrupt(self.limits.interrupt).await.ok();
                    interrupted = Some((ending, until));
                }
                Next::Interrupt(_) => {}
                Next::End(ending) => return interrupted.map_or(ending, |(ending, _)| ending),
            }
        }
    }

    /// The gateway waits for the upstream, which asked for a pause.
    async fn wait_for_upstream(&self, hold: Hold, run: &mut Run) {
        let pause = hold.until.saturating_duration_since(Instant::now());
        run.heard = hold.until;
        run.tell(RunEvent::Waiting {
            until: Timestamp::now() + pause,
            reason: waiting_reason(Some(u64::from(hold.status))).into(),
        })
        .await;
    }

    /// Is this a turn that answers our message?
    fn is_ours(&mut self, run: &Run, messages: &[String]) -> bool {
        self.names_messages |= !messages.is_empty();
        messages.contains(&run.message) || (messages.is_empty() && !self.names_messages)
    }

    async fn handle(
        &mut self,
        wire: &mut Wire,
        line: Line,
        run: &mut Run,
        active: &ActiveRun,
        is_interrupted: bool,
    ) -> Next {
        run.heard = run.heard.max(Instant::now());
        match line {
            Line::Init {
                session_id,
                model,
                messages,
            } => {
                if self.is_ours(run, &messages) {
                    run.stage = Stage::Ours;
                    run.session_id = Some(session_id);
                    run.model = Some(model);
                    self.has_served = true;
                    if is_interrupted {
                        // The first one came before there was something to interrupt.
                        wire.interrupt(self.limits.interrupt).await.ok();
                    }
                } else {
                    tracing::warn!("the agent is at a turn that nobody asked for; it is stopped");
                    run.stage = Stage::Foreign;
                    wire.interrupt(self.limits.interrupt).await.ok();
                }
                return Next::Go;
            }
            Line::Result(result) => return self.end(*result, run, active),
            Line::PermissionRequest {
                request_id,
                tool,
                input,
            } => {
                let decision = if run.stage == Stage::Ours {
                    permission::decide(Question {
                        tool: &tool,
                        input: &input,
                        mode: run.mode,
                        is_confined: self.is_confined,
                        worktree: &self.site.worktree,
                    })
                } else {
                    Err("The person has not asked for this.".into())
                };
                let answer = protocol::permission_response(&request_id, decision.map(|()| input));
                return match wire.write(&answer, self.limits.interrupt).await {
                    Ok(()) => Next::Go,
                    Err(wire::Deaf) => Next::End(self.gone().await),
                };
            }
            _ => {}
        }
        if run.stage == Stage::Ours {
            gather(line, run).await
        } else {
            Next::Go
        }
    }

    fn end(&mut self, result: CliResult, run: &mut Run, active: &ActiveRun) -> Next {
        if result.errors.iter().any(|e| run::is_conversation_lost(e)) {
            self.is_broken = true;
            return Next::End(Ending::SessionLost);
        }
        let messages: Vec<String> = result.message.iter().cloned().collect();
        if !self.is_ours(run, &messages) {
            tracing::warn!("the agent told the result of another turn; it is passed over");
            self.cost_before = result.usage.cost_usd;
            return Next::Go;
        }
        run.take_in(&result, self.cost_before);
        self.cost_before = result.usage.cost_usd;
        if !result.is_error {
            return Next::End(Ending::Completed);
        }
        tracing::warn!(
            subtype = result.subtype, terminal_reason = result.terminal_reason,
            status = ?result.api_error_status, text = result.text, errors = ?result.errors,
            "the agent failed"
        );
        // Its last words may come before the news.
        if let Some(breach) = active.budget_news().borrow().breach.clone() {
            return Next::End(Ending::OverBudget(breach));
        }
        Next::End(run::failure(&result, active.upstream_note()))
    }
}

/// Takes in a line of our turn.
async fn gather(line: Line, run: &mut Run) -> Next {
    match line {
        Line::TextDelta(text) => {
            run.add_text(&text);
            run.tell(RunEvent::Text(text)).await;
        }
        Line::AnswerStarted(usage) => run.start_answer(usage),
        Line::AnswerCounted(usage) => run.count_answer(usage),
        Line::ToolUse { id, name, input } => {
            run.open_tools.insert(id.clone());
            run.end_paragraph();
            let input = shorten(input);
            run.tell(RunEvent::ToolStarted { id, name, input }).await;
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
        // The CLI would try ten times, for three minutes.
        Line::ApiRetry {
            status: Some(401 | 403),
            ..
        } => return Next::Interrupt(run::credential_refused()),
        Line::ApiRetry {
            status,
            delay_ms,
            error,
        } => {
            tracing::warn!(?status, delay_ms, %error, "the model API failed; the agent tries again");
            let delay = Duration::from_millis(delay_ms.min(3_600_000));
            run.heard += delay;
            run.tell(RunEvent::Waiting {
                until: Timestamp::now() + delay,
                reason: waiting_reason(status).into(),
            })
            .await;
        }
        // It may have been the end of a tool: silence counts again.
        Line::Garbled => run.open_tools.clear(),
        Line::Init { .. }
        | Line::Result(_)
        | Line::PermissionRequest { .. }
        | Line::ControlResponse { .. }
        | Line::Other => {}
    }
    Next::Go
}

fn waiting_reason(status: Option<u64>) -> &'static str {
    match status {
        Some(429) => "the model API limits the rate",
        Some(503 | 529) => "the model API is overloaded",
        _ => "the model API did not answer",
    }
}

enum Next {
    Go,
    Interrupt(Ending),
    End(Ending),
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
    // The process before this one may still be ending, and take its own files away meanwhile: then
    // another look, until one has met nothing of the kind.
    let mut looks = 0;
    loop {
        looks += 1;
        match clear_once(config_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && looks < 100 => {}
            cleared => return cleared,
        }
    }
}

fn clear_once(config_dir: &Path) -> std::io::Result<()> {
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
