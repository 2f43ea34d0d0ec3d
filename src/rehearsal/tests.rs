//! The rehearsal over its socket, as a plain client of the API sees it.

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it should have happened by now")
}

struct Room {
    tasks: Tasks,
    rehearsal: Rehearsal,
    client: reqwest::Client,
}

impl Room {
    async fn start(script: Value) -> Self {
        let tasks = Tasks::new();
        let script = serde_json::from_value(script).unwrap();
        let rehearsal = Rehearsal::start(script, &tasks).await.unwrap();
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()
            .unwrap();
        Self {
            tasks,
            rehearsal,
            client,
        }
    }

    fn request(&self, path: &str, body: Value) -> reqwest::RequestBuilder {
        let url = format!("{}{path}", self.rehearsal.url());
        self.client
            .post(url)
            .header("x-api-key", "any")
            .body(body.to_string())
    }

    async fn ask(&self, text: &str) -> reqwest::Response {
        let message = json!({"role": "user", "content": text});
        let body = json!({"model": "m", "stream": true, "messages": [message]});
        soon(self.request("/v1/messages?beta=true", body).send())
            .await
            .unwrap()
    }

    /// The record of the last request, once it has ended.
    async fn ended(&self) -> Ended {
        soon(async {
            loop {
                if let Some(ended) = self.rehearsal.requests().last().unwrap().ended {
                    return ended;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn body_of(response: reqwest::Response) -> Value {
    serde_json::from_str(&soon(response.text()).await.unwrap()).unwrap()
}

fn one_step(step: Value) -> Value {
    json!({"rules": [{"match": "go", "steps": [step]}]})
}

#[tokio::test]
async fn it_answers_like_the_api() {
    let room = Room::start(json!({"wrong_keys": ["bad"]})).await;
    let streamed = room.ask("help").await;
    assert_eq!(streamed.status(), 200);
    assert!(
        streamed.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/event-stream")
    );
    assert!(
        streamed.headers()["request-id"]
            .to_str()
            .unwrap()
            .starts_with("req_")
    );
    let text = soon(streamed.text()).await.unwrap();
    let names: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    assert_eq!(names[..3], ["message_start", "ping", "content_block_start"]);
    assert!(names.len() > 20, "several small chunks");
    assert_eq!(
        names[names.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    assert_eq!(room.ended().await, Ended::Answered);

    let message = json!({"model": "m", "messages": [{"role": "user", "content": "help"}]});
    let whole = soon(room.request("/v1/messages", message.clone()).send())
        .await
        .unwrap();
    let whole = body_of(whole).await;
    assert_eq!(whole["type"], "message");
    assert_eq!(whole["stop_reason"], "end_turn");
    let count = room.request("/v1/messages/count_tokens", message.clone());
    assert!(body_of(soon(count.send()).await.unwrap()).await["input_tokens"].as_u64() > Some(0));
    let models = room
        .client
        .get(format!("{}/v1/models", room.rehearsal.url()));
    let models = body_of(soon(models.bearer_auth("any").send()).await.unwrap()).await;
    assert!(
        models["data"][0]["display_name"]
            .as_str()
            .unwrap()
            .contains("no model behind it")
    );

    let url = format!("{}/v1/messages", room.rehearsal.url());
    for wrong in [
        room.client.post(&url),
        room.client.post(&url).bearer_auth("bad"),
        room.client.post(&url).header("x-api-key", "bad"),
    ] {
        let refused = soon(wrong.body(message.to_string()).send()).await.unwrap();
        assert_eq!(refused.status(), 401);
        assert_eq!(
            body_of(refused).await["error"]["type"],
            "authentication_error"
        );
    }
    let empty = soon(room.request("/v1/messages", json!({})).send())
        .await
        .unwrap();
    assert_eq!(empty.status(), 400);
    assert!(!format!("{:?}", room.rehearsal.requests()).contains("\"bad\""));
}

#[tokio::test]
async fn statuses_are_acted_out_so_many_times() {
    for status in [400_u16, 401, 403, 404, 413, 429, 500, 529] {
        let act = json!({"status": {"status": status, "retry_after": 3}});
        let room = Room::start(one_step(
            json!({"act": act, "times": 2, "text": "At last."}),
        ))
        .await;
        for _ in 0..2 {
            let answer = room.ask("GO on").await;
            assert_eq!(answer.status(), status);
            assert_eq!(answer.headers()["retry-after"], "3");
            assert_eq!(body_of(answer).await["type"], "error");
        }
        let text = soon(room.ask("go").await.text()).await.unwrap();
        assert!(text.contains("last.") && text.contains("message_stop"));
    }
}

#[tokio::test]
async fn broken_answers_are_acted_out() {
    let long = "one two three four five six seven eight";
    let answer = async |act: Value| {
        let room = Room::start(one_step(json!({"act": act, "text": long}))).await;
        let response = room.ask("go").await;
        (response.status(), soon(response.text()).await.ok())
    };
    let (_, cut) = answer(json!("cut")).await;
    assert_eq!(cut, None, "a cut stream is no good answer");
    let (status, page) = answer(json!("html")).await;
    assert!(status == 200 && page.unwrap().starts_with("<!doctype"));
    let (_, broken) = answer(json!("broken_sse")).await;
    assert!(broken.unwrap().trim_end().ends_with("content_bl"));
    let (_, error) = answer(json!({"error_event": {"kind": "overloaded_error"}})).await;
    assert!(error.unwrap().contains("event: error\ndata: {\"error\""));
    let (_, empty) = answer(json!("empty")).await;
    assert!(!empty.unwrap().contains("content_block"));
    let (_, limit) = answer(json!("max_tokens")).await;
    assert!(limit.unwrap().contains("\"stop_reason\":\"max_tokens\""));
    let (_, refusal) = answer(json!("refusal")).await;
    assert!(refusal.unwrap().contains("\"stop_reason\":\"refusal\""));
}

#[tokio::test]
async fn stalls_last_until_the_client_goes_away() {
    for act in ["only_pings", "stall_midway"] {
        let room = Room::start(one_step(json!({"act": act, "text": "a b c d e f"}))).await;
        let mut response = room.ask("go").await;
        let mut text = String::new();
        let pings = |text: &str| text.matches("event: ping").count();
        // Two pings of the stall's own, or whatever comes before the silence.
        while pings(&text) < if act == "only_pings" { 2 } else { 1 } {
            text.push_str(&String::from_utf8_lossy(
                &soon(response.chunk()).await.unwrap().unwrap(),
            ));
        }
        assert!(!text.contains("message_stop"));
        drop(response);
        assert_eq!(room.ended().await, Ended::Abandoned);
    }
    let room = Room::start(one_step(json!({"act": "no_bytes"}))).await;
    let message = json!({"role": "user", "content": "go"});
    let request = room.request(
        "/v1/messages",
        json!({"stream": true, "messages": [message]}),
    );
    let waiting = room
        .tasks
        .spawn("waiting", async move { drop(request.send().await) });
    soon(async {
        while room.rehearsal.requests().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    waiting.abort();
    assert_eq!(room.ended().await, Ended::Abandoned);
}

#[tokio::test]
async fn a_stalled_answer_does_not_hold_up_the_end() {
    let room = Room::start(one_step(json!({"act": "stall_midway", "text": "a b c d"}))).await;
    let response = room.ask("go").await;
    assert!(room.tasks.stop(PATIENCE).await);
    drop(response);
}

#[tokio::test]
async fn the_record_is_bounded_and_names_no_secret() {
    let room = Room::start(json!({})).await;
    let message = json!({"role": "user", "content": "x".repeat(9000)});
    let body = json!({"messages": [message]});
    for _ in 0..MAX_RECORDED + 5 {
        let request = room
            .request("/v1/nothing", body.clone())
            .header("x-api-key", "canary");
        soon(request.send()).await.unwrap();
    }
    let records = room.rehearsal.requests();
    assert_eq!(records.len(), MAX_RECORDED);
    assert_eq!(records[0].instruction.len(), MAX_INSTRUCTION);
    assert!(records[0].headers.contains(&"x-api-key".to_owned()));
    assert!(!format!("{records:?}").contains("canary"));
}

#[test]
fn a_script_file_that_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("script.json");
    assert!(matches!(
        Script::load(&path),
        Err(RehearsalError::ReadScript { .. })
    ));
    std::fs::write(&path, r#"{"rules":[{"match":"x","stepz":[]}]}"#).unwrap();
    let error = Script::load(&path).unwrap_err();
    assert!(error.to_string().contains("script.json"), "{error}");
    std::fs::write(&path, r#"{"rules":[{"match":"x","steps":[{"text":"y"}]}]}"#).unwrap();
    assert_eq!(Script::load(&path).unwrap().rules.len(), 1);
}
