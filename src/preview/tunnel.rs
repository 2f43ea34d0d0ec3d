//! A WebSocket after both sides agreed: bytes both ways.

use std::{io, sync::Arc, time::Duration};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout},
};

use super::{
    dev_server::until,
    frames::{Frames, text_frame},
    hmr,
    notes::HmrSocket,
};
use crate::task::Tasks;

/// From the 101 to the sockets themselves, and to the dev server's first words.
const BEGIN: Duration = Duration::from_secs(15);
const BUFFER: usize = 32 * 1024;
/// The dev server may have told of something new just before it took this browser in, and greenroom
/// may hear of it only after: on a busy machine by so much.
const IN_DOUBT: Duration = Duration::from_secs(2);
/// What it tells all browsers comes to each of them within this time.
const SPREAD: Duration = Duration::from_millis(300);

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
        let is_greeted = late.is_some();
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
                let greetings = u64::from(!is_greeted);
                with_words_of_ours(down, up, frames, greetings, &mut hmr)
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

/// Both ways; between two messages of the dev server's the browser may be told to reload. The first
/// `greetings` messages say nothing of the site.
async fn with_words_of_ours(
    down: impl AsyncRead + AsyncWrite,
    up: impl AsyncRead + AsyncWrite,
    mut frames: Frames,
    greetings: u64,
    HmrSocket {
        reloads, updates, ..
    }: &mut HmrSocket,
) -> io::Result<()> {
    let certain = Instant::now() + IN_DOUBT;
    let mut heard_by = None;
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
                Ok(()) = updates.changed(), if heard_by.is_none() && Instant::now() < certain => {
                    heard_by = Some(Instant::now() + SPREAD);
                    continue;
                }
                () = until(heard_by), if frames.is_between() => {
                    heard_by = None;
                    if frames.messages() > greetings {
                        continue;
                    }
                    to_browser.write_all(&reload).await?;
                }
            }
            to_browser.flush().await?;
        }
    };
    tokio::try_join!(upward, downward).map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::preview::notes::Notes;

    const GREETING: &str = r#"{"type":"connected"}"#;
    const UPDATE: &str = r#"{"type":"update"}"#;

    /// What a browser hears whose dev server says these messages at once, and has told everybody of
    /// something new by the time that greenroom hears it.
    async fn heard(messages: &[&str], greetings: u64) -> Vec<u8> {
        let notes = Notes::default();
        let mut hmr = notes.open_socket();
        let (down, mut browser) = duplex(1024);
        let (up, mut server) = duplex(1024);
        let carried = with_words_of_ours(down, up, Frames::default(), greetings, &mut hmr);
        let said = async {
            for message in messages {
                server.write_all(&text_frame(message)).await.unwrap();
            }
            notes.note_update();
            tokio::time::sleep(SPREAD * 2).await;
            drop(server);
            let mut heard = Vec::new();
            browser.read_to_end(&mut heard).await.unwrap();
            drop(browser);
            heard
        };
        tokio::join!(carried, said).1
    }

    #[tokio::test(start_paused = true)]
    async fn who_came_too_late_for_an_update_by_a_hair_loads_again() {
        let frames = |messages: &[&str]| {
            messages
                .iter()
                .copied()
                .flat_map(text_frame)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            heard(&[GREETING], 1).await,
            frames(&[GREETING, hmr::RELOAD])
        );
        assert_eq!(heard(&[], 0).await, frames(&[hmr::RELOAD]));
        for told in [&[GREETING, UPDATE][..], &[GREETING, UPDATE, UPDATE]] {
            assert_eq!(heard(told, 1).await, frames(told));
        }
        assert_eq!(heard(&[UPDATE], 0).await, frames(&[UPDATE]));
    }
}
