//! Silent loss: a merge without a conflict that takes lines away which somebody else wrote and no
//! turn of this thread ever touched.
//!
//! A three-way merge does that where the branch being merged holds an old state of a file: the
//! merge that brought the others' work was reverted or made with "ours", or a tree was restored
//! as a whole. git sees a deliberate deletion then. The check believes no merge, restore or
//! stranger: a line may vanish from the target if
//!
//! - it is still somewhere in what the merge changes (it was moved), or
//! - it was there before the owner's first commit (then it is not the others' new work), or
//! - an ordinary turn or outside edit of the owner added or deleted it (then somebody looked at it).
//!
//! It looks at contents of lines, not at places, and errs on the side of silence: what it stops
//! is meant to be worth a person's look. Binary files count as one line.

use std::collections::{BTreeMap, HashSet};

use git2::{Commit, Diff, DiffFindOptions, DiffOptions, Oid, Repository, Tree};

use super::{Operation as _, Result};
use crate::{
    domain::{Conflict, ConflictKind},
    identity::{ThreadKey, UserKey},
};

/// Files larger than this are compared as a whole, in bytes.
const MAX_COMPARED: i64 = 2_000_000;
/// Commits that are looked at, from the newest. The owner of a longer history touched enough.
const MAX_COMMITS: usize = 5_000;
/// What is shown: files, lines of each, characters of each line.
const MAX_FILES: usize = 50;
const MAX_LINES: usize = 20;
const MAX_CHARS: usize = 200;

const REASON: &str = "Lines that others wrote would vanish, although no turn here touched them.";

/// Whose turns explain what vanishes.
#[derive(Debug, Clone)]
pub(super) enum Owner {
    Thread(ThreadKey),
    /// All threads of a user, and what somebody edits in `project/`.
    User(UserKey),
}

/// What a commit says about itself, if it is the owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// An instruction, or edits by hand: somebody meant each change.
    Ordinary,
    /// Undo, redo, restore, sync, publish: puts together what was there.
    Mechanical,
}

impl Owner {
    /// Anyone who may write commits here can write any trailer; who forges one hides a loss from
    /// this check, no more.
    fn kind_of(&self, commit: &Commit<'_>) -> Option<Kind> {
        let message = String::from_utf8_lossy(commit.message_bytes());
        let trailers = git2::message_trailers_strs(&message).ok()?;
        let value = |name: &str| {
            let mut found = trailers.iter().filter(|(key, _)| *key == name);
            found.next_back().map(|(_, value)| value)
        };
        let is_own = match self {
            Self::Thread(key) => value("Thread") == Some(&key.to_string()),
            Self::User(key) => {
                let prefix = format!("{key}/");
                value("Thread").is_some_and(|thread| thread.starts_with(&prefix))
                    || value("User") == Some(&key.to_string())
            }
        };
        let is_ordinary = commit.parent_count() == 1
            && (value("Status") == Some("outside")
                || value("Turn-Id").is_some() && value("Kind").is_none());
        is_own.then_some(if is_ordinary {
            Kind::Ordinary
        } else {
            Kind::Mechanical
        })
    }
}

/// A line without what editors change by themselves at its end, or a file as a whole.
type Line = Vec<u8>;

/// Lines that a difference takes away and adds, by the path before (for those taken away).
#[derive(Default)]
struct Lines {
    gone: BTreeMap<Vec<u8>, Vec<Line>>,
    added: HashSet<Line>,
}

/// Files of `ours` that lose lines which the merge must not take away; `merged` is what comes of
/// merging `theirs`, the owner's, into `ours`.
pub(super) fn find(
    repo: &Repository,
    ours: &Commit<'_>,
    theirs: &Commit<'_>,
    merged: &Tree<'_>,
    owner: &Owner,
) -> Result<Vec<Conflict>> {
    let look = || -> Result<_, git2::Error> {
        let mut lost = compare(repo, &ours.tree()?, merged, true)?;
        for lines in lost.gone.values_mut() {
            lines.retain(|line| !lost.added.contains(line));
        }
        let mut gone = lost.gone;
        gone.retain(|_, lines| !lines.is_empty());
        // What this merge brings explains it nearly always; the rest costs a walk.
        for limit in [Some(ours.id()), None] {
            if gone.is_empty() {
                break;
            }
            explain(repo, theirs.id(), limit, owner, &mut gone)?;
        }
        Ok(gone)
    };
    let gone = look().during("look for lines that a merge would lose")?;
    let files = gone.into_iter().take(MAX_FILES).map(|(path, lines)| {
        let show = |line: &Line| {
            let line = String::from_utf8_lossy(line);
            crate::text::plain(&line).chars().take(MAX_CHARS).collect()
        };
        Conflict {
            reason: REASON.into(),
            path: String::from_utf8_lossy(&path).into_owned(),
            kind: ConflictKind::SilentLoss,
            lines: lines.iter().take(MAX_LINES).map(show).collect(),
        }
    });
    Ok(files.collect())
}

/// Takes out of `gone` what the owner's commits explain: those up to `limit`, or all of them, and
/// then also what was there before the first.
fn explain(
    repo: &Repository,
    tip: Oid,
    limit: Option<Oid>,
    owner: &Owner,
    gone: &mut BTreeMap<Vec<u8>, Vec<Line>>,
) -> Result<(), git2::Error> {
    let start = match limit {
        Some(_) => None,
        None => match first_parent_of_first(repo, tip, owner)? {
            Some(start) => Some(start),
            // Nothing here is the owner's: there is nothing to judge by.
            None => {
                gone.clear();
                return Ok(());
            }
        },
    };
    let mut walk = repo.revwalk()?;
    walk.push(tip)?;
    if let Some(hidden) = limit.or(start) {
        walk.hide(hidden)?;
    }
    let mut touched = HashSet::new();
    for id in walk.take(MAX_COMMITS) {
        let commit = repo.find_commit(id?)?;
        if owner.kind_of(&commit) != Some(Kind::Ordinary) {
            continue;
        }
        let change = compare(repo, &commit.parent(0)?.tree()?, &commit.tree()?, false)?;
        touched.extend(change.added);
        touched.extend(change.gone.into_values().flatten());
    }
    let before = start
        .map(|start| repo.find_commit(start)?.tree())
        .transpose()?;
    for (path, lines) in &mut *gone {
        lines.retain(|line| !touched.contains(line));
        if let Some(before) = &before
            && !lines.is_empty()
        {
            let known = lines_at(repo, before, path)?;
            lines.retain(|line| !known.contains(line));
        }
    }
    gone.retain(|_, lines| !lines.is_empty());
    Ok(())
}

/// The commit that the owner's first one was made on.
fn first_parent_of_first(
    repo: &Repository,
    tip: Oid,
    owner: &Owner,
) -> Result<Option<Oid>, git2::Error> {
    let mut walk = repo.revwalk()?;
    walk.simplify_first_parent()?;
    walk.push(tip)?;
    let mut start = None;
    for id in walk.take(MAX_COMMITS) {
        let commit = repo.find_commit(id?)?;
        if owner.kind_of(&commit).is_some() {
            start = commit.parent_id(0).ok();
        }
    }
    Ok(start)
}

fn lines_at(repo: &Repository, tree: &Tree<'_>, path: &[u8]) -> Result<HashSet<Line>, git2::Error> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(path));
    let Ok(entry) = tree.get_path(path) else {
        return Ok(HashSet::new());
    };
    let mut known = HashSet::from([whole(entry.id())]);
    if let Ok(blob) = repo.find_blob(entry.id()) {
        let lines = blob.content().split(|&byte| byte == b'\n');
        known.extend(lines.filter_map(meaning));
    }
    Ok(known)
}

/// A file as one line.
fn whole(id: Oid) -> Line {
    format!("(binary content {id})").into_bytes()
}

/// What of a line is compared; `None` for one that says nothing.
fn meaning(line: &[u8]) -> Option<Line> {
    let line = line.trim_ascii();
    line.iter()
        .any(|byte| byte.is_ascii_alphanumeric() || !byte.is_ascii())
        .then(|| line.to_vec())
}

fn compare(
    repo: &Repository,
    old: &Tree<'_>,
    new: &Tree<'_>,
    follows_renames: bool,
) -> Result<Lines, git2::Error> {
    let mut options = DiffOptions::new();
    options.context_lines(0).max_size(MAX_COMPARED);
    let mut diff = repo.diff_tree_to_tree(Some(old), Some(new), Some(&mut options))?;
    if follows_renames {
        diff.find_similar(Some(DiffFindOptions::new().renames(true).rename_limit(200)))?;
    }
    lines_of(&diff)
}

fn lines_of(diff: &Diff<'_>) -> Result<Lines, git2::Error> {
    let lines = std::cell::RefCell::new(Lines::default());
    diff.foreach(
        &mut |_, _| true,
        Some(&mut |delta, _| {
            let mut lines = lines.borrow_mut();
            let (old, new) = (delta.old_file(), delta.new_file());
            if old.id() != new.id() {
                if !new.id().is_zero() {
                    lines.added.insert(whole(new.id()));
                }
                if let Some(path) = old.path_bytes().filter(|_| !old.id().is_zero()) {
                    let gone = lines.gone.entry(path.to_vec()).or_default();
                    gone.push(whole(old.id()));
                }
            }
            true
        }),
        None,
        Some(&mut |delta, _, line| {
            let mut lines = lines.borrow_mut();
            let Some(meaning) = meaning(line.content()) else {
                return true;
            };
            match line.origin() {
                '+' => {
                    lines.added.insert(meaning);
                }
                '-' => {
                    if let Some(path) = delta.old_file().path_bytes() {
                        let gone = lines.gone.entry(path.to_vec()).or_default();
                        gone.push(meaning);
                    }
                }
                _ => {}
            }
            true
        }),
    )?;
    Ok(lines.into_inner())
}
