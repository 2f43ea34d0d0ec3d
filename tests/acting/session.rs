//! The conversation on disk: `projects/{folder}/{session}.jsonl` below the config folder.

use std::{
    env, fs,
    fs::{File, OpenOptions},
    io::Write,
    path::PathBuf,
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

/// One conversation, and its transcript.
pub(crate) struct Session {
    id: String,
    transcript: PathBuf,
    /// Opened at the first turn: a process that never gets one leaves no transcript.
    file: Option<File>,
    remembered: Option<String>,
    /// Dollars, over all processes that ended in peace.
    pub(crate) total_cost: f64,
}

impl Session {
    /// A new conversation; the sentence of the CLI where its id is used.
    pub(crate) fn begin(id: Option<&str>) -> Result<Self, String> {
        let id = id.map_or_else(random_id, str::to_owned);
        if find(&id).is_some() {
            return Err(format!("Session ID {id} is already in use."));
        }
        let cwd = env::current_dir().unwrap_or_default();
        let folder = cwd.to_string_lossy().replace(['/', '.'], "-");
        Ok(Self {
            transcript: projects().join(folder).join(format!("{id}.jsonl")),
            id,
            file: None,
            remembered: None,
            total_cost: 0.0,
        })
    }

    /// An earlier one; the sentence of the CLI where there is none.
    pub(crate) fn resume(id: &str) -> Result<Self, String> {
        let lost = || format!("No conversation found with session ID: {id}");
        let transcript = find(id).ok_or_else(lost)?;
        let text = fs::read_to_string(&transcript).unwrap_or_default();
        let lines: Vec<Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let said = |line: &Value| line["message"]["content"].as_str().map(str::to_owned);
        let mut said: Vec<String> = lines
            .iter()
            .filter(|line| line["type"] == "user")
            .filter_map(said)
            .collect();
        if said.is_empty() {
            return Err(lost());
        }
        said.reverse();
        // A process that was killed wrote down no cost: then it counts from nought again.
        let total_cost = lines
            .last()
            .and_then(|line| line["total_cost_usd"].as_f64());
        Ok(Self {
            id: id.to_owned(),
            transcript,
            file: None,
            remembered: said.iter().find_map(|text| told(text)),
            total_cost: total_cost.unwrap_or_default(),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What it was last asked to remember.
    pub(crate) fn remembered(&self) -> Option<&str> {
        self.remembered.as_deref()
    }

    /// Takes down what was said.
    pub(crate) fn record(&mut self, role: &str, text: &str) {
        if role == "user"
            && let Some(word) = told(text)
        {
            self.remembered = Some(word);
        }
        let message = json!({"role": role, "content": text});
        self.append(&json!({"type": role, "message": message, "sessionId": self.id}));
    }

    /// Ends in peace: the cost so far is kept.
    pub(crate) fn close(&mut self) {
        if self.file.is_some() {
            self.append(&json!({"type": "cost", "total_cost_usd": self.total_cost}));
        }
    }

    fn append(&mut self, line: &Value) {
        if self.file.is_none() {
            if let Some(folder) = self.transcript.parent() {
                fs::create_dir_all(folder).ok();
            }
            let mut file = OpenOptions::new();
            self.file = file.create(true).append(true).open(&self.transcript).ok();
        }
        if let Some(file) = &mut self.file {
            file.write_all(format!("{line}\n").as_bytes()).ok();
        }
    }
}

fn told(text: &str) -> Option<String> {
    let mut lines = text.lines().rev();
    lines.find_map(|line| line.strip_prefix("remember ").map(str::to_owned))
}

fn projects() -> PathBuf {
    super::config_dir().join("projects")
}

fn find(id: &str) -> Option<PathBuf> {
    let folders = fs::read_dir(projects()).ok()?;
    folders
        .flatten()
        .map(|folder| folder.path().join(format!("{id}.jsonl")))
        .find(|file| file.is_file())
}

fn random_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = now.map_or(0, |now| now.as_nanos());
    format!(
        "{:08x}-0000-4000-8000-{:012x}",
        process::id(),
        nanos & 0xffff_ffff_ffff
    )
}
