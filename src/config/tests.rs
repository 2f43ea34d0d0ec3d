//! The settings as an operator meets them: values in, effective settings or one line out.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tracing::Level;

use super::*;

/// A working directory two folders deep, with all that can be set.
struct Place {
    root: TempDir,
    env: Vec<(OsString, OsString)>,
    flags: Flags,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b/config")).unwrap();
        let home = ("HOME".into(), root.path().into());
        Self {
            root,
            env: vec![home],
            flags: Flags::default(),
        }
    }

    fn cwd(&self) -> PathBuf {
        self.root.path().join("a/b")
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    fn flag(mut self, name: &'static str, value: &str) -> Self {
        self.flags.values.insert(name, value.to_owned());
        self
    }

    /// A file; its name is relative to the working directory.
    fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.cwd().join(name), content).unwrap();
        self
    }

    fn load(&self, mode: Mode) -> Result<Loaded, ConfigError> {
        load(mode, &self.flags, self.env.clone(), &self.cwd())
    }

    fn settings(&self) -> Settings {
        self.load(Mode::Serve).unwrap().settings
    }

    /// The one line in which the start ends.
    fn refusal(&self) -> String {
        let error = anyhow::Error::from(self.load(Mode::Serve).expect_err("it is refused"));
        let line = format!("{error:#}");
        assert!(!line.contains(char::is_control), "one line: {line:?}");
        line
    }

    fn entry(&self, name: &str) -> (Json, String) {
        let loaded = self.load(Mode::Serve).unwrap();
        let entry = loaded
            .entries
            .iter()
            .find(|entry| entry.name == name)
            .unwrap();
        (entry.value.clone(), entry.source.to_string())
    }
}

#[test]
fn the_defaults_are_the_contracts() {
    let place = Place::new();
    let s = place.settings();
    assert_eq!(s.workspace_path, Path::new("/workspace"));
    assert_eq!((s.api_port, s.preview_port, s.hmr_port), (8080, 4321, 4322));
    assert_eq!(
        (s.client_id, s.user_id, s.thread_id, s.repo_url),
        (None, None, None, None)
    );
    assert_eq!(s.anthropic_base_url, "https://api.anthropic.com");
    assert_eq!(
        s.claude_tools,
        ["Read", "Edit", "Write", "Bash", "Glob", "Grep"]
    );
    assert_eq!((s.claude_model, s.claude_max_output_tokens), (None, None));
    assert_eq!(
        (s.git_user_name.as_str(), s.git_user_email.as_str()),
        ("greenroom", "greenroom@localhost")
    );
    assert!(s.git_token_hosts.is_empty());
    assert_eq!(s.bind.to_string(), "127.0.0.1");
    assert_eq!((s.claude_service_port, s.gateway_port), (None, None));
    assert_eq!(s.auto_shutdown, Some(Duration::from_secs(300)));
    assert!(s.astro_dev_mode && !s.insecure && !s.rehearsal);
    let seconds = [
        s.preview_ready,
        s.drain,
        s.stop_timeout,
        s.lease,
        s.turn_timeout,
    ];
    assert_eq!(seconds.map(|d| d.as_secs()), [30, 25, 30, 15, 600]);
    assert_eq!(
        (s.max_previews, s.max_warm_agents, s.service_max_concurrent),
        (3, 2, 5)
    );
    assert_eq!((s.max_concurrent_turns, s.max_queued_turns), (5, 20));
    assert_eq!((s.log_level, s.log_format), (Level::INFO, LogFormat::Auto));
    assert_eq!(s.cache_path, place.root.path().join(".cache/greenroom"));

    let dev = place.load(Mode::Dev).unwrap().settings;
    assert_eq!(dev.workspace_path, place.cwd().join("workspace"));
    let service = place.load(Mode::Service).unwrap().settings;
    assert_eq!(service.claude_service_port, Some(3001));
    assert_eq!(service.auto_shutdown, Some(Duration::from_secs(300)));
}

#[test]
fn a_stronger_source_wins_and_is_named() {
    let expect = |place: Place, port: u16, source: &str| {
        let source = source.replace("ROOT", place.root.path().to_str().unwrap());
        assert_eq!(place.entry("API_PORT"), (json!(port), source));
        assert_eq!(place.settings().api_port, port);
        place
    };
    let place = expect(Place::new(), 8080, "default");
    let place = expect(
        place.file("config/a.yaml", "api_port: 1"),
        1,
        "config/a.yaml",
    );
    let place = expect(
        place.file("config/b.yaml", "apiPort: 2"),
        2,
        "config/b.yaml",
    );
    let place = expect(
        place.file("greenroom.yaml", "api-port: 3"),
        3,
        "greenroom.yaml",
    );
    let place = place.file("../../.env", "API_PORT=4\nHMR_PORT=14");
    let place = expect(place, 4, ".env (ROOT/.env)");
    let place = expect(place.file("../.env", "API_PORT=5"), 5, ".env (ROOT/a/.env)");
    let place = expect(place.file(".env", "API_PORT=6"), 6, ".env (ROOT/a/b/.env)");
    let place = expect(place.env("API_PORT", "7"), 7, "environment");
    let place = expect(place.flag("API_PORT", "9"), 9, "flag");
    assert_eq!(
        place.settings().hmr_port,
        14,
        "files are merged setting by setting"
    );
}

#[test]
fn empty_values_count_as_unset() {
    let place = Place::new()
        .env("API_PORT", "")
        .env("CLIENT_ID", "  ")
        .file(".env", "API_PORT=\nPREVIEW_PORT=''\n")
        .file("../.env", "API_PORT=99\n")
        .file("greenroom.yaml", "preview_port: ~\nuser_id: ''\n");
    let settings = place.settings();
    assert_eq!((settings.api_port, settings.preview_port), (99, 4321));
    assert_eq!((settings.client_id, settings.user_id), (None, None));
    assert!(
        Place::new()
            .file("greenroom.yaml", "# nothing\n")
            .load(Mode::Serve)
            .is_ok()
    );
    let line = Place::new().flag("API_PORT", "").refusal();
    assert!(
        line.starts_with("API_PORT (flag --api-port): empty"),
        "{line}"
    );
}

#[test]
fn yaml_keys_may_be_spelled_in_four_ways() {
    for key in [
        "AUTO_SHUTDOWN_MINUTES",
        "auto_shutdown_minutes",
        "auto-shutdown-minutes",
        "autoShutdownMinutes",
    ] {
        let place = Place::new().file("greenroom.yaml", format!("{key}: 0.5"));
        assert_eq!(
            place.settings().auto_shutdown,
            Some(Duration::from_secs(30)),
            "{key}"
        );
    }
    let mut spellings = HashSet::new();
    for spec in TABLE {
        assert!(
            spellings.insert(spec.flag()),
            "{} has a flag of its own",
            spec.name
        );
    }
}

#[test]
fn yaml_values_may_be_of_their_own_types() {
    let place = Place::new().file(
        "greenroom.yaml",
        "CLAUDE_TOOLS: [Read, Edit]\nGIT_TOKEN_HOSTS:\n  - Git.Example.com\n  - '::1'\n\
         ASTRO_DEV_MODE: false\nGREENROOM_INSECURE: yes\nCLIENT_ID: 42\nLEASE_SECONDS: 2\n\
         API_ALLOWED_HOSTS: one.example, two.example\n",
    );
    let settings = place.settings();
    assert_eq!(settings.claude_tools, ["Read", "Edit"]);
    assert_eq!(settings.git_token_hosts, ["git.example.com", "[::1]"]);
    assert!(!settings.astro_dev_mode && settings.insecure);
    assert_eq!(settings.client_id.unwrap().as_str(), "42");
    assert_eq!(settings.lease, Duration::from_secs(2));
    assert_eq!(settings.api_allowed_hosts, ["one.example", "two.example"]);
}

#[test]
fn unknown_names_stop_the_start() {
    for (place, parts) in [
        (
            Place::new().file("greenroom.yaml", "api_prot: 1"),
            ["api_prot", "greenroom.yaml", "API_PORT?"],
        ),
        (
            Place::new().file("greenroom.yaml", "apiURL: x"),
            ["apiURL", "greenroom.yaml", "allowed"],
        ),
        (
            Place::new().file("config/x.yaml", "claude: {model: x}"),
            ["claude", "config/x.yaml", "allowed"],
        ),
        (
            Place::new().file("config/x.yaml", "GREENROOM_X: 1"),
            ["GREENROOM_X", "config/x.yaml", "allowed"],
        ),
        (
            Place::new().env("GREENROOM_API_TOKN", "canary-77"),
            ["GREENROOM_API_TOKN", "environment", "GREENROOM_API_TOKEN?"],
        ),
        (
            Place::new().env("GREENROOM_", ""),
            ["GREENROOM_", "environment", "allowed"],
        ),
        (
            Place::new().file("../../.env", "GREENROOM_INSECUR=canary-77"),
            ["GREENROOM_INSECUR", "/.env)", "GREENROOM_INSECURE?"],
        ),
        (
            Place::new().file(".env", "GREENROOM_X 'canary-77"),
            ["GREENROOM_X", ".env", "allowed"],
        ),
    ] {
        let line = place.refusal();
        for part in parts {
            assert!(line.contains(part), "{part:?} in {line}");
        }
        assert!(!line.contains("canary"), "{line}");
    }
}

#[test]
fn other_programs_names_are_no_business_of_ours() {
    let mut place = Place::new()
        .env("greenroom_x", "1")
        .env("PORT", "abc")
        .file(
            ".env",
            b"NODE_ENV=\"it's never closed\nPATH == 3\nwhat is this\n\xff\xfe=\xff\nAPI_PORT=12\n",
        )
        .file(
            "config/model_configs.yaml",
            "anything: {goes: [here]}\n- not even yaml",
        )
        .file("config/notes.yml", "x: 1")
        .file("config/.hidden.yaml", "x: 1");
    place.env.push((
        OsString::from_vec(vec![0xff]),
        OsString::from_vec(vec![0xff]),
    ));
    place
        .env
        .push(("LANG".into(), OsString::from_vec(vec![0xff])));
    fs::create_dir(place.root.path().join("a/.env")).unwrap();
    assert_eq!(
        place.settings().api_port,
        12,
        "a folder .env is some tool's own"
    );
}

#[test]
fn bad_values_are_refused_by_name_source_and_rule() {
    for (name, values) in [
        (
            "API_PORT",
            &[
                "abc",
                "-1",
                "65536",
                "+1",
                "1.5",
                "0x10",
                "tcp://10.0.0.1:80",
                "99999999999999999999999",
            ][..],
        ),
        ("CLAUDE_SERVICE_PORT", &["x"]),
        (
            "AUTO_SHUTDOWN_MINUTES",
            &[
                "-1", "nan", "inf", "-inf", "infinity", "1e999", "five", "525601", "-0.1",
            ],
        ),
        ("LEASE_SECONDS", &["0", "-0", "NaN", "1s", "1e300"]),
        ("TURN_TIMEOUT_SECONDS", &["0", "10m"]),
        ("DRAIN_SECONDS", &["-1"]),
        ("MAX_PREVIEWS", &["0", "-1", "many", "1.0"]),
        ("MAX_WARM_AGENTS", &["-1"]),
        (
            "EGRESS_ALLOW",
            &[
                "*",
                "*.example.com",
                ".",
                "http://x",
                "x:443",
                "10.0.0.1",
                "[::1]",
                "2130706433",
                "a/b",
                ",",
                "any,example.com,1.2.3.4",
            ],
        ),
        ("CLAUDE_MAX_OUTPUT_TOKENS", &["0", "4294967297"]),
        ("CLIENT_ID", &["../x", ".a", "a/b", "a..b", "x.lock", "ä"]),
        ("USER_ID", &["a b"]),
        ("THREAD_ID", &["-x"]),
        (
            "REPO_URL",
            &[
                "http://github.com/a/b",
                "ftp://x/y",
                "git@evil.example:a/b",
                "ext::sh -c id",
                "file:///etc",
                "relative/path",
                "-u",
                "https://x?y=z",
            ],
        ),
        (
            "ANTHROPIC_BASE_URL",
            &[
                "localhost:1",
                "ftp://x",
                "https://",
                "http:x",
                "https://x/#y",
                "https://a b",
                "//x",
            ],
        ),
        ("HF_ENDPOINT", &["https://x/?q=1"]),
        ("CONTROL_PLANE_URL", &["unix:/x", "javascript:1"]),
        (
            "PREVIEW_BASE_URL",
            &[
                "https://x.{slug}.com",
                "https://{slug}",
                "https://x/{slug}",
                "https://{slug}.{slug}.x",
                "https://{thread}.x",
                "{slug}",
                "https://{slug}x.com",
            ],
        ),
        ("API_BASE_URL", &["https://{slug}.x", "example.com"]),
        (
            "CLAUDE_TOOLS",
            &[
                "Read;Edit",
                "--dangerously-skip-permissions",
                ",",
                "Bash(git:*)",
            ],
        ),
        ("CLAUDE_MODEL", &["--help", "a b"]),
        ("API_ALLOWED_HOSTS", &["*", "http://x", "x:80", "a/b", ","]),
        ("GIT_USER_NAME", &["<x>"]),
        ("BIND", &["example.com", "0.0.0.0:80", "*", "256.0.0.1"]),
        ("GREENROOM_INSECURE", &["maybe", "2", "truee"]),
        ("DEBUG", &["*"]),
        ("LOG_LEVEL", &["loud", "3", "off"]),
        ("LOG_FORMAT", &["xml"]),
        ("PREVIEW_ERRORS", &["none", "true"]),
    ] {
        for value in values {
            let environment = Place::new().env(name, value).refusal();
            assert!(
                environment.starts_with(&format!("{name} (environment): ")),
                "{environment}"
            );
            assert!(environment.contains("; allowed: "), "{environment}");
            let flag = Place::new().flag(name, value);
            assert!(
                flag.load(Mode::Serve).unwrap_err().is_usage(),
                "{name}={value}"
            );
            let line = flag.refusal();
            let spec = TABLE.iter().find(|spec| spec.name == name).unwrap();
            assert!(
                line.starts_with(&format!("{name} (flag --{}): ", spec.flag())),
                "{line}"
            );
            let line = Place::new()
                .file(".env", format!("{name}='{value}'"))
                .refusal();
            assert!(line.starts_with(&format!("{name} (.env (")), "{line}");
        }
    }
    let line = Place::new().env("API_PORT", "70000").refusal();
    assert_eq!(
        line,
        "API_PORT (environment): \"70000\" is out of range; allowed: a whole number from 0 to 65535"
    );
    assert!(
        !Place::new()
            .env("API_PORT", "x")
            .load(Mode::Serve)
            .unwrap_err()
            .is_usage()
    );
    let mut place = Place::new();
    place
        .env
        .push(("API_PORT".into(), OsString::from_vec(vec![0xff])));
    assert!(
        place
            .refusal()
            .starts_with("API_PORT (environment): not UTF-8")
    );
}

#[test]
fn bad_yaml_is_refused_in_one_line() {
    for (content, part) in [
        (
            "api_port: 1\napiPort: 2",
            "API_PORT (greenroom.yaml) stands there twice",
        ),
        (
            "api_port: 1\napi_port: 2",
            "duplicate entry with key \"api_port\"",
        ),
        ("api_port: [1]", "API_PORT (greenroom.yaml): a list"),
        ("api_port: {a: 1}", "API_PORT (greenroom.yaml): a map"),
        ("api_port: true", "\"true\" is not a whole number"),
        ("client_id: 1.10", "put it in quotes"),
        ("claude_tools: [1]", "an item that is not a text"),
        ("- api_port", "it is not a map"),
        ("12: x", "a key is not a text"),
        ("a: b: c", "line 1"),
        ("api_port: !port 80", "a map or a tag"),
        ("\"evil\\n\\e[2Jkey\": 1", "is no setting"),
        ("x: &a [*a]", "greenroom.yaml"),
    ] {
        let line = Place::new().file("greenroom.yaml", content).refusal();
        assert!(line.contains(part), "{content:?}: {line}");
    }
    let huge = Place::new()
        .file("greenroom.yaml", vec![b'#'; 2 * 1024 * 1024])
        .refusal();
    assert!(huge.contains("larger than 1 MiB"), "{huge}");
}

#[test]
fn dot_env_is_read_as_people_write_it() {
    let place = Place::new().file(
        ".env",
        "\u{feff}# a comment\r\nexport CLIENT_ID=acme\r\n  USER_ID = \"al.ice\"   # who\r\n\
         GIT_USER_NAME=Ann of \"Acme\" # a comment\nGIT_USER_EMAIL='a#b@x.example'\n\
         ANTHROPIC_API_KEY=abc$HOME#not-a-comment=\nCLAUDE_SERVICE_SECRET=\"a \\\"b\\\" \\\\ c\"\n\
         CERT=\"-----BEGIN\nAPI_PORT=1\n-----END\"\nKEY='\nHMR_PORT=x\n'\n\
         CLAUDE_MODEL=first\nCLAUDE_MODEL=`second`\nTHREAD_ID=main",
    );
    let settings = place.settings();
    assert_eq!(settings.client_id.unwrap().as_str(), "acme");
    assert_eq!(settings.user_id.unwrap().as_str(), "al.ice");
    assert_eq!(settings.git_user_name, "Ann of \"Acme\"");
    assert_eq!(settings.git_user_email, "a#b@x.example");
    assert_eq!(
        settings.anthropic_api_key.unwrap().expose(),
        "abc$HOME#not-a-comment="
    );
    assert_eq!(
        settings.claude_service_secret.unwrap().expose(),
        "a \"b\" \\ c"
    );
    assert_eq!(
        (settings.api_port, settings.hmr_port),
        (8080, 4322),
        "inside of others' values"
    );
    assert_eq!(settings.claude_model.as_deref(), Some("second"));
    assert_eq!(settings.thread_id.unwrap().as_str(), "main");

    for (content, problem) in [
        ("API_PORT 8080", "no ="),
        ("API_PORT: 8080", "no ="),
        ("HF_TOKEN='canary-1", "a quote that is never closed"),
        ("HF_TOKEN=\"canary-1\"x", "text after the closing quote"),
        (
            "HF_TOKEN=\"canary-1 \n x\"",
            "a character that a token cannot hold",
        ),
    ] {
        let line = Place::new().file(".env", content).refusal();
        assert!(
            line.contains(problem) && !line.contains("canary"),
            "{content:?}: {line}"
        );
    }
}

#[test]
fn no_text_breaks_the_dot_env_reader() {
    // Every string of up to six of the characters that mean something.
    let alphabet = [
        "A",
        "=",
        "'",
        "\"",
        "\\",
        "\n",
        "#",
        " ",
        "ä",
        "GREENROOM_X",
        "export ",
    ];
    let mut state = 7_u32;
    for _ in 0..50_000 {
        let mut text = String::new();
        for _ in 0..state % 12 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            text.push_str(alphabet[(state >> 16) as usize % alphabet.len()]);
        }
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let mut given = source::Given::default();
        let outcome = given.dot_env(text.as_bytes(), &Source::DotEnv(".env".into()));
        let names_ours = text.contains("GREENROOM_X");
        assert!(outcome.is_ok() || names_ours, "{text:?}: {outcome:?}");
    }
}

const SECRETS: [&str; 9] = [
    "ANTHROPIC_API_KEY",
    "GITHUB_TOKEN",
    "REPLICATE_API_TOKEN",
    "HF_TOKEN",
    "GREENROOM_API_TOKEN",
    "GREENROOM_API_TOKEN_PREVIOUS",
    "CLAUDE_SERVICE_SECRET",
    "CLAUDE_SERVICE_SECRET_PREVIOUS",
    "PREVIEW_TOKEN_SECRET",
];

#[test]
fn secrets_are_listed_and_never_shown() {
    let kinds: Vec<&str> = TABLE
        .iter()
        .filter(|spec| spec.kind == Kind::Secret)
        .map(|spec| spec.name)
        .collect();
    assert_eq!(kinds, SECRETS);
    for (at, name) in SECRETS.into_iter().enumerate() {
        let value = format!("canary-{at}");
        let place = match at % 3 {
            0 => Place::new().env(name, &value),
            1 => Place::new().file(".env", format!("{name}={value}")),
            _ => Place::new().file("greenroom.yaml", format!("{name}: {value}")),
        };
        let loaded = place.load(Mode::Serve).unwrap();
        assert!(!format!("{loaded:?}").contains("canary"), "{name}");
        assert_eq!(place.entry(name).0, "***");
        assert_eq!(loaded.settings.secrets(), [Secret::new(value)]);
        let line = Place::new().env(name, "canary\u{1}-bad").refusal();
        assert!(line.starts_with(name) && !line.contains("canary"), "{line}");
    }
    for (name, value) in [
        ("REPO_URL", "https://x:canary@github.com/a/b"),
        ("ANTHROPIC_BASE_URL", "https://canary@proxy.example"),
        ("CONTROL_PLANE_URL", "ftp://x/?t=canary"),
        ("HF_ENDPOINT", "https://x/?t=canary"),
        (
            "API_PORT",
            "sk-ant-canary-0123456789012345678901234567890123456789",
        ),
    ] {
        let line = Place::new().env(name, value).refusal();
        assert!(line.starts_with(name) && !line.contains("canary"), "{line}");
    }
    let place = Place::new().env("CONTROL_PLANE_URL", "https://x.example/hook?t=canary");
    assert_eq!(
        place.entry("CONTROL_PLANE_URL").0,
        "https://x.example/hook?***"
    );
    assert!(
        place
            .settings()
            .control_plane_url
            .unwrap()
            .ends_with("t=canary")
    );
}

#[test]
fn the_network_is_for_those_with_a_secret() {
    let bind = |place: &Place| place.settings().bind.to_string();
    let with_token = || Place::new().env("GREENROOM_API_TOKEN", "token");
    assert_eq!(bind(&with_token()), "0.0.0.0");
    assert_eq!(
        bind(&Place::new().file("greenroom.yaml", "claude_service_secret: s")),
        "0.0.0.0"
    );
    assert_eq!(
        bind(&Place::new().env("PREVIEW_TOKEN_SECRET", "s")),
        "127.0.0.1"
    );
    assert_eq!(
        with_token()
            .load(Mode::Dev)
            .unwrap()
            .settings
            .bind
            .to_string(),
        "127.0.0.1"
    );
    assert_eq!(bind(&with_token().env("BIND", "127.0.0.1")), "127.0.0.1");

    for address in ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "[::]"] {
        let line = Place::new().env("BIND", address).refusal();
        assert!(
            line.starts_with("BIND (environment): ") && line.contains("--insecure"),
            "{line}"
        );
        assert!(Place::new().env("BIND", address).load(Mode::Dev).is_err());
        let looked = Place::new()
            .env("BIND", address)
            .load(Mode::Inspect)
            .unwrap();
        assert!(
            looked
                .warnings
                .iter()
                .any(|warning| warning.starts_with("BIND"))
        );
        bind(
            &Place::new()
                .env("BIND", address)
                .env("GREENROOM_INSECURE", "true"),
        );
        bind(&with_token().env("BIND", address));
    }
    for address in [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "[::1]",
        "localhost",
        "::ffff:127.0.0.1",
    ] {
        bind(&Place::new().env("BIND", address));
    }
    assert_eq!(
        reachable("0.0.0.0".parse().unwrap()).to_string(),
        "127.0.0.1"
    );
    assert_eq!(reachable("::".parse().unwrap()).to_string(), "::1");
    assert_eq!(
        reachable("10.0.0.1".parse().unwrap()).to_string(),
        "10.0.0.1"
    );
}

#[test]
fn ports_are_each_ones_own() {
    let line = Place::new().env("API_PORT", "4321").refusal();
    assert_eq!(
        line,
        "PREVIEW_PORT (default): 4321 is API_PORT (environment) already; allowed: a port of its own"
    );
    let free = Place::new()
        .env("API_PORT", "0")
        .env("PREVIEW_PORT", "0")
        .env("HMR_PORT", "0");
    assert_eq!(free.settings().preview_port, 0);
    let service = Place::new().env("CLAUDE_SERVICE_PORT", "8080");
    assert!(service.load(Mode::Serve).is_err());
    assert!(service.load(Mode::Service).is_ok(), "only that one listens");
}

#[test]
fn a_local_repository_lies_below_the_allowed_folder() {
    let root = tempfile::tempdir().unwrap();
    let repo = root.path().join("repos/site");
    fs::create_dir_all(&repo).unwrap();
    let allowed = root.path().join("repos");
    let place = |repo: &str, allowed: &Path| {
        Place::new()
            .env("REPO_URL", repo)
            .env("GREENROOM_ALLOWED_LOCAL_REPOS", allowed.to_str().unwrap())
    };
    let repo = repo.to_str().unwrap();
    assert_eq!(
        place(repo, &allowed).settings().repo_url.as_deref(),
        Some(repo)
    );
    let line = Place::new().env("REPO_URL", repo).refusal();
    assert!(
        line.starts_with("REPO_URL (environment): a local path"),
        "{line}"
    );
    assert!(
        place(repo, &root.path().join("rep"))
            .load(Mode::Serve)
            .is_err(),
        "no prefix of names"
    );
    assert!(
        place(&format!("{repo}/../../x"), &allowed)
            .load(Mode::Serve)
            .is_err()
    );
    std::os::unix::fs::symlink("/", allowed.join("out")).unwrap();
    let out = allowed.join("out/etc");
    assert!(
        place(out.to_str().unwrap(), &allowed)
            .load(Mode::Serve)
            .is_err(),
        "a link out"
    );
    for good in [
        "https://github.com/a/b.git",
        "git@github.com:a/b.git",
        "ssh://git@github.com/a/b",
    ] {
        assert!(
            Place::new().env("REPO_URL", good).load(Mode::Serve).is_ok(),
            "{good}"
        );
    }
}

#[test]
fn debug_raises_the_level_unless_a_stronger_source_says_otherwise() {
    let level = |place: Place| place.settings().log_level;
    assert_eq!(level(Place::new().env("DEBUG", "true")), Level::DEBUG);
    assert_eq!(
        level(Place::new().env("DEBUG", "1").env("LOG_LEVEL", "warn")),
        Level::DEBUG
    );
    assert_eq!(
        level(Place::new().env("DEBUG", "1").env("LOG_LEVEL", "Trace")),
        Level::TRACE
    );
    assert_eq!(
        level(Place::new().env("DEBUG", "1").flag("LOG_LEVEL", "warn")),
        Level::WARN
    );
    assert_eq!(level(Place::new().env("DEBUG", "off")), Level::INFO);
    let shown = Place::new().env("DEBUG", "true").entry("LOG_LEVEL");
    assert_eq!(shown, (json!("debug"), "environment".to_owned()));
}

#[test]
fn times_may_be_fractions_and_never() {
    let minutes = |text| {
        Place::new()
            .env("AUTO_SHUTDOWN_MINUTES", text)
            .settings()
            .auto_shutdown
    };
    assert_eq!(minutes("0"), None);
    assert_eq!(minutes("0.0"), None);
    assert_eq!(minutes("-0"), None);
    assert_eq!(minutes("0.05"), Some(Duration::from_secs(3)));
    assert_eq!(minutes(".5"), Some(Duration::from_secs(30)));
    let shown = |text| {
        Place::new()
            .env("AUTO_SHUTDOWN_MINUTES", text)
            .entry("AUTO_SHUTDOWN_MINUTES")
            .0
    };
    assert_eq!((shown("0.05"), shown("5.0")), (json!(0.05), json!(5)));
}

#[test]
fn paths_are_absolute_and_public_addresses_are_filled_in() {
    let place = Place::new()
        .env("WORKSPACE_PATH", "./sites//x/")
        .env("CACHE_PATH", "~/cache")
        .env("CLAUDE_BIN", "claude")
        .env("PREVIEW_BASE_URL", "https://{slug}.preview.example.com/")
        .env("API_BASE_URL", "https://Api.Example.com/");
    let settings = place.settings();
    assert_eq!(
        settings.workspace_path.to_str(),
        place.cwd().join("sites/x").to_str()
    );
    assert_eq!(settings.cache_path, place.root.path().join("cache"));
    assert_eq!(
        settings.claude_bin.as_deref(),
        Some(Path::new("claude")),
        "looked up later"
    );
    assert_eq!(
        settings.preview_url("acme-0", 4321),
        "https://acme-0.preview.example.com"
    );
    assert_eq!(settings.api_url(8080), "https://Api.Example.com");
    let plain = Place::new().settings();
    assert_eq!(plain.preview_url("acme-0", 1), "http://acme-0.localhost:1");
    assert_eq!(plain.api_url(2), "http://localhost:2");

    for host in [
        "localhost",
        "LOCALHOST:8080",
        "127.0.0.1:1",
        "127.3.2.1",
        "[::1]:8080",
        "[::1]",
        "api.example.com:443",
        "API.example.com.",
    ] {
        assert!(settings.allows_host(host), "{host}");
    }
    for host in [
        "evil.example",
        "",
        "localhost.evil.example",
        "api.example.com.evil.example",
        "10.0.0.1",
        "127.0.0.1.nip.io",
        "localhost:x",
        "[::2]:1",
        "::1x",
    ] {
        assert!(!settings.allows_host(host), "{host}");
    }
    let own = Place::new()
        .env("API_ALLOWED_HOSTS", "Green.Internal")
        .settings();
    assert!(own.allows_host("green.internal:8080") && own.allows_host("localhost"));
    assert!(!own.allows_host("api.example.com"));
}

#[test]
fn whom_children_may_reach() {
    let allow = |value: &str| {
        Place::new()
            .env("EGRESS_ALLOW", value)
            .settings()
            .egress_allow
    };
    assert_eq!(Place::new().settings().egress_allow, None);
    assert_eq!(allow("any"), None);
    assert_eq!(allow("None"), Some(Vec::new()));
    let names = allow("API.Example.com., .example.org,bücher.example");
    let names = names.unwrap();
    assert_eq!(
        names,
        ["api.example.com", ".example.org", "xn--bcher-kva.example"]
    );
    let place = Place::new().file("greenroom.yaml", "egressAllow: [a.example, .b.example]");
    assert_eq!(
        place.settings().egress_allow.unwrap(),
        ["a.example", ".b.example"]
    );
}

#[test]
fn the_credential_is_decided_in_order() {
    let credential = |place: &Place, mode| place.load(mode).unwrap().credential();
    let none = Place::new();
    let error = credential(&none, Mode::Serve).unwrap_err();
    assert!(error.to_string().contains("ANTHROPIC_API_KEY"), "{error}");
    assert_eq!(
        credential(&none, Mode::Dev).unwrap(),
        CredentialSource::Rehearsal
    );
    assert!(credential(&none, Mode::Service).is_err());

    let file = none.root.path().join(".claude/.credentials.json");
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, "{}").unwrap();
    for mode in [Mode::Serve, Mode::Dev] {
        assert_eq!(
            credential(&none, mode).unwrap(),
            CredentialSource::File(file.clone())
        );
    }
    let named = none
        .file("mine.json", "{}")
        .env("CLAUDE_CREDENTIALS_FILE", "mine.json");
    let mine = named.cwd().join("mine.json");
    assert_eq!(
        credential(&named, Mode::Serve).unwrap(),
        CredentialSource::File(mine.clone())
    );
    let mut keyed = named.env("ANTHROPIC_API_KEY", "key-1");
    let key = CredentialSource::ApiKey(Secret::new("key-1"));
    assert_eq!(credential(&keyed, Mode::Serve).unwrap(), key);
    assert!(
        keyed
            .load(Mode::Serve)
            .unwrap()
            .warnings
            .iter()
            .any(|w| w.contains("the key is used"))
    );
    keyed.flags.rehearsal = true;
    assert_eq!(
        credential(&keyed, Mode::Serve).unwrap(),
        CredentialSource::Rehearsal
    );

    let missing = Place::new().env("CLAUDE_CREDENTIALS_FILE", "/nowhere/x.json");
    let error = credential(&missing, Mode::Serve).unwrap_err().to_string();
    assert!(
        error.starts_with("CLAUDE_CREDENTIALS_FILE (environment): /nowhere/x.json is no file"),
        "{error}"
    );
}

#[test]
fn an_operator_is_warned() {
    let warnings = |place: Place| place.load(Mode::Serve).unwrap().warnings.join("\n");
    assert!(warnings(Place::new()).contains("GITHUB_TOKEN is not set"));
    let quiet = Place::new().env("GITHUB_TOKEN", "t");
    assert_eq!(warnings(quiet), "");
    assert!(warnings(Place::new().env("GATEWAY_PORT", "9000")).contains("GATEWAY_TOKENS_FILE"));
    assert!(warnings(Place::new().env("DRAIN_SECONDS", "60")).contains("DRAIN_SECONDS"));
    assert!(warnings(Place::new().file("greenroom.yml", "")).contains("greenroom.yaml"));
}
