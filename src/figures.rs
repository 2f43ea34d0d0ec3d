//! Figures for operators: what the rooms count as they go, and what is read when somebody asks.
//!
//! Rooms count with the macros of the crate `metrics`; [`Figures`] gathers all of it and writes it down
//! in Prometheus' text form. This file is the one list of what is counted: names, units, help.
//!
//! **Invariant:** a label's value is a word of the code (a kind, a state, an outcome), never a name from
//! outside: their number is bounded, and no tenant is named. The one exception are figures that begin with
//! `greenroom_client_`, by `client`: they exist only where the operator asks for them, and so many clients
//! have a name ([`MOST_CLIENTS`]).

use std::{
    collections::HashSet,
    fmt, fs,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::task::Tasks;

/// How often what was measured is gathered where nobody asks: it waits in memory until then.
const GATHER: Duration = Duration::from_secs(10);

/// In seconds: from what a person does not notice to the longest turn.
const BUCKETS: [f64; 16] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];
/// In US dollars: few, since each client has its own.
const DOLLARS: [f64; 4] = [0.01, 0.1, 1.0, 10.0];

/// What begins so is by client.
const BY_CLIENT: &str = "greenroom_client_";
/// So many clients are named, those that came first; the others are one, [`OTHERS`].
const MOST_CLIENTS: usize = 100;
/// No client's id begins so.
const OTHERS: &str = "_others";

/// Everything that the rooms count: name, help.
const COUNTERS: &[(&str, &str)] = &[
    (
        "greenroom_http_requests_total",
        "Requests of the API by route and class of their answer.",
    ),
    (
        "greenroom_turns_total",
        "Turns that have their outcome, by kind and status.",
    ),
    (
        "greenroom_agent_runs_total",
        "Instructions to the CLI, by whether its process was warm, waiting for its first, or cold.",
    ),
    ("greenroom_agent_starts_total", "CLI processes started."),
    ("greenroom_commits_total", "Commits, by what they are of."),
    (
        "greenroom_lease_changes_total",
        "Leases, by what became of them.",
    ),
    (
        "greenroom_preview_requests_total",
        "Requests of the preview's proxy by class of their answer.",
    ),
    (
        "greenroom_orphans_reaped_total",
        "Processes without a parent that fell to greenroom as PID 1 and have ended.",
    ),
    (
        "greenroom_egress_requests_total",
        "Children's requests to other machines, by whose (site, installer) and what became of them.",
    ),
    (
        "greenroom_service_calls_total",
        "Calls of the one-shot service by outcome.",
    ),
    (
        "greenroom_service_breaker_changes_total",
        "Changes of the one-shot service's circuit breaker, by the new state.",
    ),
    (
        "greenroom_client_turns_total",
        "Turns that have their outcome, by client and status.",
    ),
    (
        "greenroom_client_tokens_total",
        "Tokens of model requests, by client and by what they cost.",
    ),
];
const HISTOGRAMS: &[(&str, &str)] = &[
    (
        "greenroom_http_request_duration_seconds",
        "From a request's head to the head of its answer, by route.",
    ),
    (
        "greenroom_turn_duration_seconds",
        "From a turn's start to its outcome, by kind.",
    ),
    (
        "greenroom_turn_wait_seconds",
        "From a turn's admission to its start.",
    ),
    (
        "greenroom_hmr_delay_seconds",
        "From a turn's commit to the preview's word on it, by whether it came.",
    ),
    (
        "greenroom_service_run_duration_seconds",
        "Of the one-shot service's runs that succeeded.",
    ),
];
/// In US dollars.
const COSTS: &[(&str, &str)] = &[(
    "greenroom_client_request_cost_usd",
    "What model requests cost, by client.",
)];
const GAUGES: &[(&str, &str)] = &[
    ("greenroom_uptime_seconds", "Since the start."),
    ("greenroom_turns_running", "Turns that run now."),
    ("greenroom_turns_queued", "Turns in line."),
    (
        "greenroom_tasks",
        "Tasks of the runtime: one that only grows is a leak.",
    ),
    (
        "greenroom_idle_seconds",
        "Since anybody needed this container.",
    ),
    ("greenroom_previews", "Previews by state."),
    ("greenroom_service_running", "One-shot runs under way."),
    (
        "greenroom_service_waiting",
        "One-shot calls that wait for a slot.",
    ),
    (
        "greenroom_service_breaker",
        "Where the one-shot service's circuit breaker stands: 1 for its state.",
    ),
    (
        "greenroom_memory_available_bytes",
        "What the container has left, of its own limit or the machine's.",
    ),
    (
        "greenroom_memory_limit_bytes",
        "What the container may use, or the machine has.",
    ),
    ("process_resident_memory_bytes", "Of the supervisor itself."),
    ("process_open_fds", "Of the supervisor itself."),
    ("process_max_fds", "Of the supervisor itself."),
    ("process_threads", "Of the supervisor itself."),
];

/// Counters that are there from the start, at zero: an alert on the first event of a kind needs the
/// zero before it. Name, label, its values, and labels that are the same.
type Zeros = (
    &'static str,
    &'static str,
    &'static [&'static str],
    &'static [(&'static str, &'static str)],
);
const ZEROS: &[Zeros] = &[
    (
        "greenroom_turns_total",
        "status",
        &["completed", "failed", "cancelled", "recovered"],
        &[("kind", "turn")],
    ),
    (
        "greenroom_turns_total",
        "status",
        &["completed", "failed", "cancelled", "recovered"],
        &[("kind", "service")],
    ),
    (
        "greenroom_lease_changes_total",
        "change",
        &["acquired", "taken_over", "released", "lost"],
        &[],
    ),
    (
        "greenroom_agent_runs_total",
        "process",
        &["warm", "waiting", "cold"],
        &[],
    ),
    (
        "greenroom_service_breaker_changes_total",
        "to",
        &["open", "half-open", "closed"],
        &[],
    ),
];

/// The figures of this process. Cheap to clone.
#[derive(Clone)]
pub struct Figures(PrometheusHandle);

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Figures")
    }
}

impl Figures {
    /// Begins to gather what is counted. Once in a process: figures of a second call stay empty.
    pub fn start(tasks: &Tasks, names_clients: bool) -> Self {
        let (recorder, handle) = recorder(names_clients);
        // An error means that there is one, which then has it all.
        metrics::set_global_recorder(recorder).ok();
        for (name, help) in COUNTERS {
            metrics::describe_counter!(*name, *help);
        }
        for (name, help) in HISTOGRAMS {
            metrics::describe_histogram!(*name, Unit::Seconds, *help);
        }
        for (name, help) in COSTS {
            metrics::describe_histogram!(*name, *help);
        }
        for (name, help) in GAUGES {
            metrics::describe_gauge!(*name, *help);
        }
        for (name, label, values, same) in ZEROS {
            for value in *values {
                let mut labels = vec![Label::from_static_parts(label, value)];
                labels.extend(same.iter().map(Label::from));
                metrics::counter!(*name, labels).increment(0);
            }
        }
        let (gathered, stop) = (handle.clone(), tasks.token().clone());
        tasks.spawn("figures", async move {
            let gather = async {
                loop {
                    tokio::time::sleep(GATHER).await;
                    gathered.run_upkeep();
                }
            };
            stop.run_until_cancelled(gather).await;
        });
        Self(handle)
    }

    /// All of them in Prometheus' text form, with the supervisor's own process. Reads `/proc`.
    pub fn text(&self) -> String {
        read_process();
        self.0.render()
    }
}

fn recorder(names_clients: bool) -> (Bounded<PrometheusRecorder>, PrometheusHandle) {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_cost_usd".into()), &DOLLARS)
        })
        .expect("there are buckets")
        .build_recorder();
    let handle = recorder.handle();
    let recorder = Bounded {
        inner: recorder,
        clients: names_clients.then(Mutex::default),
    };
    (recorder, handle)
}

/// Rooms count by client as if everybody wanted to know, and nobody had thousands of them. This lets
/// through what the operator asked for.
struct Bounded<R> {
    inner: R,
    /// Those that are named; `None`: none is.
    clients: Option<Mutex<HashSet<String>>>,
}

impl<R> Bounded<R> {
    /// Under which key it is counted; `None`: not at all.
    fn key(&self, key: &Key) -> Option<Key> {
        if !key.name().starts_with(BY_CLIENT) {
            return Some(key.clone());
        }
        let clients = self.clients.as_ref()?;
        let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = key.labels().map(|label| {
            let is_named = label.key() != "client"
                || clients.contains(label.value())
                || (clients.len() < MOST_CLIENTS && clients.insert(label.value().to_owned()));
            if is_named {
                label.clone()
            } else {
                Label::new("client", OTHERS)
            }
        });
        Some(Key::from_parts(
            key.name().to_owned(),
            labels.collect::<Vec<_>>(),
        ))
    }
}

impl<R: Recorder> Recorder for Bounded<R> {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        self.inner.describe_counter(name, unit, help);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        self.inner.describe_gauge(name, unit, help);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        self.inner.describe_histogram(name, unit, help);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.key(key).map_or_else(Counter::noop, |key| {
            self.inner.register_counter(&key, metadata)
        })
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.key(key)
            .map_or_else(Gauge::noop, |key| self.inner.register_gauge(&key, metadata))
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.key(key).map_or_else(Histogram::noop, |key| {
            self.inner.register_histogram(&key, metadata)
        })
    }
}

/// What the kernel says of this process.
fn read_process() {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| -> Option<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    if let Some(kilobytes) = field("VmRSS:") {
        metrics::gauge!("process_resident_memory_bytes").set(kilobytes * 1024.0);
    }
    if let Some(threads) = field("Threads:") {
        metrics::gauge!("process_threads").set(threads);
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        metrics::gauge!("process_open_fds").set(entries.count() as f64);
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let most = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    if let Some(most) = most {
        metrics::gauge!("process_max_fds").set(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(names_clients: bool) -> String {
        let (recorder, handle) = recorder(names_clients);
        metrics::with_local_recorder(&recorder, || {
            for n in 0..1000 {
                let client = format!("client-{n}");
                metrics::counter!("greenroom_client_turns_total", "client" => client.clone(), "status" => "completed")
                    .increment(1);
                metrics::histogram!("greenroom_client_request_cost_usd", "client" => client)
                    .record(0.25);
            }
            metrics::counter!("greenroom_turns_total", "kind" => "turn").increment(1);
        });
        handle.render()
    }

    #[test]
    fn clients_are_named_where_it_was_asked_for_and_so_many_only() {
        let silent = counted(false);
        assert!(silent.contains("greenroom_turns_total{kind=\"turn\"} 1"));
        assert!(!silent.contains("client"), "{silent}");

        let named = counted(true);
        let has = |line: &str| assert!(named.lines().any(|other| other == line), "{line}\n{named}");
        has("greenroom_client_turns_total{client=\"client-0\",status=\"completed\"} 1");
        has("greenroom_client_turns_total{client=\"client-99\",status=\"completed\"} 1");
        has("greenroom_client_turns_total{client=\"_others\",status=\"completed\"} 900");
        has("greenroom_client_request_cost_usd_sum{client=\"client-7\"} 0.25");
        has("greenroom_client_request_cost_usd_bucket{client=\"_others\",le=\"0.1\"} 0");
        has("greenroom_client_request_cost_usd_count{client=\"_others\"} 900");
        assert!(!named.contains("client-100"), "{named}");
    }
}
