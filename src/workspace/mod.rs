//! (room)

pub mod dependencies;
