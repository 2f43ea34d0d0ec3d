//! The circuit breaker: when most runs fail, more of them would fail too. It is given the time.
//!
//! ```text
//! Closed ── half of at least 10 failed ──► Open ── 30 s ──► HalfOpen ── one run succeeds ──► Closed
//!                                            ▲                  │
//!                                            └── that run fails ┘
//! ```

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Outcomes that are looked at: the newest so many, and none that is older.
const WINDOW: usize = 20;
const WINDOW_AGE: Duration = Duration::from_secs(10 * 60);
/// Fewer tell nothing.
const LEAST: usize = 10;
/// How long nothing is tried.
const PAUSE: Duration = Duration::from_secs(30);

/// Where the breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Runs go on.
    Closed,
    /// Nothing is tried.
    Open,
    /// One run at a time is tried.
    HalfOpen,
}

impl BreakerState {
    /// All of them, for metrics.
    pub const ALL: [Self; 3] = [Self::Closed, Self::Open, Self::HalfOpen];

    /// As in metrics and the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        }
    }
}

/// How a run that was let through ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Success,
    Failure,
    /// Tells nothing: the caller went away.
    Unknown,
}

/// Of a run that was let through; to be given back with how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// How often the breaker had changed: what a run of before tells is old news.
    epoch: u64,
}

#[derive(Debug)]
enum Inner {
    Closed(VecDeque<(Instant, bool)>),
    Open { until: Instant },
    HalfOpen { is_trying: bool },
}

/// See the module.
#[derive(Debug)]
pub struct Breaker {
    inner: Inner,
    epoch: u64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new()
    }
}

impl Breaker {
    /// Closed.
    pub fn new() -> Self {
        Self {
            inner: Inner::Closed(VecDeque::new()),
            epoch: 0,
        }
    }

    /// Where it stands.
    pub fn state(&self, now: Instant) -> BreakerState {
        match self.inner {
            Inner::Closed(_) => BreakerState::Closed,
            Inner::Open { until } if now < until => BreakerState::Open,
            Inner::Open { .. } | Inner::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// How long it is of no use to ask; `None`: a run may be let through.
    pub fn refusal(&self, now: Instant) -> Option<Duration> {
        match self.inner {
            Inner::Open { until } if now < until => Some(until - now),
            // The one that is tried takes no longer than anybody knows: look again soon.
            Inner::HalfOpen { is_trying: true } => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// Lets a run through, or says how long to wait.
    ///
    /// # Errors
    /// How long it is of no use to ask again.
    pub fn enter(&mut self, now: Instant) -> Result<Pass, Duration> {
        if let Some(wait) = self.refusal(now) {
            return Err(wait);
        }
        if !matches!(self.inner, Inner::Closed(_)) {
            if matches!(self.inner, Inner::Open { .. }) {
                self.epoch += 1;
            }
            self.inner = Inner::HalfOpen { is_trying: true };
        }
        Ok(Pass { epoch: self.epoch })
    }

    /// Takes in how a run ended.
    pub fn leave(&mut self, pass: Pass, verdict: Verdict, now: Instant) {
        if pass.epoch != self.epoch {
            return;
        }
        let next = match (&mut self.inner, verdict) {
            (Inner::Closed(outcomes), Verdict::Success | Verdict::Failure) => {
                outcomes.push_back((now, verdict == Verdict::Failure));
                while outcomes.len() > WINDOW
                    || outcomes
                        .front()
                        .is_some_and(|(at, _)| now.duration_since(*at) > WINDOW_AGE)
                {
                    outcomes.pop_front();
                }
                let failed = outcomes.iter().filter(|(_, failed)| *failed).count();
                if outcomes.len() < LEAST || failed * 2 < outcomes.len() {
                    return;
                }
                Inner::Open { until: now + PAUSE }
            }
            (Inner::HalfOpen { .. }, Verdict::Success) => Inner::Closed(VecDeque::new()),
            (Inner::HalfOpen { .. }, Verdict::Failure) => Inner::Open { until: now + PAUSE },
            (Inner::HalfOpen { is_trying }, Verdict::Unknown) => {
                *is_trying = false;
                return;
            }
            (Inner::Closed(_), Verdict::Unknown) | (Inner::Open { .. }, _) => return,
        };
        self.inner = next;
        self.epoch += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a story: `s` a success, `f` a failure, `u` one that tells nothing (each let through
    /// and ended at once), `x` one that is refused, `.` a second, `|` ten minutes, `(` one that is
    /// let through, `)` the failure of the oldest of those.
    fn play(story: &str) -> BreakerState {
        let mut breaker = Breaker::new();
        let mut now = Instant::now();
        let mut open = VecDeque::new();
        for (at, sign) in story.chars().enumerate() {
            let verdict = match sign {
                's' => Verdict::Success,
                'f' => Verdict::Failure,
                'u' => Verdict::Unknown,
                '.' => {
                    now += Duration::from_secs(1);
                    continue;
                }
                '|' => {
                    now += WINDOW_AGE + Duration::from_secs(1);
                    continue;
                }
                '(' => {
                    open.push_back(breaker.enter(now).unwrap());
                    continue;
                }
                ')' => {
                    breaker.leave(open.pop_front().unwrap(), Verdict::Failure, now);
                    continue;
                }
                'x' => {
                    let wait = breaker.enter(now).expect_err(&format!("{at} of {story}"));
                    assert!(wait <= PAUSE && wait > Duration::ZERO);
                    continue;
                }
                ' ' => continue,
                other => panic!("{other}"),
            };
            let pass = breaker
                .enter(now)
                .unwrap_or_else(|_| panic!("refused at {at} of {story}"));
            breaker.leave(pass, verdict, now);
        }
        breaker.state(now)
    }

    #[test]
    fn it_opens_closes_and_tries_as_drawn() {
        use BreakerState::{Closed, HalfOpen, Open};
        let pause = ".".repeat(30);
        for (story, state) in [
            ("", Closed),
            ("fffffffff", Closed),
            ("ffffffffff", Open),
            ("ffffffffffx", Open),
            ("sssssfffff", Open),
            ("ssssssffff", Closed),
            ("ssssssffffs f", Closed),
            ("ssssssffff ff", Open),
            // What tells nothing does not count.
            ("uuuuuuuuuuuuuu fffffffff", Closed),
            // Twenty successes are forgotten after ten failures more.
            ("ssssssssssssssssssss fffffffff", Closed),
            ("ssssssssssssssssssss ffffffffff", Open),
            // And after a while anyway.
            ("fffffffff | f", Closed),
            ("fffffffff | fffffffff f", Open),
        ] {
            assert_eq!(play(story), state, "{story}");
        }
        let open = format!("ffffffffff{pause}");
        for (story, state) in [
            ("", HalfOpen),
            ("s", Closed),
            ("sfffffffff", Closed),
            ("f", Open),
            ("fx", Open),
            // One at a time.
            ("(x", HalfOpen),
            ("(x)x", Open),
            // One that tells nothing makes room for another.
            ("us", Closed),
            ("uuf", Open),
        ] {
            let story = format!("{open}{story}");
            assert_eq!(play(&story), state, "{story}");
        }
        let again = format!("{open}f{}", &pause[1..]);
        assert_eq!(play(&format!("{again}x")), Open);
        assert_eq!(play(&format!("{again}.s")), Closed);
        // Those that were under way when it opened tell nothing about the one that is tried.
        assert_eq!(play(&format!("(( ffffffffff{pause})) s")), Closed);
        assert_eq!(play(&format!("( ffffffffff{pause} s )")), Closed);
    }

    #[test]
    fn the_pause_is_told() {
        let (mut breaker, now) = (Breaker::new(), Instant::now());
        for _ in 0..LEAST {
            let pass = breaker.enter(now).unwrap();
            breaker.leave(pass, Verdict::Failure, now);
        }
        let later = now + Duration::from_secs(12);
        assert_eq!(breaker.refusal(later), Some(Duration::from_secs(18)));
        assert_eq!(breaker.enter(later), Err(Duration::from_secs(18)));
    }
}
