//! The migration data fd: PRECOPY_INFO, read, write, poll.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{check, ioctl_bytes, refuse, uapi};

/// VFIO_MIG_GET_PRECOPY_INFO, or any other `command` of VFIO's type, with the caller's 24 bytes, which are
/// replaced by what the kernel left in their place, after a failure too.
pub fn precopy_info(data_fd: BorrowedFd<'_>, command: u32, info: &mut [u8; 24]) -> io::Result<()> {
    // Those that keep or write through a pointer in the first 24 bytes are type1's MAP_DMA and iommufd's.
    let of_vfio = (uapi::vfio_io(0)..uapi::iommufd_io(0)).contains(&command);
    if !of_vfio || command == uapi::VFIO_IOMMU_MAP_DMA {
        return refuse("not a command that is safe on any fd");
    }
    // No command of this type writes more than this, whatever the fd is.
    let mut buffer = [0u64; 512];
    for (word, bytes) in buffer.iter_mut().zip(info.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    // SAFETY: the buffer is larger than any struct of these commands, and any pointer that one of them writes
    // through lies behind the caller's bytes and is null.
    let result = unsafe { ioctl_bytes(data_fd, command, &mut buffer) };
    for (word, bytes) in buffer.iter().zip(info.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    result.map(drop)
}

/// PRECOPY_INFO with a pointer that leads nowhere (P3).
pub fn precopy_info_bad_pointer(data_fd: BorrowedFd<'_>) -> io::Result<()> {
    let command = uapi::VFIO_MIG_GET_PRECOPY_INFO as libc::Ioctl;
    // SAFETY: nothing is mapped at the null page, so the kernel can touch nothing of ours.
    check(unsafe { libc::ioctl(data_fd.as_raw_fd(), command, std::ptr::null_mut::<u8>()) })
        .map(drop)
}

/// read(2).
pub fn read(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buf.len()` bytes to the buffer.
    let got = unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
    length(got)
}

/// write(2).
pub fn write(fd: BorrowedFd<'_>, buf: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads at most `buf.len()` bytes of the buffer.
    let put = unsafe { libc::write(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len()) };
    length(put)
}

/// pread(2).
pub fn pread(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let offset = offset as libc::off_t;
    // SAFETY: as in `read`.
    let got = unsafe { libc::pread(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), offset) };
    length(got)
}

/// pwrite(2).
pub fn pwrite(fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> io::Result<usize> {
    let offset = offset as libc::off_t;
    // SAFETY: as in `write`.
    let put = unsafe { libc::pwrite(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), offset) };
    length(put)
}

/// read(2) of `len` bytes to a pointer that leads nowhere.
pub fn read_bad_pointer(fd: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: nothing is mapped at the null page, so the kernel can touch nothing of ours.
    length(unsafe { libc::read(fd.as_raw_fd(), std::ptr::null_mut(), len) })
}

/// write(2) of `len` bytes from a pointer that leads nowhere.
pub fn write_bad_pointer(fd: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: as in `read_bad_pointer`.
    length(unsafe { libc::write(fd.as_raw_fd(), std::ptr::null(), len) })
}

/// poll(2) of one fd: the events that are ready, 0 when `timeout_ms` passed without any.
pub fn poll(fd: BorrowedFd<'_>, events: i16, timeout_ms: i32) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry is passed and counted.
    check(unsafe { libc::poll(&mut entry, 1, timeout_ms) })?;
    Ok(entry.revents)
}

/// The flags of the open file (F_GETFL): access mode, O_NONBLOCK.
pub fn file_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// Sets the flags of the open file (F_SETFL), of which O_NONBLOCK matters here.
pub fn set_file_flags(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: F_SETFL takes a number.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// The flags of the fd itself (F_GETFD): FD_CLOEXEC.
pub fn fd_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFD takes no argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) })
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
