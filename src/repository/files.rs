//! Reading and placing files below a folder without ever following a symlink: what runs in a
//! worktree may swap a folder for a link between the scan and the read, and the supervisor may
//! read and write more than it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead as _, Read as _, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{OpenOptionsExt as _, PermissionsExt as _},
        },
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat, renameat2},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, unlinkat},
};

use crate::{owner::Owner, task};

/// What stands at a path.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    Directory,
    File(File, FileStat),
    /// A symlink and the text in it.
    Link(Vec<u8>, FileStat),
    /// A device, pipe or socket: git knows none of them.
    Other,
}

/// A folder, held open.
#[derive(Debug)]
pub(super) struct Root {
    folder: OwnedFd,
    /// Whose what is made in it is to be; `None` where it is ours.
    owner: Option<Owner>,
}

impl Root {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(path, flags, Mode::empty())?;
        let stat = fstat(&folder)?;
        Ok(Self {
            owner: Owner::new(stat.st_uid, stat.st_gid),
            folder,
        })
    }

    /// From here on what is made in it is for whom what is made in `other` is for.
    pub(super) fn making_for(self, other: &Self) -> Self {
        Self {
            owner: other.owner,
            ..self
        }
    }

    /// Gives away what we made at `path`, in a folder that nobody else writes to.
    pub(super) fn give(&self, path: &Path) -> io::Result<()> {
        if self.owner.is_none() {
            return Ok(());
        }
        let (Some(folder), Some(name)) = (self.folder_of(path, false)?, path.file_name()) else {
            return Ok(());
        };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(folder, name, flags, Mode::empty()) {
            Ok(made) => self.give_away(made),
            Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives away the file at `path`, and the folders on the way there, where they are somebody else's.
    /// Not a file that has a second name: that may be where it belongs.
    pub(super) fn adopt(&self, path: &Path) -> io::Result<()> {
        let folders = path.ancestors().skip(1);
        for (is_file, path) in std::iter::once((true, path)).chain(folders.map(|up| (false, up))) {
            let Some(name) = path.file_name() else { break };
            let Some(folder) = self.folder_of(path, false)? else {
                break;
            };
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let found = match openat(folder, name, flags, Mode::empty()) {
                Err(Errno::ENOENT) => break,
                found => found?,
            };
            let stat = fstat(&found)?;
            let is_meant = match is_file {
                true => kind(&stat) == SFlag::S_IFREG && stat.st_nlink == 1,
                false => kind(&stat) == SFlag::S_IFDIR,
            };
            let is_its = Owner::new(stat.st_uid, stat.st_gid) == self.owner;
            if is_meant && !is_its {
                self.give_away(found)?;
            }
        }
        Ok(())
    }

    /// Gives away what was just made in it and is open, if only as a place.
    pub(super) fn give_away(&self, made: impl AsFd) -> io::Result<()> {
        let Some(owner) = self.owner else {
            return Ok(());
        };
        let (uid, gid) = (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()));
        let flags = AtFlags::AT_EMPTY_PATH;
        Ok(fchownat(made, "", Some(uid), Some(gid), flags)?)
    }

    /// Opens the folder that `path` lies in; with `make` what is missing of it is made. `None` if
    /// there is none, or something else stands in the way: a symlink is never followed, nor is a
    /// path that leads out (absolute, or with `..`), which a tree that means harm may hold.
    pub(super) fn folder_of(&self, path: &Path, make: bool) -> io::Result<Option<OwnedFd>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at = self.folder.try_clone()?;
        for folder in path.parent().unwrap_or(Path::new("")).components() {
            let Component::Normal(folder) = folder else {
                return Ok(None);
            };
            let mut next = openat(at.as_fd(), folder, flags, Mode::empty());
            if make && matches!(next, Err(Errno::ENOENT)) {
                let made = mkdirat(at.as_fd(), folder, Mode::from_bits_truncate(0o777));
                next = openat(at.as_fd(), folder, flags, Mode::empty());
                match (made, &next) {
                    // By the descriptor: it is a folder, whatever the name leads to by now.
                    (Ok(()), Ok(next)) => self.give_away(next)?,
                    (Ok(()) | Err(Errno::EEXIST), _) => {}
                    (Err(error), _) => return Err(error.into()),
                }
            }
            match next {
                Ok(next) => at = next,
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(at))
    }

    /// Looks at `path`. A path through a symlink, or one that leads out, is nothing: git has no such
    /// path.
    pub(super) fn look(&self, path: &Path) -> io::Result<Found> {
        let Some(name) = path.file_name() else {
            let is_root = path.as_os_str().is_empty();
            return Ok(if is_root {
                Found::Directory
            } else {
                Found::Nothing
            });
        };
        let Some(at) = self.folder_of(path, false)? else {
            return Ok(Found::Nothing);
        };
        let at = at.as_fd();
        let stat = match fstatat(at, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Found::Nothing),
            Err(error) => return Err(error.into()),
        };
        match kind(&stat) {
            SFlag::S_IFDIR => Ok(Found::Directory),
            SFlag::S_IFLNK => Ok(Found::Link(readlinkat(at, name)?.into_vec(), stat)),
            SFlag::S_IFREG => {
                // O_NONBLOCK: should it be a pipe by now, opening must not wait for a writer.
                let flags =
                    OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let file = openat(at, name, flags, Mode::empty())?;
                let stat = fstat(&file)?;
                if kind(&stat) != SFlag::S_IFREG {
                    return Ok(Found::Other);
                }
                Ok(Found::File(File::from(file), stat))
            }
            _ => Ok(Found::Other),
        }
    }

    /// The stat of what stands at `path` (relative, without `..`), if anything does.
    pub(super) fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        let (Some(folder), Some(name)) = (self.folder_of(path, false)?, path.file_name()) else {
            return Ok(None);
        };
        match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Renames the file at `path` to the same path below `to`, over what is there.
    ///
    /// # Errors
    /// The disk's; [`io::ErrorKind::NotFound`] if either has no such folder.
    pub(super) fn rename_to(&self, path: &Path, to: &Self) -> io::Result<()> {
        let (from, onto, name) = self.two_folders(path, to)?;
        Ok(renameat(from, name, onto, name)?)
    }

    /// Puts what is at `path` in the place of what is at the same path below `to`, and the reverse, in
    /// one step.
    ///
    /// # Errors
    /// The disk's; [`io::ErrorKind::NotFound`] if there is nothing at one of the two, and
    /// [`io::ErrorKind::InvalidInput`] where a disk can't do that: NFS.
    pub(super) fn exchange(&self, path: &Path, to: &Self) -> io::Result<()> {
        let (from, onto, name) = self.two_folders(path, to)?;
        let flags = RenameFlags::RENAME_EXCHANGE;
        Ok(renameat2(from, name, onto, name, flags)?)
    }

    /// Gives the file at `path` the same path below `to` as a second name.
    ///
    /// # Errors
    /// The disk's; [`io::ErrorKind::AlreadyExists`] if something is there.
    pub(super) fn link_to(&self, path: &Path, to: &Self) -> io::Result<()> {
        let (from, onto, name) = self.two_folders(path, to)?;
        Ok(linkat(from, name, onto, name, AtFlags::empty())?)
    }

    fn two_folders<'p>(
        &self,
        path: &'p Path,
        to: &Self,
    ) -> io::Result<(OwnedFd, OwnedFd, &'p OsStr)> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let from = self.folder_of(path, false)?.ok_or_else(missing)?;
        let onto = to.folder_of(path, true)?.ok_or_else(missing)?;
        Ok((from, onto, path.file_name().ok_or_else(missing)?))
    }

    /// Removes the file at `path`; nothing there is fine.
    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        let (Some(folder), Some(name)) = (self.folder_of(path, false)?, path.file_name()) else {
            return Ok(());
        };
        match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the folders that `path` lies in as far as they are empty.
    pub(super) fn prune(&self, path: &Path) -> io::Result<()> {
        for folder in path.ancestors().skip(1) {
            if !self.remove_empty(folder)? {
                break;
            }
        }
        Ok(())
    }

    /// Removes the folder at `path` if nothing is in it; says whether it did.
    pub(super) fn remove_empty(&self, path: &Path) -> io::Result<bool> {
        let (Some(folder), Some(name)) = (self.folder_of(path, false)?, path.file_name()) else {
            return Ok(false);
        };
        match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Does something stand at `path`, and what? Symlinks are not followed.
pub(super) fn kind_of(path: &Path) -> io::Result<Option<fs::FileType>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.file_type())),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The content of a regular file of at most 64 KiB; `None` for whatever else is there. Nothing is waited
/// for, should it be a pipe.
pub(super) fn read_small(path: &Path) -> Option<Vec<u8>> {
    const LIMIT: u64 = 64 << 10;
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(nix::fcntl::open(path, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut content = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut content).ok()?;
    (content.len() as u64 <= LIMIT).then_some(content)
}

/// Makes `path` a regular file with this content, in one step; touches nothing if it already is.
/// A symlink at `path` is replaced, never followed.
pub(super) fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    let is_file = kind_of(path)?.is_some_and(|kind| kind.is_file());
    let is_same_size = || fs::metadata(path).is_ok_and(|m| m.len() == content.len() as u64);
    if is_file && is_same_size() && fs::read(path)? == content {
        return Ok(());
    }
    let mut name = path
        .file_name()
        .expect("a path that is written has a name")
        .to_owned();
    name.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
    let temporary = path.with_file_name(name);
    let written = File::options()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written
}

/// Copies the folders and regular files below `from`, of ours alone, into `to`, which is made.
pub(super) fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    /// Bytes at a time: each piece may be a round trip.
    const PIECE: usize = 1 << 20;
    let mut folders = vec![PathBuf::new()];
    let mut files = Vec::new();
    while !folders.is_empty() {
        let made = task::side_by_side(&folders, |folder| fs::create_dir_all(to.join(folder)));
        made.into_iter().collect::<io::Result<()>>()?;
        let mut below = Vec::new();
        for folder in &folders {
            for entry in fs::read_dir(from.join(folder))? {
                let entry = entry?;
                let path = folder.join(entry.file_name());
                match entry.file_type()? {
                    kind if kind.is_dir() => below.push(path),
                    kind if kind.is_file() => files.push(path),
                    _ => return Err(io::ErrorKind::InvalidInput.into()),
                }
            }
        }
        folders = below;
    }
    let copied = task::side_by_side(&files, |path| {
        let source = File::open(from.join(path))?;
        let mode = source.metadata()?.permissions().mode();
        let mut copy = File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(to.join(path))?;
        let mut source = io::BufReader::with_capacity(PIECE, source);
        loop {
            let piece = source.fill_buf()?;
            if piece.is_empty() {
                return Ok(());
            }
            copy.write_all(piece)?;
            let length = piece.len();
            source.consume(length);
        }
    });
    copied.into_iter().collect()
}

/// Removes what is at `path`, whatever it is; nothing there is fine.
pub(super) fn remove_all(path: &Path) -> io::Result<()> {
    let removed = match kind_of(path)? {
        None => Ok(()),
        Some(kind) if kind.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
    };
    match removed {
        // A network disk believes for some seconds that a file is there which somebody else removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Is `path` a folder with nothing in it?
pub(super) fn is_empty_dir(path: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(path)?.next().is_none())
}

/// The way from folder `from` to `to`, both absolute.
pub(super) fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from
        .components()
        .zip(to.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = from.components().skip(shared).map(|_| "..");
    up.map(Path::new)
        .chain(
            to.components()
                .skip(shared)
                .map(|c| Path::new(c.as_os_str())),
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_through_a_symlink_is_nothing() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        fs::create_dir(root.path().join("folder")).unwrap();
        fs::write(root.path().join("folder/file"), "y").unwrap();
        let look = |path: &str| {
            Root::open(root.path())
                .unwrap()
                .look(Path::new(path))
                .unwrap()
        };
        assert!(matches!(look("link/secret"), Found::Nothing));
        assert!(matches!(look("folder/file/x"), Found::Nothing));
        let out = format!(
            "../{}/secret",
            outside.path().file_name().unwrap().display()
        );
        let absolute = outside.path().join("secret");
        for path in [
            &out,
            "folder/..",
            "..",
            "folder/../folder/file",
            absolute.to_str().unwrap(),
        ] {
            assert!(matches!(look(path), Found::Nothing), "{path}");
        }
        assert!(matches!(look(""), Found::Directory));
        assert!(matches!(look("none"), Found::Nothing));
        assert!(matches!(look("link"), Found::Link(..)));
        assert!(matches!(look("folder"), Found::Directory));
        assert!(matches!(look("folder/file"), Found::File(..)));
        nix::unistd::mkfifo(&root.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert!(matches!(look("pipe"), Found::Other));
    }

    #[test]
    fn relative_paths() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(
            way("/w/c/u/threads/t", "/w/c/u/project/.git/worktrees/t"),
            Path::new("../../project/.git/worktrees/t")
        );
        assert_eq!(way("/a", "/a/b"), Path::new("b"));
    }

    #[test]
    fn putting_replaces_a_link_instead_of_writing_through_it() {
        let root = tempfile::tempdir().unwrap();
        let (victim, link) = (root.path().join("victim"), root.path().join("link"));
        fs::write(&victim, "safe").unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        put(&link, b"ours").unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"safe");
        assert_eq!(fs::read(&link).unwrap(), b"ours");
        assert_eq!(
            fs::read_dir(root.path()).unwrap().count(),
            2,
            "nothing is left behind"
        );
    }
}
