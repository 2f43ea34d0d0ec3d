//! The site in the browser: what an edit does to the page that is open.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{LISTEN, Room, hears, settles, thread};
use crate::support::{PATIENCE, Sent, request, wait_for_async};

const HEADING: &str = "Good pots for ordinary days";
const ACCENT: &str =
    "getComputedStyle(document.documentElement).getPropertyValue('--accent').trim()";

#[tokio::test]
async fn an_edit_shows_by_itself_and_is_the_whole_commit() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;
    let begin = room.git(&main, &["rev-parse", "HEAD"]);

    // Markup: Astro tells the page to load again.
    let turn = room
        .greenroom
        .execute(&main, "Change the heading to “Bowls for breakfast”")
        .await
        .ok();
    page.wait_for_text("h1", "Bowls for breakfast").await;
    let commit = turn["commit"]["id"].as_str().unwrap();
    assert_eq!(room.git(&main, &["rev-parse", "HEAD"]), commit);
    assert_eq!(room.git(&main, &["rev-parse", "HEAD^"]), begin);
    assert_eq!(
        room.git(&main, &["show", "--format=", "--numstat", "HEAD"]),
        "1\t1\tsrc/pages/index.astro"
    );
    let diff = room.git(&main, &["show", "--format=", "--unified=0", "HEAD"]);
    assert!(
        diff.contains(
            "\n-    <h1>Good pots for ordinary days</h1>\n+    <h1>Bowls for breakfast</h1>"
        ),
        "{diff}"
    );

    // Style: swapped in the page that is there.
    hears(&page).await;
    settles(&page).await;
    page.eval("window.mark = 'still the same page'").await;
    let before = page.eval(ACCENT).await;
    room.greenroom
        .execute(&main, "Make the accent colour teal")
        .await
        .ok();
    page.wait_for(&format!("{ACCENT} !== {before}")).await;
    assert_eq!(page.eval("window.mark").await, "still the same page");
    assert_eq!(
        room.git(&main, &["show", "--format=", "--name-only", "HEAD"]),
        "src/styles/global.css"
    );
    assert_eq!(room.git(&main, &["status", "--porcelain"]), "");
    assert_eq!(
        room.git(&main, &["rev-list", "--count", &format!("{begin}..HEAD")]),
        "2"
    );
    page.screenshot("site-after-two-edits").await;
    assert_eq!(page.complaints().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_broken_page_says_so_under_vites_overlay_and_comes_back_by_itself() {
    let room = Room::with(|options| options.env("PREVIEW_ERRORS", "overlay")).await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;

    let broken = room
        .greenroom
        .execute(&main, "Break the page on purpose")
        .await
        .ok();
    assert_eq!(broken["status"], "completed");
    page.wait_for("document.querySelector('vite-error-overlay')")
        .await;
    page.screenshot("site-broken").await;
    let preview = async |wanted: &str| {
        let path = format!("{}/preview", main.path());
        let said = async || {
            let preview = room.greenroom.get(&path).await.ok()["result"].clone();
            (preview["state"] == wanted).then_some(preview)
        };
        wait_for_async(&format!("the preview is {wanted}"), said).await
    };
    let errors = preview("error").await["errors"].clone();
    assert_eq!(errors[0]["file"], "src/pages/index.astro", "{errors}");
    assert!(errors[0]["line"].as_u64() > Some(0), "{errors}");
    let message = errors[0]["message"].as_str().unwrap();
    assert!(
        !message.is_empty() && !message.contains("/threads/"),
        "{errors}"
    );
    // A turn waits 700 ms for the preview's word, which a busy machine may need longer for.
    assert_eq!(broken["preview"]["state"], "error", "{broken}");
    if broken["preview"]["errors"][0]["file"].is_string() {
        assert_eq!(broken["preview"]["errors"], errors);
        let turn = broken["turnId"].as_str().unwrap();
        let events = room.greenroom.events(turn, 0).await.all().await;
        let told = events.iter().find(|event| event.name == "preview.error");
        assert_eq!(told.unwrap().data["errors"], errors);
    }

    // Who comes later is told too, and other pages are there.
    let late = room.open(&url).await;
    late.wait_for("document.querySelector('vite-error-overlay')")
        .await;
    let about = room.open(&format!("{url}/about")).await;
    about
        .wait_for_text("h1", "Four people, one large kiln")
        .await;

    room.greenroom.execute(&main, "Repair it").await.ok();
    for page in [&page, &late] {
        // The old text is behind the overlay.
        page.wait_for("!document.querySelector('vite-error-overlay')")
            .await;
        page.wait_for_text("h1", HEADING).await;
    }
    assert_eq!(preview("live").await["errors"], json!([]));
    for page in [&page, &late] {
        let overlay = page.eval("document.querySelector('vite-error-overlay')");
        assert_eq!(overlay.await, Value::Null, "and it stays away");
    }
}

/// Vite's watcher drops what comes within 50 ms of an earlier change of the same file. The page has to
/// come to what is in the site all the same.
#[tokio::test]
async fn the_last_of_quick_changes_is_what_is_shown() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;
    let new = "Made slowly, used daily";
    let wish = format!("Change the heading to “{new}”");
    room.greenroom.execute(&main, &wish).await.ok();
    page.wait_for_text("h1", new).await;
    for (what, heading) in [("undo", HEADING), ("redo", new)].repeat(4) {
        let path = format!("{}/{what}", main.path());
        room.greenroom.api("POST", &path, json!({})).await.ok();
        page.wait_for_text("h1", heading).await;
    }

    // As quick as can be: as soon as the server has shown one change there is the next.
    let file = room.folders.worktree(&main).join("src/pages/index.astro");
    let text = fs::read_to_string(&file).unwrap();
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let port = room.greenroom.preview_port;
    let get = Sent::new("GET", "/", &Value::Null).header("host", host);
    for round in 0..12 {
        let (passing, last) = (format!("Passing {round}"), format!("Last {round}"));
        fs::write(&file, text.replace(new, &passing)).unwrap();
        let shown = async {
            while !request(port, get.clone())
                .await
                .unwrap()
                .text
                .contains(&passing)
            {}
        };
        timeout(PATIENCE, shown).await.expect("the server shows it");
        fs::write(&file, text.replace(new, &last)).unwrap();
        page.wait_for_text("h1", &last).await;
    }
    let log = room.greenroom.log();
    let starts = log
        .iter()
        .filter(|line| line.contains("\"the dev server is ready\""));
    assert_eq!(starts.count(), 1, "it need not begin anew");
}

/// The line at the foot of a page that is broken.
const BANNER: &str = "#greenroom-banner";

#[tokio::test]
async fn a_broken_page_is_shown_as_it_was_with_a_banner() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;
    let about = room.open(&format!("{url}/about")).await;
    about.eval("window.mark = 'not loaded again'").await;

    room.greenroom
        .execute(&main, "Break the page on purpose")
        .await
        .ok();
    page.wait_for_text(BANNER, "src/pages/index.astro").await;
    page.wait_for_text("h1", HEADING).await;
    let overlay = "[...document.querySelectorAll('vite-error-overlay')]
        .every((overlay) => overlay.style.display === 'none')";
    assert_eq!(page.eval(overlay).await, true);
    page.screenshot("site-broken-with-banner").await;
    // Who comes later sees it too, and other pages are there.
    let late = room.chromium.open(&url).await;
    late.wait_for_text(BANNER, "src/pages/index.astro").await;
    late.wait_for_text("h1", HEADING).await;
    about
        .wait_for_text("h1", "Four people, one large kiln")
        .await;

    room.greenroom.execute(&main, "Repair it").await.ok();
    for page in [&page, &late] {
        page.wait_for(&format!("!document.querySelector('{BANNER}')"))
            .await;
        page.wait_for_text("h1", HEADING).await;
    }
}

#[tokio::test]
async fn a_page_that_was_not_there_yet_appears_by_itself() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&format!("{url}/fresh")).await;
    page.eval("window.mark = 'not loaded again'").await;
    // Greenroom takes what comes right after a page was shown for that page's own doing.
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    let file = room.folders.worktree(&main).join("src/pages/fresh.astro");
    fs::write(file, "<h1>Fresh from the kiln</h1>").unwrap();
    page.wait_for_text("h1", "Fresh from the kiln").await;
}

/// Who writes a file in its place empties it first. An empty page has no client that would hear of the
/// rest.
#[tokio::test]
async fn a_page_that_was_met_empty_comes_back_by_itself() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;
    let file = room.folders.worktree(&main).join("src/pages/index.astro");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, "").unwrap();
    page.wait_for("document.readyState === 'complete' && document.body.textContent.trim() === ''")
        .await;
    fs::write(&file, text).unwrap();
    page.wait_for_text("h1", HEADING).await;
}

#[tokio::test]
async fn two_threads_side_by_side_keep_to_themselves() {
    let room = Room::start().await;
    let (red, blue) = (thread("red"), thread("blue"));
    let (red_url, blue_url) = (room.init(&red).await, room.init(&blue).await);
    let (red_page, blue_page) = (room.open(&red_url).await, room.open(&blue_url).await);
    blue_page.wait_for_text("h1", HEADING).await;
    settles(&blue_page).await;
    blue_page.eval("window.mark = 'not loaded again'").await;

    room.greenroom
        .execute(&red, "Change the heading to “Red pots”")
        .await
        .ok();
    red_page.wait_for_text("h1", "Red pots").await;
    hears(&red_page).await;
    settles(&red_page).await;
    red_page.eval("window.mark = 'not loaded again'").await;
    assert_eq!(blue_page.eval("window.mark").await, "not loaded again");

    room.greenroom
        .execute(&blue, "Change the heading to “Blue pots”")
        .await
        .ok();
    blue_page.wait_for_text("h1", "Blue pots").await;
    assert_eq!(red_page.eval("window.mark").await, "not loaded again");
    red_page.wait_for_text("h1", "Red pots").await;

    // Without a label in the host name: the thread that was initialised last.
    let plain = format!("http://localhost:{}/", room.greenroom.preview_port);
    let page = room.open(&plain).await;
    page.wait_for_text("h1", "Blue pots").await;
    room.init(&red).await;
    page.call("Page.reload", json!({})).await;
    page.wait_for_text("h1", "Red pots").await;
}

/// Opens a socket from a page: `"open"`, or `"refused"`.
fn dial(url: &str, protocols: &str) -> String {
    format!(
        "new Promise((done) => {{
            const socket = new WebSocket({}, {protocols});
            socket.onopen = () => done('open');
            socket.onerror = () => done('refused');
        }})",
        json!(url)
    )
}

#[tokio::test]
async fn the_hmr_port_is_a_bridge_for_the_sites_own_pages_alone() {
    let room = Room::start().await;
    let (red, blue) = (thread("red"), thread("blue"));
    let (red_url, blue_url) = (room.init(&red).await, room.init(&blue).await);
    let (red_page, blue_page) = (room.open(&red_url).await, room.open(&blue_url).await);
    let (red_host, _) = red_url
        .strip_prefix("http://")
        .unwrap()
        .split_once(':')
        .unwrap();
    let bridge = format!("ws://{red_host}:{}/any/path", room.greenroom.hmr_port);

    // A client of no subprotocol, as a page of the site could open one.
    settles(&red_page).await;
    red_page.eval("window.heard = []").await;
    assert_eq!(red_page.eval(&dial(&bridge, "[]")).await, "open");
    hears(&red_page).await;
    room.greenroom
        .execute(&red, "Make the accent colour teal")
        .await
        .ok();
    // Each socket of the page hears of each update.
    red_page
        .wait_for("heard.some((data, i) => data.includes('\"update\"') && heard.indexOf(data) < i)")
        .await;

    // Another site's page.
    assert_eq!(blue_page.eval(&dial(&bridge, "[]")).await, "refused");
    assert_eq!(
        blue_page
            .eval(&dial(&red_url.replacen("http", "ws", 1), "['vite-hmr']"))
            .await,
        "refused"
    );
}

#[tokio::test]
async fn a_page_whose_server_is_gone_waits_and_comes_back() {
    let room = Room::start().await;
    let main = thread("main");
    let url = room.init(&main).await;
    let page = room.open(&url).await;
    page.wait_for_text("h1", HEADING).await;

    // Killed, and with a broken configuration it cannot come back.
    let config = room.folders.worktree(&main).join("astro.config.mjs");
    let good = std::fs::read(&config).unwrap();
    let server = room.children().into_iter().find(|(_, command)| {
        command.starts_with("node ") || command.contains("/node ") && command.contains("astro")
    });
    let (server, _) = server.unwrap_or_else(|| panic!("no dev server: {:?}", room.children()));
    // Stopped first, so that it does not see what happens to its configuration.
    kill(Pid::from_raw(server), Signal::SIGSTOP).unwrap();
    fs::write(&config, "export default {{{").unwrap();
    kill(Pid::from_raw(server), Signal::SIGKILL).unwrap();
    let state = async || {
        let path = format!("{}/preview", main.path());
        room.greenroom.get(&path).await.ok()["result"].take()
    };
    let begun = std::time::Instant::now();
    let broken = loop {
        let preview = state().await;
        if preview["state"] == "error" {
            break preview;
        }
        assert!(begun.elapsed() < crate::support::PATIENCE, "{preview}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert_ne!(broken["errors"], json!([]), "{broken}");

    // Vite's client asks each second whether the server is back, and would load the page at a yes.
    let ping = dial(&url.replacen("http", "ws", 1), "'vite-ping'");
    assert_eq!(page.eval(&ping).await, "refused");
    assert_eq!(
        page.eval("document.querySelector('h1').textContent").await,
        HEADING
    );

    // Who opens it now is told, and sees the site once it is repaired.
    let other = room.chromium.open_with(&url, LISTEN).await;
    other.wait_for_text("body", "astro.config.mjs").await;
    other.screenshot("preview-with-a-problem").await;
    fs::write(&config, good).unwrap();
    other.call("Page.reload", json!({})).await;
    other.wait_for_text("h1", HEADING).await;
    // The page that had waited for it is loaded anew, and hears again.
    page.wait_for("heard.length > 0").await;
    assert_ne!(page.eval("performance.now()").await, Value::Null);
}
