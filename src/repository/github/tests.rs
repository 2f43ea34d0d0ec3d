//! Pull requests at a stand-in for the API.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use super::*;
use crate::repository::parse_source;

const TOKEN: &str = "hunter2-canary";

/// A stand-in: the first part of the repository's owner says how it behaves.
#[derive(Default)]
struct Hub {
    /// Title, head, base and body of each pull request that was opened.
    opened: Vec<(String, Value)>,
    /// Method and path of each request.
    asked: Vec<String>,
    unauthorized: usize,
}

fn start() -> (Arc<Mutex<Hub>>, GitHub) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = format!("http://{}/api", listener.local_addr().unwrap());
    let hub = Arc::new(Mutex::new(Hub::default()));
    let shared = Arc::clone(&hub);
    thread::spawn(move || {
        for stream in listener.incoming() {
            serve(&stream.unwrap(), &shared);
        }
    });
    let remotes = Remotes::new(Some(TOKEN.into()), Vec::new());
    (hub, GitHub::new(Url::parse(&api).unwrap(), remotes))
}

fn serve(stream: &TcpStream, hub: &Mutex<Hub>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap() == 0 {
            return;
        }
    }
    let header = |name: &str| {
        let mut lines = head
            .lines()
            .map(|line| line.split_once(": ").unwrap_or_default());
        lines
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    };
    let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body).unwrap();
    let line = head
        .lines()
        .next()
        .unwrap()
        .strip_suffix(" HTTP/1.1")
        .unwrap();
    let (status, extra, answer) = {
        let mut hub = hub.lock().unwrap();
        hub.asked.push(line.to_owned());
        if header("authorization") != Some("Bearer hunter2-canary") {
            hub.unauthorized += 1;
        }
        judge(&mut hub, line, &body)
    };
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{extra}Content-Length: {}\r\nConnection: close\r\n\r\n{answer}",
        answer.len()
    )
    .unwrap();
}

fn judge(hub: &mut Hub, line: &str, body: &[u8]) -> (u16, &'static str, String) {
    let (method, path) = line.split_once(' ').unwrap();
    let path = path.strip_prefix("/api/repos/").unwrap();
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let (owner, rest) = path.split_once('/').unwrap();
    let says = |status, text: &str| (status, "", json!({"message": text}).to_string());
    match owner {
        "stranger" => return says(404, "Not Found"),
        "expired" => return says(401, "Bad credentials"),
        "readonly" if method == "POST" => {
            return says(403, "Resource not accessible by hunter2-canary \u{1b}[31m");
        }
        "busy" => return (429, "Retry-After: 60\r\n", "{}".into()),
        "spent" => return (403, "x-ratelimit-remaining: 0\r\n", "{}".into()),
        "flaky" if hub.asked.len() == 1 => return says(502, "Bad Gateway"),
        "away" => {
            return (
                301,
                "Location: http://127.0.0.1:1/elsewhere\r\n",
                "{}".into(),
            );
        }
        "old" => return (301, "Location: /api/repos/acme/site\r\n", "{}".into()),
        "nothing" if method == "POST" => {
            let why = json!({"message": "Validation Failed",
                "errors": [{"message": "No commits between main and client/acme"}]});
            return (422, "", why.to_string());
        }
        _ => {}
    }
    let sent = |number: usize| json!({"number": number, "html_url": format!("https://github.com/{owner}/site/pull/{number}")});
    match (method, rest) {
        ("GET", "site") => {
            let there = json!({"full_name": format!("{owner}/site"), "default_branch": "main"});
            (200, "", there.to_string())
        }
        ("GET", "site/pulls") => {
            let base = query.rsplit_once("base=").unwrap().1;
            assert!(
                query.contains(&format!("state=open&head={owner}%3Aclient%2Facme")),
                "{query}"
            );
            let numbered = hub.opened.iter().enumerate();
            let found: Vec<_> = numbered
                .filter(|(_, (whose, pull))| whose == owner && pull["base"] == base)
                .map(|(at, _)| sent(at + 1))
                .collect();
            // Opened a moment ago by somebody else.
            if owner == "hidden" && hub.asked.iter().any(|line| line.starts_with("POST")) {
                return (200, "", json!([sent(9)]).to_string());
            }
            (200, "", json!(found).to_string())
        }
        ("POST", "site/pulls") if owner == "hidden" => {
            let why = json!({"message": "Validation Failed",
                "errors": [{"message": "A pull request already exists for hidden:client/acme."}]});
            (422, "", why.to_string())
        }
        ("POST", "site/pulls") => {
            let pull = serde_json::from_slice(body).unwrap();
            hub.opened.push((owner.to_owned(), pull));
            (201, "", sent(hub.opened.len()).to_string())
        }
        other => panic!("{other:?}"),
    }
}

fn text(base: Option<&str>) -> PullRequestText {
    PullRequestText {
        title: "Spring campaign".into(),
        body: "Please look.".into(),
        base: base.map(str::to_owned),
    }
}

async fn open(
    github: &GitHub,
    owner: &str,
    base: Option<&str>,
) -> Result<Option<PullRequest>, RemoteError> {
    let origin = parse_source(&format!("https://github.com/{owner}/site.git"), None).unwrap();
    let repository = github.repository(&origin).unwrap();
    repository
        .open_pull_request("client/acme", &text(base))
        .await
}

#[tokio::test]
async fn a_pull_request_is_opened_once_and_found_again() {
    let (hub, github) = start();
    let first = open(&github, "acme", None).await.unwrap().unwrap();
    assert_eq!((first.number, first.created), (1, true));
    assert_eq!(first.url, "https://github.com/acme/site/pull/1");
    for owner in ["acme", "old"] {
        let again = open(&github, owner, None).await.unwrap().unwrap();
        assert_eq!((again.number, again.created), (1, false), "{owner}");
    }
    let other = open(&github, "acme", Some("staging"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((other.number, other.created), (2, true));
    let hidden = open(&github, "hidden", None).await.unwrap().unwrap();
    assert_eq!((hidden.number, hidden.created), (9, false));
    assert_eq!(open(&github, "nothing", None).await, Ok(None));
    let hub = hub.lock().unwrap();
    assert_eq!(
        hub.opened[0].1,
        json!({"title": "Spring campaign", "body": "Please look.", "head": "client/acme", "base": "main"})
    );
    assert_eq!((hub.opened.len(), hub.unauthorized), (2, 0));
}

#[tokio::test]
async fn failures_say_what_to_do_and_no_secret() {
    use RemoteErrorKind::{Auth, Network, Rejected};
    let (_hub, github) = start();
    assert!(open(&github, "flaky", None).await.unwrap().unwrap().created);
    for (owner, kind, part) in [
        ("stranger", Auth, "there is no repository stranger/site"),
        ("expired", Auth, "GITHUB_TOKEN"),
        (
            "readonly",
            Auth,
            "may not open pull requests here; it says: Resource not accessible by ***",
        ),
        ("busy", Network, "in a few minutes"),
        ("spent", Network, "in a few minutes"),
        ("away", Rejected, "redirects to another place"),
    ] {
        let error = open(&github, owner, None).await.unwrap_err();
        assert_eq!(
            (error.kind, error.during),
            (kind, RemoteUse::PullRequest),
            "{owner}: {error}"
        );
        assert!(error.message.contains(part), "{owner}: {error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
    let nobody = GitHub::new(
        Url::parse("http://127.0.0.1:1").unwrap(),
        github.remotes.clone(),
    );
    let error = open(&nobody, "acme", None).await.unwrap_err();
    assert_eq!(error.kind, Network, "{error}");
}

#[test]
fn only_repositories_on_github_have_them() {
    let (_, github) = start();
    let repository = |url: &str| {
        let found = github.repository(&parse_source(url, None).unwrap());
        found.map(|found| format!("{}/{}", found.owner, found.name))
    };
    assert_eq!(
        repository("https://github.com/acme/site.git"),
        Ok("acme/site".into())
    );
    assert_eq!(
        repository("git@github.com:acme/site.git"),
        Ok("acme/site".into())
    );
    for other in [
        "https://gitlab.com/acme/site",
        "https://github.com/acme",
        "https://github.com/a/b/c",
    ] {
        assert_eq!(repository(other), Err(NoPullRequests::NotGitHub), "{other}");
    }
    let template = Source::Template(Vec::new());
    assert_eq!(
        github.repository(&template).unwrap_err(),
        NoPullRequests::NotGitHub
    );
    let without = GitHub::new(github.api.clone(), Remotes::default());
    let origin = parse_source("https://github.com/acme/site", None).unwrap();
    assert_eq!(
        without.repository(&origin).unwrap_err(),
        NoPullRequests::NoToken
    );
    let named = Remotes::new(Some(TOKEN.into()), vec!["git.acme.com".into()]);
    let enterprise = GitHub::new(github.api.clone(), named);
    let origin = parse_source("https://git.acme.com/acme/site", None).unwrap();
    assert!(enterprise.repository(&origin).is_ok());
}
