//! The composition root: makes every room, connects them, and ends them in order. It knows all of
//! them; none knows it.

mod alt_text;
mod hub;
mod label;
mod outside;
mod programs;
mod replicate;
mod runtime;
mod stops;
mod terminal;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;

pub use self::alt_text::{AltTextJob, alt_text};
pub use self::hub::{models, publish};
pub use self::label::{AskedPrompt, LabelJob, Labelled, label};
use self::outside::Outside;
use self::programs::{Programs, look_at_claude, look_at_programs};
pub use self::replicate::{ModelJob, ModelNews, ModelRan, Run, run_model};
use self::runtime::RuntimeFolder;
use self::stops::{Step, StopNote};
pub use self::terminal::terminal;
use crate::{
    agent::{AgentSettings, Ceiling, Limits},
    alt_text::{AltTextSettings, AltTexts},
    api::{
        self, Access, AccessSettings, ApiState, Base, BaseState, Calls, Facts, Pins, RateLimit,
        Readiness,
    },
    config::{self, CredentialSource, Loaded, Mode, Settings},
    control_plane::Notice,
    domain::{Account, Signature},
    egress::Egress,
    figures::Figures,
    gateway::{self, Credential, Gateway, GatewayConfig, OAuthSettings, load_credentials_file},
    images::{ImageSettings, Images},
    label::{
        BatchSettings, Batches, Busy, Cache, LabelSettings, Labels, MAX_ANSWER_TOKENS, Prompts,
    },
    lifecycle::{Activity, Guard, HolderKind, Shares, Signals, StopReason, wait_for_reason},
    owner,
    preview::{self, ActivityGuard, ActivitySink, PreviewSettings, Previews, Proxy, ProxyKind},
    process::{self, Bash, ConfinementMode, Launcher},
    rehearsal::{Rehearsal, Script},
    repository::{self, GitHub, Remotes},
    service::{Service, ServiceSettings},
    supervisor::{Supervisor, SupervisorSettings},
    task::{self, Tasks},
    telemetry,
    usage::{Books, Budgets, Ledger, LedgerSettings, Level, Limit, Prices, Tenants, Term},
    workspace::{Dependencies, make_private_dir},
};

/// For what fell to PID 1 to end once it was told to.
const ORPHANS_END: Duration = Duration::from_secs(2);
/// What the control plane may take to hear of the end.
const LAST_NEWS: Duration = Duration::from_secs(2);

/// Runs the service until it is idle, told to stop, or broken.
///
/// # Errors
/// What keeps it from starting, or from ending well, as one line that says what to do.
pub async fn serve(loaded: Loaded, mode: Mode) -> anyhow::Result<()> {
    let started = Instant::now();
    let signals = Signals::listen().context("failed to listen for signals")?;
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
    let store = settings.workspace_path.join(".greenroom");
    let gateway = start_gateway(settings, credential, ledger.clone(), Some(store), &tasks).await?;
    let programs = Programs::find(&loaded);
    let (launcher, closed) = start_launcher(settings, &programs, &runtime)?;
    let egress = start_egress(settings, &tasks).await?;
    let activity = Activity::new(settings.auto_shutdown);
    let outside = Outside::start(settings, &activity, &tasks)?;
    let network_port =
        open_to_network(&gateway, listeners.gateway.take(), &activity, &tasks).await?;

    let previews = Previews::new(
        launcher.clone(),
        PreviewSettings {
            node: programs.node.clone().unwrap_or_else(|| "node".into()),
            private_root: runtime.path().join("previews"),
            most_awake: settings.max_previews,
            shows_banner: settings.preview_errors == config::PreviewErrors::Banner,
            access: preview_access(settings),
            egress: egress.as_ref().map(|egress| egress.sites.clone()),
        },
        tasks.clone(),
    );
    let readiness = Readiness::default();
    let agent = agent_settings(settings, &programs, &launcher, &gateway, egress.as_ref());
    let service = one_shots(
        settings,
        agent.clone(),
        runtime.path(),
        &launcher,
        &gateway,
        &tasks,
    );
    let labels = labels(
        settings,
        agent.as_deref(),
        runtime.path(),
        &launcher,
        &gateway,
        &tasks,
    );
    let labels = labels.await?;
    let batches = batches(settings, &labels, &activity, &tasks);
    let supervisor = Supervisor::new(
        SupervisorSettings {
            node: readiness.node.clone(),
            ..supervisor_settings(&loaded, agent, runtime.path(), &listeners)
        },
        launcher.clone(),
        gateway,
        previews.clone(),
        programs
            .node_tools(egress.map(|egress| egress.installer))
            .map(|tools| Dependencies::new(launcher.clone(), tools)),
        activity.clone(),
        tasks.clone(),
    );
    let pins = Pins {
        client: settings.client_id.clone(),
        user: settings.user_id.clone(),
        thread: settings.thread_id.clone(),
    };
    let base = Base::from(BaseState {
        access: Access::new(access_settings(settings, listeners.api_port())),
        rate: RateLimit::per_minute(settings.service_rate_per_minute),
        activity: activity.clone(),
        service: service.clone(),
        ledger: ledger.clone(),
        figures: Figures::start(&tasks, settings.metrics_tenants),
        pins: pins.clone(),
        facts: Facts {
            workspace: Some(settings.workspace_path.clone()),
            is_rehearsal,
            confinement: launcher.confinement(),
            ecs: outside.ecs.clone(),
        },
        readiness: readiness.clone(),
        started,
        draining: supervisor.draining(),
        supervisor: Some(supervisor.clone()),
    });
    let images = images(&loaded, &supervisor, &labels, &ledger, &tasks)?;
    let state = Arc::new(ApiState {
        base,
        supervisor: supervisor.clone(),
        books: Books::new(
            settings.workspace_path.clone(),
            tenants(settings),
            budgets(settings),
        ),
        pins: pins.clone(),
        batches: batches.clone(),
        alt_texts: alt_texts(settings, &labels, &activity, &runtime),
        labels: labels.clone(),
        calls: Calls::new(&tasks, &activity, supervisor.draining()),
        images: images.clone(),
    });
    // The first line of the log says where it listens.
    announce(&loaded, mode, &listeners, is_rehearsal, &launcher);
    tell_closed(closed.as_deref());
    runtime.sweep_others(&tasks);
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
    tasks.spawn("what was left", async move {
        let is_ours = move |account: &Account| api::is_ours(&pins, account);
        tokio::join!(batches.take_up(is_ours.clone()), images.take_up(is_ours));
    });
    tasks.spawn(
        "outcomes",
        outside
            .clone()
            .tell_outcomes(supervisor.outcomes(), tasks.token().clone()),
    );
    let ending = Ending {
        outside,
        supervisor: Some(supervisor),
        service,
        labels: Some(labels),
        launcher,
        tasks,
        activity,
        runtime,
    };
    ending.wait_and_stop(settings, signals).await
}

/// Runs the one-shot service alone: no workspace, no Node, no site.
///
/// # Errors
/// As [`serve`].
pub async fn serve_one_shots(loaded: Loaded) -> anyhow::Result<()> {
    let started = Instant::now();
    let signals = Signals::listen().context("failed to listen for signals")?;
    process::harden_self().context("failed to protect the process")?;
    let settings = &loaded.settings;
    let runtime = runtime_folder(&loaded)?;
    let port = settings.claude_service_port.unwrap_or_default();
    let listener = listen(settings, port, "CLAUDE_SERVICE_PORT").await?;
    let network = gateway_listener(settings).await?;

    let tasks = Tasks::new();
    let credential = loaded.credential()?;
    let is_rehearsal = credential == CredentialSource::Rehearsal;
    let ledger = Ledger::new(
        LedgerSettings {
            workspace: None,
            ..ledger_settings(settings).await?
        },
        &tasks,
    );
    let gateway = start_gateway(settings, credential, ledger.clone(), None, &tasks).await?;
    let programs = Programs::find(&loaded);
    let (launcher, closed) = start_launcher(settings, &programs, &runtime)?;
    let egress = start_egress(settings, &tasks).await?;
    let activity = Activity::new(settings.auto_shutdown);
    let outside = Outside::start(settings, &activity, &tasks)?;
    open_to_network(&gateway, network, &activity, &tasks).await?;
    let agent = agent_settings(settings, &programs, &launcher, &gateway, egress.as_ref());
    let service = one_shots(settings, agent, runtime.path(), &launcher, &gateway, &tasks);
    let readiness = Readiness::default();
    let port = crate::app::port(&listener);
    let base = Base::from(BaseState {
        access: Access::new(access_settings(settings, port)),
        rate: RateLimit::per_minute(settings.service_rate_per_minute),
        activity: activity.clone(),
        service: service.clone(),
        ledger,
        figures: Figures::start(&tasks, settings.metrics_tenants),
        pins: Pins::default(),
        facts: Facts {
            workspace: None,
            is_rehearsal,
            confinement: launcher.confinement(),
            ecs: outside.ecs.clone(),
        },
        readiness: readiness.clone(),
        started,
        draining: service.draining(),
        supervisor: None,
    });
    tracing::info!(
        bind = %settings.bind, service_port = port,
        "greenroom {} serves one-shot runs alone, for {}",
        env!("CARGO_PKG_VERSION"), for_whom(settings),
    );
    tell_more(&loaded, is_rehearsal, &launcher);
    tell_closed(closed.as_deref());
    runtime.sweep_others(&tasks);
    let router = api::service_router(base);
    tasks.spawn("one-shot api", api::serve(listener, router, tasks.clone()));
    tasks.spawn(
        "readiness",
        look_at_claude(programs, launcher.clone(), readiness),
    );
    let ending = Ending {
        outside,
        supervisor: None,
        service,
        labels: None,
        launcher,
        tasks,
        activity,
        runtime,
    };
    ending.wait_and_stop(settings, signals).await
}

/// What is ended, in order, when it is time.
struct Ending {
    outside: Outside,
    supervisor: Option<Supervisor>,
    service: Service,
    labels: Option<Labels>,
    launcher: Launcher,
    tasks: Tasks,
    activity: Activity,
    /// Goes last.
    runtime: RuntimeFolder,
}

impl Ending {
    /// Where stops are noted for the next start; the one-shot service has no workspace for that.
    fn stops_folder(&self, settings: &Settings) -> Option<PathBuf> {
        self.supervisor
            .as_ref()
            .map(|_| settings.workspace_path.join(".greenroom/stops"))
    }

    async fn wait_and_stop(self, settings: &Settings, mut signals: Signals) -> anyhow::Result<()> {
        if std::process::id() == 1 {
            let reaper = reap(self.launcher.clone(), self.tasks.clone());
            self.tasks.spawn("reaper", reaper);
        }
        let circuit = self.outside.clone();
        let circuit = circuit.tell_circuit(self.service.circuit_changes());
        let ending = self.tasks.token().clone();
        self.tasks.spawn("circuit", async move {
            ending.run_until_cancelled(circuit).await;
        });
        let told = &self.outside.control_plane;
        let stops = self.stops_folder(settings);
        told.tell(Notice::Ready {
            cut_short: stops::report(stops.clone()).await,
        });
        let going = |stops_at| told.tell(Notice::GoingIdle { stops_at });
        let reason = tokio::select! {
            reason = wait_for_reason(&mut signals, &self.activity, going) => reason,
            () = self.tasks.token().cancelled() => StopReason::Broken,
        };
        let why = reason.as_str();
        told.tell(Notice::Stopping { reason: why });
        let begin = tokio::time::Instant::now();
        let shares = Shares::of(settings.drain, settings.stop_timeout);
        let note = StopNote::begin(stops, why, settings.stop_timeout);
        let stopping = stop(reason, begin, shares, &self, &note);
        tokio::select! {
            () = stopping => {}
            // Whoever asks twice means now. Children end by themselves when we are gone.
            () = signals.next(), if reason != StopReason::Broken => {
                tracing::warn!("stopping at once");
                note.cut("a second signal ended it at once");
            }
        }
        tracing::info!(reason = why, "stopped");
        told.tell(Notice::Stopped { reason: why });
        let left = (begin + shares.told).saturating_duration_since(tokio::time::Instant::now());
        let news = async {
            told.finish(LAST_NEWS.min(left)).await;
        };
        tokio::join!(news, note.end(left));
        drop(self.runtime);
        match reason {
            StopReason::Broken => bail!("a part of greenroom broke; the log says which"),
            StopReason::IdleTimeout | StopReason::Signal => Ok(()),
        }
    }
}

/// Ends everything in order: admit nothing, let turns end, stop children, close tasks. Each step has
/// its share of the platform's patience; one that is cut short is noted.
async fn stop(
    reason: StopReason,
    begin: tokio::time::Instant,
    shares: Shares,
    ending: &Ending,
    note: &StopNote,
) {
    let Ending {
        supervisor,
        service,
        labels,
        launcher,
        tasks,
        activity,
        ..
    } = ending;
    tracing::info!(reason = reason.as_str(), "stopping");
    let (turns_end, saved) = (begin + shares.turns, begin + shares.saved);
    let turns = async {
        let Some(supervisor) = supervisor else { return };
        let drained = supervisor.drain(turns_end, saved).await;
        if drained.interrupted > 0 {
            let turns = drained.interrupted;
            note.cut(format!("{turns} running turns were interrupted"));
        }
        for thread in drained.unsaved {
            note.cut(format!(
                "{thread} was not saved in time; its next init recovers it"
            ));
        }
    };
    let runs = async {
        match service.drain(turns_end).await {
            0 => {}
            runs => note.cut(format!("{runs} one-shot runs were ended")),
        }
    };
    let images = async {
        let Some(labels) = labels else { return };
        match labels.service().drain(turns_end).await {
            0 => {}
            runs => note.cut(format!("{runs} runs that label an image were ended")),
        }
    };
    let runs = async { tokio::join!(runs, images) };
    tokio::join!(turns, tokio::time::timeout_at(saved, runs))
        .1
        .ok();
    note.reached(Step::Children);
    if std::process::id() == 1 {
        launcher.terminate_orphans();
    }
    let now = tokio::time::Instant::now();
    let children = (begin + shares.children).saturating_duration_since(now);
    // Half of it to end by themselves, half to be ended.
    let ended = launcher.stop(children / 2);
    if !matches!(tokio::time::timeout(children, ended).await, Ok(true)) {
        tracing::error!("children were left that did not end");
        note.cut("children were left that did not end");
    }
    if std::process::id() == 1 {
        // With us the kernel ends whatever is left.
        let ended = async {
            while launcher.has_orphans() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let end = (begin + shares.children).min(tokio::time::Instant::now() + ORPHANS_END);
        tokio::time::timeout_at(end, ended).await.ok();
    }
    note.reached(Step::Answers);
    // Answers that are on their way get out.
    let answered = async {
        while activity.count(HolderKind::Request) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_a_second = tokio::time::Instant::now() + Duration::from_secs(1);
    let answers_end = in_a_second.min(begin + shares.answers);
    if tokio::time::timeout_at(answers_end, answered)
        .await
        .is_err()
    {
        note.cut("requests were left without an answer");
    }
    note.reached(Step::Tasks);
    let now = tokio::time::Instant::now();
    let left = (begin + shares.tasks).saturating_duration_since(now);
    if !tasks.stop(left).await {
        tracing::warn!("tasks were left that did not end");
        note.cut("tasks were left that did not end");
    }
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

fn runtime_folder(loaded: &Loaded) -> anyhow::Result<RuntimeFolder> {
    let shared = config::runtime_folder(&loaded.surroundings)
        .context("failed to make the runtime folder; set TMPDIR to a folder that is writable")?;
    RuntimeFolder::claim(&shared).with_context(|| {
        format!(
            "failed to make a folder in {}; set TMPDIR to a folder that is writable",
            shared.display()
        )
    })
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

/// `store` is a folder that agents are not let into, for tokens that were refreshed.
async fn start_gateway(
    settings: &Settings,
    source: CredentialSource,
    ledger: Ledger,
    store: Option<PathBuf>,
    tasks: &Tasks,
) -> anyhow::Result<Gateway> {
    let mut oauth = OAuthSettings {
        endpoint: settings
            .claude_oauth_token_url
            .parse()
            .context("CLAUDE_OAUTH_TOKEN_URL is no address")?,
        file: None,
        store,
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

/// Programs run as users of their own only where these get through to everything that they need;
/// else it says to what they do not.
fn start_launcher(
    settings: &Settings,
    programs: &Programs,
    runtime: &RuntimeFolder,
) -> anyhow::Result<(Launcher, Option<PathBuf>)> {
    let launcher = Launcher::start(settings.lease / 2, ConfinementMode::Auto)
        .context("failed to start the launcher")?;
    if !launcher.runs_as_owners() {
        return Ok((launcher, None));
    }
    let shared = runtime.path().parent().unwrap_or(runtime.path());
    let folders = [&settings.workspace_path, &settings.cache_path].map(PathBuf::as_path);
    let programs = [&programs.claude, &programs.node].into_iter().flatten();
    let needed = folders
        .into_iter()
        .chain([shared])
        .chain(programs.map(PathBuf::as_path));
    // What a link leads to, and the link.
    let closed = needed
        .flat_map(|path| [Some(path.to_owned()), path.canonicalize().ok()])
        .flatten()
        .find(|path| !owner::is_passable(path));
    if closed.is_some() {
        return Ok((launcher.without_owners(), closed));
    }
    runtime
        .let_pass()
        .context("failed to open the runtime folder")?;
    Ok((launcher, None))
}

fn tell_closed(path: Option<&Path>) {
    if let Some(path) = path {
        tracing::warn!(
            path = %path.display(),
            "agents get no uid of their own, because another user does not get through to this path: \
             open the folders above it (chmod o+x) or move it"
        );
    }
}

/// The children's way out, where the operator says whom they may reach.
async fn start_egress(settings: &Settings, tasks: &Tasks) -> anyhow::Result<Option<Egress>> {
    let Some(names) = &settings.egress_allow else {
        return Ok(None);
    };
    let egress = Egress::start(names, tasks).await;
    Ok(Some(egress.context("failed to start the egress proxy")?))
}

/// How CLIs are started; `None` where there is none.
fn agent_settings(
    settings: &Settings,
    programs: &Programs,
    launcher: &Launcher,
    gateway: &Gateway,
    egress: Option<&Egress>,
) -> Option<Arc<AgentSettings>> {
    let program = programs.claude.clone()?;
    Some(Arc::new(AgentSettings {
        program,
        gateway_url: gateway.base_url(),
        gateway_port: gateway.port(),
        egress: egress.map(|egress| egress.sites.clone()),
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
    }))
}

fn one_shots(
    settings: &Settings,
    agent: Option<Arc<AgentSettings>>,
    runtime: &Path,
    launcher: &Launcher,
    gateway: &Gateway,
    tasks: &Tasks,
) -> Service {
    let settings = ServiceSettings {
        agent,
        max_concurrent: settings.service_max_concurrent,
        scratch: runtime.join("runs"),
        mask: |text| telemetry::masked(text).into_owned(),
    };
    Service::new(settings, launcher.clone(), gateway.clone(), tasks.clone())
}

/// Labels have runs of their own: neither do they wait for others' one-shot runs, nor others for
/// them.
async fn labels(
    settings: &Settings,
    agent: Option<&AgentSettings>,
    runtime: &Path,
    launcher: &Launcher,
    gateway: &Gateway,
    tasks: &Tasks,
) -> anyhow::Result<Labels> {
    let prompts = match settings.label_prompts_file.clone() {
        None => Prompts::default(),
        Some(file) => {
            let load = move || Prompts::load(&file);
            task::blocking("reading the prompts", Duration::from_secs(20), load)
                .await?
                .context("LABEL_PROMPTS_FILE")?
        }
    };
    let agent = agent.map(|agent| {
        Arc::new(AgentSettings {
            model: settings.label_model.clone().or(agent.model.clone()),
            max_output_tokens: Some(MAX_ANSWER_TOKENS),
            // It has no tool that could use one.
            egress: None,
            ..agent.clone()
        })
    });
    let service = ServiceSettings {
        agent,
        max_concurrent: settings.label_max_concurrent,
        scratch: runtime.join("labels"),
        mask: |text| telemetry::masked(text).into_owned(),
    };
    Ok(Labels::new(LabelSettings {
        service: Service::new(service, launcher.clone(), gateway.clone(), tasks.clone()),
        prompts,
        timeout: settings.label_timeout,
    }))
}

/// Images for sites: on Replicate, whose token nobody else gets.
fn images(
    loaded: &Loaded,
    supervisor: &Supervisor,
    labels: &Labels,
    ledger: &Ledger,
    tasks: &Tasks,
) -> anyhow::Result<Images> {
    let settings = &loaded.settings;
    let settings = ImageSettings {
        base_url: settings.replicate_base_url.clone(),
        token: settings.replicate_api_token.clone(),
        configs: replicate::model_configs(loaded, None)?,
        model: settings.image_model.clone(),
        lora: settings.image_lora.clone(),
        timeout: settings.turn_timeout,
        store: settings.workspace_path.join(".greenroom/images"),
        lease: settings.lease,
    };
    Ok(Images::new(
        settings,
        supervisor.clone(),
        labels.clone(),
        ledger.clone(),
        tasks.clone(),
    ))
}

/// Batches of images, kept on the workspace.
fn batches(settings: &Settings, labels: &Labels, activity: &Activity, tasks: &Tasks) -> Batches {
    let (awake, busy) = (activity.clone(), activity.clone());
    let settings = BatchSettings {
        folder: settings.workspace_path.join(".greenroom/labels"),
        labels: labels.clone(),
        cache: Cache::new(settings.cache_path.join("labels/known")),
        busy: Busy::new(move || busy.count(HolderKind::Turn) > 0),
        lease: settings.lease,
        awake: Arc::new(move || Box::new(awake.hold(HolderKind::Request, "a batch of images"))),
    };
    Batches::new(settings, tasks)
}

/// Texts for the images of threads' sites.
fn alt_texts(
    settings: &Settings,
    labels: &Labels,
    activity: &Activity,
    runtime: &RuntimeFolder,
) -> AltTexts {
    let (awake, busy) = (activity.clone(), activity.clone());
    AltTexts::new(AltTextSettings {
        labels: labels.clone(),
        cache: Cache::new(settings.cache_path.join("labels/known")),
        busy: Busy::new(move || busy.count(HolderKind::Turn) > 0),
        awake: Arc::new(move || Box::new(awake.hold(HolderKind::Request, "alt texts"))),
        scratch: runtime.path().join("alt-text"),
    })
}

fn supervisor_settings(
    loaded: &Loaded,
    agent: Option<Arc<AgentSettings>>,
    runtime: &Path,
    listeners: &Listeners,
) -> SupervisorSettings {
    let settings = &loaded.settings;
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
        api_tokens: both(&settings.api_token, &settings.api_token_previous),
        service_secrets: both(
            &settings.claude_service_secret,
            &settings.claude_service_secret_previous,
        ),
        allowed_hosts,
        public_origin,
    }
}

/// A secret, and the one of before.
fn both(now: &Option<config::Secret>, before: &Option<config::Secret>) -> Vec<config::Secret> {
    now.iter().chain(before).cloned().collect()
}

async fn listen(settings: &Settings, port: u16, name: &str) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(settings.bind, port);
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "{name}: port {port} of {} cannot be listened on; free it or choose another one by \
             {name}",
            settings.bind
        )
    })
}

/// The gateway's on the network, and who may come in.
async fn gateway_listener(settings: &Settings) -> anyhow::Result<Option<(TcpListener, PathBuf)>> {
    match (settings.gateway_port, settings.gateway_tokens_file.clone()) {
        (Some(port), Some(tokens)) => Ok(Some((
            listen(settings, port, "GATEWAY_PORT").await?,
            tokens,
        ))),
        _ => Ok(None),
    }
}

/// The ports that the program serves.
struct Listeners {
    api: TcpListener,
    preview: TcpListener,
    hmr: TcpListener,
    /// With the one-shot service alone.
    service: Option<TcpListener>,
    /// The gateway's on the network, and who may come in.
    gateway: Option<(TcpListener, PathBuf)>,
}

impl Listeners {
    async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        Ok(Self {
            api: listen(settings, settings.api_port, "API_PORT").await?,
            preview: listen(settings, settings.preview_port, "PREVIEW_PORT").await?,
            hmr: listen(settings, settings.hmr_port, "HMR_PORT").await?,
            service: match settings.claude_service_port {
                Some(port) => Some(listen(settings, port, "CLAUDE_SERVICE_PORT").await?),
                None => None,
            },
            gateway: gateway_listener(settings).await?,
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
        if let Some(listener) = self.service {
            let router = api::service_router(state.base.clone());
            tasks.spawn("one-shot api", api::serve(listener, router, tasks.clone()));
        }
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

fn for_whom(settings: &Settings) -> &'static str {
    match (settings.has_api_secret(), settings.bind.is_loopback()) {
        (true, _) => "callers with the token or a signature",
        (false, true) => "this machine alone",
        (false, false) => "ANYBODY who can reach it (insecure)",
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
    let for_whom = for_whom(settings);
    tracing::info!(
        bind = %settings.bind,
        api_port = listeners.api_port(),
        preview_port = listeners.preview_port(),
        hmr_port = port(&listeners.hmr),
        service_port = listeners.service.as_ref().map(port),
        workspace = %settings.workspace_path.display(),
        "greenroom {} listens, for {for_whom}",
        env!("CARGO_PKG_VERSION"),
    );
    tell_more(loaded, is_rehearsal, launcher);
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

/// What an operator should know besides.
fn tell_more(loaded: &Loaded, is_rehearsal: bool, launcher: &Launcher) {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    if is_rehearsal {
        tracing::warn!("rehearsal: no model is behind this, a script answers");
    }
    let confinement = launcher.confinement();
    tracing::info!(
        files = ?confinement.files, network = ?confinement.network,
        processes = ?confinement.processes, bash = ?confinement.bash,
        egress = match &loaded.settings.egress_allow {
            None => "any".to_owned(),
            Some(names) if names.is_empty() => "none".to_owned(),
            Some(names) => names.join(","),
        },
        "how agents and dev servers are held"
    );
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
        let reaped = reaped.await.unwrap_or_default();
        metrics::counter!("greenroom_orphans_reaped_total").increment(reaped as u64);
    }
}
