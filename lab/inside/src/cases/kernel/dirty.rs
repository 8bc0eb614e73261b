//! Who knows which pages a device wrote: the device, type1, and the page tables of an IOMMU (the kernel's mock).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, ensure};
use vfio_kernel::hwpt::Hwpt;
use vfio_kernel::raw::memory::FileMapping;
use vfio_kernel::raw::uapi::{
    IOMMU_HW_CAP_DIRTY_TRACKING, IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE,
    MOCK_APERTURE_START, MOCK_FLAGS_DEVICE_NO_DIRTY,
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
        Case::new("kernel-iommufd-loses-no-page-of-a-large-entry", large_entries),
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

/// A page table over an address space with memory mapped, both ways: half by file, half by address.
struct Tracked {
    iommufd: Arc<OwnedFd>,
    ioas: u32,
    stdev_id: u32,
    table: Hwpt,
    range: DmaRange,
    _lent: FileMapping,
}

impl Tracked {
    fn new(huge_pages: bool) -> anyhow::Result<Self> {
        let iommufd = iommufd()?;
        let ioas = iommufd::ioas_alloc(iommufd.as_fd())?;
        iommufd::ioas_set_huge_pages(iommufd.as_fd(), ioas, huge_pages)?;
        let device = mock::device(iommufd.as_fd(), ioas, 0).context("the mock is not there")?;
        let capabilities = iommufd::hw_capabilities(iommufd.as_fd(), device.dev_id)?;
        ensure!(capabilities & IOMMU_HW_CAP_DIRTY_TRACKING != 0, "no tracking: {capabilities:#x}");
        let table = Hwpt::new(&iommufd, device.dev_id, ioas)?;
        mock::replace(iommufd.as_fd(), device.stdev_id, table.id())?;
        let memory = super::memory(2 * MEMORY)?;
        let file = memory.region_fd(0);
        let flags = IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE;
        let base = MOCK_APERTURE_START;
        iommufd::ioas_map_file(iommufd.as_fd(), ioas, flags, file, 0, MEMORY, base)?;
        let lent = FileMapping::new(file, MEMORY, MEMORY, true, true)?;
        iommufd::ioas_map(iommufd.as_fd(), ioas, flags, &lent, base + MEMORY)?;
        let range = DmaRange { iova: base, length: 2 * MEMORY };
        Ok(Self { iommufd, ioas, stdev_id: device.stdev_id, table, range, _lent: lent })
    }

    /// The mock device writes to these pages of the host.
    fn write(&self, pages: &[u64]) -> anyhow::Result<()> {
        let DmaRange { iova, length } = self.range;
        let mut bitmap = vec![0u64; (length / PAGE / 64) as usize];
        for page in pages {
            bitmap[(page / 64) as usize] |= 1 << (page % 64);
        }
        let fd = self.iommufd.as_fd();
        let marked = mock::mark_dirty(fd, self.table.id(), iova, length, PAGE, &bitmap)?;
        ensure!(marked == pages.len() as u64, "{marked} of {} written", pages.len());
        Ok(())
    }

    fn report(&self) -> anyhow::Result<Vec<u64>> {
        let mut bitmap = vec![0u64; (self.range.length / PAGE / 64) as usize];
        self.table.report(self.range, PAGE, &mut bitmap)?;
        let bits = |(word, bits): (usize, u64)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 64 * word as u64 + bit)
        };
        Ok(bitmap.into_iter().enumerate().flat_map(bits).collect())
    }

    /// Takes everything apart: nothing may be left in use.
    fn end(self) -> anyhow::Result<()> {
        let fd = self.iommufd.as_fd();
        iommufd::ioas_unmap(fd, self.ioas, self.range.iova, self.range.length)?;
        iommufd::destroy(fd, self.stdev_id)?;
        drop(self.table);
        iommufd::destroy(fd, self.ioas).context("something still uses the address space")
    }
}

fn page_tables(_lab: &Lab) -> anyhow::Result<Outcome> {
    let tracked = Tracked::new(false)?;
    tracked.table.set_tracking(true)?;
    ensure!(tracked.report()?.is_empty(), "dirty at the start");
    // In both mappings, the first page and the last; each brings the one behind it, see the crate.
    tracked.write(&[0, 38, 256, 511])?;
    let (found, expected) = (tracked.report()?, [0, 1, 38, 39, 256, 257, 511]);
    ensure!(found == expected, "{found:?} instead of {expected:?}");
    ensure!(tracked.report()?.is_empty(), "a report does not clear");
    let refused = tracked.table.report(tracked.range, PAGE, &mut [0; 1]);
    ensure!(refused.is_err(), "a bitmap that is too small was taken");
    // Started anew it is clean.
    tracked.write(&[5])?;
    tracked.table.set_tracking(false)?;
    tracked.table.set_tracking(true)?;
    ensure!(tracked.report()?.is_empty(), "dirty from before");
    tracked.end()?;
    Ok(Outcome::Passed)
}

/// Pages that share an entry are dirty together, and none of them is lost.
fn large_entries(_lab: &Lab) -> anyhow::Result<Outcome> {
    let tracked = Tracked::new(true)?;
    tracked.table.set_tracking(true)?;
    for page in 0..tracked.range.length / PAGE {
        tracked.write(&[page])?;
        let found = tracked.report()?;
        ensure!(found.contains(&page), "page {page} is lost: {found:?}");
        ensure!(found.len() <= 257, "one page made {} dirty", found.len());
    }
    ensure!(tracked.report()?.is_empty(), "a report does not clear");
    tracked.end()?;
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
