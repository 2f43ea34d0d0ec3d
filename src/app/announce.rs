//! The first lines of the log: where it listens, for whom, and how its children are held.

use std::path::Path;

use super::listeners::{Listeners, port};
use crate::{
    config::{Loaded, Mode, Settings},
    process::Launcher,
};

/// The first lines of the log: where it listens, for whom, and what is behind it.
pub(super) fn announce(
    loaded: &Loaded,
    mode: Mode,
    listeners: &Listeners,
    is_rehearsal: bool,
    launcher: &Launcher,
) {
    let settings = &loaded.settings;
    let for_whom = for_whom(settings);
    tracing::info!(
        bind = %settings.bind,
        api_port = listeners.api_port(),
        preview_port = listeners.preview_port(),
        hmr_port = port(&listeners.hmr),
        service_port = listeners.service.as_ref().map(port),
        workspace = %settings.workspace_path.display(),
        "greenroom {} listens, for {for_whom}",
        env!("CARGO_PKG_VERSION"),
    );
    tell_more(loaded, is_rehearsal, launcher);
    if mode == Mode::Dev {
        let page = settings.api_url(listeners.api_port());
        println!("\n  greenroom is ready: open  {page}\n");
        if is_rehearsal {
            println!(
                "  Rehearsal: no model is behind it, a script answers. With ANTHROPIC_API_KEY set, Claude does.\n"
            );
        }
    }
}

/// What an operator should know besides.
pub(super) fn tell_more(loaded: &Loaded, is_rehearsal: bool, launcher: &Launcher) {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    if is_rehearsal {
        tracing::warn!("rehearsal: no model is behind this, a script answers");
    }
    let confinement = launcher.confinement();
    tracing::info!(
        files = ?confinement.files, network = ?confinement.network,
        processes = ?confinement.processes, bash = ?confinement.bash,
        egress = match &loaded.settings.egress_allow {
            None => "any".to_owned(),
            Some(names) if names.is_empty() => "none".to_owned(),
            Some(names) => names.join(","),
        },
        "how agents and dev servers are held"
    );
}

pub(super) fn tell_closed(path: Option<&Path>) {
    if let Some(path) = path {
        tracing::warn!(
            path = %path.display(),
            "agents get no uid of their own, because another user does not get through to this path: \
             open the folders above it (chmod o+x) or move it"
        );
    }
}

pub(super) fn for_whom(settings: &Settings) -> &'static str {
    match (settings.has_api_secret(), settings.bind.is_loopback()) {
        (true, _) => "callers with the token or a signature",
        (false, true) => "this machine alone",
        (false, false) => "ANYBODY who can reach it (insecure)",
    }
}
