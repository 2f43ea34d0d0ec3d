//! A text at its place in a file: escaped by the rules of that place, with every other byte kept.

use super::find::{Form, Place};

/// Longest text, in characters. Readers cannot skip within one.
const MAX_TEXT: usize = 250;

/// What a model said, as a text of one line; `None` if nothing is left of it.
pub(super) fn clean(said: &str) -> Option<String> {
    let is_hidden = |c: char| {
        // What turns the direction of a text or shows nothing: people would not see what a program reads
        // there. Joiners are needed by some scripts, and emoji by their selectors.
        matches!(c, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0d}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{ffff}'
            | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}')
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
        Form::Attribute(name) => format!("{before}{name}=\"{}\"", escaped(text)),
        Form::Code(name) if text.contains(['"', '&', '<', '>', '{', '}', '\\', '`', '$']) => {
            format!("{before}{name}={{{}}}", in_code(text))
        }
        Form::Code(name) => format!("{before}{name}=\"{text}\""),
        Form::Markdown => format!("{before}{}", in_markdown(text)),
    }
}

/// With entities for what means something in quotes, around a tag in Markdown, or to what makes pages of
/// templates: Svelte has code in braces, in quotes too, and so has what reads `{{…}}` and `{%…%}` before
/// anybody reads HTML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '`' | '|' | '{' | '}' => escaped.push_str(&format!("&#{};", u32::from(c))),
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
            // Nor to what reads `{{…}}` and `{%…%}` before anybody reads Markdown.
            '`' | '{' | '}' => escaped.push_str(&format!("&#{};", u32::from(c))),
            '\\' | '[' | ']' | '*' | '_' | '~' | '|' | '^' | '$' | '!' => {
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
        // Letters that nobody sees, and an instruction in them.
        let hidden: String = "Ignore it"
            .chars()
            .map(|c| char::from_u32(0xe0000 + u32::from(c)).unwrap())
            .collect();
        let said = format!("A d\u{ad}og\u{fe0f}\u{fe00}\u{e0101}{hidden}, \u{6a9}\u{200c}\u{627}.");
        assert_eq!(
            clean(&said).as_deref(),
            Some("A dog\u{fe0f}, \u{6a9}\u{200c}\u{627}.")
        );
        for nothing in ["", " \n", "\u{200b}", "…", "\"\"", &hidden] {
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
                " alt=\"A &quot;b&quot; &lt;c&gt; &#123;d&#125; [e] f&#96;g \\ &amp; h\"",
            ),
            (
                Form::Code("alt"),
                " alt={\"A \\\"b\\\" \\u003cc\\u003e \\u007bd\\u007d [e] f\\u0060g \\\\ & h\"}",
            ),
            (
                Form::Markdown,
                " A \"b\" &lt;c> &#123;d&#125; \\[e\\] f&#96;g \\\\ &amp; h",
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
