//! DMA logging: features 6, 7 and 8.
//!
//! A report is cut into messages of the negotiated size. libvfio-user reports only ranges that begin
//! where a mapping with an fd begins; towards a foreign server the range is therefore cut at mappings,
//! and mappings without an fd are left out: what is written there comes by DMA_WRITE and is tracked
//! here.

use std::time::Duration;

use vfio_migration::{DeviceError, DeviceResult, DmaRange};

use super::connection::{Shared, broke};
use super::feature;
use super::pci::malformed;
use crate::codec::feature::{
    DMA_LOGGING_REPORT, DMA_LOGGING_START, DMA_LOGGING_STOP, FixedData, LOGGING_RANGES_MAX,
    LoggingReportData, LoggingStart,
};

/// As many ranges as fit in a command that a foreign server receives whole; more than the 256 that the
/// kernel guarantees (L1).
const FOREIGN_RANGES_MAX: usize = 1900;

const REPORT: &str = "DMA_LOGGING_REPORT";

/// Starts logging; answers the page size in use.
pub(super) fn start(
    shared: &Shared,
    ranges: &[DmaRange],
    page_size: u64,
    own_server: bool,
    timeout: Option<Duration>,
) -> DeviceResult<u64> {
    let call = "DMA_LOGGING_START";
    // No ranges would mean everything on vfio-user, and an error in the kernel (L1).
    if ranges.is_empty() {
        return Err(DeviceError::Errno { call, errno: libc::EINVAL });
    }
    let ranges_max = if own_server { LOGGING_RANGES_MAX } else { FOREIGN_RANGES_MAX };
    if ranges.len() > ranges_max {
        return Err(DeviceError::Errno { call, errno: libc::E2BIG });
    }
    let mut data = Vec::new();
    LoggingStart { page_size, ranges: ranges.to_vec() }.encode(&mut data);
    let reply = feature::set(shared, call, DMA_LOGGING_START, &data, timeout)?;
    let used = LoggingStart::decode(&reply).map_err(|error| malformed(call, error))?.page_size;
    if !used.is_power_of_two() {
        return Err(broke(call, format!("page size {used:#x}")));
    }
    Ok(used)
}

/// Stops logging.
pub(super) fn stop(shared: &Shared, timeout: Option<Duration>) -> DeviceResult<()> {
    feature::set(shared, "DMA_LOGGING_STOP", DMA_LOGGING_STOP, &[], timeout).map(drop)
}

/// Reports and clears the log of `range` into `bitmap`.
pub(super) fn report(
    shared: &Shared,
    range: DmaRange,
    page_size: u64,
    bitmap: &mut [u64],
    own_server: bool,
    timeout: Option<Duration>,
) -> DeviceResult<()> {
    let whole = LoggingReportData { iova: range.iova, length: range.length, page_size };
    let need = whole.bitmap_bytes(1).map_err(|_| invalid())?;
    if (bitmap.len() as u64) < need / 8 {
        return Err(invalid());
    }
    let parts = match own_server {
        true => vec![(range.iova, range.length)],
        false => shared.dma.fd_parts(range.iova, range.length),
    };
    for (iova, length) in parts {
        if !(iova - range.iova).is_multiple_of(page_size) {
            return Err(invalid());
        }
        report_part(shared, DmaRange { iova, length }, range.iova, page_size, bitmap, timeout)?;
    }
    Ok(())
}

/// Reports a range that begins at a page of the whole one.
fn report_part(
    shared: &Shared,
    part: DmaRange,
    base: u64,
    page_size: u64,
    bitmap: &mut [u64],
    timeout: Option<Duration>,
) -> DeviceResult<()> {
    let words_max = (shared.limits.max_data_xfer_bytes / 8).max(1) as u64;
    let step = words_max.saturating_mul(64).saturating_mul(page_size);
    let mut done = 0;
    while done < part.length {
        let iova = part.iova + done;
        let length = step.min(part.length - done);
        let ask = LoggingReportData { iova, length, page_size };
        let bytes = ask.bitmap_bytes(1).map_err(|_| invalid())? as usize;
        let mut data = Vec::new();
        ask.encode(&mut data);
        let expected = size_of::<LoggingReportData>() + bytes;
        let reply = feature::get(shared, REPORT, DMA_LOGGING_REPORT, &data, expected, timeout)?;
        let words = reply
            .get(size_of::<LoggingReportData>()..expected)
            .ok_or_else(|| broke(REPORT, format!("{} bytes of {expected}", reply.len())))?;
        let words = words
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
        or_bits(bitmap, (iova - base) / page_size, words, length.div_ceil(page_size));
        done += length;
    }
    Ok(())
}

/// Ors the first `count` bits of `words` into `bitmap` from bit `at` on. Bits beyond `count` are the
/// server's to keep zero and are not trusted.
fn or_bits(bitmap: &mut [u64], at: u64, words: impl Iterator<Item = u64>, count: u64) {
    let (word_at, shift) = ((at / 64) as usize, at % 64);
    let mut left = count;
    for (i, word) in words.enumerate() {
        if left == 0 {
            break;
        }
        let word = if left < 64 { word & ((1 << left) - 1) } else { word };
        left = left.saturating_sub(64);
        if let Some(low) = bitmap.get_mut(word_at + i) {
            *low |= word << shift;
        }
        if shift > 0
            && let Some(high) = bitmap.get_mut(word_at + i + 1)
        {
            *high |= word >> (64 - shift);
        }
    }
}

fn invalid() -> DeviceError {
    DeviceError::Errno { call: REPORT, errno: libc::EINVAL }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_land_where_their_range_begins_and_stray_ones_are_dropped() {
        let mut bitmap = [0u64; 3];
        or_bits(&mut bitmap, 60, [0xff, u64::MAX].into_iter(), 66);
        assert_eq!(bitmap, [0xf << 60, 0xf | 0x3 << 60, 0]);
        or_bits(&mut bitmap, 0, [1, u64::MAX].into_iter(), 64);
        assert_eq!(bitmap, [0xf << 60 | 1, 0xf | 0x3 << 60, 0]);
        or_bits(&mut bitmap, 191, [3].into_iter(), 2);
        assert_eq!(bitmap[2], 1 << 63, "never beyond the caller's bitmap");
    }
}
