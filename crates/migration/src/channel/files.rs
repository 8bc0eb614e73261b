//! Files that come along with bytes over a UNIX socket (SCM_RIGHTS, unix(7)).
//!
//! The kernel gives them out with the first byte they were sent with, or with bytes before it in the same call.
//! A receiver that has no room for them closes them, and so does one that does not ask.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::Stream;

/// The most files that come with one message: the regions of guest memory and their lease.
pub(crate) const FILES_MAX: usize = 64;

/// Room for the header and that many descriptors, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Room([u8; 512]);

const _: () = {
    // SAFETY: arithmetic only.
    let needed = unsafe { libc::CMSG_SPACE((FILES_MAX * size_of::<libc::c_int>()) as u32) };
    assert!(needed as usize <= size_of::<Room>());
};

/// Writes as much of `bytes` as fits at once, with `files`, which go with the first byte; 0 where nothing fits.
/// With `wait`, waits for room for something.
pub(crate) fn send(
    stream: &Stream,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    wait: bool,
) -> io::Result<usize> {
    if files.len() > FILES_MAX {
        let what = format!("{} files with one message, at most {FILES_MAX} are taken", files.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut room = Room([0; 512]);
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !files.is_empty() {
        let length = size_of_val(files) as u32;
        message.msg_control = room.0.as_mut_ptr().cast();
        // SAFETY: arithmetic, and the first header lies in `room`, which has space for it and the descriptors.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(length) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            let data = libc::CMSG_DATA(header).cast::<libc::c_int>();
            for (place, file) in files.iter().enumerate() {
                data.add(place).write_unaligned(file.as_raw_fd());
            }
        }
    }
    let flags = libc::MSG_NOSIGNAL | if wait { 0 } else { libc::MSG_DONTWAIT };
    loop {
        // SAFETY: everything the message points to lives across the call.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
        let Ok(sent) = usize::try_from(sent) else {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock if !wait => return Ok(0),
                _ => return Err(error),
            }
        };
        return Ok(sent);
    }
}

/// Reads into `parts` and appends what files come with it, all of them close-on-exec. 0 at the end of the stream.
///
/// # Errors
/// Those of recvmsg(2), and `InvalidData` when more files came than there is room for.
///
/// # Safety
///
/// The ranges of `parts` are writable, and nobody holds a reference into them.
pub(crate) unsafe fn receive(
    stream: &Stream,
    parts: &mut [libc::iovec],
    files: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut room = Room([0; 512]);
    // SAFETY: msghdr is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    message.msg_control = room.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Room>() as _;
    // SAFETY: `parts` by the caller's promise, `room` lives across the call.
    let read =
        unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let Ok(read) = usize::try_from(read) else { return Err(io::Error::last_os_error()) };
    // SAFETY: headers and data as the kernel wrote them into `room`; each descriptor is new and nobody else's.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(header).cast::<libc::c_int>();
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for place in 0..bytes / size_of::<libc::c_int>() {
                    files.push(OwnedFd::from_raw_fd(data.add(place).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 || files.len() > FILES_MAX {
        let what = format!(
            "not all files that came along were taken: more than {FILES_MAX}, or more than this process may open"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Stream, Stream) {
        let (one, other) = UnixStream::pair().unwrap();
        (Stream::from_unix(one, "one").unwrap(), Stream::from_unix(other, "other").unwrap())
    }

    fn take(stream: &Stream, files: &mut Vec<OwnedFd>) -> io::Result<Vec<u8>> {
        let mut buffer = [0; 16];
        let mut part =
            [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        // SAFETY: the buffer is ours.
        let read = unsafe { receive(stream, &mut part, files) }?;
        Ok(buffer[..read].to_vec())
    }

    #[test]
    fn files_come_with_the_bytes_they_were_sent_with_and_work() {
        let (one, other) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(send(&one, b"before", &[], false).unwrap(), 6);
        assert_eq!(send(&one, b"with", &[writer.as_fd(), reader.as_fd()], false).unwrap(), 4);
        assert_eq!(send(&one, b"behind", &[], true).unwrap(), 6);
        drop(writer);
        let (mut files, mut bytes) = (Vec::new(), Vec::new());
        while files.is_empty() {
            bytes.extend(take(&other, &mut files).unwrap());
        }
        assert!(bytes.starts_with(b"beforew"), "{bytes:?}");
        assert_eq!(files.len(), 2);
        let mut writer = std::fs::File::from(files.remove(0));
        io::Write::write_all(&mut writer, b"x").unwrap();
        let mut got = [0];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"x");
    }

    #[test]
    fn more_files_than_there_is_room_for_are_an_error_on_both_sides() {
        let (one, other) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        let many = [null.as_fd(); FILES_MAX + 1];
        assert_eq!(send(&one, b"x", &many, false).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let (half, mut files) = (&many[..FILES_MAX / 2 + 1], Vec::new());
        for _ in 0..2 {
            send(&one, b"x", half, false).unwrap();
        }
        take(&other, &mut files).unwrap();
        assert_eq!(take(&other, &mut files).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(one);
    }
}
