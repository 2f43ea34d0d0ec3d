//! What the Hub is asked about models and their files, and what it answers.

use std::collections::{BTreeMap, BTreeSet};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{Method, RequestBuilder, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    client::{ANSWER, COMMIT_ANSWER, Hub, malformed},
    error::HubError,
    name::{ModelId, is_part},
};
use crate::outbound::Twice;

/// Pages of one list.
const MAX_PAGES: usize = 100;

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

impl Hub {
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
        if !self.has_token() {
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
        // A token may write to a repository and create none beside it.
        if answer.status == StatusCode::FORBIDDEN && self.info(id).await.is_ok() {
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
            None if !self.has_token() => return Err(HubError::NoAuthor),
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
}

fn json_body(request: RequestBuilder, body: &Value) -> RequestBuilder {
    let request = request.header(header::CONTENT_TYPE, "application/json");
    request.body(body.to_string())
}
