//! End-to-end tests, one binary.

mod preview_dev_server;
mod preview_proxy;
mod process;
