//! What a person waits for who looks back: threads, one thread, its history, a comparison, on a
//! repository of 5,000 files and 2,000 commits.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::{
    report::{Table, Unit},
    start,
    world::{Http, World, git},
};

const FILES: usize = 5_000;
const COMMITS: usize = 2_000;
const TURNS: usize = 20;
const ROUNDS: usize = 20;
const AIM: &str = "under 200 ms";

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let origin = origin(world)?;
    let origin = origin.to_str().context("a path of ASCII")?;
    let greenroom = start::greenroom(
        world,
        "history",
        &[("ANTHROPIC_API_KEY", "none"), ("ASTRO_DEV_MODE", "false")],
    )
    .await?;
    let mut http = Http::connect(greenroom.port).await?;
    let who = json!({"clientId": "bench", "userId": "u", "threadId": "t",
        "repoUrl": origin, "waitForPreview": false});
    let (status, init) = http.post("/api/init", &who).await?;
    ensure!(status == 200, "init answered {status}: {init}");
    let path = init["workspace"]["projectPath"].as_str();
    let worktree = PathBuf::from(path.context("init names no folder")?);
    let first = init["head"]
        .as_str()
        .context("init names no head")?
        .to_owned();
    let thread = "/api/clients/bench/users/u/threads/t";
    // Turns without a model: edits, and the undo of an undo.
    for turn in 0..TURNS {
        fs::write(
            worktree.join(format!("d{turn}/f1.txt")),
            format!("edit {turn}\n"),
        )?;
        let earlier = json!({"commit": first});
        let (status, answer) = http.post(&format!("{thread}/restore"), &earlier).await?;
        ensure!(status == 200, "restore answered {status}: {answer}");
    }
    let head = http.get(thread).await?.1["result"]["head"]
        .as_str()
        .map(str::to_owned);
    let head = head.context("the thread has no head")?;
    let far = format!("{first}~{}", COMMITS - 1);
    let far = git_says(&worktree, &["rev-parse", &far])?;

    let mut table = Table::default();
    let of_turns = format!("{thread}/history");
    let of_site = format!("{thread}/diff?from={far}&to={head}");
    let of_turn = format!("{thread}/diff");
    for (what, path, rival) in [
        (
            "the list of threads",
            "/api/threads?clientId=bench&userId=u",
            None,
        ),
        ("one thread", thread, None),
        (
            "its history",
            of_turns.as_str(),
            Some(["log", "-20", "--stat"].as_slice()),
        ),
        ("what the thread changed", of_turn.as_str(), None),
        (
            "all 2,000 commits compared",
            of_site.as_str(),
            Some(["diff", "-M", far.as_str(), head.as_str()].as_slice()),
        ),
    ] {
        let (mut own, mut by_git) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let started = Instant::now();
            let (status, answer) = http.get(path).await?;
            own.push(ms(started));
            ensure!(
                status == 200 && answer["success"] == Value::Bool(true),
                "{path}: {answer}"
            );
            if let Some(args) = rival {
                let started = Instant::now();
                git(&worktree, args)?;
                by_git.push(ms(started));
            }
        }
        let base = table.own(format!("{what}, by the API"), Unit::Ms, own, AIM);
        if let Some(args) = rival {
            let command = args.iter().take(3).copied().collect::<Vec<_>>().join(" ");
            let command = command.replace(&far, "A B");
            table.rival(format!("`git {command}`"), Unit::Ms, by_git, base);
        }
    }
    table.note("5,000 files, 2,000 commits at the origin, 40 in the thread.");
    Ok(table)
}

fn origin(world: &World) -> anyhow::Result<PathBuf> {
    let origin = world.folder("history-origin.git");
    fs::create_dir_all(&origin)?;
    git(&origin, &["init", "-q", "--bare", "-b", "main"])?;
    let mut stream = String::new();
    for commit in 0..COMMITS {
        let time = 1_700_000_000 + commit * 60;
        let who = format!("bench <bench@localhost> {time} +0000");
        let message = format!("Change {commit}");
        let length = message.len();
        writeln!(
            stream,
            "commit refs/heads/main\ncommitter {who}\ndata {length}\n{message}"
        )?;
        let files = match commit {
            0 => 0..FILES,
            _ => commit % FILES..commit % FILES + 1,
        };
        for number in files {
            let content = format!("file {number}, {commit}\n{}\n", "text ".repeat(27));
            let (at, name) = (number / 100, number % 100);
            let length = content.len();
            writeln!(
                stream,
                "M 100644 inline d{at}/f{name}.txt\ndata {length}\n{content}"
            )?;
        }
    }
    let mut import = Command::new("git")
        .args(["fast-import", "--quiet"])
        .current_dir(&origin)
        .stdin(Stdio::piped())
        .spawn()?;
    let mut input = import.stdin.take().context("git takes no input")?;
    input.write_all(stream.as_bytes())?;
    drop(input);
    ensure!(import.wait()?.success(), "git fast-import failed");
    Ok(origin)
}

fn git_says(folder: &Path, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git")
        .args(args)
        .current_dir(folder)
        .output()?;
    ensure!(output.status.success(), "git {args:?} failed");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}
