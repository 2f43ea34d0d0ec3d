//! A limit on how long a request's head may take, apart from how long a connection may idle:
//! hyper has one clock for both, and a connection that may idle for a minute must not be held
//! for a minute by a header that drips.

use std::{
    future::Future,
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
    time::{Sleep, sleep},
};

/// From the first byte of a request to the last of its head.
const HEAD_IN: Duration = Duration::from_secs(15);

/// A stream that fails to read when a request's head takes too long.
pub(crate) struct HeaderDeadline<S> {
    stream: S,
    switch: RequestSwitch,
    clock: Option<Clock>,
}

struct Clock {
    /// Requests begun when the clock was started: it is for the one after these.
    begun: usize,
    end: Pin<Box<Sleep>>,
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
            clock: None,
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
        this.clock.take_if(|clock| clock.begun != begun);
        if let Some(clock) = &mut this.clock
            && clock.end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before
            && this.clock.is_none()
            && !state.reads_freely.load(Ordering::Relaxed)
        {
            this.clock = Some(Clock {
                begun,
                end: Box::pin(sleep(HEAD_IN)),
            });
        }
        Poll::Ready(Ok(()))
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

    #[tokio::test(start_paused = true)]
    async fn a_dripping_head_is_cut_off_and_an_idle_connection_is_not() {
        let (mut far, near) = duplex(1024);
        let mut near = HeaderDeadline::new(near);
        let switch = near.switch();
        let mut byte = [0];
        // Idle far longer than a head may take.
        assert!(
            tokio::time::timeout(HEAD_IN * 4, near.read(&mut byte))
                .await
                .is_err()
        );
        far.write_all(b"GE").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        let request = switch.begin();
        near.read_exact(&mut byte).await.unwrap();
        assert!(
            tokio::time::timeout(HEAD_IN * 4, near.read(&mut byte))
                .await
                .is_err(),
            "a body"
        );
        drop(request);
        assert!(
            tokio::time::timeout(HEAD_IN * 4, near.read(&mut byte))
                .await
                .is_err(),
            "idle"
        );
        far.write_all(b"G").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        let cut = tokio::time::timeout(HEAD_IN * 4, near.read(&mut byte))
            .await
            .unwrap();
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
