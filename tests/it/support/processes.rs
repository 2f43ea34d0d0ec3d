//! What runs, by `/proc`.

use std::{fs, path::Path};

/// One process as `/proc` shows it.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// The command line, its arguments set apart by spaces.
    pub(crate) command: String,
    pub(crate) environment: String,
}

impl Process {
    /// Is this the program itself, and not a warden of it?
    pub(crate) fn is_program(&self, name: &str) -> bool {
        let program = self.command.split(' ').next().unwrap_or_default();
        Path::new(program)
            .file_name()
            .is_some_and(|file| file == name)
    }
}

/// The processes whose environment, command line or working directory names the folder. Dead ones
/// that nobody has waited for are none.
pub(crate) fn processes_below(folder: &Path) -> Vec<Process> {
    let text = folder.to_str().expect("a temporary folder's name is UTF-8");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let path = entry.path();
        let read = |name: &str| {
            let bytes = fs::read(path.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let process = Process {
            pid,
            command: read("cmdline"),
            environment: read("environ"),
        };
        let cwd = fs::read_link(path.join("cwd")).unwrap_or_default();
        let is_below = process.environment.contains(text)
            || process.command.contains(text)
            || cwd.starts_with(folder);
        if is_below && !process.command.is_empty() {
            found.push(process);
        }
    }
    found
}
