//! `POST /api/init` of new threads and of a live one. No dev server and no dependencies: the
//! site is a local repository of 50 files. The agent is started ahead, as always.

use std::{fs, path::Path, time::Instant};

use anyhow::ensure;
use serde_json::json;

use crate::{
    report::{Table, Unit},
    start,
    world::{Greenroom, Http, World, git},
};

const NEW: usize = 10;
const LIVE: usize = 50;

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let folder = world.folder("init");
    let repository = world.repository("init-repo")?;
    let greenroom = start::greenroom(
        world,
        "init",
        &[("ANTHROPIC_API_KEY", "none"), ("ASTRO_DEV_MODE", "false")],
    )
    .await?;
    let mut http = Http::connect(greenroom.port).await?;
    let by_hand = folder.join("by-hand");
    fs::create_dir_all(&by_hand)?;

    let (mut user, mut clone) = (Vec::new(), Vec::new());
    let (mut thread, mut add) = (Vec::new(), Vec::new());
    for round in 0..NEW {
        user.push(init(&mut http, &format!("u{round}"), "main", &repository).await?);
        greenroom.kid.settle().await;
        thread.push(init(&mut http, "u0", &format!("t{round}"), &repository).await?);
        greenroom.kid.settle().await;

        let project = by_hand.join(format!("p{round}"));
        let worktree = by_hand.join(format!("w{round}"));
        let started = Instant::now();
        git(
            &by_hand,
            &[
                "clone",
                "-q",
                "--no-local",
                text(&repository),
                text(&project),
            ],
        )?;
        add_worktree(&project, &worktree, "main")?;
        clone.push(ms(started));
        let started = Instant::now();
        add_worktree(&project, &by_hand.join(format!("t{round}")), "more")?;
        add.push(ms(started));
    }

    let (mut live, mut head) = (Vec::new(), Vec::new());
    init(&mut http, "u0", "t0", &repository).await?;
    for _ in 0..LIVE {
        live.push(init(&mut http, "u0", "t0", &repository).await?);
        let started = Instant::now();
        git(&by_hand.join("t0"), &["rev-parse", "HEAD"])?;
        head.push(ms(started));
    }
    drop(greenroom);

    let mut table = Table::default();
    let base = table.own(
        "init of a new user: clone, branches, worktree",
        Unit::Ms,
        user,
        "",
    );
    table.rival(
        "`git clone` and `git worktree add` by hand",
        Unit::Ms,
        clone,
        base,
    );
    let base = table.own("init of a new thread of that user", Unit::Ms, thread, "");
    table.rival("`git worktree add` by hand", Unit::Ms, add, base);
    let base = table.own("init of a live thread", Unit::Ms, live, "under 5 ms");
    table.rival("one `git rev-parse HEAD`", Unit::Ms, head, base);
    Ok(table)
}

fn add_worktree(project: &Path, worktree: &Path, branch: &str) -> anyhow::Result<()> {
    let branch = format!("thread/{branch}");
    git(
        project,
        &["worktree", "add", "-q", "-b", &branch, text(worktree)],
    )
}

/// Milliseconds that an init took.
async fn init(http: &mut Http, user: &str, thread: &str, repository: &Path) -> anyhow::Result<f64> {
    let body = json!({
        "clientId": "bench", "userId": user, "threadId": thread,
        "repoUrl": repository, "waitForPreview": false,
    });
    let started = Instant::now();
    let (status, answer) = http.post("/api/init", &body).await?;
    let took = ms(started);
    ensure!(status == 200, "init answered {status}: {answer}");
    Ok(took)
}

/// Initialises a thread of the user `u` on a repository, without a preview.
pub(crate) async fn thread(
    greenroom: &Greenroom,
    thread: &str,
    repository: &Path,
) -> anyhow::Result<()> {
    let mut http = Http::connect(greenroom.port).await?;
    init(&mut http, "u", thread, repository).await?;
    Ok(())
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

fn text(path: &Path) -> &str {
    path.to_str().expect("made of ASCII here")
}
