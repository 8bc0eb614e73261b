//! Mappings of files, and what a bitmap must hold.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A shared mapping of a part of a file. The memory is never accessed here: it is lent to the kernel, which
/// pins it for DMA.
#[derive(Debug)]
pub struct FileMapping {
    address: usize,
    len: usize,
}

impl FileMapping {
    /// Maps `len` bytes of `file` from `offset` on, both multiples of the page size.
    pub fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        read: bool,
        write: bool,
    ) -> io::Result<Self> {
        let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
        let offset = libc::off_t::try_from(offset).map_err(too_large)?;
        let len = usize::try_from(len).map_err(too_large)?;
        let mut protection = if read { libc::PROT_READ } else { 0 };
        protection |= if write { libc::PROT_WRITE } else { 0 };
        let (nowhere, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let mapped = unsafe { libc::mmap(nowhere, len, protection, libc::MAP_SHARED, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: mapped as usize, len })
    }

    /// Where the mapping is.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: the kernel refuses empty mappings.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own and nobody holds a reference into it.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

/// Words of 64 bits that the bits of `length` bytes in pages of `page_size` bytes need.
pub fn bitmap_words(length: u64, page_size: u64) -> u64 {
    length.div_ceil(page_size.max(1)).div_ceil(64)
}

/// `bitmap` has room for all that a kernel may set in it for these arguments, whatever it makes of them.
pub(super) fn bitmap_covers(bitmap: &[u64], length: u64, page_size: u64) -> bool {
    bitmap_words(length, page_size) <= bitmap.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_counted_in_whole_words() {
        let cases = [(0, 4096, 0), (1, 4096, 1), (64 << 12, 4096, 1), ((64 << 12) + 1, 4096, 2)];
        for (length, page_size, words) in cases {
            assert_eq!(bitmap_words(length, page_size), words, "{length} in {page_size}");
        }
        assert_eq!(bitmap_words(u64::MAX, 0), 1 << 58, "malformed arguments need the most");
        assert!(!bitmap_covers(&[0; 4], u64::MAX, 0));
    }
}
