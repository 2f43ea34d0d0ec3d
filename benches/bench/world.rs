//! What the parts share: scratch folders, processes, a small HTTP client, the machine.

use std::{
    ffi::OsStr,
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::report::quantile;

/// Most that any one call may take.
const CALL: Duration = Duration::from_secs(60);
/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(8);

/// The machine, its tools, and a scratch folder that goes with it.
#[derive(Debug)]
pub(crate) struct World {
    scratch: tempfile::TempDir,
    node: Option<PathBuf>,
    /// The folder with what npm installed for the rivals.
    rivals: Option<PathBuf>,
    claude: Option<PathBuf>,
    /// A copy of the template with its dependencies.
    site: Option<PathBuf>,
    /// A client whose engine has greenroom's image.
    docker: Option<PathBuf>,
    machine: String,
}

impl World {
    /// Looks at the machine, while it is quiet.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let scratch = tempfile::Builder::new()
            .prefix("greenroom-bench-")
            .tempdir()?;
        let machine = describe(scratch.path())?;
        let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
        Ok(Self {
            scratch,
            node: var("BENCH_NODE"),
            rivals: var("BENCH_RIVALS"),
            claude: var("BENCH_CLAUDE"),
            site: var("BENCH_SITE"),
            docker: var("BENCH_DOCKER"),
            machine,
        })
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The last lines of what every greenroom said.
    pub(crate) fn logs(&self) -> String {
        let folders = fs::read_dir(self.scratch.path())
            .into_iter()
            .flatten()
            .flatten();
        let mut tails = String::new();
        for folder in folders {
            let Ok(log) = fs::read_to_string(folder.path().join("log")) else {
                continue;
            };
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(8)..].join("\n");
            tails += &format!("{}:\n{tail}\n", folder.file_name().display());
        }
        tails
    }

    pub(crate) fn machine(&self) -> &str {
        &self.machine
    }

    pub(crate) fn node(&self) -> anyhow::Result<&Path> {
        self.node.as_deref().context("Node is missing")
    }

    pub(crate) fn claude(&self) -> anyhow::Result<&Path> {
        self.claude
            .as_deref()
            .context("the Claude Code CLI is missing")
    }

    pub(crate) fn site(&self) -> anyhow::Result<&Path> {
        self.site
            .as_deref()
            .context("the site's dependencies are missing")
    }

    pub(crate) fn docker(&self) -> Option<&Path> {
        self.docker.as_deref()
    }

    /// A command with an environment of its own.
    pub(crate) fn command(&self, program: &Path, home: &Path) -> Command {
        let mut command = Command::new(program);
        let own = self
            .node
            .as_deref()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/usr/bin"));
        command
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", own.display()))
            .env("HOME", home)
            .env("TMPDIR", home)
            .env("LANG", "C.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// One of the servers in `benches/rivals`, on Node.
    pub(crate) fn rival(&self, script: &str, args: &[&str]) -> anyhow::Result<Kid> {
        let folder = self.rivals.as_deref().context("npm's rivals are missing")?;
        let mut command = self.command(self.node()?, self.scratch.path());
        command.arg(folder.join(script)).args(args);
        Kid::spawn(&mut command)
    }

    /// What npm is told where the bench was started.
    pub(crate) fn npm_settings() -> Vec<(String, String)> {
        let network = [
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "node_extra_ca_certs",
        ];
        let is_npms = |name: &str| {
            let name = name.to_ascii_lowercase();
            name.starts_with("npm_config_") || network.contains(&name.as_str())
        };
        let mut settings: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| is_npms(name))
            .collect();
        let config = std::env::home_dir().unwrap_or_default().join(".npmrc");
        if let Some(config) = config.to_str().filter(|_| config.is_file()) {
            settings.push(("npm_config_userconfig".into(), config.into()));
        }
        settings
    }

    /// npm's script, beside Node or on PATH.
    pub(crate) fn npm_program(&self) -> anyhow::Result<PathBuf> {
        let beside = self.node()?.parent().map(Path::to_owned);
        let path = std::env::var_os("PATH").unwrap_or_default();
        beside
            .into_iter()
            .chain(std::env::split_paths(&path))
            .map(|folder| folder.join("npm"))
            .find_map(|npm| npm.canonicalize().ok())
            .context("npm is missing")
    }

    /// Runs npm in a folder, with its downloads in `cache`.
    pub(crate) fn npm(&self, folder: &Path, cache: &Path, args: &[&str]) -> anyhow::Result<()> {
        let mut command = self.command(self.node()?, self.scratch.path());
        let status = command
            .current_dir(folder)
            .envs(Self::npm_settings())
            .env("npm_config_cache", cache)
            .arg(self.npm_program()?)
            .args(args)
            .args(["--no-audit", "--no-fund", "--loglevel", "error"])
            .status()
            .context("failed to run npm")?;
        ensure!(status.success(), "npm {} failed", args.join(" "));
        Ok(())
    }

    /// A git repository of 50 small files in `name`.
    pub(crate) fn repository(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder(name);
        fs::create_dir_all(folder.join("src/pages"))?;
        for number in 0..50 {
            let text = format!(
                "<h1>Page {number}</h1>\n{}",
                "<p>Some text.</p>\n".repeat(40)
            );
            fs::write(folder.join(format!("src/pages/p{number}.html")), text)?;
        }
        git(&folder, &["init", "-q", "-b", "main"])?;
        git(&folder, &["add", "-A"])?;
        git(&folder, &["commit", "-q", "-m", "Begin"])?;
        Ok(folder)
    }
}

/// Runs the git program to its end.
pub(crate) fn git(cwd: &Path, args: &[&str]) -> anyhow::Result<()> {
    let who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"];
    let status = Command::new("git")
        .args(who)
        .args(args)
        .current_dir(cwd)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("failed to run git")?;
    ensure!(status.success(), "git {} failed", args.join(" "));
    Ok(())
}

/// A port that nobody listens on at the moment.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// A child process that ends with its owner.
#[derive(Debug)]
pub(crate) struct Kid {
    pub(crate) child: Child,
}

impl Kid {
    pub(crate) fn spawn(command: &mut Command) -> anyhow::Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("failed to start {}", command.get_program().display()))?;
        Ok(Self { child })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM, and SIGKILL where that is not enough.
    pub(crate) fn end(&mut self) {
        let pid = Pid::from_raw(self.id().cast_signed());
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if asked.elapsed() > GRACE {
                self.child.kill().ok();
            } else {
                kill(pid, Signal::SIGTERM).ok();
            }
            // One signal is obeyed, a second one would cut that short.
            let again = Instant::now() + GRACE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < again {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// Waits until the process and its descendants have nothing to do, 10 s at most.
    pub(crate) async fn settle(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        let mut quiet = 0;
        let mut before = f64::NAN;
        while quiet < 4 && Instant::now() < until {
            let now: f64 = tree(self.id()).into_iter().map(cpu_seconds).sum();
            quiet = if now - before < 0.015 { quiet + 1 } else { 0 };
            before = now;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }
}

impl Drop for Kid {
    fn drop(&mut self) {
        self.end();
    }
}

/// A running `greenroom serve` with a workspace of its own.
#[derive(Debug)]
pub(crate) struct Greenroom {
    pub(crate) kid: Kid,
    pub(crate) port: u16,
}

impl Greenroom {
    pub(crate) fn spawn(world: &World, name: &str, env: &[(&str, &str)]) -> anyhow::Result<Self> {
        let folder = world.folder(name);
        fs::create_dir_all(&folder)?;
        let port = free_port()?;
        let log = fs::File::create(folder.join("log"))?;
        let mut command = world.command(Path::new(env!("CARGO_BIN_EXE_greenroom")), &folder);
        command
            .arg("serve")
            .current_dir(&folder)
            .stderr(log)
            .env("WORKSPACE_PATH", folder.join("workspace"))
            .env("CACHE_PATH", folder.join("cache"))
            .env("GREENROOM_ALLOWED_LOCAL_REPOS", world.scratch.path())
            .env("AUTO_SHUTDOWN_MINUTES", "0")
            .env("API_PORT", port.to_string())
            .env("PREVIEW_PORT", "0")
            .env("HMR_PORT", "0")
            .envs(world.claude.iter().map(|path| ("CLAUDE_BIN", path)))
            .envs(
                env.iter()
                    .map(|(name, value)| (OsStr::new(name), OsStr::new(value))),
            );
        Ok(Self {
            kid: Kid::spawn(&mut command)?,
            port,
        })
    }
}

/// One connection that is kept.
#[derive(Debug)]
pub(crate) struct Http {
    host: String,
    sender: SendRequest<Full<Bytes>>,
}

impl Http {
    pub(crate) async fn connect(port: u16) -> anyhow::Result<Self> {
        Self::connect_as(port, "localhost").await
    }

    /// The same, with another name for the server.
    pub(crate) async fn connect_as(port: u16, name: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let host = format!("{name}:{port}");
        Ok(Self { host, sender })
    }

    pub(crate) async fn get(&mut self, path: &str) -> anyhow::Result<(u16, Value)> {
        self.ask("GET", path, Bytes::new()).await
    }

    pub(crate) async fn post(&mut self, path: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
        self.ask("POST", path, body.to_string().into()).await
    }

    /// Status and body, null where that is not JSON.
    async fn ask(&mut self, method: &str, path: &str, body: Bytes) -> anyhow::Result<(u16, Value)> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let call = async {
            self.sender.ready().await?;
            let response = self.sender.send_request(request).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
        };
        tokio::time::timeout(CALL, call).await?
    }
}

/// What a process holds, in MB of 10^6 bytes.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) rss_mb: f64,
    /// Where we may see it.
    pub(crate) pss_mb: Option<f64>,
}

pub(crate) fn memory(pid: u32) -> anyhow::Result<Memory> {
    let field = |file: &str, name: &str| -> Option<f64> {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024.0 / 1e6)
    };
    Ok(Memory {
        rss_mb: field("status", "VmRSS:").context("the process is gone")?,
        pss_mb: field("smaps_rollup", "Pss:"),
    })
}

/// Processor time that a process has used; 0 of one that is gone.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let Some(fields) = stat(pid) else { return 0.0 };
    let ticks: f64 = fields[11..13]
        .iter()
        .filter_map(|t| t.parse::<f64>().ok())
        .sum();
    // USER_HZ, the same on every Linux.
    ticks / 100.0
}

/// The fields of `/proc/PID/stat` after the name, which may hold spaces.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split_whitespace().map(ToOwned::to_owned).collect())
}

/// A process and all that descend from it.
fn tree(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, stat(pid)?[1].parse().ok()?))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let of = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == of)
                .map(|(pid, _)| pid),
        );
        next += 1;
    }
    found
}

/// One line on the machine, with nothing that names it.
fn describe(scratch: &Path) -> anyhow::Result<String> {
    let cores = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel: Vec<&str> = kernel.split(['.', '-']).take(2).collect();
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    let mut syncs = Vec::new();
    for number in 0..15 {
        let file = fs::File::create(scratch.join(format!("sync{number}")))?;
        let started = Instant::now();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 0)?;
        file.sync_all()?;
        syncs.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let today = jiff::Zoned::now().date();
    Ok(format!(
        "Measured {today} on {cores} {} cores, Linux {}, a disk that syncs a new 4 kB file in {:.2} ms; \
         load average before: {load}.",
        std::env::consts::ARCH.replace('_', "-"),
        kernel.join("."),
        quantile(&syncs, 0.5),
    ))
}

/// Copies a site without what is made of it, or with its dependencies.
pub(crate) fn copy_site(from: &Path, to: &Path, with_modules: bool) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_made = [".astro", "dist", ".installed", "npm-cache"]
            .iter()
            .any(|made| name == *made)
            || name == "node_modules" && !with_modules;
        if is_made {
            continue;
        }
        let target = to.join(&name);
        if entry.file_type()?.is_dir() {
            copy_site(&entry.path(), &target, with_modules)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Waits until something is true.
pub(crate) async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if let Some(found) = look().await {
            return Ok(found);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    bail!("{what}: not within {} s", limit.as_secs())
}
