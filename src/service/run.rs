//! One run of the CLI, from its start to its end: how it is started, what is read of it, and what
//! may end it before its time.

use std::{path::PathBuf, pin::pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Args, scratch::Scratch};
use crate::{
    agent::AgentSettings,
    gateway::ActiveRun,
    process::{Allowance, Child, Excess, Exit, ProcessHandle, Spec, Stdin},
    task,
    usage::Breach,
};

/// Most that a run may print: an answer of the longest model is half a megabyte.
pub(super) const MAX_OUTPUT: usize = 16 << 20;
/// What is kept of the standard error, from its end.
const STDERR_TAIL: usize = 8 << 10;
/// SIGTERM to SIGKILL, by the contract.
const GRACE: Duration = Duration::from_secs(5);
/// Once the process has ended its last words are in the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often it is looked whether the upstream refuses our credential: the CLI tries that again
/// for three minutes (measured with 2.1.329).
const LOOK: Duration = Duration::from_millis(250);
/// How often it is looked at what a run takes of the machine: what can be had in between is what it
/// may get too much. A look takes a fraction of a millisecond.
const LOAD_LOOK: Duration = Duration::from_millis(100);
const LOAD_DEADLINE: Duration = Duration::from_secs(20);

/// What a run may touch beside its own throw-away folders, as data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunSite {
    /// Where it works; `None`: in a folder of its own.
    pub cwd: Option<PathBuf>,
    pub read: Vec<PathBuf>,
    pub write: Vec<PathBuf>,
    /// Ports beside the gateway's.
    pub connect: Vec<u16>,
    /// For its system prompt.
    pub note: Option<&'static str>,
}

/// How it came to its end.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    Exited(Exit),
    TimedOut(Exit),
    Cancelled,
    OverBudget(Breach),
    CredentialRefused(Exit),
    TooMuch,
    Exceeded(Excess),
    /// It told its result, and was not waited for.
    Told,
}

/// What a run is held to.
pub(super) struct Limits<'a> {
    /// What it waits for its gate comes on top.
    pub(super) deadline: Instant,
    /// It is over with the line that tells its result. The CLI takes 50 ms more to tidy up what is
    /// thrown away (measured with 2.1.329).
    pub(super) ends_with_result: bool,
    pub(super) allowance: Option<Allowance>,
    pub(super) cancel: &'a CancellationToken,
}

/// What is known of a run that is over.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) end: End,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

/// The CLI's start.
pub(super) fn spec(
    settings: &AgentSettings,
    site: &RunSite,
    scratch: &Scratch,
    args: &Args,
    token: &str,
) -> Spec {
    let mut profile = settings.profile();
    profile.read.extend(site.read.iter().cloned());
    profile.write.push(scratch.root().to_owned());
    profile.write.extend(site.write.iter().cloned());
    profile.connect = settings.peers(site.connect.iter().copied());
    profile.owner = Some(scratch.root().to_owned());
    let mut args = args.clone();
    args.model = args.model.or_else(|| settings.model.clone());
    let mut env = settings.environment(&scratch.home(), &scratch.temporary(), token);
    // The CLI is a program of Bun's, which collects all garbage once a second though nothing moves: of
    // one that waits for two seconds that was a quarter of all its processor time (2.1.329). Garbage
    // is still collected as memory fills.
    env.push(("BUN_GC_TIMER_DISABLE".into(), "1".into()));
    Spec {
        name: "one-shot claude",
        program: settings.program.clone(),
        args: args.command_line(&settings.tools, settings.is_confined, site.note),
        env,
        cwd: site.cwd.clone().unwrap_or_else(|| scratch.work()),
        stdin: Stdin::Piped,
        profile,
    }
}

/// Feeds the prompt, reads what comes, and sees to it that it ends. Dropped, it is killed.
pub(super) async fn follow(
    child: Child,
    prompt: &str,
    active: &ActiveRun,
    limits: Limits<'_>,
) -> Raw {
    let handle = child.handle();
    let Child {
        stdin,
        stdout,
        stderr,
        ..
    } = child;
    let (full, told) = (CancellationToken::new(), CancellationToken::new());
    let heard = Heard {
        full: &full,
        told: limits.ends_with_result.then_some(&told),
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let end = {
        let read = async {
            tokio::join!(
                feed(stdin, prompt),
                fill(stdout, &mut out, heard),
                keep_tail(stderr, &mut err)
            );
        };
        let end = async {
            let why = tokio::select! {
                exit = handle.wait() => return exited(exit, active),
                why = reason_to_end(active, &limits, &full) => why,
                () = told.cancelled() => Why::Told,
                excess = excess(&handle, limits.allowance) => Why::Exceeded(excess),
            };
            let grace = match why {
                // One would go on taking, the other has nothing left to do.
                Why::Exceeded(_) | Why::Told => Duration::ZERO,
                _ => GRACE,
            };
            let exit = handle.terminate(grace).await;
            match why {
                Why::Late => End::TimedOut(exit),
                Why::Cancelled => End::Cancelled,
                Why::OverBudget(breach) => End::OverBudget(breach),
                Why::Refused => End::CredentialRefused(exit),
                Why::TooMuch => End::TooMuch,
                Why::Exceeded(excess) => End::Exceeded(excess),
                Why::Told => End::Told,
            }
        };
        let (mut read, mut end) = (pin!(read), pin!(end));
        let mut has_read = false;
        let end = loop {
            tokio::select! {
                // Also while it is being ended: a full pipe would keep it from that.
                () = &mut read, if !has_read => has_read = true,
                end = &mut end => break end,
            }
        };
        if !has_read {
            timeout(LAST_WORDS, read).await.ok();
        }
        end
    };
    Raw {
        end,
        stdout: out,
        stderr: String::from_utf8_lossy(&err).trim().to_owned(),
    }
}

/// Why a run is ended.
enum Why {
    Late,
    Cancelled,
    OverBudget(Breach),
    Refused,
    TooMuch,
    Exceeded(Excess),
    Told,
}

async fn reason_to_end(active: &ActiveRun, limits: &Limits<'_>, full: &CancellationToken) -> Why {
    let mut budget = active.budget_news();
    let mut look = tokio::time::interval(LOOK);
    loop {
        if let Some(breach) = budget.borrow_and_update().breach.clone() {
            return Why::OverBudget(breach);
        }
        if is_refused(active) {
            return Why::Refused;
        }
        tokio::select! {
            () = limits.cancel.cancelled() => return Why::Cancelled,
            () = full.cancelled() => return Why::TooMuch,
            // By now, that is: it moves on while a request waits.
            () = sleep_until(limits.deadline + active.held()) => {
                if Instant::now() >= limits.deadline + active.held() {
                    return Why::Late;
                }
            }
            // The look goes on without news.
            _ = budget.changed() => {}
            _ = look.tick() => {}
        }
    }
}

/// Waits until it takes more than it may.
async fn excess(process: &ProcessHandle, allowance: Option<Allowance>) -> Excess {
    let Some(allowance) = allowance else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(LOAD_LOOK).await;
        let looked_at = process.clone();
        let look = task::blocking("looking at a run's load", LOAD_DEADLINE, move || {
            looked_at.load()
        });
        if let Ok(load) = look.await
            && let Some(excess) = allowance.exceeded_by(&load)
        {
            return excess;
        }
    }
}

fn exited(exit: Exit, active: &ActiveRun) -> End {
    if exit.is_success() {
        return End::Exited(exit);
    }
    let breach = active.budget_news().borrow().breach.clone();
    match breach {
        Some(breach) => End::OverBudget(breach),
        None if is_refused(active) => End::CredentialRefused(exit),
        None => End::Exited(exit),
    }
}

/// Does the upstream refuse our credential?
fn is_refused(active: &ActiveRun) -> bool {
    active.last_upstream_status() == Some(401)
}

async fn feed(stdin: Option<pipe::Sender>, prompt: &str) {
    if let Some(mut stdin) = stdin {
        // One that does not read its prompt says why by how it ends.
        stdin.write_all(prompt.as_bytes()).await.ok();
    }
}

/// What is said of a run's output as it comes.
#[derive(Clone, Copy)]
struct Heard<'a> {
    /// There is too much of it.
    full: &'a CancellationToken,
    /// The result is told; `None`: nobody wants to know.
    told: Option<&'a CancellationToken>,
}

/// Reads to the end; past the limit it says so, and passes the rest over.
async fn fill(mut stream: impl AsyncRead + Unpin, into: &mut Vec<u8>, heard: Heard<'_>) {
    let mut chunk = vec![0; 16 << 10];
    let mut line = 0;
    while let Ok(length @ 1..) = stream.read(&mut chunk).await {
        let from = into.len();
        if from + length > MAX_OUTPUT {
            heard.full.cancel();
            continue;
        }
        into.extend_from_slice(&chunk[..length]);
        let Some(told) = heard.told else { continue };
        for end in (from..into.len()).filter(|at| into[*at] == b'\n') {
            if is_result(&into[line..end]) {
                told.cancel();
            }
            line = end + 1;
        }
    }
}

async fn keep_tail(mut stream: impl AsyncRead + Unpin, into: &mut Vec<u8>) {
    let mut chunk = vec![0; 4 << 10];
    while let Ok(length @ 1..) = stream.read(&mut chunk).await {
        into.extend_from_slice(&chunk[..length]);
        let surplus = into.len().saturating_sub(STDERR_TAIL);
        into.drain(..surplus);
    }
}

/// Is it the line that tells that it went well? Where it did not the CLI's exit says more.
fn is_result(line: &[u8]) -> bool {
    const TYPE: &[u8] = b"\"result\"";
    let may_be = line.windows(TYPE.len()).take(40).any(|part| part == TYPE);
    may_be
        && serde_json::from_slice::<serde_json::Value>(line)
            .is_ok_and(|event| event["type"] == "result" && event["is_error"] == false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_result_is_heard_however_its_bytes_come() {
        let lines = concat!(
            "{\"type\":\"assistant\",\"text\":\"{\\\"type\\\":\\\"result\\\",\\\"is_error\\\":false}\"}\n",
            "{\"type\":\"result\",\"is_error\":true}\n",
            "{\"type\":\"result\"\n",
        );
        let result = "{\"type\":\"result\",\"subtype\":\"success\",\"is_error\":false}";
        for (text, is_told) in [
            (lines.to_owned(), false),
            (format!("{lines}{result}"), false),
            (format!("{lines}{result}\n"), true),
        ] {
            for piece in [1, 7, 4096] {
                let (full, told) = (CancellationToken::new(), CancellationToken::new());
                let heard = Heard {
                    full: &full,
                    told: Some(&told),
                };
                let mut out = Vec::new();
                let (mut writer, reader) = tokio::io::duplex(64);
                let write = async {
                    for bytes in text.as_bytes().chunks(piece) {
                        writer.write_all(bytes).await.unwrap();
                    }
                    drop(writer);
                };
                tokio::join!(write, fill(reader, &mut out, heard));
                assert_eq!(told.is_cancelled(), is_told, "{piece} {text}");
                assert_eq!(
                    (out, full.is_cancelled()),
                    (text.clone().into_bytes(), false)
                );
            }
        }
    }
}
