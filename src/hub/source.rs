//! What goes into a repository: a file of this machine, or a text that is made.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::meter::Meter;

/// Larger contents go to the large-file storage whatever the Hub says: these are held in memory.
pub(super) const MAX_INLINE_BYTES: u64 = 8 * 1024 * 1024;
/// What is read at once.
const PIECE_BYTES: usize = 256 * 1024;
/// Of a file's beginning, for the Hub to judge what it is.
const SAMPLE_BYTES: u64 = 512;

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
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
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
                let file = File::open(path)?;
                // Of the open file: a link in its place leads to another inode.
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
        match content.len() as u64 == self.size {
            true => Ok(content),
            false => Err(changed()),
        }
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
        if let (Opened::File(file), Content::File { stamp, .. }) = (&opened, &self.content)
            && Stamp::of(&file.metadata()?) != *stamp
        {
            return Err(changed());
        }
        Ok(Sums {
            sha256: hex::encode(sha256.finalize()),
            blob: blob.map(|blob| hex::encode(blob.finalize())),
        })
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
            Self::File(file) => file.read(buffer),
            Self::Text(text) => text.read(buffer),
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
    }

    #[test]
    fn reading_stops_when_it_is_told_to() {
        let stop = CancellationToken::new();
        stop.cancel();
        let source = Source::text("a", "x".to_owned());
        assert!(source.sums(&Meter::default(), &stop).is_err());
    }
}
