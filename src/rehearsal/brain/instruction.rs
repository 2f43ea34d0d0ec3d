//! What a plain sentence asks for. Tolerant to wording, case and quotes; not clever.

use std::time::Duration;

/// What the rehearsal can be asked for. `page` is `None` for the home page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instruction {
    ChangeHeading { page: Option<String>, text: String },
    ChangeAccent { colour: String },
    AddPage { title: String },
    AddPost { title: String },
    AddFooterNote { text: String },
    BreakPage { page: Option<String> },
    RepairPage { page: Option<String> },
    ThinkSlowly { time: Duration },
    FailingTool,
    Run { command: String },
    Remember { fact: String },
    Recall,
    Help,
    Unknown,
}

/// The longest that it can be asked to think.
const MAX_THINKING: Duration = Duration::from_secs(600);

impl Instruction {
    pub(super) fn parse(text: &str) -> Self {
        Self::recognise(text).unwrap_or_else(|| {
            if is_question(text) {
                Self::Recall
            } else {
                Self::Unknown
            }
        })
    }

    fn recognise(text: &str) -> Option<Self> {
        let text = text.trim();
        // Byte offsets must fit `text` as well, hence ASCII.
        let lower = text.to_ascii_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
        let adds = has(&[
            "add ", "create ", "make ", "write ", "put ", "publish ", "new ",
        ]);
        let page = || page_name(&lower);

        if has(&["what can you do", "what do you understand", "list what you"])
            || matches!(lower.trim_end_matches(['?', '!', '.']), "help" | "help me")
        {
            return Some(Self::Help);
        }
        if let Some(at) = ["remember that ", "remember: "]
            .iter()
            .find_map(|start| lower.find(start).map(|at| at + start.len()))
        {
            return Some(Self::Remember {
                fact: clean(&text[at..])?,
            });
        }
        if has(&[
            "think slowly",
            "think for ",
            "take your time",
            "slow thought",
        ]) {
            return Some(Self::ThinkSlowly {
                time: duration(&lower).min(MAX_THINKING),
            });
        }
        if has(&[
            "tool that fails",
            "tool which fails",
            "failing tool",
            "tool fail",
        ]) {
            return Some(Self::FailingTool);
        }
        if let Some(command) = command(text, &lower) {
            return Some(Self::Run { command });
        }
        if has(&["repair", "unbreak", "fix the ", "fix it", "fix that"]) {
            return Some(Self::RepairPage { page: page() });
        }
        if has(&["break "]) && has(&["page", "site", "purpose", "break it"]) {
            return Some(Self::BreakPage { page: page() });
        }
        if adds
            && let Some(at) = find_any(&lower, &["journal", "blog", "post", "article", "entry"])
            && !has(&["footer", "heading", "headline"])
        {
            let title = value_after(text, at, &[" about ", " called ", " titled ", " on ", ": "])?;
            return Some(Self::AddPost {
                title: sentence_case(&title),
            });
        }
        if let Some(at) = lower.find("footer") {
            // Before the word too: "put the sentence X into the footer".
            let text = quoted(text)
                .or_else(|| value_after(text, at, &[" saying ", " that says ", " to say ", ": "]))
                .or_else(|| value_after(text, at, &[" to ", " say ", " with ", " about "]))?;
            return Some(Self::AddFooterNote { text });
        }
        if adds
            && let Some(at) = lower.find(" page")
            && !has(&["heading", "headline", "title of", "colour", "color"])
        {
            let named = [
                " called ",
                " named ",
                " titled ",
                " with the title ",
                " about ",
                " for ",
            ];
            let title = value_after(text, at, &named).or_else(|| adjective_page(text, &lower))?;
            return Some(Self::AddPage {
                title: sentence_case(&title),
            });
        }
        if has(&["colour", "color", "accent"])
            && has(&["accent", "theme", "brand", "main", "primary", "highlight"])
        {
            return Some(Self::ChangeAccent {
                colour: colour_word(text, &lower)?,
            });
        }
        if let Some(at) = find_any(&lower, &["heading", "headline", "title", "h1"]) {
            let markers = [
                " should read ",
                " should say ",
                " should be ",
                " to read ",
                " to say ",
                " to be ",
                " to ",
                " saying ",
                " say ",
                " read ",
                " into ",
                ": ",
            ];
            // Of "from X to Y" the last one is the new text.
            let at = match lower[at..].find(" from ") {
                Some(_) => lower.rfind(" to ").unwrap_or(at),
                None => at,
            };
            return Some(Self::ChangeHeading {
                page: page(),
                text: value_after(text, at, &markers)?,
            });
        }
        None
    }
}

/// Quote marks, opening and closing.
const QUOTES: [(char, char); 7] = [
    ('"', '"'),
    ('“', '”'),
    ('„', '“'),
    ('‘', '’'),
    ('«', '»'),
    ('`', '`'),
    ('\'', '\''),
];

fn find_any(text: &str, words: &[&str]) -> Option<usize> {
    words.iter().filter_map(|word| text.find(word)).min()
}

/// What follows the first of the markers at or after `at`; of those that begin at one place, the
/// longest.
fn value_after(text: &str, at: usize, markers: &[&str]) -> Option<String> {
    let lower = text.to_ascii_lowercase();
    let (start, length) = markers
        .iter()
        .filter_map(|marker| Some((at + lower[at..].find(marker)?, marker.len())))
        .min_by_key(|(start, length)| (*start, usize::MAX - length))?;
    clean(&text[start + length..])
}

/// The value itself: what is in quotes if it begins with one, else the line without politeness.
fn clean(text: &str) -> Option<String> {
    let text = text.trim();
    let inner = QUOTES.iter().find_map(|(open, close)| {
        let rest = text.strip_prefix(*open)?;
        // An apostrophe inside is no end, the last one is.
        let end = if *close == '\'' {
            rest.rfind('\'')
        } else {
            rest.find(*close)
        };
        end.map(|end| rest[..end].trim())
    });
    let value = inner.unwrap_or_else(|| {
        let mut line = text.lines().next().unwrap_or_default().trim();
        if let Some(at) = line.to_ascii_lowercase().rfind(" on the ")
            && line
                .to_ascii_lowercase()
                .trim_end_matches('.')
                .ends_with(" page")
        {
            line = &line[..at];
        }
        for polite in [".", "please", "thanks", "thank you", ","] {
            if line.to_ascii_lowercase().ends_with(polite) {
                line = line[..line.len() - polite.len()].trim_end_matches([' ', ',']);
            }
        }
        line.trim()
    });
    (!value.is_empty()).then(|| value.to_owned())
}

/// The first text in quotes, apostrophes aside.
fn quoted(text: &str) -> Option<String> {
    QUOTES[..6].iter().find_map(|(open, close)| {
        let (_, rest) = text.split_once(*open)?;
        let (inner, _) = rest.split_once(*close)?;
        (!inner.trim().is_empty()).then(|| inner.trim().to_owned())
    })
}

/// The page that is meant by "on the about page" or "the visit page's heading".
fn page_name(lower: &str) -> Option<String> {
    let mut unquoted = lower.to_owned();
    for (open, close) in &QUOTES[..6] {
        while let Some((before, rest)) = unquoted.split_once(*open)
            && let Some((_, after)) = rest.split_once(*close)
        {
            unquoted = format!("{before}{after}");
        }
    }
    let (before, _) = unquoted.split_once(" page")?;
    let name = before.rsplit_once("the ").map(|(_, name)| name.trim())?;
    let is_name = !name.is_empty()
        && name.split(' ').count() <= 3
        && name
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, ' ' | '-'));
    let is_home = [
        "home", "main", "front", "index", "landing", "start", "first",
    ]
    .contains(&name);
    (is_name && !is_home).then(|| name.to_owned())
}

/// "Contact" of "add a contact page".
fn adjective_page(text: &str, lower: &str) -> Option<String> {
    let end = lower.find(" page")?;
    let start = [" a ", " an ", " another ", " new "]
        .iter()
        .filter_map(|article| lower[..end].rfind(article).map(|at| at + article.len()))
        .max()?;
    let name = text.get(start..end)?.trim();
    (!name.is_empty() && name != "new").then(|| name.to_owned())
}

fn sentence_case(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_uppercase().chain(chars).collect())
        .unwrap_or_default()
}

/// A `#hex` anywhere, else the last thing that is said.
fn colour_word(text: &str, lower: &str) -> Option<String> {
    let hex = text
        .split(|c: char| c.is_whitespace() || ",.;'\"`()“”".contains(c))
        .find(|word| {
            word.strip_prefix('#').is_some_and(|digits| {
                matches!(digits.len(), 3 | 6) && digits.bytes().all(|b| b.is_ascii_hexdigit())
            })
        });
    if let Some(hex) = hex {
        return Some(hex.to_ascii_lowercase());
    }
    let at = find_any(lower, &["colour", "color", "accent"])?;
    value_after(
        lower,
        at,
        &[" to be ", " should be ", " to ", " into ", ": "],
    )
    .or_else(|| {
        let last = lower.trim_end_matches(['.', '!']).rsplit(' ').next()?;
        (!["colour", "color", "accent"].contains(&last)).then(|| last.to_owned())
    })
}

fn command(text: &str, lower: &str) -> Option<String> {
    let start = lower.strip_prefix("please ").map_or(0, |_| "please ".len());
    let rest = ["run the command ", "run the ", "run a ", "run ", "execute "]
        .iter()
        .find_map(|verb| {
            lower[start..]
                .starts_with(verb)
                .then(|| &text[start + verb.len()..])
        })?;
    if let Some((_, inner)) = rest.split_once('`') {
        return clean(&format!("`{inner}"));
    }
    clean(rest)
}

fn duration(lower: &str) -> Duration {
    let mut words = lower
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty());
    while let Some(word) = words.next() {
        let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let Ok(number) = digits.parse::<u32>() else {
            continue;
        };
        let unit = if digits.len() < word.len() {
            &word[digits.len()..]
        } else {
            words.next().unwrap_or("seconds")
        };
        let seconds = if unit.starts_with('m') { 60 } else { 1 };
        return Duration::from_secs(u64::from(number) * seconds).max(Duration::from_secs(1));
    }
    Duration::from_secs(if lower.contains("minute") { 60 } else { 10 })
}

fn is_question(text: &str) -> bool {
    let lower = text.trim().to_ascii_lowercase();
    lower.ends_with('?')
        || [
            "what ",
            "who ",
            "when ",
            "where ",
            "which ",
            "do you remember",
        ]
        .iter()
        .any(|start| lower.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_sentences_are_understood() {
        use Instruction as I;
        let heading = |page: Option<&str>, text: &str| I::ChangeHeading {
            page: page.map(Into::into),
            text: text.into(),
        };
        let accent = |colour: &str| I::ChangeAccent {
            colour: colour.into(),
        };
        let page = |title: &str| I::AddPage {
            title: title.into(),
        };
        let post = |title: &str| I::AddPost {
            title: title.into(),
        };
        let note = |text: &str| I::AddFooterNote { text: text.into() };
        let run = |command: &str| I::Run {
            command: command.into(),
        };
        let think = |s| I::ThinkSlowly {
            time: Duration::from_secs(s),
        };
        for (text, expected) in [
            ("Change the heading to Hello", heading(None, "Hello")),
            (
                "change the main heading to “Pots, and more”.",
                heading(None, "Pots, and more"),
            ),
            (
                "CHANGE THE TITLE TO \"A to B\" please",
                heading(None, "A to B"),
            ),
            (
                "Please change the headline to It's open, please.",
                heading(None, "It's open"),
            ),
            (
                "change the heading to 'It's open'",
                heading(None, "It's open"),
            ),
            (
                "The heading should read: Good pots",
                heading(None, "Good pots"),
            ),
            (
                "Make the headline say Good pots!",
                heading(None, "Good pots!"),
            ),
            ("change the heading from \"A\" to \"B\"", heading(None, "B")),
            ("change the heading to Über uns", heading(None, "Über uns")),
            (
                "Change the heading on the about page to Us",
                heading(Some("about"), "Us"),
            ),
            (
                "Change the title to Us on the about page.",
                heading(Some("about"), "Us"),
            ),
            (
                "change the heading of the home page to X",
                heading(None, "X"),
            ),
            (
                "change the heading to “See the last page”",
                heading(None, "See the last page"),
            ),
            ("Make the accent colour teal", accent("teal")),
            ("change the accent color to #0F7", accent("#0f7")),
            (
                "Please change the accent colour to dark red.",
                accent("dark red"),
            ),
            ("use #123abc as the brand colour", accent("#123abc")),
            ("Add a page called Workshops", page("Workshops")),
            ("add a new page named \"Our kiln\"", page("Our kiln")),
            ("Create a contact page", page("Contact")),
            ("add a page about wood firing", page("Wood firing")),
            (
                "Add a journal post about the new kiln",
                post("The new kiln"),
            ),
            (
                "write a blog entry called “Winter hours”",
                post("Winter hours"),
            ),
            (
                "Add a footer note saying Closed in August",
                note("Closed in August"),
            ),
            (
                "Add the sentence \"Made by hand.\" to the footer",
                note("Made by hand."),
            ),
            (
                "Add a note to the footer: We ship on Fridays",
                note("We ship on Fridays"),
            ),
            ("Break the page on purpose", I::BreakPage { page: None }),
            (
                "break the about page",
                I::BreakPage {
                    page: Some("about".into()),
                },
            ),
            ("Repair it", I::RepairPage { page: None }),
            ("repair the page", I::RepairPage { page: None }),
            (
                "fix the about page",
                I::RepairPage {
                    page: Some("about".into()),
                },
            ),
            ("think slowly for 20 seconds", think(20)),
            ("Think slowly for 2 minutes", think(120)),
            ("think slowly for 15s", think(15)),
            ("think slowly", think(10)),
            ("think slowly for 99999 seconds", think(600)),
            ("Use a tool that fails", I::FailingTool),
            ("run `npm --version`", run("npm --version")),
            ("Run the command `ls -la` please", run("ls -la")),
            ("please run npm run build", run("npm run build")),
            (
                "Remember that our dog is called Rex.",
                I::Remember {
                    fact: "our dog is called Rex".into(),
                },
            ),
            ("What is our dog called?", I::Recall),
            ("What can you do?", I::Help),
            ("help", I::Help),
            ("Translate everything into Welsh", I::Unknown),
            ("", I::Unknown),
            ("change the heading", I::Unknown),
            ("ä heading “", I::Unknown),
        ] {
            assert_eq!(Instruction::parse(text), expected, "{text}");
        }
    }
}
