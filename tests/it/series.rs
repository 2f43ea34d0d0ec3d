//! CLIs that a series of one-shot runs starts ahead: each serves one run or none, and goes.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use greenroom::{
    agent::{AgentSettings, Ceiling, Limits},
    domain::Account,
    gateway::{Credential, Gateway, GatewayConfig, OAuthSettings},
    process::{ConfinementMode, Launcher},
    service::{Args, Lean, RunSite, Series, Service, ServiceSettings, Shot},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};
use serde_json::json;

use crate::{
    label_batch::cli_that,
    support::{Folders, PATIENCE, StandIn, tools, wait_for},
};

/// A service with a stand-in for the CLI and for the API, in this process.
struct Room {
    service: Service,
    api: StandIn,
    folders: Folders,
    tasks: Tasks,
}

impl Room {
    async fn start() -> Self {
        // Long enough for the next one to be started meanwhile.
        let step = json!({"delay_ms": 1000, "text": "Yes"});
        let api = StandIn::start(json!({"rules": [{"match": "", "steps": [step]}]})).await;
        let folders = Folders::new();
        let says = "message.content[0].text += ` pid ${process.pid}`;";
        let cli = cli_that(&folders, says);
        // It tells that it was started before it is told anything.
        let program = folders.join("cli/told");
        let (started, cli) = (folders.join("started"), cli.display().to_string());
        let script = format!(
            "#!/bin/sh\necho $$ >> {}\nexec {cli} \"$@\"\n",
            started.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();

        let tasks = Tasks::new();
        let config = GatewayConfig {
            upstream: api.url().parse().unwrap(),
            credential: Credential::Rehearsal,
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(LedgerSettings::default(), &tasks),
        };
        let gateway = Gateway::start(config, &tasks).await.unwrap();
        let agent = AgentSettings {
            program,
            gateway_url: gateway.base_url(),
            gateway_port: gateway.port(),
            egress: None,
            model: None,
            max_output_tokens: None,
            tools: Vec::new(),
            path: tools().path.clone(),
            tool_folders: Vec::new(),
            is_confined: false,
            limits: Limits::default(),
            ceiling: Ceiling::default(),
        };
        let settings = ServiceSettings {
            agent: Some(Arc::new(agent)),
            max_concurrent: 4,
            scratch: folders.join("runs"),
            allowance: None,
            mask: str::to_owned,
        };
        let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
        // What ends a CLI is what the test did.
        let launcher =
            Launcher::start_with_binary(binary, PATIENCE * 4, ConfinementMode::Off).unwrap();
        Self {
            service: Service::new(settings, launcher, gateway, tasks.clone()),
            api,
            folders,
            tasks,
        }
    }

    /// Asks for something; the process that asked the API for it.
    async fn run(&self, series: &Series, system: &str, says: &str) -> i32 {
        let content = json!([{"type": "text", "text": says}]);
        let line = json!({"type": "user", "message": {"role": "user", "content": content}});
        let lean = Lean {
            system: system.to_owned(),
            ..Lean::default()
        };
        let shot = Shot {
            prompt: format!("{line}\n"),
            args: Args::from(lean),
            timeout: PATIENCE,
            account: Account::of_kind(Account::LABEL),
            gate: None,
            series: Some(series.clone()),
        };
        let answer = self.service.execute(shot, RunSite::default()).await;
        assert!(
            answer
                .as_ref()
                .is_ok_and(|answer| answer.output.contains("Yes")),
            "{answer:?}"
        );
        let asked = self.api.requests_about(says);
        assert_eq!(asked.len(), 1, "{asked:?}");
        let (_, pid) = asked[0].instruction.rsplit_once(' ').unwrap();
        pid.parse().unwrap()
    }

    /// The processes that were started, in their order.
    fn started(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.folders.join("started")).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    /// One that nobody has told anything, when there are so many.
    async fn ahead(&self, count: usize) -> i32 {
        let started = wait_for("a CLI started ahead", || {
            let started = self.started();
            (started.len() == count).then_some(started)
        });
        *started.await.last().unwrap()
    }

    /// Waits until nothing of the CLIs is left, nor of their folders.
    async fn wait_gone(&self) {
        wait_for("the end of all CLIs", || {
            let is_gone = |pid: i32| !PathBuf::from(format!("/proc/{pid}")).exists();
            self.started().into_iter().all(is_gone).then_some(())
        })
        .await;
        wait_for("the end of their folders", || {
            let folders = fs::read_dir(self.folders.join("runs")).unwrap();
            (folders.count() == 0).then_some(())
        })
        .await;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

#[tokio::test]
async fn a_cli_that_nobody_takes_is_ended() {
    let room = Room::start().await;
    let series = room.service.series(1, 9).waiting(Duration::from_secs(2));
    let first = room.run(&series, "s", "first").await;
    let ahead = room.ahead(2).await;
    room.wait_gone().await;
    // More runs are to come still, and the next one has a CLI all the same.
    let second = room.run(&series, "s", "second").await;
    assert!(![first, ahead].contains(&second));
}

#[tokio::test]
async fn a_cli_that_waits_serves_one_run_and_only_one_like_it() {
    let room = Room::start().await;
    let series = room.service.series(2, 9).waiting(PATIENCE * 2);
    let mut pids = vec![room.run(&series, "s", "first").await];
    let ahead = room.ahead(2).await;
    // Another command line: a process of its own, and what waits goes on waiting.
    let other = room.run(&series, "other", "second").await;
    assert_ne!(other, ahead);
    // Two want the one that waits.
    let (one, two) = tokio::join!(
        room.run(&series, "s", "third"),
        room.run(&series, "s", "fourth")
    );
    assert!((one == ahead) != (two == ahead), "{one} {two} {ahead}");
    pids.extend([other, one, two]);
    let distinct: BTreeSet<i32> = pids.iter().copied().collect();
    assert_eq!(distinct.len(), 4, "{pids:?}");
    // No more are to come: what waits goes, long before its time.
    series.set_left(0);
    room.wait_gone().await;
    // One that comes nevertheless is served.
    let last = room.run(&series, "s", "last").await;
    assert!(!distinct.contains(&last));
    assert_eq!(room.api.requests().len(), 5);
}
