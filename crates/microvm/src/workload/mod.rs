//! The built-in workload: its image, its start page and its mailbox (docs/workload.md).
//!
//! The guest's code is 32-bit assembly inside this binary; [`elf_image`] wraps it into a PVH ELF, so it
//! boots the way every other kernel does. The process guest runs the same workload as threads.

pub mod mailbox;

use migration::{GuestMemory, PAGE_SIZE};
use zerocopy::IntoBytes;

use crate::config::{VmConfig, WorkloadConfig};
use crate::error::{Error, Result};
use crate::layout::MMIO_START;

/// Guest address of the start page.
pub const START_PAGE: u64 = 0x6000;
/// Guest address of the mailbox.
pub const MAILBOX: u64 = 0x7000;
/// First word of the start page.
pub const START_MAGIC: u32 = 0x5452_5453;
/// First word of the mailbox once the guest runs.
pub const MAILBOX_MAGIC: u32 = 0x5842_4d56;
/// PCI vendor (low half) and device id of the device the guest drives.
pub const DEVICE_ID: u32 = 0x00f7_1b36;
/// ID register of that device.
pub const DEVICE_MAGIC: u32 = 0x5946_4d56;
/// Most devices the workload drives.
pub const WORKLOAD_DEVICES_MAX: usize = 8;
/// Most vCPUs the workload runs on.
pub const WORKLOAD_VCPUS_MAX: u32 = 16;
/// Offset of the stamp in each page of the working set.
pub const STAMP_OFFSET: u64 = 8;

/// Where the image is loaded.
const BASE: u32 = 0x10_0000;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    include_str!("guest.S"),
    BASE = const BASE,
    START_PAGE = const START_PAGE,
    MAILBOX = const MAILBOX,
    MAILBOX_MAGIC = const MAILBOX_MAGIC,
    DEVICE_ID = const DEVICE_ID,
    DEVICE_MAGIC = const DEVICE_MAGIC,
    MMIO_START = const MMIO_START,
    options(att_syntax)
);

unsafe extern "C" {
    static vmferry_workload_start: u8;
    static vmferry_workload_end: u8;
}

/// The guest's code and data.
fn image() -> &'static [u8] {
    let (start, end) = (&raw const vmferry_workload_start, &raw const vmferry_workload_end);
    // SAFETY: both symbols bound the read-only section of guest.S, which is never written.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The guest as a 32-bit PVH ELF.
pub fn elf_image() -> Vec<u8> {
    pvh_elf(image(), BASE)
}

/// A 32-bit ELF with `code` at `base`, entered there by PVH.
pub fn pvh_elf(code: &[u8], base: u32) -> Vec<u8> {
    const HEADER_BYTES: u32 = 52;
    const ENTRY_BYTES: u32 = 32;
    const NOTE_OFFSET: u32 = HEADER_BYTES + 2 * ENTRY_BYTES;
    const NOTE_BYTES: u32 = 20;
    const CODE_OFFSET: u32 = 0x1000;
    let len = code.len() as u32;

    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend_from_slice([2u16, 3].as_bytes()); // an executable for the 386
    elf.extend_from_slice([1, base, HEADER_BYTES, 0, 0].as_bytes());
    elf.extend_from_slice([HEADER_BYTES as u16, ENTRY_BYTES as u16, 2, 40, 0, 0].as_bytes());
    // type, offset, virtual and physical address, bytes in file and memory, flags, alignment
    elf.extend_from_slice([1, CODE_OFFSET, base, base, len, len, 7, 0x1000].as_bytes());
    elf.extend_from_slice([4, NOTE_OFFSET, 0, 0, NOTE_BYTES, NOTE_BYTES, 4, 4].as_bytes());
    elf.extend_from_slice([4u32, 4, 18].as_bytes());
    elf.extend_from_slice(b"Xen\0");
    elf.extend_from_slice(base.as_bytes());
    elf.resize(CODE_OFFSET as usize, 0);
    elf.extend_from_slice(code);
    elf
}

/// What the start page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartPage {
    /// Start of the working set.
    pub working_set_base: u64,
    /// Its length in pages.
    pub working_set_pages: u32,
    /// Page writes per second at the start.
    pub pages_per_s: u32,
    /// Devices the guest has to find.
    pub devices: u32,
    /// Length of each device's ring in pages.
    pub ring_pages: u32,
    /// Start of the rings.
    pub ring_base: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// DMA stamps per second of each device at the start.
    pub dma_rate: u32,
}

impl StartPage {
    /// The start page of a machine with `devices` devices.
    pub fn of(config: &VmConfig, devices: usize) -> Result<Self> {
        let workload = &config.workload;
        let low_end = config.memory_bytes.min(MMIO_START);
        let room = low_end.saturating_sub(WorkloadConfig::WS_BASE) / PAGE_SIZE;
        let pages = workload.working_set_pages.map_or(room / 2, u64::from);
        let rings = WorkloadConfig::WS_BASE - WorkloadConfig::RING_BASE;
        let refuse = |what: String| Err(Error::Config(format!("workload: {what}")));
        if config.vcpus == 0 || config.vcpus > WORKLOAD_VCPUS_MAX {
            return refuse(format!("{} vCPUs, it runs on 1 to {WORKLOAD_VCPUS_MAX}", config.vcpus));
        }
        if devices > WORKLOAD_DEVICES_MAX {
            return refuse(format!("{devices} devices, it drives {WORKLOAD_DEVICES_MAX}"));
        }
        if pages < config.vcpus.into() || pages > room {
            return refuse(format!("a working set of {pages} pages, there is room for {room}"));
        }
        if u64::from(workload.ring_pages) * devices as u64 > rings / PAGE_SIZE {
            return refuse(format!(
                "rings of {} pages for {devices} devices, there is room for {} in all",
                workload.ring_pages,
                rings / PAGE_SIZE
            ));
        }
        Ok(Self {
            working_set_base: WorkloadConfig::WS_BASE,
            working_set_pages: pages as u32,
            pages_per_s: workload.dirty_pages_per_s,
            devices: devices as u32,
            ring_pages: workload.ring_pages,
            ring_base: WorkloadConfig::RING_BASE,
            vcpus: config.vcpus,
            dma_rate: workload.dma_rate,
        })
    }

    /// Writes it, empties the mailbox, and sets the working set's stamps to 0 where they are not.
    pub fn install(&self, memory: &GuestMemory) -> Result<()> {
        let mut page = Vec::with_capacity(0x30);
        page.extend_from_slice([START_MAGIC, 1].as_bytes());
        page.extend_from_slice(self.working_set_base.as_bytes());
        page.extend_from_slice(
            [self.working_set_pages, self.pages_per_s, self.devices, self.ring_pages].as_bytes(),
        );
        page.extend_from_slice(self.ring_base.as_bytes());
        page.extend_from_slice([self.vcpus, self.dma_rate].as_bytes());
        memory.write(START_PAGE, &page)?;
        memory.write(MAILBOX, &[0; PAGE_SIZE as usize])?;
        for page in 0..u64::from(self.working_set_pages) {
            let stamp_at = self.working_set_base + page * PAGE_SIZE + STAMP_OFFSET;
            let mut stamp = [0; 8];
            memory.read(stamp_at, &mut stamp)?;
            if stamp != [0; 8] {
                memory.write(stamp_at, &[0; 8])?;
            }
        }
        Ok(())
    }

    /// What is written in `memory`.
    pub fn read(memory: &GuestMemory) -> Result<Self> {
        let u32_at = |offset| -> Result<u32> {
            let mut word = [0; 4];
            memory.read(START_PAGE + offset, &mut word)?;
            Ok(u32::from_le_bytes(word))
        };
        let u64_at = |offset| -> Result<u64> {
            Ok(u64::from(u32_at(offset)?) | u64::from(u32_at(offset + 4)?) << 32)
        };
        if (u32_at(0)?, u32_at(4)?) != (START_MAGIC, 1) {
            return Err(Error::State("the start page holds no workload of version 1".into()));
        }
        Ok(Self {
            working_set_base: u64_at(0x08)?,
            working_set_pages: u32_at(0x10)?,
            pages_per_s: u32_at(0x14)?,
            devices: u32_at(0x18)?,
            ring_pages: u32_at(0x1c)?,
            ring_base: u64_at(0x20)?,
            vcpus: u32_at(0x28)?,
            dma_rate: u32_at(0x2c)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use migration::RegionLayout;

    use super::*;
    use crate::pvh;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[RegionLayout { gpa: 0, len: 32 << 20 }]).unwrap()
    }

    #[test]
    fn the_image_is_a_pvh_kernel() {
        let memory = memory();
        let boot = pvh::load(&mut Cursor::new(elf_image()), "", &memory).unwrap();
        assert_eq!(boot.entry, BASE);
        let mut loaded = vec![0; image().len()];
        memory.read(BASE.into(), &mut loaded).unwrap();
        assert_eq!(loaded, image());
        assert_eq!(loaded[..2], [0xfa, 0xfc], "cli, cld");
    }

    #[test]
    fn the_start_page_reads_as_written_and_stamps_begin_at_zero() {
        let memory = memory();
        let config = VmConfig { memory_bytes: 32 << 20, vcpus: 2, ..VmConfig::default() };
        let start = StartPage::of(&config, 3).unwrap();
        let stamp_at = start.working_set_base + STAMP_OFFSET;
        memory.write(stamp_at, &[7; 8]).unwrap();
        start.install(&memory).unwrap();
        assert_eq!(StartPage::read(&memory).unwrap(), start);
        let mut stamp = [1; 8];
        memory.read(stamp_at, &mut stamp).unwrap();
        assert_eq!(stamp, [0; 8]);
    }

    #[test]
    fn a_workload_that_does_not_fit_is_refused() {
        let fits = VmConfig { memory_bytes: 32 << 20, ..VmConfig::default() };
        assert!(StartPage::of(&fits, 8).is_ok());
        assert!(StartPage::of(&fits, 9).is_err());
        assert!(StartPage::of(&VmConfig { vcpus: 17, ..fits.clone() }, 0).is_err());
        let mut large = fits.clone();
        large.workload.working_set_pages = Some(6145);
        assert!(StartPage::of(&large, 0).is_err(), "24 MiB and one page, above 8 of 32 MiB");
        let mut rings = fits;
        rings.workload.ring_pages = 513;
        assert!(StartPage::of(&rings, 1).is_ok());
        assert!(StartPage::of(&rings, 2).is_err());
    }
}
