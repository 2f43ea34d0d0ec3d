//! Labels of images: `POST /api/label` with the real CLI against a scripted API.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::io::Cursor;

use base64::{Engine, engine::general_purpose::STANDARD};
use greenroom::{picture, rehearsal::Recorded};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, Options, Sent, StandIn, TestGreenroom, files_below, request, wait_for,
};

/// A picture that no other number makes.
pub(crate) fn picture_of(number: u32, width: u32, height: u32) -> Vec<u8> {
    let [_, r, g, b] = number.wrapping_mul(2_654_435_761).to_be_bytes();
    let image = RgbImage::from_fn(width, height, |x, y| match (x / 50 + y / 50) % 2 {
        0 => Rgb([r, g, b]),
        _ => Rgb([b, r, g]),
    });
    let mut bytes = Cursor::new(Vec::new());
    let image = DynamicImage::from(image);
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// What the rehearsal knows an image by.
pub(crate) fn name_of(file: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let sent = picture::develop_now(file).unwrap().data;
    hex::encode(Sha256::digest(sent))[..12].to_owned()
}

/// A form with an image and more fields.
fn form(image: &[u8], fields: &[(&str, &str)]) -> Sent {
    const BOUNDARY: &str = "----of-a-test";
    let mut body = Vec::new();
    for (name, value) in fields {
        let head =
            format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n");
        body.extend(head.into_bytes());
        body.extend(value.bytes());
        body.extend(b"\r\n");
    }
    let head = format!(
        "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"image\"; filename=\"a.png\"\r\n\
         content-type: image/png\r\n\r\n"
    );
    body.extend(head.into_bytes());
    body.extend(image);
    body.extend(format!("\r\n--{BOUNDARY}--\r\n").into_bytes());
    Sent {
        body,
        ..Sent::new("POST", "/api/label", &Value::Null)
    }
    .header(
        "content-type",
        &format!("multipart/form-data; boundary={BOUNDARY}"),
    )
}

async fn label(greenroom: &TestGreenroom, image: &[u8], fields: Value) -> Answer {
    let mut body = fields;
    body["image"] = json!({"data": STANDARD.encode(image), "mediaType": "image/png"});
    greenroom.api("POST", "/api/label", body).await
}

/// The requests that came in whole. One that the gateway turns away breaks off before its end, and
/// is no request to an API.
fn asked(api: &StandIn) -> Vec<Recorded> {
    let mut requests = api.requests();
    requests.retain(|request| request.messages > 0);
    requests
}

#[tokio::test]
async fn each_image_is_one_request_and_what_is_no_answer_is_no_label() {
    let lines = "DESCRIPTION: A chessboard.\nNSFW: SUGGESTIVE\nTAGS: board, chess";
    let api = StandIn::start(json!({"rules": [
        {"match": "answer in text", "steps": [{"text": lines}]},
        {"match": "without a rating", "steps": [{"text": "DESCRIPTION: A board.\nTAGS: board"}]},
        {"match": "refuse it", "steps": [{"act": {"status": {"status": 400}}}]},
        {"match": "busy at first", "steps": [
            {"act": {"status": {"status": 529, "retry_after": 1}}, "times": 1, "text": lines}]},
        {"match": "cut it", "steps": [{"act": "cut", "text": lines}]},
    ]}))
    .await;
    let folders = Folders::new();
    let options = Options::new(&folders).api(&api).env("CLIENT_ID", "acme");
    let greenroom = TestGreenroom::start(options).await;
    let image = picture_of(1, 2000, 1000);

    let answer = greenroom.send(form(&image, &[("other", "x")])).await;
    let body = answer.ok();
    assert_eq!(body["status"], "success", "{body}");
    let name = name_of(&image);
    assert!(
        body["description"].as_str().unwrap().contains(&name),
        "{body}"
    );
    assert_eq!(body["tags"], json!(["rehearsal", name]));
    assert_eq!(body["nsfw_rating"], "SAFE");
    assert!(body["raw_response"].as_str().unwrap().contains(&name));
    assert!(
        body["model"].as_str().unwrap().starts_with("claude-"),
        "{body}"
    );
    assert!(body["usage"]["outputTokens"].as_u64().unwrap() > 0);
    assert!(body["usage"]["costUsd"].as_f64().unwrap() > 0.0, "{body}");
    assert!(body["durationMs"].as_u64().unwrap() > 0);
    let asked_so_far = asked(&api);
    assert_eq!(asked_so_far.len(), 1, "{asked_so_far:?}");
    assert_eq!(asked_so_far[0].images.len(), 1);
    assert!(
        asked_so_far[0]
            .tools
            .contains(&"StructuredOutput".to_owned())
    );
    assert!(
        !asked_so_far[0]
            .tools
            .iter()
            .any(|tool| { ["Read", "Bash", "Write"].contains(&tool.as_str()) })
    );

    // In base64, for training; the data of another image does not come along.
    let second = picture_of(2, 60, 60);
    let body = label(&greenroom, &second, json!({"promptType": "sd_training"}))
        .await
        .ok();
    assert!(
        body["description"]
            .as_str()
            .unwrap()
            .contains(&name_of(&second))
    );
    let asked_so_far = asked(&api);
    assert!(
        asked_so_far[1].instruction.contains("caption"),
        "{asked_so_far:?}"
    );
    assert_eq!((asked_so_far.len(), asked_so_far[1].images.len()), (2, 1));

    // A caller of old lays down the lines by itself: no tool, no second question.
    let old = "Look.\nDESCRIPTION: what it is\nNSFW: the rating\nTAGS: some";
    let body = label(&greenroom, &second, json!({"prompt": old}))
        .await
        .ok();
    assert!(
        body["raw_response"]
            .as_str()
            .unwrap()
            .starts_with("DESCRIPTION:")
    );
    let asked_so_far = asked(&api);
    assert_eq!((asked_so_far.len(), asked_so_far[2].tools.len()), (3, 0));

    // A model that does not keep to the form is understood, and not asked again.
    let body = label(&greenroom, &second, json!({"prompt": "answer in text"}))
        .await
        .ok();
    assert_eq!(body["nsfw_rating"], "SUGGESTIVE", "{body}");
    assert_eq!(body["raw_response"], lines);
    assert_eq!(asked(&api).len(), 4);

    let refused = label(&greenroom, &second, json!({"prompt": "without a rating"})).await;
    assert_eq!(refused.body["status"], "error", "{}", refused.text);
    assert_eq!(refused.body["message"], refused.body["error"]);
    assert_eq!(
        refused.body["raw_response"],
        "DESCRIPTION: A board.\nTAGS: board"
    );
    assert!(refused.error(502, "agent_failed").contains("rating"));
    assert_eq!(asked(&api).len(), 5);

    let refused = label(&greenroom, &second, json!({"prompt": "refuse it"})).await;
    refused.error(502, "agent_failed");
    let body = label(&greenroom, &second, json!({"prompt": "busy at first"}))
        .await
        .ok();
    assert_eq!(body["nsfw_rating"], "SUGGESTIVE");
    let before = asked(&api).len();
    let cut = label(&greenroom, &second, json!({"prompt": "cut it"})).await;
    cut.error(502, "agent_failed");
    assert_eq!(asked(&api).len(), before + 1, "half an answer is paid too");
}

#[tokio::test]
async fn what_is_wrong_is_told_before_anything_is_paid() {
    let api = StandIn::start(json!({"rules": []})).await;
    let folders = Folders::new();
    let options = Options::new(&folders).api(&api).env("CLIENT_ID", "acme");
    let greenroom = TestGreenroom::start(options).await;
    let image = picture_of(3, 50, 50);
    for bad in [&b"hello"[..], b"<svg/>", &image[..image.len() / 2]] {
        let refused = label(&greenroom, bad, json!({})).await;
        assert_eq!(refused.body["status"], "error", "{}", refused.text);
        assert!(refused.body["message"].is_string());
        refused.error(422, "invalid_image");
        greenroom
            .send(form(bad, &[]))
            .await
            .error(422, "invalid_image");
    }
    greenroom
        .send(form(b"", &[]))
        .await
        .error(422, "invalid_image");
    let large = vec![7; picture::MAX_BYTES + 1];
    label(&greenroom, &large, json!({}))
        .await
        .error(413, "payload_too_large");
    let huge = vec![7; picture::MAX_BYTES * 3 / 2];
    let refused = greenroom.send(form(&huge, &[])).await;
    assert_eq!(refused.body["status"], "error", "{}", refused.text);
    refused.error(413, "payload_too_large");
    // As large as may be, and no image.
    let largest = vec![7; picture::MAX_BYTES];
    label(&greenroom, &largest, json!({}))
        .await
        .error(422, "invalid_image");
    greenroom
        .send(form(&largest, &[]))
        .await
        .error(422, "invalid_image");
    for (fields, said) in [
        (json!({"promptType": "nobody"}), "default, sd_training"),
        (json!({"promptType": 5}), "promptType"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": "x".repeat(20_000)}), "16 kB"),
        (
            json!({"prompt": "x", "promptType": "default"}),
            "promptType",
        ),
        (json!({"model": "a b"}), "model"),
    ] {
        let refused = label(&greenroom, &image, fields.clone()).await;
        assert!(
            refused.error(400, "invalid_request").contains(said),
            "{fields}"
        );
    }
    let refused = label(&greenroom, &image, json!({"clientId": "globex"})).await;
    refused.error(403, "not_this_tenant");
    let refused = label(&greenroom, &image, json!({"userId": "../x"})).await;
    refused.error(400, "invalid_id");
    for body in [
        json!({}),
        json!({"image": {}}),
        json!({"image": {"data": "*"}}),
    ] {
        let refused = greenroom.api("POST", "/api/label", body).await;
        assert!(refused.error(400, "invalid_request").contains("image"));
    }
    // What is not known is passed over, whatever it holds.
    let unknown = "y".repeat(20_000);
    let passed = greenroom
        .send(form(b"<svg/>", &[("thumb", &unknown), ("note", "\u{1}")]))
        .await;
    passed.error(422, "invalid_image");
    // Nobody wants to read 9 MB of what they sent.
    let whole = json!({"image": "A".repeat(9 << 20)});
    let refused = greenroom.api("POST", "/api/label", whole).await;
    assert!(refused.text.len() < 1000, "{} bytes", refused.text.len());
    assert!(refused.error(400, "invalid_request").contains("image"));
    for (method, path, status) in [
        ("GET", "/api/label", 405),
        ("GET", "/api/label/batches/nothing", 404),
        ("POST", "/api/label/batches", 400),
    ] {
        let refused = greenroom
            .api(method, path, json!({"images": [{"name": "a"}]}))
            .await;
        assert_eq!(refused.status, status, "{}", refused.text);
        assert_eq!(refused.body["status"], "error", "{}", refused.text);
        assert_eq!(refused.body["message"], refused.body["error"]);
        if status == 400 {
            assert!(refused.text.contains("images[0].data"), "{}", refused.text);
        }
    }
    let lines: String = STANDARD
        .encode(vec![7; picture::MAX_BYTES])
        .as_bytes()
        .chunks(76)
        .map(|line| format!("{}\r\n", String::from_utf8_lossy(line)))
        .collect();
    let wrapped = json!({"image": {"data": lines}});
    let wrapped = greenroom.api("POST", "/api/label", wrapped).await;
    wrapped.error(422, "invalid_image");
    let two = greenroom.send(form(&image, &[("image", "again")])).await;
    two.error(400, "invalid_request");
    let broken = Sent {
        body: b"--x\r\nnonsense".to_vec(),
        ..Sent::new("POST", "/api/label", &Value::Null)
    };
    let broken = broken.header("content-type", "multipart/form-data; boundary=x");
    greenroom.send(broken).await.error(400, "invalid_request");
    let plain = Sent {
        body: image.clone(),
        ..Sent::new("POST", "/api/label", &Value::Null)
    };
    let plain = plain.header("content-type", "image/png");
    greenroom
        .send(plain)
        .await
        .error(415, "unsupported_media_type");
    assert!(api.requests().is_empty());
    let spent = greenroom
        .get("/api/usage?period=daily&by=client")
        .await
        .ok();
    assert_eq!(spent["result"]["totals"]["costUsd"], 0.0, "{spent}");
}

#[tokio::test]
async fn nothing_of_an_image_touches_the_disk_and_time_and_money_have_an_end() {
    let api = StandIn::start(json!({"rules": [
        {"match": "take your time", "steps": [{"delay_ms": 4000, "text": "DESCRIPTION: x"}]},
        {"match": "never", "steps": [{"act": "no_bytes"}]},
    ]}))
    .await;
    let folders = Folders::new();
    let options = Options::new(&folders)
        .api(&api)
        .env("CLIENT_ID", "acme")
        .env("CLAUDE_CLI_TIMEOUT", "200")
        .env("BUDGET_CLIENT_DAY_USD", "0.000001");
    let greenroom = TestGreenroom::start(options).await;
    let image = picture_of(4, 200, 200);
    let sent = picture::develop_now(&image).unwrap().data;
    let encoded = STANDARD.encode(&sent);
    {
        let body = json!({
            "image": {"data": STANDARD.encode(&image)},
            "prompt": "take your time",
        });
        let call = request(greenroom.api_port, Sent::new("POST", "/api/label", &body));
        let look = wait_for("its request", || {
            (!api.requests().is_empty()).then(|| {
                let pieces = [
                    &image[100..140],
                    &sent[100..140],
                    &encoded.as_bytes()[100..140],
                ];
                let has_it = |file: &std::path::PathBuf| {
                    let content = std::fs::read(file).unwrap_or_default();
                    let holds = |piece: &[u8]| content.windows(piece.len()).any(|w| w == piece);
                    pieces.into_iter().any(holds)
                };
                let files = files_below(&folders.join(""));
                assert!(!files.is_empty());
                files.into_iter().find(has_it)
            })
        });
        let (answer, found) = tokio::join!(call, look);
        assert_eq!(found, None);
        answer.unwrap().error(502, "agent_failed");
    }
    // What it cost has used the budget up.
    let refused = label(&greenroom, &image, json!({})).await;
    refused.error(429, "budget_exceeded");
    assert_eq!(asked(&api).len(), 1);
    let report = greenroom
        .get("/api/usage?period=daily&by=client")
        .await
        .ok();
    assert_eq!(report["result"]["rows"][0]["key"], "acme", "{report}");
    assert!(report["result"]["totals"]["costUsd"].as_f64().unwrap() > 0.0);
    drop(greenroom);

    let folders = Folders::new();
    let options = Options::new(&folders)
        .api(&api)
        .env("CLAUDE_CLI_TIMEOUT", "3");
    let greenroom = TestGreenroom::start(options).await;
    let late = label(&greenroom, &image, json!({"prompt": "never"})).await;
    assert_eq!(late.body["status"], "error");
    late.error(504, "turn_timeout");
    let left = files_below(&folders.join("tmp"));
    assert!(
        !left
            .iter()
            .any(|file| file.components().any(|part| part.as_os_str() == "labels")),
        "{left:?}"
    );
}
