//! Batches of images: `greenroom label` and `POST /api/label/batches`, killed on their way, against a
//! scripted API that knows what it was asked.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use crate::{
    label::{name_of, picture_of},
    support::{
        CANARY, Folders, Options, PATIENCE, SITE, Sent, StandIn, TestGreenroom, stream, tools,
        wait_for, wait_for_async, who,
    },
};

/// A CLI that asks what it is told to ask, and starts in a tenth of the time: the real one is tried
/// by the tests of single images.
pub(crate) fn quick_cli(folders: &Folders) -> PathBuf {
    cli_that(folders, "")
}

/// The same, that does something before: JavaScript that has the `message`, and may `return`.
pub(crate) fn cli_that(folders: &Folders, does: &str) -> PathBuf {
    let program = folders.join("cli/claude");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    let script = r#"#!/usr/bin/env node
const http = require('http');
if (process.argv.includes('--version')) { console.log('2.1.329 (Claude Code)'); process.exit(0); }
let text = '';
process.stdin.on('data', data => text += data).on('end', () => {
  const { message } = JSON.parse(text);
  DOES
  const body = JSON.stringify({ model: 'claude-haiku-5-5', max_tokens: 100, messages: [message] });
  const headers = {
    authorization: 'Bearer ' + process.env.ANTHROPIC_AUTH_TOKEN,
    'content-type': 'application/json', 'content-length': Buffer.byteLength(body),
  };
  const url = process.env.ANTHROPIC_BASE_URL + '/v1/messages';
  const request = http.request(url, { method: 'POST', headers }, answer => {
    let text = '';
    answer.on('data', data => text += data).on('end', () => {
      const fails = answer.statusCode !== 200;
      if (!fails) console.log(JSON.stringify({ type: 'assistant', message: JSON.parse(text) }));
      console.log(JSON.stringify({
        type: 'result', is_error: fails, api_error_status: answer.statusCode, result: '',
      }));
      process.exitCode = fails ? 1 : 0;
    });
  });
  request.end(body);
});
"#;
    fs::write(&program, script.replace("DOES", does)).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// `greenroom label` in a folder.
pub(crate) fn command(folders: &Folders, cli: &Path, api: &StandIn, args: &[&str]) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
    command
        .arg("label")
        .args(args)
        .current_dir(folders.join("home"))
        .env_clear()
        .env("HOME", folders.join("home"))
        .env("TMPDIR", folders.join("tmp"))
        .env("PATH", &tools().path)
        .env("CLAUDE_BIN", cli)
        .env("WORKSPACE_PATH", folders.workspace())
        .env("CACHE_PATH", folders.join("cache"))
        .env("CLIENT_ID", "acme")
        .env("CLAUDE_MODEL", "claude-haiku-5-5")
        .env("ANTHROPIC_BASE_URL", api.url())
        .env("ANTHROPIC_API_KEY", CANARY)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub(crate) async fn ran(mut command: Command) -> Output {
    let output = timeout(PATIENCE * 2, command.output()).await;
    output.expect("it ends").unwrap()
}

/// What `--json` printed.
fn told(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// How often each image was asked about, by the rehearsal's name for it.
fn asked(api: &StandIn) -> BTreeMap<String, usize> {
    let mut asked = BTreeMap::new();
    for request in api.requests() {
        if request.messages == 0 {
            // It broke off before its last piece, when its process was killed: it asked nothing.
            continue;
        }
        assert_eq!(request.images.len(), 1, "{request:?}");
        *asked.entry(request.images[0][..12].to_owned()).or_default() += 1;
    }
    asked
}

/// 200 files: 180 pictures, ten that are the same as the first ten, ten that are broken. By file
/// what the rehearsal calls it; `None` for a broken one.
fn two_hundred(folder: &Path) -> BTreeMap<String, Option<String>> {
    fs::create_dir_all(folder).unwrap();
    let mut names = BTreeMap::new();
    for number in 0..200_u32 {
        let file = format!("{number:03}.png");
        let picture = match number {
            180..190 => picture_of(number - 180, 40, 30),
            190..195 => b"no picture at all".to_vec(),
            195..200 => picture_of(number, 40, 30)[..60].to_vec(),
            _ => picture_of(number, 40, 30),
        };
        fs::write(folder.join(&file), &picture).unwrap();
        let name = (number < 190).then(|| name_of(&picture));
        names.insert(format!("photos/{file}"), name);
    }
    names
}

#[tokio::test]
async fn two_hundred_images_killed_on_the_way_are_each_paid_once() {
    let api = StandIn::start(json!({"rules": []})).await;
    let folders = Folders::new();
    fs::create_dir_all(folders.workspace()).unwrap();
    let cli = quick_cli(&folders);
    let names = two_hundred(&folders.join("home/photos"));
    let label = |more: &[&str]| {
        let args = [&["photos", "--json", "--captions"], more].concat();
        command(&folders, &cli, &api, &args)
    };

    // What it may cost, and nothing else.
    let dry = ran(label(&["--dry-run"])).await;
    assert!(dry.status.success(), "{dry:?}");
    let dry = told(&dry);
    assert_eq!((&dry["dryRun"], &dry["total"]), (&json!(true), &json!(200)));
    let worst = dry["worstCaseUsd"].as_f64().unwrap();
    assert!(api.requests().is_empty());

    // Killed, and then told to stop.
    let mut killed = label(&[]).spawn().unwrap();
    wait_for("forty requests", || {
        (api.requests().len() >= 40).then_some(())
    })
    .await;
    killed.kill().await.unwrap();
    let after_kill = api.requests().len();
    let stopped = label(&[]).spawn().unwrap();
    let pid = Pid::from_raw(stopped.id().unwrap().cast_signed());
    wait_for("sixty more", || {
        (api.requests().len() >= after_kill + 60).then_some(())
    })
    .await;
    kill(pid, Signal::SIGTERM).unwrap();
    let stopped = timeout(PATIENCE, stopped.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let stopped = told(&stopped);
    assert!(stopped["left"].as_u64().unwrap() > 0, "{stopped}");

    let finished = ran(label(&[])).await;
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    let finished = told(&finished);
    let results = finished["results"].as_array().unwrap();
    assert_eq!(results.len(), 200);
    // Each image in one request, and no image twice.
    let counts = asked(&api);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    let pictures: BTreeSet<&String> = names.values().flatten().collect();
    assert_eq!(pictures.len(), 180);
    assert!(counts.keys().all(|name| pictures.contains(name)));
    // One whose request was about to go up when it was killed is told of with those that went up.
    let told_of = results.iter().zip(names.values());
    let told_of = told_of.filter(|(result, _)| result["code"] == "interrupted");
    let told_of: BTreeSet<&String> = told_of.filter_map(|(_, name)| name.as_ref()).collect();
    let unasked = pictures.iter().filter(|name| !counts.contains_key(**name));
    let lost: Vec<_> = unasked.filter(|name| !told_of.contains(*name)).collect();
    assert!(lost.is_empty(), "{lost:?}");
    // Each label is of its image; what the kill cut off is told, and nothing is made up for it.
    let (mut broken, mut interrupted, mut cost) = (0, 0, 0.0);
    for (result, (file, name)) in results.iter().zip(&names) {
        assert_eq!(result["image"], **file, "in the order of the files");
        cost += result["usage"]["costUsd"].as_f64().unwrap();
        let caption = folders.join("home").join(file).with_extension("txt");
        match (result["status"].as_str().unwrap(), name) {
            ("success", Some(name)) => {
                let description = result["description"].as_str().unwrap();
                assert!(description.contains(name), "{result}");
                assert_eq!(result["tags"][1], **name);
                assert_eq!(fs::read_to_string(caption).unwrap().trim(), description);
            }
            ("error", Some(_)) => {
                assert_eq!(result["code"], "interrupted", "{result}");
                interrupted += 1;
            }
            ("error", None) => {
                assert_eq!(result["code"], "invalid_image", "{result}");
                assert!(!caption.exists());
                broken += 1;
            }
            _ => panic!("{file}: {result}"),
        }
    }
    assert_eq!(broken, 10);
    // A twin of an interrupted one is the same image.
    assert!(interrupted <= 6, "{interrupted}");
    assert_eq!(finished["interrupted"], interrupted);
    assert_eq!(finished["success"], 190 - interrupted);
    assert_eq!(finished["failed"], 10 + interrupted);
    assert!((finished["usage"]["costUsd"].as_f64().unwrap() - cost).abs() < 1e-9);
    assert!(cost > 0.0 && cost <= worst);

    // Only who wants to pays for those again. What a person has made of a caption stays.
    let by_hand = results.iter().find(|result| result["status"] == "success");
    let by_hand = folders
        .join("home")
        .join(by_hand.unwrap()["image"].as_str().unwrap());
    let by_hand = by_hand.with_extension("txt");
    fs::write(&by_hand, "a board, ACMEBOARD\n").unwrap();
    let again = told(&ran(label(&["--retry-failed"])).await);
    assert_eq!(again["captionsKept"], 1, "{again}");
    let there = fs::read_to_string(&by_hand).unwrap();
    assert_eq!(there, "a board, ACMEBOARD\n");
    assert_eq!(
        (&again["success"], &again["failed"], &again["interrupted"]),
        (&json!(190), &json!(10), &json!(0)),
        "{again}"
    );
    let twice = asked(&api)
        .into_values()
        .filter(|count| *count == 2)
        .count();
    assert!(twice <= 3, "{twice} for {interrupted}");
    let before = api.requests().len();
    let known = ran(label(&["--csv"])).await;
    assert_eq!(known.status.code(), Some(2), "two forms: {known:?}");
    // All of it is known by now, also to another command.
    let known = command(
        &folders,
        &cli,
        &api,
        &["photos/0*.png", "photos/199.png", "--csv"],
    );
    let known = ran(known).await;
    let csv = String::from_utf8(known.stdout).unwrap();
    assert_eq!(csv.lines().count(), 102, "{csv}");
    assert!(csv.starts_with("image,status,nsfw_rating,description,tags"));
    assert_eq!(csv.matches(",true,0.000000,").count(), 100);
    assert_eq!(api.requests().len(), before);
}

#[tokio::test]
async fn money_and_failures_stop_what_they_have_to() {
    let api = StandIn::start(json!({"rules": [
        {"match": "busy", "steps": [{"act": {"status": {"status": 529}}, "times": 2}]},
        {"match": "odd", "steps": [{"text": "I would rather not."}]},
    ]}))
    .await;
    let folders = Folders::new();
    let cli = quick_cli(&folders);
    let photos = folders.join("home/photos");
    fs::create_dir_all(&photos).unwrap();
    for number in 0..4 {
        let file = photos.join(format!("{number}.png"));
        fs::write(file, picture_of(number, 40, 30)).unwrap();
    }
    let label = |args: &[&str]| command(&folders, &cli, &api, &[&["photos"], args].concat());
    let error = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();

    let poor = ran(label(&["--max-usd", "0.000001", "--jsonl"])).await;
    assert_eq!(poor.status.code(), Some(1), "{poor:?}");
    assert!(error(&poor).contains("4 of 4 images are left"), "{poor:?}");
    let mut budget = label(&["--jsonl"]);
    budget.env("BUDGET_CLIENT_DAY_USD", "0.0000001");
    fs::create_dir_all(folders.workspace()).unwrap();
    let budget = ran(budget).await;
    assert!(
        error(&budget).contains("budget for this day is used up"),
        "{budget:?}"
    );
    let spent = api.requests().len();
    assert!((1..4).contains(&spent), "{spent}");

    // What was not paid is tried again by itself.
    let busy = ran(label(&["--prompt", "busy", "--workers", "1", "--jsonl"])).await;
    assert_eq!(busy.status.code(), Some(1), "{busy:?}");
    let lines = String::from_utf8(busy.stdout).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(lines[0]["raw_response"], "Done.", "it was answered at last");
    // What was paid and makes no sense is not.
    let before = api.requests().len();
    for _ in 0..2 {
        let odd = ran(label(&["--prompt", "odd"])).await;
        assert!(
            error(&odd).contains("4 of 4 images have no label"),
            "{odd:?}"
        );
        assert!(
            String::from_utf8(odd.stdout)
                .unwrap()
                .contains("0 of 4 labelled, 4 failed")
        );
    }
    assert_eq!(api.requests().len(), before + 4);

    // Without the cache all of it is asked about again, once it was over.
    assert!(ran(label(&["--no-cache"])).await.status.success());
    let before = api.requests().len();
    assert!(ran(label(&["--no-cache"])).await.status.success());
    assert_eq!(api.requests().len(), before + 4);

    // A pipe is nothing to wait for.
    mkfifo(&folders.join("home/pipe.png"), Mode::S_IRWXU).unwrap();
    let pipe = ran(command(&folders, &cli, &api, &["pipe.png"])).await;
    assert!(
        String::from_utf8_lossy(&pipe.stdout).contains("no ordinary file"),
        "{pipe:?}"
    );
    fs::copy(photos.join("0.png"), folders.join("home/own.txt")).unwrap();

    for (args, said, status) in [
        (&["none.png"][..], "no such file", 1),
        (
            &["photos", "--prompt-type", "nobody"],
            "default, sd_training",
            2,
        ),
        (&["photos", "--prompt", " "], "the prompt is empty", 2),
        (&["own.txt", "--captions"], "is that image itself", 2),
        (&["photos", "--workers", "0"], "--workers", 2),
        (&["photos", "--model", "a b"], "--model", 2),
        (&["photos", "--max-usd", "0"], "--max-usd", 2),
        (&[], "PATH", 2),
    ] {
        let refused = ran(command(&folders, &cli, &api, args)).await;
        assert_eq!(refused.status.code(), Some(status), "{args:?} {refused:?}");
        let line = error(&refused);
        assert!(
            line.contains(said) && line.lines().count() == 1,
            "{args:?} {line}"
        );
    }
    let mut missing = label(&[]);
    missing.env("CLAUDE_BIN", "/nowhere/claude");
    let missing = ran(missing).await;
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
}

async fn finished(greenroom: &TestGreenroom, id: &str) -> Value {
    let path = format!("/api/label/batches/{id}");
    wait_for_async("the batch's end", async || {
        let view = greenroom.ask(&path).await?.body["result"].clone();
        (view["status"] == "completed").then_some(view)
    })
    .await
}

#[tokio::test]
async fn a_batch_of_the_api_goes_on_after_a_kill_and_leaves_room_for_one() {
    let api = StandIn::start(json!({"rules": [
        {"match": "gently", "steps": [{"delay_ms": 150, "text":
            "DESCRIPTION: A board.\nNSFW: SAFE\nTAGS: board"}]},
    ]}))
    .await;
    let folders = Folders::new();
    let options = Options::new(&folders)
        .api(&api)
        .env("CLIENT_ID", "acme")
        .env("CLAUDE_BIN", quick_cli(&folders));
    let mut greenroom = TestGreenroom::start(options).await;
    let images: Vec<Value> = (0..40)
        .map(|number| {
            let bytes = match number {
                7 => b"broken".to_vec(),
                number => picture_of(number % 38, 40, 30),
            };
            json!({"name": format!("{number}.png"), "data": STANDARD.encode(bytes)})
        })
        .collect();
    let body = json!({"images": images, "prompt": "gently", "workers": 3});
    let dry = json!({"images": images, "dryRun": true});
    let dry = greenroom.api("POST", "/api/label/batches", dry).await.ok();
    assert_eq!(dry["result"]["total"], 40);
    assert!(dry["result"]["worstCaseUsd"].as_f64().unwrap() > 0.0);
    for (fields, said) in [
        (json!({}), "images"),
        (json!({"images": []}), "images"),
        (json!({"images": [{"data": "*"}]}), "images[0].data"),
        (json!({"images": images, "workers": 0}), "workers"),
        (json!({"images": images, "maxCostUsd": -1}), "maxCostUsd"),
    ] {
        let refused = greenroom.api("POST", "/api/label/batches", fields).await;
        assert!(
            refused.error(400, "invalid_request").contains(said),
            "{said}"
        );
    }
    let taken = greenroom.api("POST", "/api/label/batches", body).await;
    assert_eq!(taken.status, 202, "{}", taken.text);
    let id = taken.body["result"]["batchId"].as_str().unwrap().to_owned();
    wait_for("ten requests", || {
        (api.requests().len() >= 10).then_some(())
    })
    .await;
    greenroom.kill().await;
    let greenroom = greenroom.restart().await;
    let view = finished(&greenroom, &id).await;
    let interrupted = view["results"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|result| result["code"] == "interrupted")
        .count();
    assert!(interrupted <= 6, "{view}");
    assert_eq!(view["success"], 39 - interrupted, "{view}");
    assert_eq!((&view["total"], &view["left"]), (&json!(40), &json!(0)));
    // Two are twins, one is broken; each picture is one request.
    let counts = asked(&api);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    // But for those whose request was about to go up.
    assert!(
        (37 - interrupted..=37).contains(&counts.len()),
        "{counts:?}"
    );

    let sent = Sent::new(
        "GET",
        &format!("/api/label/batches/{id}/events"),
        &Value::Null,
    );
    let events = stream(greenroom.api_port, sent).await.all().await;
    let names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names[0], "batch.started");
    assert_eq!(*names.last().unwrap(), "batch.completed");
    let outcomes = events
        .iter()
        .filter(|event| matches!(event.name.as_str(), "image.labelled" | "image.failed"));
    let last = outcomes.clone().next_back().unwrap();
    assert_eq!(last.data["progress"]["done"], 40, "{last:?}");
    assert_eq!(last.data["batchId"], *id);

    // What may have been paid is asked about again for who wants it.
    let resume = format!("/api/label/batches/{id}/resume");
    greenroom
        .api("POST", &resume, json!({"retryFailed": true}))
        .await
        .ok();
    wait_for_async("its second end", async || {
        let view = finished(&greenroom, &id).await;
        (view["success"] == 39).then_some(())
    })
    .await;

    // Somebody with one image does not wait for a batch, and one that is cancelled stays so.
    let before = api.requests().len();
    let images: Vec<Value> = (100..140)
        .map(|number| json!({"data": STANDARD.encode(picture_of(number, 40, 30))}))
        .collect();
    let body = json!({"images": images, "prompt": "gently"});
    let taken = greenroom.api("POST", "/api/label/batches", body).await.ok();
    let id = taken["batchId"].as_str().unwrap();
    let single = json!({"image": {"data": STANDARD.encode(picture_of(200, 40, 30))}});
    greenroom.api("POST", "/api/label", single).await.ok();
    let cancel = format!("/api/label/batches/{id}/cancel");
    greenroom.api("POST", &cancel, Value::Null).await.ok();
    let path = format!("/api/label/batches/{id}");
    let view = wait_for_async("its stop", async || {
        let view = greenroom.get(&path).await.ok()["result"].clone();
        (view["status"] == "cancelled").then_some(view)
    })
    .await;
    let done = view["results"].as_array().unwrap().len();
    assert!(api.requests().len() <= before + 1 + done);
    let left = view["left"].as_u64().unwrap();
    assert_eq!(done as u64 + left, 40, "{view}");
    assert!(
        view["reason"].as_str().unwrap().contains("was cancelled"),
        "{view}"
    );
    // Taken up again while it is being cancelled it goes on, as far as it was meant to.
    let resume = format!("/api/label/batches/{id}/resume");
    let before = api.requests().len();
    greenroom.api("POST", &resume, Value::Null).await.ok();
    wait_for("a request of its", || {
        (api.requests().len() > before).then_some(())
    })
    .await;
    greenroom.api("POST", &cancel, Value::Null).await.ok();
    let body = json!({"retryFailed": true});
    let resumed = greenroom.api("POST", &resume, body).await.ok();
    assert_ne!(resumed["result"]["status"], "cancelled");
    assert_eq!(finished(&greenroom, id).await["success"], 40);
    for path in ["/api/label/batches/none", "/api/label/batches/../../x"] {
        assert_eq!(greenroom.get(path).await.status, 404, "{path}");
    }
    // Another tenant's container on the same workspace sees nothing of it.
    let options = greenroom.options.clone().env("CLIENT_ID", "globex");
    drop(greenroom);
    let other = TestGreenroom::start(options).await;
    other.get(&path).await.error(403, "not_this_tenant");
}

#[tokio::test]
async fn a_batch_has_one_image_under_way_while_somebody_s_turn_runs() {
    let lines = "DESCRIPTION: A board.\nNSFW: SAFE\nTAGS: board";
    let api = StandIn::start(json!({"rules": [
        {"match": "gently", "steps": [{"delay_ms": 400, "text": lines}]},
    ]}))
    .await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let options = Options::new(&folders).api(&api).env("CLIENT_ID", "acme");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let images: Vec<Value> = (0..60)
        .map(|number| json!({"data": STANDARD.encode(picture_of(number, 40, 30))}))
        .collect();
    let body = json!({"images": images, "prompt": "gently", "workers": 3});
    greenroom.api("POST", "/api/label/batches", body).await.ok();
    wait_for("its first requests", || {
        (api.requests_about("gently").len() >= 3).then_some(())
    })
    .await;
    let turn = greenroom
        .begin(&alice, "Think slowly for 300 seconds")
        .await;
    wait_for("the turn's request", || {
        (!api.requests_about("Think slowly").is_empty()).then_some(())
    })
    .await;
    // Three images were under way at most by then. The next one begins once they are all over: its is the
    // fourth request from here on at the latest.
    let requests = || api.requests_about("gently");
    let begun = requests().len();
    wait_for("a request that is alone", || {
        (requests().len() >= begun + 4).then_some(())
    })
    .await;
    let begun = requests().len();
    let mut most = 0;
    wait_for("more of its kind: the batch goes on", || {
        let requests = requests();
        let under_way = requests.iter().filter(|request| request.ended.is_none());
        most = most.max(under_way.count());
        (requests.len() >= begun + 3).then_some(())
    })
    .await;
    assert_eq!(most, 1);
    let cancel = format!("/api/turns/{turn}/cancel");
    greenroom.api("POST", &cancel, Value::Null).await.ok();
    let begun = requests().len();
    wait_for("requests after the turn", || {
        (requests().len() > begun + 2).then_some(())
    })
    .await;
}
