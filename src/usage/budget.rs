//! Budgets as pure decisions: given what was spent and what is under way, may a request go up?

use std::fmt;

use jiff::{Timestamp, Zoned, civil::Date, tz::TimeZone};

use crate::domain::Account;

/// The part of a limit at which its people are warned.
const WARN_AT: f64 = 0.8;

/// Whose spending a limit is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Turn,
    Thread,
    User,
    Client,
}

/// The time for which a limit holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Term {
    /// As long as what it is about.
    Whole,
    Day,
    Month,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    pub level: Level,
    pub term: Term,
    pub usd: f64,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (level, term) = (self.level.as_str(), self.term);
        match term {
            Term::Whole => write!(f, "the budget of one {level}"),
            Term::Day => write!(f, "the {level}'s budget for this day"),
            Term::Month => write!(f, "the {level}'s budget for this month"),
        }
    }
}

impl Level {
    /// As in metrics and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Turn => "turn",
            Self::Thread => "thread",
            Self::User => "user",
            Self::Client => "client",
        }
    }
}

impl Term {
    /// As in metrics and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    /// The first day of the term that a moment lies in.
    pub(super) fn first_day(self, at: &Zoned) -> Date {
        match self {
            Self::Month => at.date().first_of_month(),
            Self::Day | Self::Whole => at.date(),
        }
    }

    /// When the term that a moment lies in is over; `None`: never.
    pub(super) fn end(self, at: &Zoned) -> Option<Timestamp> {
        let next = match self {
            Self::Whole => return None,
            Self::Day => at.date().tomorrow().ok()?,
            Self::Month => at.date().last_of_month().tomorrow().ok()?,
        };
        Some(next.to_zoned(at.time_zone().clone()).ok()?.timestamp())
    }
}

/// All limits, and the time zone in which days and months begin.
#[derive(Debug, Clone)]
pub struct Budgets {
    pub limits: Vec<Limit>,
    pub zone: TimeZone,
}

impl Default for Budgets {
    /// None.
    fn default() -> Self {
        Self {
            limits: Vec::new(),
            zone: TimeZone::UTC,
        }
    }
}

impl Budgets {
    /// Is there a limit that others may spend from too: other turns, other containers?
    pub(super) fn are_shared(&self) -> bool {
        self.limits.iter().any(|limit| limit.term != Term::Whole)
    }
}

/// What a limit counts: whose, and from which day on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Purse {
    level: Level,
    /// `client`, `client/user`, `client/user/thread`.
    owner: String,
    term: Term,
    first_day: Date,
}

impl Purse {
    /// The purse that this limit looks into for an account; `None`: the limit is not about it.
    /// Turns have none: what a turn spends is known to its run alone.
    pub(super) fn of(level: Level, term: Term, account: &Account, at: &Zoned) -> Option<Self> {
        let client = account.client.as_ref()?;
        let owner = match level {
            Level::Turn => return None,
            Level::Client => client.to_string(),
            Level::User => format!("{client}/{}", account.user.as_ref()?),
            Level::Thread => {
                let (user, thread) = (account.user.as_ref()?, account.thread.as_ref()?);
                format!("{client}/{user}/{thread}")
            }
        };
        Some(Self {
            level,
            owner,
            term,
            first_day: term.first_day(at),
        })
    }

    pub(super) fn is_about(&self, level: Level, term: Term) -> bool {
        (self.level, self.term) == (level, term)
    }

    pub(super) fn is_over(&self, now: &Zoned) -> bool {
        self.term.first_day(now) > self.first_day
    }
}

/// What is known about one limit when a request asks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stand {
    pub(super) limit: Limit,
    /// By requests that are over, and by those that nobody will settle any more.
    pub(super) spent: f64,
    /// The most that requests under way may come to.
    pub(super) held: f64,
    pub(super) ends: Option<Timestamp>,
}

/// A limit that is used up.
#[derive(Debug, Clone, PartialEq)]
pub struct Breach {
    pub limit: Limit,
    pub spent_usd: f64,
    /// When it begins anew; `None`: never.
    pub resets: Option<Timestamp>,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (limit, spent) = (self.limit, self.spent_usd);
        write!(f, "{limit} is used up (${spent:.2} of ${:.2})", limit.usd)?;
        match self.resets {
            Some(at) => write!(
                f,
                "; it begins anew at {}",
                at.strftime("%Y-%m-%d %H:%M UTC")
            ),
            None => Ok(()),
        }
    }
}

/// A limit of which most is spent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warning {
    pub limit: Limit,
    pub spent_usd: f64,
}

/// May a request go up?
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Decision {
    /// Yes: what goes beyond a limit is at most this one request.
    Allow,
    /// Requests under way may use up what is left: once one of them is over, ask again.
    Wait(Breach),
    Refuse(Breach),
}

/// Decides; pure. A request is let through while something is left that nobody else may take: it
/// may then go beyond the limit by itself, and no other one does.
pub(super) fn decide(stands: &[Stand]) -> Decision {
    let breach = |stand: &Stand| Breach {
        limit: stand.limit,
        spent_usd: stand.spent,
        resets: stand.ends,
    };
    // The one that lasts longest is the one to be told.
    let by_end = |stand: &&Stand| stand.ends.unwrap_or(Timestamp::MAX);
    let is_spent = |stand: &&Stand| stand.spent >= stand.limit.usd;
    if let Some(stand) = stands.iter().filter(is_spent).max_by_key(by_end) {
        return Decision::Refuse(breach(stand));
    }
    let is_held = |stand: &&Stand| stand.spent + stand.held >= stand.limit.usd;
    match stands.iter().find(is_held) {
        Some(stand) => Decision::Wait(breach(stand)),
        None => Decision::Allow,
    }
}

/// Is it time to warn?
pub(super) fn is_nearly_spent(limit: Limit, spent: f64) -> bool {
    spent >= limit.usd * WARN_AT
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stand(usd: f64, spent: f64, held: f64) -> Stand {
        Stand {
            limit: Limit {
                level: Level::User,
                term: Term::Day,
                usd,
            },
            spent,
            held,
            ends: None,
        }
    }

    #[test]
    fn table() {
        for (stands, expected) in [
            (vec![], "allow"),
            (vec![stand(1.0, 0.0, 0.0)], "allow"),
            (vec![stand(1.0, 0.99, 0.0)], "allow"),
            (vec![stand(1.0, 0.5, 0.49)], "allow"),
            (vec![stand(1.0, 0.5, 0.5)], "wait"),
            (vec![stand(1.0, 0.0, 9.0)], "wait"),
            (vec![stand(1.0, 1.0, 0.0)], "refuse"),
            (vec![stand(1.0, 1.5, 9.0)], "refuse"),
            (vec![stand(9.0, 0.0, 0.0), stand(1.0, 0.5, 0.6)], "wait"),
            (vec![stand(1.0, 0.5, 0.6), stand(1.0, 2.0, 0.0)], "refuse"),
        ] {
            let decided = match decide(&stands) {
                Decision::Allow => "allow",
                Decision::Wait(_) => "wait",
                Decision::Refuse(_) => "refuse",
            };
            assert_eq!(decided, expected, "{stands:?}");
        }
    }

    #[test]
    fn overspend_is_one_request_whatever_the_order() {
        // Each request costs at most its worst case; they come and go in a fixed disorder.
        let (limit, worst) = (1.0, 0.7);
        let (mut spent, mut held, mut seed) = (0.0, 0.0, 7_u64);
        let mut under_way = 0;
        for _ in 0..1000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let dice = seed >> 60;
            if dice < 8 {
                if decide(&[stand(limit, spent, held)]) == Decision::Allow {
                    held += worst;
                    under_way += 1;
                }
            } else if under_way > 0 {
                under_way -= 1;
                held -= worst;
                spent += worst * f64::from((seed >> 32) as u32 % 8) / 7.0;
            }
            assert!(spent < limit + worst, "{spent}");
        }
        assert!(spent >= limit, "it was used up: {spent}");
    }

    #[test]
    fn days_and_months_begin_where_the_people_are() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let at: Timestamp = "2026-10-31T23:30:00Z".parse().unwrap();
        let at = at.to_zoned(zone);
        assert_eq!(Term::Day.first_day(&at).to_string(), "2026-11-01");
        assert_eq!(Term::Month.first_day(&at).to_string(), "2026-11-01");
        assert_eq!(
            Term::Day.end(&at).unwrap().to_string(),
            "2026-11-01T23:00:00Z"
        );
        assert_eq!(
            Term::Month.end(&at).unwrap().to_string(),
            "2026-11-30T23:00:00Z"
        );
        assert_eq!(Term::Whole.end(&at), None);
    }

    #[test]
    fn a_breach_says_until_when() {
        let limit = Limit {
            level: Level::Client,
            term: Term::Month,
            usd: 20.0,
        };
        let breach = Breach {
            limit,
            spent_usd: 20.126,
            resets: Some("2026-12-01T00:00:00Z".parse().unwrap()),
        };
        assert_eq!(
            breach.to_string(),
            "the client's budget for this month is used up ($20.13 of $20.00); it begins anew at \
             2026-12-01 00:00 UTC"
        );
        assert!(is_nearly_spent(limit, 16.0) && !is_nearly_spent(limit, 15.99));
    }
}
