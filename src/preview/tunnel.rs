//! A WebSocket after both sides agreed: bytes both ways.

use std::{sync::Arc, time::Duration};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::hmr;
use crate::task::Tasks;

/// From the 101 to the sockets themselves, and to the dev server's first words.
const BEGIN: Duration = Duration::from_secs(15);
const BUFFER: usize = 32 * 1024;

/// Carries bytes both ways until one side is done or the program stops; `first` is told to the
/// browser after the dev server's greeting.
pub(crate) async fn tunnel(
    on_downstream: OnUpgrade,
    on_upstream: OnUpgrade,
    first: Option<String>,
    tasks: Tasks,
    permit: Arc<OwnedSemaphorePermit>,
) {
    let carry = async {
        let both = async { tokio::try_join!(on_downstream, on_upstream) };
        let Ok(Ok((down, up))) = timeout(BEGIN, both).await else {
            return;
        };
        let (mut down, mut up) = (TokioIo::new(down), TokioIo::new(up));
        if let Some(first) = first {
            let greeted = timeout(BEGIN, hmr::greet(&mut up, &mut down, &first));
            if !matches!(greeted.await, Ok(Ok(()))) {
                return;
            }
        }
        tokio::io::copy_bidirectional_with_sizes(&mut down, &mut up, BUFFER, BUFFER)
            .await
            .ok();
    };
    tasks.token().run_until_cancelled(carry).await;
    drop(permit);
}
