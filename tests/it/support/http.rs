//! A plain HTTP/1.1 client: one connection a request, every header as the test wants it.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

use super::PATIENCE;

/// A request to be sent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sent {
    pub(crate) method: String,
    pub(crate) path: String,
    /// They replace the defaults (`Host`, and `Content-Type` where there is a body); an empty
    /// value leaves a default out.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Sent {
    /// With a body of JSON; `Value::Null` is no body.
    pub(crate) fn new(method: &str, path: &str, body: &Value) -> Self {
        let body = match body {
            Value::Null => Vec::new(),
            body => body.to_string().into_bytes(),
        };
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            body,
        }
    }

    /// With one more header.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers
            .push((name.to_ascii_lowercase(), value.to_owned()));
        self
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
    /// `Null` where the text is no JSON.
    pub(crate) body: Value,
}

impl Answer {
    /// The body of a success.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert!(
            (200..300).contains(&self.status),
            "{}: {}",
            self.status,
            self.text
        );
        assert_eq!(self.body["success"], true, "{}", self.text);
        self.body
    }

    /// Checks the status alone.
    #[track_caller]
    pub(crate) fn status_is(self, status: u16) {
        assert_eq!(self.status, status, "{}", self.text);
    }

    /// Checks the shape of an error; answers its sentence.
    #[track_caller]
    pub(crate) fn error(self, status: u16, code: &str) -> String {
        let body = &self.body;
        assert_eq!(
            (self.status, body["code"].as_str()),
            (status, Some(code)),
            "{}",
            self.text
        );
        assert_eq!(body["success"], false, "{}", self.text);
        assert!(
            body["requestId"].as_str().is_some_and(|id| !id.is_empty()),
            "{}",
            self.text
        );
        let sentence = body["error"].as_str().unwrap_or_default().to_owned();
        assert!(
            sentence.len() > 10 && !sentence.contains('\n'),
            "{}",
            self.text
        );
        sentence
    }
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

async fn open(address: SocketAddr, sent: Sent) -> std::io::Result<Response<Incoming>> {
    let socket = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
        .await
        .map_err(std::io::Error::other)?;
    #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
    tokio::spawn(connection);
    let mut headers = vec![("host".to_owned(), format!("localhost:{}", address.port()))];
    if !sent.body.is_empty() {
        headers.push(("content-type".to_owned(), "application/json".to_owned()));
    }
    headers.retain(|(name, _)| sent.headers.iter().all(|(other, _)| other != name));
    headers.extend(
        sent.headers
            .into_iter()
            .filter(|(_, value)| !value.is_empty()),
    );
    let mut request = Request::builder()
        .method(sent.method.as_str())
        .uri(&sent.path);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request
        .body(Full::new(Bytes::from(sent.body)))
        .expect("a well-formed request");
    sender
        .send_request(request)
        .await
        .map_err(std::io::Error::other)
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// Where there is no connection, or it breaks off.
pub(crate) async fn request(port: u16, sent: Sent) -> std::io::Result<Answer> {
    request_at(loopback(port), sent).await
}

/// The same by another address of this machine.
pub(crate) async fn request_at(address: SocketAddr, sent: Sent) -> std::io::Result<Answer> {
    let what = format!("{} {}", sent.method, sent.path);
    let call = async {
        let (head, body) = open(address, sent).await?.into_parts();
        let bytes = body
            .collect()
            .await
            .map_err(std::io::Error::other)?
            .to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let body = serde_json::from_str(&text).unwrap_or_default();
        Ok(Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            text,
            body,
        })
    };
    timeout(PATIENCE, call)
        .await
        .unwrap_or_else(|_| panic!("no answer to {what}"))
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ServerEvent {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// A stream of server-sent events that is being read.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    buffer: String,
}

/// Opens a stream of events.
pub(crate) async fn stream(port: u16, sent: Sent) -> Events {
    try_stream(port, sent).await.unwrap()
}

/// The same of a program that may be gone before it answers.
///
/// # Errors
/// Where there is no connection, or it breaks off before the stream begins.
pub(crate) async fn try_stream(port: u16, sent: Sent) -> std::io::Result<Events> {
    let sent = sent.header("accept", "text/event-stream");
    let response = timeout(PATIENCE, open(loopback(port), sent))
        .await
        .expect("an answer")?;
    assert_eq!(response.status(), 200);
    let kind = response.headers()["content-type"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(kind.starts_with("text/event-stream"), "{kind}");
    Ok(Events {
        body: response.into_body(),
        buffer: String::new(),
    })
}

impl Events {
    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<ServerEvent> {
        timeout(PATIENCE, self.read()).await.expect("another event")
    }

    async fn read(&mut self) -> Option<ServerEvent> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..end + 2).collect();
                match parse(&block) {
                    Some(event) => return Some(event),
                    // A comment that keeps the connection open.
                    None => continue,
                }
            }
            let frame = self.body.frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.buffer
                    .push_str(std::str::from_utf8(&data).expect("split at events"));
            }
        }
    }

    /// The next event of this name.
    pub(crate) async fn until(&mut self, name: &str) -> ServerEvent {
        loop {
            let event = self
                .next()
                .await
                .unwrap_or_else(|| panic!("no {name} in the stream"));
            if event.name == name {
                return event;
            }
        }
    }

    /// Everything up to the end.
    pub(crate) async fn all(mut self) -> Vec<ServerEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

fn parse(block: &str) -> Option<ServerEvent> {
    let field = |name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.strip_prefix(' ').unwrap_or(line).to_owned())
    };
    Some(ServerEvent {
        id: field("id:")?.parse().expect("an id is a number"),
        name: field("event:")?,
        data: serde_json::from_str(&field("data:")?).expect("data is JSON"),
    })
}
