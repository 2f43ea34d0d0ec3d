//! The guard before and after every turn: what a person, an agent or a crash did to git's own
//! state of a worktree is put right without loss, or refused.
//!
//! Files in the worktree are never touched for it: whatever they hold is committed to the thread's
//! branch. Commits that would fall off every branch get a name below `refs/greenroom/rescued/`,
//! and the papers of an operation that was under way are set aside in the worktree's entry.
//!
//! Where the branch belongs is known from a ref of our own, `refs/greenroom/heads/{branch}`, which
//! moves right before the branch with every commit of ours. It also keeps those commits from
//! being swept, whatever becomes of the branch and its log.

use std::{
    collections::BTreeSet,
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use git2::{ErrorCode, Oid, ReferenceType, Repository};

use super::{
    Operation as _, RepositoryError, Result,
    commit::Opened,
    files::{self, Found, Root},
    gitdir,
    index::{Damaged, Index, Moment},
    look::{Look, Memory, Wanted},
    refs,
    scan::{self, Unfinished},
    vet,
    watch::Watch,
    worktree::Worktree,
};
use crate::lease::Fence;

/// Something that was put right. Its text is a sentence for the person whose site it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// A merge, rebase or the like was under way.
    Operation { what: &'static str },
    /// HEAD was on a commit instead of the thread's branch.
    Detached,
    /// HEAD was on another branch.
    OtherBranch { branch: String },
    /// The branch was gone, or could not be read.
    BranchGone,
    /// The branch did not hold the commits any more that greenroom had made.
    Rewritten,
    /// Others committed on the branch while a turn ran.
    Folded,
    /// A dead process had left a lock.
    Lock,
    /// git's index could not be read.
    Index,
    /// The worktree's folder was gone; the one there now is new.
    Folder,
    /// git had forgotten the worktree.
    Entry,
    /// Files or folders of the site could not be read or written by their owner.
    ReadOnly { count: usize },
    /// The index held an unsettled merge of these files.
    Conflicts { files: Vec<String> },
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operation { what } => write!(
                f,
                "{what} was under way in the site's repository; it was ended, and the files \
                 stayed as they were."
            ),
            Self::Detached => write!(
                f,
                "The worktree stood on a commit instead of its branch; it is on its branch again, \
                 and the files stayed as they were."
            ),
            Self::OtherBranch { branch } => write!(
                f,
                "The worktree had been switched to the branch {branch}; it is on its own branch \
                 again, and the files stayed as they were."
            ),
            Self::BranchGone => write!(
                f,
                "The thread's branch was gone; it is back, with all of its commits."
            ),
            Self::Rewritten => write!(
                f,
                "The history of the thread's branch had been rewritten; it is back, the other \
                 commits are kept below refs/greenroom/rescued, and the files stayed as they were."
            ),
            Self::Folded => write!(
                f,
                "Commits were made on the thread's branch during the turn; what they changed is \
                 in the turn's commit, and they are kept below refs/greenroom/rescued."
            ),
            Self::Lock => write!(
                f,
                "A lock that a dead git command had left behind was removed."
            ),
            Self::Index => write!(f, "git's index was damaged; it was made anew."),
            Self::Folder => write!(
                f,
                "The site's folder was gone; it was checked out again from the last commit."
            ),
            Self::Entry => write!(
                f,
                "git had forgotten the site's worktree; it knows it again, and the files stayed \
                 as they were."
            ),
            Self::ReadOnly { count } => write!(
                f,
                "{count} of the site's files or folders were read-only or locked; they can be \
                 read and written again."
            ),
            Self::Conflicts { files } => write!(
                f,
                "A merge had been left unsettled in {}; committed as the files stand, look for \
                 lines like <<<<<<<.",
                list(files)
            ),
        }
    }
}

/// At most five names.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    super::message::one_line(&text, 500)
}

/// What becomes of commits on the thread's branch that greenroom did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strangers {
    /// They stay, if they build on ours: a person made them between turns.
    Keep,
    /// The branch goes back to where it was at the turn's start: one turn is one commit.
    Fold,
}

/// Names of a worktree's entry that tell of an operation under way.
const OPERATIONS: [(&str, &str); 7] = [
    ("rebase-merge", "A rebase"),
    ("rebase-apply", "A rebase"),
    ("CHERRY_PICK_HEAD", "A cherry-pick"),
    ("REVERT_HEAD", "A revert"),
    ("sequencer", "A cherry-pick"),
    ("MERGE_HEAD", "A merge"),
    ("BISECT_LOG", "A bisection"),
];

/// What else such an operation leaves there.
const PAPERS: [&str; 11] = [
    "REBASE_HEAD",
    "AUTO_MERGE",
    "MERGE_MODE",
    "MERGE_MSG",
    "MERGE_RR",
    "SQUASH_MSG",
    "BISECT_START",
    "BISECT_NAMES",
    "BISECT_TERMS",
    "BISECT_EXPECTED_REV",
    "BISECT_ANCESTORS_OK",
];

/// Files that name commits which may be on no branch.
const NAMING: [&str; 10] = [
    "HEAD",
    "MERGE_HEAD",
    "CHERRY_PICK_HEAD",
    "REVERT_HEAD",
    "REBASE_HEAD",
    "rebase-merge/orig-head",
    "rebase-merge/onto",
    "rebase-merge/autostash",
    "rebase-apply/orig-head",
    "rebase-apply/autostash",
];

/// Largest of those files that is read, in bytes.
const MAX_PAPER: u64 = 64 << 10;

/// What was seen in one go.
struct Sight {
    look: Look,
    now: Option<Moment>,
    index: Option<Result<Index, Damaged>>,
    ahead: Option<Unfinished>,
}

impl Worktree {
    /// Brings the thread's branch and the worktree's entry, link and HEAD into a state from
    /// which a commit can be made, and opens it. With `watch` the files are looked at meanwhile, and watched
    /// from then on; what comes of that counts only where there was nothing to be put right.
    ///
    /// # Errors
    /// [`RepositoryError::Locked`] if a live git command is at work there,
    /// [`RepositoryError::Tampered`] for what cannot be put right, [`RepositoryError::NoSuchBranch`]
    /// if nobody knows the branch.
    pub(super) fn put_right(
        &self,
        strangers: Strangers,
        fence: &Fence,
        watch: Option<&Watch>,
    ) -> Result<Opened> {
        let look = match self.open_as_left(self.look_at_all(watch))? {
            Ok(opened) => return Ok(opened),
            Err(look) => look,
        };
        let mut repairs = Vec::new();
        let shared = self.git.open(self.git.project())?;
        self.git.check_entry(&look, &self.admin)?;
        if self.clear_locks()? {
            repairs.push(Repair::Lock);
        }
        let (tip, repair) = self.settle_branch(&shared, strangers, fence)?;
        repairs.extend(repair);

        let had_entry = exists(&self.admin.join("commondir"))?;
        let had_index = exists(&self.admin.join("index"))?;
        let found = Root::open(&self.admin);
        if let Ok(entry) = found {
            self.end_operation(&shared, &entry, tip, &mut repairs)?;
        }
        fence.check()?;
        let is_missing = self.is_missing(strangers)?;
        if is_missing {
            if had_index {
                repairs.push(Repair::Folder);
            }
            self.check_out()?;
        } else if !had_entry {
            repairs.push(Repair::Entry);
        }
        self.put_right_entry()?;
        self.put_right_link()?;
        let repo = self.git.open_worktree(&self.admin, &self.path)?;
        for repair in &repairs {
            tracing::warn!(branch = self.branch, what = ?repair, "put a worktree right");
        }
        Ok(Opened {
            repo,
            head: tip,
            now: None,
            index: None,
            ahead: None,
            is_as_left: false,
            repairs,
        })
    }

    /// Opens the worktree if there is nothing to be put right. Writes nothing.
    pub(super) fn open_if_right(&self) -> Result<Option<Opened>> {
        Ok(self.open_as_left(self.look_at_all(None))?.ok())
    }

    /// Looks, asks the clock and reads the index, all at once: either takes as long.
    fn look_at_all(&self, watch: Option<&Watch>) -> Sight {
        let memory = self.kept.memory();
        let (look, now, index) = std::thread::scope(|scope| {
            let now = scope.spawn(|| self.now().ok());
            let index = scope.spawn(|| {
                let index = Index::read(&self.index_file());
                let ahead = watch.and_then(|watch| self.scan_ahead(watch, index.as_ref().ok()?));
                (index, ahead)
            });
            let look = self.survey(&memory);
            (look, now.join().ok().flatten(), index.join().ok())
        });
        let (index, ahead) = index.unzip();
        let refs = self.git.path().join("refs");
        self.kept.remember(memory.after(&look, &refs, now));
        Sight {
            look,
            now,
            index,
            ahead: ahead.flatten(),
        }
    }

    /// Looks at the files by an index that may not be the commit's, or in a worktree that has to be put
    /// right.
    fn scan_ahead(&self, watch: &Watch, index: &Index) -> Option<Unfinished> {
        watch.begin(&self.path, index);
        scan::compare(&self.path, index, &|| self.now().map_err(io::Error::other)).ok()
    }

    /// All that [`put_right`](Self::put_right) looks at, and nothing that it would write.
    fn survey(&self, memory: &Memory) -> Look {
        let git = self.git.path();
        let (branch, known) = self.references();
        let mut wanted: Vec<_> = memory.references().map(Wanted::Folder).collect();
        // libgit2 and we write to these, so that no folder on the way may lead elsewhere.
        for reference in [&branch, &known] {
            let folders = Path::new(reference).ancestors().skip(1);
            let folders: Vec<_> = folders
                .filter(|folder| folder.starts_with("refs"))
                .collect();
            for folder in folders {
                wanted.push(Wanted::Folder(git.join(folder)));
                if *reference == branch {
                    wanted.push(Wanted::Folder(git.join("logs").join(folder)));
                }
            }
            wanted.push(Wanted::File(git.join(reference)));
        }
        wanted.extend([self.admin.clone(), self.admin.join("logs")].map(Wanted::Folder));
        let linked = self.links();
        wanted.extend(linked.into_iter().map(|(file, _)| Wanted::File(file)));
        wanted.push(Wanted::Kind(self.path.clone()));
        self.git.look(wanted, memory)
    }

    /// Opens the worktree if all stands as we left it, so that there is nothing to be put right:
    /// that is so in front of nearly every turn and after it, and can be seen without a write.
    fn open_as_left(&self, sight: Sight) -> Result<Result<Opened, Look>> {
        let kept = self.kept.take();
        let Some(head) = self.is_as_left(&sight.look) else {
            return Ok(Err(sight.look));
        };
        let repo = match kept {
            Some(repo) => repo,
            None => self.git.open_seen(&self.admin, &self.path)?,
        };
        if repo.find_commit(head).is_err() {
            return Ok(Err(sight.look));
        }
        Ok(Ok(Opened {
            repo,
            head,
            now: sight.now,
            index: sight.index,
            ahead: sight.ahead,
            is_as_left: true,
            repairs: Vec::new(),
        }))
    }

    /// The branch's commit, if everything stands as we left it.
    fn is_as_left(&self, look: &Look) -> Option<Oid> {
        let git = self.git.path();
        let (branch, known) = self.references();
        let is_there = |path: &Path| !matches!(look.kind_of(path), Ok(None));
        let tip = refs::parse(look.content_of(&git.join(&branch))?)?;
        let is_noted = refs::parse(look.content_of(&git.join(&known))?)? == tip;
        let is_locked = self.locks().iter().any(|lock| is_there(lock));
        let is_plain = |path: PathBuf| {
            let kind = look.kind_of(&path);
            matches!(kind, Ok(None))
                || matches!(kind, Ok(Some(kind)) if kind.is_dir() || kind.is_file())
        };
        let logs = git.join("logs");
        let mut ways = Path::new(&branch).ancestors();
        let is_log_plain = ways
            .by_ref()
            .take_while(|way| way.starts_with("refs"))
            .all(|way| is_plain(logs.join(way)))
            // There is no log of a note of ours.
            && !is_there(&logs.join("refs/greenroom"));
        let mut names = look.names_in(&self.admin);
        let is_under_way = names.any(|name| OPERATIONS.iter().any(|(paper, _)| name == *paper));
        let is_linked = (self.links().iter())
            .all(|(file, content)| look.content_of(file) == Some(content.as_slice()));
        let is_folder = matches!(look.kind_of(&self.path), Ok(Some(kind)) if kind.is_dir());
        let is_as_left = is_noted
            && !is_locked
            && is_log_plain
            && !is_under_way
            && is_linked
            && is_folder
            && self.git.check_entry(look, &self.admin).is_ok()
            && self.git.is_right(look);
        is_as_left.then_some(tip)
    }

    /// Puts the branch where greenroom left it, or takes over where others put it.
    pub(super) fn settle_branch(
        &self,
        repo: &Repository,
        strangers: Strangers,
        fence: &Fence,
    ) -> Result<(Oid, Option<Repair>)> {
        self.git.check_branch(&self.branch)?;
        let branch = format!("refs/heads/{}", self.branch);
        let tip = read_ref(repo, &branch);
        let known = read_ref(repo, &self.known()).ok().flatten();
        // One that leads to another branch would move with that, and never by itself.
        let is_symbolic = repo
            .find_reference(&branch)
            .is_ok_and(|found| found.kind() == Some(ReferenceType::Symbolic));
        let descends = |a, b| repo.graph_descendant_of(a, b).unwrap_or(false);
        let (tip, known) = match (tip, known) {
            (Ok(Some(tip)), Some(known)) if tip == known && !is_symbolic => {
                return Ok((tip, None));
            }
            (Ok(Some(tip)), None) => {
                fence.check()?;
                self.remember(repo, tip)?;
                if is_symbolic {
                    make_ref(repo, &branch, tip)?;
                }
                return Ok((tip, None));
            }
            (Ok(Some(tip)), Some(known)) => (tip, known),
            (Ok(None), None) => {
                return Err(RepositoryError::NoSuchBranch {
                    branch: self.branch.clone(),
                });
            }
            (Err(error), None) => return Err(error).during("read the thread's branch"),
            (gone, Some(known)) => {
                fence.check()?;
                if gone.is_err() {
                    let broken = self.git.path().join(&branch);
                    files::remove_all(&broken).during("remove a broken branch")?;
                }
                make_ref(repo, &branch, known)?;
                return Ok((known, Some(Repair::BranchGone)));
            }
        };
        fence.check()?;
        let is_fit = || vet::check(repo, tip, Some(known)).is_ok();
        if strangers == Strangers::Keep && !is_symbolic && descends(tip, known) && is_fit() {
            self.remember(repo, tip)?;
            return Ok((tip, None));
        }
        if tip != known && !descends(known, tip) {
            self.rescue(repo, tip)?;
        }
        make_ref(repo, &branch, known)?;
        let repair = if strangers == Strangers::Fold && descends(tip, known) {
            Repair::Folded
        } else {
            Repair::Rewritten
        };
        Ok((known, Some(repair)))
    }

    /// The branch, and our note of it, by their full names.
    pub(super) fn references(&self) -> (String, String) {
        (format!("refs/heads/{}", self.branch), self.known())
    }

    /// The ref that says where greenroom left the branch.
    fn known(&self) -> String {
        format!("refs/greenroom/heads/{}", self.branch)
    }

    /// Notes where the branch is, or is about to be. Of a user's branch nothing is noted: people
    /// may do with it what they like.
    pub(super) fn remember(&self, repo: &Repository, head: Oid) -> Result<()> {
        if self.is_main {
            return Ok(());
        }
        make_ref(repo, &self.known(), head)
    }

    /// Gives a commit a name, so that it is never swept.
    fn rescue(&self, repo: &Repository, commit: Oid) -> Result<()> {
        let thread = self.branch.rsplit('/').next().unwrap_or_default();
        make_ref(
            repo,
            &format!("refs/greenroom/rescued/{thread}/{commit}"),
            commit,
        )
    }

    /// Removes the branch. Its commits keep a name if `trunk` does not hold them.
    pub(super) fn remove_branch(&self, repo: &Repository, trunk: Option<Oid>) -> Result<()> {
        self.git.check_branch(&self.branch)?;
        let branch = format!("refs/heads/{}", self.branch);
        if let Ok(Some(tip)) = read_ref(repo, &branch)
            && !trunk.is_some_and(|trunk| is_reachable(repo, trunk, tip))
        {
            self.rescue(repo, tip)?;
        }
        // Ours first: as long as it is there the guard brings the branch back.
        for name in [self.known(), branch] {
            let removed = repo
                .find_reference(&name)
                .and_then(|mut found| found.delete());
            match removed {
                Err(error) if error.code() != ErrorCode::NotFound => {
                    return Err(error).during("remove a branch");
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn locks(&self) -> [PathBuf; 5] {
        let shared = |name: String| self.git.path().join(name);
        [
            self.admin.join("index.lock"),
            self.admin.join("HEAD.lock"),
            shared(format!("refs/heads/{}.lock", self.branch)),
            shared(format!("{}.lock", self.known())),
            shared("packed-refs.lock".into()),
        ]
    }

    fn clear_locks(&self) -> Result<bool> {
        let mut any = false;
        for lock in self.locks() {
            any |= gitdir::clear_lock(&lock, &self.path)?;
        }
        Ok(any)
    }

    /// Notes where HEAD was, rescues the commits that only HEAD or an operation under way knew,
    /// and sets the operation's papers aside.
    fn end_operation(
        &self,
        repo: &Repository,
        entry: &Root,
        tip: Oid,
        repairs: &mut Vec<Repair>,
    ) -> Result<()> {
        let names: BTreeSet<String> = fs::read_dir(&self.admin)
            .during("look at the worktree's entry")?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        let operation = OPERATIONS.iter().find(|(name, _)| names.contains(*name));
        let head = read_paper(entry, "HEAD");
        let head = head.as_deref().map(str::trim);
        let other = head
            .and_then(|head| head.strip_prefix("ref: refs/heads/"))
            .filter(|branch| *branch != self.branch);
        let is_detached = head.is_some_and(|head| Oid::from_str(head).is_ok());
        if operation.is_none() && other.is_none() && !is_detached {
            return Ok(());
        }
        for name in NAMING {
            let named = read_paper(entry, name).unwrap_or_default();
            for commit in named
                .split_whitespace()
                .filter_map(|id| Oid::from_str(id).ok())
            {
                if repo.find_commit(commit).is_ok() && !is_reachable(repo, tip, commit) {
                    self.rescue(repo, commit)?;
                }
            }
        }
        if let Some((_, what)) = operation {
            let aside = self
                .admin
                .join("set-aside")
                .join(uuid::Uuid::now_v7().simple().to_string());
            fs::create_dir_all(&aside).during("set an operation's papers aside")?;
            let papers = OPERATIONS.iter().map(|(name, _)| *name).chain(PAPERS);
            for name in papers.filter(|name| names.contains(*name)) {
                fs::rename(self.admin.join(name), aside.join(name))
                    .during("set an operation's papers aside")?;
            }
            // A rebase or bisection detaches HEAD by itself.
            repairs.push(Repair::Operation { what });
        } else if let Some(branch) = other {
            repairs.push(Repair::OtherBranch {
                branch: super::message::one_line(branch, 200),
            });
        } else {
            repairs.push(Repair::Detached);
        }
        Ok(())
    }

    /// Is there no worktree to speak of? One that is empty but for its link is one in which
    /// everything was deleted; before a turn, one without even that is a loss.
    fn is_missing(&self, strangers: Strangers) -> Result<bool> {
        match files::kind_of(&self.path).during("look at the worktree")? {
            None => Ok(true),
            Some(kind) if !kind.is_dir() => Err(RepositoryError::Tampered {
                what: "the worktree is no folder".into(),
            }),
            Some(_) if strangers == Strangers::Fold => Ok(false),
            Some(_) => files::is_empty_dir(&self.path).during("look at the worktree"),
        }
    }
}

fn exists(path: &Path) -> Result<bool> {
    Ok(files::kind_of(path)
        .during("look at the worktree's entry")?
        .is_some())
}

/// The commit that a ref leads to, if it and the commit are there.
fn read_ref(repo: &Repository, name: &str) -> Result<Option<Oid>, git2::Error> {
    let found = repo
        .find_reference(name)
        .and_then(|reference| reference.peel_to_commit());
    match found {
        Ok(commit) => Ok(Some(commit.id())),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn make_ref(repo: &Repository, name: &str, commit: Oid) -> Result<()> {
    repo.reference(name, commit, true, "greenroom: put right")
        .map(drop)
        .during("move a branch")
}

/// Does the branch, or any ref by itself, lead to this commit?
fn is_reachable(repo: &Repository, tip: Oid, commit: Oid) -> bool {
    if tip == commit || repo.graph_descendant_of(tip, commit).unwrap_or(false) {
        return true;
    }
    repo.references().is_ok_and(|references| {
        references
            .flatten()
            .any(|reference| reference.target() == Some(commit))
    })
}

/// A small text file of the entry; `None` also for what is no regular file.
fn read_paper(entry: &Root, name: &str) -> Option<String> {
    let Ok(Found::File(file, _)) = entry.look(&PathBuf::from(name)) else {
        return None;
    };
    let mut text = String::new();
    file.take(MAX_PAPER).read_to_string(&mut text).ok()?;
    Some(text)
}
