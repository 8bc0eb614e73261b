//! What the brain is told about devices and hosts before it measures anything.

use super::history::History;
use super::spread::Range;
use crate::time::Time;

/// A duration's range, in ns.
const fn us(min: u64, typical: u64, max: u64) -> Range {
    Range { min: min * 1_000, typical: typical * 1_000, max: max * 1_000 }
}

/// What is assumed of a device, from its profile or for want of one. Times in ns, rates in bytes/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePrior {
    /// PRECOPY_INFO and size.
    pub look: Range,
    /// Into the P2P state.
    pub quiesce: Range,
    /// Into STOP_COPY, with the fixed part of saving.
    pub stop: Range,
    /// The destination's RESUMING → STOP.
    pub validate: Range,
    /// The destination's STOP → RUNNING.
    pub start: Range,
    /// What loading costs once, where no initial data was loaded before.
    pub load_cold: Range,
    /// Reading the stream.
    pub read: Range,
    /// Loading it.
    pub load: Range,
    /// What a working guest dirties, in bytes/s.
    pub dirty_bytes_per_s: u64,
}

impl Default for DevicePrior {
    fn default() -> Self {
        Self {
            look: us(50, 500, 5_000),
            quiesce: us(100, 2_000, 20_000),
            stop: us(100, 2_000, 20_000),
            validate: us(100, 1_000, 20_000),
            start: us(100, 1_000, 20_000),
            load_cold: Range::exactly(0),
            read: Range { min: 250_000_000, typical: 1_000_000_000, max: 4_000_000_000 },
            load: Range { min: 250_000_000, typical: 1_000_000_000, max: 4_000_000_000 },
            dirty_bytes_per_s: 0,
        }
    }
}

/// How long calls on a device may take at most; `None` = nobody says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceBounds {
    /// Into the P2P state.
    pub quiesce: Option<Time>,
    /// Out of it, back to PRE_COPY or RUNNING.
    pub unquiesce: Option<Time>,
    /// Into STOP_COPY.
    pub stop: Option<Time>,
    /// From STOP_COPY back into RUNNING, by way of STOP and RUNNING_P2P.
    pub run: Option<Time>,
    /// The destination's STOP → RUNNING.
    pub start: Option<Time>,
    /// One read(), which a call on the same device has to wait for.
    pub read: Option<Time>,
}

impl DeviceBounds {
    /// The first call without a bound, by the name that people know.
    pub fn missing(&self) -> Option<&'static str> {
        let Self { quiesce, unquiesce, stop, run, start, read } = self;
        let all = [
            (quiesce, "into its P2P state"),
            (unquiesce, "out of its P2P state"),
            (stop, "into STOP_COPY"),
            (run, "from STOP_COPY back into RUNNING"),
            (start, "into RUNNING at the destination"),
            (read, "one read()"),
        ];
        all.into_iter().find(|(bound, _)| bound.is_none()).map(|(_, name)| name)
    }
}

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceKnowledge {
    /// Its id in messages.
    pub name: String,
    /// Kind, driver and firmware: devices of one key are taken for alike.
    pub kind: String,
    /// What is assumed of it.
    pub prior: DevicePrior,
    /// What is declared about it.
    pub bounds: DeviceBounds,
    /// What it has, in bytes, where it is not asked while it runs (no PRE_COPY); `None` = nobody knows.
    pub stop_copy_bytes: Option<u64>,
    /// It may be migrated in strict mode although a bound is missing.
    pub allow_unbounded: bool,
    /// At the destination it is not RUNNING after a reset: what was loaded cannot be rolled back.
    pub reset_keeps_state: bool,
}

/// How long calls on the hosts may take at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBounds {
    /// The vCPUs' pause.
    pub pause: Time,
    /// Their resumption.
    pub resume: Time,
    /// A sync of dirty pages with the vCPUs stopped.
    pub sync: Time,
    /// Detach and save.
    pub machine_state: Time,
    /// Interrupts attached again.
    pub reattach: Time,
    /// A decision's way to the disk.
    pub record: Time,
    /// One message there and one back.
    pub round_trip: Time,
    /// The destination's start without its devices.
    pub start: Time,
}

impl Default for HostBounds {
    fn default() -> Self {
        Self {
            pause: Time::from_ms(20),
            resume: Time::from_ms(20),
            sync: Time::from_ms(20),
            machine_state: Time::from_ms(20),
            reattach: Time::from_ms(10),
            record: Time::from_ms(10),
            round_trip: Time::from_ms(20),
            start: Time::from_ms(20),
        }
    }
}

/// The two hosts. Times in ns, the link in bytes/s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostKnowledge {
    /// Names the pair in the history.
    pub pair: String,
    /// From the request to pause to the last vCPU's stop.
    pub pause: Range,
    /// Collecting dirty pages with the vCPUs stopped.
    pub final_sync: Range,
    /// Detach, save and send.
    pub machine_state: Range,
    /// From StateEnd to Ready, without the devices.
    pub validate: Range,
    /// The destination's start, without the devices.
    pub start: Range,
    /// One message there and one back.
    pub round_trip: Range,
    /// The link.
    pub link: Range,
    /// What calls may take at most.
    pub bounds: HostBounds,
}

impl Default for HostKnowledge {
    /// What small virtual machines with a vCPU or two and no device were measured to take on idle hosts (docs/performance.md,
    /// the blackout's floor), with room for several times that. All of it together fits 10 ms at P99.
    fn default() -> Self {
        Self {
            pair: String::new(),
            pause: us(20, 150, 2_000),
            final_sync: us(20, 300, 5_000),
            machine_state: us(100, 300, 3_000),
            validate: us(50, 500, 3_000),
            start: us(50, 400, 3_000),
            round_trip: us(20, 200, 3_000),
            link: Range { min: 100_000_000, typical: 1_000_000_000, max: 2_000_000_000 },
            bounds: HostBounds::default(),
        }
    }
}

/// Everything the brain is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Knowledge {
    /// The devices, in the order of Describe; those that lack have nothing but defaults.
    pub devices: Vec<DeviceKnowledge>,
    /// The hosts.
    pub host: HostKnowledge,
    /// Earlier migrations.
    pub history: History,
}

impl Knowledge {
    /// The key of whole blackouts: the pair and the kinds, in any order.
    pub fn whole_key(&self) -> String {
        let mut kinds: Vec<_> = self.devices.iter().map(|device| device.kind.as_str()).collect();
        kinds.sort_unstable();
        format!("{} | {}", self.host.pair, kinds.join(", "))
    }
}
