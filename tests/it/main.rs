//! End-to-end tests, one binary.

mod gateway;
mod process;
