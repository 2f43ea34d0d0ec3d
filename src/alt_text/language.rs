//! The language that a page is in: texts are written in it.

use std::{collections::BTreeMap, sync::LazyLock};

use regex::Regex;

use super::Files;

/// Languages that a folder may be called after, beside those that the site names itself. Short
/// words that mean something else in paths are left out.
const KNOWN: [(&str, &str); 34] = [
    ("ar", "Arabic"),
    ("bg", "Bulgarian"),
    ("ca", "Catalan"),
    ("cs", "Czech"),
    ("da", "Danish"),
    ("de", "German"),
    ("el", "Greek"),
    ("en", "English"),
    ("es", "Spanish"),
    ("et", "Estonian"),
    ("fa", "Persian"),
    ("fi", "Finnish"),
    ("fr", "French"),
    ("he", "Hebrew"),
    ("hi", "Hindi"),
    ("hr", "Croatian"),
    ("hu", "Hungarian"),
    ("it", "Italian"),
    ("ja", "Japanese"),
    ("ko", "Korean"),
    ("lt", "Lithuanian"),
    ("lv", "Latvian"),
    ("nb", "Norwegian"),
    ("nl", "Dutch"),
    ("pl", "Polish"),
    ("pt", "Portuguese"),
    ("ro", "Romanian"),
    ("ru", "Russian"),
    ("sk", "Slovak"),
    ("sl", "Slovenian"),
    ("sv", "Swedish"),
    ("tr", "Turkish"),
    ("uk", "Ukrainian"),
    ("zh", "Chinese"),
];

/// Settings of Astro beyond this are not read.
const MAX_SETTINGS: u64 = 256 << 10;

/// What a site says about its languages.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Languages {
    /// Those that its settings name.
    locales: Vec<String>,
    usual: Option<String>,
}

impl Languages {
    /// `pages` counts what the site's pages say of themselves (`<html lang>`).
    pub(super) fn of_site(files: &dyn Files, pages: &BTreeMap<String, usize>) -> Self {
        static USUAL: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r#"defaultLocale\s*:\s*["'`]([A-Za-z0-9-]+)["'`]"#)
                .expect("a fixed expression")
        });
        static LOCALES: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r"locales\s*:\s*\[([^\]]*)\]").expect("a fixed expression")
        });
        let is_settings = |path: &&str| {
            let name = path.rsplit('/').next().unwrap_or_default();
            name.starts_with("astro.config.")
        };
        let path = files
            .paths()
            .into_iter()
            .filter(is_settings)
            .min_by_key(|path| path.len());
        let text = path.and_then(|path| String::from_utf8(files.read(path, MAX_SETTINGS)?).ok());
        let text = text.unwrap_or_default();
        let most = pages.iter().max_by_key(|(_, count)| **count);
        let usual = USUAL.captures(&text).map(|found| found[1].to_owned());
        let list = LOCALES.captures(&text).map(|found| found[1].to_owned());
        let locales = list.unwrap_or_default();
        let locales = locales
            .split(',')
            .map(|code| code.trim().trim_matches(['"', '\'', '`']));
        Self {
            locales: locales
                .filter(|code| is_code(code))
                .map(str::to_owned)
                .collect(),
            usual: usual
                .filter(|code| is_code(code))
                .or(most.map(|(code, _)| code.clone())),
        }
    }

    /// Of one page, which may say one itself.
    pub(super) fn of(&self, path: &str, said: Option<&str>) -> Option<String> {
        let said = said.filter(|code| is_code(code)).map(str::to_owned);
        said.or_else(|| self.of_path(path))
            .or_else(|| self.usual.clone())
    }

    /// `/de/`, or `post.de.md`.
    fn of_path(&self, path: &str) -> Option<String> {
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parts: Vec<&str> = name.split('.').collect();
        let inner = match parts[..] {
            [_, inner, _] => Some(inner),
            _ => None,
        };
        let named = folders.split('/').rev().chain(inner).find(|part| {
            let is_named = self
                .locales
                .iter()
                .any(|code| code.eq_ignore_ascii_case(part));
            let language = part.split('-').next().unwrap_or_default();
            is_named || self.locales.is_empty() && is_code(part) && name_of(language).is_some()
        });
        named.map(str::to_owned)
    }
}

/// A language's tag: `de`, `pt-BR`.
pub fn is_code(code: &str) -> bool {
    let mut parts = code.split('-');
    let first = parts.next().unwrap_or_default();
    (2..=3).contains(&first.len())
        && first.bytes().all(|b| b.is_ascii_alphabetic())
        && code.len() <= 20
        && parts.all(|part| {
            (2..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric())
        })
}

fn name_of(code: &str) -> Option<&'static str> {
    let known = KNOWN.iter().find(|(known, _)| *known == code);
    known.map(|(_, name)| *name)
}

/// As a model is told of it.
pub(super) fn in_words(code: Option<&str>) -> String {
    let Some(code) = code else {
        return "the language of the text around it (English, if that cannot be told)".into();
    };
    let language = code
        .split('-')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    match name_of(&language) {
        Some(name) => format!("{name} ({code})"),
        None => format!("the language with the code {code}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alt_text::tests::site;

    #[test]
    fn a_page_has_the_language_that_it_the_path_or_the_site_says() {
        let config = "export default { i18n: { defaultLocale: 'de', locales: ['de', \"pt-br\"] } }";
        let files = site(&[("astro.config.mjs", config)]);
        let languages = Languages::of_site(&files, &BTreeMap::new());
        let of = |path: &str, said| languages.of(path, said).unwrap();
        assert_eq!(of("src/pages/index.astro", None), "de");
        assert_eq!(of("src/pages/pt-br/index.astro", None), "pt-br");
        assert_eq!(
            of("src/pages/fr/index.astro", None),
            "de",
            "it is no locale of the site"
        );
        assert_eq!(of("src/pages/pt-br/index.astro", Some("es")), "es");
        assert_eq!(of("src/pages/index.astro", Some("{lang}")), "de");

        let pages = BTreeMap::from([("nl".to_owned(), 3), ("en".to_owned(), 1)]);
        let languages = Languages::of_site(&site(&[]), &pages);
        let of = |path: &str| languages.of(path, None).unwrap();
        assert_eq!(of("src/components/Hero.astro"), "nl");
        assert_eq!(of("src/content/blog/de/a.md"), "de");
        assert_eq!(of("src/content/blog/a.de.md"), "de");
        assert_eq!(of("src/pages/zh-TW/a.astro"), "zh-TW");
        assert_eq!(of("src/pages/my/or/a.md"), "nl");
        assert_eq!(Languages::default().of("a.md", None), None);
        assert_eq!(in_words(Some("pt-BR")), "Portuguese (pt-BR)");
    }
}
