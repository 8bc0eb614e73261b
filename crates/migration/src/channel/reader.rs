//! Reads frames: headers from a buffer that is filled ahead, long payloads straight to where they belong.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::{ChannelError, Stream, files};
use crate::wire::{FrameHeader, HEADER_LEN};

/// What is read ahead, at the most.
pub(super) const READ_AHEAD_BYTES: usize = 64 << 10;

/// A stream of frames.
#[derive(Debug)]
pub(super) struct FrameReader {
    stream: Stream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// How long the other side may be silent.
    silence: Option<Duration>,
    /// When the frame that is being read must be complete.
    frame_deadline: Option<Instant>,
    /// Those that came along and were not taken yet; `None`: they are not taken in.
    files: Option<Vec<OwnedFd>>,
}

impl FrameReader {
    /// With `silence`, no single wait for bytes is longer than that, and no frame takes more than three
    /// times as long.
    pub(super) fn new(stream: Stream, silence: Option<Duration>) -> Self {
        // Fails on a socket that is down already; reading says so better.
        let _ = stream.set_read_timeout(silence);
        let buffer = vec![0; READ_AHEAD_BYTES].into_boxed_slice();
        Self { stream, buffer, start: 0, end: 0, silence, frame_deadline: None, files: None }
    }

    /// Files that come along are kept from here on.
    pub(super) fn keep_files(&mut self) {
        self.files = self.stream.carries_files().then(Vec::new);
    }

    /// Those that came along since.
    pub(super) fn take_files(&mut self) -> Vec<OwnedFd> {
        self.files.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The next header; `None` when the stream ended between frames.
    pub(super) fn header(&mut self) -> Result<Option<FrameHeader>, ChannelError> {
        self.frame_deadline = self.silence.map(|silence| Instant::now() + 3 * silence);
        let mut bytes = [0; HEADER_LEN];
        match self.fill(&mut bytes)? {
            0 => Ok(None),
            HEADER_LEN => {
                FrameHeader::decode(&bytes).map(Some).map_err(|e| self.stream.wire_error(e))
            }
            _ => Err(self.stream.truncated()),
        }
    }

    /// A payload of `len` bytes, which the caller has seen to be within its limit.
    pub(super) fn payload(&mut self, len: usize) -> Result<Vec<u8>, ChannelError> {
        let mut payload = vec![0; len];
        self.payload_into(&mut payload)?;
        Ok(payload)
    }

    /// Payload into `target`, all of it.
    pub(super) fn payload_into(&mut self, target: &mut [u8]) -> Result<(), ChannelError> {
        if self.fill(target)? < target.len() {
            return Err(self.stream.truncated());
        }
        Ok(())
    }

    /// Payload to raw memory.
    ///
    /// # Safety
    ///
    /// `len` bytes from `target` on are mapped and writable, and nobody holds a reference into them.
    pub(super) unsafe fn payload_to(
        &mut self,
        target: NonNull<u8>,
        len: usize,
    ) -> Result<(), ChannelError> {
        // SAFETY: the caller's promise.
        let filled = unsafe { self.fill_raw(target, len) }?;
        if filled < len {
            return Err(self.stream.truncated());
        }
        Ok(())
    }

    /// Skips `len` bytes of payload.
    pub(super) fn skip(&mut self, mut len: usize) -> Result<(), ChannelError> {
        let mut waste = [0; 4096];
        while len > 0 {
            let part = len.min(waste.len());
            self.payload_into(&mut waste[..part])?;
            len -= part;
        }
        Ok(())
    }

    fn fill(&mut self, target: &mut [u8]) -> Result<usize, ChannelError> {
        let Some(pointer) = NonNull::new(target.as_mut_ptr()) else { return Ok(0) };
        // SAFETY: `target` is ours alone, and as long as said.
        unsafe { self.fill_raw(pointer, target.len()) }
    }

    /// Fills `target`; less only when the stream ends.
    ///
    /// # Safety
    ///
    /// As [`payload_to`](Self::payload_to).
    unsafe fn fill_raw(&mut self, target: NonNull<u8>, len: usize) -> Result<usize, ChannelError> {
        let mut filled = len.min(self.end - self.start);
        // SAFETY: `filled` bytes are in the buffer from `start` on, and in the target by the caller's promise.
        unsafe {
            let from = self.buffer.as_ptr().add(self.start);
            std::ptr::copy_nonoverlapping(from, target.as_ptr(), filled);
        }
        self.start += filled;
        while filled < len {
            // The buffer is empty here: one call fills the rest of the target, and the buffer with what is behind.
            (self.start, self.end) = (0, 0);
            let rest = len - filled;
            // SAFETY: `filled` is less than `len`.
            let next = unsafe { target.add(filled) };
            let mut iovecs = [
                libc::iovec { iov_base: next.as_ptr().cast(), iov_len: rest },
                libc::iovec {
                    iov_base: self.buffer.as_mut_ptr().cast(),
                    iov_len: self.buffer.len(),
                },
            ];
            // Both ranges are writable during the call, by the caller's promise and by
            // `&mut self`.
            let read = match &mut self.files {
                // SAFETY: as above.
                Some(kept) => unsafe { files::receive(&self.stream, &mut iovecs, kept) },
                None => {
                    // SAFETY: as above.
                    let read = unsafe { libc::readv(self.stream.as_raw_fd(), iovecs.as_ptr(), 2) };
                    usize::try_from(read).map_err(|_| io::Error::last_os_error())
                }
            };
            match read {
                Ok(0) => break,
                Ok(read) => {
                    let direct = read.min(rest);
                    filled += direct;
                    self.end = read - direct;
                    self.check_deadline()?;
                }
                Err(error) => self.check_error(error)?,
            }
        }
        Ok(filled)
    }

    fn check_error(&self, error: io::Error) -> Result<(), ChannelError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock => Err(self.silent()),
            _ => Err(self.stream.io_error("read", error)),
        }
    }

    fn check_deadline(&self) -> Result<(), ChannelError> {
        match self.frame_deadline {
            Some(deadline) if Instant::now() > deadline => Err(self.silent()),
            _ => Ok(()),
        }
    }

    fn silent(&self) -> ChannelError {
        let channel = self.stream.label().to_owned();
        ChannelError::Silent { channel, limit: self.silence.unwrap_or_default() }
    }
}
