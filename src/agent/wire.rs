//! The pipes to the CLI: what it prints is read all the time and bounded, what it is told is
//! written with a limit. Two tasks read; they end with the pipes.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    net::unix::pipe::Sender,
    sync::mpsc,
    time::timeout,
};

use super::protocol::{self, Line};
use crate::{process::ProcessHandle, task::Tasks};

/// Longest output line that is read; a longer one is passed over.
const MAX_LINE: usize = 16 << 20;
/// Lines that wait for us; more and the CLI waits for its pipe.
const LINES: usize = 256;
/// What is kept of the standard error, from its end.
const STDERR_TAIL: usize = 8 << 10;

/// The CLI does not read what it is told, or is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deaf;

/// The way to the CLI and back.
#[derive(Debug)]
pub(super) struct Wire {
    stdin: Sender,
    pub(super) lines: mpsc::Receiver<Line>,
    next_request: u64,
}

impl Wire {
    /// Writes one message. Not cancel safe: half a line may have been written.
    pub(super) async fn write(&mut self, message: &Value, limit: Duration) -> Result<(), Deaf> {
        let mut line = message.to_string();
        line.push('\n');
        let write = async {
            self.stdin.write_all(line.as_bytes()).await?;
            self.stdin.flush().await
        };
        match timeout(limit, write).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Deaf),
        }
    }

    /// A name for the next request of ours.
    pub(super) fn request_id(&mut self) -> String {
        self.next_request += 1;
        format!("greenroom-{}", self.next_request)
    }

    /// Asks the CLI to stop what it does.
    pub(super) async fn interrupt(&mut self, limit: Duration) -> Result<(), Deaf> {
        let id = self.request_id();
        self.write(&protocol::interrupt(&id), limit).await
    }
}

/// The end of what the CLI printed on its standard error.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    pub(super) fn text(&self) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&tail).trim().to_owned()
    }

    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(bytes);
        let surplus = tail.len().saturating_sub(STDERR_TAIL);
        tail.drain(..surplus);
    }
}

/// Takes a child's streams over.
pub(super) fn connect(child: crate::process::Child, tasks: &Tasks) -> (Wire, Tail, ProcessHandle) {
    let process = child.handle();
    let (sender, lines) = mpsc::channel(LINES);
    let tail = Tail::default();
    tasks.spawn("agent output", read_lines(child.stdout, sender));
    tasks.spawn("agent errors", keep_tail(child.stderr, tail.clone()));
    let wire = Wire {
        stdin: child.stdin.expect("the spec asks for a pipe"),
        lines,
        next_request: 0,
    };
    (wire, tail, process)
}

async fn read_lines(stdout: impl AsyncRead + Unpin, lines: mpsc::Sender<Line>) {
    let mut reader = BufReader::with_capacity(64 << 10, stdout);
    let mut line = Vec::new();
    let mut is_too_long = false;
    loop {
        let (used, is_whole) = match reader.fill_buf().await {
            Ok(buffer) if !buffer.is_empty() => {
                let end = buffer.iter().position(|byte| *byte == b'\n');
                let part = &buffer[..end.unwrap_or(buffer.len())];
                is_too_long |= line.len() + part.len() > MAX_LINE;
                if is_too_long {
                    line = Vec::new();
                } else {
                    line.extend_from_slice(part);
                }
                (part.len() + usize::from(end.is_some()), end.is_some())
            }
            _ => return,
        };
        reader.consume(used);
        if !is_whole {
            continue;
        }
        let parsed = if is_too_long {
            tracing::warn!(
                limit = MAX_LINE,
                "the agent printed a line that is too long; it is passed over"
            );
            Line::Garbled
        } else if line.iter().all(u8::is_ascii_whitespace) {
            Line::Other
        } else {
            protocol::parse(&line).unwrap_or_else(|| {
                tracing::warn!(
                    bytes = line.len(),
                    "the agent printed a line that is no JSON; it is passed over"
                );
                Line::Garbled
            })
        };
        // Also one that tells nothing is a sign of life.
        if lines.send(parsed).await.is_err() {
            return;
        }
        is_too_long = false;
        line.clear();
        line.shrink_to(1 << 20);
    }
}

async fn keep_tail(stderr: impl AsyncRead + Unpin, tail: Tail) {
    let mut reader = BufReader::new(stderr);
    while let Ok(buffer) = reader.fill_buf().await {
        if buffer.is_empty() {
            return;
        }
        let used = buffer.len();
        tail.push(buffer);
        reader.consume(used);
    }
}
