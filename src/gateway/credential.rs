//! The credential of the model API: where it is read from, and the one place that shows it.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::GatewayError;
use crate::config::Secret;

/// What the gateway shows the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Sent as `x-api-key`.
    ApiKey(Secret),
    /// Sent as `Authorization: Bearer`, with the beta header that the API wants for it.
    OAuth {
        access: Secret,
        refresh: Option<Secret>,
        expires: Option<Timestamp>,
    },
    /// The upstream is our own rehearsal: any key will do, and none is real.
    Rehearsal,
}

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const BETA: HeaderName = HeaderName::from_static("anthropic-beta");
/// Without it the API refuses an OAuth token on `/v1/messages`.
const OAUTH_BETA: &str = "oauth-2025-04-20";

impl Credential {
    /// What must never be seen: to be hidden from logs.
    pub fn secrets(&self) -> Vec<&Secret> {
        match self {
            Self::ApiKey(key) => vec![key],
            Self::OAuth {
                access, refresh, ..
            } => [access].into_iter().chain(refresh).collect(),
            Self::Rehearsal => Vec::new(),
        }
    }

    /// Puts the credential into the headers of an upstream request, whose own auth headers are
    /// expected to be gone already.
    pub(super) fn apply(&self, headers: &mut HeaderMap) -> Result<(), GatewayError> {
        match self {
            Self::ApiKey(key) => {
                headers.insert(API_KEY, sensitive(key.expose())?);
            }
            Self::OAuth { access, .. } => {
                let bearer = sensitive(&format!("Bearer {}", access.expose()))?;
                headers.insert(header::AUTHORIZATION, bearer);
                add_beta(headers, OAUTH_BETA);
            }
            Self::Rehearsal => {
                headers.insert(API_KEY, HeaderValue::from_static("rehearsal"));
            }
        }
        Ok(())
    }
}

fn sensitive(text: &str) -> Result<HeaderValue, GatewayError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| GatewayError::UnusableCredential)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Adds `beta` to the comma-separated list unless it stands there already, in whichever of several
/// header lines.
fn add_beta(headers: &mut HeaderMap, beta: &str) {
    let mut list: Vec<String> = headers
        .get_all(&BETA)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|item| item.trim().to_owned())
        .filter(|item| !item.is_empty())
        .collect();
    if !list.iter().any(|item| item == beta) {
        list.push(beta.to_owned());
    }
    if let Ok(value) = HeaderValue::from_str(&list.join(",")) {
        headers.insert(BETA, value);
    }
}

/// The shapes a credentials file may have: ours, and the one the CLI itself writes at login.
#[derive(Deserialize)]
struct CredentialsFile {
    api_key: Option<String>,
    #[serde(alias = "claudeAiOauth")]
    oauth: Option<OAuthEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OAuthEntry {
    access_token: String,
    refresh_token: Option<String>,
    /// Unix milliseconds.
    expires_at: Option<i64>,
}

/// Reads a credentials file: `{"type":"api_key","api_key":…}`,
/// `{"type":"oauth","oauth":{accessToken,refreshToken,expiresAt}}`, or what the CLI's own login
/// writes. Warns if others than its owner may read it.
///
/// # Errors
/// [`GatewayError::ReadCredentials`] and [`GatewayError::ParseCredentials`]; neither repeats
/// anything of the file's content.
pub fn load_credentials_file(path: &Path) -> Result<Credential, GatewayError> {
    let read = || -> io::Result<(String, u32)> {
        Ok((
            fs::read_to_string(path)?,
            fs::metadata(path)?.permissions().mode() & 0o777,
        ))
    };
    let (text, mode) = read().map_err(|source| GatewayError::ReadCredentials {
        path: path.to_owned(),
        source,
    })?;
    if mode & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(),
            mode = format_args!("{mode:04o}"),
            "the credentials file can be read by others; make it 0600"
        );
    }
    // serde's own message quotes the value it stumbled over, which may be the secret.
    parse(&text).ok_or_else(|| GatewayError::ParseCredentials {
        path: path.to_owned(),
    })
}

/// Reads a file in one of these forms without a word about it. Blocking.
pub(super) fn read_quietly(path: &Path) -> Option<Credential> {
    parse(&fs::read_to_string(path).ok()?)
}

/// OAuth credentials in the form in which they are read.
pub(super) fn written(credential: &Credential) -> Option<String> {
    let Credential::OAuth {
        access,
        refresh,
        expires,
    } = credential
    else {
        return None;
    };
    let oauth = json!({
        "accessToken": access.expose(),
        "refreshToken": refresh.as_ref().map(Secret::expose),
        "expiresAt": expires.map(Timestamp::as_millisecond),
    });
    Some(json!({"type": "oauth", "oauth": oauth}).to_string())
}

fn parse(text: &str) -> Option<Credential> {
    let file: CredentialsFile = serde_json::from_str(text).ok()?;
    let secret = |text: String| {
        Some(text.trim())
            .filter(|text| !text.is_empty())
            .map(Secret::new)
    };
    if let Some(entry) = file.oauth {
        return Some(Credential::OAuth {
            access: secret(entry.access_token)?,
            refresh: entry.refresh_token.and_then(secret),
            expires: entry
                .expires_at
                .and_then(|ms| Timestamp::from_millisecond(ms).ok()),
        });
    }
    Some(Credential::ApiKey(secret(file.api_key?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "sk-canary-1234";

    #[test]
    fn files_of_both_kinds_and_of_the_cli_are_read() {
        let key = parse(&format!(r#"{{"type":"api_key","api_key":"{CANARY}\n"}}"#));
        assert_eq!(key, Some(Credential::ApiKey(Secret::new(CANARY))));
        let oauth = Credential::OAuth {
            access: Secret::new("a"),
            refresh: Some(Secret::new("r")),
            expires: Some("2026-11-21T00:00:00Z".parse().unwrap()),
        };
        let entry = r#"{"accessToken":"a","refreshToken":"r","expiresAt":1795219200000,"x":1}"#;
        assert_eq!(
            parse(&format!(r#"{{"type":"oauth","oauth":{entry}}}"#)),
            Some(oauth.clone())
        );
        assert_eq!(
            parse(&format!(r#"{{"claudeAiOauth":{entry}}}"#)),
            Some(oauth)
        );
        for bad in [
            "",
            "{}",
            r#"{"api_key":""}"#,
            r#"{"oauth":{"accessToken":" "}}"#,
            "[1]",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn no_message_repeats_the_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials.json");
        fs::write(&path, format!(r#"{{"oauth":"{CANARY}"}}"#)).unwrap();
        let error = load_credentials_file(&path).unwrap_err();
        let missing = load_credentials_file(&dir.path().join("none.json")).unwrap_err();
        let key = Credential::ApiKey(Secret::new(CANARY));
        for text in [
            format!("{error} {error:?}"),
            missing.to_string(),
            format!("{key:?}"),
        ] {
            assert!(!text.contains("canary"), "{text}");
        }
    }

    #[test]
    fn the_oauth_beta_stands_in_the_list_once() {
        let oauth = Credential::OAuth {
            access: Secret::new("a"),
            refresh: None,
            expires: None,
        };
        for (before, after) in [
            (vec![], "oauth-2025-04-20"),
            (vec!["x-1"], "x-1,oauth-2025-04-20"),
            (
                vec!["x-1, oauth-2025-04-20", "y-2"],
                "x-1,oauth-2025-04-20,y-2",
            ),
        ] {
            let mut headers = HeaderMap::new();
            for line in before {
                headers.append(BETA, HeaderValue::from_static(line));
            }
            oauth.apply(&mut headers).unwrap();
            assert_eq!(headers.get_all(BETA).iter().collect::<Vec<_>>(), [after]);
            assert_eq!(headers[header::AUTHORIZATION], "Bearer a");
        }
    }
}
