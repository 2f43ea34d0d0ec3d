//! Money: what model requests cost, who spent it, and who may spend how much more.
//!
//! ```text
//! gateway ─► Meter (one per run) ─► Ledger ─► one file per container and day
//!                                     ▲              │
//!                                  budgets ◄── tails of the other containers' files
//! api, cli ─► Book ─► Report                         the same files, added up
//! ```
//!
//! A request is written down at the most it may cost before it goes up ([`Meter::reserve`]), and
//! at what it did cost once it is over ([`Reservation::settle`]). A program that is killed leaves
//! at most the requests under way unsettled; those count at their worst case. Whether a request
//! may go up is decided by pure functions (`budget`); money is counted in US dollars. What is paid
//! by itself, as a prediction is, goes the same way ([`Meter::reserve_paid`]); whoever notes its
//! reservation can settle it after a kill ([`Ledger::take_up`]).
//!
//! It knows nothing of HTTP. Blocking work runs on threads with a deadline; the ledger's short
//! tasks run in the [`Tasks`](crate::task::Tasks) that it was made with.

mod books;
mod budget;
mod compare;
mod file;
mod ledger;
mod live;
mod meter;
mod price;
mod purses;
mod report;
mod reservation;
mod row;
#[cfg(test)]
mod tests;

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

pub use books::{Books, ReadError};
pub use budget::{Breach, Budgets, Level, Limit, Term, Warning};
pub use compare::Counts;
pub use file::Tenants;
pub use ledger::{Ledger, LedgerSettings, Tally};
pub use live::{BudgetView, Live};
pub use meter::{Ask, Denied, Meter, News, Outcome, Spent, Verdict};
pub use price::{Cost, PriceError, Prices};
pub use report::{Book, By, NotOneOf, Period, Question, Recent, Report, ReportRow, Sums};
pub use reservation::{Noted, Reservation};

/// Tokens by what they cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tokens {
    /// Neither read from the cache nor written to it.
    #[serde(rename = "inputTokens")]
    pub input: u64,
    #[serde(rename = "outputTokens")]
    pub output: u64,
    #[serde(rename = "cacheReadTokens")]
    pub cache_read: u64,
    /// Written to the cache for five minutes.
    #[serde(rename = "cacheWrite5mTokens")]
    pub cache_write_5m: u64,
    /// Written to the cache for an hour.
    #[serde(rename = "cacheWrite1hTokens")]
    pub cache_write_1h: u64,
}

impl Tokens {
    /// Each kind, for figures.
    pub fn by_kind(&self) -> [(&'static str, u64); 5] {
        [
            ("input", self.input),
            ("output", self.output),
            ("cache_read", self.cache_read),
            ("cache_write_5m", self.cache_write_5m),
            ("cache_write_1h", self.cache_write_1h),
        ]
    }

    /// All that was sent.
    pub fn prompt(&self) -> u64 {
        self.input + self.cache_read + self.cache_creation()
    }

    /// Written to the cache, for however long.
    pub fn cache_creation(&self) -> u64 {
        self.cache_write_5m + self.cache_write_1h
    }
}

impl Add for Tokens {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            input: self.input + other.input,
            output: self.output + other.output,
            cache_read: self.cache_read + other.cache_read,
            cache_write_5m: self.cache_write_5m + other.cache_write_5m,
            cache_write_1h: self.cache_write_1h + other.cache_write_1h,
        }
    }
}

impl AddAssign for Tokens {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
