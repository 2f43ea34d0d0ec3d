//! Life and death of the program: what keeps it awake, and the order in which it ends.

mod activity;
mod memory;
mod shutdown;

pub use activity::{Activity, Guard, Holder, HolderKind, IdleAnswer};
pub use memory::Memory;
pub use shutdown::{Shares, Signals, StopReason, wait_for_reason};
