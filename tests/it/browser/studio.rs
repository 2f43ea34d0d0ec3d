//! The page at `/`, used by keyboard.

use serde_json::json;

use super::{Room, listen, thread};

const TURNS: &str = "[...document.querySelectorAll('.turn')]";

#[tokio::test]
async fn a_conversation_by_keyboard() {
    let room = Room::start().await;
    let page = room.studio().await;
    // It makes the thread ready by itself and shows its preview.
    page.wait_for("!document.getElementById('frame').hidden")
        .await;
    let address = page.eval("document.getElementById('frame').src").await;
    let frame = page.frame(address.as_str().unwrap()).await;
    frame.wait_for_text("h1", "Good pots").await;
    listen(&frame).await;
    assert_eq!(
        page.eval("document.getElementById('rehearsal').checkVisibility()")
            .await,
        true
    );

    // The first stop of the keyboard leads to the box.
    page.press("Tab").await;
    page.press("Enter").await;
    page.wait_for("document.activeElement.id === 'instruction'")
        .await;
    page.type_text("Change the heading to “Made slowly, used daily”")
        .await;
    page.press("Enter").await;
    page.wait_for(&format!("{TURNS}.length === 1")).await;
    page.wait_for(&format!("{TURNS}[0].dataset.status === 'completed'"))
        .await;
    assert_eq!(
        page.eval("document.getElementById('instruction').value")
            .await,
        ""
    );
    page.wait_for_text(".turn .said", "Made slowly, used daily")
        .await;
    page.wait_for_text(".turn .text", "look at the page").await;
    page.wait_for_text(".turn .steps", "src/pages/index.astro")
        .await;
    page.wait_for_text(".turn .files", "src/pages/index.astro")
        .await;
    page.wait_for_text(".turn .foot", "commit").await;
    page.wait_for(&format!(
        "{TURNS}[0].querySelector('.log').lastElementChild.textContent.includes('now reads')"
    ))
    .await;
    // Loaded again by Astro, not by the studio.
    frame.wait_for_text("h1", "Made slowly, used daily").await;
    assert_eq!(
        page.eval("document.getElementById('frame').src").await,
        address
    );

    // The focus is still in the box: one types on.
    page.type_text("Make the accent colour teal").await;
    page.press("Enter").await;
    page.wait_for(&format!("{TURNS}[1]?.dataset.status === 'completed'"))
        .await;
    frame
        .wait_for("getComputedStyle(document.documentElement).getPropertyValue('--accent').includes('#0f766e')")
        .await;
    page.screenshot("studio").await;
    assert_eq!(
        room.git(
            &thread("main"),
            &["rev-list", "--count", "user/demo/me..HEAD"]
        ),
        "2"
    );

    // What happened is there for the next visit, and can be looked up.
    page.call("Page.reload", json!({})).await;
    page.wait_for(&format!(
        "{TURNS}.length === 2 && {TURNS}.every((turn) => turn.dataset.status === 'completed')"
    ))
    .await;
    page.wait_for_text(".turn .said", "Made slowly, used daily")
        .await;
    page.wait_for_text(".turn .files", "src/pages/index.astro")
        .await;
    page.eval(&format!("{TURNS}[0].querySelector('.foot button').focus()"))
        .await;
    page.press("Enter").await;
    page.wait_for_text(".turn .steps", "src/pages/index.astro")
        .await;

    // An earlier turn is taken back under a later one, and brought back.
    let press = async |label: &str| {
        let button = format!(
            "[...{TURNS}[0].querySelectorAll('.foot button')].find((b) => b.textContent === '{label}')"
        );
        page.wait_for(&format!(
            "{button} && !document.getElementById('send').disabled"
        ))
        .await;
        page.eval(&format!("{button}.focus()")).await;
        page.press("Enter").await;
    };
    let frame = page.frame(address.as_str().unwrap()).await;
    press("Undo").await;
    page.wait_for(&format!("{TURNS}.length === 3")).await;
    page.wait_for_text(".turn .foot", "undone").await;
    frame.wait_for_text("h1", "Good pots").await;
    press("Bring back").await;
    page.wait_for(&format!("{TURNS}.length === 4")).await;
    frame.wait_for_text("h1", "Made slowly, used daily").await;
    page.screenshot("studio-undo").await;
    assert_eq!(page.complaints().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_running_turn_is_seen_and_stopped_by_keyboard() {
    let room = Room::with(|options| options.env("ASTRO_DEV_MODE", "false")).await;
    let page = room.studio().await;
    page.wait_for("!document.getElementById('send').disabled")
        .await;
    page.eval("document.getElementById('instruction').focus()")
        .await;
    page.type_text("Think slowly for 300 seconds").await;
    page.press("Enter").await;
    page.wait_for(&format!("{TURNS}[0]?.dataset.status === 'running'"))
        .await;
    // Words arrive while it thinks, and the time it has taken counts up.
    page.wait_for_text(".turn .text", "2 …").await;
    page.wait_for("/Working \\d+ s/.test(document.querySelector('.turn .status').textContent)")
        .await;

    page.type_text("Run `ls src/pages`").await;
    page.press("Enter").await;
    page.wait_for(&format!("{TURNS}[1]?.dataset.status === 'queued'"))
        .await;
    page.screenshot("studio-busy").await;

    page.press("Escape").await;
    page.press("Escape").await;
    page.wait_for(&format!("{TURNS}[0].dataset.status === 'cancelled'"))
        .await;
    page.wait_for(&format!("{TURNS}[1].dataset.status === 'completed'"))
        .await;
    page.wait_for(&format!("{TURNS}[1].textContent.includes('index.astro')"))
        .await;
    assert_eq!(page.complaints().await, Vec::<String>::new());
}
