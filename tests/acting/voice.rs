//! What it says: stream-json events as 2.1.329 prints them, as far as anybody reads them.

use std::{
    io::{Write, stdout},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};

/// Standard output, a whole line at a time.
pub(crate) struct Voice {
    session: String,
    lines: AtomicU64,
    turn: Mutex<()>,
}

/// Tokens of one answer.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tokens {
    pub(crate) input: u64,
    pub(crate) output: u64,
    pub(crate) read: u64,
    pub(crate) created: u64,
}

impl Tokens {
    /// Of every answer.
    pub(crate) const ANSWER: Self = Self {
        input: 10,
        output: 20,
        read: 300,
        created: 4,
    };
    /// What they cost, in dollars.
    pub(crate) const PRICE: f64 = 0.001;

    pub(crate) fn add(&mut self, other: Self) {
        self.input += other.input;
        self.output += other.output;
        self.read += other.read;
        self.created += other.created;
    }

    pub(crate) fn json(self) -> Value {
        json!({"input_tokens": self.input, "output_tokens": self.output,
            "cache_read_input_tokens": self.read, "cache_creation_input_tokens": self.created})
    }
}

impl Voice {
    pub(crate) fn new(session: &str) -> Self {
        Self {
            session: session.to_owned(),
            lines: AtomicU64::new(0),
            turn: Mutex::new(()),
        }
    }

    pub(crate) fn session(&self) -> &str {
        &self.session
    }

    /// Prints an event, with the session and an id of its own.
    pub(crate) fn say(&self, mut event: Value) {
        let number = self.lines.fetch_add(1, Ordering::Relaxed);
        if event["type"] != "control_response" && event["type"] != "control_request" {
            event["session_id"] = json!(self.session);
            event["uuid"] = json!(format!("00000000-0000-4000-8000-{number:012x}"));
        }
        self.print(format!("{event}\n").as_bytes());
    }

    /// Prints bytes as they are.
    pub(crate) fn print(&self, bytes: &[u8]) {
        let guard = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = stdout().lock();
        // Whoever reads may be gone; the input's end says so too.
        out.write_all(bytes).and_then(|()| out.flush()).ok();
        drop(guard);
    }

    /// How a message of the caller's stands.
    pub(crate) fn lifecycle(&self, message: &str, state: &str) {
        self.say(json!({"type": "command_lifecycle", "command_uuid": message, "state": state}));
    }

    /// One of the API's own events.
    pub(crate) fn stream(&self, event: Value) {
        self.say(json!({"type": "stream_event", "event": event, "parent_tool_use_id": null}));
    }
}

/// The result of a conversation that isn't there.
pub(crate) fn lost(asked_for: &str, problem: &str) -> Value {
    json!({"type": "result", "subtype": "error_during_execution", "duration_ms": 0,
        "duration_api_ms": 0, "is_error": true, "num_turns": 0, "stop_reason": null,
        "session_id": asked_for, "total_cost_usd": 0, "usage": Tokens::default().json(),
        "modelUsage": {}, "permission_denials": [], "errors": [problem], "result_index": 0})
}
