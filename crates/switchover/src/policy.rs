//! Whose rule decides when to switch over, and what becomes of it: ours, or a peer's on the same engine.
//!
//! | | tries when | after the pause |
//! |---|---|---|
//! | [`Policy::Bounded`] | all terms fit at the level of the promise | looks again: go, absorb or revoke; enforced in strict mode |
//! | [`Policy::Qemu11`] | RAM and device bytes, over the bandwidth, fit | new initial data fails the migration, else go |
//! | [`Policy::Qemu10`] | the same, device bytes that precopy holds counted twice | goes |
//! | [`Policy::RamOnly`] | dirty RAM, over the bandwidth of the last pass, fits | goes; devices are not read before they stop |
//!
//! Sources: QEMU 10.2 and 11.1 (`migration_iteration_run`, `vfio_state_pending_*`), Cloud Hypervisor
//! (`send_migration`), August 2026. Peers know no strict mode. They too wait for acknowledged sessions here,
//! as QEMU does with `switchover-ack`.

use crate::time::Time;

/// A rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Ours.
    #[default]
    Bounded,
    /// QEMU up to 10.2.
    Qemu10,
    /// QEMU 11.1.
    Qemu11,
    /// Cloud Hypervisor.
    RamOnly,
}

/// What a peer's rule looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// Dirty RAM, in bytes.
    pub ram_bytes: u64,
    /// What PRECOPY_INFO says, all devices together, in bytes.
    pub precopy_bytes: u64,
    /// What MIG_DATA_SIZE says, all devices together, in bytes; where it fails, 100 GiB.
    pub stop_copy_bytes: u64,
    /// Bytes sent in the last window over its whole time, in bytes per second.
    pub bytes_per_s: u64,
    /// The downtime limit.
    pub limit: Time,
}

/// What QEMU assumes of a device that does not say how much it has.
pub const QEMU_UNKNOWN_BYTES: u64 = 100 << 30;

impl Policy {
    /// Every policy, ours first.
    pub const ALL: [Self; 4] = [Self::Bounded, Self::Qemu11, Self::Qemu10, Self::RamOnly];

    /// The name on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bounded => "bounded",
            Self::Qemu10 => "qemu-10",
            Self::Qemu11 => "qemu-11",
            Self::RamOnly => "ram-only",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// Devices are read while the guest runs.
    pub fn reads_devices_early(self) -> bool {
        self != Self::RamOnly
    }

    /// New initial data after the decision ends the migration.
    pub fn fails_on_late_initial_data(self) -> bool {
        self == Self::Qemu11
    }

    /// A peer's answer to whether now is the time; `None` for [`Policy::Bounded`], which looks at more.
    pub fn wants(self, view: &View) -> Option<bool> {
        let device_bytes = match self {
            Self::Bounded => return None,
            Self::Qemu11 => view.precopy_bytes.max(view.stop_copy_bytes),
            Self::Qemu10 => view.precopy_bytes.saturating_add(view.stop_copy_bytes),
            Self::RamOnly => 0,
        };
        let pending = u128::from(view.ram_bytes) + u128::from(device_bytes);
        let threshold = u128::from(view.bytes_per_s) * u128::from(view.limit.0) / 1_000_000_000;
        Some(pending <= threshold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_divide_bytes_by_bandwidth() {
        let view = View {
            ram_bytes: 100_000_000,
            precopy_bytes: 50_000_000,
            stop_copy_bytes: 150_000_000,
            bytes_per_s: 1_000_000_000,
            limit: Time(0),
        };
        for (policy, least_ms) in
            [(Policy::RamOnly, 100), (Policy::Qemu11, 250), (Policy::Qemu10, 300)]
        {
            let wants = |ms| policy.wants(&View { limit: Time::from_ms(ms), ..view });
            assert_eq!((wants(least_ms), wants(least_ms - 1)), (Some(true), Some(false)));
        }
        assert_eq!(Policy::Bounded.wants(&view), None);
    }

    #[test]
    fn every_name_is_found_again() {
        for policy in Policy::ALL {
            assert_eq!(Policy::from_name(policy.name()), Some(policy));
        }
        assert_eq!(Policy::from_name("qemu"), None);
    }
}
