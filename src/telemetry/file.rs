//! The log in a file: `LOG_FILE`.
//!
//! A thread of its own writes it. Whoever logs puts a line into a bounded queue and never waits: what a
//! slow or a full disk does not take is dropped, counted, and told in the file once it takes lines again.
//!
//! At 10 MB the file is packed (`greenroom.log.1.gz`, the newest of five) and a new one is begun. Several
//! processes may write one file: a line is written under a shared lock of the file that has the name at
//! that moment, and it is packed under an exclusive one. All of them are readable by their owner alone.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;
use nix::fcntl::OFlag;

const LIMITS: Limits = Limits {
    max_bytes: 10 * 1000 * 1000,
    kept: 5,
};
/// What may wait for the disk: lines, and bytes of all of them.
const QUEUE: usize = 8192;
const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// A disk that needs longer to open the file is waited for no longer; lines wait in the queue.
const OPEN: Duration = Duration::from_secs(2);
/// At the end a file that is being packed is waited for so long: it is work, and no stuck disk.
const PACKING: Duration = Duration::from_secs(10);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "LOG_FILE: failed to open {}; name a file in a folder that is there and may be written to",
    path.display()
)]
pub struct LogFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The way into the file. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct LogFile(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: SyncSender<Message>,
    queued_bytes: AtomicUsize,
    /// Lines that are in the queue or being written.
    queued: AtomicU64,
    /// A full file is being packed.
    packs: Arc<AtomicBool>,
    /// Lines that were dropped and are not told of yet.
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// Answered when all before it is written.
    Flush(SyncSender<()>),
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    max_bytes: u64,
    /// Packed files.
    kept: usize,
}

impl LogFile {
    /// Opens the file and starts its thread, which lives as long as the process. `is_json` is the form
    /// of the lines.
    pub(super) fn start(path: &Path, is_json: bool) -> Result<Self, LogFileError> {
        let failed = |source| LogFileError {
            path: path.to_owned(),
            source,
        };
        let (file, messages) = Self::unread();
        let (opened, open) = mpsc::sync_channel(1);
        let (path_there, shared) = (path.to_owned(), Arc::clone(&file.0));
        let packs = Arc::clone(&file.0.packs);
        let run = move || match Rotating::open(path_there, LIMITS, packs) {
            Ok(rotating) => {
                // Nobody waits for it any more where the disk was slow.
                let _late = opened.try_send(Ok(()));
                write_all(rotating, &messages, &shared, is_json);
            }
            Err(error) => {
                let _late = opened.try_send(Err(error));
            }
        };
        let thread = thread::Builder::new().name("log file".to_owned());
        thread.spawn(run).map_err(failed)?;
        match open.recv_timeout(OPEN) {
            Ok(Err(error)) => Err(failed(error)),
            Ok(Ok(())) | Err(RecvTimeoutError::Timeout) => Ok(file),
            Err(RecvTimeoutError::Disconnected) => Err(failed(io::Error::other("it broke"))),
        }
    }

    fn unread() -> (Self, Receiver<Message>) {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let shared = Shared {
            queue,
            queued_bytes: AtomicUsize::new(0),
            queued: AtomicU64::new(0),
            packs: Arc::default(),
            dropped: AtomicU64::new(0),
        };
        (Self(Arc::new(shared)), messages)
    }

    /// Takes a line, or drops and counts it. Never waits.
    fn offer(&self, line: &[u8]) {
        let shared = &self.0;
        let waiting = shared.queued_bytes.fetch_add(line.len(), Ordering::Relaxed);
        let fits = waiting + line.len() <= QUEUE_BYTES;
        shared.queued.fetch_add(1, Ordering::Relaxed);
        if !fits || shared.queue.try_send(Message::Line(line.to_vec())).is_err() {
            shared.queued.fetch_sub(1, Ordering::Relaxed);
            shared.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines are in the file, as long as the limit allows; answers how many are not.
    pub(super) fn finish(&self, limit: Duration) -> u64 {
        let begun = Instant::now();
        let mut until = begun + limit;
        let mut is_late = || {
            let now = Instant::now();
            // What waits for the packing is written after it.
            if self.0.packs.load(Ordering::Relaxed) && now < begun + PACKING {
                until = now + limit;
            }
            now >= until
        };
        let (done, end) = mpsc::sync_channel(1);
        let mut message = Message::Flush(done);
        while let Err(TrySendError::Full(back)) = self.0.queue.try_send(message) {
            if is_late() {
                break;
            }
            message = back;
            thread::sleep(LOOK);
        }
        // A disk that is too slow leaves what waits behind.
        while end.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) && !is_late() {}
        self.0.dropped.load(Ordering::Relaxed) + self.0.queued.load(Ordering::Relaxed)
    }
}

/// One call is one line.
impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.offer(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_all(mut file: Rotating, messages: &Receiver<Message>, shared: &Shared, is_json: bool) {
    for message in messages {
        // What is missing stands where it would be.
        let missing = shared.dropped.load(Ordering::Relaxed);
        if missing > 0 && file.write(note(missing, is_json).as_bytes()).is_ok() {
            shared.dropped.fetch_sub(missing, Ordering::Relaxed);
        }
        match message {
            Message::Line(line) => {
                shared.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
                if file.write(&line).is_err() {
                    shared.dropped.fetch_add(1, Ordering::Relaxed);
                }
                shared.queued.fetch_sub(1, Ordering::Relaxed);
            }
            Message::Flush(done) => {
                let _gone = done.try_send(());
            }
        }
    }
}

fn note(missing: u64, is_json: bool) -> String {
    let now = Timestamp::now();
    let words = format!("{missing} lines are missing here: the disk was full or too slow");
    match is_json {
        true => format!(
            "{{\"timestamp\":\"{now:.3}\",\"level\":\"warn\",\"message\":\"{words}\",\"target\":\
             \"greenroom::telemetry\",\"missing\":{missing}}}\n"
        ),
        false => format!("{now:.3} WARN  {words}\n"),
    }
}

/// A file that begins anew when it is full.
#[derive(Debug)]
struct Rotating {
    path: PathBuf,
    limits: Limits,
    file: File,
    packs: Arc<AtomicBool>,
    /// Its last line was cut off by a full disk.
    is_cut: bool,
}

impl Rotating {
    fn open(path: PathBuf, limits: Limits, packs: Arc<AtomicBool>) -> io::Result<Self> {
        let file = open(&path)?;
        let rotating = Self {
            path,
            limits,
            file,
            packs,
            is_cut: false,
        };
        // What somebody was packing when it was killed; where that cannot be done it is tried again at the
        // next packing.
        rotating.file.lock()?;
        if let Ok(Some(_)) = rotating.is_current() {
            rotating.pack().ok();
        }
        rotating.file.unlock()?;
        Ok(rotating)
    }

    /// Writes a line whole, or not.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let size = self.lock()?;
        let written = self.append(size, line);
        self.file.unlock()?;
        written
    }

    fn append(&mut self, size: u64, line: &[u8]) -> io::Result<()> {
        if size > 0 && size + line.len() as u64 > self.limits.max_bytes {
            self.rotate()?;
        }
        if self.is_cut {
            self.file.write_all(b"\n")?;
            self.is_cut = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.is_cut = rest.len() < line.len();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Locks the file that has the name, shared; answers its size.
    fn lock(&mut self) -> io::Result<u64> {
        loop {
            self.file.lock_shared()?;
            if let Some(size) = self.is_current()? {
                return Ok(size);
            }
            // Somebody else has packed it, or took it away.
            self.file = open(&self.path)?;
            self.is_cut = false;
        }
    }

    /// The size of our file, if it has the name still.
    fn is_current(&self) -> io::Result<Option<u64>> {
        let ours = self.file.metadata()?;
        match fs::symlink_metadata(&self.path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => {
                Ok(Some(named.len()))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Puts the full file aside, begins a new one, and packs. It is locked shared before and after.
    fn rotate(&mut self) -> io::Result<()> {
        self.file.unlock()?;
        self.file.lock()?;
        let size = self.is_current()?;
        if size.is_none_or(|size| size < self.limits.max_bytes / 2) {
            // Somebody else was quicker.
            self.file.unlock()?;
            return self.lock().map(drop);
        }
        // One that could not be packed goes by the rename.
        self.pack().ok();
        fs::rename(&self.path, self.aside())?;
        self.file = open(&self.path)?;
        self.is_cut = false;
        self.file.lock()?;
        // On a full disk it stays as it is, until the next one takes its place.
        let packed = self.pack();
        self.file.unlock()?;
        self.lock()?;
        packed.or(Ok(()))
    }

    fn aside(&self) -> PathBuf {
        self.named(".1")
    }

    fn named(&self, ending: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(ending);
        name.into()
    }

    /// Packs what was put aside, if something was. The exclusive lock is held.
    fn pack(&self) -> io::Result<()> {
        let aside = match ordinary(File::options().read(true), &self.aside()) {
            Ok(aside) => aside,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let unfinished = self.named(".1.gz.new");
        self.packs.store(true, Ordering::Relaxed);
        let packed = pack_into(&aside, &unfinished);
        self.packs.store(false, Ordering::Relaxed);
        if let Err(error) = packed {
            fs::remove_file(&unfinished).ok();
            return Err(error);
        }
        let numbered = |number: usize| {
            let mut ending = String::new();
            let _infallible = write!(ending, ".{number}.gz");
            self.named(&ending)
        };
        for number in (1..self.limits.kept).rev() {
            // There may be fewer yet.
            fs::rename(numbered(number), numbered(number + 1)).ok();
        }
        fs::rename(unfinished, numbered(1))?;
        fs::remove_file(self.aside())
    }
}

fn pack_into(mut from: &File, to: &Path) -> io::Result<()> {
    // What was left there, or put there.
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let to = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    let mut packer = GzEncoder::new(to, Compression::fast());
    io::copy(&mut from, &mut packer)?;
    packer.finish().map(drop)
}

/// Opens an ordinary file, and nothing else: to open a pipe would wait for its reader, and a link leads
/// to what is not ours to write.
fn ordinary(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = options.custom_flags(flags.bits()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no ordinary file")),
    }
}

/// Opens or creates the file, for its owner alone.
fn open(path: &Path) -> io::Result<File> {
    let file = ordinary(File::options().append(true).create(true).mode(0o600), path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        // Where it is somebody else's he decides.
        file.set_permissions(Permissions::from_mode(0o600)).ok();
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
