//! Rooms by the settings: what each is made with.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;

use super::{
    listeners::{Listeners, port},
    programs::Programs,
    replicate,
    runtime::RuntimeFolder,
};
use crate::{
    agent::{AgentSettings, Ceiling, Limits},
    alt_text::{AltTextSettings, AltTexts},
    api::AccessSettings,
    config::{self, CredentialSource, Loaded, Settings},
    domain::Signature,
    egress::Egress,
    gateway::{self, Credential, Gateway, GatewayConfig, OAuthSettings, load_credentials_file},
    images::{ImageSettings, Images},
    label::{
        BatchSettings, Batches, Busy, Cache, LabelSettings, Labels, MAX_ANSWER_TOKENS, Prompts,
    },
    lifecycle::{Activity, HolderKind},
    owner, preview,
    process::{Allowance, Bash, ConfinementMode, Launcher},
    rehearsal::{Rehearsal, Script},
    repository::{GitHub, Remotes},
    service::{Service, ServiceSettings},
    supervisor::{Supervisor, SupervisorSettings},
    task::{self, Tasks},
    telemetry,
    usage::{Budgets, Ledger, LedgerSettings, Level, Limit, Prices, Tenants, Term},
    workspace::make_private_dir,
};

pub(super) async fn prepare_folder(path: &Path, setting: &'static str) -> anyhow::Result<()> {
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

pub(super) fn runtime_folder(loaded: &Loaded) -> anyhow::Result<RuntimeFolder> {
    let shared = config::runtime_folder(&loaded.surroundings)
        .context("failed to make the runtime folder; set TMPDIR to a folder that is writable")?;
    RuntimeFolder::claim(&shared).with_context(|| {
        format!(
            "failed to make a folder in {}; set TMPDIR to a folder that is writable",
            shared.display()
        )
    })
}

pub(super) async fn ledger_settings(settings: &Settings) -> anyhow::Result<LedgerSettings> {
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
pub(super) async fn start_gateway(
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
pub(super) async fn open_to_network(
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
pub(super) fn start_launcher(
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

/// The children's way out, where the operator says whom they may reach.
pub(super) async fn start_egress(
    settings: &Settings,
    tasks: &Tasks,
) -> anyhow::Result<Option<Egress>> {
    let Some(names) = &settings.egress_allow else {
        return Ok(None);
    };
    let egress = Egress::start(names, tasks).await;
    Ok(Some(egress.context("failed to start the egress proxy")?))
}

/// How CLIs are started; `None` where there is none.
pub(super) fn agent_settings(
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

pub(super) fn one_shots(
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
        allowance: None,
        mask: |text| telemetry::masked(text).into_owned(),
    };
    Service::new(settings, launcher.clone(), gateway.clone(), tasks.clone())
}

/// Labels have runs of their own: neither do they wait for others' one-shot runs, nor others for
/// them.
pub(super) async fn labels(
    settings: &Settings,
    agent: Option<&AgentSettings>,
    runtime: &Path,
    launcher: &Launcher,
    gateway: &Gateway,
    is_rehearsal: bool,
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
        allowance: Some(Allowance {
            memory: settings.label_memory_mb << 20,
            processor: settings.label_cpu,
            processes: settings.label_max_processes,
        }),
        mask: |text| telemetry::masked(text).into_owned(),
    };
    Ok(Labels::new(LabelSettings {
        service: Service::new(service, launcher.clone(), gateway.clone(), tasks.clone()),
        prompts,
        timeout: settings.label_timeout,
        is_rehearsal,
    }))
}

/// Images for sites: on Replicate, whose token nobody else gets.
pub(super) fn images(
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
pub(super) fn batches(
    settings: &Settings,
    labels: &Labels,
    activity: &Activity,
    tasks: &Tasks,
) -> Batches {
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
pub(super) fn alt_texts(
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

pub(super) fn supervisor_settings(
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
pub(super) fn preview_access(settings: &Settings) -> preview::Access {
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

pub(super) fn access_settings(settings: &Settings, api_port: u16) -> AccessSettings {
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
