//! What the log looks like.

use std::sync::{Arc, Mutex};

use serde_json::{Value as Json, json};
use tracing::{debug, error, field, info, info_span, warn};

use super::*;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn logged(form: Form, level: Level, work: impl FnOnce()) -> String {
    let sink = Sink::default();
    let made = sink.clone();
    let lines = Lines {
        form,
        writer: move || made.clone(),
    };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(targets(level)));
    tracing::subscriber::with_default(subscriber, work);
    let bytes = sink.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

const TEXT: Form = Form::Text {
    colour: false,
    has_day: false,
};

fn as_json(log: &str) -> Vec<Json> {
    log.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

#[test]
fn a_json_line_holds_the_fields_of_all_spans() {
    let log = logged(Form::Json, Level::INFO, || {
        let request = info_span!(
            "request",
            request_id = "r1",
            thread = "outer",
            later = field::Empty
        );
        let _request = request.enter();
        let turn = info_span!("turn", turn_id = "a~b~c~0", thread = "a/b/c");
        let _turn = turn.enter();
        request.record("later", 7);
        info!(
            elapsed_ms = 12,
            ok = true,
            share = 0.5,
            level = "mine",
            "turn ended"
        );
    });
    let lines = as_json(&log);
    let [line] = lines.as_slice() else {
        panic!("one line: {log}")
    };
    let time: Timestamp = line["timestamp"].as_str().unwrap().parse().unwrap();
    assert!(time.duration_until(Timestamp::now()).as_secs() < 60);
    assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    assert!(
        log.starts_with("{\"timestamp\":"),
        "the time comes first: {log}"
    );
    let mut rest = line.as_object().unwrap().clone();
    rest.remove("timestamp");
    assert_eq!(
        Json::from(rest),
        json!({
            "level": "info", "message": "turn ended", "target": "greenroom::telemetry::tests",
            "request_id": "r1", "thread": "a/b/c", "turn_id": "a~b~c~0", "later": 7,
            "elapsed_ms": 12, "ok": true, "share": 0.5, "level_": "mine",
        })
    );
}

#[test]
fn a_text_line_is_for_a_person() {
    let log = logged(TEXT, Level::INFO, || {
        let _span = info_span!("request", request_id = "r1").entered();
        warn!(path = "a file", n = 3, "it is odd");
    });
    assert_eq!(
        &log[12..],
        "Z WARN  it is odd request_id=r1 path=\"a file\" n=3\n",
        "{log}"
    );
}

#[test]
fn values_cannot_forge_lines_or_move_a_terminal() {
    let evil = "x\n{\"level\":\"error\"}\r\x1b[2J\u{9b}31m\u{202e}\u{7f}";
    for form in [TEXT, Form::Json] {
        let log = logged(form, Level::INFO, || info!(value = evil, "said {evil}"));
        assert_eq!(log.lines().count(), 1, "{log}");
        let line = log.trim_end_matches('\n');
        assert!(
            !line.contains(|c: char| c.is_control() || is_reordering(c)),
            "{line:?}"
        );
    }
    let log = logged(Form::Json, Level::INFO, || info!(value = evil, "x"));
    assert_eq!(as_json(&log)[0]["value"], evil, "nothing is lost either");
}

#[test]
fn secrets_are_masked_in_every_form_and_place() {
    let secrets = [
        "canary-91f3-token",
        "canary \"quoted\\ 77c0",
        "canary-91f3-token-longer",
    ];
    for secret in secrets {
        hide(&Secret::new(secret));
    }
    hide(&Secret::new("or"));
    for form in [TEXT, Form::Json] {
        let log = logged(form, Level::INFO, || {
            for secret in secrets {
                let _span = info_span!("s", inside = secret).entered();
                info!(shown = secret, debug = ?Some(secret), "header: Bearer {secret} for you");
            }
        });
        assert!(!log.contains("91f3") && !log.contains("77c0"), "{log}");
        assert!(!log.contains("longer"), "no tail of a longer secret: {log}");
        assert!(log.contains("Bearer *** for you"), "{log}");
    }
    assert_eq!(masked("a canary-91f3-token b"), "a *** b");
    assert_eq!(printable("x\ncanary-91f3-token\x07"), "x\\n***\\u0007");
}

#[test]
fn no_cut_leaves_a_piece_of_a_secret() {
    hide(&Secret::new("canary-cut-2209-2209-2209"));
    for before in (0..40).map(|n| MAX_VALUE_BYTES + MARGIN_BYTES - n) {
        let value = format!("{}canary-cut-2209-2209-2209 and more", "x".repeat(before));
        let log = logged(TEXT, Level::INFO, || info!(value, "m"));
        assert!(!log.contains("canary"), "{before}");
    }
    // Masking makes text shorter, which moves the cut inwards.
    let value = "canary-cut-2209-2209-2209".repeat(10_000);
    let log = logged(TEXT, Level::INFO, || info!(value, "m"));
    assert!(!log.contains("canary"), "{log}");
}

#[test]
fn a_huge_value_is_cut() {
    let huge = "ä".repeat(5_000_000);
    for form in [TEXT, Form::Json] {
        let log = logged(form, Level::INFO, || error!(huge, "{huge}"));
        assert!(log.len() < 3 * MAX_VALUE_BYTES, "{}", log.len());
        assert!(log.contains('…'));
    }
}

#[test]
fn an_error_is_logged_with_its_causes() {
    let cause = std::io::Error::other("disk on fire");
    let error = crate::config::ConfigError::Read {
        file: "/x".into(),
        source: cause,
    };
    let log = logged(TEXT, Level::INFO, || {
        error!(error = &error as &dyn std::error::Error, "no start");
    });
    assert!(
        log.contains("failed to read the settings in /x: disk on fire"),
        "{log}"
    );
}

#[test]
fn the_level_is_ours_and_libraries_only_warn() {
    let work = || {
        info!("ours");
        debug!("ours in detail");
        info!(target: "hyper::client", "theirs");
        warn!(target: "hyper::client", "their warning");
    };
    let messages = |level| {
        let log = logged(Form::Json, level, work);
        let texts: Vec<String> = as_json(&log)
            .iter()
            .map(|line| line["message"].as_str().unwrap().to_owned())
            .collect();
        texts.join(", ")
    };
    assert_eq!(messages(Level::ERROR), "");
    assert_eq!(messages(Level::WARN), "their warning");
    assert_eq!(messages(Level::INFO), "ours, their warning");
    assert_eq!(
        messages(Level::DEBUG),
        "ours, ours in detail, their warning"
    );
    assert_eq!(
        messages(Level::TRACE),
        "ours, ours in detail, theirs, their warning"
    );
}
