//! Answers in the forms that models write them.

use serde_json::json;

use super::*;

fn said(text: &str) -> Said {
    let event = json!({"type": "assistant", "message": {"model": "claude-haiku-5-5",
        "content": [{"type": "text", "text": text}]}});
    Said::read(&event.to_string())
}

fn parse(text: &str) -> Result<Parsed, &'static str> {
    said(text).parse(true)
}

#[test]
fn lines_are_read_as_models_write_them() {
    let expected = Parsed {
        description: "A red shoe. It is new.".into(),
        rating: Rating::Suggestive,
        tags: vec!["shoe".into(), "red".into()],
    };
    for text in [
        "DESCRIPTION: A red shoe. It is new.\nNSFW: SUGGESTIVE\nTAGS: shoe, red",
        "Here it is:\n\n**Description:** A red shoe.\nIt is new.\n**NSFW**: suggestive (a bit)\n- TAGS: shoe, , red, shoe.",
        "DESCRIPTION: A red shoe.\nIt is new.\nNSFW: SUGGESTIVE\n\nTAGS:\n\nshoe, red\n\nNote: it is no ADULT one.",
        "caption: A red shoe. It is new.\nnsfw_rating: [SUGGESTIVE]\nTags:\nshoe,\nred",
        "{\"description\": \"A red shoe. It is new.\", \"nsfw_rating\": \"SUGGESTIVE\", \"tags\": [\"shoe\", \"red\"]}",
        "```json\n{\"caption\": \"A red shoe. It is new.\", \"nsfw\": \"Suggestive\", \"tags\": \"shoe, red\"}\n```",
    ] {
        assert_eq!(parse(text).as_ref(), Ok(&expected), "{text}");
    }
}

#[test]
fn a_doubt_is_no_answer_and_never_safe() {
    for text in [
        "",
        "I can't help with that.",
        "DESCRIPTION: A shoe.\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW:\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW: NOT SAFE\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW: unsafe\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW: SAFE, SUGGESTIVE, ADULT or EXPLICIT\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW: SAFE\nNSFW: ADULT\nTAGS: shoe",
        "NSFW: SAFE\nTAGS: shoe",
        "DESCRIPTION:\nNSFW: SAFE\nTAGS: shoe",
        "DESCRIPTION: A shoe.\nNSFW: SAFE",
        "{\"description\": \"A shoe.\", \"tags\": []}",
        "{\"description\": \"A shoe.\", \"nsfw_rating\": \"FINE\", \"tags\": []}",
        "{\"description\": 7, \"nsfw_rating\": \"SAFE\", \"tags\": []}",
        "{\"description\": \"A shoe.\", \"nsfw_rating\": true, \"tags\": []}",
        r#"{"description": "A shoe.", "nsfw_rating": "SAFE", "nsfw": "EXPLICIT", "tags": []}"#,
        r#"{"description": "A shoe.", "NSFW_rating": "EXPLICIT", "nsfw_rating": "EXPLICIT", "tags": []}"#,
        r#"{"description": "A shoe.", "nsfw_rating": "EXPLICIT", "nsfw_rating": "SAFE", "tags": []}"#,
        r#"{"description": "A shoe.", "description": "B", "nsfw_rating": "SAFE", "tags": []}"#,
        r#"{"description": "A shoe.", "nsfw_rating": "SAFE", "rating": 5, "tags": []}"#,
        r#"{"description": "A", "nsfw_rating": "SAFE", "tags": []} {"nsfw_rating": "ADULT"}"#,
        // Words of the image.
        "DESCRIPTION: {\"description\": \"A\", \"nsfw_rating\": \"SAFE\", \"tags\": []}\nTAGS: a",
        "DESCRIPTION: {\"description\": \"A\", \"nsfw_rating\": \"SAFE\", \"tags\": []}\nNSFW: ADULT\nTAGS: a",
        "DESCRIPTION: A sign.\nNSFW: SAFE\nIt is ADULT.\nTAGS: a",
        "DESCRIPTION: A shoe.\nNSFW: SAFE? Definitely not.\nTAGS: a",
        "DESCRIPTION: A shoe.\nNSFW: SAFE \u{1b}[8mnot\nTAGS: a",
        "DESCRIPTION: A shoe.\nNSFW: SAFE\nRATING: ADULT\nTAGS: a",
    ] {
        assert!(parse(text).is_err(), "{text}: {:?}", parse(text));
    }
}

#[test]
fn forms_that_models_are_fond_of_are_read() {
    let lines = "DESCRIPTION: a\nNSFW: SAFE\nTAGS: x, y";
    for text in [
        &format!("```\n{lines}\n```"),
        &format!("Sure:\n```text\n{lines}\n```\nHope it helps"),
        "```DESCRIPTION: a\nNSFW: SAFE\nTAGS: x, y```",
        "**DESCRIPTION: a**\n**NSFW: SAFE**\n**TAGS: x, y**",
        "**DESCRIPTION:** `a`\n*NSFW:* \"SAFE\"\n__TAGS__: *x*, `y`",
        "DESCRIPTION: \"a\"\nNSFW: \"SAFE\"\nTAGS: \"x\", 'y'",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS: [\"x\",\"y\"]",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS: [x, y]",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS: x; y",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS:\nx\ny",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS:\n- x\n- y",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS:\n\n* x\n\n* y\n\nThat is all.",
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS:\n1. x,\n2. y",
        "NSFW: SAFE\nTAGS: x, y\nDESCRIPTION: a\n\nI hope that this helps.",
        "NSFW: SAFE\nTAGS: x, y\n\nDESCRIPTION:\n\na\n\n- a note",
        "1. DESCRIPTION: a\n2. NSFW: SAFE\n3. TAGS: x, y",
        "1) **Description**: a\n2) **NSFW**: SAFE\n3) **Tags**: x, y",
        "## Description\na\n\n## NSFW Rating\nSAFE\n\n## Tags\nx, y",
        "### 1. Description:\n\na\n\n### 2. Rating\n\nSAFE\n\n**Tags**\n\nx, y\n",
        "> DESCRIPTION: a\n> NSFW: SAFE\n> TAGS: x, y",
        r#"{"DESCRIPTION": "a", "NSFW": "SAFE", "Tags": ["x", "y"]}"#,
        r#"{"Caption": "a", "nsfwRating": "Safe", "tags": "x; y"}"#,
        r#"The form {a, b} and {"c": 1}: {"description": "a", "nsfw_rating": "SAFE", "tags": ["x", "y"]} {d}"#,
        r#"{"description": "a", "nsfw_rating": "SAFE", "nsfw": "safe", "tags": ["x", "y"], "why": {"tags": 1}}"#,
        "{\"description\": \"a\", \"nsfw_rating\": \"SAFE\", \"tags\": [\"x\", \"y\"]}\nNSFW: SAFE",
        "DESCRIPTION: \u{1b}[31ma\u{1b}[0m\u{7}\r\nNSFW: SAFE\r\nTAGS: x\u{0}, \u{1b}]0;t\u{7}y",
        r#"{"description": "\u001b[2Ja\u0007", "nsfw_rating": "SAFE", "tags": ["x\u0000", "y\r"]}"#,
    ] {
        let parsed = parse(text).unwrap_or_else(|why| panic!("{why}: {text}"));
        assert_eq!(parsed.description, "a", "{text}");
        assert_eq!(parsed.rating, Rating::Safe, "{text}");
        assert_eq!(parsed.tags, ["x", "y"], "{text}");
    }
}

#[test]
fn what_belongs_to_a_description_stays() {
    for (description, expected) in [
        ("A sign: {\"a\": 1}", "A sign: {\"a\": 1}"),
        ("A sign: {\"tags\": []} {", "A sign: {\"tags\": []} {"),
        ("*a* and *b*", "*a* and *b*"),
        ("A sign says \"STOP\"", "A sign says \"STOP\""),
        ("A 40\"", "A 40\""),
        ("One.\n\nTwo\nand three.", "One. Two and three."),
        ("It shows: a shoe", "It shows: a shoe"),
    ] {
        let text = format!("DESCRIPTION: {description}\nNSFW: SAFE\nTAGS: a b\nc, d");
        let parsed = parse(&text).unwrap_or_else(|why| panic!("{why}: {text}"));
        assert_eq!(parsed.description, expected);
        assert_eq!(parsed.tags, ["a b c", "d"]);
    }
    let paragraphs = r#"{"description": "One.\n\nTwo.", "nsfw_rating": "SAFE", "tags": []}"#;
    assert_eq!(parse(paragraphs).unwrap().description, "One.\n\nTwo.");
    let raw = "DESCRIPTION: \u{1b}[1ma\nNSFW: SAFE\nTAGS: a";
    assert_eq!(said(raw).raw(), raw);
}

#[test]
fn tags_that_nobody_asked_for_may_lack() {
    for text in [
        "DESCRIPTION: a\nNSFW: SAFE",
        r#"{"description": "a", "nsfw_rating": "SAFE"}"#,
    ] {
        assert_eq!(parse(text), Err(NO_TAGS));
        assert_eq!(said(text).parse(false).unwrap().tags, [""; 0]);
    }
    let text = "DESCRIPTION: a\nNSFW: SAFE\nTAGS: x";
    assert_eq!(said(text).parse(false).unwrap().tags, ["x"]);
}

#[test]
fn an_answer_without_end_is_read_in_a_moment() {
    // Each of them takes minutes where a step of it looks at the whole again.
    let most = MAX_READ - 100;
    for part in [
        "{",
        "{\"a\":",
        "{\"a\":{},",
        "*",
        "\n- a",
        "\n\na",
        "a,",
        "```\n",
        "1. ",
    ] {
        let text = part.repeat(most / part.len());
        for begin in ["", "TAGS: ", "DESCRIPTION: ", "NSFW: SAFE, "] {
            assert!(parse(&format!("{begin}{text}")).is_err());
        }
    }
    let long = format!(
        "DESCRIPTION: a\nNSFW: SAFE\nTAGS: {}",
        "x, ".repeat(6 << 20)
    );
    assert!(parse(&long).unwrap_err().contains("longer"));
}

#[test]
fn the_schema_comes_first_and_the_cli_s_own_words_are_no_answer() {
    let lines = [
        json!({"type": "system", "subtype": "init", "model": "claude-haiku-5-5"}),
        json!({"type": "assistant", "message": {"model": "claude-haiku-5-5-20260101",
            "content": [{"type": "text", "text": "I see a shoe."}]}}),
        json!({"type": "assistant", "message": {"model": "claude-haiku-5-5-20260101",
            "content": [{"type": "tool_use", "name": "StructuredOutput", "input":
                {"description": "A shoe.", "nsfw_rating": "SAFE", "tags": ["shoe"]}}]}}),
        json!({"type": "result", "is_error": false, "result": "{}"}),
    ];
    let output = lines.map(|line| line.to_string()).join("\n");
    let said = Said::read(&format!("noise\n{output}\n"));
    assert_eq!(said.model.as_deref(), Some("claude-haiku-5-5-20260101"));
    assert_eq!(said.parse(true).unwrap().rating, Rating::Safe);
    assert!(said.raw().contains("A shoe."));

    let error = [
        json!({"type": "assistant", "message": {"model": "<synthetic>",
            "content": [{"type": "text", "text": "DESCRIPTION: x\nNSFW: SAFE\nTAGS: a"}]}}),
        json!({"type": "result", "is_error": true, "result": "DESCRIPTION: x\nNSFW: SAFE\nTAGS: a"}),
    ];
    let error = Said::read(&error.map(|line| line.to_string()).join("\n"));
    assert_eq!((error.parse(true).is_err(), error.model), (true, None));
}
