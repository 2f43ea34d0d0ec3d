//! What those hear who do not see a site: Chromium's accessibility tree before and after.

use std::fs;

use serde_json::{Value, json};

use super::{Page, Room, settles, thread};
use crate::{
    label::{name_of, picture_of},
    label_batch::quick_cli,
    support::{StandIn, Who},
};

/// The names of a page's images, as a screen reader gets them.
async fn heard(page: &Page) -> Vec<String> {
    page.call("Accessibility.enable", json!({})).await;
    let tree = page.call("Accessibility.getFullAXTree", json!({})).await;
    let nodes = tree["nodes"].as_array().unwrap();
    let images = nodes.iter().filter(|node| {
        node["ignored"] == false
            && ["image", "img"].contains(&node["role"]["value"].as_str().unwrap_or_default())
    });
    let name = |node: &Value| {
        node["name"]["value"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    images.map(name).collect()
}

/// A page as it is now, once it does not load again.
async fn hears_on(room: &Room, url: &str) -> Vec<String> {
    let page = room.open(url).await;
    settles(&page).await;
    heard(&page).await
}

/// What the model says of an image, by its tool.
fn says(image: &str, description: &str) -> Value {
    let input = json!({"description": description, "nsfw_rating": "SAFE", "tags": ["pots"]});
    json!({"match": image, "steps": [{"tool": {"name": "StructuredOutput", "input": input}}]})
}

async fn describe(room: &Room, who: &Who) -> Value {
    let path = format!("{}/alt-text", who.path());
    room.greenroom.api("POST", &path, json!({})).await.ok()["result"].take()
}

#[tokio::test]
async fn the_template_s_images_are_heard_again() {
    let api = StandIn::start(json!({"rules": [
        says("shelf.webp", "Glazed pots on a shelf."),
        says("windowsill.webp", "A stack of plates."),
    ]}))
    .await;
    let room = Room::with(|options| options.without_rehearsal().api(&api)).await;
    let main = thread("main");
    let url = room.init(&main).await;
    // Somebody takes the texts away.
    let mut before = Vec::new();
    for (file, path) in [("index", ""), ("about", "/about")] {
        let at = room
            .folders
            .worktree(&main)
            .join(format!("src/pages/{file}.astro"));
        let text = fs::read_to_string(&at).unwrap();
        let (start, rest) = text.split_once("alt=\"").unwrap();
        let (_, end) = rest.split_once('"').unwrap();
        fs::write(&at, format!("{start}alt=\"\"{end}")).unwrap();
        before.push((at, text, format!("{url}{path}")));
    }
    // A drawing of the home page has a label of its own.
    let mut others = Vec::new();
    for (_, _, page) in &before {
        others.push(hears_on(&room, page).await);
    }
    let turn = describe(&room, &main).await;
    assert_eq!(
        turn["report"]["done"].as_array().unwrap().len(),
        2,
        "{turn}"
    );
    assert_eq!(turn["preview"]["errors"], json!([]), "{turn}");
    let texts = ["A stack of plates.", "Glazed pots on a shelf."];
    for (((_, _, page), text), others) in before.iter().zip(texts).zip(&others) {
        assert!(!others.iter().any(|name| name == text || name.is_empty()));
        let mut heard = hears_on(&room, page).await;
        heard.retain(|name| !others.contains(name));
        assert_eq!(heard, [text], "{page}");
    }
    // Not a byte besides.
    for ((at, text, _), new) in before.iter().zip(texts) {
        let (start, rest) = text.split_once("alt=\"").unwrap();
        let (_, end) = rest.split_once('"').unwrap();
        let written = fs::read_to_string(at).unwrap();
        assert_eq!(written, format!("{start}alt=\"{new}\"{end}"));
    }
}

#[tokio::test]
async fn thirty_images_are_heard() {
    let api = StandIn::start(json!({"rules": []})).await;
    let room = Room::with(|options| {
        let cli = quick_cli(&options.folders);
        options
            .without_rehearsal()
            .api(&api)
            .env("CLAUDE_BIN", cli)
            .env("MAX_WARM_AGENTS", "0")
    })
    .await;
    let main = thread("main");
    let url = room.init(&main).await;
    let site = room.folders.worktree(&main);
    // The rehearsal rates an image by its bytes: these are fit for everybody.
    let fit = (0..).map(|number| picture_of(number, 80, 60));
    let fit = fit.filter(|image| name_of(image).starts_with(['0', '4', '8', 'd']));
    let pictures: Vec<Vec<u8>> = fit.take(30).collect();
    let (mut imports, mut tags, mut names) = (String::new(), String::new(), Vec::new());
    fs::create_dir_all(site.join("public/photos")).unwrap();
    for (at, picture) in pictures.iter().enumerate() {
        names.push(name_of(picture));
        match at % 3 {
            0 => {
                fs::write(site.join(format!("src/assets/p{at}.png")), picture).unwrap();
                imports += &format!("import p{at} from '../assets/p{at}.png';\n");
                tags += &format!("  <Image src={{p{at}}} alt=\"\" />\n");
            }
            1 => {
                fs::write(site.join(format!("public/photos/p{at}.png")), picture).unwrap();
                tags += &format!("  <img src=\"/photos/p{at}.png\" />\n");
            }
            _ => {
                fs::write(site.join(format!("public/photos/p{at}.png")), picture).unwrap();
                tags += &format!("  {{[1].map(() => <img alt='' src='/photos/p{at}.png'>)}}\n");
            }
        }
    }
    let page = format!(
        "---\nimport {{ Image }} from 'astro:assets';\nimport Base from '../layouts/Base.astro';\n{imports}---\n\
         <Base title=\"Photos\" description=\"Photos\">\n  <h1>Photos</h1>\n{tags}  \
         <img src=\"/photos/p1.png\" alt=\"\" role=\"presentation\" />\n</Base>\n"
    );
    fs::write(site.join("src/pages/photos.astro"), &page).unwrap();
    let at = format!("{url}/photos");
    let before = hears_on(&room, &at).await;
    // Of an image without any text the file's name may be read out.
    assert!(before.iter().all(|name| name.is_empty()), "{before:?}");

    let turn = describe(&room, &main).await;
    assert_eq!(
        turn["report"]["done"].as_array().unwrap().len(),
        30,
        "{turn}"
    );
    assert_eq!(turn["preview"]["errors"], json!([]), "{turn}");
    let after = hears_on(&room, &at).await;
    assert_eq!(after.len(), 30, "{after:?}");
    for (heard, name) in after.iter().zip(&names) {
        assert!(heard.contains(name.as_str()), "{heard} is not of {name}");
    }
    let left = describe(&room, &main).await;
    assert_eq!(
        (&left["commit"], &left["report"]["decorative"]),
        (&Value::Null, &json!(1)),
        "{left}"
    );
}
