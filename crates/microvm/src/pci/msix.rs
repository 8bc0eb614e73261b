//! The MSI-X table and pending-bit array that the VMM keeps in the device's stead (PCI Local Bus 3.0,
//! section 6.8.2). Accesses to that part of a BAR never reach the device.

use crate::body::MsiMessage;

/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;

/// Where table and pending bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsixLayout {
    /// Offset of the capability in configuration space.
    pub capability: u8,
    /// Number of vectors.
    pub vectors: u16,
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in its BAR.
    pub table_offset: u64,
    /// BAR of the pending bits.
    pub pba_bar: u8,
    /// Offset of the pending bits in their BAR.
    pub pba_offset: u64,
}

impl MsixLayout {
    /// Reads the capability at `offset` of `config`.
    pub fn parse(config: &[u8; 256], offset: u8) -> Result<Self, String> {
        let at = usize::from(offset);
        let Some(capability) = config.get(at..at + 12) else {
            return Err(format!("the MSI-X capability at {offset:#x} does not fit"));
        };
        let dword = |i: usize| {
            u32::from_le_bytes([
                capability[i],
                capability[i + 1],
                capability[i + 2],
                capability[i + 3],
            ])
        };
        let control = u16::from_le_bytes([capability[2], capability[3]]);
        let (table, pba) = (dword(4), dword(8));
        let layout = Self {
            capability: offset,
            vectors: (control & 0x7ff) + 1,
            table_bar: (table & 7) as u8,
            table_offset: u64::from(table & !7),
            pba_bar: (pba & 7) as u8,
            pba_offset: u64::from(pba & !7),
        };
        if layout.table_bar > 5 || layout.pba_bar > 5 {
            return Err("the MSI-X table lies in a reserved BAR".into());
        }
        let (table, pba) = (layout.table_range(), layout.pba_range());
        if layout.table_bar == layout.pba_bar && table.start < pba.end && pba.start < table.end {
            return Err("the MSI-X table and its pending bits overlap".into());
        }
        Ok(layout)
    }

    fn table_range(&self) -> std::ops::Range<u64> {
        self.table_offset..self.table_offset + ENTRY_BYTES * u64::from(self.vectors)
    }

    fn pba_range(&self) -> std::ops::Range<u64> {
        self.pba_offset..self.pba_offset + 8 * u64::from(self.vectors).div_ceil(64)
    }

    /// What an access of `len` bytes at `offset` of BAR `bar` touches.
    pub fn hit(&self, bar: u8, offset: u64, len: u64) -> Hit {
        let end = offset.saturating_add(len);
        let touches = |range: &std::ops::Range<u64>| offset < range.end && end > range.start;
        let table = self.table_range();
        if bar == self.table_bar && touches(&table) {
            return match offset.checked_sub(table.start) {
                Some(inside) if end <= table.end => Hit::Table(inside),
                _ => Hit::Straddles,
            };
        }
        let pba = self.pba_range();
        if bar == self.pba_bar && touches(&pba) {
            return match offset.checked_sub(pba.start) {
                Some(inside) if end <= pba.end => Hit::Pending(inside),
                _ => Hit::Straddles,
            };
        }
        Hit::Device
    }
}

/// What a BAR access touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hit {
    /// The device's own registers.
    Device,
    /// The table, at this offset in it.
    Table(u64),
    /// The pending bits, at this offset in them.
    Pending(u64),
    /// Table or pending bits and something else: undefined by the specification.
    Straddles,
}

/// A table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The message.
    pub message: MsiMessage,
    /// Bit 0 of vector control.
    pub masked: bool,
}

impl Default for Entry {
    /// As after a reset: masked.
    fn default() -> Self {
        Self { message: MsiMessage::default(), masked: true }
    }
}

impl Entry {
    fn dword(&self, index: u64) -> u32 {
        match index {
            0 => self.message.addr as u32,
            1 => (self.message.addr >> 32) as u32,
            2 => self.message.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_dword(&mut self, index: u64, value: u32) {
        let addr = self.message.addr;
        match index {
            0 => self.message.addr = (addr & !0xffff_ffff) | u64::from(value & !3),
            1 => self.message.addr = (addr & 0xffff_ffff) | u64::from(value) << 32,
            2 => self.message.data = value,
            _ => self.masked = value & 1 != 0,
        }
    }
}

/// Reads the table; aligned accesses of 4 or 8 bytes, anything else gives all ones.
pub fn read_table(entries: &[Entry], offset: u64, data: &mut [u8]) {
    data.fill(0xff);
    if !is_valid_access(offset, data.len()) {
        return;
    }
    let Some(entry) = entries.get((offset / ENTRY_BYTES) as usize) else { return };
    let first = offset % ENTRY_BYTES / 4;
    for (index, chunk) in (first..).zip(data.chunks_exact_mut(4)) {
        chunk.copy_from_slice(&entry.dword(index).to_le_bytes());
    }
}

/// Writes the table and answers which vector was touched; other accesses than aligned ones of 4 or 8
/// bytes are ignored.
pub fn write_table(entries: &mut [Entry], offset: u64, data: &[u8]) -> Option<usize> {
    if !is_valid_access(offset, data.len()) {
        return None;
    }
    let vector = (offset / ENTRY_BYTES) as usize;
    let entry = entries.get_mut(vector)?;
    let first = offset % ENTRY_BYTES / 4;
    for (index, chunk) in (first..).zip(data.as_chunks::<4>().0) {
        entry.set_dword(index, u32::from_le_bytes(*chunk));
    }
    Some(vector)
}

/// Reads the pending bits of `vectors` vectors.
pub fn read_pending(vectors: usize, pending: impl Fn(usize) -> bool, offset: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(offset..) {
        let first = at as usize * 8;
        *byte = (0..8)
            .filter(|bit| first + bit < vectors && pending(first + bit))
            .fold(0, |byte, bit| byte | 1 << bit);
    }
}

fn is_valid_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> MsixLayout {
        MsixLayout {
            capability: 0x40,
            vectors: 4,
            table_bar: 2,
            table_offset: 0,
            pba_bar: 2,
            pba_offset: 0x800,
        }
    }

    #[test]
    fn the_capability_names_table_and_pending_bits() {
        let mut config = [0; 256];
        config[0x40] = super::super::capability::ID_MSIX;
        config[0x42] = 3;
        config[0x44] = 2;
        config[0x48..0x4a].copy_from_slice(&0x0802u16.to_le_bytes());
        assert_eq!(MsixLayout::parse(&config, 0x40).unwrap(), layout());
        config[0x48..0x4a].copy_from_slice(&0x0032u16.to_le_bytes());
        assert!(MsixLayout::parse(&config, 0x40).unwrap_err().contains("overlap"));
        config[0x44] = 7;
        assert!(MsixLayout::parse(&config, 0x40).unwrap_err().contains("reserved"));
        assert!(MsixLayout::parse(&config, 0xf8).is_err());
    }

    #[test]
    fn only_table_and_pending_bits_are_taken_from_the_bar() {
        let layout = layout();
        for (bar, offset, len, expected) in [
            (2, 0, 4, Hit::Table(0)),
            (2, 60, 4, Hit::Table(60)),
            (2, 64, 4, Hit::Device),
            (2, 60, 8, Hit::Straddles),
            (2, 0x800, 8, Hit::Pending(0)),
            (2, 0x7fc, 8, Hit::Straddles),
            (2, 0x808, 4, Hit::Device),
            (0, 0, 4, Hit::Device),
        ] {
            assert_eq!(layout.hit(bar, offset, len), expected, "BAR {bar} {offset:#x}+{len}");
        }
    }

    #[test]
    fn entries_start_masked_and_keep_what_is_written() {
        let mut entries = [Entry::default(); 2];
        let mut dword = [0; 4];
        read_table(&entries, 28, &mut dword);
        assert_eq!(dword, [1, 0, 0, 0]);
        assert_eq!(write_table(&mut entries, 16, &0xfee0_1003_u32.to_le_bytes()), Some(1));
        assert_eq!(
            write_table(&mut entries, 24, &0x0000_0000_0000_0041_u64.to_le_bytes()),
            Some(1)
        );
        let message = MsiMessage { addr: 0xfee0_1000, data: 0x41 };
        assert_eq!(entries[1], Entry { message, masked: false });
        let mut qword = [0; 8];
        read_table(&entries, 16, &mut qword);
        assert_eq!(u64::from_le_bytes(qword), 0xfee0_1000);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let mut entries = [Entry::default(); 2];
        for (offset, len) in [(0, 1), (2, 2), (2, 4), (4, 8), (32, 4), (0, 16)] {
            assert_eq!(write_table(&mut entries, offset, &vec![0; len]), None, "{offset}+{len}");
            let mut data = vec![0; len];
            read_table(&entries, offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0xff), "{offset}+{len}");
        }
        assert_eq!(entries, [Entry::default(); 2]);
    }

    #[test]
    fn pending_bits_are_one_per_vector() {
        let mut data = [0; 8];
        read_pending(12, |vector| [0, 9, 11, 12].contains(&vector), 0, &mut data);
        assert_eq!(data, [1, 0b1010, 0, 0, 0, 0, 0, 0]);
    }
}
