//! Alt text: `POST …/alt-text` and `greenroom alt-text` against a scripted API that knows what it was
//! asked.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{fs, path::PathBuf, process::Stdio};

use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use crate::{
    label::picture_of,
    label_batch::quick_cli,
    support::{
        Answer, CANARY, Folders, Options, PATIENCE, SITE, Sent, StandIn, TestGreenroom, Who, git,
        rule, stream, tools, wait_for, who, writes,
    },
};

const PAGE: &str = "src/pages/team.astro";

/// A page with all that there is to be told apart, in German.
const TEAM: &str = r#"---
import { Image } from 'astro:assets';
import kiln from '../assets/kiln.png';
const stays = '<img src="/cup.png">';
---
<html lang="de">
<body>
  <h1>Die Werkstatt</h1>
  <!-- <img src="/cup.png"> -->
  <Image
    src={kiln}
    width={400}
  />
  <p>Unser Ofen brennt zweimal im Monat.</p>
  <img src="/cup.png" alt="">
  <img src="/cup.png">
  <img src="/logo.png" alt="Logo">
  <img src="/line.png" alt="" role="presentation">
  <img src={stays}>
  <img src="https://example.com/a.png" alt="">
</body>
</html>
"#;

/// What the model says of an image, as callers of old read it.
fn says(image: &str, description: &str, rating: &str) -> Value {
    let text = format!("DESCRIPTION: {description}\nNSFW: {rating}\nTAGS: pot");
    json!({"match": image, "steps": [{"text": text}]})
}

struct Stage {
    api: StandIn,
    folders: Folders,
    greenroom: TestGreenroom,
    alice: Who,
}

impl Stage {
    /// A thread with the page and its images: each another picture.
    async fn new(rules: Vec<Value>) -> Self {
        let api = StandIn::start(json!({ "rules": rules })).await;
        let folders = Folders::new();
        let mut files = SITE.to_vec();
        files.push((PAGE, TEAM));
        let site = folders.site("site", &files);
        for (at, image) in [
            "src/assets/kiln.png",
            "public/cup.png",
            "public/logo.png",
            "public/line.png",
        ]
        .iter()
        .enumerate()
        {
            let path = PathBuf::from(&site).join(image);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, picture_of(at as u32, 60, 40)).unwrap();
        }
        git(&site, &["add", "--all"]);
        git(&site, &["commit", "--quiet", "--message=Images"]);
        let cli = quick_cli(&folders);
        let options = Options::new(&folders)
            .api(&api)
            .env("CLAUDE_BIN", cli)
            .env("MAX_WARM_AGENTS", "0");
        let greenroom = TestGreenroom::start(options).await;
        let alice = who("acme", "alice", "main");
        greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
        Self {
            api,
            folders,
            greenroom,
            alice,
        }
    }

    fn path(&self, what: &str) -> String {
        format!("{}/{what}", self.alice.path())
    }

    async fn ask(&self, body: Value) -> Answer {
        self.greenroom
            .api("POST", &self.path("alt-text"), body)
            .await
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folders.worktree(&self.alice).join(path)
    }

    fn page(&self) -> String {
        fs::read_to_string(self.at(PAGE)).unwrap()
    }

    fn git(&self, args: &[&str]) -> String {
        git(self.folders.worktree(&self.alice), args)
    }
}

fn two() -> Vec<Value> {
    vec![
        says("kiln.png", "Ein Ofen aus Ziegeln.", "SAFE"),
        says("cup.png", "Eine gelbe Tasse.", "SAFE"),
    ]
}

/// The page as it is with these texts.
fn with_texts(kiln: &str, cup: &str) -> String {
    TEAM.replace("src={kiln}\n", &format!("src={{kiln}}\n    {kiln}\n"))
        .replace(
            "<img src=\"/cup.png\" alt=\"\">",
            &format!("<img src=\"/cup.png\" {cup}>"),
        )
        .replace(
            "  <img src=\"/cup.png\">\n",
            &format!("  <img src=\"/cup.png\" {cup}>\n"),
        )
}

#[tokio::test]
async fn images_get_texts_by_one_turn_that_is_undone_like_any_other() {
    let stage = Stage::new(two()).await;
    let before = stage.git(&["rev-parse", "HEAD"]);

    let dry = stage.ask(json!({"dryRun": true})).await.ok()["result"].take();
    assert_eq!(
        (&dry["dryRun"], &dry["images"]),
        (&json!(true), &json!(2)),
        "{dry}"
    );
    assert!(dry["worstCaseUsd"].as_f64().unwrap() > 0.0);
    assert_eq!(dry["report"]["done"].as_array().unwrap().len(), 3);
    assert_eq!(
        (stage.page(), stage.api.requests().len()),
        (TEAM.to_owned(), 0)
    );

    let path = stage.path("alt-text");
    let sent = || {
        let body = json!({"author": {"name": "Alice", "email": "alice@acme.example"}});
        Sent::new("POST", &path, &body).header("idempotency-key", "once")
    };
    let turn = stage.greenroom.send(sent()).await.ok()["result"].take();
    let expected = with_texts("alt=\"Ein Ofen aus Ziegeln.\"", "alt=\"Eine gelbe Tasse.\"");
    assert_eq!(stage.page(), expected);
    assert_eq!(
        (&turn["kind"], &turn["status"]),
        (&json!("alt-text"), &json!("completed")),
        "{turn}"
    );
    let report = &turn["report"];
    assert_eq!(report["done"][0]["file"], PAGE, "{report}");
    assert_eq!(
        report["done"]
            .as_array()
            .unwrap()
            .iter()
            .map(|done| done["alt"].as_str().unwrap())
            .collect::<Vec<_>>(),
        [
            "Ein Ofen aus Ziegeln.",
            "Eine gelbe Tasse.",
            "Eine gelbe Tasse."
        ]
    );
    let lines: Vec<&str> = expected.lines().collect();
    for done in report["done"].as_array().unwrap() {
        let line = done["line"].as_u64().unwrap() as usize;
        assert!(
            lines[line - 1].contains("<Image") || lines[line - 1].contains("cup.png"),
            "{done}"
        );
    }
    assert_eq!(report["decorative"], 1);
    let why: Vec<&str> = report["person"]
        .as_array()
        .unwrap()
        .iter()
        .map(|left| left["why"].as_str().unwrap())
        .collect();
    assert_eq!(why.len(), 2, "{report}");
    assert!(why[1].contains("another server"), "{report}");
    assert!(turn["usage"]["costUsd"].as_f64().unwrap() > 0.0, "{turn}");

    // One commit, of this page alone, by who asked.
    assert_eq!(stage.git(&["rev-parse", "HEAD^"]), before);
    assert_eq!(
        stage.git(&["show", "--format=%an|%s", "--name-only", "HEAD"]),
        format!("Alice|Describe 3 images\n\n{PAGE}")
    );
    assert_eq!(stage.git(&["status", "--porcelain"]), "");
    // One image, one request, in the language of the page, with what stands around.
    assert_eq!(stage.api.requests().len(), 2);
    let asked = &stage.api.requests_about("kiln.png")[0];
    assert_eq!(asked.images.len(), 1);
    for told in ["German (de)", "Die Werkstatt", "zweimal im Monat"] {
        assert!(asked.instruction.contains(told), "{}", asked.instruction);
    }

    // The same call is the same turn, another has nothing to do.
    let again = stage.greenroom.send(sent()).await.ok()["result"].take();
    assert_eq!(
        (&again["turnId"], &again["report"]),
        (&turn["turnId"], report)
    );
    // Whatever it says, and whatever has come since.
    let since = [
        stage.at("src/pages/since.html"),
        stage.at("public/since.png"),
    ];
    fs::write(&since[0], "<img src=/since.png>").unwrap();
    fs::write(&since[1], picture_of(7, 60, 40)).unwrap();
    let body = json!({"expectedHead": before.trim(), "language": "fr"});
    let late = Sent::new("POST", &path, &body).header("idempotency-key", "once");
    let late = stage.greenroom.send(late).await.ok();
    assert_eq!(late["result"]["turnId"], turn["turnId"]);
    for file in &since {
        fs::remove_file(file).unwrap();
    }
    assert_eq!(stage.api.requests().len(), 2);
    let nothing = stage.ask(Value::Null).await.ok()["result"].take();
    assert_eq!(
        (&nothing["turnId"], &nothing["commit"]),
        (&Value::Null, &Value::Null),
        "{nothing}"
    );
    assert_eq!(nothing["report"]["person"].as_array().unwrap().len(), 2);
    assert_eq!(stage.api.requests().len(), 2);
    let history = stage.greenroom.get(&stage.path("history")).await.ok();
    assert_eq!(
        history["result"]["turns"].as_array().unwrap().len(),
        1,
        "{history}"
    );

    let undo = stage
        .greenroom
        .api("POST", &stage.path("undo"), json!({}))
        .await
        .ok();
    assert_eq!(undo["result"]["undone"], turn["turnId"]);
    assert_eq!(stage.page(), TEAM);
    // What was said is known: it costs nothing to have it back.
    let back = stage.ask(Value::Null).await.ok()["result"].take();
    assert_eq!(
        (stage.page(), &back["usage"]["costUsd"]),
        (expected, &json!(0.0)),
        "{back}"
    );
    assert_eq!(stage.api.requests().len(), 2);

    // After a restart too.
    let stage = Stage {
        greenroom: stage.greenroom.restart().await,
        ..stage
    };
    let path = format!("/api/turns/{}", turn["turnId"].as_str().unwrap());
    assert_eq!(
        &stage.greenroom.get(&path).await.ok()["result"]["report"],
        report
    );
}

#[tokio::test]
async fn hostile_words_stay_a_text_and_what_is_not_for_all_is_a_person_s() {
    let hostile = "\" onload=\"alert(1)\" {process.exit()} <script>alert(1)</script> ${x} \\";
    let stage = Stage::new(vec![
        says("kiln.png", hostile, "SUGGESTIVE"),
        says("cup.png", "Nothing to see.", "ADULT"),
    ])
    .await;
    let report = stage.ask(Value::Null).await.ok()["result"]["report"].take();
    assert_eq!(report["done"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["done"][0]["alt"], hostile);
    let rated = report["person"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|left| left["why"].as_str().unwrap().contains("ADULT"));
    assert_eq!(rated.count(), 2, "{report}");
    let page = stage.page();
    let line = page
        .lines()
        .find(|line| line.trim_start().starts_with("alt={"))
        .unwrap();
    let code = line
        .trim()
        .strip_prefix("alt={")
        .unwrap()
        .strip_suffix('}')
        .unwrap();
    assert_eq!(serde_json::from_str::<String>(code).unwrap(), hostile);
    assert_eq!(page.lines().count(), TEAM.lines().count() + 1);
    assert!(
        !line.contains(['<', '`']) && !code.contains(['{', '}']),
        "{line}"
    );
}

#[tokio::test]
async fn what_is_edited_meanwhile_is_kept_and_nobody_s_turn_waits() {
    let slow = json!({"match": "cup.png", "steps": [
        {"delay_ms": 4000, "text": "DESCRIPTION: Eine Tasse.\nNSFW: SAFE\nTAGS: pot"}]});
    let stage = Stage::new(vec![
        says("kiln.png", "Ein Ofen.", "SAFE"),
        slow,
        rule("write a note", &[writes("note.txt", "n\n")]),
    ])
    .await;
    let meanwhile = async {
        wait_for("it asks about the cup", || {
            (!stage.api.requests_about("cup.png").is_empty()).then_some(())
        })
        .await;
        fs::write(stage.at("src/assets/kiln.png"), picture_of(77, 60, 40)).unwrap();
        let page = stage
            .page()
            .replace("<h1>Die Werkstatt</h1>", "<h1>Neu</h1>\n  <p>Da.</p>");
        fs::write(stage.at(PAGE), page).unwrap();
        // Somebody looks at the history and publishes: nothing of it waits for the images.
        let publish = stage.path("publish");
        let sync = stage.greenroom.api("POST", &publish, json!({"to": "user"}));
        sync.await.ok();
    };
    let (answer, ()) = tokio::join!(stage.ask(Value::Null), meanwhile);
    let report = answer.ok()["result"]["report"].take();
    assert_eq!(report["done"].as_array().unwrap().len(), 2, "{report}");
    let again = report["person"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|left| left["why"].as_str().unwrap().contains("ask again"));
    assert_eq!(again.count(), 1, "{report}");
    let page = stage.page();
    assert!(page.contains("<h1>Neu</h1>\n  <p>Da.</p>"), "{page}");
    assert_eq!(page.matches("alt=\"Eine Tasse.\"").count(), 2, "{page}");
    assert!(!page.contains("Ein Ofen."), "{page}");
    let rest = stage.ask(Value::Null).await.ok()["result"]["report"].take();
    assert_eq!(rest["done"].as_array().unwrap().len(), 1, "{rest}");
}

#[tokio::test]
async fn killed_or_left_in_the_midst_nothing_is_half_done_and_nothing_paid_twice() {
    let stage = Stage::new(vec![
        says("kiln.png", "Ein Ofen.", "SAFE"),
        json!({"match": "cup.png", "steps": [
            {"act": "no_bytes", "times": 2, "text": "DESCRIPTION: Eine Tasse.\nNSFW: SAFE\nTAGS: pot"}]}),
    ])
    .await;
    let head = stage.git(&["rev-parse", "HEAD"]);
    // Whoever asked goes away.
    let sent = || {
        Sent::new("POST", &stage.path("alt-text"), &json!({})).header("accept", "text/event-stream")
    };
    let mut events = stream(stage.greenroom.api_port, sent()).await;
    let progress = events.until("alt_text.progress").await.data;
    assert_eq!(
        (&progress["total"], &progress["done"]),
        (&json!(2), &json!(1)),
        "{progress}"
    );
    wait_for("it asks about the cup", || {
        (stage.api.requests_about("cup.png").len() == 1).then_some(())
    })
    .await;
    drop(events);
    assert_eq!(
        (stage.git(&["rev-parse", "HEAD"]), stage.page()),
        (head.clone(), TEAM.to_owned())
    );

    // Then it is killed.
    let mut events = stream(stage.greenroom.api_port, sent()).await;
    let call = events.until("alt_text.started").await.data["callId"].take();
    events.until("alt_text.progress").await;
    wait_for("it asks about the cup again", || {
        (stage.api.requests_about("cup.png").len() == 2).then_some(())
    })
    .await;
    let Stage {
        api,
        folders,
        mut greenroom,
        alice,
    } = stage;
    greenroom.kill().await;
    let stage = Stage {
        api,
        folders,
        greenroom: greenroom.restart().await,
        alice,
    };
    assert_eq!(
        (stage.git(&["rev-parse", "HEAD"]), stage.page()),
        (head, TEAM.to_owned())
    );
    assert_eq!(stage.git(&["status", "--porcelain"]), "");
    // Of its call there is nothing left, and whoever asks is told so.
    let thread = stage.greenroom.get(&stage.alice.path()).await.ok();
    assert_eq!(thread["result"]["calls"], json!([]), "{thread}");
    let cancel = format!("/api/calls/{}/cancel", call.as_str().unwrap());
    let gone = stage.greenroom.api("POST", &cancel, json!({})).await;
    let said = gone.error(404, "not_found");
    assert!(said.contains("it is over"), "{said}");

    let sent = Sent::new("POST", &stage.path("alt-text"), &json!({}))
        .header("accept", "text/event-stream");
    let mut events = stream(stage.greenroom.api_port, sent).await;
    let end = events.until("alt_text.completed").await.data;
    assert_eq!(
        end["result"]["report"]["done"].as_array().unwrap().len(),
        3,
        "{end}"
    );
    assert_eq!(stage.api.requests_about("kiln.png").len(), 1);
    assert_eq!(
        stage.page(),
        with_texts("alt=\"Ein Ofen.\"", "alt=\"Eine Tasse.\"")
    );
}

#[tokio::test]
async fn what_is_described_and_not_written_is_not_paid_again_after_a_kill() {
    let stage = Stage::new(vec![
        says("kiln.png", "Ein Ofen.", "SAFE"),
        json!({"match": "cup.png", "steps": [
            {"delay_ms": 3000, "text": "DESCRIPTION: Eine Tasse.\nNSFW: SAFE\nTAGS: pot"}]}),
    ])
    .await;
    let sent = || {
        Sent::new("POST", &stage.path("alt-text"), &json!({})).header("accept", "text/event-stream")
    };
    let mut events = stream(stage.greenroom.api_port, sent()).await;
    wait_for("it asks about the cup", || {
        (!stage.api.requests_about("cup.png").is_empty()).then_some(())
    })
    .await;
    // Somebody's turn, which does not end here: the texts wait behind it.
    let turn = stage.greenroom.begin(&stage.alice, "Think on").await;
    while events.until("alt_text.progress").await.data["done"] != 2 {}
    let Stage {
        api,
        folders,
        mut greenroom,
        alice,
    } = stage;
    greenroom.kill().await;
    let stage = Stage {
        api,
        folders,
        greenroom: greenroom.restart().await,
        alice,
    };
    assert_eq!(stage.page(), TEAM);
    // What was a turn says how it ended.
    assert_eq!(stage.greenroom.ended(&turn).await["status"], "recovered");
    let written = stage.ask(Value::Null).await.ok()["result"].take();
    assert_eq!(written["usage"]["costUsd"], json!(0.0), "{written}");
    assert_eq!(
        stage.page(),
        with_texts("alt=\"Ein Ofen.\"", "alt=\"Eine Tasse.\"")
    );
    for image in ["kiln.png", "cup.png"] {
        assert_eq!(stage.api.requests_about(image).len(), 1, "{image}");
    }
}

#[tokio::test]
async fn a_call_is_cancelled_by_its_id_and_goes_on_without_its_caller_where_it_has_a_key() {
    let slow = json!({"match": "cup.png", "steps": [
        {"act": "no_bytes", "times": 1, "delay_ms": 1000, "text": "DESCRIPTION: Eine Tasse.\nNSFW: SAFE\nTAGS: pot"}]});
    let stage = Stage::new(vec![says("kiln.png", "Ein Ofen.", "SAFE"), slow]).await;
    let path = stage.path("alt-text");
    let keyed = || {
        Sent::new("POST", &path, &json!({}))
            .header("accept", "text/event-stream")
            .header("idempotency-key", "texts")
    };
    let mut events = stream(stage.greenroom.api_port, keyed()).await;
    let id = events.until("alt_text.started").await.data["callId"].take();
    wait_for("it asks about the cup", || {
        (stage.api.requests_about("cup.png").len() == 1).then_some(())
    })
    .await;
    let cancel = format!("/api/calls/{}/cancel", id.as_str().unwrap());
    let ended = stage.greenroom.api("POST", &cancel, json!({})).await.ok();
    assert_eq!(
        (&ended["result"]["status"], &ended["result"]["kind"]),
        (&json!("cancelled"), &json!("alt-text")),
        "{ended}"
    );
    let told = events.until("alt_text.cancelled").await.data;
    assert_eq!(told["result"]["turnId"], Value::Null, "{told}");
    assert_eq!(stage.page(), TEAM);

    // Again, and its caller goes away.
    let mut events = stream(stage.greenroom.api_port, keyed()).await;
    events.until("alt_text.started").await;
    drop(events);
    wait_for("the texts are written all the same", || {
        (stage.page() != TEAM).then_some(())
    })
    .await;
    let expected = with_texts("alt=\"Ein Ofen.\"", "alt=\"Eine Tasse.\"");
    assert_eq!(stage.page(), expected);
}

#[tokio::test]
async fn what_is_asked_wrongly_is_refused_and_a_budget_holds() {
    let stage = Stage::new(two()).await;
    for body in [
        json!({"language": "klingon!"}),
        json!({"maxCostUsd": 0}),
        json!({"model": "-x"}),
    ] {
        stage.ask(body).await.error(400, "invalid_request");
    }
    let path = "/api/clients/acme/users/alice/threads/none/alt-text";
    stage
        .greenroom
        .api("POST", path, json!({}))
        .await
        .error(404, "not_found");
    stage
        .ask(json!({"maxCostUsd": 0.000001}))
        .await
        .error(429, "budget_exceeded");
    assert_eq!(
        (stage.page(), stage.api.requests().len()),
        (TEAM.to_owned(), 0)
    );

    // In the caller's language, whatever the site says.
    stage.ask(json!({"language": "fr"})).await.ok();
    assert!(stage.api.requests()[0].instruction.contains("French (fr)"));
}

/// `greenroom alt-text` on a folder.
fn command(folders: &Folders, api: &StandIn, args: &[&str]) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
    command
        .arg("alt-text")
        .args(args)
        .current_dir(folders.join("repos/site"))
        .env_clear()
        .env("HOME", folders.join("home"))
        .env("TMPDIR", folders.join("tmp"))
        .env("PATH", &tools().path)
        .env("CLAUDE_BIN", quick_cli(folders))
        .env("WORKSPACE_PATH", folders.workspace())
        .env("CACHE_PATH", folders.join("cache"))
        .env("ANTHROPIC_API_KEY", CANARY)
        .env("ANTHROPIC_BASE_URL", api.url())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

#[tokio::test]
async fn the_command_describes_a_folder_without_a_supervisor() {
    let api = StandIn::start(json!({ "rules": two() })).await;
    let folders = Folders::new();
    folders.site(
        "site",
        &[
            (PAGE, TEAM),
            ("node_modules/x/x.html", "<img src=/cup.png>"),
            ("tests/x.html", "<img src=/cup.png>"),
            ("src/pages/tests/index.html", "<img src=/cup.png>"),
        ],
    );
    let at = |path: &str| folders.join("repos/site").join(path);
    for (number, image) in ["src/assets/kiln.png", "public/cup.png"].iter().enumerate() {
        fs::create_dir_all(at(image).parent().unwrap()).unwrap();
        fs::write(at(image), picture_of(number as u32, 60, 40)).unwrap();
    }
    // A way out of the folder is no way.
    fs::write(folders.join("home/private.png"), picture_of(9, 60, 40)).unwrap();
    std::os::unix::fs::symlink(folders.join("home/private.png"), at("public/private.png")).unwrap();
    fs::write(
        at("src/pages/link.html"),
        "<img src=/private.png><img src=../../../../home/private.png><img src=/empty.png>",
    )
    .unwrap();
    fs::write(at("public/empty.png"), "").unwrap();
    let run = async |args: &[&str]| {
        let output = command(&folders, &api, args).output();
        timeout(PATIENCE, output).await.unwrap().unwrap()
    };

    let dry = run(&["--dry-run"]).await;
    let said = String::from_utf8(dry.stdout).unwrap();
    assert!(
        dry.status.success() && said.contains("2 images") && said.contains("the image is empty"),
        "{said}{}",
        String::from_utf8_lossy(&dry.stderr)
    );
    assert_eq!(
        (fs::read_to_string(at(PAGE)).unwrap(), api.requests().len()),
        (TEAM.to_owned(), 0)
    );

    let done = run(&["--json"]).await;
    let told = String::from_utf8_lossy(&done.stderr).into_owned();
    let report: Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{told}"));
    assert_eq!(
        report["report"]["done"].as_array().unwrap().len(),
        4,
        "{report}"
    );
    assert_eq!(
        report["report"]["person"].as_array().unwrap().len(),
        5,
        "{report}"
    );
    assert_eq!(
        fs::read_to_string(at(PAGE)).unwrap(),
        with_texts("alt=\"Ein Ofen aus Ziegeln.\"", "alt=\"Eine gelbe Tasse.\"")
    );
    for apart in ["node_modules/x/x.html", "tests/x.html"] {
        let page = fs::read_to_string(at(apart)).unwrap();
        assert_eq!(page, "<img src=/cup.png>", "{apart}");
    }
    let page = fs::read_to_string(at("src/pages/tests/index.html")).unwrap();
    assert!(page.contains("Eine gelbe Tasse."), "{page}");
    assert_eq!(api.requests().len(), 2);

    let nothing = run(&["."]).await;
    assert!(
        String::from_utf8(nothing.stdout)
            .unwrap()
            .contains("No image got a text")
    );
    let missing = run(&["no-such-folder"]).await;
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8(missing.stderr).unwrap();
    assert_eq!(said.matches("No such file").count(), 1, "{said}");
}
