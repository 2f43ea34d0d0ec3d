//! The calls of the Hub's API that are needed, and how their answers become errors.
//!
//! The token goes to `HF_ENDPOINT` alone, no redirect is followed, and an answer is read up to a
//! bound.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use url::Url;

use super::{
    error::HubError,
    name::{ModelId, is_part},
};
use crate::{
    config::Secret,
    outbound::{self, Twice},
    task,
    telemetry::printable,
};

/// For one try of a call that carries little.
const ANSWER: Duration = Duration::from_secs(60);
/// A commit is made while we wait.
const COMMIT_ANSWER: Duration = Duration::from_secs(180);
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
/// Pages of one list.
const MAX_PAGES: usize = 100;
/// Where the Hub's answers lead when `HF_ENDPOINT` is a mirror of it.
const HUB: &str = "https://huggingface.co";
const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// Where the Hub is, and who we are there.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Without a slash at its end.
    pub endpoint: String,
    pub token: Option<Secret>,
}

/// A client of the Hub.
#[derive(Debug)]
pub struct Hub {
    pub(super) endpoint: String,
    pub(super) url: Url,
    pub(super) http: reqwest::Client,
    token: Option<Secret>,
}

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Me {
    pub(super) name: String,
    pub(super) organisations: Vec<String>,
    pub(super) is_read_only: bool,
}

/// What the Hub says of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Info {
    pub(super) private: bool,
    /// The commit that `main` stands at.
    pub(super) sha: Option<String>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    pub(super) size: u64,
    /// Git's id.
    pub(super) oid: String,
    pub(super) lfs: Option<Large>,
}

/// A file of the large-file storage.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Large {
    /// SHA-256.
    pub(super) oid: String,
}

/// How the Hub wants a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Wish {
    path: String,
    upload_mode: String,
    #[serde(default)]
    pub(super) should_ignore: bool,
}

impl Wish {
    pub(super) fn is_large(&self) -> bool {
        self.upload_mode == "lfs"
    }
}

/// What is to be done with an object of the large-file storage.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Object {
    pub(super) oid: String,
    /// None: it is there already.
    pub(super) actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Debug, Clone, Deserialize)]
struct ObjectError {
    #[serde(default)]
    message: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Actions {
    pub(super) upload: Option<Action>,
    pub(super) verify: Option<Action>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Action {
    pub(super) href: String,
    #[serde(default)]
    pub(super) header: BTreeMap<String, Value>,
}

/// A model in a list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    pub id: String,
    /// None where the Hub does not say.
    pub private: Option<bool>,
    pub downloads: Option<u64>,
    pub likes: Option<u64>,
    pub last_modified: Option<String>,
}

/// What one line of a commit adds.
#[derive(Debug, Clone)]
pub(super) enum Added {
    Inline {
        path: String,
        content: Vec<u8>,
    },
    Large {
        path: String,
        sha256: String,
        size: u64,
    },
}

/// A commit that was made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Commit {
    pub(super) commit_oid: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: header::HeaderMap,
    body: Vec<u8>,
}

impl Hub {
    /// Prepares a client; asks nobody yet.
    ///
    /// # Errors
    /// If the token would go over the network in the clear, or HTTPS cannot be set up.
    pub async fn new(settings: HubSettings) -> Result<Self, HubError> {
        let HubSettings { endpoint, token } = settings;
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
            token,
        })
    }

    /// Whose models the token is of.
    pub(super) async fn me(&self) -> Result<Me, HubError> {
        #[derive(Deserialize)]
        struct Named {
            name: String,
        }
        #[derive(Deserialize)]
        struct Whoami {
            name: String,
            #[serde(default)]
            orgs: Vec<Named>,
            #[serde(default)]
            auth: Value,
        }
        const WHAT: &str = "the question whose token it is";
        if self.token.is_none() {
            let endpoint = self.endpoint.clone();
            return Err(HubError::NoToken { endpoint });
        }
        let url = self.at("/api/whoami-v2");
        let answer = self.get(WHAT, &url).await?;
        let me: Whoami = self.success(answer, WHAT)?.json(WHAT)?;
        let organisations: Vec<String> = me.orgs.into_iter().map(|org| org.name).collect();
        if !is_part(&me.name) {
            return Err(malformed(WHAT, "it names nobody"));
        }
        Ok(Me {
            name: me.name,
            organisations: organisations.into_iter().filter(|n| is_part(n)).collect(),
            is_read_only: me.auth["accessToken"]["role"] == "read",
        })
    }

    /// Creates a repository; answers whether it was not there yet.
    pub(super) async fn create(
        &self,
        id: &ModelId,
        me: &Me,
        is_private: bool,
    ) -> Result<bool, HubError> {
        const WHAT: &str = "the wish for a repository";
        let mut wish = json!({"type": "model", "name": id.name, "private": is_private});
        if id.owner != me.name {
            wish["organization"] = json!(id.owner);
        }
        let url = self.at("/api/repos/create");
        let build = || json_body(self.request(Method::POST, &url), &wish).timeout(ANSWER);
        // Twice is as good as once: the second time it exists.
        let answer = self.call(WHAT, Twice::Same, build).await?;
        if answer.status == StatusCode::CONFLICT {
            return Ok(false);
        }
        self.success(answer, WHAT)?;
        Ok(true)
    }

    pub(super) async fn info(&self, id: &ModelId) -> Result<Info, HubError> {
        const WHAT: &str = "the question about the repository";
        let url = self.at(&format!("/api/models/{id}"));
        let answer = self.get(WHAT, &url).await?;
        if answer.status.is_redirection() {
            return Err(HubError::Moved {
                id: id.clone(),
                endpoint: self.endpoint.clone(),
            });
        }
        self.success(answer, WHAT)?.json(WHAT)
    }

    /// The files of `main` that go by one of these names.
    pub(super) async fn files(
        &self,
        id: &ModelId,
        names: &BTreeSet<&str>,
    ) -> Result<BTreeMap<String, Entry>, HubError> {
        const WHAT: &str = "the question for the files";
        let mut next = Some(self.at(&format!("/api/models/{id}/tree/main?recursive=true")));
        let mut files = BTreeMap::new();
        for _ in 0..MAX_PAGES {
            let Some(url) = next.take() else { break };
            let answer = self.get(WHAT, &url).await?;
            if answer.status == StatusCode::NOT_FOUND {
                // Nothing was committed yet.
                break;
            }
            let answer = self.success(answer, WHAT)?;
            next = self.next_page(&url, &answer);
            for entry in answer.json::<Vec<Entry>>(WHAT)? {
                if entry.kind == "file" && names.contains(entry.path.as_str()) {
                    files.insert(entry.path.clone(), entry);
                }
            }
        }
        Ok(files)
    }

    /// A small text of `main`.
    pub(super) async fn text(&self, id: &ModelId, name: &str) -> Result<String, HubError> {
        const WHAT: &str = "the question for the model card";
        let url = self.at(&format!("/{id}/raw/main/{name}"));
        let answer = self.get(WHAT, &url).await?;
        let body = self.success(answer, WHAT)?.body;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// How the Hub wants these files: name, size and beginning of each. In their order.
    pub(super) async fn wishes(
        &self,
        id: &ModelId,
        files: &[(&str, u64, Vec<u8>)],
    ) -> Result<Vec<Wish>, HubError> {
        #[derive(Deserialize)]
        struct Wishes {
            files: Vec<Wish>,
        }
        const WHAT: &str = "the question how files are wanted";
        let asked = files.iter().map(|(path, size, sample)| {
            json!({"path": path, "size": size, "sample": STANDARD.encode(sample)})
        });
        let asked = json!({"files": asked.collect::<Vec<_>>()});
        let url = self.at(&format!("/api/models/{id}/preupload/main"));
        let build = || json_body(self.request(Method::POST, &url), &asked).timeout(ANSWER);
        let answer = self.call(WHAT, Twice::Same, build).await?;
        let told: Wishes = self.success(answer, WHAT)?.json(WHAT)?;
        let told: BTreeMap<&str, &Wish> = (told.files.iter())
            .map(|wish| (wish.path.as_str(), wish))
            .collect();
        let wishes = files.iter().map(|(path, ..)| {
            let wish = told.get(path).map(|wish| (*wish).clone());
            wish.ok_or_else(|| malformed(WHAT, "a file is missing in it"))
        });
        wishes.collect()
    }

    /// What is to be done so that these objects (SHA-256, size) are in the large-file storage.
    pub(super) async fn batch(
        &self,
        id: &ModelId,
        objects: &[(&str, u64)],
    ) -> Result<Vec<Object>, HubError> {
        #[derive(Deserialize)]
        struct Batch {
            objects: Vec<Object>,
        }
        const WHAT: &str = "the wish to upload";
        let asked = objects
            .iter()
            .map(|(oid, size)| json!({"oid": oid, "size": size}));
        let asked = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": asked.collect::<Vec<_>>(),
            "hash_algo": "sha256",
            "ref": {"name": "main"},
        });
        let url = self.at(&format!("/{id}.git/info/lfs/objects/batch"));
        let build = || lfs_body(self.request(Method::POST, &url), &asked).timeout(ANSWER);
        let answer = self.call(WHAT, Twice::Same, build).await?;
        let told: Batch = self.success(answer, WHAT)?.json(WHAT)?;
        for object in &told.objects {
            if let Some(error) = &object.error {
                return Err(HubError::Refused {
                    what: WHAT,
                    status: StatusCode::OK,
                    said: said(&error.message),
                });
            }
        }
        let mut told: BTreeMap<String, Object> = (told.objects.into_iter())
            .map(|object| (object.oid.clone(), object))
            .collect();
        let objects = objects.iter().map(|(oid, _)| {
            told.remove(*oid)
                .ok_or_else(|| malformed(WHAT, "an object is missing in it"))
        });
        objects.collect()
    }

    /// Tells that an object is uploaded.
    pub(super) async fn verify(
        &self,
        url: &Url,
        headers: header::HeaderMap,
        oid: &str,
        size: u64,
    ) -> Result<(), HubError> {
        const WHAT: &str = "the check of the upload";
        let asked = json!({"oid": oid, "size": size});
        let build = || {
            lfs_body(self.request(Method::POST, url), &asked)
                .headers(headers.clone())
                .timeout(ANSWER)
        };
        let answer = self.call(WHAT, Twice::Same, build).await?;
        self.success(answer, WHAT).map(drop)
    }

    /// Tells that all parts of an object are uploaded: their tags, in order. The address itself says
    /// who may.
    pub(super) async fn complete(
        &self,
        http: &reqwest::Client,
        url: &Url,
        oid: &str,
        tags: &[String],
    ) -> Result<(), HubError> {
        const WHAT: &str = "the end of the upload";
        let parts = tags.iter().zip(1..);
        let parts = parts.map(|(tag, number)| json!({"partNumber": number, "etag": tag}));
        let asked = json!({"oid": oid, "parts": parts.collect::<Vec<_>>()});
        let build = || lfs_body(http.post(url.clone()), &asked).timeout(COMMIT_ANSWER);
        let answer = self.call(WHAT, Twice::Same, build).await?;
        self.success(answer, WHAT).map(drop)
    }

    /// Commits to `main`, if it still stands at `parent`.
    pub(super) async fn commit(
        &self,
        id: &ModelId,
        summary: &str,
        parent: Option<&str>,
        added: &[Added],
    ) -> Result<Commit, HubError> {
        const WHAT: &str = "the commit";
        let mut head = json!({"summary": summary, "description": ""});
        if let Some(parent) = parent {
            head["parentCommit"] = json!(parent);
        }
        let mut lines = json!({"key": "header", "value": head}).to_string() + "\n";
        for added in added {
            let line = match added {
                Added::Inline { path, content } => json!({"key": "file", "value": {
                    "path": path, "content": STANDARD.encode(content), "encoding": "base64",
                }}),
                Added::Large { path, sha256, size } => json!({"key": "lfsFile", "value": {
                    "path": path, "algo": "sha256", "oid": sha256, "size": size,
                }}),
            };
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
        let lines = bytes::Bytes::from(lines);
        let url = self.at(&format!("/api/models/{id}/commit/main"));
        let build = || {
            let post = self.request(Method::POST, &url);
            post.header(header::CONTENT_TYPE, "application/x-ndjson")
                .body(lines.clone())
                .timeout(COMMIT_ANSWER)
        };
        // After a commit whose answer was lost there is nothing to commit, which is looked at anew.
        let answer = self.call(WHAT, Twice::More, build).await?;
        if matches!(
            answer.status,
            StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED
        ) {
            return Err(HubError::Contended { id: id.clone() });
        }
        self.success(answer, WHAT)?.json(WHAT)
    }

    /// Models, the last changed first. Without an author, those of the token's owner.
    ///
    /// # Errors
    /// If there is neither, or the Hub does not answer with a list.
    pub async fn models(&self, author: Option<&str>, limit: usize) -> Result<Vec<Model>, HubError> {
        const WHAT: &str = "the question for models";
        let author = match author {
            Some(author) => author.to_owned(),
            None if self.token.is_none() => return Err(HubError::NoAuthor),
            None => self.me().await?.name,
        };
        let mut url = self.at("/api/models");
        url.query_pairs_mut()
            .append_pair("author", &author)
            .append_pair("limit", &limit.to_string())
            .append_pair("sort", "lastModified")
            .append_pair("direction", "-1")
            .extend_pairs(
                ["private", "downloads", "likes", "lastModified"].map(|field| ("expand", field)),
            );
        let mut next = Some(url);
        let mut models = Vec::new();
        for _ in 0..MAX_PAGES {
            let Some(url) = next.take() else { break };
            let answer = self.get(WHAT, &url).await?;
            let answer = self.success(answer, WHAT)?;
            next = self.next_page(&url, &answer);
            models.extend(answer.json::<Vec<Model>>(WHAT)?);
            if models.len() >= limit {
                break;
            }
        }
        models.truncate(limit);
        Ok(models)
    }

    /// An address of the Hub that it named itself. None: it leads elsewhere, and gets no token.
    pub(super) fn on_hub(&self, href: &str) -> Option<Url> {
        let mirrored = href.strip_prefix(HUB).filter(|rest| rest.starts_with('/'));
        let url = match mirrored {
            Some(path) => format!("{}{path}", self.endpoint).parse(),
            None => self.url.join(href),
        };
        url.ok().filter(|url| url.origin() == self.url.origin())
    }

    fn next_page(&self, here: &Url, answer: &Answer) -> Option<Url> {
        let link = answer.headers.get(header::LINK)?.to_str().ok()?;
        let next = self.on_hub(next_of(link)?)?;
        (next != *here).then_some(next)
    }

    fn at(&self, path: &str) -> Url {
        let url = format!("{}{path}", self.endpoint);
        url.parse().expect("names change no address")
    }

    /// A request with the token, to an address that is the Hub's.
    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        let request = self.http.request(method, url.clone());
        let request = request.header(header::USER_AGENT, USER_AGENT);
        match &self.token {
            Some(token) if url.origin() == self.url.origin() => request.bearer_auth(token.expose()),
            _ => request,
        }
    }

    async fn get(&self, what: &'static str, url: &Url) -> Result<Answer, HubError> {
        let build = || self.request(Method::GET, url).timeout(ANSWER);
        self.call(what, Twice::Same, build).await
    }

    async fn call(
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

    fn success(&self, answer: Answer, what: &'static str) -> Result<Answer, HubError> {
        let endpoint = || self.endpoint.clone();
        match answer.status {
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED => Err(HubError::TokenRefused {
                endpoint: endpoint(),
            }),
            StatusCode::FORBIDDEN => Err(HubError::Forbidden {
                what,
                said: answer.said(),
                endpoint: endpoint(),
            }),
            StatusCode::TOO_MANY_REQUESTS => Err(HubError::TooMany { what }),
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
    let builder = outbound::client_builder(url).connect_timeout(CONNECT);
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
    fn json<T: DeserializeOwned>(&self, what: &'static str) -> Result<T, HubError> {
        serde_json::from_slice(&self.body).map_err(|error| malformed(what, &error.to_string()))
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
fn said(words: &str) -> String {
    let short: String = words.chars().take(MAX_SAID_CHARS).collect();
    format!(", \"{}\"", printable(short.trim()))
}

fn malformed(what: &'static str, detail: &str) -> HubError {
    HubError::Malformed {
        what,
        detail: format!(" ({})", printable(detail)),
    }
}

fn json_body(request: RequestBuilder, body: &Value) -> RequestBuilder {
    let request = request.header(header::CONTENT_TYPE, "application/json");
    request.body(body.to_string())
}

fn lfs_body(request: RequestBuilder, body: &Value) -> RequestBuilder {
    let request = request.header(header::ACCEPT, LFS_JSON);
    request
        .header(header::CONTENT_TYPE, LFS_JSON)
        .body(body.to_string())
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
