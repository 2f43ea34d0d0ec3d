//! Images made for a site: by a model on Replicate, with the client's own LoRA, checked and made
//! small, described, and put into the site as one undoable turn.
//!
//! ```text
//! wish ─► thread and folder ─► model, parameters ─► prediction ─► picture ─► alt text ─┬► a turn of greenroom's own
//!                              nothing is paid up to here ──┘                            └► an agent's turn that places it
//! ```
//!
//! All that takes long is done before the turn begins, so that nobody's turn waits for it. Whoever asks
//! and goes away, or a stop of the container, cancels the prediction; a killed container leaves it to
//! the deadline that Replicate has. Where the call has an idempotency key its predictions are noted
//! (`job`), and the same call goes on with them instead of paying again. The token stays in here: no
//! agent and no site sees it.

mod job;
mod place;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Map, Value, json};
use tokio::sync::{OnceCell, Semaphore};

use crate::{
    config::Secret,
    domain::{Account, Author, TurnKind, TurnMode, TurnResult, Usage},
    identity::{ThreadKey, TurnId},
    label::{DEFAULT, Labels, Question},
    picture::{self, Picture, PictureError},
    replicate::{
        Brand, Model, ModelConfigs, ModelName, ModelSettings, Prediction, Replicate,
        ReplicateError, Status,
    },
    supervisor::{
        Brought, ExecuteRequest, Operation, OperationAnswer, OperationRequest, SiteChange,
        SiteEdit, Supervisor, SupervisorError,
    },
    task::{NamedLocks, Tasks},
    text,
    turn::TurnRecord,
    usage::{Breach, Denied, Ledger},
};
use job::Note;

/// Images of one call.
pub const MAX_COUNT: usize = 4;
/// Longest prompt and placing instruction, in bytes.
pub const MAX_TEXT: usize = 8 << 10;
/// Longest alt text, in characters.
pub const MAX_ALT: usize = 300;
/// Largest file that a model may make.
const MAX_MADE: u64 = 32 << 20;
/// Calls at once; more wait. Each holds a few pictures in memory.
const AT_ONCE: usize = 2;
/// Where a client's LoRA goes, as the models that take one call it.
const LORA_PARAMS: [&str; 6] = [
    "lora_weights",
    "extra_lora",
    "hf_lora",
    "lora",
    "lora_url",
    "lora_path",
];
/// How many images one prediction makes, for the models that can make some.
const COUNT_PARAM: &str = "num_outputs";

/// What images are made by.
#[derive(Debug)]
pub struct ImageSettings {
    pub base_url: String,
    /// `None`: no images are made.
    pub token: Option<Secret>,
    /// What the operator says of models and clients.
    pub configs: ModelConfigs,
    /// For clients that have none of their own.
    pub model: Option<String>,
    pub lora: Option<String>,
    /// Longest prediction.
    pub timeout: Duration,
    /// Where it is noted what was paid.
    pub store: PathBuf,
}

/// Makes images. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: ImageSettings,
    supervisor: Supervisor,
    labels: Labels,
    ledger: Ledger,
    replicate: OnceCell<Replicate>,
    at_once: Semaphore,
    /// So that two calls of one thread's key pay once.
    keyed: NamedLocks<(ThreadKey, String)>,
    tasks: Tasks,
}

/// What somebody wants.
#[derive(Debug, Clone)]
pub struct ImageWish {
    pub key: ThreadKey,
    pub prompt: String,
    /// Where it is to be shown, in words for the agent; without it the image only lies in the site.
    pub instruction: Option<String>,
    pub count: usize,
    pub model: Option<String>,
    pub params: Map<String, Value>,
    /// Else a model describes the image.
    pub alt: Option<String>,
    /// Else where the site's images are.
    pub folder: Option<String>,
    pub author: Option<Author>,
    pub idempotency_key: Option<String>,
    pub request_id: Option<String>,
}

/// What came of it.
#[derive(Debug)]
pub enum ImageAnswer {
    /// A turn of greenroom's own, done.
    Done(Box<TurnResult>),
    /// A turn of the agent, accepted.
    Turn(TurnRecord),
}

/// Why there is no image. Each sentence says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("images are off here: the operator has to set REPLICATE_API_TOKEN")]
    Off,
    #[error("no model is set for images: name one as model, or let the operator set IMAGE_MODEL")]
    NoModel,
    #[error(
        "the client's LoRA is set and {model} has no parameter for it: name a model that takes one, or \
         let the operator say its lora_param in config/model_configs.yaml"
    )]
    NoLora { model: String },
    #[error("folder: images go below src, public or static, into a folder of a plain name")]
    Folder,
    #[error(transparent)]
    Replicate(#[from] ReplicateError),
    #[error("the model made no image; look at its parameters")]
    NoImage,
    #[error("what the model made is no image that can be used: {0}")]
    Picture(#[from] PictureError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error("{0}")]
    OverBudget(Breach),
    #[error("what is left of the budgets cannot be read")]
    Budgets(#[source] Denied),
    #[error("failed to write down what was paid")]
    Note(#[source] io::Error),
}

/// An image that lies ready.
struct Ready {
    path: String,
    picture: Picture,
    alt: String,
    alt_by: &'static str,
    rating: Option<&'static str>,
}

/// A model, and what goes into it.
struct Plan {
    model: Model,
    settings: ModelSettings,
    input: Map<String, Value>,
    /// So many predictions of it.
    runs: usize,
}

/// What was paid for, and what it gave.
#[derive(Default)]
struct Made {
    files: Vec<Bytes>,
    predictions: Vec<String>,
    predict_seconds: f64,
    cost_usd: Option<f64>,
}

fn account(key: &ThreadKey, kind: &'static str) -> Account {
    Account {
        client: Some(key.client.clone()),
        user: Some(key.user.clone()),
        thread: Some(key.thread.clone()),
        ..Account::of_kind(kind)
    }
}

impl Images {
    /// See [`ImageSettings`].
    pub fn new(
        settings: ImageSettings,
        supervisor: Supervisor,
        labels: Labels,
        ledger: Ledger,
        tasks: Tasks,
    ) -> Self {
        Self(Arc::new(Inner {
            settings,
            supervisor,
            labels,
            ledger,
            replicate: OnceCell::new(),
            at_once: Semaphore::new(AT_ONCE),
            keyed: NamedLocks::default(),
            tasks,
        }))
    }

    /// Makes images and puts them into the site. Dropping the future cancels what is being made.
    ///
    /// # Errors
    /// [`ImageError`]; then the site is as it was.
    pub async fn make(&self, wish: ImageWish) -> Result<ImageAnswer, ImageError> {
        let inner = &self.0;
        if let Some(folder) = &wish.folder
            && !place::is_folder(folder)
        {
            return Err(ImageError::Folder);
        }
        let call = wish.idempotency_key.as_deref();
        let _turn = match call {
            Some(call) => Some(inner.keyed.lock((wish.key.clone(), call.to_owned())).await),
            None => None,
        };
        let _slot = inner.at_once.acquire().await.expect("it is never closed");
        let note = Note::open(&inner.settings.store, &wish.key, call).await;
        let mut note = note.map_err(ImageError::Note)?;
        if let Some(turn) = &note.known.turn
            && let Ok(id) = turn.parse::<TurnId>()
        {
            return self.seen(&id, wish.instruction.is_some()).await;
        }
        // Also whether there is such a thread, and whether it is ours.
        let look = |files: &crate::repository::SiteFiles<'_>| place::folder(files.paths());
        let usual = inner.supervisor.look_at_site(&wish.key, None, look).await?;
        let folder = wish.folder.clone().unwrap_or(usual);
        let brand = inner.settings.configs.brand(&wish.key.client)?;
        let plan = self.plan(&wish, &brand).await?;
        let made = self.pay(&wish.key, &plan, &mut note).await?;
        if made.files.is_empty() {
            return Err(ImageError::NoImage);
        }
        let mut ready = Vec::new();
        let mut usage = Usage::default();
        for file in made.files.iter().take(MAX_COUNT) {
            let picture = picture::for_site(file.clone()).await?;
            ready.push(self.describe(&wish, &folder, picture, &mut usage).await);
        }
        usage.cost_usd += made.cost_usd.unwrap_or_default();
        let report = report(&wish, &plan, &made, &ready);
        let answer = self.put(wish, ready, usage, report).await?;
        note.known.turn = Some(match &answer {
            ImageAnswer::Done(turn) => turn.turn_id.to_string(),
            ImageAnswer::Turn(record) => record.file().id().to_string(),
        });
        if let Err(error) = note.write().await {
            tracing::warn!(%error, "failed to write down which turn an image became");
        }
        Ok(answer)
    }

    /// The turn of the same call before.
    async fn seen(&self, id: &TurnId, is_placed: bool) -> Result<ImageAnswer, ImageError> {
        let supervisor = &self.0.supervisor;
        Ok(match is_placed {
            true => ImageAnswer::Turn(supervisor.turn(id).await?),
            false => ImageAnswer::Done(Box::new(supervisor.turn_result(id).await?)),
        })
    }

    async fn replicate(&self) -> Result<&Replicate, ImageError> {
        let settings = &self.0.settings;
        let token = settings.token.clone().ok_or(ImageError::Off)?;
        let connect = || Replicate::connect(&settings.base_url, Some(token));
        Ok(self.0.replicate.get_or_try_init(connect).await?)
    }

    /// Finds the model and fills its parameters; what does not fit is told before anything is paid.
    async fn plan(&self, wish: &ImageWish, brand: &Brand) -> Result<Plan, ImageError> {
        let inner = &self.0.settings;
        let replicate = self.replicate().await?;
        let named = wish
            .model
            .as_ref()
            .or(brand.model.as_ref())
            .or(inner.model.as_ref());
        let mut name: ModelName = named.ok_or(ImageError::NoModel)?.parse()?;
        let settings = inner.configs.of(&name)?;
        if let (Some(version), None) = (&settings.version, name.version()) {
            name = name.at(version)?;
        }
        let model = replicate.model(name).await?;
        let takes = |param: &str| {
            model
                .schema
                .as_ref()
                .is_none_or(|schema| schema.takes(param))
        };
        let knows = |param: &str| {
            model
                .schema
                .as_ref()
                .is_some_and(|schema| schema.takes(param))
        };
        let mut input = settings.params.clone();
        input.extend(brand.params.clone());
        let prompt = match &brand.trigger {
            Some(word) if !wish.prompt.contains(word.as_str()) => format!("{word} {}", wish.prompt),
            _ => wish.prompt.clone(),
        };
        let prompt_param = settings.prompt_param.as_deref().unwrap_or("prompt");
        input.insert(prompt_param.to_owned(), prompt.into());
        if let Some(lora) = brand.lora.as_ref().or(inner.lora.as_ref()) {
            let named = settings.lora_param.as_deref().filter(|param| takes(param));
            let found = named.or_else(|| LORA_PARAMS.into_iter().find(|param| knows(param)));
            match found {
                Some(param) => {
                    input.insert(param.to_owned(), lora.as_str().into());
                }
                // Who names a model may mean one without it.
                None if wish.model.is_some() => {}
                None => {
                    return Err(ImageError::NoLora {
                        model: model.name.to_string(),
                    });
                }
            }
        }
        let runs = match knows(COUNT_PARAM) {
            true if wish.count > 1 => {
                input.insert(COUNT_PARAM.to_owned(), wish.count.into());
                1
            }
            true => 1,
            false => wish.count,
        };
        input.extend(wish.params.clone());
        input.retain(|_, value| !value.is_null());
        if let Some(schema) = &model.schema {
            schema.check(&input)?;
        }
        Ok(Plan {
            model,
            settings,
            input,
            runs,
        })
    }

    /// Runs the model, or goes on with what an earlier call of the same key has begun.
    async fn pay(&self, key: &ThreadKey, plan: &Plan, note: &mut Note) -> Result<Made, ImageError> {
        let replicate = self.replicate().await?;
        let limit = plan.settings.timeout.unwrap_or(self.0.settings.timeout);
        let stop = self.0.supervisor.draining();
        let mut made = Made {
            cost_usd: plan.settings.price.map(|_| 0.0),
            ..Made::default()
        };
        for run in 0..plan.runs {
            let begun = match self.noted(replicate, note, run).await? {
                Some(begun) => begun,
                None => {
                    self.check_budgets(key).await?;
                    // By itself, so that a caller who goes away leaves nothing of unknown fate.
                    let begun = self.begin(replicate, plan, limit).await?;
                    note.known.predictions.push(begun.id.clone());
                    begun
                }
            };
            let id = begun.id.clone();
            let mut guard = Unfollowed {
                replicate: replicate.clone(),
                tasks: self.0.tasks.clone(),
                id: Some(id.clone()),
            };
            note.write().await.map_err(ImageError::Note)?;
            if note.is_kept() {
                // Whoever asks with a key asks again.
                guard.id = None;
            }
            let followed = replicate.follow(begun, limit, &stop, |_| {}).await;
            guard.id = None;
            let prediction = match followed {
                Ok(prediction) => prediction,
                Err(ReplicateError::Cancelled { .. }) if stop.is_cancelled() => {
                    return Err(SupervisorError::Draining.into());
                }
                Err(error) => return Err(error.into()),
            };
            tracing::info!(
                prediction = id,
                seconds = prediction.measured.predict_seconds,
                "an image was made"
            );
            self.take(replicate, plan, &prediction, &mut made).await?;
        }
        Ok(made)
    }

    /// Whoever has used up a budget makes no images either.
    async fn check_budgets(&self, key: &ThreadKey) -> Result<(), ImageError> {
        let meter = self.0.ledger.meter(account(key, "images"));
        meter.check().await.map_err(|denied| match denied {
            Denied::OverBudget(breach) | Denied::Held(breach) => ImageError::OverBudget(breach),
            other => ImageError::Budgets(other),
        })
    }

    /// What an earlier call of the same key has begun and what still may give something.
    async fn noted(
        &self,
        replicate: &Replicate,
        note: &mut Note,
        run: usize,
    ) -> Result<Option<Prediction>, ImageError> {
        let Some(id) = note.known.predictions.get(run) else {
            return Ok(None);
        };
        let is_of_use = |prediction: &Prediction| {
            !prediction.status.is_final()
                // What it made is gone after an hour, with its address.
                || prediction.status == Status::Succeeded && !prediction.output.is_null()
        };
        match replicate.prediction(id).await {
            Ok(prediction) if is_of_use(&prediction) => Ok(Some(prediction)),
            Ok(_) | Err(ReplicateError::NotFound { .. }) => {
                note.known.predictions.truncate(run);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Starts a prediction in a task that outlives its caller; one that nobody follows is cancelled.
    async fn begin(
        &self,
        replicate: &Replicate,
        plan: &Plan,
        limit: Duration,
    ) -> Result<Prediction, ImageError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (replicate, model) = (replicate.clone(), plan.model.clone());
        let input = plan.input.clone();
        self.0.tasks.spawn("starting a prediction", async move {
            let created = replicate.create(&model, &input, limit).await;
            if let Err(Ok(unwanted)) = sender.send(created)
                && let Err(error) = replicate.cancel(&unwanted.id).await
            {
                tracing::warn!(prediction = unwanted.id, %error, "a prediction was not cancelled");
            }
        });
        match receiver.await {
            Ok(created) => Ok(created?),
            Err(_) => Err(SupervisorError::Draining.into()),
        }
    }

    async fn take(
        &self,
        replicate: &Replicate,
        plan: &Plan,
        prediction: &Prediction,
        made: &mut Made,
    ) -> Result<(), ImageError> {
        let output = prediction.made(&plan.model);
        made.files.extend(replicate.fetch(&output, MAX_MADE).await?);
        made.predictions.push(prediction.id.clone());
        made.predict_seconds += prediction.measured.predict_seconds.unwrap_or_default();
        let cost = plan
            .settings
            .price
            .and_then(|price| price.cost(&prediction.measured));
        made.cost_usd = made.cost_usd.zip(cost).map(|(sum, cost)| sum + cost);
        Ok(())
    }

    /// Gives a picture its place and its words.
    async fn describe(
        &self,
        wish: &ImageWish,
        folder: &str,
        picture: Picture,
        usage: &mut Usage,
    ) -> Ready {
        let mark = uuid::Uuid::new_v4().simple().to_string();
        let ending = match picture.media_type {
            "image/png" => "png",
            "image/webp" => "webp",
            _ => "jpg",
        };
        let name = place::name(&wish.prompt, &mark[..8]);
        let path = format!("{folder}/{name}.{ending}");
        let ready = |alt: &str, alt_by, rating| Ready {
            path: path.clone(),
            alt: plain_alt(alt),
            alt_by,
            rating,
            picture: picture.clone(),
        };
        if let Some(alt) = &wish.alt {
            return ready(alt, "caller", None);
        }
        let labels = &self.0.labels;
        let prompts = labels.prompts();
        let prompt = prompts
            .named("alt_text")
            .or_else(|_| prompts.named(DEFAULT));
        let question = prompt.map(|prompt| Question {
            prompt,
            model: None,
            account: account(&wish.key, Account::LABEL),
            timeout: None,
        });
        let labelled = match question {
            Ok(question) => {
                let label = labels.label(picture.data.clone().into(), &question).await;
                label.map_err(|failure| {
                    add(usage, &failure.usage);
                    failure.to_string()
                })
            }
            Err(error) => Err(error.to_string()),
        };
        match labelled {
            Ok(label) => {
                add(usage, &label.usage);
                ready(
                    &label.description,
                    "label",
                    Some(label.nsfw_rating.as_str()),
                )
            }
            Err(error) => {
                tracing::warn!(
                    error,
                    "an image was made and not described; its prompt stands for it"
                );
                ready(&wish.prompt, "prompt", None)
            }
        }
    }

    /// Puts them into the site.
    async fn put(
        &self,
        wish: ImageWish,
        ready: Vec<Ready>,
        usage: Usage,
        report: Value,
    ) -> Result<ImageAnswer, ImageError> {
        let supervisor = &self.0.supervisor;
        let Some(instruction) = &wish.instruction else {
            let title = title(&wish.prompt, ready.len());
            let text = said(&ready);
            let files: Vec<_> = ready
                .into_iter()
                .map(|one| (one.path, Some(one.picture.data)))
                .collect();
            let edit = SiteEdit::new(TurnKind::Images, move |_| {
                Ok(SiteChange {
                    title: title.clone(),
                    text: text.clone(),
                    files: files.clone(),
                    usage,
                    report: report.clone(),
                })
            });
            let asked = supervisor.operate(OperationRequest {
                key: wish.key,
                operation: Operation::Edit(edit),
                expected_head: None,
                dry_run: false,
                author: wish.author,
                idempotency_key: wish.idempotency_key,
                request_id: wish.request_id,
            });
            return match asked.await? {
                OperationAnswer::Done(turn) => Ok(ImageAnswer::Done(turn)),
                _ => Err(SupervisorError::Internal("an image became no turn".to_owned()).into()),
            };
        };
        let instruction = placing(instruction, &ready);
        let brings = ready.into_iter().map(|one| Brought {
            path: one.path,
            content: one.picture.data.into(),
        });
        let record = supervisor
            .execute(ExecuteRequest {
                key: wish.key,
                instruction,
                mode: TurnMode::Execute,
                model: None,
                timeout: None,
                author: wish.author,
                idempotency_key: wish.idempotency_key,
                request_id: wish.request_id,
                brings: brings.collect(),
                report: Some(report),
            })
            .await?;
        Ok(ImageAnswer::Turn(record))
    }
}

fn add(sum: &mut Usage, more: &Usage) {
    sum.input_tokens += more.input_tokens;
    sum.output_tokens += more.output_tokens;
    sum.cache_read_tokens += more.cache_read_tokens;
    sum.cache_creation_tokens += more.cache_creation_tokens;
    sum.cost_usd += more.cost_usd;
}

/// Cancels a prediction that nobody follows any more.
struct Unfollowed {
    replicate: Replicate,
    tasks: Tasks,
    id: Option<String>,
}

impl Drop for Unfollowed {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let replicate = self.replicate.clone();
        self.tasks.spawn("cancelling a prediction", async move {
            if let Err(error) = replicate.cancel(&id).await {
                tracing::warn!(prediction = id, %error, "a prediction was not cancelled");
            }
        });
    }
}

/// A model's words as an attribute's value: one line, not too long.
fn plain_alt(text: &str) -> String {
    let line: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .collect();
    let line: Vec<&str> = line.into_iter().filter(|word| !word.is_empty()).collect();
    let line = line.join(" ");
    if line.chars().count() <= MAX_ALT {
        return line;
    }
    let start: String = line.chars().take(MAX_ALT).collect();
    // At the end of a sentence, else of a word.
    let end = start
        .rfind(". ")
        .map(|at| at + 1)
        .or_else(|| start.rfind(' '));
    start[..end.unwrap_or(start.len())].to_owned()
}

fn title(prompt: &str, count: usize) -> String {
    let line: Vec<&str> = prompt.split_whitespace().collect();
    let line = line.join(" ");
    let what = match count {
        1 => "an image".to_owned(),
        many => format!("{many} images"),
    };
    format!("Add {what}: {}", text::cut(&line, 100))
}

fn said(ready: &[Ready]) -> String {
    let lines = ready.iter().map(|one| format!("{}: {}", one.path, one.alt));
    format!(
        "These images are in the site now, and on no page yet:\n{}",
        lines.collect::<Vec<_>>().join("\n")
    )
}

/// What the agent is told. The words of models stand in it as JSON texts, on one line each.
fn placing(instruction: &str, ready: &[Ready]) -> String {
    let mut text = instruction.trim_end().to_owned();
    text.push_str(
        "\n\nThe image files for this were made just now and lie in the site already. Use them as the \
         site uses its other images, each with its alt text as it stands here. Do not move, rename or \
         copy them.",
    );
    for one in ready {
        text.push_str(&format!(
            "\n- {} ({} by {} pixels), alt text: {}",
            one.path,
            one.picture.width,
            one.picture.height,
            Value::from(one.alt.as_str())
        ));
    }
    text
}

fn report(wish: &ImageWish, plan: &Plan, made: &Made, ready: &[Ready]) -> Value {
    let images = ready.iter().map(|one| {
        json!({
            "path": one.path,
            "alt": one.alt,
            "altBy": one.alt_by,
            "nsfwRating": one.rating,
            "mediaType": one.picture.media_type,
            "width": one.picture.width,
            "height": one.picture.height,
            "bytes": one.picture.data.len(),
        })
    });
    json!({
        "prompt": wish.prompt,
        "model": plan.model.name.to_string(),
        "version": plan.model.version,
        "predictions": made.predictions,
        "predictSeconds": made.predict_seconds,
        "costUsd": made.cost_usd,
        "images": images.collect::<Vec<_>>(),
    })
}
