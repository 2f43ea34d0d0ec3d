//! Finding the Claude Code CLI and Node.

use std::{
    env::consts,
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// The version of the Claude Code CLI that greenroom was tested with.
pub const TESTED_CLAUDE_VERSION: &str = "2.1.329";

/// The CLI to run: the setting (a path, or a name to look up), else the program of an installed
/// npm package (below `cwd`, or beside a folder of `PATH`), else `claude` on `PATH`. `None` where
/// that is no program; `/ready` tells.
///
/// Measured with 2.1.329: the package's own `bin/claude.exe` is a stub of 500 bytes that prints
/// an error where its install script did not run; the platform package's `claude` always works.
/// So wherever a package is met, its platform package is what is returned.
pub fn find_claude(
    setting: Option<&Path>,
    path_env: Option<&OsStr>,
    cwd: &Path,
) -> Option<PathBuf> {
    let on_path =
        |name: &Path| folders(path_env).find_map(|folder| real_program(&folder.join(name)));
    match setting {
        Some(path) if path.components().count() > 1 || path.is_absolute() => real_program(path),
        Some(name) => on_path(name),
        None => folders(path_env)
            .flat_map(|folder| {
                // npm puts links into `bin` for packages in `lib/node_modules`, and into
                // `node_modules/.bin` for those beside it.
                [folder.join("../lib/node_modules"), folder.join("..")]
            })
            .chain([cwd.join("node_modules")])
            .filter(|modules| modules.join(SCOPE).is_dir())
            .filter_map(|modules| fs::canonicalize(modules).ok())
            .filter(|modules| modules.ends_with("node_modules"))
            .find_map(|modules| platform_program(&modules))
            .or_else(|| on_path(Path::new("claude"))),
    }
}

/// The first `node` on `PATH`.
pub fn find_node(path_env: Option<&OsStr>) -> Option<PathBuf> {
    folders(path_env)
        .map(|folder| folder.join("node"))
        .find(|path| is_program(path))
}

const SCOPE: &str = "@anthropic-ai";

/// The folders of `PATH`. Empty and relative ones would mean the working directory: left out.
fn folders(path_env: Option<&OsStr>) -> impl Iterator<Item = PathBuf> + '_ {
    path_env
        .into_iter()
        .flat_map(|path| std::env::split_paths(path))
        .filter(|folder| folder.is_absolute())
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// The program behind a path; for a link into the npm package, the platform package's.
fn real_program(path: &Path) -> Option<PathBuf> {
    if !is_program(path) {
        return None;
    }
    let real = fs::canonicalize(path).ok()?;
    // In the container image `claude` on PATH is a link to us.
    if std::env::current_exe().is_ok_and(|us| us == real) {
        return None;
    }
    let package = real
        .ancestors()
        .find(|folder| folder.ends_with(Path::new(SCOPE).join("claude-code")));
    let Some(package) = package else {
        return Some(path.to_owned());
    };
    // Older packages are scripts and have no platform package; the stub alone is of no use.
    let is_stub = || real.extension().is_some_and(|ext| ext == "exe") && !is_elf(&real);
    package
        .ancestors()
        .nth(2)
        .and_then(platform_program)
        .or_else(|| (!is_stub()).then_some(real.clone()))
}

/// The platform package's program in a `node_modules`, hoisted or below the wrapper.
fn platform_program(modules: &Path) -> Option<PathBuf> {
    let os = if consts::OS == "macos" {
        "darwin"
    } else {
        consts::OS
    };
    let arch = match consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => other,
    };
    let nested = modules.join(SCOPE).join("claude-code/node_modules");
    [nested.as_path(), modules]
        .iter()
        .flat_map(|modules| {
            ["", "-musl"].map(|libc| {
                let package = format!("claude-code-{os}-{arch}{libc}");
                modules.join(SCOPE).join(package).join("claude")
            })
        })
        .find(|path| is_program(path))
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok()
        && magic == *b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, os::unix::fs::symlink};

    use super::*;

    fn program(path: &Path, content: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn path_of(folders: &[&Path]) -> OsString {
        std::env::join_paths(folders).unwrap()
    }

    fn platform() -> String {
        let arch = if consts::ARCH == "x86_64" {
            "x64"
        } else {
            "arm64"
        };
        format!("@anthropic-ai/claude-code-linux-{arch}/claude")
    }

    #[test]
    fn the_platform_packages_program_wins_over_the_stub() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let (bin, modules) = (root.join("bin"), root.join("lib/node_modules"));
        let stub = modules.join("@anthropic-ai/claude-code/bin/claude.exe");
        program(&stub, "#!/bin/sh\necho not installed >&2; exit 1\n");
        fs::create_dir_all(&bin).unwrap();
        symlink(
            "../lib/node_modules/@anthropic-ai/claude-code/bin/claude.exe",
            bin.join("claude"),
        )
        .unwrap();
        let path = path_of(&[&bin]);
        let find = |setting: Option<&str>| find_claude(setting.map(Path::new), Some(&path), &root);
        assert_eq!(find(None), None, "the stub alone is no program");

        let hoisted = modules.join(platform());
        program(&hoisted, "\x7fELF");
        assert_eq!(find(None).as_ref(), Some(&hoisted));
        assert_eq!(find(Some("claude")).as_ref(), Some(&hoisted), "by name");
        let stub = stub.to_str().unwrap();
        assert_eq!(
            find(Some(stub)).as_ref(),
            Some(&hoisted),
            "by the stub's path"
        );

        let nested = modules
            .join("@anthropic-ai/claude-code/node_modules")
            .join(platform());
        program(&nested, "\x7fELF");
        assert_eq!(find(None), Some(nested), "nearer to the wrapper");
    }

    #[test]
    fn the_installed_package_wins_over_path_and_the_setting_over_both() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let (bin, other) = (root.join("bin"), root.join("other/my-claude"));
        program(&bin.join("claude"), "#!/bin/sh\n");
        program(&other, "#!/bin/sh\n");
        let path = path_of(&[Path::new("relative"), &root.join("missing"), &bin]);
        let find = |setting: Option<&Path>| find_claude(setting, Some(&path), &root);
        assert_eq!(find(None), Some(bin.join("claude")));
        let package = root.join("node_modules").join(platform());
        program(&package, "\x7fELF");
        assert_eq!(find(None), Some(package));
        assert_eq!(find(Some(&other)), Some(other.clone()));
        assert_eq!(
            find(Some(&root.join("missing"))),
            None,
            "nothing stands in for the setting"
        );
        assert_eq!(find_claude(None, None, &root.join("bin")), None);
    }

    #[test]
    fn a_link_to_ourselves_is_no_cli() {
        let root = tempfile::tempdir().unwrap();
        let (ours, other) = (root.path().join("ours"), root.path().join("other"));
        fs::create_dir(&ours).unwrap();
        symlink(std::env::current_exe().unwrap(), ours.join("claude")).unwrap();
        program(&other.join("claude"), "#!/bin/sh\n");
        let path = path_of(&[&ours, &other]);
        let find = |setting: Option<&Path>| find_claude(setting, Some(&path), root.path());
        assert_eq!(find(None), Some(other.join("claude")), "the next one");
        assert_eq!(find(Some(&ours.join("claude"))), None);
    }

    #[test]
    fn node_is_the_first_program_of_that_name() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (root.path().join("a"), root.path().join("b"));
        program(&second.join("node"), "");
        fs::create_dir_all(first.join("node")).unwrap();
        let path = path_of(&[&first, &second]);
        assert_eq!(
            find_node(Some(&path)),
            Some(second.join("node")),
            "a folder is no program"
        );
        assert_eq!(find_node(None), None);
    }
}
