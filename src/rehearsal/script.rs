//! Scripts: what to answer to which instruction, failures included, read from a JSON file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

use super::RehearsalError;

/// How the rehearsal behaves where it should not just follow plain instructions.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// The first rule whose `match` is in the instruction answers it.
    pub rules: Vec<Rule>,
    /// Keys and tokens that are answered with 401, as a missing one always is.
    pub wrong_keys: Vec<String>,
    /// Pause between two chunks of text, in milliseconds, where a step names none. 0 is as fast
    /// as it goes.
    pub chunk_delay_ms: u64,
}

/// One scripted conversation, begun by an instruction.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// Looked for in the last thing that the person said, whatever the case. Empty matches all.
    #[serde(rename = "match")]
    pub matches: String,
    /// The n-th answer of the model since the instruction; after the last one it says "Done.".
    pub steps: Vec<Step>,
}

/// One answer of the model. `{cwd}` in a tool's input stands for the working directory.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Step {
    pub text: Option<String>,
    pub tool: Option<Tool>,
    /// More than one call in one answer.
    pub tools: Vec<Tool>,
    /// Before the first byte, in milliseconds.
    pub delay_ms: u64,
    /// Between two chunks, in milliseconds.
    pub chunk_delay_ms: Option<u64>,
    /// How the answer goes wrong.
    pub act: Option<Act>,
    /// `act` only so many times, counted over all requests that reach this step; then the step's
    /// text and tools are answered. A CLI that tries again is met by the same step.
    pub times: Option<u64>,
}

/// A call that the model makes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    #[serde(default)]
    pub input: Value,
}

/// What an upstream does wrong.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Act {
    /// An HTTP status, with the API's error shape where `body` names none.
    Status {
        status: u16,
        #[serde(default)]
        retry_after: Option<u64>,
        #[serde(default)]
        body: Option<String>,
    },
    /// A redirect to this address.
    Redirect { location: String },
    /// No byte of an answer, until the client gives up.
    NoBytes,
    /// The head and pings, for ever.
    OnlyPings,
    /// Half of the answer, then nothing more.
    StallMidway,
    /// Half of the answer, then the connection breaks.
    Cut,
    /// A page instead of the API's answer, as from a captive portal.
    Html,
    /// Events that are no JSON.
    BrokenSse,
    /// An `error` event of this type in the middle of a stream that began well.
    ErrorEvent { kind: String },
    /// A good answer with nothing in it.
    Empty,
    /// The answer ends at the limit of its tokens.
    MaxTokens,
    /// The model refuses.
    Refusal,
}

impl Script {
    /// Reads a script. Does blocking I/O.
    ///
    /// # Errors
    /// [`RehearsalError::ReadScript`] or [`RehearsalError::ParseScript`].
    pub fn load(path: &Path) -> Result<Self, RehearsalError> {
        let path_buf = || -> PathBuf { path.to_owned() };
        let text = fs::read_to_string(path).map_err(|source| RehearsalError::ReadScript {
            path: path_buf(),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| RehearsalError::ParseScript {
            path: path_buf(),
            source,
        })
    }

    /// The index of the rule for an instruction.
    pub(super) fn rule_for(&self, instruction: &str) -> Option<usize> {
        let instruction = instruction.to_lowercase();
        self.rules
            .iter()
            .position(|rule| instruction.contains(&rule.matches.to_lowercase()))
    }
}

impl Step {
    /// Its calls, with `{cwd}` filled in.
    pub(super) fn calls(&self, cwd: &str) -> Vec<Tool> {
        self.tool
            .iter()
            .chain(&self.tools)
            .map(|tool| Tool {
                name: tool.name.clone(),
                input: fill(&tool.input, cwd),
            })
            .collect()
    }
}

fn fill(value: &Value, cwd: &str) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace("{cwd}", cwd)),
        Value::Array(items) => items.iter().map(|item| fill(item, cwd)).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.clone(), fill(value, cwd)))
            .collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_script_reads_as_documented() {
        let script: Script = serde_json::from_value(json!({
            "wrong_keys": ["bad"],
            "rules": [
                {"match": "Over Loaded", "steps": [
                    {"act": {"status": {"status": 529, "retry_after": 3}}, "times": 2,
                     "text": "Now.",
                     "tool": {"name": "Read", "input": {"paths": ["{cwd}/a"], "n": 1}}},
                    {"act": "cut", "text": "x", "chunk_delay_ms": 5}]},
                {"match": "", "steps": [{"act": {"error_event": {"kind": "overloaded_error"}}}]},
            ],
        }))
        .unwrap();
        assert_eq!(script.rule_for("be over loaded, please"), Some(0));
        assert_eq!(script.rule_for("other"), Some(1));
        let step = &script.rules[0].steps[0];
        assert_eq!(
            step.calls("/w")[0].input,
            json!({"paths": ["/w/a"], "n": 1})
        );
        let typo = json!({"rules": [{"match": "", "steps": [{"act": "cutt"}]}]});
        assert!(serde_json::from_value::<Script>(typo).is_err());
    }
}
