//! What is wrong with a stylesheet that Vite and Astro serve as if it were whole: neither says a
//! word of one that is cut off (measured with Astro 5.18 and 7.3.5). Pure.

/// Where a stylesheet breaks off, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// From 1, like the column, which counts characters.
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) what: &'static str,
}

/// The first thing that browsers would stumble over: what is opened and not closed, or closed and
/// not open. Values and names are not judged: there are new ones every year.
pub(crate) fn first_fault(text: &str) -> Option<Fault> {
    let mut at = Place { line: 1, column: 1 };
    let mut open: Vec<(char, Place)> = Vec::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let here = at;
        at.pass(c);
        match c {
            '/' if rest.peek() == Some(&'*') => {
                let mut before = ' ';
                // The star that opens it doesn't close it.
                at.pass('*');
                rest.next();
                loop {
                    let Some(c) = rest.next() else {
                        return Some(here.fault("this comment is never closed"));
                    };
                    at.pass(c);
                    if before == '*' && c == '/' {
                        break;
                    }
                    before = c;
                }
            }
            '"' | '\'' => loop {
                match rest.next() {
                    None | Some('\n') => return Some(here.fault("this text is never closed")),
                    Some('\\') => {
                        at.pass('\\');
                        if let Some(escaped) = rest.next() {
                            at.pass(escaped);
                        }
                    }
                    Some(inner) => {
                        at.pass(inner);
                        if inner == c {
                            break;
                        }
                    }
                }
            },
            '\\' => {
                if let Some(escaped) = rest.next() {
                    at.pass(escaped);
                }
            }
            '{' | '(' | '[' => open.push((c, here)),
            '}' | ')' | ']' => match open.pop() {
                Some((opener, _)) if closes(opener, c) => {}
                Some((opener, place)) => return Some(place.fault(never_closed(opener))),
                None => return Some(here.fault("this closes nothing")),
            },
            _ => {}
        }
    }
    let (opener, place) = open.pop()?;
    Some(place.fault(never_closed(opener)))
}

fn closes(opener: char, c: char) -> bool {
    matches!((opener, c), ('{', '}') | ('(', ')') | ('[', ']'))
}

fn never_closed(opener: char) -> &'static str {
    match opener {
        '{' => "this block is never closed",
        _ => "this bracket is never closed",
    }
}

#[derive(Debug, Clone, Copy)]
struct Place {
    line: u32,
    column: u32,
}

impl Place {
    fn pass(&mut self, c: char) {
        if c == '\n' {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
    }

    fn fault(self, what: &'static str) -> Fault {
        let Self { line, column } = self;
        Fault { line, column, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_is_found_where_it_begins() {
        for (text, line, column) in [
            ("a { color: red }\n.x { color: ", 2, 4),
            ("a { b: c;\n", 1, 3),
            ("@media (min-width: 1px { a { } }", 1, 8),
            ("a { } }", 1, 7),
            ("a { content: \"x\n }", 1, 14),
            ("a { } /* and so on", 1, 7),
            ("/*/ a { }", 1, 1),
            ("a { b: url(x.png }", 1, 11),
            ("a[href=x { }", 1, 2),
        ] {
            let fault = first_fault(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(
                (fault.line, fault.column),
                (line, column),
                "{text}: {fault:?}"
            );
        }
    }

    #[test]
    fn what_is_whole_is_left_alone() {
        for text in [
            "",
            "@import 'a.css';\na { b: url(data:image/svg+xml;utf8,<svg/>); c: \"}{(\" }",
            "a::after { content: '\\'}'; } /* } ' */ @media (a) { b { c: calc((1px + 2px) * 3) } }",
            ".sm\\:x\\{ { d: [e] } @font-face { src: url( 'x.woff2' ) format(\"woff2\") }",
            ":root { --empty:; --braces: { a: b }; --odd: \\( } a { content: \"a\\\nb\" }",
        ] {
            assert_eq!(first_fault(text), None, "{text}");
        }
    }
}
