//! Reading below a folder without ever following a symlink: what runs in a worktree may swap a
//! folder for a link between the scan and the read, and the supervisor may read more than it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
};

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
pub(super) struct Root(OwnedFd);

impl Root {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(nix::fcntl::open(path, flags, Mode::empty())?))
    }

    /// Looks at `path` (relative, without `..`). A path through a symlink is nothing: git has no
    /// such path.
    pub(super) fn look(&self, path: &Path) -> io::Result<Found> {
        let steps: Vec<_> = path.iter().collect();
        let Some((name, folders)) = steps.split_last() else {
            return Ok(Found::Directory);
        };
        let mut at: Option<OwnedFd> = None;
        for folder in folders {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let from = at.as_ref().unwrap_or(&self.0);
            match openat(from.as_fd(), *folder, flags, Mode::empty()) {
                Ok(next) => at = Some(next),
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Found::Nothing),
                Err(error) => return Err(error.into()),
            }
        }
        let at = at.as_ref().unwrap_or(&self.0).as_fd();
        let stat = match fstatat(at, *name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Found::Nothing),
            Err(error) => return Err(error.into()),
        };
        match kind(&stat) {
            SFlag::S_IFDIR => Ok(Found::Directory),
            SFlag::S_IFLNK => Ok(Found::Link(readlinkat(at, *name)?.into_vec(), stat)),
            SFlag::S_IFREG => {
                // O_NONBLOCK: should it be a pipe by now, opening must not wait for a writer.
                let flags =
                    OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let file = openat(at, *name, flags, Mode::empty())?;
                let stat = fstat(&file)?;
                if kind(&stat) != SFlag::S_IFREG {
                    return Ok(Found::Other);
                }
                Ok(Found::File(File::from(file), stat))
            }
            _ => Ok(Found::Other),
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

/// Removes what is at `path`, whatever it is; nothing there is fine.
pub(super) fn remove_all(path: &Path) -> io::Result<()> {
    match kind_of(path)? {
        None => Ok(()),
        Some(kind) if kind.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
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
