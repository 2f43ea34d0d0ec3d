//! `/health`, `/ready`, `/metrics`, `/api/idle`: what operators and platforms ask.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{ApiError, Base, params::Query};
use crate::{
    domain::{BreakerState, PreviewState},
    ecs::Ecs,
    lifecycle::{HolderKind, IdleAnswer, Memory},
    process::Confinement,
    task,
};

/// What does not change while the program runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `None` where the one-shot service runs alone.
    pub workspace: Option<PathBuf>,
    /// Answers come from the scripted stand-in, no model is behind them.
    pub is_rehearsal: bool,
    pub confinement: Confinement,
    /// `None` elsewhere.
    pub ecs: Option<Arc<Ecs>>,
}

/// What init and execute need. Filled in after the start, so that the start does not wait.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    /// The CLI's version, or what to do about it.
    pub claude: std::sync::Arc<OnceLock<Result<String, String>>>,
    /// Node's version, or what to do about it.
    pub node: std::sync::Arc<OnceLock<Result<String, String>>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct HealthQuery {
    deep: Option<String>,
}

/// Is the program alive? Never touches the disk, but with `?deep=1`, which has the CLI answer a prompt
/// (at most once a minute; its answer is `testResponse`).
#[utoipa::path(get, path = "/health", params(("deep" = Option<String>, Query)),
    responses((status = 200, description = "alive"),
              (status = 503, description = "shutting down, or the CLI does not answer")))]
pub(super) async fn health(
    State(state): State<Base>,
    Query(query): Query<HealthQuery>,
) -> Response {
    let is_draining = state.draining.is_cancelled();
    let claude = state.readiness.claude.get();
    let mut answer = json!({
        "status": if is_draining { "draining" } else { "healthy" },
        "claudeAvailable": claude.is_none_or(Result::is_ok),
        "version": env!("CARGO_PKG_VERSION"),
        "mode": if state.facts.is_rehearsal { "rehearsal" } else { "live" },
        "workspace": state.facts.workspace,
        "client": state.pins.client,
        "user": state.pins.user,
        "thread": state.pins.thread,
        "uptimeSeconds": seconds(state.started.elapsed()),
        "idleSeconds": seconds(state.activity.idle_for()),
        "activeTurns": state.activity.count(HolderKind::Turn),
        "pendingRequests": state.activity.count(HolderKind::Request),
        "draining": is_draining,
        "serviceCircuit": state.service.circuit().as_str(),
    });
    if let Some(task) = state.facts.ecs.as_ref().and_then(|ecs| ecs.task()) {
        answer["ecs"] = json!(task);
    }
    if state.facts.is_rehearsal {
        answer["rehearsal"] = json!({
            "notice": "No model is behind this: a script answers.",
            "examples": crate::rehearsal::EXAMPLES,
        });
    }
    if is_draining {
        answer["code"] = "draining".into();
        answer["success"] = false.into();
        answer["error"] = "greenroom is shutting down".into();
        return (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response();
    }
    if query
        .deep
        .is_some_and(|deep| matches!(deep.as_str(), "1" | "true" | ""))
    {
        match state.service.probe().await {
            Ok(said) => answer["testResponse"] = said.into(),
            Err(error) => {
                let error = match claude {
                    Some(Err(what_to_do)) => what_to_do.clone(),
                    _ => error,
                };
                let answer =
                    json!({"status": "unhealthy", "claudeAvailable": false, "error": error});
                return (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response();
            }
        }
    }
    Json(answer).into_response()
}

fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReadyAnswer {
    ready: bool,
    /// `ok`, or what to do.
    checks: BTreeMap<&'static str, String>,
    #[schema(value_type = Object)]
    confinement: Value,
}

/// Can init and execute work?
#[utoipa::path(get, path = "/ready",
    responses((status = 200, body = ReadyAnswer), (status = 503, body = ReadyAnswer)))]
pub(super) async fn ready(State(state): State<Base>) -> Response {
    let check = |cell: &OnceLock<Result<String, String>>| match cell.get() {
        None => "still being looked at; ask again in a moment".to_owned(),
        Some(Ok(_)) => "ok".to_owned(),
        Some(Err(what_to_do)) => what_to_do.clone(),
    };
    let workspace = state.facts.workspace.clone().unwrap_or_default();
    let probe = task::blocking(
        "writing to the workspace",
        Duration::from_secs(5),
        move || {
            let probe = workspace.join(format!(
                ".greenroom-probe-{}",
                uuid::Uuid::new_v4().simple()
            ));
            // An empty file fits on a full disk.
            let written = std::fs::write(&probe, [0; 4096]);
            let removed = std::fs::remove_file(&probe);
            written.and(removed)
        },
    )
    .await;
    let workspace = match probe {
        Ok(Ok(())) => "ok".to_owned(),
        Ok(Err(error)) if is_full(&error) => {
            "the workspace's disk is full; make room, or give it more".to_owned()
        }
        Ok(Err(error)) => {
            format!("the workspace cannot be written ({error}); check WORKSPACE_PATH")
        }
        Err(_) => "the workspace's disk does not answer; check its mount".to_owned(),
    };
    let gateway = if state.draining.is_cancelled() {
        "shutting down"
    } else {
        "ok"
    };
    let checks = BTreeMap::from([
        ("workspace", workspace),
        ("claude", check(&state.readiness.claude)),
        ("node", check(&state.readiness.node)),
        ("gateway", gateway.to_owned()),
    ]);
    let ready = checks.values().all(|check| check == "ok");
    let confinement = serde_json::to_value(state.facts.confinement).unwrap_or_default();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        status,
        Json(ReadyAnswer {
            ready,
            checks,
            confinement,
        }),
    )
        .into_response()
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Figures for Prometheus, or for a service's own checks as JSON.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain")))]
pub(super) async fn metrics(State(state): State<Base>, headers: HeaderMap) -> Response {
    let accepts_json = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("application/json"));
    if accepts_json {
        return Json(state.service.figures()).into_response();
    }
    prometheus(&state)
}

/// The same where the one-shot service listens alone: JSON, unless a scraper asks.
pub(super) async fn service_metrics(State(state): State<Base>, headers: HeaderMap) -> Response {
    let wants_text = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("text/plain") || value.contains("openmetrics"));
    if wants_text {
        return prometheus(&state);
    }
    Json(state.service.figures()).into_response()
}

fn prometheus(state: &Base) -> Response {
    use metrics::gauge;
    gauge!("greenroom_uptime_seconds").set(state.started.elapsed().as_secs_f64());
    gauge!("greenroom_turns_running").set(state.activity.count(HolderKind::Turn) as f64);
    gauge!("greenroom_turns_queued").set(state.activity.count(HolderKind::Queue) as f64);
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    gauge!("greenroom_tasks").set(tasks as f64);
    gauge!("greenroom_idle_seconds").set(state.activity.idle_for().as_secs_f64());
    let (running, waiting) = state.service.load();
    gauge!("greenroom_service_running").set(running as f64);
    gauge!("greenroom_service_waiting").set(waiting as f64);
    let breaker = state.service.circuit();
    for of in BreakerState::ALL {
        let is = f64::from(u8::from(of == breaker));
        gauge!("greenroom_service_breaker", "state" => of.as_str()).set(is);
    }
    if let Some(supervisor) = &state.supervisor {
        let states = supervisor.preview_states();
        for of in PreviewState::ALL {
            let count = states.iter().filter(|state| **state == of).count();
            gauge!("greenroom_previews", "state" => of.as_str()).set(count as f64);
        }
    }
    if let Some(memory) = Memory::now() {
        gauge!("greenroom_memory_available_bytes").set(memory.available as f64);
        gauge!("greenroom_memory_limit_bytes").set(memory.total as f64);
    }
    let text = model_metrics(state) + &state.figures.text();
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        text,
    )
        .into_response()
}

/// What this process counted of model requests. No tenant is named.
fn model_metrics(state: &Base) -> String {
    let tally = state.ledger.tally();
    let tokens = tally.tokens.by_kind();
    /// Name, help, the label's name, its values.
    type Family<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, f64)]);
    let families: [Family<'_>; 10] = [
        (
            "greenroom_model_requests_total",
            "Model requests by how they ended.",
            "status",
            &[
                ("settled", tally.settled as f64),
                ("aborted", tally.aborted as f64),
                ("refused", tally.refused as f64),
                ("over_budget", tally.over_budget as f64),
            ],
        ),
        (
            "greenroom_model_tokens_total",
            "Tokens by what they cost.",
            "kind",
            &tokens.map(|(kind, count)| (kind, count as f64)),
        ),
        (
            "greenroom_model_cost_usd_total",
            "US dollars spent at the model API, by the price list.",
            "",
            &[("", tally.cost_usd)],
        ),
        (
            "greenroom_model_unpriced_total",
            "Requests of models that the price list does not know, at the dearest price.",
            "",
            &[("", tally.unpriced as f64)],
        ),
        (
            "greenroom_predictions_total",
            "Predictions that were made at Replicate, wholly or in part.",
            "",
            &[("", tally.predictions as f64)],
        ),
        (
            "greenroom_prediction_cost_usd_total",
            "US dollars spent on them, as far as their prices are known.",
            "",
            &[("", tally.prediction_cost_usd)],
        ),
        (
            "greenroom_prediction_uncounted_total",
            "Predictions whose cost nobody knows.",
            "",
            &[("", tally.uncounted as f64)],
        ),
        (
            "greenroom_usage_compared_total",
            "Turns whose usage by the ledger was compared with the CLI's own counts.",
            "",
            &[("", tally.compared as f64)],
        ),
        (
            "greenroom_usage_difference_usd_total",
            "By how many dollars the CLI's own cost of turns differs from the ledger's.",
            "",
            &[("", tally.difference_usd)],
        ),
        (
            "greenroom_usage_differences_total",
            "Turns whose cost or tokens differ between the ledger and another count.",
            "from",
            &[
                ("cli", tally.differs_from_cli as f64),
                ("transcript", tally.differs_from_transcript as f64),
            ],
        ),
    ];
    let mut text = String::new();
    for (name, help, label, values) in families {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} counter\n"));
        for (of, value) in values {
            if label.is_empty() {
                text.push_str(&format!("{name} {value}\n"));
            } else {
                text.push_str(&format!("{name}{{{label}=\"{of}\"}} {value}\n"));
            }
        }
    }
    text
}

/// What keeps the container awake. Asking is no activity.
#[utoipa::path(get, path = "/api/idle", responses((status = 200, body = IdleAnswer)))]
pub(super) async fn idle(State(state): State<Base>) -> Response {
    Json(state.activity.answer()).into_response()
}

/// Counts as activity, once.
#[utoipa::path(post, path = "/api/idle/touch", responses((status = 200, body = IdleAnswer)))]
pub(super) async fn touch(State(state): State<Base>) -> Result<Response, ApiError> {
    state.activity.touch();
    Ok(Json(state.activity.answer()).into_response())
}
