//! What a thousand open WebSockets cost the proxies in memory: each has said one message and got it
//! back, and is silent then, as those of open pages are.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use crate::{
    proxies,
    report::{Table, Unit},
    world::{World, memory},
};

const SOCKETS: usize = 1000;
const ROUNDS: usize = 3;
const SETTLE: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(10);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let origin = listener.local_addr()?.port();
    let serve = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    let mut names = Vec::new();
    let mut grown: Vec<Vec<f64>> = Vec::new();
    for _ in 0..ROUNDS {
        // New processes each time: what was freed once is not given back.
        let all = proxies::all(world, origin, None).await?;
        names = all.iter().map(|one| one.name).collect();
        grown.resize(all.len(), Vec::new());
        for (number, one) in all.iter().enumerate() {
            let warm = open(one.port).await.with_context(|| one.name)?;
            tokio::time::sleep(SETTLE).await;
            let before = memory(one.kid.id())?.rss_mb;
            let mut sockets = Vec::with_capacity(SOCKETS);
            for _ in 0..SOCKETS {
                sockets.push(open(one.port).await.with_context(|| one.name)?);
            }
            tokio::time::sleep(SETTLE).await;
            grown[number].push(memory(one.kid.id())?.rss_mb - before);
            drop((warm, sockets));
        }
    }
    serve.abort();
    let mut table = Table::default();
    let mut base = 0;
    for (number, (name, values)) in names.into_iter().zip(grown).enumerate() {
        let what = format!("{name}: 1,000 open WebSockets");
        if number == 0 {
            base = table.own(what, Unit::Mb, values, "");
        } else {
            table.rival(what, Unit::Mb, values, base);
        }
    }
    table.note("Resident memory with them, less what it was before; new processes for each round.");
    Ok(table)
}

async fn echo(stream: TcpStream) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    while let Some(Ok(message)) = socket.next().await {
        if message.is_text() && socket.send(message).await.is_err() {
            return;
        }
    }
}

async fn open(port: u16) -> anyhow::Result<WebSocketStream<TcpStream>> {
    let open = async {
        let request = format!("ws://localhost:{port}/").into_client_request()?;
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let (mut socket, _) = client_async(request, stream).await?;
        socket.send(Message::text("hello")).await?;
        let back = socket.next().await.context("the socket closed")??;
        ensure!(back.to_text()? == "hello", "another message came");
        Ok(socket)
    };
    tokio::time::timeout(SOON, open)
        .await
        .context("no socket came up")?
}
