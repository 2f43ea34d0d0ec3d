//! What one model request is charged: reserved before its last piece goes up, settled by what its
//! answer tells.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{HeaderMap, StatusCode, header};
use tokio::sync::oneshot;

use super::{count::Counter, json::Picker};
use crate::usage::{Ask, Denied, Meter, Outcome, Reservation, Verdict};

/// A prompt has no more tokens than bytes by this; text has four or more, scripts like Chinese
/// about three.
const LEAST_BYTES_PER_TOKEN: u64 = 3;
/// The largest context of any model, in tokens. Images have many bytes and few tokens.
const MAX_PROMPT: u64 = 1_000_000;
/// The longest answer of any model, in tokens.
const MAX_ANSWER: u64 = 128_000;
/// Longest name of a model or id of an answer that is kept, in bytes.
const MAX_NAME: usize = 200;
/// The ledger has limits of its own; this is for the worst.
const SETTLE_PATIENCE: Duration = Duration::from_secs(11);

/// Why an upload was stopped.
#[derive(Debug)]
pub(super) enum Stopped {
    TooLarge,
    Denied(Denied),
}

/// What a request asks for, read while it passes.
#[derive(Debug)]
pub(super) struct Request {
    picker: Picker,
    bytes: u64,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            picker: Picker::new(&["model", "max_tokens"]),
            bytes: 0,
        }
    }
}

impl Request {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.picker.feed(bytes);
    }

    fn ask(&self) -> Ask {
        let model = self.picker.get("model");
        let answer = self.picker.get("max_tokens");
        Ask {
            model: model
                .and_then(|json| serde_json::from_slice::<String>(json).ok())
                .map(|model| short(&model).to_owned())
                .unwrap_or_default(),
            prompt: self.bytes.div_ceil(LEAST_BYTES_PER_TOKEN).min(MAX_PROMPT),
            answer: answer
                .and_then(|json| serde_json::from_slice::<u64>(json).ok())
                .map_or(MAX_ANSWER, |tokens| tokens.min(MAX_ANSWER)),
        }
    }
}

/// A name as it may stand in the ledger: whoever asks chooses it.
fn short(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME)]
}

/// One request's way through the ledger. Shared by its upload and its [exchange].
///
/// [exchange]: super::run::Exchange
#[derive(Debug)]
pub(super) struct Toll {
    meter: Meter,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    reservation: Option<Reservation>,
    counter: Option<Counter>,
    /// Bytes of the request.
    sent: u64,
    /// Nobody pays any more: the exchange is over.
    is_over: bool,
}

impl Toll {
    pub(super) fn new(meter: Meter) -> Arc<Self> {
        Arc::new(Self {
            meter,
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the most that the request may cost.
    pub(super) async fn pay(&self, request: &Request) -> Result<(), Denied> {
        let reservation = self.meter.reserve(request.ask()).await?;
        let mut state = self.lock();
        state.sent = request.bytes;
        if state.is_over {
            // The client is gone: the last piece does not go up.
            drop(state);
            drop(reservation);
            return Err(Denied::Ledger(std::io::Error::other("the client is gone")));
        }
        state.reservation = Some(reservation);
        Ok(())
    }

    /// It never reached the upstream.
    pub(super) fn give_back(&self) {
        let reservation = self.lock().reservation.take();
        // Dropped, it is given back.
        drop(reservation);
    }

    /// The answer begins.
    pub(super) async fn answered(&self, status: StatusCode, headers: &HeaderMap) {
        if !status.is_success() {
            let reservation = self.lock().reservation.take();
            if let Some(reservation) = reservation {
                drop(reservation.settle(Outcome::refused()));
            }
            return;
        }
        let mut reservation = self.lock().reservation.take();
        if let Some(reservation) = &mut reservation {
            reservation.on_disk().await;
        }
        let mut state = self.lock();
        state.reservation = reservation;
        if is_coded(headers) {
            tracing::warn!(
                "the upstream compresses its answers although it is asked not to: they cannot be \
                 counted and are charged at the most they may cost"
            );
        } else {
            state.counter = Some(Counter::new(status, headers));
        }
    }

    pub(super) async fn chunk(&self, chunk: &[u8]) {
        let written = {
            let mut state = self.lock();
            let Some(counter) = &mut state.counter else {
                return;
            };
            counter.feed(chunk);
            if !counter.seen().is_complete {
                return;
            }
            state.settle(true)
        };
        wait(written).await;
    }

    pub(super) async fn complete(&self) {
        let written = self.lock().settle(true);
        wait(written).await;
    }

    /// The exchange is over, whether or not the answer was.
    pub(super) fn cut(&self) {
        let mut state = self.lock();
        state.is_over = true;
        drop(state.settle(false));
    }
}

/// Until the line is written, so that whoever has the answer finds it counted.
async fn wait(written: Option<oneshot::Receiver<()>>) {
    if let Some(written) = written {
        tokio::time::timeout(SETTLE_PATIENCE, written).await.ok();
    }
}

impl State {
    /// Settles the reservation by what was seen; `None`: there is none, or it is settled.
    fn settle(&mut self, has_ended: bool) -> Option<oneshot::Receiver<()>> {
        let reservation = self.reservation.take()?;
        let Some(counter) = &self.counter else {
            // It went up and nothing is known of its answer, or nothing can be read of it.
            let (tokens, _) = super::count::Seen::default().tokens(self.sent);
            let outcome = Outcome {
                verdict: Verdict::Aborted,
                model: None,
                message: None,
                tokens: if has_ended {
                    reservation.worst()
                } else {
                    tokens
                },
                is_estimated: true,
            };
            return Some(reservation.settle(outcome));
        };
        if counter.is_opaque() {
            // A page from somebody in between.
            return Some(reservation.settle(Outcome::refused()));
        }
        let seen = counter.seen();
        let (tokens, is_estimated) = seen.tokens(self.sent);
        let verdict = match (seen.is_complete, seen.has_begun() || !has_ended) {
            (true, _) => Verdict::Settled,
            (false, true) => Verdict::Aborted,
            (false, false) => return Some(reservation.settle(Outcome::refused())),
        };
        Some(reservation.settle(Outcome {
            verdict,
            model: seen.model.as_deref().map(|name| short(name).to_owned()),
            message: seen.message.as_deref().map(|id| short(id).to_owned()),
            tokens,
            is_estimated,
        }))
    }
}

fn is_coded(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_asks_for_its_worst() {
        let ask = |body: &str| {
            let mut request = Request::default();
            request.feed(body.as_bytes());
            request.ask()
        };
        let body = r#"{"model":"claude-opus-5","messages":[],"max_tokens":1000}"#;
        let expected = Ask {
            model: "claude-opus-5".into(),
            prompt: (body.len() as u64).div_ceil(3),
            answer: 1000,
        };
        assert_eq!(ask(body), expected);
        for odd in [
            "",
            "{}",
            r#"{"model":7,"max_tokens":"x"}"#,
            r#"{"max_tokens":1e99}"#,
        ] {
            let ask = ask(odd);
            assert_eq!((ask.model.as_str(), ask.answer), ("", MAX_ANSWER), "{odd}");
        }
    }
}
