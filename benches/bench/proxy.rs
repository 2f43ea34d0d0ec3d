//! The preview's reverse proxy beside nginx, Caddy and http-proxy, with one core each: requests per
//! second over 32 connections, and what a proxy adds to one connection's median and 99th
//! percentile, of a small answer and of one of 10 MB.

use std::{
    any::Any,
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use greenroom::{
    domain::{PreviewState, PreviewStatus},
    lifecycle::{Activity, HolderKind},
    preview::{ActivitySink, PreviewSettings, PreviewSite, Previews, Proxy, ProxyKind},
    process::{ConfinementMode, Launcher},
    task::Tasks,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    proxies::{self, Running, nginx, pin},
    report::{Table, Unit},
    world::{Http, Kid, World, cpu_seconds, free_port, until},
};

/// The argument that makes this program the proxy.
pub(crate) const SERVE: &str = "serve-proxy";

const ROUNDS: usize = 3;
const LOAD_SECONDS: u64 = 4;
const LATENCY_SECONDS: u64 = 3;
/// The core of whatever is measured; load and origin have the other one.
const CORE: &str = "0";
const OTHER: &str = "1";
const SMALL: &str = "";
const LARGE: &str = "large";
const LARGE_BYTES: usize = 10_000_000;

struct Served {
    running: Running,
    rps: Vec<f64>,
    cpu_us: Vec<f64>,
    small: Latency,
    large: Latency,
}

#[derive(Default)]
struct Latency {
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
}

impl Latency {
    fn push(&mut self, load: &Load) {
        self.p50_us.push(load.p50_us);
        self.p99_us.push(load.p99_us);
    }
}

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let port = free_port()?;
    let kid = origin(world, port)?;
    let origin = Running {
        name: "no proxy",
        port,
        kid,
    };
    let soon = Duration::from_secs(5);
    until("nginx", soon, async || Http::connect(port).await.ok()).await?;
    let mut all = vec![origin];
    all.extend(proxies::all(world, port, Some(CORE)).await?);
    let mut all: Vec<Served> = all
        .into_iter()
        .map(|running| Served {
            running,
            rps: Vec::new(),
            cpu_us: Vec::new(),
            small: Latency::default(),
            large: Latency::default(),
        })
        .collect();
    for one in &all {
        wrk(&one.running, SMALL, 32, 1)?;
        if one.running.name != "no proxy" {
            pin(one.running.kid.id(), CORE)?;
        }
    }
    for _ in 0..ROUNDS {
        for one in &mut all {
            let pid = one.running.kid.id();
            let before = cpu_seconds(pid);
            let load = wrk(&one.running, SMALL, 32, LOAD_SECONDS)?;
            let cpu = cpu_seconds(pid) - before;
            one.rps.push(load.rps);
            one.cpu_us.push(cpu * 1e6 / load.requests);
        }
        for one in &mut all {
            let load = wrk(&one.running, SMALL, 1, LATENCY_SECONDS)?;
            one.small.push(&load);
        }
        for one in &mut all {
            let load = wrk(&one.running, LARGE, 1, LATENCY_SECONDS)?;
            one.large.push(&load);
        }
    }
    let direct = all.remove(0);
    Ok(table(&all, &direct))
}

fn table(all: &[Served], direct: &Served) -> Table {
    let mut table = Table::default();
    let added = |own: &[f64], direct: &[f64], scale: f64| -> Vec<f64> {
        let pairs = own.iter().zip(direct);
        pairs.map(|(own, direct)| (own - direct) / scale).collect()
    };
    let mut bases = Vec::new();
    for (number, one) in all.iter().enumerate() {
        let [small, large] = [
            (&one.small, &direct.small, 1.0),
            (&one.large, &direct.large, 1e3),
        ]
        .map(|(own, direct, scale)| Latency {
            p50_us: added(&own.p50_us, &direct.p50_us, scale),
            p99_us: added(&own.p99_us, &direct.p99_us, scale),
        });
        let rows = [
            (
                "requests/s, 32 connections",
                Unit::PerSecond,
                one.rps.clone(),
                "at least nginx's",
            ),
            (
                "processor time of one request",
                Unit::Us,
                one.cpu_us.clone(),
                "",
            ),
            (
                "added to the median of one connection",
                Unit::Us,
                small.p50_us,
                "",
            ),
            ("added to its 99th percentile", Unit::Us, small.p99_us, ""),
            (
                "added to the median of a body of 10 MB",
                Unit::Ms,
                large.p50_us,
                "",
            ),
            ("added to its 99th percentile", Unit::Ms, large.p99_us, ""),
        ];
        for (row, (what, unit, values, aim)) in rows.into_iter().enumerate() {
            let what = format!("{}: {what}", one.running.name);
            if number == 0 {
                bases.push(table.own(what, unit, values, aim));
            } else {
                table.rival(what, unit, values, bases[row]);
            }
        }
    }
    table.rival(
        "no proxy: requests/s, 32 connections",
        Unit::PerSecond,
        direct.rps.clone(),
        bases[0],
    );
    table.note(
        "Origin: nginx answering 70 bytes from memory, and 10 MB from a file. Each proxy is pinned to \
         one core, load and origin to the other one; one round of each after the other.",
    );
    table
}

/// What wrk saw.
struct Load {
    requests: f64,
    rps: f64,
    p50_us: f64,
    p99_us: f64,
}

fn wrk(of: &Running, path: &str, connections: usize, seconds: u64) -> anyhow::Result<Load> {
    let output = Command::new("taskset")
        .args(["-c", OTHER, "wrk", "-t1", "--latency"])
        .arg(format!("-c{connections}"))
        .arg(format!("-d{seconds}s"))
        .arg(format!("http://127.0.0.1:{}/{path}", of.port))
        .stdin(Stdio::null())
        .output()
        .context("failed to run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk failed: {text}");
    ensure!(
        !text.contains("Non-2xx") && !text.contains("Socket errors"),
        "wrk got errors from {}: {text}",
        of.name
    );
    let word = |prefix: &str, nth: usize| {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(prefix))?;
        line.split_whitespace().nth(nth)
    };
    let share = |of: &str| {
        let told = word(of, 1).with_context(|| format!("wrk told no {of}"))?;
        microseconds(told).with_context(|| format!("wrk told {told}"))
    };
    let requests = text
        .lines()
        .find(|line| line.contains(" requests in "))
        .and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(Load {
        requests: requests.context("wrk told no requests")?,
        rps: word("Requests/sec:", 1)
            .and_then(|rps| rps.parse().ok())
            .context("wrk told no rate")?,
        p50_us: share("50%")?,
        p99_us: share("99%")?,
    })
}

/// `58.00us`, `1.20ms`.
fn microseconds(text: &str) -> Option<f64> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[number.len()..] {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * scale)
}

/// What is asked through all proxies.
fn origin(world: &World, port: u16) -> anyhow::Result<Kid> {
    let files = world.folder("origin");
    fs::create_dir_all(&files)?;
    fs::write(files.join(LARGE), vec![b'x'; LARGE_BYTES])?;
    let text = "0123456789".repeat(7);
    let server = format!(
        "location = / {{ default_type text/plain; return 200 \"{text}\"; }}\n\
         location = /{LARGE} {{ root {}; }}",
        files.display()
    );
    let kid = nginx(world, "origin", port, "", &server)?;
    pin(kid.id(), OTHER)?;
    Ok(kid)
}

/// greenroom's proxy in a process of its own, before a dev server on `upstream`.
pub(crate) async fn greenroom(
    world: &World,
    upstream: u16,
    core: Option<&str>,
) -> anyhow::Result<(Kid, u16)> {
    let port = free_port()?;
    let mut command = world.command(&std::env::current_exe()?, &world.folder(""));
    command.args([SERVE, &upstream.to_string(), &port.to_string()]);
    let kid = Kid::spawn(&mut command)?;
    let up = async || Http::connect(port).await.ok();
    until("the proxy", Duration::from_secs(5), up).await?;
    if let Some(core) = core {
        pin(kid.id(), core)?;
    }
    Ok((kid, port))
}

/// The process of [`greenroom`]: the library's proxy, as the program serves it.
pub(crate) fn serve(args: &[String]) -> anyhow::Result<()> {
    let [upstream, port] = args else {
        anyhow::bail!("which ports?");
    };
    let (upstream, port): (u16, u16) = (upstream.parse()?, port.parse()?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let tasks = Tasks::new();
        let settings = PreviewSettings {
            egress: None,
            access: greenroom::preview::Access::open(),
            node: "/nowhere".into(),
            private_root: "/nowhere".into(),
            most_awake: 3,
            shows_banner: false,
        };
        // It starts nothing here.
        let launcher = Launcher::start(Duration::from_secs(5), ConfinementMode::Auto)?;
        let previews = Previews::new(launcher, settings, tasks.clone());
        let status = PreviewStatus {
            state: PreviewState::Live,
            upstream: Some(upstream),
            ..PreviewStatus::off()
        };
        let (_publish, status) = watch::channel(status);
        let slug = "bench-user-main-0123456789ab";
        let site = PreviewSite {
            slug: slug.into(),
            worktree: "/nowhere".into(),
            port: upstream,
            hosts: Vec::new(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        previews.adopt(site, status);
        previews.set_default(slug);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = TcpListener::bind(address).await?.into_std()?;
        let sink = Arc::new(Sink(Activity::new(None)));
        let proxies = tasks.clone();
        tasks.spawn_apart("previews", move || {
            let listener = TcpListener::from_std(listener)?;
            Proxy::serve(listener, ProxyKind::Preview, previews, sink, &proxies);
            Ok(())
        })?;
        tasks.token().cancelled().await;
        Ok(())
    })
}

/// As the program has it.
struct Sink(Activity);

impl ActivitySink for Sink {
    fn request(&self) -> Box<dyn Any + Send + Sync> {
        Box::new(self.0.hold(HolderKind::Preview, "a request for a page"))
    }

    fn person(&self, slug: &str) {
        self.0.person(slug);
    }
}
