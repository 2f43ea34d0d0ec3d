//! From a file's write to the HMR message at a WebSocket: at Astro's dev server itself, through
//! greenroom's preview proxy, nginx, Caddy and http-proxy, all sockets open at once, so that one
//! write is seen by all.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_tungstenite::{connect_async, tungstenite::client::IntoClientRequest as _};

use crate::{
    proxies,
    report::{Table, Unit},
    world::{Http, Kid, World, free_port, until},
};

/// Rounds, each with its sockets opened in another order: the dev server writes to them in that
/// order.
const ROUNDS: usize = 10;
const WRITES: usize = 4;
const SOON: Duration = Duration::from_secs(5);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let site = world.site()?;
    let home = world.folder("hmr-home");
    fs::create_dir_all(&home)?;
    let origin = free_port()?;
    let _astro = astro(world, site, &home, origin).await?;
    let proxies = proxies::all(world, origin, None).await?;
    let ports: Vec<u16> = [origin]
        .into_iter()
        .chain(proxies.iter().map(|one| one.port))
        .collect();
    for port in &ports {
        until("the site", SOON, async || load(*port).await.ok()).await?;
    }

    let mut times = vec![Vec::new(); ports.len()];
    let mut added = vec![Vec::new(); ports.len()];
    for round in 0..ROUNDS {
        let mut order: Vec<usize> = (0..ports.len()).collect();
        order.rotate_left(round % ports.len());
        if round >= ports.len() {
            order.reverse();
        }
        let (sender, mut seen) = mpsc::channel(256);
        let mut sockets = Vec::new();
        for which in order {
            sockets.push(socket(ports[which], which, sender.clone()).await?);
        }
        // The first socket after a start is given an old message.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for number in 0..WRITES {
            while seen.try_recv().is_ok() {}
            let page = site.join("src/pages/index.astro");
            let text = fs::read_to_string(&page)?;
            let text = text.trim_end().trim_end_matches(|c| c != '\n').to_owned()
                + &format!("<!-- bench {number} -->\n");
            let started = Instant::now();
            fs::write(&page, text)?;
            let mut first: Vec<Option<Instant>> = vec![None; ports.len()];
            while first.contains(&None) {
                let (which, at) = timeout(SOON, seen.recv())
                    .await
                    .context("no message came")?
                    .context("the sockets closed")?;
                first[which].get_or_insert(at);
            }
            let ms: Vec<f64> = first
                .into_iter()
                .flatten()
                .map(|at| at.duration_since(started).as_secs_f64() * 1e3)
                .collect();
            for (which, ms_here) in ms.iter().enumerate() {
                times[which].push(*ms_here);
                added[which].push((ms_here - ms[0]) * 1e3);
            }
            // A browser that reloads makes the page be rendered again.
            load(origin).await?;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        for socket in sockets {
            socket.abort();
        }
    }
    let mut table = Table::default();
    let base = table.own(
        "write of a page to the HMR message, through greenroom",
        Unit::Ms,
        times[1].clone(),
        "",
    );
    table.rival(
        "the same, straight from Astro's dev server",
        Unit::Ms,
        times[0].clone(),
        base,
    );
    let base = table.own(
        "what greenroom adds to one message",
        Unit::Us,
        added[1].clone(),
        "under 200 µs",
    );
    for (one, added) in proxies.iter().zip(added.into_iter().skip(1)).skip(1) {
        table.rival(format!("what {} adds", one.name), Unit::Us, added, base);
    }
    Ok(table)
}

pub(crate) async fn astro(
    world: &World,
    site: &Path,
    home: &Path,
    port: u16,
) -> anyhow::Result<Kid> {
    // A line of its own at the end, for the bench to write over.
    let page = site.join("src/pages/index.astro");
    let text = fs::read_to_string(&page)?;
    fs::write(&page, text.trim_end().to_owned() + "\n<!-- bench -->\n")?;
    let mut command = world.command(world.node()?, home);
    command
        .current_dir(site)
        .env("ASTRO_TELEMETRY_DISABLED", "1")
        .arg(site.join("node_modules/astro/bin/astro.mjs"))
        .args([
            "dev",
            "--ignore-lock",
            "--host",
            "127.0.0.1",
            "--port",
            &port.to_string(),
        ]);
    let mut kid = Kid::spawn(&mut command)?;
    let up = until("astro dev", Duration::from_secs(40), async || {
        if let Ok(Some(status)) = kid.child.try_wait() {
            return Some(Err(status));
        }
        load(port).await.ok().map(Ok)
    });
    match up.await? {
        Ok(()) => Ok(kid),
        Err(status) => bail!("astro dev ended: {status}"),
    }
}

/// Asks for the page, as a browser does.
async fn load(port: u16) -> anyhow::Result<()> {
    let mut http = Http::connect(port).await?;
    match http.get("/").await? {
        (200, _) => Ok(()),
        (status, _) => bail!("the page answered {status}"),
    }
}

/// Tells when messages of a change come.
async fn socket(
    port: u16,
    which: usize,
    seen: mpsc::Sender<(usize, Instant)>,
) -> anyhow::Result<JoinHandle<()>> {
    let mut request = format!("ws://localhost:{port}/").into_client_request()?;
    request
        .headers_mut()
        .insert("sec-websocket-protocol", "vite-hmr".parse()?);
    let (mut socket, _) = connect_async(request).await.context("the HMR socket")?;
    Ok(tokio::spawn(async move {
        while let Some(Ok(message)) = socket.next().await {
            let at = Instant::now();
            let text = message.to_text().unwrap_or_default();
            let is_news = text.contains("full-reload") || text.contains("\"update\"");
            if is_news && seen.send((which, at)).await.is_err() {
                return;
            }
        }
    }))
}
