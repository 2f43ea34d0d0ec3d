//! Whom the container tells of itself: the control plane, and ECS where it is there.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::{
    broadcast::{self, error::RecvError},
    watch,
};

use crate::{
    config::{Secret, Settings},
    control_plane::{ControlPlane, ControlPlaneSettings, Instance, Notice, TurnEnded},
    domain::BreakerState,
    ecs::Ecs,
    lifecycle::{Activity, HolderKind},
    task::Tasks,
    turn::Outcome,
};

/// Both, connected.
#[derive(Debug, Clone, Default)]
pub(super) struct Outside {
    pub(super) control_plane: ControlPlane,
    pub(super) ecs: Option<Arc<Ecs>>,
}

impl Outside {
    /// Starts to tell, and to hold protection while turns run.
    pub(super) fn start(
        settings: &Settings,
        activity: &Activity,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let control_plane = match &settings.control_plane_url {
            None => ControlPlane::default(),
            Some(url) => ControlPlane::start(ControlPlaneSettings {
                url: url.parse().context("CONTROL_PLANE_URL is no address")?,
                secret: exposed(settings.claude_service_secret.as_ref()),
                token: exposed(settings.api_token.as_ref()),
                instance: instance(settings),
            })
            .context("failed to set up HTTPS for CONTROL_PLANE_URL")?,
        };
        let ecs = Ecs::from_env(std::env::vars_os().filter_map(|(name, value)| {
            // Others need not be text.
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }));
        let ecs = ecs.map(Arc::new);
        if let Some(ecs) = ecs.clone() {
            let (activity, ending) = (activity.clone(), tasks.token().clone());
            tasks.spawn("ecs", async move {
                let is_busy =
                    || activity.count(HolderKind::Turn) + activity.count(HolderKind::Queue) > 0;
                tokio::join!(ecs.look(), ecs.protect_while(is_busy, ending));
            });
        }
        Ok(Self { control_plane, ecs })
    }

    /// Tells of the one-shot service's circuit breaker, for as long as there is one. Of changes that
    /// follow each other at once the last is told.
    pub(super) async fn tell_circuit(self, mut circuit: watch::Receiver<BreakerState>) {
        while circuit.changed().await.is_ok() {
            let state = circuit.borrow_and_update().as_str();
            self.control_plane.tell(Notice::ServiceCircuit { state });
        }
    }

    /// Tells of turns' ends, for as long as there are turns.
    pub(super) async fn tell_outcomes(self, mut outcomes: broadcast::Receiver<Arc<Outcome>>) {
        loop {
            match outcomes.recv().await {
                Ok(outcome) => {
                    let ended = TurnEnded::of(&outcome.key, &outcome.result);
                    self.control_plane.tell(Notice::TurnEnded(Box::new(ended)));
                }
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "the control plane was not told of all turns");
                }
                Err(RecvError::Closed) => return,
            }
        }
    }
}

fn exposed(secret: Option<&Secret>) -> Option<String> {
    secret.map(|secret| secret.expose().to_owned())
}

fn instance(settings: &Settings) -> Instance {
    Instance {
        id: uuid::Uuid::now_v7().to_string(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|name| name.trim().to_owned())
            .unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        client_id: settings.client_id.as_ref().map(ToString::to_string),
        user_id: settings.user_id.as_ref().map(ToString::to_string),
        thread_id: settings.thread_id.as_ref().map(ToString::to_string),
    }
}
