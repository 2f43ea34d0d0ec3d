//! A stand-in for the Hugging Face Hub: its API, and the storage that its uploads go to, on another
//! port, as on another host.
//!
//! It is as strict as the Hub where that matters: content has to be what its sum says, a commit may name
//! large files that were uploaded alone, and its parent has to be the newest. `tests/it/hub.rs` runs the
//! official Python client through it.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::StreamExt;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpListener, sync::watch};

/// A token of alice, who belongs to the organisation `acme`.
pub(crate) const HF_TOKEN: &str = "hf_canaryAliceWrites51c0ffee";
/// One of hers that may only read.
pub(crate) const HF_TOKEN_READ: &str = "hf_canaryAliceReads51c0ffee";
/// Contents up to so many bytes are held; of larger ones the sum alone.
const HELD: usize = 4 * 1024 * 1024;

/// See the module. It ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct HubStandIn {
    port: u16,
    storage_port: u16,
    state: Arc<Mutex<HubState>>,
    /// Uploads wait once so many bytes came to the storage, until more may come.
    most: Arc<watch::Sender<u64>>,
}

#[derive(Default)]
pub(crate) struct HubState {
    pub(crate) repositories: BTreeMap<String, Repository>,
    /// What the storage has, by SHA-256: the size.
    stored: BTreeMap<String, u64>,
    /// Parts that came, by upload and number.
    parts: BTreeMap<String, BTreeMap<u64, Vec<u8>>>,
    /// Method and path of each request, in order.
    pub(crate) asked: Vec<String>,
    /// Bytes that came to the storage, by object.
    pub(crate) received: BTreeMap<String, u64>,
    /// Secrets that came to the storage, where none belongs.
    pub(crate) leaked: Vec<String>,
    /// Uploads with the headers that were named for them; the official client sends none.
    pub(crate) with_headers: usize,
    /// Uploads in parts that were begun: each has parts of its own.
    uploads: usize,
    /// So many uploads are taken in and never answered.
    pub(crate) silent: usize,
    /// What a refusal on purpose asks to wait, in seconds.
    pub(crate) wait: u64,
    /// The next requests whose path holds this text are answered so; 0 is no fault, and lets one pass.
    pub(crate) faults: Vec<(&'static str, u16)>,
    /// What such an answer says.
    pub(crate) words: Option<String>,
    /// So many commits are made and then answered with 502.
    pub(crate) lost_answers: usize,
    /// Large files are wanted in parts of so many bytes.
    pub(crate) part_bytes: Option<u64>,
    /// How each file is wanted, whatever it is: `regular` (in the commit) or `lfs` (the storage).
    pub(crate) wants: Option<&'static str>,
    /// The Hub takes no file whose name ends so.
    pub(crate) ignores: Option<&'static str>,
    /// Before the next commit arrives somebody else makes one.
    pub(crate) others_commit: bool,
    /// Uploads to be addressed elsewhere.
    pub(crate) upload_address: Option<String>,
}

#[derive(Default, Clone)]
pub(crate) struct Repository {
    pub(crate) private: bool,
    pub(crate) files: BTreeMap<String, Content>,
    /// The summaries of its commits.
    pub(crate) commits: Vec<String>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Content {
    Inline(Vec<u8>),
    Large { sha256: String, size: u64 },
}

impl Repository {
    /// The id of its newest commit; the first one is the Hub's own.
    fn head(&self) -> String {
        format!("{:040x}", self.commits.len() + 1)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        match &self.files[name] {
            Content::Inline(content) => String::from_utf8(content.clone()).unwrap(),
            large => panic!("{name} is {large:?}"),
        }
    }
}

impl HubStandIn {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hub = Self {
            port: listener.local_addr().unwrap().port(),
            storage_port: storage.local_addr().unwrap().port(),
            state: Arc::default(),
            most: Arc::new(watch::Sender::new(u64::MAX)),
        };
        for (listener, is_storage) in [(listener, false), (storage, true)] {
            let router = match is_storage {
                true => Router::new().fallback(store),
                false => Router::new()
                    .fallback(answer)
                    .layer(DefaultBodyLimit::disable()),
            };
            let serving = axum::serve(listener, router.with_state(hub.clone()));
            #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
            tokio::spawn(async move { serving.await.unwrap() });
        }
        hub
    }

    /// For `HF_ENDPOINT`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap()
    }

    pub(crate) fn repository(&self, id: &str) -> Repository {
        let repository = self.state().repositories.get(id).cloned();
        repository.unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// How often something was asked whose method and path hold this text.
    pub(crate) fn count(&self, text: &str) -> usize {
        let state = self.state();
        state
            .asked
            .iter()
            .filter(|asked| asked.contains(text))
            .count()
    }

    /// Uploads stop where they are once the storage got so many bytes.
    pub(crate) fn hold_after(&self, bytes: u64) {
        self.most.send_replace(bytes);
    }

    /// Bytes that came to the storage.
    pub(crate) fn received(&self) -> u64 {
        self.state().received.values().sum()
    }

    fn actions(&self, sha256: &str, size: u64, id: &str, part_bytes: Option<u64>) -> Value {
        let storage = format!("http://127.0.0.1:{}", self.storage_port);
        let storage = self.state().upload_address.clone().unwrap_or(storage);
        let signed = {
            let mut state = self.state();
            state.uploads += usize::from(part_bytes.is_some());
            format!("{sha256}?signature=s3cret&uploadId={}", state.uploads)
        };
        let put = format!("{storage}/{signed}");
        let upload = match part_bytes {
            None => json!({"href": put, "header": {"x-amz-kept": "yes"}}),
            Some(part_bytes) => {
                let mut header = json!({"chunk_size": part_bytes.to_string()});
                for number in 1..=size.div_ceil(part_bytes) {
                    header[format!("{number:05}")] = json!(format!("{put}&part={number}"));
                }
                let href = format!("{}/api/complete/{signed}", self.url());
                json!({"href": href, "header": header})
            }
        };
        // As the Hub's answers do, whatever `HF_ENDPOINT` is.
        let verify = format!("https://huggingface.co/{id}.git/info/lfs/objects/verify");
        json!({"upload": upload, "verify": {"href": verify}})
    }
}

/// What the one who asks may do.
fn role_of(headers: &HeaderMap) -> Result<Option<&'static str>, Box<Response>> {
    match headers
        .get(header::AUTHORIZATION)
        .map(|value| value.to_str().unwrap())
    {
        None => Ok(None),
        Some(value) => match value.strip_prefix("Bearer ") {
            Some(HF_TOKEN) => Ok(Some("write")),
            Some(HF_TOKEN_READ) => Ok(Some("read")),
            _ => no(401, "Invalid credentials in Authorization header"),
        },
    }
}

fn refused(status: u16, why: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    let headers = [
        ("x-error-message", why.to_owned()),
        ("retry-after", "0".to_owned()),
    ];
    (status, headers, json!({"error": why}).to_string()).into_response()
}

fn told(value: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, value.to_string()).into_response()
}

async fn answer(
    State(hub): State<HubStandIn>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    {
        let mut state = hub.state();
        state.asked.push(format!("{method} {uri}"));
        let fault = state
            .faults
            .iter()
            .position(|(text, _)| path.contains(text));
        if let Some(at) = fault {
            let (_, status) = state.faults.remove(at);
            let wait = state.wait.to_string().parse().unwrap();
            let mut answer = refused(status, state.words.as_deref().unwrap_or("on purpose"));
            answer.headers_mut().insert("retry-after", wait);
            return answer;
        }
    }
    let role = match role_of(&headers) {
        Ok(role) => role,
        Err(refused) => return *refused,
    };
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let told = hub.routed(&method, &parts, &uri, role, &body);
    told.unwrap_or_else(|refused| *refused)
}

type Told = Result<Response, Box<Response>>;

fn no<T>(status: u16, why: &str) -> Result<T, Box<Response>> {
    Err(Box::new(refused(status, why)))
}

impl HubStandIn {
    fn routed(
        &self,
        method: &Method,
        parts: &[&str],
        uri: &Uri,
        role: Option<&str>,
        body: &[u8],
    ) -> Told {
        let json: Value = serde_json::from_slice(body).unwrap_or_default();
        let needs = |write: bool| match role {
            None => no(401, "Invalid username or password."),
            Some("read") if write => no(403, "Forbidden: this token may only read"),
            Some(_) => Ok(()),
        };
        match (method.as_str(), parts) {
            ("GET", ["api", "whoami-v2"]) => {
                needs(false)?;
                Ok(told(&json!({
                    "type": "user", "name": "alice", "orgs": [{"type": "org", "name": "acme"}],
                    "auth": {"type": "access_token", "accessToken": {"role": role}},
                })))
            }
            ("POST", ["api", "validate-yaml"]) => Ok(told(&validated(&json))),
            ("POST", ["api", "repos", "create"]) => {
                needs(true)?;
                self.create(&json)
            }
            ("GET", ["api", "models"]) => Ok(self.models(uri, role)),
            (
                "GET",
                ["api", "models", owner, name] | ["api", "models", owner, name, "revision", "main"],
            ) => self.info(&id(owner, name), role),
            ("GET", ["api", "models", owner, name, "tree", "main"]) => {
                self.tree(&id(owner, name), uri, role)
            }
            ("POST", ["api", "models", owner, name, "preupload", "main"]) => {
                needs(true)?;
                self.wishes(&id(owner, name), &json)
            }
            ("POST", ["api", "models", owner, name, "commit", "main"]) => {
                needs(true)?;
                self.commit(&id(owner, name), body)
            }
            ("POST", [owner, name, "info", "lfs", "objects", "batch"]) => {
                needs(true)?;
                let name = name.strip_suffix(".git").unwrap();
                self.batch(&id(owner, name), &json)
            }
            ("POST", [_, _, "info", "lfs", "objects", "verify"]) => {
                needs(true)?;
                let size = self
                    .state()
                    .stored
                    .get(json["oid"].as_str().unwrap())
                    .copied();
                match size.is_some() && size == json["size"].as_u64() {
                    true => Ok(told(&json!({}))),
                    false => no(422, "the object is not there"),
                }
            }
            ("POST", ["api", "complete", sha256]) => self.complete(sha256, uri, &json),
            ("GET", [owner, name, "raw", "main", file]) => {
                let repository = self.seen(&id(owner, name), role)?;
                match repository.files.get(*file) {
                    Some(Content::Inline(content)) => Ok(content.clone().into_response()),
                    _ => no(404, "Entry not found"),
                }
            }
            _ => no(404, "no such call"),
        }
    }

    /// A repository, as far as the asker may know of it.
    fn seen(&self, id: &str, role: Option<&str>) -> Result<Repository, Box<Response>> {
        let repository = self.state().repositories.get(id).cloned();
        match repository.filter(|repository| !repository.private || role.is_some()) {
            Some(repository) => Ok(repository),
            None => no(404, "Repository not found"),
        }
    }

    fn create(&self, wish: &Value) -> Told {
        let owner = wish["organization"].as_str().unwrap_or("alice");
        if !["alice", "acme"].contains(&owner) {
            return no(
                403,
                "You don't have the rights to create a model under this namespace",
            );
        }
        let id = id(owner, wish["name"].as_str().unwrap());
        let mut state = self.state();
        if state.repositories.contains_key(&id) {
            let words = json!({
                "error": "You already created this model repo", "url": format!("{}/{id}", self.url()),
            });
            return Err(Box::new(
                (StatusCode::CONFLICT, words.to_string()).into_response(),
            ));
        }
        // Older clients say it in one way, newer ones in the other.
        let private = wish["private"] == true || wish["visibility"] == "private";
        let mut repository = Repository {
            private,
            ..Repository::default()
        };
        let own = Content::Inline(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n".to_vec());
        repository.files.insert(".gitattributes".to_owned(), own);
        state.repositories.insert(id.clone(), repository);
        Ok(told(
            &json!({"url": format!("{}/{id}", self.url()), "name": id}),
        ))
    }

    fn info(&self, id: &str, role: Option<&str>) -> Told {
        let repository = self.seen(id, role)?;
        Ok(told(&json!({
            "id": id, "private": repository.private, "sha": repository.head(), "downloads": 0,
        })))
    }

    /// Two to a page.
    fn tree(&self, id: &str, uri: &Uri, role: Option<&str>) -> Told {
        let repository = self.seen(id, role)?;
        let mut entries: BTreeMap<String, Value> = BTreeMap::new();
        for (path, content) in &repository.files {
            if let Some((folder, _)) = path.rsplit_once('/') {
                let entry = json!({"type": "directory", "path": folder, "oid": "0", "size": 0});
                entries.insert(folder.to_owned(), entry);
            }
            let oid = blob_id(content);
            let entry = match content {
                Content::Inline(content) => {
                    json!({"type": "file", "path": path, "oid": oid, "size": content.len()})
                }
                Content::Large { sha256, size } => json!({
                    "type": "file", "path": path, "oid": oid, "size": size,
                    "lfs": {"oid": sha256, "size": size, "pointerSize": 134},
                }),
            };
            entries.insert(path.clone(), entry);
        }
        let base = format!("{}/api/models/{id}/tree/main?recursive=true", self.url());
        Ok(page(entries.into_values().collect(), uri, &base, 2))
    }

    fn models(&self, uri: &Uri, role: Option<&str>) -> Response {
        let query = uri.query().unwrap_or_default();
        let author = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("author="));
        let state = self.state();
        let models = state.repositories.iter().filter(|(id, repository)| {
            let owner = id.split_once('/').unwrap().0;
            author.is_none_or(|author| author == owner) && (!repository.private || role.is_some())
        });
        let models = models.enumerate().map(|(number, (id, repository))| {
            json!({
                "_id": "0", "id": id, "modelId": id, "private": repository.private,
                "downloads": 1234 * number, "likes": number, "tags": ["lora"],
                "lastModified": "2026-11-20T10:00:00.000Z",
            })
        });
        let base = format!("{}/api/models?{}", self.url(), without_cursor(query));
        page(models.collect(), uri, &base, 3)
    }

    fn wishes(&self, id: &str, asked: &Value) -> Told {
        let repository = self.seen(id, Some("write"))?;
        let (wants, ignores) = {
            let state = self.state();
            (state.wants, state.ignores)
        };
        let files = asked["files"].as_array().unwrap().iter().map(|file| {
            let path = file["path"].as_str().unwrap();
            let sample = STANDARD.decode(file["sample"].as_str().unwrap()).unwrap();
            assert!(sample.len() <= 512);
            let size = file["size"].as_u64().unwrap();
            let is_large = path.ends_with(".safetensors") || size > 10_000;
            let mode = if is_large { "lfs" } else { "regular" };
            let oid = repository.files.get(path).map(|content| match content {
                Content::Inline(_) => blob_id(content),
                Content::Large { sha256, .. } => sha256.clone(),
            });
            json!({
                "path": path, "uploadMode": wants.unwrap_or(mode),
                "shouldIgnore": ignores.is_some_and(|ending| path.ends_with(ending)), "oid": oid,
            })
        });
        Ok(told(&json!({"files": files.collect::<Vec<_>>()})))
    }

    fn batch(&self, id: &str, asked: &Value) -> Told {
        self.seen(id, Some("write"))?;
        assert_eq!(
            (&asked["operation"], &asked["hash_algo"]),
            (&json!("upload"), &json!("sha256"))
        );
        let part_bytes = self.state().part_bytes;
        let objects = asked["objects"].as_array().unwrap().iter().map(|object| {
            let (oid, size) = (
                object["oid"].as_str().unwrap(),
                object["size"].as_u64().unwrap(),
            );
            let is_stored = self.state().stored.contains_key(oid);
            match is_stored {
                true => json!({"oid": oid, "size": size}),
                false => json!({
                    "oid": oid, "size": size, "authenticated": true,
                    "actions": self.actions(oid, size, id, part_bytes),
                }),
            }
        });
        let objects: Vec<Value> = objects.collect();
        Ok(told(&json!({"transfer": "basic", "objects": objects})))
    }

    fn complete(&self, sha256: &str, uri: &Uri, asked: &Value) -> Told {
        let mut state = self.state();
        let parts = state.parts.remove(&upload(sha256, uri)).unwrap_or_default();
        let tags = asked["parts"].as_array().unwrap().iter();
        let tags: Vec<Value> = tags.map(|part| part["etag"].clone()).collect();
        let expected: Vec<Value> = parts
            .keys()
            .map(|number| json!(format!("\"tag-{number}\"")))
            .collect();
        let content = parts.into_values().flatten().collect::<Vec<u8>>();
        if tags != expected || hex::encode(Sha256::digest(&content)) != sha256 {
            return no(400, "the parts are not the object's");
        }
        state.stored.insert(sha256.to_owned(), content.len() as u64);
        Ok(told(&json!({})))
    }

    fn commit(&self, id: &str, lines: &[u8]) -> Told {
        let mut repository = self.seen(id, Some("write"))?;
        if std::mem::take(&mut self.state().others_commit) {
            repository.commits.push("Somebody else's".to_owned());
            let theirs = Content::Inline(b"theirs".to_vec());
            repository.files.insert("theirs.txt".to_owned(), theirs);
            let mut state = self.state();
            state.repositories.insert(id.to_owned(), repository.clone());
        }
        let lines = std::str::from_utf8(lines).unwrap().lines();
        let lines: Vec<Value> = lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let (head, lines) = lines.split_first().unwrap();
        assert_eq!(head["key"], "header");
        let parent = head["value"]["parentCommit"].as_str();
        if parent.is_some_and(|parent| parent != repository.head()) {
            return no(
                412,
                "A commit has happened since. Please refresh and try again.",
            );
        }
        for line in lines {
            let value = &line["value"];
            let path = value["path"].as_str().unwrap().to_owned();
            let content = match line["key"].as_str() {
                Some("file") => {
                    let content = STANDARD.decode(value["content"].as_str().unwrap());
                    Content::Inline(content.unwrap())
                }
                Some("lfsFile") => {
                    let sha256 = value["oid"].as_str().unwrap().to_owned();
                    let Some(size) = self.state().stored.get(&sha256).copied() else {
                        return no(
                            400,
                            "Your push was rejected because an LFS pointer pointed to a file that does not exist.",
                        );
                    };
                    Content::Large { sha256, size }
                }
                other => panic!("{other:?}"),
            };
            repository.files.insert(path, content);
        }
        let summary = head["value"]["summary"].as_str().unwrap().to_owned();
        repository.commits.push(summary);
        let head = repository.head();
        let mut state = self.state();
        state.repositories.insert(id.to_owned(), repository);
        if state.lost_answers > 0 {
            state.lost_answers -= 1;
            return no(502, "Bad Gateway");
        }
        let url = format!("{}/{id}/commit/{head}", self.url());
        Ok(told(
            &json!({"success": true, "commitOid": head, "commitUrl": url}),
        ))
    }
}

/// The storage: `PUT /{sha256}`, of a part with `part=` in its query.
async fn store(
    State(hub): State<HubStandIn>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let sha256 = uri.path().trim_start_matches('/').to_owned();
    {
        let mut state = hub.state();
        state.asked.push(format!("{method} {}", uri.path()));
        let secrets = headers.iter().filter(|(name, value)| {
            *name == header::AUTHORIZATION
                || *name == header::COOKIE
                || String::from_utf8_lossy(value.as_bytes()).contains("hf_")
        });
        let secrets: Vec<String> = secrets.map(|(name, _)| name.to_string()).collect();
        state.leaked.extend(secrets);
        if let Some(at) = state.faults.iter().position(|(text, _)| *text == "storage") {
            let (_, status) = state.faults.remove(at);
            if status > 0 {
                return refused(status, "on purpose");
            }
        }
    }
    let query = uri.query().unwrap_or_default().to_owned();
    let part = query.split('&').find_map(|pair| pair.strip_prefix("part="));
    let part: Option<u64> = part.map(|part| part.parse().unwrap());
    // As S3 does.
    let length = headers
        .get(header::CONTENT_LENGTH)
        .map(|value| value.to_str().unwrap());
    let Some(length) = length.and_then(|length| length.parse::<u64>().ok()) else {
        return refused(411, "MissingContentLength");
    };
    if headers.get("x-amz-kept").is_some() {
        hub.state().with_headers += 1;
    }
    let (mut hash, mut size, mut content) = (Sha256::new(), 0_u64, Vec::new());
    let mut body = body.into_data_stream();
    let mut most = hub.most.subscribe();
    while let Some(piece) = body.next().await {
        let Ok(piece) = piece else {
            return refused(400, "IncompleteBody");
        };
        hash.update(&piece);
        size += piece.len() as u64;
        *hub.state().received.entry(sha256.clone()).or_default() += piece.len() as u64;
        if part.is_some() || content.len() + piece.len() <= HELD {
            content.extend_from_slice(&piece);
        }
        let received = hub.received();
        most.wait_for(|most| received < *most).await.unwrap();
    }
    if size != length || size == 0 {
        return refused(400, "IncompleteBody");
    }
    let is_silent = {
        let mut state = hub.state();
        let is_silent = state.silent > 0;
        state.silent = state.silent.saturating_sub(1);
        is_silent
    };
    if is_silent {
        std::future::pending::<()>().await;
    }
    let mut state = hub.state();
    match part {
        None if hex::encode(hash.finalize()) != sha256 => {
            return refused(400, "the content is not what its sum says");
        }
        None => {
            state.stored.insert(sha256, size);
        }
        Some(number) => {
            state
                .parts
                .entry(upload(&sha256, &uri))
                .or_default()
                .insert(number, content);
        }
    }
    let tag = format!("\"tag-{}\"", part.unwrap_or_default());
    [(header::ETAG, tag)].into_response()
}

/// Which upload of an object it is.
fn upload(sha256: &str, uri: &Uri) -> String {
    let query = uri.query().unwrap_or_default();
    let id = query.split('&').find(|pair| pair.starts_with("uploadId="));
    format!("{sha256} {}", id.unwrap_or_default())
}

fn id(owner: &str, name: &str) -> String {
    format!("{owner}/{name}")
}

/// What git would call it: of a large file its pointer is what git has.
fn blob_id(content: &Content) -> String {
    let content = match content {
        Content::Inline(content) => content.clone(),
        Content::Large { sha256, size } => format!(
            "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        )
        .into_bytes(),
    };
    let mut blob = sha1::Sha1::default();
    sha1::Digest::update(&mut blob, format!("blob {}\0", content.len()));
    sha1::Digest::update(&mut blob, &content);
    hex::encode(sha1::Digest::finalize(blob))
}

fn validated(asked: &Value) -> Value {
    let content = asked["content"].as_str().unwrap_or_default();
    let front = content
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---\n"));
    let parsed = front.map(|(front, _)| serde_yaml_ng::from_str::<Value>(front));
    match parsed {
        Some(Ok(Value::Object(_))) => json!({"errors": [], "warnings": []}),
        _ => json!({"errors": [{"message": "no metadata"}], "warnings": []}),
    }
}

fn without_cursor(query: &str) -> String {
    let pairs: BTreeSet<&str> = query.split('&').collect();
    let pairs = pairs
        .into_iter()
        .filter(|pair| !pair.starts_with("cursor="));
    pairs.collect::<Vec<_>>().join("&")
}

/// A page of a list, with the way to the next one.
fn page(all: Vec<Value>, uri: &Uri, base: &str, size: usize) -> Response {
    let query = uri.query().unwrap_or_default();
    let cursor = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("cursor="));
    let from: usize = cursor.map_or(0, |cursor| cursor.parse().unwrap());
    let is_last = from + size >= all.len();
    let part: Vec<Value> = all.into_iter().skip(from).take(size).collect();
    let mut response = told(&json!(part));
    if !is_last {
        let next = format!("<{base}&cursor={}>; rel=\"next\"", from + size);
        response
            .headers_mut()
            .insert(header::LINK, next.parse().unwrap());
    }
    response
}
