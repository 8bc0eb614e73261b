//! Transitions: direct arcs, combination paths, and what each arc does to the data session.
//!
//! The rule (Linux uAPI, `enum vfio_device_mig_state`): a pair of states without a direct arc is
//! reached over the shortest path whose interior holds no saving-group state. Rather than search,
//! [`next_hop`] reads the table the rule gives for a device with every feature, and skips states
//! a device lacks, as `vfio_mig_get_next_state` of Linux 7.2 does. Tests search the graph and
//! compare.

use crate::capability::MigrationFlags;
use crate::state::DeviceState::{self, *};

/// The direct arcs of a device with P2P and PRE_COPY.
pub const DIRECT_ARCS: [(DeviceState, DeviceState); 15] = [
    (RunningP2p, Stop),
    (StopCopy, Stop),
    (Resuming, Stop),
    (PreCopy, Running),
    (RunningP2p, Running),
    (PreCopyP2p, RunningP2p),
    (Running, RunningP2p),
    (Stop, RunningP2p),
    (Running, PreCopy),
    (RunningP2p, PreCopyP2p),
    (Stop, StopCopy),
    (PreCopy, PreCopyP2p),
    (PreCopyP2p, PreCopy),
    (PreCopyP2p, StopCopy),
    (Stop, Resuming),
];

/// What an arc does to the device's data session (and so to its data fd).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionEffect {
    /// Session and fd, if any, stay (X2, F13).
    Keeps,
    /// A saving session begins: a new fd, read-only.
    BeginsSaving,
    /// A resuming session begins: a new fd, write-only.
    BeginsResuming,
    /// The session ends; a held fd answers ENODEV (X4).
    Ends,
}

/// The effect of the direct arc `from` → `to` on the data session (protocol rule X1).
pub fn session_effect(from: DeviceState, to: DeviceState) -> SessionEffect {
    match (from.is_saving(), to.is_saving()) {
        (true, true) => SessionEffect::Keeps,
        (false, true) => SessionEffect::BeginsSaving,
        _ if to == Resuming && from != Resuming => SessionEffect::BeginsResuming,
        (true, false) => SessionEffect::Ends,
        (false, false) if from == Resuming && to != Resuming => SessionEffect::Ends,
        (false, false) => SessionEffect::Keeps,
    }
}

/// The state the device passes next on its way from `from` to `to`, or `None` where the pair is
/// refused (F4 to F7). `from == to` answers `to`: no arc runs (F3).
pub fn next_hop(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Option<DeviceState> {
    if from == Error || to == Error || !flags.has_state(from) || !flags.has_state(to) {
        return None;
    }
    let mut hop = full_next_hop(from, to)?;
    // A state the device lacks is passed over: search on from it towards the same target (F9).
    while !flags.has_state(hop) {
        hop = full_next_hop(hop, to)?;
    }
    Some(hop)
}

/// The next hop of a device with every feature (protocol reference, section 2).
fn full_next_hop(from: DeviceState, to: DeviceState) -> Option<DeviceState> {
    Some(match (from, to) {
        (Error, _) | (_, Error) => return None,
        (StopCopy, PreCopy | PreCopyP2p) => return None,
        (from, to) if from == to => to,

        (Stop, StopCopy | Resuming) => to,
        (Stop, _) => RunningP2p,

        (Running, PreCopy) => PreCopy,
        (Running, _) => RunningP2p,

        (StopCopy | Resuming, _) => Stop,

        (RunningP2p, Running | PreCopyP2p) => to,
        (RunningP2p, PreCopy) => Running,
        (RunningP2p, _) => Stop,

        (PreCopy, StopCopy | PreCopyP2p) => PreCopyP2p,
        (PreCopy, _) => Running,

        (PreCopyP2p, StopCopy | PreCopy) => to,
        (PreCopyP2p, _) => RunningP2p,
    })
}

/// The states passed from `from` to `to`, the last one `to`; empty when `from == to`; `None` where
/// the pair is refused.
pub fn path(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Option<Vec<DeviceState>> {
    let mut hops = Vec::new();
    let mut current = from;
    // A refused pair must be refused even when no arc would run.
    next_hop(from, to, flags)?;
    while current != to {
        current = next_hop(current, to, flags)?;
        hops.push(current);
    }
    Some(hops)
}
