//! The plain-instruction brain: about a dozen things that can be asked for in plain words, done
//! as a model would do them, one tool call an answer. No state: the request tells everything.

mod instruction;
mod story;

use std::{collections::HashSet, time::Duration};

use serde_json::json;

use super::{
    conversation::{Conversation, Done},
    reply::Reply,
    script::Tool,
};
use instruction::Instruction;
use story::{Halt, Story, Told, brief};

/// Sample instructions, for a person who wants to try it.
pub const EXAMPLES: &[&str] = &[
    "Change the heading to “Made slowly, used daily”",
    "Make the accent colour teal",
    "Add a page called Workshops",
    "Add a journal post about the new kiln",
    "Add a footer note saying Closed in August",
    "Break the page on purpose",
    "Repair it",
    "Think slowly for 20 seconds",
    "Use a tool that fails",
    "Run `ls src/pages`",
    "Remember that our dog is called Rex",
    "What is our dog called?",
];

/// The next answer in a conversation.
pub(super) fn decide(conversation: &Conversation) -> Reply {
    if let Some(image) = conversation.images.last() {
        return label(image, conversation.takes_structure);
    }
    let instruction = Instruction::parse(conversation.instruction());
    if let Instruction::ThinkSlowly { time } = instruction {
        return think(time);
    }
    let cwd = conversation.cwd.as_deref().unwrap_or_default();
    let mut story = Story::new(&conversation.done, cwd, conversation.is_plan);
    match tell(&mut story, instruction, conversation) {
        Ok(closing) => Reply::text(story.close(closing)),
        Err(Halt::Say(why)) => Reply::text(why),
        Err(Halt::Call(_)) if !conversation.has_tools => Reply::text(unknown()),
        Err(Halt::Call(reply)) => reply,
    }
}

fn tell(story: &mut Story<'_>, instruction: Instruction, of: &Conversation) -> Told<String> {
    match instruction {
        Instruction::ChangeHeading { page, text } => change_heading(story, page, &text),
        Instruction::ChangeAccent { colour } => change_accent(story, &colour),
        Instruction::AddPage { title } => add_page(story, &title),
        Instruction::AddPost { title } => add_post(story, &title, of.today.as_deref()),
        Instruction::AddFooterNote { text } => add_footer_note(story, &text),
        Instruction::BreakPage { page } => break_page(story, page),
        Instruction::RepairPage { page } => repair_page(story, page),
        Instruction::FailingTool => failing_tool(story),
        Instruction::Run { command } => run(story, &command),
        Instruction::Remember { fact } => Ok(format!("Noted: {fact}.")),
        Instruction::Recall => Ok(recall(of)),
        Instruction::Help => Ok(help()),
        Instruction::ThinkSlowly { .. } | Instruction::Unknown => Ok(unknown()),
    }
}

/// What is said of an image: nobody looks at it, so it follows from the file alone. Fit for everybody,
/// so that whoever tries it sees what is done with a label.
fn label(image: &str, takes_structure: bool) -> Reply {
    let name = image.get(..12).unwrap_or_default();
    let rating = "SAFE";
    let description = format!("An image that nobody looked at, since this is a rehearsal: {name}.");
    if takes_structure {
        let input = json!({
            "description": description, "nsfw_rating": rating, "tags": ["rehearsal", name],
        });
        let name = "StructuredOutput".to_owned();
        return Reply {
            calls: vec![Tool { name, input }],
            ..Reply::default()
        };
    }
    Reply::text(format!(
        "DESCRIPTION: {description}\nNSFW: {rating}\nTAGS: rehearsal, {name}"
    ))
}

fn help() -> String {
    let examples: Vec<String> = EXAMPLES
        .iter()
        .map(|example| format!("- {example}"))
        .collect();
    format!(
        "I understand instructions like these:\n\n{}",
        examples.join("\n")
    )
}

fn unknown() -> String {
    format!(
        "This is a rehearsal: there is no model behind it, so I only follow a few plain \
         instructions, and I did not understand this one. Nothing was changed.\n\n{}",
        help()
    )
}

fn think(time: Duration) -> Reply {
    let seconds = time.as_secs();
    let counted: Vec<String> = (1..=seconds).map(|second| format!("{second} …")).collect();
    Reply {
        text: format!(
            "Let me think. {} That took {seconds} seconds.",
            counted.join(" ")
        ),
        over: Some(time),
        ..Reply::default()
    }
}

/// A page's path and text. Looks where Astro and plain sites keep it, then everywhere.
fn page(story: &mut Story<'_>, name: Option<&str>) -> Told<(String, String)> {
    let name = name.map_or_else(|| "index".to_owned(), slug);
    let first = format!("src/pages/{name}.astro");
    if let Some(text) = story.read(&first)? {
        return Ok((first, text));
    }
    story.say(format!(
        "There is no `{first}`. I'll look where the pages are."
    ));
    let found = story.glob("**/*.{astro,html}")?;
    let places = [
        format!("src/pages/{name}/index.astro"),
        format!("{name}.html"),
        format!("public/{name}.html"),
        format!("src/{name}.html"),
    ];
    for path in places.iter().filter(|place| found.contains(place)) {
        if let Some(text) = story.read(path)? {
            return Ok((path.clone(), text));
        }
    }
    let wanted = if name == "index" {
        "the home page".to_owned()
    } else {
        format!("a page “{name}”")
    };
    Err(Halt::Say(format!(
        "I looked for {wanted} but this site has none that I can find."
    )))
}

fn change_heading(story: &mut Story<'_>, name: Option<String>, text: &str) -> Told<String> {
    story.say("I'll look at the page first.");
    let (page_path, page_text) = page(story, name.as_deref())?;
    let done = format!("The heading now reads “{text}”.");
    if let Some(heading) = heading_of(&page_text) {
        return set_text(story, &page_path, &page_text, heading, text, done);
    }
    story.say("The heading is in another file. I'll search for it.");
    let mut files = story.grep("<h1", "*.{astro,html,jsx,tsx,vue,svelte,md,mdx}")?;
    // A part that the page names comes before one that it doesn't; never another page.
    files.retain(|path| !path.starts_with("src/pages/"));
    files.sort_by_key(|path| !page_text.contains(stem(path)));
    for path in files.iter().take(3) {
        let Some(content) = story.read(path)? else {
            continue;
        };
        let Some((start, end)) = heading_of(&content) else {
            continue;
        };
        // `<h1>{title}</h1>`: the page says what it is.
        let property = content[start..end]
            .trim()
            .strip_prefix('{')
            .and_then(|rest| {
                let name = rest.strip_suffix('}')?.trim().rsplit('.').next()?;
                name.chars().all(char::is_alphanumeric).then_some(name)
            });
        if let Some(value) = property.and_then(|name| attribute_of(&page_text, name)) {
            return set_text(story, &page_path, &page_text, value, text, done);
        }
        return set_text(story, path, &content, (start, end), text, done);
    }
    Err(Halt::Say(format!(
        "I looked in `{page_path}` and the parts of it, but found no heading."
    )))
}

fn set_text(
    story: &mut Story<'_>,
    path: &str,
    content: &str,
    (start, end): (usize, usize),
    text: &str,
    done: String,
) -> Told<String> {
    if content[start..end].trim() == escape(text) {
        return Err(Halt::Say(format!(
            "It reads “{text}” already, so there is nothing to change."
        )));
    }
    // With the tag around it, which makes a short text unique.
    let from = content[..start].rfind('<').unwrap_or(start);
    let new = format!("{}{}", &content[from..start], escape(text));
    story.say(format!("I'll change it in `{path}`."));
    story.edit(path, content, (from, end), &new)?;
    Ok(done)
}

/// Where the text of the first `<h1>` is.
fn heading_of(content: &str) -> Option<(usize, usize)> {
    let mut at = 0;
    loop {
        at += content[at..].find("<h1")? + "<h1".len();
        if !content[at..].starts_with(|c: char| c == '>' || c.is_whitespace()) {
            continue;
        }
        let start = at + end_of_tag(&content[at..])?;
        return Some((start, start + content[start..].find("</h1>")?));
    }
}

/// The offset after the `>` that ends a tag, not counting those in quotes and braces.
fn end_of_tag(rest: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0_i32, None);
    for (at, c) in rest.char_indices() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'' | '`') => quote = Some(c),
            (None, '{') => depth += 1,
            (None, '}') => depth -= 1,
            (None, '>') if depth <= 0 => return Some(at + 1),
            (None, _) => {}
        }
    }
    None
}

/// Where the value of `name="…"` is.
fn attribute_of(content: &str, name: &str) -> Option<(usize, usize)> {
    let start = content.find(&format!(" {name}=\""))? + name.len() + 3;
    Some((start, start + content[start..].find('"')?))
}

/// Text as it stands in a template: no markup, no expressions.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('{', "&#123;")
        .replace('}', "&#125;")
}

/// Colours by name: one that can be read on a light ground, one on a dark.
const COLOURS: [(&str, &str, &str); 18] = [
    ("teal", "#0f766e", "#5eead4"),
    ("turquoise", "#0e7490", "#67e8f9"),
    ("navy", "#1e3a8a", "#a5b4fc"),
    ("blue", "#1d4ed8", "#93c5fd"),
    ("forest", "#14532d", "#86efac"),
    ("green", "#15803d", "#86efac"),
    ("terracotta", "#a8452c", "#f0a58e"),
    ("red", "#b91c1c", "#fca5a5"),
    ("orange", "#c2410c", "#fdba74"),
    ("yellow", "#92610a", "#fcd34d"),
    ("gold", "#92610a", "#fcd34d"),
    ("purple", "#7e22ce", "#d8b4fe"),
    ("violet", "#6d28d9", "#c4b5fd"),
    ("pink", "#be185d", "#f9a8d4"),
    ("brown", "#78350f", "#fcd9b6"),
    ("black", "#111827", "#e5e7eb"),
    ("grey", "#4b5563", "#d1d5db"),
    ("gray", "#4b5563", "#d1d5db"),
];

fn change_accent(story: &mut Story<'_>, colour: &str) -> Told<String> {
    let pair = if colour.starts_with('#') {
        Some((colour.to_owned(), lightened(colour)))
    } else {
        COLOURS
            .iter()
            .find(|(name, ..)| colour.contains(name))
            .map(|(_, light, dark)| ((*light).to_owned(), (*dark).to_owned()))
    };
    let Some((light, dark)) = pair else {
        return Err(Halt::Say(format!(
            "I don't know the colour “{colour}”. Give it as #rrggbb, or as a common name such as \
             teal, blue, green, red or purple."
        )));
    };
    story.say("I'll look at the site's colours first.");
    let mut found = None;
    let usual = "src/styles/global.css";
    if let Some(content) = story
        .read(usual)?
        .filter(|content| !accents(content).is_empty())
    {
        found = Some((usual.to_owned(), content));
    } else {
        story.say("The accent colour isn't in the usual place. I'll search for it.");
        for path in story
            .grep("--accent:", "*.{css,scss,astro,html}")?
            .iter()
            .take(3)
        {
            let content = story.read(path)?.unwrap_or_default();
            if !accents(&content).is_empty() {
                found = Some((path.clone(), content));
                break;
            }
        }
    }
    let Some((path, mut content)) = found else {
        return Err(Halt::Say(
            "I looked for an accent colour (`--accent:`) in the site's styles but found none."
                .to_owned(),
        ));
    };
    for index in 0..accents(&content).len().min(4) {
        let (start, end) = accents(&content)[index];
        let is_dark = content[..start].contains("prefers-color-scheme: dark");
        let new = format!("--accent: {}", if is_dark { &dark } else { &light });
        if content[start..end] != new {
            story.edit(&path, &content, (start, end), &new)?;
            content.replace_range(start..end, &new);
        }
    }
    Ok(format!("The accent colour is now {colour} (`{light}`)."))
}

/// Where `--accent: value` is declared.
fn accents(content: &str) -> Vec<(usize, usize)> {
    content
        .match_indices("--accent:")
        .filter_map(|(start, _)| Some((start, start + content[start..].find([';', '}', '\n'])?)))
        .collect()
}

/// A colour for dark ground: halfway to white.
fn lightened(hex: &str) -> String {
    let digits = hex.trim_start_matches('#');
    let channel = |index: usize| {
        let text = match digits.len() {
            3 => digits[index..=index].repeat(2),
            _ => digits[index * 2..index * 2 + 2].to_owned(),
        };
        u8::from_str_radix(&text, 16).unwrap_or_default() / 2 + 128
    };
    format!("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2))
}

fn add_page(story: &mut Story<'_>, title: &str) -> Told<String> {
    let slug = slug(title);
    if slug.is_empty() {
        return Err(Halt::Say(format!(
            "I can't make an address out of “{title}”."
        )));
    }
    story.say("I'll see how the other pages are made.");
    let pages = story.glob("src/pages/**/*.astro")?;
    let taken = [
        format!("src/pages/{slug}.astro"),
        format!("src/pages/{slug}/index.astro"),
    ];
    if let Some(path) = taken.iter().find(|path| pages.contains(path)) {
        return Err(Halt::Say(format!(
            "There is a page at `/{slug}` already (`{path}`)."
        )));
    }
    // One beside the new page, so that its imports fit; rather not the home page or a pattern.
    let model = pages
        .iter()
        .filter(|path| path.matches('/').count() == 2 && !path.contains('['))
        .min_by_key(|path| match stem(path) {
            "about" => 0,
            "404" => 2,
            "index" => 3,
            _ => 1,
        });
    let Some(model) = model else {
        return add_plain_page(story, title, &slug);
    };
    let model = story.read(model)?.unwrap_or_default();
    story.say(format!("I'll write the new page at `/{slug}`."));
    story.write(&taken[0], &astro_page(title, &model))?;
    Ok(format!(
        "There is a new page “{title}” at `/{slug}`. It is not in the menu yet, and its text is \
         only a beginning."
    ))
}

/// A page that looks like `model`: the same layout and the classes that frame its content.
fn astro_page(title: &str, model: &str) -> String {
    let title = escape(title);
    let has = |text: &str| model.contains(text);
    let import = model.lines().find(|line| {
        line.trim_start().starts_with("import ")
            && line.contains(".astro")
            && (line.contains("/layouts/") || line.contains("Layout"))
    });
    let lead = if has("class=\"lead\"") {
        "<p class=\"lead\">"
    } else {
        "<p>"
    };
    let mut body =
        format!("<h1>{title}</h1>\n{lead}This page is new. Tell me what it should say.</p>\n");
    let mut wrap = |open: &str, close: &str| {
        let inner: String = body.lines().map(|line| format!("  {line}\n")).collect();
        body = format!("{open}\n{inner}{close}\n");
    };
    if has("<header class=\"page-head\">") {
        wrap("<header class=\"page-head\">", "</header>");
    }
    if has("<div class=\"wrap\">") {
        wrap("<div class=\"wrap\">", "</div>");
    }
    if has("<main>") {
        wrap("<main>", "</main>");
    }
    let layout = import.and_then(|line| {
        Some((
            line,
            line.trim_start()
                .strip_prefix("import ")?
                .split(' ')
                .next()?,
        ))
    });
    match layout {
        Some((line, name)) => {
            wrap(
                &format!("<{name} title=\"{title}\">"),
                &format!("</{name}>"),
            );
            format!("---\n{}\n---\n\n{body}", line.trim())
        }
        None => {
            wrap("<body>", "</body>");
            document(&title, "", &body)
        }
    }
}

fn add_plain_page(story: &mut Story<'_>, title: &str, slug: &str) -> Told<String> {
    let (home, text) = page(story, None)?;
    let folder = home.strip_suffix("index.html").unwrap_or_default();
    let path = format!("{folder}{slug}.html");
    let links: String = text
        .lines()
        .filter(|line| line.contains("rel=\"stylesheet\""))
        .map(|line| format!("    {}\n", line.trim()))
        .collect();
    let title_text = escape(title);
    let body = format!("<body>\n  <h1>{title_text}</h1>\n  <p>This page is new.</p>\n</body>\n");
    story.write(&path, &document(&title_text, &links, &body))?;
    Ok(format!(
        "There is a new page “{title}” in `{path}`. No other page links to it yet."
    ))
}

fn document(title: &str, head: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n  <head>\n    <meta charset=\"utf-8\" />\n    \
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n    \
         <title>{title}</title>\n{head}  </head>\n{body}</html>\n"
    )
}

fn add_post(story: &mut Story<'_>, title: &str, today: Option<&str>) -> Told<String> {
    story.say("I'll look at the entries that are there.");
    let entries = story.glob("src/content/**/*.{md,mdx}")?;
    let rank = |path: &String| {
        !["journal", "blog", "post"]
            .iter()
            .any(|dir| path.contains(dir))
    };
    let Some(model_path) = entries.iter().min_by_key(|path| rank(path)) else {
        return Err(Halt::Say(
            "I looked in `src/content` for a journal or blog, but this site has none.".to_owned(),
        ));
    };
    let folder = model_path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let path = format!("{folder}/{}.md", slug(title));
    if entries.contains(&path) {
        return Err(Halt::Say(format!("There is an entry `{path}` already.")));
    }
    let model = story.read(model_path)?.unwrap_or_default();
    story.say("I'll write a new one in the same form.");
    story.write(&path, &entry(title, today, &model))?;
    Ok(format!(
        "There is a new entry “{title}” in `{path}`. Its text is only a beginning."
    ))
}

/// An entry with the fields of `model`, so that it fits the collection's schema.
fn entry(title: &str, today: Option<&str>, model: &str) -> String {
    let fields = model
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---"))
        .map_or("title:", |(fields, _)| fields);
    let quoted = |text: &str| json!(text).to_string();
    let lines: String = fields
        .lines()
        .map(|line| {
            let (key, _) = line.split_once(':').unwrap_or((line, ""));
            match (key, today) {
                ("title", _) => format!("{key}: {}\n", quoted(title)),
                ("summary" | "description" | "excerpt", _) => {
                    format!("{key}: {}\n", quoted(&format!("{title}, in short.")))
                }
                ("date" | "pubDate" | "publishDate" | "published", Some(today)) => {
                    format!("{key}: {today}\n")
                }
                _ => format!("{line}\n"),
            }
        })
        .collect();
    format!("---\n{lines}---\n\nThis entry is new. Tell me what it should say about {title}.\n")
}

fn add_footer_note(story: &mut Story<'_>, text: &str) -> Told<String> {
    story.say("I'll look at the footer first.");
    let usual = "src/components/Footer.astro";
    let mut found = story
        .read(usual)?
        .map(|content| (usual.to_owned(), content));
    if found
        .as_ref()
        .is_none_or(|(_, content)| !content.contains("</footer>"))
    {
        found = None;
        story.say("I'll search for it.");
        for path in story.grep("</footer>", "*.{astro,html}")?.iter().take(3) {
            if let Some(content) = story.read(path)?.filter(|text| text.contains("</footer>")) {
                found = Some((path.clone(), content));
                break;
            }
        }
    }
    let Some((path, content)) = found else {
        return Err(Halt::Say(
            "I looked for a footer but this site has none.".to_owned(),
        ));
    };
    // Below the small print where there is some, as its own line of it.
    let small = content.find("<p class=\"small\">").and_then(|at| {
        Some((
            at,
            at + content[at..].find("</p>")? + "</p>".len(),
            "<p class=\"small\">",
        ))
    });
    let end = content.find("</footer>").unwrap_or_default();
    let (start, end, tag) = small.unwrap_or((end, end + "</footer>".len(), "<p>"));
    let line_start = content[..start]
        .rfind('\n')
        .map_or(0, |newline| newline + 1);
    let indent = &content[line_start..start];
    let indent = if indent.trim().is_empty() { indent } else { "" };
    let note = format!("{tag}{}</p>", escape(text));
    let old = &content[start..end];
    let new = if small.is_some() {
        format!("{old}\n{indent}{note}")
    } else {
        format!("  {note}\n{indent}{old}")
    };
    story.edit(&path, &content, (start, end), &new)?;
    Ok(format!("The footer now says “{text}” as well."))
}

const BROKEN: &str = "const brokenOnPurpose = ;\n";

fn break_page(story: &mut Story<'_>, name: Option<String>) -> Told<String> {
    story.say("I'll put a syntax error into the page, as you asked.");
    let (path, content) = page(story, name.as_deref())?;
    if !path.ends_with(".astro") {
        return Err(Halt::Say(format!(
            "`{path}` is plain HTML, where browsers forgive everything: I can't break it."
        )));
    }
    if content.contains(BROKEN) {
        return Err(Halt::Say(
            "That page is broken already. Say “repair it” to undo it.".to_owned(),
        ));
    }
    let first = content
        .find('\n')
        .map_or(content.len(), |newline| newline + 1);
    let line = &content[..first];
    let new = if line.trim_end() == "---" {
        format!("{line}{BROKEN}")
    } else {
        format!("---\n{BROKEN}---\n{line}")
    };
    // Two lines, because `---` alone stands there twice.
    let end = content[first..]
        .find('\n')
        .map_or(content.len(), |newline| first + newline + 1);
    story.edit(
        &path,
        &content,
        (0, end),
        &format!("{new}{}", &content[first..end]),
    )?;
    Ok(format!(
        "`{path}` is broken now, on purpose. Say “repair it” to undo it."
    ))
}

fn repair_page(story: &mut Story<'_>, name: Option<String>) -> Told<String> {
    story.say("I'll look for what is broken.");
    let (mut path, mut content) = page(story, name.as_deref())?;
    if !content.contains(BROKEN) {
        story.say("This page looks right. I'll search the others.");
        let Some(other) = story.grep(BROKEN.trim_end(), "*.astro")?.into_iter().next() else {
            return Err(Halt::Say(format!(
                "I looked at `{path}` and the other pages, and found nothing that I had broken."
            )));
        };
        content = story.read(&other)?.unwrap_or_default();
        path = other;
    }
    let Some(start) = content.find(BROKEN) else {
        return Err(Halt::Say(format!("I could not read `{path}`.")));
    };
    story.edit(&path, &content, (start, start + BROKEN.len()), "")?;
    Ok(format!("`{path}` is repaired."))
}

fn failing_tool(story: &mut Story<'_>) -> Told<String> {
    story.say("I'll read a file that isn't there, as you asked.");
    let path = story.absolute("no-such-file-here.txt");
    Ok(match story.call("Read", json!({"file_path": path}))? {
        Ok(_) => "To my surprise there is such a file, so nothing failed.".to_owned(),
        Err(why) => {
            format!(
                "The tool failed, as it should: “{}” Nothing was changed.",
                brief(&why)
            )
        }
    })
}

fn run(story: &mut Story<'_>, command: &str) -> Told<String> {
    story.say(format!("I'll run `{command}`."));
    Ok(match story.bash(command)? {
        Ok(output) if output.trim().is_empty() => format!("`{command}` ran and printed nothing."),
        Ok(output) => format!("`{command}` printed:\n\n```\n{}\n```", brief(&output)),
        Err(why) => format!("`{command}` did not work:\n\n```\n{}\n```", brief(&why)),
    })
}

/// Answers a question with the fact, told earlier in this conversation, that shares most words
/// with it; of equal ones the latest.
fn recall(conversation: &Conversation) -> String {
    const ASK: &str = "remember that ";
    let earlier = conversation.said.iter().rev().skip(1).rev();
    let facts = conversation.system.iter().chain(earlier).flat_map(|text| {
        let lower = text.to_ascii_lowercase();
        let starts: Vec<usize> = lower
            .match_indices(ASK)
            .map(|(at, _)| at + ASK.len())
            .collect();
        starts.into_iter().map(move |start| {
            let rest = &text[start..];
            rest[..rest.find(['\n', '.', '!', '"', '”']).unwrap_or(rest.len())].trim()
        })
    });
    let asked = words(conversation.instruction());
    let best = facts
        .map(|fact| (words(fact).intersection(&asked).count(), fact))
        .filter(|(shared, _)| *shared > 0)
        .max_by_key(|(shared, _)| *shared);
    match best {
        Some((_, fact)) => format!("You told me: {fact}."),
        None => "You have not told me that in this conversation. (This is a rehearsal with no \
                 model behind it: I only know what you asked me to remember.)"
            .to_owned(),
    }
}

/// The words that carry meaning.
fn words(text: &str) -> HashSet<String> {
    const EMPTY: [&str; 24] = [
        "what", "who", "when", "where", "which", "the", "our", "your", "you", "are", "was", "does",
        "that", "this", "for", "and", "with", "has", "have", "remember", "did", "tell", "told",
        "how",
    ];
    text.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| word.len() > 2 && !EMPTY.contains(word))
        .map(ToOwned::to_owned)
        .collect()
}

/// A name as part of an address: `Our kiln` becomes `our-kiln`.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for c in name.to_lowercase().chars() {
        match c {
            'a'..='z' | '0'..='9' => slug.push(c),
            'ä' | 'á' | 'à' | 'â' | 'å' => slug.push('a'),
            'é' | 'è' | 'ê' | 'ë' => slug.push('e'),
            'ö' | 'ó' | 'ô' | 'ø' => slug.push('o'),
            'ü' | 'ú' | 'û' => slug.push('u'),
            '\'' | '’' => {}
            _ if !slug.is_empty() && !slug.ends_with('-') => slug.push('-'),
            _ => {}
        }
    }
    slug.truncate(60);
    slug.trim_end_matches('-').to_owned()
}

/// A file's name without folder and ending.
fn stem(path: &str) -> &str {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    name.split_once('.').map_or(name, |(stem, _)| stem)
}

#[cfg(test)]
mod tests;
