//! A proxy between clients and upstreams that the tests write byte by byte.

use super::*;

/// Confined as far as this kernel can. Its silence is longer than a test.
pub(super) fn launcher() -> Launcher {
    let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
    Launcher::start_with_binary(binary, SOON * 10, ConfinementMode::Auto).unwrap()
}

#[derive(Default)]
pub(super) struct Seen {
    pub(super) in_flight: Arc<AtomicUsize>,
    pub(super) requests: AtomicUsize,
    pub(super) people: Mutex<Vec<String>>,
}

pub(super) struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ActivitySink for Seen {
    fn request(&self) -> Box<dyn Any + Send + Sync> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Box::new(InFlight(self.in_flight.clone()))
    }

    fn person(&self, slug: &str) {
        self.people.lock().unwrap().push(slug.to_owned());
    }
}

/// A proxy with both listeners, and previews that the test reports on.
pub(super) struct Bench {
    pub(super) previews: Previews,
    pub(super) tasks: Tasks,
    pub(super) seen: Arc<Seen>,
    pub(super) proxy: SocketAddr,
    pub(super) hmr: SocketAddr,
}

impl Bench {
    pub(super) async fn new() -> Self {
        Self::with(false).await
    }

    /// With a banner on broken pages, or without.
    pub(super) async fn with(shows_banner: bool) -> Self {
        let tasks = Tasks::new();
        let settings = PreviewSettings {
            egress: None,
            access: greenroom::preview::Access::open(),
            node: "/nowhere/node".into(),
            private_root: "/nowhere".into(),
            most_awake: 3,
            shows_banner,
        };
        let previews = Previews::new(launcher(), settings, tasks.clone());
        let seen = Arc::new(Seen::default());
        let mut addresses = Vec::new();
        for kind in [ProxyKind::Preview, ProxyKind::HmrOnly] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            Proxy::serve(listener, kind, previews.clone(), seen.clone(), &tasks);
        }
        Self {
            previews,
            tasks,
            seen,
            proxy: addresses[0],
            hmr: addresses[1],
        }
    }

    pub(super) fn adopt(&self, slug: &str, status: PreviewStatus) -> watch::Sender<PreviewStatus> {
        let (publish, seen) = watch::channel(status);
        let site = PreviewSite {
            slug: slug.to_owned(),
            worktree: "/nowhere".into(),
            port: 1,
            hosts: vec!["site.preview.example.com".to_owned()],
            readable: Vec::new(),
            writable: Vec::new(),
        };
        self.previews.adopt(site, seen);
        publish
    }

    /// Starts an upstream and a live, default preview before it.
    pub(super) async fn upstream<F, Fut>(
        &self,
        slug: &str,
        serve: F,
    ) -> watch::Sender<PreviewStatus>
    where
        F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tasks = self.tasks.clone();
        self.tasks.spawn("upstream", async move {
            let token = tasks.token().clone();
            let accept = async {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tasks.spawn("upstream connection", serve(stream));
                }
            };
            token.run_until_cancelled(accept).await;
        });
        self.previews.set_default(slug);
        self.adopt(slug, live(port))
    }

    pub(super) async fn connect(&self) -> Client {
        Client(TcpStream::connect(self.proxy).await.unwrap())
    }

    /// One request on a connection of its own.
    pub(super) async fn ask(&self, request: &str) -> Answer {
        let mut client = self.connect().await;
        client.send(request).await;
        client.answer(!request.starts_with("HEAD")).await
    }
}

pub(super) fn live(port: u16) -> PreviewStatus {
    PreviewStatus {
        state: PreviewState::Live,
        upstream: Some(port),
        ..PreviewStatus::off()
    }
}

pub(super) fn starting(progress: &str) -> PreviewStatus {
    PreviewStatus {
        state: PreviewState::Starting,
        progress: progress.to_owned(),
        ..PreviewStatus::off()
    }
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

pub(super) struct Client(pub(super) TcpStream);

impl Client {
    pub(super) async fn send(&mut self, text: &str) {
        timeout(SOON, self.0.write_all(text.as_bytes()))
            .await
            .unwrap()
            .unwrap();
    }

    /// Reads until the text has been seen.
    pub(super) async fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let byte = timeout(SOON, self.0.read_u8()).await;
            let byte = byte.unwrap_or_else(|_| {
                panic!("no {end:?} after {:?}", String::from_utf8_lossy(&text))
            });
            match byte {
                Ok(byte) => text.push(byte),
                Err(_) => break,
            }
        }
        String::from_utf8(text).unwrap()
    }

    pub(super) async fn answer(&mut self, with_body: bool) -> Answer {
        let head = self.until("\r\n\r\n").await.to_ascii_lowercase();
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        let length = head
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        let mut body = String::new();
        if with_body && head.contains("transfer-encoding: chunked") {
            loop {
                let size = self.until("\r\n").await;
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                body.push_str(&self.exactly(size).await);
                assert_eq!(self.exactly(2).await, "\r\n");
                if size == 0 {
                    break;
                }
            }
        } else if with_body && let Some(length) = length {
            body = self.exactly(length.parse().unwrap()).await;
        }
        Answer { status, head, body }
    }

    pub(super) async fn exactly(&mut self, length: usize) -> String {
        let mut bytes = vec![0; length];
        timeout(SOON, self.0.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

/// Answers every request on a connection with its own head, as text.
pub(super) async fn echo_heads(stream: TcpStream) {
    let mut stream = Client(stream);
    loop {
        let head = stream.until("\r\n\r\n").await;
        if head.is_empty() {
            return;
        }
        let length = head.to_ascii_lowercase();
        let length = length
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        if let Some(length) = length {
            stream.exactly(length.parse().unwrap()).await;
        }
        stream
            .send(&format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{head}",
                head.len()
            ))
            .await;
    }
}

/// Answers every request on a connection with these bytes.
pub(super) async fn say(stream: TcpStream, answer: &'static str) {
    let mut stream = Client(stream);
    while !stream.until("\r\n\r\n").await.is_empty() {
        stream.send(answer).await;
    }
}

pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, all)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}
