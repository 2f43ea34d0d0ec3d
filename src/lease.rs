//! Who may write: a lease on a folder of the workspace, with a growing generation number.
//!
//! ```text
//! lease/00000000000000000007   {"generation":7,"owner":{…},"beat":41,"isReleased":false}
//! ```
//!
//! A generation is taken by linking its file into place: a file system, NFS too, does that for one
//! taker alone. Its owner beats by writing a growing number into the file. Whoever else wants the
//! lease watches that number by its own clock, because clocks of containers differ and attributes
//! of NFS lag; where it stands still for a whole term, the next generation may be taken.
//!
//! **Invariant:** an owner that could not beat for [two thirds](WINDOW) of the term takes its lease
//! for lost, by its own clock, and never gets that generation back. So it has stopped before
//! anybody else begins. Every write asks the [`Fence`] right before it happens.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::task::{self, BlockingError, Tasks};

/// Beats in a term.
const BEATS: u32 = 5;
/// The part of a term for which a beat is good, as a fraction.
const WINDOW: (u32, u32) = (2, 3);
/// Small file operations on a slow disk.
const DISK_DEADLINE: Duration = Duration::from_secs(30);
/// A record is padded to this: it is rewritten in place, and a reader whose cache holds the old
/// size must not see half of it.
const RECORD_BYTES: usize = 1024;

/// The lease is not ours any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another greenroom has taken over, or the workspace's disk did not answer for too long")]
pub struct LeaseLost;

/// A lease that was not had.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("another greenroom works on it (host {}, process {})", owner.host, owner.pid)]
    Held { owner: Box<Owner> },
    #[error("failed to {operation} the lease {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}

/// A process, as others can tell whether it still lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    pub host: String,
    pub boot_id: String,
    pub pid_namespace: String,
    pub pid: u32,
    /// In the kernel's ticks since boot: a number that is used again is another process.
    pub start_time: u64,
}

impl Owner {
    /// This process.
    pub fn this() -> &'static Self {
        static THIS: LazyLock<Owner> = LazyLock::new(|| {
            let line = |path| fs::read_to_string(path).map(|text| text.trim().to_owned());
            let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
            let pid = std::process::id();
            Owner {
                host: line("/proc/sys/kernel/hostname").unwrap_or_default(),
                boot_id: line("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
                pid_namespace: namespace.display().to_string(),
                pid,
                start_time: start_time(pid).unwrap_or_default(),
            }
        });
        &THIS
    }

    /// Can this process see that it is gone? Of another host it never can.
    pub fn is_gone(&self) -> bool {
        self.is_dead(Self::this())
    }

    fn is_dead(&self, seen_by: &Self) -> bool {
        self.host == seen_by.host
            && self.boot_id == seen_by.boot_id
            && self.pid_namespace == seen_by.pid_namespace
            && start_time(self.pid) != Some(self.start_time)
    }
}

/// When a process started; `None` if it is gone, or only waits to be reaped.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 2;
    let rest = str::from_utf8(stat.get(after_name..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    // State is field 3, the start time field 22 (proc(5)).
    fields.nth(18)?.parse().ok()
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    generation: u64,
    owner: Owner,
    beat: u64,
    is_released: bool,
}

impl Record {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("our own plain data serialises");
        let padded = bytes.len().max(RECORD_BYTES - 1);
        bytes.resize(padded, b' ');
        bytes.push(b'\n');
        bytes
    }
}

/// What to do about an owner that beats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Give up as soon as a beat was seen.
    None,
    /// Wait for it to be done.
    UpTo(Duration),
}

/// A lease that is held: beaten by a task of its own, released when this is dropped.
#[derive(Debug)]
pub struct Lease {
    fence: Fence,
    stop: CancellationToken,
    released: Option<oneshot::Receiver<()>>,
}

#[derive(Debug)]
struct Held {
    generation: u64,
    window: Duration,
    /// The clock when the last beat that reached the disk was begun, in nanoseconds.
    confirmed: AtomicU64,
    lost: CancellationToken,
}

/// Asked before every write whether the lease still holds. Cheap to clone; does not hold the
/// lease.
#[derive(Debug, Clone)]
pub struct Fence(Option<Arc<Held>>);

impl Fence {
    /// Of a place that nobody else writes to.
    pub fn open() -> Self {
        Self(None)
    }

    /// May we write now? Reads no disk.
    ///
    /// # Errors
    /// [`LeaseLost`], from then on for good.
    pub fn check(&self) -> Result<(), LeaseLost> {
        let Some(held) = &self.0 else { return Ok(()) };
        if !held.lost.is_cancelled() && now() < held.valid_until() {
            return Ok(());
        }
        held.lost.cancel();
        Err(LeaseLost)
    }

    /// Runs `work` on a blocking thread, if we may still write when it begins.
    ///
    /// # Errors
    /// [`LeaseLost`], [`BlockingError`], or the work's own.
    pub async fn write<T, E, F>(
        &self,
        what: &'static str,
        deadline: Duration,
        work: F,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<LeaseLost> + From<BlockingError> + Send + 'static,
        F: FnOnce() -> Result<T, E> + Send + 'static,
    {
        let fence = self.clone();
        task::blocking(what, deadline, move || {
            fence.check()?;
            work()
        })
        .await?
    }

    /// Returns when the lease is lost.
    pub async fn lost(&self) {
        match &self.0 {
            Some(held) => held.lost.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Grows with every owner.
    pub fn generation(&self) -> u64 {
        self.0.as_ref().map_or(0, |held| held.generation)
    }
}

impl Held {
    fn valid_until(&self) -> Duration {
        Duration::from_nanos(self.confirmed.load(Ordering::Acquire)) + self.window
    }
}

impl Lease {
    /// Takes the lease of `folder`, which is made. Waits for an owner that is silent, until
    /// `term` is over; what happens with one that beats is up to `patience`.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if another process has it.
    pub async fn acquire(
        folder: &Path,
        term: Duration,
        patience: Patience,
        tasks: &Tasks,
    ) -> Result<Self, LeaseError> {
        Self::acquire_as(Owner::this(), folder, term, patience, tasks).await
    }

    async fn acquire_as(
        me: &Owner,
        folder: &Path,
        term: Duration,
        patience: Patience,
        tasks: &Tasks,
    ) -> Result<Self, LeaseError> {
        let begun = now();
        let look_again = (term / 40).clamp(Duration::from_millis(10), Duration::from_millis(250));
        let mut watched: Option<(Record, Duration)> = None;
        // A listing may be old (NFS): what was refused shows where to look next.
        let mut at_least = 0;
        loop {
            let (place, from) = (folder.to_owned(), at_least);
            let newest = task::blocking("reading a lease", DISK_DEADLINE, move || {
                read_newest(&place, from)
            })
            .await??;
            let is_free = match &newest {
                Newest::None => true,
                // Nobody writes halves: it stands still, like any other.
                Newest::Unreadable(_) => false,
                Newest::Record(record) => {
                    record.is_released || record.owner == *me || record.owner.is_dead(me)
                }
            };
            // Of one that died: nobody gave it back.
            let is_orphan = matches!(&newest, Newest::Record(record)
                if !record.is_released && record.owner != *me);
            let generation = newest.generation();
            let seen = newest.into_record(me);
            let mut is_stale = false;
            match &watched {
                Some((before, since)) if *before == seen => is_stale = now() >= *since + term,
                Some((before, _)) if before.generation == seen.generation && !is_free => {
                    let has_waited = match patience {
                        Patience::None => true,
                        Patience::UpTo(limit) => now() >= begun + limit,
                    };
                    if has_waited {
                        let owner = Box::new(seen.owner);
                        return Err(LeaseError::Held { owner });
                    }
                    watched = Some((seen, now()));
                }
                _ => watched = Some((seen, now())),
            }
            if is_free || is_stale {
                let record = Record {
                    generation: generation + 1,
                    owner: me.clone(),
                    beat: 0,
                    is_released: false,
                };
                let taken_at = now();
                let (place, mine) = (folder.to_owned(), record.clone());
                let taken =
                    task::blocking("taking a lease", DISK_DEADLINE, move || take(&place, &mine))
                        .await??;
                if taken {
                    let is_heir = is_stale || is_orphan;
                    let change = if is_heir { "taken_over" } else { "acquired" };
                    count(change);
                    return Ok(Self::hold(folder, record, taken_at, term, tasks));
                }
                at_least = generation + 1;
                watched = None;
                continue;
            }
            sleep(look_again).await;
        }
    }

    fn hold(
        folder: &Path,
        record: Record,
        taken_at: Duration,
        term: Duration,
        tasks: &Tasks,
    ) -> Self {
        let held = Arc::new(Held {
            generation: record.generation,
            window: term * WINDOW.0 / WINDOW.1,
            confirmed: AtomicU64::new(nanos(taken_at)),
            lost: CancellationToken::new(),
        });
        let stop = CancellationToken::new();
        let (done, released) = oneshot::channel();
        let keeper = keep(
            held.clone(),
            path_of(folder, record.generation),
            record,
            term / BEATS,
            stop.clone(),
            done,
        );
        tasks.spawn("lease", keeper);
        Self {
            fence: Fence(Some(held)),
            stop,
            released: Some(released),
        }
    }

    /// What every write asks.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Gives the lease back and waits until others can see that.
    pub async fn release(mut self) {
        self.stop.cancel();
        if let Some(released) = self.released.take() {
            released.await.ok();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn count(change: &'static str) {
    metrics::counter!("greenroom_lease_changes_total", "change" => change).increment(1);
}

/// Beats until the lease is given back or lost.
async fn keep(
    held: Arc<Held>,
    path: PathBuf,
    mut record: Record,
    interval: Duration,
    stop: CancellationToken,
    done: oneshot::Sender<()>,
) {
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => record.is_released = true,
            () = held.lost.cancelled() => return,
            () = sleep(interval) => {}
        }
        let begun = now();
        let Some(left) = held
            .valid_until()
            .checked_sub(begun)
            .filter(|left| !left.is_zero())
        else {
            count("lost");
            tracing::error!(lease = %path.display(), "a lease was lost: it was not beaten in time");
            held.lost.cancel();
            return;
        };
        record.beat += 1;
        let (file, bytes) = (path.clone(), record.bytes());
        let beaten = task::blocking_apart("beating a lease", left, move || {
            // In place and never made anew: a file that is gone is another owner's doing.
            let file = OpenOptions::new().write(true).open(file)?;
            file.write_all_at(&bytes, 0)
        });
        match beaten.await {
            Ok(Ok(())) => held.confirmed.store(nanos(begun), Ordering::Release),
            // Of a lease that is being given back: this process took it anew meanwhile.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound && record.is_released => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
                count("lost");
                tracing::error!(lease = %path.display(), "a lease was taken by another owner");
                held.lost.cancel();
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, lease = %path.display(), "a lease could not be beaten");
            }
            Err(error) => {
                tracing::warn!(%error, lease = %path.display(), "a lease could not be beaten");
            }
        }
        if record.is_released {
            count("released");
            // Whoever still asks has been told to stop long ago.
            held.lost.cancel();
            done.send(()).ok();
            return;
        }
    }
}

enum Newest {
    None,
    Record(Record),
    Unreadable(u64),
}

impl Newest {
    fn generation(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Record(record) => record.generation,
            Self::Unreadable(generation) => *generation,
        }
    }

    fn into_record(self, me: &Owner) -> Record {
        let generation = self.generation();
        match self {
            Self::Record(record) => record,
            Self::None | Self::Unreadable(_) => Record {
                generation,
                owner: Owner {
                    host: "unknown".into(),
                    ..me.clone()
                },
                beat: 0,
                is_released: false,
            },
        }
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LeaseError {
    let path = path.to_owned();
    move |source| LeaseError::Io {
        operation,
        path,
        source,
    }
}

fn path_of(folder: &Path, generation: u64) -> PathBuf {
    folder.join(format!("{generation:020}"))
}

fn generations(folder: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

fn read_newest(folder: &Path, at_least: u64) -> Result<Newest, LeaseError> {
    let listed = generations(folder).map_err(io_error("list", folder))?;
    let newest = listed.into_iter().max().unwrap_or(0).max(at_least);
    if newest == 0 {
        return Ok(Newest::None);
    }
    let path = path_of(folder, newest);
    let mut text = Vec::new();
    match OpenOptions::new().read(true).open(&path) {
        Ok(file) => file
            .take(2 * RECORD_BYTES as u64)
            .read_to_end(&mut text)
            .map_err(io_error("read", &path))?,
        // Its owner was followed by another one between the two looks: look again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Newest::Unreadable(newest));
        }
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    Ok(match serde_json::from_slice::<Record>(&text) {
        Ok(record) if record.generation == newest => Newest::Record(record),
        _ => Newest::Unreadable(newest),
    })
}

/// Puts a generation's file in place, whole; false if another owner was first.
fn take(folder: &Path, record: &Record) -> Result<bool, LeaseError> {
    let make = |path: &Path| {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io_error("make the folder of", path))
    };
    make(folder)?;
    let path = path_of(folder, record.generation);
    let temporary = folder.join(format!(".{}", uuid::Uuid::new_v4().simple()));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&record.bytes())?;
        file.sync_data()
    };
    write().map_err(io_error("write", &temporary))?;
    let linked = fs::hard_link(&temporary, &path);
    fs::remove_file(&temporary).ok();
    match linked {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // A reply that got lost looks the same: it is ours if it says so.
            let is_ours = matches!(
                read_newest(folder, record.generation)?,
                Newest::Record(present) if present == *record
            );
            if !is_ours {
                return Ok(false);
            }
        }
        Err(error) => return Err(io_error("take", &path)(error)),
    }
    for old in generations(folder).unwrap_or_default() {
        if old < record.generation {
            fs::remove_file(path_of(folder, old)).ok();
        }
    }
    Ok(true)
}

/// Time that passes while the machine sleeps, too.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .expect("the clock of every Linux since 2.6.39")
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process of another container.
    fn elsewhere() -> Owner {
        Owner {
            host: "elsewhere".into(),
            ..Owner::this().clone()
        }
    }

    fn record(owner: Owner) -> Record {
        Record {
            generation: 7,
            owner,
            beat: 3,
            is_released: false,
        }
    }

    async fn take_now(folder: &Path, term: Duration) -> Result<Lease, LeaseError> {
        Lease::acquire(folder, term, Patience::None, &Tasks::new()).await
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_beating_owner_is_left_alone_until_it_gives_the_lease_back() {
        let folder = tempfile::tempdir().unwrap();
        let (folder, tasks) = (folder.path().join("lease"), Tasks::new());
        let term = Duration::from_secs(10);
        let first = take_now(&folder, term).await.unwrap();
        assert_eq!(first.fence().generation(), 1);
        let other = elsewhere();
        let refused = Lease::acquire_as(&other, &folder, term, Patience::None, &tasks).await;
        assert!(matches!(refused, Err(LeaseError::Held { owner }) if *owner == *Owner::this()));
        assert!(first.fence().check().is_ok());

        let fence = first.fence().clone();
        let (waits, ()) = tokio::join!(
            Lease::acquire_as(&other, &folder, term, Patience::UpTo(HOUR), &tasks),
            first.release(),
        );
        assert_eq!(waits.unwrap().fence().generation(), 2);
        assert!(fence.check().is_err(), "given back is given back");
        assert_eq!(generations(&folder).unwrap(), [2]);
    }

    #[tokio::test]
    async fn a_silent_owner_is_followed_after_a_term_and_a_dead_one_at_once() {
        let folder = tempfile::tempdir().unwrap();
        assert!(take(folder.path(), &record(elsewhere())).unwrap());
        let begun = now();
        let term = Duration::from_millis(200);
        let lease = take_now(folder.path(), term).await.unwrap();
        assert!(now() - begun >= term);
        assert_eq!(lease.fence().generation(), 8);

        let folder = tempfile::tempdir().unwrap();
        let dead = Owner {
            start_time: 1,
            ..Owner::this().clone()
        };
        assert!(take(folder.path(), &record(dead)).unwrap());
        take_now(folder.path(), HOUR).await.unwrap();
        // Damage is nobody's lease: it stands still.
        let folder = tempfile::tempdir().unwrap();
        fs::write(path_of(folder.path(), 3), "{").unwrap();
        let lease = take_now(folder.path(), term).await.unwrap();
        assert_eq!(lease.fence().generation(), 4);
    }

    #[tokio::test]
    async fn an_owner_that_cannot_beat_stops_writing() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("lease");
        let lease = take_now(&place, Duration::from_secs(1)).await.unwrap();
        fs::remove_dir_all(&place).unwrap();
        fs::write(&place, "no folder any more").unwrap();
        lease.fence().lost().await;
        assert_eq!(lease.fence().check(), Err(LeaseLost));
        let refused: Result<(), anyhow::Error> = lease
            .fence()
            .write("a test", HOUR, || panic!("not without the lease"))
            .await;
        assert!(refused.unwrap_err().is::<LeaseLost>());
    }

    #[test]
    fn one_of_many_takers_gets_a_generation() {
        let folder = tempfile::tempdir().unwrap();
        let winners = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..16)
                .map(|pid| {
                    let (folder, mine) = (folder.path(), Owner { pid, ..elsewhere() });
                    scope.spawn(move || take(folder, &record(mine)).unwrap())
                })
                .collect();
            let won = takers.into_iter().map(|taker| taker.join().unwrap());
            won.filter(|won| *won).count()
        });
        assert_eq!(winners, 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no litter");
    }
}
