//! Who needs the container: guards, not pings. A request, a queued or running turn and a person
//! at a preview each hold one; when the last is gone the idle clock starts.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Notify;
use utoipa::ToSchema;

use crate::domain::{IdleDecision, IdleFacts, decide_idle};

/// A visible page says so every 30 s; it counts for half as long again.
const PERSON_STAYS: Duration = Duration::from_secs(45);
/// People at previews that are told apart; more count as one of these.
const MAX_PEOPLE: usize = 1024;

/// What keeps the container awake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HolderKind {
    Turn,
    Queue,
    Preview,
    Request,
}

/// One of those that keep it awake.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Holder {
    pub kind: HolderKind,
    #[schema(value_type = String)]
    pub who: Cow<'static, str>,
    /// RFC 3339, UTC.
    #[schema(value_type = String)]
    pub since: Timestamp,
}

/// What `GET /api/idle` answers.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IdleAnswer {
    #[schema(value_type = Option<String>)]
    pub idle_since: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub stops_at: Option<Timestamp>,
    pub holders: Vec<Holder>,
}

#[derive(Debug)]
struct State {
    holders: BTreeMap<u64, Holder>,
    /// Until when each preview has a person at it.
    people: HashMap<String, (Instant, Timestamp)>,
    idle_since: Instant,
    /// The same by the wall's clock, once somebody asked.
    idle_since_utc: Option<Timestamp>,
    /// [`Activity::idle`] waits for the last holder to go.
    is_awaited: bool,
}

impl State {
    /// People go away without saying so: the idle clock starts when the last one's time is up.
    fn expire_people(&mut self, now: Instant) {
        let mut last = None;
        self.people.retain(|_, (until, _)| {
            if *until > now {
                return true;
            }
            last = last.max(Some(*until));
            false
        });
        if let Some(until) = last {
            self.idle_from(until);
        }
    }

    fn idle_from(&mut self, at: Instant) {
        if at > self.idle_since {
            self.idle_since = at;
            self.idle_since_utc = None;
        }
    }

    fn idle_since_utc(&mut self) -> Timestamp {
        let ago = jiff::SignedDuration::try_from(self.idle_since.elapsed()).unwrap_or_default();
        *self.idle_since_utc.get_or_insert_with(|| {
            let now = Timestamp::now();
            now.checked_sub(ago).unwrap_or(now)
        })
    }
}

/// The register of activity. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Activity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit: Option<Duration>,
    next: AtomicU64,
    state: Mutex<State>,
    changed: Notify,
}

/// Keeps the container awake until it is dropped.
#[derive(Debug)]
pub struct Guard {
    activity: Activity,
    id: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut state = self.activity.lock();
        state.holders.remove(&self.id);
        if !state.holders.is_empty() {
            return;
        }
        state.idle_from(Instant::now());
        // Every request for a page comes by here: nobody is woken without need.
        if std::mem::take(&mut state.is_awaited) {
            drop(state);
            self.activity.0.changed.notify_one();
        }
    }
}

impl Activity {
    /// `limit`: how long nobody may need us before we stop; `None` is for ever.
    pub fn new(limit: Option<Duration>) -> Self {
        Self(Arc::new(Shared {
            limit,
            next: AtomicU64::new(0),
            state: Mutex::new(State {
                holders: BTreeMap::new(),
                people: HashMap::new(),
                idle_since: Instant::now(),
                idle_since_utc: None,
                is_awaited: false,
            }),
            changed: Notify::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the container awake while the guard lives.
    pub fn hold(&self, kind: HolderKind, who: impl Into<Cow<'static, str>>) -> Guard {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let holder = Holder {
            kind,
            who: who.into(),
            since: Timestamp::now(),
        };
        self.lock().holders.insert(id, holder);
        Guard {
            activity: self.clone(),
            id,
        }
    }

    /// Counts once, now.
    pub fn touch(&self) {
        self.lock().idle_from(Instant::now());
        self.0.changed.notify_one();
    }

    /// A page of this preview is visible to a person.
    pub fn person(&self, preview: &str) {
        let until = Instant::now() + PERSON_STAYS;
        let mut state = self.lock();
        if let Some((stays, _)) = state.people.get_mut(preview) {
            *stays = until;
        } else if state.people.len() < MAX_PEOPLE {
            state
                .people
                .insert(preview.to_owned(), (until, Timestamp::now()));
        }
    }

    /// Holders of a kind, now.
    pub fn count(&self, kind: HolderKind) -> usize {
        let mut state = self.lock();
        state.expire_people(Instant::now());
        let people = if kind == HolderKind::Preview {
            state.people.len()
        } else {
            0
        };
        people
            + state
                .holders
                .values()
                .filter(|holder| holder.kind == kind)
                .count()
    }

    /// How long nobody has needed us.
    pub fn idle_for(&self) -> Duration {
        let mut state = self.lock();
        state.expire_people(Instant::now());
        if state.holders.is_empty() && state.people.is_empty() {
            state.idle_since.elapsed()
        } else {
            Duration::ZERO
        }
    }

    fn decide(&self, state: &State, now: Instant) -> IdleDecision {
        decide_idle(IdleFacts {
            holders: state.holders.len() + state.people.len(),
            idle_since: state.idle_since,
            limit: self.0.limit,
            now,
        })
    }

    /// What keeps us awake, or since when nothing does.
    pub fn answer(&self) -> IdleAnswer {
        let now = Instant::now();
        let mut state = self.lock();
        state.expire_people(now);
        let mut holders: Vec<Holder> = state.holders.values().cloned().collect();
        holders.extend(state.people.iter().map(|(who, (_, since))| Holder {
            kind: HolderKind::Preview,
            who: who.clone().into(),
            since: *since,
        }));
        holders.sort_by_key(|holder| holder.since);
        let stops_at = match self.decide(&state, now) {
            IdleDecision::StopAt(at) => Some(at.saturating_duration_since(now)),
            IdleDecision::Stop => Some(Duration::ZERO),
            IdleDecision::Held | IdleDecision::Forever => None,
        };
        IdleAnswer {
            idle_since: holders.is_empty().then(|| state.idle_since_utc()),
            stops_at: stops_at.map(in_the_future),
            holders,
        }
    }

    /// Returns once nobody has needed us for the limit. `going` is told before, `ahead` of it and
    /// once for each time that it comes so far, when that will be.
    pub async fn idle(&self, ahead: Duration, going: impl Fn(Timestamp)) {
        let mut is_told = false;
        loop {
            let now = Instant::now();
            let wait = {
                let mut state = self.lock();
                state.expire_people(now);
                let decision = self.decide(&state, now);
                state.is_awaited = decision == IdleDecision::Held;
                match decision {
                    IdleDecision::Stop => return,
                    IdleDecision::StopAt(at) => {
                        let left = at - now;
                        if left > ahead {
                            is_told = false;
                            left - ahead
                        } else {
                            if !std::mem::replace(&mut is_told, true) {
                                going(in_the_future(left));
                            }
                            left
                        }
                    }
                    IdleDecision::Held | IdleDecision::Forever => state
                        .people
                        .values()
                        .map(|(until, _)| until.saturating_duration_since(now))
                        .max()
                        .unwrap_or(Duration::from_secs(3600)),
                }
            };
            // Woken by the last guard's drop; a person's end is only seen by the clock.
            tokio::time::timeout(wait, self.0.changed.notified())
                .await
                .ok();
        }
    }
}

fn in_the_future(wait: Duration) -> Timestamp {
    let now = Timestamp::now();
    jiff::SignedDuration::try_from(wait)
        .ok()
        .and_then(|wait| now.checked_add(wait).ok())
        .unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stops_once_the_last_holder_is_gone() {
        let activity = Activity::new(Some(Duration::from_millis(30)));
        let turn = activity.hold(HolderKind::Turn, "a/b/c");
        let waiting = activity.clone();
        let told = std::cell::Cell::new(0);
        let count = |_| told.set(told.get() + 1);
        let mut idle = std::pin::pin!(waiting.idle(Duration::from_secs(60), count));
        assert!(
            tokio::time::timeout(Duration::from_millis(100), &mut idle)
                .await
                .is_err()
        );
        let answer = activity.answer();
        assert_eq!(
            (answer.idle_since, answer.stops_at, answer.holders.len()),
            (None, None, 1)
        );
        drop(turn);
        assert!(activity.answer().stops_at.is_some());
        tokio::time::timeout(Duration::from_secs(10), idle)
            .await
            .unwrap();
        assert_eq!(told.get(), 1);
    }

    #[test]
    fn a_person_at_a_page_holds() {
        let activity = Activity::new(Some(Duration::ZERO));
        activity.person("slug");
        let answer = activity.answer();
        assert_eq!(answer.holders[0].kind, HolderKind::Preview);
        assert_eq!(activity.idle_for(), Duration::ZERO);
    }
}
