//! What a Messages API request tells: who asks for what, where, and what was done about it so far.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A request body, read for what the rehearsal needs. Whatever is missing or odd is left out: a
/// stand-in judges nothing.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    pub(super) model: String,
    pub(super) stream: bool,
    /// The folder that the CLI says it works in.
    pub(super) cwd: Option<String>,
    /// Today, as `2026-11-21`, where the request says so.
    pub(super) today: Option<String>,
    /// The CLI is in plan mode, or has no tool that could write.
    pub(super) is_plan: bool,
    /// Any tool is offered at all; the CLI's small side requests offer none.
    pub(super) has_tools: bool,
    /// What the person said, oldest first; the last one is the instruction at hand.
    pub(super) said: Vec<String>,
    /// The images that the person showed, oldest first: SHA-256 of each file, in hex.
    pub(super) images: Vec<String>,
    /// The answer may be given by the CLI's tool for answers of a known form.
    pub(super) takes_structure: bool,
    /// System text, which is where a summary of an earlier conversation may stand.
    pub(super) system: Vec<String>,
    /// The tools that were used since the last instruction, in order.
    pub(super) done: Vec<Done>,
    /// How many answers the model gave since the last instruction.
    pub(super) answers: usize,
    /// For plausible counts: bytes of what stays the same from request to request, of the rest,
    /// and whether this is the conversation's first request.
    pub(super) size: Size,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Size {
    pub(super) prefix: usize,
    pub(super) rest: usize,
    pub(super) is_first: bool,
}

/// One tool call of the past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) name: String,
    /// `None` while no result was sent for it.
    pub(super) result: Option<Result<String, String>>,
}

impl Conversation {
    pub(super) fn read(body: &Value) -> Self {
        let messages = body["messages"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let prefix = json_size(&body["system"]) + json_size(&body["tools"]);
        let mut this = Self {
            model: body["model"].as_str().unwrap_or("rehearsal").to_owned(),
            stream: body["stream"].as_bool().unwrap_or(false),
            size: Size {
                prefix,
                rest: messages.iter().map(json_size).sum(),
                is_first: !messages
                    .iter()
                    .any(|message| message["role"] == "assistant"),
            },
            ..Self::default()
        };
        let mut plan_mode = false;
        let mut calls: Vec<String> = Vec::new();
        for text in texts(&body["system"]) {
            this.read_system(text, &mut plan_mode);
        }
        for message in messages {
            match message["role"].as_str() {
                Some("system") => {
                    for text in texts(&message["content"]) {
                        this.read_system(text, &mut plan_mode);
                    }
                }
                Some("assistant") => {
                    this.answers += 1;
                    for block in blocks(&message["content"]) {
                        if block["type"] == "tool_use" {
                            calls.push(block["id"].as_str().unwrap_or_default().to_owned());
                            let name = block["name"].as_str().unwrap_or_default().to_owned();
                            this.done.push(Done { name, result: None });
                        }
                    }
                }
                _ => this.read_user(&message["content"], &mut calls, &mut plan_mode),
            }
        }
        let tools = blocks(&body["tools"]);
        let has = |name: &str| tools.iter().any(|tool| tool["name"] == name);
        this.has_tools = !tools.is_empty();
        this.takes_structure = has("StructuredOutput");
        this.is_plan = plan_mode || !(has("Edit") && has("Write"));
        this
    }

    /// What the person asked for last.
    pub(super) fn instruction(&self) -> &str {
        self.said.last().map_or("", String::as_str)
    }

    fn read_user(&mut self, content: &Value, calls: &mut Vec<String>, plan_mode: &mut bool) {
        for block in blocks(content) {
            if block["type"] == "image" {
                let data = block["source"]["data"].as_str().unwrap_or_default();
                let file = STANDARD.decode(data).unwrap_or_default();
                self.images.push(hex::encode(Sha256::digest(file)));
            }
            if block["type"] == "tool_result" {
                let position = calls
                    .iter()
                    .position(|id| block["tool_use_id"] == id.as_str());
                if let Some(done) = position.and_then(|position| self.done.get_mut(position)) {
                    let text = texts(&block["content"]).join("\n");
                    let is_error = block["is_error"].as_bool().unwrap_or(false);
                    done.result = Some(if is_error { Err(text) } else { Ok(text) });
                }
            }
        }
        // Several texts in one message: earlier ones are instructions that were never answered
        // (cancelled, or the API failed), so only the last one counts.
        for text in texts(content) {
            let (text, reminders) = without_reminders(text);
            self.read_system(&reminders, plan_mode);
            let text = text.trim();
            if text.is_empty() || is_of_the_cli(text) {
                continue;
            }
            self.said.push(text.to_owned());
            self.answers = 0;
            self.done.clear();
            calls.clear();
        }
    }

    fn read_system(&mut self, text: &str, plan_mode: &mut bool) {
        if text.is_empty() {
            return;
        }
        for line in text.lines() {
            if let Some((_, path)) = line.split_once("orking directory: ") {
                self.cwd = Some(path.trim().trim_end_matches('/').to_owned());
            }
            if let Some((_, date)) = line.split_once("Today's date is ") {
                self.today = date.get(..10).map(ToOwned::to_owned);
            }
        }
        // The mode may change between turns; what was said last holds.
        let lower = text.to_ascii_lowercase();
        if lower.contains("exited plan mode") {
            *plan_mode = false;
        } else if lower.contains("plan mode is active") || lower.contains("plan mode still active")
        {
            *plan_mode = true;
        }
        self.system.push(text.to_owned());
    }
}

/// What the CLI puts into the person's place by itself (seen with 2.1.329): after a cancel, an
/// answer cut at its limit, an empty one, a refused one.
fn is_of_the_cli(text: &str) -> bool {
    [
        "[Request interrupted by user",
        "Output token limit hit",
        "[Your previous response had",
        "Your response above was stopped",
    ]
    .iter()
    .any(|start| text.starts_with(start))
}

/// Splits `<system-reminder>` blocks off a text.
fn without_reminders(text: &str) -> (String, String) {
    const OPEN: &str = "<system-reminder>";
    const CLOSE: &str = "</system-reminder>";
    let (mut plain, mut reminders, mut rest) = (String::new(), String::new(), text);
    while let Some((before, after)) = rest.split_once(OPEN) {
        plain.push_str(before);
        let (reminder, after) = after.split_once(CLOSE).unwrap_or((after, ""));
        reminders.push_str(reminder);
        rest = after;
    }
    plain.push_str(rest);
    (plain, reminders)
}

fn blocks(content: &Value) -> &[Value] {
    content.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The texts of a content: itself a string, or its text blocks.
fn texts(content: &Value) -> Vec<&str> {
    match content {
        Value::String(text) => vec![text],
        _ => blocks(content)
            .iter()
            .filter(|block| block["type"] == "text")
            .filter_map(|block| block["text"].as_str())
            .collect(),
    }
}

fn json_size(value: &Value) -> usize {
    match value {
        Value::Null => 0,
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(json_size).sum(),
        // By pixels, not by bytes: as much as one of the larger ones.
        Value::Object(fields) if fields.get("type").is_some_and(|kind| kind == "image") => 6400,
        Value::Object(fields) => fields.iter().map(|(key, v)| key.len() + json_size(v)).sum(),
        Value::Bool(_) | Value::Number(_) => 4,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_instruction_and_what_was_done_about_it() {
        let body = json!({
            "model": "m", "stream": true,
            "tools": [{"name": "Edit"}, {"name": "Write"}],
            "messages": [
                {"role": "user", "content": [
                    {"type": "text", "text": "<system-reminder>\nhush\n</system-reminder>\n"},
                    {"type": "text", "text": "first"}]},
                {"role": "system", "content": [{"type": "text", "text":
                    "# Environment\n - Primary working directory: /sites/a\nToday's date is 2026-11-21."}]},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "t0", "name": "Bash", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t0", "content": "gone"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
                {"role": "user", "content": [
                    {"type": "text", "text": "cancelled one"},
                    {"type": "text", "text": "[Request interrupted by user]"},
                    {"type": "text", "text": "second <system-reminder>x</system-reminder>"}]},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "t1", "name": "Read", "input": {}},
                    {"type": "tool_use", "id": "t2", "name": "Glob", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": true, "content": "no"},
                    {"type": "tool_result", "tool_use_id": "t1",
                     "content": [{"type": "text", "text": "yes"}]}]},
            ],
        });
        let conversation = Conversation::read(&body);
        assert_eq!(conversation.said, ["first", "cancelled one", "second"]);
        assert_eq!(conversation.cwd.as_deref(), Some("/sites/a"));
        assert_eq!(conversation.today.as_deref(), Some("2026-11-21"));
        assert_eq!(conversation.answers, 1);
        assert!(!conversation.is_plan);
        let done = |name: &str, result| Done {
            name: name.to_owned(),
            result: Some(result),
        };
        assert_eq!(
            conversation.done,
            [
                done("Read", Ok("yes".into())),
                done("Glob", Err("no".into()))
            ]
        );
    }

    #[test]
    fn the_mode_that_was_announced_last_holds() {
        let read = |announcements: &[&str], tools: Value| {
            let messages: Vec<Value> = announcements
                .iter()
                .map(|text| json!({"role": "system", "content": text}))
                .collect();
            Conversation::read(&json!({"messages": messages, "tools": tools})).is_plan
        };
        let all = json!([{"name": "Edit"}, {"name": "Write"}]);
        let (on, off) = (
            "Plan mode is active. Wait.",
            "## Exited Plan Mode\n\nYou have exited",
        );
        assert!(!read(&[], all.clone()));
        assert!(read(&[on], all.clone()));
        assert!(!read(&[on, off], all.clone()));
        assert!(read(&[on, off, on], all));
        assert!(read(&[], json!([{"name": "Read"}])));
    }
}
