//! Who may look at a preview: short-lived signed tokens in links, exchanged for a cookie of that
//! one thread. Pure but for the clock, which callers give.
//!
//! Token and cookie have one form, `{slug}.{expiry, seconds since 1970}.{HMAC-SHA256 in hex}`;
//! what they are for is part of what is signed, so neither passes for the other.

use hmac::{Hmac, Mac};
use http::{HeaderMap, HeaderValue, header::COOKIE};
use sha2::Sha256;

/// The parameter of a link that opens a preview: its last and only one.
const PARAMETER: &str = "greenroom_token=";
/// The cookie as every browser takes it.
const COOKIE_NAME: &str = "greenroom_preview";
/// The same for frames: a page on `localhost` and its frame on `x.localhost` are two sites to
/// browsers, and a `Lax` cookie is not sent into a frame of another site.
const FRAME_COOKIE_NAME: &str = "greenroom_preview_frame";
/// By the contract.
const TOKEN_SECONDS: i64 = 15 * 60;
/// A working day; the link that a control plane shows is always fresh.
const COOKIE_SECONDS: i64 = 12 * 3600;

/// Signs and judges. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    /// `None`: previews are open.
    key: Option<[u8; 32]>,
    is_https: bool,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access")
            .field("is_open", &self.key.is_none())
            .finish_non_exhaustive()
    }
}

/// What a request's link, host and cookies say about access.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing to check.
    Open,
    /// A cookie of this thread.
    Granted,
    /// A fresh link: answer with these cookies and a redirect to this path.
    Exchange {
        cookies: Vec<String>,
        location: String,
    },
    Refused,
}

impl Access {
    /// Everybody may look: for a supervisor whose API has no secret either.
    pub fn open() -> Self {
        Self {
            key: None,
            is_https: false,
        }
    }

    /// Links and cookies are signed with a key made of `secret`; without one the key is random
    /// and dies with the process.
    pub fn signed(secret: Option<&str>, is_https: bool) -> Self {
        let random;
        let secret = match secret {
            Some(secret) => secret.as_bytes(),
            None => {
                random = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(uuid::Uuid::into_bytes);
                random.as_flattened()
            }
        };
        let mut mac = new_mac(secret);
        mac.update(b"greenroom preview links");
        Self {
            key: Some(mac.finalize().into_bytes().into()),
            is_https,
        }
    }

    /// The address with a fresh token, or as it is where none is needed.
    pub(crate) fn link(&self, url: &str, slug: &str, now: i64) -> String {
        match self.sign("link", slug, now + TOKEN_SECONDS) {
            None => url.to_owned(),
            Some(token) => format!("{}/?{PARAMETER}{token}", url.trim_end_matches('/')),
        }
    }

    fn sign(&self, purpose: &str, slug: &str, expires: i64) -> Option<String> {
        let mut mac = new_mac(&self.key?);
        mac.update(format!("{purpose}\n{slug}\n{expires}").as_bytes());
        Some(format!(
            "{slug}.{expires}.{}",
            hex::encode(mac.finalize().into_bytes())
        ))
    }

    /// The thread that a token or cookie is for, if it is ours and not too old.
    fn verify<'a>(&self, purpose: &str, text: &'a str, now: i64) -> Option<&'a str> {
        let mut mac = new_mac(&self.key?);
        let mut parts = text.splitn(3, '.');
        let (slug, expires, signature) = (parts.next()?, parts.next()?, parts.next()?);
        mac.update(format!("{purpose}\n{slug}\n{expires}").as_bytes());
        mac.verify_slice(&hex::decode(signature).ok()?).ok()?;
        (expires.parse::<i64>().ok()? > now).then_some(slug)
    }

    /// The threads that the request's cookies open. There may be several: sites on other host
    /// labels can set cookies that are sent here too, and ours must not be drowned by them.
    fn granted<'a>(&self, headers: &'a HeaderMap, now: i64) -> Vec<&'a str> {
        cookies(headers)
            .filter(|(name, _)| [COOKIE_NAME, FRAME_COOKIE_NAME].contains(name))
            .filter_map(|(_, value)| self.verify("cookie", value, now))
            .collect()
    }

    /// The thread that the request names by its link or cookie, for hosts that name none.
    pub(crate) fn named<'a>(
        &self,
        query: Option<&'a str>,
        headers: &'a HeaderMap,
        now: i64,
    ) -> Option<&'a str> {
        self.key?;
        let (_, token) = split_query(query);
        token
            .and_then(|token| self.verify("link", token, now))
            .or_else(|| self.granted(headers, now).first().copied())
    }

    /// Judges a request for the preview of `slug`.
    pub(crate) fn judge(
        &self,
        slug: &str,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
        now: i64,
    ) -> Verdict {
        if self.key.is_none() {
            return Verdict::Open;
        }
        let (rest, token) = split_query(query);
        if let Some(token) = token {
            if self.verify("link", token, now) != Some(slug) {
                return Verdict::Refused;
            }
            // One slash: `//host` would lead to another site.
            let mut location = format!("/{}", path.trim_start_matches(['/', '\\']));
            if !rest.is_empty() {
                location = format!("{location}?{rest}");
            }
            return Verdict::Exchange {
                cookies: self.new_cookies(slug, now),
                location,
            };
        }
        if self.granted(headers, now).contains(&slug) {
            Verdict::Granted
        } else {
            Verdict::Refused
        }
    }

    fn new_cookies(&self, slug: &str, now: i64) -> Vec<String> {
        let Some(value) = self.sign("cookie", slug, now + COOKIE_SECONDS) else {
            return Vec::new();
        };
        let cookie = |name: &str, rest: &str| {
            format!("{name}={value}; Path=/; Max-Age={COOKIE_SECONDS}; HttpOnly; {rest}")
        };
        let framed = "SameSite=None; Secure; Partitioned";
        if self.is_https {
            vec![cookie(COOKIE_NAME, framed)]
        } else {
            vec![
                cookie(COOKIE_NAME, "SameSite=Lax"),
                cookie(FRAME_COOKIE_NAME, framed),
            ]
        }
    }
}

/// Takes our cookies out of a request: they are not the site's business.
pub(crate) fn hide_cookies(headers: &mut HeaderMap) {
    let is_ours = |name: &str| [COOKIE_NAME, FRAME_COOKIE_NAME].contains(&name);
    if !cookies(headers).any(|(name, _)| is_ours(name)) {
        return;
    }
    let rest: Vec<String> = cookies(headers)
        .filter(|(name, _)| !is_ours(name))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    headers.remove(COOKIE);
    if !rest.is_empty()
        && let Ok(value) = HeaderValue::from_str(&rest.join("; "))
    {
        headers.insert(COOKIE, value);
    }
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
}

/// The query without our parameter, and its value.
fn split_query(query: Option<&str>) -> (&str, Option<&str>) {
    let query = query.unwrap_or_default();
    match query.rsplit_once('&') {
        Some((rest, last)) if last.starts_with(PARAMETER) => (rest, last.strip_prefix(PARAMETER)),
        _ => match query.strip_prefix(PARAMETER) {
            Some(token) if !token.contains('&') => ("", Some(token)),
            _ => (query, None),
        },
    }
}

fn new_mac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const A: &str = "acme-alice-main-0123456789ab";

    fn with_cookie(cookie: &str) -> HeaderMap {
        HeaderMap::from_iter([(COOKIE, HeaderValue::from_str(cookie).unwrap())])
    }

    fn query(link: &str) -> Option<&str> {
        link.split_once('?').map(|(_, query)| query)
    }

    #[test]
    fn a_link_becomes_a_cookie_of_its_thread_alone() {
        let access = Access::signed(Some("secret"), false);
        let link = access.link("http://a.localhost:4321", A, NOW);
        assert!(link.starts_with("http://a.localhost:4321/?greenroom_token="));
        let none = HeaderMap::new();
        let Verdict::Exchange { cookies, location } =
            access.judge(A, "//evil.example/x", query(&link), &none, NOW)
        else {
            panic!("a fresh link opens")
        };
        assert_eq!(location, "/evil.example/x");
        assert!(cookies[0].contains("HttpOnly; SameSite=Lax"));
        let cookie = cookies[0].split(';').next().unwrap().to_owned();
        let headers = with_cookie(&format!("a=b; greenroom_preview=forged; {cookie}"));
        assert_eq!(access.judge(A, "/", None, &headers, NOW), Verdict::Granted);
        assert_eq!(access.named(None, &headers, NOW), Some(A));

        let other = "acme-alice-other-0123456789ab";
        let refused = |verdict| assert_eq!(verdict, Verdict::Refused);
        refused(access.judge(other, "/", None, &headers, NOW));
        refused(access.judge(other, "/", query(&link), &none, NOW));
        refused(access.judge(A, "/", None, &none, NOW));
        refused(access.judge(A, "/", query(&link), &none, NOW + TOKEN_SECONDS));
        refused(access.judge(A, "/", None, &headers, NOW + COOKIE_SECONDS));
        let token = query(&link).unwrap().strip_prefix(PARAMETER).unwrap();
        refused(access.judge(
            A,
            "/",
            None,
            &with_cookie(&format!("{COOKIE_NAME}={token}")),
            NOW,
        ));
        refused(Access::signed(Some("other"), false).judge(A, "/", query(&link), &none, NOW));
        refused(Access::signed(None, false).judge(A, "/", None, &headers, NOW));
    }

    #[test]
    fn cookies_that_another_site_tossed_open_nothing_and_hide_nothing() {
        let access = Access::signed(Some("secret"), false);
        let other = "mallory-mallory-main-0123456789ab";
        let of = |slug: &str| {
            let cookie = &access.new_cookies(slug, NOW)[0];
            cookie.split(';').next().unwrap().to_owned()
        };
        // Good, and of a thread of the attacker's own: `Domain=` brought it to this host.
        let tossed = of(other);
        let headers = with_cookie(&tossed);
        assert_eq!(access.judge(A, "/", None, &headers, NOW), Verdict::Refused);
        // Many of them, sent before ours: a longer path puts them there.
        let junk = format!("{COOKIE_NAME}=x; ").repeat(100);
        let headers = with_cookie(&format!("{tossed}; {junk}{}", of(A)));
        assert_eq!(access.judge(A, "/", None, &headers, NOW), Verdict::Granted);
        // And a link still opens, whatever is there.
        let link = access.link("http://a.localhost:4321", A, NOW);
        let opened = access.judge(A, "/", query(&link), &with_cookie(&tossed), NOW);
        assert!(matches!(opened, Verdict::Exchange { .. }), "{opened:?}");
    }

    #[test]
    fn the_site_never_sees_our_cookies() {
        let mut headers = with_cookie("a=b; greenroom_preview=x; c=d; greenroom_preview_frame=y");
        hide_cookies(&mut headers);
        assert_eq!(headers[COOKIE], "a=b; c=d");
        let mut headers = with_cookie("greenroom_preview=x");
        hide_cookies(&mut headers);
        assert!(headers.get(COOKIE).is_none());
    }

    #[test]
    fn the_rest_of_the_query_stays() {
        assert_eq!(
            split_query(Some("a=1&greenroom_token=t")),
            ("a=1", Some("t"))
        );
        assert_eq!(split_query(Some("greenroom_token=t")), ("", Some("t")));
        assert_eq!(split_query(Some("token=abc")), ("token=abc", None));
        assert_eq!(
            Access::open().judge(A, "/", None, &HeaderMap::new(), NOW),
            Verdict::Open
        );
        assert_eq!(Access::open().link("http://x", A, NOW), "http://x");
        let https = Access::signed(None, true).new_cookies(A, NOW);
        assert_eq!(https.len(), 1);
        assert!(https[0].ends_with("SameSite=None; Secure; Partitioned"));
    }
}
