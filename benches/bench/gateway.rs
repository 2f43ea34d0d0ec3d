//! What the gateway adds to the first byte of a model's answer: the same request to the same
//! upstream, directly and through it, in turns. Both connections are kept, the gateway is a process of
//! its own with a ledger on the disk, and the request is as long as the CLI's.

use std::{
    convert::Infallible,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use greenroom::{
    config::Secret,
    domain::Account,
    gateway::{Credential, Gateway, GatewayConfig, OAuthSettings},
    task::Tasks,
    usage::{Ledger, LedgerSettings},
};
use http::{Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming, client::conn::http1::SendRequest, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::{
    report::{Table, Unit},
    world::{Kid, World},
};

/// The argument that makes this program the gateway.
pub(crate) const SERVE: &str = "serve-gateway";

const ROUNDS: usize = 200;
/// Before they are counted: connections, files, caches.
const WARM: usize = 20;
/// The quickest that a model's first byte comes, by far.
const THINKING: Duration = Duration::from_millis(50);
/// Of a CLI with six tools and a short conversation.
const BODY: usize = 60_000;
const CALL: Duration = Duration::from_secs(20);

const ANSWER: &str = concat!(
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"model\":\"claude-opus-5\",",
    "\"usage\":{\"input_tokens\":9,\"output_tokens\":1}}}\n\n",
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":9}}\n\n",
    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let upstream = upstream().await?;
    let mut command = world.command(&std::env::current_exe()?, &world.folder(""));
    command
        .arg(SERVE)
        .arg(upstream.to_string())
        .arg(world.folder("gateway"))
        .stdout(Stdio::piped());
    let mut kid = Kid::spawn(&mut command)?;
    let stdout = kid.child.stdout.take().context("it has none")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let (port, token) = line.trim().split_once(' ').context("no gateway came up")?;
    let mut direct = Caller::connect(upstream, token).await?;
    let mut through = Caller::connect(port.parse()?, token).await?;

    let mut table = Table::default();
    for (thinks, what, aim) in [
        (THINKING, "the upstream thinks for 50 ms", "under 1 ms"),
        (Duration::ZERO, "the upstream answers at once", ""),
    ] {
        let (mut own, mut plain, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..WARM + ROUNDS {
            // Whoever is first has the warmer machine.
            let (a, b) = if round % 2 == 0 {
                let a = through.first_byte(thinks).await?;
                (a, direct.first_byte(thinks).await?)
            } else {
                let b = direct.first_byte(thinks).await?;
                (through.first_byte(thinks).await?, b)
            };
            if round >= WARM {
                own.push(a);
                plain.push(b);
                added.push(a - b);
            }
        }
        let base = table.own(
            format!("first byte through the gateway, {what}"),
            Unit::Ms,
            own,
            "",
        );
        table.rival(
            "the same request to the upstream itself",
            Unit::Ms,
            plain,
            base,
        );
        table.own(
            "what the gateway adds, request by request",
            Unit::Ms,
            added,
            aim,
        );
    }
    table.note(
        "While a model thinks the reservation reaches the disk: that time is nobody's. Where an answer comes at once \
         the first byte waits for it, so that whatever was answered is written down.",
    );
    Ok(table)
}

/// One kept connection.
struct Caller {
    sender: SendRequest<Full<Bytes>>,
    token: String,
    body: Bytes,
}

impl Caller {
    async fn connect(port: u16, token: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let body = format!(
            r#"{{"model":"claude-opus-5","max_tokens":32000,"stream":true,"messages":["{}"]}}"#,
            "x".repeat(BODY)
        );
        Ok(Self {
            sender,
            token: token.to_owned(),
            body: body.into(),
        })
    }

    /// Milliseconds from the request to the first byte of its answer's body.
    async fn first_byte(&mut self, thinks: Duration) -> anyhow::Result<f64> {
        let request = Request::post(format!("/v1/messages?thinks={}", thinks.as_millis()))
            .header(header::HOST, "localhost")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(self.body.clone()))?;
        let call = async {
            self.sender.ready().await?;
            let asked = Instant::now();
            let mut answer = self.sender.send_request(request).await?.into_body();
            let first = answer.frame().await.context("an answer without a body")??;
            let took = asked.elapsed().as_secs_f64() * 1e3;
            ensure!(
                first
                    .into_data()
                    .is_ok_and(|data| data.starts_with(b"event: message_start"))
            );
            answer.collect().await?;
            Ok(took)
        };
        tokio::time::timeout(CALL, call).await?
    }
}

/// What stands for the model's API.
async fn upstream() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).ok();
            let serve =
                http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
            tokio::spawn(serve);
        }
    });
    Ok(port)
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let thinks = request
        .uri()
        .query()
        .and_then(|query| query.strip_prefix("thinks="));
    let thinks = thinks.and_then(|milliseconds| milliseconds.parse().ok());
    // It is read before it is thought about.
    request.into_body().collect().await.ok();
    tokio::time::sleep(Duration::from_millis(thinks.unwrap_or(0))).await;
    let mut answer = Response::new(Full::from(ANSWER));
    let stream = header::HeaderValue::from_static("text/event-stream");
    answer.headers_mut().insert(header::CONTENT_TYPE, stream);
    Ok(answer)
}

/// The process of [`measure`]: the library's gateway, as the program starts it.
pub(crate) fn serve(args: &[String]) -> anyhow::Result<()> {
    let [upstream, workspace] = args else {
        anyhow::bail!("which upstream, and where to?");
    };
    std::fs::create_dir_all(workspace)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let tasks = Tasks::new();
        let settings = LedgerSettings {
            workspace: Some(Path::new(workspace).to_owned()),
            ..LedgerSettings::default()
        };
        let config = GatewayConfig {
            upstream: format!("http://127.0.0.1:{upstream}").parse()?,
            credential: Credential::ApiKey(Secret::new("sk-of-nobody".to_owned())),
            oauth: OAuthSettings::default(),
            ledger: Ledger::new(settings, &tasks),
        };
        let gateway = Gateway::start(config, &tasks).await?;
        let token = gateway.issue();
        let _run = token.begin(Account {
            client: Some("acme".parse()?),
            user: Some("alice".parse()?),
            ..Account::of_kind(Account::TURN)
        });
        println!("{} {}", gateway.port(), token.as_str());
        // Until it is ended.
        std::future::pending::<()>().await;
        Ok(())
    })
}
