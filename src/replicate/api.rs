//! Replicate's HTTP API: models, predictions, their creation and end.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;
use url::Url;

use super::{
    Measured, ModelName, ReplicateError, Schema, Sent, name::is_version, output::is_image,
    schema::Gives,
};
use crate::{
    config::Secret,
    outbound::{self, Twice},
    task, text,
};

/// Between tries.
pub(super) const PAUSES: [Duration; 5] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];
const CONNECT: Duration = Duration::from_secs(10);
/// For one answer of the API.
const ANSWER: Duration = Duration::from_secs(60);
/// Without a byte of a file.
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// For loading certificates from a slow disk.
const CLIENT_DEADLINE: Duration = Duration::from_secs(20);
/// Largest answer: files may be in it, as data URLs.
const MAX_ANSWER: usize = 64 << 20;
/// Of an answer that refuses.
const MAX_REFUSAL: usize = 64 << 10;
/// Longest sentence of Replicate's that an error repeats.
const MAX_DETAIL: usize = 500;

/// The way to Replicate. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Replicate {
    http: reqwest::Client,
    base: Arc<Url>,
    token: Secret,
    /// For files that lie elsewhere: no token, and certificates also where the API is `http:`.
    elsewhere: Arc<OnceCell<reqwest::Client>>,
}

/// A model that can be run.
#[derive(Debug, Clone)]
pub struct Model {
    pub name: ModelName,
    /// The version that is run; of an official model there may be none.
    pub version: Option<String>,
    /// What it takes; not known of a bare version.
    pub schema: Option<Schema>,
    target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    /// `POST /v1/models/{owner}/{name}/predictions`, and the version if that is refused.
    Official {
        owner: String,
        name: String,
        version: Option<String>,
    },
    /// `POST /v1/predictions`.
    Version(String),
}

/// How far a prediction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Starting,
    Processing,
    Succeeded,
    Failed,
    /// Also what Replicate calls `aborted`: ended before it began.
    Canceled,
}

impl Status {
    fn of(word: &str) -> Self {
        match word {
            "succeeded" => Self::Succeeded,
            "failed" => Self::Failed,
            "canceled" | "cancelled" | "aborted" => Self::Canceled,
            "starting" => Self::Starting,
            // What comes next year, too, is followed to its end.
            _ => Self::Processing,
        }
    }

    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Canceled)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Processing => "processing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }
}

/// A prediction as Replicate last told of it.
#[derive(Debug, Clone)]
pub struct Prediction {
    pub id: String,
    pub status: Status,
    pub output: Value,
    pub logs: String,
    /// Why it failed, in the model's words.
    pub error: Option<String>,
    pub measured: Measured,
}

#[derive(Deserialize)]
struct ModelWire {
    #[serde(default)]
    is_official: Option<bool>,
    #[serde(default)]
    latest_version: Option<VersionWire>,
}

#[derive(Deserialize)]
struct VersionWire {
    #[serde(default)]
    id: String,
    #[serde(default)]
    openapi_schema: Value,
}

#[derive(Deserialize)]
pub(super) struct PredictionWire {
    pub(super) id: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    output: Value,
    #[serde(default)]
    logs: Option<String>,
    #[serde(default)]
    error: Value,
    #[serde(default)]
    metrics: Value,
    #[serde(default)]
    pub(super) created_at: Option<String>,
    #[serde(default)]
    completed_at: Option<String>,
    #[serde(default)]
    pub(super) input: Value,
}

impl Replicate {
    /// The way to the API at an address.
    ///
    /// # Errors
    /// If there is no token, if it would go over the network in the clear, or if HTTPS cannot be set up.
    pub async fn connect(base: &str, token: Option<Secret>) -> Result<Self, ReplicateError> {
        let token = token.ok_or(ReplicateError::NoToken)?;
        let https = |why: String| ReplicateError::Https { why };
        let base: Url = base
            .parse()
            .map_err(|_| https("REPLICATE_BASE_URL is no address".to_owned()))?;
        if base.scheme() != "https" && !outbound::is_loopback(&base) {
            let why = "REPLICATE_BASE_URL is not https, so that the token could be read on its way; \
                       use https";
            return Err(https(why.to_owned()));
        }
        Ok(Self {
            http: client(base.clone()).await?,
            base: Arc::new(base),
            token,
            elsewhere: Arc::default(),
        })
    }

    /// Looks a model up: which version runs, and what it takes.
    ///
    /// # Errors
    /// [`ReplicateError`].
    pub async fn model(&self, name: ModelName) -> Result<Model, ReplicateError> {
        let (owner, short) = match &name {
            ModelName::Version { version } => {
                return Ok(Model {
                    version: Some(version.clone()),
                    schema: None,
                    target: Target::Version(version.clone()),
                    name,
                });
            }
            ModelName::Latest { owner, name } | ModelName::Pinned { owner, name, .. } => {
                (owner.clone(), name.clone())
            }
        };
        let at = format!("/v1/models/{owner}/{short}");
        let missing = |error| match error {
            ReplicateError::NotFound { .. } => ReplicateError::NotFound {
                what: format!("model {name}"),
            },
            other => other,
        };
        if let Some(version) = name.version().map(str::to_owned) {
            let at = format!("{at}/versions/{version}");
            let found: VersionWire = self.get(&at, "the version").await.map_err(missing)?;
            return Ok(Model {
                schema: Schema::read(&found.openapi_schema),
                target: Target::Version(version.clone()),
                version: Some(version),
                name,
            });
        }
        let found: ModelWire = self.get(&at, "the model").await.map_err(missing)?;
        let latest = found.latest_version;
        let schema = latest
            .as_ref()
            .and_then(|latest| Schema::read(&latest.openapi_schema));
        let version = latest.map(|latest| latest.id).filter(|id| is_version(id));
        let target = match (&version, found.is_official) {
            (Some(version), Some(false) | None) => Target::Version(version.clone()),
            (version, _) => Target::Official {
                owner,
                name: short,
                version: version.clone(),
            },
        };
        Ok(Model {
            name,
            version,
            schema,
            target,
        })
    }

    /// Starts a prediction. Replicate itself ends it after `deadline`.
    ///
    /// # Errors
    /// [`ReplicateError::Unclear`] where it may run all the same.
    pub async fn create(
        &self,
        model: &Model,
        input: &Map<String, Value>,
        deadline: Duration,
    ) -> Result<Prediction, ReplicateError> {
        let by_version = |version: &str| {
            (
                "/v1/predictions".to_owned(),
                json!({"version": version, "input": input}),
            )
        };
        let (at, body) = match &model.target {
            Target::Version(version) => by_version(version),
            Target::Official { owner, name, .. } => (
                format!("/v1/models/{owner}/{name}/predictions"),
                json!({"input": input}),
            ),
        };
        let sent = Sent::now(input);
        let once = self.post_once(&at, &body, deadline, &sent).await;
        match (once, &model.target) {
            // Not official after all, and nothing has begun.
            (
                Err(ReplicateError::NotFound { .. }),
                Target::Official {
                    version: Some(version),
                    ..
                },
            ) => {
                let (at, body) = by_version(version);
                self.post_once(&at, &body, deadline, &sent).await
            }
            (Err(ReplicateError::NotFound { .. }), _) => Err(ReplicateError::NotFound {
                what: format!("model {}", model.name),
            }),
            (result, _) => result,
        }
    }

    /// Sends what costs money, once: again only where Replicate cannot have begun.
    async fn post_once(
        &self,
        at: &str,
        body: &Value,
        deadline: Duration,
        trace: &Sent,
    ) -> Result<Prediction, ReplicateError> {
        let text = serde_json::to_vec(body).expect("JSON serialises");
        let text = bytes::Bytes::from(text);
        let sent = outbound::send(&PAUSES, Twice::More, || {
            self.request(self.http.post(self.at(at)))
                .timeout(ANSWER)
                .header("content-type", "application/json")
                .header("cancel-after", format!("{}s", deadline.as_secs().max(5)))
                .body(text.clone())
        });
        let answer = match sent.await {
            Ok(answer) if answer.status().is_server_error() => None,
            Ok(answer) if !answer.status().is_success() => return Err(self.refusal(answer).await),
            Ok(answer) => match self.read(answer, "the prediction").await {
                Ok(found) => return prediction(found),
                Err(_) => None,
            },
            Err(source) if source.is_connect() || source.is_builder() => {
                return Err(self.unreachable(Some(source)));
            }
            Err(_) => None,
        };
        match answer {
            Some(found) => prediction(found),
            None => self.find(trace).await,
        }
    }

    /// How far it is.
    ///
    /// # Errors
    /// [`ReplicateError`].
    pub async fn prediction(&self, id: &str) -> Result<Prediction, ReplicateError> {
        let found: PredictionWire = self
            .get(
                &format!("/v1/predictions/{}", checked(id)?),
                "the prediction",
            )
            .await?;
        prediction(found)
    }

    /// Ends it. One that is over stays as it is.
    ///
    /// # Errors
    /// [`ReplicateError`].
    pub async fn cancel(&self, id: &str) -> Result<(), ReplicateError> {
        let at = self.at(&format!("/v1/predictions/{}/cancel", checked(id)?));
        let send = || self.request(self.http.post(&at)).timeout(ANSWER);
        let answer = outbound::send(&PAUSES, Twice::Same, send).await;
        let answer = answer.map_err(|source| self.unreachable(Some(source)))?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(self.refusal(answer).await),
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        at: &str,
        what: &'static str,
    ) -> Result<T, ReplicateError> {
        let at = self.at(at);
        let send = || self.request(self.http.get(&at)).timeout(ANSWER);
        let answer = outbound::send(&PAUSES, Twice::Same, send).await;
        let answer = answer.map_err(|source| self.unreachable(Some(source)))?;
        if !answer.status().is_success() {
            return Err(self.refusal(answer).await);
        }
        self.read(answer, what).await
    }

    pub(super) async fn read<T: DeserializeOwned>(
        &self,
        answer: Response,
        what: &'static str,
    ) -> Result<T, ReplicateError> {
        let broken = ReplicateError::Answer { what };
        let bytes = match bounded(answer, MAX_ANSWER).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(broken),
            Err(source) => return Err(self.unreachable(Some(source))),
        };
        serde_json::from_slice(&bytes).map_err(|_| broken)
    }

    /// An answer that is no success, as an error.
    pub(super) async fn refusal(&self, answer: Response) -> ReplicateError {
        let status = answer.status();
        let body = bounded(answer, MAX_REFUSAL).await;
        let body = body.ok().flatten().unwrap_or_default();
        let detail = self.detail(&body);
        match status {
            StatusCode::UNAUTHORIZED => ReplicateError::Unauthenticated,
            StatusCode::PAYMENT_REQUIRED => ReplicateError::Unpaid { detail },
            StatusCode::NOT_FOUND => ReplicateError::NotFound {
                what: "such thing".to_owned(),
            },
            StatusCode::TOO_MANY_REQUESTS => ReplicateError::Throttled { detail },
            status if status.is_server_error() => ReplicateError::Faulty {
                status: status.as_u16(),
            },
            status => ReplicateError::Refused {
                status: status.as_u16(),
                detail,
            },
        }
    }

    /// What an answer says of itself (RFC 7807), on one line and without our token.
    fn detail(&self, body: &[u8]) -> String {
        let value: Value = serde_json::from_slice(body).unwrap_or_default();
        let words = ["detail", "title", "error"].into_iter();
        let mut said = words.filter_map(|word| value[word].as_str());
        let said = said.next().unwrap_or("it says no more");
        // One that is masked wherever it would be repeated.
        let said = said.replace(self.token.expose(), Secret::MASK);
        let line: Vec<String> = said.lines().map(text::plain).collect();
        text::cut(line.join(" ").trim(), MAX_DETAIL).to_owned()
    }

    pub(super) fn unreachable(&self, source: Option<reqwest::Error>) -> ReplicateError {
        ReplicateError::Unreachable {
            host: self.base.host_str().unwrap_or_default().to_owned(),
            source: source.map(reqwest::Error::without_url),
        }
    }

    /// With our token: for the API's own address alone.
    pub(super) fn request(&self, request: RequestBuilder) -> RequestBuilder {
        request
            .bearer_auth(self.token.expose())
            .header("accept", "application/json")
            .header("user-agent", AGENT)
    }

    pub(super) fn http(&self) -> &reqwest::Client {
        &self.http
    }

    pub(super) fn at(&self, path: &str) -> String {
        format!("{}{path}", self.base.as_str().trim_end_matches('/'))
    }

    /// Whether an address has the origin of the API itself.
    pub(super) fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Whether it is a file that the API itself keeps: the token goes along to those. A model may
    /// name any address as its output, and has no business at the API's other ones.
    pub(super) fn is_kept_file(&self, url: &Url) -> bool {
        let below = format!("{}/v1/files/", self.base.path().trim_end_matches('/'));
        self.is_own(url) && url.path().starts_with(&below)
    }

    /// Whether it is of this machine, as the API is: then it is a stand-in's, which may have its files at
    /// another port or name.
    pub(super) fn is_beside(&self, url: &Url) -> bool {
        // The client knows certificates if the API's address needs them.
        let is_reached = url.scheme() == "http" || url.scheme() == self.base.scheme();
        is_reached && outbound::is_loopback(&self.base) && outbound::is_loopback(url)
    }

    pub(super) async fn elsewhere(&self, to: &Url) -> Result<&reqwest::Client, ReplicateError> {
        self.elsewhere.get_or_try_init(|| client(to.clone())).await
    }
}

pub(super) const AGENT: &str = concat!("greenroom/", env!("CARGO_PKG_VERSION"));

async fn client(to: Url) -> Result<reqwest::Client, ReplicateError> {
    let build = move || {
        outbound::client_builder(&to)
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .build()
    };
    let https = |why: String| ReplicateError::Https {
        why: format!("failed to set up HTTPS: {why}"),
    };
    match task::blocking("loading the certificates", CLIENT_DEADLINE, build).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(https(error.without_url().to_string())),
        Err(error) => Err(https(error.to_string())),
    }
}

/// A body of at most so many bytes; `None`: it has more.
async fn bounded(mut answer: Response, max: usize) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        if body.len() + piece.len() > max {
            return Ok(None);
        }
        body.extend_from_slice(&piece);
    }
    Ok(Some(body))
}

/// An id from outside becomes a part of an address and of files' names.
fn checked(id: &str) -> Result<&str, ReplicateError> {
    let is_id = (1..=100).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    match is_id {
        true => Ok(id),
        false => Err(ReplicateError::Answer {
            what: "the prediction",
        }),
    }
}

pub(super) fn prediction(found: PredictionWire) -> Result<Prediction, ReplicateError> {
    checked(&found.id)?;
    let number = |word: &str| {
        found.metrics[word]
            .as_f64()
            .filter(|n| n.is_finite() && *n >= 0.0)
    };
    let at = |time: &Option<String>| time.as_deref()?.parse::<Timestamp>().ok();
    let whole = at(&found.created_at)
        .zip(at(&found.completed_at))
        .map(|(from, to)| (to - from).total(jiff::Unit::Second).unwrap_or_default());
    let measured = Measured {
        predict_seconds: number("predict_time"),
        total_seconds: number("total_time").or(whole),
        images: found.metrics["image_count"]
            .as_u64()
            .unwrap_or_else(|| images_in(&found.output)),
    };
    let error = match found.error {
        Value::Null => None,
        Value::String(error) => Some(error),
        other => Some(other.to_string()),
    };
    let error = error.map(|error| {
        let lines: Vec<String> = error.lines().map(text::plain).collect();
        text::cut(lines.join(" ").trim(), MAX_DETAIL).to_owned()
    });
    Ok(Prediction {
        id: found.id,
        status: Status::of(&found.status),
        output: found.output,
        logs: found.logs.unwrap_or_default(),
        error,
        measured,
    })
}

/// Images of an output, for prices by the image.
fn images_in(output: &Value) -> u64 {
    match output {
        Value::String(text) => u64::from(is_image(text)),
        Value::Array(all) => all.iter().map(images_in).sum(),
        Value::Object(map) => map.values().map(images_in).sum(),
        _ => 0,
    }
}

impl Prediction {
    /// Whether the model has worked on it, which is paid however it ended.
    pub fn has_run(&self) -> bool {
        let seconds = self.measured.predict_seconds;
        self.status == Status::Succeeded || seconds.is_some_and(|seconds| seconds > 0.0)
    }
}

impl Model {
    /// What its output is made of.
    pub(super) fn gives(&self) -> Gives {
        self.schema.as_ref().map(Schema::gives).unwrap_or_default()
    }
}
