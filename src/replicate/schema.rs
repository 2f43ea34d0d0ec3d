//! What a model takes and gives, by its OpenAPI schema: parameters are read and checked by it before
//! anything is paid.
//!
//! A schema comes from whoever published the model. Of it only what is understood is used, to a
//! bounded depth, and what it leaves open is left to Replicate.

use std::fmt;

use serde_json::{Map, Value};

use super::ReplicateError;

/// How deep references and alternatives are followed.
const MAX_DEPTH: usize = 8;
/// Names and choices that an error lists.
const MAX_LISTED: usize = 40;
/// Longest sentence about a parameter in an error.
const MAX_ABOUT: usize = 160;

/// What a model takes and gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Schema {
    /// In the order that the model's author gave them.
    inputs: Vec<Input>,
    gives: Gives,
}

/// What a model's output is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Gives {
    #[default]
    Unknown,
    Files,
    /// Texts and numbers. A URL among them is only written there.
    Text,
}

/// One parameter.
#[derive(Debug, Clone, PartialEq)]
struct Input {
    name: String,
    kind: Kind,
    is_required: bool,
    about: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Text {
        min: Option<u64>,
        max: Option<u64>,
    },
    /// A URL of it, or the file itself.
    File,
    Integer(Range),
    Number(Range),
    Boolean,
    Choice(Vec<Value>),
    List(Box<Kind>),
    /// An object, or what the schema does not say.
    Any,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Range {
    min: Option<f64>,
    max: Option<f64>,
    /// The bounds themselves are out.
    above: Option<f64>,
    below: Option<f64>,
}

/// Everything that is wrong with a call's parameters.
#[derive(Debug, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl Schema {
    /// Reads what a version's `openapi_schema` says; `None` where it says nothing of inputs.
    pub fn read(openapi: &Value) -> Option<Self> {
        let schemas = &openapi["components"]["schemas"];
        let properties = schemas["Input"]["properties"].as_object()?;
        let required = schemas["Input"]["required"].as_array();
        let is_required = |name: &str| {
            required.is_some_and(|all| all.iter().any(|one| one.as_str() == Some(name)))
        };
        let mut inputs: Vec<(i64, Input)> = properties
            .iter()
            .map(|(name, property)| {
                let order = property["x-order"].as_i64().unwrap_or(i64::MAX);
                let input = Input {
                    name: name.clone(),
                    kind: kind_of(property, openapi, 0),
                    is_required: is_required(name) && property.get("default").is_none(),
                    about: about(property),
                };
                (order, input)
            })
            .collect();
        inputs.sort_by(|(a, one), (b, other)| a.cmp(b).then_with(|| one.name.cmp(&other.name)));
        let gives = match schemas.get("Output") {
            None => Gives::Unknown,
            Some(output) if has_files(output, openapi, 0) => Gives::Files,
            Some(_) => Gives::Text,
        };
        Some(Self {
            inputs: inputs.into_iter().map(|(_, input)| input).collect(),
            gives,
        })
    }

    pub(super) fn gives(&self) -> Gives {
        self.gives
    }

    /// Has the model such a parameter?
    pub fn takes(&self, name: &str) -> bool {
        self.input(name).is_some()
    }

    fn input(&self, name: &str) -> Option<&Input> {
        self.inputs.iter().find(|input| input.name == name)
    }

    /// Makes values of texts, as the schema has their types. A name that comes more than once is a
    /// list. What does not fit stays a text, for [`Schema::check`] to refuse.
    pub fn convert(&self, texts: &[(String, String)]) -> Map<String, Value> {
        let mut values = Map::new();
        for (name, text) in texts {
            let kind = self.input(name).map_or(&Kind::Any, |input| &input.kind);
            let value = converted(kind, text);
            match values.get_mut(name) {
                None => {
                    values.insert(name.clone(), value);
                }
                Some(Value::Array(list)) => match value {
                    Value::Array(more) => list.extend(more),
                    one => list.push(one),
                },
                // The last one wins, as with flags.
                Some(known) => *known = value,
            }
        }
        values
    }

    /// Refuses what the model would refuse, all of it at once.
    ///
    /// # Errors
    /// [`ReplicateError::Input`].
    pub fn check(&self, values: &Map<String, Value>) -> Result<(), ReplicateError> {
        let mut problems = Vec::new();
        for (name, value) in values {
            match self.input(name) {
                None => problems.push(self.unknown(name)),
                Some(input) => {
                    if let Some(problem) = wrong(&input.kind, value) {
                        problems.push(format!("{}: {problem}", shown(name)));
                    }
                }
            }
        }
        for input in self.inputs.iter().filter(|input| input.is_required) {
            if !values.contains_key(&input.name) {
                let about = match input.about.as_str() {
                    "" => String::new(),
                    about => format!(" ({about})"),
                };
                problems.push(format!("{} is missing{about}", shown(&input.name)));
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(ReplicateError::Input(Problems(problems))),
        }
    }

    fn unknown(&self, name: &str) -> String {
        let names = self.inputs.iter().map(|input| input.name.as_str());
        let nearest = names
            .clone()
            .map(|known| (crate::text::distance(name, known), known))
            .min()
            .filter(|(distance, _)| *distance <= 2)
            .map(|(_, known)| format!(", did you mean {}?", shown(known)));
        format!(
            "{}: the model has no such parameter{}; it takes {}",
            shown(name),
            nearest.unwrap_or_default(),
            listed(names.map(shown))
        )
    }
}

/// What the property says, its references followed.
fn kind_of(property: &Value, openapi: &Value, depth: usize) -> Kind {
    if depth > MAX_DEPTH {
        return Kind::Any;
    }
    if let Some(target) = referenced(property, openapi) {
        return kind_of(target, openapi, depth + 1);
    }
    for word in ["allOf", "anyOf", "oneOf"] {
        let Some(all) = property[word].as_array() else {
            continue;
        };
        // `X or null` is how an optional parameter is written.
        let mut real = all.iter().filter(|one| one["type"] != "null");
        return match (real.next(), real.next()) {
            (Some(only), None) => kind_of(only, openapi, depth + 1),
            _ => Kind::Any,
        };
    }
    if let Some(choices) = property["enum"].as_array() {
        return Kind::Choice(choices.clone());
    }
    match property["type"].as_str() {
        Some("string") if property["format"] == "uri" => Kind::File,
        Some("string") => Kind::Text {
            min: property["minLength"].as_u64(),
            max: property["maxLength"].as_u64(),
        },
        Some("integer") => Kind::Integer(range_of(property)),
        Some("number") => Kind::Number(range_of(property)),
        Some("boolean") => Kind::Boolean,
        Some("array") => Kind::List(Box::new(kind_of(&property["items"], openapi, depth + 1))),
        _ => Kind::Any,
    }
}

fn referenced<'a>(property: &Value, openapi: &'a Value) -> Option<&'a Value> {
    let path = property["$ref"].as_str()?.strip_prefix('#')?;
    openapi.pointer(path)
}

fn range_of(property: &Value) -> Range {
    let number = |word: &str| property[word].as_f64();
    Range {
        min: number("minimum"),
        max: number("maximum"),
        above: number("exclusiveMinimum"),
        below: number("exclusiveMaximum"),
    }
}

fn about(property: &Value) -> String {
    let text = property["description"].as_str().unwrap_or_default();
    let line = crate::text::plain(text.lines().next().unwrap_or_default());
    crate::text::cut(&line, MAX_ABOUT).trim().to_owned()
}

fn has_files(schema: &Value, openapi: &Value, depth: usize) -> bool {
    if depth > MAX_DEPTH {
        return false;
    }
    if let Some(target) = referenced(schema, openapi) {
        return has_files(target, openapi, depth + 1);
    }
    if schema["type"] == "string" && schema["format"] == "uri" {
        return true;
    }
    let parts = ["allOf", "anyOf", "oneOf"].into_iter();
    let mut parts = parts.filter_map(|word| schema[word].as_array()).flatten();
    let fields = schema["properties"].as_object();
    parts.any(|part| has_files(part, openapi, depth + 1))
        || has_files_in(&schema["items"], openapi, depth)
        || fields.is_some_and(|fields| {
            let mut fields = fields.values();
            fields.any(|field| has_files(field, openapi, depth + 1))
        })
        // An object of no known fields may hold anything.
        || schema["type"] == "object" && fields.is_none()
}

fn has_files_in(items: &Value, openapi: &Value, depth: usize) -> bool {
    items.is_object() && has_files(items, openapi, depth + 1)
}

/// The value that a text means; the text itself where it means none.
fn converted(kind: &Kind, text: &str) -> Value {
    let typed = text;
    // A space beside a value is a habit of who types it; in a text it may be meant.
    let text = match kind {
        Kind::Text { .. } | Kind::Any => typed,
        _ => typed.trim(),
    };
    let plain = || Value::String(text.to_owned());
    match kind {
        Kind::Text { .. } | Kind::File => plain(),
        Kind::Integer(_) => text.parse::<i64>().map_or_else(|_| plain(), Value::from),
        Kind::Number(_) => match text.parse::<f64>() {
            // Whole ones as such: some models look.
            Ok(_) if text.parse::<i64>().is_ok() => {
                text.parse::<i64>().map_or_else(|_| plain(), Value::from)
            }
            Ok(number) if number.is_finite() => Value::from(number),
            _ => plain(),
        },
        Kind::Boolean => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Value::Bool(true),
            "false" | "0" | "no" | "off" => Value::Bool(false),
            _ => plain(),
        },
        Kind::Choice(choices) => {
            let written = |choice: &&Value| match choice {
                Value::String(choice) => choice == text,
                other => serde_json::from_str(text).is_ok_and(|value: Value| value == **other),
            };
            let exact = choices.iter().find(|choice| choice.as_str() == Some(typed));
            let found = exact.or_else(|| choices.iter().find(written));
            found.cloned().unwrap_or_else(plain)
        }
        Kind::List(of) => match serde_json::from_str(text) {
            Ok(list @ Value::Array(_)) => list,
            _ => Value::Array(vec![converted(of, typed)]),
        },
        Kind::Any => serde_json::from_str(text).unwrap_or_else(|_| plain()),
    }
}

/// What is wrong with a value, and what is allowed.
fn wrong(kind: &Kind, value: &Value) -> Option<String> {
    match kind {
        Kind::Any => None,
        Kind::Text { min, max } => {
            let Some(text) = value.as_str() else {
                return Some(format!("{} is not a text", brief(value)));
            };
            let length = text.chars().count() as u64;
            let fits = min.is_none_or(|min| length >= min) && max.is_none_or(|max| length <= max);
            (!fits).then(|| {
                let most = max.map(|max| format!(" to {max}")).unwrap_or_default();
                let least = min.unwrap_or(0);
                format!("it has {length} characters; allowed: {least}{most}")
            })
        }
        Kind::File => match value.as_str() {
            Some(url) if is_file_url(url) => None,
            _ => Some(format!(
                "{} is not a file; give an https:// URL, or name one of this machine with --input-file",
                brief(value)
            )),
        },
        Kind::Integer(range) => match value.as_f64() {
            Some(number) if value.is_i64() || value.is_u64() => outside(*range, number),
            _ => Some(format!("{} is not a whole number", brief(value))),
        },
        Kind::Number(range) => match value.as_f64() {
            Some(number) => outside(*range, number),
            None => Some(format!("{} is not a number", brief(value))),
        },
        Kind::Boolean => {
            (!value.is_boolean()).then(|| format!("{} is neither true nor false", brief(value)))
        }
        Kind::Choice(choices) => (!choices.contains(value)).then(|| {
            let choices = choices.iter().map(|choice| match choice {
                Value::String(choice) => shown(choice),
                other => brief(other),
            });
            format!("{} is not among {}", brief(value), listed(choices))
        }),
        Kind::List(of) => match value.as_array() {
            Some(list) => list.iter().find_map(|one| wrong(of, one)),
            None => Some(format!("{} is not a list", brief(value))),
        },
    }
}

fn is_file_url(url: &str) -> bool {
    ["https://", "http://", "data:"]
        .iter()
        .any(|start| url.starts_with(start))
}

fn outside(range: Range, number: f64) -> Option<String> {
    let Range {
        min,
        max,
        above,
        below,
    } = range;
    let fits = min.is_none_or(|min| number >= min)
        && max.is_none_or(|max| number <= max)
        && above.is_none_or(|above| number > above)
        && below.is_none_or(|below| number < below);
    let bounds = [
        min.map(|min| format!("{min} or more")),
        above.map(|above| format!("more than {above}")),
        max.map(|max| format!("{max} or less")),
        below.map(|below| format!("less than {below}")),
    ];
    let bounds: Vec<String> = bounds.into_iter().flatten().collect();
    (!fits).then(|| {
        format!(
            "{number} is out of range; allowed: {}",
            bounds.join(" and ")
        )
    })
}

/// A value as an error repeats it.
fn brief(value: &Value) -> String {
    let text = crate::text::plain(&value.to_string());
    match crate::text::cut(&text, 60) {
        whole if whole.len() == text.len() => text,
        start => format!("{start}…"),
    }
}

/// A name from outside as an error repeats it.
fn shown(name: &str) -> String {
    let name = crate::text::plain(name);
    crate::text::cut(&name, 60).to_owned()
}

fn listed(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.take(MAX_LISTED + 1).collect();
    match names.len() {
        0 => "none".to_owned(),
        many if many > MAX_LISTED => format!("{}, …", names[..MAX_LISTED].join(", ")),
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As cog writes them, with what pydantic 1 and 2 make of choices and optional values.
    fn openapi() -> Value {
        json!({"components": {"schemas": {
            "Input": {
                "type": "object",
                "required": ["prompt", "seed_with_default"],
                "properties": {
                    "prompt": {"type": "string", "description": "What to draw\nmore", "x-order": 0},
                    "seed_with_default": {"type": "integer", "default": 7, "x-order": 9},
                    "width": {"type": "integer", "minimum": 64, "maximum": 2048, "x-order": 1},
                    "guidance": {"type": "number", "minimum": 0, "exclusiveMaximum": 10, "x-order": 2},
                    "disable_safety_checker": {"type": "boolean", "x-order": 3},
                    "aspect_ratio": {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}], "x-order": 4},
                    "megapixels": {"enum": ["1", "0.25"], "type": "string", "x-order": 5},
                    "image": {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}], "x-order": 6},
                    "images": {"type": "array", "items": {"type": "string", "format": "uri"}, "x-order": 7},
                    "weights": {"type": "array", "items": {"type": "number"}, "x-order": 8},
                    "loop": {"$ref": "#/components/schemas/loop"},
                    "extra": {"type": "object"},
                    "short": {"type": "string", "maxLength": 3},
                },
            },
            "aspect_ratio": {"enum": ["1:1", "16:9"], "type": "string"},
            "loop": {"$ref": "#/components/schemas/loop"},
            "Output": {"type": "array", "items": {"type": "string", "format": "uri"}},
        }}})
    }

    fn texts(texts: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        texts.iter().map(owned).collect()
    }

    #[test]
    fn texts_become_what_the_schema_says() {
        let schema = Schema::read(&openapi()).unwrap();
        let values = schema.convert(&texts(&[
            ("prompt", "12"),
            ("width", "512"),
            ("guidance", "3.5"),
            ("disable_safety_checker", "Yes"),
            ("aspect_ratio", "16:9"),
            ("megapixels", "1"),
            ("images", "https://a.example/1.png"),
            ("images", "https://a.example/2.png"),
            ("weights", "[0.5, 1]"),
            ("extra", "{\"a\": 1}"),
        ]));
        assert_eq!(
            Value::Object(values.clone()),
            json!({
                "prompt": "12", "width": 512, "guidance": 3.5, "disable_safety_checker": true,
                "aspect_ratio": "16:9", "megapixels": "1",
                "images": ["https://a.example/1.png", "https://a.example/2.png"],
                "weights": [0.5, 1], "extra": {"a": 1},
            })
        );
        schema.check(&values).unwrap();
        assert_eq!(schema.gives(), Gives::Files);
        assert!(schema.takes("image") && !schema.takes("lora"));
    }

    #[test]
    fn a_space_beside_a_value_is_none_of_it() {
        let schema = Schema::read(&openapi()).unwrap();
        let values = schema.convert(&texts(&[
            ("prompt", " a cat "),
            ("width", " 512"),
            ("guidance", "3.5 "),
            ("disable_safety_checker", " Yes "),
            ("aspect_ratio", " 16:9"),
            ("image", " https://a.example/1.png "),
            ("weights", " 1"),
        ]));
        assert_eq!(
            Value::Object(values.clone()),
            json!({
                "prompt": " a cat ", "width": 512, "guidance": 3.5, "disable_safety_checker": true,
                "aspect_ratio": "16:9", "image": "https://a.example/1.png", "weights": [1],
            })
        );
        schema.check(&values).unwrap();
    }

    #[test]
    fn everything_wrong_is_named_with_what_is_allowed() {
        let schema = Schema::read(&openapi()).unwrap();
        let values = schema.convert(&texts(&[
            ("promt", "a cat"),
            ("width", "4096"),
            ("guidance", "10"),
            ("aspect_ratio", "5:5"),
            ("image", "/etc/passwd"),
            ("weights", "much"),
            ("seed_with_default", "seven"),
            ("disable_safety_checker", "maybe"),
            ("short", "long"),
        ]));
        let said = schema.check(&values).unwrap_err().to_string();
        for part in [
            "promt: the model has no such parameter, did you mean prompt?; it takes prompt, width,",
            "width: 4096 is out of range; allowed: 64 or more and 2048 or less",
            "guidance: 10 is out of range; allowed: 0 or more and less than 10",
            "aspect_ratio: \"5:5\" is not among 1:1, 16:9",
            "image: \"/etc/passwd\" is not a file; give an https:// URL, or name one of this machine with --input-file",
            "weights: \"much\" is not a number",
            "seed_with_default: \"seven\" is not a whole number",
            "disable_safety_checker: \"maybe\" is neither true nor false",
            "short: it has 4 characters; allowed: 0 to 3",
            "prompt is missing (What to draw)",
        ] {
            assert!(said.contains(part), "{part}\n{said}");
        }
        assert!(!said.contains("seed_with_default is missing"), "{said}");
    }

    #[test]
    fn what_a_model_gives_is_told() {
        for (output, gives) in [
            (json!({"type": "string", "format": "uri"}), Gives::Files),
            (
                json!({"type": "array", "items": {"type": "string"}}),
                Gives::Text,
            ),
            (
                json!({"type": "object", "properties": {"mask": {"type": "string", "format": "uri"}}}),
                Gives::Files,
            ),
            (json!({"type": "object"}), Gives::Files),
            (
                json!({"$ref": "#/components/schemas/aspect_ratio"}),
                Gives::Text,
            ),
        ] {
            let mut openapi = openapi();
            openapi["components"]["schemas"]["Output"] = output.clone();
            assert_eq!(Schema::read(&openapi).unwrap().gives(), gives, "{output}");
        }
        assert!(Schema::read(&json!({})).is_none());
        assert!(Schema::read(&Value::Null).is_none());
    }
}
