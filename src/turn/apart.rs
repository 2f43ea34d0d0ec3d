//! A run that is not the thread's own agent and works in its worktree all the same: a one-shot call
//! of another service. It is a turn of the thread, with a journal, a commit and an outcome, and can
//! be undone; the thread's conversation knows nothing of it.

use tokio::time::Instant;

use super::{
    context::StoredContext,
    journal::{Accepted, Journal},
    run::{RunError, TurnSite, apply, blank_result, commit},
};
use crate::{
    agent::RunOutcome,
    domain::{CommitSummary, TurnEvent, TurnPreview, TurnResult, TurnStatus},
};

impl TurnSite {
    /// Does `run` between the commit of what others edited and the commit of what it edited.
    ///
    /// # Errors
    /// If there is no outcome: the turn is recovered when the thread is prepared again.
    pub async fn run_apart(
        &self,
        accepted: &Accepted,
        journal: &Journal,
        context: &mut StoredContext,
        run: impl AsyncFnOnce() -> RunOutcome,
        preview: impl AsyncFnOnce(Option<&CommitSummary>) -> TurnPreview,
    ) -> Result<TurnResult, RunError> {
        let started = Instant::now();
        let mut result = blank_result(accepted, context);
        journal.append(TurnEvent::Started {}).await?;
        let outcome = run().await;
        if let Some(failure) = apply(&outcome, accepted, &mut result) {
            result.status = TurnStatus::Failed;
            result.error = Some(failure.message);
            result.code = Some(failure.code);
        }
        // It is none of the conversation that the thread's agent goes on with.
        result.session_id.clone_from(&context.session_id);
        commit(self, accepted, journal, &outcome, &mut result).await?;
        result.preview = preview(result.commit.as_ref()).await;
        result.duration_ms = started.elapsed().as_millis() as u64;
        self.finish(accepted, journal, context, &mut result).await?;
        Ok(result)
    }
}
