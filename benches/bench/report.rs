//! Samples, tables, and their place in `docs/performance.md`.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Context as _;

use crate::world::World;

/// What the numbers of a row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Ms,
    Us,
    Mb,
    PerSecond,
    PerMinute,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Ms if value < 10.0 => format!("{value:.2} ms"),
            Self::Ms => format!("{value:.0} ms"),
            Self::Us => format!("{value:.1} µs"),
            Self::Mb => format!("{value:.1} MB"),
            Self::PerMinute => format!("{value:.0}"),
            Self::PerSecond => format!("{:.0}", (value / 100.0).round() * 100.0),
        }
    }
}

/// One thing that was measured a number of times.
#[derive(Debug)]
pub(crate) struct Row {
    what: String,
    unit: Unit,
    values: Vec<f64>,
    /// The row that this one is put beside.
    base: Option<usize>,
    aim: &'static str,
}

/// The rows of a part.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    note: String,
}

impl Table {
    /// A row of greenroom's own; returns its number, for others to be put beside it.
    pub(crate) fn own(
        &mut self,
        what: impl Into<String>,
        unit: Unit,
        values: Vec<f64>,
        aim: &'static str,
    ) -> usize {
        self.rows.push(Row {
            what: what.into(),
            unit,
            values,
            base: None,
            aim,
        });
        self.rows.len() - 1
    }

    /// A row of something else, beside one of ours.
    pub(crate) fn rival(
        &mut self,
        what: impl Into<String>,
        unit: Unit,
        values: Vec<f64>,
        base: usize,
    ) {
        self.rows.push(Row {
            what: what.into(),
            unit,
            values,
            base: Some(base),
            aim: "",
        });
    }

    /// A sentence below the table.
    pub(crate) fn note(&mut self, note: &str) {
        if !self.note.is_empty() {
            self.note.push(' ');
        }
        self.note.push_str(note);
    }

    /// As Markdown.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from(
            "| measured | median | middle half | n | beside greenroom | aim |\n|---|--:|--:|--:|--:|---|\n",
        );
        for row in &self.rows {
            let [low, median, high] = [0.25, 0.5, 0.75].map(|part| quantile(&row.values, part));
            let beside = row.base.map(|base| {
                let own = quantile(&self.rows[base].values, 0.5);
                format!("{:.2} ×", median / own)
            });
            let show = |value| row.unit.show(value);
            let is_own = row.base.is_none();
            let bold = if is_own { "**" } else { "" };
            writeln!(
                text,
                "| {} | {bold}{}{bold} | {} to {} | {} | {} | {} |",
                row.what,
                show(median),
                show(low),
                show(high),
                row.values.len(),
                beside.unwrap_or_default(),
                row.aim,
            )
            .expect("a String takes all");
        }
        if !self.note.is_empty() {
            writeln!(text, "\n{}", self.note).expect("a String takes all");
        }
        text
    }
}

/// By linear interpolation; NaN of nothing.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let place = part * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - place.floor())
}

/// Puts a part's table between its markers.
pub(crate) fn write(name: &str, table: &Table, world: &World) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    let page = fs::read_to_string(&path).context("failed to read docs/performance.md")?;
    let (begin, end) = (
        format!("<!-- bench: {name} -->"),
        format!("<!-- end: {name} -->"),
    );
    let (before, rest) = page
        .split_once(&begin)
        .with_context(|| format!("docs/performance.md has no marker {begin}"))?;
    let (_, after) = rest
        .split_once(&end)
        .with_context(|| format!("docs/performance.md has no marker {end}"))?;
    let machine = world.machine();
    let text = table.text();
    fs::write(
        &path,
        format!("{before}{begin}\n{text}\n{machine}\n{end}{after}"),
    )?;
    Ok(())
}
