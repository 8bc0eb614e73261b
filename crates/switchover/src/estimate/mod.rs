//! The blackout, term by term, each term a distribution that names what it rests on.
//!
//! `blackout = pause + look + quiesce + stop + final sync + transfer + machine state + validate +
//! commit + start`, where *transfer* is the slower of what is sent (each device drained, then RAM, over one
//! shared link) and each device's loading. A size nobody knows makes the total unknown, never zero.
//!
//! Quantiles of a total come from joint samples of its terms, and once enough whole blackouts were seen
//! from their residuals; those of terms are never added up.
//!
//! ```text
//!   Knowledge ──▶ prior ─┐
//!   (profiles)           ├─▶ Meter, Rate ──▶ Spread ──▶ joint samples ──▶ Estimate
//!   History ─────▶ ──────┤                                    ▲
//!   this migration ▶ ────┘            whole blackouts ──▶ residuals
//! ```
//!
//! | module | holds |
//! |---|---|
//! | `term` | [`Estimate`], [`Term`], [`Basis`] |
//! | `spread` | quantile functions, and how they are drawn together |
//! | `meter` | a duration that is measured now and then |
//! | `rate` | rates of devices and of the link |
//! | `size` | sizes are claims |
//! | `joint` | totals from joint samples |
//! | `residual` | totals from whole blackouts |
//! | `bounds` | what calls may take at most, for enforcement |
//! | `knowledge` | what the brain is told beforehand |
//! | `history` | what it learns, as plain data |

mod bounds;
mod history;
mod joint;
mod knowledge;
mod meter;
mod rate;
mod residual;
mod size;
mod spread;
mod term;

pub use bounds::Unbounded;
pub use history::{History, KindHistory, PairHistory, WholeHistory};
pub use knowledge::{
    DeviceBounds, DeviceKnowledge, DevicePrior, HostBounds, HostKnowledge, Knowledge,
};
pub use size::{CREDIBLE_BYTES_MAX, remaining_bytes};
pub use spread::Range;
pub use term::{Basis, Estimate, Term};

use crate::message::{DeviceIndex, DeviceTelemetry};
use crate::time::Time;
use joint::{Amounts, Detail};
use meter::Meter;
use rate::{Link, Rate};
use residual::Residuals;

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

/// Which step a measured duration belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// From the request to pause to the last vCPU's stop.
    Pause,
    /// PRECOPY_INFO and size of one device.
    Look(DeviceIndex),
    /// A device's way into its P2P state.
    Quiesce(DeviceIndex),
    /// Its way out of it, back to PRE_COPY.
    Unquiesce(DeviceIndex),
    /// A device's way into STOP_COPY.
    Stop(DeviceIndex),
    /// One call on its way from STOP_COPY back into RUNNING.
    Run(DeviceIndex),
    /// Collecting dirty pages with the vCPUs stopped.
    FinalSync,
    /// Detach, save and send.
    MachineState,
    /// From StateEnd to Ready.
    Validate,
    /// One message there and one back.
    RoundTrip,
    /// From Commit to Running, beyond the round trip.
    Start,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct DeviceMeter {
    knowledge: DeviceKnowledge,
    read: Rate,
    load: Rate,
    look: Meter,
    quiesce: Meter,
    unquiesce: Meter,
    stop: Meter,
    run: Meter,
    load_cold: Meter,
    /// What stop-copy streams have, in permille of the claim before.
    size_permille: Meter,
    /// Nothing of it is loaded before it stops, so its cold loading is always still to come.
    loads_late: bool,
    /// The second look costs time too.
    asked_in_p2p: bool,
    /// What stop-copy would bring, in bytes; `None` when nobody knows.
    remaining_bytes: Option<u64>,
    /// The least that was seen of it.
    least_bytes: Option<u64>,
    sent_bytes: u64,
    loaded_bytes: u64,
    /// Loaded for sure, since it was acknowledged.
    acked_bytes: u64,
    load_ns: u64,
}

impl DeviceMeter {
    fn new(knowledge: DeviceKnowledge, history: Option<&KindHistory>) -> Self {
        let none = KindHistory::default();
        let h = history.unwrap_or(&none);
        let prior = &knowledge.prior;
        let truth = Range::exactly(1_000);
        Self {
            read: Rate::new(prior.read, &h.read),
            load: Rate::new(prior.load, &h.load),
            look: Meter::new(prior.look, &h.look),
            quiesce: Meter::new(prior.quiesce, &h.quiesce),
            unquiesce: Meter::new(prior.quiesce, &h.unquiesce),
            stop: Meter::new(prior.stop, &h.stop),
            run: Meter::new(prior.start, &h.run),
            load_cold: Meter::new(prior.load_cold, &[]),
            size_permille: Meter::new(truth, &h.size_permille),
            asked_in_p2p: prior.quiesce.max > 0 && prior.look.max > 0,
            knowledge,
            loads_late: false,
            remaining_bytes: Some(0),
            least_bytes: None,
            sent_bytes: 0,
            loaded_bytes: 0,
            acked_bytes: 0,
            load_ns: 0,
        }
    }

    fn backlog_bytes(&self) -> u64 {
        self.sent_bytes.saturating_sub(self.loaded_bytes.max(self.acked_bytes))
    }

    fn lessons(&self) -> KindHistory {
        let few = |meter: &Meter| meter.recent().iter().take(4).copied().collect();
        KindHistory {
            look: few(&self.look),
            quiesce: few(&self.quiesce),
            unquiesce: few(&self.unquiesce),
            stop: few(&self.stop),
            run: few(&self.run),
            read: self.read.measured().into_iter().collect(),
            load: self.load.measured().into_iter().collect(),
            size_permille: few(&self.size_permille),
        }
    }
}

/// A stretch of a blackout that ended well, for the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which.
    pub ahead: Ahead,
    /// What the joint samples expected of it.
    pub modelled: Time,
    /// What it took.
    pub took: Time,
}

/// Collects what is measured and makes estimates of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimator {
    knowledge: Knowledge,
    level_permille: u32,
    link: Link,
    pause: Meter,
    final_sync: Meter,
    machine_state: Meter,
    validate: Meter,
    round_trip: Meter,
    start: Meter,
    devices: Vec<DeviceMeter>,
    residuals: Residuals,
    telemetry: bool,
    ram_dirty_bytes: u64,
    ram_dirty_bytes_per_s: u64,
    ram_total_bytes: u64,
    /// Memory that the destination's host has given, and the time that took; `None` = nothing is said of it.
    populated: Option<(u64, Time)>,
}

impl Estimator {
    /// An estimator that has measured nothing; upper quantiles are those of `level_permille`.
    pub fn new(devices: usize, mut knowledge: Knowledge, level_permille: u32) -> Self {
        knowledge.devices.resize_with(devices, DeviceKnowledge::default);
        let (history, host) = (&knowledge.history, &knowledge.host);
        let meter = |d: &DeviceKnowledge| DeviceMeter::new(d.clone(), history.kind(&d.kind));
        let devices: Vec<_> = knowledge.devices.iter().map(meter).collect();
        let none = (PairHistory::default(), WholeHistory::default());
        let pair = history.pair(&host.pair).unwrap_or(&none.0);
        let whole = history.whole(&knowledge.whole_key());
        let residuals = Residuals::of(whole);
        let whole = whole.unwrap_or(&none.1);
        // The slowest device counts; the hosts' own part comes on top.
        let nothing = Range::exactly(0);
        let priors = || knowledge.devices.iter().map(|device| device.prior);
        let validate = host.validate.then(priors().map(|p| p.validate).fold(nothing, Range::or));
        let start = host.start.then(priors().map(|p| p.start).fold(nothing, Range::or));
        Self {
            link: Link::new(host.link, &pair.link),
            pause: Meter::new(host.pause, &pair.pause),
            final_sync: Meter::new(host.final_sync, &pair.final_sync),
            machine_state: Meter::new(host.machine_state, &pair.machine_state),
            validate: Meter::new(validate, &whole.validate),
            round_trip: Meter::new(host.round_trip, &pair.round_trip),
            start: Meter::new(start, &whole.start),
            devices,
            residuals,
            level_permille,
            telemetry: true,
            ram_dirty_bytes: 0,
            ram_dirty_bytes_per_s: 0,
            ram_total_bytes: 0,
            populated: None,
            knowledge,
        }
    }

    /// What was known beforehand.
    pub fn knowledge(&self) -> &Knowledge {
        &self.knowledge
    }

    /// The history with what this migration added, for the next.
    pub fn history(&self, stretches: &[Stretch]) -> History {
        let mut history = self.knowledge.history.clone();
        for meter in &self.devices {
            history.add_kind(&meter.knowledge.kind, &meter.lessons());
        }
        let few = |meter: &Meter| meter.recent().iter().take(4).copied().collect();
        let pair = PairHistory {
            pause: few(&self.pause),
            final_sync: few(&self.final_sync),
            machine_state: few(&self.machine_state),
            round_trip: few(&self.round_trip),
            link: self.link.measured().into_iter().collect(),
        };
        history.add_pair(&self.knowledge.host.pair, &pair);
        let mut whole = WholeHistory {
            validate: few(&self.validate),
            start: few(&self.start),
            ..WholeHistory::default()
        };
        for Stretch { ahead, modelled, took } in stretches {
            let ratio = residual::permille(took.0, modelled.0);
            whole.residuals_permille[*ahead as usize].push(ratio);
        }
        history.add_whole(&self.knowledge.whole_key(), &whole);
        history
    }

    /// Notes how long a step took.
    pub fn took(&mut self, step: Step, time: Time) {
        let meter = match step {
            Step::Pause => Some(&mut self.pause),
            Step::FinalSync => Some(&mut self.final_sync),
            Step::MachineState => Some(&mut self.machine_state),
            Step::Validate => Some(&mut self.validate),
            Step::RoundTrip => Some(&mut self.round_trip),
            Step::Start => Some(&mut self.start),
            Step::Look(d) => self.meter(d).map(|m| &mut m.look),
            Step::Quiesce(d) => self.meter(d).map(|m| &mut m.quiesce),
            Step::Unquiesce(d) => self.meter(d).map(|m| &mut m.unquiesce),
            Step::Stop(d) => self.meter(d).map(|m| &mut m.stop),
            Step::Run(d) => self.meter(d).map(|m| &mut m.run),
        };
        if let Some(meter) = meter {
            meter.note(time.0);
        }
    }

    /// Makes old measurements count less: what only a switchover measures, and a link that no large pass
    /// measures any more. A step that was slow once would otherwise keep every later switchover from being
    /// tried, and so from measuring it anew.
    pub fn fade(&mut self) {
        let Self { pause, final_sync, machine_state, validate, .. } = self;
        [pause, final_sync, machine_state, validate].into_iter().for_each(Meter::fade);
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

    /// The device has no PRE_COPY: nothing of it is loaded before it stops.
    pub fn loads_late(&mut self, device: DeviceIndex) {
        if let Some(meter) = self.meter(device) {
            meter.loads_late = true;
        }
    }

    /// The device's stream is loaded up to `offset`.
    pub fn device_acked(&mut self, device: DeviceIndex, offset: u64) {
        if let Some(meter) = self.meter(device) {
            meter.acked_bytes = meter.acked_bytes.max(offset);
        }
    }

    /// A stop-copy stream was read to its end: so much it was, and so much had been said.
    pub fn stop_copy_had(&mut self, device: DeviceIndex, bytes: u64, claimed_bytes: u64) {
        // Of little, the frame of the stream alone makes a multiple.
        const LITTLE: u64 = 256 << 10;
        if let Some(meter) = self.meter(device) {
            let ratio = residual::permille(bytes.max(LITTLE), claimed_bytes.max(LITTLE));
            meter.size_permille.note(u64::from(ratio));
        }
    }

    /// How long the slowest device goes on loading what was sent, by what the destination told last.
    pub fn loading(&self) -> Time {
        let backlogs = self.devices.iter().map(|meter| meter.load.time(meter.backlog_bytes()));
        backlogs.max().filter(|_| self.telemetry).unwrap_or_default()
    }

    /// Whether the destination tells what it loaded. Of one that does not, the backlog is unknown, which
    /// counts as nothing: else all that was ever sent would hold the switchover up for good.
    pub fn expect_telemetry(&mut self, telemetry: bool) {
        self.telemetry = telemetry;
    }

    /// Takes what the destination measured; says whether it has loaded more than it had.
    pub fn telemetry(&mut self, telemetry: &DeviceTelemetry) -> bool {
        let Some(meter) = self.meter(telemetry.device) else { return false };
        let bytes = telemetry.loaded_bytes.saturating_sub(meter.loaded_bytes);
        let ns = telemetry.load_ns.saturating_sub(meter.load_ns);
        meter.load.note(bytes, Time(ns));
        meter.loaded_bytes = telemetry.loaded_bytes;
        meter.load_ns = telemetry.load_ns;
        bytes > 0
    }

    /// Sets what a device still holds; `None` when nobody knows.
    pub fn device_remaining(&mut self, device: DeviceIndex, bytes: Option<u64>) {
        if let Some(meter) = self.meter(device) {
            meter.remaining_bytes = bytes;
            if let Some(bytes) = bytes {
                meter.least_bytes = Some(meter.least_bytes.map_or(bytes, |least| least.min(bytes)));
            }
        }
    }

    /// Sets what a sync found dirty, and the rate since the sync before.
    pub fn ram_dirty(&mut self, bytes: u64, bytes_per_s: u64) {
        self.ram_dirty_bytes = bytes;
        self.ram_dirty_bytes_per_s = bytes_per_s;
    }

    /// Sets how much memory the guest has.
    pub fn ram_total(&mut self, bytes: u64) {
        self.ram_total_bytes = bytes;
    }

    /// Notes how much of that the destination's host has given, and how long it took all in all.
    pub fn populated(&mut self, bytes: u64, spent: Time) {
        self.populated = Some((bytes, spent));
    }

    /// What the destination still has to be given by its host while it takes in `bytes` of RAM: of them all may
    /// be pages that were never written there. Nothing where it does not say what it has.
    fn populate_time(&self, bytes: u64) -> u64 {
        match self.populated {
            Some((there, spent)) if there > 0 => {
                let missing = bytes.min(self.ram_total_bytes.saturating_sub(there));
                let ns = u128::from(missing) * u128::from(spent.0) / u128::from(there);
                ns.min(u128::from(u64::MAX)) as u64
            }
            _ => 0,
        }
    }

    /// RAM still to be sent, in bytes.
    pub fn ram_remaining_bytes(&self) -> u64 {
        self.ram_dirty_bytes
    }

    /// What the guest dirtied last, in bytes per second.
    pub fn ram_dirty_bytes_per_s(&self) -> u64 {
        self.ram_dirty_bytes_per_s
    }

    /// One message there and one back, as expected.
    pub fn round_trip(&self) -> Time {
        Time(self.round_trip.spread().quantile(500))
    }

    /// Link rate, in bytes per second.
    pub fn link_bytes_per_s(&self) -> u64 {
        self.link.bytes_per_s()
    }

    /// What the link takes for so many bytes, as expected.
    pub fn link_time(&self, bytes: u64) -> Time {
        self.link.time(bytes)
    }

    /// What the devices still hold, in bytes; `None` when one does not know.
    pub fn devices_remaining_bytes(&self) -> Option<u64> {
        self.devices
            .iter()
            .try_fold(0u64, |sum, m| m.remaining_bytes.map(|b| sum.saturating_add(b)))
    }

    /// What still lies ahead of the guest's start at the destination, when the last sync of dirty pages
    /// was so long ago.
    pub fn estimate(&self, ahead: Ahead, unsynced: Time) -> Estimate {
        joint::estimate(self, ahead, self.amounts(unsynced), Detail::Terms)
    }

    /// The same without the terms, for a third of the cost.
    pub fn totals(&self, ahead: Ahead, unsynced: Time) -> Estimate {
        joint::estimate(self, ahead, self.amounts(unsynced), Detail::Totals)
    }

    /// How likely it is that what lies ahead takes no longer than `left`, in permille. What is unknown counts
    /// as nothing.
    pub fn odds_permille(&self, ahead: Ahead, unsynced: Time, left: Time) -> u32 {
        joint::odds_permille(self, ahead, self.amounts(unsynced), left)
    }

    fn amounts(&self, unsynced: Time) -> Amounts {
        let (ram_bytes, ram_bytes_per_s) = (self.ram_dirty_bytes, self.ram_dirty_bytes_per_s);
        Amounts { ram_bytes, ram_bytes_per_s, unsynced, least: false }
    }

    /// The least that can be hoped for: no memory left to send, and every device at the least it ever held.
    pub fn floor(&self) -> Estimate {
        joint::estimate(self, Ahead::All, Amounts::FLOOR, Detail::Terms)
    }

    /// The floor without its terms.
    pub fn floor_totals(&self) -> Estimate {
        joint::estimate(self, Ahead::All, Amounts::FLOOR, Detail::Totals)
    }

    /// What a device alone takes at the level of the promise: the floor's share that it is to blame for.
    pub fn alone(&self, device: DeviceIndex) -> Option<Time> {
        let mut alone = self.clone();
        let meter = alone.devices.get(usize::from(device.0))?.clone();
        let nothing = || Meter::new(Range::exactly(0), &[]);
        let prior = meter.knowledge.prior;
        (alone.validate, alone.start) =
            (Meter::new(prior.validate, &[]), Meter::new(prior.start, &[]));
        (alone.pause, alone.final_sync) = (nothing(), nothing());
        (alone.machine_state, alone.round_trip) = (nothing(), nothing());
        (alone.devices, alone.residuals) = (vec![meter], Residuals::default());
        alone.floor().upper()
    }

    /// A device's name, for messages.
    pub fn device_name(&self, device: DeviceIndex) -> &str {
        self.devices.get(usize::from(device.0)).map_or("", |meter| &meter.knowledge.name)
    }

    fn meter(&mut self, device: DeviceIndex) -> Option<&mut DeviceMeter> {
        self.devices.get_mut(usize::from(device.0))
    }
}

#[cfg(test)]
mod tests;
