//! What greenroom itself writes into a site: a turn without an agent.
//!
//! ```text
//! slow work (labels, an image) ─► Supervisor::operate(SiteEdit) ─► queue ─► make(files) ─► one commit
//! ```
//!
//! Whatever takes long is done before, outside of the thread's queue, by whoever asks: a person's
//! turn does not wait for it, and a kill in the midst of it leaves nothing behind. `make` is then
//! called in the thread's turn, after outside edits were committed, with the site's files as they
//! are at that moment: it has to find its places anew in them. The rest is the same as for an undo:
//! nothing to change is no turn, a dry run is answered, the commit is in the journal before the
//! branch moves, the turn is previewed, told of, and undone like any other.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use serde_json::Value;

use super::{
    Operation, OperationRequest, Supervisor, SupervisorError, lock,
    operation::Plan,
    prepare::{IdempotencyMark, Prepared},
};
use crate::{
    domain::{TurnKind, Usage},
    identity::ThreadKey,
    repository::{SiteFiles, Snapshot},
    turn::TurnRecord,
};

/// Most bytes of a report that a journal takes, as JSON.
const MAX_REPORT: usize = 1 << 20;

/// What a [`SiteEdit`] comes to, with the site's files as they are.
#[derive(Debug, Clone, Default)]
pub struct SiteChange {
    /// The commit's subject, and the turn's instruction in the history.
    pub title: String,
    /// What a person is told when it is done.
    pub text: String,
    /// New contents by path, relative to the site's root with `/`; `None` removes a file. What is
    /// there already with the same content is no change.
    pub files: Vec<(String, Option<Vec<u8>>)>,
    /// What was spent on it, for the turn's result; the ledger has it already.
    pub usage: Usage,
    /// For the turn's result, whole also after a restart. At most 1 MiB as JSON.
    pub report: Value,
}

type Make = dyn Fn(&SiteFiles<'_>) -> Result<SiteChange, String> + Send + Sync;

/// Something to be written into a site. Cheap to clone.
#[derive(Clone)]
pub struct SiteEdit {
    kind: TurnKind,
    make: Arc<Make>,
}

impl fmt::Debug for SiteEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SiteEdit")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl SiteEdit {
    /// An edit that becomes a turn of this kind. `make` blocks, may be called more than once, and
    /// refuses by a sentence for a person.
    pub fn new(
        kind: TurnKind,
        make: impl Fn(&SiteFiles<'_>) -> Result<SiteChange, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            kind,
            make: Arc::new(make),
        }
    }

    /// Works out what it does to `base`.
    pub(super) async fn plan(
        &self,
        prepared: &Prepared,
        base: Snapshot,
    ) -> Result<Plan, SupervisorError> {
        let make = self.make.clone();
        let made = prepared
            .site
            .on_disk("working an edit out", move |tree| {
                match tree.look(&base, |files| make(files))? {
                    Err(why) => Ok(Err(why)),
                    Ok(mut change) => {
                        let files = std::mem::take(&mut change.files);
                        Ok(Ok((tree.draft_written(&base, &files)?, change)))
                    }
                }
            })
            .await?;
        let (draft, change) = made.map_err(SupervisorError::EditRefused)?;
        let is_long = |report: &Value| report.to_string().len() > MAX_REPORT;
        if is_long(&change.report) {
            tracing::warn!("a turn's report is too long for its journal, and left out");
        }
        Ok(Plan {
            text: Some(change.text),
            usage: Some(change.usage),
            report: Some(change.report).filter(|report| !report.is_null() && !is_long(report)),
            ..Plan::new(self.kind, change.title, draft)
        })
    }
}

impl Supervisor {
    /// The turn that was asked for with this idempotency key before. Whoever does long and costly things
    /// before a turn asks this first.
    ///
    /// # Errors
    /// See [`SupervisorError`].
    pub async fn seen(
        &self,
        key: &ThreadKey,
        idempotency_key: &str,
    ) -> Result<Option<TurnRecord>, SupervisorError> {
        self.revive(key).await?;
        let mark = IdempotencyMark::new(&self.0.paths(key), idempotency_key);
        match mark.turn(key).await? {
            Some(id) => Ok(Some(self.turn(&id).await?)),
            None => Ok(None),
        }
    }

    /// Looks at the site's files as they would be if what is in the worktree were committed, after
    /// what was asked of the thread before. Changes nothing. `look` blocks. `expected_head` as for
    /// [`OperationRequest`].
    ///
    /// # Errors
    /// See [`SupervisorError`].
    pub async fn look_at_site<T: Send + 'static>(
        &self,
        key: &ThreadKey,
        expected_head: Option<String>,
        look: impl Fn(&SiteFiles<'_>) -> T + Send + Sync + 'static,
    ) -> Result<T, SupervisorError> {
        let seen = Arc::new(Mutex::new(None));
        let slot = seen.clone();
        let edit = SiteEdit::new(TurnKind::Other, move |files| {
            *lock(&slot) = Some(look(files));
            Ok(SiteChange::default())
        });
        self.operate(OperationRequest {
            key: key.clone(),
            operation: Operation::Edit(edit),
            expected_head,
            dry_run: true,
            author: None,
            idempotency_key: None,
            request_id: None,
        })
        .await?;
        let seen = lock(&seen).take();
        seen.ok_or_else(|| SupervisorError::Internal("a look saw nothing".into()))
    }
}
