//! The workload's driver (docs/workload.md): programs devices over the bus, as the KVM guest's does.
//!
//! What it knows of each device lies in guest memory, so it is there after a migration like everything
//! else the guest remembers.

use crate::body::GuestBus;
use crate::layout::{MMIO_START, PCI_CONFIG_ADDRESS_PORT, PCI_CONFIG_DATA_PORT};
use crate::process::interrupts::VECTOR_INTX;
use crate::process::view::View;
use crate::workload::{DEVICE_ID, DEVICE_MAGIC, StartPage, WORKLOAD_DEVICES_MAX};

/// First vector of MSI-X: 4 for each device.
pub const VECTOR_MSIX: u8 = 0x40;
/// MSI-X vectors of a device.
pub const VECTORS: u32 = 4;

/// Where the driver keeps its devices: 32 bytes each, as slot, offsets of the MSI-X and PCI Express
/// capabilities, DMA rate, all u32.
const DEVICES: u64 = 0x3_1000;
const RECORD_BYTES: u64 = 32;
const SLOTS: u32 = 32;

const REG_ID: u64 = 0x00;
const REG_CONTROL: u64 = 0x08;
const REG_STATUS: u64 = 0x0c;
const REG_CONFIG_KIB: u64 = 0x10;
const REG_CONFIG_GEN: u64 = 0x14;
const REG_CONFIG_ACK: u64 = 0x18;
const REG_DMA_LO: u64 = 0x1c;
const REG_DMA_HI: u64 = 0x20;
const REG_DMA_PAGES: u64 = 0x24;
const REG_DMA_RATE: u64 = 0x28;
const REG_DOORBELL: u64 = 0x2c;
const REG_VECTOR: u64 = 0x38;
const REG_FILL_KIB: u64 = 0x40;

const STATUS_INTX: u32 = 1 << 2;
const CONTROL_DMA: u32 = 1 << 0;
const CONTROL_INTERRUPTS: u32 = 1 << 1;

const COMMAND: u32 = 0x04;
const COMMAND_ON: u16 = 0x0006;
const COMMAND_ON_WITHOUT_INTX: u16 = 0x0406;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_EXPRESS: u8 = 0x10;
const MSIX_ENABLE: u16 = 0x8000;
const INITIATE_FLR: u16 = 0x8000;

/// The driver's view of the machine.
#[derive(Clone, Copy)]
pub struct Driver<'a> {
    /// Guest memory.
    pub view: &'a View,
    /// Where the devices are.
    pub bus: &'a dyn GuestBus,
}

/// One device that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    index: u32,
    slot: u32,
    msix: u32,
    express: u32,
    rate: u32,
}

impl Found {
    /// Its number, in slot order.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Address of BAR 0.
    fn registers(&self) -> u64 {
        MMIO_START + 0x1_0000 * u64::from(self.index)
    }

    /// Address of BAR 2, with the MSI-X table.
    fn table(&self) -> u64 {
        self.registers() + 0x1000
    }
}

impl Driver<'_> {
    /// Finds and sets up the devices of our kind on bus 0, in slot order; answers how many.
    pub fn find_devices(&self, start: &StartPage) -> u32 {
        let mut count = 0;
        for slot in 0..SLOTS {
            if count as usize == WORKLOAD_DEVICES_MAX {
                break;
            }
            if self.config_read(slot, 0) != DEVICE_ID {
                continue;
            }
            let capability = |id| self.find_capability(slot, id);
            let (msix, express) = (capability(CAPABILITY_MSIX), capability(CAPABILITY_EXPRESS));
            let found = Found { index: count, slot, msix, express, rate: start.dma_rate };
            self.store(&found);
            if self.set_up(&found, start) {
                count += 1;
            }
        }
        count
    }

    /// The record of device `index`.
    pub fn device(&self, index: u32) -> Found {
        let at = DEVICES + RECORD_BYTES * u64::from(index);
        let word = |i: u64| self.view.load_u32(at + 4 * i);
        Found { index, slot: word(0), msix: word(1), express: word(2), rate: word(3) }
    }

    /// The device of PCI slot `slot`, among the first `count`.
    pub fn in_slot(&self, slot: u32, count: u32) -> Option<Found> {
        (0..count).map(|index| self.device(index)).find(|found| found.slot == slot)
    }

    fn store(&self, found: &Found) {
        let at = DEVICES + RECORD_BYTES * u64::from(found.index);
        for (i, word) in (0..).zip([found.slot, found.msix, found.express, found.rate]) {
            self.view.store_u32(at + 4 * i, word);
        }
    }

    /// From reset to work; `false` if it does not answer.
    pub fn set_up(&self, found: &Found, start: &StartPage) -> bool {
        self.config_write(found.slot, 0x10, &(found.registers() as u32).to_le_bytes());
        self.config_write(found.slot, 0x18, &(found.table() as u32).to_le_bytes());
        self.config_write(found.slot, COMMAND, &COMMAND_ON_WITHOUT_INTX.to_le_bytes());
        if self.read(found, REG_ID) != DEVICE_MAGIC {
            return false;
        }
        for vector in 0..VECTORS {
            let entry = found.table() + 16 * u64::from(vector);
            let vcpu = vector % start.vcpus.max(1);
            let data = u32::from(VECTOR_MSIX) + VECTORS * found.index + vector;
            for (i, word) in (0..).zip([0xfee0_0000 | vcpu << 12, 0, data, 0]) {
                self.bus.mmio_write(entry + 4 * i, &word.to_le_bytes());
            }
        }
        self.config_write(found.slot, found.msix + 2, &MSIX_ENABLE.to_le_bytes());
        let ring_bytes = u64::from(start.ring_pages) << 12;
        let ring = start.ring_base.wrapping_add(ring_bytes * u64::from(found.index));
        self.write(found, REG_DMA_PAGES, start.ring_pages);
        self.write(found, REG_DMA_LO, ring as u32);
        self.write(found, REG_DMA_HI, (ring >> 32) as u32);
        self.apply_rate(found);
        true
    }

    fn apply_rate(&self, found: &Found) {
        self.write(found, REG_DMA_RATE, found.rate);
        let dma = if found.rate == 0 { 0 } else { CONTROL_DMA };
        self.write(found, REG_CONTROL, CONTROL_INTERRUPTS | dma);
    }

    /// The device's server is gone.
    pub fn is_gone(&self, found: &Found) -> bool {
        self.read(found, REG_ID) == u32::MAX
    }

    /// Starts a reconfiguration; [`generation`](Self::generation) tells when it is done.
    pub fn reconfigure(&self, found: &Found, generation: u32, kib: u32) {
        self.write(found, REG_CONFIG_KIB, kib);
        self.write(found, REG_CONFIG_GEN, generation);
    }

    /// The generation in force.
    pub fn generation(&self, found: &Found) -> u32 {
        self.read(found, REG_CONFIG_ACK)
    }

    /// `stamps` stamps, then an interrupt by `vector`.
    pub fn ring(&self, found: &Found, stamps: u32, vector: u32) {
        self.write(found, REG_VECTOR, vector);
        self.write(found, REG_DOORBELL, stamps);
    }

    /// Rewrites part of the bulk state.
    pub fn fill(&self, found: &Found, kib: u32) {
        self.write(found, REG_FILL_KIB, kib);
    }

    /// Masks or unmasks a vector in the table.
    pub fn mask(&self, found: &Found, vector: u32, masked: bool) {
        let control = found.table() + 16 * u64::from(vector) + 12;
        self.bus.mmio_write(control, &u32::from(masked).to_le_bytes());
    }

    /// Background DMA, remembered for the next set-up.
    pub fn set_rate(&self, found: &Found, rate: u32) {
        let found = Found { rate, ..*found };
        self.store(&found);
        self.apply_rate(&found);
    }

    /// MSI-X or INTx.
    pub fn set_mode(&self, found: &Found, msix: bool) {
        let (control, command) =
            if msix { (MSIX_ENABLE, COMMAND_ON_WITHOUT_INTX) } else { (0, COMMAND_ON) };
        self.config_write(found.slot, found.msix + 2, &control.to_le_bytes());
        self.config_write(found.slot, COMMAND, &command.to_le_bytes());
    }

    /// Starts a function-level reset. The device may take 100 ms.
    pub fn reset(&self, found: &Found) {
        self.config_write(found.slot, found.express + 8, &INITIATE_FLR.to_le_bytes());
    }

    /// Lowers the INTx line.
    pub fn lower_intx(&self, found: &Found) {
        self.write(found, REG_STATUS, STATUS_INTX);
    }

    fn read(&self, found: &Found, register: u64) -> u32 {
        let mut word = [0xff; 4];
        self.bus.mmio_read(found.registers() + register, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, found: &Found, register: u64, value: u32) {
        self.bus.mmio_write(found.registers() + register, &value.to_le_bytes());
    }

    fn find_capability(&self, slot: u32, id: u8) -> u32 {
        let mut at = self.config_read(slot, 0x34) & 0xfc;
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let word = self.config_read(slot, at);
            if word as u8 == id {
                return at;
            }
            at = word >> 8 & 0xfc;
        }
        0
    }

    fn select(&self, slot: u32, at: u32) -> u16 {
        let address = 1 << 31 | slot << 11 | (at & 0xfc);
        self.bus.port_write(PCI_CONFIG_ADDRESS_PORT, &address.to_le_bytes());
        PCI_CONFIG_DATA_PORT + (at & 3) as u16
    }

    fn config_read(&self, slot: u32, at: u32) -> u32 {
        let port = self.select(slot, at & !3);
        let mut word = [0xff; 4];
        self.bus.port_read(port, &mut word);
        u32::from_le_bytes(word)
    }

    fn config_write(&self, slot: u32, at: u32, data: &[u8]) {
        let port = self.select(slot, at);
        self.bus.port_write(port, data);
    }
}

/// What an interrupt vector stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The line of a PCI slot.
    Intx {
        /// The slot.
        slot: u32,
    },
    /// An MSI-X vector.
    Msix {
        /// Device index.
        device: u32,
        /// Vector of the device.
        vector: u32,
    },
}

impl Source {
    /// Who raises `vector`; `None` for a vector nobody was given.
    pub fn of(vector: u32) -> Option<Self> {
        let devices = WORKLOAD_DEVICES_MAX as u32;
        if let Some(line) = vector.checked_sub(u32::from(VECTOR_INTX)).filter(|&l| l < devices) {
            return Some(Self::Intx { slot: line + 1 });
        }
        let number = vector.checked_sub(u32::from(VECTOR_MSIX))?;
        (number < VECTORS * devices)
            .then_some(Self::Msix { device: number / VECTORS, vector: number % VECTORS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_name_their_source() {
        for (vector, source) in [
            (0x37, None),
            (0x38, Some(Source::Intx { slot: 1 })),
            (0x3f, Some(Source::Intx { slot: 8 })),
            (0x40, Some(Source::Msix { device: 0, vector: 0 })),
            (0x5f, Some(Source::Msix { device: 7, vector: 3 })),
            (0x60, None),
            (0xff, None),
        ] {
            assert_eq!(Source::of(vector), source, "{vector:#x}");
        }
    }
}
