//! End-to-end tests, one binary.

#[cfg(test)]
mod gateway;
