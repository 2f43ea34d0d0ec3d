//! The rehearsal: a stand-in for the Messages API, with no model behind it.
//!
//! It answers on loopback as the API would, streaming and tool calls included, so that the real
//! CLI makes real edits in a real site. Two brains share the server: a [`Script`]'s rules, which
//! can act out what an upstream does wrong too, and, for whatever no rule matches, about a dozen
//! plain instructions ([`EXAMPLES`]). Both read everything from the request; the only state is
//! how often a script's step was met, and a bounded record of requests for tests.
//!
//! Used by `greenroom dev` without a credential, by `serve --rehearsal`, and by tests. One task
//! serves, in the [`Tasks`] that it was started with.

mod brain;
mod conversation;
mod reply;
mod script;

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    response::{IntoResponse, Response},
    serve::ListenerExt,
};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::task::Tasks;

pub use brain::EXAMPLES;
pub use script::{Act, Rule, Script, Step, Tool};

use conversation::Conversation;
use reply::{Event, Reply, Stop, input_tokens, unique};

/// Why the rehearsal could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    #[error("failed to listen on loopback for the rehearsal")]
    Listen {
        #[source]
        source: io::Error,
    },
    #[error("failed to read the rehearsal script {}", path.display())]
    ReadScript {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the rehearsal script {} is not valid", path.display())]
    ParseScript {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// How a recorded request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The answer was sent whole (or cut on purpose).
    Answered,
    /// The client went away before that.
    Abandoned,
}

/// One request as it came in. Header names only: their values may be secret.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub at: Timestamp,
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: Vec<String>,
    /// The CLI's session, where it names one.
    pub session: Option<String>,
    /// The last thing that the person said, shortened.
    pub instruction: String,
    pub model: String,
    /// How many messages the conversation has by then.
    pub messages: usize,
    /// The names of the tools that were offered.
    pub tools: Vec<String>,
    /// SHA-256 of each image in it, in hex.
    pub images: Vec<String>,
    /// `None` while it is being answered.
    pub ended: Option<Ended>,
}

/// How many requests are kept; older ones are dropped.
const MAX_RECORDED: usize = 1000;
/// How much of an instruction a record keeps, in characters.
const MAX_INSTRUCTION: usize = 2000;
/// The largest request body.
const MAX_BODY: usize = 64 << 20;
const PING_EVERY: Duration = Duration::from_secs(1);
const MODELS: [&str; 3] = ["claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"];

/// A running rehearsal. Cheap to clone; ends with the [`Tasks`] that it was started with.
#[derive(Debug, Clone)]
pub struct Rehearsal {
    port: u16,
    stage: Arc<Stage>,
}

impl Rehearsal {
    /// Listens on a free loopback port.
    ///
    /// # Errors
    /// [`RehearsalError::Listen`].
    pub async fn start(script: Script, tasks: &Tasks) -> Result<Self, RehearsalError> {
        let listen = |source| RehearsalError::Listen { source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(listen)?;
        let port = listener.local_addr().map_err(listen)?.port();
        let stop = tasks.token().clone();
        let stage = Arc::new(Stage {
            script,
            stop: stop.clone(),
            memory: Mutex::default(),
        });
        let app = Router::new().fallback(answer).with_state(stage.clone());
        let listener = listener.tap_io(|stream| {
            stream.set_nodelay(true).ok();
        });
        tasks.spawn("rehearsal", async move {
            let serve = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = serve.await {
                tracing::error!(%error, "the rehearsal stopped serving");
            }
        });
        Ok(Self { port, stage })
    }

    /// The base address, as an upstream of the gateway.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What was asked so far, oldest first, at most the last thousand requests.
    pub fn requests(&self) -> Vec<Recorded> {
        self.stage
            .memory()
            .recorded
            .iter()
            .map(|(_, record)| record.clone())
            .collect()
    }
}

/// What every request shares.
#[derive(Debug)]
struct Stage {
    script: Script,
    stop: CancellationToken,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Numbered, so that a request finds its own record again.
    recorded: VecDeque<(u64, Recorded)>,
    next: u64,
    /// How often a step of a rule was met.
    met: HashMap<(usize, usize), u64>,
}

impl Stage {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts that a rule's step was met, this time included.
    fn meet(&self, rule: usize, step: usize) -> u64 {
        let mut memory = self.memory();
        let count = memory.met.entry((rule, step)).or_default();
        *count += 1;
        *count
    }

    fn record(self: &Arc<Self>, record: Recorded) -> Attendance {
        let mut memory = self.memory();
        let number = memory.next;
        memory.next += 1;
        if memory.recorded.len() == MAX_RECORDED {
            memory.recorded.pop_front();
        }
        memory.recorded.push_back((number, record));
        Attendance {
            stage: self.clone(),
            number,
            ended: Ended::Abandoned,
        }
    }
}

/// Lives as long as a request is being answered, and records how that ended.
struct Attendance {
    stage: Arc<Stage>,
    number: u64,
    ended: Ended,
}

impl Attendance {
    fn answered(&mut self) {
        self.ended = Ended::Answered;
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        let mut memory = self.stage.memory();
        if let Some((_, record)) = memory
            .recorded
            .iter_mut()
            .find(|(number, _)| *number == self.number)
        {
            record.ended = Some(self.ended);
        }
    }
}

async fn answer(State(stage): State<Arc<Stage>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, MAX_BODY).await;
    let parsed: Value = body
        .as_ref()
        .ok()
        .and_then(|b| serde_json::from_slice(b).ok())
        .unwrap_or_default();
    let conversation = Conversation::read(&parsed);
    let mut attendance = stage.record(Recorded {
        at: Timestamp::now(),
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: head.headers.keys().map(ToString::to_string).collect(),
        session: text_of(&head.headers, "x-claude-code-session-id").map(ToOwned::to_owned),
        instruction: conversation
            .instruction()
            .chars()
            .take(MAX_INSTRUCTION)
            .collect(),
        model: parsed["model"].as_str().unwrap_or_default().to_owned(),
        images: conversation.images.clone(),
        messages: parsed["messages"].as_array().map_or(0, Vec::len),
        tools: parsed["tools"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|tool| tool["name"].as_str().map(ToOwned::to_owned))
            .collect(),
        ended: None,
    });

    let path = head.uri.path();
    let mut response = if head.method != Method::GET && body.is_err() {
        failure(StatusCode::PAYLOAD_TOO_LARGE, "the request is too large")
    } else if !is_known(&head.headers, &stage.script) {
        failure(StatusCode::UNAUTHORIZED, "invalid x-api-key")
    } else {
        match (&head.method, path) {
            (&Method::POST, "/v1/messages") if !parsed["messages"].is_array() => {
                failure(StatusCode::BAD_REQUEST, "messages: Field required")
            }
            (&Method::POST, "/v1/messages") => {
                return perform(&stage, &conversation, attendance).await;
            }
            (&Method::POST, "/v1/messages/count_tokens") => json(
                StatusCode::OK,
                &json!({"input_tokens": input_tokens(&conversation)}),
            ),
            (&Method::GET, "/v1/models") => models(),
            (&Method::GET, path) if path.starts_with("/v1/models/") => {
                let id = path.trim_start_matches("/v1/models/");
                if MODELS.contains(&id) {
                    json(StatusCode::OK, &model(id))
                } else {
                    failure(StatusCode::NOT_FOUND, &format!("model: {id}"))
                }
            }
            _ => failure(StatusCode::NOT_FOUND, "Not found"),
        }
    };
    attendance.answered();
    with_request_id(&mut response);
    response
}

/// The model's part: by the script where a rule matches, else by the plain brain.
async fn perform(
    stage: &Arc<Stage>,
    conversation: &Conversation,
    mut attendance: Attendance,
) -> Response {
    let mut pause = Duration::from_millis(stage.script.chunk_delay_ms);
    let mut act = None;
    let mut reply = match stage.script.rule_for(conversation.instruction()) {
        None => brain::decide(conversation),
        Some(rule) => match stage.script.rules[rule].steps.get(conversation.answers) {
            None => Reply::text("Done."),
            Some(step) => {
                let met = stage.meet(rule, conversation.answers);
                act = step
                    .act
                    .as_ref()
                    .filter(|_| step.times.is_none_or(|times| met <= times));
                if let Some(delay) = step.chunk_delay_ms {
                    pause = Duration::from_millis(delay);
                }
                let delay = Duration::from_millis(step.delay_ms);
                if !wait(&stage.stop, delay).await {
                    return failure(StatusCode::SERVICE_UNAVAILABLE, "the rehearsal is over");
                }
                let calls = step.calls(conversation.cwd.as_deref().unwrap_or_default());
                let text = match &step.text {
                    None if calls.is_empty() => "Done.".to_owned(),
                    text => text.clone().unwrap_or_default(),
                };
                Reply {
                    text,
                    calls,
                    ..Reply::default()
                }
            }
        },
    };

    match act {
        Some(Act::Empty) => reply = Reply::default(),
        Some(Act::MaxTokens) => reply.stop = Stop::MaxTokens,
        Some(Act::Refusal) => reply.stop = Stop::Refusal,
        Some(Act::NoBytes) => {
            stage.stop.cancelled().await;
            return failure(StatusCode::SERVICE_UNAVAILABLE, "the rehearsal is over");
        }
        _ => {}
    }
    if let Some(response) = act.and_then(instead) {
        attendance.answered();
        return response;
    }
    if !conversation.stream {
        attendance.answered();
        let mut response = json(StatusCode::OK, &reply.message(conversation));
        with_request_id(&mut response);
        return response;
    }
    let mut events = reply.events(conversation, pause);
    let ending = act.map_or(Ending::Whole, |act| spoil(&mut events, act));
    stream_of(events, ending, stage.stop.clone(), attendance)
}

/// What comes after the last event.
#[derive(Clone, Copy)]
enum Ending {
    Whole,
    Pings,
    Silence,
    Cut,
}

/// What is answered in place of a message.
fn instead(act: &Act) -> Option<Response> {
    match act {
        Act::Status {
            status,
            retry_after,
            body,
        } => Some(status_act(*status, *retry_after, body.as_deref())),
        Act::Redirect { location } => {
            let location =
                HeaderValue::from_str(location).unwrap_or_else(|_| HeaderValue::from_static("/"));
            let head = (
                StatusCode::TEMPORARY_REDIRECT,
                [(header::LOCATION, location)],
            );
            Some(head.into_response())
        }
        Act::Html => {
            let page = "<!doctype html><html><body><h1>Please log in</h1></body></html>";
            Some(axum::response::Html(page).into_response())
        }
        _ => None,
    }
}

/// Makes a good stream go wrong.
fn spoil(events: &mut Vec<Event>, act: &Act) -> Ending {
    // The first half, with the beginning of a block at least.
    let half = (events.len() / 2).max(4);
    match act {
        Act::OnlyPings => {
            events.truncate(2);
            return Ending::Pings;
        }
        Act::StallMidway => {
            events.truncate(half);
            return Ending::Silence;
        }
        Act::Cut => {
            events.truncate(half);
            return Ending::Cut;
        }
        Act::BrokenSse => {
            events.truncate(half);
            events.push(Event::new(Value::String(
                "{\"type\":\"content_bl".to_owned(),
            )));
        }
        Act::ErrorEvent { kind } => {
            events.truncate(half);
            let error = json!({"type": kind, "message": "acted out by the rehearsal"});
            events.push(Event::new(json!({"type": "error", "error": error})));
        }
        _ => {}
    }
    Ending::Whole
}

fn stream_of(
    events: Vec<Event>,
    ending: Ending,
    stop: CancellationToken,
    attendance: Attendance,
) -> Response {
    let state = (events.into_iter(), attendance, stop);
    let body = stream::unfold(
        state,
        move |(mut events, mut attendance, stop)| async move {
            let piece = match (events.next(), ending) {
                (Some(event), _) => wait(&stop, event.after).await.then(|| Ok(wire(&event)))?,
                (None, Ending::Whole) => {
                    attendance.answered();
                    return None;
                }
                (None, Ending::Pings) => wait(&stop, PING_EVERY)
                    .await
                    .then(|| Ok(wire(&Event::ping())))?,
                (None, Ending::Silence) => {
                    stop.cancelled().await;
                    return None;
                }
                (None, Ending::Cut) => {
                    attendance.answered();
                    // Once more, or the error would overtake what was said before it.
                    tokio::task::yield_now().await;
                    Err(io::Error::other("cut on purpose"))
                }
            };
            Some((piece, (events, attendance, stop)))
        },
    );
    let mut response = Response::new(Body::from_stream(body.boxed()));
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    with_request_id(&mut response);
    response
}

fn wire(event: &Event) -> Bytes {
    match &event.data {
        // An event that is no JSON, acted out.
        Value::String(raw) => format!("event: content_block_delta\ndata: {raw}\n\n").into(),
        _ => event.to_wire().into(),
    }
}

/// Waits; false once the rehearsal is being stopped.
async fn wait(stop: &CancellationToken, time: Duration) -> bool {
    if time.is_zero() {
        return !stop.is_cancelled();
    }
    tokio::select! {
        () = stop.cancelled() => false,
        () = tokio::time::sleep(time) => true,
    }
}

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether a key or token was sent, and none of the script's wrong ones.
fn is_known(headers: &HeaderMap, script: &Script) -> bool {
    let bearer = text_of(headers, "authorization").and_then(|text| text.strip_prefix("Bearer "));
    let key = text_of(headers, "x-api-key").or(bearer);
    key.is_some_and(|key| !key.is_empty() && !script.wrong_keys.iter().any(|wrong| wrong == key))
}

fn models() -> Response {
    let data: Vec<Value> = MODELS.iter().map(|id| model(id)).collect();
    let list = json!({
        "data": data, "has_more": false, "first_id": MODELS[0], "last_id": MODELS[MODELS.len() - 1],
    });
    json(StatusCode::OK, &list)
}

fn model(id: &str) -> Value {
    json!({
        "type": "model", "id": id,
        "display_name": format!("{id} (rehearsal, no model behind it)"),
        "created_at": "2026-01-01T00:00:00Z",
    })
}

fn status_act(status: u16, retry_after: Option<u64>, body: Option<&str>) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = failure(status, "acted out by the rehearsal");
    if let Some(body) = body {
        *response.body_mut() = Body::from(body.to_owned());
    }
    if let Some(seconds) = retry_after {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, seconds.into());
    }
    with_request_id(&mut response);
    response
}

/// An error in the API's shape.
fn failure(status: StatusCode, message: &str) -> Response {
    let kind = match status.as_u16() {
        400 => "invalid_request_error",
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        529 => "overloaded_error",
        _ => "api_error",
    };
    json(
        status,
        &json!({"type": "error", "error": {"type": kind, "message": message}}),
    )
}

fn json(status: StatusCode, value: &Value) -> Response {
    (
        status,
        [(header::CONTENT_TYPE, "application/json")],
        value.to_string(),
    )
        .into_response()
}

fn with_request_id(response: &mut Response) {
    let id = HeaderValue::from_str(&format!("req_{}", unique())).expect("hex digits are fine");
    response.headers_mut().insert("request-id", id);
}

#[cfg(test)]
mod tests;
