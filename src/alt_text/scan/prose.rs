//! What MDX adds: Markdown, in which braces are code and `<` begins a tag.

use super::{Picture, Piece, Scanner, Unsure, code::End};

impl Scanner<'_> {
    /// What begins here, if it is no plain text; true if it was read.
    pub(super) fn prose(&mut self, text: usize) -> Result<bool, Unsure> {
        let is_line_start = self.at == 0 || self.text[self.at - 1] == b'\n';
        if is_line_start {
            if self.is_esm() {
                self.text_piece(text);
                self.code(End::BlankLine, false)?;
                return Ok(true);
            }
            if let Some((mark, length)) = self.fence() {
                self.text_piece(text);
                self.skip_fence(mark, length);
                return Ok(true);
            }
            if self.address(text) {
                return Ok(true);
            }
        }
        match self.peek() {
            Some(b'\\') => {
                self.at = (self.at + 1).min(self.text.len() - 1);
                Ok(false)
            }
            Some(b'`') => self.code_span(text),
            Some(b'!') if self.starts("![") => match self.picture() {
                Ok(picture) => {
                    self.text_piece(text);
                    self.at = picture.at.end;
                    self.pieces.push(Piece::Picture(picture));
                    Ok(true)
                }
                Err(end) => {
                    self.read_in_vain(end.saturating_sub(self.at))?;
                    Ok(false)
                }
            },
            _ => Ok(false),
        }
    }

    fn is_esm(&self) -> bool {
        let is_begin = self.starts("import ") || self.starts("export ") || self.starts("import{");
        // Else a page of empty lines would be read for each of them.
        if !is_begin {
            return false;
        }
        let before = self.text[..self.at].trim_ascii_end();
        let gap = &self.text[before.len()..self.at];
        let is_apart = gap.iter().filter(|byte| **byte == b'\n').count() > 1 || before.is_empty();
        is_apart
            || before.ends_with(b"---")
            || before.ends_with(b";")
            || before.ends_with(b"'")
            || before.ends_with(b"\"")
    }

    /// The mark of a fence that opens on this line, and how long it is.
    fn fence(&self) -> Option<(u8, usize)> {
        let line = self.text[self.at..].split(|byte| *byte == b'\n').next()?;
        let start = line
            .iter()
            .position(|byte| !matches!(byte, b' ' | b'\t' | b'>' | b'-' | b'*' | b'+'))?;
        let rest = &line[start..];
        let mark = *rest.first().filter(|mark| matches!(mark, b'`' | b'~'))?;
        let length = rest.iter().take_while(|byte| **byte == mark).count();
        let has_ticks = mark == b'`' && rest[length..].contains(&b'`');
        (length >= 3 && !has_ticks).then_some((mark, length))
    }

    fn skip_fence(&mut self, mark: u8, length: usize) {
        self.skip_line();
        while self.at < self.text.len() {
            self.at += 1;
            let line = self.text[self.at..].split(|byte| *byte == b'\n').next();
            let line = line.unwrap_or_default();
            let inner = line.iter().position(|b| !matches!(b, b' ' | b'\t' | b'>'));
            let rest = line[inner.unwrap_or(line.len())..].trim_ascii_end();
            let is_end = rest.len() >= length && rest.iter().all(|byte| *byte == mark);
            self.skip_line();
            if is_end {
                return;
            }
        }
    }

    /// Code in a line; false if its ticks have no partner.
    fn code_span(&mut self, text: usize) -> Result<bool, Unsure> {
        let run = |at: usize| self.text[at..].iter().take_while(|b| **b == b'`').count();
        let length = run(self.at);
        let mut at = self.at + length;
        while at < self.text.len() {
            if self.text[at] == b'\n' && self.is_blank_after(at) {
                break;
            }
            if self.text[at] != b'`' {
                at += 1;
                continue;
            }
            let found = run(at);
            if found == length {
                self.text_piece(text);
                self.at = at + found;
                return Ok(true);
            }
            at += found;
        }
        self.read_in_vain(at - self.at - length)?;
        self.at += length - 1;
        Ok(false)
    }

    /// An image; else how far was read to know that it is none.
    fn picture(&self) -> Result<Picture, usize> {
        let start = self.at;
        let mut at = start + 2;
        let mut depth = 0;
        loop {
            match self.text.get(at).ok_or(at)? {
                b'\\' => at += 1,
                b'[' => depth += 1,
                b']' if depth == 0 => break,
                b']' => depth -= 1,
                b'\n' if self.is_blank_after(at) => return Err(at),
                _ => {}
            }
            at += 1;
        }
        let alt = start + 2..at;
        match self.text.get(at + 1) {
            Some(b'(') => {}
            Some(b'[') => {
                let (src, end) = self.address_of(at + 1)?;
                let at = start..end;
                return Ok(Picture { at, alt, src });
            }
            _ => return Err(at),
        }
        let inner = at + 2;
        let mut end = inner;
        let mut depth = 0;
        loop {
            match self.text.get(end).ok_or(end)? {
                b'\\' => end += 1,
                b'(' => depth += 1,
                b')' if depth == 0 => break,
                b')' => depth -= 1,
                b'\n' => return Err(end),
                _ => {}
            }
            end += 1;
        }
        let inside = str::from_utf8(&self.text[inner..end])
            .map_err(|_| end)?
            .trim();
        let src = match inside.strip_prefix('<') {
            Some(rest) => rest.split('>').next().unwrap_or_default(),
            None => inside.split_whitespace().next().unwrap_or_default(),
        };
        Ok(Picture {
            at: start..end + 1,
            alt,
            src: Some(src.to_owned()),
        })
    }
}
