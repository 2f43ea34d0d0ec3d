//! The dev server's own word: greenroom listens on its HMR socket as a browser would.
//!
//! Measured with Vite 6.4 and 8.3: without an `Origin` no token is asked for; the subprotocol has
//! to be `vite-hmr` alone; errors come after the request that met them, up to 0.3 s late; and a
//! server that somebody listens to keeps nothing for those who come later, which is why the proxy
//! tells them the last error (see [`replay`]).

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, header::SEC_WEBSOCKET_PROTOCOL};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::{interval, sleep, timeout},
};
use tokio_tungstenite::tungstenite::{
    Message, client::IntoClientRequest, protocol::WebSocketConfig,
};

use super::{frames::text_frame, notes::Notes, output::place_in};
use crate::{domain::PreviewError, text::cut};

/// A broken configuration makes one message of 17 MB, with the bundler's source in it.
const MAX_MESSAGE: usize = 64 << 20;
/// Longest message of an error that is kept, in bytes.
const MAX_TEXT: usize = 4096;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// As often as Vite's own client.
const PING: Duration = Duration::from_secs(30);
/// Between two tries to connect: a server that restarts itself in place is away for a second.
const AGAIN: Duration = Duration::from_millis(250);

/// Has a page loaded anew by Vite's client.
pub(crate) const RELOAD: &str = r#"{"type":"full-reload","path":"*"}"#;

/// What the server told its browsers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Word {
    /// Something was swapped, or the page is to be loaded anew.
    Updated,
    Error(PreviewError),
    /// The same of what it tells its log alone: a content entry, by its name there.
    Logged(PreviewError),
    /// A content entry is as it should be, by its log.
    Reloaded {
        name: String,
    },
    /// It says nothing of this file, which is broken.
    Unsaid {
        error: PreviewError,
        look: u32,
    },
    /// Somebody hears it from now on, or no more.
    Listening(bool),
    /// It serves this file, which changed, and has said nothing since it had said so many words.
    Silent {
        words: u64,
        file: String,
    },
    /// The same of a file that it had no page of when the file changed, though somebody may be shown
    /// one: it is rightly silent, and the page is old.
    Unaware {
        words: u64,
    },
    /// It has answered, or had the time to, since then.
    StillSilent {
        words: u64,
    },
    /// It can't watch its files: what it shows may be old.
    Blind(PreviewError),
    /// The pages that matter answered, and no error came since the state had this generation.
    Fine {
        generation: u64,
    },
    /// They did not all answer well, by a look of this number.
    StillBroken {
        look: u32,
    },
}

/// Listens until nobody hears it any more.
pub(crate) async fn listen(port: u16, worktree: PathBuf, notes: Notes, words: mpsc::Sender<Word>) {
    loop {
        tokio::select! {
            () = words.closed() => return,
            _ = once(port, &worktree, &notes, &words) => {}
        }
        if words.send(Word::Listening(false)).await.is_err() {
            return;
        }
        sleep(AGAIN).await;
    }
}

/// One connection, to its end.
async fn once(port: u16, worktree: &Path, notes: &Notes, words: &mpsc::Sender<Word>) -> Option<()> {
    let mut request = format!("ws://localhost:{port}/")
        .into_client_request()
        .ok()?;
    request
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("vite-hmr"));
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let connect = async {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
        let socket =
            tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await;
        Some(socket.ok()?.0)
    };
    let mut socket = timeout(HANDSHAKE, connect).await.ok()??;
    let mut pings = interval(PING);
    loop {
        let message = tokio::select! {
            message = socket.next() => message?.ok()?,
            _ = pings.tick() => {
                socket.send(Message::text(r#"{"type":"ping"}"#)).await.ok()?;
                continue;
            }
        };
        if let Message::Text(text) = message
            && let Some(word) = word(&text, worktree)
        {
            // At once, and not when the driver gets to it: a browser that was told the same asks for
            // its page in some milliseconds, and that page is no older than this news.
            if word == Word::Updated {
                notes.note_update();
            }
            words.send(word).await.ok()?;
        }
    }
}

#[derive(Deserialize)]
struct Told {
    #[serde(rename = "type")]
    kind: String,
    err: Option<ViteError>,
}

/// What of it is kept: the code around it and its colouring are megabytes.
#[derive(Deserialize)]
struct ViteError {
    #[serde(default)]
    message: String,
    #[serde(default)]
    stack: String,
    id: Option<String>,
    loc: Option<Location>,
    #[serde(default)]
    hint: String,
}

#[derive(Deserialize)]
struct Location {
    file: Option<String>,
    line: Option<f64>,
    column: Option<f64>,
}

fn word(text: &str, worktree: &Path) -> Option<Word> {
    let told: Told = serde_json::from_str(text).ok()?;
    match told.kind.as_str() {
        "connected" => Some(Word::Listening(true)),
        "update" | "full-reload" | "prune" => Some(Word::Updated),
        "error" => {
            let err = told.err?;
            (!is_of_a_vanished_page(&err)).then(|| Word::Error(error(err, worktree)))
        }
        _ => None,
    }
}

/// Whoever replaces a page writes a file beside it and renames that. Astro may list its pages in
/// between, not find the file any more and report its own rejection (measured with 7.3.5); it lists
/// them once more when it hears of the renaming. No page is broken by that.
fn is_of_a_vanished_page(err: &ViteError) -> bool {
    let words = &err.message;
    words.starts_with("Astro detected an unhandled rejection")
        && words.contains("ENOENT: no such file or directory, stat ")
        && words.contains("/core/routing/create-manifest.js")
}

fn error(err: ViteError, worktree: &Path) -> PreviewError {
    let root = format!("{}/", worktree.display());
    let without_root = |text: &str| text.replace("file://", "").replace(&root, "");
    let ours = |path: &str| {
        let path = without_root(path.split('?').next().unwrap_or(path));
        (!path.starts_with('/') && !path.contains("node_modules/") && !path.is_empty())
            .then_some(path)
    };
    let location = err.loc.as_ref();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a line or column; what is none saturates"
    )]
    let number = |number: Option<f64>| number.filter(|n| *n >= 1.0).map(|n| n as u32);
    let mut found = PreviewError {
        file: location
            .and_then(|at| at.file.as_deref())
            .or(err.id.as_deref())
            .and_then(ours),
        line: number(location.and_then(|at| at.line)),
        column: number(location.and_then(|at| at.column)),
        message: String::new(),
    };
    if found.file.is_none() || found.line.is_none() {
        // A package that is missing has no location, but its stack names who asked for it.
        if let Some((file, line, column)) = place_in(&without_root(&err.stack)) {
            (found.file, found.line, found.column) = (Some(file), Some(line), Some(column));
        }
    }
    let mut message = without_root(err.message.trim());
    if !err.hint.is_empty() {
        message = format!("{message}\n{}", without_root(err.hint.trim()));
    }
    found.message = cut(&message, MAX_TEXT).to_owned();
    found
}

/// The message that Vite would send of an error, as its client shows it.
pub(crate) fn replay(error: &PreviewError) -> String {
    serde_json::json!({"type": "error", "err": {
        "message": error.message,
        "stack": "",
        "id": error.file,
        "loc": {"file": error.file, "line": error.line, "column": error.column},
    }})
    .to_string()
}

/// Carries the server's greeting to a browser, and then `message`: Vite's client takes errors once
/// it is connected. Whatever else comes first is carried as it is, and nothing added: answers
/// whether a message has just ended.
///
/// # Errors
/// If one of the two is gone.
pub(crate) async fn greet(
    up: &mut (impl AsyncRead + Unpin),
    down: &mut (impl AsyncWrite + Unpin),
    message: &str,
) -> std::io::Result<bool> {
    let mut head = [0; 2];
    up.read_exact(&mut head).await?;
    down.write_all(&head).await?;
    // A whole text message, unmasked and short.
    if head[0] != 0x81 || head[1] > 125 {
        down.flush().await?;
        return Ok(false);
    }
    let mut body = vec![0; usize::from(head[1])];
    up.read_exact(&mut body).await?;
    down.write_all(&body).await?;
    if body == br#"{"type":"connected"}"# {
        down.write_all(&text_frame(message)).await?;
    }
    down.flush().await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_places_in_the_site() {
        let root = Path::new("/w/t");
        let told = serde_json::json!({"type": "error", "err": {
            "name": "CompilerError", "message": "Unclosed <div> in /w/t/src/pages/index.astro",
            "stack": "x", "id": "/w/t/src/pages/index.astro?astro&type=script",
            "loc": {"file": "/w/t/src/pages/index.astro", "line": 4, "column": 27},
            "fullCode": "x".repeat(100_000),
        }});
        let Some(Word::Error(error)) = word(&told.to_string(), root) else {
            panic!("an error");
        };
        assert_eq!(error.file.as_deref(), Some("src/pages/index.astro"));
        assert_eq!((error.line, error.column), (Some(4), Some(27)));
        assert_eq!(error.message, "Unclosed <div> in src/pages/index.astro");

        let bare = r#"{"type":"error","err":{"message":"Cannot find module 'x'","loc":{},
            "stack":"Error: x\n at eval (/w/t/src/layouts/Base.astro:3:8)\n at /n/node_modules/a.js:1:1"}}"#;
        let Some(Word::Error(error)) = word(bare, root) else {
            panic!("an error");
        };
        assert_eq!(error.file.as_deref(), Some("src/layouts/Base.astro"));
        assert_eq!(error.line, Some(3));

        assert_eq!(
            word(r#"{"type":"update","updates":[]}"#, root),
            Some(Word::Updated)
        );
        assert_eq!(
            word(r#"{"type":"connected"}"#, root),
            Some(Word::Listening(true))
        );
        assert_eq!(word("nonsense", root), None);

        let rejection = |what: &str, at: &str| {
            let message = format!(
                "Astro detected an unhandled rejection. Here&#39;s the stack trace:\nError: {what}\n    \
                 at Object.statSync (node:fs:1746:25)\n    at walk ({at}:65:20)\nMake sure …"
            );
            serde_json::json!({"type": "error", "err": {"message": message}}).to_string()
        };
        let routes = "/w/t/node_modules/astro/dist/core/routing/create-manifest.js";
        let gone =
            "ENOENT: no such file or directory, stat &#39;/w/t/src/pages/a.astro.tmp.7.8f&#39;";
        assert_eq!(word(&rejection(gone, routes), root), None);
        for broken in [
            rejection(gone, "/w/t/src/pages/a.astro"),
            rejection(
                "EACCES: permission denied, stat &#39;/w/t/src/pages&#39;",
                routes,
            ),
        ] {
            assert!(
                matches!(word(&broken, root), Some(Word::Error(_))),
                "{broken}"
            );
        }
    }

    #[tokio::test]
    async fn a_late_browser_is_told_after_the_greeting() {
        let greeting = br#"{"type":"connected"}"#;
        let mut up = vec![0x81, u8::try_from(greeting.len()).unwrap()];
        up.extend(greeting);
        let plain = up.clone();
        up.extend(b"rest");
        let message = replay(&PreviewError {
            message: "y".repeat(300),
            ..PreviewError::default()
        });
        let (mut source, mut down) = (up.as_slice(), Vec::new());
        greet(&mut source, &mut down, &message).await.unwrap();
        assert_eq!(source, b"rest", "the rest is for the tunnel");
        let (first, second) = down.split_at(plain.len());
        assert_eq!(first, plain);
        assert_eq!(second[..2], [0x81, 126]);
        assert_eq!(&second[4..], message.as_bytes());

        let other = [0x82, 3, 1, 2, 3];
        let (mut source, mut down) = (other.as_slice(), Vec::new());
        greet(&mut source, &mut down, &message).await.unwrap();
        assert_eq!((down.as_slice(), source), (&other[..2], &other[2..]));
    }
}
