//! The command line that callers of the one-shot service may ask for: an allow-list, read into
//! data, so that nothing of theirs reaches the CLI that was not understood.

use std::ffi::OsString;

/// More arguments than any caller has reason to send.
const MAX_ARGS: usize = 64;
/// The kernel takes 128 kB for one argument; the CLI's own prompt is a fraction of that.
const MAX_SYSTEM_PROMPT: usize = 64 << 10;
const MAX_TURNS: u32 = 1000;

/// What may be asked for; told to whoever asks for something else.
const ALLOWED: &str = "-p, --print, --output-format, --model, --max-turns, \
                       --append-system-prompt, --permission-mode, --tools and \
                       --dangerously-skip-permissions";

/// Why an argument is refused, in a sentence that names it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadArgs(String);

/// The form of the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum OutputFormat {
    #[default]
    Text,
    Json,
    StreamJson,
}

impl OutputFormat {
    fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::StreamJson => "stream-json",
        }
    }
}

/// What the CLI may do without asking: there is nobody to ask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Permissions {
    /// The CLI's own default: it reads.
    #[default]
    Default,
    AcceptEdits,
    Plan,
    DontAsk,
    /// As much as holds it: everything where the kernel confines it, else what edits files in its
    /// folder.
    Confined,
}

/// One message in, one answer out, as lines of stream-json: no tools, no session, no part of the
/// CLI's own prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lean {
    pub model: Option<String>,
    /// The whole system prompt.
    pub system: String,
    /// What the answer has to look like, as JSON Schema; the model may still answer in text.
    pub schema: Option<String>,
}

impl From<Lean> for Args {
    fn from(lean: Lean) -> Self {
        Self {
            lean: Some(lean),
            ..Self::default()
        }
    }
}

impl Lean {
    fn command_line(&self, model: Option<&str>) -> Vec<OsString> {
        let mut line: Vec<String> = [
            "-p",
            "--input-format",
            "stream-json",
            "--output-format",
            "stream-json",
            "--verbose",
            "--setting-sources",
            "",
            "--strict-mcp-config",
            "--disable-slash-commands",
            "--no-session-persistence",
            "--tools=",
        ]
        .map(str::to_owned)
        .to_vec();
        line.push(format!("--system-prompt={}", self.system));
        if let Some(schema) = &self.schema {
            line.push(format!("--json-schema={schema}"));
        }
        if let Some(model) = self.model.as_deref().or(model) {
            line.push(format!("--model={model}"));
        }
        line.into_iter().map(OsString::from).collect()
    }
}

/// A command line that was understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    pub(super) format: OutputFormat,
    pub(super) model: Option<String>,
    pub(super) max_turns: Option<u32>,
    pub(super) system_prompt: Option<String>,
    pub(super) permissions: Permissions,
    /// `None`: the service's own.
    pub(super) tools: Option<Vec<String>>,
    /// Instead of all of the above but the model.
    pub(super) lean: Option<Lean>,
}

impl Args {
    /// Reads what a caller sent: flags with their value in the next argument or behind `=`. Of one
    /// that comes twice the last counts, but permissions once given are not taken back.
    ///
    /// # Errors
    /// For anything that is not on the list. `tools` are those that may be asked for.
    pub fn parse(args: &[String], tools: &[String]) -> Result<Self, BadArgs> {
        if args.len() > MAX_ARGS {
            return Err(bad(format!("there may be at most {MAX_ARGS} of them")));
        }
        let mut parsed = Self::default();
        let mut skips = false;
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            let (flag, inline) = match arg.split_once('=') {
                Some((flag, value)) if flag.starts_with("--") => (flag, Some(value)),
                _ => (arg.as_str(), None),
            };
            let mut value = || {
                inline
                    .or_else(|| rest.next().map(String::as_str))
                    .ok_or_else(|| bad(format!("{flag} needs a value")))
            };
            match flag {
                "-p" | "--print" if inline.is_none() => {}
                "--dangerously-skip-permissions" if inline.is_none() => skips = true,
                "--output-format" => parsed.format = format(value()?)?,
                "--model" => parsed.model = Some(model(value()?)?),
                "--max-turns" => parsed.max_turns = Some(turns(value()?)?),
                "--append-system-prompt" => parsed.system_prompt = Some(prompt(value()?)?),
                "--permission-mode" => parsed.permissions = permissions(value()?)?,
                "--tools" => parsed.tools = Some(chosen(value()?, tools)?),
                _ => {
                    // Cut: it may be anything, and long.
                    let shown: String = arg.chars().take(60).collect();
                    return Err(bad(format!(
                        "{shown:?} is not allowed; allowed are {ALLOWED}"
                    )));
                }
            }
        }
        if skips {
            parsed.permissions = Permissions::Confined;
        }
        Ok(parsed)
    }

    /// The CLI's command line. Its prompt comes by standard input: others see a command line.
    pub(super) fn command_line(
        &self,
        tools: &[String],
        is_confined: bool,
        note: Option<&str>,
    ) -> Vec<OsString> {
        if let Some(lean) = &self.lean {
            return lean.command_line(self.model.as_deref());
        }
        let tools = self.tools.as_deref().unwrap_or(tools).join(",");
        let (mode, allows_all) = match self.permissions {
            Permissions::Default => ("default", false),
            Permissions::AcceptEdits => ("acceptEdits", false),
            Permissions::Plan => ("plan", false),
            Permissions::DontAsk => ("dontAsk", false),
            Permissions::Confined => ("acceptEdits", is_confined),
        };
        let mut line: Vec<String> = [
            "-p",
            "--output-format",
            self.format.as_str(),
            // What a folder's own settings, hooks and MCP servers would do is shut out.
            "--setting-sources",
            "",
            "--strict-mcp-config",
            "--disable-slash-commands",
            "--permission-mode",
            mode,
        ]
        .map(str::to_owned)
        .to_vec();
        if self.format == OutputFormat::StreamJson {
            // The CLI wants it with that format.
            line.push("--verbose".into());
        }
        // With `=`: a value of its own would be read on to the next flag.
        if allows_all && !tools.is_empty() {
            line.push(format!("--allowedTools={tools}"));
        }
        line.push(format!("--tools={tools}"));
        if let Some(model) = &self.model {
            line.push(format!("--model={model}"));
        }
        if let Some(turns) = self.max_turns {
            line.push(format!("--max-turns={turns}"));
        }
        let prompts = [note, self.system_prompt.as_deref()];
        let prompt: Vec<&str> = prompts.into_iter().flatten().collect();
        if !prompt.is_empty() {
            line.push(format!("--append-system-prompt={}", prompt.join("\n\n")));
        }
        line.into_iter().map(OsString::from).collect()
    }
}

fn bad(what: impl Into<String>) -> BadArgs {
    BadArgs(format!("args: {}", what.into()))
}

fn format(value: &str) -> Result<OutputFormat, BadArgs> {
    match value {
        "text" => Ok(OutputFormat::Text),
        "json" => Ok(OutputFormat::Json),
        "stream-json" => Ok(OutputFormat::StreamJson),
        _ => Err(bad("--output-format is text, json or stream-json")),
    }
}

/// Is it a name that the CLI can be told?
pub fn is_model_name(value: &str) -> bool {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-._:/@[]".contains(c);
    let begins = value
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    begins && value.len() <= 200 && value.chars().all(is_name)
}

fn model(value: &str) -> Result<String, BadArgs> {
    if is_model_name(value) {
        Ok(value.to_owned())
    } else {
        Err(bad("--model is no name of a model"))
    }
}

fn turns(value: &str) -> Result<u32, BadArgs> {
    match value.parse() {
        Ok(turns @ 1..=MAX_TURNS) => Ok(turns),
        _ => Err(bad(format!(
            "--max-turns is a number from 1 to {MAX_TURNS}"
        ))),
    }
}

fn prompt(value: &str) -> Result<String, BadArgs> {
    if value.len() > MAX_SYSTEM_PROMPT || value.contains('\0') {
        return Err(bad(format!(
            "--append-system-prompt has at most {MAX_SYSTEM_PROMPT} bytes and no NUL"
        )));
    }
    Ok(value.to_owned())
}

fn permissions(value: &str) -> Result<Permissions, BadArgs> {
    match value {
        "default" => Ok(Permissions::Default),
        "acceptEdits" => Ok(Permissions::AcceptEdits),
        "plan" => Ok(Permissions::Plan),
        "dontAsk" => Ok(Permissions::DontAsk),
        "bypassPermissions" => Ok(Permissions::Confined),
        _ => Err(bad(
            "--permission-mode is default, acceptEdits, plan, dontAsk or bypassPermissions",
        )),
    }
}

/// Names between commas or spaces, as the CLI reads them; nothing means no tools.
fn chosen(value: &str, known: &[String]) -> Result<Vec<String>, BadArgs> {
    let names = value.split([',', ' ']).filter(|name| !name.is_empty());
    names
        .map(|name| {
            if known.iter().any(|tool| tool == name) {
                Ok(name.to_owned())
            } else {
                Err(bad(format!("--tools is of {}", known.join(","))))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Vec<String> {
        ["Read", "Edit", "Bash"].map(str::to_owned).to_vec()
    }

    fn parse(line: &[&str]) -> Result<Args, BadArgs> {
        let line: Vec<String> = line.iter().map(|&arg| arg.to_owned()).collect();
        Args::parse(&line, &tools())
    }

    fn line(args: &Args, is_confined: bool) -> Vec<String> {
        args.command_line(&tools(), is_confined, None)
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_vector_of_old_callers_is_held_by_our_confinement() {
        let args = parse(&[
            "-p",
            "--print",
            "--output-format",
            "json",
            "--dangerously-skip-permissions",
        ])
        .unwrap();
        assert_eq!(args.format, OutputFormat::Json);
        assert_eq!(args.permissions, Permissions::Confined);
        let confined = line(&args, true);
        assert!(!confined.iter().any(|arg| arg.contains("dangerously")));
        assert!(confined.contains(&"--allowedTools=Read,Edit,Bash".to_owned()));
        let after = |flag: &str| confined.iter().position(|arg| arg == flag).unwrap() + 1;
        assert_eq!(confined[after("--setting-sources")], "");
        assert_eq!(confined[after("--output-format")], "json");
        assert!(confined.contains(&"--strict-mcp-config".to_owned()));
        // Where nothing holds it, it is not let loose.
        assert!(
            !line(&args, false)
                .iter()
                .any(|arg| arg.contains("allowedTools"))
        );
    }

    #[test]
    fn what_is_allowed_is_understood_in_both_spellings() {
        let args = parse(&[
            "--model",
            "claude-opus-5",
            "--max-turns=3",
            "--append-system-prompt",
            "--print this",
            "--permission-mode=plan",
            "--tools",
            "Read, Bash",
        ])
        .unwrap();
        let expected = Args {
            format: OutputFormat::Text,
            model: Some("claude-opus-5".into()),
            max_turns: Some(3),
            system_prompt: Some("--print this".into()),
            permissions: Permissions::Plan,
            tools: Some(vec!["Read".into(), "Bash".into()]),
            lean: None,
        };
        assert_eq!(args, expected);
        assert!(line(&args, true).contains(&"--append-system-prompt=--print this".to_owned()));
        assert_eq!(parse(&["--tools="]).unwrap().tools, Some(Vec::new()));
        assert!(line(&parse(&["--tools", ""]).unwrap(), true).contains(&"--tools=".to_owned()));
        let stream = parse(&["--output-format=stream-json"]).unwrap();
        assert!(line(&stream, true).contains(&"--verbose".to_owned()));
        assert_eq!(
            parse(&[
                "--dangerously-skip-permissions",
                "--permission-mode",
                "bypassPermissions"
            ])
            .unwrap()
            .permissions,
            Permissions::Confined
        );
    }

    #[test]
    fn a_lean_run_has_no_tools_and_leaves_nothing() {
        let lean = Lean {
            model: None,
            system: "--look at it".into(),
            schema: Some("{}".into()),
        };
        let mut args = Args::from(lean);
        args.model = Some("claude-haiku-5-5".into());
        let line = line(&args, true);
        for part in [
            "--tools=",
            "--strict-mcp-config",
            "--no-session-persistence",
            "--system-prompt=--look at it",
            "--json-schema={}",
            "--model=claude-haiku-5-5",
        ] {
            assert!(line.iter().any(|arg| arg == part), "{part}: {line:?}");
        }
        assert!(!line.iter().any(|arg| arg.contains("allowedTools")));
    }

    #[test]
    fn everything_else_is_refused_and_named() {
        for (line, said) in [
            (
                &["--mcp-config", "{}"][..],
                "--mcp-config\" is not allowed; allowed are -p",
            ),
            (&["hello"], "hello"),
            (&["--settings={}"], "--settings"),
            (&["--add-dir", "/"], "--add-dir"),
            (&["-c"], "-c"),
            (&["--print=yes"], "--print=yes"),
            (&["--"], "\"--\""),
            (&[""], "\"\""),
            (&["--model"], "--model needs a value"),
            (&["--model", "--resume"], "--model"),
            (&["--model", "a b"], "--model"),
            (&["--max-turns", "0"], "--max-turns"),
            (&["--max-turns", "9999999999999"], "--max-turns"),
            (&["--output-format", "xml"], "--output-format"),
            (&["--permission-mode", "auto"], "--permission-mode"),
            (
                &["--tools", "Read,WebFetch"],
                "--tools is of Read,Edit,Bash",
            ),
            (&["--tools", "default"], "--tools"),
            (&["--append-system-prompt", "a\0b"], "NUL"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(
                error.starts_with("args: ") && error.contains(said),
                "{error}"
            );
        }
        assert!(parse(&["-p"; 65]).is_err());
        let long = "x".repeat(5000);
        assert!(parse(&[&long]).unwrap_err().to_string().len() < 400);
    }
}
