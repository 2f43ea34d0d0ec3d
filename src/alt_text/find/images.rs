//! The images among a file's pieces: which of them is without a text, what it shows, where a text
//! would go, and whether somebody said that it needs none.

use std::{collections::HashMap, sync::LazyLock};

use regex::Regex;

use super::{
    Form, Found, Name, Page, Place, Shown, TEXTS, What, is_picture, is_text_of_image, unquoted,
};
use crate::alt_text::scan::{Attribute, Dialect, Picture, Piece, Tag, Value};

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
    found: Vec<Found>,
}

/// All images of a page that have no text, in order, their lines not counted yet.
pub(super) fn without_text<'a>(
    page: &Page<'a>,
    dialect: Dialect,
    names: HashMap<&'a str, Name<'a>>,
) -> Vec<Found> {
    let mut images = Images {
        page,
        dialect,
        names,
        open: Vec::new(),
        found: Vec::new(),
    };
    images.walk();
    images.found.sort_by_key(|found| found.at.start);
    images.found
}

/// Elements around a place that are looked at; more are not told apart.
const MAX_OPEN: usize = 200;

const CHOSEN: &str =
    "its image is chosen when the page is made: give it a text from where the image comes from";
const APART: &str =
    "its address stands apart, where it is not read with certainty: give it a text by hand";
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
            is_hidden: self.hides(tag),
            acts,
            speaks,
            first: self.found.len(),
        });
    }

    /// `aria-hidden="true"`, and what JSX means by it.
    fn hides(&self, tag: &Tag) -> bool {
        let is_jsx = matches!(self.dialect, Dialect::Jsx | Dialect::Mdx);
        match self
            .page
            .attribute(tag, "aria-hidden")
            .map(|said| &said.value)
        {
            Some(Value::Text(inner)) => self.page.slice(inner) == "true",
            Some(Value::Code(inner)) => {
                let code = self.page.slice(inner).trim();
                code == "true" || unquoted(code) == Some("true")
            }
            Some(Value::None) => is_jsx,
            None => false,
        }
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
        if matches!(role, "presentation" | "none") || self.hides(tag) || self.is_hidden() {
            return true;
        }
        let side = |name| {
            let said = match &page.attribute(tag, name)?.value {
                Value::Text(inner) | Value::Code(inner) => page.slice(inner),
                Value::None => return None,
            };
            said.trim().trim_end_matches("px").parse::<u32>().ok()
        };
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
            Dialect::Html | Dialect::Vue | Dialect::Svelte => Form::Attribute(name),
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
        let src = picture.src.as_deref();
        let is_ornament = src.is_some_and(|src| is_ornament(stem(src)));
        self.found.push(Found {
            at: picture.at.clone(),
            line: 0,
            what: match src {
                _ if is_ornament || self.is_hidden() => What::Decorative,
                Some(_) => What::Wants,
                None => What::Person(APART),
            },
            shown: src.map_or(Shown::Unknown, |src| Shown::Address(src.to_owned())),
            place: Place {
                at: picture.alt.clone(),
                before: String::new(),
                form: Form::Markdown,
            },
        });
    }
}

/// One of the names that we know, for ever.
fn kept_name(name: &str) -> &'static str {
    let known = TEXTS.iter().find(|known| **known == name);
    known.copied().unwrap_or("alt")
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
