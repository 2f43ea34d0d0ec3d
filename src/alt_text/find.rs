//! The images of one file: which of them lack a text, where it would go, and what is known of the
//! image by the file alone.

mod images;

use std::{collections::HashMap, ops::Range, sync::LazyLock};

use regex::Regex;

use super::{
    markdown,
    scan::{self, Attribute, Dialect, Piece, Tag, Unsure, Value},
};

/// An image without a text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    /// The tag, or all of a Markdown image.
    pub(super) at: Range<usize>,
    /// From 1.
    pub(super) line: usize,
    pub(super) what: What,
    pub(super) shown: Shown,
    pub(super) place: Place,
}

/// What is to be done about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// It wants a text.
    Wants,
    /// It is there to be seen alone, and somebody said so.
    Decorative,
    /// Not by a program.
    Person(&'static str),
}

/// Which image it is, as the file says it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shown {
    /// An address.
    Address(String),
    /// What an import names.
    Import(String),
    /// Code that runs when the page is made, or nothing.
    Unknown,
}

/// Where a text goes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    /// Replaced by it.
    pub(super) at: Range<usize>,
    /// Before it: what sets an attribute apart from the one before.
    pub(super) before: String,
    pub(super) form: Form,
}

/// How a text is written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `name="…"`, with entities.
    Attribute(&'static str),
    /// `name="…"`, or `name={"…"}` where that has to say something special.
    Code(&'static str),
    /// Between the brackets of Markdown.
    Markdown,
}

/// Pieces before and after an image that are looked at for what stands around it.
const MAX_PIECES: usize = 200;

/// A file that was read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Page<'a> {
    pub(super) text: &'a str,
    pieces: Vec<Piece>,
    head: Head<'a>,
}

/// What is before a file's markup.
#[derive(Debug, Clone, Default, PartialEq)]
struct Head<'a> {
    /// Where the markup begins.
    end: usize,
    /// YAML or code.
    text: &'a str,
}

/// Is this a file in which there may be images of the site?
pub(super) fn dialect_of(path: &str) -> Option<Kind> {
    let (_, ending) = path.rsplit_once('.')?;
    Some(match ending {
        "astro" => Kind::Markup(Dialect::Astro),
        "html" | "htm" => Kind::Markup(Dialect::Html),
        "jsx" | "tsx" => Kind::Markup(Dialect::Jsx),
        "vue" => Kind::Markup(Dialect::Vue),
        "svelte" => Kind::Markup(Dialect::Svelte),
        "mdx" => Kind::Markup(Dialect::Mdx),
        "md" | "markdown" => Kind::Markdown,
        _ => return None,
    })
}

/// What a file is read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Markup(Dialect),
    Markdown,
}

impl Kind {
    fn dialect(self) -> Dialect {
        match self {
            Self::Markup(dialect) => dialect,
            Self::Markdown => Dialect::Html,
        }
    }

    fn is_prose(self) -> bool {
        matches!(self, Self::Markdown | Self::Markup(Dialect::Mdx))
    }
}

impl<'a> Page<'a> {
    /// Reads a file.
    ///
    /// # Errors
    /// Where that cannot be done with certainty.
    pub(super) fn read(text: &'a str, kind: Kind) -> Result<Self, Unsure> {
        let has_head = kind.is_prose() || kind == Kind::Markup(Dialect::Astro);
        let head = match has_head {
            true => head(text)?,
            false => Head::default(),
        };
        let mut pieces = match kind {
            Kind::Markup(dialect) => scan::scan(text, head.end, dialect)?,
            Kind::Markdown => markdown::scan(text, head.end)?,
        };
        // A tag in an attribute is read before the tag that it is in.
        pieces.sort_by_key(Piece::start);
        Ok(Self { text, pieces, head })
    }

    fn slice(&self, range: &Range<usize>) -> &'a str {
        self.text.get(range.clone()).unwrap_or_default()
    }

    /// The language that the file says its page has.
    pub(super) fn language(&self, kind: Kind) -> Option<&'a str> {
        let of_tag = self.pieces.iter().find_map(|piece| {
            let Piece::Open(tag) = piece else { return None };
            let is_html = self.slice(&tag.name).eq_ignore_ascii_case("html");
            match self.attribute(tag, "lang").filter(|_| is_html)?.value {
                Value::Text(ref inner) => Some(self.slice(inner)),
                Value::None | Value::Code(_) => None,
            }
        });
        of_tag.or_else(|| {
            let names = ["lang", "language", "locale"];
            let of = |name: &&str| self.said(kind, name);
            names.iter().find_map(of)
        })
    }

    /// What the page is called.
    pub(super) fn title(&self, kind: Kind) -> Option<&'a str> {
        self.said(kind, "title").or_else(|| {
            let mut is_title = false;
            self.pieces.iter().find_map(|piece| match piece {
                Piece::Open(tag) => {
                    let name = self.slice(&tag.name);
                    is_title = name == "h1" || name == "title";
                    let title = self.attribute(tag, "title")?;
                    let Value::Text(inner) = &title.value else {
                        return None;
                    };
                    // Of the page's layout.
                    let is_component = name.starts_with(|c: char| c.is_ascii_uppercase());
                    is_component.then(|| self.slice(inner))
                }
                Piece::Text(at) if is_title => Some(self.slice(at)),
                _ => None,
            })
        })
    }

    /// A line of the YAML in front.
    fn said(&self, kind: Kind, name: &str) -> Option<&'a str> {
        let lines = self.head.text.lines().filter(|_| kind.is_prose());
        let values =
            lines.filter_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
        let mut values = values.map(|value| value.trim().trim_matches(['"', '\'']));
        values.find(|value| !value.is_empty())
    }

    /// The text around a place, for people: before it and after it, at most so many bytes of each.
    pub(super) fn around(&self, at: &Range<usize>, most: usize) -> String {
        let middle = self
            .pieces
            .partition_point(|piece| piece.start() < at.start);
        let (before, after) = self.pieces.split_at(middle);
        let texts = |pieces: &mut dyn Iterator<Item = &Piece>| {
            let mut texts: Vec<String> = Vec::new();
            let mut length = 0;
            for piece in pieces.take(MAX_PIECES) {
                let Piece::Text(range) = piece else { continue };
                let words: Vec<&str> = self.slice(range).split_whitespace().collect();
                let text = words.join(" ");
                length += text.len();
                texts.push(text);
                if length >= most {
                    break;
                }
            }
            texts
        };
        let mut before = texts(&mut before.iter().rev());
        before.reverse();
        let (before, after) = (before.join(" "), texts(&mut after.iter()).join(" "));
        let cut = before.ceil_char_boundary(before.len().saturating_sub(most));
        let end = after.floor_char_boundary(most);
        format!("{} … {}", &before[cut..], &after[..end])
    }

    fn attribute<'t>(&self, tag: &'t Tag, name: &str) -> Option<&'t Attribute> {
        let mut named = tag.attributes.iter();
        named.find(|attribute| self.slice(&attribute.name).eq_ignore_ascii_case(name))
    }

    /// The value of an attribute that is no code.
    fn literal(&self, tag: &Tag, name: &str) -> Option<&'a str> {
        let attribute = self.attribute(tag, name)?;
        match &attribute.value {
            Value::Text(inner) => Some(self.slice(inner)),
            Value::Code(inner) => unquoted(self.slice(inner)),
            Value::None => Some(""),
        }
    }

    /// All of it that has a meaning, but for the texts of images.
    pub(super) fn shape(&self) -> Vec<&str> {
        let mut shape = Vec::new();
        for piece in &self.pieces {
            match piece {
                Piece::Open(tag) => {
                    shape.extend(["<", self.slice(&tag.name)]);
                    let others = tag.attributes.iter().filter(|attribute| {
                        let name = self.slice(&attribute.name);
                        !is_text_of_image(name) && !name.eq_ignore_ascii_case("alt")
                    });
                    shape.extend(others.map(|attribute| self.slice(&attribute.at)));
                    shape.push(if tag.is_empty { "/>" } else { ">" });
                }
                Piece::Close(at) => shape.extend(["</", self.slice(at)]),
                Piece::Text(at) | Piece::Code(at) => shape.push(self.slice(at)),
                Piece::Picture(picture) => {
                    shape.extend(["![", picture.src.as_deref().unwrap_or_default()])
                }
            }
        }
        shape
    }

    /// All images that have no text.
    pub(super) fn images(&self, kind: Kind) -> Vec<Found> {
        let mut found = images::without_text(self, kind.dialect(), self.names());
        let mut lines = Lines::new(self.text);
        for found in &mut found {
            found.line = lines.of(found.at.start);
        }
        if kind.is_prose() {
            found.extend(self.pairs());
        }
        found
    }

    /// What the names in a file's code stand for.
    fn names(&self) -> HashMap<&'a str, Name<'a>> {
        static IMPORT: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(
                r#"(?m)^[ \t]*import\s+(?:type\s+)?([\w$*{},\s]+?)\s*from\s*["']([^"'\n]+)["']"#,
            )
            .expect("a fixed expression")
        });
        static CONST: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r#"(?m)^[ \t]*const\s+([\w$]+)\s*=\s*["']([^"'\n]+)["']\s*;?\s*$"#)
                .expect("a fixed expression")
        });
        let mut names = HashMap::new();
        for found in IMPORT.captures_iter(self.text) {
            let (Some(list), Some(from)) = (found.get(1), found.get(2)) else {
                continue;
            };
            let from = from.as_str();
            for part in list.as_str().split(['{', '}', ',']) {
                let words: Vec<&str> = part.split_whitespace().collect();
                let (what, local) = match words[..] {
                    [name] => (name, name),
                    [what, "as", local] => (what, local),
                    _ => continue,
                };
                names.insert(local, Name::Import { what, from });
            }
        }
        for found in CONST.captures_iter(self.text) {
            if let (Some(name), Some(text)) = (found.get(1), found.get(2)) {
                names
                    .entry(name.as_str())
                    .or_insert(Name::Text(text.as_str()));
            }
        }
        names
    }

    /// Texts of images among the data of a content file: `imageAlt: ""`.
    fn pairs(&self) -> Vec<Found> {
        static PAIR: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r#"(?m)^[ \t]*(?:- +)?(?:[\w-]+(?:Alt|_alt|-alt)|[aA]lt(?:Text)?)[ \t]*:[ \t]*(?:""|'')?[ \t\r]*$"#)
                .expect("a fixed expression")
        });
        let start = self.text.find(self.head.text).unwrap_or(0);
        let mut lines = Lines::new(self.text);
        let found = PAIR.find_iter(self.head.text).map(|found| {
            let at = start + found.start()..start + found.end();
            Found {
                line: lines.of(at.start),
                what: What::Person("the page's data have no text for its image: write it there"),
                shown: Shown::Unknown,
                place: Place {
                    at: at.end..at.end,
                    before: String::new(),
                    form: Form::Markdown,
                },
                at,
            }
        });
        found.collect()
    }
}

#[derive(Debug, Clone, Copy)]
enum Name<'a> {
    Import {
        what: &'a str,
        from: &'a str,
    },
    /// A constant.
    Text(&'a str),
}

/// Counts lines while it goes forward.
struct Lines<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            line: 1,
        }
    }

    fn of(&mut self, at: usize) -> usize {
        let passed = self.text.as_bytes().get(self.at..at).unwrap_or_default();
        self.line += passed.iter().filter(|byte| **byte == b'\n').count();
        self.at = self.at.max(at);
        self.line
    }
}

/// YAML or code between lines of `---`.
fn head(text: &str) -> Result<Head<'_>, Unsure> {
    let body = text.trim_start_matches('\u{feff}').trim_start();
    let start = text.len() - body.len();
    if !body.starts_with("---") {
        return Ok(Head::default());
    }
    let mut at = start;
    let mut lines = text[start..].split_inclusive('\n');
    at += lines.next().map_or(0, str::len);
    let inner = at;
    for line in lines {
        if line.trim_start().starts_with("---") {
            let after = at + line.len() - line.trim_start().len() + 3;
            return Ok(Head {
                end: after,
                text: &text[inner..at],
            });
        }
        at += line.len();
    }
    Err(Unsure { at: start })
}

/// A string in code, and nothing else.
fn unquoted(code: &str) -> Option<&str> {
    let code = code.trim();
    let quote = code
        .chars()
        .next()
        .filter(|c| matches!(c, '"' | '\'' | '`'))?;
    let inner = code[1..].strip_suffix(quote)?;
    let is_plain = !inner.contains([quote, '\\', '\n']) && !inner.contains("${");
    is_plain.then_some(inner)
}

/// Names of attributes that hold an image's text, as components call them.
const TEXTS: [&str; 8] = [
    "alt",
    "altText",
    "imageAlt",
    "imgAlt",
    "alt-text",
    "image-alt",
    "coverAlt",
    "heroAlt",
];

fn is_text_of_image(name: &str) -> bool {
    TEXTS.contains(&name)
}

/// Is it the name of an image's file?
pub(super) fn is_picture(path: &str) -> bool {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let ending = path
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_ascii_lowercase());
    ending.is_some_and(|ending| {
        [
            "png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "svg", "tif", "tiff",
        ]
        .contains(&ending.as_str())
    })
}
