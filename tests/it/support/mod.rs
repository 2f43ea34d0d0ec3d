//! What end-to-end tests share: the real program in folders of its own, a stand-in for the model's
//! API with recorded requests, repositories made by the real git program, and waiting.
//!
//! ```ignore
//! let api = StandIn::start(json!({"rules": []})).await;
//! let folders = Folders::new();
//! let site = folders.site("site", SITE);
//! let greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
//! let alice = who("acme", "alice", "main");
//! greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
//! let result = greenroom.execute(&alice, "Change the heading to Hello").await.ok();
//! ```
//!
//! Nothing is shared between tests, no port is fixed, and every wait has a limit. A failing test
//! prints the program's log.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod folders;
mod greenroom;
mod hosting;
mod http;
mod hub;
mod processes;
mod replicate;
mod tools;

use std::time::{Duration, Instant};

use ::greenroom::{
    rehearsal::{Recorded, Rehearsal},
    task::Tasks,
};
use serde_json::{Value, json};

pub(crate) use folders::{Folders, SITE, files_below, git, holds};
pub(crate) use greenroom::{Options, TestGreenroom};
pub(crate) use hosting::{GIT_TOKEN, Hosting};
pub(crate) use http::{Answer, Events, Sent, ServerEvent, request, request_at, stream, try_stream};
pub(crate) use hub::{Content, HF_TOKEN, HF_TOKEN_READ, HubStandIn, Repository};
pub(crate) use processes::processes_below;
pub(crate) use replicate::{REPLICATE_TOKEN, StandInReplicate};
pub(crate) use tools::{
    acting_claude, ccusage, has_uid_road, hub_client, package_managers, promtool, replicate_client,
    tools, websocket_peers,
};

/// What anything may take on a slow and busy machine, twenty tenants' turns at once included.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// The key that the program is given; it may be found nowhere but in its own memory.
pub(crate) const CANARY: &str = "canary-key-7f3b2c9d4e";

/// [`wait_for`], with a condition that asks.
pub(crate) async fn wait_for_async<T>(what: &str, condition: impl AsyncFn() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until `condition` answers something; fails with `what` when that takes too long.
pub(crate) async fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One thread of a user of a client.
#[derive(Debug, Clone)]
pub(crate) struct Who {
    pub(crate) client: String,
    pub(crate) user: String,
    pub(crate) thread: String,
}

/// A thread by its three ids.
pub(crate) fn who(client: &str, user: &str, thread: &str) -> Who {
    Who {
        client: client.to_owned(),
        user: user.to_owned(),
        thread: thread.to_owned(),
    }
}

impl Who {
    /// `fields` with the three ids.
    pub(crate) fn body(&self, fields: Value) -> Value {
        let mut body = fields;
        for (name, id) in [
            ("clientId", &self.client),
            ("userId", &self.user),
            ("threadId", &self.thread),
        ] {
            body[name] = json!(id);
        }
        body
    }

    /// Its branch, by the contract.
    pub(crate) fn branch(&self) -> String {
        format!("thread/{}/{}/{}", self.client, self.user, self.thread)
    }

    /// Its address below `/api`.
    pub(crate) fn path(&self) -> String {
        format!(
            "/api/clients/{}/users/{}/threads/{}",
            self.client, self.user, self.thread
        )
    }
}

/// The rehearsal as the model's API, in the test's own process: it does what a script says (see
/// `greenroom::rehearsal::Script`) and understands plain instructions otherwise.
pub(crate) struct StandIn {
    rehearsal: Rehearsal,
    tasks: Tasks,
}

impl StandIn {
    /// Serves a script on loopback, for as long as this value lives.
    pub(crate) async fn start(script: Value) -> Self {
        let script = serde_json::from_value(script).expect("the script is one");
        let tasks = Tasks::new();
        let rehearsal = Rehearsal::start(script, &tasks).await.unwrap();
        Self { rehearsal, tasks }
    }

    /// Its address, for `ANTHROPIC_BASE_URL`.
    pub(crate) fn url(&self) -> String {
        self.rehearsal.url()
    }

    /// What was asked for so far.
    pub(crate) fn requests(&self) -> Vec<Recorded> {
        self.rehearsal.requests()
    }

    /// The requests of turns whose instruction holds `text`.
    pub(crate) fn requests_about(&self, text: &str) -> Vec<Recorded> {
        let mut requests = self.requests();
        requests.retain(|request| request.instruction.contains(text));
        requests
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

/// A script's rule: at an instruction with `says` in it the model makes these calls, one an
/// answer, then says "Done.".
pub(crate) fn rule(says: &str, calls: &[(&str, Value)]) -> Value {
    let steps: Vec<Value> = calls
        .iter()
        .map(|(name, input)| json!({"tool": {"name": name, "input": input}}))
        .collect();
    json!({"match": says, "steps": steps})
}

/// A call of the model's that writes a new file of the site.
pub(crate) fn writes(path: &str, content: &str) -> (&'static str, Value) {
    (
        "Write",
        json!({"file_path": format!("{{cwd}}/{path}"), "content": content}),
    )
}

/// A call of the model's that runs a command.
pub(crate) fn runs(command: &str) -> (&'static str, Value) {
    (
        "Bash",
        json!({"command": command, "description": "a command"}),
    )
}
