//! Installing dependencies with a stand-in for npm: a real child, no network.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use greenroom::{
    process::{ConfinementMode, Launcher},
    workspace::{Attached, AttachedKind, Dependencies, DependencyRequest, InstallError, NodeTools},
};
use tokio::time::timeout;

use crate::support::package_managers;

const SOON: Duration = Duration::from_secs(120);

/// Notes each run in its download folder, then does as the site's package.json says.
const NPM: &str = r#"
const fs = require("fs"), env = process.env;
const site = JSON.parse(fs.readFileSync("package.json"));
fs.appendFileSync(env.npm_config_cache + "/runs", process.argv[2] + "\n");
if (site.fails) {
  for (let i = 1; i <= 60; i++) console.error(`\u001b[31mline ${i}\u001b[39m`);
  process.exit(7);
}
if (process.argv[2] === "ci" && site.refused) {
  console.error("npm error code EUSAGE");
  for (let i = 1; i <= 60; i++) console.error(`npm error Missing: p${i} from lock file`);
  process.exit(1);
}
fs.mkdirSync("node_modules/p", { recursive: true });
fs.writeFileSync("node_modules/p/index.js", fs.readFileSync("committed.txt"));
"#;

struct Bench {
    disk: tempfile::TempDir,
    dependencies: Dependencies,
}

impl Bench {
    fn new() -> Self {
        let disk = tempfile::tempdir().unwrap();
        let npm = disk.path().join("npm/bin/npm-cli.cjs");
        std::fs::create_dir_all(npm.parent().unwrap()).unwrap();
        std::fs::write(&npm, NPM).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        let node = std::env::split_paths(&path)
            .map(|p| p.join("node"))
            .find(|p| p.is_file());
        let tools = NodeTools {
            egress: None,
            node: node.expect("Node on PATH"),
            npm,
            env: Vec::new(),
            readable: Vec::new(),
        };
        let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
        let launcher =
            Launcher::start_with_binary(binary, SOON * 4, ConfinementMode::Auto).unwrap();
        Self {
            disk,
            dependencies: Dependencies::new(launcher, tools),
        }
    }

    fn worktree(&self, name: &str, more: &str) -> PathBuf {
        let worktree = self.disk.path().join(name);
        std::fs::create_dir_all(&worktree).unwrap();
        let package = format!(r#"{{"dependencies":{{"p":"1"}}{more}}}"#);
        std::fs::write(worktree.join("package.json"), package).unwrap();
        std::fs::write(
            worktree.join("package-lock.json"),
            format!("{{\"of\":{more:?}}}"),
        )
        .unwrap();
        worktree
    }

    async fn ensure(&self, worktree: &Path) -> Result<Attached, InstallError> {
        let request = DependencyRequest {
            worktree: worktree.to_owned(),
            export: |to: &Path| std::fs::write(to.join("committed.txt"), "committed"),
            cache: self.disk.path().join("cache"),
            archives: Some(self.disk.path().join("archives")),
        };
        let attached = timeout(SOON, self.dependencies.ensure(request, |_| ()))
            .await
            .unwrap()?;
        if let Some(unkept) = attached.unkept.clone() {
            timeout(SOON, self.dependencies.keep(unkept)).await.unwrap();
        }
        Ok(attached)
    }

    fn archives(&self) -> Vec<PathBuf> {
        let folder = std::fs::read_dir(self.disk.path().join("archives"));
        let mut all: Vec<_> = folder.unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    }

    fn break_archive(&self) {
        for archive in self.archives() {
            let mut bytes = std::fs::read(&archive).unwrap();
            bytes.truncate(bytes.len() - 3);
            std::fs::write(&archive, bytes).unwrap();
        }
    }

    /// As a new container begins.
    fn lose_cache(&self) {
        std::fs::remove_dir_all(self.disk.path().join("cache")).unwrap();
    }

    /// What npm was asked for so far.
    fn runs(&self) -> String {
        let runs = self.disk.path().join("cache/downloads/runs");
        std::fs::read_to_string(runs).unwrap_or_default()
    }
}

#[tokio::test]
async fn two_threads_install_once() {
    let bench = Bench::new();
    let (a, b) = (bench.worktree("a", ""), bench.worktree("b", ""));
    let (first, second) = tokio::join!(bench.ensure(&a), bench.ensure(&b));
    let mut kinds = [first.unwrap().kind, second.unwrap().kind];
    kinds.sort_by_key(|kind| *kind == AttachedKind::Cached);
    assert_eq!(kinds, [AttachedKind::Installed, AttachedKind::Cached]);
    assert_eq!(bench.runs(), "ci\n");
    for worktree in [&a, &b] {
        let text = std::fs::read_to_string(worktree.join("node_modules/p/index.js")).unwrap();
        assert_eq!(text, "committed", "scripts at install see the site's files");
    }
    assert_eq!(bench.ensure(&a).await.unwrap().kind, AttachedKind::Current);
    assert_eq!(bench.runs(), "ci\n");
}

#[tokio::test]
async fn a_lockfile_that_npm_refuses_is_installed_from_all_the_same() {
    let bench = Bench::new();
    let worktree = bench.worktree("a", r#","refused":true"#);
    assert_eq!(
        bench.ensure(&worktree).await.unwrap().kind,
        AttachedKind::Installed
    );
    assert_eq!(bench.runs(), "ci\ninstall\n");
}

#[tokio::test]
async fn a_failed_install_shows_its_last_lines_and_leaves_nothing_behind() {
    let bench = Bench::new();
    let worktree = bench.worktree("a", r#","fails":true"#);
    for _ in 0..2 {
        let error = bench.ensure(&worktree).await.unwrap_err();
        let InstallError::Failed { exit, output, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(exit.code, Some(7));
        assert!(
            output.starts_with("line 41\n") && output.ends_with("line 60"),
            "{output:?}"
        );
        assert!(!worktree.join("node_modules").exists());
    }
    // A failure is no master: the next one tries again.
    assert_eq!(bench.runs(), "ci\nci\n");
}

#[tokio::test]
async fn a_file_that_is_overwritten_in_place_reaches_no_later_thread() {
    let bench = Bench::new();
    let a = bench.worktree("a", "");
    assert_eq!(
        bench.ensure(&a).await.unwrap().kind,
        AttachedKind::Installed
    );
    let file = a.join("node_modules/p/index.js");
    let before = std::fs::metadata(&file).unwrap();
    assert!(before.permissions().readonly(), "one has to want it");
    // Of the same length, with its old time.
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let open = std::fs::File::options().write(true).open(&file).unwrap();
    std::io::Write::write_all(&mut &open, b"poisoned!").unwrap();
    open.set_modified(before.modified().unwrap()).unwrap();

    // Once more from the archive, and once from the registry where that is broken too.
    for (name, kind) in [
        ("b", AttachedKind::Restored),
        ("c", AttachedKind::Installed),
    ] {
        if kind == AttachedKind::Installed {
            bench.break_archive();
            bench.lose_cache();
        }
        let worktree = bench.worktree(name, "");
        assert_eq!(bench.ensure(&worktree).await.unwrap().kind, kind);
        let text = std::fs::read_to_string(worktree.join("node_modules/p/index.js")).unwrap();
        assert_eq!(text, "committed");
    }
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "poisoned!",
        "its own"
    );
}

#[tokio::test]
async fn a_new_container_unpacks_instead_of_installing() {
    let bench = Bench::new();
    let a = bench.worktree("a", "");
    bench.ensure(&a).await.unwrap();
    bench.lose_cache();
    let b = bench.worktree("b", "");
    assert_eq!(bench.ensure(&b).await.unwrap().kind, AttachedKind::Restored);
    let text = std::fs::read_to_string(b.join("node_modules/p/index.js")).unwrap();
    assert_eq!(text, "committed");
    assert_eq!(bench.runs(), "", "npm was not asked again");

    // Two lockfiles beside each other have each their own.
    let other = bench.worktree("c", r#","more":1"#);
    assert_eq!(
        bench.ensure(&other).await.unwrap().kind,
        AttachedKind::Installed
    );
    assert_eq!(bench.archives().len(), 2);
    assert_eq!(bench.ensure(&a).await.unwrap().kind, AttachedKind::Current);

    // Another's archive under the name of ours is no use.
    let archives = bench.archives();
    bench.lose_cache();
    std::fs::copy(&archives[0], &archives[1]).unwrap();
    let kinds = [
        bench.ensure(&bench.worktree("d", "")).await.unwrap().kind,
        bench
            .ensure(&bench.worktree("e", r#","more":1"#))
            .await
            .unwrap()
            .kind,
    ];
    assert!(kinds.contains(&AttachedKind::Restored) && kinds.contains(&AttachedKind::Installed));
}

/// Copies a folder, as far as it has plain files.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (kind, target) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &target);
        } else if kind.is_file() {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

const PNPM_LOCK: &str = "lockfileVersion: '9.0'
settings:
  autoInstallPeers: true
  excludeLinksFromLockfile: false
importers:
  .:
    dependencies:
      p:
        specifier: file:./vendor/p
        version: file:vendor/p
packages:
  p@file:vendor/p:
    resolution: {directory: vendor/p, type: directory}
snapshots:
  p@file:vendor/p: {}
";
const YARN_LOCK: &str = "# yarn lockfile v1

\"p@file:./vendor/p\":
  version \"1.0.0\"
";

/// The real ones, on a package that needs no network.
#[tokio::test]
async fn sites_of_pnpm_and_yarn_are_installed_linked_and_restored() {
    for (lockfile, text) in [("pnpm-lock.yaml", PNPM_LOCK), ("yarn.lock", YARN_LOCK)] {
        let bench = Bench::new();
        let managers = bench.disk.path().join("cache/downloads/managers");
        copy(&package_managers(), &managers);
        let site = bench.disk.path().join("site");
        std::fs::create_dir_all(site.join("vendor/p")).unwrap();
        for (name, text) in [
            (
                "package.json",
                r#"{"private":true,"dependencies":{"p":"file:./vendor/p"}}"#,
            ),
            (lockfile, text),
            ("vendor/p/package.json", r#"{"name":"p","version":"1.0.0"}"#),
            ("vendor/p/index.js", "of the package"),
        ] {
            std::fs::write(site.join(name), text).unwrap();
        }
        for (name, kind) in [
            ("a", AttachedKind::Installed),
            ("b", AttachedKind::Cached),
            ("c", AttachedKind::Restored),
        ] {
            if kind == AttachedKind::Restored {
                // The package manager goes with it, and is not fetched again.
                bench.lose_cache();
            }
            let worktree = bench.disk.path().join(name);
            copy(&site, &worktree);
            let from = site.clone();
            let request = DependencyRequest {
                worktree: worktree.clone(),
                export: move |to: &Path| {
                    copy(&from, to);
                    Ok(())
                },
                cache: bench.disk.path().join("cache"),
                archives: Some(bench.disk.path().join("archives")),
            };
            let attached = timeout(SOON, bench.dependencies.ensure(request, |_| ()));
            let attached = attached.await.unwrap();
            let attached = attached.unwrap_or_else(|error| panic!("{lockfile} {name}: {error}"));
            if let Some(unkept) = attached.unkept {
                bench.dependencies.keep(unkept).await;
            }
            assert_eq!(attached.kind, kind, "{lockfile} {name}");
            let file = worktree.join("node_modules/p/index.js");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "of the package");
            let meta = std::fs::metadata(&file).unwrap();
            let links = std::os::unix::fs::MetadataExt::nlink(&meta);
            assert!(links > 1 && meta.permissions().readonly(), "{links}");
            assert!(!managers.exists() || kind != AttachedKind::Restored);
        }
    }
}
