//! What came of an image, and of a batch of them, as it is answered and as it stands in the journal.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Failure, Label, LabelError, Status};
use crate::{domain::Usage, picture::PictureError, service::ServiceError};

/// An image's name and outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Entry {
    pub image: String,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Outcome {
    Labelled {
        #[serde(flatten)]
        label: Box<Label>,
        /// The label of the same bytes, from before: nothing was asked.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cached: bool,
    },
    Failed(Failed),
}

/// An image without a label.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failed {
    /// Always `error`.
    pub status: Status,
    pub code: Code,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_response: Option<String>,
    /// Asking again costs, or may cost, again.
    pub paid: bool,
    pub usage: Usage,
}

/// Why, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    InvalidImage,
    /// The file could not be read.
    NotFound,
    AgentFailed,
    TurnTimeout,
    /// It was asked about when the batch was killed.
    Interrupted,
    /// Something else is in the way that is not the image's.
    Internal,
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// As in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidImage => "invalid_image",
            Self::NotFound => "not_found",
            Self::AgentFailed => "agent_failed",
            Self::TurnTimeout => "turn_timeout",
            Self::Interrupted => "interrupted",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        }
    }
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    pub total: usize,
    /// Of them with an outcome.
    pub done: usize,
    pub success: usize,
    pub failed: usize,
    /// Of the successful ones: labelled without a request.
    pub cached: usize,
    /// US dollars, on all its starts together.
    pub cost_usd: f64,
    pub elapsed_ms: u64,
    /// Images a minute, of this start.
    pub per_minute: f64,
    /// At that rate.
    pub remaining_ms: Option<u64>,
}

/// What came of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    pub batch_id: String,
    pub total: usize,
    pub success: usize,
    pub failed: usize,
    /// Of the successful ones: labelled without a request.
    pub cached: usize,
    /// Of the failed ones: asked about when the batch was killed.
    pub interrupted: usize,
    /// Without an outcome: it stopped before.
    pub left: usize,
    /// Captions that are a person's, and stayed as they are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub captions_kept: usize,
    pub usage: Usage,
    pub duration_ms: u64,
    /// Why it stopped before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Summary {
    /// Has every image an outcome?
    pub fn is_complete(&self) -> bool {
        self.left == 0
    }
}

impl Outcome {
    /// What it cost.
    pub fn usage(&self) -> Usage {
        match self {
            Self::Labelled { label, .. } => label.usage,
            Self::Failed(failed) => failed.usage,
        }
    }

    /// The same for a twin: it costs nothing.
    pub(super) fn free(self) -> Self {
        match self {
            Self::Labelled { mut label, .. } => {
                label.usage = Usage::default();
                Self::Labelled {
                    label,
                    cached: true,
                }
            }
            Self::Failed(failed) => Self::Failed(Failed {
                usage: Usage::default(),
                ..failed
            }),
        }
    }
}

impl Failed {
    fn of(code: Code, message: String) -> Self {
        Self {
            status: Status::Error,
            code,
            message,
            raw_response: None,
            paid: false,
            usage: Usage::default(),
        }
    }

    /// Of an image whose request was under way when the batch was killed.
    pub(super) fn interrupted() -> Self {
        let message = "it was asked about when the batch was killed, and may have been paid; it is \
                       asked about again on request alone (--retry-failed, retryFailed)";
        Self {
            paid: true,
            ..Self::of(Code::Interrupted, message.to_owned())
        }
    }

    pub(super) fn not_read(why: &str) -> Self {
        Self::of(Code::NotFound, format!("the file cannot be read: {why}"))
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        let (code, raw_response) = match failure.error {
            LabelError::Picture(PictureError::Blocking(_)) => (Code::Internal, None),
            LabelError::Picture(_) => (Code::InvalidImage, None),
            LabelError::Unreadable { raw, .. } => (Code::AgentFailed, Some(raw)),
            LabelError::Service(ServiceError::TimedOut { .. }) => (Code::TurnTimeout, None),
            LabelError::Service(ServiceError::Folder(_)) => (Code::Internal, None),
            LabelError::Service(_) => (Code::AgentFailed, None),
        };
        Self {
            raw_response,
            paid: failure.is_paid,
            usage: failure.usage,
            ..Self::of(code, message)
        }
    }
}

impl From<PictureError> for Failed {
    fn from(error: PictureError) -> Self {
        Failure::from(error).into()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::label::Rating;

    pub(in crate::label) fn labelled(image: &str) -> Entry {
        let label = Label {
            status: Status::Success,
            description: "A shoe.".into(),
            nsfw_rating: Rating::Safe,
            tags: vec!["shoe".into()],
            raw_response: "…".into(),
            model: "m".into(),
            usage: Usage {
                cost_usd: 0.25,
                ..Usage::default()
            },
            duration_ms: 7,
        };
        Entry {
            image: image.into(),
            outcome: Outcome::Labelled {
                label: Box::new(label),
                cached: false,
            },
        }
    }

    #[test]
    fn an_entry_is_read_as_it_is_written() {
        let failed = Entry {
            image: "b".into(),
            outcome: Outcome::Failed(Failed::not_read("gone")),
        };
        for entry in [labelled("a"), failed] {
            let text = serde_json::to_string(&entry).unwrap();
            assert_eq!(
                serde_json::from_str::<Entry>(&text).unwrap(),
                entry,
                "{text}"
            );
        }
    }
}
