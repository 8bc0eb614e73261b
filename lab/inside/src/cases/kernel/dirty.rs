//! Who knows which pages a device wrote: the device, type1, and the page tables of an IOMMU (the kernel's mock).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, ensure};
use vfio_kernel::hwpt::Hwpt;
use vfio_kernel::raw::memory::FileMapping;
use vfio_kernel::raw::uapi::{
    IOMMU_HW_CAP_DIRTY_TRACKING, IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE,
    MOCK_APERTURE_START, MOCK_FLAGS_DEVICE_NO_DIRTY, MOCK_PAGE_SIZE,
};
use vfio_kernel::raw::{iommufd, mock};
use vfio_kernel::{Access, DirtySource, KernelDevice};
use vfio_migration::DeviceState::{PreCopy, StopCopy};
use vfio_migration::{DmaRange, MigratableDevice};

use super::function::{enable, stamp};
use super::{each_way, open};
use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel-a-device-logs-its-own-dma", device_log),
        Case::new("kernel-type1-tracks-for-a-device-without-a-log", type1),
        Case::new("kernel-nobody-tracks-for-a-mediated-device-by-cdev", nobody),
        Case::new("kernel-iommufd-tracks-in-page-tables", page_tables),
        Case::new("kernel-iommufd-refuses-tracking-without-hardware", no_hardware),
    ]
}

const PAGE: u64 = 4096;
const MEMORY: u64 = 1 << 20;

/// Starts the log, lets the device write, and finds exactly those pages.
fn check_log(opened: &KernelDevice, expected: DirtySource) -> anyhow::Result<()> {
    let mut device = opened.migration()?;
    let source = device.dirty_source();
    ensure!(source == expected, "dirty source {source:?}");
    ensure!(device.capabilities().dma_logging, "no logging");
    let function = opened.pci()?;
    let memory = super::memory(MEMORY)?;
    microvm::pci::map_memory(&*function, &memory)?;
    enable(&*function)?;
    let range = DmaRange { iova: 0, length: MEMORY };
    let mut bitmap = vec![0u64; 4];
    ensure!(
        device.report_dma_log(range, PAGE, &mut bitmap).is_err(),
        "a report without a log (L8)"
    );
    let used = device.start_dma_logging(&[range], PAGE)?;
    ensure!(used == PAGE, "a page size of {used}");
    ensure!(device.start_dma_logging(&[range], PAGE).is_err(), "a second START (L4)");
    device.report_dma_log(range, PAGE, &mut bitmap)?;
    let report = |device: &mut vfio_kernel::KernelMigration| -> anyhow::Result<Vec<u64>> {
        let mut bitmap = vec![0u64; 4];
        device.report_dma_log(range, PAGE, &mut bitmap)?;
        Ok(bitmap)
    };
    ensure!(report(&mut device)? == [0; 4], "dirty before anything was written");
    let first = read_completed(opened)?;
    stamp(&*function, 0x10_000, 8, 3)?;
    let pages = (0..3).map(|n| 16 + (first + n) % 8);
    let expected = pages.fold(0u64, |bits, page| bits | 1 << page);
    let found = report(&mut device)?;
    ensure!(found == [expected, 0, 0, 0], "{found:x?} instead of {expected:x}");
    ensure!(report(&mut device)? == [0; 4], "a report does not clear (L7)");
    // The log is independent of the state (L5), and complete once the device stands still (L10).
    device.set_state(PreCopy)?;
    stamp(&*function, 0x20_000, 1, 1)?;
    device.set_state(StopCopy)?;
    let found = report(&mut device)?;
    ensure!(found == [1 << 32, 0, 0, 0], "{found:x?} in the last report");
    // Bits that are there stay.
    let mut kept = vec![1u64 << 63; 4];
    device.report_dma_log(range, PAGE, &mut kept)?;
    ensure!(kept == [1 << 63; 4], "a report took bits away (L7)");
    device.stop_dma_logging()?;
    ensure!(device.report_dma_log(range, PAGE, &mut kept).is_err(), "a report after STOP (L8)");
    device.start_dma_logging(&[range], PAGE)?;
    device.reset()?;
    Ok(())
}

/// How many stamps were written so far: the next goes to that page of the ring.
fn read_completed(opened: &KernelDevice) -> anyhow::Result<u64> {
    let low = super::function::read(&*opened.pci()?, device_model::regs::COMPLETED)?;
    Ok(low.into())
}

fn device_log(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Ferrydev, |_, opened| check_log(&opened, DirtySource::Device))
}

fn type1(lab: &Lab) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    let device = lab.create(Parent::Ferrydev)?;
    device.set("quirks", "no-dma-logging")?;
    check_log(&open(&device, Access::Group)?, DirtySource::Type1)?;
    Ok(Outcome::Passed)
}

fn nobody(lab: &Lab) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    let device = lab.create(Parent::Ferrydev)?;
    device.set("quirks", "no-dma-logging")?;
    let opened = open(&device, Access::Cdev)?;
    let mut migration = opened.migration()?;
    ensure!(migration.dirty_source() == DirtySource::None, "{:?}", migration.dirty_source());
    ensure!(!migration.capabilities().dma_logging, "it claims a log");
    let started = migration.start_dma_logging(&[DmaRange { iova: 0, length: PAGE }], PAGE);
    ensure!(started.is_err(), "a log that nobody keeps was started");
    Ok(Outcome::Passed)
}

fn iommufd() -> anyhow::Result<Arc<OwnedFd>> {
    let file = File::options().read(true).write(true).open("/dev/iommu")?;
    Ok(Arc::new(file.into()))
}

fn page_tables(_lab: &Lab) -> anyhow::Result<Outcome> {
    let iommufd = iommufd()?;
    let ioas = iommufd::ioas_alloc(iommufd.as_fd())?;
    let device = mock::device(iommufd.as_fd(), ioas, 0).context("the mock is not there")?;
    let capabilities = iommufd::hw_capabilities(iommufd.as_fd(), device.dev_id)?;
    ensure!(capabilities & IOMMU_HW_CAP_DIRTY_TRACKING != 0, "capabilities {capabilities:#x}");
    let table = Hwpt::new(&iommufd, device.dev_id, ioas)?;
    mock::replace(iommufd.as_fd(), device.stdev_id, table.id())?;

    // Both ways of mapping, one behind the other.
    let memory = super::memory(2 * MEMORY)?;
    let file = memory.region_fd(0);
    let flags = IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE;
    let base = MOCK_APERTURE_START;
    iommufd::ioas_map_file(iommufd.as_fd(), ioas, flags, file, 0, MEMORY, base)?;
    let lent = FileMapping::new(file, MEMORY, MEMORY, true, true)?;
    iommufd::ioas_map(iommufd.as_fd(), ioas, flags, &lent, base + MEMORY)?;

    let range = DmaRange { iova: base, length: 2 * MEMORY };
    let words = (range.length / MOCK_PAGE_SIZE / 64) as usize;
    let mark = |pages: &[u64]| -> anyhow::Result<u64> {
        let mut bitmap = vec![0u64; words];
        for page in pages {
            bitmap[(page / 64) as usize] |= 1 << (page % 64);
        }
        let fd = iommufd.as_fd();
        let length = range.length;
        Ok(mock::mark_dirty(fd, table.id(), range.iova, length, MOCK_PAGE_SIZE, &bitmap)?)
    };
    let report = |page_size: u64| -> anyhow::Result<Vec<u64>> {
        let mut bitmap = vec![0u64; (range.length / page_size / 64) as usize];
        table.report(range, page_size, &mut bitmap)?;
        let bits = |(word, bits): (usize, u64)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 64 * word as u64 + bit)
        };
        Ok(bitmap.into_iter().enumerate().flat_map(bits).collect())
    };
    table.set_tracking(true)?;
    ensure!(report(MOCK_PAGE_SIZE)?.is_empty(), "dirty at the start");
    // In both mappings, the first page and the last.
    let last = 2 * MEMORY / MOCK_PAGE_SIZE - 1;
    let pages = [0, 1, 77, MEMORY / MOCK_PAGE_SIZE, last];
    let marked = mark(&pages)?;
    ensure!(marked == pages.len() as u64, "{marked} marked");
    let found = report(MOCK_PAGE_SIZE)?;
    ensure!(found == pages, "{found:?} instead of {pages:?}");
    ensure!(report(MOCK_PAGE_SIZE)?.is_empty(), "a report does not clear");
    // In pages larger than the IOMMU's own.
    mark(&[1, 2, 3, last])?;
    let found = report(PAGE)?;
    let expected = [0, 1, last / 2];
    ensure!(found == expected, "{found:?} instead of {expected:?}");
    let mut short = [0u64; 1];
    let refused = table.report(range, PAGE, &mut short);
    ensure!(refused.is_err(), "a bitmap that is too small was taken");
    table.set_tracking(false)?;
    // It can be started anew, and is clean then.
    mark(&[5]).ok();
    table.set_tracking(true)?;
    ensure!(report(MOCK_PAGE_SIZE)?.is_empty(), "dirty from before");

    iommufd::ioas_unmap(iommufd.as_fd(), ioas, base, 2 * MEMORY)?;
    iommufd::destroy(iommufd.as_fd(), device.stdev_id)?;
    drop(table);
    iommufd::destroy(iommufd.as_fd(), ioas).context("something still uses the address space")?;
    Ok(Outcome::Passed)
}

fn no_hardware(_lab: &Lab) -> anyhow::Result<Outcome> {
    let iommufd = iommufd()?;
    let ioas = iommufd::ioas_alloc(iommufd.as_fd())?;
    let flags = MOCK_FLAGS_DEVICE_NO_DIRTY;
    let device = mock::device(iommufd.as_fd(), ioas, flags).context("the mock is not there")?;
    let error = Hwpt::new(&iommufd, device.dev_id, ioas).err().context("it was given a table")?;
    let errno = error.raw_os_error();
    ensure!(errno == Some(libc::EOPNOTSUPP), "{error}");
    Ok(Outcome::Passed)
}
