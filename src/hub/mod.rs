//! The Hugging Face Hub: publishing a LoRA, listing models.
//!
//! A training's folder is looked through ([`LoraFolder`]), a model card is made of it, and what the Hub
//! does not have yet goes there ([`Hub::publish`]): large files into its storage, then everything as one
//! commit. What the Hub has decides what is left to do, so that one that was killed goes on where it was,
//! and a second one does nothing. Between two publications nothing is kept here but the addresses of an
//! upload in parts that was cut off.
//!
//! Whoever publishes holds a [`Meter`], which tells how far it is.

mod calls;
mod card;
mod client;
mod error;
mod folder;
mod lfs;
mod meter;
mod name;
mod parts;
mod place;
mod publish;
mod source;
mod upload;

pub use calls::Model;
pub use client::{Hub, HubSettings, STILL};
pub use error::HubError;
pub use folder::{FolderError, LoraFolder, Reason, Sample, Training};
pub use meter::{Meter, Progress, Stage};
pub use name::{BadName, ModelId, ModelName};
pub use publish::{Publication, Published};
pub use source::Source;
