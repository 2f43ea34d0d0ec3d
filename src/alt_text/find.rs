//! The images of one file: which of them lack a text, where it would go, and what is known of the
//! image by the file alone.

use std::{collections::HashMap, ops::Range, sync::LazyLock};

use regex::Regex;

use super::{
    markdown,
    scan::{self, Attribute, Dialect, Picture, Piece, Tag, Unsure, Value},
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
    /// The same where braces are code in quotes too.
    Svelte(&'static str),
    /// `name="…"`, or `name={"…"}` where that has to say something special.
    Code(&'static str),
    /// Between the brackets of Markdown.
    Markdown,
}

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
        let pieces = match kind {
            Kind::Markup(dialect) => scan::scan(text, head.end, dialect)?,
            Kind::Markdown => markdown::scan(text, head.end)?,
        };
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
        let is_before = |piece: &&Piece| piece.start() < at.start;
        let (before, after): (Vec<&Piece>, Vec<&Piece>) = self.pieces.iter().partition(is_before);
        let texts = |pieces: &mut dyn Iterator<Item = &Piece>| {
            let mut texts: Vec<String> = Vec::new();
            let mut length = 0;
            for piece in pieces {
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
        let mut before = texts(&mut before.into_iter().rev());
        before.reverse();
        let (before, after) = (before.join(" "), texts(&mut after.into_iter()).join(" "));
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
    pub(super) fn shape(&self) -> Vec<&'a str> {
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
                Piece::Picture(_) => shape.push("!["),
            }
        }
        shape
    }

    /// All images that have no text.
    pub(super) fn images(&self, kind: Kind) -> Vec<Found> {
        let mut images = Images {
            page: self,
            dialect: kind.dialect(),
            names: self.names(),
            open: Vec::new(),
            found: Vec::new(),
        };
        images.walk();
        images.found.sort_by_key(|found| found.at.start);
        let mut lines = Lines::new(self.text);
        for found in &mut images.found {
            found.line = lines.of(found.at.start);
        }
        if kind.is_prose() {
            images.found.extend(self.pairs());
        }
        images.found
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

/// An element around the place at which we are.
struct Open<'a> {
    name: &'a str,
    is_hidden: bool,
    /// A link or a button.
    acts: bool,
    /// It says something besides its images.
    speaks: bool,
    /// The images in it begin here, in the list of what was found.
    first: usize,
}

struct Images<'p, 'a> {
    page: &'p Page<'a>,
    dialect: Dialect,
    names: HashMap<&'a str, Name<'a>>,
    open: Vec<Open<'a>>,
    /// With whether it has an empty text.
    found: Vec<Found>,
}

/// Elements around a place that are looked at; more are not told apart.
const MAX_OPEN: usize = 1_000;

const CHOSEN: &str =
    "its image is chosen when the page is made: give it a text from where the image comes from";
const SPREAD: &str = "its attributes come from elsewhere ({...}): give it a text there";

impl<'a> Images<'_, 'a> {
    fn walk(&mut self) {
        for piece in &self.page.pieces {
            match piece {
                Piece::Open(tag) => self.tag(tag),
                Piece::Close(name) => self.close(self.page.slice(name)),
                Piece::Text(_) | Piece::Code(_) => {
                    for open in &mut self.open {
                        open.speaks = true;
                    }
                }
                Piece::Picture(picture) => self.picture(picture),
            }
        }
        while let Some(open) = self.open.pop() {
            self.settle(&open);
        }
    }

    fn close(&mut self, name: &str) {
        let opened = |open: &Open<'_>| open.name.eq_ignore_ascii_case(name);
        let Some(at) = self.open.iter().rposition(opened) else {
            return;
        };
        for open in self.open.split_off(at) {
            self.settle(&open);
        }
    }

    /// An image with an empty text in a link that has words of its own says nothing new.
    fn settle(&mut self, open: &Open<'_>) {
        if !(open.acts && open.speaks) {
            return;
        }
        for found in &mut self.found[open.first..] {
            let is_empty = !found.place.at.is_empty() || found.place.form == Form::Markdown;
            if is_empty && found.what != What::Decorative {
                found.what = What::Decorative;
            }
        }
    }

    fn tag(&mut self, tag: &Tag) {
        let name = self.page.slice(&tag.name);
        self.image(tag, name);
        if tag.is_empty || self.open.len() >= MAX_OPEN {
            return;
        }
        let role = self.page.literal(tag, "role").unwrap_or_default();
        let acts = matches!(
            name,
            "a" | "button" | "A" | "Link" | "NuxtLink" | "RouterLink"
        ) || matches!(role, "link" | "button");
        let speaks = ["aria-label", "aria-labelledby"].iter().any(|name| {
            let said = self.page.attribute(tag, name);
            said.is_some_and(|said| !matches!(&said.value, Value::Text(inner) if inner.is_empty()))
        });
        self.open.push(Open {
            name,
            is_hidden: self.page.literal(tag, "aria-hidden") == Some("true"),
            acts,
            speaks,
            first: self.found.len(),
        });
    }

    fn is_hidden(&self) -> bool {
        self.open.iter().any(|open| open.is_hidden)
    }

    fn image(&mut self, tag: &Tag, name: &'a str) {
        let is_image = self.is_image(name);
        let is_component = name.starts_with(|c: char| c.is_ascii_uppercase());
        let alt = match is_image {
            true => self.page.attribute(tag, "alt"),
            // Nobody knows if it takes a text, unless it has an empty one.
            false if is_component => tag.attributes.iter().find(|attribute| {
                is_text_of_image(self.page.slice(&attribute.name))
                    && self.is_empty(&attribute.value)
            }),
            false => return,
        };
        let is_spread = |attribute: &Attribute| {
            let name = self.page.slice(&attribute.name);
            attribute.name.is_empty() || name == "v-bind"
        };
        let has_spread = tag.attributes.iter().any(is_spread);
        match alt {
            // Vue binds by another name.
            None if is_image => {
                let bound = [":alt", "v-bind:alt", "bind:alt", ".alt"];
                if bound
                    .iter()
                    .any(|name| self.page.attribute(tag, name).is_some())
                {
                    return;
                }
            }
            None => return,
            Some(alt) if !self.is_empty(&alt.value) => return,
            Some(_) => {}
        }
        let shown = match is_image {
            true => self.source(tag),
            false => self.of_component(tag, alt),
        };
        let what = if self.is_set_apart(tag, alt.is_some(), &shown) {
            What::Decorative
        } else if has_spread {
            What::Person(SPREAD)
        } else {
            match &shown {
                Shown::Unknown => What::Person(CHOSEN),
                _ => What::Wants,
            }
        };
        let place = self.place(tag, alt);
        self.found.push(Found {
            at: tag.at.clone(),
            line: 0,
            what,
            shown,
            place,
        });
    }

    fn is_image(&self, name: &str) -> bool {
        if matches!(name, "img" | "enhanced:img" | "NuxtImg" | "NuxtPicture")
            || self.dialect == Dialect::Html && name.eq_ignore_ascii_case("img")
        {
            return true;
        }
        match self.names.get(name) {
            Some(Name::Import { what, from }) => {
                *from == "astro:assets" && matches!(*what, "Image" | "Picture")
                    || matches!(*from, "next/image" | "next/legacy/image")
            }
            _ => false,
        }
    }

    fn is_empty(&self, value: &Value) -> bool {
        match value {
            Value::None => true,
            Value::Text(inner) => self.page.slice(inner).trim().is_empty(),
            Value::Code(inner) => {
                unquoted(self.page.slice(inner)).is_some_and(|text| text.trim().is_empty())
            }
        }
    }

    /// Did somebody say that it is there to be seen alone? Who leaves the text out has said nothing.
    fn is_set_apart(&self, tag: &Tag, has_empty: bool, shown: &Shown) -> bool {
        let page = self.page;
        let role = page.literal(tag, "role").unwrap_or_default();
        if matches!(role, "presentation" | "none")
            || page.literal(tag, "aria-hidden") == Some("true")
            || self.is_hidden()
        {
            return true;
        }
        let side = |name| page.literal(tag, name)?.trim().parse::<u32>().ok();
        let (width, height) = (side("width"), side("height"));
        let is_spacer = width.is_some_and(|w| w <= 4) || height.is_some_and(|h| h <= 4);
        if is_spacer {
            return true;
        }
        if !has_empty {
            return false;
        }
        let is_icon = width.is_some_and(|w| w <= 32) && height.is_some_and(|h| h <= 32);
        let class = page
            .literal(tag, "class")
            .or(page.literal(tag, "className"));
        let mut classes = class.unwrap_or_default().split_whitespace();
        let is_styled = classes.any(|class| class.starts_with("-z-") || is_ornament(class));
        let name = match shown {
            Shown::Address(path) | Shown::Import(path) => path.as_str(),
            Shown::Unknown => "",
        };
        is_icon || is_styled || is_ornament(stem(name))
    }

    /// The image of a tag.
    fn source(&self, tag: &Tag) -> Shown {
        let names = ["src", ":src", "v-bind:src", "data-src"];
        let mut sources = names.iter().filter_map(|name| {
            let attribute = self.page.attribute(tag, name)?;
            Some(self.shown(&attribute.value, name.contains(':')))
        });
        let first = sources.next().unwrap_or(Shown::Unknown);
        match &first {
            // Of one that is loaded later.
            Shown::Address(address) if address.starts_with("data:") => {
                sources.next().unwrap_or(first)
            }
            _ => first,
        }
    }

    fn shown(&self, value: &Value, is_bound: bool) -> Shown {
        match value {
            Value::None => Shown::Unknown,
            Value::Text(inner) if !is_bound => Shown::Address(self.page.slice(inner).trim().into()),
            Value::Text(inner) | Value::Code(inner) => self.named(self.page.slice(inner)),
        }
    }

    /// What code shows, if it is a name or a text.
    fn named(&self, code: &str) -> Shown {
        static IMPORTED: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r#"^(?:await\s+)?import\(\s*["']([^"']+)["']\s*\)$"#)
                .expect("a fixed expression")
        });
        let code = code.trim();
        if let Some(address) = unquoted(code) {
            return Shown::Address(address.trim().into());
        }
        if let Some(path) = IMPORTED.captures(code).and_then(|found| found.get(1)) {
            return Shown::Import(path.as_str().into());
        }
        match self.names.get(code.strip_suffix(".src").unwrap_or(code)) {
            Some(Name::Import { what, from }) if code.starts_with(what) || is_picture(from) => {
                match is_picture(from) {
                    true => Shown::Import((*from).into()),
                    false => Shown::Unknown,
                }
            }
            Some(Name::Text(address)) => Shown::Address((*address).into()),
            _ => Shown::Unknown,
        }
    }

    /// The image that a component is given beside its empty text: the only one, or the one whose
    /// name fits.
    fn of_component(&self, tag: &Tag, alt: Option<&Attribute>) -> Shown {
        let alt = alt.map_or("", |alt| self.page.slice(&alt.name));
        let images: Vec<(&str, Shown)> = tag
            .attributes
            .iter()
            .filter_map(|attribute| {
                let shown = self.shown(&attribute.value, false);
                let is_image = match &shown {
                    Shown::Address(path) | Shown::Import(path) => is_picture(path),
                    Shown::Unknown => false,
                };
                is_image.then(|| (self.page.slice(&attribute.name), shown))
            })
            .collect();
        let stem = alt.to_ascii_lowercase().replace("alt", "");
        let stem = stem.trim_matches(['-', '_']);
        let fits = |name: &str| !stem.is_empty() && name.to_ascii_lowercase().starts_with(stem);
        match &images[..] {
            [(_, only)] => only.clone(),
            images => {
                let mut fitting = images.iter().filter(|(name, _)| fits(name));
                match (fitting.next(), fitting.next()) {
                    (Some((_, shown)), None) => shown.clone(),
                    _ => Shown::Unknown,
                }
            }
        }
    }

    fn place(&self, tag: &Tag, alt: Option<&Attribute>) -> Place {
        let name = alt.map_or("alt", |alt| kept_name(self.page.slice(&alt.name)));
        let form = match self.dialect {
            Dialect::Html | Dialect::Vue => Form::Attribute(name),
            Dialect::Svelte => Form::Svelte(name),
            Dialect::Astro | Dialect::Jsx | Dialect::Mdx => Form::Code(name),
        };
        if let Some(alt) = alt {
            return Place {
                at: alt.at.clone(),
                before: String::new(),
                form,
            };
        }
        let src = ["src", ":src", "v-bind:src"]
            .iter()
            .find_map(|name| self.page.attribute(tag, name));
        let at = src.map_or(tag.name.end, |src| src.at.end);
        // Attributes that stand below each other go on so.
        let before = src.and_then(|src| {
            let line = self.page.text[..src.at.start].rfind('\n')? + 1;
            let indent = self.page.text.get(line..src.at.start)?;
            let is_indent = !indent.is_empty() && indent.trim().is_empty();
            let end = match self.page.text[..line].ends_with("\r\n") {
                true => "\r\n",
                false => "\n",
            };
            is_indent.then(|| format!("{end}{indent}"))
        });
        Place {
            at: at..at,
            before: before.unwrap_or_else(|| " ".into()),
            form,
        }
    }

    fn picture(&mut self, picture: &Picture) {
        if !self.page.slice(&picture.alt).trim().is_empty() {
            return;
        }
        let is_ornament = is_ornament(stem(&picture.src));
        self.found.push(Found {
            at: picture.at.clone(),
            line: 0,
            what: match is_ornament || self.is_hidden() {
                true => What::Decorative,
                false => What::Wants,
            },
            shown: Shown::Address(picture.src.clone()),
            place: Place {
                at: picture.alt.clone(),
                before: String::new(),
                form: Form::Markdown,
            },
        });
    }
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

/// One of the names that we know, for ever.
fn kept_name(name: &str) -> &'static str {
    let known = TEXTS.iter().find(|known| **known == name);
    known.copied().unwrap_or("alt")
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

/// A path's last name without its ending.
fn stem(path: &str) -> &str {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    name.split('.').next().unwrap_or_default()
}

/// Is something called as what is only there to look good?
fn is_ornament(name: &str) -> bool {
    const WORDS: [&str; 24] = [
        "background",
        "backdrop",
        "bg",
        "blob",
        "border",
        "corner",
        "deco",
        "decoration",
        "decorative",
        "divider",
        "dots",
        "gradient",
        "noise",
        "ornament",
        "overlay",
        "pattern",
        "separator",
        "shadow",
        "spacer",
        "squiggle",
        "swirl",
        "texture",
        "transparent",
        "wave",
    ];
    let mut words = name.split(|c: char| !c.is_alphabetic());
    words.any(|word| {
        let word = word.to_ascii_lowercase();
        let one = word.strip_suffix('s').unwrap_or(&word);
        WORDS.contains(&word.as_str()) || WORDS.contains(&one)
    })
}
