//! Whether and when a dev server that ended is started again. Pure: it is given what happened.

use std::time::Duration;

/// Most blind restarts in a row, of a server that never became live.
const MAX_RESTARTS: u32 = 5;
/// A server that ends sooner than this was stopped by its site (a broken configuration ends
/// Astro after 0.7 to 1.5 s).
const QUICK: Duration = Duration::from_secs(3);

/// How one run of a dev server ended without our asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) ran_for: Duration,
    pub(crate) code: Option<i32>,
    /// Did it prove itself ready before?
    pub(crate) was_live: bool,
    /// The last lines it wrote.
    pub(crate) text: String,
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    RestartAfter(Duration),
    /// The same thing would happen again: somebody has to ask.
    WaitToBeAsked,
}

/// Failures in a row.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    count: u32,
    last_quick: Option<String>,
}

impl Restarts {
    /// Counts a failure and decides.
    pub(crate) fn after(&mut self, failure: &Failure) -> Next {
        if failure.was_live {
            *self = Self::default();
        }
        let quick = (failure.code == Some(1) && failure.ran_for < QUICK && !failure.was_live)
            .then(|| without_times(&failure.text));
        let repeats = quick.is_some() && quick == self.last_quick;
        self.last_quick = quick;
        if repeats || self.count >= MAX_RESTARTS {
            return Next::WaitToBeAsked;
        }
        self.count += 1;
        Next::RestartAfter(Duration::from_secs(1 << (self.count - 1)))
    }
}

/// The text without clock times (`09:41:07`), which differ from run to run.
fn without_times(text: &str) -> String {
    let is_time =
        |word: &&str| word.len() == 8 && word.bytes().all(|b| b.is_ascii_digit() || b == b':');
    text.split_whitespace()
        .filter(|word| !is_time(word))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(seconds: u64, code: i32, was_live: bool, text: &str) -> Failure {
        Failure {
            ran_for: Duration::from_secs(seconds),
            code: Some(code),
            was_live,
            text: text.to_owned(),
        }
    }

    fn waits(failures: &[Failure]) -> Vec<Option<u64>> {
        let mut restarts = Restarts::default();
        failures
            .iter()
            .map(|f| match restarts.after(f) {
                Next::RestartAfter(wait) => Some(wait.as_secs()),
                Next::WaitToBeAsked => None,
            })
            .collect()
    }

    #[test]
    fn restarts_back_off_and_give_up_after_five() {
        let crash = failure(60, 7, false, "boom");
        assert_eq!(
            waits(&vec![crash; 7]),
            [Some(1), Some(2), Some(4), Some(8), Some(16), None, None]
        );
    }

    #[test]
    fn the_same_quick_end_twice_is_not_tried_blindly_again() {
        let at = |t: &str| failure(1, 1, false, &format!("{t} [config] bad at line 3"));
        assert_eq!(waits(&[at("09:41:07"), at("09:41:09")]), [Some(1), None]);
        let other = failure(1, 1, false, "another error");
        assert_eq!(
            waits(&[at("09:41:07"), other.clone(), other]),
            [Some(1), Some(2), None]
        );
        let slow = failure(5, 1, false, "x");
        assert_eq!(waits(&[slow.clone(), slow]), [Some(1), Some(2)]);
    }

    #[test]
    fn a_server_that_was_live_starts_over() {
        let crash = failure(9, 1, false, "boom");
        let was_live = failure(9, 1, true, "boom");
        assert_eq!(
            waits(&[crash.clone(), crash, was_live.clone(), was_live]),
            [Some(1), Some(2), Some(1), Some(1)]
        );
    }
}
