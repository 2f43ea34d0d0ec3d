//! `greenroom usage live` on a terminal: what is spent right now, drawn anew each second. Leaves
//! with `q`, Escape or Ctrl-C.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Cell, Gauge, Paragraph, Row, Table},
};

use super::usage::grouped;
use crate::{
    domain::Account,
    telemetry,
    usage::{BudgetView, Live, Recent, Sums},
};

/// Budgets that are drawn, two lines each.
const GAUGES: usize = 5;

/// Draws what `look` says, every `every`.
pub(super) fn run(
    mut look: impl FnMut() -> anyhow::Result<Live>,
    every: Duration,
) -> anyhow::Result<()> {
    ensure!(
        std::io::stdout().is_terminal(),
        "usage live draws on a terminal; with --json it prints a line each second"
    );
    // What is wrong is told before the screen is taken.
    let mut view = look()?;
    let mut terminal = ratatui::try_init().context("failed to draw on this terminal")?;
    let result = (|| -> anyhow::Result<()> {
        loop {
            terminal.draw(|frame| draw(frame, &view))?;
            let next = Instant::now() + every;
            loop {
                let left = next.saturating_duration_since(Instant::now());
                if !event::poll(left)? {
                    break;
                }
                match event::read()? {
                    Event::Key(key) if is_farewell(key.code, key.modifiers) => return Ok(()),
                    Event::Resize(..) => break,
                    _ => {}
                }
            }
            view = look()?;
        }
    })();
    ratatui::restore();
    result
}

fn is_farewell(code: KeyCode, modifiers: KeyModifiers) -> bool {
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

fn draw(frame: &mut Frame<'_>, view: &Live) {
    let budgets = view.budgets.len().min(GAUGES);
    let budget_lines = if budgets == 0 { 1 } else { 2 * budgets };
    let [head, sums, budgets, recent, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(5),
        Constraint::Length(budget_lines as u16 + 2),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(rates(view), head);
    frame.render_widget(totals(view), sums);
    draw_budgets(frame, &view.budgets, budgets);
    frame.render_widget(requests(&view.recent), recent);
    let at = view.at.strftime("%Y-%m-%d %H:%M:%S UTC");
    frame.render_widget(Line::from(format!(" {at}   q leaves")).dim_style(), foot);
}

/// Grey, where a terminal has it.
trait Dim {
    fn dim_style(self) -> Self;
}

impl Dim for Line<'_> {
    fn dim_style(self) -> Self {
        self.style(Style::new().add_modifier(Modifier::DIM))
    }
}

fn rates(view: &Live) -> Paragraph<'static> {
    let strong = Style::new().add_modifier(Modifier::BOLD);
    let pair = |number: String, what: &'static str| [Span::styled(number, strong), Span::raw(what)];
    let mut spans = vec![Span::raw(" ")];
    spans.extend(pair(
        format!("{:.1}", view.output_tokens_per_second),
        " tokens/s out   ",
    ));
    spans.extend(pair(
        format!("{:.0}", view.tokens_per_second),
        " tokens/s in all   ",
    ));
    spans.extend(pair(
        format!("${:.2}", view.cost_per_hour_usd),
        " an hour   ",
    ));
    spans.extend(pair(view.under_way.to_string(), " under way"));
    Paragraph::new(Line::from(spans)).block(Block::bordered().title(" now "))
}

fn totals(view: &Live) -> Table<'static> {
    let row = |name: &'static str, sums: &Sums| {
        Row::new([
            Cell::from(name),
            Cell::from(format!("${:.4}", sums.cost_usd)),
            Cell::from(grouped(sums.requests)),
            Cell::from(grouped(sums.input_tokens)),
            Cell::from(grouped(sums.output_tokens)),
            Cell::from(grouped(sums.cache_read_tokens)),
            Cell::from(grouped(sums.cache_creation_tokens)),
        ])
    };
    let head = [
        "",
        "cost",
        "requests",
        "input",
        "output",
        "cache read",
        "cache write",
    ];
    let widths = [7, 12, 9, 13, 13, 14, 13].map(Constraint::Length);
    Table::new(
        [row("today", &view.today), row("month", &view.month)],
        widths,
    )
    .header(Row::new(head).style(Style::new().add_modifier(Modifier::DIM)))
    .block(Block::bordered().title(" spent "))
}

fn draw_budgets(frame: &mut Frame<'_>, budgets: &[BudgetView], area: Rect) {
    let block = Block::bordered().title(" budgets ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    if budgets.is_empty() {
        frame.render_widget(
            Line::from(" none is set, or nothing was spent").dim_style(),
            inner,
        );
        return;
    }
    for (at, budget) in budgets.iter().take(GAUGES).enumerate() {
        let top = inner.y + 2 * at as u16;
        if top + 1 >= inner.bottom() {
            return;
        }
        let line = |y| Rect {
            y,
            height: 1,
            ..inner
        };
        let key = telemetry::printable(&budget.key);
        let leads = match budget.used_up_at {
            Some(at) => format!("used up at {}", at.strftime("%m-%d %H:%M UTC")),
            None => format!("${:.2} at the end at this pace", budget.projected_usd),
        };
        let title = format!(" {key}, a {}: {leads}", budget.term);
        frame.render_widget(Line::from(title), line(top));
        let share = budget.spent_usd / budget.limit_usd;
        let colour = match share {
            1.0.. => Color::Red,
            0.8.. => Color::Yellow,
            _ => Color::Green,
        };
        let label = format!("${:.2} of ${:.2}", budget.spent_usd, budget.limit_usd);
        let gauge = Gauge::default()
            .gauge_style(Style::new().fg(colour))
            .ratio(share.clamp(0.0, 1.0))
            .label(label);
        frame.render_widget(gauge, line(top + 1));
    }
}

fn requests(recent: &[Recent]) -> Table<'static> {
    let rows = recent.iter().map(|request| {
        let sums = &request.sums;
        Row::new([
            request.at.strftime("%H:%M:%S").to_string(),
            telemetry::printable(&whose(request)),
            telemetry::printable(&request.model),
            request.status.to_owned(),
            grouped(sums.input_tokens + sums.cache_read_tokens + sums.cache_creation_tokens),
            grouped(sums.output_tokens),
            format!("${:.4}", sums.cost_usd),
            format!("{:.1} s", request.duration_ms as f64 / 1000.0),
        ])
    });
    let head = ["at", "who", "model", "", "prompt", "answer", "cost", "took"];
    let widths = [
        Constraint::Length(8),
        Constraint::Fill(2),
        Constraint::Fill(1),
        Constraint::Length(8),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(10),
        Constraint::Length(8),
    ];
    Table::new(rows, widths)
        .header(Row::new(head).style(Style::new().add_modifier(Modifier::DIM)))
        .block(Block::bordered().title(" last requests "))
}

/// `client/user/thread` as far as they are known, and what it was where that is no turn.
fn whose(request: &Recent) -> String {
    let who = request.key.trim_end_matches("/-");
    match (who, request.kind.as_str()) {
        ("-", kind) => kind.to_owned(),
        (who, Account::TURN) => who.to_owned(),
        (who, kind) => format!("{who} ({kind})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::{Terminal, backend::TestBackend};

    fn screen(view: &Live, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let cells: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
        let lines = cells.chunks(usize::from(width)).map(|line| line.concat());
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_person_sees_what_is_spent_and_where_it_leads() {
        let at = "2026-11-21T12:00:00Z".parse().unwrap();
        let sums = Sums {
            requests: 3,
            input_tokens: 1200,
            output_tokens: 34_567,
            cost_usd: 0.5,
            ..Sums::default()
        };
        let view = Live {
            at,
            under_way: 2,
            output_tokens_per_second: 61.25,
            tokens_per_second: 900.0,
            cost_per_hour_usd: 3.456,
            today: sums,
            month: sums,
            budgets: vec![BudgetView {
                level: "user",
                term: "day",
                key: "acme/alice".into(),
                spent_usd: 8.5,
                limit_usd: 10.0,
                projected_usd: 12.0,
                used_up_at: Some("2026-11-21T18:30:00Z".parse().unwrap()),
            }],
            recent: [
                ("acme/alice/main\x1b[2J", "turn"),
                ("-/-/-", "service"),
                ("globex/-/-", "gateway"),
            ]
            .map(|(key, kind)| Recent {
                at,
                key: key.into(),
                kind: kind.into(),
                model: "claude-opus-5".into(),
                status: "settled",
                duration_ms: 4200,
                sums,
            })
            .into(),
        };
        let screen_100 = screen(&view, 110, 30);
        for said in [
            "61.2 tokens/s out",
            "$3.46 an hour",
            "2 under way",
            "34,567",
            "acme/alice, a day: used up at 11-21 18:30 UTC",
            "$8.50 of $10.00",
            "acme/alice/main",
            " service ",
            "globex (gateway)",
            "4.2 s",
        ] {
            assert!(screen_100.contains(said), "{said}\n{screen_100}");
        }
        assert!(!screen_100.contains('\x1b') && !screen_100.contains("/-"));
        // However small the terminal is.
        for (width, height) in [(1, 1), (20, 5), (40, 12)] {
            screen(&view, width, height);
        }
    }
}
