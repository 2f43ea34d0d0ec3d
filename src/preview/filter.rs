//! What a dev server is never asked for. Pure.
//!
//! Sites stay on old versions for years, and Vite has served files that it should not have, time
//! and again, to requests that were spelled in unusual ways. So a request for a file is refused
//! here by what it names, whatever its query says; and one that is spelled so that two readers may
//! read it differently is refused because of that. (Tried with Vite 6.2.0 and 8.3.8.)

use std::{
    borrow::Cow,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Why a request goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It can be read in more than one way.
    Unclear,
    /// It names what is nobody's business.
    Private,
}

/// Folders whose files may be named by their whole path (`/@fs/…`): the worktree, and where its
/// dependencies lie.
#[derive(Debug, Clone, Default)]
pub(crate) struct Folders(Vec<PathBuf>);

impl Folders {
    pub(crate) const fn none() -> Self {
        Self(Vec::new())
    }

    /// These, by the paths that they are given and by their real ones. Blocking.
    pub(crate) fn resolve<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut all = Vec::new();
        for folder in folders {
            all.push(folder.to_owned());
            all.extend(folder.canonicalize().ok().filter(|real| real != folder));
        }
        Self(all)
    }

    /// What of a path is below one of them.
    fn rest<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        self.0.iter().find_map(|root| path.strip_prefix(root).ok())
    }
}

/// May this be asked of a dev server?
///
/// # Errors
/// Why not.
pub(crate) fn judge(path: &str, query: Option<&str>, folders: &Folders) -> Result<(), Refusal> {
    let path = judge_path(path, folders)?;
    let Some(query) = query else { return Ok(()) };
    // Vite took off one `?` where there were two, and then believed to have looked already.
    if query.contains('?') && steers_vite(&percent_decode(query)) {
        return Err(Refusal::Unclear);
    }
    // Astro's image service reads the file that it is told.
    if path.ends_with(b"/_image") {
        for value in query
            .split('&')
            .filter_map(|pair| pair.strip_prefix("href="))
        {
            let href = percent_decode(value);
            let href = std::str::from_utf8(&href).map_err(|_| Refusal::Unclear)?;
            if href.starts_with('/') {
                judge_path(href.split(['?', '#']).next().unwrap_or(href), folders)?;
            }
        }
    }
    Ok(())
}

/// Judges a path; answers what it is once decoded.
fn judge_path<'a>(path: &'a str, folders: &Folders) -> Result<Cow<'a, [u8]>, Refusal> {
    if has_bad_escape(path.as_bytes()) {
        return Err(Refusal::Unclear);
    }
    let path = percent_decode(path);
    if std::str::from_utf8(&path).is_err()
        || path.iter().any(|byte| matches!(byte, 0 | b'\\'))
        || percent_decode_bytes(&path).is_some()
    {
        return Err(Refusal::Unclear);
    }
    let mut segments = path.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_empty_within = segment.is_empty() && segments.peek().is_some();
        if is_empty_within || matches!(segment, b"." | b"..") {
            return Err(Refusal::Unclear);
        }
    }
    // Of a whole path only what is below the folder counts: that one may lie where it likes.
    let mut below = &*path;
    if let Some(at) = find(&path, b"/@fs/") {
        let whole = Path::new(OsStr::from_bytes(&path[at + b"/@fs".len()..]));
        let rest = folders.rest(whole).ok_or(Refusal::Private)?;
        if is_private_path(&path[..at]) {
            return Err(Refusal::Private);
        }
        // As long as the original's end.
        below = &path[path.len() - rest.as_os_str().len()..];
    }
    if is_private_path(below) {
        return Err(Refusal::Private);
    }
    Ok(path)
}

fn is_private_path(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(is_private)
}

/// Is this name of a file or folder, or of a door of Vite's, closed to everybody?
fn is_private(name: &[u8]) -> bool {
    let has = |end: &[u8]| {
        let at = name.len().checked_sub(end.len());
        at.is_some_and(|at| name[at..].eq_ignore_ascii_case(end))
    };
    let begins =
        |start: &[u8]| name.len() >= start.len() && name[..start.len()].eq_ignore_ascii_case(start);
    let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
    begins(b".env")
        || [
            ".git",
            ".claude",
            ".greenroom",
            ".npmrc",
            "__open-in-editor",
        ]
        .iter()
        .any(|other| is(other.as_bytes()))
        || [".pem", ".key", ".crt"]
            .iter()
            .any(|end| has(end.as_bytes()))
}

/// Does a query hold a word by which Vite answers with a file as it lies there?
fn steers_vite(query: &[u8]) -> bool {
    let query = query.to_ascii_lowercase();
    [
        "raw",
        "url",
        "inline",
        "import",
        "init",
        "wasm",
        "svg",
        "worker",
        "direct",
        "html-proxy",
    ]
    .iter()
    .any(|word| find(&query, word.as_bytes()).is_some())
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

fn has_bad_escape(text: &[u8]) -> bool {
    let is_escape = |at: usize| text.get(at + 1..at + 3).is_some_and(is_hex);
    (0..text.len()).any(|at| text[at] == b'%' && !is_escape(at))
}

fn is_hex(digits: &[u8]) -> bool {
    digits.iter().all(u8::is_ascii_hexdigit)
}

/// A path that may be asked for, decoded.
pub(crate) fn plain_path(path: &str) -> Cow<'_, [u8]> {
    percent_decode(path)
}

fn percent_decode(text: &str) -> Cow<'_, [u8]> {
    match percent_decode_bytes(text.as_bytes()) {
        Some(decoded) => Cow::Owned(decoded),
        None => Cow::Borrowed(text.as_bytes()),
    }
}

/// Decodes once; `None` if there is nothing to decode. What is no escape stays.
fn percent_decode_bytes(text: &[u8]) -> Option<Vec<u8>> {
    if !text.contains(&b'%') {
        return None;
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    let mut has_changed = false;
    while let Some((byte, after)) = rest.split_first() {
        let code = after
            .get(..2)
            .filter(|digits| *byte == b'%' && is_hex(digits))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => {
                decoded.push(code);
                rest = &after[2..];
                has_changed = true;
            }
            None => {
                decoded.push(*byte);
                rest = after;
            }
        }
    }
    has_changed.then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(target: &str) -> Result<(), Refusal> {
        let folders = Folders(vec!["/w/.greenroom/acme/t".into(), "/cache/acme".into()]);
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        judge(path, query, &folders)
    }

    #[test]
    fn attacks_are_refused() {
        for target in [
            "/@fs/etc/passwd",
            "/@fs/w/.greenroom/acme/other/src/a.js",
            "/@fs/w/.greenroom/acme/t2/a.js",
            "/@fs/w/.greenroom/acme/t/.env",
            "/@fs/w/.greenroom/acme/t/.git/config",
            "/docs/@fs/etc/passwd",
            "/%40fs/etc/passwd",
            "/@fs%2Fetc/passwd",
            "/.env",
            "/.env.local",
            "/.ENV",
            "/%2eenv",
            "/sub/.env?raw",
            "/.env/",
            "/x.pem",
            "/x.PEM?url",
            "/x.pem/",
            "/x.key?import",
            "/certs/x.crt",
            "/.git/config",
            "/.git/config?raw",
            "/.claude/settings.json",
            "/.greenroom/x",
            "/.npmrc",
            "/__open-in-editor?file=src/a.astro",
            "/__Open-In-Editor/x?file=a",
            "/docs/__open-in-editor?file=a",
            "/_image?href=%2F%40fs%2Fetc%2Fpasswd&f=svg",
            "/_image?w=3&href=/@fs/etc/x.png",
            "/_image?href=%2F.env",
            "/_image?href=%2F%2540fs%2Fetc%2Fpasswd",
        ] {
            assert_eq!(judged(target), Err(Refusal::Private), "{target}");
        }
        for target in [
            "/@fs/etc/passwd?import&raw??",
            "/.env?raw??",
            "/.env?%72aw??",
            "/.env?import&?inline=1.wasm?init",
            "/etc/passwd?import&?inline=1.wasm?init",
            "/etc/passwd?.svg?.wasm?init",
            "/../../../etc/passwd?.svg?.wasm?init",
            "/@fs/w/.greenroom/acme/t/../../../etc/passwd",
            "/@fs/w/.greenroom/acme/t/%2e%2e/other",
            "/.env/.",
            "/x.pem/.",
            "/x.pem/%2e",
            "/..%2f..%2findex.html",
            "/%2e%2e/index.html",
            "/%252e%252e/x",
            "/a%255c..%255cx",
            "//.env",
            "/a//b",
            "/%2f.env",
            "/\\.env",
            "/%5c.env",
            "/.env%00",
            "/@id//abs/file",
            "/@id/%2fabs/file",
            "/node_modules/.vite/deps/../../../etc/passwd.map",
            "/node_modules/.vite/deps/%2e%2e/%2e%2e/x.map",
            "/a%",
            "/a%zz",
            "/%ff",
            "/_image?href=%2F@fs%2Fcache%2Facme%2F..%2Fx.png",
            "/_image?href=%2F%2Fevil.example%2Fx.png",
        ] {
            let judged = judged(target);
            // Whichever of its faults is seen first.
            assert!(judged.is_err(), "{target}");
            if !target.contains("env") && !target.contains("/@fs/etc") && !target.contains("pem") {
                assert_eq!(judged, Err(Refusal::Unclear), "{target}");
            }
        }
    }

    #[test]
    fn what_vite_astro_and_people_ask_for_passes() {
        for target in [
            "/",
            "/about",
            "/about/",
            "/blog/caf%C3%A9-%E6%97%A5%E6%9C%AC",
            "/blog/caf\u{e9}",
            "/blog/100%25-wool",
            "/blog/c%23",
            "/search?q=what?",
            "/search?q=100%",
            "/login?next=/a?b=1",
            "/@vite/client",
            "/@vite/env",
            "/@react-refresh",
            "/node_modules/.vite/deps/react.js?v=8a3c",
            "/node_modules/vite/dist/client/env.mjs",
            "/src/a.svg?import",
            "/src/a.svg?import&t=1795247632546",
            "/src/pages/index.astro?t=1",
            "/src/style.css?url",
            "/src/text.txt?raw",
            "/src/text.txt?import&raw",
            "/@id/astro:scripts/before-hydration.js",
            "/@id/__x00__virtual:my-module",
            "/@id/astro/runtime/client/dev-toolbar/entrypoint.js",
            "/src/components/Card.astro?astro&type=style&index=0&lang.css",
            "/@fs/w/.greenroom/acme/t/src/a.png?origWidth=3&origFormat=png",
            "/@fs/cache/acme/m/node_modules/vite/dist/client/client.mjs",
            "/@fs/w/.greenroom/acme/t/src/caf%C3%A9.png",
            "/_image?href=%2F%40fs%2Fw%2F.greenroom%2Facme%2Ft%2Fsrc%2Fa.png%3ForigWidth%3D3%26origFormat%3Dsvg&w=10&f=webp",
            "/_image?href=%2Fphoto%20one.png&f=webp",
            "/_image?href=https%3A%2F%2Fcdn.example%2Fx.png",
            "/_astro/status",
            "/.well-known/security.txt",
            "/environment",
            "/key",
            "/a.keys",
            "*",
        ] {
            assert_eq!(judged(target), Ok(()), "{target}");
        }
    }
}
