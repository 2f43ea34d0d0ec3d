//! `greenroom replicate run-model`: what is typed, and what is printed of it.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    time::Duration,
};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::Usage;
use crate::{
    app::{self, ModelJob, ModelNews, ModelRan, Run},
    config::Mode,
    replicate::{FileInput, ModelName, News},
    telemetry,
};

/// Longest text of an output that is repeated in JSON beside its file.
const MAX_DATA: usize = 100;

pub(super) fn command() -> Command {
    let many = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .action(ArgAction::Append)
            .help(help)
    };
    let file = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .value_parser(value_parser!(PathBuf))
            .help(help)
    };
    let command = Command::new("run-model")
        .about("Run a model on Replicate and save what it makes (needs REPLICATE_API_TOKEN)")
        .arg(
            Arg::new("model")
                .value_name("OWNER/MODEL")
                .required(true)
                .help("The model; also OWNER/MODEL:VERSION, or a version alone"),
        )
        .arg(
            Arg::new("version")
                .value_name("VERSION")
                .help("A version of it: 64 hexadecimal digits; else the latest"),
        )
        .arg(many(
            "param",
            "KEY:VALUE",
            "A parameter of the model; once more for a further item of a list",
        ))
        .arg(many(
            "input-file",
            "KEY=PATH",
            "A parameter that is a file of this machine",
        ))
        .arg(file(
            "output",
            "DIR",
            "Where files are saved [default: here]",
        ))
        .arg(file(
            "config",
            "FILE",
            "Settings of models; else MODEL_CONFIGS_FILE, else config/model_configs.yaml",
        ))
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .value_name("SECONDS")
                .value_parser(value_parser!(u64).range(5..=86_400))
                .help("Cancel it after so long; else what the settings of models say, else 1800"),
        )
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Check the parameters and say what would be sent; costs nothing"),
        )
        .arg(super::json());
    Command::new("replicate")
        .about("Models on Replicate")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(super::with_settings(command))
}

pub(super) fn run(args: &ArgMatches) -> anyhow::Result<()> {
    let Some(("run-model", args)) = args.subcommand() else {
        unreachable!("clap knows no other");
    };
    let loaded = super::load(args, Mode::Inspect)?;
    let job = job(args)?;
    super::start_watched_log(&loaded.settings)?;
    let mut watcher = Watcher::new();
    let runtime = super::runtime()?;
    let ran = runtime.block_on(app::run_model(loaded, job, |news| watcher.hear(news)));
    runtime.shutdown_timeout(Duration::from_millis(500));
    watcher.clear();
    match ran? {
        ModelRan::Dry { version, input } => {
            let told = json!({"dryRun": true, "version": version, "input": input});
            super::print(&format!("{told:#}"))
        }
        ModelRan::Done(run) => {
            let text = match args.get_flag("json") {
                true => format!("{:#}", as_json(&run)),
                false => for_people(&run),
            };
            if !text.is_empty() {
                super::print(&text)?;
            }
            if !args.get_flag("json") {
                note(&costs(&run));
            }
            match run.not_saved.first() {
                None => Ok(()),
                Some(why) => anyhow::bail!(
                    "{} of {} files were not saved: {why}",
                    run.not_saved.len(),
                    run.not_saved.len() + run.saved.len()
                ),
            }
        }
    }
}

fn job(args: &ArgMatches) -> anyhow::Result<ModelJob> {
    let text = |name: &str| args.get_one::<String>(name).cloned();
    let usage = |error: &dyn std::fmt::Display| Usage(error.to_string());
    let name = text("model").unwrap_or_default();
    let mut model: ModelName = name.parse().map_err(|error| usage(&error))?;
    if let Some(version) = text("version") {
        model = model.at(&version).map_err(|error| usage(&error))?;
    }
    let all = |name: &str| args.get_many::<String>(name).unwrap_or_default();
    let mut params = Vec::new();
    for param in all("param") {
        params.push(pair("--param", "KEY:VALUE", param, ':')?);
    }
    let mut files = Vec::new();
    for file in all("input-file") {
        let (param, path) = pair("--input-file", "KEY=PATH", file, '=')?;
        files.push(FileInput {
            param,
            path: path.into(),
        });
    }
    let output = args.get_one::<PathBuf>("output").cloned();
    Ok(ModelJob {
        model,
        params,
        files,
        configs: args.get_one::<PathBuf>("config").cloned(),
        output: output.unwrap_or_else(|| PathBuf::from(".")),
        timeout: args
            .get_one::<u64>("timeout")
            .map(|seconds| Duration::from_secs(*seconds)),
        is_dry: args.get_flag("dry-run"),
    })
}

/// A name and what belongs to it.
fn pair(flag: &str, form: &str, text: &str, mark: char) -> Result<(String, String), Usage> {
    match text.split_once(mark) {
        Some((name, value)) if !name.trim().is_empty() => {
            Ok((name.trim().to_owned(), value.to_owned()))
        }
        _ => Err(Usage(format!("{flag} {text:?}: write {form}"))),
    }
}

/// Tells on standard error how far it is: lines, and on a terminal a last one that changes.
struct Watcher {
    has_bar: bool,
    status: &'static str,
    percent: Option<u8>,
}

impl Watcher {
    fn new() -> Self {
        Self {
            has_bar: io::stderr().is_terminal(),
            status: "",
            percent: None,
        }
    }

    fn hear(&mut self, news: ModelNews) {
        match news {
            ModelNews::Checked { version } => self.line(&match version {
                Some(version) => format!(
                    "parameters fit version {}",
                    &version[..12.min(version.len())]
                ),
                None => "parameters fit".to_owned(),
            }),
            ModelNews::Unchecked => self.line(
                "parameters are not checked, since Replicate tells nothing of this version: name \
                 its model too",
            ),
            ModelNews::UnknownSetting(word) => {
                self.line(&format!(
                    "settings of the model: {word} means nothing and is passed over"
                ));
            }
            ModelNews::Sending(path) => self.line(&format!("sending {}", path.display())),
            ModelNews::Created { id } => self.line(&format!("prediction {id}")),
            ModelNews::Saving(1) => self.line("saving 1 file"),
            ModelNews::Saving(count) => self.line(&format!("saving {count} files")),
            ModelNews::Prediction(News::Log(line)) => self.line(&line),
            ModelNews::Prediction(News::Silent) => {
                self.line("Replicate does not answer; it is asked on");
            }
            ModelNews::Prediction(News::Ending) => {
                self.line("cancelling it; a second signal leaves it as it is");
            }
            ModelNews::Prediction(News::Percent(done)) => {
                self.percent = Some(done);
                self.bar();
            }
            ModelNews::Prediction(News::Status(status)) => {
                self.status = status.as_str();
                if self.has_bar {
                    self.bar();
                } else {
                    self.line(self.status);
                }
            }
        }
    }

    fn line(&self, line: &str) {
        self.clear();
        note(line);
        self.bar();
    }

    fn bar(&self) {
        const WIDTH: usize = 24;
        if !self.has_bar || self.status.is_empty() {
            return;
        }
        let done = self.percent.map_or_else(String::new, |percent| {
            let full = usize::from(percent) * WIDTH / 100;
            format!(
                "[{}{}] {percent}%  ",
                "#".repeat(full),
                "·".repeat(WIDTH - full)
            )
        });
        let _unreported = write!(io::stderr(), "\r\x1b[K{done}{}", self.status);
        let _unreported = io::stderr().flush();
    }

    fn clear(&self) {
        if self.has_bar {
            let _unreported = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn note(line: &str) {
    let _unreported = writeln!(io::stderr(), "{}", telemetry::printable(line));
}

/// Texts as they are, files by their paths: a line each.
fn for_people(run: &Run) -> String {
    let mut lines: Vec<String> = Vec::new();
    lines.extend(run.text.as_ref().map(|text| fit(text)));
    lines.extend(run.other.as_ref().map(|other| format!("{other:#}")));
    let saved = run.saved.iter();
    lines.extend(saved.map(|saved| saved.path.display().to_string()));
    lines.join("\n")
}

/// A model's text for a terminal: its lines, and nothing that steers it.
fn fit(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(crate::text::plain).collect();
    lines.join("\n")
}

fn costs(run: &Run) -> String {
    let measured = &run.prediction.measured;
    let mut text = match (measured.predict_seconds, measured.total_seconds) {
        (Some(paid), Some(all)) => format!("{paid:.1} s of the model's time, {all:.1} s in all"),
        (Some(paid), None) => format!("{paid:.1} s of the model's time"),
        (None, Some(all)) => format!("{all:.1} s in all"),
        (None, None) => "done".to_owned(),
    };
    text.push_str(&match run.cost_usd {
        Some(usd) => format!(", ${usd:.4}"),
        None if run.is_priced => ", cost not known: Replicate does not tell the time".to_owned(),
        None => ", cost not known: say the model's hardware or price in config/model_configs.yaml"
            .to_owned(),
    });
    text
}

fn as_json(run: &Run) -> Value {
    let measured = &run.prediction.measured;
    let mut told = json!({
        "id": run.prediction.id,
        "status": run.prediction.status,
        "model": run.model.to_string(),
        "version": run.version,
        "output": shortened(&run.prediction.output),
        "text": run.text,
        "files": run.saved,
        "predictSeconds": measured.predict_seconds,
        "totalSeconds": measured.total_seconds,
        "costUsd": run.cost_usd,
        "logs": run.prediction.logs,
    });
    if !run.not_saved.is_empty() {
        let why = run.not_saved.iter().map(ToString::to_string);
        told["notSaved"] = why.collect();
    }
    told
}

/// Without the files that stand in it as text.
fn shortened(output: &Value) -> Value {
    match output {
        Value::String(text) if text.starts_with("data:") && text.len() > MAX_DATA => {
            let start = crate::text::cut(text, MAX_DATA);
            Value::String(format!("{start}…"))
        }
        Value::Array(all) => all.iter().map(shortened).collect(),
        Value::Object(map) => {
            let short = |(key, value): (&String, &Value)| (key.clone(), shortened(value));
            map.iter().map(short).collect()
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> anyhow::Result<ModelJob> {
        let args = line.split(' ');
        let matches = command().try_get_matches_from(args)?;
        let (_, args) = matches.subcommand().unwrap();
        job(args)
    }

    #[test]
    fn what_is_typed_is_what_is_run() {
        let version = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa";
        let line = format!(
            "replicate run-model acme/shoes {version} --param prompt:a:b --param seed:-1 \
             --input-file image=a=b.png --output out --timeout 90"
        );
        let job = read(&line).unwrap();
        assert_eq!(job.model.version(), Some(version));
        assert_eq!(job.params[0], ("prompt".to_owned(), "a:b".to_owned()));
        assert_eq!(job.params[1], ("seed".to_owned(), "-1".to_owned()));
        assert_eq!(job.files[0].path, PathBuf::from("a=b.png"));
        assert_eq!(job.timeout, Some(Duration::from_secs(90)));
        for (line, said) in [
            ("replicate run-model shoes", "OWNER/MODEL"),
            ("replicate run-model acme/shoes latest", "64 hexadecimal"),
            ("replicate run-model acme/shoes --param prompt", "KEY:VALUE"),
            (
                "replicate run-model acme/shoes --input-file image",
                "KEY=PATH",
            ),
            ("replicate run-model acme/shoes --timeout 1", "5..=86400"),
        ] {
            let error = read(line).unwrap_err().to_string();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
