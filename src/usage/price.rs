//! What tokens cost: a table of the provider's list prices, which a file of the operator's may
//! override model by model.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::Deserialize;

use super::Tokens;

/// The table that comes with the program.
const BUILT_IN: &str = include_str!("prices.yaml");
/// A price list is small.
const MAX_BYTES: u64 = 1 << 20;

/// A price list that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PriceError {
    #[error("failed to read the price list {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the price list {path} cannot be used: {problem}")]
    Parse { path: String, problem: String },
}

/// US dollars per million tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Price {
    input: f64,
    output: f64,
    cache_write_5m: f64,
    cache_write_1h: f64,
    cache_read: f64,
}

impl Price {
    fn of(&self, tokens: &Tokens) -> f64 {
        let parts = [
            (tokens.input, self.input),
            (tokens.output, self.output),
            (tokens.cache_write_5m, self.cache_write_5m),
            (tokens.cache_write_1h, self.cache_write_1h),
            (tokens.cache_read, self.cache_read),
        ];
        parts
            .iter()
            .map(|(n, price)| *n as f64 * price)
            .sum::<f64>()
            / 1e6
    }

    fn is_sane(&self) -> bool {
        [
            self.input,
            self.output,
            self.cache_write_5m,
            self.cache_write_1h,
            self.cache_read,
        ]
        .iter()
        .all(|price| price.is_finite() && *price >= 0.0)
    }

    /// The dearest way to put a token into a prompt.
    fn worst_input(&self) -> f64 {
        self.input
            .max(self.cache_write_5m)
            .max(self.cache_write_1h)
            .max(self.cache_read)
    }
}

/// A model's prices. A prompt longer than `over` costs `long` as a whole.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rates {
    short: Price,
    long: Option<(u64, Price)>,
}

/// A table's entry as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    input: f64,
    output: f64,
    #[serde(rename = "cacheWrite5m")]
    cache_write_5m: Option<f64>,
    #[serde(rename = "cacheWrite1h")]
    cache_write_1h: Option<f64>,
    cache_read: Option<f64>,
    long: Option<Box<Written>>,
    over: Option<u64>,
}

impl Written {
    /// What is left out follows from the price of the input, as the provider's own rules are.
    fn price(&self) -> Price {
        Price {
            input: self.input,
            output: self.output,
            cache_write_5m: self.cache_write_5m.unwrap_or(self.input * 1.25),
            cache_write_1h: self.cache_write_1h.unwrap_or(self.input * 2.0),
            cache_read: self.cache_read.unwrap_or(self.input * 0.1),
        }
    }

    fn rates(&self) -> Result<Rates, &'static str> {
        let long = match &self.long {
            None => None,
            Some(long) => Some((long.over.ok_or("long needs over, in tokens")?, long.price())),
        };
        let rates = Rates {
            short: self.price(),
            long,
        };
        let is_sane = rates.short.is_sane() && rates.long.is_none_or(|(_, long)| long.is_sane());
        is_sane
            .then_some(rates)
            .ok_or("a price is a number of dollars, 0 or more")
    }
}

/// What a request cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// US dollars.
    pub usd: f64,
    /// The table knows the model; else the dearest price it has was taken.
    pub is_known: bool,
}

/// The price table.
#[derive(Debug, Clone, PartialEq)]
pub struct Prices {
    models: BTreeMap<String, Rates>,
    /// For models that nobody knows.
    dearest: Rates,
}

impl Default for Prices {
    fn default() -> Self {
        Self::parse(BUILT_IN, BTreeMap::new()).expect("the built-in table is tested")
    }
}

impl Prices {
    /// The built-in table with a file's entries over it (YAML, or JSON). Blocking.
    ///
    /// # Errors
    /// [`PriceError`], for a person.
    pub fn load(path: &Path) -> Result<Self, PriceError> {
        let shown = path.display().to_string();
        let read = || {
            if fs::metadata(path)?.len() > MAX_BYTES {
                return Err(io::Error::other("it is larger than 1 MiB"));
            }
            fs::read_to_string(path)
        };
        let text = read().map_err(|source| PriceError::Read {
            path: shown.clone(),
            source,
        })?;
        Self::parse(&text, Self::default().models).map_err(|problem| PriceError::Parse {
            path: shown,
            problem,
        })
    }

    fn parse(text: &str, mut models: BTreeMap<String, Rates>) -> Result<Self, String> {
        let written: BTreeMap<String, Written> =
            serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
        for (model, written) in written {
            let rates = written
                .rates()
                .map_err(|problem| format!("{model}: {problem}"))?;
            models.insert(model.to_ascii_lowercase(), rates);
        }
        let worst = |rates: &Rates| {
            let price = rates.long.map_or(rates.short, |(_, long)| long);
            price.input + price.output
        };
        let dearest = models
            .values()
            .copied()
            .max_by(|a, b| worst(a).total_cmp(&worst(b)))
            .ok_or("it names no model")?;
        Ok(Self { models, dearest })
    }

    /// The model's prices, by the longest name in the table that stands for it.
    fn rates(&self, model: &str) -> (Rates, bool) {
        let model = model.to_ascii_lowercase();
        // Other platforms put their own words before the name (`us.anthropic.claude-…`).
        let bare = model
            .find("claude-")
            .map_or(model.as_str(), |at| &model[at..]);
        let known = self
            .models
            .iter()
            .filter(|(name, _)| stands_for(name, &model) || stands_for(name, bare))
            .max_by_key(|(name, _)| name.len());
        match known {
            Some((_, rates)) => (*rates, true),
            None => (self.dearest, false),
        }
    }

    /// What a request cost.
    pub fn cost(&self, model: &str, tokens: &Tokens) -> Cost {
        let (rates, is_known) = self.rates(model);
        let price = match rates.long {
            Some((over, long)) if tokens.prompt() > over => long,
            _ => rates.short,
        };
        Cost {
            usd: price.of(tokens),
            is_known,
        }
    }

    /// The most that a request may cost: every token of its prompt is written to the cache at the
    /// dearest price, and its answer is as long as it may be.
    pub fn worst(&self, model: &str, prompt: u64, answer: u64) -> f64 {
        let (rates, _) = self.rates(model);
        let price = match rates.long {
            Some((over, long)) if prompt > over => long,
            _ => rates.short,
        };
        (prompt as f64 * price.worst_input() + answer as f64 * price.output) / 1e6
    }
}

/// Is the model what the table's name means: itself, dated or with a suffix? A number after the
/// name is another version.
fn stands_for(name: &str, model: &str) -> bool {
    let Some(rest) = model.strip_prefix(name) else {
        return false;
    };
    let digits = rest.strip_prefix(['-', '.']).map_or(0, |rest| {
        rest.bytes().take_while(u8::is_ascii_digit).count()
    });
    // A date has eight.
    let is_version = (1..8).contains(&digits);
    let goes_on = rest.starts_with(|c: char| c.is_ascii_alphanumeric());
    !is_version && !goes_on
}

#[cfg(test)]
mod tests {
    use super::*;

    fn million(part: fn(&mut Tokens) -> &mut u64) -> Tokens {
        let mut tokens = Tokens::default();
        *part(&mut tokens) = 1_000_000;
        tokens
    }

    #[test]
    fn list_prices_by_model_and_kind() {
        let prices = Prices::default();
        for (model, expected) in [
            ("claude-opus-4-5-20251101", [5.0, 25.0, 6.25, 10.0, 0.5]),
            ("claude-opus-4-1", [15.0, 75.0, 18.75, 30.0, 1.5]),
            ("claude-opus-4-20250514", [15.0, 75.0, 18.75, 30.0, 1.5]),
            ("claude-opus-5-5[1m]", [4.0, 20.0, 5.0, 8.0, 0.2]),
            ("claude-sonnet-5", [2.0, 10.0, 2.5, 4.0, 0.2]),
            ("claude-sonnet-4-6", [3.0, 15.0, 3.75, 6.0, 0.3]),
            (
                "us.anthropic.claude-haiku-4-5-20251001-v1:0",
                [1.0, 5.0, 1.25, 2.0, 0.1],
            ),
            ("claude-3-5-haiku-latest", [0.8, 4.0, 1.0, 1.6, 0.08]),
        ] {
            let cost = [
                million(|t| &mut t.input),
                million(|t| &mut t.output),
                million(|t| &mut t.cache_write_5m),
                million(|t| &mut t.cache_write_1h),
                million(|t| &mut t.cache_read),
            ]
            .map(|tokens| {
                let cost = prices.cost(model, &tokens);
                assert!(cost.is_known, "{model}");
                cost.usd
            });
            // The long band of a model begins below a million.
            if prices.rates(model).0.long.is_none() {
                assert_eq!(cost, expected, "{model}");
            }
        }
    }

    #[test]
    fn a_long_prompt_costs_its_own_price_as_a_whole() {
        let prices = Prices::default();
        let tokens = |input| Tokens {
            input,
            cache_read: 90_000,
            output: 1_000_000,
            ..Tokens::default()
        };
        let short = prices.cost("claude-haiku-5-5", &tokens(10_000)).usd;
        let long = prices.cost("claude-haiku-5-5", &tokens(10_001)).usd;
        assert!((short - 0.5019).abs() < 1e-9, "{short}");
        assert!((long - 2.509_500_5).abs() < 1e-6, "{long}");
    }

    #[test]
    fn an_unknown_model_costs_the_dearest_price() {
        let prices = Prices::default();
        for model in [
            "claude-opus-4-9",
            "gpt-4",
            "",
            "claude-sonnet-4-50",
            "claude-opus",
        ] {
            let cost = prices.cost(model, &million(|t| &mut t.output));
            assert_eq!((cost.usd, cost.is_known), (75.0, false), "{model}");
        }
    }

    #[test]
    fn the_worst_case_is_never_less_than_the_cost() {
        let prices = Prices::default();
        for model in prices.models.keys() {
            for (prompt, answer) in [(1000, 10), (150_000, 128_000), (900_000, 1)] {
                let worst = prices.worst(model, prompt, answer);
                for part in [
                    |t: &mut Tokens, n| t.input = n,
                    |t: &mut Tokens, n| t.cache_write_5m = n,
                    |t: &mut Tokens, n| t.cache_write_1h = n,
                    |t: &mut Tokens, n| t.cache_read = n,
                ] {
                    let mut tokens = Tokens {
                        output: answer,
                        ..Tokens::default()
                    };
                    part(&mut tokens, prompt);
                    assert!(prices.cost(model, &tokens).usd <= worst + 1e-12, "{model}");
                }
            }
        }
    }

    #[test]
    fn a_file_overrides_single_models() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prices.json");
        fs::write(
            &path,
            r#"{"claude-opus-5": {"input": 1, "output": 2}, "house-model": {"input": 100, "output": 200, "cacheRead": 0}}"#,
        )
        .unwrap();
        let prices = Prices::load(&path).unwrap();
        assert_eq!(
            prices.cost("claude-opus-5", &million(|t| &mut t.input)).usd,
            1.0
        );
        assert_eq!(
            prices
                .cost("claude-opus-5", &million(|t| &mut t.cache_write_1h))
                .usd,
            2.0
        );
        assert_eq!(
            prices
                .cost("house-model", &million(|t| &mut t.cache_read))
                .usd,
            0.0
        );
        assert_eq!(
            prices
                .cost("claude-sonnet-5", &million(|t| &mut t.input))
                .usd,
            2.0
        );
        assert_eq!(
            prices.cost("nobody", &million(|t| &mut t.output)).usd,
            200.0
        );
        for bad in [
            "[]",
            "a: {input: 1}",
            "a: {input: -1, output: 1}",
            "a: {input: 1, output: 1, cachRead: 1}",
            "a: {input: 1, output: 1, long: {input: 2, output: 2}}",
        ] {
            fs::write(&path, bad).unwrap();
            assert!(Prices::load(&path).is_err(), "{bad}");
        }
    }
}
