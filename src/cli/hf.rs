//! `greenroom hf`: publish a LoRA on the Hugging Face Hub, list models.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::{
    Usage,
    progress::{LastLine, bytes, clock, gauge},
    usage::grouped,
};
use crate::{
    app,
    config::Mode,
    hub::{LoraFolder, Model, ModelName, Progress, Publication, Published, Reason, Source, Stage},
    telemetry::printable,
};

pub(super) fn command() -> Command {
    Command::new("hf")
        .about("Publish models on the Hugging Face Hub, and list them")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(super::with_settings(publish_command()))
        .subcommand(super::with_settings(list_command()))
}

fn publish_command() -> Command {
    Command::new("publish-hf-lora")
        .about("Publish a LoRA with its samples and a model card")
        .arg(
            Arg::new("name")
                .long("name")
                .value_name("NAME")
                .required(true)
                .help("The repository: NAME, or OWNER/NAME for an organisation's"),
        )
        .arg(
            Arg::new("source-dir")
                .long("source-dir")
                .value_name("DIR")
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .help("Folder of the training: my_lora.safetensors and samples/"),
        )
        .arg(
            Arg::new("model-file")
                .long("model-file")
                .value_name("FILE")
                .help("The .safetensors file in it that is meant, where there are several"),
        )
        .arg(
            Arg::new("private")
                .long("private")
                .value_name("BOOL")
                .num_args(0..=1)
                .default_value("true")
                .default_missing_value("true")
                .value_parser(value_parser!(bool))
                .help("Whether the repository is private"),
        )
        .arg(
            Arg::new("replace-card")
                .long("replace-card")
                .action(ArgAction::SetTrue)
                .help("Write the model card anew although somebody edited it on the Hub"),
        )
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Say what would be published; asks nobody and needs no token"),
        )
        .arg(super::json())
}

fn list_command() -> Command {
    Command::new("list-models")
        .about("List models, the last changed first")
        .arg(
            Arg::new("limit")
                .long("limit")
                .value_name("N")
                .default_value("20")
                .value_parser(value_parser!(u16).range(1..=1000))
                .help("How many at most"),
        )
        .arg(
            Arg::new("author")
                .long("author")
                .value_name("NAME")
                .help("Whose; else those of the token's owner"),
        )
        .arg(super::json())
}

pub(super) fn run(args: &ArgMatches) -> anyhow::Result<()> {
    match args.subcommand() {
        Some(("publish-hf-lora", args)) => publish(args),
        Some(("list-models", args)) => list(args),
        other => unreachable!("clap knows no {other:?}"),
    }
}

fn publish(args: &ArgMatches) -> anyhow::Result<()> {
    let loaded = super::load(args, Mode::Inspect)?;
    let text = |name: &str| args.get_one::<String>(name).map(String::as_str);
    let name = text("name").unwrap_or_default();
    let name = ModelName::parse(name).map_err(|error| Usage(format!("--name: {error}")))?;
    let folder = args.get_one::<PathBuf>("source-dir");
    let folder = LoraFolder::read(folder.expect("clap demands it"), text("model-file"))?;
    let publication = Publication {
        name,
        folder,
        is_private: args.get_one("private").copied().unwrap_or(true),
        replaces_card: args.get_flag("replace-card"),
    };
    let (is_dry, is_json) = (args.get_flag("dry-run"), args.get_flag("json"));
    match (is_json, is_dry) {
        (true, true) => return super::print(&format!("{:#}", as_json(&publication))),
        (true, false) => {}
        (false, _) => super::print(&table(&publication))?,
    }
    if is_dry {
        return Ok(());
    }
    super::start_watched_log(&loaded.settings)?;
    let last_line = LastLine::new();
    let runtime = super::runtime()?;
    let published = runtime.block_on(app::publish(loaded, publication, |progress| {
        last_line.show(|| bar(progress));
    }));
    last_line.clear();
    // A read of a stuck disk must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(500));
    let published = published?;
    super::print(&match is_json {
        true => serde_json::to_string_pretty(&published).expect("plain data serialises"),
        false => outcome(&published),
    })
}

fn list(args: &ArgMatches) -> anyhow::Result<()> {
    let loaded = super::load(args, Mode::Inspect)?;
    let author = args.get_one::<String>("author").cloned();
    if let Some(author) = &author
        && !ModelName::parse(author).is_ok_and(|name| name.owner().is_none())
    {
        return Err(Usage("--author is no name of a user or an organisation".to_owned()).into());
    }
    let limit = args.get_one::<u16>("limit").copied().unwrap_or(20);
    super::start_watched_log(&loaded.settings)?;
    let runtime = super::runtime()?;
    let models = runtime.block_on(app::models(loaded, author, limit.into()));
    runtime.shutdown_timeout(Duration::from_millis(500));
    let models = models?;
    super::print(&match args.get_flag("json") {
        true => serde_json::to_string_pretty(&models).expect("plain data serialises"),
        false => models_table(&models),
    })
}

/// What a file is in a publication.
fn role(publication: &Publication, file: &Source) -> String {
    let folder = &publication.folder;
    let sample = (folder.samples.iter()).find(|sample| sample.file.name() == file.name());
    match sample {
        Some(sample) => format!("sample of prompt {}, step {}", sample.prompt, sample.step),
        None if file.name() == folder.model.name() => "model".to_owned(),
        None => "model card, made of these".to_owned(),
    }
}

fn table(publication: &Publication) -> String {
    let files = publication.files();
    let rows = files.iter().map(|file| {
        let size = bytes(file.size());
        [printable(file.name()), size, role(publication, file)]
    });
    let head = ["File", "Size", "What"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let privacy = privacy(Some(publication.is_private));
    let mut text = format!("{} ({privacy})\n\n", publication.name);
    text.push_str(&aligned(&rows, &[1]));
    if publication.folder.samples.is_empty() {
        text.push_str(
            "\n\nThere are no samples (samples/TIME__STEP_PROMPT.jpg), so the card shows none.",
        );
    }
    let left_out = left_out(publication);
    if !left_out.is_empty() {
        let counts = left_out
            .iter()
            .map(|(reason, names)| format!("{} {}", names.len(), reason.as_str()));
        let counts: Vec<String> = counts.collect();
        text.push_str(&format!("\n\nLeft out: {}.", counts.join(", ")));
    }
    text
}

fn left_out(publication: &Publication) -> BTreeMap<Reason, Vec<&str>> {
    let mut left_out: BTreeMap<Reason, Vec<&str>> = BTreeMap::new();
    for (name, reason) in &publication.folder.left_out {
        left_out.entry(*reason).or_default().push(name);
    }
    left_out
}

fn as_json(publication: &Publication) -> Value {
    let files = publication.files();
    let files = files.iter().map(
        |file| json!({"name": file.name(), "bytes": file.size(), "what": role(publication, file)}),
    );
    let left_out = left_out(publication);
    let left_out = left_out.iter().flat_map(|(reason, names)| {
        let named = names.iter();
        named.map(|name| json!({"name": name, "why": reason.as_str()}))
    });
    json!({
        "dryRun": true,
        "repository": publication.name.to_string(),
        "private": publication.is_private,
        "files": files.collect::<Vec<_>>(),
        "leftOut": left_out.collect::<Vec<_>>(),
    })
}

fn outcome(published: &Published) -> String {
    let url = printable(&published.url);
    let mut text = match published.files.len() {
        0 => format!("Already up to date: {url}"),
        count => {
            let unchanged = match published.unchanged.len() {
                0 => String::new(),
                unchanged => format!(", {unchanged} unchanged"),
            };
            let commit = published.commit.as_deref().unwrap_or("unknown");
            let commit: String = commit.chars().take(12).collect();
            format!(
                "Published: {url} ({}), {count} files{unchanged}, {} uploaded, commit {}",
                privacy(Some(published.private)),
                bytes(published.uploaded_bytes),
                printable(&commit)
            )
        }
    };
    if published.card_kept {
        text.push_str(
            "\nThe model card was edited on the Hub and is kept; --replace-card writes it anew.",
        );
    }
    text
}

fn models_table(models: &[Model]) -> String {
    let number = |number: Option<u64>| number.map_or("-".to_owned(), grouped);
    let rows = models.iter().map(|model| {
        let changed = model.last_modified.as_deref().unwrap_or("-");
        let day: String = changed.chars().take(10).collect();
        [
            printable(&model.id),
            privacy(model.private).to_owned(),
            number(model.downloads),
            number(model.likes),
            printable(&day),
        ]
    });
    let head = ["Model", "Privacy", "Downloads", "Likes", "Changed"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    match models.is_empty() {
        true => "There are no models.".to_owned(),
        false => aligned(&rows, &[2, 3]),
    }
}

fn privacy(is_private: Option<bool>) -> &'static str {
    match is_private {
        Some(true) => "private",
        Some(false) => "public",
        None => "-",
    }
}

/// Columns below each other; those of numbers end in line.
fn aligned<const N: usize>(rows: &[[String; N]], numbers: &[usize]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| match numbers.contains(&column) {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// `[####····] 1.2 GB of 2.1 GB  35.0 MB/s  0:26 left  my_lora.safetensors`.
fn bar(progress: &Progress) -> String {
    let what = match progress.stage {
        Stage::Asking => return "Asking the Hub …".to_owned(),
        Stage::Committing => return "Committing …".to_owned(),
        Stage::Reading => "Reading",
        Stage::Uploading => "Uploading",
    };
    let Progress { done, total, .. } = *progress;
    let per_second = done as f64 / progress.elapsed.as_secs_f64().max(0.001);
    let mut text = format!(
        "{what} {} {} of {}  {}/s",
        gauge(done, total),
        bytes(done),
        bytes(total),
        bytes(per_second as u64)
    );
    if done > 0 {
        let left = total.saturating_sub(done) as f64 / per_second;
        text.push_str(&format!("  {} left", clock(left as u64)));
    }
    let name: String = printable(&progress.file).chars().take(40).collect();
    format!("{text}  {name}")
}
