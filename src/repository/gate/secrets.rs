//! Finds what must not be committed in the content of a file: keys, tokens, passwords.
//!
//! The rules are data (`rules.txt`). All of their words are looked for at once; a rule's pattern is
//! compiled when one of its words first stands in a file and tried there alone, so ordinary content
//! costs one pass. What is found is never shown: a finding names the kind and the line.

use std::{
    collections::HashSet,
    path::Path,
    sync::{LazyLock, OnceLock},
};

use aho_corasick::AhoCorasick;
use regex::bytes::{Regex, RegexBuilder};

/// Most findings that a file is asked for: enough to say what is in it.
const MAX_FINDINGS: usize = 100;
/// How far behind its word a secret is looked for, in bytes.
const REACH: usize = 2_100;
/// Entropy of what is secret, in bits per character, where a rule says nothing.
const BITS: f64 = 2.6;

/// One secret in a file.
#[derive(Debug)]
pub(super) struct Finding<'a> {
    rule: usize,
    /// The line that it begins in, from 1.
    pub(super) line: usize,
    secret: &'a [u8],
}

impl Finding<'_> {
    /// What it is, with its article.
    pub(super) fn kind(&self) -> &'static str {
        RULES.rules[self.rule].kind
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// The word begins the secret; nothing like it may stand beside.
    Token,
    /// The word stands anywhere.
    Anywhere,
    /// The word names a service, and a value of its form is assigned.
    Assigned,
    /// The word says that what is assigned is secret.
    Named,
}

#[derive(Debug)]
struct Rule {
    form: Form,
    kind: &'static str,
    pattern: &'static str,
    bits: f64,
    needs_digit: bool,
    compiled: OnceLock<Regex>,
}

struct Rules {
    rules: Vec<Rule>,
    words: AhoCorasick,
    /// The word and the rule of each pattern of `words`.
    owners: Vec<(String, usize)>,
}

static RULES: LazyLock<Rules> = LazyLock::new(|| Rules::parse(include_str!("rules.txt")));

/// What is secret in `content`. Only new things are: whatever stands in `earlier` as well is left
/// out.
pub(super) fn find<'a>(path: &Path, content: &'a [u8], earlier: Option<&[u8]>) -> Vec<Finding<'a>> {
    let mut found = RULES.find(&Manner::of(path, content), content);
    if let Some(earlier) = earlier.filter(|_| !found.is_empty()) {
        let known = RULES.find(&Manner::of(path, earlier), earlier);
        let known: HashSet<&[u8]> = known.iter().map(|finding| finding.secret).collect();
        found.retain(|finding| !known.contains(finding.secret));
    }
    found
}

/// How a file's content is to be read.
#[derive(Debug)]
struct Manner {
    /// Made of hashes: names beside values mean nothing in it.
    is_generated: bool,
    /// In it a value stands in quotes.
    is_code: bool,
}

impl Manner {
    fn of(path: &Path, content: &[u8]) -> Self {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().to_ascii_lowercase());
        let name = name.unwrap_or_default();
        let ending = name.rsplit('.').next().unwrap_or_default();
        let is_generated = matches!(
            name.as_str(),
            "package-lock.json"
                | "npm-shrinkwrap.json"
                | "pnpm-lock.yaml"
                | "yarn.lock"
                | "bun.lock"
                | "deno.lock"
                | "composer.lock"
                | "cargo.lock"
        ) || matches!(ending, "svg" | "map")
            || content[..content.len().min(8_000)].contains(&0);
        let is_code = matches!(
            ending,
            "js" | "mjs"
                | "cjs"
                | "jsx"
                | "ts"
                | "mts"
                | "cts"
                | "tsx"
                | "astro"
                | "svelte"
                | "vue"
                | "html"
                | "htm"
                | "css"
                | "scss"
                | "sass"
                | "less"
                | "json"
                | "php"
                | "py"
                | "rb"
                | "go"
                | "rs"
                | "java"
                | "md"
                | "mdx"
                | "markdown"
                | "svg"
                | "xml"
        );
        Self {
            is_generated,
            is_code,
        }
    }
}

impl Rules {
    fn parse(text: &'static str) -> Self {
        let mut form = Form::Token;
        let (mut rules, mut owners) = (Vec::new(), Vec::new());
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            match line {
                "[token]" => form = Form::Token,
                "[anywhere]" => form = Form::Anywhere,
                "[assigned]" => form = Form::Assigned,
                "[named]" => form = Form::Named,
                _ => {
                    let mut parts = line.split(" :: ");
                    let mut next = || parts.next().unwrap_or_default();
                    let (kind, words, pattern, bits) = (next(), next(), next(), next());
                    for word in words.split_whitespace() {
                        owners.push((word.replace('·', " "), rules.len()));
                    }
                    rules.push(Rule {
                        form,
                        kind,
                        pattern,
                        bits: bits.trim_end_matches('#').parse().unwrap_or(BITS),
                        needs_digit: bits.ends_with('#')
                            || matches!(form, Form::Assigned | Form::Named),
                        compiled: OnceLock::new(),
                    });
                }
            }
        }
        let words = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(owners.iter().map(|(word, _)| word))
            .expect("the words are few and short");
        Self {
            rules,
            words,
            owners,
        }
    }

    fn find<'a>(&self, manner: &Manner, content: &'a [u8]) -> Vec<Finding<'a>> {
        let mut findings: Vec<Finding<'a>> = Vec::new();
        for hit in self.words.find_overlapping_iter(content) {
            let (word, number) = &self.owners[hit.pattern().as_usize()];
            let rule = &self.rules[*number];
            if manner.is_generated && matches!(rule.form, Form::Assigned | Form::Named) {
                continue;
            }
            let Some(secret) = rule.secret(manner, content, word, hit.range()) else {
                continue;
            };
            if let Some(same) = findings.iter_mut().find(|finding| finding.secret == secret) {
                // The earlier a rule stands, the more it says.
                same.rule = same.rule.min(*number);
                continue;
            }
            findings.push(Finding {
                rule: *number,
                line: 1 + content[..hit.start()]
                    .iter()
                    .filter(|&&b| b == b'\n')
                    .count(),
                secret,
            });
            if findings.len() == MAX_FINDINGS {
                break;
            }
        }
        findings
    }
}

impl Rule {
    /// What is secret behind the word at `at`.
    fn secret<'a>(
        &self,
        manner: &Manner,
        content: &'a [u8],
        word: &str,
        at: std::ops::Range<usize>,
    ) -> Option<&'a [u8]> {
        let is_inner =
            |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
        if self.form == Form::Token
            && (&content[at.clone()] != word.as_bytes()
                || at.start > 0 && is_inner(content.get(at.start - 1)))
        {
            return None;
        }
        let behind = &content[at.end..content.len().min(at.end + REACH)];
        let matched = self.regex().captures(behind)?;
        let whole = matched.get(0).expect("group 0 is the match");
        let value = matched.name("value").or(matched.get(1)).unwrap_or(whole);
        match self.form {
            Form::Token
                if is_inner(behind.get(whole.end()))
                    || is_in_base64(content, at.start, at.end + whole.end()) =>
            {
                return None;
            }
            Form::Named => {
                let is_quoted = matched.name("quote").is_some_and(|quote| !quote.is_empty());
                let suffix = matched.name("suffix").map_or(&b""[..], |m| m.as_bytes());
                if manner.is_code && !is_quoted || tells_about(suffix) || is_plain(value.as_bytes())
                {
                    return None;
                }
            }
            Form::Token | Form::Anywhere | Form::Assigned => {}
        }
        let value = &behind[value.range()];
        let is_public = if self.kind.contains("Algolia") {
            let line = &content[at.start..at.end + whole.end()];
            line.to_ascii_lowercase()
                .windows(6)
                .any(|part| part == b"search")
        } else {
            self.kind.contains("JWT") && is_public_jwt(value)
        };
        let is_secret = !is_public
            && !is_placeholder(value)
            && (!self.needs_digit
                || value.iter().any(u8::is_ascii_digit)
                || self.takes_signs(value))
            && (self.bits == 0.0 || entropy(value) >= self.bits);
        is_secret.then_some(value)
    }

    /// A password may have signs instead of digits.
    fn takes_signs(&self, value: &[u8]) -> bool {
        self.form == Form::Named
            && self.kind == "a password"
            && value.iter().any(|b| b"!#%&*+?@^~|=".contains(b))
    }

    fn regex(&self) -> &Regex {
        self.compiled.get_or_init(|| {
            const GIVES: &str = r"[ \t]{0,3}(?:=>|:=|\|\||[=:>,])[ \t]{0,3}[=>]?[ \t]{0,3}";
            const END: &str = r#"(?:["'`\s;,)\]}<&\\]|$)"#;
            let pattern = self.pattern;
            let text = match self.form {
                Form::Token | Form::Anywhere => format!("^(?:{pattern})"),
                Form::Assigned => format!(
                    r#"^[\w.\- \t]{{0,40}}["'`\])]{{0,2}}{GIVES}["'`]?(?P<value>{pattern}){END}"#
                ),
                Form::Named => format!(
                    r#"^(?P<suffix>[\w.-]{{0,20}})["'`\])]{{0,2}}{GIVES}(?P<quote>["'`]?)(?P<value>{pattern}){END}"#
                ),
            };
            RegexBuilder::new(&text)
                .unicode(false)
                .case_insensitive(self.form != Form::Token)
                .build()
                .expect("the rules are tested, each of them")
        })
    }
}

/// Is this a piece of something longer in base64, an image for example?
fn is_in_base64(content: &[u8], start: usize, end: usize) -> bool {
    const LONG: usize = 100;
    let is_base64 = |b: &&u8| b.is_ascii_alphanumeric() || matches!(**b, b'+' | b'/');
    let before = content[start.saturating_sub(LONG)..start].iter().rev();
    let after = content[end..content.len().min(end + LONG)].iter();
    before.take_while(is_base64).count() + after.take_while(is_base64).count() >= LONG
}

/// Does a name like `password_hint` tell about a secret instead of holding one?
fn tells_about(suffix: &[u8]) -> bool {
    const ABOUT: [&str; 34] = [
        "hint",
        "label",
        "placeholder",
        "reset",
        "forgot",
        "length",
        "min",
        "max",
        "field",
        "input",
        "text",
        "title",
        "error",
        "message",
        "name",
        "id",
        "url",
        "uri",
        "path",
        "file",
        "type",
        "regex",
        "pattern",
        "strength",
        "policy",
        "confirm",
        "help",
        "desc",
        "endpoint",
        "header",
        "expir",
        "ttl",
        "algorithm",
        "size",
    ];
    let suffix = String::from_utf8_lossy(suffix).to_ascii_lowercase();
    ABOUT.iter().any(|word| suffix.contains(word))
}

/// Is a value that could be anything rather a word, a slug, a path or an identifier that is meant
/// to be public?
fn is_plain(value: &[u8]) -> bool {
    let text = String::from_utf8_lossy(value);
    let starts = [
        "/", "./", "../", "http", "pk_", "pub_", "phc_", "G-", "UA-", "GTM-", "data:",
    ];
    if starts.iter().any(|start| text.starts_with(start)) || text.contains("env.") {
        return true;
    }
    // Words and numbers with something between: a slug, a version, a file's name.
    let parts: Vec<_> = text.split(['-', '_', '.', '/', ':', '+']).collect();
    let digits = if parts.len() > 1 { 6 } else { 0 };
    parts.iter().all(|part| {
        let word = part.trim_end_matches(|c: char| c.is_ascii_digit());
        word.len() <= 14
            && part.len() - word.len() <= digits
            && word.bytes().all(|b| b.is_ascii_alphabetic())
    })
}

/// Payload and signature of a token that says of itself that it is for everybody (Supabase's), or
/// the one of all examples.
fn is_public_jwt(value: &[u8]) -> bool {
    use base64::Engine as _;
    let payload = value.split(|&b| b == b'.').next().unwrap_or_default();
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(payload)
        .unwrap_or_default();
    let payload = String::from_utf8_lossy(&payload);
    payload.contains(r#""role":"anon""#) || payload.contains("John Doe")
}

/// Does it stand for a secret, in an example?
fn is_placeholder(value: &[u8]) -> bool {
    const SIGNS: [&str; 24] = [
        "example",
        "placeholder",
        "your",
        "xxxx",
        "changeme",
        "change_me",
        "change-me",
        "dummy",
        "sample",
        "redacted",
        "insert",
        "replace",
        "fixme",
        "todo",
        "****",
        "....",
        "0000000",
        "1234567890",
        "0123456789",
        "abcdefghij",
        "<",
        "${",
        "{{",
        "foobar",
    ];
    const WORDS: [&str; 12] = [
        "password", "passwd", "pass", "secret", "token", "user", "username", "root", "admin",
        "postgres", "test", "none",
    ];
    let text = String::from_utf8_lossy(value).to_ascii_lowercase();
    SIGNS.iter().any(|sign| text.contains(sign)) || WORDS.contains(&text.as_str())
}

/// In bits per byte.
fn entropy(value: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in value {
        counts[usize::from(*byte)] += 1;
    }
    let all = value.len() as f64;
    counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| {
            let part = f64::from(count) / all;
            -part * part.log2()
        })
        .sum()
}

#[cfg(test)]
pub(in crate::repository) mod samples;
#[cfg(test)]
mod tests;
