//! One turn, from its start to its outcome: outside edits first, then the agent, then the commit,
//! the context and the journal. Whatever the agent does, this ends with exactly one outcome.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{broadcast, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    context::{StoredContext, replay_summary},
    journal::{Accepted, Journal, JournalError},
    reconcile::reconcile,
};
use crate::{
    agent::{
        Agent, AgentSettings, AgentSite, Ending, RunEvent, RunOutcome, RunRequest, SessionStart,
    },
    domain::{
        Account, CommitSummary, Continuity, ErrorCode, FileStatus, PreviewState, Signature,
        TurnEvent, TurnFailure, TurnKind, TurnMode, TurnPreview, TurnResult, TurnStatus, Usage,
    },
    gateway::Gateway,
    identity::ThreadKey,
    lease::{Fence, LeaseLost},
    process::Launcher,
    repository::{
        CommitRequest, CommitText, Committed, Repair, RepositoryError, Scope, Strangers, Watch,
        Worktree,
    },
    task::{self, Tasks},
    usage::{Denied, Spent},
    workspace::{ThreadPaths, WorkspaceError},
};

/// Git on a slow disk may take this long.
const GIT_DEADLINE: Duration = Duration::from_secs(120);

/// Everything that a turn of one thread works with.
#[derive(Debug, Clone)]
pub struct TurnSite {
    pub key: ThreadKey,
    pub paths: ThreadPaths,
    pub worktree: Arc<Worktree>,
    /// Sees what a turn changes.
    pub watch: Watch,
    pub agent_site: AgentSite,
    /// `None`: the CLI is missing.
    pub agent_settings: Option<Arc<AgentSettings>>,
    pub launcher: Launcher,
    pub gateway: Gateway,
    pub committer: Signature,
    pub outcomes: Outcomes,
    /// Of the thread's lease.
    pub fence: Fence,
    pub tasks: Tasks,
}

/// A turn's outcome, as news.
#[derive(Debug)]
pub struct Outcome {
    pub key: ThreadKey,
    pub result: TurnResult,
}

/// Where outcomes are told, beside the journal. Nobody has to listen, and nobody is waited for.
pub type Outcomes = broadcast::Sender<Arc<Outcome>>;

/// What is left when a turn is over.
#[derive(Debug)]
pub struct RunEnd {
    pub result: TurnResult,
    /// The CLI, if it can serve another turn, with how it got at the conversation.
    pub agent: Option<(Agent, Continuity)>,
    pub context: StoredContext,
    /// Its journal lacks the outcome: the thread has to be prepared anew, which recovers it.
    pub is_unfinished: bool,
}

/// Why a turn or an operation could not be carried out by greenroom.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    #[error(transparent)]
    Blocking(#[from] task::BlockingError),
    #[error(transparent)]
    Lost(#[from] LeaseLost),
    #[error(transparent)]
    Agent(#[from] crate::agent::AgentError),
}

/// The CLI's own transcript of a session. Blocking.
pub(super) fn transcript(config_dir: &Path, session: &str) -> Option<PathBuf> {
    let folders = std::fs::read_dir(config_dir.join("projects")).ok()?;
    folders
        .flatten()
        .map(|folder| folder.path().join(format!("{session}.jsonl")))
        .find(|file| file.is_file())
}

impl TurnSite {
    /// Is the CLI's own transcript of this session there? Blocking.
    fn has_transcript(&self, session: &str) -> bool {
        transcript(&self.agent_site.config_dir, session).is_some()
    }

    /// Starts the CLI ahead of its next instruction, which then does not wait for it; `None` if that
    /// does not work, which the instruction will find out.
    pub async fn start_agent_ahead(
        &self,
        context: &mut StoredContext,
    ) -> Option<(Agent, Continuity)> {
        match self.start_agent(context).await {
            Ok((mut agent, continuity)) => {
                agent.warm_up().await;
                Some((agent, continuity))
            }
            Err(error) => {
                tracing::warn!(%error, "failed to start the agent ahead");
                None
            }
        }
    }

    /// Starts the CLI for the thread's conversation. Where that begins anew the context gets its
    /// id.
    async fn start_agent(
        &self,
        context: &mut StoredContext,
    ) -> Result<(Agent, Continuity), crate::agent::AgentError> {
        let resumable = match context.session_id.clone() {
            None => None,
            Some(session) => {
                let site = self.clone();
                task::blocking("looking for the conversation", GIT_DEADLINE, move || {
                    site.has_transcript(&session).then_some(session)
                })
                .await
                .unwrap_or_default()
            }
        };
        let (session, continuity) = match resumable {
            Some(session) => (SessionStart::Resume(session), Continuity::Native),
            None if context.history.is_empty() => {
                (self.new_session(context).await, Continuity::Fresh)
            }
            None => (self.new_session(context).await, Continuity::Replayed),
        };
        Ok((self.spawn_agent(&session).await?, continuity))
    }

    /// The CLI for the next turn: this one, or another in its place if it is worn.
    pub async fn renew(
        &self,
        agent: (Agent, Continuity),
        context: &mut StoredContext,
    ) -> Option<(Agent, Continuity)> {
        let Some(why) = agent.0.worn().await else {
            return Some(agent);
        };
        tracing::info!(why, "the agent is started anew for the next turn");
        agent.0.stop().await;
        self.start_agent_ahead(context).await
    }

    /// A new conversation. Its id is kept before its first turn: a turn that is cut off by a crash
    /// is found again by it.
    async fn new_session(&self, context: &mut StoredContext) -> SessionStart {
        let id = uuid::Uuid::new_v4().to_string();
        context.session_id = Some(id.clone());
        if let Err(error) = self.save_context(context).await {
            tracing::warn!(%error, "failed to keep the id of a conversation");
        }
        SessionStart::New(id)
    }

    async fn save_context(&self, context: &StoredContext) -> Result<(), RunError> {
        let (path, copy) = (self.paths.context(), context.clone());
        self.fence
            .write("saving the context", GIT_DEADLINE, move || {
                Ok(copy.save(&path)?)
            })
            .await
    }

    async fn spawn_agent(&self, session: &SessionStart) -> Result<Agent, crate::agent::AgentError> {
        let settings = self
            .agent_settings
            .as_ref()
            .ok_or(crate::agent::AgentError::NotInstalled)?;
        Agent::start(
            &self.launcher,
            &self.gateway,
            settings,
            self.agent_site.clone(),
            session,
            &self.tasks,
        )
        .await
    }

    /// Runs `work` on the thread's worktree, if we may still write.
    ///
    /// # Errors
    /// [`RunError`].
    pub async fn on_disk<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Worktree) -> Result<T, RepositoryError> + Send + 'static,
    ) -> Result<T, RunError> {
        let worktree = self.worktree.clone();
        self.fence
            .write(what, GIT_DEADLINE, move || Ok(work(&worktree)?))
            .await
    }

    /// Commits what is in the worktree, as the work of nobody's turn, after the guard has put right
    /// what had to be.
    ///
    /// # Errors
    /// If the repository cannot be written.
    pub async fn commit_outside_edits(&self) -> Result<Committed, RunError> {
        self.commit_what_is_there(false).await
    }

    /// As [`TurnSite::commit_outside_edits`]; with `watch` what changes after that is watched, for the
    /// turn's own commit.
    async fn commit_what_is_there(&self, watch: bool) -> Result<Committed, RunError> {
        let trailers = vec![
            ("Thread", self.key.to_string()),
            ("Status", "outside".to_owned()),
        ];
        let committer = self.committer.clone();
        let held_dir = self.paths.held_outside();
        let fence = self.fence.clone();
        let watch = watch.then(|| self.watch.clone());
        let committed = self
            .on_disk("committing outside edits", move |tree| {
                tree.commit(&CommitRequest {
                    text: CommitText {
                        instruction: "Edits made outside of a turn",
                        trailers: &trailers,
                        author: &committer,
                        committer: &committer,
                    },
                    scope: watch.as_ref().map_or(Scope::All, Scope::AllAndWatch),
                    strangers: Strangers::Keep,
                    held_dir: &held_dir,
                    fence: &fence,
                })
            })
            .await?;
        if let Some(commit) = &committed.commit {
            metrics::counter!("greenroom_commits_total", "of" => "outside").increment(1);
            tracing::info!(
                commit = commit.id,
                files = commit.files.len(),
                "committed edits made outside of a turn"
            );
        }
        Ok(committed)
    }

    async fn commit_turn(
        &self,
        accepted: &Accepted,
        status: TurnStatus,
        outcome: &RunOutcome,
    ) -> Result<Committed, RunError> {
        let mut trailers = vec![
            ("Turn-Id", accepted.turn_id.to_string()),
            ("Thread", self.key.to_string()),
        ];
        if accepted.kind != TurnKind::Turn {
            trailers.push(("Kind", accepted.kind.as_str().to_owned()));
        }
        trailers.extend(outcome.session_id.clone().map(|id| ("Session-Id", id)));
        trailers.extend(outcome.model.clone().map(|model| ("Model", model)));
        let usage = outcome.usage + accepted.usage.unwrap_or_default();
        trailers.push(("Cost-USD", format!("{:.6}", usage.cost_usd)));
        trailers.push(("Status", status.as_str().to_owned()));
        let committer = self.committer.clone();
        let author = accepted.author.clone().unwrap_or_else(|| committer.clone());
        let instruction = accepted.instruction.clone();
        let held_dir = self.paths.held(&accepted.turn_id);
        let fence = self.fence.clone();
        let watch = self.watch.clone();
        self.on_disk("committing a turn", move |tree| {
            tree.commit(&CommitRequest {
                text: CommitText {
                    instruction: &instruction,
                    trailers: &trailers,
                    author: &author,
                    committer: &committer,
                },
                scope: Scope::Since(&watch),
                strangers: Strangers::Fold,
                held_dir: &held_dir,
                fence: &fence,
            })
        })
        .await
    }

    /// Gives a turn without a live owner its outcome: what it wrote is committed, an operation is
    /// carried out to its end.
    ///
    /// # Errors
    /// If journal or repository cannot be written.
    pub async fn recover(
        &self,
        accepted: &Accepted,
        journal: &Journal,
        mut context: StoredContext,
    ) -> Result<StoredContext, RunError> {
        if !accepted.kind.is_run() {
            let text = format!("{} (finished after an interruption)", accepted.instruction);
            let off = async |_: Option<&CommitSummary>| TurnPreview {
                state: PreviewState::Off,
                errors: Vec::new(),
            };
            self.carry_out(accepted, journal, &mut context, text, &[], off)
                .await?;
            return Ok(context);
        }
        let made = {
            let id = accepted.turn_id.to_string();
            self.on_disk("looking for a turn's commit", move |tree| {
                tree.find_commit_with("Turn-Id", &id)
            })
            .await?
        };
        let committed = match made {
            // It was cut off between its commit and its outcome: what is there now came later.
            Some(commit) => Committed {
                commit: Some(commit),
                ..self.commit_outside_edits().await?
            },
            None => {
                let outcome = RunOutcome::nothing();
                self.commit_turn(accepted, TurnStatus::Recovered, &outcome)
                    .await?
            }
        };
        let mut result = blank_result(accepted, &context);
        result.status = TurnStatus::Recovered;
        result.text = "The turn was cut off; the edits that it had made are kept.".into();
        result.session_id.clone_from(&context.session_id);
        result.held_back = committed.held_back;
        result.repairs = sentences(&committed.repairs);
        if let Some(commit) = committed.commit {
            if !journal.record().has_commit() {
                journal
                    .append(TurnEvent::CommitCreated {
                        commit: commit.clone(),
                    })
                    .await?;
            }
            result.commit = Some(commit);
        }
        self.finish(accepted, journal, &mut context, &mut result)
            .await?;
        Ok(context)
    }

    /// Context first, outcome last: a crash between the two recovers the turn once more.
    pub(super) async fn finish(
        &self,
        accepted: &Accepted,
        journal: &Journal,
        context: &mut StoredContext,
        result: &mut TurnResult,
    ) -> Result<(), RunError> {
        context
            .history
            .retain(|entry| entry.turn_id != accepted.turn_id);
        context.record(accepted, result);
        result.context = context.answer();
        let saved = self.save_context(context).await;
        if matches!(&saved, Err(RunError::Workspace(error)) if error.is_no_space()) {
            journal.give_up_full().await;
        }
        saved?;
        journal.append(TurnEvent::terminal(result.clone())).await?;
        journal.flush().await?;
        let kind = result.kind.as_str();
        tell_outcome(&self.outcomes, &self.key, result);
        if result.status != TurnStatus::Recovered {
            metrics::histogram!("greenroom_turn_duration_seconds", "kind" => kind)
                .record(result.duration_ms as f64 / 1e3);
        }
        Ok(())
    }
}

/// A turn has its outcome.
pub fn tell_outcome(outcomes: &Outcomes, key: &ThreadKey, result: &TurnResult) {
    let outcome = || Outcome {
        key: key.clone(),
        result: result.clone(),
    };
    if outcomes.receiver_count() > 0 {
        outcomes.send(Arc::new(outcome())).ok();
    }
    let (kind, status) = (result.kind.as_str(), result.status.as_str());
    metrics::counter!("greenroom_turns_total", "kind" => kind, "status" => status).increment(1);
    let client = key.client.to_string();
    metrics::counter!("greenroom_client_turns_total", "client" => client, "status" => status)
        .increment(1);
}

impl RunOutcome {
    /// Did the agent fail before it said anything?
    fn has_not_begun(&self) -> bool {
        self.session_id.is_none() && matches!(self.ending, Ending::Failed(_))
    }

    /// Of a run in which nothing happened.
    pub fn nothing() -> Self {
        Self {
            ending: Ending::Cancelled,
            text: String::new(),
            usage: Usage::default(),
            num_turns: 0,
            session_id: None,
            model: None,
            touched: BTreeSet::new(),
            left_running: false,
            counted: Spent::default(),
        }
    }
}

pub(super) fn sentences(repairs: &[Repair]) -> Vec<String> {
    repairs.iter().map(Repair::to_string).collect()
}

/// A turn of which nothing is known but that it was accepted.
pub fn blank_result(accepted: &Accepted, context: &StoredContext) -> TurnResult {
    TurnResult {
        turn_id: accepted.turn_id.clone(),
        kind: accepted.kind,
        effect: accepted.effect.clone(),
        status: TurnStatus::Queued,
        mode: accepted.mode,
        text: String::new(),
        session_id: None,
        commit: None,
        usage: accepted.usage.unwrap_or_default(),
        report: accepted.report.clone(),
        num_turns: 0,
        duration_ms: 0,
        preview: TurnPreview {
            state: PreviewState::Off,
            errors: Vec::new(),
        },
        held_back: Vec::new(),
        repairs: Vec::new(),
        continuity: Continuity::Fresh,
        context: context.answer(),
        processes_left: false,
        error: None,
        code: None,
        retry_at: None,
    }
}

/// Runs a turn. `agent` is the thread's CLI if it is up, with how it got at the conversation;
/// `preview` tells the preview's state at the end.
///
/// Not cancel safe: cancel through the token.
pub async fn run_turn(
    site: &TurnSite,
    accepted: &Accepted,
    journal: &Journal,
    mut context: StoredContext,
    agent: Option<(Agent, Continuity)>,
    cancel: &CancellationToken,
    preview: impl AsyncFnOnce(Option<&CommitSummary>, Folder) -> TurnPreview,
) -> RunEnd {
    let (started, began) = (Instant::now(), Timestamp::now());
    let mut result = blank_result(accepted, &context);
    let mut slot = agent;
    let mut folder = Folder::Same;
    let outcome = match begin(site, accepted, journal, &mut slot, &mut result).await {
        Ok(found) => {
            folder = found;
            drive(
                site,
                accepted,
                journal,
                &mut context,
                &mut slot,
                &mut result,
                cancel,
            )
            .await
        }
        Err(error) => Err(error),
    };
    let failure = match outcome {
        Ok(outcome) => {
            reconcile(site, Account::turn(&accepted.turn_id), &outcome, began);
            let failure = apply(&outcome, accepted, &mut result);
            match commit(site, accepted, journal, &outcome, &mut result).await {
                Ok(()) => failure,
                Err(error) => Some(internal(&error)),
            }
        }
        Err(error) => Some(internal(&error)),
    };
    site.watch.end();
    if let Some(failure) = failure {
        result.status = TurnStatus::Failed;
        result.error = Some(failure.message);
        result.code = Some(failure.code);
    }
    if site.fence.check().is_err() {
        tracing::warn!("gave a turn up with the thread's lease: its next owner recovers it");
        return RunEnd {
            result,
            agent: None,
            context,
            is_unfinished: true,
        };
    }
    result.preview = preview(result.commit.as_ref(), folder).await;
    result.duration_ms = started.elapsed().as_millis() as u64;
    let finished = site
        .finish(accepted, journal, &mut context, &mut result)
        .await;
    if let Err(error) = &finished {
        tracing::error!(error = %chain(error), "failed to write a turn's outcome");
        result.status = TurnStatus::Failed;
        result.error = Some("The workspace's disk does not take the outcome of this turn.".into());
        result.code = Some(ErrorCode::Internal);
    }
    tracing::info!(
        status = result.status.as_str(),
        elapsed_ms = result.duration_ms,
        cost_usd = result.usage.cost_usd,
        commit = result.commit.as_ref().map(|commit| commit.id.as_str()),
        "turn ended"
    );
    let agent = slot.filter(|(agent, _)| agent.is_usable());
    RunEnd {
        result,
        agent,
        context,
        is_unfinished: finished.is_err(),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// An error's own text as a sentence.
fn sentence(error: &RepositoryError) -> String {
    let text = error.to_string();
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).chain(['.']).collect()
}

fn internal(error: &RunError) -> TurnFailure {
    tracing::error!(error = chain(error), "a turn failed inside greenroom");
    match error {
        RunError::Agent(_) => TurnFailure {
            code: ErrorCode::AgentFailed,
            message: "The agent's program, claude, could not be started; /ready says what is \
                      missing."
                .into(),
        },
        RunError::Repository(error @ RepositoryError::Locked) => TurnFailure {
            code: ErrorCode::ThreadBusyElsewhere,
            message: sentence(error),
        },
        RunError::Repository(error @ RepositoryError::Tampered { .. }) => TurnFailure {
            code: ErrorCode::Internal,
            message: format!("{} The operator has to look at it.", sentence(error)),
        },
        _ => TurnFailure {
            code: ErrorCode::Internal,
            message: "The turn could not be carried out; the edits so far are kept. The log has \
                      the reason."
                .into(),
        },
    }
}

/// The worktree's folder, since the turn before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Folder {
    Same,
    /// It was gone and is another one now: what stood in the old one must start again.
    New,
}

/// Puts the worktree right, commits what others edited there, and brings what the turn begins with.
async fn begin(
    site: &TurnSite,
    accepted: &Accepted,
    journal: &Journal,
    slot: &mut Option<(Agent, Continuity)>,
    result: &mut TurnResult,
) -> Result<Folder, RunError> {
    journal.append(TurnEvent::Started {}).await?;
    let repairs = site.commit_what_is_there(true).await?.repairs;
    result.repairs = sentences(&repairs);
    if !accepted.brings.is_empty() {
        // Watched by now, so that the turn's own commit has them.
        let brings = accepted.brings.clone();
        let bring = move |tree: &Worktree| tree.bring(&brings);
        site.on_disk("bringing files along", bring).await?;
    }
    if !repairs.contains(&Repair::Folder) {
        return Ok(Folder::Same);
    }
    if let Some((agent, _)) = slot.take() {
        agent.stop().await;
    }
    Ok(Folder::New)
}

async fn drive(
    site: &TurnSite,
    accepted: &Accepted,
    journal: &Journal,
    context: &mut StoredContext,
    slot: &mut Option<(Agent, Continuity)>,
    result: &mut TurnResult,
    cancel: &CancellationToken,
) -> Result<RunOutcome, RunError> {
    if cancel.is_cancelled() {
        return Ok(RunOutcome::nothing());
    }
    let account = Account::turn(&accepted.turn_id);
    let spent_before_usd = accepted.usage.map_or(0.0, |usage| usage.cost_usd);
    let meter = site.gateway.ledger().meter(account.clone());
    meter.spent_before(spent_before_usd);
    match meter.check().await {
        Ok(()) => {}
        Err(Denied::OverBudget(breach)) => {
            return Ok(RunOutcome {
                ending: Ending::OverBudget(breach),
                ..RunOutcome::nothing()
            });
        }
        // The gateway asks again, and knows what to do.
        Err(error) => tracing::warn!(error = chain(&error), "failed to look at the budgets"),
    }
    let deadline = Instant::now() + Duration::from_secs_f64(accepted.timeout_seconds);
    let request = |instruction| RunRequest {
        account: account.clone(),
        instruction,
        mode: accepted.mode,
        model: accepted.model.clone(),
        deadline,
        spent_before_usd,
    };
    let is_ready = |slot: &Option<(Agent, Continuity)>| {
        slot.as_ref().is_some_and(|(agent, _)| agent.is_usable())
    };
    let mut was_waiting = is_ready(slot);
    let process = match slot {
        Some((agent, _)) if was_waiting && agent.has_served() => "warm",
        Some(_) if was_waiting => "waiting",
        _ => "cold",
    };
    metrics::counter!("greenroom_agent_runs_total", "process" => process).increment(1);
    loop {
        if !is_ready(slot) {
            *slot = Some(site.start_agent(context).await?);
        }
        let (agent, continuity) = slot.as_mut().expect("it was just filled");
        result.continuity = *continuity;
        let instruction = match continuity {
            Continuity::Replayed => replay_summary(context) + &accepted.instruction,
            Continuity::Native | Continuity::Fresh => accepted.instruction.clone(),
        };
        let outcome = follow(site, journal, agent, request(instruction), cancel).await?;
        if was_waiting && outcome.has_not_begun() && !agent.is_usable() {
            tracing::warn!("the agent died while it waited for an instruction; another one starts");
            was_waiting = false;
            continue;
        }
        if outcome.ending == Ending::SessionLost {
            break;
        }
        // From now on the process itself remembers.
        *continuity = Continuity::Native;
        return Ok(outcome);
    }
    tracing::warn!("the agent has lost the conversation; it begins with a summary");
    let session = site.new_session(context).await;
    let mut agent = site.spawn_agent(&session).await?;
    result.continuity = Continuity::Replayed;
    let instruction = replay_summary(context) + &accepted.instruction;
    let outcome = follow(site, journal, &mut agent, request(instruction), cancel).await;
    *slot = Some((agent, Continuity::Native));
    outcome
}

/// Runs the agent while its events go to the journal.
async fn follow(
    site: &TurnSite,
    journal: &Journal,
    agent: &mut Agent,
    request: RunRequest,
    cancel: &CancellationToken,
) -> Result<RunOutcome, RunError> {
    let (sender, mut events) = mpsc::channel(64);
    let forward = async {
        let mut failed = None;
        while let Some(event) = events.recv().await {
            if failed.is_none()
                && let Err(error) = journal.append(site.turn_event(event)).await
            {
                // The run goes on being read, so that it can end; the turn then fails.
                cancel.cancel();
                failed = Some(error);
            }
        }
        failed
    };
    let (outcome, failed) = tokio::select! {
        biased;
        // At once, and without a word to anybody: dropped with its agent, the run is killed.
        () = site.fence.lost() => return Err(LeaseLost.into()),
        both = async { tokio::join!(agent.run(request, sender, cancel), forward) } => both,
    };
    match failed {
        None => Ok(outcome),
        Some(error) => Err(error.into()),
    }
}

impl TurnSite {
    fn turn_event(&self, event: RunEvent) -> TurnEvent {
        match event {
            RunEvent::Text(text) => TurnEvent::TextDelta { text },
            RunEvent::ToolStarted { id, name, input } => TurnEvent::ToolStarted { id, name, input },
            RunEvent::ToolFinished { id, ok, summary } => TurnEvent::ToolFinished {
                id,
                ok,
                summary: self.without_worktree(&summary),
            },
            RunEvent::FileTouched { path, is_new } => TurnEvent::FileChanged {
                path: self.relative(&path),
                status: if is_new {
                    FileStatus::Added
                } else {
                    FileStatus::Modified
                },
            },
            RunEvent::Waiting { until, reason } => TurnEvent::Waiting { until, reason },
            RunEvent::BudgetWarning(warning) => TurnEvent::BudgetWarning {
                spent_usd: warning.spent_usd,
                limit_usd: warning.limit.usd,
                limit: warning.limit.to_string(),
            },
        }
    }

    /// The text with the site's files named as its owner knows them.
    fn without_worktree(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.agent_site.worktree.display()), "")
    }

    fn relative(&self, path: &str) -> String {
        let path = PathBuf::from(path);
        path.strip_prefix(&self.agent_site.worktree)
            .unwrap_or(&path)
            .display()
            .to_string()
    }
}

/// Said where not all could be ended.
const LEFT_RUNNING: &str = "Something that the turn had started could not be ended and may still \
                            run; the operator has to look after it.";

/// Takes what the agent's run says into the result.
pub(super) fn apply(
    outcome: &RunOutcome,
    accepted: &Accepted,
    result: &mut TurnResult,
) -> Option<TurnFailure> {
    result.text.clone_from(&outcome.text);
    result.usage = outcome.usage + accepted.usage.unwrap_or_default();
    result.num_turns = outcome.num_turns;
    result.session_id.clone_from(&outcome.session_id);
    result.processes_left = outcome.left_running;
    if outcome.left_running {
        if !result.text.is_empty() {
            result.text.push_str("\n\n");
        }
        result.text.push_str(LEFT_RUNNING);
    }
    let fail = |code, mut message: String| {
        if outcome.left_running {
            message = format!("{message} {LEFT_RUNNING}");
        }
        Some(TurnFailure { code, message })
    };
    match &outcome.ending {
        Ending::Completed => {
            result.status = TurnStatus::Completed;
            None
        }
        Ending::Cancelled => {
            result.status = TurnStatus::Cancelled;
            None
        }
        Ending::Failed(why) => fail(ErrorCode::AgentFailed, why.clone()),
        Ending::SessionLost => fail(
            ErrorCode::AgentFailed,
            "The agent could not begin the conversation; please send the instruction again.".into(),
        ),
        Ending::OverBudget(breach) => {
            result.retry_at = breach.resets;
            let what = breach.to_string();
            let mut chars = what.chars();
            let first = chars.next().into_iter().flat_map(char::to_uppercase);
            let sentence: String = first.chain(chars).collect();
            fail(
                ErrorCode::BudgetExceeded,
                format!("{sentence}. The edits so far are kept; the operator can raise it."),
            )
        }
        Ending::TimedOut => fail(
            ErrorCode::TurnTimeout,
            format!(
                "The turn took longer than {} s and was stopped; the edits so far are kept.",
                accepted.timeout_seconds
            ),
        ),
    }
}

pub(super) async fn commit(
    site: &TurnSite,
    accepted: &Accepted,
    journal: &Journal,
    outcome: &RunOutcome,
    result: &mut TurnResult,
) -> Result<(), RunError> {
    if accepted.mode == TurnMode::Plan {
        // Whatever changed meanwhile is a person's: it is committed as such, before the next turn.
        return Ok(());
    }
    let status = match &outcome.ending {
        Ending::Completed => TurnStatus::Completed,
        Ending::Cancelled => TurnStatus::Cancelled,
        Ending::Failed(_) | Ending::TimedOut | Ending::OverBudget(_) | Ending::SessionLost => {
            TurnStatus::Failed
        }
    };
    let committed = site.commit_turn(accepted, status, outcome).await?;
    result.held_back = committed.held_back;
    result.repairs.extend(sentences(&committed.repairs));
    if let Some(commit) = committed.commit {
        metrics::counter!("greenroom_commits_total", "of" => accepted.kind.as_str()).increment(1);
        let told: BTreeSet<String> = outcome.touched.iter().map(|p| site.relative(p)).collect();
        for file in commit
            .files
            .iter()
            .filter(|file| !told.contains(&file.path))
        {
            let event = TurnEvent::FileChanged {
                path: file.path.clone(),
                status: file.status,
            };
            journal.append(event).await?;
        }
        journal
            .append(TurnEvent::CommitCreated {
                commit: commit.clone(),
            })
            .await?;
        result.commit = Some(commit);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::identity::TurnId;

    /// A completed turn without any content.
    pub(crate) fn result(id: &TurnId) -> TurnResult {
        let accepted = Accepted {
            turn_id: id.clone(),
            kind: TurnKind::Turn,
            effect: crate::domain::Effect::default(),
            applies: None,
            usage: None,
            report: None,
            brings: Vec::new(),
            mode: TurnMode::Execute,
            instruction: String::new(),
            model: None,
            timeout_seconds: 1.0,
            author: None,
            accepted_at: Timestamp::now(),
        };
        let context = StoredContext::new(id.key());
        TurnResult {
            status: TurnStatus::Completed,
            ..blank_result(&accepted, &context)
        }
    }
}
