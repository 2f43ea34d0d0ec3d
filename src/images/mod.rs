//! Images made for a site: by a model on Replicate, with the client's own LoRA, checked and made
//! small, described, and put into the site as one undoable turn.
//!
//! ```text
//! wish ─► thread and folder ─► model, parameters ─► prediction ─► picture ─► alt text ─┬► a turn of greenroom's own
//!                              nothing is paid up to here ──┘                            └► an agent's turn that places it
//! ```
//!
//! All that takes long is done before the turn begins, so that nobody's turn waits for it. What is
//! paid is noted (`note`) and reserved in the ledger before it is begun, and settled when it is over
//! (`pay`). A stop of the call, or of the container, cancels the prediction. After a kill the next
//! start ends what nobody waits for any more and settles it; where the call has an idempotency key the
//! same call goes on with it instead of paying again. The token stays in here: no agent and no site
//! sees it.

mod note;
mod pay;
mod place;
mod plan;
mod words;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use serde_json::{Map, Value};
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Secret,
    domain::{Account, Author, TurnKind, TurnMode, TurnResult, Usage},
    identity::{ThreadKey, TurnId},
    label::Labels,
    lease::LeaseError,
    picture::{self, Picture, PictureError},
    replicate::{ModelConfigs, Replicate, ReplicateError, Status},
    supervisor::{
        Brought, ExecuteRequest, Operation, OperationAnswer, OperationRequest, SiteChange,
        SiteEdit, Supervisor, SupervisorError,
    },
    task::{NamedLocks, Tasks},
    turn::TurnRecord,
    usage::{Breach, Denied, Ledger, Warning},
};
use note::{Note, Notes};

/// Images of one call.
pub const MAX_COUNT: usize = 4;
/// Longest prompt and placing instruction, in bytes.
pub const MAX_TEXT: usize = 8 << 10;
/// Longest alt text, in characters.
pub const MAX_ALT: usize = 300;
/// Calls at once; more wait. Each holds a few pictures in memory.
const AT_ONCE: usize = 2;

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
    /// Of the lease on such a note.
    pub lease: Duration,
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
    notes: Notes,
    /// Notes that somebody of this process is at, so that two calls of one key pay once.
    noted: NamedLocks<String>,
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

/// How far it is.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageNews {
    /// Of the prediction that makes it, from its beginning on.
    Prediction {
        id: String,
        status: Status,
        percent: Option<u8>,
    },
    /// A budget is nearly used up by it.
    Warning(Warning),
}

/// Hears how far it is.
pub type Tell<'a> = &'a mut (dyn FnMut(ImageNews) + Send);

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
    #[error(transparent)]
    Notes(LeaseError),
    /// By whoever asked for it.
    #[error("it was cancelled before anything of the site was changed")]
    Cancelled,
}

/// An image that lies ready.
struct Ready {
    path: String,
    picture: Picture,
    alt: String,
    alt_by: &'static str,
    rating: Option<&'static str>,
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
            notes: Notes {
                store: settings.store.clone(),
                lease: settings.lease,
                tasks: tasks.clone(),
            },
            settings,
            supervisor,
            labels,
            ledger,
            replicate: OnceCell::new(),
            at_once: Semaphore::new(AT_ONCE),
            noted: NamedLocks::default(),
            tasks,
        }))
    }

    /// Makes images and puts them into the site. `stop` ends that, and what is being made, as long as
    /// nothing is put into the site; `tell` hears how far it is.
    ///
    /// Not to be dropped before it is done: what was begun would stay unsettled.
    ///
    /// # Errors
    /// [`ImageError`]; then the site is as it was.
    pub async fn make(
        &self,
        wish: ImageWish,
        stop: &CancellationToken,
        tell: Tell<'_>,
    ) -> Result<ImageAnswer, ImageError> {
        let inner = &self.0;
        // A key may stand for a turn of another call than this kind's: nothing is paid for that.
        if let Some(call) = &wish.idempotency_key {
            let seen = inner.supervisor.seen(&wish.key, call);
            if let Some(turn) = self.unless(stop, seen).await?? {
                // One that is under way is waited for.
                let is_turn = wish.instruction.is_some() || turn.is_live();
                return self.seen(turn.file().id(), is_turn).await;
            }
        }
        if let Some(folder) = &wish.folder
            && !place::is_folder(folder)
        {
            return Err(ImageError::Folder);
        }
        let name = note::name(&wish.key, wish.idempotency_key.as_deref());
        let _noted = self.unless(stop, inner.noted.lock(name.clone())).await?;
        let slot = self.unless(stop, inner.at_once.acquire()).await?;
        let _slot = slot.expect("it is never closed");
        let mut note = inner.notes.open(&name).await.map_err(|error| match error {
            LeaseError::Held { .. } => SupervisorError::BusyElsewhere.into(),
            error => ImageError::Notes(error),
        })?;
        let answer = self.make_noted(wish, &mut note, stop, tell).await;
        note.close().await;
        answer
    }

    /// Waits for something, unless it is stopped before.
    async fn unless<T>(
        &self,
        stop: &CancellationToken,
        work: impl Future<Output = T>,
    ) -> Result<T, ImageError> {
        let done = stop.run_until_cancelled(work).await;
        done.ok_or_else(|| self.stopped())
    }

    fn stopped(&self) -> ImageError {
        match self.0.supervisor.is_draining() {
            true => SupervisorError::Draining.into(),
            false => ImageError::Cancelled,
        }
    }

    async fn make_noted(
        &self,
        wish: ImageWish,
        note: &mut Note,
        stop: &CancellationToken,
        tell: Tell<'_>,
    ) -> Result<ImageAnswer, ImageError> {
        let inner = &self.0;
        if let Some(turn) = &note.known.turn
            && let Ok(id) = turn.parse::<TurnId>()
        {
            return self.seen(&id, wish.instruction.is_some()).await;
        }
        note.known.account = Some(account(&wish.key, Account::IMAGES));
        note.known.is_kept = wish.idempotency_key.is_some();
        // Also whether there is such a thread, and whether it is ours.
        let look = |files: &crate::repository::SiteFiles<'_>| place::folder(files.paths());
        let looked = inner.supervisor.look_at_site(&wish.key, None, look);
        let usual = self.unless(stop, looked).await??;
        let folder = wish.folder.clone().unwrap_or(usual);
        let brand = inner.settings.configs.brand(&wish.key.client)?;
        let plan = self.unless(stop, self.plan(&wish, &brand)).await??;
        let made = self.pay(&wish.key, &plan, note, stop, tell).await?;
        if made.files.is_empty() {
            return Err(ImageError::NoImage);
        }
        let mut ready = Vec::new();
        let mut usage = Usage {
            cost_usd: made.cost_usd.unwrap_or_default(),
            ..Usage::default()
        };
        for file in &made.files {
            let picture = picture::for_site(file.clone()).await?;
            let described = self.describe(&wish, &folder, picture, &mut usage);
            ready.push(self.unless(stop, described).await?);
        }
        let report = words::report(&wish, &plan, &made, &ready);
        let answer = self.put(wish, ready, usage, report, made.left).await?;
        note.known.turn = Some(match &answer {
            ImageAnswer::Done(turn) => turn.turn_id.to_string(),
            ImageAnswer::Turn(record) => record.file().id().to_string(),
        });
        if note.known.is_kept
            && let Err(error) = note.write().await
        {
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

    /// Puts them into the site.
    async fn put(
        &self,
        wish: ImageWish,
        ready: Vec<Ready>,
        usage: Usage,
        report: Value,
        left: usize,
    ) -> Result<ImageAnswer, ImageError> {
        let supervisor = &self.0.supervisor;
        let Some(instruction) = &wish.instruction else {
            let title = words::title(&wish.prompt, ready.len());
            let text = words::said(&ready, left);
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
        let instruction = words::placing(instruction, &ready);
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
                usage: Some(usage),
            })
            .await?;
        Ok(ImageAnswer::Turn(record))
    }
}
