//! From nothing to the first page of a site: a container's first start, its start beside an archive
//! of the dependencies, and a new thread in one that runs, each in turns with what a person would
//! do by hand.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::{
    hmr,
    report::{Table, Unit},
    start,
    world::{Greenroom, Http, World, copy_site, free_port, until},
};

const ROUNDS: usize = 3;
const SOON: Duration = Duration::from_secs(180);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let site = world.site()?;
    let [mut cold, mut archived, mut warm, mut by_hand, mut bare] = [const { Vec::new() }; 5];
    for round in 0..ROUNDS {
        let name = format!("first-page-{round}");
        let begun = Instant::now();
        let container = Container::start(world, &name).await?;
        container.open("one").await?;
        cold.push(milliseconds(begun));
        warm.push(container.timed("two").await?);
        warm.push(container.timed("three").await?);
        drop(container);
        // Another container on the same workspace.
        fs::remove_dir_all(world.folder(&name).join("cache")).context("losing the cache")?;
        let begun = Instant::now();
        let container = Container::start(world, &name).await?;
        container.open("four").await?;
        archived.push(milliseconds(begun));
        drop(container);

        let folder = world.folder(&format!("by-hand-{round}"));
        copy_site(site, &folder, false)?;
        let begun = Instant::now();
        world.npm(&folder, &folder.join("npm-cache"), &["install"])?;
        drop(hmr::astro(world, &folder, &folder, free_port()?).await?);
        by_hand.push(milliseconds(begun));
        for _ in 0..2 {
            // As a new checkout begins, but with its dependencies.
            for made in ["node_modules/.vite", ".astro"] {
                fs::remove_dir_all(folder.join(made)).ok();
            }
            let begun = Instant::now();
            drop(hmr::astro(world, &folder, &folder, free_port()?).await?);
            bare.push(milliseconds(begun));
        }
    }
    let mut table = Table::default();
    let base = table.own(
        "first page in a new container, nothing installed anywhere",
        Unit::Ms,
        cold,
        "",
    );
    table.rival(
        "`npm install && astro dev`",
        Unit::Ms,
        by_hand.clone(),
        base,
    );
    let base = table.own(
        "first page in a new container, with the archive on the workspace",
        Unit::Ms,
        archived,
        "",
    );
    table.rival(
        "`npm install && astro dev`",
        Unit::Ms,
        by_hand.clone(),
        base,
    );
    let base = table.own(
        "first page of a new thread with a known lockfile",
        Unit::Ms,
        warm,
        "1.2 times a bare `astro dev`, an eighth of `npm install && astro dev`",
    );
    table.rival("`astro dev`, all installed", Unit::Ms, bare, base);
    table.rival("`npm install && astro dev`", Unit::Ms, by_hand, base);
    table.note(
        "The built-in site. A container's time begins with the start of greenroom, a thread's with its \
         init; both end with the whole first page. `npm install` begins with an empty download cache \
         and a lockfile.",
    );
    Ok(table)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// greenroom on a workspace and a cache of its own.
struct Container {
    greenroom: Greenroom,
    preview_port: u16,
}

impl Container {
    async fn start(world: &World, name: &str) -> anyhow::Result<Self> {
        let preview_port = free_port()?;
        let port = preview_port.to_string();
        let mut env = vec![
            ("ANTHROPIC_API_KEY".to_owned(), "none".to_owned()),
            ("PREVIEW_PORT".to_owned(), port),
            ("PREVIEW_READY_SECONDS".to_owned(), "150".to_owned()),
        ];
        env.extend(World::npm_settings());
        let env: Vec<(&str, &str)> = env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let greenroom = start::greenroom(world, name, &env).await?;
        Ok(Self {
            greenroom,
            preview_port,
        })
    }

    /// Makes a thread ready and loads its first page.
    async fn open(&self, thread: &str) -> anyhow::Result<()> {
        let mut http = Http::connect(self.greenroom.port).await?;
        let body = json!({"clientId": "bench", "userId": "me", "threadId": thread});
        let (status, answer) = http.post("/api/init", &body).await?;
        ensure!(status == 200, "init answered {status}: {answer}");
        let state = &answer["preview"]["state"];
        ensure!(state == "live", "the preview is {state}: {answer}");
        let url = answer["preview"]["url"].as_str().unwrap_or_default();
        let host = url.trim_start_matches("http://").trim_end_matches('/');
        let host = host.split(':').next().unwrap_or_default();
        let port = self.preview_port;
        until("the first page", SOON, async || {
            let mut page = Http::connect_as(port, host).await.ok()?;
            matches!(page.get("/").await, Ok((200, _))).then_some(())
        })
        .await
    }

    async fn timed(&self, thread: &str) -> anyhow::Result<f64> {
        let begun = Instant::now();
        self.open(thread).await?;
        Ok(milliseconds(begun))
    }
}
