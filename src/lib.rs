//! greenroom: customers edit their websites by talking.
//!
//! One program per container. It keeps each site in git, lets the Claude Code CLI work on a
//! thread's worktree, shows the result through the site's own dev server, and commits every turn.
//! `ARCHITECTURE.md` draws the rooms below and the arrows between them.

pub mod address;
pub mod agent;
pub mod alt_text;
pub mod api;
pub mod app;
pub mod cli;
pub mod client;
pub mod config;
pub mod control_plane;
pub mod domain;
pub mod ecs;
pub mod egress;
pub mod figures;
pub mod gateway;
pub mod hub;
pub mod identity;
pub mod label;
pub mod lease;
pub mod lifecycle;
pub mod outbound;
pub mod owner;
pub mod picture;
pub mod preview;
pub mod process;
pub mod rehearsal;
pub mod replicate;
pub mod repository;
pub mod service;
pub mod supervisor;
pub mod task;
pub mod telemetry;
pub mod text;
pub mod turn;
pub mod usage;
pub mod workspace;
