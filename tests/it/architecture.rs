//! The walls of `ARCHITECTURE.md`: which room may use which, and where an outside crate belongs.
//! It reads `src/`; the tests there are free.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Rooms that everybody may use. They use each other and no other room.
const COMMON: [&str; 8] = [
    "address", "identity", "domain", "lease", "outbound", "owner", "task", "text",
];

/// Who may use whom, beside the common rooms.
const ARROWS: &[(&str, &[&str])] = &[
    // The composition root knows every room; only the command line knows it.
    (
        "app",
        &[
            "agent",
            "alt_text",
            "api",
            "client", // how a request is signed
            "config",
            "control_plane",
            "ecs",
            "egress",
            "figures",
            "gateway",
            "hub",
            "images",
            "label",
            "lifecycle",
            "preview",
            "process",
            "rehearsal",
            "replicate",
            "repository",
            "service",
            "supervisor",
            "telemetry",
            "turn", // outcomes, for the control plane
            "usage",
            "workspace",
        ],
    ),
    (
        "cli",
        &[
            "alt_text",
            "api",
            "app",
            "config",
            "hub",
            "label",
            "process", // hides its own environment, first of all
            "replicate",
            "telemetry",
            "usage",
        ],
    ),
    (
        "alt_text",
        &[
            "label",
            "picture",    // how large an image may be
            "repository", // a site's files
            "service",    // its errors become ours
            "supervisor", // the turn that writes
            "usage",
            "workspace", // small files
        ],
    ),
    (
        "api",
        &[
            "alt_text",
            "config", // `Secret`
            "ecs",    // `/health` names the task
            "figures",
            "images",
            "label",
            "lifecycle",  // requests hold the container awake
            "picture",    // its errors become codes
            "process",    // `/ready` shows the confinement
            "rehearsal",  // `/health` names the examples
            "replicate",  // its errors become codes
            "repository", // its errors become codes
            "service",
            "supervisor",
            "turn", // a turn's events become a stream
            "usage",
        ],
    ),
    (
        "supervisor",
        &[
            "agent",
            "gateway",
            "lifecycle",
            "preview",
            "process",
            "repository",
            "service", // one-shot runs in a thread's worktree
            "turn",
            "workspace",
        ],
    ),
    (
        "service",
        &[
            "agent", // how a CLI is started
            "gateway", "process", "usage", // its run's budget
        ],
    ),
    (
        "label",
        &[
            "gateway", // what goes up for an image
            "picture",
            "service",   // its runs
            "workspace", // small files
        ],
    ),
    (
        "hub",
        &[
            "config",    // `Secret`
            "telemetry", // a server's words in a sentence
        ],
    ),
    ("picture", &[]),
    ("replicate", &["config"]), // `Secret`
    (
        "images",
        &[
            "config", // `Secret`
            "label",  // their alt texts
            "picture",
            "replicate",
            "repository", // where a site keeps its images
            "supervisor", // their turns
            "turn",
            "usage", // whoever has used up a budget makes none
        ],
    ),
    (
        "turn",
        &[
            "agent",
            "gateway",
            "process",
            "repository",
            "usage", // what a turn spent, and may
            "workspace",
        ],
    ),
    (
        "agent",
        &[
            "egress", // its way out
            "gateway", "process", "usage", // its run's budget
        ],
    ),
    ("preview", &["egress", "process"]),
    ("egress", &[]),
    (
        "gateway",
        &[
            "config", // `Secret`
            "usage",
            "workspace", // small files
        ],
    ),
    ("usage", &[]),
    ("figures", &[]),
    ("lifecycle", &[]),
    (
        "workspace",
        &[
            "egress",     // the installer's way out
            "process",    // the installer
            "repository", // the template's files
        ],
    ),
    ("repository", &[]),
    ("process", &[]),
    ("rehearsal", &[]),
    // A library for others.
    ("client", &[]),
    ("control_plane", &["client"]), // how a request is signed
    ("ecs", &[]),
    ("config", &[]),
    ("telemetry", &["config"]), // `Secret`, which it masks
];

/// Outside crates that have a room.
const CRATES: &[(&str, &[&str])] = &[
    ("axum", &["api", "gateway", "rehearsal"]),
    ("clap", &["cli"]),
    ("flate2", &["repository", "telemetry"]),
    ("git2", &["repository"]),
    ("glob", &["cli"]),
    ("governor", &["api"]),
    ("image", &["picture"]),
    ("landlock", &["process"]),
    ("metrics_exporter_prometheus", &["figures"]),
    ("notify", &["preview"]),
    ("pulldown_cmark", &["alt_text"]),
    ("zstd", &["workspace"]),
    ("ratatui", &["cli"]),
    (
        "nix",
        &[
            "process",
            "config",     // the uid in the runtime folder's name, and its owner
            "hub",        // opens ordinary files, and nothing else that lies there
            "lease",      // a clock that runs while the machine sleeps
            "preview",    // files below a folder whatever links say; sockets that notice death
            "repository", // locks and links of the git directory
            "telemetry",  // opens ordinary files, and nothing else that lies there
            "workspace",  // the same
        ],
    ),
    (
        "reqwest",
        &[
            "client",
            "control_plane",
            "ecs",
            "gateway",
            "hub",
            "outbound",
            "replicate",
            "repository", // git's transport over HTTPS
        ],
    ),
    ("tokio::process", &["process"]),
    ("std::process::Command", &["process"]),
];

/// All sources of each room.
fn rooms() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut rooms: BTreeMap<String, String> = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !path.ends_with("tests.rs")
            {
                let below = path.strip_prefix(&root).unwrap();
                let first = below.iter().next().unwrap().to_str().unwrap();
                let room = first.strip_suffix(".rs").unwrap_or(first).to_owned();
                rooms.entry(room).or_default().push_str(&code(&path));
            }
        }
    }
    rooms.remove("main");
    rooms.remove("lib");
    rooms
}

/// A file without its comments and tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let tests = text.match_indices("#[cfg(test)]\n").find(|(at, mark)| {
        let next = text[at + mark.len()..].lines().next().unwrap_or_default();
        next.ends_with("mod tests {")
    });
    let text = tests.map_or(text.as_str(), |(at, _)| &text[..at]);
    let lines = text.lines().map(|line| {
        let is_comment = line.trim_start().starts_with("//");
        if is_comment { "" } else { line }
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// The names directly below `crate::`, single or in braces.
fn used(code: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for (at, start) in code.match_indices("crate::") {
        let rest = &code[at + start.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.insert(first_word(rest));
            continue;
        };
        let mut depth = 0;
        let mut begin = 0;
        for (end, sign) in list.char_indices() {
            match sign {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    names.insert(first_word(list[begin..end].trim_start()));
                    begin = end + 1;
                    if sign == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
    }
    names
}

fn first_word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// Is the crate or path named as the beginning of one?
fn names_crate(code: &str, name: &str) -> bool {
    let path = format!("{name}::");
    code.match_indices(&path).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':'))
    }) || name.contains("::") && code.contains(&format!("use {name}"))
}

#[test]
fn rooms_use_only_what_the_arrows_allow() {
    let rooms = rooms();
    let mut wrong = Vec::new();
    for (room, code) in &rooms {
        let is_common = COMMON.contains(&room.as_str());
        let allowed = ARROWS.iter().find(|(name, _)| name == room);
        if allowed.is_none() && !is_common {
            wrong.push(format!(
                "{room} is a new room: say in ARROWS what it may use"
            ));
        }
        for other in used(code)
            .into_iter()
            .filter(|name| rooms.contains_key(*name))
        {
            let is_fine = other == room
                || COMMON.contains(&other)
                || allowed.is_some_and(|(_, others)| others.contains(&other));
            if !is_fine {
                wrong.push(format!("{room} uses {other}"));
            }
        }
    }
    for (room, others) in ARROWS {
        let code = rooms
            .get(*room)
            .unwrap_or_else(|| panic!("there is no room {room}"));
        let used = used(code);
        let unused = others.iter().filter(|other| !used.contains(**other));
        wrong.extend(unused.map(|other| format!("{room} no longer uses {other}: close the door")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn outside_crates_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (room, code) in &rooms() {
        for (name, homes) in CRATES {
            if names_crate(code, name) && !homes.contains(&room.as_str()) {
                wrong.push(format!("{room} uses {name}, which belongs to {homes:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_domain_is_plain() {
    let rooms = rooms();
    for plain in ["domain", "identity"] {
        let code = &rooms[plain];
        for word in [
            "async ",
            "await",
            "tokio",
            "std::fs",
            "std::net",
            "Instant::now",
            "Timestamp::now",
            "tracing",
        ] {
            assert!(!code.contains(word), "{plain} has {word:?}");
        }
    }
}
