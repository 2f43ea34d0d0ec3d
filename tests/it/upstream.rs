//! The way to the model API: the operator's proxy and authority, OAuth tokens that are refreshed,
//! and where none of them may be found.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{Json, Router, extract::State, routing::post};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, files_below, holds, processes_below, rule,
    runs, who,
};

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Speaks TLS as `name`, with a certificate that only `authority` vouches for, and passes on to
/// `upstream`.
async fn behind_tls(upstream: &str, name: &str, authority: &Path) -> u16 {
    let own = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    fs::write(authority, own.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], PrivateKeyDer::Pkcs8(key))
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let upstream = upstream.strip_prefix("http://").unwrap().to_owned();
    let (listener, port) = listen().await;
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, upstream) = (acceptor.clone(), upstream.clone());
            #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
            tokio::spawn(async move {
                let mut outside = acceptor.accept(socket).await.ok()?;
                let mut inside = TcpStream::connect(upstream).await.ok()?;
                copy_bidirectional(&mut outside, &mut inside).await.ok()
            });
        }
    });
    port
}

/// An HTTP proxy that knows every name as this port. Tells what it was asked for.
pub(crate) async fn proxy(to: u16) -> (u16, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let (listener, port) = listen().await;
    let record = asked.clone();
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let record = record.clone();
            #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
            tokio::spawn(async move {
                let mut socket = BufReader::new(socket);
                let mut line = String::new();
                socket.read_line(&mut line).await.ok()?;
                record.lock().unwrap().push(line.trim().to_owned());
                while line.trim() != "" {
                    line.clear();
                    socket.read_line(&mut line).await.ok()?;
                }
                socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
                let mut upstream = TcpStream::connect(("127.0.0.1", to)).await.ok()?;
                copy_bidirectional(&mut socket, &mut upstream).await.ok()
            });
        }
    });
    (port, asked)
}

#[tokio::test]
async fn the_operator_s_proxy_and_authority_are_used() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let api = StandIn::start(json!({})).await;
    let authority = folders.join("authority.pem");
    let name = "models.example.com";
    let tls = behind_tls(&api.url(), name, &authority).await;
    let (port, asked) = proxy(tls).await;
    let options = Options::new(&folders)
        .api(&api)
        .env("ANTHROPIC_BASE_URL", format!("https://{name}"))
        .env("HTTPS_PROXY", format!("http://127.0.0.1:{port}"));
    let alice = who("acme", "alice", "main");
    // Nobody vouches for it.
    let greenroom = TestGreenroom::start(options.clone()).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    // A slow machine's agent needs longer for its first request.
    for seconds in [5, 20, 60] {
        let fields = json!({"instruction": "Change the heading to One", "timeoutSeconds": seconds});
        let answer = greenroom.execute_with(&alice, fields).await.answer;
        assert!(answer.status >= 500, "{}", answer.text);
        if !asked.lock().unwrap().is_empty() {
            break;
        }
    }
    assert!(!asked.lock().unwrap().is_empty() && api.requests().is_empty());
    drop(greenroom);
    let greenroom = TestGreenroom::start(options.env("SSL_CERT_FILE", authority)).await;
    greenroom
        .execute(&alice, "Change the heading to Two")
        .await
        .ok();
    assert!(api.requests_about("Two").len() > 1);
    let asked = asked.lock().unwrap();
    assert!(
        asked
            .iter()
            .all(|line| line.starts_with("CONNECT models.example.com:443 ")),
        "{asked:?}"
    );
}

const FIRST_ACCESS: &str = "canary-access-0-8b1d";
const FIRST_REFRESH: &str = "canary-refresh-0-8b1d";

/// A token endpoint that takes each refresh token once.
async fn token_endpoint() -> (String, Arc<Mutex<Vec<String>>>) {
    type Seen = Arc<Mutex<Vec<String>>>;
    async fn grant(
        State(seen): State<Seen>,
        Json(body): Json<Value>,
    ) -> Result<Json<Value>, axum::http::StatusCode> {
        let token = body["refresh_token"].as_str().unwrap().to_owned();
        let mut seen = seen.lock().unwrap();
        if seen.contains(&token) {
            return Err(axum::http::StatusCode::BAD_REQUEST);
        }
        seen.push(token);
        let number = seen.len();
        Ok(Json(json!({
            "token_type": "Bearer",
            "access_token": format!("canary-access-{number}-8b1d"),
            "refresh_token": format!("canary-refresh-{number}-8b1d"),
            "expires_in": 28800,
        })))
    }
    let seen = Seen::default();
    let app = Router::new()
        .route("/v1/oauth/token", post(grant))
        .with_state(seen.clone());
    let (listener, port) = listen().await;
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("http://127.0.0.1:{port}/v1/oauth/token"), seen)
}

#[tokio::test]
async fn oauth_tokens_are_refreshed_kept_and_found_nowhere() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    // Wherever an agent could look; what is found ends in its worktree.
    let pattern = "canary-[ar]";
    let looks = [
        "env".to_owned(),
        "cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'".to_owned(),
        "git config --list --show-origin; cat .git/config ../../project/.git/config ../../project/config".to_owned(),
        format!("cat {0}/.greenroom/* {0}/.greenroom/*/* ../../.greenroom/*", folders.workspace().display()),
        format!("cat {0}/credentials/* ~/.claude/* $CLAUDE_CONFIG_DIR/*", folders.join("").display()),
        "curl -s $ANTHROPIC_BASE_URL/v1/models -H \"authorization: Bearer $ANTHROPIC_AUTH_TOKEN\" -D -".to_owned(),
    ];
    let script: String = looks
        .iter()
        .map(|look| format!("( {look} ) 2>&1 | grep -ao '{pattern}.*' >> found.txt\n"))
        .collect();
    let api = StandIn::start(json!({
        "wrong_keys": [FIRST_ACCESS],
        "rules": [rule("look around", &[runs(&format!("{script}\necho looked >> found.txt"))])],
    }))
    .await;
    let (endpoint, granted) = token_endpoint().await;
    let file = folders.join("credentials/credentials.json");
    fs::create_dir(file.parent().unwrap()).unwrap();
    let expired = json!({"type": "oauth", "oauth": {"accessToken": FIRST_ACCESS,
        "refreshToken": FIRST_REFRESH, "expiresAt": 1_790_000_000_000_u64}});
    fs::write(&file, expired.to_string()).unwrap();
    // As it is mounted in production.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    let options = Options::new(&folders)
        .env("ANTHROPIC_BASE_URL", api.url())
        .env("CLAUDE_CREDENTIALS_FILE", &file)
        .env("CLAUDE_OAUTH_TOKEN_URL", endpoint)
        .env("LOG_LEVEL", "trace");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let turn = greenroom.execute(&alice, "look around").await;
    let mut said = vec![turn.answer.text.clone()];
    let result = turn.ok();
    let id = result["turnId"].as_str().unwrap();
    said.push(greenroom.get(&format!("/api/turns/{id}/events")).await.text);
    for path in ["/ready", "/metrics", "/api/usage", "/health"] {
        said.push(greenroom.get(path).await.text);
    }
    let found = fs::read_to_string(folders.worktree(&alice).join("found.txt")).unwrap();
    assert_eq!(found, "looked\n");
    assert_eq!(*granted.lock().unwrap(), [FIRST_REFRESH]);

    let store = folders.workspace().join(".greenroom/oauth.json");
    assert!(holds(&store, "canary-refresh-1-8b1d"));
    assert_eq!(
        fs::metadata(&store).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let secret = |text: &str| text.contains("canary-access-") || text.contains("canary-refresh-");
    for root in ["workspace", "home", "tmp", "cache"] {
        for path in files_below(&folders.join(root))
            .iter()
            .filter(|path| **path != store)
        {
            let is_clean = !holds(path, "canary-access-") && !holds(path, "canary-refresh-");
            assert!(is_clean, "{}", path.display());
        }
    }
    let children = processes_below(&folders.join(""));
    assert!(children.len() > 1);
    for child in children {
        assert!(
            !secret(&child.environment) && !secret(&child.command),
            "{}",
            child.command
        );
    }
    let log = greenroom.log().join("\n");
    assert!(log.contains("the OAuth token was refreshed") && !secret(&log));
    assert!(said.iter().all(|text| !secret(text)));

    // The pair in the credentials file is worthless by now; the kept one is not.
    let greenroom = greenroom.restart().await;
    greenroom
        .execute(&alice, "Change the heading to Two")
        .await
        .ok();
    assert_eq!(granted.lock().unwrap().len(), 1);
    assert!(api.requests_about("Two").len() > 1);
}
