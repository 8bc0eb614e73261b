//! A listening UNIX socket that only its owner can reach.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, bail};

/// Listens at `path` with mode 0600. A socket that nobody listens on any more is replaced; one that is in
/// use, or anything else of that name, is refused.
///
/// # Errors
/// Names the path and what to do.
pub fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    make_room(path)?;
    bind_private(path).with_context(|| format!("listen on {}", path.display()))
}

fn make_room(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        bail!("{shown} is there and is no socket; name another path, or remove it");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("remove the unused socket {shown}"))
        }
        Ok(_) => bail!("{shown} is in use by another process; name another path"),
        Err(error) => Err(error).with_context(|| format!("look whether {shown} is in use")),
    }
}

/// The mode is set before the socket has a name: there is no moment in which others could connect.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    const BACKLOG: i32 = 16;
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let most = address.sun_path.len() - 1;
        return Err(io::Error::other(format!("the path of a socket has at most {most} bytes")));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: plain arguments.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: a new fd that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: an open fd; `address` is valid for `len` bytes.
    unsafe {
        check(libc::fchmod(fd.as_raw_fd(), 0o600))?;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len))?;
        check(libc::listen(fd.as_raw_fd(), BACKLOG))?;
    }
    Ok(UnixListener::from(fd))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_can_reach_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = listen(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(listen(&path).unwrap());
        let second = listen(&path).expect("nobody listens there any more");
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        drop(second);
        let file = dir.path().join("f");
        std::fs::write(&file, "kept").unwrap();
        let error = listen(&file).unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
    }

    #[test]
    fn a_path_that_is_too_long_says_so() {
        let error = format!("{:#}", listen(Path::new(&"x".repeat(200))).unwrap_err());
        assert!(error.contains("107 bytes"), "{error}");
    }
}
