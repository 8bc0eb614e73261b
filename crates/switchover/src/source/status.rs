//! A look at the source's brain from outside.

use super::*;

/// What a device did in this migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DeviceStatus {
    /// Last known unread initial bytes; `None` = not known.
    pub initial_bytes: Option<u64>,
    /// Last known unread dirty bytes; `None` = not known.
    pub dirty_bytes: Option<u64>,
    /// What it still holds in all; `None` = not known.
    pub remaining_bytes: Option<u64>,
    /// Initial-data re-initialisations.
    pub reinits: u32,
    /// Those that came after the decision to switch over.
    pub late_reinits: u32,
    /// Acknowledged sessions.
    pub acks: u32,
}

/// A look at the brain from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The handover's state.
    pub state: State,
    /// Number of the current pass.
    pub pass: u64,
    /// RAM still to be sent, in bytes.
    pub ram_remaining_bytes: u64,
    /// Link rate, in bytes per second.
    pub link_bytes_per_s: u64,
    /// The blackout, if the switchover began now; before that, as it was estimated at the last try.
    pub estimate: Estimate,
    /// The downtime limit.
    pub downtime_limit: Time,
    /// The quantile at which a switchover must fit, in permille: that of the estimate's upper values.
    pub level_permille: u32,
    /// Switchovers tried.
    pub attempts: u64,
    /// Switchovers taken back; those that were rolled back are among them.
    pub revocations: u32,
    /// Switchovers rolled back after devices had stopped.
    pub roll_backs: u32,
    /// Switchovers that took new initial data along.
    pub absorptions: u32,
    /// Time the guest stood still in revoked switchovers.
    pub revoked_pause: Time,
    /// Calls in blackouts that took longer than the bound that was given for them.
    pub overruns: Vec<Overrun>,
    /// Blackouts that ended here, the first [`BLACKOUTS_MAX`] of them.
    pub blackouts: Vec<Blackout>,
    /// How the vCPUs are slowed down.
    pub throttle: Throttle,
    /// Per device.
    pub devices: Vec<DeviceStatus>,
}

impl Source {
    /// A look from outside.
    pub fn status(&self) -> Status {
        let state = self.handover.state();
        let estimate = if state == State::Precopy {
            self.estimator.estimate(Ahead::All, Time(0))
        } else {
            self.tried.clone()
        };
        Status {
            state,
            pass: self.pass,
            ram_remaining_bytes: self.estimator.ram_remaining_bytes(),
            link_bytes_per_s: self.estimator.link_bytes_per_s(),
            estimate,
            downtime_limit: self.config.downtime_limit,
            level_permille: self.config.level_permille,
            attempts: self.handover.attempt().0,
            revocations: self.revocations,
            roll_backs: self.roll_backs,
            absorptions: self.absorptions,
            revoked_pause: self.revoked_pause,
            overruns: self.promise.overruns.clone(),
            blackouts: self.blackouts.ended().to_vec(),
            throttle: self.converge.throttle.clone(),
            devices: self.devices.iter().map(|d| d.status).collect(),
        }
    }
}
