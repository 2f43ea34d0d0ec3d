//! What a master is made of, file by file with its digest: a hard-linked file can be written from
//! inside a worktree, and an archive lies where others can reach it.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    num::NonZero,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    thread,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Files are read side by side, by so many threads at most.
const MOST_THREADS: usize = 4;

/// All of a tree, in the order of its paths: a folder comes before what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inventory {
    /// What the tree was made for.
    pub(super) key: String,
    pub(super) entries: Vec<Entry>,
}

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Below the tree's root.
    #[serde(with = "any_name")]
    pub(super) path: PathBuf,
    pub(super) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    Folder,
    Link(#[serde(with = "any_name")] PathBuf),
    File {
        is_executable: bool,
        size: u64,
        /// SHA-256, in hex.
        digest: String,
    },
}

impl Inventory {
    /// Reads a whole tree. Blocking.
    pub(super) fn take(root: &Path, key: &str) -> io::Result<Self> {
        let mut entries = Vec::new();
        let mut files = Vec::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(below) = folders.pop() {
            for entry in fs::read_dir(root.join(&below))? {
                let entry = entry?;
                let path = below.join(entry.file_name());
                let kind = entry.file_type()?;
                let what = if kind.is_dir() {
                    folders.push(path.clone());
                    What::Folder
                } else if kind.is_symlink() {
                    What::Link(fs::read_link(entry.path())?)
                } else if kind.is_file() {
                    files.push(path);
                    continue;
                } else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                entries.push(Entry { path, what });
            }
        }
        entries.extend(side_by_side(&files, |path| read(root, path))?);
        let bytes = |entry: &Entry| entry.path.as_os_str().as_bytes().to_vec();
        entries.sort_by_cached_key(bytes);
        let key = key.to_owned();
        Ok(Self { key, entries })
    }

    /// Is a tree still as it was, to the last byte? Blocking.
    pub(super) fn is_of(&self, root: &Path) -> bool {
        Self::take(root, &self.key).is_ok_and(|now| now == *self)
    }

    /// Bytes in all files.
    pub(super) fn size(&self) -> u64 {
        let sizes = self.entries.iter().map(|entry| match entry.what {
            What::File { size, .. } => size,
            What::Folder | What::Link(_) => 0,
        });
        sizes.fold(0, u64::saturating_add)
    }
}

/// Names are bytes; JSON has them as text where they are text, else as a list of numbers.
mod any_name {
    use serde::{Deserializer, Serializer};

    use super::{Deserialize, OsStrExt, OsString, OsStringExt, Path, PathBuf, Serialize};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => to.serialize_str(text),
            None => path.as_os_str().as_bytes().serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Written::deserialize(from)? {
            Written::Text(text) => text.into(),
            Written::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

fn read(root: &Path, path: &Path) -> io::Result<Entry> {
    let mut file = File::open(root.join(path))?;
    let is_executable = file.metadata()?.permissions().mode() & 0o111 != 0;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        digest.update(&buffer[..length]);
        size += length as u64;
    }
    Ok(Entry {
        path: path.to_owned(),
        what: What::File {
            is_executable,
            size,
            digest: hex::encode(digest.finalize()),
        },
    })
}

/// Does the same to each of a list, in a few threads; the first failure is the answer.
pub(super) fn side_by_side<T: Sync, R: Send>(
    list: &[T],
    work: impl Fn(&T) -> io::Result<R> + Sync,
) -> io::Result<Vec<R>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = threads.min(MOST_THREADS);
    let share = list.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let shares: Vec<_> = list
            .chunks(share)
            .map(|share| scope.spawn(|| share.iter().map(&work).collect::<io::Result<Vec<R>>>()))
            .collect();
        let mut all = Vec::with_capacity(list.len());
        for share in shares {
            all.extend(
                share
                    .join()
                    .map_err(|_| io::Error::other("a reader broke off"))??,
            );
        }
        Ok(all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_change_of_a_tree_is_seen() {
        let disk = tempfile::tempdir().unwrap();
        let at = |path: &str| disk.path().join(path);
        fs::create_dir_all(at("p/lib")).unwrap();
        fs::write(at("p/lib/a.js"), "aaa").unwrap();
        fs::write(at("p/b.js"), "b").unwrap();
        std::os::unix::fs::symlink("b.js", at("p/c")).unwrap();
        let odd = OsString::from_vec(b"p/\xff\xfe".to_vec());
        std::os::unix::fs::symlink(&odd, disk.path().join(&odd)).unwrap();
        let inventory = Inventory::take(disk.path(), "k").unwrap();
        assert!(inventory.is_of(disk.path()));
        assert_eq!(inventory.size(), 4);
        let back: Inventory =
            serde_json::from_slice(&serde_json::to_vec(&inventory).unwrap()).unwrap();
        assert_eq!(back, inventory);
        let links = inventory.entries.iter();
        let links: Vec<_> = links.filter(|e| matches!(e.what, What::Link(_))).collect();
        assert_eq!(links.len(), 2, "{links:?}");

        // Of the same length and time.
        let time = fs::metadata(at("p/lib/a.js")).unwrap().modified().unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(at("p/lib/a.js"))
            .unwrap();
        io::Write::write_all(&mut &file, b"abc").unwrap();
        file.set_modified(time).unwrap();
        assert!(!inventory.is_of(disk.path()));
        fs::write(at("p/lib/a.js"), "aaa").unwrap();
        assert!(inventory.is_of(disk.path()));
        fs::write(at("p/more.js"), "").unwrap();
        assert!(!inventory.is_of(disk.path()));
        fs::remove_file(at("p/more.js")).unwrap();
        fs::remove_file(at("p/c")).unwrap();
        assert!(!inventory.is_of(disk.path()));
    }
}
