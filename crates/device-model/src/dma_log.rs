//! DMA logging: which pages the device wrote (rules L1 to L10).
//!
//! Pages are kept in a sparse map, so memory follows what was written and never what a range claims.

use std::collections::BTreeMap;

use vfio_migration::{DeviceError, DeviceResult, DmaRange};

/// Most ranges of one START: what the kernel core takes with 4 KiB pages (L1).
pub const RANGES_MAX: usize = 256;
/// Smallest page size of a REPORT, in bytes (L6).
pub const REPORT_PAGE_MIN_BYTES: u64 = 4096;
/// Largest page size the device tracks, in bytes; larger hints get this (L3).
pub const TRACKED_PAGE_MAX_BYTES: u64 = 2 << 20;

const START: &str = "DMA_LOGGING_START";
const REPORT: &str = "DMA_LOGGING_REPORT";
const STOP: &str = "DMA_LOGGING_STOP";

/// The log, on or off.
#[derive(Clone, Debug, Default)]
pub struct DmaLog {
    active: Option<Active>,
}

#[derive(Clone, Debug)]
struct Active {
    /// First and last address of each range, ascending.
    ranges: Vec<(u64, u64)>,
    /// log2 of the tracked page size.
    shift: u32,
    /// Word w, bit i: page 64 w + i was written.
    pages: BTreeMap<u64, u64>,
}

fn fail<T>(call: &'static str, errno: i32) -> DeviceResult<T> {
    Err(DeviceError::Errno { call, errno })
}

impl DmaLog {
    /// DMA_LOGGING_START; answers the page size in use, in bytes.
    ///
    /// # Errors
    /// EINVAL without ranges (L1), for a page size that is no power of two, ranges that are empty, not
    /// aligned to it or overlap (L2), or when logging is on already (L4); E2BIG for too many ranges;
    /// EOVERFLOW for one that wraps.
    pub fn start(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        if self.active.is_some() || ranges.is_empty() || !page_size.is_power_of_two() {
            return fail(START, libc::EINVAL);
        }
        if ranges.len() > RANGES_MAX {
            return fail(START, libc::E2BIG);
        }
        let mut sorted = Vec::with_capacity(ranges.len());
        for range in ranges {
            let aligned =
                range.iova.is_multiple_of(page_size) && range.length.is_multiple_of(page_size);
            if !aligned || range.length == 0 {
                return fail(START, libc::EINVAL);
            }
            let Some(end) = range.iova.checked_add(range.length) else {
                return fail(START, libc::EOVERFLOW);
            };
            sorted.push((range.iova, end - 1));
        }
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[1].0 <= pair[0].1) {
            return fail(START, libc::EINVAL);
        }
        let used = page_size.clamp(REPORT_PAGE_MIN_BYTES, TRACKED_PAGE_MAX_BYTES);
        let shift = used.trailing_zeros();
        self.active = Some(Active { ranges: sorted, shift, pages: BTreeMap::new() });
        Ok(used)
    }

    /// DMA_LOGGING_STOP.
    ///
    /// # Errors
    /// EINVAL when logging is off (L4).
    pub fn stop(&mut self) -> DeviceResult<()> {
        match self.active.take() {
            Some(_) => Ok(()),
            None => fail(STOP, libc::EINVAL),
        }
    }

    /// Logging is on.
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// The device wrote `len` bytes at `iova`. Only what a range covers is logged (L11).
    pub fn note_write(&mut self, iova: u64, len: u64) {
        let Some(active) = &mut self.active else { return };
        let Some(last) = iova.checked_add(len.saturating_sub(1)).filter(|_| len > 0) else {
            return;
        };
        // The last range that starts at or below the write's end; ranges do not overlap.
        let behind = active.ranges.partition_point(|range| range.0 <= last);
        for (first, end) in active.ranges[..behind].iter().rev() {
            if *end < iova {
                break;
            }
            let pages = (iova.max(*first) >> active.shift)..=(last.min(*end) >> active.shift);
            for page in pages {
                *active.pages.entry(page / 64).or_default() |= 1 << (page % 64);
            }
        }
    }

    /// DMA_LOGGING_REPORT: sets bit i of `bitmap` for each written page i of `page_size` bytes from
    /// `range.iova` on, leaves all other bits, and forgets what it reported (L7). A tracked page that is
    /// only partly inside of the range is reported and *kept*.
    ///
    /// # Errors
    /// EINVAL when logging is off (L8), for a page size below 4 KiB or no power of two (L6), or for a bitmap
    /// that is too short; EOVERFLOW for a range that wraps. Nothing is forgotten then.
    pub fn report(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        if page_size < REPORT_PAGE_MIN_BYTES || !page_size.is_power_of_two() {
            return fail(REPORT, libc::EINVAL);
        }
        let Some(end) = range.iova.checked_add(range.length) else {
            return fail(REPORT, libc::EOVERFLOW);
        };
        let Some(active) = &mut self.active else { return fail(REPORT, libc::EINVAL) };
        let bits = range.length.div_ceil(page_size);
        if bits.div_ceil(64) > bitmap.len() as u64 {
            return fail(REPORT, libc::EINVAL);
        }
        if range.length == 0 {
            return Ok(());
        }
        let shift = active.shift;
        let words = (range.iova >> shift) / 64..=((end - 1) >> shift) / 64;
        let mut cleared = Vec::new();
        for (word, mask) in active.pages.range(words) {
            let mut forget = 0;
            for bit in (0..64).filter(|bit| mask >> bit & 1 != 0) {
                let first = (word * 64 + bit) << shift;
                let last = first + ((1 << shift) - 1);
                let (from, to) = (first.max(range.iova), last.min(end - 1));
                if from > to {
                    continue;
                }
                let reported = (from - range.iova) / page_size..=(to - range.iova) / page_size;
                for page in reported {
                    if let Some(word) = bitmap.get_mut((page / 64) as usize) {
                        *word |= 1 << (page % 64);
                    }
                }
                if first >= range.iova && last < end {
                    forget |= 1 << bit;
                }
            }
            cleared.push((*word, mask & !forget));
        }
        for (word, left) in cleared {
            if left == 0 {
                active.pages.remove(&word);
            } else {
                active.pages.insert(word, left);
            }
        }
        Ok(())
    }
}
