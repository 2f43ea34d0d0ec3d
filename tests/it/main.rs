//! End-to-end tests, one binary.

mod support;

mod browser;
mod cli;
#[cfg(test)]
mod gateway;
mod init;
mod preview_dev_server;
mod preview_proxy;
mod process;
