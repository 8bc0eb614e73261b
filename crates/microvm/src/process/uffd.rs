//! userfaultfd in asynchronous write-protect mode, and PAGEMAP_SCAN (Linux 6.7). The structures and
//! numbers are those of `linux/userfaultfd.h` and `linux/fs.h`, which distributions' headers often lack.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const UFFDIO_API: libc::Ioctl = iowr::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = iowr::<Register>(0xaa, 0x00);
const UFFDIO_WRITEPROTECT: libc::Ioctl = iowr::<WriteProtect>(0xaa, 0x06);
const PAGEMAP_SCAN: libc::Ioctl = iowr::<ScanArgs>(b'f', 16);

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `_IOWR(group, number, T)`.
const fn iowr<T>(group: u8, number: u8) -> libc::Ioctl {
    let size = size_of::<T>() as u64;
    (3 << 30 | size << 16 | (group as u64) << 8 | number as u64) as libc::Ioctl
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: a run of pages, by host address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PageRegion {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    categories: u64,
}

/// A userfaultfd whose ranges are write-protected page by page. A write clears the protection of its page in
/// the kernel, without a message to anyone.
#[derive(Debug)]
pub struct AsyncWriteProtect {
    fd: OwnedFd,
}

impl AsyncWriteProtect {
    /// Opens one; the errors name the step.
    pub fn new() -> Result<Self, (&'static str, io::Error)> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: a system call with one integer argument.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(("userfaultfd", io::Error::last_os_error()));
        }
        // SAFETY: a new fd that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        let features = UFFD_FEATURE_PAGEFAULT_FLAG_WP
            | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            | UFFD_FEATURE_WP_UNPOPULATED
            | UFFD_FEATURE_WP_ASYNC;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the struct is what the ioctl expects.
        unsafe { ioctl(&fd, UFFDIO_API, &mut api) }.map_err(|error| ("UFFDIO_API", error))?;
        Ok(Self { fd })
    }

    /// Takes a whole mapping in and protects every page of it, those without memory behind them included.
    /// Both end when this is dropped.
    pub fn protect(&self, start: u64, len: u64) -> Result<(), (&'static str, io::Error)> {
        let mut register = Register { start, len, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the struct is what the ioctl expects; in asynchronous mode no access ever waits for us.
        unsafe { ioctl(&self.fd, UFFDIO_REGISTER, &mut register) }
            .map_err(|error| ("UFFDIO_REGISTER", error))?;
        loop {
            let mut protect = WriteProtect { start, len, mode: UFFDIO_WRITEPROTECT_MODE_WP };
            // SAFETY: as above.
            match unsafe { ioctl(&self.fd, UFFDIO_WRITEPROTECT, &mut protect) } {
                Ok(_) => return Ok(()),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(("UFFDIO_WRITEPROTECT", error)),
            }
        }
    }
}

/// Finds the pages of `range` that were written and protects them again, both in one step for each page.
/// Fills `found` and answers how much of it, and where the scan stopped: at the end of `range`, or before
/// it because `found` is full.
///
/// The categories asked for are exactly those for which the kernel takes a page without a page-table entry
/// as written: a page that was written and then reclaimed is not lost.
pub fn scan_written(
    pagemap: &File,
    range: Range<u64>,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut args = ScanArgs {
        size: size_of::<ScanArgs>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start: range.start,
        end: range.end,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..Default::default()
    };
    // SAFETY: the struct is what the ioctl expects, and `vec` is as long as `vec_len` says.
    let count = unsafe { ioctl(pagemap, PAGEMAP_SCAN, &mut args) }?;
    Ok(((count as usize).min(found.len()), args.walk_end))
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

/// # Safety
///
/// `argument` must be the structure that `request` takes.
unsafe fn ioctl<T>(fd: &impl AsRawFd, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise; the fd is open while it is borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_of_the_headers() {
        let numbers = [UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT, PAGEMAP_SCAN];
        assert_eq!(
            numbers.map(|number| number as u32),
            [0xc018_aa3f, 0xc020_aa00, 0xc018_aa06, 0xc060_6610]
        );
    }
}
