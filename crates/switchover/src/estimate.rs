//! The blackout, term by term, from what was measured in this migration.
//!
//! `blackout = pause + look + quiesce + stop + final sync + transfer + machine state + validate +
//! commit + start`, where *transfer* is the slowest of the shared link and each device's own pipeline
//! (backlog, save ∥ transfer ∥ load). A size nobody knows makes the total unknown, never zero.

use crate::message::{DeviceIndex, DeviceTelemetry};
use crate::time::Time;

/// Where a term's value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Basis {
    /// Assumed before anything was measured.
    Prior,
    /// Measured in this migration, so many times.
    Measured(u32),
    /// Nobody knows.
    Unknown,
}

/// A part of the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Term {
    /// Its name in reports.
    pub name: &'static str,
    /// How long; `None` when unknown.
    pub time: Option<Time>,
    /// Where that comes from.
    pub basis: Basis,
}

/// An estimate of what is still to come of a blackout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Estimate {
    /// The parts, in the order of events.
    pub terms: Vec<Term>,
}

impl Estimate {
    /// The sum; `None` when a part is unknown.
    pub fn total(&self) -> Option<Time> {
        self.terms.iter().try_fold(Time(0), |sum, term| term.time.map(|t| sum + t))
    }

    /// The sum of what is known.
    pub fn known(&self) -> Time {
        self.terms.iter().filter_map(|term| term.time).fold(Time(0), |sum, t| sum + t)
    }
}

/// How far the switchover is, for which terms still lie ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ahead {
    /// The guest runs.
    All,
    /// The vCPUs are paused and every device answered.
    FromQuiesce,
    /// P2P is quiescent.
    FromStop,
    /// Ready has come.
    FromCommit,
}

/// A duration that was seen some times: its worst recent value decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Seen {
    count: u32,
    value: Time,
    prior: Time,
}

impl Seen {
    const fn prior(value: Time) -> Self {
        Self { count: 0, value, prior: value }
    }

    /// Takes a new value; an old maximum fades by a quarter each time.
    fn note(&mut self, value: Time) {
        self.value = if self.count == 0 { value } else { value.max(self.faded()) };
        self.count = self.count.saturating_add(1);
    }

    fn faded(self) -> Time {
        Time(self.value.0 - self.value.0 / 4)
    }

    /// Time goes by without a new value: what was worse than the prior is believed less and less.
    fn fade(&mut self) {
        if self.value > self.prior {
            self.value = self.faded().max(self.prior);
        }
    }

    fn term(self, name: &'static str) -> Term {
        let basis = if self.count == 0 { Basis::Prior } else { Basis::Measured(self.count) };
        Term { name, time: Some(self.value), basis }
    }
}

/// Samples of a device's rate that are kept.
const RATE_SAMPLES: usize = 32;
/// A sample of fewer bytes says more of wake-ups than of the device.
const RATE_SAMPLE_MIN_BYTES: u64 = 64 * 1024;

/// What a device reads or loads: bytes over time of the recent samples without the one that slows them
/// down most. One stands out where a device does something once (the first configuration that it loads
/// makes it allocate what it needs): that time does not come again with every byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rate {
    count: u32,
    recent: [Sample; RATE_SAMPLES],
    prior_bytes_per_s: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Sample {
    bytes: u64,
    time: Time,
}

impl Rate {
    const fn prior(bytes_per_s: u64) -> Self {
        let recent = [Sample { bytes: 0, time: Time(0) }; RATE_SAMPLES];
        Self { count: 0, recent, prior_bytes_per_s: bytes_per_s }
    }

    fn note(&mut self, bytes: u64, time: Time) {
        if bytes < RATE_SAMPLE_MIN_BYTES || time.0 == 0 {
            return;
        }
        self.recent[self.count as usize % RATE_SAMPLES] = Sample { bytes, time };
        self.count = self.count.saturating_add(1);
    }

    fn bytes_per_s(&self) -> u64 {
        let there = (self.count as usize).min(RATE_SAMPLES);
        let rate_without = |left_out: Option<usize>| {
            let kept =
                self.recent[..there].iter().enumerate().filter(|(i, _)| Some(*i) != left_out);
            let (bytes, time) = kept.fold((0u64, Time(0)), |(bytes, time), (_, sample)| {
                (bytes.saturating_add(sample.bytes), time + sample.time)
            });
            bytes_per_s(bytes, time)
        };
        match there {
            0 => self.prior_bytes_per_s,
            1 => rate_without(None),
            _ => (0..there).map(|left_out| rate_without(Some(left_out))).max().unwrap_or(1),
        }
    }

    fn time_for(&self, bytes: u64) -> Time {
        time_at(bytes, self.bytes_per_s())
    }
}

/// Samples of the link that are kept.
const LINK_SAMPLES: usize = 8;
/// A sample of fewer bytes says more of wake-ups than of the link.
const LINK_SAMPLE_MIN_BYTES: u64 = 1 << 20;

/// What the link carries: the best of its recent rates. A channel is also slow while the
/// destination holds the channel up for a slow device, so a low sample need not be the link's doing.
/// Without new samples the recent ones go one by one, and what is left is the average of all there were:
/// passes that have become small sample nothing, and must not leave a bad moment standing for ever.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Link {
    count: u32,
    recent_bytes_per_s: [u64; LINK_SAMPLES],
    /// A sample came since the last fading.
    fresh: bool,
    total_bytes: u64,
    total_busy: Time,
    prior_bytes_per_s: u64,
}

impl Link {
    const fn prior(bytes_per_s: u64) -> Self {
        let recent_bytes_per_s = [0; LINK_SAMPLES];
        Self {
            count: 0,
            recent_bytes_per_s,
            fresh: false,
            total_bytes: 0,
            total_busy: Time(0),
            prior_bytes_per_s: bytes_per_s,
        }
    }

    fn note(&mut self, bytes: u64, busy: Time) {
        if bytes < LINK_SAMPLE_MIN_BYTES || busy.0 == 0 {
            return;
        }
        self.fresh = true;
        self.total_bytes = self.total_bytes.saturating_add(bytes);
        self.total_busy = self.total_busy + busy;
        let place = self.count as usize % LINK_SAMPLES;
        self.recent_bytes_per_s[place] = bytes_per_s(bytes, busy);
        self.count = self.count.saturating_add(1);
    }

    fn bytes_per_s(&self) -> u64 {
        match self.recent_bytes_per_s.iter().copied().max() {
            Some(best) if best > 0 => best,
            _ if self.total_busy.0 > 0 => bytes_per_s(self.total_bytes, self.total_busy),
            _ => self.prior_bytes_per_s,
        }
    }

    fn fade(&mut self) {
        if std::mem::take(&mut self.fresh) {
            return;
        }
        // From the place that is written next on, the first that is there is the oldest.
        let next = self.count as usize % LINK_SAMPLES;
        let (newer, older) = self.recent_bytes_per_s.split_at_mut(next);
        let oldest = older.iter_mut().chain(newer).find(|rate| **rate > 0);
        if let Some(oldest) = oldest {
            *oldest = 0;
        }
    }

    fn time_for(&self, bytes: u64) -> Time {
        time_at(bytes, self.bytes_per_s())
    }
}

/// At least 1, at most what fits.
fn bytes_per_s(bytes: u64, time: Time) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / u128::from(time.0.max(1));
    rate.clamp(1, u128::from(u64::MAX)) as u64
}

fn time_at(bytes: u64, bytes_per_s: u64) -> Time {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
    Time(ns.min(u128::from(u64::MAX)) as u64)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct DeviceMeter {
    read: Rate,
    load: Rate,
    look: Seen,
    quiesce: Seen,
    stop: Seen,
    /// What stop-copy would bring, in bytes; `None` when nobody knows.
    remaining_bytes: Option<u64>,
    sent_bytes: u64,
    loaded_bytes: u64,
    /// Loaded for sure, since it was acknowledged.
    acked_bytes: u64,
    load_ns: u64,
}

/// Which step a measured duration belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// From the request to pause to the last vCPU's stop.
    Pause,
    /// PRECOPY_INFO and size of one device.
    Look(DeviceIndex),
    /// A device's way into its P2P state.
    Quiesce(DeviceIndex),
    /// A device's way into STOP_COPY.
    Stop(DeviceIndex),
    /// Collecting dirty pages with the vCPUs stopped.
    FinalSync,
    /// Detach, save and send.
    MachineState,
    /// From StateEnd to Ready.
    Validate,
    /// One message there and one back.
    RoundTrip,
}

/// Collects what is measured and makes estimates of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Estimator {
    link: Link,
    pause: Seen,
    final_sync: Seen,
    machine_state: Seen,
    validate: Seen,
    round_trip: Seen,
    start: Seen,
    devices: Vec<DeviceMeter>,
    telemetry: bool,
    ram_dirty_bytes: u64,
    ram_dirty_bytes_per_s: u64,
}

impl Estimator {
    /// An estimator that has only priors.
    pub fn new(devices: usize) -> Self {
        let device = DeviceMeter {
            read: Rate::prior(1_000_000_000),
            load: Rate::prior(1_000_000_000),
            look: Seen::prior(Time::from_us(500)),
            quiesce: Seen::prior(Time::from_ms(2)),
            stop: Seen::prior(Time::from_ms(2)),
            remaining_bytes: Some(0),
            sent_bytes: 0,
            loaded_bytes: 0,
            acked_bytes: 0,
            load_ns: 0,
        };
        Self {
            link: Link::prior(1_000_000_000),
            pause: Seen::prior(Time::from_ms(1)),
            final_sync: Seen::prior(Time::from_ms(2)),
            machine_state: Seen::prior(Time::from_ms(2)),
            validate: Seen::prior(Time::from_ms(2)),
            round_trip: Seen::prior(Time::from_ms(1)),
            start: Seen::prior(Time::from_ms(2)),
            devices: vec![device; devices],
            telemetry: true,
            ram_dirty_bytes: 0,
            ram_dirty_bytes_per_s: 0,
        }
    }

    /// Notes how long a step took.
    pub fn took(&mut self, step: Step, time: Time) {
        let seen = match step {
            Step::Pause => Some(&mut self.pause),
            Step::FinalSync => Some(&mut self.final_sync),
            Step::MachineState => Some(&mut self.machine_state),
            Step::Validate => Some(&mut self.validate),
            Step::RoundTrip => Some(&mut self.round_trip),
            Step::Look(d) => self.meter(d).map(|m| &mut m.look),
            Step::Quiesce(d) => self.meter(d).map(|m| &mut m.quiesce),
            Step::Stop(d) => self.meter(d).map(|m| &mut m.stop),
        };
        if let Some(seen) = seen {
            seen.note(time);
        }
    }

    /// Makes old measurements count less: what only a switchover measures, and a link that no large pass
    /// measures any more. A step that was slow once would otherwise keep every later switchover from being
    /// tried, and so from measuring it anew.
    pub fn fade(&mut self) {
        let Self { pause, final_sync, machine_state, validate, .. } = self;
        [pause, final_sync, machine_state, validate].into_iter().for_each(Seen::fade);
        self.link.fade();
        for device in &mut self.devices {
            device.quiesce.fade();
            device.stop.fade();
        }
    }

    /// Notes bytes that the data channels carried while there was always something to send.
    pub fn link_sent(&mut self, bytes: u64, busy: Time) {
        self.link.note(bytes, busy);
    }

    /// Notes device bytes read and sent, and the time spent in read().
    pub fn device_read(&mut self, device: DeviceIndex, bytes: u64, read: Time) {
        if let Some(meter) = self.meter(device) {
            meter.sent_bytes = meter.sent_bytes.saturating_add(bytes);
            meter.read.note(bytes, read);
        }
    }

    /// A new stream of the device begins at offset 0.
    pub fn stream_begins(&mut self, device: DeviceIndex) {
        if let Some(meter) = self.meter(device) {
            (meter.sent_bytes, meter.loaded_bytes, meter.load_ns) = (0, 0, 0);
            meter.acked_bytes = 0;
        }
    }

    /// The device's stream is loaded up to `offset`.
    pub fn device_acked(&mut self, device: DeviceIndex, offset: u64) {
        if let Some(meter) = self.meter(device) {
            meter.acked_bytes = meter.acked_bytes.max(offset);
        }
    }

    /// Whether the destination tells what it loaded. Of one that does not, the backlog is unknown, which
    /// counts as nothing: else all that was ever sent would hold the switchover up for good.
    pub fn expect_telemetry(&mut self, telemetry: bool) {
        self.telemetry = telemetry;
    }

    /// Takes what the destination measured.
    pub fn telemetry(&mut self, telemetry: &DeviceTelemetry) {
        if let Some(meter) = self.meter(telemetry.device) {
            let bytes = telemetry.loaded_bytes.saturating_sub(meter.loaded_bytes);
            let ns = telemetry.load_ns.saturating_sub(meter.load_ns);
            meter.load.note(bytes, Time(ns));
            meter.loaded_bytes = telemetry.loaded_bytes;
            meter.load_ns = telemetry.load_ns;
        }
    }

    /// Sets what a device still holds; `None` when nobody knows.
    pub fn device_remaining(&mut self, device: DeviceIndex, bytes: Option<u64>) {
        if let Some(meter) = self.meter(device) {
            meter.remaining_bytes = bytes;
        }
    }

    /// Sets what a sync found dirty, and the rate since the sync before.
    pub fn ram_dirty(&mut self, bytes: u64, bytes_per_s: u64) {
        self.ram_dirty_bytes = bytes;
        self.ram_dirty_bytes_per_s = bytes_per_s;
    }

    /// RAM still to be sent, in bytes.
    pub fn ram_remaining_bytes(&self) -> u64 {
        self.ram_dirty_bytes
    }

    /// Link rate, in bytes per second.
    pub fn link_bytes_per_s(&self) -> u64 {
        self.link.bytes_per_s()
    }

    /// What the devices still hold, in bytes; `None` when one does not know.
    pub fn devices_remaining_bytes(&self) -> Option<u64> {
        self.devices
            .iter()
            .try_fold(0u64, |sum, m| m.remaining_bytes.map(|b| sum.saturating_add(b)))
    }

    /// What still lies ahead of the guest's start at the destination.
    pub fn estimate(&self, ahead: Ahead) -> Estimate {
        let mut terms = Vec::with_capacity(10);
        let slowest = |pick: fn(&DeviceMeter) -> Seen, name| {
            let slowest = self.devices.iter().map(pick).max_by_key(|seen| seen.value);
            slowest.map(|seen| seen.term(name))
        };
        if ahead == Ahead::All {
            terms.push(self.pause.term("pause"));
            terms.extend(slowest(|m| m.look, "look"));
        }
        if ahead <= Ahead::FromQuiesce {
            terms.extend(slowest(|m| m.quiesce, "quiesce"));
        }
        if ahead <= Ahead::FromStop {
            terms.extend(slowest(|m| m.stop, "stop"));
            terms.push(self.final_sync.term("final-sync"));
            terms.push(self.transfer(ahead));
            terms.push(self.machine_state.term("machine-state"));
            terms.push(self.validate.term("validate"));
        }
        let one_way = Seen { value: Time(self.round_trip.value.0 / 2), ..self.round_trip };
        terms.push(one_way.term("commit"));
        terms.push(self.start.term("start"));
        Estimate { terms }
    }

    fn transfer(&self, ahead: Ahead) -> Term {
        let mut ram = self.ram_dirty_bytes;
        if ahead == Ahead::All {
            // What the guest still dirties until it stands.
            let pause = u128::from(self.pause.value.0);
            let more = u128::from(self.ram_dirty_bytes_per_s) * pause / 1_000_000_000;
            ram = ram.saturating_add(more.min(u128::from(u64::MAX)) as u64);
        }
        let Some(devices) = self.devices_remaining_bytes() else {
            return Term { name: "transfer", time: None, basis: Basis::Unknown };
        };
        let mut time = self.link.time_for(ram.saturating_add(devices));
        for meter in &self.devices {
            let bytes = meter.remaining_bytes.unwrap_or(0);
            let backlog = match self.telemetry {
                true => meter.sent_bytes.saturating_sub(meter.loaded_bytes.max(meter.acked_bytes)),
                false => 0,
            };
            time = time.max(meter.read.time_for(bytes));
            time = time.max(meter.load.time_for(bytes.saturating_add(backlog)));
        }
        let count = self.link.count;
        let basis = if count == 0 { Basis::Prior } else { Basis::Measured(count) };
        Term { name: "transfer", time: Some(time), basis }
    }

    fn meter(&mut self, device: DeviceIndex) -> Option<&mut DeviceMeter> {
        self.devices.get_mut(usize::from(device.0))
    }
}

/// The most a device may plausibly hold, in bytes. Sizes near 2^63 and above were seen in the field
/// (protocol rule Z3); 1 TiB is beyond any device known.
pub const CREDIBLE_BYTES_MAX: u64 = 1 << 40;

/// Cross-checks MIG_DATA_SIZE with what PRECOPY_INFO holds: the size is the total that remains,
/// precopy included (Z2), so the larger one counts; an incredible or missing one is unknown.
pub fn remaining_bytes(stop_copy: Option<u64>, precopy: Option<u64>) -> Option<u64> {
    let credible = |bytes: Option<u64>| bytes.filter(|b| *b <= CREDIBLE_BYTES_MAX);
    match (credible(stop_copy), credible(precopy)) {
        (Some(total), Some(precopy)) => Some(total.max(precopy)),
        (total, None) if precopy.is_none() => total,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_moment_of_the_link_does_not_stand_for_ever() {
        let mut estimator = Estimator::new(0);
        estimator.link_sent(64 << 20, Time::from_ms(100));
        for _ in 0..LINK_SAMPLES {
            estimator.link_sent(1 << 20, Time::from_ms(100));
        }
        let bad = 10 << 20;
        assert_eq!(estimator.link_bytes_per_s(), bad);
        estimator.fade();
        // A link that goes on being sampled is what its samples say.
        estimator.link_sent(1 << 20, Time::from_ms(100));
        estimator.fade();
        assert_eq!(estimator.link_bytes_per_s(), bad);
        for _ in 0..LINK_SAMPLES - 1 {
            estimator.fade();
            assert_eq!(estimator.link_bytes_per_s(), bad);
        }
        estimator.fade();
        assert_eq!(estimator.link_bytes_per_s(), 73 << 20, "73 MiB in a second");
    }

    #[test]
    fn an_unknown_size_makes_the_total_unknown_and_never_zero() {
        let mut estimator = Estimator::new(2);
        assert!(estimator.estimate(Ahead::All).total().is_some());
        estimator.device_remaining(DeviceIndex(1), None);
        let estimate = estimator.estimate(Ahead::All);
        assert_eq!(estimate.total(), None);
        assert!(estimate.known() > Time(0));
    }

    #[test]
    fn sizes_are_claims() {
        assert_eq!(remaining_bytes(Some(10), Some(4)), Some(10));
        assert_eq!(remaining_bytes(Some(3), Some(4)), Some(4), "less than precopy holds");
        assert_eq!(remaining_bytes(Some(u64::MAX - 7), Some(4)), None, "garbage");
        assert_eq!(remaining_bytes(Some(5), Some(u64::MAX)), None, "garbage");
        assert_eq!(remaining_bytes(None, Some(4)), None, "precopy is no total");
        assert_eq!(remaining_bytes(Some(9), None), Some(9));
        assert_eq!(remaining_bytes(None, None), None);
    }

    #[test]
    fn a_channel_held_up_by_a_slow_device_does_not_slow_the_link() {
        let mut estimator = Estimator::new(1);
        estimator.link_sent(64 << 20, Time::from_ms(32));
        let rate = estimator.link_bytes_per_s();
        estimator.link_sent(2 << 20, Time::from_ms(1_400));
        assert_eq!(estimator.link_bytes_per_s(), rate);
        // A link that became slow shows once its better days are forgotten.
        for _ in 0..LINK_SAMPLES {
            estimator.link_sent(10_000_000, Time::from_ms(1_000));
        }
        assert_eq!(estimator.link_bytes_per_s(), 10_000_000);
    }

    #[test]
    fn what_a_device_does_once_is_no_rate_and_a_device_that_has_become_slow_is_believed() {
        let to_come = |e: &Estimator| {
            let estimate = e.estimate(Ahead::FromStop);
            estimate.terms.iter().find(|t| t.name == "transfer").and_then(|t| t.time).unwrap()
        };
        let chunk = 1 << 20;
        let loaded = |e: &mut Estimator, chunks: u64, load_ns: u64| {
            e.telemetry(&DeviceTelemetry {
                device: DeviceIndex(0),
                loaded_bytes: chunks * chunk,
                load_ns,
            });
        };
        let mut estimator = Estimator::new(1);
        estimator.device_remaining(DeviceIndex(0), Some(28 * chunk));
        let mut load_ns = 0;
        for chunks in 1..=40 {
            // The fourth and the last but one are held up, by far.
            load_ns += if chunks == 4 || chunks == 39 { 320_000_000 } else { 1_000_000 };
            loaded(&mut estimator, chunks, load_ns);
        }
        assert!(to_come(&estimator) < Time::from_ms(40), "{}", to_come(&estimator));
        // What goes on is no exception.
        for chunks in 41..=56 {
            load_ns += 100_000_000;
            loaded(&mut estimator, chunks, load_ns);
        }
        assert!(to_come(&estimator) > Time::from_ms(500), "{}", to_come(&estimator));
    }

    #[test]
    fn the_slowest_pipeline_decides_the_transfer() {
        let mut estimator = Estimator::new(2);
        estimator.link_sent(1 << 30, Time(1 << 30));
        estimator.device_remaining(DeviceIndex(0), Some(100_000_000));
        estimator.device_read(DeviceIndex(0), 1 << 20, Time((1 << 20) * 10));
        let transfer = |e: &Estimator| {
            let estimate = e.estimate(Ahead::FromStop);
            estimate.terms.iter().find(|t| t.name == "transfer").and_then(|t| t.time)
        };
        // 100 MB read at 0.1 GB/s, not sent at 1 GB/s.
        assert_eq!(transfer(&estimator), Some(Time::from_ms(1000)));
    }
}
