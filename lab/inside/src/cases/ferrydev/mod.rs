//! The test driver by itself, through the kernel's bare calls: what the other cases build on.
//!
//! | module | holds |
//! |---|---|
//! | `rig` | an open device and its streams |
//! | `states` | the state machine, reset, what outlives what |
//! | `streams` | saving, REINIT, loading |
//! | `function` | registers, DMA, DMA logging, interrupts |
//! | `quirks` | each deviation shows, and none upsets the kernel |

mod function;
mod quirks;
mod rig;
mod states;
mod streams;

use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    [states::cases(), streams::cases(), function::cases(), quirks::cases()].concat()
}

/// Passed, or skipped where the driver was not built.
fn with_ferrydev(lab: &Lab, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    run().map(|()| Outcome::Passed)
}

#[cfg(test)]
mod tests {
    use device_model::{quirks, regs};

    const QUIRKS: &str = include_str!("../../../../ferrydev/quirks.c");
    const FUNCTION: &str = include_str!("../../../../ferrydev/function.c");
    const HEADER: &str = include_str!("../../../../ferrydev/ferrydev.h");
    const README: &str = include_str!("../../../../ferrydev/README.md");

    /// The names of the driver's table.
    fn names() -> Vec<&'static str> {
        let lines = QUIRKS.lines().filter(|line| line.contains("] = { \""));
        lines.filter_map(|line| line.split('"').nth(1)).collect()
    }

    #[test]
    fn quirks_of_the_software_device_have_the_same_names() {
        let names = names();
        // What strikes by chance over many runs serves simulations.
        let simulated = ["slow-load", "reinit-when-read"];
        let known = |name: &str| names.contains(&name);
        for name in quirks::QUIRK_NAMES {
            let name = name.split('=').next().unwrap_or(name);
            let here = name != "break-RULE" && !simulated.contains(&name);
            assert_eq!(known(name), here, "{name}");
        }
        // The kernel's core keeps these for every driver.
        let core = ["L2"];
        for rule in quirks::BREAKS {
            assert!(known(&format!("break-{rule}")) != core.contains(&rule), "break-{rule}");
        }
    }

    #[test]
    fn every_quirk_is_told_of() {
        for name in names() {
            // Rules have a table of their own: `| P4 | …`.
            let in_table = |rule: &str| {
                let mut cells = README.lines().filter_map(|line| line.split('|').nth(1));
                cells.any(|cell| cell.split(',').any(|id| id.trim() == rule))
            };
            let told = name.strip_prefix("break-").is_some_and(in_table)
                || README.contains(&format!("`{name}`"))
                || README.contains(&format!("`{name}="));
            assert!(told, "{name} is not in the README");
        }
    }

    /// The value of a `#define`.
    fn defined(text: &str, name: &str) -> u64 {
        let mut words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = words.find(|words| words.len() > 2 && words[..2] == ["#define", name]);
        let value = line.unwrap_or_else(|| panic!("{name} is not defined"))[2];
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
            None => value.parse().unwrap(),
        }
    }

    #[test]
    fn registers_are_those_of_the_software_device() {
        for (name, offset) in [
            ("REG_ID", regs::ID),
            ("REG_VERSION", regs::VERSION),
            ("REG_CONTROL", regs::CONTROL),
            ("REG_STATUS", regs::STATUS),
            ("REG_CONFIG_KIB", regs::CONFIG_KIB),
            ("REG_CONFIG_GEN", regs::CONFIG_GEN),
            ("REG_CONFIG_ACK", regs::CONFIG_ACK),
            ("REG_DMA_LO", regs::DMA_LO),
            ("REG_DMA_HI", regs::DMA_HI),
            ("REG_DMA_PAGES", regs::DMA_PAGES),
            ("REG_DMA_RATE", regs::DMA_RATE),
            ("REG_DOORBELL", regs::DOORBELL),
            ("REG_COMPLETED", regs::COMPLETED),
            ("REG_COMPLETED_HI", regs::COMPLETED_HI),
            ("REG_VECTOR", regs::VECTOR),
            ("REG_RAISED", regs::RAISED),
            ("REG_FILL_KIB", regs::FILL_KIB),
            ("REG_SCRATCH", regs::SCRATCH),
            ("ID_VALUE", regs::ID_VALUE.into()),
            ("VERSION_VALUE", regs::VERSION_VALUE.into()),
        ] {
            assert_eq!(defined(FUNCTION, name), offset, "{name}");
        }
        let class_revision = u64::from(regs::CLASS_CODE) << 8 | u64::from(regs::REVISION);
        for (name, value) in [
            ("FERRYDEV_VENDOR_ID", regs::VENDOR_ID.into()),
            ("FERRYDEV_DEVICE_ID", regs::DEVICE_ID.into()),
            ("FERRYDEV_SUBSYSTEM_VENDOR_ID", regs::SUBSYSTEM_VENDOR_ID.into()),
            ("FERRYDEV_SUBSYSTEM_ID", regs::SUBSYSTEM_ID.into()),
            ("FERRYDEV_CLASS_REVISION", class_revision),
            ("FERRYDEV_BAR_BYTES", regs::BAR0_BYTES),
            ("FERRYDEV_CONFIG_SPACE_BYTES", regs::CONFIG_SPACE_BYTES),
            ("FERRYDEV_MSIX_VECTORS", regs::MSIX_VECTORS.into()),
            ("FERRYDEV_MSIX_PBA_OFFSET", regs::MSIX_PBA_OFFSET),
            ("FERRYDEV_DMA_RATE_MAX", regs::DMA_RATE_MAX.into()),
            ("FERRYDEV_DOORBELL_SYNC_STAMPS", regs::DOORBELL_SYNC_STAMPS),
        ] {
            assert_eq!(defined(HEADER, name), value, "{name}");
        }
    }
}
