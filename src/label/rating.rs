//! For whom an image is fit, out of a model's words. A wrong `SAFE` is worse than no rating, so one is
//! read only where it is said and nothing beside it leaves a doubt:
//!
//! 1. The text begins with the word; before it stand brackets, quotes and the like at most.
//! 2. Behind it stands nothing, or an explanation: after a mark (`SAFE (…)`, `SAFE - …`), or after a
//!    word that begins one (`SAFE for …`, `ADULT because …`).
//! 3. Nothing asks, and nothing is crossed out.
//! 4. The explanation denies only what would be seen: `no` and the like before a thing (`no nudity`,
//!    but not `no way`), `not` and the like before a word of showing (`does not show skin`, but not
//!    `not really`).
//! 5. It names the rating itself only as it is, and another one only as denied (`nothing explicit`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// For whom an image is fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Rating {
    Safe,
    Suggestive,
    Adult,
    Explicit,
}

/// They ask, or cross out.
const DOUBTS: [&str; 9] = ["?", "？", "~~", "≠", "❌", "✗", "✘", "🚫", "¬"];
/// Begin an explanation without a mark.
const REASONS: [&str; 9] = [
    "for", "because", "since", "due", "as", "given", "content", "image", "overall",
];
/// Deny the thing that follows.
const LACKS: [&str; 4] = ["no", "nothing", "without", "non"];
/// Follow those and are no things to be seen.
const NO_THINGS: [&str; 19] = [
    "way", "chance", "longer", "one", "idea", "really", "but", "i", "it", "this", "that", "wait",
    "actually", "such", "means", "of", "like", "rating", "answer",
];
/// Deny what follows, and with it the rating, unless it is a word of what is shown.
const DENIES: [&str; 6] = ["not", "never", "cannot", "nor", "neither", "isnt"];
const SHOWN: [&str; 18] = [
    "contain",
    "contains",
    "containing",
    "show",
    "shows",
    "showing",
    "depict",
    "depicts",
    "depicting",
    "include",
    "includes",
    "including",
    "nude",
    "sexual",
    "sexually",
    "violent",
    "revealing",
    "graphic",
];
/// Leave what follows as denied as it was.
const BETWEEN: [&str; 6] = [
    "any", "anything", "overtly", "overly", "content", "material",
];
/// Deny everything.
const REFUSES: [&str; 15] = [
    "nope",
    "nah",
    "nobody",
    "none",
    "hardly",
    "barely",
    "scarcely",
    "wrong",
    "false",
    "incorrect",
    "un",
    "doesnt",
    "nein",
    "nicht",
    "pas",
];
/// What was denied before is so no more.
const TURNS: [&str; 10] = [
    "but", "yet", "however", "though", "although", "except", "only", "just", "still", "rather",
];

#[derive(Debug, PartialEq)]
enum Token {
    /// In lower case.
    Word(String),
    Comma,
    /// The end of a clause.
    End,
}

impl Rating {
    /// As in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Safe => "SAFE",
            Self::Suggestive => "SUGGESTIVE",
            Self::Adult => "ADULT",
            Self::Explicit => "EXPLICIT",
        }
    }

    fn named(word: &str) -> Option<Self> {
        [Self::Safe, Self::Suggestive, Self::Adult, Self::Explicit]
            .into_iter()
            .find(|rating| word.eq_ignore_ascii_case(rating.as_str()))
    }

    /// The one that a text gives, by the rules above.
    pub(super) fn of(text: &str) -> Option<Self> {
        if DOUBTS.iter().any(|doubt| text.contains(doubt)) {
            return None;
        }
        let text =
            text.trim_start_matches(|c: char| c.is_whitespace() || "*_\"'`“‘[(<#:".contains(c));
        let end = text.find(|c: char| !c.is_alphanumeric());
        let (word, rest) = text.split_at(end.unwrap_or(text.len()));
        let rating = Self::named(word)?;
        let mut first = rest.chars();
        // A part of the word: "SAFE-ish", "SAFE's".
        let is_longer = first.next().is_some_and(|c| "-'’".contains(c))
            && first.next().is_some_and(char::is_alphanumeric);
        (!is_longer && rating.is_left_by(rest)).then_some(rating)
    }

    /// Does what stands beside it leave it as it is?
    fn is_left_by(self, rest: &str) -> bool {
        // A line's end is a mark.
        let rest = rest.trim_start_matches(|c: char| " \t\r*_\"'`”’)]>".contains(c));
        let tokens = tokens(rest);
        let word_at = |at: usize| match tokens.get(at) {
            Some(Token::Word(word)) => Some(word.as_str()),
            _ => None,
        };
        if rest.starts_with(char::is_alphanumeric)
            && !word_at(0).is_some_and(|word| REASONS.contains(&word))
        {
            return false;
        }
        if word_at(0).is_none() && tokens.iter().all(|token| !matches!(token, Token::Word(_))) {
            // "SAFE: 0", "SAFE (2 %)".
            return !rest.contains(|c: char| c.is_numeric());
        }
        // Is this word denied, and was another one of its clause?
        let (mut is_denied, mut was_denied) = (false, false);
        for (at, token) in tokens.iter().enumerate() {
            let Token::Word(word) = token else {
                is_denied = false;
                was_denied &= *token == Token::Comma;
                continue;
            };
            let word = word.as_str();
            let next = word_at(at + 1);
            if let Some(named) = Self::named(word) {
                if (named == self) == is_denied {
                    return false;
                }
            } else if LACKS.contains(&word) {
                if next.is_none_or(|next| NO_THINGS.contains(&next)) {
                    return false;
                }
                (is_denied, was_denied) = (true, true);
            } else if DENIES.contains(&word) || word.ends_with("n't") {
                let is_of_image = |next: &str| SHOWN.contains(&next) || Self::named(next).is_some();
                if !next.is_some_and(is_of_image) {
                    return false;
                }
                (is_denied, was_denied) = (true, true);
            } else if REFUSES.contains(&word) || (word == "unsafe" && self == Self::Safe) {
                return false;
            } else if TURNS.contains(&word) {
                (is_denied, was_denied) = (false, false);
            } else if word == "or" {
                is_denied = was_denied;
            } else if !SHOWN.contains(&word) && !BETWEEN.contains(&word) {
                is_denied = false;
            }
        }
        true
    }
}

/// Words, and the marks between them. A hyphen within a word parts it, one between words ends a
/// clause.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut word = String::new();
    let mut before = ' ';
    for c in text.chars().chain([' ']) {
        let c = if c == '’' { '\'' } else { c };
        if c.is_alphabetic() || (c == '\'' && !word.is_empty()) {
            word.extend(c.to_lowercase());
        } else {
            let done = word.trim_end_matches('\'');
            if !done.is_empty() {
                tokens.push(Token::Word(done.to_owned()));
            }
            word.clear();
            match c {
                ',' => tokens.push(Token::Comma),
                '-' if !before.is_whitespace() => {}
                '\n' => tokens.push(Token::End),
                c if c.is_whitespace() || c.is_numeric() || "*_\"'`“”".contains(c) => {}
                _ => tokens.push(Token::End),
            }
        }
        before = c;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_leaves_it_as_it_is() {
        use Rating::{Adult, Explicit, Safe, Suggestive};
        for (text, rating) in [
            ("SAFE", Safe),
            (" **safe**. ", Safe),
            ("[SUGGESTIVE]", Suggestive),
            ("\"Explicit\"", Explicit),
            ("suggestive (a bit)", Suggestive),
            ("SAFE (no nudity)", Safe),
            ("SAFE (no nudity or explicit content)", Safe),
            ("SAFE (no nudity, violence, or explicit content)", Safe),
            ("SAFE - nothing explicit", Safe),
            ("SAFE – nothing suggestive or explicit.", Safe),
            ("**SAFE** — no overtly sexual or adult content", Safe),
            ("SAFE, no people", Safe),
            ("SAFE: no people, no text", Safe),
            ("SAFE (does not contain nudity)", Safe),
            ("SAFE. The image doesn't show anything explicit.", Safe),
            ("SAFE, non-sexual", Safe),
            ("SAFE for work", Safe),
            ("SAFE (fit for everybody; safe)", Safe),
            ("SAFE\nThis is fine.", Safe),
            ("SAFE ✅", Safe),
            ("SUGGESTIVE because of the swimwear", Suggestive),
            ("ADULT (not EXPLICIT)", Adult),
            ("ADULT, not explicit or suggestive", Adult),
            ("EXPLICIT, not safe for work", Explicit),
            ("ADULT (unsafe for work)", Adult),
            ("EXPLICIT! Unmistakably.", Explicit),
        ] {
            assert_eq!(Rating::of(text), Some(rating), "{text}");
        }
    }

    #[test]
    fn a_doubt_is_no_rating() {
        for text in [
            "",
            "fine",
            "NOT SAFE",
            "unsafe",
            "!SAFE",
            "non-safe",
            "SAFE? Definitely not.",
            "SAFE？",
            "safe for work: no",
            "SAFE for work, no.",
            "SAFE is not how I would call it",
            "SAFE would be wrong",
            "SAFE not",
            "SAFE: not really",
            "SAFE - not safe",
            "SAFE, not for children",
            "SAFE (not applicable)",
            "SAFE - no",
            "SAFE, no, ADULT",
            "SAFE - no way",
            "SAFE, no longer",
            "SAFE for no one",
            "SAFE for nobody",
            "SAFE (unsafe for kids)",
            "SAFE, isn't it",
            "SAFE, isn’t quite right",
            "SAFE: never",
            "SAFE, hardly",
            "SAFE, none of it",
            "SAFE: false",
            "SAFE: 0",
            "SAFE (0 %)",
            "SAFE ❌",
            "~~SAFE~~ ADULT",
            "SAFE, SUGGESTIVE, ADULT or EXPLICIT",
            "SAFE or SUGGESTIVE",
            "SAFE/ADULT",
            "SAFE-ish",
            "SAFE, but explicit",
            "SAFE (no nudity but explicit words)",
            "SAFE, no people in this explicit scene",
            "SAFE (no nudity). ADULT",
            "SAFE (no nudity), explicit",
            "SAFE (almost adult)",
        ] {
            assert_eq!(Rating::of(text), None, "{text}");
        }
    }
}
