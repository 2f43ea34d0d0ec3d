//! Making what programs print fit for people: no escape sequences, no endless lines, the last
//! few lines alone.

use std::collections::VecDeque;

/// Longest line that is kept, in bytes.
const MAX_LINE: usize = 500;

/// A line without ANSI escape sequences (ECMA-48 CSI and OSC) and control characters.
pub fn plain(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // CSI: parameters, then one final byte in @ to ~.
                Some('[') => while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                // OSC: up to BEL or ST.
                Some(']') => {
                    while let Some(c) = chars.next() {
                        if c == '\u{7}' || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                _ => {}
            },
            '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// The class of an HTTP status, as a figure's label.
pub fn status_class(status: u16) -> &'static str {
    match status {
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    }
}

/// The longest beginning of `text` that has at most `max` bytes and ends between characters.
pub fn cut(text: &str, max: usize) -> &str {
    let mut end = max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The last lines of a program's output. Bounded by lines and by the length of each.
#[derive(Debug)]
pub struct Tail {
    lines: VecDeque<String>,
    max_lines: usize,
}

impl Tail {
    /// Keeps at most so many lines that aren't blank.
    pub fn new(max_lines: usize) -> Self {
        Self {
            lines: VecDeque::new(),
            max_lines,
        }
    }

    /// Adds a line; a blank one is left out.
    pub fn push(&mut self, line: &str) {
        let line = plain(cut(line, 4 * MAX_LINE));
        let line = cut(line.trim_end(), MAX_LINE);
        if line.is_empty() {
            return;
        }
        if self.lines.len() == self.max_lines {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }

    /// The kept lines, oldest first.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }

    /// As many of the last lines as fit into `max_bytes`.
    pub fn text(&self, max_bytes: usize) -> String {
        let mut room = max_bytes;
        let fits = |line: &&String| {
            let fits = line.len() < room;
            room = room.saturating_sub(line.len() + 1);
            fits
        };
        let mut last: Vec<&str> = self
            .lines
            .iter()
            .rev()
            .take_while(fits)
            .map(String::as_str)
            .collect();
        last.reverse();
        last.join("\n")
    }
}

/// How many letters to add, drop or change to come from one name to the other (Levenshtein). Names that
/// are far apart in length, or longer than any name is, are as far as can be.
pub fn distance(a: &str, b: &str) -> usize {
    if a.len().abs_diff(b.len()) > 2 || a.len() > 100 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_titles_and_control_characters_go() {
        for (raw, clean) in [
            ("\u{1b}[31merror\u{1b}[39m: no", "error: no"),
            ("\u{1b}]0;title\u{7}text", "text"),
            ("\u{1b}]8;;http://x\u{1b}\\link", "link"),
            ("a\u{8}b\rc\td", "abc d"),
            ("ends in \u{1b}[", "ends in "),
            ("ünï", "ünï"),
        ] {
            assert_eq!(plain(raw), clean);
        }
    }

    #[test]
    fn the_tail_is_bounded_in_lines_and_bytes() {
        let mut tail = Tail::new(3);
        for line in ["one", "two", "", "three", "four"] {
            tail.push(line);
        }
        assert_eq!(tail.text(100), "two\nthree\nfour");
        assert_eq!(tail.text(11), "three\nfour");
        tail.push(&"é".repeat(100_000));
        assert_eq!(tail.lines().last().map(str::len), Some(MAX_LINE));
    }
}
