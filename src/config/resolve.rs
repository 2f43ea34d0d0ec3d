//! From raw texts to [`Settings`]: parsing, defaults that depend on other things, and the checks
//! that need more than one setting.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde_json::Value as Json;
use tracing::Level;
use url::Url;

use super::{
    ConfigError, CredentialSource, Flags, Secret, Settings, Source, credential, folders,
    source::Given,
    table::{Fallback, Kind, Spec},
    value::{Outcome, Parsed},
};

/// What the settings are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `greenroom serve`.
    Serve,
    /// `greenroom dev`: the defaults of a laptop.
    Dev,
    /// `greenroom service`: the one-shot service alone.
    Service,
    /// Looking only (`config`, `health`): the defaults of `serve`; what would stop the start as a
    /// whole, while each value is right, is a warning.
    Inspect,
}

/// What of the process's surroundings the settings depend on.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The working directory: relative paths begin here.
    pub cwd: PathBuf,
    /// The home folder.
    pub home: Option<PathBuf>,
    /// `PATH`, for [`super::find_claude`] and [`super::find_node`].
    pub path: Option<OsString>,
    pub(super) xdg_cache: Option<PathBuf>,
    pub(super) xdg_runtime: Option<PathBuf>,
    pub(super) temp: PathBuf,
}

impl Surroundings {
    fn new(env: &BTreeMap<OsString, OsString>, cwd: &Path) -> Self {
        let get = |name: &str| {
            env.get(&OsString::from(name))
                .filter(|value| !value.is_empty())
        };
        // The XDG specification: relative paths are invalid and ignored.
        let folder = |name| {
            get(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        Self {
            cwd: cwd.to_owned(),
            home: folder("HOME"),
            path: get("PATH").cloned(),
            xdg_cache: folder("XDG_CACHE_HOME"),
            xdg_runtime: folder("XDG_RUNTIME_DIR"),
            temp: folder("TMPDIR").unwrap_or_else(|| PathBuf::from("/tmp")),
        }
    }
}

/// One setting as it stands, for `greenroom config`.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The variable's name.
    pub name: &'static str,
    /// Its value: null for none, `"***"` for a secret, numbers in the unit of the name.
    pub value: Json,
    /// Who set it.
    pub source: Source,
}

/// The settings and what is known about them.
#[derive(Debug)]
pub struct Loaded {
    /// The effective settings.
    pub settings: Settings,
    /// What they were loaded for.
    pub mode: Mode,
    /// Every setting with its source, in the table's order.
    pub entries: Vec<Entry>,
    /// What an operator should know, one sentence each; to be logged after the
    /// log's first line.
    pub warnings: Vec<String>,
    /// What else was read of the process's surroundings.
    pub surroundings: Surroundings,
}

impl Loaded {
    /// Where the credential of the model API comes from.
    ///
    /// # Errors
    /// [`ConfigError::MissingCredential`] for a `serve` that has none and does not rehearse; a
    /// `CLAUDE_CREDENTIALS_FILE` that is no file.
    pub fn credential(&self) -> Result<CredentialSource, ConfigError> {
        let home = self.surroundings.home.as_deref();
        let chosen = credential::choose(&self.settings, self.mode, home, Path::is_file)?;
        if let CredentialSource::File(path) = &chosen
            && !path.is_file()
        {
            return Err(ConfigError::BadValue {
                name: "CLAUDE_CREDENTIALS_FILE",
                origin: self.source("CLAUDE_CREDENTIALS_FILE").clone(),
                problem: format!("{} is no file", path.display()),
                allowed: "a file with a credential of the model API".to_owned(),
            });
        }
        Ok(chosen)
    }

    fn source(&self, name: &str) -> &Source {
        source_of(&self.entries, name)
    }
}

fn source_of<'a>(entries: &'a [Entry], name: &str) -> &'a Source {
    entries
        .iter()
        .find(|entry| entry.name == name)
        .map_or(&Source::Default, |entry| &entry.source)
}

/// What a default may depend on.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) mode: Mode,
    given: &'a Given,
    around: &'a Surroundings,
}

impl Context<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.given.get(name).map(|raw| raw.text.as_str())
    }

    pub(super) fn cache_folder(&self) -> Option<String> {
        let folder = folders::cache_folder(self.mode, self.around);
        Some(folder.to_string_lossy().into_owned())
    }

    pub(super) fn bind_address(&self) -> Option<String> {
        let has_secret = ["GREENROOM_API_TOKEN", "CLAUDE_SERVICE_SECRET"]
            .iter()
            .any(|name| self.text(name).is_some());
        let everywhere = has_secret && self.mode != Mode::Dev;
        Some(if everywhere { "0.0.0.0" } else { "127.0.0.1" }.to_owned())
    }

    pub(super) fn allowed_hosts(&self) -> Option<String> {
        let mut hosts = "localhost,127.0.0.1,[::1]".to_owned();
        // A bad address was reported by its own row, which comes first.
        let public = self
            .text("API_BASE_URL")
            .map(|text| text.replace("{port}", "1"));
        if let Some(host) = public
            .and_then(|text| Url::parse(&text).ok())
            .and_then(|url| url.host_str().map(str::to_owned))
            .filter(|host| !hosts.split(',').any(|known| known == host))
        {
            hosts.push(',');
            hosts.push_str(&host);
        }
        Some(hosts)
    }
}

/// Makes a field of a parsed value, or of none.
pub(super) trait Field<T> {
    fn of(value: Option<T>) -> Option<Self>
    where
        Self: Sized;
}

impl<T> Field<T> for T {
    fn of(value: Option<T>) -> Option<T> {
        value
    }
}

impl<T> Field<T> for Option<T> {
    fn of(value: Option<T>) -> Option<Option<T>> {
        Some(value)
    }
}

/// Parses row by row and notes each row's source.
#[derive(Debug)]
pub(super) struct Resolver<'a> {
    context: Context<'a>,
    entries: Vec<Entry>,
    secrets: Vec<Secret>,
}

impl Resolver<'_> {
    /// The field of one row.
    pub(super) fn resolve<T, F: Field<T>>(
        &mut self,
        spec: &'static Spec,
        parse: impl Fn(&str, &Surroundings) -> Outcome<T>,
    ) -> Result<F, ConfigError> {
        let around = self.context.around;
        let (text, source) = match self.context.given.get(spec.name) {
            Some(raw) => (Some(raw.text.clone()), raw.origin.clone()),
            None => {
                let text = match spec.default {
                    Fallback::None => None,
                    Fallback::Is(text) => Some(text.to_owned()),
                    Fallback::By(decide) => decide(&self.context),
                };
                (text, Source::Default)
            }
        };
        let (value, shown) = match text.as_deref().map(|text| parse(text, around)) {
            None => (None, Json::Null),
            Some(Ok(Parsed { value, shown })) => (Some(value), shown),
            Some(Err(wrong)) => {
                return Err(ConfigError::BadValue {
                    name: spec.name,
                    origin: source,
                    problem: wrong.problem,
                    allowed: wrong.allowed,
                });
            }
        };
        if spec.kind == Kind::Secret {
            self.secrets.extend(text.map(Secret::new));
        }
        self.entries.push(Entry {
            name: spec.name,
            value: shown,
            source,
        });
        // A row whose field is not optional has a default.
        F::of(value).ok_or_else(|| ConfigError::Conflict(format!("{} is not set", spec.name)))
    }

    pub(super) fn take_secrets(&mut self) -> Vec<Secret> {
        std::mem::take(&mut self.secrets)
    }
}

/// Loads the settings: flags over `env` over `.env` over YAML over defaults. Reads files below
/// `cwd` and its two parents and nothing else of the process.
///
/// # Errors
/// [`ConfigError`], one line, for the first thing that is wrong.
pub fn load(
    mode: Mode,
    flags: &Flags,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    cwd: &Path,
) -> Result<Loaded, ConfigError> {
    let env: BTreeMap<OsString, OsString> = env.into_iter().collect();
    let mut warnings = Vec::new();
    let given = Given::read(flags, &env, cwd, &mut warnings)?;
    let surroundings = Surroundings::new(&env, cwd);
    let mut resolver = Resolver {
        context: Context {
            mode,
            given: &given,
            around: &surroundings,
        },
        entries: Vec::new(),
        secrets: Vec::new(),
    };
    let mut settings = Settings::build(flags.rehearsal, &mut resolver)?;
    let mut entries = resolver.entries;
    apply_debug(&mut settings, &mut entries);
    for conflict in conflicts(&settings, mode, &entries) {
        if mode == Mode::Inspect {
            warnings.push(conflict.to_string());
        } else {
            return Err(conflict);
        }
    }
    warnings.extend(doubts(&settings, mode, cwd));
    Ok(Loaded {
        settings,
        mode,
        entries,
        warnings,
        surroundings,
    })
}

/// `DEBUG=true` raises the level to debug, unless `LOG_LEVEL` was set by a stronger source.
fn apply_debug(settings: &mut Settings, entries: &mut [Entry]) {
    let debug = source_of(entries, "DEBUG").clone();
    let stronger = source_of(entries, "LOG_LEVEL").rank() < debug.rank();
    if settings.debug && !stronger && settings.log_level < Level::DEBUG {
        settings.log_level = Level::DEBUG;
        if let Some(entry) = entries.iter_mut().find(|entry| entry.name == "LOG_LEVEL") {
            entry.value = "debug".into();
            entry.source = debug;
        }
    }
}

/// What stops a start although each value by itself is right.
fn conflicts(settings: &Settings, mode: Mode, entries: &[Entry]) -> Vec<ConfigError> {
    let mut conflicts = Vec::new();
    let mut add = |text: String| conflicts.push(ConfigError::Conflict(text));
    if !settings.bind.to_canonical().is_loopback()
        && !settings.has_api_secret()
        && !settings.insecure
    {
        add(format!(
            "BIND ({}): {} is open to the network and no API secret is set; set \
             GREENROOM_API_TOKEN or CLAUDE_SERVICE_SECRET, bind to 127.0.0.1, or say --insecure",
            source_of(entries, "BIND").described("BIND"),
            settings.bind,
        ));
    }
    let mut ports = vec![
        ("API_PORT", Some(settings.api_port)),
        ("PREVIEW_PORT", Some(settings.preview_port)),
        ("HMR_PORT", Some(settings.hmr_port)),
    ];
    if mode == Mode::Service {
        ports.clear();
    }
    ports.push(("CLAUDE_SERVICE_PORT", settings.claude_service_port));
    ports.push(("GATEWAY_PORT", settings.gateway_port));
    let mut taken: BTreeMap<u16, &str> = BTreeMap::new();
    for (name, port) in ports {
        // 0 is a free one each time.
        if let Some(port) = port.filter(|port| *port != 0)
            && let Some(other) = taken.insert(port, name)
        {
            add(format!(
                "{name} ({}): {port} is {other} ({}) already; allowed: a port of its own",
                source_of(entries, name).described(name),
                source_of(entries, other).described(other),
            ));
        }
    }
    if let Some(repo) = settings
        .repo_url
        .as_deref()
        .filter(|repo| repo.starts_with('/'))
    {
        let is_below = settings
            .allowed_local_repos
            .as_deref()
            .is_some_and(|allowed| {
                let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
                real(Path::new(repo)).starts_with(real(allowed))
            });
        if !is_below {
            add(format!(
                "REPO_URL ({}): a local path that is not below GREENROOM_ALLOWED_LOCAL_REPOS; \
                 allowed: an https:// URL, or a path below that folder",
                source_of(entries, "REPO_URL").described("REPO_URL"),
            ));
        }
    }
    conflicts
}

/// What is allowed and probably not meant.
fn doubts(settings: &Settings, mode: Mode, cwd: &Path) -> Vec<String> {
    let mut doubts = Vec::new();
    if settings.github_token.is_none() && mode != Mode::Service {
        doubts.push(
            "GITHUB_TOKEN is not set: private repositories cannot be cloned, nothing can be pushed"
                .to_owned(),
        );
    }
    if settings.anthropic_api_key.is_some() && settings.claude_credentials_file.is_some() {
        doubts.push(
            "ANTHROPIC_API_KEY and CLAUDE_CREDENTIALS_FILE are both set: the key is used"
                .to_owned(),
        );
    }
    if settings.gateway_port.is_some() && settings.gateway_tokens_file.is_none() {
        doubts.push(
            "GATEWAY_PORT is set without GATEWAY_TOKENS_FILE: nobody can use that listener"
                .to_owned(),
        );
    }
    for (name, previous, current) in [
        (
            "GREENROOM_API_TOKEN",
            settings.api_token_previous.is_some(),
            settings.api_token.is_some(),
        ),
        (
            "CLAUDE_SERVICE_SECRET",
            settings.claude_service_secret_previous.is_some(),
            settings.claude_service_secret.is_some(),
        ),
    ] {
        if previous && !current {
            doubts.push(format!(
                "{name}_PREVIOUS is set without {name}: it is good by itself, but the newer one \
                 goes there"
            ));
        }
    }
    if settings.drain >= settings.stop_timeout {
        doubts.push(
            "DRAIN_SECONDS leaves nothing of STOP_TIMEOUT_SECONDS to save what running turns wrote"
                .to_owned(),
        );
    }
    if cwd.join("greenroom.yml").is_file() {
        doubts.push("greenroom.yml is not read: its name has to be greenroom.yaml".to_owned());
    }
    doubts
}

/// Where a program on this machine reaches a listener bound to `bind`.
pub fn reachable(bind: IpAddr) -> IpAddr {
    match bind {
        IpAddr::V4(v4) if v4.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        // The unspecified IPv6 address takes IPv4 as well on Linux, unless told otherwise.
        IpAddr::V6(v6) if v6.is_unspecified() => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        specific => specific,
    }
}
