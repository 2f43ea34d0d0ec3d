//! Counting tokens in an answer that streams by, byte for byte unaltered.

use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;

use super::json::Picker;
use crate::usage::Tokens;

/// The longest event that is read; a longer one is text of the model's, counted by its bytes.
const MAX_LINE: usize = 1 << 20;
/// About four bytes a token, as English text and code have. Takes the place of a count that did
/// not come.
const BYTES_PER_TOKEN: u64 = 4;

/// So many bytes of text are about so many tokens.
pub(super) fn about_tokens(bytes: u64) -> u64 {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

/// Reads what an answer tells of itself.
#[derive(Debug)]
pub(super) struct Counter {
    form: Form,
    seen: Seen,
}

#[derive(Debug)]
enum Form {
    /// Server-sent events. Holds the line that has not ended.
    Events { line: Vec<u8>, is_too_long: bool },
    /// One JSON object.
    Message(Box<Picker>),
    /// Nothing that we could read.
    Opaque,
}

/// What an answer has told so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Seen {
    pub(super) model: Option<String>,
    /// The provider's id of the answer.
    pub(super) message: Option<String>,
    usage: Option<WireUsage>,
    /// Of text, thinking and tool calls.
    said: u64,
    /// The answer came to its end.
    pub(super) is_complete: bool,
}

/// The API's own counts. Those of later events are totals too, not additions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
struct WireUsage {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_creation: Option<CacheCreation>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
struct CacheCreation {
    ephemeral_5m_input_tokens: Option<u64>,
    ephemeral_1h_input_tokens: Option<u64>,
}

impl WireUsage {
    fn take_in(&mut self, later: Self) {
        self.input_tokens = later.input_tokens.or(self.input_tokens);
        self.output_tokens = later.output_tokens.max(self.output_tokens);
        self.cache_read_input_tokens = later
            .cache_read_input_tokens
            .or(self.cache_read_input_tokens);
        self.cache_creation_input_tokens = later
            .cache_creation_input_tokens
            .or(self.cache_creation_input_tokens);
        self.cache_creation = later.cache_creation.or(self.cache_creation);
    }

    fn tokens(&self) -> Tokens {
        let split = self.cache_creation.unwrap_or_default();
        let five = split.ephemeral_5m_input_tokens.unwrap_or_default();
        let hour = split.ephemeral_1h_input_tokens.unwrap_or_default();
        // Without the split all of it is the default, five minutes.
        let created = self.cache_creation_input_tokens.unwrap_or(five + hour);
        Tokens {
            input: self.input_tokens.unwrap_or_default(),
            output: self.output_tokens.unwrap_or_default(),
            cache_read: self.cache_read_input_tokens.unwrap_or_default(),
            cache_write_5m: created.saturating_sub(hour),
            cache_write_1h: hour.min(created),
        }
    }
}

/// What of an event matters here.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    message: Option<Message>,
    usage: Option<WireUsage>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Message {
    id: Option<String>,
    model: Option<String>,
    usage: Option<WireUsage>,
}

#[derive(Deserialize)]
struct Delta {
    text: Option<String>,
    partial_json: Option<String>,
    thinking: Option<String>,
}

impl Counter {
    pub(super) fn new(status: StatusCode, headers: &HeaderMap) -> Self {
        let kind = headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let form = if !status.is_success() {
            Form::Opaque
        } else if kind.starts_with("text/event-stream") {
            Form::Events {
                line: Vec::new(),
                is_too_long: false,
            }
        } else if kind.contains("json") {
            Form::Message(Box::new(Picker::new(&["id", "model", "usage"])))
        } else {
            Form::Opaque
        };
        Self {
            form,
            seen: Seen::default(),
        }
    }

    /// Is it of a kind that is no answer of the model's?
    pub(super) fn is_opaque(&self) -> bool {
        matches!(self.form, Form::Opaque)
    }

    /// What the answer has told so far.
    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    pub(super) fn feed(&mut self, chunk: &[u8]) {
        match &mut self.form {
            Form::Events { line, is_too_long } => {
                let mut rest = chunk;
                while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let (part, after) = (&rest[..end], &rest[end + 1..]);
                    rest = after;
                    if *is_too_long {
                        self.seen.said += part.len() as u64;
                    } else if line.is_empty() {
                        self.seen.take_line(part);
                    } else {
                        line.extend_from_slice(part);
                        self.seen.take_line(line);
                    }
                    *is_too_long = false;
                    line.clear();
                }
                if *is_too_long {
                    self.seen.said += rest.len() as u64;
                } else if line.len() + rest.len() > MAX_LINE {
                    self.seen.said += (line.len() + rest.len()) as u64;
                    *is_too_long = true;
                    line.clear();
                } else {
                    line.extend_from_slice(rest);
                }
            }
            Form::Message(picker) => {
                self.seen.said += chunk.len() as u64;
                picker.feed(chunk);
                // Nobody may ask for what comes after the announced length: the end is known by
                // the object's own.
                if picker.is_whole() {
                    self.seen.take_message(picker);
                }
            }
            Form::Opaque => {}
        }
    }
}

impl Seen {
    fn take_message(&mut self, picker: &Picker) {
        let text = |key| serde_json::from_slice(picker.get(key)?).ok();
        self.message = text("id");
        self.model = text("model");
        self.usage = picker
            .get("usage")
            .and_then(|usage| serde_json::from_slice(usage).ok());
        self.is_complete = self.usage.is_some();
    }

    fn take_line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else {
            return;
        };
        // Not an event of the API's: nothing to count.
        let Ok(event) = serde_json::from_slice::<Event>(data) else {
            return;
        };
        if let Some(message) = event.message {
            self.message = message.id.or(self.message.take());
            self.model = message.model.or(self.model.take());
            if let Some(usage) = message.usage {
                self.usage.get_or_insert_default().take_in(usage);
            }
        }
        if let Some(usage) = event.usage {
            self.usage.get_or_insert_default().take_in(usage);
        }
        if let Some(delta) = event.delta {
            let parts = [delta.text, delta.partial_json, delta.thinking];
            self.said += parts
                .iter()
                .flatten()
                .map(|part| part.len() as u64)
                .sum::<u64>();
        }
        self.is_complete |= event.kind == "message_stop";
    }

    /// Did the model begin to answer?
    pub(super) fn has_begun(&self) -> bool {
        self.usage.is_some()
    }

    /// The tokens, and whether some of them are reckoned: those of an answer that was cut off
    /// before it told how long it had become. `prompt` is how large the request was, for an
    /// answer that had told nothing.
    pub(super) fn tokens(&self, prompt_bytes: u64) -> (Tokens, bool) {
        let mut tokens = match &self.usage {
            Some(usage) => usage.tokens(),
            None => Tokens {
                input: about_tokens(prompt_bytes),
                ..Tokens::default()
            },
        };
        if self.is_complete {
            return (tokens, false);
        }
        let said = about_tokens(self.said);
        let is_estimated = self.usage.is_none() || said > tokens.output;
        tokens.output = tokens.output.max(said);
        (tokens, is_estimated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn counter(kind: &'static str) -> Counter {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        Counter::new(StatusCode::OK, &headers)
    }

    const STREAM: &str = concat!(
        "event: message_start\n",
        r#"data: {"type":"message_start","message":{"id":"msg_1","model":"claude-opus-5","usage":"#,
        r#"{"input_tokens":11,"cache_creation_input_tokens":30,"cache_read_input_tokens":40,"#,
        r#""cache_creation":{"ephemeral_5m_input_tokens":10,"ephemeral_1h_input_tokens":20},"output_tokens":1}}}"#,
        "\n\n",
        "event: ping\r\ndata: {\"type\": \"ping\"}\r\n\r\n",
        r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hü \"x\""}}"#,
        "\n\n",
        r#"data: {"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"a\":"}}"#,
        "\n\n",
        r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":50}}"#,
        "\n\n",
        r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":77,"input_tokens":11}}"#,
        "\n\n",
        "data: {\"type\":\"message_stop\"}\n\n",
    );

    const COUNTED: Tokens = Tokens {
        input: 11,
        output: 77,
        cache_read: 40,
        cache_write_5m: 10,
        cache_write_1h: 20,
    };

    #[test]
    fn a_stream_is_counted_wherever_it_is_cut_into_chunks() {
        for piece in 1..STREAM.len() {
            let mut counter = counter("text/event-stream; charset=utf-8");
            for chunk in STREAM.as_bytes().chunks(piece) {
                counter.feed(chunk);
            }
            let seen = counter.seen();
            assert!(seen.is_complete, "{piece}");
            assert_eq!(seen.tokens(999), (COUNTED, false), "{piece}");
            assert_eq!(seen.model.as_deref(), Some("claude-opus-5"));
            assert_eq!(seen.message.as_deref(), Some("msg_1"));
        }
    }

    #[test]
    fn a_stream_that_breaks_off_counts_what_was_seen() {
        let upto = |mark: &str| {
            let mut counter = counter("text/event-stream");
            let end = STREAM.find(mark).unwrap_or(STREAM.len());
            counter.feed(&STREAM.as_bytes()[..end]);
            counter.seen().tokens(400)
        };
        let input = Tokens {
            output: 0,
            ..COUNTED
        };
        // Nothing was told: what was asked is about as much as it was long.
        let asked = Tokens {
            input: 100,
            ..Tokens::default()
        };
        assert_eq!(upto("data: {\"type\":\"message_start"), (asked, true));
        assert_eq!(upto("event: ping"), (Tokens { output: 1, ..input }, false));
        // 7 bytes of text and 5 of a tool call: reckoned.
        assert_eq!(
            upto(r#"data: {"type":"message_delta""#),
            (Tokens { output: 3, ..input }, true)
        );
        // The count had come, only the end had not.
        assert_eq!(upto("data: {\"type\":\"message_stop"), (COUNTED, false));
    }

    #[test]
    fn a_plain_answer_is_counted_at_its_end() {
        let body = br#"{"id":"msg_2","type":"message","model":"claude-haiku-5-5","content":[{"type":"text","text":"{\"usage\":1}"}],
            "usage":{"input_tokens":5,"output_tokens":6,"cache_creation_input_tokens":7,"server_tool_use":{"web_search_requests":0}}}"#;
        for piece in 1..body.len() {
            let mut counter = counter("application/json");
            for chunk in body.chunks(piece) {
                counter.feed(chunk);
            }
            assert!(counter.seen().is_complete);
            let expected = Tokens {
                input: 5,
                output: 6,
                cache_write_5m: 7,
                ..Tokens::default()
            };
            assert_eq!(counter.seen().tokens(0), (expected, false));
            assert_eq!(counter.seen().message.as_deref(), Some("msg_2"));
        }
    }

    #[test]
    fn what_is_no_answer_has_not_begun() {
        for (kind, body) in [
            ("text/html", "<html>"),
            ("application/json", "<html>"),
            ("application/json", "{}"),
            ("text/event-stream", "data: garbage\n\ndata: {}\n\n"),
        ] {
            let mut counter = counter(kind);
            counter.feed(body.as_bytes());
            assert!(!counter.seen().has_begun(), "{kind} {body}");
        }
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut counter = counter("text/event-stream");
        for _ in 0..100 {
            counter.feed(&[b'x'; 64 << 10]);
        }
        let Form::Events { line, .. } = &counter.form else {
            panic!()
        };
        assert!(line.capacity() <= 2 * MAX_LINE, "{}", line.capacity());
        counter.feed(b"\n");
        counter.feed(STREAM.as_bytes());
        assert!(counter.seen().is_complete);
    }
}
