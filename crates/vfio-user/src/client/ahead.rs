//! Reads under way between two calls: while the caller works on one buffer, the next is being filled.
//!
//! ```text
//!   read_ahead(buf)   buf joins the buffers that are asked for ──> server
//!                     the one asked for first is awaited, and goes to the caller in exchange
//! ```
//!
//! Only where nobody waits behind the stream (STOP_COPY), and with servers that take several commands at once. Every
//! request is answered for itself and in order: an error or an end is delivered where it came, behind the bytes before it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{DeviceError, DeviceResult};

use super::connection::{Call, Shared, broke};
use super::slot::ReadTarget;
use super::stream::{self, ReadResult};

/// Buffers that are filled while the caller has another one. A state change waits for them, so they are few.
pub(super) const AHEAD: usize = 1;

/// The most requests for one buffer, where a message carries less.
const REQUESTS_MAX: usize = 64;

/// A buffer that is being filled.
#[derive(Debug)]
struct Filling {
    target: Arc<ReadTarget>,
    calls: VecDeque<Call>,
    error: Option<DeviceError>,
}

impl Filling {
    /// Asks for a buffer full, in requests of `chunk_bytes`.
    fn ask(
        shared: &Shared,
        buffer: Vec<u8>,
        chunk_bytes: usize,
        timeout: Option<Duration>,
    ) -> Self {
        let mut rest = buffer.len();
        let target = ReadTarget::own(buffer);
        let mut filling = Self { target, calls: VecDeque::new(), error: None };
        while rest > 0 && filling.calls.len() < REQUESTS_MAX {
            let size = chunk_bytes.min(rest);
            match stream::ask(shared, Arc::clone(&filling.target), size, timeout) {
                Ok(call) => filling.calls.push_back(call),
                Err(error) => {
                    filling.error = Some(error);
                    break;
                }
            }
            rest -= size;
        }
        filling
    }

    /// Waits until all of it is answered.
    fn wait(&mut self, shared: &Shared) {
        while !self.timed_out()
            && let Some(mut call) = self.calls.pop_front()
        {
            call.renew();
            if let Err(error) = stream::answered(shared, &call) {
                self.error.get_or_insert(error);
            }
        }
    }

    fn timed_out(&self) -> bool {
        self.error.as_ref().is_some_and(DeviceError::is_time_out)
    }
}

/// A buffer that is filled, and how much of it was given to a caller.
#[derive(Debug)]
struct Filled {
    buffer: Vec<u8>,
    at: usize,
    result: ReadResult,
}

/// What was asked for and not delivered. Dropped, what is still answered is received and forgotten.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    filling: VecDeque<Filling>,
    /// The rest of a buffer of which a caller took less.
    begun: Option<Filled>,
    /// Length of the buffers.
    buffer_bytes: usize,
    spare: Vec<Vec<u8>>,
}

impl ReadAhead {
    pub(super) fn is_empty(&self) -> bool {
        self.filling.is_empty() && self.begun.is_none()
    }

    /// [`exchange`](Self::exchange) can take a buffer of `len` bytes.
    pub(super) fn fits(&self, len: usize) -> bool {
        self.is_empty() || (self.begun.is_none() && self.buffer_bytes == len)
    }

    /// Asks for `buf` and [`AHEAD`] others of its length, as far as that was not done, and gives it away for the one
    /// that was asked for first.
    pub(super) fn exchange(
        &mut self,
        shared: &Shared,
        buf: &mut Vec<u8>,
        chunk_bytes: usize,
        timeout: Option<Duration>,
    ) -> ReadResult {
        if self.is_empty() {
            self.buffer_bytes = buf.len();
            self.spare.retain(|spare| spare.len() == buf.len());
        }
        self.spare.push(std::mem::take(buf));
        while self.filling.len() <= AHEAD
            && self.filling.back().is_none_or(|filling| filling.error.is_none())
        {
            let buffer = self.spare.pop().unwrap_or_else(|| vec![0; self.buffer_bytes]);
            self.filling.push_back(Filling::ask(shared, buffer, chunk_bytes, timeout));
        }
        let filled = self.next(shared);
        *buf = filled.buffer;
        filled.result
    }

    /// Fills `buf` with what was asked for before.
    pub(super) fn read(&mut self, shared: &Shared, buf: &mut [u8]) -> ReadResult {
        let mut filled = match self.begun.take() {
            Some(begun) => begun,
            None => self.next(shared),
        };
        let rest = filled.buffer.get(filled.at..filled.result.filled).unwrap_or_default();
        let count = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        filled.at += count;
        if filled.at < filled.result.filled {
            self.begun = Some(filled);
            return ReadResult { filled: count, error: None };
        }
        ReadResult { filled: count, error: filled.result.error }
    }

    /// Waits until nothing is under way; answers how many bytes wait to be read. Fails where the server
    /// does not answer; then the place in the stream is not known any more.
    pub(super) fn wait(&mut self, shared: &Shared) -> DeviceResult<usize> {
        let mut held = self.begun.as_ref().map_or(0, |begun| begun.result.filled - begun.at);
        for filling in &mut self.filling {
            filling.wait(shared);
            if filling.timed_out()
                && let Some(error) = filling.error.take()
            {
                return Err(error);
            }
            held += filling.target.filled();
        }
        Ok(held)
    }

    /// The end of the stream was read: what was asked for behind it must have found the same.
    pub(super) fn end(&mut self, shared: &Shared) -> DeviceResult<()> {
        let behind = self.wait(shared);
        self.clear();
        match behind? {
            0 => Ok(()),
            bytes => Err(broke("MIG_DATA_READ", format!("{bytes} bytes behind the stream's end"))),
        }
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The buffer that was asked for first.
    fn next(&mut self, shared: &Shared) -> Filled {
        let Some(mut filling) = self.filling.pop_front() else {
            let result = ReadResult { filled: 0, error: None };
            return Filled { buffer: vec![0; self.buffer_bytes], at: 0, result };
        };
        filling.wait(shared);
        let (buffer, filled) = filling.target.take();
        Filled { buffer, at: 0, result: ReadResult { filled, error: filling.error } }
    }
}
