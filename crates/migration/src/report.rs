//! What a migration tells: while it runs ([`Progress`]) and when it is over ([`Report`]).
//!
//! Names that QEMU users know are kept; keys are kebab-case, times decimal milliseconds, and what is
//! not known is `null`, never 0.

use serde::{Deserialize, Serialize};
use switchover::message::Failure;

/// RAM counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamReport {
    /// All guest memory, in bytes.
    pub total: u64,
    /// Bytes of RAM frames on the wire.
    pub transferred: u64,
    /// Bytes still to be sent.
    pub remaining: u64,
    /// Pages sent with their content.
    pub normal: u64,
    /// Zero pages.
    pub duplicate: u64,
    /// Those of the pages sent with their content that were compressed.
    #[serde(default)]
    pub compressed: u64,
    /// What they were compressed to, in bytes.
    #[serde(default)]
    pub compressed_size: u64,
    /// Pages found dirty: all of memory at first, then what each sync added to what was still to be sent. Pages
    /// sent are no more, unless an attempt was rolled back.
    #[serde(default)]
    pub dirtied: u64,
    /// Syncs of dirty pages, the one of the first pass included.
    pub dirty_sync_count: u64,
    /// Number of data channels.
    #[serde(default)]
    pub channels: u16,
    /// Guest memory that the destination's host has given, in bytes; `None` where it does not say.
    #[serde(default)]
    pub populated: Option<u64>,
    /// Time that all threads of the destination spent on that, in ms; part of what the passes took, and of
    /// the setup.
    #[serde(default)]
    pub populate_time_ms: Option<f64>,
    /// Guest memory that was handed over instead of sent (local move), in bytes; `None` where it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<u64>,
    /// How long the destination took to map it, pinning for its devices included, in ms; before the blackout, part
    /// of the setup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_time_ms: Option<f64>,
    /// Throughput while sending, in megabits per second; `None` before anything was sent.
    pub mbps: Option<f64>,
}

/// Device counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceReport {
    /// The device's name.
    pub id: String,
    /// Bytes read while initial data was known to be unread.
    pub initial_bytes: u64,
    /// Other bytes read in PRE_COPY.
    pub dirty_bytes: u64,
    /// Bytes read in STOP_COPY.
    pub stop_copy_bytes: u64,
    /// What it still holds, in bytes.
    pub remaining: Option<u64>,
    /// Re-initialisations of its initial data.
    pub reinits: u32,
    /// Those after the decision to switch over.
    pub late_reinits: u32,
    /// Acknowledged sessions.
    pub acks: u32,
    /// Why the guest lost its state or the device itself, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// What a migration cost one host (see [`cost`](crate::cost)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CostReport {
    /// CPU time of all threads that worked for it, in ms; the sum of the next four. Time in the kernel is among it.
    pub cpu_time_ms: f64,
    /// Of the driver and the control channel.
    pub control_ms: f64,
    /// For memory and machine state.
    pub data_ms: f64,
    /// For devices: their calls, reads and writes.
    pub devices_ms: f64,
    /// For populating memory in the background.
    pub populate_ms: f64,
    /// The most memory beyond the guest's that was held at once, in bytes.
    pub memory_peak: u64,
}

/// A part of the predicted or measured blackout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TermReport {
    /// Its name.
    pub name: String,
    /// How long it was expected to be, as likely longer as shorter (P50); `None` = unknown.
    pub expected_ms: Option<f64>,
    /// The same at the level of the promise. Those of all terms do not add up to the total's.
    #[serde(default)]
    pub expected_upper_ms: Option<f64>,
    /// `prior`, `history n`, `measured n` or `unknown`.
    pub basis: String,
    /// How long it was; `None` before it happened.
    pub measured_ms: Option<f64>,
}

/// A call in a blackout that took longer than the bound that was given for it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverrunReport {
    /// The device that was called; `None` for a call of the host.
    pub device: Option<String>,
    /// The call.
    pub call: String,
    /// How long it took.
    pub ms: f64,
    /// How long it might have taken.
    pub bound_ms: f64,
}

/// A blackout that came to nothing: the guest stood still and went on at the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlackoutReport {
    /// How long.
    pub ms: f64,
    /// `revoked`, `rolled-back` or `rehearsed`.
    pub ended: String,
    /// Why.
    pub cause: String,
}

/// A part of the blackout as it was; parts follow one another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlackoutPart {
    /// Who was at work.
    pub side: switchover::message::Side,
    /// On what, such as `pause`, `stop-devices`, `validate`; `link` is the way between the hosts.
    pub name: String,
    /// When it began, since the request to pause, in microseconds.
    pub at_us: f64,
    /// How long it took, in microseconds.
    pub us: f64,
    /// How much of that was the work itself, in microseconds; the rest is the way between threads. `None` where
    /// that is not told apart.
    pub work_us: Option<f64>,
}

/// Where the blackout of a completed migration went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlackoutTimeline {
    /// All of it: the downtime, verification included, in microseconds.
    pub total_us: f64,
    /// The part of it that somebody measured as his own. What is only left over between two hosts' clocks is not.
    pub accounted_percent: f64,
    /// The parts, in order.
    pub parts: Vec<BlackoutPart>,
}

/// An entry of the timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TimelineEntry {
    /// Since the migration began, in ms.
    pub at_ms: f64,
    /// Which side's clock and doing.
    pub side: switchover::message::Side,
    /// What happened, such as `look`, `revoked`, `reinit`.
    pub event: String,
    /// For people: numbers, devices.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// A migration under way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// `setup`, `active`, `switchover`, `in-doubt`, `completed`, `failed`, `cancelled`.
    pub status: String,
    /// The handover's state by its own name.
    pub state: String,
    /// Pass over memory, from 1.
    pub pass: u64,
    /// RAM and device bytes still to be sent; `None` when a device does not know.
    pub remaining: Option<u64>,
    /// RAM.
    pub ram: RamReport,
    /// Devices.
    pub devices: Vec<DeviceReport>,
    /// Link rate in bytes per second.
    pub rate_bytes_per_s: u64,
    /// The estimate, as likely longer as shorter; `None` when a part is unknown.
    pub expected_downtime_ms: Option<f64>,
    /// The same at the level of the promise.
    #[serde(default)]
    pub expected_downtime_upper_ms: Option<f64>,
    /// The limit.
    pub downtime_limit_ms: f64,
    /// Time since the migration began.
    pub total_time_ms: f64,
    /// Switchovers tried.
    pub switchover_attempts: u64,
    /// Switchovers taken back.
    pub switchover_revocations: u32,
    /// Those of them that were rolled back: devices had stopped already.
    pub switchover_roll_backs: u32,
    /// Switchovers that took new initial data along.
    pub switchover_absorptions: u32,
    /// So many percent of the time the vCPUs are kept from executing (auto-converge).
    #[serde(default)]
    pub cpu_throttle_percentage: u8,
    /// The call that has not come back for over a second, or with the guest standing still for longer than
    /// its bound: device, call, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_call: Option<String>,
    /// Calls in blackouts that took longer than their bounds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overruns: Vec<OverrunReport>,
    /// Why it failed, once it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// A migration that is over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// `completed`, `failed`, `cancelled` or `dry-run`.
    pub status: String,
    /// The migration's id.
    pub migration: String,
    /// The limit.
    pub downtime_limit_ms: f64,
    /// The estimate the last switchover began with, as likely longer as shorter (P50); `None` when a part was
    /// unknown.
    pub expected_downtime_ms: Option<f64>,
    /// The same at the level of the promise.
    #[serde(default)]
    pub expected_downtime_upper_ms: Option<f64>,
    /// What both rest on: `history n` for n whole blackouts, `terms` for joint samples of the terms.
    #[serde(default)]
    pub expected_downtime_basis: String,
    /// The level of the promise, in percent.
    #[serde(default)]
    pub confidence_percent: f64,
    /// From the request to pause to the arrival of Running, on the source's clock: an upper bound.
    pub downtime_ms: Option<f64>,
    /// The part of it that only verification cost: from Ready to Commit, while both sides hashed
    /// everything. An ordinary migration does not have it; `None` when not verified.
    pub verification_ms: Option<f64>,
    /// Between the guest's last heartbeat here and its first there, stamped by the hosts; `None` where
    /// their clocks do not compare or the guest has no heartbeat.
    pub guest_observed_downtime_ms: Option<f64>,
    /// From the start to the first pass.
    pub setup_time_ms: Option<f64>,
    /// From the start to the end.
    pub total_time_ms: f64,
    /// Switchovers tried.
    pub switchover_attempts: u64,
    /// Switchovers taken back.
    pub switchover_revocations: u32,
    /// Those of them that were rolled back: devices had stopped already.
    pub switchover_roll_backs: u32,
    /// Switchovers that took new initial data along.
    pub switchover_absorptions: u32,
    /// The most by which the vCPUs were slowed down, in percent of the time (auto-converge). It does not count
    /// as blackout.
    #[serde(default)]
    pub cpu_throttle_percentage: u8,
    /// Blackouts that ended on the source, each in ms.
    pub source_blackouts_ms: Vec<f64>,
    /// The same, each with what ended it and why.
    #[serde(default)]
    pub source_blackouts: Vec<BlackoutReport>,
    /// Calls in blackouts that took longer than their bounds.
    #[serde(default)]
    pub overruns: Vec<OverrunReport>,
    /// RAM.
    pub ram: RamReport,
    /// Devices.
    pub devices: Vec<DeviceReport>,
    /// Memory equal on both sides, by hashes made from scratch; `None` when not verified.
    pub memory_identical: Option<bool>,
    /// Device state equal on both sides, by the devices' own digests; `None` when not verified or when a
    /// device offers none.
    pub device_state_identical: Option<bool>,
    /// The terms of the estimate, with what they came to.
    pub terms: Vec<TermReport>,
    /// What it cost here; `None` where it did not even begin.
    #[serde(default)]
    pub source_cost: Option<CostReport>,
    /// What it cost the destination, as that said last; `None` where it does not say.
    #[serde(default)]
    pub destination_cost: Option<CostReport>,
    /// Where the blackout went, part by part; `None` unless the guest runs at the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_timeline: Option<BlackoutTimeline>,
    /// What happened when.
    pub timeline: Vec<TimelineEntry>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}
