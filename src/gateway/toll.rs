//! What one model request is charged: reserved before its last piece goes up, settled by what its
//! answer tells.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{HeaderMap, StatusCode, header};
use tokio::sync::oneshot;

use super::{
    count::Counter,
    json::Picker,
    run::{Gate, Passing},
};
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
    /// By its run's gate.
    TurnedAway(&'static str),
}

/// What a request asks for, read while it passes.
#[derive(Debug)]
pub(super) struct Request {
    picker: Picker,
    bytes: u64,
    /// `None`: nobody wants to know.
    images: Option<Images>,
}

/// Counts the image blocks of a request. Text cannot look like one: a quote in it is escaped.
#[derive(Debug, Default)]
struct Images {
    count: u64,
    /// How much of the mark was read.
    matched: usize,
}

impl Images {
    /// As the CLI writes it, without spaces.
    const MARK: &[u8] = br#""type":"image""#;

    fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.matched = match *byte {
                byte if byte == Self::MARK[self.matched] => self.matched + 1,
                b'"' => 1,
                _ => 0,
            };
            if self.matched == Self::MARK.len() {
                self.count += 1;
                self.matched = 0;
            }
        }
    }
}

impl Default for Request {
    fn default() -> Self {
        Self {
            picker: Picker::new(&["model", "max_tokens"]),
            bytes: 0,
            images: None,
        }
    }
}

impl Request {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.picker.feed(bytes);
        if let Some(images) = &mut self.images {
            images.feed(bytes);
        }
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
    gate: Option<Gate>,
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
    pub(super) fn new(meter: Meter, gate: Option<Gate>) -> Arc<Self> {
        Arc::new(Self {
            meter,
            gate,
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What reads the request on its way.
    pub(super) fn request(&self) -> Request {
        Request {
            images: self.gate.is_some().then(Images::default),
            ..Request::default()
        }
    }

    /// Reserves the most that the request may cost, and asks the run's gate.
    pub(super) async fn pay(&self, request: &Request) -> Result<(), Stopped> {
        let passing = Passing {
            images: request.images.as_ref().map_or(0, |images| images.count),
            answered: self.meter.spent().requests,
        };
        let mut ask = request.ask();
        if let Some(gate) = &self.gate {
            ask.prompt = ask.prompt.min(gate.most_prompt);
        }
        let reserved = self.meter.reserve(ask).await;
        let reservation = reserved.map_err(Stopped::Denied)?;
        if let Some(gate) = &self.gate {
            // Where it says no, the reservation is dropped with this and given back.
            gate.ask(passing).await.map_err(Stopped::TurnedAway)?;
        }
        let mut state = self.lock();
        state.sent = request.bytes;
        if state.is_over {
            // The client is gone: the last piece does not go up.
            drop(state);
            drop(reservation);
            let gone = std::io::Error::other("the client is gone");
            return Err(Stopped::Denied(Denied::Ledger(gone)));
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

    /// Takes in a piece of the answer; whether it is whole with that.
    pub(super) async fn chunk(&self, chunk: &[u8]) -> bool {
        let written = {
            let mut state = self.lock();
            let Some(counter) = &mut state.counter else {
                return false;
            };
            counter.feed(chunk);
            if !counter.seen().is_complete {
                return false;
            }
            state.settle(true)
        };
        wait(written).await;
        true
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
    fn images_are_counted_wherever_the_pieces_are_cut() {
        let body = br#"{"messages":[{"content":[{"type":"image","source":{"type":"base64"}},
            {"type":"text","text":"an \"type\":\"image\" in \"type\":"},{"type":"image"}]}]}"#;
        for size in [1, 3, 7, body.len()] {
            let mut images = Images::default();
            body.chunks(size).for_each(|piece| images.feed(piece));
            assert_eq!(images.count, 2, "pieces of {size}");
        }
    }

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
