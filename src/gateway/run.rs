//! Which run may use the gateway: tokens, the run that each serves now, and what is known of it.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

/// How the upstream last met a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamNote {
    /// It answered. `retry_after` is its wish, where it said one in seconds.
    Answered {
        status: u16,
        retry_after: Option<Duration>,
    },
    /// It could not be reached, or broke off before its answer began.
    Unreachable,
}

/// One run as the gateway sees it. Shared by its [`ActiveRun`] and the requests under way.
#[derive(Debug)]
pub(super) struct Run {
    label: String,
    requests: AtomicU64,
    note: Mutex<Option<UpstreamNote>>,
    /// Cancelled when the run is over: what is still under way for it is cut.
    pub(super) over: CancellationToken,
}

type Digested = [u8; 32];

/// The tokens that were given out and not revoked, by digest: a look-up then takes no time that
/// depends on how much of a guess was right.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    runs: Mutex<HashMap<Digested, Option<Arc<Run>>>>,
}

/// What a token from outside turned out to be.
#[derive(Debug)]
pub(super) enum Admission {
    UnknownToken,
    NoRun,
    Run(Arc<Run>),
}

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digested, Option<Arc<Run>>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn issue(self: &Arc<Self>) -> AgentToken {
        let mut random = [0_u8; 32];
        rustls::crypto::ring::default_provider()
            .secure_random
            .fill(&mut random)
            .expect("the kernel has random bytes");
        let text = URL_SAFE_NO_PAD.encode(random);
        let digest = digest(&text);
        self.lock().insert(digest, None);
        AgentToken {
            text,
            digest,
            tokens: Arc::downgrade(self),
        }
    }

    pub(super) fn admit(&self, token: &str) -> Admission {
        match self.lock().get(&digest(token)) {
            None => Admission::UnknownToken,
            Some(None) => Admission::NoRun,
            Some(Some(run)) => Admission::Run(run.clone()),
        }
    }
}

fn digest(token: &str) -> Digested {
    Sha256::digest(token.as_bytes()).into()
}

/// A bearer token for one CLI process. It opens nothing unless a run is active, and nothing at all
/// outside this program. Dropping it revokes it and cuts what is under way for it.
pub struct AgentToken {
    text: String,
    digest: Digested,
    tokens: Weak<Tokens>,
}

impl AgentToken {
    /// The token as the CLI sends it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Opens the gateway to this token for one run, until the guard is dropped. `label` names the
    /// run in the log (a turn's id). A run that was still active is over with that.
    pub fn begin(&self, label: impl Into<String>) -> ActiveRun {
        let run = Arc::new(Run {
            label: label.into(),
            requests: AtomicU64::new(0),
            note: Mutex::new(None),
            over: CancellationToken::new(),
        });
        if let Some(tokens) = self.tokens.upgrade()
            && let Some(Some(previous)) = tokens.lock().insert(self.digest, Some(run.clone()))
        {
            previous.over.cancel();
        }
        ActiveRun {
            run,
            digest: self.digest,
            tokens: self.tokens.clone(),
        }
    }
}

impl fmt::Debug for AgentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentToken(…)")
    }
}

impl Drop for AgentToken {
    fn drop(&mut self) {
        if let Some(tokens) = self.tokens.upgrade()
            && let Some(Some(run)) = tokens.lock().remove(&self.digest)
        {
            run.over.cancel();
        }
    }
}

/// A run that may use the gateway now. Dropping it ends that: later requests get 403, those under
/// way are cut.
#[derive(Debug)]
pub struct ActiveRun {
    run: Arc<Run>,
    digest: Digested,
    tokens: Weak<Tokens>,
}

impl ActiveRun {
    /// How many requests were admitted for this run.
    pub fn requests(&self) -> u64 {
        self.run.requests.load(Ordering::Relaxed)
    }

    /// How the upstream met the last request that it answered or could not.
    pub fn upstream_note(&self) -> Option<UpstreamNote> {
        *self.run.note()
    }

    /// The status of the upstream's last answer; `None` before the first one and while it cannot
    /// be reached.
    pub fn last_upstream_status(&self) -> Option<u16> {
        match self.upstream_note()? {
            UpstreamNote::Answered { status, .. } => Some(status),
            UpstreamNote::Unreachable => None,
        }
    }
}

impl Drop for ActiveRun {
    fn drop(&mut self) {
        self.run.over.cancel();
        if let Some(tokens) = self.tokens.upgrade()
            && let Some(current) = tokens.lock().get_mut(&self.digest)
            && current
                .as_ref()
                .is_some_and(|run| Arc::ptr_eq(run, &self.run))
        {
            *current = None;
        }
    }
}

impl Run {
    fn note(&self) -> MutexGuard<'_, Option<UpstreamNote>> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request on its way through: the single place that sees its start, the head and every chunk
/// of the answer, and how it ended. Counting tokens and budgets belong here.
///
/// Dropping it without [`Exchange::complete`] means that it was cut, by whichever side.
#[derive(Debug)]
pub(super) struct Exchange {
    run: Arc<Run>,
    started: Instant,
    status: Option<StatusCode>,
    bytes: u64,
    completed: bool,
}

impl Exchange {
    pub(super) fn start(run: Arc<Run>) -> Self {
        run.requests.fetch_add(1, Ordering::Relaxed);
        Self {
            run,
            started: Instant::now(),
            status: None,
            bytes: 0,
            completed: false,
        }
    }

    pub(super) fn run(&self) -> &Run {
        &self.run
    }

    pub(super) fn unreachable(&mut self) {
        *self.run.note() = Some(UpstreamNote::Unreachable);
    }

    pub(super) fn head(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = Some(status);
        *self.run.note() = Some(UpstreamNote::Answered {
            status: status.as_u16(),
            retry_after: headers
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                .map(Duration::from_secs),
        });
    }

    pub(super) fn chunk(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
    }

    pub(super) fn complete(&mut self) {
        self.completed = true;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        tracing::debug!(
            run = self.run.label,
            status = self.status.map(|status| status.as_u16()),
            bytes = self.bytes,
            completed = self.completed,
            elapsed_ms = self.started.elapsed().as_millis() as u64,
            "a model request ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(tokens: &Tokens, token: &str) -> String {
        match tokens.admit(token) {
            Admission::UnknownToken => "unknown".into(),
            Admission::NoRun => "no run".into(),
            Admission::Run(run) => run.label.clone(),
        }
    }

    #[test]
    fn a_token_serves_the_run_that_was_begun_last() {
        let tokens = Arc::new(Tokens::default());
        let token = tokens.issue();
        let text = token.as_str().to_owned();
        assert_eq!(text.len(), 43);
        assert_ne!(text, tokens.issue().as_str());
        assert_eq!(admitted(&tokens, &text), "no run");
        let first = token.begin("first");
        let second = token.begin("second");
        assert!(first.run.over.is_cancelled());
        drop(first);
        assert_eq!(admitted(&tokens, &text), "second");
        drop(second);
        assert_eq!(admitted(&tokens, &text), "no run");
        let last = token.begin("last");
        drop(token);
        assert!(last.run.over.is_cancelled());
        assert_eq!(admitted(&tokens, &text), "unknown");
    }
}
