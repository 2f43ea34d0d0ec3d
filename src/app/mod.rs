//! The composition root: makes every room, connects them, and ends them in order. It knows all of
//! them; none knows it.

mod programs;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;

use self::programs::{Programs, look_at_programs};
use crate::{
    agent::{AgentSettings, Ceiling, Limits},
    api::{self, Access, AccessSettings, ApiState, Facts, Pins, Readiness},
    config::{self, CredentialSource, Loaded, Mode, Settings},
    domain::Signature,
    gateway::{self, Credential, Gateway, GatewayConfig, OAuthSettings, load_credentials_file},
    lifecycle::{Activity, Guard, HolderKind, StopReason, wait_for_reason},
    preview::{self, ActivityGuard, ActivitySink, PreviewSettings, Previews, Proxy, ProxyKind},
    process::{self, Bash, ConfinementMode, Launcher},
    rehearsal::{Rehearsal, Script},
    repository::{self, GitHub, Remotes},
    supervisor::{Supervisor, SupervisorSettings},
    task::{self, Tasks},
    telemetry,
    usage::{Books, Budgets, Ledger, LedgerSettings, Level, Limit, Prices, Tenants, Term},
    workspace::{Dependencies, make_private_dir},
};

/// What the last steps of a shutdown (stopping children, closing tasks) may take.
const LAST_STEPS: Duration = Duration::from_secs(3);

/// Runs the service until it is idle, told to stop, or broken.
///
/// # Errors
/// What keeps it from starting, or from ending well, as one line that says what to do.
pub async fn serve(loaded: Loaded, mode: Mode) -> anyhow::Result<()> {
    let started = Instant::now();
    process::harden_self().context("failed to protect the process")?;
    repository::init();
    let settings = &loaded.settings;
    prepare_folder(&settings.workspace_path, "WORKSPACE_PATH").await?;
    prepare_folder(&settings.cache_path, "CACHE_PATH").await?;
    let runtime = runtime_folder(&loaded)?;

    let mut listeners = Listeners::bind(settings).await?;
    let tasks = Tasks::new();
    let credential = loaded.credential()?;
    let is_rehearsal = credential == CredentialSource::Rehearsal;
    let ledger = Ledger::new(ledger_settings(settings).await?, &tasks);
    let gateway = start_gateway(settings, credential, ledger.clone(), &tasks).await?;
    let launcher = Launcher::start(settings.lease / 2, ConfinementMode::Auto)
        .context("failed to start the launcher")?;
    let programs = Programs::find(&loaded);
    let activity = Activity::new(settings.auto_shutdown);
    let network_port =
        open_to_network(&gateway, listeners.gateway.take(), &activity, &tasks).await?;

    let previews = Previews::new(
        launcher.clone(),
        PreviewSettings {
            node: programs.node.clone().unwrap_or_else(|| "node".into()),
            private_root: runtime.join("previews"),
            most_awake: settings.max_previews,
            shows_banner: settings.preview_errors == config::PreviewErrors::Banner,
            access: preview_access(settings),
        },
        tasks.clone(),
    );
    let readiness = Readiness::default();
    let supervisor = Supervisor::new(
        SupervisorSettings {
            node: readiness.node.clone(),
            ..supervisor_settings(
                &loaded, &programs, &runtime, &launcher, &gateway, &listeners,
            )
        },
        launcher.clone(),
        gateway,
        previews.clone(),
        programs
            .node_tools()
            .map(|tools| Dependencies::new(launcher.clone(), tools)),
        activity.clone(),
        tasks.clone(),
    );
    let state = Arc::new(ApiState {
        supervisor: supervisor.clone(),
        ledger,
        books: Books::new(
            settings.workspace_path.clone(),
            tenants(settings),
            budgets(settings),
        ),
        activity: activity.clone(),
        access: Access::new(access_settings(settings, listeners.api_port())),
        pins: Pins {
            client: settings.client_id.clone(),
            user: settings.user_id.clone(),
            thread: settings.thread_id.clone(),
        },
        facts: Facts {
            workspace: settings.workspace_path.clone(),
            is_rehearsal,
            confinement: launcher.confinement(),
        },
        readiness: readiness.clone(),
        started,
    });
    announce(&loaded, mode, &listeners, is_rehearsal, &launcher);
    if let Some(port) = network_port {
        tracing::info!(
            bind = %settings.bind, gateway_port = port,
            "the gateway serves other containers, for clients with a token"
        );
    }
    listeners
        .serve(state, previews, &activity, &tasks)
        .context("failed to serve")?;
    tasks.spawn(
        "readiness",
        look_at_programs(programs, launcher.clone(), readiness),
    );
    if std::process::id() == 1 {
        tasks.spawn("reaper", reap(launcher.clone(), tasks.clone()));
    }

    let reason = tokio::select! {
        reason = wait_for_reason(&activity) => reason.context("failed to wait for signals")?,
        () = tasks.token().cancelled() => StopReason::Broken,
    };
    stop(reason, settings, &supervisor, &launcher, &tasks, &activity).await;
    std::fs::remove_dir_all(&runtime).ok();
    match reason {
        StopReason::Broken => bail!("a part of greenroom broke; the log says which"),
        StopReason::IdleTimeout | StopReason::Signal => Ok(()),
    }
}

/// Ends everything in order: admit nothing, let turns end, stop children, close tasks.
async fn stop(
    reason: StopReason,
    settings: &Settings,
    supervisor: &Supervisor,
    launcher: &Launcher,
    tasks: &Tasks,
    activity: &Activity,
) {
    tracing::info!(reason = reason.as_str(), "stopping");
    let drain = async {
        supervisor
            .drain(tokio::time::Instant::now() + settings.drain)
            .await;
        if !launcher.stop(LAST_STEPS).await {
            tracing::error!("children were left that did not end");
        }
        // Answers that are on their way get out.
        let answered = async {
            while activity.count(HolderKind::Request) > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(1), answered)
            .await
            .ok();
        if !tasks.stop(LAST_STEPS).await {
            tracing::warn!("tasks were left that did not end");
        }
    };
    tokio::select! {
        () = drain => {}
        // Whoever asks twice means now. Children end by themselves when we are gone.
        _ = wait_for_reason_again(reason) => tracing::warn!("stopping at once"),
    }
    tracing::info!(reason = reason.as_str(), "stopped");
}

/// A second signal, while the first one is being obeyed.
async fn wait_for_reason_again(first: StopReason) -> std::io::Result<StopReason> {
    let never = Activity::new(None);
    if first == StopReason::Broken {
        return std::future::pending().await;
    }
    wait_for_reason(&never).await
}

async fn prepare_folder(path: &Path, setting: &'static str) -> anyhow::Result<()> {
    let folder = path.to_owned();
    let made = task::blocking("looking at a folder", Duration::from_secs(20), move || {
        make_private_dir(&folder)?;
        let probe = folder.join(format!(
            ".greenroom-probe-{}",
            uuid::Uuid::new_v4().simple()
        ));
        std::fs::write(&probe, b"")
            .and_then(|()| std::fs::remove_file(&probe))
            .map_err(crate::workspace::WorkspaceError::io("write to", &folder))
    })
    .await;
    match made {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            bail!(
                "{setting}: {} cannot be written ({}); make it writable or set {setting} to \
                 another folder",
                path.display(),
                cause.unwrap_or_default()
            )
        }
        Err(_) => bail!("{setting}: the disk of {} does not answer", path.display()),
    }
}

/// A folder of this process alone, below the user's.
fn runtime_folder(loaded: &Loaded) -> anyhow::Result<PathBuf> {
    let shared = config::runtime_folder(&loaded.surroundings)
        .context("failed to make the runtime folder; set TMPDIR to a folder that is writable")?;
    let own = shared.join(std::process::id().to_string());
    // Of an earlier process with this id.
    std::fs::remove_dir_all(&own).ok();
    make_private_dir(&own)?;
    Ok(own)
}

async fn ledger_settings(settings: &Settings) -> anyhow::Result<LedgerSettings> {
    let prices = match settings.prices_file.clone() {
        None => Prices::default(),
        Some(file) => {
            let load = move || Prices::load(&file);
            task::blocking("reading the price list", Duration::from_secs(20), load)
                .await?
                .context("PRICES_FILE")?
        }
    };
    Ok(LedgerSettings {
        workspace: Some(settings.workspace_path.clone()),
        prices,
        budgets: budgets(settings),
    })
}

/// Whose ledgers this container looks into.
pub fn tenants(settings: &Settings) -> Tenants {
    Tenants {
        client: settings.client_id.clone(),
        user: settings.user_id.clone(),
    }
}

/// The limits that are set.
pub fn budgets(settings: &Settings) -> Budgets {
    let limits = [
        (Level::Turn, Term::Whole, settings.budget_turn),
        (Level::Thread, Term::Day, settings.budget_thread_day),
        (Level::Thread, Term::Month, settings.budget_thread_month),
        (Level::User, Term::Day, settings.budget_user_day),
        (Level::User, Term::Month, settings.budget_user_month),
        (Level::Client, Term::Day, settings.budget_client_day),
        (Level::Client, Term::Month, settings.budget_client_month),
    ];
    let limits = limits.into_iter();
    Budgets {
        limits: limits
            .filter_map(|(level, term, usd)| {
                Some(Limit {
                    level,
                    term,
                    usd: usd?,
                })
            })
            .collect(),
        zone: settings.usage_time_zone.clone(),
    }
}

async fn start_gateway(
    settings: &Settings,
    source: CredentialSource,
    ledger: Ledger,
    tasks: &Tasks,
) -> anyhow::Result<Gateway> {
    let mut oauth = OAuthSettings {
        endpoint: settings
            .claude_oauth_token_url
            .parse()
            .context("CLAUDE_OAUTH_TOKEN_URL is no address")?,
        file: None,
        // Agents are let into their own folders alone.
        store: Some(settings.workspace_path.join(".greenroom")),
        hide: telemetry::hide,
    };
    let (upstream, credential) = match source {
        CredentialSource::ApiKey(key) => {
            (settings.anthropic_base_url.clone(), Credential::ApiKey(key))
        }
        CredentialSource::File(path) => {
            let credential = load_credentials_file(&path)?;
            for secret in credential.secrets() {
                telemetry::hide(secret);
            }
            oauth.file = Some(path);
            (settings.anthropic_base_url.clone(), credential)
        }
        CredentialSource::Rehearsal => {
            let rehearsal = Rehearsal::start(Script::default(), tasks).await?;
            (rehearsal.url(), Credential::Rehearsal)
        }
    };
    let upstream = upstream
        .parse()
        .context("ANTHROPIC_BASE_URL is no address")?;
    Gateway::start(
        GatewayConfig {
            upstream,
            credential,
            oauth,
            ledger,
        },
        tasks,
    )
    .await
    .context("failed to start the gateway")
}

/// Serves other containers' CLIs, if that is wanted; answers the port.
async fn open_to_network(
    gateway: &Gateway,
    wanted: Option<(TcpListener, PathBuf)>,
    activity: &Activity,
    tasks: &Tasks,
) -> anyhow::Result<Option<u16>> {
    let Some((listener, tokens)) = wanted else {
        return Ok(None);
    };
    let port = port(&listener);
    let activity = activity.clone();
    let awake = move || -> gateway::ActivityGuard {
        Box::new(activity.hold(HolderKind::Request, "another container's model request"))
    };
    let opened = gateway.open_to_network(listener, tokens, awake, tasks);
    opened.await.context("GATEWAY_TOKENS_FILE")?;
    Ok(Some(port))
}

fn supervisor_settings(
    loaded: &Loaded,
    programs: &Programs,
    runtime: &Path,
    launcher: &Launcher,
    gateway: &Gateway,
    listeners: &Listeners,
) -> SupervisorSettings {
    let settings = &loaded.settings;
    let agent = programs.claude.clone().map(|program| {
        Arc::new(AgentSettings {
            program,
            gateway_url: gateway.base_url(),
            gateway_port: gateway.port(),
            model: settings.claude_model.clone(),
            max_output_tokens: settings.claude_max_output_tokens.map(u64::from),
            tools: settings.claude_tools.clone(),
            path: programs.path.clone(),
            tool_folders: programs.folders(),
            is_confined: launcher.confinement().bash == Bash::All,
            limits: Limits::default(),
            ceiling: Ceiling {
                memory: (settings.warm_agent_memory_mb as u64) << 20,
                age: settings.warm_agent_age,
            },
        })
    });
    let preview_base_url = settings.preview_url("{slug}", listeners.preview_port());
    let remotes = Remotes::new(
        settings
            .github_token
            .as_ref()
            .map(|token| token.expose().to_owned()),
        settings.git_token_hosts.clone(),
    );
    SupervisorSettings {
        workspace: settings.workspace_path.clone(),
        cache: settings.cache_path.clone(),
        runtime: runtime.to_owned(),
        repo_url: settings.repo_url.clone(),
        allowed_local_repos: settings.allowed_local_repos.clone(),
        github: GitHub::new(
            settings
                .github_api_url
                .parse()
                .expect("the settings hold well-formed addresses"),
            remotes.clone(),
        ),
        remotes,
        committer: Signature {
            name: settings.git_user_name.clone(),
            email: settings.git_user_email.clone(),
        },
        runs_previews: settings.astro_dev_mode,
        preview_ready: settings.preview_ready,
        preview_hosts: preview_hosts(&preview_base_url),
        preview_base_url,
        max_concurrent_turns: settings.max_concurrent_turns,
        max_queued_turns: settings.max_queued_turns,
        max_warm_agents: settings.max_warm_agents,
        lease: settings.lease,
        turn_timeout: settings.turn_timeout,
        node: Arc::default(),
        agent,
    }
}

/// Previews are as open as the API is.
fn preview_access(settings: &Settings) -> preview::Access {
    if !settings.has_api_secret() {
        return preview::Access::open();
    }
    let secret = settings
        .preview_token_secret
        .as_ref()
        .or(settings.claude_service_secret.as_ref());
    let is_https = settings.preview_base_url.starts_with("https:");
    preview::Access::signed(secret.map(config::Secret::expose), is_https)
}

/// The host names under which browsers open previews, as Vite takes them: a leading dot means
/// every name below.
fn preview_hosts(base_url: &str) -> Vec<String> {
    let host = base_url.split("://").nth(1).unwrap_or_default();
    let host = host.split(['/', ':']).next().unwrap_or_default();
    match host.split_once("{slug}") {
        Some((_, "" | ".localhost")) => Vec::new(),
        Some((_, parent)) => vec![parent.to_owned()],
        None => vec![host.to_owned()],
    }
}

fn access_settings(settings: &Settings, api_port: u16) -> AccessSettings {
    let mut allowed_hosts: Vec<String> = ["localhost", "127.0.0.1", "[::1]"]
        .map(str::to_owned)
        .to_vec();
    allowed_hosts.extend(settings.api_allowed_hosts.iter().cloned());
    let public_origin = url::Url::parse(&settings.api_url(api_port))
        .ok()
        .map(|url| url.origin().ascii_serialization());
    AccessSettings {
        api_token: settings.api_token.clone(),
        service_secret: settings.claude_service_secret.clone(),
        allowed_hosts,
        public_origin,
    }
}

/// The ports that the program serves.
struct Listeners {
    api: TcpListener,
    preview: TcpListener,
    hmr: TcpListener,
    /// The gateway's on the network, and who may come in.
    gateway: Option<(TcpListener, PathBuf)>,
}

impl Listeners {
    async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        let listen = async |port: u16, name: &str| {
            let address = SocketAddr::new(settings.bind, port);
            TcpListener::bind(address).await.with_context(|| {
                format!("{name}: port {port} of {} cannot be listened on; free it or choose another one by {name}", settings.bind)
            })
        };
        Ok(Self {
            api: listen(settings.api_port, "API_PORT").await?,
            preview: listen(settings.preview_port, "PREVIEW_PORT").await?,
            hmr: listen(settings.hmr_port, "HMR_PORT").await?,
            gateway: match (settings.gateway_port, settings.gateway_tokens_file.clone()) {
                (Some(port), Some(tokens)) => Some((listen(port, "GATEWAY_PORT").await?, tokens)),
                _ => None,
            },
        })
    }

    fn api_port(&self) -> u16 {
        port(&self.api)
    }

    fn preview_port(&self) -> u16 {
        port(&self.preview)
    }

    fn serve(
        self,
        state: api::Shared,
        previews: Previews,
        activity: &Activity,
        tasks: &Tasks,
    ) -> std::io::Result<()> {
        let sink: Arc<dyn ActivitySink> = Arc::new(PreviewActivity(activity.clone()));
        let (preview, hmr) = (self.preview.into_std()?, self.hmr.into_std()?);
        let proxies = tasks.clone();
        // What a browser waits for does not wait for a turn's events.
        tasks.spawn_apart("previews", move || {
            let (preview, hmr) = (TcpListener::from_std(preview)?, TcpListener::from_std(hmr)?);
            Proxy::serve(
                preview,
                ProxyKind::Preview,
                previews.clone(),
                sink.clone(),
                &proxies,
            );
            Proxy::serve(hmr, ProxyKind::HmrOnly, previews, sink, &proxies);
            Ok(())
        })?;
        tasks.spawn(
            "api",
            api::serve(self.api, api::router(state), tasks.clone()),
        );
        Ok(())
    }
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().map_or(0, |address| address.port())
}

struct PreviewActivity(Activity);

impl ActivitySink for PreviewActivity {
    fn request(&self) -> ActivityGuard {
        let guard: Guard = self.0.hold(HolderKind::Preview, "a request for a page");
        Box::new(guard)
    }

    fn person(&self, slug: &str) {
        self.0.person(slug);
    }
}

/// The first lines of the log: where it listens, for whom, and what is behind it.
fn announce(
    loaded: &Loaded,
    mode: Mode,
    listeners: &Listeners,
    is_rehearsal: bool,
    launcher: &Launcher,
) {
    let settings = &loaded.settings;
    let for_whom = match (settings.has_api_secret(), settings.bind.is_loopback()) {
        (true, _) => "callers with the token or a signature",
        (false, true) => "this machine alone",
        (false, false) => "ANYBODY who can reach it (insecure)",
    };
    tracing::info!(
        bind = %settings.bind,
        api_port = listeners.api_port(),
        preview_port = listeners.preview_port(),
        hmr_port = port(&listeners.hmr),
        workspace = %settings.workspace_path.display(),
        "greenroom {} listens, for {for_whom}",
        env!("CARGO_PKG_VERSION"),
    );
    if is_rehearsal {
        tracing::warn!("rehearsal: no model is behind this, a script answers");
    }
    let confinement = launcher.confinement();
    tracing::info!(
        files = ?confinement.files, network = ?confinement.network,
        processes = ?confinement.processes, bash = ?confinement.bash,
        "how agents and dev servers are held"
    );
    if mode == Mode::Dev {
        let page = settings.api_url(listeners.api_port());
        println!("\n  greenroom is ready: open  {page}\n");
        if is_rehearsal {
            println!(
                "  Rehearsal: no model is behind it, a script answers. With ANTHROPIC_API_KEY set, Claude does.\n"
            );
        }
    }
}

/// As PID 1 every orphan falls to us.
async fn reap(launcher: Launcher, tasks: Tasks) {
    let Ok(mut died) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()) else {
        return;
    };
    loop {
        tokio::select! {
            () = tasks.token().cancelled() => return,
            _ = died.recv() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        let launcher = launcher.clone();
        let reaped = task::blocking("reaping orphans", Duration::from_secs(10), move || {
            launcher.reap_orphans()
        });
        reaped.await.ok();
    }
}
