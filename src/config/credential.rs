//! Which credential of the model API is used.

use std::path::{Path, PathBuf};

use super::{ConfigError, Mode, Secret, Settings};

/// Where the credential comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialSource {
    /// `ANTHROPIC_API_KEY`.
    ApiKey(Secret),
    /// A file with a key or OAuth tokens: `CLAUDE_CREDENTIALS_FILE`, else the CLI's own
    /// `~/.claude/.credentials.json`.
    File(PathBuf),
    /// None: the model is played by a script.
    Rehearsal,
}

/// Chooses: `--rehearsal`, then the key, then the named file, then the CLI's own file; without
/// any `serve` fails and `dev` rehearses.
pub(super) fn choose(
    settings: &Settings,
    mode: Mode,
    home: Option<&Path>,
    is_file: impl Fn(&Path) -> bool,
) -> Result<CredentialSource, ConfigError> {
    if settings.rehearsal {
        return Ok(CredentialSource::Rehearsal);
    }
    if let Some(key) = &settings.anthropic_api_key {
        return Ok(CredentialSource::ApiKey(key.clone()));
    }
    if let Some(file) = &settings.claude_credentials_file {
        return Ok(CredentialSource::File(file.clone()));
    }
    let own = home.map(|home| home.join(".claude/.credentials.json"));
    match own.filter(|path| is_file(path)) {
        Some(file) => Ok(CredentialSource::File(file)),
        None if mode == Mode::Dev => Ok(CredentialSource::Rehearsal),
        None => Err(ConfigError::MissingCredential),
    }
}
