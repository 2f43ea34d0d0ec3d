//! Bringing a worktree from its branch's commit to the next one, so that a kill at any moment
//! loses nothing.
//!
//! Everything that needs disk space is written first, beside the worktree. Then the branch moves:
//! that is the point of no return, and whoever recovers calls [`Worktree::apply`] again. Then each
//! file is put in its place by a rename, and the one that it replaces is looked at once more
//! before it goes: what somebody wrote in that very moment is merged, or stays as it is.
//!
//! New and old change places in one step where the disk can do that. Else the old one gets a second
//! name first, of which the kernel tells whoever watches it. Chokidar, by which dev servers watch,
//! then takes the rename for the same event if it comes within 5 ms, and watches a file that is gone
//! from then on (one of four turns that were undone, measured with Vite 8.3.8).
//!
//! ```text
//! {entry in the git directory}/landing/in/{path}    new content, waiting for its rename
//!                                     /out/{path}   new content, about to change places; then what
//!                                                   stood there, until it was looked at
//! ```
//!
//! **Invariant:** a file of the worktree is replaced or removed only if its content is the one
//! that the branch's earlier commit has; anything else is somebody's edit.

use std::{
    cell::Cell,
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
    thread,
    time::Duration,
};

use git2::{Delta, IndexEntry, ObjectType, Oid, Repository, Tree};

use super::{
    Operation as _, RepositoryError, Result, checkout,
    draft::find_commit,
    files::{self, Found, Root},
    index::{Entry, Index, LINK_MODE, Moment, SUBMODULE_MODE, Stat},
    objects::NewObjects,
    stage::{canonical_mode, raw_entry, write_blob},
    tree,
    worktree::{Worktree, summarise},
};
use crate::{domain::CommitSummary, lease::Fence};

/// A file as git knows it: its content and its mode.
pub(super) type Blob = (Oid, u32);

/// What becomes of one path.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Step {
    pub(super) old: Option<Blob>,
    pub(super) new: Option<Blob>,
}

/// What stands at a path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    Blob(Blob),
    Folder,
    /// A device, pipe or socket.
    Other,
}

/// The paths that differ between two trees.
pub(super) fn steps(
    repo: &Repository,
    before: &Tree<'_>,
    after: &Tree<'_>,
) -> Result<BTreeMap<PathBuf, Step>> {
    let diff = repo
        .diff_tree_to_tree(Some(before), Some(after), None)
        .during("compare two states")?;
    let mut steps = BTreeMap::<PathBuf, Step>::new();
    for delta in diff.deltas() {
        let (old, new) = (delta.old_file(), delta.new_file());
        let blob = |file: &git2::DiffFile<'_>| {
            let mode = u32::from(file.mode());
            let mode = if mode == SUBMODULE_MODE {
                mode
            } else {
                canonical_mode(mode)
            };
            Some((file.id(), mode))
        };
        let path_of = |file: &git2::DiffFile<'_>| {
            PathBuf::from(OsStr::from_bytes(file.path_bytes().unwrap_or_default()))
        };
        // A file that became a symlink is told of twice.
        if delta.status() != Delta::Added {
            steps.entry(path_of(&old)).or_default().old = blob(&old);
        }
        if delta.status() != Delta::Deleted {
            steps.entry(path_of(&new)).or_default().new = blob(&new);
        }
    }
    let is_path = |path: &Path| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_)))
    };
    if let Some(path) = steps.keys().find(|path| !is_path(path)) {
        let what = format!("a commit has a file at {}", path.display());
        return Err(RepositoryError::Tampered { what });
    }
    let is_submodule = |blob: Option<Blob>| blob.is_some_and(|(_, mode)| mode == SUBMODULE_MODE);
    steps.retain(|_, step| !is_submodule(step.old) && !is_submodule(step.new));
    Ok(steps)
}

/// What stands at `path` below `root` now; a content that `step` does not know gets into the
/// repository by that.
pub(super) fn state(repo: &Repository, root: &Root, path: &Path, step: &Step) -> Result<State> {
    let found = root.look(path).during("look at a file")?;
    Ok(match found {
        Found::Nothing => State::Absent,
        Found::Directory => State::Folder,
        Found::Other => State::Other,
        Found::Link(target, _) => {
            State::Blob((repo.blob(&target).during("store a symlink")?, LINK_MODE))
        }
        Found::File(mut file, stat) => {
            let id = content_id(repo, path, &mut file, step)?;
            State::Blob((id, canonical_mode(stat.st_mode)))
        }
    })
}

/// The blob that a file is. Storing one costs a file of its own, so that is left out for contents
/// that are expected.
fn content_id(repo: &Repository, path: &Path, file: &mut File, step: &Step) -> Result<Oid> {
    /// What is larger is not held in memory.
    const MAX_HELD: u64 = 32 << 20;
    let mut read = || -> io::Result<Oid> {
        if file.metadata()?.len() <= MAX_HELD {
            let mut content = Vec::new();
            (&mut *file).take(MAX_HELD).read_to_end(&mut content)?;
            let id = Oid::hash_object(ObjectType::Blob, &content).map_err(io::Error::other)?;
            let mut known = [step.old, step.new].into_iter().flatten();
            if known.any(|(known, _)| known == id) {
                return Ok(id);
            }
            file.rewind()?;
        }
        write_blob(repo, path, file)
    };
    read().during("read a file")
}

impl Worktree {
    /// Makes `commit` (full id), a child of the branch's commit, the branch's next one, and brings
    /// worktree and index to it. Where an earlier call was cut off this one finishes it.
    ///
    /// Edits that came in since the commit was drafted are merged into, or kept as they are: they
    /// are outside edits then, like any others.
    ///
    /// # Errors
    /// [`RepositoryError::HeadMoved`] if the branch is elsewhere: nothing was changed. After any
    /// other error the branch may have moved already; then a further call is needed.
    pub fn apply(&self, commit: &str, fence: &Fence) -> Result<CommitSummary> {
        let repo = self.open()?;
        let commit = find_commit(&repo, commit)?;
        let trees = || -> Result<_, git2::Error> {
            let parent = commit.parent(0)?;
            Ok((parent.id(), parent.tree()?, commit.tree()?))
        };
        let (parent, before, after) = trees().during("read a commit")?;
        let tip = self.tip(&repo)?;
        if tip != parent && tip != commit.id() {
            return Err(RepositoryError::HeadMoved {
                branch: self.branch.clone(),
            });
        }
        let steps = steps(&repo, &before, &after)?;
        let landing = Landing::begin(self, &repo, steps, after.id(), fence)?;
        landing.write_beside(&after)?;
        if tip == parent {
            self.move_branch(&repo, parent, commit.id(), fence)?;
        }
        landing.finish(&after)?;
        summarise(&repo, commit.id())
    }
}

/// Which commits a worktree is on its way between, while it is.
const NOTE: &str = "note";

impl Worktree {
    /// Refuses what [`Worktree::follow`] would refuse.
    pub(super) fn check_following(&self, from: Oid, to: Oid) -> Result<()> {
        let repo = self.open()?;
        let (before, after) = (self.tree(&repo, from)?, self.tree(&repo, to)?);
        self.check_room(&repo, &before, &after)
    }

    /// Brings worktree and index from one commit of the branch to another; `go` moves the branch,
    /// in the midst of it. The worktree must be as `from` has it.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] where something is in the way, and what `go` says: then
    /// nothing was changed. After any other error [`Worktree::finish_following`] is needed.
    pub(super) fn follow(
        &self,
        from: Oid,
        to: Oid,
        fence: &Fence,
        go: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let repo = self.open()?;
        let (before, after) = (self.tree(&repo, from)?, self.tree(&repo, to)?);
        self.check_room(&repo, &before, &after)?;
        let landing = Landing::begin(
            self,
            &repo,
            steps(&repo, &before, &after)?,
            after.id(),
            fence,
        )?;
        landing.write_beside(&after)?;
        let note = format!("{from} {to}\n");
        files::put(&landing.folder.join(NOTE), note.as_bytes()).during("note what is begun")?;
        if let Err(error) = go() {
            landing.end();
            return Err(error);
        }
        landing.finish(&after)
    }

    /// Ends what a [`Worktree::follow`] that was cut off had begun.
    pub(super) fn finish_following(&self, fence: &Fence) -> Result<()> {
        let folder = self.admin.join("landing");
        let Ok(note) = fs::read_to_string(folder.join(NOTE)) else {
            return Ok(());
        };
        let mut ids = note.split_whitespace().map(Oid::from_str);
        let (Some(Ok(from)), Some(Ok(to))) = (ids.next(), ids.next()) else {
            return files::remove_all(&folder).during("remove a damaged note");
        };
        let repo = self.open()?;
        let (before, after) = (self.tree(&repo, from)?, self.tree(&repo, to)?);
        // Where the branch did not move there is nothing to bring here.
        let (steps, tree) = match self.tip(&repo)? == to {
            true => (steps(&repo, &before, &after)?, after.id()),
            false => (BTreeMap::new(), before.id()),
        };
        tracing::warn!(branch = self.branch, "finishing what was cut off");
        let landing = Landing::begin(self, &repo, steps, tree, fence)?;
        landing.write_beside(&after)?;
        landing.finish(&after)
    }
}

/// Between a second name for a file and the rename over it: longer than chokidar takes two events for
/// one.
const PAUSE: Duration = Duration::from_millis(8);
/// Of more files the dev server begins anew, should it have lost one.
const MOST_PAUSES: usize = 25;

struct Landing<'a> {
    repo: &'a Repository,
    steps: BTreeMap<PathBuf, Step>,
    fence: &'a Fence,
    owner: &'a Worktree,
    /// The tree that the worktree is brought to.
    after: Oid,
    worktree: &'a Path,
    root: Root,
    folder: PathBuf,
    incoming: Root,
    outgoing: Root,
    /// Can the disk do that? It is not tried again.
    exchanges: Cell<bool>,
    pauses: Cell<usize>,
}

impl<'a> Landing<'a> {
    fn begin(
        worktree: &'a Worktree,
        repo: &'a Repository,
        steps: BTreeMap<PathBuf, Step>,
        after: Oid,
        fence: &'a Fence,
    ) -> Result<Self> {
        let open = |path: &Path| {
            fs::create_dir_all(path)?;
            Root::open(path)
        };
        let folder = worktree.admin.join("landing");
        let make = || -> io::Result<_> {
            files::remove_all(&folder.join("in"))?;
            Ok((open(&folder.join("in"))?, open(&folder.join("out"))?))
        };
        let (incoming, outgoing) = make().during("make room beside the worktree")?;
        let root = Root::open(worktree.path()).during("open the worktree")?;
        Ok(Self {
            repo,
            steps,
            fence,
            owner: worktree,
            after,
            worktree: worktree.path(),
            incoming: incoming.making_for(&root),
            root,
            folder,
            outgoing,
            exchanges: Cell::new(true),
            pauses: Cell::new(0),
        })
    }

    fn write_beside(&self, after: &Tree<'_>) -> Result<()> {
        let written = self.steps.iter().filter(|(_, step)| step.new.is_some());
        let paths: Vec<_> = written.map(|(path, _)| path).collect();
        self.fill(after, &paths)
            .during("write files beside the worktree")
    }

    /// Writes these files of a tree beside the worktree, for the worktree's owner.
    fn fill(&self, tree: &Tree<'_>, paths: &[&PathBuf]) -> Result<(), git2::Error> {
        let folder = self.folder.join("in");
        checkout::fill_some(self.repo, tree, paths.iter().copied(), &folder)?;
        let given = paths.iter().try_for_each(|path| self.incoming.give(path));
        given.map_err(|error| git2::Error::from_str(&error.to_string()))
    }

    /// libgit2 writes no file where HEAD has a folder, wherever it is asked to write it. It does once
    /// the branch has moved.
    fn write_missing(&self, after: &Tree<'_>) -> Result<()> {
        let mut missing = Vec::new();
        for (path, step) in &self.steps {
            let written = self.incoming.look(path).during("look at a new file")?;
            if step.new.is_some() && matches!(written, Found::Nothing) {
                missing.push(path.clone());
            }
        }
        self.fill(after, &missing.iter().collect::<Vec<_>>())
            .during("write files beside the worktree")
    }

    fn finish(self, after: &Tree<'_>) -> Result<()> {
        self.write_missing(after)?;
        self.land()?;
        self.write_index();
        self.end();
        Ok(())
    }

    fn land(&self) -> Result<()> {
        // What a cut-off try had taken out and not yet looked at.
        for (path, step) in &self.steps {
            if let Some(old) = step.old {
                self.settle(path, old)?;
            }
        }
        // Removals first: a file may have to make room for a folder, and the reverse. The last
        // one first, so that folders are empty when their turn comes.
        for (path, step) in self.steps.iter().rev() {
            if let (Some(old), None) = (step.old, step.new) {
                self.fence.check()?;
                self.remove(path, old)?;
            }
        }
        for (path, step) in &self.steps {
            if let Some(new) = step.new {
                self.fence.check()?;
                self.write(path, step.old, new)?;
            }
        }
        Ok(())
    }

    fn state(&self, path: &Path) -> Result<State> {
        state(self.repo, &self.root, path, &self.step(path))
    }

    fn step(&self, path: &Path) -> Step {
        self.steps.get(path).copied().unwrap_or_default()
    }

    fn remove(&self, path: &Path, old: Blob) -> Result<()> {
        if self.state(path)? == State::Blob(old) {
            self.root
                .rename_to(path, &self.outgoing)
                .during("remove a file")?;
            self.settle(path, old)?;
        }
        if self.state(path)? == State::Absent {
            self.root.prune(path).during("remove an empty folder")?;
        }
        Ok(())
    }

    fn write(&self, path: &Path, old: Option<Blob>, new: Blob) -> Result<()> {
        let mut present = self.state(path)?;
        if present == State::Folder && old.is_none() && self.clear_folder(path)? {
            present = State::Absent;
        }
        match (present, old) {
            (State::Blob(present), _) if present == new => Ok(()),
            (State::Absent, None) => match self.incoming.link_to(path, &self.root) {
                // Somebody was quicker, or took the folder away: theirs stays.
                Err(error) if is_somebody(&error) => Ok(()),
                linked => linked.during("put a file in place"),
            },
            (State::Blob(present), Some(old)) if present == old => self.exchange(path, present),
            (State::Blob(present), Some(old)) => {
                match self.merge(path, old, present, new)? {
                    Some(merged) if merged != present => {
                        self.write_one_beside(path, merged)?;
                        self.replace(path, present)
                    }
                    // Theirs has it all, or cannot be brought together with ours.
                    _ => Ok(()),
                }
            }
            (State::Absent | State::Blob(_) | State::Folder | State::Other, _) => Ok(()),
        }
    }

    /// Puts the incoming file, as the step has it, in the place of the present one.
    fn exchange(&self, path: &Path, present: Blob) -> Result<()> {
        const WHAT: &str = "put a file in place";
        let is_free = matches!(self.outgoing.look(path).during(WHAT)?, Found::Nothing);
        if !is_free || !self.exchanges.get() {
            return self.replace(path, present);
        }
        self.incoming.rename_to(path, &self.outgoing).during(WHAT)?;
        match self.root.exchange(path, &self.outgoing) {
            Ok(()) => {}
            // Somebody took it away, which stays so.
            Err(error) if is_somebody(&error) => {
                return self.outgoing.remove(path).during(WHAT);
            }
            Err(_) => {
                self.exchanges.set(false);
                self.outgoing.rename_to(path, &self.incoming).during(WHAT)?;
                return self.replace(path, present);
            }
        }
        let taken = self.outgoing.look(path).during(WHAT)?;
        if !matches!(taken, Found::File(..) | Found::Link(..)) {
            // Somebody put something else there just now, which stays.
            self.root.exchange(path, &self.outgoing).during(WHAT)?;
            return self.outgoing.remove(path).during(WHAT);
        }
        self.settle(path, present)
    }

    /// The same of any content, in two steps.
    fn replace(&self, path: &Path, present: Blob) -> Result<()> {
        match self.root.link_to(path, &self.outgoing) {
            Err(error) if is_somebody(&error) => return Ok(()),
            linked => linked.during("put a file in place")?,
        }
        if self.pauses.get() < MOST_PAUSES {
            self.pauses.set(self.pauses.get() + 1);
            thread::sleep(PAUSE);
        }
        self.incoming
            .rename_to(path, &self.root)
            .during("put a file in place")?;
        self.settle(path, present)
    }

    /// Looks once more at a file that was taken out: if it is still `expected` it goes, else
    /// somebody wrote to it meanwhile, and that comes back.
    fn settle(&self, path: &Path, expected: Blob) -> Result<()> {
        let State::Blob(taken) = state(self.repo, &self.outgoing, path, &self.step(path))? else {
            return Ok(());
        };
        if taken != expected && self.step(path).new == Some(taken) {
            // It was about to change places, or somebody wrote the same.
            return self.outgoing.remove(path).during("remove a new file");
        }
        let present = self.state(path)?;
        if taken != expected && present != State::Blob(taken) {
            tracing::warn!("a file was edited while it was replaced; the edit is kept");
            let merged = match present {
                State::Blob(present) => self.merge(path, expected, taken, present)?,
                _ => None,
            };
            match merged {
                Some(merged) => {
                    self.write_one_beside(path, merged)?;
                    self.incoming
                        .rename_to(path, &self.root)
                        .during("put a merged file in place")?;
                }
                None => {
                    let back = self.outgoing.rename_to(path, &self.root);
                    return back.during("put an edited file back");
                }
            }
        }
        self.outgoing.remove(path).during("remove an old file")
    }

    /// Two versions of a file that come from a third, in one; `None` if they do not fit.
    fn merge(&self, path: &Path, from: Blob, ours: Blob, theirs: Blob) -> Result<Option<Blob>> {
        if [from, ours, theirs]
            .iter()
            .any(|(_, mode)| *mode == LINK_MODE)
        {
            return Ok(None);
        }
        let entry = |(id, mode): Blob| -> IndexEntry { raw_entry(path, &Entry::blank(id, mode)) };
        let merged =
            self.repo
                .merge_file_from_index(&entry(from), &entry(ours), &entry(theirs), None);
        let merged = merged.during("merge a file")?;
        if !merged.is_automergeable() {
            return Ok(None);
        }
        let id = self.repo.blob(merged.content()).during("merge a file")?;
        Ok(Some((id, canonical_mode(merged.mode()))))
    }

    /// As [`Landing::write_beside`], for a content that is in no commit.
    fn write_one_beside(&self, path: &Path, (id, mode): Blob) -> Result<()> {
        self.incoming.remove(path).during("write a merged file")?;
        let mode = i32::try_from(mode).expect("git's modes have 16 bits");
        let edit = [(path.as_os_str().as_bytes().to_vec(), Some((id, mode)))];
        let mut new = NewObjects::of(self.repo);
        let tree = tree::edit(self.repo, &mut new, None, &edit.into())?;
        new.write()?;
        let write = || -> Result<_, git2::Error> {
            let tree = self.repo.find_tree(tree)?;
            self.fill(&tree, &[&path.to_owned()])
        };
        write().during("write a merged file")
    }

    /// Removes a folder in which there is no file; says whether it is gone.
    fn clear_folder(&self, path: &Path) -> Result<bool> {
        let mut folders = vec![path.to_owned()];
        let mut at = 0;
        while let Some(folder) = folders.get(at).cloned() {
            let entries = fs::read_dir(self.worktree.join(&folder));
            for entry in entries.into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(folder.join(entry.file_name()));
                }
            }
            at += 1;
        }
        for folder in folders.iter().rev() {
            let removed = self.root.remove_empty(folder);
            if !removed.during("remove an empty folder")? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes the index agree with the commit; entries of files that somebody edited meanwhile
    /// claim nothing. An index that cannot be written is mended by the next commit.
    fn write_index(&self) {
        let known = || -> Result<_> {
            let now = self.owner.now()?;
            let steps = self.steps.iter();
            let changes = steps.map(|(path, step)| {
                let entry = step.new.map(|blob| self.entry(path, blob, now));
                (path.as_os_str().as_bytes().to_vec(), entry)
            });
            let tree = self.repo.find_tree(self.after).during("read the tree")?;
            let file = self.owner.admin.join("index");
            let (index, _) = Index::load(&file, self.repo, &tree).during("read the index")?;
            Ok((index, changes.collect::<BTreeMap<_, _>>()))
        };
        match known() {
            Ok((index, changes)) => self.owner.write_index(&index, self.after, &changes),
            Err(error) => tracing::warn!(%error, "the index could not be written"),
        }
    }

    fn entry(&self, path: &Path, (id, mode): Blob, now: Moment) -> Entry {
        let blank = Entry::blank(id, mode);
        let (present, stat) = match self.root.look(path) {
            Ok(Found::File(mut file, stat)) => {
                let present = content_id(self.repo, path, &mut file, &self.step(path)).ok();
                (present, stat)
            }
            Ok(Found::Link(target, stat)) => {
                (Oid::hash_object(ObjectType::Blob, &target).ok(), stat)
            }
            _ => return blank,
        };
        let known = Stat::of(&stat);
        let is_known =
            present == Some(id) && canonical_mode(stat.st_mode) == mode && known.is_settled(now);
        Entry {
            stat: if is_known { known } else { Stat::NONE },
            ..blank
        }
    }

    /// Takes the room beside the worktree away. Best effort, but for what is in no other place.
    fn end(self) {
        let taken_out = self.folder.join("out");
        if holds_files(&taken_out) {
            let aside = format!("taken-out-{}", uuid::Uuid::now_v7().simple());
            tracing::warn!("files that were edited while they were replaced are put aside");
            fs::rename(&taken_out, self.folder.with_file_name(aside)).ok();
        }
        files::remove_all(&self.folder).ok();
    }
}

/// Somebody else put something at the place, or took its folder away.
fn is_somebody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
    )
}

fn holds_files(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        !is_folder || holds_files(&entry.path())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::tests::{Place, write};

    /// A file of one turn that is about to be taken back, and the blobs before and after it.
    fn about_to_land(site: &crate::repository::tests::Site) -> (String, BTreeMap<PathBuf, Step>) {
        let page = site.dir.join("page.md");
        write(&page, "old\n2\n3\n4\n5\n6\nend\n");
        write(site.dir.join("other.md"), "other\n");
        site.commit("Before");
        write(&page, "new\n2\n3\n4\n5\n6\nend\n");
        write(site.dir.join("came.md"), "came\n");
        let turn = site.commit("Turn").commit.unwrap().id;
        let base = site.worktree.committed().unwrap();
        let draft = site.worktree.draft_without(&base, &turn).unwrap();
        let commit = site.write(&draft);
        let repo = site.worktree.open().unwrap();
        let tree = |id: &str| {
            repo.find_commit(id.parse().unwrap())
                .unwrap()
                .tree()
                .unwrap()
        };
        let steps = steps(&repo, &tree(&turn), &tree(&commit)).unwrap();
        (commit, steps)
    }

    /// All that is on the disk and on the branch before the first file is put in its place.
    fn begun<'a>(
        site: &'a crate::repository::tests::Site,
        repo: &'a Repository,
        (commit, steps): (&str, BTreeMap<PathBuf, Step>),
        fence: &'a Fence,
    ) -> Landing<'a> {
        let after = repo.find_commit(commit.parse().unwrap()).unwrap();
        let landing = Landing::begin(&site.worktree, repo, steps, after.tree_id(), fence).unwrap();
        landing.write_beside(&after.tree().unwrap()).unwrap();
        site.worktree
            .move_branch(repo, after.parent_id(0).unwrap(), after.id(), fence)
            .unwrap();
        landing
    }

    /// Someone had the file open and writes to it after it was replaced.
    #[test]
    fn an_edit_of_the_file_that_was_just_taken_out_comes_back() {
        for (edit, expected) in [
            (
                "new\n2\n3\n4\n5\n6\na person's\n",
                "old\n2\n3\n4\n5\n6\na person's\n",
            ),
            ("a person's\n2\n", "a person's\n2\n"),
        ] {
            let place = Place::new();
            let (_, site) = place.thread("alice", "main");
            let (commit, steps) = about_to_land(&site);
            let repo = site.worktree.open().unwrap();
            let fence = Fence::open();
            let landing = begun(&site, &repo, (&commit, steps), &fence);
            let (page, came) = (Path::new("page.md"), Path::new("came.md"));
            landing.root.link_to(page, &landing.outgoing).unwrap();
            landing.incoming.rename_to(page, &landing.root).unwrap();
            landing.root.rename_to(came, &landing.outgoing).unwrap();
            // Killed here; and the writers were not.
            drop(landing);
            let out = site.worktree.admin.join("landing/out");
            fs::write(out.join("page.md"), edit).unwrap();
            fs::write(out.join("came.md"), "came, and was edited\n").unwrap();

            site.worktree.apply(&commit, &fence).unwrap();
            let read = |name: &str| fs::read_to_string(site.dir.join(name)).unwrap();
            assert_eq!(read("page.md"), expected);
            assert_eq!(read("came.md"), "came, and was edited\n");
            assert!(!site.worktree.admin.join("landing").exists());
        }
    }

    /// The new file stands where the old one is to come, and they have not changed places.
    #[test]
    fn what_was_killed_before_files_changed_places_is_finished() {
        for (edit, expected) in [
            (None, "old\n2\n3\n4\n5\n6\nend\n"),
            (
                Some("new\n2\n3\n4\n5\n6\na person's\n"),
                "old\n2\n3\n4\n5\n6\na person's\n",
            ),
            (Some("a person's\n2\n"), "a person's\n2\n"),
        ] {
            let place = Place::new();
            let (_, site) = place.thread("alice", "main");
            let (commit, steps) = about_to_land(&site);
            let repo = site.worktree.open().unwrap();
            let fence = Fence::open();
            let landing = begun(&site, &repo, (&commit, steps), &fence);
            let page = Path::new("page.md");
            landing.incoming.rename_to(page, &landing.outgoing).unwrap();
            drop(landing);
            if let Some(edit) = edit {
                fs::write(site.dir.join(page), edit).unwrap();
            }

            site.worktree.apply(&commit, &fence).unwrap();
            let now = fs::read_to_string(site.dir.join(page)).unwrap();
            assert_eq!(now, expected);
            assert!(!site.worktree.admin.join("landing").exists());
            let admin = fs::read_dir(&site.worktree.admin).unwrap().flatten();
            let aside =
                admin.filter(|entry| entry.file_name().to_string_lossy().starts_with("taken-out"));
            assert_eq!(aside.count(), 0);
        }
    }

    /// Who watches a file hears of it once the new one is in its place, and not before.
    #[test]
    fn a_watched_file_is_said_to_change_once_it_has_changed() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

        let place = Place::new();
        let (_, site) = place.thread("alice", "main");
        let (commit, steps) = about_to_land(&site);
        let repo = site.worktree.open().unwrap();
        let fence = Fence::open();
        let landing = begun(&site, &repo, (&commit, steps), &fence);
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let page = site.dir.join("page.md");
        watch
            .add_watch(&page, AddWatchFlags::IN_ALL_EVENTS)
            .unwrap();
        landing.land().unwrap();
        if !landing.exchanges.get() {
            // This disk can't.
            return;
        }
        let told = watch.read_events().unwrap();
        let first = told
            .iter()
            .find(|event| {
                event.mask.intersects(
                    AddWatchFlags::IN_ATTRIB
                        | AddWatchFlags::IN_MODIFY
                        | AddWatchFlags::IN_MOVE_SELF
                        | AddWatchFlags::IN_DELETE_SELF,
                )
            })
            .unwrap();
        assert_eq!(first.mask, AddWatchFlags::IN_MOVE_SELF, "{told:?}");
    }
}
