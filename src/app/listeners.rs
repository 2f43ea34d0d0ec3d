//! The ports that the program serves.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::{
    api,
    config::Settings,
    lifecycle::{Activity, Guard, HolderKind},
    preview::{ActivityGuard, ActivitySink, Previews, Proxy, ProxyKind},
    task::Tasks,
};

/// The ports that the program serves.
pub(super) struct Listeners {
    api: TcpListener,
    preview: TcpListener,
    pub(super) hmr: TcpListener,
    /// With the one-shot service alone.
    pub(super) service: Option<TcpListener>,
    /// The gateway's on the network, and who may come in.
    pub(super) gateway: Option<(TcpListener, PathBuf)>,
}

impl Listeners {
    pub(super) async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        Ok(Self {
            api: listen(settings, settings.api_port, "API_PORT").await?,
            preview: listen(settings, settings.preview_port, "PREVIEW_PORT").await?,
            hmr: listen(settings, settings.hmr_port, "HMR_PORT").await?,
            service: match settings.claude_service_port {
                Some(port) => Some(listen(settings, port, "CLAUDE_SERVICE_PORT").await?),
                None => None,
            },
            gateway: gateway_listener(settings).await?,
        })
    }

    pub(super) fn api_port(&self) -> u16 {
        port(&self.api)
    }

    pub(super) fn preview_port(&self) -> u16 {
        port(&self.preview)
    }

    pub(super) fn serve(
        self,
        state: api::Shared,
        previews: Previews,
        activity: &Activity,
        tasks: &Tasks,
    ) -> std::io::Result<()> {
        let sink: Arc<dyn ActivitySink> = Arc::new(PreviewActivity(activity.clone()));
        let (preview, hmr) = (self.preview.into_std()?, self.hmr.into_std()?);
        let proxies = tasks.clone();
        // What a browser waits for does not wait for a turn's events.
        tasks.spawn_apart("previews", move || {
            let (preview, hmr) = (TcpListener::from_std(preview)?, TcpListener::from_std(hmr)?);
            Proxy::serve(
                preview,
                ProxyKind::Preview,
                previews.clone(),
                sink.clone(),
                &proxies,
            );
            Proxy::serve(hmr, ProxyKind::HmrOnly, previews, sink, &proxies);
            Ok(())
        })?;
        if let Some(listener) = self.service {
            let router = api::service_router(state.base.clone());
            tasks.spawn("one-shot api", api::serve(listener, router, tasks.clone()));
        }
        tasks.spawn(
            "api",
            api::serve(self.api, api::router(state), tasks.clone()),
        );
        Ok(())
    }
}

pub(super) async fn listen(
    settings: &Settings,
    port: u16,
    name: &str,
) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(settings.bind, port);
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "{name}: port {port} of {} cannot be listened on; free it or choose another one by \
             {name}",
            settings.bind
        )
    })
}

/// The gateway's on the network, and who may come in.
pub(super) async fn gateway_listener(
    settings: &Settings,
) -> anyhow::Result<Option<(TcpListener, PathBuf)>> {
    match (settings.gateway_port, settings.gateway_tokens_file.clone()) {
        (Some(port), Some(tokens)) => Ok(Some((
            listen(settings, port, "GATEWAY_PORT").await?,
            tokens,
        ))),
        _ => Ok(None),
    }
}

pub(super) fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().map_or(0, |address| address.port())
}

struct PreviewActivity(Activity);

impl ActivitySink for PreviewActivity {
    fn request(&self) -> ActivityGuard {
        let guard: Guard = self.0.hold(HolderKind::Preview, "a request for a page");
        Box::new(guard)
    }

    fn person(&self, slug: &str) {
        self.0.person(slug);
    }
}
