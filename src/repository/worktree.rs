//! One thread's worktree: what changed in it, and the commits made of that.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use git2::{ErrorCode, ObjectType, Oid, Repository, Tree};
use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    sys::{
        stat::{UtimensatFlags, lstat, utimensat},
        time::TimeSpec,
    },
};

use super::{
    Operation as _, RepositoryError, Result, checkout,
    commit::{Kept, Opened},
    diff,
    files::{self, Root},
    gate::Keeper,
    gitdir::GitDir,
    guard::{Repair, Strangers},
    index::{Damaged, Entry, Index, LINK_MODE, Moment},
    message,
    objects::{NewObjects, commit_text},
    refs,
    scan::{Unfinished, compare, look},
    spare::Spare,
    stage::{Stage, in_tree},
    user,
    watch::Watch,
};
use crate::{
    domain::{CommitSummary, HeldBack, Signature},
    identity::{ThreadKey, UserKey},
    lease::Fence,
    owner::Owner,
    task,
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
    /// For whom the folder is made, if it has to be.
    owner: Option<Owner>,
    pub(super) kept: Kept,
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

/// How much of the worktree a commit looks at.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Every file.
    All,
    /// Every file, and what changes after that is watched.
    AllAndWatch(&'a Watch),
    /// What the watch has seen; every file if it does not know. It ends with this.
    Since(&'a Watch),
}

/// How to commit what is in the worktree.
#[derive(Debug)]
pub struct CommitRequest<'a> {
    pub text: CommitText<'a>,
    pub scope: Scope<'a>,
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

/// How often, and after which pauses, an index that somebody else is writing is tried again.
const INDEX_TRIES: u32 = 20;
const INDEX_PAUSE: Duration = Duration::from_millis(50);

impl Worktree {
    pub(super) fn new(git: GitDir, key: &ThreadKey, path: &Path, owner: Option<Owner>) -> Self {
        let admin = git.path().join("worktrees").join(key.thread.as_str());
        Self {
            git,
            admin,
            path: path.to_owned(),
            branch: key.branch(),
            is_main: false,
            owner,
            kept: Kept::default(),
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
            owner: None,
            kept: Kept::default(),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Full id of the branch's commit.
    pub fn head(&self) -> Result<String> {
        // Nearly always it is in a file of its own, which is as good as asking libgit2.
        let (branch, _) = self.references();
        if let Some(head) = refs::read(&self.git.path().join(branch)) {
            return Ok(head.to_string());
        }
        let repo = self.read()?;
        self.tip(&repo).map(|id| id.to_string())
    }

    /// Puts right what can be (see `guard`), commits everything that changed, but for what the
    /// gate holds back, and brings the index into agreement. Makes no commit where nothing changed.
    ///
    /// # Errors
    /// [`RepositoryError::HeadMoved`] if the branch moved meanwhile: nothing was committed.
    /// [`RepositoryError::Locked`] and [`RepositoryError::Tampered`] for what the guard refuses.
    pub fn commit(&self, request: &CommitRequest<'_>) -> Result<Committed> {
        let mut opened = match self.is_main {
            true => self.open_anew(None)?,
            false => {
                let watch = match request.scope {
                    Scope::AllAndWatch(watch) => Some(watch),
                    Scope::All | Scope::Since(_) => None,
                };
                self.put_right(request.strangers, request.fence, watch)?
            }
        };
        let repairs = std::mem::take(&mut opened.repairs);
        let mut committed = self.commit_onto(&mut opened, request)?;
        committed.repairs.splice(0..0, repairs);
        if !self.is_main {
            self.keep_after(opened.repo, committed.commit.as_ref());
        }
        Ok(committed)
    }

    /// Opens the repository, for a commit onto `head` or the branch's own.
    fn open_anew(&self, head: Option<Oid>) -> Result<Opened> {
        let repo = self.open()?;
        let head = match head {
            Some(head) => head,
            None => self.tip(&repo)?,
        };
        Ok(Opened {
            repo,
            head,
            now: None,
            index: None,
            ahead: None,
            is_as_left: false,
            repairs: Vec::new(),
        })
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
            scope: Scope::All,
            strangers: Strangers::Keep,
            held_dir: &self.path.with_file_name("held"),
            fence: &Fence::open(),
        };
        self.commit_onto(&mut self.open_anew(Some(head))?, &request)
    }

    /// What somebody else put there (an operator at a shell, say) becomes the owner's: the agent could
    /// not change it.
    pub(super) fn adopt(&self, changes: &BTreeMap<Vec<u8>, Option<Entry>>) {
        if self.owner.is_none() {
            return;
        }
        let adopted = Root::open(&self.path).and_then(|root| {
            let present = changes.iter().filter(|(_, entry)| entry.is_some());
            let mut paths = present.map(|(name, _)| Path::new(OsStr::from_bytes(name)));
            paths.try_for_each(|path| root.adopt(path))
        });
        if let Err(error) = adopted {
            tracing::warn!(%error, branch = self.branch, "files stay somebody else's");
        }
    }

    /// Looks at the whole worktree: what a commit onto one of this tree would be now.
    pub(super) fn stage<'a>(
        &self,
        repo: &'a Repository,
        head: &'a Tree<'a>,
        keeper: Keeper<'a>,
    ) -> Result<Staged<'a>> {
        let mut known = Known::default();
        self.stage_in(repo, head, keeper, Scope::All, self.now()?, &mut known)
    }

    pub(super) fn stage_in<'a>(
        &self,
        repo: &'a Repository,
        head: &'a Tree<'a>,
        keeper: Keeper<'a>,
        scope: Scope<'_>,
        now: Moment,
        known: &mut Known,
    ) -> Result<Staged<'a>> {
        const WHAT: &str = "scan the worktree";
        let mut stage = Stage::new(repo, head, &self.path, now, keeper)?;
        if let Scope::Since(watch) = scope
            && let Some(changed) = watch.take(head.id())
            && let Some(scan) = look(&self.path, repo, head, changed)?
            && scan.unreadable.is_empty()
            && scan.forbidden.is_none()
        {
            stage.take_all(scan.paths)?;
            return Ok(Staged {
                stage,
                index: None,
                repairs: Vec::new(),
            });
        }
        let ahead = known.ahead.take();
        let known = known.index.take();
        let known = known.unwrap_or_else(|| Index::read(&self.index_file()));
        let is_of_head = known.as_ref().is_ok_and(|index| index.is_of(head.id()));
        let ahead = ahead.filter(|_| is_of_head);
        let (index, damage) = Index::of_known(known, repo, head).during("read the index")?;
        let scan = match ahead {
            Some(scan) => scan,
            None => {
                if let Scope::AllAndWatch(watch) = scope {
                    watch.begin(&self.path, &index);
                }
                let now = || self.now().map_err(io::Error::other);
                compare(&self.path, &index, &now).during(WHAT)?
            }
        };
        let scan = scan.finish(&self.path, repo);
        if let Some((path, fault)) = scan.forbidden {
            let path = message::one_line(&path.to_string_lossy(), 200);
            let what = format!("{path} {fault}");
            return Err(RepositoryError::Tampered { what });
        }
        stage.take_all(scan.paths)?;
        for path in &scan.unreadable {
            stage.leave_out(path, None, "it could not be read");
        }
        for path in &scan.submodules {
            stage.leave_out_submodule(path, &self.path);
        }
        for (slot, stat) in scan.same {
            let name = index.name(slot).to_vec();
            let known = Entry {
                stat,
                ..*index.entry(slot)
            };
            stage.changes().entry(name).or_insert(Some(known));
        }
        if let Scope::AllAndWatch(watch) = scope {
            watch.add(stage.left_out(), scan.folders);
        }
        let mut repairs = Vec::new();
        if let Some(damage) = damage {
            tracing::warn!(%damage, branch = self.branch, "an index is made anew");
            repairs.push(Repair::Index);
        }
        if !index.unsettled().is_empty() {
            let files = index.unsettled().iter();
            let files = files.map(|file| String::from_utf8_lossy(file).into_owned());
            repairs.push(Repair::Conflicts {
                files: files.collect(),
            });
        }
        if scan.loosened > 0 {
            repairs.push(Repair::ReadOnly {
                count: scan.loosened,
            });
        }
        Ok(Staged {
            stage,
            index: Some(index),
            repairs,
        })
    }

    pub(super) fn index_file(&self) -> PathBuf {
        self.admin.join("index")
    }

    /// The time by the clock of the file system that the worktree is on.
    pub(super) fn now(&self) -> Result<Moment> {
        const WHAT: &str = "ask the disk for the time";
        let place = self.admin.join("greenroom.now");
        let now = TimeSpec::UTIME_NOW;
        let ask = || -> nix::Result<_> {
            utimensat(
                AT_FDCWD,
                &place,
                &now,
                &now,
                UtimensatFlags::NoFollowSymlink,
            )?;
            lstat(&place)
        };
        let stat = match ask() {
            Err(Errno::ENOENT) => {
                let made = File::options().write(true).create_new(true).open(&place);
                match made {
                    // Somebody else asks as well.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    made => drop(made.during(WHAT)?),
                }
                ask()
            }
            asked => asked,
        };
        let stat = stat.map_err(io::Error::from).during(WHAT)?;
        Ok((stat.st_mtime as u32, stat.st_mtime_nsec as u32))
    }

    /// Brings the index on disk to this tree. Where that does not come about the next commit does
    /// it.
    pub(super) fn write_index(
        &self,
        index: &Index,
        tree: Oid,
        changes: &BTreeMap<Vec<u8>, Option<Entry>>,
    ) {
        let file = self.index_file();
        let written = (0..INDEX_TRIES).find_map(|_| match index.write(&file, tree, changes) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                std::thread::sleep(INDEX_PAUSE);
                None
            }
            written => Some(written),
        });
        let written = written.unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()));
        if let Err(error) = written {
            tracing::warn!(%error, branch = self.branch, "the index could not be written");
        }
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
        let kept = self.kept.take();
        let is_kept = kept.is_some();
        let repo = match kept {
            Some(repo) => repo,
            None => self.read()?,
        };
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        let read = match in_tree(&tree, Path::new(path))? {
            Some((id, mode)) if mode != LINK_MODE => {
                let blob = repo.find_blob(id).during("read a committed file")?;
                let content = blob.content();
                Some(content[..content.len().min(max_bytes)].to_vec())
            }
            _ => None,
        };
        drop(tree);
        if is_kept {
            self.kept.put(repo);
        }
        Ok(read)
    }

    /// Writes the committed files into `to`, an empty or missing folder.
    pub fn export(&self, to: &Path) -> Result<()> {
        let repo = self.read()?;
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        fs::create_dir_all(to).during("make the folder for a copy")?;
        checkout::fill(&repo, &tree, to).map(drop)
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
        let opened = self.put_right(Strangers::Keep, fence, None)?;
        if self.mend_index(&opened.repo, opened.head)? {
            tracing::warn!(branch = self.branch, "an index was damaged; made anew");
        }
        self.kept.put(opened.repo);
        Ok(())
    }

    /// Ensures a worktree that is there and as we left it, which takes a look; answers its commit. `None`
    /// for any other.
    pub(super) fn ensure_as_left(&self) -> Result<Option<Oid>> {
        let Some(opened) = self.open_if_right()? else {
            return Ok(None);
        };
        self.mend_index(&opened.repo, opened.head)?;
        self.kept.put(opened.repo);
        Ok(Some(opened.head))
    }

    /// First checkout, under another name until it is whole: a half made worktree would look
    /// like one in which somebody deleted files.
    pub(super) fn check_out(&self) -> Result<()> {
        let partial = self.clear_partial()?;
        // Whatever index there is belongs to files that are gone.
        files::remove_all(&self.admin.join("index")).during("remove the old index")?;
        let in_progress = Self {
            path: partial.clone(),
            ..self.clone()
        };
        let (index, tree) = match in_progress.move_in() {
            Ok(Some(done)) => done,
            unusable => {
                if let Err(error) = unusable {
                    tracing::warn!(%error, "what was kept ready is of no use; writing all files");
                }
                files::remove_all(&partial).during("remove what was kept ready")?;
                self.make_folder(&partial)
                    .during("make the worktree's folder")?;
                let repo = in_progress.open()?;
                let tree = in_progress.tree(&repo, in_progress.tip(&repo)?)?;
                (checkout::fill(&repo, &tree, &partial)?, tree.id())
            }
        };
        in_progress.write_index(&index, tree, &BTreeMap::new());
        fs::rename(&partial, &self.path).during("put the worktree in place")
    }

    /// Where its files are written until they are whole.
    pub(super) fn partial(&self) -> PathBuf {
        let mut hidden = OsStr::new(".").to_owned();
        hidden.push(self.name());
        hidden.push(".partial");
        self.path.with_file_name(hidden)
    }

    /// Nothing is there after this, and what it lies in is.
    fn clear_partial(&self) -> Result<PathBuf> {
        let partial = self.partial();
        files::remove_all(&partial).during("remove the leftovers of an earlier attempt")?;
        if let Some(threads) = partial.parent() {
            fs::create_dir_all(threads).during("make the folder of the threads")?;
        }
        Ok(partial)
    }

    /// An empty folder there, for whom the worktree is.
    pub(super) fn begin_partial(&self) -> Result<PathBuf> {
        let partial = self.clear_partial()?;
        self.make_folder(&partial)
            .during("make the worktree's folder")?;
        Ok(partial)
    }

    /// Closed to others where it is for somebody; then what is written into it is for him too.
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)?;
        let Some(owner) = self.owner else {
            return Ok(());
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        owner.take(path)
    }

    /// Makes the files of those that were kept ready, if there are any that are of use; and their
    /// index and the tree that it is of.
    fn move_in(&self) -> Result<Option<(Index, Oid)>> {
        if self.owner.is_some() {
            // They are ours, and so would the worktree be.
            return Ok(None);
        }
        let taken = Spare::of(self.git.path()).take(&self.path);
        let Some(taken) = taken.during("take what was kept ready")? else {
            return Ok(None);
        };
        let repo = self.open()?;
        let tree = self.tree(&repo, self.tip(&repo)?)?;
        let index = taken.renew(&repo, &tree, &self.path)?;
        Ok(index.map(|index| (index, tree.id())))
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
    pub(super) fn name(&self) -> &OsStr {
        self.path
            .file_name()
            .expect("a worktree's path ends in its thread's id")
    }

    /// Makes the index agree with the branch's commit: it is behind after a crash, and missing
    /// after the loss of the worktree's entry. Says whether it was damaged.
    pub(super) fn mend_index(&self, repo: &Repository, head: Oid) -> Result<bool> {
        let tree = self.tree(repo, head)?;
        let (index, damage) =
            Index::load(&self.index_file(), repo, &tree).during("read the index")?;
        if damage.is_some() || !index.is_of(tree.id()) {
            self.write_index(&index, tree.id(), &BTreeMap::new());
        }
        Ok(damage.is_some())
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
        let [_, entry @ ..] = self.links();
        let put = task::side_by_side(&entry, |(file, content)| files::put(file, content));
        put.into_iter()
            .collect::<io::Result<()>>()
            .during("link the worktree")
    }

    /// The files that link worktree and git directory, the worktree's own first, and what they hold.
    pub(super) fn links(&self) -> [(PathBuf, Vec<u8>); 5] {
        // Relative, so that it survives a move of the workspace.
        let way = files::relative(&self.path, &self.admin);
        let link = [b"gitdir: ", way.as_os_str().as_bytes(), b"\n"].concat();
        let head = format!("ref: refs/heads/{}\n", self.branch);
        // Absolute, because the git program would prune a relative one; so it is written anew
        // wherever the workspace is mounted.
        let back = [self.path.join(".git").as_os_str().as_bytes(), b"\n"].concat();
        [
            (self.path.join(".git"), link),
            (self.admin.join("commondir"), b"../..\n".to_vec()),
            (self.admin.join("HEAD"), head.into_bytes()),
            (self.admin.join("gitdir"), back),
            (self.admin.join("locked"), b"kept by greenroom\n".to_vec()),
        ]
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
        let [(link, content), ..] = self.links();
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
}

/// What was seen of a worktree before a commit of it began.
#[derive(Default)]
pub(super) struct Known {
    pub(super) index: Option<Result<Index, Damaged>>,
    /// By that index, and watched since where that is wanted.
    pub(super) ahead: Option<Unfinished>,
}

/// What [`Worktree::stage`] found.
pub(super) struct Staged<'a> {
    pub(super) stage: Stage<'a>,
    /// Of the commit's tree, if it was needed.
    pub(super) index: Option<Index>,
    pub(super) repairs: Vec<Repair>,
}

/// Makes a commit that no branch has yet.
pub(super) fn write_commit(
    repo: &Repository,
    tree: Oid,
    parents: &[Oid],
    text: &CommitText<'_>,
) -> Result<Oid> {
    let message = message::compose(text.instruction, text.trailers);
    let author = message::signature(text.author).during("commit")?;
    let committer = message::signature(text.committer).during("commit")?;
    let mut new = NewObjects::of(repo);
    let content = commit_text(tree, parents, &author, &committer, &message);
    let id = new.add(ObjectType::Commit, content)?;
    new.write()?;
    Ok(id)
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
