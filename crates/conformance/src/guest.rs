//! The guest's part: what makes a device change its state, reconfigure itself or write memory.
//!
//! A check knows how to make the project's own devices do that (`docs/workload.md`); of any other device
//! it knows only what its author says with `--reinit-write`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use device_model::regs;
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{DeviceResult, DmaBacking, DmaPermissions, PciFunction};

use crate::context::{Stop, fail, skip};

/// Where guest memory is mapped, in IOVA.
pub const MEMORY_IOVA: u64 = 0x10_0000;
/// How much of it.
pub const MEMORY_BYTES: u64 = 64 * 4096;
/// Stamps that a burst writes.
pub const BURST: u32 = 16;

const PCI_COMMAND: u64 = 4;
/// Memory space and bus mastering.
const COMMAND_ON: [u8; 2] = [6, 0];

/// A write that makes a device reconfigure itself: new initial data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReinitWrite {
    /// Region index; 0 to 5 are the BARs.
    pub region: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// A little-endian word of 32 bits.
    pub value: u32,
}

impl ReinitWrite {
    /// Parses `BAR:OFFSET:VALUE`; numbers are decimal or `0x`.
    ///
    /// # Errors
    /// A sentence that shows the form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refused = || format!("{text:?} is not BAR:OFFSET:VALUE, as in 0:0x14:1");
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        };
        let mut parts = text.split(':').map(number);
        let mut next = || parts.next().flatten();
        let (region, offset, value) = (next(), next(), next());
        let region = region.filter(|region| *region < 6).ok_or_else(refused)? as u32;
        let value = value.and_then(|value| u32::try_from(value).ok()).ok_or_else(refused)?;
        let offset = offset.ok_or_else(refused)?;
        if parts.next().is_some() {
            return Err(refused());
        }
        Ok(Self { region, offset, value })
    }
}

/// See the module.
pub struct Guest {
    pci: Option<Arc<dyn PciFunction>>,
    ours: bool,
    reinit_write: Option<ReinitWrite>,
    generation: u32,
    memory: Option<File>,
}

impl Guest {
    /// Looks at what the device is.
    pub fn find(pci: Option<Arc<dyn PciFunction>>, reinit_write: Option<ReinitWrite>) -> Self {
        let mut ids = [0; 4];
        let read = pci.as_ref().map(|pci| pci.region_read(REGION_CONFIG, 0, &mut ids));
        let expected =
            (u32::from(regs::DEVICE_ID) << 16 | u32::from(regs::VENDOR_ID)).to_le_bytes();
        let ours = matches!(read, Some(Ok(()))) && ids == expected;
        Self { pci, ours, reinit_write, generation: 0, memory: None }
    }

    /// The check knows the registers of this device.
    pub fn knows_device(&self) -> bool {
        self.ours
    }

    fn need_ours(&self) -> Result<(), Stop> {
        match self.ours {
            true => Ok(()),
            false => skip("it is not known how to make this device write memory"),
        }
    }

    /// Makes the device reconfigure itself with about `kib` KiB, where its size can be said.
    pub fn reconfigure(&mut self, kib: u32) -> Result<(), Stop> {
        if let Some(ReinitWrite { region, offset, value }) = self.reinit_write {
            return self.put(region, offset, &value.to_le_bytes());
        }
        if !self.ours {
            return skip(
                "it is not known how to make this device reconfigure itself (--reinit-write)",
            );
        }
        self.generation += 1;
        let generation = self.generation;
        self.register(regs::CONFIG_KIB, kib)?;
        self.register(regs::CONFIG_GEN, generation)
    }

    /// Changes `kib` KiB of the device's state.
    pub fn dirty(&mut self, kib: u32) -> Result<(), Stop> {
        self.need_ours()?;
        self.register(regs::FILL_KIB, kib)
    }

    /// Maps memory that the device may write.
    pub fn map(&mut self) -> Result<(), Stop> {
        if self.memory.is_none() {
            let file = tempfile::tempfile().and_then(|file| {
                file.set_len(MEMORY_BYTES)?;
                Ok(file)
            });
            let file = file.or_else(|error| skip(format!("no memory for the guest: {error}")))?;
            let fd = file.try_clone().or_else(|error| skip(error.to_string()))?;
            let backing = DmaBacking::Fd { fd: Arc::new(OwnedFd::from(fd)), offset: 0 };
            let rw = DmaPermissions { read: true, write: true };
            let mapped = self.pci()?.dma_map(MEMORY_IOVA, MEMORY_BYTES, rw, backing);
            refused("DMA_MAP", mapped)?;
            self.memory = Some(file);
        }
        Ok(())
    }

    /// Maps memory and makes the device able to write it.
    pub fn prepare_dma(&mut self) -> Result<(), Stop> {
        self.need_ours()?;
        self.map()?;
        self.put(REGION_CONFIG, PCI_COMMAND, &COMMAND_ON)?;
        self.register(regs::DMA_LO, MEMORY_IOVA as u32)?;
        self.register(regs::DMA_HI, 0)?;
        self.register(regs::DMA_PAGES, (MEMORY_BYTES / regs::STAMP_STRIDE_BYTES) as u32)
    }

    /// Makes the device write [`BURST`] pages and waits until it has.
    pub fn burst(&mut self) -> Result<(), Stop> {
        let before = self.completed()?;
        self.register(regs::DOORBELL, BURST)?;
        for _ in 0..200 {
            if self.completed()?.wrapping_sub(before) >= BURST {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        skip("the device does not write memory when its doorbell is rung")
    }

    /// Leaves an interrupt pending, for nothing is wired.
    pub fn raise(&mut self) -> Result<(), Stop> {
        self.need_ours()?;
        self.register(regs::CONTROL, regs::CONTROL_IRQ)?;
        self.register(regs::DOORBELL, 0)
    }

    /// Background DMA on at `rate` pages a second, 0 is off.
    pub fn background(&mut self, rate: u32) -> Result<(), Stop> {
        self.register(regs::DMA_RATE, rate)?;
        self.register(regs::CONTROL, if rate > 0 { regs::CONTROL_DMA } else { 0 })
    }

    /// How many pages the device wrote.
    pub fn completed(&self) -> Result<u32, Stop> {
        let mut word = [0; 4];
        let read = self.pci()?.region_read(REGION_BAR0, regs::COMPLETED, &mut word);
        refused("reading BAR 0", read)?;
        Ok(u32::from_le_bytes(word))
    }

    /// The memory as it is now.
    pub fn memory(&self) -> Result<Vec<u8>, Stop> {
        let mut bytes = vec![0; MEMORY_BYTES as usize];
        let read = match &self.memory {
            Some(memory) => memory.read_exact_at(&mut bytes, 0),
            None => Ok(()),
        };
        read.or_else(|error| skip(format!("reading the guest's memory: {error}")))?;
        Ok(bytes)
    }

    /// Takes the memory away.
    pub fn leave(&mut self) {
        if self.memory.take().is_some()
            && let Some(pci) = &self.pci
        {
            // A device that is gone has forgotten it already.
            let _ = pci.dma_unmap(MEMORY_IOVA, MEMORY_BYTES);
        }
    }

    fn pci(&self) -> Result<&Arc<dyn PciFunction>, Stop> {
        self.pci.as_ref().map_or_else(|| skip("the device's regions cannot be reached"), Ok)
    }

    fn register(&self, offset: u64, value: u32) -> Result<(), Stop> {
        self.put(REGION_BAR0, offset, &value.to_le_bytes())
    }

    fn put(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Stop> {
        refused("a region write", self.pci()?.region_write(region, offset, data))
    }
}

fn refused<T>(what: &str, result: DeviceResult<T>) -> Result<T, Stop> {
    result.or_else(|error| match error {
        gone if gone.is_gone() => fail(format!("an answer to {what}"), gone.to_string()),
        late @ vfio_migration::DeviceError::TimedOut { .. } => {
            fail(format!("{what} returns"), late.to_string())
        }
        other => skip(format!("{what} failed: {other}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reinit_write_has_three_numbers() {
        let write = ReinitWrite { region: 2, offset: 0x14, value: 7 };
        assert_eq!(ReinitWrite::parse("2:0x14:7"), Ok(write));
        for text in ["", "0:1", "0:1:2:3", "6:0:0", "0:x:1", "0:0:0x100000000", "-1:0:0"] {
            assert!(ReinitWrite::parse(text).is_err(), "{text}");
        }
    }
}
