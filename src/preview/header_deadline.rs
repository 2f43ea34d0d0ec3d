//! Limits on how long a connection may idle and, apart from that, on how long a request's head may
//! take: hyper has one clock for both, and a connection that may idle for a minute must not be
//! held for a minute by a header that drips.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::alarm::Alarm;

/// Between requests. Longer than the 60 s of common load balancers, which must be the first to
/// close.
const IDLE: Duration = Duration::from_secs(75);
/// From the first byte of a request to the last of its head.
const HEAD_IN: Duration = Duration::from_secs(15);

/// A stream that fails to read when a request, or the rest of its head, takes too long to come.
pub(crate) struct HeaderDeadline<S> {
    stream: S,
    switch: RequestSwitch,
    /// Requests begun so far: what is read now is of the one after these.
    begun: usize,
    is_in_head: bool,
    /// Set when a read has to wait.
    deadline: Option<Instant>,
    alarm: Alarm,
}

/// Tells the stream where a request begins.
#[derive(Clone, Default)]
pub(crate) struct RequestSwitch(Arc<State>);

#[derive(Default)]
struct State {
    begun: AtomicUsize,
    /// A request is being answered, or what follows is no HTTP any more.
    reads_freely: AtomicBool,
}

/// A request whose head is complete and whose answer isn't; dropped, it waits for the next one.
pub(crate) struct InRequest {
    switch: RequestSwitch,
    is_last: bool,
}

impl RequestSwitch {
    pub(crate) fn begin(&self) -> InRequest {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        self.0.reads_freely.store(true, Ordering::Relaxed);
        InRequest {
            switch: self.clone(),
            is_last: false,
        }
    }
}

impl InRequest {
    /// No request follows on this connection: what comes is a tunnel's.
    pub(crate) fn make_last(mut self) {
        self.is_last = true;
    }
}

impl Drop for InRequest {
    fn drop(&mut self) {
        self.switch
            .0
            .reads_freely
            .store(self.is_last, Ordering::Relaxed);
    }
}

impl<S> HeaderDeadline<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            switch: RequestSwitch::default(),
            begun: 0,
            is_in_head: false,
            deadline: None,
            alarm: Alarm::default(),
        }
    }

    pub(crate) fn switch(&self) -> RequestSwitch {
        self.switch.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeaderDeadline<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let state = &this.switch.0;
        let begun = state.begun.load(Ordering::Relaxed);
        if this.begun != begun {
            (this.begun, this.is_in_head, this.deadline) = (begun, false, None);
        }
        let reads_freely = state.reads_freely.load(Ordering::Relaxed);
        let before = buf.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(cx, buf) {
            if buf.filled().len() > before && !this.is_in_head && !reads_freely {
                (this.is_in_head, this.deadline) = (true, None);
            }
            return Poll::Ready(read);
        }
        if reads_freely {
            return Poll::Pending;
        }
        let limit = if this.is_in_head { HEAD_IN } else { IDLE };
        let deadline = *this.deadline.get_or_insert_with(|| Instant::now() + limit);
        ready!(this.alarm.poll(cx, deadline));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeaderDeadline<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// Is nothing to be read for so long?
    async fn is_quiet(stream: &mut (impl AsyncRead + Unpin), limit: Duration) -> bool {
        let mut byte = [0];
        tokio::time::timeout(limit, stream.read(&mut byte))
            .await
            .is_err()
    }

    async fn is_cut(stream: &mut (impl AsyncRead + Unpin)) -> bool {
        let mut byte = [0];
        let read = tokio::time::timeout(IDLE * 2, stream.read(&mut byte)).await;
        matches!(read, Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut)
    }

    #[tokio::test(start_paused = true)]
    async fn a_dripping_head_is_cut_off_and_an_idle_connection_is_not() {
        let (mut far, near) = duplex(1024);
        let mut near = HeaderDeadline::new(near);
        let switch = near.switch();
        let mut byte = [0];
        assert!(
            is_quiet(&mut near, IDLE - HEAD_IN).await,
            "before the first"
        );
        far.write_all(b"GE").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        let request = switch.begin();
        near.read_exact(&mut byte).await.unwrap();
        assert!(is_quiet(&mut near, IDLE * 4).await, "a body");
        drop(request);
        assert!(is_quiet(&mut near, IDLE - HEAD_IN).await, "idle");
        far.write_all(b"GE").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        let start = Instant::now();
        assert!(is_quiet(&mut near, HEAD_IN / 2).await, "the head");
        far.write_all(b"T").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        assert!(is_cut(&mut near).await);
        assert_eq!(start.elapsed().as_secs(), HEAD_IN.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_cut_off_in_the_end() {
        let (_far, near) = duplex(1024);
        let mut near = HeaderDeadline::new(near);
        drop(near.switch().begin());
        assert!(is_cut(&mut near).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_may_be_silent() {
        let (_far, near) = duplex(1024);
        let mut near = HeaderDeadline::new(near);
        near.switch().begin().make_last();
        assert!(is_quiet(&mut near, IDLE * 4).await);
    }
}
