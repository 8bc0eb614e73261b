//! Whose guest memory is that both sides of a local move have mapped.
//!
//! A page of its own goes along with the memory. Its first eight bytes say who may write that memory, and each
//! change is one atomic step, so that whoever is late sees that it is:
//!
//! ```text
//!             stand_still(n)                    take(n)
//!   source's ───────────────▶ still, attempt n ────────▶ taken, attempt n
//!      ▲          reclaim()         │    ▲      give(n)        │
//!      └────────────────────────────┘    └─────────────────────┘
//! ```
//!
//! A destination that was Prepared must not start a guest in memory in which its source's guest ran on, and a
//! source in doubt must not resume one in memory in which it ran there. The page outlives either process.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use switchover::message::Attempt;

use crate::backing::{self, PageSizes};
use crate::memory::{MemoryError, PAGE_SIZE};

const SOURCES: u64 = 0;
const STILL: u64 = 1;
const TAKEN: u64 = 2;

/// The page, mapped by this side.
#[derive(Debug)]
pub(crate) struct Lease {
    file: Arc<OwnedFd>,
    word: NonNull<AtomicU64>,
    /// The operator knows that the destination's guest is gone, or it was decided there that it never runs.
    forced: AtomicBool,
}

// SAFETY: a shared mapping that lives as long as the lease, only accessed by atomics.
unsafe impl Send for Lease {}
// SAFETY: as above.
unsafe impl Sync for Lease {}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: our own mapping of a page, to which nobody has a reference any more.
        unsafe { libc::munmap(self.word.as_ptr().cast(), PAGE_SIZE as usize) };
    }
}

impl Lease {
    /// A new one: memory is the source's.
    pub(crate) fn new() -> Result<Self, MemoryError> {
        Self::map(backing::create(PAGE_SIZE, PageSizes::default())?)
    }

    /// The one that came from the other side.
    pub(crate) fn adopt(file: OwnedFd) -> Result<Self, MemoryError> {
        backing::check_shared(file.as_fd(), PAGE_SIZE)?;
        Self::map(file)
    }

    fn map(file: OwnedFd) -> Result<Self, MemoryError> {
        let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        let len = PAGE_SIZE as usize;
        // SAFETY: a fresh mapping of a file we hold, at an address the kernel chooses.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0) };
        let mapped = (page != libc::MAP_FAILED).then_some(page).and_then(NonNull::new);
        let word = mapped.ok_or_else(|| MemoryError::Os {
            call: "mmap",
            len: PAGE_SIZE,
            source: std::io::Error::last_os_error(),
        })?;
        Ok(Self { file: Arc::new(file), word: word.cast(), forced: AtomicBool::new(false) })
    }

    /// The file, to hand over.
    pub(crate) fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.file)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: page aligned, mapped as long as `self`, and accessed by atomics on both sides.
        unsafe { self.word.as_ref() }
    }

    fn step(&self, from: u64, to: u64) -> bool {
        self.word().compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Source: nobody writes the memory any more, for this attempt. False where it is not the source's.
    pub(crate) fn stand_still(&self, attempt: Attempt) -> bool {
        self.step(SOURCES, word(attempt, STILL))
    }

    /// Source: the guest is to run on here. False where the destination has taken the memory; then it must not.
    pub(crate) fn reclaim(&self) -> bool {
        let forced = self.forced.load(Ordering::Acquire);
        let back = |word: u64| (forced || word & TAKEN == 0).then_some(SOURCES);
        self.word().fetch_update(Ordering::SeqCst, Ordering::SeqCst, back).is_ok()
    }

    /// Source: from here on [`reclaim`](Self::reclaim) does, whoever has it.
    pub(crate) fn force(&self) {
        self.forced.store(true, Ordering::Release);
    }

    /// The destination has the memory, or had it last.
    pub(crate) fn is_taken(&self) -> bool {
        self.word().load(Ordering::SeqCst) & TAKEN != 0
    }

    /// Destination: the guest is to run here. False where the source has run on in the memory since.
    pub(crate) fn take(&self, attempt: Attempt) -> bool {
        self.step(word(attempt, STILL), word(attempt, TAKEN))
    }

    /// Destination: it does not run here after all, and nothing was written.
    pub(crate) fn give(&self, attempt: Attempt) {
        self.step(word(attempt, TAKEN), word(attempt, STILL));
    }
}

/// What a peer calls an attempt is only compared.
fn word(attempt: Attempt, whose: u64) -> u64 {
    attempt.0.wrapping_shl(2) | whose
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn both() -> (Lease, Lease) {
        let source = Lease::new().unwrap();
        let destination = Lease::adopt(source.file().try_clone().unwrap()).unwrap();
        (source, destination)
    }

    #[test]
    fn one_of_both_has_it_and_the_other_sees_that() {
        let (source, destination) = both();
        assert!(!destination.take(Attempt(1)), "the guest still runs");
        assert!(source.stand_still(Attempt(1)));
        assert!(!destination.take(Attempt(2)), "another attempt");
        assert!(destination.take(Attempt(1)));
        assert!(source.is_taken());
        assert!(!source.reclaim(), "the guest runs there");
        destination.give(Attempt(1));
        assert!(source.reclaim());
        assert!(!destination.take(Attempt(1)), "the guest ran on");
        assert!(source.reclaim(), "it is the source's already");
    }

    #[test]
    fn an_attempt_that_was_taken_back_is_not_taken_later() {
        let (source, destination) = both();
        assert!(source.stand_still(Attempt(1)) && source.reclaim());
        assert!(source.stand_still(Attempt(2)));
        assert!(!destination.take(Attempt(1)));
        assert!(destination.take(Attempt(2)));
        source.force();
        assert!(source.reclaim() && !source.is_taken());
    }

    #[test]
    fn what_comes_as_a_lease_is_a_page_that_stays() {
        let file = File::from(backing::create(2 * PAGE_SIZE, PageSizes::default()).unwrap());
        assert!(matches!(Lease::adopt(file.into()), Err(MemoryError::Shared(_))));
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(Lease::adopt(file.into()), Err(MemoryError::Shared(_))));
    }
}
