//! A real Astro dev server behind the proxy, asked by a client that spells as it likes.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{Folders, Options, PATIENCE, TestGreenroom, Who, who};

/// The program on the built-in template.
struct Room {
    folders: Folders,
    greenroom: TestGreenroom,
}

struct Answer {
    status: u16,
    body: String,
}

impl Room {
    async fn with(more: impl FnOnce(Options) -> Options) -> Self {
        let folders = Folders::new();
        let options = Options::new(&folders).rehearsal().astro();
        let greenroom = TestGreenroom::start(more(options)).await;
        Self { folders, greenroom }
    }

    /// Makes a thread ready. Answers the host of its preview.
    async fn init(&self, who: &Who) -> String {
        let answer = self.greenroom.init(who, json!({})).await.ok();
        assert_eq!(answer["preview"]["state"], "live", "{answer}");
        let url = answer["preview"]["url"].as_str().unwrap();
        url.trim_start_matches("http://").to_owned()
    }

    /// Asks for a target as it is written.
    async fn ask(&self, host: &str, target: &str, fields: &str) -> Answer {
        let stream = TcpStream::connect(("127.0.0.1", self.greenroom.preview_port)).await;
        let mut stream = stream.unwrap();
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{fields}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut text))
            .await
            .unwrap_or_else(|_| panic!("no answer to {target}"))
            .unwrap();
        let text = String::from_utf8_lossy(&text);
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
        Answer {
            status: status.unwrap_or(0),
            body: text.split_once("\r\n\r\n").unwrap_or_default().1.to_owned(),
        }
    }

    /// What the thread's preview is said to be.
    async fn preview(&self, who: &Who) -> Value {
        let path = format!("{}/preview", who.path());
        self.greenroom.get(&path).await.ok()["result"].take()
    }
}

fn thread(name: &str) -> Who {
    who("demo", "me", name)
}

#[tokio::test]
async fn files_that_are_nobodys_business_stay_where_they_are() {
    let room = Room::with(|options| options).await;
    let main = thread("main");
    let host = room.init(&main).await;
    let worktree = room.folders.worktree(&main);
    let secret = "very-secret-1234";
    for file in ["src/.env", "secret.pem", ".claude.json.key", "src/kept.txt"] {
        std::fs::write(worktree.join(file), format!("KEY={secret}\n")).unwrap();
    }
    let below = worktree.display();
    for target in [
        "/src/.env".to_owned(),
        "/src/.env?raw".to_owned(),
        "/src/.env?raw??".to_owned(),
        "/src/.env?import&raw??".to_owned(),
        "/src/.env?import&?inline=1.wasm?init".to_owned(),
        "/src/.env?.svg?.wasm?init".to_owned(),
        "/src/.env/.".to_owned(),
        "/src/%2eenv".to_owned(),
        "/src/%252eenv".to_owned(),
        "//src/.env".to_owned(),
        "/src/\\.env".to_owned(),
        "/src/.env%00".to_owned(),
        "/src/..%2fsrc%2f.env".to_owned(),
        "/secret.pem".to_owned(),
        "/secret.pem/.".to_owned(),
        "/secret.pem?url&raw".to_owned(),
        "/.claude.json.key?raw".to_owned(),
        "/.git".to_owned(),
        format!("/@fs{below}/src/.env"),
        format!("/@fs{below}/src/.env?import&raw??"),
        format!("/@fs{below}/src/../secret.pem"),
        format!("/@fs{below}/src/kept.txt#/../.env"),
        format!("/@id/{below}/secret.pem"),
        format!("/@id/%2f{below}/secret.pem"),
        "/@fs/etc/passwd".to_owned(),
        "/@fs/etc/passwd?import&raw??".to_owned(),
        "/@fs/proc/self/environ".to_owned(),
        "/etc/passwd?import&raw??".to_owned(),
        "/../../../../etc/passwd".to_owned(),
        "/node_modules/.vite/deps/../../../../../../etc/passwd.map".to_owned(),
        "/_image?href=%2F%40fs%2Fetc%2Fpasswd&f=svg".to_owned(),
        format!("/_image?href=/@fs{below}/secret.pem&f=svg"),
        "/__open-in-editor?file=src/pages/index.astro".to_owned(),
    ] {
        for fields in ["", "Accept: text/html\r\n", "Sec-Fetch-Dest: script\r\n"] {
            let answer = room.ask(&host, &target, fields).await;
            let is_cut = target.contains('#');
            assert!(
                matches!(answer.status, 400 | 403) || is_cut,
                "{target}: {}",
                answer.status
            );
            let leaks = answer.body.contains(secret) && !is_cut;
            assert!(!leaks && !answer.body.contains("root:"), "{target}");
        }
    }

    // All that pages ask for.
    let mut asked = vec![
        "/@vite/client".to_owned(),
        "/src/styles/global.css?direct".to_owned(),
        "/src/kept.txt?raw".to_owned(),
        "/@id/astro:scripts/page.js".to_owned(),
        format!("/@fs{below}/src/assets/shelf.webp?origWidth=10&origFormat=webp"),
        "/?q=caf%C3%A9&t=1".to_owned(),
    ];
    for page in ["/", "/about", "/journal"] {
        let answer = room.ask(&host, page, "Accept: text/html\r\n").await;
        assert_eq!(answer.status, 200, "{page}");
        for attribute in ["src=\"", "href=\""] {
            let found = answer.body.split(attribute).skip(1);
            let found = found.filter_map(|rest| rest.split('"').next());
            asked.extend(
                found
                    .filter(|target| target.starts_with('/'))
                    .map(|target| target.replace("&amp;", "&")),
            );
        }
    }
    asked.sort();
    asked.dedup();
    assert!(
        asked.iter().any(|target| target.starts_with("/_image?")),
        "{asked:?}"
    );
    for target in asked {
        let answer = room.ask(&host, &target, "").await;
        assert!(
            answer.status < 400 || answer.status == 404 && target.starts_with("/@id/"),
            "{target}: {} {}",
            answer.status,
            &answer.body[..answer.body.len().min(300)]
        );
    }
    assert_eq!(room.preview(&main).await["state"], "live");
}

#[tokio::test]
async fn of_two_threads_with_room_for_one_the_other_sleeps_and_wakes() {
    let room = Room::with(|options| options.env("MAX_PREVIEWS", "1")).await;
    let (red, blue) = (thread("red"), thread("blue"));
    let red_host = room.init(&red).await;
    let blue_host = room.init(&blue).await;
    assert_ne!(red_host, blue_host);
    assert_eq!(room.preview(&red).await["state"], "asleep");
    let threads = room
        .greenroom
        .get("/api/threads?clientId=demo&userId=me")
        .await;
    assert!(threads.text.contains("\"asleep\""), "{}", threads.text);

    // Nobody needs the other one: the turn wakes its own preview, whose word is in its result.
    let turn = room
        .greenroom
        .execute(&red, "Change the heading to “Red pots”")
        .await
        .ok();
    let said = turn["preview"]["state"].as_str().unwrap();
    assert!(["starting", "live"].contains(&said), "{turn}");
    let page = room.ask(&red_host, "/", "").await;
    assert!(page.status == 200 && page.body.contains("Red pots"));
    assert_eq!(room.preview(&blue).await["state"], "asleep");

    // A page that is opened is told to wait, and is there a moment later at the same address.
    let waiting = room.ask(&blue_host, "/", "Accept: text/html\r\n").await;
    assert_eq!(waiting.status, 503);
    assert!(waiting.body.contains("holding.js"), "{}", waiting.body);
    let page = room.ask(&blue_host, "/about", "").await;
    assert_eq!(page.status, 200, "{}", page.body);
    assert_eq!(room.preview(&red).await["state"], "asleep");

    // So does an init.
    assert_eq!(room.init(&red).await, red_host);
    assert_eq!(room.preview(&blue).await["state"], "asleep");
}
