//! `greenroom hf`: the Hub, with the settings of this process and a person who may change their mind.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::time::MissedTickBehavior;

use crate::{
    config::Loaded,
    hub::{self, Hub, HubSettings, Meter, Model, Progress, Publication, Published},
    lifecycle::Signals,
    process,
};

/// How often it is told how far it is.
const TELLS: Duration = Duration::from_millis(200);

/// Publishes a model. `tell` hears how far it is, several times a second.
///
/// # Errors
/// What keeps it from working, as one line that says what to do; a signal too.
pub async fn publish(
    loaded: Loaded,
    publication: Publication,
    mut tell: impl FnMut(&Progress),
) -> anyhow::Result<Published> {
    let mut signals = Signals::listen().context("failed to listen for signals")?;
    let meter = Arc::new(Meter::default());
    let publishing = async { anyhow::Ok(hub(loaded).await?.publish(&publication, &meter).await?) };
    tokio::pin!(publishing);
    let mut ticks = tokio::time::interval(TELLS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            biased;
            published = &mut publishing => return published,
            () = signals.next() => bail!(
                "stopped; the same command goes on from here: what is uploaded is not uploaded \
                 again, and nothing shows on the Hub before all of it is"
            ),
            _ = ticks.tick() => tell(&meter.progress()),
        }
    }
}

/// Lists models: an author's, or those of the token's owner.
///
/// # Errors
/// What keeps it from working, as one line that says what to do.
pub async fn models(
    loaded: Loaded,
    author: Option<String>,
    limit: usize,
) -> anyhow::Result<Vec<Model>> {
    let hub = hub(loaded).await?;
    Ok(hub.models(author.as_deref(), limit).await?)
}

async fn hub(loaded: Loaded) -> anyhow::Result<Hub> {
    process::harden_self().context("failed to protect the process")?;
    let settings = HubSettings {
        endpoint: loaded.settings.hf_endpoint,
        token: loaded.settings.hf_token,
        still: hub::STILL,
        unfinished: Some(loaded.settings.cache_path.join("hub")),
    };
    Ok(Hub::new(settings).await?)
}
