//! Fonts and images of packages, where `node_modules` is a link to another disk: Vite answers 403
//! to what lies outside of the site by its real path (measured with 6.4 and 8.3), so the proxy
//! answers from that folder itself.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::filter::plain_path;
use crate::task::blocking;

const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// A font of all of Unicode has 10 to 20 MB; more is no part of a page.
const MOST_BYTES: u64 = 32 * 1024 * 1024;

/// One such file, by its name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PackageFile {
    folder: PathBuf,
    below: PathBuf,
    pub(crate) kind: &'static str,
}

/// Does this path name a font or an image below one of the folders?
pub(crate) fn named<'a>(
    path: &str,
    folders: impl IntoIterator<Item = &'a Path>,
) -> Option<PackageFile> {
    let path = plain_path(path);
    let path = std::str::from_utf8(&path).ok()?;
    let whole = Path::new(&path[path.find("/@fs/")? + "/@fs".len()..]);
    let kind = kind_of(whole.extension()?.to_str()?)?;
    let (folder, below) = folders
        .into_iter()
        .find_map(|folder| Some((folder, whole.strip_prefix(folder).ok()?)))?;
    Some(PackageFile {
        folder: folder.to_owned(),
        below: below.to_owned(),
        kind,
    })
}

fn kind_of(extension: &str) -> Option<&'static str> {
    Some(match extension.to_ascii_lowercase().as_str() {
        "woff2" => "font/woff2",
        "woff" => "font/woff",
        "ttf" => "font/ttf",
        "otf" => "font/otf",
        "eot" => "application/vnd.ms-fontobject",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "avif" => "image/avif",
        "ico" => "image/x-icon",
        _ => return None,
    })
}

impl PackageFile {
    /// Its bytes, if it is a plain file that lies in the folder, whatever links lead there.
    ///
    /// # Errors
    /// If it is none, or is too large; where the kernel can't open files that way, always.
    pub(crate) async fn read(self) -> io::Result<Bytes> {
        let read = move || {
            let file = open_inside(&self.folder, &self.below)?;
            if file.metadata()?.len() > MOST_BYTES {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let mut bytes = Vec::new();
            file.take(MOST_BYTES).read_to_end(&mut bytes)?;
            Ok(Bytes::from(bytes))
        };
        blocking("reading a package's file", DISK_DEADLINE, read)
            .await
            .map_err(io::Error::other)?
    }
}

/// Opens a plain file for reading. Whoever builds the site may write there: no link of theirs leads
/// out of the folder. Blocking.
///
/// # Errors
/// If it is none; where the kernel can't open files that way, always.
pub(super) fn open_inside(folder: &Path, below: &Path) -> io::Result<File> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = open(folder, flags, Mode::empty())?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(&folder, below, how)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn fonts_and_images_in_the_folder_are_read_and_nothing_else() {
        let disk = tempfile::tempdir().unwrap();
        let at = |path: &str| disk.path().join(path);
        for folder in ["t/node_modules/.pnpm/f", "outside"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        std::fs::write(at("t/node_modules/.pnpm/f/a b.woff2"), "font").unwrap();
        std::fs::write(at("t/node_modules/.pnpm/f/i.js"), "js").unwrap();
        std::fs::write(at("outside/x.png"), "secret").unwrap();
        symlink(".pnpm/f", at("t/node_modules/f")).unwrap();
        symlink("../../outside", at("t/node_modules/out")).unwrap();
        symlink(at("outside/x.png"), at("t/node_modules/y.png")).unwrap();
        let root = at("t");
        let named = |path: &str| {
            let target = format!("/@fs{}/{path}", root.display());
            named(&target, [root.as_path()])
        };
        for path in [
            "node_modules/f/a%20b.woff2",
            "node_modules/.pnpm/f/a%20b.woff2",
        ] {
            let file = named(path).unwrap();
            assert_eq!(file.kind, "font/woff2");
            assert_eq!(file.read().await.unwrap(), "font");
        }
        assert_eq!(named("node_modules/f/i.js"), None);
        for path in [
            "node_modules/out/x.png",
            "node_modules/y.png",
            "../outside/x.png",
            "node_modules/none.png",
            "node_modules/.png",
        ] {
            let read = async || named(path)?.read().await.ok();
            assert_eq!(read().await, None, "{path}");
        }
        let elsewhere = format!("/@fs{}", at("outside/x.png").display());
        assert_eq!(super::named(&elsewhere, [root.as_path()]), None);
    }
}
