//! `greenroom config`: every setting, its value and where it came from.

use std::io::Write;

use serde_json::{Map, Value as Json, json};

use crate::{config::Loaded, telemetry};

/// Prints the settings; warnings go to standard error. Secrets come masked out of
/// [`config`](crate::config) already.
pub(super) fn run(loaded: &Loaded, json: bool) -> anyhow::Result<()> {
    for warning in &loaded.warnings {
        let line = telemetry::printable(&format!("warning: {warning}"));
        let _unreported = writeln!(std::io::stderr(), "{line}");
    }
    let shown = if json {
        as_json(loaded)
    } else {
        as_text(loaded)
    };
    // Once more by value: a secret may also stand where none belongs.
    super::print(&telemetry::masked(&shown))
}

/// `{"API_PORT": {"value": 8080, "source": "default"}, …}`.
fn as_json(loaded: &Loaded) -> String {
    let settings: Map<String, Json> = loaded
        .entries
        .iter()
        .map(|entry| {
            let shown = json!({ "value": entry.value, "source": entry.source.to_string() });
            (entry.name.to_owned(), shown)
        })
        .collect();
    format!("{:#}", Json::Object(settings))
}

/// Three columns; `-` is a setting without a value.
fn as_text(loaded: &Loaded) -> String {
    let rows: Vec<[String; 3]> = loaded
        .entries
        .iter()
        .map(|entry| {
            let cell = |text: &str| telemetry::printable(text);
            [
                entry.name.to_owned(),
                cell(&as_cell(&entry.value)),
                cell(&entry.source.to_string()),
            ]
        })
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or_default()
    };
    let (names, values) = (width(0), width(1));
    let lines: Vec<String> = rows
        .iter()
        .map(|[name, value, source]| format!("{name:<names$}  {value:<values$}  {source}"))
        .collect();
    lines.join("\n")
}

fn as_cell(value: &Json) -> String {
    match value {
        Json::Null => "-".to_owned(),
        Json::String(text) => text.clone(),
        Json::Array(items) if items.is_empty() => "-".to_owned(),
        Json::Array(items) => items.iter().map(as_cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}
