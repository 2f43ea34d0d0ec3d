//! The driver of one thread: its queue, its agent, its preparation. One task per active thread;
//! slow work runs beside it in a set of its own and comes back as a value, so that the driver
//! always answers.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    Brought, ExecuteRequest, InitAnswer, InitRequest, Inner, LiveTurn, SupervisorError, lock,
    one_shot::{self, OneShot, OneShotAnswer, OneShotEnd},
    operation::{self, OperationAnswer, OperationEnd, OperationRequest},
    prepare::{self, Preparation, Prepared},
    preview_word,
    removal::{self, Removal, Removed},
};
use crate::{
    agent::Agent,
    domain::{CommitSummary, Continuity, Effect, TurnEvent, TurnKind, TurnStatus},
    identity::{ThreadKey, TurnId},
    lease::Lease,
    lifecycle::{Guard, HolderKind},
    repository::Worktree,
    turn::{
        Accepted, Folder, Journal, RunEnd, StoredContext, TurnFile, TurnRecord, blank_result,
        run_turn, tell_outcome,
    },
};

/// Requests that wait for a driver. Admission itself is bounded by the queue's limit; this only
/// has to take in what comes while one admission writes its journal.
const MAILBOX: usize = 256;
/// An agent that was not needed for so long is ended.
const AGENT_IDLE: Duration = Duration::from_secs(15 * 60);
/// Stopping a thread: an interrupted turn commits and writes its outcome in this time.
const STOP_GRACE: Duration = Duration::from_secs(15);

type Reply<T> = oneshot::Sender<Result<T, SupervisorError>>;

/// What a driver is asked for.
#[derive(Debug)]
pub(super) enum Request {
    Init(InitRequest, Reply<InitAnswer>),
    /// Prepare a thread that was initialised before, without an init of its own.
    Revive(Reply<()>),
    Execute(Box<ExecuteRequest>, Reply<TurnRecord>),
    Operate(Box<OperationRequest>, Reply<OperationAnswer>),
    Run(Box<OneShot>, Reply<OneShotAnswer>),
    Remove(Removal, Reply<()>),
    /// A waiting turn was cancelled: look.
    Wake,
    /// Another thread needs the place: end the idle agent.
    RestAgent,
    Stop(oneshot::Sender<()>),
}

/// Sends to a driver. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ThreadHandle {
    requests: mpsc::Sender<Request>,
    /// Is the thread prepared, as far as its driver has come?
    is_prepared: Arc<AtomicBool>,
}

impl ThreadHandle {
    /// Was the thread ready a moment ago? Then there is no need to look for it on the disk.
    pub(super) fn is_prepared(&self) -> bool {
        self.is_prepared.load(Ordering::Relaxed)
    }

    pub(super) async fn send(&self, request: Request) -> Result<(), SupervisorError> {
        self.requests
            .send(request)
            .await
            .map_err(|_| SupervisorError::Draining)
    }

    pub(super) fn try_rest(&self) {
        // A full mailbox means that the thread is busy, so that its agent is not idle.
        self.requests.try_send(Request::RestAgent).ok();
    }

    /// Waits for the running turn's outcome (it has to be cancelled before, if it should end
    /// early) and ends the agent.
    pub(super) async fn stop(self) {
        let (reply, stopped) = oneshot::channel();
        if self.requests.send(Request::Stop(reply)).await.is_ok() {
            stopped.await.ok();
        }
    }
}

pub(super) fn start(inner: Arc<Inner>, key: ThreadKey) -> ThreadHandle {
    let (sender, inbox) = mpsc::channel(MAILBOX);
    let span = tracing::info_span!(parent: None, "thread", thread = %key);
    let tasks = inner.tasks.clone();
    let is_prepared = Arc::new(AtomicBool::new(false));
    let driver = Driver {
        inner,
        key,
        is_prepared: is_prepared.clone(),
        prepared: None,
        lease: None,
        context: None,
        agent: None,
        agent_idle_since: Instant::now(),
        queue: VecDeque::new(),
        is_running: false,
        is_removing: false,
        is_preparing: false,
        waiting: Vec::new(),
        work: JoinSet::new(),
    };
    tasks.spawn("thread", driver.drive(inbox).instrument(span));
    ThreadHandle {
        requests: sender,
        is_prepared,
    }
}

/// A turn that was accepted and waits.
#[derive(Debug)]
struct Queued {
    accepted: Accepted,
    journal: Journal,
    cancel: CancellationToken,
    /// Of the request that asked for it; none for one from before a restart.
    request_id: Option<String>,
    _guard: Guard,
}

/// Something besides a turn that waits. Nothing of it was accepted yet.
#[derive(Debug)]
struct Wish {
    what: Wanted,
    _guard: Guard,
}

#[derive(Debug)]
enum Wanted {
    Operation(Box<OperationRequest>, Reply<OperationAnswer>),
    Run(Box<OneShot>, Reply<OneShotAnswer>),
    Removal(Removal, Reply<()>),
}

impl Wanted {
    fn is_abandoned(&self) -> bool {
        match self {
            Self::Operation(_, reply) => reply.is_closed(),
            Self::Run(_, reply) => reply.is_closed(),
            Self::Removal(_, reply) => reply.is_closed(),
        }
    }

    fn refuse(self, error: SupervisorError) {
        match self {
            Self::Operation(_, reply) => drop(reply.send(Err(error))),
            Self::Run(_, reply) => drop(reply.send(Err(error))),
            Self::Removal(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// What waits in line, in the order in which it was asked for.
#[derive(Debug)]
enum InLine {
    Turn(Box<Queued>),
    Wish(Wish),
}

enum Waiter {
    Init(InitRequest, Reply<InitAnswer>),
    Revive(Reply<()>),
}

/// Work that came back.
enum Done {
    Prepared(Result<Box<Preparation>, SupervisorError>),
    Turn(TurnId, Box<RunEnd>),
    Operation(Box<OperationEnd>, Reply<OperationAnswer>),
    /// A one-shot run, which was answered.
    Run(Box<OneShotEnd>),
    Removal(Removed, Reply<()>),
    /// Replies, cancelled waiting turns: nothing to take in.
    Nothing,
    /// A waiting turn was cancelled and has its outcome.
    Dropped(TurnId, Box<StoredContext>),
}

struct Driver {
    inner: Arc<Inner>,
    key: ThreadKey,
    /// Told to whoever holds a handle.
    is_prepared: Arc<AtomicBool>,
    prepared: Option<Prepared>,
    /// Held as long as anything of ours may write.
    lease: Option<Arc<Lease>>,
    context: Option<StoredContext>,
    agent: Option<(Agent, Continuity)>,
    agent_idle_since: Instant,
    queue: VecDeque<InLine>,
    /// A turn or an operation is under way.
    is_running: bool,
    /// A removal waits or is under way: nothing more is admitted.
    is_removing: bool,
    is_preparing: bool,
    waiting: Vec<Waiter>,
    work: JoinSet<Done>,
}

impl Driver {
    async fn drive(mut self, mut inbox: mpsc::Receiver<Request>) {
        loop {
            self.is_prepared
                .store(self.prepared.is_some(), Ordering::Relaxed);
            let agent_idle_at = self.agent_idle_since + AGENT_IDLE;
            tokio::select! {
                biased;
                Some(done) = self.work.join_next() => match done {
                    Ok(done) => self.take_in(done),
                    // A panic below is a panic here: it stops the program instead of a thread.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                () = lost(self.lease.as_deref()) => self.lose(),
                () = sleep_until(agent_idle_at), if self.agent.is_some() => self.rest_agent(),
                request = inbox.recv() => match request {
                    None => break,
                    Some(Request::Stop(reply)) => {
                        inbox.close();
                        self.stop().await;
                        reply.send(()).ok();
                        break;
                    }
                    Some(request) => self.handle(request).await,
                },
            }
        }
    }

    async fn handle(&mut self, request: Request) {
        match request {
            Request::Init(request, reply) => {
                if self.prepared.is_some() && !self.is_removing {
                    self.answer_init(request, true, reply);
                } else {
                    self.waiting.push(Waiter::Init(request, reply));
                    self.prepare();
                }
            }
            Request::Revive(reply) => {
                if self.prepared.is_some() {
                    reply.send(Ok(())).ok();
                } else {
                    self.waiting.push(Waiter::Revive(reply));
                    self.prepare();
                }
            }
            Request::Execute(request, reply) => {
                let admitted = self.admit(*request).await;
                reply.send(admitted).ok();
                self.start_next();
            }
            Request::Operate(request, reply) => self.wish(Wanted::Operation(request, reply)),
            Request::Run(shot, reply) => self.wish(Wanted::Run(shot, reply)),
            Request::Remove(removal, reply) => self.wish(Wanted::Removal(removal, reply)),
            Request::Wake => self.drop_cancelled(),
            Request::RestAgent => self.rest_agent(),
            Request::Stop(_) => unreachable!("handled by the loop"),
        }
    }

    /// Starts the preparation, unless it is under way. The first waiter's wishes are followed:
    /// a thread's repository and base are chosen once.
    fn prepare(&mut self) {
        if self.is_preparing || self.is_removing || self.inner.draining.is_cancelled() {
            return;
        }
        self.is_preparing = true;
        let wishes = self.waiting.iter().find_map(|waiter| match waiter {
            Waiter::Init(request, _) => Some(request.clone()),
            Waiter::Revive(_) => None,
        });
        let (inner, key) = (self.inner.clone(), self.key.clone());
        let work = async move {
            let prepared = prepare::prepare(&inner, &key, wishes).await;
            Done::Prepared(prepared.map(Box::new))
        };
        self.work.spawn(work.in_current_span());
    }

    fn take_in(&mut self, done: Done) {
        match done {
            Done::Nothing => {}
            Done::Dropped(id, context) => {
                if self.prepared.is_some() {
                    self.context = Some(*context);
                }
                lock(&self.inner.live).remove(&id);
            }
            Done::Prepared(Err(error)) => {
                self.is_preparing = false;
                for waiter in std::mem::take(&mut self.waiting) {
                    match waiter {
                        Waiter::Init(_, reply) => reply.send(Err(error.clone())).ok().is_some(),
                        Waiter::Revive(reply) => reply.send(Err(error.clone())).ok().is_some(),
                    };
                }
            }
            Done::Prepared(Ok(preparation)) => {
                self.is_preparing = false;
                let Preparation {
                    lease,
                    prepared,
                    context,
                    agent,
                    requeued,
                    resumed,
                } = *preparation;
                self.lease = Some(lease);
                self.context = Some(context);
                self.agent = agent;
                self.prepared = Some(prepared);
                if self.agent.is_some() {
                    self.keep_agent();
                }
                for (accepted, journal) in requeued {
                    self.enqueue(accepted, journal, None);
                }
                self.serve_waiting(resumed);
                self.start_next();
            }
            Done::Operation(end, reply) => {
                self.is_running = false;
                let OperationEnd {
                    answer,
                    context,
                    is_unfinished,
                    folder,
                } = *end;
                reply.send(answer).ok();
                self.go_on(context, is_unfinished, folder);
            }
            Done::Run(end) => {
                self.is_running = false;
                let OneShotEnd {
                    context,
                    is_unfinished,
                    folder,
                } = *end;
                self.go_on(context, is_unfinished, folder);
            }
            Done::Removal(removed, reply) => {
                self.is_running = false;
                self.is_removing = false;
                match removed {
                    Removed::Done => {
                        self.forget();
                        reply.send(Ok(())).ok();
                    }
                    Removed::Failed(error) => {
                        reply.send(Err(error)).ok();
                        self.begin_anew();
                    }
                    Removed::Refused(error, agent) => {
                        reply.send(Err(error)).ok();
                        if self.prepared.is_none() {
                            self.prepare();
                            return;
                        }
                        self.agent = *agent;
                        if self.agent.is_some() {
                            self.keep_agent();
                        }
                        self.serve_waiting(true);
                        self.start_next();
                    }
                }
            }
            Done::Turn(id, end) => {
                self.is_running = false;
                lock(&self.inner.live).remove(&id);
                if self.prepared.is_none() {
                    // The lease was lost under it.
                    self.prepare();
                    return;
                }
                self.agent = end.agent;
                if end.is_unfinished {
                    self.rest_agent();
                    self.begin_anew();
                    return;
                }
                self.context = Some(end.context);
                if self.agent.is_some() {
                    self.keep_agent();
                }
                self.start_next();
            }
        }
    }

    /// After something besides a turn. `context`: unchanged if there is none.
    fn go_on(&mut self, context: Option<StoredContext>, is_unfinished: bool, folder: Folder) {
        if self.prepared.is_none() {
            self.prepare();
            return;
        }
        if is_unfinished {
            self.begin_anew();
            return;
        }
        if let Some(context) = context {
            self.context = Some(context);
        }
        if folder == Folder::New {
            self.rest_agent();
            if let Some(prepared) = &self.prepared {
                prepared.attach.again();
            }
        }
        self.start_next();
    }

    /// Answers those who waited for the thread to be ready.
    fn serve_waiting(&mut self, mut resumed: bool) {
        for waiter in std::mem::take(&mut self.waiting) {
            match waiter {
                Waiter::Init(request, reply) => {
                    self.answer_init(request, resumed, reply);
                    // Whoever asked second finds the branch that the first one made.
                    resumed = true;
                }
                Waiter::Revive(reply) => {
                    reply.send(Ok(())).ok();
                }
            }
        }
    }

    fn answer_init(&mut self, request: InitRequest, resumed: bool, reply: Reply<InitAnswer>) {
        let Some(prepared) = self.prepared.clone() else {
            return;
        };
        let (inner, key) = (self.inner.clone(), self.key.clone());
        let work = async move {
            reply
                .send(prepare::answer(&inner, &key, &prepared, &request, resumed).await)
                .ok();
            Done::Nothing
        };
        self.work.spawn(work.in_current_span());
    }

    /// Is there room for one more in line?
    fn check_line(&self) -> Result<(), SupervisorError> {
        if self.prepared.is_none() {
            return Err(SupervisorError::BusyElsewhere);
        }
        if self.is_removing {
            return Err(SupervisorError::NotFound("this thread is being removed"));
        }
        let limit = self.inner.settings.max_queued_turns;
        // The running one does not wait.
        if self.queue.len() >= limit + usize::from(!self.is_running) {
            return Err(SupervisorError::QueueFull { limit });
        }
        Ok(())
    }

    fn wish(&mut self, what: Wanted) {
        if let Err(error) = self.check_line() {
            what.refuse(error);
            return;
        }
        self.is_removing |= matches!(what, Wanted::Removal(..));
        let who = format!("an operation on {}", self.key);
        let guard = self.inner.activity.hold(HolderKind::Queue, who);
        self.queue.push_back(InLine::Wish(Wish {
            what,
            _guard: guard,
        }));
        self.start_next();
    }

    /// Writes a turn into its journal and puts it in line.
    async fn admit(&mut self, request: ExecuteRequest) -> Result<TurnRecord, SupervisorError> {
        let paths = self.inner.paths(&self.key);
        let Some(prepared) = &self.prepared else {
            return Err(SupervisorError::BusyElsewhere);
        };
        let fence = &prepared.site.fence;
        let seen = request
            .idempotency_key
            .map(|key| prepare::IdempotencyMark::new(&paths, &key));
        if let Some(mark) = &seen
            && let Some(id) = mark.turn(&self.key).await?
        {
            if let Some(live) = lock(&self.inner.live).get(&id) {
                return Ok(live.record.clone());
            }
            return Ok(TurnRecord::at_rest(TurnFile::new(&paths, id)));
        }
        self.check_line()?;
        let mut brings = Vec::new();
        for Brought { path, content } in request.brings {
            let keep = move |tree: &Worktree| tree.keep_for(&path, &content);
            brings.push(prepared.site.on_disk("keeping a file", keep).await?);
        }
        let timeout = request.timeout.unwrap_or(self.inner.settings.turn_timeout);
        let accepted = Accepted {
            turn_id: TurnId::new(&self.key),
            kind: TurnKind::Turn,
            effect: Effect::default(),
            applies: None,
            usage: request.usage,
            report: request.report,
            brings,
            mode: request.mode,
            instruction: request.instruction,
            model: request.model,
            timeout_seconds: timeout.as_secs_f64(),
            author: request.author,
            accepted_at: jiff::Timestamp::now(),
        };
        if let Some(mark) = seen {
            // Before the journal: a crash between the two leaves a mark of a turn that is not
            // there, which the next call with this key takes over.
            mark.set(&accepted.turn_id, fence).await?;
        }
        let journal = Journal::create(&paths, accepted.clone(), fence, &self.inner.tasks).await?;
        let position = self.queue.len() + usize::from(self.is_running);
        journal.append(TurnEvent::Queued { position }).await?;
        let record = journal.record();
        self.enqueue(accepted, journal, request.request_id);
        Ok(record)
    }

    fn enqueue(&mut self, accepted: Accepted, journal: Journal, request_id: Option<String>) {
        let cancel = CancellationToken::new();
        let live = LiveTurn {
            record: journal.record(),
            cancel: cancel.clone(),
        };
        lock(&self.inner.live).insert(accepted.turn_id.clone(), live);
        let guard = self
            .inner
            .activity
            .hold(HolderKind::Queue, accepted.turn_id.to_string());
        self.queue.push_back(InLine::Turn(Box::new(Queued {
            accepted,
            journal,
            cancel,
            request_id,
            _guard: guard,
        })));
    }

    /// Runs what is next in line, if nothing runs.
    fn start_next(&mut self) {
        if self.is_running || self.inner.draining.is_cancelled() {
            return;
        }
        let (Some(prepared), Some(context)) = (self.prepared.clone(), self.context.clone()) else {
            return;
        };
        loop {
            match self.queue.pop_front() {
                None => return,
                // Whoever wished for it has gone, and was promised nothing.
                Some(InLine::Wish(wish)) if wish.what.is_abandoned() => {
                    if matches!(wish.what, Wanted::Removal(..)) {
                        self.is_removing = false;
                        self.serve_waiting(true);
                    }
                }
                Some(InLine::Wish(wish)) => return self.start_wish(wish, prepared, context),
                Some(InLine::Turn(turn)) => return self.start_turn(turn, prepared, context),
            }
        }
    }

    fn start_wish(&mut self, wish: Wish, prepared: Prepared, context: StoredContext) {
        self.is_running = true;
        let inner = self.inner.clone();
        let who = format!("an operation on {}", self.key);
        let holder = inner.activity.hold(HolderKind::Turn, who);
        match wish.what {
            Wanted::Operation(request, reply) => {
                let request_id = request.request_id.clone();
                let span = tracing::info_span!("operation", request_id);
                let work = async move {
                    let end = operation::run(&inner, &prepared, context, &request).await;
                    drop(holder);
                    Done::Operation(Box::new(end), reply)
                };
                self.work.spawn(work.instrument(span));
            }
            Wanted::Run(shot, reply) => {
                let span = tracing::info_span!("one-shot run", request_id = shot.request_id);
                let work = async move {
                    let end = one_shot::run(&inner, &prepared, context, *shot, reply).await;
                    drop(holder);
                    Done::Run(Box::new(end))
                };
                self.work.spawn(work.instrument(span));
            }
            Wanted::Removal(removal, reply) => {
                self.inner.warm.remove(&self.key);
                let agent = self.agent.take();
                let work = async move {
                    let removed = removal::run(&inner, &prepared, agent, removal).await;
                    drop(holder);
                    Done::Removal(removed, reply)
                };
                self.work.spawn(work.in_current_span());
            }
        }
    }

    fn start_turn(&mut self, turn: Box<Queued>, prepared: Prepared, context: StoredContext) {
        let id = turn.accepted.turn_id.clone();
        self.is_running = true;
        self.inner.warm.remove(&self.key);
        let agent = self.agent.take();
        let inner = self.inner.clone();
        let span = tracing::info_span!("turn", turn_id = %id, request_id = turn.request_id);
        let work = async move {
            let Queued {
                accepted,
                journal,
                cancel,
                _guard,
                ..
            } = *turn;
            // Elsewhere as many turns run as may: this one still waits.
            let permit = tokio::select! {
                permit = inner.turns.clone().acquire_owned() => permit.ok(),
                () = cancel.cancelled() => None,
                // It has not begun: it stays in its journal, and in line.
                () = inner.draining.cancelled() => return Done::Nothing,
            };
            let holder = inner.activity.hold(HolderKind::Turn, id.to_string());
            drop(_guard);
            let waited = jiff::Timestamp::now().duration_since(accepted.accepted_at);
            metrics::histogram!("greenroom_turn_wait_seconds")
                .record(waited.as_secs_f64().max(0.0));
            let key = prepared.site.key.clone();
            let updates = inner.preview_status(&key).updates;
            let preview = async |commit: Option<&CommitSummary>, folder: Folder| {
                preview_word::word_on(&inner, &prepared, commit, folder, updates).await
            };
            let turn = run_turn(
                &prepared.site,
                &accepted,
                &journal,
                context,
                agent,
                &cancel,
                preview,
            );
            let mut end = preview_word::with_news(&inner, &key, &journal, turn).await;
            drop((permit, holder));
            if inner.settings.max_warm_agents > 0
                && !inner.draining.is_cancelled()
                && let Some(agent) = end.agent.take()
            {
                end.agent = prepared.site.renew(agent, &mut end.context).await;
            }
            Done::Turn(id, Box::new(end))
        };
        self.work.spawn(work.instrument(span));
    }

    /// Gives waiting turns that were cancelled their outcome.
    fn drop_cancelled(&mut self) {
        let (cancelled, waiting): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(|next| matches!(next, InLine::Turn(turn) if turn.cancel.is_cancelled()));
        self.queue = waiting;
        for next in cancelled {
            let InLine::Turn(turn) = next else { continue };
            let (Some(context), Some(prepared)) = (&mut self.context, &self.prepared) else {
                return;
            };
            let fence = prepared.site.fence.clone();
            let mut result = blank_result(&turn.accepted, context);
            result.status = TurnStatus::Cancelled;
            tell_outcome(&self.inner.outcomes, &self.key, &result);
            context.record(&turn.accepted, &result);
            result.context = context.answer();
            let (context, path) = (context.clone(), self.inner.paths(&self.key).context());
            let work = async move {
                let saved = context.clone();
                let save = move || Ok::<_, SupervisorError>(saved.save(&path)?);
                if let Err(error) = fence.write("saving the context", STOP_GRACE, save).await {
                    tracing::warn!(%error, "failed to save the context; the journal has it all");
                }
                turn.journal.append(TurnEvent::terminal(result)).await.ok();
                turn.journal.flush().await.ok();
                Done::Dropped(turn.accepted.turn_id, Box::new(context))
            };
            self.work.spawn(work.in_current_span());
        }
    }

    /// The thread was removed. Whoever wants it made anew gets it so.
    fn forget(&mut self) {
        tracing::info!("the thread was removed");
        self.lease = None;
        self.prepared = None;
        self.context = None;
        let (inits, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiter| matches!(waiter, Waiter::Init(..)));
        for waiter in others {
            if let Waiter::Revive(reply) = waiter {
                let gone = SupervisorError::NotFound("there is no such thread");
                reply.send(Err(gone)).ok();
            }
        }
        self.waiting = inits;
        if !self.waiting.is_empty() {
            self.prepare();
        }
    }

    /// The agent is idle: it stays if the container has a place for it.
    fn keep_agent(&mut self) {
        self.agent_idle_since = Instant::now();
        for key in self.inner.warm.admit(&self.key) {
            if key == self.key {
                self.rest_agent();
            } else if let Some(other) = lock(&self.inner.threads).get(&key) {
                other.try_rest();
            }
        }
    }

    /// Ends the idle agent; the next turn starts another, which resumes the conversation.
    fn rest_agent(&mut self) {
        if let Some((agent, _)) = self.agent.take() {
            self.inner.warm.remove(&self.key);
            self.work.spawn(async move {
                agent.stop().await;
                Done::Nothing
            });
        }
    }

    /// Nothing of ours may write any more: what runs is killed without an outcome, what waits
    /// stays in its journals. The next owner recovers both; where nobody else came, that is us.
    fn lose(&mut self) {
        tracing::error!("the thread's lease is lost; all of its work here ends");
        self.begin_anew();
    }

    /// Forgets the thread and prepares it again: what is in a journal gets its outcome, or its
    /// place in line.
    fn begin_anew(&mut self) {
        self.lease = None;
        self.prepared = None;
        self.context = None;
        self.is_removing = false;
        for next in self.queue.drain(..) {
            if let InLine::Wish(wish) = next {
                wish.what.refuse(SupervisorError::BusyElsewhere);
            }
        }
        lock(&self.inner.live).retain(|id, _| *id.key() != self.key);
        self.inner.warm.remove(&self.key);
        // Dropped, it is killed.
        self.agent = None;
        let preview = self.inner.previews.get(&self.key.slug());
        self.work.spawn(async move {
            if let Some(preview) = preview {
                preview.stop(Duration::ZERO).await;
            }
            Done::Nothing
        });
        if !self.is_running {
            self.prepare();
        }
    }

    async fn stop(&mut self) {
        self.rest_agent();
        // Turns that never began stay in their journals, and in line.
        self.queue.clear();
        let finish = async {
            while let Some(done) = self.work.join_next().await {
                match done {
                    Ok(Done::Turn(_, end)) => {
                        if let Some((agent, _)) = end.agent {
                            agent.stop().await;
                        }
                    }
                    Ok(Done::Operation(end, reply)) => drop(reply.send(end.answer)),
                    Ok(Done::Removal(removed, reply)) => match removed {
                        Removed::Done => drop(reply.send(Ok(()))),
                        Removed::Failed(error) => drop(reply.send(Err(error))),
                        Removed::Refused(error, agent) => {
                            reply.send(Err(error)).ok();
                            if let Some((agent, _)) = *agent {
                                agent.stop().await;
                            }
                        }
                    },
                    Ok(Done::Prepared(Ok(preparation))) => {
                        if let Some((agent, _)) = preparation.agent {
                            agent.stop().await;
                        }
                    }
                    Ok(_) => {}
                    Err(error) => tracing::error!(%error, "a thread's work broke off"),
                }
            }
        };
        if tokio::time::timeout(STOP_GRACE, finish).await.is_err() {
            tracing::error!("a thread did not end in time");
            // Something may still write: the lease ends with the process.
            std::mem::forget(self.lease.take());
        }
        self.work.shutdown().await;
        if let Some(preview) = self.inner.previews.get(&self.key.slug()) {
            preview.stop(super::PREVIEW_GRACE).await;
        }
        self.lease = None;
    }
}

async fn lost(lease: Option<&Lease>) {
    match lease {
        Some(lease) => lease.fence().lost().await,
        None => std::future::pending().await,
    }
}
