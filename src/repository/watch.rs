//! Which files of a worktree changed since a moment, by the kernel's word: a commit costs what changed
//! then, not what exists.
//!
//! A [`Watch`] begins in front of a whole scan, so between the two nothing is missed: what the scan did
//! not see yet is in the kernel's queue. At the end the queue is read, which needs no waiting: the
//! kernel puts an event there before the call that caused it returns (and the one for a mapping
//! when the last process that had it is gone). Whatever casts doubt on the list (the queue ran
//! over, a folder was moved or lost its rights, an ignore file changed) ends the watch, and the
//! whole worktree is looked at again.
//!
//! Not seen: what another machine writes on a shared disk, and a write by another name of the same
//! file, from outside. Both are found by the scan in front of the next turn.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use git2::Oid;
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};

use super::index::{Index, SUBMODULE_MODE};

/// Most folders that are watched. The kernel's share of watches per user is needed by the dev servers
/// too; a site with more is scanned.
const MAX_FOLDERS: usize = 4_000;
/// Most changed paths that are listed; a scan is as quick for more.
const MAX_CHANGED: usize = 2_000;

/// Watches one worktree, from a commit that looks at all of it to the next commit. Cheap to clone; all
/// clones are one.
#[derive(Debug, Clone, Default)]
pub struct Watch(Arc<Mutex<Option<Armed>>>);

/// The kernel's queue, and what its numbers mean.
#[derive(Debug)]
struct Armed {
    root: PathBuf,
    queue: Queue,
    /// Relative to the worktree.
    folders: HashMap<WatchDescriptor, PathBuf>,
    /// What is to be looked at whether it changed or not.
    open: Changed,
    /// The tree of the commit that everything else is as in.
    tree: Oid,
}

/// The kernel takes 10 to 20 ms to close a queue with watches, and nobody has to wait for that.
#[derive(Debug)]
struct Queue(Option<Inotify>);

impl Queue {
    fn kernel(&self) -> &Inotify {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let queue = self.0.take();
        let closer = std::thread::Builder::new().name("watch's end".into());
        // Where there is no thread to be had it is closed here.
        closer.spawn(move || drop(queue)).ok();
    }
}

/// What may have changed.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// Files, or what was one.
    pub(super) files: BTreeSet<PathBuf>,
    /// Folders that came, went, or did both; with all that is in them.
    pub(super) folders: BTreeSet<PathBuf>,
}

impl Watch {
    /// Stops watching.
    pub fn end(&self) {
        *self.lock() = None;
    }

    /// Watches the folders that the index has files in, from now on. Where the kernel refuses there is
    /// no watch, which costs time and nothing else.
    pub(super) fn begin(&self, root: &Path, index: &Index) {
        let armed = Armed::new(root, index);
        if let Err(error) = &armed {
            tracing::debug!(%error, "no watch on a worktree");
        }
        *self.lock() = armed.ok();
    }

    /// Notes what the scan found that the index does not know: what still differs from the commit, and
    /// the new folders.
    pub(super) fn add(&self, open: impl Iterator<Item = PathBuf>, folders: Vec<PathBuf>) {
        if let Some(armed) = &mut *self.lock() {
            armed.open.files.extend(open);
            armed.open.folders.extend(folders);
        }
    }

    /// Notes the tree that was committed: from it the changes are counted.
    pub(super) fn count_from(&self, tree: Oid) {
        if let Some(armed) = &mut *self.lock() {
            armed.tree = tree;
        }
    }

    /// What is not as in `tree`, at most; `None` if that is not known. The watch ends with this.
    pub(super) fn take(&self, tree: Oid) -> Option<Changed> {
        let armed = self.lock().take()?;
        (armed.tree == tree).then(|| armed.read()).flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Armed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Armed {
    fn new(root: &Path, index: &Index) -> nix::Result<Self> {
        let queue = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut armed = Self {
            root: root.to_owned(),
            queue: Queue(Some(queue)),
            folders: HashMap::new(),
            open: Changed::default(),
            tree: Oid::ZERO_SHA1,
        };
        armed.watch(Path::new(""))?;
        let mut last: &[u8] = b"";
        for slot in 0..index.len() {
            // What happens in its folder is not the commit's; the scan reports it.
            if index.entry(slot).mode == SUBMODULE_MODE {
                return Err(Errno::ENOTSUP);
            }
            let name = index.name(slot);
            // Each folder once: files of one folder stand together, but for its subfolders' between.
            let mut at = name.iter().zip(last).take_while(|(a, b)| a == b).count();
            at = name[..at]
                .iter()
                .rposition(|&b| b == b'/')
                .map_or(0, |at| at + 1);
            while let Some(end) = name[at..].iter().position(|&b| b == b'/') {
                match armed.watch(Path::new(OsStr::from_bytes(&name[..at + end]))) {
                    // It is gone; the scan sees that, and its coming back is an event above.
                    Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                    Err(error) => return Err(error),
                }
                at += end + 1;
            }
            last = name;
        }
        Ok(armed)
    }

    fn watch(&mut self, folder: &Path) -> nix::Result<()> {
        if self.folders.len() >= MAX_FOLDERS {
            return Err(Errno::ENOSPC);
        }
        let events = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_ONLYDIR
            | AddWatchFlags::IN_DONT_FOLLOW;
        let number = self
            .queue
            .kernel()
            .add_watch(&self.root.join(folder), events)?;
        self.folders.insert(number, folder.to_owned());
        Ok(())
    }

    /// Empties the queue; `None` if it does not tell all.
    fn read(mut self) -> Option<Changed> {
        let mut changed = std::mem::take(&mut self.open);
        loop {
            let events = match self.queue.kernel().read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Some(changed),
                Err(_) => return None,
            };
            for event in events {
                let mask = event.mask;
                if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    return None;
                }
                let folder = self.folders.get(&event.wd).cloned();
                let Some(name) = event.name else {
                    if mask.contains(AddWatchFlags::IN_IGNORED) {
                        self.folders.remove(&event.wd);
                    }
                    // The worktree itself.
                    if folder.is_some_and(|folder| folder == Path::new(""))
                        || mask.contains(AddWatchFlags::IN_MOVE_SELF)
                    {
                        return None;
                    }
                    continue;
                };
                // A folder that is gone: what happened in it is told by the one above.
                let Some(folder) = folder else { continue };
                let path = folder.join(&name);
                match name.as_bytes() {
                    // Git's own, and what the guard puts right.
                    b".git" => continue,
                    // It says which files count.
                    b".gitignore" | b".gitattributes" => return None,
                    _ => {}
                }
                let is_folder = mask.contains(AddWatchFlags::IN_ISDIR);
                if is_folder && mask.intersects(AddWatchFlags::IN_MOVE | AddWatchFlags::IN_ATTRIB) {
                    return None;
                }
                if is_folder {
                    changed.folders.insert(path);
                } else {
                    changed.files.insert(path);
                }
            }
            if changed.files.len() + changed.folders.len() > MAX_CHANGED {
                return None;
            }
        }
    }
}
