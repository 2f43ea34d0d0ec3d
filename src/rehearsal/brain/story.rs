//! Straight-line stories out of a stateless protocol.
//!
//! Each request brings the whole conversation. A story is told from its beginning every time: a
//! tool call that has been made returns its result at once, the first one that has not ends the
//! telling and becomes the answer.

use std::slice;

use serde_json::{Value, json};

use super::{Done, Reply, Tool};

/// Why a story stopped before its end.
pub(super) enum Halt {
    /// This call comes next.
    Call(Reply),
    /// There is nothing more to do, and this is why.
    Say(String),
}

pub(super) type Told<T> = Result<T, Halt>;

pub(super) struct Story<'a> {
    done: slice::Iter<'a, Done>,
    cwd: &'a str,
    /// Said together with the next call.
    said: String,
    /// In plan mode: what would be done.
    plan: Option<Vec<String>>,
}

impl<'a> Story<'a> {
    pub(super) fn new(done: &'a [Done], cwd: &'a str, is_plan: bool) -> Self {
        let plan = is_plan.then(Vec::new);
        Self {
            done: done.iter(),
            cwd,
            said: String::new(),
            plan,
        }
    }

    /// A sentence before the next call.
    pub(super) fn say(&mut self, text: impl Into<String>) {
        self.said = text.into();
    }

    /// The last words, which in plan mode are the plan.
    pub(super) fn close(self, closing: String) -> String {
        match self.plan {
            Some(plan) if !plan.is_empty() => {
                let steps: Vec<String> = plan
                    .iter()
                    .enumerate()
                    .map(|(i, step)| format!("{}. {step}", i + 1))
                    .collect();
                format!(
                    "Here is what I would do:\n\n{}\n\nNothing has been changed yet.",
                    steps.join("\n")
                )
            }
            _ => closing,
        }
    }

    pub(super) fn call(&mut self, name: &str, input: Value) -> Told<Result<String, String>> {
        let said = std::mem::take(&mut self.said);
        match self.done.next() {
            Some(done) => Ok(done
                .result
                .clone()
                .unwrap_or_else(|| Err("the tool call was interrupted".to_owned()))),
            None => Err(Halt::Call(Reply {
                text: said,
                calls: vec![Tool {
                    name: name.to_owned(),
                    input,
                }],
                ..Reply::default()
            })),
        }
    }

    /// A file's text; `None` if it can't be read.
    pub(super) fn read(&mut self, path: &str) -> Told<Option<String>> {
        let result = self.call("Read", json!({"file_path": self.absolute(path)}))?;
        Ok(result.ok().map(|shown| without_line_numbers(&shown)))
    }

    /// Paths below the site that fit a pattern; none if the search failed.
    pub(super) fn glob(&mut self, pattern: &str) -> Told<Vec<String>> {
        let result = self.call("Glob", json!({"pattern": pattern}))?;
        Ok(self.paths(&result.unwrap_or_default()))
    }

    /// Paths of the files that hold a text.
    pub(super) fn grep(&mut self, pattern: &str, glob: &str) -> Told<Vec<String>> {
        let input = json!({
            "pattern": pattern,
            "glob": glob,
            "output_mode": "files_with_matches",
        });
        let result = self.call("Grep", input)?;
        Ok(self.paths(&result.unwrap_or_default()))
    }

    /// Replaces the bytes `start..end` of a file that was read as `content`.
    pub(super) fn edit(
        &mut self,
        path: &str,
        content: &str,
        (start, end): (usize, usize),
        new: &str,
    ) -> Told<()> {
        // The tool wants a text that occurs once: take in the lines before it until it does, then
        // those after it.
        let (mut from, mut to) = (start, end);
        while content.matches(&content[from..to]).count() > 1 {
            if from > 0 {
                let before = &content[..from];
                let before = before.strip_suffix('\n').unwrap_or(before);
                from = before.rfind('\n').map_or(0, |newline| newline + 1);
            } else if to < content.len() {
                to = content[to..]
                    .find('\n')
                    .map_or(content.len(), |newline| to + newline + 1);
            } else {
                break;
            }
        }
        let old = &content[from..to];
        let new = format!("{}{new}{}", &content[from..start], &content[end..to]);
        if let Some(plan) = &mut self.plan {
            plan.push(format!(
                "In `{path}`, replace\n```\n{old}\n```\nwith\n```\n{new}\n```"
            ));
            return Ok(());
        }
        let input = json!({
            "file_path": self.absolute(path),
            "old_string": old,
            "new_string": new,
        });
        self.call("Edit", input)?
            .map(drop)
            .map_err(|why| Halt::Say(format!("I could not change `{path}`: {}", brief(&why))))
    }

    /// Writes a new file.
    pub(super) fn write(&mut self, path: &str, content: &str) -> Told<()> {
        if let Some(plan) = &mut self.plan {
            plan.push(format!("Write `{path}`:\n```\n{content}```"));
            return Ok(());
        }
        let input = json!({"file_path": self.absolute(path), "content": content});
        self.call("Write", input)?
            .map(drop)
            .map_err(|why| Halt::Say(format!("I could not write `{path}`: {}", brief(&why))))
    }

    pub(super) fn bash(&mut self, command: &str) -> Told<Result<String, String>> {
        if let Some(plan) = &mut self.plan {
            plan.push(format!("Run `{command}`"));
            return Ok(Ok(String::new()));
        }
        let description = format!("Run {command}");
        self.call(
            "Bash",
            json!({"command": command, "description": description}),
        )
    }

    pub(super) fn absolute(&self, path: &str) -> String {
        if self.cwd.is_empty() {
            path.to_owned()
        } else {
            format!("{}/{path}", self.cwd)
        }
    }

    /// The paths in a search's result, relative to the site, without what nobody wrote.
    fn paths(&self, result: &str) -> Vec<String> {
        result
            .lines()
            .map(|line| {
                let line = line.trim();
                let inside = line.strip_prefix(self.cwd).unwrap_or(line);
                inside.trim_start_matches("./").trim_start_matches('/')
            })
            .filter(|path| {
                path.contains('.')
                    && !path.contains(' ')
                    && !["node_modules/", "dist/", ".astro/"]
                        .iter()
                        .any(|dir| path.contains(dir))
            })
            .map(ToOwned::to_owned)
            .collect()
    }
}

/// The start of a tool's words, for a sentence.
pub(super) fn brief(text: &str) -> String {
    let text = text
        .trim()
        .replace("<tool_use_error>", "")
        .replace("</tool_use_error>", "");
    let mut short: String = text.chars().take(400).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// The Read tool shows each line as `     1→text` (or with a tab).
fn without_line_numbers(shown: &str) -> String {
    let shown = shown.split("<system-reminder>").next().unwrap_or_default();
    let strip = |line: &str| -> Option<String> {
        let rest = line
            .trim_start()
            .trim_start_matches(|c: char| c.is_ascii_digit());
        let numbered = rest.len() < line.trim_start().len();
        let text = rest.strip_prefix('→').or_else(|| rest.strip_prefix('\t'))?;
        numbered.then(|| text.to_owned())
    };
    let lines: Option<Vec<String>> = shown.trim_end_matches('\n').lines().map(strip).collect();
    lines.map_or_else(|| shown.to_owned(), |lines| lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_numbers_come_off() {
        for (shown, text) in [
            ("     1→a\n    10→  b→c\n", "a\n  b→c\n"),
            ("1\ta\n2\t\n3\tb", "a\n\nb\n"),
            ("1→a\n\n<system-reminder>x</system-reminder>", "a\n"),
            ("no numbers\n", "no numbers\n"),
        ] {
            assert_eq!(without_line_numbers(shown), text);
        }
    }
}
