//! The two folders besides the workspace: the cache, which can be lost, and the runtime folder,
//! which is private.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{AccessFlags, access, getuid};

use super::{Mode, Surroundings};

/// The default of `CACHE_PATH`: `$XDG_CACHE_HOME/greenroom`, else `~/.cache/greenroom`. In a
/// container the home folder is often read-only or missing: there `/var/tmp/greenroom`, and where
/// that cannot be written either, `$TMPDIR/greenroom-cache`.
pub(super) fn cache_folder(mode: Mode, around: &Surroundings) -> PathBuf {
    let own = around
        .xdg_cache
        .clone()
        .or_else(|| Some(around.home.as_ref()?.join(".cache")))
        .map(|folder| folder.join("greenroom"));
    let last = around.temp.join("greenroom-cache");
    if mode == Mode::Dev {
        return own.unwrap_or(last);
    }
    own.into_iter()
        .chain([PathBuf::from("/var/tmp/greenroom")])
        .find(|folder| can_be_made(folder))
        .unwrap_or(last)
}

/// Whether the folder, or what it would be made in, can be written.
fn can_be_made(folder: &Path) -> bool {
    folder
        .ancestors()
        .find(|path| path.exists())
        .is_some_and(|path| access(path, AccessFlags::W_OK | AccessFlags::X_OK).is_ok())
}

/// Makes and returns the private folder for sockets and the like: `$XDG_RUNTIME_DIR/greenroom`,
/// or `greenroom-{uid}` in the folder for temporary files. Mode 0700, ours, no symlink; shared by
/// all supervisors of this user on this machine. Its path is short: a socket's has 108 bytes.
///
/// # Errors
/// It cannot be made, or somebody else made it before us.
pub fn runtime_folder(around: &Surroundings) -> io::Result<PathBuf> {
    if let Some(base) = &around.xdg_runtime
        && let Ok(folder) = private_folder(base.join("greenroom"))
    {
        return Ok(folder);
    }
    private_folder(around.temp.join(format!("greenroom-{}", getuid())))
}

fn private_folder(path: PathBuf) -> io::Result<PathBuf> {
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // The name can be guessed and the folder for temporary files is everybody's: what stands
    // there has to be a folder, not a link to one, and ours.
    let metadata = fs::symlink_metadata(&path)?;
    if !metadata.is_dir() || metadata.uid() != getuid().as_raw() {
        return Err(io::Error::new(
            ErrorKind::PermissionDenied,
            format!("{} is not a folder of this user", path.display()),
        ));
    }
    // Passing through is no looking: children that are users of their own have folders in it.
    if metadata.permissions().mode() & 0o066 != 0 {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(home: &Path) -> Surroundings {
        Surroundings {
            cwd: home.to_owned(),
            home: Some(home.to_owned()),
            temp: home.to_owned(),
            ..Surroundings::default()
        }
    }

    #[test]
    fn the_cache_lies_below_home_where_that_can_be_written() {
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().join(".cache/greenroom");
        assert_eq!(cache_folder(Mode::Serve, &around(home.path())), cache);
        assert_eq!(cache_folder(Mode::Dev, &around(home.path())), cache);
        // Not even root can write there.
        let fixed = cache_folder(Mode::Serve, &around(Path::new("/proc/self")));
        assert_eq!(fixed, Path::new("/var/tmp/greenroom"));
        let xdg = Surroundings {
            xdg_cache: Some(home.path().join("xdg")),
            ..around(home.path())
        };
        assert_eq!(
            cache_folder(Mode::Serve, &xdg),
            home.path().join("xdg/greenroom")
        );
    }

    #[test]
    fn the_runtime_folder_is_private_and_ours() {
        let base = tempfile::tempdir().unwrap();
        let folder = runtime_folder(&around(base.path())).unwrap();
        assert_eq!(
            fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o700
        );

        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(runtime_folder(&around(base.path())).unwrap(), folder);
        assert_eq!(
            fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o700
        );

        fs::remove_dir(&folder).unwrap();
        std::os::unix::fs::symlink(base.path(), &folder).unwrap();
        let error = runtime_folder(&around(base.path())).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::PermissionDenied,
            "a planted link is refused"
        );

        let xdg = Surroundings {
            xdg_runtime: Some(base.path().to_owned()),
            ..around(base.path())
        };
        assert_eq!(runtime_folder(&xdg).unwrap(), base.path().join("greenroom"));
    }
}
