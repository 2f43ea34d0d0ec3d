//! What a repository may be made from: which addresses are taken, and in which form they are
//! compared.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use url::Url;

/// A validated place to start a user's repository from.
#[derive(Debug, Clone)]
pub enum Source {
    /// An `https` address without credentials, query or fragment.
    Remote(Url),
    /// A canonical path below the allow-listed folder.
    Local(PathBuf),
    /// The built-in site, as files of a first commit.
    Template(Vec<TemplateFile>),
}

/// One file of the built-in site.
#[derive(Debug, Clone)]
pub struct TemplateFile {
    /// Relative to the site's root, with `/`.
    pub path: String,
    pub content: Cow<'static, [u8]>,
    pub executable: bool,
}

/// Why an address was refused: the fault is in the request, and each text says what to write
/// instead. The address itself is never repeated, because it may hold a credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("repoUrl must be an https address, for example https://github.com/owner/name")]
    NotHttps,
    #[error("repoUrl is not a well-formed address; write it like https://github.com/owner/name")]
    Malformed,
    #[error(
        "repoUrl must not hold a user name, password or token; leave it out of the address and \
         set GITHUB_TOKEN for the supervisor"
    )]
    Credentials,
    #[error("repoUrl is a local path outside of the folder that is allowed for local repositories")]
    LocalNotAllowed,
    #[error("repoUrl names a local folder that does not exist")]
    LocalMissing,
}

impl Source {
    /// The address as it is kept and shown; `None` for the built-in template.
    pub fn url(&self) -> Option<String> {
        match self {
            Self::Remote(url) => Some(url.to_string()),
            Self::Local(path) => Some(path.to_string_lossy().into_owned()),
            Self::Template(_) => None,
        }
    }

    /// Equal for two addresses of one repository: a trailing `/` or `.git` makes no difference,
    /// nor does case on GitHub, where names are case-insensitive.
    pub fn identity(&self) -> String {
        match self {
            Self::Remote(url) => {
                let text = url.as_str().trim_end_matches('/');
                let text = text
                    .strip_suffix(".git")
                    .unwrap_or(text)
                    .trim_end_matches('/');
                if url.host_str() == Some("github.com") {
                    text.to_ascii_lowercase()
                } else {
                    text.to_owned()
                }
            }
            Self::Local(path) => {
                let text = path.to_string_lossy();
                text.strip_suffix(".git")
                    .unwrap_or(&text)
                    .trim_end_matches('/')
                    .to_owned()
            }
            Self::Template(_) => "template".to_owned(),
        }
    }
}

/// Validates a `repoUrl`. `allowed_local` is the folder below which local paths are taken.
///
/// It looks at the disk for local paths only (symlinks are resolved before the comparison).
///
/// # Errors
/// [`SourceError`] says what to write instead.
pub fn parse_source(repo_url: &str, allowed_local: Option<&Path>) -> Result<Source, SourceError> {
    let text = repo_url.trim();
    // The URL parser drops tabs and line feeds silently; what it reads would not be what was sent.
    if text.is_empty()
        || text
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() && c != ' ')
    {
        return Err(SourceError::Malformed);
    }
    if text.starts_with('/') {
        return local(Path::new(text), allowed_local);
    }
    if let Some(path) = text.strip_prefix("git@github.com:") {
        return remote(&format!(
            "https://github.com/{}",
            path.trim_start_matches('/')
        ));
    }
    let Ok(url) = Url::parse(text) else {
        return Err(SourceError::NotHttps);
    };
    match url.scheme() {
        "https" => remote(text),
        "ssh"
            if url.host_str() == Some("github.com")
                && url.username() == "git"
                && url.password().is_none()
                && matches!(url.port(), None | Some(22)) =>
        {
            remote(&format!("https://github.com{}", url.path()))
        }
        "file" => {
            let path = url.to_file_path().map_err(|()| SourceError::Malformed)?;
            local(&path, allowed_local)
        }
        _ => Err(SourceError::NotHttps),
    }
}

fn remote(text: &str) -> Result<Source, SourceError> {
    let url = Url::parse(text).map_err(|_| SourceError::Malformed)?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(SourceError::Credentials);
    }
    let has_path = url.path().trim_matches('/').len() > ".git".len();
    if url.host_str().is_none_or(str::is_empty)
        || !has_path && url.path().trim_matches('/').is_empty()
        || url.query().is_some()
        || url.fragment().is_some()
        || text.contains([' ', '\\'])
    {
        return Err(SourceError::Malformed);
    }
    Ok(Source::Remote(url))
}

fn local(path: &Path, allowed: Option<&Path>) -> Result<Source, SourceError> {
    let allowed = allowed
        .and_then(|folder| folder.canonicalize().ok())
        .ok_or(SourceError::LocalNotAllowed)?;
    match path.canonicalize() {
        // The folder itself is the list, not an entry of it.
        Ok(real) if real.starts_with(&allowed) && real != allowed => Ok(Source::Local(real)),
        // Says that something is missing only where the caller may look.
        Err(_)
            if path.starts_with(&allowed)
                && !path
                    .components()
                    .any(|c| c == std::path::Component::ParentDir) =>
        {
            Err(SourceError::LocalMissing)
        }
        _ => Err(SourceError::LocalNotAllowed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> String {
        parse_source(text, None).unwrap().identity()
    }

    #[test]
    fn forms_of_one_repository_are_one_identity() {
        let expected = "https://github.com/acme/site";
        for text in [
            "https://github.com/acme/site",
            "https://github.com/Acme/site.git",
            " https://GitHub.com/acme/site.git/ ",
            "git@github.com:acme/site.git",
            "ssh://git@github.com/acme/site.git",
            "ssh://git@github.com:22/acme/site",
            "https://github.com:443/acme/site",
        ] {
            assert_eq!(identity(text), expected, "{text}");
        }
        assert_ne!(
            identity("https://git.example.com/A/b"),
            identity("https://git.example.com/a/b")
        );
        assert_eq!(
            identity("https://git.example.com:8443/a/b"),
            "https://git.example.com:8443/a/b"
        );
    }

    #[test]
    fn everything_else_is_refused_and_never_repeated() {
        use SourceError::{Credentials, LocalNotAllowed, Malformed, NotHttps};
        for (text, expected) in [
            ("", Malformed),
            ("http://github.com/a/b", NotHttps),
            ("git://github.com/a/b", NotHttps),
            ("ext::sh -c whoami", NotHttps),
            ("git@gitlab.com:a/b", NotHttps),
            ("ssh://root@github.com/a/b", NotHttps),
            ("ssh://git@evil.example/a/b", NotHttps),
            ("--upload-pack=x", NotHttps),
            ("../up", NotHttps),
            ("https://user:hunter2@github.com/a/b", Credentials),
            ("https://hunter2@github.com/a/b", Credentials),
            ("https://github.com", Malformed),
            ("https://github.com/a/b?x=hunter2", Malformed),
            ("https://github.com/a/b#x", Malformed),
            ("https://github.com/a\n/b", Malformed),
            ("https://github.com\\@evil.example/a", Malformed),
            ("/etc", LocalNotAllowed),
            ("file:///etc", LocalNotAllowed),
        ] {
            let error = parse_source(text, None).unwrap_err();
            assert_eq!(error, expected, "{text:?}");
            assert!(!error.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn local_paths_stay_below_the_allowed_folder() {
        let root = tempfile::tempdir().unwrap();
        let allowed = root.path().join("allowed");
        std::fs::create_dir_all(allowed.join("site")).unwrap();
        std::fs::create_dir_all(root.path().join("allowed-not/site")).unwrap();
        std::os::unix::fs::symlink(root.path().join("allowed-not/site"), allowed.join("out"))
            .unwrap();
        let parse = |path: PathBuf| parse_source(path.to_str().unwrap(), Some(&allowed));

        let inside = parse(allowed.join("site")).unwrap();
        assert!(matches!(&inside, Source::Local(path) if path.ends_with("allowed/site")));
        let as_url = format!("file://{}/", allowed.join("site").display());
        let as_url = parse_source(&as_url, Some(&allowed)).unwrap();
        assert_eq!(as_url.identity(), inside.identity());

        for outside in [
            "allowed",
            "allowed/out",
            "allowed/../allowed-not/site",
            "allowed-not/site",
        ] {
            let outcome = parse(root.path().join(outside));
            assert_eq!(
                outcome.unwrap_err(),
                SourceError::LocalNotAllowed,
                "{outside}"
            );
        }
        assert_eq!(
            parse(allowed.join("gone")).unwrap_err(),
            SourceError::LocalMissing
        );
        assert_eq!(
            parse(root.path().join("gone")).unwrap_err(),
            SourceError::LocalNotAllowed,
            "what exists elsewhere is nobody's business"
        );
    }
}
