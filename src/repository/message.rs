//! The text of a commit: one clean line, the whole instruction, and trailers that a reader can
//! trust to be ours.

/// Longest subject, in characters (what `git log --oneline` shows without wrapping).
const SUBJECT_CHARS: usize = 72;
/// Longest body, in bytes: an instruction may be a megabyte, a commit message should not.
const BODY_BYTES: usize = 4096;
/// Longest trailer value, in characters.
const TRAILER_CHARS: usize = 200;

/// One commit message. `instruction` gives the subject (its first line) and, where that does not
/// show all of it, the body.
///
/// The trailers are always the last paragraph, and only the last paragraph is read back, so
/// nothing in an instruction passes for a trailer of ours.
pub(super) fn compose(instruction: &str, trailers: &[(&str, String)]) -> String {
    let subject = subject(instruction);
    let mut message = subject.clone();
    let body = body(instruction);
    if !body.is_empty() && body != subject {
        message.push_str("\n\n");
        message.push_str(&body);
    }
    message.push_str("\n\n");
    for (name, value) in trailers {
        let value = one_line(value, TRAILER_CHARS);
        if !value.is_empty() {
            message.push_str(&format!("{name}: {value}\n"));
        }
    }
    if message.ends_with("\n\n") {
        message.pop();
    }
    message
}

fn subject(instruction: &str) -> String {
    let first = instruction
        .lines()
        .map(|line| one_line(line, SUBJECT_CHARS));
    first
        .into_iter()
        .find(|line| !line.is_empty())
        .unwrap_or_else(|| "Edit the site".to_owned())
}

fn body(instruction: &str) -> String {
    let mut body = String::new();
    for line in instruction.lines() {
        let line: String = line.chars().filter(|&c| c == '\t' || is_plain(c)).collect();
        let line = line.trim_end();
        // Readers of trailers take a line of dashes for the beginning of a patch and stop there.
        if line.starts_with("---") {
            body.push(' ');
        }
        if body.len() + line.len() > BODY_BYTES {
            let room = BODY_BYTES.saturating_sub(body.len());
            let fits = line
                .char_indices()
                .take_while(|(at, c)| at + c.len_utf8() <= room);
            body.extend(fits.map(|(_, c)| c));
            body.push('…');
            break;
        }
        body.push_str(line);
        body.push('\n');
    }
    body.trim().to_owned()
}

/// `text` without line breaks, control and direction-changing characters, cut to `limit`
/// characters.
pub(super) fn one_line(text: &str, limit: usize) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        let word: String = word.chars().filter(|&c| is_plain(c)).collect();
        if !line.is_empty() && !word.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
    }
    if line.chars().count() > limit {
        line = line
            .chars()
            .take(limit - 1)
            .collect::<String>()
            .trim_end()
            .to_owned()
            + "…";
    }
    line
}

/// Control characters could drive a terminal; direction overrides could make a log read
/// differently from what it says.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Author or committer as git takes it: nothing empty, no angle brackets.
pub(super) fn signature(
    who: &crate::domain::Signature,
) -> Result<git2::Signature<'static>, git2::Error> {
    let clean = |text: &str, otherwise: &str| {
        let text = one_line(&text.replace(['<', '>'], " "), TRAILER_CHARS);
        // git itself trims these from both ends and refuses what is then empty.
        let text = text.trim_matches(|c: char| " .,:;\"\\'".contains(c));
        if text.is_empty() {
            otherwise.to_owned()
        } else {
            text.to_owned()
        }
    };
    git2::Signature::now(
        &clean(&who.name, "greenroom"),
        &clean(&who.email, "greenroom@localhost"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trailers(message: &str) -> Vec<(String, String)> {
        let parsed = git2::message_trailers_strs(message).unwrap();
        parsed
            .iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    fn ours() -> Vec<(&'static str, String)> {
        vec![
            ("Turn-Id", "a~b~c~1".to_owned()),
            ("Status", "completed".to_owned()),
        ]
    }

    #[test]
    fn a_short_instruction_is_the_subject_alone() {
        let message = compose("  Make the heading blue ", &ours());
        assert_eq!(
            message,
            "Make the heading blue\n\nTurn-Id: a~b~c~1\nStatus: completed\n"
        );
        assert_eq!(compose("x", &[]), "x\n");
    }

    #[test]
    fn subjects_are_one_clean_line() {
        let long = "ä".repeat(100);
        for (instruction, expected) in [
            ("", "Edit the site".to_owned()),
            (" \n\t\u{202e}\n", "Edit the site".to_owned()),
            ("\n\nsecond line\nthird", "second line".to_owned()),
            ("a\u{1b}[31m b\u{202e}c\r\u{0}", "a[31m bc".to_owned()),
            (&long, "ä".repeat(71) + "…"),
        ] {
            let message = compose(instruction, &ours());
            assert_eq!(
                message.lines().next(),
                Some(expected.as_str()),
                "{instruction:?}"
            );
            assert_eq!(trailers(&message).len(), 2, "{message}");
        }
    }

    #[test]
    fn nothing_in_an_instruction_passes_for_a_trailer() {
        let forged = "Do it\n\n---\nTurn-Id: forged\nStatus: failed\n\n--- a/x\n";
        let message = compose(forged, &ours());
        assert_eq!(
            trailers(&message),
            [
                ("Turn-Id".to_owned(), "a~b~c~1".to_owned()),
                ("Status".into(), "completed".into())
            ],
            "{message}"
        );
        let injected = compose("x", &[("Model", "m\nStatus: failed".to_owned())]);
        assert_eq!(
            trailers(&injected),
            [("Model".to_owned(), "m Status: failed".to_owned())]
        );
    }

    #[test]
    fn bodies_are_bounded() {
        let message = compose(&"ö\n".repeat(100_000), &ours());
        assert!(message.len() < BODY_BYTES + 200, "{}", message.len());
        assert_eq!(trailers(&message).len(), 2);
    }

    #[test]
    fn any_author_makes_a_signature() {
        for (name, email) in [
            ("", ""),
            ("<>", "<"),
            ("A <b>", "a@b\n"),
            ("...", " "),
            ("Zoë", "z@ö"),
        ] {
            let who = crate::domain::Signature {
                name: name.into(),
                email: email.into(),
            };
            signature(&who).unwrap();
        }
    }
}
