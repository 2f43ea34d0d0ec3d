//! Whole conversations, with a small stand-in for the CLI that has its files in a map.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

type Files = BTreeMap<String, String>;

const CWD: &str = "/sites/pots";

fn files(list: &[(&str, &str)]) -> Files {
    list.iter()
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect()
}

/// A small Astro site.
fn site() -> Files {
    files(&[
        (
            "src/pages/index.astro",
            "---\nimport Base from '../layouts/Base.astro';\n---\n<Base>\n  <h1>Pots</h1>\n</Base>\n",
        ),
        (
            "src/pages/about.astro",
            "---\nimport Base from '../layouts/Base.astro';\n---\n\n<Base title=\"About\">\n  \
             <div class=\"wrap\">\n    <h1>Us</h1>\n    <p class=\"lead\">x</p>\n  </div>\n</Base>\n",
        ),
        (
            "src/styles/global.css",
            ":root {\n  --accent: #2340a0;\n  --on-accent: #ffffff;\n}\n\
             @media (prefers-color-scheme: dark) {\n  :root {\n    --accent: #a9bcff;\n  }\n}\n\
             a { color: var(--accent); }\n",
        ),
        (
            "src/components/Footer.astro",
            "<footer>\n  <p class=\"small\">© Pots</p>\n</footer>\n",
        ),
        (
            "src/content/journal/first.md",
            "---\ntitle: First\nsummary: One\ndate: 2026-01-02\nauthor: Ines\n---\n\nText.\n",
        ),
    ])
}

/// The conversation so far, as the CLI would send it.
struct Scene {
    files: Files,
    messages: Vec<Value>,
    tools: Value,
    used: Vec<String>,
}

impl Scene {
    fn new(files: Files) -> Self {
        let names = ["Read", "Edit", "Write", "Bash", "Glob", "Grep"];
        let tools = names.iter().map(|name| json!({"name": name})).collect();
        let mut scene = Self {
            files,
            messages: Vec::new(),
            tools,
            used: Vec::new(),
        };
        scene.system(&format!(
            "Primary working directory: {CWD}\nToday's date is 2026-11-21."
        ));
        scene
    }

    fn system(&mut self, text: &str) {
        self.messages
            .push(json!({"role": "system", "content": text}));
    }

    /// Lets the brain act on an instruction to its end. Returns the closing words.
    fn ask(&mut self, instruction: &str) -> String {
        self.messages
            .push(json!({"role": "user", "content": instruction}));
        self.used.clear();
        for turn in 0..20 {
            let body = json!({"messages": self.messages, "tools": self.tools});
            let reply = decide(&Conversation::read(&body));
            let Some(call) = reply.calls.first() else {
                self.messages
                    .push(json!({"role": "assistant", "content": reply.text}));
                return reply.text;
            };
            if turn == 0 {
                assert!(
                    !reply.text.is_empty(),
                    "a sentence comes before the first tool"
                );
            }
            let result = self.perform(&call.name, &call.input);
            self.used.push(call.name.clone());
            let (text, is_error) = match result {
                Ok(text) => (text, false),
                Err(text) => (text, true),
            };
            self.messages.push(json!({"role": "assistant", "content": [
                {"type": "tool_use", "id": format!("t{turn}"), "name": call.name,
                 "input": call.input}]}));
            self.messages.push(json!({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": format!("t{turn}"), "content": text,
                 "is_error": is_error}]}));
        }
        panic!("{instruction}: no end after {:?}", self.used);
    }

    fn perform(&mut self, name: &str, input: &Value) -> Result<String, String> {
        let path = || {
            let path = input["file_path"].as_str().unwrap();
            path.strip_prefix(CWD)
                .unwrap()
                .trim_start_matches('/')
                .to_owned()
        };
        match name {
            "Read" => {
                let text = self.files.get(&path()).ok_or("File does not exist.")?;
                let lines = text.lines().enumerate();
                Ok(lines
                    .map(|(i, line)| format!("{:>6}→{line}\n", i + 1))
                    .collect())
            }
            "Edit" => {
                let old = input["old_string"].as_str().unwrap();
                let text = self.files.get_mut(&path()).ok_or("File does not exist.")?;
                match text.matches(old).count() {
                    1 => {
                        *text = text.replace(old, input["new_string"].as_str().unwrap());
                        Ok("updated".into())
                    }
                    n => Err(format!("found {n} matches")),
                }
            }
            "Write" => {
                let text = input["content"].as_str().unwrap().to_owned();
                match self.files.insert(path(), text) {
                    None => Ok("written".into()),
                    Some(_) => Err("File has not been read yet".into()),
                }
            }
            "Glob" => {
                let pattern = input["pattern"].as_str().unwrap();
                let (folder, _) = pattern.split_once("**").unwrap();
                let fits = |path: &&String| {
                    path.starts_with(folder)
                        && path
                            .rsplit_once('.')
                            .is_some_and(|(_, ending)| pattern.contains(ending))
                };
                let found = self
                    .files
                    .keys()
                    .filter(fits)
                    .map(|path| format!("{CWD}/{path}\n"));
                Ok(found.collect())
            }
            "Grep" => {
                let pattern = input["pattern"].as_str().unwrap();
                let found = self.files.iter().filter(|(_, text)| text.contains(pattern));
                Ok(format!(
                    "Found some files\n{}",
                    found
                        .map(|(path, _)| format!("{path}\n"))
                        .collect::<String>()
                ))
            }
            "Bash" => Ok(format!("ran {}", input["command"].as_str().unwrap())),
            other => panic!("no tool {other}"),
        }
    }
}

#[test]
fn edits_land_where_they_should() {
    for (instruction, path, expected, tools) in [
        (
            "Change the heading to A & {b}",
            "src/pages/index.astro",
            "<h1>A &amp; &#123;b&#125;</h1>",
            "Read Edit",
        ),
        (
            "change the heading on the about page to We",
            "src/pages/about.astro",
            "<h1>We</h1>",
            "Read Edit",
        ),
        (
            "make the accent colour teal",
            "src/styles/global.css",
            "--accent: #0f766e;\n  --on-accent: #ffffff;",
            "Read Edit Edit",
        ),
        (
            "make the accent colour #102030",
            "src/styles/global.css",
            ":root {\n    --accent: #889098;",
            "Read Edit Edit",
        ),
        (
            "add a page called Our Workshops",
            "src/pages/our-workshops.astro",
            "---\nimport Base from '../layouts/Base.astro';\n---\n\n<Base title=\"Our Workshops\">\n  \
          <div class=\"wrap\">\n    <h1>Our Workshops</h1>\n    <p class=\"lead\">",
            "Glob Read Write",
        ),
        (
            "add a journal post about the new kiln",
            "src/content/journal/the-new-kiln.md",
            "---\ntitle: \"The new kiln\"\nsummary: \"The new kiln, in short.\"\ndate: 2026-11-21\n\
          author: Ines\n---\n",
            "Glob Read Write",
        ),
        (
            "add a footer note saying Closed in August",
            "src/components/Footer.astro",
            "© Pots</p>\n  <p class=\"small\">Closed in August</p>\n</footer>",
            "Read Edit",
        ),
        (
            "break the page on purpose",
            "src/pages/index.astro",
            "---\nconst brokenOnPurpose = ;\nimport Base",
            "Read Edit",
        ),
    ] {
        let mut scene = Scene::new(site());
        let closing = scene.ask(instruction);
        let text = scene
            .files
            .get(path)
            .map_or("(no such file)", String::as_str);
        assert!(text.contains(expected), "{instruction}: {closing}\n{text}");
        assert_eq!(scene.used.join(" "), tools, "{instruction}");
        let changed = scene
            .files
            .iter()
            .filter(|(path, text)| site().get(*path) != Some(text));
        assert_eq!(changed.count(), 1, "{instruction}");
    }
}

#[test]
fn what_cannot_be_done_is_said_and_nothing_changes() {
    for (instruction, says) in [
        ("change the heading to Pots", "already"),
        ("make the accent colour blurple", "don't know the colour"),
        ("add a page called About", "already"),
        ("add a journal post called First", "already"),
        ("repair it", "nothing that I had broken"),
        ("break the news page", "none that I can find"),
        ("paint the town", "rehearsal"),
        ("use a tool that fails", "does not exist"),
        ("what can you do?", "Change the heading"),
        ("run `ls -la`", "ran ls -la"),
    ] {
        let mut scene = Scene::new(site());
        let closing = scene.ask(instruction);
        assert!(closing.contains(says), "{instruction}: {closing}");
        assert_eq!(scene.files, site(), "{instruction}");
    }
    let mut empty = Scene::new(Files::new());
    for instruction in EXAMPLES.iter().take(7) {
        assert!(!empty.ask(instruction).is_empty(), "{instruction}");
    }
    assert!(empty.files.is_empty(), "{:?}", empty.files);
}

#[test]
fn breaking_and_repairing_leaves_no_trace() {
    for text in [
        "---\nconst a = 1;\n---\n<h1>x</h1>\n",
        "<h1>x</h1>\n<p>y</p>\n",
    ] {
        let before = files(&[("src/pages/index.astro", text)]);
        let mut scene = Scene::new(before.clone());
        scene.ask("Break the page on purpose");
        assert_ne!(scene.files, before);
        assert!(scene.ask("break the page on purpose").contains("already"));
        scene.ask("repair it");
        assert_eq!(
            scene.files["src/pages/index.astro"].replace("---\n---\n", ""),
            text
        );
    }
}

#[test]
fn the_heading_is_found_where_it_is() {
    let index = "---\nimport Hero from '../components/Hero.astro';\n---\n";
    for (home, hero, path, expected) in [
        (
            "<Hero />\n",
            "<section>\n  <h1 class={a > b}>Old</h1>\n</section>\n",
            "src/components/Hero.astro",
            "<h1 class={a > b}>New</h1>",
        ),
        (
            "<Hero title=\"Old\" />\n",
            "<h1>{title}</h1>\n",
            "src/pages/index.astro",
            "<Hero title=\"New\" />",
        ),
        (
            "<Hero title=\"Old\" />\n",
            "<h1>{Astro.props.title}</h1>\n",
            "src/pages/index.astro",
            "<Hero title=\"New\" />",
        ),
        (
            "<Hero title={t} />\n",
            "<h1>{title}</h1>\n",
            "src/components/Hero.astro",
            "<h1>New</h1>",
        ),
    ] {
        let mut scene = Scene::new(files(&[
            ("src/components/Abc.astro", "<h1>Not me</h1>\n"),
            ("src/components/Hero.astro", hero),
            ("src/pages/about.astro", "<h1>Nor me</h1>\n"),
            ("src/pages/index.astro", &format!("{index}{home}")),
        ]));
        let closing = scene.ask("Change the heading to New");
        assert!(
            scene.files[path].contains(expected),
            "{closing}: {:?}",
            scene.files
        );
    }
}

#[test]
fn a_plain_site_is_served_too() {
    let html = "<!doctype html>\n<html>\n<head>\n<link rel=\"stylesheet\" href=\"/a.css\">\n\
                </head>\n<body>\n<h1>Old</h1>\n<footer></footer>\n</body>\n</html>\n";
    for home in ["index.html", "public/index.html"] {
        let mut scene = Scene::new(files(&[(home, html), ("a.css", "a{--accent:red}\n")]));
        scene.ask("Change the heading to New");
        assert!(scene.files[home].contains("<h1>New</h1>"));
        scene.ask("make the accent colour green");
        assert_eq!(scene.files["a.css"], "a{--accent: #15803d}\n");
        scene.ask("add a footer note saying Hi");
        assert!(scene.files[home].contains("<p>Hi</p>\n</footer>"));
        scene.ask("add a page called Shop");
        let page = &scene.files[&home.replace("index", "shop")];
        assert!(
            page.contains("<h1>Shop</h1>") && page.contains("/a.css"),
            "{page}"
        );
        assert!(
            scene
                .ask("break the page on purpose")
                .contains("can't break")
        );
    }
}

#[test]
fn a_repeated_text_is_still_edited_in_the_right_place() {
    let mut scene = Scene::new(files(&[(
        "src/pages/index.astro",
        "<h1>Hi</h1>\n<!-- <h1>Hi -->\n<p>x</p>\n<h1>Hi</h1>\n",
    )]));
    scene.ask("change the heading to Ho");
    assert!(scene.files["src/pages/index.astro"].starts_with("<h1>Ho</h1>\n<!-- <h1>Hi"));
}

#[test]
fn plan_mode_reads_and_describes() {
    for instruction in EXAMPLES.iter().take(6) {
        let mut scene = Scene::new(site());
        scene.system("Plan mode is active. The user does not want you to execute yet.");
        let closing = scene.ask(instruction);
        assert!(
            closing.starts_with("Here is what I would do"),
            "{instruction}: {closing}"
        );
        assert_eq!(scene.files, site());
        scene.system("## Exited Plan Mode\n\nYou have exited plan mode.");
        scene.ask(instruction);
        assert_ne!(scene.files, site(), "{instruction}");
    }
    let mut scene = Scene::new(site());
    scene.tools = json!([{"name": "Read"}, {"name": "Glob"}, {"name": "Grep"}]);
    assert!(
        scene
            .ask("change the heading to X")
            .contains("`src/pages/index.astro`")
    );
    assert_eq!(scene.files, site());
    scene.tools = json!([]);
    assert!(scene.ask("change the heading to X").contains("rehearsal"));
}

#[test]
fn facts_are_remembered_through_the_conversation() {
    let mut scene = Scene::new(site());
    assert!(scene.ask("What is our dog called?").contains("not told me"));
    scene.ask("Remember that our dog is called Rex.");
    scene.ask("Please remember that the shop opens at nine");
    scene.ask("change the heading to X");
    assert_eq!(
        scene.ask("What is our dog called?"),
        "You told me: our dog is called Rex."
    );
    assert_eq!(
        scene.ask("When does the shop open at?"),
        "You told me: the shop opens at nine."
    );
    assert!(scene.ask("Who was Napoleon?").contains("not told me"));

    let mut replayed = Scene::new(site());
    replayed
        .system("Earlier in this thread the user said: \"Remember that our dog is called Rex\"");
    assert!(replayed.ask("what is our dog called").contains("Rex"));
}

#[test]
fn thinking_takes_the_time_asked_for() {
    let body = json!({"messages": [{"role": "user", "content": "think slowly for 20 seconds"}]});
    let reply = decide(&Conversation::read(&body));
    assert_eq!(reply.over, Some(Duration::from_secs(20)));
    assert!(reply.text.split(' ').count() > 20);
}
