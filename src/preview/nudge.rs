//! Has a dev server look at a file once more, whose last change it may have overlooked.
//!
//! Vite's watcher (chokidar 3) tells of a file at most once in 50 ms, and drops what comes sooner
//! instead of telling of it later: of two changes so close to each other it never hears of the second.
//! It tells again when it sees another time of writing, by a quarter of a millisecond (measured with
//! Vite 8.3.8), so that is moved within its millisecond. Agents' tools compare no finer than that: to
//! them nobody has touched the file. The time of reading alone would do, as long as it is not later
//! than that of writing, but a page that is loaded meanwhile sets it anew.

use std::{
    fs::FileTimes,
    io,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::package_files::open_inside;

/// Makes the kernel tell whoever watches this plain file of a worktree. Blocking.
///
/// # Errors
/// If it is none, lies elsewhere by a link, or is another user's.
pub(super) fn nudge(worktree: &Path, file: &str) -> io::Result<()> {
    let opened = open_inside(worktree, Path::new(file))?;
    let moved = moved(opened.metadata()?.modified()?);
    opened.set_times(FileTimes::new().set_modified(moved).set_accessed(moved))
}

/// Another time of the same millisecond; what `f64` milliseconds tell from the one before.
fn moved(time: SystemTime) -> SystemTime {
    const STEP: Duration = Duration::from_micros(250);
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    if since.subsec_nanos() % 1_000_000 < 500_000 {
        time + STEP
    } else {
        time - STEP
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_file_is_of_another_time_of_the_same_millisecond() {
        let disk = tempfile::tempdir().unwrap();
        let site = disk.path().join("site");
        fs::create_dir(&site).unwrap();
        let (outside, inside) = (disk.path().join("outside"), site.join("page.astro"));
        for file in [&outside, &inside] {
            fs::write(file, "text").unwrap();
        }
        symlink(&outside, site.join("link")).unwrap();
        let written = |file: &Path| fs::metadata(file).unwrap().modified().unwrap();
        let millisecond = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_millis();
        let before = written(&outside);
        for nanoseconds in [0, 1, 499_999, 500_000, 999_999] {
            let at = UNIX_EPOCH + Duration::new(1_800_000_000, 123_000_000 + nanoseconds);
            let file = fs::File::options().write(true).open(&inside).unwrap();
            file.set_modified(at).unwrap();
            let mut last = at;
            for _ in 0..3 {
                nudge(&site, "page.astro").unwrap();
                let now = written(&inside);
                assert_ne!(now, last);
                assert_eq!(millisecond(now), millisecond(at), "{nanoseconds}");
                last = now;
            }
        }
        assert_eq!(fs::read(&inside).unwrap(), b"text");
        for other in ["link", "../outside", ".", "none"] {
            assert!(nudge(&site, other).is_err(), "{other}");
        }
        assert_eq!(written(&outside), before);
    }
}
