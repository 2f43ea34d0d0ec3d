//! Bodies on their way through the proxy: streamed, never gathered.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::{ActivityGuard, header_deadline::InRequest, last_good::Rendering, pace::Pace};

/// A request's body on its way up.
pub(crate) enum RequestBody {
    Streamed(Box<Paced>),
    Empty,
}

/// As it comes from the browser, which may not take for ever.
pub(crate) struct Paced {
    body: Incoming,
    pace: Pace,
}

/// Why a request's body ended before its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the browser broke off")]
    Broken(#[source] hyper::Error),
    #[error("the browser sends too slowly")]
    TooSlow,
}

impl RequestBody {
    pub(crate) fn streamed(body: Incoming) -> Self {
        if body.is_end_stream() {
            // Nearly all requests.
            return Self::Empty;
        }
        let pace = Pace::default();
        Self::Streamed(Box::new(Paced { body, pace }))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self::Streamed(paced) = self.get_mut() else {
            return Poll::Ready(None);
        };
        let Paced { body, pace } = &mut **paced;
        match Pin::new(body).poll_frame(cx) {
            Poll::Pending => pace
                .poll_too_slow(cx)
                .map(|()| Some(Err(BodyError::TooSlow))),
            Poll::Ready(Some(Ok(frame))) => {
                pace.came(frame.data_ref().map_or(0, Bytes::len));
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(BodyError::Broken(error)))),
            Poll::Ready(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Streamed(paced) => paced.body.is_end_stream(),
            Self::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Streamed(paced) => paced.body.size_hint(),
            Self::Empty => SizeHint::with_exact(0),
        }
    }
}

/// An answer's body on its way down: the upstream's, then perhaps some bytes of ours.
pub(crate) struct ResponseBody {
    stream: Option<Incoming>,
    pub(crate) tail: Option<Bytes>,
    /// Dropped with the body, when the last byte was handed over or the browser is gone.
    pub(crate) guard: Option<ActivityGuard>,
    /// Kept along the way, to be shown when the page is broken.
    pub(crate) rendering: Option<Rendering>,
    pub(crate) in_request: Option<InRequest>,
}

impl ResponseBody {
    pub(crate) fn whole(body: Bytes) -> Self {
        let tail = (!body.is_empty()).then_some(body);
        Self {
            stream: None,
            tail,
            guard: None,
            rendering: None,
            in_request: None,
        }
    }

    pub(crate) fn streamed(stream: Incoming) -> Self {
        Self {
            stream: Some(stream),
            tail: None,
            guard: None,
            rendering: None,
            in_request: None,
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(stream) = &mut this.stream {
            match Pin::new(stream).poll_frame(cx) {
                Poll::Ready(None) => {
                    this.stream = None;
                    if let Some(rendering) = this.rendering.take() {
                        rendering.finish();
                    }
                }
                // Trailers would come before our bytes; no server sends them with a page.
                Poll::Ready(Some(Ok(frame))) if frame.is_trailers() && this.tail.is_some() => {
                    this.stream = None;
                }
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(bytes) = frame.data_ref() {
                        this.rendering = this.rendering.take().and_then(|page| page.add(bytes));
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                other => return other,
            }
        }
        Poll::Ready(this.tail.take().map(|tail| Ok(Frame::data(tail))))
    }

    fn is_end_stream(&self) -> bool {
        self.tail.is_none() && self.stream.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self
            .stream
            .as_ref()
            .map_or(SizeHint::with_exact(0), Body::size_hint);
        if let Some(tail) = &self.tail {
            let more = tail.len() as u64;
            let exact = hint.upper();
            let lower = hint.lower() + more;
            hint = SizeHint::new();
            hint.set_lower(lower);
            if let Some(upper) = exact {
                hint.set_upper(upper + more);
            }
        }
        hint
    }
}
