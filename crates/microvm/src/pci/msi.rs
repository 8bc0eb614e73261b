//! The MSI capability (PCI Local Bus 3.0, section 6.8.1), emulated in configuration space.

use crate::body::MsiMessage;

/// Shape of the capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiLayout {
    /// Offset of the capability in configuration space.
    pub capability: u8,
    /// Log2 of the vectors the function asks for.
    pub vectors_log2: u8,
    /// The message address has 64 bits.
    pub wide: bool,
    /// There are mask and pending bits per vector.
    pub maskable: bool,
}

impl MsiLayout {
    /// Reads the capability at `offset` of `config`.
    pub fn parse(config: &[u8; 256], offset: u8) -> Result<Self, String> {
        let at = usize::from(offset);
        let control = config.get(at + 2..at + 4).map_or(0, |c| u16::from_le_bytes([c[0], c[1]]));
        let layout = Self {
            capability: offset,
            vectors_log2: (control >> 1 & 7) as u8,
            wide: control & 1 << 7 != 0,
            maskable: control & 1 << 8 != 0,
        };
        if layout.vectors_log2 > 5 {
            return Err("the MSI capability asks for a reserved number of vectors".into());
        }
        if at + layout.len_bytes() > config.len() {
            return Err(format!("the MSI capability at {offset:#x} does not fit"));
        }
        Ok(layout)
    }

    /// Length of the capability in bytes.
    pub fn len_bytes(&self) -> usize {
        match (self.wide, self.maskable) {
            (false, false) => 10,
            (true, false) => 14,
            (false, true) => 20,
            (true, true) => 24,
        }
    }

    /// Number of vectors the function has.
    pub fn vectors(&self) -> usize {
        1 << self.vectors_log2
    }

    fn at(&self, offset: usize) -> usize {
        usize::from(self.capability) + offset
    }

    fn data_offset(&self) -> usize {
        self.at(if self.wide { 12 } else { 8 })
    }

    fn mask_offset(&self) -> usize {
        self.at(if self.wide { 16 } else { 12 })
    }

    /// Marks what the guest can write.
    pub fn set_writable(&self, writable: &mut [u8; 256]) {
        let mut set =
            |at: usize, bytes: &[u8]| writable[at..][..bytes.len()].copy_from_slice(bytes);
        set(self.at(2), &[0x71]);
        set(self.at(4), &[0xfc, 0xff, 0xff, 0xff]);
        if self.wide {
            set(self.at(8), &[0xff; 4]);
        }
        set(self.data_offset(), &[0xff; 2]);
        if self.maskable {
            set(self.mask_offset(), &self.all_vectors().to_le_bytes());
        }
    }

    fn all_vectors(&self) -> u32 {
        ((1u64 << self.vectors()) - 1) as u32
    }

    /// The guest turned MSI on.
    pub fn is_enabled(&self, config: &[u8; 256]) -> bool {
        config[self.at(2)] & 1 != 0
    }

    /// The message of `vector`; `None` while it is masked or not among the vectors turned on.
    pub fn message(&self, config: &[u8; 256], vector: usize) -> Option<MsiMessage> {
        let on_log2 = (config[self.at(2)] >> 4 & 7).min(self.vectors_log2);
        let on = 1u32 << on_log2;
        let masked = self.maskable && dword(config, self.mask_offset()) >> (vector & 31) & 1 != 0;
        if vector as u32 >= on || masked {
            return None;
        }
        let high = if self.wide { dword(config, self.at(8)) } else { 0 };
        let addr = u64::from(high) << 32 | u64::from(dword(config, self.at(4)) & !3);
        let data = u32::from(u16::from_le_bytes([
            config[self.data_offset()],
            config[self.data_offset() + 1],
        ]));
        Some(MsiMessage { addr, data: data & !(on - 1) | vector as u32 })
    }

    /// Shows `pending` to the guest.
    pub fn set_pending(&self, config: &mut [u8; 256], pending: u32) {
        if self.maskable {
            config[self.mask_offset() + 4..][..4].copy_from_slice(&pending.to_le_bytes());
        }
    }

    /// The pending bits lie in `[offset, offset + len)`.
    pub fn has_pending_at(&self, offset: usize, len: usize) -> bool {
        let pending = self.mask_offset() + 4;
        self.maskable && offset < pending + 4 && offset + len > pending
    }
}

fn dword(config: &[u8; 256], at: usize) -> u32 {
    config.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(control: u16) -> [u8; 256] {
        let mut config = [0; 256];
        config[0x50] = super::super::capability::ID_MSI;
        config[0x52..0x54].copy_from_slice(&control.to_le_bytes());
        config
    }

    #[test]
    fn layouts_have_the_lengths_of_the_specification() {
        for (control, len) in [(0, 10), (1 << 7, 14), (1 << 8, 20), (1 << 7 | 1 << 8, 24)] {
            assert_eq!(MsiLayout::parse(&config(control), 0x50).unwrap().len_bytes(), len);
        }
        assert!(MsiLayout::parse(&config(6 << 1), 0x50).is_err());
        assert!(MsiLayout::parse(&config(1 << 7), 0xf8).is_err());
    }

    #[test]
    fn vectors_share_a_message_and_differ_in_the_low_bits() {
        let mut config = config(2 << 1 | 1 << 7 | 1 << 8);
        let msi = MsiLayout::parse(&config, 0x50).unwrap();
        config[0x52] |= 1 | 2 << 4;
        config[0x54..0x58].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
        config[0x58] = 1;
        config[0x5c] = 0x43;
        let message =
            |addr_high: u64, data| Some(MsiMessage { addr: addr_high << 32 | 0xfee0_0000, data });
        assert_eq!(msi.message(&config, 0), message(1, 0x40));
        assert_eq!(msi.message(&config, 3), message(1, 0x43));
        assert_eq!(msi.message(&config, 4), None);
        config[0x60] = 0b1000;
        assert_eq!(msi.message(&config, 3), None);
        config[0x52] &= !0x70;
        assert_eq!(msi.message(&config, 1), None);
        assert_eq!(msi.message(&config, 0), message(1, 0x43));
    }

    #[test]
    fn more_vectors_than_the_function_has_are_never_on() {
        let mut config = config(1 << 1);
        let msi = MsiLayout::parse(&config, 0x50).unwrap();
        config[0x52] |= 1 | 5 << 4;
        assert!(msi.message(&config, 1).is_some());
        assert_eq!(msi.message(&config, 2), None);
    }
}
