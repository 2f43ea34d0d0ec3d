//! A real dev server, Astro's and once Vite's own, behind the proxy, asked by a client that spells as it likes.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::client::IntoClientRequest};

use crate::support::{
    Folders, Options, PATIENCE, TestGreenroom, Who, acting_claude, wait_for, wait_for_async, who,
};

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

impl Room {
    /// Waits until the preview is said to be this.
    async fn becomes(&self, who: &Who, state: &str) -> Value {
        let said = async || {
            let preview = self.preview(who).await;
            (preview["state"] == state).then_some(preview)
        };
        wait_for_async(&format!("the preview is {state}"), said).await
    }

    /// What is there once its server is: the proxy waits for it too, but not as long as a slow machine
    /// may need.
    async fn page(&self, host: &str, target: &str) -> Answer {
        let there = async || {
            let answer = self.ask(host, target, "").await;
            (answer.status != 503).then_some(answer)
        };
        wait_for_async(&format!("there is a {target}"), there).await
    }

    /// Waits until the preview has been in a state for two seconds.
    async fn stays(&self, who: &Who, state: &str) {
        let stayed = async || {
            for _ in 0..20 {
                if self.preview(who).await["state"] != state {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Some(())
        };
        wait_for_async(&format!("the preview stays {state}"), stayed).await;
    }

    /// Waits until the first page shows a text.
    async fn shows(&self, host: &str, text: &str) {
        let shown = async || {
            let page = self.ask(host, "/", "Accept: text/html\r\n").await;
            page.body.contains(text).then_some(())
        };
        wait_for_async(&format!("the page shows {text}"), shown).await;
    }

    /// A browser's HMR socket, greeted.
    async fn hmr(&self, host: &str) -> WebSocketStream<TcpStream> {
        let mut request = format!("ws://{host}/").into_client_request().unwrap();
        let protocol = "vite-hmr".parse().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        let stream = TcpStream::connect(("127.0.0.1", self.greenroom.preview_port));
        let (mut socket, _) = client_async(request, stream.await.unwrap()).await.unwrap();
        let greeting = timeout(PATIENCE, socket.next()).await.unwrap();
        let greeting = greeting.unwrap().unwrap();
        assert_eq!(greeting.to_text().unwrap(), r#"{"type":"connected"}"#);
        socket
    }

    fn write(&self, who: &Who, file: &str, text: &str) {
        let path = self.folders.worktree(who).join(file);
        std::fs::write(path, text).unwrap();
    }

    fn read(&self, who: &Who, file: &str) -> String {
        let path = self.folders.worktree(who).join(file);
        std::fs::read_to_string(path).unwrap()
    }
}

const HEADING: &str = "Good pots for ordinary days";
const INDEX: &str = "src/pages/index.astro";

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
    let page = room.page(&red_host, "/").await;
    assert!(page.status == 200 && page.body.contains("Red pots"));
    assert_eq!(room.preview(&blue).await["state"], "asleep");

    // A page that is opened is told to wait, and is there a moment later at the same address.
    let waiting = room.ask(&blue_host, "/", "Accept: text/html\r\n").await;
    assert_eq!(waiting.status, 503);
    assert!(waiting.body.contains("holding.js"), "{}", waiting.body);
    let page = room.page(&blue_host, "/about").await;
    assert_eq!(page.status, 200, "{}", page.body);
    assert_eq!(room.preview(&red).await["state"], "asleep");

    // So does an init.
    assert_eq!(room.init(&red).await, red_host);
    assert_eq!(room.preview(&blue).await["state"], "asleep");

    // What was installed is kept for the next container, once a page was there.
    let kept = room.folders.user(&red).join(".greenroom/dependencies");
    wait_for("the dependencies are kept", || {
        let archives = std::fs::read_dir(&kept).ok()?;
        let mut names = archives.flatten().map(|entry| entry.path());
        names.find(|path| path.extension().is_some_and(|ending| ending == "zst"))
    })
    .await;
}

#[tokio::test]
async fn a_server_that_misses_changes_is_stale_and_heals() {
    let room = Room::with(|options| options).await;
    let main = thread("main");
    let host = room.init(&main).await;
    room.shows(&host, HEADING).await;

    // A changed configuration leads to a new server by itself. This one makes Vite deaf.
    let config = "export default { devToolbar: { enabled: false },
        vite: { server: { watch: { ignored: ['**/src/**'] } } } };";
    let restarted = Instant::now();
    room.write(&main, "astro.config.mjs", config);
    room.becomes(&main, "starting").await;
    room.becomes(&main, "live").await;
    room.shows(&host, HEADING).await;
    // 3 to 4 s on a machine that has nothing else to do; the limits below are for such a one.
    let restart = restarted.elapsed();
    let busy = (restart.as_secs_f64() / 4.0).max(1.0);

    let index = room.read(&main, INDEX);
    let edited = Instant::now();
    room.write(
        &main,
        INDEX,
        &index.replace(HEADING, "Pots that were missed"),
    );
    let stale = room.becomes(&main, "stale").await;
    let stale_after = edited.elapsed();
    assert_eq!(stale["errors"][0]["file"], INDEX, "{stale}");
    room.shows(&host, "Pots that were missed").await;
    let healed_after = edited.elapsed();
    println!("stale after {stale_after:?}, healed after {healed_after:?}, restart {restart:?}");
    assert!(
        stale_after < Duration::from_secs(3).mul_f64(busy),
        "{stale_after:?}"
    );
    assert!(
        healed_after < Duration::from_secs(10).mul_f64(busy),
        "{healed_after:?}"
    );
    let live = room.becomes(&main, "live").await;
    assert_eq!(live["errors"].as_array().map_or(0, Vec::len), 0, "{live}");

    // Of what it does not serve it may be silent.
    room.write(
        &main,
        "src/components/Unused.astro",
        "<p>nobody uses it</p>",
    );
    room.write(&main, "src/components/Unused.astro", "<p>nobody at all</p>");
    room.write(&main, "README.md", "changed");
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(room.preview(&main).await["state"], "live");
    }
}

#[tokio::test]
async fn a_change_right_after_the_start_is_no_reason_for_doubt() {
    let room = Room::with(|options| options).await;
    let heading = |round: u32| format!("Pots of round {round}");
    let mut hosts = Vec::new();
    for (round, pause) in (0..).zip([0, 300, 800]) {
        let main = thread(&format!("early{round}"));
        let host = room.init(&main).await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let instruction = format!("Change the heading to “{}”", heading(round));
        let turn = room.greenroom.execute(&main, &instruction).await.ok();
        assert_eq!(turn["preview"]["state"], "live", "{turn}");
        room.shows(&host, &heading(round)).await;
        hosts.push((main, host));
    }
    // Longer than any doubt takes to become a restart.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        for (main, _) in &hosts {
            let preview = room.preview(main).await;
            assert_eq!(preview["state"], "live", "{preview}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let log = room.greenroom.log().join("\n");
    assert!(!log.contains("misses changes"), "{log}");
    assert!(!log.contains("it doesn't see changes"), "{log}");
}

#[tokio::test]
async fn a_server_without_events_looks_for_changes_by_itself() {
    // The limit of inotify, of a namespace in which 8 watches are allowed.
    let few = "echo 8 > /proc/sys/user/max_inotify_watches && exec \"$@\"";
    let room = Room::with(|options| options.started_by(few)).await;
    let main = thread("main");
    let answer = room.greenroom.init(&main, json!({})).await.ok();
    let url = answer["preview"]["url"].as_str().unwrap();
    let host = url.trim_start_matches("http://").to_owned();
    room.becomes(&main, "live").await;
    room.shows(&host, HEADING).await;
    let index = room.read(&main, INDEX);
    let edited = Instant::now();
    room.write(
        &main,
        INDEX,
        &index.replace(HEADING, "Pots that were looked for"),
    );
    room.shows(&host, "Pots that were looked for").await;
    println!("shown after {:?}", edited.elapsed());
    let log = room.greenroom.log().join("\n");
    assert!(log.contains("it can't watch the site's files"), "{log}");
}

/// Reads until the page is told to load again.
async fn is_told_to_reload(socket: &mut WebSocketStream<TcpStream>) {
    let told = async {
        while let Some(message) = socket.next().await {
            if message.unwrap().to_text().unwrap().contains("full-reload") {
                return;
            }
        }
        panic!("the socket ended");
    };
    timeout(PATIENCE, told).await.expect("a reload");
}

#[tokio::test]
async fn pages_load_again_where_vite_tells_them_nothing() {
    let room = Room::with(|options| options).await;
    let main = thread("main");
    let host = room.init(&main).await;
    room.shows(&host, HEADING).await;
    assert_eq!(
        room.ask(&host, "/new", "Accept: text/html\r\n")
            .await
            .status,
        404
    );
    // A cold server tells its first browser to reload; what it has said is over after a while.
    let mut socket = room.hmr(&host).await;
    while let Ok(Some(_)) = timeout(Duration::from_secs(3), socket.next()).await {}

    room.write(&main, "src/pages/new.astro", "<h1>New page</h1>");
    is_told_to_reload(&mut socket).await;
    let page = room.ask(&host, "/new", "Accept: text/html\r\n").await;
    assert!(page.body.contains("New page"), "{}", page.body);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    room.write(&main, "public/notes.txt", "one");
    is_told_to_reload(&mut socket).await;
    assert_eq!(room.ask(&host, "/notes.txt", "").await.body, "one");
    assert_eq!(room.preview(&main).await["state"], "live");

    // A page that somebody has from the server before, and this one has never rendered.
    let about = room.ask(&host, "/about", "Accept: text/html\r\n").await;
    assert_eq!(about.status, 200);
    room.write(&main, "tsconfig.json", "{}");
    room.becomes(&main, "starting").await;
    room.becomes(&main, "live").await;
    room.shows(&host, HEADING).await;
    let mut socket = room.hmr(&host).await;
    while let Ok(Some(_)) = timeout(Duration::from_secs(3), socket.next()).await {}
    let about = room.read(&main, "src/pages/about.astro");
    room.write(
        &main,
        "src/pages/about.astro",
        &format!("{about}\n<p>more</p>"),
    );
    is_told_to_reload(&mut socket).await;
    assert_eq!(room.preview(&main).await["state"], "live");
}

#[tokio::test]
async fn errors_stay_as_long_as_what_is_broken() {
    let room = Room::with(|options| options).await;
    let main = thread("main");
    let host = room.init(&main).await;
    room.shows(&host, HEADING).await;
    let index = room.read(&main, INDEX);
    let broken = index.replace(HEADING, "{broken(");

    // Mended before the error of it has come.
    for round in 0..3 {
        room.write(&main, INDEX, &broken);
        room.ask(&host, "/", "Accept: text/html\r\n").await;
        room.write(
            &main,
            INDEX,
            &index.replace(HEADING, &format!("Round {round}")),
        );
        room.shows(&host, &format!("Round {round}")).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let live = room.becomes(&main, "live").await;
        assert!(
            live["errors"].as_array().is_none_or(Vec::is_empty),
            "{live}"
        );
    }

    // What Astro says in its log alone is not over because another page is fine.
    let folder = room.folders.worktree(&main).join("src/content/journal");
    let names = std::fs::read_dir(folder).unwrap().flatten();
    let first = names.map(|entry| entry.file_name()).min().unwrap();
    let entry = format!("src/content/journal/{}", first.to_str().unwrap());
    let good = room.read(&main, &entry);
    let said = async || {
        // A fresh server may miss the first change of its content.
        room.write(&main, &entry, "---\ntitle: [1\n---\n");
        tokio::time::sleep(Duration::from_secs(1)).await;
        (room.preview(&main).await["state"] == "error").then_some(())
    };
    wait_for_async("the broken entry is told", said).await;
    room.write(&main, INDEX, &index);
    room.shows(&host, HEADING).await;
    // Of the last of those changes a busy server tells late.
    room.stays(&main, "error").await;
    room.write(&main, &entry, &good);
    room.becomes(&main, "live").await;
    // Mended before the log has said that it was broken.
    for pause in [0, 5, 20, 50, 120] {
        room.write(&main, &entry, "---\ntitle: [1\n---\n");
        tokio::time::sleep(Duration::from_millis(pause)).await;
        room.write(&main, &entry, &good);
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    room.stays(&main, "live").await;

    // Astro serves a stylesheet that is cut off as if it were whole.
    let sheet = "src/styles/global.css";
    let whole = room.read(&main, sheet);
    room.write(&main, sheet, &format!("{whole}\n.x {{\n  color: "));
    let said = room.becomes(&main, "error").await;
    let line = whole.lines().count() + 2;
    assert_eq!(said["errors"][0]["file"], sheet, "{said}");
    assert_eq!(said["errors"][0]["line"], line, "{said}");
    room.write(&main, sheet, &whole);
    room.becomes(&main, "live").await;
}

#[tokio::test]
async fn a_turn_answers_for_itself_alone() {
    // Turns that are over as soon as they have written.
    let room = Room::with(|options| options.env("CLAUDE_BIN", acting_claude())).await;
    let main = thread("main");
    let host = room.init(&main).await;
    room.shows(&host, HEADING).await;
    let write = async |text: &str| {
        let instruction = format!("write {INDEX} {text}");
        let turn = room.greenroom.execute(&main, &instruction).await.ok();
        turn["preview"].clone()
    };
    let (mut broken, mut mended) = (0, 0);
    // A word has 700 ms to come, which a busy machine does not always give it.
    for round in 0..20 {
        if round >= 5 && broken > 0 && mended > 0 {
            break;
        }
        let word = write(&format!("<h1>{{broken({round}</h1>")).await;
        broken += usize::from(word["state"] == "error");
        room.becomes(&main, "error").await;
        let word = write(&format!("<h1>Round {round}</h1>")).await;
        mended += usize::from(word["state"] == "live" && word["errors"] == json!([]));
        room.becomes(&main, "live").await;
    }
    let figures = room.greenroom.get("/metrics").await.text;
    if !figures.contains("greenroom_hmr_delay_seconds_count{word=\"came\"}") {
        eprintln!("not judged: on this machine no word came in time");
        return;
    }
    assert!(broken > 0, "none was told of its error");
    assert!(mended > 0, "each was told the error of the turn before");
}

/// Says that a person has the first page before them, which wants to hear of changes.
async fn presence(room: &Room, host: &str) -> u16 {
    let stream = TcpStream::connect(("127.0.0.1", room.greenroom.preview_port)).await;
    let mut stream = stream.unwrap();
    let request = format!(
        "POST /__greenroom/presence HTTP/1.1\r\nHost: {host}\r\nX-Greenroom-Hears: 1\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let read = timeout(PATIENCE, stream.read_to_string(&mut text)).await;
    read.unwrap().unwrap();
    text.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_browser_that_hears_nothing_makes_the_preview_stale() {
    let room = Room::with(|options| options).await;
    let main = thread("main");
    let host = room.init(&main).await;
    room.shows(&host, HEADING).await;
    let socket = room.hmr(&host).await;
    assert_eq!(presence(&room, &host).await, 204);
    drop(socket);
    let told = async || (presence(&room, &host).await == 205).then_some(());
    wait_for_async("the page is told to load again", told).await;
    let stale = room.becomes(&main, "stale").await;
    let message = stale["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("lost its connection"), "{stale}");
    let _socket = room.hmr(&host).await;
    let live = room.becomes(&main, "live").await;
    assert!(live["errors"].as_array().is_none_or(Vec::is_empty));
    assert_eq!(presence(&room, &host).await, 204);

    // What was told between a page and its socket reaches the browser all the same.
    let page = room.ask(&host, "/", "Accept: text/html\r\n").await;
    assert!(page.body.contains(HEADING));
    let index = room.read(&main, INDEX);
    room.write(
        &main,
        INDEX,
        &index.replace(HEADING, "Pots of a moment ago"),
    );
    let shown = async || {
        let page = room.ask(&host, "/", "").await;
        page.body.contains("a moment ago").then_some(())
    };
    wait_for_async("the server has it", shown).await;
    let mut late = room.hmr(&host).await;
    is_told_to_reload(&mut late).await;
    room.shows(&host, "a moment ago").await;
    let mut fresh = room.hmr(&host).await;
    let silence = timeout(Duration::from_secs(2), fresh.next()).await;
    assert!(silence.is_err(), "{silence:?}");
}

/// What is installed for the built-in template has Vite in it.
#[tokio::test]
async fn a_site_of_vite_alone_is_a_site() {
    let room = Room::with(|options| options).await;
    let manifest = include_str!("../../workspace-template/package.json");
    let script = "export const words = 'thrown by hand'\n\
         document.querySelector('#words').textContent = words\n\
         if (import.meta.hot) import.meta.hot.accept()\n";
    let site = room.folders.site(
        "vite",
        &[
            (
                "package.json",
                &manifest.replace("\"dev\": \"astro dev\"", "\"dev\": \"vite\""),
            ),
            (
                "package-lock.json",
                include_str!("../../workspace-template/package-lock.json"),
            ),
            (
                "index.html",
                "<!doctype html><h1>Pots</h1><p id=words></p>\n\
                 <script type=module src=/src/main.js></script>\n",
            ),
            ("src/main.js", script),
        ],
    );
    let main = thread("main");
    let answer = room
        .greenroom
        .init(&main, json!({"repoUrl": site}))
        .await
        .ok();
    assert_eq!(answer["preview"]["state"], "live", "{answer}");
    let url = answer["preview"]["url"].as_str().unwrap();
    let host = url.trim_start_matches("http://").to_owned();
    let page = room.ask(&host, "/", "Accept: text/html\r\n").await;
    assert_eq!(page.status, 200);
    assert!(page.body.contains("/@vite/client"), "{}", page.body);
    let source = room.ask(&host, "/src/main.js", "").await;
    assert!(source.body.contains("thrown by hand"), "{}", source.body);

    // A change is told, and shows.
    let mut socket = room.hmr(&host).await;
    room.write(
        &main,
        "src/main.js",
        &script.replace("by hand", "on a wheel"),
    );
    let told = async {
        loop {
            let message = socket.next().await.unwrap().unwrap();
            if message.to_text().unwrap().contains("/src/main.js") {
                return;
            }
        }
    };
    timeout(PATIENCE, told).await.expect("the change is told");
    let source = room.ask(&host, "/src/main.js", "").await;
    assert!(source.body.contains("on a wheel"), "{}", source.body);
    let bowls = room.read(&main, "index.html").replace("Pots", "Bowls");
    room.write(&main, "index.html", &bowls);
    room.shows(&host, "Bowls").await;

    // So is what breaks it.
    let broken = async || {
        // Vite may read the file while it is empty, and take both writes for one change.
        room.write(&main, "src/main.js", "export const words = (\n");
        tokio::time::sleep(Duration::from_millis(500)).await;
        // As the page would.
        room.ask(&host, "/src/main.js", "").await;
        let preview = room.preview(&main).await;
        (preview["state"] == "error").then_some(preview)
    };
    let broken = wait_for_async("the error is told", broken).await;
    assert_eq!(broken["errors"][0]["file"], "src/main.js", "{broken}");
    assert!(broken["errors"][0]["line"].is_u64(), "{broken}");
    room.write(&main, "src/main.js", script);
    room.becomes(&main, "live").await;
}
