//! Buffers of a channel that go round: a new one for each frame would be cleared, and faulted in, each time.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::cost::Held;

/// Buffers that wait to be used again, per channel; what is beyond is given back.
const SPARES_MAX: usize = 32;

/// Bytes of a frame. Their buffer goes back to its channel when this is dropped.
#[derive(Default)]
pub struct Payload {
    /// At least `len` bytes: as long as it ever was.
    buffer: Vec<u8>,
    len: usize,
    home: Weak<Mutex<Spares>>,
}

impl Payload {
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.len).unwrap_or_default()
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut spares = home.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.buffers.len() < SPARES_MAX {
            spares.buffers.push(std::mem::take(&mut self.buffer));
        } else {
            let given_back = self.buffer.len();
            spares.change(|bytes| bytes.saturating_sub(given_back));
        }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(buffer: Vec<u8>) -> Self {
        let len = buffer.len();
        Self { buffer, len, home: Weak::new() }
    }
}

impl Clone for Payload {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Payload {}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

/// Buffers that wait, and what all of them take, those on their way included.
#[derive(Debug, Default)]
struct Spares {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
    held: Held,
}

impl Spares {
    fn change(&mut self, change: impl FnOnce(usize) -> usize) {
        self.bytes = change(self.bytes);
        self.held.set(self.bytes as u64);
    }
}

/// The buffers of one channel.
#[derive(Debug, Default)]
pub(super) struct Payloads(Arc<Mutex<Spares>>);

impl Payloads {
    /// What they take from here on counts as `held`.
    pub(super) fn count(&self, held: Held) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spares.held = held;
        spares.change(|bytes| bytes);
    }

    /// A payload of `len` bytes, whatever is in them.
    pub(super) fn take(&self, len: usize) -> Payload {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = spares.buffers.pop().unwrap_or_default();
        let more = len.saturating_sub(buffer.len());
        spares.change(|bytes| bytes + more);
        drop(spares);
        if more > 0 {
            // Nothing of the old content is wanted: it is not moved.
            buffer.clear();
            buffer.resize(len, 0);
        }
        Payload { buffer, len, home: Arc::downgrade(&self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spares(payloads: &Payloads) -> usize {
        payloads.0.lock().unwrap().buffers.len()
    }

    #[test]
    fn a_buffer_goes_round_and_shows_nothing_of_its_last_use() {
        let payloads = Payloads::default();
        let mut first = payloads.take(8);
        first.as_mut().copy_from_slice(b"01234567");
        let place = first.as_ptr();
        drop(first);
        let mut second = payloads.take(3);
        assert_eq!(second.as_ptr(), place, "the same memory");
        second.as_mut().copy_from_slice(b"abc");
        assert_eq!(&*second, b"abc");
        assert_eq!(second, Payload::from(b"abc".to_vec()));
        let copy = second.clone();
        drop((second, copy));
        assert_eq!(spares(&payloads), 1, "a copy has no home");
        assert_eq!(payloads.take(9).len(), 9);
    }

    #[test]
    fn no_more_buffers_wait_than_allowed_and_none_outlives_its_channel() {
        let payloads = Payloads::default();
        let many: Vec<_> = (0..SPARES_MAX + 5).map(|_| payloads.take(10)).collect();
        let late = payloads.take(10);
        drop(many);
        assert_eq!(spares(&payloads), SPARES_MAX);
        drop(payloads);
        drop(late);
    }
}
