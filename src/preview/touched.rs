//! Which pages show a change: asked for after an edit, they make the dev server meet its errors.

use std::sync::{Arc, Mutex};

/// Longest path that is remembered, in bytes.
const LONGEST: usize = 1024;
/// Pages that are asked for at once.
const MOST: usize = 4;

/// The page that a browser was shown last. Shared by those who show and those who ask.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastPage(Arc<Mutex<Option<String>>>);

impl LastPage {
    /// Somebody is shown this path.
    pub(crate) fn note(&self, path: &str) {
        let mut last = self.0.lock().expect("no panic while it is held");
        if path.len() <= LONGEST && last.as_deref() != Some(path) {
            *last = Some(path.to_owned());
        }
    }

    /// The pages on which a change or an error in these files would show: each page's own, and for
    /// what is no page the one that somebody looks at, else the site's first.
    pub(crate) fn and_pages_of<'a>(&self, files: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let last = self.0.lock().expect("no panic while it is held").clone();
        let mut pages = vec![last.unwrap_or_else(|| "/".to_owned())];
        for page in files.into_iter().filter_map(route) {
            if pages.len() < MOST && !pages.contains(&page) {
                pages.push(page);
            }
        }
        pages
    }
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
