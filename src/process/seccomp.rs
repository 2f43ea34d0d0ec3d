//! The system call filter of a confined program: what it may have of the network is decided call by
//! call, by its [broker](super::broker).
//!
//! Landlock knows TCP ports and nothing of hosts, UDP, TCP fast open or MPTCP, and is not there on
//! every kernel. The filter lets through only sockets of which each destination is known at
//! `connect` and `bind`, and hands these two to the broker. It looks at numbers alone, never at
//! memory, which another thread could change after the look.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

use nix::libc::{self, c_long, sock_filter, sock_fprog};

/// Offsets in the kernel's `struct seccomp_data`: number, architecture, instruction pointer, six
/// arguments of 64 bits. Their low halves hold all that the kernel looks at in an `int`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u32) -> u32 {
    let low_half = if cfg!(target_endian = "little") { 0 } else { 4 };
    16 + 8 * index + low_half
}

/// `AUDIT_ARCH_*` of the kernel's `linux/audit.h`, which `libc` lacks.
#[cfg(target_arch = "x86_64")]
const OURS: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const OURS: u32 = 0xC000_00B7;

/// From here on x86-64 numbers mean the x32 interface.
const X32: u32 = 0x4000_0000;
/// A `SOCK_*` without the flags that are put beside it.
const TYPE_MASK: u32 = 0xf;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const ASK: u32 = libc::SECCOMP_RET_USER_NOTIF;
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
}

/// Whether this kernel, and whatever filter holds us already, lets a broker work: it needs listeners
/// of its own and copies of other processes' descriptors (Linux 5.6).
pub(super) fn is_supported() -> bool {
    let action = ASK;
    let has_listeners = syscall(
        libc::SYS_seccomp,
        [
            libc::SECCOMP_GET_ACTION_AVAIL.into(),
            0,
            std::ptr::from_ref(&action) as u64,
        ],
    );
    let copies = || -> io::Result<OwnedFd> {
        let us = open_process(std::process::id())?;
        copy_descriptor(&us, 0)
    };
    // Of ours there may be no descriptor 0; then the kernel says so, a filter says another thing.
    has_listeners.is_ok()
        && copies()
            .map(drop)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EBADF) => Ok(()),
                _ => Err(error),
            })
            .is_ok()
}

/// Holds this thread, and what it becomes and starts, to the filter for good. Returns where the
/// calls to decide on arrive. `no_new_privs` has to be set.
///
/// `datagrams`: UDP may be used, which names need to be resolved. Where it leads is decided only
/// when a socket is connected.
pub(super) fn install(datagrams: bool) -> io::Result<OwnedFd> {
    let mut filter = program(datagrams);
    let program = sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_mut_ptr(),
    };
    let listener = syscall(
        libc::SYS_seccomp,
        [
            libc::SECCOMP_SET_MODE_FILTER.into(),
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            std::ptr::from_ref(&program) as u64,
        ],
    )?;
    own(listener)
}

/// A pidfd of a whole process.
pub(super) fn open_process(pid: u32) -> io::Result<OwnedFd> {
    own(syscall(libc::SYS_pidfd_open, [pid.into(), 0, 0])?)
}

/// A copy of a descriptor of another process, which we may have to be allowed to trace.
pub(super) fn copy_descriptor(process: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    let numbers = [process.as_raw_fd(), fd].map(|fd| u64::from(fd.cast_unsigned()));
    own(syscall(libc::SYS_pidfd_getfd, [numbers[0], numbers[1], 0])?)
}

#[expect(unsafe_code, reason = "nix knows none of these calls")]
fn syscall(number: c_long, args: [u64; 3]) -> io::Result<c_long> {
    // Callers pass pointers to what lives and is as long as the kernel takes it to be.
    let result = unsafe { libc::syscall(number, args[0], args[1], args[2]) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn own(fd: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    #[expect(
        unsafe_code,
        reason = "the kernel just made this descriptor for us alone"
    )]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The filter. Each rule is a block that ends in an answer or falls through to the next.
fn program(datagrams: bool) -> Vec<sock_filter> {
    let mut rules = Rules::default();
    rules.load(ARCHITECTURE);
    rules.unless(OURS, refuse(libc::ENOSYS));
    rules.load(NUMBER);
    if cfg!(target_arch = "x86_64") {
        rules.from(X32, refuse(libc::ENOSYS));
    }
    rules.on(libc::SYS_connect, ASK);
    rules.on(libc::SYS_bind, ASK);
    // A ring does all that a socket can without a system call for each.
    for number in [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ] {
        rules.on(number, refuse(libc::ENOSYS));
    }
    // These name their destination as they send, and connect by that.
    let fast_open = libc::MSG_FASTOPEN.cast_unsigned();
    for (number, flags) in [
        (libc::SYS_sendto, 3),
        (libc::SYS_sendmsg, 2),
        (libc::SYS_sendmmsg, 3),
    ] {
        rules.within(number, |rules| {
            rules.load(argument(flags));
            rules.with_bits(fast_open, refuse(libc::EACCES));
            rules.answer(ALLOW);
        });
    }
    // A listener of its own would be asked in the broker's place.
    rules.within(libc::SYS_seccomp, |rules| {
        rules.load(argument(1));
        let listener = u32::try_from(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        rules.with_bits(
            listener.expect("the kernel's flags are small"),
            refuse(libc::EPERM),
        );
        rules.answer(ALLOW);
    });
    rules.within(libc::SYS_socket, |rules| socket(rules, datagrams));
    rules.answer(ALLOW);
    rules.0
}

fn socket(rules: &mut Rules, datagrams: bool) {
    let denied = refuse(libc::EACCES);
    let number = |value: i32| value.cast_unsigned();
    rules.load(argument(0));
    rules.equal(number(libc::AF_UNIX), |rules| {
        rules.load(argument(1));
        rules.mask(TYPE_MASK);
        // Each of these may be sent to any path or name.
        rules.when(number(libc::SOCK_DGRAM), denied);
        rules.answer(ALLOW);
    });
    // What interfaces there are, which the C library asks before it resolves a name.
    rules.equal(number(libc::AF_NETLINK), |rules| {
        rules.load(argument(2));
        rules.when(number(libc::NETLINK_ROUTE), ALLOW);
        rules.answer(denied);
    });
    for family in [libc::AF_INET, libc::AF_INET6] {
        rules.equal(number(family), |rules| {
            rules.load(argument(1));
            rules.mask(TYPE_MASK);
            rules.equal(number(libc::SOCK_STREAM), |rules| {
                rules.load(argument(2));
                rules.when(0, ALLOW);
                // Not MPTCP.
                rules.when(number(libc::IPPROTO_TCP), ALLOW);
                rules.answer(denied);
            });
            if datagrams {
                rules.equal(number(libc::SOCK_DGRAM), |rules| {
                    rules.load(argument(2));
                    rules.when(0, ALLOW);
                    rules.when(number(libc::IPPROTO_UDP), ALLOW);
                    rules.answer(denied);
                });
            }
            rules.answer(denied);
        });
    }
    rules.answer(refuse(libc::EAFNOSUPPORT));
}

/// A filter in the making. The one register holds what [`Rules::load`] took last.
#[derive(Default)]
struct Rules(Vec<sock_filter>);

impl Rules {
    fn push(&mut self, code: u32, k: u32, if_true: u8, if_false: u8) {
        self.0.push(sock_filter {
            code: u16::try_from(code).expect("the instructions' codes have 16 bits"),
            jt: if_true,
            jf: if_false,
            k,
        });
    }

    fn load(&mut self, offset: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0);
    }

    fn mask(&mut self, bits: u32) {
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits, 0, 0);
    }

    fn answer(&mut self, answer: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, answer, 0, 0);
    }

    fn when(&mut self, value: u32, answer: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, 1);
        self.answer(answer);
    }

    fn unless(&mut self, value: u32, answer: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 1, 0);
        self.answer(answer);
    }

    fn from(&mut self, value: u32, answer: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, value, 0, 1);
        self.answer(answer);
    }

    fn with_bits(&mut self, bits: u32, answer: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits, 0, 1);
        self.answer(answer);
    }

    fn on(&mut self, number: c_long, answer: u32) {
        self.when(call(number), answer);
    }

    /// Rules for one call; they end in an answer, or the next ones would test the wrong thing.
    fn within(&mut self, number: c_long, rules: impl FnOnce(&mut Self)) {
        self.equal(call(number), rules);
    }

    fn equal(&mut self, value: u32, rules: impl FnOnce(&mut Self)) {
        let at = self.0.len();
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, 0);
        rules(self);
        let length = self.0.len() - at - 1;
        self.0[at].jf = u8::try_from(length).expect("a block is short");
    }
}

fn call(number: c_long) -> u32 {
    u32::try_from(number).expect("calls' numbers are small")
}
