//! Labels of images: what is to be seen, for whom it is fit, and in which words it is found.
//!
//! ```text
//! bytes ─► picture (checked, small, upright) ─► one run of the CLI ─► gate ─► one request ─► label
//! ```
//!
//! Each image has a run of its own: a fresh process with no tools and no session, confined like
//! any other, that gets the image by its standard input. Nothing of an image touches a disk, and
//! two images share nothing; in a batch the next ones get ready while a model thinks ([`pace`]).
//! The [`Gate`] of a run lets one request with one image through: the
//! CLI drops an image that it cannot read and asks about nothing, and it asks again by itself when
//! an answer has not the form that was asked for.
//!
//! **Invariant:** an answer that was not understood is a failure that shows what the model said.
//! Nothing of a label is ever filled in.

mod answer;
mod batch;
mod batches;
mod cache;
mod caption;
mod journal;
mod kept;
mod outcome;
mod pace;
mod prompt;
mod rating;
mod retry;
mod tally;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

pub use batch::{BatchError, Busy, Image, MAX_IMAGES, Plan};
pub use batches::{
    Awake, BatchEvents, BatchSettings, BatchView, Batches, BatchesError, Job, MAX_UPLOADED,
    Standing,
};
pub use cache::Cache;
pub use journal::{Done, Event, EventLine, JournalError};
pub use outcome::{Code, Entry, Failed, Outcome, Progress, Summary};
pub use prompt::{DEFAULT, MAX_PROMPT, Prompt, PromptError, Prompts};
pub use rating::Rating;

use answer::Said;
use journal::Journal;

use crate::{
    domain::{Account, Usage},
    gateway::Gate,
    lease::Fence,
    picture::{self, Picture, PictureError},
    service::{Args, Lean, RunSite, Service, ServiceError, Shot},
};

pub use crate::service::is_model_name;

/// Most tokens of an image that is no larger than [`picture::MAX_SIDE`], by the provider's rule
/// (a token for 750 pixels), with room for one that counts finer.
const MOST_IMAGE_TOKENS: u64 = 5_000;
/// What the CLI adds to a prompt, in bytes; it was 2 kB with 2.1.329.
const CLI_BYTES: usize = 8 << 10;
/// Most tokens of an answer, thinking included.
pub const MAX_ANSWER_TOKENS: u64 = 4_096;

/// What labels are made by.
#[derive(Debug, Clone)]
pub struct LabelSettings {
    /// Runs of its own, apart from those that others ask for; its answers have at most
    /// [`MAX_ANSWER_TOKENS`].
    pub service: Service,
    pub prompts: Prompts,
    /// Longest run, where a question says nothing.
    pub timeout: Duration,
    /// A script answers: what it says is no label of the image for anybody who asks a model.
    pub is_rehearsal: bool,
}

/// Labels images. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Labels {
    settings: Arc<LabelSettings>,
}

/// What is asked about an image, and for whom.
#[derive(Debug, Clone)]
pub struct Question {
    pub prompt: Prompt,
    /// `None`: the service's own.
    pub model: Option<String>,
    /// Who pays.
    pub account: Account,
    /// Longest run; `None`: as it is set.
    pub timeout: Option<Duration>,
}

/// An image's label. The names are those that callers of old read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Label {
    /// Always `success`.
    pub status: Status,
    pub description: String,
    pub nsfw_rating: Rating,
    pub tags: Vec<String>,
    /// What the model said, as it said it.
    pub raw_response: String,
    pub model: String,
    pub usage: Usage,
    /// Of the run.
    #[serde(rename = "durationMs")]
    pub duration_ms: u64,
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Success,
    Error,
}

/// Why an image has no label.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    #[error(transparent)]
    Picture(#[from] PictureError),
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error("{why}; raw_response has its own words")]
    Unreadable { why: &'static str, raw: String },
}

/// An image without a label, and what that cost.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    #[source]
    pub error: LabelError,
    pub usage: Usage,
    /// The upstream answered, wholly or in part: asking again costs again.
    pub is_paid: bool,
}

impl From<PictureError> for Failure {
    fn from(error: PictureError) -> Self {
        Self {
            error: error.into(),
            usage: Usage::default(),
            is_paid: false,
        }
    }
}

/// Awaited once, before the request about an image goes up; an error keeps it here.
type BeforeSending = dyn Fn() -> BoxFuture<'static, Result<(), &'static str>> + Send + Sync;

impl Labels {
    /// See [`LabelSettings`].
    pub fn new(settings: LabelSettings) -> Self {
        Self {
            settings: Arc::new(settings),
        }
    }

    /// The prompts that have a name.
    pub fn prompts(&self) -> &Prompts {
        &self.settings.prompts
    }

    /// Does a script answer, and no model?
    pub fn is_rehearsal(&self) -> bool {
        self.settings.is_rehearsal
    }

    /// The runs that label.
    pub fn service(&self) -> &Service {
        &self.settings.service
    }

    /// The most that one image may cost, in US dollars: there is one request for it.
    pub fn worst(&self, question: &Question) -> f64 {
        let service = &self.settings.service;
        let model = question.model.as_deref().or(service.model());
        service.ledger().worst(
            model.unwrap_or_default(),
            most_prompt(&question.prompt),
            MAX_ANSWER_TOKENS,
        )
    }

    /// Labels an image. Dropping the future ends its run.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn label(&self, image: Bytes, question: &Question) -> Result<Label, Failure> {
        let picture = picture::develop(image).await?;
        let gate = gate(&question.prompt, Arc::new(|| Box::pin(async { Ok(()) })));
        self.ask(&picture, question, gate).await
    }

    /// Labels a batch, over its journal: one that was begun before goes on. To its end, or until
    /// `stop`; then what is under way ends in peace. `tell` hears of each image's outcome, and stops
    /// the batch by answering false.
    ///
    /// # Errors
    /// If the journal cannot be used.
    pub async fn run_batch(
        &self,
        plan: &Plan,
        journal: PathBuf,
        fence: Fence,
        stop: &CancellationToken,
        tell: impl FnMut(&Entry, &Progress) -> bool,
    ) -> Result<Summary, BatchError> {
        let (journal, past) = Journal::open(journal, fence).await?;
        batch::run(self, plan, Arc::new(journal), past, stop, tell).await
    }

    /// The same of a picture that is ready, through a [`gate`].
    async fn ask(
        &self,
        picture: &Picture,
        question: &Question,
        gate: Gate,
    ) -> Result<Label, Failure> {
        let shot = Shot {
            prompt: message(picture, &question.prompt),
            args: Args::from(Lean {
                model: question.model.clone(),
                system: question.prompt.system().to_owned(),
                schema: question.prompt.schema().map(str::to_owned),
            }),
            timeout: question.timeout.unwrap_or(self.settings.timeout),
            account: question.account.clone(),
            gate: Some(gate),
        };
        let ran = self
            .settings
            .service
            .run_alone(shot, RunSite::default())
            .await;
        let usage = ran.usage;
        let failure = |error: LabelError| Failure {
            is_paid: ran.answered > 0,
            error,
            usage,
        };
        let answer = ran.answer.map_err(|error| failure(error.into()))?;
        let said = Said::read(&answer.output);
        let raw = said.raw();
        match said.parse(question.prompt.asks_for_tags()) {
            Ok(parsed) => Ok(Label {
                status: Status::Success,
                description: parsed.description,
                nsfw_rating: parsed.rating,
                tags: parsed.tags,
                raw_response: raw,
                model: said.model.unwrap_or_default(),
                usage,
                duration_ms: u64::try_from(answer.duration.as_millis()).unwrap_or(u64::MAX),
            }),
            Err(why) => Err(failure(LabelError::Unreadable { why, raw })),
        }
    }
}

/// Lets one request with one image through.
fn gate(prompt: &Prompt, before: Arc<BeforeSending>) -> Gate {
    let is_sent = Arc::new(AtomicBool::new(false));
    Gate::new(most_prompt(prompt), move |passing| {
        let (is_sent, before) = (is_sent.clone(), before.clone());
        Box::pin(async move {
            if passing.images != 1 {
                return Err("this run asks about one image, and the request has not one");
            }
            if passing.answered > 0 {
                return Err("this run was answered already");
            }
            // The CLI asks again what the upstream refused: it is the same request still.
            if !is_sent.load(Ordering::Acquire) {
                before().await?;
                is_sent.store(true, Ordering::Release);
            }
            Ok(())
        })
    })
}

/// The most tokens that a prompt of ours has. A text has no more than a third of its bytes.
fn most_prompt(prompt: &Prompt) -> u64 {
    let bytes = prompt.weight() + CLI_BYTES;
    MOST_IMAGE_TOKENS + bytes.div_ceil(3) as u64
}

/// The one line that the CLI reads.
fn message(picture: &Picture, prompt: &Prompt) -> String {
    let source = json!({
        "type": "base64",
        "media_type": picture.media_type,
        "data": STANDARD.encode(&picture.data),
    });
    // The CLI would take one that begins so for a command of its own.
    let text = match prompt.text().starts_with('/') {
        true => format!("Question: {}", prompt.text()),
        false => prompt.text().to_owned(),
    };
    let content = json!([
        {"type": "image", "source": source},
        {"type": "text", "text": text},
    ]);
    let line = json!({"type": "user", "message": {"role": "user", "content": content}});
    format!("{line}\n")
}
