//! `/metrics`, and what is made of it: the dashboard and the alert rules name nothing that is not
//! there.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::support::{Folders, Options, SITE, TestGreenroom, who};

/// A scrape as Prometheus reads it: each family's kind, and its samples' names with their labels.
#[derive(Debug, Default)]
struct Scrape {
    kinds: BTreeMap<String, String>,
    helped: BTreeSet<String>,
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Scrape {
    /// Fails on whatever a scraper would not take.
    fn parse(text: &str) -> Self {
        let mut scrape = Self::default();
        let mut ended = BTreeSet::new();
        let mut current = String::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect(line);
                assert!(help.len() > 5, "{line}");
                assert!(scrape.helped.insert(name.to_owned()), "twice: {line}");
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                let before = scrape.kinds.insert(name.to_owned(), kind.to_owned());
                assert!(before.is_none(), "twice: {line}");
                ended.insert(std::mem::replace(&mut current, name.to_owned()));
                continue;
            }
            let (name, rest) = match line.split_once('{') {
                Some((name, rest)) => (name, rest),
                None => line.split_once(' ').expect(line),
            };
            let (labels, value) = match rest.rsplit_once("} ") {
                Some((labels, value)) => (labels, value),
                None => ("", rest),
            };
            let labels = labels
                .split("\",")
                .filter(|label| !label.is_empty())
                .map(|label| {
                    let (name, value) = label.split_once("=\"").expect(line);
                    (name.to_owned(), value.trim_end_matches('"').to_owned())
                })
                .collect();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .filter(|family| {
                    scrape
                        .kinds
                        .get(*family)
                        .is_some_and(|kind| kind == "histogram")
                })
                .unwrap_or(name);
            assert_eq!(family, current, "its family's lines stand together: {line}");
            assert!(!ended.contains(family), "{line}");
            scrape
                .samples
                .push((name.to_owned(), labels, value.parse().expect(line)));
        }
        for name in scrape.kinds.keys() {
            assert!(scrape.helped.contains(name), "{name} has no help");
        }
        scrape
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let sample = self.samples.iter().find(|(other, with, _)| {
            other == name
                && labels
                    .iter()
                    .all(|(name, value)| with.get(*name).is_some_and(|other| other == value))
        });
        sample.map(|(_, _, value)| *value)
    }
}

/// The names of figures in a query.
fn names_in(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words
        .filter(|word| word.starts_with("greenroom_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// Prometheus' own checker: `PROMTOOL_BIN`, or on `PATH`.
fn promtool() -> Option<PathBuf> {
    let named = std::env::var_os("PROMTOOL_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("promtool"));
    named
        .into_iter()
        .chain(on_path)
        .find(|program| program.is_file())
}

fn check(promtool: &Path, what: &[&str], input: &str) {
    #[expect(clippy::disallowed_methods, reason = "a checker")]
    let mut child = Command::new(promtool)
        .arg("check")
        .args(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    // Status 3 is a matter of taste: a gauge whose name ends as a counter's.
    assert!(
        output.status.success() || output.status.code() == Some(3),
        "{said}"
    );
    assert!(!said.contains("error"), "{said}");
}

fn infra(file: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("infra");
    fs::read_to_string(root.join(file)).unwrap()
}

#[tokio::test]
async fn a_day_s_work_is_counted_and_no_tenant_is_named() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).acting();
    let mut greenroom = TestGreenroom::start(options).await;
    let alice = who("acme-corp", "alice-the-user", "thread-of-hers");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    greenroom.execute(&alice, "write a.txt one").await.ok();
    std::fs::write(folders.worktree(&alice).join("by-hand.txt"), "x").unwrap();
    greenroom.execute(&alice, "write b.txt two").await.ok();
    greenroom
        .execute(&alice, "break")
        .await
        .answer
        .error(502, "agent_failed");
    greenroom
        .api("POST", &format!("{}/undo", alice.path()), json!({}))
        .await
        .ok();
    greenroom.get("/api/clients/evil/users/../x").await;
    greenroom.get("/%2e%2e/nothing%7f").await;
    let text = greenroom.get("/metrics").await.text;
    for tenant in [
        "acme-corp",
        "alice-the-user",
        "thread-of-hers",
        "evil",
        "nothing",
    ] {
        assert!(!text.contains(tenant), "{tenant}");
    }
    let scrape = Scrape::parse(&text);
    let is = |name: &str, labels: &[(&str, &str)], least: f64| {
        let value = scrape.value(name, labels);
        assert!(value >= Some(least), "{name} {labels:?}: {value:?}\n{text}");
    };
    is(
        "greenroom_turns_total",
        &[("kind", "turn"), ("status", "completed")],
        2.0,
    );
    is(
        "greenroom_turns_total",
        &[("kind", "turn"), ("status", "failed")],
        1.0,
    );
    is(
        "greenroom_turns_total",
        &[("kind", "undo"), ("status", "completed")],
        1.0,
    );
    is(
        "greenroom_turn_duration_seconds_count",
        &[("kind", "turn")],
        3.0,
    );
    is("greenroom_turn_wait_seconds_count", &[], 3.0);
    is("greenroom_agent_runs_total", &[("process", "warm")], 1.0);
    is("greenroom_agent_runs_total", &[("process", "waiting")], 1.0);
    is("greenroom_agent_starts_total", &[], 1.0);
    is("greenroom_commits_total", &[("of", "turn")], 2.0);
    is("greenroom_commits_total", &[("of", "outside")], 1.0);
    is("greenroom_commits_total", &[("of", "undo")], 1.0);
    is(
        "greenroom_lease_changes_total",
        &[("change", "acquired")],
        1.0,
    );
    is(
        "greenroom_http_requests_total",
        &[("route", "/api/execute"), ("status", "2xx")],
        2.0,
    );
    is(
        "greenroom_http_request_duration_seconds_count",
        &[("route", "/api/init")],
        1.0,
    );
    is("greenroom_previews", &[("state", "off")], 0.0);
    is("greenroom_service_breaker", &[("state", "closed")], 1.0);
    is(
        "greenroom_model_requests_total",
        &[("status", "settled")],
        0.0,
    );
    is("greenroom_uptime_seconds", &[], 0.0);
    is("process_resident_memory_bytes", &[], 1e6);
    is("process_open_fds", &[], 5.0);
    is("process_max_fds", &[], 5.0);
    is("process_threads", &[], 2.0);
    is("greenroom_memory_limit_bytes", &[], 1e6);
    assert_eq!(scrape.value("greenroom_turns_running", &[]), Some(0.0));
    // Bounded: every label's value is one of a few.
    assert!(scrape.samples.len() < 1500, "{}", scrape.samples.len());
    if let Some(promtool) = promtool() {
        check(&promtool, &["metrics"], &text);
    }
    assert!(greenroom.stop().await.success());
}

#[test]
fn the_dashboard_and_the_rules_name_what_is_counted() {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/figures.rs"))
        .unwrap()
        + &fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/health.rs"))
            .unwrap();
    let known = |name: &str| {
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        source.contains(&format!("\"{family}\""))
    };

    let dashboard: Value = serde_json::from_str(&infra("grafana/greenroom.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 15);
    let mut shown = BTreeSet::new();
    for panel in panels {
        assert!(!panel["title"].as_str().unwrap().is_empty());
        for target in panel["targets"].as_array().unwrap() {
            let names = names_in(target["expr"].as_str().unwrap());
            assert!(!names.is_empty(), "{target}");
            shown.extend(names);
        }
    }
    let unknown: Vec<_> = shown.iter().filter(|name| !known(name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");

    let rules = infra("alerts/greenroom.yaml");
    let parsed: Value = serde_yaml_ng::from_str(&rules).unwrap();
    let mut alerts = BTreeSet::new();
    for rule in parsed["groups"][0]["rules"].as_array().unwrap() {
        assert!(alerts.insert(rule["alert"].as_str().unwrap().to_owned()));
        for needed in ["summary", "description"] {
            assert!(rule["annotations"][needed].is_string(), "{rule}");
        }
        assert!(rule["labels"]["severity"].is_string(), "{rule}");
        let names = names_in(rule["expr"].as_str().unwrap());
        assert!(
            !names.is_empty() && names.iter().all(|name| known(name)),
            "{rule}"
        );
    }
    assert!(alerts.len() >= 10);
    if let Some(promtool) = promtool() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &rules).unwrap();
        check(&promtool, &["rules", file.path().to_str().unwrap()], "");
    }
}
