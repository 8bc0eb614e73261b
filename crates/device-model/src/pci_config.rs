//! Configuration space: 256 bytes with MSI-X and PCI Express capabilities.
//!
//! ```text
//!   0x00 type 0 header   0x40 MSI-X   0x50 PCI Express (endpoint, FLR)
//! ```
//!
//! The VMM shows the guest a space of its own and passes writes on; what matters here is bus mastering,
//! the INTx disable bit, MSI-X enable and function level reset.

use crate::regs;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const LATENCY: usize = 0x0d;
const BAR0: usize = 0x10;
const BAR2: usize = 0x18;
const INTERRUPT_LINE: usize = 0x3c;
/// Offset of the MSI-X capability.
const MSIX: usize = 0x40;
/// Offset of the PCI Express capability.
const EXPRESS: usize = 0x50;
const DEVICE_CONTROL: usize = EXPRESS + 8;

const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory space, bus master, parity response, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_FLR: u16 = 1 << 15;
const CAPABILITIES_FLR: u32 = 1 << 28;

/// What a write asks for beyond the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConfigEffect {
    None,
    /// Initiate Function Level Reset was written.
    FunctionLevelReset,
}

/// The space, with a mask of what a write changes.
#[derive(Clone, Debug)]
pub(crate) struct PciConfig {
    bytes: [u8; regs::CONFIG_SPACE_BYTES as usize],
    writable: [u8; regs::CONFIG_SPACE_BYTES as usize],
}

impl PciConfig {
    pub(crate) fn new() -> Self {
        let size = regs::CONFIG_SPACE_BYTES as usize;
        let mut config = Self { bytes: [0; 256], writable: [0; 256] };
        debug_assert_eq!(config.bytes.len(), size);
        config.set16(0x00, regs::VENDOR_ID, 0);
        config.set16(0x02, regs::DEVICE_ID, 0);
        config.set16(COMMAND, 0, COMMAND_WRITABLE);
        config.set16(STATUS, STATUS_CAPABILITIES, 0);
        config.set32(0x08, regs::CLASS_CODE << 8 | u32::from(regs::REVISION), 0);
        config.set8(CACHE_LINE, 0, 0xff);
        config.set8(LATENCY, 0, 0xff);
        config.set32(BAR0, 0, !(regs::BAR0_BYTES as u32 - 1));
        config.set32(BAR2, 0, !(regs::BAR2_BYTES as u32 - 1));
        config.set16(0x2c, regs::SUBSYSTEM_VENDOR_ID, 0);
        config.set16(0x2e, regs::SUBSYSTEM_ID, 0);
        config.set8(0x34, MSIX as u8, 0);
        config.set8(INTERRUPT_LINE, 0, 0xff);
        config.set8(0x3d, 1, 0);

        config.set8(MSIX, 0x11, 0);
        config.set8(MSIX + 1, EXPRESS as u8, 0);
        let table_size = regs::MSIX_VECTORS as u16 - 1;
        config.set16(MSIX + 2, table_size, MSIX_ENABLE | MSIX_FUNCTION_MASK);
        config.set32(MSIX + 4, regs::MSIX_TABLE_OFFSET as u32 | 2, 0);
        config.set32(MSIX + 8, regs::MSIX_PBA_OFFSET as u32 | 2, 0);

        config.set8(EXPRESS, 0x10, 0);
        config.set8(EXPRESS + 1, 0, 0);
        config.set16(EXPRESS + 2, 2, 0);
        config.set32(EXPRESS + 4, CAPABILITIES_FLR, 0);
        // Initiate FLR is written, acted on, and always reads 0.
        config.set16(DEVICE_CONTROL, 0, 0x7fff);
        config.set32(EXPRESS + 0x0c, 0x0000_0411, 0);
        config.set16(EXPRESS + 0x12, 0x0011, 0);
        config
    }

    fn set8(&mut self, at: usize, value: u8, writable: u8) {
        self.bytes[at] = value;
        self.writable[at] = writable;
    }

    fn set16(&mut self, at: usize, value: u16, writable: u16) {
        let [low, high] = value.to_le_bytes();
        let [low_mask, high_mask] = writable.to_le_bytes();
        self.set8(at, low, low_mask);
        self.set8(at + 1, high, high_mask);
    }

    fn set32(&mut self, at: usize, value: u32, writable: u32) {
        self.set16(at, value as u16, writable as u16);
        self.set16(at + 2, (value >> 16) as u16, (writable >> 16) as u16);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Reads inside the space; `false` where the access leaves it.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Some(range) = range(offset, data.len()) else { return false };
        data.copy_from_slice(&self.bytes[range]);
        true
    }

    /// Writes what is writable; `None` where the access leaves the space.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<ConfigEffect> {
        let range = range(offset, data.len())?;
        let mut effect = ConfigEffect::None;
        for (at, value) in range.zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
            let [_, flr] = CONTROL_FLR.to_le_bytes();
            if at == DEVICE_CONTROL + 1 && value & flr != 0 {
                effect = ConfigEffect::FunctionLevelReset;
            }
        }
        Some(effect)
    }

    pub(crate) fn bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    pub(crate) fn intx_disabled(&self) -> bool {
        self.word(COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    pub(crate) fn msix_enabled(&self) -> bool {
        self.word(MSIX + 2) & MSIX_ENABLE != 0
    }
}

fn range(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(len)?;
    (end <= regs::CONFIG_SPACE_BYTES as usize).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read32(config: &PciConfig, at: u64) -> u32 {
        let mut bytes = [0; 4];
        assert!(config.read(at, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_capability_list_has_msix_and_express_with_flr() {
        let config = PciConfig::new();
        let mut at = read32(&config, 0x34) as u8;
        let mut ids = Vec::new();
        while at != 0 {
            let head = read32(&config, at.into());
            ids.push(head as u8);
            at = (head >> 8) as u8;
        }
        assert_eq!(ids, [0x11, 0x10]);
        assert_eq!(read32(&config, 0x40) >> 16 & 0x7ff, regs::MSIX_VECTORS - 1);
        assert_ne!(read32(&config, 0x54) & CAPABILITIES_FLR, 0);
    }

    #[test]
    fn bars_answer_the_sizing_write() {
        for (at, size) in [(0x10, 0xffff_f000), (0x14, 0), (0x18, 0xffff_f000), (0x24, 0)] {
            let mut config = PciConfig::new();
            assert_eq!(config.write(at, &[0xff; 4]), Some(ConfigEffect::None));
            assert_eq!(read32(&config, at), size, "at {at:#x}");
        }
    }

    #[test]
    fn read_only_bytes_stay_and_flr_is_seen_and_reads_zero() {
        let mut config = PciConfig::new();
        let before = read32(&config, 0);
        config.write(0, &[0xff; 4]).unwrap();
        assert_eq!(read32(&config, 0), before);
        assert_eq!(config.write(0x59, &[0x80]), Some(ConfigEffect::FunctionLevelReset));
        assert_eq!(read32(&config, 0x58) & 0x8000, 0);
    }

    #[test]
    fn accesses_stay_inside() {
        let mut config = PciConfig::new();
        for (offset, len) in [(253, 4), (256, 1), (u64::MAX, 2)] {
            assert!(!config.read(offset, &mut vec![0; len]));
            assert_eq!(config.write(offset, &vec![0; len]), None);
        }
    }
}
