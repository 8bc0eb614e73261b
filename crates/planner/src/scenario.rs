//! What is asked: a guest, its devices, the hosts between which it moves, a limit.

use device_model::{Quirks, Timing};
use device_profile::{Profile, Quantity};
use switchover::Time;
use switchover::decide::Mode;
use switchover::estimate::{
    DeviceBounds, DeviceKnowledge, DevicePrior, HostBounds, HostKnowledge, Range,
};
use switchover::policy::Policy;

/// A guest's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// All of it, in bytes.
    pub bytes: u64,
    /// What the guest writes, in bytes per second.
    pub dirty_bytes_per_s: u64,
    /// What it writes to, in bytes: pages of it are written again and again.
    pub working_set_bytes: u64,
    /// It breathes: this many times as much, for a part of each period.
    pub burst: Option<Burst>,
}

/// A workload that breathes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Burst {
    /// From one burst to the next.
    pub period: Time,
    /// How long one lasts.
    pub lasts: Time,
    /// How many times as much is written meanwhile.
    pub times: f64,
}

/// A device of the guest.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its id.
    pub name: String,
    /// Its kind.
    pub profile: Profile,
    /// The guest reconfigures it so often, on average; `None` = never.
    pub reconfigured_every: Option<Time>,
    /// In so many of 1000 switchovers the guest reconfigures it just before it stands.
    pub late_permille: u64,
}

impl Device {
    /// A device of a profile that its guest leaves alone.
    pub fn new(name: impl Into<String>, profile: Profile) -> Self {
        Self { name: name.into(), profile, reconfigured_every: None, late_permille: 0 }
    }
}

/// What goes wrong, beyond what the devices do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// In so many of 1000 migrations the link is cut between Commit and Running.
    pub cut_after_commit_permille: u64,
    /// How long it stays down.
    pub cut_lasts: Time,
}

/// A question to the planner.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The memory.
    pub memory: Memory,
    /// The devices.
    pub devices: Vec<Device>,
    /// The hosts and the link.
    pub hosts: HostKnowledge,
    /// How long the guest may stand still.
    pub limit: Time,
    /// How hard that is.
    pub mode: Mode,
    /// Whose rule decides.
    pub policy: Policy,
    /// The quantile that must fit, in permille.
    pub level_permille: u32,
    /// How long a migration may take.
    pub max_total_time: Option<Time>,
    /// Rehearse before the first switchover.
    pub rehearse: bool,
    /// Slow the guest down where that is what helps.
    pub auto_converge: bool,
    /// What goes wrong.
    pub faults: Faults,
}

impl Scenario {
    /// A guest of 4 GiB that writes 50 MB/s, moved over 10 Gbit/s within 300 ms and at most 30 s.
    pub fn new(devices: Vec<Device>) -> Self {
        let gib = 1 << 30;
        Self {
            memory: Memory {
                bytes: 4 * gib,
                dirty_bytes_per_s: 50_000_000,
                working_set_bytes: gib / 4,
                burst: None,
            },
            devices,
            hosts: hosts(1_250_000_000, Time::from_us(100)),
            limit: Time::from_ms(300),
            mode: Mode::BestEffort,
            policy: Policy::Bounded,
            level_permille: 990,
            max_total_time: Some(Time::from_ms(30_000)),
            rehearse: false,
            auto_converge: false,
            faults: Faults::default(),
        }
    }
}

fn us(min: u64, typical: u64, max: u64) -> Range {
    Range { min: min * 1_000, typical: typical * 1_000, max: max * 1_000 }
}

/// Two hosts and a link of `bytes_per_s`, with `round_trip`. Times of the hosts are those that were measured
/// on small machines (docs/downtime.md), their bounds what nothing measured came close to.
pub fn hosts(bytes_per_s: u64, round_trip: Time) -> HostKnowledge {
    let trip = round_trip.0.max(1_000);
    let round_trip = Range { min: trip / 2, typical: trip, max: trip.saturating_mul(20) };
    let host = HostKnowledge {
        pair: "planned".to_owned(),
        pause: us(50, 300, 5_000),
        final_sync: us(200, 1_500, 10_000),
        machine_state: us(200, 1_000, 8_000),
        validate: us(50, 300, 3_000),
        start: us(100, 600, 6_000),
        round_trip,
        link: Range { min: bytes_per_s / 5 * 4, typical: bytes_per_s / 100 * 95, max: bytes_per_s },
        bounds: HostBounds::default(),
    };
    let bounds = HostBounds {
        pause: Time(host.pause.max),
        resume: Time(host.pause.max),
        sync: Time(host.final_sync.max),
        machine_state: Time(host.machine_state.max),
        reattach: Time::from_ms(2),
        record: Time::from_ms(2),
        round_trip: Time(host.round_trip.max),
        start: Time(host.start.max),
    };
    HostKnowledge { bounds, ..host }
}

fn time(quantity: &Quantity) -> Range {
    let ns = |us: u64| us.saturating_mul(1_000);
    Range { min: ns(quantity.min), typical: ns(quantity.typical), max: ns(quantity.max) }
}

fn plain(quantity: &Quantity) -> Range {
    Range { min: quantity.min, typical: quantity.typical, max: quantity.max }
}

/// How long PRECOPY_INFO takes; no profile says.
pub(crate) const LOOK: Range = Range { min: 20_000, typical: 150_000, max: 3_000_000 };
/// The largest read, in bytes: what a call on the same device may have to wait for.
pub(crate) const READ_MAX_BYTES: u64 = 1 << 20;

/// What the brain is told about a device of this profile: its ranges as priors, its maxima as bounds.
pub fn knowledge(name: &str, profile: &Profile) -> DeviceKnowledge {
    let times = &profile.times;
    let (to_running, to_p2p) = (time(&times.to_running_us), time(&times.to_p2p_us));
    let stop = time(&times.to_stop_us).then(time(&times.save_fixed_us));
    let start = if profile.features.p2p.value { to_running.then(to_running) } else { to_running };
    let read = plain(&profile.rates.read_bytes_per_s);
    let chunk = READ_MAX_BYTES.saturating_mul(1_000_000_000) / read.min.max(1);
    let early = profile.features.pre_copy.value;
    let most = |range: Range| Some(Time(range.max));
    DeviceKnowledge {
        name: name.to_owned(),
        kind: profile.name.clone(),
        prior: DevicePrior {
            look: LOOK,
            quiesce: to_p2p,
            stop,
            validate: time(&times.load_warm_us),
            start,
            load_cold: time(&times.load_cold_us),
            read,
            load: plain(&profile.rates.load_bytes_per_s),
            dirty_bytes_per_s: profile.rates.dirty_bytes_per_s.typical,
        },
        bounds: DeviceBounds {
            quiesce: most(to_p2p),
            unquiesce: most(to_running),
            stop: most(stop),
            run: most(start),
            start: most(start),
            read: Some(Time(chunk)),
        },
        stop_copy_bytes: (!early).then_some(profile.sizes.total_bytes.typical),
        ..DeviceKnowledge::default()
    }
}

/// The device's own timing in a simulated call: anything within the profile's ranges.
pub(crate) fn draw_timing(profile: &Profile, random: &mut crate::Random) -> Timing {
    let mut timing = Timing::of_profile(profile);
    let times = &profile.times;
    timing.to_precopy_ns = random.within(time(&times.to_precopy_us));
    timing.to_p2p_ns = random.within(time(&times.to_p2p_us));
    timing.to_stop_ns = random.within(time(&times.to_stop_us));
    timing.to_running_ns = random.within(time(&times.to_running_us));
    timing.save_fixed_ns = random.within(time(&times.save_fixed_us));
    timing.load_cold_ns = random.within(time(&times.load_cold_us));
    timing.load_warm_ns = random.within(time(&times.load_warm_us));
    timing.reset_ns = random.within(time(&times.reset_us));
    timing
}

/// A profile's rates in one migration.
pub(crate) fn draw_rates(profile: &Profile, random: &mut crate::Random) -> (u64, u64) {
    let read = random.within(plain(&profile.rates.read_bytes_per_s));
    (read, random.within(plain(&profile.rates.load_bytes_per_s)))
}

/// The deviations of a profile that the model knows.
pub(crate) fn quirks(profile: &Profile) -> Result<Quirks, device_model::ModelError> {
    Quirks::from_names(profile.deviations.iter().map(|deviation| &deviation.value))
}
