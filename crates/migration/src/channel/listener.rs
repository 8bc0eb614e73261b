//! Connecting and listening.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Address, ChannelError, Stream};

/// Connects once; every address a name has is tried within `limit`. Looking the name up is not limited.
pub fn connect(address: &Address, limit: Duration) -> Result<Stream, ChannelError> {
    connect_any(address, limit)
        .map_err(|source| ChannelError::Connect { address: address.to_string(), source })
}

fn connect_any(address: &Address, limit: Duration) -> io::Result<Stream> {
    let label = address.to_string();
    match address {
        Address::Unix(path) => Stream::from_unix(connect_unix(path, limit)?, label),
        Address::Tcp { host, port } => {
            let deadline = Instant::now() + limit;
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host.as_str(), *port).to_socket_addrs()? {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                match TcpStream::connect_timeout(&address, left) {
                    Ok(socket) => return Stream::from_tcp(socket, label),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// As [`UnixStream::connect`], which would wait for ever on a listener whose backlog is full.
fn connect_unix(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = unix_address(path)?;
    let socket = UnixStream::from(unix_socket()?);
    // SO_SNDTIMEO limits connect(2) too (socket(7)).
    socket.set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
    loop {
        // SAFETY: `address` lives across the call, and the length is its size.
        let result = unsafe {
            libc::connect(socket.as_raw_fd(), (&raw const address).cast(), UNIX_ADDRESS_LEN)
        };
        if result == 0 {
            socket.set_write_timeout(None)?;
            return Ok(socket);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            _ => return Err(error),
        }
    }
}

/// As [`UnixListener::bind`], but nobody connects before the socket is for this user alone.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let address = unix_address(path)?;
    let socket = unix_socket()?;
    let fd = socket.as_raw_fd();
    // SAFETY: `address` lives across the call, and the length is its size.
    if unsafe { libc::bind(fd, (&raw const address).cast(), UNIX_ADDRESS_LEN) } != 0 {
        return Err(io::Error::last_os_error());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    // SAFETY: no memory involved.
    if unsafe { libc::listen(fd, BACKLOG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixListener::from(socket))
}

const UNIX_ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;
/// Connections that may wait to be accepted: one control and the data channels.
const BACKLOG: libc::c_int = 128;

fn unix_address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is plain data, for which zeroes are valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The path ends with a NUL inside the address.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let what = format!("a socket's path has 1 to {} bytes", address.sun_path.len() - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    for (target, byte) in address.sun_path.iter_mut().zip(bytes) {
        *target = *byte as libc::c_char;
    }
    Ok(address)
}

fn unix_socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory involved.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes connections in. A UNIX socket is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    /// The UNIX socket made here, with its inode, so that nobody else's is removed.
    made: Option<(PathBuf, u64)>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens. A UNIX socket left behind is replaced if nobody listens on it, and is for this user alone
    /// (mode 0600): whoever connects can hand over a guest.
    pub fn bind(address: &Address) -> Result<Self, ChannelError> {
        Self::bind_any(address)
            .map_err(|source| ChannelError::Listen { address: address.to_string(), source })
    }

    fn bind_any(address: &Address) -> io::Result<Self> {
        let (socket, address, made) = match address {
            Address::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port))?;
                let port = socket.local_addr()?.port();
                (Socket::Tcp(socket), Address::Tcp { host: host.clone(), port }, None)
            }
            Address::Unix(path) => {
                remove_stale(path)?;
                let socket = listen_unix(path)?;
                let made = Some((path.clone(), fs::symlink_metadata(path)?.ino()));
                (Socket::Unix(socket), address.clone(), made)
            }
        };
        match &socket {
            Socket::Tcp(socket) => socket.set_nonblocking(true)?,
            Socket::Unix(socket) => socket.set_nonblocking(true)?,
        }
        Ok(Self { socket, address, made })
    }

    /// Where it listens; with the real port where 0 was asked for.
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// The next connection, or `None` when there is none within `limit`.
    pub fn accept_timeout(&self, limit: Duration) -> Result<Option<Stream>, ChannelError> {
        let deadline = Instant::now() + limit;
        loop {
            match self.accept_now() {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) if is_passing(&error) => {}
                Err(source) => return Err(self.error("accept", source)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            wait_readable(self.as_fd(), left).map_err(|source| self.error("poll", source))?;
        }
    }

    fn accept_now(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (socket, peer) = socket.accept()?;
                Stream::from_tcp(socket, format!("tcp:{peer}"))
            }
            Socket::Unix(socket) => {
                let (socket, _) = socket.accept()?;
                Stream::from_unix(socket, self.address.to_string())
            }
        }
    }

    fn error(&self, call: &'static str, source: io::Error) -> ChannelError {
        ChannelError::Io { channel: self.address.to_string(), call, source }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.made
            && fs::symlink_metadata(path).is_ok_and(|found| found.ino() == *inode)
        {
            // Left behind it would only be replaced by the next one.
            let _ = fs::remove_file(path);
        }
    }
}

/// Errors that concern one connection, not the listener: those that accept(2) passes on from the network,
/// and a socket that was reset before its options were set.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::EINTR
                | libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EINVAL
                | libc::ENOTCONN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
                | libc::EOPNOTSUPP
        )
    )
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let what = "something that is not a socket is there; remove it or choose another path";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    }
    match connect_unix(path, Duration::from_secs(1)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there already")),
    }
}

fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = libc::c_int::try_from(limit.as_millis().max(1)).unwrap_or(libc::c_int::MAX);
    // SAFETY: one pollfd that lives across the call.
    let result = unsafe { libc::poll(&raw mut poll, 1, ms) };
    let error = io::Error::last_os_error();
    if result < 0 && error.kind() != io::ErrorKind::Interrupted { Err(error) } else { Ok(()) }
}
