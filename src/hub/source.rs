//! What goes into a repository: a file of this machine, or a text that is made.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    Stream, StreamExt as _, TryStreamExt as _,
    future::ready,
    stream::{once, try_unfold},
};
use nix::{errno::Errno, fcntl::OFlag};
use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::sync::CancellationToken;

use super::meter::Meter;
use crate::task;

/// Larger contents go to the large-file storage whatever the Hub says: these are held in memory.
pub(super) const MAX_INLINE_BYTES: u64 = 8 * 1024 * 1024;
/// What is read at once.
const PIECE_BYTES: usize = 256 * 1024;
/// Of a file's beginning, for the Hub to judge what it is.
const SAMPLE_BYTES: u64 = 512;
/// Opening a file takes so long at most.
const OPEN: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Clone)]
pub struct Source {
    name: String,
    size: u64,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    File { path: PathBuf, stamp: Stamp },
    Text(Bytes),
}

/// What tells a file from another one, and from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Of whatever there is of it: also where somebody sets the other one back.
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What a content is told by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sums {
    /// SHA-256, in hex: the name of a large file.
    pub(super) sha256: String,
    /// Git's id of it as a blob, in hex; of small contents alone.
    pub(super) blob: Option<String>,
}

impl Source {
    /// An ordinary file, which goes by `name` in the repository.
    pub(super) fn file(path: &Path, name: String) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no ordinary file"));
        }
        Ok(Self {
            name,
            size: metadata.len(),
            content: Content::File {
                path: path.to_owned(),
                stamp: Stamp::of(&metadata),
            },
        })
    }

    pub(super) fn text(name: &str, text: String) -> Self {
        Self {
            name: name.to_owned(),
            size: text.len() as u64,
            content: Content::Text(text.into()),
        }
    }

    /// Its name in the repository.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file, if it is still the one that was looked at. Blocks.
    pub(super) fn open(&self) -> io::Result<Opened> {
        match &self.content {
            Content::Text(text) => Ok(Opened::Text(io::Cursor::new(text.clone()))),
            Content::File { path, stamp } => {
                let file = open_ordinary(path)?;
                // Of the open file: it may be another one by now.
                if Stamp::of(&file.metadata()?) != *stamp {
                    return Err(changed());
                }
                Ok(Opened::File(file))
            }
        }
    }

    /// Its beginning. Blocks.
    pub(super) fn sample(&self) -> io::Result<Vec<u8>> {
        let mut sample = Vec::new();
        self.open()?.take(SAMPLE_BYTES).read_to_end(&mut sample)?;
        Ok(sample)
    }

    /// All of it, where it is small enough. Blocks.
    pub(super) fn whole(&self) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut opened = self.open()?.take(MAX_INLINE_BYTES + 1);
        opened.read_to_end(&mut content)?;
        let is_same = self.is_same(opened.get_ref())?;
        match is_same && content.len() as u64 == self.size {
            true => Ok(content),
            false => Err(changed()),
        }
    }

    /// Is what was opened still what was looked at?
    fn is_same(&self, opened: &Opened) -> io::Result<bool> {
        match (opened, &self.content) {
            (Opened::File(file), Content::File { stamp, .. }) => {
                Ok(Stamp::of(&file.metadata()?) == *stamp)
            }
            _ => Ok(true),
        }
    }

    /// A part of it, a piece at a time, opened when it is first asked for. Its last piece comes only if
    /// the file is still what was looked at: what is sent is what its sum says, or not whole.
    pub(super) fn stream(
        self,
        range: Range<u64>,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        let opened = async move {
            let source = self.clone();
            let opened = task::blocking_apart("opening a file", OPEN, move || source.open()).await;
            match opened.map_err(io::Error::other)?? {
                Opened::Text(text) => {
                    io::Result::Ok(once(ready(whole_part(text.get_ref(), &range))).boxed())
                }
                Opened::File(file) => {
                    let mut file = tokio::fs::File::from_std(file);
                    file.seek(io::SeekFrom::Start(range.start)).await?;
                    let left = range.end - range.start;
                    Ok(try_unfold((self, file, left), next_piece).boxed())
                }
            }
        };
        once(opened).try_flatten().boxed()
    }

    /// Reads all of it, a piece at a time. Blocks until it is done or `stop` is cancelled.
    pub(super) fn sums(&self, meter: &Meter, stop: &CancellationToken) -> io::Result<Sums> {
        let mut opened = self.open()?;
        let mut sha256 = Sha256::new();
        let mut blob = (self.size <= MAX_INLINE_BYTES).then(|| {
            let mut blob = Sha1::new();
            blob.update(format!("blob {}\0", self.size));
            blob
        });
        let mut piece = vec![0; PIECE_BYTES];
        let mut read = 0;
        loop {
            if stop.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let count = match opened.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            sha256.update(&piece[..count]);
            if let Some(blob) = &mut blob {
                blob.update(&piece[..count]);
            }
            read += count as u64;
            if read > self.size {
                return Err(changed());
            }
            meter.add(count as u64);
        }
        if !self.is_same(&opened)? {
            return Err(changed());
        }
        Ok(Sums {
            sha256: hex::encode(sha256.finalize()),
            blob: blob.map(|blob| hex::encode(blob.finalize())),
        })
    }
}

type Reading = (Source, tokio::fs::File, u64);

async fn next_piece((source, mut file, left): Reading) -> io::Result<Option<(Bytes, Reading)>> {
    if left == 0 {
        return Ok(None);
    }
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    let count = (&mut file).take(left).read_buf(&mut piece).await?;
    // It was cut off.
    let left = left - count as u64;
    if count == 0 {
        return Err(changed());
    }
    if left == 0 {
        let metadata = file.metadata().await?;
        let is_same = matches!(&source.content, Content::File { stamp, .. }
            if Stamp::of(&metadata) == *stamp);
        if !is_same {
            return Err(changed());
        }
    }
    Ok(Some((piece.freeze(), (source, file, left))))
}

fn whole_part(text: &Bytes, range: &Range<u64>) -> io::Result<Bytes> {
    let ends = |at: u64| usize::try_from(at).ok().filter(|at| *at <= text.len());
    match (ends(range.start), ends(range.end)) {
        (Some(start), Some(end)) if start <= end => Ok(text.slice(start..end)),
        _ => Err(changed()),
    }
}

/// Opens an ordinary file, and nothing else that may lie there by now: a link is not followed, and a
/// pipe not waited for.
pub(super) fn open_ordinary(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == Errno::ELOOP as i32 => changed(),
        _ => error,
    })?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(changed()),
    }
}

fn changed() -> io::Error {
    io::Error::other("it changed meanwhile; run the same command again once it is written")
}

/// A source that is being read.
#[derive(Debug)]
pub(super) enum Opened {
    File(File),
    Text(io::Cursor<Bytes>),
}

impl Read for Opened {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => Read::read(file, buffer),
            Self::Text(text) => Read::read(text, buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(source: &Source) -> io::Result<Sums> {
        source.sums(&Meter::default(), &CancellationToken::new())
    }

    #[test]
    fn sums_are_those_of_git_and_of_lfs() {
        let source = Source::text("README.md", "hello\n".to_owned());
        let sums = sums(&source).unwrap();
        // `git hash-object`, `sha256sum`.
        assert_eq!(
            sums.blob.as_deref(),
            Some("ce013625030ba8dba906f756967f9e9ca394464a")
        );
        assert_eq!(
            sums.sha256,
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
        assert_eq!(source.sample().unwrap(), b"hello\n");
        assert_eq!(source.whole().unwrap(), b"hello\n");
    }

    #[test]
    fn a_file_that_changed_since_it_was_chosen_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "one").unwrap();
        let source = Source::file(&path, "a".to_owned()).unwrap();
        assert_eq!(source.whole().unwrap(), b"one");
        fs::remove_file(&path).unwrap();
        fs::write(folder.path().join("secret"), "two").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), &path).unwrap();
        for error in [
            source.whole().unwrap_err(),
            source.sample().unwrap_err(),
            sums(&source).unwrap_err(),
        ] {
            assert!(error.to_string().contains("changed meanwhile"), "{error}");
        }
        assert!(Source::file(&path, "a".to_owned()).is_err());
        assert!(open_ordinary(&path).is_err(), "wherever it leads");
    }

    #[tokio::test]
    async fn the_end_of_a_file_that_changed_meanwhile_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let size = PIECE_BYTES + 1;
        fs::write(&path, vec![1; size]).unwrap();
        let all = 0..size as u64;
        for changes in [false, true] {
            let source = Source::file(&path, "a".to_owned()).unwrap();
            let mut pieces = source.stream(all.clone());
            let first = pieces.next().await.unwrap().unwrap();
            assert!(first.len() <= PIECE_BYTES);
            if changes {
                // As large as before; a clock may tick too slowly to tell.
                fs::write(&path, vec![2; size]).unwrap();
                let file = File::options().write(true).open(&path).unwrap();
                file.set_modified(std::time::UNIX_EPOCH).unwrap();
            }
            let rest: io::Result<Vec<Bytes>> = pieces.try_collect().await;
            assert_eq!(rest.is_err(), changes, "{rest:?}");
        }
    }

    #[test]
    fn reading_stops_when_it_is_told_to() {
        let stop = CancellationToken::new();
        stop.cancel();
        let source = Source::text("a", "x".to_owned());
        assert!(source.sums(&Meter::default(), &stop).is_err());
    }
}
