//! What a prediction costs, where that can be known.
//!
//! Replicate tells no price by its API: a model is paid by the second of a machine that only its
//! page names, or by the image or run. So the operator says which; else nothing is said but the time.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Prediction;

/// US dollars a second of each kind of machine, as replicate.com/pricing had them in 2026. Machines with
/// several L40S have two names: the page had `gpu-2x-l40s` first, then `gpu-l40s-2x`, which is also
/// what the API names among its kinds of hardware. `cpu-small` is on the later page alone.
const HARDWARE: &[(&str, f64)] = &[
    ("cpu", 0.000_100),
    ("cpu-small", 0.000_025),
    ("gpu-t4", 0.000_225),
    ("gpu-a40-small", 0.000_575),
    ("gpu-a40-large", 0.000_725),
    ("gpu-a40-large-2x", 0.001_450),
    ("gpu-l40s", 0.000_975),
    ("gpu-l40s-2x", 0.001_950),
    ("gpu-l40s-4x", 0.003_900),
    ("gpu-l40s-8x", 0.007_800),
    ("gpu-2x-l40s", 0.001_950),
    ("gpu-4x-l40s", 0.003_900),
    ("gpu-8x-l40s", 0.007_800),
    ("gpu-a100-large", 0.001_400),
    ("gpu-a100-large-2x", 0.002_800),
    ("gpu-a100-large-4x", 0.005_600),
    ("gpu-a100-large-8x", 0.011_200),
    ("gpu-h100", 0.001_525),
    ("gpu-h100-2x", 0.003_050),
    ("gpu-h100-4x", 0.006_100),
    ("gpu-h100-8x", 0.012_200),
];

/// How a model is paid, in US dollars.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Price {
    PerSecond(f64),
    PerImage(f64),
    PerRun(f64),
}

/// What a prediction did, as far as it is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// Seconds that the model worked: what is paid.
    pub predict_seconds: Option<f64>,
    /// Seconds from the creation to the end, waiting and starting of a machine included.
    pub total_seconds: Option<f64>,
    /// Images that were made.
    pub images: u64,
}

impl Price {
    /// The price of a kind of machine.
    pub fn of_hardware(name: &str) -> Option<Self> {
        let found = HARDWARE.iter().find(|(known, _)| *known == name);
        found.map(|(_, usd)| Self::PerSecond(*usd))
    }

    /// Kinds of machines that have one.
    pub fn hardware() -> impl Iterator<Item = &'static str> {
        HARDWARE.iter().map(|(name, _)| *name)
    }

    /// The most that one prediction may cost which may take so long and make so many images.
    pub fn worst(self, limit: Duration, images: u64) -> f64 {
        match self {
            Self::PerSecond(usd) => limit.as_secs_f64() * usd,
            Self::PerImage(usd) => images as f64 * usd,
            Self::PerRun(usd) => usd,
        }
    }

    /// What a prediction cost that is over, in US dollars; `None` where its time is not known. One
    /// that failed or was cancelled is paid for the time that it ran.
    pub fn cost_of(self, prediction: &Prediction) -> Option<f64> {
        match prediction.has_run() {
            true => self.cost(&prediction.measured),
            false => Some(0.0),
        }
    }

    /// In US dollars; `None` where the time is not known.
    pub fn cost(self, measured: &Measured) -> Option<f64> {
        match self {
            Self::PerSecond(usd) => measured.predict_seconds.map(|seconds| seconds * usd),
            Self::PerImage(usd) => Some(measured.images as f64 * usd),
            Self::PerRun(usd) => Some(usd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicate::Status;

    #[test]
    fn a_cost_is_told_only_where_it_is_known() {
        let measured = Measured {
            predict_seconds: Some(10.0),
            total_seconds: Some(60.0),
            images: 2,
        };
        let l40s = Price::of_hardware("gpu-l40s").unwrap();
        assert!((l40s.cost(&measured).unwrap() - 0.009_75).abs() < 1e-9);
        assert_eq!(Price::PerImage(0.003).cost(&measured), Some(0.006));
        assert_eq!(Price::PerRun(0.05).cost(&measured), Some(0.05));
        assert_eq!(l40s.cost(&Measured::default()), None);
        assert_eq!(Price::of_hardware("gpu-of-next-year"), None);
    }

    #[test]
    fn what_never_ran_costs_nothing_and_what_ran_does_however_it_ended() {
        let ended = |status, predict_seconds| Prediction {
            id: "p".to_owned(),
            status,
            output: serde_json::Value::Null,
            logs: String::new(),
            error: None,
            measured: Measured {
                predict_seconds,
                ..Measured::default()
            },
        };
        let second = Price::PerSecond(0.5);
        for (status, seconds, cost) in [
            (Status::Succeeded, Some(2.0), Some(1.0)),
            (Status::Succeeded, None, None),
            (Status::Failed, Some(2.0), Some(1.0)),
            (Status::Canceled, Some(2.0), Some(1.0)),
            (Status::Canceled, None, Some(0.0)),
        ] {
            assert_eq!(second.cost_of(&ended(status, seconds)), cost, "{status:?}");
        }
        let run = Price::PerRun(0.3);
        assert_eq!(run.cost_of(&ended(Status::Canceled, None)), Some(0.0));
        assert_eq!(run.cost_of(&ended(Status::Failed, Some(1.0))), Some(0.3));
        let limit = Duration::from_secs(60);
        assert_eq!(
            [second, Price::PerImage(0.1), run].map(|price| price.worst(limit, 2)),
            [30.0, 0.2, 0.3]
        );
    }
}
