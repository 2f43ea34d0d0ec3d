//! What differs between two states of a site: as a list of files with counts, and as text.
//! Both are bounded: a turn may have added a whole folder of pictures, or one line of two
//! megabytes.

use std::path::Path;

use git2::{
    Delta, Diff, DiffFindOptions, DiffFormat, DiffLineType, DiffOptions, ErrorCode, Oid, Patch,
    Repository, Tree,
};

use super::{
    Operation as _, RepositoryError, Result, draft::find_commit, user, worktree::Worktree,
};
use crate::domain::{FileChange, FileStatus};

/// Files larger than this are not compared line by line, in bytes.
const MAX_COMPARED: i64 = 2_000_000;
/// Of changes to more files than this the lines are not counted.
const MAX_COUNTED: usize = 2_000;
/// Most files that are listed.
const MAX_LISTED: usize = 10_000;
/// Most bytes of their paths: a list is one line of a journal.
const MAX_PATH_BYTES: usize = 1 << 20;
/// Renames are looked for among so many files that came and went.
const MAX_RENAMES: usize = 200;
/// Longest text of one file, in bytes.
const MAX_FILE_TEXT: usize = 200_000;
/// Longest text of all files, in bytes.
const MAX_TEXT: usize = 1_000_000;

/// A unified diff as the git program writes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiffText {
    pub text: String,
    /// Something was left out; a line that begins with `\` says so at the place.
    pub truncated: bool,
}

/// What differs between two commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteDiff {
    /// Full ids.
    pub from: String,
    pub to: String,
    pub diff: DiffText,
    pub files: Vec<FileChange>,
    pub files_omitted: u64,
}

impl Worktree {
    /// What differs between two commits, each named by its id or the beginning of it.
    ///
    /// Without either: all of this thread's changes, from where its branch and `trunk` (the
    /// user's) last met. Without `from`: what the commit `to` itself changed. Without `to`: up to
    /// the branch's commit.
    ///
    /// # Errors
    /// [`RepositoryError::NoSuchCommit`], [`RepositoryError::AmbiguousCommit`].
    pub fn diff(&self, trunk: &str, from: Option<&str>, to: Option<&str>) -> Result<SiteDiff> {
        let repo = self.read()?;
        let after = match to {
            Some(id) => find_commit(&repo, id)?.id(),
            None => self.tip(&repo)?,
        };
        let before = match (from, to) {
            (Some(id), _) => Some(find_commit(&repo, id)?.id()),
            (None, Some(_)) => parent(&repo, after)?,
            (None, None) => Some(self.fork(&repo, trunk, after)?),
        };
        let trees = || -> Result<_, git2::Error> {
            let before = match before {
                Some(id) => repo.find_commit(id)?.tree()?,
                // The very first commit came out of nothing.
                None => repo.find_tree(repo.treebuilder(None)?.write()?)?,
            };
            Ok((before, repo.find_commit(after)?.tree()?))
        };
        let (old, new) = trees().during("read the trees")?;
        let read = || -> Result<_, git2::Error> {
            Ok((
                text(&repo, &old, &new)?,
                changed_files(&repo, Some(&old), &new)?,
            ))
        };
        let (mut diff, (files, files_omitted)) = read().during("compare two states")?;
        diff.truncated |= files_omitted > 0;
        Ok(SiteDiff {
            from: before.map(|id| id.to_string()).unwrap_or_default(),
            to: after.to_string(),
            diff,
            files,
            files_omitted,
        })
    }

    /// The newest commit that the branch has in common with `trunk`.
    fn fork(&self, repo: &Repository, trunk: &str, tip: Oid) -> Result<Oid> {
        let trunk_tip =
            user::branch_tip(repo, trunk)?.ok_or_else(|| RepositoryError::NoSuchBranch {
                branch: trunk.to_owned(),
            })?;
        match repo.merge_base(tip, trunk_tip) {
            // Nothing in common: everything of the thread is its own.
            Err(error) if error.code() == ErrorCode::NotFound => Ok(trunk_tip),
            found => found.during("look for where the thread began"),
        }
    }
}

fn parent(repo: &Repository, commit: Oid) -> Result<Option<Oid>> {
    let commit = repo.find_commit(commit).during("read the commit")?;
    Ok(commit.parent_ids().next())
}

fn compare<'r>(
    repo: &'r Repository,
    before: Option<&Tree<'_>>,
    after: &Tree<'_>,
    context: u32,
) -> Result<Diff<'r>, git2::Error> {
    let mut options = DiffOptions::new();
    options.context_lines(context).max_size(MAX_COMPARED);
    let mut diff = repo.diff_tree_to_tree(before, Some(after), Some(&mut options))?;
    let mut similar = DiffFindOptions::new();
    similar.renames(true).rename_limit(MAX_RENAMES);
    diff.find_similar(Some(&mut similar))?;
    Ok(diff)
}

/// The files that differ between two trees, with line counts; and how many more there are.
pub(super) fn changed_files(
    repo: &Repository,
    before: Option<&Tree<'_>>,
    after: &Tree<'_>,
) -> Result<(Vec<FileChange>, u64), git2::Error> {
    let diff = compare(repo, before, after, 0)?;
    let count = diff.deltas().len();
    let is_counted = count <= MAX_COUNTED;
    let mut files = Vec::new();
    let mut path_bytes = 0;
    for at in 0..count {
        // Making the patch also finds out what is text.
        let patch = if is_counted {
            Patch::from_diff(&diff, at)?
        } else {
            None
        };
        let counts = patch.map(|patch| patch.line_stats()).transpose()?;
        let (_, additions, deletions) = counts.unwrap_or_default();
        let Some(delta) = diff.get_delta(at) else {
            break;
        };
        let status = match delta.status() {
            Delta::Added | Delta::Copied => FileStatus::Added,
            Delta::Deleted => FileStatus::Deleted,
            Delta::Renamed => FileStatus::Renamed,
            _ => FileStatus::Modified,
        };
        let path = |file: git2::DiffFile<'_>| {
            String::from_utf8_lossy(file.path_bytes().unwrap_or_default()).into_owned()
        };
        let old_path = (status == FileStatus::Renamed).then(|| path(delta.old_file()));
        let path = if status == FileStatus::Deleted {
            path(delta.old_file())
        } else {
            path(delta.new_file())
        };
        path_bytes += path.len() + old_path.as_ref().map_or(0, String::len);
        if files.len() == MAX_LISTED || path_bytes > MAX_PATH_BYTES {
            break;
        }
        files.push(FileChange {
            path,
            old_path,
            status,
            additions: additions as u64,
            deletions: deletions as u64,
            binary: delta.flags().is_binary(),
        });
    }
    let omitted = (count - files.len()) as u64;
    Ok((files, omitted))
}

/// What becomes of a file that was there, or is now.
pub(super) fn status_of(was: bool, is: bool) -> FileStatus {
    match (was, is) {
        (false, _) => FileStatus::Added,
        (true, true) => FileStatus::Modified,
        (true, false) => FileStatus::Deleted,
    }
}

/// One file of [`changed_files`], by its contents. `None` for one that is too large to be compared.
pub(super) fn between(
    path: &Path,
    status: FileStatus,
    before: &[u8],
    after: &[u8],
) -> Result<Option<FileChange>, git2::Error> {
    if before.len().max(after.len()) as i64 > MAX_COMPARED {
        return Ok(None);
    }
    let mut options = DiffOptions::new();
    options.context_lines(0);
    let patch = Patch::from_buffers(before, Some(path), after, Some(path), Some(&mut options))?;
    let (_, additions, deletions) = patch.line_stats()?;
    Ok(Some(FileChange {
        path: path.to_string_lossy().into_owned(),
        old_path: None,
        status,
        additions: additions as u64,
        deletions: deletions as u64,
        binary: patch.delta().flags().is_binary(),
    }))
}

/// The diff of two trees as text.
pub(super) fn text(
    repo: &Repository,
    before: &Tree<'_>,
    after: &Tree<'_>,
) -> Result<DiffText, git2::Error> {
    let diff = compare(repo, Some(before), after, 3)?;
    let mut pen = Pen::default();
    let printed = diff.print(DiffFormat::Patch, |delta, _, line| {
        match line.origin_value() {
            DiffLineType::FileHeader => pen.begin_file(line.content()),
            DiffLineType::Binary if is_large_text(repo, &delta) => {
                pen.cut("This file is too large to be compared.");
            }
            DiffLineType::Addition | DiffLineType::Deletion | DiffLineType::Context => {
                pen.line(Some(line.origin()), line.content());
            }
            _ => pen.line(None, line.content()),
        }
        // Answering false ends the whole.
        !pen.is_full
    });
    match printed {
        Err(error) if error.code() == ErrorCode::User => {}
        printed => printed?,
    }
    Ok(pen.diff)
}

/// Would a file that was not compared be text?
fn is_large_text(repo: &Repository, delta: &git2::DiffDelta<'_>) -> bool {
    let is_text = |id: Oid| id.is_zero() || repo.find_blob(id).is_ok_and(|blob| !blob.is_binary());
    is_text(delta.old_file().id()) && is_text(delta.new_file().id())
}

/// Writes a diff within its bounds.
#[derive(Default)]
struct Pen {
    diff: DiffText,
    /// Where the present file begins.
    file_at: usize,
    is_file_cut: bool,
    is_full: bool,
}

impl Pen {
    fn begin_file(&mut self, header: &[u8]) {
        if self.diff.text.len() >= MAX_TEXT {
            self.is_full = true;
            self.cut("There are changes to more files.");
            return;
        }
        self.file_at = self.diff.text.len();
        self.is_file_cut = false;
        self.line(None, header);
    }

    fn line(&mut self, origin: Option<char>, content: &[u8]) {
        if self.is_file_cut {
            return;
        }
        let room = MAX_FILE_TEXT.min(MAX_TEXT - self.file_at.min(MAX_TEXT));
        let used = self.diff.text.len() - self.file_at;
        let line = String::from_utf8_lossy(content);
        if used + line.len() <= room {
            self.diff.text.extend(origin);
            self.diff.text.push_str(&line);
            return;
        }
        // The beginning of a very long line says more than nothing.
        const WORTH_SHOWING: usize = 1000;
        let end = line.floor_char_boundary(room.saturating_sub(used));
        if end >= WORTH_SHOWING {
            self.diff.text.extend(origin);
            self.diff.text.push_str(&line[..end]);
        }
        self.cut("This file has more changes.");
    }

    /// A line that begins with a backslash is a remark to every reader of diffs.
    fn cut(&mut self, why: &str) {
        let text = &mut self.diff.text;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&format!("\\ Cut here: {why}\n"));
        self.is_file_cut = true;
        self.diff.truncated = true;
    }
}
