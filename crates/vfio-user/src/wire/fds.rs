//! sendmsg and recvmsg with file descriptors (SCM_RIGHTS).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most fds the kernel lets into one message (SCM_MAX_FD).
pub(crate) const SCM_FDS_MAX: usize = 253;

/// Room for the control message that carries them, aligned for `cmsghdr`.
const CONTROL_WORDS: usize = 136;
const CONTROL_BYTES: usize = CONTROL_WORDS * size_of::<u64>();

const FDS_BYTES_MAX: u32 = (SCM_FDS_MAX * size_of::<RawFd>()) as u32;
// SAFETY: a pure computation.
const _: () = assert!(CONTROL_BYTES >= unsafe { libc::CMSG_SPACE(FDS_BYTES_MAX) } as usize);

/// Sends some of `head` and `data`, with `fds` on the first byte; answers how many bytes went. Waits
/// as long as the socket's send timeout says (then `WouldBlock`).
pub(crate) fn send_some(
    socket: BorrowedFd<'_>,
    head: &[u8],
    data: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    if fds.len() > SCM_FDS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut iov = [iovec(head), iovec(data)];
    let mut control = [0u64; CONTROL_WORDS];
    // SAFETY: msghdr is plain data for which all zeroes are valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = iov.len();
    if !fds.is_empty() {
        let bytes = size_of_val(fds) as u32;
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: a pure computation.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as usize;
        // SAFETY: the control buffer is aligned and, by the check above and the constant assertion, large
        // enough for one header and `fds.len()` numbers; CMSG_FIRSTHDR points into it.
        unsafe {
            let cmsg = libc::CMSG_FIRSTHDR(&msg);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let slots = libc::CMSG_DATA(cmsg).cast::<RawFd>();
            for (i, fd) in fds.iter().enumerate() {
                slots.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: every pointer of `msg` refers to a live buffer of the length it names.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into `buf`, all of it where possible, and appends fds that came along. Answers how many
/// bytes came; 0 = the peer closed. Waits as long as the socket's receive timeout says (then
/// `WouldBlock`).
pub(crate) fn receive_some(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut iov = [libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }];
    let mut control = [0u64; CONTROL_WORDS];
    // SAFETY: msghdr is plain data for which all zeroes are valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = iov.len();
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = CONTROL_BYTES;
    let flags = libc::MSG_WAITALL | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer of `msg` refers to a live buffer of the length it names.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut msg, flags) };
    let Ok(received) = usize::try_from(received) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel filled the control buffer and set its length; the CMSG macros walk inside of
    // it, and every number of an SCM_RIGHTS message is a new fd that nobody else owns.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while let Some(header) = cmsg.as_ref() {
            if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
                let bytes = header.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let slots = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                for i in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(slots.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
        }
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other("file descriptors were cut off"));
    }
    Ok(received)
}

/// Whether `[offset, offset + size)` lies inside of the file behind `fd`: touching a mapping beyond the end
/// kills the process with SIGBUS. Only regular files (memfds too) have an end that can be asked. A peer
/// that shortens the file later is for the mapping's user to guard against, with seals.
pub(crate) fn file_covers(fd: BorrowedFd<'_>, offset: u64, size: u64) -> bool {
    let file = fd.try_clone_to_owned().map(std::fs::File::from);
    let Ok(metadata) = file.and_then(|file| file.metadata()) else { return false };
    let end = offset.checked_add(size);
    !metadata.is_file() || end.is_some_and(|end| end <= metadata.len())
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}
