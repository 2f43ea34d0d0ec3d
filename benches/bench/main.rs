//! Measures greenroom beside what a person would use instead, on this machine, in one run, and
//! writes the tables into `docs/performance.md`. `scripts/bench` brings the tools and calls it:
//! `cargo bench --bench bench -- [NAME…]`.
//!
//! Everything is on loopback, bounded in time, and interleaved with its rivals: what slows the
//! machine for a while slows both sides.
#![expect(
    clippy::disallowed_methods,
    reason = "a bench starts what it measures by itself"
)]

mod commit;
mod dependencies;
mod first_page;
mod gateway;
mod history;
mod hmr;
mod init;
mod label;
mod proxies;
mod proxy;
mod report;
mod rest;
mod sockets;
mod start;
mod turn;
mod world;

use std::{future::Future, pin::Pin, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};

use crate::{report::Table, world::World};

/// The program's own allocator: the proxy is measured in here.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Measured<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Table>> + 'a>>;

struct Part {
    name: &'static str,
    /// More than it takes on a slow machine.
    limit: Duration,
    run: for<'a> fn(&'a World) -> Measured<'a>,
}

macro_rules! parts {
    ($($name:ident $seconds:literal,)*) => {
        [$(Part {
            name: stringify!($name),
            limit: Duration::from_secs($seconds),
            run: |world| Box::pin($name::measure(world)),
        }),*]
    };
}

const PARTS: [Part; 13] = parts! {
    start 60,
    rest 60,
    init 90,
    turn 180,
    commit 600,
    history 120,
    hmr 90,
    proxy 240,
    sockets 180,
    dependencies 420,
    first_page 900,
    gateway 90,
    label 1500,
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == proxy::SERVE) {
        return proxy::serve(&args[1..]);
    }
    if args.first().is_some_and(|arg| arg == gateway::SERVE) {
        return gateway::serve(&args[1..]);
    }
    // `cargo bench` says so; `cargo test --all-targets` must not measure anything.
    if !args.iter().any(|arg| arg == "--bench") {
        eprintln!("bench: measures under `cargo bench` only; see scripts/bench");
        return Ok(());
    }
    args.retain(|arg| arg != "--bench");
    let known = PARTS.map(|part| part.name);
    if let Some(odd) = args.iter().find(|arg| !known.contains(&arg.as_str())) {
        bail!("no part is called {odd}; there are {}", known.join(", "));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let world = World::new()?;
    let mut failed = Vec::new();
    for part in PARTS {
        if !args.is_empty() && !args.iter().any(|arg| arg == part.name) {
            continue;
        }
        eprintln!("\nbench: {} …", part.name);
        let measure = async { tokio::time::timeout(part.limit, (part.run)(&world)).await };
        let measured = runtime
            .block_on(measure)
            .context("it took too long")
            .flatten();
        match measured {
            Ok(table) => {
                eprintln!("{}", table.text());
                report::write(part.name, &table, &world)?;
            }
            Err(error) => {
                eprintln!("bench: {} failed: {error:#}", part.name);
                eprintln!("{}", world.logs());
                failed.push(part.name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}
