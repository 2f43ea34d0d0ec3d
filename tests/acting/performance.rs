//! One turn, played line by line.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::OpenOptions,
    io::stderr,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, raise};
use serde_json::{Value, json};

use crate::{
    IN_SESSION, ask, flood,
    input::{Input, Instruction, Waited},
    session::Session,
    voice::{Tokens, Voice},
};

/// Long enough for every test.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// How a turn is left before its last line.
enum Cut {
    /// Interrupted while a tool ran, or while the model spoke.
    Aborted(&'static str),
    /// The API refused.
    Refused(u64),
    /// The API's stream was broken.
    Broken,
}

pub(crate) struct Performance<'a> {
    input: &'a Input,
    voice: &'a Voice,
    session: &'a mut Session,
    begun: Instant,
    /// Answers of the model so far.
    answers: u64,
    /// Blocks of the answer that is open.
    open: Option<usize>,
    usage: Tokens,
    /// The last thing said.
    text: String,
    has_spoken: bool,
    repeats_result: bool,
}

impl<'a> Performance<'a> {
    pub(crate) fn new(input: &'a Input, voice: &'a Voice, session: &'a mut Session) -> Self {
        Self {
            input,
            voice,
            session,
            begun: Instant::now(),
            answers: 0,
            open: None,
            usage: Tokens::default(),
            text: String::new(),
            has_spoken: false,
            repeats_result: false,
        }
    }

    /// Plays it; whether it failed.
    pub(crate) fn play(mut self, instruction: &Instruction) -> bool {
        // A summary of an earlier conversation is no part of the script.
        let script = instruction
            .script
            .rsplit("</conversation-so-far>")
            .next()
            .unwrap_or_default();
        self.session.record("user", script);
        let mut init = json!({
            "type": "system", "subtype": "init", "cwd": env::current_dir().unwrap_or_default(),
            "tools": ["Bash", "Edit", "Glob", "Grep", "Read", "Write"], "mcp_servers": [],
            "model": self.input.model(), "permissionMode": self.input.mode(),
            "claude_code_version": "2.1.329",
        });
        if let Some(message) = &instruction.message {
            self.voice.lifecycle(message, "started");
            init["user_message_uuids"] = json!([message]);
        }
        self.voice.say(init);
        self.requesting();
        let mut ending = Ok(());
        for line in script.lines() {
            ending = self.act(line.trim());
            if ending.is_ok() && self.input.is_interrupted() {
                ending = Err(Cut::Aborted("aborted_streaming"));
            }
            if ending.is_err() {
                break;
            }
        }
        if ending.is_ok() {
            if !self.has_spoken {
                self.say("Done.");
            }
            self.close("end_turn");
        }
        let text = self.text.clone();
        self.session.record("assistant", &text);
        let failed = self.end(ending, instruction.message.as_deref());
        if let Some(message) = &instruction.message {
            let state = if failed { "cancelled" } else { "completed" };
            self.voice.lifecycle(message, state);
        }
        failed
    }

    fn act(&mut self, line: &str) -> Result<(), Cut> {
        let (act, rest) = line.split_once(' ').unwrap_or((line, ""));
        let number = || rest.split(' ').next().unwrap_or_default().parse().ok();
        match (act, number()) {
            ("write", _) => self.write(rest),
            ("append", _) => self.edit(rest),
            ("text", _) => {
                self.say(rest);
                Ok(())
            }
            ("run", _) => self.run(rest),
            ("leave", _) => {
                self.leave(rest);
                Ok(())
            }
            ("permit", _) => self.permit(rest),
            ("ask", _) => self.ask(rest),
            ("recall", _) => {
                let answer = match self.session.remembered() {
                    Some(word) => format!("You told me: {word}."),
                    None => "You told me nothing.".to_owned(),
                };
                self.say(&answer);
                Ok(())
            }
            ("pause", Some(ms)) => self.pause(Duration::from_millis(ms)),
            ("muse", Some(ms)) => {
                let times = rest.split(' ').nth(1).and_then(|n| n.parse().ok());
                self.muse(Duration::from_millis(ms), times.unwrap_or(1))
            }
            ("silent", _) => self.pause(FOR_EVER),
            ("retry", Some(status)) => {
                let delay = rest.split(' ').nth(1).and_then(|ms| ms.parse().ok());
                self.retry(status, delay.unwrap_or(500))
            }
            ("fail", Some(status)) => Err(Cut::Refused(status)),
            ("break", _) => Err(Cut::Broken),
            ("exit", Some(code)) => process::exit(i32::try_from(code).unwrap_or(1)),
            ("die", _) => {
                raise(Signal::SIGKILL).ok();
                Ok(())
            }
            ("half-line", _) => {
                let half = br#"{"type":"stream_event","event":{"type":"content_bl"#;
                self.voice.print(half);
                Ok(())
            }
            ("lose-tool", _) => {
                self.call(
                    "Bash",
                    &json!({"command": "true", "description": "a command"}),
                );
                self.voice.print(b"{\"type\":\"user\",\n");
                Ok(())
            }
            ("long-line", Some(megabytes)) => {
                let padding = "x".repeat((megabytes << 20) as usize);
                self.voice
                    .say(json!({"type": "system", "subtype": "padding", "text": padding}));
                Ok(())
            }
            ("flood-stderr", Some(megabytes)) => {
                flood(stderr().lock(), megabytes);
                Ok(())
            }
            ("close-stdout", _) => {
                let null = OpenOptions::new().write(true).open("/dev/null");
                if let Ok(null) = null {
                    nix::unistd::dup2_stdout(null).ok();
                }
                self.pause(FOR_EVER)
            }
            ("unknown-event", _) => {
                for event in [
                    json!({"type": "surprise", "what": {"is": ["this"]}}),
                    json!({"type": "system", "subtype": "surprise"}),
                    json!({"type": "assistant", "message": {"content": [{"type": "surprise"}]}}),
                    json!({"type": "user", "message": {"content": "surprise"}}),
                    json!({"type": "stream_event", "event": {"type": "surprise"}}),
                ] {
                    self.voice.say(event);
                }
                self.voice.print(b"[]\n\"surprise\"\n\n");
                Ok(())
            }
            ("unknown-request", _) => {
                let id = "surprise";
                self.voice
                    .say(json!({"type": "control_request", "request_id": id,
                    "request": {"subtype": "surprise"}}));
                self.await_answer(id).map(|_| ())
            }
            ("result-no-exit", _) => {
                self.input.be_deaf();
                Ok(())
            }
            ("result-twice", _) => {
                self.repeats_result = true;
                Ok(())
            }
            ("self-turn", Some(ms)) => {
                let command = rest.split_once(' ').map_or("", |(_, command)| command);
                let script = format!("run {command}\ntext Nobody asked for this.");
                self.input
                    .start_by_itself(Duration::from_millis(ms), script);
                Ok(())
            }
            ("stubborn", _) => {
                self.input.be_stubborn();
                Ok(())
            }
            ("immortal", _) => {
                self.input.be_immortal();
                Ok(())
            }
            // Talk; what is to be remembered is found in the transcript.
            _ => Ok(()),
        }
    }

    fn requesting(&self) {
        self.voice
            .say(json!({"type": "system", "subtype": "status", "status": "requesting"}));
    }

    fn message_id(&self) -> String {
        format!("msg_acting_{}", self.answers)
    }

    /// Opens an answer of the model, if none is open; the index of its next block.
    fn open(&mut self) -> usize {
        if let Some(blocks) = &mut self.open {
            *blocks += 1;
            return *blocks;
        }
        self.answers += 1;
        self.open = Some(0);
        let usage = Tokens {
            output: 1,
            ..Tokens::ANSWER
        };
        let message = json!({"id": self.message_id(), "type": "message", "role": "assistant",
            "model": self.input.model(), "content": [], "stop_reason": null,
            "stop_sequence": null, "usage": usage.json()});
        self.voice
            .stream(json!({"type": "message_start", "message": message}));
        0
    }

    /// A whole block: its start, its pieces, the finished one.
    fn block(&mut self, start: &Value, pieces: &[Value], finished: &Value) {
        let index = self.open();
        self.voice
            .stream(json!({"type": "content_block_start", "index": index, "content_block": start}));
        for delta in pieces {
            self.voice
                .stream(json!({"type": "content_block_delta", "index": index, "delta": delta}));
        }
        self.finished(finished);
        self.voice
            .stream(json!({"type": "content_block_stop", "index": index}));
    }

    fn finished(&self, block: &Value) {
        self.voice
            .say(json!({"type": "assistant", "parent_tool_use_id": null,
            "message": {"id": self.message_id(), "type": "message", "role": "assistant",
                "model": self.input.model(), "content": [block], "stop_reason": null}}));
    }

    fn close(&mut self, stop_reason: &str) {
        if self.open.take().is_none() {
            return;
        }
        self.usage.add(Tokens::ANSWER);
        self.session.total_cost += Tokens::PRICE;
        self.voice.stream(json!({"type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": null},
            "usage": Tokens::ANSWER.json()}));
        self.voice.stream(json!({"type": "message_stop"}));
    }

    fn say(&mut self, text: &str) {
        let pieces: Vec<Value> = text
            .split_inclusive(' ')
            .map(|word| json!({"type": "text_delta", "text": word}))
            .collect();
        self.block(
            &json!({"type": "text", "text": ""}),
            &pieces,
            &json!({"type": "text", "text": text}),
        );
        text.clone_into(&mut self.text);
        self.has_spoken = true;
    }

    /// The model calls a tool: its id.
    fn call(&mut self, name: &str, input: &Value) -> String {
        let id = format!("toolu_acting_{}", self.answers);
        let start = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
        let piece = json!({"type": "input_json_delta", "partial_json": input.to_string()});
        let finished = json!({"type": "tool_use", "id": id, "name": name, "input": input});
        self.block(&start, &[piece], &finished);
        self.close("tool_use");
        self.has_spoken = false;
        id
    }

    fn tool_result(&self, id: &str, text: &str, is_error: bool, details: &Value) {
        self.voice
            .say(json!({"type": "user", "parent_tool_use_id": null,
            "message": {"role": "user", "content": [{"tool_use_id": id, "type": "tool_result",
                "content": text, "is_error": is_error}]},
            "tool_use_result": details}));
    }

    fn after_tool(&self) {
        self.requesting();
    }

    /// Asks whether a tool may be used; the reason where not.
    fn ask_permission(&mut self, tool: &str, input: &Value) -> Result<Result<(), String>, Cut> {
        let id = format!("permission-{}", self.answers);
        self.voice
            .say(json!({"type": "control_request", "request_id": id,
            "request": {"subtype": "can_use_tool", "tool_name": tool, "input": input,
                "permission_suggestions": []}}));
        let answer = self.await_answer(&id)?;
        Ok(if answer["behavior"] == "allow" {
            Ok(())
        } else {
            Err(answer["message"].as_str().unwrap_or("denied").to_owned())
        })
    }

    fn await_answer(&self, id: &str) -> Result<Value, Cut> {
        self.input.answer(id).ok_or(Cut::Aborted("aborted_tools"))
    }

    /// The mode lets writes inside the working directory through, unless it is for plans.
    fn may_write(&mut self, id: &str, tool: &str, input: &Value) -> Result<bool, Cut> {
        if self.input.mode() != "plan" {
            return Ok(true);
        }
        let answer = self.ask_permission(tool, input)?;
        if let Err(why) = &answer {
            self.tool_result(id, why, true, &json!(format!("Error: {why}")));
            self.after_tool();
        }
        Ok(answer.is_ok())
    }

    fn write(&mut self, rest: &str) -> Result<(), Cut> {
        let (path, text) = path_and_text(rest);
        let input = json!({"file_path": path, "content": text});
        let id = self.call("Write", &input);
        if !self.may_write(&id, "Write", &input)? {
            return Ok(());
        }
        let kind = if path.exists() { "update" } else { "create" };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).ok();
        }
        self.written(&id, &path, Some(kind), fs::write(&path, text));
        Ok(())
    }

    fn edit(&mut self, rest: &str) -> Result<(), Cut> {
        let (path, text) = path_and_text(rest);
        let old = fs::read_to_string(&path).unwrap_or_default();
        let new = old.clone() + &text;
        let input = json!({"file_path": path, "old_string": old, "new_string": new});
        let id = self.call("Edit", &input);
        if !self.may_write(&id, "Edit", &input)? {
            return Ok(());
        }
        self.written(&id, &path, None, fs::write(&path, new));
        Ok(())
    }

    fn written(&self, id: &str, path: &Path, kind: Option<&str>, outcome: std::io::Result<()>) {
        match outcome {
            Ok(()) => {
                let mut details = json!({"filePath": path, "structuredPatch": []});
                let verb = match kind {
                    Some("create") => "created",
                    _ => "updated",
                };
                if let Some(kind) = kind {
                    details["type"] = json!(kind);
                }
                let text = format!("File {verb} successfully at: {}", path.display());
                self.tool_result(id, &text, false, &details);
            }
            Err(error) => {
                let text = error.to_string();
                self.tool_result(id, &text, true, &json!(format!("Error: {text}")));
            }
        }
        self.after_tool();
    }

    fn run(&mut self, command: &str) -> Result<(), Cut> {
        let id = self.call(
            "Bash",
            &json!({"command": command, "description": "a command"}),
        );
        self.obey(&id, command)
    }

    fn permit(&mut self, command: &str) -> Result<(), Cut> {
        let input = json!({"command": command, "description": "a command"});
        let id = self.call("Bash", &input);
        match self.ask_permission("Bash", &input)? {
            Ok(()) => self.obey(&id, command),
            Err(why) => {
                self.tool_result(&id, &why, true, &json!(format!("Error: {why}")));
                self.after_tool();
                Ok(())
            }
        }
    }

    fn obey(&mut self, id: &str, command: &str) -> Result<(), Cut> {
        let Ok(child) = in_session(command, Stdio::piped()) else {
            self.tool_result(id, "no shell", true, &json!("Error: no shell"));
            self.after_tool();
            return Ok(());
        };
        self.input.runs(Some(child.id()));
        let output = child.wait_with_output();
        self.input.runs(None);
        if self.input.is_interrupted() {
            let text = "The user doesn't want to proceed with this tool use.";
            self.tool_result(id, text, true, &json!("User rejected tool use"));
            return Err(Cut::Aborted("aborted_tools"));
        }
        let (text, code) = match output {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout)
                    .trim_end()
                    .to_owned();
                (text, output.status.code().unwrap_or(137))
            }
            Err(error) => (error.to_string(), 1),
        };
        if code == 0 {
            let details = json!({"stdout": text, "stderr": "", "interrupted": false});
            self.tool_result(id, &text, false, &details);
        } else {
            let text = format!("Exit code {code}\n{text}").trim_end().to_owned();
            self.tool_result(id, &text, true, &json!(format!("Error: {text}")));
        }
        self.after_tool();
        while self.input.is_ending() {
            thread::sleep(FOR_EVER);
        }
        Ok(())
    }

    fn leave(&mut self, command: &str) {
        let input = json!({"command": format!("{command} &"), "description": "a command"});
        let id = self.call("Bash", &input);
        if let Ok(mut child) = in_session(command, Stdio::null()) {
            thread::spawn(move || child.wait());
        }
        let details = json!({"stdout": "", "stderr": "", "interrupted": false});
        self.tool_result(&id, "", false, &details);
        self.after_tool();
    }

    fn ask(&mut self, words: &str) -> Result<(), Cut> {
        let (model, session) = (self.input.model(), self.voice.session().to_owned());
        let words = words.to_owned();
        let asking = thread::spawn(move || ask::ask(&model, &session, &words));
        while !asking.is_finished() {
            if self.input.wait(Duration::from_millis(2)) == Waited::Interrupted {
                return Err(Cut::Aborted("aborted_streaming"));
            }
        }
        match asking.join().unwrap_or(Err(500)) {
            Ok(text) => {
                self.say(&text);
                Ok(())
            }
            Err(status) => Err(Cut::Refused(status)),
        }
    }

    fn pause(&mut self, time: Duration) -> Result<(), Cut> {
        // The model has begun to answer.
        if self.open.is_none() {
            self.open();
        }
        match self.input.wait(time) {
            Waited::Enough => Ok(()),
            Waited::Interrupted => Err(Cut::Aborted("aborted_streaming")),
        }
    }

    fn muse(&mut self, time: Duration, times: u32) -> Result<(), Cut> {
        for _ in 0..times {
            self.pause(time)?;
            self.voice
                .stream(json!({"type": "content_block_delta", "index": 0,
                "delta": {"type": "thinking_delta", "thinking": "hm"}}));
        }
        Ok(())
    }

    fn retry(&mut self, status: u64, delay: u64) -> Result<(), Cut> {
        self.voice.say(
            json!({"type": "system", "subtype": "api_retry", "attempt": 1,
            "max_retries": 10, "retry_delay_ms": delay, "error_status": status,
            "error": "acted out"}),
        );
        match self.input.wait(Duration::from_millis(delay)) {
            Waited::Enough => Ok(()),
            Waited::Interrupted => Err(Cut::Aborted("aborted_streaming")),
        }
    }

    /// The result; whether it is a failure.
    fn end(&mut self, ending: Result<(), Cut>, message: Option<&str>) -> bool {
        let mut result = json!({"type": "result", "is_error": ending.is_err(),
            "api_error_status": null, "permission_denials": [], "stop_reason": null});
        let mut turns = self.answers;
        match &ending {
            Ok(()) => {
                result["subtype"] = json!("success");
                result["terminal_reason"] = json!("completed");
                result["stop_reason"] = json!("end_turn");
                result["result"] = json!(self.text);
            }
            Err(Cut::Aborted(reason)) => {
                let note = if *reason == "aborted_tools" {
                    "[Request interrupted by user for tool use]"
                } else {
                    "[Request interrupted by user]"
                };
                self.voice
                    .say(json!({"type": "user", "message": {"role": "user",
                    "content": [{"type": "text", "text": note}]}}));
                // What was said counts, though the answer is not whole.
                self.close("");
                turns = self.answers + 2;
                result["subtype"] = json!("error_during_execution");
                result["terminal_reason"] = json!(reason);
                result["errors"] = json!(["[ede_diagnostic] result_type=user"]);
            }
            Err(Cut::Refused(status)) => {
                self.close("");
                let text = format!("API Error: {status} acted out");
                self.voice
                    .say(json!({"type": "assistant", "error": "unknown",
                    "message": {"model": "<synthetic>", "role": "assistant",
                        "content": [{"type": "text", "text": text}]}}));
                turns = 1;
                result["subtype"] = json!("success");
                result["terminal_reason"] = json!("api_error");
                result["api_error_status"] = json!(status);
                result["result"] = json!(text);
            }
            Err(Cut::Broken) => {
                self.close("");
                result["subtype"] = json!("error_during_execution");
                result["terminal_reason"] = json!("model_error");
                result["errors"] = json!(["[ede_diagnostic] result_type=assistant"]);
            }
        }
        let model = self.input.model();
        let cost = Tokens::PRICE * (self.usage.output / Tokens::ANSWER.output) as f64;
        let mut models = BTreeMap::new();
        if self.usage.output > 0 {
            models.insert(
                model,
                json!({"inputTokens": self.usage.input, "outputTokens": self.usage.output,
                    "cacheReadInputTokens": self.usage.read,
                    "cacheCreationInputTokens": self.usage.created, "costUSD": cost}),
            );
        }
        match message {
            Some(message) => result["user_message_uuid"] = json!(message),
            None => result["origin"] = json!({"kind": "task-notification"}),
        }
        result["usage"] = self.usage.json();
        result["model_usage_since_last_result"] = json!(models);
        result["modelUsage"] = json!(models);
        result["num_turns"] = json!(turns);
        result["total_cost_usd"] = json!(self.session.total_cost);
        result["duration_ms"] = json!(self.begun.elapsed().as_millis() as u64);
        self.voice.say(result.clone());
        if self.repeats_result {
            self.voice.say(result);
        }
        ending.is_err()
    }
}

/// A command that leads a session of its own.
fn in_session(command: &str, output: Stdio) -> std::io::Result<Child> {
    let program = env::current_exe()?;
    #[expect(clippy::disallowed_methods, reason = "this is a program of its own")]
    Command::new(program)
        .args([IN_SESSION, command])
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
}

fn path_and_text(rest: &str) -> (PathBuf, String) {
    let (path, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let cwd = env::current_dir().unwrap_or_default();
    (cwd.join(path), text.replace("\\n", "\n"))
}
