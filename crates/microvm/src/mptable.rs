//! A MultiProcessor table (Intel MultiProcessor Specification 1.4), for kernels that look for their vCPUs
//! and interrupt lines in one. It lies in the last KiB of conventional memory, which the memory map keeps
//! reserved.
//!
//! ```text
//!   vCPU n = LAPIC n     IOAPIC: the id behind them      PCI bus 0, ISA bus 1
//!   ISA IRQ n -> pin n, but IRQ 0 -> pin 2               slot s INTA -> its own pin of 16 to 23
//! ```

use migration::{GuestMemory, MemoryError};

use crate::layout::{DEVICES_MAX, FIRST_DEVICE_SLOT, IOAPIC_ADDR, LAPIC_ADDR, intx_gsi};

/// Where the floating pointer lies: the start of the EBDA.
pub(crate) const MP_TABLE_ADDR: u64 = 0x9_fc00;
const POINTER_BYTES: usize = 16;
/// vCPUs that have room in the table; a kernel finds no others.
const PROCESSORS_MAX: u32 = 16;

const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
/// Polarity and trigger as the bus has them.
const AS_BUS: u16 = 0;
/// Active high, level-triggered: how KVM's lines are.
const LEVEL_HIGH: u16 = 0xd;

/// Writes the table for `vcpus` vCPUs.
pub(crate) fn write(vcpus: u32, memory: &GuestMemory) -> Result<(), MemoryError> {
    let table = table(vcpus.min(PROCESSORS_MAX));
    let mut pointer = [0u8; POINTER_BYTES];
    pointer[..4].copy_from_slice(b"_MP_");
    let table_addr = MP_TABLE_ADDR as u32 + POINTER_BYTES as u32;
    pointer[4..8].copy_from_slice(&table_addr.to_le_bytes());
    pointer[8] = 1; // length in paragraphs
    pointer[9] = 4; // version 1.4
    set_checksum(&mut pointer, 10);
    memory.write(MP_TABLE_ADDR, &pointer)?;
    memory.write(table_addr.into(), &table)
}

fn table(vcpus: u32) -> Vec<u8> {
    let ioapic_id = vcpus as u8;
    let mut entries = Vec::new();
    for vcpu in 0..vcpus as u8 {
        let flags = if vcpu == 0 { 3 } else { 1 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[0, vcpu, APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes()); // FPU, APIC
        entries.push(entry.to_vec());
    }
    let bus = |id, name: &[u8; 6]| {
        let mut entry = vec![1, id];
        entry.extend_from_slice(name);
        entry
    };
    entries.push(bus(PCI_BUS, b"PCI   "));
    entries.push(bus(ISA_BUS, b"ISA   "));
    let mut ioapic = vec![2, ioapic_id, IOAPIC_VERSION, 1];
    ioapic.extend_from_slice(&(IOAPIC_ADDR as u32).to_le_bytes());
    entries.push(ioapic);

    let line = |kind, flags: u16, bus, irq, to, pin| {
        let [low, high] = flags.to_le_bytes();
        vec![3, kind, low, high, bus, irq, to, pin]
    };
    for irq in (0..16u8).filter(|irq| *irq != 2) {
        let pin = if irq == 0 { 2 } else { irq };
        entries.push(line(INTERRUPT, AS_BUS, ISA_BUS, irq, ioapic_id, pin));
    }
    for slot in FIRST_DEVICE_SLOT..FIRST_DEVICE_SLOT + DEVICES_MAX as u8 {
        let pin = intx_gsi(slot) as u8;
        entries.push(line(INTERRUPT, LEVEL_HIGH, PCI_BUS, slot << 2, ioapic_id, pin));
    }
    // The PICs reach the first vCPU at LINT0, NMI all of them at LINT1.
    for (kind, to, pin) in [(EXTERNAL, 0, 0), (NMI, 0xff, 1)] {
        entries.push(vec![4, kind, 0, 0, ISA_BUS, 0, to, pin]);
    }
    let mut table = header(&entries);
    table.extend(entries.into_iter().flatten());
    set_checksum(&mut table, 7);
    table
}

fn header(entries: &[Vec<u8>]) -> Vec<u8> {
    const HEADER_BYTES: usize = 44;
    let bytes: usize = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    let mut header = b"PCMP".to_vec();
    header.extend_from_slice(&(bytes as u16).to_le_bytes());
    header.extend_from_slice(&[4, 0]); // version 1.4, checksum
    header.extend_from_slice(b"VMFERRY microvm     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    header.extend_from_slice(&(LAPIC_ADDR as u32).to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header
}

/// Makes the sum of all bytes 0.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

#[cfg(test)]
mod tests {
    use migration::RegionLayout;

    use super::*;

    /// Room for it: what conventional memory leaves below 640 KiB.
    const ROOM_BYTES: usize = 0x400;

    #[test]
    fn the_table_is_found_and_sums_to_zero() {
        for vcpus in [1, 2, 16, 200] {
            let memory = GuestMemory::new(&[RegionLayout { gpa: 0, len: 1 << 20 }]).unwrap();
            write(vcpus, &memory).unwrap();
            let mut room = vec![0; ROOM_BYTES];
            memory.read(MP_TABLE_ADDR, &mut room).unwrap();
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(&room[..4], b"_MP_");
            assert_eq!(sum(&room[..POINTER_BYTES]), 0);
            let table = &room[POINTER_BYTES..];
            assert_eq!(&table[..4], b"PCMP");
            let bytes = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert!(POINTER_BYTES + bytes <= ROOM_BYTES, "{bytes}");
            assert_eq!(sum(&table[..bytes]), 0);

            // Its entries, walked as a kernel does.
            let mut rest = &table[44..bytes];
            let mut kinds = [0; 5];
            while let Some(kind) = rest.first() {
                kinds[usize::from(*kind)] += 1;
                rest = &rest[if *kind == 0 { 20 } else { 8 }..];
            }
            assert_eq!(kinds, [vcpus.min(16) as usize, 2, 1, 15 + DEVICES_MAX, 2]);
        }
    }

    #[test]
    fn device_lines_are_the_ones_devices_raise() {
        let table = table(1);
        let entry = [3, INTERRUPT, 0xd, 0, PCI_BUS, 2 << 2, 1, intx_gsi(2) as u8];
        assert!(table.windows(8).any(|window| window == entry));
    }
}
