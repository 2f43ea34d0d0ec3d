//! The real programs that the tests drive.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Where they are.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// The Claude Code CLI's native program.
    pub(crate) claude: PathBuf,
    /// `PATH` of the program under test: the folder of Node 22.12 or newer, then the system's.
    pub(crate) path: OsString,
}

/// Finds the CLI (`CLAUDE_BIN`, else as greenroom does) and Node (`GREENROOM_TEST_NODE`: the
/// program or its folder, else on `PATH`). Fails in one line where there is none: a test that
/// silently did nothing would prove nothing.
pub(crate) fn tools() -> &'static Tools {
    static TOOLS: OnceLock<Tools> = OnceLock::new();
    TOOLS.get_or_init(|| {
        let path = env::var_os("PATH");
        let setting = env::var_os("CLAUDE_BIN").map(PathBuf::from);
        let claude = greenroom::config::find_claude(
            setting.as_deref(),
            path.as_deref(),
            Path::new(env!("CARGO_MANIFEST_DIR")),
        );
        let claude =
            claude.expect("no Claude Code CLI: scripts/test installs it, or set CLAUDE_BIN");
        let node = find_node(path.as_deref()).expect(
            "no Node 22.12 or newer: scripts/test installs it, or set GREENROOM_TEST_NODE or PATH",
        );
        let folder = node.parent().expect("a program lies in a folder");
        let folders = [folder, Path::new("/usr/bin"), Path::new("/bin")];
        let path = env::join_paths(folders).expect("no colons in these");
        Tools { claude, path }
    })
}

/// Can the program be started here as on Fargate? Says so where not: it takes root, with all its
/// capabilities and uids, and the tools in a place that everybody reaches.
pub(crate) fn has_uid_road() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let has_uids = map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    let node = env::split_paths(&tools().path).next().unwrap_or_default();
    let is_reached = [tools().claude.clone(), node.join("node"), acting_claude()]
        .iter()
        .all(|program| greenroom::owner::is_passable(program));
    let can = is_root && has_uids && is_reached;
    if !can {
        eprintln!("skipped: root, all uids and tools that everybody reaches are needed");
    }
    can
}

/// The public tool that reads the CLI's transcripts (`CCUSAGE_BIN`, else where scripts/test puts
/// it). Fails in one line where there is none.
pub(crate) fn ccusage() -> PathBuf {
    let named = env::var_os("CCUSAGE_BIN").map(PathBuf::from);
    let brought = brought_tools().filter_map(|folder| {
        let name = folder.file_name()?.to_str()?;
        let arch = name.strip_prefix("ccusage-")?.rsplit_once('-')?.1;
        let package = format!("lib/node_modules/@ccusage/ccusage-linux-{arch}/bin/ccusage");
        Some(folder.join(package))
    });
    let mut found = named.into_iter().chain(brought);
    found
        .find(|program| program.is_file())
        .expect("no ccusage: scripts/test installs it, or set CCUSAGE_BIN")
}

/// Prometheus' own checker (`PROMTOOL_BIN`, on `PATH`, else where scripts/test puts it). There may be
/// none: it comes with Debian's packages alone.
pub(crate) fn promtool() -> Option<PathBuf> {
    let named = env::var_os("PROMTOOL_BIN").map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("promtool"));
    let on_path: Vec<_> = on_path.collect();
    let brought = brought_tools().map(|folder| folder.join("usr/bin/promtool"));
    let mut all = named.into_iter().chain(on_path).chain(brought);
    let found = all.find(|program| program.is_file());
    if found.is_none() {
        eprintln!(
            "not checked by promtool: there is none; scripts/test brings it, or set PROMTOOL_BIN"
        );
    }
    found
}

/// A folder with two WebSocket peers, npm's `ws` in `node_modules` and PyPI's `websockets` in
/// `python` (`WEBSOCKET_PEERS`, else where scripts/test puts it). Fails in one line where there is
/// none.
pub(crate) fn websocket_peers() -> PathBuf {
    let named = env::var_os("WEBSOCKET_PEERS").map(PathBuf::from);
    let mut found = named.into_iter().chain(brought_tools());
    found
        .find(|folder| folder.join("python/websockets").is_dir())
        .expect("no WebSocket peers: scripts/test installs them, or set WEBSOCKET_PEERS")
}

/// A folder with PyPI's `replicate`, Replicate's official client (`REPLICATE_CLIENT`, else where
/// scripts/test puts it). Fails in one line where there is none.
pub(crate) fn replicate_client() -> PathBuf {
    let named = env::var_os("REPLICATE_CLIENT").map(PathBuf::from);
    let mut found = named.into_iter().chain(brought_tools());
    found
        .find(|folder| folder.join("replicate/__init__.py").is_file())
        .expect("no Python client of Replicate: scripts/test installs it, or set REPLICATE_CLIENT")
}

/// A folder with PyPI's `huggingface_hub` (`HUB_CLIENT`, else where scripts/test puts it). There may be none.
pub(crate) fn hub_client() -> Option<PathBuf> {
    let named = env::var_os("HUB_CLIENT").map(PathBuf::from);
    let mut all = named.into_iter().chain(brought_tools());
    let found = all.find(|folder| folder.join("huggingface_hub").is_dir());
    if found.is_none() {
        eprintln!(
            "skipped: there is no huggingface_hub; scripts/test brings it, or set HUB_CLIENT"
        );
    }
    found
}

/// A folder with pnpm and yarn in `node_modules` (`PACKAGE_MANAGERS`, else where scripts/test puts
/// it). Fails in one line where there is none.
pub(crate) fn package_managers() -> PathBuf {
    let named = env::var_os("PACKAGE_MANAGERS").map(PathBuf::from);
    let mut found = named.into_iter().chain(brought_tools());
    found
        .find(|folder| folder.join("node_modules/pnpm/bin/pnpm.cjs").is_file())
        .expect("no pnpm and yarn: scripts/test installs them, or set PACKAGE_MANAGERS")
}

/// The folders that scripts/test made.
fn brought_tools() -> impl Iterator<Item = PathBuf> {
    let ours = || {
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
        cache.map(|cache| cache.join("greenroom-dev/tools"))
    };
    // As scripts/test says.
    let named = env::var_os("BROUGHT_TOOLS").map(PathBuf::from);
    let tools = named.or_else(ours);
    let folders = tools.and_then(|tools| std::fs::read_dir(tools).ok());
    folders
        .into_iter()
        .flatten()
        .flatten()
        .map(|folder| folder.path())
}

/// The stand-in for the CLI (`tests/acting`), for `CLAUDE_BIN`. The tests' runner builds it with them.
pub(crate) fn acting_claude() -> PathBuf {
    let test = env::current_exe().expect("a test is a program");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let program = profile.join("examples/acting-claude");
    assert!(
        program.is_file(),
        "{} is not built: run the tests without --test, or cargo build --examples",
        program.display()
    );
    program
}

fn find_node(path: Option<&OsStr>) -> Option<PathBuf> {
    let named = env::var_os("GREENROOM_TEST_NODE").map(PathBuf::from);
    let named = named.map(|named| {
        if named.is_dir() {
            named.join("node")
        } else {
            named
        }
    });
    let on_path = path.into_iter().flat_map(env::split_paths);
    named
        .into_iter()
        .chain(on_path.map(|folder| folder.join("node")))
        .filter(|program| program.is_file())
        .find(|program| is_new_enough(program))
}

fn is_new_enough(node: &Path) -> bool {
    #[expect(clippy::disallowed_methods, reason = "asks for a version")]
    let Ok(output) = Command::new(node).arg("--version").output() else {
        return false;
    };
    let version = String::from_utf8_lossy(&output.stdout);
    let mut numbers = version
        .trim()
        .trim_start_matches('v')
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(22), Some(12))
}
