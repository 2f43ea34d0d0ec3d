//! End-to-end tests, one binary.

<<<<<<< HEAD
mod cli;
=======
#[cfg(test)]
>>>>>>> room-gateway
mod gateway;
mod preview_dev_server;
mod preview_proxy;
mod process;
