//! How long a device takes, by its profile.
//!
//! The core never waits: it says how long a call takes, and whoever drives it (a thread that sleeps,
//! a simulator that moves its clock) lets that time pass.

use device_profile::Profile;
use vfio_migration::DeviceState::{self, *};

/// Times and rates of one device. [`Timing::OFF`] takes no time at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Into PRE_COPY or PRE_COPY_P2P from a running state, in ns.
    pub to_precopy_ns: u64,
    /// Into a P2P state from its full one, in ns.
    pub to_p2p_ns: u64,
    /// Out of work, in ns.
    pub to_stop_ns: u64,
    /// Into work, or from a P2P state to its full one, in ns.
    pub to_running_ns: u64,
    /// Fixed part of the final save, in ns.
    pub save_fixed_ns: u64,
    /// Loading initial data for the first time in a session, in ns.
    pub load_cold_ns: u64,
    /// RESUMING → STOP, in ns.
    pub load_warm_ns: u64,
    /// Reset, in ns.
    pub reset_ns: u64,
    /// Reading the stream, in bytes/s; `None` = as fast as it can.
    pub read_bytes_per_s: Option<u64>,
    /// Writing the stream, in bytes/s; `None` = as fast as it can.
    pub load_bytes_per_s: Option<u64>,
}

impl Timing {
    /// Everything at once.
    pub const OFF: Self = Self {
        to_precopy_ns: 0,
        to_p2p_ns: 0,
        to_stop_ns: 0,
        to_running_ns: 0,
        save_fixed_ns: 0,
        load_cold_ns: 0,
        load_warm_ns: 0,
        reset_ns: 0,
        read_bytes_per_s: None,
        load_bytes_per_s: None,
    };

    /// The typical times and rates of `profile`.
    pub fn of_profile(profile: &Profile) -> Self {
        let ns = |quantity: &device_profile::Quantity| quantity.typical.saturating_mul(1000);
        let times = &profile.times;
        Self {
            to_precopy_ns: ns(&times.to_precopy_us),
            to_p2p_ns: ns(&times.to_p2p_us),
            to_stop_ns: ns(&times.to_stop_us),
            to_running_ns: ns(&times.to_running_us),
            save_fixed_ns: ns(&times.save_fixed_us),
            load_cold_ns: ns(&times.load_cold_us),
            load_warm_ns: ns(&times.load_warm_us),
            reset_ns: ns(&times.reset_us),
            read_bytes_per_s: Some(profile.rates.read_bytes_per_s.typical),
            load_bytes_per_s: Some(profile.rates.load_bytes_per_s.typical),
        }
    }

    /// All times at `percent` of what they are; rates change the other way round. 0 is [`Self::OFF`].
    pub fn scaled(&self, percent: u32) -> Self {
        if percent == 0 {
            return Self::OFF;
        }
        let scale = |value: u64, by: u64, of: u64| {
            u64::try_from(u128::from(value) * u128::from(by) / u128::from(of)).unwrap_or(u64::MAX)
        };
        let percent = u64::from(percent);
        let time = |value: u64| scale(value, percent, 100);
        let rate = |value: Option<u64>| value.map(|value| scale(value, 100, percent).max(1));
        Self {
            to_precopy_ns: time(self.to_precopy_ns),
            to_p2p_ns: time(self.to_p2p_ns),
            to_stop_ns: time(self.to_stop_ns),
            to_running_ns: time(self.to_running_ns),
            save_fixed_ns: time(self.save_fixed_ns),
            load_cold_ns: time(self.load_cold_ns),
            load_warm_ns: time(self.load_warm_ns),
            reset_ns: time(self.reset_ns),
            read_bytes_per_s: rate(self.read_bytes_per_s),
            load_bytes_per_s: rate(self.load_bytes_per_s),
        }
    }

    /// How long the arc `from` → `to` takes, in ns; arcs that only end a session take none.
    pub fn arc_ns(&self, from: DeviceState, to: DeviceState) -> u64 {
        match (from, to) {
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => self.to_precopy_ns,
            (Running, RunningP2p) | (PreCopy, PreCopyP2p) => self.to_p2p_ns,
            (RunningP2p | Running, Stop) => self.to_stop_ns,
            (PreCopyP2p | PreCopy, StopCopy) => self.to_stop_ns.saturating_add(self.save_fixed_ns),
            (Stop, StopCopy) => self.save_fixed_ns,
            (Stop, RunningP2p | Running) => self.to_running_ns,
            (RunningP2p, Running) | (PreCopyP2p, PreCopy) => self.to_running_ns,
            (Resuming, Stop) => self.load_warm_ns,
            _ => 0,
        }
    }

    /// How long reading `bytes` takes, in ns.
    pub fn read_ns(&self, bytes: u64) -> u64 {
        transfer_ns(bytes, self.read_bytes_per_s)
    }

    /// How long writing `bytes` takes, in ns.
    pub fn load_ns(&self, bytes: u64) -> u64 {
        transfer_ns(bytes, self.load_bytes_per_s)
    }
}

fn transfer_ns(bytes: u64, bytes_per_s: Option<u64>) -> u64 {
    let Some(rate) = bytes_per_s.filter(|rate| *rate > 0) else { return 0 };
    u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_the_time_is_twice_the_rate() {
        let full = Timing::of_profile(&Profile::builtin("mlx5-vf").unwrap());
        let half = full.scaled(50);
        assert_eq!(half.arc_ns(Resuming, Stop) * 2, full.arc_ns(Resuming, Stop));
        assert_eq!(half.read_ns(1 << 20) * 2, full.read_ns(1 << 20));
        assert_eq!(full.scaled(0), Timing::OFF);
        assert_eq!(full.scaled(100), full);
    }

    #[test]
    fn the_final_save_is_charged_where_the_device_is_saved() {
        let timing = Timing { save_fixed_ns: 7, to_stop_ns: 2, ..Timing::OFF };
        assert_eq!(timing.arc_ns(PreCopyP2p, StopCopy), 9);
        assert_eq!(timing.arc_ns(Stop, StopCopy), 7);
        assert_eq!(timing.arc_ns(RunningP2p, Stop), 2);
        assert_eq!(timing.arc_ns(StopCopy, Stop), 0);
    }
}
