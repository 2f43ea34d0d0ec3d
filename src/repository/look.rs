//! A look at what stands in a git directory, all of it in one go: on a network disk each name by itself
//! would be a wait. What steers git is judged by it, before each use and after every turn.
//!
//! A folder that was listed before is not listed again as long as its stamp stands: nothing comes,
//! goes or becomes something else in a folder without its `ctime`, which the kernel sets and nobody can
//! set back. (What is in a file is another matter: files are read each time.)

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{errno::Errno, fcntl::OFlag};

use super::{files, index::Moment};
use crate::task;

/// Remembered folders that one thread looks at: nearly always the kernel knows their stamps.
const AT_ONCE: usize = 8;

/// What is looked at, by its full path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wanted {
    /// What is in it.
    Folder(PathBuf),
    /// The content of a small regular file.
    File(PathBuf),
    /// What stands there.
    Kind(PathBuf),
}

type Names = BTreeMap<OsString, fs::FileType>;

/// What was in a folder.
#[derive(Debug, Clone, Default)]
struct Listing {
    names: Arc<Names>,
    /// From before it was listed; none where there is no such folder.
    stamp: Option<Stamp>,
}

/// By which every later change of what is in a folder shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    ino: u64,
    ctime: Moment,
    mtime: Moment,
}

impl Stamp {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            ino: found.ino(),
            ctime: (found.ctime() as u32, found.ctime_nsec() as u32),
            mtime: (found.mtime() as u32, found.mtime_nsec() as u32),
        }
    }

    /// Was `then`, a moment of the file system's clock from before the listing, later than the last
    /// change? One more in the same tick of the clock would not show.
    fn is_settled(&self, then: Moment) -> bool {
        self.ctime < then && self.mtime < then
    }
}

/// What is known from earlier looks.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    /// The file system's time when the last look was over, or earlier.
    moment: Option<Moment>,
    listings: BTreeMap<PathBuf, Listing>,
    /// All folders of references, whether they are to be listed again or not.
    references: Vec<PathBuf>,
}

impl Memory {
    /// The folders of references as they were seen last: where to look first.
    pub(super) fn references(&self) -> impl Iterator<Item = PathBuf> {
        self.references.iter().cloned()
    }

    /// What is known after this look too, which began after this memory's own. `now`: the time that was
    /// asked for meanwhile.
    pub(super) fn after(&self, look: &Look, refs: &Path, now: Option<Moment>) -> Self {
        let folders = look.folders.iter();
        let listings = folders.filter_map(|(path, listing)| {
            let listing = listing.as_ref().ok()?;
            let is_settled = listing.stamp?.is_settled(self.moment?);
            is_settled.then(|| (path.clone(), listing.clone()))
        });
        let references = look.folders.keys().filter(|path| path.starts_with(refs));
        Self {
            moment: now.or(self.moment),
            listings: listings.collect(),
            references: references.cloned().collect(),
        }
    }

    /// The folder's listing, if that stands.
    fn recall(&self, folder: &Path) -> Option<Listing> {
        let listing = self.listings.get(folder)?;
        let found = fs::symlink_metadata(folder).ok()?;
        let stands = found.is_dir() && listing.stamp == Some(Stamp::of(&found));
        stands.then(|| listing.clone())
    }
}

/// What was seen.
#[derive(Default)]
pub(super) struct Look {
    /// Empty where there is no such folder.
    folders: BTreeMap<PathBuf, io::Result<Listing>>,
    files: BTreeMap<PathBuf, Option<Vec<u8>>>,
    kinds: BTreeMap<PathBuf, io::Result<Option<fs::FileType>>>,
}

enum Found {
    Folder(io::Result<Listing>),
    File(Option<Vec<u8>>),
    Kind(io::Result<Option<fs::FileType>>),
}

impl Look {
    pub(super) fn take(&mut self, wanted: &[Wanted], memory: &Memory) {
        let is_known = |wanted: &&Wanted| matches!(wanted, Wanted::Folder(path) if memory.listings.contains_key(path));
        let (known, new): (Vec<&Wanted>, Vec<&Wanted>) = wanted.iter().partition(is_known);
        let jobs = new.chunks(1).chain(known.chunks(AT_ONCE));
        let jobs: Vec<_> = jobs.collect();
        let found = task::side_by_side(&jobs, |job| {
            let look = |wanted: &&Wanted| match *wanted {
                Wanted::Folder(path) => {
                    Found::Folder(memory.recall(path).map_or_else(|| list(path), Ok))
                }
                Wanted::File(path) => Found::File(files::read_small(path)),
                Wanted::Kind(path) => Found::Kind(files::kind_of(path)),
            };
            job.iter().map(look).collect::<Vec<_>>()
        });
        let wanted = jobs.into_iter().flatten();
        for (wanted, found) in wanted.zip(found.into_iter().flatten()) {
            match (wanted, found) {
                (Wanted::Folder(path), Found::Folder(listing)) => {
                    self.folders.insert(path.clone(), listing);
                }
                (Wanted::File(path), Found::File(content)) => {
                    self.files.insert(path.clone(), content);
                }
                (Wanted::Kind(path), Found::Kind(kind)) => {
                    self.kinds.insert(path.clone(), kind);
                }
                _ => unreachable!("each is answered by its like"),
            }
        }
    }

    /// The folders that were listed, with what is in them.
    pub(super) fn folders(&self) -> impl Iterator<Item = (&Path, io::Result<&Names>)> {
        let folders = self.folders.iter();
        folders.map(|(path, listing)| {
            let names = listing.as_ref().map(|listing| &*listing.names);
            (path.as_path(), names.map_err(again))
        })
    }

    /// Folders in those from `top` on that were not looked at.
    pub(super) fn unseen_below(&self, top: &Path) -> Vec<PathBuf> {
        let listed = self.folders().filter(|(folder, _)| folder.starts_with(top));
        let below = listed.flat_map(|(folder, names)| {
            let names = names.into_iter().flatten();
            let folders = names.filter(|(_, kind)| kind.is_dir());
            folders.map(|(name, _)| folder.join(name))
        });
        below
            .filter(|folder| !self.folders.contains_key(folder))
            .collect()
    }

    /// What stands at `path`, whose folder was looked at.
    pub(super) fn kind_of(&self, path: &Path) -> io::Result<Option<fs::FileType>> {
        if let Some(kind) = self.kinds.get(path) {
            return kind.as_ref().map(|kind| *kind).map_err(again);
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        match self.folders.get(folder) {
            Some(listing) => {
                let listing = listing.as_ref().map_err(again)?;
                Ok(listing.names.get(name).copied())
            }
            None => files::kind_of(path),
        }
    }

    /// The names in a folder that was looked at.
    pub(super) fn names_in(&self, folder: &Path) -> impl Iterator<Item = &OsStr> {
        let listing = self
            .folders
            .get(folder)
            .and_then(|found| found.as_ref().ok());
        let names = listing.into_iter().flat_map(|listing| listing.names.iter());
        names.map(|(name, _)| name.as_os_str())
    }

    /// The content of a small regular file that was looked at.
    pub(super) fn content_of(&self, path: &Path) -> Option<&[u8]> {
        self.files.get(path)?.as_deref()
    }

    /// The text of the same.
    pub(super) fn text_of(&self, path: &Path) -> Option<&str> {
        str::from_utf8(self.content_of(path)?).ok()
    }
}

fn list(folder: &Path) -> io::Result<Listing> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let mut options = File::options();
    options.read(true).custom_flags(flags.bits());
    let opened = match options.open(folder) {
        Err(error)
            if matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP)
            ) =>
        {
            return Ok(Listing::default());
        }
        opened => opened?,
    };
    let stamp = Stamp::of(&opened.metadata()?);
    // By what is open: stamp and names are of one and the same folder.
    let entries = fs::read_dir(format!("/proc/self/fd/{}", opened.as_raw_fd()))?;
    let named = entries.map(|entry| {
        let entry = entry?;
        Ok((entry.file_name(), entry.file_type()?))
    });
    Ok(Listing {
        names: Arc::new(named.collect::<io::Result<_>>()?),
        stamp: Some(stamp),
    })
}

/// The same error once more.
fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error.kind().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_remembered_only_as_long_as_it_stands_and_is_told_apart_from_a_change() {
        let place = tempfile::tempdir().unwrap();
        let (folder, other) = (place.path().join("folder"), place.path().join("other"));
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(folder.join("a"), "").unwrap();
        let wanted = [Wanted::Folder(folder.clone())];
        let names = |look: &Look| {
            let names = look.names_in(&folder);
            names.map(|name| name.to_owned()).collect::<Vec<_>>()
        };
        let look = |memory: &Memory| {
            let mut look = Look::default();
            look.take(&wanted, memory);
            look
        };
        let at = |path: &Path| Stamp::of(&fs::metadata(path).unwrap()).ctime;
        let later = |(seconds, nanos): Moment| (seconds + 1, nanos);
        let first = look(&Memory::default());
        assert_eq!(names(&first), ["a"]);

        // In the tick of its last change, or before it, nothing is remembered.
        let memory = |moment| Memory {
            moment: Some(moment),
            ..Memory::default()
        };
        let fresh = memory(at(&folder)).after(&first, place.path(), None);
        assert!(fresh.listings.is_empty());
        let known = memory(later(at(&folder))).after(&first, place.path(), None);
        assert_eq!(known.listings.len(), 1);
        assert!(known.recall(&folder).is_some());
        assert_eq!(names(&look(&known)), ["a"]);

        // A change shows at once, whatever its times are set to; so does another folder in its place.
        let times = fs::metadata(&folder).unwrap();
        let set_back = || {
            let opened = File::open(&folder).unwrap();
            opened.set_modified(times.modified().unwrap()).unwrap();
        };
        fs::remove_file(folder.join("a")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.join("a")).unwrap();
        set_back();
        let changed = look(&known);
        let kind = changed.kind_of(&folder.join("a")).unwrap().unwrap();
        assert!(kind.is_symlink());
        fs::rename(&folder, place.path().join("away")).unwrap();
        fs::rename(&other, &folder).unwrap();
        assert!(names(&look(&known)).is_empty());
        fs::remove_dir(&folder).unwrap();
        std::os::unix::fs::symlink(place.path().join("away"), &folder).unwrap();
        assert!(names(&look(&known)).is_empty(), "a link is no folder");
    }
}
