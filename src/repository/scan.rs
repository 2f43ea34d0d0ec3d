//! Finds every file of a worktree that is another than the index says: each file's stat is compared,
//! in parallel, and where it does not vouch for the content that is read.
//!
//! No symlink is followed: folders are opened one from the other, so that nothing that runs in the
//! worktree can lead the scan outside by swapping one.

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString, OsStr},
    io,
    ops::Range,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use git2::{ErrorCode, ObjectType, Oid, Repository, Tree};
use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat},
};

use super::{
    Operation as _, Result,
    files::Root,
    gate,
    index::{self, Entry, Index, LINK_MODE, Moment, SUBMODULE_MODE, Stat},
    stage::in_tree,
    vet,
    watch::Changed,
};
use crate::task;

/// Most paths that a scan takes up. A turn that leaves more untracked files than this is
/// installing something, not editing a site.
const MAX_PATHS: usize = 500_000;
/// Most threads that look at files at once, and for how many files each.
const MAX_THREADS: usize = 8;
const FILES_PER_THREAD: usize = 250;
/// The same where the disk is slow: it is waited for, once for each folder.
const SLOW_MAX_THREADS: usize = 24;
const SLOW_FILES_PER_THREAD: usize = 10;

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Files that are others than the index says, or gone, or new; a folder of installed packages
    /// is one path. In order.
    pub(super) paths: Vec<PathBuf>,
    /// Files that are the same, and what vouches for that now.
    pub(super) same: Vec<(usize, Stat)>,
    /// What could not be looked at.
    pub(super) unreadable: Vec<PathBuf>,
    /// Submodules' places in which something lies.
    pub(super) submodules: Vec<PathBuf>,
    /// A file of rules that libgit2 must not be led to, and what is wrong with it. Then little else
    /// was looked at.
    pub(super) forbidden: Option<(PathBuf, &'static str)>,
    /// Read-only files and folders that can be written now.
    pub(super) loosened: usize,
    /// Folders that the index does not know and that are not ignored; not those in them.
    pub(super) folders: Vec<PathBuf>,
    /// New files and folders, as far as they are known: whether they are ignored is not.
    new: Vec<(PathBuf, bool)>,
}

/// Compares the worktree at `root` with `index`. `now` tells the file system's time, which is asked
/// before contents are read. No repository is asked.
///
/// # Errors
/// If the worktree cannot be read at all.
pub(super) fn compare(
    root: &Path,
    index: &Index,
    now: &(dyn Fn() -> io::Result<Moment> + Sync),
) -> io::Result<Unfinished> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let above = nix::fcntl::open(root, flags, Mode::empty())?;
    let crew = Crew {
        index,
        now: std::sync::OnceLock::new(),
        ask: now,
        state: Mutex::new(State {
            folders: vec![Folder {
                parent: Arc::new(above),
                name: c".".to_owned(),
                prefix: Vec::new(),
                range: 0..index.len(),
            }],
            busy: 0,
            failed: None,
        }),
        changed: Condvar::new(),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match task::is_disk_slow() {
        true => (index.len() / SLOW_FILES_PER_THREAD).clamp(1, SLOW_MAX_THREADS),
        false => (index.len() / FILES_PER_THREAD).clamp(1, cores.min(MAX_THREADS)),
    };
    let scan = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(|| crew.work())).collect();
        let mut scan = crew.work();
        for other in others {
            match other.join() {
                Ok(found) => scan.add(found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        scan
    });
    if let Some(error) = lock(&crew.state).failed.take() {
        return Err(error);
    }
    Ok(Unfinished(scan))
}

/// What a scan found without a repository: which of the new files are ignored is not known.
pub(super) struct Unfinished(Scan);

impl Unfinished {
    /// Lists what is new and not ignored, by the rules of a repository that was seen to be right.
    pub(super) fn finish(self, root: &Path, repo: &Repository) -> Scan {
        let Self(mut scan) = self;
        scan.list_new(root, repo);
        scan.paths.sort_unstable();
        scan.paths.dedup();
        scan.paths.truncate(MAX_PATHS);
        scan
    }
}

/// Compares only what a watch names with the commit's tree. `None` if that does not do: something has
/// to be made writable first.
pub(super) fn look(
    root: &Path,
    repo: &Repository,
    head: &Tree<'_>,
    mut changed: Changed,
) -> Result<Option<Scan>> {
    const WHAT: &str = "look at the changed files";
    let folder = Root::open(root).during(WHAT)?;
    let mut scan = Scan::default();
    for path in changed.folders {
        list_committed(repo, head, &path, &mut changed.files)?;
        match folder.stat(&path).during(WHAT)? {
            Some(stat) if kind(&stat) == SFlag::S_IFDIR => scan.new.push((path, true)),
            _ => drop(changed.files.insert(path)),
        }
    }
    for path in changed.files {
        let is_committed = in_tree(head, &path)?.is_some();
        let stat = folder.stat(&path).during(WHAT)?;
        if let Some(stat) = &stat
            && kind(stat) == SFlag::S_IFREG
            && stat.st_mode & 0o600 != 0o600
        {
            return Ok(None);
        }
        match stat.as_ref().map(kind) {
            _ if is_committed => scan.paths.push(path),
            Some(SFlag::S_IFREG | SFlag::S_IFLNK) => scan.new.push((path, false)),
            Some(SFlag::S_IFDIR) => scan.new.push((path, true)),
            _ => {}
        }
    }
    scan.list_new(root, repo);
    scan.paths.sort_unstable();
    scan.paths.dedup();
    Ok(Some(scan))
}

/// The files that the commit has at `path` and below.
fn list_committed(
    repo: &Repository,
    head: &Tree<'_>,
    path: &Path,
    files: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    const WHAT: &str = "read the committed tree";
    let entry = match head.get_path(path) {
        Ok(entry) => entry,
        Err(error) if error.code() == ErrorCode::NotFound => return Ok(()),
        Err(error) => return Err(error).during(WHAT),
    };
    let mut open = vec![(path.to_owned(), entry.id(), entry.kind())];
    while let Some((path, id, kind)) = open.pop() {
        match kind {
            Some(ObjectType::Blob) => drop(files.insert(path)),
            Some(ObjectType::Tree) => {
                for entry in &repo.find_tree(id).during(WHAT)? {
                    let path = path.join(OsStr::from_bytes(entry.name_bytes()));
                    open.push((path, entry.id(), entry.kind()));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

impl Scan {
    fn add(&mut self, other: Self) {
        self.paths.extend(other.paths);
        self.same.extend(other.same);
        self.unreadable.extend(other.unreadable);
        self.submodules.extend(other.submodules);
        self.new.extend(other.new);
        self.forbidden = self.forbidden.take().or(other.forbidden);
        self.loosened += other.loosened;
    }

    /// Looks at what may be a file of rules, which libgit2 would read.
    fn look_at_rules(&mut self, folder: &[u8], name: &CStr, stat: &FileStat) {
        let is_rules = vet::is_rules(name.to_bytes()) && kind(stat) != SFlag::S_IFDIR;
        if !is_rules || self.forbidden.is_some() {
            return;
        }
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        let fault = vet::rules_fault(kind(stat) == SFlag::S_IFREG, size);
        let path = path_of(folder).join(OsStr::from_bytes(name.to_bytes()));
        self.forbidden = fault.map(|fault| (path, fault));
    }

    /// Lists the new files that are not ignored, one by one. A repository inside the worktree is a
    /// folder like others.
    fn list_new(&mut self, root: &Path, repo: &Repository) {
        // From here on libgit2 reads what is to be ignored.
        if self.forbidden.is_some() {
            return;
        }
        let mut new = std::mem::take(&mut self.new);
        let folders = new.iter().filter(|(_, is_folder)| *is_folder);
        let folders = folders.map(|(path, _)| path);
        let is_seen = |path: &&PathBuf| !repo.is_path_ignored(path.join("")).unwrap_or(false);
        self.folders = folders.filter(is_seen).cloned().collect();
        while let Some((path, is_folder)) = new.pop() {
            // git takes a path for a folder's by its last character.
            let asked = if is_folder {
                path.join("")
            } else {
                path.clone()
            };
            if self.paths.len() >= MAX_PATHS || repo.is_path_ignored(&asked).unwrap_or(false) {
                continue;
            }
            if let Some(packages) = gate::packages_folder(&path) {
                self.paths.push(packages);
            } else if is_folder {
                match self.list_folder(root, &path) {
                    Ok(_) if self.forbidden.is_some() => return,
                    Ok(found) => new.extend(found),
                    Err(error) if error == Errno::ENOENT || error == Errno::ENOTDIR => {}
                    Err(_) => self.unreadable.push(path),
                }
            } else {
                self.paths.push(path);
            }
        }
    }

    /// What lies in a new folder, with whether it is one itself.
    fn list_folder(&mut self, root: &Path, path: &Path) -> nix::Result<Vec<(PathBuf, bool)>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at = nix::fcntl::open(root, flags, Mode::empty())?;
        let mut steps = path.iter().peekable();
        let mut listed = None;
        while let Some(step) = steps.next() {
            let name = CString::new(step.as_bytes()).map_err(|_| Errno::EINVAL)?;
            if steps.peek().is_some() {
                at = openat(at.as_fd(), name.as_c_str(), flags, Mode::empty())?;
            } else {
                listed = Some(open_folder(at.as_fd(), &name, &mut self.loosened)?);
            }
        }
        let mut listed = listed.ok_or(Errno::EINVAL)?;
        let mut found = Vec::new();
        let folder = listed
            .as_fd()
            .try_clone_to_owned()
            .map_err(|_| Errno::EMFILE)?;
        for entry in listed.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b".." | b".git") {
                continue;
            }
            let Ok(stat) = fstatat(folder.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            self.look_at_rules(path.as_os_str().as_bytes(), name, &stat);
            let kind = kind(&stat);
            if kind == SFlag::S_IFREG {
                loosen_file(folder.as_fd(), name, &stat, &mut self.loosened);
            }
            if matches!(kind, SFlag::S_IFREG | SFlag::S_IFLNK | SFlag::S_IFDIR) {
                let path = path.join(OsStr::from_bytes(name.to_bytes()));
                found.push((path, kind == SFlag::S_IFDIR));
            }
        }
        Ok(found)
    }
}

/// The threads of one scan and what they share.
struct Crew<'a> {
    index: &'a Index,
    now: std::sync::OnceLock<Moment>,
    ask: &'a (dyn Fn() -> io::Result<Moment> + Sync),
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    folders: Vec<Folder>,
    /// Threads that may still find folders.
    busy: usize,
    failed: Option<io::Error>,
}

/// A folder that has files in the index, those of `range`.
struct Folder {
    parent: Arc<OwnedFd>,
    name: CString,
    /// Its path with a `/` at the end; empty for the worktree itself.
    prefix: Vec<u8>,
    range: Range<usize>,
}

/// What the index has in a folder.
enum Known {
    File(usize),
    Folder(Range<usize>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

impl Crew<'_> {
    /// Looks at folders until there are none left.
    fn work(&self) -> Scan {
        let mut scan = Scan::default();
        let mut found = Vec::new();
        loop {
            let folder = {
                let mut state = lock(&self.state);
                loop {
                    if state.failed.is_some() {
                        return scan;
                    }
                    if let Some(folder) = state.folders.pop() {
                        state.busy += 1;
                        break folder;
                    }
                    if state.busy == 0 {
                        return scan;
                    }
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            let looked = self.look_into(&folder, &mut scan, &mut found);
            let mut state = lock(&self.state);
            state.folders.append(&mut found);
            state.busy -= 1;
            if let Err(error) = looked {
                state.failed = Some(error);
            }
            if state.busy == 0 || !state.folders.is_empty() || state.failed.is_some() {
                self.changed.notify_all();
            }
        }
    }

    fn look_into(
        &self,
        folder: &Folder,
        scan: &mut Scan,
        folders: &mut Vec<Folder>,
    ) -> io::Result<()> {
        let opened = open_folder(folder.parent.as_fd(), &folder.name, &mut scan.loosened);
        let mut listing = match opened {
            Ok(listing) => listing,
            // It was a folder a moment ago; the next scan sees what it is now.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) if !folder.prefix.is_empty() => {
                self.all_changed(folder.range.clone(), scan);
                return Ok(());
            }
            // Nothing is known of what is in it, so nothing is said to be gone.
            Err(Errno::EACCES | Errno::EPERM) if !folder.prefix.is_empty() => {
                scan.unreadable
                    .push(path_of(&folder.prefix[..folder.prefix.len() - 1]));
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let known = self.known(folder);
        let mut seen = vec![false; known.len()];
        let own = Arc::new(listing.as_fd().try_clone_to_owned()?);
        for entry in listing.iter() {
            let entry = entry?;
            let name = entry.file_name();
            let bytes = name.to_bytes();
            if matches!(bytes, b"." | b".." | b".git") {
                continue;
            }
            let at = known
                .binary_search_by(|(known, _)| (*known).cmp(bytes))
                .ok();
            let Some(at) = at else {
                let is_folder = match entry.file_type() {
                    Some(kind) => kind == Type::Directory,
                    None => fstatat(own.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW)
                        .is_ok_and(|stat| kind(&stat) == SFlag::S_IFDIR),
                };
                self.is_new(folder, &own, name, is_folder, scan);
                continue;
            };
            let Ok(stat) = fstatat(own.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            scan.look_at_rules(&folder.prefix, name, &stat);
            let is_folder = kind(&stat) == SFlag::S_IFDIR;
            match &known[at].1 {
                Known::Folder(range) if is_folder => {
                    seen[at] = true;
                    folders.push(Folder {
                        parent: own.clone(),
                        name: name.to_owned(),
                        prefix: [&folder.prefix, bytes, b"/"].concat(),
                        range: range.clone(),
                    });
                }
                Known::File(slot) if self.index.entry(*slot).mode == SUBMODULE_MODE => {
                    seen[at] = true;
                    if !is_folder {
                        scan.paths.push(path_of(self.index.name(*slot)));
                    } else if has_files(own.as_fd(), name) {
                        scan.submodules.push(path_of(self.index.name(*slot)));
                    }
                }
                Known::File(slot) if !is_folder => {
                    seen[at] = true;
                    self.compare(*slot, &own, name, stat, scan)?;
                }
                // A folder where a file was, or the reverse: what was there is gone.
                _ => self.is_new(folder, &own, name, is_folder, scan),
            }
        }
        for ((_, known), seen) in known.iter().zip(seen) {
            match known {
                _ if seen => {}
                // A submodule's place need not be there.
                Known::File(slot) if self.index.entry(*slot).mode == SUBMODULE_MODE => {}
                Known::File(slot) => scan.paths.push(path_of(self.index.name(*slot))),
                Known::Folder(range) => self.all_changed(range.clone(), scan),
            }
        }
        Ok(())
    }

    fn all_changed(&self, range: Range<usize>, scan: &mut Scan) {
        let files = range.filter(|slot| self.index.entry(*slot).mode != SUBMODULE_MODE);
        scan.paths
            .extend(files.map(|slot| path_of(self.index.name(slot))));
    }

    /// What the index has in a folder, by name.
    fn known(&self, folder: &Folder) -> Vec<(&[u8], Known)> {
        let mut known = Vec::new();
        let mut at = folder.range.start;
        while at < folder.range.end {
            let rest = &self.index.name(at)[folder.prefix.len()..];
            match rest.iter().position(|&b| b == b'/') {
                None => {
                    known.push((rest, Known::File(at)));
                    at += 1;
                }
                Some(length) => {
                    let inner = &self.index.name(at)[..=folder.prefix.len() + length];
                    let end = self
                        .index
                        .partition(at..folder.range.end, |name| name.starts_with(inner));
                    known.push((&rest[..length], Known::Folder(at..end)));
                    at = end;
                }
            }
        }
        // git's order takes a folder's name with a `/` at its end.
        known.sort_unstable_by_key(|(name, _)| *name);
        known
    }

    fn is_new(
        &self,
        folder: &Folder,
        own: &Arc<OwnedFd>,
        name: &CStr,
        is_folder: bool,
        scan: &mut Scan,
    ) {
        let mut is_file = is_folder;
        if !is_folder && let Ok(stat) = fstatat(own.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            scan.look_at_rules(&folder.prefix, name, &stat);
            // git knows no pipes, sockets and devices.
            is_file = matches!(kind(&stat), SFlag::S_IFREG | SFlag::S_IFLNK);
            if kind(&stat) == SFlag::S_IFREG {
                loosen_file(own.as_fd(), name, &stat, &mut scan.loosened);
            }
        }
        if is_file {
            let path = [&folder.prefix, name.to_bytes()].concat();
            scan.new.push((path_of(&path), is_folder));
        }
    }

    /// Compares a file with its entry.
    fn compare(
        &self,
        slot: usize,
        folder: &OwnedFd,
        name: &CStr,
        stat: FileStat,
        scan: &mut Scan,
    ) -> io::Result<()> {
        let stat = match kind(&stat) == SFlag::S_IFREG {
            true => loosen_file(folder.as_fd(), name, &stat, &mut scan.loosened).unwrap_or(stat),
            false => stat,
        };
        let entry = self.index.entry(slot);
        let is_same_kind = mode_of(&stat) == Some(entry.mode);
        if is_same_kind && self.index.vouches(slot, &Stat::of(&stat)) {
            return Ok(());
        }
        // No commit has a larger file, and an index keeps only the lower half of its size.
        let may_be_same = is_same_kind
            && stat.st_size <= vet::MAX_FILE_BYTES as i64
            && (entry.stat == Stat::NONE || entry.stat.size() == Stat::of(&stat).size());
        let now = match self.now.get() {
            Some(now) => *now,
            None if may_be_same => {
                let now = (self.ask)()?;
                *self.now.get_or_init(|| now)
            }
            None => (0, 0),
        };
        let read = may_be_same
            .then(|| hash(folder.as_fd(), name, entry))
            .flatten();
        match read {
            Some((id, stat)) if id == entry.id => {
                if stat.is_settled(now) {
                    scan.same.push((slot, stat));
                }
            }
            _ => scan.paths.push(path_of(self.index.name(slot))),
        }
        Ok(())
    }
}

/// Opens a folder to list it, also one that nobody may enter, if it is ours.
fn open_folder(parent: BorrowedFd<'_>, name: &CStr, loosened: &mut usize) -> nix::Result<Dir> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let folder = match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            loosen(parent, name, 0o700)?;
            *loosened += 1;
            openat(parent, name, flags, Mode::empty())?
        }
        opened => opened?,
    };
    let stat = fstat(&folder)?;
    if stat.st_mode & 0o700 != 0o700
        && nix::sys::stat::fchmod(&folder, permissions(&stat) | Mode::S_IRWXU).is_ok()
    {
        *loosened += 1;
    }
    Dir::from_fd(folder)
}

/// Makes a file of ours readable and writable for us; its stat after that.
fn loosen_file(
    folder: BorrowedFd<'_>,
    name: &CStr,
    stat: &FileStat,
    loosened: &mut usize,
) -> Option<FileStat> {
    if stat.st_mode & 0o600 == 0o600 {
        return None;
    }
    loosen(folder, name, stat.st_mode & 0o7777 | 0o600).ok()?;
    *loosened += 1;
    fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()
}

fn loosen(folder: BorrowedFd<'_>, name: &CStr, mode: u32) -> nix::Result<()> {
    let mode = Mode::from_bits_truncate(mode);
    fchmodat(folder, name, mode, FchmodatFlags::NoFollowSymlink)
}

fn permissions(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

/// The mode that git has for such a file; `None`: it has none.
fn mode_of(stat: &FileStat) -> Option<u32> {
    match kind(stat) {
        SFlag::S_IFLNK => Some(LINK_MODE),
        SFlag::S_IFREG if stat.st_mode & 0o100 != 0 => Some(0o100_755),
        SFlag::S_IFREG => Some(0o100_644),
        _ => None,
    }
}

/// The id of the content that a file or symlink has now, and its stat from before that was read.
fn hash(folder: BorrowedFd<'_>, name: &CStr, entry: &Entry) -> Option<(Oid, Stat)> {
    if entry.mode == LINK_MODE {
        let stat = fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        let target = readlinkat(folder, name).ok()?.into_vec();
        let id = index::hash(target.len() as u64, target.as_slice()).ok()?;
        return Some((id, Stat::of(&stat)));
    }
    // O_NONBLOCK: should it be a pipe by now, opening must not wait for a writer.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(folder, name, flags, Mode::empty()).ok()?;
    let stat = fstat(&file).ok()?;
    if mode_of(&stat) != Some(entry.mode) {
        return None;
    }
    let size = u64::try_from(stat.st_size).ok()?;
    let content = io::Read::take(std::fs::File::from(file), size);
    Some((index::hash(size, content).ok()?, Stat::of(&stat)))
}

fn has_files(folder: BorrowedFd<'_>, name: &CStr) -> bool {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(mut listing) = Dir::openat(folder, name, flags, Mode::empty()) else {
        return false;
    };
    listing
        .iter()
        .flatten()
        .any(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".." | b".git"))
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}
