//! What the model answered, out of the CLI's lines: by the schema where it kept to it, else by the
//! lines that it was asked for. What leaves a doubt is no answer: nothing is ever filled in.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::text;

/// Longest text that is kept of what the model said, in bytes.
const MAX_RAW: usize = 64 << 10;
const MAX_TAGS: usize = 200;
const MAX_TAG: usize = 200;

/// For whom an image is fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Rating {
    Safe,
    Suggestive,
    Adult,
    Explicit,
}

impl Rating {
    /// As in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Safe => "SAFE",
            Self::Suggestive => "SUGGESTIVE",
            Self::Adult => "ADULT",
            Self::Explicit => "EXPLICIT",
        }
    }

    fn named(word: &str) -> Option<Self> {
        [Self::Safe, Self::Suggestive, Self::Adult, Self::Explicit]
            .into_iter()
            .find(|rating| word.eq_ignore_ascii_case(rating.as_str()))
    }

    /// The one rating that a text begins with. "Not safe" is none, and neither is a choice of two.
    fn of(text: &str) -> Option<Self> {
        let words = text.split(|c: char| !c.is_alphabetic());
        let mut words = words.filter(|word| !word.is_empty());
        let rating = Self::named(words.next()?)?;
        let is_clear = words.filter_map(Self::named).all(|other| other == rating);
        is_clear.then_some(rating)
    }
}

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

    /// Understands it.
    ///
    /// # Errors
    /// What is missing, for a person.
    pub(super) fn parse(&self) -> Result<Parsed, &'static str> {
        if let Some(value) = &self.structured {
            return by_schema(value);
        }
        if self.text.trim().is_empty() {
            return Err("the model said nothing");
        }
        match json_in(&self.text) {
            Some(value) => by_schema(&value),
            None => by_lines(&self.text),
        }
    }
}

const NO_DESCRIPTION: &str = "the model's answer has no description";
const NO_RATING: &str = "the model's answer has no rating that is clear";

fn by_schema(value: &Value) -> Result<Parsed, &'static str> {
    let first = |names: &[&str]| names.iter().find_map(|name| value[*name].as_str());
    let description = first(&["description", "caption"]).unwrap_or_default();
    let rating = first(&["nsfw_rating", "nsfw", "rating"]).unwrap_or_default();
    let tags = match &value["tags"] {
        Value::String(list) => tags_of(list.split(',')),
        Value::Array(tags) => tags_of(tags.iter().filter_map(Value::as_str)),
        _ => return Err("the model's answer has no tags"),
    };
    checked(description, Rating::of(rating), tags)
}

/// The object that a text holds, in a fence or bare, and nothing else to be read as one.
fn json_in(text: &str) -> Option<Value> {
    let (start, end) = (text.find('{')?, text.rfind('}')?);
    let value: Value = serde_json::from_str(text.get(start..=end)?).ok()?;
    value.is_object().then_some(value)
}

/// `DESCRIPTION:` or `CAPTION:`, `NSFW:`, `TAGS:`, each with what follows up to the next.
fn by_lines(text: &str) -> Result<Parsed, &'static str> {
    let mut fields: [Option<String>; 3] = [None, None, None];
    let mut at = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some((field, rest)) = named(line) {
            if fields[field].is_some() {
                return Err("the model's answer says a field twice");
            }
            fields[field] = Some(rest.to_owned());
            at = Some(field);
        } else if line.is_empty() && at.is_some_and(|field| field > 0) {
            // What follows is said besides.
            at = at.filter(|field| fields[*field].as_deref() == Some(""));
        } else if let Some(known) = at.and_then(|field: usize| fields[field].as_mut()) {
            known.push(' ');
            known.push_str(line);
        }
    }
    let [description, rating, tags] = fields;
    let rating = rating.as_deref().and_then(Rating::of);
    let tags = tags.ok_or("the model's answer has no tags")?;
    checked(
        description.as_deref().unwrap_or_default(),
        rating,
        tags_of(tags.split(',')),
    )
}

/// Which field a line begins, and the rest of it. A model likes to make names bold.
fn named(line: &str) -> Option<(usize, &str)> {
    const NAMES: [(&str, usize); 6] = [
        ("DESCRIPTION", 0),
        ("CAPTION", 0),
        ("NSFW", 1),
        ("NSFW_RATING", 1),
        ("NSFW RATING", 1),
        ("TAGS", 2),
    ];
    let (name, rest) = line.split_once(':')?;
    let decoration: &[char] = &['*', '#', '-', '_', ' '];
    let name = name.trim_matches(decoration);
    let (_, field) = NAMES
        .iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known))?;
    Some((*field, rest.trim_start_matches('*').trim()))
}

fn tags_of<'a>(tags: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for tag in tags {
        let tag = tag.trim().trim_end_matches('.');
        let tag = text::cut(tag, MAX_TAG);
        if !tag.is_empty() && !all.iter().any(|known| known == tag) && all.len() < MAX_TAGS {
            all.push(tag.to_owned());
        }
    }
    all
}

fn checked(
    description: &str,
    rating: Option<Rating>,
    tags: Vec<String>,
) -> Result<Parsed, &'static str> {
    let description = description.trim();
    if description.is_empty() {
        return Err(NO_DESCRIPTION);
    }
    Ok(Parsed {
        description: text::cut(description, MAX_RAW).to_owned(),
        rating: rating.ok_or(NO_RATING)?,
        tags,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(text: &str) -> Said {
        let event = json!({"type": "assistant", "message": {"model": "claude-haiku-5-5",
            "content": [{"type": "text", "text": text}]}});
        Said::read(&event.to_string())
    }

    fn parse(text: &str) -> Result<Parsed, &'static str> {
        said(text).parse()
    }

    #[test]
    fn lines_are_read_as_models_write_them() {
        let expected = Parsed {
            description: "A red shoe. It is new.".into(),
            rating: Rating::Suggestive,
            tags: vec!["shoe".into(), "red".into()],
        };
        for text in [
            "DESCRIPTION: A red shoe. It is new.\nNSFW: SUGGESTIVE\nTAGS: shoe, red",
            "Here it is:\n\n**Description:** A red shoe.\nIt is new.\n**NSFW**: suggestive (a bit)\n- TAGS: shoe, , red, shoe.",
            "DESCRIPTION: A red shoe.\nIt is new.\nNSFW: SUGGESTIVE\n\nTAGS:\n\nshoe, red\n\nNote: it is no ADULT one.",
            "caption: A red shoe. It is new.\nnsfw_rating: [SUGGESTIVE]\nTags:\nshoe,\nred",
            "{\"description\": \"A red shoe. It is new.\", \"nsfw_rating\": \"SUGGESTIVE\", \"tags\": [\"shoe\", \"red\"]}",
            "```json\n{\"caption\": \"A red shoe. It is new.\", \"nsfw\": \"Suggestive\", \"tags\": \"shoe, red\"}\n```",
        ] {
            assert_eq!(parse(text).as_ref(), Ok(&expected), "{text}");
        }
    }

    #[test]
    fn a_doubt_is_no_answer_and_never_safe() {
        for text in [
            "",
            "I can't help with that.",
            "DESCRIPTION: A shoe.\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW:\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW: NOT SAFE\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW: unsafe\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW: SAFE, SUGGESTIVE, ADULT or EXPLICIT\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW: SAFE\nNSFW: ADULT\nTAGS: shoe",
            "NSFW: SAFE\nTAGS: shoe",
            "DESCRIPTION:\nNSFW: SAFE\nTAGS: shoe",
            "DESCRIPTION: A shoe.\nNSFW: SAFE",
            "{\"description\": \"A shoe.\", \"tags\": []}",
            "{\"description\": \"A shoe.\", \"nsfw_rating\": \"FINE\", \"tags\": []}",
            "{\"description\": 7, \"nsfw_rating\": \"SAFE\", \"tags\": []}",
            "{\"description\": \"A shoe.\", \"nsfw_rating\": true, \"tags\": []}",
        ] {
            assert!(parse(text).is_err(), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn the_schema_comes_first_and_the_cli_s_own_words_are_no_answer() {
        let lines = [
            json!({"type": "system", "subtype": "init", "model": "claude-haiku-5-5"}),
            json!({"type": "assistant", "message": {"model": "claude-haiku-5-5-20260101",
                "content": [{"type": "text", "text": "I see a shoe."}]}}),
            json!({"type": "assistant", "message": {"model": "claude-haiku-5-5-20260101",
                "content": [{"type": "tool_use", "name": "StructuredOutput", "input":
                    {"description": "A shoe.", "nsfw_rating": "SAFE", "tags": ["shoe"]}}]}}),
            json!({"type": "result", "is_error": false, "result": "{}"}),
        ];
        let output = lines.map(|line| line.to_string()).join("\n");
        let said = Said::read(&format!("noise\n{output}\n"));
        assert_eq!(said.model.as_deref(), Some("claude-haiku-5-5-20260101"));
        assert_eq!(said.parse().unwrap().rating, Rating::Safe);
        assert!(said.raw().contains("A shoe."));

        let error = [
            json!({"type": "assistant", "message": {"model": "<synthetic>",
                "content": [{"type": "text", "text": "DESCRIPTION: x\nNSFW: SAFE\nTAGS: a"}]}}),
            json!({"type": "result", "is_error": true, "result": "DESCRIPTION: x\nNSFW: SAFE\nTAGS: a"}),
        ];
        let error = Said::read(&error.map(|line| line.to_string()).join("\n"));
        assert_eq!((error.parse().is_err(), error.model), (true, None));
    }
}
