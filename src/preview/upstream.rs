//! The dev server's side of one connection from a browser: one connection of its own, kept from
//! request to request, so that no pool is shared.

use std::{net::Ipv4Addr, pin::pin, sync::Mutex, time::Duration};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{alarm::Alarm, body::RequestBody, refusals::UpstreamError};
use crate::task::Tasks;

/// A server that restarts itself in place refuses connections for about a second.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
/// From request to the answer's head; a broken configuration alone blocks Vite for 6 s.
const HEAD_DEADLINE: Duration = Duration::from_secs(300);

/// Asks a dev server, one request after the other.
pub(crate) struct Upstream {
    /// The connection of the last request, for the next one.
    pinned: Mutex<Option<Pinned>>,
    tasks: Tasks,
}

struct Pinned {
    port: u16,
    sender: SendRequest<RequestBody>,
    /// For answers that don't come.
    alarm: Alarm,
}

impl Upstream {
    pub(crate) fn new(tasks: Tasks) -> Self {
        Self {
            pinned: Mutex::default(),
            tasks,
        }
    }

    /// One request and its answer's head, over the pinned connection if it still lives. What
    /// never left goes out once more over a fresh one, and so does what `again` makes anew, where
    /// a request may be repeated: the dev server may close an idle connection at any time.
    pub(crate) async fn exchange(
        &self,
        port: u16,
        mut request: Request<RequestBody>,
        again: Option<impl FnOnce() -> Request<RequestBody>>,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let deadline = Instant::now() + HEAD_DEADLINE;
        if let Some(mut pinned) = self.take_pinned(port).await {
            let sent = pin!(pinned.sender.try_send_request(request));
            match pinned.alarm.limit(deadline, sent).await? {
                Ok(response) => {
                    self.pin(pinned);
                    return Ok(response);
                }
                Err(mut error) => {
                    request = match (error.take_message(), again) {
                        (Some(unsent), _) => unsent,
                        (None, Some(again)) => again(),
                        (None, None) => return Err(error.into_error().into()),
                    };
                }
            }
        }
        Box::pin(self.exchange_afresh(port, request, deadline)).await
    }

    /// The same over a fresh connection.
    async fn exchange_afresh(
        &self,
        port: u16,
        request: Request<RequestBody>,
        deadline: Instant,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let mut fresh = Pinned {
            port,
            sender: self.connect(port).await?,
            alarm: Alarm::default(),
        };
        let sent = pin!(fresh.sender.send_request(request));
        let response = fresh.alarm.limit(deadline, sent).await?;
        let response = response?;
        self.pin(fresh);
        Ok(response)
    }

    async fn take_pinned(&self, port: u16) -> Option<Pinned> {
        let mut pinned = self
            .pinned
            .lock()
            .expect("no panic while it is held")
            .take()?;
        if pinned.port != port || pinned.sender.is_closed() {
            return None;
        }
        if !pinned.sender.is_ready() {
            // The last answer has been passed on; its connection is about to notice. One whose
            // request body is still on its way never becomes ready.
            let ready = timeout(Duration::from_millis(20), pinned.sender.ready());
            Box::pin(ready).await.ok()?.ok()?;
        }
        Some(pinned)
    }

    fn pin(&self, pinned: Pinned) {
        *self.pinned.lock().expect("no panic while it is held") = Some(pinned);
    }

    /// A fresh connection to the dev server, with patience for one that restarts in place.
    pub(crate) async fn connect(
        &self,
        port: u16,
    ) -> Result<SendRequest<RequestBody>, UpstreamError> {
        let deadline = Instant::now() + CONNECT_PATIENCE;
        let stream = loop {
            match timeout_at(deadline, TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await {
                Ok(Ok(stream)) => break stream,
                Ok(Err(_)) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Ok(Err(_)) | Err(_) => return Err(UpstreamError::Unreachable),
            }
        };
        stream.set_nodelay(true).ok();
        // One buffer, one plain write: nearly all requests have no body, and bodies cost no more.
        let handshake = hyper::client::conn::http1::Builder::new()
            .writev(false)
            .handshake(TokioIo::new(stream))
            .await;
        let (sender, connection) = handshake.map_err(|_| UpstreamError::Unreachable)?;
        // Ends when the sender and the bodies are dropped: with the downstream connection.
        self.tasks.spawn("preview upstream", async move {
            connection.with_upgrades().await.ok();
        });
        Ok(sender)
    }
}
