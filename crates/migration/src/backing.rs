//! The file behind a region of guest memory.
//!
//! By default a sealed memfd, with a wish for huge pages that the kernel grants where
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says `advise` or more. Its default is `never`, so a
//! host that offers nothing by itself can be asked harder: a file of a tmpfs of our own, mounted nowhere,
//! with `huge=always`. Filling memory then costs a fault per 2 MiB instead of one per 4 KiB. A destination needs
//! neither: it knows what it will fill, and asks for each block ([`populate_huge`](crate::GuestMemory::populate_huge)).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::memory::MemoryError;

/// Which pages guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PageSizes {
    /// As the kernel likes: huge ones where shared memory may have them on request.
    #[default]
    Kernels,
    /// Huge ones, from a tmpfs of our own (CAP_SYS_ADMIN; kernel with transparent huge pages). Such a file
    /// cannot be sealed: a device server that gets it could shorten it, and this process would die of it.
    Huge,
}

pub(crate) fn create(len: u64, pages: PageSizes) -> Result<OwnedFd, MemoryError> {
    let os = |call: &'static str| move |source| MemoryError::Os { call, len, source };
    let file = match pages {
        PageSizes::Kernels => memfd().map_err(os("memfd_create"))?,
        PageSizes::Huge => huge_file().map_err(|source| MemoryError::HugePages { source })?,
    };
    file.set_len(len).map_err(os("ftruncate"))?;
    if pages == PageSizes::Kernels {
        // Device servers get this file too: one that shortened it would have us die of SIGBUS.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: adds seals to a file we hold.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(os("fcntl(F_ADD_SEALS)")(io::Error::last_os_error()));
        }
    }
    Ok(file.into())
}

/// Looks whether `fd` can be guest memory of two processes: a memfd of exactly `len` bytes, whose other holder can
/// neither shorten it nor keep this one from writing.
pub(crate) fn check_shared(fd: BorrowedFd<'_>, len: u64) -> Result<(), MemoryError> {
    let refuse = |what: String| Err(MemoryError::Shared(what));
    let file = File::from(fd.try_clone_to_owned().map_err(|source| MemoryError::Os {
        call: "dup",
        len,
        source,
    })?);
    let about = file.metadata().map_err(|source| MemoryError::Os { call: "fstat", len, source })?;
    if !about.is_file() {
        return refuse("it is no memfd".into());
    }
    if about.size() != len {
        return refuse(format!("its file has {:#x} bytes and the region {len:#x}", about.size()));
    }
    // SAFETY: both ask about a file we hold.
    let (seals, flags) = unsafe {
        (
            libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS),
            libc::fcntl(file.as_raw_fd(), libc::F_GETFL),
        )
    };
    if seals < 0 {
        return refuse("it is no memfd".into());
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return refuse("its file is not sealed against being shortened".into());
    }
    if seals & (libc::F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) != 0 {
        return refuse("its file is sealed against being written".into());
    }
    if flags & libc::O_ACCMODE != libc::O_RDWR {
        return refuse("its file is not open for reading and writing".into());
    }
    Ok(())
}

// linux/fcntl.h
const F_SEAL_FUTURE_WRITE: libc::c_int = 0x10;

fn memfd() -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated constant.
    file(unsafe { libc::memfd_create(c"vmferry-ram".as_ptr(), flags) }.into())
}

/// A nameless file of a tmpfs that nobody else sees; the mount ends with the file.
fn huge_file() -> io::Result<File> {
    let huge = (c"huge", c"always");
    // Guest memory is what its owner says it is, not half of the host's.
    let size = (c"size", c"0");
    // SAFETY: the name is a NUL-terminated constant.
    let context =
        file(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in [huge, size] {
        configure(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    // SAFETY: plain numbers and an fd we hold.
    let mount =
        file(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the name is a NUL-terminated constant, the directory an fd we hold.
    file(unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) }.into())
}

// linux/mount.h
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

fn configure(
    context: &File,
    command: libc::c_uint,
    pair: Option<(&CStr, &CStr)>,
) -> io::Result<()> {
    let (key, value) =
        pair.map_or((std::ptr::null(), std::ptr::null()), |(k, v)| (k.as_ptr(), v.as_ptr()));
    // SAFETY: an fd we hold, and strings that live across the call or are null.
    let result =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a system call that makes an fd answered.
fn file(result: libc::c_long) -> io::Result<File> {
    let fd = libc::c_int::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new fd that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}
