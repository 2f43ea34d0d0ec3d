//! The built-in site: `workspace-template/`, embedded.

use std::path::PathBuf;

use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "workspace-template/"]
#[exclude = "node_modules/*"]
#[exclude = ".astro/*"]
#[exclude = "dist/*"]
struct Embedded;

/// One file that a new site begins with.
#[derive(Debug, Clone)]
pub struct TemplateFile {
    pub path: PathBuf,
    pub content: Vec<u8>,
}

/// The files of the built-in site.
pub fn template_files() -> Vec<TemplateFile> {
    Embedded::iter()
        .filter_map(|name| {
            let file = Embedded::get(&name)?;
            Some(TemplateFile {
                path: PathBuf::from(name.as_ref()),
                content: file.data.into_owned(),
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
        let has = |name: &str| files.iter().any(|file| file.path.as_os_str() == name);
        for name in ["package.json", "package-lock.json", ".gitignore", "src/pages/index.astro"] {
            assert!(has(name), "{name} is missing");
        }
        assert!(!files.iter().any(|f| f.path.components().any(|c| c.as_os_str() == "node_modules")));
    }
}
