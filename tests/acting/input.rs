//! What it is told: turns, control requests and answers by standard input, and signals. All of it
//! is taken in at once, also while a turn is being played.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, stdin},
    os::fd::AsFd,
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::voice::Voice;

/// How often it is looked whether to listen at all, in milliseconds.
const LOOK_EVERY: u8 = 20;

/// What comes next.
pub(crate) enum Order {
    Turn(Instruction),
    End,
}

/// A turn that is asked for.
pub(crate) struct Instruction {
    /// The id that its message has; none for a turn of its own.
    pub(crate) message: Option<String>,
    pub(crate) script: String,
}

/// How a wait ended.
#[derive(PartialEq, Eq)]
pub(crate) enum Waited {
    Enough,
    Interrupted,
}

/// Shared by the threads that listen and the one that plays.
pub(crate) struct Input {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    turns: VecDeque<Instruction>,
    is_closed: bool,
    /// A turn is being played.
    is_playing: bool,
    is_interrupted: bool,
    is_signalled: bool,
    /// SIGTERM came: nothing more is done.
    is_ending: bool,
    is_stubborn: bool,
    is_immortal: bool,
    is_deaf: bool,
    /// The group of the command that runs now.
    command: Option<i32>,
    /// Answers to `can_use_tool`, by request.
    answers: Vec<(String, Value)>,
    own_turn: Option<(Instant, String)>,
    model: String,
    mode: String,
}

impl Input {
    pub(crate) fn new(model: String, mode: String) -> Arc<Self> {
        let state = State {
            model,
            mode,
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Reads standard input to its end.
    pub(crate) fn read(&self, voice: &Voice) {
        let Ok(pipe) = stdin().as_fd().try_clone_to_owned() else {
            return;
        };
        let mut reader = BufReader::new(File::from(pipe));
        loop {
            if reader.buffer().is_empty() {
                let mut ready = [PollFd::new(reader.get_ref().as_fd(), PollFlags::POLLIN)];
                let found = poll(&mut ready, LOOK_EVERY).unwrap_or_default();
                if self.lock().is_deaf {
                    // The pipe fills up from here.
                    return;
                }
                if found == 0 {
                    continue;
                }
            }
            let mut line = String::new();
            if !matches!(reader.read_line(&mut line), Ok(1..)) {
                break;
            }
            let line = line.trim_end();
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                eprintln!(
                    "Error parsing streaming input line (type=unknown, {} chars): SyntaxError",
                    line.len()
                );
                process::exit(1);
            };
            match line["type"].as_str() {
                Some("user") => {
                    let message = line["uuid"].as_str().map(str::to_owned);
                    if let Some(id) = &message {
                        voice.lifecycle(id, "queued");
                    }
                    let script = text_of(&line["message"]["content"]);
                    let turn = Instruction { message, script };
                    self.change(|state| state.turns.push_back(turn));
                }
                Some("control_request") => self.control(&line, voice),
                Some("control_response") => {
                    let response = &line["response"];
                    let id = response["request_id"].as_str().unwrap_or_default();
                    let answer = (id.to_owned(), response["response"].clone());
                    self.change(|state| state.answers.push(answer));
                }
                _ => {}
            }
        }
        self.change(|state| state.is_closed = true);
    }

    fn control(&self, line: &Value, voice: &Voice) {
        let id = line["request_id"].as_str().unwrap_or_default();
        let request = &line["request"];
        let subtype = request["subtype"].as_str().unwrap_or_default();
        let ok =
            |response: Value| json!({"subtype": "success", "request_id": id, "response": response});
        let error = |error: String, code: &str| json!({"subtype": "error", "request_id": id, "error": error, "error_code": code});
        let answer = match subtype {
            "interrupt" if self.lock().is_stubborn => return,
            "interrupt" => {
                let state = self.lock();
                let queued: Vec<_> = state.turns.iter().map(|turn| &turn.message).collect();
                ok(json!({"still_queued": queued}))
            }
            "set_permission_mode" => {
                const MODES: [&str; 6] = [
                    "acceptEdits",
                    "auto",
                    "bypassPermissions",
                    "default",
                    "dontAsk",
                    "plan",
                ];
                let mode = request["mode"].as_str().unwrap_or_default();
                if MODES.contains(&mode) {
                    self.lock().mode = mode.to_owned();
                    ok(json!({"mode": mode}))
                } else {
                    let modes = MODES.join(", ");
                    let why = format!("Cannot set permission mode: must be one of {modes}");
                    error(why, "invalid_mode")
                }
            }
            "set_model" => {
                let model = request["model"].as_str().unwrap_or("default");
                let model = if model == "default" {
                    "claude-opus-5-5"
                } else {
                    model
                };
                self.lock().model = model.to_owned();
                ok(json!({"model": model}))
            }
            "initialize" => ok(json!({"commands": []})),
            other => error(
                format!("Unsupported control request subtype: {other}"),
                "unsupported_request",
            ),
        };
        let is_mode = subtype == "set_permission_mode" && answer["subtype"] == "success";
        voice.say(json!({"type": "control_response", "response": answer}));
        if is_mode {
            let mode = self.mode();
            voice.say(
                json!({"type": "system", "subtype": "status", "status": null,
                "permissionMode": mode, "session_id": voice.session()}),
            );
        }
        if subtype == "interrupt" {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        let command = {
            let mut state = self.lock();
            // With nothing under way there is nothing to stop.
            state.is_interrupted |= state.is_playing;
            state.command
        };
        self.changed.notify_all();
        kill_group(command);
    }

    /// A signal came.
    pub(crate) fn signalled(&self, signal: Signal) {
        let (is_immortal, command) = {
            let state = self.lock();
            (state.is_immortal, state.command)
        };
        if is_immortal {
            return;
        }
        self.lock().is_ending = signal == Signal::SIGTERM;
        kill_group(command);
        if signal == Signal::SIGTERM && command.is_some() {
            // It still tells how the command ended.
            std::thread::sleep(Duration::from_millis(30));
        }
        if signal == Signal::SIGTERM || !self.lock().is_playing {
            process::exit(if signal == Signal::SIGTERM { 143 } else { 0 });
        }
        self.change(|state| {
            state.is_interrupted = true;
            state.is_signalled = true;
        });
    }

    pub(crate) fn is_interrupted_by_signal(&self) -> bool {
        self.lock().is_signalled
    }

    /// Waits for a turn; one of its own, at its time, comes like any other.
    pub(crate) fn next(&self) -> Order {
        let mut state = self.lock();
        loop {
            state.is_playing = false;
            state.is_interrupted = false;
            let now = Instant::now();
            let due = state.own_turn.take_if(|(at, _)| *at <= now);
            let own = |(_, script)| Instruction {
                message: None,
                script,
            };
            let next = due.map(own).or_else(|| state.turns.pop_front());
            if let Some(turn) = next {
                state.is_playing = true;
                return Order::Turn(turn);
            }
            if state.is_closed && state.own_turn.is_none() && !state.is_deaf {
                return Order::End;
            }
            let until = state.own_turn.as_ref().map(|(at, _)| *at);
            let wait = until.map_or(Duration::from_secs(3600), |at| {
                at.saturating_duration_since(now)
            });
            state = self
                .changed
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits so long, or until it is interrupted.
    pub(crate) fn wait(&self, time: Duration) -> Waited {
        let state = self.lock();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, time, |state| !state.is_interrupted)
            .unwrap_or_else(PoisonError::into_inner);
        if state.is_interrupted {
            Waited::Interrupted
        } else {
            Waited::Enough
        }
    }

    /// Waits for the answer to a request of ours; `None` if it is interrupted before.
    pub(crate) fn answer(&self, id: &str) -> Option<Value> {
        let mut state = self.lock();
        loop {
            if let Some(at) = state.answers.iter().position(|(other, _)| other == id) {
                return Some(state.answers.swap_remove(at).1);
            }
            if state.is_interrupted {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        self.lock().is_interrupted
    }

    /// The command that runs now, so that an interrupt finds it.
    pub(crate) fn runs(&self, group: Option<u32>) {
        let group = group.map(u32::cast_signed);
        let mut state = self.lock();
        state.command = group;
        if state.is_interrupted {
            kill_group(group);
        }
    }

    /// Is the process about to end?
    pub(crate) fn is_ending(&self) -> bool {
        self.lock().is_ending
    }

    pub(crate) fn be_stubborn(&self) {
        self.lock().is_stubborn = true;
    }

    pub(crate) fn be_immortal(&self) {
        let mut state = self.lock();
        state.is_stubborn = true;
        state.is_immortal = true;
    }

    pub(crate) fn be_deaf(&self) {
        self.lock().is_deaf = true;
    }

    pub(crate) fn start_by_itself(&self, after: Duration, turn: String) {
        self.change(|state| state.own_turn = Some((Instant::now() + after, turn)));
    }

    pub(crate) fn model(&self) -> String {
        self.lock().model.clone()
    }

    pub(crate) fn mode(&self) -> String {
        self.lock().mode.clone()
    }
}

fn kill_group(group: Option<i32>) {
    let Some(group) = group.map(Pid::from_raw) else {
        return;
    };
    if killpg(group, Signal::SIGKILL).is_err() {
        // It leads no session yet.
        kill(group, Signal::SIGKILL).ok();
    }
}

fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks
            .iter()
            .filter_map(|block| block["text"].as_str())
            .collect::<Vec<_>>()
            .join("\n"),
        _ => String::new(),
    }
}
