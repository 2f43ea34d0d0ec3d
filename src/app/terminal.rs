//! `greenroom claude`: the real CLI on its caller's terminal, with a token of the gateway instead of a
//! credential.

use std::{ffi::OsString, io, time::Duration};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::{
    programs::Programs,
    rooms::{ledger_settings, start_gateway},
};
use crate::{
    client,
    config::{self, Kind, Loaded, TABLE},
    domain::Account,
    gateway::{ActiveRun, AgentToken},
    process::{self, Attached, Exit},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};

/// For a supervisor on this machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is under way is counted in this time.
const LAST_LINES: Duration = Duration::from_secs(3);
/// Other variables that would lead the CLI past the gateway, or hold a credential.
const LEADS_ELSEWHERE: [&str; 4] = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
];

/// Who lets the CLI in.
enum Door {
    /// The running supervisor, as long as its answer is being read.
    Supervisor {
        welcome: Welcome,
        _open: BufReader<TcpStream>,
    },
    /// A gateway of our own.
    Own {
        welcome: Welcome,
        _run: ActiveRun,
        _token: AgentToken,
        tasks: Tasks,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Welcome {
    base_url: String,
    token: String,
}

/// Runs the CLI with these arguments, to its end.
///
/// # Errors
/// What keeps it from starting, as one line that says what to do.
pub async fn terminal(loaded: Loaded, args: Vec<OsString>) -> anyhow::Result<Exit> {
    // The CLI is of our uid: it must not read our environment.
    process::harden_self().context("failed to protect the process")?;
    let program = Programs::find(&loaded).claude.context(
        "the Claude Code CLI is missing: npm install -g @anthropic-ai/claude-code, or set \
         CLAUDE_BIN to its program",
    )?;
    let door = match supervisor(&loaded).await? {
        Some(door) => door,
        None => own(&loaded).await?,
    };
    let (Door::Supervisor { welcome, .. } | Door::Own { welcome, .. }) = &door;
    let mut unset: Vec<String> = LEADS_ELSEWHERE.map(str::to_owned).to_vec();
    let secrets = TABLE.iter().filter(|spec| spec.kind == Kind::Secret);
    unset.extend(secrets.map(|spec| spec.name.to_owned()));
    let exit = process::run_attached(Attached {
        program,
        args,
        set: vec![
            ("ANTHROPIC_BASE_URL".into(), welcome.base_url.clone().into()),
            ("ANTHROPIC_AUTH_TOKEN".into(), welcome.token.clone().into()),
        ],
        unset,
    })
    .await?;
    if let Door::Own {
        _run,
        _token,
        tasks,
        ..
    } = door
    {
        drop((_run, _token));
        tasks.stop(LAST_LINES).await;
    }
    Ok(exit)
}

/// Asks the running supervisor; `None` if there is none.
async fn supervisor(loaded: &Loaded) -> anyhow::Result<Option<Door>> {
    let settings = &loaded.settings;
    if settings.api_port == 0 {
        return Ok(None);
    }
    let address = (config::reachable(settings.bind), settings.api_port);
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let proof = match (&settings.api_token, &settings.claude_service_secret) {
            (Some(token), _) => format!("Authorization: Bearer {}\r\n", token.expose()),
            (None, Some(secret)) => client::signed_headers(secret.expose(), b"")
                .into_iter()
                .map(|(name, value)| format!("{name}: {value}\r\n"))
                .collect(),
            (None, None) => String::new(),
        };
        let host = settings.api_port;
        let head = format!("POST /api/cli HTTP/1.0\r\nHost: localhost:{host}\r\n{proof}\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = BufReader::new(stream);
        let mut line = String::new();
        answer.read_line(&mut line).await?;
        let status: u16 = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0);
        while line.trim() != "" {
            line.clear();
            answer.read_line(&mut line).await?;
        }
        line.clear();
        answer.read_line(&mut line).await?;
        io::Result::Ok((status, line, answer))
    };
    let (status, line, open) = match timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Ok(Err(error)) => {
            return Err(error).context("the running supervisor could not be asked for a token");
        }
        Err(_) => bail!("the running supervisor does not answer"),
    };
    match (status, serde_json::from_str(&line)) {
        (200, Ok(welcome)) => Ok(Some(Door::Supervisor {
            welcome,
            _open: open,
        })),
        (401, _) => bail!(
            "the running supervisor wants to know who asks: set GREENROOM_API_TOKEN or \
             CLAUDE_SERVICE_SECRET as it has them"
        ),
        (503, _) => bail!("the running supervisor is shutting down; try again in a moment"),
        // Somebody else's port.
        _ => Ok(None),
    }
}

async fn own(loaded: &Loaded) -> anyhow::Result<Door> {
    let settings = &loaded.settings;
    let credential = loaded.credential()?;
    let tasks = Tasks::new();
    // Counted where there is a workspace to count in.
    let workspace = Some(settings.workspace_path.clone()).filter(|folder| folder.is_dir());
    let store = workspace.as_ref().map(|folder| folder.join(".greenroom"));
    let ledger = LedgerSettings {
        workspace,
        ..ledger_settings(settings).await?
    };
    let ledger = Ledger::new(ledger, &tasks);
    let gateway = start_gateway(settings, credential, ledger, store, &tasks).await?;
    let token = gateway.issue();
    let run = token.begin(Account {
        client: settings.client_id.clone(),
        user: settings.user_id.clone(),
        ..Account::of_kind(Account::CLI)
    });
    Ok(Door::Own {
        welcome: Welcome {
            base_url: gateway.base_url(),
            token: token.as_str().to_owned(),
        },
        _run: run,
        _token: token,
        tasks,
    })
}
