//! A hosting service on loopback: the real git over HTTPS, with a certificate of an authority of
//! its own, and the pull requests of GitHub's API.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    process::Command,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use super::{Folders, Options, git};

/// The token that may push and open pull requests.
pub(crate) const GIT_TOKEN: &str = "canary-git-token-51c0ffee";

/// See the module. It ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct Hosting {
    folders: Folders,
    port: u16,
    api_port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Method, path and query, and the `Authorization` header of each request for git.
    asked: Vec<(String, Option<String>)>,
    /// So many answers to pushes are lost, although the push was taken.
    lost_answers: usize,
    /// Answers to pushes do not come.
    is_silent: bool,
    /// Pull requests that were opened: the repository and what was sent.
    pulls: Vec<(String, Value)>,
    /// A status that the API answers everything with.
    api_status: Option<u16>,
}

impl Hosting {
    /// Starts both servers.
    pub(crate) async fn start(folders: &Folders) -> Self {
        let acceptor = acceptor(&folders.join("authority.pem"));
        let git_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hosting = Self {
            folders: folders.clone(),
            port: git_listener.local_addr().unwrap().port(),
            api_port: api_listener.local_addr().unwrap().port(),
            state: Arc::default(),
        };
        let here = hosting.clone();
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        tokio::spawn(async move {
            while let Ok((socket, _)) = git_listener.accept().await {
                let (here, acceptor) = (here.clone(), acceptor.clone());
                #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(socket).await {
                        serve(stream, |request| here.git(request)).await;
                    }
                });
            }
        });
        let here = hosting.clone();
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        tokio::spawn(async move {
            while let Ok((socket, _)) = api_listener.accept().await {
                let here = here.clone();
                #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
                tokio::spawn(async move {
                    serve(socket, |request| here.api(request)).await;
                });
            }
        });
        hosting
    }

    /// The program's settings for it.
    pub(crate) fn known_to(&self, options: Options) -> Options {
        options
            .env("SSL_CERT_FILE", self.authority())
            .env("GIT_TOKEN_HOSTS", "localhost")
            .env("GITHUB_TOKEN", GIT_TOKEN)
            .env(
                "GITHUB_API_URL",
                format!("http://127.0.0.1:{}", self.api_port),
            )
    }

    /// The certificate of its authority.
    pub(crate) fn authority(&self) -> PathBuf {
        self.folders.join("authority.pem")
    }

    /// A new bare repository with one commit of these files on `main`: its address.
    pub(crate) fn site(&self, name: &str, files: &[(&str, &str)]) -> String {
        let from = self.folders.site(&format!("{name}-seed"), files);
        let bare = self.bare(name);
        fs::create_dir_all(bare.parent().unwrap()).unwrap();
        let to = bare.to_str().unwrap();
        git(
            self.folders.join("hosted"),
            &["clone", "--quiet", "--bare", &from, to],
        );
        self.url(&format!("acme/{name}"))
    }

    /// An address of it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://localhost:{}/{path}", self.port)
    }

    /// Where a repository lies.
    pub(crate) fn bare(&self, name: &str) -> PathBuf {
        self.folders.join("hosted/acme").join(format!("{name}.git"))
    }

    /// Somebody else's push to a branch: a file with this content, or without one none.
    pub(crate) fn commit(&self, name: &str, branch: &str, file: &str, content: Option<&str>) {
        let clone = self
            .folders
            .join(format!("elsewhere-{}", uuid::Uuid::new_v4()));
        let (from, to) = (self.bare(name), clone.to_str().unwrap());
        let from = from.to_str().unwrap();
        git(
            self.folders.join("hosted"),
            &["clone", "--quiet", "--branch", branch, from, to],
        );
        let path = clone.join(file);
        match content {
            Some(content) => {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            None => fs::remove_file(path).unwrap(),
        }
        git(&clone, &["add", "--all"]);
        git(&clone, &["commit", "--quiet", "--message=Somebody else's"]);
        git(&clone, &["push", "--quiet", "origin", branch]);
    }

    /// Lets the server refuse every push with these words.
    pub(crate) fn refuse(&self, name: &str, words: &str) {
        let hook = self.bare(name).join("hooks/pre-receive");
        fs::create_dir_all(hook.parent().unwrap()).unwrap();
        fs::write(
            &hook,
            format!("#!/bin/sh\nprintf '{words}\\n' >&2\nexit 1\n"),
        )
        .unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Lets it take pushes again.
    pub(crate) fn accept(&self, name: &str) {
        fs::remove_file(self.bare(name).join("hooks/pre-receive")).unwrap();
    }

    /// Requests for git so far, and their `Authorization`.
    pub(crate) fn asked(&self) -> Vec<(String, Option<String>)> {
        self.state.lock().unwrap().asked.clone()
    }

    /// Lets the answers to the next pushes be lost.
    pub(crate) fn lose_answers(&self, count: usize) {
        self.state.lock().unwrap().lost_answers = count;
    }

    /// Lets the answers to pushes not come, or come again. The push was taken.
    pub(crate) fn is_silent(&self, is_silent: bool) {
        self.state.lock().unwrap().is_silent = is_silent;
    }

    /// Lets the API answer everything with a status; `None`: as it should.
    pub(crate) fn api_answers(&self, status: Option<u16>) {
        self.state.lock().unwrap().api_status = status;
    }

    /// Pull requests that were opened so far.
    pub(crate) fn pulls(&self) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        state.pulls.iter().map(|(_, sent)| sent.clone()).collect()
    }

    async fn git(&self, request: Request<Incoming>) -> Option<Response<Full<Bytes>>> {
        let (head, body) = request.into_parts();
        let target = head.uri.path_and_query().unwrap().to_string();
        let authorization = head.headers.get("authorization");
        let authorization = authorization.map(|value| value.to_str().unwrap().to_owned());
        {
            let mut state = self.state.lock().unwrap();
            let line = format!("{} {target}", head.method);
            state.asked.push((line, authorization.clone()));
        }
        let body = body.collect().await.ok()?.to_bytes();
        let service = ["receive-pack", "upload-pack"]
            .into_iter()
            .find(|name| target.ends_with(&format!("git-{name}")))?;
        if service == "receive-pack" && authorization.is_none() {
            return Some(answer(401, "text/plain", "who are you?"));
        }
        let path = head.uri.path().trim_start_matches('/');
        let (repository, rest) = path.split_at(path.find("/info/refs").or(path.rfind("/git-"))?);
        let repository = repository.strip_suffix(".git").unwrap_or(repository);
        let folder = self
            .folders
            .join("hosted")
            .join(format!("{repository}.git"));
        if !folder.is_dir() {
            return Some(answer(404, "text/plain", "no such repository"));
        }
        let is_listing = rest == "/info/refs";
        #[expect(clippy::disallowed_methods, reason = "the real git is the other side")]
        let mut command = Command::new("git");
        command.args([service, "--stateless-rpc"]);
        if is_listing {
            command.arg("--advertise-refs");
        }
        let mut child = command
            .arg(folder)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&body).await.ok();
        drop(stdin);
        let output = child.wait_with_output().await.unwrap().stdout;
        if is_listing {
            let line = format!("# service=git-{service}\n");
            let mut listing = format!("{:04x}{line}0000", line.len() + 4).into_bytes();
            listing.extend(output);
            let kind = format!("application/x-git-{service}-advertisement");
            return Some(answer(200, &kind, listing));
        }
        if service == "receive-pack" && self.state.lock().unwrap().is_silent {
            std::future::pending::<()>().await;
        }
        if service == "receive-pack" {
            let mut state = self.state.lock().unwrap();
            if state.lost_answers > 0 {
                state.lost_answers -= 1;
                return None;
            }
        }
        let kind = format!("application/x-git-{service}-result");
        Some(answer(200, &kind, output))
    }

    async fn api(&self, request: Request<Incoming>) -> Option<Response<Full<Bytes>>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        let mut state = self.state.lock().unwrap();
        let json =
            |status, value: Value| Some(answer(status, "application/json", value.to_string()));
        if let Some(status) = state.api_status {
            return json(status, json!({"message": "no"}));
        }
        let token = head.headers.get("authorization");
        if token.is_none_or(|token| token != &format!("Bearer {GIT_TOKEN}")) {
            return json(401, json!({"message": "Bad credentials"}));
        }
        let path = head.uri.path().strip_prefix("/repos/").unwrap();
        let (name, rest) = match path.strip_suffix("/pulls") {
            Some(name) => (name, "pulls"),
            None => (path, ""),
        };
        let sent = |number: usize| json!({"number": number, "html_url": format!("https://github.com/{name}/pull/{number}")});
        match (head.method.as_str(), rest) {
            ("GET", "") => json(200, json!({"full_name": name, "default_branch": "main"})),
            ("GET", _) => {
                let numbered = state.pulls.iter().enumerate();
                let found: Vec<_> = numbered
                    .filter(|(_, (other, _))| other == name)
                    .map(|(at, _)| sent(at + 1))
                    .collect();
                json(200, json!(found))
            }
            _ => {
                let pull = serde_json::from_slice(&body).unwrap();
                state.pulls.push((name.to_owned(), pull));
                json(201, sent(state.pulls.len()))
            }
        }
    }
}

fn answer(status: u16, kind: &str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header("content-type", kind)
        .body(Full::new(body.into()))
        .unwrap()
}

/// Serves one connection; without an answer it breaks off.
async fn serve<S, F>(stream: S, work: impl Fn(Request<Incoming>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Option<Response<Full<Bytes>>>>,
{
    let service = service_fn(|request| {
        let answer = work(request);
        async {
            answer
                .await
                .ok_or_else(|| std::io::Error::other("broken off"))
        }
    });
    http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
        .ok();
}

/// A certificate for `localhost`; that of its authority is written to `authority`.
fn acceptor(authority: &Path) -> TlsAcceptor {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate().unwrap();
    let own = params.self_signed(&key).unwrap();
    fs::write(authority, own.pem()).unwrap();
    let issuer = Issuer::new(params, key);

    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}
