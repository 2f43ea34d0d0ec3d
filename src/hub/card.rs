//! The model card: `README.md`, made of what is published and what the training says of itself.
//!
//! Its last line holds the sum of what stands above, which tells whether somebody edited it since: a
//! card that a person wrote on is that person's, and is kept.

use std::{io::Read, path::Path};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    folder::{LoraFolder, Sample, Training},
    name::ModelName,
    source::open_ordinary,
};

/// The card's name.
pub(super) const CARD: &str = "README.md";
/// Longer settings of a training are not read.
const MAX_CONFIG_BYTES: u64 = 256 * 1024;
/// What one text of the settings may add to the card, in characters.
const MAX_TEXT_CHARS: usize = 1000;
const MARK: &str =
    "<!-- made by greenroom, anew each time it publishes, as long as nobody edits it: ";
const MARK_END: &str = " -->\n";

/// The card of a folder. The same folder always has the same one.
pub(super) fn card(name: &str, folder: &LoraFolder) -> String {
    let training = &folder.training;
    let mut card = String::from(
        "---\npipeline_tag: text-to-image\ntags:\n- lora\n- text-to-image\n- diffusers\n\
         - template:diffusion-lora\n",
    );
    if let Some(base) = &training.base_model {
        card.push_str(&format!("base_model: {}\n", quoted(base)));
        card.push_str("base_model_relation: adapter\n");
    }
    if let Some(trigger) = &training.trigger {
        card.push_str(&format!("instance_prompt: {}\n", quoted(trigger)));
    }
    if !folder.samples.is_empty() {
        card.push_str("widget:\n");
        for sample in &folder.samples {
            card.push_str(&format!(
                "- text: {}\n  output:\n    url: {}\n",
                quoted(&prompt_of(sample, training)),
                quoted(sample.file.name())
            ));
        }
    }
    card.push_str(&format!("---\n\n# {name}\n\n"));
    if !folder.samples.is_empty() {
        card.push_str("<Gallery />\n\n");
    }
    if let Some(trigger) = &training.trigger {
        card.push_str(&format!(
            "## Trigger\n\nWrite {} in a prompt.\n\n",
            code(trigger)
        ));
    }
    card.push_str(&format!(
        "## Weights\n\n{} in this repository, {} bytes.\n\n",
        code(folder.model.name()),
        folder.model.size()
    ));
    let sum = sum(&card);
    card + MARK + &sum + MARK_END
}

/// Is it a card that we made, as we made it?
pub(super) fn is_ours(card: &str) -> bool {
    let Some((above, mark)) = card.rsplit_once(MARK) else {
        return false;
    };
    mark.strip_suffix(MARK_END) == Some(&sum(above))
}

fn sum(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

/// What the picture was made of, as far as that is known.
fn prompt_of(sample: &Sample, training: &Training) -> String {
    let at = usize::try_from(sample.prompt).unwrap_or(usize::MAX);
    match training.prompts.get(at) {
        Some(prompt) => {
            let trigger = training.trigger.as_deref().unwrap_or_default();
            let filled = prompt.replace("[trigger]", trigger);
            filled.chars().take(MAX_TEXT_CHARS).collect()
        }
        // The Hub shows no picture without a text.
        None => "-".to_owned(),
    }
}

/// A YAML scalar: JSON's strings are YAML's double-quoted ones.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("text serialises")
}

/// Inline code of Markdown, whatever stands in it.
fn code(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max();
    let fence = "`".repeat(longest.unwrap_or_default() + 1);
    match text.starts_with('`') || text.ends_with('`') {
        true => format!("{fence} {text} {fence}"),
        false => format!("{fence}{text}{fence}"),
    }
}

impl Training {
    /// Reads ai-toolkit's `config.yaml`. What cannot be read is not known: the card does without.
    pub(super) fn read(file: &Path) -> Self {
        let mut text = String::new();
        let read = open_ordinary(file)
            .and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text));
        if read.is_err() || text.len() as u64 > MAX_CONFIG_BYTES {
            return Self::default();
        }
        Self::parse(&text).unwrap_or_default()
    }

    fn parse(text: &str) -> Option<Self> {
        let config: Value = serde_yaml_ng::from_str(text).ok()?;
        let process = &config["config"]["process"][0];
        let plain = |value: &Value| {
            let text = value.as_str()?;
            let text: String = text
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(MAX_TEXT_CHARS)
                .collect();
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let sample = &process["sample"];
        let prompts = list(&sample["prompts"]);
        let newer = list(&sample["samples"]);
        let newer = newer.iter().map(|sample| sample["prompt"].clone());
        let prompts = prompts.iter().cloned().chain(newer);
        let base = plain(&process["model"]["name_or_path"]);
        let is_on_hub =
            |name: &String| ModelName::parse(name).is_ok_and(|name| name.owner().is_some());
        Some(Self {
            base_model: base.filter(is_on_hub),
            trigger: plain(&process["trigger_word"]),
            prompts: prompts
                .map(|prompt| plain(&prompt).unwrap_or_else(|| "-".to_owned()))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CONFIG: &str = "
job: extension
config:
  name: my_lora
  process:
  - type: sd_trainer
    trigger_word: p0ts
    model: {name_or_path: black-forest-labs/FLUX.1-dev}
    sample:
      prompts:
      - '[trigger] on a \"shelf\"'
      - \"two\\nlines: # {a}\"
";

    fn folder(config: Option<&str>) -> (tempfile::TempDir, LoraFolder) {
        let outer = tempfile::tempdir().unwrap();
        let at = outer.path().join("my_lora");
        fs::create_dir_all(at.join("samples")).unwrap();
        fs::write(at.join("my_lora.safetensors"), "x").unwrap();
        for prompt in [0, 1, 7] {
            let name = format!("samples/1737531308253__000000250_{prompt}.jpg");
            fs::write(at.join(name), "x").unwrap();
        }
        if let Some(config) = config {
            fs::write(at.join("config.yaml"), config).unwrap();
        }
        let folder = LoraFolder::read(&at, None).unwrap();
        (outer, folder)
    }

    fn front_matter(card: &str) -> Value {
        let parts: Vec<&str> = card.splitn(3, "---\n").collect();
        serde_yaml_ng::from_str(parts[1]).unwrap()
    }

    #[test]
    fn the_card_shows_the_samples_and_says_what_is_known() {
        let (_outer, folder) = folder(Some(CONFIG));
        let card = card("pots", &folder);
        let front = front_matter(&card);
        assert_eq!(front["base_model"], "black-forest-labs/FLUX.1-dev");
        assert_eq!(front["instance_prompt"], "p0ts");
        assert_eq!(front["tags"][0], "lora");
        let widget = front["widget"].as_array().unwrap();
        let texts: Vec<_> = widget.iter().map(|entry| &entry["text"]).collect();
        assert_eq!(texts, ["p0ts on a \"shelf\"", "two lines: # {a}", "-"]);
        assert_eq!(
            widget[2]["output"]["url"],
            "samples/1737531308253__000000250_7.jpg"
        );
        assert!(card.contains("# pots\n") && card.contains("`my_lora.safetensors`"));
    }

    #[test]
    fn settings_that_cannot_be_read_cost_no_card() {
        for config in [None, Some("a: ["), Some("- 1"), Some(&*"a".repeat(300_000))] {
            let (_outer, folder) = folder(config);
            let front = front_matter(&card("pots", &folder));
            assert_eq!(front["base_model"], Value::Null);
            assert_eq!(front["widget"].as_array().unwrap().len(), 3);
        }
        // Aliases of aliases: a few lines that would be gigabytes.
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let one = format!("*a{}, ", level - 1).repeat(9);
            bomb.push_str(&format!("a{level}: &a{level} [{one}]\n"));
        }
        assert_eq!(Training::parse(&(bomb + CONFIG)), None);
        let local = CONFIG.replace("black-forest-labs/FLUX.1-dev", "/models/secret/flux");
        assert_eq!(Training::parse(&local).unwrap().base_model, None);
    }

    #[test]
    fn a_trigger_that_is_everywhere_blows_no_card_up() {
        let prompt = "[trigger]".repeat(100);
        let long = CONFIG
            .replace("p0ts", &"p".repeat(1000))
            .replace("[trigger]", &prompt);
        let (_outer, folder) = folder(Some(&long));
        let card = card("pots", &folder);
        assert!(card.len() < 6 * MAX_TEXT_CHARS, "{}", card.len());
    }

    #[test]
    fn a_card_that_somebody_wrote_on_is_not_ours() {
        let (_outer, folder) = folder(None);
        let card = card("pots", &folder);
        assert!(is_ours(&card));
        for edited in [
            card.replace("# pots", "# Our pots"),
            format!("{card}\nCall us.\n"),
            card.replace(MARK, "<!-- "),
            String::new(),
            "# Pots\n".to_owned(),
        ] {
            assert!(!is_ours(&edited), "{edited}");
        }
    }

    #[test]
    fn a_file_name_stays_in_its_code() {
        assert_eq!(code("a.safetensors"), "`a.safetensors`");
        assert_eq!(code("a`b"), "``a`b``");
        assert_eq!(code("`</x>"), "`` `</x> ``");
    }
}
