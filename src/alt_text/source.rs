//! Which file of the site an image is.

use std::{collections::HashMap, rc::Rc, sync::LazyLock};

use regex::Regex;

use super::{Files, find::Shown};

const REMOTE: &str = "its image is on another server: describe it by hand";
const WRITTEN_IN: &str = "its image is written into the page itself (data:): describe it by hand";
const CHOSEN: &str = "its address is put together when the page is made: give it a text there";
const MISSING: &str = "its image is not among the site's files";
const PACKAGE: &str = "its image comes from a package: describe it by hand";
const DRAWING: &str = "it is a drawing in SVG, which is not shown to a model: describe it by hand";
const NONE: &str = "it says no address of an image";

/// Largest file of settings that is read.
const MAX_SETTINGS: u64 = 64 << 10;
/// Where sites keep what is served as it is.
const SERVED: [&str; 3] = ["public", "static", ""];

/// Aliases of one file of settings.
const MAX_ALIASES: usize = 64;
/// Folders around a page that are looked through.
const MAX_ABOVE: usize = 64;

/// Finds the files that pages name. What settings say is read once.
pub(super) struct Sources<'a> {
    files: &'a dyn Files,
    /// Of a folder: what a path begins with, and where that is.
    aliases: HashMap<String, Rc<[(String, String)]>>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(files: &'a dyn Files) -> Self {
        Self {
            files,
            aliases: HashMap::new(),
        }
    }

    /// The file's path, or why a person has to look.
    pub(super) fn resolve(&mut self, page: &str, shown: &Shown) -> Result<String, &'static str> {
        let path = match shown {
            Shown::Unknown => return Err(CHOSEN),
            Shown::Address(address) => self.of_address(page, address)?,
            Shown::Import(from) => self.of_import(page, from)?,
        };
        match path.rsplit_once('.') {
            Some((_, ending)) if ending.eq_ignore_ascii_case("svg") => Err(DRAWING),
            _ => Ok(path),
        }
    }

    fn of_address(&mut self, page: &str, address: &str) -> Result<String, &'static str> {
        let lower = address.to_ascii_lowercase();
        if address.is_empty() || address.starts_with('#') {
            return Err(NONE);
        }
        if lower.starts_with("data:") || lower.starts_with("blob:") {
            return Err(WRITTEN_IN);
        }
        if address.starts_with("//") || lower.contains("://") {
            return Err(REMOTE);
        }
        if address.contains(['{', '}', '$', '<']) {
            return Err(CHOSEN);
        }
        let path = decoded(address.split(['?', '#']).next().unwrap_or_default());
        if let Some(found) = self.aliased(page, &path) {
            return Ok(found);
        }
        let absolute = path.strip_prefix('/');
        if absolute.is_none()
            && let Some(found) = beside(page, &path).filter(|found| self.files.has(found))
        {
            return Ok(found);
        }
        let path = absolute.unwrap_or(path.strip_prefix("./").unwrap_or(&path));
        above(page)
            .flat_map(|folder| SERVED.map(|served| join(&[folder, served, path])))
            .filter_map(|candidate| plain(&candidate))
            .find(|candidate| self.files.has(candidate))
            .ok_or(MISSING)
    }

    fn of_import(&mut self, page: &str, from: &str) -> Result<String, &'static str> {
        let path = from.split(['?', '#']).next().unwrap_or_default();
        if path.starts_with('.') {
            return beside(page, path)
                .filter(|found| self.files.has(found))
                .ok_or(MISSING);
        }
        if let Some(path) = path.strip_prefix('/') {
            return above(page)
                .filter_map(|folder| plain(&join(&[folder, path])))
                .find(|found| self.files.has(found))
                .ok_or(MISSING);
        }
        self.aliased(page, path).ok_or(PACKAGE)
    }

    /// By the aliases of the next `tsconfig.json` (or `jsconfig.json`) up, else the usual ones.
    fn aliased(&mut self, page: &str, path: &str) -> Option<String> {
        for folder in above(page) {
            for (begin, target) in self.aliases(folder).iter() {
                let rest = path.strip_prefix(begin.as_str());
                let target = rest.and_then(|rest| plain(&join(&[folder, target, rest])));
                if let Some(target) = target.filter(|target| self.files.has(target)) {
                    return Some(target);
                }
            }
            let usual = ["~/", "@/", "$lib/", "src/"].iter().find_map(|alias| {
                let rest = path.strip_prefix(alias)?;
                let below = if *alias == "$lib/" { "src/lib" } else { "src" };
                plain(&join(&[folder, below, rest])).filter(|target| self.files.has(target))
            });
            if usual.is_some() {
                return usual;
            }
        }
        None
    }

    fn aliases(&mut self, folder: &str) -> Rc<[(String, String)]> {
        static PATHS: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r#""([^"*\n]+)\*"\s*:\s*\[\s*"([^"*\n]*)\*""#).expect("a fixed expression")
        });
        if let Some(known) = self.aliases.get(folder) {
            return Rc::clone(known);
        }
        let settings = ["tsconfig.json", "jsconfig.json"].iter().find_map(|name| {
            let bytes = self.files.read(&join(&[folder, name]), MAX_SETTINGS)?;
            String::from_utf8(bytes).ok()
        });
        let settings = settings.unwrap_or_default();
        let found = PATHS.captures_iter(&settings).take(MAX_ALIASES);
        let found: Rc<[(String, String)]> = found
            .map(|found| (found[1].to_owned(), found[2].to_owned()))
            .collect();
        self.aliases.insert(folder.to_owned(), Rc::clone(&found));
        found
    }
}

/// The folders around a file, the nearest first; the site's root is "".
fn above(page: &str) -> impl Iterator<Item = &str> {
    let ends = page.rmatch_indices('/').map(|(at, _)| at);
    ends.chain([0]).map(|end| &page[..end]).take(MAX_ABOVE)
}

fn beside(page: &str, path: &str) -> Option<String> {
    let folder = above(page).next().unwrap_or_default();
    plain(&join(&[folder, path]))
}

fn join(parts: &[&str]) -> String {
    let parts = parts.iter().filter(|part| !part.is_empty());
    parts.copied().collect::<Vec<_>>().join("/")
}

/// Without `.` and `..`; `None` if it leads out of the site.
fn plain(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// `%20` and the like as what they stand for.
fn decoded(address: &str) -> String {
    let bytes = address.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let code = (*byte == b'%')
            .then(|| address.get(at + 1..at + 3))
            .flatten()
            .filter(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).unwrap_or_else(|_| address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alt_text::tests::site;

    #[test]
    fn an_image_is_found_where_a_build_finds_it() {
        let files = site(&[
            ("src/pages/de/index.astro", ""),
            ("src/pages/de/near.png", ""),
            ("src/assets/a b.png", ""),
            ("src/drawing.svg", ""),
            ("public/logo.png", ""),
            ("static/other.png", ""),
            (
                "tsconfig.json",
                r#"{ // mine
                "compilerOptions": {"paths": {"pics/*": ["./src/assets/*"]}}}"#,
            ),
        ]);
        let page = "src/pages/de/index.astro";
        let resolve = |shown| Sources::new(&files).resolve(page, &shown);
        let address = |text: &str| resolve(Shown::Address(text.into()));
        let import = |text: &str| resolve(Shown::Import(text.into()));
        for (text, found) in [
            ("near.png", "src/pages/de/near.png"),
            ("./near.png?w=1#x", "src/pages/de/near.png"),
            ("../../assets/a%20b.png", "src/assets/a b.png"),
            ("/logo.png", "public/logo.png"),
            ("logo.png", "public/logo.png"),
            ("/other.png", "static/other.png"),
            ("/src/assets/a b.png", "src/assets/a b.png"),
            ("@/assets/a b.png", "src/assets/a b.png"),
        ] {
            assert_eq!(address(text).as_deref(), Ok(found), "{text}");
        }
        for (text, found) in [
            ("./near.png", "src/pages/de/near.png"),
            ("../../assets/a b.png?url", "src/assets/a b.png"),
            ("~/assets/a b.png", "src/assets/a b.png"),
            ("pics/a b.png", "src/assets/a b.png"),
            ("/src/assets/a b.png", "src/assets/a b.png"),
        ] {
            assert_eq!(import(text).as_deref(), Ok(found), "{text}");
        }
        for (text, why) in [
            ("https://example.com/a.png", REMOTE),
            ("//example.com/a.png", REMOTE),
            ("data:image/png;base64,AAAA", WRITTEN_IN),
            ("{{ url }}", CHOSEN),
            ("../../../../../../etc/passwd", MISSING),
            ("/../../etc/passwd", MISSING),
            ("gone.png", MISSING),
            ("%6eear.pn%+67", MISSING),
            ("../../drawing.svg", DRAWING),
            ("", NONE),
        ] {
            assert_eq!(address(text), Err(why), "{text}");
        }
        assert_eq!(import("some-package/a.png"), Err(PACKAGE));
        assert_eq!(import("./gone.png"), Err(MISSING));
    }
}
