//! One request to the Messages API, over plain HTTP.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

/// What a failed connection counts as.
const UNREACHABLE: u64 = 502;

/// What the model says; the status where it is no success.
pub(crate) fn ask(model: &str, session: &str, words: &str) -> Result<String, u64> {
    let answer = send(model, session, words).map_err(|_| UNREACHABLE)?;
    if answer.0 != 200 {
        return Err(answer.0);
    }
    let mut text = String::new();
    for line in answer.1.lines() {
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        let event: Value = serde_json::from_str(data).map_err(|_| UNREACHABLE)?;
        text.push_str(event["delta"]["text"].as_str().unwrap_or_default());
    }
    Ok(text)
}

fn send(model: &str, session: &str, words: &str) -> std::io::Result<(u64, String)> {
    let base = env::var("ANTHROPIC_BASE_URL").unwrap_or_default();
    let token = env::var("ANTHROPIC_AUTH_TOKEN").unwrap_or_default();
    let host = base.trim_start_matches("http://").trim_end_matches('/');
    let body = json!({"model": model, "stream": true, "max_tokens": 128_000,
        "messages": [{"role": "user", "content": [{"type": "text", "text": words}]}]})
    .to_string();
    let mut stream = TcpStream::connect(host)?;
    write!(
        stream,
        "POST /v1/messages?beta=true HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\
         anthropic-version: 2023-06-01\r\ncontent-type: application/json\r\n\
         x-claude-code-session-id: {session}\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let mut is_chunked = false;
    loop {
        line.clear();
        answer.read_line(&mut line)?;
        let header = line.trim().to_ascii_lowercase();
        is_chunked |= header == "transfer-encoding: chunked";
        if header.is_empty() {
            break;
        }
    }
    let mut body = Vec::new();
    if is_chunked {
        loop {
            line.clear();
            answer.read_line(&mut line)?;
            let size = u64::from_str_radix(line.trim(), 16).unwrap_or_default();
            if size == 0 {
                break;
            }
            (&mut answer).take(size).read_to_end(&mut body)?;
            answer.read_line(&mut line)?;
        }
    } else {
        answer.read_to_end(&mut body)?;
    }
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok((status.unwrap_or(UNREACHABLE), body))
}
