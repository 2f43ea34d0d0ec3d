//! The runs that label: one fresh process for each image, started ahead in a batch, and held to what
//! it may take of the machine.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{collections::BTreeSet, fs, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{
    label::{name_of, picture_of},
    label_batch::{cli_that, command, ran},
    support::{
        Folders, Options, StandIn, TestGreenroom, files_below, processes_below, wait_for,
        wait_for_async,
    },
};

const LINES: &str = "DESCRIPTION: A board.\nNSFW: SAFE\nTAGS: board";

/// So many photos, in their order.
fn photos(folders: &Folders, count: u32) -> Vec<Vec<u8>> {
    let folder = folders.join("home/photos");
    fs::create_dir_all(&folder).unwrap();
    let photos = (0..count).map(|number| {
        let photo = picture_of(number, 40, 30);
        fs::write(folder.join(format!("{number}.png")), &photo).unwrap();
        photo
    });
    photos.collect()
}

fn lines(output: &std::process::Output) -> Vec<Value> {
    let text = str::from_utf8(&output.stdout).unwrap();
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    lines.sort_by_key(|line| line["image"].as_str().unwrap().to_owned());
    lines
}

/// The CLIs that are running, by their process ids; not one that is asked for its version.
fn clis(folders: &Folders) -> BTreeSet<i32> {
    let script = folders.join("cli/claude");
    let script = script.to_str().unwrap();
    let running = processes_below(&folders.join(""));
    running
        .into_iter()
        .filter(|process| process.is_program("node") && process.command.contains(script))
        .filter(|process| !process.command.contains("--version"))
        .map(|process| process.pid)
        .collect()
}

#[tokio::test]
async fn a_run_that_takes_too_much_is_ended_alone() {
    let api = StandIn::start(json!({"rules": [{"match": "", "steps": [{"text": LINES}]}]})).await;
    let folders = Folders::new();
    let photos = photos(&folders, 6);
    let named: Vec<String> = photos.iter().map(|photo| name_of(photo)).collect();
    let acts = json!({&named[1]: "memory", &named[2]: "processor", &named[4]: "processes"});
    let does = r#"
  const data = Buffer.from(message.content[0].source.data, 'base64');
  const name = require('crypto').createHash('sha256').update(data).digest('hex').slice(0, 12);
  const act = ACTS[name];
  if (act === 'memory') {
    const held = [];
    const eat = () => { if (held.length < 40) held.push(Buffer.alloc(25 << 20, 1)); };
    setInterval(eat, 20);
    return;
  }
  if (act === 'processor') for (;;);
  if (act === 'processes') {
    for (let count = 0; count < 30; count++) {
      require('child_process').spawn('/bin/sleep', ['600'], { detached: true, stdio: 'ignore' });
    }
    setInterval(() => {}, 1000);
    return;
  }
"#;
    let cli = cli_that(&folders, &does.replace("ACTS", &acts.to_string()));
    let mut label = command(
        &folders,
        &cli,
        &api,
        &["photos", "--jsonl", "--prompt", "Look"],
    );
    label
        .env("LABEL_MEMORY_MB", "400")
        .env("LABEL_CPU_SECONDS", "8")
        .env("LABEL_MAX_PROCESSES", "12");
    let output = ran(label).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines = lines(&output);
    assert_eq!(lines.len(), 6, "{output:?}");
    for (at, said) in [
        (
            1,
            "held more than 400 MB of memory and was stopped; the operator can allow more by LABEL_MEMORY_MB",
        ),
        (2, "used more than 8 s of processor time"),
        (4, "had more than 12 processes"),
    ] {
        assert_eq!(lines[at]["code"], "agent_failed", "{}", lines[at]);
        assert_eq!(lines[at]["paid"], false, "{}", lines[at]);
        let message = lines[at]["message"].as_str().unwrap();
        assert!(message.contains(said), "{message}");
    }
    for at in [0, 3, 5] {
        assert_eq!(lines[at]["status"], "success", "{}", lines[at]);
    }
    // Not one was tried again: the same would come of it.
    assert_eq!(api.requests().len(), 3);
    assert_eq!(clis(&folders), BTreeSet::new());
    let left = processes_below(&folders.join(""));
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn the_next_process_starts_while_the_model_thinks_and_serves_one_image() {
    const THINKING: i64 = 4000;
    let slow = json!({"delay_ms": THINKING, "text": LINES});
    let api = StandIn::start(json!({"rules": [{"match": "", "steps": [slow]}]})).await;
    let folders = Folders::new();
    photos(&folders, 4);
    // When it was started, by its own clock, which is ours.
    let does = r#"
  const born = Math.round(performance.timeOrigin);
  message.content[1].text = `born ${born} pid ${process.pid}`;
"#;
    let cli = cli_that(&folders, does);
    let args = ["photos", "--jsonl", "--prompt", "Look", "--workers", "1"];
    let label = command(&folders, &cli, &api, &args).spawn().unwrap();

    let asked = async |count: usize| {
        wait_for("a request", || {
            (api.requests().len() >= count).then_some(())
        })
        .await;
    };
    asked(1).await;
    let both = wait_for("a second CLI", || {
        let running = clis(&folders);
        (running.len() == 2).then_some(running)
    })
    .await;
    // One that ends while it waits is nobody's failure.
    let first: i32 = word(&api.requests()[0].instruction, "pid")
        .try_into()
        .unwrap();
    let waiting = both.into_iter().find(|pid| *pid != first).unwrap();
    kill(Pid::from_raw(waiting), Signal::SIGKILL).unwrap();
    asked(2).await;
    asked(4).await;
    // After the last image there is none, so nothing waits for it.
    let last: i32 = word(&api.requests()[3].instruction, "pid")
        .try_into()
        .unwrap();
    let is_under_way = || api.requests()[3].ended.is_none();
    let mut looks = 0;
    while is_under_way() {
        let running = clis(&folders);
        assert!(
            running.iter().all(|pid| *pid == last) || !is_under_way(),
            "{running:?} {last}"
        );
        looks += 1;
        sleep(Duration::from_millis(50)).await;
    }
    assert!(looks > 0);
    let output = label.wait_with_output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        lines(&output)
            .iter()
            .all(|line| line["status"] == "success")
    );

    let requests = api.requests();
    assert_eq!(requests.len(), 4);
    let pids: BTreeSet<i64> = requests
        .iter()
        .map(|request| word(&request.instruction, "pid"))
        .collect();
    assert_eq!(pids.len(), 4, "each image has a process of its own");
    // The third and the fourth began while the one before was thought about.
    for at in [2, 3] {
        let born = word(&requests[at].instruction, "born");
        let before = requests[at - 1].at.as_millisecond();
        assert!(born < before + THINKING, "{born} {before}");
    }
    assert_eq!(clis(&folders), BTreeSet::new());
    let left = files_below(&folders.join("tmp"));
    assert!(
        !left
            .iter()
            .any(|file| file.components().any(|part| part.as_os_str() == "labels")),
        "{left:?}"
    );
}

#[tokio::test]
async fn a_run_is_over_with_its_result_and_a_batch_leaves_nothing_behind() {
    let slow = json!({"delay_ms": 3000, "text": LINES});
    let rules = json!([
        {"match": "slowly", "steps": [slow]},
        {"match": "", "steps": [{"text": LINES}]},
    ]);
    let api = StandIn::start(json!({"rules": rules})).await;
    let folders = Folders::new();
    // One that stays when all is said.
    let cli = cli_that(&folders, "setInterval(() => {}, 1000);");
    let options = Options::new(&folders)
        .api(&api)
        .env("CLIENT_ID", "acme")
        .env("CLAUDE_CLI_TIMEOUT", "60")
        .env("CLAUDE_BIN", cli);
    let greenroom = TestGreenroom::start(options).await;
    let image = |number| json!({"data": STANDARD.encode(picture_of(number, 40, 30))});
    let single = json!({"image": image(0), "prompt": "Look"});
    let body = greenroom.api("POST", "/api/label", single).await.ok();
    assert_eq!(body["status"], "success", "{body}");
    assert_eq!(
        clis(&folders),
        BTreeSet::new(),
        "nothing is started ahead for one"
    );

    let images: Vec<Value> = (1..13).map(image).collect();
    let body = json!({"images": images, "prompt": "Look slowly", "workers": 2});
    let taken = greenroom.api("POST", "/api/label/batches", body).await.ok();
    let id = taken["batchId"].as_str().unwrap().to_owned();
    let most = wait_for("CLIs that wait", || {
        let running = clis(&folders).len();
        (running > 2).then_some(running)
    })
    .await;
    assert!(most <= 4, "{most}");
    let cancel = format!("/api/label/batches/{id}/cancel");
    greenroom.api("POST", &cancel, Value::Null).await.ok();
    let path = format!("/api/label/batches/{id}");
    wait_for_async("its stop", async || {
        let view = greenroom.get(&path).await.ok()["result"].clone();
        (view["status"] == "cancelled").then_some(())
    })
    .await;
    // Long before they would go by themselves.
    let gone = async {
        while !clis(&folders).is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(40), gone).await.unwrap();
}

#[tokio::test]
async fn what_a_rehearsal_said_of_an_image_is_no_label_of_it() {
    let api = StandIn::start(json!({"rules": [{"match": "", "steps": [{"text": LINES}]}]})).await;
    let folders = Folders::new();
    photos(&folders, 2);
    let cli = cli_that(&folders, "");
    let rehearsed = command(&folders, &cli, &api, &["photos", "--jsonl", "--rehearsal"]);
    let rehearsed = ran(rehearsed).await;
    assert!(rehearsed.status.success(), "{rehearsed:?}");
    let said = |output| lines(output)[0]["description"].as_str().unwrap().to_owned();
    assert!(said(&rehearsed).contains("nobody looked at"));
    assert!(api.requests().is_empty());
    // The same command, and a model.
    let labelled = ran(command(&folders, &cli, &api, &["photos", "--jsonl"])).await;
    assert!(labelled.status.success(), "{labelled:?}");
    assert_eq!(said(&labelled), "A board.");
    assert_eq!(api.requests().len(), 2);
}

/// The number behind a word.
fn word(text: &str, name: &str) -> i64 {
    let mut words = text.split_whitespace().skip_while(|word| *word != name);
    words
        .nth(1)
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("{text}"))
}
