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
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;

const LIMITS: Limits = Limits {
    max_bytes: 10 * 1000 * 1000,
    kept: 5,
};
/// What may wait for the disk: lines, and bytes of all of them.
const QUEUE: usize = 8192;
const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// A disk that needs longer to open the file is waited for no longer; lines wait in the queue.
const OPEN: Duration = Duration::from_secs(2);

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
        let run = move || match Rotating::open(path_there, LIMITS) {
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
            dropped: AtomicU64::new(0),
        };
        (Self(Arc::new(shared)), messages)
    }

    /// Takes a line, or drops and counts it. Never waits.
    fn offer(&self, line: &[u8]) {
        let shared = &self.0;
        let waiting = shared.queued_bytes.fetch_add(line.len(), Ordering::Relaxed);
        let fits = waiting + line.len() <= QUEUE_BYTES;
        if !fits || shared.queue.try_send(Message::Line(line.to_vec())).is_err() {
            shared.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines are in the file, as long as the limit allows; answers how many are not.
    pub(super) fn finish(&self, limit: Duration) -> u64 {
        let deadline = Instant::now() + limit;
        let (done, end) = mpsc::sync_channel(1);
        let mut message = Message::Flush(done);
        while let Err(TrySendError::Full(back)) = self.0.queue.try_send(message) {
            if Instant::now() >= deadline {
                break;
            }
            message = back;
            thread::sleep(Duration::from_millis(5));
        }
        // A disk that is too slow leaves what waits behind.
        let _left = end.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        self.0.dropped.load(Ordering::Relaxed)
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
    /// Its last line was cut off by a full disk.
    is_cut: bool,
}

impl Rotating {
    fn open(path: PathBuf, limits: Limits) -> io::Result<Self> {
        let file = open(&path)?;
        let rotating = Self {
            path,
            limits,
            file,
            is_cut: false,
        };
        // What somebody was packing when it was killed.
        rotating.file.lock()?;
        let packed = rotating
            .is_current()
            .and_then(|is_current| match is_current {
                Some(_) => rotating.pack(),
                None => Ok(()),
            });
        rotating.file.unlock()?;
        if let Err(error) = packed {
            tracing::warn!(%error, "an older log file could not be packed");
        }
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
        let aside = match File::open(self.aside()) {
            Ok(aside) => aside,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let unfinished = self.named(".1.gz.new");
        let packed = pack_into(&aside, &unfinished);
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
    let to = private().write(true).create(true).truncate(true).open(to)?;
    let mut packer = GzEncoder::new(to, Compression::default());
    io::copy(&mut from, &mut packer)?;
    packer.finish().map(drop)
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

/// Opens or creates the file, for its owner alone.
fn open(path: &Path) -> io::Result<File> {
    match fs::symlink_metadata(path) {
        // To open a pipe would wait for its reader, and a link cannot be put aside.
        Ok(metadata) if !metadata.is_file() => {
            return Err(io::Error::other("it is no ordinary file"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = private().append(true).create(true).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        // Where it is somebody else's he decides.
        file.set_permissions(Permissions::from_mode(0o600)).ok();
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const SMALL: Limits = Limits {
        max_bytes: 100,
        kept: 3,
    };

    fn unpacked(path: &Path) -> String {
        let mut text = String::new();
        flate2::read::GzDecoder::new(File::open(path).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    /// Everything below a folder, oldest first.
    fn whole(path: &Path) -> String {
        let packed = (1..=9).rev().map(|number| {
            let name = format!("{}.{number}.gz", path.display());
            Some(name).filter(|name| Path::new(name).exists())
        });
        let packed: String = packed
            .flatten()
            .map(|name| unpacked(Path::new(&name)))
            .collect();
        packed + &fs::read_to_string(path).unwrap()
    }

    fn line(number: usize) -> String {
        format!("line {number:04} {}\n", "x".repeat(19))
    }

    #[test]
    fn it_is_packed_when_it_is_full_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let mut file = Rotating::open(path.clone(), SMALL).unwrap();
        for number in 0..30 {
            file.write(line(number).as_bytes()).unwrap();
        }
        let mut names: Vec<String> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["a.log", "a.log.1.gz", "a.log.2.gz", "a.log.3.gz"]);
        for name in &names {
            let mode = fs::metadata(folder.path().join(name)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        // Three lines fit; the last twelve are there, in order.
        let expected: String = (18..30).map(line).collect();
        assert_eq!(whole(&path), expected);
        // A line that is longer than a file is one all the same.
        file.write(&[b'y'; 500]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 500);
    }

    #[test]
    fn two_writers_of_one_file_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let limits = Limits {
            max_bytes: 2000,
            kept: 9,
        };
        thread::scope(|scope| {
            for writer in 0..2 {
                let path = path.clone();
                scope.spawn(move || {
                    let mut file = Rotating::open(path, limits).unwrap();
                    for number in 0..200 {
                        file.write(line(writer * 1000 + number).as_bytes()).unwrap();
                    }
                });
            }
        });
        let text = whole(&path);
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        let all = (0..200).chain(1000..1200).map(line);
        let all: Vec<String> = all.map(|line| line.trim_end().to_owned()).collect();
        assert_eq!(lines, all);
    }

    #[test]
    fn what_a_killed_one_left_is_packed_and_an_old_file_is_made_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        fs::write(&path, "new\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        fs::write(folder.path().join("a.log.1"), "old\n").unwrap();
        fs::write(folder.path().join("a.log.1.gz.new"), "half").unwrap();
        let mut file = Rotating::open(path.clone(), SMALL).unwrap();
        file.write(b"newest\n").unwrap();
        assert_eq!(whole(&path), "old\nnew\nnewest\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        // Taken away by somebody, it is begun anew.
        fs::remove_file(&path).unwrap();
        file.write(b"again\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "again\n");
    }

    #[test]
    fn whoever_logs_never_waits_and_what_is_dropped_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        // Nobody takes lines, as on a disk that is stuck.
        let (mut file, messages) = LogFile::unread();
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..10_000 {
            file.write_all(&line).unwrap();
        }
        let dropped = file.0.dropped.load(Ordering::Relaxed);
        assert_eq!(dropped, 10_000 - (QUEUE_BYTES / line.len()) as u64);
        assert_eq!(file.finish(Duration::from_millis(20)), dropped);
        // The disk goes on.
        let rotating = Rotating::open(path.clone(), LIMITS).unwrap();
        let shared = Arc::clone(&file.0);
        thread::spawn(move || write_all(rotating, &messages, &shared, true));
        assert_eq!(file.finish(Duration::from_secs(60)), 0);
        let text = fs::read_to_string(&path).unwrap();
        let told = text.lines().next().unwrap();
        let told: serde_json::Value = serde_json::from_str(told).unwrap();
        assert_eq!(told["missing"], dropped, "{told}");
        assert_eq!(text.lines().count() as u64, 1 + 10_000 - dropped);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
        let nowhere = folder.path().join("nowhere/a.log");
        for path in [Path::new("/dev/full"), folder.path(), &link, &nowhere] {
            let error = LogFile::start(path, true).unwrap_err();
            assert!(error.to_string().contains("LOG_FILE"), "{error}");
        }
    }
}
