//! What the proxy itself answers: the holding page, its status, the presence script, and pages
//! for requests that lead nowhere. Pure: text in, answers out.

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY,
        RETRY_AFTER, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
    },
};

use crate::domain::{PreviewError, PreviewState, PreviewStatus};

/// Everything below is answered by the proxy and never reaches a site.
pub(crate) const OWN_PREFIX: &str = "/__greenroom/";
pub(crate) const STATUS: &str = "/__greenroom/status";
pub(crate) const PRESENCE: &str = "/__greenroom/presence";
pub(crate) const PRESENCE_SCRIPT: &str = "/__greenroom/presence.js";
pub(crate) const BANNER_SCRIPT: &str = "/__greenroom/banner.js";
pub(crate) const HOLDING_SCRIPT: &str = "/__greenroom/holding.js";

/// Stands at the end of every HTML document of a site.
pub(crate) const PRESENCE_TAG: &str =
    "\n<script src=\"/__greenroom/presence.js\" defer></script>\n";

/// The same where errors are told in a banner.
pub(crate) const BANNER_TAG: &str = "\n<script src=\"/__greenroom/presence.js\" defer></script>\
     \n<script src=\"/__greenroom/banner.js\" defer></script>\n";
/// The same of a page that is shown as it was.
const LAST_GOOD_TAG: &str = "\n<script src=\"/__greenroom/presence.js\" defer></script>\
     \n<script src=\"/__greenroom/banner.js\" data-last-good defer></script>\n";

const TEMPLATE: &str = include_str!("holding.html");
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
/// Our pages load nothing from elsewhere and run no script but ours, whatever an error text says.
const POLICY: &str = "default-src 'none'; script-src 'self'; connect-src 'self'; \
                      style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// An answer of the proxy's own. Boxed, because it often stands where an error does.
pub(crate) type Page = Box<Response<Bytes>>;

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Page {
    let mut response = Box::new(Response::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if kind == HTML {
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    }
    response
}

/// The page that stands in for a site that isn't there yet, and becomes it by itself.
pub(crate) fn holding(status: &PreviewStatus) -> Page {
    let (name, title) = match status.state {
        PreviewState::Error => ("error", "The preview has a problem"),
        PreviewState::Off => ("off", "This preview is switched off"),
        _ => ("starting", "Your preview is on its way"),
    };
    let errors: Vec<String> = status.errors.iter().map(error_text).collect();
    let scripts = format!(
        "<script src=\"{HOLDING_SCRIPT}\" defer></script>\n<script src=\"{PRESENCE_SCRIPT}\" \
         defer></script>"
    );
    let page = page(
        name,
        title,
        &status.progress,
        &errors.join("\n\n"),
        &scripts,
    );
    let mut response = answer(StatusCode::SERVICE_UNAVAILABLE, HTML, page);
    response
        .headers_mut()
        .insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A page as it was before it broke, with a line that says so. `status` is what it answers now.
pub(crate) fn last_good(status: StatusCode, html: &Bytes) -> Page {
    let page = [&**html, LAST_GOOD_TAG.as_bytes()].concat();
    let mut response = answer(status, HTML, page);
    // It is the site's page, and loads what the site loads.
    response.headers_mut().remove(CONTENT_SECURITY_POLICY);
    response
}

fn error_text(error: &PreviewError) -> String {
    match (&error.file, error.line) {
        (Some(file), Some(line)) => format!("{file}:{line}\n{}", error.message),
        (Some(file), None) => format!("{file}\n{}", error.message),
        _ => error.message.clone(),
    }
}

/// One problem, as a page for people and as a line for programs.
pub(crate) fn problem(status: StatusCode, title: &str, text: &str, as_page: bool) -> Page {
    let mut response = if as_page {
        answer(status, HTML, page("none", title, text, "", ""))
    } else {
        answer(
            status,
            "text/plain; charset=utf-8",
            format!("{title}: {text}\n"),
        )
    };
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// To the same page without the token, with the cookies that it was exchanged for.
pub(crate) fn redirect(location: &str, cookies: &[String]) -> Page {
    let mut response = empty(StatusCode::SEE_OTHER);
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Ok(location) = HeaderValue::from_str(location) {
        headers.insert(LOCATION, location);
    }
    for cookie in cookies
        .iter()
        .filter_map(|text| HeaderValue::from_str(text).ok())
    {
        headers.append(SET_COOKIE, cookie);
    }
    response
}

/// The state as the holding page asks for it.
pub(crate) fn status(status: &PreviewStatus) -> Page {
    let body = serde_json::json!({
        "state": status.state,
        "progress": status.progress,
        "errors": status.errors,
        "generation": status.generation,
    });
    answer(StatusCode::OK, "application/json", body.to_string())
}

pub(crate) fn presence_script() -> Page {
    let mut response = answer(
        StatusCode::OK,
        SCRIPT,
        Bytes::from_static(include_bytes!("presence.js")),
    );
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("max-age=300"));
    response
}

pub(crate) fn banner_script() -> Page {
    answer(
        StatusCode::OK,
        SCRIPT,
        Bytes::from_static(include_bytes!("banner.js")),
    )
}

pub(crate) fn holding_script() -> Page {
    answer(
        StatusCode::OK,
        SCRIPT,
        Bytes::from_static(include_bytes!("holding.js")),
    )
}

/// A file of a site's package.
pub(crate) fn file(kind: &'static str, bytes: Bytes) -> Page {
    let mut response = answer(StatusCode::OK, kind, bytes);
    // As the dev server has it: packages change under their names.
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Page {
    let mut response = Box::new(Response::new(Bytes::new()));
    *response.status_mut() = status;
    response
}

/// Fills the template in one pass, so that no value is looked into for another's place.
fn page(state: &str, title: &str, text: &str, errors: &str, scripts: &str) -> String {
    let hidden = if errors.is_empty() { " hidden" } else { "" };
    let mut page = String::with_capacity(TEMPLATE.len() + errors.len() + 256);
    let mut rest = TEMPLATE;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        page.push_str(before);
        let values = [
            ("{state}", escape(state)),
            ("{title}", escape(title)),
            ("{text}", escape(text)),
            ("{errors}", escape(errors)),
            ("{hidden}", hidden.to_owned()),
            ("{scripts}", scripts.to_owned()),
        ];
        match values.iter().find(|(name, _)| from.starts_with(name)) {
            Some((name, value)) => {
                page.push_str(value);
                rest = &from[name.len()..];
            }
            None => {
                page.push('{');
                rest = &from[1..];
            }
        }
    }
    page.push_str(rest);
    page
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holding_page_says_what_happens_and_trusts_no_text() {
        let status = PreviewStatus {
            state: PreviewState::Error,
            errors: vec![PreviewError {
                file: Some("src/a.astro".to_owned()),
                line: Some(3),
                column: None,
                message: "</pre><script>alert(1)</script> {scripts}".to_owned(),
            }],
            upstream: None,
            generation: 4,
            updates: 0,
            told_at: 0,
            progress: "Trying {errors} again".to_owned(),
        };
        let response = holding(&status);
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()["retry-after"], "1");
        let page = String::from_utf8(response.into_body().to_vec()).unwrap();
        assert!(
            page.contains("src/a.astro:3\n&lt;/pre&gt;&lt;script&gt;"),
            "{page}"
        );
        assert!(page.contains("Trying {errors} again"));
        assert!(!page.contains("{title}") && !page.contains("<script>alert"));
        assert!(
            !page.contains("http://") && !page.contains("https://"),
            "nothing from elsewhere"
        );
        assert_eq!(page.matches("<script ").count(), 2);
    }

    #[test]
    fn problems_are_pages_for_people_and_lines_for_programs() {
        let for_people = problem(StatusCode::NOT_FOUND, "No preview", "Nothing here.", true);
        assert_eq!(for_people.headers()["content-type"], HTML);
        let for_programs = problem(StatusCode::NOT_FOUND, "No preview", "Nothing here.", false);
        assert_eq!(for_programs.body(), "No preview: Nothing here.\n");
    }
}
