//! One thread's worktree: what changed in it, and the commits made of that.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use git2::{
    ErrorCode, Index, IndexEntry, IndexTime, ObjectType, Oid, Repository, StatusOptions, Tree,
};
use nix::sys::stat::FileStat;

use super::{
    Operation as _, RepositoryError, Result, checkout, diff,
    files::{self, Found, Root},
    gate::{self, Keeper},
    gitdir::GitDir,
    guard::{Repair, Strangers},
    message, tree, user, vet,
};
use crate::{
    domain::{CommitSummary, FileStatus, HeldBack, Signature},
    identity::{ThreadKey, UserKey},
    lease::Fence,
};

/// The worktree of one thread, on its branch. Plain paths: each call opens what it needs and
/// puts the links between worktree and repository right before.
#[derive(Debug, Clone)]
pub struct Worktree {
    pub(super) git: GitDir,
    /// The worktree's entry in the git directory: HEAD, index, links.
    pub(super) admin: PathBuf,
    pub(super) path: PathBuf,
    pub(super) branch: String,
    /// It is the repository's own, `project/`, which has no links to be put right.
    pub(super) is_main: bool,
}

/// One path that differs from the branch's commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Relative to the worktree, with `/`.
    pub path: String,
    /// Never `Renamed`: that is told of commits alone.
    pub status: FileStatus,
}

/// What a commit is to say.
#[derive(Debug)]
pub struct CommitText<'a> {
    /// Becomes the subject (its first line, cut) and, where it is longer, the body.
    pub instruction: &'a str,
    /// The last paragraph of the message: `Turn-Id`, `Thread`, `Status` and so on.
    pub trailers: &'a [(&'a str, String)],
    pub author: &'a Signature,
    pub committer: &'a Signature,
}

/// How to commit what is in the worktree.
#[derive(Debug)]
pub struct CommitRequest<'a> {
    pub text: CommitText<'a>,
    /// What becomes of commits that others made on the branch since the last one of ours.
    pub strangers: Strangers,
    /// Folder of this turn for copies of what is held back; made when needed.
    pub held_dir: &'a Path,
    /// Asked right before the branch moves.
    pub fence: &'a Fence,
}

/// What [`Worktree::commit`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// `None` if nothing (or nothing but held-back files) had changed.
    pub commit: Option<CommitSummary>,
    /// Files left out on purpose; they are still in the worktree.
    pub held_back: Vec<HeldBack>,
    /// What had to be put right before.
    pub repairs: Vec<Repair>,
}

/// One commit of a branch's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub id: String,
    pub subject: String,
    pub author: Signature,
    pub time: jiff::Timestamp,
    /// In the order of the message. Anyone who may push can write any trailer.
    pub trailers: Vec<(String, String)>,
}

/// Most paths that a scan takes up. A turn that leaves more untracked files than this is
/// installing something, not editing a site.
const MAX_PATHS: usize = 500_000;
/// A file that holds secrets is compared with so many deleted ones, to find out if it was renamed.
const MAX_GONE: usize = 100;
/// `git update-index --assume-unchanged` (the entry's flag, `GIT_INDEX_ENTRY_VALID`).
const ASSUME_UNCHANGED: u16 = 0x8000;
/// `git update-index --skip-worktree` (the entry's extended flag).
const SKIP_WORKTREE: u16 = 1 << 14;

pub(super) const LINK_MODE: u32 = 0o120_000;

impl Worktree {
    pub(super) fn new(git: GitDir, key: &ThreadKey, path: &Path) -> Self {
        let admin = git.path().join("worktrees").join(key.thread.as_str());
        Self {
            git,
            admin,
            path: path.to_owned(),
            branch: key.branch(),
            is_main: false,
        }
    }

    /// `project/`, where the user's branch is checked out.
    pub(super) fn of_user(git: GitDir, key: &UserKey, project: &Path) -> Self {
        Self {
            admin: git.path().to_owned(),
            git,
            path: project.to_owned(),
            branch: key.user_branch(),
            is_main: true,
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Full id of the branch's commit.
    pub fn head(&self) -> Result<String> {
        let repo = self.read()?;
        self.tip(&repo).map(|id| id.to_string())
    }

    /// What differs from the branch's commit: new files one by one, ignored ones left out. The
    /// files of a repository inside the worktree are files like others.
    pub fn changes(&self) -> Result<Vec<Change>> {
        let repo = self.open()?;
        let head = self.tree(&repo, self.tip(&repo)?)?;
        let root = Root::open(&self.path).during("open the worktree")?;
        let mut changes = Vec::new();
        for path in self.differing(&repo)? {
            let on_disk = root.look(&path).during("look at a changed file")?;
            let is_there = matches!(on_disk, Found::File(..) | Found::Link(..))
                || gate::packages_folder(&path).is_some_and(|folder| folder == path);
            let status = match (in_tree(&head, &path)?.is_some(), is_there) {
                (false, false) => continue,
                (false, true) => FileStatus::Added,
                (true, true) => FileStatus::Modified,
                (true, false) => FileStatus::Deleted,
            };
            changes.push(Change {
                path: path.to_string_lossy().into_owned(),
                status,
            });
        }
        Ok(changes)
    }

    /// Puts right what can be (see `guard`), commits everything that changed, but for what the
    /// gate holds back, and brings the index into agreement. Makes no commit where nothing changed.
    ///
    /// # Errors
    /// [`RepositoryError::HeadMoved`] if the branch moved meanwhile: nothing was committed.
    /// [`RepositoryError::Locked`] and [`RepositoryError::Tampered`] for what the guard refuses.
    pub fn commit(&self, request: &CommitRequest<'_>) -> Result<Committed> {
        let (repo, repairs) = match self.is_main {
            true => (self.open()?, Vec::new()),
            false => self.put_right(request.strangers, request.fence)?,
        };
        let head = self.tip(&repo)?;
        let mut committed = self.commit_onto(&repo, head, request)?;
        committed.repairs.splice(0..0, repairs);
        Ok(committed)
    }

    /// As [`Worktree::commit`], but from a head that was read earlier.
    #[cfg(test)]
    pub(super) fn commit_from(&self, head: Oid) -> Result<Committed> {
        let who = Signature {
            name: String::new(),
            email: String::new(),
        };
        let request = CommitRequest {
            text: CommitText {
                instruction: "",
                trailers: &[],
                author: &who,
                committer: &who,
            },
            strangers: Strangers::Keep,
            held_dir: &self.path.with_file_name("held"),
            fence: &Fence::open(),
        };
        self.commit_onto(&self.open()?, head, &request)
    }

    fn commit_onto(
        &self,
        repo: &Repository,
        head: Oid,
        request: &CommitRequest<'_>,
    ) -> Result<Committed> {
        let head_tree = self.tree(repo, head)?;
        let Some(staged) = self.stage(repo, &head_tree, Keeper::new(request.held_dir))? else {
            return Ok(Committed {
                commit: None,
                held_back: Vec::new(),
                repairs: Vec::new(),
            });
        };
        let Staged {
            tree,
            mut index,
            held_back,
            repairs,
        } = staged;
        let commit = if tree == head_tree.id() {
            None
        } else {
            let id = write_commit(repo, tree, &[head], &request.text)?;
            self.move_branch(repo, head, id, request.fence)?;
            Some(summarise(repo, id)?)
        };
        // After the branch: an index that is behind is mended by the next commit, one that is
        // ahead would show work that is in no commit.
        if let Err(error) = index.write() {
            tracing::warn!(%error, branch = self.branch, "the index could not be written");
        }
        Ok(Committed {
            commit,
            held_back,
            repairs,
        })
    }

    /// The tree that a commit would have now; `None` if nothing differs from `head`.
    pub(super) fn stage(
        &self,
        repo: &Repository,
        head: &Tree<'_>,
        keeper: Keeper<'_>,
    ) -> Result<Option<Staged>> {
        let paths = self.differing(repo)?;
        if paths.is_empty() {
            return Ok(None);
        }
        let mut stage = Stage {
            repo,
            head,
            root: Root::open(&self.path).during("open the worktree")?,
            paths: &paths,
            gone: OnceCell::new(),
            index: repo.index().during("read the index")?,
            keeper,
            edits: BTreeMap::new(),
            held_back: Vec::new(),
        };
        let repairs = unsettled(&stage.index)
            .during("read the index")?
            .into_iter()
            .collect();
        for path in &paths {
            stage.take(path)?;
        }
        let Stage {
            index,
            edits,
            held_back,
            ..
        } = stage;
        let tree = tree::edit(repo, Some(head), &edits).during("write the tree")?;
        Ok(Some(Staged {
            tree,
            index,
            held_back,
            repairs,
        }))
    }

    /// Moves the branch from one commit to the next, unless somebody else moved it meanwhile.
    pub(super) fn move_branch(
        &self,
        repo: &Repository,
        from: Oid,
        to: Oid,
        fence: &Fence,
    ) -> Result<()> {
        self.git.check_branch(&self.branch)?;
        let branch = format!("refs/heads/{}", self.branch);
        fence.check()?;
        // First: a crash between the two is put right by moving the branch, the other way round
        // the guard would take our commit for somebody else's.
        self.remember(repo, to)?;
        let moved = repo.reference_matching(&branch, to, true, from, "commit");
        if moved.is_err() {
            self.remember(repo, from)?;
        }
        moved.map(drop).map_err(|error| match error.code() {
            ErrorCode::Modified | ErrorCode::NotFound => RepositoryError::HeadMoved {
                branch: self.branch.clone(),
            },
            _ => RepositoryError::Git {
                operation: "commit",
                source: error,
            },
        })
    }

    /// At most the first `max_bytes` bytes of a regular file as it is committed.
    pub fn read_at_head(&self, path: &str, max_bytes: usize) -> Result<Option<Vec<u8>>> {
        let repo = self.read()?;
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        match in_tree(&tree, Path::new(path))? {
            Some((id, mode)) if mode != LINK_MODE => {
                let blob = repo.find_blob(id).during("read a committed file")?;
                let content = blob.content();
                Ok(Some(content[..content.len().min(max_bytes)].to_vec()))
            }
            _ => Ok(None),
        }
    }

    /// Writes the committed files into `to`, an empty or missing folder.
    pub fn export(&self, to: &Path) -> Result<()> {
        let repo = self.read()?;
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        fs::create_dir_all(to).during("make the folder for a copy")?;
        checkout::fill(&repo, &tree, checkout::Target::Copy(to)).during("copy the site's files")
    }

    /// The branch's commits, newest first, merges seen from their first parent.
    pub fn log(&self, limit: usize) -> Result<Vec<LogEntry>> {
        let repo = self.read()?;
        let walk = || -> Result<Vec<_>, git2::Error> {
            let mut walk = repo.revwalk()?;
            walk.simplify_first_parent()?;
            walk.push(self.tip_id(&repo)?)?;
            walk.take(limit)
                .map(|id| log_entry(&repo.find_commit(id?)?))
                .collect()
        };
        walk().during("read the history")
    }

    /// The branch's commit with this trailer, if one of the newest few has it.
    pub fn find_commit_with(&self, trailer: &str, value: &str) -> Result<Option<CommitSummary>> {
        const NEWEST: usize = 20;
        let entries = self.log(NEWEST)?;
        let found = entries.iter().find(|entry| {
            let mut trailers = entry.trailers.iter();
            trailers.any(|(name, text)| name == trailer && text == value)
        });
        found.map(|entry| self.summary(&entry.id)).transpose()
    }

    /// What one commit changed against its first parent.
    pub fn summary(&self, commit: &str) -> Result<CommitSummary> {
        let repo = self.read()?;
        let id = Oid::from_str(commit).during("read a commit's id")?;
        summarise(&repo, id)
    }

    /// Makes the worktree, or mends it; see `UserRepository::ensure_thread`.
    pub(super) fn ensure(&self, fence: &Fence) -> Result<()> {
        self.put_right(Strangers::Keep, fence)?;
        self.mend_index()
    }

    /// First checkout, under another name until it is whole: a half made worktree would look
    /// like one in which somebody deleted files.
    pub(super) fn check_out(&self) -> Result<()> {
        let mut hidden = OsStr::new(".").to_owned();
        hidden.push(self.name());
        hidden.push(".partial");
        let partial = self.path.with_file_name(hidden);
        files::remove_all(&partial).during("remove the leftovers of an earlier attempt")?;
        fs::create_dir_all(&partial).during("make the worktree's folder")?;
        // Whatever index there is belongs to files that are gone.
        files::remove_all(&self.admin.join("index")).during("remove the old index")?;
        let in_progress = Self {
            path: partial.clone(),
            ..self.clone()
        };
        let repo = in_progress.open()?;
        let tree = in_progress.tree(&repo, in_progress.tip(&repo)?)?;
        checkout::fill(&repo, &tree, checkout::Target::Worktree(&partial))
            .during("check the site out")?;
        fs::rename(&partial, &self.path).during("put the worktree in place")
    }

    /// Removes the folder and its entry in the git directory.
    pub(super) fn remove(&self) -> Result<()> {
        let mut hidden = OsStr::new(".").to_owned();
        hidden.push(self.name());
        hidden.push(".removed");
        let hidden = self.path.with_file_name(hidden);
        files::remove_all(&hidden).ok();
        match fs::rename(&self.path, &hidden) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.during("move the worktree out of the way")?,
        }
        // Half a worktree would look like one in which somebody deleted files; half of this
        // does not.
        if let Err(error) = files::remove_all(&hidden) {
            tracing::warn!(%error, "a removed worktree could not be emptied");
        }
        for name in [
            "gitdir",
            "commondir",
            "HEAD",
            "locked",
            "index",
            "logs",
            "refs",
            "landing",
            "ORIG_HEAD",
            "FETCH_HEAD",
            "COMMIT_EDITMSG",
        ] {
            files::remove_all(&self.admin.join(name)).during("remove the worktree's entry")?;
        }
        // What was put aside there in its lifetime is kept.
        match fs::remove_dir(&self.admin) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                let aside = self.git.path().join("removed-worktrees");
                fs::create_dir_all(&aside).during("keep what was put aside")?;
                let name = format!(
                    "{}-{}",
                    self.name().display(),
                    uuid::Uuid::now_v7().simple()
                );
                fs::rename(&self.admin, aside.join(name)).during("keep what was put aside")
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).during("remove the worktree's entry")
            }
            _ => Ok(()),
        }
    }

    /// The thread's id.
    fn name(&self) -> &OsStr {
        self.path
            .file_name()
            .expect("a worktree's path ends in its thread's id")
    }

    /// Makes the index agree with the branch's commit: it is behind after a crash, and missing
    /// after the loss of the worktree's entry.
    pub(super) fn mend_index(&self) -> Result<()> {
        let repo = self.open()?;
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        let mend = |repo: &Repository| {
            let mut index = repo.index()?;
            let is_behind = repo
                .diff_tree_to_index(Some(&tree), Some(&index), None)?
                .deltas()
                .len();
            if is_behind > 0 {
                index.read_tree(&tree)?;
                index.write()?;
            }
            Ok::<_, git2::Error>(())
        };
        if mend(&repo).is_err() {
            // A broken index holds nothing that HEAD and the files don't.
            files::remove_all(&self.admin.join("index")).during("remove a broken index")?;
            mend(&self.open()?).during("rebuild the index")?;
        }
        Ok(())
    }

    /// Opens the user's repository for what needs no worktree. Puts nothing right.
    pub(super) fn read(&self) -> Result<Repository> {
        self.git.open(self.git.project())
    }

    /// Opens the worktree's repository after putting right what leads there.
    pub(super) fn open(&self) -> Result<Repository> {
        if files::kind_of(&self.path)
            .during("look at the worktree")?
            .is_none()
        {
            return Err(RepositoryError::Missing);
        }
        if self.is_main {
            return self.git.open(&self.path);
        }
        self.put_right_entry()?;
        self.put_right_link()?;
        self.git.open_worktree(&self.admin, &self.path)
    }

    /// The entry's side: which git directory it belongs to, where the worktree is and which branch
    /// it is on.
    pub(super) fn put_right_entry(&self) -> Result<()> {
        fs::create_dir_all(&self.admin).during("make the worktree's entry")?;
        let head = format!("ref: refs/heads/{}\n", self.branch);
        // Absolute, because the git program would prune a relative one; so it is written anew
        // wherever the workspace is mounted.
        let back = [self.path.join(".git").as_os_str().as_bytes(), b"\n"].concat();
        for (file, content) in [
            ("commondir", b"../..\n".as_slice()),
            ("HEAD", head.as_bytes()),
            ("gitdir", &back),
            ("locked", b"kept by greenroom\n"),
        ] {
            files::put(&self.admin.join(file), content).during("link the worktree")?;
        }
        Ok(())
    }

    /// The worktree's side: its `.git` file. A git directory that somebody put there is moved
    /// into the entry, so that nothing in it is lost.
    pub(super) fn put_right_link(&self) -> Result<()> {
        let link = self.path.join(".git");
        if files::kind_of(&link)
            .during("look at the worktree's link")?
            .is_some_and(|k| k.is_dir())
        {
            tracing::warn!(
                branch = self.branch,
                "a worktree's .git was replaced; moved aside"
            );
            let aside = format!("replaced-{}", uuid::Uuid::now_v7().simple());
            fs::rename(&link, self.admin.join(aside)).during("move a foreign .git aside")?;
        }
        // Relative, so that it survives a move of the workspace.
        let mut content = b"gitdir: ".to_vec();
        content.extend(
            files::relative(&self.path, &self.admin)
                .as_os_str()
                .as_bytes(),
        );
        content.push(b'\n');
        files::put(&link, &content).during("link the worktree")
    }

    pub(super) fn tip(&self, repo: &Repository) -> Result<Oid> {
        user::branch_tip(repo, &self.branch)?.ok_or_else(|| RepositoryError::NoSuchBranch {
            branch: self.branch.clone(),
        })
    }

    fn tip_id(&self, repo: &Repository) -> Result<Oid, git2::Error> {
        repo.refname_to_id(&format!("refs/heads/{}", self.branch))
    }

    pub(super) fn tree<'r>(&self, repo: &'r Repository, commit: Oid) -> Result<Tree<'r>> {
        repo.find_commit(commit)
            .and_then(|commit| commit.tree())
            .during("read the commit")
    }

    /// Every path at which commit, index and worktree are not all the same; a folder of installed
    /// packages is one path.
    fn differing(&self, repo: &Repository) -> Result<BTreeSet<PathBuf>> {
        let mut index = repo.index().during("read the index")?;
        clear_hiding_flags(&mut index).during("read the index")?;
        let mut options = StatusOptions::new();
        options
            .include_untracked(true)
            .recurse_untracked_dirs(true)
            .exclude_submodules(true);
        let statuses = repo
            .statuses(Some(&mut options))
            .during("scan the worktree")?;
        let mut paths = BTreeSet::new();
        for entry in statuses.iter().take(MAX_PATHS) {
            let bytes = entry.path_bytes();
            let path = Path::new(OsStr::from_bytes(bytes));
            match bytes.strip_suffix(b"/") {
                // A folder that git does not look into: a repository inside the worktree.
                Some(folder) => {
                    let folder = Path::new(OsStr::from_bytes(folder));
                    self.list_nested(repo, folder, &mut paths);
                }
                None => {
                    let is_new = entry.status().is_wt_new();
                    let packages = gate::packages_folder(path).filter(|_| is_new);
                    paths.insert(packages.unwrap_or_else(|| path.to_owned()));
                }
            }
        }
        Ok(paths)
    }

    /// Lists the files below `folder` that are not ignored. What cannot be read, or vanishes
    /// meanwhile, is left out, as git's own scan does it.
    fn list_nested(&self, repo: &Repository, folder: &Path, paths: &mut BTreeSet<PathBuf>) {
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(self.path.join(&folder));
            for entry in entries.into_iter().flatten().flatten() {
                let name = entry.file_name();
                let path = folder.join(&name);
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                // git takes a path for a folder's by its last character.
                let asked = if is_folder {
                    path.join("")
                } else {
                    path.clone()
                };
                if name == ".git" || repo.is_path_ignored(&asked).unwrap_or(false) {
                    continue;
                }
                if is_folder && gate::packages_folder(&path).is_none() {
                    folders.push(path);
                } else if paths.len() < MAX_PATHS {
                    paths.insert(path);
                }
            }
        }
    }
}

/// What [`Worktree::stage`] found.
pub(super) struct Staged {
    pub(super) tree: Oid,
    /// Agrees with the tree; not written.
    index: Index,
    held_back: Vec<HeldBack>,
    repairs: Vec<Repair>,
}

/// A commit in the making: the tree's edits and the index, path by path.
struct Stage<'a> {
    repo: &'a Repository,
    head: &'a Tree<'a>,
    root: Root,
    /// Every path that differs.
    paths: &'a BTreeSet<PathBuf>,
    gone: OnceCell<Vec<Oid>>,
    index: Index,
    keeper: Keeper<'a>,
    edits: tree::Edits,
    held_back: Vec<HeldBack>,
}

impl Stage<'_> {
    /// Takes up one path as it is in the worktree now.
    fn take(&mut self, path: &Path) -> Result<()> {
        let committed = in_tree(self.head, path)?;
        if committed.is_none() && gate::packages_folder(path).is_some() {
            // Not copied: there may be a gigabyte of it, and installing brings it back.
            self.leave_out(
                path,
                committed,
                "installed packages are not part of the site",
            );
            return Ok(());
        }
        let name_fault = if committed.is_none() {
            gate::judge_name(path)
        } else {
            None
        };
        match self.root.look(path) {
            Ok(Found::File(mut file, stat)) => {
                let fault = match name_fault {
                    Some(fault) => Some(fault.to_owned()),
                    None => self.judge(path, &mut file, &stat, committed)?,
                };
                if let Some(reason) = fault {
                    self.hold_back(path, committed, &mut file, &reason);
                    return Ok(());
                }
                match write_blob(self.repo, path, &mut file) {
                    Ok(id) => self.stage(path, committed, id, &stat),
                    Err(error) => {
                        tracing::warn!(%error, "a changed file could not be read");
                        self.leave_out(path, committed, "it could not be read");
                    }
                }
            }
            Ok(Found::Link(target, stat)) => {
                if let Some(reason) = name_fault {
                    self.leave_out(path, committed, reason);
                    return Ok(());
                }
                let id = self.repo.blob(&target).during("store a symlink")?;
                self.stage(path, committed, id, &stat);
            }
            Ok(Found::Nothing | Found::Directory | Found::Other) => {
                // Not there as a file: what is below a folder has paths of its own.
                self.forget(path);
                if committed.is_some() {
                    self.edits
                        .insert(path.as_os_str().as_bytes().to_vec(), None);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a changed file could not be opened");
                self.leave_out(path, committed, "it could not be read");
            }
        }
        Ok(())
    }

    /// Why this content must not be committed, unless the history already holds the like.
    fn judge(
        &self,
        path: &Path,
        file: &mut File,
        stat: &FileStat,
        committed: Option<(Oid, u32)>,
    ) -> Result<Option<String>> {
        let earlier = committed.and_then(|(id, _)| self.repo.find_blob(id).ok());
        if u64::try_from(stat.st_size).unwrap_or(0) > gate::MAX_FILE_BYTES {
            let was_large = earlier.is_some_and(|blob| blob.size() as u64 > gate::MAX_FILE_BYTES);
            return Ok((!was_large).then(|| gate::TOO_LARGE.to_owned()));
        }
        let mut content = Vec::new();
        let read = file.take(gate::MAX_FILE_BYTES).read_to_end(&mut content);
        read.and_then(|_| file.rewind())
            .during("read a changed file")?;
        let fault = gate::judge_content(path, &content, earlier.as_ref().map(git2::Blob::content));
        if fault.is_none() || earlier.is_some() {
            return Ok(fault);
        }
        // Renamed, it brings nothing new.
        let is_moved = self.gone()?.iter().any(|id| {
            self.repo.find_blob(*id).is_ok_and(|gone| {
                gate::judge_content(path, &content, Some(gone.content())).is_none()
            })
        });
        Ok(fault.filter(|_| !is_moved))
    }

    /// What the commit has of the files that are there no longer.
    fn gone(&self) -> Result<&[Oid]> {
        if let Some(gone) = self.gone.get() {
            return Ok(gone);
        }
        let mut gone = Vec::new();
        for path in self.paths {
            if let Ok(Found::Nothing) = self.root.look(path)
                && let Some((id, _)) = in_tree(self.head, path)?
                && gone.len() < MAX_GONE
            {
                gone.push(id);
            }
        }
        Ok(self.gone.get_or_init(|| gone))
    }

    fn stage(&mut self, path: &Path, committed: Option<(Oid, u32)>, id: Oid, stat: &FileStat) {
        let entry = index_entry(path, id, stat);
        let mode = entry.mode;
        self.forget(path);
        // Also the judge of names: it refuses `.git` in every spelling.
        if !vet::is_allowed(path) || self.index.add(&entry).is_err() {
            self.leave_out(path, committed, "git does not allow a file of this name");
        } else if committed != Some((id, mode)) {
            let mode = i32::try_from(mode).expect("git's modes have 16 bits");
            self.edits
                .insert(path.as_os_str().as_bytes().to_vec(), Some((id, mode)));
        }
    }

    fn hold_back(
        &mut self,
        path: &Path,
        committed: Option<(Oid, u32)>,
        file: &mut File,
        reason: &str,
    ) {
        match self.keeper.keep(path, file) {
            Ok(()) => self.leave_out(path, committed, reason),
            Err(error) => {
                tracing::warn!(%error, "a held-back file could not be copied aside");
                self.leave_out(
                    path,
                    committed,
                    &format!("{reason} (no copy of it could be kept)"),
                );
            }
        }
    }

    /// Reports the path and gives the index what the commit has there.
    fn leave_out(&mut self, path: &Path, committed: Option<(Oid, u32)>, reason: &str) {
        self.forget(path);
        if let Some((id, mode)) = committed {
            let entry = IndexEntry {
                mode,
                ..blank_entry(path, id)
            };
            if let Err(error) = self.index.add(&entry) {
                tracing::warn!(%error, "the index could not be put back for a held-back file");
            }
        }
        let path = path.to_string_lossy().into_owned();
        self.held_back.push(HeldBack {
            path,
            reason: format!("Not committed: {reason}."),
        });
    }

    fn forget(&mut self, path: &Path) {
        // All stages: a conflict that somebody left behind is settled by what is in the file.
        for stage in 0..=3 {
            self.index.remove(path, stage).ok();
        }
    }
}

/// Stores the file as git would for this path (line endings by its attributes).
pub(super) fn write_blob(repo: &Repository, path: &Path, file: &mut File) -> io::Result<Oid> {
    let mut writer = repo.blob_writer(Some(path)).map_err(io::Error::other)?;
    io::copy(file, &mut writer)?;
    writer.commit().map_err(io::Error::other)
}

/// Makes a commit that no branch has yet.
pub(super) fn write_commit(
    repo: &Repository,
    tree: Oid,
    parents: &[Oid],
    text: &CommitText<'_>,
) -> Result<Oid> {
    let write = || -> Result<_, git2::Error> {
        let tree = repo.find_tree(tree)?;
        let parents: Vec<_> = parents
            .iter()
            .map(|id| repo.find_commit(*id))
            .collect::<Result<_, _>>()?;
        let message = message::compose(text.instruction, text.trailers);
        let author = message::signature(text.author)?;
        let committer = message::signature(text.committer)?;
        let parents: Vec<_> = parents.iter().collect();
        repo.commit(None, &author, &committer, &message, &tree, &parents)
    };
    write().during("commit")
}

/// The blob and mode at `path`; `None` also for folders and submodules.
pub(super) fn in_tree(tree: &Tree<'_>, path: &Path) -> Result<Option<(Oid, u32)>> {
    match tree.get_path(path) {
        Ok(entry) if entry.kind() == Some(ObjectType::Blob) => {
            let mode = u32::try_from(entry.filemode()).expect("git's modes are positive");
            Ok(Some((entry.id(), mode)))
        }
        Ok(_) => Ok(None),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error).during("read the committed tree"),
    }
}

/// An index entry that claims nothing about the file on disk.
pub(super) fn blank_entry(path: &Path, id: Oid) -> IndexEntry {
    let never = IndexTime::new(0, 0);
    IndexEntry {
        ctime: never,
        mtime: never,
        dev: 0,
        ino: 0,
        mode: 0,
        uid: 0,
        gid: 0,
        file_size: 0,
        id,
        flags: 0,
        flags_extended: 0,
        path: path.as_os_str().as_bytes().to_vec(),
    }
}

/// The mode that git has for a file of this one.
pub(super) fn canonical_mode(mode: u32) -> u32 {
    match mode {
        mode if mode & 0o170_000 == LINK_MODE => LINK_MODE,
        mode if mode & 0o100 != 0 => 0o100_755,
        _ => 0o100_644,
    }
}

/// An entry for the file that `stat` was taken of. The index format has 32 bits for each field
/// and cuts what is longer.
pub(super) fn index_entry(path: &Path, id: Oid, stat: &FileStat) -> IndexEntry {
    let mode = canonical_mode(stat.st_mode);
    IndexEntry {
        ctime: IndexTime::new(stat.st_ctime as i32, stat.st_ctime_nsec as u32),
        mtime: IndexTime::new(stat.st_mtime as i32, stat.st_mtime_nsec as u32),
        dev: stat.st_dev as u32,
        ino: stat.st_ino as u32,
        mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        file_size: stat.st_size as u32,
        ..blank_entry(path, id)
    }
}

/// Takes away the marks that tell git not to look at a file.
fn clear_hiding_flags(index: &mut Index) -> Result<(), git2::Error> {
    let hiding: Vec<_> = index
        .iter()
        .filter(|e| e.flags & ASSUME_UNCHANGED != 0 || e.flags_extended & SKIP_WORKTREE != 0)
        .collect();
    for mut entry in hiding {
        entry.flags &= !ASSUME_UNCHANGED;
        entry.flags_extended &= !SKIP_WORKTREE;
        index.remove_path(Path::new(OsStr::from_bytes(&entry.path)))?;
        index.add(&entry)?;
    }
    Ok(())
}

/// The unsettled merge that somebody left in the index.
fn unsettled(index: &Index) -> Result<Option<Repair>, git2::Error> {
    let mut files = BTreeSet::new();
    if index.has_conflicts() {
        for conflict in index.conflicts()? {
            let conflict = conflict?;
            let side = conflict.our.or(conflict.their).or(conflict.ancestor);
            files.extend(side.map(|entry| String::from_utf8_lossy(&entry.path).into_owned()));
        }
    }
    let files: Vec<_> = files.into_iter().collect();
    Ok((!files.is_empty()).then_some(Repair::Conflicts { files }))
}

fn log_entry(commit: &git2::Commit<'_>) -> Result<LogEntry, git2::Error> {
    let message = String::from_utf8_lossy(commit.message_bytes());
    let trailers = git2::message_trailers_strs(&message)?;
    let trailers = trailers
        .iter()
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    let author = commit.author();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(LogEntry {
        id: commit.id().to_string(),
        subject: subject_of(commit),
        author: Signature {
            name: text(author.name_bytes()),
            email: text(author.email_bytes()),
        },
        time: jiff::Timestamp::from_second(commit.time().seconds()).unwrap_or_default(),
        trailers,
    })
}

fn subject_of(commit: &git2::Commit<'_>) -> String {
    let subject = commit.summary_bytes().unwrap_or_default();
    String::from_utf8_lossy(subject).into_owned()
}

pub(super) fn summarise(repo: &Repository, id: Oid) -> Result<CommitSummary> {
    let read = || -> Result<_, git2::Error> {
        let commit = repo.find_commit(id)?;
        let before = match commit.parent(0) {
            Ok(parent) => Some(parent.tree()?),
            Err(error) if error.code() == ErrorCode::NotFound => None,
            Err(error) => return Err(error),
        };
        let (files, files_omitted) = diff::changed_files(repo, before.as_ref(), &commit.tree()?)?;
        Ok(CommitSummary {
            id: id.to_string(),
            message: subject_of(&commit),
            files,
            files_omitted,
        })
    };
    read().during("read what a commit changed")
}
