//! A commit in the making: what a worktree's changed files become in the tree and in the index, path
//! by path, and what the gate leaves out.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Seek as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use git2::{ErrorCode, IndexEntry, IndexTime, ObjectType, Oid, Repository, Tree};
use nix::sys::stat::FileStat;

use super::{
    Operation as _, Result, diff,
    files::{Found, Root},
    gate::{self, Keeper},
    index::{self, Entry, LINK_MODE, Moment, Stat},
    objects::NewObjects,
    tree, vet,
};
use crate::{
    domain::{FileChange, FileStatus, HeldBack},
    task,
};

/// A file that holds secrets is compared with so many deleted ones, to find out if it was renamed.
const MAX_GONE: usize = 100;
/// Most files of a submodule that are copied aside.
const MAX_INNER: usize = 1_000;

/// The tree's edits and the index's, from the commit that `head` is of.
pub(super) struct Stage<'a> {
    repo: &'a Repository,
    head: &'a Tree<'a>,
    root: Root,
    /// Judge of names: it refuses `.git` in every spelling. libgit2 also asks it how the lines of a
    /// file ended before; the real index would have to be read for that.
    names: git2::Index,
    /// The file system's time before anything was read.
    now: Moment,
    keeper: Keeper<'a>,
    new: NewObjects,
    /// Of folders: may lines of a file there change on the way to git?
    converting: HashMap<PathBuf, bool>,
    /// Every path that was taken up.
    paths: Vec<PathBuf>,
    gone: OnceCell<Vec<Oid>>,
    edits: tree::Edits,
    changes: BTreeMap<Vec<u8>, Option<Entry>>,
    held_back: BTreeMap<PathBuf, String>,
}

impl<'a> Stage<'a> {
    pub(super) fn new(
        repo: &'a Repository,
        head: &'a Tree<'a>,
        folder: &Path,
        now: Moment,
        keeper: Keeper<'a>,
    ) -> Result<Self> {
        let empty = || {
            let mut names = git2::Index::new()?;
            repo.set_index(&mut names)?;
            Ok::<_, git2::Error>(names)
        };
        Ok(Self {
            repo,
            head,
            root: Root::open(folder).during("open the worktree")?,
            names: empty().during("begin a commit")?,
            now,
            keeper,
            new: NewObjects::of(repo),
            converting: HashMap::new(),
            paths: Vec::new(),
            gone: OnceCell::new(),
            edits: BTreeMap::new(),
            changes: BTreeMap::new(),
            held_back: BTreeMap::new(),
        })
    }

    /// Takes up paths as they are in the worktree now; one that was taken up before is so again.
    pub(super) fn take_all(&mut self, paths: Vec<PathBuf>) -> Result<()> {
        self.gone = OnceCell::new();
        let first = self.paths.len();
        self.paths.extend(paths);
        for at in first..self.paths.len() {
            let path = self.paths[at].clone();
            self.take(&path)?;
        }
        Ok(())
    }

    /// The tree as it is by now, with the objects that are new in it: they have to be written before
    /// anything refers to it.
    pub(super) fn tree(&mut self) -> Result<(Oid, NewObjects)> {
        let mut new = std::mem::replace(&mut self.new, NewObjects::of(self.repo));
        if self.edits.is_empty() {
            return Ok((self.head.id(), new));
        }
        let tree = tree::edit(self.repo, &mut new, Some(self.head), &self.edits)?;
        Ok((tree, new))
    }

    /// What differs from the commit, from what is in memory still. `None` where git would look at more
    /// than the contents: attributes that say what text is, files that may have been renamed.
    pub(super) fn summary(&self, new: &NewObjects) -> Result<Option<Vec<FileChange>>> {
        const MOST: usize = 20;
        if self.edits.len() > MOST || self.converting.values().any(|is_there| *is_there) {
            return Ok(None);
        }
        let mut files = Vec::new();
        let (mut added, mut deleted) = (false, false);
        for (name, edit) in &self.edits {
            let path = Path::new(OsStr::from_bytes(name));
            let old = in_tree(self.head, path)?;
            let present = edit.map(|(id, mode)| (id, index::mode_of(mode)));
            let is_link =
                |blob: &Option<(Oid, u32)>| matches!(blob, Some((_, mode)) if *mode == LINK_MODE);
            if is_link(&old) || is_link(&present) {
                return Ok(None);
            }
            let earlier = match old {
                Some((id, _)) => Some(self.repo.find_blob(id).during("read a committed file")?),
                None => None,
            };
            let before = earlier.as_ref().map_or(&[][..], git2::Blob::content);
            let after = match present {
                None => Some(&[][..]),
                Some((id, _)) if old.is_some_and(|(old, _)| old == id) => Some(before),
                Some((id, _)) => new.content(id),
            };
            let (status, Some(after)) = (diff::status_of(old.is_some(), edit.is_some()), after)
            else {
                return Ok(None);
            };
            added |= status == FileStatus::Added;
            deleted |= status == FileStatus::Deleted;
            let change = diff::between(path, status, before, after).during("compare a file")?;
            let Some(change) = change else {
                return Ok(None);
            };
            files.push(change);
        }
        Ok((!added || !deleted).then_some(files))
    }

    /// What the index has to be told.
    pub(super) fn changes(&mut self) -> &mut BTreeMap<Vec<u8>, Option<Entry>> {
        &mut self.changes
    }

    /// What was left out, in order.
    pub(super) fn held_back(&self) -> Vec<HeldBack> {
        let held = self.held_back.iter();
        held.map(|(path, reason)| HeldBack {
            path: path.to_string_lossy().into_owned(),
            reason: reason.clone(),
        })
        .collect()
    }

    /// The paths of the same.
    pub(super) fn left_out(&self) -> impl Iterator<Item = PathBuf> {
        self.held_back.keys().cloned()
    }

    fn take(&mut self, path: &Path) -> Result<()> {
        let key = path.as_os_str().as_bytes().to_vec();
        self.edits.remove(&key);
        self.changes.remove(&key);
        self.held_back.remove(path);
        let committed = in_tree(self.head, path)?;
        if committed.is_none() && gate::packages_folder(path).is_some() {
            // Not copied: there may be a gigabyte of it, and installing brings it back.
            self.leave_out(path, None, "installed packages are not part of the site");
            return Ok(());
        }
        let name_fault = match committed {
            None => gate::judge_name(path),
            Some(_) => None,
        };
        match self.root.look(path) {
            Ok(Found::File(file, stat)) => self.take_file(path, committed, name_fault, file, &stat),
            Ok(Found::Link(target, stat)) => match name_fault {
                Some(reason) => {
                    self.leave_out(path, committed, reason);
                    Ok(())
                }
                None => {
                    let id = self.new.add(ObjectType::Blob, target)?;
                    if self.is_allowed(path, id, LINK_MODE) {
                        self.stage(path, committed, id, &stat);
                    } else {
                        self.leave_out(path, committed, BAD_NAME);
                    }
                    Ok(())
                }
            },
            Ok(Found::Nothing | Found::Directory | Found::Other) => {
                // Not there as a file: what is below a folder has paths of its own.
                self.changes.insert(key.clone(), None);
                if committed.is_some() {
                    self.edits.insert(key, None);
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "a changed file could not be opened");
                self.leave_out(path, committed, "it could not be read");
                Ok(())
            }
        }
    }

    fn take_file(
        &mut self,
        path: &Path,
        committed: Option<(Oid, u32)>,
        name_fault: Option<&str>,
        mut file: File,
        stat: &FileStat,
    ) -> Result<()> {
        if let Some(reason) = name_fault {
            self.hold_back(path, committed, &mut file, reason);
            return Ok(());
        }
        // Read only where it has a say: on a slow disk that takes a while.
        let earlier = || committed.and_then(|(id, _)| self.repo.find_blob(id).ok());
        let limit = gate::MAX_FILE_BYTES;
        if u64::try_from(stat.st_size).unwrap_or(0) > limit
            && earlier().is_none_or(|blob| blob.size() as u64 <= limit)
        {
            self.hold_back(path, committed, &mut file, gate::TOO_LARGE);
            return Ok(());
        }
        // What is judged is what is committed: the file may change any moment.
        let mut content = Vec::new();
        let read = (&mut file).take(limit).read_to_end(&mut content);
        if let Err(error) = read {
            tracing::warn!(%error, "a changed file could not be read");
            self.leave_out(path, committed, "it could not be read");
            return Ok(());
        }
        if gate::judge_content(path, &content, None).is_some()
            && let Some(reason) = self.judge(path, &content, earlier().as_ref())?
        {
            self.hold_back(path, committed, &mut file, &reason);
            return Ok(());
        }
        let is_whole = (content.len() as u64) < limit;
        if is_whole && !self.is_converting(path)? {
            let id = self.new.add(ObjectType::Blob, content)?;
            if self.is_allowed(path, id, mode_of(stat)) {
                self.stage(path, committed, id, stat);
            } else {
                self.hold_back(path, committed, &mut file, BAD_NAME);
            }
            return Ok(());
        }
        if let Some((id, mode)) = committed {
            // So that libgit2 knows how its lines ended.
            self.names
                .add(&raw_entry(path, &Entry::blank(id, mode)))
                .ok();
        }
        // Of a file that has always been larger than is judged, the rest.
        let rest = (&mut file).take(if is_whole { 0 } else { u64::MAX });
        let written = write_blob(self.repo, path, &mut content.as_slice().chain(rest));
        match written {
            Ok(id) if self.is_allowed(path, id, mode_of(stat)) => {
                self.stage(path, committed, id, stat);
            }
            Ok(_) => self.hold_back(path, committed, &mut file, BAD_NAME),
            Err(error) => {
                tracing::warn!(%error, "a changed file could not be stored");
                self.leave_out(path, committed, "it could not be stored");
            }
        }
        Ok(())
    }

    /// Is there, in its folder or above, what may make git change the lines of a file?
    fn is_converting(&mut self, path: &Path) -> Result<bool> {
        let above: Vec<_> = path.ancestors().skip(1).collect();
        let unknown: Vec<_> = above
            .iter()
            .filter(|folder| !self.converting.contains_key(**folder))
            .map(|folder| (folder.to_path_buf(), folder.join(".gitattributes")))
            .collect();
        let there = task::side_by_side(&unknown, |(_, file)| self.root.stat(file));
        for ((folder, file), there) in unknown.into_iter().zip(there) {
            // What cannot be looked at may be there.
            let is_there = there.map_or(true, |stat| stat.is_some());
            let is_there = is_there || in_tree(self.head, &file)?.is_some();
            self.converting.insert(folder, is_there);
        }
        Ok(above.iter().any(|folder| self.converting[*folder]))
    }

    /// Why this content must not be committed, unless the history already holds the like.
    fn judge(
        &self,
        path: &Path,
        content: &[u8],
        earlier: Option<&git2::Blob<'_>>,
    ) -> Result<Option<String>> {
        let fault = gate::judge_content(path, content, earlier.map(git2::Blob::content));
        if fault.is_none() || earlier.is_some() {
            return Ok(fault);
        }
        // Renamed, it brings nothing new.
        let is_moved = self.gone()?.iter().any(|id| {
            self.repo.find_blob(*id).is_ok_and(|gone| {
                gate::judge_content(path, content, Some(gone.content())).is_none()
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
        for path in &self.paths {
            if let Ok(Found::Nothing) = self.root.look(path)
                && let Some((id, _)) = in_tree(self.head, path)?
                && gone.len() < MAX_GONE
            {
                gone.push(id);
            }
        }
        Ok(self.gone.get_or_init(|| gone))
    }

    /// May a file have this path? Content that is not there is no answer for libgit2.
    fn is_allowed(&mut self, path: &Path, id: Oid, mode: u32) -> bool {
        let entry = raw_entry(path, &Entry::blank(id, mode));
        vet::is_allowed(path) && self.names.add(&entry).is_ok()
    }

    fn stage(&mut self, path: &Path, committed: Option<(Oid, u32)>, id: Oid, stat: &FileStat) {
        let mode = mode_of(stat);
        let known = Stat::of(stat);
        let stat = if known.is_settled(self.now) {
            known
        } else {
            Stat::NONE
        };
        let key = path.as_os_str().as_bytes().to_vec();
        self.changes
            .insert(key.clone(), Some(Entry { stat, mode, id }));
        if committed != Some((id, mode)) {
            let mode = i32::try_from(mode).expect("git's modes have 16 bits");
            self.edits.insert(key, Some((id, mode)));
        }
    }

    fn hold_back(
        &mut self,
        path: &Path,
        committed: Option<(Oid, u32)>,
        file: &mut File,
        reason: &str,
    ) {
        let kept = file.rewind().and_then(|()| self.keeper.keep(path, file));
        match kept {
            Ok(()) => self.leave_out(path, committed, reason),
            Err(error) => {
                tracing::warn!(%error, "a held-back file could not be copied aside");
                let reason = format!("{reason} (no copy of it could be kept)");
                self.leave_out(path, committed, &reason);
            }
        }
    }

    /// Reports the path and gives the index what the commit has there.
    pub(super) fn leave_out(&mut self, path: &Path, committed: Option<(Oid, u32)>, reason: &str) {
        let entry = committed.map(|(id, mode)| Entry::blank(id, mode));
        self.changes
            .insert(path.as_os_str().as_bytes().to_vec(), entry);
        self.held_back
            .insert(path.to_owned(), format!("Not committed: {reason}."));
    }

    /// Reports what lies in a submodule's place: the commit has room for a pointer there and for no
    /// file.
    pub(super) fn leave_out_submodule(&mut self, path: &Path, worktree: &Path) {
        let mut folders = vec![path.to_owned()];
        let mut count = 0;
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(worktree.join(folder.clone()));
            for entry in entries.into_iter().flatten().flatten() {
                let inner = folder.join(entry.file_name());
                if entry.file_name() == ".git" || count >= MAX_INNER {
                    continue;
                }
                match self.root.look(&inner) {
                    Ok(Found::Directory) if gate::packages_folder(&inner).is_none() => {
                        folders.push(inner);
                    }
                    Ok(Found::File(mut file, _)) => {
                        count += 1;
                        if let Err(error) = self.keeper.keep(&inner, &mut file) {
                            tracing::warn!(%error, "a file in a submodule could not be copied");
                        }
                    }
                    _ => {}
                }
            }
        }
        let reason = "Not committed: it is a submodule, a repository of its own.";
        self.held_back.insert(path.to_owned(), reason.into());
    }
}

const BAD_NAME: &str = "git does not allow a file of this name";

/// Stores the file as git would for this path (line endings by its attributes).
pub(super) fn write_blob(
    repo: &Repository,
    path: &Path,
    content: &mut impl io::Read,
) -> io::Result<Oid> {
    let mut writer = repo.blob_writer(Some(path)).map_err(io::Error::other)?;
    io::copy(content, &mut writer)?;
    writer.commit().map_err(io::Error::other)
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

fn mode_of(stat: &FileStat) -> u32 {
    canonical_mode(stat.st_mode)
}

/// One of the modes that git knows of.
pub(super) fn canonical_mode(mode: u32) -> u32 {
    match mode {
        mode if mode & 0o170_000 == LINK_MODE => LINK_MODE,
        mode if mode & 0o100 != 0 => 0o100_755,
        _ => 0o100_644,
    }
}

/// An entry as libgit2 takes it.
pub(super) fn raw_entry(path: &Path, entry: &Entry) -> IndexEntry {
    let never = IndexTime::new(0, 0);
    IndexEntry {
        ctime: never,
        mtime: never,
        dev: 0,
        ino: 0,
        mode: entry.mode,
        uid: 0,
        gid: 0,
        file_size: 0,
        id: entry.id,
        flags: 0,
        flags_extended: 0,
        path: path.as_os_str().as_bytes().to_vec(),
    }
}
