//! DMA logging, features 6 to 8.
//!
//! No ranges in START mean everything that is mapped: the device is given the mappings of that moment.
//! Like in the kernel, what is mapped later is not logged (L11).

use vfio_migration::DmaRange;

use super::session::{Refusal, Session, errno_of};
use crate::codec::DecodeError;
use crate::codec::feature::{Feature, FixedData, LoggingReportData, LoggingStart};

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);

/// The smallest page of a device's log, in bytes.
const DEVICE_PAGE_BYTES: u64 = 4096;

/// Logging under way.
#[derive(Clone, Debug)]
pub(super) struct Logging {
    /// What is logged, ascending, those that touch joined.
    ranges: Vec<DmaRange>,
    /// The page size the client asked for, in bytes.
    asked_page_size: u64,
    /// The device logs; `false` where nothing was mapped.
    pub(super) on_device: bool,
}

impl Session<'_> {
    pub(super) fn logging_start(
        &mut self,
        feature: &Feature,
        data: &[u8],
        payload: &[u8],
    ) -> Result<(), Refusal> {
        let compat = self.options.libvfio_user_compat;
        let refuse = if compat { Refusal::Echo } else { Refusal::Errno };
        let mut start = LoggingStart::decode(data).map_err(of_range)?;
        if !start.page_size.is_power_of_two() {
            return Err(refuse(libc::EINVAL));
        }
        if let Some(logging) = &self.logging {
            // L4 in general; libvfio-user takes the same page size again.
            if compat && logging.asked_page_size == start.page_size {
                self.reply.extend_from_slice(payload);
                return Ok(());
            }
            return Err(refuse(libc::EINVAL));
        }
        let ranges = match compat || start.ranges.is_empty() {
            true => self.mapped_ranges(),
            false => start.ranges.clone(),
        };
        let asked_page_size = start.page_size;
        if !ranges.is_empty() {
            let used = self.migration()?.start_dma_logging(&ranges, start.page_size);
            let used = used.map_err(|error| refuse(errno_of(&error)))?;
            if !compat {
                // L3: the client learns the page size in use.
                start.page_size = used;
            }
        }
        let on_device = !ranges.is_empty();
        self.logging = Some(Logging { ranges: joined(ranges), asked_page_size, on_device });
        feature.encode(&mut self.reply);
        start.encode(&mut self.reply);
        Ok(())
    }

    pub(super) fn logging_stop(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let on_device = self.logging.as_ref().ok_or(EINVAL)?.on_device;
        if on_device {
            self.migration()?.stop_dma_logging()?;
        }
        self.logging = None;
        self.reply.extend_from_slice(payload);
        Ok(())
    }

    pub(super) fn logging_report(&mut self, feature: &Feature, data: &[u8]) -> Result<(), Refusal> {
        let ask = LoggingReportData::decode(data)?;
        let logging = self.logging.as_ref().ok_or(EINVAL)?;
        let on_device = logging.on_device;
        self.check_logged(logging, &ask)?;
        // L6; libvfio-user takes any power of two.
        let compat = self.options.libvfio_user_compat;
        let page_size_min = if compat { 1 } else { DEVICE_PAGE_BYTES };
        let bitmap_bytes = ask.bitmap_bytes(page_size_min).map_err(of_range)?;
        let bitmap_bytes = usize::try_from(bitmap_bytes).map_err(|_| EINVAL)?;
        let fixed_bytes = Feature::SIZE + size_of::<LoggingReportData>();
        if bitmap_bytes > self.max_data_xfer_bytes.max(8)
            || (feature.argsz as usize) < fixed_bytes + bitmap_bytes
        {
            return Err(EINVAL);
        }
        if self.options.libvfio_user_compat {
            self.check_compat_report(&ask)?;
        }
        let mut bitmap = vec![0u64; bitmap_bytes / 8];
        if on_device {
            let range = DmaRange { iova: ask.iova, length: ask.length };
            if ask.page_size < DEVICE_PAGE_BYTES {
                // libvfio-user: bits are repeated.
                let mut pages = vec![0; bitmap.len()];
                self.migration()?.report_dma_log(range, DEVICE_PAGE_BYTES, &mut pages)?;
                repeat_bits(&pages, DEVICE_PAGE_BYTES / ask.page_size, &mut bitmap);
            } else {
                self.migration()?.report_dma_log(range, ask.page_size, &mut bitmap)?;
            }
        }
        let argsz = (fixed_bytes + bitmap_bytes) as u32;
        Feature { argsz, ..*feature }.encode(&mut self.reply);
        ask.encode(&mut self.reply);
        for word in bitmap {
            self.reply.extend_from_slice(&word.to_ne_bytes());
        }
        Ok(())
    }

    /// Memory that was mapped after START, outside of what is logged, has no log: saying "clean" of it would
    /// lose pages, so the report is refused and the client treats all as dirty (L9, L11).
    fn check_logged(&self, logging: &Logging, ask: &LoggingReportData) -> Result<(), Refusal> {
        let end = ask.iova.saturating_add(ask.length);
        for (iova, mapped) in self.mappings.range(..end) {
            let from = (*iova).max(ask.iova);
            let to = iova.saturating_add(mapped.size).min(end);
            let covers = |range: &DmaRange| {
                range.iova <= from && to <= range.iova.saturating_add(range.length)
            };
            if from < to && !logging.ranges.iter().any(covers) {
                tracing::warn!(from, to, "vfio-user server: report of memory that is not logged");
                return Err(EINVAL);
            }
        }
        Ok(())
    }

    /// What libvfio-user reports: a range that begins where a mapping with an fd does.
    fn check_compat_report(&self, ask: &LoggingReportData) -> Result<(), Refusal> {
        let before = self.mappings.range(..=ask.iova).next_back();
        let Some((start, mapped)) = before else { return Err(Refusal::Errno(libc::ENOENT)) };
        let end = start.saturating_add(mapped.size);
        if ask.iova >= end || ask.iova.saturating_add(ask.length) > end {
            return Err(Refusal::Errno(libc::ENOENT));
        }
        if *start != ask.iova {
            return Err(Refusal::Errno(libc::EOPNOTSUPP));
        }
        if mapped.has_fd { Ok(()) } else { Err(EINVAL) }
    }

    /// The client's mappings, those that touch joined.
    fn mapped_ranges(&self) -> Vec<DmaRange> {
        let mappings = self.mappings.iter();
        joined(mappings.map(|(iova, it)| DmaRange { iova: *iova, length: it.size }).collect())
    }
}

/// What a malformed range is refused with (L2, L6): EOVERFLOW where it wraps around.
fn of_range(error: DecodeError) -> Refusal {
    match error {
        DecodeError::Field { field: "length", value: 1.., .. } => Refusal::Errno(libc::EOVERFLOW),
        other => other.into(),
    }
}

/// Each bit of `pages` as `times` bits.
fn repeat_bits(pages: &[u64], times: u64, bitmap: &mut [u64]) {
    let bit = |words: &[u64], at: u64| {
        words.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 != 0)
    };
    for at in 0..bitmap.len() as u64 * 64 {
        if bit(pages, at / times)
            && let Some(word) = bitmap.get_mut((at / 64) as usize)
        {
            *word |= 1 << (at % 64);
        }
    }
}

/// Ascending, those that touch or overlap joined.
fn joined(mut ranges: Vec<DmaRange>) -> Vec<DmaRange> {
    ranges.sort_by_key(|range| range.iova);
    let mut joined: Vec<DmaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let end = range.iova.saturating_add(range.length);
        match joined.last_mut() {
            Some(last) if range.iova <= last.iova.saturating_add(last.length) => {
                let last_end = last.iova.saturating_add(last.length);
                last.length = end.max(last_end) - last.iova;
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_repeated_for_smaller_pages() {
        let mut bitmap = [0; 2];
        repeat_bits(&[0b1001, 0], 8, &mut bitmap);
        assert_eq!(bitmap, [0xff0000ff, 0]);
    }

    #[test]
    fn ranges_that_touch_or_overlap_are_joined() {
        let range = |(iova, length)| DmaRange { iova, length };
        let ranges = [(8, 4), (0, 4), (4, 2), (20, 10), (22, 2), (29, 5)].map(range).to_vec();
        assert_eq!(joined(ranges), [(0, 6), (8, 4), (20, 14)].map(range));
    }
}
