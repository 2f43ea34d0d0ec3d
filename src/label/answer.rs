//! What the model answered, out of the CLI's lines: by the schema where it kept to it, else by the
//! lines that it was asked for, in the many forms that models write them. What leaves a doubt is no
//! answer: nothing is ever filled in.

use std::borrow::Cow;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use super::Rating;
use crate::text;

/// Longest text that is kept of what the model said, in bytes.
const MAX_RAW: usize = 64 << 10;
/// Longest text that is read: an answer of 4096 tokens has far less.
const MAX_READ: usize = 256 << 10;
const MAX_TAGS: usize = 200;
const MAX_TAG: usize = 200;

/// What the CLI printed, as far as it tells of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Said {
    /// By the schema.
    structured: Option<Value>,
    text: String,
    /// The model, by its own name.
    pub(super) model: Option<String>,
}

/// An answer that was understood.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parsed {
    pub(super) description: String,
    pub(super) rating: Rating,
    pub(super) tags: Vec<String>,
}

impl Said {
    /// Reads the CLI's stream-json. Of several answers the last one counts: the first one may be a
    /// model thinking aloud before it uses its tool.
    pub(super) fn read(output: &str) -> Self {
        let mut said = Self::default();
        let mut texts: Vec<String> = Vec::new();
        let mut result = String::new();
        for event in output
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        {
            match event["type"].as_str() {
                Some("assistant") => {
                    let message = &event["message"];
                    let model = message["model"].as_str().filter(|name| {
                        // What the CLI says of an error in the model's place.
                        !name.starts_with('<')
                    });
                    let Some(model) = model else { continue };
                    said.model = Some(text::cut(model, MAX_TAG).to_owned());
                    for block in message["content"].as_array().into_iter().flatten() {
                        match block["type"].as_str() {
                            Some("text") => texts.extend(block["text"].as_str().map(str::to_owned)),
                            Some("tool_use") if block["name"] == "StructuredOutput" => {
                                said.structured = Some(block["input"].clone());
                            }
                            _ => {}
                        }
                    }
                }
                Some("result") if event["is_error"] == false => {
                    if event["structured_output"].is_object() {
                        said.structured = Some(event["structured_output"].clone());
                    }
                    result = event["result"].as_str().unwrap_or_default().to_owned();
                }
                _ => {}
            }
        }
        said.text = if texts.is_empty() {
            result
        } else {
            texts.join("\n")
        };
        said
    }

    /// For a person to look at.
    pub(super) fn raw(&self) -> String {
        let raw = match &self.structured {
            Some(value) => value.to_string(),
            None => self.text.trim().to_owned(),
        };
        text::cut(&raw, MAX_RAW).to_owned()
    }

    /// Understands it. Tags that lack are an error only if they were asked for.
    ///
    /// # Errors
    /// What is missing, for a person.
    pub(super) fn parse(&self, wants_tags: bool) -> Result<Parsed, &'static str> {
        if let Some(value) = &self.structured {
            let fields = value.as_object().into_iter().flatten();
            let object = Object(
                fields
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect(),
            );
            return object.parse(wants_tags);
        }
        if self.text.len() > MAX_READ {
            return Err("the model's answer is longer than a label can be");
        }
        let text = clean(&self.text);
        if text.trim().is_empty() {
            return Err("the model said nothing");
        }
        let lines = Lines::read(&text)?;
        match objects_in(&text)?.as_slice() {
            [] => lines.parse(wants_tags),
            [object] => match (object.rating()?, lines.rating()) {
                (_, None) if lines.0.iter().all(Option::is_none) => object.parse(wants_tags),
                // Quoted in a description.
                (_, None) | (None, Some(_)) => lines.parse(wants_tags),
                // Said both ways, or once by the model and once by what it read in the image.
                (Some(one), Some(other)) if Some(one) == other => object
                    .parse(wants_tags)
                    .or_else(|_| lines.parse(wants_tags)),
                (Some(_), Some(_)) => Err(NO_RATING),
            },
            _ => Err(TWICE),
        }
    }
}

const NO_DESCRIPTION: &str = "the model's answer has no description";
const NO_RATING: &str = "the model's answer has no rating that is clear";
const NO_TAGS: &str = "the model's answer has no tags";
const TWICE: &str = "the model's answer says a field twice";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Description = 0,
    Rating = 1,
    Tags = 2,
}

/// By any of its names, in any case.
fn field(name: &str) -> Option<Field> {
    const NAMES: [(&str, Field); 8] = [
        ("DESCRIPTION", Field::Description),
        ("CAPTION", Field::Description),
        ("NSFW", Field::Rating),
        ("NSFW_RATING", Field::Rating),
        ("NSFW RATING", Field::Rating),
        ("NSFWRATING", Field::Rating),
        ("RATING", Field::Rating),
        ("TAGS", Field::Tags),
    ];
    let known = NAMES
        .iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known));
    known.map(|(_, field)| *field)
}

/// A JSON object as it is written: a `Value` keeps the last one of two fields of one name.
#[derive(Debug, PartialEq)]
struct Object(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Object, M::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl Object {
    fn of(&self, wanted: Field) -> impl Iterator<Item = (&str, &Value)> {
        let fields = self.0.iter();
        fields
            .filter(move |(name, _)| field(name) == Some(wanted))
            .map(|(name, value)| (name.as_str(), value))
    }

    /// Which all that it has agree on; `None` if it has none.
    fn rating(&self) -> Result<Option<Rating>, &'static str> {
        let mut agreed = None;
        for (_, value) in self.of(Field::Rating) {
            let rating = value.as_str().and_then(|text| Rating::of(&clean(text)));
            let rating = rating.ok_or(NO_RATING)?;
            if *agreed.get_or_insert(rating) != rating {
                return Err(NO_RATING);
            }
        }
        Ok(agreed)
    }

    fn parse(&self, wants_tags: bool) -> Result<Parsed, &'static str> {
        for wanted in [Field::Description, Field::Rating, Field::Tags] {
            let mut names: Vec<_> = self
                .of(wanted)
                .map(|(name, _)| name.to_uppercase())
                .collect();
            names.sort_unstable();
            if names.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(TWICE);
            }
        }
        let description = self
            .of(Field::Description)
            .find_map(|(_, value)| value.as_str());
        let tags = match self.of(Field::Tags).next() {
            Some((_, Value::String(list))) => Some(tags_in(list)),
            Some((_, Value::Array(tags))) => Some(tags_of(tags.iter().filter_map(Value::as_str))),
            _ => None,
        };
        checked(description, self.rating()?, tags, wants_tags)
    }
}

/// The objects in a text that hold a field of ours, wherever they stand.
fn objects_in(text: &str) -> Result<Vec<Object>, &'static str> {
    // Each may lead deep into what follows.
    const MAX_BRACES: usize = 1000;
    let mut objects = Vec::new();
    let mut braces = 0;
    let mut at = 0;
    while let Some(start) = text[at..].find('{').map(|start| at + start) {
        braces += 1;
        if braces > MAX_BRACES {
            return Err("the model's answer has more braces than a label can have");
        }
        let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Object>();
        at = match values.next() {
            Some(Ok(object)) => {
                if object.0.iter().any(|(name, _)| field(name).is_some()) {
                    objects.push(object);
                }
                start + values.byte_offset()
            }
            _ => start + 1,
        };
    }
    Ok(objects)
}

/// `DESCRIPTION:` or `CAPTION:`, `NSFW:`, `TAGS:`, each with the lines up to the next.
struct Lines([Option<String>; 3]);

impl Lines {
    fn read(text: &str) -> Result<Self, &'static str> {
        let mut fields: [Option<String>; 3] = [None, None, None];
        let mut at = None;
        let mut is_over = false;
        // Paragraphs of a description, if another field follows: else somebody's note.
        let mut pending = String::new();
        for line in text.lines() {
            let line = line.trim();
            if let Some((field, rest)) = named(line) {
                if let Some(known) = at.and_then(|field: Field| fields[field as usize].as_mut()) {
                    known.push_str(&pending);
                }
                pending.clear();
                if fields[field as usize].replace(rest.to_owned()).is_some() {
                    return Err(TWICE);
                }
                (at, is_over) = (Some(field), false);
                continue;
            }
            let Some(field) = at else { continue };
            let Some(known) = fields[field as usize].as_mut() else {
                continue;
            };
            let goes_on = || {
                let last = known.lines().next_back();
                bullet(line).is_some() && last.is_some_and(|last| bullet(last).is_some())
            };
            if line.is_empty() || line.starts_with("```") {
                // A field may begin on the line below its name.
                is_over = !known.is_empty();
            } else if field == Field::Description && is_over {
                pending.push('\n');
                pending.push_str(line);
            } else if !is_over || (field == Field::Tags && goes_on()) {
                known.push('\n');
                known.push_str(line);
            } else {
                at = None;
            }
        }
        Ok(Self(fields))
    }

    /// What is said of it, if anything is.
    fn rating(&self) -> Option<Option<Rating>> {
        self.0[Field::Rating as usize].as_deref().map(Rating::of)
    }

    fn parse(&self, wants_tags: bool) -> Result<Parsed, &'static str> {
        let [description, _, tags] = &self.0;
        let description = description.as_ref().map(|text| text.replace('\n', " "));
        let tags = tags.as_deref().map(tags_in);
        checked(
            description.as_deref(),
            self.rating().flatten(),
            tags,
            wants_tags,
        )
    }
}

/// Which field a line begins, and the rest of it. Names are made bold, counted, and set as headings,
/// which need no colon.
fn named(line: &str) -> Option<(Field, &str)> {
    const MARKS: &[char] = &['*', '#', '-', '_', '>', '`', '•', ' ', '\t'];
    let bare = line.trim_start_matches(MARKS);
    let uncounted = bare.trim_start_matches(|c: char| c.is_ascii_digit());
    let bare = match uncounted.strip_prefix(['.', ')']) {
        Some(rest) if uncounted.len() < bare.len() => rest.trim_start_matches(MARKS),
        _ => bare,
    };
    let (name, rest) = match bare.split_once(':') {
        Some(parts) => parts,
        None if ["#", "**", "__"].iter().any(|mark| line.starts_with(mark)) => (bare, ""),
        None => return None,
    };
    let field = field(name.trim_matches(MARKS))?;
    Some((field, rest.trim_start_matches('*').trim()))
}

/// What stands behind a list's mark or number.
fn bullet(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let uncounted = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = match uncounted.len() < line.len() {
        true => uncounted.strip_prefix(['.', ')']),
        false => line.strip_prefix(['-', '*', '•', '–', '+']),
    };
    rest.filter(|rest| rest.starts_with(char::is_whitespace))
        .map(str::trim)
}

/// A list as it is written: JSON, between commas or semicolons, or an item a line.
fn tags_in(text: &str) -> Vec<String> {
    let text = unwrapped(text.trim());
    if let Ok(tags) = serde_json::from_str::<Vec<String>>(text) {
        return tags_of(tags.iter().map(String::as_str));
    }
    let text = text.strip_prefix('[').unwrap_or(text);
    let text = text.strip_suffix(']').unwrap_or(text);
    let mark = [',', ';'].into_iter().find(|mark| text.contains(*mark));
    let mut list = String::with_capacity(text.len());
    for line in text.lines() {
        let (line, is_item) = match bullet(line) {
            Some(item) => (item, true),
            None => (line, mark.is_none()),
        };
        // A line without a mark of its own goes on with the one before.
        list.push(if is_item { mark.unwrap_or('\n') } else { ' ' });
        list.push_str(line);
    }
    tags_of(list.split(mark.unwrap_or('\n')))
}

fn tags_of<'a>(tags: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for tag in tags {
        if all.len() == MAX_TAGS {
            break;
        }
        let tag = clean(tag);
        let tag = unwrapped(tag.trim().trim_end_matches('.'));
        let tag = text::cut(tag, MAX_TAG);
        if !tag.is_empty() && !all.iter().any(|known| known == tag) {
            all.push(tag.to_owned());
        }
    }
    all
}

/// Without escapes and control characters: it goes to terminals and into files.
fn clean(text: &str) -> Cow<'_, str> {
    let is_control = |c: char| c.is_control() && c != '\n';
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut cleaned = String::with_capacity(text.len());
    for line in text.split('\n') {
        if !cleaned.is_empty() {
            cleaned.push('\n');
        }
        // They part words.
        let line = line.replace(['\r', '\u{b}', '\u{c}'], " ");
        cleaned.push_str(&text::plain(&line));
    }
    Cow::Owned(cleaned)
}

/// Without Markdown and quotes around it, also where they are on one side: the other one may have
/// stood before the name. Those within stay, and with them those at an end.
fn unwrapped(text: &str) -> &str {
    let mut text = text.trim();
    for mark in ['`', '*', '_'] {
        let inner = text.trim_matches(mark);
        if !inner.contains(mark) {
            text = inner.trim();
        }
    }
    for (open, close) in [('"', '"'), ('\'', '\''), ('“', '”')] {
        let inner = text
            .strip_prefix(open)
            .and_then(|text| text.strip_suffix(close));
        if let Some(inner) = inner.filter(|inner| !inner.contains([open, close])) {
            text = inner.trim();
        }
    }
    text
}

fn checked(
    description: Option<&str>,
    rating: Option<Rating>,
    tags: Option<Vec<String>>,
    wants_tags: bool,
) -> Result<Parsed, &'static str> {
    let description = clean(description.unwrap_or_default());
    let description = unwrapped(&description);
    if description.is_empty() {
        return Err(NO_DESCRIPTION);
    }
    if tags.is_none() && wants_tags {
        return Err(NO_TAGS);
    }
    Ok(Parsed {
        description: text::cut(description, MAX_RAW).to_owned(),
        rating: rating.ok_or(NO_RATING)?,
        tags: tags.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests;
