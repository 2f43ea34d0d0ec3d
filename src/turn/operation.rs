//! What is done to a thread besides its agent's turns: undo, redo, restore, sync, and what greenroom
//! itself writes. An operation needs no agent; it is one commit, worked out before it is accepted, so
//! that one which cannot be carried out leaves no trace. Accepted, it is a turn like any other: journal, context, outcome.
//!
//! ```text
//! commit outside edits ─► draft (may be refused) ─► commit object ─► journal ─► apply ─► outcome
//! ```
//!
//! Once it is in its journal it will be carried out: whoever recovers the thread finds the commit
//! there and applies it, or finishes that.

use tokio::time::Instant;

use super::{
    context::StoredContext,
    journal::{Accepted, Journal},
    run::{RunError, TurnSite, blank_result, sentences},
};
use crate::{
    domain::{
        CommitSummary, Continuity, Effect, ErrorCode, TurnEvent, TurnPreview, TurnResult,
        TurnStatus,
    },
    repository::{CommitText, Draft, Repair, RepositoryError},
};

impl TurnSite {
    /// Makes the commit of an operation that is about to be accepted; no branch has it yet. `None`
    /// if nothing would change.
    ///
    /// # Errors
    /// If the repository cannot be written.
    pub async fn write_draft(
        &self,
        accepted: &Accepted,
        draft: Draft,
    ) -> Result<Option<String>, RunError> {
        if draft.is_empty() {
            return Ok(None);
        }
        let mut trailers = vec![
            ("Turn-Id", accepted.turn_id.to_string()),
            ("Thread", self.key.to_string()),
            ("Kind", accepted.kind.as_str().to_owned()),
        ];
        let Effect {
            undone,
            redone,
            restored,
        } = &accepted.effect;
        trailers.extend(match redone {
            Some(turn) => Some(("Redoes", turn.to_string())),
            None => undone.as_ref().map(|turn| ("Undoes", turn.to_string())),
        });
        trailers.extend(restored.clone().map(|commit| ("Restores", commit)));
        trailers.extend(
            accepted
                .usage
                .map(|usage| ("Cost-USD", format!("{:.6}", usage.cost_usd))),
        );
        trailers.push(("Status", TurnStatus::Completed.as_str().to_owned()));
        let committer = self.committer.clone();
        let author = accepted.author.clone().unwrap_or_else(|| committer.clone());
        let instruction = accepted.instruction.clone();
        let commit = self
            .on_disk("committing an operation", move |tree| {
                tree.write_draft(
                    &draft,
                    &CommitText {
                        instruction: &instruction,
                        trailers: &trailers,
                        author: &author,
                        committer: &committer,
                    },
                )
            })
            .await?;
        Ok(Some(commit))
    }

    /// Carries an accepted operation out, to its outcome. `text` says to a person what was done,
    /// `repairs` what was put right before; `preview` tells the preview's state at the end.
    ///
    /// # Errors
    /// If there is no outcome: the operation stays open, and is finished when the thread is
    /// prepared again.
    pub async fn carry_out(
        &self,
        accepted: &Accepted,
        journal: &Journal,
        context: &mut StoredContext,
        text: String,
        repairs: &[Repair],
        preview: impl AsyncFnOnce(Option<&CommitSummary>) -> TurnPreview,
    ) -> Result<TurnResult, RunError> {
        let started = Instant::now();
        let mut result = blank_result(accepted, context);
        result.status = TurnStatus::Completed;
        result.text = text;
        result.repairs = sentences(repairs);
        result.session_id.clone_from(&context.session_id);
        result.continuity = Continuity::Native;
        if !journal.record().has_started() {
            journal.append(TurnEvent::Started {}).await?;
        }
        match self.apply(accepted).await {
            Ok(commit) => result.commit = commit,
            Err(RunError::Repository(error @ RepositoryError::HeadMoved { .. })) => {
                tracing::warn!(%error, "an operation was not carried out");
                result.status = TurnStatus::Failed;
                result.effect = Effect::default();
                result.report = None;
                result.text = String::new();
                result.error = Some(
                    "The thread's branch was moved by somebody else; nothing was changed. Please \
                     ask again."
                        .into(),
                );
                result.code = Some(ErrorCode::Internal);
            }
            Err(error) => return Err(error),
        }
        // A recovered operation may have told of its commit before.
        if let Some(commit) = result
            .commit
            .clone()
            .filter(|_| !journal.record().has_commit())
        {
            for file in &commit.files {
                let (path, status) = (file.path.clone(), file.status);
                journal
                    .append(TurnEvent::FileChanged { path, status })
                    .await?;
            }
            journal.append(TurnEvent::CommitCreated { commit }).await?;
            metrics::counter!("greenroom_commits_total", "of" => accepted.kind.as_str())
                .increment(1);
        }
        result.preview = preview(result.commit.as_ref()).await;
        result.duration_ms = started.elapsed().as_millis() as u64;
        self.finish(accepted, journal, context, &mut result).await?;
        tracing::info!(
            kind = accepted.kind.as_str(),
            status = result.status.as_str(),
            elapsed_ms = result.duration_ms,
            commit = result.commit.as_ref().map(|commit| commit.id.as_str()),
            "an operation ended"
        );
        Ok(result)
    }

    async fn apply(&self, accepted: &Accepted) -> Result<Option<CommitSummary>, RunError> {
        let Some(commit) = accepted.applies.clone() else {
            return Ok(None);
        };
        let fence = self.fence.clone();
        let apply = move |tree: &crate::repository::Worktree| {
            // A disk that hiccups gets a second try: it goes on where the first one was.
            match tree.apply(&commit, &fence) {
                Err(RepositoryError::Disk { .. } | RepositoryError::Git { .. }) => {
                    tree.apply(&commit, &fence)
                }
                applied => applied,
            }
        };
        self.on_disk("applying an operation", apply).await.map(Some)
    }
}
