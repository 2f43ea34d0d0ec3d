//! The way out of children, seen from outside: with `EGRESS_ALLOW` agents, dev servers and installers
//! reach the hosts that it names, by greenroom's proxy, and nobody else.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    http::Uri,
    response::{IntoResponse as _, Response},
};
use greenroom::task::Tasks;
use serde_json::{Value, json};

use crate::{
    support::{
        Answer, Folders, Options, SITE, Sent, StandIn, TestGreenroom, Who, git, request, who,
    },
    upstream::proxy,
};

/// Answers by path, and remembers what it was asked for.
struct Web {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    tasks: Tasks,
}

impl Web {
    async fn start(answer: impl Fn(u16, &str) -> Response + Clone + Send + Sync + 'static) -> Self {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let record = asked.clone();
        let router = Router::new().fallback(move |uri: Uri| {
            let (record, answer) = (record.clone(), answer.clone());
            async move {
                record.lock().unwrap().push(uri.path().to_owned());
                answer(port, uri.path())
            }
        });
        let tasks = Tasks::new();
        let token = tasks.token().clone();
        tasks.spawn("web", async move {
            tokio::select! {
                served = async { axum::serve(listener, router).await } => served.unwrap(),
                () = token.cancelled() => {}
            }
        });
        Self { port, asked, tasks }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

/// `CONNECT` to each of these places by the proxy of the environment, the answers' first lines in
/// `out`; then directly.
const TRY: &str = r#"#!/bin/bash
mkdir -p out
ask() {
  timeout 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/${HTTPS_PROXY##*:}
    printf "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" "$0" "$0" >&3; head -n1 <&3' "$1" 2>&1
}
for place in "$@"; do ask "$place" > "out/$place"; done
timeout 20 bash -c 'exec 3<>/dev/tcp/203.0.113.9/443' > out/direct 2>&1 && echo REACHED >> out/direct
env > out/environment
"#;

const ALLOWED: [&str; 3] = [
    "api.example.com:443",
    "a.cdn.example:443",
    "API.example.com.:80",
];
const REFUSED: [&str; 9] = [
    "other.example:443",
    "cdn.example:443",
    "api.example.com:22",
    "api.example.com.evil.example:443",
    "203.0.113.9:443",
    "127.0.0.1:443",
    "169.254.170.2:80",
    "[::1]:443",
    "2130706433:80",
];

#[tokio::test]
async fn an_agent_reaches_the_hosts_that_are_named_and_no_others() {
    let api = StandIn::start(json!({})).await;
    let web = Web::start(|_, _| "hello".into_response()).await;
    let (operators, asked) = proxy(web.port).await;
    let folders = Folders::new();
    let mut files = SITE.to_vec();
    files.push(("try.sh", TRY));
    let site = folders.site("site", &files);
    let operators = format!("http://127.0.0.1:{operators}");
    let options = Options::new(&folders)
        .api(&api)
        .env("EGRESS_ALLOW", "api.example.com, .cdn.example, localhost")
        .env("HTTPS_PROXY", &operators)
        .env("HTTP_PROXY", &operators)
        // Looked up here, and found to lead inside.
        .env("NO_PROXY", "localhost");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let places = [ALLOWED.as_slice(), &REFUSED, &["localhost:443"]].concat();
    let places = places.join(" ");
    greenroom
        .execute(&alice, &format!("Run `bash try.sh {places}`"))
        .await
        .ok();
    let out = folders.worktree(&alice).join("out");
    let found = |name: &str| fs::read_to_string(out.join(name)).unwrap_or_default();
    for place in ALLOWED {
        assert!(
            found(place).starts_with("HTTP/1.1 200"),
            "{place}: {}",
            found(place)
        );
    }
    for place in REFUSED.iter().chain(&["localhost:443"]) {
        assert!(
            found(place).starts_with("HTTP/1.1 403"),
            "{place}: {}",
            found(place)
        );
    }
    assert!(
        found("direct").contains("Permission denied"),
        "{}",
        found("direct")
    );
    // The operator's proxy was asked for what is allowed alone, and no child knows it.
    let asked = asked.lock().unwrap().clone();
    assert!(!asked.is_empty());
    for line in &asked {
        let is_allowed = ["api.example.com:", "a.cdn.example:"]
            .iter()
            .any(|host| line.starts_with(&format!("CONNECT {host}")));
        assert!(is_allowed, "{line}");
    }
    assert!(!found("environment").contains(&operators));

    let log = greenroom.log().join("\n");
    assert!(log.contains("other.example"), "a refusal is told: {log}");
    let figures = greenroom.get("/metrics").await.text;
    for (outcome, count) in [
        ("allowed", 3),
        ("host", 3),
        ("port", 1),
        ("address", 5),
        ("inside", 1),
    ] {
        let line = format!(
            "greenroom_egress_requests_total{{from=\"site\",outcome=\"{outcome}\"}} {count}"
        );
        assert!(figures.contains(&line), "{line}\n{figures}");
    }
    assert!(!figures.contains("example.com"), "no host is named");
}

/// Asks for what its visitor wants to be asked for, and says what came.
const CURIOUS: &str = "import { createServer } from 'node:http';
createServer(async (request, response) => {
  const wanted = new URL(request.url, 'http://x').searchParams.get('wanted');
  if (!wanted) return response.end('own');
  const said = await fetch(wanted.replace('PORT', process.env.PORT))
    .then(async (answer) => `${answer.status} ${await answer.text()}`, (error) => `failed ${error.cause?.code}`);
  response.end(said);
}).listen(Number(process.env.PORT), process.env.HOST);
";

#[tokio::test]
async fn a_dev_server_reaches_the_hosts_that_are_named_and_itself() {
    let web = Web::start(|_, path| format!("web {path}").into_response()).await;
    let (operators, _) = proxy(web.port).await;
    let folders = Folders::new();
    let site = folders.site("site", &[SITE[0], ("server.mjs", CURIOUS), SITE[2]]);
    let options = Options::new(&folders)
        .rehearsal()
        .previews()
        .env("EGRESS_ALLOW", "api.example.com")
        .env("HTTP_PROXY", format!("http://127.0.0.1:{operators}"));
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let init = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    let asks = async |wanted: &str| {
        page(&greenroom, &init, &format!("/?wanted={wanted}"))
            .await
            .text
    };
    assert_eq!(asks("http://api.example.com/x").await, "200 web /x");
    assert_eq!(asks("http://127.0.0.1:PORT/").await, "200 own");
    let refused = asks("http://other.example/x").await;
    assert!(!refused.contains("200"), "{refused}");
    // Past the proxy there is no way; not to another port of this machine either.
    let api = greenroom.api_port;
    let refused = asks(&format!("http://127.0.0.1:{api}/health")).await;
    assert_eq!(refused, "failed EACCES");
    assert_eq!(web.asked(), ["/x"]);
}

/// A page of a preview.
async fn page(greenroom: &TestGreenroom, init: &Value, path: &str) -> Answer {
    let url = init["preview"]["url"].as_str().unwrap();
    let host = url.strip_prefix("http://").unwrap();
    let sent = Sent::new("GET", path, &Value::Null).header("host", host);
    request(greenroom.preview_port, sent).await.unwrap()
}

/// A package whose script at install tries what it may not, and notes what came of it.
const RESTLESS: &str = "const { spawnSync } = require('child_process');
const { writeFileSync } = require('fs');
const run = (script, ...args) => spawnSync('bash', ['-c', script, ...args]).stdout.toString();
const ask = 'exec 3<>/dev/tcp/127.0.0.1/${HTTPS_PROXY##*:}; printf \"CONNECT %s HTTP/1.1\\\\r\\\\nHost: %s\\\\r\\\\n\\\\r\\\\n\" \"$0\" \"$0\" >&3; head -n1 <&3';
const found = Object.fromEntries(process.env.TRIED.split(' ').map((place) => [place, run(ask, place)]));
found.direct = run('timeout 20 bash -c \"exec 3<>/dev/tcp/203.0.113.9/443\" 2>/dev/null && echo REACHED');
found.another = run('timeout 20 bash -c \"exec 3<>/dev/tcp/127.0.0.1/$0\" 2>/dev/null && echo REACHED', process.env.ANOTHER);
writeFileSync('found.json', JSON.stringify({ found, environment: process.env }));
";

/// A package as a registry has it.
fn packed(folders: &Folders, script: &str) -> Bytes {
    let folder = folders.join("packed/package");
    fs::create_dir_all(&folder).unwrap();
    let package = json!({"name": "restless", "version": "1.0.0",
        "scripts": {"postinstall": "node restless.cjs"}});
    fs::write(folder.join("package.json"), package.to_string()).unwrap();
    fs::write(folder.join("restless.cjs"), script).unwrap();
    let file = folders.join("packed/restless.tgz");
    #[expect(clippy::disallowed_methods, reason = "as npm packs a package")]
    let tar = std::process::Command::new("tar")
        .arg("-czf")
        .arg(&file)
        .arg("-C")
        .args([folder.parent().unwrap(), std::path::Path::new("package")])
        .status()
        .unwrap();
    assert!(tar.success());
    fs::read(file).unwrap().into()
}

fn depending(folders: &Folders, package: &str, version: &str) -> String {
    let package = json!({"name": "site", "version": "1.0.0", "private": true,
        "scripts": {"dev": "node server.mjs"}, "dependencies": {package: version}});
    let files = [("package.json", package.to_string())];
    let mut all: Vec<(&str, &str)> = SITE[1..].to_vec();
    all.extend(files.iter().map(|(name, text)| (*name, text.as_str())));
    folders.site("depending", &all)
}

fn installed(folders: &Folders, who: &Who, file: &str) -> PathBuf {
    folders.worktree(who).join("node_modules").join(file)
}

#[tokio::test]
async fn an_installer_reaches_the_operator_s_registry_and_nobody_else() {
    let folders = Folders::new();
    let other = Web::start(|_, _| "other".into_response()).await;
    let tarball = packed(
        &folders,
        &RESTLESS
            .replace(
                "process.env.TRIED",
                &format!("'127.0.0.1:{} example.com:443'", other.port),
            )
            .replace("process.env.ANOTHER", &format!("'{}'", other.port)),
    );
    // No secret and no certificate: npm believes a registry by what the lockfile or the registry says.
    let registry = Web::start(move |port, path| match path {
        "/restless" => axum::Json(json!({"name": "restless", "dist-tags": {"latest": "1.0.0"},
            "versions": {"1.0.0": {"name": "restless", "version": "1.0.0",
                "scripts": {"postinstall": "node restless.cjs"}, "hasInstallScript": true,
                "dist": {"tarball": format!("http://127.0.0.1:{port}/restless.tgz")}}}}))
        .into_response(),
        "/restless.tgz" => tarball.clone().into_response(),
        _ => axum::http::StatusCode::NOT_FOUND.into_response(),
    })
    .await;
    let site = depending(&folders, "restless", "1.0.0");
    let url = format!("http://127.0.0.1:{}/", registry.port);
    let options = Options::new(&folders)
        .rehearsal()
        .previews()
        .env("EGRESS_ALLOW", "none")
        .env("npm_config_registry", &url)
        .env("npm_config_fetch_retries", "0");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let init = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    assert!(registry.asked().contains(&"/restless.tgz".to_owned()));
    let found = fs::read_to_string(installed(&folders, &alice, "restless/found.json"));
    let found: Value = serde_json::from_str(&found.expect("its script ran")).unwrap();
    let at = |name: &str| found["found"][name].as_str().unwrap_or("?").to_owned();
    for place in [
        format!("127.0.0.1:{}", other.port),
        "example.com:443".into(),
    ] {
        assert!(at(&place).starts_with("HTTP/1.1 403"), "{place}: {found}");
    }
    for direct in ["direct", "another"] {
        assert_eq!(at(direct), "", "{direct}: {found}");
    }
    assert!(other.asked().is_empty());
    let figures = greenroom.get("/metrics").await.text;
    let line = "greenroom_egress_requests_total{from=\"installer\",outcome=\"address\"} 1";
    assert!(figures.contains(line), "{figures}");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );
}

#[tokio::test]
async fn a_package_of_the_real_registry_comes_by_the_proxy() {
    let folders = Folders::new();
    let site = depending(&folders, "is-number", "7.0.0");
    let options = Options::new(&folders)
        .rehearsal()
        .astro()
        .env("CACHE_PATH", folders.join("cache"))
        .env("EGRESS_ALLOW", "none");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let init = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    assert!(installed(&folders, &alice, "is-number/index.js").is_file());
    let figures = greenroom.get("/metrics").await.text;
    let passed = "greenroom_egress_requests_total{from=\"installer\",outcome=\"allowed\"}";
    assert!(figures.contains(passed), "{figures}");
}
