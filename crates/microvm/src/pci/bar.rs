//! Base address registers: their shape, their power-on addresses, and which of them an access hits.

use std::ops::Range;

use vfio_migration::PciFunctionInfo;
use vfio_migration::pci::{REGION_BAR0, REGION_ROM};

/// Configuration offset of BAR 0.
pub const BAR0_OFFSET: usize = 0x10;
/// Number of BAR registers.
pub const BAR_COUNT: usize = 6;

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next register too.
    Memory64,
    /// I/O ports.
    Io,
}

/// One BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bar {
    /// Register number and region index.
    pub index: u8,
    /// Size in bytes, a power of two. A region that is not one is padded.
    pub size: u64,
    /// What it decodes.
    pub kind: BarKind,
    /// The low bits of the register, as the device has them.
    pub flags: u8,
}

impl Bar {
    /// Configuration offset of the register.
    pub fn offset(&self) -> usize {
        BAR0_OFFSET + 4 * usize::from(self.index)
    }

    /// Length of the register in bytes.
    pub fn register_len(&self) -> usize {
        if self.kind == BarKind::Memory64 { 8 } else { 4 }
    }

    /// Bits of the register that the guest can set.
    pub fn writable(&self) -> u64 {
        let mask = !(self.size - 1);
        match self.kind {
            BarKind::Memory64 => mask,
            BarKind::Memory32 => mask & 0xffff_ffff,
            // Ports have 16 bits; the upper half reads as written, as hardware does.
            BarKind::Io => mask & 0xffff_ffff,
        }
    }

    /// The address in `config`.
    pub fn address(&self, config: &[u8; 256]) -> u64 {
        let mut raw = [0; 8];
        let len = self.register_len();
        raw[..len].copy_from_slice(&config[self.offset()..][..len]);
        u64::from_le_bytes(raw) & self.writable()
    }

    /// Sets the address in `config`.
    pub fn set_address(&self, config: &mut [u8; 256], address: u64) {
        let raw = ((address & self.writable()) | u64::from(self.flags)).to_le_bytes();
        let len = self.register_len();
        config[self.offset()..][..len].copy_from_slice(&raw[..len]);
    }
}

/// Reads the BARs of a function from its regions and its configuration space.
pub fn parse(config: &[u8; 256], info: &PciFunctionInfo) -> Result<Vec<Bar>, String> {
    let mut bars = Vec::new();
    let mut index = REGION_BAR0;
    while index < REGION_ROM {
        let size = info.regions.get(index as usize).map_or(0, |region| region.size);
        let offset = BAR0_OFFSET + 4 * index as usize;
        let low = config[offset];
        if size == 0 {
            index += 1;
            continue;
        }
        let (kind, flags, size_min) = match (low & 1, low & 6) {
            (1, _) => (BarKind::Io, low & 3, 4),
            (_, 4) => (BarKind::Memory64, low & 0xf, 16),
            (_, 0) => (BarKind::Memory32, low & 0xf, 16),
            _ => return Err(format!("BAR {index} has the reserved type {:#x}", low & 0xf)),
        };
        let size_max = match kind {
            BarKind::Io => 256,
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 => 1 << 40,
        };
        if size > size_max {
            return Err(format!("BAR {index} of {size:#x} bytes: at most {size_max:#x} fit"));
        }
        let size = size.max(size_min).next_power_of_two();
        if kind == BarKind::Memory64 {
            let next = info.regions.get(index as usize + 1).map_or(0, |region| region.size);
            if index + 1 == REGION_ROM || next != 0 {
                return Err(format!("BAR {index} has 64 bits and no register for the upper half"));
            }
        }
        bars.push(Bar { index: index as u8, size, kind, flags });
        index += if kind == BarKind::Memory64 { 2 } else { 1 };
    }
    Ok(bars)
}

/// Hands out power-on addresses, ascending and aligned to the size.
#[derive(Debug)]
pub struct Allocator {
    free: Range<u64>,
}

impl Allocator {
    /// Addresses from `window`.
    pub fn new(window: Range<u64>) -> Self {
        Self { free: window }
    }

    /// The next address for `size` bytes (a power of two), aligned to `size` and at least `align_min`.
    pub fn take(&mut self, size: u64, align_min: u64) -> Option<u64> {
        let start = self.free.start.checked_next_multiple_of(size.max(align_min))?;
        let end = start.checked_add(size)?;
        if end > self.free.end {
            return None;
        }
        self.free.start = end;
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration::RegionInfo;

    use super::*;

    fn info(sizes: &[u64]) -> PciFunctionInfo {
        let regions = sizes.iter().map(|&size| RegionInfo { size, ..Default::default() }).collect();
        PciFunctionInfo { regions, irqs: Vec::new(), reset: true }
    }

    #[test]
    fn bars_follow_regions_and_register_types() {
        let mut config = [0; 256];
        config[0x14] = 0x0c; // BAR 1: 64 bit, prefetchable
        config[0x1c] = 0x01; // BAR 3: ports
        let bars = parse(&config, &info(&[4096, 1 << 33, 0, 32, 5000, 0])).unwrap();
        let shape: Vec<_> = bars.iter().map(|b| (b.index, b.kind, b.size)).collect();
        assert_eq!(
            shape,
            [
                (0, BarKind::Memory32, 4096),
                (1, BarKind::Memory64, 1 << 33),
                (3, BarKind::Io, 32),
                (4, BarKind::Memory32, 8192),
            ]
        );
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut reserved = [0; 256];
        reserved[0x10] = 0x06;
        assert!(parse(&reserved, &info(&[4096])).unwrap_err().contains("reserved"));
        let mut wide = [0; 256];
        wide[0x10] = 0x04;
        assert!(parse(&wide, &info(&[4096, 4096])).unwrap_err().contains("upper half"));
        let mut last = [0; 256];
        last[0x24] = 0x04;
        assert!(parse(&last, &info(&[0, 0, 0, 0, 0, 4096])).is_err());
        assert!(parse(&[0; 256], &info(&[u64::MAX])).is_err());
    }

    #[test]
    fn addresses_are_aligned_to_the_size_and_end_with_the_window() {
        let mut allocator = Allocator::new(0xc000_0000..0xc010_0000);
        assert_eq!(allocator.take(16, 4096), Some(0xc000_0000));
        assert_eq!(allocator.take(0x8000, 4096), Some(0xc000_8000));
        assert_eq!(allocator.take(4096, 4096), Some(0xc001_0000));
        assert_eq!(allocator.take(1 << 20, 4096), None);
        assert_eq!(allocator.take(1 << 63, 4096), None);
    }
}
