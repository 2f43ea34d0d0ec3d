//! Parsers of setting values: each turns text into a typed value and the form in which
//! `greenroom config` shows it, or says what is wrong and what is allowed.
//!
//! The text comes trimmed and is not empty: an empty value counts as unset.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use jiff::tz::TimeZone;
use serde_json::{Value as Json, json};
use url::{Host, Url};

use super::{LogFormat, PreviewErrors, Secret, Surroundings, error::quoted};
use crate::identity::InvalidId;

/// A value and how it is shown.
#[derive(Debug)]
pub(super) struct Parsed<T> {
    pub(super) value: T,
    pub(super) shown: Json,
}

/// What is wrong with a text. It holds no part of a secret.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) problem: String,
    pub(super) allowed: String,
}

pub(super) type Outcome<T> = Result<Parsed<T>, Wrong>;

fn parsed<T>(value: T, shown: impl Into<Json>) -> Outcome<T> {
    Ok(Parsed {
        value,
        shown: shown.into(),
    })
}

fn wrong<T>(problem: impl Into<String>, allowed: impl Into<String>) -> Outcome<T> {
    Err(Wrong {
        problem: problem.into(),
        allowed: allowed.into(),
    })
}

fn is_blank_or_control(c: char) -> bool {
    c.is_whitespace() || c.is_control()
}

/// `true` or `false` in one of the spellings that people use.
pub(super) fn switch(text: &str, _: &Surroundings) -> Outcome<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => parsed(true, true),
        "false" | "0" | "no" | "off" => parsed(false, false),
        _ => wrong(
            format!("{} is neither true nor false", quoted(text)),
            "true, false, 1, 0, yes, no, on, off",
        ),
    }
}

/// A whole number within `least..=most`.
pub(super) fn count<T>(text: &str, least: u64, most: u64) -> Outcome<T>
where
    T: TryFrom<u64>,
{
    let allowed = format!("a whole number from {least} to {most}");
    // `parse` would take a leading plus as well.
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return wrong(format!("{} is not a whole number", quoted(text)), allowed);
    }
    let in_range = text
        .parse()
        .ok()
        .filter(|n| (least..=most).contains(n))
        .and_then(|n| Some((T::try_from(n).ok()?, n)));
    match in_range {
        Some((value, n)) => parsed(value, n),
        None => wrong(format!("{} is out of range", quoted(text)), allowed),
    }
}

/// A TCP port; 0 lets the system pick a free one.
pub(super) fn port(text: &str, _: &Surroundings) -> Outcome<u16> {
    count(text, 0, u64::from(u16::MAX))
}

/// The longest time that a setting may name, in seconds: a year. Far below what overflows an
/// `Instant`.
const LONGEST_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

fn span(text: &str, unit: &str, seconds_per_unit: f64, zero: bool) -> Outcome<Duration> {
    let most = LONGEST_SECONDS / seconds_per_unit;
    let allowed = format!(
        "a number of {unit} from {} to {most}, fractions too",
        if zero { "0" } else { "more than 0" }
    );
    let number = match text.parse::<f64>() {
        Ok(number) if number.is_finite() => number,
        _ => return wrong(format!("{} is not a number", quoted(text)), allowed),
    };
    let in_range = (0.0..=most).contains(&number) && (zero || number > 0.0);
    if !in_range {
        return wrong(format!("{} is out of range", quoted(text)), allowed);
    }
    // -0.0 is in the range and would be shown with its sign.
    let number = number.abs();
    let shown = if number.fract() == 0.0 {
        json!(number as u64)
    } else {
        json!(number)
    };
    parsed(Duration::from_secs_f64(number * seconds_per_unit), shown)
}

/// Seconds, zero included.
pub(super) fn seconds(text: &str, _: &Surroundings) -> Outcome<Duration> {
    span(text, "seconds", 1.0, true)
}

/// Seconds, more than zero.
pub(super) fn some_seconds(text: &str, _: &Surroundings) -> Outcome<Duration> {
    span(text, "seconds", 1.0, false)
}

/// Minutes; 0 is never.
pub(super) fn minutes_or_never(text: &str, _: &Surroundings) -> Outcome<Option<Duration>> {
    let Parsed { value, shown } = span(text, "minutes", 60.0, true)?;
    parsed((shown != json!(0)).then_some(value), shown)
}

/// An amount of money, more than nothing: a budget of 0 would be taken for none by some and for
/// the end of all work by others.
pub(super) fn dollars(text: &str, _: &Surroundings) -> Outcome<f64> {
    let allowed =
        "a number of US dollars from more than 0 to 1000000, or leave it out for no limit";
    match text.parse::<f64>() {
        Ok(usd) if usd > 0.0 && usd <= 1e6 => parsed(usd, usd),
        Ok(_) => wrong(format!("{} is out of range", quoted(text)), allowed),
        Err(_) => wrong(format!("{} is not a number", quoted(text)), allowed),
    }
}

/// A time zone by its name.
pub(super) fn time_zone(text: &str, _: &Surroundings) -> Outcome<TimeZone> {
    match TimeZone::get(text) {
        Ok(zone) => {
            let name = zone.iana_name().unwrap_or(text).to_owned();
            parsed(zone, name)
        }
        Err(_) => wrong(
            format!("{} is not a time zone", quoted(text)),
            "a name of the IANA database, as in UTC, Europe/Berlin or America/New_York",
        ),
    }
}

/// An id of a tenant or a thread.
pub(super) fn id<T>(text: &str, _: &Surroundings) -> Outcome<T>
where
    T: FromStr<Err = InvalidId>,
{
    match text.parse() {
        Ok(id) => parsed(id, text),
        Err(InvalidId { field }) => wrong(
            format!("{} is not a {field}", quoted(text)),
            "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first, no \"..\", \
             not ending in \".\" or \".lock\"",
        ),
    }
}

/// A path: relative ones are taken from the working directory, `~/` is the home folder.
pub(super) fn path(text: &str, around: &Surroundings) -> Outcome<PathBuf> {
    if text.contains(char::is_control) {
        return wrong("a control character in it", "a path");
    }
    let path = match (text.strip_prefix("~/"), &around.home) {
        (Some(below), Some(home)) => home.join(below),
        _ => around.cwd.join(text),
    };
    // Through its components it loses `./` and double slashes.
    let path: PathBuf = path.components().collect();
    let shown = path.to_string_lossy().into_owned();
    parsed(path, shown)
}

/// A program: a path, or a bare name that is looked up on `PATH`.
pub(super) fn program(text: &str, around: &Surroundings) -> Outcome<PathBuf> {
    if text.contains('/') {
        path(text, around)
    } else if text.contains(char::is_control) {
        wrong("a control character in it", "a path or a program's name")
    } else {
        parsed(PathBuf::from(text), text)
    }
}

/// An http or https URL. A user name or password in it is refused: it would end in logs.
fn web_address(text: &str) -> Result<Url, Wrong> {
    let wrong = |problem: &str| {
        // What looks like it holds a credential is not repeated.
        let value = if text.contains(['@', '?']) {
            Secret::MASK.to_owned()
        } else {
            quoted(text)
        };
        Wrong {
            problem: format!("{value} {problem}"),
            allowed: "an http:// or https:// URL without user name and password".to_owned(),
        }
    };
    if text.contains(is_blank_or_control) {
        return Err(wrong("holds a space or control character"));
    }
    let url = Url::parse(text).map_err(|_| wrong("is not a URL"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("is neither http nor https"));
    }
    // The parser also takes `http:host` and `http:/host`; nobody means those.
    if !text[url.scheme().len()..].starts_with("://") {
        return Err(wrong("is not a URL"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("holds a user name or password"));
    }
    if url.fragment().is_some() {
        return Err(wrong("holds a fragment"));
    }
    Ok(url)
}

/// A URL of someone to call. A query is allowed and not shown: it may hold a token.
pub(super) fn url(text: &str, _: &Surroundings) -> Outcome<String> {
    let url = web_address(text)?;
    let mut shown = url.clone();
    if url.query().is_some() {
        shown.set_query(Some(Secret::MASK));
    }
    parsed(url.to_string(), shown.to_string())
}

/// A URL that paths are appended to: no query, kept without a trailing slash.
pub(super) fn base_url(text: &str, _: &Surroundings) -> Outcome<String> {
    let url = web_address(text)?;
    if url.query().is_some() {
        return wrong("it holds a query", "an http:// or https:// URL without one");
    }
    let base = url.as_str().trim_end_matches('/').to_owned();
    parsed(base.clone(), base)
}

/// Our own public address, in which `{port}` is the port that we listen on.
pub(super) fn public_url(text: &str, around: &Surroundings) -> Outcome<String> {
    let filled = text.replace("{port}", "1");
    if filled.contains(['{', '}']) {
        return wrong(
            format!("{} holds a brace", quoted(text)),
            "an http:// or https:// URL; {port} in it is our port",
        );
    }
    base_url(&filled, around)?;
    let template = text.trim_end_matches('/');
    parsed(template.to_owned(), template)
}

/// The previews' public address, in which `{slug}` is the thread's label and `{port}` the port
/// that we listen on. A thread is told by the first label of the host, so `{slug}` stands there.
pub(super) fn preview_url(text: &str, around: &Surroundings) -> Outcome<String> {
    const LABEL: &str = "thread-label-0";
    let allowed =
        "an http:// or https:// URL, with {slug} as the first label of its host or without it";
    let filled = text.replacen("{slug}", LABEL, 1).replace("{port}", "1");
    if filled.contains(['{', '}']) {
        return wrong(format!("{} holds a brace too many", quoted(text)), allowed);
    }
    base_url(&filled, around).map_err(|wrong| Wrong {
        problem: wrong.problem.replace(LABEL, "{slug}"),
        ..wrong
    })?;
    let at_its_place = !text.contains("{slug}")
        || Url::parse(&filled).is_ok_and(|url| {
            url.host_str().is_some_and(|host| {
                host.strip_prefix(LABEL)
                    .is_some_and(|rest| rest.len() > 1 && rest.starts_with('.'))
            })
        });
    if !at_its_place {
        return wrong(format!("{} has {{slug}} elsewhere", quoted(text)), allowed);
    }
    let template = text.trim_end_matches('/');
    parsed(template.to_owned(), template)
}

/// A repository to clone: https, GitHub's SSH forms (taken as https later), or an absolute local
/// path, whose folder is checked where the allowed one is known.
pub(super) fn repository(text: &str, _: &Surroundings) -> Outcome<String> {
    let allowed = "an https:// URL without user name and password (GITHUB_TOKEN is for that), \
                   or a path below GREENROOM_ALLOWED_LOCAL_REPOS";
    let is_github_ssh =
        text.starts_with("git@github.com:") || text.starts_with("ssh://git@github.com/");
    if text.contains(is_blank_or_control) && !text.starts_with('/') || text.starts_with('-') {
        return wrong("not a repository's address", allowed);
    }
    if text.starts_with('/') {
        if text.contains(char::is_control)
            || Path::new(text).components().any(|c| c.as_os_str() == "..")
        {
            return wrong("a path with \"..\" or a control character", allowed);
        }
    } else if !is_github_ssh {
        match web_address(text) {
            Ok(url) if url.scheme() == "https" && url.query().is_none() => {}
            Ok(_) => return wrong("not an https:// URL", allowed),
            Err(Wrong { problem, .. }) => return wrong(problem, allowed),
        }
    }
    parsed(text.to_owned(), text)
}

/// The name of a model, as the CLI's `--model` takes it.
pub(super) fn model(text: &str, _: &Surroundings) -> Outcome<String> {
    if text.contains(is_blank_or_control) || text.starts_with('-') {
        return wrong(
            format!("{} is not a model's name", quoted(text)),
            "a name without spaces that does not begin with -",
        );
    }
    parsed(text.to_owned(), text)
}

/// A name or address for commits. git ends them at these characters.
pub(super) fn signature(text: &str, _: &Surroundings) -> Outcome<String> {
    if text.contains(['<', '>']) || text.contains(char::is_control) {
        return wrong(
            format!("{} holds <, > or a control character", quoted(text)),
            "text on one line without < and >",
        );
    }
    parsed(text.to_owned(), text)
}

/// Parts of a comma separated list; empty ones are dropped.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

/// Names of the CLI's tools.
pub(super) fn tools(text: &str, _: &Surroundings) -> Outcome<Vec<String>> {
    let is_tool = |item: &&str| {
        item.starts_with(|c: char| c.is_ascii_alphabetic())
            && item.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let allowed = "names of tools separated by commas, as in Read,Edit,Write,Bash,Glob,Grep";
    if let Some(bad) = items(text).find(|item| !is_tool(item)) {
        return wrong(format!("{} is not a tool's name", quoted(bad)), allowed);
    }
    list(text, items(text).map(str::to_owned).collect(), allowed)
}

/// Host names and addresses without ports, in lower case, IPv6 addresses in brackets.
pub(super) fn hosts(text: &str, _: &Surroundings) -> Outcome<Vec<String>> {
    let allowed = "host names or addresses without ports, separated by commas";
    let mut hosts = Vec::new();
    for item in items(text) {
        let host = match item.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => Ok(Host::Ipv6(v6)),
            _ => Host::parse(item.trim_end_matches('.')),
        };
        match host {
            // The parser takes `*`; here it would promise a wildcard that there is not.
            Ok(host) if !item.contains(['*', '%', '{']) => hosts.push(host.to_string()),
            _ => return wrong(format!("{} is not a host", quoted(item)), allowed),
        }
    }
    list(text, hosts, allowed)
}

/// Names that children may ask for, a leading dot meaning every name below; `None` is `any`.
pub(super) fn egress(text: &str, _: &Surroundings) -> Outcome<Option<Vec<String>>> {
    match text.to_ascii_lowercase().as_str() {
        "any" => return parsed(None, "any"),
        "none" => return parsed(Some(Vec::new()), "none"),
        _ => {}
    }
    let allowed = "host names without ports, .example.com for every name below it, separated by \
                   commas; or any, or none";
    let mut names = Vec::new();
    for item in items(text) {
        let (dot, bare) = match item.strip_prefix('.') {
            Some(bare) => (".", bare),
            None => ("", item),
        };
        match Host::parse(bare.trim_end_matches('.')) {
            Ok(Host::Domain(name)) if !item.contains(['*', '%', '{', '/']) && !name.is_empty() => {
                names.push(format!("{dot}{name}"));
            }
            _ => return wrong(format!("{} is not a host's name", quoted(item)), allowed),
        }
    }
    let Parsed { value, shown } = list(text, names, allowed)?;
    parsed(Some(value), shown)
}

/// Only a default is an empty text, and an empty list.
fn list(text: &str, items: Vec<String>, allowed: &str) -> Outcome<Vec<String>> {
    if items.is_empty() && !text.is_empty() {
        return wrong("an empty list", allowed);
    }
    let shown = Json::from(items.clone());
    parsed(items, shown)
}

/// A token that travels in an HTTP header.
pub(super) fn token(text: &str, _: &Surroundings) -> Outcome<Secret> {
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return wrong(
            "a character that a token cannot hold",
            "printable ASCII without spaces",
        );
    }
    parsed(Secret::new(text), Secret::MASK)
}

/// A key that never travels.
pub(super) fn key(text: &str, _: &Surroundings) -> Outcome<Secret> {
    if text.contains(char::is_control) {
        return wrong("a control character in it", "text on one line");
    }
    parsed(Secret::new(text), Secret::MASK)
}

/// An address to listen on.
pub(super) fn address(text: &str, _: &Surroundings) -> Outcome<IpAddr> {
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    let address = match bare {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        bare => bare.parse(),
    };
    match address {
        Ok(address) => parsed(address, address.to_string()),
        Err(_) => wrong(
            format!("{} is not an IP address", quoted(text)),
            "an IPv4 or IPv6 address of this machine, as in 127.0.0.1 or 0.0.0.0",
        ),
    }
}

/// How much is logged.
pub(super) fn level(text: &str, _: &Surroundings) -> Outcome<tracing::Level> {
    let allowed = "error, warn, info, debug, trace";
    let name = text.to_ascii_lowercase();
    match name.parse() {
        // The parser also takes digits.
        Ok(level) if allowed.split(", ").any(|known| known == name) => parsed(level, name),
        _ => wrong(format!("{} is not a level", quoted(text)), allowed),
    }
}

/// How a broken page is shown.
pub(super) fn preview_errors(text: &str, _: &Surroundings) -> Outcome<PreviewErrors> {
    let name = text.to_ascii_lowercase();
    let errors = match name.as_str() {
        "banner" => PreviewErrors::Banner,
        "overlay" => PreviewErrors::Overlay,
        _ => {
            return wrong(
                format!("{} is no way to show them", quoted(text)),
                "banner (the page as it was, with a line that says so), overlay (Vite's own)",
            );
        }
    };
    parsed(errors, name)
}

/// The form of the log.
pub(super) fn format(text: &str, _: &Surroundings) -> Outcome<LogFormat> {
    let name = text.to_ascii_lowercase();
    let format = match name.as_str() {
        "auto" => LogFormat::Auto,
        "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        _ => {
            return wrong(
                format!("{} is not a format", quoted(text)),
                "text, json, auto (text on a terminal, else json)",
            );
        }
    };
    parsed(format, name)
}
