//! docs/workload.md: the guest's driver, the device model and the page agree on their constants.

use std::collections::HashMap;

use device_model::regs;
use microvm::workload;

const GUEST: &str = include_str!("../src/workload/guest.S");
const PAGE: &str = include_str!("../../../docs/workload.md");

/// Registers by name, as the device model has them.
const REGISTERS: [(&str, u64); 18] = [
    ("ID", regs::ID),
    ("VERSION", regs::VERSION),
    ("CONTROL", regs::CONTROL),
    ("STATUS", regs::STATUS),
    ("CONFIG_KIB", regs::CONFIG_KIB),
    ("CONFIG_GEN", regs::CONFIG_GEN),
    ("CONFIG_ACK", regs::CONFIG_ACK),
    ("DMA_LO", regs::DMA_LO),
    ("DMA_HI", regs::DMA_HI),
    ("DMA_PAGES", regs::DMA_PAGES),
    ("DMA_RATE", regs::DMA_RATE),
    ("DOORBELL", regs::DOORBELL),
    ("COMPLETED", regs::COMPLETED),
    ("COMPLETED_HI", regs::COMPLETED_HI),
    ("VECTOR", regs::VECTOR),
    ("RAISED", regs::RAISED),
    ("FILL_KIB", regs::FILL_KIB),
    ("SCRATCH", regs::SCRATCH),
];

#[test]
fn the_kvm_guests_driver_uses_the_devices_registers() {
    let registers: HashMap<_, _> = REGISTERS.into_iter().collect();
    let mut seen = 0;
    for line in GUEST.lines().filter_map(|line| line.strip_prefix(".set R_")) {
        let (name, rest) = line.split_once(',').unwrap();
        let offset = rest.split_whitespace().next().unwrap().strip_prefix("0x").unwrap();
        let offset = u64::from_str_radix(offset, 16).unwrap();
        assert_eq!(registers.get(name.trim()), Some(&offset), "{name}");
        seen += 1;
    }
    assert!(seen >= 13, "{seen} registers found in the guest");
    let id = u32::from(regs::DEVICE_ID) << 16 | u32::from(regs::VENDOR_ID);
    assert_eq!(workload::DEVICE_ID, id);
    assert_eq!(workload::DEVICE_MAGIC, regs::ID_VALUE);
}

#[test]
fn the_page_names_the_same_registers_and_magic_numbers() {
    for (name, offset) in REGISTERS {
        let row = format!("| 0x{offset:02x} | {name} |");
        assert!(PAGE.contains(&row), "{row}");
    }
    for number in [regs::ID_VALUE, workload::START_MAGIC, workload::MAILBOX_MAGIC] {
        assert!(PAGE.contains(&format!("0x{number:08x}")), "{number:#x}");
    }
    for address in [workload::START_PAGE, workload::MAILBOX] {
        assert!(PAGE.contains(&format!("at 0x{address:x}")), "{address:#x}");
    }
}
