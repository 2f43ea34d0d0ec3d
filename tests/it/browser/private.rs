//! A preview that is nobody's business but its users': what opens it, and what it hears then.

use std::fs;

use serde_json::{Value, json};

use super::{LISTEN, Room, hears, thread};
use crate::support::{Sent, Who};

const TOKEN: &str = "of-the-control-plane";

/// Makes a thread ready, as a control plane does. Answers its preview.
async fn init(room: &Room, who: &Who) -> Value {
    let sent = Sent::new("POST", "/api/init", &who.body(json!({})));
    let sent = sent.header("authorization", &format!("Bearer {TOKEN}"));
    room.greenroom.send(sent).await.ok()["preview"].take()
}

#[tokio::test]
async fn a_link_wakes_a_private_preview_which_hears_of_content_and_images() {
    let secret = |options: crate::support::Options| {
        options
            .env("GREENROOM_API_TOKEN", TOKEN)
            .env("MAX_PREVIEWS", "1")
    };
    let room = Room::with(secret).await;
    let main = thread("main");
    let preview = init(&room, &main).await;
    let url = preview["url"].as_str().unwrap();

    let stranger = room.chromium.open(url).await;
    stranger
        .wait_for_text("body", "This preview is private")
        .await;

    // Another thread has its room: this one is asleep, and begins with a page that says so.
    let other = init(&room, &thread("other")).await;
    let link = preview["previewUrl"].as_str().unwrap();
    let page = room.chromium.open_with(link, LISTEN).await;
    page.wait_for("document.querySelector('h1')?.textContent.includes('Good pots')")
        .await;
    assert_eq!(page.eval("location.search").await, "", "no token is left");
    assert_eq!(page.eval("document.cookie").await, "", "scripts see none");
    // The cookie is for this thread alone.
    let stranger = room.chromium.open(other["url"].as_str().unwrap()).await;
    stranger
        .wait_for_text("body", "This preview is private")
        .await;

    // Content.
    let page = room
        .chromium
        .open_with(&format!("{url}/journal"), LISTEN)
        .await;
    page.wait_for_text("main", "Looking after your pots").await;
    hears(&page).await;
    let entry = room
        .folders
        .worktree(&main)
        .join("src/content/journal/looking-after-your-pots.md");
    let text = fs::read_to_string(&entry).unwrap();
    let title = |number: u32| format!("Looking after pots, part {number}");
    fs::write(&entry, text.replace("Looking after your pots", &title(2))).unwrap();
    page.wait_for_text("main", &title(2)).await;

    // An image: the page loads again, and shows the other one.
    let page = room
        .chromium
        .open_with(&format!("{url}/about"), LISTEN)
        .await;
    page.wait_for("document.querySelector('main img')?.complete")
        .await;
    hears(&page).await;
    let bytes =
        "fetch(document.querySelector('main img').src).then((a) => a.blob()).then((b) => b.size)";
    let before = page.eval(bytes).await;
    let assets = room.folders.worktree(&main).join("src/assets");
    fs::copy(assets.join("windowsill.webp"), assets.join("shelf.webp")).unwrap();
    page.wait_for(&format!("{bytes}.then((size) => size !== {before})"))
        .await;
}
