//! What a dev server prints: read all the time, kept by the last lines, turned into errors.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader},
    sync::mpsc,
};

use super::hmr::Word;

use crate::{
    domain::PreviewError,
    text::{Tail, cut},
};

const KEPT_LINES: usize = 40;
/// Longest error message, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Longest line that is read as one; what follows in it is skipped.
const MAX_LINE: usize = 64 * 1024;

/// Output of one run. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// Where errors go that are told in the log alone.
    words: Option<(Arc<Path>, mpsc::Sender<Word>)>,
    stdout: Arc<Mutex<Tail>>,
    stderr: Arc<Mutex<Tail>>,
    moved: Arc<AtomicBool>,
    out_of_memory: Arc<AtomicBool>,
}

/// Which of the two streams.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Output {
    pub(crate) fn new() -> Self {
        let tail = || Arc::new(Mutex::new(Tail::new(KEPT_LINES)));
        Self {
            words: None,
            stdout: tail(),
            stderr: tail(),
            moved: Arc::default(),
            out_of_memory: Arc::default(),
        }
    }

    /// One that also tells of the errors that Astro tells nobody but its log.
    pub(crate) fn telling(self, worktree: &Path, words: mpsc::Sender<Word>) -> Self {
        Self {
            words: Some((worktree.into(), words)),
            ..self
        }
    }

    /// Reads a stream to its end. Cancel safe as a task: what was read is kept.
    pub(crate) async fn read<R: AsyncRead + Unpin>(self, stream: Stream, source: R) {
        let mut source = BufReader::new(source);
        let mut line = Vec::new();
        while next_line(&mut source, &mut line).await {
            self.push(stream, &String::from_utf8_lossy(&line));
        }
    }

    fn push(&self, stream: Stream, line: &str) {
        tracing::debug!(target: "greenroom::dev_server", "{}", cut(line, 1000));
        // Vite and Astro take the next port when theirs is in use, and say no more than this.
        if line.contains("is in use, trying another") {
            self.moved.store(true, Ordering::Relaxed);
        }
        // V8's last words, before a long dump.
        if line.contains("JavaScript heap out of memory") {
            self.out_of_memory.store(true, Ordering::Relaxed);
        }
        if let Some((worktree, words)) = &self.words
            && let Some(word) = word_in(line, worktree)
        {
            // A driver that is that far behind has errors enough.
            words.try_send(word).ok();
        }
        let tail = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        tail.lock()
            .expect("no panic while a line is added")
            .push(line);
    }

    /// Did the server say that it went to another port?
    pub(crate) fn moved_port(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    /// Did it say that its memory was not enough?
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.out_of_memory.load(Ordering::Relaxed)
    }

    /// The last words of a server that ended: its stderr, or its stdout where that is empty.
    pub(crate) fn last_words(&self) -> String {
        [&self.stderr, &self.stdout]
            .iter()
            .map(|tail| {
                tail.lock()
                    .expect("no panic while a line is added")
                    .text(MAX_MESSAGE)
            })
            .find(|text| !text.is_empty())
            .unwrap_or_default()
    }
}

/// Reads up to and with the next newline; false at the end of the stream. A line longer than
/// [`MAX_LINE`] loses its end.
async fn next_line<R: AsyncBufRead + Unpin>(source: &mut R, line: &mut Vec<u8>) -> bool {
    line.clear();
    let mut began = false;
    loop {
        let Ok(chunk) = source.fill_buf().await else {
            return began;
        };
        if chunk.is_empty() {
            return began;
        }
        began = true;
        let end = chunk.iter().position(|b| *b == b'\n');
        let text = &chunk[..end.unwrap_or(chunk.len())];
        line.extend_from_slice(&text[..text.len().min(MAX_LINE - line.len())]);
        let used = end.map_or(chunk.len(), |end| end + 1);
        source.consume(used);
        if end.is_some() {
            return true;
        }
    }
}

/// Astro 7 keeps the old content when an entry breaks, and Vite the old files when it can't watch
/// them; both answer 200 and say it in the log alone (measured with 7.3.5).
fn word_in(line: &str, worktree: &Path) -> Option<Word> {
    if let Some((_, what)) = line.split_once("[glob-loader] ") {
        if let Some(name) = what.strip_prefix("Reloaded data from ") {
            let name = name.trim().to_owned();
            return Some(Word::Reloaded { name });
        }
        if what.contains("Failed to") {
            return Some(Word::Logged(error_from(what, worktree)));
        }
    }
    line.contains("file watcher error").then(|| {
        Word::Blind(PreviewError {
            message: "the dev server can't watch the site's files (the system's limit of watches \
                      is reached); what the preview shows may be old"
                .into(),
            ..PreviewError::default()
        })
    })
}

/// An error for a person from a server's last words: paths relative to the site, no stack, and
/// the first place in the site's own files that it names.
pub(crate) fn error_from(words: &str, worktree: &Path) -> PreviewError {
    let root = format!("{}/", worktree.display());
    let words = words.replace("file://", "").replace(&root, "");
    let place = place_in(&words);
    let message: Vec<&str> = words
        .lines()
        .filter(|line| !line.trim_start().starts_with("at ") && !line.contains("node:internal/"))
        .collect();
    let message = message.join("\n");
    match place {
        Some((file, line, column)) => PreviewError {
            file: Some(file),
            line: Some(line),
            column: Some(column),
            message,
        },
        None => PreviewError {
            message,
            ..PreviewError::default()
        },
    }
}

/// The first place in the site's own files that a text names; its paths are relative to the site.
pub(crate) fn place_in(text: &str) -> Option<(String, u32, u32)> {
    text.split_whitespace().find_map(place)
}

/// `path:line:column` of a file of the site, however it is bracketed.
fn place(word: &str) -> Option<(String, u32, u32)> {
    let word = word
        .trim_matches(|c: char| "()[]<>,;\"'`".contains(c))
        .trim_end_matches(':');
    let mut parts = word.rsplitn(3, ':');
    let column = parts.next()?.parse().ok()?;
    let line = parts.next()?.parse().ok()?;
    let file = parts.next()?;
    let is_ours = !file.is_empty()
        && !file.starts_with('/')
        && !file.contains("node_modules/")
        && !file.contains(':')
        && file.contains('.');
    is_ours.then(|| (file.to_owned(), line, column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_of_the_site() {
        let root = Path::new("/w/acme/threads/main");
        let words = "[config] Unexpected token\n  Location:\n    \
                     /w/acme/threads/main/astro.config.mjs:3:10\n    \
                     at Module (node:internal/modules/x:1:2)\n    at run (/opt/node/lib/x.js:1:1)";
        let error = error_from(words, root);
        assert_eq!(error.file.as_deref(), Some("astro.config.mjs"));
        assert_eq!((error.line, error.column), (Some(3), Some(10)));
        assert!(
            !error.message.contains("/w/acme") && !error.message.contains("/opt/node"),
            "{error:?}"
        );

        let content = "15:04:05 [ERROR] [glob-loader] Failed to reload p3.md: bad frontmatter";
        let Some(Word::Logged(error)) = word_in(content, root) else {
            panic!("an error");
        };
        assert_eq!(error.message, "Failed to reload p3.md: bad frontmatter");
        let mended = "15:04:06 [glob-loader] Reloaded data from p3.md";
        let name = "p3.md".to_owned();
        assert_eq!(word_in(mended, root), Some(Word::Reloaded { name }));
        let limit = "[ERROR] [vite] file watcher error: ENOSPC: System limit";
        assert!(matches!(word_in(limit, root), Some(Word::Blind(_))));
        assert_eq!(word_in("[200] / 4ms", root), None);

        let url = error_from("file:///w/acme/threads/main/src/a.ts:7:1: bad", root);
        assert_eq!((url.file.as_deref(), url.line), (Some("src/a.ts"), Some(7)));
        for nowhere in [
            "09:41:07 boom",
            "http://localhost:4321:1:2",
            "/etc/x.conf:1:2",
            "plain",
        ] {
            assert_eq!(error_from(nowhere, root).file, None, "{nowhere}");
        }
    }

    #[tokio::test]
    async fn an_endless_line_stays_small_and_the_next_one_is_seen() {
        let mut text = vec![b'x'; 5_000_000];
        text.extend_from_slice(b"\n\xff\nPort 4600 is in use, trying another one...");
        let output = Output::new();
        output.clone().read(Stream::Stderr, text.as_slice()).await;
        assert!(output.moved_port());
        let words = output.last_words();
        assert!(words.len() < MAX_MESSAGE && words.ends_with("trying another one..."));
    }
}
