//! Models on Replicate: run one, follow it, fetch what it made.
//!
//! ```text
//! name ─► model and its schema ─► parameters checked ─► files sent ─► prediction ─► followed ─► outputs saved
//!                    nothing is paid up to here ──────────────────┘
//! ```
//!
//! Creating a prediction costs money, so that one request is sent again only where Replicate cannot
//! have begun with it; where that is in doubt the prediction is looked for (`api`). It is created
//! without waiting for its end (`Prefer: wait`): its id is known at once, so that it can be cancelled
//! and noted. Replicate gets the deadline too, and ends what nobody follows any more.
//!
//! Nothing that Replicate or a model's author says is believed: answers are bounded, addresses are our
//! own or checked, files get names of ours, the token goes to the API's own address and nowhere else.

mod api;
mod file;
mod follow;
mod name;
mod output;
mod price;
mod save;
mod schema;
mod settings;
mod trace;

use std::{io, path::PathBuf};

pub use api::{Model, Prediction, Replicate, Status};
pub use file::FileInput;
pub use follow::News;
pub use name::ModelName;
pub use output::Made;
pub use price::{Measured, Price};
pub use save::{Saved, SavedAll};
pub use schema::{Problems, Schema};
pub use settings::{Brand, ModelConfigs, ModelSettings};
pub use trace::{Sent, Traced};

/// Why a model was not run, or gave nothing. Each sentence says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReplicateError {
    #[error("{text:?} is no model: {why}")]
    BadName { text: String, why: &'static str },
    /// Nothing was sent.
    #[error("{0}")]
    Input(Problems),
    #[error(
        "REPLICATE_API_TOKEN is not set: make one at replicate.com/account/api-tokens and set it in the environment or in .env"
    )]
    NoToken,
    #[error(
        "Replicate refused the token: set REPLICATE_API_TOKEN to one of replicate.com/account/api-tokens"
    )]
    Unauthenticated,
    #[error("Replicate wants to be paid first ({detail}): see replicate.com/account/billing")]
    Unpaid { detail: String },
    #[error(
        "Replicate knows no {what}: look for its name at replicate.com/explore; a private one needs its owner's token"
    )]
    NotFound { what: String },
    #[error("Replicate refuses ({status}): {detail}")]
    Refused { status: u16, detail: String },
    #[error("Replicate takes no more requests for now ({detail}): try again later")]
    Throttled { detail: String },
    #[error(
        "Replicate is not reached at {host}: look at the network, at HTTPS_PROXY and at REPLICATE_BASE_URL, and try again"
    )]
    Unreachable {
        host: String,
        #[source]
        source: Option<reqwest::Error>,
    },
    #[error(
        "Replicate has a fault of its own ({status}): see replicatestatus.com and try again later"
    )]
    Faulty { status: u16 },
    /// A prediction may run and be paid, and nothing is known of it.
    #[error(
        "whether Replicate began is not known, since its answer was lost: look at replicate.com/predictions before you try again, or it may be paid twice"
    )]
    Unclear,
    #[error(
        "Replicate's answer about {what} cannot be read: it is no answer of its API; look at REPLICATE_BASE_URL"
    )]
    Answer { what: &'static str },
    #[error("prediction {id} failed: {error}")]
    Failed { id: String, error: String },
    #[error("prediction {id} was cancelled")]
    Cancelled { id: String },
    #[error(
        "prediction {id} took longer than {seconds} s and was cancelled; give it more time, or ask for less"
    )]
    TimedOut { id: String, seconds: u64 },
    #[error(
        "prediction {id} may still run and be paid, since it could not be cancelled: see replicate.com/p/{id}"
    )]
    NotCancelled {
        id: String,
        #[source]
        source: Box<ReplicateError>,
    },
    #[error("{}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {why}", path.display())]
    BadFile { path: PathBuf, why: String },
    #[error("an output was not fetched: {why}")]
    Download { why: String },
    #[error("{}: {why}", file.display())]
    Configs { file: PathBuf, why: String },
    /// There is no way that the token may go.
    #[error("{why}")]
    Https { why: String },
}

impl ReplicateError {
    /// May the same request succeed a little later?
    fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Faulty { .. } | Self::Throttled { .. }
        )
    }
}
