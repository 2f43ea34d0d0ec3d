//! What a prediction costs, where that can be known.
//!
//! Replicate tells no price by its API: a model is paid by the second of a machine that only its
//! page names, or by the image or run. So the operator says which; else nothing is said but the time.

use serde::Serialize;

/// US dollars a second of each kind of machine, as replicate.com/pricing had them in November 2026.
const HARDWARE: &[(&str, f64)] = &[
    ("cpu", 0.000_100),
    ("cpu-small", 0.000_025),
    ("gpu-t4", 0.000_225),
    ("gpu-a40-small", 0.000_575),
    ("gpu-a40-large", 0.000_725),
    ("gpu-a40-large-2x", 0.001_450),
    ("gpu-l40s", 0.000_975),
    ("gpu-l40s-2x", 0.001_950),
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
#[derive(Debug, Clone, Copy, PartialEq)]
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
}
