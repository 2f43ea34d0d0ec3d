//! Addresses of MDX's images that stand apart: `![][name]` here, `[name]: /a.png` there.

use std::collections::HashMap;

use super::{Scanner, find};

/// Longest name, in bytes; CommonMark's own limit.
const MAX_NAME: usize = 999;

/// What names stand for. `None`: it may be an address, and nobody knows for sure.
pub(super) type Addresses = HashMap<String, Option<String>>;

impl Scanner<'_> {
    /// Notes the address that this line gives a name; true if all of the line was read.
    ///
    /// Only one line that stands apart is believed: what is in a paragraph is no address, and who
    /// says what a list or a quote makes of it.
    pub(super) fn address(&mut self, text: usize) -> bool {
        let start = self.at;
        let end = find(self.text, start, b"\n").unwrap_or(self.text.len());
        let line = &self.text[start..end];
        let is_before = |b: &u8| {
            b.is_ascii_digit()
                || matches!(b, b' ' | b'\t' | b'>' | b'-' | b'*' | b'+' | b'.' | b')')
        };
        let before = line.iter().take_while(|byte| is_before(byte)).count();
        if line.get(before) != Some(&b'[') {
            return false;
        }
        let Ok((name, after)) = name_at(line, before) else {
            return false;
        };
        let Some(rest) = line[after..].strip_prefix(b":") else {
            return false;
        };
        let address = address_in(rest)
            .filter(|_| line[..before].trim_ascii().is_empty() && self.is_apart(start));
        let is_sure = address.is_some();
        // The first one of a name is in force.
        self.addresses.entry(name).or_insert(address);
        if is_sure {
            self.text_piece(text);
            self.at = end;
            self.after_address = end + 1;
        }
        is_sure
    }

    /// Is there no line of a paragraph before this one?
    fn is_apart(&self, start: usize) -> bool {
        let before = &self.text[self.begin.min(start)..start];
        let mut lines = before.rsplit(|byte| *byte == b'\n').skip(1);
        let is_blank = |line: &[u8]| line.trim_ascii().is_empty();
        start == self.after_address || lines.next().is_none_or(is_blank)
    }

    /// What the name at `[` stands for, and where it ends; else how far was read.
    pub(super) fn address_of(&self, at: usize) -> Result<(Option<String>, usize), usize> {
        let (name, end) = name_at(self.text, at)?;
        let address = self.known.get(&name).ok_or(end)?;
        Ok((address.clone(), end))
    }
}

/// A name in brackets, as it is compared, and where it ends; else how far was read.
fn name_at(text: &[u8], at: usize) -> Result<(String, usize), usize> {
    let inner = at + 1;
    let mut end = inner;
    loop {
        let byte = text.get(end).filter(|_| end - inner <= MAX_NAME);
        match byte.ok_or(end)? {
            b'\\' => end += 1,
            b'[' => return Err(end),
            b']' => break,
            _ => {}
        }
        end += 1;
    }
    let name = str::from_utf8(&text[inner..end]).map_err(|_| end)?;
    let words: Vec<&str> = name.split_whitespace().collect();
    // `[^name]` is a footnote.
    if words.is_empty() || name.starts_with('^') {
        return Err(end);
    }
    Ok((words.join(" ").to_lowercase().to_uppercase(), end + 1))
}

/// The address after the colon, where it is all in this line, with a title or none.
fn address_in(rest: &[u8]) -> Option<String> {
    let rest = str::from_utf8(rest).ok()?.trim();
    let (address, title) = match rest.strip_prefix('<') {
        Some(inner) => inner.split_once('>')?,
        None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
    };
    let title = title.trim();
    let is_title = title.is_empty()
        || [('"', '"'), ('\'', '\''), ('(', ')')]
            .iter()
            .any(|(open, close)| {
                let inner = title
                    .strip_prefix(*open)
                    .and_then(|title| title.strip_suffix(*close));
                inner.is_some_and(|inner| !inner.contains([*open, *close, '\\']))
            });
    (is_title && !address.is_empty() && !address.contains('<')).then(|| address.to_owned())
}
