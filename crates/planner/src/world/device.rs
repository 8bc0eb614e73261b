//! A device on both hosts: what the source reads, what the destination loads.

use device_model::CountedDevice;
use device_model::counted::CountedRead;
use device_profile::Profile;
use switchover::Time;
use switchover::handover::{DeviceCall, DeviceState as Brain};
use switchover::message::Session;
use vfio_migration::DeviceState;

/// A read that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) bytes: u64,
    pub(super) began: Time,
    pub(super) ends: Time,
}

/// The device on the source.
#[derive(Clone, Debug)]
pub(super) struct Here {
    pub(super) profile: Profile,
    pub(super) counted: CountedDevice,
    pub(super) read_bytes_per_s: u64,
    /// Reading was asked for.
    pub(super) reading: bool,
    pub(super) job: Option<Job>,
    pub(super) jobs: u64,
    /// A call is under way.
    pub(super) calling: bool,
    /// A read that is given up still takes so long.
    pub(super) free_at: Time,
    pub(super) stream: Session,
    pub(super) offset: u64,
    /// Up to here the guest's work on it is counted.
    pub(super) worked_until: Time,
}

impl Here {
    pub(super) fn read_ns(&self, bytes: u64) -> u64 {
        per(bytes, self.read_bytes_per_s)
    }

    /// What the guest did to it until now.
    pub(super) fn work(&mut self, now: Time, runs: bool) {
        let passed = now.since(self.worked_until);
        self.worked_until = now;
        if runs && self.counted.state().is_active() {
            let rate = self.profile.rates.dirty_bytes_per_s.typical;
            let bytes = u128::from(rate) * u128::from(passed.0) / 1_000_000_000;
            self.counted.dirty(bytes.min(u128::from(u64::MAX)) as u64);
        }
    }

    /// Ends the read under way here and now, with what it has: bytes, and the time for them.
    pub(super) fn interrupt(&mut self, now: Time) -> Option<(u64, Time)> {
        let job = self.job.take()?;
        let (passed, whole) = (now.since(job.began).0, job.ends.since(job.began).0.max(1));
        let bytes =
            (u128::from(job.bytes) * u128::from(passed.min(whole)) / u128::from(whole)) as u64;
        // The read() in flight comes to its end.
        let rest = (job.bytes - bytes).min(crate::scenario::READ_MAX_BYTES);
        self.free_at = now + Time(self.read_ns(rest) / 2);
        match (bytes > 0).then(|| self.counted.read(bytes, now.0)) {
            Some(CountedRead::Data(bytes)) => {
                self.offset += bytes;
                Some((bytes, Time(passed)))
            }
            _ => None,
        }
    }
}

/// The device on the destination.
#[derive(Clone, Debug)]
pub(super) struct There {
    pub(super) load_bytes_per_s: u64,
    pub(super) resuming: bool,
    pub(super) stream: Session,
    pub(super) loaded: u64,
    pub(super) load_ns: u64,
    pub(super) free_at: Time,
    /// Loading initial data cost its fixed part already.
    pub(super) warm: bool,
    /// What is loaded counts in this life of the device; a reset begins another.
    pub(super) life: u64,
    /// It does something.
    pub(super) active: bool,
}

impl There {
    pub(super) fn load_ns(&self, bytes: u64) -> u64 {
        per(bytes, self.load_bytes_per_s)
    }
}

pub(super) fn per(bytes: u64, bytes_per_s: u64) -> u64 {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
    ns.min(u128::from(u64::MAX)) as u64
}

/// The uAPI's state for the brain's.
pub(super) fn state(call: DeviceCall) -> Option<DeviceState> {
    let DeviceCall::SetState(state) = call else { return None };
    Some(match state {
        Brain::Error => DeviceState::Error,
        Brain::Stop => DeviceState::Stop,
        Brain::Running => DeviceState::Running,
        Brain::StopCopy => DeviceState::StopCopy,
        Brain::Resuming => DeviceState::Resuming,
        Brain::RunningP2p => DeviceState::RunningP2p,
        Brain::PreCopy => DeviceState::PreCopy,
        Brain::PreCopyP2p => DeviceState::PreCopyP2p,
    })
}
