//! The range rules of DMA logging (L1 to L12), checked before a driver sees the call: its own answer is a
//! bare EINVAL.

use vfio_migration::{DeviceError, DeviceResult, DmaRange};

pub(crate) const START: &str = "DMA_LOGGING_START";
pub(crate) const REPORT: &str = "DMA_LOGGING_REPORT";
pub(crate) const STOP: &str = "DMA_LOGGING_STOP";

/// As many ranges as the kernel guarantees with pages of 4 KiB, and takes (L1).
pub(crate) const RANGES_MAX: usize = 256;

/// The smallest page size of a report (L6).
const REPORT_PAGE_MIN: u64 = 4096;

/// What is being logged.
#[derive(Debug)]
pub(crate) struct Log {
    ranges: Vec<DmaRange>,
    /// A report failed: whatever comes later cannot be trusted (L9).
    corrupt: bool,
}

impl Log {
    /// Checks the arguments of a START.
    pub(crate) fn check_start(
        running: Option<&Log>,
        ranges: &[DmaRange],
        page_size: u64,
    ) -> DeviceResult<()> {
        let refuse = |errno, why: String| Err(DeviceError::Refused { call: START, errno, why });
        if running.is_some() {
            return refuse(libc::EBUSY, "the log is running; stop it first (L4)".into());
        }
        if !page_size.is_power_of_two() {
            let why = format!("a page size of {page_size} bytes is not a power of two (L2)");
            return refuse(libc::EINVAL, why);
        }
        if ranges.is_empty() {
            return refuse(libc::EINVAL, "no ranges (L1)".into());
        }
        if ranges.len() > RANGES_MAX {
            let why = format!("{} ranges, at most {RANGES_MAX} (L1)", ranges.len());
            return refuse(libc::E2BIG, why);
        }
        for range in ranges {
            check_range(START, range)?;
            if !range.iova.is_multiple_of(page_size) || !range.length.is_multiple_of(page_size) {
                let why = format!("{} is not whole pages of {page_size} bytes (L2)", show(range));
                return refuse(libc::EINVAL, why);
            }
        }
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.iova);
        for pair in sorted.windows(2) {
            if let [a, b] = pair
                && b.iova - a.iova < a.length
            {
                let why = format!("{} and {} overlap (L2)", show(a), show(b));
                return refuse(libc::EINVAL, why);
            }
        }
        Ok(())
    }

    /// A log that was started for `ranges`.
    pub(crate) fn new(ranges: &[DmaRange]) -> Self {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable_by_key(|range| range.iova);
        Self { ranges, corrupt: false }
    }

    /// Checks the arguments of a REPORT into a bitmap of `bitmap_words` words.
    pub(crate) fn check_report(
        running: Option<&Log>,
        range: &DmaRange,
        page_size: u64,
        bitmap_words: usize,
    ) -> DeviceResult<()> {
        let refuse = |errno, why: String| Err(DeviceError::Refused { call: REPORT, errno, why });
        let Some(log) = running else {
            return refuse(libc::EINVAL, "the log is not running (L8)".into());
        };
        if log.corrupt {
            let why = "an earlier report failed, the log is corrupt; start it anew (L9)";
            return refuse(libc::EIO, why.into());
        }
        if page_size < REPORT_PAGE_MIN || !page_size.is_power_of_two() {
            let why = format!(
                "a page size of {page_size} bytes is not a power of two from {REPORT_PAGE_MIN} on (L6)"
            );
            return refuse(libc::EINVAL, why);
        }
        check_range(REPORT, range)?;
        if !log.covers(range) {
            let why = format!("{} is not all logged: ranges are fixed at START (L11)", show(range));
            return refuse(libc::EINVAL, why);
        }
        if crate::raw::memory::bitmap_words(range.length, page_size) > bitmap_words as u64 {
            let why = format!("{bitmap_words} words are too few for {} (L7)", show(range));
            return refuse(libc::EINVAL, why);
        }
        Ok(())
    }

    /// A report failed.
    pub(crate) fn spoil(&mut self) {
        self.corrupt = true;
    }

    /// Adjacent ranges may be reported in one.
    fn covers(&self, range: &DmaRange) -> bool {
        // Ends are inclusive: the last range may end with the address space.
        let last = range.iova + (range.length - 1);
        let mut at = range.iova;
        for logged in &self.ranges {
            let logged_last = logged.iova + (logged.length - 1);
            if logged.iova <= at && at <= logged_last {
                if logged_last >= last {
                    return true;
                }
                at = logged_last + 1;
            }
        }
        false
    }
}

fn check_range(call: &'static str, range: &DmaRange) -> DeviceResult<()> {
    if range.length == 0 {
        let why = format!("{} is empty (L2)", show(range));
        return Err(DeviceError::Refused { call, errno: libc::EINVAL, why });
    }
    // As the kernel counts: the end after the last byte has to be a number.
    if range.iova.checked_add(range.length).is_none() {
        let why = format!("{} wraps around (L2)", show(range));
        return Err(DeviceError::Refused { call, errno: libc::EOVERFLOW, why });
    }
    Ok(())
}

fn show(range: &DmaRange) -> String {
    format!("{:#x} +{:#x}", range.iova, range.length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn range(iova: u64, length: u64) -> DmaRange {
        DmaRange { iova, length }
    }

    fn rule(result: DeviceResult<()>) -> Option<(i32, String)> {
        let error = result.err()?;
        let text = error.to_string();
        let rule = text.rsplit_once('(').unwrap().1.trim_end_matches(')').to_owned();
        Some((error.errno().unwrap(), rule))
    }

    fn said(errno: i32, rule: &str) -> Option<(i32, String)> {
        Some((errno, rule.into()))
    }

    #[test]
    fn l1_l2_l4_the_ranges_of_a_start() {
        let pages = |count: u64| (0..count).map(|i| range(2 * i * PAGE, PAGE)).collect::<Vec<_>>();
        let top = u64::MAX - PAGE + 1;
        let cases = [
            (vec![range(0, PAGE)], PAGE, None),
            (pages(256), PAGE, None),
            (vec![range(PAGE, PAGE), range(0, PAGE)], PAGE, None),
            (vec![], PAGE, said(libc::EINVAL, "L1")),
            (pages(257), PAGE, said(libc::E2BIG, "L1")),
            (vec![range(1, PAGE)], PAGE, said(libc::EINVAL, "L2")),
            (vec![range(0, PAGE + 1)], PAGE, said(libc::EINVAL, "L2")),
            (vec![range(0, 0)], PAGE, said(libc::EINVAL, "L2")),
            (vec![range(0, PAGE)], 0, said(libc::EINVAL, "L2")),
            (vec![range(0, PAGE)], 3 * PAGE, said(libc::EINVAL, "L2")),
            (vec![range(top, PAGE)], PAGE, said(libc::EOVERFLOW, "L2")),
            (vec![range(0, 2 * PAGE), range(PAGE, PAGE)], PAGE, said(libc::EINVAL, "L2")),
            (vec![range(PAGE, PAGE), range(0, 4 * PAGE)], PAGE, said(libc::EINVAL, "L2")),
        ];
        for (ranges, page_size, expected) in cases {
            let result = rule(Log::check_start(None, &ranges, page_size));
            assert_eq!(result, expected, "{ranges:?} {page_size}");
        }
        let running = Log::new(&[range(0, PAGE)]);
        let again = Log::check_start(Some(&running), &[range(0, PAGE)], PAGE);
        assert_eq!(rule(again), said(libc::EBUSY, "L4"));
    }

    #[test]
    fn l6_l7_l8_l11_the_range_of_a_report() {
        let log =
            Log::new(&[range(4 * PAGE, 4 * PAGE), range(0, 4 * PAGE), range(64 * PAGE, PAGE)]);
        let cases = [
            (range(0, 4 * PAGE), PAGE, 1, None),
            (range(PAGE, 7 * PAGE), PAGE, 1, None),
            (range(0, 9 * PAGE), PAGE, 1, said(libc::EINVAL, "L11")),
            (range(63 * PAGE, 2 * PAGE), PAGE, 1, said(libc::EINVAL, "L11")),
            (range(64 * PAGE, PAGE), 2 * PAGE, 1, None),
            (range(0, PAGE), 2048, 1, said(libc::EINVAL, "L6")),
            (range(0, PAGE), 3 * PAGE, 1, said(libc::EINVAL, "L6")),
            (range(0, PAGE), PAGE, 0, said(libc::EINVAL, "L7")),
            (range(0, 0), PAGE, 1, said(libc::EINVAL, "L2")),
            (range(u64::MAX, PAGE), PAGE, 1, said(libc::EOVERFLOW, "L2")),
        ];
        for (range, page_size, words, expected) in cases {
            let result = rule(Log::check_report(Some(&log), &range, page_size, words));
            assert_eq!(result, expected, "{range:?} {page_size} {words}");
        }
        let without = Log::check_report(None, &range(0, PAGE), PAGE, 1);
        assert_eq!(rule(without), said(libc::EINVAL, "L8"));
    }

    #[test]
    fn l9_after_a_failed_report_no_report_is_trusted() {
        let mut log = Log::new(&[range(0, PAGE)]);
        log.spoil();
        let report = Log::check_report(Some(&log), &range(0, PAGE), PAGE, 1);
        assert_eq!(rule(report), said(libc::EIO, "L9"));
    }
}
