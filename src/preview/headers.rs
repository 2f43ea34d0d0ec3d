//! Header rules of the proxy, pure: what is passed on, what is added, what a request wants.

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{
        ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH,
        CONTENT_RANGE, CONTENT_TYPE, COOKIE, DATE, ETAG, HOST, LOCATION, ORIGIN, RANGE,
        SEC_WEBSOCKET_PROTOCOL, SET_COOKIE, TRANSFER_ENCODING, UPGRADE,
    },
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Fields that a request to the dev server has besides the browser's: `Host` and these three.
const OF_OURS: usize = 4;
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// Removes what belongs to the connection that a message came by.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    for name in hop_by_hop(headers) {
        headers.remove(name);
    }
}

/// What belongs to one connection (RFC 9110 7.6.1): the known fields, and those that `Connection`
/// names. Fields that are meant for everybody stay even when it names them: with
/// `Connection: Host, Cookie` a sender would have us forward another request than its own.
fn hop_by_hop(headers: &HeaderMap) -> Vec<HeaderName> {
    let mut gone = Vec::new();
    for (name, value) in headers {
        if !is_hop_by_hop(name) {
            continue;
        }
        gone.push(name.clone());
        // What most say is no list of names.
        if *name == CONNECTION && value != "keep-alive" {
            let named = words(value)
                .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
                .filter(|name| !is_end_to_end(name));
            gone.extend(named);
        }
        // Framing is hyper's to choose. Where both lengths came, only the coding counted (9112 6.3).
        if *name == TRANSFER_ENCODING {
            gone.push(CONTENT_LENGTH);
        }
    }
    gone
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

fn is_end_to_end(name: &HeaderName) -> bool {
    [
        ACCEPT,
        AUTHORIZATION,
        CACHE_CONTROL,
        CONTENT_ENCODING,
        CONTENT_LENGTH,
        CONTENT_RANGE,
        CONTENT_TYPE,
        COOKIE,
        DATE,
        ETAG,
        HOST,
        LOCATION,
        ORIGIN,
        RANGE,
        SET_COOKIE,
    ]
    .contains(name)
        || ["sec-", "x-forwarded-", "access-control-", "if-"]
            .iter()
            .any(|prefix| name.as_str().starts_with(prefix))
}

/// The comma separated words of all fields of a name.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().flat_map(words)
}

fn words(value: &HeaderValue) -> impl Iterator<Item = &str> {
    let words = value.to_str().unwrap_or_default().split(',');
    words.map(str::trim).filter(|word| !word.is_empty())
}

fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    list(headers, name).any(|w| w.eq_ignore_ascii_case(word))
}

/// An address as `X-Forwarded-For` has it.
pub(crate) fn forwarded_for(peer: IpAddr) -> HeaderValue {
    let peer = peer.to_canonical().to_string();
    HeaderValue::from_str(&peer).expect("hex digits, dots and colons")
}

/// Makes the headers of the request to the dev server from a browser's. `peer` is the browser's
/// address by [`forwarded_for`]. `host` is what the browser sent; `rewritten` replaces it where
/// the dev server would not take it.
pub(crate) fn to_upstream(
    headers: &HeaderMap,
    peer: &HeaderValue,
    host: &HeaderValue,
    rewritten: Option<HeaderValue>,
) -> HeaderMap {
    let gone = hop_by_hop(headers);
    let mut upstream = HeaderMap::with_capacity(headers.len() + OF_OURS);
    upstream.insert(HOST, rewritten.unwrap_or_else(|| host.clone()));
    let mut hops: Vec<&str> = Vec::new();
    for (name, value) in headers {
        match name.as_str() {
            // An expectation was answered by our own server, which asks for the body when it is
            // wanted.
            "host" | "expect" => {}
            "x-forwarded-for" => hops.extend(words(value)),
            _ if gone.contains(name) => {}
            _ => {
                upstream.append(name, value.clone());
            }
        }
    }
    let forwarded = if hops.is_empty() {
        peer.clone()
    } else {
        hops.extend(peer.to_str());
        HeaderValue::from_str(&hops.join(", ")).unwrap_or_else(|_| peer.clone())
    };
    upstream.insert(FORWARDED_FOR, forwarded);
    upstream
        .entry(FORWARDED_HOST)
        .or_insert_with(|| host.clone());
    upstream
        .entry(FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static("http"));
    upstream
}

/// Asks for a WebSocket again, after [`to_upstream`].
pub(crate) fn ask_for_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// A WebSocket handshake (RFC 6455 4.1)? Whether key and version are right is the site's to say.
pub(crate) fn is_websocket(method: &Method, version: Version, headers: &HeaderMap) -> bool {
    *method == Method::GET
        && version == Version::HTTP_11
        && lists(headers, &CONNECTION, "upgrade")
        && lists(headers, &UPGRADE, "websocket")
}

/// Did the upstream agree to speak WebSocket?
pub(crate) fn is_switched_to_websocket(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS && lists(headers, &UPGRADE, "websocket")
}

/// Vite's question whether its server is back: the 101 is the answer, so a 101 must mean it.
pub(crate) fn is_vite_ping(headers: &HeaderMap) -> bool {
    lists(headers, &SEC_WEBSOCKET_PROTOCOL, "vite-ping")
}

/// A person going to a page, who can be shown another page meanwhile.
pub(crate) fn is_navigation(method: &Method, headers: &HeaderMap) -> bool {
    let accepts_html = headers
        .get_all(ACCEPT)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .any(|accept| accept.contains("text/html"));
    matches!(*method, Method::GET | Method::HEAD)
        && accepts_html
        && headers.get(SEC_FETCH_DEST).is_none_or(is_document_dest)
}

fn is_document_dest(dest: &HeaderValue) -> bool {
    matches!(dest.as_bytes(), b"document" | b"iframe" | b"frame")
}

/// Will the answer be shown as a page? Older browsers don't say; they get no script.
pub(crate) fn asks_for_document(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::GET
        && headers
            .get(SEC_FETCH_DEST)
            .is_some_and(|dest| matches!(dest.as_bytes(), b"document" | b"iframe"))
}

/// May bytes be added at the end of this answer?
pub(crate) fn is_plain_html(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::OK
        && headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html"))
        && list(headers, &CONTENT_ENCODING).all(|coding| coding.eq_ignore_ascii_case("identity"))
}

/// Is this answer for everybody who may see the preview?
pub(crate) fn is_for_all(request: &HeaderMap, answer: &HeaderMap) -> bool {
    !request.contains_key(AUTHORIZATION)
        && !answer.contains_key(SET_COOKIE)
        && !lists(answer, &CACHE_CONTROL, "private")
        && !lists(answer, &CACHE_CONTROL, "no-store")
}

/// A stream that stays open for news: like a socket, it is no sign that somebody is there.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes().starts_with(b"text/event-stream"))
}

/// Adds to the length that the answer declares, if it declares one.
pub(crate) fn lengthen(headers: &mut HeaderMap, by: usize) {
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length + by as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), value.parse().unwrap());
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_belongs_to_the_connection_is_not_passed_on() {
        let mut headers = map(&[
            ("connection", "keep-alive, X-One"),
            ("connection", "x-two"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("x-three", "3"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("proxy-authorization", "x"),
            ("proxy-connection", "x"),
            ("upgrade", "h2c"),
            ("trailer", "x-sum"),
            ("host", "a"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(names(&headers), ["host", "trailer", "x-three"]);
    }

    #[test]
    fn connection_cannot_take_away_what_is_meant_for_the_site() {
        let protected = "Host, Cookie, Authorization, Content-Length, Content-Type, Range, Origin, \
                         Sec-WebSocket-Key, Sec-Fetch-Site, If-None-Match, X-Forwarded-For";
        let mut headers = map(&[
            ("connection", protected),
            ("host", "a"),
            ("cookie", "b=c"),
            ("authorization", "d"),
            ("content-length", "3"),
            ("content-type", "e"),
            ("range", "f"),
            ("origin", "g"),
            ("sec-websocket-key", "h"),
            ("sec-fetch-site", "i"),
            ("if-none-match", "j"),
            ("x-forwarded-for", "k"),
        ]);
        let before = headers.len();
        strip_hop_by_hop(&mut headers);
        assert_eq!(
            headers.len(),
            before - 1,
            "all but Connection itself: {headers:?}"
        );
        for odd in ["", ",,", "close,", "a b", "\u{e9}", "connection"] {
            let mut headers = map(&[("host", "a")]);
            headers.insert(CONNECTION, HeaderValue::from_bytes(odd.as_bytes()).unwrap());
            strip_hop_by_hop(&mut headers);
            assert_eq!(names(&headers), ["host"], "{odd:?}");
        }
    }

    #[test]
    fn one_framing_goes_out() {
        let mut headers = map(&[("transfer-encoding", "chunked"), ("content-length", "5")]);
        strip_hop_by_hop(&mut headers);
        assert!(headers.is_empty());
    }

    #[test]
    fn the_site_learns_who_asked_and_under_which_name() {
        let host = HeaderValue::from_static("a.localhost:4321");
        let peer = &forwarded_for("::ffff:10.1.2.3".parse().unwrap());
        let mut headers = map(&[("host", "a.localhost:4321"), ("expect", "100-continue")]);
        headers = to_upstream(&headers, peer, &host, None);
        assert_eq!(headers["host"], "a.localhost:4321");
        assert_eq!(headers["x-forwarded-for"], "10.1.2.3");
        assert_eq!(headers["x-forwarded-host"], "a.localhost:4321");
        assert_eq!(headers["x-forwarded-proto"], "http");
        assert!(!headers.contains_key("expect"));

        let mut headers = map(&[
            ("host", "x.example"),
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "https"),
            ("sec-fetch-site", "cross-site"),
        ]);
        let rewritten = Some(HeaderValue::from_static("localhost:20001"));
        let host = HeaderValue::from_static("x.example");
        headers = to_upstream(&headers, peer, &host, rewritten);
        assert_eq!(headers["host"], "localhost:20001");
        assert_eq!(headers["x-forwarded-for"], "1.1.1.1, 2.2.2.2, 10.1.2.3");
        assert_eq!(headers["x-forwarded-host"], "x.example");
        assert_eq!(headers["x-forwarded-proto"], "https");
        assert_eq!(headers["sec-fetch-site"], "cross-site");
    }

    #[test]
    fn only_a_websocket_handshake_is_one() {
        let good = map(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
        ]);
        assert!(is_websocket(&Method::GET, Version::HTTP_11, &good));
        assert!(!is_websocket(&Method::POST, Version::HTTP_11, &good));
        assert!(!is_websocket(&Method::GET, Version::HTTP_10, &good));
        for bad in [
            map(&[("connection", "upgrade"), ("upgrade", "h2c")]),
            map(&[("connection", "keep-alive"), ("upgrade", "websocket")]),
            map(&[("upgrade", "websocket")]),
            map(&[("connection", "upgrade")]),
        ] {
            assert!(
                !is_websocket(&Method::GET, Version::HTTP_11, &bad),
                "{bad:?}"
            );
        }
        assert!(is_vite_ping(&map(&[(
            "sec-websocket-protocol",
            "vite-ping"
        )])));
        assert!(!is_vite_ping(&map(&[(
            "sec-websocket-protocol",
            "vite-hmr"
        )])));
    }

    #[test]
    fn navigations_and_documents() {
        let nav = |lines: &[(&'static str, &str)]| is_navigation(&Method::GET, &map(lines));
        assert!(nav(&[
            ("accept", "text/html,*/*"),
            ("sec-fetch-dest", "document")
        ]));
        assert!(
            nav(&[("accept", "text/html")]),
            "a browser that doesn't say"
        );
        assert!(
            !nav(&[("accept", "text/html"), ("sec-fetch-dest", "empty")]),
            "a fetch"
        );
        assert!(!nav(&[("accept", "*/*"), ("sec-fetch-dest", "script")]));
        assert!(!is_navigation(
            &Method::POST,
            &map(&[("accept", "text/html")])
        ));

        let doc = |lines: &[(&'static str, &str)]| asks_for_document(&Method::GET, &map(lines));
        assert!(doc(&[("sec-fetch-dest", "document")]) && doc(&[("sec-fetch-dest", "iframe")]));
        assert!(!doc(&[]) && !doc(&[("sec-fetch-dest", "empty")]));
    }

    #[test]
    fn a_script_is_added_to_plain_html_alone() {
        let ok = StatusCode::OK;
        assert!(is_plain_html(
            ok,
            &map(&[("content-type", "text/html; charset=utf-8")])
        ));
        let encoded = [
            ("content-type", "text/html"),
            ("content-encoding", "identity"),
        ];
        assert!(is_plain_html(ok, &map(&encoded)));
        assert!(!is_plain_html(StatusCode::PARTIAL_CONTENT, &map(&encoded)));
        assert!(!is_plain_html(StatusCode::NOT_FOUND, &map(&encoded)));
        for other in [
            map(&[("content-type", "text/html"), ("content-encoding", "gzip")]),
            map(&[("content-type", "text/html-x")]),
            map(&[]),
        ] {
            assert!(!is_plain_html(ok, &other), "{other:?}");
        }
        let mut headers = map(&[("content-length", "10")]);
        lengthen(&mut headers, 5);
        assert_eq!(headers["content-length"], "15");
        let mut chunked = HeaderMap::new();
        lengthen(&mut chunked, 5);
        assert!(chunked.is_empty());
    }
}
