//! Many tenants at once: each gets its own answer, and nothing is mixed up.

use std::fs;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{Folders, Options, SITE, StandIn, TestGreenroom, Who, git, who};

const PAGE: &str = "src/pages/index.astro";

fn heading(who: &Who) -> String {
    format!("Site of {} {} {}", who.client, who.user, who.thread)
}

#[tokio::test]
async fn twenty_threads_of_several_tenants_at_once() {
    let api = StandIn::start(json!({})).await;
    let folders = Folders::new();
    // Each client has a site of its own.
    let clients = ["acme", "globex", "initech", "umbrella", "hooli"];
    let sites: Vec<String> = clients
        .iter()
        .map(|client| {
            let mut files = SITE.to_vec();
            files.push(("CLIENT.txt", client));
            folders.site(client, &files)
        })
        .collect();
    let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    let mut everybody = Vec::new();
    for (client, site) in clients.iter().zip(&sites) {
        for user in ["alice", "bob"] {
            for thread in ["one", "two"] {
                everybody.push((who(client, user, thread), site));
            }
        }
    }
    // Nobody asks for these while the others are busy: they stay as they are.
    let bystanders = [who("acme", "alice", "quiet"), who("acme", "carol", "main")];
    for bystander in &bystanders {
        greenroom
            .init(bystander, json!({"repoUrl": sites[0]}))
            .await
            .ok();
    }
    let state = |who: &Who| {
        let worktree = folders.worktree(who);
        (
            git(&worktree, &["rev-parse", "HEAD"]),
            git(&worktree, &["status", "--porcelain"]),
        )
    };
    let before = bystanders.clone().map(|who| state(&who));

    assert_eq!(everybody.len(), 20);
    let calls = everybody.iter().map(|(who, site)| {
        let greenroom = &greenroom;
        async move {
            let init = greenroom.init(who, json!({"repoUrl": site})).await.ok();
            let text = format!("Change the heading to “{}”", heading(who));
            (init, greenroom.execute(who, &text).await.ok())
        }
    });
    let answers = join_all(calls).await;

    for ((who, _), (init, result)) in everybody.iter().zip(&answers) {
        assert_eq!(init["branch"], who.branch());
        assert_eq!(init["resumed"], false);
        let worktree = folders.worktree(who);
        assert_eq!(init["workspace"]["projectPath"], worktree.to_str().unwrap());
        assert_eq!(
            fs::read_to_string(worktree.join("CLIENT.txt")).unwrap(),
            who.client
        );

        let turn = result["turnId"].as_str().unwrap();
        assert!(
            turn.starts_with(&format!("{}~{}~{}~", who.client, who.user, who.thread)),
            "{turn}"
        );
        assert!(
            result["text"].as_str().unwrap().contains(&heading(who)),
            "{result}"
        );
        assert_eq!(result["context"]["branch"], who.branch());
        assert_eq!(result["context"]["history"].as_array().unwrap().len(), 1);
        assert_eq!(
            result["commit"]["id"],
            git(&worktree, &["rev-parse", "HEAD"])
        );
        let page = fs::read_to_string(worktree.join(PAGE)).unwrap();
        assert!(
            page.contains(&format!("<h1>{}</h1>", heading(who))),
            "{page}"
        );
        assert_eq!(page.matches("Site of").count(), 1, "{page}");
        assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
        let range = format!("client/{}..HEAD", who.client);
        assert_eq!(git(&worktree, &["rev-list", "--count", &range]), "1");
        let trailers = git(&worktree, &["log", "-1", "--format=%(trailers:only)"]);
        assert!(
            trailers.contains(&format!("Turn-Id: {turn}\n")),
            "{trailers}"
        );
        // What the model was told in this conversation is this person's alone.
        let session = result["sessionId"].as_str().unwrap();
        let requests = api.requests();
        let own = requests
            .iter()
            .filter(|request| request.session.as_deref() == Some(session));
        for request in own {
            assert!(request.instruction.contains(&heading(who)), "{request:?}");
        }
    }
    let mut sessions: Vec<&Value> = answers
        .iter()
        .map(|(_, result)| &result["sessionId"])
        .collect();
    sessions.sort_by_key(|session| session.as_str());
    sessions.dedup();
    assert_eq!(sessions.len(), 20, "each has a conversation of its own");
    assert_eq!(bystanders.map(|who| state(&who)), before);
}
