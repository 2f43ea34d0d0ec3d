//! `--log-file`: what is in it, who may read it, what happens when it is full.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Output,
    time::Duration,
};

use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crate::{
    hub::{command, publish, training},
    label::picture_of,
    support::{Folders, HF_TOKEN, HubStandIn, Options, PATIENCE, TestGreenroom},
};

async fn ran(mut command: Command) -> Output {
    let output = timeout(PATIENCE, command.output()).await;
    output.expect("it ends").unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
        .collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn the_file_says_what_was_done_and_why_it_failed_and_no_secret() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    let path = folders.join("home/greenroom.log");
    let done = ran(publish(&folders, &hub, &["--log-file", "greenroom.log"])).await;
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    let mut revoked = publish(&folders, &hub, &["--log-file", "greenroom.log"]);
    // Somebody puts it where it does not belong, and an error repeats it.
    let secret = "hf_canaryRevoked00000000";
    revoked.env("HF_TOKEN", secret);
    hub.state().faults = vec![("whoami", 403)];
    hub.state().words = Some(format!("no rights for {secret}"));
    let failed = ran(revoked).await;
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let text = fs::read_to_string(&path).unwrap();
    let lines = lines(&text);
    let uploaded = lines.iter().filter(|line| line["message"] == "uploaded");
    assert_eq!(uploaded.count(), 2, "{text}");
    let last = lines.last().unwrap();
    let words = last["message"].as_str().unwrap();
    assert_eq!(last["level"], "error");
    assert!(words.contains("no rights for ***"), "{words}");
    let said = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(said.trim_end(), words, "and standard error says it once");
    assert!(!text.contains("hf_canary") && !text.contains(HF_TOKEN));
    assert_eq!(mode(&path), 0o600);
}

#[tokio::test]
async fn a_full_file_is_packed_and_begun_anew() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    let at = |name: &str| folders.join("home").join(name);
    let old = "an older line\n".repeat(9_999_990 / 14);
    fs::write(at("greenroom.log"), &old).unwrap();
    for number in 1..=5 {
        fs::write(
            at(&format!("greenroom.log.{number}.gz")),
            number.to_string(),
        )
        .unwrap();
    }
    let done = ran(publish(&folders, &hub, &["--log-file", "greenroom.log"])).await;
    assert!(done.status.success(), "{done:?}");
    let text = fs::read_to_string(at("greenroom.log")).unwrap();
    assert!(
        lines(&text)
            .iter()
            .any(|line| line["message"] == "uploaded"),
        "{text}"
    );
    let mut packed = String::new();
    let file = File::open(at("greenroom.log.1.gz")).unwrap();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut packed)
        .unwrap();
    assert!(packed.starts_with(&old));
    assert_eq!(mode(&at("greenroom.log.1.gz")), 0o600);
    // The oldest went.
    assert_eq!(fs::read_to_string(at("greenroom.log.5.gz")).unwrap(), "4");
    let logs = fs::read_dir(at("")).unwrap().flatten();
    let logs = logs.filter(|entry| {
        entry
            .file_name()
            .to_string_lossy()
            .starts_with("greenroom.log")
    });
    assert_eq!(logs.count(), 6);
}

#[tokio::test]
async fn a_full_disk_holds_nobody_up() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    fs::create_dir(folders.join("home/logs")).unwrap();
    let publishes = publish(&folders, &hub, &["--log-file", "logs/greenroom.log"]);
    let publishes = publishes.as_std();
    #[expect(
        clippy::disallowed_methods,
        reason = "a disk of its own for the program under test"
    )]
    let mut full = Command::new("unshare");
    full.args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .arg("mount -t tmpfs -o size=64k,mode=700 none logs && head -c 99999 /dev/zero > logs/fill; exec \"$@\"")
        .arg("sh")
        .arg(publishes.get_program())
        .args(publishes.get_args())
        .current_dir(folders.join("home"))
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .kill_on_drop(true);
    for (name, value) in publishes.get_envs() {
        if let Some(value) = value {
            full.env(name, value);
        }
    }
    let done = ran(full).await;
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("lines are missing in LOG_FILE"), "{said}");
    assert_eq!(hub.repository("alice/pots").commits.len(), 1);
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_told_before_anything_is_done() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    for path in ["nowhere/greenroom.log", "/dev/full", "."] {
        let failed = ran(command(
            &folders,
            &hub,
            &["list-models", "--log-file", path],
        ))
        .await;
        assert_eq!(failed.status.code(), Some(1), "{failed:?}");
        let said = String::from_utf8(failed.stderr).unwrap();
        assert!(
            said.starts_with("greenroom: LOG_FILE: failed to open"),
            "{said}"
        );
    }
    assert!(hub.state().asked.is_empty());
}

#[tokio::test]
async fn every_command_that_asks_somebody_says_there_why_it_failed() {
    let folders = Folders::new();
    let home = folders.join("home");
    fs::write(home.join("a.png"), picture_of(1, 40, 30)).unwrap();
    fs::write(home.join("index.html"), "<img src=a.png>").unwrap();
    let commands: [&[&str]; 4] = [
        &["hf", "list-models"],
        &["replicate", "run-model", "acme/pots", "--param", "prompt:x"],
        &["label", "a.png"],
        &["alt-text", "."],
    ];
    for args in commands {
        let path = home.join("greenroom.log");
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
        // No token and no CLI: nothing of it can work.
        command
            .args(args)
            .args(["--log-file", "greenroom.log"])
            .current_dir(&home)
            .env_clear()
            .env("HOME", &home)
            .env("PATH", "/nonexistent")
            .kill_on_drop(true);
        let failed = ran(command).await;
        assert_eq!(failed.status.code(), Some(1), "{args:?}: {failed:?}");
        let said = String::from_utf8(failed.stderr).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let lines = lines(&text);
        let last = lines.last().unwrap_or_else(|| panic!("{args:?}: {said}"));
        assert_eq!(last["level"], "error", "{args:?}: {text}");
        let words = last["message"].as_str().unwrap();
        assert_eq!(said.lines().last(), Some(words), "{args:?}");
        assert_eq!(mode(&path), 0o600);
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn the_service_logs_there_too() {
    let folders = Folders::new();
    let path = folders.join("service.log");
    let options = Options::new(&folders).rehearsal().env("LOG_FILE", &path);
    let mut greenroom = TestGreenroom::start(options).await;
    let ended = timeout(PATIENCE + Duration::from_secs(1), greenroom.stop()).await;
    assert!(ended.unwrap().success());
    let text = fs::read_to_string(&path).unwrap();
    let lines = lines(&text);
    assert!(lines.len() >= 2 && lines[0]["level"] == "info", "{text}");
}
