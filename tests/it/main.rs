//! End-to-end tests, one binary.

mod cli;
#[cfg(test)]
mod gateway;
mod preview_dev_server;
mod preview_proxy;
mod process;
