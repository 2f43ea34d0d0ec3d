//! Where an image goes in a site: the folder that its images are in already, under a name that says
//! what it shows.

use std::collections::BTreeMap;

/// Endings of images.
const ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "avif", "gif", "svg", "tiff"];
/// Folders that hold images of pages, the ones that a site's tools make smaller first.
const ROOTS: [&str; 3] = ["src", "public", "static"];
/// Words of a prompt in a file's name.
const WORDS: usize = 6;
/// Longest of them together.
const MAX_NAME: usize = 48;

/// The folder for images of a site with these files, without a slash at its end.
pub(super) fn folder<'a>(paths: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let (mut has_src, mut has_public) = (false, false);
    for path in paths {
        has_src |= path.starts_with("src/");
        has_public |= path.starts_with("public/");
        let Some((folder, name)) = path.rsplit_once('/') else {
            continue;
        };
        let ending = name.rsplit('.').next().unwrap_or_default();
        let is_image = ENDINGS.contains(&ending.to_ascii_lowercase().as_str());
        // Icons lie in `public` itself.
        if is_image && is_folder(folder) && folder.contains('/') {
            *counts.entry(folder.to_owned()).or_default() += 1;
        }
    }
    // Of as many, the one that comes first in `src`.
    let best = counts.into_iter().max_by(|(a, many), (b, more)| {
        let rank = |folder: &str| folder.starts_with("src/");
        many.cmp(more)
            .then_with(|| rank(a).cmp(&rank(b)))
            .then_with(|| b.cmp(a))
    });
    match best {
        Some((folder, _)) => folder,
        None if has_src => "src/assets".to_owned(),
        None if has_public => "public/images".to_owned(),
        None => "images".to_owned(),
    }
}

/// Whether images may be put into a folder that a caller names: one for images of pages, by plain
/// names.
pub(super) fn is_folder(folder: &str) -> bool {
    let mut parts = folder.split('/');
    let first = parts.next().unwrap_or_default();
    folder.len() <= 200
        && (ROOTS.contains(&first) || first == "images")
        && folder.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part != "node_modules"
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        })
}

/// A name that says what is asked for, without its ending.
pub(super) fn name(prompt: &str, mark: &str) -> String {
    let letters: String = prompt
        .chars()
        .map(|c| match c.is_ascii_alphanumeric() {
            true => c.to_ascii_lowercase(),
            false => ' ',
        })
        .collect();
    let words: Vec<&str> = letters.split_whitespace().take(WORDS).collect();
    let words = words.join("-");
    let words = words[..words.len().min(MAX_NAME)].trim_end_matches('-');
    match words {
        "" => format!("image-{mark}"),
        words => format!("{words}-{mark}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_go_where_images_are() {
        for (paths, goes) in [
            (
                &[
                    "src/pages/a.astro",
                    "src/assets/a.png",
                    "src/assets/b.jpg",
                    "public/img/x.png",
                ][..],
                "src/assets",
            ),
            (
                &["public/favicon.svg", "public/img/x.png", "src/a.js"],
                "public/img",
            ),
            (&["public/favicon.svg", "src/pages/a.astro"], "src/assets"),
            (&["public/favicon.svg", "index.html"], "public/images"),
            (&["index.html"], "images"),
            (&["src/b/x.png", "src/a/x.png", "public/a/x.png"], "src/a"),
            (&["docs/x.png", "docs/y.png", "src/i.astro"], "src/assets"),
        ] {
            assert_eq!(folder(paths.iter().copied()), goes, "{paths:?}");
        }
    }

    #[test]
    fn only_folders_for_images_are_taken() {
        for good in ["src/assets", "public/images/team", "static/img", "public"] {
            assert!(is_folder(good), "{good}");
        }
        for bad in [
            "",
            "/src",
            "src/",
            "../src",
            "src/../x",
            "src/.git",
            ".github",
            "node_modules/x",
            "src//a",
            "src/a b",
            "package",
            "src/node_modules",
        ] {
            assert!(!is_folder(bad), "{bad}");
        }
    }

    #[test]
    fn a_name_says_what_it_shows() {
        for (prompt, said) in [
            (
                "A red shoe, on a white table at noon!",
                "a-red-shoe-on-a-white-7f",
            ),
            ("../../etc/hosts", "etc-hosts-7f"),
            ("日本", "image-7f"),
        ] {
            assert_eq!(name(prompt, "7f"), said);
        }
        assert!(name(&"x".repeat(900), "7f").len() <= MAX_NAME + 3);
    }
}
