//! People keep the container awake; what is left open does not, and nothing outlives the program.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{LISTEN, Room, thread};
use crate::support::{PATIENCE, wait_for};

/// Time flies for the page's timers, so that it says "a person is here" every second.
const FAST: &str = "
    const every = window.setInterval;
    window.setInterval = (job, time) => every(job, time / 30);
    window.said = () => performance.getEntriesByName(location.origin + '/__greenroom/presence').length;";

#[tokio::test]
async fn a_visible_page_is_a_person_and_an_open_socket_is_nobody() {
    // 15 seconds, in which a slow machine's browser opens a page.
    let mut room = Room::with(|options| options.env("AUTO_SHUTDOWN_MINUTES", "0.25")).await;
    let url = room.init(&thread("main")).await;
    let page = room
        .chromium
        .open_with(&url, &format!("{LISTEN}{FAST}"))
        .await;
    super::hears(&page).await;

    page.wait_for("said() > 2").await;
    let idle = room.greenroom.get("/api/idle").await.body;
    let holders = idle["holders"].as_array().unwrap();
    assert!(
        holders.iter().any(|holder| holder["kind"] == "preview"
            && holder["who"]
                .as_str()
                .is_some_and(|who| who.contains("main"))),
        "{idle}"
    );
    assert_eq!(idle["stopsAt"], Value::Null, "{idle}");

    // Another tab in front of it: nobody looks any more, its socket stays open.
    let blank = room.chromium.open("about:blank").await;
    blank.show().await;
    page.wait_for("document.visibilityState === 'hidden'").await;
    let hidden = Instant::now();
    // What it was saying just then is said.
    let mut said = page.eval("said()").await;
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = page.eval("said()").await;
        if said == now {
            break;
        }
        assert!(hidden.elapsed() < Duration::from_secs(30), "it goes on");
        said = now;
    }
    let open = page.eval("heard.length").await;
    let ended = room.greenroom.wait_exit(PATIENCE).await;
    assert!(ended.success(), "{ended}");
    assert_eq!(page.eval("said()").await, said);
    assert_eq!(page.eval("heard.length").await, open);
    // A person counts for a while after the last word.
    assert!(hidden.elapsed() > Duration::from_secs(30), "{hidden:?}");
    wait_for("nothing is left", || {
        room.children().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_stop_with_the_browser_open_ends_everything() {
    let mut room = Room::start().await;
    let url = room.init(&thread("main")).await;
    let page = room.open(&url).await;
    assert!(!room.children().is_empty());
    let begun = Instant::now();
    let ended = room.greenroom.stop().await;
    assert!(ended.success(), "{ended}");
    assert_eq!(room.children(), []);
    assert!(begun.elapsed() < Duration::from_secs(60));
    // The page is still there, with what it showed.
    page.wait_for_text("h1", "Good pots").await;
}

#[tokio::test]
async fn a_killed_program_leaves_nothing_running() {
    let mut room = Room::start().await;
    let url = room.init(&thread("main")).await;
    let _page = room.open(&url).await;
    assert!(!room.children().is_empty());
    room.greenroom.signal(Signal::SIGKILL);
    room.greenroom.wait_exit(PATIENCE).await;
    wait_for("nothing is left", || {
        room.children().is_empty().then_some(())
    })
    .await;
}
