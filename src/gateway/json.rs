//! Single values out of a JSON object that streams by: nothing but them is kept, and nothing is
//! altered.

/// A value that is longer is of no use to us.
const MAX_VALUE: usize = 64 << 10;
/// Longest key that is looked at.
const MAX_KEY: usize = 64;

/// Picks the values of some keys of the outermost object, as raw JSON.
///
/// Of a key that stands there twice the last value is kept, as parsers do. A key that is written
/// with escapes is not recognised.
#[derive(Debug)]
pub(super) struct Picker {
    wanted: &'static [&'static str],
    found: Vec<Option<Vec<u8>>>,
    depth: u32,
    string: Option<Text>,
    key: Vec<u8>,
    is_key_next: bool,
    /// The outermost value has ended.
    is_whole: bool,
    /// Which wanted value passes now.
    picking: Option<usize>,
    value: Vec<u8>,
}

/// Inside of a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Plain,
    AfterBackslash,
}

impl Picker {
    pub(super) fn new(wanted: &'static [&'static str]) -> Self {
        Self {
            wanted,
            found: vec![None; wanted.len()],
            depth: 0,
            string: None,
            key: Vec::new(),
            is_key_next: false,
            is_whole: false,
            picking: None,
            value: Vec::new(),
        }
    }

    /// The value of a key, if it has passed as a whole.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let at = self.wanted.iter().position(|wanted| *wanted == key)?;
        self.found[at].as_deref()
    }

    /// Has the object passed as a whole?
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(byte) = bytes.first() {
            let is_idle = self.picking.is_none() && !(self.depth == 1 && self.is_key_next);
            if self.string == Some(Text::Plain) && is_idle {
                // Most of a request is text of no interest.
                let end = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\'));
                let end = end.unwrap_or(bytes.len());
                if end > 0 {
                    bytes = &bytes[end..];
                    continue;
                }
            }
            self.take(*byte);
            bytes = &bytes[1..];
        }
    }

    fn take(&mut self, byte: u8) {
        if let Some(text) = self.string {
            self.keep(byte);
            self.string = match (text, byte) {
                (Text::AfterBackslash, _) => Some(Text::Plain),
                (Text::Plain, b'\\') => Some(Text::AfterBackslash),
                (Text::Plain, b'"') => None,
                (Text::Plain, _) => Some(Text::Plain),
            };
            return;
        }
        match byte {
            b'"' => {
                if self.depth == 1 && self.is_key_next {
                    self.key.clear();
                }
                self.keep(byte);
                self.string = Some(Text::Plain);
            }
            b':' if self.depth == 1 && self.is_key_next => {
                self.is_key_next = false;
                let key = self.key.strip_suffix(b"\"").unwrap_or(&self.key);
                let key = key.strip_prefix(b"\"").unwrap_or(key);
                self.picking = self
                    .wanted
                    .iter()
                    .position(|wanted| wanted.as_bytes() == key);
                self.value.clear();
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth == 1 {
                    // The values of an array at the top have no keys.
                    self.is_key_next = byte == b'{';
                } else {
                    self.keep(byte);
                }
            }
            b'}' | b']' => {
                if self.depth == 1 {
                    self.end_value();
                    self.is_whole = true;
                } else {
                    self.keep(byte);
                }
                self.depth = self.depth.saturating_sub(1);
            }
            b',' if self.depth == 1 => {
                self.end_value();
                self.is_key_next = true;
            }
            // Between a key and its colon.
            _ if self.depth == 1 && self.is_key_next => {}
            _ => self.keep(byte),
        }
    }

    fn keep(&mut self, byte: u8) {
        if self.depth == 1 && self.is_key_next {
            if self.key.len() < MAX_KEY {
                self.key.push(byte);
            }
        } else if self.picking.is_some() && self.value.len() <= MAX_VALUE {
            self.value.push(byte);
        }
    }

    fn end_value(&mut self) {
        if let Some(at) = self.picking.take() {
            let value = std::mem::take(&mut self.value);
            self.found[at] = (value.len() <= MAX_VALUE).then_some(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(json: &str, piece: usize) -> [Option<String>; 3] {
        let mut picker = Picker::new(&["model", "max_tokens", "usage"]);
        for piece in json.as_bytes().chunks(piece) {
            picker.feed(piece);
        }
        ["model", "max_tokens", "usage"].map(|key| {
            picker
                .get(key)
                .map(|value| String::from_utf8(value.to_vec()).unwrap().trim().to_owned())
        })
    }

    #[test]
    fn values_are_found_wherever_the_stream_is_cut() {
        let json = r#" {"messages":[{"model":"inner","content":"a \"model\": {x} \\"}, 1],
            "mod\"el": 7, "model" : "claude-\"x\"", "system": "}}]]", "max_tokens": 12 ,
            "usage": {"a": [1, {"b": "}"}], "model": "no"}, "stream":true}"#;
        let expected = [
            r#""claude-\"x\"""#.to_owned(),
            "12".to_owned(),
            r#"{"a": [1, {"b": "}"}], "model": "no"}"#.to_owned(),
        ];
        for piece in 1..json.len() {
            assert_eq!(pick(json, piece), expected.clone().map(Some), "{piece}");
        }
        let parsed: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(parsed["max_tokens"], 12);
    }

    #[test]
    fn the_last_of_two_counts_and_nothing_else_is_kept() {
        let two = r#"{"max_tokens":1,"max_tokens":2}"#;
        assert_eq!(pick(two, 5)[1].as_deref(), Some("2"));
        assert_eq!(pick(r#"["model", "x"]"#, 3), [None, None, None]);
        assert_eq!(pick(r#"{"model":"cut"#, 3), [None, None, None]);
        assert_eq!(pick("", 1), [None, None, None]);
        assert_eq!(pick("}}}{{{,,:::\"", 1), [None, None, None]);
        let long = format!(
            r#"{{"model":"{}","max_tokens":3}}"#,
            "x".repeat(MAX_VALUE + 9)
        );
        assert_eq!(pick(&long, 999), [None, Some("3".into()), None]);
    }
}
