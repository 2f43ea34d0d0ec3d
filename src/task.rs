//! Tasks with an owner: every long-lived future and every blocking call goes through here.
//!
//! [`Tasks`] names what it starts, hands it a cancellation token and waits for it at the end.
//! [`blocking`] runs disk work on bounded threads with a deadline, so that a stalled disk costs a
//! call, never the program. [`side_by_side`] is for such work itself: many small calls of a disk that
//! takes its time for each.

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    net::SocketAddr,
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// After a connection that could not be accepted: long enough not to spin, short enough to go
/// unnoticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A group of tasks that start, stop and are waited for together. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    token: CancellationToken,
}

impl Tasks {
    /// An empty group.
    pub fn new() -> Self {
        Self::default()
    }

    /// A group that is stopped with this one and can be stopped alone.
    pub fn child(&self) -> Self {
        Self {
            tracker: self.tracker.clone(),
            token: self.token.child_token(),
        }
    }

    /// Cancelled once [`Tasks::stop`] was asked for.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Starts a task. It is expected to end soon after the group's token is cancelled.
    ///
    /// It does not inherit the caller's span: what outlives a request must not carry its id.
    ///
    /// A panic in it is logged and stops the group: half a supervisor is worse than none.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let token = self.token.clone();
        #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
        let inner = tokio::spawn(future);
        let watched = async move {
            // Abort with the watcher: a dropped join handle would let the task run on.
            let guard = AbortOnDrop(inner.abort_handle());
            if let Err(error) = inner.await
                && error.is_panic()
            {
                tracing::error!(task = name, "a task panicked; stopping");
                token.cancel();
            }
            drop(guard);
        };
        #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
        tokio::spawn(self.tracker.track_future(watched))
    }

    /// A thread of its own with a runtime of its own, on which everything runs that `start`
    /// spawns, until this group has ended. For what must neither wait for other work nor pay for
    /// being moved between threads.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn spawn_apart<F>(&self, name: &'static str, start: F) -> std::io::Result<()>
    where
        F: FnOnce() -> std::io::Result<()> + Send + 'static,
    {
        let tasks = self.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let run = async move {
            if let Err(error) = start() {
                tracing::error!(task = name, %error, "a task could not start; stopping");
                tasks.token.cancel();
            }
            tasks.token.cancelled().await;
            tasks.tracker.wait().await;
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || runtime.block_on(run))?;
        Ok(())
    }

    /// Accepts connections until the group is stopped, at most `most` at once; what is made of each
    /// is a task, which keeps the permit for as long as the connection is open.
    pub async fn accept<F>(
        &self,
        name: &'static str,
        listener: TcpListener,
        most: usize,
        serve: impl Fn(TcpStream, SocketAddr, OwnedSemaphorePermit) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let permits = Arc::new(Semaphore::new(most));
        let accept = async {
            loop {
                let permit = permits.clone().acquire_owned().await;
                let permit = permit.expect("the semaphore is never closed");
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        // Else the kernel may hold back a small piece until the one before is
                        // acknowledged.
                        stream.set_nodelay(true).ok();
                        self.spawn(name, serve(stream, peer, permit));
                    }
                    Err(error) => {
                        // Out of descriptors, mostly: it passes, and must not become a busy loop.
                        tracing::warn!(task = name, %error, "a connection was not accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        self.token.run_until_cancelled(accept).await;
    }

    /// Cancels the token without waiting.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Cancels the token and waits until every task has ended or `grace` is over.
    /// Returns whether all ended.
    pub async fn stop(&self, grace: Duration) -> bool {
        self.token.cancel();
        self.tracker.close();
        tokio::time::timeout(grace, self.tracker.wait())
            .await
            .is_ok()
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Locks by name: one holder of a name at a time, any number of names. Cheap to clone.
#[derive(Debug)]
pub struct NamedLocks<K>(Arc<Mutex<HashMap<K, Weak<AsyncMutex<()>>>>>);

impl<K> Clone for NamedLocks<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Default for NamedLocks<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash> NamedLocks<K> {
    /// Waits for whoever has this name. Names that nobody holds or waits for are forgotten.
    pub async fn lock(&self, name: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(&name).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(AsyncMutex::new(()));
                locks.insert(name, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

/// A blocking call that did not come back in time, or could not run at all.
#[derive(Debug, thiserror::Error)]
pub enum BlockingError {
    /// The disk (or what else the call waits for) is stuck; the call goes on in its thread.
    #[error("{what} took longer than {} s", deadline.as_secs())]
    TimedOut {
        what: &'static str,
        deadline: Duration,
    },
    /// The closure panicked.
    #[error("{what} failed unexpectedly")]
    Panicked { what: &'static str },
}

/// How many blocking calls run at once. Two cores and a disk gain nothing from more; a stalled
/// disk can pin at most so many threads.
const BLOCKING_THREADS: usize = 16;
static BLOCKING: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(BLOCKING_THREADS)));

/// Runs `work` on a thread of its own kind and waits at most `deadline` for it.
///
/// # Errors
/// [`BlockingError::TimedOut`] if it did not end in time: the work itself cannot be interrupted
/// and may still take effect later.
pub async fn blocking<T, F>(
    what: &'static str,
    deadline: Duration,
    work: F,
) -> Result<T, BlockingError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let run = async {
        let permit = BLOCKING
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let work = move || {
            let _permit = permit;
            work()
        };
        blocking_apart(what, deadline, work).await
    };
    tokio::time::timeout(deadline, run)
        .await
        .unwrap_or(Err(BlockingError::TimedOut { what, deadline }))
}

/// The same on a thread that is not counted: for the little that must not wait behind other work.
///
/// # Errors
/// As [`blocking`].
pub async fn blocking_apart<T, F>(
    what: &'static str,
    deadline: Duration,
    work: F,
) -> Result<T, BlockingError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let span = tracing::Span::current();
    let run = tokio::task::spawn_blocking(move || span.in_scope(work));
    match tokio::time::timeout(deadline, run).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(_)) => Err(BlockingError::Panicked { what }),
        Err(_) => Err(BlockingError::TimedOut { what, deadline }),
    }
}

/// Most threads of one [`side_by_side`]: they wait for the disk nearly all the time.
const ABREAST: usize = 64;
/// A local disk answers in a tenth of that, a network's in several times of it.
const SLOW: Duration = Duration::from_micros(500);
/// What the disk was like lately. A guess: wrong, it costs some threads or some waiting.
static IS_SLOW: AtomicBool = AtomicBool::new(false);

/// Was the disk slow, the last time that [`side_by_side`] had to do with it? A guess.
pub fn is_disk_slow() -> bool {
    IS_SLOW.load(Ordering::Relaxed)
}

/// Does `work` to each of the items, answers in their order. Where the disk is slow they are done side
/// by side, so that the waits overlap; where it is quick one after the other, because threads would
/// cost more than they bring. Blocking.
pub fn side_by_side<I, T, F>(items: &[I], work: F) -> Vec<T>
where
    I: Sync,
    T: Send,
    F: Fn(&I) -> T + Sync,
{
    let mut done = Vec::with_capacity(items.len());
    let timed = |item: &I| {
        let begun = Instant::now();
        let made = work(item);
        (made, begun.elapsed() > SLOW)
    };
    // One late answer is no sign of anything.
    let mut late = if IS_SLOW.load(Ordering::Relaxed) {
        2
    } else {
        0
    };
    while late < 2 {
        let Some(item) = items.get(done.len()) else {
            return done;
        };
        let (made, is_late) = timed(item);
        done.push(made);
        late += u32::from(is_late);
    }
    IS_SLOW.store(true, Ordering::Relaxed);
    let rest = &items[done.len()..];
    if rest.is_empty() {
        return done;
    }
    let (next, slow) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worker = || {
        let mut made = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = rest.get(at) else {
                return made;
            };
            let (one, is_late) = timed(item);
            slow.fetch_add(usize::from(is_late), Ordering::Relaxed);
            made.push((at, one));
        }
    };
    let mut made = std::thread::scope(|scope| {
        let others: Vec<_> = (1..rest.len().min(ABREAST))
            // Those who began first may be through by now.
            .take_while(|_| next.load(Ordering::Relaxed) < rest.len())
            .map(|_| scope.spawn(worker))
            .collect();
        let mut made = worker();
        for other in others {
            match other.join() {
                Ok(more) => made.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        made
    });
    if slow.into_inner() * 4 < rest.len() {
        IS_SLOW.store(false, Ordering::Relaxed);
    }
    made.sort_unstable_by_key(|(at, _)| *at);
    done.extend(made.into_iter().map(|(_, one)| one));
    done
}

/// Waits for a thread; its panic is the caller's.
pub fn end<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_work_is_done_side_by_side_and_answered_in_order() {
        let items: Vec<u64> = (0..64).collect();
        let begun = Instant::now();
        let waits = Duration::from_millis(100);
        let done = side_by_side(&items, |item| {
            std::thread::sleep(waits);
            item * 2
        });
        assert!(begun.elapsed() < waits * 64 / 2, "{:?}", begun.elapsed());
        assert_eq!(done, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        assert_eq!(side_by_side(&items, |item| *item), items);
    }

    #[tokio::test]
    async fn stop_waits_for_tasks_and_a_panic_stops_the_group() {
        let tasks = Tasks::new();
        let token = tasks.token().clone();
        tasks.spawn("waits", async move { token.cancelled().await });
        assert!(tasks.stop(Duration::from_secs(10)).await);

        let tasks = Tasks::new();
        tasks.spawn("breaks", async { panic!("on purpose") });
        tasks.token().cancelled().await;
    }

    #[tokio::test]
    async fn a_stuck_call_is_given_up() {
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let stuck = blocking("stuck", Duration::from_millis(10), move || {
            wait.recv().ok();
        });
        let outcome = stuck.await;
        drop(release);
        assert!(matches!(outcome, Err(BlockingError::TimedOut { .. })));
    }
}
