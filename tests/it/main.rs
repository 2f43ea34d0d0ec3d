//! End-to-end tests, one binary.

mod support;

mod access;
mod architecture;
mod bad_input;
mod browser;
mod campaign;
mod canary;
mod cli;
mod conformance;
mod dependencies;
mod execute;
mod figures;
mod full_disk;
mod gateway;
mod guard;
mod history;
mod hostile;
mod hostile_repository;
mod init;
mod lifecycle;
mod limits;
mod one_shot;
mod owners;
mod preview_astro;
mod preview_dev_server;
mod preview_proxy;
mod process;
mod publish;
mod tenants;
mod terminal;
mod upstream;
mod usage;
mod warm;
mod watchdogs;
