//! The CLI's stream-json lines: what we read of its output, what we write to its input.
//! Whatever is unknown is passed over, never fatal.

use serde_json::{Value, json};

use crate::domain::{TurnMode, Usage};

/// One line of the CLI's output, as far as greenroom cares.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Line {
    /// A turn begins in the CLI.
    Init {
        session_id: String,
        model: String,
        /// The messages of ours that it answers, by the ids that we gave them. None: the CLI
        /// begins it by itself.
        messages: Vec<String>,
    },
    TextDelta(String),
    /// The model begins an answer. With its tokens so far.
    AnswerStarted(Usage),
    /// The tokens of the answer under way, all of it so far.
    AnswerCounted(Usage),
    ToolUse {
        id: String,
        name: String,
        input: Value,
    },
    ToolResult {
        id: String,
        ok: bool,
        summary: String,
        file: Option<TouchedFile>,
    },
    /// The CLI will ask the API again.
    ApiRetry {
        status: Option<u64>,
        delay_ms: u64,
        error: String,
    },
    PermissionRequest {
        request_id: String,
        tool: String,
        input: Value,
    },
    ControlResponse {
        request_id: String,
        error: Option<String>,
    },
    Result(Box<CliResult>),
    /// Longer than we read, or no JSON: whatever it told is lost.
    Garbled,
    /// Nothing that greenroom needs to know, but a sign of life.
    Other,
}

impl Line {
    /// Does the CLI work at a turn when it prints this?
    pub(super) fn is_of_a_turn(&self) -> bool {
        match self {
            Self::Init { .. }
            | Self::TextDelta(_)
            | Self::AnswerStarted(_)
            | Self::AnswerCounted(_)
            | Self::ToolUse { .. }
            | Self::ToolResult { .. }
            | Self::ApiRetry { .. }
            | Self::PermissionRequest { .. } => true,
            Self::ControlResponse { .. } | Self::Result(_) | Self::Garbled | Self::Other => false,
        }
    }
}

/// A file that a tool wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TouchedFile {
    pub(super) path: String,
    pub(super) is_new: bool,
}

/// The CLI's `result` event.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct CliResult {
    pub(super) subtype: String,
    /// This decides, not `subtype`: API failures come as `success` with `is_error`.
    pub(super) is_error: bool,
    pub(super) text: String,
    pub(super) errors: Vec<String>,
    pub(super) session_id: String,
    pub(super) num_turns: u64,
    /// Of this turn; the cost is cumulative, over the process and (once it ended in peace) over
    /// those before it that served the same conversation. Nought where a stream was aborted.
    pub(super) usage: Usage,
    /// Tokens and cost of this turn alone, of all models.
    pub(super) since_last: Option<Usage>,
    /// The message of ours that it answers.
    pub(super) message: Option<String>,
    pub(super) terminal_reason: String,
    pub(super) api_error_status: Option<u64>,
}

/// Reads one line. `None`: not JSON.
pub(super) fn parse(line: &[u8]) -> Option<Line> {
    let value: Value = serde_json::from_slice(line).ok()?;
    Some(match text(&value, "type") {
        "system" => system(&value),
        "stream_event" => stream_event(&value["event"]),
        "assistant" => assistant(&value),
        "user" => user(&value),
        "control_request" => control_request(&value),
        "control_response" => control_response(&value["response"]),
        "result" => Line::Result(Box::new(result(&value))),
        _ => Line::Other,
    })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn owned(value: &Value, key: &str) -> String {
    text(value, key).to_owned()
}

fn system(value: &Value) -> Line {
    match text(value, "subtype") {
        "init" => Line::Init {
            session_id: owned(value, "session_id"),
            model: owned(value, "model"),
            messages: value["user_message_uuids"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|id| id.as_str().map(str::to_owned))
                .collect(),
        },
        "api_retry" => Line::ApiRetry {
            status: value["error_status"].as_u64(),
            delay_ms: value["retry_delay_ms"]
                .as_f64()
                .unwrap_or_default()
                .max(0.0) as u64,
            error: match &value["error"] {
                Value::String(error) => error.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            },
        },
        _ => Line::Other,
    }
}

fn stream_event(event: &Value) -> Line {
    let delta = &event["delta"];
    match text(event, "type") {
        "content_block_delta" if text(delta, "type") == "text_delta" => {
            Line::TextDelta(owned(delta, "text"))
        }
        "message_start" => Line::AnswerStarted(usage(&event["message"]["usage"])),
        "message_delta" => Line::AnswerCounted(usage(&event["usage"])),
        _ => Line::Other,
    }
}

/// Tokens as the API names them.
fn usage(value: &Value) -> Usage {
    let count = |key: &str| value[key].as_u64().unwrap_or_default();
    Usage {
        input_tokens: count("input_tokens"),
        output_tokens: count("output_tokens"),
        cache_read_tokens: count("cache_read_input_tokens"),
        cache_creation_tokens: count("cache_creation_input_tokens"),
        cost_usd: 0.0,
    }
}

/// Tokens and cost of each model, added up.
fn model_usage(models: &Value) -> Option<Usage> {
    let mut sum = Usage::default();
    for model in models.as_object()?.values() {
        let count = |key: &str| model[key].as_u64().unwrap_or_default();
        sum.input_tokens += count("inputTokens");
        sum.output_tokens += count("outputTokens");
        sum.cache_read_tokens += count("cacheReadInputTokens");
        sum.cache_creation_tokens += count("cacheCreationInputTokens");
        sum.cost_usd += model["costUSD"].as_f64().unwrap_or_default();
    }
    Some(sum)
}

/// An `assistant` line carries one finished content block; text was streamed before.
fn assistant(value: &Value) -> Line {
    let blocks = value["message"]["content"].as_array();
    let tool = blocks
        .into_iter()
        .flatten()
        .find(|block| text(block, "type") == "tool_use");
    match tool {
        Some(tool) => Line::ToolUse {
            id: owned(tool, "id"),
            name: owned(tool, "name"),
            input: tool["input"].clone(),
        },
        None => Line::Other,
    }
}

fn user(value: &Value) -> Line {
    let blocks = value["message"]["content"].as_array();
    let Some(block) = blocks
        .into_iter()
        .flatten()
        .find(|block| text(block, "type") == "tool_result")
    else {
        return Line::Other;
    };
    let ok = !block["is_error"].as_bool().unwrap_or(false);
    let written = &value["tool_use_result"];
    let kind = text(written, "type");
    // Edit results carry no `type`, only the patch; Write says create or update.
    let wrote =
        ok && (written["structuredPatch"].is_array() || matches!(kind, "create" | "update"));
    let file = written["filePath"]
        .as_str()
        .filter(|_| wrote)
        .map(|path| TouchedFile {
            path: path.to_owned(),
            is_new: kind == "create",
        });
    Line::ToolResult {
        id: owned(block, "tool_use_id"),
        ok,
        summary: summary(&block["content"]),
        file,
    }
}

/// The beginning of a tool's answer, for people.
fn summary(content: &Value) -> String {
    const LENGTH: usize = 400;
    let whole = match content {
        Value::String(text) => text.as_str(),
        Value::Array(blocks) => blocks
            .iter()
            .find_map(|block| block["text"].as_str())
            .unwrap_or_default(),
        _ => "",
    };
    let end = whole.floor_char_boundary(LENGTH);
    if end < whole.len() {
        format!("{}…", &whole[..end])
    } else {
        whole.to_owned()
    }
}

fn control_request(value: &Value) -> Line {
    let request = &value["request"];
    // Every request must be answered or the CLI waits for ever: whatever is not a permission
    // question is answered as one that is refused.
    Line::PermissionRequest {
        request_id: owned(value, "request_id"),
        tool: owned(request, "tool_name"),
        input: request["input"].clone(),
    }
}

fn control_response(response: &Value) -> Line {
    let failed = text(response, "subtype") == "error";
    Line::ControlResponse {
        request_id: owned(response, "request_id"),
        error: failed.then(|| owned(response, "error")),
    }
}

fn result(value: &Value) -> CliResult {
    CliResult {
        subtype: owned(value, "subtype"),
        is_error: value["is_error"].as_bool().unwrap_or(true),
        text: owned(value, "result"),
        errors: value["errors"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|error| error.as_str().map(str::to_owned))
            .collect(),
        session_id: owned(value, "session_id"),
        num_turns: value["num_turns"].as_u64().unwrap_or_default(),
        usage: Usage {
            cost_usd: value["total_cost_usd"].as_f64().unwrap_or_default(),
            ..usage(&value["usage"])
        },
        since_last: model_usage(&value["model_usage_since_last_result"]),
        message: value["user_message_uuid"].as_str().map(str::to_owned),
        terminal_reason: owned(value, "terminal_reason"),
        api_error_status: value["api_error_status"].as_u64(),
    }
}

/// The person's instruction. One that begins with a slash would be taken for a command of the CLI's
/// own ("/help isn't available"), and never reach the model. The turn that answers it names `id`.
pub(super) fn user_message(id: &str, instruction: &str) -> Value {
    let text = if instruction.trim_start().starts_with('/') {
        format!("Instruction: {instruction}")
    } else {
        instruction.to_owned()
    };
    json!({
        "type": "user",
        "uuid": id,
        "message": {"role": "user", "content": [{"type": "text", "text": text}]},
    })
}

/// Stops what the CLI is doing; it stays up.
pub(super) fn interrupt(request_id: &str) -> Value {
    control(request_id, json!({"subtype": "interrupt"}))
}

/// What fills the conversation. Asked for the sake of the work: the CLI then has its system prompt
/// and its tools' descriptions ready.
pub(super) fn get_context_usage(request_id: &str) -> Value {
    control(request_id, json!({"subtype": "get_context_usage"}))
}

/// Plan or execute, from the next turn on.
pub(super) fn set_mode(request_id: &str, mode: TurnMode) -> Value {
    control(
        request_id,
        json!({"subtype": "set_permission_mode", "mode": permission_mode(mode)}),
    )
}

/// Another model, from the next turn on; `default` is the CLI's own choice.
pub(super) fn set_model(request_id: &str, model: Option<&str>) -> Value {
    control(
        request_id,
        json!({"subtype": "set_model", "model": model.unwrap_or("default")}),
    )
}

/// The CLI's name of a mode.
pub(super) fn permission_mode(mode: TurnMode) -> &'static str {
    match mode {
        TurnMode::Execute => "acceptEdits",
        TurnMode::Plan => "plan",
    }
}

/// The answer to a permission request.
pub(super) fn permission_response(request_id: &str, decision: Result<Value, String>) -> Value {
    let response = match decision {
        Ok(input) => json!({"behavior": "allow", "updatedInput": input}),
        Err(why) => json!({"behavior": "deny", "message": why}),
    };
    json!({"type": "control_response",
           "response": {"subtype": "success", "request_id": request_id, "response": response}})
}

fn control(request_id: &str, request: Value) -> Value {
    json!({"type": "control_request", "request_id": request_id, "request": request})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(value: Value) -> Line {
        parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn is_error_decides_not_subtype() {
        let Line::Result(result) = line(json!({
            "type": "result", "subtype": "success", "is_error": true, "api_error_status": 400,
            "result": "API Error", "session_id": "s", "num_turns": 1, "total_cost_usd": 0.5,
            "usage": {"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 3}
        })) else {
            panic!("a result")
        };
        assert!(result.is_error);
        assert_eq!(
            (result.usage.cache_read_tokens, result.usage.cost_usd),
            (3, 0.5)
        );
        assert_eq!(result.api_error_status, Some(400));
    }

    #[test]
    fn what_tools_did_is_read() {
        let edit = line(json!({"type": "user", "message": {"content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "The file has been updated."}]},
            "tool_use_result": {"filePath": "/w/a.astro", "structuredPatch": []}}));
        let Line::ToolResult {
            ok: true,
            file: Some(file),
            ..
        } = edit
        else {
            panic!("{edit:?}")
        };
        assert_eq!((file.path.as_str(), file.is_new), ("/w/a.astro", false));
        let read = line(json!({"type": "user", "message": {"content": [
            {"type": "tool_result", "tool_use_id": "t2", "is_error": true, "content": "no such file"}]},
            "tool_use_result": "Error: no such file"}));
        assert!(
            matches!(
                read,
                Line::ToolResult {
                    ok: false,
                    file: None,
                    ..
                }
            ),
            "{read:?}"
        );
    }

    #[test]
    fn a_turn_names_the_message_that_it_answers() {
        let init = json!({"type": "system", "subtype": "init", "session_id": "s", "model": "m"});
        let mut ours = init.clone();
        ours["user_message_uuids"] = json!(["a", "b"]);
        let messages = |value| match line(value) {
            Line::Init { messages, .. } => messages,
            other => panic!("{other:?}"),
        };
        assert_eq!(messages(ours), ["a", "b"]);
        assert!(messages(init).is_empty(), "the CLI begins it by itself");
    }

    #[test]
    fn the_cost_of_one_turn_is_told_from_that_of_all() {
        let Line::Result(result) = line(json!({
            "type": "result", "is_error": true, "total_cost_usd": 7.0, "user_message_uuid": "a",
            "usage": {"output_tokens": 0},
            "model_usage_since_last_result": {
                "one": {"inputTokens": 1, "outputTokens": 2, "costUSD": 0.25},
                "two": {"inputTokens": 10, "cacheReadInputTokens": 3, "costUSD": 0.5}}
        })) else {
            panic!("a result")
        };
        let usage = result.since_last.unwrap();
        assert_eq!((usage.input_tokens, usage.output_tokens), (11, 2));
        assert_eq!((usage.cache_read_tokens, usage.cost_usd), (3, 0.75));
        assert_eq!(result.message.as_deref(), Some("a"));
    }

    #[test]
    fn unknown_lines_are_passed_over() {
        for value in [
            json!({"type": "news"}),
            json!({}),
            json!([1]),
            json!({"type": "system"}),
        ] {
            assert_eq!(line(value), Line::Other);
        }
        assert_eq!(parse(b"half a li"), None);
    }
}
