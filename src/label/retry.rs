//! What is done about a failure that cost nothing.

use std::time::Duration;

use super::LabelError;
use crate::service::{Remains, ServiceError};

/// What to do.
pub(super) enum Next {
    GiveUp,
    /// It would be the same with every other image.
    Stop,
    /// After this pause, if it says one.
    Again(Option<Duration>),
}

/// Pure: a failure that was paid for is not asked about here.
pub(super) fn next(error: &LabelError) -> Next {
    let LabelError::Service(error) = error else {
        return Next::GiveUp;
    };
    match error {
        ServiceError::Draining
        | ServiceError::Cancelled
        | ServiceError::NotInstalled
        | ServiceError::OverBudget { .. }
        | ServiceError::CredentialRefused(_) => Next::Stop,
        ServiceError::CircuitOpen { retry_after } => Next::Again(Some(*retry_after)),
        ServiceError::QueueFull
        | ServiceError::Start(_)
        | ServiceError::Folder(_)
        | ServiceError::TimedOut { .. } => Next::Again(None),
        ServiceError::Failed { remains, .. } => match refused_with(remains) {
            // The request itself is wrong: the image, mostly.
            Some(status) if (400..500).contains(&status) && status != 429 && status != 408 => {
                Next::GiveUp
            }
            _ => Next::Again(None),
        },
        ServiceError::TooMuchOutput | ServiceError::Exceeded { .. } => Next::GiveUp,
    }
}

/// The API's status, as the CLI tells it at its end.
fn refused_with(remains: &Remains) -> Option<u64> {
    let last = remains.output.trim().lines().next_back()?;
    let result: serde_json::Value = serde_json::from_str(last).ok()?;
    result["api_error_status"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{picture::PictureError, process::Exit};

    #[test]
    fn what_costs_nothing_is_tried_again_where_that_helps() {
        let failed = |status: u64| {
            let result = serde_json::json!({"type": "result", "api_error_status": status});
            LabelError::Service(ServiceError::Failed {
                exit: Exit {
                    code: Some(1),
                    signal: None,
                },
                remains: Remains {
                    output: format!("{{}}\n{result}\n"),
                    ..Remains::default()
                },
            })
        };
        for (status, again) in [
            (400, false),
            (403, false),
            (413, false),
            (429, true),
            (500, true),
            (529, true),
        ] {
            let goes_on = matches!(next(&failed(status)), Next::Again(_));
            assert_eq!(goes_on, again, "{status}");
        }
        let full = LabelError::Service(ServiceError::QueueFull);
        assert!(matches!(next(&full), Next::Again(None)));
        let draining = LabelError::Service(ServiceError::Draining);
        assert!(matches!(next(&draining), Next::Stop));
        let picture = LabelError::Picture(PictureError::Empty);
        assert!(matches!(next(&picture), Next::GiveUp));
    }
}
