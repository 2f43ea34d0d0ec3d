//! Three counts of one turn: the ledger's, the CLI's own result, and its transcript. They should
//! agree; where they do not, a metric and the log say so.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;

use super::run::TurnSite;
use crate::{
    agent::{Ending, RunOutcome},
    domain::Account,
    task,
    usage::{Counts, Ledger, Tokens},
};

/// A turn's lines are at the end of the transcript; more than that is not read.
const MAX_TAIL: u64 = 16 << 20;
/// The CLI writes its last lines after it told the result.
const LATENESS: Duration = Duration::from_secs(1);
/// Looks at the transcript, each after twice the time, while it lacks what the CLI has counted: on a
/// busy machine the last lines may be some seconds late.
const LOOKS: u32 = 4;
const DEADLINE: Duration = Duration::from_secs(60);

/// Compares in the background: nobody waits for it.
pub(super) fn reconcile(site: &TurnSite, account: Account, outcome: &RunOutcome, began: Timestamp) {
    // Of a request that was cut off the three know different parts.
    if outcome.ending != Ending::Completed || outcome.counted.aborted > 0 {
        return;
    }
    let ended = Timestamp::now();
    let ledger: Ledger = site.gateway.ledger().clone();
    let (counted, usage) = (outcome.counted, outcome.usage);
    let cli = Counts {
        input: usage.input_tokens,
        output: usage.output_tokens,
        cache_read: usage.cache_read_tokens,
        cache_creation: usage.cache_creation_tokens,
    };
    let (config_dir, session) = (
        site.agent_site.config_dir.clone(),
        outcome.session_id.clone(),
    );
    let stop = site.tasks.token().clone();
    let compare = async move {
        let mut transcript = None;
        for look in 0..LOOKS {
            let written = tokio::time::sleep(LATENESS * (1 << look));
            if stop.run_until_cancelled(written).await.is_none() {
                return;
            }
            let (config_dir, session) = (config_dir.clone(), session.clone());
            let read = move || {
                let path = super::run::transcript(&config_dir, &session?)?;
                let tokens = transcribed(&path, began, ended).inspect_err(|error| {
                    tracing::debug!(%error, "failed to read a transcript");
                });
                tokens.ok()
            };
            let read = task::blocking("reading a transcript", DEADLINE, read).await;
            transcript = read.ok().flatten().map(Counts::from);
            if transcript == Some(cli) {
                break;
            }
        }
        ledger.compare(&account, &counted, cli, usage.cost_usd, transcript);
    };
    site.tasks.spawn("reconciling", compare);
}

/// What of a transcript's line matters here.
#[derive(Deserialize)]
struct Line {
    timestamp: Option<Timestamp>,
    message: Option<Message>,
}

#[derive(Deserialize)]
struct Message {
    id: Option<String>,
    usage: Option<Usage>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Usage {
    input_tokens: u64,
    output_tokens: u64,
    cache_read_input_tokens: u64,
    cache_creation_input_tokens: u64,
}

/// The tokens of the answers that were written down in this time. An answer has a line for each
/// of its blocks, all with its usage: the last one counts.
fn transcribed(path: &Path, from: Timestamp, to: Timestamp) -> io::Result<Tokens> {
    // The agent may have put anything here; opening a pipe would wait for ever.
    if !path.symlink_metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let skipped = length.saturating_sub(MAX_TAIL);
    file.seek(SeekFrom::Start(skipped))?;
    let mut reader = BufReader::new(file.take(MAX_TAIL));
    let mut line = Vec::new();
    if skipped > 0 {
        reader.read_until(b'\n', &mut line)?;
    }
    let mut answers: HashMap<String, Usage> = HashMap::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        // Lines of other shapes are no answers.
        if let Ok(Line {
            timestamp: Some(at),
            message:
                Some(Message {
                    id: Some(id),
                    usage: Some(usage),
                }),
        }) = serde_json::from_slice(&line)
            && from <= at
            && at <= to
        {
            answers.insert(id, usage);
        }
    }
    let mut tokens = Tokens::default();
    for usage in answers.values() {
        tokens += Tokens {
            input: usage.input_tokens,
            output: usage.output_tokens,
            cache_read: usage.cache_read_input_tokens,
            cache_write_5m: usage.cache_creation_input_tokens,
            cache_write_1h: 0,
        };
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_answer_counts_once_and_in_its_time() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let line = |at: &str, id: &str, output: u64| {
            format!(
                r#"{{"type":"assistant","timestamp":"2026-11-21T10:{at}Z","message":{{"id":"{id}","content":[],"usage":{{"input_tokens":10,"output_tokens":{output},"cache_read_input_tokens":3}}}}}}"#
            )
        };
        let lines = [
            line("00:00.000", "before", 1),
            line("01:00.000", "a", 1),
            line("01:01.000", "a", 5),
            r#"{"type":"user","timestamp":"2026-11-21T10:01:02Z","message":{"content":"hi"}}"#
                .into(),
            "torn {".into(),
            line("02:00.000", "b", 7),
            line("09:00.000", "after", 1),
        ];
        writeln!(file, "{}", lines.join("\n")).unwrap();
        let at = |text: &str| text.parse().unwrap();
        let tokens = transcribed(
            file.path(),
            at("2026-11-21T10:00:30Z"),
            at("2026-11-21T10:03:00Z"),
        );
        let expected = Tokens {
            input: 20,
            output: 12,
            cache_read: 6,
            ..Tokens::default()
        };
        assert_eq!(tokens.unwrap(), expected);
    }
}
