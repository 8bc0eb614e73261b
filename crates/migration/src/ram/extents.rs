//! Which parts of a memfd hold data. The rest are holes: zero, and reading them through a mapping would
//! fill them (shmem allocates on a read fault too).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The parts of `range` (bytes) of a memfd that hold data, ascending. Where the kernel cannot tell, the
/// rest of the range is data. What is written meanwhile may be missing.
pub(crate) fn data_extents(
    fd: BorrowedFd<'_>,
    range: Range<u64>,
) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let start = match seek(fd, next, libc::SEEK_DATA) {
            Ok(start) => start,
            // ENXIO: a hole up to the end of the file (lseek(2)).
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => range.end,
            Err(_) => next,
        };
        if start >= range.end {
            next = range.end;
            return None;
        }
        let end = seek(fd, start, libc::SEEK_HOLE).unwrap_or(range.end);
        // A hole that is filled between the two calls moves the start up to the end: never stand still.
        let end = if end <= start { range.end } else { end.min(range.end) };
        next = end;
        Some(start..end)
    })
}

fn seek(fd: BorrowedFd<'_>, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    // SAFETY: no memory involved. The file's position means nothing: nobody reads or writes at it.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), offset as libc::off_t, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}
