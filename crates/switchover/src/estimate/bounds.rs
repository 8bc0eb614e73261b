//! What calls may take at most: for enforcement, not for expectation.
//!
//! A step of the switchover that cannot be interrupted is entered only if it and the way back from after
//! it fit by their bounds. Bounds of calls that follow each other add up (that is what sets them apart from
//! quantiles); devices are called in parallel, so of several devices the largest counts.

use super::knowledge::DeviceBounds;
use super::{DeviceMeter, Estimator};
use crate::message::DeviceIndex;
use crate::time::Time;

/// A bound from measurements needs so many of them …
const LEAST: usize = 8;
/// … and is the worst of them with half as much again, and this.
const MARGIN: Time = Time::from_ms(1);

/// A device that lacks a bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbounded {
    /// Which.
    pub device: DeviceIndex,
    /// The call.
    pub call: &'static str,
}

/// The bound of a call that has none is as good as for ever.
const FOR_EVER: Time = Time(u64::MAX / 16);

impl Estimator {
    /// Declared by the profile, else from what was measured.
    pub fn bounds(&self, device: DeviceIndex) -> DeviceBounds {
        self.devices.get(usize::from(device.0)).map(DeviceMeter::bounds).unwrap_or_default()
    }

    /// The first device that may not be migrated in strict mode for want of a bound.
    pub fn unbounded(&self) -> Option<Unbounded> {
        let index = (0u16..).map(DeviceIndex).zip(&self.devices);
        index.filter(|(_, meter)| !meter.knowledge.allow_unbounded).find_map(|(device, meter)| {
            meter.bounds().missing().map(|call| Unbounded { device, call })
        })
    }

    /// All devices into their P2P states.
    pub fn quiesce_bound(&self) -> Time {
        self.largest(|bounds| bounds.quiesce)
    }

    /// All devices into STOP_COPY.
    pub fn stop_bound(&self) -> Time {
        self.largest(|bounds| bounds.stop)
    }

    /// From Look back to a running guest: a sync under way, and the vCPUs.
    pub fn back_from_look_bound(&self) -> Time {
        self.host().sync + self.host().resume
    }

    /// From Quiesce back to a running guest.
    pub fn back_from_quiesce_bound(&self) -> Time {
        let read = self.largest(|bounds| bounds.read);
        self.host().sync.max(read + self.largest(|bounds| bounds.unquiesce)) + self.host().resume
    }

    /// From StopCopy or later back to a running guest; `detached` when interrupts were.
    pub fn back_from_stop_bound(&self, detached: bool) -> Time {
        let reattach = if detached { self.host().reattach } else { Time(0) };
        let devices = self.largest(|bounds| Some(bounds.read? + bounds.run?));
        devices + reattach + self.host().sync + self.host().resume
    }

    /// From the decision to commit to a guest that runs there, and the word of it here.
    pub fn commit_bound(&self) -> Time {
        let host = self.host();
        host.record + host.round_trip + host.start + self.largest(|bounds| bounds.start)
    }

    /// The way back to a running guest before any device has stopped, as likely longer as shorter; `quiesced`
    /// when the devices are in their P2P states. Not a bound: for a mode that enforces none.
    pub fn back_expected(&self, quiesced: bool) -> Time {
        let middle = |meter: &DeviceMeter| meter.unquiesce.spread().quantile(500);
        let devices = self.devices.iter().map(middle).max().filter(|_| quiesced);
        // The vCPUs' way on is like their way to a halt.
        Time(devices.unwrap_or(0).saturating_add(self.pause.spread().quantile(500)))
    }

    /// The pause of the vCPUs.
    pub fn pause_bound(&self) -> Time {
        self.host().pause
    }

    /// A sync with the vCPUs stopped.
    pub fn sync_bound(&self) -> Time {
        self.host().sync
    }

    /// Detach and save.
    pub fn machine_state_bound(&self) -> Time {
        self.host().machine_state
    }

    fn host(&self) -> super::HostBounds {
        self.knowledge.host.bounds
    }

    fn largest(&self, pick: impl Fn(DeviceBounds) -> Option<Time>) -> Time {
        let bound = |meter: &DeviceMeter| {
            let bound = pick(meter.bounds());
            // Who allows a device without bounds takes the risk that it takes longer.
            let missing = if meter.knowledge.allow_unbounded { Time(0) } else { FOR_EVER };
            bound.unwrap_or(missing)
        };
        self.devices.iter().map(bound).max().unwrap_or_default()
    }
}

impl DeviceMeter {
    fn bounds(&self) -> DeviceBounds {
        let declared = self.knowledge.bounds;
        let or = |declared: Option<Time>, worst: Option<Time>, calls: u64| {
            declared.or_else(|| worst.map(|w| Time((w.0 + w.0 / 2 + MARGIN.0) * calls)))
        };
        DeviceBounds {
            quiesce: or(declared.quiesce, self.quiesce.worst(LEAST), 1),
            unquiesce: or(declared.unquiesce, self.unquiesce.worst(LEAST), 1),
            stop: or(declared.stop, self.stop.worst(LEAST), 1),
            // One call on the way back, and there are two.
            run: or(declared.run, self.run.worst(LEAST), 2),
            ..declared
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{DeviceKnowledge, KindHistory, Knowledge};

    fn estimator(devices: Vec<DeviceKnowledge>) -> Estimator {
        Estimator::new(devices.len(), Knowledge { devices, ..Knowledge::default() }, 990)
    }

    fn bounded(ms: u64) -> DeviceKnowledge {
        let ms = Some(Time::from_ms(ms));
        let bounds =
            DeviceBounds { quiesce: ms, unquiesce: ms, stop: ms, run: ms, start: ms, read: ms };
        DeviceKnowledge { bounds, ..DeviceKnowledge::default() }
    }

    #[test]
    fn calls_in_a_row_add_up_and_of_parallel_ones_the_largest_counts() {
        let e = estimator(vec![bounded(10), bounded(30)]);
        assert_eq!(e.unbounded(), None);
        assert_eq!(e.quiesce_bound(), Time::from_ms(30));
        // A read and the way back, the interrupts, a sync, the vCPUs.
        assert_eq!(e.back_from_stop_bound(true), Time::from_ms(30 + 30 + 10 + 20 + 20));
        assert_eq!(e.back_from_stop_bound(false), Time::from_ms(30 + 30 + 20 + 20));
        assert_eq!(e.commit_bound(), Time::from_ms(10 + 20 + 20 + 30));
    }

    #[test]
    fn a_device_without_a_bound_is_named_unless_it_is_allowed() {
        let mut lacking = bounded(10);
        lacking.bounds.stop = None;
        let e = estimator(vec![bounded(10), lacking.clone()]);
        let named = Unbounded { device: DeviceIndex(1), call: "into STOP_COPY" };
        assert_eq!(e.unbounded(), Some(named));
        assert!(e.stop_bound() > Time::from_ms(1_000_000_000));
        lacking.allow_unbounded = true;
        let e = estimator(vec![bounded(10), lacking]);
        assert_eq!((e.unbounded(), e.stop_bound()), (None, Time::from_ms(10)));
    }

    #[test]
    fn what_was_measured_often_enough_is_a_bound() {
        let kind = KindHistory { stop: vec![4_000_000; 8], ..KindHistory::default() };
        let mut lacking = bounded(10);
        (lacking.bounds.stop, lacking.kind) = (None, "nic".into());
        let mut knowledge = Knowledge { devices: vec![lacking], ..Knowledge::default() };
        knowledge.history.add_kind("nic", &kind);
        let e = Estimator::new(1, knowledge, 990);
        assert_eq!((e.unbounded(), e.stop_bound()), (None, Time::from_ms(7)));
    }
}
