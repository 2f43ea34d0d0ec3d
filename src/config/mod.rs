//! Settings: one table, four sources, one struct.
//!
//! [`TABLE`] describes every setting. [`load`] reads flags over environment over `.env` over YAML
//! over defaults, and is pure but for the files below the working directory and its two parents:
//! environment and directory are arguments. [`Loaded`] knows where each value came from. The
//! binary's `cli` calls it once; the rest of the program takes [`Settings`].
//!
//! `greenroom.yaml` wins over `config/*.yaml`, of which a later name wins over an earlier one. Of
//! `.env` files the nearest wins, setting by setting. An empty value counts as unset everywhere
//! but in a flag. Secrets are [`Secret`]s from the parser on.

mod credential;
mod error;
mod folders;
mod programs;
mod resolve;
mod secret;
mod source;
mod table;
#[cfg(test)]
mod tests;
mod value;

pub use credential::CredentialSource;
pub use error::ConfigError;
pub use folders::runtime_folder;
pub use programs::{TESTED_CLAUDE_VERSION, find_claude, find_node};
pub use resolve::{Entry, Loaded, Mode, Surroundings, load, reachable};
pub use secret::Secret;
pub use source::{Flags, Source};
pub use table::{Kind, Settings, Spec, TABLE};

/// How a broken page is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreviewErrors {
    /// The page as it was before, with a line that says what is wrong.
    Banner,
    /// Vite's own overlay.
    Overlay,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// A line for a person.
    Text,
    /// One JSON object a line.
    Json,
}
