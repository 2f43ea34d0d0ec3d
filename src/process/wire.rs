//! The socket between supervisor, warden and program-to-be, and what is said over it.
//!
//! A `SOCK_SEQPACKET` pair keeps messages apart and tells when the other end is gone. The first
//! message carries the [`Setup`] and the program's standard input.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::net::UnixDatagram,
    path::PathBuf,
};

use nix::{
    errno::Errno,
    sys::socket::{
        self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag,
        SockType,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    child::Exit,
    sandbox::{Means, Profile},
};

/// The hidden subcommand and its two stages.
pub(super) const CHILD: &str = "child";
pub(super) const TEND: &str = "tend";
pub(super) const EXEC: &str = "exec";

/// A setup has to fit into a socket's default send buffer (208 KiB).
const SETUP_BYTES: usize = 192 * 1024;
/// Commands and reports are small; a failure's text is cut to fit.
const MESSAGE_BYTES: usize = 8 * 1024;

/// How a child is to be started; the program and its arguments come by the command line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) cwd: PathBuf,
    /// The supervisor is taken for dead after so many milliseconds without a word.
    pub(super) silence_ms: u64,
    pub(super) profile: Profile,
    pub(super) means: Means,
}

/// What the supervisor asks of a warden.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// "I live."
    Beat,
    /// SIGINT to the program's group.
    Interrupt,
    /// SIGTERM to the program's group, SIGKILL to everything after the grace.
    Terminate { grace_ms: u64 },
    /// SIGKILL to everything but the program.
    Sweep { id: u64 },
}

/// What a warden has to say.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The program runs, confined.
    Started {
        pid: u32,
    },
    Failed(Failure),
    /// The program is gone; and all its descendants, or (`clean` is false) some are stuck in the
    /// kernel.
    Exited {
        exit: Exit,
        clean: bool,
    },
    /// The sweep of that id is over; whether nothing was left.
    Swept {
        id: u64,
        clean: bool,
    },
}

/// What the second stage says before the socket's end, which tells that it became the program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Opening {
    /// The program-to-be is this process, a child of the one that was started.
    Split {
        pid: i32,
    },
    Failed(Failure),
}

/// Why a program did not start. Travels from the second stage through the warden.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) step: Step,
    errno: Option<i32>,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    Launch,
    EnterFolder,
    Confine,
    Start,
}

impl Failure {
    pub(super) fn new(step: Step, error: &io::Error) -> Self {
        let text = error.to_string().chars().take(1000).collect();
        Self {
            step,
            errno: error.raw_os_error(),
            text,
        }
    }

    pub(super) fn into_io(self) -> io::Error {
        self.errno
            .map_or_else(|| io::Error::other(self.text), io::Error::from_raw_os_error)
    }
}

/// One end of the socket. Nothing here blocks but [`Wire::receive_setup`],
/// [`Wire::receive_descriptor`] and [`Wire::await_end`].
#[derive(Debug)]
pub(super) struct Wire(OwnedFd);

impl Wire {
    /// Two ends, both closed on exec.
    pub(super) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// The end that this stage got as descriptor 0, as a copy that is closed on exec.
    pub(super) fn from_stdin() -> io::Result<Self> {
        io::stdin().as_fd().try_clone_to_owned().map(Self)
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends the first message.
    pub(super) fn send_setup(&self, setup: &Setup, stdin: BorrowedFd<'_>) -> io::Result<()> {
        let text = serde_json::to_vec(setup)?;
        if text.len() > SETUP_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::ArgumentListTooLong,
                "profile too long",
            ));
        }
        self.send_with(&text, stdin)
    }

    /// Sends a descriptor and no more.
    pub(super) fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.send_with(b"0", descriptor)
    }

    fn send_with(&self, text: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<()> {
        socket::sendmsg::<()>(
            self.as_raw_fd(),
            &[IoSlice::new(text)],
            &[ControlMessage::ScmRights(&[descriptor.as_raw_fd()])],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// Waits for the first message.
    pub(super) fn receive_setup(&self) -> io::Result<(Setup, OwnedFd)> {
        let mut text = vec![0; SETUP_BYTES];
        let (length, stdin) = self.receive_with(&mut text)?;
        Ok((serde_json::from_slice(&text[..length])?, stdin))
    }

    /// Waits for a descriptor.
    pub(super) fn receive_descriptor(&self) -> io::Result<OwnedFd> {
        self.receive_with(&mut [0])
            .map(|(_, descriptor)| descriptor)
    }

    fn receive_with(&self, text: &mut [u8]) -> io::Result<(usize, OwnedFd)> {
        let mut parts = [IoSliceMut::new(text)];
        let mut rights = nix::cmsg_space!(RawFd);
        let message = socket::recvmsg::<()>(
            self.as_raw_fd(),
            &mut parts,
            Some(&mut rights),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let length = message.bytes;
        let descriptor = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let descriptor = descriptor.ok_or(io::ErrorKind::UnexpectedEof)?;
        #[expect(
            unsafe_code,
            reason = "the kernel just made this descriptor for us alone"
        )]
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok((length, descriptor))
    }

    /// Waits until the other end says no more.
    pub(super) fn await_end(&self) -> io::Result<()> {
        while socket::recv(self.as_raw_fd(), &mut [0], MsgFlags::empty())? > 0 {}
        Ok(())
    }

    /// Sends a small message or fails at once.
    pub(super) fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        socket::send(self.as_raw_fd(), &text, flags)?;
        Ok(())
    }

    /// Takes a small message, `None` at the end; `WouldBlock` if there is none yet.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut text = [0; MESSAGE_BYTES];
        let mut receive = || socket::recv(self.as_raw_fd(), &mut text, MsgFlags::MSG_DONTWAIT);
        let length = match receive() {
            // The other end went without reading all: what it said before comes after that.
            Err(Errno::ECONNRESET) => receive()?,
            length => length?,
        };
        parse(&text[..length])
    }

    /// The same end, for a task to hear what the warden reports.
    pub(super) fn reports(&self) -> io::Result<Reports> {
        // Sequenced packets differ from datagrams only in that the end is heard.
        let socket = UnixDatagram::from(self.0.try_clone()?);
        socket.set_nonblocking(true)?;
        tokio::net::UnixDatagram::from_std(socket).map(Reports)
    }

    /// Tells the other end that no more will be said; it may still answer.
    pub(super) fn finish(&self) {
        // Fails only where the other end is gone already.
        socket::shutdown(self.as_raw_fd(), Shutdown::Write).ok();
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a warden reports, one after another. Holds the socket open, but does not keep the warden
/// from hearing [`Wire::finish`].
#[derive(Debug)]
pub(super) struct Reports(tokio::net::UnixDatagram);

impl Reports {
    /// The next report, `None` once the warden is gone.
    pub(super) async fn next(&self) -> io::Result<Option<Report>> {
        let mut text = [0; MESSAGE_BYTES];
        let length = match self.0.recv(&mut text).await {
            // As in `Wire::receive`.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.0.recv(&mut text).await?
            }
            length => length?,
        };
        parse(&text[..length])
    }
}

/// No message is empty: no bytes are the end.
fn parse<T: DeserializeOwned>(text: &[u8]) -> io::Result<Option<T>> {
    if text.is_empty() {
        Ok(None)
    } else {
        Ok(Some(serde_json::from_slice(text)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setup_carries_a_descriptor_and_the_end_is_heard() {
        let (ours, theirs) = Wire::pair().unwrap();
        let setup = Setup {
            cwd: "/x".into(),
            silence_ms: 7,
            profile: Profile::unconfined(),
            means: Means::NONE,
        };
        let (reader, writer) = io::pipe().unwrap();
        ours.send_setup(&setup, reader.as_fd()).unwrap();
        let (got, stdin) = theirs.receive_setup().unwrap();
        assert_eq!(got.silence_ms, 7);
        io::Write::write_all(&mut &writer, b"hi").unwrap();
        drop((reader, writer));
        let mut text = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(stdin), &mut text).unwrap();
        assert_eq!(text, "hi");

        let nothing = theirs.receive::<Command>().unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        ours.send(&Command::Sweep { id: 3 }).unwrap();
        ours.finish();
        assert!(matches!(
            theirs.receive().unwrap(),
            Some(Command::Sweep { id: 3 })
        ));
        assert!(theirs.receive::<Command>().unwrap().is_none());
        theirs.send(&Report::Swept { id: 3, clean: true }).unwrap();
    }

    #[test]
    fn last_words_are_heard_from_an_end_that_did_not_listen() {
        let (ours, theirs) = Wire::pair().unwrap();
        ours.send(&Command::Beat).unwrap();
        theirs.send(&Report::Swept { id: 3, clean: true }).unwrap();
        drop(theirs);
        assert!(matches!(
            ours.receive().unwrap(),
            Some(Report::Swept { clean: true, .. })
        ));
        assert!(ours.receive::<Report>().unwrap().is_none());
    }
}
