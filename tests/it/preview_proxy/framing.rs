//! Requests of which two readers may read different things: each is refused, or reaches the site as
//! exactly one request. Both sides are raw bytes.

use super::*;

/// What a case may come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Refused,
    Once,
    /// Either is right (RFC 9112 leaves it open).
    RefusedOrOnce,
}
use Fate::{Once, Refused, RefusedOrOnce};

/// A site that notes what reaches it on each connection, and answers each whole request.
struct Origin(Arc<Mutex<Vec<Vec<u8>>>>);

impl Origin {
    async fn before(bench: &Bench) -> Self {
        let all: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let noted = all.clone();
        bench
            .upstream(A, move |stream| note_and_answer(stream, noted.clone()))
            .await;
        Self(all)
    }

    /// The whole requests that came, by a strict reader; what it can't read fails the test. One
    /// that was cut off is none.
    fn requests(&self) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        for bytes in self.0.lock().unwrap().iter_mut().map(std::mem::take) {
            let mut rest = &bytes[..];
            while let Some(length) = first_request(rest) {
                found.push(rest[..length].to_vec());
                rest = &rest[length..];
            }
        }
        found
    }
}

async fn note_and_answer(mut stream: TcpStream, noted: Arc<Mutex<Vec<Vec<u8>>>>) {
    let number = {
        let mut noted = noted.lock().unwrap();
        noted.push(Vec::new());
        noted.len() - 1
    };
    let mut buffer = vec![0; 65536];
    let mut unanswered = Vec::new();
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        noted.lock().unwrap()[number].extend(&buffer[..length]);
        unanswered.extend(&buffer[..length]);
        while let Some(length) = first_request(&unanswered) {
            unanswered.drain(..length);
            let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
            stream.write_all(answer.as_bytes()).await.ok();
        }
    }
}

/// The length of the first request, if there is a whole one; what is none fails the test.
fn first_request(bytes: &[u8]) -> Option<usize> {
    let read = request_length(bytes);
    read.unwrap_or_else(|why| panic!("{why}: {:?}", String::from_utf8_lossy(bytes)))
}

/// The same by RFC 9112 without any tolerance.
fn request_length(bytes: &[u8]) -> Result<Option<usize>, &'static str> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let end = end + 4;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| "no text")?;
    let head = head.to_ascii_lowercase();
    let mut lines = head.trim_end().split("\r\n");
    let line: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    if line.len() != 3 || line[2] != "http/1.1" {
        return Err("no request line");
    }
    let fields = lines.map(|line| line.split_once(": "));
    let fields: Option<Vec<(&str, &str)>> = fields.collect();
    let fields = fields.ok_or("a field without a colon")?;
    let is_odd = |byte: u8| byte < b' ' || byte == 127;
    if fields
        .iter()
        .any(|(name, value)| name.contains([' ', '(', '\t']) || value.bytes().any(is_odd))
    {
        return Err("an odd field");
    }
    let all = |name: &str| -> Vec<&str> {
        let named = fields.iter().filter(|(other, _)| *other == name);
        named.map(|(_, value)| *value).collect()
    };
    if all("host").len() != 1 {
        return Err("not one host");
    }
    match (
        all("content-length").as_slice(),
        all("transfer-encoding").as_slice(),
    ) {
        ([], []) => Ok(Some(end)),
        ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
            let whole = end + length.parse::<usize>().map_err(|_| "no length")?;
            Ok((bytes.len() >= whole).then_some(whole))
        }
        ([], ["chunked"]) => chunked_length(bytes, end),
        _ => Err("an unclear length"),
    }
}

fn chunked_length(bytes: &[u8], mut at: usize) -> Result<Option<usize>, &'static str> {
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(line) = rest.windows(2).position(|two| two == b"\r\n") else {
            return Ok(None);
        };
        let size = std::str::from_utf8(&rest[..line]).map_err(|_| "no size")?;
        let size = usize::from_str_radix(size, 16).map_err(|_| "no size")?;
        at += line + 2 + size;
        match bytes.get(at..at + 2) {
            None => return Ok(None),
            Some(b"\r\n") if size == 0 => return Ok(Some(at + 2)),
            Some(b"\r\n") => at += 2,
            Some(_) => return Err("a chunk without an end"),
        }
    }
}

/// Sends bytes, and what came back: the statuses in their order. As many as `expected` are waited for as
/// long as a busy machine needs.
async fn exchange(bench: &Bench, bytes: &[u8], expected: usize) -> Vec<u16> {
    let mut client = bench.connect().await.0;
    // One that was refused early may be gone before all is sent.
    timeout(SOON, client.write_all(bytes)).await.unwrap().ok();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let statuses = |answer: &[u8]| -> Vec<u16> {
        let answer = String::from_utf8_lossy(answer);
        let answers = answer.split("HTTP/1.1 ").skip(1);
        let statuses = answers.filter_map(|answer| answer.get(..3)?.parse().ok());
        statuses.filter(|status| *status >= 200).collect()
    };
    loop {
        // A proxy that waits for more says nothing: that is the end too.
        let silence = match statuses(&answer).len() < expected {
            true => SOON,
            false => Duration::from_millis(600),
        };
        match timeout(silence, client.read(&mut buffer)).await {
            Ok(Ok(length @ 1..)) => answer.extend(&buffer[..length]),
            _ => return statuses(&answer),
        }
    }
}

async fn check(cases: &[(&str, String, Fate)]) {
    let bench = Bench::new().await;
    let origin = Origin::before(&bench).await;
    for (name, request, fate) in cases {
        let expected = usize::from(*fate == Once);
        let statuses = exchange(&bench, request.as_bytes(), expected).await;
        let reached = origin.requests();
        let shown: Vec<_> = reached.iter().map(|r| String::from_utf8_lossy(r)).collect();
        // What a peer sent beyond its request makes the kernel reset the connection as it is
        // closed: then no status is seen.
        let is_refused = reached.is_empty()
            && (statuses.is_empty() || (400..500).contains(&statuses[0]) && statuses.len() == 1);
        let is_once = reached.len() == 1 && statuses.first().is_none_or(|status| *status == 200);
        let is_right = match fate {
            Refused => is_refused,
            Once => is_once,
            RefusedOrOnce => is_refused || is_once,
        };
        assert!(
            is_right,
            "{name}: {fate:?}, not {statuses:?} with {shown:?}"
        );
    }
}

/// A request with these fields and this body; the last on its connection.
fn post(fields: &str, body: &str) -> String {
    format!("POST /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n{body}")
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test]
async fn lengths_and_codings_that_disagree() {
    let hidden = format!("0\r\n\r\n{SMUGGLED}");
    let with = |field: &str, body: &str| post(&format!("{field}\r\n"), body);
    check(&[
        ("CL.TE", with(&format!("Content-Length: {}\r\nTransfer-Encoding: chunked", hidden.len()), &hidden), RefusedOrOnce),
        ("TE.CL", with("Transfer-Encoding: chunked\r\nContent-Length: 4", &hidden), RefusedOrOnce),
        ("two lengths", with("Content-Length: 5\r\nContent-Length: 6", "abcdef"), Refused),
        ("two equal lengths", with("Content-Length: 5\r\nContent-Length: 5", "abcde"), RefusedOrOnce),
        ("a list of lengths", with("Content-Length: 5, 5", "abcde"), RefusedOrOnce),
        ("+5", with("Content-Length: +5", "abcde"), Refused),
        ("-1", with("Content-Length: -1", "abcde"), Refused),
        ("spaces around", with("Content-Length:   5  ", "abcde"), RefusedOrOnce),
        ("0x5", with("Content-Length: 0x5", "abcde"), Refused),
        ("5 5", with("Content-Length: 5 5", "abcde"), Refused),
        ("no number", with("Content-Length: ", "abcde"), Refused),
        ("huge", with("Content-Length: 99999999999999999999999", "abcde"), Refused),
        ("chunked, identity", with("Transfer-Encoding: chunked, identity", &hidden), Refused),
        ("xchunked", with("Transfer-Encoding: xchunked", &hidden), Refused),
        ("tab before chunked", with("Transfer-Encoding:\tchunked", "0\r\n\r\n"), RefusedOrOnce),
        ("vertical tab", with("Transfer-Encoding: \u{b}chunked", &hidden), Refused),
        ("chunked twice", with("Transfer-Encoding: chunked, chunked", &hidden), RefusedOrOnce),
        ("two codings", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", &hidden), Refused),
        ("space before the colon", with("Transfer-Encoding : chunked", &hidden), Refused),
        ("1.0 with a coding", format!("POST /a HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{hidden}"), RefusedOrOnce),
        ("length and no body", with("Content-Length: 0", ""), Once),
        ("a body on GET", "GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nabcde".to_owned(), Once),
    ])
    .await;
}

#[tokio::test]
async fn chunks_that_are_none() {
    let chunked = |body: String| post("Transfer-Encoding: chunked\r\n", &body);
    let whole = "5\r\nabcde\r\n0\r\n\r\n";
    check(&[
        ("as it should be", chunked(whole.to_owned()), Once),
        (
            "capital digits",
            chunked(format!("A\r\n0123456789\r\n{whole}")),
            Once,
        ),
        ("+5", chunked(format!("+{whole}")), RefusedOrOnce),
        ("0x5", chunked(format!("0x{whole}")), RefusedOrOnce),
        (
            "17 digits",
            chunked(format!("0000000000000000{whole}")),
            RefusedOrOnce,
        ),
        (
            "17 digits that count",
            chunked("10000000000000005\r\nabcde\r\n0\r\n\r\n".to_owned()),
            RefusedOrOnce,
        ),
        (
            "a bare LF after the size",
            chunked("5\nabcde\r\n0\r\n\r\n".to_owned()),
            RefusedOrOnce,
        ),
        (
            "a bare LF in an extension",
            chunked(format!("5;a\n{SMUGGLED}\r\nabcde\r\n0\r\n\r\n")),
            RefusedOrOnce,
        ),
        (
            "an extension of 64 kB",
            chunked(format!("5;{}\r\nabcde\r\n0\r\n\r\n", "x".repeat(65536))),
            RefusedOrOnce,
        ),
        (
            "no CRLF after the data",
            chunked("5\r\nabcde0\r\n\r\n".to_owned()),
            RefusedOrOnce,
        ),
        (
            "trailers",
            chunked("5\r\nabcde\r\n0\r\nContent-Length: 9\r\nX: y\r\n\r\n".to_owned()),
            RefusedOrOnce,
        ),
    ])
    .await;
}

#[tokio::test]
async fn heads_that_are_none() {
    let get = |line: &str, fields: &str| format!("{line}\r\n{fields}Connection: close\r\n\r\n");
    let host = "Host: localhost\r\n";
    let field = |field: &str| get("GET /a HTTP/1.1", &format!("{host}{field}"));
    check(&[
        ("as it should be", get("GET /a HTTP/1.1", host), Once),
        ("a bare CR in a value", field("X: a\rTransfer-Encoding: chunked\r\n"), Refused),
        ("a folded line", field("X: a\r\n b: c\r\n"), Refused),
        ("a folded coding", field("X: a\r\n Transfer-Encoding: chunked\r\n"), Refused),
        ("space before the colon", field("X : a\r\n"), Refused),
        ("NUL", field("X: a\0b\r\n"), Refused),
        ("a name with a bracket", field("X(: a\r\n"), Refused),
        ("no name", field(": a\r\n"), Refused),
        ("no colon", field("nonsense\r\n"), Refused),
        ("no host", get("GET /a HTTP/1.1", ""), Refused),
        ("an empty host", get("GET /a HTTP/1.1", "Host:\r\n"), Refused),
        ("two hosts", get("GET /a HTTP/1.1", "Host: localhost\r\nHost: other\r\n"), Refused),
        ("two equal hosts", get("GET /a HTTP/1.1", "Host: localhost\r\nHost: localhost\r\n"), Refused),
        ("another host in the target", get("GET http://other/ HTTP/1.1", host), Refused),
        ("the same host in the target", get("GET http://localhost/ HTTP/1.1", host), Once),
        ("CONNECT", get("CONNECT other:443 HTTP/1.1", "Host: other:443\r\n"), Refused),
        ("a fragment", get("GET /a#/../b HTTP/1.1", host), RefusedOrOnce),
        ("NUL in the target", get("GET /a%00 HTTP/1.1", host), Refused),
        ("a space in the target", get("GET /a b HTTP/1.1", host), Refused),
        ("no version", get("GET /a", host), Refused),
        ("another version", get("GET /a HTTP/1.2", host), Refused),
        ("HTTP/2's first line", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), Refused),
        ("a line of 64 kB", get(&format!("GET /{} HTTP/1.1", "x".repeat(65536)), host), Refused),
        ("a field of 64 kB", field(&format!("X: {}\r\n", "x".repeat(65536))), Refused),
        ("1,000 fields", field(&"X: y\r\n".repeat(1000)), Refused),
        ("empty lines first", format!("\r\n\r\n{}", get("GET /a HTTP/1.1", host)), RefusedOrOnce),
        ("bare LFs", "GET /a HTTP/1.1\nHost: localhost\nConnection: close\n\n".to_owned(), RefusedOrOnce),
        ("h2c", field("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), Once),
        ("an expectation", format!("POST /a HTTP/1.1\r\n{host}Connection: close\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nabcde"), RefusedOrOnce),
    ])
    .await;
}

#[tokio::test]
async fn what_follows_an_error_is_not_read() {
    let bench = Bench::new().await;
    let origin = Origin::before(&bench).await;
    let bad = "POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n";
    let statuses = exchange(&bench, format!("{bad}{SMUGGLED}").as_bytes(), 1).await;
    assert!(matches!(statuses.as_slice(), [] | [400]), "{statuses:?}");
    assert_eq!(origin.requests().len(), 0);

    // Two that are right are two.
    let good = "GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let statuses = exchange(&bench, format!("{good}{SMUGGLED}").as_bytes(), 2).await;
    assert_eq!(statuses, [200, 200]);
    assert_eq!(origin.requests().len(), 2);

    // A handshake that the site answers as any request makes no tunnel.
    let handshake = "GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Version: 7\r\nSec-WebSocket-Key: x\r\n\r\n";
    exchange(&bench, format!("{handshake}{SMUGGLED}").as_bytes(), 1).await;
    for request in origin.requests() {
        let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
        assert!(head.contains("host: localhost"), "{head}");
    }
}

#[tokio::test]
async fn a_body_that_never_comes_is_not_waited_for() {
    let bench = Bench::new().await;
    let _origin = Origin::before(&bench).await;
    let mut client = bench.connect().await;
    client
        .send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
        .await;
    // 30 s without a byte.
    let mut answer = Vec::new();
    let read = client.0.read_to_end(&mut answer);
    timeout(SOON * 3, read).await.expect("it is over").ok();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    eventually("nobody is served any more", || {
        bench.seen.in_flight.load(Ordering::SeqCst) == 0
    })
    .await;
}
