//! The command line: subcommands, exit statuses, and the one line in which every failure ends.
//!
//! Flags of settings are made from [`config::TABLE`]. Exit status: 0 done, 1 failed, 2 wrong
//! usage, a flag's bad value included. Results go to standard output, errors and the log to
//! standard error.

mod alt_text;
mod health;
mod hf;
mod label;
mod monitor;
mod progress;
mod replicate;
mod show;
mod usage;

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Arg, ArgAction, ArgMatches, Command, error::ErrorKind};

use crate::{
    api, app,
    config::{self, ConfigError, Flags, Kind, Loaded, Mode, Settings, Spec, TABLE},
    process,
    telemetry::{self, LogSettings},
};

/// Exit statuses, as the contract numbers them.
const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// The command line is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// What the log's file may take at the end.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs the program with this process's arguments. There is one thread yet.
pub fn main() -> ExitCode {
    let code = run_and_tell();
    let missing = telemetry::finish(LAST_LINES);
    if missing > 0 {
        let line = format!(
            "greenroom: {missing} lines are missing in LOG_FILE: its disk is full or too slow"
        );
        let _unreported = writeln!(io::stderr(), "{line}");
    }
    code
}

fn run_and_tell() -> ExitCode {
    // Whoever may look into /proc finds no secret there.
    process::hide_environment();
    // The panic hook of the log comes with it; before, the default one reports.
    match run(called_as(std::env::args_os())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<Ended>() => {
            let status = error
                .downcast_ref::<Ended>()
                .map_or(FAILED, |ended| ended.0);
            ExitCode::from(status)
        }
        Err(error) => {
            let line = telemetry::printable(&format!("greenroom: {error:#}"));
            // Where standard error is closed the status still tells.
            let _unreported = writeln!(io::stderr(), "{line}");
            telemetry::ended(&line);
            let is_usage = error.is::<Usage>()
                || error
                    .downcast_ref::<ConfigError>()
                    .is_some_and(ConfigError::is_usage);
            ExitCode::from(if is_usage { WRONG_USAGE } else { FAILED })
        }
    }
}

/// Whoever read our output has seen enough (`greenroom config | head -1`).
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Unprinted>()
        .is_some_and(|Unprinted(error)| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Standard output did not take a result.
#[derive(Debug, thiserror::Error)]
#[error("failed to write to standard output")]
struct Unprinted(#[source] io::Error);

fn run(args: Vec<OsString>) -> anyhow::Result<()> {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => return parse_failure(&error),
    };
    let (name, args) = matches.subcommand().context("no subcommand")?;
    match name {
        "serve" => serve(args, Mode::Serve),
        "dev" => serve(args, Mode::Dev),
        "service" => serve(args, Mode::Service),
        "health" => health::run(&load(args, Mode::Inspect)?, args.get_flag("json")),
        "config" => show::run(&load(args, Mode::Inspect)?, args.get_flag("json")),
        "usage" => usage::run(args),
        "label" => label::run(args),
        "replicate" => replicate::run(args),
        "hf" => hf::run(args),
        "alt-text" => alt_text::run(args),
        "claude" => terminal(args),
        "openapi" => print(&api::openapi_json()),
        other => unreachable!("clap knows no {other}"),
    }
}

/// The arguments as greenroom's own. In the container `claude`, `ccusage` and `monitor` are links to
/// this program, where people and scripts expect those names.
fn called_as(mut args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let Some(program) = args.next() else {
        return Vec::new();
    };
    let mut rest: Vec<OsString> = args.collect();
    let command: &[&str] = match Path::new(&program).file_name().and_then(OsStr::to_str) {
        Some("claude") => &["claude"],
        Some("monitor") => &["usage", "live"],
        Some("ccusage") => match rest.first().and_then(|arg| arg.to_str()) {
            Some(arg) if ["-h", "--help"].contains(&arg) || !arg.starts_with('-') => &["usage"],
            _ => &["usage", "daily"],
        },
        _ => &[],
    };
    rest.splice(0..0, command.iter().map(OsString::from));
    rest.insert(0, program);
    rest
}

fn serve(args: &ArgMatches, mode: Mode) -> anyhow::Result<()> {
    let loaded = load(args, mode)?;
    start_log(&loaded.settings, loaded.settings.log_level)?;
    let runtime = runtime()?;
    // The log's first line says where it listens, so the warnings are the app's to log after it.
    let outcome = runtime.block_on(async {
        match mode {
            Mode::Service => app::serve_one_shots(loaded).await,
            _ => app::serve(loaded, mode).await,
        }
    });
    // A call stuck on the disk must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(500));
    outcome
}

/// Starts the log of a command that somebody watches: what goes well needs no words, but in a file.
fn start_watched_log(settings: &Settings) -> anyhow::Result<()> {
    let level = match settings.log_level {
        tracing::Level::INFO => tracing::Level::WARN,
        level => level,
    };
    start_log(settings, level)
}

/// Starts the log, with this level on standard error.
fn start_log(settings: &Settings, level: tracing::Level) -> anyhow::Result<()> {
    let file = settings.log_file.as_deref();
    telemetry::start(LogSettings {
        level,
        format: settings.log_format,
        file: file.map(|file| (file, settings.log_level)),
    })?;
    Ok(())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Two workers: the container has two cores, and what blocks runs on threads of its own, whose
    // number also bounds what a stalled disk can pin. 2 MiB of stack, tokio's default, since
    // libgit2 recurses over trees on those threads; untouched stack costs nothing.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(32)
        .thread_stack_size(2 * 1024 * 1024)
        .thread_name("greenroom")
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

/// A program that we ran for the caller ended with this status: it is ours too.
#[derive(Debug, thiserror::Error)]
#[error("the CLI ended with status {0}")]
struct Ended(u8);

/// The CLI on this terminal. Its settings come from everywhere but the command line, which is its
/// own; nothing is logged, since the screen is its own too.
fn terminal(args: &ArgMatches) -> anyhow::Result<()> {
    let cwd = std::env::current_dir().context("failed to find the working directory")?;
    let loaded = config::load(Mode::Inspect, &Flags::default(), std::env::vars_os(), &cwd)?;
    let args = args.get_many::<OsString>("args").unwrap_or_default();
    let runtime = runtime()?;
    let exit = runtime.block_on(app::terminal(loaded, args.cloned().collect()));
    runtime.shutdown_timeout(Duration::from_millis(500));
    let exit = exit?;
    let status = exit.code.or(exit.signal.map(|signal| 128 + signal));
    match u8::try_from(status.unwrap_or(1)).unwrap_or(FAILED) {
        0 => Ok(()),
        status => Err(Ended(status).into()),
    }
}

/// Loads the settings of this process. Their secrets are masked from here on.
fn load(args: &ArgMatches, mode: Mode) -> anyhow::Result<Loaded> {
    let cwd = std::env::current_dir().context("failed to find the working directory")?;
    let loaded = config::load(mode, &flags(args)?, std::env::vars_os(), &cwd)?;
    for secret in loaded.settings.secrets() {
        telemetry::hide(secret);
    }
    Ok(loaded)
}

/// Prints a result, with a line feed at its end.
fn print(result: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(result.trim_end_matches('\n').as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(|error| Unprinted(error).into())
}

fn command() -> Command {
    Command::new("greenroom")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Lets customers edit their websites by talking")
        .after_help("Exit status: 0 done, 1 failed, 2 wrong usage.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(
            with_settings(Command::new("serve").about("Serve the API, the studio and previews"))
                .arg(rehearsal()),
        )
        .subcommand(
            with_settings(Command::new("dev").about("The same on a laptop: try it on a template"))
                .arg(rehearsal()),
        )
        .subcommand(
            with_settings(
                Command::new("service")
                    .about("Serve the one-shot service alone: no workspace, no previews"),
            )
            .arg(rehearsal()),
        )
        .subcommand(
            without_log(Command::new("health").about("Ask the running supervisor (HEALTHCHECK)"))
                .arg(json()),
        )
        .subcommand(
            with_settings(
                Command::new("config").about("Print the effective settings and their sources"),
            )
            .arg(json()),
        )
        .subcommand(usage::command())
        .subcommand(label::command())
        .subcommand(replicate::command())
        .subcommand(hf::command())
        .subcommand(alt_text::command())
        .subcommand(
            Command::new("claude")
                .about("Run the real CLI here, through the gateway: no credential needed")
                .disable_help_flag(true)
                .arg(
                    Arg::new("args")
                        .num_args(0..)
                        .trailing_var_arg(true)
                        .allow_hyphen_values(true)
                        .value_parser(clap::value_parser!(OsString))
                        .help("Arguments of the CLI"),
                ),
        )
        .subcommand(
            Command::new("openapi")
                .about("Print the OpenAPI document of the API")
                .arg(json()),
        )
}

fn json() -> Arg {
    Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .help("Print JSON")
}

fn rehearsal() -> Arg {
    Arg::new("rehearsal")
        .long("rehearsal")
        .action(ArgAction::SetTrue)
        .help("Play the model by a script: nothing is asked of the model API")
}

/// Who describes images.
fn label_model() -> Arg {
    Arg::new("model")
        .long("model")
        .value_name("NAME")
        .help("Model; else LABEL_MODEL, else CLAUDE_MODEL, else the CLI's choice")
}

fn max_usd() -> Arg {
    Arg::new("max-usd")
        .long("max-usd")
        .value_name("USD")
        .value_parser(clap::value_parser!(f64))
        .help("Stop before more than this could be spent")
}

/// Adds a flag for every setting. Those of secrets are there to be refused with a reason.
fn with_settings(command: Command) -> Command {
    with_flags(command, |_| true)
}

/// The same of a command that logs nothing: a file that stays empty is not offered.
fn without_log(command: Command) -> Command {
    with_flags(command, |spec| spec.name != "LOG_FILE")
}

fn with_flags(command: Command, is_offered: fn(&Spec) -> bool) -> Command {
    let offered = TABLE.iter().filter(|spec| is_offered(spec));
    command
        .args_override_self(true)
        .args(offered.map(|spec| {
            let arg = Arg::new(spec.name)
                .long(spec.flag())
                .alias(spec.name.to_ascii_lowercase().replace('_', "-"))
                .allow_negative_numbers(true)
                .help(help(spec));
            match spec.kind {
                Kind::Secret => arg.hide(true).num_args(0..=1).default_missing_value(""),
                Kind::Switch => arg
                    .value_name("BOOL")
                    .num_args(0..=1)
                    .default_missing_value("true"),
                Kind::Number => arg.value_name("NUMBER"),
                Kind::List => arg.value_name("LIST"),
                Kind::Text => arg.value_name("TEXT"),
            }
        }))
        .after_help(
            "Each flag is also a variable of the environment, of .env, and a key of greenroom.yaml; \
             flags win. Secrets are no flags, since others see a command line: ANTHROPIC_API_KEY, \
             GITHUB_TOKEN, GREENROOM_API_TOKEN and CLAUDE_SERVICE_SECRET (both also with _PREVIOUS), \
             PREVIEW_TOKEN_SECRET, REPLICATE_API_TOKEN, HF_TOKEN.",
        )
}

fn help(spec: &Spec) -> String {
    match spec.plain_default() {
        Some(default) => format!("{} [{}, default: {default}]", spec.doc, spec.name),
        None => format!("{} [{}]", spec.doc, spec.name),
    }
}

/// The flags of settings as typed.
fn flags(args: &ArgMatches) -> Result<Flags, Usage> {
    let mut flags = Flags {
        rehearsal: matches!(args.try_get_one::<bool>("rehearsal"), Ok(Some(true))),
        ..Flags::default()
    };
    for spec in TABLE {
        // Not every command has all of them.
        let Ok(Some(value)) = args.try_get_one::<String>(spec.name) else {
            continue;
        };
        if spec.kind == Kind::Secret {
            return Err(Usage(format!(
                "--{} is refused, since others on the machine can read a command line; set {} in \
                 the environment or in .env",
                spec.flag(),
                spec.name
            )));
        }
        flags.values.insert(spec.name, value.clone());
    }
    Ok(flags)
}

/// Help and version are results; everything else is wrong usage, told in one line.
fn parse_failure(error: &clap::Error) -> anyhow::Result<()> {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => print(&text),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _unreported = io::stderr().write_all(text.as_bytes());
            Err(Usage("which command? they are listed above".to_owned()).into())
        }
        _ => Err(Usage(usage_line(&text)).into()),
    }
}

/// What clap says without its usage summary: the problem, and its tip where it has one.
fn usage_line(text: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim) {
        match line.strip_prefix("error: ").or(line.strip_prefix("tip: ")) {
            Some(part) => parts.push(part),
            None if line.starts_with("Usage:") || line.starts_with("For more information") => break,
            None if line.is_empty() => {}
            None => parts.push(line),
        }
    }
    format!("{} (see greenroom --help)", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn other_names_are_commands_of_ours() {
        for (called, means) in [
            ("greenroom serve --debug", "serve --debug"),
            ("/usr/local/bin/claude -p hello", "claude -p hello"),
            ("/usr/local/bin/claude --version", "claude --version"),
            ("claude usage daily", "claude usage daily"),
            ("monitor --json", "usage live --json"),
            ("ccusage", "usage daily"),
            ("ccusage --json", "usage daily --json"),
            ("ccusage monthly --by user", "usage monthly --by user"),
            ("ccusage --help", "usage --help"),
            ("/opt/greenroom-claude openapi", "openapi"),
        ] {
            let args = called_as(called.split(' ').map(OsString::from));
            let means: Vec<_> = means.split(' ').map(OsString::from).collect();
            assert_eq!(args[1..], means, "{called}");
        }
    }

    fn failure(line: &str) -> (String, bool) {
        let error = match command().try_get_matches_from(line.split(' ')) {
            Ok(matches) => match flags(matches.subcommand().unwrap().1) {
                Ok(flags) => panic!("{line} is fine: {flags:?}"),
                Err(usage) => usage.into(),
            },
            Err(error) => parse_failure(&error).unwrap_err(),
        };
        (format!("{error:#}"), error.is::<Usage>())
    }

    #[test]
    fn wrong_usage_is_one_line_that_says_what() {
        for (line, said) in [
            ("greenroom serve --prot 1", "'--prot'"),
            ("greenroom serve --api-prt 1", "--api-port"),
            ("greenroom serv", "'serve'"),
            ("greenroom serve extra", "'extra'"),
            ("greenroom serve --api-port", "--api-port"),
            ("greenroom config --rehearsal", "--rehearsal"),
            ("greenroom --json", "--json"),
        ] {
            let (text, is_usage) = failure(line);
            assert!(is_usage && text.contains(said), "{line}: {text}");
            assert!(!text.contains('\n'), "{line}: {text}");
        }
    }

    #[test]
    fn secrets_are_no_flags() {
        for spec in TABLE.iter().filter(|spec| spec.kind == Kind::Secret) {
            let full = spec.name.to_ascii_lowercase().replace('_', "-");
            for flag in [spec.flag(), full] {
                for line in [format!("--{flag}=canary-5d"), format!("--{flag} canary-5d")] {
                    let (text, is_usage) = failure(&format!("greenroom serve {line}"));
                    assert!(is_usage && text.contains(spec.name), "{text}");
                    assert!(!text.contains("canary"), "{text}");
                }
            }
        }
    }

    #[test]
    fn every_other_setting_is_a_flag_of_serve_and_the_last_one_wins() {
        for spec in TABLE.iter().filter(|spec| spec.kind != Kind::Secret) {
            let flag = format!("--{}", spec.flag());
            let args = ["greenroom", "serve", &flag, "a", &flag, "-1", "--rehearsal"];
            let matches = command().try_get_matches_from(args).unwrap();
            let flags = flags(matches.subcommand().unwrap().1).unwrap();
            assert_eq!(
                flags.values.get(spec.name).map(String::as_str),
                Some("-1"),
                "{flag}"
            );
            assert!(flags.rehearsal);
        }
        let args = [
            "greenroom",
            "serve",
            "--insecure",
            "--debug",
            "--greenroom-insecure=false",
        ];
        let matches = command().try_get_matches_from(args).unwrap();
        let flags = flags(matches.subcommand().unwrap().1).unwrap();
        assert_eq!(flags.values["GREENROOM_INSECURE"], "false");
        assert_eq!(flags.values["DEBUG"], "true");
    }
}
