//! `greenroom label`: images of this machine, labelled without a supervisor: a launcher, a gateway
//! and runs of its own, for as long as it takes.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{
    announce::tell_closed,
    programs::Programs,
    rooms::{
        agent_settings, labels, ledger_settings, runtime_folder, start_gateway, start_launcher,
    },
};
use crate::{
    config::{CredentialSource, Loaded, Settings},
    domain::Account,
    label::{Busy, Cache, Entry, Image, Labels, Plan, Progress, Prompt, Question, Summary},
    lease::Fence,
    lifecycle::Signals,
    process,
    service::Service,
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};

/// What ending children and tasks may take.
const LAST_STEPS: Duration = Duration::from_secs(3);

/// What is asked.
#[derive(Debug, Clone)]
pub enum AskedPrompt {
    /// Of the built-in ones, or of `file`.
    Named {
        name: String,
        file: Option<PathBuf>,
    },
    Own(String),
}

/// What is to be labelled, and how.
#[derive(Debug, Clone)]
pub struct LabelJob {
    pub images: Vec<Image>,
    pub prompt: AskedPrompt,
    pub model: Option<String>,
    /// Images under way at once.
    pub workers: usize,
    /// Else the same bytes are asked about as often as they come, and all of it again when it was over.
    pub uses_cache: bool,
    /// Captions are written over whatever is there.
    pub replaces_captions: bool,
    /// Also about what failed and was paid.
    pub asks_again: bool,
    pub most_usd: Option<f64>,
    /// What makes the batch this one, as long as its journal has no place of its own.
    pub named_by: String,
    pub journal: Option<PathBuf>,
    /// Say what it would cost, and do nothing.
    pub is_dry: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Labelled {
    Done(Summary),
    /// Nothing was done; one image may cost so much.
    Dry {
        worst_usd: f64,
        is_priced: bool,
    },
}

/// What labels are made with on this machine.
pub(super) struct Bench {
    pub(super) settings: Settings,
    pub(super) labels: Labels,
    /// Private, of this process.
    pub(super) runtime: PathBuf,
    /// The workspace's own folder, where there is a workspace.
    store: Option<PathBuf>,
    tasks: Tasks,
}

/// How they are to be made.
pub(super) struct BenchWish {
    /// Images under way at once; `None`: as it is set.
    pub(super) workers: Option<usize>,
    pub(super) prompts_file: Option<PathBuf>,
    /// Nobody will be asked.
    pub(super) is_dry: bool,
}

/// Labels images. `tell` hears of each outcome, and stops it by answering false.
///
/// # Errors
/// What keeps it from working, as one line that says what to do.
pub async fn label(
    loaded: Loaded,
    job: LabelJob,
    tell: impl FnMut(&Entry, &Progress) -> bool,
) -> anyhow::Result<Labelled> {
    let wish = BenchWish {
        // All of them are this batch's.
        workers: Some(job.workers.max(1)),
        prompts_file: match &job.prompt {
            AskedPrompt::Named { file, .. } => file.clone(),
            AskedPrompt::Own(_) => None,
        },
        is_dry: job.is_dry,
    };
    with_bench(loaded, wish, async |bench: &Bench| {
        run(bench, job, tell).await
    })
    .await
}

/// Has everything that labels are made with while `work` is under way.
pub(super) async fn with_bench<T>(
    loaded: Loaded,
    wish: BenchWish,
    work: impl AsyncFnOnce(&Bench) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    process::harden_self().context("failed to protect the process")?;
    let mut settings = loaded.settings.clone();
    if let Some(workers) = wish.workers {
        settings.label_max_concurrent = workers;
    }
    if wish.prompts_file.is_some() {
        settings.label_prompts_file = wish.prompts_file;
    }
    let programs = Programs::find(&loaded);
    if programs.claude.is_none() && !wish.is_dry {
        bail!(
            "the Claude Code CLI is missing: npm install -g @anthropic-ai/claude-code, or set \
             CLAUDE_BIN to its program"
        );
    }
    let tasks = Tasks::new();
    let runtime = runtime_folder(&loaded)?;
    runtime.sweep_others(&tasks);
    // Counted where there is a workspace to count in.
    let workspace = Some(settings.workspace_path.clone()).filter(|folder| folder.is_dir());
    let store = workspace.as_ref().map(|folder| folder.join(".greenroom"));
    let ledger = Ledger::new(
        LedgerSettings {
            workspace: workspace.clone(),
            ..ledger_settings(&settings).await?
        },
        &tasks,
    );
    let credential = match wish.is_dry {
        // Nobody is asked.
        true => CredentialSource::Rehearsal,
        false => loaded.credential()?,
    };
    let is_rehearsal = credential == CredentialSource::Rehearsal;
    if is_rehearsal && !wish.is_dry {
        tracing::warn!("rehearsal: no model is behind this, a script answers");
    }
    let gateway = start_gateway(&settings, credential, ledger, store.clone(), &tasks).await?;
    let (launcher, closed) = start_launcher(&settings, &programs, &runtime)?;
    tell_closed(closed.as_deref());
    let agent = agent_settings(&settings, &programs, &launcher, &gateway, None);
    let labels = labels(
        &settings,
        agent.as_deref(),
        runtime.path(),
        &launcher,
        &gateway,
        is_rehearsal,
        &tasks,
    );
    let bench = Bench {
        labels: labels.await?,
        settings,
        runtime: runtime.path().to_owned(),
        store,
        tasks: tasks.clone(),
    };
    let ran = work(&bench).await;
    launcher.stop(LAST_STEPS).await;
    tasks.stop(LAST_STEPS).await;
    ran
}

async fn run(
    bench: &Bench,
    job: LabelJob,
    tell: impl FnMut(&Entry, &Progress) -> bool,
) -> anyhow::Result<Labelled> {
    let Bench {
        settings,
        labels,
        store,
        tasks,
        ..
    } = bench;
    let prompt = match &job.prompt {
        AskedPrompt::Own(text) => Prompt::own(text)?,
        AskedPrompt::Named { name, .. } => labels.prompts().named(name)?,
    };
    let question = Question {
        prompt,
        model: job.model,
        account: Account {
            client: settings.client_id.clone(),
            user: settings.user_id.clone(),
            ..Account::of_kind(Account::LABEL)
        },
        timeout: None,
    };
    if job.is_dry {
        let model = question.model.as_deref().or(labels.service().model());
        return Ok(Labelled::Dry {
            worst_usd: labels.worst(&question),
            is_priced: model.is_some(),
        });
    }
    let id = id_of(&job.named_by, &question, labels.is_rehearsal());
    let local = settings.cache_path.join("labels");
    let journal = job.journal.unwrap_or_else(|| {
        // On the workspace it outlives this container.
        let folder = store
            .as_ref()
            .map_or_else(|| local.join("batches"), |store| store.join("labels"));
        folder.join(format!("{id}.jsonl"))
    });
    let plan = Plan {
        id,
        images: job.images,
        question,
        workers: job.workers,
        cache: job.uses_cache.then(|| Cache::new(local.join("known"))),
        asks_again: job.asks_again,
        begins_anew: !job.uses_cache,
        replaces_captions: job.replaces_captions,
        most_usd: job.most_usd,
        busy: Busy::default(),
    };
    let stop = CancellationToken::new();
    let signals = Signals::listen().context("failed to listen for signals")?;
    let signals = obey(signals, stop.clone(), labels.service().clone());
    let ending = tasks.token().clone();
    tasks.spawn("signals", async move {
        ending.run_until_cancelled(signals).await;
    });
    let summary = labels
        .run_batch(&plan, journal, Fence::open(), &stop, tell)
        .await?;
    Ok(Labelled::Done(summary))
}

/// The first signal lets what is under way end, the second one ends it.
async fn obey(mut signals: Signals, stop: CancellationToken, runs: Service) {
    signals.next().await;
    stop.cancel();
    signals.next().await;
    runs.drain(tokio::time::Instant::now()).await;
}

/// The same command is the same batch.
fn id_of(named_by: &str, question: &Question, is_rehearsal: bool) -> String {
    let mut hash = Sha256::new();
    if is_rehearsal {
        hash.update("a rehearsal ");
    }
    hash.update(format!(
        "{named_by:?} {:?} {:?}",
        question.prompt, question.model
    ));
    hex::encode(hash.finalize())[..24].to_owned()
}
