//! What a site asks of a package manager, and the key under which the outcome is kept.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::InstallError;

/// Part of every key: raise it when masters are made in another way.
const FORMAT: &str = "greenroom-dependencies-1";
const MAX_MANIFEST: u64 = 1024 * 1024;
const MAX_LOCKFILE: u64 = 64 * 1024 * 1024;

/// Fields of package.json that change what gets installed.
const RELEVANT: &[&str] = &[
    "dependencies",
    "devDependencies",
    "optionalDependencies",
    "peerDependencies",
    "peerDependenciesMeta",
    "bundleDependencies",
    "bundledDependencies",
    "overrides",
    "resolutions",
    "workspaces",
    "pnpm",
    "packageManager",
    "os",
    "cpu",
];
const LISTS: &[&str] = &[
    "dependencies",
    "devDependencies",
    "optionalDependencies",
    "peerDependencies",
];
/// Scripts that package managers run at install.
const LIFECYCLE: &[&str] = &["preinstall", "install", "postinstall", "prepare"];
/// Settings beside the lockfile, of npm, pnpm and yarn.
const SETTINGS: &[&str] = &[".npmrc", "pnpm-workspace.yaml", ".yarnrc"];

/// The package managers that a lockfile can belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manager {
    Npm {
        locked: bool,
    },
    Pnpm,
    /// Yarn 1. Lockfiles of later ones are none to us: npm resolves anew.
    Yarn,
}

impl Manager {
    /// Where npm brings it from, in the major that reads the lockfiles of the day, and its script
    /// there. npm itself is at hand.
    pub(super) fn package(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Npm { .. } => None,
            Self::Pnpm => Some(("pnpm@10", "pnpm/bin/pnpm.cjs")),
            Self::Yarn => Some(("yarn@1", "yarn/bin/yarn.js")),
        }
    }

    /// Where its lockfiles say that packages are, beside the registry that is set.
    pub(super) fn home(self) -> Option<&'static str> {
        match self {
            Self::Npm { .. } | Self::Pnpm => None,
            Self::Yarn => Some(".yarnpkg.com"),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Npm { .. } => "npm",
            Self::Pnpm => "pnpm",
            Self::Yarn => "yarn",
        }
    }
}

/// What one worktree needs.
#[derive(Debug, Clone)]
pub(super) struct Need {
    pub(super) manager: Manager,
    /// 64 hex digits.
    pub(super) key: String,
    /// package.json, lockfile and settings as they were read.
    pub(super) files: Vec<(&'static str, Vec<u8>)>,
}

impl Need {
    /// Reads a worktree; nothing if it needs no dependencies. Blocking.
    pub(super) fn read(worktree: &Path, node_major: u32) -> Result<Option<Self>, InstallError> {
        let read = |name: &'static str, max| {
            read_regular(&worktree.join(name), max)
                .map_err(|error| InstallError::Site(format!("{name} can't be read: {error}")))
        };
        let Some(package) = read("package.json", MAX_MANIFEST)? else {
            return Ok(None);
        };
        let bytes = package.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&package);
        let manifest: Value = serde_json::from_slice(bytes)
            .map_err(|error| InstallError::Site(format!("package.json is no JSON: {error}")))?;
        if !needs_install(&manifest) {
            return Ok(None);
        }
        let mut files = vec![("package.json", package)];
        let mut manager = Manager::Npm { locked: false };
        for (name, its_manager) in [
            ("npm-shrinkwrap.json", Manager::Npm { locked: true }),
            ("package-lock.json", Manager::Npm { locked: true }),
            ("pnpm-lock.yaml", Manager::Pnpm),
            ("yarn.lock", Manager::Yarn),
        ] {
            if let Some(lock) = read(name, MAX_LOCKFILE)? {
                let is_later_yarn = its_manager == Manager::Yarn && lists_metadata(&lock);
                files.push((name, lock));
                if !is_later_yarn {
                    manager = its_manager;
                }
                break;
            }
        }
        for name in SETTINGS {
            if let Some(settings) = read(name, MAX_MANIFEST)? {
                files.push((name, settings));
            }
        }
        let key = key(&manifest, &files[1..], manager, node_major);
        Ok(Some(Self {
            manager,
            key,
            files,
        }))
    }

    /// The package manager's arguments, in the order in which they are tried.
    pub(super) fn attempts(&self) -> Vec<Vec<OsString>> {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        match self.manager {
            Manager::Npm { locked: true } => vec![
                words("ci --no-audit --no-fund"),
                words("install --no-save --no-audit --no-fund"),
            ],
            Manager::Npm { locked: false } => {
                vec![words("install --no-package-lock --no-audit --no-fund")]
            }
            Manager::Pnpm => {
                vec![words(
                    "install --frozen-lockfile --package-import-method=copy",
                )]
            }
            Manager::Yarn => vec![words("install --frozen-lockfile --non-interactive")],
        }
    }
}

fn lists_metadata(lock: &[u8]) -> bool {
    lock.split(|b| *b == b'\n')
        .take(50)
        .any(|line| line.starts_with(b"__metadata:"))
}

fn needs_install(manifest: &Value) -> bool {
    let is_filled = |field: &str| match manifest.get(field) {
        Some(Value::Object(list)) => !list.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        _ => false,
    };
    let has_script = |name: &str| manifest.pointer(&format!("/scripts/{name}")).is_some();
    LISTS.iter().any(|field| is_filled(field))
        || is_filled("workspaces")
        || LIFECYCLE.iter().any(|name| has_script(name))
}

/// SHA-256 over what decides the outcome, each part with its length before it.
fn key(
    manifest: &Value,
    files: &[(&'static str, Vec<u8>)],
    manager: Manager,
    node_major: u32,
) -> String {
    let mut digest = Sha256::new();
    let mut add = |part: &[u8]| {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    };
    add(FORMAT.as_bytes());
    add(manager.name().as_bytes());
    add(&node_major.to_be_bytes());
    add(std::env::consts::ARCH.as_bytes());
    for field in RELEVANT {
        if let Some(value) = manifest.get(field) {
            add(field.as_bytes());
            // serde_json's objects are sorted by name: order and spacing don't count.
            add(value.to_string().as_bytes());
        }
    }
    for name in LIFECYCLE {
        if let Some(script) = manifest.pointer(&format!("/scripts/{name}")) {
            add(name.as_bytes());
            add(script.to_string().as_bytes());
        }
    }
    for (name, bytes) in files {
        add(name.as_bytes());
        add(bytes);
    }
    hex::encode(digest.finalize())
}

/// A regular file's bytes; nothing if there is none. The agent may have put anything here.
fn read_regular(path: &Path, max: u64) -> io::Result<Option<Vec<u8>>> {
    let kind = match path.symlink_metadata() {
        Ok(kind) => kind,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !kind.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::other("it is too large"));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(files: &[(&str, &str)]) -> Option<Need> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Need::read(folder.path(), 22).unwrap()
    }

    const PACKAGE: &str = r#"{"name":"s","dependencies":{"astro":"7.3.5"}}"#;

    #[test]
    fn a_site_without_dependencies_needs_nothing() {
        assert!(need(&[]).is_none());
        assert!(need(&[("package.json", r#"{"scripts":{"dev":"node x"}}"#)]).is_none());
        assert!(need(&[("package.json", r#"{"dependencies":{}}"#)]).is_none());
        for package in [
            PACKAGE,
            r#"{"devDependencies":{"vite":"8"}}"#,
            r#"{"scripts":{"postinstall":"node x"}}"#,
            r#"{"workspaces":["packages/*"]}"#,
        ] {
            assert!(need(&[("package.json", package)]).is_some(), "{package}");
        }
    }

    #[test]
    fn the_lockfile_chooses_the_manager() {
        let manager = |locks: &[(&str, &str)]| {
            let mut files = vec![("package.json", PACKAGE)];
            files.extend(locks);
            need(&files).unwrap().manager
        };
        let npm = |locked| Manager::Npm { locked };
        assert_eq!(manager(&[]), npm(false));
        assert_eq!(manager(&[("package-lock.json", "{}")]), npm(true));
        assert_eq!(manager(&[("npm-shrinkwrap.json", "{}")]), npm(true));
        assert_eq!(manager(&[("pnpm-lock.yaml", "")]), Manager::Pnpm);
        assert_eq!(
            manager(&[("yarn.lock", "# yarn lockfile v1\n")]),
            Manager::Yarn
        );
        assert_eq!(
            manager(&[("yarn.lock", "#\n__metadata:\n  version: 8\n")]),
            npm(false)
        );
        assert_eq!(
            manager(&[("yarn.lock", ""), ("package-lock.json", "{}")]),
            npm(true)
        );
    }

    #[test]
    fn the_key_changes_with_what_gets_installed_and_with_nothing_else() {
        let key = |files: &[(&str, &str)]| need(files).unwrap().key;
        let lock = ("package-lock.json", "{\"a\":1}");
        let base = key(&[("package.json", PACKAGE), lock]);
        let renamed =
            r#"{ "version":"2", "dependencies": { "astro" : "7.3.5" }, "scripts":{"dev":"x"} }"#;
        assert_eq!(key(&[("package.json", renamed), lock]), base);
        for other in [
            key(&[("package.json", PACKAGE)]),
            key(&[
                ("package.json", PACKAGE),
                ("package-lock.json", "{\"a\":2}"),
            ]),
            key(&[
                ("package.json", PACKAGE),
                lock,
                (".npmrc", "legacy-peer-deps=true"),
            ]),
            key(&[
                ("package.json", r#"{"dependencies":{"astro":"7.3.4"}}"#),
                lock,
            ]),
            key(&[
                ("package.json", r#"{"devDependencies":{"astro":"7.3.5"}}"#),
                lock,
            ]),
            key(&[
                (
                    "package.json",
                    r#"{"dependencies":{"astro":"7.3.5"},"scripts":{"postinstall":"x"}}"#,
                ),
                lock,
            ]),
        ] {
            assert_ne!(other, base);
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("package.json"), PACKAGE).unwrap();
        std::fs::write(folder.path().join("package-lock.json"), lock.1).unwrap();
        assert_ne!(
            Need::read(folder.path(), 24).unwrap().unwrap().key,
            base,
            "another Node"
        );
    }

    #[test]
    fn what_is_no_plain_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("package.json")).unwrap();
        assert!(Need::read(folder.path(), 22).is_err());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("package.json"), "{").unwrap();
        let error = Need::read(folder.path(), 22).unwrap_err();
        assert!(
            error.to_string().contains("package.json is no JSON"),
            "{error}"
        );
    }
}
