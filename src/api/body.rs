//! Bodies of JSON. Of requests: wrong types name their field, unknown fields are ignored. Of
//! answers: what a success looks like.

use axum::{
    Json as Answer,
    body::Bytes,
    extract::{FromRequest, Request},
    response::{IntoResponse, Response},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use super::ApiError;
use crate::{identity::ThreadKey, usage::Tenants};

/// `{success, result}`.
pub(super) fn success(result: impl Serialize) -> Response {
    Answer(json!({"success": true, "result": result})).into_response()
}

/// A body of a known shape.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|_| ApiError::invalid("the request's body broke off"))?;
        parse(&body).map(Self)
    }
}

/// A body of a known shape, which may be left out.
pub(super) struct JsonOrNothing<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for JsonOrNothing<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|_| ApiError::invalid("the request's body broke off"))?;
        if body.is_empty() {
            return Ok(Self(T::default()));
        }
        parse(&body).map(Self)
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // The parser would take an array for an object's fields in their order.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::invalid(
            "the body has to be a JSON object, not an array",
        ));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut reader);
    let value = parsed.map_err(|error| {
        let field = error.path().to_string();
        let cause = error.into_inner();
        if cause.is_data() && field != "." {
            ApiError::invalid(format!("{field}: {}", plain(&cause)))
        } else if cause.is_data() {
            ApiError::invalid(format!(
                "the body has to be a JSON object: {}",
                plain(&cause)
            ))
        } else if field != "." && serde_json::from_slice::<serde_json::Value>(body).is_ok() {
            // A number where one of some words should be is a syntax error to the parser.
            ApiError::invalid(format!("{field}: the value is of a wrong type"))
        } else {
            ApiError::invalid("the body is not valid JSON")
        }
    })?;
    reader
        .end()
        .map_err(|_| ApiError::invalid("the body is not valid JSON"))?;
    Ok(value)
}

/// Most of a caller's own value that an error says again, in characters.
const MAX_FOUND: usize = 60;

/// The reason without the position, which names no field, as somebody says it who has not written
/// this; of a value no more than its beginning.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text
        .rsplit_once(" at line ")
        .map_or(&*text, |(text, _)| text);
    let Some((found, expected)) = text.rsplit_once(", expected ") else {
        return shortened(text);
    };
    let expected = match expected {
        "u16" | "u32" | "u64" | "usize" => "a whole number",
        "f32" | "f64" => "a number",
        "a sequence" => "an array",
        "a map" => "an object",
        name if name.starts_with("struct ") => "an object",
        other => other,
    };
    format!("{}, expected {expected}", shortened(found))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_FOUND) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// The ids of a body, completed by the container's pins and checked against them.
pub(super) fn thread_key(
    pins: &super::Pins,
    client: Option<&str>,
    user: Option<&str>,
    thread: Option<&str>,
) -> Result<ThreadKey, ApiError> {
    let missing = |field| ApiError::invalid(format!("{field} is missing"));
    let client = client
        .map(str::parse)
        .transpose()?
        .or_else(|| pins.client.clone())
        .ok_or_else(|| missing("clientId"))?;
    let user = user
        .map(str::parse)
        .transpose()?
        .or_else(|| pins.user.clone())
        .ok_or_else(|| missing("userId"))?;
    let thread = thread
        .map(str::parse)
        .transpose()?
        .or_else(|| pins.thread.clone())
        .ok_or_else(|| missing("threadId"))?;
    let key = ThreadKey {
        client,
        user,
        thread,
    };
    check_pins(pins, &key.user_key())?;
    Ok(key)
}

/// The tenants that are asked about, completed by the container's pins and checked against them.
pub(super) fn check_tenants(pins: &super::Pins, asked: Tenants) -> Result<Tenants, ApiError> {
    let is_other_client = pins.client.is_some() && asked.client.is_some();
    let is_other_user = pins.user.is_some() && asked.user.is_some();
    if (is_other_client && asked.client != pins.client)
        || (is_other_user && asked.user != pins.user)
    {
        return Err(ApiError::not_this_tenant());
    }
    Ok(Tenants {
        client: asked.client.or_else(|| pins.client.clone()),
        user: asked.user.or_else(|| pins.user.clone()),
    })
}

/// Refuses tenants that the container is not pinned to.
pub(super) fn check_pins(
    pins: &super::Pins,
    user: &crate::identity::UserKey,
) -> Result<(), ApiError> {
    let other_client = pins
        .client
        .as_ref()
        .is_some_and(|client| *client != user.client);
    let other_user = pins
        .user
        .as_ref()
        .is_some_and(|pinned| *pinned != user.user);
    if other_client || other_user {
        Err(ApiError::not_this_tenant())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Shape {
        #[serde(rename = "clientId")]
        client: Option<String>,
        #[serde(rename = "mode")]
        _mode: Option<crate::domain::TurnMode>,
        #[serde(rename = "limit")]
        _limit: Option<u64>,
    }

    #[test]
    fn wrong_types_name_their_field() {
        assert_eq!(
            parse::<Shape>(br#"{"clientId":"a","x":1}"#)
                .unwrap()
                .client
                .unwrap(),
            "a"
        );
        for (body, said) in [
            (&br#"{"clientId":5}"#[..], "clientId"),
            (br#"{"mode":1}"#, "mode: the value"),
            (br#"{"mode":"x"}"#, "mode: unknown variant"),
            (
                br#"{"limit":"5"}"#,
                "limit: invalid type: string \\\"5\\\", expected a whole number",
            ),
            (br#"{"mode":1"#, "not valid JSON"),
            (b"[]", "JSON object"),
            (b" [\"acme\"]", "JSON object"),
            (b"7", "integer `7`, expected an object"),
            (
                br#"{"clientId":{}}"#,
                "clientId: invalid type: map, expected a string",
            ),
            (b"", "not valid JSON"),
            (b"{}{}", "not valid JSON"),
            (b"{\"clientId\":\"\xff\"}", "valid JSON"),
        ] {
            let error = parse::<Shape>(body).unwrap_err();
            assert!(format!("{error:?}").contains(said), "{error:?}");
            assert_eq!(error.into_response().status(), 400);
        }
    }

    #[test]
    fn what_was_sent_is_not_said_again_at_length() {
        let long = "ä, expected at line ".repeat(100_000);
        for body in [
            format!(r#"{{"limit":"{long}"}}"#),
            format!(r#"{{"mode":"{long}"}}"#),
        ] {
            let said = format!("{:?}", parse::<Shape>(body.as_bytes()).unwrap_err());
            assert!(said.len() < 1000, "{} bytes", said.len());
        }
    }

    #[test]
    fn pins_complete_and_refuse() {
        let pins = super::super::Pins {
            client: Some("acme".parse().unwrap()),
            user: None,
            thread: Some("main".parse().unwrap()),
        };
        let key = thread_key(&pins, None, Some("alice"), None).unwrap();
        assert_eq!(key.to_string(), "acme/alice/main");
        assert_eq!(
            thread_key(&pins, Some("other"), Some("alice"), None)
                .unwrap_err()
                .into_response()
                .status(),
            403
        );
        assert_eq!(
            thread_key(&pins, None, None, None)
                .unwrap_err()
                .into_response()
                .status(),
            400
        );
        assert_eq!(
            thread_key(&pins, Some(".."), Some("alice"), None)
                .unwrap_err()
                .into_response()
                .status(),
            400
        );
    }
}
