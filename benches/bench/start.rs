//! From exec to the first 200 of `GET /health`.

use std::time::{Duration, Instant};

use anyhow::bail;

use crate::{
    report::{Table, Unit},
    world::{Greenroom, Http, Kid, World, free_port},
};

const ROUNDS: usize = 20;
const SOON: Duration = Duration::from_secs(10);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let (mut own, mut http, mut express) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let mut greenroom = Greenroom::spawn(world, "start", &[("ANTHROPIC_API_KEY", "none")])?;
        own.push(healthy(greenroom.port, started).await?);
        greenroom.kid.end();
        for (times, script) in [(&mut http, "http.js"), (&mut express, "express.js")] {
            let port = free_port()?;
            let started = Instant::now();
            let mut server = world.rival(script, &[&port.to_string()])?;
            times.push(healthy(port, started).await?);
            server.end();
        }
    }
    let mut table = Table::default();
    let base = table.own(
        "`greenroom serve`, exec to healthy",
        Unit::Ms,
        own,
        "under 15 ms",
    );
    table.rival("a bare `http.createServer` on Node", Unit::Ms, http, base);
    table.rival("a bare Express 5 on Node", Unit::Ms, express, base);
    Ok(table)
}

/// Milliseconds until it answers 200.
async fn healthy(port: u16, started: Instant) -> anyhow::Result<f64> {
    while started.elapsed() < SOON {
        if let Ok(mut http) = Http::connect(port).await
            && let Ok((200, _)) = http.get("/health").await
        {
            return Ok(started.elapsed().as_secs_f64() * 1e3);
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    bail!("port {port} did not get healthy")
}

/// Starts greenroom and waits until it is healthy.
pub(crate) async fn greenroom(
    world: &World,
    name: &str,
    env: &[(&str, &str)],
) -> anyhow::Result<Greenroom> {
    let greenroom = Greenroom::spawn(world, name, env)?;
    healthy(greenroom.port, Instant::now()).await?;
    Ok(greenroom)
}

/// Waits until a rival answers.
pub(crate) async fn rival(kid: Kid, port: u16) -> anyhow::Result<Kid> {
    healthy(port, Instant::now()).await?;
    Ok(kid)
}
