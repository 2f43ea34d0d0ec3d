//! What a person sees: the real CLI in rehearsal, real Astro on the built-in template, headless
//! Chromium.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod chromium;
mod life;
mod site;
mod studio;

use std::{ffi::OsString, fs, path::Path};

use serde_json::json;
use tokio::sync::{Mutex, MutexGuard};

use crate::support::{Folders, Options, TestGreenroom, Who, git, who};
use chromium::{Chromium, Page};

/// A dev server, a CLI and a browser take most of a gigabyte: within one process one after the
/// other. (nextest has a process for each test, and a group for these.)
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The program on the built-in template, and a browser.
struct Room {
    folders: Folders,
    greenroom: TestGreenroom,
    chromium: Chromium,
    program: u32,
    _turn: MutexGuard<'static, ()>,
}

/// Notes what a page hears over its sockets, in `heard`.
const LISTEN: &str = "
    window.heard = [];
    window.WebSocket = class extends WebSocket {
        constructor(...args) {
            super(...args);
            this.addEventListener('message', ({ data }) => heard.push(data));
        }
    };";

impl Room {
    async fn start() -> Self {
        Self::with(|options| options).await
    }

    async fn with(more: impl FnOnce(Options) -> Options) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let folders = Folders::new();
        // Of one file system with the workspaces, and there from test to test: Astro is installed
        // once. That takes one client and user, since masters are not shared between tenants.
        let cache =
            std::env::temp_dir().join(format!("greenroom-test-cache-{}", nix::unistd::getuid()));
        let mut options = Options::new(&folders)
            .rehearsal()
            .previews()
            .env("CACHE_PATH", cache)
            // A slow machine is no failure.
            .env("PREVIEW_READY_SECONDS", "300");
        for (name, value) in npm_settings() {
            options = options.env(&name, value);
        }
        let greenroom = TestGreenroom::start(more(options)).await;
        Self {
            program: greenroom.pid(),
            greenroom,
            chromium: Chromium::start().await,
            folders,
            _turn: turn,
        }
    }

    /// Makes a thread ready. Answers the address of its preview, which is live.
    async fn init(&self, who: &Who) -> String {
        let answer = self.greenroom.init(who, json!({})).await.ok();
        assert_eq!(answer["preview"]["state"], "live", "{answer}");
        answer["preview"]["url"].as_str().unwrap().to_owned()
    }

    /// Opens a preview and waits until its page hears of edits.
    async fn open(&self, url: &str) -> Page {
        let page = self.chromium.open(url).await;
        page.wait_for("document.readyState === 'complete'").await;
        listen(&page).await;
        page
    }

    fn git(&self, who: &Who, args: &[&str]) -> String {
        git(self.folders.worktree(who), args)
    }

    /// Processes that have to do with this test's folders, the program itself left out.
    fn children(&self) -> Vec<(i32, String)> {
        processes_of(&self.folders.join(""))
            .into_iter()
            .filter(|(pid, command)| {
                u32::try_from(*pid).unwrap() != self.program && !command.contains("chrom")
            })
            .collect()
    }
}

/// The threads of these tests.
fn thread(name: &str) -> Who {
    who("demo", "me", name)
}

/// Loads a page of a site anew; it notes what it hears from now on, and hears of edits.
///
/// The first page that listens to a new dev server is sent a stale "load again" (measured with
/// astro 7.3.5), so it is loaded twice. An edit while a page
/// loads can pass it by, as it can with Vite alone.
async fn listen(page: &Page) {
    page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        json!({"source": LISTEN}),
    )
    .await;
    for _ in 0..2 {
        page.eval("window.heard = []; location.reload()").await;
        hears(page).await;
    }
}

/// Waits until the page is connected to its dev server.
async fn hears(page: &Page) {
    page.wait_for("window.heard?.some((data) => data.includes('\"connected\"'))")
        .await;
}

/// What npm was told where the tests were started.
fn npm_settings() -> Vec<(String, OsString)> {
    let mut settings: Vec<(String, OsString)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| {
            let name = name.to_ascii_lowercase();
            name.starts_with("npm_config_")
                || [
                    "http_proxy",
                    "https_proxy",
                    "no_proxy",
                    "node_extra_ca_certs",
                ]
                .contains(&name.as_str())
        })
        .collect();
    let config = std::env::home_dir().unwrap_or_default().join(".npmrc");
    if config.is_file() {
        settings.push(("npm_config_userconfig".to_owned(), config.into()));
    }
    settings
}

/// Process ids and command lines of what works in a folder, or names it.
fn processes_of(folder: &Path) -> Vec<(i32, String)> {
    let name = folder.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            (command.contains(name) || cwd.starts_with(folder)).then_some((pid, command))
        })
        .collect()
}
