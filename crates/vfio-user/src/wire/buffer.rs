//! How much may be on its way on a socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a socket has by default (`net.core.wmem_default` as shipped); no less is asked for.
const DEFAULT_BYTES: usize = 212_992;

/// Lets a message of `bytes` go out at once, as far as the host allows it (`net.core.wmem_max`). Else who sends one waits for who
/// receives it, piece by piece, and each wakes the other.
pub(crate) fn set_send_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes.max(DEFAULT_BYTES)).unwrap_or(libc::c_int::MAX);
    let (value, size) = ((&raw const bytes).cast(), size_of_val(&bytes) as libc::socklen_t);
    // SAFETY: the option is an int, which lives across the call.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, value, size)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
