//! End-to-end tests, one binary.

mod dependencies;
mod preview_dev_server;
mod preview_proxy;
mod process;
