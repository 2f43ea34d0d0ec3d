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
use futures_util::future::BoxFuture;
use http::{HeaderMap, StatusCode};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{ActivityGuard, toll::Toll};
use crate::{
    domain::Account,
    outbound::retry_after,
    usage::{Ledger, Meter, News, Spent},
};

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

/// The upstream asked for a pause that the CLI would not wait out: the gateway does, holding the
/// CLI's request meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// What the upstream answered.
    pub status: u16,
    pub until: tokio::time::Instant,
}

/// What a model request is, as far as a [`Gate`] judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passing {
    /// Images in it.
    pub images: u64,
    /// Requests of its run that were answered before, wholly or in part.
    pub answered: u64,
}

/// Asked about each model request of a run once it is paid for, and before its last piece goes up:
/// an error, which the CLI is told, keeps it here and gives the money back. While it is awaited
/// nothing has gone up that the upstream could answer.
#[derive(Clone)]
pub struct Gate {
    ask: Arc<Ask>,
    wait: Option<Arc<Wait>>,
    /// The most tokens that a prompt may have. By its bytes alone an image would pass for a book.
    pub(super) most_prompt: u64,
}

type Wait = dyn Fn() -> BoxFuture<'static, Pass> + Send + Sync;

/// What a request waited for. It is told once the request was answered, successfully and whole.
pub struct Pass(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Pass {
    /// One that tells this.
    pub fn new(answered: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(answered)))
    }

    fn answered(&mut self) {
        if let Some(tell) = self.0.take() {
            tell();
        }
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pass")
    }
}

type Ask = dyn Fn(Passing) -> BoxFuture<'static, Result<(), &'static str>> + Send + Sync;

impl Gate {
    /// One that asks this, of a run whose prompts have at most so many tokens.
    pub fn new(
        most_prompt: u64,
        ask: impl Fn(Passing) -> BoxFuture<'static, Result<(), &'static str>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            ask: Arc::new(ask),
            wait: None,
            most_prompt,
        }
    }

    /// The same for a run that was started ahead of its time: each of its requests waits for this before
    /// anything of it goes up or is paid for. What it waits is not counted as the run's time
    /// ([`ActiveRun::held`]).
    #[must_use]
    pub fn after(
        self,
        wait: impl Fn() -> BoxFuture<'static, Pass> + Send + Sync + 'static,
    ) -> Self {
        Self {
            wait: Some(Arc::new(wait)),
            ..self
        }
    }

    /// Does it let requests wait?
    pub fn waits(&self) -> bool {
        self.wait.is_some()
    }

    pub(super) async fn ask(&self, passing: Passing) -> Result<(), &'static str> {
        (self.ask)(passing).await
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

/// One run as the gateway sees it. Shared by its [`ActiveRun`] and the requests under way.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) meter: Meter,
    requests: AtomicU64,
    /// Those of them that are not over.
    under_way: AtomicU64,
    note: Mutex<Option<UpstreamNote>>,
    /// When it is over at the latest; `None`: nothing is held for it.
    deadline: Option<tokio::time::Instant>,
    pub(super) gate: Option<Gate>,
    held: Mutex<Held>,
    hold: watch::Sender<Option<Hold>>,
    /// Cancelled when the run is over: what is still under way for it is cut.
    pub(super) over: CancellationToken,
}

/// How long requests of a run have waited for its [`Gate`].
#[derive(Debug, Default)]
struct Held {
    before: Duration,
    /// One waits since then.
    since: Option<Instant>,
}

impl Held {
    fn total(&self) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// A request that waits.
struct Waiting<'a>(&'a Run);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut held = self.0.held();
        *held = Held {
            before: held.total(),
            since: None,
        };
    }
}

pub(super) type Digested = [u8; 32];

impl Run {
    pub(super) fn new(meter: Meter, deadline: Option<tokio::time::Instant>) -> Self {
        Self {
            meter,
            requests: AtomicU64::new(0),
            under_way: AtomicU64::new(0),
            note: Mutex::new(None),
            deadline,
            gate: None,
            held: Mutex::default(),
            hold: watch::Sender::new(None),
            over: CancellationToken::new(),
        }
    }
}

/// The tokens that were given out and not revoked, by digest: a look-up then takes no time that
/// depends on how much of a guess was right.
#[derive(Debug)]
pub(super) struct Tokens {
    ledger: Ledger,
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
    pub(super) fn new(ledger: Ledger) -> Self {
        Self {
            ledger,
            runs: Mutex::default(),
        }
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

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
            ledger: self.ledger.clone(),
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

pub(super) fn digest(token: &str) -> Digested {
    Sha256::digest(token.as_bytes()).into()
}

/// A bearer token for one CLI process. It opens nothing unless a run is active, and nothing at all
/// outside this program. Dropping it revokes it and cuts what is under way for it.
pub struct AgentToken {
    text: String,
    digest: Digested,
    ledger: Ledger,
    tokens: Weak<Tokens>,
}

impl AgentToken {
    /// The token as the CLI sends it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Opens the gateway to this token for one run, until the guard is dropped; the run's requests
    /// are charged to `account`. A run that was still active is over with that.
    pub fn begin(&self, account: Account) -> ActiveRun {
        self.open(account, None, None)
    }

    /// The same for a run that ends by itself at `deadline`: pauses that the upstream asks for and
    /// that are over before are waited out ([`ActiveRun::holds`]).
    pub fn begin_until(&self, account: Account, deadline: tokio::time::Instant) -> ActiveRun {
        self.open(account, Some(deadline), None)
    }

    /// The same for a run each request of which is asked about.
    pub fn begin_gated(
        &self,
        account: Account,
        deadline: tokio::time::Instant,
        gate: Gate,
    ) -> ActiveRun {
        self.open(account, Some(deadline), Some(gate))
    }

    fn open(
        &self,
        account: Account,
        deadline: Option<tokio::time::Instant>,
        gate: Option<Gate>,
    ) -> ActiveRun {
        let run = Arc::new(Run {
            gate,
            ..Run::new(self.ledger.meter(account), deadline)
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

    /// How many of them are not over yet. What they cost is not known before.
    pub fn under_way(&self) -> u64 {
        self.run.under_way.load(Ordering::Acquire)
    }

    /// How the upstream met the last request that it answered or could not.
    pub fn upstream_note(&self) -> Option<UpstreamNote> {
        *self.run.note()
    }

    /// How long its requests have waited for its gate ([`Gate::after`]).
    pub fn held(&self) -> Duration {
        self.run.held().total()
    }

    /// The pauses that are waited out for this run: the newest, as they begin.
    pub fn holds(&self) -> watch::Receiver<Option<Hold>> {
        self.run.hold.subscribe()
    }

    /// Its turn has cost so much before it began, which counts for the turn's budget.
    pub fn spent_before(&self, usd: f64) {
        self.run.meter.spent_before(usd);
    }

    /// What the run has spent so far.
    pub fn spent(&self) -> Spent {
        self.run.meter.spent()
    }

    /// What it should hear of its budgets, as it comes.
    pub fn budget_news(&self) -> watch::Receiver<News> {
        self.run.meter.news()
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
    /// Does somebody want it to go on when the upstream is busy? Else it is told as it is.
    pub(super) fn waits(&self) -> bool {
        self.deadline.is_some()
    }

    /// Waits out a pause, if that is worth it; whether it did. Cancel safe.
    pub(super) async fn wait_out(&self, status: StatusCode, pause: Duration) -> bool {
        let until = tokio::time::Instant::now() + pause;
        if !is_worth_waiting(status, pause) || self.deadline.is_none_or(|end| until >= end) {
            return false;
        }
        let hold = Hold {
            status: status.as_u16(),
            until,
        };
        tracing::warn!(
            run = %self.meter.account(),
            status = hold.status,
            pause_s = pause.as_secs(),
            "the model API asks for a pause; it is waited out"
        );
        self.hold.send_replace(Some(hold));
        tokio::time::sleep_until(until).await;
        true
    }

    /// Waits for what a request of this run has to wait for. Cancel safe.
    pub(super) async fn wait_for_a_pass(&self) -> Option<Pass> {
        let wait = self.gate.as_ref()?.wait.as_ref()?;
        self.held().since = Some(Instant::now());
        let waiting = Waiting(self);
        let pass = wait().await;
        drop(waiting);
        Some(pass)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) -> MutexGuard<'_, Option<UpstreamNote>> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The CLI waits out up to a minute by itself and gives up at once on more; it gives a request up
/// that was not answered for ten (measured with 2.1.329).
fn is_worth_waiting(status: StatusCode, pause: Duration) -> bool {
    matches!(status.as_u16(), 429 | 503 | 529)
        && pause > Duration::from_secs(60)
        && pause < Duration::from_secs(9 * 60 + 30)
}

/// One request on its way through: the single place that sees its start, the head and every chunk
/// of the answer, and how it ended.
///
/// Dropping it without [`Exchange::complete`] means that it was cut, by whichever side.
#[derive(Debug)]
pub(super) struct Exchange {
    run: Arc<Run>,
    /// What is paid for it; `None`: it costs nothing.
    toll: Option<Arc<Toll>>,
    started: Instant,
    status: Option<StatusCode>,
    bytes: u64,
    completed: bool,
    pass: Option<Pass>,
    /// Somebody needs us until it is over.
    _guard: Option<ActivityGuard>,
}

impl Run {
    /// A run with a deadline begins with a message. What its CLI counts before is the CLI getting
    /// ready ([`crate::agent`] asks it to): that is no reason to ask the upstream, and to wait.
    pub(super) fn is_before_its_first_message(&self) -> bool {
        self.deadline.is_some() && self.requests.load(Ordering::Relaxed) == 0
    }
}

impl Exchange {
    pub(super) fn start(
        run: Arc<Run>,
        toll: Option<Arc<Toll>>,
        pass: Option<Pass>,
        guard: Option<ActivityGuard>,
    ) -> Self {
        run.requests.fetch_add(1, Ordering::Relaxed);
        run.under_way.fetch_add(1, Ordering::AcqRel);
        Self {
            run,
            toll,
            started: Instant::now(),
            status: None,
            bytes: 0,
            completed: false,
            pass,
            _guard: guard,
        }
    }

    pub(super) fn run(&self) -> &Run {
        &self.run
    }

    /// It could not be brought to the upstream, or broke off before the answer began.
    pub(super) fn unreachable(&mut self, was_sent: bool) {
        *self.run.note() = Some(UpstreamNote::Unreachable);
        if let Some(toll) = &self.toll
            && !was_sent
        {
            toll.give_back();
        }
    }

    /// The answer begins. What was reserved for it is on the disk when this returns.
    pub(super) async fn head(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = Some(status);
        *self.run.note() = Some(UpstreamNote::Answered {
            status: status.as_u16(),
            retry_after: retry_after(headers),
        });
        if let Some(toll) = &self.toll {
            toll.answered(status, headers).await;
        }
    }

    /// Takes in a chunk. The end of an answer is written down before it goes on.
    pub(super) async fn chunk(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        if let Some(toll) = &self.toll
            && toll.chunk(chunk).await
            && let Some(pass) = &mut self.pass
        {
            pass.answered();
        }
    }

    pub(super) async fn complete(&mut self) {
        self.completed = true;
        if let Some(toll) = &self.toll {
            toll.complete().await;
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(toll) = &self.toll {
            toll.cut();
        }
        self.run.under_way.fetch_sub(1, Ordering::AcqRel);
        tracing::debug!(
            run = %self.run.meter.account(),
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
    use crate::{task::Tasks, usage::LedgerSettings};

    #[test]
    fn a_pause_is_weighed() {
        let worth = |status, seconds| {
            let status = StatusCode::from_u16(status).unwrap();
            is_worth_waiting(status, Duration::from_secs(seconds))
        };
        assert!(worth(429, 90) && worth(529, 500) && worth(503, 61));
        assert!(!worth(429, 3), "the CLI waits");
        assert!(!worth(429, 3600), "the CLI would give up the request");
        assert!(!worth(500, 90));
    }

    fn admitted(tokens: &Tokens, token: &str) -> String {
        match tokens.admit(token) {
            Admission::UnknownToken => "unknown".into(),
            Admission::NoRun => "no run".into(),
            Admission::Run(run) => run.meter.account().kind.to_string(),
        }
    }

    #[test]
    fn a_token_serves_the_run_that_was_begun_last() {
        let ledger = Ledger::new(LedgerSettings::default(), &Tasks::new());
        let tokens = Arc::new(Tokens::new(ledger));
        let token = tokens.issue();
        let text = token.as_str().to_owned();
        assert_eq!(text.len(), 43);
        assert_ne!(text, tokens.issue().as_str());
        assert_eq!(admitted(&tokens, &text), "no run");
        let first = token.begin(Account::of_kind("first"));
        let second = token.begin(Account::of_kind("second"));
        assert!(first.run.over.is_cancelled());
        drop(first);
        assert_eq!(admitted(&tokens, &text), "second");
        drop(second);
        assert_eq!(admitted(&tokens, &text), "no run");
        let last = token.begin(Account::of_kind("last"));
        drop(token);
        assert!(last.run.over.is_cancelled());
        assert_eq!(admitted(&tokens, &text), "unknown");
    }
}
