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
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, Sent, TestGreenroom, promtool, request, wait_for, wait_for_async, who,
};

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

    async fn of(greenroom: &TestGreenroom) -> Self {
        Self::parse(&greenroom.get("/metrics").await.text)
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

/// `promtool …`.
fn check(promtool: &Path, what: &[&str], input: &str) {
    #[expect(clippy::disallowed_methods, reason = "a checker")]
    let mut child = Command::new(promtool)
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
    assert!(
        !said.contains("error") && !said.contains("FAILED"),
        "{said}"
    );
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
        check(&promtool, &["check", "metrics"], &text);
    }
    assert!(greenroom.stop().await.success());
}

#[tokio::test]
async fn cold_starts_a_line_and_what_becomes_of_leases_are_counted() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).acting().env("MAX_WARM_AGENTS", "0");
    let mut greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    // What an alert waits for is there before it happens.
    let leases = async |greenroom: &TestGreenroom, change: &str| {
        let scrape = Scrape::of(greenroom).await;
        scrape.value("greenroom_lease_changes_total", &[("change", change)])
    };
    for change in ["acquired", "taken_over", "released", "lost"] {
        assert_eq!(leases(&greenroom, change).await, Some(0.0), "{change}");
    }
    let scrape = Scrape::of(&greenroom).await;
    let recovered = [("kind", "turn"), ("status", "recovered")];
    assert_eq!(scrape.value("greenroom_turns_total", &recovered), Some(0.0));

    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    greenroom.execute(&alice, "write a.txt one").await.ok();
    greenroom.execute(&alice, "write a.txt two").await.ok();
    let scrape = Scrape::of(&greenroom).await;
    let cold = [("process", "cold")];
    assert_eq!(scrape.value("greenroom_agent_runs_total", &cold), Some(2.0));
    assert_eq!(scrape.value("greenroom_agent_starts_total", &[]), Some(2.0));

    // One at work, two in line.
    let first = greenroom.begin(&alice, "write b.txt one\nsilent").await;
    let written = folders.worktree(&alice).join("b.txt");
    wait_for("it is at work", || written.exists().then_some(())).await;
    assert_eq!(greenroom.turn(&first).await["status"], "running");
    for _ in 0..2 {
        greenroom.begin(&alice, "write c.txt one").await;
    }
    let scrape = Scrape::of(&greenroom).await;
    assert_eq!(scrape.value("greenroom_turns_running", &[]), Some(1.0));
    assert_eq!(scrape.value("greenroom_turns_queued", &[]), Some(2.0));

    // Killed in its midst: the next one takes the lease over and recovers the turn.
    greenroom.kill().await;
    let greenroom = greenroom.restart().await;
    greenroom.init(&alice, json!({})).await.ok();
    wait_for_async("the line's end", async || {
        let scrape = Scrape::of(&greenroom).await;
        let done = [("kind", "turn"), ("status", "completed")];
        (scrape.value("greenroom_turns_total", &done) == Some(2.0)).then_some(())
    })
    .await;
    assert_eq!(leases(&greenroom, "taken_over").await, Some(1.0));
    let scrape = Scrape::of(&greenroom).await;
    assert_eq!(scrape.value("greenroom_turns_total", &recovered), Some(1.0));
    assert_eq!(scrape.value("greenroom_turns_queued", &[]), Some(0.0));
    greenroom
        .api("DELETE", &alice.path(), Value::Null)
        .await
        .ok();
    wait_for_async("a lease that was given back", async || {
        (leases(&greenroom, "released").await >= Some(1.0)).then_some(())
    })
    .await;
    assert_eq!(leases(&greenroom, "lost").await, Some(0.0));
}

#[tokio::test]
async fn what_previews_do_is_counted() {
    let folders = Folders::new();
    let greenroom = TestGreenroom::start(Options::new(&folders).rehearsal().astro()).await;
    let me = who("demo", "me", "main");
    let init = greenroom.init(&me, json!({})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    let host = init["preview"]["url"].as_str().unwrap();
    let host = host.trim_start_matches("http://").to_owned();
    for (target, status) in [("/", 200), ("/", 200), ("/.env", 403)] {
        let sent = Sent::new("GET", target, &Value::Null)
            .header("host", &host)
            .header("accept", "text/html");
        let answer = request(greenroom.preview_port, sent).await.unwrap();
        assert_eq!(answer.status, status, "{target}");
    }
    greenroom
        .execute(&me, "Change the heading to Counted")
        .await
        .ok();
    let text = greenroom.get("/metrics").await.text;
    let scrape = Scrape::parse(&text);
    let value = |name: &str, labels: &[(&str, &str)]| {
        let value = scrape.value(name, labels);
        value.unwrap_or_else(|| panic!("{name} {labels:?}\n{text}"))
    };
    assert_eq!(value("greenroom_previews", &[("state", "live")]), 1.0);
    assert_eq!(value("greenroom_previews", &[("state", "error")]), 0.0);
    let requests = "greenroom_preview_requests_total";
    assert!(value(requests, &[("status", "2xx")]) >= 2.0);
    assert!(value(requests, &[("status", "4xx")]) >= 1.0);
    // A word that takes longer than 0.7 s on a slow machine did not come.
    let delay = |part: &str| -> f64 {
        let name = format!("greenroom_hmr_delay_seconds{part}");
        let words = ["came", "none"].map(|word| scrape.value(&name, &[("word", word)]));
        words.into_iter().flatten().sum()
    };
    assert_eq!(delay("_count"), 1.0, "{text}");
    assert!(delay("_sum") > 0.0 && delay("_sum") < 30.0, "{text}");
    assert!(!text.contains(&host) && !text.contains("demo-me"), "{text}");
    if let Some(promtool) = promtool() {
        check(&promtool, &["check", "metrics"], &text);
    }
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
    let tests = infra("alerts/greenroom.test.yaml");
    let untested: Vec<_> = alerts
        .iter()
        .filter(|alert| tests.matches(alert.as_str()).count() < 2)
        .collect();
    assert!(untested.is_empty(), "quiet and firing: {untested:?}");
    if let Some(promtool) = promtool() {
        let at = |file: &str| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            root.join("infra/alerts")
                .join(file)
                .to_str()
                .unwrap()
                .to_owned()
        };
        check(&promtool, &["check", "rules", &at("greenroom.yaml")], "");
        check(
            &promtool,
            &["test", "rules", &at("greenroom.test.yaml")],
            "",
        );
    }
}
