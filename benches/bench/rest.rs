//! Resident memory at rest.

use std::time::Duration;

use anyhow::Context as _;

use crate::{
    report::{Table, Unit},
    start,
    world::{World, free_port, memory},
};

const ROUNDS: usize = 3;
const QUIET: Duration = Duration::from_secs(5);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let mut own = Vec::new();
    let mut own_pss = Vec::new();
    let mut express = Vec::new();
    let mut express_pss = Vec::new();
    for _ in 0..ROUNDS {
        let env = [("ANTHROPIC_API_KEY", "none")];
        let greenroom = start::greenroom(world, "rest", &env).await?;
        let port = free_port()?;
        let server = world.rival("express.js", &[&port.to_string()])?;
        let server = start::rival(server, port).await?;
        tokio::time::sleep(QUIET).await;
        for (name, kid, rss, pss) in [
            ("greenroom", &greenroom.kid, &mut own, &mut own_pss),
            ("Express", &server, &mut express, &mut express_pss),
        ] {
            let memory = memory(kid.id()).context(name)?;
            rss.push(memory.rss_mb);
            pss.extend(memory.pss_mb);
        }
    }
    let mut table = Table::default();
    let base = table.own(
        "`greenroom serve`, VmRSS after 5 s of rest",
        Unit::Mb,
        own,
        "under 15 MB",
    );
    table.rival("a bare Express 5 on Node", Unit::Mb, express, base);
    // Another process's share of pages is for root alone to see.
    if !own_pss.is_empty() {
        let base = table.own(
            "the same, its proportional share (PSS)",
            Unit::Mb,
            own_pss,
            "",
        );
        table.rival("a bare Express 5 on Node", Unit::Mb, express_pss, base);
    }
    Ok(table)
}
