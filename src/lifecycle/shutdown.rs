//! Why and when the program ends.

use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Activity;

/// Why the program stops; named in the log and told to the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// Nobody needed it for `AUTO_SHUTDOWN_MINUTES`.
    IdleTimeout,
    /// SIGTERM or SIGINT; SIGQUIT or SIGHUP too, which PID 1 would not even notice.
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

/// The signals that ask the program to stop. One that came since [`Signals::listen`] is not lost: the
/// kernel drops what PID 1 has no handler for.
#[derive(Debug)]
pub struct Signals {
    term: Signal,
    int: Signal,
    quit: Signal,
    hang_up: Signal,
}

impl Signals {
    /// From now on they end nobody by themselves.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            _ = self.quit.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// Returns when the program should stop. `going` is told a minute before it stops for want of
/// somebody who needs it.
pub async fn wait_for_reason(
    signals: &mut Signals,
    activity: &Activity,
    going: impl Fn(Timestamp),
) -> StopReason {
    tokio::select! {
        () = signals.next() => StopReason::Signal,
        () = activity.idle(AHEAD, going) => StopReason::IdleTimeout,
    }
}

/// Kept from each stop's time for what comes after the turns, where there is so much.
const AFTER_TURNS: Duration = Duration::from_secs(5);
/// Before the platform kills, for the exit itself.
const MARGIN: Duration = Duration::from_millis(500);

/// By when each step of a stop has to be over, as the time since its beginning. A step that is done
/// early leaves its time to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Running turns and one-shot runs end by themselves.
    pub turns: Duration,
    /// What was interrupted is committed, contexts are saved, leases released.
    pub saved: Duration,
    /// Every child has ended.
    pub children: Duration,
    /// Answers on their way are out.
    pub answers: Duration,
    /// Tasks have ended.
    pub tasks: Duration,
    /// The control plane has heard of it; then the program ends.
    pub told: Duration,
}

impl Shares {
    /// Shares out `stop_timeout`, after which the platform kills. Turns get `drain` of it, but never
    /// what the steps after them need.
    pub fn of(drain: Duration, stop_timeout: Duration) -> Self {
        let end = stop_timeout.saturating_sub(MARGIN.min(stop_timeout / 10));
        let turns = drain.min(stop_timeout - AFTER_TURNS.min(stop_timeout / 2));
        let rest = end.saturating_sub(turns);
        let at = |percent| turns + rest * percent / 100;
        Self {
            turns,
            saved: at(60),
            children: at(75),
            answers: at(80),
            tasks: at(90),
            told: end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_share_and_all_is_over_before_the_kill() {
        let ms = Duration::from_millis;
        for (drain, stop, turns) in [
            (25_000, 30_000, 25_000),
            (100_000, 120_000, 100_000),
            (1_000, 30_000, 1_000),
            (0, 30_000, 0),
            // Too much: the steps after it have theirs all the same.
            (30_000, 30_000, 25_000),
            (60_000, 10_000, 5_000),
            (25_000, 2_000, 1_000),
            (25_000, 100, 50),
        ] {
            let shares = Shares::of(ms(drain), ms(stop));
            assert_eq!(shares.turns, ms(turns), "{drain} of {stop}");
            let steps = [
                shares.turns,
                shares.saved,
                shares.children,
                shares.answers,
                shares.tasks,
                shares.told,
                ms(stop),
            ];
            assert!(
                steps.is_sorted_by(|a, b| a < b),
                "{drain}/{stop}: {steps:?}"
            );
        }
        let default = Shares::of(ms(25_000), ms(30_000));
        assert_eq!(default.saved, ms(27_700));
        assert_eq!(default.told, ms(29_500));
    }
}
