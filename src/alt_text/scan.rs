//! The tags of a file, and where they stand: HTML and what is like it. Of scripts only so much is
//! read as is needed to know where they end and where markup stands in them.
//!
//! Nothing of it guesses: a file whose brackets, quotes and tags do not add up is [`Unsure`], and
//! nobody writes to it. Everything is counted in bytes; what has a meaning here is ASCII.

mod code;
mod prose;
mod references;

use std::{mem, ops::Range};

use self::{code::End, references::Addresses};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Html,
    Astro,
    /// JavaScript or TypeScript with tags in it.
    Jsx,
    Mdx,
    Svelte,
    Vue,
}

impl Dialect {
    /// Do braces hold code?
    fn has_code(self) -> bool {
        matches!(self, Self::Astro | Self::Jsx | Self::Mdx | Self::Svelte)
    }

    /// May there be tags in that code?
    fn has_tags_in_code(self) -> bool {
        matches!(self, Self::Astro | Self::Jsx | Self::Mdx)
    }
}

/// A part of a file, in its order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    Open(Tag),
    /// The name of an end tag.
    Close(Range<usize>),
    /// What is there to be read.
    Text(Range<usize>),
    /// Code without tags, in the place of a text.
    Code(Range<usize>),
    /// `![alt](src)` or `![alt][name]`.
    Picture(Picture),
}

impl Piece {
    /// Where it begins.
    pub(super) fn start(&self) -> usize {
        match self {
            Self::Open(tag) => tag.at.start,
            Self::Close(at) | Self::Text(at) | Self::Code(at) => at.start,
            Self::Picture(picture) => picture.at.start,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tag {
    pub(super) at: Range<usize>,
    pub(super) name: Range<usize>,
    pub(super) attributes: Vec<Attribute>,
    /// It has no content: `/>`, or an element that never has one.
    pub(super) is_empty: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Attribute {
    pub(super) at: Range<usize>,
    /// Empty: a spread, of which nobody knows what is in it.
    pub(super) name: Range<usize>,
    pub(super) value: Value,
}

/// Each with what is between its quotes or braces.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    None,
    Text(Range<usize>),
    Code(Range<usize>),
}

/// An image as Markdown writes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Picture {
    pub(super) at: Range<usize>,
    pub(super) alt: Range<usize>,
    /// `None`: it stands elsewhere, in a way that is not read with certainty.
    pub(super) src: Option<String>,
}

/// The file cannot be read with certainty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unsure {
    pub(super) at: usize,
}

/// Code and tags in each other, at most.
const MAX_DEPTH: usize = 64;

/// Elements that have no content.
const VOID: [&str; 14] = [
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
    "track", "wbr",
];

/// Reads a file, from `from` on.
pub(super) fn scan(text: &str, from: usize, dialect: Dialect) -> Result<Vec<Piece>, Unsure> {
    let mut scanner = Scanner {
        text: text.as_bytes(),
        begin: from,
        at: from,
        dialect,
        depth: 0,
        reread: 0,
        known: Addresses::new(),
        addresses: Addresses::new(),
        after_address: from,
        pieces: Vec::new(),
    };
    scanner.all()?;
    if !scanner.addresses.is_empty() {
        // A name may be used before it is said what it stands for.
        scanner = Scanner {
            known: mem::take(&mut scanner.addresses),
            at: from,
            depth: 0,
            reread: 0,
            addresses: Addresses::new(),
            after_address: from,
            pieces: Vec::new(),
            ..scanner
        };
        scanner.all()?;
    }
    Ok(scanner.pieces)
}

struct Scanner<'a> {
    text: &'a [u8],
    /// Where all of it begins.
    begin: usize,
    at: usize,
    dialect: Dialect,
    depth: usize,
    /// Bytes that were read in vain, as the beginning of something that it was not.
    reread: usize,
    /// What names of images' addresses stand for, where it is known yet.
    known: Addresses,
    /// The same, as it is found.
    addresses: Addresses,
    /// The line after the last one of these.
    after_address: usize,
    pieces: Vec<Piece>,
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':' | b'$')
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$') || !byte.is_ascii()
}

impl Scanner<'_> {
    fn all(&mut self) -> Result<(), Unsure> {
        match self.dialect {
            Dialect::Jsx => self.code(End::File, true).map(drop),
            _ => self.content(None),
        }
    }

    fn unsure<T>(&self) -> Result<T, Unsure> {
        Err(Unsure { at: self.at })
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn starts(&self, with: &str) -> bool {
        self.text[self.at..].starts_with(with.as_bytes())
    }

    /// Goes on after the next `what`.
    fn skip_past(&mut self, what: &str) -> Result<(), Unsure> {
        match find(self.text, self.at, what.as_bytes()) {
            Some(found) => {
                self.at = found + what.len();
                Ok(())
            }
            None => self.unsure(),
        }
    }

    fn deeper(&mut self) -> Result<(), Unsure> {
        self.depth += 1;
        match self.depth > MAX_DEPTH {
            true => self.unsure(),
            false => Ok(()),
        }
    }

    /// Goes back to `start`, and forgets what was found since. Bounded: code can be made so that
    /// each level of it is read twice.
    fn back_to(&mut self, start: usize, pieces: usize) -> Result<(), Unsure> {
        self.read_in_vain(self.at - start)?;
        self.pieces.truncate(pieces);
        self.at = start;
        Ok(())
    }

    /// Counts bytes that will be read again.
    fn read_in_vain(&mut self, bytes: usize) -> Result<(), Unsure> {
        self.reread += bytes;
        match self.reread > 2 * self.text.len() + 4096 {
            true => self.unsure(),
            false => Ok(()),
        }
    }

    /// What stands between tags: to the end of the file, or (`open` elements to begin with) to
    /// where the last one of these is closed.
    fn content(&mut self, open: Option<usize>) -> Result<(), Unsure> {
        let mut left = open.unwrap_or(0);
        let is_prose = self.dialect == Dialect::Mdx && open.is_none();
        let mut text = self.at;
        loop {
            let here = self.at;
            let Some(byte) = self.peek() else {
                self.text_piece(text);
                return match open {
                    Some(_) => self.unsure(),
                    None => Ok(()),
                };
            };
            let is_markup = match byte {
                b'<' => self.angle(&mut left, text)?,
                b'{' if self.dialect.has_code() => {
                    self.text_piece(text);
                    self.braces()?;
                    true
                }
                b'{' if self.dialect == Dialect::Vue && self.starts("{{") => {
                    self.text_piece(text);
                    self.skip_past("}}")?;
                    self.pieces.push(Piece::Code(here..self.at));
                    true
                }
                b'}' if matches!(self.dialect, Dialect::Astro | Dialect::Jsx) => {
                    // Astro and JSX refuse it, so something was misread before.
                    return self.unsure();
                }
                _ if is_prose => {
                    let is_skipped = self.prose(text)?;
                    if !is_skipped {
                        self.at += 1;
                    }
                    is_skipped
                }
                _ => {
                    self.at += 1;
                    false
                }
            };
            if is_markup {
                text = self.at;
                if open.is_some() && left == 0 {
                    return Ok(());
                }
            }
        }
    }

    fn text_piece(&mut self, from: usize) {
        let text = &self.text[from..self.at.max(from)];
        // From its end: where the same beginning is asked about again and again that is next to it.
        if text.iter().rev().any(|byte| !byte.is_ascii_whitespace()) {
            self.pieces.push(Piece::Text(from..self.at));
        }
    }

    /// Something that begins with `<`; false if it is a text, of which one byte was read.
    fn angle(&mut self, left: &mut usize, text: usize) -> Result<bool, Unsure> {
        let here = self.at;
        if self.starts("<!--") {
            self.text_piece(text);
            self.skip_past("-->")?;
            return Ok(true);
        }
        if self.starts("<!") || self.starts("<?") {
            self.text_piece(text);
            self.skip_past(">")?;
            return Ok(true);
        }
        if self.starts("</") {
            let mut end = here + 2;
            while self.text.get(end).copied().is_some_and(is_name) {
                end += 1;
            }
            self.text_piece(text);
            self.at = end;
            self.skip_past(">")?;
            self.pieces.push(Piece::Close(here + 2..end));
            *left = left.saturating_sub(1);
            return Ok(true);
        }
        let pieces = self.pieces.len();
        self.text_piece(text);
        match self.tag()? {
            Some(is_open) => *left += usize::from(is_open),
            None => {
                self.back_to(here, pieces)?;
                self.at += 1;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A start tag; says if its element is open now. `None` if it is no tag; then what was read is
    /// to be read again.
    fn tag(&mut self) -> Result<Option<bool>, Unsure> {
        let start = self.at;
        let mut at = start + 1;
        while self.text.get(at).copied().is_some_and(is_name) {
            at += 1;
        }
        let name = start + 1..at;
        let first = self.text.get(start + 1).copied();
        let is_fragment = first == Some(b'>') && self.dialect.has_tags_in_code();
        let is_tag = first.is_some_and(|b| b.is_ascii_alphabetic() || matches!(b, b'_' | b'$'));
        if !is_tag && !is_fragment {
            return Ok(None);
        }
        self.at = at;
        let Some((attributes, is_closed)) = self.attributes()? else {
            return Ok(None);
        };
        let called = self.element_name(&name);
        let is_raw = self.is_raw(&called, &attributes);
        let is_empty = is_closed || VOID.iter().any(|void| void.as_bytes() == called);
        self.pieces.push(Piece::Open(Tag {
            at: start..self.at,
            name: name.clone(),
            attributes,
            is_empty,
        }));
        if is_raw && !is_empty {
            self.raw(&called)?;
            return Ok(Some(false));
        }
        Ok(Some(!is_empty))
    }

    /// What an element is called. Only HTML takes capitals for the same: elsewhere `<Link>` and `<Script>`
    /// are components of the site.
    fn element_name(&self, name: &Range<usize>) -> Vec<u8> {
        let name = &self.text[name.clone()];
        match self.dialect {
            Dialect::Html => name.to_ascii_lowercase(),
            _ => name.to_vec(),
        }
    }

    /// Is its content no markup?
    fn is_raw(&self, name: &[u8], attributes: &[Attribute]) -> bool {
        if self.dialect == Dialect::Jsx {
            return false;
        }
        let has = |wanted: &[u8]| {
            attributes
                .iter()
                .find(|attribute| &self.text[attribute.name.clone()] == wanted)
        };
        match name {
            b"script" | b"style" => true,
            b"textarea" | b"title" => !self.dialect.has_code(),
            // Another language than HTML.
            b"template" => self.dialect == Dialect::Vue && has(b"lang").is_some(),
            _ => self.dialect == Dialect::Astro && has(b"is:raw").is_some(),
        }
    }

    /// Skips to the end tag of this name, and past it.
    fn raw(&mut self, name: &[u8]) -> Result<(), Unsure> {
        let mut at = self.at;
        loop {
            let Some(found) = find(self.text, at, b"</") else {
                return self.unsure();
            };
            let end = found + 2 + name.len();
            let is_end = self
                .text
                .get(found + 2..end)
                .is_some_and(|there| there.eq_ignore_ascii_case(name))
                && !self.text.get(end).copied().is_some_and(is_name);
            if is_end {
                self.pieces.push(Piece::Close(found + 2..end));
                self.at = end;
                return self.skip_past(">");
            }
            at = found + 2;
        }
    }

    /// The attributes of a tag, and whether it ends with `/>`; past its end. `None`: it is no tag.
    fn attributes(&mut self) -> Result<Option<(Vec<Attribute>, bool)>, Unsure> {
        let mut attributes = Vec::new();
        let has_code = self.dialect.has_code();
        loop {
            let Some(byte) = self.peek() else {
                return Ok(None);
            };
            let start = self.at;
            match byte {
                b'>' => {
                    self.at += 1;
                    return Ok(Some((attributes, false)));
                }
                b'/' if self.starts("/>") => {
                    self.at += 2;
                    return Ok(Some((attributes, true)));
                }
                b'/' if self.starts("/*") && has_code => self.skip_past("*/")?,
                b'/' if self.starts("//") && has_code => self.skip_line(),
                b'/' => self.at += 1,
                b'{' if has_code => {
                    self.at += 1;
                    self.code(End::Brace, true)?;
                    attributes.extend(self.in_braces(start));
                }
                byte if byte.is_ascii_whitespace() => self.at += 1,
                b'<' | b'"' | b'\'' | b'=' | b'`' => return Ok(None),
                b'(' | b')' | b',' | b';' | b'&' | b'|' | b'?' if has_code => return Ok(None),
                _ => {
                    let ends = |b: u8| {
                        b.is_ascii_whitespace()
                            || matches!(b, b'=' | b'>' | b'/' | b'<')
                            || has_code && matches!(b, b'{' | b',' | b';' | b'(')
                    };
                    while self.peek().is_some_and(|b| !ends(b)) {
                        self.at += 1;
                    }
                    if self.at == start {
                        return Ok(None);
                    }
                    let name = start..self.at;
                    let Some(value) = self.value()? else {
                        return Ok(None);
                    };
                    attributes.push(Attribute {
                        at: start..self.at,
                        name,
                        value,
                    });
                }
            }
        }
    }

    fn skip_line(&mut self) {
        let end = find(self.text, self.at, b"\n");
        self.at = end.unwrap_or(self.text.len());
    }

    /// `{name}`, `{...all}` or a comment, which begins at `start` and was read.
    fn in_braces(&self, start: usize) -> Option<Attribute> {
        let inner = start + 1..self.at - 1;
        let code = self.text[inner.clone()].trim_ascii();
        let begin = start + 1 + self.text[inner.clone()].len()
            - self.text[inner.clone()].trim_ascii_start().len();
        let is_name = !code.is_empty() && code.iter().copied().all(is_word);
        let is_spread = code.starts_with(b"...");
        (is_name || is_spread).then(|| Attribute {
            at: start..self.at,
            name: match is_name {
                true => begin..begin + code.len(),
                false => start..start,
            },
            value: Value::Code(inner),
        })
    }

    /// What comes after an attribute's name. `None`: that is no attribute.
    fn value(&mut self) -> Result<Option<Value>, Unsure> {
        let after_name = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_whitespace()) {
            self.at += 1;
        }
        if self.peek() != Some(b'=') {
            self.at = after_name;
            return Ok(Some(Value::None));
        }
        self.at += 1;
        while self.peek().is_some_and(|b| b.is_ascii_whitespace()) {
            self.at += 1;
        }
        let start = self.at;
        match self.peek() {
            Some(quote @ (b'"' | b'\'')) => {
                let Some(end) = find(self.text, start + 1, &[quote]) else {
                    return self.unsure();
                };
                self.at = end + 1;
                let inner = start + 1..end;
                // Svelte reads braces in quotes too.
                let is_code =
                    self.dialect == Dialect::Svelte && self.text[inner.clone()].contains(&b'{');
                Ok(Some(match is_code {
                    true => Value::Code(start..self.at),
                    false => Value::Text(inner),
                }))
            }
            Some(b'{') if self.dialect.has_code() => {
                self.at += 1;
                self.code(End::Brace, true)?;
                Ok(Some(Value::Code(start + 1..self.at - 1)))
            }
            Some(b'`') if self.dialect == Dialect::Astro => {
                self.template()?;
                Ok(Some(Value::Code(start..self.at)))
            }
            Some(b'>') | None => Ok(None),
            // Only HTML has values without quotes.
            Some(_) if matches!(self.dialect, Dialect::Jsx | Dialect::Mdx) => Ok(None),
            Some(_) => {
                while self
                    .peek()
                    .is_some_and(|b| !b.is_ascii_whitespace() && b != b'>')
                {
                    self.at += 1;
                }
                Ok(Some(Value::Text(start..self.at)))
            }
        }
    }

    /// `{…}` in the place of a text.
    fn braces(&mut self) -> Result<(), Unsure> {
        let start = self.at;
        self.at += 1;
        if self.dialect == Dialect::Svelte && matches!(self.peek(), Some(b'#' | b'/' | b':' | b'@'))
        {
            self.at += 1;
        }
        let has_tags = self.code(End::Brace, true)?;
        let inner = self.text[start + 1..self.at - 1].trim_ascii();
        let is_comment = inner.is_empty() || inner.starts_with(b"/*") && inner.ends_with(b"*/");
        let is_block =
            self.dialect == Dialect::Svelte && matches!(inner[..], [b'#' | b'/' | b':', ..]);
        if !has_tags && !is_comment && !is_block {
            self.pieces.push(Piece::Code(start..self.at));
        }
        Ok(())
    }
}

/// Where the next `what` is, from `from` on.
pub(super) fn find(text: &[u8], from: usize, what: &[u8]) -> Option<usize> {
    let rest = text.get(from..)?;
    rest.windows(what.len())
        .position(|there| there == what)
        .map(|found| from + found)
}
