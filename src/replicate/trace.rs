//! Predictions whose id is not known: the answer that had it was lost, or whoever asked was killed
//! before it was written down. They are looked for among the account's newest ones.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{
    Prediction, Replicate, ReplicateError,
    api::{PredictionWire, prediction},
};

/// Replicate's clock may differ from ours by so much, in seconds.
const SKEW: i64 = 120;
/// Pauses before looks at whether a prediction was created although its answer was lost.
const LOOKS: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// What is known of a prediction right before it is asked for: enough to know it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    at: Timestamp,
    /// SHA-256 of what goes in: that itself may hold a customer's words and keys.
    input: String,
}

/// What a look for a prediction found.
#[derive(Debug)]
pub enum Traced {
    Found(Box<Prediction>),
    /// It was never begun.
    Never,
    /// There are more predictions since than a look shows.
    Unknown,
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    next: Option<String>,
    results: Vec<PredictionWire>,
}

impl Sent {
    /// Of a request that goes up now.
    pub fn now(input: &Map<String, Value>) -> Self {
        Self {
            at: Timestamp::now(),
            input: digest(input),
        }
    }

    fn is_it(&self, found: &PredictionWire) -> bool {
        let is_new = created(found).is_some_and(|at| at >= self.earliest());
        is_new && matches!(&found.input, Value::Object(input) if digest(input) == self.input)
    }

    fn earliest(&self) -> i64 {
        self.at.as_second() - SKEW
    }
}

/// In seconds since the epoch.
fn created(found: &PredictionWire) -> Option<i64> {
    let at: Timestamp = found.created_at.as_deref()?.parse().ok()?;
    Some(at.as_second())
}

/// The same for the same values, in whatever order they stand.
fn digest(input: &Map<String, Value>) -> String {
    fn sorted(value: &Value, text: &mut String) {
        match value {
            Value::Object(map) => {
                text.push('{');
                for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
                    text.push_str(&Value::from(key.as_str()).to_string());
                    text.push(':');
                    sorted(value, text);
                    text.push(',');
                }
                text.push('}');
            }
            Value::Array(all) => {
                text.push('[');
                for value in all {
                    sorted(value, text);
                    text.push(',');
                }
                text.push(']');
            }
            plain => text.push_str(&plain.to_string()),
        }
    }
    let mut text = String::new();
    sorted(&Value::Object(input.clone()), &mut text);
    hex::encode(Sha256::digest(text))
}

impl Replicate {
    /// The prediction that was created although its answer was lost just now.
    pub(super) async fn find(&self, sent: &Sent) -> Result<Prediction, ReplicateError> {
        for pause in LOOKS {
            tokio::time::sleep(pause).await;
            let Ok(page) = self.newest().await else {
                continue;
            };
            for found in page.results.into_iter().filter(|found| sent.is_it(found)) {
                let found = prediction(found)?;
                // One that is over may be of an earlier request for the same.
                if !found.status.is_final() {
                    return Ok(found);
                }
            }
        }
        Err(ReplicateError::Unclear)
    }

    /// Looks once for a prediction of which nothing was heard, of an earlier process as a rule.
    /// `others` are known to be of other requests.
    ///
    /// # Errors
    /// [`ReplicateError`].
    pub async fn trace(&self, sent: &Sent, others: &[String]) -> Result<Traced, ReplicateError> {
        let page = self.newest().await?;
        let oldest = page.results.iter().filter_map(created).min();
        let is_whole = page.next.is_none() || oldest.is_some_and(|at| at < sent.earliest());
        let mut ours = page.results.into_iter();
        let ours = ours.find(|found| sent.is_it(found) && !others.contains(&found.id));
        Ok(match ours {
            Some(found) => Traced::Found(Box::new(prediction(found)?)),
            None if is_whole => Traced::Never,
            None => Traced::Unknown,
        })
    }

    async fn newest(&self) -> Result<Page, ReplicateError> {
        self.get("/v1/predictions", "predictions").await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn the_same_input_is_known_again_and_no_other_is() {
        let input = json!({"prompt": "a \"red\" shoe", "size": {"w": 1, "h": [2, 3]}, "n": 1.5});
        let sent = Sent::now(&map(&input));
        let wire = |input: &Value, age: i64| -> PredictionWire {
            let at = Timestamp::from_second(sent.at.as_second() - age).unwrap();
            serde_json::from_value(json!({"id": "p", "input": input, "created_at": at.to_string()}))
                .unwrap()
        };
        let turned: Value =
            serde_json::from_str(r#"{"n":1.5,"size":{"h":[2,3],"w":1},"prompt":"a \"red\" shoe"}"#)
                .unwrap();
        assert!(sent.is_it(&wire(&turned, -3)) && sent.is_it(&wire(&turned, SKEW - 1)));
        assert!(!sent.is_it(&wire(&turned, SKEW + 60)), "of long before");
        for other in [
            json!({}),
            json!({"prompt": "a red shoe"}),
            json!({"prompt": "a \"red\" shoe", "size": {"w": 1, "h": [3, 2]}, "n": 1.5}),
        ] {
            assert!(!sent.is_it(&wire(&other, 0)), "{other}");
        }
        let kept = serde_json::to_string(&sent).unwrap();
        assert!(!kept.contains("shoe"), "{kept}");
    }
}
