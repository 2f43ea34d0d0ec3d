//! What model requests cost, counted and limited, through the program: the real CLI, a scripted
//! model API, the reports.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{fs, process::Command};

use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, Who, files_below, rule, wait_for,
    wait_for_async, who, writes,
};

/// What a first request of the CLI costs at least, whatever the model.
const LITTLE: &str = "0.0001";

struct Stage {
    folders: Folders,
    api: StandIn,
    site: String,
}

impl Stage {
    async fn new(script: Value) -> Self {
        let folders = Folders::new();
        let site = folders.site("site", SITE);
        let api = StandIn::start(script).await;
        Self { folders, api, site }
    }

    fn options(&self) -> Options {
        Options::new(&self.folders)
            .api(&self.api)
            .env("CLAUDE_MODEL", "claude-opus-5")
    }

    async fn init(&self, greenroom: &TestGreenroom, who: &Who) {
        let fields = json!({"repoUrl": self.site});
        greenroom.init(who, fields).await.ok();
    }

    /// `greenroom usage …` in the same workspace, with no supervisor to ask.
    fn usage(&self, args: &[&str]) -> String {
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let output = Command::new(env!("CARGO_BIN_EXE_greenroom"))
            .arg("usage")
            .args(args)
            .current_dir(self.folders.join("home"))
            .env_clear()
            .env("HOME", self.folders.join("home"))
            .env("WORKSPACE_PATH", self.folders.workspace())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn ledgers(&self) -> Vec<Value> {
        let mut rows = Vec::new();
        for file in files_below(&self.folders.workspace()) {
            if file.to_str().unwrap().contains("/.greenroom/usage/") {
                let text = fs::read_to_string(file).unwrap();
                rows.extend(
                    text.lines()
                        .filter_map(|line| serde_json::from_str(line).ok()),
                );
            }
        }
        rows
    }

    fn rows(&self, status: &str) -> usize {
        let rows = self.ledgers();
        rows.iter().filter(|row| row["status"] == status).count()
    }
}

async fn totals(greenroom: &TestGreenroom) -> Value {
    greenroom.get("/api/usage").await.ok()["result"]["totals"].take()
}

#[tokio::test]
async fn every_request_is_counted_once_and_reports_agree() {
    let stage = Stage::new(json!({})).await;
    let greenroom = TestGreenroom::start(stage.options().env("METRICS_TENANTS", "true")).await;
    let alice = who("acme", "alice", "main");
    let bob = who("acme", "bob", "main");
    let mut expected = [0_u64; 4];
    let mut cost = 0.0;
    for (person, says) in [
        (&alice, "Change the heading to One"),
        (&alice, "Make the accent colour teal"),
        (&bob, "Change the heading to Two"),
    ] {
        stage.init(&greenroom, person).await;
        let usage = greenroom.execute(person, says).await.ok()["usage"].take();
        for (sum, field) in expected.iter_mut().zip([
            "inputTokens",
            "outputTokens",
            "cacheReadTokens",
            "cacheCreationTokens",
        ]) {
            *sum += usage[field].as_u64().unwrap();
        }
        cost += usage["costUsd"].as_f64().unwrap();
    }
    let result = greenroom.get("/api/usage?period=daily&by=user").await.ok()["result"].take();
    assert_eq!(
        (&result["period"], &result["by"]),
        (&json!("daily"), &json!("user"))
    );
    let totals = &result["totals"];
    let counted = [
        "inputTokens",
        "outputTokens",
        "cacheReadTokens",
        "cacheCreationTokens",
    ]
    .map(|field| totals[field].as_u64().unwrap());
    // The CLI counted the same requests by itself, and priced them the same.
    assert_eq!(counted, expected, "{result}");
    assert!(
        (totals["costUsd"].as_f64().unwrap() - cost).abs() < 1e-6,
        "{cost} {result}"
    );
    let model_requests = stage.api.requests().len() as u64;
    assert_eq!(totals["requests"], model_requests);
    let rows = result["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{result}");
    assert_eq!(
        (&rows[0]["key"], &rows[1]["key"]),
        (&json!("acme/alice"), &json!("acme/bob"))
    );
    let today = jiff::Timestamp::now().to_string()[..10].to_owned();
    assert!(
        rows.iter().all(|row| row["bucket"] == today.as_str()),
        "{result}"
    );

    for (by, key) in [
        ("client", "acme"),
        ("thread", "acme/alice/main"),
        ("model", "claude-opus-5"),
    ] {
        let path = format!("/api/usage?period=monthly&by={by}");
        let result = greenroom.get(&path).await.ok()["result"].take();
        assert_eq!(result["rows"][0]["key"], key);
        assert_eq!(result["totals"], *totals, "{by}");
    }
    let alone = greenroom
        .get("/api/usage?clientId=acme&userId=bob")
        .await
        .ok();
    assert_eq!(
        alone["result"]["totals"],
        rows[1]
            .as_object()
            .map(|row| {
                let mut row = row.clone();
                row.remove("bucket");
                row.remove("key");
                Value::Object(row)
            })
            .unwrap()
    );
    for bad in [
        "period=yearly",
        "by=mood",
        "timeZone=Mars",
        "from=today",
        "clientId=..",
    ] {
        let answer = greenroom.get(&format!("/api/usage?{bad}")).await;
        assert_eq!(answer.status, 400, "{bad}");
    }

    // The command line reads the same files by itself.
    let told: Value =
        serde_json::from_str(&stage.usage(&["daily", "--by", "user", "--json"])).unwrap();
    assert_eq!(told, result);
    let csv = stage.usage(&["weekly", "--csv", "--by=model", "--time-zone=Europe/Berlin"]);
    assert!(
        csv.lines().nth(1).unwrap().contains(",claude-opus-5,"),
        "{csv}"
    );
    let table = stage.usage(&["monthly", "--client-id", "acme"]);
    assert!(table.contains("Total") && table.contains("acme"), "{table}");
    assert!(
        stage
            .usage(&["daily", "--until", "2020-01-01", "--csv"])
            .lines()
            .count()
            == 1
    );
    // Of nothing is left anything open.
    assert_eq!(stage.rows("reserved"), stage.rows("settled"));
    let mut metrics = String::new();
    for _ in 0..600 {
        metrics = greenroom.get("/metrics").await.text;
        if metrics.contains("greenroom_usage_compared_total 3\n") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let settled =
        format!("greenroom_model_requests_total{{status=\"settled\"}} {model_requests}\n");
    for line in [
        settled.as_str(),
        "greenroom_usage_differences_total{from=\"cli\"} 0\n",
        "greenroom_usage_differences_total{from=\"transcript\"} 0\n",
        // By name, since this operator wants it.
        "greenroom_client_turns_total{client=\"acme\",status=\"completed\"} 3\n",
        &format!("greenroom_client_request_cost_usd_count{{client=\"acme\"}} {model_requests}\n"),
        &format!(
            "greenroom_client_tokens_total{{client=\"acme\",kind=\"output\"}} {}\n",
            expected[1]
        ),
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    let spent: f64 = metrics
        .lines()
        .find_map(|line| {
            line.strip_prefix("greenroom_client_request_cost_usd_sum{client=\"acme\"} ")
        })
        .and_then(|value| value.parse().ok())
        .unwrap();
    assert!((spent - cost).abs() < 1e-6, "{spent} {cost}");
    assert!(!metrics.contains("alice"), "{metrics}");
}

#[tokio::test]
async fn a_turn_that_passes_its_budget_ends_with_its_edits_kept() {
    let (name, content) = ("kept.txt", "kept\n");
    let stage = Stage::new(json!({"rules": [
        rule("spend it all", &[writes(name, content), writes("never.txt", "never\n")]),
    ]}))
    .await;
    let greenroom = TestGreenroom::start(stage.options().env("BUDGET_TURN_USD", LITTLE)).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    let begun = std::time::Instant::now();
    let answer = greenroom.execute(&alice, "spend it all").await.answer;
    let (result, id) = (&answer.body["result"], answer.body["turnId"].clone());
    assert_eq!(answer.status, 429, "{}", answer.text);
    assert_eq!(answer.body["code"], "budget_exceeded");
    // The CLI alone would try for minutes.
    assert!(begun.elapsed().as_secs() < 100, "{:?}", begun.elapsed());
    assert_eq!(result["status"], "failed");
    assert_eq!(result["turnId"], id);
    assert!(
        result["commit"]["files"].to_string().contains(name),
        "{result}"
    );
    let said = answer.body["error"].as_str().unwrap();
    assert!(
        said.starts_with("The budget of one turn is used up"),
        "{said}"
    );
    assert_eq!(stage.api.requests_about("spend it all").len(), 1);
    let events = greenroom.events(id.as_str().unwrap(), 0).await.all().await;
    let warnings: Vec<_> = events
        .iter()
        .filter(|e| e.name == "budget.warning")
        .collect();
    assert_eq!(warnings.len(), 1);
    assert_eq!(warnings[0].data["limitUsd"], json!(0.0001));
    assert!(warnings[0].data["spentUsd"].as_f64().unwrap() > 0.0001);
    // The next turn has a budget of its own, and goes on in the same conversation.
    let next = greenroom.execute(&alice, "Run `ls`").await.answer;
    assert_eq!(next.body["code"], "budget_exceeded", "{}", next.text);
    assert_eq!(stage.api.requests_about("Run `ls`").len(), 1);
}

#[tokio::test]
async fn a_budget_that_is_used_up_starts_no_agent_and_holds_after_a_restart() {
    let stage =
        Stage::new(json!({"rules": [{"match": "hello", "steps": [{"text": "Hello."}]}]})).await;
    let options = stage.options().env("BUDGET_USER_DAY_USD", LITTLE);
    let greenroom = TestGreenroom::start(options).await;
    let (alice, bob) = (who("acme", "alice", "main"), who("acme", "bob", "main"));
    stage.init(&greenroom, &alice).await;
    stage.init(&greenroom, &bob).await;
    greenroom.execute(&alice, "hello").await.ok();
    let refused = async |greenroom: &TestGreenroom| {
        let answer = greenroom.execute(&alice, "hello again").await.answer;
        answer.clone().error(429, "budget_exceeded");
        let wait: u64 = answer.headers["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!(wait <= 86_400, "{wait}");
        assert_eq!(answer.body["result"]["status"], "failed");
        assert!(answer.body["turnId"].is_string());
        assert_eq!(stage.api.requests_about("hello again").len(), 0);
    };
    refused(&greenroom).await;
    greenroom.execute(&bob, "hello").await.ok();
    let greenroom = greenroom.restart().await;
    refused(&greenroom).await;
}

#[tokio::test]
async fn a_client_s_budget_holds_across_two_containers() {
    let stage =
        Stage::new(json!({"rules": [{"match": "hello", "steps": [{"text": "Hello."}]}]})).await;
    let options = || stage.options().env("BUDGET_CLIENT_DAY_USD", LITTLE);
    let (one, two) = (
        TestGreenroom::start(options()).await,
        TestGreenroom::start(options()).await,
    );
    let (alice, bob) = (who("acme", "alice", "main"), who("acme", "bob", "main"));
    stage.init(&one, &alice).await;
    stage.init(&two, &bob).await;
    one.execute(&alice, "hello").await.ok();
    let answer = two.execute(&bob, "hello there").await.answer;
    answer.error(429, "budget_exceeded");
    assert_eq!(stage.api.requests_about("hello there").len(), 0);
}

#[tokio::test]
async fn a_killed_program_leaves_one_request_at_its_worst() {
    let stage = Stage::new(json!({})).await;
    let mut greenroom = TestGreenroom::start(stage.options()).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    greenroom
        .execute(&alice, "Change the heading to One")
        .await
        .ok();
    let before = totals(&greenroom).await;
    let settled = stage.rows("settled");
    greenroom
        .begin(&alice, "Think slowly for 300 seconds")
        .await;
    wait_for("the request is under way", || {
        (stage.rows("reserved") > settled && !stage.api.requests_about("slowly").is_empty())
            .then_some(())
    })
    .await;
    // It is in no report yet.
    assert_eq!(totals(&greenroom).await, before);
    greenroom.kill().await;
    let greenroom = TestGreenroom::start(greenroom.options.clone()).await;
    let after = totals(&greenroom).await;
    assert_eq!(after["unsettled"], 1, "{after}");
    assert_eq!(after["requests"], before["requests"].as_u64().unwrap() + 1);
    // An answer may have 128,000 tokens.
    let cost = |totals: &Value| totals["costUsd"].as_f64().unwrap();
    assert!(cost(&after) > cost(&before) + 0.5, "{before} {after}");
}

#[tokio::test]
async fn a_turn_that_is_cancelled_is_counted_as_far_as_it_came() {
    let stage = Stage::new(json!({})).await;
    let greenroom = TestGreenroom::start(stage.options()).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    let id = greenroom
        .begin(&alice, "Think slowly for 300 seconds")
        .await;
    greenroom.events(&id, 0).await.until("text.delta").await;
    greenroom
        .api("POST", &format!("/api/turns/{id}/cancel"), Value::Null)
        .await
        .ok();
    wait_for("it is settled", || {
        (stage.rows("aborted") == 1).then_some(())
    })
    .await;
    let totals = totals(&greenroom).await;
    assert_eq!(
        (&totals["requests"], &totals["aborted"]),
        (&json!(1), &json!(1)),
        "{totals}"
    );
    assert!(
        totals["inputTokens"].as_u64().unwrap() + totals["cacheCreationTokens"].as_u64().unwrap()
            > 1000
    );
    assert!(totals["outputTokens"].as_u64().unwrap() >= 1);
    assert!(totals["costUsd"].as_f64().unwrap() < 0.5);
}

#[tokio::test]
async fn what_the_upstream_refuses_costs_nothing() {
    let stage = Stage::new(json!({"rules": [{"match": "busy", "steps": [
        {"act": {"status": {"status": 529, "retry_after": 1}}, "times": 1, "text": "Now."}]}]}))
    .await;
    let greenroom = TestGreenroom::start(stage.options()).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    greenroom.execute(&alice, "busy").await.ok();
    assert_eq!((stage.rows("refused"), stage.rows("settled")), (1, 1));
    assert_eq!(totals(&greenroom).await["requests"], 1);
}

#[tokio::test]
async fn a_model_api_that_is_busy_is_waited_for() {
    // The CLI by itself gives up at the third.
    let stage = Stage::new(json!({"rules": [{"match": "busy", "steps": [
        {"act": {"status": {"status": 529}}, "times": 4, "text": "Now."}]}]}))
    .await;
    let greenroom = TestGreenroom::start(stage.options()).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    let id = greenroom.begin(&alice, "busy").await;
    let events = greenroom.events(&id, 0).await.all().await;
    let last = events.last().unwrap();
    assert_eq!(last.name, "turn.completed", "{last:?}");
    assert_eq!(last.data["result"]["text"], "Now.");
    let waits: Vec<_> = events.iter().filter(|e| e.name == "turn.waiting").collect();
    assert_eq!(waits.len(), 4, "{events:?}");
    for wait in waits {
        let until: jiff::Timestamp = wait.data["until"].as_str().unwrap().parse().unwrap();
        assert!(until > jiff::Timestamp::now() - jiff::SignedDuration::from_mins(2));
        assert_eq!(wait.data["reason"], "the model API is overloaded");
    }
    assert_eq!((stage.rows("refused"), stage.rows("settled")), (4, 1));
}

#[tokio::test]
async fn the_live_view_tells_the_last_request() {
    let stage = Stage::new(json!({})).await;
    let greenroom =
        TestGreenroom::start(stage.options().env("BUDGET_CLIENT_MONTH_USD", "1000")).await;
    let alice = who("acme", "alice", "main");
    stage.init(&greenroom, &alice).await;
    greenroom
        .execute(&alice, "Change the heading to One")
        .await
        .ok();
    // Nobody's in particular, so no client's budget is about it.
    let shot = json!({"prompt": "hello"});
    greenroom.api("POST", "/execute", shot).await.ok();
    let totals = totals(&greenroom).await;
    let sent = crate::support::Sent::new("GET", "/api/usage/live", &Value::Null);
    let mut events = crate::support::stream(greenroom.api_port, sent).await;
    let view = events.until("usage").await.data;
    assert_eq!(view["today"], totals, "{view}");
    assert_eq!(
        view["recent"].as_array().unwrap().len() as u64,
        totals["requests"].as_u64().unwrap()
    );
    assert!(view["costPerHourUsd"].as_f64().unwrap() > 0.0);
    let budgets = view["budgets"].as_array().unwrap();
    assert_eq!(budgets.len(), 1, "{view}");
    assert_eq!(
        (&budgets[0]["key"], &budgets[0]["limitUsd"]),
        (&json!("acme"), &json!(1000.0))
    );
    // It is told anew by itself, and keeps nobody awake.
    events.until("usage").await;
    let idle = greenroom.get("/api/idle").await.body;
    assert_eq!(idle["holders"], json!([]), "{idle}");
}

#[tokio::test]
async fn another_container_s_client_is_served_counted_and_limited() {
    let stage = Stage::new(json!({})).await;
    let tokens = stage.folders.join("tokens.yaml");
    let token = "token-of-acme-0123456789";
    fs::write(&tokens, format!("{token}: acme\n")).unwrap();
    let greenroom = TestGreenroom::start(
        stage
            .options()
            .env("GATEWAY_PORT", "0")
            .env("GATEWAY_TOKENS_FILE", &tokens)
            .env("BUDGET_CLIENT_DAY_USD", LITTLE),
    )
    .await;
    let port = wait_for("the gateway's line in the log", || {
        let lines = greenroom.log();
        let lines = lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .into_iter()
            .find_map(|line| line["gateway_port"].as_u64())
    })
    .await;
    let port = u16::try_from(port).unwrap();
    let ask = async |stream: bool| {
        let body = json!({"model": "claude-opus-5", "max_tokens": 1000, "stream": stream,
            "messages": [{"role": "user", "content": "Say something that is long enough to cost"}]});
        let sent = crate::support::Sent::new("POST", "/v1/messages", &body)
            .header("authorization", &format!("Bearer {token}"));
        crate::support::request(port, sent).await.unwrap()
    };
    let first = ask(false).await;
    assert_eq!(first.status, 200, "{}", first.text);
    assert_eq!(first.body["type"], "message");
    let result = greenroom.get("/api/usage?by=user").await.ok()["result"].take();
    assert_eq!(result["rows"][0]["key"], "acme/-");
    let counted = &result["totals"];
    for (ours, theirs) in [
        ("inputTokens", "input_tokens"),
        ("outputTokens", "output_tokens"),
    ] {
        assert_eq!(counted[ours], first.body["usage"][theirs]);
    }
    assert!(counted["costUsd"].as_f64().unwrap() > 0.0001);
    let refused = ask(true).await;
    assert_eq!(refused.status, 429, "{}", refused.text);
    assert_eq!(refused.body["error"]["type"], "rate_limit_error");
    assert!(
        refused.body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("budget")
    );
    assert_eq!(refused.headers["x-should-retry"], "false");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(stage.api.requests().len(), 1);
}

/// What ccusage makes of the CLI's transcripts: the totals of a report.
fn ccusage_totals(stage: &Stage, report: &str) -> Value {
    let sessions = files_below(&stage.folders.workspace())
        .into_iter()
        .filter(|file| file.extension().is_some_and(|kind| kind == "jsonl"))
        .filter_map(|file| {
            let folder = file
                .ancestors()
                .find(|folder| folder.ends_with("projects"))?;
            Some(folder.parent()?.to_str()?.to_owned())
        });
    let folders: std::collections::BTreeSet<String> = sessions.collect();
    assert!(folders.len() > 1, "{folders:?}");
    #[expect(
        clippy::disallowed_methods,
        reason = "the tool that we are compared with"
    )]
    let output = Command::new(crate::support::ccusage())
        .args([
            "claude",
            report,
            "--json",
            "--offline",
            "--timezone",
            "UTC",
            "--mode",
            "calculate",
        ])
        .current_dir(stage.folders.join("home"))
        .env_clear()
        .env("HOME", stage.folders.join("home"))
        .env(
            "CLAUDE_CONFIG_DIR",
            folders.into_iter().collect::<Vec<_>>().join(","),
        )
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["totals"].clone()
}

#[tokio::test]
async fn the_totals_are_those_of_ccusage() {
    let stage = Stage::new(json!({"rules": [
        rule("several", &[writes("a.txt", "a\n"), writes("b.txt", "b\n"), writes("c.txt", "c\n")]),
    ]}))
    .await;
    let mut greenroom = None;
    // A program for each model: a change of model costs a request that is in no transcript.
    for (model, user, thread) in [
        ("claude-opus-4-8", "alice", "main"),
        ("claude-sonnet-4-6", "alice", "two"),
        ("claude-haiku-4-5-20251001", "bob", "main"),
        ("claude-opus-4-5-20251101", "bob", "two"),
    ] {
        drop(greenroom.take());
        let options = stage.options().env("CLAUDE_MODEL", model);
        let program = greenroom.insert(TestGreenroom::start(options).await);
        let who = who("acme", user, thread);
        stage.init(program, &who).await;
        for says in [
            "Change the heading to One",
            "several",
            "Use a tool that fails",
        ] {
            program.execute(&who, says).await.ok();
        }
        // The CLI writes its transcript after its result, and greenroom has looked at that.
        wait_for_async("the transcripts are whole", async || {
            let figures = program.get("/metrics").await.text;
            figures
                .contains("greenroom_usage_compared_total 3\n")
                .then_some(())
        })
        .await;
    }
    let greenroom = greenroom.unwrap();
    for period in ["daily", "weekly", "monthly"] {
        let path = format!("/api/usage?period={period}&by=model");
        let ours = greenroom.get(&path).await.ok()["result"]["totals"].take();
        let theirs = ccusage_totals(&stage, period);
        for field in [
            "inputTokens",
            "outputTokens",
            "cacheReadTokens",
            "cacheCreationTokens",
        ] {
            assert!(ours[field].as_u64().unwrap() > 100, "{field}: {ours}");
            assert_eq!(
                ours[field], theirs[field],
                "{period} {field}: {ours} {theirs}"
            );
        }
        let cost = ours["costUsd"].as_f64().unwrap() - theirs["totalCost"].as_f64().unwrap();
        assert!(cost.abs() < 1e-6, "{period}: {ours} {theirs}");
    }
}
