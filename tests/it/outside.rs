//! Whom the container tells of itself: the control plane, and ECS. Seen by stand-ins of both.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri},
    response::{IntoResponse as _, Response},
};
use greenroom::task::Tasks;
use hmac::{Hmac, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::support::{
    Folders, Options, SITE, Sent, StandIn, TestGreenroom, rule, wait_for, who, writes,
};

const SECRET: &str = "s3cret-of-the-service";
const TOKEN: &str = "token-of-the-control-plane";

#[derive(Debug, Clone)]
struct Heard {
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Heard {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// Hears everything; answers by a closure, which gets the request's number too.
struct Ear {
    heard: Arc<Mutex<Vec<Heard>>>,
    port: u16,
    tasks: Tasks,
}

type Answerer = Arc<dyn Fn(usize, &Heard) -> Response + Send + Sync>;

impl Ear {
    async fn start(answer: impl Fn(usize, &Heard) -> Response + Send + Sync + 'static) -> Self {
        async fn hear(
            State((heard, answer)): State<(Arc<Mutex<Vec<Heard>>>, Answerer)>,
            method: Method,
            uri: Uri,
            headers: HeaderMap,
            body: Bytes,
        ) -> Response {
            let one = Heard {
                method,
                path: uri.path().to_owned(),
                headers,
                body,
            };
            let number = {
                let mut heard = heard.lock().unwrap();
                heard.push(one.clone());
                heard.len()
            };
            answer(number, &one)
        }
        let heard = Arc::new(Mutex::new(Vec::new()));
        let answer: Answerer = Arc::new(answer);
        let router = Router::new()
            .fallback(hear)
            .with_state((heard.clone(), answer));
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let tasks = Tasks::new();
        let token = tasks.token().clone();
        tasks.spawn("ear", async move {
            tokio::select! {
                served = async { axum::serve(listener, router).await } => served.unwrap(),
                () = token.cancelled() => {}
            }
        });
        Self { heard, port, tasks }
    }

    fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

fn is_signed(heard: &Heard) -> bool {
    let header = |name: &str| heard.headers[name].to_str().unwrap().to_owned();
    let (at, nonce) = (header("x-claude-timestamp"), header("x-claude-nonce"));
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    mac.update(format!("{at}:{nonce}:").as_bytes());
    mac.update(&heard.body);
    hex::encode(mac.finalize().into_bytes()) == header("x-claude-signature")
}

#[tokio::test]
async fn the_control_plane_hears_of_a_whole_life() {
    // It fails at first, and once in the middle.
    let ear = Ear::start(|number, _| match number {
        1 | 4 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    })
    .await;
    let api = StandIn::start(json!({"rules": [
        rule("a page", &[writes("src/pages/new.astro", "<h1>New</h1>\n")]),
    ]}))
    .await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders)
        .api(&api)
        .env("CONTROL_PLANE_URL", ear.url("/hook"))
        .env("CLAUDE_SERVICE_SECRET", SECRET)
        .env("GREENROOM_API_TOKEN", TOKEN)
        .env("BIND", "127.0.0.1")
        .env("AUTO_SHUTDOWN_MINUTES", "0.05");
    let mut greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let ask = |path: &str, fields: Value| {
        Sent::new("POST", path, &alice.body(fields))
            .header("authorization", &format!("Bearer {TOKEN}"))
    };
    let init = ask("/api/init", json!({"repoUrl": site}));
    greenroom.send(init).await.ok();
    let turn = ask("/api/execute", json!({"instruction": "Make a page"}));
    let turn = greenroom.send(turn).await.ok()["result"].clone();
    assert_eq!(turn["status"], "completed", "{turn}");
    let exit = wait_for("it is idle and ends", || greenroom.exited()).await;
    assert_eq!(exit.code(), Some(0));

    let heard = ear.heard();
    assert!(
        heard
            .iter()
            .all(|one| one.path == "/hook" && is_signed(one))
    );
    let nonces: std::collections::BTreeSet<_> = heard
        .iter()
        .map(|one| one.headers["x-claude-nonce"].to_str().unwrap())
        .collect();
    assert_eq!(nonces.len(), heard.len(), "a signature is good once");
    // What was told twice has one id.
    let mut news: Vec<Value> = heard.iter().map(Heard::json).collect();
    news.dedup_by(|one, other| one["id"] == other["id"]);
    assert_eq!(news.len() + 2, heard.len());
    let events: Vec<_> = news
        .iter()
        .map(|one| one["event"].as_str().unwrap())
        .collect();
    assert_eq!(events[0], "ready");
    assert_eq!(events[events.len() - 2..], ["stopping", "stopped"]);
    let ended: Vec<_> = news
        .iter()
        .filter(|one| one["event"] == "turn_ended")
        .collect();
    assert_eq!(ended.len(), 1, "{events:?}");
    let ended = ended[0];
    assert_eq!(
        (&ended["clientId"], &ended["userId"], &ended["threadId"]),
        (&json!("acme"), &json!("alice"), &json!("main")),
        "{ended}"
    );
    assert_eq!(ended["turnId"], turn["turnId"]);
    assert_eq!(ended["status"], "completed");
    assert_eq!(ended["commit"], turn["commit"]["id"]);
    // It may be about to stop more than once; it is told each time.
    let mut going = news.iter().filter(|one| one["event"] == "going_idle");
    assert!(going.all(|one| one["stopsAt"].is_string()), "{news:?}");
    assert!(events.contains(&"going_idle"), "{events:?}");
    let [.., stopping, stopped] = news.as_slice() else {
        unreachable!("there are more")
    };
    assert_eq!(stopping["reason"], "idle-timeout");
    assert_eq!(stopped["reason"], "idle-timeout");
    let said = serde_json::to_string(&news).unwrap();
    assert!(!said.contains(SECRET) && !said.contains(TOKEN));
}

#[tokio::test]
async fn a_control_plane_that_hangs_holds_nothing_up() {
    // It takes calls and never answers.
    let deaf = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/hook", deaf.local_addr().unwrap());
    let folders = Folders::new();
    let options = Options::new(&folders)
        .rehearsal()
        .env("CONTROL_PLANE_URL", url);
    let mut greenroom = TestGreenroom::start(options).await;
    greenroom.get("/health").await.status_is(200);
    assert_eq!(greenroom.stop().await.code(), Some(0));
    let log = greenroom.log().join("\n");
    assert!(log.contains("the control plane was not told all"), "{log}");
}

#[tokio::test]
async fn a_control_plane_that_redirects_leads_nowhere() {
    let elsewhere = Ear::start(|_, _| StatusCode::NO_CONTENT.into_response()).await;
    let target = elsewhere.url("/taken");
    let ear = Ear::start(move |number, _| {
        // The kinds that would send the body again, and one that would not.
        let kinds = [
            StatusCode::TEMPORARY_REDIRECT,
            StatusCode::PERMANENT_REDIRECT,
            StatusCode::FOUND,
        ];
        let location = [("location", target.clone())];
        (kinds[number % kinds.len()], location).into_response()
    })
    .await;
    let folders = Folders::new();
    let options = Options::new(&folders)
        .rehearsal()
        .env("CONTROL_PLANE_URL", ear.url("/hook"))
        .env("CLAUDE_SERVICE_SECRET", SECRET);
    let mut greenroom = TestGreenroom::start(options).await;
    assert_eq!(greenroom.stop().await.code(), Some(0));
    let told: Vec<_> = ear
        .heard()
        .iter()
        .map(|heard| heard.json()["event"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(told, ["ready", "stopping", "stopped"], "each is told once");
    assert!(elsewhere.heard().is_empty(), "{:?}", elsewhere.heard());
    let log = greenroom.log().join("\n");
    assert!(
        log.contains("the control plane could not be told") && log.contains("it answered 307"),
        "{log}"
    );
}

#[tokio::test]
async fn a_task_of_ecs_is_named_and_protected_while_a_turn_runs() {
    let ear = Ear::start(|_, heard| match heard.path.as_str() {
        "/v4/abc/task" => axum::Json(json!({
            "Cluster": "sites", "TaskARN": "arn:aws:ecs:eu-west-1:1:task/sites/abc",
            "Family": "greenroom", "Revision": "7", "DesiredStatus": "RUNNING",
            "AvailabilityZone": "eu-west-1a", "LaunchType": "FARGATE", "Containers": [],
        }))
        .into_response(),
        "/api/task-protection/v1/state" => {
            let on = heard.json()["ProtectionEnabled"].clone();
            axum::Json(json!({"protection": {"ProtectionEnabled": on, "TaskArn": "arn"}}))
                .into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    })
    .await;
    let script = json!({"rules": [{"match": "slowly", "steps": [{"delay_ms": 60_000}]}]});
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders)
        .api(&api)
        .env("ECS_CONTAINER_METADATA_URI_V4", ear.url("/v4/abc"))
        .env("ECS_AGENT_URI", ear.url("/api"))
        .env("DRAIN_SECONDS", "1");
    let mut greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let named = crate::support::wait_for_async("the task is named", async || {
        let health = greenroom.get("/health").await.body;
        health["ecs"].is_object().then_some(health)
    })
    .await;
    assert_eq!(
        named["ecs"],
        json!({
            "cluster": "sites", "taskArn": "arn:aws:ecs:eu-west-1:1:task/sites/abc",
            "family": "greenroom", "revision": "7",
            "availabilityZone": "eu-west-1a", "launchType": "FARGATE",
        })
    );
    let wishes = || -> Vec<Value> {
        let mut heard = ear.heard();
        heard.retain(|one| one.method == Method::PUT);
        heard.iter().map(Heard::json).collect()
    };
    assert_eq!(wishes(), Vec::<Value>::new(), "nothing runs yet");
    greenroom.begin(&alice, "slowly").await;
    wait_for("it is protected", || (wishes().len() == 1).then_some(())).await;
    assert_eq!(
        wishes()[0],
        json!({"ProtectionEnabled": true, "ExpiresInMinutes": 60})
    );
    // It is given back by the end at the latest.
    greenroom.stop().await;
    assert_eq!(wishes()[1..], [json!({"ProtectionEnabled": false})]);
}

#[tokio::test]
async fn a_task_of_no_service_is_no_error() {
    let failure = json!({"failure": {"Arn": "arn", "Reason": "TASK_NOT_VALID", "Detail": "x"}});
    nothing_is_protected(failure, "this task is of no service").await;
    let error =
        json!({"requestID": "1", "error": {"Code": "AccessDeniedException", "Message": "x"}});
    nothing_is_protected(error, "give its role ecs:UpdateTaskProtection").await;
}

/// ECS answers so: it is told in a line of the log, asked no more, and turns go on.
async fn nothing_is_protected(answer: Value, told: &str) {
    let ear = Ear::start(move |_, _| {
        (StatusCode::BAD_REQUEST, axum::Json(answer.clone())).into_response()
    })
    .await;
    let script = json!({"rules": [{"match": "slowly", "steps": [{"delay_ms": 3000}]}]});
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders)
        .api(&api)
        .env("ECS_AGENT_URI", ear.url("/api"));
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let turn = greenroom.execute(&alice, "slowly").await.ok();
    assert_eq!(turn["status"], "completed", "{turn}");
    wait_for("it is understood", || {
        let log = greenroom.log().join("\n");
        log.contains(told).then_some(())
    })
    .await;
    assert_eq!(ear.heard().len(), 1, "asked once");
    let is_bad =
        |line: &&String| line.contains("greenroom::ecs") && !line.contains("\"level\":\"info\"");
    assert_eq!(greenroom.log().iter().find(is_bad), None);
}
