//! Connecting with a time limit: a server that never accepts must not block its client for ever.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A server that comes up binds its socket before it listens; in between it refuses. One that is gone does so too.
const COMING_UP: Duration = Duration::from_millis(200);
const TICK: Duration = Duration::from_millis(2);

/// Connects to the socket at `path` within `timeout` (rounded up to 1 ms).
pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    // SAFETY: sockaddr_un is plain data for which all zeroes are valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // The last byte stays the terminating NUL.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        let what = "a socket path has 1 to 107 bytes and no NUL";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new fd that nobody else owns.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // The send timeout limits connect() too (unix(7) sockets wait for room in the backlog).
    stream.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    let patience = Instant::now() + timeout.min(COMING_UP);
    loop {
        // SAFETY: the address is a live sockaddr_un of the length given.
        let result =
            unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) };
        if result == 0 {
            return Ok(stream);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::ConnectionRefused if Instant::now() < patience => {
                std::thread::sleep(TICK);
            }
            io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_server_that_has_bound_and_does_not_listen_yet_is_waited_for_and_one_that_is_gone_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("server"), dir.path().join("gone"));
        let limit = Duration::from_secs(5);
        // The name of a socket that refuses, as one that is bound only does.
        drop(UnixListener::bind(&path).unwrap());
        std::fs::rename(&path, &other).unwrap();
        let gone = connect(&other, limit).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::ConnectionRefused);

        std::fs::hard_link(&other, &path).unwrap();
        let (begun, begins) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            begun.send(()).unwrap();
            std::thread::sleep(COMING_UP / 10);
            let next = path.with_extension("next");
            let listener = UnixListener::bind(&next).unwrap();
            std::fs::rename(next, &path).unwrap();
            listener
        });
        begins.recv().unwrap();
        connect(&dir.path().join("server"), limit).unwrap();
        drop(server.join().unwrap());
    }
}
