//! Does a dev server have this file in what it serves? Then it has something to say when the file
//! changes; of any other file it is rightly silent.
//!
//! A file is served if a page that was asked for uses it, directly or through others. Who uses whom
//! is read from the sources by names alone, so that aliases and globs count too: what is taken for
//! served and is not costs a restart of the server, never a wrong page.

use std::{
    collections::{BTreeSet, VecDeque},
    path::Path,
};

/// Sources that are read, and how much of each.
const MOST_FILES: usize = 2000;
const MOST_BYTES: u64 = 512 * 1024;

/// Looks into the site's sources. `visited` are paths of pages that were asked for. Blocking.
pub(crate) fn is_served(worktree: &Path, file: &str, visited: &BTreeSet<String>) -> bool {
    if is_content(file) {
        // Astro keeps all of a collection, whoever asks for it.
        return has_collections(worktree);
    }
    if !file.starts_with("src/") || extension(file).is_none_or(|kind| !is_module(kind)) {
        return false;
    }
    let sources = read_sources(worktree);
    let mut reached = BTreeSet::from([file]);
    let mut next = VecDeque::from([file]);
    while let Some(file) = next.pop_front() {
        if is_visited_page(file, visited) {
            return true;
        }
        if is_page(file) {
            // Who names it, links to it.
            continue;
        }
        for (user, text) in &sources {
            if !reached.contains(user.as_str()) && uses(text, file) {
                reached.insert(user);
                next.push_back(user);
            }
        }
    }
    false
}

/// An entry of a content collection, as its name goes.
pub(crate) fn is_content(file: &str) -> bool {
    const KINDS: [&str; 8] = [
        "md", "mdx", "markdown", "mdoc", "json", "yaml", "yml", "toml",
    ];
    file.starts_with("src/content/") && extension(file).is_some_and(|kind| KINDS.contains(&kind))
}

fn has_collections(worktree: &Path) -> bool {
    ["src/content.config", "src/content/config"]
        .iter()
        .flat_map(|name| ["ts", "mts", "js", "mjs"].map(|kind| format!("{name}.{kind}")))
        .any(|config| worktree.join(config).is_file())
}

fn extension(file: &str) -> Option<&str> {
    Some(file.rsplit('/').next()?.rsplit_once('.')?.1)
}

fn is_source(kind: &str) -> bool {
    matches!(
        kind,
        "astro"
            | "md"
            | "mdx"
            | "html"
            | "ts"
            | "tsx"
            | "mts"
            | "js"
            | "jsx"
            | "mjs"
            | "vue"
            | "svelte"
            | "css"
            | "scss"
            | "sass"
            | "less"
            | "styl"
    )
}

fn is_module(kind: &str) -> bool {
    is_source(kind)
        || matches!(
            kind,
            "json"
                | "yaml"
                | "yml"
                | "toml"
                | "svg"
                | "png"
                | "jpg"
                | "jpeg"
                | "webp"
                | "avif"
                | "gif"
        )
}

/// The address of a page's file, as segments: `None` for one that has a parameter.
fn segments_of(page: &str) -> Option<Vec<&str>> {
    let (page, kind) = page.strip_prefix("src/pages/")?.rsplit_once('.')?;
    if !is_source(kind) || page.split('/').any(|part| part.starts_with('_')) {
        return None;
    }
    let mut segments: Vec<&str> = page.split('/').collect();
    if segments.last() == Some(&"index") {
        segments.pop();
    }
    Some(segments)
}

/// Is it what an address leads to, and no part of others?
fn is_page(file: &str) -> bool {
    segments_of(file).is_some()
        && extension(file).is_some_and(|kind| matches!(kind, "astro" | "md" | "mdx" | "html"))
}

/// Was a page of this file asked for?
pub(crate) fn is_visited_page<'a>(
    file: &str,
    visited: impl IntoIterator<Item = &'a String>,
) -> bool {
    let Some(pattern) = segments_of(file) else {
        return false;
    };
    visited.into_iter().any(|path| {
        let path: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        matches(&pattern, &path)
    })
}

fn matches(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        ([rest, ..], _) if rest.starts_with("[...") => true,
        ([parameter, pattern @ ..], [_, path @ ..]) if parameter.contains('[') => {
            matches(pattern, path)
        }
        ([name, pattern @ ..], [part, path @ ..]) => name == part && matches(pattern, path),
        _ => false,
    }
}

/// Names a text, between quotes or brackets, this file?
fn uses(text: &str, file: &str) -> bool {
    let mut parts = file.rsplit('/');
    let (name, folder) = (
        parts.next().unwrap_or(file),
        parts.next().unwrap_or_default(),
    );
    let stem = name.split('.').next().unwrap_or(name);
    let names = |word: &str| {
        let word = word.split(['?', '#']).next().unwrap_or(word);
        let mut parts = word.rsplit('/');
        let (last, parent) = (parts.next().unwrap_or(word), parts.next());
        if last.contains('*') {
            let is_kind = last == "*" || extension(last).is_none_or(|kind| name.ends_with(kind));
            return is_kind && parent.is_none_or(|parent| parent == folder || parent == "**");
        }
        last == name
            || last.split('.').next() == Some(stem)
            || stem == "index" && (last == folder || parent == Some(folder))
    };
    text.split(['"', '\'', '`', '(', ')', '\n'])
        .filter(|word| word.contains(['/', '.']) && word.len() < 300 && !word.contains(' '))
        .any(names)
}

fn read_sources(worktree: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec!["src".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(worktree.join(&folder))
            .into_iter()
            .flatten()
            .flatten()
        {
            let (Ok(name), Ok(meta)) = (entry.file_name().into_string(), entry.metadata()) else {
                continue;
            };
            let path = format!("{folder}/{name}");
            if meta.is_dir() && name != "node_modules" {
                folders.push(path);
            } else if meta.is_file()
                && meta.len() <= MOST_BYTES
                && found.len() < MOST_FILES
                && !is_content(&path)
                && extension(&name).is_some_and(is_source)
                && let Ok(text) = std::fs::read_to_string(entry.path())
            {
                found.push((path, text));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_visited_page_uses_is_served() {
        let disk = tempfile::tempdir().unwrap();
        for (name, text) in [
            (
                "src/pages/index.astro",
                "import Base from '../layouts/Base.astro'\n<a href=\"/about\">",
            ),
            (
                "src/pages/about.astro",
                "import Team from '@/components/team'",
            ),
            (
                "src/pages/blog/[slug].astro",
                "const all = import.meta.glob('../../data/*.yaml')",
            ),
            (
                "src/layouts/Base.astro",
                "import '../styles/global.css';\nimport { site } from '../data/site'",
            ),
            (
                "src/components/team/index.ts",
                "export * from './Team.astro'",
            ),
            ("src/components/team/Team.astro", "<p>"),
            ("src/components/Unused.astro", "<p>"),
            (
                "src/styles/global.css",
                "@import \"./colours.css\";\n a { background: url(../assets/a.svg) }",
            ),
            ("src/styles/colours.css", ""),
            ("src/data/site.ts", ""),
            ("src/data/prices.yaml", ""),
            ("src/content/journal/one.md", ""),
            ("src/content.config.ts", ""),
        ] {
            let path = disk.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let served = |file: &str, visited: &[&str]| {
            let visited = visited.iter().map(|path| (*path).to_owned()).collect();
            is_served(disk.path(), file, &visited)
        };
        for file in [
            "src/pages/index.astro",
            "src/layouts/Base.astro",
            "src/styles/global.css",
            "src/styles/colours.css",
            "src/data/site.ts",
            "src/assets/a.svg",
        ] {
            assert!(served(file, &["/"]), "{file}");
            assert!(!served(file, &["/about"]), "{file}");
            assert!(!served(file, &[]), "{file}");
        }
        assert!(served("src/components/team/Team.astro", &["/about/"]));
        assert!(served("src/pages/about.astro", &["/about/"]));
        for file in ["src/pages/about.astro", "src/components/team/Team.astro"] {
            assert!(
                !served(file, &["/"]),
                "the first page only links to it: {file}"
            );
        }
        assert!(served("src/data/prices.yaml", &["/blog/one"]));
        assert!(!served("src/data/prices.yaml", &["/blog"]));
        for file in [
            "src/components/Unused.astro",
            "README.md",
            "src/notes.txt",
            "public/a.css",
        ] {
            assert!(!served(file, &["/", "/about", "/blog/one"]), "{file}");
        }
        assert!(served("src/content/journal/one.md", &[]));
        assert!(!served("src/content/journal/photo.psd", &["/"]));
    }
}
