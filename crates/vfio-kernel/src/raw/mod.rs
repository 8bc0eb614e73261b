//! The uAPI calls as they are: thin, safe functions on file descriptors, one ioctl each.
//!
//! Nothing here knows a rule of the protocol: arguments go to the kernel as given, malformed ones
//! included, and what comes back is the kernel's errno. Structs and numbers are our own (`uapi`),
//! because distribution headers may be years older than the kernel that runs.
//!
//! Memory safety is kept by construction: a buffer that the kernel may write to is always at least as
//! large as the largest thing any known call writes there, pointers inside of arguments are made
//! here from borrowed slices, and the one feature that writes through a pointer in its payload
//! (DMA_LOGGING_REPORT) has a function of its own, see [`feature`].
//!
//! | file | holds |
//! |---|---|
//! | [`uapi`] | structs and numbers of `linux/vfio.h` and `linux/iommufd.h` |
//! | [`device`] | features, regions, interrupts, reset, binding |
//! | [`stream`] | the migration data fd: PRECOPY_INFO, read, write, poll |
//! | [`group`] | group and container, type1 |
//! | [`iommufd`] | IOAS, HWPT, dirty tracking |
//! | [`mock`] | `IOMMU_TEST_CMD`, the kernel's mock domain for tests |
//! | [`memory`] | mappings of files, and bitmaps lent to the kernel |

pub mod device;
pub mod group;
pub mod iommufd;
pub mod memory;
pub mod mock;
pub mod stream;
pub mod uapi;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use device::*;
pub use stream::*;

/// The result of a system call that answers -1 with errno.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl whose argument is a number.
fn ioctl_value(fd: BorrowedFd<'_>, command: u32, value: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: every command that is passed here takes its argument by value, so the kernel touches no
    // memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command as libc::Ioctl, value) })
}

/// An ioctl whose argument is a struct.
///
/// # Safety
///
/// `command` reads and writes at most `size_of::<T>()` bytes at its argument, and every pointer inside of
/// `argument` leads to memory that it may use as it will until it returns.
unsafe fn ioctl_struct<T>(
    fd: BorrowedFd<'_>,
    command: u32,
    argument: &mut T,
) -> io::Result<libc::c_int> {
    // SAFETY: by this function's own contract.
    check(unsafe {
        libc::ioctl(fd.as_raw_fd(), command as libc::Ioctl, std::ptr::from_mut(argument))
    })
}

/// An ioctl whose argument is a buffer of variable length.
///
/// # Safety
///
/// As [`ioctl_struct`], with the length of `buffer`, which must be aligned as `command` needs it.
unsafe fn ioctl_bytes(
    fd: BorrowedFd<'_>,
    command: u32,
    buffer: &mut [u64],
) -> io::Result<libc::c_int> {
    // SAFETY: by this function's own contract.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command as libc::Ioctl, buffer.as_mut_ptr()) })
}

/// Refuses what would not be memory-safe; no errno, so that it is never taken for the kernel's answer.
fn refuse<T>(why: &'static str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}
