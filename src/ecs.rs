//! What a container asks of ECS: which task it is, and not to be scaled in while a turn runs.
//!
//! Elsewhere the two variables that lead there are missing, and nothing of this happens. By AWS's
//! documentation of task metadata version 4 and of task scale-in protection.

use std::{sync::OnceLock, time::Duration};

use reqwest::{Client, Url};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::outbound;

/// The endpoints are on the machine; one that is slower is not there.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a protection lasts if we are killed, and when it is renewed.
const PROTECTED_MINUTES: u64 = 60;
const RENEW: Duration = Duration::from_secs(30 * 60);
/// Turns of one conversation come in quick succession: protection stays so long after one.
const LINGER: Duration = Duration::from_secs(10);
/// How soon a turn is seen.
const TICK: Duration = Duration::from_millis(500);
/// After a refusal that may pass.
const RETRY: Duration = Duration::from_secs(30);

/// What `/health` and the log tell of the task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all(serialize = "camelCase", deserialize = "PascalCase"))]
pub struct Task {
    pub cluster: String,
    #[serde(rename(deserialize = "TaskARN"))]
    pub task_arn: String,
    pub family: String,
    pub revision: String,
    #[serde(default)]
    pub availability_zone: Option<String>,
    #[serde(default)]
    pub launch_type: Option<String>,
}

/// The way to ECS.
#[derive(Debug)]
pub struct Ecs {
    http: Client,
    metadata: Option<Url>,
    agent: Option<Url>,
    task: OnceLock<Task>,
}

impl Ecs {
    /// Reads `ECS_CONTAINER_METADATA_URI_V4` and `ECS_AGENT_URI`; `None` where neither is set, or
    /// names an address of this container's network.
    pub fn from_env(vars: impl IntoIterator<Item = (String, String)>) -> Option<Self> {
        let (mut metadata, mut agent) = (None, None);
        for (name, value) in vars {
            let url = || Url::parse(value.trim_end_matches('/')).ok();
            match name.as_str() {
                "ECS_CONTAINER_METADATA_URI_V4" => metadata = url(),
                "ECS_AGENT_URI" => agent = url(),
                _ => {}
            }
        }
        // Both are on this machine.
        let somewhere = metadata.as_ref().or(agent.as_ref())?;
        let http = outbound::client_builder(somewhere)
            .no_proxy()
            .timeout(ANSWER)
            .build()
            .ok()?;
        Some(Self {
            http,
            metadata,
            agent,
            task: OnceLock::new(),
        })
    }

    /// The task, once [`Ecs::look`] found it.
    pub fn task(&self) -> Option<&Task> {
        self.task.get()
    }

    /// Asks which task this is.
    pub async fn look(&self) {
        let Some(metadata) = &self.metadata else {
            return;
        };
        let ask = async {
            let answer = self.http.get(below(metadata, "task")).send().await?;
            answer.error_for_status()?.bytes().await
        };
        let found = ask.await.map_err(|error| error.without_url().to_string());
        let found = found.and_then(|answer| {
            serde_json::from_slice::<Task>(&answer).map_err(|error| error.to_string())
        });
        match found {
            Ok(task) => {
                tracing::info!(
                    task = task.task_arn,
                    cluster = task.cluster,
                    family = task.family,
                    revision = task.revision,
                    zone = task.availability_zone,
                    "a task of ECS"
                );
                self.task.set(task).ok();
            }
            Err(error) => {
                tracing::warn!(error, "ECS does not say which task this is");
            }
        }
    }

    /// Holds scale-in protection while `is_busy`, until `ending`, and gives it back then.
    pub async fn protect_while(&self, is_busy: impl Fn() -> bool, ending: CancellationToken) {
        if self.agent.is_none() {
            return;
        }
        let mut held_since = None;
        let mut busy_at = None;
        let mut not_before = None;
        loop {
            let now = tokio::time::Instant::now();
            let is_ending = ending.is_cancelled();
            if is_busy() && !is_ending {
                busy_at = Some(now);
            }
            let wants = busy_at.is_some_and(|at| now < at + LINGER) && !is_ending;
            let is_due = match held_since {
                Some(since) => !wants || now >= since + RENEW,
                None => wants,
            };
            if is_due && not_before.is_none_or(|at| now >= at) {
                match self.set_protection(wants).await {
                    Ok(()) => {
                        held_since = wants.then_some(now);
                        not_before = None;
                    }
                    Err(Refusal::NotOfAService) => {
                        tracing::info!("this task is of no service: nothing scales it in");
                        return;
                    }
                    Err(Refusal::Denied) => {
                        tracing::info!(
                            "this task may not protect itself from being scaled in; if it is of a service, give \
                             its role ecs:UpdateTaskProtection"
                        );
                        return;
                    }
                    Err(Refusal::Other(reason)) => {
                        // Said once for each spell of refusals.
                        if not_before.is_none() {
                            tracing::warn!(
                                reason,
                                wants,
                                "ECS does not change scale-in protection"
                            );
                        }
                        not_before = Some(now + RETRY);
                    }
                }
            }
            if is_ending {
                return;
            }
            tokio::time::timeout(TICK, ending.cancelled()).await.ok();
        }
    }

    async fn set_protection(&self, on: bool) -> Result<(), Refusal> {
        let Some(agent) = &self.agent else {
            return Ok(());
        };
        let mut wish = json!({"ProtectionEnabled": on});
        if on {
            wish["ExpiresInMinutes"] = PROTECTED_MINUTES.into();
        }
        let ask = async {
            let url = below(agent, "task-protection/v1/state");
            let put = self
                .http
                .put(url)
                .header("content-type", "application/json");
            let answer = put.body(wish.to_string()).send().await?;
            answer.bytes().await
        };
        let answer = ask
            .await
            .map_err(|error| Refusal::Other(error.without_url().to_string()))?;
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        if answer["protection"]["ProtectionEnabled"] == on {
            return Ok(());
        }
        let reason = answer["failure"]["Reason"]
            .as_str()
            .or_else(|| answer["error"]["Code"].as_str())
            .unwrap_or("no answer that is known");
        match reason {
            "TASK_NOT_VALID" => Err(Refusal::NotOfAService),
            "AccessDeniedException" => Err(Refusal::Denied),
            reason => Err(Refusal::Other(reason.to_owned())),
        }
    }
}

enum Refusal {
    /// A task that was started alone: nobody scales it in.
    NotOfAService,
    /// The task's role has no right to it, as those of tasks that are started alone.
    Denied,
    Other(String),
}

fn below(url: &Url, path: &str) -> Url {
    let mut url = url.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path.split('/'));
    }
    url
}
