//! The reverse proxies that are measured side by side, each before the same origin.

use std::{fs, path::Path, process::Command, process::Stdio, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{
    proxy,
    world::{Http, Kid, World, free_port, until},
};

/// One of them, in a process of its own.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    pub(crate) kid: Kid,
}

pub(crate) const GREENROOM: &str = "greenroom's preview proxy";

/// All of them before `origin`, greenroom's first; each on this core alone, where one is named.
pub(crate) async fn all(
    world: &World,
    origin: u16,
    core: Option<&str>,
) -> anyhow::Result<Vec<Running>> {
    let (kid, port) = proxy::greenroom(world, origin, core).await?;
    let mut all = vec![Running {
        name: GREENROOM,
        port,
        kid,
    }];
    for (name, start) in [
        ("nginx, 1 worker, upstream keepalive", nginx_proxy as Start),
        ("Caddy", caddy),
        ("http-proxy on Node, keep-alive agent", http_proxy),
    ] {
        let port = free_port()?;
        let kid = start(world, origin, port)?;
        if let Some(core) = core {
            pin(kid.id(), core)?;
        }
        all.push(Running { name, port, kid });
    }
    for one in &all {
        let soon = Duration::from_secs(10);
        until(one.name, soon, async || Http::connect(one.port).await.ok()).await?;
        // Threads that came since.
        if let Some(core) = core {
            pin(one.kid.id(), core)?;
        }
    }
    Ok(all)
}

type Start = fn(&World, u16, u16) -> anyhow::Result<Kid>;

fn http_proxy(world: &World, origin: u16, port: u16) -> anyhow::Result<Kid> {
    world.rival("http-proxy.js", &[&origin.to_string(), &port.to_string()])
}

fn nginx_proxy(world: &World, origin: u16, port: u16) -> anyhow::Result<Kid> {
    let http = format!(
        "map $http_upgrade $up_connection {{ default upgrade; '' ''; }}\n\
         upstream up {{ server 127.0.0.1:{origin}; keepalive 64; \
         keepalive_requests 100000000; }}"
    );
    let server = "location / { proxy_pass http://up; proxy_http_version 1.1; \
        proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $up_connection; \
        proxy_set_header Host $http_host; proxy_read_timeout 300s; proxy_max_temp_file_size 0; \
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }";
    nginx(world, "proxy", port, &http, server)
}

/// nginx with one worker.
pub(crate) fn nginx(
    world: &World,
    name: &str,
    port: u16,
    http: &str,
    server: &str,
) -> anyhow::Result<Kid> {
    let folder = world.folder(&format!("nginx-{name}-{port}"));
    fs::create_dir_all(&folder)?;
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};", folder.display()))
        .join("\n");
    let config = format!(
        "daemon off; master_process off; worker_processes 1; pid {0}/pid; error_log {0}/error;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 100000000; tcp_nodelay on; sendfile on;\n\
         {temporary}\n{http}\nserver {{ listen 127.0.0.1:{port} backlog=1024;\n{server} }} }}\n",
        folder.display()
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config)?;
    let mut command = world.command(Path::new("nginx"), &folder);
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-e", "stderr", "-p"])
        .arg(&folder)
        .arg("-c")
        .arg(&path);
    Kid::spawn(&mut command)
}

fn caddy(world: &World, origin: u16, port: u16) -> anyhow::Result<Kid> {
    let folder = world.folder(&format!("caddy-{port}"));
    fs::create_dir_all(&folder)?;
    let path = folder.join("Caddyfile");
    fs::write(
        &path,
        format!(
            "{{\n\tadmin off\n\tauto_https off\n\tlog {{\n\t\toutput discard\n\t}}\n}}\n\
             http://:{port} {{\n\tbind 127.0.0.1\n\treverse_proxy 127.0.0.1:{origin}\n}}\n"
        ),
    )?;
    let mut command = world.command(Path::new("caddy"), &folder);
    command
        .args(["run", "--adapter", "caddyfile", "--config"])
        .arg(&path);
    Kid::spawn(&mut command)
}

pub(crate) fn pin(pid: u32, core: &str) -> anyhow::Result<()> {
    let status = Command::new("taskset")
        .args(["-a", "-p", "-c", core, &pid.to_string()])
        .stdout(Stdio::null())
        .status()
        .context("failed to run taskset")?;
    ensure!(status.success(), "taskset failed");
    Ok(())
}
