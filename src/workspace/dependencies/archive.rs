//! A master as one compressed file on the workspace, for the next container: it unpacks instead of
//! installing.
//!
//! ```text
//! "GRNMOD01"  length of the head (u32)  head: zstd of JSON  the parts: zstd of files, one after
//!                                                           the other in the inventory's order
//! ```
//! Nothing in it is believed: paths stay below the tree's root and never go through a link, each
//! file has the length and digest that the inventory says, and the inventory is for this key.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, symlink},
    },
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::inventory::{Entry, Inventory, What, side_by_side};

const MAGIC: &[u8; 8] = b"GRNMOD01";
/// zstd's fastest of the ordinary ones: 45 MB of a site's 155.
const LEVEL: i32 = 1;
/// Parts, to be packed and unpacked side by side.
const PARTS: usize = 4;
/// A larger tree is not kept, or is no tree of ours.
const MOST_BYTES: u64 = 2 << 30;
const MOST_HEAD: u64 = 64 << 20;
/// Of one user; the least recently used go.
const MOST_ARCHIVES: usize = 4;

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    inventory: Inventory,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Part {
    /// Compressed bytes.
    length: u64,
    /// How many of the inventory's files are in it.
    files: usize,
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn files(inventory: &Inventory) -> Vec<&Entry> {
    let is_file = |entry: &&Entry| matches!(entry.what, What::File { .. });
    inventory.entries.iter().filter(is_file).collect()
}

/// Writes an archive of a tree; it appears under its name complete or not at all. Blocking.
pub(super) fn pack(root: &Path, inventory: &Inventory, archive: &Path) -> io::Result<()> {
    if inventory.size() > MOST_BYTES {
        return Err(broken("too large to be kept"));
    }
    let all = files(inventory);
    let shares = shares(&all);
    let packed = side_by_side(&shares, |share| {
        let mut part = zstd::Encoder::new(Vec::new(), LEVEL)?;
        for entry in *share {
            io::copy(&mut File::open(root.join(&entry.path))?, &mut part)?;
        }
        part.finish()
    })?;
    let parts = shares.iter().zip(&packed).map(|(share, packed)| Part {
        length: packed.len() as u64,
        files: share.len(),
    });
    let head = Head {
        inventory: inventory.clone(),
        parts: parts.collect(),
    };
    let head = zstd::encode_all(&*serde_json::to_vec(&head)?, LEVEL)?;
    let length = u32::try_from(head.len()).map_err(|_| broken("too many files to be kept"))?;
    let folder = archive.parent().expect("archives have a folder");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    let fresh = folder.join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(MAGIC)?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&head)?;
        for part in &packed {
            file.write_all(part)?;
        }
        file.sync_all()?;
        fs::rename(&fresh, archive)
    })();
    if written.is_err() {
        fs::remove_file(&fresh).ok();
    }
    written?;
    prune(folder);
    Ok(())
}

/// Cuts a list of files into parts of about one size.
fn shares<'a, 'b>(all: &'b [&'a Entry]) -> Vec<&'b [&'a Entry]> {
    let size = |entry: &Entry| match entry.what {
        What::File { size, .. } => size + 512,
        What::Folder | What::Link(_) => 0,
    };
    let total: u64 = all.iter().map(|entry| size(entry)).sum();
    let wanted = total.div_ceil(PARTS as u64).max(1);
    let mut shares = Vec::new();
    let (mut begin, mut filled) = (0, 0);
    for (index, entry) in all.iter().enumerate() {
        filled += size(entry);
        if filled >= wanted {
            shares.push(&all[begin..=index]);
            (begin, filled) = (index + 1, 0);
        }
    }
    if begin < all.len() {
        shares.push(&all[begin..]);
    }
    shares
}

fn prune(folder: &Path) {
    let mut archives: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    archives.sort();
    let surplus = archives.len().saturating_sub(MOST_ARCHIVES);
    for (_, path) in archives.drain(..surplus) {
        fs::remove_file(path).ok();
    }
}

/// Unpacks an archive into a new folder and answers with what is in it; nothing of it counts where
/// this fails. Blocking.
///
/// # Errors
/// If it is no whole archive of a tree for this key, or the disk fails.
pub(super) fn restore(archive: &Path, key: &str, root: &Path) -> io::Result<Inventory> {
    let mut file = File::open(archive)?;
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    let mut length = [0; 4];
    file.read_exact(&mut length)?;
    if magic != *MAGIC {
        return Err(broken("no archive of ours"));
    }
    let length = u64::from(u32::from_le_bytes(length));
    let begin = 12 + length;
    let head = zstd::Decoder::new((&mut file).take(length))?.take(MOST_HEAD);
    let Head { inventory, parts } =
        serde_json::from_reader(io::BufReader::new(head)).map_err(io::Error::other)?;
    if inventory.key != key {
        return Err(broken("it was made for another lockfile"));
    }
    if inventory.size() > MOST_BYTES || !inventory.entries.iter().all(is_harmless) {
        return Err(broken("it holds what no tree of ours does"));
    }
    let folder = |path: &Path| fs::DirBuilder::new().mode(0o755).create(path);
    folder(root)?;
    for entry in &inventory.entries {
        if entry.what == What::Folder {
            folder(&root.join(&entry.path))?;
        }
    }
    let all = files(&inventory);
    let mut jobs = Vec::new();
    let (mut offset, mut first) = (begin, 0_usize);
    for part in &parts {
        let end = first
            .checked_add(part.files)
            .filter(|end| *end <= all.len());
        let end = end.ok_or_else(|| broken("its parts are not its files"))?;
        jobs.push((offset, part.length, &all[first..end]));
        offset = offset.saturating_add(part.length);
        first = end;
    }
    if first != all.len() {
        return Err(broken("its parts are not its files"));
    }
    side_by_side(&jobs, |(offset, length, entries)| {
        let mut file = File::open(archive)?;
        file.seek(SeekFrom::Start(*offset))?;
        let mut part = zstd::Decoder::new(file.take(*length))?;
        entries
            .iter()
            .try_for_each(|entry| unpack(&mut part, root, entry))
    })?;
    // Last, so that no file is written through one.
    for entry in &inventory.entries {
        if let What::Link(target) = &entry.what {
            symlink(target, root.join(&entry.path))?;
        }
    }
    // The least recently used go first.
    let now = std::time::SystemTime::now();
    File::options()
        .append(true)
        .open(archive)?
        .set_modified(now)
        .ok();
    Ok(inventory)
}

/// Plain names below the root.
fn is_harmless(entry: &Entry) -> bool {
    let path = entry.path.as_os_str();
    !path.is_empty()
        && entry
            .path
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        && !path.as_bytes().contains(&0)
}

fn unpack(part: &mut impl Read, root: &Path, entry: &Entry) -> io::Result<()> {
    let What::File {
        is_executable,
        size,
        digest,
    } = &entry.what
    else {
        return Ok(());
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(if *is_executable { 0o555 } else { 0o444 })
        .open(root.join(&entry.path))?;
    let mut hash = Sha256::new();
    let mut left = *size;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let length = part.read(&mut buffer[..most])?;
        if length == 0 {
            return Err(broken("it is cut off"));
        }
        hash.update(&buffer[..length]);
        file.write_all(&buffer[..length])?;
        left -= length as u64;
    }
    if hex::encode(hash.finalize()) != *digest {
        return Err(broken("a file in it is not what it should be"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Disk(tempfile::TempDir);

    impl Disk {
        /// A tree and its archive.
        fn new() -> (Self, Inventory) {
            let disk = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(disk.at("tree/p/lib")).unwrap();
            for number in 0..40 {
                let text = format!("{number}").repeat(number * 1000);
                fs::write(disk.at(&format!("tree/p/lib/{number}.js")), text).unwrap();
            }
            symlink("../p/lib/1.js", disk.at("tree/p/one")).unwrap();
            let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
            fs::write(disk.at("tree/p").join(odd), "odd").unwrap();
            symlink(odd, disk.at("tree/p/to-odd")).unwrap();
            let inventory = Inventory::take(&disk.at("tree"), "key").unwrap();
            pack(&disk.at("tree"), &inventory, &disk.at("a/x.zst")).unwrap();
            (disk, inventory)
        }

        fn at(&self, path: &str) -> std::path::PathBuf {
            self.0.path().join(path)
        }

        fn restore(&self, key: &str) -> io::Result<Inventory> {
            let root = self.at("back");
            fs::remove_dir_all(&root).ok();
            restore(&self.at("a/x.zst"), key, &root)
        }

        /// Writes an archive whose head says this.
        fn forge(&self, entries: Vec<Entry>, content: &[u8]) {
            let head = Head {
                inventory: Inventory {
                    key: "key".to_owned(),
                    entries,
                },
                parts: vec![Part {
                    length: zstd::encode_all(content, 1).unwrap().len() as u64,
                    files: 1,
                }],
            };
            let head = zstd::encode_all(&*serde_json::to_vec(&head).unwrap(), 1).unwrap();
            let length = u32::try_from(head.len()).unwrap().to_le_bytes();
            let part = zstd::encode_all(content, 1).unwrap();
            fs::write(
                self.at("a/x.zst"),
                [&MAGIC[..], &length, &head, &part].concat(),
            )
            .unwrap();
        }
    }

    #[test]
    fn a_tree_comes_back_as_it_was() {
        let (disk, inventory) = Disk::new();
        assert_eq!(disk.restore("key").unwrap(), inventory);
        assert!(inventory.is_of(&disk.at("back")));
        let file = fs::metadata(disk.at("back/p/lib/1.js")).unwrap();
        assert!(file.permissions().readonly());
        assert!(disk.restore("another").is_err());
    }

    #[test]
    fn what_is_broken_anywhere_is_refused() {
        let (disk, _) = Disk::new();
        let whole = fs::read(disk.at("a/x.zst")).unwrap();
        for cut in [0, 5, 11, 40, whole.len() / 2, whole.len() - 1] {
            fs::write(disk.at("a/x.zst"), &whole[..cut]).unwrap();
            assert!(disk.restore("key").is_err(), "cut at {cut}");
        }
        for at in (0..whole.len()).step_by(whole.len() / 50) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x41;
            fs::write(disk.at("a/x.zst"), bytes).unwrap();
            // A byte that says nothing of the tree may be another.
            if let Ok(inventory) = disk.restore("key") {
                assert!(inventory.is_of(&disk.at("back")), "changed at {at}");
            }
        }
    }

    #[test]
    fn what_is_forged_stays_inside() {
        let (disk, _) = Disk::new();
        let file = |path: &str| Entry {
            path: path.into(),
            what: What::File {
                is_executable: false,
                size: 3,
                digest: hex::encode(Sha256::digest(b"abc")),
            },
        };
        let link = |path: &str, target: &str| Entry {
            path: path.into(),
            what: What::Link(target.into()),
        };
        disk.forge(vec![file("fine.js")], b"abc");
        disk.restore("key").unwrap();
        let outside = disk.at("outside");
        fs::create_dir(&outside).unwrap();
        let outside = outside.to_str().unwrap();
        for entries in [
            vec![file("../outside/a")],
            vec![file(&format!("{outside}/a"))],
            vec![file("./a")],
            vec![file("")],
            vec![link("out", outside), file("out/a")],
            vec![file("a"), file("a")],
        ] {
            disk.forge(entries.clone(), b"abc");
            assert!(disk.restore("key").is_err(), "{entries:?}");
        }
        // Longer than it says, and other than it says.
        disk.forge(vec![file("a")], &vec![0; 50 << 20]);
        assert!(disk.restore("key").is_err());
        assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    }

    #[test]
    fn the_least_recently_used_archives_go() {
        let (disk, inventory) = Disk::new();
        for number in 0..MOST_ARCHIVES {
            let archive = disk.at(&format!("a/{number}.zst"));
            pack(&disk.at("tree"), &inventory, &archive).unwrap();
        }
        assert!(!disk.at("a/x.zst").exists());
        assert_eq!(fs::read_dir(disk.at("a")).unwrap().count(), MOST_ARCHIVES);
    }
}
