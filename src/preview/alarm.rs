//! A timer for deadlines that nearly always move away before they come: it is armed anew only
//! when it rings, not with every deadline. A timer per request costs the proxy more than its
//! routing does.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Belongs to one task, which it may wake for nothing when a deadline has moved away.
#[derive(Debug, Default)]
pub(crate) struct Alarm(Option<Pin<Box<Sleep>>>);

/// The deadline came first.
#[derive(Debug)]
pub(crate) struct Elapsed;

impl Alarm {
    /// Is this deadline over?
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self
            .0
            .get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
        Poll::Pending
    }

    /// Waits for a future until a deadline. The future stays where it is: one that holds a request
    /// is large.
    pub(crate) async fn limit<F: Future>(
        &mut self,
        deadline: Instant,
        mut future: Pin<&mut F>,
    ) -> Result<F::Output, Elapsed> {
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => self.poll(cx, deadline).map(|()| Err(Elapsed)),
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, time::Duration};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn rings_at_the_last_deadline_that_it_was_given() {
        let mut alarm = Alarm::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let never = std::future::pending::<()>;
        let soon = tokio::time::sleep(Duration::from_secs(3));
        assert!(alarm.limit(at(10), pin!(soon)).await.is_ok());
        // Later than the one that it is armed for, then sooner.
        assert!(alarm.limit(at(20), pin!(never())).await.is_err());
        assert_eq!(start.elapsed().as_secs(), 20);
        let soon = tokio::time::sleep(Duration::from_secs(1));
        assert!(alarm.limit(at(60), pin!(soon)).await.is_ok());
        assert!(alarm.limit(at(30), pin!(never())).await.is_err());
        assert_eq!(start.elapsed().as_secs(), 30);
        // One that is over already.
        assert!(alarm.limit(at(5), pin!(never())).await.is_err());
        assert_eq!(start.elapsed().as_secs(), 30);
    }
}
