//! The one-shot service: `POST /execute`, and `greenroom service` that is nothing else.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{
    Answer, CANARY, Folders, Options, PATIENCE, SITE, Sent, StandIn, TestGreenroom, files_below,
    git, processes_below, request, request_at, rule, runs, wait_for, wait_for_async, who, writes,
};

/// What old callers send.
const VECTOR: [&str; 5] = [
    "-p",
    "--print",
    "--output-format",
    "json",
    "--dangerously-skip-permissions",
];

/// A CLI whose prompt is a shell script.
fn shell_cli(folders: &Folders) -> std::path::PathBuf {
    let folder = folders.join("cli");
    fs::create_dir_all(&folder).unwrap();
    let program = folder.join("claude");
    let script = "#!/bin/sh\n[ \"$1\" = --version ] && { echo '2.1.329 (Claude Code)'; exit; }\n\
                  script=$(cat)\neval \"$script\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

async fn start_shell(folders: &Folders, adapt: impl FnOnce(Options) -> Options) -> TestGreenroom {
    let options = Options::new(folders)
        .service()
        .rehearsal()
        .env("CLAUDE_BIN", shell_cli(folders));
    TestGreenroom::start(adapt(options)).await
}

async fn execute(greenroom: &TestGreenroom, body: Value) -> Answer {
    greenroom.api("POST", "/execute", body).await
}

async fn figures(greenroom: &TestGreenroom) -> Value {
    let sent = Sent::new("GET", "/metrics", &Value::Null).header("accept", "application/json");
    greenroom.send(sent).await.body
}

/// A control plane that takes what it is told.
async fn control_plane() -> (String, Arc<Mutex<Vec<Value>>>) {
    let told: Arc<Mutex<Vec<Value>>> = Arc::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/events", listener.local_addr().unwrap());
    let record = told.clone();
    let take = move |body: axum::Json<Value>| async move {
        record.lock().unwrap().push(body.0);
    };
    let app = axum::Router::new().route("/events", axum::routing::post(take));
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, app).await });
    (url, told)
}

/// Folders of runs that are still there.
fn run_folders(folders: &Folders) -> Vec<std::path::PathBuf> {
    let runtime = fs::read_dir(folders.join("tmp")).into_iter().flatten();
    let runs = runtime.flatten().flat_map(|shared| {
        let processes = fs::read_dir(shared.path()).into_iter().flatten().flatten();
        processes.map(|process| process.path().join("runs"))
    });
    runs.flat_map(|runs| fs::read_dir(runs).into_iter().flatten().flatten())
        .map(|run| run.path())
        .collect()
}

#[tokio::test]
async fn the_real_cli_answers_in_a_folder_of_its_own_that_is_gone_afterwards() {
    let secret = "not-of-this-world-4711";
    let api = StandIn::start(json!({"rules": [
        rule("make a page", &[
            writes("page.html", "<h1>Hello</h1>"),
            runs("pwd; ls; echo \"$HOME\"; ls -a \"$HOME\"; cat /etc/hostname"),
            runs(&format!("cat {secret} ../../*/work/*; curl -s -m 2 http://127.0.0.1:1/; env")),
        ]),
        {"match": "too much", "steps": [{"act": {"status": {"status": 400}}}]},
        {"match": "refuse me", "steps": [{"act": {"status": {"status": 401}}}]},
    ]}))
    .await;
    let folders = Folders::new();
    let options = Options::new(&folders)
        .service()
        .api(&api)
        .without("WORKSPACE_PATH")
        .without("CACHE_PATH")
        .env("PATH", "/usr/bin:/bin");
    let greenroom = TestGreenroom::start(options).await;

    let answer = execute(
        &greenroom,
        json!({"prompt": "Please make a page", "args": VECTOR, "timeout": 300_000}),
    )
    .await;
    assert!(!answer.text.contains(CANARY), "{}", answer.text);
    let body = answer.ok();
    let output: Value = serde_json::from_str(body["result"]["output"].as_str().unwrap()).unwrap();
    assert_eq!(output["type"], "result", "{output}");
    assert_eq!(output["is_error"], false, "{output}");
    assert_eq!(output["result"], "Done.");
    let (took, all) = (&body["result"]["duration"], &body["executionTime"]);
    assert!(took.as_u64().unwrap() > 0 && all.as_u64() >= took.as_u64());
    assert_eq!(run_folders(&folders), Vec::<std::path::PathBuf>::new());
    assert!(
        files_below(&folders.join("tmp"))
            .iter()
            .all(|file| !file.ends_with("page.html"))
    );
    // The three tool calls ran: with the old callers' flag, and without it.
    assert_eq!(api.requests_about("make a page").len(), 4);

    let text = execute(
        &greenroom,
        json!({"prompt": "Say something", "timeout": 300_000}),
    )
    .await;
    let body = text.ok();
    assert!(!body["result"]["output"].as_str().unwrap().trim().is_empty());

    let stream = execute(
        &greenroom,
        json!({"prompt": "Say more", "timeout": 300_000, "args": ["--output-format=stream-json"]}),
    )
    .await
    .ok();
    let lines = stream["result"]["output"].as_str().unwrap().trim().lines();
    let events: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(events[0]["type"], "system");
    assert_eq!(events.last().unwrap()["type"], "result");

    // What the API refuses comes at once, in the CLI's own words.
    let refused = execute(
        &greenroom,
        json!({"prompt": "too much", "timeout": 300_000}),
    )
    .await;
    assert_eq!(refused.body["exitCode"], 1, "{}", refused.text);
    assert!(
        refused.body["output"].as_str().unwrap().contains("400"),
        "{}",
        refused.text
    );
    refused.error(502, "agent_failed");
    let refused = execute(
        &greenroom,
        json!({"prompt": "refuse me", "timeout": 300_000}),
    )
    .await;
    let sentence = refused.error(502, "agent_failed");
    assert!(sentence.contains("ANTHROPIC_API_KEY"), "{sentence}");

    // JSON by itself here, and what a scraper asks for.
    let counted = greenroom.get("/metrics").await.body;
    assert_eq!(counted["totalRequests"], 5, "{counted}");
    assert_eq!(counted["successfulRequests"], 3);
    assert_eq!(counted["failedRequests"], 2);
    assert_eq!(counted["activeRequests"], 0);
    assert!(counted["averageExecutionTime"].as_f64().unwrap() > 0.0);
    let scraped = Sent::new("GET", "/metrics", &Value::Null).header("accept", "text/plain");
    let scraped = greenroom.send(scraped).await.text;
    assert!(
        scraped.contains("greenroom_model_requests_total{status=\"settled\"}"),
        "{scraped}"
    );

    let health = greenroom.get("/health").await;
    assert_eq!(
        (health.status, &health.body["status"]),
        (200, &json!("healthy"))
    );
    assert_eq!(health.body["workspace"], Value::Null);
    let deep = greenroom.get("/health?deep=1").await;
    assert_eq!(deep.status, 200, "{}", deep.text);
    assert!(!deep.body["testResponse"].as_str().unwrap().is_empty());
    let asked = api.requests_about("health check").len();
    assert!(asked >= 1);
    greenroom.get("/health?deep=1").await.status_is(200);
    assert_eq!(
        api.requests_about("health check").len(),
        asked,
        "whoever asks often costs nothing"
    );
    for path in ["/", "/api/threads", "/api/init", "/openapi.json", "/ready"] {
        greenroom.get(path).await.error(404, "not_found");
    }
}

#[tokio::test]
async fn what_cannot_be_understood_is_refused_with_its_name() {
    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| options).await;
    for (body, said) in [
        (json!({}), "prompt"),
        (json!({"prompt": " \n"}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": "true", "args": "-p"}), "args"),
        (json!({"prompt": "true", "args": [5]}), "args"),
        (
            json!({"prompt": "true", "args": ["--mcp-config", "x"]}),
            "--mcp-config",
        ),
        (
            json!({"prompt": "true", "args": ["--settings={}"]}),
            "--settings",
        ),
        (json!({"prompt": "true", "args": ["true"]}), "true"),
        (
            json!({"prompt": "true", "args": ["--tools", "WebFetch"]}),
            "--tools",
        ),
        (json!({"prompt": "true", "timeout": 0}), "timeout"),
        (json!({"prompt": "true", "timeout": 600_001}), "timeout"),
        (json!({"prompt": "true", "timeout": -1}), "timeout"),
        (json!({"prompt": "true", "timeout": "1000"}), "timeout"),
        (json!({"prompt": "true", "cwd": 1}), "cwd"),
        (json!({"prompt": "true", "cwd": "/etc"}), "no workspace"),
    ] {
        let sentence = execute(&greenroom, body.clone())
            .await
            .error(400, "invalid_request");
        assert!(sentence.contains(said), "{body}: {sentence}");
    }
    let no_json = Sent {
        body: b"prompt=x".to_vec(),
        ..Sent::new("POST", "/execute", &Value::Null)
    };
    greenroom
        .send(no_json.header("content-type", "application/x-www-form-urlencoded"))
        .await
        .error(415, "unsupported_media_type");
    greenroom
        .get("/execute")
        .await
        .error(405, "invalid_request");
    let large = json!({"prompt": "x".repeat(1 << 20)});
    execute(&greenroom, large)
        .await
        .error(413, "payload_too_large");
    assert_eq!(figures(&greenroom).await["totalRequests"], 0);
}

#[tokio::test]
async fn a_run_that_fails_says_how() {
    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| options.env("HF_TOKEN", "hf-canary-99")).await;
    let failed = execute(
        &greenroom,
        json!({"prompt": "echo half; echo \"no luck: hf-canary-99 $ANTHROPIC_AUTH_TOKEN in $HOME\" >&2; exit 3"}),
    )
    .await;
    let body = failed.body.clone();
    failed.error(502, "agent_failed");
    assert_eq!(body["exitCode"], 3, "{body}");
    assert_eq!(body["stderr"], "no luck: *** *** in /home");
    assert_eq!(body["output"].as_str().unwrap().trim(), "half");

    // Long tails are cut, and what is no text does no harm.
    let failed = execute(
        &greenroom,
        json!({"prompt": "head -c 100000 /dev/urandom >&2; printf '\\377end' >&2; kill -9 $$"}),
    )
    .await;
    assert_eq!(failed.body["exitCode"], 137);
    let stderr = failed.body["stderr"].as_str().unwrap();
    assert!(stderr.ends_with("end") && stderr.len() < 40_000);
    failed.error(502, "agent_failed");

    let flood = execute(
        &greenroom,
        json!({"prompt": "exec cat /dev/zero", "timeout": 60_000}),
    )
    .await;
    assert!(flood.error(502, "agent_failed").contains("MB"));

    // Over its time: SIGTERM first, which one that listens uses.
    let late = execute(
        &greenroom,
        json!({"prompt": "trap 'echo tidy >&2; exit 7' TERM; sleep 600 & wait", "timeout": 3000}),
    )
    .await;
    assert_eq!(late.body["exitCode"], 7, "{}", late.text);
    assert_eq!(late.body["stderr"], "tidy");
    assert!(late.error(504, "turn_timeout").contains("3 s"));
    // And one that does not is killed 5 s later, with all that it started.
    let begun = std::time::Instant::now();
    let deaf = execute(
        &greenroom,
        json!({"prompt": "trap '' TERM; setsid sleep 3600 & while :; do sleep 1; done", "timeout": 3000}),
    )
    .await;
    assert_eq!(deaf.body["exitCode"], 137, "{}", deaf.text);
    deaf.error(504, "turn_timeout");
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(8) && took < Duration::from_secs(60),
        "{took:?}"
    );
    let sleeps = processes_below(&folders.join(""));
    assert!(
        !sleeps.iter().any(|process| process.is_program("sleep")),
        "{sleeps:?}"
    );
    assert_eq!(run_folders(&folders), Vec::<std::path::PathBuf>::new());
    let counted = figures(&greenroom).await;
    assert_eq!(
        (&counted["failedRequests"], &counted["activeRequests"]),
        (&json!(5), &json!(0))
    );
    let log = greenroom.log().concat();
    assert!(!log.contains("hf-canary-99"));
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_its_run() {
    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| {
        options.env("SERVICE_MAX_CONCURRENT", "1")
    })
    .await;
    let is_asleep = || {
        let processes = processes_below(&folders.join(""));
        processes.iter().any(|process| process.is_program("sleep"))
    };
    {
        let sent = Sent::new("POST", "/execute", &json!({"prompt": "sleep 3600"}));
        let call = request(greenroom.api_port, sent);
        let begun = wait_for("the run", || is_asleep().then_some(()));
        tokio::select! {
            answer = call => panic!("{answer:?}"),
            () = begun => {}
        }
    }
    wait_for("its end", || (!is_asleep()).then_some(())).await;
    // Its slot is free again, and its folder gone.
    execute(&greenroom, json!({"prompt": "echo next"}))
        .await
        .ok();
    assert_eq!(run_folders(&folders), Vec::<std::path::PathBuf>::new());
}

/// How many intervals hold at once at most.
fn most_at_once(intervals: &[(u128, u128)]) -> usize {
    let mut edges: Vec<(u128, i32)> = intervals
        .iter()
        .flat_map(|&(begin, end)| [(begin, 1), (end, -1)])
        .collect();
    edges.sort_unstable();
    let mut now = 0;
    let counts = edges.into_iter().map(|(_, step)| {
        now += step;
        now
    });
    usize::try_from(counts.max().unwrap()).unwrap()
}

#[tokio::test]
async fn exactly_the_limit_runs_at_once_and_none_is_lost() {
    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| {
        options.env("SERVICE_MAX_CONCURRENT", "4")
    })
    .await;
    let calls = (0..50).map(|n| {
        let script = format!("date +%s%N; echo {n}; sleep 0.2; date +%s%N");
        execute(&greenroom, json!({"prompt": script}))
    });
    let answers = join_all(calls).await;
    let mut intervals = Vec::new();
    for (n, answer) in answers.into_iter().enumerate() {
        let body = answer.ok();
        let lines: Vec<u128> = body["result"]["output"]
            .as_str()
            .unwrap()
            .lines()
            .map(|line| line.parse().unwrap())
            .collect();
        assert_eq!(lines[1], n as u128, "each has its own answer");
        intervals.push((lines[0], lines[2]));
    }
    assert!(most_at_once(&intervals) <= 4);
    let counted = figures(&greenroom).await;
    assert_eq!(counted["totalRequests"], 50);
    assert_eq!(counted["successfulRequests"], 50);
    assert_eq!(counted["activeRequests"], 0);
    assert_eq!(run_folders(&folders), Vec::<std::path::PathBuf>::new());

    // On a machine that takes longer for a start than such a run sleeps they were never four.
    let calls = (0..6).map(|_| execute(&greenroom, json!({"prompt": "exec sleep 3600"})));
    let asleep = || {
        let running = processes_below(&folders.join(""));
        let asleep = running.iter().filter(|process| process.is_program("sleep"));
        let asleep = asleep.count();
        assert!(asleep <= 4, "{running:?}");
        asleep
    };
    tokio::select! {
        answers = join_all(calls) => panic!("{answers:?}"),
        () = wait_for("as many as may", || (asleep() == 4).then_some(())) => {}
    }
    // Those in line have gone with the others' callers.
    wait_for("their ends", || (asleep() == 0).then_some(())).await;
}

#[tokio::test]
async fn fifty_calls_of_the_real_cli_all_get_their_answers() {
    let rules: Vec<Value> = (0..50)
        .map(|n| json!({"match": format!("number {n}!"), "steps": [{"text": format!("It is {n}."), "delay_ms": 200}]}))
        .collect();
    let api = StandIn::start(json!({"rules": rules})).await;
    let folders = Folders::new();
    let greenroom = TestGreenroom::start(
        Options::new(&folders)
            .api(&api)
            .env("CLAUDE_SERVICE_PORT", "0")
            .env("SERVICE_MAX_CONCURRENT", "3"),
    )
    .await;
    let calls = (0..50).map(|n| {
        let body =
            json!({"prompt": format!("Tell me number {n}!"), "args": VECTOR, "timeout": 600_000});
        // By both doors.
        let port = if n % 2 == 0 {
            greenroom.api_port
        } else {
            greenroom.service_port
        };
        request(port, Sent::new("POST", "/execute", &body))
    });
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        let body = answer.unwrap().ok();
        let output: Value =
            serde_json::from_str(body["result"]["output"].as_str().unwrap()).unwrap();
        assert_eq!(output["result"], format!("It is {n}."));
    }
    assert!(api.requests_about("number").len() >= 50);
    // Counted, as what it was.
    let usage = greenroom.get("/api/usage?by=client").await.ok();
    assert!(
        usage["result"]["totals"]["requests"].as_u64().unwrap() >= 50,
        "{usage}"
    );
    let ledger: String = files_below(&folders.workspace())
        .iter()
        .filter(|file| file.extension().is_some_and(|ext| ext == "jsonl"))
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    assert!(ledger.contains("\"kind\":\"service\""), "{ledger}");
}

#[tokio::test]
async fn a_full_line_is_told_and_a_stop_answers_everybody() {
    let folders = Folders::new();
    let mut greenroom = start_shell(&folders, |options| {
        options
            .env("SERVICE_MAX_CONCURRENT", "1")
            .env("DRAIN_SECONDS", "1")
    })
    .await;
    let port = greenroom.api_port;
    let call = move || {
        let sent = Sent::new(
            "POST",
            "/execute",
            &json!({"prompt": "sleep 3600", "timeout": 600_000}),
        );
        request(port, sent)
    };
    let waiting = async {
        wait_for_async("a full line", async || {
            let active = figures(&greenroom).await["activeRequests"].as_u64()?;
            (active == 101).then_some(())
        })
        .await;
        let refused = execute(&greenroom, json!({"prompt": "true"})).await;
        assert_eq!(refused.headers["retry-after"], "10");
        refused.error(429, "queue_full");
        greenroom.signal(Signal::SIGTERM);
        wait_for_async("a health that says so", async || {
            let health = greenroom.ask("/health").await;
            health
                .is_none_or(|health| health.status == 503)
                .then_some(())
        })
        .await;
    };
    let (answers, ()) = tokio::join!(join_all((0..101).map(|_| call())), waiting);
    for answer in answers {
        answer.unwrap().error(503, "draining");
    }
    assert!(greenroom.wait_exit(PATIENCE).await.success());
}

#[tokio::test]
async fn the_circuit_opens_when_most_runs_fail() {
    let folders = Folders::new();
    let (url, told) = control_plane().await;
    let greenroom = start_shell(&folders, |options| options.env("CONTROL_PLANE_URL", url)).await;
    for _ in 0..5 {
        execute(&greenroom, json!({"prompt": "echo fine"}))
            .await
            .ok();
    }
    for _ in 0..5 {
        execute(&greenroom, json!({"prompt": "exit 1"}))
            .await
            .error(502, "agent_failed");
    }
    let refused = execute(&greenroom, json!({"prompt": "echo fine"})).await;
    let wait: u64 = refused.headers["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=30).contains(&wait));
    refused.error(503, "circuit_open");
    let scraped = Sent::new("GET", "/metrics", &Value::Null).header("accept", "text/plain");
    let scraped = greenroom.send(scraped).await.text;
    assert!(
        scraped.contains("greenroom_service_breaker{state=\"open\"} 1"),
        "{scraped}"
    );
    let health = greenroom.get("/health").await.body;
    assert_eq!(
        (&health["status"], &health["serviceCircuit"]),
        (&json!("healthy"), &json!("open"))
    );
    // After the pause one is tried, and closes it.
    wait_for_async("half-open", async || {
        let answer = execute(&greenroom, json!({"prompt": "echo fine"})).await;
        (answer.status == 200).then_some(())
    })
    .await;
    execute(&greenroom, json!({"prompt": "echo fine"}))
        .await
        .ok();
    let scraped = Sent::new("GET", "/metrics", &Value::Null).header("accept", "text/plain");
    let scraped = greenroom.send(scraped).await.text;
    // Each change is a figure, and a line of the log that a machine can read.
    let log: Vec<Value> = greenroom
        .log()
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| {
            line["message"]
                .as_str()
                .unwrap_or_default()
                .contains("circuit breaker")
        })
        .collect();
    let steps: Vec<_> = log
        .iter()
        .map(|line| (&line["from"], &line["to"]))
        .collect();
    let expected = [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ];
    assert_eq!(steps.len(), expected.len(), "{log:?}");
    for ((from, to), step) in expected.into_iter().zip(steps) {
        assert_eq!(step, (&json!(from), &json!(to)));
        let line = format!("greenroom_service_breaker_changes_total{{to=\"{to}\"}} 1\n");
        assert!(scraped.contains(&line), "{line}{scraped}");
    }
    wait_for("the control plane's word of it", || {
        let told = told.lock().unwrap();
        let states = told
            .iter()
            .filter(|told| told["event"] == "service_circuit");
        let states: Vec<_> = states.map(|told| told["state"].clone()).collect();
        let last = states.last()?;
        // Of two at once it hears the last.
        (*last == "closed" && states[0] == "open").then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_a_killed_one_left_is_removed_at_the_next_start() {
    let folders = Folders::new();
    let mut greenroom = start_shell(&folders, |options| options).await;
    let neighbour = start_shell(&folders, |options| options).await;
    let sleep = |greenroom: &TestGreenroom| {
        let body = json!({"prompt": "echo secret > left; sleep 3600", "timeout": 600_000});
        request(greenroom.api_port, Sent::new("POST", "/execute", &body))
    };
    let both_run = wait_for("both runs", || {
        let runs = run_folders(&folders);
        let has_begun = |run: &std::path::PathBuf| run.join("work/left").exists();
        (runs.len() == 2 && runs.iter().all(has_begun)).then_some(runs)
    });
    let neighbour_s = sleep(&neighbour);
    let killed = async {
        let runs = tokio::select! {
            answer = sleep(&greenroom) => panic!("{answer:?}"),
            runs = both_run => runs,
        };
        greenroom.kill().await;
        let greenroom = greenroom.restart().await;
        let left = wait_for("the dead one's folder gone", || {
            let left = run_folders(&folders);
            (left.len() == 1).then_some(left)
        })
        .await;
        assert!(runs.contains(&left[0]) && left[0].join("work/left").exists());
        wait_for("its lock gone", || {
            let shared = left[0].ancestors().nth(3).unwrap();
            let names = fs::read_dir(shared).unwrap().count();
            // A folder and a lock of each of the living.
            (names == 4).then_some(())
        })
        .await;
        greenroom
    };
    tokio::select! {
        answer = neighbour_s => panic!("{answer:?}"),
        _ = killed => {}
    }
}

/// An address of this machine's that is not loopback.
fn own_address() -> Option<std::net::IpAddr> {
    // Nothing is sent; the kernel says from where it would be.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test]
async fn a_caller_from_elsewhere_may_ask_a_hundred_times_a_minute() {
    let Some(address) = own_address() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| {
        options
            .env("BIND", "0.0.0.0")
            .env("CLAUDE_SERVICE_SECRET", "s3cret-of-theirs")
    })
    .await;
    let port = greenroom.api_port;
    let ask = async |from: std::net::IpAddr, path: &str| {
        // One that fails on the way in costs nothing but its count.
        let sent = Sent::new("POST", path, &json!({"prompt": "true"}));
        request_at((from, port).into(), sent).await.unwrap()
    };
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        ask(address, "/execute").await.error(401, "unauthenticated");
    }
    let refused = ask(address, "/execute").await;
    if begun.elapsed() < Duration::from_millis(500) {
        let wait: u64 = refused.headers["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
        refused.error(429, "rate_limited");
    } else {
        // A slow machine: a call came back every 600 ms.
        let calls = async || ask(address, "/execute").await.status;
        let mut statuses = vec![refused.status];
        for _ in 0..50 {
            statuses.push(calls().await);
        }
        assert!(statuses.contains(&429), "{statuses:?}");
    }
    // Health is not counted, and this machine itself may ask as often as it likes.
    let health = Sent::new("GET", "/health", &Value::Null);
    let health = request_at((address, port).into(), health).await.unwrap();
    assert_eq!(health.status, 200);
    for _ in 0..110 {
        let answer = ask([127, 0, 0, 1].into(), "/execute").await;
        answer.error(401, "unauthenticated");
    }
}

#[tokio::test]
async fn in_place_it_is_a_turn_of_the_thread() {
    let api = StandIn::start(json!({"rules": [
        rule("write a robots file", &[
            writes("public/robots.txt", "User-agent: *\n"),
            runs("git status --short; git commit -am mine; ls ../.."),
        ]),
        rule("import", &[writes("list.txt", "one\n")]),
        rule("go on for ever", &[writes("begun.txt", "x\n"), writes("more.txt", "x\n")]),
    ]}))
    .await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).api(&api).env("CLIENT_ID", "acme");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let worktree = folders.worktree(&alice);
    fs::write(worktree.join("by-hand.txt"), "mine\n").unwrap();

    let answer = execute(
        &greenroom,
        json!({"prompt": "Please write a robots file", "args": VECTOR, "cwd": worktree, "timeout": 300_000}),
    )
    .await
    .ok();
    let output: Value = serde_json::from_str(answer["result"]["output"].as_str().unwrap()).unwrap();
    assert_eq!(output["is_error"], false, "{output}");
    assert_eq!(git(&worktree, &["status", "--short"]), "");
    let log = git(
        &worktree,
        &[
            "log",
            "-2",
            "--format=%s|%(trailers:key=Kind,valueonly)",
            "--name-only",
        ],
    );
    assert!(
        log.starts_with("Please write a robots file|service"),
        "{log}"
    );
    assert!(
        log.contains("public/robots.txt") && log.contains("by-hand.txt"),
        "{log}"
    );
    let history = greenroom
        .get(&format!("{}/history", alice.path()))
        .await
        .ok();
    let turn = &history["result"]["turns"][0];
    assert_eq!(
        (&turn["kind"], &turn["status"]),
        (&json!("service"), &json!("completed")),
        "{turn}"
    );
    assert!(turn["usage"]["inputTokens"].as_u64().unwrap() > 0, "{turn}");
    assert_eq!(turn["commit"]["files"][0]["path"], "public/robots.txt");
    greenroom
        .api("POST", &format!("{}/undo", alice.path()), json!({}))
        .await
        .ok();
    assert!(!worktree.join("public/robots.txt").exists());
    assert!(worktree.join("by-hand.txt").exists());

    // One that fails has cost something, and what it wrote is kept.
    let mut args = VECTOR.map(str::to_owned).to_vec();
    args.extend(["--max-turns".to_owned(), "1".to_owned()]);
    execute(
        &greenroom,
        json!({"prompt": "go on for ever", "args": args, "cwd": worktree, "timeout": 300_000}),
    )
    .await
    .error(502, "agent_failed");
    let history = greenroom
        .get(&format!("{}/history", alice.path()))
        .await
        .ok();
    let turn = &history["result"]["turns"][0];
    assert_eq!(
        (&turn["kind"], &turn["status"]),
        (&json!("service"), &json!("failed")),
        "{turn}"
    );
    assert!(turn["usage"]["inputTokens"].as_u64().unwrap() > 0, "{turn}");
    assert!(turn["usage"]["costUsd"].as_f64().unwrap() > 0.0, "{turn}");

    // Elsewhere in the workspace: no commit, no lease.
    let imports = folders.workspace().join("acme/files/today");
    fs::create_dir_all(&imports).unwrap();
    execute(
        &greenroom,
        json!({"prompt": "import it", "args": VECTOR, "cwd": "acme/files/today", "timeout": 300_000}),
    )
    .await
    .ok();
    assert_eq!(
        fs::read_to_string(imports.join("list.txt")).unwrap(),
        "one\n"
    );

    let user = folders.user(&alice);
    for cwd in [
        Path::new("/etc"),
        Path::new("../../etc"),
        Path::new("acme/nobody"),
        &folders.workspace(),
        &user,
        &user.join("project"),
        &user.join("project/.git"),
        &user.join(".greenroom"),
        &user.join(".claude"),
        &user.join("threads"),
    ] {
        let refused = execute(&greenroom, json!({"prompt": "import", "cwd": cwd})).await;
        refused.error(400, "invalid_request");
    }
    fs::create_dir_all(folders.workspace().join("globex/bob/files")).unwrap();
    execute(
        &greenroom,
        json!({"prompt": "import", "cwd": "globex/bob/files"}),
    )
    .await
    .error(403, "not_this_tenant");
    fs::create_dir_all(user.join("threads/none")).unwrap();
    execute(
        &greenroom,
        json!({"prompt": "import", "cwd": user.join("threads/none")}),
    )
    .await
    .error(404, "not_found");
}

#[tokio::test]
async fn a_kill_in_place_keeps_the_edits_and_no_turn_runs_twice() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders)
        .rehearsal()
        .env("CLAUDE_BIN", shell_cli(&folders))
        .env("MAX_WARM_AGENTS", "0");
    let mut greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let worktree = folders.worktree(&alice);
    let body =
        json!({"prompt": "echo one > new.txt; sleep 3600", "cwd": worktree, "timeout": 600_000});
    let call = request(greenroom.api_port, Sent::new("POST", "/execute", &body));
    let written = wait_for("the edit", || {
        worktree.join("new.txt").exists().then_some(())
    });
    let (cut, ()) = tokio::join!(call, async {
        written.await;
        greenroom.kill().await;
    });
    assert!(cut.is_err(), "{cut:?}");
    let greenroom = greenroom.restart().await;
    greenroom.init(&alice, json!({})).await.ok();
    let history = greenroom
        .get(&format!("{}/history", alice.path()))
        .await
        .ok();
    let turns = history["result"]["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 1, "{history}");
    assert_eq!(
        (&turns[0]["kind"], &turns[0]["status"]),
        (&json!("service"), &json!("recovered"))
    );
    assert!(git(&worktree, &["show", "--stat"]).contains("new.txt"));
    assert_eq!(git(&worktree, &["status", "--short"]), "");
}

#[tokio::test]
async fn the_client_of_the_library_speaks_to_the_real_service() {
    use greenroom::client::{
        ClientError, ClientSettings, Executor, Guarded, HttpExecutor, Request, WithFallback,
    };

    let folders = Folders::new();
    let greenroom = start_shell(&folders, |options| {
        options
            .env("CLAUDE_SERVICE_SECRET", "new-s3cret")
            .env("CLAUDE_SERVICE_SECRET_PREVIOUS", "old-s3cret")
            .env("BIND", "127.0.0.1")
    })
    .await;
    let url = format!("http://127.0.0.1:{}", greenroom.service_port);
    let client = |secret: &str| {
        let vars = [
            ("CLAUDE_SERVICE_URL", url.as_str()),
            ("CLAUDE_SERVICE_SECRET", secret),
            ("CLAUDE_SERVICE_TIMEOUT", "30000"),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        HttpExecutor::new(ClientSettings::from_env(vars).unwrap()).unwrap()
    };
    execute(&greenroom, json!({"prompt": "echo hello"}))
        .await
        .error(401, "unauthenticated");
    // Both secrets, and calls within one millisecond.
    for secret in ["new-s3cret", "old-s3cret"] {
        let client = client(secret);
        let request = Request {
            args: VECTOR.map(str::to_owned).to_vec(),
            ..Request::new("echo hello")
        };
        let answers = join_all((0..20).map(|_| client.execute(&request))).await;
        for answer in answers {
            let answer = answer.unwrap();
            assert_eq!(answer.output, "hello\n");
            assert!(answer.execution_time >= answer.duration);
        }
    }
    let good = client("new-s3cret");
    match client("wrong").execute(&Request::new("true")).await {
        Err(ClientError::Refused { status, code, .. }) => {
            assert_eq!((status, code.as_str()), (401, "unauthenticated"));
        }
        other => panic!("{other:?}"),
    }
    match good
        .execute(&Request::new("echo so >&2; exit 4"))
        .await
        .unwrap_err()
    {
        error @ ClientError::Refused { .. } => {
            assert!(error.is_of_the_service());
            let ClientError::Refused {
                exit_code,
                stderr,
                request_id,
                ..
            } = error
            else {
                unreachable!()
            };
            assert_eq!((exit_code, stderr.as_deref()), (Some(4), Some("so")));
            assert!(request_id.is_some());
        }
        other => panic!("{other:?}"),
    }
    let late = Request {
        timeout: Some(Duration::from_millis(200)),
        ..Request::new("sleep 60")
    };
    match good.execute(&late).await {
        Err(ClientError::Refused { status: 504, .. }) => {}
        other => panic!("{other:?}"),
    }
    // A service that is gone: the other one answers, and soon it alone is asked.
    let nobody = ClientSettings {
        url: "http://127.0.0.1:1".parse().unwrap(),
        ..ClientSettings::from_env([]).unwrap()
    };
    let both = WithFallback {
        first: Guarded::new(HttpExecutor::new(nobody).unwrap()),
        second: good,
    };
    for _ in 0..12 {
        let answer = both.execute(&Request::new("echo fallback")).await.unwrap();
        assert_eq!(answer.output, "fallback\n");
    }
    assert_eq!(both.first.breaker().as_str(), "open");
}
