//! The gateway: a loopback listener that speaks the Messages API and stands between the Claude
//! Code CLI and the upstream.
//!
//! The CLI is given an [`AgentToken`]; the real [`Credential`] never leaves this room. A token
//! admits requests only while a run is active ([`AgentToken::begin`]), and only on the paths that
//! the CLI needs. Bodies stream both ways without being gathered; a client that goes away, or a
//! run that ends, cancels the upstream request.
//!
//! Every model request is charged to its run's account ([`crate::usage`]): it is reserved at the
//! most it may cost before the last piece of it goes up (`toll`), and counted from the answer's
//! own bytes as they pass (`count`).
//!
//! An OAuth credential is refreshed here (`vault`). On request other containers' CLIs come in over
//! the network, with a token for each client (`network`).
//!
//! One task accepts connections and one serves each of them, all in the [`Tasks`] that it was
//! started with. State: the tokens and their runs (`run`), and the upstream client, which is made
//! at the first request because loading the platform's certificates is slow.

mod count;
mod credential;
mod json;
mod network;
mod relay;
mod run;
mod toll;
mod vault;

use std::{
    any::Any,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use url::Url;

use crate::{
    task::{self, BlockingError, Tasks},
    usage::Ledger,
};

pub use credential::{Credential, load_credentials_file};
pub use run::{ActiveRun, AgentToken, Gate, Hold, Pass, Passing, UpstreamNote};
pub use vault::{OAuthSettings, TOKEN_URL};

use network::ClientTokens;
use relay::{Awake, Door, Relay};
use run::Tokens;

/// Why the gateway could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("failed to listen on loopback for the gateway")]
    Listen {
        #[source]
        source: io::Error,
    },
    /// The address is not repeated: it may hold a password.
    #[error("the model API's address must begin with http:// or https:// and name a host")]
    UnusableUpstream,
    #[error("the model API's credential holds characters that no HTTP header can carry")]
    UnusableCredential,
    #[error("failed to read the credentials file {}", path.display())]
    ReadCredentials {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the credentials file {} holds neither an api_key nor an oauth entry with an accessToken",
        path.display()
    )]
    ParseCredentials { path: PathBuf },
    #[error("failed to read the gateway's tokens in {}", path.display())]
    ReadTokens {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the gateway's tokens in {} cannot be used: {what}", path.display())]
    ParseTokens { path: PathBuf, what: &'static str },
    #[error("failed to read the gateway's tokens")]
    Blocking(#[from] BlockingError),
}

/// What somebody who needs us holds.
pub type ActivityGuard = Box<dyn Any + Send + Sync>;

/// Where model requests go, and as whom.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Base address; `/v1/messages` is appended to its path.
    pub upstream: Url,
    pub credential: Credential,
    /// How a credential that is OAuth's is kept fresh.
    pub oauth: OAuthSettings,
    /// Where requests are counted.
    pub ledger: Ledger,
}

/// Connections at once. A CLI keeps two or three; the rest is room for many CLIs, and a bound for
/// an agent that opens sockets in a loop.
const MAX_CONNECTIONS: usize = 256;
/// Time for a request's head, and how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// For a small file on a slow disk.
const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// A running gateway. Cheap to clone; ends with the [`Tasks`] that it was started with.
#[derive(Debug, Clone)]
pub struct Gateway {
    port: u16,
    tokens: Arc<Tokens>,
    relay: Arc<Relay>,
}

impl Gateway {
    /// Listens on a free loopback port. Does not touch the upstream yet.
    ///
    /// # Errors
    /// [`GatewayError`] if the port, the upstream's address or the credential is unusable.
    pub async fn start(config: GatewayConfig, tasks: &Tasks) -> Result<Self, GatewayError> {
        let tokens = Arc::new(Tokens::new(config.ledger.clone()));
        let relay = Arc::new(Relay::new(config, tasks)?);
        let listen = |source| GatewayError::Listen { source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(listen)?;
        let SocketAddr::V4(address) = listener.local_addr().map_err(listen)? else {
            unreachable!("bound to an IPv4 address")
        };
        let listener = listener.into_std().map_err(listen)?;
        let (agents, upstream) = (tokens.clone(), relay.clone());
        let connections = tasks.clone();
        // A stream's pieces go from hand to hand in here: none of them waits for another thread to
        // wake up.
        tasks
            .spawn_apart("gateway", move || {
                let listener = TcpListener::from_std(listener)?;
                let door = Door::Agents(agents);
                let accept = accept(listener, upstream, door, connections.clone());
                connections.spawn("gateway", accept);
                Ok(())
            })
            .map_err(listen)?;
        Ok(Self {
            port: address.port(),
            tokens,
            relay,
        })
    }

    /// Serves other containers' CLIs as well, on a listener that they can reach. `file` leads from
    /// a bearer token to the client that pays; its changes are followed. What `awake` answers is
    /// held while a request is under way: somebody needs this container.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub async fn open_to_network(
        &self,
        listener: TcpListener,
        file: PathBuf,
        awake: impl Fn() -> ActivityGuard + Send + Sync + 'static,
        tasks: &Tasks,
    ) -> Result<(), GatewayError> {
        let ledger = self.ledger().clone();
        let load = move || ClientTokens::load(&file, ledger);
        let clients = task::blocking("reading the gateway's tokens", DISK_DEADLINE, load).await??;
        let clients = Arc::new(clients);
        tasks.spawn("gateway tokens", clients.clone().follow(tasks.clone()));
        let (relay, door) = (
            self.relay.clone(),
            Door::Clients(clients, Awake(Arc::new(awake))),
        );
        tasks.spawn(
            "network gateway",
            accept(listener, relay, door, tasks.clone()),
        );
        Ok(())
    }

    /// What the CLI gets as `ANTHROPIC_BASE_URL`.
    pub fn base_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The loopback port, for the rules that confine an agent.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where requests are counted.
    pub fn ledger(&self) -> &Ledger {
        self.tokens.ledger()
    }

    /// A fresh token for one CLI process, with no run active yet.
    pub fn issue(&self) -> AgentToken {
        self.tokens.issue()
    }
}

async fn accept(listener: TcpListener, relay: Arc<Relay>, door: Door, tasks: Tasks) {
    let stop = tasks.token();
    let connection = |stream, _, permit| {
        let (relay, door, stop) = (relay.clone(), door.clone(), stop.clone());
        async move {
            let serve = service_fn(move |request| {
                let (relay, door) = (relay.clone(), door.clone());
                async move { Ok::<_, std::convert::Infallible>(relay.serve(&door, request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), serve);
            if let Some(Err(error)) = stop.run_until_cancelled(connection).await {
                tracing::debug!(%error, "a gateway connection broke off");
            }
            drop(permit);
        }
    };
    let name = "gateway connection";
    tasks
        .accept(name, listener, MAX_CONNECTIONS, connection)
        .await;
}

#[cfg(test)]
mod tests;
