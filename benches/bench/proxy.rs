//! The preview's reverse proxy beside nginx and http-proxy: requests per second over 32
//! connections with one core each, and what a proxy adds to one connection's median.

use std::{
    any::Any,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
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

struct Served {
    name: &'static str,
    port: u16,
    kid: Kid,
    rps: Vec<f64>,
    cpu_us: Vec<f64>,
    p50_us: Vec<f64>,
}

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let port = free_port()?;
    let origin = nginx(world, "origin", port, ORIGIN, OTHER)?;
    let mut all = vec![served("no proxy", port, origin)];
    let (own, own_port) = greenroom(world, port, Some(CORE)).await?;
    all.push(served("greenroom's preview proxy", own_port, own));
    let nginx_port = free_port()?;
    let conf = PROXY.replace("{upstream}", &port.to_string());
    let kid = nginx(world, "proxy", nginx_port, &conf, CORE)?;
    all.push(served(
        "nginx, 1 worker, upstream keepalive",
        nginx_port,
        kid,
    ));
    let node_port = free_port()?;
    let kid = world.rival(
        "http-proxy.js",
        &[&port.to_string(), &node_port.to_string()],
    )?;
    pin(kid.id(), CORE)?;
    all.push(served(
        "http-proxy on Node, keep-alive agent",
        node_port,
        kid,
    ));
    for one in &all {
        let soon = Duration::from_secs(5);
        until(one.name, soon, async || Http::connect(one.port).await.ok()).await?;
        wrk(one.port, 32, 1)?;
    }
    for _ in 0..ROUNDS {
        for one in &mut all {
            let before = cpu_seconds(one.kid.id());
            let load = wrk(one.port, 32, LOAD_SECONDS)?;
            let cpu = cpu_seconds(one.kid.id()) - before;
            one.rps.push(load.rps);
            one.cpu_us.push(cpu * 1e6 / load.requests);
        }
        for one in &mut all {
            one.p50_us.push(wrk(one.port, 1, LATENCY_SECONDS)?.p50_us);
        }
    }
    let direct = all.remove(0);
    let mut table = Table::default();
    let mut bases = [0; 3];
    for (number, one) in all.iter().enumerate() {
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
                one.p50_us
                    .iter()
                    .zip(&direct.p50_us)
                    .map(|(own, direct)| own - direct)
                    .collect(),
                "under 50 µs",
            ),
        ];
        for (row, (what, unit, values, aim)) in rows.into_iter().enumerate() {
            let what = format!("{}: {what}", one.name);
            if number == 0 {
                bases[row] = table.own(what, unit, values, aim);
            } else {
                table.rival(what, unit, values, bases[row]);
            }
        }
    }
    table.rival(
        "no proxy: requests/s, 32 connections",
        Unit::PerSecond,
        direct.rps,
        bases[0],
    );
    table.note(
        "Origin: nginx answering 70 bytes from memory. Each proxy is pinned to one core, load and \
         origin to the other one; one round of each after the other.",
    );
    Ok(table)
}

fn served(name: &'static str, port: u16, kid: Kid) -> Served {
    Served {
        name,
        port,
        kid,
        rps: Vec::new(),
        cpu_us: Vec::new(),
        p50_us: Vec::new(),
    }
}

/// What wrk saw.
struct Load {
    requests: f64,
    rps: f64,
    p50_us: f64,
}

fn wrk(port: u16, connections: usize, seconds: u64) -> anyhow::Result<Load> {
    let output = Command::new("taskset")
        .args(["-c", OTHER, "wrk", "-t1", "--latency"])
        .arg(format!("-c{connections}"))
        .arg(format!("-d{seconds}s"))
        .arg(format!("http://127.0.0.1:{port}/"))
        .stdin(Stdio::null())
        .output()
        .context("failed to run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk failed: {text}");
    ensure!(!text.contains("Non-2xx"), "wrk got errors: {text}");
    let word = |prefix: &str, nth: usize| {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(prefix))?;
        line.split_whitespace().nth(nth)
    };
    let p50 = word("50%", 1).context("wrk told no median")?;
    let requests = text
        .lines()
        .find(|line| line.contains(" requests in "))
        .and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(Load {
        requests: requests.context("wrk told no requests")?,
        rps: word("Requests/sec:", 1)
            .and_then(|rps| rps.parse().ok())
            .context("wrk told no rate")?,
        p50_us: microseconds(p50).with_context(|| format!("wrk told {p50}"))?,
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

fn pin(pid: u32, core: &str) -> anyhow::Result<()> {
    let status = Command::new("taskset")
        .args(["-a", "-p", "-c", core, &pid.to_string()])
        .stdout(Stdio::null())
        .status()
        .context("failed to run taskset")?;
    ensure!(status.success(), "taskset failed");
    Ok(())
}

const ORIGIN: &str = r#"location / { default_type text/plain;
    return 200 "0123456789012345678901234567890123456789012345678901234567890123456789"; }"#;
const PROXY: &str = r#"location / { proxy_pass http://up; proxy_http_version 1.1;
    proxy_set_header Connection ""; proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }
} upstream up { server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000;"#;

/// nginx with one worker on one core.
fn nginx(world: &World, name: &str, port: u16, rules: &str, core: &str) -> anyhow::Result<Kid> {
    let folder = world.folder(&format!("nginx-{name}"));
    fs::create_dir_all(&folder)?;
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};", folder.display()))
        .join("\n");
    let config = format!(
        "daemon off; master_process off; worker_processes 1; pid {0}/pid; error_log {0}/error;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log off; keepalive_requests 100000000; tcp_nodelay on;\n{temporary}\n\
         server {{ listen 127.0.0.1:{port};\n{rules} }} }}\n",
        folder.display()
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config)?;
    let mut command = world.command(Path::new("taskset"), &folder);
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-c", core, "nginx", "-e", "stderr", "-p"])
        .arg(&folder)
        .arg("-c")
        .arg(&path);
    Kid::spawn(&mut command)
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
