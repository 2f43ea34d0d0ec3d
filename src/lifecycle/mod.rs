//! Life and death of the program: what keeps it awake, and the order in which it ends.

mod activity;
mod shutdown;

pub use activity::{Activity, Guard, Holder, HolderKind, IdleAnswer};
pub use shutdown::{StopReason, wait_for_reason};
