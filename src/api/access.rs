//! Who may call: Host, Origin, rate, bearer token, signature, content type; and the frame of every
//! request: its id, its span, its guard, its bound.
//!
//! Of a request that proves nothing no body is read; of one that claims a signature, which can only
//! be proven with the body, so many at once and no more. What an attacker could try with a signature
//! (replay, skew, another body, another nonce, another letter case) is listed in the tests below.

use std::{
    collections::{HashSet, VecDeque},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, EXPECT, HOST, ORIGIN},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use hmac::{Hmac, Mac};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Frame, SizeHint};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::Semaphore;
use tracing::Instrument;

use super::{
    ApiError, Base, batches,
    error::{Asking, REQUEST},
    label,
    rate::Peer,
};
use crate::{
    config::Secret,
    lifecycle::{Guard, HolderKind},
    text::status_class,
};

/// Where single images are labelled.
pub(super) const LABEL: &str = "/api/label";
/// And many.
pub(super) const BATCHES: &str = "/api/label/batches";
/// Largest body of an API call that carries no image.
const MAX_BODY: usize = 1 << 20;
/// A body has to be here in this time; one with images in three times as much.
const BODY_DEADLINE: Duration = Duration::from_secs(30);
/// Of a body that is too large.
const MAX_DISCARDED: usize = 128 << 20;
/// Who sends nothing for so long listens.
const DISCARD_PAUSE: Duration = Duration::from_secs(2);
/// How far a signature's clock may be from ours, in milliseconds.
const CLOCK_SKEW_MS: i64 = 30_000;
/// Signatures that are remembered: two thousand a second for as long as one may be good. Older ones
/// are refused by their time. Where there are more, calls are refused rather than one forgotten.
const MAX_SEEN: usize = 65_536;
/// Bodies of requests that are not proven yet, at once, in MiB.
const MAX_UNPROVEN: usize = 64;
const MAX_NONCE: usize = 128;

/// Secrets and hosts.
#[derive(Debug, Clone, Default)]
pub struct AccessSettings {
    /// Each of them is good: while one is being changed there are two.
    pub api_tokens: Vec<Secret>,
    pub service_secrets: Vec<Secret>,
    /// Host values (without port) that are answered while no secret is set.
    pub allowed_hosts: Vec<String>,
    /// Origin of the public address, `scheme://host[:port]`.
    pub public_origin: Option<String>,
}

/// Judges requests.
#[derive(Debug)]
pub struct Access {
    settings: AccessSettings,
    seen: Mutex<Seen>,
    unproven: Semaphore,
}

/// Signatures that were accepted, oldest first, each with the time until which it would be good.
#[derive(Debug, Default)]
struct Seen {
    order: VecDeque<(i64, Digested)>,
    set: HashSet<Digested>,
}

type Digested = [u8; 32];

/// What a body may be.
struct Bounds {
    bytes: usize,
    /// For people.
    named: &'static str,
    /// Of those that are not proven yet.
    mebibytes: u32,
    deadline: Duration,
    /// It may be a form.
    takes_forms: bool,
}

impl Bounds {
    fn of(path: &str) -> Self {
        match path {
            LABEL => Self {
                bytes: label::MAX_BODY,
                named: "an image of 10 MiB",
                mebibytes: 15,
                deadline: BODY_DEADLINE * 3,
                takes_forms: true,
            },
            BATCHES => Self {
                bytes: batches::MAX_BODY,
                named: "64 MiB; make several batches of it",
                mebibytes: 64,
                deadline: BODY_DEADLINE * 10,
                takes_forms: true,
            },
            _ => Self {
                bytes: MAX_BODY,
                named: "1 MiB",
                mebibytes: 1,
                deadline: BODY_DEADLINE,
                takes_forms: false,
            },
        }
    }
}

/// What a request says about who it is from, by its head alone.
enum Claim {
    /// It needs none, or has proven it.
    Proven,
    /// To be proven with the body.
    Signed(Signed),
}

struct Signed {
    at: i64,
    signature: Digested,
    /// What is signed before the body.
    prefix: String,
}

/// Paths that need no secret and keep nobody awake.
fn is_open(path: &str) -> bool {
    !(path.starts_with("/api/") || path == "/execute")
}

/// Does asking this count as somebody needing us?
fn is_activity(path: &str) -> bool {
    !matches!(
        path,
        "/health"
            | "/ready"
            | "/metrics"
            | "/openapi.json"
            | "/api/idle"
            | "/api/idle/touch"
            // An open socket alone holds nothing.
            | "/api/usage/live"
    )
}

impl Access {
    /// See [`AccessSettings`].
    pub fn new(settings: AccessSettings) -> Self {
        Self {
            settings,
            seen: Mutex::default(),
            unproven: Semaphore::new(MAX_UNPROVEN),
        }
    }

    fn has_secret(&self) -> bool {
        !self.settings.api_tokens.is_empty() || !self.settings.service_secrets.is_empty()
    }

    fn check_host(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.has_secret() {
            return Ok(());
        }
        let host = headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .unwrap_or_default();
        let name = host_name(host).to_ascii_lowercase();
        if self
            .settings
            .allowed_hosts
            .iter()
            .any(|allowed| allowed.eq_ignore_ascii_case(&name))
        {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::MISDIRECTED_REQUEST,
            "wrong_host",
            "this host name is not served here; the operator can allow it by API_ALLOWED_HOSTS",
        ))
    }

    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(origin) = headers.get(ORIGIN) else {
            return Ok(());
        };
        let host = headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .unwrap_or_default();
        let origin = origin.to_str().unwrap_or("null");
        let is_same = origin.split_once("://").is_some_and(|(scheme, at)| {
            matches!(scheme, "http" | "https") && !host.is_empty() && at.eq_ignore_ascii_case(host)
        });
        if is_same || self.settings.public_origin.as_deref() == Some(origin) {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "forbidden_origin",
            "pages of other sites may not call this API",
        ))
    }

    /// Looks at the head of a request. Whether the caller is one of ours may take its body too.
    fn claim(&self, headers: &HeaderMap, now: i64) -> Result<Claim, ApiError> {
        if !self.has_secret() || self.has_token(headers) {
            return Ok(Claim::Proven);
        }
        let signed = Signed::of(headers).filter(|_| !self.settings.service_secrets.is_empty());
        match signed {
            Some(signed) if now.saturating_sub(signed.at).saturating_abs() <= CLOCK_SKEW_MS => {
                Ok(Claim::Signed(signed))
            }
            _ => Err(unauthenticated()),
        }
    }

    /// Judges a claim by the body.
    fn check(&self, claim: &Claim, body: &[u8], now: i64) -> Result<(), ApiError> {
        let Claim::Signed(signed) = claim else {
            return Ok(());
        };
        // All secrets are tried, so that the time tells nothing about which one it was.
        let mut is_good = false;
        for secret in &self.settings.service_secrets {
            is_good |= signed.is_by(secret, body);
        }
        if !is_good {
            return Err(unauthenticated());
        }
        self.remember(signed, now)
    }

    fn has_token(&self, headers: &HeaderMap) -> bool {
        let given = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then_some(token.trim())
        });
        let Some(given) = given else {
            return false;
        };
        // Digests are of one length, so not even that of the secret can be timed.
        let given = Sha256::digest(given.as_bytes());
        let mut is_one = Choice::from(0);
        for token in &self.settings.api_tokens {
            is_one |= Sha256::digest(token.expose().as_bytes()).ct_eq(&given);
        }
        is_one.into()
    }

    /// A signature is accepted once.
    fn remember(&self, signed: &Signed, now: i64) -> Result<(), ApiError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((good_until, oldest)) = seen.order.front().copied() {
            if now <= good_until {
                break;
            }
            seen.order.pop_front();
            seen.set.remove(&oldest);
        }
        if seen.set.contains(&signed.signature) {
            return Err(unauthenticated());
        }
        if seen.order.len() >= MAX_SEEN {
            tracing::warn!("too many signed calls in half a minute; one is refused");
            return Err(ApiError::rate_limited(Duration::from_secs(5)));
        }
        seen.set.insert(signed.signature);
        // In order, so that the front is the first to go: one by a clock ahead of ours stays longer.
        let last = seen.order.back().map_or(i64::MIN, |(until, _)| *until);
        let until = signed.at.max(now).saturating_add(CLOCK_SKEW_MS).max(last);
        seen.order.push_back((until, signed.signature));
        Ok(())
    }
}

impl Signed {
    /// What the headers claim, if it is well-formed.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let timestamp = text("x-claude-timestamp")?;
        let mut signature = [0; 32];
        hex::decode_to_slice(text("x-claude-signature")?, &mut signature).ok()?;
        let nonce = match headers.get("x-claude-nonce") {
            None => None,
            Some(nonce) => Some(nonce.to_str().ok().filter(|nonce| is_nonce(nonce))?),
        };
        let nonce = nonce.map_or_else(String::new, |nonce| format!("{nonce}:"));
        Some(Self {
            at: timestamp.parse().ok()?,
            signature,
            prefix: format!("{timestamp}:{nonce}"),
        })
    }

    fn is_by(&self, secret: &Secret, body: &[u8]) -> bool {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes())
            .expect("HMAC takes keys of any length");
        mac.update(self.prefix.as_bytes());
        mac.update(body);
        // In constant time.
        mac.verify_slice(&self.signature).is_ok()
    }
}

/// One that could hold a colon or a brace would let a body be cut in two, a part of it passed off as
/// the nonce.
fn is_nonce(text: &str) -> bool {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= MAX_NONCE && text.bytes().all(is_plain)
}

/// With no detail of why.
fn unauthenticated() -> ApiError {
    ApiError::new(
        StatusCode::UNAUTHORIZED,
        "unauthenticated",
        "this call needs a valid bearer token or signature",
    )
}

/// The name in `host[:port]`, with IPv6's brackets kept.
fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => {
            name
        }
        _ => host,
    }
}

/// Is it one of those about labels?
fn is_label(path: &str) -> bool {
    path.strip_prefix(LABEL)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The frame of every request.
pub(super) async fn check(State(state): State<Base>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let span = tracing::info_span!("request", request_id = %id);
    let path = request.uri().path().to_owned();
    // As it was declared: what is in its place is nobody's business here.
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or_else(|| "none".to_owned(), |route| route.as_str().to_owned());
    let guard = is_activity(&path).then(|| state.activity.hold(HolderKind::Request, path.clone()));
    let answer = async {
        let method = request.method().clone();
        let started = std::time::Instant::now();
        let response = match admit(&state, request).await {
            Ok(request) => next.run(request).await,
            Err(error) => error.into_response(),
        };
        let elapsed_ms = started.elapsed().as_millis() as u64;
        let status = response.status().as_u16();
        let class = status_class(status);
        metrics::counter!("greenroom_http_requests_total", "route" => route.clone(), "status" => class)
            .increment(1);
        metrics::histogram!("greenroom_http_request_duration_seconds", "route" => route)
            .record(started.elapsed().as_secs_f64());
        if is_activity(&path) {
            tracing::info!(%method, path, status, elapsed_ms, "answered");
        }
        response
    };
    let asking = Asking {
        id: id.clone(),
        is_label: is_label(&path),
    };
    let mut response = REQUEST.scope(asking, answer.instrument(span)).await;
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert("x-request-id", id);
    }
    headers.insert(
        "x-content-type-options",
        HeaderValue::from_static("nosniff"),
    );
    headers
        .entry("cache-control")
        .or_insert(HeaderValue::from_static("no-store"));
    // Streams keep it until their last byte.
    match guard {
        None => response,
        Some(guard) => response.map(|body| {
            Body::new(Guarded {
                body,
                _guard: guard,
            })
        }),
    }
}

/// A body that keeps the container awake until it is sent.
struct Guarded {
    body: Body,
    _guard: Guard,
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn admit(state: &Base, request: Request) -> Result<Request, ApiError> {
    let (parts, body) = request.into_parts();
    state.access.check_host(&parts.headers)?;
    state.access.check_origin(&parts.headers)?;
    if is_open(parts.uri.path()) {
        return Ok(Request::from_parts(parts, Body::empty()));
    }
    if matches!(parts.uri.path(), "/execute" | LABEL | BATCHES) {
        state.rate.check(parts.extensions.get::<Peer>().copied())?;
    }
    let now = || Timestamp::now().as_millisecond();
    let claim = state.access.claim(&parts.headers, now())?;
    let bounds = Bounds::of(parts.uri.path());
    if body.size_hint().lower() > bounds.bytes as u64 {
        // Who asks first has sent nothing yet.
        if !parts.headers.contains_key(EXPECT) {
            discard(body).await;
        }
        return Err(ApiError::too_large(bounds.named));
    }
    let body = match claim {
        Claim::Proven => read_body(body, &bounds).await?,
        Claim::Signed(_) => {
            let slot = state.access.unproven.acquire_many(bounds.mebibytes).await;
            let _slot = slot.expect("the semaphore is never closed");
            let body = read_body(body, &bounds).await?;
            state.access.check(&claim, &body, now())?;
            body
        }
    };
    let kind = parts
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.split(';').next().unwrap_or_default().trim())
        .unwrap_or_default();
    let is_fitting = kind.eq_ignore_ascii_case("application/json")
        || (bounds.takes_forms && kind.eq_ignore_ascii_case("multipart/form-data"));
    let may_be_without =
        body.is_empty() && !matches!(parts.uri.path(), "/api/init" | "/api/execute" | "/execute");
    if parts.method == Method::POST && !is_fitting && !may_be_without {
        let message = match bounds.takes_forms {
            true => "send an image as multipart/form-data, or as application/json in base64",
            false => "send the body as JSON, with the header Content-Type: application/json",
        };
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            message,
        ));
    }
    Ok(Request::from_parts(parts, Body::from(body)))
}

/// Takes in a body that nobody wants: a caller who is still sending it would not hear why.
async fn discard(mut body: Body) {
    let all = async {
        let mut left = MAX_DISCARDED;
        while let Ok(Some(Ok(frame))) = tokio::time::timeout(DISCARD_PAUSE, body.frame()).await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(length) else {
                return;
            };
            left = rest;
        }
    };
    tokio::time::timeout(BODY_DEADLINE, all).await.ok();
}

async fn read_body(mut body: Body, bounds: &Bounds) -> Result<Bytes, ApiError> {
    let read = Limited::new(&mut body, bounds.bytes).collect();
    let read = tokio::time::timeout(bounds.deadline, read);
    match read.await {
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request",
            "the request's body did not come in time",
        )),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            discard(body).await;
            Err(ApiError::too_large(bounds.named))
        }
        Ok(Err(_)) => Err(ApiError::invalid("the request's body broke off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter()
            .map(|(n, v)| ((*n).parse().unwrap(), v.parse().unwrap()))
            .collect()
    }

    fn sign(secret: &str, text: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(text.as_bytes());
        hex::encode(mac.finalize().into_bytes())
    }

    /// One that knows these secrets.
    fn signed_by(secrets: &[&str]) -> Access {
        Access::new(AccessSettings {
            service_secrets: secrets.iter().map(|&secret| Secret::new(secret)).collect(),
            ..AccessSettings::default()
        })
    }

    /// A call as it comes in.
    fn call(
        access: &Access,
        now: i64,
        list: &[(&'static str, &str)],
        body: &str,
    ) -> Result<(), ApiError> {
        let claim = access.claim(&headers(list), now)?;
        access.check(&claim, body.as_bytes(), now)
    }

    fn signed_call(
        access: &Access,
        now: i64,
        at: &str,
        nonce: Option<&str>,
        signature: &str,
        body: &str,
    ) -> bool {
        let mut list = vec![
            ("x-claude-timestamp", at),
            ("x-claude-signature", signature),
        ];
        list.extend(nonce.map(|nonce| ("x-claude-nonce", nonce)));
        call(access, now, &list, body).is_ok()
    }

    const NOW: i64 = 1_790_000_000_000;

    #[test]
    fn a_signature_is_good_for_its_text_and_once() {
        let access = signed_by(&["s3cret"]);
        let now = NOW.to_string();
        let ask =
            |nonce, signature: &str, body| signed_call(&access, NOW, &now, nonce, signature, body);
        let good = sign("s3cret", &format!("{NOW}:{{}}"));
        assert!(ask(None, &good, "{}"));
        assert!(!ask(None, &good, "{}"), "replayed");
        assert!(!ask(None, &good.to_uppercase(), "{}"), "in other letters");
        let shouted = sign("s3cret", &format!("{NOW}:{{ }}")).to_uppercase();
        assert!(ask(None, &shouted, "{ }"), "hex is hex");
        assert!(!ask(None, &shouted.to_lowercase(), "{ }"), "replayed");

        let other = sign("s3cret", &format!("{NOW}:[]"));
        for (signature, body, why) in [
            (other.as_str(), "{}", "of another body"),
            (&other, "[] ", "of the body and more"),
            (&other[..62], "[]", "truncated"),
            (&other[..32], "[]", "half"),
            (&other[..63], "[]", "of odd length"),
            (&format!("{other}00"), "[]", "too long"),
            (&format!("{}zz", &other[..62]), "[]", "no hex"),
            (&format!("0x{}", &other[..62]), "[]", "no hex either"),
            ("", "[]", "empty"),
            (
                &sign("wrong", &format!("{NOW}:[]")),
                "[]",
                "of another secret",
            ),
            (&sign("", &format!("{NOW}:[]")), "[]", "of no secret"),
            (&sign("s3cret", "[]"), "[]", "of no time"),
        ] {
            assert!(!ask(None, signature, body), "{why}");
        }
        assert!(ask(None, &other, "[]"), "none of that has used it up");
        assert!(call(&access, NOW, &[], "").is_err());
        assert!(call(&access, NOW, &[("x-claude-signature", &other)], "[]").is_err());
    }

    #[test]
    fn a_nonce_is_part_of_what_is_signed_and_no_part_of_the_body() {
        let access = signed_by(&["s3cret"]);
        let now = NOW.to_string();
        let ask =
            |nonce, signature: &str, body| signed_call(&access, NOW, &now, nonce, signature, body);
        let one = sign("s3cret", &format!("{NOW}:n1:{{}}"));
        assert!(!ask(Some("n2"), &one, "{}"), "of another nonce");
        assert!(!ask(None, &one, "{}"), "without its nonce");
        assert!(ask(Some("n1"), &one, "{}"));
        assert!(!ask(Some("n1"), &one, "{}"), "replayed");
        assert!(!ask(None, &one, "n1:{}"), "the nonce passed off as body");
        assert!(ask(
            Some("n2"),
            &sign("s3cret", &format!("{NOW}:n2:{{}}")),
            "{}"
        ));
        let body = r#"{"a":{"prompt":"x"}}"#;
        let plain = sign("s3cret", &format!("{NOW}:{body}"));
        let (nonce, rest) = body.split_once(':').unwrap();
        assert!(
            !ask(Some(nonce), &plain, rest),
            "the body passed off as nonce"
        );
        for odd in ["", "a:b", "a b", "{", "\u{e9}", &"n".repeat(129)] {
            let signature = sign("s3cret", &format!("{NOW}:{odd}:{{}}"));
            assert!(!ask(Some(odd), &signature, "{}"), "{odd:?}");
        }
    }

    #[test]
    fn clocks_may_differ_by_half_a_minute_both_ways() {
        let access = signed_by(&["s3cret"]);
        let ask = |now: i64, at: &str| {
            signed_call(
                &access,
                now,
                at,
                None,
                &sign("s3cret", &format!("{at}:")),
                "",
            )
        };
        for (ahead, is_fine) in [
            (-30_001, false),
            (-30_000, true),
            (0, true),
            (30_000, true),
            (30_001, false),
        ] {
            assert_eq!(ask(NOW, &(NOW + ahead).to_string()), is_fine, "{ahead}");
        }
        for odd in [
            "",
            "now",
            "1e12",
            "0",
            "-1790000000000",
            "9223372036854775807",
            "-9223372036854775808",
            "99999999999999999999",
            // Seconds.
            "1790000000",
        ] {
            assert!(!ask(NOW, odd), "{odd:?}");
        }
        // One from a clock ahead of ours is not forgotten before it is too old.
        let at = (NOW + 30_000).to_string();
        for later in [0, 1, 30_000, 59_999, 60_000, 60_001, 90_000] {
            assert!(!ask(NOW + later, &at), "replayed {later} ms later");
        }
        // Nor one that others came after.
        let at = (NOW + 60_000).to_string();
        assert!(ask(NOW + 60_000, &at));
        for n in 1..100 {
            let now = NOW + 60_000 + n * 300;
            assert!(ask(now, &now.to_string()));
            assert!(!ask(now, &at), "replayed {} ms later", n * 300);
        }
    }

    #[test]
    fn what_is_remembered_is_bounded_and_nothing_good_is_forgotten() {
        let access = signed_by(&["s3cret"]);
        let mut claim = Signed {
            at: NOW,
            signature: [0; 32],
            prefix: String::new(),
        };
        let number = |claim: &mut Signed, n: usize| {
            claim.signature[..8].copy_from_slice(&n.to_be_bytes());
        };
        for n in 0..MAX_SEEN {
            number(&mut claim, n);
            access.remember(&claim, NOW).unwrap();
        }
        number(&mut claim, MAX_SEEN);
        let full = access.remember(&claim, NOW).unwrap_err().into_response();
        assert_eq!(full.status(), 429);
        number(&mut claim, 0);
        let replayed = access.remember(&claim, NOW + 30_000).unwrap_err();
        assert_eq!(replayed.into_response().status(), 401);
        claim.at = NOW + 30_001;
        number(&mut claim, MAX_SEEN);
        access.remember(&claim, NOW + 30_001).unwrap();
        assert_eq!(access.seen.lock().unwrap().order.len(), 1);
        assert_eq!(access.seen.lock().unwrap().set.len(), 1);
    }

    #[test]
    fn two_secrets_are_good_while_one_is_being_changed() {
        let access = Access::new(AccessSettings {
            api_tokens: vec![Secret::new("new-t0ken"), Secret::new("old-t0ken")],
            service_secrets: vec![Secret::new("new"), Secret::new("old")],
            ..AccessSettings::default()
        });
        let now = NOW.to_string();
        for secret in ["new", "old"] {
            let signature = sign(secret, &format!("{NOW}:{{}}"));
            assert!(
                signed_call(&access, NOW, &now, None, &signature, "{}"),
                "{secret}"
            );
            assert!(!signed_call(&access, NOW, &now, None, &signature, "{}"));
            let bearer = format!("Bearer {secret}-t0ken");
            assert!(call(&access, NOW, &[("authorization", &bearer)], "").is_ok());
        }
        for wrong in [
            "new-t0kennew-t0ken",
            "new",
            "old",
            "",
            "new-t0ken,old-t0ken",
        ] {
            let bearer = format!("Bearer {wrong}");
            assert!(
                call(&access, NOW, &[("authorization", &bearer)], "").is_err(),
                "{wrong}"
            );
        }
        let signature = sign("older", &format!("{NOW}:{{}}"));
        assert!(!signed_call(&access, NOW, &now, None, &signature, "{}"));
        // With a token alone nobody can sign, not even with nothing.
        let tokens = Access::new(AccessSettings {
            api_tokens: vec![Secret::new("t0ken")],
            ..AccessSettings::default()
        });
        let signature = sign("", &format!("{NOW}:{{}}"));
        assert!(!signed_call(&tokens, NOW, &now, None, &signature, "{}"));
    }

    #[test]
    fn of_a_request_that_proves_nothing_no_body_is_read() {
        let access = signed_by(&["s3cret"]);
        let old = (NOW - 31_000).to_string();
        let now = NOW.to_string();
        let signature = sign("s3cret", "x");
        for head in [
            &[][..],
            &[("authorization", "Bearer wrong")],
            &[
                ("x-claude-timestamp", old.as_str()),
                ("x-claude-signature", &signature),
            ],
            &[
                ("x-claude-timestamp", now.as_str()),
                ("x-claude-signature", "ab"),
            ],
        ] {
            assert!(access.claim(&headers(head), NOW).is_err(), "{head:?}");
        }
    }

    #[test]
    fn tokens_hosts_and_origins() {
        let with_token = Access::new(AccessSettings {
            api_tokens: vec![Secret::new("t0ken")],
            ..AccessSettings::default()
        });
        let bearer = |value: &str| call(&with_token, NOW, &[("authorization", value)], "").is_ok();
        assert!(bearer("Bearer t0ken") && bearer("bearer t0ken"));
        assert!(!bearer("Bearer t0ke") && !bearer("t0ken") && !bearer("Bearer "));

        let open = Access::new(AccessSettings {
            allowed_hosts: vec!["localhost".into(), "127.0.0.1".into(), "[::1]".into()],
            ..AccessSettings::default()
        });
        let host = |value: &str| open.check_host(&headers(&[("host", value)])).is_ok();
        assert!(
            host("localhost:8080") && host("127.0.0.1") && host("[::1]:80") && host("LOCALHOST")
        );
        assert!(!host("evil.example") && !host("localhost.evil.example") && !host(""));
        let origin = |value: &str| {
            open.check_origin(&headers(&[("host", "localhost:8080"), ("origin", value)]))
                .is_ok()
        };
        assert!(origin("http://localhost:8080"));
        for foreign in [
            "null",
            "http://localhost:8081",
            "http://evil.example",
            "",
            "file://localhost:8080",
        ] {
            assert!(!origin(foreign), "{foreign}");
        }
        assert!(
            open.check_origin(&headers(&[("host", "localhost")]))
                .is_ok()
        );
    }
}
