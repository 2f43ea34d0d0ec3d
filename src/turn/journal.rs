//! The journal of a turn: one append-only file of JSON lines on the workspace.
//!
//! The first line says what was accepted; each further line is an event with a growing number;
//! the last one is the outcome. An empty file in the thread's `open` folder marks a turn without
//! an outcome, so that a restart finds it without reading every journal.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::history::PastOutcome;
use crate::{
    domain::{Author, Effect, TurnEvent, TurnKind, TurnMode, TurnResult, Usage},
    identity::TurnId,
    lease::{Fence, LeaseLost},
    repository::BroughtFile,
    task::{self, BlockingError, Tasks},
    workspace::{ThreadPaths, WorkspaceError, create_in},
};

/// How long one append may take before the disk counts as stuck.
const DISK_DEADLINE: Duration = Duration::from_secs(60);
/// Events waiting for the disk. A full queue slows the reading of the agent's output, which the
/// operating system's pipe then holds back: bounded all the way.
const QUEUE: usize = 512;
/// Longest journal line that is read back; longer ones are never written (see [`TurnEvent`]).
const MAX_LINE: u64 = 4 << 20;

/// A journal operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error("the journal of turn {turn} is damaged")]
    Damaged { turn: TurnId },
    #[error("the journal's writer has stopped")]
    Stopped,
    #[error("the journal could not be written any further")]
    Full(#[source] std::io::Error),
    /// Its next owner gives the turn an outcome.
    #[error(transparent)]
    Lost(#[from] LeaseLost),
}

/// What was admitted: the first line of a journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Accepted {
    pub turn_id: TurnId,
    /// Journals from before there were others have none: they are turns of the agent.
    #[serde(default)]
    pub kind: TurnKind,
    #[serde(flatten)]
    pub effect: Effect,
    /// Of an operation: the commit that it is about to make, by its full id. It exists already; a
    /// restart finishes what was begun with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applies: Option<String>,
    /// What it cost before it was accepted: of its result, and of an agent's turn's budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// See [`TurnResult`](crate::domain::TurnResult).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<serde_json::Value>,
    /// Of an agent's turn: files that are in the worktree when it begins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub brings: Vec<BroughtFile>,
    pub mode: TurnMode,
    pub instruction: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Seconds.
    pub timeout_seconds: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<Author>,
    pub accepted_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename = "accepted")]
struct AcceptedLine {
    #[serde(flatten)]
    accepted: Accepted,
}

/// One event as it stands in the journal and goes out over SSE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    /// Grows by one, from 1.
    pub id: u64,
    pub at: Timestamp,
    #[serde(flatten)]
    pub event: TurnEvent,
}

impl EventLine {
    /// The event's name.
    pub fn name(&self) -> &'static str {
        match self.event {
            TurnEvent::Queued { .. } => "turn.queued",
            TurnEvent::Started {} => "turn.started",
            TurnEvent::Waiting { .. } => "turn.waiting",
            TurnEvent::TextDelta { .. } => "text.delta",
            TurnEvent::ToolStarted { .. } => "tool.started",
            TurnEvent::ToolFinished { .. } => "tool.finished",
            TurnEvent::FileChanged { .. } => "file.changed",
            TurnEvent::BudgetWarning { .. } => "budget.warning",
            TurnEvent::PreviewUpdated {} => "preview.updated",
            TurnEvent::PreviewError { .. } => "preview.error",
            TurnEvent::CommitCreated { .. } => "commit.created",
            TurnEvent::Completed { .. } => "turn.completed",
            TurnEvent::Failed { .. } => "turn.failed",
            TurnEvent::Cancelled { .. } => "turn.cancelled",
            TurnEvent::Recovered { .. } => "turn.recovered",
        }
    }

    /// The outcome, if this is the last event.
    pub fn outcome(&self) -> Option<&TurnResult> {
        match &self.event {
            TurnEvent::Completed { result }
            | TurnEvent::Failed { result }
            | TurnEvent::Cancelled { result }
            | TurnEvent::Recovered { result } => Some(result),
            _ => None,
        }
    }
}

/// How far the journal has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Committed {
    /// Bytes that readers may read.
    pub bytes: u64,
    /// Number of the last event.
    pub last_id: u64,
    pub has_started: bool,
    /// The turn's commit was told of.
    pub has_commit: bool,
    /// The last event was the outcome.
    pub is_done: bool,
    /// The writer lost the thread's lease: somebody else writes what follows.
    pub is_lost: bool,
    /// The writer ended because the disk is full.
    pub is_full: bool,
}

impl Committed {
    fn is_over(&self) -> bool {
        self.is_done || self.is_lost
    }
}

enum Command {
    Event(Box<TurnEvent>),
    /// No outcome will come.
    Full,
    Flush(oneshot::Sender<()>),
}

/// The writing end of a turn's journal. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    turn: TurnFile,
    sender: mpsc::Sender<Command>,
    committed: watch::Receiver<Committed>,
    told: Told,
}

/// The outcome once it is in the file, so that whoever waited need not read it there.
type Told = Arc<OnceLock<TurnResult>>;

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

impl Journal {
    /// Writes the first line, durably, and starts the writer.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing was accepted.
    pub async fn create(
        paths: &ThreadPaths,
        accepted: Accepted,
        fence: &Fence,
        tasks: &Tasks,
    ) -> Result<Self, JournalError> {
        let turn = TurnFile::new(paths, accepted.turn_id.clone());
        let create = {
            let turn = turn.clone();
            move || Ok::<_, JournalError>(turn.create(accepted)?)
        };
        let (file, bytes) = fence
            .write("creating a turn's journal", DISK_DEADLINE, create)
            .await?;
        let committed = Committed {
            bytes,
            ..Committed::default()
        };
        Ok(Self::start(turn, file, committed, fence.clone(), tasks))
    }

    /// Goes on with the journal of a turn that has no outcome. A torn last line is cut off. The
    /// file is another one from then on: what an earlier owner still has open leads nowhere.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn reopen(
        turn: TurnFile,
        fence: &Fence,
        tasks: &Tasks,
    ) -> Result<Self, JournalError> {
        let reopen = {
            let turn = turn.clone();
            move || turn.reopen()
        };
        let (file, committed) = fence
            .write("reopening a turn's journal", DISK_DEADLINE, reopen)
            .await?;
        Ok(Self::start(turn, file, committed, fence.clone(), tasks))
    }

    fn start(
        turn: TurnFile,
        file: File,
        committed: Committed,
        fence: Fence,
        tasks: &Tasks,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (publish, watch) = watch::channel(committed);
        let told = Told::default();
        tasks.spawn(
            "journal",
            write_events(turn.clone(), file, fence, receiver, publish, told.clone()),
        );
        Self {
            turn,
            sender,
            committed: watch,
            told,
        }
    }

    /// Queues an event; it is seen by readers once it is in the file.
    ///
    /// # Errors
    /// [`JournalError::Stopped`] if the disk failed the writer.
    pub async fn append(&self, event: TurnEvent) -> Result<(), JournalError> {
        self.sender
            .send(Command::Event(Box::new(event)))
            .await
            .map_err(|_| stopped(&self.committed))
    }

    /// Waits until everything queued is in the file; the outcome has then reached the disk.
    ///
    /// # Errors
    /// [`JournalError::Stopped`].
    pub async fn flush(&self) -> Result<(), JournalError> {
        let (done, wait) = oneshot::channel();
        self.sender
            .send(Command::Flush(done))
            .await
            .map_err(|_| stopped(&self.committed))?;
        wait.await.map_err(|_| stopped(&self.committed))
    }

    /// The disk is full, so that there will be no outcome: whoever waits for it is told. The turn is
    /// recovered when there is room.
    pub(super) async fn give_up_full(&self) {
        self.sender.send(Command::Full).await.ok();
    }

    /// The turn's file and how far it may be read.
    pub fn record(&self) -> TurnRecord {
        TurnRecord {
            turn: self.turn.clone(),
            live: Some(self.committed.clone()),
            told: Some(self.told.clone()),
        }
    }
}

/// Why the writer does not take anything any more.
fn stopped(committed: &watch::Receiver<Committed>) -> JournalError {
    if committed.borrow().is_full {
        JournalError::Full(std::io::ErrorKind::StorageFull.into())
    } else {
        JournalError::Stopped
    }
}

async fn write_events(
    turn: TurnFile,
    file: File,
    fence: Fence,
    mut commands: mpsc::Receiver<Command>,
    publish: watch::Sender<Committed>,
    told: Told,
) {
    let mut outcome = None;
    let file = Arc::new(file);
    let mut committed = *publish.borrow();
    let mut batch = Vec::new();
    let is_full = |committed: &mut Committed| committed.is_full = true;
    loop {
        let received = tokio::select! {
            biased;
            () = fence.lost() => {
                publish.send_modify(|committed| committed.is_lost = true);
                return;
            }
            received = commands.recv_many(&mut batch, QUEUE) => received,
        };
        if received == 0 {
            return;
        }
        let mut text = Vec::new();
        let mut flushed = Vec::new();
        for command in batch.drain(..) {
            match command {
                // Nothing follows the outcome, whoever still tries.
                Command::Event(_) if committed.is_done => {}
                Command::Event(event) => {
                    committed.last_id += 1;
                    let line = EventLine {
                        id: committed.last_id,
                        at: Timestamp::now(),
                        event: *event,
                    };
                    committed.has_started |= matches!(line.event, TurnEvent::Started {});
                    committed.has_commit |= matches!(line.event, TurnEvent::CommitCreated { .. });
                    outcome = line.outcome().cloned();
                    committed.is_done = outcome.is_some();
                    serde_json::to_writer(&mut text, &line).expect("our own plain data serialises");
                    text.push(b'\n');
                }
                Command::Full => {
                    publish.send_modify(is_full);
                    return;
                }
                Command::Flush(done) => flushed.push(done),
            }
        }
        committed.bytes += text.len() as u64;
        if !text.is_empty() {
            let (file, marked, is_done) = (file.clone(), turn.clone(), committed.is_done);
            let append = move || -> Result<(), JournalError> {
                crate::workspace::append_line(&file, &text, is_done)
                    .and_then(|()| if is_done { marked.mark_done() } else { Ok(()) })
                    .map_err(WorkspaceError::io("write", &marked.journal))?;
                Ok(())
            };
            let written = fence
                .write("writing a turn's journal", DISK_DEADLINE, append)
                .await;
            match written {
                Ok(()) => {}
                // The next look at the fence tells the readers.
                Err(JournalError::Lost(_)) => continue,
                Err(error) => {
                    tracing::error!(turn_id = %turn.id, %error, "failed to write the journal");
                    if matches!(&error, JournalError::Workspace(error) if error.is_no_space()) {
                        publish.send_modify(is_full);
                    }
                    return;
                }
            }
        }
        if let Some(outcome) = outcome.take() {
            // Set once: nothing follows an outcome.
            told.set(outcome).ok();
        }
        publish.send_replace(committed);
        for done in flushed {
            // Nobody waits any more: fine.
            done.send(()).ok();
        }
    }
}

/// Where a turn's journal lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnFile {
    id: TurnId,
    journal: PathBuf,
    open_mark: PathBuf,
}

impl TurnFile {
    /// The journal of `id`, whether it exists or not.
    pub fn new(paths: &ThreadPaths, id: TurnId) -> Self {
        let journal = paths.turns().join(format!("{}.jsonl", id.sequence()));
        let open_mark = paths.open_turns().join(id.sequence());
        Self {
            id,
            journal,
            open_mark,
        }
    }

    /// The turn.
    pub fn id(&self) -> &TurnId {
        &self.id
    }

    fn create(&self, accepted: Accepted) -> Result<(File, u64), WorkspaceError> {
        // Mark and journal at once, each is some waits for a slow disk; the mark first where that is
        // one after the other. Before both are there nothing is in the journal and nobody was told of
        // the turn: a mark without a journal is swept, a journal without a line is nobody's.
        let both = [&self.open_mark, &self.journal];
        let made = task::side_by_side(&both, |path| {
            let is_journal = **path == self.journal;
            let mut options = OpenOptions::new();
            match is_journal {
                true => options.append(true).create_new(true).mode(0o600),
                false => options.write(true).create(true).truncate(true),
            };
            let folder = path.parent().expect("both lie in a folder");
            create_in(folder, || options.open(path))
                .map(|file| is_journal.then_some(file))
                .map_err(WorkspaceError::io("create", path))
        });
        let made: Result<Vec<_>, _> = made.into_iter().collect();
        let made = made.inspect_err(|_| {
            // Of one alone nothing is left that would count.
            fs::remove_file(&self.open_mark).ok();
        })?;
        let file = made
            .into_iter()
            .flatten()
            .next()
            .expect("the journal is one of both");
        let mut line =
            serde_json::to_vec(&AcceptedLine { accepted }).expect("our own plain data serialises");
        line.push(b'\n');
        if let Err(error) = crate::workspace::append_line(&file, &line, true) {
            // Nothing was accepted: on a full disk a journal of half a line is all there would be.
            fs::remove_file(&self.journal).ok();
            fs::remove_file(&self.open_mark).ok();
            return Err(WorkspaceError::io("write", &self.journal)(error));
        }
        Ok((file, line.len() as u64))
    }

    fn reopen(&self) -> Result<(File, Committed), JournalError> {
        let mut whole = Committed::default();
        self.scan(&mut whole)?;
        let copy = self
            .journal
            .with_extension(format!("{}.tmp", uuid::Uuid::new_v4().simple()));
        let replace = || -> io::Result<File> {
            let from = File::open(&self.journal)?;
            let mut file = OpenOptions::new()
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(&copy)?;
            io::copy(&mut from.take(whole.bytes), &mut file)?;
            file.sync_data()?;
            fs::rename(&copy, &self.journal)?;
            Ok(file)
        };
        let file = replace().map_err(|error| {
            // Best effort: a copy that is left over harms nobody.
            fs::remove_file(&copy).ok();
            WorkspaceError::io("replace", &self.journal)(error)
        })?;
        Ok((file, whole))
    }

    fn mark_done(&self) -> io::Result<()> {
        match fs::remove_file(&self.open_mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// How far the file holds whole lines, beyond what is known already.
    fn scan(&self, committed: &mut Committed) -> Result<(), JournalError> {
        self.each_line(committed.bytes, u64::MAX, |line, end| {
            if let Ok(event) = serde_json::from_slice::<EventLine>(line) {
                committed.last_id = event.id;
                committed.has_started |= matches!(event.event, TurnEvent::Started {});
                committed.has_commit |= matches!(event.event, TurnEvent::CommitCreated { .. });
                committed.is_done |= event.outcome().is_some();
            }
            committed.bytes = end;
            true
        })
    }

    /// Calls `visit` with each whole line between two offsets and the offset after it, until it
    /// answers false.
    fn each_line(
        &self,
        from: u64,
        to: u64,
        mut visit: impl FnMut(&[u8], u64) -> bool,
    ) -> Result<(), JournalError> {
        let mut file =
            File::open(&self.journal).map_err(WorkspaceError::io("open", &self.journal))?;
        file.seek(SeekFrom::Start(from))
            .map_err(WorkspaceError::io("read", &self.journal))?;
        let mut reader = BufReader::new(file.take(to - from));
        let mut offset = from;
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reader)
                .take(MAX_LINE)
                .read_until(b'\n', &mut line)
                .map_err(WorkspaceError::io("read", &self.journal))?;
            if read == 0 || line.last() != Some(&b'\n') {
                return Ok(());
            }
            offset += read as u64;
            if !visit(&line, offset) {
                return Ok(());
            }
        }
    }

    /// Does the turn exist?
    pub fn exists(&self) -> bool {
        self.journal.exists()
    }

    /// What was accepted. Blocking.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn accepted(&self) -> Result<Accepted, JournalError> {
        let mut accepted = None;
        self.each_line(0, u64::MAX, |line, _| {
            accepted = serde_json::from_slice::<AcceptedLine>(line).ok();
            false
        })?;
        accepted
            .map(|line| line.accepted)
            .ok_or_else(|| JournalError::Damaged {
                turn: self.id.clone(),
            })
    }

    /// How it ended, if it did. Blocking; reads the last line alone.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn outcome(&self) -> Result<Option<TurnResult>, JournalError> {
        let last = self.last_line()?;
        Ok(serde_json::from_slice::<EventLine>(&last)
            .ok()
            .and_then(|line| line.outcome().cloned()))
    }

    /// As [`TurnFile::outcome`], without what only an answer shows.
    pub(super) fn past_outcome(&self) -> Result<Option<PastOutcome>, JournalError> {
        #[derive(Deserialize)]
        struct Line {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            result: PastOutcome,
        }
        let last = self.last_line()?;
        Ok(serde_json::from_slice::<Line>(&last)
            .ok()
            .map(|line| line.data.result))
    }

    /// The last line of a turn that has its outcome; else nothing.
    fn last_line(&self) -> Result<Vec<u8>, JournalError> {
        if self.open_mark.exists() {
            return Ok(Vec::new());
        }
        self.read_last_line()
            .map_err(WorkspaceError::io("read", &self.journal))
            .map_err(JournalError::from)
    }

    fn read_last_line(&self) -> io::Result<Vec<u8>> {
        /// Holds most outcomes; a longer one is read with more steps.
        const AT_FIRST: u64 = 32 << 10;
        let mut file = File::open(&self.journal)?;
        let length = file.metadata()?.len();
        let mut want = AT_FIRST;
        loop {
            let from = length.saturating_sub(want);
            file.seek(SeekFrom::Start(from))?;
            let mut tail = Vec::new();
            (&mut file).take(length - from).read_to_end(&mut tail)?;
            let whole = tail.strip_suffix(b"\n").unwrap_or(&tail);
            match whole.iter().rposition(|b| *b == b'\n') {
                Some(at) => return Ok(whole[at + 1..].to_vec()),
                None if from == 0 || want >= MAX_LINE => return Ok(whole.to_vec()),
                None => want = (want * 8).min(MAX_LINE),
            }
        }
    }

    fn events(&self, from: u64, to: u64) -> Result<(Vec<EventLine>, u64), JournalError> {
        /// So many events at a time: a reader at one byte a second holds no more in memory.
        const AT_ONCE: usize = 256;
        let mut events = Vec::new();
        let mut end = from;
        self.each_line(from, to, |line, offset| {
            end = offset;
            if let Ok(event) = serde_json::from_slice::<EventLine>(line) {
                events.push(event);
            }
            events.len() < AT_ONCE
        })?;
        Ok((events, end))
    }
}

/// A turn that can be looked at: its file and, while it has a writer here, how far that is.
#[derive(Debug, Clone)]
pub struct TurnRecord {
    turn: TurnFile,
    live: Option<watch::Receiver<Committed>>,
    told: Option<Told>,
}

impl TurnRecord {
    /// A turn that no writer here works on.
    pub fn at_rest(turn: TurnFile) -> Self {
        Self {
            turn,
            live: None,
            told: None,
        }
    }

    /// A turn that another process works on: its file is looked at again and again, as long as
    /// somebody wants to know.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn elsewhere(turn: TurnFile, tasks: &Tasks) -> Result<Self, JournalError> {
        let (file, mut committed) = (turn.clone(), Committed::default());
        let look = move || file.scan(&mut committed).map(|()| committed);
        let committed = task::blocking("reading a turn's journal", DISK_DEADLINE, look).await??;
        let (publish, live) = watch::channel(committed);
        tasks.spawn("journal of another", follow_file(turn.clone(), publish));
        Ok(Self {
            turn,
            live: Some(live),
            told: None,
        })
    }

    /// The turn's file.
    pub fn file(&self) -> &TurnFile {
        &self.turn
    }

    /// Is a writer here working on it?
    pub fn is_live(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| !live.borrow().is_over())
    }

    /// Has it begun to run?
    pub fn has_started(&self) -> bool {
        self.live
            .as_ref()
            .is_none_or(|live| live.borrow().has_started)
    }

    /// Does the journal tell of a commit?
    pub(super) fn has_commit(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.borrow().has_commit)
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// [`JournalError::Lost`] if the turn is another process's now, [`JournalError::Stopped`] if
    /// the writer ended without one.
    pub async fn outcome(&self) -> Result<TurnResult, JournalError> {
        if let Some(watched) = &self.live {
            let mut live = watched.clone();
            let over = live.wait_for(Committed::is_over).await;
            let over = *over.map_err(|_| stopped(watched))?;
            if !over.is_done {
                return Err(LeaseLost.into());
            }
        }
        if let Some(outcome) = self.told.as_ref().and_then(|told| told.get()) {
            return Ok(outcome.clone());
        }
        let turn = self.turn.clone();
        task::blocking("reading a turn's outcome", DISK_DEADLINE, move || {
            turn.outcome()
        })
        .await??
        .ok_or(JournalError::Stopped)
    }

    /// Its events, from the one after `last_id`, to the outcome.
    pub fn events(&self, last_id: u64) -> Events {
        Events {
            turn: self.turn.clone(),
            live: self.live.clone(),
            offset: 0,
            after: last_id,
            is_done: false,
        }
    }
}

/// Reads a turn's events, waiting for those to come.
#[derive(Debug)]
pub struct Events {
    turn: TurnFile,
    live: Option<watch::Receiver<Committed>>,
    offset: u64,
    after: u64,
    is_done: bool,
}

impl Events {
    /// The next events; empty after the outcome, or when nobody will write any more.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn next(&mut self) -> Result<Vec<EventLine>, JournalError> {
        while !self.is_done {
            let (to, writer_gone) = match &mut self.live {
                None => (u64::MAX, true),
                Some(live) => {
                    let offset = self.offset;
                    let gone = live
                        .wait_for(|c| c.bytes > offset || c.is_over())
                        .await
                        .is_err();
                    let committed = live.borrow();
                    (committed.bytes, gone || committed.is_lost)
                }
            };
            let (turn, from) = (self.turn.clone(), self.offset);
            let (events, end) =
                task::blocking("reading a turn's events", DISK_DEADLINE, move || {
                    turn.events(from, to)
                })
                .await??;
            let stuck = end == self.offset;
            self.offset = end;
            self.is_done =
                events.iter().any(|event| event.outcome().is_some()) || (stuck && writer_gone);
            let fresh: Vec<_> = events
                .into_iter()
                .filter(|event| event.id > self.after)
                .collect();
            if !fresh.is_empty() {
                return Ok(fresh);
            }
        }
        Ok(Vec::new())
    }
}

async fn follow_file(turn: TurnFile, publish: watch::Sender<Committed>) {
    const LOOK_AGAIN: Duration = Duration::from_millis(500);
    let mut committed = *publish.borrow();
    while !committed.is_done && !publish.is_closed() {
        let (file, mut further) = (turn.clone(), committed);
        let look = task::blocking("following a turn's journal", DISK_DEADLINE, move || {
            file.scan(&mut further).map(|()| further)
        });
        // A disk that hiccups is looked at again.
        if let Ok(Ok(further)) = look.await {
            committed = further;
            publish.send_if_modified(|seen| {
                let is_new = *seen != committed;
                *seen = committed;
                is_new
            });
        }
        tokio::select! {
            () = publish.closed() => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::ThreadKey;

    fn accepted(id: &TurnId) -> Accepted {
        Accepted {
            turn_id: id.clone(),
            kind: TurnKind::Turn,
            effect: Effect::default(),
            applies: None,
            usage: None,
            report: None,
            brings: Vec::new(),
            mode: TurnMode::Execute,
            instruction: "make it blue".into(),
            model: None,
            timeout_seconds: 1.5,
            author: None,
            accepted_at: Timestamp::now(),
        }
    }

    async fn read_all(mut events: Events) -> Vec<EventLine> {
        let mut all = Vec::new();
        loop {
            let more = tokio::time::timeout(Duration::from_secs(20), events.next())
                .await
                .expect("events end")
                .unwrap();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }

    #[tokio::test]
    async fn live_and_replayed_events_are_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let key = ThreadKey::parse("acme", "alice", "main").unwrap();
        let paths = ThreadPaths::new(folder.path(), &key);
        let id = TurnId::new(&key);
        let tasks = Tasks::new();
        let journal = Journal::create(&paths, accepted(&id), &Fence::open(), &tasks)
            .await
            .unwrap();
        let other = read_all(
            TurnRecord::elsewhere(TurnFile::new(&paths, id.clone()), &tasks)
                .await
                .unwrap()
                .events(0),
        );
        let live = read_all(journal.record().events(0));
        for i in 0..700 {
            journal
                .append(TurnEvent::TextDelta {
                    text: format!("{i} é\n"),
                })
                .await
                .unwrap();
        }
        assert!(journal.record().file().open_mark.exists());
        let result = crate::turn::run::tests::result(&id);
        journal.append(TurnEvent::terminal(result)).await.unwrap();
        journal.append(TurnEvent::Started {}).await.unwrap();
        journal.flush().await.unwrap();

        let live = live.await;
        assert_eq!(other.await, live, "another process follows");
        let file = TurnFile::new(&paths, id.clone());
        let replayed = read_all(TurnRecord::at_rest(file.clone()).events(0)).await;
        assert_eq!(live, replayed);
        assert_eq!(replayed.len(), 701, "nothing follows the outcome");
        assert!(!file.open_mark.exists());
        assert_eq!(file.accepted().unwrap().instruction, "make it blue");
        assert_eq!(file.outcome().unwrap().unwrap().turn_id, id);
        let tail = read_all(TurnRecord::at_rest(file).events(699)).await;
        assert_eq!(
            tail.iter().map(|event| event.id).collect::<Vec<_>>(),
            [700, 701]
        );
    }

    #[tokio::test]
    async fn a_torn_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let key = ThreadKey::parse("acme", "alice", "main").unwrap();
        let paths = ThreadPaths::new(folder.path(), &key);
        let id = TurnId::new(&key);
        let tasks = Tasks::new();
        let journal = Journal::create(&paths, accepted(&id), &Fence::open(), &tasks)
            .await
            .unwrap();
        journal.append(TurnEvent::Started {}).await.unwrap();
        journal.flush().await.unwrap();
        drop(journal);
        let file = TurnFile::new(&paths, id.clone());
        let mut raw = OpenOptions::new().append(true).open(&file.journal).unwrap();
        io::Write::write_all(&mut raw, b"{\"id\":2,\"at\":\"20").unwrap();

        let journal = Journal::reopen(file.clone(), &Fence::open(), &tasks)
            .await
            .unwrap();
        io::Write::write_all(&mut raw, b"from a process that woke up late").unwrap();
        assert!(journal.record().has_started());
        journal
            .append(TurnEvent::TextDelta { text: "on".into() })
            .await
            .unwrap();
        journal.flush().await.unwrap();
        let (events, _) = file.events(0, u64::MAX).unwrap();
        assert_eq!(
            events.iter().map(|event| event.id).collect::<Vec<_>>(),
            [1, 2]
        );
    }
}
