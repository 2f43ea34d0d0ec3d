//! Stand-in until the real one is merged.
use crate::process::Launcher;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};
#[derive(Debug, Clone)]
pub struct NodeTools {
    pub node: PathBuf,
    pub path: OsString,
    pub folders: Vec<PathBuf>,
    pub env: Vec<(OsString, OsString)>,
}
pub struct DependencyRequest {
    pub worktree: PathBuf,
    pub export: Box<dyn FnOnce(&Path) -> Result<(), String> + Send>,
    pub cache: PathBuf,
    pub tools: NodeTools,
    pub launcher: Launcher,
}
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct InstallError {
    pub message: String,
}
pub async fn ensure_dependencies(
    _r: DependencyRequest,
    _p: impl Fn(&str) + Send + Sync + 'static,
) -> Result<(), InstallError> {
    Ok(())
}
