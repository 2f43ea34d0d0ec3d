//! `POST /api/init`, seen from outside.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use serde_json::{Value, json};

use crate::support::{
    Folders, Options, SITE, StandIn, TestGreenroom, files_below, git, holds, rule, wait_for, who,
    writes,
};

/// A program that plays the model by itself, on folders with one site.
async fn start() -> (Folders, String, TestGreenroom) {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(Options::new(&folders).rehearsal()).await;
    (folders, site, greenroom)
}

fn is_clean(folder: impl AsRef<Path>) {
    assert_eq!(git(folder, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_new_thread_is_answered_and_lies_on_disk_as_the_contract_says() {
    let (folders, site, greenroom) = start().await;
    let main = git(&site, &["rev-parse", "main"]);
    let alice = who("acme", "alice", "main");
    let answer = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();

    let user = folders.user(&alice);
    let path = |path: &Path| json!(path.to_str().unwrap());
    assert_eq!(
        answer["workspace"],
        json!({
            "userPath": path(&user),
            "projectPath": path(&user.join("threads/main")),
            "claudePath": path(&user.join(".claude")),
            "branch": "thread/acme/alice/main",
            "resumed": false,
        })
    );
    assert_eq!(answer["resumed"], false);
    assert_eq!(answer["branch"], "thread/acme/alice/main");
    assert_eq!(answer["head"], main);
    let preview = &answer["preview"];
    assert_eq!(preview["state"], "off", "no dev server was wanted");
    let url = preview["url"].as_str().unwrap();
    let end = format!(".localhost:{}", greenroom.preview_port);
    let slug = url
        .strip_prefix("http://")
        .and_then(|url| url.strip_suffix(&end));
    let slug = slug.unwrap_or_else(|| panic!("{url}"));
    let digest = slug.strip_prefix("acme-alice-main-").unwrap();
    assert!(
        digest.len() == 12 && digest.bytes().all(|b| b.is_ascii_hexdigit()),
        "{slug}"
    );
    assert!(preview["previewUrl"].as_str().unwrap().starts_with(url));
    let timings = answer["timings"].as_object().unwrap();
    assert!(
        timings.contains_key("cloneMs") && timings.contains_key("totalMs"),
        "{timings:?}"
    );
    let total = timings["totalMs"].as_f64().unwrap();
    for (name, took) in timings {
        let took = took.as_f64().unwrap();
        assert!(
            name.ends_with("Ms") && (0.0..=total).contains(&took),
            "{name}: {took}"
        );
    }

    let project = user.join("project");
    for branch in ["client/acme", "user/acme/alice", "thread/acme/alice/main"] {
        assert_eq!(git(&project, &["rev-parse", branch]), main, "{branch}");
    }
    let head = |folder: &Path| git(folder, &["symbolic-ref", "--short", "HEAD"]);
    assert_eq!(head(&project), "user/acme/alice");
    assert_eq!(head(&folders.worktree(&alice)), "thread/acme/alice/main");
    is_clean(&project);
    is_clean(folders.worktree(&alice));
    for (name, content) in SITE {
        let file = folders.worktree(&alice).join(name);
        assert_eq!(fs::read_to_string(file).unwrap(), *content, "{name}");
    }

    let metadata: Value =
        serde_json::from_slice(&fs::read(user.join("metadata.json")).unwrap()).unwrap();
    for time in ["created", "lastAccessed"] {
        assert!(
            metadata[time].as_str().unwrap().ends_with('Z'),
            "{metadata}"
        );
    }
    assert_eq!(metadata["repoUrl"], site);
    assert!(user.join(".claude/threads/main.json").is_file());
    assert!(user.join(".claude/sessions/main").is_dir());
    let entries = fs::read_dir(&user).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    assert_eq!(names, ["metadata.json", "project", "threads"]);
    let entries = fs::read_dir(folders.workspace()).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.retain(|name| !name.starts_with('.'));
    assert_eq!(names, ["acme"]);

    // The same again, also after a restart, with and without the repository named.
    let again = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let greenroom = greenroom.restart().await;
    let later = greenroom.init(&alice, json!({})).await.ok();
    for again in [again, later] {
        assert_eq!(again["resumed"], true);
        assert_eq!(again["workspace"]["resumed"], true);
        assert_eq!(again["head"], main);
        assert_eq!(again["branch"], answer["branch"]);
        assert_eq!(
            again["workspace"]["projectPath"],
            answer["workspace"]["projectPath"]
        );
        let slug_of = |answer: &Value| {
            answer["preview"]["url"]
                .as_str()
                .unwrap()
                .split('.')
                .next()
                .unwrap()
                .to_owned()
        };
        assert_eq!(slug_of(&again), slug_of(&answer), "the slug never changes");
    }
    let kept: Value =
        serde_json::from_slice(&fs::read(user.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(kept["created"], metadata["created"]);

    // A second thread of the user, and a second user, begin with the same files.
    for (other, cloned) in [
        (who("acme", "alice", "two"), false),
        (who("acme", "bob", "main"), true),
    ] {
        let fields = if cloned {
            json!({"repoUrl": site})
        } else {
            json!({})
        };
        let answer = greenroom.init(&other, fields).await.ok();
        assert_eq!(
            (&answer["resumed"], &answer["head"]),
            (&json!(false), &json!(main))
        );
        assert_eq!(answer["timings"]["cloneMs"].is_number(), cloned, "{answer}");
    }
}

#[tokio::test]
async fn the_template_is_the_site_where_none_is_named() {
    let folders = Folders::new();
    // Without Node nothing is installed: this is about files and git.
    let options = Options::new(&folders)
        .rehearsal()
        .env("PATH", "/nonexistent");
    let greenroom = TestGreenroom::start(options).await;
    let alice = who("acme", "alice", "main");
    let answer = greenroom
        .init(&alice, json!({"waitForPreview": false}))
        .await
        .ok();
    assert_eq!(answer["resumed"], false);
    let worktree = folders.worktree(&alice);
    assert!(worktree.join("astro.config.mjs").is_file());
    assert!(worktree.join("src/pages/index.astro").is_file());
    is_clean(&worktree);
    is_clean(folders.user(&alice).join("project"));
    assert_eq!(
        git(&worktree, &["rev-parse", "client/acme"]),
        answer["head"].as_str().unwrap()
    );
    let result = greenroom
        .execute(&alice, "Change the heading to Made by hand")
        .await
        .ok();
    assert_eq!(
        result["commit"]["files"][0]["path"],
        "src/pages/index.astro"
    );
    is_clean(&worktree);

    // It is a repository as any other: naming one now is another one.
    let site = folders.site("site", SITE);
    let refused = greenroom.init(&alice, json!({"repoUrl": site})).await;
    refused.error(409, "repo_mismatch");
}

#[tokio::test]
async fn the_next_thread_has_files_that_were_kept_ready() {
    let (folders, site, greenroom) = start().await;
    let alice = |thread: &str| who("acme", "alice", thread);
    greenroom
        .init(&alice("main"), json!({"repoUrl": site}))
        .await
        .ok();
    let file = |folder: &Path| {
        let about = fs::metadata(folder.join("src/pages/index.astro"));
        about.ok().map(|about| about.ino())
    };
    let kept = folders
        .user(&alice("main"))
        .join("project/.git/spare/files");
    let ino = wait_for("files are kept ready", || file(&kept)).await;
    // Two at once: one of them gets it, and neither waits for the other.
    let (one, other) = (alice("one"), alice("other"));
    let (first, second) = tokio::join!(
        greenroom.init(&one, json!({})),
        greenroom.init(&other, json!({}))
    );
    first.ok();
    second.ok();
    let (one, other) = (folders.worktree(&one), folders.worktree(&other));
    let taken = [file(&one), file(&other)].map(Option::unwrap);
    assert_eq!(taken.iter().filter(|taken| **taken == ino).count(), 1);
    is_clean(one);
    is_clean(other);
    // And one is there for the next.
    wait_for("files are kept ready again", || file(&kept)).await;
}

#[tokio::test]
async fn callers_at_once_get_one_thread() {
    let (folders, site, greenroom) = start().await;
    let alice = who("acme", "alice", "main");
    let init = || greenroom.init(&alice, json!({"repoUrl": site}));
    let (a, b, c, d) = tokio::join!(init(), init(), init(), init());
    let answers = [a.ok(), b.ok(), c.ok(), d.ok()];
    let made = answers
        .iter()
        .filter(|answer| answer["resumed"] == false)
        .count();
    assert_eq!(made, 1, "{answers:?}");
    assert!(
        answers
            .iter()
            .all(|answer| answer["head"] == answers[0]["head"])
    );

    // Threads of one user share a repository that is cloned once.
    let threads: Vec<_> = (0..4)
        .map(|n| who("acme", "bob", &format!("t{n}")))
        .collect();
    let inits = threads
        .iter()
        .map(|bob| greenroom.init(bob, json!({"repoUrl": site})));
    let answers = futures_util::future::join_all(inits).await;
    let answers: Vec<Value> = answers.into_iter().map(|answer| answer.ok()).collect();
    assert!(
        answers.iter().all(|answer| answer["resumed"] == false),
        "{answers:?}"
    );
    let cloned = answers
        .iter()
        .filter(|answer| answer["timings"]["cloneMs"].is_number())
        .count();
    assert_eq!(cloned, 1, "{answers:?}");
    for bob in &threads {
        is_clean(folders.worktree(bob));
    }
}

#[tokio::test]
async fn ids_that_differ_in_case_are_different_tenants() {
    let api = StandIn::start(json!({"rules": [
        rule("small", &[writes("small.txt", "small\n")]),
        rule("LARGE", &[writes("large.txt", "large\n")]),
    ]}))
    .await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let (small, large) = (who("acme", "alice", "main"), who("Acme", "alice", "Main"));
    let one = greenroom.init(&small, json!({"repoUrl": site})).await.ok();
    let other = greenroom.init(&large, json!({"repoUrl": site})).await.ok();
    assert_eq!(other["resumed"], false);
    assert_ne!(
        one["preview"]["url"].as_str().unwrap().to_lowercase(),
        other["preview"]["url"].as_str().unwrap().to_lowercase()
    );
    greenroom.execute(&small, "small").await.ok();
    greenroom.execute(&large, "LARGE").await.ok();
    for (who, own, foreign) in [
        (small, "small.txt", "large.txt"),
        (large, "large.txt", "small.txt"),
    ] {
        assert!(folders.worktree(&who).join(own).exists());
        assert!(!folders.worktree(&who).join(foreign).exists());
    }
}

#[tokio::test]
async fn a_thread_starts_where_the_branches_say() {
    let (folders, site, greenroom) = start().await;
    let commit = |branch: &str, file: &str| {
        git(&site, &["switch", "--quiet", "--create", branch, "main"]);
        fs::write(Path::new(&site).join(file), "x\n").unwrap();
        git(&site, &["add", "--all"]);
        git(&site, &["commit", "--quiet", "--message", file]);
        git(&site, &["rev-parse", "HEAD"])
    };
    let client = commit("client/acme", "of-the-client.txt");
    let legacy = commit("thread-old", "of-the-thread.txt");
    let base = commit("redesign", "of-the-base.txt");
    let trunk = commit("trunk", "of-the-trunk.txt");

    let head = async |client: &str, thread: &str, fields: Value| {
        let mut fields = fields;
        fields["repoUrl"] = json!(site);
        greenroom
            .init(&who(client, "alice", thread), fields)
            .await
            .ok()
    };
    // The origin has a branch of the client.
    let answer = head("acme", "main", json!({})).await;
    assert_eq!(
        (&answer["head"], &answer["resumed"]),
        (&json!(client), &json!(false))
    );
    let worktree = folders.worktree(&who("acme", "alice", "main"));
    assert!(worktree.join("of-the-client.txt").is_file());
    // It goes before a base that is named.
    let answer = head("acme", "other", json!({"baseBranch": "redesign"})).await;
    assert_eq!(answer["head"], client);
    // An older layout's branch of the thread.
    let answer = head("acme", "old", json!({})).await;
    assert_eq!(
        (&answer["head"], &answer["resumed"]),
        (&json!(legacy), &json!(true))
    );
    // Else the default branch: what the origin's HEAD names.
    let answer = head("globex", "main", json!({})).await;
    assert_eq!(answer["head"], trunk);
    // Unless a base is named.
    let answer = head("initech", "main", json!({"baseBranch": "redesign"})).await;
    assert_eq!(answer["head"], base);
    let project = folders
        .user(&who("initech", "alice", "main"))
        .join("project");
    assert_eq!(git(project, &["rev-parse", "client/initech"]), base);

    let fields = json!({"repoUrl": site, "baseBranch": "no-such-branch"});
    let refused = greenroom
        .init(&who("umbrella", "alice", "main"), fields)
        .await;
    let sentence = refused.error(422, "clone_failed");
    assert!(sentence.contains("no-such-branch"), "{sentence}");
}

#[tokio::test]
async fn another_repository_than_the_present_one_is_a_mismatch() {
    let (folders, site, greenroom) = start().await;
    let other = folders.site("other", SITE);
    let alice = who("acme", "alice", "main");
    let first = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    for thread in ["main", "second"] {
        let refused = greenroom
            .init(&who("acme", "alice", thread), json!({"repoUrl": other}))
            .await;
        let sentence = refused.error(409, "repo_mismatch");
        assert!(sentence.contains("acme/alice"), "{sentence}");
    }
    assert!(!folders.worktree(&who("acme", "alice", "second")).exists());
    // Other ways to write the present one.
    for same in [
        format!("{site}/"),
        format!("file://{site}"),
        format!("{site}/../site"),
    ] {
        let again = greenroom.init(&alice, json!({"repoUrl": same})).await.ok();
        assert_eq!(
            (&again["resumed"], &again["head"]),
            (&json!(true), &first["head"])
        );
    }
    // Another user may have it.
    greenroom
        .init(&who("acme", "bob", "main"), json!({"repoUrl": other}))
        .await
        .ok();
}

#[tokio::test]
async fn a_repository_that_cannot_be_had_leaves_nothing() {
    let (folders, site, greenroom) = start().await;
    let outside = folders.join("outside");
    fs::rename(&site, &outside).unwrap();
    let repos = folders.join("repos");
    std::os::unix::fs::symlink(&outside, repos.join("link")).unwrap();
    fs::create_dir(repos.join("no-repository")).unwrap();
    fs::create_dir(repos.join("empty")).unwrap();
    git(repos.join("empty"), &["init", "--quiet"]);
    let below = |path: &str| repos.join(path).to_str().unwrap().to_owned();
    let outside = outside.to_str().unwrap();
    let secret = "s3cr3t-t0ken";

    let invalid = (400, "invalid_request");
    let failed = (422, "clone_failed");
    let cases = [
        (outside.to_owned(), invalid),
        (format!("file://{outside}"), invalid),
        (below("link"), invalid),
        (below("../outside"), invalid),
        (below(""), invalid),
        ("/etc".to_owned(), invalid),
        ("/".to_owned(), invalid),
        ("relative/path".to_owned(), invalid),
        ("../outside".to_owned(), invalid),
        ("ssh://git@example.com/a/b".to_owned(), invalid),
        ("git@example.com:a/b.git".to_owned(), invalid),
        ("git://github.com/a/b".to_owned(), invalid),
        ("http://github.com/a/b".to_owned(), invalid),
        ("ext::sh -c touch% /tmp/x".to_owned(), invalid),
        ("--upload-pack=touch".to_owned(), invalid),
        ("https://".to_owned(), invalid),
        ("https://github.com".to_owned(), invalid),
        (format!("https://user:{secret}@github.com/a/b"), invalid),
        (format!("https://{secret}@github.com/a/b"), invalid),
        (format!("https://github.com/a/b?token={secret}"), invalid),
        ("https://github.com/a/b\nx".to_owned(), invalid),
        (String::new(), invalid),
        ("x".repeat(3000), invalid),
        (below("missing"), failed),
        (below("no-repository"), failed),
        (below("empty"), failed),
        // Nobody listens there.
        ("https://127.0.0.1:1/a/b".to_owned(), failed),
    ];
    let alice = who("acme", "alice", "main");
    for (url, (status, code)) in cases {
        let refused = greenroom.init(&alice, json!({"repoUrl": url})).await;
        let text = refused.text.clone();
        assert!(!text.contains(secret), "{text}");
        assert!(!text.contains(outside), "{url:?}: {text}");
        let sentence = refused.error(status, code);
        assert!(
            code == "clone_failed" || sentence.contains("repoUrl"),
            "{url:?}: {sentence}"
        );
        assert!(!folders.user(&alice).join("project").exists(), "{url:?}");
        assert!(
            !folders.user(&alice).join("metadata.json").exists(),
            "{url:?}"
        );
        assert!(!folders.user(&alice).join("threads").exists(), "{url:?}");
    }
    for root in [
        folders.workspace(),
        folders.join("home"),
        folders.join("tmp"),
        folders.join("cache"),
    ] {
        for file in files_below(&root) {
            assert!(!holds(&file, secret), "{}", file.display());
        }
    }
    assert!(!greenroom.log().concat().contains(secret));
    let missing = greenroom
        .execute(&alice, "Change the heading to X")
        .await
        .answer;
    missing.error(404, "not_found");

    // A failure is none for good.
    let site = folders.site("good", SITE);
    let answer = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(answer["resumed"], false);
}
