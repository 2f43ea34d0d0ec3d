//! Why and when the program ends.

use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};

use super::Activity;

/// Why the program stops; named in the log and told to the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// Nobody needed it for `AUTO_SHUTDOWN_MINUTES`.
    IdleTimeout,
    /// SIGTERM or SIGINT.
    Signal,
    /// A part of it broke.
    Broken,
}

impl StopReason {
    /// As the control plane is told.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IdleTimeout => "idle-timeout",
            Self::Signal => "signal",
            Self::Broken => "broken",
        }
    }
}

/// How long before an idle end it is told.
const AHEAD: Duration = Duration::from_secs(60);

/// Returns when the program should stop. `going` is told a minute before it stops for want of
/// somebody who needs it.
///
/// # Errors
/// If the signal handlers cannot be installed.
pub async fn wait_for_reason(
    activity: &Activity,
    going: impl Fn(Timestamp),
) -> std::io::Result<StopReason> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = term.recv() => StopReason::Signal,
        _ = int.recv() => StopReason::Signal,
        () = activity.idle(AHEAD, going) => StopReason::IdleTimeout,
    })
}
