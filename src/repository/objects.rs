//! New objects of a commit: gathered in memory, then written all at once.
//!
//! libgit2 writes one after the other and looks for each beforehand, in every pack and once more
//! after listing them. On a network disk that is a quarter of a second for a commit of one file; here
//! it is the time of one object, since nothing in one of them waits for another. An object that is
//! there already is written again: its content is its name.
//!
//! **Invariant:** nothing refers to an object of these on disk before [`NewObjects::write`] has
//! returned.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::ZlibEncoder};
use git2::{ObjectType, Oid, Repository};

use super::{Operation as _, Result};
use crate::task;

/// So many bytes are held in memory, at most and but for one object.
const MAX_HELD: usize = 64 << 20;

/// Objects that are to be written.
pub(super) struct NewObjects {
    folder: PathBuf,
    waiting: BTreeMap<Oid, (ObjectType, Vec<u8>)>,
    held: usize,
}

impl NewObjects {
    /// Of this repository. Touches no disk.
    pub(super) fn of(repo: &Repository) -> Self {
        Self {
            folder: repo.commondir().join("objects"),
            waiting: BTreeMap::new(),
            held: 0,
        }
    }

    /// Adds an object, by its content as git has it. Its id is valid at once, the object is there
    /// after [`write`](Self::write).
    pub(super) fn add(&mut self, kind: ObjectType, content: Vec<u8>) -> Result<Oid> {
        let id = Oid::hash_object(kind, &content).during("name an object")?;
        self.held += content.len();
        self.waiting.insert(id, (kind, content));
        if self.held > MAX_HELD {
            self.write()?;
            self.waiting.clear();
            self.held = 0;
        }
        Ok(id)
    }

    /// The content of one that was added lately.
    pub(super) fn content(&self, id: Oid) -> Option<&[u8]> {
        self.waiting.get(&id).map(|(_, content)| content.as_slice())
    }

    /// Writes all that were added.
    pub(super) fn write(&self) -> Result<()> {
        let objects: Vec<_> = self.waiting.iter().collect();
        let written = task::side_by_side(&objects, |(id, (kind, content))| {
            write_loose(&self.folder, **id, *kind, content)
        });
        written
            .into_iter()
            .collect::<io::Result<()>>()
            .during("store a commit's objects")
    }
}

/// Makes the folders that objects lie in, where the disk is slow: they are made one at a time, and a
/// commit would wait for each that is new.
pub(super) fn make_folders(git: &Path) -> io::Result<()> {
    let objects = git.join("objects");
    if !task::is_disk_slow() {
        return Ok(());
    }
    let present: BTreeSet<_> = fs::read_dir(&objects)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let names = (0..=u8::MAX).map(|byte| format!("{byte:02x}"));
    for name in names.filter(|name| !present.contains(name)) {
        match fs::create_dir(objects.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Writes an object into a file of its own, as git does: beside its place, then renamed.
fn write_loose(objects: &Path, id: Oid, kind: ObjectType, content: &[u8]) -> io::Result<()> {
    let name = id.to_string();
    let (folder, name) = name.split_at(2);
    let folder = objects.join(folder);
    // The name by which git finds what a crash has left.
    let temporary = folder.join(format!("tmp_obj_{}", uuid::Uuid::new_v4().simple()));
    let create = || {
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&temporary)
    };
    let file = match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            create()?
        }
        file => file?,
    };
    let write = || -> io::Result<()> {
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
        write!(packed, "{} {}\0", kind.str(), content.len())?;
        packed.write_all(content)?;
        // In one piece: each is a round trip.
        (&file).write_all(&packed.finish()?)?;
        drop(file);
        fs::rename(&temporary, folder.join(name))
    };
    let written = write();
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written
}

/// A commit's content.
pub(super) fn commit_text(
    tree: Oid,
    parents: &[Oid],
    author: &git2::Signature<'_>,
    committer: &git2::Signature<'_>,
    message: &str,
) -> Vec<u8> {
    let mut text = format!("tree {tree}\n").into_bytes();
    for parent in parents {
        text.extend_from_slice(format!("parent {parent}\n").as_bytes());
    }
    for (role, who) in [("author", author), ("committer", committer)] {
        text.extend_from_slice(role.as_bytes());
        text.push(b' ');
        text.extend_from_slice(&signed(who));
        text.push(b'\n');
    }
    text.push(b'\n');
    text.extend_from_slice(message.as_bytes());
    text
}

/// Who and when, as git writes it.
pub(super) fn signed(who: &git2::Signature<'_>) -> Vec<u8> {
    let when = who.when();
    let offset = when.offset_minutes().unsigned_abs();
    let sign = if when.offset_minutes() < 0 { '-' } else { '+' };
    let mut text = who.name_bytes().to_vec();
    text.extend_from_slice(b" <");
    text.extend_from_slice(who.email_bytes());
    let rest = format!(
        "> {} {sign}{:02}{:02}",
        when.seconds(),
        offset / 60,
        offset % 60
    );
    text.extend_from_slice(rest.as_bytes());
    text
}
