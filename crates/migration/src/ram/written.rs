//! Which pages of a destination may hold something.
//!
//! Memory is zero until somebody writes it, whether the host has given it or not. So a zero page that arrives for a
//! page that was a hole when loading began, and that nothing arrived for since, is there already: nobody has to
//! look. Looking means reading it, which at nine zero pages of ten is most of what a destination does.
//!
//! ```text
//!   when loading begins, and after a roll-back     what is no hole may hold something (loader, devices, VMM)
//!   before a page that arrives is written          it may hold something
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use super::data_extents;
use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::wire::RamRange;

/// Most data extents of a region that are looked up; behind them everything may hold something.
const EXTENTS_MAX: usize = 16 << 10;

/// A bit for each page that may be other than zero, by region.
#[derive(Debug)]
pub(crate) struct Written {
    pages: Vec<Vec<AtomicU64>>,
}

impl Written {
    /// What is no hole of `memory` now may hold something.
    pub(crate) fn of(memory: &GuestMemory) -> Self {
        let layout = memory.layout();
        let words = layout.iter().map(|region| region.pages().div_ceil(64));
        let pages = words.map(|words| (0..words).map(|_| AtomicU64::new(0)).collect()).collect();
        let written = Self { pages };
        written.look_again(memory);
        written
    }

    /// Also what is no hole now: others than those who say so may have written it.
    pub(crate) fn look_again(&self, memory: &GuestMemory) {
        for (region, layout) in memory.layout().iter().enumerate() {
            let extents = data_extents(memory.region_fd(region), 0..layout.len);
            for (count, extent) in extents.take(EXTENTS_MAX).enumerate() {
                let end = if count + 1 == EXTENTS_MAX { layout.len } else { extent.end };
                self.mark(region, extent.start / PAGE_SIZE, end.div_ceil(PAGE_SIZE));
            }
        }
    }

    /// Pages are about to be written.
    pub(crate) fn note(&self, memory: &GuestMemory, range: RamRange) -> Result<(), MemoryError> {
        let (region, offset) = memory.locate(range.gpa, range.len)?;
        self.mark(region, offset / PAGE_SIZE, (offset + range.len) / PAGE_SIZE);
        Ok(())
    }

    fn mark(&self, region: usize, first: u64, end: u64) {
        let Some(words) = self.pages.get(region) else { return };
        for (word, mask) in masks(first, end) {
            let Some(word) = words.get(word) else { return };
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// The pages in `[first, end)` of `region` that may hold something, ascending.
    pub(crate) fn in_range(
        &self,
        region: usize,
        first: u64,
        end: u64,
    ) -> impl Iterator<Item = u64> {
        let words = self.pages.get(region).map(Vec::as_slice).unwrap_or_default();
        masks(first, end).flat_map(move |(word, mask)| {
            let mut left = words.get(word).map_or(0, |bits| bits.load(Ordering::Relaxed)) & mask;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
                left &= left - 1;
                Some(word as u64 * 64 + bit)
            })
        })
    }
}

/// The words that hold the bits of `[first, end)`, and which bits those are.
pub(super) fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..end.div_ceil(64)).map(move |word| {
        let from = first.max(word * 64) - word * 64;
        let to = end.min(word * 64 + 64) - word * 64;
        let mask = if to - from == 64 { !0 } else { ((1 << (to - from)) - 1) << from };
        (word as usize, mask)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;

    #[test]
    fn masks_are_the_bits_of_the_range() {
        for (first, end) in [(0, 0), (0, 1), (3, 64), (0, 64), (63, 65), (70, 200), (128, 192)] {
            let mut pages = Vec::new();
            for (word, mask) in masks(first, end) {
                pages.extend(
                    (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit),
                );
            }
            assert_eq!(pages, (first..end).collect::<Vec<_>>(), "{first}..{end}");
        }
    }

    #[test]
    fn what_was_there_what_arrived_and_what_others_wrote_may_hold_something() {
        const GPA: u64 = 1 << 20;
        let layout = [
            RegionLayout { gpa: 0, len: 8 * PAGE_SIZE },
            RegionLayout { gpa: GPA, len: 200 * PAGE_SIZE },
        ];
        let memory = GuestMemory::new(&layout).unwrap();
        memory.write(GPA + 70 * PAGE_SIZE, &[1]).unwrap();
        let written = Written::of(&memory);
        let held = |region, first, end| written.in_range(region, first, end).collect::<Vec<_>>();
        assert_eq!((held(0, 0, 8), held(1, 0, 200)), (vec![], vec![70]));
        let range = RamRange { gpa: GPA + 62 * PAGE_SIZE, len: 4 * PAGE_SIZE };
        written.note(&memory, range).unwrap();
        // Populated memory is zero as well.
        memory.populate(GPA + 100 * PAGE_SIZE, 50 * PAGE_SIZE).unwrap();
        assert_eq!(held(1, 0, 200), [62, 63, 64, 65, 70]);
        assert_eq!((held(1, 63, 65), held(1, 66, 70)), (vec![63, 64], vec![]));
        // Somebody wrote without saying so.
        memory.write(3 * PAGE_SIZE, &[1]).unwrap();
        written.look_again(&memory);
        assert_eq!(held(0, 0, 8), [3]);
        assert_eq!(held(1, 66, 102), [70, 100, 101]);
        assert!(written.note(&memory, RamRange { gpa: GPA - PAGE_SIZE, len: PAGE_SIZE }).is_err());
    }
}
