//! How slowly a browser may send a request's body: a connection that drips would be held for ever.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

use super::alarm::Alarm;

/// Without any byte.
const SILENCE: Duration = Duration::from_secs(30);
/// Of waiting that everybody may cause, before the least rate counts.
const GRACE: Duration = Duration::from_secs(60);
/// Bytes a second after that: a modem's first years.
const LEAST_RATE: u64 = 100;

/// Of one body. Only the time counts in which somebody waits for more of it.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    alarm: Alarm,
    waiting_since: Option<Instant>,
    waited: Duration,
    received: u64,
}

impl Pace {
    /// So many bytes came.
    pub(crate) fn came(&mut self, bytes: usize) {
        if let Some(since) = self.waiting_since.take() {
            self.waited += since.elapsed();
        }
        self.received += bytes as u64;
    }

    /// Nothing more is there: is it too slow?
    pub(crate) fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        let allowed = GRACE + Duration::from_secs(self.received / LEAST_RATE);
        let left = allowed.saturating_sub(self.waited);
        self.alarm.poll(cx, since + left.min(SILENCE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After how many seconds a body is cut off that brings so many bytes each so many seconds.
    async fn cut_off(bytes: usize, every: u64, limit: u64) -> Option<u64> {
        let begun = Instant::now();
        let mut pace = Pace::default();
        while begun.elapsed().as_secs() < limit {
            let next = tokio::time::sleep(Duration::from_secs(every));
            tokio::select! {
                biased;
                () = std::future::poll_fn(|cx| pace.poll_too_slow(cx)) => {
                    return Some(begun.elapsed().as_secs());
                }
                () = next => pace.came(bytes),
            }
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn drips_are_cut_off_and_slow_lines_are_not() {
        assert_eq!(cut_off(1, 1000, 2000).await, Some(30), "nothing comes");
        assert_eq!(cut_off(1, 20, 2000).await, Some(60), "a byte now and then");
        assert_eq!(cut_off(1, 1, 2000).await, Some(60));
        assert_eq!(cut_off(200, 1, 2000).await, None, "slow, but steady");
        assert_eq!(cut_off(100_000, 29, 2000).await, None, "in bursts");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_site_is_not_the_browsers_fault() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            // There is always more; the site takes its time.
            pace.came(10);
            tokio::time::sleep(Duration::from_secs(25)).await;
        }
        let wait = std::future::poll_fn(|cx| pace.poll_too_slow(cx));
        assert!(
            tokio::time::timeout(Duration::from_secs(29), wait)
                .await
                .is_err()
        );
    }
}
