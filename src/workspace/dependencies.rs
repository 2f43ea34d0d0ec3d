//! Gives a worktree its `node_modules`.
//!
//! Per user of a client and per lockfile there is one master on the container's own disk, made
//! by the site's package manager in a staging folder, then made read-only. A worktree gets a tree
//! of hard links to it (0.1 to 0.8 s for 10,000 files, against 4 to 20 s for an install). Where
//! links can't reach the worktree (another file system) the tree stands beside the masters and
//! the worktree gets a symlink to it.
//!
//! A master is one archive on the workspace too (`archive`): another container unpacks it instead of
//! installing. Both are checked file by file before they are used (`inventory`), since a linked
//! file can be written from inside a worktree.
//!
//! What npm is asked for, and under which key the outcome is kept, is decided in `manifest`; the
//! trees are handled in `tree`. The installer is the only child that sees npm's settings.

mod archive;
mod inventory;
mod manifest;
mod missing;
mod tree;

use std::{
    ffi::OsString,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::OnceCell;

pub use self::tree::linked_folder;
use self::{manifest::Need, tree::AttachError};
use crate::{
    egress::Door,
    owner::{Owner, make_folder, take_over},
    process::{Exit, Launcher, Peers, ProcessError, Profile, Spec, Stdin},
    task::{BlockingError, NamedLocks, blocking},
    text::Tail,
};

/// For one run of the package manager.
const INSTALL_DEADLINE: Duration = Duration::from_secs(600);
/// Node starts in 40 ms, on a busy machine in seconds.
const VERSION_DEADLINE: Duration = Duration::from_secs(30);
/// For reading, linking and removing trees. A slow disk is given up, not waited for.
const DISK_DEADLINE: Duration = Duration::from_secs(180);
const SHOWN_LINES: usize = 20;
const SHOWN_BYTES: usize = 4000;
/// Of each of the installer's streams; npm says at the start of a long list why it refuses.
const KEPT_BYTES: usize = 256 * 1024;

/// Why a worktree has no dependencies.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The site has to change first.
    #[error("{0}")]
    Site(String),
    #[error("failed to export the committed files for the installer")]
    Export(#[source] io::Error),
    #[error("failed to {what}")]
    Disk {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error("failed to run {manager}")]
    Run {
        manager: &'static str,
        #[source]
        source: ProcessError,
    },
    /// The package manager, or a script of a package, ended badly. `output` is the end of what
    /// it wrote, without colours, at most 4 kB; `missing` are the system's programs that it wanted
    /// and that are not there, `is_refused` says that it asked for a host that it may not reach.
    #[error(
        "{manager} ended with {exit}{}{}\n{output}", what_to_install(missing), what_to_allow(*is_refused)
    )]
    Failed {
        manager: &'static str,
        exit: Exit,
        missing: Vec<&'static str>,
        is_refused: bool,
        output: String,
    },
}

/// The host itself stands in the output.
fn what_to_allow(is_refused: bool) -> &'static str {
    match is_refused {
        true => {
            "; it asked for a host that may not be reached from here: the operator names it in \
             EGRESS_ALLOW"
        }
        false => "",
    }
}

fn what_to_install(missing: &[&str]) -> String {
    if missing.is_empty() {
        return String::new();
    }
    format!(
        ", because the site's dependencies want {}, not installed here; the container image has a \
         variant with it, `full`",
        missing.join(", ")
    )
}

impl From<AttachError> for InstallError {
    fn from(error: AttachError) -> Self {
        Self::Disk {
            what: error.what,
            source: error.source,
        }
    }
}

/// Where Node and npm are, and what npm is told.
#[derive(Debug, Clone)]
pub struct NodeTools {
    /// The Node program.
    pub node: PathBuf,
    /// npm's program (a script that Node runs).
    pub npm: PathBuf,
    /// The operator's settings for npm and the network: `NPM_CONFIG_*`, `HTTPS_PROXY`,
    /// `NO_PROXY`, `NODE_EXTRA_CA_CERTS`, `SSL_CERT_FILE` and so on. They reach the installer
    /// alone, and with it the scripts of the packages that it installs.
    pub env: Vec<(OsString, OsString)>,
    /// Files that those settings name (npm's user configuration, certificates).
    pub readable: Vec<PathBuf>,
    /// The installer's way out of this machine; without one it reaches any host on the ports that a
    /// registry may have.
    pub egress: Option<Door>,
}

/// One worktree to provide for.
pub struct DependencyRequest<E> {
    pub worktree: PathBuf,
    /// Writes the committed files into an empty folder; runs on a blocking thread. Scripts that
    /// the site runs at install find their files there.
    pub export: E,
    /// Of this user of this client alone: masters are writable from inside a worktree.
    pub cache: PathBuf,
    /// Where the user's masters are kept for other containers: on the workspace, where no agent
    /// reaches. Without one they are not.
    pub archives: Option<PathBuf>,
}

impl<E> fmt::Debug for DependencyRequest<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DependencyRequest")
            .field("worktree", &self.worktree)
            .finish_non_exhaustive()
    }
}

/// What was done for a worktree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub took: Duration,
    pub kind: AttachedKind,
    /// The folder behind `node_modules` where that is a symlink: the dev server writes there.
    pub linked_to: Option<PathBuf>,
    /// For [`Dependencies::keep`], once nobody waits.
    pub unkept: Option<Unkept>,
}

/// A master that other containers cannot have yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unkept {
    master: PathBuf,
    key: String,
    archive: PathBuf,
}

/// How a worktree came to its dependencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachedKind {
    /// It needs none, or brings its own in git.
    None,
    /// They were there already.
    Current,
    /// Linked from a master that was there.
    Cached,
    /// Unpacked from the workspace's archive, then linked.
    Restored,
    /// Installed, then linked.
    Installed,
}

/// Installs and attaches. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dependencies {
    launcher: Launcher,
    tools: Arc<NodeTools>,
    /// Node's major version, which packages are built for; asked once.
    node_major: Arc<OnceCell<u32>>,
    /// The way out leads to npm's registries; seen to once.
    registries: Arc<OnceCell<()>>,
    /// One installation at a time for each master.
    locks: NamedLocks<PathBuf>,
}

impl Dependencies {
    /// An installer that starts its children through `launcher`.
    pub fn new(launcher: Launcher, tools: NodeTools) -> Self {
        Self {
            launcher,
            tools: Arc::new(tools),
            node_major: Arc::default(),
            registries: Arc::default(),
            locks: NamedLocks::default(),
        }
    }

    /// Makes sure that a worktree has the `node_modules` that its lockfile and package.json ask
    /// for. No agent and no dev server may run in the worktree meanwhile: what they have open
    /// would vanish. Cancelled, it leaves no half tree under the name `node_modules`.
    ///
    /// # Errors
    /// [`InstallError`]; the worktree keeps what it had.
    ///
    /// What it installs is not kept for other containers yet: that is [`Dependencies::keep`]'s,
    /// which takes seconds that the page need not wait for.
    pub async fn ensure<E>(
        &self,
        request: DependencyRequest<E>,
        mut on_progress: impl FnMut(&str) + Send,
    ) -> Result<Attached, InstallError>
    where
        E: FnOnce(&Path) -> io::Result<()> + Send + 'static,
    {
        let began = Instant::now();
        let DependencyRequest {
            worktree,
            export,
            cache,
            archives,
        } = request;
        let done = |kind, linked_to| Attached {
            took: began.elapsed(),
            kind,
            linked_to,
            unkept: None,
        };
        let (from, major) = (worktree.clone(), self.node_major().await?);
        let read = move || Need::read(&from, major);
        let Some(need) = blocking("reading package.json", DISK_DEADLINE, read).await?? else {
            return Ok(done(AttachedKind::None, None));
        };
        let (at, key) = (worktree.clone(), need.key.clone());
        let current = move || tree::current(&at, &key);
        if let Some(linked_to) = blocking("looking at node_modules", DISK_DEADLINE, current).await?
        {
            return Ok(done(AttachedKind::Current, linked_to));
        }
        let master = cache.join("masters").join(&need.key);
        let archive = archives.map(|folder| folder.join(format!("{}.zst", need.key)));
        let held = self.locks.lock(master.clone()).await;
        let mut kind = AttachedKind::Cached;
        let (at, key) = (master.clone(), need.key.clone());
        let is_whole = move || tree::is_whole(&at, &key);
        if !blocking("checking the dependencies", DISK_DEADLINE, is_whole).await? {
            on_progress("Unpacking dependencies");
            kind = AttachedKind::Restored;
            let (to, from, key) = (master.clone(), archive.clone(), need.key.clone());
            let restore = move || tree::restore(&to, from.as_deref(), &key);
            if !blocking("unpacking the dependencies", DISK_DEADLINE, restore).await?? {
                on_progress("Installing dependencies");
                kind = AttachedKind::Installed;
                self.install(&need, export, &cache, &master, &mut on_progress)
                    .await?;
            }
        }
        drop(held);
        if tree::is_committed(&master) {
            return Ok(done(AttachedKind::None, None));
        }
        on_progress("Linking dependencies");
        let (from, key) = (master.clone(), need.key.clone());
        let attach = move || tree::attach(&from, &worktree, &cache, &key);
        let linked_to = blocking("linking dependencies", DISK_DEADLINE, attach).await??;
        let unkept = archive.map(|archive| Unkept {
            master,
            key: need.key,
            archive,
        });
        Ok(Attached {
            unkept,
            ..done(kind, linked_to)
        })
    }

    /// Packs what was installed for other containers, where it is not yet. That it could not costs
    /// the next container time, and is logged.
    pub async fn keep(&self, unkept: Unkept) {
        let _held = self.locks.lock(unkept.master.clone()).await;
        let pack = move || tree::pack(&unkept.master, &unkept.key, &unkept.archive);
        let packed = blocking("keeping the dependencies for others", DISK_DEADLINE, pack);
        if let Err(error) = packed.await {
            tracing::warn!(%error, "the dependencies are not kept for other containers");
        }
    }

    async fn node_major(&self) -> Result<u32, InstallError> {
        let ask = async || {
            let node = &self.tools.node;
            let mut profile = Profile::system();
            for program in [Some(node.clone()), node.canonicalize().ok()]
                .into_iter()
                .flatten()
            {
                profile.read.extend(program.parent().map(Path::to_owned));
            }
            let spec = Spec {
                name: "node",
                program: node.clone(),
                args: vec!["--version".into()],
                env: Vec::new(),
                cwd: "/".into(),
                stdin: Stdin::Null,
                profile,
            };
            let run = self.launcher.run(spec, VERSION_DEADLINE, 4096).await;
            let output = run.map_err(|source| InstallError::Run {
                manager: "node",
                source,
            })?;
            let major = output
                .stdout
                .trim()
                .trim_start_matches('v')
                .split('.')
                .next();
            major
                .and_then(|major| major.parse().ok())
                .ok_or_else(|| InstallError::Site("node does not tell its version".to_owned()))
        };
        self.node_major.get_or_try_init(ask).await.copied()
    }

    /// Fills a master by way of a staging folder.
    async fn install<E>(
        &self,
        need: &Need,
        export: E,
        cache: &Path,
        master: &Path,
        on_progress: &mut (impl FnMut(&str) + Send),
    ) -> Result<(), InstallError>
    where
        E: FnOnce(&Path) -> io::Result<()> + Send + 'static,
    {
        let staging = Staging::new(cache);
        let (folders, files) = (staging.clone(), need.files.clone());
        let readable = self.tools.readable.clone();
        let fill = move || {
            let disk = |what| move |source| InstallError::Disk { what, source };
            // The installer works for all threads of a user.
            let owner = Owner::of_user(&folders.cache);
            if folders.downloads.is_dir() && Owner::of(&folders.downloads) != owner {
                take_over(&folders.downloads, owner).map_err(disk("hand the downloads over"))?;
            }
            for folder in [
                &folders.root,
                &folders.site,
                &folders.home,
                &folders.tmp,
                &folders.downloads,
            ] {
                make_folder(folder, owner).map_err(disk("make the installer's folders"))?;
            }
            if let Some(owner) = owner {
                folders
                    .lend(&readable, owner)
                    .map_err(disk("lend npm's settings"))?;
            }
            export(&folders.site).map_err(InstallError::Export)?;
            // The key was made of the files as they are in the worktree.
            for (name, bytes) in &files {
                let file = folders.site.join(name);
                tree::write_fresh(&file, bytes)
                    .and_then(|()| owner.map_or(Ok(()), |owner| owner.take(&file)))
                    .map_err(disk("write package.json for the installer"))?;
            }
            Ok::<_, InstallError>(folders.site.join("node_modules").symlink_metadata().is_ok())
        };
        let is_committed = blocking("exporting the site", DISK_DEADLINE, fill).await??;
        if !is_committed {
            self.run(need, &staging, on_progress).await?;
        }
        let (folders, master) = (staging.clone(), master.to_owned());
        let key = need.key.clone();
        let settle = move || tree::settle(&folders.site, &master, &key, is_committed);
        blocking("keeping the dependencies", DISK_DEADLINE, settle).await??;
        Ok(())
    }

    async fn run(
        &self,
        need: &Need,
        staging: &Staging,
        on_progress: &mut (impl FnMut(&str) + Send),
    ) -> Result<(), InstallError> {
        let manager = need.manager.name();
        if let Some(door) = &self.tools.egress {
            self.registries
                .get_or_try_init(|| self.admit_registries(door, staging))
                .await?;
            need.manager
                .home()
                .into_iter()
                .for_each(|host| door.admit(host));
        }
        let script = match need.manager.package() {
            None => self.npm(),
            Some((package, script)) => {
                let folder = staging.downloads.join("managers");
                let script = folder.join("node_modules").join(script);
                if !script.is_file() {
                    on_progress(&format!("Fetching {manager}"));
                    self.fetch_manager(manager, package, &folder, staging)
                        .await?;
                }
                script
            }
        };
        let mut attempts = need.attempts().into_iter().peekable();
        while let Some(args) = attempts.next() {
            tracing::info!(manager, "installing dependencies");
            let run = self.run_script(manager, staging, &script, args).await?;
            if run.exit.is_success() {
                return Ok(());
            }
            if attempts.peek().is_none() || !run.is_lock_refused {
                return Err(run.failed(manager));
            }
            on_progress("Installing dependencies (the lockfile doesn't fit package.json)");
        }
        Ok(())
    }

    /// Opens the way out to the registries of the operator's settings. npm is asked for them: it knows
    /// where its settings are, and what is so without any. No file of a site is among those.
    async fn admit_registries(&self, door: &Door, staging: &Staging) -> Result<(), InstallError> {
        let manager = "npm";
        let npm = self.npm();
        let mut env = self.with_lent(self.tools.env.clone(), staging);
        let mut profile = self.profile(&npm);
        profile.owner = Some(staging.root.clone());
        env.push(("HOME".into(), "/nonexistent".into()));
        let spec = Spec {
            name: "npm settings",
            program: self.tools.node.clone(),
            args: vec![
                npm.clone().into(),
                "config".into(),
                "list".into(),
                "--json".into(),
            ],
            env: [env, quiet()].concat(),
            cwd: "/".into(),
            stdin: Stdin::Null,
            profile,
        };
        let run = self.launcher.run(spec, VERSION_DEADLINE, KEPT_BYTES).await;
        let output = run.map_err(|source| InstallError::Run { manager, source })?;
        let registries = registries(&output.stdout);
        if registries.is_empty() {
            tracing::warn!(
                exit = %output.exit,
                "npm does not tell its registry: installs reach no host but those of EGRESS_ALLOW"
            );
        }
        door.admit_registries(&registries);
        Ok(())
    }

    /// Has npm bring another package manager.
    async fn fetch_manager(
        &self,
        manager: &'static str,
        package: &str,
        folder: &Path,
        staging: &Staging,
    ) -> Result<(), InstallError> {
        let mut args: Vec<OsString> = vec!["install".into(), "--prefix".into(), folder.into()];
        args.extend(
            [
                "--no-save",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                package,
            ]
            .map(OsString::from),
        );
        let run = self.run_script(manager, staging, &self.npm(), args).await?;
        if run.exit.is_success() {
            Ok(())
        } else {
            Err(run.failed(manager))
        }
    }

    fn npm(&self) -> PathBuf {
        self.tools
            .npm
            .canonicalize()
            .unwrap_or_else(|_| self.tools.npm.clone())
    }

    /// Runs a package manager's script in the staging folder, confined. Started by Node, so that
    /// no `env node` on PATH decides which one.
    async fn run_script(
        &self,
        manager: &'static str,
        staging: &Staging,
        script: &Path,
        args: Vec<OsString>,
    ) -> Result<Run, InstallError> {
        let tools = &self.tools;
        let mut all: Vec<OsString> = vec![script.into()];
        all.extend(args);
        let mut profile = self.profile(script);
        profile
            .write
            .extend([staging.root.clone(), staging.downloads.clone()]);
        profile.connect = match &tools.egress {
            Some(door) => Peers::here(vec![door.port()]),
            // Registries speak 443 or 80, or the port that the operator's settings name. Not every
            // port: a package's script must not reach our own API on loopback.
            None => peers(&tools.env),
        };
        profile.owner = Some(staging.root.clone());
        let spec = Spec {
            name: "installer",
            program: tools.node.clone(),
            args: all,
            env: self.environment(staging),
            cwd: staging.site.clone(),
            stdin: Stdin::Null,
            profile,
        };
        let refusals = || tools.egress.as_ref().map_or(0, Door::refusals);
        let before = refusals();
        let run = self
            .launcher
            .run(spec, INSTALL_DEADLINE, KEPT_BYTES)
            .await
            .map_err(|source| InstallError::Run { manager, source })?;
        let mut tail = Tail::new(SHOWN_LINES);
        for line in run.stdout.lines().chain(run.stderr.lines()) {
            if !line.starts_with("npm warn Unknown") {
                tail.push(&staging.without_paths(line));
            }
        }
        Ok(Run {
            exit: run.exit,
            tail,
            is_lock_refused: run.stderr.contains("EUSAGE"),
            is_refused: refusals() > before,
            missing: missing::missing_programs(
                &format!("{}\n{}", run.stdout, run.stderr),
                |program| self.folders().any(|folder| folder.join(program).is_file()),
            ),
        })
    }

    /// What a script of Node's may read to run.
    fn profile(&self, script: &Path) -> Profile {
        let tools = &self.tools;
        let node = tools
            .node
            .canonicalize()
            .unwrap_or_else(|_| tools.node.clone());
        let mut profile = Profile::system();
        for program in [&tools.node, &node] {
            profile.read.extend(program.parent().map(Path::to_owned));
        }
        // `npm/bin/npm-cli.js` needs all of `npm/`.
        let package = script.parent().and_then(Path::parent);
        profile.read.extend(package.map(Path::to_owned));
        profile.read.extend(tools.readable.iter().cloned());
        profile
    }

    /// The installer's PATH.
    fn folders(&self) -> impl Iterator<Item = &Path> {
        self.tools
            .node
            .parent()
            .into_iter()
            .chain(["/usr/local/bin", "/usr/bin", "/bin"].map(Path::new))
    }

    /// With the copies in the place of the operator's files, where the installer is another user.
    fn with_lent(
        &self,
        mut env: Vec<(OsString, OsString)>,
        staging: &Staging,
    ) -> Vec<(OsString, OsString)> {
        if self.launcher.runs_as_owners() {
            for (_, value) in &mut env {
                let files = self.tools.readable.iter();
                let lent = files.zip(staging.lent()).find(|(file, _)| *file == &*value);
                if let Some((_, copy)) = lent {
                    *value = copy.into();
                }
            }
        }
        env
    }

    fn environment(&self, staging: &Staging) -> Vec<(OsString, OsString)> {
        let mut path = OsString::new();
        for folder in self.folders() {
            if !path.is_empty() {
                path.push(":");
            }
            path.push(folder);
        }
        let mut env = self.with_lent(network_settings(&self.tools), staging);
        env.extend([
            ("PATH".into(), path),
            ("HOME".into(), staging.home.clone().into()),
            ("TMPDIR".into(), staging.tmp.clone().into()),
            ("npm_config_cache".into(), staging.downloads.clone().into()),
            // pnpm and yarn keep their downloads there too.
            (
                "XDG_DATA_HOME".into(),
                staging.downloads.join("data").into(),
            ),
            (
                "YARN_CACHE_FOLDER".into(),
                staging.downloads.join("yarn").into(),
            ),
        ]);
        env.extend(quiet());
        env.extend(
            [
                ("LANG", "C.UTF-8"),
                ("CI", "1"),
                ("NO_COLOR", "1"),
                ("HUSKY", "0"),
                ("ASTRO_TELEMETRY_DISABLED", "1"),
            ]
            .map(|(name, value)| (name.into(), value.into())),
        );
        env
    }
}

/// One run of a package manager.
struct Run {
    exit: Exit,
    tail: Tail,
    /// `npm ci` refuses a lockfile that doesn't fit package.json, or that lacks the packages of
    /// other platforms; `npm install` takes it.
    is_lock_refused: bool,
    /// A host was (here, or in an installation beside it).
    is_refused: bool,
    missing: Vec<&'static str>,
}

/// The folders of one installation; removed when the last copy is dropped.
#[derive(Debug, Clone)]
struct Staging {
    /// The user's cache.
    cache: PathBuf,
    root: PathBuf,
    site: PathBuf,
    home: PathBuf,
    tmp: PathBuf,
    /// Kept from installation to installation.
    downloads: PathBuf,
    _removed: Arc<RemoveOnDrop>,
}

impl Run {
    fn failed(&self, manager: &'static str) -> InstallError {
        InstallError::Failed {
            manager,
            exit: self.exit,
            missing: self.missing.clone(),
            is_refused: self.is_refused,
            output: self.tail.text(SHOWN_BYTES),
        }
    }
}

#[derive(Debug)]
struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let root = std::mem::take(&mut self.0);
        // Ten thousand files: not on the caller's thread.
        std::thread::spawn(move || tree::remove(&root));
    }
}

impl Staging {
    /// Where copies of the operator's files lie, in their order.
    fn lent(&self) -> impl Iterator<Item = PathBuf> {
        let root = self.root.clone();
        (0..).map(move |number| root.join(format!("lent-{number}")))
    }

    /// Copies of files that an installer who is another user may not get at where they are.
    fn lend(&self, files: &[PathBuf], owner: Owner) -> io::Result<()> {
        for (file, copy) in files.iter().zip(self.lent()) {
            std::fs::copy(file, &copy)?;
            owner.take(&copy)?;
        }
        Ok(())
    }

    /// A line as the site's owner knows the place: where we keep things is nobody's business.
    fn without_paths(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for (path, name) in [
            (&self.site, "."),
            (&self.root, "(staging)"),
            (&self.downloads, "(downloads)"),
        ] {
            line = line.replace(&*path.to_string_lossy(), name);
        }
        line
    }

    fn new(cache: &Path) -> Self {
        let root = cache
            .join("staging")
            .join(uuid::Uuid::new_v4().simple().to_string());
        Self {
            cache: cache.to_owned(),
            site: root.join("site"),
            home: root.join("home"),
            tmp: root.join("tmp"),
            downloads: cache.join("downloads"),
            _removed: Arc::new(RemoveOnDrop(root.clone())),
            root,
        }
    }
}

/// npm without its log, which would be removed with the staging folder and whose path is of no use to
/// anybody, and without its advice.
fn quiet() -> Vec<(OsString, OsString)> {
    [
        ("npm_config_update_notifier", "false"),
        ("npm_config_logs_max", "0"),
    ]
    .map(|(name, value)| (name.into(), value.into()))
    .to_vec()
}

/// The operator's settings, with greenroom's proxy in the place of theirs where there is one: it knows
/// theirs, and the installer cannot reach it.
fn network_settings(tools: &NodeTools) -> Vec<(OsString, OsString)> {
    let Some(door) = &tools.egress else {
        return tools.env.clone();
    };
    let names_proxy = |name: &OsString| {
        let name = name.to_string_lossy().to_ascii_lowercase();
        let name = name.strip_prefix("npm_config_").unwrap_or(&name);
        let name = name.replace('-', "_");
        ["http_proxy", "https_proxy", "proxy", "no_proxy", "noproxy"].contains(&name.as_str())
    };
    let others = tools.env.iter().filter(|(name, _)| !names_proxy(name));
    let mut env: Vec<_> = others.cloned().collect();
    let ours = door.environment();
    // Stronger than a line of its configuration file. An empty one would count as none.
    let no_proxy = ("npm_config_noproxy".into(), "nobody.invalid".into());
    let url = ours.iter().find(|(name, _)| name == "HTTPS_PROXY");
    let as_npm_s = url.into_iter().flat_map(|(_, url)| {
        ["npm_config_proxy", "npm_config_https_proxy"].map(|name| (name.into(), url.clone()))
    });
    env.extend(as_npm_s);
    env.push(no_proxy);
    env.extend(ours);
    env
}

/// The registries in what `npm config list --json` says: npm's own, and those of scopes.
fn registries(settings: &str) -> Vec<url::Url> {
    let settings: serde_json::Value = serde_json::from_str(settings).unwrap_or_default();
    let all = settings.as_object().into_iter().flatten();
    all.filter(|(name, _)| *name == "registry" || name.ends_with(":registry"))
        .filter_map(|(_, value)| value.as_str()?.parse().ok())
        .collect()
}

/// The ports 443 and 80, and where the URLs among npm's settings lead.
fn peers(settings: &[(OsString, OsString)]) -> Peers {
    let (mut here, mut elsewhere) = (Vec::new(), vec![80, 443]);
    for (_, value) in settings {
        let Some(url) = value.to_str().and_then(|text| url::Url::parse(text).ok()) else {
            continue;
        };
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            continue;
        };
        let is_here = match host {
            url::Host::Domain(name) => name == "localhost",
            url::Host::Ipv4(ip) => ip.is_loopback(),
            url::Host::Ipv6(ip) => ip.is_loopback(),
        };
        let ports = match is_here {
            true => &mut here,
            false => &mut elsewhere,
        };
        if !ports.contains(&port) {
            ports.push(port);
        }
    }
    Peers::Only { here, elsewhere }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_those_that_npm_tells() {
        let told = r#"{"json": true, "registry": "https://npm.example:8443/all/", "proxy": null,
            "@acme:registry": "http://10.0.0.7:4873", "other": "https://evil.example/"}"#;
        let told = registries(told).into_iter().map(|url| url.to_string());
        let mut told: Vec<_> = told.collect();
        told.sort();
        assert_eq!(
            told,
            ["http://10.0.0.7:4873/", "https://npm.example:8443/all/"]
        );
        assert!(registries("npm error").is_empty());
    }

    #[tokio::test]
    async fn the_installer_knows_our_proxy_alone() {
        let tasks = crate::task::Tasks::new();
        let egress = crate::egress::Egress::start(&[], &tasks).await.unwrap();
        let operators = [
            ("HTTPS_PROXY", "http://user:secret@proxy.example:3128"),
            ("no_proxy", "registry.example"),
            ("NPM_CONFIG_HTTPS_PROXY", "http://proxy.example:3128"),
            ("npm_config_noproxy", "registry.example"),
            ("NPM_CONFIG_REGISTRY", "https://registry.example/"),
        ]
        .map(|(name, value)| (name.into(), value.into()));
        let tools = NodeTools {
            node: "node".into(),
            npm: "npm".into(),
            env: operators.to_vec(),
            readable: Vec::new(),
            egress: Some(egress.installer.clone()),
        };
        let env = network_settings(&tools);
        let text = format!("{env:?}");
        assert!(!text.contains("proxy.example") && !text.contains("secret"));
        assert!(text.contains("https://registry.example/"), "{text}");
        let url = format!("http://127.0.0.1:{}", egress.installer.port());
        for name in ["HTTPS_PROXY", "npm_config_https_proxy", "npm_config_proxy"] {
            let value = env.iter().find(|(known, _)| known == name);
            assert_eq!(value.map(|(_, value)| value), Some(&OsString::from(&url)));
        }
        let without = NodeTools {
            egress: None,
            ..tools
        };
        assert_eq!(network_settings(&without), operators);
    }

    #[test]
    fn only_the_ports_that_a_registry_may_have_are_open() {
        let env = [
            ("NPM_CONFIG_REGISTRY", "http://registry.example:4873/"),
            ("HTTPS_PROXY", "http://proxy.example:3128"),
            ("HTTP_PROXY", "http://127.0.0.1:8888"),
            ("NO_PROXY", "localhost,10.0.0.0/8"),
            ("NODE_EXTRA_CA_CERTS", "/etc/ca.pem"),
        ]
        .map(|(name, value)| (name.into(), value.into()));
        let open = |here: &[u16], elsewhere: &[u16]| Peers::Only {
            here: here.to_vec(),
            elsewhere: elsewhere.to_vec(),
        };
        assert_eq!(peers(&env), open(&[8888], &[80, 443, 4873, 3128]));
        assert_eq!(peers(&[]), open(&[], &[80, 443]));
    }
}
