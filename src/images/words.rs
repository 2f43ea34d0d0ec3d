//! The words that go with an image: its file's name, its alt text, what a person and an agent are told
//! of it.

use serde_json::{Value, json};

use super::{ImageWish, Images, MAX_ALT, Ready, account, pay::Made, place, plan::Plan};
use crate::{
    domain::{Account, Usage},
    label::{DEFAULT, Question},
    picture::Picture,
    text,
};

impl Images {
    /// Gives a picture its place and its words.
    pub(super) async fn describe(
        &self,
        wish: &ImageWish,
        folder: &str,
        picture: Picture,
        usage: &mut Usage,
    ) -> Ready {
        let mark = uuid::Uuid::new_v4().simple().to_string();
        let ending = match picture.media_type {
            "image/png" => "png",
            "image/webp" => "webp",
            _ => "jpg",
        };
        let name = place::name(&wish.prompt, &mark[..8]);
        let path = format!("{folder}/{name}.{ending}");
        let ready = |alt: &str, alt_by, rating| Ready {
            path: path.clone(),
            alt: plain_alt(alt),
            alt_by,
            rating,
            picture: picture.clone(),
        };
        if let Some(alt) = &wish.alt {
            return ready(alt, "caller", None);
        }
        let labels = &self.0.labels;
        let prompts = labels.prompts();
        let prompt = prompts
            .named("alt_text")
            .or_else(|_| prompts.named(DEFAULT));
        let question = prompt.map(|prompt| Question {
            prompt,
            model: None,
            account: account(&wish.key, Account::LABEL),
            timeout: None,
        });
        let labelled = match question {
            Ok(question) => {
                let label = labels.label(picture.data.clone().into(), &question).await;
                label.map_err(|failure| {
                    *usage = *usage + failure.usage;
                    failure.to_string()
                })
            }
            Err(error) => Err(error.to_string()),
        };
        match labelled {
            Ok(label) => {
                *usage = *usage + label.usage;
                ready(
                    &label.description,
                    "label",
                    Some(label.nsfw_rating.as_str()),
                )
            }
            Err(error) => {
                tracing::warn!(
                    error,
                    "an image was made and not described; its prompt stands for it"
                );
                ready(&wish.prompt, "prompt", None)
            }
        }
    }
}

/// A model's words as an attribute's value: one line, not too long.
fn plain_alt(text: &str) -> String {
    let line: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .collect();
    let line: Vec<&str> = line.into_iter().filter(|word| !word.is_empty()).collect();
    let line = line.join(" ");
    if line.chars().count() <= MAX_ALT {
        return line;
    }
    let start: String = line.chars().take(MAX_ALT).collect();
    // At the end of a sentence, else of a word.
    let end = start
        .rfind(". ")
        .map(|at| at + 1)
        .or_else(|| start.rfind(' '));
    start[..end.unwrap_or(start.len())].to_owned()
}

pub(super) fn title(prompt: &str, count: usize) -> String {
    let line: Vec<&str> = prompt.split_whitespace().collect();
    let line = line.join(" ");
    let what = match count {
        1 => "an image".to_owned(),
        many => format!("{many} images"),
    };
    format!("Add {what}: {}", text::cut(&line, 100))
}

pub(super) fn said(ready: &[Ready], left: usize) -> String {
    let lines = ready.iter().map(|one| format!("{}: {}", one.path, one.alt));
    let more = match left {
        0 => String::new(),
        left => format!("\nThe model made {left} more than were asked for, which are left."),
    };
    format!(
        "These images are in the site now, and on no page yet:\n{}{more}",
        lines.collect::<Vec<_>>().join("\n")
    )
}

/// What the agent is told. The words of models stand in it as JSON texts, on one line each.
pub(super) fn placing(instruction: &str, ready: &[Ready]) -> String {
    let mut text = instruction.trim_end().to_owned();
    text.push_str(
        "\n\nThe image files for this were made just now and lie in the site already. Use them as the \
         site uses its other images, each with its alt text as it stands here. Do not move, rename or \
         copy them.",
    );
    for one in ready {
        text.push_str(&format!(
            "\n- {} ({} by {} pixels), alt text: {}",
            one.path,
            one.picture.width,
            one.picture.height,
            Value::from(one.alt.as_str())
        ));
    }
    text
}

pub(super) fn report(wish: &ImageWish, plan: &Plan, made: &Made, ready: &[Ready]) -> Value {
    let images = ready.iter().map(|one| {
        json!({
            "path": one.path,
            "alt": one.alt,
            "altBy": one.alt_by,
            "nsfwRating": one.rating,
            "mediaType": one.picture.media_type,
            "width": one.picture.width,
            "height": one.picture.height,
            "bytes": one.picture.data.len(),
        })
    });
    json!({
        "prompt": wish.prompt,
        "model": plan.model.name.to_string(),
        "version": plan.model.version,
        "predictions": made.predictions,
        "predictSeconds": made.predict_seconds,
        "costUsd": made.cost_usd,
        "images": images.collect::<Vec<_>>(),
        "leftOut": made.left,
    })
}
