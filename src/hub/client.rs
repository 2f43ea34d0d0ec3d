//! How the Hub is asked, and how its answers become errors.
//!
//! The token goes to `HF_ENDPOINT` alone, no redirect is followed, and an answer is read up to a
//! bound. What is asked is in [`calls`](super::calls) and [`lfs`](super::lfs).

use std::{path::PathBuf, time::Duration};

use reqwest::{ClientBuilder, Method, RequestBuilder, Response, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use url::Url;

use super::error::HubError;
use crate::{
    config::Secret,
    outbound::{self, Twice},
    task,
    telemetry::printable,
};

/// For one try of a call that carries little.
pub(super) const ANSWER: Duration = Duration::from_secs(60);
/// A commit is made while we wait.
pub(super) const COMMIT_ANSWER: Duration = Duration::from_secs(180);
const CONNECT: Duration = Duration::from_secs(20);
/// Between the tries of one call.
pub(super) const PAUSES: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
];
/// The longest answer that is read.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// What of a server's own words is shown, in characters.
const MAX_SAID_CHARS: usize = 300;
/// Where the Hub's answers lead when `HF_ENDPOINT` is a mirror of it.
const HUB: &str = "https://huggingface.co";
/// An upload that does not move for so long is given up. More than the longest pause between tries.
pub const STILL: Duration = Duration::from_secs(150);

/// Where the Hub is, and who we are there.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Without a slash at its end.
    pub endpoint: String,
    pub token: Option<Secret>,
    /// An upload that does not move for so long is given up: [`STILL`].
    pub still: Duration,
    /// A folder of ours for what is known of uploads that are not finished. None: nothing is.
    pub unfinished: Option<PathBuf>,
}

/// A client of the Hub.
#[derive(Debug)]
pub struct Hub {
    pub(super) endpoint: String,
    pub(super) url: Url,
    pub(super) http: reqwest::Client,
    pub(super) still: Duration,
    pub(super) unfinished: Option<PathBuf>,
    token: Option<Secret>,
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: header::HeaderMap,
    pub(super) body: Vec<u8>,
}

impl Hub {
    /// Prepares a client; asks nobody yet.
    ///
    /// # Errors
    /// If the token would go over the network in the clear, or HTTPS cannot be set up.
    pub async fn new(settings: HubSettings) -> Result<Self, HubError> {
        let HubSettings {
            endpoint,
            token,
            still,
            unfinished,
        } = settings;
        let Ok(url) = endpoint.parse::<Url>() else {
            return Err(HubError::Endpoint { endpoint });
        };
        let is_safe = url.scheme() == "https" || outbound::is_loopback(&url);
        if !is_safe && token.is_some() {
            return Err(HubError::Insecure { endpoint });
        }
        Ok(Self {
            http: client(&url).await?,
            endpoint,
            url,
            still,
            unfinished,
            token,
        })
    }

    /// An address of the Hub that it named itself. None: it leads elsewhere, and gets no token.
    pub(super) fn on_hub(&self, href: &str) -> Option<Url> {
        let mirrored = href.strip_prefix(HUB).filter(|rest| rest.starts_with('/'));
        let url = match mirrored {
            Some(path) => format!("{}{path}", self.endpoint).parse(),
            None => self.url.join(href),
        };
        let is_ours = |url: &Url| {
            url.origin() == self.url.origin()
                && url.username().is_empty()
                && url.password().is_none()
        };
        url.ok().filter(is_ours)
    }

    pub(super) fn next_page(&self, here: &Url, answer: &Answer) -> Option<Url> {
        let link = answer.headers.get(header::LINK)?.to_str().ok()?;
        let next = self.on_hub(next_of(link)?)?;
        (next != *here).then_some(next)
    }

    pub(super) fn at(&self, path: &str) -> Url {
        let url = format!("{}{path}", self.endpoint);
        url.parse().expect("names change no address")
    }

    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// A request with the token, to an address that is the Hub's.
    pub(super) fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        let request = self.http.request(method, url.clone());
        let request = request.header(header::USER_AGENT, USER_AGENT);
        match &self.token {
            Some(token) if url.origin() == self.url.origin() => request.bearer_auth(token.expose()),
            _ => request,
        }
    }

    pub(super) async fn get(&self, what: &'static str, url: &Url) -> Result<Answer, HubError> {
        let build = || self.request(Method::GET, url).timeout(ANSWER);
        self.call(what, Twice::Same, build).await
    }

    pub(super) async fn call(
        &self,
        what: &'static str,
        twice: Twice,
        build: impl FnMut() -> RequestBuilder,
    ) -> Result<Answer, HubError> {
        let unreachable = |source| HubError::Unreachable { what, source };
        let response = outbound::send(&PAUSES, twice, build).await;
        let mut response: Response = response.map_err(unreachable)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(piece) =
            (response.chunk().await).map_err(|error| unreachable(error.without_url()))?
        {
            if body.len() + piece.len() > MAX_ANSWER_BYTES {
                return Err(malformed(what, "it is too long"));
            }
            body.extend_from_slice(&piece);
        }
        Ok(Answer {
            status,
            headers,
            body,
        })
    }

    pub(super) fn success(&self, answer: Answer, what: &'static str) -> Result<Answer, HubError> {
        let endpoint = || self.endpoint.clone();
        match answer.status {
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED if self.token.is_none() => Err(HubError::NoToken {
                endpoint: endpoint(),
            }),
            StatusCode::UNAUTHORIZED => Err(HubError::TokenRefused {
                endpoint: endpoint(),
            }),
            StatusCode::FORBIDDEN => Err(HubError::Forbidden {
                what,
                said: answer.said(),
                endpoint: endpoint(),
            }),
            StatusCode::TOO_MANY_REQUESTS => Err(HubError::TooMany {
                what,
                wait: outbound::retry_after(&answer.headers),
            }),
            status if status.is_server_error() => Err(HubError::Broken { what, status }),
            status => Err(HubError::Refused {
                what,
                status,
                said: answer.said(),
            }),
        }
    }
}

const USER_AGENT: &str = concat!("greenroom/", env!("CARGO_PKG_VERSION"));

/// A client for an address. Off the runtime's threads: reading certificates blocks.
pub(super) async fn client(url: &Url) -> Result<reqwest::Client, HubError> {
    built(outbound::client_builder(url)).await
}

/// The same of one that is prepared further.
pub(super) async fn built(builder: ClientBuilder) -> Result<reqwest::Client, HubError> {
    let builder = builder.connect_timeout(CONNECT);
    let built = task::blocking_apart("certificates", ANSWER, move || builder.build()).await;
    match built {
        Ok(built) => built.map_err(|error| HubError::Setup(error.without_url())),
        Err(error) => Err(HubError::Local {
            file: "the platform's certificates".to_owned(),
            source: std::io::Error::other(error),
        }),
    }
}

impl Answer {
    pub(super) fn json<T: DeserializeOwned>(&self, what: &'static str) -> Result<T, HubError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            let detail = error.to_string();
            // It may repeat what was told, such as an address that lets whoever has it upload.
            match detail.contains("://") {
                true => malformed(what, &format!("in line {}", error.line())),
                false => malformed(what, &detail),
            }
        })
    }

    /// The server's own words.
    fn said(&self) -> String {
        let header = self.headers.get("x-error-message");
        let header = header.and_then(|value| value.to_str().ok());
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        let words = header.or(body["error"].as_str());
        words.map(said).unwrap_or_default()
    }
}

/// A server's words as part of a sentence.
pub(super) fn said(words: &str) -> String {
    let short: String = words.chars().take(MAX_SAID_CHARS).collect();
    format!(", \"{}\"", printable(short.trim()))
}

pub(super) fn malformed(what: &'static str, detail: &str) -> HubError {
    let short: String = detail.chars().take(MAX_SAID_CHARS).collect();
    HubError::Malformed {
        what,
        detail: format!(" ({})", printable(&short)),
    }
}

/// The address of the next page in a `Link` header (RFC 8288).
fn next_of(link: &str) -> Option<&str> {
    link.split(',').find_map(|link| {
        let (address, attributes) = link.trim().strip_prefix('<')?.split_once('>')?;
        let mut attributes = attributes.split(';').map(str::trim);
        let is_next = attributes.any(|attribute| {
            let relation = attribute.strip_prefix("rel=");
            relation.is_some_and(|relation| relation.trim_matches('"') == "next")
        });
        is_next.then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hub(endpoint: &str, token: Option<&str>) -> Result<Hub, HubError> {
        let settings = HubSettings {
            endpoint: endpoint.to_owned(),
            token: token.map(Secret::new),
            still: STILL,
            unfinished: None,
        };
        Hub::new(settings).await
    }

    #[tokio::test]
    async fn the_token_goes_nowhere_in_the_clear() {
        let error = hub("http://mirror.example.com", Some("hf_x"))
            .await
            .unwrap_err();
        assert!(matches!(error, HubError::Insecure { .. }), "{error}");
        hub("http://mirror.example.com", None).await.unwrap();
        hub("http://127.0.0.1:9", Some("hf_x")).await.unwrap();
    }

    #[tokio::test]
    async fn the_token_goes_to_the_hub_alone() {
        let hub = hub("http://127.0.0.1:9/hub", Some("hf_x")).await.unwrap();
        for (href, leads) in [
            (
                "https://huggingface.co/a/b",
                Some("http://127.0.0.1:9/hub/a/b"),
            ),
            ("http://127.0.0.1:9/x", Some("http://127.0.0.1:9/x")),
            ("/x?cursor=1", Some("http://127.0.0.1:9/x?cursor=1")),
            ("https://huggingface.co.evil.example/a", None),
            ("https://huggingface.co@evil.example/a", None),
            ("//evil.example/x", None),
            ("http://127.0.0.1:10/x", None),
            ("https://s3.example.com/x", None),
            ("file:///etc/passwd", None),
            (concat!("http://user:", "word@127.0.0.1:9/x"), None),
        ] {
            let url = hub.on_hub(href).map(|url| url.to_string());
            assert_eq!(url.as_deref(), leads, "{href}");
        }
        let foreign = "https://s3.example.com/x".parse().unwrap();
        let request = hub.request(Method::PUT, &foreign).build().unwrap();
        assert!(!request.headers().contains_key(header::AUTHORIZATION));
    }

    #[test]
    fn the_next_page_is_found_where_there_is_one() {
        assert_eq!(
            next_of("<https://x/a?b=1>; rel=\"next\", <https://x/z>; rel=\"last\""),
            Some("https://x/a?b=1")
        );
        assert_eq!(
            next_of("<https://x/z>; rel=prev, </n>; rel=next"),
            Some("/n")
        );
        for none in ["", "<x>", "next", "<https://x/z>; rel=\"last\""] {
            assert_eq!(next_of(none), None, "{none}");
        }
    }
}
