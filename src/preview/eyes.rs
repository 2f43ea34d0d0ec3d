//! What changes in a worktree, seen with greenroom's own eyes: what a dev server says of a change
//! is compared with it.
//!
//! By the kernel's events where those can be had, else (the limit of watches is reached) by looking
//! at all files each second.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use crate::task::blocking;

const DISK_DEADLINE: Duration = Duration::from_secs(60);
/// Events that wait to be looked at. What is more is lost: a dev server that was told as much has
/// something to say anyway.
const EVENTS: usize = 4096;
const AT_ONCE: usize = 512;
/// Between two looks where there are no events.
const EVERY: Duration = Duration::from_secs(1);
/// Two writings of a file within this time are told of as such: chokidar drops the second one's event
/// for 50 ms after it has dealt with the first, which a busy server does late.
const QUICK: Duration = Duration::from_secs(1);
/// Files that are known, at most; of a larger site only the rest's changes are unseen.
const MOST_FILES: usize = 20_000;
/// Files whose last writing is remembered before those of a while ago are forgotten.
const MOST_WRITTEN: usize = 1024;

/// One file's.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// Below the worktree, with `/`.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    /// When the kernel told of it; where it tells nothing, when the file was last seen as it was.
    pub(crate) at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    New,
    Changed,
    /// Written once more within [`QUICK`]: who is told may have overlooked it.
    Again,
    Gone,
}

/// Tells of changes until nobody hears them any more. Names with a dot and what is made or
/// installed are left out, but for `.env`.
pub(crate) async fn watch(root: PathBuf, changes: mpsc::Sender<Change>) {
    let (tell, seen) = mpsc::channel(EVENTS);
    let eyes = {
        let root = root.clone();
        blocking("watching the worktree", DISK_DEADLINE, move || {
            Eyes::open(root, tell)
        })
    };
    match eyes.await {
        Ok(Ok(eyes)) => by_events(eyes, seen, &changes).await,
        Ok(Err(error)) => {
            tracing::warn!(%error, "no events of file changes: files are looked at each second");
            by_looking(root, &changes).await;
        }
        Err(error) => tracing::warn!(%error, "a worktree is not watched"),
    }
}

async fn by_events(
    mut eyes: Eyes,
    mut seen: mpsc::Receiver<(Instant, notify::Event)>,
    changes: &mpsc::Sender<Change>,
) {
    let mut events = Vec::new();
    loop {
        let count = tokio::select! {
            () = changes.closed() => return,
            count = seen.recv_many(&mut events, AT_ONCE) => count,
        };
        if count == 0 {
            return;
        }
        let batch = std::mem::take(&mut events);
        let look = blocking("looking at changes", DISK_DEADLINE, move || {
            let found = eyes.take_in(batch);
            (eyes, found)
        });
        let Ok((back, found)) = look.await else {
            return;
        };
        eyes = back;
        for change in found {
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

async fn by_looking(root: PathBuf, changes: &mpsc::Sender<Change>) {
    let mut before: Option<(Instant, Files)> = None;
    loop {
        let begun = Instant::now();
        let root = root.clone();
        let look = blocking("looking for changes", DISK_DEADLINE, move || {
            let mut files = Files::new();
            walk(&root, &root, &mut files, &mut |_| Ok(())).ok();
            files
        });
        let Ok(now) = look.await else { return };
        if let Some((at, before)) = &before {
            for change in compare(before, &now, *at) {
                if changes.send(change).await.is_err() {
                    return;
                }
            }
        }
        before = Some((begun, now));
        tokio::select! {
            () = changes.closed() => return,
            () = sleep(EVERY) => {}
        }
    }
}

/// When a file was written last, and its length.
type Files = BTreeMap<String, (Option<SystemTime>, u64)>;

fn compare(before: &Files, now: &Files, at: Instant) -> Vec<Change> {
    let change = |path: &String, kind| Change {
        path: path.clone(),
        kind,
        at,
    };
    let present = now.iter().filter_map(|(path, at)| match before.get(path) {
        None => Some(change(path, Kind::New)),
        Some(then) => (then != at).then(|| change(path, Kind::Changed)),
    });
    let gone = before.keys().filter(|path| !now.contains_key(*path));
    present
        .chain(gone.map(|path| change(path, Kind::Gone)))
        .collect()
}

/// Goes through a folder's files; `visit` is told of each folder. Blocking.
fn walk(
    root: &Path,
    folder: &Path,
    files: &mut Files,
    visit: &mut impl FnMut(&Path) -> io::Result<()>,
) -> io::Result<()> {
    visit(folder)?;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let (Some(name), Ok(meta)) = (name_below(root, &path), entry.metadata()) else {
            continue;
        };
        if meta.is_dir() {
            walk(root, &path, files, visit)?;
        } else if meta.is_file() && files.len() < MOST_FILES {
            files.insert(name, (meta.modified().ok(), meta.len()));
        }
    }
    Ok(())
}

/// A path as changes have it; `None` for what is left out.
fn name_below(root: &Path, path: &Path) -> Option<String> {
    let below = path.strip_prefix(root).ok()?.to_str()?;
    let is_left_out = |part: &str| {
        part.starts_with('.') && !part.starts_with(".env")
            || matches!(part, "" | "node_modules" | "dist")
    };
    (!below.split('/').any(is_left_out)).then(|| below.to_owned())
}

/// The kernel's watches on each folder of a worktree.
struct Eyes {
    root: PathBuf,
    watcher: RecommendedWatcher,
    known: Files,
    /// When files were written last, those of a while ago left out.
    written: HashMap<PathBuf, Instant>,
}

impl Eyes {
    fn open(root: PathBuf, tell: mpsc::Sender<(Instant, notify::Event)>) -> io::Result<Self> {
        let told = move |event: notify::Result<notify::Event>| {
            if let Ok(event) = event {
                tell.try_send((Instant::now(), event)).ok();
            }
        };
        let watcher = notify::recommended_watcher(told).map_err(io::Error::other)?;
        let mut eyes = Self {
            watcher,
            known: Files::new(),
            written: HashMap::new(),
            root: root.clone(),
        };
        eyes.add(&root)?;
        Ok(eyes)
    }

    /// Watches a folder and those below it.
    fn add(&mut self, folder: &Path) -> io::Result<()> {
        let Self {
            root,
            watcher,
            known,
            ..
        } = self;
        walk(root, folder, known, &mut |folder| {
            watcher
                .watch(folder, RecursiveMode::NonRecursive)
                .map_err(io::Error::other)
        })
    }

    /// What events say, in their order, each file once.
    fn take_in(&mut self, events: Vec<(Instant, notify::Event)>) -> Vec<Change> {
        let mut found: Vec<Change> = Vec::new();
        let again = self.written_again(&events);
        let is_change = |event: &notify::Event| match event.kind {
            EventKind::Access(_) | EventKind::Modify(ModifyKind::Metadata(_)) => false,
            EventKind::Any
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Remove(_)
            | EventKind::Other => true,
        };
        let events = events.into_iter().filter(|(_, event)| is_change(event));
        let paths: Vec<(Instant, PathBuf)> = events
            .flat_map(|(at, event)| event.paths.into_iter().map(move |path| (at, path)))
            .collect();
        // What is found now is how the last event of a file left it.
        let last: HashMap<PathBuf, Instant> =
            paths.iter().map(|(at, path)| (path.clone(), *at)).collect();
        for (at, path) in paths {
            let at = last.get(&path).copied().unwrap_or(at);
            let Some(name) = name_below(&self.root, &path) else {
                continue;
            };
            match path.symlink_metadata() {
                Ok(meta) if meta.is_dir() => {
                    let before = self.known.clone();
                    // What can't be watched any more is unseen; what is known stays so.
                    self.add(&path).ok();
                    found.extend(compare(&before, &self.known, at));
                }
                Ok(meta) => {
                    let now = (meta.modified().ok(), meta.len());
                    let kind = match self.known.insert(name.clone(), now) {
                        None => Kind::New,
                        // One writing makes several events.
                        Some(then) if then == now => continue,
                        Some(_) => Kind::Changed,
                    };
                    found.push(Change {
                        path: name,
                        kind,
                        at,
                    });
                }
                Err(_) => {
                    let below = format!("{name}/");
                    let is_gone = |known: &String| *known == name || known.starts_with(&below);
                    let gone: Vec<String> =
                        self.known.keys().filter(|k| is_gone(k)).cloned().collect();
                    for path in gone {
                        self.known.remove(&path);
                        let kind = Kind::Gone;
                        found.push(Change { path, kind, at });
                    }
                }
            }
        }
        let mut seen = std::collections::HashSet::new();
        found.retain(|change| seen.insert((change.path.clone(), change.kind == Kind::New)));
        found.extend(again);
        found
    }

    /// The files whose writing ended twice within [`QUICK`]. What is found of them may have been seen
    /// after the first one already.
    fn written_again(&mut self, events: &[(Instant, notify::Event)]) -> Vec<Change> {
        let mut found = Vec::new();
        if self.written.len() >= MOST_WRITTEN {
            let now = Instant::now();
            self.written.retain(|_, at| *at + QUICK > now);
        }
        for (at, event) in events {
            let is_whole = matches!(
                event.kind,
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                    | EventKind::Modify(ModifyKind::Name(RenameMode::To))
            );
            for path in event.paths.iter().filter(|_| is_whole) {
                let before = self.written.insert(path.clone(), *at);
                if before.is_some_and(|before| *at < before + QUICK)
                    && let Some(path) = name_below(&self.root, path)
                {
                    let (kind, at) = (Kind::Again, *at);
                    found.push(Change { path, kind, at });
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    async fn next(seen: &mut mpsc::Receiver<Change>, path: &str, kind: Kind) {
        let wanted = (path, kind);
        let wait = async {
            while let Some(change) = seen.recv().await {
                let is_other = change.path.contains("node_modules") || change.path.contains(".git");
                assert!(!is_other, "{change:?}");
                if (change.path.as_str(), change.kind) == wanted {
                    return;
                }
            }
            panic!("it goes on");
        };
        timeout(Duration::from_secs(30), wait)
            .await
            .unwrap_or_else(|_| panic!("never: {wanted:?}"));
    }

    async fn changes_are_told(by: &str) {
        let disk = tempfile::tempdir().unwrap();
        let root = disk.path().to_owned();
        let write = |name: &str, text: &str| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("src/pages/index.astro", "1");
        write("node_modules/p/i.js", "1");
        let (tell, mut seen) = mpsc::channel(64);
        let watching = async {
            match by {
                "events" => watch(root.clone(), tell).await,
                _ => by_looking(root.clone(), &tell).await,
            }
        };
        let test = async {
            // Until it looks.
            let mut count = 0;
            while seen.try_recv().is_err() {
                count += 1;
                write("begin", &"x".repeat(count));
                sleep(Duration::from_millis(50)).await;
            }
            write("node_modules/p/i.js", "22");
            write(".git/x", "22");
            write("src/pages/index.astro", "22");
            next(&mut seen, "src/pages/index.astro", Kind::Changed).await;
            // Whole at once: it is no change of an empty one.
            write("src/deep/er/.new", "1");
            let deep = root.join("src/deep/er");
            std::fs::rename(deep.join(".new"), deep.join("new.css")).unwrap();
            next(&mut seen, "src/deep/er/new.css", Kind::New).await;
            let once_more = timeout(Duration::from_millis(300), seen.recv()).await;
            assert!(once_more.is_err(), "one file, one change: {once_more:?}");
            write("src/deep/er/new.css", "22");
            next(&mut seen, "src/deep/er/new.css", Kind::Changed).await;
            // As careful editors write.
            write("src/pages/x.tmp", "333");
            let (from, to) = (
                root.join("src/pages/x.tmp"),
                root.join("src/pages/index.astro"),
            );
            std::fs::rename(from, to).unwrap();
            next(&mut seen, "src/pages/index.astro", Kind::Changed).await;
            if by == "events" {
                for text in ["4444", "4444"] {
                    write("src/pages/index.astro", text);
                }
                next(&mut seen, "src/pages/index.astro", Kind::Again).await;
            }
            write(".env", "A=1");
            next(&mut seen, ".env", Kind::New).await;
            std::fs::remove_dir_all(root.join("src/deep")).unwrap();
            next(&mut seen, "src/deep/er/new.css", Kind::Gone).await;
            drop(seen);
        };
        tokio::join!(watching, test);
    }

    #[tokio::test]
    async fn changes_are_told_by_events() {
        changes_are_told("events").await;
    }

    #[tokio::test]
    async fn changes_are_told_by_looking() {
        changes_are_told("looking").await;
    }
}
