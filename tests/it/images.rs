//! Images made for a site, from the call to the commit: a stand-in for Replicate, the real CLI against a
//! scripted API.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    label::picture_of,
    support::{
        Answer, Folders, Options, REPLICATE_TOKEN, SITE, Sent, StandIn, StandInReplicate,
        TestGreenroom, Who, files_below, git, holds, request, rule, runs, wait_for, who,
    },
};

/// A thread of a client with a LoRA of its own, and a stand-in for Replicate.
pub(crate) struct Stage {
    pub(crate) api: StandIn,
    pub(crate) replicate: StandInReplicate,
    pub(crate) folders: Folders,
    pub(crate) greenroom: TestGreenroom,
    pub(crate) alice: Who,
}

impl Stage {
    pub(crate) async fn new(rules: &[Value]) -> Self {
        Self::with(rules, |options| options).await
    }

    pub(crate) async fn with(rules: &[Value], more: impl FnOnce(Options) -> Options) -> Self {
        let api = StandIn::start(json!({"rules": rules})).await;
        // A picture that is scaled down, with a note of its maker.
        let replicate = StandInReplicate::start(picture_of(1, 3000, 1500)).await;
        let folders = Folders::open();
        let logo = "\u{89}PNG of no consequence";
        let mut files = SITE.to_vec();
        files.push(("src/images/logo.png", logo));
        let site = folders.site("site", &files);
        let configs = folders.join("home/models.yaml");
        fs::write(
            &configs,
            "models:\n  acme/painter: {price: {per_second: 0.001}}\nclients:\n  acme:\n    \
             model: acme/painter\n    lora: huggingface.co/acme/shoes\n    trigger: ACMESHOE\n",
        )
        .unwrap();
        let options = Options::new(&folders)
            .api(&api)
            .env("REPLICATE_API_TOKEN", REPLICATE_TOKEN)
            .env("REPLICATE_BASE_URL", replicate.url())
            .env("MODEL_CONFIGS_FILE", configs);
        let greenroom = TestGreenroom::start(more(options)).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            api,
            replicate,
            folders,
            greenroom,
            alice,
        }
    }

    pub(crate) async fn make(&self, body: Value) -> Answer {
        let path = format!("{}/images", self.alice.path());
        self.greenroom.api("POST", &path, body).await
    }

    /// Is a prediction's id written down?
    pub(crate) fn has_noted(&self) -> bool {
        let notes = files_below(&self.folders.workspace().join(".greenroom/images"));
        let notes = notes.iter().filter(|file| file.ends_with("note.json"));
        notes
            .into_iter()
            .any(|note| holds(note, "\"prediction\":\"p"))
    }

    pub(crate) fn git(&self, args: &[&str]) -> String {
        git(self.folders.worktree(&self.alice), args)
    }
}

#[tokio::test]
async fn an_image_is_a_turn_that_can_be_undone() {
    let stage = Stage::new(&[]).await;
    let before = stage.git(&["rev-parse", "HEAD"]);
    let body = stage
        .make(json!({"prompt": "A red shoe", "count": 2}))
        .await
        .ok();
    let result = &body["result"];
    assert_eq!(result["kind"], "images", "{body}");
    assert_eq!(result["status"], "completed");
    let report = &result["report"];
    assert_eq!(report["model"], "acme/painter");
    assert!(
        (report["costUsd"].as_f64().unwrap() - 0.0025).abs() < 1e-9,
        "{report}"
    );
    let images = report["images"].as_array().unwrap();
    assert_eq!(images.len(), 2);
    for image in images {
        let path = image["path"].as_str().unwrap();
        assert!(
            path.starts_with("src/images/a-red-shoe-"),
            "where the logo is: {path}"
        );
        assert_eq!(
            (image["width"].as_u64(), image["height"].as_u64()),
            (Some(2560), Some(1280))
        );
        assert_eq!(image["altBy"], "label", "{image}");
        assert!(!image["alt"].as_str().unwrap().is_empty());
        let bytes = fs::read(stage.folders.worktree(&stage.alice).join(path)).unwrap();
        assert_eq!(Some(bytes.len() as u64), image["bytes"].as_u64());
        image::load_from_memory(&bytes).unwrap();
    }
    // What went in: the brand's LoRA and its word, one prediction for both.
    let predictions = stage.replicate.predictions();
    assert_eq!(predictions.len(), 1);
    let input = &predictions[0].0;
    assert_eq!(input["prompt"], "ACMESHOE A red shoe");
    assert_eq!(input["extra_lora"], "huggingface.co/acme/shoes");
    assert_eq!(input["num_outputs"], 2);
    // One commit, clean, and one undo.
    assert_eq!(
        stage
            .git(&["rev-list", "--count", &format!("{}..HEAD", before.trim())])
            .trim(),
        "1"
    );
    assert_eq!(stage.git(&["status", "--porcelain"]), "");
    let path = format!("{}/undo", stage.alice.path());
    stage.greenroom.api("POST", &path, json!({})).await.ok();
    assert_eq!(stage.git(&["diff", "--stat", before.trim(), "HEAD"]), "");
    // A model that makes more than it is asked for: what was asked for is taken. The text that the
    // caller gives is counted in characters.
    let alt = "靴".repeat(150);
    let wish = json!({"prompt": "model: many", "model": "acme/many", "alt": alt});
    let many = stage.make(wish).await.ok()["result"].take();
    let report = &many["report"];
    assert_eq!(report["images"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(
        (&report["images"][0]["alt"], &report["leftOut"]),
        (&json!(alt), &json!(2))
    );
    assert_eq!(many["commit"]["files"].as_array().unwrap().len(), 1);
    assert!(many["text"].as_str().unwrap().contains("2 more"), "{many}");
    // Nothing of the token is anywhere that an agent or a person sees.
    for file in files_below(&stage.folders.workspace()) {
        assert!(!holds(&file, REPLICATE_TOKEN), "{}", file.display());
    }
    assert!(!stage.greenroom.log().join("\n").contains(REPLICATE_TOKEN));
    assert!(!stage.api.requests().is_empty());
}

#[tokio::test]
async fn with_an_instruction_image_and_reference_are_one_turn() {
    let insert = "f=$(ls src/images/*.png src/images/*.jpg 2>/dev/null | grep shoe); \
                  sed -i \"s|<p>|<img src='/$f' alt='A shoe'>\\n<p>|\" src/pages/index.astro";
    let stage = Stage::new(&[rule("below the heading", &[runs(insert)])]).await;
    let before = stage.git(&["rev-parse", "HEAD"]);
    let wish = json!({
        "prompt": "a red shoe", "instruction": "Show it below the heading", "alt": "A shoe",
        "folder": "src/images",
    });
    let body = stage.make(wish).await.ok();
    let result = &body["result"];
    assert_eq!(
        (&result["kind"], &result["status"]),
        (&json!("turn"), &json!("completed"))
    );
    let files = result["commit"]["files"].as_array().unwrap();
    assert_eq!(files.len(), 2, "image and page: {files:?}");
    // What the prediction cost and what its placing did.
    let usage = stage.greenroom.get("/api/usage").await.ok()["result"]["totals"].take();
    let (spent, told) = (&usage["costUsd"], &result["usage"]["costUsd"]);
    assert!(
        (spent.as_f64().unwrap() - told.as_f64().unwrap()).abs() < 0.002,
        "{spent} {told}"
    );
    assert!(told.as_f64().unwrap() > 0.0025, "{told}");
    let image = result["report"]["images"][0]["path"].as_str().unwrap();
    assert!(files.iter().any(|file| file["path"] == image), "{files:?}");
    let page = stage.git(&["show", "HEAD:src/pages/index.astro"]);
    assert!(page.contains(image), "{page}");
    assert_eq!(
        stage
            .git(&["rev-list", "--count", &format!("{}..HEAD", before.trim())])
            .trim(),
        "1"
    );
    // The agent was told which file and which words.
    let told = stage.api.requests();
    let told = told
        .iter()
        .find(|asked| asked.instruction.contains("below the heading"));
    let told = &told.unwrap().instruction;
    assert!(
        told.contains(image) && told.contains("\"A shoe\""),
        "{told}"
    );
    let path = format!("{}/undo", stage.alice.path());
    stage.greenroom.api("POST", &path, json!({})).await.ok();
    assert_eq!(stage.git(&["diff", "--stat", before.trim(), "HEAD"]), "");
}

#[tokio::test]
async fn who_has_used_a_budget_up_makes_no_images() {
    let stage = Stage::with(&[], |options| {
        options.env("BUDGET_CLIENT_DAY_USD", "0.000001")
    })
    .await;
    stage.make(json!({"prompt": "A red shoe"})).await.ok();
    let refused = stage.make(json!({"prompt": "A blue shoe"})).await;
    refused.error(429, "budget_exceeded");
    assert_eq!(stage.replicate.predictions().len(), 1, "nothing was paid");
}

#[tokio::test]
async fn what_goes_wrong_changes_nothing_and_is_told() {
    let stage = Stage::new(&[]).await;
    let before = stage.git(&["rev-parse", "HEAD"]);
    for (body, said) in [
        (json!({}), "prompt is missing"),
        (json!({"prompt": "x", "count": 9}), "count"),
        (json!({"prompt": "x", "folder": "../out"}), "folder"),
        (
            json!({"prompt": "x", "alt": "靴".repeat(301)}),
            "300 characters",
        ),
        (json!({"prompt": "x", "model": "shoes"}), "OWNER/MODEL"),
        (
            json!({"prompt": "x", "params": {"width": 9000}}),
            "out of range",
        ),
        (
            json!({"prompt": "x", "params": {"wdth": 900}}),
            "did you mean width?",
        ),
        (
            json!({"prompt": "x", "model": "acme/nothing"}),
            "acme/nothing",
        ),
    ] {
        let answer = stage.make(body.clone()).await;
        let error = answer.error(400, "invalid_request");
        assert!(error.contains(said), "{body}: {error}");
    }
    assert_eq!(stage.replicate.predictions().len(), 0);
    let nobody = who("acme", "alice", "never");
    let path = format!("{}/images", nobody.path());
    let answer = stage
        .greenroom
        .api("POST", &path, json!({"prompt": "x"}))
        .await;
    answer.error(404, "not_found");
    assert_eq!(stage.replicate.predictions().len(), 0);

    let failing = json!({"prompt": "model: failing", "model": "acme/failing"});
    let error = stage.make(failing).await;
    assert!(
        error
            .error(502, "image_failed")
            .contains("CUDA out of memory")
    );
    // No image, though the model says so.
    let text = json!({"prompt": "model: inline", "model": "acme/inline"});
    stage.make(text).await.error(502, "image_failed");
    assert_eq!(stage.git(&["rev-parse", "HEAD"]), before);
    assert_eq!(stage.git(&["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_caller_who_goes_away_cancels_and_a_key_pays_once() {
    let mut stage = Stage::new(&[]).await;
    let slow = json!({"prompt": "model: slow", "model": "acme/slow"});
    let going = stage.make(slow);
    let went = wait_for("the prediction runs", || {
        let all = stage.replicate.predictions();
        all.first()
            .is_some_and(|(_, status)| *status == "processing")
            .then_some(())
    });
    tokio::select! {
        _ = going => panic!("it never ends"),
        () = went => {}
    }
    wait_for("it is cancelled", || {
        (stage.replicate.predictions()[0].1 == "canceled").then_some(())
    })
    .await;

    // Killed while it is made; the same call goes on with it.
    let path = format!("{}/images", stage.alice.path());
    let call = |prompt: &str| {
        let body = json!({"prompt": prompt, "alt": "x"});
        Sent::new("POST", &path, &body).header("idempotency-key", "shoe-1")
    };
    stage.replicate.hold(true);
    {
        let going = request(stage.greenroom.api_port, call("a shoe"));
        let begun = wait_for("it is noted", || stage.has_noted().then_some(()));
        tokio::pin!(going);
        tokio::select! {
            _ = &mut going => panic!("it is held"),
            () = begun => {}
        }
        kill(
            Pid::from_raw(stage.greenroom.pid().cast_signed()),
            Signal::SIGKILL,
        )
        .unwrap();
        // The connection breaks with it.
        going.await.ok();
    }
    stage.replicate.hold(false);
    stage.greenroom = stage.greenroom.restart().await;
    let first = stage.greenroom.send(call("a shoe")).await.ok();
    assert_eq!(first["result"]["status"], "completed", "{first}");
    assert_eq!(
        stage.replicate.predictions().len(),
        2,
        "nothing was paid twice"
    );
    let again = stage.greenroom.send(call("a shoe")).await.ok();
    assert_eq!(again["result"]["turnId"], first["result"]["turnId"]);
    assert_eq!(stage.replicate.predictions().len(), 2);
    // A key that stands for another kind of turn is answered with that, and nothing is paid.
    let keyed = |what: &str, body: Value| {
        let path = format!("{}/{what}", stage.alice.path());
        Sent::new("POST", &path, &body).header("idempotency-key", "undo-1")
    };
    let undo = keyed("undo", json!({}));
    let undo = stage.greenroom.send(undo).await.ok();
    let seen = keyed("images", json!({"prompt": "a shoe", "folder": "../out"}));
    let seen = stage.greenroom.send(seen).await.ok();
    assert_eq!(
        (&seen["result"]["turnId"], &seen["result"]["kind"]),
        (&undo["result"]["turnId"], &json!("undo"))
    );
    assert_eq!(stage.replicate.predictions().len(), 2);
}
