//! Many images, three at a time: `greenroom label` beside a `claude -p` and a container for each, with
//! a model that takes its time, which is known and taken out, and with one that answers at once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use greenroom::{
    rehearsal::{Rehearsal, Rule, Script, Step},
    task::Tasks,
};
use image::{ImageFormat, Rgb, RgbImage};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;

use crate::{
    report::{Table, Unit},
    world::{Kid, World, until},
};

/// An unoptimised build only shows that it works.
const ROUNDS: usize = if cfg!(debug_assertions) { 1 } else { 3 };
const IMAGES: usize = if cfg!(debug_assertions) { 15 } else { 45 };
const WORKERS: usize = 3;
/// What a small model takes for an image, more or less.
const THINKING: Duration = Duration::from_secs(2);
const MODEL: &str = "claude-haiku-5-5";
const PROMPT: &str = "Describe the image.\nDESCRIPTION: one sentence\nNSFW: SAFE, SUGGESTIVE, \
                      ADULT or EXPLICIT\nTAGS: some, between commas";
const ANSWER: &str = "DESCRIPTION: A pattern.\nNSFW: SAFE\nTAGS: pattern";
/// Longest run about one image, and about all of them.
const ONE: Duration = Duration::from_secs(60);
const ALL: Duration = Duration::from_secs(300);
/// As `scripts/image` calls it.
const IMAGE: &str = "greenroom:test";

/// The images, as files and as the lines that a CLI reads.
struct Photos {
    folder: PathBuf,
    lines: Vec<PathBuf>,
}

/// One way to have them labelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Greenroom,
    Hand,
    Container,
}

/// What it took, one value for each round.
#[derive(Default)]
struct Took {
    /// Of a worker for an image, beyond the model's time, in ms.
    overhead: Vec<f64>,
    per_minute: Vec<f64>,
    per_minute_at_once: Vec<f64>,
    /// For an image, in ms; of a container's nobody tells us.
    processor: Vec<f64>,
}

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let tasks = Tasks::new();
    let slow = model(THINKING, &tasks).await?;
    let quick = model(Duration::ZERO, &tasks).await?;
    let photos = photos(&world.folder("label-photos"))?;
    let mut ways = vec![Way::Greenroom, Way::Hand];
    let mut without = String::new();
    // The first run of each makes its folders, and shows whether it works.
    for way in [Way::Greenroom, Way::Hand] {
        run(world, way, &photos, &quick).await?;
    }
    match run(world, Way::Container, &photos, &quick).await {
        Ok(_) => ways.push(Way::Container),
        Err(error) => {
            eprintln!("bench: no containers: {error:#}");
            without = format!("Containers were left out: {error:#}.");
        }
    }
    let mut took: Vec<Took> = ways.iter().map(|_| Took::default()).collect();
    for _ in 0..ROUNDS {
        for (way, took) in ways.iter().zip(&mut took) {
            let seconds = run(world, *way, &photos, &slow).await?;
            let each = seconds * WORKERS as f64 / IMAGES as f64;
            took.overhead.push((each - THINKING.as_secs_f64()) * 1e3);
            took.per_minute.push(IMAGES as f64 / seconds * 60.0);
        }
        for (way, took) in ways.iter().zip(&mut took) {
            let before = processor()?;
            let seconds = run(world, *way, &photos, &quick).await?;
            took.per_minute_at_once.push(IMAGES as f64 / seconds * 60.0);
            let used = processor()? - before;
            took.processor.push(used / IMAGES as f64 * 1e3);
        }
    }
    tasks.stop(Duration::from_secs(2)).await;
    let mut table = table(&ways, took);
    if !without.is_empty() {
        table.note(&without);
    }
    Ok(table)
}

fn table(ways: &[Way], mut took: Vec<Took>) -> Table {
    let mut table = Table::default();
    let own = took.remove(0);
    let rivals: Vec<(&str, Took)> = ways[1..]
        .iter()
        .map(|way| match way {
            Way::Container => "a container for each, three at once",
            _ => "`claude -p` for each, three at once",
        })
        .zip(took)
        .collect();
    let aim = "a third of `claude -p`'s, a tenth of a container's";
    let base = table.own(
        "one image beyond the model's time: `greenroom label`, 3 workers, a model that thinks for 2 s",
        Unit::Ms,
        own.overhead,
        aim,
    );
    for (name, rival) in &rivals {
        table.rival(*name, Unit::Ms, rival.overhead.clone(), base);
    }
    let base = table.own(
        "images a minute, the same",
        Unit::PerMinute,
        own.per_minute,
        "",
    );
    for (name, rival) in &rivals {
        table.rival(*name, Unit::PerMinute, rival.per_minute.clone(), base);
    }
    let base = table.own(
        "images a minute, the model answering at once",
        Unit::PerMinute,
        own.per_minute_at_once,
        "",
    );
    for (name, rival) in &rivals {
        table.rival(
            *name,
            Unit::PerMinute,
            rival.per_minute_at_once.clone(),
            base,
        );
    }
    let base = table.own("processor time of one image", Unit::Ms, own.processor, "");
    let hand = rivals
        .first()
        .map(|(name, rival)| (*name, rival.processor.clone()));
    if let Some((name, processor)) = hand {
        table.rival(name, Unit::Ms, processor, base);
    }
    table.note(&format!(
        "{IMAGES} PNGs of 1200 × 800, one value a round: the whole of it, start of the program and first \
         CLI included, for each worker and image. By hand the CLI gets the image by its standard \
         input, with its default tools and prompt. Where the model answers at once nearly all is the \
         CLI's own start, on both sides."
    ));
    table
}

async fn model(thinking: Duration, tasks: &Tasks) -> anyhow::Result<Rehearsal> {
    let script = Script {
        rules: vec![Rule {
            matches: String::new(),
            steps: vec![Step {
                text: Some(ANSWER.into()),
                delay_ms: u64::try_from(thinking.as_millis())?,
                ..Step::default()
            }],
        }],
        ..Script::default()
    };
    Ok(Rehearsal::start(script, tasks).await?)
}

/// Pictures of which no two are alike.
fn photos(folder: &Path) -> anyhow::Result<Photos> {
    let lines = folder.with_extension("lines");
    fs::create_dir_all(folder)?;
    fs::create_dir_all(&lines)?;
    let mut photos = Photos {
        folder: folder.to_owned(),
        lines: Vec::new(),
    };
    for number in 0..IMAGES {
        let [.., r, g] = number.wrapping_mul(40_503).to_be_bytes();
        let image = RgbImage::from_fn(1200, 800, |x, y| {
            Rgb([(x / 5) as u8 ^ r, (y / 4) as u8 ^ g, ((x * y) >> 12) as u8])
        });
        let file = folder.join(format!("{number:03}.png"));
        image.save_with_format(&file, ImageFormat::Png)?;
        let source = json!({
            "type": "base64", "media_type": "image/png", "data": STANDARD.encode(fs::read(&file)?),
        });
        let content =
            json!([{"type": "image", "source": source}, {"type": "text", "text": PROMPT}]);
        let line = json!({"type": "user", "message": {"role": "user", "content": content}});
        let path = lines.join(format!("{number:03}.jsonl"));
        fs::write(&path, format!("{line}\n"))?;
        photos.lines.push(path);
    }
    Ok(photos)
}

/// Has all images labelled; the seconds that it took.
async fn run(world: &World, way: Way, photos: &Photos, model: &Rehearsal) -> anyhow::Result<f64> {
    let began = Instant::now();
    match way {
        Way::Greenroom => {
            let mut command = greenroom(world, photos, model)?;
            to_its_end(&mut command, ALL).await?;
        }
        Way::Hand | Way::Container => {
            let runs = photos.lines.iter().map(|line| async move {
                let mut command = match way {
                    Way::Container => container(world, model)?,
                    _ => by_hand(world, model)?,
                };
                command.stdin(fs::File::open(line)?);
                to_its_end(&mut command, ONE).await
            });
            let runs = stream::iter(runs).buffer_unordered(WORKERS);
            runs.try_collect::<Vec<()>>().await?;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let requests = model.requests();
    let last = requests.last().context("nothing was asked")?;
    ensure!(
        last.images.len() == 1,
        "it was asked about {} images",
        last.images.len()
    );
    Ok(seconds)
}

async fn to_its_end(command: &mut Command, limit: Duration) -> anyhow::Result<()> {
    let mut kid = Kid::spawn(command)?;
    let ended = until("its end", limit, async || {
        kid.child.try_wait().ok().flatten()
    });
    let status = ended.await?;
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or_default().display();
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}

fn greenroom(world: &World, photos: &Photos, model: &Rehearsal) -> anyhow::Result<Command> {
    let home = world.folder("label-home");
    // A batch that was never begun, each time.
    fs::remove_dir_all(&home).ok();
    fs::create_dir_all(&home)?;
    let log = fs::File::create(home.join("log"))?;
    let mut command = world.command(Path::new(env!("CARGO_BIN_EXE_greenroom")), &home);
    command
        .args(["label", "--no-cache", "--jsonl", "--workers", "3"])
        .args(["--prompt", PROMPT])
        .arg(&photos.folder)
        .current_dir(&home)
        .stderr(log)
        .env("WORKSPACE_PATH", home.join("none"))
        .env("CACHE_PATH", home.join("cache"))
        .env("CLAUDE_BIN", world.claude()?)
        .env("CLAUDE_MODEL", MODEL)
        .env("ANTHROPIC_BASE_URL", model.url())
        .env("ANTHROPIC_API_KEY", "none");
    Ok(command)
}

const CLI: [&str; 7] = [
    "-p",
    "--input-format",
    "stream-json",
    "--output-format",
    "stream-json",
    "--verbose",
    "--model",
];

/// What keeps the CLI from talking to anybody but the model.
const QUIET: [(&str, &str); 3] = [
    ("ANTHROPIC_AUTH_TOKEN", "none"),
    ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
    ("DISABLE_AUTOUPDATER", "1"),
];

fn by_hand(world: &World, model: &Rehearsal) -> anyhow::Result<Command> {
    let home = world.folder("label-hand");
    fs::create_dir_all(&home)?;
    let mut command = world.command(world.claude()?, &home);
    command
        .args(CLI)
        .arg(MODEL)
        .current_dir(&home)
        .env("CLAUDE_CONFIG_DIR", &home)
        .env("ANTHROPIC_BASE_URL", model.url())
        .envs(QUIET);
    Ok(command)
}

/// The CLI of our own image, in a container that is gone afterwards.
fn container(world: &World, model: &Rehearsal) -> anyhow::Result<Command> {
    let docker = world
        .docker()
        .context("there is no engine with our image")?;
    let arch = match std::env::consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => bail!("there is no image for {other}"),
    };
    let cli = format!("/usr/local/lib/node_modules/@anthropic-ai/claude-code-linux-{arch}/claude");
    let mut command = world.command(docker, &world.folder("label-docker"));
    // The model listens on this machine's loopback.
    command.args([
        "run",
        "--rm",
        "-i",
        "--network",
        "host",
        "--entrypoint",
        &cli,
    ]);
    for (name, value) in QUIET {
        command.args(["-e", &format!("{name}={value}")]);
    }
    command
        .args(["-e", &format!("ANTHROPIC_BASE_URL={}", model.url())])
        .arg(IMAGE)
        .args(CLI)
        .arg(MODEL)
        .envs(std::env::var_os("DOCKER_HOST").map(|host| ("DOCKER_HOST", host)));
    Ok(command)
}

/// Processor time of all children that ended, with theirs, in seconds.
fn processor() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        use nix::sys::time::TimeValLike as _;
        time.num_microseconds() as f64 / 1e6
    };
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
