//! Operations on a thread, beside its agent's turns: what each one means, and how it becomes a
//! turn of its own. They run in the thread's one queue.
//!
//! A further kind of operation is a variant of [`Operation`] and an arm of [`plan`]: it works a
//! [`Draft`] out and refuses what does not fit; the rest (journal, commit, files, outcome,
//! recovery) is the same for all.

use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{
    DISK_DEADLINE, Inner, LiveTurn, SupervisorError,
    edit::SiteEdit,
    lock,
    prepare::{IdempotencyMark, Prepared},
    preview_word,
    publish::{self, PublishAnswer, PublishWish},
};
use crate::{
    domain::{
        Author, CommitSummary, Effect, FileChange, MergeStep, TurnKind, TurnMode, TurnResult, Usage,
    },
    identity::{ThreadKey, TurnId},
    repository::{DiffText, Draft, Repair, Snapshot, Synced, Worktree},
    task,
    turn::{
        Accepted, Folder, Journal, Past, PastTurn, StoredContext, TurnFile, TurnRecord, TurnSite,
        redo_target, undo_target,
    },
};

/// What is to be done to a thread.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Take one turn's changes back: those of the newest that is not undone, by default.
    Undo { turn: Option<TurnId> },
    /// Take an undo back: the newest that is in force, or the one of a named turn.
    Redo { turn: Option<TurnId> },
    /// Set the site to the state of an earlier commit, named by its id or the beginning of it.
    Restore { commit: String },
    /// Bring down what others did: from the origin, the client's and the user's branch. Cannot be
    /// tried without being made.
    Sync,
    /// Write what greenroom itself has made.
    Edit(SiteEdit),
    /// Bring up what this thread did. That changes nothing in the thread, so it is no turn.
    Publish(Box<PublishWish>),
}

/// An operation as somebody asks for it.
#[derive(Debug, Clone)]
pub struct OperationRequest {
    pub key: ThreadKey,
    pub operation: Operation,
    /// Refuse if the branch's commit is another one: an id in hex, or the beginning of it.
    pub expected_head: Option<String>,
    /// Say what would change, and change nothing.
    pub dry_run: bool,
    pub author: Option<Author>,
    pub idempotency_key: Option<String>,
    /// For the log.
    pub request_id: Option<String>,
}

/// What came of an operation.
#[derive(Debug, Clone)]
pub enum OperationAnswer {
    Done(Box<TurnResult>),
    DryRun(Box<DryRun>),
    /// There was nothing to change, so it is no turn: what a person is told, and the report.
    Unchanged(String, Option<serde_json::Value>),
    /// The merges of a sync, and its turn, if the thread changed by it.
    Synced(Vec<MergeStep>, Option<Box<TurnResult>>),
    Published(Box<PublishAnswer>),
    /// The turn that was asked for with the same idempotency key before.
    Seen(TurnRecord),
}

/// What an operation would do.
#[derive(Debug, Clone)]
pub struct DryRun {
    pub kind: TurnKind,
    pub effect: Effect,
    /// Full id of the commit that it would be based on.
    pub head: String,
    pub files: Vec<FileChange>,
    pub diff: DiffText,
    /// Of an edit: see [`SiteChange`](super::SiteChange).
    pub report: Option<serde_json::Value>,
}

/// What is left when an operation is over.
#[derive(Debug)]
pub(super) struct OperationEnd {
    pub(super) answer: Result<OperationAnswer, SupervisorError>,
    /// `None`: unchanged.
    pub(super) context: Option<StoredContext>,
    /// It is in its journal and not at its end: the thread has to be prepared anew, which
    /// finishes it.
    pub(super) is_unfinished: bool,
    pub(super) folder: Folder,
}

/// An operation that can be carried out.
pub(super) struct Plan {
    pub(super) kind: TurnKind,
    pub(super) effect: Effect,
    /// The commit's subject, and the turn's instruction in the history.
    pub(super) title: String,
    pub(super) draft: Draft,
    /// Of a sync: what was merged further up.
    pub(super) merged: Vec<MergeStep>,
    /// Of an edit, see [`SiteChange`](super::SiteChange).
    pub(super) text: Option<String>,
    pub(super) usage: Option<Usage>,
    pub(super) report: Option<serde_json::Value>,
}

impl Plan {
    pub(super) fn new(kind: TurnKind, title: String, draft: Draft) -> Self {
        Self {
            kind,
            effect: Effect::default(),
            title,
            draft,
            merged: Vec::new(),
            text: None,
            usage: None,
            report: None,
        }
    }
}

/// Runs an operation, from outside edits to its outcome.
pub(super) async fn run(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    context: StoredContext,
    request: &OperationRequest,
) -> OperationEnd {
    let mut end = OperationEnd {
        answer: Err(SupervisorError::BusyElsewhere),
        context: None,
        is_unfinished: false,
        folder: Folder::Same,
    };
    end.answer = run_into(inner, prepared, context, request, &mut end).await;
    end
}

async fn run_into(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    mut context: StoredContext,
    request: &OperationRequest,
    end: &mut OperationEnd,
) -> Result<OperationAnswer, SupervisorError> {
    let site = &prepared.site;
    let mark = request
        .idempotency_key
        .as_ref()
        .map(|key| IdempotencyMark::new(&site.paths, key));
    if let Some(mark) = &mark
        && let Some(id) = mark.turn(&request.key).await?
    {
        // Not waited for here: it may stand in line behind this very request.
        let live = lock(&inner.live).get(&id).map(|live| live.record.clone());
        let at_rest = || TurnRecord::at_rest(TurnFile::new(&site.paths, id));
        return Ok(OperationAnswer::Seen(live.unwrap_or_else(at_rest)));
    }
    if let Some(expected) = &request.expected_head {
        let head = site.on_disk("reading the head", |tree| tree.head()).await?;
        if !head.starts_with(&expected.to_ascii_lowercase()) {
            return Err(SupervisorError::StaleHead { head });
        }
    }
    if let Operation::Publish(wish) = &request.operation {
        let published = publish::publish(inner, prepared, wish, &mut end.folder).await;
        if end.folder == Folder::New {
            preview_word::word_on(inner, prepared, None, end.folder, 0).await;
        }
        return Ok(OperationAnswer::Published(Box::new(published?)));
    }
    if request.dry_run {
        if matches!(request.operation, Operation::Sync) {
            return Err(SupervisorError::Refused("a sync has no dryRun"));
        }
        let base = site
            .on_disk("looking at the worktree", |tree| tree.uncommitted())
            .await?;
        let Plan {
            kind,
            effect,
            draft,
            report,
            ..
        } = plan(inner, prepared, &request.operation, base).await?;
        let files = draft.files().to_vec();
        let diff = site
            .on_disk("comparing two states", move |tree| tree.diff_of(&draft))
            .await?;
        return Ok(OperationAnswer::DryRun(Box::new(DryRun {
            kind,
            effect,
            head: base.head(),
            files,
            diff,
            report,
        })));
    }
    let mut repairs = Vec::new();
    let planned = plan_on_committed(inner, prepared, &request.operation, &mut repairs).await;
    if repairs.contains(&Repair::Folder) {
        end.folder = Folder::New;
    }
    let plan = planned?;
    if plan.draft.is_empty() {
        match plan.text {
            _ if plan.kind == TurnKind::Sync => {
                return Ok(OperationAnswer::Synced(plan.merged, None));
            }
            Some(text) => return Ok(OperationAnswer::Unchanged(text, plan.report)),
            None => {}
        }
    }

    let mut accepted = Accepted {
        turn_id: TurnId::new(&request.key),
        kind: plan.kind,
        effect: plan.effect,
        applies: None,
        usage: plan.usage,
        report: plan.report,
        mode: TurnMode::Execute,
        instruction: plan.title,
        model: None,
        timeout_seconds: DISK_DEADLINE.as_secs_f64(),
        author: request.author.clone(),
        accepted_at: Timestamp::now(),
    };
    accepted.applies = site.write_draft(&accepted, plan.draft).await?;
    if let Some(mark) = mark {
        mark.set(&accepted.turn_id, &site.fence).await?;
    }
    let fence = &site.fence;
    let journal = Journal::create(&site.paths, accepted.clone(), fence, &inner.tasks).await?;
    let live = LiveTurn {
        record: journal.record(),
        // It takes moments: whoever cancels it gets its outcome.
        cancel: CancellationToken::new(),
    };
    lock(&inner.live).insert(accepted.turn_id.clone(), live);
    let updates = inner.preview_status(&site.key).updates;
    let preview = async |commit: Option<&CommitSummary>| {
        preview_word::word_on(inner, prepared, commit, end.folder, updates).await
    };
    let text = plan.text.unwrap_or_else(|| said(&accepted));
    let done = site
        .carry_out(&accepted, &journal, &mut context, text, &repairs, preview)
        .await;
    lock(&inner.live).remove(&accepted.turn_id);
    match done {
        Ok(result) => {
            end.context = Some(context);
            let result = Box::new(result);
            Ok(match accepted.kind {
                TurnKind::Sync => OperationAnswer::Synced(plan.merged, Some(result)),
                _ => OperationAnswer::Done(result),
            })
        }
        Err(error) => {
            end.is_unfinished = true;
            Err(error.into())
        }
    }
}

/// Commits outside edits, then plans. What is written at that very moment may be in the way: then
/// it is committed too, and the plan is made again.
async fn plan_on_committed(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    operation: &Operation,
    repairs: &mut Vec<Repair>,
) -> Result<Plan, SupervisorError> {
    const TRIES: usize = 3;
    let site = &prepared.site;
    repairs.extend(site.commit_outside_edits().await?.repairs);
    let mut tries = 1;
    loop {
        let base = site
            .on_disk("reading the head", |tree| tree.committed())
            .await?;
        let planned = plan(inner, prepared, operation, base).await;
        let is_conflict = matches!(
            planned,
            Err(SupervisorError::UndoConflict { .. } | SupervisorError::MergeConflict { .. })
        );
        if !is_conflict || tries == TRIES || site.commit_outside_edits().await?.commit.is_none() {
            return planned;
        }
        tries += 1;
    }
}

/// Works out what an operation does to `base`, and refuses what cannot be done.
async fn plan(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    operation: &Operation,
    base: Snapshot,
) -> Result<Plan, SupervisorError> {
    let site = &prepared.site;
    match operation {
        Operation::Undo { turn } => undo(site, turn.clone(), base).await,
        Operation::Redo { turn } => redo(site, turn.clone(), base).await,
        Operation::Restore { commit } => restore(site, commit.clone(), base).await,
        Operation::Sync => sync(inner, prepared, base).await,
        Operation::Edit(edit) => edit.plan(prepared, base).await,
        Operation::Publish(_) => unreachable!("it is no turn, and was carried out before"),
    }
}

/// The branches above are brought up to date by this already: what is planned is the thread's part.
async fn sync(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    base: Snapshot,
) -> Result<Plan, SupervisorError> {
    let Synced { merged, draft } = publish::sync(inner, prepared, base).await?;
    let draft = match draft {
        Some(draft) => draft,
        None => {
            let nothing = move |tree: &Worktree| tree.draft_nothing(&base);
            prepared.site.on_disk("drafting nothing", nothing).await?
        }
    };
    let title = "Sync with what others did".into();
    Ok(Plan {
        merged,
        ..Plan::new(TurnKind::Sync, title, draft)
    })
}

async fn undo(
    site: &TurnSite,
    named: Option<TurnId>,
    base: Snapshot,
) -> Result<Plan, SupervisorError> {
    check_thread(site, named.as_ref())?;
    let wanted = named.clone();
    let target = past(site, move |past| undo_target(past, wanted.as_ref())).await?;
    let Some((turn, undone_by)) = target else {
        return Err(SupervisorError::NotFound(match named {
            Some(_) => "there is no such turn in this thread",
            None => "there is no turn left to undo",
        }));
    };
    if undone_by.is_some() {
        return Err(SupervisorError::Refused(
            "that turn is undone already; redo brings its changes back",
        ));
    }
    if turn.outcome.is_none() {
        return Err(SupervisorError::Refused(
            "that turn has not ended yet; undo it once it has",
        ));
    }
    if turn.commit().is_none() && turn.accepted.kind.is_run() {
        return Err(SupervisorError::Refused(
            "that turn changed no files, so there is nothing to undo",
        ));
    }
    let draft = without(site, &turn, base).await?;
    let redone = match turn.accepted.kind {
        TurnKind::Undo => turn.outcome.as_ref().and_then(|end| end.undone.clone()),
        _ => None,
    };
    let title = format!("Undo {}", quoted(&turn.accepted.instruction));
    Ok(Plan {
        effect: Effect {
            undone: Some(turn.accepted.turn_id),
            redone,
            ..Effect::default()
        },
        ..Plan::new(TurnKind::Undo, title, draft)
    })
}

async fn redo(
    site: &TurnSite,
    named: Option<TurnId>,
    base: Snapshot,
) -> Result<Plan, SupervisorError> {
    check_thread(site, named.as_ref())?;
    let wanted = named.clone();
    let target = past(site, move |past| redo_target(past, wanted.as_ref())).await?;
    let Some(undo) = target else {
        return Err(match named {
            Some(_) => SupervisorError::Refused("that turn is not undone, so it cannot be redone"),
            None => SupervisorError::NotFound("there is no undo left to redo"),
        });
    };
    let redone = undo.outcome.as_ref().and_then(|end| end.undone.clone());
    let draft = without(site, &undo, base).await?;
    let undone = &undo.accepted.instruction;
    let title = format!("Redo {}", undone.strip_prefix("Undo ").unwrap_or(undone));
    Ok(Plan {
        effect: Effect {
            undone: Some(undo.accepted.turn_id),
            redone,
            ..Effect::default()
        },
        ..Plan::new(TurnKind::Redo, title, draft)
    })
}

async fn restore(site: &TurnSite, commit: String, base: Snapshot) -> Result<Plan, SupervisorError> {
    let drafted = site
        .on_disk("drafting a restore", move |tree| {
            tree.draft_restored(&base, &commit)
        })
        .await;
    let (draft, commit) = drafted.map_err(|error| undo_conflict(error.into()))?;
    let title = format!("Restore the site as of {}", &commit[..7]);
    Ok(Plan {
        effect: Effect {
            restored: Some(commit),
            ..Effect::default()
        },
        ..Plan::new(TurnKind::Restore, title, draft)
    })
}

/// `base` without the changes of a turn.
async fn without(
    site: &TurnSite,
    turn: &PastTurn,
    base: Snapshot,
) -> Result<Draft, SupervisorError> {
    let commit = turn.commit().map(|commit| commit.id.clone());
    let drafted = site
        .on_disk("drafting an undo", move |tree| match commit {
            Some(commit) => tree.draft_without(&base, &commit),
            None => tree.draft_nothing(&base),
        })
        .await;
    drafted.map_err(|error| undo_conflict(error.into()))
}

fn undo_conflict(error: SupervisorError) -> SupervisorError {
    match error {
        SupervisorError::MergeConflict { files, .. } => SupervisorError::UndoConflict { files },
        error => error,
    }
}

/// A turn of another thread is none of this one.
fn check_thread(site: &TurnSite, turn: Option<&TurnId>) -> Result<(), SupervisorError> {
    match turn {
        Some(turn) if *turn.key() != site.key => Err(SupervisorError::NotFound(
            "there is no such turn in this thread",
        )),
        _ => Ok(()),
    }
}

async fn past<T: Send + 'static>(
    site: &TurnSite,
    look: impl FnOnce(Past) -> T + Send + 'static,
) -> Result<T, SupervisorError> {
    let (paths, key) = (site.paths.clone(), site.key.clone());
    let read = move || look(Past::of(&paths, &key));
    Ok(task::blocking("reading the history", DISK_DEADLINE, read).await?)
}

/// The first line of an instruction in quotes, short enough for a commit's subject.
fn quoted(instruction: &str) -> String {
    const LONGEST: usize = 50;
    let line = instruction.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("a turn").trim();
    if line.chars().count() <= LONGEST {
        return format!("\u{201c}{line}\u{201d}");
    }
    let cut: String = line.chars().take(LONGEST - 1).collect();
    format!("\u{201c}{}…\u{201d}", cut.trim_end())
}

/// What a person is told of an operation that was carried out.
fn said(accepted: &Accepted) -> String {
    match (&accepted.applies, accepted.kind) {
        (_, TurnKind::Sync) => "What others did is in this thread now.".into(),
        (Some(_), _) => format!("{}: done.", accepted.instruction),
        (None, TurnKind::Restore) => "The site is in that state already.".into(),
        (None, _) => format!(
            "{}: the site has no more of it to change.",
            accepted.instruction
        ),
    }
}
