//! What a prediction made: files, text, or anything that JSON can say.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use url::Url;

use super::schema::Gives;

/// Files of one prediction.
const MAX_FILES: usize = 200;
/// How deep lists and objects are looked through.
const MAX_DEPTH: usize = 8;
/// Longest part of a file's name that comes from outside.
const MAX_PART: usize = 60;
/// Endings of files and their types. The first ending of a type is the one that is given.
const TYPES: &[(&str, &str)] = &[
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("webp", "image/webp"),
    ("gif", "image/gif"),
    ("avif", "image/avif"),
    ("bmp", "image/bmp"),
    ("svg", "image/svg+xml"),
    ("tiff", "image/tiff"),
    ("mp4", "video/mp4"),
    ("webm", "video/webm"),
    ("mov", "video/quicktime"),
    ("mp3", "audio/mpeg"),
    ("wav", "audio/wav"),
    ("wav", "audio/x-wav"),
    ("flac", "audio/flac"),
    ("ogg", "audio/ogg"),
    ("json", "application/json"),
    ("zip", "application/zip"),
    ("tar", "application/x-tar"),
    ("pdf", "application/pdf"),
    ("glb", "model/gltf-binary"),
    ("safetensors", "application/octet-stream"),
    ("obj", "model/obj"),
    ("ply", "application/ply"),
    ("csv", "text/csv"),
    ("txt", "text/plain"),
];

/// The output of a prediction, sorted out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Made {
    pub(super) files: Vec<Found>,
    /// Texts, put together as the model meant them.
    pub text: Option<String>,
    /// What is neither.
    pub other: Option<Value>,
}

/// A file that was made.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) source: Source,
    /// Its name in an object, as far as it is fit for a file's name.
    pub(super) key: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    Url(Url),
    Data { media_type: String, bytes: Vec<u8> },
}

impl Made {
    pub(super) fn read(output: &Value, gives: Gives) -> Self {
        let mut files = Vec::new();
        if gives != Gives::Text {
            collect(output, None, 0, &mut files);
        }
        let text = match output {
            _ if !files.is_empty() => None,
            Value::String(text) => Some(text.clone()),
            Value::Array(all) if !all.is_empty() => {
                let texts: Option<Vec<&str>> = all.iter().map(Value::as_str).collect();
                // Language models give theirs piece by piece.
                texts.map(|texts| texts.concat())
            }
            _ => None,
        };
        let has_more = files.is_empty() && text.is_none();
        let other = (has_more && !output.is_null()).then(|| output.clone());
        Self { files, text, other }
    }

    /// How many files there are.
    pub fn files(&self) -> usize {
        self.files.len()
    }
}

fn collect(output: &Value, key: Option<&str>, depth: usize, files: &mut Vec<Found>) {
    if depth > MAX_DEPTH || files.len() >= MAX_FILES {
        return;
    }
    match output {
        Value::String(text) => files.extend(source(text).map(|source| Found {
            source,
            key: key.map(plain).filter(|key| !key.is_empty()),
        })),
        Value::Array(all) => {
            for one in all {
                collect(one, key, depth + 1, files);
            }
        }
        Value::Object(map) => {
            for (key, one) in map {
                collect(one, Some(key), depth + 1, files);
            }
        }
        _ => {}
    }
}

fn source(text: &str) -> Option<Source> {
    if let Some(data) = text.strip_prefix("data:") {
        let (head, data) = data.split_once(',')?;
        let (media_type, is_base64) = match head.strip_suffix(";base64") {
            Some(media_type) => (media_type, true),
            None => (head, false),
        };
        let media_type = essence(media_type);
        let bytes = match is_base64 {
            true => STANDARD.decode(data.trim()).ok()?,
            false => return None,
        };
        return Some(Source::Data { media_type, bytes });
    }
    let is_address = text.starts_with("https://") || text.starts_with("http://");
    let url = Url::parse(text).ok().filter(|_| is_address)?;
    Some(Source::Url(url))
}

/// A type without its parameters.
pub(super) fn essence(media_type: &str) -> String {
    let essence = media_type.split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
}

/// The ending of a file: by its type, else the one that its address has, if that is a known one.
pub(super) fn ending(media_type: &str, address: &str) -> &'static str {
    let of_address = address
        .rsplit('/')
        .next()
        .and_then(|name| name.rsplit_once('.'))
        .map(|(_, ending)| ending.to_ascii_lowercase());
    let known = of_address.and_then(|ending| {
        let found = TYPES.iter().find(|(known, _)| *known == ending);
        found.map(|(known, _)| *known)
    });
    let of_type = TYPES.iter().find(|(_, known)| *known == media_type);
    match (of_type, known) {
        // It says only that these are bytes.
        (Some((_, "application/octet-stream")) | None, Some(known)) => known,
        (Some((_, "application/octet-stream")) | None, None) => "bin",
        // One type, two endings.
        (Some((_, of_type)), Some(known)) if TYPES.contains(&(known, of_type)) => known,
        (Some((ending, _)), _) => ending,
    }
}

/// The type of a file of this machine.
pub(super) fn media_type_of(path: &Path) -> &'static str {
    let ending = path.extension().and_then(|ending| ending.to_str());
    let ending = ending.unwrap_or_default().to_ascii_lowercase();
    let found = TYPES.iter().find(|(known, _)| *known == ending);
    found.map_or("application/octet-stream", |(_, media_type)| media_type)
}

/// Whether an output's text is an image, by what its address says.
pub(super) fn is_image(text: &str) -> bool {
    match source(text) {
        Some(Source::Data { media_type, .. }) => media_type.starts_with("image/"),
        Some(Source::Url(url)) => {
            let ending = url.path().rsplit('.').next().unwrap_or_default();
            media_type_of(Path::new(&format!("x.{ending}"))).starts_with("image/")
        }
        None => false,
    }
}

/// What of a word from outside may stand in a file's name.
pub(super) fn plain(word: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let word: String = word
        .chars()
        .map(|c| if fits(c) { c } else { '-' })
        .take(MAX_PART)
        .collect();
    word.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names(made: &Made) -> Vec<String> {
        let name = |found: &Found| {
            let source = match &found.source {
                Source::Url(url) => url.to_string(),
                Source::Data { media_type, bytes } => format!("{media_type} {}", bytes.len()),
            };
            format!("{}={source}", found.key.as_deref().unwrap_or(""))
        };
        made.files.iter().map(name).collect()
    }

    #[test]
    fn outputs_of_every_shape_are_sorted_out() {
        let url = "https://replicate.delivery/x/out-0.webp";
        let made = |output: Value, gives| Made::read(&output, gives);
        assert_eq!(names(&made(json!(url), Gives::Files)), [format!("={url}")]);
        assert_eq!(made(json!([url, url]), Gives::Files).files(), 2);
        let object = json!({"mask ../1": url, "steps": [1, 2], "more": {"in": [url]}});
        assert_eq!(
            names(&made(object, Gives::Unknown)),
            [format!("mask----1={url}"), format!("in={url}")]
        );
        let data = json!("data:image/png;base64,aGVsbG8=");
        assert_eq!(names(&made(data, Gives::Files)), ["=image/png 5"]);

        let text = made(json!(["Hel", "lo ", url]), Gives::Text);
        assert_eq!(text.text.as_deref(), Some(&*format!("Hello {url}")));
        assert_eq!(text.files(), 0);
        assert_eq!(
            made(json!({"score": 0.5}), Gives::Text).other,
            Some(json!({"score": 0.5}))
        );
        assert_eq!(made(Value::Null, Gives::Unknown), Made::default());
        for hostile in [
            "file:///etc/passwd",
            "ftp://a/b",
            "//a/b",
            "data:text/html,x",
        ] {
            assert_eq!(made(json!(hostile), Gives::Files).files(), 0, "{hostile}");
        }
    }

    #[test]
    fn an_ending_is_one_of_ours() {
        for (media_type, address, ending_) in [
            ("image/webp", "/x/out.webp", "webp"),
            ("image/png", "/x/out.sh", "png"),
            ("image/jpeg", "/x/out.jpeg", "jpeg"),
            ("image/jpeg", "/x/out", "jpg"),
            (
                "application/octet-stream",
                "/x/lora.safetensors",
                "safetensors",
            ),
            ("application/octet-stream", "/x/run.exe", "bin"),
            ("", "/x/out.png", "png"),
            ("text/html", "/x/a.php", "bin"),
        ] {
            assert_eq!(
                ending(media_type, address),
                ending_,
                "{media_type} {address}"
            );
        }
        assert!(is_image("https://a.example/1.PNG") && !is_image("https://a.example/1.mp4"));
    }

    #[test]
    fn words_from_outside_are_plain_in_names() {
        for (word, said) in [
            ("../../etc/passwd", "etc-passwd"),
            ("a b\u{202e}c", "a-b-c"),
            ("..", ""),
            ("mask_1", "mask_1"),
        ] {
            assert_eq!(plain(word), said);
        }
    }
}
