//! What is spent right now: rates over the last minutes, and where they lead to.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    budget::{Budgets, Level, Limit, Term},
    file::Tenants,
    report::{Book, By, Period, Question, Recent, Sums},
};

/// Tokens per second are those of the last minute.
const TOKEN_WINDOW: SignedDuration = SignedDuration::from_secs(60);
/// Dollars per hour are those of the last ten minutes.
const COST_WINDOW: SignedDuration = SignedDuration::from_mins(10);
/// Requests that are shown one by one.
const SHOWN: usize = 10;
/// Purses that are shown: the fullest.
const PURSES: usize = 12;

/// A look at what is spent now.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Live {
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// Requests under way.
    pub under_way: usize,
    /// Of the models' answers, over the last minute.
    pub output_tokens_per_second: f64,
    /// Of prompts and answers, over the last minute.
    pub tokens_per_second: f64,
    /// US dollars, at the pace of the last ten minutes.
    pub cost_per_hour_usd: f64,
    pub today: Sums,
    pub month: Sums,
    /// The fullest first.
    pub budgets: Vec<BudgetView>,
    /// The requests that were over last, newest first.
    pub recent: Vec<Recent>,
}

/// How one budget stands.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct BudgetView {
    /// `client`, `user` or `thread`.
    pub level: &'static str,
    /// `day` or `month`.
    pub term: &'static str,
    /// Whose: `client`, `client/user` or `client/user/thread`.
    pub key: String,
    pub spent_usd: f64,
    pub limit_usd: f64,
    /// What will be spent when the term is over, at its own pace of the last ten minutes.
    pub projected_usd: f64,
    /// When it will be used up at that pace; null: not in this term.
    #[schema(value_type = Option<String>)]
    pub used_up_at: Option<Timestamp>,
}

impl Live {
    /// Looks into a book that was refreshed.
    pub fn of(book: &Book, budgets: &Budgets, tenants: &Tenants, now: Timestamp) -> Self {
        let recent = book.recent();
        let totals = |term: Term| {
            let from = term.first_day(&now.to_zoned(budgets.zone.clone()));
            book.report(&Question {
                period: Period::Monthly,
                by: By::Client,
                zone: budgets.zone.clone(),
                tenants: tenants.clone(),
                thread: None,
                from: Some(from),
                to: None,
            })
            .totals
        };
        let per_second = |count: fn(&Sums) -> u64| {
            let sum: f64 = recent
                .iter()
                .map(|request| count(&request.sums) as f64 * share(request, now, TOKEN_WINDOW))
                .sum();
            sum / TOKEN_WINDOW.as_secs_f64()
        };
        let all = |sums: &Sums| {
            sums.input_tokens
                + sums.output_tokens
                + sums.cache_read_tokens
                + sums.cache_creation_tokens
        };
        Self {
            at: now,
            under_way: book.under_way(),
            output_tokens_per_second: per_second(|sums| sums.output_tokens),
            tokens_per_second: per_second(all),
            cost_per_hour_usd: per_hour(recent, now, |_| true),
            today: totals(Term::Day),
            month: totals(Term::Month),
            budgets: purses(book, budgets, tenants, now),
            recent: recent.iter().rev().take(SHOWN).cloned().collect(),
        }
    }
}

/// The part of a request that lay within the window before `now`. Its tokens are taken to have
/// come evenly.
fn share(request: &Recent, now: Timestamp, window: SignedDuration) -> f64 {
    let took = SignedDuration::from_millis(i64::try_from(request.duration_ms).unwrap_or_default());
    let (begin, end) = ((request.at - took).max(now - window), request.at.min(now));
    let inside = end.duration_since(begin).as_secs_f64();
    if took.is_zero() {
        return if inside >= 0.0 { 1.0 } else { 0.0 };
    }
    (inside / took.as_secs_f64()).clamp(0.0, 1.0)
}

fn per_hour(recent: &[Recent], now: Timestamp, is_of: impl Fn(&Recent) -> bool) -> f64 {
    let spent: f64 = recent
        .iter()
        .filter(|request| is_of(request))
        .map(|request| request.sums.cost_usd * share(request, now, COST_WINDOW))
        .sum();
    spent / COST_WINDOW.as_secs_f64() * 3600.0
}

fn purses(book: &Book, budgets: &Budgets, tenants: &Tenants, now: Timestamp) -> Vec<BudgetView> {
    let mut views = Vec::new();
    for limit in &budgets.limits {
        let by = match limit.level {
            Level::Turn => continue,
            Level::Thread => By::Thread,
            Level::User => By::User,
            Level::Client => By::Client,
        };
        let at = now.to_zoned(budgets.zone.clone());
        let report = book.report(&Question {
            // The term lies in one month: one row for each key.
            period: Period::Monthly,
            by,
            zone: budgets.zone.clone(),
            tenants: tenants.clone(),
            thread: None,
            from: Some(limit.term.first_day(&at)),
            to: None,
        });
        let ends = limit.term.end(&at);
        // What is nobody's in particular has no limit.
        let is_somebody = |key: &str| key.split('/').all(|part| part != "-");
        let rows = report.rows.into_iter();
        views.extend(rows.filter(|row| is_somebody(&row.key)).map(|row| {
            let is_of = |request: &Recent| {
                let rest = request.key.strip_prefix(row.key.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            let pace = per_hour(book.recent(), now, is_of);
            view(*limit, row.key.clone(), row.sums.cost_usd, pace, now, ends)
        }));
    }
    views.sort_by(|a, b| (b.spent_usd / b.limit_usd).total_cmp(&(a.spent_usd / a.limit_usd)));
    views.truncate(PURSES);
    views
}

fn view(
    limit: Limit,
    key: String,
    spent: f64,
    per_hour: f64,
    now: Timestamp,
    ends: Option<Timestamp>,
) -> BudgetView {
    let hours = ends.map_or(0.0, |ends| ends.duration_since(now).as_secs_f64() / 3600.0);
    let projected = spent + per_hour * hours;
    let used_up_at = if spent >= limit.usd {
        Some(now)
    } else if projected >= limit.usd {
        let seconds = (limit.usd - spent) / per_hour * 3600.0;
        Some(now + SignedDuration::from_secs_f64(seconds))
    } else {
        None
    };
    BudgetView {
        level: limit.level.as_str(),
        term: limit.term.as_str(),
        key,
        spent_usd: spent,
        limit_usd: limit.usd,
        projected_usd: projected,
        used_up_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn request(end: &str, seconds: u64, tokens: u64, usd: f64) -> Recent {
        Recent {
            at: at(end),
            key: "acme/alice/main".into(),
            kind: "turn".into(),
            model: "m".into(),
            status: "settled",
            duration_ms: seconds * 1000,
            sums: Sums {
                requests: 1,
                output_tokens: tokens,
                cost_usd: usd,
                ..Sums::default()
            },
        }
    }

    #[test]
    fn a_request_counts_for_the_time_it_took() {
        let now = at("2026-11-21T12:00:00Z");
        let window = SignedDuration::from_secs(60);
        for (end, seconds, expected) in [
            ("2026-11-21T12:00:00Z", 30, 1.0),
            ("2026-11-21T12:00:00Z", 120, 0.5),
            ("2026-11-21T11:59:30Z", 60, 0.5),
            ("2026-11-21T11:59:30Z", 0, 1.0),
            ("2026-11-21T11:58:30Z", 60, 0.0),
            ("2026-11-21T11:58:30Z", 0, 0.0),
        ] {
            let share = share(&request(end, seconds, 1, 1.0), now, window);
            assert!((share - expected).abs() < 1e-9, "{end} {seconds}: {share}");
        }
        let recent = [
            request("2026-11-21T11:59:00Z", 10, 1, 0.5),
            request("2026-11-21T11:55:00Z", 10, 1, 0.5),
            request("2026-11-21T11:40:00Z", 10, 1, 9.0),
        ];
        assert!((per_hour(&recent, now, |_| true) - 6.0).abs() < 1e-9);
    }

    #[test]
    fn the_pace_tells_when_a_budget_is_used_up() {
        let now = at("2026-11-21T12:00:00Z");
        let ends = Some(at("2026-11-22T00:00:00Z"));
        let limit = Limit {
            level: Level::User,
            term: Term::Day,
            usd: 10.0,
        };
        let of = |spent, pace| view(limit, "k".into(), spent, pace, now, ends);
        assert_eq!(of(4.0, 0.0).used_up_at, None);
        assert_eq!(of(4.0, 0.25).used_up_at, None);
        assert!((of(4.0, 0.25).projected_usd - 7.0).abs() < 1e-9);
        assert_eq!(of(4.0, 3.0).used_up_at, Some(at("2026-11-21T14:00:00Z")));
        assert_eq!(of(11.0, 0.0).used_up_at, Some(now));
    }
}
