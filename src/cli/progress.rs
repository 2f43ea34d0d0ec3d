//! How far something is, in the last line of a terminal.

use std::io::{self, IsTerminal, Write};

use ratatui::crossterm::terminal;

/// The last line of standard error, where that is a terminal; else nothing.
pub(super) struct LastLine {
    is_terminal: bool,
}

impl LastLine {
    pub(super) fn new() -> Self {
        Self {
            is_terminal: io::stderr().is_terminal(),
        }
    }

    /// Shows a text there, in place of the one of before. `text` is made only where somebody sees it.
    pub(super) fn show(&self, text: impl FnOnce() -> String) {
        if self.is_terminal {
            // Who reads it is gone where that fails.
            let columns = terminal::size().map_or(80, |(columns, _)| columns);
            let _unreported = write!(io::stderr(), "\r\x1b[K{}", fitting(&text(), columns));
            let _unreported = io::stderr().flush();
        }
    }

    /// Leaves the line empty, for others to write on.
    pub(super) fn clear(&self) {
        if self.is_terminal {
            let _unreported = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// As much of a line as fits: of one that goes on below only the last part would be taken away again.
fn fitting(text: &str, columns: u16) -> String {
    let most = usize::from(columns).saturating_sub(1);
    text.chars().take(most).collect()
}

/// `[#####·····]`.
pub(super) fn gauge(done: u64, total: u64) -> String {
    const WIDTH: u128 = 24;
    let full = u128::from(done) * WIDTH / u128::from(total.max(1));
    let full = full.min(WIDTH) as usize;
    let empty = WIDTH as usize - full;
    format!("[{}{}]", "#".repeat(full), "·".repeat(empty))
}

/// `5:38`.
pub(super) fn clock(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

/// `1.5 MB`.
pub(super) fn bytes(count: u64) -> String {
    let units = ["kB", "MB", "GB", "TB"];
    let mut size = count as f64 / 1000.0;
    let mut units = units.into_iter();
    let mut unit = units.next().unwrap_or_default();
    if count < 1000 {
        return format!("{count} B");
    }
    for next in units {
        // What would be shown as 1000.0 is the next one's.
        if size < 999.95 {
            break;
        }
        (size, unit) = (size / 1000.0, next);
    }
    format!("{size:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_as_wide_as_any() {
        for (done, total) in [
            (0, 0),
            (0, 9),
            (5, 9),
            (9, 9),
            (12, 9),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(gauge(done, total).chars().count(), 26, "{done} of {total}");
        }
        assert!(gauge(1, 2).starts_with("[############·"));
    }

    #[test]
    fn a_line_is_no_wider_than_its_terminal() {
        assert_eq!(fitting("Reading ·· 1 B", 10), "Reading ·");
        assert_eq!(fitting("Reading", 80), "Reading");
        assert_eq!(fitting("Reading", 0), "");
    }

    #[test]
    fn sizes_are_short() {
        for (count, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (2_147_483_648, "2.1 GB"),
            (u64::MAX, "18446744.1 TB"),
        ] {
            assert_eq!(bytes(count), shown);
        }
        assert_eq!(clock(338), "5:38");
    }
}
