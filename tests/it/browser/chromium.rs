//! A headless Chromium, driven over its DevTools socket.

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    sync::Mutex,
    time::{sleep, timeout},
};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async, tungstenite::Message};

use crate::support::{PATIENCE, wait_for};

/// The browser. It ends when this value goes.
pub(super) struct Chromium {
    _process: Child,
    _profile: tempfile::TempDir,
    socket: Arc<Mutex<Socket>>,
}

struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    last_id: u64,
    /// What pages complained about, as (session, text).
    complaints: Vec<(String, String)>,
}

/// A tab, or a frame in one that belongs to another site.
pub(super) struct Page {
    socket: Arc<Mutex<Socket>>,
    session: String,
}

/// `CHROMIUM_BIN`, else a browser of the system. Fails in one line where there is none.
fn program() -> PathBuf {
    let named = std::env::var_os("CHROMIUM_BIN").map(PathBuf::from);
    let usual = ["chromium", "chromium-browser", "google-chrome"];
    let usual = usual.map(|name| PathBuf::from("/usr/bin").join(name));
    named
        .into_iter()
        .chain(usual)
        .find(|path| path.is_file())
        .expect("no Chromium: scripts/test installs it, or set CHROMIUM_BIN")
}

impl Chromium {
    pub(super) async fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        #[expect(clippy::disallowed_methods, reason = "the browser of a test")]
        let process = Command::new(program())
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--force-color-profile=srgb",
                "--window-size=1440,900",
                "--remote-debugging-port=0",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .env("LANG", "en_US.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let file = profile.path().join("DevToolsActivePort");
        let address = wait_for("Chromium says where it listens", || {
            let text = fs::read_to_string(&file).ok()?;
            let (port, path) = text.split_once('\n')?;
            path.starts_with("/devtools")
                .then(|| format!("ws://127.0.0.1:{port}{}", path.trim()))
        })
        .await;
        let connected = timeout(PATIENCE, connect_async(&address)).await;
        let (stream, _) = connected.expect("Chromium answers").unwrap();
        let socket = Socket {
            stream,
            last_id: 0,
            complaints: Vec::new(),
        };
        Self {
            _process: process,
            _profile: profile,
            socket: Arc::new(Mutex::new(socket)),
        }
    }

    /// A new tab at this address, not waiting for it to load.
    pub(super) async fn open(&self, url: &str) -> Page {
        self.open_with(url, "").await
    }

    /// A new tab that runs a script before any of its pages' own.
    pub(super) async fn open_with(&self, url: &str, script: &str) -> Page {
        let target = self.create("about:blank").await;
        let page = Page::attach(self.socket.clone(), &target).await;
        let size = json!({"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        page.call("Emulation.setDeviceMetricsOverride", size).await;
        page.call(
            "Page.addScriptToEvaluateOnNewDocument",
            json!({"source": script}),
        )
        .await;
        page.call("Page.navigate", json!({"url": url})).await;
        page
    }

    async fn create(&self, url: &str) -> String {
        let mut socket = self.socket.lock().await;
        let created = socket
            .call(None, "Target.createTarget", json!({"url": url}))
            .await;
        text(&created["targetId"])
    }
}

impl Socket {
    async fn call(&mut self, session: Option<&str>, method: &str, params: Value) -> Value {
        self.try_call(session, method, params)
            .await
            .unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Sends a command and reads until its answer; notes what pages complain about on the way.
    async fn try_call(
        &mut self,
        session: Option<&str>,
        method: &str,
        params: Value,
    ) -> Result<Value, String> {
        self.last_id += 1;
        let mut command = json!({"id": self.last_id, "method": method, "params": params});
        if let Some(session) = session {
            command["sessionId"] = json!(session);
        }
        let sent = self.stream.send(Message::text(command.to_string())).await;
        sent.map_err(|error| error.to_string())?;
        let answer = async {
            loop {
                let message = self.stream.next().await;
                let message = message.expect("Chromium runs").expect("it speaks");
                let Message::Text(message) = message else {
                    continue;
                };
                let mut message: Value = serde_json::from_str(&message).unwrap();
                if message["id"] == self.last_id {
                    return match &message["error"] {
                        Value::Null => Ok(message["result"].take()),
                        error => Err(error.to_string()),
                    };
                }
                if let Some(complaint) = complaint(&message) {
                    self.complaints
                        .push((text(&message["sessionId"]), complaint));
                }
            }
        };
        timeout(PATIENCE, answer)
            .await
            .unwrap_or_else(|_| panic!("Chromium never answered {method}"))
    }
}

/// An error that a person would find in the console.
fn complaint(event: &Value) -> Option<String> {
    let params = &event["params"];
    match event["method"].as_str()? {
        "Runtime.exceptionThrown" => Some(params["exceptionDetails"].to_string()),
        "Runtime.consoleAPICalled" if params["type"] == "error" => Some(params["args"].to_string()),
        "Log.entryAdded" if params["entry"]["level"] == "error" => {
            Some(params["entry"].to_string())
        }
        _ => None,
    }
}

impl Page {
    async fn attach(socket: Arc<Mutex<Socket>>, target: &str) -> Self {
        let params = json!({"targetId": target, "flatten": true});
        let attached = socket
            .lock()
            .await
            .call(None, "Target.attachToTarget", params)
            .await;
        let page = Self {
            socket,
            session: text(&attached["sessionId"]),
        };
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            page.call(domain, json!({})).await;
        }
        page
    }

    async fn try_call(&self, method: &str, params: Value) -> Result<Value, String> {
        let mut socket = self.socket.lock().await;
        socket.try_call(Some(&self.session), method, params).await
    }

    pub(super) async fn call(&self, method: &str, params: Value) -> Value {
        let answer = self.try_call(method, params).await;
        answer.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// The value of an expression; a promise's once it is there. An error of the page's, or a page
    /// that goes away meanwhile, is `Err`.
    pub(super) async fn try_eval(&self, expression: &str) -> Result<Value, String> {
        let params = json!({
            "expression": expression,
            "awaitPromise": true,
            "returnByValue": true,
            "userGesture": true,
        });
        let mut answer = self.try_call("Runtime.evaluate", params).await?;
        match &answer["exceptionDetails"] {
            Value::Null => Ok(answer["result"]["value"].take()),
            error => Err(error.to_string()),
        }
    }

    #[track_caller]
    pub(super) fn eval<'a>(&'a self, expression: &'a str) -> impl Future<Output = Value> + use<'a> {
        let caller = std::panic::Location::caller();
        async move {
            let answer = self.try_eval(expression).await;
            answer.unwrap_or_else(|error| panic!("{caller}: {expression}: {error}"))
        }
    }

    /// Waits until an expression is truthy, through reloads of the page. Answers its value.
    pub(super) async fn wait_for(&self, expression: &str) -> Value {
        let begun = Instant::now();
        loop {
            let value = self.try_eval(expression).await;
            let is_truthy = value.as_ref().is_ok_and(|value| {
                !matches!(value, Value::Null | Value::Bool(false)) && value != "" && value != 0
            });
            if is_truthy {
                return value.expect("it is there");
            }
            if begun.elapsed() > PATIENCE {
                let shown = self.try_eval("document.body.innerText").await;
                panic!("never true: {expression} ({value:?}); the page shows {shown:?}");
            }
            sleep(Duration::from_millis(30)).await;
        }
    }

    /// Waits until the first element that fits a selector holds a text.
    pub(super) async fn wait_for_text(&self, selector: &str, text: &str) {
        let (selector, text) = (json!(selector), json!(text));
        self.wait_for(&format!(
            "document.querySelector({selector})?.textContent.includes({text})"
        ))
        .await;
    }

    /// Types a text where the focus is.
    pub(super) async fn type_text(&self, text: &str) {
        self.call("Input.insertText", json!({"text": text})).await;
    }

    /// Presses and releases a key that has no text but Enter's.
    pub(super) async fn press(&self, key: &str) {
        let (code, text) = match key {
            "Enter" => (13, "\r"),
            "Tab" => (9, ""),
            "Escape" => (27, ""),
            other => panic!("no such key: {other}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
            });
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = json!(text);
            }
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// The frame in this page whose address begins so. It belongs to another site than the page,
    /// so it is a target of its own.
    pub(super) async fn frame(&self, url: &str) -> Page {
        let begun = Instant::now();
        let target = loop {
            let mut socket = self.socket.lock().await;
            let targets = socket.call(None, "Target.getTargets", json!({})).await;
            drop(socket);
            let targets = targets["targetInfos"].as_array().unwrap();
            let frame = targets.iter().find(|target| {
                target["type"] == "iframe"
                    && target["url"]
                        .as_str()
                        .is_some_and(|other| other.starts_with(url))
            });
            if let Some(frame) = frame {
                break text(&frame["targetId"]);
            }
            assert!(begun.elapsed() < PATIENCE, "no frame at {url}: {targets:?}");
            sleep(Duration::from_millis(30)).await;
        };
        Self::attach(self.socket.clone(), &target).await
    }

    /// Errors in the console so far.
    pub(super) async fn complaints(&self) -> Vec<String> {
        // Those that were sent before this answer are read with it.
        self.eval("0").await;
        let socket = self.socket.lock().await;
        let own = socket
            .complaints
            .iter()
            .filter(|(session, _)| *session == self.session);
        own.map(|(_, complaint)| complaint.clone()).collect()
    }

    /// Brings the tab to the front: the others of its window are hidden then.
    pub(super) async fn show(&self) {
        self.call("Page.bringToFront", json!({})).await;
    }

    /// A picture for people, as `{name}.png` in the folder `GREENROOM_SCREENSHOTS`, where that is
    /// set.
    pub(super) async fn screenshot(&self, name: &str) {
        let Some(folder) = std::env::var_os("GREENROOM_SCREENSHOTS").map(PathBuf::from) else {
            return;
        };
        let shot = self
            .call("Page.captureScreenshot", json!({"format": "png"}))
            .await;
        let png = BASE64_STANDARD.decode(text(&shot["data"])).unwrap();
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{name}.png")), png).unwrap();
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
