//! A site's work on its way up to a hosting service, and others' on its way down, seen from
//! outside and by the real git program.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, GIT_TOKEN, Hosting, Options, SITE, Sent, TestGreenroom, Who, files_below, git,
    holds, request, wait_for, who,
};

const PAGE: &str = "src/pages/index.astro";

struct Stage {
    folders: Folders,
    hosting: Hosting,
    greenroom: TestGreenroom,
    site: String,
    alice: Who,
}

impl Stage {
    async fn new() -> Self {
        Self::with(|options| options).await
    }

    /// The thread `acme/alice/main` of a site that is hosted over HTTPS. No agent runs unless a
    /// test asks for a turn: edits by hand are a thread's work too.
    async fn with(adapt: impl FnOnce(Options) -> Options) -> Self {
        let folders = Folders::new();
        let hosting = Hosting::start(&folders).await;
        let site = hosting.site("site", SITE);
        let options = Options::new(&folders)
            .rehearsal()
            .env("MAX_WARM_AGENTS", "0");
        let greenroom = TestGreenroom::start(adapt(hosting.known_to(options))).await;
        let stage = Self {
            alice: who("acme", "alice", "main"),
            folders,
            hosting,
            greenroom,
            site,
        };
        stage.init(&stage.alice).await;
        stage
    }

    async fn init(&self, who: &Who) {
        let wishes = json!({"repoUrl": self.site});
        self.greenroom.init(who, wishes).await.ok();
    }

    async fn ask(&self, who: &Who, what: &str, body: Value) -> Answer {
        let path = format!("{}/{what}", who.path());
        self.greenroom.api("POST", &path, body).await
    }

    /// A publication that succeeds: its result.
    async fn publish(&self, who: &Who, body: Value) -> Value {
        let result = self.ask(who, "publish", body).await.ok()["result"].take();
        self.is_sound(who);
        result
    }

    async fn sync(&self, who: &Who) -> Value {
        let result = self.ask(who, "sync", Value::Null).await.ok()["result"].take();
        self.is_sound(who);
        result
    }

    /// Somebody edits a file of the thread by hand.
    fn edit(&self, who: &Who, file: &str, content: &str) {
        let path = self.folders.worktree(who).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn file(&self, who: &Who, file: &str) -> Option<String> {
        fs::read_to_string(self.folders.worktree(who).join(file)).ok()
    }

    fn git(&self, who: &Who, args: &[&str]) -> String {
        git(self.folders.user(who).join("project"), args)
    }

    fn at(&self, who: &Who, branch: &str) -> String {
        self.git(who, &["rev-parse", branch])
    }

    fn at_origin(&self, branch: &str) -> String {
        git(self.hosting.bare("site"), &["rev-parse", branch])
    }

    /// All branches, here and there.
    fn refs(&self, who: &Who) -> String {
        let list = ["for-each-ref", "refs/heads", "refs/remotes"];
        self.git(who, &list) + &git(self.hosting.bare("site"), &list)
    }

    /// The git program finds nothing to complain about and nothing left over.
    fn is_sound(&self, who: &Who) {
        assert_eq!(self.git(who, &["status", "--porcelain"]), "");
        self.git(who, &["fsck", "--strict", "--no-dangling"]);
        let threads = self.git(who, &["worktree", "list", "--porcelain"]);
        assert!(!threads.contains("prunable"), "{threads}");
        let status = git(self.folders.worktree(who), &["status", "--porcelain"]);
        assert_eq!(status, "");
        git(self.hosting.bare("site"), &["fsck", "--strict"]);
    }
}

fn beside(who: &Who, thread: &str) -> Who {
    Who {
        thread: thread.to_owned(),
        ..who.clone()
    }
}

#[tokio::test]
async fn a_turn_goes_up_to_a_pull_request_and_others_work_comes_down() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    let turn = stage
        .greenroom
        .execute(alice, "Change the heading to Hello")
        .await
        .ok();
    let head = turn["commit"]["id"].as_str().unwrap().to_owned();
    let user = stage.publish(alice, json!({"to": "user"})).await;
    assert_eq!(
        user,
        json!({"to": "user", "pushed": null, "pullRequest": null, "heldBack": [], "merged": [{
            "from": "thread/acme/alice/main", "to": "user/acme/alice",
            "commit": head, "upToDate": false,
        }]})
    );
    let page = stage.folders.user(alice).join("project").join(PAGE);
    assert!(holds(&page, "Hello"), "project/ follows its branch");

    let pull =
        json!({"to": "origin", "message": "Spring campaign\n\nApproved.", "pullRequest": true});
    let first = stage.publish(alice, pull.clone()).await;
    let pushed = first["pushed"]["commit"].as_str().unwrap().to_owned();
    assert_eq!(first["pushed"]["branch"], "client/acme");
    assert_eq!(stage.at_origin("client/acme"), pushed);
    assert_eq!(stage.at(alice, "client/acme"), pushed);
    let subject = stage.git(alice, &["log", "-1", "--format=%s|%P", "client/acme"]);
    let base = stage.at_origin("main");
    assert_eq!(subject, format!("Spring campaign|{base} {head}"));
    let request = &first["pullRequest"];
    assert_eq!(
        (&request["number"], &request["created"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(
        stage.hosting.pulls(),
        [json!({"title": "Spring campaign", "body": "", "head": "client/acme", "base": "main"})]
    );
    let again = stage.publish(alice, pull).await;
    assert_eq!(again["pullRequest"]["created"], false);
    assert_eq!(again["pushed"]["upToDate"], true);
    assert!(
        again["merged"]
            .as_array()
            .unwrap()
            .iter()
            .all(|step| step["upToDate"] == true)
    );

    // Merged and deleted over there, and more was done.
    let bare = stage.hosting.bare("site");
    git(&bare, &["update-ref", "refs/heads/main", &pushed]);
    git(&bare, &["update-ref", "-d", "refs/heads/client/acme"]);
    stage
        .hosting
        .commit("site", "main", "legal.txt", Some("Terms\n"));
    let synced = stage.sync(alice).await;
    assert_eq!(
        (&synced["kind"], &synced["upToDate"]),
        (&json!("sync"), &json!(false))
    );
    assert_eq!(synced["status"], "completed");
    assert_eq!(
        synced["commit"]["files"],
        json!([{"path": "legal.txt", "status": "added", "additions": 1, "deletions": 0}])
    );
    assert_eq!(synced["merged"][0]["from"], "origin/main");
    assert_eq!(stage.file(alice, "legal.txt").as_deref(), Some("Terms\n"));
    let history = stage
        .greenroom
        .get(&format!("{}/history", alice.path()))
        .await
        .ok();
    let newest = &history["result"]["turns"][0];
    assert_eq!(
        (&newest["kind"], &newest["turnId"]),
        (&json!("sync"), &synced["turnId"])
    );
    let head = stage.at(alice, "thread/acme/alice/main");
    let nothing = stage.sync(alice).await;
    assert_eq!(
        (&nothing["upToDate"], &nothing["turnId"]),
        (&json!(true), &Value::Null)
    );
    assert_eq!(stage.at(alice, "thread/acme/alice/main"), head);

    // It can be taken back like any turn, and the thread goes on.
    stage.ask(alice, "undo", Value::Null).await.ok();
    assert_eq!(stage.file(alice, "legal.txt"), None);
    let asked = stage.hosting.asked();
    let ours = asked
        .iter()
        .all(|(_, token)| token.as_ref().is_some_and(|t| t.starts_with("Basic ")));
    assert!(ours, "{asked:?}");
    let kept: Vec<_> = files_below(&stage.folders.workspace())
        .into_iter()
        .filter(|file| holds(file, GIT_TOKEN))
        .collect();
    assert!(kept.is_empty(), "{kept:?}");
    assert!(
        stage
            .greenroom
            .log()
            .iter()
            .all(|line| !line.contains(GIT_TOKEN))
    );
}

#[tokio::test]
async fn what_does_not_fit_is_shown_and_changes_nothing() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    let other = beside(alice, "other");
    stage.init(&other).await;
    stage.edit(alice, PAGE, "<h1>One</h1>\n");
    stage.edit(&other, PAGE, "<h1>Two</h1>\n");
    stage.edit(&other, "more.txt", "more\n");
    stage.publish(alice, json!({"to": "client"})).await;
    stage
        .ask(&other, "sync", json!({"expectedHead": "0000000"}))
        .await
        .error(409, "stale_head");
    let refs = |stage: &Stage| stage.refs(alice);
    let asked = stage.ask(&other, "publish", json!({"to": "origin"})).await;
    assert_eq!(asked.body["from"], "thread/acme/alice/other");
    assert_eq!(asked.body["to"], "user/acme/alice");
    let file = &asked.body["files"][0];
    assert_eq!(
        (&file["path"], &file["kind"]),
        (&json!(PAGE), &json!("both_modified"))
    );
    let sentence = asked.error(409, "merge_conflict");
    assert!(sentence.contains("changed the same places"), "{sentence}");
    let before = refs(&stage);
    stage
        .ask(&other, "sync", Value::Null)
        .await
        .error(409, "merge_conflict");
    assert_eq!(refs(&stage), before);
    stage.is_sound(&other);

    // A person (or the agent) settles it, by hand.
    stage.edit(&other, PAGE, "<h1>One</h1>\n");
    let settled = stage.publish(&other, json!({"to": "origin"})).await;
    assert_eq!(settled["pushed"]["commit"], stage.at_origin("client/acme"));
    let tree = git(
        stage.hosting.bare("site"),
        &["ls-tree", "--name-only", "client/acme"],
    );
    assert!(tree.contains("more.txt"), "{tree}");
}

#[tokio::test]
async fn others_lines_do_not_vanish_silently() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    let other = beside(alice, "other");
    stage.init(&other).await;
    stage.edit(alice, "ours.txt", "ours\n");
    stage.publish(alice, json!({"to": "user"})).await;
    let before = stage.at(alice, "thread/acme/alice/main");
    stage.edit(
        &other,
        PAGE,
        "<h1>Pots</h1>\n<p>A paragraph of the others</p>\n",
    );
    stage.publish(&other, json!({"to": "user"})).await;
    stage.sync(alice).await;
    // Back to a state from before: without a conflict, and without the others' work.
    stage
        .ask(alice, "restore", json!({"commit": before}))
        .await
        .ok();
    let refs = stage.refs(alice);
    let asked = stage.ask(alice, "publish", json!({"to": "origin"})).await;
    let file = &asked.body["files"][0];
    assert_eq!(
        (&file["path"], &file["kind"]),
        (&json!(PAGE), &json!("silent_loss"))
    );
    assert_eq!(file["lines"], json!(["<p>A paragraph of the others</p>"]));
    let sentence = asked.error(409, "merge_conflict");
    assert!(sentence.contains("acceptLoss"), "{sentence}");
    assert_eq!(stage.refs(alice), refs);
    let meant = json!({"to": "origin", "acceptLoss": true});
    stage.publish(alice, meant).await;
    let page = git(
        stage.hosting.bare("site"),
        &["show", &format!("client/acme:{PAGE}")],
    );
    assert!(!page.contains("others"), "{page}");
}

#[tokio::test]
async fn what_is_planted_in_the_repository_leads_nowhere() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    let evil = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/", evil.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    thread::spawn(move || {
        for socket in evil.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
            drop(socket);
        }
    });
    let proof = stage.folders.join("proof");
    let run = format!("touch {}", proof.display());
    let here = stage.hosting.url("");
    let insteads = [
        format!("url.{address}.insteadOf"),
        format!("url.{address}.pushInsteadOf"),
    ];
    let elsewhere = stage.folders.join("elsewhere.git");
    git(
        stage.folders.join("hosted"),
        &[
            "clone",
            "--quiet",
            "--bare",
            "acme/site.git",
            elsewhere.to_str().unwrap(),
        ],
    );
    let local = format!("url.{}/.insteadOf", elsewhere.display());
    let settings = [
        (insteads[0].as_str(), here.as_str()),
        (insteads[1].as_str(), here.as_str()),
        (local.as_str(), stage.site.as_str()),
        ("http.proxy", address.as_str()),
        ("remote.origin.pushurl", address.as_str()),
        ("remote.origin.proxy", address.as_str()),
        ("core.sshCommand", run.as_str()),
        ("core.fsmonitor", run.as_str()),
        ("core.hooksPath", "/tmp"),
        ("credential.helper", run.as_str()),
        ("extensions.worktreeConfig", "true"),
    ];
    let plant = || {
        let project = stage.folders.user(alice).join("project");
        for (name, value) in settings {
            let file = project.join(".git/config.worktree");
            git(&project, &["config", name, value]);
            git(
                &project,
                &["config", "--file", file.to_str().unwrap(), name, value],
            );
        }
    };
    stage.edit(alice, "a.txt", "a\n");
    plant();
    let path = format!("{}/publish", alice.path());
    let body = json!({"to": "origin", "pullRequest": true});
    let published = stage.greenroom.api("POST", &path, body).await.ok();
    assert_eq!(published["result"]["pullRequest"]["number"], 1);
    assert_eq!(
        stage.at_origin("client/acme"),
        published["result"]["pushed"]["commit"]
    );
    plant();
    stage
        .hosting
        .commit("site", "client/acme", "b.txt", Some("b\n"));
    let synced = stage.ask(alice, "sync", Value::Null).await.ok();
    assert_eq!(synced["result"]["upToDate"], false, "{synced}");
    assert_eq!(stage.file(alice, "b.txt").as_deref(), Some("b\n"));

    assert_eq!(connections.load(Ordering::SeqCst), 0);
    assert!(!proof.exists());
    let moved = git(&elsewhere, &["for-each-ref"]);
    assert!(!moved.contains("client/acme"), "{moved}");
    let asked = stage.hosting.asked();
    assert!(
        asked.iter().all(|(line, _)| line.contains(" /acme/site/")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn a_push_that_fails_says_why_and_leaves_no_half() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    stage.edit(alice, "a.txt", "a\n");
    stage.publish(alice, json!({"to": "user"})).await;
    stage
        .hosting
        .refuse("site", "remote rule GH006: no pushes on Fridays");
    stage.edit(alice, "b.txt", "b\n");
    stage
        .ask(alice, "publish", json!({"to": "origin"}))
        .await
        .status_is(422);
    let refs = stage.refs(alice);
    let refused = stage
        .ask(
            alice,
            "publish",
            json!({"to": "origin", "pullRequest": true}),
        )
        .await;
    assert_eq!(refused.body["reason"], "rejected");
    let sentence = refused.error(422, "push_failed");
    assert!(sentence.contains("no pushes on Fridays"), "{sentence}");
    assert_eq!(
        stage.refs(alice),
        refs,
        "also the user's branch stays where it was"
    );
    assert_eq!(stage.hosting.pulls(), Vec::<Value>::new());
    stage.is_sound(alice);

    stage.hosting.accept("site");
    stage.hosting.lose_answers(1);
    let pushed = stage.publish(alice, json!({"to": "origin"})).await;
    assert_eq!(pushed["pushed"]["commit"], stage.at_origin("client/acme"));

    // What the API of pull requests says comes after the push, which stands.
    for (status, code, reason, part) in [
        (401, 422, "auth", "GITHUB_TOKEN"),
        (403, 422, "auth", "may not open pull requests"),
        (404, 422, "auth", "there is no repository"),
        (429, 502, "network", "in a few minutes"),
    ] {
        stage.hosting.api_answers(Some(status));
        let asked = stage
            .ask(
                alice,
                "publish",
                json!({"to": "origin", "pullRequest": true}),
            )
            .await;
        assert_eq!(asked.body["reason"], reason, "{}", asked.text);
        let pushed = &asked.body["published"]["pushed"];
        assert_eq!(pushed["commit"], stage.at_origin("client/acme"));
        let retry = asked.headers.contains_key("retry-after");
        assert_eq!(retry, reason == "network");
        let sentence = asked.error(code, "pull_request_failed");
        assert!(sentence.contains(part), "{status}: {sentence}");
    }
    stage.hosting.api_answers(None);
    let opened = stage.publish(
        alice,
        json!({"to": "origin", "pullRequest": {"title": "Mine", "base": "main"}}),
    );
    assert_eq!(opened.await["pullRequest"]["created"], true);
    assert_eq!(stage.hosting.pulls()[0]["title"], "Mine");
}

#[tokio::test]
async fn without_a_token_or_an_authority_there_is_a_clear_word() {
    let stage = Stage::with(|options| options.without("GITHUB_TOKEN")).await;
    let alice = &stage.alice;
    stage.edit(alice, "a.txt", "a\n");
    let refused = stage.ask(alice, "publish", json!({"to": "origin"})).await;
    assert_eq!(refused.body["reason"], "auth");
    let sentence = refused.error(422, "push_failed");
    assert!(sentence.contains("GITHUB_TOKEN"), "{sentence}");
    let refused = stage
        .ask(
            alice,
            "publish",
            json!({"to": "origin", "pullRequest": true}),
        )
        .await;
    let sentence = refused.error(400, "invalid_request");
    assert!(sentence.contains("GITHUB_TOKEN"), "{sentence}");
    assert!(
        stage
            .hosting
            .asked()
            .iter()
            .all(|(_, token)| token.is_none())
    );

    // Another authority's certificate is no certificate.
    let folders = Folders::new();
    let other = Hosting::start(&folders).await;
    let options = stage.hosting.known_to(Options::new(&folders).rehearsal());
    let options = options.env("SSL_CERT_FILE", other.authority());
    let greenroom = TestGreenroom::start(options).await;
    let asked = greenroom
        .init(&who("acme", "bob", "main"), json!({"repoUrl": stage.site}))
        .await;
    let sentence = asked.error(422, "clone_failed");
    assert!(sentence.contains("certificate"), "{sentence}");
    assert!(!folders.workspace().join("acme/bob/project").exists());
}

#[tokio::test]
async fn a_site_without_an_origin_goes_as_far_as_its_client() {
    let folders = Folders::new();
    // Without Node nothing is installed, which the template would have to wait for.
    let options = Options::new(&folders)
        .rehearsal()
        .env("PATH", "/nonexistent");
    let options = options.env("MAX_WARM_AGENTS", "0").without("CLAUDE_BIN");
    let greenroom = TestGreenroom::start(options).await;
    let tom = who("acme", "tom", "main");
    let other = beside(&tom, "other");
    for who in [&tom, &other] {
        greenroom.init(who, json!({})).await.ok();
    }
    let ask = async |who: &Who, what: &str, body: Value| {
        let path = format!("{}/{what}", who.path());
        greenroom.api("POST", &path, body).await
    };
    fs::write(folders.worktree(&tom).join("a.txt"), "a\n").unwrap();
    for body in [
        json!({"to": "origin"}),
        json!({"to": "origin", "pullRequest": true}),
    ] {
        let sentence = ask(&tom, "publish", body)
            .await
            .error(400, "invalid_request");
        assert!(sentence.contains("no repository"), "{sentence}");
    }
    ask(&tom, "publish", json!({"to": "client"})).await.ok();
    let synced = ask(&other, "sync", Value::Null).await.ok();
    assert_eq!(synced["result"]["merged"].as_array().unwrap().len(), 2);
    let came = fs::read_to_string(folders.worktree(&other).join("a.txt")).unwrap();
    assert_eq!(came, "a\n");
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_before_anything_is_done() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    let refs = stage.refs(alice);
    for (body, part) in [
        (json!({}), "to is missing"),
        (json!({"to": "moon"}), "to"),
        (json!({"to": "user", "pullRequest": true}), "pullRequest"),
        (json!({"to": "origin", "pullRequest": "yes"}), "pullRequest"),
        (json!({"to": "user", "message": " "}), "message"),
        (json!({"to": "user", "message": "\u{1b}[31m"}), "message"),
        (json!({"to": "user", "expectedHead": "zz"}), "expectedHead"),
    ] {
        let sentence = stage
            .ask(alice, "publish", body.clone())
            .await
            .error(400, "invalid_request");
        assert!(sentence.contains(part), "{body}: {sentence}");
    }
    let nobody = who("acme", "nobody", "main");
    for what in ["publish", "sync"] {
        let body = json!({"to": "user"});
        stage.ask(&nobody, what, body).await.error(404, "not_found");
    }
    assert_eq!(stage.refs(alice), refs);
}

#[tokio::test]
async fn many_publish_at_once_and_nothing_is_lost() {
    let stage = Stage::new().await;
    let everybody: Vec<_> = ["alice", "bob"]
        .into_iter()
        .flat_map(|user| ["main", "one", "two"].map(|thread| who("acme", user, thread)))
        .collect();
    for who in &everybody {
        stage.init(who).await;
    }
    for round in 0..2 {
        for who in &everybody {
            let file = format!("{}-{}-{round}.txt", who.user, who.thread);
            stage.edit(who, &file, &file);
        }
        let all = everybody
            .iter()
            .map(|who| stage.ask(who, "publish", json!({"to": "origin"})));
        for answer in futures_util::future::join_all(all).await {
            answer.ok();
        }
    }
    let tree = git(
        stage.hosting.bare("site"),
        &["ls-tree", "--name-only", "client/acme"],
    );
    for who in &everybody {
        for round in 0..2 {
            let file = format!("{}-{}-{round}.txt", who.user, who.thread);
            assert!(tree.contains(&file), "{file} is not in {tree}");
        }
        stage.is_sound(who);
    }
    let all = everybody
        .iter()
        .map(|who| stage.ask(who, "sync", Value::Null));
    for answer in futures_util::future::join_all(all).await {
        answer.ok();
    }
    for who in &everybody {
        assert_eq!(
            stage.file(who, "bob-two-1.txt").as_deref(),
            Some("bob-two-1.txt")
        );
        stage.is_sound(who);
    }
}

#[tokio::test]
async fn a_killed_publication_is_done_by_the_next_one() {
    let mut stage = Stage::with(|options| options.env("LEASE_SECONDS", "3")).await;
    let alice = stage.alice.clone();
    stage.edit(&alice, "a.txt", "a\n");
    stage.hosting.is_silent(true);
    let sent = Sent::new(
        "POST",
        &format!("{}/publish", alice.path()),
        &json!({"to": "origin"}),
    );
    #[expect(clippy::disallowed_methods, reason = "it ends with the program")]
    tokio::spawn(request(stage.greenroom.api_port, sent));
    let bare = stage.hosting.bare("site");
    let has_it = || {
        let branches = git(&bare, &["branch", "--list", "client/acme"]);
        (!branches.is_empty()).then_some(())
    };
    wait_for("the push gets there", has_it).await;
    assert_eq!(
        stage.at(&alice, "client/acme"),
        stage.at_origin("main"),
        "here nothing has moved yet"
    );
    stage.greenroom.kill().await;
    stage.hosting.is_silent(false);
    stage.greenroom = stage.greenroom.restart().await;
    let done = stage.publish(&alice, json!({"to": "origin"})).await;
    assert_eq!(done["pushed"]["upToDate"], true, "{done}");
    assert_eq!(
        stage.at(&alice, "client/acme"),
        stage.at_origin("client/acme")
    );
    let left = stage.folders.user(&alice).join(".greenroom/uplink");
    assert!(!left.exists());
}

#[tokio::test]
async fn it_waits_for_its_turn_and_says_what_stays_behind() {
    let stage = Stage::new().await;
    let alice = &stage.alice;
    stage.edit(alice, ".env", "SECRET=1\n");
    let turn = stage
        .greenroom
        .begin(alice, "Change the heading to Later")
        .await;
    let asked = stage.ask(alice, "publish", json!({"to": "user"})).await;
    let result = asked.ok()["result"].take();
    let turn = stage.greenroom.turn(&turn).await;
    assert_eq!(turn["status"], "completed", "it was before the publication");
    assert_eq!(result["merged"][0]["commit"], turn["commit"]["id"]);
    assert_eq!(result["heldBack"][0]["path"], ".env", "{result}");
    let names = stage.git(alice, &["ls-tree", "-r", "--name-only", "user/acme/alice"]);
    assert!(!names.contains(".env"), "{names}");
    assert!(holds(
        &stage.folders.user(alice).join("project").join(PAGE),
        "Later"
    ));
}
