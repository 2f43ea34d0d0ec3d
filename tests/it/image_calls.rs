//! The money of images, and the ends of their calls: by a budget, by somebody who cancels, by a kill.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use serde_json::{Value, json};

use crate::{
    images::Stage,
    support::{Events, Sent, files_below, holds, request, stream, wait_for, wait_for_async, who},
};

impl Stage {
    fn path(&self, what: &str) -> String {
        format!("{}/{what}", self.alice.path())
    }

    /// A call for an image, with its alt text so that nobody is asked for one.
    fn call(&self, prompt: &str) -> Sent {
        let body = json!({"prompt": prompt, "alt": "A shoe"});
        Sent::new("POST", &self.path("images"), &body)
    }

    async fn stream(&self, call: Sent) -> Events {
        let call = call.header("accept", "text/event-stream");
        stream(self.greenroom.api_port, call).await
    }

    /// Of all that was spent.
    async fn totals(&self) -> Value {
        self.greenroom.get("/api/usage").await.ok()["result"]["totals"].take()
    }

    async fn turns(&self) -> usize {
        let history = self.greenroom.get(&self.path("history")).await.ok();
        history["result"]["turns"].as_array().unwrap().len()
    }

    /// How the predictions stand.
    fn statuses(&self) -> Vec<&'static str> {
        let all = self.replicate.predictions();
        all.into_iter().map(|(_, status)| status).collect()
    }

    async fn wait_for_status(&self, at: usize, status: &str) {
        wait_for(status, || {
            (self.statuses().get(at).copied() == Some(status)).then_some(())
        })
        .await;
    }

    /// Sends a call, kills greenroom once `is_time`, and starts it anew.
    async fn killed(mut self, call: Sent, is_time: impl Fn(&Self) -> bool) -> Self {
        {
            let going = request(self.greenroom.api_port, call);
            tokio::pin!(going);
            let time = wait_for("it is time", || is_time(&self).then_some(()));
            tokio::select! {
                answer = &mut going => panic!("it is over: {answer:?}"),
                () = time => {}
            }
        }
        self.greenroom.kill().await;
        self.replicate.hold(false);
        self.replicate.stall_creations(false);
        Self {
            greenroom: self.greenroom.restart().await,
            ..self
        }
    }
}

fn is_near(value: &Value, expected: f64) -> bool {
    value
        .as_f64()
        .is_some_and(|value| (value - expected).abs() < 1e-9)
}

#[tokio::test]
async fn what_images_cost_is_in_the_ledger_once() {
    let stage = Stage::new(&[]).await;
    let keyed = || stage.call("A red shoe").header("idempotency-key", "shoe");
    let turn = stage.greenroom.send(keyed()).await.ok()["result"].take();
    assert!(is_near(&turn["usage"]["costUsd"], 0.0025), "{turn}");
    let again = stage.greenroom.send(keyed()).await.ok();
    assert_eq!(again["result"]["turnId"], turn["turnId"]);
    let body = json!({"prompt": "A shoe", "alt": "x", "model": "acme/official"});
    let unpriced = stage.make(body).await.ok();
    assert_eq!(
        unpriced["result"]["report"]["costUsd"],
        Value::Null,
        "{unpriced}"
    );

    let usage = stage.greenroom.get("/api/usage?by=model").await.ok()["result"].take();
    let row = |key: &str| {
        let rows = usage["rows"].as_array().unwrap();
        rows.iter().find(|row| row["key"] == key).unwrap().clone()
    };
    let painter = row("acme/painter");
    assert_eq!(
        (&painter["requests"], &painter["predictions"]),
        (&json!(1), &json!(1))
    );
    assert!(is_near(&painter["costUsd"], 0.0025), "{usage}");
    let unknown = row("acme/official");
    assert_eq!(
        (&unknown["uncounted"], &unknown["costUsd"]),
        (&json!(1), &json!(0.0))
    );
    assert!(
        is_near(&usage["totals"]["predictionCostUsd"], 0.0025),
        "{usage}"
    );
    let usage = stage.greenroom.get("/api/usage?by=thread").await.ok()["result"].take();
    assert_eq!(usage["rows"][0]["key"], "acme/alice/main");
    // One of which nobody knows whether it began: the same call finds that it did not.
    stage.replicate.break_creations(1);
    let keyed = || stage.call("A boot").header("idempotency-key", "boot");
    let unclear = stage.greenroom.send(keyed()).await;
    unclear.error(502, "image_failed");
    let ledger = stage
        .folders
        .workspace()
        .join("acme/alice/.greenroom/usage");
    let is_refused = || {
        let rows = files_below(&ledger);
        rows.iter()
            .any(|file| holds(file, "\"status\":\"refused\""))
    };
    assert!(!is_refused(), "it may run, and counts until somebody knows");
    stage.greenroom.send(keyed()).await.ok();
    assert_eq!(stage.statuses().len(), 3);
    assert!(is_refused());
    // By whose prediction it was, in the tenant's own ledger.
    let id = turn["report"]["predictions"][0].as_str().unwrap();
    assert!(files_below(&ledger).iter().any(|file| holds(file, id)));
    let metrics = stage.greenroom.get("/metrics").await.text;
    assert!(
        metrics.contains("greenroom_predictions_total 3\n"),
        "{metrics}"
    );
    // Nothing is left to be looked after but what the key is for.
    let notes = files_below(&stage.folders.workspace().join(".greenroom/images"));
    let notes = notes.iter().filter(|file| file.ends_with("note.json"));
    assert_eq!(notes.count(), 2);
}

#[tokio::test]
async fn images_use_a_budget_up_and_their_turn_has_what_is_left_of_its_own() {
    let stage = Stage::with(&[], |options| {
        options
            .env("BUDGET_CLIENT_DAY_USD", "0.0055")
            .env("BUDGET_TURN_USD", "0.002")
    })
    .await;
    // Made, and nothing is left for placing it: the turn says so, and has the image.
    let wish = json!({"prompt": "a shoe", "alt": "x", "instruction": "Show it below the heading"});
    let asked = stage.api.requests().len();
    let answer = stage.make(wish).await;
    let turn = answer.body["result"].clone();
    let why = answer.error(429, "budget_exceeded");
    assert!(why.contains("one turn"), "{why}");
    let files = turn["commit"]["files"].as_array();
    assert_eq!(files.map(Vec::len), Some(1), "{turn}");
    assert_eq!(stage.api.requests().len(), asked, "nothing went up for it");

    let events = stage.stream(stage.call("A red shoe")).await.all().await;
    let warned: Vec<&Value> = events
        .iter()
        .filter(|event| event.name == "budget.warning")
        .map(|event| &event.data)
        .collect();
    assert_eq!(warned.len(), 2, "of the day and of the turn: {events:?}");
    assert!(is_near(&warned[0]["spentUsd"], 0.005), "{warned:?}");
    assert_eq!(
        events.last().unwrap().name,
        "images.completed",
        "{events:?}"
    );
    // Now it is used up for everybody.
    stage.make(json!({"prompt": "x", "alt": "x"})).await.ok();
    let refused = stage.make(json!({"prompt": "x"})).await;
    refused.error(429, "budget_exceeded");
    let refused = stage
        .greenroom
        .execute(&stage.alice, "Change the heading")
        .await;
    refused.answer.error(429, "budget_exceeded");
    assert_eq!(stage.statuses().len(), 3);
}

#[tokio::test]
async fn a_kill_leaves_no_prediction_running_and_none_uncounted() {
    let stage = Stage::new(&[]).await;
    let head = stage.git(&["rev-parse", "HEAD"]);
    // While it is made.
    stage.replicate.hold(true);
    let call = stage.call("a shoe");
    let stage = stage.killed(call, Stage::has_noted).await;
    stage.wait_for_status(0, "canceled").await;
    // Between its creation and the word of it: it is found by what went in.
    stage.replicate.stall_creations(true);
    let call = stage.call("a boot");
    let stage = stage
        .killed(call, |stage| stage.statuses().len() == 2)
        .await;
    stage.wait_for_status(1, "canceled").await;
    wait_for_async("both are counted, for the time that they ran", async || {
        let totals = stage.totals().await;
        let is_settled = totals["unsettled"] == 0 && totals["aborted"] == 2;
        is_settled.then(|| assert!(is_near(&totals["costUsd"], 0.005), "{totals}"))
    })
    .await;
    wait_for("nothing is left to be looked after", || {
        let notes = files_below(&stage.folders.workspace().join(".greenroom/images"));
        (!notes.iter().any(|file| file.ends_with("note.json"))).then_some(())
    })
    .await;
    assert!(stage.greenroom.log().join("\n").contains("is cancelled"));
    assert_eq!(
        (stage.turns().await, stage.git(&["rev-parse", "HEAD"])),
        (0, head)
    );
    assert_eq!(stage.git(&["status", "--porcelain"]), "");

    // With a key somebody may come back: it goes on, and is paid once.
    let keyed = |stage: &Stage| stage.call("a sandal").header("idempotency-key", "sandal");
    stage.replicate.stall_creations(true);
    let call = keyed(&stage);
    let stage = stage
        .killed(call, |stage| stage.statuses().len() == 3)
        .await;
    let turn = stage.greenroom.send(keyed(&stage)).await.ok();
    assert_eq!(turn["result"]["status"], "completed", "{turn}");
    assert_eq!(stage.statuses(), ["canceled", "canceled", "succeeded"]);
    let totals = stage.totals().await;
    assert_eq!(
        (&totals["requests"], &totals["unsettled"]),
        (&json!(3), &json!(0))
    );
    assert!(is_near(&totals["costUsd"], 0.0075), "{totals}");
}

#[tokio::test]
async fn a_call_is_cancelled_by_its_id_and_goes_on_without_its_caller_where_it_has_a_key() {
    let stage = Stage::new(&[]).await;
    let head = stage.git(&["rev-parse", "HEAD"]);
    stage.replicate.hold(true);
    let keyed = || stage.call("a shoe").header("idempotency-key", "shoe");
    let mut events = stage.stream(keyed()).await;
    let id = events.until("images.started").await.data["callId"].clone();
    events.until("images.progress").await;
    // Whoever looks at the thread sees it.
    let thread = stage.greenroom.get(&stage.alice.path()).await.ok();
    let call = &thread["result"]["calls"][0];
    assert_eq!(
        (&call["callId"], &call["kind"]),
        (&id, &json!("images")),
        "{thread}"
    );
    let cancel = format!("/api/calls/{}/cancel", id.as_str().unwrap());
    let ended = stage.greenroom.api("POST", &cancel, json!({})).await.ok();
    assert_eq!(ended["result"]["status"], "cancelled", "{ended}");
    let told = events.until("images.cancelled").await.data;
    assert_eq!(
        (&told["result"]["status"], &told["result"]["commit"]),
        (&json!("cancelled"), &Value::Null),
        "{told}"
    );
    assert_eq!(stage.statuses(), ["canceled"]);
    let again = stage.greenroom.api("POST", &cancel, json!({})).await.ok();
    assert_eq!(again["result"], ended["result"]);
    let other = "/api/calls/0190c0ffee/cancel";
    stage
        .greenroom
        .api("POST", other, json!({}))
        .await
        .error(404, "not_found");
    let thread = stage.greenroom.get(&stage.alice.path()).await.ok();
    assert_eq!(thread["result"]["calls"], json!([]), "{thread}");
    assert_eq!(
        (stage.turns().await, stage.git(&["rev-parse", "HEAD"])),
        (0, head)
    );
    let totals = stage.totals().await;
    assert_eq!(
        (&totals["aborted"], &totals["unsettled"]),
        (&json!(1), &json!(0))
    );

    // The same call again begins anew, since nothing came of the first; its caller goes away.
    let mut events = stage.stream(keyed()).await;
    events.until("images.progress").await;
    drop(events);
    stage.replicate.hold(false);
    wait_for_async("it becomes a turn all the same", async || {
        (stage.turns().await == 1).then_some(())
    })
    .await;
    let turn = stage.greenroom.send(keyed()).await.ok();
    assert_eq!(turn["result"]["status"], "completed", "{turn}");
    assert_eq!(stage.statuses(), ["canceled", "succeeded"]);

    // A call of another's thread is not to be seen, nor one without a key to go on.
    let bob = who("acme", "bob", "main");
    stage.replicate.hold(true);
    let mut events = stage.stream(stage.call("a boot")).await;
    events.until("images.progress").await;
    let threads = stage.greenroom.get(&bob.path()).await;
    assert!(!threads.text.contains("callId"), "{}", threads.text);
    drop(events);
    stage.wait_for_status(2, "canceled").await;
}

#[tokio::test]
async fn what_cannot_be_looked_for_counts_at_its_worst() {
    let stage = Stage::new(&[]).await;
    stage.replicate.hold(true);
    stage.replicate.fail_looks(usize::MAX);
    let call = stage.call("a shoe");
    let stage = stage.killed(call, Stage::has_noted).await;
    wait_for_async("it counts", async || {
        let totals = stage.totals().await;
        let cost = totals["costUsd"].as_f64().unwrap();
        (totals["unsettled"] == 1).then(|| assert!(cost > 0.01, "{totals}"))
    })
    .await;

    // As soon as it can be looked for it is ended, and costs what it took.
    stage.replicate.fail_looks(0);
    stage.wait_for_status(0, "canceled").await;
    wait_for_async("it is settled", async || {
        let totals = stage.totals().await;
        let is_settled = totals["unsettled"] == 0 && totals["aborted"] == 1;
        is_settled.then(|| assert!(is_near(&totals["costUsd"], 0.0025), "{totals}"))
    })
    .await;
}
