//! Where settings come from: flags, environment, `.env` files and YAML files, read into raw texts
//! by setting. Unknown names that are ours to judge stop here.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use serde_yaml_ng::Value as Yaml;

use super::{
    ConfigError,
    error::{one_line, quoted},
    table::{Kind, Spec, TABLE},
};

/// Where a value came from. Earlier variants win.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The command line.
    Flag,
    /// A variable of the environment.
    Environment,
    /// This `.env` file.
    DotEnv(PathBuf),
    /// This file, as `greenroom.yaml` or `config/x.yaml`.
    Yaml(String),
    /// Nobody set it.
    Default,
}

impl Source {
    /// The source in an error about `name`: a flag is named as it was typed.
    pub(super) fn described(&self, name: &str) -> String {
        match TABLE.iter().find(|spec| spec.name == name) {
            Some(spec) if *self == Self::Flag => format!("flag --{}", spec.flag()),
            _ => self.to_string(),
        }
    }

    /// 0 for flags and more for what they win over; the files of one layer are equal.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Self::Flag => 0,
            Self::Environment => 1,
            Self::DotEnv(_) => 2,
            Self::Yaml(_) => 3,
            Self::Default => 4,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Environment => f.write_str("environment"),
            Self::DotEnv(path) => write!(f, ".env ({})", path.display()),
            Self::Yaml(file) => f.write_str(file),
            Self::Default => f.write_str("default"),
        }
    }
}

/// What was typed on the command line, by the setting's name.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// Values of flags. A flag of a secret never gets here: the command line refuses it.
    pub values: BTreeMap<&'static str, String>,
    /// `--rehearsal`: the model is played by a script, whatever credential is there.
    pub rehearsal: bool,
}

/// A value as its source wrote it: trimmed, not empty.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) text: String,
    pub(super) origin: Source,
}

/// The values of all sources; of two for one setting, the one that wins.
#[derive(Debug, Default)]
pub(super) struct Given {
    values: BTreeMap<&'static str, Raw>,
}

impl Given {
    pub(super) fn get(&self, name: &str) -> Option<&Raw> {
        self.values.get(name)
    }

    /// Sources are offered in order of precedence: the first value stays.
    fn offer(&mut self, name: &'static str, text: &str, origin: &Source) {
        let text = text.trim();
        if !text.is_empty() {
            self.values.entry(name).or_insert_with(|| Raw {
                text: text.to_owned(),
                origin: origin.clone(),
            });
        }
    }

    /// Reads all sources. A file that cannot be read outside the working directory is a warning.
    pub(super) fn read(
        flags: &Flags,
        env: &BTreeMap<OsString, OsString>,
        cwd: &Path,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let mut given = Self::default();
        for (name, text) in &flags.values {
            if text.trim().is_empty() {
                return Err(ConfigError::BadValue {
                    name,
                    origin: Source::Flag,
                    problem: "empty".to_owned(),
                    allowed: "a value, or leave the flag out".to_owned(),
                });
            }
            given.offer(name, text, &Source::Flag);
        }
        for (name, value) in env {
            let name = name.to_string_lossy();
            given.variable(&name, value.to_str(), &Source::Environment)?;
        }
        for (depth, folder) in cwd.ancestors().take(3).enumerate() {
            let file = folder.join(".env");
            match read_file(&file) {
                Ok(Some(text)) => given.dot_env(&text, &Source::DotEnv(file))?,
                Ok(None) => {}
                Err(source) if depth == 0 => return Err(ConfigError::Read { file, source }),
                Err(error) => warnings.push(format!(
                    "{} was not read: {}",
                    file.display(),
                    one_line(&error.to_string())
                )),
            }
        }
        for file in yaml_files(cwd)?.iter().rev() {
            let path = cwd.join(file);
            match read_file(&path) {
                Ok(Some(bytes)) => given.yaml(&bytes, file)?,
                Ok(None) => {}
                Err(source) => return Err(ConfigError::Read { file: path, source }),
            }
        }
        Ok(given)
    }

    /// A variable of the environment or of a `.env`; `None` is one that is not UTF-8.
    fn variable(
        &mut self,
        name: &str,
        value: Option<&str>,
        origin: &Source,
    ) -> Result<(), ConfigError> {
        match (find(|spec| spec.name == name), value) {
            (Some(spec), Some(text)) => self.offer(spec.name, text, origin),
            (Some(spec), None) => {
                return Err(ConfigError::BadValue {
                    name: spec.name,
                    origin: origin.clone(),
                    problem: "not UTF-8".to_owned(),
                    allowed: "text in UTF-8".to_owned(),
                });
            }
            (None, _) if is_ours(name) => return Err(unknown(name, origin)),
            // Other programs' variables are no business of ours.
            (None, _) => {}
        }
        Ok(())
    }

    pub(super) fn dot_env(&mut self, bytes: &[u8], origin: &Source) -> Result<(), ConfigError> {
        let text = String::from_utf8_lossy(bytes);
        // Of two assignments in one file the later wins, as in a shell.
        let assignments: BTreeMap<&str, Result<String, &str>> = dot_env_lines(&text).collect();
        for (name, value) in assignments {
            match value {
                Ok(value) => {
                    let value = (!value.contains(char::REPLACEMENT_CHARACTER)).then_some(value);
                    self.variable(name, value.as_deref(), origin)?;
                }
                Err(problem) => {
                    if let Some(spec) = find(|spec| spec.name == name) {
                        return Err(ConfigError::BadValue {
                            name: spec.name,
                            origin: origin.clone(),
                            problem: problem.to_owned(),
                            allowed: "NAME=value, quotes closed".to_owned(),
                        });
                    } else if is_ours(name) {
                        return Err(unknown(name, origin));
                    }
                }
            }
        }
        Ok(())
    }

    fn yaml(&mut self, bytes: &[u8], file: &str) -> Result<(), ConfigError> {
        let bad_file = |problem: String| ConfigError::BadFile {
            file: file.to_owned(),
            problem,
        };
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let map = match serde_yaml_ng::from_slice(bytes) {
            Ok(Yaml::Mapping(map)) => map,
            Ok(Yaml::Null) => return Ok(()),
            Ok(_) => return Err(bad_file("it is not a map".to_owned())),
            Err(error) => return Err(bad_file(yaml_problem(&error))),
        };
        let origin = Source::Yaml(file.to_owned());
        let mut spelled: BTreeMap<&str, &str> = BTreeMap::new();
        for (key, value) in &map {
            let Some(key) = key.as_str() else {
                return Err(bad_file("a key is not a text".to_owned()));
            };
            let Some(spec) = find(|spec| spec.is_spelled(key)) else {
                return Err(unknown(key, &origin));
            };
            if let Some(first) = spelled.insert(spec.name, key) {
                return Err(ConfigError::Twice {
                    name: spec.name,
                    file: file.to_owned(),
                    first: first.to_owned(),
                    second: key.to_owned(),
                });
            }
            let text =
                yaml_text(value, spec).map_err(|(problem, allowed)| ConfigError::BadValue {
                    name: spec.name,
                    origin: origin.clone(),
                    problem: problem.to_owned(),
                    allowed: allowed.to_owned(),
                })?;
            self.offer(spec.name, &text, &origin);
        }
        Ok(())
    }
}

fn find(matches: impl Fn(&Spec) -> bool) -> Option<&'static Spec> {
    TABLE.iter().find(|spec| matches(spec))
}

fn is_ours(name: &str) -> bool {
    name.starts_with("GREENROOM_")
}

fn unknown(key: &str, origin: &Source) -> ConfigError {
    let normal = key.replace('-', "_").to_ascii_uppercase();
    let squeezed = |name: &str| name.replace('_', "");
    // Spellings that differ in underscores alone (`apiURL`, `Api_Port`) are the nearest.
    let nearest = TABLE
        .iter()
        .map(|spec| {
            (
                crate::text::distance(&squeezed(&normal), &squeezed(spec.name)),
                spec,
            )
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= 2);
    ConfigError::UnknownKey {
        key: match quoted(key) {
            plain if plain.len() == key.len() + 2 => key.to_owned(),
            escaped => escaped,
        },
        origin: origin.clone(),
        hint: nearest.map_or_else(String::new, |(_, spec)| {
            format!(", did you mean {}?", spec.name)
        }),
    }
}

/// Longest settings file. Nobody writes one by hand; it bounds what a wrong file costs.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A regular file's bytes; `None` where there is none (a folder `.env` is some tool's own).
fn read_file(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES && metadata.is_file() => Err(
            io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"),
        ),
        // Opening anything else, a pipe say, could wait for ever.
        Ok(metadata) if !metadata.is_file() => Ok(None),
        Ok(_) => fs::read(path).map(Some),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The YAML files of the working directory by name, relative to it, in alphabetical order; a
/// later one wins, so `greenroom.yaml` over `config/*.yaml`.
fn yaml_files(cwd: &Path) -> Result<Vec<String>, ConfigError> {
    let folder = cwd.join("config");
    let read_error = |source| ConfigError::Read {
        file: folder.clone(),
        source,
    };
    let mut files = vec!["greenroom.yaml".to_owned()];
    match fs::read_dir(&folder) {
        Ok(entries) => {
            for entry in entries {
                let name = entry.map_err(read_error)?.file_name().into_vec();
                let name = String::from_utf8_lossy(&name);
                let is_settings = name.ends_with(".yaml") && !name.starts_with('.');
                if is_settings && name != "model_configs.yaml" {
                    files.push(format!("config/{name}"));
                }
            }
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) => {}
        Err(error) => return Err(read_error(error)),
    }
    files.sort();
    Ok(files)
}

/// What a YAML parser complains about. Its messages name positions and keys, and for some
/// mistakes the value, so only the position is passed on for those.
fn yaml_problem(error: &serde_yaml_ng::Error) -> String {
    let text = one_line(&error.to_string());
    match error.location() {
        Some(at) if text.contains(['"', '`']) && !text.starts_with("duplicate entry with key") => {
            format!("mistake at line {} column {}", at.line(), at.column())
        }
        _ => text,
    }
}

/// A YAML value as the text that the other sources would give; empty for null.
fn yaml_text(value: &Yaml, spec: &Spec) -> Result<String, (&'static str, &'static str)> {
    match value {
        Yaml::Null => Ok(String::new()),
        Yaml::String(text) => Ok(text.clone()),
        Yaml::Bool(yes) => Ok(yes.to_string()),
        // `1.10` would arrive as 1.1: only numbers are numbers.
        Yaml::Number(number) if number.is_f64() && spec.kind != Kind::Number => {
            Err(("a number", "text: put it in quotes"))
        }
        Yaml::Number(number) => Ok(number.to_string()),
        Yaml::Sequence(items) if spec.kind == Kind::List => {
            let texts: Option<Vec<&str>> = items.iter().map(Yaml::as_str).collect();
            match texts {
                Some(texts) => Ok(texts.join(",")),
                None => Err(("an item that is not a text", "a list of texts")),
            }
        }
        Yaml::Sequence(_) => Err(("a list", "one value")),
        Yaml::Mapping(_) | Yaml::Tagged(_) => Err(("a map or a tag", "one value")),
    }
}

/// The assignments of a `.env` file in order; of one that cannot be read, what is wrong.
///
/// `NAME=value`, also with `export`; `#` begins a comment at the start of a line and after a
/// blank. Values in single quotes or backticks are taken as they are, in double quotes `\n`,
/// `\r`, `\t`, `\"` and `\\` are escapes; quoted ones may span lines. `$` means nothing: a
/// password may hold one.
fn dot_env_lines(text: &str) -> impl Iterator<Item = (&str, Result<String, &'static str>)> {
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
            let start = rest;
            rest = after;
            let bare = line.trim();
            if bare.is_empty() || bare.starts_with('#') {
                continue;
            }
            let bare = bare
                .strip_prefix("export")
                .filter(|rest| rest.starts_with([' ', '\t']))
                .map_or(bare, str::trim_start);
            let Some((name, value)) = bare.split_once('=') else {
                let name = bare.split([' ', '\t', ':']).next().unwrap_or(bare);
                return Some((name, Err("no = after the name")));
            };
            let name = name.trim_end();
            let value = value.trim_start();
            let Some(quote) = value.chars().next().filter(|c| "'\"`".contains(*c)) else {
                return Some((name, Ok(unquoted(value).to_owned())));
            };
            // From the opening quote on, into the following lines: `value` lies within `start`.
            let opening = value.as_ptr().addr() - start.as_ptr().addr() + 1;
            let Some((inner, behind)) = split_quoted(&start[opening..], quote) else {
                return Some((name, Err("a quote that is never closed")));
            };
            let (tail, after) = behind.split_once('\n').unwrap_or((behind, ""));
            rest = after;
            let tail = tail.trim();
            return Some((
                name,
                if tail.is_empty() || tail.starts_with('#') {
                    Ok(if quote == '"' {
                        unescaped(inner)
                    } else {
                        inner.to_owned()
                    })
                } else {
                    Err("text after the closing quote")
                },
            ));
        }
        None
    })
}

/// Splits behind the closing quote; in double quotes a backslash takes the next character.
fn split_quoted(text: &str, quote: char) -> Option<(&str, &str)> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' && quote == '"' {
            escaped = true;
        } else if c == quote {
            return Some((&text[..at], &text[at + 1..]));
        }
    }
    None
}

fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some('r') => out.push('\r'),
                Some('t') => out.push('\t'),
                Some(other @ ('"' | '\\' | '$')) => out.push(other),
                Some(other) => out.extend(['\\', other]),
                None => out.push('\\'),
            },
            c => out.push(c),
        }
    }
    out
}

fn unquoted(value: &str) -> &str {
    let comment = value
        .match_indices('#')
        .map(|(at, _)| at)
        .find(|at| *at == 0 || value[..*at].ends_with([' ', '\t']))
        .unwrap_or(value.len());
    value[..comment].trim_end()
}
