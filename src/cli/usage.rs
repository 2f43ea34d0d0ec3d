//! `greenroom usage`: what model requests cost, read from the workspace itself: no supervisor has
//! to run.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Arg, ArgAction, ArgMatches, Command};
use jiff::{Timestamp, civil::Date};

use super::{Usage, monitor};
use crate::{
    app,
    config::{Loaded, Mode},
    telemetry,
    usage::{Book, By, Live, Period, Question, Report, ReportRow, Sums},
};

/// How often the ledgers are looked at by `live`.
const EVERY: Duration = Duration::from_secs(1);

pub(super) fn command() -> Command {
    let command = Command::new("usage")
        .about("Report what model requests cost")
        .arg(
            Arg::new("period")
                .required(true)
                .value_parser(["daily", "weekly", "monthly", "live"])
                .help("Days, weeks or months; or what is spent right now"),
        )
        .arg(
            Arg::new("by")
                .long("by")
                .value_parser(["client", "user", "thread", "model"])
                .default_value("client")
                .help("What rows are apart by"),
        )
        .arg(day("since", "First day, as 2026-11-21"))
        .arg(day("until", "Last day"))
        .arg(
            Arg::new("csv")
                .long("csv")
                .action(ArgAction::SetTrue)
                .conflicts_with("json")
                .help("Print CSV"),
        )
        .arg(super::json())
        .mut_arg("json", |arg| {
            arg.help("Print JSON; of live one object a second and line")
        });
    super::without_log(command).mut_arg("USAGE_TIME_ZONE", |arg| arg.visible_alias("time-zone"))
}

fn day(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("DAY").help(help)
}

pub(super) fn run(args: &ArgMatches) -> anyhow::Result<()> {
    let loaded = super::load(args, Mode::Inspect)?;
    let settings = &loaded.settings;
    let workspace = &settings.workspace_path;
    if !workspace.is_dir() {
        anyhow::bail!(
            "there is no workspace at {}; set WORKSPACE_PATH",
            workspace.display()
        );
    }
    let mut book = Book::new(workspace.clone(), app::tenants(settings));
    let period = args
        .get_one::<String>("period")
        .map(String::as_str)
        .unwrap_or_default();
    if period == "live" {
        return live(&mut book, &loaded, args.get_flag("json"));
    }
    let question = Question {
        period: period
            .parse::<Period>()
            .map_err(|error| Usage(error.to_string()))?,
        by: word(args, "by")
            .parse::<By>()
            .map_err(|error| Usage(error.to_string()))?,
        zone: settings.usage_time_zone.clone(),
        tenants: app::tenants(settings),
        thread: settings.thread_id.clone(),
        from: parse_day(args, "since")?,
        to: parse_day(args, "until")?,
    };
    book.refresh().context("failed to read the usage ledgers")?;
    let report = book.report(&question);
    super::print(&if args.get_flag("json") {
        serde_json::to_string_pretty(&report).expect("plain data serialises")
    } else if args.get_flag("csv") {
        as_csv(&report)
    } else {
        as_table(&report)
    })
}

fn word<'a>(args: &'a ArgMatches, name: &str) -> &'a str {
    args.get_one::<String>(name).map_or("", String::as_str)
}

fn parse_day(args: &ArgMatches, name: &str) -> anyhow::Result<Option<Date>> {
    let day = args.get_one::<String>(name).map(|text| {
        text.parse::<Date>()
            .map_err(|_| Usage(format!("--{name} has to be a day, as 2026-11-21")))
    });
    Ok(day.transpose()?)
}

/// Tells what is spent now, until nobody listens any more.
fn live(book: &mut Book, loaded: &Loaded, json: bool) -> anyhow::Result<()> {
    let settings = &loaded.settings;
    let (budgets, tenants) = (app::budgets(settings), app::tenants(settings));
    let mut look = || -> anyhow::Result<Live> {
        book.refresh().context("failed to read the usage ledgers")?;
        Ok(Live::of(book, &budgets, &tenants, Timestamp::now()))
    };
    if !json {
        return monitor::run(look, EVERY);
    }
    loop {
        let begun = Instant::now();
        let view = look()?;
        super::print(&serde_json::to_string(&view).expect("plain data serialises"))?;
        thread::sleep(EVERY.saturating_sub(begun.elapsed()));
    }
}

const FIELDS: [&str; 8] = [
    "bucket",
    "key",
    "requests",
    "inputTokens",
    "outputTokens",
    "cacheReadTokens",
    "cacheCreationTokens",
    "costUsd",
];

fn numbers(sums: &Sums) -> [u64; 5] {
    [
        sums.requests,
        sums.input_tokens,
        sums.output_tokens,
        sums.cache_read_tokens,
        sums.cache_creation_tokens,
    ]
}

/// By RFC 4180, but for the line ends.
fn as_csv(report: &Report) -> String {
    let mut csv = FIELDS.join(",");
    for ReportRow { bucket, key, sums } in &report.rows {
        csv.push_str(&format!("\n{bucket},{}", csv_text(key)));
        for number in numbers(sums) {
            csv.push_str(&format!(",{number}"));
        }
        csv.push_str(&format!(",{:.6}", sums.cost_usd));
    }
    csv
}

/// A text as a cell. What a spreadsheet would take for a formula (a model's name is whatever its
/// request says) begins with an apostrophe.
pub(super) fn csv_text(text: &str) -> String {
    let text = telemetry::printable(text);
    let is_formula = text.starts_with(['=', '+', '@']) || text.starts_with("-=");
    let text = if is_formula { format!("'{text}") } else { text };
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text
    }
}

/// Aligned columns, with the totals below.
fn as_table(report: &Report) -> String {
    let key = match report.by {
        By::Client => "Client",
        By::User => "User",
        By::Thread => "Thread",
        By::Model => "Model",
    };
    let bucket = match report.period {
        Period::Daily => "Day",
        Period::Weekly => "Week",
        Period::Monthly => "Month",
    };
    let head = [
        bucket,
        key,
        "Requests",
        "Input",
        "Output",
        "Cache read",
        "Cache write",
        "Cost (USD)",
    ]
    .map(str::to_owned);
    let row = |bucket: &str, key: &str, sums: &Sums| {
        let [requests, input, output, read, written] = numbers(sums).map(grouped);
        let cost = format!("{:.4}", sums.cost_usd);
        [
            bucket.to_owned(),
            telemetry::printable(key),
            requests,
            input,
            output,
            read,
            written,
            cost,
        ]
    };
    let mut rows = vec![head];
    rows.extend(report.rows.iter().map(|r| row(&r.bucket, &r.key, &r.sums)));
    rows.push(row("Total", "", &report.totals));
    let widths: Vec<usize> = (0..FIELDS.len())
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or_default()
        })
        .collect();
    let mut lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(column, (cell, width))| match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect();
    let rule = "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1));
    lines.insert(1, rule.clone());
    lines.insert(lines.len() - 1, rule);
    let notes = [
        (
            report.totals.unsettled,
            "counted at the most they may have cost, because their container died",
        ),
        (
            report.totals.aborted,
            "cut off, and counted as far as they had come",
        ),
    ];
    for (count, what) in notes.into_iter().filter(|(count, _)| *count > 0) {
        lines.push(format!("{} of the requests were {what}.", grouped(count)));
    }
    let totals = &report.totals;
    if totals.predictions > 0 {
        lines.push(format!(
            "{} of the requests were predictions on Replicate (${:.4} of the cost), which the CLI's own \
             counts do not have.",
            grouped(totals.predictions),
            totals.prediction_cost_usd
        ));
    }
    if totals.uncounted > 0 {
        lines.push(format!(
            "{} of them count nothing, because nobody says what their model costs: say so in \
             config/model_configs.yaml.",
            grouped(totals.uncounted)
        ));
    }
    lines.push(format!("Days begin in {}.", report.time_zone));
    lines.join("\n")
}

/// `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let sums = Sums {
            requests: 2,
            input_tokens: 1_234_567,
            output_tokens: 89,
            cost_usd: 1.5,
            unsettled: 1,
            ..Sums::default()
        };
        let row = |key: &str| ReportRow {
            bucket: "2026-11-21".into(),
            key: key.into(),
            sums,
        };
        Report {
            period: Period::Daily,
            by: By::Model,
            time_zone: "UTC".into(),
            rows: vec![row("claude-opus-5"), row("=a,\"b\"")],
            totals: sums,
        }
    }

    #[test]
    fn columns_line_up() {
        let table = as_table(&report());
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0],
            "Day         Model          Requests      Input  Output  Cache read  Cache write  Cost (USD)"
        );
        assert_eq!(
            lines[2],
            "2026-11-21  claude-opus-5         2  1,234,567      89           0            0      1.5000"
        );
        assert!(lines[5].starts_with("Total  "), "{table}");
        assert!(table.contains("1 of the requests were counted at the most"));
        assert!(!table.contains("Replicate"));
    }

    #[test]
    fn what_the_cli_knows_nothing_of_is_told_apart() {
        let mut report = report();
        report.totals.predictions = 3;
        report.totals.prediction_cost_usd = 0.25;
        report.totals.uncounted = 1;
        let table = as_table(&report);
        for said in [
            "3 of the requests were predictions on Replicate ($0.2500",
            "1 of them count nothing",
        ] {
            assert!(table.contains(said), "{table}");
        }
    }

    #[test]
    fn a_name_from_outside_moves_no_terminal() {
        let mut report = report();
        // Whoever sends a request names its model.
        report.rows[0].key = "claude\u{1b}[2J\u{1b}]0;owned\u{7}\n\u{202e}".into();
        let table = as_table(&report);
        assert_eq!(
            table.lines().count(),
            super::as_table(&self::report()).lines().count()
        );
        let is_plain = |c: char| c == '\n' || (!c.is_control() && c != '\u{202e}');
        assert!(table.chars().all(is_plain), "{table:?}");
    }

    #[test]
    fn a_cell_is_a_cell() {
        let csv = as_csv(&report());
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(
            lines[0],
            "bucket,key,requests,inputTokens,outputTokens,cacheReadTokens,cacheCreationTokens,costUsd"
        );
        assert_eq!(
            lines[1],
            "2026-11-21,claude-opus-5,2,1234567,89,0,0,1.500000"
        );
        assert_eq!(
            lines[2],
            "2026-11-21,\"'=a,\"\"b\"\"\",2,1234567,89,0,0,1.500000"
        );
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, shown) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (12_345_678, "12,345,678"),
        ] {
            assert_eq!(grouped(number), shown);
        }
    }
}
