//! Buffers of a channel that go round: a new one for each frame would be cleared, and faulted in, each time.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::cost::Held;

/// Buffers that wait to be used again, per channel; what is beyond is given back.
const SPARES_MAX: usize = 32;
/// Smaller ones do not go round: they cost little to make, and a frame of a few bytes must not take a large one along.
const SPARE_LEN_MIN: usize = 64 << 10;

/// Bytes of a frame. Their buffer goes back to its channel when this is dropped.
#[derive(Default)]
pub struct Payload {
    /// At least `len` bytes: as long as it ever was.
    buffer: Vec<u8>,
    len: usize,
    home: Weak<Mutex<Spares>>,
}

impl Payload {
    /// The memory it holds, which may be more than its bytes.
    pub(crate) fn footprint(&self) -> usize {
        self.buffer.len()
    }

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
        if self.buffer.len() >= SPARE_LEN_MIN && spares.buffers.len() < SPARES_MAX {
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
        let spare = if len < SPARE_LEN_MIN { None } else { spares.buffers.pop() };
        let mut buffer = spare.unwrap_or_default();
        let more = len.saturating_sub(buffer.len());
        spares.change(|bytes| bytes + more);
        drop(spares);
        if more > 0 {
            // Nothing of the old content is wanted, and no more than `len` is taken.
            drop(buffer);
            buffer = vec![0; len];
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

    fn bytes(payloads: &Payloads) -> usize {
        payloads.0.lock().unwrap().bytes
    }

    #[test]
    fn a_buffer_goes_round_and_shows_nothing_of_its_last_use() {
        let payloads = Payloads::default();
        let mut first = payloads.take(SPARE_LEN_MIN + 5);
        first.as_mut().fill(1);
        let place = first.as_ptr();
        drop(first);
        let mut second = payloads.take(SPARE_LEN_MIN);
        assert_eq!(second.as_ptr(), place, "the same memory");
        second.as_mut().fill(2);
        assert_eq!(second, Payload::from(vec![2; SPARE_LEN_MIN]));
        assert_eq!(second.footprint(), SPARE_LEN_MIN + 5, "what it holds");
        let copy = second.clone();
        drop((second, copy));
        assert_eq!(spares(&payloads), 1, "a copy has no home");
        assert_eq!(payloads.take(SPARE_LEN_MIN + 9).len(), SPARE_LEN_MIN + 9);
        assert_eq!(bytes(&payloads), SPARE_LEN_MIN + 9);
    }

    #[test]
    fn no_more_buffers_wait_than_allowed_and_none_outlives_its_channel() {
        let payloads = Payloads::default();
        let many: Vec<_> = (0..SPARES_MAX + 5).map(|_| payloads.take(SPARE_LEN_MIN)).collect();
        let late = payloads.take(SPARE_LEN_MIN);
        drop(many);
        assert_eq!(spares(&payloads), SPARES_MAX);
        drop(payloads);
        drop(late);
    }

    #[test]
    fn small_frames_that_wait_hold_no_large_buffers_however_often_those_come_back() {
        let payloads = Payloads::default();
        let mut waiting = Vec::new();
        for _ in 0..10 {
            // One device takes its large frames at once, another none of its small ones.
            drop((0..8).map(|_| payloads.take(1 << 20)).collect::<Vec<_>>());
            waiting.extend((0..8).map(|_| payloads.take(1)));
        }
        let held: usize = waiting.iter().map(Payload::footprint).sum();
        assert_eq!(held, 80);
        assert!(bytes(&payloads) <= (8 << 20) + held, "{} bytes", bytes(&payloads));
        drop(waiting);
        assert!(bytes(&payloads) <= 8 << 20, "given back: {} bytes", bytes(&payloads));
    }
}
