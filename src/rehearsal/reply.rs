//! One answer of the model, and how it looks on the wire.

use std::time::Duration;

use serde_json::{Value, json};

use super::{conversation::Conversation, script::Tool};

/// What the model says and calls in one answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) text: String,
    pub(super) calls: Vec<Tool>,
    /// The text is spread over this time.
    pub(super) over: Option<Duration>,
    pub(super) stop: Stop,
}

/// Why the answer ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Stop {
    /// It was finished: with a tool call, or with nothing more to say.
    #[default]
    Finished,
    MaxTokens,
    Refusal,
}

impl Reply {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    fn stop_reason(&self) -> &'static str {
        match self.stop {
            Stop::MaxTokens => "max_tokens",
            Stop::Refusal => "refusal",
            Stop::Finished if self.calls.is_empty() => "end_turn",
            Stop::Finished => "tool_use",
        }
    }

    /// The content blocks, in their final form.
    fn content(&self) -> Vec<Value> {
        let text = (!self.text.is_empty()).then(|| json!({"type": "text", "text": self.text}));
        let calls = self.calls.iter().map(|call| {
            let id = format!("toolu_{}", unique());
            json!({"type": "tool_use", "id": id, "name": call.name, "input": call.input})
        });
        text.into_iter().chain(calls).collect()
    }

    /// The answer to a request without `stream`.
    pub(super) fn message(&self, to: &Conversation) -> Value {
        let content = self.content();
        let mut message = envelope(to, usage(to, &content));
        message["content"] = content.into();
        message["stop_reason"] = self.stop_reason().into();
        message
    }

    /// The answer to a request with `stream`, event by event. `pause` comes before each piece of
    /// text; a reply with a time of its own has its own.
    pub(super) fn events(&self, to: &Conversation, pause: Duration) -> Vec<Event> {
        let content = self.content();
        let usage = usage(to, &content);
        let mut opening = usage.clone();
        opening["output_tokens"] = 1.into();
        let mut events = vec![
            Event::new(json!({"type": "message_start", "message": envelope(to, opening)})),
            Event::ping(),
        ];
        for (index, block) in content.into_iter().enumerate() {
            let pieces;
            let start;
            let delta: fn(&str) -> Value;
            let mut between = Duration::ZERO;
            if let Some(text) = block["text"].as_str() {
                pieces = words(text);
                between = self
                    .over
                    .map_or(pause, |over| over / pieces.len().max(1) as u32);
                start = json!({"type": "text", "text": ""});
                delta = |text| json!({"type": "text_delta", "text": text});
            } else {
                pieces = cut(&block["input"].to_string());
                let mut empty = block.clone();
                empty["input"] = json!({});
                start = empty;
                delta = |json| json!({"type": "input_json_delta", "partial_json": json});
            }
            events.push(Event::new(
                json!({"type": "content_block_start", "index": index, "content_block": start}),
            ));
            events.extend(pieces.iter().map(|piece| Event {
                after: between,
                ..Event::new(
                    json!({"type": "content_block_delta", "index": index, "delta": delta(piece)}),
                )
            }));
            events.push(Event::new(
                json!({"type": "content_block_stop", "index": index}),
            ));
        }
        let delta = json!({"stop_reason": self.stop_reason(), "stop_sequence": null});
        events.push(Event::new(
            json!({"type": "message_delta", "delta": delta, "usage": usage}),
        ));
        events.push(Event::new(json!({"type": "message_stop"})));
        events
    }
}

/// One server-sent event, and how long to wait before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    pub(super) after: Duration,
    pub(super) data: Value,
}

impl Event {
    pub(super) fn new(data: Value) -> Self {
        Self {
            after: Duration::ZERO,
            data,
        }
    }

    pub(super) fn ping() -> Self {
        Self::new(json!({"type": "ping"}))
    }

    pub(super) fn to_wire(&self) -> String {
        let name = self.data["type"].as_str().unwrap_or("error");
        format!("event: {name}\ndata: {}\n\n", self.data)
    }
}

fn envelope(to: &Conversation, usage: Value) -> Value {
    json!({
        "id": format!("msg_{}", unique()),
        "type": "message",
        "role": "assistant",
        "model": to.model,
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": usage,
    })
}

/// About four bytes a token, as English text has.
fn tokens(bytes: usize) -> usize {
    bytes.div_ceil(4)
}

/// All tokens of a request.
pub(super) fn input_tokens(to: &Conversation) -> usize {
    tokens(to.size.prefix + to.size.rest)
}

/// Counts as the API would give them, with tools and system text cached after the first request.
fn usage(to: &Conversation, content: &[Value]) -> Value {
    let prefix = tokens(to.size.prefix);
    let (created, read) = if to.size.is_first {
        (prefix, 0)
    } else {
        (0, prefix)
    };
    let said: usize = content.iter().map(|block| block.to_string().len()).sum();
    json!({
        "input_tokens": tokens(to.size.rest).max(1),
        "cache_creation_input_tokens": created,
        "cache_creation": {
            "ephemeral_5m_input_tokens": created,
            "ephemeral_1h_input_tokens": 0,
        },
        "cache_read_input_tokens": read,
        "output_tokens": tokens(said).max(1),
    })
}

/// A text in pieces of a word each, with the white space after it.
fn words(text: &str) -> Vec<String> {
    text.split_inclusive(' ').map(ToOwned::to_owned).collect()
}

/// JSON in a few pieces that are none by themselves.
fn cut(json: &str) -> Vec<String> {
    const PIECE: usize = 48;
    let chars: Vec<char> = json.chars().collect();
    // The API begins with an empty piece.
    let pieces = chars.chunks(PIECE).map(|piece| piece.iter().collect());
    std::iter::once(String::new()).chain(pieces).collect()
}

pub(super) fn unique() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..24].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts a stream together again as a client does.
    fn assembled(events: &[Event]) -> Value {
        let mut message = events[0].data["message"].clone();
        let mut content: Vec<Value> = Vec::new();
        let mut partial = String::new();
        for event in &events[1..] {
            let data = &event.data;
            match data["type"].as_str().unwrap() {
                "content_block_start" => {
                    assert_eq!(data["index"], content.len());
                    partial.clear();
                    content.push(data["content_block"].clone());
                }
                "content_block_delta" => {
                    let delta = &data["delta"];
                    let block = content.last_mut().unwrap();
                    if let Some(text) = delta["text"].as_str() {
                        block["text"] = format!("{}{text}", block["text"].as_str().unwrap()).into();
                    } else {
                        partial.push_str(delta["partial_json"].as_str().unwrap());
                    }
                }
                "content_block_stop" if !partial.is_empty() => {
                    content.last_mut().unwrap()["input"] = partial.parse().unwrap();
                }
                "message_delta" => {
                    message["stop_reason"] = data["delta"]["stop_reason"].clone();
                    message["usage"] = data["usage"].clone();
                }
                _ => {}
            }
        }
        message["content"] = content.into();
        message
    }

    #[test]
    fn a_stream_adds_up_to_the_message() {
        let input = json!({"a": "ü\"".repeat(99), "b": [1, 2]});
        let reply = Reply {
            text: "One two.\nThree".into(),
            calls: vec![Tool {
                name: "Read".into(),
                input,
            }],
            ..Reply::default()
        };
        let mut to = Conversation {
            model: "m".into(),
            ..Conversation::default()
        };
        to.size.prefix = 4000;
        let strip = |mut message: Value| {
            message["id"] = Value::Null;
            message["content"][1]["id"] = Value::Null;
            message
        };
        let events = reply.events(&to, Duration::from_millis(1));
        assert_eq!(strip(assembled(&events)), strip(reply.message(&to)));
        assert_eq!(reply.message(&to)["stop_reason"], "tool_use");
        assert_eq!(reply.message(&to)["usage"]["cache_read_input_tokens"], 1000);
        assert_eq!(
            events.last().unwrap().to_wire(),
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
        );
    }

    #[test]
    fn a_slow_text_takes_its_time() {
        let reply = Reply {
            text: "a b c d".into(),
            over: Some(Duration::from_secs(8)),
            ..Reply::default()
        };
        let events = reply.events(&Conversation::default(), Duration::from_millis(1));
        let total: Duration = events.iter().map(|event| event.after).sum();
        assert_eq!(total, Duration::from_secs(8));
    }
}
