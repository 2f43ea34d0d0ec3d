//! The agent's deadlines, with shorter limits than the program's: what is silent, deaf or stubborn
//! ends, and in which order it is told to.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{fs, path::Path, time::Duration};

use greenroom::{
    agent::{
        Agent, AgentSettings, AgentSite, Ceiling, Ending, Limits, RunEvent, RunOutcome, RunRequest,
        SessionStart,
    },
    domain::{Account, TurnMode},
    gateway::{Credential, Gateway, GatewayConfig, OAuthSettings},
    process::{ConfinementMode, Launcher},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, acting_claude, processes_below};

/// As short as a busy machine allows.
const SHORT: Limits = Limits {
    begin: Duration::from_secs(60),
    begin_again: Duration::from_secs(4),
    stall: Duration::from_secs(4),
    control: Duration::from_secs(5),
    interrupt: Duration::from_secs(2),
    terminate: Duration::from_secs(2),
    timeout: Duration::from_secs(2),
};

struct Stage {
    launcher: Launcher,
    gateway: Gateway,
    tasks: Tasks,
    folder: tempfile::TempDir,
}

impl Stage {
    async fn new() -> Self {
        let tasks = Tasks::new();
        let config = GatewayConfig {
            upstream: "http://127.0.0.1:9".parse().unwrap(),
            credential: Credential::Rehearsal,
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(LedgerSettings::default(), &tasks),
        };
        let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
        let mode = ConfinementMode::Off;
        let folder = tempfile::tempdir().unwrap();
        for name in ["site", "config", "tmp"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self {
            launcher: Launcher::start_with_binary(binary, PATIENCE, mode).unwrap(),
            gateway: Gateway::start(config, &tasks).await.unwrap(),
            tasks,
            folder,
        }
    }

    async fn agent(&self) -> Agent {
        let at = |name: &str| self.folder.path().join(name);
        let settings = AgentSettings {
            egress: None,
            ceiling: Ceiling::default(),
            program: acting_claude(),
            gateway_url: self.gateway.base_url(),
            gateway_port: self.gateway.port(),
            model: None,
            max_output_tokens: None,
            tools: vec!["Bash".into()],
            path: "/usr/bin:/bin".into(),
            tool_folders: Vec::new(),
            is_confined: true,
            limits: SHORT,
        };
        let site = AgentSite {
            worktree: at("site"),
            git_dir: at("site"),
            config_dir: at("config"),
            temporary: at("tmp"),
            dependencies: at("tmp"),
            preview_port: 9,
            notes: None,
        };
        let session = SessionStart::New(uuid::Uuid::new_v4().to_string());
        Agent::start(
            &self.launcher,
            &self.gateway,
            &settings,
            site,
            &session,
            &self.tasks,
        )
        .await
        .unwrap()
    }

    /// Programs that run in the site, but wardens.
    fn programs(&self) -> usize {
        let running = processes_below(self.folder.path());
        running
            .iter()
            .filter(|process| !process.command.contains(" child "))
            .count()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn play(agent: &mut Agent, script: &str) -> RunOutcome {
    play_until(agent, script, &CancellationToken::new(), PATIENCE).await
}

async fn play_until(
    agent: &mut Agent,
    script: &str,
    cancel: &CancellationToken,
    limit: Duration,
) -> RunOutcome {
    play_and_hear(agent, script, cancel, limit, |_| ()).await
}

async fn play_and_hear(
    agent: &mut Agent,
    script: &str,
    cancel: &CancellationToken,
    limit: Duration,
    mut hear: impl FnMut(RunEvent),
) -> RunOutcome {
    let request = RunRequest {
        account: Account::of_kind("test"),
        instruction: script.into(),
        mode: TurnMode::Execute,
        model: None,
        deadline: Instant::now() + limit,
        spent_before_usd: 0.0,
    };
    let (sender, mut events) = mpsc::channel::<RunEvent>(64);
    let read = async {
        while let Some(event) = events.recv().await {
            hear(event);
        }
    };
    tokio::join!(agent.run(request, sender, cancel), read).0
}

/// Cancels once the agent has said something. And how long it took from there.
async fn play_and_cancel(agent: &mut Agent, script: &str) -> (RunOutcome, Duration) {
    let (cancel, mut said) = (CancellationToken::new(), None);
    let hear = |event| {
        if matches!(event, RunEvent::Text(_)) && said.is_none() {
            said = Some(Instant::now());
            cancel.cancel();
        }
    };
    let outcome = play_and_hear(agent, script, &cancel, PATIENCE, hear).await;
    (outcome, said.expect("it said something").elapsed())
}

fn sentence(outcome: &RunOutcome) -> &str {
    match &outcome.ending {
        Ending::Failed(sentence) => sentence,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn silence_is_a_failure_and_thinking_is_none() {
    let stage = Stage::new().await;
    let mut agent = stage.agent().await;
    // Nothing of it is told to anyone, but it lives.
    let outcome = play(&mut agent, "muse 500 12\ntext At last.").await;
    assert_eq!(
        (outcome.ending, outcome.text.as_str()),
        (Ending::Completed, "At last.")
    );
    // A command may take its time.
    assert_eq!(
        play(&mut agent, "run sleep 6").await.ending,
        Ending::Completed
    );
    // What the API asks to wait is no silence.
    assert_eq!(
        play(&mut agent, "retry 529 6000").await.ending,
        Ending::Completed
    );
    for script in [
        "text Half an\nsilent",
        "text So\nhalf-line\nsilent",
        "text So\nlong-line 20\nsilent",
    ] {
        let outcome = play(&mut agent, script).await;
        let sentence = sentence(&outcome);
        assert!(sentence.contains("stopped answering"), "{sentence}");
        assert!(outcome.usage.output_tokens > 0);
        assert!(agent.is_usable(), "an interrupt is enough");
    }
    assert_eq!(play(&mut agent, "text Fine.").await.text, "Fine.");
}

#[tokio::test]
async fn a_tool_whose_end_was_lost_does_not_hold_a_turn() {
    let stage = Stage::new().await;
    let mut agent = stage.agent().await;
    let outcome = play(&mut agent, "lose-tool\nsilent").await;
    assert!(sentence(&outcome).contains("stopped answering"));
}

#[tokio::test]
async fn an_agent_that_does_not_read_is_given_up() {
    let stage = Stage::new().await;
    let mut agent = stage.agent().await;
    assert_eq!(
        play(&mut agent, "result-no-exit").await.ending,
        Ending::Completed
    );
    // More than a pipe takes.
    let long = format!("text {}", "long ".repeat(100_000));
    let outcome = play(&mut agent, &long).await;
    assert!(
        sentence(&outcome).contains("stopped talking"),
        "{outcome:?}"
    );
    assert_eq!(
        outcome.session_id, None,
        "nothing was begun: it may be sent to another"
    );
    assert!(!agent.is_usable());
    assert_eq!(stage.programs(), 0);

    let mut agent = stage.agent().await;
    play(&mut agent, "result-no-exit").await;
    let outcome = play(&mut agent, "text short").await;
    assert!(sentence(&outcome).contains("did not begin"), "{outcome:?}");
    assert_eq!((outcome.session_id, stage.programs()), (None, 0));

    // A cancel does not wait for it either.
    let mut agent = stage.agent().await;
    play(&mut agent, "result-no-exit").await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let outcome = play_until(&mut agent, &long, &cancel, PATIENCE).await;
    assert_eq!((outcome.ending, stage.programs()), (Ending::Cancelled, 0));
}

#[tokio::test]
async fn stopping_is_an_interrupt_then_sigterm_then_sigkill() {
    let stage = Stage::new().await;
    // What it does, what it leaves alone, and how it may end.
    for (act, exit) in [
        ("text Begun.\nsilent", None),
        ("stubborn\ntext Begun.\nsilent", Some("143")),
        ("immortal\nleave sleep 300\ntext Begun.\nsilent", Some("9")),
    ] {
        for is_late in [false, true] {
            let mut agent = stage.agent().await;
            let (outcome, took) = if is_late {
                // In which it has begun.
                let limit = Duration::from_millis(2500);
                let begun = Instant::now();
                let never = CancellationToken::new();
                let outcome = play_until(&mut agent, act, &never, limit).await;
                (outcome, begun.elapsed().saturating_sub(limit))
            } else {
                play_and_cancel(&mut agent, act).await
            };
            let expected = if is_late {
                Ending::TimedOut
            } else {
                Ending::Cancelled
            };
            assert_eq!(outcome.ending, expected, "{act}");
            assert!(!outcome.left_running);
            // A turn over its time costs the process, by the contract.
            assert_eq!(agent.is_usable(), exit.is_none() && !is_late, "{act}");
            assert_eq!(stage.programs(), usize::from(agent.is_usable()), "{act}");
            // Each step was given its time before the next.
            let graces = match exit {
                None => Duration::ZERO,
                Some("143") => SHORT.interrupt,
                Some(_) => SHORT.interrupt + SHORT.terminate,
            };
            assert!(took >= graces, "{act}: {took:?}");
            agent.stop().await;
        }
    }
}
