//! `greenroom alt-text`: what is printed of a site's images.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    time::Duration,
};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::json;

use super::Usage;
use crate::{
    alt_text::{FolderAnswer, Progress, Report, is_language},
    app::{self, AltTextJob},
    config::Mode,
    telemetry,
};

pub(super) fn command() -> Command {
    let command = Command::new("alt-text")
        .about("Give the images of a site that have no alt text one")
        .arg(
            Arg::new("folder")
                .value_name("DIR")
                .default_value(".")
                .value_parser(value_parser!(PathBuf))
                .help("The site; its pages are written in place"),
        )
        .arg(
            Arg::new("language")
                .long("language")
                .value_name("TAG")
                .help("Language of all texts, as de or pt-BR; else what the site says"),
        )
        .arg(super::label_model())
        .arg(super::max_usd())
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Say which images would get a text and what that may cost at most"),
        )
        .arg(super::json())
        .arg(super::rehearsal());
    super::with_settings(command)
}

pub(super) fn run(args: &ArgMatches) -> anyhow::Result<()> {
    let loaded = super::load(args, Mode::Inspect)?;
    let text = |name: &str| args.get_one::<String>(name).cloned();
    let job = AltTextJob {
        folder: args
            .get_one::<PathBuf>("folder")
            .cloned()
            .unwrap_or_default(),
        language: text("language"),
        model: text("model"),
        most_usd: args.get_one::<f64>("max-usd").copied(),
        is_dry: args.get_flag("dry-run"),
    };
    if job
        .most_usd
        .is_some_and(|most| !(most.is_finite() && most > 0.0))
    {
        return Err(Usage("--max-usd has to be a number of dollars above 0".to_owned()).into());
    }
    if job.language.as_ref().is_some_and(|code| !is_language(code)) {
        return Err(Usage("--language has to be a tag like de or pt-BR".to_owned()).into());
    }
    if job
        .model
        .as_ref()
        .is_some_and(|model| !crate::label::is_model_name(model))
    {
        return Err(Usage("--model is no name of a model".to_owned()).into());
    }
    super::start_watched_log(&loaded.settings)?;
    let has_bar = io::stderr().is_terminal();
    let tell = move |progress: &Progress| {
        if has_bar {
            let Progress {
                done,
                total,
                cost_usd,
                ..
            } = progress;
            let _unreported = write!(io::stderr(), "\r\x1b[K{done}/{total}  ${cost_usd:.4}");
        }
    };
    let runtime = super::runtime()?;
    let done = runtime.block_on(app::alt_text(loaded, job, tell));
    runtime.shutdown_timeout(Duration::from_millis(500));
    if has_bar {
        let _unreported = write!(io::stderr(), "\r\x1b[K");
    }
    let answer = done?;
    super::print(&match args.get_flag("json") {
        true => as_json(&answer),
        false => for_people(&answer),
    })?;
    match answer.report.stopped {
        Some(why) => anyhow::bail!("not all images were described: {why}"),
        None => Ok(()),
    }
}

fn as_json(answer: &FolderAnswer) -> String {
    let mut told = json!({
        "images": answer.images,
        "costUsd": answer.cost_usd,
        "report": answer.report,
    });
    if let Some(worst) = answer.worst_usd {
        told["dryRun"] = json!(true);
        told["worstCaseUsd"] = json!(worst);
    }
    format!("{told:#}")
}

fn for_people(answer: &FolderAnswer) -> String {
    let FolderAnswer {
        report, worst_usd, ..
    } = answer;
    let mut lines: Vec<String> = Vec::new();
    for done in &report.done {
        let alt = if done.alt.is_empty() {
            "would get a text"
        } else {
            &done.alt
        };
        lines.push(format!(
            "{}:{}  {}  {alt}",
            done.file, done.line, done.image
        ));
    }
    if !report.person.is_empty() {
        lines.push("For a person:".to_owned());
    }
    for left in &report.person {
        lines.push(format!("{}:{}  {}", left.file, left.line, left.why));
    }
    lines.push(match worst_usd {
        Some(worst) => format!(
            "{} images would be described, at most ${worst:.2} in all; {}",
            answer.images,
            rest(report)
        ),
        None => format!(
            "{} ${:.4}; {}",
            report.in_words(),
            answer.cost_usd,
            rest(report)
        ),
    });
    let lines = lines.iter().map(|line| telemetry::printable(line));
    lines.collect::<Vec<_>>().join("\n")
}

fn rest(report: &Report) -> String {
    format!(
        "{} for a person, {} decorative",
        report.person.len(),
        report.decorative
    )
}
