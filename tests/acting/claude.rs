//! The acting kit: a stand-in for the Claude Code CLI that acts out failures on command, for tests
//! that the real one can't be made to produce. No model and no API are behind it (but for the act
//! `ask`); the instruction is the script, one act a line:
//!
//! | act | what it does |
//! |---|---|
//! | `write PATH TEXT` · `append PATH TEXT` | the Write or Edit tool; `\n` in TEXT is a line feed |
//! | `text WORDS` | says it, a word at a time |
//! | `run CMD` | the Bash tool: a session of its own, killed by an interrupt |
//! | `leave CMD` | a Bash command in a session of its own that outlives the turn |
//! | `permit CMD` | asks by `can_use_tool`, then runs it, or goes on without |
//! | `ask WORDS` | asks the API, and says what it streams |
//! | `remember WORDS` · `recall` | says what was last to be remembered in this conversation |
//! | `pause MS` | thinks, without a word |
//! | `muse MS N` | thinks aloud N times, so long each |
//! | `silent` | says nothing more; obeys an interrupt |
//! | `retry STATUS MS` | an `api_retry`, and its delay |
//! | `fail STATUS` | ends the turn as the API's refusal does: `is_error` with `success` |
//! | `break` | ends the turn as a broken stream does: `error_during_execution` |
//! | `exit CODE` · `die` | ends the process without a result, by itself or by SIGKILL |
//! | `half-line` | prints half a line, without its end |
//! | `lose-tool` | runs a command whose end nobody can read |
//! | `long-line MB` | prints one line so long |
//! | `flood-stderr MB` | prints as much on standard error |
//! | `close-stdout` | closes its standard output, and stays |
//! | `unknown-event` · `unknown-request` | events, or a control request, that nobody knows |
//! | `result-no-exit` | a result; then it reads nothing more, and stays at the end of its input |
//! | `result-twice` | its result comes twice |
//! | `self-turn MS CMD` | so long after the result a turn that nobody asked for; it runs CMD |
//! | `stubborn` · `immortal` | from now on ignores interrupts · and SIGTERM too |
//!
//! Other lines are talk. A turn that says nothing says "Done." at its end. It speaks stream-json
//! like 2.1.329 and keeps a transcript; `tests/it/conformance.rs` compares it with the real one.

mod ask;
mod input;
mod performance;
mod session;
mod voice;

use std::{
    env, fs,
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
    sync::Arc,
    thread,
};

use nix::{
    sys::signal::{SigSet, Signal},
    unistd,
};

use input::{Input, Order};
use performance::Performance;
use session::Session;
use voice::Voice;

const VERSION: &str = "2.1.329 (Claude Code)";
/// The first argument of this program as the start of a session for a command.
const IN_SESSION: &str = "--in-a-session-of-its-own";

/// What it was started with.
struct Options {
    session_id: Option<String>,
    resume: Option<String>,
    model: String,
    mode: String,
}

fn main() -> ExitCode {
    let mut args = env::args().skip(1).peekable();
    if args.next_if(|arg| arg == IN_SESSION).is_some() {
        return become_session(&args.next().unwrap_or_default());
    }
    if args.peek().is_some_and(|arg| arg == "--version") {
        println!("{VERSION}");
        return ExitCode::SUCCESS;
    }
    let options = match parse(args) {
        Ok(options) => options,
        Err(problem) => return refuse(&problem),
    };
    // Signals are waited for by a thread of their own: no code runs in a handler.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().expect("a mask can be set");

    let session = match &options.resume {
        Some(id) => Session::resume(id),
        None => Session::begin(options.session_id.as_deref()),
    };
    let session = match session {
        Ok(session) => session,
        Err(problem) => {
            if let Some(id) = &options.resume {
                Voice::new(id).say(voice::lost(id, &problem));
                eprintln!("{problem}");
                return ExitCode::FAILURE;
            }
            return refuse(&format!("Error: {problem}"));
        }
    };
    let voice = Arc::new(Voice::new(session.id()));
    let input = Input::new(options.model, options.mode);
    let (for_signals, for_stdin) = (input.clone(), input.clone());
    thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            for_signals.signalled(signal);
        }
    });
    let heard = voice.clone();
    thread::spawn(move || for_stdin.read(&heard));
    serve(&input, &voice, session)
}

/// One turn after another, to the end of the input.
fn serve(input: &Arc<Input>, voice: &Arc<Voice>, mut session: Session) -> ExitCode {
    let mut failed = false;
    loop {
        match input.next() {
            Order::Turn(instruction) => {
                let turn = Performance::new(input, voice, &mut session);
                failed = turn.play(&instruction);
            }
            Order::End => {
                session.close();
                return ExitCode::from(u8::from(failed));
            }
        }
        if input.is_interrupted_by_signal() {
            session.close();
            return ExitCode::SUCCESS;
        }
    }
}

/// Leads a new session and becomes the command, so that no group of ours reaches it.
fn become_session(command: &str) -> ExitCode {
    unistd::setsid().ok();
    SigSet::all().thread_unblock().ok();
    #[expect(clippy::disallowed_methods, reason = "this is a program of its own")]
    let error = Command::new("/bin/sh").args(["-c", command]).exec();
    refuse(&error.to_string())
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        session_id: None,
        resume: None,
        model: "claude-opus-5-5".to_owned(),
        mode: "default".to_owned(),
    };
    let mut args = args;
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .ok_or_else(|| format!("error: option '{arg} <value>' argument missing"))
        };
        match arg.as_str() {
            "-p"
            | "--verbose"
            | "--include-partial-messages"
            | "--strict-mcp-config"
            | "--disable-slash-commands" => {}
            "--input-format" | "--output-format" => {
                if value()? != "stream-json" {
                    return Err("error: the stand-in speaks stream-json alone".to_owned());
                }
            }
            "--setting-sources"
            | "--permission-prompt-tool"
            | "--tools"
            | "--append-system-prompt" => {
                value()?;
            }
            "--permission-mode" => options.mode = value()?,
            "--model" => options.model = value()?,
            "--session-id" => options.session_id = Some(value()?),
            "--resume" => options.resume = Some(value()?),
            _ => return Err(format!("error: unknown option '{arg}'")),
        }
    }
    Ok(options)
}

fn refuse(problem: &str) -> ExitCode {
    eprintln!("{problem}");
    ExitCode::FAILURE
}

/// Prints so many megabytes, in pieces.
fn flood(mut stream: impl Write, megabytes: u64) {
    let piece = [b'x'; 1 << 16];
    for _ in 0..megabytes * 16 {
        if stream.write_all(&piece).is_err() {
            return;
        }
    }
}

/// The folder of the CLI's own files.
fn config_dir() -> std::path::PathBuf {
    let named = env::var_os("CLAUDE_CONFIG_DIR").map(Into::into);
    let home = || env::var_os("HOME").map_or_else(|| "/tmp".into(), std::path::PathBuf::from);
    let folder = named.unwrap_or_else(|| home().join(".claude"));
    fs::create_dir_all(&folder).ok();
    folder
}
