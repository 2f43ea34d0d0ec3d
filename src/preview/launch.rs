//! From a site's folder to a dev server that has proved itself: what is started, with which
//! environment and confinement, and when it counts as up.

use std::{
    ffi::OsString,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use super::{
    PreviewSettings, PreviewSite,
    command::{DevCommand, Proof, plan},
    output::Output,
    port::is_free,
    probe,
};
use crate::{
    egress::Door,
    process::{Peers, Ports, ProcessHandle, Profile, Spec, Stdin},
    task::blocking,
};

/// From spawn to proven ready.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How long a fresh start waits for a port that the server before it still holds.
const PORT_WAIT: Duration = Duration::from_secs(3);
const DISK_DEADLINE: Duration = Duration::from_secs(20);
const MAX_PACKAGE_JSON: u64 = 1024 * 1024;

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// Something in the site has to change first.
    #[error("{0}")]
    Site(String),
    /// It may work later.
    #[error("{0}")]
    Machine(String),
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Reads the site's script and readies the disk. A server that `polls` looks for changes by itself.
/// Blocking.
pub(crate) fn prepare(
    site: &PreviewSite,
    settings: &PreviewSettings,
    polls: bool,
) -> Result<(Spec, Proof), StartError> {
    let machine = |what: &'static str| {
        move |error: io::Error| StartError::Machine(format!("{what}: {}", error.kind()))
    };
    let package = read_small(&site.worktree.join("package.json")).map_err(|error| {
        StartError::Site(match error.kind() {
            io::ErrorKind::NotFound => "this site has no package.json".to_owned(),
            kind => format!("package.json can't be read: {kind}"),
        })
    })?;
    let command = plan(&package).map_err(|error| StartError::Site(error.to_string()))?;
    // Written by servers that were not told to ignore it, and never removed by any.
    std::fs::remove_file(site.worktree.join(".astro/dev.json")).ok();
    let private = settings.private_root.join(&site.slug);
    let (home, tmp) = (private.join("home"), private.join("tmp"));
    for folder in [&home, &tmp] {
        std::fs::create_dir_all(folder).map_err(machine("making the dev server's folders"))?;
    }
    let (program, mut args) = program(&command, &site.worktree, &settings.node)?;
    args.extend(command.args(site.port));
    await_port(site.port)?;
    let mut profile = Profile::system();
    // The program may be a link out of the folder that PATH names.
    for node in [
        Some(settings.node.clone()),
        settings.node.canonicalize().ok(),
    ] {
        let folder = node.as_deref().and_then(Path::parent);
        profile.read.extend(folder.map(Path::to_owned));
    }
    profile.read.extend(site.readable.iter().cloned());
    profile
        .write
        .extend([site.worktree.clone(), home.clone(), tmp.clone()]);
    profile.write.extend(site.writable.iter().cloned());
    // Sites fetch from APIs while they render; they may ask themselves too.
    profile.connect = match &settings.egress {
        Some(door) => Peers::here(vec![site.port, door.port()]),
        None => Peers::Only {
            here: vec![site.port],
            elsewhere: vec![443],
        },
    };
    profile.bind = Ports::Only(vec![site.port]);
    let mut env = environment(site, settings, &home, &tmp);
    env.extend(settings.egress.iter().flat_map(Door::environment));
    if polls {
        // Vite looks at its files by itself (measured with 8.3.8).
        env.push(("CHOKIDAR_USEPOLLING".into(), "1".into()));
        env.push(("CHOKIDAR_INTERVAL".into(), "500".into()));
    }
    let spec = Spec {
        name: "dev server",
        program,
        args,
        env,
        cwd: site.worktree.clone(),
        stdin: Stdin::Null,
        profile,
    };
    Ok((spec, command.proof()))
}

/// What is started, and the arguments before the command's own.
fn program(
    command: &DevCommand,
    worktree: &Path,
    node: &Path,
) -> Result<(PathBuf, Vec<OsString>), StartError> {
    let Some(bin) = command.bin() else {
        return Ok(("/bin/sh".into(), vec!["-c".into()]));
    };
    let path = format!("node_modules/.bin/{bin}");
    let kind = worktree.join(&path).symlink_metadata().map_err(|_| {
        StartError::Site(format!(
            "the site's `dev` script runs `{bin}`, which isn't installed: is it among the \
             dependencies in package.json?"
        ))
    })?;
    // npm and yarn link to the program; pnpm writes a shell script that ends in `exec node`.
    let interpreter = if kind.is_symlink() {
        node.to_owned()
    } else {
        "/bin/sh".into()
    };
    Ok((interpreter, vec![path.into()]))
}

/// All that a dev server gets to see. Nothing of the supervisor's own environment: variables that
/// tell of an agent send Astro 7 to the background and turn on Vite's console forwarding.
fn environment(
    site: &PreviewSite,
    settings: &PreviewSettings,
    home: &Path,
    tmp: &Path,
) -> Vec<(OsString, OsString)> {
    let mut path = site.worktree.join("node_modules/.bin").into_os_string();
    for folder in settings.node.parent().into_iter().chain([
        Path::new("/usr/local/bin"),
        Path::new("/usr/bin"),
        Path::new("/bin"),
    ]) {
        path.push(":");
        path.push(folder);
    }
    let port = site.port.to_string();
    let mut env: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), path),
        ("HOME".into(), home.into()),
        ("TMPDIR".into(), tmp.into()),
    ];
    env.extend(
        [
            ("LANG", "C.UTF-8"),
            ("HOST", "127.0.0.1"),
            ("PORT", port.as_str()),
            // With any other value Vite opens the HMR socket and never says a word on it.
            ("NODE_ENV", "development"),
            ("NO_COLOR", "1"),
            ("ASTRO_TELEMETRY_DISABLED", "1"),
            ("ASTRO_DISABLE_UPDATE_CHECK", "true"),
        ]
        .map(|(name, value)| (name.into(), value.into())),
    );
    if !site.hosts.is_empty() {
        env.push((
            "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS".into(),
            site.hosts.join(",").into(),
        ));
    }
    env
}

/// Reads a file that the agent may have replaced by anything: only a regular one, only so much.
pub(crate) fn read_small(path: &Path) -> io::Result<String> {
    if !path.symlink_metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_PACKAGE_JSON)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Waits for the port, which a server that was just ended may still hold. Blocking.
fn await_port(port: u16) -> Result<(), StartError> {
    let deadline = std::time::Instant::now() + PORT_WAIT;
    while !is_free(port) {
        if std::time::Instant::now() > deadline {
            return Err(StartError::Machine(format!(
                "port {port} of this preview is in use by another program"
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends well once the listener on `port` is our child's and answers; ends badly when it went to
/// another port or the deadline passed. What it prints is no proof.
pub(crate) async fn prove(
    process: ProcessHandle,
    port: u16,
    proof: Proof,
    output: Output,
) -> Result<(), String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let deadline = Instant::now() + START_DEADLINE;
    while Instant::now() < deadline {
        if output.moved_port() {
            return Err(format!("the dev server went to another port than {port}"));
        }
        if TcpStream::connect(address).await.is_ok() {
            let child = process.clone();
            let ours = blocking(
                "looking for the listener's owner",
                DISK_DEADLINE,
                move || child.owns_listener(address),
            );
            if ours.await.unwrap_or(false) && probe::answers(port, proof).await {
                return Ok(());
            }
        }
        sleep(Duration::from_millis(25)).await;
    }
    Err(format!(
        "the dev server did not answer on port {port} within {} s",
        START_DEADLINE.as_secs()
    ))
}
