//! A client of the one-shot service, for Rust backends: signs, keeps time, stops asking a service
//! that fails, and falls back on something else.
//!
//! ```no_run
//! # async fn example() -> Result<(), greenroom::client::ClientError> {
//! use greenroom::client::{ClientSettings, Executor, Guarded, HttpExecutor, Request};
//!
//! let service = HttpExecutor::new(ClientSettings::from_env(std::env::vars())?)?;
//! let service = Guarded::new(service);
//! let answer = service.execute(&Request::new("Describe this in one sentence: …")).await?;
//! println!("{}", answer.output);
//! # Ok(())
//! # }
//! ```
//!
//! [`Executor`] is all that a caller needs to know: another transport is another implementation of it,
//! and [`Guarded`] and [`WithFallback`] go around any.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use hmac::{Hmac, Mac};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use url::Url;

use crate::{
    domain::{Breaker, BreakerState, Verdict},
    outbound,
};

/// Where the service is by default.
const DEFAULT_URL: &str = "http://localhost:3001";
/// As the service's own.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// The service ends a run in time by itself, and takes up to 5 s for it; beyond that it is gone.
const MARGIN: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// More than a run may print, as JSON.
const MAX_ANSWER: usize = 64 << 20;

/// Whatever answers prompts.
pub trait Executor: fmt::Debug + Send + Sync {
    /// Answers one.
    fn execute<'a>(&'a self, request: &'a Request)
    -> BoxFuture<'a, Result<Execution, ClientError>>;
}

/// What is asked. See `POST /execute` of the OpenAPI document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    pub prompt: String,
    /// Arguments of the CLI, of those that the service allows.
    pub args: Vec<String>,
    /// A folder of the service's workspace; `None`: a throw-away one.
    pub cwd: Option<String>,
    /// Longest run; `None`: as the client is set.
    pub timeout: Option<Duration>,
}

impl Request {
    /// A prompt with nothing special about it.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            ..Self::default()
        }
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execution {
    /// The CLI's standard output.
    pub output: String,
    /// Of the run.
    pub duration: Duration,
    /// With the time in line.
    pub execution_time: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{0}")]
    Settings(String),
    #[error("failed to reach the one-shot service")]
    Unreachable {
        #[source]
        source: reqwest::Error,
    },
    #[error("the one-shot service did not answer within {} s", limit.as_secs_f64())]
    TimedOut { limit: Duration },
    /// The service said no, or its run failed; `code` is one of the contract's.
    #[error("{message} ({code})")]
    Refused {
        status: u16,
        code: String,
        message: String,
        retry_after: Option<Duration>,
        exit_code: Option<i32>,
        stderr: Option<String>,
        request_id: Option<String>,
    },
    #[error("the one-shot service answered something else than an answer (status {status})")]
    Malformed { status: u16 },
    #[error("the one-shot service failed too often; it is asked again in a moment")]
    CircuitOpen { retry_after: Duration },
}

impl ClientError {
    /// Is it about the service, so that somebody else might do better? Else it is about the request.
    pub fn is_of_the_service(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Malformed { .. }
            | Self::CircuitOpen { .. } => true,
            Self::Refused { status, .. } => *status >= 500 || *status == 429,
            Self::Settings(_) => false,
        }
    }
}

/// Where the service is, and who asks.
#[derive(Clone)]
pub struct ClientSettings {
    pub url: Url,
    /// Longest run, where a request says nothing.
    pub timeout: Duration,
    /// Signs requests.
    pub secret: Option<String>,
    /// A bearer token, where there is no secret.
    pub token: Option<String>,
}

impl fmt::Debug for ClientSettings {
    /// Without the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientSettings")
            .field("url", &self.url.as_str())
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl ClientSettings {
    /// Reads `CLAUDE_SERVICE_URL` (`http://localhost:3001`), `CLAUDE_SERVICE_TIMEOUT` (milliseconds,
    /// 60,000), `CLAUDE_SERVICE_SECRET` and `GREENROOM_API_TOKEN`.
    ///
    /// # Errors
    /// [`ClientError::Settings`] names the variable that cannot be understood.
    pub fn from_env(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, ClientError> {
        let mut settings = Self {
            url: Url::parse(DEFAULT_URL).expect("it is well-formed"),
            timeout: DEFAULT_TIMEOUT,
            secret: None,
            token: None,
        };
        for (name, value) in vars {
            if value.is_empty() {
                continue;
            }
            match name.as_str() {
                "CLAUDE_SERVICE_URL" => {
                    let url = Url::parse(&value).ok();
                    settings.url = url.filter(is_http).ok_or_else(|| {
                        // Not repeated: it may hold a password.
                        ClientError::Settings(
                            "CLAUDE_SERVICE_URL is no address; allowed: http:// or https:// and a \
                             host"
                                .into(),
                        )
                    })?;
                }
                "CLAUDE_SERVICE_TIMEOUT" => {
                    let milliseconds = value.parse().ok().filter(|ms| (1..=600_000).contains(ms));
                    let milliseconds = milliseconds.ok_or_else(|| {
                        ClientError::Settings(
                            "CLAUDE_SERVICE_TIMEOUT is a number of milliseconds, at most 600000"
                                .into(),
                        )
                    })?;
                    settings.timeout = Duration::from_millis(milliseconds);
                }
                "CLAUDE_SERVICE_SECRET" => settings.secret = Some(value),
                "GREENROOM_API_TOKEN" => settings.token = Some(value),
                _ => {}
            }
        }
        Ok(settings)
    }
}

fn is_http(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https") && url.has_host()
}

/// The service over HTTP.
#[derive(Debug)]
pub struct HttpExecutor {
    settings: ClientSettings,
    endpoint: Url,
    http: reqwest::Client,
}

#[derive(Serialize)]
struct Body<'a> {
    prompt: &'a str,
    args: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    cwd: Option<&'a str>,
    timeout: u64,
}

#[derive(Deserialize)]
struct Success {
    result: SuccessResult,
    #[serde(rename = "executionTime")]
    execution_time: u64,
}

#[derive(Deserialize)]
struct SuccessResult {
    output: String,
    duration: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Failure {
    error: String,
    code: String,
    exit_code: Option<i32>,
    stderr: Option<String>,
    request_id: Option<String>,
}

impl HttpExecutor {
    /// Sets it up; asks nothing yet.
    ///
    /// # Errors
    /// [`ClientError::Settings`] if HTTPS cannot be set up.
    pub fn new(settings: ClientSettings) -> Result<Self, ClientError> {
        let mut endpoint = settings.url.clone();
        if let Ok(mut path) = endpoint.path_segments_mut() {
            path.pop_if_empty().push("execute");
        }
        let builder = outbound::client_builder(&endpoint).connect_timeout(CONNECT_TIMEOUT);
        let http = builder.build().map_err(|error| {
            ClientError::Settings(format!(
                "HTTPS could not be set up: {}",
                error.without_url()
            ))
        })?;
        Ok(Self {
            settings,
            endpoint,
            http,
        })
    }

    async fn ask(&self, request: &Request) -> Result<Execution, ClientError> {
        let timeout = request.timeout.unwrap_or(self.settings.timeout);
        let body = serde_json::to_vec(&Body {
            prompt: &request.prompt,
            args: &request.args,
            cwd: request.cwd.as_deref(),
            timeout: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        })
        .expect("text and numbers serialise");
        let mut post = self
            .http
            .post(self.endpoint.clone())
            .header("content-type", "application/json");
        if let Some(secret) = &self.settings.secret {
            for (name, value) in signed_headers(secret, &body) {
                post = post.header(name, value);
            }
        } else if let Some(token) = &self.settings.token {
            post = post.bearer_auth(token);
        }
        let unreachable = |source: reqwest::Error| ClientError::Unreachable {
            // It may hold a password.
            source: source.without_url(),
        };
        let mut response = post.body(body).send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if answer.len() + chunk.len() > MAX_ANSWER {
                return Err(ClientError::Malformed { status });
            }
            answer.extend_from_slice(&chunk);
        }
        if status == 200 {
            let success: Success =
                serde_json::from_slice(&answer).map_err(|_| ClientError::Malformed { status })?;
            return Ok(Execution {
                output: success.result.output,
                duration: Duration::from_millis(success.result.duration),
                execution_time: Duration::from_millis(success.execution_time),
            });
        }
        let failure: Failure =
            serde_json::from_slice(&answer).map_err(|_| ClientError::Malformed { status })?;
        Err(ClientError::Refused {
            status,
            code: failure.code,
            message: failure.error,
            retry_after,
            exit_code: failure.exit_code,
            stderr: failure.stderr,
            request_id: failure.request_id,
        })
    }
}

/// The headers that sign a call with this body, now: good for one call.
pub fn signed_headers(secret: &str, body: &[u8]) -> [(&'static str, String); 3] {
    let now = Timestamp::now().as_millisecond();
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(format!("{now}:{nonce}:").as_bytes());
    mac.update(body);
    let signature = hex::encode(mac.finalize().into_bytes());
    [
        ("x-claude-timestamp", now.to_string()),
        ("x-claude-nonce", nonce),
        ("x-claude-signature", signature),
    ]
}

impl Executor for HttpExecutor {
    fn execute<'a>(
        &'a self,
        request: &'a Request,
    ) -> BoxFuture<'a, Result<Execution, ClientError>> {
        Box::pin(async move {
            let limit = request.timeout.unwrap_or(self.settings.timeout) + MARGIN;
            match tokio::time::timeout(limit, self.ask(request)).await {
                Ok(answer) => answer,
                Err(_) => Err(ClientError::TimedOut { limit }),
            }
        })
    }
}

/// Asks another executor until it has failed too often, then nobody for a while.
#[derive(Debug)]
pub struct Guarded<E> {
    inner: E,
    breaker: Mutex<Breaker>,
}

impl<E: Executor> Guarded<E> {
    /// Closed at first.
    pub fn new(inner: E) -> Self {
        Self {
            inner,
            breaker: Mutex::new(Breaker::new()),
        }
    }

    /// Where the circuit breaker stands.
    pub fn breaker(&self) -> BreakerState {
        self.lock().state(Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Executor> Executor for Guarded<E> {
    fn execute<'a>(
        &'a self,
        request: &'a Request,
    ) -> BoxFuture<'a, Result<Execution, ClientError>> {
        Box::pin(async move {
            let pass = self.lock().enter(Instant::now());
            let pass = pass.map_err(|retry_after| ClientError::CircuitOpen { retry_after })?;
            // Dropped in its midst it tells nothing.
            let mut left = leaving(|verdict| {
                self.lock().leave(pass, verdict, Instant::now());
            });
            let answer = self.inner.execute(request).await;
            left.verdict = match &answer {
                Ok(_) => Verdict::Success,
                Err(error) if error.is_of_the_service() => Verdict::Failure,
                // It answered.
                Err(_) => Verdict::Success,
            };
            answer
        })
    }
}

struct Leaving<F: FnMut(Verdict)> {
    verdict: Verdict,
    leave: F,
}

fn leaving<F: FnMut(Verdict)>(leave: F) -> Leaving<F> {
    Leaving {
        verdict: Verdict::Unknown,
        leave,
    }
}

impl<F: FnMut(Verdict)> Drop for Leaving<F> {
    fn drop(&mut self) {
        (self.leave)(self.verdict);
    }
}

/// Asks the second one where the first one is the reason that there is no answer.
#[derive(Debug)]
pub struct WithFallback<A, B> {
    pub first: A,
    pub second: B,
}

impl<A: Executor, B: Executor> Executor for WithFallback<A, B> {
    fn execute<'a>(
        &'a self,
        request: &'a Request,
    ) -> BoxFuture<'a, Result<Execution, ClientError>> {
        Box::pin(async move {
            match self.first.execute(request).await {
                Err(error) if error.is_of_the_service() => {
                    tracing::warn!(%error, "the one-shot service did not answer; another one is asked");
                    self.second.execute(request).await
                }
                answer => answer,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails as told, and counts.
    #[derive(Debug)]
    struct Acting {
        status: Mutex<u16>,
        asked: Mutex<u32>,
    }

    impl Acting {
        fn new(status: u16) -> Self {
            Self {
                status: Mutex::new(status),
                asked: Mutex::new(0),
            }
        }
    }

    impl Executor for Acting {
        fn execute<'a>(
            &'a self,
            request: &'a Request,
        ) -> BoxFuture<'a, Result<Execution, ClientError>> {
            Box::pin(async move {
                *self.asked.lock().unwrap() += 1;
                match *self.status.lock().unwrap() {
                    200 => Ok(Execution {
                        output: request.prompt.clone(),
                        duration: Duration::ZERO,
                        execution_time: Duration::ZERO,
                    }),
                    status => Err(ClientError::Refused {
                        status,
                        code: "x".into(),
                        message: "no".into(),
                        retry_after: None,
                        exit_code: None,
                        stderr: None,
                        request_id: None,
                    }),
                }
            })
        }
    }

    #[tokio::test]
    async fn a_service_that_fails_is_left_alone_and_another_one_asked() {
        let both = WithFallback {
            first: Guarded::new(Acting::new(502)),
            second: Acting::new(200),
        };
        for _ in 0..12 {
            let answer = both.execute(&Request::new("hello")).await.unwrap();
            assert_eq!(answer.output, "hello");
        }
        assert_eq!(both.first.breaker(), BreakerState::Open);
        assert_eq!(*both.first.inner.asked.lock().unwrap(), 10);
        assert_eq!(*both.second.asked.lock().unwrap(), 12);
    }

    #[tokio::test]
    async fn a_bad_request_is_nobody_else_s_business() {
        for (status, is_tried) in [
            (400, false),
            (401, false),
            (409, false),
            (429, true),
            (503, true),
        ] {
            let both = WithFallback {
                first: Guarded::new(Acting::new(status)),
                second: Acting::new(200),
            };
            for _ in 0..10 {
                assert_eq!(both.execute(&Request::new("x")).await.is_ok(), is_tried);
            }
            let opened = both.first.breaker() == BreakerState::Open;
            assert_eq!(opened, is_tried, "{status}");
        }
    }

    #[test]
    fn settings_come_from_the_environment() {
        let read = |list: &[(&str, &str)]| {
            ClientSettings::from_env(list.iter().map(|(n, v)| ((*n).into(), (*v).into())))
        };
        let plain = read(&[("CLAUDE_SERVICE_URL", ""), ("PATH", "x")]).unwrap();
        assert_eq!(plain.url.as_str(), "http://localhost:3001/");
        assert_eq!(plain.timeout, DEFAULT_TIMEOUT);
        let set = read(&[
            ("CLAUDE_SERVICE_URL", "https://service.example/below"),
            ("CLAUDE_SERVICE_TIMEOUT", "1500"),
            ("CLAUDE_SERVICE_SECRET", "s3cret"),
        ])
        .unwrap();
        assert_eq!(set.timeout, Duration::from_millis(1500));
        assert!(!format!("{set:?}").contains("s3cret"));
        let executor = HttpExecutor::new(set).unwrap();
        assert_eq!(
            executor.endpoint.as_str(),
            "https://service.example/below/execute"
        );
        assert!(!format!("{executor:?}").contains("s3cret"));
        for (name, value) in [
            ("CLAUDE_SERVICE_URL", "service:pass@x"),
            ("CLAUDE_SERVICE_URL", "ftp://x"),
            ("CLAUDE_SERVICE_TIMEOUT", "1s"),
            ("CLAUDE_SERVICE_TIMEOUT", "0"),
            ("CLAUDE_SERVICE_TIMEOUT", "600001"),
        ] {
            let error = read(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && !error.contains("pass"), "{error}");
        }
    }
}
