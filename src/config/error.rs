//! Why settings were refused. Every error is one line that names the setting, where it came from,
//! what is wrong with it and what is allowed; none holds the value of a secret.

use std::{io, path::PathBuf};

use super::{Secret, Source};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that does not parse or is out of range.
    #[error("{name} ({source_of}): {problem}; allowed: {allowed}", source_of = origin.described(name))]
    BadValue {
        name: &'static str,
        origin: Source,
        problem: String,
        allowed: String,
    },
    /// A key of a YAML file, or a `GREENROOM_` variable, that no setting has.
    #[error("{key} ({source_of}) is no setting{hint}; allowed: the names in `greenroom serve --help`", source_of = origin.described(key))]
    UnknownKey {
        /// The key as written, escaped and shortened.
        key: String,
        origin: Source,
        /// Empty, or `, did you mean NAME?`.
        hint: String,
    },
    /// One setting under two spellings in one file.
    #[error("{name} ({file}) stands there twice, as {first} and as {second}; allowed: one of them")]
    Twice {
        name: &'static str,
        file: String,
        first: String,
        second: String,
    },
    /// A file that is not what its name says.
    #[error("{file} is no settings file: {problem}; allowed: `NAME: value` pairs")]
    BadFile { file: String, problem: String },
    /// A settings file that is there and cannot be read.
    #[error("failed to read the settings in {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Two settings that exclude each other.
    #[error("{0}")]
    Conflict(String),
    /// `serve` has no way to pay for a model.
    #[error(
        "no credential of the model API: set ANTHROPIC_API_KEY or CLAUDE_CREDENTIALS_FILE in the \
         environment, or start with --rehearsal to try it without a model"
    )]
    MissingCredential,
}

impl ConfigError {
    /// Whether the command line itself is wrong (exit status 2) rather than what surrounds it.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::BadValue {
                origin: Source::Flag,
                ..
            }
        )
    }
}

/// A value as an error may repeat it: quoted, on one line, control characters escaped. A long one
/// is left out, since what was pasted into the wrong place may be a secret.
pub(super) fn quoted(value: &str) -> String {
    const LONGEST: usize = 40;
    if value.chars().count() > LONGEST {
        Secret::MASK.to_owned()
    } else {
        format!("{value:?}")
    }
}

/// Text of a library as part of our line.
pub(super) fn one_line(text: &str) -> String {
    let line: Vec<&str> = text.split(char::is_control).collect();
    line.join(" ").trim().to_owned()
}
