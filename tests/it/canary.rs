//! A canary of every secret that an operator may give greenroom, looked for wherever an agent, a
//! site, a caller or a reader of logs could find it.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, Options, SITE, Sent, StandIn, TestGreenroom, files_below, git, holds,
    processes_below, request, rule, runs, who,
};

/// All begin alike, so that those who look need not have one to look for.
const MARK: &str = "cnry";
const TOKEN: &str = "cnry-api-token-1a2b3c4d";
const SECRETS: [(&str, &str); 14] = [
    ("GREENROOM_API_TOKEN", TOKEN),
    ("GREENROOM_API_TOKEN_PREVIOUS", "cnry-api-token-old-5e6f"),
    ("CLAUDE_SERVICE_SECRET", "cnry-hmac-secret-0f9e8d"),
    ("CLAUDE_SERVICE_SECRET_PREVIOUS", "cnry-hmac-old-7c6b5a"),
    ("PREVIEW_TOKEN_SECRET", "cnry-preview-secret-99"),
    ("GITHUB_TOKEN", "cnry-github-token-4411"),
    ("REPLICATE_API_TOKEN", "cnry-replicate-token-22"),
    ("HF_TOKEN", "cnry-huggingface-token-33"),
    ("AWS_SECRET_ACCESS_KEY", "cnry-aws-secret-44"),
    ("AWS_SESSION_TOKEN", "cnry-aws-session-55"),
    (
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "/v2/credentials/cnry-ecs-uri-66",
    ),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "cnry-ecs-token-77"),
    ("NPM_TOKEN", "cnry-npm-token-88"),
    ("SOME_OTHER_PASSWORD", "cnry-foreign-password-12"),
];
const KEY: &str = "cnry-model-key-abcdef";
const GATEWAY_CLIENT: &str = "cnry-gateway-client-98";
const ACCESS: &str = "cnry-oauth-access-31";
const REFRESH: &str = "cnry-oauth-refresh-32";

/// What an agent or a site tries. Its text does not hold the mark itself.
const LOOK: &str = r#"m=cn; m=${m}ry
env; cat /proc/self/environ /proc/$PPID/environ
cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\0' '\n' | grep -a "$m"
cat /proc/[0-9]*/maps /proc/[0-9]*/fd/* | grep -a -m1 "$m"
for f in "$HOME" "$TMPDIR" . .. ../.. ../../.. ../../../.. ../../../../.greenroom /root /run /var /etc; do
  grep -rIsl -m1 "$m" "$f" | head -3
done
git config --list --show-origin; git log --all -p | grep "$m"; cat .git ../../project/.git/config
cat ~/.npmrc ~/.netrc ~/.git-credentials ~/.claude/.credentials.json ~/.aws/credentials
for p in 80 51679; do exec 3<>/dev/tcp/169.254.170.2/$p && echo REACH''ED; done
true"#;

/// A dev server that looks once and shows what it found.
const SPY: &str = "import { createServer } from 'node:http';
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
const found = spawnSync('bash', ['-c', readFileSync('look.sh', 'utf8')]);
createServer((request, response) => {
  response.end(JSON.stringify({ found: String(found.stdout) + found.stderr, env: process.env, headers: request.headers }));
}).listen(Number(process.env.PORT), process.env.HOST);
";

fn all() -> impl Iterator<Item = &'static str> {
    let named = SECRETS.iter().map(|(_, secret)| *secret);
    named.chain([KEY, GATEWAY_CLIENT, ACCESS, REFRESH])
}

/// With the name of what holds one.
#[track_caller]
fn holds_none(what: &str, text: &str) {
    for secret in all() {
        if let Some(at) = text.find(secret) {
            let from = text.floor_char_boundary(at.saturating_sub(200));
            panic!("{secret} in {what}: …{}", &text[from..at + secret.len()]);
        }
    }
}

struct Stage {
    folders: Folders,
    greenroom: TestGreenroom,
}

impl Stage {
    async fn start(api: &StandIn, adapt: impl FnOnce(Options, &Folders) -> Options) -> Self {
        let folders = Folders::new();
        let tokens = folders.join("outside/gateway.yaml");
        fs::create_dir_all(tokens.parent().unwrap()).unwrap();
        fs::write(&tokens, format!("{GATEWAY_CLIENT}: acme\n")).unwrap();
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
        let mut options = Options::new(&folders)
            .previews()
            .env("ANTHROPIC_BASE_URL", api.url())
            .env("BIND", "127.0.0.1")
            .env("CLAUDE_SERVICE_PORT", "0")
            .env("GATEWAY_PORT", "0")
            .env("GATEWAY_TOKENS_FILE", &tokens)
            .env("LOG_LEVEL", "trace");
        for (name, secret) in SECRETS {
            options = options.env(name, secret);
        }
        let options = adapt(options, &folders);
        let greenroom = TestGreenroom::start(options).await;
        Self { folders, greenroom }
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Answer {
        let sent = Sent::new(method, path, &body);
        let sent = sent.header("authorization", &format!("Bearer {TOKEN}"));
        self.greenroom.send(sent).await
    }

    /// Everywhere that outlives a request.
    fn is_clean(&self, but: &[&Path]) {
        for root in ["workspace", "home", "tmp", "cache", "repos"] {
            for file in files_below(&self.folders.join(root)) {
                if but.contains(&file.as_path()) {
                    continue;
                }
                for secret in all() {
                    assert!(!holds(&file, secret), "{secret} in {}", file.display());
                }
            }
        }
        let supervisor = i32::try_from(self.greenroom.pid()).unwrap();
        let children = processes_below(&self.folders.join(""));
        let mut looked = 0;
        for child in children.iter().filter(|child| child.pid != supervisor) {
            holds_none("a child's environment", &child.environment);
            holds_none("a command line", &child.command);
            looked += 1;
        }
        assert!(looked > 1, "the agent and the dev server at least");
        let own = children.iter().find(|child| child.pid == supervisor);
        let own = own.expect("it runs in its folder");
        holds_none("greenroom's own command line", &own.command);
        // All of it, and not the secrets alone: other programs' may be among it.
        let shown = own.environment.trim();
        assert_eq!(shown, "", "greenroom's own environment, in /proc");
        for line in self.greenroom.log() {
            holds_none("the log", &line);
        }
    }
}

async fn play(stage: &Stage) {
    let greenroom = &stage.greenroom;
    let look = SITE
        .iter()
        .copied()
        .chain([("server.mjs", SPY), ("look.sh", LOOK)])
        .collect::<Vec<_>>();
    let site = stage.folders.site("site", &look);
    let alice = who("acme", "alice", "main");
    let mut said = Vec::new();
    let init = stage
        .call("POST", "/api/init", alice.body(json!({"repoUrl": site})))
        .await;
    said.push(("init", init.text.clone()));
    let init = init.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");

    // The agent looks, and tells what it found.
    let turn = stage
        .call(
            "POST",
            "/api/execute",
            alice.body(json!({"instruction": "Please look everywhere"})),
        )
        .await;
    said.push(("a turn", turn.text.clone()));
    let result = turn.ok()["result"].take();
    assert_eq!(result["status"], "completed", "{result}");
    let id = result["turnId"].as_str().unwrap();
    let events = stage
        .call("GET", &format!("/api/turns/{id}/events"), Value::Null)
        .await;
    assert!(!events.text.contains("REACHED"), "{}", events.text);
    said.push(("its events", events.text));
    // What it wrote of it is committed, or held back for its own token.
    let worktree = stage.folders.worktree(&alice);
    let found = fs::read_to_string(worktree.join("found.txt")).unwrap();
    assert!(
        found.contains("ANTHROPIC_AUTH_TOKEN"),
        "it has looked: {found}"
    );
    holds_none("what it found", &found);
    holds_none("a commit", &git(&worktree, &["log", "--all", "-p"]));
    holds_none("git's settings", &git(&worktree, &["config", "--list"]));

    // So does a one-shot run, in a folder of its own.
    let run = stage
        .call(
            "POST",
            "/execute",
            json!({
                "prompt": "Please look everywhere",
                "args": ["--output-format", "stream-json", "--dangerously-skip-permissions"],
                "timeout": 300_000,
            }),
        )
        .await;
    assert!(
        run.text.contains("ANTHROPIC_AUTH_TOKEN"),
        "it has looked: {}",
        run.text
    );
    said.push(("a one-shot run", run.text));

    // And the site, which a person sees.
    let link = init["preview"]["previewUrl"].as_str().unwrap();
    said.push(("a preview's link", link.to_owned()));
    let (host, path) = link
        .strip_prefix("http://")
        .unwrap()
        .split_once('/')
        .unwrap();
    let open = Sent::new("GET", &format!("/{path}"), &Value::Null).header("host", host);
    let opened = request(greenroom.preview_port, open).await.unwrap();
    let cookie = opened.headers["set-cookie"].to_str().unwrap().to_owned();
    said.push(("a preview's cookie", cookie.clone()));
    let page = Sent::new("GET", "/", &Value::Null)
        .header("host", host)
        .header("cookie", cookie.split(';').next().unwrap());
    let page = request(greenroom.preview_port, page).await.unwrap();
    assert!(page.body["env"]["PATH"].is_string(), "{}", page.text);
    said.push(("a page", page.text));

    // What anybody, and what callers with mistakes in their calls are told.
    for path in [
        "/health",
        "/health?deep=1",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/",
    ] {
        said.push((path, greenroom.get(path).await.text));
    }
    let wrong = Sent::new("GET", "/api/idle", &Value::Null)
        .header("authorization", "Bearer cnry-api-token-1a2b3c4e");
    said.push(("a refusal", greenroom.send(wrong).await.text));
    for (method, path, body) in [
        ("GET", "/api/idle".to_owned(), Value::Null),
        ("GET", "/api/usage".to_owned(), Value::Null),
        (
            "GET",
            "/api/threads?clientId=acme&userId=alice".to_owned(),
            Value::Null,
        ),
        ("GET", format!("{}/history", alice.path()), Value::Null),
        ("GET", format!("{}/diff", alice.path()), Value::Null),
        ("GET", format!("{}/preview", alice.path()), Value::Null),
        ("GET", "/api/nothing".to_owned(), Value::Null),
        (
            "POST",
            "/api/init".to_owned(),
            who("acme", "bob", "x").body(json!({"repoUrl": "https://127.0.0.1:1/x.git"})),
        ),
        ("POST", "/api/init".to_owned(), json!({"clientId": ".."})),
        (
            "POST",
            "/api/execute".to_owned(),
            alice.body(json!({"instruction": "fail now"})),
        ),
        (
            "POST",
            "/execute".to_owned(),
            json!({"prompt": "fail now", "timeout": 300_000}),
        ),
        (
            "POST",
            "/execute".to_owned(),
            json!({"prompt": "x", "args": ["--nothing"]}),
        ),
        (
            "POST",
            format!("{}/publish", alice.path()),
            json!({"to": "origin"}),
        ),
        (
            "POST",
            format!("{}/undo", alice.path()),
            json!({"turnId": "none"}),
        ),
    ] {
        said.push(("an answer", stage.call(method, &path, body).await.text));
    }
    for (what, text) in &said {
        holds_none(what, text);
    }
}

fn script() -> Value {
    // The tool's own output is its transcript's and its events'.
    json!({"rules": [
        rule("look everywhere", &[runs("bash look.sh > found.txt 2>&1; cat found.txt; true"), runs(LOOK)]),
        {"match": "fail now", "steps": [{"act": {"status": {"status": 400}}}]},
    ]})
}

#[tokio::test]
async fn no_secret_is_found_anywhere_with_a_key() {
    let api = StandIn::start(script()).await;
    let stage = Stage::start(&api, |options, _| options.env("ANTHROPIC_API_KEY", KEY)).await;
    play(&stage).await;
    stage.is_clean(&[]);
    assert!(all().all(|secret| secret.contains(MARK)));
    // It is no wonder that nothing is found where nothing is used.
    let used = api.requests().iter().any(|request| {
        request
            .headers
            .iter()
            .any(|header| header.eq_ignore_ascii_case("x-api-key"))
    });
    assert!(used, "the key itself went up");
}

#[tokio::test]
async fn no_secret_is_found_anywhere_with_an_oauth_login() {
    let api = StandIn::start(script()).await;
    let stage = Stage::start(&api, |options, folders| {
        let file = folders.join("outside/credentials.json");
        let login = json!({"type": "oauth", "oauth": {
            "accessToken": ACCESS,
            "refreshToken": REFRESH,
            "expiresAt": jiff::Timestamp::now().as_millisecond() + 3_600_000,
        }});
        fs::write(&file, login.to_string()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        options.env("CLAUDE_CREDENTIALS_FILE", &file)
    })
    .await;
    play(&stage).await;
    stage.is_clean(&[]);
}
