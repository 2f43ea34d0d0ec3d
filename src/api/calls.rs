//! Calls that work for a while before their turn exists: `…/images` and `…/alt-text`. Both behave alike.
//!
//! Each runs in a task of its own and has an id, from its stream or from its thread, by which anybody
//! may cancel it. A caller who goes away cancels it too, unless it has an `Idempotency-Key`: whoever
//! gives one means to come back. They are forgotten with this process; what they paid for is not.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::{
    ApiError, Shared,
    body::{check_pins, success},
    error::{Asking, REQUEST},
    params::Path,
    sse::COMMENT_EVERY,
    threads::accepts,
    turns,
};
use crate::{
    domain::CommitSummary,
    identity::{ThreadKey, TurnId},
    lifecycle::{Activity, HolderKind},
    supervisor::SupervisorError,
    task::Tasks,
};

/// News that waits for a slow reader; the newest is enough.
const MAX_NEWS: usize = 64;
/// Calls that are over and whose end is still known.
const MAX_ENDED: usize = 256;

/// Of a call that this process does not know.
const OVER: &str = "no such call is under way: it is over, or ended with the program that ran it; what came of it is in \
                    the thread's history";

/// What a call is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CallKind {
    Images,
    AltText,
}

impl CallKind {
    /// What its events' names begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::AltText => "alt_text",
        }
    }
}

/// How a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum CallStatus {
    Running,
    Completed,
    Failed,
    Cancelled,
}

/// A call, as it is shown.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CallView {
    call_id: String,
    kind: CallKind,
    status: CallStatus,
    #[schema(value_type = String)]
    since: Timestamp,
    /// The agent's turn that it has become; null: none so far.
    #[schema(value_type = Option<String>)]
    turn_id: Option<TurnId>,
}

/// The `result` of a call that was cancelled in time.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CancelledView {
    call_id: String,
    /// Always `cancelled`.
    status: CallStatus,
    /// Always null.
    #[schema(value_type = Option<String>)]
    turn_id: Option<TurnId>,
    /// Always null.
    commit: Option<CommitSummary>,
    text: &'static str,
}

/// How a call ended well.
pub(super) enum Ended {
    /// With this `result`.
    Done(Value),
    /// Its agent's turn runs, and is not waited for.
    Accepted(TurnId),
    /// By its token: nothing of the site has changed.
    Cancelled,
}

/// What a call is to be.
pub(super) struct NewCall {
    pub(super) kind: CallKind,
    pub(super) key: ThreadKey,
    /// Its caller means to come back.
    pub(super) is_kept: bool,
}

/// The calls under way. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Calls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tasks: Tasks,
    activity: Activity,
    /// Cancelled when a shutdown begins.
    draining: CancellationToken,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    calls: HashMap<String, Call>,
    /// Those that are over, oldest first.
    ended: VecDeque<String>,
}

#[derive(Debug, Clone)]
struct Call {
    key: ThreadKey,
    view: watch::Receiver<CallView>,
    stop: CancellationToken,
}

/// A call from inside: what stops it, and who hears of it.
#[derive(Debug)]
pub(super) struct Running {
    stop: CancellationToken,
    prefix: &'static str,
    view: watch::Sender<CallView>,
    news: mpsc::Sender<Event>,
}

impl Running {
    pub(super) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Tells of it, as `{prefix}.{name}`.
    pub(super) fn tell(&self, name: &str, data: &Value) {
        self.tell_as(&format!("{}.{name}", self.prefix), data);
    }

    /// The same by another name. Who reads slowly hears of the next one.
    pub(super) fn tell_as(&self, name: &str, data: &Value) {
        self.news.try_send(event(name, data)).ok();
    }

    /// It has become an agent's turn: whoever cancels it from now on cancels that.
    pub(super) fn became(&self, turn: &TurnId) {
        self.view
            .send_modify(|view| view.turn_id = Some(turn.clone()));
        self.tell("turn", &json!({"turnId": turn}));
    }
}

/// Cancels a call when its caller goes away.
struct Caller(Option<CancellationToken>);

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(stop) = &self.0 {
            stop.cancel();
        }
    }
}

fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}

impl Calls {
    /// None so far.
    pub fn new(tasks: &Tasks, activity: &Activity, draining: CancellationToken) -> Self {
        Self(Arc::new(Inner {
            tasks: tasks.clone(),
            activity: activity.clone(),
            draining,
            known: Mutex::default(),
        }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of a thread that are under way.
    pub(super) fn of(&self, key: &ThreadKey) -> Vec<CallView> {
        let known = self.known();
        let of_it = known.calls.values().filter(|call| call.key == *key);
        let views = of_it.map(|call| call.view.borrow().clone());
        let mut views: Vec<CallView> = views
            .filter(|view| view.status == CallStatus::Running)
            .collect();
        views.sort_by(|a, b| a.call_id.cmp(&b.call_id));
        views
    }

    /// Runs a call and answers with its end, or with its events where they are asked for.
    pub(super) async fn run<W, F>(
        &self,
        call: NewCall,
        headers: &HeaderMap,
        work: W,
    ) -> Result<Response, ApiError>
    where
        W: FnOnce(Running) -> F + Send + 'static,
        F: Future<Output = Result<Ended, ApiError>> + Send + 'static,
    {
        let id = uuid::Uuid::now_v7().simple().to_string();
        let stop = self.0.draining.child_token();
        let caller = Caller((!call.is_kept).then(|| stop.clone()));
        let (sender, view) = watch::channel(CallView {
            call_id: id.clone(),
            kind: call.kind,
            status: CallStatus::Running,
            since: Timestamp::now(),
            turn_id: None,
        });
        let entry = Call {
            key: call.key.clone(),
            view,
            stop: stop.clone(),
        };
        self.known().calls.insert(id.clone(), entry);
        let (news, heard) = mpsc::channel(MAX_NEWS);
        let running = Running {
            stop,
            prefix: call.kind.prefix(),
            view: sender.clone(),
            news,
        };
        running.tell("started", &json!({"callId": id}));
        let prefix = running.prefix;
        let awake = self
            .0
            .activity
            .hold(HolderKind::Request, format!("{prefix} for {}", call.key));
        let (answer, answered) = oneshot::channel();
        let (calls, ended_id) = (self.clone(), id.clone());
        let work = REQUEST.scope(Asking::now(), async move {
            let result = work(running).await;
            let status = match &result {
                Ok(Ended::Done(_) | Ended::Accepted(_)) => CallStatus::Completed,
                Ok(Ended::Cancelled) => CallStatus::Cancelled,
                Err(_) => CallStatus::Failed,
            };
            sender.send_modify(|view| view.status = status);
            calls.over(ended_id);
            // Where nobody listens any more it is done all the same.
            answer.send(result).ok();
            drop(awake);
        });
        self.0.tasks.spawn("a call", work);
        let ended = {
            let id = id.clone();
            async move {
                match answered.await {
                    Ok(ended) => ended.map(|ended| (id, ended)),
                    Err(_) => Err(SupervisorError::Draining.into()),
                }
            }
        };
        if accepts(headers, "text/event-stream") {
            return Ok(streamed(prefix, heard, ended, caller));
        }
        drop(heard);
        let ended = ended.await;
        drop(caller);
        let (id, ended) = ended?;
        Ok(match ended {
            Ended::Done(result) => success(result),
            Ended::Accepted(turn) => turns::accepted(&turn),
            Ended::Cancelled => success(cancelled(id)),
        })
    }

    fn over(&self, id: String) {
        let mut known = self.known();
        known.ended.push_back(id);
        if known.ended.len() > MAX_ENDED
            && let Some(oldest) = known.ended.pop_front()
        {
            known.calls.remove(&oldest);
        }
    }

    fn get(&self, id: &str) -> Option<Call> {
        self.known().calls.get(id).cloned()
    }
}

fn cancelled(call_id: String) -> CancelledView {
    CancelledView {
        call_id,
        status: CallStatus::Cancelled,
        turn_id: None,
        commit: None,
        text: "It was cancelled before anything of the site was changed.",
    }
}

fn streamed(
    prefix: &'static str,
    heard: mpsc::Receiver<Event>,
    ended: impl Future<Output = Result<(String, Ended), ApiError>> + Send + 'static,
    caller: Caller,
) -> Response {
    let end = REQUEST.scope(Asking::now(), async move {
        match ended.await {
            Ok((_, Ended::Done(result))) => {
                event(&format!("{prefix}.completed"), &json!({ "result": result }))
            }
            Ok((_, Ended::Accepted(turn))) => {
                event(&format!("{prefix}.completed"), &json!({ "turnId": turn }))
            }
            Ok((id, Ended::Cancelled)) => event(
                &format!("{prefix}.cancelled"),
                &json!({ "result": cancelled(id) }),
            ),
            Err(error) => event(&format!("{prefix}.failed"), &error.into_json()),
        }
    });
    let news = stream::unfold(heard, async |mut heard| Some((heard.recv().await?, heard)));
    // All that was told before the end goes out before it: the call's end closes its news.
    let events = news.chain(stream::once(end));
    let numbered = events.enumerate().map(move |(at, event)| {
        // It lives as long as somebody reads.
        let _caller = &caller;
        Ok::<_, Infallible>(event.id((at + 1).to_string()))
    });
    Sse::new(numbered)
        .keep_alive(KeepAlive::new().interval(COMMENT_EVERY))
        .into_response()
}

/// Stops a call of `…/images` or `…/alt-text`, and answers when it is over. Before its turn exists
/// nothing of the site has changed then, and what was being made is cancelled; afterwards its turn is
/// cancelled. Idempotent. Calls are known to the process that runs them, the last 256 also when they
/// are over.
#[utoipa::path(post, path = "/api/calls/{call}/cancel", params(("call" = String, Path)),
    responses((status = 200, description = "`{success, result}`: how it ended", body = CallView),
              (status = 403, description = "`not_this_tenant`"),
              (status = 404, description = "`not_found`: also after a restart; what was under way is in no history then, and has changed nothing")))]
pub(super) async fn cancel(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let call = state
        .calls
        .get(&id)
        .ok_or_else(|| ApiError::not_found(OVER))?;
    check_pins(&state.pins, &call.key.user_key())?;
    call.stop.cancel();
    let mut view = call.view.clone();
    let turn = view
        .wait_for(|view| view.turn_id.is_some() || view.status != CallStatus::Running)
        .await
        .ok()
        .and_then(|view| view.turn_id.clone());
    if let Some(turn) = turn {
        state.supervisor.cancel(&turn).await?;
    }
    let over = view
        .wait_for(|view| view.status != CallStatus::Running)
        .await;
    // Without a sender nobody works on it any more.
    let last = over.map(|view| view.clone());
    Ok(success(last.unwrap_or_else(|_| call.view.borrow().clone())))
}
