//! The programs that children are made of: where they are, what they may read to run, and whether
//! they are there and new enough.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use crate::{
    api::Readiness,
    config::{self, Loaded},
    egress::Door,
    process::{Launcher, Profile, Spec, Stdin},
    workspace::NodeTools,
};

/// Oldest Node that Astro 7 runs on.
const MIN_NODE: (u32, u32) = (22, 12);

/// The programs that children are made of.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) claude: Option<PathBuf>,
    pub(super) node: Option<PathBuf>,
    pub(super) path: OsString,
    /// npm's settings, for the installer alone.
    npm_env: Vec<(OsString, OsString)>,
}

impl Programs {
    pub(super) fn find(loaded: &Loaded) -> Self {
        let path = loaded
            .surroundings
            .path
            .clone()
            .unwrap_or_else(|| "/usr/bin:/bin".into());
        Self {
            claude: config::find_claude(
                loaded.settings.claude_bin.as_deref(),
                Some(&path),
                &loaded.surroundings.cwd,
            ),
            node: config::find_node(Some(&path)),
            npm_env: npm_environment(),
            path,
        }
    }

    pub(super) fn node_tools(&self, egress: Option<Door>) -> Option<NodeTools> {
        let npm = std::env::split_paths(&self.path)
            .map(|folder| folder.join("npm"))
            .find(|npm| npm.is_file());
        let is_file = |(_, value): &&(OsString, OsString)| Path::new(value).is_absolute();
        Some(NodeTools {
            node: self.node.clone()?,
            npm: npm.unwrap_or_else(|| "npm".into()),
            readable: self
                .npm_env
                .iter()
                .filter(is_file)
                .map(|(_, file)| file.into())
                .collect(),
            env: self.npm_env.clone(),
            egress,
        })
    }

    /// What children may read outside of the system's folders to run what is on `PATH`.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        let folders = std::env::split_paths(&self.path).filter(|folder| folder.is_absolute());
        let mut roots: Vec<PathBuf> = folders
            .filter(|folder| {
                !["/usr", "/bin", "/sbin"]
                    .iter()
                    .any(|root| folder.starts_with(root))
            })
            .filter_map(|folder| std::fs::canonicalize(folder).ok())
            .collect();
        // npm and its like are links from `bin` into `lib/node_modules` beside it.
        for program in ["npm", "npx", "node"] {
            for folder in roots.clone() {
                let target = std::fs::canonicalize(folder.join(program));
                let package = target.ok().and_then(|target| {
                    let package = target
                        .ancestors()
                        .find(|folder| folder.ends_with("node_modules"));
                    package.map(Path::to_owned)
                });
                roots.extend(package);
            }
        }
        roots.sort();
        roots.dedup();
        roots
    }
}

/// What tells npm where and how to fetch: registries, proxies, certificates.
fn npm_environment() -> Vec<(OsString, OsString)> {
    const NAMES: [&str; 10] = [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "NODE_EXTRA_CA_CERTS",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "NPM_TOKEN",
    ];
    let mut env: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(name, _)| {
            let name = name.to_string_lossy();
            NAMES.contains(&name.as_ref()) || name.to_ascii_lowercase().starts_with("npm_config_")
        })
        .collect();
    let has_config = env
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("npm_config_userconfig"));
    if let Some(home) = std::env::home_dir().filter(|_| !has_config) {
        let config = home.join(".npmrc");
        if config.is_file() {
            env.push(("npm_config_userconfig".into(), config.into()));
        }
    }
    env
}

/// Asks the programs for their versions, after the start.
pub(super) async fn look_at_programs(programs: Programs, launcher: Launcher, readiness: Readiness) {
    let node = match &programs.node {
        None => Err("Node is missing: install Node 22.12 or newer and put it on PATH".to_owned()),
        Some(program) => match version(&programs, &launcher, program, "node").await {
            Some(version) => check_node(&version),
            None => Err(format!(
                "{} does not run; install Node 22.12 or newer",
                program.display()
            )),
        },
    };
    set(&readiness.node, node);
    look_at_claude(programs, launcher, readiness).await;
}

/// The same of the CLI alone.
pub(super) async fn look_at_claude(programs: Programs, launcher: Launcher, readiness: Readiness) {
    let claude = match &programs.claude {
        None => Err(
            "the Claude Code CLI is missing: npm install -g @anthropic-ai/claude-code, or \
                     set CLAUDE_BIN to its program"
                .to_owned(),
        ),
        Some(program) => match version(&programs, &launcher, program, "claude").await {
            Some(version) => Ok(version),
            None => Err(format!(
                "{} does not run; set CLAUDE_BIN to a working CLI",
                program.display()
            )),
        },
    };
    if let Ok(version) = &claude
        && !version.starts_with(config::TESTED_CLAUDE_VERSION)
    {
        tracing::warn!(
            version,
            tested = config::TESTED_CLAUDE_VERSION,
            "this version of the CLI is not the one that greenroom was tested with"
        );
    }
    set(&readiness.claude, claude);
}

/// What a program says of its version; `None` if it does not run.
async fn version(
    programs: &Programs,
    launcher: &Launcher,
    program: &Path,
    name: &'static str,
) -> Option<String> {
    let mut profile = Profile::system();
    profile.read.extend(programs.folders());
    profile.read.extend(program.parent().map(PathBuf::from));
    let spec = Spec {
        name,
        program: program.to_owned(),
        args: vec!["--version".into()],
        env: vec![
            ("PATH".into(), programs.path.clone()),
            ("HOME".into(), "/nonexistent".into()),
        ],
        cwd: "/".into(),
        stdin: Stdin::Null,
        profile,
    };
    let output = launcher
        .run(spec, Duration::from_secs(30), 4096)
        .await
        .ok()?;
    let is_fine = output.exit.is_success();
    is_fine.then(|| output.stdout.trim().to_owned())
}

fn set(cell: &OnceLock<Result<String, String>>, found: Result<String, String>) {
    if let Err(what_to_do) = &found {
        tracing::warn!("{what_to_do}");
    }
    // Set once, here.
    cell.set(found).ok();
}

fn check_node(version: &str) -> Result<String, String> {
    let mut numbers = version
        .trim_start_matches('v')
        .split('.')
        .map(|n| n.parse::<u32>().ok());
    let found = (numbers.next().flatten(), numbers.next().flatten());
    match found {
        (Some(major), Some(minor)) if (major, minor) >= MIN_NODE => Ok(version.to_owned()),
        _ => Err(format!(
            "Node {version} is too old: install Node 22.12 or newer and put it on PATH"
        )),
    }
}
