//! Markdown: its images, its texts, and the HTML in it.

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::scan::{self, Dialect, Picture, Piece, Unsure};

/// Reads a file, from `from` on.
pub(super) fn scan(text: &str, from: usize) -> Result<Vec<Piece>, Unsure> {
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_TASKLISTS;
    let body = text.get(from..).ok_or(Unsure { at: from })?;
    // The HTML alone, at its place: an element may be opened here and closed further down.
    let mut html = vec![b' '; text.len()];
    let mut pieces = Vec::new();
    let (mut images, mut in_code) = (0_usize, false);
    for (event, range) in Parser::new_ext(body, options).into_offset_iter() {
        let at = from + range.start..from + range.end;
        match event {
            Event::Start(Tag::Image { dest_url, .. }) => {
                images += 1;
                let inner = text
                    .as_bytes()
                    .get(at.start + 2..at.end)
                    .unwrap_or_default();
                let blank = inner.iter().take_while(|b| b.is_ascii_whitespace()).count();
                let is_empty =
                    text[at.start..].starts_with("![") && inner.get(blank) == Some(&b']');
                let end = if is_empty {
                    at.start + 2 + blank
                } else {
                    at.end
                };
                pieces.push(Piece::Picture(Picture {
                    alt: at.start + 2..end,
                    at,
                    src: Some(dest_url.into_string()),
                }));
            }
            Event::End(TagEnd::Image) => images = images.saturating_sub(1),
            Event::Start(Tag::CodeBlock(_)) => in_code = true,
            Event::End(TagEnd::CodeBlock) => in_code = false,
            Event::Text(_) | Event::Code(_) if images == 0 && !in_code => {
                pieces.push(Piece::Text(at));
            }
            Event::Html(_) | Event::InlineHtml(_) => {
                html[at.clone()].copy_from_slice(&text.as_bytes()[at]);
            }
            _ => {}
        }
    }
    let html = String::from_utf8(html).map_err(|_| Unsure { at: from })?;
    pieces.extend(scan::scan(&html, from, Dialect::Html)?);
    pieces.sort_by_key(Piece::start);
    Ok(pieces)
}
