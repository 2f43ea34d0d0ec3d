//! End-to-end tests, one binary.

mod cli;
mod gateway;
mod preview_dev_server;
mod preview_proxy;
mod process;
