//! What a request's address says, and our words for one that cannot be understood: axum's own
//! extractors answer with a form of theirs.

use axum::{
    extract::{self, FromRequestParts},
    http::request::Parts,
};
use serde::de::DeserializeOwned;

use super::ApiError;

/// The parts of the path that a route names.
#[derive(Debug)]
pub(super) struct Path<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = extract::Path::from_request_parts(parts, state).await;
        // All that can be wrong with one that a route has taken.
        let wrong = |_| ApiError::invalid("the address's path is no UTF-8 behind its %");
        path.map(|extract::Path(path)| Self(path)).map_err(wrong)
    }
}

/// What stands behind the question mark.
#[derive(Debug)]
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = extract::Query::from_request_parts(parts, state).await;
        query
            .map(|extract::Query(query)| Self(query))
            .map_err(|rejection| {
                let cause = std::error::Error::source(&rejection).map(ToString::to_string);
                let cause = cause.unwrap_or_else(|| "it is not well-formed".to_owned());
                ApiError::invalid(format!("the address behind the question mark: {cause}"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{http::Request, response::IntoResponse};
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Asked {
        from: Option<String>,
    }

    #[tokio::test]
    async fn a_query_that_cannot_be_read_is_told_in_our_form() {
        for (uri, is_fine) in [
            ("/x", true),
            ("/x?from=1&other=2", true),
            ("/x?from=1&from=2", false),
        ] {
            let (mut parts, ()) = Request::get(uri).body(()).unwrap().into_parts();
            match Query::<Asked>::from_request_parts(&mut parts, &()).await {
                Ok(Query(asked)) => {
                    assert_eq!((asked.from.is_some(), is_fine), (uri != "/x", true))
                }
                Err(error) => {
                    assert!(!is_fine, "{uri}");
                    assert!(
                        format!("{error:?}").contains("duplicate field `from`"),
                        "{error:?}"
                    );
                    assert_eq!(error.into_response().status(), 400);
                }
            }
        }
    }
}
