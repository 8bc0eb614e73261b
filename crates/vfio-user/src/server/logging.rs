//! DMA logging, features 6 to 8.
//!
//! No ranges in START mean everything that is mapped: the device is given the mappings of that moment.
//! Like in the kernel, what is mapped later is not logged (L11).

use vfio_migration::DmaRange;

use super::session::{Refusal, Session, errno_of};
use crate::codec::feature::{Feature, FixedData, LoggingReportData, LoggingStart};

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);

/// Logging under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logging {
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
        let mut start = LoggingStart::decode(data)?;
        let compat = self.options.libvfio_user_compat;
        let refuse = if compat { Refusal::Echo } else { Refusal::Errno };
        if !start.page_size.is_power_of_two() {
            return Err(refuse(libc::EINVAL));
        }
        if let Some(logging) = self.logging {
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
        self.logging = Some(Logging { asked_page_size, on_device: !ranges.is_empty() });
        feature.encode(&mut self.reply);
        start.encode(&mut self.reply);
        Ok(())
    }

    pub(super) fn logging_stop(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let logging = self.logging.ok_or(EINVAL)?;
        if logging.on_device {
            self.migration()?.stop_dma_logging()?;
        }
        self.logging = None;
        self.reply.extend_from_slice(payload);
        Ok(())
    }

    pub(super) fn logging_report(&mut self, feature: &Feature, data: &[u8]) -> Result<(), Refusal> {
        let ask = LoggingReportData::decode(data)?;
        let logging = self.logging.ok_or(EINVAL)?;
        // L6; libvfio-user takes any power of two.
        let page_size_min = if self.options.libvfio_user_compat { 1 } else { 4096 };
        let bitmap_bytes = usize::try_from(ask.bitmap_bytes(page_size_min)?).map_err(|_| EINVAL)?;
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
        if logging.on_device {
            let range = DmaRange { iova: ask.iova, length: ask.length };
            self.migration()?.report_dma_log(range, ask.page_size, &mut bitmap)?;
        }
        let argsz = (fixed_bytes + bitmap_bytes) as u32;
        Feature { argsz, ..*feature }.encode(&mut self.reply);
        ask.encode(&mut self.reply);
        for word in bitmap {
            self.reply.extend_from_slice(&word.to_ne_bytes());
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
        let mut ranges: Vec<DmaRange> = Vec::new();
        for (iova, mapped) in &self.mappings {
            match ranges.last_mut() {
                Some(last) if last.iova.checked_add(last.length) == Some(*iova) => {
                    last.length = last.length.saturating_add(mapped.size);
                }
                _ => ranges.push(DmaRange { iova: *iova, length: mapped.size }),
            }
        }
        ranges
    }
}
