//! The log: one line an event, on standard error, so that standard output is for results.
//!
//! Text for a person (`14:03:07.120 INFO a sentence turn_id=…`), or one JSON object a line
//! (`timestamp`, `level`, `message`, `target`, then the fields). The fields of all enclosing
//! spans stand on every line, inner ones winning, so `request_id`, `turn_id` and `thread` are
//! never far. Control characters are escaped in both forms: a line is one line, and no value
//! reaches a terminal as an escape sequence.
//!
//! Every secret that was given to [`hide`] is replaced by `***` in whatever is written. The layer
//! holds no task and no buffer: a line is made in memory, bounded, and written by one call. With
//! `LOG_FILE` the same lines go into a file too, which a thread of its own writes ([`file`]).

mod file;

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    io::{IsTerminal, Write},
    path::Path,
    sync::{OnceLock, RwLock},
    time::Duration,
};

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use self::file::LogFile;
pub use self::file::LogFileError;
use crate::config::{LogFormat, Secret};

/// The longest value of a field or message in bytes; what is beyond is cut. A log is for people.
const MAX_VALUE_BYTES: usize = 8 * 1024;
/// Formatted beyond that and thrown away; API keys and tokens are far shorter.
const MARGIN_BYTES: usize = 4 * 1024;
/// The longest line, before masking: spans may hold many fields.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// Events of this target are for the file alone.
const FILE_ONLY: &str = "greenroom::ended";

static FILE: OnceLock<LogFile> = OnceLock::new();
static HIDDEN: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// From now on this secret is `***` in every line that is logged or [`masked`]. Secrets that turn
/// up while running (refreshed OAuth tokens) are given here as well. Kept for good:
/// a token is refreshed a few times a day, and an old one is still a secret.
pub fn hide(secret: &Secret) {
    /// Shorter ones would blot out ordinary words and are no secrets anyway.
    const SHORTEST: usize = 4;
    let plain = secret.expose();
    if plain.len() < SHORTEST {
        return;
    }
    // As it looks inside of a JSON string, and inside of a debug representation.
    let json = serde_json::to_string(plain).expect("text serializes");
    let debug = format!("{plain:?}");
    let mut hidden = HIDDEN
        .write()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    for form in [plain, &json[1..json.len() - 1], &debug[1..debug.len() - 1]] {
        if !hidden.iter().any(|known| known == form) {
            hidden.push(form.to_owned());
        }
    }
    // Longest first: of two secrets one may begin with the other.
    hidden.sort_by_key(|form| std::cmp::Reverse(form.len()));
}

/// The text with every hidden secret as `***`: for output that does not go through the log, an
/// error line or a child's standard error.
pub fn masked(text: &str) -> Cow<'_, str> {
    let hidden = HIDDEN
        .read()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut text = Cow::Borrowed(text);
    for form in hidden.iter() {
        if text.contains(form.as_str()) {
            text = Cow::Owned(text.replace(form.as_str(), Secret::MASK));
        }
    }
    text
}

/// How a process logs.
#[derive(Debug, Clone, Copy)]
pub struct LogSettings<'a> {
    /// On standard error, for greenroom; the libraries below it warn only, but at `trace`.
    pub level: Level,
    pub format: LogFormat,
    /// The same in a file, with its own level.
    pub file: Option<(&'a Path, Level)>,
}

/// Starts the log of this process, and makes panics lines of it. A second call does nothing.
///
/// # Errors
/// If the file cannot be opened; then there is no log.
pub fn start(settings: LogSettings<'_>) -> Result<(), LogFileError> {
    let LogSettings {
        level,
        format,
        file,
    } = settings;
    let terminal = std::io::stderr().is_terminal();
    let form = match format {
        LogFormat::Json => Form::Json,
        LogFormat::Auto if !terminal => Form::Json,
        LogFormat::Auto | LogFormat::Text => Form::Text {
            colour: terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            has_day: false,
        },
    };
    let lines = Lines {
        form,
        writer: std::io::stderr,
    };
    let in_file = match file {
        None => None,
        Some((path, level)) => {
            let form = match format {
                LogFormat::Text => Form::Text {
                    colour: false,
                    has_day: true,
                },
                // A file is no terminal.
                LogFormat::Json | LogFormat::Auto => Form::Json,
            };
            let file = LogFile::start(path, matches!(form, Form::Json))?;
            let file = FILE.get_or_init(|| file);
            let lines = Lines {
                form,
                writer: move || file.clone(),
            };
            let targets = targets(level).with_target(FILE_ONLY, LevelFilter::ERROR);
            Some(lines.with_filter(targets))
        }
    };
    let targets = targets(level).with_target(FILE_ONLY, LevelFilter::OFF);
    let subscriber = tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .with(in_file);
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        std::panic::set_hook(Box::new(|panic| {
            let payload = panic.payload();
            let message = (payload.downcast_ref::<&str>().copied())
                .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            let at = panic.location().map(ToString::to_string);
            tracing::error!(at, "panicked: {message}");
        }));
    }
    Ok(())
}

/// Notes in the log's file why the program ends, which standard error is told anyway.
pub fn ended(line: &str) {
    tracing::error!(target: FILE_ONLY, "{line}");
}

/// Waits until the log's file holds all that was logged, as long as the limit allows; answers how many
/// lines it does not hold.
pub fn finish(limit: Duration) -> u64 {
    FILE.get().map_or(0, |file| file.finish(limit))
}

fn targets(level: Level) -> Targets {
    let others = if level == Level::TRACE {
        level
    } else {
        level.min(Level::WARN)
    };
    Targets::new()
        .with_default(LevelFilter::from_level(others))
        .with_target("greenroom", LevelFilter::from_level(level))
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Text {
        colour: bool,
        /// The day stands before the time: the file is read later.
        has_day: bool,
    },
    Json,
}

/// The layer. `writer` makes a writer a line; errors of it are dropped, there is nobody to tell.
struct Lines<F> {
    form: Form,
    writer: F,
}

/// A field's value.
#[derive(Debug, Clone)]
enum Value {
    /// A number or boolean: the same in both forms.
    Bare(String),
    Text(String),
}

/// Fields in the order of their recording; a name stands once, its last value wins.
#[derive(Debug, Clone, Default)]
struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn set(&mut self, name: &'static str, value: Value) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    fn bare(&mut self, field: &Field, value: impl fmt::Display) {
        self.set(field.name(), Value::Bare(value.to_string()));
    }

    fn text(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let mut bounded = Bounded(String::new());
        let is_cut = bounded.write_fmt(value).is_err();
        // Here, before anything is escaped, secrets look as they are.
        let mut text = masked(&bounded.0).into_owned();
        if is_cut {
            // The cut may have gone through a secret: what is left of it is in the margin.
            text.truncate(edge(&text, text.len().saturating_sub(MARGIN_BYTES)));
            text.push('…');
        }
        self.set(field.name(), Value::Text(text));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, format_args!("{value}"));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }
    fn record_i128(&mut self, field: &Field, value: i128) {
        self.bare(field, value);
    }
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.bare(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinity.
        if value.is_finite() {
            self.bare(field, value);
        } else {
            self.text(field, format_args!("{value}"));
        }
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let chain = std::iter::successors(value.source(), |error| error.source());
        let causes: String = chain.fold(String::new(), |mut text, cause| {
            let _infallible = write!(text, ": {cause}");
            text
        });
        self.text(field, format_args!("{value}{causes}"));
    }
}

/// The last edge of a character at or before `at`, which lies within the text.
fn edge(text: &str, at: usize) -> usize {
    (0..=at)
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or_default()
}

/// Text that stops growing at its limit, on a character's edge.
struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = (MAX_VALUE_BYTES + MARGIN_BYTES).saturating_sub(self.0.len());
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        self.0.push_str(&text[..edge(text, room)]);
        Err(fmt::Error)
    }
}

impl<S, F, W> Layer<S> for Lines<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Fn() -> W + 'static,
    W: Write,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let span = ctx.span(id).expect("a new span is in the registry");
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        // Of two layers both come here, with the same.
        span.extensions_mut().replace(fields);
    }

    fn on_record(&self, id: &span::Id, record: &span::Record<'_>, ctx: Context<'_, S>) {
        let span = ctx.span(id).expect("a recorded span is in the registry");
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            record.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        for span in ctx
            .event_scope(event)
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            if let Some(outer) = span.extensions().get::<Fields>() {
                for (name, value) in &outer.0 {
                    fields.set(name, value.clone());
                }
            }
        }
        event.record(&mut fields);
        let mut line = line(self.form, Timestamp::now(), event.metadata(), &fields);
        line.push('\n');
        // One call, so that lines of threads do not mix; nowhere to report a failure.
        let _unreported = (self.writer)().write_all(masked(&line).as_bytes());
    }
}

fn line(form: Form, now: Timestamp, metadata: &Metadata<'_>, fields: &Fields) -> String {
    let mut line = String::with_capacity(256);
    let is_message = |name: &str| name == "message";
    let message = fields
        .0
        .iter()
        .find(|(name, _)| is_message(name))
        .map(|(_, value)| value);
    let others = fields.0.iter().filter(|(name, _)| !is_message(name));
    let time = DateTimePrinter::new()
        .precision(Some(3))
        .timestamp_to_string(&now);
    match form {
        Form::Json => {
            // All of it is ASCII that JSON takes as it is.
            line.push_str("{\"timestamp\":\"");
            line.push_str(&time);
            line.push_str("\",\"level\":\"");
            line.push_str(&metadata.level().as_str().to_ascii_lowercase());
            line.push_str("\",\"message\":");
            push_json(&mut line, message);
            line.push_str(",\"target\":");
            push_json_text(&mut line, metadata.target());
            for (name, value) in others {
                if line.len() > MAX_LINE_BYTES {
                    line.push_str(",\"cut\":true");
                    break;
                }
                line.push(',');
                let is_taken = ["timestamp", "level", "target", "cut"].contains(name);
                push_json_text(
                    &mut line,
                    &format!("{name}{}", if is_taken { "_" } else { "" }),
                );
                line.push(':');
                push_json(&mut line, Some(value));
            }
            line.push('}');
        }
        Form::Text { colour, has_day } => {
            let (on, off) = match (colour, *metadata.level()) {
                (false, _) | (true, Level::INFO) => ("", ""),
                (true, Level::ERROR) => ("\x1b[31m", "\x1b[0m"),
                (true, Level::WARN) => ("\x1b[33m", "\x1b[0m"),
                (true, _) => ("\x1b[2m", "\x1b[0m"),
            };
            line.push_str(if has_day { &time } else { &time[11..] });
            let level = metadata.level().as_str();
            let _infallible = write!(line, " {on}{level:<5}{off} ");
            match message {
                Some(Value::Text(text) | Value::Bare(text)) => push_plain(&mut line, text),
                None => line.push_str(metadata.name()),
            }
            for (name, value) in others {
                if line.len() > MAX_LINE_BYTES {
                    line.push_str(" …");
                    break;
                }
                line.push(' ');
                line.push_str(name);
                line.push('=');
                match value {
                    Value::Bare(text) => line.push_str(text),
                    Value::Text(text) => {
                        let bare = !text.is_empty()
                            && !text.contains(|c: char| c.is_whitespace() || c == '"' || c == '=');
                        if bare {
                            push_plain(&mut line, text);
                        } else {
                            line.push('"');
                            push_plain(&mut line, &text.replace('"', "\\\""));
                            line.push('"');
                        }
                    }
                }
            }
        }
    }
    line
}

fn push_json(line: &mut String, value: Option<&Value>) {
    match value {
        Some(Value::Bare(text)) => line.push_str(text),
        Some(Value::Text(text)) => push_json_text(line, text),
        None => line.push_str("\"\""),
    }
}

fn push_json_text(line: &mut String, text: &str) {
    let json = serde_json::to_string(text).expect("text serializes");
    // JSON escapes the first 32 control characters; terminals act on others too.
    push_escaped(line, &json, |c| c.is_control() || is_reordering(c));
}

fn push_plain(line: &mut String, text: &str) {
    push_escaped(line, text, |c| c.is_control() || is_reordering(c));
}

/// Characters that make a terminal show text in another order than it has.
fn is_reordering(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

fn push_escaped(line: &mut String, text: &str, escape: impl Fn(char) -> bool) {
    for c in text.chars() {
        match c {
            '\n' => line.push_str("\\n"),
            c if escape(c) => {
                let _infallible = write!(line, "\\u{:04x}", u32::from(c));
            }
            c => line.push(c),
        }
    }
}

/// A sentence for a terminal: control characters escaped, secrets masked, one line.
pub fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    push_plain(&mut line, text);
    masked(&line).into_owned()
}

#[cfg(test)]
mod tests;
