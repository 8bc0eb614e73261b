//! [`Channel`]: a socket on which messages are sent and received whole.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::codec::header::HEADER_BYTES;
use crate::codec::{Header, HeaderError};

use super::buffer::set_send_buffer;
use super::fds::{receive_some, send_some};
use super::poll::wait_readable;

/// How often a blocked send looks at its deadline.
const SEND_TICK_MAX: Duration = Duration::from_millis(500);

/// Why a message was not sent.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The deadline passed before the first byte went: the channel is as before.
    TimedOut,
    /// The channel is broken, or a message was cut in the middle.
    Broken(io::Error),
}

/// Why no message was received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    /// The peer closed between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed inside of a message.
    #[error("the peer closed the connection inside of a message")]
    Truncated,
    /// The peer stopped inside of a message.
    #[error("the peer stopped inside of a message")]
    Stalled,
    /// The header is not one.
    #[error("garbage on the connection: {0}")]
    Header(#[from] HeaderError),
    /// More fds than a message may have.
    #[error("{have} file descriptors in a message, {allowed} are allowed")]
    Fds {
        /// How many there are so far.
        have: usize,
        /// How many may be.
        allowed: usize,
    },
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One socket. Receiving is for one thread at a time, sending for any.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    fds_max: usize,
    stall_timeout: Duration,
    sending: Mutex<bool>,
    sent: Condvar,
}

impl Channel {
    /// A channel whose peer may attach `fds_max` fds to a message, and is given up when a message that
    /// began does not come to its end within `stall_timeout`.
    pub(crate) fn new(
        stream: UnixStream,
        fds_max: usize,
        stall_timeout: Duration,
    ) -> io::Result<Self> {
        let (sending, sent) = (Mutex::new(false), Condvar::new());
        let mut channel = Self { stream, fds_max, stall_timeout, sending, sent };
        channel.set_stall_timeout(stall_timeout)?;
        Ok(channel)
    }

    /// Changes the limit given to [`new`](Self::new).
    pub(crate) fn set_stall_timeout(&mut self, stall_timeout: Duration) -> io::Result<()> {
        self.stall_timeout = stall_timeout.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(self.stall_timeout))?;
        self.stream.set_write_timeout(Some(self.stall_timeout.min(SEND_TICK_MAX)))
    }

    /// Lets a message of `bytes` go out at once, as far as the host allows it.
    pub(crate) fn set_send_buffer(&self, bytes: usize) -> io::Result<()> {
        set_send_buffer(self.stream.as_fd(), bytes)
    }

    /// Ends both directions; blocked threads return.
    pub(crate) fn shutdown(&self) {
        // Already closed is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Another handle of the socket, to shut it down with.
    pub(crate) fn try_clone_stream(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Waits until a message comes or the connection ends; `false` when the deadline passed first.
    pub(crate) fn wait_readable(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let ready = wait_readable([Some(self.stream.as_fd()), None], Some(deadline))?;
            if ready[0] || Instant::now() >= deadline {
                return Ok(ready[0]);
            }
        }
    }

    /// Sends one message whole: header and fixed part in `head`, then `data`.
    pub(crate) fn send(
        &self,
        head: &[u8],
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), SendError> {
        let _turn = self.take_turn(deadline).ok_or(SendError::TimedOut)?;
        let total = head.len() + data.len();
        let mut at = 0;
        while at < total {
            let head = head.get(at..).unwrap_or_default();
            let data = data.get(at.saturating_sub(total - data.len())..).unwrap_or_default();
            let fds = if at == 0 { fds } else { &[] };
            match send_some(self.stream.as_fd(), head, data, fds) {
                Ok(sent) => at += sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if deadline.is_none_or(|deadline| Instant::now() < deadline) {
                        continue;
                    }
                    if at == 0 {
                        return Err(SendError::TimedOut);
                    }
                    // Half a message is on the wire: nobody can speak here any more.
                    self.shutdown();
                    return Err(SendError::Broken(ErrorKind::TimedOut.into()));
                }
                Err(error) => {
                    self.shutdown();
                    return Err(SendError::Broken(error));
                }
            }
        }
        Ok(())
    }

    /// Waits for the next message and receives its header; fds of the message go to `fds`. Waits without
    /// limit for the first byte.
    pub(crate) fn receive_header(
        &self,
        limit_bytes: usize,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Header, ReceiveError> {
        let mut bytes = [0; HEADER_BYTES];
        self.fill(&mut bytes, fds, true)?;
        Ok(Header::decode(&bytes, limit_bytes)?)
    }

    /// As [`receive_header`](Self::receive_header), but the first byte too must come within the stall
    /// timeout.
    pub(crate) fn receive_header_now(
        &self,
        limit_bytes: usize,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Header, ReceiveError> {
        let mut bytes = [0; HEADER_BYTES];
        self.fill(&mut bytes, fds, false)?;
        Ok(Header::decode(&bytes, limit_bytes)?)
    }

    /// Receives all of `buf`, part of the body of a message.
    pub(crate) fn receive_body(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<(), ReceiveError> {
        match self.fill(buf, fds, false) {
            Err(ReceiveError::Closed) => Err(ReceiveError::Truncated),
            other => other,
        }
    }

    /// Receives and drops `len` bytes of a body.
    pub(crate) fn discard(&self, len: usize, fds: &mut Vec<OwnedFd>) -> Result<(), ReceiveError> {
        let mut rest = len;
        let mut bin = [0; 4096];
        while rest > 0 {
            let part = rest.min(bin.len());
            let Some(buf) = bin.get_mut(..part) else { break };
            self.receive_body(buf, fds)?;
            rest -= part;
        }
        Ok(())
    }

    fn fill(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        idle_allowed: bool,
    ) -> Result<(), ReceiveError> {
        let mut at = 0;
        // Set at the first piece that is not the whole: progress byte by byte is a stall as well.
        let mut deadline = None;
        while at < buf.len() {
            let rest = buf.get_mut(at..).unwrap_or_default();
            match receive_some(self.stream.as_fd(), rest, fds) {
                Ok(0) if at == 0 => return Err(ReceiveError::Closed),
                Ok(0) => return Err(ReceiveError::Truncated),
                Ok(received) => {
                    at += received;
                    if fds.len() > self.fds_max {
                        let (have, allowed) = (fds.len(), self.fds_max);
                        return Err(ReceiveError::Fds { have, allowed });
                    }
                    if at < buf.len() {
                        let now = Instant::now();
                        if now > *deadline.get_or_insert(now + self.stall_timeout) {
                            return Err(ReceiveError::Stalled);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if at == 0 && idle_allowed {
                        continue;
                    }
                    return Err(ReceiveError::Stalled);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn take_turn(&self, deadline: Option<Instant>) -> Option<Turn<'_>> {
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        while *sending {
            sending = match deadline {
                None => self.sent.wait(sending).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.sent.wait_timeout(sending, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *sending = true;
        Some(Turn(self))
    }
}

/// The right to send; given back on drop.
struct Turn<'a>(&'a Channel);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.sending.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.sent.notify_one();
    }
}

/// The reason of a loss, from a failed send.
pub(crate) fn gone_reason(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
            "the peer closed the connection".into()
        }
        ErrorKind::TimedOut => "the peer does not take a message to its end".into(),
        _ => error.to_string(),
    }
}
