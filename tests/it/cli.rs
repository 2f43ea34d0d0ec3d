//! The program as a shell meets it: exit statuses, streams, one-line errors.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
    thread,
};

use serde_json::Value as Json;
use tempfile::TempDir;

/// Runs the program in an empty folder with an empty environment.
fn greenroom(folder: &TempDir, env: &[(&str, &str)], args: &[&str]) -> Output {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    Command::new(env!("CARGO_BIN_EXE_greenroom"))
        .args(args)
        .current_dir(folder.path())
        .env_clear()
        .env("HOME", folder.path())
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The exit status and the one line on standard error.
fn failure(env: &[(&str, &str)], args: &[&str]) -> (i32, String) {
    let output = greenroom(&folder(), env, args);
    let line = text(&output.stderr).to_owned();
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert!(
        line.starts_with("greenroom: ") && line.ends_with('\n'),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1, "{line}");
    (output.status.code().unwrap(), line)
}

#[test]
fn version_and_help_are_results() {
    let output = greenroom(&folder(), &[], &["--version"]);
    assert!(output.status.success());
    assert_eq!(
        text(&output.stdout),
        format!("greenroom {}\n", env!("CARGO_PKG_VERSION"))
    );
    for args in [&["--help"][..], &["serve", "--help"]] {
        let output = greenroom(&folder(), &[("GREENROOM_X", "is not even read")], args);
        assert!(output.status.success() && output.stderr.is_empty());
        assert!(text(&output.stdout).contains("Usage:"));
    }
    let help = greenroom(&folder(), &[], &["serve", "--help"]).stdout;
    for flag in [
        "--workspace-path",
        "--drain-seconds",
        "--insecure",
        "--rehearsal",
        "API_PORT",
    ] {
        assert!(text(&help).contains(flag), "{flag}");
    }
    assert!(!text(&help).contains("--anthropic-api-key"));
}

#[test]
fn wrong_usage_is_status_2() {
    for args in [
        &["serve", "--no-such-flag"][..],
        &["no-such-command"],
        &["serve", "extra"],
        &["serve", "--api-port", "abc"],
        &["config", "--auto-shutdown-minutes", "-1"],
        &["serve", "--api-port"],
        // They log nothing.
        &["health", "--log-file", "log"],
        &["usage", "daily", "--log-file", "log"],
        &["serve", "--anthropic-api-key", "canary-4c"],
        &["serve", "--hf-token=canary-4c"],
        &["--no-such-flag"],
    ] {
        let (status, line) = failure(&[], args);
        assert_eq!(status, 2, "{args:?}: {line}");
        assert!(!line.contains("canary"), "{line}");
    }
    let bare = greenroom(&folder(), &[], &[]);
    assert_eq!(bare.status.code(), Some(2));
    assert!(text(&bare.stderr).contains("Usage:") && bare.stdout.is_empty());
}

#[test]
fn a_bad_setting_is_status_1_in_one_line() {
    for (env, part) in [
        ([("API_PORT", "abc")], "API_PORT (environment): \"abc\""),
        ([("GREENROOM_TYPO", "1")], "GREENROOM_TYPO (environment)"),
        ([("BIND", "0.0.0.0")], "BIND (environment)"),
        ([("HF_TOKEN", "canary 4c")], "HF_TOKEN (environment)"),
    ] {
        let (status, line) = failure(&env, &["serve"]);
        assert_eq!(status, 1, "{line}");
        assert!(line.contains(part) && !line.contains("canary"), "{line}");
    }
}

#[test]
fn config_prints_every_setting_and_no_secret() {
    let folder = folder();
    fs::write(folder.path().join(".env"), "GITHUB_TOKEN=canary-env-file\n").unwrap();
    fs::write(
        folder.path().join("greenroom.yaml"),
        "hf_token: canary-yaml\nmaxPreviews: 7\n",
    )
    .unwrap();
    let env = [
        ("ANTHROPIC_API_KEY", "canary-key"),
        ("GREENROOM_API_TOKEN", "canary-token"),
        ("CLAUDE_SERVICE_SECRET", "canary\"hmac\\"),
        ("CLAUDE_MODEL", "canary-key-in-the-wrong-place"),
    ];
    let args = ["config", "--drain-seconds", "3.5"];
    let output = greenroom(&folder, &env, &args);
    assert!(output.status.success(), "{output:?}");
    let table = text(&output.stdout);
    let row = |name: &str| -> Vec<&str> {
        let line = table
            .lines()
            .find(|line| line.split(' ').next() == Some(name));
        line.expect(name).split_whitespace().collect()
    };
    assert_eq!(row("DRAIN_SECONDS"), ["DRAIN_SECONDS", "3.5", "flag"]);
    assert_eq!(
        row("ANTHROPIC_API_KEY"),
        ["ANTHROPIC_API_KEY", "***", "environment"]
    );
    assert_eq!(row("GITHUB_TOKEN")[..3], ["GITHUB_TOKEN", "***", ".env"]);
    assert_eq!(row("MAX_PREVIEWS"), ["MAX_PREVIEWS", "7", "greenroom.yaml"]);
    assert_eq!(row("BIND"), ["BIND", "0.0.0.0", "default"]);
    assert_eq!(row("REPO_URL"), ["REPO_URL", "-", "default"]);

    let args = ["config", "--json", "--drain-seconds", "3.5"];
    let output_json = greenroom(&folder, &env, &args);
    let json: Json = serde_json::from_slice(&output_json.stdout).unwrap();
    assert_eq!(
        json["DRAIN_SECONDS"],
        serde_json::json!({"value": 3.5, "source": "flag"})
    );
    assert_eq!(json["API_PORT"]["value"], 8080);
    assert_eq!(json["REPO_URL"]["value"], Json::Null);
    assert_eq!(json["HF_TOKEN"]["value"], "***");
    assert_eq!(json.as_object().unwrap().len(), table.lines().count());
    for output in [output, output_json] {
        for stream in [&output.stdout, &output.stderr] {
            assert!(!text(stream).contains("canary"), "{}", text(stream));
        }
    }
}

#[test]
fn config_tells_what_would_stop_the_start() {
    let output = greenroom(&folder(), &[("BIND", "0.0.0.0")], &["config"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("warning: BIND (environment)"));
}

#[test]
fn serve_needs_a_credential_or_a_rehearsal() {
    let (status, line) = failure_of_serve(&[]);
    assert_eq!(status, 1);
    assert!(
        line.contains("ANTHROPIC_API_KEY") && line.contains("--rehearsal"),
        "{line}"
    );
}

/// The status and the last line: the log stands before it.
fn failure_of_serve(env: &[(&str, &str)]) -> (i32, String) {
    let output = greenroom(&folder(), env, &["serve", "--api-port", "0"]);
    let line = text(&output.stderr)
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned();
    (output.status.code().unwrap(), line)
}

#[test]
fn health_asks_the_port_of_the_settings() {
    let answer = |answer: &'static str| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _n = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        (port, server)
    };
    let (port, server) =
        answer("HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{\"status\":\"healthy\"}");
    let output = greenroom(&folder(), &[("API_PORT", &port)], &["health", "--json"]);
    server.join().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "{\"status\":\"healthy\"}\n");

    let (port, server) = answer("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n");
    let (status, line) = failure(&[("BIND", "0.0.0.0")], &["health", "--api-port", &port]);
    server.join().unwrap();
    assert!(status == 1 && line.contains("503"), "{line}");

    // Nobody listens there.
    let (status, line) = failure(&[("API_PORT", "1")], &["health"]);
    assert!(
        status == 1 && line.contains("no answer from 127.0.0.1:"),
        "{line}"
    );
}

#[test]
fn openapi_prints_json() {
    let output = greenroom(&folder(), &[], &["openapi"]);
    assert!(output.status.success());
    assert!(
        serde_json::from_slice::<Json>(&output.stdout)
            .unwrap()
            .is_object()
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    let mut child = Command::new(env!("CARGO_BIN_EXE_greenroom"))
        .args(["serve", "--help"])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stderr), "");
}
