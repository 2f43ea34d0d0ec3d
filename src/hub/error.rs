//! What can go wrong with the Hub, each with what to do about it.

use std::{io, time::Duration};

use reqwest::StatusCode;

use super::name::ModelId;

/// Why something did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error(
        "HF_TOKEN is not set: make a token with write access at {endpoint}/settings/tokens and set \
         it in the environment or in .env"
    )]
    NoToken { endpoint: String },
    #[error(
        "HF_TOKEN is not set: set it to see your own models, or name whose models to list with \
         --author"
    )]
    NoAuthor,
    #[error(
        "HF_ENDPOINT is {endpoint}: without https the token could be read on its way; use https"
    )]
    Insecure { endpoint: String },
    #[error("HF_ENDPOINT is {endpoint}, which is no address")]
    Endpoint { endpoint: String },
    #[error("failed to set up HTTPS")]
    Setup(#[source] reqwest::Error),
    #[error(
        "no answer to {what}: look at the network (HTTPS_PROXY, HF_ENDPOINT), then run the same \
         command again"
    )]
    Unreachable {
        what: &'static str,
        #[source]
        source: reqwest::Error,
    },
    #[error(
        "the Hub refused HF_TOKEN (401): it is wrong, or revoked; make another one with write access \
         at {endpoint}/settings/tokens"
    )]
    TokenRefused { endpoint: String },
    #[error("HF_TOKEN may only read: make one with write access at {endpoint}/settings/tokens")]
    ReadOnly { endpoint: String },
    #[error(
        "HF_TOKEN may not do that ({what}: 403{said}): it needs write access there; see \
         {endpoint}/settings/tokens"
    )]
    Forbidden {
        what: &'static str,
        said: String,
        endpoint: String,
    },
    #[error(
        "HF_TOKEN is {me}'s, who does not belong to {owner}: name one of yours ({}), or use a token \
         of somebody who does", .own.join(", ")
    )]
    NotMember {
        owner: String,
        me: String,
        own: Vec<String>,
    },
    #[error("the Hub asks to wait ({what}: 429): run the same command again in {}", in_words(*.wait))]
    TooMany {
        what: &'static str,
        /// As it says itself.
        wait: Option<Duration>,
    },
    #[error(
        "the Hub fails ({what}: {status}): run the same command again later; what is uploaded by \
         then is not uploaded again"
    )]
    Broken {
        what: &'static str,
        status: StatusCode,
    },
    #[error("the Hub refused {what} ({status}{said})")]
    Refused {
        what: &'static str,
        status: StatusCode,
        said: String,
    },
    #[error(
        "the Hub's answer to {what} is not what greenroom understands{detail}; is HF_ENDPOINT right?"
    )]
    Malformed { what: &'static str, detail: String },
    #[error(
        "{id} is elsewhere now: it was renamed; give its new name, which {endpoint}/{id} leads to"
    )]
    Moved { id: ModelId, endpoint: String },
    #[error(
        "{id} is public, and was to be private: nothing was uploaded; make it private at \
         {endpoint}/{id}/settings, or say --private false"
    )]
    IsPublic { id: ModelId, endpoint: String },
    #[error(
        "{id} is private, and greenroom makes nothing public that is there: nothing was uploaded; \
         make it public at {endpoint}/{id}/settings, or leave out --private false"
    )]
    IsPrivate { id: ModelId, endpoint: String },
    #[error("the .gitignore of {id} keeps {file} out: change it at {endpoint}/{id}/tree/main")]
    Ignored {
        id: ModelId,
        file: String,
        endpoint: String,
    },
    #[error("the Hub named an address for {file} to which nothing is sent: {why}")]
    Address { file: String, why: &'static str },
    #[error(
        "the upload of {file} stood still: look at the network and the disk, then run the same \
         command again; what is uploaded is not uploaded again"
    )]
    Stalled { file: String },
    #[error("somebody else changes {id} at the same time; run the same command again")]
    Contended { id: ModelId },
    #[error("{file}")]
    Local {
        file: String,
        #[source]
        source: io::Error,
    },
}

impl HubError {
    /// Nothing is known of what became of the request, or that it passes.
    pub(super) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Contended { .. }
        )
    }
}

fn in_words(wait: Option<Duration>) -> String {
    match wait.map(|wait| wait.as_secs()) {
        None | Some(0) => "some minutes".to_owned(),
        Some(seconds @ 1..120) => format!("{seconds} s"),
        Some(seconds @ 120..7200) => format!("{} minutes", seconds.div_ceil(60)),
        Some(seconds) => format!("{} hours", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_to_wait_is_told() {
        for (seconds, words) in [
            (None, "some minutes"),
            (Some(90), "90 s"),
            (Some(601), "11 minutes"),
            (Some(36_000), "10 hours"),
        ] {
            let wait = seconds.map(Duration::from_secs);
            let told = HubError::TooMany { what: "it", wait }.to_string();
            assert!(told.ends_with(&format!("again in {words}")), "{told}");
        }
    }
}
