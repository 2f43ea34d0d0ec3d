//! What is wrong: requests, settings, surroundings. Each gets its code and a sentence that helps;
//! nothing is written, nothing panics.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use crate::support::{Answer, Folders, Options, SITE, Sent, TestGreenroom, files_below, who};

/// No file of a tenant is there, and nothing panicked.
fn nothing_happened(folders: &Folders, greenroom: &TestGreenroom) {
    assert_eq!(
        files_below(&folders.workspace()),
        Vec::<std::path::PathBuf>::new()
    );
    let entries = fs::read_dir(folders.workspace()).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.is_empty(), "{names:?}");
    let log = greenroom.log().join("\n");
    assert!(!log.contains("panicked"), "{log}");
}

async fn start() -> (Folders, TestGreenroom) {
    let folders = Folders::new();
    let greenroom = TestGreenroom::start(Options::new(&folders).rehearsal()).await;
    (folders, greenroom)
}

#[tokio::test]
async fn ids() {
    let (folders, greenroom) = start().await;
    let long = "a".repeat(65);
    let bad = [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "_a",
        "a..b",
        "a.",
        "a.lock",
        "a/b",
        "../a",
        "a\\b",
        "a b",
        " a",
        "a ",
        "ä",
        "日本",
        "a\u{0}b",
        "a\n",
        "a\u{202e}b",
        "~",
        "a~b",
        "a:b",
        "a*",
        "a@{b",
        "%2e%2e",
        "a%2fb",
        "$HOME",
        "`id`",
        "--help",
        "a\t",
        &long,
    ];
    for field in ["clientId", "userId", "threadId"] {
        for id in bad {
            let mut body = who("acme", "alice", "main").body(json!({"instruction": "x"}));
            body[field] = json!(id);
            for path in ["/api/init", "/api/execute"] {
                let sentence = greenroom
                    .api("POST", path, body.clone())
                    .await
                    .error(400, "invalid_id");
                assert!(sentence.contains(field), "{field} {id:?}: {sentence}");
            }
        }
        let mut body = who("acme", "alice", "main").body(json!({"instruction": "x"}));
        body.as_object_mut().unwrap().remove(field);
        let sentence = greenroom
            .api("POST", "/api/init", body)
            .await
            .error(400, "invalid_request");
        assert!(sentence.contains(field), "{sentence}");
    }
    for id in ["..%2f", "%2e%2e", "a%00b", "-a", "a.lock", &long] {
        let answer = greenroom
            .get(&format!("/api/clients/{id}/users/alice/threads/main"))
            .await;
        answer.error(400, "invalid_id");
        let answer = greenroom
            .get(&format!("/api/threads?clientId=acme&userId={id}"))
            .await;
        answer.error(400, "invalid_id");
    }
    greenroom
        .get("/api/threads")
        .await
        .error(400, "invalid_request");
    nothing_happened(&folders, &greenroom);

    // Good ones at the edge of the rules.
    let site = folders.site("site", SITE);
    let edge = who(&"a".repeat(64), "A.b_c-9", "0");
    greenroom.init(&edge, json!({"repoUrl": site})).await.ok();
}

#[tokio::test]
async fn bodies() {
    let (folders, greenroom) = start().await;
    let alice = who("acme", "alice", "main");
    // The path, the field, what is put there. `instruction` is good unless it is the field.
    let cases = [
        ("/api/init", "clientId", json!(5)),
        ("/api/init", "userId", json!(["alice"])),
        ("/api/init", "threadId", json!({})),
        ("/api/init", "threadId", json!(true)),
        ("/api/init", "repoUrl", json!(1)),
        ("/api/init", "repoUrl", json!("")),
        ("/api/init", "repoUrl", json!("a\u{0}b")),
        ("/api/init", "baseBranch", json!([])),
        ("/api/init", "baseBranch", json!(" ")),
        ("/api/init", "baseBranch", json!("x".repeat(300))),
        ("/api/init", "waitForPreview", json!("yes")),
        ("/api/init", "waitForPreview", json!(1)),
        ("/api/execute", "instruction", json!(1)),
        ("/api/execute", "instruction", Value::Null),
        ("/api/execute", "instruction", json!("")),
        ("/api/execute", "instruction", json!(" \n\t ")),
        ("/api/execute", "instruction", json!("a\u{0}b")),
        ("/api/execute", "mode", json!("delete")),
        ("/api/execute", "mode", json!(1)),
        ("/api/execute", "mode", json!("PLAN")),
        ("/api/execute", "model", json!(1)),
        ("/api/execute", "model", json!("")),
        (
            "/api/execute",
            "model",
            json!("--dangerously-skip-permissions"),
        ),
        ("/api/execute", "model", json!("a model")),
        ("/api/execute", "timeoutSeconds", json!("60")),
        ("/api/execute", "timeoutSeconds", json!(0)),
        ("/api/execute", "timeoutSeconds", json!(-1)),
        ("/api/execute", "timeoutSeconds", json!(1e300)),
        ("/api/execute", "timeoutSeconds", json!(86_401)),
        ("/api/execute", "async", json!("true")),
        ("/api/execute", "async", json!(1)),
        ("/api/execute", "author", json!("Alice")),
        ("/api/execute", "author", json!({"name": "Alice"})),
        ("/api/execute", "author", json!({"email": "a@b"})),
        ("/api/execute", "author", json!({"name": 1, "email": "a@b"})),
        (
            "/api/execute",
            "author",
            json!({"name": "", "email": "a@b"}),
        ),
        (
            "/api/execute",
            "author",
            json!({"name": "A\nTurn-Id: x", "email": "a@b"}),
        ),
        (
            "/api/execute",
            "author",
            json!({"name": "A", "email": "a@b> <c@d"}),
        ),
        (
            "/api/execute",
            "author",
            json!({"name": "x".repeat(500), "email": "a@b"}),
        ),
    ];
    for (path, field, value) in cases {
        let mut body = alice.body(json!({"instruction": "x"}));
        body[field] = value.clone();
        let sentence = greenroom
            .api("POST", path, body)
            .await
            .error(400, "invalid_request");
        assert!(sentence.contains(field), "{field} = {value}: {sentence}");
        assert!(sentence.len() < 300, "{sentence}");
    }

    let raw = |path: &str, body: &[u8]| Sent {
        body: body.to_vec(),
        ..Sent::new("POST", path, &json!({}))
    };
    let deep = "[".repeat(100_000);
    for body in [
        "{",
        "nonsense",
        "{}{}",
        "[]",
        "5",
        "null",
        "\"text\"",
        "{\"clientId\":\"a\",}",
        deep.as_str(),
    ] {
        for path in ["/api/init", "/api/execute"] {
            let answer = greenroom.send(raw(path, body.as_bytes())).await;
            answer.error(400, "invalid_request");
        }
    }
    for body in [&b"{\"clientId\":\"\xff\"}"[..], b"\xef\xbb\xbf{}", b"\0"] {
        greenroom
            .send(raw("/api/init", body))
            .await
            .error(400, "invalid_request");
    }
    let empty = raw("/api/init", b"").header("content-type", "application/json");
    greenroom.send(empty).await.error(400, "invalid_request");
    greenroom
        .send(raw("/api/init", b""))
        .await
        .error(415, "unsupported_media_type");
    for kind in ["text/plain", "application/xml", "application/jsonp", "json"] {
        let sent = raw("/api/init", b"{}").header("content-type", kind);
        greenroom
            .send(sent)
            .await
            .error(415, "unsupported_media_type");
    }
    let mut large = alice.body(json!({"instruction": "x".repeat(1 << 20)}));
    greenroom
        .api("POST", "/api/execute", large.clone())
        .await
        .error(413, "payload_too_large");
    large["instruction"] = json!("x");
    large["padding"] = json!("x".repeat(1 << 20));
    greenroom
        .api("POST", "/api/init", large)
        .await
        .error(413, "payload_too_large");

    for path in [
        "/api/turns/%ff",
        "/api/clients/%ff/users/a/threads/b",
        "/api/threads?clientId=a&clientId=b&userId=c",
        "/health?deep=0&deep=0",
    ] {
        greenroom
            .api("GET", path, json!({}))
            .await
            .error(400, "invalid_request");
    }
    for (method, path) in [
        ("GET", "/api/init"),
        ("PUT", "/api/init"),
        ("DELETE", "/api/execute"),
        ("POST", "/health"),
        ("POST", "/api/threads"),
        ("PATCH", "/api/idle"),
    ] {
        greenroom
            .api(method, path, json!({}))
            .await
            .error(405, "invalid_request");
    }
    for path in [
        "/api",
        "/api/",
        "/api/nothing",
        "/api/init/",
        "/nothing",
        "/../etc/passwd",
        "/%2e%2e/x",
    ] {
        greenroom.get(path).await.error(404, "not_found");
    }
    nothing_happened(&folders, &greenroom);

    // A large instruction with all that text can hold, and fields of a later version.
    let site = folders.site("site", SITE);
    let fields = json!({"repoUrl": site, "fromTheFuture": {"a": [1]}});
    greenroom.init(&alice, fields).await.ok();
    let instruction = format!(
        "\u{feff}„Grüße“ \u{1F600}\u{202e}\r\n\u{7} --- \n{}",
        "lorem ipsum ".repeat(40_000)
    );
    let fields = json!({"instruction": instruction, "fromTheFuture": null});
    let result = greenroom.execute_with(&alice, fields).await.ok();
    assert!(
        result["context"]["history"][0]["instruction"]
            .as_str()
            .unwrap()
            .len()
            < 20_000
    );
    let log = greenroom.log().join("\n");
    assert!(!log.contains("panicked"), "{log}");
}

/// Waits until everything was looked at; the checks of `/ready`.
async fn ready(greenroom: &TestGreenroom) -> Answer {
    loop {
        let answer = greenroom.get("/ready").await;
        if !answer.text.contains("still being looked at") {
            return answer;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn programs_that_are_missing_or_too_old_are_named_by_ready() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let programs = folders.join("programs");
    fs::create_dir(&programs).unwrap();
    let path = || format!("{}:/usr/bin:/bin", programs.display());
    let options = Options::new(&folders).rehearsal();

    // All is well.
    let greenroom = TestGreenroom::start(options.clone()).await;
    let answer = ready(&greenroom).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    for check in ["workspace", "claude", "node", "gateway"] {
        assert_eq!(answer.body["checks"][check], "ok", "{}", answer.text);
    }
    for part in ["files", "network", "processes", "bash"] {
        assert!(
            answer.body["confinement"][part].is_string(),
            "{}",
            answer.text
        );
    }
    let deep = greenroom.get("/health?deep=1").await;
    assert_eq!(
        (deep.status, &deep.body["claudeAvailable"]),
        (200, &json!(true))
    );
    let said = deep.body["testResponse"].as_str().unwrap();
    assert!(!said.is_empty(), "the CLI itself answered: {}", deep.text);
    drop(greenroom);

    // No CLI: it starts, says so, inits, and fails turns in a sentence.
    let without = options.clone().without("CLAUDE_BIN").env("PATH", path());
    let greenroom = TestGreenroom::start(without).await;
    let answer = ready(&greenroom).await;
    assert_eq!(answer.status, 503);
    let said = answer.body["checks"]["claude"].as_str().unwrap();
    assert!(
        said.contains("npm install") && said.contains("CLAUDE_BIN"),
        "{said}"
    );
    let deep = greenroom.get("/health?deep=1").await;
    assert_eq!(
        (deep.status, &deep.body["status"]),
        (503, &json!("unhealthy"))
    );
    assert_eq!(deep.body["claudeAvailable"], false);
    assert!(deep.body["error"].is_string());
    assert_eq!(
        greenroom.get("/health").await.body["claudeAvailable"],
        false
    );
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let sentence = greenroom
        .execute(&alice, "hello")
        .await
        .answer
        .error(502, "agent_failed");
    assert!(
        sentence.contains("claude") && sentence.contains("/ready"),
        "{sentence}"
    );
    drop(greenroom);

    // A CLI that is none.
    let broken = programs.join("broken");
    script(&broken, "#!/bin/sh\necho 'no such thing' >&2\nexit 1\n");
    let greenroom = TestGreenroom::start(options.clone().env("CLAUDE_BIN", &broken)).await;
    let answer = ready(&greenroom).await;
    let said = answer.body["checks"]["claude"].as_str().unwrap();
    assert!(
        answer.status == 503 && said.contains("does not run"),
        "{said}"
    );
    greenroom
        .execute(&alice, "hello")
        .await
        .answer
        .error(502, "agent_failed");
    drop(greenroom);

    // Node too old.
    script(&programs.join("node"), "#!/bin/sh\necho v18.20.4\n");
    let greenroom = TestGreenroom::start(options.clone().env("PATH", path())).await;
    let answer = ready(&greenroom).await;
    let said = answer.body["checks"]["node"].as_str().unwrap();
    assert!(
        answer.status == 503 && said.contains("v18.20.4") && said.contains("22.12"),
        "{said}"
    );
    assert_eq!(answer.body["checks"]["claude"], "ok");
    drop(greenroom);

    // No Node.
    let nowhere = folders.join("nowhere");
    let greenroom = TestGreenroom::start(options.env("PATH", nowhere)).await;
    let answer = ready(&greenroom).await;
    let said = answer.body["checks"]["node"].as_str().unwrap();
    assert!(
        answer.status == 503 && said.contains("Node 22.12"),
        "{said}"
    );
}

#[tokio::test]
async fn a_start_that_cannot_be_is_one_line() {
    let folders = Folders::new();
    let file = folders.join("a-file");
    fs::write(&file, "").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let bare = Options::new(&folders);
    let good = bare.clone().rehearsal();
    let cases = [
        (bare.clone(), "ANTHROPIC_API_KEY"),
        (
            bare.env("CLAUDE_CREDENTIALS_FILE", folders.join("missing.json")),
            "CLAUDE_CREDENTIALS_FILE",
        ),
        (good.clone().env("API_PORT", &port), "API_PORT"),
        (good.clone().env("PREVIEW_PORT", &port), "PREVIEW_PORT"),
        (good.clone().env("HMR_PORT", &port), "HMR_PORT"),
        (good.clone().env("API_PORT", "70000"), "API_PORT"),
        (good.clone().env("WORKSPACE_PATH", &file), "WORKSPACE_PATH"),
        (
            good.clone().env("WORKSPACE_PATH", file.join("below")),
            "WORKSPACE_PATH",
        ),
        (
            good.clone().env("WORKSPACE_PATH", "/proc/nothing"),
            "WORKSPACE_PATH",
        ),
        (good.clone().env("CACHE_PATH", &file), "CACHE_PATH"),
        (
            good.clone().env("AUTO_SHUTDOWN_MINUTES", "soon"),
            "AUTO_SHUTDOWN_MINUTES",
        ),
        (good.clone().env("CLIENT_ID", "../x"), "CLIENT_ID"),
        (
            good.clone().env("ANTHROPIC_BASE_URL", "ftp://x"),
            "ANTHROPIC_BASE_URL",
        ),
        (
            good.clone().env("REPO_URL", "http://github.com/a/b"),
            "REPO_URL",
        ),
        (good.clone().env("GIT_USER_EMAIL", "a<b>"), "GIT_USER_EMAIL"),
        (
            good.clone().env("ASTRO_DEV_MODE", "perhaps"),
            "ASTRO_DEV_MODE",
        ),
        (good.clone().env("GREENROOM_TYPO", "1"), "GREENROOM_TYPO"),
    ];
    for (options, name) in cases {
        let (status, line) = options.fails().await;
        assert_eq!(status, Some(1), "{name}: {line}");
        assert!(
            line.starts_with("greenroom: ") && line.contains(name),
            "{name}: {line}"
        );
        assert!(line.len() < 400, "{line}");
    }
    // A credential that is no JSON says which file, and not what is in it.
    let credentials = folders.join("credentials.json");
    fs::write(&credentials, "sk-canary-in-a-file").unwrap();
    let options = Options::new(&folders).env("CLAUDE_CREDENTIALS_FILE", &credentials);
    let (status, line) = options.fails().await;
    assert_eq!(status, Some(1), "{line}");
    assert!(
        line.contains("credential") && !line.contains("canary"),
        "{line}"
    );
    drop(taken);
}

#[tokio::test]
async fn a_site_that_cannot_be_shown_says_why() {
    let folders = Folders::new();
    let greenroom = TestGreenroom::start(Options::new(&folders).rehearsal().previews()).await;
    for (name, files, said) in [
        (
            "no-script",
            &[("package.json", "{\"name\": \"x\"}")][..],
            "dev",
        ),
        (
            "no-package",
            &[("index.html", "<h1>x</h1>")][..],
            "package.json",
        ),
        (
            "crashes",
            &[(
                "package.json",
                "{\"scripts\": {\"dev\": \"node missing.mjs\"}}",
            )][..],
            "missing.mjs",
        ),
    ] {
        let site = folders.site(name, files);
        let who = who("acme", name, "main");
        let answer = greenroom.init(&who, json!({"repoUrl": site})).await.ok();
        assert_eq!(answer["preview"]["state"], "error", "{name}: {answer}");
        let errors = answer["preview"]["errors"].to_string();
        assert!(errors.contains(said), "{name}: {errors}");
        let preview = greenroom.get(&format!("{}/preview", who.path())).await.ok();
        assert_eq!(preview["result"]["state"], "error");
    }
    let site = folders.site("no-json", &[("package.json", "{\"scripts\": ")]);
    let fields = json!({"repoUrl": site});
    let refused = greenroom
        .init(&who("acme", "no-json", "main"), fields)
        .await;
    let sentence = refused.error(422, "install_failed");
    assert!(sentence.contains("package.json"), "{sentence}");
    assert!(!greenroom.log().join("\n").contains("panicked"));
}
