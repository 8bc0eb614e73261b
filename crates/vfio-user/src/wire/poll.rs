//! Waiting for several sockets at once.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

/// Waits until one of two fds is readable (or closed) and says which are; both `false` when the
/// deadline passed or a signal came.
pub(crate) fn wait_readable(
    fds: [Option<BorrowedFd<'_>>; 2],
    deadline: Option<Instant>,
) -> io::Result<[bool; 2]> {
    // A negative fd is ignored by poll.
    let mut polls = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let timeout_ms = deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when poll returns for it.
        let ms = left.as_millis().saturating_add(u128::from(left.subsec_nanos() % 1_000_000 != 0));
        i32::try_from(ms).unwrap_or(i32::MAX)
    });
    // SAFETY: the array is live and its length is given.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok([false; 2]);
    }
    Ok(polls.map(|poll| poll.revents != 0))
}
