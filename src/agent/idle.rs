//! Between turns: somebody has to listen. The CLI may start a turn by itself (one does when a
//! background command ends), and what is done then is nobody's turn.
//!
//! One task holds the pipes while no run does. It gives them back when it is asked to, or when it
//! had to end the process.

use tokio::{sync::oneshot, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Limits,
    protocol::{self, Line},
    wire::Wire,
};
use crate::{process::ProcessHandle, task::Tasks};

/// The task that listens. Dropping it ends the listening, and with it the pipes.
#[derive(Debug)]
pub(super) struct Idle {
    stop: DropGuard,
    back: oneshot::Receiver<Wire>,
}

impl Idle {
    /// Listens until a run needs the pipes.
    pub(super) fn listen(
        wire: Wire,
        process: ProcessHandle,
        limits: Limits,
        tasks: &Tasks,
    ) -> Self {
        let stop = CancellationToken::new();
        let (sender, back) = oneshot::channel();
        let stopped = stop.clone();
        tasks.spawn("idle agent", async move {
            // Nobody may be left to take them: the agent was dropped.
            sender
                .send(listen(wire, &process, limits, &stopped).await)
                .ok();
        });
        Self {
            stop: stop.drop_guard(),
            back,
        }
    }

    /// The pipes; what was begun about a turn of the CLI's own is finished before. `None` if the
    /// task is gone.
    pub(super) async fn take_back(self) -> Option<Wire> {
        drop(self.stop);
        self.back.await.ok()
    }
}

async fn listen(
    mut wire: Wire,
    process: &ProcessHandle,
    limits: Limits,
    stop: &CancellationToken,
) -> Wire {
    loop {
        let line = tokio::select! {
            biased;
            () = stop.cancelled() => return wire,
            line = wire.lines.recv() => line,
        };
        let Some(line) = line else {
            // It ended, or will never say anything again.
            process.terminate(limits.terminate).await;
            return wire;
        };
        if line.is_of_a_turn() {
            tracing::warn!("the agent started a turn by itself; it is stopped");
            if !quieten(&mut wire, process, limits, line).await {
                tracing::warn!("the agent does not stop; its process is ended");
                process.terminate(limits.terminate).await;
                return wire;
            }
        } else if matches!(line, Line::Result(_)) {
            tracing::warn!("the agent told a result outside of a turn");
        }
    }
}

/// Stops a turn that nobody asked for, and ends what it started; whether that worked.
async fn quieten(wire: &mut Wire, process: &ProcessHandle, limits: Limits, first: Line) -> bool {
    let stopped = async {
        wire.interrupt(limits.interrupt).await.ok()?;
        let mut line = first;
        loop {
            match line {
                Line::Result(_) => return Some(()),
                Line::PermissionRequest { request_id, .. } => {
                    let no = protocol::permission_response(
                        &request_id,
                        Err("The person has not asked for anything.".into()),
                    );
                    wire.write(&no, limits.interrupt).await.ok()?;
                }
                _ => {}
            }
            line = wire.lines.recv().await?;
        }
    };
    let has_stopped = matches!(timeout(limits.interrupt, stopped).await, Ok(Some(())));
    has_stopped && process.sweep().await.is_ok()
}
