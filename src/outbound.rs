//! Requests that leave the container: how their client is built, and when one is sent again.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use jiff::{Timestamp, fmt::rfc2822};
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, redirect};
use url::{Host, Url};

/// A longer wish of the server's than this is not waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a client for one address is built: it follows no redirect (a credential would go along),
/// takes the platform's proxies (`HTTPS_PROXY` and the like) and certificates, and neither for an
/// address of this machine.
///
/// Reading certificates is slow and blocks: build it on a thread of [`crate::task::blocking`] where
/// others wait for this one. A client for `http:` knows no certificates and refuses `https:`, a
/// proxy's too.
pub fn client_builder(to: &Url) -> ClientBuilder {
    // An error means that it is installed already.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let mut builder = Client::builder()
        .redirect(redirect::Policy::none())
        .referer(false)
        .tcp_nodelay(true);
    if is_loopback(to) {
        builder = builder.no_proxy();
    }
    if to.scheme() == "http" {
        builder = builder.tls_certs_only([]);
    }
    builder
}

/// Whether an address is of this machine.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.to_canonical().is_loopback(),
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

/// What sending a request twice would mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Twice {
    /// The same as once: it is sent again whenever that may help.
    Same,
    /// Something more, such as another bill: it is sent again only if the server cannot have begun
    /// with it, because nobody was reached, or because it says that there were too many (429).
    More,
}

/// Sends a request until the answer is one that sending it again would not change, at most once more
/// than there are pauses. The server's own wish for a pause (`Retry-After`) counts where it is the
/// longer one; beyond a minute it is answered as it is. `build` makes the request anew each time.
///
/// # Errors
/// That of the last try, without the address: it may hold a password.
pub async fn send(
    pauses: &[Duration],
    twice: Twice,
    mut build: impl FnMut() -> RequestBuilder,
) -> Result<Response, reqwest::Error> {
    let mut pauses = pauses.iter();
    loop {
        let result = build().send().await.map_err(reqwest::Error::without_url);
        let wish = match &result {
            Ok(answer) if may_pass(answer.status(), twice) => retry_after(answer.headers()),
            Err(error) if twice == Twice::Same || error.is_connect() => None,
            _ => return result,
        };
        let Some(pause) = pauses.next() else {
            return result;
        };
        let pause = wish.unwrap_or_default().max(*pause);
        if pause > LONGEST_PAUSE {
            return result;
        }
        tokio::time::sleep(pause).await;
    }
}

fn may_pass(status: StatusCode, twice: Twice) -> bool {
    match status {
        StatusCode::TOO_MANY_REQUESTS => true,
        StatusCode::REQUEST_TIMEOUT => twice == Twice::Same,
        // What is not there will not be there soon.
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => false,
        other => other.is_server_error() && twice == Twice::Same,
    }
}

/// The pause that `Retry-After` asks for: seconds, or until a date (RFC 9110, section 10.2.3).
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = rfc2822::parse(value).ok()?.timestamp();
    Duration::try_from(until - Timestamp::now()).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const PAUSES: [Duration; 2] = [Duration::ZERO; 2];

    /// Gives each connection the next answer, the last one for ever; how often it was asked, and the
    /// status in the end.
    async fn asked(answers: &'static [&str], twice: Twice) -> (usize, Option<u16>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url: Url = format!("http://{}", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let count = AtomicUsize::new(0);
        let serve = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let index = count.fetch_add(1, Ordering::Relaxed);
                let mut request = [0; 4096];
                let _read = stream.read(&mut request).await.unwrap();
                let answer = answers[index.min(answers.len() - 1)];
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let client = client_builder(&url).build().unwrap();
        let result = tokio::select! {
            () = serve => unreachable!(),
            result = send(&PAUSES, twice, || client.post(url.clone())) => result,
        };
        let status = result.ok().map(|answer| answer.status().as_u16());
        (count.load(Ordering::Relaxed), status)
    }

    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const DOWN: &str = "HTTP/1.1 502 Bad\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const MANY: &str = "HTTP/1.1 429 Many\r\nretry-after: 0\r\ncontent-length: 0\r\n\
         connection: close\r\n\r\n";
    const LATER: &str = "HTTP/1.1 429 Many\r\nretry-after: 3600\r\ncontent-length: 0\r\n\
         connection: close\r\n\r\n";
    const REFUSED: &str = "HTTP/1.1 401 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const CUT_OFF: &str = "HTTP/1.1 20";

    #[tokio::test]
    async fn what_may_pass_is_tried_again() {
        assert_eq!(
            asked(&[DOWN, CUT_OFF, OK], Twice::Same).await,
            (3, Some(200))
        );
        assert_eq!(asked(&[DOWN], Twice::Same).await, (3, Some(502)));
        assert_eq!(asked(&[REFUSED, OK], Twice::Same).await, (1, Some(401)));
        assert_eq!(asked(&[LATER, OK], Twice::Same).await, (1, Some(429)));
    }

    #[tokio::test]
    async fn what_may_have_begun_is_not_sent_twice() {
        assert_eq!(asked(&[MANY, OK], Twice::More).await, (2, Some(200)));
        assert_eq!(asked(&[DOWN, OK], Twice::More).await, (1, Some(502)));
        assert_eq!(asked(&[CUT_OFF, OK], Twice::More).await, (1, None));
    }

    #[test]
    fn a_servers_wish_is_read_in_both_spellings() {
        let wish = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("Wed, 21 Oct 2015 07:28:00 GMT"), None, "past already");
        let soon = wish("Fri, 31 Dec 2100 23:59:59 GMT");
        assert!(soon.is_some_and(|pause| pause > LONGEST_PAUSE), "{soon:?}");
        assert_eq!(wish("soon"), None);
    }

    #[test]
    fn loopback_is_told_from_elsewhere() {
        for (url, local) in [
            ("http://127.0.0.1:1", true),
            ("http://[::1]:1", true),
            ("http://localhost:1", true),
            ("http://localhost.example.com", false),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(is_loopback(&url.parse().unwrap()), local, "{url}");
        }
    }
}
