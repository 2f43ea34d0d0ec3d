//! `greenroom replicate run-model` against a stand-in for Replicate, which its official Python client
//! keeps honest.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{process::Command, time::timeout};

use crate::{
    label::picture_of,
    support::{PATIENCE, REPLICATE_TOKEN, StandInReplicate, replicate_client, wait_for},
};

/// A folder to run in, and the API.
struct Place {
    folder: TempDir,
    replicate: StandInReplicate,
}

impl Place {
    async fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            replicate: StandInReplicate::start(picture_of(1, 40, 30)).await,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, token: &str, args: &[&str]) -> Command {
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
        command
            .args(["replicate", "run-model"])
            .args(args)
            .current_dir(self.folder.path())
            .env_clear()
            .env("HOME", self.folder.path())
            .env("REPLICATE_BASE_URL", self.replicate.url())
            .env("REPLICATE_API_TOKEN", token)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, args: &[&str]) -> Ran {
        self.run_as(REPLICATE_TOKEN, args).await
    }

    async fn run_as(&self, token: &str, args: &[&str]) -> Ran {
        let output = self.command(token, args).output();
        Ran::of(timeout(PATIENCE, output).await.unwrap().unwrap())
    }

    /// Files in a folder, by name.
    fn files(&self, below: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(below)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

struct Ran {
    status: i32,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let ran = Self {
            status: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!ran.out.contains(REPLICATE_TOKEN) && !ran.err.contains(REPLICATE_TOKEN));
        ran
    }

    #[track_caller]
    fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "{}", self.err);
        &self.out
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(self.ok()).unwrap()
    }

    /// The last line of standard error.
    #[track_caller]
    fn refused(&self, said: &str) {
        assert_eq!(self.status, 1, "{}", self.err);
        let line = self.err.lines().next_back().unwrap();
        assert!(
            line.starts_with("greenroom: ") && line.contains(said),
            "{}",
            self.err
        );
    }
}

fn creations(replicate: &StandInReplicate) -> usize {
    let asked = replicate.asked();
    let create = |asked: &&String| asked.starts_with("POST") && asked.ends_with("/predictions");
    asked.iter().filter(create).count()
}

#[tokio::test]
async fn a_model_is_run_and_its_files_are_saved() {
    let place = Place::new().await;
    fs::create_dir(place.path("config")).unwrap();
    fs::write(
        place.path("config/model_configs.yaml"),
        "models:\n  acme/painter:\n    params: {width: 512, aspect_ratio: '16:9'}\n    \
         hardware: gpu-l40s\n    timeout_seconds: 90\n",
    )
    .unwrap();
    fs::write(place.path("small.png"), picture_of(2, 10, 10)).unwrap();
    let args = [
        "acme/painter",
        "--param",
        "prompt:a red shoe: new",
        "--param",
        "num_outputs:2",
        "--param",
        "aspect_ratio:1:1",
        "--input-file",
        "image=small.png",
        "--output",
        "made/here",
        "--json",
    ];
    let ran = place.run(&args).await;
    let told = ran.json();
    assert_eq!(told["status"], "succeeded", "{told}");
    assert_eq!(told["predictSeconds"], 2.5);
    assert!(
        (told["costUsd"].as_f64().unwrap() - 2.5 * 0.000_975).abs() < 1e-9,
        "{told}"
    );
    assert_eq!(told["files"].as_array().unwrap().len(), 2);
    assert_eq!(told["files"][0]["mediaType"], "image/png");
    let names = place.files("made/here");
    assert_eq!(names.len(), 2, "{names:?}");
    for (index, name) in names.iter().enumerate() {
        let id = told["id"].as_str().unwrap();
        assert_eq!(*name, format!("painter-{id}-{}.png", index + 1));
        let bytes = fs::read(place.path("made/here").join(name)).unwrap();
        assert_eq!(bytes, picture_of(1, 40, 30));
    }
    let (input, _) = &place.replicate.predictions()[0];
    assert_eq!(input["prompt"], "a red shoe: new");
    assert_eq!(input["width"], 512, "of the settings");
    assert_eq!(input["aspect_ratio"], "1:1", "what is typed wins");
    assert_eq!(input["num_outputs"], 2, "a number, as the schema has it");
    assert!(
        input["image"]
            .as_str()
            .unwrap()
            .starts_with("data:image/png;base64,")
    );
    assert_eq!(place.replicate.deadlines(), [Some("90s".to_owned())]);
    // The token is for the API alone.
    let fetched = place.replicate.fetched();
    assert!(fetched.len() == 2 && fetched.iter().all(|(_, token)| token.is_none()));
    // The log was told as it came, without what would steer a terminal.
    for line in ["Using seed: 7", "done", "prediction p", "processing"] {
        assert!(
            ran.err.lines().any(|told| told.contains(line)),
            "{line}\n{}",
            ran.err
        );
    }
    assert!(
        !ran.err.contains('\u{1b}') && !ran.err.contains("owned"),
        "{}",
        ran.err
    );
    // Without --json: paths on standard output, what it took beside it.
    let ran = place
        .run(&["acme/painter", "--param", "prompt:x", "--output", "made"])
        .await;
    assert!(
        Path::new(ran.ok().trim()).starts_with("made"),
        "{}",
        ran.out
    );
    assert!(
        ran.err
            .contains("2.5 s of the model's time, 4.0 s in all, $0.0024"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn what_is_wrong_is_told_before_anything_is_paid() {
    let place = Place::new().await;
    let args = [
        "acme/painter",
        "--param",
        "promt:a cat",
        "--param",
        "width:9000",
        "--param",
        "aspect_ratio:2:1",
        "--param",
        "image:/etc/passwd",
    ];
    let ran = place.run(&args).await;
    ran.refused("did you mean prompt?");
    for said in [
        "width: 9000 is out of range; allowed: 64 or more and 2048 or less",
        "aspect_ratio: \"2:1\" is not among 1:1, 16:9",
        "prompt is missing (What to make)",
        "--input-file",
    ] {
        ran.refused(said);
    }
    let ran = place.run(&["acme/nothing", "--param", "prompt:x"]).await;
    ran.refused("Replicate knows no model acme/nothing");
    let ran = place
        .run(&["acme/painter", "--input-file", "image=none.png"])
        .await;
    ran.refused("none.png");
    fs::write(place.path("file"), "").unwrap();
    let ran = place
        .run(&["acme/painter", "--param", "prompt:x", "--output", "file"])
        .await;
    ran.refused("--output file");
    let ran = place
        .run_as(
            "r8_of-somebody-else",
            &["acme/painter", "--param", "prompt:x"],
        )
        .await;
    ran.refused("Replicate refused the token: set REPLICATE_API_TOKEN");
    let mut command = place.command("", &["acme/painter", "--param", "prompt:x"]);
    let output = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    Ran::of(output).refused("REPLICATE_API_TOKEN is not set");
    let mut command = place.command(REPLICATE_TOKEN, &["acme/painter", "--param", "prompt:x"]);
    command.env("REPLICATE_BASE_URL", "http://192.0.2.1");
    let output = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    Ran::of(output).refused("REPLICATE_BASE_URL is not https");
    let dry = [
        "acme/painter",
        "--param",
        "prompt:x",
        "--param",
        "width: 64",
        "--dry-run",
    ];
    let told = place.run(&dry).await.json();
    assert_eq!(told["input"], json!({"prompt": "x", "width": 64}));
    let ran = place.run(&["acme"]).await;
    assert_eq!(ran.status, 2, "{}", ran.err);
    assert_eq!(creations(&place.replicate), 0);
    assert_eq!(
        place
            .files(".")
            .iter()
            .filter(|name| name.ends_with("png"))
            .count(),
        0
    );
}

#[tokio::test]
async fn one_that_fails_and_one_that_is_cancelled() {
    let place = Place::new().await;
    let ran = place
        .run(&["acme/failing", "--param", "prompt:model: failing"])
        .await;
    ran.refused("failed: CUDA out of memory Try fewer");

    let ended = async |signals: usize| {
        let before = place.replicate.predictions().len();
        let mut child = place
            .command(
                REPLICATE_TOKEN,
                &["acme/slow", "--param", "prompt:model: slow"],
            )
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().unwrap().cast_signed());
        wait_for("the prediction", || {
            assert!(child.try_wait().unwrap().is_none());
            let all = place.replicate.predictions();
            (all.len() > before && all[before].1 == "processing").then_some(())
        })
        .await;
        for _ in 0..signals {
            kill(pid, Signal::SIGINT).unwrap();
        }
        let output = timeout(PATIENCE, child.wait_with_output()).await;
        Ran::of(output.unwrap().unwrap())
    };
    let ran = ended(1).await;
    ran.refused("was cancelled");
    assert!(ran.err.contains("cancelling"), "{}", ran.err);
    assert_eq!(place.replicate.predictions()[1].1, "canceled");

    // Its time is over.
    let args = [
        "acme/slow",
        "--param",
        "prompt:model: slow",
        "--timeout",
        "5",
    ];
    let ran = place.run(&args).await;
    ran.refused("took longer than 5 s and was cancelled");
    assert_eq!(place.replicate.predictions()[2].1, "canceled");
}

#[tokio::test]
async fn nothing_is_paid_twice() {
    let place = Place::new().await;
    let args = ["acme/painter", "--param", "prompt:x", "--json"];
    // Refused, so not begun: sent again.
    place.replicate.throttle(2);
    place.run(&args).await.ok();
    assert_eq!(
        (
            creations(&place.replicate),
            place.replicate.predictions().len()
        ),
        (3, 1)
    );
    // Begun, and the answer lost: found again by what went into it.
    place.replicate.lose_answers(1);
    place
        .run(&["acme/painter", "--param", "prompt:y"])
        .await
        .ok();
    assert_eq!(
        (
            creations(&place.replicate),
            place.replicate.predictions().len()
        ),
        (4, 2)
    );
    // Not begun, which nobody can know: told, and not sent again.
    place.replicate.break_creations(1);
    let ran = place.run(&["acme/painter", "--param", "prompt:z"]).await;
    ran.refused("look at replicate.com/predictions before you try again");
    assert_eq!(
        (
            creations(&place.replicate),
            place.replicate.predictions().len()
        ),
        (5, 2)
    );
    // A look costs nothing and is repeated.
    place.replicate.fail_looks(2);
    place.run(&args).await.ok();
    assert_eq!(place.replicate.predictions().len(), 3);
}

#[tokio::test]
async fn outputs_of_every_kind_and_hostile_ones() {
    let place = Place::new().await;
    let ran = place
        .run(&["acme/writer", "--param", "prompt:model: writer"])
        .await;
    assert_eq!(ran.ok(), "Once upon a time\n");
    let ran = place
        .run(&["acme/thinker", "--param", "prompt:model: thinker"])
        .await;
    assert_eq!(
        serde_json::from_str::<Value>(ran.ok()).unwrap(),
        json!({"score": 0.5})
    );
    let args = [
        "acme/inline",
        "--param",
        "prompt:model: inline",
        "--output",
        "inline",
    ];
    place.run(&args).await.ok();
    let names = place.files("inline");
    assert!(names.len() == 1 && names[0].ends_with(".gif"), "{names:?}");

    let args = [
        "acme/hostile",
        "--param",
        "prompt:model: hostile",
        "--output",
        "a/b",
        "--json",
    ];
    let ran = place.run(&args).await;
    ran.refused("6 of 8 files were not saved");
    let told: Value = serde_json::from_str(&ran.out).unwrap();
    let not_saved = told["notSaved"].to_string();
    for said in [
        "169.254.169.254",
        "replicate.delivery.example.com",
        "10.0.0.1",
        "404",
        // Of the API itself without the token, and nothing by somebody's name.
        "401",
        "password",
    ] {
        assert!(not_saved.contains(said), "{not_saved}");
    }
    // A stand-in's files may have another name of this machine.
    let names = place.files("a/b");
    assert!(
        names.len() == 2 && names[0].ends_with("-beside.png") && names[1].ends_with("-escape.png"),
        "{names:?}"
    );
    assert_eq!(place.files("a"), ["b"]);

    // A large file goes in pieces beforehand, an official model by its name, a version by itself.
    fs::write(place.path("large photo.webp"), vec![7; 700_000]).unwrap();
    let args = [
        "acme/official",
        "--param",
        "prompt:x",
        "--input-file",
        "image=large photo.webp",
    ];
    place.run(&args).await.ok();
    let file = (
        "large_photo.webp".to_owned(),
        "image/webp".to_owned(),
        700_000,
    );
    assert_eq!(place.replicate.files(), [file]);
    let ran = place
        .run(&[StandInReplicate::version(), "--param", "prompt:x"])
        .await;
    ran.ok();
    assert!(
        ran.err.contains("parameters are not checked"),
        "{}",
        ran.err
    );
    let (input, _) = &place.replicate.predictions()[4];
    let at = input["image"].as_str().unwrap();
    assert_eq!(at, format!("{}/v1/files/file0", place.replicate.url()));
}

/// What Replicate's own client does with the stand-in.
const CLIENT: &str = r#"
import io, os, sys
import replicate
from replicate.exceptions import ModelError, ReplicateError
base, token, version = sys.argv[1:4]
client = replicate.Client(api_token=token, base_url=base)
model = client.models.get("acme/painter")
assert model.latest_version.id == version, model
assert "prompt" in model.latest_version.openapi_schema["components"]["schemas"]["Input"]["properties"]
made = client.run("acme/official", input={"prompt": "x", "num_outputs": 2})
assert len(made) == 2, made
made = client.run(f"acme/painter:{version}", input={"prompt": "x", "image": io.BytesIO(b"12345")})
assert len(list(made)) == 1
text = client.run(f"acme/writer:{version}", input={"prompt": "model: writer"})
assert "".join(str(piece) for piece in text) == "Once upon a time"
prediction = client.predictions.create(version=version, input={"prompt": "slow"})
assert prediction.status == "starting" and prediction.urls["cancel"], prediction
prediction.wait()
assert prediction.status == "succeeded" and prediction.metrics["predict_time"] == 2.5
assert prediction.progress.percentage == 1.0, prediction.logs
prediction = client.predictions.create(version=version, input={"prompt": "model: slow"})
prediction.reload()
prediction.cancel()
assert prediction.status == "canceled", prediction
assert client.predictions.list().results[0].id == prediction.id
try:
    client.run(f"acme/failing:{version}", input={"prompt": "model: failing"})
    raise SystemExit("it did not fail")
except ModelError as error:
    assert "CUDA" in error.prediction.error
file = client.files.create(io.BytesIO(b"hello"), filename="a.txt")
assert client.files.get(file.id).size == 5
try:
    replicate.Client(api_token="r8_wrong", base_url=base).models.get("acme/painter")
    raise SystemExit("it was not refused")
except ReplicateError as error:
    assert error.status == 401, error
print("agreed")
"#;

#[tokio::test]
async fn the_stand_in_is_what_replicate_s_own_client_expects() {
    let place = Place::new().await;
    #[expect(clippy::disallowed_methods, reason = "Replicate's own client")]
    let output = Command::new("python3")
        .args(["-c", CLIENT, &place.replicate.url(), REPLICATE_TOKEN])
        .arg(StandInReplicate::version())
        .env("PYTHONPATH", replicate_client())
        .env("REPLICATE_POLL_INTERVAL", "0.05")
        .env("NO_PROXY", "127.0.0.1")
        .kill_on_drop(true)
        .output();
    let output = timeout(PATIENCE, output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "agreed\n");
}
