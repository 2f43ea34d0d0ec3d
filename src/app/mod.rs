//! The composition root: makes every room, connects them, and ends them in order. It knows all of
//! them; none knows it.

mod alt_text;
mod announce;
mod ending;
mod hub;
mod label;
mod listeners;
mod outside;
mod programs;
mod replicate;
mod rooms;
mod runtime;
mod stops;
mod terminal;

use std::{sync::Arc, time::Instant};

use anyhow::Context as _;

pub use self::alt_text::{AltTextJob, alt_text};
pub use self::hub::{models, publish};
pub use self::label::{AskedPrompt, LabelJob, Labelled, label};
pub use self::replicate::{ModelJob, ModelNews, ModelRan, Run, run_model};
pub use self::rooms::{budgets, tenants};
pub use self::terminal::terminal;
use self::{
    announce::{announce, for_whom, tell_closed, tell_more},
    ending::Ending,
    listeners::{Listeners, gateway_listener, listen},
    outside::Outside,
    programs::{Programs, look_at_claude, look_at_programs},
    rooms::{
        access_settings, agent_settings, alt_texts, batches, images, labels, ledger_settings,
        one_shots, open_to_network, prepare_folder, preview_access, runtime_folder, start_egress,
        start_gateway, start_launcher, supervisor_settings,
    },
};
use crate::{
    api::{self, Access, ApiState, Base, BaseState, Calls, Facts, Pins, RateLimit, Readiness},
    config::{self, CredentialSource, Loaded, Mode},
    domain::Account,
    figures::Figures,
    lifecycle::{Activity, Signals},
    preview::{PreviewSettings, Previews},
    process, repository,
    supervisor::{Supervisor, SupervisorSettings},
    task::Tasks,
    usage::{Books, Ledger, LedgerSettings},
    workspace::Dependencies,
};

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
        is_rehearsal,
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
    let port = listeners::port(&listener);
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
