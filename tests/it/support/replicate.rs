//! A stand-in for Replicate's API on loopback, as its documentation and its Python client have it:
//! models with schemas, predictions that take a few looks, files, outputs that are fetched.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The token that it takes.
pub(crate) const REPLICATE_TOKEN: &str = "r8_canary-replicate-51c0ffee";
/// The version of each model.
const VERSION: &str = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa";

/// See the module. It ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct StandInReplicate {
    port: u16,
    state: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    base: String,
    predictions: BTreeMap<String, Made>,
    /// Files that were sent: name, type, bytes.
    files: Vec<(String, String, Bytes)>,
    /// Method and path of each request that came with the token.
    asked: Vec<String>,
    /// `Authorization` of requests for outputs, by their paths.
    fetched: Vec<(String, Option<String>)>,
    /// The file that a painter makes.
    picture: Bytes,
    /// So many creations are refused with 429.
    throttled: usize,
    /// Of so many creations the answer is lost, although they are made.
    lost: usize,
    /// So many creations meet a fault, and are not made.
    broken: usize,
    /// No prediction goes on.
    is_held: bool,
    /// So many looks at predictions meet a fault.
    faults: usize,
    /// Predictions are created, and nobody is told of it.
    is_stalled: bool,
}

/// A prediction.
#[derive(Clone)]
struct Made {
    id: String,
    model: String,
    input: Value,
    looks: usize,
    status: &'static str,
    created_at: Timestamp,
    cancel_after: Option<String>,
}

impl StandInReplicate {
    /// Starts it. Its painters make this picture.
    pub(crate) async fn start(picture: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(Inside {
            base: format!("http://127.0.0.1:{port}"),
            picture: picture.into(),
            ..Inside::default()
        }));
        let app = Router::new()
            .route("/v1/models/{owner}/{name}", get(model))
            .route("/v1/models/{owner}/{name}/versions/{id}", get(version))
            .route(
                "/v1/models/{owner}/{name}/predictions",
                post(create_official),
            )
            .route("/v1/predictions", post(create).get(list))
            .route("/v1/predictions/{id}", get(prediction))
            .route("/v1/predictions/{id}/cancel", post(cancel))
            .route("/v1/files", post(upload))
            .route("/v1/files/{id}", get(sent_file))
            .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
            .route_layer(axum::middleware::from_fn_with_state(state.clone(), guard))
            .route("/delivery/{id}/{name}", get(deliver))
            .with_state(state.clone());
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { port, state }
    }

    /// Its address, for `REPLICATE_BASE_URL`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A name that leads to the first version of a model of its.
    pub(crate) fn version() -> &'static str {
        VERSION
    }

    /// Requests with the token so far, as `GET /v1/…`.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.state.lock().unwrap().asked.clone()
    }

    /// Paths of outputs that were fetched, and the `Authorization` that came along.
    pub(crate) fn fetched(&self) -> Vec<(String, Option<String>)> {
        self.state.lock().unwrap().fetched.clone()
    }

    /// What went into the predictions that were made, in their order, and their states.
    pub(crate) fn predictions(&self) -> Vec<(Value, &'static str)> {
        let state = self.state.lock().unwrap();
        let mut all: Vec<&Made> = state.predictions.values().collect();
        all.sort_by_key(|made| made.created_at);
        all.into_iter()
            .map(|made| (made.input.clone(), made.status))
            .collect()
    }

    /// The deadlines that were sent along.
    pub(crate) fn deadlines(&self) -> Vec<Option<String>> {
        let state = self.state.lock().unwrap();
        let deadlines = state.predictions.values();
        deadlines.map(|made| made.cancel_after.clone()).collect()
    }

    /// Files that were sent: name, type, size.
    pub(crate) fn files(&self) -> Vec<(String, String, usize)> {
        let state = self.state.lock().unwrap();
        let files = state.files.iter();
        files
            .map(|(name, kind, bytes)| (name.clone(), kind.clone(), bytes.len()))
            .collect()
    }

    pub(crate) fn throttle(&self, count: usize) {
        self.state.lock().unwrap().throttled = count;
    }

    pub(crate) fn lose_answers(&self, count: usize) {
        self.state.lock().unwrap().lost = count;
    }

    pub(crate) fn break_creations(&self, count: usize) {
        self.state.lock().unwrap().broken = count;
    }

    /// Lets no prediction go on, or all again.
    pub(crate) fn hold(&self, is_held: bool) {
        self.state.lock().unwrap().is_held = is_held;
    }

    /// Answers no creation, though it makes them, or all again.
    pub(crate) fn stall_creations(&self, is_stalled: bool) {
        self.state.lock().unwrap().is_stalled = is_stalled;
    }

    pub(crate) fn fail_looks(&self, count: usize) {
        self.state.lock().unwrap().faults = count;
    }
}

type Shared = State<Arc<Mutex<Inside>>>;

/// RFC 7807, as Replicate refuses.
fn refuse(status: u16, detail: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    let body =
        json!({"title": status.canonical_reason(), "detail": detail, "status": status.as_u16()});
    (status, Json(body)).into_response()
}

async fn guard(
    State(state): Shared,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let token = request.headers().get("authorization").cloned();
    let is_known = token.is_some_and(|token| token == format!("Bearer {REPLICATE_TOKEN}"));
    if !is_known {
        return refuse(401, "You did not pass a valid authentication token");
    }
    let asked = format!("{} {}", request.method(), request.uri().path());
    state.lock().unwrap().asked.push(asked);
    next.run(request).await
}

fn schema(name: &str) -> Value {
    let output = match name {
        "writer" => json!({"type": "array", "items": {"type": "string"},
            "x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"}),
        "thinker" => json!({"type": "object", "properties": {"score": {"type": "number"}}}),
        _ => json!({"type": "array", "items": {"type": "string", "format": "uri"}}),
    };
    json!({
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {"schemas": {
            "Input": {"type": "object", "title": "Input", "required": ["prompt"], "properties": {
                "prompt": {"type": "string", "title": "Prompt", "description": "What to make", "x-order": 0},
                "width": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024, "x-order": 1},
                "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1, "x-order": 2},
                "aspect_ratio": {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}],
                    "default": "1:1", "x-order": 3},
                "image": {"type": "string", "format": "uri", "x-order": 4},
                "extra_lora": {"type": "string", "x-order": 5},
                "go_fast": {"type": "boolean", "default": true, "x-order": 6},
            }},
            "aspect_ratio": {"enum": ["1:1", "16:9"], "type": "string"},
            "Output": output,
        }},
    })
}

fn version_of(name: &str) -> Value {
    json!({"id": VERSION, "created_at": "2026-01-01T00:00:00Z", "cog_version": "0.13.0",
        "openapi_schema": schema(name)})
}

fn is_known(owner: &str, name: &str) -> bool {
    let names = [
        "painter", "official", "failing", "slow", "writer", "thinker", "hostile", "inline", "many",
    ];
    owner == "acme" && names.contains(&name)
}

async fn model(Path((owner, name)): Path<(String, String)>) -> Response {
    if !is_known(&owner, &name) {
        return refuse(404, "The requested resource could not be found.");
    }
    Json(json!({
        "url": format!("https://replicate.com/{owner}/{name}"),
        "owner": owner, "name": name, "description": null, "visibility": "public",
        "is_official": name == "official",
        "github_url": null, "paper_url": null, "license_url": null, "run_count": 7,
        "cover_image_url": null, "default_example": null, "latest_version": version_of(&name),
    }))
    .into_response()
}

async fn version(Path((owner, name, id)): Path<(String, String, String)>) -> Response {
    match is_known(&owner, &name) && id == VERSION {
        true => Json(version_of(&name)).into_response(),
        false => refuse(404, "The requested resource could not be found."),
    }
}

async fn create_official(
    State(state): Shared,
    Path((owner, name)): Path<(String, String)>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    // Community models are run by their versions.
    if owner != "acme" || name != "official" {
        return refuse(404, "The requested resource could not be found.");
    }
    let answer = make(&state, &format!("{owner}/{name}"), &headers, body);
    stalled(&state).await;
    answer
}

/// For as long as creations are not answered.
async fn stalled(state: &Mutex<Inside>) {
    while state.lock().unwrap().is_stalled {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn create(State(state): Shared, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    if body["version"] != VERSION {
        return refuse(422, "Invalid version or not permitted");
    }
    // One version for all: which model is meant stands in the prompt, as `model: …`.
    let prompt = body["input"]["prompt"].as_str().unwrap_or_default();
    let name = prompt
        .split_once("model: ")
        .map_or("painter", |(_, name)| name);
    let name = format!(
        "acme/{}",
        name.split_whitespace().next().unwrap_or("painter")
    );
    let answer = make(&state, &name, &headers, body);
    stalled(&state).await;
    answer
}

fn make(state: &Mutex<Inside>, model: &str, headers: &HeaderMap, body: Value) -> Response {
    let mut state = state.lock().unwrap();
    if state.throttled > 0 {
        state.throttled -= 1;
        let mut answer = refuse(429, "Request was throttled. Your rate limit resets in ~0s.");
        answer
            .headers_mut()
            .insert("retry-after", "0".parse().unwrap());
        return answer;
    }
    if state.broken > 0 {
        state.broken -= 1;
        return refuse(502, "Bad gateway");
    }
    if !body["input"]["prompt"].is_string() {
        return refuse(422, "- input: prompt is required\n");
    }
    let word = |name: &str| {
        let value = headers.get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let id = format!("p{}", uuid::Uuid::now_v7().simple());
    let mut made = Made {
        id: id.clone(),
        model: model.to_owned(),
        input: body["input"].clone(),
        looks: 0,
        status: "starting",
        created_at: Timestamp::now(),
        cancel_after: word("cancel-after"),
    };
    if word("prefer").is_some_and(|prefer| prefer.starts_with("wait")) {
        advance(&mut made);
        advance(&mut made);
    }
    let told = told(&made, &state.base);
    state.predictions.insert(id, made);
    if state.lost > 0 {
        state.lost -= 1;
        return refuse(502, "Bad gateway");
    }
    (StatusCode::CREATED, Json(told)).into_response()
}

fn advance(made: &mut Made) {
    made.looks += 1;
    made.status = match (made.status, made.looks, made.model.as_str()) {
        ("starting", ..) => "processing",
        ("processing", _, "acme/slow") => "processing",
        ("processing", _, "acme/failing") => "failed",
        ("processing", looks, _) if looks >= 2 => "succeeded",
        (status, ..) => status,
    };
}

fn told(made: &Made, base: &str) -> Value {
    let id = &made.id;
    let is_over = !["starting", "processing"].contains(&made.status);
    let logs = match made.status {
        "starting" => "",
        "processing" => "Using seed: 7\n 50%|█████     | 2/4 [00:01<00:01]\n",
        _ => {
            "Using seed: 7\n 50%|█████     | 2/4 [00:01<00:01]\n100%|██████████| 4/4\ndone\u{1b}]0;owned\u{7}"
        }
    };
    let count = match made.model.as_str() {
        // Whatever it is asked for.
        "acme/many" => 3,
        _ => made.input["num_outputs"].as_u64().unwrap_or(1),
    };
    let files: Vec<String> = (0..count)
        .map(|index| format!("{base}/delivery/{id}/out-{index}.png"))
        .collect();
    let output = match (made.status, made.model.as_str()) {
        ("succeeded", "acme/writer") => json!(["Once ", "upon", " a time"]),
        ("succeeded", "acme/thinker") => json!({"score": 0.5}),
        ("succeeded", "acme/inline") => json!("data:image/gif;base64,R0lGODlhAQABAAAAACw="),
        ("succeeded", "acme/hostile") => json!({
            "../../escape": files[0],
            "inside": "http://169.254.169.254/latest/meta-data/",
            "elsewhere": "https://replicate.delivery.example.com/x.png",
            "api": format!("{base}/v1/predictions"),
            "named": format!("{}/delivery/{id}/out-0.png", base.replace("//", "//me:word@")),
            "beside": files[0].replace("127.0.0.1", "localhost"),
            "moved": format!("{base}/delivery/{id}/moved.png"),
            "huge": format!("{base}/delivery/{id}/missing.png"),
        }),
        ("succeeded", _) => json!(files),
        _ => Value::Null,
    };
    json!({
        "id": id, "model": made.model, "version": VERSION, "status": made.status,
        "input": made.input, "output": output, "logs": logs, "source": "api",
        "error": if made.status == "failed" { json!("CUDA out of memory\nTry fewer") } else { Value::Null },
        "created_at": made.created_at.to_string(),
        "started_at": null,
        "completed_at": if is_over { json!(Timestamp::now().to_string()) } else { Value::Null },
        "metrics": if is_over { json!({"predict_time": 2.5, "total_time": 4.0}) } else { json!({}) },
        "data_removed": false,
        "urls": {
            "get": format!("{base}/v1/predictions/{id}"),
            "cancel": format!("{base}/v1/predictions/{id}/cancel"),
        },
    })
}

async fn list(State(state): Shared) -> Response {
    let state = state.lock().unwrap();
    let mut all: Vec<&Made> = state.predictions.values().collect();
    all.sort_by_key(|made| std::cmp::Reverse(made.created_at));
    let results: Vec<Value> = all.iter().map(|made| told(made, &state.base)).collect();
    Json(json!({"next": null, "previous": null, "results": results})).into_response()
}

async fn prediction(State(state): Shared, Path(id): Path<String>) -> Response {
    let mut state = state.lock().unwrap();
    if state.faults > 0 {
        state.faults -= 1;
        return refuse(503, "Down for a moment");
    }
    let (base, is_held) = (state.base.clone(), state.is_held);
    match state.predictions.get_mut(&id) {
        None => refuse(404, "The requested resource could not be found."),
        Some(made) => {
            if !is_held {
                advance(made);
            }
            Json(told(made, &base)).into_response()
        }
    }
}

async fn cancel(State(state): Shared, Path(id): Path<String>) -> Response {
    let mut state = state.lock().unwrap();
    let base = state.base.clone();
    match state.predictions.get_mut(&id) {
        None => refuse(404, "The requested resource could not be found."),
        Some(made) => {
            if ["starting", "processing"].contains(&made.status) {
                made.status = "canceled";
            }
            Json(told(made, &base)).into_response()
        }
    }
}

async fn upload(State(state): Shared, mut form: axum::extract::Multipart) -> Response {
    let mut found = None;
    while let Ok(Some(field)) = form.next_field().await {
        if field.name() != Some("content") {
            continue;
        }
        let name = field.file_name().unwrap_or_default().to_owned();
        let kind = field.content_type().unwrap_or_default().to_owned();
        found = Some((name, kind, field.bytes().await.unwrap()));
    }
    let Some(file) = found else {
        return refuse(400, "content: Missing");
    };
    let mut state = state.lock().unwrap();
    let id = format!("file{}", state.files.len());
    let told = json!({
        "id": id, "name": file.0, "content_type": file.1, "size": file.2.len(), "etag": "x",
        "checksums": {}, "metadata": {}, "created_at": "2026-01-01T00:00:00Z",
        "expires_at": "2026-01-02T00:00:00Z",
        "urls": {"get": format!("{}/v1/files/{id}", state.base)},
    });
    state.files.push(file);
    (StatusCode::CREATED, Json(told)).into_response()
}

async fn sent_file(State(state): Shared, Path(id): Path<String>) -> Response {
    let state = state.lock().unwrap();
    let index = id.strip_prefix("file").and_then(|index| index.parse().ok());
    match index.and_then(|index: usize| state.files.get(index)) {
        None => refuse(404, "The requested resource could not be found."),
        Some((name, kind, bytes)) => Json(json!({
            "id": id, "name": name, "content_type": kind, "size": bytes.len(), "etag": "x",
            "checksums": {}, "metadata": {}, "created_at": "2026-01-01T00:00:00Z",
            "expires_at": null, "urls": {"get": format!("{}/v1/files/{id}", state.base)},
        }))
        .into_response(),
    }
}

async fn deliver(
    State(state): Shared,
    Path((id, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let mut state = state.lock().unwrap();
    let token = headers.get("authorization");
    let token = token
        .and_then(|token| token.to_str().ok())
        .map(str::to_owned);
    state.fetched.push((format!("{id}/{name}"), token));
    match name.as_str() {
        "missing.png" => refuse(404, "gone"),
        "moved.png" => {
            let to = [("location", "http://10.0.0.1/secret")];
            (StatusCode::FOUND, to).into_response()
        }
        _ => ([("content-type", "image/png")], state.picture.clone()).into_response(),
    }
}
