//! Has a dev server look at a file once more, whose last change it may have overlooked.
//!
//! Vite's watcher (chokidar 3) tells of a file at most once in 50 ms, and drops what comes sooner
//! instead of telling of it later: of two changes so close to each other it never hears of the second.
//! News of a file's times makes it tell again, as long as the file was read last no later than it was
//! written (measured with Vite 8.3.8: 13 of 13 overlooked changes were there then). So only the time
//! of the last reading is set: who compares the time of writing, as agents' tools do, sees a file
//! that nobody touched.

use std::{fs::FileTimes, io, path::Path};

use super::package_files::open_inside;

/// Makes the kernel tell whoever watches this plain file of a worktree. Blocking.
///
/// # Errors
/// If it is none, lies elsewhere by a link, or is another user's.
pub(super) fn nudge(worktree: &Path, file: &str) -> io::Result<()> {
    let opened = open_inside(worktree, Path::new(file))?;
    let written = opened.metadata()?.modified()?;
    opened.set_times(FileTimes::new().set_accessed(written))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn nothing_of_a_file_changes_but_when_it_was_read() {
        let disk = tempfile::tempdir().unwrap();
        let site = disk.path().join("site");
        fs::create_dir(&site).unwrap();
        let outside = disk.path().join("outside");
        let inside = site.join("page.astro");
        for file in [&outside, &inside] {
            fs::write(file, "text").unwrap();
        }
        symlink(&outside, site.join("link")).unwrap();
        let times = |file: &Path| {
            let meta = fs::metadata(file).unwrap();
            (meta.modified().unwrap(), meta.accessed().unwrap())
        };
        let before = times(&outside);
        let (written, _) = times(&inside);
        // As somebody reads it later.
        let read = written + std::time::Duration::from_secs(60);
        let file = fs::File::open(&inside).unwrap();
        file.set_times(FileTimes::new().set_accessed(read)).unwrap();
        assert_eq!(times(&inside), (written, read));

        nudge(&site, "page.astro").unwrap();
        assert_eq!(times(&inside), (written, written));
        assert_eq!(fs::read(&inside).unwrap(), b"text");
        for other in ["link", "../outside", ".", "none"] {
            assert!(nudge(&site, other).is_err(), "{other}");
        }
        assert_eq!(times(&outside), before);
    }
}
