//! Small file operations with the guarantees that the rest leans on.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

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

/// Reads a file of at most `limit` bytes; `None` if there is none.
///
/// # Errors
/// [`WorkspaceError::TooLarge`] or [`WorkspaceError::Io`].
pub fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, WorkspaceError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(WorkspaceError::io("open", path)(error)),
    };
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
