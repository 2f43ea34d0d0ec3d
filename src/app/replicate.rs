//! `greenroom replicate run-model`: a model on Replicate, without a supervisor.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Loaded,
    lifecycle::Signals,
    process,
    replicate::{
        FileInput, Model, ModelConfigs, ModelName, ModelSettings, News, Prediction, Replicate,
        ReplicateError, Saved, Schema,
    },
    task::Tasks,
};

/// Longest prediction, unless somebody says otherwise: machines take minutes to start.
const TIMEOUT: Duration = Duration::from_secs(1800);
/// Largest file that is saved.
const MAX_SAVED: u64 = 4 << 30;
/// What stands for a file until it is sent.
const TO_COME: &str = "data:,";
/// What ending tasks may take.
const LAST_STEPS: Duration = Duration::from_secs(1);

/// What is to be run.
#[derive(Debug, Clone)]
pub struct ModelJob {
    pub model: ModelName,
    /// Names and values as they were typed.
    pub params: Vec<(String, String)>,
    pub files: Vec<FileInput>,
    /// Settings of models; else those of the setting.
    pub configs: Option<PathBuf>,
    /// Where files go.
    pub output: PathBuf,
    pub timeout: Option<Duration>,
    /// Check, and run nothing.
    pub is_dry: bool,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelNews {
    /// The parameters are fine; this version runs.
    Checked {
        version: Option<String>,
    },
    /// Nothing was checked: there is no schema.
    Unchecked,
    /// A word in the settings of models means nothing.
    UnknownSetting(String),
    Sending(PathBuf),
    /// From here on it costs money.
    Created {
        id: String,
    },
    Prediction(News),
    Saving(usize),
}

/// What came of it.
#[derive(Debug)]
pub enum ModelRan {
    Done(Box<Run>),
    /// What would be sent.
    Dry {
        version: Option<String>,
        input: Map<String, Value>,
    },
}

/// A prediction that succeeded.
#[derive(Debug)]
pub struct Run {
    pub model: ModelName,
    pub version: Option<String>,
    pub prediction: Prediction,
    /// What it said, where that is text.
    pub text: Option<String>,
    /// What is neither text nor files.
    pub other: Option<Value>,
    pub saved: Vec<Saved>,
    /// Why files are missing.
    pub not_saved: Vec<ReplicateError>,
    /// US dollars, where the price is known.
    pub cost_usd: Option<f64>,
    /// Whether somebody said what it costs.
    pub is_priced: bool,
}

/// Runs a model. `tell` hears how far it is.
///
/// # Errors
/// What keeps it from succeeding, as one line that says what to do.
pub async fn run_model(
    loaded: Loaded,
    job: ModelJob,
    mut tell: impl FnMut(ModelNews),
) -> anyhow::Result<ModelRan> {
    process::harden_self().context("failed to protect the process")?;
    let tasks = Tasks::new();
    let [stop, leave] = [CancellationToken::new(), CancellationToken::new()];
    let signals = Signals::listen().context("failed to listen for signals")?;
    let obeying = obey(signals, stop.clone(), leave.clone());
    let ending = tasks.token().clone();
    tasks.spawn("signals", async move {
        ending.run_until_cancelled(obeying).await;
    });
    let ran = run(&loaded, job, &stop, &leave, &mut tell).await;
    tasks.stop(LAST_STEPS).await;
    ran
}

/// The first signal cancels the prediction, the second one leaves it.
async fn obey(mut signals: Signals, stop: CancellationToken, leave: CancellationToken) {
    signals.next().await;
    stop.cancel();
    signals.next().await;
    leave.cancel();
}

async fn run(
    loaded: &Loaded,
    job: ModelJob,
    stop: &CancellationToken,
    leave: &CancellationToken,
    tell: &mut impl FnMut(ModelNews),
) -> anyhow::Result<ModelRan> {
    let preparing = prepare(loaded, &job, tell);
    let Some(ready) = stop.run_until_cancelled(preparing).await else {
        bail!("stopped; nothing was run");
    };
    let Ready {
        replicate,
        model,
        settings,
        input,
    } = ready?;
    if job.is_dry {
        return Ok(ModelRan::Dry {
            version: model.version,
            input,
        });
    }
    let limit = job.timeout.or(settings.timeout).unwrap_or(TIMEOUT);
    // Not to be stopped between its request and its answer: nobody would know what runs then.
    let created = tokio::select! {
        created = replicate.create(&model, &input, limit) => created?,
        () = leave.cancelled() => bail!(ReplicateError::Unclear),
    };
    let id = created.id.clone();
    tell(ModelNews::Created { id: id.clone() });
    let working = async {
        let following = replicate.follow(created, limit, stop, |news| {
            tell(ModelNews::Prediction(news));
        });
        let prediction = following.await?;
        save(&replicate, model, prediction, &settings, &job.output, tell).await
    };
    tokio::select! {
        done = working => Ok(ModelRan::Done(Box::new(done?))),
        () = leave.cancelled() => bail!(
            "left at once: prediction {id} may still run and be paid; see replicate.com/p/{id}"
        ),
    }
}

/// A model that can be run, with what goes into it.
struct Ready {
    replicate: Replicate,
    model: Model,
    settings: ModelSettings,
    input: Map<String, Value>,
}

/// Everything that costs nothing.
async fn prepare(
    loaded: &Loaded,
    job: &ModelJob,
    tell: &mut impl FnMut(ModelNews),
) -> anyhow::Result<Ready> {
    let settings = model_settings(loaded, job)?;
    for word in &settings.unknown {
        tell(ModelNews::UnknownSetting(word.clone()));
    }
    for file in &job.files {
        file.check().await?;
    }
    if !job.is_dry {
        writable(&job.output)?;
    }
    let name = match (&settings.version, job.model.version()) {
        (Some(version), None) => job.model.clone().at(version)?,
        _ => job.model.clone(),
    };
    let token = loaded.settings.replicate_api_token.clone();
    let replicate = Replicate::connect(&loaded.settings.replicate_base_url, token).await?;
    let model = replicate.model(name).await?;
    let schema = model.schema.clone().unwrap_or_default();
    let places = job.files.iter().map(|_| TO_COME.to_owned()).collect();
    let mut input = filled(&schema, &settings, job, places);
    match model.schema {
        Some(_) => {
            schema.check(&input)?;
            tell(ModelNews::Checked {
                version: model.version.clone(),
            });
        }
        None => tell(ModelNews::Unchecked),
    }
    if !job.is_dry && !job.files.is_empty() {
        let mut sent = Vec::new();
        for file in &job.files {
            tell(ModelNews::Sending(file.path.clone()));
            sent.push(replicate.send_file(file).await?);
        }
        input = filled(&schema, &settings, job, sent);
    }
    Ok(Ready {
        replicate,
        model,
        settings,
        input,
    })
}

/// What was typed over what the settings say, with the files at their places.
fn filled(
    schema: &Schema,
    settings: &ModelSettings,
    job: &ModelJob,
    files: Vec<String>,
) -> Map<String, Value> {
    let files = job.files.iter().zip(files);
    let files = files.map(|(file, sent)| (file.param.clone(), sent));
    let texts: Vec<(String, String)> = job.params.iter().cloned().chain(files).collect();
    let mut input = settings.params.clone();
    input.extend(schema.convert(&texts));
    input
}

fn model_settings(loaded: &Loaded, job: &ModelJob) -> anyhow::Result<ModelSettings> {
    let named = job.configs.clone();
    let file = named.or_else(|| loaded.settings.model_configs_file.clone());
    let usual = loaded.surroundings.cwd.join("config/model_configs.yaml");
    let file = file.or_else(|| usual.is_file().then_some(usual));
    Ok(match file {
        Some(file) => ModelConfigs::read(&file)?.of(&job.model)?,
        None => ModelSettings::default(),
    })
}

/// A folder that takes no files is found out before anything is paid.
fn writable(folder: &Path) -> anyhow::Result<()> {
    let context = || format!("--output {}", folder.display());
    std::fs::create_dir_all(folder).with_context(context)?;
    let probe = folder.join(format!(".greenroom-{}", uuid::Uuid::new_v4().simple()));
    std::fs::File::create_new(&probe).with_context(context)?;
    std::fs::remove_file(&probe).with_context(context)
}

async fn save(
    replicate: &Replicate,
    model: Model,
    prediction: Prediction,
    settings: &ModelSettings,
    folder: &Path,
    tell: &mut impl FnMut(ModelNews),
) -> anyhow::Result<Run> {
    let made = prediction.made(&model);
    if made.files() > 0 {
        tell(ModelNews::Saving(made.files()));
    }
    let saved = replicate
        .save(&model, &prediction, &made, folder, MAX_SAVED)
        .await;
    let cost_usd = settings
        .price
        .and_then(|price| price.cost(&prediction.measured));
    Ok(Run {
        model: model.name,
        version: model.version,
        prediction,
        text: made.text,
        other: made.other,
        saved: saved.files,
        not_saved: saved.failed,
        cost_usd,
        is_priced: settings.price.is_some(),
    })
}
