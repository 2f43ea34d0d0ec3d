//! The gateway on the network: other containers' CLIs come in with a bearer token per client.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    GatewayError,
    run::{Admission, Digested, Run, digest},
};
use crate::{
    domain::Account,
    identity::ClientId,
    task::{self, Tasks},
    usage::Ledger,
};

/// How often the file is looked at for changes.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// Thousands of clients fit.
const MAX_BYTES: u64 = 1 << 20;
/// Shorter tokens can be guessed.
const SAFE_LENGTH: usize = 20;

/// The clients that may come in, by their tokens' digests. A client's requests are one run, which
/// lasts as long as its token does.
#[derive(Debug)]
pub(super) struct ClientTokens {
    path: PathBuf,
    ledger: Ledger,
    runs: Mutex<HashMap<Digested, Arc<Run>>>,
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl ClientTokens {
    /// Reads the file: a map from token to client, in YAML or JSON. Blocking.
    pub(super) fn load(path: &Path, ledger: Ledger) -> Result<Self, GatewayError> {
        let tokens = Self {
            path: path.to_owned(),
            ledger,
            runs: Mutex::default(),
        };
        tokens.take_in(read(path)?);
        Ok(tokens)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digested, Arc<Run>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn admit(&self, token: &str) -> Admission {
        match self.lock().get(&digest(token)) {
            None => Admission::UnknownToken,
            Some(run) => Admission::Run(run.clone()),
        }
    }

    /// Who is gone is cut off; who stays is not disturbed.
    fn take_in(&self, clients: HashMap<Digested, ClientId>) {
        let mut runs = self.lock();
        runs.retain(|token, run| {
            let stays = clients.get(token) == run.meter.account().client.as_ref();
            if !stays {
                run.over.cancel();
            }
            stays
        });
        for (token, client) in clients {
            runs.entry(token).or_insert_with(|| {
                let account = Account {
                    client: Some(client),
                    ..Account::of_kind(Account::GATEWAY)
                };
                Arc::new(Run::new(self.ledger.meter(account), None))
            });
        }
    }

    /// Follows the file's changes. One that cannot be read changes nothing.
    pub(super) async fn follow(self: Arc<Self>, tasks: Tasks) {
        let mut seen = self.look().await;
        loop {
            tokio::select! {
                () = tasks.token().cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let now = self.look().await;
            if now == seen {
                continue;
            }
            let path = self.path.clone();
            let clients =
                task::blocking("reading the gateway's tokens", DISK_DEADLINE, move || {
                    read(&path)
                });
            match clients.await {
                Ok(Ok(clients)) => {
                    tracing::info!(
                        clients = clients.len(),
                        "the gateway's tokens were read anew"
                    );
                    self.take_in(clients);
                    seen = now;
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "the gateway's tokens stay as they were");
                    seen = now;
                }
                Err(error) => tracing::warn!(%error, "the gateway's tokens stay as they were"),
            }
        }
    }

    async fn look(&self) -> Option<Mark> {
        let path = self.path.clone();
        let look = move || mark(&path).ok();
        let looked = task::blocking("looking at the gateway's tokens", DISK_DEADLINE, look);
        looked.await.ok().flatten()
    }
}

fn mark(path: &Path) -> io::Result<Mark> {
    let about = fs::metadata(path)?;
    Ok(Mark {
        inode: about.ino(),
        length: about.len(),
        changed: (about.mtime(), about.mtime_nsec()),
    })
}

fn read(path: &Path) -> Result<HashMap<Digested, ClientId>, GatewayError> {
    let content = || -> io::Result<(String, u32)> {
        let about = fs::metadata(path)?;
        if about.len() > MAX_BYTES {
            return Err(io::Error::other("it is larger than 1 MiB"));
        }
        Ok((
            fs::read_to_string(path)?,
            about.permissions().mode() & 0o777,
        ))
    };
    let (text, mode) = content().map_err(|source| GatewayError::ReadTokens {
        path: path.to_owned(),
        source,
    })?;
    if mode & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(),
            mode = format_args!("{mode:04o}"),
            "the gateway's tokens can be read by others; make the file 0600"
        );
    }
    // The parser's own message quotes what it stumbled over, which may be a token.
    let unusable = |what: &'static str| GatewayError::ParseTokens {
        path: path.to_owned(),
        what,
    };
    let written: HashMap<String, String> = serde_yaml_ng::from_str(&text)
        .map_err(|_| unusable("it has to be a map from token to client, in YAML or JSON"))?;
    let mut clients = HashMap::new();
    for (token, client) in written {
        let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_token {
            return Err(unusable("a token has to be printable ASCII without spaces"));
        }
        if token.len() < SAFE_LENGTH {
            tracing::warn!(
                client,
                "a token of the gateway's is short enough to be guessed"
            );
        }
        let client = client
            .parse()
            .map_err(|_| unusable("a token has to lead to a client's id"))?;
        clients.insert(digest(&token), client);
    }
    Ok(clients)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::LedgerSettings;

    #[tokio::test]
    async fn a_file_is_followed_and_who_is_gone_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.yaml");
        let tasks = Tasks::new();
        let ledger = Ledger::new(LedgerSettings::default(), &tasks);
        fs::write(&path, "token-of-acme-0123456789: acme\n\"t2\": globex\n").unwrap();
        let tokens = Arc::new(ClientTokens::load(&path, ledger.clone()).unwrap());
        let client = |token: &str| match tokens.admit(token) {
            Admission::Run(run) => run.meter.account().client.clone().map(String::from),
            _ => None,
        };
        assert_eq!(client("token-of-acme-0123456789").as_deref(), Some("acme"));
        assert_eq!(client("t2").as_deref(), Some("globex"));
        assert_eq!(client("t3"), None);
        let Admission::Run(acme) = tokens.admit("token-of-acme-0123456789") else {
            panic!()
        };
        let Admission::Run(globex) = tokens.admit("t2") else {
            panic!()
        };
        tasks.spawn("follow", tokens.clone().follow(tasks.clone()));
        let waited = async {
            fs::write(&path, "{broken").unwrap();
            tokio::time::sleep(LOOK_EVERY * 2).await;
            assert_eq!(client("t2").as_deref(), Some("globex"));
            fs::write(
                &path,
                r#"{"token-of-acme-0123456789": "acme", "t3": "new"}"#,
            )
            .unwrap();
            globex.over.cancelled().await;
            while client("t3").is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waited)
            .await
            .unwrap();
        assert!(!acme.over.is_cancelled());
        assert_eq!(client("t2"), None);
        tasks.cancel();
        for bad in ["[1]", "a: ../x", "\"a b\": acme", "a: [1]"] {
            fs::write(&path, bad).unwrap();
            let error = ClientTokens::load(&path, ledger.clone()).unwrap_err();
            assert!(!error.to_string().contains("a b"), "{error}");
        }
        assert!(ClientTokens::load(&dir.path().join("none"), ledger).is_err());
    }
}
