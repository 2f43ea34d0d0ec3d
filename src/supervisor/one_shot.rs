//! One-shot runs of other services inside the workspace: where they may work, and those in a
//! thread's worktree, which are turns of the thread.

use std::{
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
};

use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    DISK_DEADLINE, Inner, LiveTurn, Supervisor, SupervisorError, lock, prepare::Prepared,
    preview_word,
};
use crate::{
    agent::{Ending, RunOutcome},
    domain::{Account, CommitSummary, Effect, TurnKind, TurnMode, Usage},
    identity::{ThreadKey, TurnId, UserKey},
    repository::Repair,
    service::{self, RunSite, ServiceError, Shot, Ticket},
    task,
    turn::{Accepted, Folder, Journal, StoredContext},
};

/// Longest piece of a prompt that the history keeps, in bytes.
const MAX_INSTRUCTION: usize = 64 << 10;
/// How much of a folder is looked through for what is ours.
const MAX_ENTRIES: usize = 10_000;
/// For the CLI's system prompt.
const NOTE: &str = "The working directory is a website whose changes greenroom commits by itself \
                    when you are done; git commands that write fail by design. Work nowhere else.";

/// What a one-shot run's answer is: how the run went.
pub type OneShotAnswer = Result<service::Answer, ServiceError>;

/// Where a one-shot run works in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cwd {
    /// In a thread's worktree, or a folder in it.
    Thread { key: ThreadKey, folder: PathBuf },
    /// Elsewhere in the workspace; with the user that it belongs to, if it can be one's.
    Folder {
        user: Option<UserKey>,
        folder: PathBuf,
    },
}

/// A one-shot run for a thread's worktree.
#[derive(Debug)]
pub struct OneShot {
    pub ticket: Ticket,
    pub shot: Shot,
    /// In the worktree.
    pub folder: PathBuf,
    /// For the log.
    pub request_id: Option<String>,
}

/// What is left when one is over.
#[derive(Debug)]
pub(super) struct OneShotEnd {
    /// `None`: unchanged.
    pub(super) context: Option<StoredContext>,
    /// It is in its journal and not at its end: the thread has to be prepared anew.
    pub(super) is_unfinished: bool,
    pub(super) folder: Folder,
}

impl Supervisor {
    /// Finds where `cwd` is: absolute, or relative to the workspace.
    ///
    /// # Errors
    /// [`SupervisorError::Refused`] for what is outside, is not there, or holds greenroom's own
    /// files or a repository: those are nobody's to write.
    pub async fn cwd(&self, cwd: &str) -> Result<Cwd, SupervisorError> {
        let (workspace, cwd) = (self.0.settings.workspace.clone(), PathBuf::from(cwd));
        task::blocking("looking at a folder", DISK_DEADLINE, move || {
            locate(&workspace, &cwd)
        })
        .await?
        .map_err(SupervisorError::Refused)
    }
}

/// Blocking.
fn locate(workspace: &Path, cwd: &Path) -> Result<Cwd, &'static str> {
    const NOT_THERE: &str = "cwd: there is no such folder in the workspace";
    let root = std::fs::canonicalize(workspace).map_err(|_| NOT_THERE)?;
    let folder = std::fs::canonicalize(root.join(cwd)).map_err(|_| NOT_THERE)?;
    let below = folder.strip_prefix(&root).map_err(|_| NOT_THERE)?;
    if !folder.is_dir() {
        return Err(NOT_THERE);
    }
    let names: Vec<&str> = below
        .iter()
        .map(|name| name.to_str().ok_or(NOT_THERE))
        .collect::<Result<_, _>>()?;
    if names.iter().any(|name| name.starts_with('.')) {
        return Err("cwd: folders whose names begin with a dot are not for runs");
    }
    if let [client, user, "threads", thread, ..] = names[..]
        && let Ok(key) = ThreadKey::parse(client, user, thread)
    {
        return Ok(Cwd::Thread { key, folder });
    }
    let holds_ours = names.is_empty() || holds_ours(&folder, 2, &mut MAX_ENTRIES.clone());
    if holds_ours {
        return Err(
            "cwd: that folder holds a repository or greenroom's own files; name a thread's \
             worktree, or a folder further down",
        );
    }
    let user = match names[..] {
        [client, user, ..] => match (client.parse(), user.parse()) {
            (Ok(client), Ok(user)) => Some(UserKey { client, user }),
            _ => None,
        },
        _ => None,
    };
    Ok(Cwd::Folder { user, folder })
}

/// Is there a repository or what greenroom keeps, at most so deep? What cannot be looked through
/// counts as if.
fn holds_ours(folder: &Path, depth: usize, left: &mut usize) -> bool {
    let mut look = || -> io::Result<bool> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            *left = left.saturating_sub(1);
            let name = entry.file_name();
            if *left == 0 || name == ".git" || name == ".greenroom" || name == ".claude" {
                return Ok(true);
            }
            // Of the entry itself: links are not followed.
            if depth > 0
                && entry.file_type()?.is_dir()
                && holds_ours(&entry.path(), depth - 1, left)
            {
                return Ok(true);
            }
        }
        Ok(false)
    };
    look().unwrap_or(true)
}

/// Runs one, from outside edits to its outcome, and answers whoever asked.
pub(super) async fn run(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    context: StoredContext,
    one_shot: OneShot,
    mut reply: oneshot::Sender<Result<OneShotAnswer, SupervisorError>>,
) -> OneShotEnd {
    let mut end = OneShotEnd {
        context: None,
        is_unfinished: false,
        folder: Folder::Same,
    };
    let answer = run_into(inner, prepared, context, one_shot, &mut reply, &mut end).await;
    reply.send(answer).ok();
    end
}

async fn run_into(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    mut context: StoredContext,
    one_shot: OneShot,
    reply: &mut oneshot::Sender<Result<OneShotAnswer, SupervisorError>>,
    end: &mut OneShotEnd,
) -> Result<OneShotAnswer, SupervisorError> {
    let OneShot {
        ticket,
        mut shot,
        folder,
        ..
    } = one_shot;
    let site = &prepared.site;
    let before = site.commit_outside_edits().await?;
    if before.repairs.contains(&Repair::Folder) {
        end.folder = Folder::New;
    }
    let id = TurnId::new(&site.key);
    let instruction = shot.prompt.floor_char_boundary(MAX_INSTRUCTION);
    let accepted = Accepted {
        turn_id: id.clone(),
        kind: TurnKind::Service,
        effect: Effect::default(),
        applies: None,
        usage: None,
        report: None,
        mode: TurnMode::Execute,
        instruction: shot.prompt[..instruction].to_owned(),
        model: None,
        timeout_seconds: shot.timeout.as_secs_f64(),
        author: None,
        accepted_at: Timestamp::now(),
    };
    shot.account = Account {
        kind: Account::SERVICE.into(),
        ..Account::turn(&id)
    };
    let journal = Journal::create(&site.paths, accepted.clone(), &site.fence, &inner.tasks).await?;
    let cancel = CancellationToken::new();
    let live = LiveTurn {
        record: journal.record(),
        cancel: cancel.clone(),
    };
    lock(&inner.live).insert(id.clone(), live);
    let updates = inner.preview_status(&site.key).updates;
    let place = RunSite {
        cwd: Some(folder),
        read: vec![
            site.agent_site.git_dir.clone(),
            site.agent_site.dependencies.clone(),
        ],
        write: vec![site.agent_site.worktree.clone()],
        connect: vec![site.agent_site.preview_port],
        note: Some(NOTE),
    };
    let (mut answer, mut usage) = (Err(ServiceError::Cancelled), Usage::default());
    let run = async || {
        let mut run = pin!(ticket.run(shot, place, &cancel));
        let ended = async {
            tokio::select! {
                ran = &mut run => ran,
                () = reply.closed() => {
                    cancel.cancel();
                    run.await
                }
            }
        };
        answer = tokio::select! {
            biased;
            // At once, and without a word to anybody: dropped, the run is killed.
            () = site.fence.lost() => Err(ServiceError::Cancelled),
            ran = ended => {
                usage = ran.usage;
                ran.answer
            }
        };
        outcome(&answer, usage)
    };
    let preview = async |commit: Option<&CommitSummary>| {
        preview_word::word_on(inner, prepared, commit, end.folder, updates).await
    };
    let done = site
        .run_apart(&accepted, &journal, &mut context, run, preview)
        .await;
    lock(&inner.live).remove(&id);
    match done {
        Ok(_) => {
            end.context = Some(context);
            Ok(answer)
        }
        Err(error) => {
            end.is_unfinished = true;
            Err(error.into())
        }
    }
}

/// The run as the thread's history knows it.
fn outcome(answer: &OneShotAnswer, usage: Usage) -> RunOutcome {
    let ending = match answer {
        Ok(answer) => {
            return RunOutcome {
                ending: Ending::Completed,
                text: answer.text(),
                usage,
                num_turns: 1,
                ..RunOutcome::nothing()
            };
        }
        Err(ServiceError::Cancelled | ServiceError::Draining) => Ending::Cancelled,
        Err(ServiceError::TimedOut { .. }) => Ending::TimedOut,
        Err(ServiceError::OverBudget { breach }) => Ending::OverBudget(breach.clone()),
        Err(error) => Ending::Failed(format!("The one-shot run failed: {error}.")),
    };
    RunOutcome {
        ending,
        usage,
        ..RunOutcome::nothing()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_run_gets_no_folder_that_is_not_its_own_to_write() {
        let root = tempfile::tempdir().unwrap();
        let workspace = root.path().join("workspace");
        for folder in [
            "workspace/acme/alice/project/.git",
            "workspace/acme/alice/project/src",
            "workspace/acme/alice/threads/main/src",
            "workspace/acme/alice/threads/main/.git",
            "workspace/acme/alice/.greenroom/usage",
            "workspace/acme/alice/.claude/sessions/main",
            "workspace/.greenroom",
            "workspace/imports/today",
            "elsewhere",
        ] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        fs::write(workspace.join("imports/a.txt"), "").unwrap();
        let link = |to: &str, from: &str| {
            std::os::unix::fs::symlink(to, workspace.join(from)).unwrap();
        };
        link("../../elsewhere", "imports/out");
        link("../acme/alice/.greenroom", "imports/state");
        link("../acme/alice/threads/main", "imports/main");
        let at = |cwd: &str| locate(&workspace, Path::new(cwd));
        let real = fs::canonicalize(&workspace).unwrap();
        let key = ThreadKey::parse("acme", "alice", "main").unwrap();
        for (cwd, folder) in [
            ("acme/alice/threads/main", "acme/alice/threads/main"),
            ("acme/alice/threads/main/src", "acme/alice/threads/main/src"),
            ("imports/main", "acme/alice/threads/main"),
            (
                "acme/../acme/alice/threads/./main",
                "acme/alice/threads/main",
            ),
        ] {
            let expected = Cwd::Thread {
                key: key.clone(),
                folder: real.join(folder),
            };
            assert_eq!(at(cwd), Ok(expected), "{cwd}");
        }
        let whole = workspace.join("imports/today");
        for (cwd, user) in [
            ("imports/today", Some("imports/today")),
            (whole.to_str().unwrap(), Some("imports/today")),
            ("acme/alice/project/src", Some("acme/alice")),
        ] {
            let Ok(Cwd::Folder { user: found, .. }) = at(cwd) else {
                panic!("{cwd}: {:?}", at(cwd));
            };
            assert_eq!(found.map(|user| user.to_string()).as_deref(), user, "{cwd}");
        }
        for cwd in [
            "",
            ".",
            "..",
            "/",
            "/etc",
            "../elsewhere",
            "imports/out",
            "imports/state",
            "imports/a.txt",
            "imports/none",
            "acme",
            "acme/alice",
            "acme/alice/threads",
            "acme/alice/project",
            "acme/alice/project/.git",
            "acme/alice/.greenroom/usage",
            "acme/alice/.claude/sessions/main",
            "a\0b",
        ] {
            assert!(at(cwd).is_err(), "{cwd:?}: {:?}", at(cwd));
        }
    }
}
