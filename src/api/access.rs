//! Who may call: Host, Origin, bearer token, signature, content type; and the frame of every
//! request: its id, its span, its guard, its bound.

use std::{
    collections::{HashSet, VecDeque},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use hmac::{Hmac, Mac};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Frame, SizeHint};
use jiff::Timestamp;
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tracing::Instrument;

use super::{ApiError, Shared, error::REQUEST_ID};
use crate::{
    config::Secret,
    lifecycle::{Guard, HolderKind},
};

/// Largest body of an API call.
const MAX_BODY: usize = 1 << 20;
/// A body has to be here in this time.
const BODY_DEADLINE: Duration = Duration::from_secs(30);
/// How far a signature's clock may be from ours, in milliseconds.
const CLOCK_SKEW_MS: i64 = 30_000;
/// Signatures that are remembered. Older ones than the skew allows are refused by their time.
const MAX_SEEN: usize = 65_536;

/// Secrets and hosts.
#[derive(Debug, Clone, Default)]
pub struct AccessSettings {
    pub api_token: Option<Secret>,
    pub service_secret: Option<Secret>,
    /// Host values (without port) that are answered while no secret is set.
    pub allowed_hosts: Vec<String>,
    /// Origin of the public address, `scheme://host[:port]`.
    pub public_origin: Option<String>,
}

/// Judges requests.
#[derive(Debug, Default)]
pub struct Access {
    settings: AccessSettings,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    order: VecDeque<(i64, String)>,
    set: HashSet<String>,
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
        }
    }

    fn has_secret(&self) -> bool {
        self.settings.api_token.is_some() || self.settings.service_secret.is_some()
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

    fn check_caller(&self, headers: &HeaderMap, body: &[u8]) -> Result<(), ApiError> {
        if !self.has_secret() || self.has_token(headers) || self.is_signed(headers, body) {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "this call needs a valid bearer token or signature",
        ))
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
        match (&self.settings.api_token, given) {
            (Some(token), Some(given)) => {
                bool::from(token.expose().as_bytes().ct_eq(given.as_bytes()))
            }
            _ => false,
        }
    }

    fn is_signed(&self, headers: &HeaderMap, body: &[u8]) -> bool {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let (Some(secret), Some(timestamp), Some(signature)) = (
            &self.settings.service_secret,
            text("x-claude-timestamp"),
            text("x-claude-signature"),
        ) else {
            return false;
        };
        let now = Timestamp::now().as_millisecond();
        let Ok(at) = timestamp.parse::<i64>() else {
            return false;
        };
        let Ok(signature) = hex::decode(signature) else {
            return false;
        };
        if now.saturating_sub(at).saturating_abs() > CLOCK_SKEW_MS {
            return false;
        }
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes())
            .expect("HMAC takes keys of any length");
        mac.update(timestamp.as_bytes());
        mac.update(b":");
        if let Some(nonce) = text("x-claude-nonce") {
            mac.update(nonce.as_bytes());
            mac.update(b":");
        }
        mac.update(body);
        mac.verify_slice(&signature).is_ok() && self.is_first(now, at, hex::encode(signature))
    }

    /// A signature is accepted once.
    fn is_first(&self, now: i64, at: i64, signature: String) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((oldest, _)) = seen.order.front() {
            if now - oldest <= 2 * CLOCK_SKEW_MS && seen.order.len() < MAX_SEEN {
                break;
            }
            if let Some((_, old)) = seen.order.pop_front() {
                seen.set.remove(&old);
            }
        }
        if !seen.set.insert(signature.clone()) {
            return false;
        }
        seen.order.push_back((at.max(now), signature));
        true
    }
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

/// The frame of every request.
pub(super) async fn check(State(state): State<Shared>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let span = tracing::info_span!("request", request_id = %id);
    let path = request.uri().path().to_owned();
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
        if is_activity(&path) {
            tracing::info!(%method, path, status, elapsed_ms, "answered");
        }
        response
    };
    let mut response = REQUEST_ID.scope(id.clone(), answer.instrument(span)).await;
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

async fn admit(state: &Shared, request: Request) -> Result<Request, ApiError> {
    let (parts, body) = request.into_parts();
    state.access.check_host(&parts.headers)?;
    state.access.check_origin(&parts.headers)?;
    if is_open(parts.uri.path()) {
        return Ok(Request::from_parts(parts, Body::empty()));
    }
    let body = read_body(body).await?;
    state.access.check_caller(&parts.headers, &body)?;
    let is_json = parts
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.split(';').next().unwrap_or_default().trim())
        .is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
    let may_be_without =
        body.is_empty() && !matches!(parts.uri.path(), "/api/init" | "/api/execute");
    if parts.method == Method::POST && !is_json && !may_be_without {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "send the body as JSON, with the header Content-Type: application/json",
        ));
    }
    Ok(Request::from_parts(parts, Body::from(body)))
}

async fn read_body(body: Body) -> Result<Bytes, ApiError> {
    let read = tokio::time::timeout(BODY_DEADLINE, Limited::new(body, MAX_BODY).collect());
    match read.await {
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request",
            "the request's body did not come in time",
        )),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(ApiError::too_large("1 MiB"))
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

    #[test]
    fn signatures() {
        let access = Access::new(AccessSettings {
            service_secret: Some(Secret::new("s3cret")),
            ..AccessSettings::default()
        });
        let now = Timestamp::now().as_millisecond();
        let call = |at: i64, nonce: Option<&str>, signature: &str, body: &str| {
            let at = at.to_string();
            let mut list = vec![
                ("x-claude-timestamp", at.as_str()),
                ("x-claude-signature", signature),
            ];
            list.extend(nonce.map(|nonce| ("x-claude-nonce", nonce)));
            access
                .check_caller(&headers(&list), body.as_bytes())
                .is_ok()
        };
        let good = sign("s3cret", &format!("{now}:{{}}"));
        assert!(call(now, None, &good, "{}"));
        assert!(!call(now, None, &good, "{}"), "replayed");
        assert!(
            !call(now, None, &good.to_uppercase(), "{}"),
            "replayed in other letters"
        );
        let with_nonce = sign("s3cret", &format!("{now}:n1:{{}}"));
        assert!(call(now, Some("n1"), &with_nonce, "{}"));
        let other = sign("s3cret", &format!("{now}:[]"));
        assert!(!call(now, None, &other, "{}"), "of another body");
        assert!(!call(now, None, &other[..32], "[]"), "truncated");
        let old = now - 31_000;
        assert!(
            !call(old, None, &sign("s3cret", &format!("{old}:{{}}")), "{}"),
            "too old"
        );
        assert!(!call(
            now,
            None,
            &sign("wrong", &format!("{now}:{{}}")),
            "{}"
        ));
        assert!(access.check_caller(&HeaderMap::new(), b"").is_err());
    }

    #[test]
    fn tokens_hosts_and_origins() {
        let with_token = Access::new(AccessSettings {
            api_token: Some(Secret::new("t0ken")),
            ..AccessSettings::default()
        });
        let bearer = |value: &str| {
            with_token
                .check_caller(&headers(&[("authorization", value)]), b"")
                .is_ok()
        };
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
