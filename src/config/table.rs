//! The one table of all settings, and the struct made of it.
//!
//! A row gives the variable's name, the field and its type, the kind, the parser, the default and
//! a sentence. Flags, help, YAML spellings, `greenroom config` and the fields' documentation are
//! derived from it.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use jiff::tz::TimeZone;
use tracing::Level;

use super::{
    ConfigError, LogFormat, PreviewErrors, Secret,
    resolve::{Context, Mode, Resolver},
    value,
};
use crate::identity::{ClientId, ThreadId, UserId};

/// How a setting is written, apart from what its parser demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything on one line.
    Text,
    /// A number.
    Number,
    /// A boolean; its flag alone means true.
    Switch,
    /// Texts separated by commas; in YAML also a list.
    List,
    /// A text that is never shown and is refused as a flag.
    Secret,
}

/// What a setting is when nobody sets it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fallback {
    /// Unset.
    None,
    /// This text, through the setting's parser.
    Is(&'static str),
    /// Depends on the mode or on what else was set.
    By(fn(&Context<'_>) -> Option<String>),
}

/// One row of the table.
#[derive(Debug)]
pub struct Spec {
    /// The variable's name, as `API_PORT`.
    pub name: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// What it means, for `--help`.
    pub doc: &'static str,
    pub(super) default: Fallback,
}

impl Spec {
    /// The flag without its dashes: the variable in kebab-case, without our own prefix.
    pub fn flag(&self) -> String {
        let bare = self.name.strip_prefix("GREENROOM_").unwrap_or(self.name);
        bare.to_ascii_lowercase().replace('_', "-")
    }

    /// Whether a YAML key means this setting: `API_PORT`, `api_port`, `api-port` or `apiPort`.
    pub(super) fn is_spelled(&self, key: &str) -> bool {
        let snake = self.name.to_ascii_lowercase();
        key == self.name || key == snake || key == snake.replace('_', "-") || key == camel(&snake)
    }

    /// The default for `--help`; `None` for one that depends or that there is not.
    pub fn plain_default(&self) -> Option<&'static str> {
        match self.default {
            Fallback::Is(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }
}

fn camel(snake: &str) -> String {
    let mut words = snake.split('_');
    let mut camel = words.next().unwrap_or_default().to_owned();
    for word in words {
        let (first, rest) = word.split_at(1);
        camel.push_str(&first.to_ascii_uppercase());
        camel.push_str(rest);
    }
    camel
}

macro_rules! settings {
    ($($name:ident, $field:ident: $type:ty, $kind:ident, $parser:expr, $default:expr, $doc:literal;)*) => {
        /// Every setting, in the order in which `greenroom config` prints them.
        pub static TABLE: &[Spec] = &[$(Spec {
            name: stringify!($name),
            kind: Kind::$kind,
            doc: $doc,
            default: $default,
        }),*];

        /// The effective settings. Paths are absolute, base URLs have no trailing slash.
        #[derive(Debug, Clone)]
        pub struct Settings {
            $(#[doc = $doc] pub $field: $type,)*
            /// `--rehearsal`: the model is played by a script, whatever credential is there.
            pub rehearsal: bool,
            secrets: Vec<Secret>,
        }

        impl Settings {
            /// Resolves the rows in order; the first bad value stops.
            pub(super) fn build(rehearsal: bool, from: &mut Resolver<'_>) -> Result<Self, ConfigError> {
                let mut rows = TABLE.iter();
                let mut next = || rows.next().expect("the macro makes a row for every field");
                Ok(Self {
                    $($field: from.resolve(next(), $parser)?,)*
                    rehearsal,
                    secrets: from.take_secrets(),
                })
            }
        }
    };
}

use Fallback::{By, Is, None as Unset};

settings! {
    WORKSPACE_PATH, workspace_path: PathBuf, Text, value::path,
        By(|c| Some(if c.mode == Mode::Dev { "./workspace" } else { "/workspace" }.to_owned())),
        "Root of the workspaces, a shared file system in production";
    CLIENT_ID, client_id: Option<ClientId>, Text, value::id::<ClientId>, Unset,
        "The one client served here; also the value of a clientId that a body omits";
    USER_ID, user_id: Option<UserId>, Text, value::id::<UserId>, Unset,
        "The one user served here; also the value of a userId that a body omits";
    THREAD_ID, thread_id: Option<ThreadId>, Text, value::id::<ThreadId>, Unset,
        "The thread that a body without threadId means";
    CACHE_PATH, cache_path: PathBuf, Text, value::path, By(|c| c.cache_folder()),
        "Folder on the local disk for what can be lost: dependencies, Vite caches";
    REPO_URL, repo_url: Option<String>, Text, value::repository, Unset,
        "Repository for a first init that names none";
    GREENROOM_ALLOWED_LOCAL_REPOS, allowed_local_repos: Option<PathBuf>, Text, value::path, Unset,
        "Folder below which a repository may be a local path (development and tests)";

    ANTHROPIC_API_KEY, anthropic_api_key: Option<Secret>, Secret, value::token, Unset,
        "Key of the model API";
    CLAUDE_CREDENTIALS_FILE, claude_credentials_file: Option<PathBuf>, Text, value::path, Unset,
        "File with a key or OAuth credentials of the model API";
    CLAUDE_OAUTH_TOKEN_URL, claude_oauth_token_url: String, Text, value::base_url,
        Is("https://platform.claude.com/v1/oauth/token"),
        "Where OAuth credentials are refreshed";
    ANTHROPIC_BASE_URL, anthropic_base_url: String, Text, value::base_url,
        Is("https://api.anthropic.com"),
        "Upstream of the gateway; a proxy can stand here";
    CLAUDE_BIN, claude_bin: Option<PathBuf>, Text, value::program, Unset,
        "The Claude Code CLI; else the installed package's program, else claude on PATH";
    CLAUDE_MODEL, claude_model: Option<String>, Text, value::model, Unset,
        "Model of a turn that names none; else the CLI's own choice";
    CLAUDE_MAX_OUTPUT_TOKENS, claude_max_output_tokens: Option<u32>, Number,
        |text, _| value::count::<u32>(text, 1, 10_000_000), Unset,
        "Most tokens of one answer; else the CLI's own limit";
    CLAUDE_TOOLS, claude_tools: Vec<String>, List, value::tools,
        Is("Read,Edit,Write,Bash,Glob,Grep"),
        "Tools that a turn may use";

    GITHUB_TOKEN, github_token: Option<Secret>, Secret, value::token, Unset,
        "Token for git over HTTPS and for pull requests";
    GIT_TOKEN_HOSTS, git_token_hosts: Vec<String>, List, value::hosts, Is(""),
        "Hosts that get GITHUB_TOKEN besides github.com";
    GITHUB_API_URL, github_api_url: String, Text, value::base_url, Is("https://api.github.com"),
        "GitHub's API, for pull requests; of a GitHub Enterprise server: https://{host}/api/v3";
    GIT_USER_NAME, git_user_name: String, Text, value::signature, Is("greenroom"),
        "Committer, and author where a request names none";
    GIT_USER_EMAIL, git_user_email: String, Text, value::signature, Is("greenroom@localhost"),
        "The committer's address";

    REPLICATE_API_TOKEN, replicate_api_token: Option<Secret>, Secret, value::token, Unset,
        "Token of Replicate, for images";
    REPLICATE_BASE_URL, replicate_base_url: String, Text, value::base_url,
        Is("https://api.replicate.com"),
        "Replicate's API";
    MODEL_CONFIGS_FILE, model_configs_file: Option<PathBuf>, Text, value::path, Unset,
        "Parameters, prices and times of Replicate's models (YAML); else config/model_configs.yaml";
    IMAGE_MODEL, image_model: Option<String>, Text, value::model, Unset,
        "Replicate's model that makes images for sites: OWNER/MODEL, or OWNER/MODEL:VERSION";
    IMAGE_LORA, image_lora: Option<String>, Text, value::model, Unset,
        "The brand's LoRA for it, as the model takes it; by client: clients in MODEL_CONFIGS_FILE";
    HF_TOKEN, hf_token: Option<Secret>, Secret, value::token, Unset,
        "Token of Hugging Face, for models";
    HF_ENDPOINT, hf_endpoint: String, Text, value::base_url, Is("https://huggingface.co"),
        "Hugging Face's API";

    GREENROOM_API_TOKEN, api_token: Option<Secret>, Secret, value::token, Unset,
        "Bearer token of the control plane";
    GREENROOM_API_TOKEN_PREVIOUS, api_token_previous: Option<Secret>, Secret, value::token, Unset,
        "The bearer token of before, good as well while callers change to the new one";
    CLAUDE_SERVICE_SECRET, claude_service_secret: Option<Secret>, Secret, value::key, Unset,
        "HMAC secret of signed requests";
    CLAUDE_SERVICE_SECRET_PREVIOUS, claude_service_secret_previous: Option<Secret>, Secret,
        value::key, Unset,
        "The HMAC secret of before, good as well while callers change to the new one";
    PREVIEW_TOKEN_SECRET, preview_token_secret: Option<Secret>, Secret, value::key, Unset,
        "Key of preview links; else derived from the service's secret, random without one";
    API_BASE_URL, api_base_url: String, Text, value::public_url, Is("http://localhost:{port}"),
        "Public address of the API; {port} is the port listened on";
    API_ALLOWED_HOSTS, api_allowed_hosts: Vec<String>, List, value::hosts,
        By(|c| c.allowed_hosts()),
        "Host names that the API answers to while it has no secret; loopback always";

    API_PORT, api_port: u16, Number, value::port, Is("8080"),
        "Port of the API and the studio; 0 picks a free one";
    PREVIEW_PORT, preview_port: u16, Number, value::port, Is("4321"),
        "Port of the previews";
    HMR_PORT, hmr_port: u16, Number, value::port, Is("4322"),
        "Port for the previews' WebSockets alone";
    BIND, bind: IpAddr, Text, value::address, By(|c| c.bind_address()),
        "Address to listen on; 0.0.0.0, or 127.0.0.1 while no API secret is set";
    GREENROOM_INSECURE, insecure: bool, Switch, value::switch, Is("false"),
        "Listen on other addresses than loopback without an API secret";
    PREVIEW_BASE_URL, preview_base_url: String, Text, value::preview_url,
        Is("http://{slug}.localhost:{port}"),
        "Public address of the previews; {slug} is the thread's label";
    CLAUDE_SERVICE_PORT, claude_service_port: Option<u16>, Number, value::port,
        By(|c| (c.mode == Mode::Service).then(|| "3001".to_owned())),
        "One more listener, with the one-shot service alone";
    SERVICE_MAX_CONCURRENT, service_max_concurrent: usize, Number,
        |text, _| value::count(text, 1, 1000), Is("5"),
        "One-shot runs at once";
    SERVICE_RATE_PER_MINUTE, service_rate_per_minute: u32, Number,
        |text, _| value::count::<u32>(text, 0, 1_000_000), Is("100"),
        "One-shot calls a minute of each caller's address, loopback excepted; 0 is no limit";
    LABEL_MODEL, label_model: Option<String>, Text, value::model, Unset,
        "Model that labels images; else CLAUDE_MODEL";
    LABEL_PROMPTS_FILE, label_prompts_file: Option<PathBuf>, Text, value::path, Unset,
        "Prompts for labels besides the built-in ones, by name (YAML)";
    LABEL_MAX_CONCURRENT, label_max_concurrent: usize, Number,
        |text, _| value::count(text, 1, 1000), Is("4"),
        "Images labelled at once, apart from turns and other one-shot runs";
    CLAUDE_CLI_TIMEOUT, label_timeout: Duration, Number, value::some_seconds, Is("120"),
        "Longest run about one image, in seconds";
    LABEL_MEMORY_MB, label_memory_mb: u64, Number,
        |text, _| value::count(text, 64, 1_000_000), Is("1024"),
        "A run about one image that holds more is ended";
    LABEL_CPU_SECONDS, label_cpu: Duration, Number, value::some_seconds, Is("60"),
        "The same for one that uses more processor time";
    LABEL_MAX_PROCESSES, label_max_processes: usize, Number,
        |text, _| value::count(text, 3, 1000), Is("32"),
        "The same for one that has more processes, greenroom's own two among them";
    GATEWAY_PORT, gateway_port: Option<u16>, Number, value::port, Unset,
        "One more listener, with the gateway for other containers";
    GATEWAY_TOKENS_FILE, gateway_tokens_file: Option<PathBuf>, Text, value::path, Unset,
        "File with the bearer tokens of the gateway's clients";

    AUTO_SHUTDOWN_MINUTES, auto_shutdown: Option<Duration>, Number, value::minutes_or_never,
        Is("5"),
        "Idle time before shutdown; 0 is never, fractions allowed";
    ASTRO_DEV_MODE, astro_dev_mode: bool, Switch, value::switch, Is("true"),
        "Run dev servers at all";
    PREVIEW_READY_SECONDS, preview_ready: Duration, Number, value::seconds, Is("30"),
        "How long an init waits for the preview";
    DRAIN_SECONDS, drain: Duration, Number, value::seconds, Is("25"),
        "How long running turns may go on after a signal";
    STOP_TIMEOUT_SECONDS, stop_timeout: Duration, Number, value::some_seconds, Is("30"),
        "When the platform kills what has not stopped";
    MAX_PREVIEWS, max_previews: usize, Number, |text, _| value::count(text, 1, 1000), Is("3"),
        "Dev servers alive at once";
    PREVIEW_ERRORS, preview_errors: PreviewErrors, Text, value::preview_errors, Is("banner"),
        "How a broken page is shown: as it was with a banner, or under Vite's overlay";
    MAX_WARM_AGENTS, max_warm_agents: usize, Number, |text, _| value::count(text, 0, 1000), Is("2"),
        "Idle CLI processes kept for the next turn";
    WARM_AGENT_MEMORY_MB, warm_agent_memory_mb: usize, Number,
        |text, _| value::count(text, 1, 1_000_000), Is("800"),
        "A CLI process that holds more after a turn is started anew for the next one";
    WARM_AGENT_MINUTES, warm_agent_age: Option<Duration>, Number, value::minutes_or_never,
        Is("240"),
        "The same for one that is older; 0 is never, fractions allowed";
    MAX_CONCURRENT_TURNS, max_concurrent_turns: usize, Number,
        |text, _| value::count(text, 1, 1000), Is("5"),
        "Agent runs at once in this container";
    MAX_QUEUED_TURNS, max_queued_turns: usize, Number,
        |text, _| value::count(text, 0, 10_000), Is("20"),
        "Turns that may wait in line, per thread";
    LEASE_SECONDS, lease: Duration, Number, value::some_seconds, Is("15"),
        "A lease without a beat for so long is stale";
    TURN_TIMEOUT_SECONDS, turn_timeout: Duration, Number, value::some_seconds, Is("600"),
        "Longest turn";

    EGRESS_ALLOW, egress_allow: Option<Vec<String>>, List, value::egress, Is("any"),
        "Hosts that agents, sites and installers may reach, through greenroom's proxy alone; .example.com is every name below, none is no host but the registries of npm's settings, any is no proxy";

    BUDGET_TURN_USD, budget_turn: Option<f64>, Number, value::dollars, Unset,
        "Most that one turn may spend at the model API, in US dollars";
    BUDGET_THREAD_DAY_USD, budget_thread_day: Option<f64>, Number, value::dollars, Unset,
        "The same of each thread in a day";
    BUDGET_THREAD_MONTH_USD, budget_thread_month: Option<f64>, Number, value::dollars, Unset,
        "The same of each thread in a calendar month";
    BUDGET_USER_DAY_USD, budget_user_day: Option<f64>, Number, value::dollars, Unset,
        "The same of each user in a day";
    BUDGET_USER_MONTH_USD, budget_user_month: Option<f64>, Number, value::dollars, Unset,
        "The same of each user in a calendar month";
    BUDGET_CLIENT_DAY_USD, budget_client_day: Option<f64>, Number, value::dollars, Unset,
        "The same of each client in a day";
    BUDGET_CLIENT_MONTH_USD, budget_client_month: Option<f64>, Number, value::dollars, Unset,
        "The same of each client in a calendar month";
    USAGE_TIME_ZONE, usage_time_zone: TimeZone, Text, value::time_zone, Is("UTC"),
        "Where the days and months of budgets and reports begin, as Europe/Berlin";
    PRICES_FILE, prices_file: Option<PathBuf>, Text, value::path, Unset,
        "Prices of models that differ from the built-in list, or are not on it (YAML)";

    CONTROL_PLANE_URL, control_plane_url: Option<String>, Text, value::url, Unset,
        "Where lifecycle events are posted";
    METRICS_TENANTS, metrics_tenants: bool, Switch, value::switch, Is("false"),
        "Figures by client in /metrics, of 100 clients at most";
    LOG_LEVEL, log_level: Level, Text, value::level, Is("info"),
        "How much is logged: error, warn, info, debug, trace";
    DEBUG, debug: bool, Switch, value::switch, Is("false"),
        "The same as LOG_LEVEL=debug";
    LOG_FORMAT, log_format: LogFormat, Text, value::format, Is("auto"),
        "Form of the log: text, json, or auto (text on a terminal, else json)";
    LOG_FILE, log_file: Option<PathBuf>, Text, value::path, Unset,
        "File that the log goes to as well, packed at 10 MB; the five last packed ones are kept";
}

impl Settings {
    /// Every secret that is set: what logs are masked of and children scrubbed of.
    pub fn secrets(&self) -> &[Secret] {
        &self.secrets
    }

    /// Whether callers of the API have to prove who they are.
    pub fn has_api_secret(&self) -> bool {
        [
            &self.api_token,
            &self.api_token_previous,
            &self.claude_service_secret,
            &self.claude_service_secret_previous,
        ]
        .into_iter()
        .any(Option::is_some)
    }

    /// Our public address, given the port that the API listens on.
    pub fn api_url(&self, port: u16) -> String {
        self.api_base_url.replace("{port}", &port.to_string())
    }

    /// The public address of a thread's preview, given its label and the port that previews
    /// listen on. Without `{slug}` in the setting it is the same for all threads.
    pub fn preview_url(&self, slug: &str, port: u16) -> String {
        self.preview_base_url
            .replace("{slug}", slug)
            .replace("{port}", &port.to_string())
    }

    /// Whether the API answers to this `Host` header (its port is ignored) while it has no
    /// secret. Loopback addresses and `localhost` always pass: no foreign name that is rebound to
    /// us can look like them.
    pub fn allows_host(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port))
                if port.bytes().all(|b| b.is_ascii_digit())
                    && (!name.contains(':') || name.ends_with(']')) =>
            {
                name
            }
            _ => host,
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost"
            || bare
                .parse::<IpAddr>()
                .is_ok_and(|ip| ip.to_canonical().is_loopback())
            || self.api_allowed_hosts.contains(&name)
    }
}
