//! From an instruction to the CLI's first request at the model API, which a stand-in in this
//! process records; and whole turns, with a model that answers at once.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use greenroom::{
    rehearsal::{Rehearsal, Rule, Script, Step},
    task::Tasks,
};
use jiff::Timestamp;
use serde_json::json;

use crate::{
    init,
    report::{Table, Unit},
    start,
    world::{Greenroom, Http, Kid, World, until},
};

const ROUNDS: usize = 10;
const WARM: usize = 2;
const OVERHEAD_ROUNDS: usize = 31;
const SOON: Duration = Duration::from_secs(30);

/// Milliseconds of one instruction.
#[derive(Debug, Clone, Copy)]
struct Times {
    first_request: f64,
    whole: f64,
}

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let tasks = Tasks::new();
    let at_once = Script {
        rules: vec![Rule {
            matches: String::new(),
            steps: vec![Step {
                text: Some("Done.".into()),
                ..Step::default()
            }],
        }],
        ..Script::default()
    };
    let model = Rehearsal::start(at_once, &tasks).await?;
    let url = model.url();
    let repository = world.repository("turn-repo")?;
    let serve = |name: &'static str, warm: &'static str| {
        let url = url.clone();
        async move {
            let env = [
                ("ANTHROPIC_API_KEY", "none"),
                ("ANTHROPIC_BASE_URL", url.as_str()),
                ("ASTRO_DEV_MODE", "false"),
                ("MAX_WARM_AGENTS", warm),
            ];
            start::greenroom(world, name, &env).await
        }
    };
    let warm_one = serve("turn", "2").await?;
    let cold_one = serve("turn-cold", "0").await?;
    let hand = Hand::new(world, &url, world.repository("turn-hand")?)?;
    // The first run of a CLI makes its folders.
    hand.print(&model, "warm up", false).await?;

    let mut ahead = Vec::new();
    let mut warm = Vec::new();
    let mut cold = Vec::new();
    let (mut by_hand_ahead, mut print, mut resumed) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let thread = format!("t{round}");
        init::thread(&warm_one, &thread, &repository).await?;
        warm_one.kid.settle().await;
        ahead.push(execute(&warm_one, &model, &thread, &format!("ahead {round}")).await?);
        for turn in 0..WARM {
            let words = format!("warm {round} {turn}");
            warm.push(execute(&warm_one, &model, &thread, &words).await?);
        }
        by_hand_ahead.push(hand.ahead(&model, &format!("hand ahead {round}")).await?);
        init::thread(&cold_one, &thread, &repository).await?;
        cold.push(execute(&cold_one, &model, &thread, &format!("cold {round}")).await?);
        print.push(hand.print(&model, &format!("print {round}"), false).await?);
        resumed.push(
            hand.print(&model, &format!("resumed {round}"), true)
                .await?,
        );
    }
    drop((warm_one, cold_one));
    let (talk, edit) = overhead(world, &repository).await?;
    tasks.stop(Duration::from_secs(2)).await;

    let first = |times: &[Times]| times.iter().map(|t| t.first_request).collect::<Vec<_>>();
    let whole = |times: &[Times]| times.iter().map(|t| t.whole).collect::<Vec<_>>();
    let ms = Unit::Ms;
    let mut table = Table::default();
    let base = table.own(
        "`POST /api/execute` to the first API request, first turn (CLI started ahead by init)",
        ms,
        first(&ahead),
        "under 120 ms",
    );
    table.rival(
        "the CLI started ahead by hand, a line into its stdin",
        ms,
        first(&by_hand_ahead),
        base,
    );
    table.rival(
        "greenroom that keeps no CLI (`MAX_WARM_AGENTS=0`)",
        ms,
        first(&cold),
        base,
    );
    table.rival("`claude -p` by hand", ms, first(&print), base);
    let base = table.own("the same, later turns (warm CLI)", ms, first(&warm), "");
    table.rival("`claude -p --continue` by hand", ms, first(&resumed), base);
    let base = table.own(
        "a whole later turn, the model answering at once",
        ms,
        whole(&warm),
        "",
    );
    table.rival(
        "`claude -p --continue` by hand, to its exit",
        ms,
        whole(&resumed),
        base,
    );
    table.own(
        "greenroom's own share of a turn: the stand-in CLI, which says one word at once",
        ms,
        talk,
        "under 10 ms",
    );
    table.own(
        "the same, with one file written and committed",
        ms,
        edit,
        "under 10 ms",
    );
    table.note(
        "A whole turn of greenroom includes the journal, the check for outside edits and the \
         search for something to commit; by hand nothing of that is done.",
    );
    Ok(table)
}

/// Whole turns of the stand-in CLI, whose own part is a fraction of a millisecond: what is left is
/// ours. Some that only talk, and some that write a file.
async fn overhead(world: &World, repository: &Path) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let examples = std::env::current_exe()?.with_file_name("../examples/acting-claude");
    let acting = examples.to_str().context("a path of Unicode")?.to_owned();
    let env = [
        ("ANTHROPIC_API_KEY", "none"),
        ("CLAUDE_BIN", acting.as_str()),
        ("ASTRO_DEV_MODE", "false"),
    ];
    let greenroom = start::greenroom(world, "turn-overhead", &env).await?;
    init::thread(&greenroom, "t", repository).await?;
    let mut http = Http::connect(greenroom.port).await?;
    let (mut talk, mut edit) = (Vec::new(), Vec::new());
    for round in 0..OVERHEAD_ROUNDS {
        let scripts = ["text Done.".to_owned(), format!("write bench.txt {round}")];
        for (script, times) in scripts.iter().zip([&mut talk, &mut edit]) {
            let body = json!({
                "clientId": "bench", "userId": "u", "threadId": "t", "instruction": script,
            });
            let from = Timestamp::now();
            let (status, answer) = http.post("/api/execute", &body).await?;
            let to = Timestamp::now();
            ensure!(status == 200, "execute answered {status}: {answer}");
            // The first one meets a CLI that has not served yet.
            if round > 0 {
                times.push(ms_between(from, to));
            }
        }
    }
    Ok((talk, edit))
}

/// When the model was first asked this.
async fn asked(model: &Rehearsal, words: &str) -> anyhow::Result<Timestamp> {
    until("the first request", SOON, async || {
        let requests = model.requests();
        let first = requests.iter().find(|request| {
            request.path.starts_with("/v1/messages") && request.instruction.contains(words)
        });
        first.map(|request| request.at)
    })
    .await
}

fn ms_between(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e3
}

async fn execute(
    greenroom: &Greenroom,
    model: &Rehearsal,
    thread: &str,
    words: &str,
) -> anyhow::Result<Times> {
    let mut http = Http::connect(greenroom.port).await?;
    // With an end that no other instruction has.
    let words = format!("{words}.");
    let body = json!({
        "clientId": "bench", "userId": "u", "threadId": thread, "instruction": words,
    });
    let from = Timestamp::now();
    let (status, answer) = http.post("/api/execute", &body).await?;
    let to = Timestamp::now();
    ensure!(status == 200, "execute answered {status}: {answer}");
    Ok(Times {
        first_request: ms_between(from, asked(model, &words).await?),
        whole: ms_between(from, to),
    })
}

/// The CLI without greenroom.
struct Hand<'a> {
    world: &'a World,
    url: &'a str,
    folder: PathBuf,
    home: PathBuf,
}

impl<'a> Hand<'a> {
    fn new(world: &'a World, url: &'a str, folder: PathBuf) -> anyhow::Result<Self> {
        let home = world.folder("hand-home");
        std::fs::create_dir_all(&home)?;
        Ok(Self {
            world,
            url,
            folder,
            home,
        })
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = self.world.command(program, &self.home);
        command
            .current_dir(&self.folder)
            .env("CLAUDE_CONFIG_DIR", &self.home)
            .env("ANTHROPIC_BASE_URL", self.url)
            .env("ANTHROPIC_AUTH_TOKEN", "none")
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("DISABLE_AUTOUPDATER", "1")
            .env("CLAUDE_CODE_DISABLE_BACKGROUND_TASKS", "1");
        command
    }

    /// `claude -p` from its start to its end.
    async fn print(&self, model: &Rehearsal, words: &str, resumes: bool) -> anyhow::Result<Times> {
        let words = format!("{words}.");
        let mut command = self.command(self.world.claude()?);
        command.arg("-p").arg(&words);
        if resumes {
            command.arg("--continue");
        }
        let from = Timestamp::now();
        let mut kid = Kid::spawn(&mut command)?;
        let status = until("claude -p", SOON, async || {
            kid.child.try_wait().ok().flatten()
        })
        .await?;
        let to = Timestamp::now();
        ensure!(status.success(), "claude -p: {status}");
        Ok(Times {
            first_request: ms_between(from, asked(model, &words).await?),
            whole: ms_between(from, to),
        })
    }

    /// One that waits for its first line.
    async fn ahead(&self, model: &Rehearsal, words: &str) -> anyhow::Result<Times> {
        let words = format!("{words}.");
        let mut command = self.command(self.world.claude()?);
        command
            .args([
                "-p",
                "--input-format",
                "stream-json",
                "--output-format",
                "stream-json",
            ])
            .args([
                "--verbose",
                "--include-partial-messages",
                "--setting-sources",
                "",
            ])
            .args(["--strict-mcp-config", "--permission-mode", "acceptEdits"])
            .args(["--permission-prompt-tool", "stdio"])
            .args(["--tools", "Read,Edit,Write,Bash,Glob,Grep"])
            .stdin(Stdio::piped());
        let mut kid = Kid::spawn(&mut command)?;
        kid.settle().await;
        let message = json!({"type": "user", "message": {"role": "user", "content": words}});
        let mut stdin = kid.child.stdin.take().expect("it is piped");
        let from = Timestamp::now();
        stdin.write_all(format!("{message}\n").as_bytes())?;
        let at = asked(model, &words).await?;
        drop(stdin);
        until("the CLI's end", SOON, async || {
            kid.child.try_wait().ok().flatten()
        })
        .await?;
        Ok(Times {
            first_request: ms_between(from, at),
            whole: ms_between(from, Timestamp::now()),
        })
    }
}
