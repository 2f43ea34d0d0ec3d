//! Scripts, read for where they end and where tags stand in them.

use super::{Dialect, Piece, Scanner, Unsure, is_word};

/// Where code ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Brace,
    BlankLine,
    File,
}

impl Scanner<'_> {
    /// Code, past its end. Says if there are tags in it.
    pub(super) fn code(&mut self, end: End, with_tags: bool) -> Result<bool, Unsure> {
        self.deeper()?;
        let with_tags = with_tags && self.dialect.has_tags_in_code();
        let mut has_tags = false;
        // Brackets that are open.
        let mut open: Vec<u8> = Vec::new();
        // An operand may come next, and no operator: a tag or a pattern may begin.
        let mut is_open = true;
        while let Some(byte) = self.peek() {
            match byte {
                b'}' if open.is_empty() && end == End::Brace => {
                    self.at += 1;
                    self.depth -= 1;
                    return Ok(has_tags);
                }
                b'{' | b'(' | b'[' => {
                    open.push(byte);
                    is_open = true;
                    self.at += 1;
                }
                b'}' | b')' | b']' => {
                    let opened = open.pop();
                    let fits = matches!(
                        (opened, byte),
                        (Some(b'{'), b'}') | (Some(b'('), b')') | (Some(b'['), b']')
                    );
                    if !fits {
                        return self.unsure();
                    }
                    is_open = byte == b'}';
                    self.at += 1;
                }
                b'\n'
                    if end == End::BlankLine && open.is_empty() && self.is_blank_after(self.at) =>
                {
                    break;
                }
                b'"' | b'\'' => {
                    self.string(byte)?;
                    is_open = false;
                }
                b'`' => {
                    self.template()?;
                    is_open = false;
                }
                b'/' if self.starts("//") => self.skip_line(),
                b'/' if self.starts("/*") => {
                    self.at += 2;
                    self.skip_past("*/")?;
                }
                b'/' if is_open => {
                    self.pattern();
                    is_open = false;
                }
                b'<' if self.dialect == Dialect::Astro && self.starts("<!--") => {
                    self.skip_past("-->")?;
                }
                b'<' if is_open && with_tags && self.element()? => {
                    has_tags = true;
                    is_open = false;
                }
                byte if is_word(byte) => {
                    let start = self.at;
                    while self.peek().is_some_and(is_word) {
                        self.at += 1;
                    }
                    // A number's fraction is one with it.
                    is_open = is_before_operand(&self.text[start..self.at]);
                }
                byte if byte.is_ascii_whitespace() => self.at += 1,
                b'.' => {
                    is_open = false;
                    self.at += 1;
                    // `...` comes before an operand, `.return` is a name.
                    if self.starts("..") {
                        self.at += 2;
                        is_open = true;
                    } else {
                        while self.peek().is_some_and(is_word) {
                            self.at += 1;
                        }
                    }
                }
                _ => {
                    is_open = true;
                    self.at += 1;
                }
            }
        }
        self.depth -= 1;
        match end == End::Brace || !open.is_empty() {
            true => self.unsure(),
            false => Ok(has_tags),
        }
    }

    /// Is the line after this line feed without content?
    pub(super) fn is_blank_after(&self, line_feed: usize) -> bool {
        let rest = &self.text[line_feed + 1..];
        let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
        line.trim_ascii().is_empty()
    }

    /// An element in code, whole; false if it is none and nothing was read.
    fn element(&mut self) -> Result<bool, Unsure> {
        let (start, pieces) = (self.at, self.pieces.len());
        self.deeper()?;
        let tag = self.tag()?;
        let is_type = |scanner: &Self| {
            // `<T extends X>(a: T) => …`
            let Some(Piece::Open(tag)) = scanner.pieces.get(pieces) else {
                return false;
            };
            let first = tag.attributes.first();
            first.is_some_and(|first| &scanner.text[first.name.clone()] == b"extends")
        };
        match tag {
            Some(true) if is_type(self) => {}
            Some(true) => {
                self.content(Some(1))?;
                self.depth -= 1;
                return Ok(true);
            }
            Some(false) => {
                self.depth -= 1;
                return Ok(true);
            }
            None => {}
        }
        self.back_to(start, pieces)?;
        self.depth -= 1;
        Ok(false)
    }

    fn string(&mut self, quote: u8) -> Result<(), Unsure> {
        let mut at = self.at + 1;
        loop {
            match self.text.get(at) {
                Some(byte) if *byte == quote => {
                    self.at = at + 1;
                    return Ok(());
                }
                Some(b'\\') => at += 2,
                Some(b'\n') | None => return self.unsure(),
                Some(_) => at += 1,
            }
        }
    }

    pub(super) fn template(&mut self) -> Result<(), Unsure> {
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'`') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.at = (self.at + 2).min(self.text.len()),
                Some(b'$') if self.starts("${") => {
                    self.at += 2;
                    self.code(End::Brace, false)?;
                }
                Some(_) => self.at += 1,
                None => return self.unsure(),
            }
        }
    }

    /// A regular expression; what does not end on its line is a division.
    fn pattern(&mut self) {
        let (mut at, mut in_class) = (self.at + 1, false);
        loop {
            match self.text.get(at) {
                Some(b'\\') => at += 1,
                Some(b'[') => in_class = true,
                Some(b']') => in_class = false,
                Some(b'/') if !in_class => {
                    self.at = at + 1;
                    return;
                }
                Some(b'\n') | None => {
                    self.at += 1;
                    return;
                }
                Some(_) => {}
            }
            at += 1;
        }
    }
}

/// Does an operand come after this word?
fn is_before_operand(word: &[u8]) -> bool {
    const WORDS: [&str; 17] = [
        "return",
        "typeof",
        "case",
        "in",
        "of",
        "do",
        "else",
        "void",
        "delete",
        "instanceof",
        "new",
        "await",
        "yield",
        "default",
        "throw",
        "extends",
        "export",
    ];
    WORDS.iter().any(|known| known.as_bytes() == word)
}
