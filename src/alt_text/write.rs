//! A text at its place in a file: escaped by the rules of that place, with every other byte kept.

use super::find::{Form, Place};

/// Longest text, in characters. Readers cannot skip within one.
const MAX_TEXT: usize = 250;

/// What a model said, as a text of one line; `None` if nothing is left of it.
pub(super) fn clean(said: &str) -> Option<String> {
    let is_hidden = |c: char| {
        // What turns the direction of a text or has no width; joiners are needed by some scripts.
        matches!(c, '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2028}'..='\u{2029}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
    };
    let plain: String = said
        .chars()
        .filter(|c| !is_hidden(*c))
        .map(|c| {
            if c.is_control() || c.is_whitespace() {
                ' '
            } else {
                c
            }
        })
        .collect();
    let words: Vec<&str> = plain.split(' ').filter(|word| !word.is_empty()).collect();
    let text = words.join(" ");
    if !text.contains(char::is_alphanumeric) {
        return None;
    }
    if text.chars().count() <= MAX_TEXT {
        return Some(text);
    }
    let cut: String = text.chars().take(MAX_TEXT - 1).collect();
    let end = cut.rfind(' ').filter(|end| *end > cut.len() / 2);
    let cut = &cut[..end.unwrap_or(cut.len())];
    Some(format!(
        "{}…",
        cut.trim_end_matches([',', ';', ':', ' ', '.'])
    ))
}

/// What stands in the file at a place when it has this text.
pub(super) fn written(place: &Place, text: &str) -> String {
    let before = &place.before;
    match place.form {
        Form::Attribute(name) => format!("{before}{name}=\"{}\"", escaped(text, "")),
        Form::Svelte(name) => format!("{before}{name}=\"{}\"", escaped(text, "{}")),
        Form::Code(name) if text.contains(['"', '&', '<', '>', '{', '}', '\\', '`', '$']) => {
            format!("{before}{name}={{{}}}", in_code(text))
        }
        Form::Code(name) => format!("{before}{name}=\"{text}\""),
        Form::Markdown => format!("{before}{}", in_markdown(text)),
    }
}

/// With entities for what means something in quotes, or around a tag in Markdown.
fn escaped(text: &str, more: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '`' | '|' => escaped.push_str(&format!("&#{};", u32::from(c))),
            c if more.contains(c) => escaped.push_str(&format!("&#{};", u32::from(c))),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A string of JavaScript, in which nothing ends a tag, a brace or a script.
fn in_code(text: &str) -> String {
    let string = serde_json::Value::from(text).to_string();
    let mut code = String::with_capacity(string.len());
    for c in string.chars() {
        match c {
            '<' | '>' | '{' | '}' | '`' | '$' => code.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => code.push(c),
        }
    }
    code
}

fn in_markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            // A backslash says nothing where an earlier tick began code.
            '`' => escaped.push_str("&#96;"),
            '\\' | '[' | ']' | '*' | '_' | '{' | '}' | '~' | '|' | '^' | '$' | '!' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_one_bounded_line() {
        assert_eq!(
            clean(" A dog\r\n\u{202e}runs.\t ").as_deref(),
            Some("A dog runs.")
        );
        for nothing in ["", " \n", "\u{200b}", "…", "\"\""] {
            assert_eq!(clean(nothing), None, "{nothing:?}");
        }
        let long = clean(&"word, ".repeat(100)).unwrap();
        assert!(
            long.chars().count() <= MAX_TEXT && long.ends_with("word…"),
            "{long}"
        );
        let long = clean(&"字".repeat(400)).unwrap();
        assert_eq!(long.chars().count(), MAX_TEXT);
    }

    #[test]
    fn each_place_has_its_own_rules() {
        let at = |form| Place {
            at: 0..0,
            before: " ".into(),
            form,
        };
        let hostile = "A \"b\" <c> {d} [e] f`g \\ & h";
        for (form, expected) in [
            (
                Form::Attribute("alt"),
                " alt=\"A &quot;b&quot; &lt;c&gt; {d} [e] f&#96;g \\ &amp; h\"",
            ),
            (
                Form::Svelte("alt"),
                " alt=\"A &quot;b&quot; &lt;c&gt; &#123;d&#125; [e] f&#96;g \\ &amp; h\"",
            ),
            (
                Form::Code("alt"),
                " alt={\"A \\\"b\\\" \\u003cc\\u003e \\u007bd\\u007d [e] f\\u0060g \\\\ & h\"}",
            ),
            (
                Form::Markdown,
                " A \"b\" &lt;c> \\{d\\} \\[e\\] f&#96;g \\\\ &amp; h",
            ),
        ] {
            assert_eq!(written(&at(form), hostile), expected, "{form:?}");
        }
        let plain = "A potter’s hands, at work.";
        assert_eq!(
            written(&at(Form::Code("imageAlt")), plain),
            " imageAlt=\"A potter’s hands, at work.\""
        );
    }
}
