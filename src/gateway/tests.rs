//! The gateway between a real client and a real (small) upstream, over sockets.

use std::{
    future::pending,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::{config::Secret, domain::Account, usage::LedgerSettings};

const CANARY: &str = "sk-canary-5678";
const PATIENCE: Duration = Duration::from_secs(20);

/// Awaits with a generous limit, so that a broken gateway fails a test and never hangs it.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it should have happened by now")
}

struct Room {
    tasks: Tasks,
    gateway: Gateway,
    client: reqwest::Client,
}

impl Room {
    /// A gateway in front of an upstream that answers as `handler` does.
    async fn with<H, F>(credential: Credential, handler: H) -> Self
    where
        H: Fn(Request) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response> + Send + 'static,
    {
        let tasks = Tasks::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = format!("http://{}/base/", listener.local_addr().unwrap());
        let app = Router::new().fallback(handler);
        tasks.spawn("upstream", async move {
            axum::serve(listener, app).await.unwrap()
        });
        Self::before(&upstream, credential, tasks).await
    }

    async fn before(upstream: &str, credential: Credential, tasks: Tasks) -> Self {
        let config = GatewayConfig {
            upstream: upstream.parse().unwrap(),
            credential,
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(LedgerSettings::default(), &tasks),
        };
        let gateway = Gateway::start(config, &tasks).await.unwrap();
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()
            .unwrap();
        Self {
            tasks,
            gateway,
            client,
        }
    }

    fn post(&self, token: &str) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/messages?beta=true", self.gateway.base_url());
        self.client.post(url).bearer_auth(token)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

fn key() -> Credential {
    Credential::ApiKey(Secret::new(CANARY))
}

fn never_called(_: Request) -> std::future::Ready<Response> {
    panic!("nothing may reach the upstream")
}

/// Tells by its closing channel that whoever held it was dropped.
type Alive = mpsc::Sender<()>;

/// A body that sends one chunk and then never ends; it holds `alive`.
fn endless(alive: Alive) -> Body {
    let first = stream::iter([Ok::<_, io::Error>(Bytes::from("event: ping\n\n"))]);
    Body::from_stream(first.chain(stream::once(async move {
        let _alive = alive;
        pending().await
    })))
}

#[tokio::test]
async fn the_credential_goes_up_and_is_never_shown() {
    let oauth = Credential::OAuth {
        access: Secret::new(CANARY),
        refresh: None,
        expires: None,
    };
    for credential in [key(), oauth] {
        let seen = Arc::new(Mutex::new(None));
        let record = seen.clone();
        let is_oauth = matches!(credential, Credential::OAuth { .. });
        let room = Room::with(credential, move |request: Request| {
            *record.lock().unwrap() = Some((request.uri().to_string(), request.headers().clone()));
            async {
                let headers = [
                    ("request-id", "req_1"),
                    ("retry-after", "7"),
                    ("anthropic-ratelimit-x", "1"),
                    ("set-cookie", "a=b"),
                ];
                (StatusCode::TOO_MANY_REQUESTS, headers, "slow down").into_response()
            }
        })
        .await;
        let token = room.gateway.issue();
        let run = token.begin(Account::of_kind("test"));
        let answer = soon(
            room.post(token.as_str())
                .header("anthropic-beta", "one-1")
                .header("x-claude-code-session-id", "s")
                .header("cookie", "c=d")
                .header("accept-encoding", "gzip")
                .header("connection", "x-private")
                .header("x-private", "p")
                .body("{}")
                .send(),
        )
        .await
        .unwrap();

        assert_eq!(answer.status(), 429);
        assert_eq!(answer.headers()["request-id"], "req_1");
        assert_eq!(answer.headers()["retry-after"], "7");
        assert_eq!(answer.headers()["anthropic-ratelimit-x"], "1");
        let shown = format!(
            "{:?} {}",
            answer.headers().clone(),
            answer.text().await.unwrap()
        );
        assert!(
            !shown.contains("canary") && !shown.contains("a=b"),
            "{shown}"
        );
        assert!(shown.ends_with("slow down"));
        assert_eq!(run.requests(), 1);
        assert_eq!(run.last_upstream_status(), Some(429));
        let retry_after = Some(Duration::from_secs(7));
        assert_eq!(
            run.upstream_note(),
            Some(UpstreamNote::Answered {
                status: 429,
                retry_after
            })
        );

        let (uri, up): (String, HeaderMap) = seen.lock().unwrap().take().unwrap();
        assert_eq!(uri, "/base/v1/messages?beta=true");
        let all = format!("{up:?}");
        assert!(!all.contains(token.as_str()), "{all}");
        for gone in ["cookie", "x-private", "connection"] {
            assert!(!up.contains_key(gone), "{gone}");
        }
        assert_eq!(up["accept-encoding"], "identity");
        assert_eq!(up["x-claude-code-session-id"], "s");
        assert_ne!(up["host"], format!("127.0.0.1:{}", room.gateway.port()));
        if is_oauth {
            assert_eq!(up["authorization"], format!("Bearer {CANARY}"));
            assert_eq!(up["anthropic-beta"], "one-1,oauth-2025-04-20");
            assert!(!up.contains_key("x-api-key"));
        } else {
            assert_eq!(up["x-api-key"], CANARY);
            assert_eq!(up["anthropic-beta"], "one-1");
            assert!(!up.contains_key("authorization"));
        }
    }
}

#[tokio::test]
async fn nothing_passes_without_a_token_a_run_and_a_needed_path() {
    let room = Room::with(key(), never_called).await;
    let token = room.gateway.issue();
    let other = format!("{}/v1/files", room.gateway.base_url());
    let check = async |request: reqwest::RequestBuilder, status: u16, kind: &str| {
        let answer = soon(request.body("{}").send()).await.unwrap();
        assert_eq!(answer.status(), status);
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        assert_eq!(body["type"], "error");
        assert_eq!(body["error"]["type"], kind);
        assert!(body["error"]["message"].is_string());
    };
    check(room.post("wrong"), 401, "authentication_error").await;
    check(room.client.post(&other), 401, "authentication_error").await;
    check(room.post(token.as_str()), 403, "permission_error").await;
    drop(token.begin(Account::of_kind("test")));
    check(room.post(token.as_str()), 403, "permission_error").await;
    let run = token.begin(Account::of_kind("test"));
    check(
        room.client.post(&other).bearer_auth(token.as_str()),
        404,
        "not_found_error",
    )
    .await;
    assert_eq!(run.requests(), 0);
    let text = token.as_str().to_owned();
    drop(token);
    check(room.post(&text), 401, "authentication_error").await;
    let probe = soon(room.client.head(room.gateway.base_url()).send())
        .await
        .unwrap();
    assert_eq!(probe.status(), 200);
}

#[tokio::test]
async fn chunks_pass_as_they_come() {
    let (release, released) = oneshot::channel::<()>();
    let released = Arc::new(Mutex::new(Some(released)));
    let room = Room::with(key(), move |_| {
        let released = released.lock().unwrap().take().unwrap();
        let first = stream::iter([Ok::<_, io::Error>(Bytes::from("one"))]);
        let second = stream::once(async move {
            released.await.ok();
            Ok(Bytes::from("two"))
        });
        std::future::ready(Body::from_stream(first.chain(second)).into_response())
    })
    .await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let mut answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    assert_eq!(soon(answer.chunk()).await.unwrap().unwrap(), "one");
    release.send(()).unwrap();
    assert_eq!(soon(answer.chunk()).await.unwrap().unwrap(), "two");
    assert_eq!(soon(answer.chunk()).await.unwrap(), None);
}

#[tokio::test]
async fn a_client_that_goes_away_and_a_run_that_ends_cancel_the_upstream() {
    let (alive, mut dropped) = mpsc::channel::<()>(1);
    let alive = Arc::new(Mutex::new(Some(alive)));
    let holder = alive.clone();
    let room = Room::with(key(), move |request: Request| {
        let alive = holder.lock().unwrap().take().unwrap();
        let wants_head = !request.headers().contains_key("x-no-head");
        async move {
            if wants_head {
                endless(alive).into_response()
            } else {
                pending().await
            }
        }
    })
    .await;
    let token = room.gateway.issue();
    let mut next = || {
        let (sender, receiver) = mpsc::channel(1);
        *alive.lock().unwrap() = Some(sender);
        std::mem::replace(&mut dropped, receiver)
    };

    // In the middle of the answer, by the client.
    let run = token.begin(Account::of_kind("test"));
    let mut answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    soon(answer.chunk()).await.unwrap();
    drop(answer);
    let mut first = next();
    assert_eq!(soon(first.recv()).await, None);

    // Before the answer began, by the client.
    let waiting = room
        .post(token.as_str())
        .header("x-no-head", "1")
        .body("{}")
        .send();
    let waiting = room
        .tasks
        .spawn("waiting", async move { drop(waiting.await) });
    soon(async {
        while run.requests() < 2 || alive.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    waiting.abort();
    let mut second = next();
    assert_eq!(soon(second.recv()).await, None);

    // In the middle of the answer, by the end of the run: the client sees a cut, not an end.
    let mut answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    soon(answer.chunk()).await.unwrap();
    drop(run);
    assert!(soon(answer.chunk()).await.is_err());
    let mut third = next();
    assert_eq!(soon(third.recv()).await, None);
}

#[tokio::test]
async fn a_stream_cut_upstream_is_cut_downstream() {
    let room = Room::with(key(), |_| async {
        let chunks = [Ok(Bytes::from("one")), Err(io::Error::other("cut"))];
        // The error must not overtake the chunk before it.
        let chunks = stream::iter(chunks).then(|chunk| async {
            tokio::task::yield_now().await;
            chunk
        });
        Body::from_stream(chunks).into_response()
    })
    .await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    assert!(soon(answer.bytes()).await.is_err());
}

#[tokio::test]
async fn large_bodies_stream_up_to_the_bound() {
    let room = Room::with(key(), |request: Request| async {
        let length = request.headers().get("content-length").cloned();
        let mut bytes = 0;
        let mut body = request.into_body().into_data_stream();
        while let Some(Ok(chunk)) = body.next().await {
            bytes += chunk.len();
        }
        let length = length.unwrap_or(HeaderValue::from_static("none"));
        format!("{bytes} {}", length.to_str().unwrap()).into_response()
    })
    .await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let sent = vec![b' '; 3 << 20];
    let answer = soon(room.post(token.as_str()).body(sent).send())
        .await
        .unwrap();
    assert_eq!(answer.text().await.unwrap(), "3145728 3145728");

    let mib = Bytes::from(vec![b' '; 1 << 20]);
    let chunks = stream::repeat(mib).take(65).map(Ok::<_, io::Error>);
    let endless = reqwest::Body::wrap_stream(chunks);
    // The refusal may overtake the rest of the body; then the client sees its connection closed.
    if let Ok(answer) = soon(room.post(token.as_str()).body(endless).send()).await {
        assert_eq!(answer.status(), 413);
    }
    let declared = room
        .post(token.as_str())
        .header("content-length", (64 << 20) + 1);
    let never = reqwest::Body::wrap_stream(stream::pending::<io::Result<Bytes>>());
    let answer = soon(declared.body(never).send()).await.unwrap();
    assert_eq!(answer.status(), 413);
}

#[tokio::test]
async fn an_unreachable_upstream_is_502_without_its_address() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = free.local_addr().unwrap();
    drop(free);
    let upstream = format!("http://user:hunter2@{closed}");
    let room = Room::before(&upstream, key(), Tasks::new()).await;
    let token = room.gateway.issue();
    let run = token.begin(Account::of_kind("test"));
    let answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    assert_eq!(answer.status(), 502);
    let body = answer.text().await.unwrap();
    assert!(
        body.contains("api_error") && body.contains("could not be reached"),
        "{body}"
    );
    assert!(
        !body.contains("hunter2") && !body.contains("canary"),
        "{body}"
    );
    assert_eq!(run.upstream_note(), Some(UpstreamNote::Unreachable));
    assert_eq!(run.last_upstream_status(), None);
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let (saw, mut seen) = mpsc::unbounded_channel();
    let room = Room::with(key(), move |request: Request| {
        saw.send(request.uri().path().to_owned()).unwrap();
        // 303 asks for a GET, which could be repeated without the streamed body.
        std::future::ready((StatusCode::SEE_OTHER, [("location", "/elsewhere")]).into_response())
    })
    .await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let answer = soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    assert_eq!(answer.status(), 502);
    assert!(!answer.headers().contains_key("location"));
    assert_eq!(seen.recv().await.unwrap(), "/base/v1/messages");
    assert!(seen.try_recv().is_err(), "nothing else was asked for");
}

#[tokio::test]
async fn unusable_settings_are_refused_at_the_start() {
    let tasks = Tasks::new();
    for (upstream, credential) in [
        ("ftp://example.com", key()),
        (
            "https://example.com",
            Credential::ApiKey(Secret::new("a\nb")),
        ),
    ] {
        let config = GatewayConfig {
            upstream: upstream.parse().unwrap(),
            credential,
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(LedgerSettings::default(), &tasks),
        };
        let error = Gateway::start(config, &tasks).await.unwrap_err();
        assert!(!error.to_string().contains('\n'));
    }
}

/// A token endpoint: each refresh token is good once. Gives `new-1`, `new-2`, ….
async fn token_endpoint(tasks: &Tasks) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/oauth/token", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = asked.clone();
    let app = Router::new().fallback(move |request: Request| {
        let seen = seen.clone();
        async move {
            let body = axum::body::to_bytes(request.into_body(), 1 << 16)
                .await
                .unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["grant_type"], "refresh_token");
            let token = body["refresh_token"].as_str().unwrap().to_owned();
            let (is_used, number) = {
                let mut seen = seen.lock().unwrap();
                let is_used = seen.contains(&token);
                seen.push(token);
                (is_used, seen.len())
            };
            if is_used {
                let error = serde_json::json!({"error": "invalid_grant"});
                return (StatusCode::BAD_REQUEST, axum::Json(error)).into_response();
            }
            // Whoever else asks comes meanwhile.
            tokio::time::sleep(Duration::from_millis(50)).await;
            axum::Json(serde_json::json!({
                "access_token": format!("access-{number}-{CANARY}"),
                "refresh_token": format!("refresh-{number}-{CANARY}"),
                "expires_in": 28800,
            }))
            .into_response()
        }
    });
    tasks.spawn("token endpoint", async move {
        axum::serve(listener, app).await.unwrap();
    });
    (url, asked)
}

fn oauth(access: &str, refresh: &str, expires: jiff::Timestamp) -> Credential {
    Credential::OAuth {
        access: Secret::new(access),
        refresh: Some(Secret::new(refresh)),
        expires: Some(expires),
    }
}

/// A gateway whose upstream tells which token it saw, and takes those that `is_good` says.
async fn oauth_room(
    credential: Credential,
    endpoint: &str,
    store: &std::path::Path,
    is_good: fn(&str) -> bool,
) -> (Room, Arc<Mutex<Vec<String>>>) {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let record = seen.clone();
    let tasks = Tasks::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("http://{}", listener.local_addr().unwrap());
    let app = Router::new().fallback(move |request: Request| {
        let record = record.clone();
        async move {
            let token = request.headers()["authorization"]
                .to_str()
                .unwrap()
                .to_owned();
            let body = axum::body::to_bytes(request.into_body(), 1 << 20)
                .await
                .unwrap();
            record.lock().unwrap().push(token.clone());
            if is_good(&token) {
                format!("{}", body.len()).into_response()
            } else {
                (StatusCode::UNAUTHORIZED, "who are you?").into_response()
            }
        }
    });
    tasks.spawn("upstream", async move {
        axum::serve(listener, app).await.unwrap();
    });
    let config = GatewayConfig {
        upstream: upstream.parse().unwrap(),
        credential,
        oauth: OAuthSettings {
            endpoint: endpoint.parse().unwrap(),
            file: None,
            store: Some(store.to_owned()),
            hide: |_| {},
        },
        ledger: Ledger::new(LedgerSettings::default(), &tasks),
    };
    let gateway = Gateway::start(config, &tasks).await.unwrap();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .unwrap();
    (
        Room {
            tasks,
            gateway,
            client,
        },
        seen,
    )
}

fn install_provider() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
}

#[tokio::test]
async fn an_expired_token_is_refreshed_once_and_survives_a_restart() {
    install_provider();
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let (endpoint, asked) = token_endpoint(&tasks).await;
    let old = || oauth("old", "first", "2026-01-01T00:00:00Z".parse().unwrap());
    let (room, seen) = oauth_room(old(), &endpoint, dir.path(), |_| true).await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let requests = (0..5).map(|_| room.post(token.as_str()).body("{}").send());
    for answer in soon(futures_util::future::join_all(requests)).await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    let expected = format!("Bearer access-1-{CANARY}");
    assert_eq!(*seen.lock().unwrap(), vec![expected.clone(); 5]);
    assert_eq!(*asked.lock().unwrap(), ["first"]);
    // The credentials file still holds the old pair, which is worthless now.
    let stored = dir.path().join("oauth.json");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&stored).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(room);
    let (room, seen) = oauth_room(old(), &endpoint, dir.path(), |_| true).await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    soon(room.post(token.as_str()).body("{}").send())
        .await
        .unwrap();
    assert_eq!(*seen.lock().unwrap(), [expected]);
    assert_eq!(asked.lock().unwrap().len(), 1);
    tasks.cancel();
}

#[tokio::test]
async fn a_refused_token_is_refreshed_and_the_request_goes_up_again() {
    install_provider();
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let (endpoint, asked) = token_endpoint(&tasks).await;
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(4);
    let revoked = oauth("revoked", "first", later);
    let (room, seen) = oauth_room(revoked, &endpoint, dir.path(), |token| {
        token.starts_with("Bearer access-")
    })
    .await;
    let token = room.gateway.issue();
    let run = token.begin(Account::of_kind("test"));
    let answer = soon(room.post(token.as_str()).body(r#"{"model":"m"}"#).send())
        .await
        .unwrap();
    assert_eq!(
        (
            answer.status().as_u16(),
            answer.text().await.unwrap().as_str()
        ),
        (200, "13")
    );
    assert_eq!(run.last_upstream_status(), Some(200));
    assert_eq!(seen.lock().unwrap().len(), 2);
    assert_eq!(asked.lock().unwrap().len(), 1);
    tasks.cancel();
}

#[tokio::test]
async fn where_no_refresh_helps_the_refusal_is_passed_on() {
    install_provider();
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let (endpoint, asked) = token_endpoint(&tasks).await;
    asked.lock().unwrap().push("used".into());
    let old = oauth("old", "used", "2026-01-01T00:00:00Z".parse().unwrap());
    let (room, _) = oauth_room(old, &endpoint, dir.path(), |_| false).await;
    let token = room.gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    for _ in 0..2 {
        let answer = soon(room.post(token.as_str()).body("{}").send())
            .await
            .unwrap();
        assert_eq!(answer.status(), 401);
    }
    assert!(!dir.path().join("oauth.json").exists());
    tasks.cancel();
}

#[tokio::test]
async fn other_containers_come_in_by_their_client_s_token() {
    let room = Room::with(key(), |request: Request| async move {
        assert_eq!(request.headers()["x-api-key"], CANARY);
        assert!(!request.headers().contains_key("authorization"));
        let usage = r#"{"id":"msg_1","model":"claude-opus-5","usage":{"input_tokens":3,"output_tokens":4}}"#;
        ([("content-type", "application/json")], usage).into_response()
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.json");
    std::fs::write(&file, r#"{"a-token-of-acme-012345": "acme"}"#).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let held = Arc::new(());
    let guard = held.clone();
    let awake = move || Box::new(guard.clone()) as ActivityGuard;
    let opened = room
        .gateway
        .open_to_network(listener, file, awake, &room.tasks);
    soon(opened).await.unwrap();
    let idle = Arc::strong_count(&held);
    let status = async |request: reqwest::RequestBuilder| {
        let answer = soon(request.send()).await.unwrap();
        let status = answer.status().as_u16();
        soon(answer.bytes()).await.unwrap();
        status
    };
    let post = |path: &str| room.client.post(format!("{base}{path}")).body("{}");
    let get = |path: &str| room.client.get(format!("{base}{path}"));
    assert_eq!(status(get("/health")).await, 200);
    assert_eq!(status(post("/v1/messages")).await, 401);
    assert_eq!(status(post("/v1/messages").bearer_auth("wrong")).await, 401);
    let own = room.gateway.issue();
    let _run = own.begin(Account::of_kind("test"));
    assert_eq!(
        status(post("/v1/messages").bearer_auth(own.as_str())).await,
        401
    );
    let token = "a-token-of-acme-012345";
    for request in [
        post("/v1/messages").bearer_auth(token),
        post("/v1/messages").header("x-api-key", token),
        post("/v1/messages/count_tokens").bearer_auth(token),
        get("/v1/models").bearer_auth(token),
    ] {
        assert_eq!(status(request).await, 200);
    }
    assert_eq!(status(post("/v1/files").bearer_auth(token)).await, 404);
    // Nobody is held beyond his answer.
    soon(async {
        while Arc::strong_count(&held) > idle {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let tally = room.gateway.ledger().tally();
    assert_eq!(
        (tally.settled, tally.tokens.input, tally.tokens.output),
        (2, 6, 8)
    );
}

/// What the gateway adds to the first byte: measured on loopback, with a ledger on the disk.
#[tokio::test]
async fn the_first_byte_comes_hardly_later_than_without_us() {
    let events = "data: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"model\":\"claude-opus-5\",\"usage\":{\"input_tokens\":1,\"output_tokens\":1}}}\n\ndata: {\"type\":\"message_stop\"}\n\n";
    let tasks = Tasks::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("http://{}", listener.local_addr().unwrap());
    let app = Router::new().fallback(move |request: Request| async move {
        axum::body::to_bytes(request.into_body(), 1 << 20)
            .await
            .unwrap();
        ([("content-type", "text/event-stream")], events).into_response()
    });
    tasks.spawn("upstream", async move {
        axum::serve(listener, app).await.unwrap();
    });
    let dir = tempfile::tempdir().unwrap();
    let settings = LedgerSettings {
        workspace: Some(dir.path().to_owned()),
        ..LedgerSettings::default()
    };
    let config = GatewayConfig {
        upstream: upstream.parse().unwrap(),
        credential: key(),
        oauth: OAuthSettings::default(),
        ledger: Ledger::new(settings, &tasks),
    };
    let gateway = Gateway::start(config, &tasks).await.unwrap();
    install_provider();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .unwrap();
    let token = gateway.issue();
    let _run = token.begin(Account::of_kind("test"));
    let body = format!(
        r#"{{"model":"claude-opus-5","messages":["{}"],"max_tokens":128000}}"#,
        "x".repeat(60_000)
    );
    let median = async |base: &str| {
        let mut times = Vec::new();
        for _ in 0..60 {
            let request = client
                .post(format!("{base}/v1/messages"))
                .bearer_auth(token.as_str())
                .body(body.clone());
            let begun = std::time::Instant::now();
            let mut answer = soon(request.send()).await.unwrap();
            soon(answer.chunk()).await.unwrap().unwrap();
            times.push(begun.elapsed());
            while soon(answer.chunk()).await.unwrap().is_some() {}
        }
        times.sort();
        times[times.len() / 2]
    };
    let direct = median(&upstream).await;
    let through = median(&gateway.base_url()).await;
    let added = through.saturating_sub(direct);
    println!("first byte: {direct:?} direct, {through:?} through the gateway, {added:?} added");
    // An unoptimised build on a busy machine has room, by as much as that is slower.
    assert!(
        added < (direct * 20).max(Duration::from_millis(20)),
        "{added:?}"
    );
    tasks.cancel();
}
