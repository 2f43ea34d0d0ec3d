//! What a person sees: the real CLI in rehearsal, real Astro on the built-in template, headless
//! Chromium.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod alt_text;
mod chromium;
mod life;
mod private;
mod site;
mod studio;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::support::{Folders, Options, PATIENCE, TestGreenroom, Who, git, who};
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
        let options = Options::new(&folders).rehearsal().astro();
        // First: the program may end by itself before a slow machine has started a browser.
        let chromium = Chromium::start().await;
        let greenroom = TestGreenroom::start(more(options)).await;
        Self {
            program: greenroom.pid(),
            greenroom,
            chromium,
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

    /// Opens the page at `/`.
    async fn studio(&self) -> Page {
        let url = format!("http://localhost:{}/", self.greenroom.api_port);
        self.chromium.open(&url).await
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

/// Waits until a page that [hears](listen) is whole and has been told nothing for a second: what was
/// to be said of earlier changes has been said.
async fn settles(page: &Page) {
    let begun = Instant::now();
    let mut before = Value::Null;
    loop {
        let told =
            "document.readyState === 'complete' && `${performance.timeOrigin} ${heard.length}`";
        let now = page.try_eval(told).await.unwrap_or_default();
        if now.is_string() && now == before {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "it never comes to rest");
        before = now;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Waits until the page is connected to its dev server.
async fn hears(page: &Page) {
    page.wait_for("window.heard?.some((data) => data.includes('\"connected\"'))")
        .await;
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
