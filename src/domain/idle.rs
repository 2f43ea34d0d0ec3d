//! May the container stop? A question with an answer.

use std::time::{Duration, Instant};

/// What the idle question depends on.
#[derive(Debug, Clone, Copy)]
pub struct IdleFacts {
    /// Turns, requests, people: whoever needs us now.
    pub holders: usize,
    /// When the last of them left, or the start.
    pub idle_since: Instant,
    /// `None`: never shut down.
    pub limit: Option<Duration>,
    pub now: Instant,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleDecision {
    /// Somebody needs us.
    Held,
    /// Nobody does, and it will never end us.
    Forever,
    /// Nobody does; stop then, unless somebody comes.
    StopAt(Instant),
    /// Stop now.
    Stop,
}

/// Decides; pure.
pub fn decide_idle(facts: IdleFacts) -> IdleDecision {
    if facts.holders > 0 {
        return IdleDecision::Held;
    }
    let Some(limit) = facts.limit else {
        return IdleDecision::Forever;
    };
    match facts.idle_since.checked_add(limit) {
        None => IdleDecision::Forever,
        Some(at) if facts.now >= at => IdleDecision::Stop,
        Some(at) => IdleDecision::StopAt(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let start = Instant::now();
        let minute = Duration::from_secs(60);
        let ask = |holders, limit, after: Duration| {
            decide_idle(IdleFacts {
                holders,
                idle_since: start,
                limit,
                now: start + after,
            })
        };
        assert_eq!(ask(1, Some(minute), 2 * minute), IdleDecision::Held);
        assert_eq!(ask(0, None, 1000 * minute), IdleDecision::Forever);
        assert_eq!(
            ask(0, Some(minute), minute / 2),
            IdleDecision::StopAt(start + minute)
        );
        assert_eq!(ask(0, Some(minute), minute), IdleDecision::Stop);
        assert_eq!(ask(0, Some(Duration::MAX), minute), IdleDecision::Forever);
    }
}
