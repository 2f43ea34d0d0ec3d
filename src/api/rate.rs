//! How often a caller may ask: so many calls a minute, in one burst or one after another.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::NoOpMiddleware,
    state::keyed::HashMapStateStore,
};

use super::ApiError;

/// Callers that are remembered before those that have been quiet are forgotten.
const MAX_CALLERS: usize = 10_000;

/// The address that a request came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

type Buckets<C> =
    RateLimiter<IpAddr, HashMapStateStore<IpAddr>, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// One bucket for each caller. Loopback has none.
#[derive(Debug)]
pub struct RateLimit<C: Clock = MonotonicClock> {
    limiter: Option<Buckets<C>>,
    clock: C,
}

impl RateLimit {
    /// 0 is no limit.
    pub fn per_minute(calls: u32) -> Self {
        Self::with_clock(calls, MonotonicClock)
    }
}

impl<C: Clock + Clone> RateLimit<C> {
    fn with_clock(calls: u32, clock: C) -> Self {
        let quota = NonZeroU32::new(calls).map(Quota::per_minute);
        Self {
            limiter: quota.map(|quota| RateLimiter::hashmap_with_clock(quota, clock.clone())),
            clock,
        }
    }

    /// Counts a call.
    pub(super) fn check(&self, peer: Option<Peer>) -> Result<(), ApiError> {
        let (Some(limiter), Some(Peer(address))) = (&self.limiter, peer) else {
            return Ok(());
        };
        let address = address.to_canonical();
        if address.is_loopback() {
            return Ok(());
        }
        if limiter.len() >= MAX_CALLERS {
            limiter.retain_recent();
        }
        let too_early = match limiter.check_key(&caller(address)) {
            Ok(()) => return Ok(()),
            Err(too_early) => too_early,
        };
        let wait = too_early.wait_time_from(self.clock.now());
        Err(ApiError::rate_limited(wait))
    }
}

/// Who has an IPv6 address has the whole network of it.
fn caller(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::response::IntoResponse;
    use governor::clock::FakeRelativeClock;

    use super::*;

    #[test]
    fn each_caller_has_a_minute_s_worth_and_loopback_has_no_end_of_it() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::with_clock(100, clock.clone());
        let ask = |from: &str| limit.check(Some(Peer(from.parse().unwrap())));
        for _ in 0..100 {
            ask("203.0.113.7").unwrap();
        }
        let refused = ask("203.0.113.7").unwrap_err().into_response();
        assert_eq!(refused.status(), 429);
        assert_eq!(refused.headers()["retry-after"], "1");
        // The same address in IPv6's clothes is the same caller; others have their own.
        assert!(ask("::ffff:203.0.113.7").is_err());
        ask("203.0.113.8").unwrap();
        for n in 0..100 {
            ask(&format!("2001:db8:1:1::{n:x}")).unwrap();
        }
        assert!(ask("2001:db8:1:1:ffff::1").is_err(), "one network");
        ask("2001:db8:1:2::1").unwrap();
        for _ in 0..1000 {
            ask("127.0.0.1").unwrap();
            ask("127.8.8.8").unwrap();
            ask("::1").unwrap();
            ask("::ffff:127.0.0.1").unwrap();
        }
        clock.advance(Duration::from_millis(600));
        ask("203.0.113.7").unwrap();
        assert!(ask("203.0.113.7").is_err());
        clock.advance(Duration::from_secs(60));
        for _ in 0..100 {
            ask("203.0.113.7").unwrap();
        }
        assert!(
            RateLimit::per_minute(0)
                .check(Some(Peer([1, 2, 3, 4].into())))
                .is_ok()
        );
    }

    #[test]
    fn many_callers_are_forgotten_once_they_are_quiet() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::with_clock(100, clock.clone());
        for n in 0..u32::try_from(MAX_CALLERS).unwrap() {
            limit
                .check(Some(Peer(IpAddr::from((n + (1 << 24)).to_be_bytes()))))
                .unwrap();
        }
        clock.advance(Duration::from_secs(120));
        limit.check(Some(Peer([9, 9, 9, 9].into()))).unwrap();
        assert!(limit.limiter.unwrap().len() < 10);
    }
}
