//! Decides on, and makes, the connections of a confined program.
//!
//! ```text
//! warden ─► broker (this stage of the child, non-dumpable) ─► program, under the filter
//!             ◄──────────── "may I connect?" ──────────────────┘
//! ```
//!
//! The broker is the second stage of a child, split in two: the program's parent, of its uid, so
//! that the kernel lets it look at a call's arguments (also where only ancestors may), and no
//! descendant of what it holds. For a call that is allowed it acts itself, on a copy of the
//! program's socket and of the address: what the program's threads change meanwhile changes
//! nothing. When it is killed, every further call fails, and the warden ends the program.

use std::{
    fs,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    libc::{self, c_int},
    sys::{
        prctl,
        signal::{SigSet, Signal},
        uio::{RemoteIoVec, process_vm_readv},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid},
};

use super::{
    sandbox::{Peers, Ports, Profile},
    seccomp,
    wire::{Opening, Wire},
};

/// Calls that are decided at once; one waits only for its own connection.
const THREADS: usize = 4;
/// Longer than any socket's address.
const ADDRESS_BYTES: usize = 128;
/// `SECCOMP_IOCTL_NOTIF_*` of the kernel's `linux/seccomp.h`.
const RECEIVE: u64 = 0xC050_2100;
const SEND: u64 = 0xC018_2101;
const IS_VALID: u64 = 0x4008_2102;

/// Splits this process, which has one thread: comes back in the one that is to become the program,
/// with a way to its broker. The other one decides on connections and ends as the program does.
pub(super) fn split(profile: &Profile, opening: &Wire) -> io::Result<Wire> {
    let (ours, theirs) = Wire::pair()?;
    let parent = nix::unistd::getpid();
    #[expect(unsafe_code, reason = "there is one thread, so that the copy is whole")]
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => {
            drop(ours);
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // It may have died before that.
            if nix::unistd::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // A group of its own, as it would have alone.
            nix::unistd::setsid()?;
            let pid = nix::unistd::getpid().as_raw();
            opening.send(&Opening::Split { pid })?;
            Ok(theirs)
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            // Never dropped: this process does not come back from here.
            nix::unistd::close(opening.as_raw_fd())?;
            // Where that fails the child hears that we are gone, or is killed with us.
            std::process::exit(decide_for(profile, &ours, child).unwrap_or(127))
        }
    }
}

/// Hands the filter's listener over to the broker.
pub(super) fn hand_over(broker: &Wire, listener: &OwnedFd) -> io::Result<()> {
    broker.send_descriptor(listener.as_fd())?;
    broker.await_end()
}

fn decide_for(profile: &Profile, program: &Wire, child: Pid) -> io::Result<i32> {
    prctl::set_dumpable(false)?;
    // Only the program's end is ours.
    SigSet::all().thread_block()?;
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    // An end instead: the program could not be held, and says so itself.
    if let Ok(listener) = program.receive_descriptor() {
        let broker = Arc::new(Broker {
            listener,
            connect: profile.connect.clone(),
            bind: profile.bind.clone(),
            folders: profile.write.clone(),
        });
        for _ in 0..THREADS {
            let broker = broker.clone();
            std::thread::Builder::new()
                .stack_size(128 * 1024)
                .spawn(move || broker.run())?;
        }
        program.finish();
    }
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(end_by(signal)),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            // A signal that has no name.
            Err(_) => return Ok(end_by(Signal::SIGKILL)),
        }
    }
}

/// Ends as the program did, for the warden to see.
fn end_by(signal: Signal) -> i32 {
    let mut one = SigSet::empty();
    one.add(signal);
    one.thread_unblock().ok();
    nix::sys::signal::raise(signal).ok();
    128 + signal as i32
}

struct Broker {
    listener: OwnedFd,
    connect: Peers,
    bind: Ports,
    /// Where sockets that have a path may be.
    folders: Vec<PathBuf>,
}

/// What becomes of a call.
enum Answer {
    /// It was made; this is its result, a negative error number where it failed.
    Done(i32),
    /// The kernel may go on with it.
    GoOn,
}

/// A call, once its memory and its socket are known to be its own.
struct Call {
    process: u32,
    socket: OwnedFd,
    family: c_int,
    address: Vec<u8>,
}

impl Broker {
    fn run(&self) {
        loop {
            let mut asked = zeroed_notification();
            match control(&self.listener, RECEIVE, &mut asked) {
                Ok(()) => {}
                // Who asked is gone, or a signal came.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {
                    continue;
                }
                Err(_) => return,
            }
            let answer = self.decide(&asked).unwrap_or_else(|error| {
                Answer::Done(-error.raw_os_error().unwrap_or(libc::EACCES))
            });
            let (error, flags) = match answer {
                Answer::Done(result) => (result, 0),
                Answer::GoOn => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE),
            };
            let mut response = libc::seccomp_notif_resp {
                id: asked.id,
                val: 0,
                error,
                flags: u32::try_from(flags).unwrap_or(0),
            };
            // Fails where who asked is gone.
            control(&self.listener, SEND, &mut response).ok();
        }
    }

    fn decide(&self, asked: &libc::seccomp_notif) -> io::Result<Answer> {
        let call = self.look(asked)?;
        let connects = i64::from(asked.data.nr) == libc::SYS_connect;
        let named = call
            .address
            .first_chunk::<2>()
            .map(|family| c_int::from(u16::from_ne_bytes(*family)))
            .ok_or(io::ErrorKind::InvalidInput)?;
        match (call.family, named) {
            (libc::AF_NETLINK, libc::AF_NETLINK) => {
                return act(&call.socket, &call.address, connects);
            }
            (libc::AF_UNIX, libc::AF_UNIX) if connects => return self.connect_to_path(&call),
            // The socket's kind cannot change any more, and its folder is the file system's matter.
            (libc::AF_UNIX, libc::AF_UNIX) => return Ok(Answer::GoOn),
            (libc::AF_INET | libc::AF_INET6, libc::AF_INET | libc::AF_INET6) => {}
            _ => return Err(refused()),
        }
        let (ip, port) = internet(named, &call.address).ok_or(io::ErrorKind::InvalidInput)?;
        let is_datagram = option(&call.socket, libc::SO_TYPE)? == libc::SOCK_DGRAM;
        let allowed = match (connects, is_datagram) {
            (true, true) => self.connect.may_resolve() && port == 53,
            (true, false) => self.connect.allows(ip, port),
            (false, true) => port == 0,
            (false, false) => self.bind.allows(port),
        };
        if !allowed {
            return Err(refused());
        }
        act(&call.socket, &call.address, connects)
    }

    /// What is asked, copied. The question still stood after the look, so that the process was the
    /// one that asks and no other of its number.
    fn look(&self, asked: &libc::seccomp_notif) -> io::Result<Call> {
        let [fd, address, length, ..] = asked.data.args;
        let fd = RawFd::try_from(fd & 0xffff_ffff).map_err(|_| bad_descriptor())?;
        let length = usize::try_from(length & 0xffff_ffff).unwrap_or(usize::MAX);
        if length > ADDRESS_BYTES {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let thread = Pid::from_raw(asked.pid.cast_signed());
        let mut bytes = vec![0; length];
        let remote = RemoteIoVec {
            base: usize::try_from(address).unwrap_or(0),
            len: length,
        };
        let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &[remote])?;
        bytes.truncate(read);
        let process = process_of(asked.pid).ok_or_else(refused)?;
        let socket = seccomp::copy_descriptor(&seccomp::open_process(process)?, fd)?;
        let mut id = asked.id;
        control(&self.listener, IS_VALID, &mut id)?;
        Ok(Call {
            process,
            family: option(&socket, libc::SO_DOMAIN)?,
            socket,
            address: bytes,
        })
    }

    /// Connects to a socket that has a path, below one of the program's own folders: others may be
    /// doors out, as that of a container engine is.
    fn connect_to_path(&self, call: &Call) -> io::Result<Answer> {
        let path = call.address.get(2..).unwrap_or_default();
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
        // Without a name it is an abstract one.
        if path.is_empty() {
            return Err(refused());
        }
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        let path = match path.is_absolute() {
            true => path.to_owned(),
            false => Path::new(&format!("/proc/{}/cwd", call.process)).join(path),
        };
        // Held open, it is the same file whatever the path leads to afterwards.
        let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
        let file = nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty())?;
        let held = format!("/proc/self/fd/{}", file.as_raw_fd());
        let place = fs::read_link(&held)?;
        if !self.folders.iter().any(|folder| place.starts_with(folder)) {
            return Err(refused());
        }
        let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        address.extend_from_slice(held.as_bytes());
        address.push(0);
        act(&call.socket, &address, true)
    }
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EACCES)
}

fn bad_descriptor() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

/// Makes the call on the copy, in the asker's place.
fn act(socket: &OwnedFd, address: &[u8], connects: bool) -> io::Result<Answer> {
    let length = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    let pointer = address.as_ptr().cast();
    #[expect(
        unsafe_code,
        reason = "the address is passed on as it came, whatever it is"
    )]
    let result = unsafe {
        match connects {
            true => libc::connect(socket.as_raw_fd(), pointer, length),
            false => libc::bind(socket.as_raw_fd(), pointer, length),
        }
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Answer::Done(0))
}

fn option(socket: &OwnedFd, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of::<c_int>()).unwrap_or(0);
    #[expect(unsafe_code, reason = "nix has no option for the socket's family")]
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Address and port of a `sockaddr_in` or `sockaddr_in6`.
fn internet(family: c_int, address: &[u8]) -> Option<(IpAddr, u16)> {
    let port = u16::from_be_bytes(*address.get(2..)?.first_chunk()?);
    let ip = if family == libc::AF_INET {
        IpAddr::from(Ipv4Addr::from(*address.get(4..)?.first_chunk::<4>()?))
    } else {
        IpAddr::from(Ipv6Addr::from(*address.get(8..)?.first_chunk::<16>()?)).to_canonical()
    };
    Some((ip, port))
}

/// The process that a thread belongs to.
fn process_of(thread: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

fn zeroed_notification() -> libc::seccomp_notif {
    libc::seccomp_notif {
        id: 0,
        pid: 0,
        flags: 0,
        data: libc::seccomp_data {
            nr: 0,
            arch: 0,
            instruction_pointer: 0,
            args: [0; 6],
        },
    }
}

fn control<T>(listener: &OwnedFd, request: u64, argument: &mut T) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "nix has no such request; each goes with its own type"
    )]
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            request as libc::Ioctl,
            std::ptr::from_mut(argument),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
