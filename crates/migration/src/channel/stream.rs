//! A connected TCP or UNIX socket.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::ChannelError;
use crate::wire::WireError;

/// How long TCP bears unacknowledged data, or a peer that takes nothing in, before the link is down.
const USER_TIMEOUT_MS: libc::c_int = 10_000;
/// Buffers of a TCP socket within this host: what waits in larger ones falls out of the cache before it is read.
const LOOPBACK_BUFFER_BYTES: libc::c_int = 256 << 10;
/// Buffer of a UNIX socket: a few frames, so that neither side sleeps for each.
const UNIX_BUFFER_BYTES: libc::c_int = 1 << 20;

/// Most iovecs of one call; the kernel's limit (UIO_MAXIOV) is 1024.
pub(super) const IOVECS_MAX: usize = 512;

/// A connected socket with a name for messages.
///
/// A blocked read or write ends when [`shutdown`](Self::shutdown) is called on any clone.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    label: Arc<str>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// A connected TCP socket; sets TCP_NODELAY, TCP_USER_TIMEOUT (10 s) and keep-alive. Buffers are left
    /// to the kernel, which sizes them to the link, but for connections within this host.
    pub fn from_tcp(socket: TcpStream, label: impl Into<Arc<str>>) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let fd = socket.as_fd();
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, USER_TIMEOUT_MS)?;
        set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5)?;
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1)?;
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5)?;
        if socket.peer_addr().is_ok_and(|peer| peer.ip().is_loopback()) {
            set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, LOOPBACK_BUFFER_BYTES)?;
            set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, LOOPBACK_BUFFER_BYTES)?;
        }
        Ok(Self { socket: Socket::Tcp(socket), label: label.into() })
    }

    /// A connected UNIX stream socket; its buffers grow as far as the host allows.
    pub fn from_unix(socket: UnixStream, label: impl Into<Arc<str>>) -> io::Result<Self> {
        let fd = socket.as_fd();
        set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, UNIX_BUFFER_BYTES)?;
        set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, UNIX_BUFFER_BYTES)?;
        Ok(Self { socket: Socket::Unix(socket), label: label.into() })
    }

    /// The channel's name, for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Files can come along.
    pub fn carries_files(&self) -> bool {
        matches!(self.socket, Socket::Unix(_))
    }

    /// Names the channel. Clones made before keep their name.
    pub fn set_label(&mut self, label: impl Into<Arc<str>>) {
        self.label = label.into();
    }

    /// Another handle of the same socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        let socket = match &self.socket {
            Socket::Tcp(socket) => Socket::Tcp(socket.try_clone()?),
            Socket::Unix(socket) => Socket::Unix(socket.try_clone()?),
        };
        Ok(Self { socket, label: Arc::clone(&self.label) })
    }

    /// Ends both directions; whoever blocks on the socket returns. What was written before still arrives.
    pub fn shutdown(&self) {
        // It may be down already; then there is nothing to do.
        let _ = match &self.socket {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    /// Writes as much as fits without waiting; 0 where nothing does.
    pub(crate) fn write_now(&self, buffer: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        loop {
            // SAFETY: the buffer is borrowed across the call, and the length is its own.
            let sent = unsafe {
                libc::send(self.as_raw_fd(), buffer.as_ptr().cast(), buffer.len(), flags)
            };
            let Ok(sent) = usize::try_from(sent) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => return Ok(0),
                    _ => return Err(error),
                }
            };
            return Ok(sent);
        }
    }

    /// Limits one read; `None` = no limit. Holds for all clones.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        match &self.socket {
            Socket::Tcp(socket) => socket.set_read_timeout(limit),
            Socket::Unix(socket) => socket.set_read_timeout(limit),
        }
    }

    /// Limits one write; `None` = no limit. Holds for all clones.
    pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        match &self.socket {
            Socket::Tcp(socket) => socket.set_write_timeout(limit),
            Socket::Unix(socket) => socket.set_write_timeout(limit),
        }
    }

    /// Changes how long TCP bears a peer that acknowledges or takes in nothing. Nothing on UNIX sockets.
    pub fn set_user_timeout(&self, limit: Duration) -> io::Result<()> {
        let ms = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        match &self.socket {
            Socket::Tcp(socket) => {
                set_option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, ms)
            }
            Socket::Unix(_) => Ok(()),
        }
    }

    pub(crate) fn io_error(&self, call: &'static str, source: io::Error) -> ChannelError {
        ChannelError::Io { channel: self.label.to_string(), call, source }
    }

    pub(crate) fn wire_error(&self, source: WireError) -> ChannelError {
        ChannelError::Wire { channel: self.label.to_string(), source }
    }

    pub(crate) fn closed(&self) -> ChannelError {
        ChannelError::Closed { channel: self.label.to_string() }
    }

    pub(crate) fn truncated(&self) -> ChannelError {
        ChannelError::Truncated { channel: self.label.to_string() }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.socket {
            Socket::Tcp(socket) => (&*socket).read(buffer),
            Socket::Unix(socket) => (&*socket).read(buffer),
        }
    }
}

/// Never raises SIGPIPE, whatever the process that embeds us does with it.
impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        // SAFETY: msghdr is plain data, for which zeroes are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // IoSlice is an iovec by its documentation; sendmsg does not write to it.
        message.msg_iov = buffers.as_ptr().cast_mut().cast();
        message.msg_iovlen = buffers.len().min(IOVECS_MAX) as _;
        // SAFETY: message and buffers are borrowed across the call.
        let sent =
            unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn set_option(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` lives across the call and `len` is its size.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
