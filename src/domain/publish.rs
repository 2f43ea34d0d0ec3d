//! Publishing as the outside sees it: what was merged where, and what kept it from being merged.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a file keeps an operation from being carried out. "From" is the branch being merged (or
/// what is being brought back), "to" the one that it is merged into (or what is there now).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConflictKind {
    BothModified,
    BothAdded,
    /// Deleted in "from", changed in "to".
    DeletedInFrom,
    /// Deleted in "to", changed in "from".
    DeletedInTo,
    /// Renamed in one and something else in the other.
    Renamed,
    /// What is there is in no commit (ignored, held back, or just being edited).
    InTheWay,
    /// There would be no conflict, but lines of others would vanish that no turn touched.
    SilentLoss,
}

/// Two branches that were to be merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Between {
    pub from: String,
    pub to: String,
}

/// One merge on the way of a publication or sync.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MergeStep {
    /// Branch that was merged.
    pub from: String,
    /// Branch that it was merged into.
    pub to: String,
    /// Full id of the commit that the branch is at then; null where it did not move.
    pub commit: Option<String>,
    /// There was nothing to merge.
    pub up_to_date: bool,
}
