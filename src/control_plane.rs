//! Tells the control plane what becomes of this container: `CONTROL_PLANE_URL`.
//!
//! Nobody waits for it: news goes into a bounded queue, in order, and is tried again for a while. Each
//! has an id of its own, so that one which arrives twice is known.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use reqwest::Url;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    client::signed_headers,
    domain::{ErrorCode, TurnKind, TurnResult, TurnStatus},
    identity::ThreadKey,
    outbound::{self, Twice},
    task::Tasks,
};

/// News that waits; what comes while so much does is dropped, with a warning.
const QUEUE: usize = 256;
/// For one try. A control plane that does not answer by then has other troubles.
const ANSWER: Duration = Duration::from_secs(5);
/// Between the tries for one piece of news.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Where news goes, and who tells it.
#[derive(Clone)]
pub struct ControlPlaneSettings {
    pub url: Url,
    /// Signs like requests to the API are signed.
    pub secret: Option<String>,
    /// A bearer token, where there is no secret.
    pub token: Option<String>,
    pub instance: Instance,
}

impl fmt::Debug for ControlPlaneSettings {
    /// Without the secrets, of which the address may hold one too.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlaneSettings")
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}

/// Who tells: in every piece of news.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Another one at each start.
    pub id: String,
    pub host: String,
    pub version: String,
    /// What the container is pinned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<String>,
}

/// A piece of news. As JSON its name stands in `event`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Notice {
    /// It serves. What the stops before it left undone, if they did: one sentence each.
    #[serde(rename_all = "camelCase")]
    Ready {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        cut_short: Vec<String>,
    },
    TurnEnded(Box<TurnEnded>),
    /// Nobody needs it; it will stop then unless somebody does.
    #[serde(rename_all = "camelCase")]
    GoingIdle {
        stops_at: Timestamp,
    },
    /// Where the one-shot service's circuit breaker stands from now on: `open`, `half-open`, `closed`.
    ServiceCircuit {
        state: &'static str,
    },
    /// It admits nothing more. `idle-timeout`, `signal` or `broken`.
    Stopping {
        reason: &'static str,
    },
    /// All turns are ended and committed, all leases released.
    Stopped {
        reason: &'static str,
    },
}

/// A turn has its outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TurnEnded {
    pub client_id: String,
    pub user_id: String,
    pub thread_id: String,
    pub turn_id: String,
    pub kind: TurnKind,
    pub status: TurnStatus,
    /// Why it failed: one of the contract's codes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
    /// The commit's full id.
    pub commit: Option<String>,
    pub cost_usd: f64,
    pub duration_ms: u64,
}

impl TurnEnded {
    pub fn of(key: &ThreadKey, result: &TurnResult) -> Self {
        Self {
            client_id: key.client.to_string(),
            user_id: key.user.to_string(),
            thread_id: key.thread.to_string(),
            turn_id: result.turn_id.to_string(),
            kind: result.kind,
            status: result.status,
            code: result.code,
            commit: result.commit.as_ref().map(|commit| commit.id.clone()),
            cost_usd: result.usage.cost_usd,
            duration_ms: result.duration_ms,
        }
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    id: String,
    at: Timestamp,
    instance: &'a Instance,
    #[serde(flatten)]
    notice: &'a Notice,
}

/// The way to the control plane; without one, it takes news and tells nobody. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ControlPlane(Option<Arc<Line>>);

#[derive(Debug)]
struct Line {
    queue: mpsc::Sender<(Timestamp, Notice)>,
    tasks: Tasks,
}

impl ControlPlane {
    /// Starts to tell.
    ///
    /// # Errors
    /// If HTTPS cannot be set up.
    pub fn start(settings: ControlPlaneSettings) -> Result<Self, reqwest::Error> {
        let builder = outbound::client_builder(&settings.url).timeout(ANSWER);
        let http = builder.build().map_err(reqwest::Error::without_url)?;
        let (queue, news) = mpsc::channel(QUEUE);
        // Of its own: it tells of the end of all others.
        let tasks = Tasks::new();
        let telling = tell_all(http, settings, news, tasks.token().clone());
        tasks.spawn("control plane", telling);
        Ok(Self(Some(Arc::new(Line { queue, tasks }))))
    }

    /// Never waits.
    pub fn tell(&self, notice: Notice) {
        let Some(line) = &self.0 else { return };
        if let Err(error) = line.queue.try_send((Timestamp::now(), notice)) {
            let (mpsc::error::TrySendError::Full((_, lost))
            | mpsc::error::TrySendError::Closed((_, lost))) = error;
            tracing::warn!(
                ?lost,
                "the control plane was not told: too much waits for it"
            );
        }
    }

    /// Tells what waits, as far as it can within the limit, and ends.
    pub async fn finish(&self, limit: Duration) {
        if let Some(line) = &self.0
            && !line.tasks.stop(limit).await
        {
            tracing::warn!("the control plane was not told all: it does not answer in time");
        }
    }
}

async fn tell_all(
    http: reqwest::Client,
    settings: ControlPlaneSettings,
    mut news: mpsc::Receiver<(Timestamp, Notice)>,
    ending: CancellationToken,
) {
    loop {
        let next = tokio::select! {
            biased;
            next = news.recv() => next,
            () = ending.cancelled(), if !news.is_closed() => {
                // What waits is still told.
                news.close();
                continue;
            }
        };
        let Some((at, notice)) = next else { return };
        let envelope = Envelope {
            id: uuid::Uuid::now_v7().to_string(),
            at,
            instance: &settings.instance,
            notice: &notice,
        };
        let body = serde_json::to_vec(&envelope).expect("text and numbers serialise");
        if let Err(failure) = tell(&http, &settings, &body).await {
            tracing::warn!(?notice, failure, "the control plane could not be told");
        }
    }
}

/// Tries for a while, as long as that may help.
async fn tell(
    http: &reqwest::Client,
    settings: &ControlPlaneSettings,
    body: &[u8],
) -> Result<(), String> {
    let post = || {
        let mut post = http
            .post(settings.url.clone())
            .header("content-type", "application/json");
        if let Some(secret) = &settings.secret {
            // Anew for each try: a signature is good once, and for half a minute.
            for (name, value) in signed_headers(secret, body) {
                post = post.header(name, value);
            }
        } else if let Some(token) = &settings.token {
            post = post.bearer_auth(token);
        }
        post.body(body.to_vec())
    };
    // One that comes twice is known by its id.
    match outbound::send(&PAUSES, Twice::Same, post).await {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("it answered {}", answer.status())),
        Err(error) => Err(error.to_string()),
    }
}
