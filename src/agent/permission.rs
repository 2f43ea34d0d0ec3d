//! What the agent may do when the CLI asks. The CLI's own rules let file commands inside the
//! worktree through without asking; everything else comes here, and the kernel has the last word.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::domain::TurnMode;

/// What a decision depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) tool: &'a str,
    pub(super) input: &'a Value,
    pub(super) mode: TurnMode,
    /// Is the agent held by the kernel in files, network and processes?
    pub(super) is_confined: bool,
    pub(super) worktree: &'a Path,
}

/// Allowed, or a sentence that tells the model what to do instead. Pure.
pub(super) fn decide(question: Question<'_>) -> Result<(), String> {
    if question.mode == TurnMode::Plan {
        return Err(
            "This is a planning turn: nothing may change. Describe what you would do; the \
                    person can then ask for it to be done."
                .into(),
        );
    }
    match question.tool {
        "Bash" if question.is_confined => Ok(()),
        "Bash" => Err(
            "Only file commands inside the site's folder are allowed here (ls, cat, \
                       grep, find, cp, mv, mkdir, rm, touch, sed -i), one at a time. Use the Read, \
                       Edit and Write tools for everything else; greenroom runs the dev server, \
                       installs dependencies and commits by itself."
                .into(),
        ),
        "Write" | "Edit" | "MultiEdit" | "NotebookEdit" => written_path(question),
        "Read" | "Glob" | "Grep" => Err("Only files inside the site's folder can be read.".into()),
        tool => Err(format!("The tool {tool:?} is not available here.")),
    }
}

/// Writes that the CLI asks about are outside of the worktree, or to its own and git's folders.
fn written_path(question: Question<'_>) -> Result<(), String> {
    let input = question.input;
    let path = input["file_path"]
        .as_str()
        .or(input["notebook_path"].as_str())
        .unwrap_or_default();
    let path = normalise(&question.worktree.join(path));
    let Ok(inside) = path.strip_prefix(question.worktree) else {
        return Err(format!(
            "Only files inside the site's folder, {}, can be written.",
            question.worktree.display()
        ));
    };
    let is_ours = inside.components().any(|part| {
        let part = part.as_os_str().to_string_lossy().to_ascii_lowercase();
        part == ".git" || part == ".claude"
    });
    if is_ours {
        return Err(
            "Git's and the agent's own folders are not part of the site. greenroom \
                    commits each turn by itself."
                .into(),
        );
    }
    Ok(())
}

/// Resolves `.` and `..` by text alone: the kernel judges symlinks.
fn normalise(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            part => clean.push(part),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn table() {
        let ask = |tool: &str, input: Value, mode, is_confined| {
            let worktree = Path::new("/w/threads/t");
            decide(Question {
                tool,
                input: &input,
                mode,
                is_confined,
                worktree,
            })
            .is_ok()
        };
        let file = |path: &str| json!({"file_path": path});
        let execute = TurnMode::Execute;
        assert!(ask("Bash", json!({"command": "npm run x"}), execute, true));
        assert!(!ask(
            "Bash",
            json!({"command": "npm run x"}),
            execute,
            false
        ));
        assert!(!ask("Bash", json!({"command": "ls"}), TurnMode::Plan, true));
        assert!(ask("Write", file("/w/threads/t/src/a"), execute, false));
        for outside in [
            "/etc/passwd",
            "/w/threads/t/../u/a",
            "/w/threads/tt/a",
            "../a",
        ] {
            assert!(!ask("Write", file(outside), execute, true), "{outside}");
        }
        for ours in [
            "/w/threads/t/.git",
            "/w/threads/t/.GIT/config",
            "/w/threads/t/.claude/x",
        ] {
            assert!(!ask("Edit", file(ours), execute, true), "{ours}");
        }
        assert!(!ask("WebFetch", json!({}), execute, true));
        assert!(!ask("Write", file("/w/threads/t/a"), TurnMode::Plan, true));
    }
}
