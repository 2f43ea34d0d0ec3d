//! Small file operations with the guarantees that the rest leans on.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use nix::fcntl::OFlag;

use super::WorkspaceError;

/// Replaces a file as a whole: a reader sees the old or the new content, also after a crash
/// (temporary file, fsync, rename).
///
/// # Errors
/// [`WorkspaceError::Io`]; the old content is then untouched.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<(), WorkspaceError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", uuid::Uuid::new_v4().simple()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let file = create_in(folder, || options.open(&temporary))
        .map_err(WorkspaceError::io("create", &temporary))?;
    let write = || -> io::Result<()> {
        (&file).write_all(content)?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        // Best effort: a leftover temporary file harms nobody.
        fs::remove_file(&temporary).ok();
        WorkspaceError::io("write", path)(error)
    })
}

/// Appends whole lines. With `durable`, they have reached the disk when this returns.
///
/// # Errors
/// The disk's own.
pub fn append_line(mut file: &File, lines: &[u8], durable: bool) -> io::Result<()> {
    file.write_all(lines)?;
    if durable { file.sync_data() } else { Ok(()) }
}

/// Makes something in a folder, which is made where it is missing. (To look for it first would be a wait
/// for a slow disk each time.)
pub(crate) fn create_in<T>(folder: &Path, create: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            private_dir(folder)?;
            create()
        }
        created => created,
    }
}

fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a folder and its parents, readable by their owner alone.
///
/// # Errors
/// [`WorkspaceError::Io`].
pub fn make_private_dir(path: &Path) -> Result<(), WorkspaceError> {
    private_dir(path).map_err(WorkspaceError::io("make the folder", path))
}

/// Reads a file of at most `limit` bytes; `None` if there is none. What is no file (a pipe, a device)
/// is refused: nobody knows how long its end is waited for.
///
/// # Errors
/// [`WorkspaceError::TooLarge`] or [`WorkspaceError::Io`].
pub fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, WorkspaceError> {
    // The flag means nothing to a file, and a pipe is opened without waiting for its other end.
    let opened = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(WorkspaceError::io("open", path)(error)),
    };
    let about = file.metadata().map_err(WorkspaceError::io("read", path))?;
    if !about.is_file() {
        let what = match about.is_dir() {
            true => "it is a folder",
            false => "it is no ordinary file, but a pipe, a socket or a device",
        };
        return Err(WorkspaceError::io("read", path)(io::Error::other(what)));
    }
    let mut content = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut content)
        .map_err(WorkspaceError::io("read", path))?;
    if content.len() as u64 > limit {
        return Err(WorkspaceError::TooLarge {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (name, said) in [("pipe", "no ordinary file"), ("", "a folder")] {
            let error = read_bounded(&at(name), 9).unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(cause.contains(said), "{cause}");
        }
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        assert_eq!(read_bounded(&at("link"), 9).unwrap().unwrap(), b"x");
        assert!(read_bounded(&at("none"), 9).unwrap().is_none());
    }
}
