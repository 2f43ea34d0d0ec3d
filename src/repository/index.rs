//! git's index of a worktree: which files the branch's commit has, and what they looked like on
//! disk when their content was last read.
//!
//! We read and write the file ourselves, because libgit2 takes ten times as long for it as all the
//! rest of a commit. What git writes is read in versions 2 to 4; what we write is version 2, which
//! every git reads.
//!
//! **Invariant:** an [`Index`] holds what one tree holds, no more and no less, and knows which. What
//! somebody staged beside it has no say: the worktree alone decides what is committed.
//!
//! **Invariant:** an entry vouches for its file (has a [`Stat`] other than [`Stat::NONE`]) only if
//! every later change of the file shows in its stat; see [`Stat::is_settled`].

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use git2::{ObjectType, Oid, Repository, Tree};
use nix::{fcntl::OFlag, sys::stat::FileStat};
use sha1::{Digest as _, Sha1};

/// A file's mode in git: a symlink.
pub(super) const LINK_MODE: u32 = 0o120_000;
/// The same of a submodule's place, which has no file.
pub(super) const SUBMODULE_MODE: u32 = 0o160_000;

/// Largest index that is read, in bytes: that of several million files.
const MAX_BYTES: u64 = 1 << 30;
/// Deepest folder of a commit.
const MAX_DEPTH: usize = 1_000;
const HASH: usize = 20;
/// Fixed part of an entry before its name, without the extended flags.
const FIXED: usize = 62;
const ASSUME_VALID: u16 = 0x8000;
const EXTENDED: u16 = 0x4000;
const STAGE: u16 = 0x3000;
const NAME_LENGTH: u16 = 0x0fff;

/// A moment of the file system's clock: seconds and nanoseconds, cut to 32 bits as in the index.
pub(super) type Moment = (u32, u32);

/// What is compared of a file to know that it did not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Stat {
    ctime: Moment,
    mtime: Moment,
    dev: u32,
    ino: u32,
    uid: u32,
    gid: u32,
    size: u32,
}

impl Stat {
    /// Vouches for nothing: no file was last changed at the beginning of 1970.
    pub(super) const NONE: Self = Self {
        ctime: (0, 0),
        mtime: (0, 0),
        dev: 0,
        ino: 0,
        uid: 0,
        gid: 0,
        size: 0,
    };

    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            ctime: (stat.st_ctime as u32, stat.st_ctime_nsec as u32),
            mtime: (stat.st_mtime as u32, stat.st_mtime_nsec as u32),
            dev: stat.st_dev as u32,
            ino: stat.st_ino as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u32,
        }
    }

    /// Is it the same file, unchanged? Owner and device say nothing about its content, and the
    /// latter is another one after each mount of a network file system.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.ctime, self.mtime, self.ino, self.size)
            == (other.ctime, other.mtime, other.ino, other.size)
    }

    /// Will every change from `now` on (a moment before its content was read) show in it? One in
    /// the same tick of the clock would not. The kernel sets `ctime` with every change, and nobody
    /// can set it back.
    pub(super) fn is_settled(&self, now: Moment) -> bool {
        self.ctime < now && self.mtime < now
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }
}

/// One file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) stat: Stat,
    pub(super) mode: u32,
    pub(super) id: Oid,
}

impl Entry {
    /// One that vouches for nothing.
    pub(super) fn blank(id: Oid, mode: u32) -> Self {
        Self {
            stat: Stat::NONE,
            mode,
            id,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    entry: Entry,
    name_at: u32,
    name_len: u32,
}

/// All files of a tree, in git's order.
#[derive(Debug, Default)]
pub(super) struct Index {
    slots: Vec<Slot>,
    names: Vec<u8>,
    tree: Option<Oid>,
    /// Paths of a merge that somebody left unsettled in the file.
    unsettled: Vec<Vec<u8>>,
}

/// Why an index cannot be read; it is made anew then.
/// An index that was written and is not yet the one. Dropped, nothing has changed.
pub(super) struct NextIndex {
    lock: Option<PathBuf>,
    file: PathBuf,
}

impl NextIndex {
    /// Puts it in place.
    pub(super) fn finish(mut self) -> io::Result<()> {
        let Some(lock) = &self.lock else {
            return Ok(());
        };
        fs::rename(lock, &self.file)?;
        self.lock = None;
        Ok(())
    }
}

impl Drop for NextIndex {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            fs::remove_file(lock).ok();
        }
    }
}

#[derive(Debug)]
pub(super) struct Damaged(&'static str);

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl Index {
    /// The index of `tree`, with what `file` knows of the files on disk. Whether that file was
    /// damaged is said beside; a missing one is not.
    pub(super) fn load(
        file: &Path,
        repo: &Repository,
        tree: &Tree<'_>,
    ) -> Result<(Self, Option<Damaged>), git2::Error> {
        Self::of_known(Self::read(file), repo, tree)
    }

    /// As [`load`](Self::load), of what [`read`](Self::read) has found.
    pub(super) fn of_known(
        known: Result<Self, Damaged>,
        repo: &Repository,
        tree: &Tree<'_>,
    ) -> Result<(Self, Option<Damaged>), git2::Error> {
        let (known, damage) = match known {
            Ok(known) => (known, None),
            Err(damage) => (Self::default(), Some(damage)),
        };
        if known.tree == Some(tree.id()) {
            return Ok((known, damage));
        }
        let mut index = Self::of_tree(repo, tree)?;
        index.learn(&known);
        index.unsettled = known.unsettled;
        Ok((index, damage))
    }

    /// Is the file exactly the index of this tree?
    pub(super) fn is_of(&self, tree: Oid) -> bool {
        self.tree == Some(tree)
    }

    /// The tree whose index this file is, if it is that of one.
    pub(super) fn tree_of(file: &Path) -> Option<Oid> {
        Self::read(file).ok()?.tree
    }

    /// Paths of a merge that somebody left unsettled.
    pub(super) fn unsettled(&self) -> &[Vec<u8>] {
        &self.unsettled
    }

    /// A tree's files, vouching for nothing. Not yet that tree's index on disk.
    pub(super) fn of_tree(repo: &Repository, tree: &Tree<'_>) -> Result<Self, git2::Error> {
        let mut index = Self::default();
        index.add_folder(repo, tree, &mut Vec::new(), 0)?;
        Ok(index)
    }

    fn add_folder(
        &mut self,
        repo: &Repository,
        tree: &Tree<'_>,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), git2::Error> {
        let length = path.len();
        for entry in tree {
            path.truncate(length);
            path.extend_from_slice(entry.name_bytes());
            let is_path = is_path(path);
            let is_folder = entry.kind() == Some(ObjectType::Tree);
            if is_folder {
                // git's order takes a folder's name with a `/` at its end.
                path.push(b'/');
            }
            let last = self.slots.len().checked_sub(1);
            let is_next = last.is_none_or(|last| self.name(last) < path.as_slice());
            if !is_path || !is_next || depth > MAX_DEPTH {
                return Err(git2::Error::from_str(
                    "the commit holds names that no file can have",
                ));
            }
            if is_folder {
                self.add_folder(repo, &repo.find_tree(entry.id())?, path, depth + 1)?;
                continue;
            }
            let at = self.names.len();
            self.names.extend_from_slice(path);
            self.push(at, Entry::blank(entry.id(), mode_of(entry.filemode())));
        }
        path.truncate(length);
        Ok(())
    }

    /// Takes over what `known` knows of files that have the same content here.
    fn learn(&mut self, known: &Self) {
        let mut at = 0;
        for slot in 0..self.slots.len() {
            let name = self.name(slot);
            while at < known.slots.len() && known.name(at) < name {
                at += 1;
            }
            if at < known.slots.len() && known.name(at) == name {
                let (own, theirs) = (&mut self.slots[slot].entry, known.slots[at].entry);
                if (own.id, own.mode) == (theirs.id, theirs.mode) {
                    own.stat = theirs.stat;
                }
            }
        }
    }

    fn push(&mut self, name_at: usize, entry: Entry) {
        self.slots.push(Slot {
            entry,
            name_at: name_at as u32,
            name_len: (self.names.len() - name_at) as u32,
        });
    }

    /// How many files there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The path of the file at this place.
    pub(super) fn name(&self, slot: usize) -> &[u8] {
        let slot = &self.slots[slot];
        &self.names[slot.name_at as usize..][..slot.name_len as usize]
    }

    pub(super) fn entry(&self, slot: usize) -> &Entry {
        &self.slots[slot].entry
    }

    /// Notes what the file looks like on disk, having the entry's content.
    pub(super) fn know(&mut self, slot: usize, stat: Stat) {
        self.slots[slot].entry.stat = stat;
    }

    /// Does the entry know this state of its file as the one whose content it has?
    pub(super) fn vouches(&self, slot: usize, stat: &Stat) -> bool {
        let own = &self.slots[slot].entry.stat;
        own.is_same(stat)
    }

    /// The first place in `range` for which `is_before` does not hold.
    pub(super) fn partition(
        &self,
        range: std::ops::Range<usize>,
        is_before: impl Fn(&[u8]) -> bool,
    ) -> usize {
        let (mut low, mut high) = (range.start, range.end);
        while low < high {
            let middle = low.midpoint(high);
            if is_before(self.name(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    pub(super) fn read(file: &Path) -> Result<Self, Damaged> {
        // Looked at before it is known what stands there: a link is not followed, and opening a pipe
        // must not wait for a writer.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let open = || {
            File::options()
                .read(true)
                .custom_flags(flags.bits())
                .open(file)
        };
        let opened = match open() {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(_) => return Err(Damaged("it cannot be opened")),
        };
        let about = opened.metadata().map_err(|_| Damaged("it has no size"))?;
        if !about.is_file() || about.len() > MAX_BYTES {
            return Err(Damaged("it is no file of a sensible size"));
        }
        let mut bytes = Vec::with_capacity(about.len() as usize);
        io::Read::read_to_end(&mut io::Read::take(opened, MAX_BYTES), &mut bytes)
            .map_err(|_| Damaged("it cannot be read"))?;
        let mut index = Self::parse(bytes)?;
        let written = (about.mtime() as u32, about.mtime_nsec() as u32);
        for slot in &mut index.slots {
            if !slot.entry.stat.is_settled(written) {
                slot.entry.stat = Stat::NONE;
            }
        }
        Ok(index)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, Damaged> {
        const SHORT: Damaged = Damaged("it is cut off");
        let body = bytes.len().checked_sub(HASH).ok_or(SHORT)?;
        let (content, sum) = bytes.split_at(body);
        // A sum of zeros is none: git may be told not to make one.
        if sum != [0; HASH] && Sha1::digest(content).as_slice() != sum {
            return Err(Damaged("its sum is wrong"));
        }
        let number = |at: usize| -> Result<u32, Damaged> {
            let bytes = content.get(at..at + 4).ok_or(SHORT)?;
            Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes")))
        };
        if content.get(..4) != Some(b"DIRC") {
            return Err(Damaged("it is no index"));
        }
        let (version, count) = (number(4)?, number(8)?);
        if !(2..=4).contains(&version) {
            return Err(Damaged("its version is unknown"));
        }
        let mut index = Self::default();
        let mut at = 12;
        let mut last = Vec::new();
        let mut hidden = false;
        index.slots.reserve((count as usize).min(body / FIXED));
        for _ in 0..count {
            let start = at;
            let fixed = content.get(at..at + FIXED).ok_or(SHORT)?;
            let field = |n: usize| u32::from_be_bytes(fixed[n * 4..][..4].try_into().expect("4"));
            let flags = u16::from_be_bytes([fixed[60], fixed[61]]);
            at += FIXED;
            let mut extended = 0;
            if flags & EXTENDED != 0 {
                let more = content.get(at..at + 2).ok_or(SHORT)?;
                extended = u16::from_be_bytes([more[0], more[1]]);
                at += 2;
            }
            let mut stripped = 0;
            if version == 4 {
                // An offset in base 128, each digit but the first one more than it says.
                let mut byte = *content.get(at).ok_or(SHORT)?;
                at += 1;
                stripped = usize::from(byte & 0x7f);
                while byte & 0x80 != 0 {
                    byte = *content.get(at).ok_or(SHORT)?;
                    at += 1;
                    stripped = ((stripped + 1) << 7) | usize::from(byte & 0x7f);
                    if stripped > body {
                        return Err(SHORT);
                    }
                }
            }
            let length = match flags & NAME_LENGTH {
                NAME_LENGTH => None,
                length if version < 4 => Some(usize::from(length)),
                _ => None,
            };
            let rest = content.get(at..).ok_or(SHORT)?;
            let length = match length {
                Some(length) => length,
                None => rest.iter().position(|&b| b == 0).ok_or(SHORT)?,
            };
            let name = rest.get(..length).ok_or(SHORT)?;
            at += length;
            let name_at = index.names.len();
            if version == 4 {
                let kept = last.len().checked_sub(stripped).ok_or(SHORT)?;
                index.names.extend_from_slice(&last[..kept]);
                at += 1;
            } else {
                // One to eight zeros, so that the next entry begins at a multiple of eight.
                at = start + (at - start + 8) / 8 * 8;
            }
            index.names.extend_from_slice(name);
            let name = &index.names[name_at..];
            let stage = flags & STAGE;
            if !is_path(name) || stage == 0 && last.as_slice() >= name || last.as_slice() > name {
                return Err(Damaged("its names are out of order"));
            }
            last.clear();
            last.extend_from_slice(name);
            if stage != 0 {
                if index.unsettled.last().map(Vec::as_slice) != Some(name) {
                    index.unsettled.push(last.clone());
                }
                index.names.truncate(name_at);
                continue;
            }
            // `assume-unchanged`, `skip-worktree` and `intent-to-add` would hide edits.
            let is_hidden = flags & ASSUME_VALID != 0 || extended != 0;
            hidden |= is_hidden;
            let stat = Stat {
                ctime: (field(0), field(1)),
                mtime: (field(2), field(3)),
                dev: field(4),
                ino: field(5),
                uid: field(7),
                gid: field(8),
                size: field(9),
            };
            let id = Oid::from_bytes(&fixed[40..60]).map_err(|_| Damaged("an id is none"))?;
            index.push(
                name_at,
                Entry {
                    stat: if is_hidden { Stat::NONE } else { stat },
                    mode: field(6),
                    id,
                },
            );
        }
        while at < body {
            let length = number(at + 4)? as usize;
            let data = content.get(at + 8..at + 8 + length).ok_or(SHORT)?;
            match content.get(at..at + 4).ok_or(SHORT)? {
                b"TREE" => index.tree = root_of(data, index.slots.len()),
                // Small letters: it cannot be understood without.
                [first, ..] if first.is_ascii_lowercase() => {
                    return Err(Damaged("it is in a form of its own"));
                }
                _ => {}
            }
            at += 8 + length;
        }
        if hidden || !index.unsettled.is_empty() {
            index.tree = None;
        }
        Ok(index)
    }

    /// Writes the index of `tree`, which is this one's with `changes` (`None`: the file is gone).
    ///
    /// # Errors
    /// `AlreadyExists` if another process is just writing it.
    pub(super) fn write(
        &self,
        file: &Path,
        tree: Oid,
        changes: &BTreeMap<Vec<u8>, Option<Entry>>,
    ) -> io::Result<()> {
        self.prepare(file, tree, changes)?.finish()
    }

    /// The same up to the last step, which takes a reader from the old one to the new one.
    pub(super) fn prepare(
        &self,
        file: &Path,
        tree: Oid,
        changes: &BTreeMap<Vec<u8>, Option<Entry>>,
    ) -> io::Result<NextIndex> {
        let bytes = self.serialize(tree, changes);
        let mut lock = file.as_os_str().to_owned();
        lock.push(".lock");
        let lock = PathBuf::from(lock);
        let mut opened = File::options().write(true).create_new(true).open(&lock)?;
        let next = NextIndex {
            lock: Some(lock),
            file: file.to_owned(),
        };
        // Closed before it is renamed: on a network disk it is there for others by then.
        opened.write_all(&bytes)?;
        Ok(next)
    }

    fn serialize(&self, tree: Oid, changes: &BTreeMap<Vec<u8>, Option<Entry>>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.names.len() + (self.len() + 1) * (FIXED + 10) + 64);
        bytes.extend_from_slice(b"DIRC\0\0\0\x02\0\0\0\0");
        let mut count = 0_u32;
        let mut put = |name: &[u8], entry: &Entry| {
            count += 1;
            let start = bytes.len();
            let Stat {
                ctime,
                mtime,
                dev,
                ino,
                uid,
                gid,
                size,
            } = entry.stat;
            for field in [
                ctime.0, ctime.1, mtime.0, mtime.1, dev, ino, entry.mode, uid, gid, size,
            ] {
                bytes.extend_from_slice(&field.to_be_bytes());
            }
            bytes.extend_from_slice(entry.id.as_bytes());
            let length = name.len().min(usize::from(NAME_LENGTH)) as u16;
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(name);
            let end = start + (bytes.len() - start + 8) / 8 * 8;
            bytes.resize(end, 0);
        };
        let mut changes = changes.iter().peekable();
        for slot in 0..self.len() {
            let name = self.name(slot);
            while let Some((changed, entry)) =
                changes.next_if(|(changed, _)| changed.as_slice() < name)
            {
                entry.iter().for_each(|entry| put(changed, entry));
            }
            match changes.next_if(|(changed, _)| changed.as_slice() == name) {
                Some((_, entry)) => entry.iter().for_each(|entry| put(name, entry)),
                None => put(name, self.entry(slot)),
            }
        }
        for (changed, entry) in changes {
            entry.iter().for_each(|entry| put(changed, entry));
        }
        bytes[8..12].copy_from_slice(&count.to_be_bytes());
        // All of it is one tree: git and we know by that where nothing is staged.
        let root = [format!("\0{count} 0\n").as_bytes(), tree.as_bytes()].concat();
        bytes.extend_from_slice(b"TREE");
        bytes.extend_from_slice(&(root.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&root);
        let sum = Sha1::digest(&bytes);
        bytes.extend_from_slice(&sum);
        bytes
    }
}

/// One of the modes that git knows of, from what a tree says.
pub(super) fn mode_of(mode: i32) -> u32 {
    match mode & 0o170_000 {
        0o120_000 => LINK_MODE,
        0o160_000 => SUBMODULE_MODE,
        _ if mode & 0o100 != 0 => 0o100_755,
        _ => 0o100_644,
    }
}

/// The tree that the whole index is, by git's cache of trees.
fn root_of(data: &[u8], entries: usize) -> Option<Oid> {
    let line = data.strip_prefix(b"\0")?;
    let end = line.iter().position(|&b| b == b'\n')?;
    let count = str::from_utf8(&line[..end]).ok()?.split(' ').next()?;
    if count.parse::<usize>().ok()? != entries {
        return None;
    }
    Oid::from_bytes(line.get(end + 1..end + 1 + HASH)?).ok()
}

/// May this be the path of a file in a tree?
fn is_path(path: &[u8]) -> bool {
    path.split(|&b| b == b'/').all(|part| {
        !matches!(part, b"" | b"." | b"..")
            && !part.eq_ignore_ascii_case(b".git")
            && !part.contains(&0)
    })
}

/// The id that this content has as a file in git, without any conversion.
pub(super) fn hash(size: u64, mut content: impl io::Read) -> io::Result<Oid> {
    let mut sum = Sha1::new();
    sum.update(format!("blob {size}\0"));
    let mut buffer = [0; 1 << 16];
    loop {
        match content.read(&mut buffer)? {
            0 => break,
            read => sum.update(&buffer[..read]),
        }
    }
    Ok(Oid::from_bytes(&sum.finalize()).expect("a sum has the length of an id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> Oid {
        Oid::from_bytes(&[byte; HASH]).unwrap()
    }

    fn known(mtime: Moment, ctime: Moment) -> Entry {
        let stat = Stat {
            ctime,
            mtime,
            ino: 7,
            size: 3,
            ..Stat::NONE
        };
        Entry {
            stat,
            ..Entry::blank(id(9), 0o100_644)
        }
    }

    fn of(files: &[(&str, Entry)]) -> Index {
        let mut index = Index::default();
        for (name, entry) in files {
            let at = index.names.len();
            index.names.extend_from_slice(name.as_bytes());
            index.push(at, *entry);
        }
        index
    }

    #[test]
    fn what_changed_in_the_same_tick_is_read_again() {
        // On a file system with coarse times an edit right behind ours leaves the stat as it is.
        let stat = known((10, 5), (10, 5)).stat;
        assert!(stat.is_settled((10, 6)));
        assert!(!stat.is_settled((10, 5)) && !stat.is_settled((9, 9)));
        assert!(!known((10, 5), (11, 0)).stat.is_settled((10, 6)));

        // git vouches for a file by an index of the same tick; it must not be believed, also once
        // that index was written again later.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("index");
        let read_as_of = |index: &Index, written: (u64, u32)| {
            let tree = Oid::from_bytes(&[7; HASH]).unwrap();
            index.write(&file, tree, &BTreeMap::new()).unwrap();
            let at = std::time::UNIX_EPOCH + std::time::Duration::new(written.0, written.1);
            let opened = File::options().write(true).open(&file).unwrap();
            opened.set_modified(at).unwrap();
            Index::read(&file).unwrap()
        };
        let index = of(&[("a", known((10, 5), (10, 5)))]);
        let stat = index.entry(0).stat;
        for (written, vouches) in [((10, 6), true), ((10, 5), false), ((10, 0), false)] {
            let read = read_as_of(&index, written);
            assert_eq!(read.vouches(0, &stat), vouches, "{written:?}");
            assert_eq!(read_as_of(&read, (20, 0)).vouches(0, &stat), vouches);
        }
        let mut index = read_as_of(&index, (20, 0));
        for changed in [
            known((10, 5), (10, 6)).stat,
            known((10, 4), (10, 5)).stat,
            Stat { ino: 8, ..stat },
            Stat { size: 4, ..stat },
        ] {
            assert!(!index.vouches(0, &changed), "{changed:?}");
        }
        assert!(index.vouches(
            0,
            &Stat {
                dev: 1,
                uid: 2,
                gid: 3,
                ..stat
            }
        ));
        index.slots[0].entry.stat = Stat::NONE;
        assert!(!index.vouches(0, &stat));
    }

    #[test]
    fn changes_are_merged_in_order() {
        let entry = known((1, 2), (3, 4));
        let other = Entry::blank(id(5), 0o100_755);
        let index = of(&[
            ("a/b", entry),
            ("b", entry),
            ("c", entry),
            ("d-e", entry),
            ("d/e", entry),
        ]);
        let long = "x".repeat(5_000);
        let changes = [
            ("0", Some(other)),
            ("a/b", None),
            ("b", Some(other)),
            ("bb", None),
            ("d0", Some(other)),
            (&long, Some(other)),
        ];
        let changes = changes
            .map(|(name, entry)| (name.as_bytes().to_vec(), entry))
            .into();
        let again = Index::parse(index.serialize(id(1), &changes)).unwrap();
        let files: Vec<_> = (0..again.len())
            .map(|slot| {
                (
                    str::from_utf8(again.name(slot)).unwrap(),
                    *again.entry(slot),
                )
            })
            .collect();
        let expected = [
            ("0", other),
            ("b", other),
            ("c", entry),
            ("d-e", entry),
            ("d/e", entry),
            ("d0", other),
            (&long, other),
        ];
        assert_eq!(files, expected);
        assert!(again.is_of(id(1)));
    }

    #[test]
    fn garbage_is_damage_and_never_more() {
        let entry = known((1, 2), (3, 4));
        let index = of(&[("a/b", entry), ("b", entry), ("c/d/e.txt", entry)]);
        let bytes = index.serialize(id(1), &BTreeMap::new());
        assert!(Index::parse(bytes.clone()).is_ok());
        for length in 0..bytes.len() {
            assert!(Index::parse(bytes[..length].to_vec()).is_err(), "{length}");
        }
        // With a sum that fits, as somebody would make it who means harm.
        for at in 0..bytes.len() - HASH {
            for value in [0, 1, 2, 4, 0x2f, 0x40, 0x7f, 0x80, 0xff] {
                let mut bytes = bytes[..bytes.len() - HASH].to_vec();
                bytes[at] = value;
                let sum = Sha1::digest(&bytes);
                bytes.extend_from_slice(&sum);
                if let Ok(index) = Index::parse(bytes) {
                    assert!((0..index.len()).all(|slot| is_path(index.name(slot))));
                }
            }
        }
        for name in [
            "../x",
            "/x",
            "a//b",
            "a/./b",
            ".git/config",
            "a/.GIT/x",
            "a/",
            "",
        ] {
            let bytes = of(&[(name, entry)]).serialize(id(1), &BTreeMap::new());
            assert!(Index::parse(bytes).is_err(), "{name}");
        }
    }
}
