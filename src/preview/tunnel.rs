//! A WebSocket after both sides agreed: bytes both ways.

use std::{io, sync::Arc, time::Duration};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, watch},
    time::timeout,
};

use super::{
    frames::{Frames, text_frame},
    hmr,
    notes::HmrSocket,
};
use crate::task::Tasks;

/// From the 101 to the sockets themselves, and to the dev server's first words.
const BEGIN: Duration = Duration::from_secs(15);
const BUFFER: usize = 32 * 1024;

/// Carries bytes both ways until one side is done or the program stops. On an HMR socket a browser
/// is also told `late`, after the dev server's greeting, and to load the page again when greenroom
/// wants it to.
pub(crate) async fn tunnel(
    on_downstream: OnUpgrade,
    on_upstream: OnUpgrade,
    hmr: Option<HmrSocket>,
    late: Option<String>,
    tasks: Tasks,
    permit: Arc<OwnedSemaphorePermit>,
) {
    let carry = async {
        let both = async { tokio::try_join!(on_downstream, on_upstream) };
        let Ok(Ok((down, up))) = timeout(BEGIN, both).await else {
            return;
        };
        let (mut down, mut up) = (TokioIo::new(down), TokioIo::new(up));
        let mut frames = Some(Frames::default());
        if let Some(late) = late {
            let greeted = timeout(BEGIN, hmr::greet(&mut up, &mut down, &late)).await;
            match greeted {
                Ok(Ok(true)) => {}
                // It began with something else, and may be anywhere in it.
                Ok(Ok(false)) => frames = None,
                Ok(Err(_)) | Err(_) => return,
            }
        }
        match (hmr, frames) {
            (Some(mut hmr), Some(frames)) => {
                with_words_of_ours(down, up, frames, &mut hmr.reloads)
                    .await
                    .ok();
            }
            _ => {
                tokio::io::copy_bidirectional_with_sizes(&mut down, &mut up, BUFFER, BUFFER)
                    .await
                    .ok();
            }
        }
    };
    tasks.token().run_until_cancelled(carry).await;
    drop(permit);
}

/// Both ways; between two messages of the dev server's the browser may be told to reload.
async fn with_words_of_ours(
    down: impl AsyncRead + AsyncWrite,
    up: impl AsyncRead + AsyncWrite,
    mut frames: Frames,
    reloads: &mut watch::Receiver<u64>,
) -> io::Result<()> {
    let (mut from_browser, mut to_browser) = tokio::io::split(down);
    let (mut from_server, mut to_server) = tokio::io::split(up);
    let upward = async {
        tokio::io::copy(&mut from_browser, &mut to_server).await?;
        to_server.shutdown().await
    };
    let downward = async {
        let reload = text_frame(hmr::RELOAD);
        let mut buffer = vec![0; BUFFER];
        loop {
            tokio::select! {
                read = from_server.read(&mut buffer) => {
                    let bytes = &buffer[..read?];
                    if bytes.is_empty() {
                        return to_browser.shutdown().await;
                    }
                    frames.pass(bytes);
                    to_browser.write_all(bytes).await?;
                }
                // The preview outlives its sockets, or both end.
                Ok(()) = reloads.changed(), if frames.is_between() => {
                    to_browser.write_all(&reload).await?;
                }
            }
            to_browser.flush().await?;
        }
    };
    tokio::try_join!(upward, downward).map(drop)
}
