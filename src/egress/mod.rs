//! The way out of this machine for agents, dev servers and installers: a proxy on loopback that leads
//! to the hosts that the operator named, and to nobody else.
//!
//! ```text
//! agents, dev servers ──► Door "site"      ─┐  name judged, looked up once, addresses judged,
//! installers ───────────► Door "installer" ─┴► connected to what was judged ──► host:443, :80
//! ```
//!
//! Each [`Door`] is a port of its own, and the kernel lets a child connect to its door alone: that is
//! who asks, so nobody has to say. What is sent through a tunnel is not looked at. A door keeps a
//! bounded number of connections, each of bounded length (`serve`); `rules` decides, `reach` connects.
//!
//! Started with [`Egress::start`], which one [`Tasks`] ends: a task for each door, and one for each
//! connection.

mod reach;
mod rules;
mod serve;

use std::{
    collections::HashSet,
    ffi::OsString,
    io,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::net::TcpListener;
use url::Url;

use self::{
    reach::WayOut,
    rules::{Ground, Refusal, Rules, Target},
    serve::Limits,
};
use crate::task::Tasks;

/// Connections of a door at once: npm opens 15, a browser's worth of children some hundred.
const MAX_CONNECTIONS: usize = 256;
/// Refusals that are told in the log, each once; all are counted.
const TOLD: usize = 200;

/// The doors could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("failed to listen on loopback for the egress proxy")]
pub struct EgressError {
    #[source]
    source: io::Error,
}

/// The proxy's doors. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Egress {
    /// For agents and dev servers.
    pub sites: Door,
    /// For the package manager, which may also reach its registries.
    pub installer: Door,
}

impl Egress {
    /// Opens the doors to `names`: host names in lower case; one with a leading dot means every name
    /// below it. The proxies that this process's environment names are used.
    ///
    /// # Errors
    /// [`EgressError`] if there is no port left.
    pub async fn start(names: &[String], tasks: &Tasks) -> Result<Self, EgressError> {
        Ok(Self {
            sites: Door::open("site", true, names, tasks).await?,
            installer: Door::open("installer", false, names, tasks).await?,
        })
    }
}

/// A port of the proxy, for children of one kind. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Door(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    port: u16,
    /// Its children also talk to this machine, past the proxy.
    spares_loopback: bool,
    rules: RwLock<Rules>,
    way_out: WayOut,
    limits: Limits,
    told: Mutex<HashSet<(String, u16)>>,
    refusals: AtomicU64,
}

impl Door {
    async fn open(
        name: &'static str,
        spares_loopback: bool,
        names: &[String],
        tasks: &Tasks,
    ) -> Result<Self, EgressError> {
        let way_out = WayOut::from_env();
        let limits = Limits::default();
        Self::open_by(name, spares_loopback, names, way_out, limits, tasks).await
    }

    async fn open_by(
        name: &'static str,
        spares_loopback: bool,
        names: &[String],
        way_out: WayOut,
        limits: Limits,
        tasks: &Tasks,
    ) -> Result<Self, EgressError> {
        let listen = |source| EgressError { source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(listen)?;
        let port = listener.local_addr().map_err(listen)?.port();
        let door = Self(Arc::new(Inner {
            name,
            port,
            spares_loopback,
            rules: RwLock::new(Rules {
                names: names.to_vec(),
                registries: Vec::new(),
            }),
            way_out,
            limits,
            told: Mutex::default(),
            refusals: AtomicU64::new(0),
        }));
        tasks.spawn("egress", accept(listener, door.clone(), tasks.clone()));
        Ok(door)
    }

    /// The loopback port, for the rules that confine a child.
    pub fn port(&self) -> u16 {
        self.0.port
    }

    /// What tells a child of this door, in the variables that programs know.
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        let url = format!("http://127.0.0.1:{}", self.0.port);
        let mut variables = vec![
            ("HTTP_PROXY", url.as_str()),
            ("HTTPS_PROXY", url.as_str()),
            ("http_proxy", url.as_str()),
            ("https_proxy", url.as_str()),
            // Node's own fetch and http ask for it (from 22.21 and 24.5 on).
            ("NODE_USE_ENV_PROXY", "1"),
            // Else each of its programs says that this is an experiment.
            ("NODE_OPTIONS", "--disable-warning=UNDICI-EHPA"),
        ];
        if self.0.spares_loopback {
            let here = "localhost,127.0.0.1,::1";
            variables.extend([("NO_PROXY", here), ("no_proxy", here)]);
        }
        let own = |(name, value): (&str, &str)| (name.into(), value.into());
        variables.into_iter().map(own).collect()
    }

    /// Lets children through to the registries that the operator's settings name, also inside a
    /// private network, on the ports that are named.
    pub fn admit_registries<'a>(&self, registries: impl IntoIterator<Item = &'a Url>) {
        let mut rules = self.0.rules.write().unwrap_or_else(PoisonError::into_inner);
        for target in registries.into_iter().filter_map(Target::of) {
            if !rules.registries.contains(&target) {
                rules.registries.push(target);
            }
        }
    }

    /// Lets children through to a host of the outside, as [`Egress::start`] takes it.
    pub fn admit(&self, name: &str) {
        let mut rules = self.0.rules.write().unwrap_or_else(PoisonError::into_inner);
        if !rules.names.iter().any(|known| known == name) {
            rules.names.push(name.to_owned());
        }
    }

    /// How often a child was refused, so far.
    pub fn refusals(&self) -> u64 {
        self.0.refusals.load(Ordering::Relaxed)
    }

    fn judge(&self, target: &Target) -> Result<Ground, Refusal> {
        let rules = self.0.rules.read().unwrap_or_else(PoisonError::into_inner);
        rules.judge(target)
    }

    fn way_out(&self) -> &WayOut {
        &self.0.way_out
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn name(&self) -> &'static str {
        self.0.name
    }

    fn count(&self, outcome: &'static str) {
        metrics::counter!(
            "greenroom_egress_requests_total", "from" => self.0.name, "outcome" => outcome
        )
        .increment(1);
    }

    /// Tells the operator once of each host, and of so many hosts only: a child chooses the names.
    fn note_refusal(&self, target: &Target, refusal: Refusal) {
        self.0.refusals.fetch_add(1, Ordering::Relaxed);
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TOLD && told.insert((target.host.to_string(), target.port)) {
            tracing::warn!(
                host = %target.host, port = target.port, from = self.0.name,
                reason = refusal.as_str(),
                "a child asked for a host that it may not reach"
            );
        }
    }
}

async fn accept(listener: TcpListener, door: Door, tasks: Tasks) {
    let serve = |stream, _, permit| {
        let serving = serve::serve(stream, door.clone(), tasks.clone());
        async move {
            serving.await;
            drop(permit);
        }
    };
    let name = "egress connection";
    tasks.accept(name, listener, MAX_CONNECTIONS, serve).await;
}

#[cfg(test)]
mod tests;
