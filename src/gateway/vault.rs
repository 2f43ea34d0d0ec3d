//! Keeps the credential, and an OAuth one fresh: refreshed before it runs out and when the
//! upstream refuses it, by one request at a time, here and in other containers.
//!
//! The provider gives a new refresh token with each access token and forgets the old one. The
//! credentials file may be mounted read-only, so the newest pair is kept in a file of our own, and
//! wins over the credentials file for as long as it expires later.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::header;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::json;
use tokio::{sync::OnceCell, time::Instant};
use url::Url;

use super::{
    GatewayError,
    credential::{self, Credential},
    relay::build_client,
};
use crate::{
    config::Secret,
    lease::{Lease, Patience},
    task::{self, Tasks},
    workspace,
};

/// So long before it expires a token is refreshed: the CLI's own margin.
const AHEAD: SignedDuration = SignedDuration::from_mins(5);
/// For the token endpoint.
const PATIENCE: Duration = Duration::from_secs(15);
/// After a refresh that failed, while the old token is still good.
const PAUSE: Duration = Duration::from_secs(30);
/// A token that was refreshed so recently is not the reason of a refusal.
const FRESH: Duration = Duration::from_secs(5);
/// Of the lease that keeps containers from refreshing the same token at once.
const LEASE: Duration = Duration::from_secs(15);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// The longest answer of the token endpoint that is read.
const MAX_ANSWER: usize = 64 << 10;
/// The Claude Code CLI's own; it is no secret.
const CLIENT_ID: &str = "9d1c250a-e61b-44d9-88ed-5944d1962f5e";
/// Where the CLI refreshes its tokens (2.1.329).
pub const TOKEN_URL: &str = "https://platform.claude.com/v1/oauth/token";

/// How OAuth credentials are kept fresh.
#[derive(Debug, Clone)]
pub struct OAuthSettings {
    /// The token endpoint.
    pub endpoint: Url,
    /// The credentials file, which its operator may replace while we run.
    pub file: Option<PathBuf>,
    /// A folder that survives restarts and that no agent can read; `None`: rotated tokens are lost
    /// with the process.
    pub store: Option<PathBuf>,
    /// Is told every new secret, before anything is logged.
    pub hide: fn(&Secret),
}

impl Default for OAuthSettings {
    fn default() -> Self {
        Self {
            endpoint: TOKEN_URL.parse().expect("it is an address"),
            file: None,
            store: None,
            hide: |_| {},
        }
    }
}

/// The credential, kept.
#[derive(Debug)]
pub(super) struct Vault {
    held: Mutex<Held>,
    settings: OAuthSettings,
    client: OnceCell<reqwest::Client>,
    /// One refresh at a time; whoever waits finds it done.
    refreshing: tokio::sync::Mutex<()>,
    tasks: Tasks,
}

#[derive(Debug)]
struct Held {
    credential: Credential,
    /// When it was last replaced.
    renewed: Option<Instant>,
    /// No refresh is tried before.
    next_try: Option<Instant>,
    has_looked: bool,
}

/// What the token endpoint answers.
#[derive(Deserialize)]
struct Granted {
    access_token: String,
    refresh_token: Option<String>,
    /// Seconds.
    expires_in: Option<i64>,
}

/// Why a token was not refreshed; holds nothing of it.
#[derive(Debug, thiserror::Error)]
enum RefreshError {
    #[error("there is no refresh token")]
    NoToken,
    #[error("{0}")]
    Client(String),
    #[error("the token endpoint was not reached")]
    Unreachable(#[source] reqwest::Error),
    #[error("the token endpoint answered {status}{}", reason(.error))]
    Refused { status: u16, error: String },
    #[error("the token endpoint's answer holds no access token")]
    Unreadable,
}

fn reason(error: &str) -> String {
    if error.is_empty() {
        String::new()
    } else {
        format!(" ({error})")
    }
}

impl Vault {
    pub(super) fn new(credential: Credential, settings: OAuthSettings, tasks: &Tasks) -> Self {
        Self {
            held: Mutex::new(Held {
                credential,
                renewed: None,
                next_try: None,
                has_looked: false,
            }),
            settings,
            client: OnceCell::new(),
            refreshing: tokio::sync::Mutex::new(()),
            tasks: tasks.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Can a new one be had where this one is refused?
    pub(super) fn is_renewable(&self) -> bool {
        matches!(self.lock().credential, Credential::OAuth { .. })
    }

    /// The credential for a request; an OAuth one is refreshed if it is about to expire.
    pub(super) async fn current(&self) -> Credential {
        let (credential, is_due) = {
            let held = self.lock();
            let is_due = expires(&held.credential).is_some_and(|at| at < Timestamp::now() + AHEAD);
            let may_try = held.next_try.is_none_or(|at| Instant::now() >= at);
            let is_first = self.is_first_look(&held);
            (held.credential.clone(), is_first || (is_due && may_try))
        };
        if !is_due {
            return credential;
        }
        self.renew_unless(|held| {
            !self.is_first_look(held)
                && expires(&held.credential).is_some_and(|at| at >= Timestamp::now() + AHEAD)
        })
        .await;
        self.lock().credential.clone()
    }

    /// The store was not looked into yet: it may have a newer one.
    fn is_first_look(&self, held: &Held) -> bool {
        matches!(held.credential, Credential::OAuth { .. }) && !held.has_looked
    }

    /// The upstream refused this credential: is there another one now?
    pub(super) async fn renew(&self, refused: &Credential) -> bool {
        if !self.is_renewable() {
            return false;
        }
        self.renew_unless(|held| {
            let is_fresh = held.renewed.is_some_and(|at| at.elapsed() < FRESH);
            held.credential != *refused || is_fresh
        })
        .await;
        self.lock().credential != *refused
    }

    async fn renew_unless(&self, is_done: impl Fn(&Held) -> bool) {
        let _one = self.refreshing.lock().await;
        if is_done(&self.lock()) {
            return;
        }
        let lease = self.lease().await;
        // Another container may have been there, or the operator.
        let before = self.lock().credential.clone();
        let newest = self.newest_on_disk(before.clone()).await;
        let is_good =
            newest != before && expires(&newest).is_none_or(|at| at >= Timestamp::now() + AHEAD);
        {
            let mut held = self.lock();
            held.has_looked = true;
            held.credential = newest;
            if is_good {
                held.renewed = Some(Instant::now());
            }
        }
        if !is_good && !is_done(&self.lock()) {
            self.refresh().await;
        }
        if let Some(lease) = lease {
            lease.release().await;
        }
    }

    async fn lease(&self) -> Option<Lease> {
        let folder = self.settings.store.as_ref()?.join("oauth-lease");
        let acquired = Lease::acquire(&folder, LEASE, Patience::UpTo(2 * LEASE), &self.tasks);
        match acquired.await {
            Ok(lease) => Some(lease),
            Err(error) => {
                tracing::warn!(%error, "refreshing the OAuth token without its lease");
                None
            }
        }
    }

    fn stored(&self) -> Option<PathBuf> {
        Some(self.settings.store.as_ref()?.join("oauth.json"))
    }

    /// The one that expires last of what we hold, the credentials file's and the store's.
    async fn newest_on_disk(&self, held: Credential) -> Credential {
        let files = [self.settings.file.clone(), self.stored()];
        let read = move || {
            let found = files.into_iter().flatten();
            found
                .filter(|path| path.is_file())
                .filter_map(|path| credential::read_quietly(&path))
                .filter(|found| matches!(found, Credential::OAuth { .. }))
                .fold(held, |newest, found| {
                    if expires(&found) > expires(&newest) {
                        found
                    } else {
                        newest
                    }
                })
        };
        match task::blocking("reading the OAuth credentials", DISK_DEADLINE, read).await {
            Ok(newest) => {
                for secret in newest.secrets() {
                    (self.settings.hide)(secret);
                }
                newest
            }
            Err(error) => {
                tracing::warn!(%error, "failed to look for newer OAuth credentials");
                self.lock().credential.clone()
            }
        }
    }

    async fn refresh(&self) {
        let asked = self.lock().credential.clone();
        match self.ask(&asked).await {
            Ok(granted) => {
                for secret in granted.secrets() {
                    (self.settings.hide)(secret);
                }
                // Kept before it is used: the old refresh token is worthless by now.
                self.keep(&granted).await;
                let mut held = self.lock();
                held.credential = granted;
                held.renewed = Some(Instant::now());
                held.next_try = None;
                drop(held);
                tracing::info!("the OAuth token was refreshed");
            }
            Err(error) => {
                self.lock().next_try = Some(Instant::now() + PAUSE);
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(
                    %error, cause,
                    "the OAuth token could not be refreshed; if this goes on, log in anew and \
                     replace the credentials file"
                );
            }
        }
    }

    async fn ask(&self, asked: &Credential) -> Result<Credential, RefreshError> {
        let Credential::OAuth {
            refresh: Some(refresh),
            ..
        } = asked
        else {
            return Err(RefreshError::NoToken);
        };
        let client = self
            .client
            .get_or_try_init(|| build_client(&self.settings.endpoint))
            .await
            .map_err(RefreshError::Client)?;
        let body = json!({
            "grant_type": "refresh_token",
            "refresh_token": refresh.expose(),
            "client_id": CLIENT_ID,
        });
        let unreachable = |error: reqwest::Error| RefreshError::Unreachable(error.without_url());
        let mut answer = client
            .post(self.settings.endpoint.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(body.to_string())
            .timeout(PATIENCE)
            .send()
            .await
            .map_err(unreachable)?;
        let mut text = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            text.extend_from_slice(&chunk);
            if text.len() > MAX_ANSWER {
                return Err(RefreshError::Unreadable);
            }
        }
        if !answer.status().is_success() {
            // OAuth's own word (RFC 6749 5.2), if it is one.
            let told: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            let error = told["error"].as_str().unwrap_or_default();
            let is_word =
                error.len() < 64 && error.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            return Err(RefreshError::Refused {
                status: answer.status().as_u16(),
                error: if is_word {
                    error.to_owned()
                } else {
                    String::new()
                },
            });
        }
        let granted: Granted =
            serde_json::from_slice(&text).map_err(|_| RefreshError::Unreadable)?;
        if granted.access_token.trim().is_empty() {
            return Err(RefreshError::Unreadable);
        }
        let lasts = granted.expires_in.map(SignedDuration::from_secs);
        Ok(Credential::OAuth {
            access: Secret::new(granted.access_token.trim()),
            // One that is not replaced stays good.
            refresh: granted
                .refresh_token
                .filter(|token| !token.trim().is_empty())
                .map(|token| Secret::new(token.trim()))
                .or_else(|| Some(refresh.clone())),
            expires: lasts.and_then(|lasts| Timestamp::now().checked_add(lasts).ok()),
        })
    }

    async fn keep(&self, granted: &Credential) {
        let (Some(path), Some(text)) = (self.stored(), credential::written(granted)) else {
            return;
        };
        let write = move || workspace::write_atomic(&path, text.as_bytes());
        let kept = task::blocking("keeping the OAuth credentials", DISK_DEADLINE, write).await;
        let failed = match kept {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(
            failed,
            "the refreshed OAuth token is not on the disk: after a restart somebody has to log in \
             anew"
        );
    }

    /// Checks that the credential can be sent at all.
    pub(super) fn check(&self) -> Result<(), GatewayError> {
        let credential = self.lock().credential.clone();
        credential.apply(&mut http::HeaderMap::new())
    }
}

fn expires(credential: &Credential) -> Option<Timestamp> {
    match credential {
        Credential::OAuth { expires, .. } => *expires,
        Credential::ApiKey(_) | Credential::Rehearsal => None,
    }
}
