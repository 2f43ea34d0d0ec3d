//! `greenroom hf` against a stand-in for the Hub, which the official Python client is run through too.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::{process::Command, time::timeout};

use crate::support::{
    Content, Folders, HF_TOKEN, HF_TOKEN_READ, HubStandIn, PATIENCE, Repository, holds, hub_client,
};

/// `greenroom hf` with nothing but a home: no workspace, no Node, no supervisor.
pub(crate) fn command(folders: &Folders, hub: &HubStandIn, args: &[&str]) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
    command
        .arg("hf")
        .args(args)
        .current_dir(folders.join("home"))
        .env_clear()
        .env("HOME", folders.join("home"))
        .env("HF_ENDPOINT", hub.url())
        .env("HF_TOKEN", HF_TOKEN)
        // It is not for addresses of this machine.
        .env("HTTPS_PROXY", "http://127.0.0.1:9")
        .env("HTTP_PROXY", "http://127.0.0.1:9")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub(crate) async fn ran(mut command: Command) -> Output {
    let output = timeout(PATIENCE, command.output()).await;
    let output = output.expect("it ends").unwrap();
    let words = [output.stdout.clone(), output.stderr.clone()].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    assert!(!words.contains("hf_canary"), "{words}");
    output
}

pub(crate) fn publish(folders: &Folders, hub: &HubStandIn, more: &[&str]) -> Command {
    let args = [
        "publish-hf-lora",
        "--name",
        "pots",
        "--source-dir",
        "my_lora",
    ];
    command(folders, hub, &[&args, more].concat())
}

/// What `--json` printed.
#[track_caller]
pub(crate) fn told(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// The one line in which it failed.
#[track_caller]
pub(crate) fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let line = text.lines().next_back().unwrap_or_default();
    line.strip_prefix("greenroom: ")
        .unwrap_or_else(|| panic!("{text}"))
        .to_owned()
}

/// Bytes that differ from each other, and by `seed`.
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let bytes = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    });
    bytes.take(size).collect()
}

const CONFIG: &str = "
config:
  process:
  - trigger_word: p0ts
    model: {name_or_path: black-forest-labs/FLUX.1-dev}
    sample: {prompts: ['[trigger] on a shelf', 'a cup']}
";

/// A finished training: a model, checkpoints, samples of two prompts at two steps.
pub(crate) fn training(folders: &Folders) -> PathBuf {
    let folder = folders.join("home/my_lora");
    fs::create_dir_all(folder.join("samples")).unwrap();
    let write = |name: &str, content: &[u8]| fs::write(folder.join(name), content).unwrap();
    write("my_lora.safetensors", &noise(1, 300_000));
    write("my_lora_000001000.safetensors", &noise(2, 1000));
    write("my_lora_000002000.safetensors", &noise(3, 1000));
    write("optimizer.pt", b"state");
    write("config.yaml", CONFIG.as_bytes());
    for (name, seed, size) in [
        ("1737531308253__000000250_0.jpg", 4, 500),
        ("1737531308253__000000250_1.jpg", 5, 500),
        ("1737531309000__000002000_0.jpg", 6, 700),
        // Large enough for the storage.
        ("1737531309000__000002000_1.jpg", 7, 200_000),
    ] {
        write(&format!("samples/{name}"), &noise(seed, size));
    }
    folder
}

pub(crate) const FILES: [&str; 4] = [
    "README.md",
    "my_lora.safetensors",
    "samples/1737531309000__000002000_0.jpg",
    "samples/1737531309000__000002000_1.jpg",
];

/// What the repository has is what the folder has.
#[track_caller]
pub(crate) fn holds_all_of(repository: &Repository, folder: &Path) {
    let names: Vec<&str> = repository.files.keys().map(String::as_str).collect();
    assert_eq!(names, [&[".gitattributes"], &FILES[..]].concat());
    for name in &FILES[1..] {
        let content = fs::read(folder.join(name)).unwrap();
        let expected = match content.len() > 10_000 {
            true => Content::Large {
                sha256: hex::encode(sha2::Sha256::digest(&content)),
                size: content.len() as u64,
            },
            false => Content::Inline(content),
        };
        assert_eq!(repository.files[*name], expected, "{name}");
    }
}

#[tokio::test]
async fn a_lora_is_published_once_and_the_second_time_nothing_is_done() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    let first = ran(publish(&folders, &hub, &[])).await;
    assert!(first.status.success(), "{first:?}");
    let said = String::from_utf8(first.stdout).unwrap();
    for words in [
        "pots (private)",
        "300.0 kB  model",
        "sample of prompt 1, step 2000",
        "Left out: 2 checkpoints, 2 earlier samples, 2 other files.",
        "Published: ",
        "/alice/pots (private), 4 files, 500.0 kB uploaded",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let repository = hub.repository("alice/pots");
    assert!(repository.private);
    assert_eq!(repository.commits, ["Publish my_lora.safetensors"]);
    holds_all_of(&repository, &folder);
    let card = repository.text("README.md");
    for words in [
        "base_model: \"black-forest-labs/FLUX.1-dev\"",
        "- text: \"p0ts on a shelf\"",
        "url: \"samples/1737531309000__000002000_0.jpg\"",
        "<Gallery />",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }
    assert_eq!(
        hub.state().leaked,
        Vec::<String>::new(),
        "what the storage has no need of"
    );

    let puts = hub.count("PUT ");
    assert_eq!((puts, hub.state().with_headers), (2, 2));
    let second = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(second["files"], json!([]));
    assert_eq!(second["unchanged"].as_array().unwrap().len(), 4);
    assert_eq!(
        (&second["created"], &second["uploadedBytes"]),
        (&json!(false), &json!(0))
    );
    let third = ran(publish(&folders, &hub, &[])).await;
    assert!(
        String::from_utf8(third.stdout)
            .unwrap()
            .contains("Already up to date: ")
    );
    assert_eq!((hub.count("PUT "), hub.count("/commit/")), (puts, 1));

    // What changed goes up, and nothing else.
    fs::write(
        folder.join("samples/1737531310000__000003000_0.jpg"),
        noise(9, 900),
    )
    .unwrap();
    let changed = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(
        changed["files"],
        json!(["samples/1737531310000__000003000_0.jpg", "README.md"])
    );
    assert_eq!(hub.count("PUT "), puts);

    // By its content: what was trained again is as large as before.
    let model = noise(11, 300_000);
    fs::write(folder.join("my_lora.safetensors"), &model).unwrap();
    let sample = "samples/1737531310000__000003000_0.jpg";
    fs::write(folder.join(sample), noise(12, 900)).unwrap();
    let changed = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(changed["files"], json!(["my_lora.safetensors", sample]));
    let repository = hub.repository("alice/pots");
    assert_eq!(repository.files[sample], Content::Inline(noise(12, 900)));
    let stored = Content::Large {
        sha256: hex::encode(sha2::Sha256::digest(&model)),
        size: 300_000,
    };
    assert_eq!(repository.files["my_lora.safetensors"], stored);
}

#[tokio::test]
async fn what_passes_is_waited_for_and_a_commit_is_made_once() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    hub.state().faults = vec![
        ("whoami", 429),
        ("create", 503),
        ("preupload", 500),
        ("batch", 502),
        ("storage", 500),
        // An address that is good no more: another one is asked for.
        ("storage", 403),
        ("verify", 503),
    ];
    hub.state().lost_answers = 1;
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(
        published["files"].as_array().unwrap().len(),
        4,
        "{published}"
    );
    let repository = hub.repository("alice/pots");
    assert_eq!(repository.commits.len(), 1);
    holds_all_of(&repository, &folder);
    assert!(hub.state().faults.is_empty());
}

#[tokio::test]
async fn what_others_commit_meanwhile_stays() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().others_commit = true;
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(published["files"].as_array().unwrap().len(), 4);
    let repository = hub.repository("alice/pots");
    assert_eq!(
        repository.commits,
        ["Somebody else's", "Publish my_lora.safetensors"]
    );
    assert_eq!(repository.text("theirs.txt"), "theirs");
    // The first one named a parent that was the newest no more.
    assert_eq!((hub.count("/commit/"), hub.count("PUT ")), (2, 2));
}

#[tokio::test]
async fn what_the_hub_does_not_want_as_it_is_is_told() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().ignores = Some(".jpg");
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(
        line.contains("keeps samples/1737531309000__000002000_0.jpg out"),
        "{line}"
    );
    hub.state().ignores = None;
    assert!(hub.repository("alice/pots").commits.is_empty());
    // Of a repository that has another name by now.
    hub.state().faults = vec![("api/models/alice/pots", 307)];
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(line.contains("alice/pots is elsewhere now"), "{line}");
    assert_eq!((hub.count("/commit/"), hub.received()), (0, 0));
}

#[tokio::test]
async fn a_token_that_is_refused_is_told_with_what_to_do() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    let with = async |token: &str| {
        let mut command = publish(&folders, &hub, &[]);
        failure(
            &ran(match token {
                "" => {
                    command.env_remove("HF_TOKEN");
                    command
                }
                token => {
                    command.env("HF_TOKEN", token);
                    command
                }
            })
            .await,
        )
    };
    let settings = format!("{}/settings/tokens", hub.url());
    for (token, said) in [
        ("hf_canaryRevoked00000000", "refused HF_TOKEN (401)"),
        (HF_TOKEN_READ, "HF_TOKEN may only read"),
        ("", "HF_TOKEN is not set"),
    ] {
        let line = with(token).await;
        assert!(line.contains(said) && line.contains(&settings), "{line}");
    }
    assert!(hub.state().repositories.is_empty());
    // It is not sent in the clear to others.
    let mut clear = publish(&folders, &hub, &[]);
    clear.env("HF_ENDPOINT", "http://mirror.invalid");
    let line = failure(&ran(clear).await);
    assert!(line.contains("use https"), "{line}");
    let mut nobody = publish(&folders, &hub, &[]);
    nobody.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let line = failure(&ran(nobody).await);
    assert!(
        line.contains("no answer to") && line.contains("HTTPS_PROXY"),
        "{line}"
    );
}

#[tokio::test]
async fn a_name_that_is_taken_is_gone_on_with_only_as_it_was_asked() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    let add = |private| {
        let repository = Repository {
            private,
            ..Repository::default()
        };
        hub.state()
            .repositories
            .insert("alice/pots".to_owned(), repository);
    };
    // Never does something become public, or stay so, that was to be private.
    add(false);
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(
        line.contains("alice/pots is public, and was to be private"),
        "{line}"
    );
    add(true);
    let line = failure(&ran(publish(&folders, &hub, &["--private", "false"])).await);
    assert!(line.contains("makes nothing public"), "{line}");
    assert_eq!((hub.received(), hub.count("/commit/")), (0, 0));
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(
        (&published["created"], &published["private"]),
        (&json!(false), &json!(true))
    );

    // In an organisation of hers, and in nobody else's.
    let named = |name: &'static str| {
        let args = [
            "publish-hf-lora",
            "--source-dir",
            "my_lora",
            "--json",
            "--private=false",
            "--name",
        ];
        command(&folders, &hub, &[&args[..], &[name]].concat())
    };
    let published = told(&ran(named("Acme/pots")).await);
    assert_eq!(published["repository"], "acme/pots");
    let repository = hub.repository("acme/pots");
    assert!(!repository.private);
    holds_all_of(&repository, &folder);
    let line = failure(&ran(named("bob/pots")).await);
    assert!(
        line.contains("does not belong to bob: name one of yours (alice, acme)"),
        "{line}"
    );
    let wrong = ran(named("a/../b")).await;
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[tokio::test]
async fn a_token_that_may_create_nothing_may_write_to_what_is_there() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().faults = vec![("create", 403)];
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(line.contains("HF_TOKEN may not do that"), "{line}");
    let private = Repository {
        private: true,
        ..Repository::default()
    };
    let name = "alice/pots".to_owned();
    hub.state().repositories.insert(name, private);
    hub.state().faults = vec![("create", 403)];
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(published["created"], false);
    let repository = hub.repository("alice/pots");
    assert!(
        FILES[1..]
            .iter()
            .all(|name| repository.files.contains_key(*name))
    );
}

#[tokio::test]
async fn how_long_the_hub_asks_to_wait_is_told() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().faults = vec![("create", 429)];
    hub.state().wait = 7_000;
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(
        line.contains("429") && line.ends_with("in 117 minutes"),
        "{line}"
    );
}

#[tokio::test]
async fn a_card_that_somebody_edited_is_kept() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    ran(publish(&folders, &hub, &[])).await;
    let edited = hub.repository("alice/pots").text("README.md") + "\nCall us.\n";
    {
        let mut state = hub.state();
        let repository = state.repositories.get_mut("alice/pots").unwrap();
        let content = Content::Inline(edited.clone().into_bytes());
        repository.files.insert("README.md".to_owned(), content);
    }
    fs::write(
        folder.join("samples/1737531310000__000003000_0.jpg"),
        noise(9, 900),
    )
    .unwrap();
    let kept = ran(publish(&folders, &hub, &[])).await;
    let said = String::from_utf8(kept.stdout).unwrap();
    assert!(said.contains("edited on the Hub and is kept"), "{said}");
    assert_eq!(hub.repository("alice/pots").text("README.md"), edited);
    let replaced = told(&ran(publish(&folders, &hub, &["--replace-card", "--json"])).await);
    assert_eq!(replaced["files"], json!(["README.md"]));
    assert!(
        !hub.repository("alice/pots")
            .text("README.md")
            .contains("Call us.")
    );
}

#[tokio::test]
async fn a_dry_run_asks_nobody() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    let dry = |more: &[&str]| {
        let mut command = publish(&folders, &hub, &[&["--dry-run"], more].concat());
        command.env_remove("HF_TOKEN").env("PATH", "/nonexistent");
        command
    };
    let output = ran(dry(&[])).await;
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("README.md") && said.contains("Left out: 2 checkpoints"),
        "{said}"
    );
    let listed = told(&ran(dry(&["--json"])).await);
    let names = listed["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| &file["name"]);
    let mut names: Vec<&str> = names.map(|name| name.as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!((names, &listed["private"]), (FILES.to_vec(), &json!(true)));
    assert!(hub.state().asked.is_empty());

    // What cannot be published is told before anybody is asked, too.
    fs::rename(folder.join("my_lora.safetensors"), folders.join("secret")).unwrap();
    symlink(folders.join("secret"), folder.join("my_lora.safetensors")).unwrap();
    let line = failure(&ran(dry(&[])).await);
    assert!(
        line.contains("--model-file my_lora_000002000.safetensors"),
        "{line}"
    );
    fs::remove_dir_all(&folder).unwrap();
    let line = failure(&ran(dry(&[])).await);
    assert!(line.contains("my_lora is no folder"), "{line}");
    assert!(hub.state().asked.is_empty());
}

#[tokio::test]
async fn models_are_listed_with_their_privacy() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    for number in 0..8 {
        let repository = Repository {
            private: number % 2 == 0,
            ..Repository::default()
        };
        hub.state()
            .repositories
            .insert(format!("alice/m{number}"), repository);
    }
    hub.state()
        .repositories
        .insert("acme/x\u{1b}[2J".to_owned(), Repository::default());
    let list = |more: &[&str]| command(&folders, &hub, &[&["list-models"], more].concat());
    let table = ran(list(&[])).await;
    assert!(table.status.success(), "{table:?}");
    let table = String::from_utf8(table.stdout).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 9, "{table}");
    assert_eq!(lines[0], "Model     Privacy  Downloads  Likes  Changed");
    assert_eq!(lines[1], "alice/m0  private          0      0  2026-11-20");
    assert_eq!(lines[2], "alice/m1  public       1,234      1  2026-11-20");
    let listed = told(&ran(list(&["--json", "--limit", "4"])).await);
    let ids: Vec<&Value> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(ids, ["alice/m0", "alice/m1", "alice/m2", "alice/m3"]);
    let others = ran(list(&["--author", "acme"])).await;
    assert!(!others.stdout.contains(&0x1b), "{others:?}");
    // Without a token what everybody sees.
    let mut anyone = list(&["--author", "alice", "--json"]);
    anyone.env_remove("HF_TOKEN");
    assert_eq!(told(&ran(anyone).await).as_array().unwrap().len(), 4);
    let mut nobody = list(&[]);
    nobody.env_remove("HF_TOKEN");
    let line = failure(&ran(nobody).await);
    assert!(line.contains("--author"), "{line}");
    assert_eq!(ran(list(&["--author", "a/b"])).await.status.code(), Some(2));
}

/// The official client does with the same server what we do, and we find its work done.
#[tokio::test]
async fn the_official_client_publishes_the_same_through_the_stand_in() {
    const SCRIPT: &str = "
import os
from huggingface_hub import HfApi
api = HfApi()
assert api.whoami()['name'] == 'alice'
api.create_repo('alice/pots', private=True)
api.create_repo('alice/pots', private=True, exist_ok=True)
wanted = os.environ['WANTED'].split('\\n')
for _ in range(2):
    api.upload_folder(repo_id='alice/pots', folder_path='my_lora', allow_patterns=wanted)
paths = {file.path for file in api.list_repo_tree('alice/pots', recursive=True)}
assert set(wanted) <= paths, paths
assert api.model_info('alice/pots').private
assert [model.id for model in api.list_models(author='alice')] == ['alice/pots']
";
    let Some(client) = hub_client() else { return };
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    for parts in [None, Some(70_000)] {
        *hub.state() = Default::default();
        hub.state().part_bytes = parts;
        #[expect(clippy::disallowed_methods, reason = "the client that everybody has")]
        let mut python = Command::new("/usr/bin/env");
        python
            .args(["python3", "-c", SCRIPT])
            .current_dir(folders.join("home"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", folders.join("home"))
            .env("PYTHONPATH", &client)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("HF_ENDPOINT", hub.url())
            .env("HF_TOKEN", HF_TOKEN)
            // Their storage of chunks is no part of what we speak.
            .env("HF_HUB_DISABLE_XET", "1")
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .env("WANTED", FILES[1..].join("\n"))
            .kill_on_drop(true);
        let output = timeout(PATIENCE, python.output())
            .await
            .expect("it ends")
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(
            hub.repository("alice/pots").commits.len(),
            1,
            "its second time is none"
        );
        let puts = hub.count("PUT ");
        assert_eq!(puts, if parts.is_some() { 5 + 3 } else { 2 });

        let ours = told(&ran(publish(&folders, &hub, &["--json"])).await);
        assert_eq!(ours["files"], json!(["README.md"]));
        assert_eq!(hub.count("PUT "), puts);
        holds_all_of(&hub.repository("alice/pots"), &folder);
    }
}

#[tokio::test]
async fn the_token_stays_out_of_every_file() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    let more = ["--log-level", "trace", "--log-file", "greenroom.log"];
    for parts in [None, Some(70_000)] {
        *hub.state() = Default::default();
        hub.state().part_bytes = parts;
        let output = ran(publish(&folders, &hub, &more)).await;
        assert!(output.status.success());
        for file in crate::support::files_below(&folders.join("")) {
            assert!(!holds(&file, HF_TOKEN), "{}", file.display());
            // Nor what lets whoever reads it upload in our place.
            assert!(!holds(&file, "s3cret"), "{}", file.display());
        }
        assert!(!String::from_utf8_lossy(&output.stderr).contains("s3cret"));
    }
}
