//! Does another count of the same requests agree with the ledger's?

use super::Tokens;

/// Tokens as the CLI counts them: what was written to the cache is one number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub input: u64,
    pub output: u64,
    pub cache_read: u64,
    pub cache_creation: u64,
}

impl From<Tokens> for Counts {
    fn from(tokens: Tokens) -> Self {
        Self {
            input: tokens.input,
            output: tokens.output,
            cache_read: tokens.cache_read,
            cache_creation: tokens.cache_creation(),
        }
    }
}

/// A change of model costs the CLI a request of some dozen tokens that it tells nobody of
/// (measured with 2.1.329).
const UNTOLD: u64 = 500;
/// Price lists round.
const CENT_FRACTION: f64 = 0.001;

impl Counts {
    /// Is the ledger's count another one than this, by more than what is known to be left out?
    pub(super) fn differs_from(&self, ledger: &Self) -> bool {
        let parts = [
            (self.input, ledger.input),
            (self.output, ledger.output),
            (self.cache_read, ledger.cache_read),
            (self.cache_creation, ledger.cache_creation),
        ];
        parts.iter().any(|(theirs, ours)| {
            let (theirs, ours) = (*theirs, *ours);
            // The ledger may know of a little more, never of less.
            theirs > ours || ours - theirs > UNTOLD
        })
    }
}

/// The same of money.
pub(super) fn cost_differs(theirs: f64, ours: f64) -> bool {
    let untold = ours * 0.02 + CENT_FRACTION;
    (theirs - ours).abs() > untold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_more_is_no_difference_and_less_is_one() {
        let counts = |input, output| Counts {
            input,
            output,
            cache_read: 9,
            cache_creation: 9,
        };
        let ledger = counts(1000, 600);
        assert!(!counts(1000, 600).differs_from(&ledger));
        assert!(!counts(960, 599).differs_from(&ledger));
        assert!(counts(1001, 600).differs_from(&ledger));
        assert!(counts(1000, 99).differs_from(&ledger));
        assert!(!cost_differs(0.1, 0.1005) && !cost_differs(1.0, 1.01));
        assert!(cost_differs(0.1, 0.2) && cost_differs(0.2, 0.1));
    }
}
