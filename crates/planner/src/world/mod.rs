//! The modelled world around both brains: what the engine does on sockets, devices and vCPUs, done on
//! amounts and in virtual time.
//!
//! ```text
//!   src::Source ──actions──▶ World ──events, later──▶ src::Source
//!                              │  queue by (time, order)
//!   dst::Destination ◀─────────┘
//! ```
//!
//! Both brains are the ones that ship, through the entry the engine uses. A worker (syncs, passes, pause,
//! machine state) and each device do one thing at a time; devices go side by side; the link is shared.
//!
//! | module | holds |
//! |---|---|
//! | `memory` | how much memory is dirty |
//! | `device` | a device on both hosts |
//! | `source` | what the source's actions do |
//! | `destination` | what the destination's do |

mod destination;
mod device;
mod memory;
mod source;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use device_model::{CountedDevice, Timing};
use switchover::Time;
use switchover::destination as dst;
use switchover::estimate::{History, Knowledge, Range};
use switchover::handover::{DeviceTraits, Outcome};
use switchover::message::{Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Side};
use switchover::source as src;
use switchover::trace::{End, Header, Recorder, Trace, TracedDevice};

use crate::random::Random;
use crate::run::{Ended, RunResult};
use crate::scenario::{self, Scenario};
use device::{Here, There};
use memory::DirtyMemory;

/// A run that does more than this goes round in circles.
const EVENTS_MAX: u64 = 400_000;
/// Nobody waits longer for a migration to end.
const TIME_MAX: Time = Time::from_ms(3_600_000);

#[derive(Debug)]
enum What {
    Source(src::Event),
    Destination(dst::Event),
    ToSource(u64, Message),
    ToDestination(u64, Message),
    Read(usize, u64),
    Arrived { device: usize, stream: u64, bytes: u64, life: u64 },
    Loaded { device: usize, stream: u64, bytes: u64, life: u64, took: Time },
    CallHere { device: usize, call: switchover::handover::DeviceCall, began: Time },
    PassDone { bytes: u64, busy: Time },
    FinalRamDone { bytes: u64, busy: Time, attempt: Attempt },
    Reconfigure(usize),
    LinkUp,
    Cut,
}

pub(crate) struct World<'a> {
    scenario: &'a Scenario,
    random: Random,
    now: Time,
    order: u64,
    queue: BinaryHeap<Reverse<(Time, u64, usize)>>,
    /// What is queued, by its slot.
    slots: Vec<Option<What>>,
    free: Vec<usize>,
    source: src::Source,
    destination: dst::Destination,
    memory: DirtyMemory,
    here: Vec<Here>,
    there: Vec<There>,
    traits: Vec<DeviceTraits>,
    link_bytes_per_s: u64,
    worker_free_at: Time,
    pass_extra: Time,
    pass_segment: Time,
    passing: bool,
    final_ram: bool,
    /// Last arrival of each direction: messages do not overtake.
    arrival: [Time; 2],
    connection: u64,
    dead: Vec<u64>,
    awaited: Option<(Attempt, Vec<u64>)>,
    /// Collected when the vCPUs stood: dirty again where the attempt does not count.
    attempt_bytes: u64,
    source_runs: bool,
    destination_runs: bool,
    pause_requested: Option<Time>,
    result: RunResult,
    ended: bool,
    broken: Option<String>,
    recorder: Option<Recorder>,
}

impl<'a> World<'a> {
    pub(crate) fn new(
        scenario: &'a Scenario,
        seed: u64,
        history: History,
    ) -> Result<Self, device_model::ModelError> {
        let mut random = Random::new(seed);
        let (mut here, mut there, mut traits) = (Vec::new(), Vec::new(), Vec::new());
        let mut known = Vec::new();
        for device in &scenario.devices {
            let profile = &device.profile;
            let counted = CountedDevice::new(profile, scenario::quirks(profile)?, Timing::OFF);
            let (read_bytes_per_s, load_bytes_per_s) = scenario::draw_rates(profile, &mut random);
            traits.push(DeviceTraits {
                pre_copy: profile.features.pre_copy.value && scenario.policy.reads_devices_early(),
                p2p: profile.features.p2p.value,
            });
            here.push(Here {
                profile: profile.clone(),
                counted,
                read_bytes_per_s,
                reading: false,
                job: None,
                jobs: 0,
                calling: false,
                free_at: Time(0),
                stream: Default::default(),
                offset: 0,
                worked_until: Time(0),
            });
            there.push(There {
                load_bytes_per_s,
                resuming: false,
                stream: Default::default(),
                loaded: 0,
                load_ns: 0,
                free_at: Time(0),
                warm: false,
                life: 0,
                active: false,
            });
            let mut knowledge = scenario::knowledge(&device.name, profile);
            // A size that the device itself tells, where it is not asked while it runs.
            if !traits.last().is_some_and(|t| t.pre_copy) {
                let claim = here.last().and_then(|h: &Here| h.counted.stop_copy_length());
                knowledge.stop_copy_bytes =
                    claim.filter(|bytes| *bytes <= switchover::estimate::CREDIBLE_BYTES_MAX);
            }
            known.push(knowledge);
        }
        let features = Features { telemetry: true, ..Features::default() };
        let setup = src::Setup {
            migration: Id(1),
            instance: Id(2),
            features,
            description: String::new(),
            devices: traits.clone(),
            dry_run: false,
        };
        let config = src::Config {
            downtime_limit: scenario.limit,
            mode: scenario.mode,
            policy: scenario.policy,
            level_permille: scenario.level_permille,
            max_total_time: scenario.max_total_time,
            rehearse: scenario.rehearse,
            auto_converge: scenario.auto_converge.then(src::AutoConverge::default),
            ..src::Config::default()
        };
        let host = scenario.hosts.clone();
        let link_bytes_per_s = random.within(host.link);
        let knowledge = Knowledge { devices: known, host, history };
        let phase = Time(random.below(10_000_000_000));
        let window = Time::from_ms(5_000);
        Ok(Self {
            source: src::Source::with(setup, config, scenario.memory.bytes, knowledge),
            destination: dst::Destination::new(Id(1), Id(3), Id(4), features, window),
            memory: DirtyMemory::new(scenario.memory, phase),
            scenario,
            random,
            now: Time(0),
            order: 0,
            queue: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            here,
            there,
            traits,
            link_bytes_per_s,
            worker_free_at: Time(0),
            pass_extra: Time(0),
            pass_segment: Time(0),
            passing: false,
            final_ram: false,
            arrival: [Time(0); 2],
            connection: 0,
            dead: Vec::new(),
            awaited: None,
            attempt_bytes: 0,
            source_runs: true,
            destination_runs: false,
            pause_requested: None,
            result: RunResult { seed, ..RunResult::default() },
            ended: false,
            broken: None,
            recorder: None,
        })
    }

    /// Runs to the end, and records on the way.
    pub(crate) fn run_traced(mut self) -> (RunResult, Trace) {
        let device = |(device, traits): (&scenario::Device, &DeviceTraits)| TracedDevice {
            id: device.name.clone(),
            kind: device.profile.name.clone(),
            pre_copy: traits.pre_copy,
            p2p: traits.p2p,
            precopy_info_v2: device.profile.features.precopy_info_v2.value,
            data_size: device.profile.features.data_size.value,
            dma_logging: device.profile.features.dma_logging.value,
            stop_copy_bytes: None,
        };
        let header = Header {
            machine: "modelled".to_owned(),
            memory_bytes: self.scenario.memory.bytes,
            limit_us: self.scenario.limit.0 / 1_000,
            policy: self.scenario.policy.name().to_owned(),
            devices: self.scenario.devices.iter().zip(&self.traits).map(device).collect(),
            ..Header::default()
        };
        self.recorder = Some(Recorder::new(header, self.now));
        let (result, recorder) = self.run_to_end();
        let us = |time: Time| time.0 / 1_000;
        let end = End {
            status: format!("{:?}", result.ended).to_lowercase(),
            downtime_us: result.downtime.map(us),
            total_us: us(result.total),
            terms: Vec::new(),
        };
        let trace = recorder.map(|recorder| recorder.finish(end)).unwrap_or_default();
        (result, trace)
    }

    /// Runs to the end.
    pub(crate) fn run(self) -> RunResult {
        self.run_to_end().0
    }

    fn run_to_end(mut self) -> (RunResult, Option<Recorder>) {
        let result = self.go();
        (result, self.recorder)
    }

    fn go(&mut self) -> RunResult {
        if let Err(refused) = self.source.admission() {
            self.result.ended = Ended::Refused;
            self.result.reason = Some(refused.to_string());
            return std::mem::take(&mut self.result);
        }
        for index in 0..self.here.len() {
            self.schedule_reconfiguration(index);
        }
        self.connect();
        let mut events = 0u64;
        while !self.ended && self.broken.is_none() {
            events += 1;
            let timers = [self.source.next_timer(), self.destination.next_timer()];
            let timer = timers.into_iter().flatten().min();
            let first = self.queue.peek().map(|Reverse((at, _, _))| *at);
            let Some(next) = first.into_iter().chain(timer).min() else {
                self.broken = Some("nothing is left to happen".into());
                break;
            };
            if next > TIME_MAX || events > EVENTS_MAX {
                break;
            }
            self.now = self.now.max(next);
            if first.is_some_and(|at| at <= self.now) {
                if let Some(Reverse((_, _, slot))) = self.queue.pop()
                    && let Some(what) = self.slots.get_mut(slot).and_then(Option::take)
                {
                    self.free.push(slot);
                    self.happen(what);
                }
            } else {
                self.tell_source(None);
                self.tell_destination(None);
            }
            self.check();
        }
        self.finish(events)
    }

    fn finish(&mut self, events: u64) -> RunResult {
        let status = self.source.status();
        let result = &mut self.result;
        result.events = events;
        result.total = self.now;
        result.attempts = status.attempts;
        result.revocations = status.revocations;
        result.roll_backs = status.roll_backs;
        result.absorptions = status.absorptions;
        result.overruns = status.overruns;
        result.broken = self.broken.take();
        if self.ended && self.memory.is_throttled() {
            result.broken.get_or_insert("the guest is slowed down for good".into());
        }
        if self.ended && status.blackouts.iter().any(|blackout| blackout.cause.is_empty()) {
            result.broken.get_or_insert("a blackout came to nothing for no reason".into());
        }
        if !self.ended {
            result.ended = match self.source.handover().state().is_committed() {
                true => Ended::InDoubt,
                false => Ended::Endless,
            };
            result.reason = Some(format!("still {} after {}", status.state.name(), self.now));
        }
        if self.source_runs == self.destination_runs && result.ended != Ended::InDoubt {
            let how = if self.source_runs { "twice" } else { "nowhere" };
            result.broken.get_or_insert(format!("the guest runs {how}"));
        }
        if result.ended == Ended::Completed {
            result.history = Some(self.source.history());
        }
        std::mem::take(&mut self.result)
    }

    /// Invariant 1, after every event.
    fn check(&mut self) {
        if self.source_runs && self.destination_runs {
            self.broken = Some("the guest runs twice".into());
        }
        let here = self.here.iter().any(|d| d.counted.state().is_active());
        if self.there.iter().any(|d| d.active) && here {
            self.broken = Some("a device runs on both sides".into());
        }
    }

    // --- time ---------------------------------------------------------------------------------

    fn at(&mut self, at: Time, what: What) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(what);
        self.order += 1;
        self.queue.push(Reverse((at.max(self.now), self.order, slot)));
    }

    fn draw(&mut self, range: Range) -> Time {
        Time(self.random.within(range))
    }

    fn one_way(&mut self) -> Time {
        Time(self.draw(self.scenario.hosts.round_trip).0 / 2)
    }

    fn connect(&mut self) {
        self.connection += 1;
        self.tell_source(Some(src::Event::LinkUp(Connection(self.connection))));
    }

    /// A message; those of a direction never overtake each other.
    fn send(&mut self, to_source: bool, connection: u64, message: Message) {
        let at = (self.now + self.one_way()).max(self.arrival[usize::from(to_source)]);
        self.arrival[usize::from(to_source)] = at;
        self.at(
            at,
            match to_source {
                true => What::ToSource(connection, message),
                false => What::ToDestination(connection, message),
            },
        );
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Source(event) => {
                self.before_source(&event);
                self.tell_source(Some(event));
            }
            What::Destination(event) => {
                if matches!(event, dst::Event::Started(Ok(()))) {
                    self.destination_runs = true;
                }
                self.tell_destination(Some(event));
            }
            What::ToSource(connection, _) | What::ToDestination(connection, _)
                if self.dead.contains(&connection) => {}
            What::ToSource(connection, message) => {
                if matches!(message, Message::Running { .. }) {
                    self.note_running();
                }
                self.tell_source(Some(src::Event::Message(Connection(connection), message)));
            }
            What::ToDestination(_, Message::Hello { features, connection, .. }) => {
                self.tell_destination(Some(dst::Event::LinkUp(connection, features)));
            }
            What::ToDestination(connection, message) => {
                self.tell_destination(Some(dst::Event::Message(Connection(connection), message)));
            }
            What::Read(device, job) => self.read_done(device, job),
            What::CallHere { device, call, began } => self.call_here(device, call, began),
            What::PassDone { bytes, busy } => self.pass_done(bytes, busy),
            What::FinalRamDone { bytes, busy, attempt } => {
                self.final_ram_done(bytes, busy, attempt)
            }
            What::Arrived { device, stream, bytes, life } => {
                self.arrived(device, stream, bytes, life)
            }
            What::Loaded { device, stream, bytes, life, took } => {
                self.loaded(device, stream, bytes, life, took);
            }
            What::Reconfigure(device) => {
                if self.source_runs {
                    self.reconfigure(device);
                }
                self.schedule_reconfiguration(device);
            }
            What::Cut => self.cut(),
            What::LinkUp => {
                self.connection += 1;
                let connection = Connection(self.connection);
                self.tell_source(Some(src::Event::LinkUp(connection)));
            }
        }
    }

    /// The guest runs there, and the source hears it.
    fn note_running(&mut self) {
        if let Some(requested) = self.pause_requested.take() {
            self.result.downtime = Some(self.now.since(requested));
        }
    }

    fn tell_source(&mut self, event: Option<src::Event>) {
        if let (Some(recorder), Some(event)) = (&mut self.recorder, &event) {
            recorder.event(self.now, event);
        }
        for action in self.source.handle(self.now, event) {
            if let Some(recorder) = &mut self.recorder {
                recorder.action(self.now, &action);
            }
            self.source_does(action);
        }
    }

    fn tell_destination(&mut self, event: Option<dst::Event>) {
        for action in self.destination.handle(self.now, event) {
            self.destination_does(action);
        }
    }

    // --- the guest ----------------------------------------------------------------------------

    fn schedule_reconfiguration(&mut self, device: usize) {
        let Some(every) = self.scenario.devices[device].reconfigured_every else { return };
        let after = -self.random.part().max(1e-9).ln() * every.0 as f64;
        self.at(self.now + Time(after as u64), What::Reconfigure(device));
    }

    fn reconfigure(&mut self, device: usize) {
        let range = &self.scenario.devices[device].profile.sizes.initial_bytes;
        let range = Range { min: range.min, typical: range.typical, max: range.max };
        let bytes = self.random.within(range).max(1);
        let now = self.now;
        if let Some(here) = self.here.get_mut(device) {
            here.work(now, true);
            here.counted.reconfigure(bytes);
        }
    }

    /// The link is cut; both sides hear of it in a moment, and it comes back later.
    fn cut(&mut self) {
        let connection = self.connection;
        self.dead.push(connection);
        let failure = || Failure::new(Side::Source, "the link is down");
        let heard = self.now + self.one_way();
        let down = src::Event::LinkDown(Connection(connection), failure());
        self.at(heard, What::Source(down));
        let down = dst::Event::LinkDown(Connection(connection), failure());
        self.at(heard, What::Destination(down));
    }

    fn index(device: DeviceIndex) -> usize {
        usize::from(device.0)
    }

    fn end(&mut self, outcome: Outcome) {
        self.ended = true;
        let (ended, reason) = match outcome {
            Outcome::Completed => (Ended::Completed, None),
            Outcome::Failed(failure) => (Ended::Stayed, Some(failure.to_string())),
            Outcome::Cancelled | Outcome::DryRun | Outcome::Abandoned => (Ended::Stayed, None),
        };
        (self.result.ended, self.result.reason) = (ended, reason);
    }
}
