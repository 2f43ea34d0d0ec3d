//! The one place that writes a tree's files to disk.
//!
//! A whole tree is written by several threads: on a local disk every core unpacks and copies, and
//! on a network disk, where each file costs some round trips, the waits overlap. libgit2 uses one
//! thread; it is left what only it can do, the files that git changes on their way to disk.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::File,
    io::Write as _,
    ops::Range,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use git2::{AttrCheckFlags, Odb, Repository, Tree, build::CheckoutBuilder};
use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{Mode, fstat, fstatat, mkdirat},
    unistd::symlinkat,
};

use super::{
    Operation as _, Result,
    files::Root,
    index::{Index, LINK_MODE, SUBMODULE_MODE, Stat},
};

/// Most threads that write at once where the disk is slow, and for how many files each: they wait for
/// it nearly all the time. Where it is quick there are as many as cores.
const MAX_THREADS: usize = 32;
const FILES_PER_THREAD: usize = 8;
/// Files that tell how slow it is, and what a slow one takes for each.
const PROBED: usize = 4;
const SLOW: Duration = Duration::from_millis(1);
/// Most files that a thread takes on at a time, all of one folder. On a quick disk two threads in one
/// folder only wait for each other; on a slow one most of the wait is not the folder's.
const FILES_AT_ONCE: usize = 256;
const SLOW_FILES_AT_ONCE: usize = 8;
/// Larger contents, in bytes, are held in memory one at a time.
const LARGE: usize = 4 << 20;
/// What stands in a `.gitattributes` that makes git change files on their way to disk, on Linux and
/// by our configuration.
const CONVERTING: [&str; 2] = ["crlf", "ident"];

/// Writes all files of `tree` into `folder`, which holds none (a `.git` at most) and is ours alone,
/// and becomes the repository's working directory. Returns the tree's index, which knows the files
/// as they are on disk now; it has to be written before others can reach the folder.
pub(super) fn fill(repo: &Repository, tree: &Tree<'_>, folder: &Path) -> Result<Index> {
    const WHAT: &str = "check the site out";
    repo.set_workdir(folder, false).during(WHAT)?;
    let mut index = Index::of_tree(repo, tree).during(WHAT)?;
    let writer = Writer {
        index: &index,
        root: Root::open(folder).during(WHAT)?,
        objects: repo.odb().during(WHAT)?,
        large: Mutex::new(()),
    };
    let path = |slot| Path::new(OsStr::from_bytes(index.name(slot)));
    let (attributes, others): (BTreeSet<_>, BTreeSet<_>) =
        (0..index.len()).partition(|slot| path(*slot).ends_with(".gitattributes"));
    // First, because they say what becomes of the others.
    let mut stats = writer.write_all(&attributes)?;
    let (converted, others) = match converts(repo, &index, &attributes)? {
        false => (BTreeSet::new(), others),
        true => others
            .into_iter()
            .partition(|slot| is_converted(repo, path(*slot))),
    };
    stats.extend(writer.write_all(&others)?);
    let converted: Vec<_> = converted
        .into_iter()
        .map(|slot| path(slot).to_owned())
        .collect();
    fill_some(repo, tree, converted.iter(), folder).during(WHAT)?;
    for path in &converted {
        writer.root.give(path).during(WHAT)?;
    }
    drop(writer);
    for (slot, stat) in stats {
        index.know(slot, stat);
    }
    Ok(index)
}

/// May any of these files' lines make git change others?
fn converts(repo: &Repository, index: &Index, attributes: &BTreeSet<usize>) -> Result<bool> {
    for slot in attributes {
        if index.entry(*slot).mode == SUBMODULE_MODE {
            continue;
        }
        let blob = repo
            .find_blob(index.entry(*slot).id)
            .during("read the site's attributes")?;
        let text = String::from_utf8_lossy(blob.content());
        if CONVERTING.iter().any(|word| text.contains(word)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_converted(repo: &Repository, path: &Path) -> bool {
    let attribute = |name| {
        let value = repo.get_attr(path, name, AttrCheckFlags::FILE_THEN_INDEX);
        value.ok().flatten().map(str::to_owned)
    };
    attribute("eol").is_some_and(|eol| eol == "crlf") || attribute("ident").is_some()
}

struct Writer<'a> {
    index: &'a Index,
    root: Root,
    /// All threads read by the same one: opening it takes longer than some files.
    objects: Odb<'a>,
    /// Held by whoever holds a large content.
    large: Mutex<()>,
}

/// What threads share out among themselves.
struct Jobs {
    jobs: Vec<Range<usize>>,
    next: AtomicUsize,
    failed: AtomicBool,
}

impl Jobs {
    fn next(&self) -> Option<Range<usize>> {
        let is_over = self.failed.load(Ordering::Relaxed);
        let job = self.jobs.get(self.next.fetch_add(1, Ordering::Relaxed));
        job.filter(|_| !is_over).cloned()
    }
}

impl Writer<'_> {
    /// Writes these files; what they look like on disk after that.
    fn write_all(&self, slots: &BTreeSet<usize>) -> Result<Vec<(usize, Stat)>> {
        let slots: Vec<usize> = slots.iter().copied().collect();
        let (probed, slots) = slots.split_at(slots.len().min(PROBED));
        let started = Instant::now();
        let mut stats = self.work(probed, &self.jobs(probed, PROBED))?;
        let is_slow = started.elapsed() > SLOW * PROBED as u32;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (most, at_once) = match is_slow {
            true => (MAX_THREADS, SLOW_FILES_AT_ONCE),
            false => (cores.min(MAX_THREADS), FILES_AT_ONCE),
        };
        let jobs = self.jobs(slots, at_once);
        let threads = (slots.len() / FILES_PER_THREAD)
            .min(jobs.jobs.len())
            .min(most);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .map(|_| scope.spawn(|| self.work(slots, &jobs)))
                .collect();
            let mut outcome = self.work(slots, &jobs);
            for other in others {
                let done = other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                match (&mut outcome, done) {
                    (Ok(stats), Ok(more)) => stats.extend(more),
                    (Ok(_), failed) => outcome = failed,
                    (Err(_), _) => {}
                }
            }
            stats.extend(outcome?);
            Ok(stats)
        })
    }

    /// Cuts the files into pieces of one folder each. Neighbours are of different folders, where it
    /// can be had: the kernel lets one at a time make files in a folder.
    fn jobs(&self, slots: &[usize], at_once: usize) -> Jobs {
        let folder = |at: usize| {
            let name = self.index.name(slots[at]);
            &name[..name.iter().rposition(|&b| b == b'/').unwrap_or(0)]
        };
        // With each its number among those of its folder.
        let mut jobs: Vec<(usize, Range<usize>)> = Vec::new();
        for at in 0..slots.len() {
            match jobs.last_mut() {
                Some((number, job)) if folder(job.start) == folder(at) => {
                    if job.len() < at_once {
                        job.end = at + 1;
                    } else {
                        let next = *number + 1;
                        jobs.push((next, at..at + 1));
                    }
                }
                _ => jobs.push((0, at..at + 1)),
            }
        }
        jobs.sort_by_key(|(number, _)| *number);
        Jobs {
            jobs: jobs.into_iter().map(|(_, job)| job).collect(),
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// Takes on one piece after the other until there are none left, or one failed.
    fn work(&self, slots: &[usize], jobs: &Jobs) -> Result<Vec<(usize, Stat)>> {
        let work = || {
            let mut stats = Vec::new();
            while let Some(job) = jobs.next() {
                self.write_folder(&self.objects, &slots[job], &mut stats)?;
            }
            Ok(stats)
        };
        let done = work();
        if done.is_err() {
            jobs.failed.store(true, Ordering::Relaxed);
        }
        done
    }

    /// Writes files of one folder.
    fn write_folder(
        &self,
        objects: &Odb<'_>,
        slots: &[usize],
        stats: &mut Vec<(usize, Stat)>,
    ) -> Result<()> {
        const WHAT: &str = "write the site's files";
        let path = |slot| Path::new(OsStr::from_bytes(self.index.name(slot)));
        let folder = self.root.folder_of(path(slots[0]), true).during(WHAT)?;
        // A symlink where the commit has a folder too: no file system holds both.
        let folder = folder.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotADirectory));
        let folder = folder.during(WHAT)?;
        for &slot in slots {
            let (entry, path) = (self.index.entry(slot), path(slot));
            let name = path.file_name().expect("an index's paths have names");
            if entry.mode == SUBMODULE_MODE {
                let made = mkdirat(&folder, name, Mode::from_bits_truncate(0o777));
                made.map_err(std::io::Error::from).during(WHAT)?;
                self.root.give(path).during(WHAT)?;
                continue;
            }
            let (size, _) = objects.read_header(entry.id).during(WHAT)?;
            let _held =
                (size > LARGE).then(|| self.large.lock().unwrap_or_else(PoisonError::into_inner));
            let content = objects.read(entry.id).during(WHAT)?;
            let write = || -> std::io::Result<Stat> {
                if entry.mode == LINK_MODE {
                    symlinkat(OsStr::from_bytes(content.data()), &folder, name)?;
                    let stat = fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                    return Ok(Stat::of(&stat));
                }
                let flags = OFlag::O_WRONLY
                    | OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC;
                let mode = match entry.mode & 0o100 {
                    0 => 0o666,
                    _ => 0o777,
                };
                let file = openat(&folder, name, flags, Mode::from_bits_truncate(mode))?;
                let mut file = File::from(file);
                file.write_all(content.data())?;
                self.root.give_away(&file)?;
                Ok(Stat::of(&fstat(&file)?))
            };
            stats.push((slot, write().during(WHAT)?));
        }
        Ok(())
    }
}

/// Writes some files of `tree`, as git would (line endings, modes, symlinks), into a folder of ours.
pub(super) fn fill_some<'p>(
    repo: &Repository,
    tree: &Tree<'_>,
    paths: impl Iterator<Item = &'p PathBuf>,
    folder: &Path,
) -> Result<(), git2::Error> {
    let mut options = CheckoutBuilder::new();
    // "Force" overwrites nothing where nothing is; the safe way would compare with HEAD first and
    // take the files that are missing for deleted on purpose.
    options
        .force()
        .target_dir(folder)
        .update_index(false)
        .disable_pathspec_match(true);
    let mut is_empty = true;
    for path in paths {
        options.path(path.as_path());
        is_empty = false;
    }
    // No path at all would mean every path.
    if is_empty {
        return Ok(());
    }
    repo.checkout_tree(tree.as_object(), Some(&mut options))
}
