//! One-shot runs that are started ahead: their requests wait at the gateway.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use greenroom::{
    agent::{AgentSettings, Ceiling, Limits},
    domain::Account,
    gateway::{Credential, Gate, Gateway, GatewayConfig, OAuthSettings, Pass},
    process::{ConfinementMode, Launcher},
    service::{Answer, Args, Lean, RunSite, Service, ServiceError, ServiceSettings, Shot},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};
use serde_json::json;
use tokio::{sync::Notify, time::timeout};

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
        let step = json!({"text": "Yes"});
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
            max_concurrent: 1,
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

    /// Asks for something, through a gate if there is one.
    async fn ask(
        &self,
        says: &str,
        limit: Duration,
        gate: Option<Gate>,
    ) -> Result<Answer, ServiceError> {
        let content = json!([{"type": "text", "text": says}]);
        let line = json!({"type": "user", "message": {"role": "user", "content": content}});
        let shot = Shot {
            prompt: format!("{line}\n"),
            args: Args::from(Lean::default()),
            timeout: limit,
            account: Account::of_kind(Account::LABEL),
            gate,
        };
        self.service.execute(shot, RunSite::default()).await
    }

    /// The processes that were started, in their order.
    fn started(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.folders.join("started")).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
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

/// Where a request waits.
#[derive(Default, Clone)]
struct Door {
    knocked: Arc<Notify>,
    open: Arc<Notify>,
    answered: Arc<Notify>,
}

impl Door {
    fn gate(&self) -> Gate {
        let door = self.clone();
        let gate = Gate::new(1000, |_| Box::pin(async { Ok(()) }));
        gate.after(move || {
            let door = door.clone();
            Box::pin(async move {
                door.knocked.notify_one();
                door.open.notified().await;
                Pass::new(move || door.answered.notify_one())
            })
        })
    }
}

#[tokio::test]
async fn a_request_that_waits_is_unsent_and_takes_no_slot_and_no_time_of_its_run() {
    const LIMIT: Duration = Duration::from_secs(8);
    let room = Room::start().await;
    let door = Door::default();
    let began = Instant::now();
    let mut late = pin!(room.ask("late", LIMIT, Some(door.gate())));
    tokio::select! {
        answer = &mut late => panic!("{answer:?}"),
        () = door.knocked.notified() => {}
    }
    assert_eq!(room.service.load(), (0, 1));
    let other = room.ask("other", PATIENCE, None).await.unwrap();
    assert!(other.output.contains("Yes"), "{other:?}");
    // Longer than it may run.
    wait_for("its limit", || (began.elapsed() > LIMIT).then_some(())).await;
    assert!(room.api.requests_about("late").is_empty());
    door.open.notify_one();
    let answer = late.await.unwrap();
    assert!(answer.output.contains("Yes"), "{answer:?}");
    assert!(answer.duration < LIMIT, "{answer:?}");
    timeout(PATIENCE, door.answered.notified()).await.unwrap();
    assert_eq!(room.api.requests_about("late").len(), 1);
}

#[tokio::test]
async fn who_goes_away_while_a_request_waits_leaves_nothing() {
    let room = Room::start().await;
    let door = Door::default();
    {
        let mut run = pin!(room.ask("never", PATIENCE, Some(door.gate())));
        tokio::select! {
            answer = &mut run => panic!("{answer:?}"),
            () = door.knocked.notified() => {}
        }
    }
    room.wait_gone().await;
    assert_eq!(room.started().len(), 1);
    assert!(room.api.requests().is_empty());
    assert_eq!(room.service.load(), (0, 0));
}
