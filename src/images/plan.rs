//! Which model makes an image, and what goes into it. Nothing is paid here.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{ImageError, ImageWish, Images, MAX_COUNT};
use crate::replicate::{Brand, Model, ModelName, Price};

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

/// A model, and what goes into it.
pub(super) struct Plan {
    pub(super) model: Model,
    pub(super) input: Map<String, Value>,
    /// So many predictions of it.
    pub(super) runs: usize,
    /// So many images of all that they make.
    pub(super) count: usize,
    /// What one costs, where somebody says so.
    pub(super) price: Option<Price>,
    /// Longest prediction.
    pub(super) limit: Duration,
}

impl Plan {
    /// The most that one prediction may cost.
    pub(super) fn worst(&self) -> Option<f64> {
        let asked = self.input.get(COUNT_PARAM).and_then(Value::as_u64);
        let images = asked.unwrap_or(MAX_COUNT as u64);
        Some(self.price?.worst(self.limit, images))
    }
}

impl Images {
    /// Finds the model and fills its parameters; what does not fit is told before anything is paid.
    pub(super) async fn plan(&self, wish: &ImageWish, brand: &Brand) -> Result<Plan, ImageError> {
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
            // Also where the operator's settings ask for another number.
            true if wish.count > 1 || input.contains_key(COUNT_PARAM) => {
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
        // Who sets the parameter itself means it.
        let set = wish.params.get(COUNT_PARAM).and_then(Value::as_u64);
        let set = set.and_then(|set| usize::try_from(set).ok()).unwrap_or(0);
        Ok(Plan {
            count: wish.count.max(set).min(MAX_COUNT),
            model,
            input,
            runs,
            price: settings.price,
            limit: settings.timeout.unwrap_or(inner.timeout),
        })
    }
}
