//! The machine's guest-visible addresses. Changing one of them changes [`MACHINE_VERSION`].
//!
//! ```text
//!  0                    RAM
//!  0xc000_0000 (3 GiB)  PCI memory window: BARs
//!  0xfec0_0000          IOAPIC, LAPIC (0xfee0_0000), what KVM needs for itself
//!  0x1_0000_0000        RAM above 3 GiB
//! ```

use migration::{PAGE_SIZE, RegionLayout};

use crate::error::{Error, Result};

/// Version of the guest-visible shape; both ends of a migration must agree.
pub const MACHINE_VERSION: u32 = 1;

/// End of low RAM and start of the PCI memory window.
pub const MMIO_START: u64 = 0xc000_0000;
/// End of the PCI memory window.
pub const MMIO_END: u64 = 0xfec0_0000;
/// Start of RAM above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The IOAPIC.
pub const IOAPIC_ADDR: u64 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC_ADDR: u64 = 0xfee0_0000;

/// PCI configuration address port (4 bytes).
pub const PCI_CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// PCI configuration data port (4 bytes, byte accesses too).
pub const PCI_CONFIG_DATA_PORT: u16 = 0xcfc;
/// Reset control: writing a value with bit 2 set resets the machine.
pub const RESET_PORT: u16 = 0xcf9;
/// Heartbeat port of the workload.
pub const HEARTBEAT_PORT: u16 = 0xf4;
/// Fatal error number of the workload.
pub const FATAL_PORT: u16 = 0xf5;
/// Power-off.
pub const POWER_OFF_PORT: u16 = 0xf6;
/// First port of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial console.
pub const SERIAL_IRQ: u32 = 4;

/// Slot of the first device; the host bridge is slot 0.
pub const FIRST_DEVICE_SLOT: u8 = 1;
/// Most devices a machine can have.
pub const DEVICES_MAX: usize = 8;

/// The interrupt line (GSI, IOAPIC pin) of a slot's INTx; pins 16 to 23, one each.
pub fn intx_gsi(slot: u8) -> u32 {
    16 + u32::from(slot.wrapping_sub(FIRST_DEVICE_SLOT)) % 8
}

/// Where `memory_bytes` of RAM lie.
pub fn ram_layout(memory_bytes: u64) -> Result<Vec<RegionLayout>> {
    const MEMORY_MAX: u64 = 1 << 40;
    if !(16 << 20..=MEMORY_MAX).contains(&memory_bytes) || !memory_bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Config(format!(
            "memory of {memory_bytes} bytes: it must be whole pages, from 16 MiB to 1 TiB"
        )));
    }
    let low = memory_bytes.min(MMIO_START);
    let mut regions = vec![RegionLayout { gpa: 0, len: low }];
    if memory_bytes > low {
        regions.push(RegionLayout { gpa: HIGH_RAM_START, len: memory_bytes - low });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_32_bit_hole_free() {
        let gib = 1 << 30;
        assert_eq!(ram_layout(gib).unwrap(), [RegionLayout { gpa: 0, len: gib }]);
        let split = ram_layout(4 * gib).unwrap();
        assert_eq!(split[0], RegionLayout { gpa: 0, len: 3 * gib });
        assert_eq!(split[1], RegionLayout { gpa: 4 * gib, len: gib });
        for refused in [0, 4096, (1 << 30) + 1, 2 << 40] {
            assert!(ram_layout(refused).is_err(), "{refused}");
        }
    }
}
