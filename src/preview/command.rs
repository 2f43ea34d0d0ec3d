//! Which command a site's `dev` script becomes. Pure: no disk, no environment.

use std::ffi::OsString;

use serde::Deserialize;

/// Why a site has no dev server to start. The display is for the person whose site it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("package.json can't be read as JSON: {0}")]
    NotJson(String),
    #[error(
        "this site has no `dev` script in package.json: add one, for example \"dev\": \"astro dev\""
    )]
    NoDevScript,
}

/// How a dev server is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DevCommand {
    /// `astro dev` with these flags of the site's own, without npm or a shell between.
    Astro { flags: Vec<String> },
    /// `vite` with these flags of the site's own.
    Vite { flags: Vec<String> },
    /// Anything else, for `sh -c`.
    Shell { script: String },
}

/// How a server that belongs to a command proves that it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// `/_astro/status`, or `/@vite/client` where an older Astro doesn't know it: neither
    /// renders a page.
    Vite,
    /// Any answer on `/`.
    AnyAnswer,
}

impl DevCommand {
    /// The program in `node_modules/.bin` that is started directly, if one is.
    pub(crate) fn bin(&self) -> Option<&'static str> {
        match self {
            Self::Astro { .. } => Some("astro"),
            Self::Vite { .. } => Some("vite"),
            Self::Shell { .. } => None,
        }
    }

    /// The arguments after the program (after `-c` for a shell).
    pub(crate) fn args(&self, port: u16) -> Vec<OsString> {
        let port = port.to_string();
        let listen = ["--host", "127.0.0.1", "--port", &port];
        let mut args: Vec<OsString> = Vec::new();
        match self {
            Self::Astro { flags } => {
                args.push("dev".into());
                args.extend(flags.iter().map(OsString::from));
                args.extend(listen.map(OsString::from));
                // A lock left by a dead server blocks the start once its pid is used again.
                args.push("--ignore-lock".into());
            }
            Self::Vite { flags } => {
                args.extend(flags.iter().map(OsString::from));
                args.extend(listen.map(OsString::from));
                args.push("--strictPort".into());
            }
            Self::Shell { script } => args.push(script.into()),
        }
        args
    }

    pub(crate) fn proof(&self) -> Proof {
        match self {
            Self::Astro { .. } | Self::Vite { .. } => Proof::Vite,
            Self::Shell { .. } => Proof::AnyAnswer,
        }
    }
}

/// Reads `scripts.dev` of a package.json.
///
/// # Errors
/// [`PlanError`] says in a sentence for the site's owner why there is nothing to start.
pub fn plan(package_json: &str) -> Result<DevCommand, PlanError> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        scripts: Scripts,
    }
    #[derive(Default, Deserialize)]
    struct Scripts {
        dev: Option<String>,
    }
    let manifest: Manifest = serde_json::from_str(package_json.trim_start_matches('\u{feff}'))
        .map_err(|error| PlanError::NotJson(error.to_string()))?;
    let script = manifest.scripts.dev.unwrap_or_default();
    let script = script.trim();
    if script.is_empty() {
        return Err(PlanError::NoDevScript);
    }
    Ok(direct(script).unwrap_or_else(|| DevCommand::Shell {
        script: script.to_owned(),
    }))
}

/// The script as a direct command, if it is one program with plain words behind it.
fn direct(script: &str) -> Option<DevCommand> {
    let is_plain = |c: char| c.is_alphanumeric() || " \t-_./:=,@+".contains(c);
    if !script.chars().all(is_plain) {
        return None;
    }
    let words: Vec<&str> = script.split_whitespace().collect();
    match words.as_slice() {
        ["astro", "dev", rest @ ..] => Some(DevCommand::Astro {
            flags: without_flags(
                rest,
                &["--host", "--port", "--open"],
                // The last two contradict `--ignore-lock`: Astro would refuse to start.
                &["--ignore-lock", "--background", "--force"],
            ),
        }),
        ["vite", "dev" | "serve", rest @ ..] => Some(vite(rest)),
        ["vite", "build" | "preview" | "optimize", ..] => None,
        ["vite", rest @ ..] => Some(vite(rest)),
        _ => None,
    }
}

fn vite(rest: &[&str]) -> DevCommand {
    DevCommand::Vite {
        flags: without_flags(rest, &["--host", "--port", "--open", "--strictPort"], &[]),
    }
}

/// Leaves out the flags that are ours to set: `with_value` take the next word along unless it is
/// a flag itself.
fn without_flags(words: &[&str], with_value: &[&str], alone: &[&str]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let name = word.split('=').next().unwrap_or(word);
        if with_value.contains(&name) {
            if !word.contains('=') {
                words.next_if(|next| !next.starts_with('-'));
            }
        } else if !alone.contains(&name) {
            kept.push((*word).to_owned());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_of(script: &str) -> DevCommand {
        plan(&serde_json::json!({ "scripts": { "dev": script } }).to_string()).unwrap()
    }

    fn line(script: &str) -> String {
        let command = plan_of(script);
        let args = command.args(4801);
        let args: Vec<_> = args.iter().map(|a| a.to_str().unwrap()).collect();
        format!("{} {}", command.bin().unwrap_or("sh -c"), args.join(" "))
    }

    #[test]
    fn plain_astro_and_vite_scripts_start_directly_on_our_address() {
        let astro = "--host 127.0.0.1 --port 4801 --ignore-lock";
        let vite = "--host 127.0.0.1 --port 4801 --strictPort";
        for (script, expected) in [
            ("astro dev", format!("astro dev {astro}")),
            ("  astro   dev ", format!("astro dev {astro}")),
            ("astro dev --host", format!("astro dev {astro}")),
            (
                "astro dev --host 0.0.0.0 --port 3000 --verbose",
                format!("astro dev --verbose {astro}"),
            ),
            (
                "astro dev --port=3000 --open --config a.mjs",
                format!("astro dev --config a.mjs {astro}"),
            ),
            (
                "astro dev --force --background --host --silent",
                format!("astro dev --silent {astro}"),
            ),
            ("vite", format!("vite {vite}")),
            (
                "vite dev --mode staging",
                format!("vite --mode staging {vite}"),
            ),
            ("vite serve --strictPort --open /x", format!("vite {vite}")),
            ("vite --force", format!("vite --force {vite}")),
        ] {
            assert_eq!(line(script), expected, "{script}");
        }
    }

    #[test]
    fn any_other_script_is_the_shells() {
        for script in [
            "astro dev && echo hi",
            "FOO=1 astro dev",
            "npm run x",
            "astro build",
            "vite build --watch",
            "vite preview",
            "astro dev --site \"$URL\"",
            "astro dev | tee log",
            "node server.js",
            "npx astro dev",
            "astro dev # comment",
            "astro dev\nrm x",
            "astro dev `x`",
        ] {
            let command = plan_of(script);
            assert_eq!(
                command,
                DevCommand::Shell {
                    script: script.to_owned()
                },
                "{script}"
            );
            assert_eq!(command.proof(), Proof::AnyAnswer);
        }
    }

    #[test]
    fn a_site_without_a_dev_script_says_what_to_add() {
        for package in ["{}", r#"{"scripts":{}}"#, r#"{"scripts":{"dev":" "}}"#] {
            let error = plan(package).unwrap_err();
            assert_eq!(error, PlanError::NoDevScript, "{package}");
            assert!(error.to_string().contains(r#""dev": "astro dev""#));
        }
        assert!(matches!(plan("{"), Err(PlanError::NotJson(_))));
        assert!(matches!(
            plan(r#"{"scripts":{"dev":1}}"#),
            Err(PlanError::NotJson(_))
        ));
    }
}
