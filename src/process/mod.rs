//! Starting, confining and ending child processes.
//!
//! STAND-IN: only enough to run the preview and the installer; replaced by the process room's
//! own module when the branches meet. Confinement is ignored here.
#![expect(missing_debug_implementations, reason = "a stand-in")]

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fmt, io,
    path::PathBuf,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{ChildStderr, ChildStdin, ChildStdout, Command},
    sync::watch,
};

/// Why a child could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("failed to spawn {name}")]
    Spawn {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{name} did not end within {} s", deadline.as_secs())]
    TimedOut {
        name: &'static str,
        deadline: Duration,
    },
}

/// What a child's stdin is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    Null,
    Piped,
}

/// TCP ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    Any,
    Only(Vec<u16>),
}

/// What a child may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub read: Vec<PathBuf>,
    pub write: Vec<PathBuf>,
    pub connect: Ports,
    pub bind: Ports,
    pub scoped: bool,
}

/// One child to start.
#[derive(Debug, Clone)]
pub struct Spec {
    pub name: &'static str,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: PathBuf,
    pub stdin: Stdin,
    pub profile: Profile,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => f.write_str("unknown end"),
        }
    }
}

/// What a finished run left behind.
#[derive(Debug)]
pub struct Output {
    pub exit: Exit,
}

/// Starts children.
#[derive(Clone, Debug, Default)]
pub struct Launcher {}

/// A started child.
pub struct Child {
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
    handle: ProcessHandle,
}

impl Child {
    pub fn handle(&self) -> ProcessHandle {
        self.handle.clone()
    }
}

/// Watches and ends a child.
#[derive(Clone, Debug)]
pub struct ProcessHandle {
    pid: u32,
    exit: watch::Receiver<Option<Exit>>,
}

impl Launcher {
    #[expect(
        clippy::disallowed_methods,
        clippy::unused_async,
        reason = "a stand-in"
    )]
    pub async fn spawn(&self, spec: Spec) -> Result<Child, ProcessError> {
        let mut child = Command::new(&spec.program)
            .args(&spec.args)
            .env_clear()
            .envs(spec.env)
            .current_dir(&spec.cwd)
            .stdin(match spec.stdin {
                Stdin::Null => std::process::Stdio::null(),
                Stdin::Piped => std::process::Stdio::piped(),
            })
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|source| ProcessError::Spawn {
                name: spec.name,
                source,
            })?;
        let (tell, exit) = watch::channel(None);
        let handle = ProcessHandle {
            pid: child.id().expect("just started"),
            exit,
        };
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        tokio::spawn(async move {
            use std::os::unix::process::ExitStatusExt;
            let status = child.wait().await.ok();
            let exit = Exit {
                code: status.and_then(|s| s.code()),
                signal: status.and_then(|s| s.signal()),
            };
            tell.send_replace(Some(exit));
        });
        Ok(Child {
            stdin,
            stdout: stdout.expect("piped"),
            stderr: stderr.expect("piped"),
            handle,
        })
    }

    pub async fn run(
        &self,
        spec: Spec,
        deadline: Duration,
        mut on_line: impl FnMut(&str) + Send,
    ) -> Result<Output, ProcessError> {
        let name = spec.name;
        let child = self.spawn(spec).await?;
        let handle = child.handle();
        let mut out = BufReader::new(child.stdout).lines();
        let mut err = BufReader::new(child.stderr).lines();
        let work = async {
            let (mut out_open, mut err_open) = (true, true);
            while out_open || err_open {
                tokio::select! {
                    line = out.next_line(), if out_open => match line {
                        Ok(Some(line)) => on_line(&line),
                        _ => out_open = false,
                    },
                    line = err.next_line(), if err_open => match line {
                        Ok(Some(line)) => on_line(&line),
                        _ => err_open = false,
                    },
                }
            }
            handle.wait().await
        };
        match tokio::time::timeout(deadline, work).await {
            Ok(exit) => Ok(Output { exit }),
            Err(_) => {
                handle.kill().await;
                Err(ProcessError::TimedOut { name, deadline })
            }
        }
    }
}

impl ProcessHandle {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        if self.try_exit().is_none() {
            nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.pid.cast_signed()), signal)
                .ok();
        }
    }

    pub async fn terminate(&self, grace: Duration) -> Exit {
        self.signal(nix::sys::signal::SIGTERM);
        match tokio::time::timeout(grace, self.wait()).await {
            Ok(exit) => exit,
            Err(_) => self.kill().await,
        }
    }

    pub async fn kill(&self) -> Exit {
        self.signal(nix::sys::signal::SIGKILL);
        self.wait().await
    }

    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let seen = exit.wait_for(Option::is_some).await;
        seen.ok().and_then(|e| *e).unwrap_or(Exit {
            code: None,
            signal: None,
        })
    }

    pub fn try_exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Does the child, or a descendant in its process group, listen on this port? Blocking.
    pub fn owns_listener(&self, port: u16) -> bool {
        let mut inodes = HashSet::new();
        let mut by_parent: HashMap<u32, Vec<u32>> = HashMap::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok())
            else {
                continue;
            };
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let rest = stat.rsplit(')').next().unwrap_or_default();
            let group = rest
                .split_whitespace()
                .nth(2)
                .and_then(|g| g.parse().ok())
                .unwrap_or(0);
            by_parent.entry(group).or_default().push(pid);
        }
        for pid in by_parent.remove(&self.pid).unwrap_or_default() {
            for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten()
                .flatten()
            {
                if let Ok(target) = std::fs::read_link(fd.path())
                    && let Some(inode) = target
                        .to_str()
                        .and_then(|t| t.strip_prefix("socket:["))
                        .and_then(|t| t.strip_suffix(']'))
                {
                    inodes.insert(inode.to_owned());
                }
            }
        }
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
            std::fs::read_to_string(table)
                .unwrap_or_default()
                .lines()
                .skip(1)
                .any(|line| {
                    let columns: Vec<&str> = line.split_whitespace().collect();
                    columns.get(3) == Some(&"0A")
                        && columns
                            .get(1)
                            .is_some_and(|a| a.ends_with(&format!(":{port:04X}")))
                        && columns.get(9).is_some_and(|inode| inodes.contains(*inode))
                })
        })
    }
}
