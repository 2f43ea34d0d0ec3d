//! What those hear who do not see a site: Chromium's accessibility tree before and after. The page at
//! `/` has its images described.

use std::fs;

use serde_json::{Value, json};

use super::{Page, Room, settles, thread};
use crate::{
    label::{name_of, picture_of},
    label_batch::quick_cli,
    support::{StandIn, Who, wait_for, wait_for_async},
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

/// A page once so many of its images have a name. A dev server that overlooked a change begins anew,
/// and has the old page until then.
async fn hears_named(room: &Room, url: &str, count: usize) -> Vec<String> {
    wait_for_async("a page whose images have names", async || {
        let heard = hears_on(room, url).await;
        (heard.len() == count).then_some(heard)
    })
    .await
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

const DESCRIBE: &str = "document.getElementById('describe')";
/// What the page says of a description that is under way, or led to no turn.
const JOB: &str = "document.querySelector('.turn.job')";
const TURNS: &str = "[...document.querySelectorAll('.turn:not(.job)')]";

/// Presses the button of a turn, by keyboard.
async fn press(page: &Page, turn: usize, label: &str) {
    let button = format!(
        "[...{TURNS}[{turn}].querySelectorAll('.foot button')].find((b) => b.textContent === '{label}')"
    );
    page.wait_for(&format!(
        "{button} && !document.getElementById('send').disabled"
    ))
    .await;
    page.eval(&format!("{button}.focus()")).await;
    page.press("Enter").await;
}

/// Presses the button that describes the site's images.
async fn press_describe(page: &Page) {
    page.wait_for(&format!("{DESCRIBE}.textContent === 'Describe images'"))
        .await;
    page.eval(&format!("{DESCRIBE}.focus()")).await;
    page.press("Enter").await;
}

#[tokio::test]
async fn the_template_s_images_are_heard_again() {
    // One is not answered at first.
    let mut slow = says("windowsill.webp", "A stack of plates.");
    slow["steps"][0]["act"] = json!("no_bytes");
    slow["steps"][0]["times"] = json!(1);
    let api = StandIn::start(json!({"rules": [
        says("shelf.webp", "Glazed pots on a shelf."),
        slow,
    ]}))
    .await;
    let room = Room::with(|options| options.without_rehearsal().api(&api)).await;
    let main = thread("main");
    let url = room.init(&main).await;
    // Somebody takes the texts away.
    let head = room.git(&main, &["rev-parse", "HEAD"]);
    let words = uuid::Uuid::now_v7().to_string();
    let mut before = Vec::new();
    for (file, path) in [("index", ""), ("about", "/about")] {
        let at = room
            .folders
            .worktree(&main)
            .join(format!("src/pages/{file}.astro"));
        // Words that no run before had around an image: what was described once is known.
        let text = fs::read_to_string(&at).unwrap();
        let text = text.replacen("<Hero", &format!("{words}<Hero"), 1);
        let text = text.replacen("<Image", &format!("{words}<Image"), 1);
        let (start, rest) = text.split_once("alt=\"").unwrap();
        let (_, end) = rest.split_once('"').unwrap();
        fs::write(&at, format!("{start}alt=\"\"{end}")).unwrap();
        before.push((at, text, format!("{url}{path}")));
    }
    // One is of another server, in a file whose name is no markup.
    let odd = "<img src=x onerror=alert(1)>.html";
    let odd_file = room.folders.worktree(&main).join("public").join(odd);
    fs::write(&odd_file, "<img src=\"https://example.com/a.png\">").unwrap();
    // A drawing of the home page has a label of its own.
    let mut others = Vec::new();
    for (_, _, page) in &before {
        others.push(hears_on(&room, page).await);
    }
    let studio = room.studio().await;
    studio.wait_for(&format!("!{DESCRIBE}.disabled")).await;
    press_describe(&studio).await;
    studio
        .wait_for_text(".job .status", "1 of 2 images described")
        .await;
    studio.screenshot("studio-describing").await;
    // Else the call after this one would meet the silence.
    wait_for("it asks about the other", || {
        (!api.requests_about("windowsill.webp").is_empty()).then_some(())
    })
    .await;
    // The same button stops it, and keeps the focus.
    studio
        .wait_for(&format!("{DESCRIBE}.textContent === 'Stop describing'"))
        .await;
    studio.press("Enter").await;
    studio
        .wait_for(&format!("{JOB}.dataset.status === 'cancelled'"))
        .await;
    studio
        .wait_for_text(".job", "Nothing of the site was changed.")
        .await;
    assert_eq!(room.git(&main, &["rev-parse", "HEAD"]), head);

    press_describe(&studio).await;
    studio
        .wait_for(&format!("{TURNS}[0]?.dataset.status === 'completed'"))
        .await;
    // What was described before is not asked about again.
    assert_eq!(api.requests_about("shelf.webp").len(), 1);
    let texts = ["A stack of plates.", "Glazed pots on a shelf."];
    let report = "document.querySelector('.turn:not(.job)').textContent";
    for said in [
        texts[0],
        texts[1],
        "2 images with a new text",
        "1 image needs a person",
        odd,
        "another server",
    ] {
        studio
            .wait_for(&format!("{report}.includes({})", json!(said)))
            .await;
    }
    assert_eq!(
        studio
            .eval(&format!(
                "[{JOB}, document.querySelector('.turn img')].concat(document.getElementById('announcer').textContent)"
            ))
            .await,
        json!([null, null, "2 images got a text; 1 image needs a person."])
    );
    studio.screenshot("studio-described").await;
    for (((_, _, page), text), others) in before.iter().zip(texts).zip(&others) {
        assert!(!others.iter().any(|name| name == text || name.is_empty()));
        let mut heard = hears_named(&room, page, others.len() + 1).await;
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

    // It is a turn like any other, whose report is there for the next visit.
    studio.show().await;
    press(&studio, 0, "Undo").await;
    studio.wait_for(&format!("{TURNS}.length === 2")).await;
    let file = || fs::read_to_string(&before[0].0).unwrap();
    assert!(!file().contains(texts[0]));
    press(&studio, 0, "Bring back").await;
    studio.wait_for(&format!("{TURNS}.length === 3")).await;
    assert!(file().contains(texts[0]));
    studio.call("Page.reload", json!({})).await;
    studio.wait_for(&format!("{TURNS}.length === 3")).await;
    assert_eq!(
        studio.eval("document.querySelector('.report')").await,
        Value::Null
    );
    press(&studio, 0, "Show what it did").await;
    studio.wait_for_text(".turn .report", texts[1]).await;

    // Nothing to do, and what goes wrong, are said kindly, and make no turn.
    fs::remove_file(odd_file).unwrap();
    press_describe(&studio).await;
    studio.wait_for_text(".job .text", "Nothing to do").await;
    studio
        .wait_for(&format!("{JOB}.dataset.status === 'completed'"))
        .await;
    assert_eq!(studio.complaints().await, Vec::<String>::new());
    studio
        .eval(
            "const real = fetch; window.fetch = (path, ...more) => path.includes('alt-text') \
             ? Promise.resolve(Response.json({code: 'budget_exceeded', error: 'It is <b>spent</b>.'}, {status: 429})) \
             : real(path, ...more)",
        )
        .await;
    press_describe(&studio).await;
    studio
        .wait_for_text(".job .notice", "It is <b>spent</b>. The budget for this")
        .await;
    studio.screenshot("studio-describe-failed").await;
    assert_eq!(studio.eval(&format!("{TURNS}.length")).await, 3);
    // All of it has room on a phone.
    let phone = json!({"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": true});
    studio
        .call("Emulation.setDeviceMetricsOverride", phone)
        .await;
    studio
        .wait_for("innerWidth === 360 && document.documentElement.scrollWidth <= 360")
        .await;
    studio.screenshot("studio-describe-phone").await;
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
    let pictures: Vec<Vec<u8>> = (0..30).map(|number| picture_of(number, 80, 60)).collect();
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
    let after = hears_named(&room, &at, 30).await;
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
