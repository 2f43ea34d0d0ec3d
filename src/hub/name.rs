//! Names of models on the Hub.

use std::fmt;

/// The longest name of an owner or a model, in bytes.
const MAX_BYTES: usize = 96;

/// What a name has to look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a model: NAME or OWNER/NAME, each at most 96 of A-Z a-z 0-9 . _ -, not \
     beginning or ending with . or -, without -- and .., not ending with .git"
)]
pub struct BadName(pub String);

/// A model's name as a person gives it: with its owner or without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    owner: Option<String>,
    name: String,
}

/// A model's full name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    pub(super) owner: String,
    pub(super) name: String,
}

impl ModelName {
    /// Reads one by the Hub's rules.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let (owner, name) = match text.split_once('/') {
            Some((owner, name)) => (Some(owner), name),
            None => (None, text),
        };
        if !is_part(name) || owner.is_some_and(|owner| !is_part(owner)) {
            return Err(BadName(text.chars().take(200).collect()));
        }
        Ok(Self {
            owner: owner.map(str::to_owned),
            name: name.to_owned(),
        })
    }

    /// The owner, where it is named.
    pub fn owner(&self) -> Option<&str> {
        self.owner.as_deref()
    }

    /// The name without its owner.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.owner {
            Some(owner) => write!(f, "{owner}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// Is it an owner's or a model's name? No such name changes a path that it stands in.
pub(super) fn is_part(text: &str) -> bool {
    let is_sign = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let is_edge = |c: char| matches!(c, '.' | '-');
    !text.is_empty()
        && text.len() <= MAX_BYTES
        && text.chars().all(is_sign)
        && !text.starts_with(is_edge)
        && !text.ends_with(is_edge)
        && !text.contains("--")
        && !text.contains("..")
        && !text.ends_with(".git")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_hub_takes() {
        for good in [
            "foo",
            "foo/bar",
            "123",
            "Foo-BAR_foo.bar123",
            "_a_/b",
            "acme/pots-lora.v2",
        ] {
            assert_eq!(ModelName::parse(good).unwrap().to_string(), good);
        }
        let long = "x".repeat(97);
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "datasets/foo/bar",
            ".repo",
            "repo.",
            "-repo",
            "foo--bar",
            "foo..bar",
            "foo.git",
            "..",
            "a/..",
            "a b",
            "caf\u{e9}",
            "a?b",
            "a%2fb",
            "a\\b",
            "a\nb",
            &long,
        ] {
            let error = ModelName::parse(bad).unwrap_err();
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
