//! The preview's part in a turn: its news meanwhile, its word at the end.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Inner, prepare::Prepared};
use crate::{
    domain::{CommitSummary, PreviewError, PreviewState, TurnEvent, TurnPreview},
    identity::ThreadKey,
    preview::is_configuration,
    turn::{Folder, Journal},
};

/// How long a turn that changed files waits for the preview's word, by the contract.
const PATIENCE: Duration = Duration::from_millis(700);

/// What is installed follows from these.
const DEPENDENCIES: [&str; 4] = [
    "package.json",
    "package-lock.json",
    "pnpm-lock.yaml",
    "yarn.lock",
];

/// Does `work`, a turn, while the preview's news go to its journal.
pub(super) async fn with_news<T>(
    inner: &Inner,
    key: &ThreadKey,
    journal: &Journal,
    work: impl Future<Output = T>,
) -> T {
    let Some(preview) = inner.previews.get(&key.slug()) else {
        return work.await;
    };
    let _in_turn = preview.begin_turn();
    let mut status = preview.status();
    let news = async {
        let mut known = status.borrow_and_update().clone();
        while status.changed().await.is_ok() {
            let now = status.borrow_and_update().clone();
            let mut events = Vec::new();
            if now.updates != known.updates {
                events.push(TurnEvent::PreviewUpdated {});
            }
            if now.errors != known.errors && !now.errors.is_empty() {
                let errors = now.errors.clone();
                events.push(TurnEvent::PreviewError { errors });
            }
            for event in events {
                // A journal that takes no more ends the turn elsewhere.
                journal.append(event).await.ok();
            }
            known = now;
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        done = work => done,
        () = news => unreachable!("news never end"),
    }
}

/// The preview's word on a turn: what needs new dependencies gets them, a server that had given up
/// tries again, and the pages that show the change are looked at. `updates` is what the status
/// said before the turn.
pub(super) async fn word_on(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    commit: Option<&CommitSummary>,
    folder: Folder,
    updates: u64,
) -> TurnPreview {
    let mut broken = None;
    if folder == Folder::New {
        prepared.attach.again();
    } else if let Some(commit) = commit
        && let Some(preview) = inner.previews.get(&prepared.site.key.slug())
    {
        let files: Vec<String> = commit.files.iter().map(|file| file.path.clone()).collect();
        let is_down = || {
            let status = preview.status();
            let status = status.borrow();
            status.state == PreviewState::Error && status.upstream.is_none()
        };
        if files
            .iter()
            .any(|file| DEPENDENCIES.contains(&file.as_str()))
        {
            prepared.attach.again();
        } else if !matches!(
            preview.status().borrow().state,
            PreviewState::Off | PreviewState::Asleep
        ) && let Some(file) = files.iter().find(|file| is_configuration(file))
        {
            preview.restart(&format!("{file} changed")).await;
        } else if is_down() {
            preview.restart("the site changed").await;
            let mut status = preview.status();
            let settled = status.wait_for(|status| status.state != PreviewState::Starting);
            tokio::time::timeout(PATIENCE, settled).await.ok();
        } else {
            let asked = Instant::now();
            broken = preview.look(&files, updates, PATIENCE).await;
            let came = preview.status().borrow().updates != updates;
            let word = if came { "came" } else { "none" };
            metrics::histogram!("greenroom_hmr_delay_seconds", "word" => word)
                .record(asked.elapsed().as_secs_f64());
        }
    }
    let status = inner.preview_status(&prepared.site.key);
    match broken {
        // Its reason is on its way.
        Some(page) if status.state == PreviewState::Live => TurnPreview {
            state: PreviewState::Error,
            errors: vec![PreviewError {
                message: format!("the page {page} can't be shown"),
                ..PreviewError::default()
            }],
        },
        _ => TurnPreview {
            state: status.state,
            errors: status.errors,
        },
    }
}
