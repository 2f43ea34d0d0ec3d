//! `greenroom alt-text`: texts for the images of a site in a folder of this machine, without a
//! supervisor.

use std::path::PathBuf;

use anyhow::{Context as _, bail};

use super::label::{Bench, BenchWish, with_bench};
use crate::{
    alt_text::{AltTextSettings, AltTexts, Asked, FolderAnswer, Progress},
    config::Loaded,
    domain::Account,
    label::{Busy, Cache},
    lifecycle::Signals,
};

/// What is asked.
#[derive(Debug, Clone)]
pub struct AltTextJob {
    pub folder: PathBuf,
    /// Of all texts, whatever the site says.
    pub language: Option<String>,
    pub model: Option<String>,
    pub most_usd: Option<f64>,
    /// Say what would be done, and do nothing.
    pub is_dry: bool,
}

/// Gives a site's images texts. `tell` hears how far it is.
///
/// # Errors
/// What keeps it from working, as one line that says what to do.
pub async fn alt_text(
    loaded: Loaded,
    job: AltTextJob,
    mut tell: impl FnMut(&Progress) + Send,
) -> anyhow::Result<FolderAnswer> {
    let wish = BenchWish {
        workers: None,
        prompts_file: None,
        is_dry: job.is_dry,
    };
    with_bench(loaded, wish, async |bench: &Bench| {
        let settings = &bench.settings;
        let texts = AltTexts::new(AltTextSettings {
            labels: bench.labels.clone(),
            cache: Cache::new(settings.cache_path.join("labels/known")),
            busy: Busy::default(),
            awake: std::sync::Arc::new(|| Box::new(())),
            scratch: bench.runtime.join("alt-text"),
        });
        let asked = Asked {
            model: job.model,
            account: Account {
                client: settings.client_id.clone(),
                user: settings.user_id.clone(),
                ..Account::of_kind(Account::LABEL)
            },
            most_usd: job.most_usd,
        };
        let mut signals = Signals::listen().context("failed to listen for signals")?;
        let write = texts.write_folder(job.folder, job.language, &asked, job.is_dry, &mut tell);
        tokio::select! {
            done = write => Ok(done?),
            _ = signals.next() => bail!(
                "it was stopped, and no file was written; what was described is known when it is \
                 started again"
            ),
        }
    })
    .await
}
