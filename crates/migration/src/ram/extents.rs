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
    let whole = is_whole(fd, range.end);
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        if whole {
            return Some(std::mem::replace(&mut next, range.end)..range.end);
        }
        let start = match seek(fd, next, libc::SEEK_DATA) {
            Ok(start) => start.max(next),
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

/// The parts of ascending `extents` that lie within `range`. For many ranges of one file: look its extents up once
/// and clip them, since the kernel finds the end of an extent page by page, from each start anew.
pub(crate) fn within(
    extents: &[Range<u64>],
    range: Range<u64>,
) -> impl Iterator<Item = Range<u64>> {
    let behind = extents.partition_point(|extent| extent.end <= range.start);
    extents[behind..]
        .iter()
        .take_while(move |extent| extent.start < range.end)
        .map(move |extent| extent.start.max(range.start)..extent.end.min(range.end))
}

/// The first byte from `at` on that is data, as far as the kernel can tell; `None`: there is none. Never looks
/// for the end of data, which takes as long as there are pages up to the next hole.
pub(crate) fn next_data(fd: BorrowedFd<'_>, at: u64) -> Option<u64> {
    match seek(fd, at, libc::SEEK_DATA) {
        Ok(start) => Some(start.max(at)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => None,
        Err(_) => Some(at),
    }
}

/// The host has given all `len` bytes: there is no hole. Asked first, since walking data up to its end takes 7 to 10 ms
/// per GiB.
fn is_whole(fd: BorrowedFd<'_>, len: u64) -> bool {
    // SAFETY: stat is plain data, for which zeroes are valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives across the call.
    let told = unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } == 0;
    let whole = |blocks: u64, size: u64| size >= len && blocks.saturating_mul(512) >= size;
    told && len > 0
        && whole(stat.st_blocks.try_into().unwrap_or(0), stat.st_size.try_into().unwrap_or(0))
}

fn seek(fd: BorrowedFd<'_>, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    // SAFETY: no memory involved. The file's position means nothing: nobody reads or writes at it.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), offset as libc::off_t, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::{GuestMemory, PAGE_SIZE, RegionLayout};

    #[test]
    fn extents_are_the_pages_that_were_written_within_the_range() {
        let layout = [RegionLayout { gpa: 0, len: 64 * PAGE_SIZE }];
        let memory = GuestMemory::new(&layout).unwrap();
        let extents = |range| data_extents(memory.region_fd(0), range).collect::<Vec<_>>();
        let pages = |range: Range<u64>| range.start * PAGE_SIZE..range.end * PAGE_SIZE;
        assert_eq!(extents(pages(0..64)), []);
        for page in [3, 4, 5, 20, 63] {
            memory.write(page * PAGE_SIZE, &[1]).unwrap();
        }
        assert_eq!(extents(pages(0..64)), [pages(3..6), pages(20..21), pages(63..64)]);
        let all = extents(pages(0..64));
        for range in [0..64, 4..20, 5..21, 21..63, 7..7, 63..70].map(pages) {
            let clipped: Vec<_> = within(&all, range.clone()).collect();
            assert_eq!(clipped, extents(range.clone()), "{range:?}");
        }
        assert_eq!(extents(pages(4..20)), [pages(4..6)]);
        assert_eq!(extents(pages(5..21)), [pages(5..6), pages(20..21)]);
        assert_eq!(extents(pages(21..63)), []);
        assert_eq!(extents(pages(7..7)), []);
        // The range's own end counts, not the file's.
        assert_eq!(extents(pages(63..70)), [pages(63..64)]);
        let next = |page| next_data(memory.region_fd(0), page * PAGE_SIZE);
        assert_eq!(next(0), Some(3 * PAGE_SIZE));
        assert_eq!(next(4), Some(4 * PAGE_SIZE));
        assert_eq!(next(6), Some(20 * PAGE_SIZE));
        assert_eq!(next(64), None);
        // All of it is there: nobody walks it.
        memory.write(0, &[1; 64 * PAGE_SIZE as usize]).unwrap();
        assert!(is_whole(memory.region_fd(0), 64 * PAGE_SIZE));
        assert!(!is_whole(memory.region_fd(0), 65 * PAGE_SIZE));
        assert_eq!(extents(pages(0..64)), [pages(0..64)]);
        assert_eq!(extents(pages(3..5)), [pages(3..5)]);
        assert_eq!(extents(pages(7..7)), []);
    }

    #[test]
    fn where_the_kernel_cannot_tell_everything_is_data() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        for fd in [reader.as_fd(), null.as_fd()] {
            let mut extents = data_extents(fd, 5..9);
            assert_eq!((extents.next(), extents.next()), (Some(5..9), None));
            assert_eq!(next_data(fd, 5), Some(5));
        }
    }
}
