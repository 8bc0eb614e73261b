//! L: DMA logging.

use vfio_migration::{DeviceState, DmaRange};

use super::{must_fail, must_refuse, must_succeed};
use crate::context::{Answer, Context, Stop, fail, skip};
use crate::errno::Errno;
use crate::guest::{BURST, MEMORY_BYTES, MEMORY_IOVA};
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};

const LOG: &str = "Linux uAPI, VFIO_DEVICE_FEATURE_DMA_LOGGING_START, _STOP and _REPORT";
const CORE: &str = "Linux 7.2, drivers/vfio/vfio_main.c, vfio_ioctl_device_feature_logging_*";
const USER: &str = "an obligation of the user of the device, not of the device";
const PAGE: u64 = 4096;
/// Memory that is logged in every test.
const RANGE: DmaRange = DmaRange { iova: MEMORY_IOVA, length: MEMORY_BYTES };
/// With 4 KiB pages.
const RANGES_GUARANTEED: u64 = 256;

pub(super) const RULES: &[Rule] = &[
    checked(
        "L1",
        "START takes 256 ranges; none is EINVAL, more than a page of them E2BIG",
        CORE,
        "combine ranges if the hardware has fewer (mlx5, vfio_combine_iova_ranges)",
        l1,
        &[Quirk("break-L1")],
    ),
    checked(
        "L2",
        "START: EINVAL for ranges that are not aligned or overlap, EOVERFLOW for one that wraps",
        CORE,
        "check alignment, overflow and overlap of every range",
        l2,
        &[Quirk("break-L2")],
    ),
    checked(
        "L3",
        "the page size of START is a hint, and the one in use is returned",
        LOG,
        "write the page size in use back: a power of two",
        l3,
        &[Quirk("break-L3")],
    ),
    checked(
        "L4",
        "a second START is refused; after STOP logging starts again",
        LOG,
        "EINVAL or EBUSY while logging is on",
        l4,
        &[Quirk("break-L4")],
    ),
    checked(
        "L5",
        "logging does not depend on the migration state",
        LOG,
        "do not stop the tracker when the device stops",
        l5,
        &[Quirk("break-L5")],
    )
    .limit_s(30),
    checked(
        "L6",
        "REPORT: EINVAL for a page size below 4096 or no power of two, EOVERFLOW for a range that wraps",
        CORE,
        "check page size and range before looking at the log",
        l6,
        &[Quirk("break-L6")],
    ),
    checked(
        "L7",
        "REPORT sets the bits of written pages, only sets, only in the range, and clears the log",
        LOG,
        "bit i is page i from iova; a page is reported once per write",
        l7,
        &[Quirk("break-L7")],
    )
    .limit_s(30),
    checked(
        "L8",
        "REPORT without START is an error",
        LOG,
        "an empty bitmap would say that nothing was written",
        l8,
        &[Quirk("break-L8")],
    ),
    untestable("L9", "after an error of REPORT all memory counts as dirty", LOG, USER),
    checked(
        "L10",
        "the last REPORT, once the device is quiet, has every write up to then",
        LOG,
        "flush the tracker before answering in STOP",
        l10,
        &[Quirk("dma-log-blind")],
    )
    .limit_s(30),
    untestable(
        "L11",
        "ranges cannot be extended while logging; later mappings are not logged",
        "Cloud Hypervisor issue 8567",
        USER,
    ),
    untestable("L12", "without tracking every mapped page is dirty for ever", LOG, USER),
];

fn range(iova: u64, length: u64) -> DmaRange {
    DmaRange { iova, length }
}

/// A START that was not to succeed is undone.
fn start(c: &mut Context, page_size: u64, ranges: &[DmaRange]) -> Answer<u64> {
    let answer = c.log_start(page_size, ranges)?;
    if answer.is_ok() {
        stop(c)?;
    }
    Ok(answer)
}

/// Some servers log mapped memory only.
fn map(c: &mut Context) -> Result<(), Stop> {
    c.as_guest("DMA_MAP", |guest| guest.map())
}

/// STOP where a rule needs it and is not about whether it is there.
fn stop(c: &mut Context) -> Result<(), Stop> {
    match c.log_stop()? {
        Err(errno @ Errno(libc::ENOTTY)) => skip(format!("DMA_LOGGING_STOP: {errno} (rule D3)")),
        answer => must_succeed(Ok(answer), "STOP"),
    }
}

fn l1(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    // Every other 2 MiB, so that none touches its neighbour.
    let ranges = |count: u64| -> Vec<_> { (0..count).map(|i| range(i << 22, 2 << 20)).collect() };
    must_succeed(start(c, PAGE, &ranges(RANGES_GUARANTEED)), "START with 256 ranges")?;
    if c.is_wire() {
        return Ok(());
    }
    must_refuse(start(c, PAGE, &[]), &[libc::EINVAL], "START without ranges")?;
    let more = ranges(RANGES_GUARANTEED + 1);
    must_refuse(start(c, PAGE, &more), &[libc::E2BIG], "START with 257 ranges")
}

fn l2(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    let wrapping = range(u64::MAX - PAGE + 1, 2 * PAGE);
    for (ranges, errno, what) in [
        (vec![range(MEMORY_IOVA + 1, PAGE)], libc::EINVAL, "an iova that is not aligned"),
        (vec![range(MEMORY_IOVA, PAGE + 1)], libc::EINVAL, "a length that is not aligned"),
        (
            vec![range(MEMORY_IOVA, 4 * PAGE), range(MEMORY_IOVA + 2 * PAGE, 4 * PAGE)],
            libc::EINVAL,
            "ranges that overlap",
        ),
        (vec![wrapping], libc::EOVERFLOW, "a range that wraps around"),
    ] {
        must_refuse(start(c, PAGE, &ranges), &[errno], &format!("START with {what}"))?;
    }
    Ok(())
}

fn l3(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    for hint in [PAGE, 64 << 10, 2 << 20] {
        let ranges = [range(0, 64 << 20)];
        let what = format!("START with page size {hint}");
        let used = match start(c, hint, &ranges)? {
            Ok(used) => used,
            // A hint may be beyond what a device can do.
            Err(errno) if hint != PAGE => {
                return fail(
                    format!("{what}: success, with a page size of the device's"),
                    errno.to_string(),
                );
            }
            Err(errno) => return skip(format!("{what}: {errno} (rule L1)")),
        };
        if !used.is_power_of_two() {
            return fail(format!("{what}: the page size in use"), format!("page size {used}"));
        }
    }
    Ok(())
}

fn l4(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    c.need_log(&[RANGE])?;
    must_fail(c.log_start(PAGE, &[RANGE]), "a second START")?;
    stop(c)?;
    must_succeed(c.log_start(PAGE, &[RANGE]), "START after STOP").map(drop)
}

fn l5(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    map(c)?;
    let states = match c.states() {
        Ok(states) => states,
        Err(Stop::NotApplicable(_)) => Vec::new(),
        Err(stop) => return Err(stop),
    };
    c.need_log(&[RANGE])?;
    for state in states {
        c.go_anew(state)?;
        must_succeed(c.log_report(RANGE, PAGE, 0), &format!("REPORT in {state}"))?;
    }
    Ok(())
}

fn l6(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    map(c)?;
    c.need_log(&[RANGE])?;
    for page_size in [0, 1, 512, 2048, 4097, 12_288] {
        let what = format!("REPORT with page size {page_size}");
        must_refuse(c.log_report(RANGE, page_size, 0), &[libc::EINVAL], &what)?;
    }
    let wrapping = range(u64::MAX - PAGE + 1, 2 * PAGE);
    let answer = c.log_report(wrapping, PAGE, 0);
    must_refuse(answer, &[libc::EOVERFLOW], "REPORT of a range that wraps around")
}

fn l7(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    map(c)?;
    c.need_log(&[RANGE])?;
    // On vfio-user the bitmap is the server's, and nothing was in it.
    let mark = if c.is_wire() { 0 } else { 1 << 63 };
    let pages = MEMORY_BYTES / PAGE;
    let half = range(MEMORY_IOVA, MEMORY_BYTES / 2);
    let known = c.guest()?.knows_device();
    if known {
        c.as_guest("making the device write memory", |guest| {
            guest.prepare_dma()?;
            guest.burst()
        })?;
    }
    let first = must_succeed(c.log_report(half, PAGE, mark), "REPORT of half of the range")?;
    let word = first.first().copied().unwrap_or(0);
    if mark != 0 && word & mark == 0 {
        return fail("REPORT only sets bits", "a bit of the caller's was cleared");
    }
    let word = word & !mark;
    if word >> (pages / 2) != 0 {
        return fail("no bits beyond the range", format!("bits {word:#x} of {} pages", pages / 2));
    }
    if !known {
        return Ok(());
    }
    let expected = (1u64 << BURST) - 1;
    if word & !expected != 0 {
        return fail(
            format!("no bits but {expected:#x}: the pages that were written"),
            format!("{word:#x}"),
        );
    }
    if word & expected != expected {
        // That writes are missing is L10's, and so is the whole log of a blind device.
        return skip(format!("bits {word:#x} after {BURST} pages were written (rule L10)"));
    }
    let second = must_succeed(c.log_report(half, PAGE, 0), "a second REPORT")?;
    match second.first() {
        Some(0) => Ok(()),
        word => fail("no bits in a second REPORT: the log is cleared", format!("{word:#x?}")),
    }
}

fn l8(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    map(c)?;
    must_fail(c.log_report(RANGE, PAGE, 0), "REPORT without START")?;
    c.need_log(&[RANGE])?;
    stop(c)?;
    must_fail(c.log_report(RANGE, PAGE, 0), "REPORT after STOP")
}

fn l10(c: &mut Context) -> Result<(), Stop> {
    c.need_logging()?;
    c.flags()?;
    c.as_guest("making the device write memory", |guest| guest.prepare_dma())?;
    c.need_log(&[RANGE])?;
    // As many pages as can be told one by one, then pages written up to the very end.
    for rate in [0, 5_000] {
        c.go(DeviceState::Running)?;
        // From here on.
        must_succeed(c.log_report(RANGE, PAGE, 0), "REPORT in RUNNING")?;
        let before = c.as_guest("reading the guest's memory", |guest| guest.memory())?;
        c.as_guest("making the device write memory", |guest| {
            guest.burst()?;
            guest.background(rate)
        })?;
        if rate > 0 {
            c.wait(20);
        }
        c.go(DeviceState::Stop)?;
        let after = c.as_guest("reading the guest's memory", |guest| guest.memory())?;
        let bitmap = match c.log_report(RANGE, PAGE, 0)? {
            Ok(bitmap) => bitmap,
            Err(errno) => return skip(format!("REPORT in STOP: {errno} (rule L5)")),
        };
        compare(&before, &after, &bitmap)?;
    }
    Ok(())
}

/// Every page that changed has its bit.
fn compare(before: &[u8], after: &[u8], bitmap: &[u64]) -> Result<(), Stop> {
    let (mut missing, mut written) = (0, 0);
    let pages = before.chunks(PAGE as usize).zip(after.chunks(PAGE as usize));
    for (page, (before, after)) in pages.enumerate() {
        if before == after {
            continue;
        }
        written += 1;
        let bit = bitmap.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 != 0);
        missing += usize::from(!bit);
    }
    match (written, missing) {
        (0, _) => skip("the device wrote nothing"),
        (_, 0) => Ok(()),
        (written, missing) => fail(
            format!("bits of all {written} pages that were written"),
            format!("{missing} are missing"),
        ),
    }
}
