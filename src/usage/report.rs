//! Reports: the ledgers of all containers, added up.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    path::PathBuf,
    str::FromStr,
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp, civil::Date, tz::TimeZone};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    file::{Look, Tail, Tenants},
    purses::LOST_AFTER,
    row::{Request, Row},
};
use crate::{domain::Account, identity::ThreadId, lease::Owner};

/// The grain of what is kept: no time zone's day begins within a quarter of an hour.
const GRAIN_SECONDS: i64 = 15 * 60;
/// Requests that are remembered one by one, for the monitor: those of its longest window, and a
/// few more to show.
const RECENT_FOR: SignedDuration = SignedDuration::from_mins(15);
const RECENT_SHOWN: usize = 20;
const RECENT_MOST: usize = 20_000;

/// How long a bucket is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    #[default]
    Daily,
    Weekly,
    Monthly,
}

/// What rows are apart by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum By {
    #[default]
    Client,
    User,
    Thread,
    Model,
}

/// A word that is none of a question's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("has to be one of {0}")]
pub struct NotOneOf(&'static str);

impl Period {
    /// All of them, as they are written.
    pub const NAMES: &str = "daily, weekly, monthly";

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
        }
    }

    /// Names the bucket of a day: `2026-11-21`, `2026-W47` (ISO 8601, weeks begin on Monday),
    /// `2026-11`. Names sort by time.
    fn bucket(self, day: Date) -> String {
        match self {
            Self::Daily => day.to_string(),
            Self::Weekly => {
                let week = day.iso_week_date();
                format!("{:04}-W{:02}", week.year(), week.week())
            }
            Self::Monthly => format!("{:04}-{:02}", day.year(), day.month()),
        }
    }
}

impl FromStr for Period {
    type Err = NotOneOf;
    fn from_str(text: &str) -> Result<Self, NotOneOf> {
        match text {
            "daily" => Ok(Self::Daily),
            "weekly" => Ok(Self::Weekly),
            "monthly" => Ok(Self::Monthly),
            _ => Err(NotOneOf(Self::NAMES)),
        }
    }
}

impl By {
    /// All of them, as they are written.
    pub const NAMES: &str = "client, user, thread, model";

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::User => "user",
            Self::Thread => "thread",
            Self::Model => "model",
        }
    }
}

impl FromStr for By {
    type Err = NotOneOf;
    fn from_str(text: &str) -> Result<Self, NotOneOf> {
        match text {
            "client" => Ok(Self::Client),
            "user" => Ok(Self::User),
            "thread" => Ok(Self::Thread),
            "model" => Ok(Self::Model),
            _ => Err(NotOneOf(Self::NAMES)),
        }
    }
}

/// What a report is asked for.
#[derive(Debug, Clone)]
pub struct Question {
    pub period: Period,
    pub by: By,
    /// Where days begin.
    pub zone: TimeZone,
    pub tenants: Tenants,
    pub thread: Option<ThreadId>,
    /// First and last day, in `zone`.
    pub from: Option<Date>,
    pub to: Option<Date>,
}

/// Sums of requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sums {
    /// Requests that a model answered, wholly or in part; predictions too.
    pub requests: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub cache_read_tokens: u64,
    /// `cacheWrite5mTokens` and `cacheWrite1hTokens`.
    pub cache_creation_tokens: u64,
    /// Written to the cache for five minutes.
    pub cache_write_5m_tokens: u64,
    /// Written to the cache for an hour.
    pub cache_write_1h_tokens: u64,
    /// US dollars.
    pub cost_usd: f64,
    /// How many of the requests were cut off.
    pub aborted: u64,
    /// How many of them nobody settled, because their container died: counted at their worst.
    pub unsettled: u64,
    /// How many of them were predictions on Replicate, of which the model API and the CLI know nothing.
    pub predictions: u64,
    /// Their part of the cost.
    pub prediction_cost_usd: f64,
    /// How many of the predictions count nothing, because nobody says what their model costs.
    pub uncounted: u64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.cache_read_tokens += other.cache_read_tokens;
        self.cache_creation_tokens += other.cache_creation_tokens;
        self.cache_write_5m_tokens += other.cache_write_5m_tokens;
        self.cache_write_1h_tokens += other.cache_write_1h_tokens;
        self.cost_usd += other.cost_usd;
        self.aborted += other.aborted;
        self.unsettled += other.unsettled;
        self.predictions += other.predictions;
        self.prediction_cost_usd += other.prediction_cost_usd;
        self.uncounted += other.uncounted;
    }

    fn of(request: &Request) -> Self {
        let (tokens, cost_usd) = (&request.tokens, request.cost_usd);
        let is_prediction = request.account.kind == Account::IMAGES;
        Self {
            requests: 1,
            predictions: u64::from(is_prediction),
            prediction_cost_usd: if is_prediction { cost_usd } else { 0.0 },
            uncounted: u64::from(request.is_uncounted),
            input_tokens: tokens.input,
            output_tokens: tokens.output,
            cache_read_tokens: tokens.cache_read,
            cache_creation_tokens: tokens.cache_creation(),
            cache_write_5m_tokens: tokens.cache_write_5m,
            cache_write_1h_tokens: tokens.cache_write_1h,
            cost_usd,
            ..Self::default()
        }
    }
}

/// One line of a report.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportRow {
    /// `2026-11-21`, `2026-W47`, `2026-11`.
    pub bucket: String,
    /// `client`, `client/user`, `client/user/thread` or the model; `-` stands for none.
    pub key: String,
    #[serde(flatten)]
    pub sums: Sums,
}

/// A report.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub period: Period,
    pub by: By,
    /// Where days begin.
    pub time_zone: String,
    /// By bucket, then by key.
    pub rows: Vec<ReportRow>,
    pub totals: Sums,
}

/// A request that is over, as the monitor shows it.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Recent {
    /// When it was over.
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// `client/user/thread`; `-` stands for none.
    pub key: String,
    pub kind: String,
    pub model: String,
    pub status: &'static str,
    pub duration_ms: u64,
    #[serde(flatten)]
    pub sums: Sums,
}

/// What one sum is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// In grains since the epoch.
    at: i64,
    client: String,
    user: String,
    thread: String,
    model: String,
}

impl Key {
    fn new(request: &Request) -> Self {
        let Account {
            client,
            user,
            thread,
            ..
        } = &request.account;
        let text = |id: Option<&dyn fmt::Display>| id.map_or("-".to_owned(), |id| id.to_string());
        Self {
            at: request.at.as_second().div_euclid(GRAIN_SECONDS),
            client: text(client.as_ref().map(|id| id as _)),
            user: text(user.as_ref().map(|id| id as _)),
            thread: text(thread.as_ref().map(|id| id as _)),
            model: request.model.clone(),
        }
    }

    fn begins(&self) -> Timestamp {
        Timestamp::from_second(self.at * GRAIN_SECONDS).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    fn shown(&self, by: By) -> String {
        match by {
            By::Client => self.client.clone(),
            By::User => format!("{}/{}", self.client, self.user),
            By::Thread => format!("{}/{}/{}", self.client, self.user, self.thread),
            By::Model => self.model.clone(),
        }
    }
}

/// The ledgers of a workspace as they were read so far. A refresh reads what was added since.
#[derive(Debug)]
pub struct Book {
    root: PathBuf,
    tenants: Tenants,
    tail: Tail,
    sums: BTreeMap<Key, Sums>,
    open: HashMap<String, (Request, Option<Arc<Owner>>)>,
    /// See [`Row`]: settled by another process, and the reservation not read yet.
    settled_first: HashSet<String>,
    recent: Vec<Recent>,
}

impl Book {
    /// Of these tenants; nothing is read yet.
    pub fn new(root: impl Into<PathBuf>, tenants: Tenants) -> Self {
        Self {
            root: root.into(),
            tenants,
            tail: Tail::default(),
            sums: BTreeMap::new(),
            open: HashMap::new(),
            settled_first: HashSet::new(),
            recent: Vec::new(),
        }
    }

    /// Reads what was added to the ledgers. Blocking.
    ///
    /// # Errors
    /// The disk's own.
    pub fn refresh(&mut self) -> io::Result<()> {
        self.tail.find(&self.root, &self.tenants, None, |_| true)?;
        let Self {
            tail,
            sums,
            open,
            settled_first,
            recent,
            ..
        } = self;
        tail.read(Look::All, |entry| {
            let (request, status) = match entry.row {
                Row::Reserved(request) if settled_first.remove(&request.id) => return,
                Row::Reserved(request) => {
                    let owner = entry.owner.cloned();
                    open.insert(request.id.clone(), (request, owner));
                    return;
                }
                Row::Settled(request) => (request, "settled"),
                Row::Aborted(request) => (request, "aborted"),
                Row::Refused(request) => (request, "refused"),
                Row::Opened { .. } | Row::Unknown => return,
            };
            if open.remove(&request.id).is_none() {
                settled_first.insert(request.id.clone());
            }
            if status == "refused" {
                return;
            }
            let of = Sums {
                aborted: u64::from(status == "aborted"),
                ..Sums::of(&request)
            };
            let key = Key::new(&request);
            let took =
                SignedDuration::from_millis(i64::try_from(request.duration_ms).unwrap_or_default());
            recent.push(Recent {
                at: request.at + took,
                key: key.shown(By::Thread),
                kind: request.account.kind.to_string(),
                model: request.model.clone(),
                status,
                duration_ms: request.duration_ms,
                sums: of,
            });
            sums.entry(key).or_default().add(&of);
            if recent.len() > 2 * RECENT_MOST {
                trim(recent);
            }
        })?;
        trim(recent);
        Ok(())
    }

    /// Requests that are under way.
    pub fn under_way(&self) -> usize {
        let now = Timestamp::now();
        let open = self.open.values();
        open.filter(|(request, owner)| !is_lost(request, owner.as_deref(), now))
            .count()
    }

    /// The requests that were over last, oldest first.
    pub fn recent(&self) -> &[Recent] {
        &self.recent
    }

    /// Adds up.
    pub fn report(&self, question: &Question) -> Report {
        let mut rows: BTreeMap<(String, String), Sums> = BTreeMap::new();
        let now = Timestamp::now();
        let lost = self
            .open
            .values()
            .filter(|(request, owner)| is_lost(request, owner.as_deref(), now))
            .map(|(request, _)| {
                let sums = Sums {
                    unsettled: 1,
                    ..Sums::of(request)
                };
                (Key::new(request), sums)
            });
        let settled = self.sums.iter().map(|(key, sums)| (key.clone(), *sums));
        let mut totals = Sums::default();
        for (key, sums) in settled.chain(lost) {
            let day = key.begins().to_zoned(question.zone.clone()).date();
            let is_asked = question.from.is_none_or(|from| day >= from)
                && question.to.is_none_or(|to| day <= to)
                && is(question.tenants.client.as_ref(), &key.client)
                && is(question.tenants.user.as_ref(), &key.user)
                && is(question.thread.as_ref(), &key.thread);
            if is_asked {
                let row = (question.period.bucket(day), key.shown(question.by));
                rows.entry(row).or_default().add(&sums);
                totals.add(&sums);
            }
        }
        let rows = rows
            .into_iter()
            .map(|((bucket, key), sums)| ReportRow { bucket, key, sums });
        Report {
            period: question.period,
            by: question.by,
            time_zone: question.zone.iana_name().unwrap_or("UTC").to_owned(),
            rows: rows.collect(),
            totals,
        }
    }
}

fn is(wanted: Option<&impl fmt::Display>, id: &str) -> bool {
    wanted.is_none_or(|wanted| wanted.to_string() == id)
}

fn is_lost(request: &Request, owner: Option<&Owner>, now: Timestamp) -> bool {
    owner.is_some_and(Owner::is_gone) || now.duration_since(request.at) > LOST_AFTER
}

fn trim(recent: &mut Vec<Recent>) {
    recent.sort_by_key(|recent| recent.at);
    let since = Timestamp::now() - RECENT_FOR;
    let old = recent.partition_point(|recent| recent.at < since);
    let surplus = old.min(recent.len().saturating_sub(RECENT_SHOWN));
    recent.drain(..surplus.max(recent.len().saturating_sub(RECENT_MOST)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_sort_by_time() {
        for (day, week, month) in [
            ("2026-11-21", "2026-W47", "2026-11"),
            ("2027-01-03", "2026-W53", "2027-01"),
            ("2027-01-04", "2027-W01", "2027-01"),
        ] {
            let date: Date = day.parse().unwrap();
            assert_eq!(Period::Daily.bucket(date), day);
            assert_eq!(Period::Weekly.bucket(date), week);
            assert_eq!(Period::Monthly.bucket(date), month);
        }
    }

    #[test]
    fn words_come_back_as_they_were() {
        for word in Period::NAMES.split(", ") {
            assert_eq!(word.parse::<Period>().unwrap().as_str(), word);
        }
        for word in By::NAMES.split(", ") {
            assert_eq!(word.parse::<By>().unwrap().as_str(), word);
        }
        assert!("yearly".parse::<Period>().is_err());
    }
}
