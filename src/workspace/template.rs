//! The built-in site: `workspace-template/`, embedded.

use rust_embed::RustEmbed;

use crate::repository::TemplateFile;

#[derive(RustEmbed)]
#[folder = "workspace-template/"]
#[exclude = "node_modules/*"]
#[exclude = ".astro/*"]
#[exclude = "dist/*"]
struct Embedded;

/// The files of the built-in site.
pub fn template_files() -> Vec<TemplateFile> {
    Embedded::iter()
        .filter_map(|name| {
            let file = Embedded::get(&name)?;
            Some(TemplateFile {
                path: name.into_owned(),
                content: file.data,
                executable: false,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_site_is_whole_and_clean() {
        let files = template_files();
        let has = |name: &str| files.iter().any(|file| file.path == name);
        for name in [
            "package.json",
            "package-lock.json",
            ".gitignore",
            "src/pages/index.astro",
        ] {
            assert!(has(name), "{name} is missing");
        }
        assert!(!files.iter().any(|file| file.path.contains("node_modules")));
    }
}
