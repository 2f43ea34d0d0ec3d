//! `greenroom health`: asks the running supervisor, for a container's HEALTHCHECK.
//!
//! One small HTTP/1.1 request by hand: the probe runs every few seconds in a container of few
//! resources, and a client with TLS and a runtime would cost more than the answer.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::config::{self, Loaded};

/// For the whole exchange: the answer takes less than 100 ms whatever else goes on.
const PATIENCE: Duration = Duration::from_secs(2);
/// The answer is a few hundred bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Prints how the supervisor is; an error unless it answers 200.
pub(super) fn run(loaded: &Loaded, json: bool) -> anyhow::Result<()> {
    let settings = &loaded.settings;
    ensure!(
        settings.api_port != 0,
        "API_PORT is 0: the port that the supervisor picked is not known here"
    );
    let address = SocketAddr::new(config::reachable(settings.bind), settings.api_port);
    let answer = ask(address).with_context(|| format!("no answer from {address}"))?;
    if json {
        super::print(&answer.body)?;
    }
    if answer.status != 200 {
        bail!("unhealthy: {address} answered {}", answer.status);
    }
    if !json {
        super::print("healthy")?;
    }
    Ok(())
}

struct Answer {
    status: u16,
    body: String,
}

fn ask(address: SocketAddr) -> anyhow::Result<Answer> {
    let deadline = Instant::now() + PATIENCE;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout of zero would mean none.
        left.max(Duration::from_millis(1))
    };
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_write_timeout(Some(left()))?;
    let request = format!("GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut received = Vec::new();
    let mut chunk = [0; 4096];
    while !is_whole(&received) {
        ensure!(Instant::now() < deadline, "it takes too long");
        ensure!(received.len() < MAX_ANSWER_BYTES, "too much of it");
        stream.set_read_timeout(Some(left()))?;
        match stream.read(&mut chunk)? {
            0 => break,
            n => received.extend_from_slice(&chunk[..n]),
        }
    }
    parse(&received).context("it is not HTTP")
}

/// Whether the body is as long as the head says; without a length the connection's end tells.
fn is_whole(received: &[u8]) -> bool {
    split_head(received).is_some_and(|(head, body)| {
        content_length(&head).is_some_and(|length| body.len() >= length)
    })
}

fn split_head(received: &[u8]) -> Option<(String, &[u8])> {
    let end = received.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&received[..end]).into_owned();
    Some((head, &received[end + 4..]))
}

fn content_length(head: &str) -> Option<usize> {
    head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            value.trim().parse().ok()
        } else {
            None
        }
    })
}

fn parse(received: &[u8]) -> Option<Answer> {
    let (head, body) = split_head(received)?;
    let rest = head.strip_prefix("HTTP/1.")?;
    let status = rest.split(' ').nth(1)?.parse().ok()?;
    let body = &body[..content_length(&head).map_or(body.len(), |length| length.min(body.len()))];
    Some(Answer {
        status,
        body: String::from_utf8_lossy(body).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// Answers one request in pieces, and holds the connection until the client goes.
    fn served(pieces: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let n = stream.read(&mut request).unwrap();
            assert!(request[..n].starts_with(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:"));
            for piece in pieces {
                stream.write_all(piece.as_bytes()).unwrap();
            }
            if !pieces.is_empty() {
                let _gone = stream.read(&mut request);
            }
        });
        address
    }

    #[test]
    fn the_status_and_body_are_read_to_their_length() {
        let answer = ask(served(&[
            "HTTP/1.1 200 OK\r\ncontent-",
            "Length: 2\r\n\r\n{",
            "}junk",
        ]));
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "{}"));
        let draining = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(parse(draining.as_bytes()).unwrap().status, 503);
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        assert!(ask(served(&[])).is_err(), "closed at once");
        for junk in [
            "",
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1 200 OK\r\n",
        ] {
            assert!(parse(junk.as_bytes()).is_none(), "{junk:?}");
        }
    }

    #[test]
    fn a_silent_listener_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let start = Instant::now();
        assert!(ask(listener.local_addr().unwrap()).is_err());
        assert!(start.elapsed() < PATIENCE * 5);
    }
}
