//! `config/model_configs.yaml`: what the operator says of a model.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value};

use super::{ModelName, Price, ReplicateError, name::is_version};

/// Largest file; nobody writes one by hand.
const MAX_FILE: u64 = 1 << 20;
/// Longest time that may be given to one prediction: a day.
const MAX_SECONDS: u64 = 24 * 3600;

/// Settings of models by name.
#[derive(Debug, Clone, Default)]
pub struct ModelConfigs {
    file: PathBuf,
    models: Map<String, Value>,
}

/// Settings of one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSettings {
    /// Used where the name of the model names none.
    pub version: Option<String>,
    /// Parameters that a call does not give.
    pub params: Map<String, Value>,
    pub price: Option<Price>,
    /// Longest run.
    pub timeout: Option<Duration>,
    /// The parameters that mean these things to this model, for images of a site.
    pub prompt_param: Option<String>,
    pub lora_param: Option<String>,
    /// Words in the file that mean nothing here.
    pub unknown: Vec<String>,
}

impl ModelConfigs {
    /// Reads a file: `models:` with a map of models, or the map itself.
    ///
    /// # Errors
    /// If it cannot be read, or is no map of models.
    pub fn read(file: &Path) -> Result<Self, ReplicateError> {
        let wrong = |why: String| ReplicateError::Configs {
            file: file.to_owned(),
            why,
        };
        let failed = |source| ReplicateError::File {
            path: file.to_owned(),
            source,
        };
        let about = fs::metadata(file).map_err(failed)?;
        if !about.is_file() || about.len() > MAX_FILE {
            return Err(wrong("it is no file of at most 1 MiB".to_owned()));
        }
        let text = fs::read_to_string(file).map_err(failed)?;
        let value: Value = serde_yaml_ng::from_str(&text).map_err(|error| {
            let place = error.location();
            let line = place.map_or_else(String::new, |at| format!(" (line {})", at.line()));
            wrong(format!("it is no YAML{line}"))
        })?;
        let models = match value {
            Value::Null => Map::new(),
            Value::Object(mut map) => match map.remove("models") {
                Some(Value::Object(models)) => models,
                None => map,
                Some(_) => return Err(wrong("models: it has to be a map".to_owned())),
            },
            _ => return Err(wrong("it is no map of models".to_owned())),
        };
        Ok(Self {
            file: file.to_owned(),
            models,
        })
    }

    /// What it says of a model; nothing where it does not name it. A version of a model that is not
    /// named by itself has the settings of its model.
    ///
    /// # Errors
    /// If that cannot be meant.
    pub fn of(&self, name: &ModelName) -> Result<ModelSettings, ReplicateError> {
        let full = name.full_name();
        let names = [Some(name.to_string()), full];
        let found = names
            .iter()
            .flatten()
            .find_map(|name| Some((name, self.models.get(name)?)));
        let Some((name, value)) = found else {
            return Ok(ModelSettings::default());
        };
        parse(value).map_err(|why| ReplicateError::Configs {
            file: self.file.clone(),
            why: format!("{name}: {why}"),
        })
    }
}

fn parse(value: &Value) -> Result<ModelSettings, String> {
    let mut settings = ModelSettings::default();
    let map = match value {
        Value::Null => return Ok(settings),
        Value::Object(map) => map,
        _ => return Err("it has to be a map".to_owned()),
    };
    for (key, value) in map {
        let text = || match value.as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(format!("{key}: it has to be a text")),
        };
        match key.as_str() {
            "version" => {
                let version = text()?;
                if !is_version(&version) {
                    return Err("version: it has to be 64 hexadecimal digits".to_owned());
                }
                settings.version = Some(version);
            }
            "params" | "parameters" | "defaults" | "default_params" | "input" => match value {
                Value::Object(params) => settings.params = params.clone(),
                Value::Null => {}
                _ => return Err(format!("{key}: it has to be a map of parameters")),
            },
            "hardware" => {
                let name = text()?;
                let price = Price::of_hardware(&name).ok_or_else(|| {
                    let known: Vec<&str> = Price::hardware().collect();
                    format!(
                        "hardware: no price of {name:?} is known; say price: {{per_second: USD}}, or one \
                         of {}",
                        known.join(", ")
                    )
                })?;
                // What is said outright wins.
                settings.price.get_or_insert(price);
            }
            "price" => settings.price = Some(price(value)?),
            "timeout_seconds" | "timeout" => {
                let seconds = value.as_u64().filter(|s| (5..=MAX_SECONDS).contains(s));
                let seconds =
                    seconds.ok_or_else(|| format!("{key}: it has to be 5 to {MAX_SECONDS}"))?;
                settings.timeout = Some(Duration::from_secs(seconds));
            }
            "prompt_param" => settings.prompt_param = Some(text()?),
            "lora_param" => settings.lora_param = Some(text()?),
            // People keep notes of their own there.
            "description" | "notes" => {}
            other => settings.unknown.push(other.to_owned()),
        }
    }
    Ok(settings)
}

fn price(value: &Value) -> Result<Price, String> {
    let wrong = || "price: it has to be {per_second: USD}, {per_image: USD} or {per_run: USD}";
    let map = value.as_object().filter(|map| map.len() == 1);
    let (key, usd) = map.and_then(|map| map.iter().next()).ok_or_else(wrong)?;
    let usd = usd.as_f64().filter(|usd| usd.is_finite() && *usd >= 0.0);
    let usd = usd.ok_or_else(wrong)?;
    match key.as_str() {
        "per_second" => Ok(Price::PerSecond(usd)),
        "per_image" => Ok(Price::PerImage(usd)),
        "per_run" => Ok(Price::PerRun(usd)),
        _ => Err(wrong().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn configs(text: &str) -> Result<ModelConfigs, ReplicateError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model_configs.yaml");
        fs::write(&file, text).unwrap();
        ModelConfigs::read(&file)
    }

    const VERSION: &str = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa";

    #[test]
    fn a_model_has_its_settings_and_its_versions_have_them_too() {
        let text = format!(
            "models:\n  acme/shoes:\n    version: {VERSION}\n    params: {{width: 512}}\n    \
             hardware: gpu-l40s\n    timeout_seconds: 90\n    lora_param: extra_lora\n    pramas: {{}}\n"
        );
        let configs = configs(&text).unwrap();
        let settings = configs.of(&"acme/shoes".parse().unwrap()).unwrap();
        assert_eq!(settings.version.as_deref(), Some(VERSION));
        assert_eq!(
            Value::Object(settings.params.clone()),
            json!({"width": 512})
        );
        assert_eq!(settings.price, Price::of_hardware("gpu-l40s"));
        assert_eq!(settings.timeout, Some(Duration::from_secs(90)));
        assert_eq!(settings.lora_param.as_deref(), Some("extra_lora"));
        assert_eq!(settings.unknown, ["pramas"]);
        let pinned = format!("acme/shoes:{VERSION}").parse().unwrap();
        assert_eq!(configs.of(&pinned).unwrap(), settings);
        let other = configs.of(&"acme/boots".parse().unwrap()).unwrap();
        assert_eq!(other, ModelSettings::default());
    }

    #[test]
    fn the_map_may_stand_there_by_itself() {
        let configs = configs("acme/shoes:\n  price: {per_image: 0.04}\n").unwrap();
        let settings = configs.of(&"acme/shoes".parse().unwrap()).unwrap();
        assert_eq!(settings.price, Some(Price::PerImage(0.04)));
    }

    #[test]
    fn what_cannot_be_meant_is_told_with_its_place() {
        for (text, said) in [
            ("- a\n", "no map of models"),
            ("a: [\n", "no YAML (line"),
            ("models: 3\n", "models: it has to be a map"),
            ("acme/shoes: {version: latest}\n", "acme/shoes: version"),
            ("acme/shoes: {price: 0.1}\n", "per_second"),
            ("acme/shoes: {price: {per_second: -1}}\n", "per_second"),
            ("acme/shoes: {hardware: gpu-x}\n", "gpu-l40s"),
            ("acme/shoes: {params: [1]}\n", "map of parameters"),
            ("acme/shoes: {timeout_seconds: 1}\n", "5 to 86400"),
        ] {
            let read = configs(text).and_then(|all| all.of(&"acme/shoes".parse().unwrap()));
            let error = read.unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
