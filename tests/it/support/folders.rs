//! The folders of one test, and repositories in them.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use super::Who;

/// A site without dependencies: its `dev` script is one file of Node, which serves the heading's
/// page as it is.
pub(crate) const SITE: &[(&str, &str)] = &[
    (
        "package.json",
        "{\"name\": \"site\", \"private\": true, \"scripts\": {\"dev\": \"node server.mjs\"}}\n",
    ),
    (
        "server.mjs",
        "import { createServer } from 'node:http';
import { readFileSync } from 'node:fs';
createServer((request, response) => {
  response.setHeader('content-type', 'text/html');
  response.end(readFileSync('src/pages/index.astro'));
}).listen(Number(process.env.PORT), process.env.HOST ?? '127.0.0.1');
",
    ),
    (
        "src/pages/index.astro",
        "<html>\n<body>\n  <h1>Pots</h1>\n  <p>Made slowly.</p>\n</body>\n</html>\n",
    ),
    (".gitignore", "node_modules/\ndist/\n"),
];

/// Folders that go away with their last holder. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Folders(Arc<tempfile::TempDir>);

impl Folders {
    /// Empty ones.
    pub(crate) fn new() -> Self {
        let folders = Self(Arc::new(tempfile::tempdir().unwrap()));
        for folder in ["home", "tmp", "repos"] {
            fs::create_dir(folders.join(folder)).unwrap();
        }
        folders
    }

    /// The same, with a way through for others: a temporary folder is private.
    pub(crate) fn open() -> Self {
        let folders = Self::new();
        let open = fs::Permissions::from_mode(0o711);
        fs::set_permissions(folders.join(""), open).unwrap();
        folders
    }

    /// Something in them.
    pub(crate) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(path)
    }

    /// `WORKSPACE_PATH`.
    pub(crate) fn workspace(&self) -> PathBuf {
        self.join("workspace")
    }

    /// A user's folder on the workspace.
    pub(crate) fn user(&self, who: &Who) -> PathBuf {
        self.workspace().join(&who.client).join(&who.user)
    }

    /// A thread's worktree.
    pub(crate) fn worktree(&self, who: &Who) -> PathBuf {
        self.user(who).join("threads").join(&who.thread)
    }

    /// A new repository below the folder that is allowed for local ones, with one commit of these
    /// files on `main`. Answers its path, as a `repoUrl`.
    pub(crate) fn site(&self, name: &str, files: &[(&str, &str)]) -> String {
        let path = self.join("repos").join(name);
        fs::create_dir_all(&path).unwrap();
        git(&path, &["init", "--quiet", "--initial-branch=main"]);
        write(&path, files);
        git(&path, &["add", "--all"]);
        git(
            &path,
            &["commit", "--quiet", "--allow-empty", "--message=Begin"],
        );
        path.to_str().unwrap().to_owned()
    }
}

/// Writes files below a folder.
fn write(folder: &Path, files: &[(&str, &str)]) {
    for (name, content) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// What the real git program says in a folder, without the line feed at its end. It reads no
/// configuration but the repository's.
pub(crate) fn git(folder: impl AsRef<Path>, args: &[&str]) -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "the real git is what tests compare with"
    )]
    let output = Command::new("git")
        .args(args)
        .current_dir(folder.as_ref())
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("HOME", "/nonexistent")
        .env("LANG", "C.UTF-8")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        // On the uid road a worktree is its thread's.
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        // Looking must not write.
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_AUTHOR_NAME", "Agency")
        .env("GIT_AUTHOR_EMAIL", "agency@example.com")
        .env("GIT_COMMITTER_NAME", "Agency")
        .env("GIT_COMMITTER_EMAIL", "agency@example.com")
        .output()
        .expect("git is installed");
    assert!(output.status.success(), "git {args:?}: {output:?}");
    let text = String::from_utf8(output.stdout).expect("git speaks UTF-8 here");
    text.trim_end_matches('\n').to_owned()
}

/// Every file below a folder; links are not followed.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}

/// Does the file hold the text? One that is gone does not.
pub(crate) fn holds(file: &Path, text: &str) -> bool {
    let content = fs::read(file).unwrap_or_default();
    content
        .windows(text.len())
        .any(|window| window == text.as_bytes())
}
