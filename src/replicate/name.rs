//! Names of models, as people write them.

use std::{fmt, str::FromStr};

use super::ReplicateError;

/// A version's id is a SHA-256 in hex.
const VERSION_DIGITS: usize = 64;
/// Longest name of an owner or a model.
const MAX_PART: usize = 100;

/// Which model, and which version of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// `OWNER/MODEL`: its latest version, or an official model.
    Latest { owner: String, name: String },
    /// `OWNER/MODEL:VERSION`.
    Pinned {
        owner: String,
        name: String,
        version: String,
    },
    /// `VERSION` alone. Replicate tells no schema of it.
    Version { version: String },
}

impl ModelName {
    /// The same model in this version.
    ///
    /// # Errors
    /// If that is no version's id, or another one stands in the name already.
    pub fn at(self, version: &str) -> Result<Self, ReplicateError> {
        let bad = |why: &'static str| ReplicateError::BadName {
            text: version.chars().take(MAX_PART).collect(),
            why,
        };
        if !is_version(version) {
            return Err(bad("a version is 64 hexadecimal digits"));
        }
        match self {
            Self::Latest { owner, name } => Ok(Self::Pinned {
                owner,
                name,
                version: version.to_owned(),
            }),
            pinned if pinned.version() == Some(version) => Ok(pinned),
            _ => Err(bad("the model's name holds another version already")),
        }
    }

    /// `owner/name`, where it is known.
    pub fn full_name(&self) -> Option<String> {
        match self {
            Self::Latest { owner, name } | Self::Pinned { owner, name, .. } => {
                Some(format!("{owner}/{name}"))
            }
            Self::Version { .. } => None,
        }
    }

    /// The version that was named.
    pub fn version(&self) -> Option<&str> {
        match self {
            Self::Latest { .. } => None,
            Self::Pinned { version, .. } | Self::Version { version } => Some(version),
        }
    }

    /// What files of it are called after.
    pub(super) fn short(&self) -> &str {
        match self {
            Self::Latest { name, .. } | Self::Pinned { name, .. } => name,
            Self::Version { version } => &version[..8],
        }
    }
}

impl FromStr for ModelName {
    type Err = ReplicateError;

    fn from_str(text: &str) -> Result<Self, ReplicateError> {
        if is_version(text) {
            return Ok(Self::Version {
                version: text.to_owned(),
            });
        }
        let bad = || ReplicateError::BadName {
            text: text.chars().take(MAX_PART).collect(),
            why: "write OWNER/MODEL, OWNER/MODEL:VERSION, or a version's 64 hexadecimal digits",
        };
        let (model, version) = match text.split_once(':') {
            Some((model, version)) => (model, Some(version)),
            None => (text, None),
        };
        let (owner, name) = model.split_once('/').ok_or_else(bad)?;
        if !is_part(owner) || !is_part(name) {
            return Err(bad());
        }
        let latest = Self::Latest {
            owner: owner.to_owned(),
            name: name.to_owned(),
        };
        match version {
            None => Ok(latest),
            Some(version) => latest.at(version),
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest { owner, name } => write!(f, "{owner}/{name}"),
            Self::Pinned {
                owner,
                name,
                version,
            } => write!(f, "{owner}/{name}:{version}"),
            Self::Version { version } => f.write_str(version),
        }
    }
}

/// It becomes a part of an address: nothing that means something there.
fn is_part(text: &str) -> bool {
    (1..=MAX_PART).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !text.contains("..")
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

pub(super) fn is_version(text: &str) -> bool {
    text.len() == VERSION_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_in_three_ways() {
        let version = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa";
        for (text, full, pinned) in [
            ("stability-ai/sdxl", Some("stability-ai/sdxl"), None),
            ("acme/my_lora-1.5", Some("acme/my_lora-1.5"), None),
            (
                &format!("stability-ai/sdxl:{version}"),
                Some("stability-ai/sdxl"),
                Some(version),
            ),
            (version, None, Some(version)),
        ] {
            let name: ModelName = text.parse().unwrap();
            assert_eq!(name.full_name().as_deref(), full);
            assert_eq!(name.version(), pinned);
            assert_eq!(name.to_string(), text);
        }
        let name: ModelName = "acme/shoes".parse().unwrap();
        let name = name.at(version).unwrap();
        assert_eq!(name.version(), Some(version));
        assert!(name.clone().at(version).is_ok());
        assert!(name.at(&version.replace('5', "6")).is_err());
    }

    #[test]
    fn what_is_no_name_never_becomes_an_address() {
        for text in [
            "",
            "sdxl",
            "a/b/c",
            "../x",
            "a/..",
            "a/b?x=1",
            "a/b#",
            "a/b c",
            "a/b:latest",
            "-a/b",
            "https://replicate.com/a/b",
            "a/%2e%2e",
        ] {
            let error = text.parse::<ModelName>().unwrap_err().to_string();
            assert!(error.contains("hexadecimal"), "{text}: {error}");
        }
    }
}
