//! Which pages show a change: asked for after an edit, they make the dev server meet its errors.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::time::Instant;

use super::served::is_visited_page;

/// Longest path that is remembered, in bytes.
const LONGEST: usize = 1024;
/// Pages that are asked for at once.
const MOST: usize = 4;
/// Pages that somebody may still have before them, also from the dev server before.
const MOST_RECENT: usize = 16;
/// Pages that are remembered of one dev server.
const MOST_VISITED: usize = 256;

/// The pages that a browser was shown. Shared by those who show and those who ask.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastPage(Arc<Mutex<Shown>>);

#[derive(Debug, Default)]
struct Shown {
    /// What was asked for, the last one at the end.
    recent: VecDeque<String>,
    /// What the dev server has answered, and when first: before that it knows nothing of the
    /// page's files, and has nothing to say of a change in them.
    answered: BTreeMap<String, Instant>,
}

impl LastPage {
    /// Somebody asks for this path.
    pub(crate) fn note(&self, path: &str) {
        let recent = &mut self.shown().recent;
        if path.len() <= LONGEST && recent.back().is_none_or(|last| last != path) {
            recent.retain(|known| known != path);
            recent.push_back(path.to_owned());
            if recent.len() > MOST_RECENT {
                recent.pop_front();
            }
        }
    }

    /// The dev server has rendered this path.
    pub(crate) fn note_answer(&self, path: &str) {
        let answered = &mut self.shown().answered;
        if path.len() <= LONGEST && answered.len() < MOST_VISITED && !answered.contains_key(path) {
            answered.insert(path.to_owned(), Instant::now());
        }
    }

    /// A new dev server, which has answered nothing yet.
    pub(crate) fn begin(&self) {
        self.shown().answered.clear();
    }

    /// What the dev server had answered by then.
    pub(crate) fn answered_by(&self, then: Instant) -> BTreeSet<String> {
        let shown = self.shown();
        let early = shown.answered.iter().filter(|(_, at)| **at <= then);
        early.map(|(path, _)| path.clone()).collect()
    }

    /// What somebody may have before them.
    pub(crate) fn shown_to_anybody(&self) -> BTreeSet<String> {
        let shown = self.shown();
        let answered = shown.answered.keys();
        answered.chain(&shown.recent).cloned().collect()
    }

    /// The page of this file is new: who asked for it before was shown another.
    pub(crate) fn forget(&self, file: &str) {
        self.shown()
            .answered
            .retain(|path, _| !is_visited_page(file, [path]));
    }

    /// The pages on which a change or an error in these files would show: each page's own, and for
    /// what is no page the one that somebody looks at, else the site's first.
    pub(crate) fn and_pages_of<'a>(&self, files: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let last = self.shown().recent.back().cloned();
        let mut pages = vec![last.unwrap_or_else(|| "/".to_owned())];
        for page in files.into_iter().filter_map(route) {
            if pages.len() < MOST && !pages.contains(&page) {
                pages.push(page);
            }
        }
        pages
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().expect("no panic while it is held")
    }
}

/// Does the dev server have to be started anew for a change of this file? Astro 7 restarts itself
/// in place, and then no longer hears of changes to its content (measured with 7.3.5).
pub fn is_configuration(path: &str) -> bool {
    path == "tsconfig.json"
        || path.starts_with(".env")
        || path.starts_with("astro.config.")
        || path.starts_with("vite.config.")
}

/// The address of a page's file, where that is no pattern.
fn route(file: &str) -> Option<String> {
    let (page, kind) = file.strip_prefix("src/pages/")?.rsplit_once('.')?;
    let is_page = matches!(kind, "astro" | "md" | "mdx" | "html")
        && !page.contains(['[', ']'])
        && !page.split('/').any(|part| part.starts_with('_'));
    let page = match page.strip_suffix("index") {
        Some(folder) if folder.is_empty() || folder.ends_with('/') => folder,
        _ => page,
    };
    is_page.then(|| format!("/{}", page.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_lead_to_pages() {
        let last = LastPage::default();
        assert_eq!(last.and_pages_of(["src/layouts/Base.astro"]), ["/"]);
        last.note("/about");
        let files = [
            "src/pages/index.astro",
            "src/pages/blog/index.md",
            "src/pages/appindex.astro",
            "src/pages/blog/[slug].astro",
            "src/pages/_draft.astro",
            "src/pages/feed.xml.ts",
        ];
        assert_eq!(
            last.and_pages_of(files),
            ["/about", "/", "/blog", "/appindex"]
        );
    }
}
