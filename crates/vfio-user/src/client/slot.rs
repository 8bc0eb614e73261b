//! A request under way: what its reply must be, and where it goes.
//!
//! Replies are received by the connection's reader thread. Most become a small vector; the data of
//! MIG_DATA_READ goes straight into the caller's buffer, or one that waits for it, through a [`ReadTarget`].

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::codec::Command;

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The reply's payload and fds.
    Reply(Vec<u8>, Vec<OwnedFd>),
    /// The reply to a MIG_DATA_READ: so many bytes are in the target.
    Data(u32),
    /// The server refused.
    Refused(i32),
    /// The connection is gone.
    Lost(String),
}

/// Where the reply goes.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Into a vector.
    Bytes,
    /// Into a buffer; at most so many bytes.
    Stream { target: Arc<ReadTarget>, requested: u32 },
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Slot {
    /// What the reply must echo.
    pub(crate) command: Command,
    /// Where it goes.
    pub(crate) sink: Sink,
    outcome: Mutex<Option<Outcome>>,
    done: Condvar,
}

impl Slot {
    pub(crate) fn new(command: Command, sink: Sink) -> Self {
        Self { command, sink, outcome: Mutex::new(None), done: Condvar::new() }
    }

    /// Hands the outcome to the waiting caller.
    pub(crate) fn complete(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.done.notify_all();
    }

    /// The outcome is there.
    pub(crate) fn is_done(&self) -> bool {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for the outcome; `None` when the deadline passed.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Outcome> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = outcome.take() {
                return Some(outcome);
            }
            outcome = match deadline {
                None => self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    let waited = self.done.wait_timeout(outcome, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// A buffer that the reader thread fills: a caller's, lent, or its own until it is [taken](Self::take). Several requests
/// may fill it: replies come in the order of the requests, and each continues where the last one ended, so short reads
/// leave no gap.
#[derive(Debug)]
pub(crate) struct ReadTarget(Mutex<Place>);

#[derive(Debug)]
struct Place {
    memory: Memory,
    filled: usize,
}

#[derive(Debug)]
enum Memory {
    Lent { start: *mut u8, len: usize },
    Own(Vec<u8>),
    TakenBack,
}

// SAFETY: a lent pointer is used only under the mutex and only until the `ReadLoan` that lent it is
// dropped, while that borrows the buffer exclusively.
unsafe impl Send for Memory {}

impl ReadTarget {
    fn new(memory: Memory) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Place { memory, filled: 0 })))
    }

    /// A target of its own.
    pub(crate) fn own(buffer: Vec<u8>) -> Arc<Self> {
        Self::new(Memory::Own(buffer))
    }

    /// Ends the filling of an own buffer: answers it, and how much of it is filled. Waits for a receive that is under
    /// way (which the channel's stall timeout bounds).
    pub(crate) fn take(&self) -> (Vec<u8>, usize) {
        let mut place = self.lock();
        let filled = place.filled;
        match std::mem::replace(&mut place.memory, Memory::TakenBack) {
            Memory::Own(buffer) => (buffer, filled),
            Memory::Lent { .. } | Memory::TakenBack => (Vec::new(), 0),
        }
    }

    /// How much is filled so far.
    pub(crate) fn filled(&self) -> usize {
        self.lock().filled
    }

    /// Runs `receive` on the next `len` bytes of the buffer; counts them as filled when it succeeds.
    /// `None`: the buffer was taken back, or has not so much room.
    pub(crate) fn fill<E>(
        &self,
        len: usize,
        receive: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        let mut place = self.lock();
        let Place { memory, filled } = &mut *place;
        let end = filled.checked_add(len)?;
        let buf = match memory {
            // SAFETY: `start` and `len` are those of a buffer that stays exclusively borrowed by its loan until
            // that takes the pointer back under this mutex; that the range is inside was checked.
            Memory::Lent { start, len: room } if end <= *room => unsafe {
                std::slice::from_raw_parts_mut(start.add(*filled), len)
            },
            Memory::Own(buffer) => buffer.get_mut(*filled..end)?,
            Memory::Lent { .. } | Memory::TakenBack => return None,
        };
        let result = receive(buf);
        if result.is_ok() {
            *filled = end;
        }
        Some(result)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lending side: while it lives, the reader thread may write to the buffer.
#[derive(Debug)]
pub(crate) struct ReadLoan<'a> {
    target: Arc<ReadTarget>,
    // Exclusive for as long as the reader may write.
    _buf: std::marker::PhantomData<&'a mut [u8]>,
}

impl<'a> ReadLoan<'a> {
    pub(crate) fn new(buf: &'a mut [u8]) -> Self {
        let lent = Memory::Lent { start: buf.as_mut_ptr(), len: buf.len() };
        Self { target: ReadTarget::new(lent), _buf: std::marker::PhantomData }
    }

    pub(crate) fn target(&self) -> Arc<ReadTarget> {
        Arc::clone(&self.target)
    }

    /// Ends the loan and says how much was filled. Waits for a receive that is under way (which the
    /// channel's stall timeout bounds).
    pub(crate) fn end(self) -> usize {
        self.target.filled()
    }
}

impl Drop for ReadLoan<'_> {
    fn drop(&mut self) {
        // A leaked loan would leave the reader a dangling pointer; the type is private to this crate's
        // stream and never leaked there.
        self.target.lock().memory = Memory::TakenBack;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(target: &ReadTarget, bytes: &[u8]) -> Option<Result<(), ()>> {
        target.fill(bytes.len(), |to| {
            to.copy_from_slice(bytes);
            Ok(())
        })
    }

    #[test]
    fn replies_fill_the_buffer_without_gaps_and_never_beyond_it() {
        let mut buf = [0u8; 8];
        let loan = ReadLoan::new(&mut buf);
        let target = loan.target();
        let put = |bytes: &[u8]| put(&target, bytes);
        assert_eq!(put(b"abc"), Some(Ok(())));
        assert_eq!(put(b"def"), Some(Ok(())));
        assert_eq!(put(b"ghi"), None);
        assert_eq!(target.fill(2, |_| Err("cut")), Some(Err("cut")));
        assert_eq!(loan.end(), 6);
        assert_eq!(put(b"g"), None, "taken back");
        assert_eq!(&buf[..6], b"abcdef");
    }

    #[test]
    fn an_own_buffer_is_taken_with_what_came_and_nothing_comes_after() {
        let target = ReadTarget::own(vec![0; 4]);
        let put = |bytes: &[u8]| put(&target, bytes);
        assert_eq!(put(b"abc"), Some(Ok(())));
        assert_eq!(put(b"de"), None, "no room");
        assert_eq!(target.take(), (b"abc\0".to_vec(), 3));
        assert_eq!(put(b"d"), None, "taken");
        assert_eq!(target.take(), (Vec::new(), 0));
    }
}
