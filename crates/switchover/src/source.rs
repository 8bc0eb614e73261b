//! The source's brain: handover, estimate and decide behind one entry, [`Source::handle`].
//!
//! The handover machine knows ids and states. What measures, polls and waits is here: passes over
//! memory, PRECOPY_INFO polled with back-off, the moment to try a switchover, time limits.
//!
//! ```text
//!   pass ─▶ sync ─▶ does it fit? ─no──▶ pass …
//!                        │yes
//!                        ▼
//!                    dry look (every device asked, drained) ─▶ fits, all acknowledged ─▶ switchover
//! ```

use std::collections::{BTreeMap, VecDeque};

use crate::decide::{self, Budget, Facts, Mode, RevocationLimits};
use crate::estimate::{self, Ahead, Estimate, Estimator, History, Knowledge, Range, Step, Stretch};
use crate::handover::source as handover;
use crate::handover::{DeviceCall, DeviceState, Resolve};
use crate::message::{Attempt, Connection, DeviceIndex, Failure, Id, Message};
use crate::policy::Policy;
use crate::time::Time;

mod promise;

pub use promise::Overrun;
use promise::Promise;

pub use handover::{
    Answer, CallResult, InfoAnswer, Notice, Point, Setup, State, Sync, TimeLimit, Verdict,
};

/// How often, while the guest runs, old measurements of switchovers lose weight.
const FADE_INTERVAL: Time = Time::from_ms(200);

/// Everything settable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// How long the guest may stand still.
    pub downtime_limit: Time,
    /// How hard that limit is.
    pub mode: Mode,
    /// The quantile at which a switchover must fit, in permille.
    pub level_permille: u32,
    /// Whose rule decides.
    pub policy: Policy,
    /// Bounds on switchovers that are taken back.
    pub revocations: RevocationLimits,
    /// After so long best effort goes whatever the limit, and strict ends.
    pub max_total_time: Option<Time>,
    /// Strict gives up when the limit has been out of reach for so long, even without memory to send.
    pub give_up_after: Time,
    /// Strict gives up when nothing has become better for so long.
    pub stall_after: Time,
    /// How long a moment that fits is waited over for a better one.
    pub patience: Time,
    /// Rehearse the devices' way into P2P and back once, before the first switchover.
    pub rehearse: bool,
    /// Shortest interval between two polls of PRECOPY_INFO.
    pub poll_min: Time,
    /// Longest interval between two polls of PRECOPY_INFO.
    pub poll_max: Time,
    /// Shortest interval between two passes over memory.
    pub pass_min: Time,
    /// Pause between a revoked switchover and the next try; doubles with each, at most 32-fold.
    pub back_off: Time,
    /// Limit of Hello and Describe.
    pub setup_limit: Time,
    /// Limit of a device's answer with the vCPUs stopped.
    pub look_limit: Time,
    /// Limit of Ready after everything was sent, and of the acknowledgement of absorbed data.
    pub ready_limit: Time,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            downtime_limit: Time::from_ms(300),
            mode: Mode::BestEffort,
            level_permille: 990,
            policy: Policy::Bounded,
            max_total_time: None,
            give_up_after: Time::from_ms(2_000),
            stall_after: Time::from_ms(20_000),
            patience: Time::from_ms(2_000),
            rehearse: false,
            revocations: RevocationLimits { count: 8, pause: Time::from_ms(1000) },
            poll_min: Time::from_ms(10),
            poll_max: Time::from_ms(200),
            pass_min: Time::from_ms(10),
            back_off: Time::from_ms(20),
            setup_limit: Time::from_ms(30_000),
            look_limit: Time::from_ms(1_000),
            ready_limit: Time::from_ms(30_000),
        }
    }
}

/// A device's answer to PRECOPY_INFO, with its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Info {
    /// It answered.
    Known {
        /// Unread initial bytes.
        initial_bytes: u64,
        /// Unread dirty bytes.
        dirty_bytes: u64,
        /// New initial data was announced.
        reinit: bool,
    },
    /// It cannot say.
    Unknown,
}

impl Info {
    /// Sizes that cannot be are as good as no answer (Z3): nobody will ever read that many bytes. New
    /// initial data is believed all the same.
    fn credible(self) -> Self {
        match self {
            Self::Known { initial_bytes, dirty_bytes, reinit: false }
                if initial_bytes.max(dirty_bytes) > estimate::CREDIBLE_BYTES_MAX =>
            {
                Self::Unknown
            }
            other => other,
        }
    }
}

/// What happened, with what was measured.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A control connection is up; it is the newest.
    LinkUp(Connection),
    /// A control connection is down.
    LinkDown(Connection, Failure),
    /// A message came.
    Message(Connection, Message),
    /// Dirty tracking started, or could not.
    TrackingStarted(Answer),
    /// A device call other than Info ended.
    CallDone {
        /// The device.
        device: DeviceIndex,
        /// The call.
        call: DeviceCall,
        /// How it ended.
        result: CallResult,
        /// How long it took.
        took: Time,
    },
    /// A device was asked.
    Info {
        /// The device.
        device: DeviceIndex,
        /// Its answer.
        info: Info,
        /// MIG_DATA_SIZE in bytes, where it answered.
        stop_copy_bytes: Option<u64>,
        /// Bytes of its stream read so far.
        offset: u64,
        /// How long the answer took.
        took: Time,
    },
    /// Device bytes were read and sent.
    Progress {
        /// The device.
        device: DeviceIndex,
        /// How many since the last such event.
        bytes: u64,
        /// Time spent in read().
        read: Time,
    },
    /// A read found nothing for now.
    NothingNow {
        /// The device.
        device: DeviceIndex,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// STOP_COPY was read to its end and sent.
    StreamEnded {
        /// The device.
        device: DeviceIndex,
    },
    /// The vCPUs are being asked to pause, from now on the guest's time counts.
    PauseRequested,
    /// The vCPUs are paused, or could not be.
    Paused(Answer),
    /// The vCPUs run again, or could not.
    Resumed(Answer),
    /// Dirty pages were collected between passes: so many bytes are to be sent.
    PassSynced {
        /// Dirty bytes.
        dirty_bytes: u64,
        /// Whether it worked.
        answer: Answer,
    },
    /// Dirty pages were collected with the vCPUs stopped: so many bytes are to be sent.
    Synced {
        /// Which sync.
        sync: Sync,
        /// Dirty bytes.
        dirty_bytes: u64,
        /// How long it took.
        took: Time,
        /// Whether it worked.
        answer: Answer,
    },
    /// A pass was sent, or could not be.
    PassSent(Answer),
    /// A sample of the link's rate: there was always something to send, memory or device data.
    LinkSample {
        /// Bytes that went out.
        bytes: u64,
        /// The time for them.
        busy: Time,
    },
    /// The last memory was sent.
    RamSent(Answer),
    /// The machine state is saved and sent.
    MachineStateSaved {
        /// How long it took.
        took: Time,
        /// Whether it worked.
        answer: Answer,
    },
    /// Interrupts are attached again.
    Reattached(Answer),
    /// The independent hashes agree, or not.
    Verified(Answer),
    /// A decision is written, or could not be.
    Recorded(Answer),
    /// The guest reset a device.
    DeviceReset(DeviceIndex),
    /// The guest powered off or died.
    GuestEnded(Failure),
    /// Somebody wants the guest to stay.
    Cancel,
    /// The switchover under way is to be taken back, for this reason; the migration goes on.
    TakeBack(Failure),
    /// The operator decides what doubt leaves open.
    Operator(Resolve),
    /// Somebody changed the downtime limit.
    Limit(Time),
    /// Something else failed.
    Fail(Failure),
}

/// What to do. `Judge`, `Arm` and `Disarm` of the handover are answered inside and never come out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// As the handover says.
    Handover(handover::Action),
    /// Collect dirty pages while the guest runs; answered by `PassSynced`.
    SyncPass,
    /// Send what was collected (all memory for pass 1); answered by `PassSent`.
    SendPass(u64),
    /// A verdict was reached: for logs and reports.
    Judged {
        /// Where.
        point: Point,
        /// The verdict.
        verdict: Verdict,
        /// The estimate it rests on.
        estimate: Estimate,
        /// Time since the request to pause.
        elapsed: Time,
    },
}

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
    /// Per device.
    pub devices: Vec<DeviceStatus>,
}

#[derive(Clone, Debug, Default)]
struct Device {
    status: DeviceStatus,
    stop_copy_bytes: Option<u64>,
    /// There is more to read, and a Read is under way.
    reading: bool,
    poll_at: Time,
    poll_interval: Time,
    /// Asked since the dry look began.
    looked: bool,
    /// End of the session's initial data in its stream.
    initial_end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// Nothing under way; the next sync is due at this time.
    Idle(Time),
    Syncing,
    /// Collected: send, or try to switch over.
    Synced,
    /// The dry look, since this time.
    Looking(Time),
    Sending,
}

/// The source's brain. See the [module](self).
#[derive(Clone, Debug)]
pub struct Source {
    config: Config,
    handover: handover::Source,
    estimator: Estimator,
    devices: Vec<Device>,
    pass: u64,
    pass_step: Pass,
    synced_at: Time,
    faded_at: Time,
    not_before: Time,
    timers: BTreeMap<TimeLimit, Time>,
    answer_limit: Time,
    pause_requested_at: Option<Time>,
    state_end_at: Option<Time>,
    hello_at: Option<Time>,
    /// The estimate the last switchover began with.
    tried: Estimate,
    revocations: u32,
    roll_backs: u32,
    absorptions: u32,
    revoked_pause: Time,
    promise: Promise,
    /// What the last blackout's pause began with, for the report of the promise.
    claimed_bytes: Vec<(u64, u64)>,
}

impl Source {
    /// A brain that waits for its first connection; `ram_bytes` is all of the guest's memory.
    pub fn new(setup: Setup, config: Config, ram_bytes: u64) -> Self {
        Self::with(setup, config, ram_bytes, Knowledge::default())
    }

    /// The same, with what is known beforehand.
    pub fn with(
        mut setup: Setup,
        config: Config,
        ram_bytes: u64,
        mut knowledge: Knowledge,
    ) -> Self {
        for traits in &mut setup.devices {
            traits.pre_copy &= config.policy.reads_devices_early();
        }
        let devices = vec![Device::default(); setup.devices.len()];
        knowledge.devices.resize_with(devices.len(), Default::default);
        for (traits, device) in setup.devices.iter().zip(&mut knowledge.devices) {
            if !traits.p2p {
                device.prior.quiesce = Range::exactly(0);
                device.bounds.quiesce = Some(Time(0));
                device.bounds.unquiesce = Some(Time(0));
            }
            if !traits.pre_copy {
                device.prior.look = Range::exactly(0);
            }
        }
        let mut estimator = Estimator::new(devices.len(), knowledge, config.level_permille);
        estimator.ram_dirty(ram_bytes, 0);
        let mut devices = devices;
        for (index, _) in setup.devices.iter().enumerate().filter(|(_, t)| !t.pre_copy) {
            // Nobody asks it while it runs: what was known before stands.
            let bytes = estimator.knowledge().devices[index].stop_copy_bytes;
            estimator.device_remaining(DeviceIndex(index as u16), bytes);
            (devices[index].status.remaining_bytes, devices[index].stop_copy_bytes) =
                (bytes, bytes);
        }
        Self {
            config,
            estimator,
            devices,
            handover: handover::Source::new(setup),
            pass: 0,
            pass_step: Pass::Idle(Time(0)),
            synced_at: Time(0),
            faded_at: Time(0),
            not_before: Time(0),
            timers: BTreeMap::new(),
            answer_limit: Time::from_ms(6_000),
            pause_requested_at: None,
            state_end_at: None,
            hello_at: None,
            tried: Estimate::default(),
            revocations: 0,
            roll_backs: 0,
            absorptions: 0,
            revoked_pause: Time(0),
            promise: Promise::default(),
            claimed_bytes: Vec::new(),
        }
    }

    /// A brain for a migration that an earlier process left in doubt, see
    /// [`handover::source::Source::recovered`](handover::Source::recovered).
    pub fn recovered(
        setup: Setup,
        config: Config,
        secret: Id,
        attempt: Attempt,
        newest: Connection,
    ) -> Self {
        let without = Setup { devices: Vec::new(), ..setup };
        let handover = handover::Source::recovered(without.clone(), secret, attempt, newest);
        Self { handover, ..Self::new(without, config, 0) }
    }

    /// The machine behind it, to look at.
    pub fn handover(&self) -> &handover::Source {
        &self.handover
    }

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
            attempts: self.handover.attempt().0,
            revocations: self.revocations,
            roll_backs: self.roll_backs,
            absorptions: self.absorptions,
            revoked_pause: self.revoked_pause,
            overruns: self.promise.overruns.clone(),
            devices: self.devices.iter().map(|d| d.status).collect(),
        }
    }

    /// When [`handle`](Self::handle) must be called at the latest, with or without an event.
    pub fn next_timer(&self) -> Option<Time> {
        let limits = self.timers.values().copied();
        let precopy =
            (self.handover.state() == State::Precopy).then(|| self.precopy_timer()).flatten();
        limits.chain(precopy).chain(self.take_back_at()).min()
    }

    /// Takes an event, or only the time, and says what to do.
    pub fn handle(&mut self, now: Time, event: Option<Event>) -> Vec<Action> {
        let mut out = Vec::new();
        if let Some(event) = event {
            self.take(now, event, &mut out);
        }
        self.strike(now, &mut out);
        self.enforce(now, &mut out);
        self.precopy(now, &mut out);
        out
    }

    /// The history with what this migration taught, for the next.
    pub fn history(&self) -> History {
        self.estimator.history(&self.promise.ended)
    }

    /// What is measured so far, to look at.
    pub fn estimator(&self) -> &Estimator {
        &self.estimator
    }

    // --- events -------------------------------------------------------------------------------

    fn take(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        let event = match event {
            Event::LinkUp(connection) => {
                self.hello_at = Some(now);
                handover::Event::LinkUp(connection)
            }
            Event::LinkDown(connection, failure) => handover::Event::LinkDown(connection, failure),
            Event::Message(connection, message) => {
                self.listen(now, &message);
                handover::Event::Message(connection, message)
            }
            Event::TrackingStarted(answer) => handover::Event::TrackingStarted(answer),
            Event::CallDone { device, call, result, took } => {
                self.call_took(device, call, took, result == CallResult::Done);
                handover::Event::CallDone { device, call, result }
            }
            Event::Info { device, info, stop_copy_bytes, offset, took } => {
                let info = info.credible();
                self.note_info(now, device, info, stop_copy_bytes, took, out);
                let answer = match info {
                    Info::Known { initial_bytes, reinit, .. } => {
                        InfoAnswer::Known { unread_initial: initial_bytes > 0, reinit }
                    }
                    Info::Unknown => InfoAnswer::Unknown,
                };
                handover::Event::Info { device, answer, offset }
            }
            Event::Progress { device, bytes, read } => {
                self.estimator.device_read(device, bytes, read);
                self.note_sent(now, bytes, false);
                if let (State::StopCopy, Some((_, had))) =
                    (self.handover.state(), self.claimed_bytes.get_mut(usize::from(device.0)))
                {
                    *had = had.saturating_add(bytes);
                }
                return self.note_read(device, bytes);
            }
            Event::NothingNow { device, offset } => {
                self.note_nothing_now(device);
                handover::Event::InitialRead { device, offset }
            }
            Event::StreamEnded { device } => {
                let known = self.claimed_bytes.get(usize::from(device.0)).copied();
                if let (State::StopCopy, Some((claimed, had))) = (self.handover.state(), known)
                    && claimed > 0
                {
                    self.estimator.stop_copy_had(device, had, claimed);
                }
                handover::Event::StreamEnded { device }
            }
            Event::PauseRequested => {
                self.pause_requested_at = Some(now);
                return;
            }
            Event::Paused(answer) => {
                if let Some(requested) = self.pause_requested_at {
                    let took = now.since(requested);
                    self.estimator.took(Step::Pause, took);
                    self.check_bound("pause of the vCPUs", None, took, Some(self.host().pause));
                }
                handover::Event::Paused(answer)
            }
            Event::Resumed(answer) => {
                if let Some(began) = self.promise.resume_at.take() {
                    let took = now.since(began);
                    self.check_bound("resume of the vCPUs", None, took, Some(self.host().resume));
                }
                if let Some(sent) = self.promise.commit_sent_at.take() {
                    let (took, bound) = (now.since(sent), self.estimator.commit_bound());
                    self.check_bound("answer to Commit", None, took, Some(bound));
                }
                if let Some(requested) = self.pause_requested_at.take() {
                    self.revoked_pause = self.revoked_pause + now.since(requested);
                }
                handover::Event::Resumed(answer)
            }
            Event::PassSynced { dirty_bytes, answer } => match answer {
                Ok(()) => return self.pass_synced(now, dirty_bytes),
                Err(failure) => handover::Event::Fail(failure),
            },
            Event::Synced { sync, dirty_bytes, took, answer } => {
                self.estimator.took(Step::FinalSync, took);
                self.estimator.ram_dirty(dirty_bytes, 0);
                self.check_bound("sync of dirty pages", None, took, Some(self.host().sync));
                handover::Event::Synced(sync, answer)
            }
            Event::LinkSample { bytes, busy } => {
                self.estimator.link_sent(bytes, busy);
                return;
            }
            Event::PassSent(answer) => {
                let bytes = self.estimator.ram_remaining_bytes();
                self.note_sent(now, bytes, true);
                self.pass_step = Pass::Idle((self.synced_at + self.config.pass_min).max(now));
                match answer {
                    Ok(()) => return,
                    Err(failure) => handover::Event::Fail(failure),
                }
            }
            Event::RamSent(answer) => handover::Event::RamSent(answer),
            Event::MachineStateSaved { took, answer } => {
                self.estimator.took(Step::MachineState, took);
                let bound = Some(self.host().machine_state);
                self.check_bound("machine state saved", None, took, bound);
                handover::Event::MachineStateSaved(answer)
            }
            Event::Reattached(answer) => handover::Event::Reattached(answer),
            Event::Verified(answer) => handover::Event::Verified(answer),
            Event::Recorded(answer) => handover::Event::Recorded(answer),
            Event::DeviceReset(device) => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.reading = false;
                }
                handover::Event::DeviceReset(device)
            }
            Event::GuestEnded(failure) => handover::Event::GuestEnded(failure),
            Event::Cancel => handover::Event::Cancel,
            Event::TakeBack(reason) => handover::Event::TakeBack(reason),
            Event::Operator(resolve) => handover::Event::Operator(resolve),
            Event::Limit(limit) => {
                self.config.downtime_limit = limit;
                return;
            }
            Event::Fail(failure) => handover::Event::Fail(failure),
        };
        self.drive(now, event, out);
    }

    /// Feeds the handover and answers what it asks of the brain, until it asks no more.
    fn drive(&mut self, now: Time, event: handover::Event, out: &mut Vec<Action>) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let mut actions = Vec::new();
            self.handover.handle(event, &mut actions);
            for action in actions {
                match action {
                    handover::Action::Judge(point) if self.fails_late(point) => {
                        let what =
                            "a device has new initial data after the decision to switch over";
                        let failure = Failure::new(crate::message::Side::Source, what);
                        next = Some(handover::Event::Fail(failure));
                    }
                    handover::Action::Judge(point) => {
                        let verdict = self.judge(now, point, out);
                        next = Some(handover::Event::Verdict(verdict));
                    }
                    handover::Action::Arm(limit) => self.arm(now, limit),
                    handover::Action::Disarm(limit) => {
                        self.timers.remove(&limit);
                    }
                    action => {
                        self.watch(now, &action);
                        out.push(Action::Handover(action));
                    }
                }
            }
        }
    }

    fn host(&self) -> estimate::HostBounds {
        self.estimator.knowledge().host.bounds
    }

    fn facts(&self) -> Facts {
        Facts {
            unread_initial: self.handover.unread_initial(),
            revocations: self.revocations,
            revoked_pause: self.revoked_pause,
            out_of_time: self.promise.out_of_time,
        }
    }

    fn judge(&mut self, now: Time, point: Point, out: &mut Vec<Action>) -> Verdict {
        let ahead = match point {
            Point::Look => Ahead::FromQuiesce,
            Point::Quiesce => Ahead::FromStop,
            Point::FinalSync => Ahead::FromStop,
            Point::MachineState => Ahead::FromCommit,
            Point::Commit => Ahead::FromCommit,
        };
        let estimate = self.estimator.estimate(ahead, Time(0));
        let elapsed = self.pause_requested_at.map_or(Time(0), |at| now.since(at));
        let budget = Budget { limit: self.config.downtime_limit, elapsed };
        let facts = self.facts();
        let verdict = match (self.config.policy, point) {
            (Policy::Bounded, Point::Quiesce) if self.promise.rehearsing => Verdict::Revoke,
            (Policy::Bounded, Point::Look) if self.promise.rehearsing && facts.unread_initial => {
                Verdict::Revoke
            }
            (Policy::Bounded, Point::Look) if self.promise.rehearsing => Verdict::Go,
            (Policy::Bounded, _) => {
                let (bounds, limits) = (self.bounds_at(point), self.config.revocations);
                let mode = self.config.mode;
                decide::decide(point, &estimate, budget, bounds, facts, limits, mode)
            }
            (_, Point::Look | Point::Quiesce) if facts.unread_initial => Verdict::Absorb,
            _ => Verdict::Go,
        };
        self.note_verdict(point, verdict, &estimate, elapsed);
        let whole = ahead != Ahead::FromStop || point == Point::Quiesce;
        if verdict == Verdict::Go && whole && point != Point::MachineState {
            self.promise.stretches.push((ahead, estimate.modelled, now));
        }
        if point == Point::Quiesce && verdict == Verdict::Go {
            let claim = |d: &Device| (d.status.remaining_bytes.unwrap_or(0), 0);
            self.claimed_bytes = self.devices.iter().map(claim).collect();
        }
        out.push(Action::Judged { point, verdict, estimate, elapsed });
        verdict
    }

    /// A peer that cannot take new initial data along ends the migration.
    fn fails_late(&self, point: Point) -> bool {
        // Once announced it fails, even where all of it was read and loaded since.
        let late = self.promise.late_reinit
            || self.handover.unread_initial()
            || self.handover.unknown_answer();
        self.config.policy.fails_on_late_initial_data()
            && matches!(point, Point::Look | Point::Quiesce)
            && late
    }

    fn arm(&mut self, now: Time, limit: TimeLimit) {
        let after = match limit {
            TimeLimit::Setup | TimeLimit::RolledBack => self.config.setup_limit,
            TimeLimit::Look => self.config.look_limit,
            TimeLimit::Absorb | TimeLimit::Ready => self.config.ready_limit,
            TimeLimit::Answer | TimeLimit::Query => self.answer_limit,
        };
        self.timers.insert(limit, now + after);
    }

    /// Lets every limit strike whose time has come.
    fn strike(&mut self, now: Time, out: &mut Vec<Action>) {
        while let Some(limit) = self.timers.iter().find(|(_, at)| **at <= now).map(|(l, _)| *l) {
            self.timers.remove(&limit);
            self.drive(now, handover::Event::Timeout(limit), out);
        }
    }

    // --- measuring ----------------------------------------------------------------------------

    fn listen(&mut self, now: Time, message: &Message) {
        match message {
            Message::Accept { .. } => {
                if let Some(at) = self.hello_at.take() {
                    self.estimator.took(Step::RoundTrip, now.since(at));
                }
            }
            Message::Ready { window_ms, .. } => {
                self.answer_limit = Time::from_ms(window_ms.saturating_add(1_000));
                if let Some(at) = self.state_end_at.take() {
                    self.estimator.took(Step::Validate, now.since(at));
                }
            }
            Message::Running { .. } => self.note_running(now),
            Message::Telemetry { devices, .. } => {
                devices.iter().for_each(|device| self.estimator.telemetry(device));
            }
            _ => {}
        }
    }

    /// The guest runs there: what was expected of the blackout can be compared.
    fn note_running(&mut self, now: Time) {
        let Some(sent) = self.promise.commit_sent_at.take() else { return };
        let (took, host) = (now.since(sent), self.host());
        let round_trip = self.estimator.round_trip();
        self.estimator.took(Step::Start, took.since(round_trip));
        let bound = self.estimator.commit_bound().since(host.record);
        self.check_bound("commit and start at the destination", None, took, Some(bound));
        // A verifying run stands still to be hashed, and one that absorbed waited for more than its terms.
        if !self.handover.features().verify {
            let stretches = std::mem::take(&mut self.promise.stretches);
            self.promise.ended = stretches
                .into_iter()
                .map(|(ahead, modelled, began)| Stretch { ahead, modelled, took: now.since(began) })
                .collect();
        }
    }

    fn call_took(&mut self, device: DeviceIndex, call: DeviceCall, took: Time, done: bool) {
        let DeviceCall::SetState(target) = call else { return };
        let back = !matches!(self.handover.state(), State::Quiesce | State::StopCopy);
        let declared = self.estimator.bounds(device);
        let (step, bound) = match target {
            _ if self.pause_requested_at.is_none() => return,
            DeviceState::PreCopyP2p => (Step::Quiesce(device), declared.quiesce),
            DeviceState::RunningP2p if !back => (Step::Quiesce(device), declared.quiesce),
            DeviceState::StopCopy => (Step::Stop(device), declared.stop),
            DeviceState::PreCopy => (Step::Unquiesce(device), declared.unquiesce),
            DeviceState::RunningP2p | DeviceState::Running => (Step::Run(device), declared.run),
            _ => return,
        };
        if done {
            self.estimator.took(step, took);
        }
        self.check_bound(&format!("{target:?}"), Some(device), took, bound);
    }

    fn note_info(
        &mut self,
        now: Time,
        index: DeviceIndex,
        info: Info,
        stop_copy_bytes: Option<u64>,
        took: Time,
        out: &mut Vec<Action>,
    ) {
        self.estimator.took(Step::Look(index), took);
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        device.looked = true;
        device.stop_copy_bytes = stop_copy_bytes;
        let precopy = match info {
            Info::Known { initial_bytes, dirty_bytes, .. } => {
                device.status.initial_bytes = Some(initial_bytes);
                device.status.dirty_bytes = Some(dirty_bytes);
                Some(initial_bytes.saturating_add(dirty_bytes))
            }
            Info::Unknown => {
                (device.status.initial_bytes, device.status.dirty_bytes) = (None, None);
                None
            }
        };
        let remaining = estimate::remaining_bytes(stop_copy_bytes, precopy);
        device.status.remaining_bytes = remaining;
        self.estimator.device_remaining(index, remaining);
        // Data, or no way to know: read. With nothing there the next question can wait longer.
        // Not for an answer that a guest's reset overtook: the next session is read once it has begun.
        let readable = self.handover.state() == State::Precopy && self.handover.can_ask(index);
        if precopy == Some(0) {
            device.poll_interval = Time(device.poll_interval.0.saturating_mul(2));
        } else {
            device.poll_interval = self.config.poll_min;
            if readable && !device.reading {
                device.reading = true;
                out.push(Action::Handover(handover::Action::Read(index)));
            }
        }
        device.poll_interval =
            device.poll_interval.clamp(self.config.poll_min, self.config.poll_max);
        device.poll_at = now + device.poll_interval;
    }

    fn note_read(&mut self, index: DeviceIndex, bytes: u64) {
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        if let Some(remaining) = &mut device.status.remaining_bytes {
            *remaining = remaining.saturating_sub(bytes);
            self.estimator.device_remaining(index, device.status.remaining_bytes);
        }
        for left in
            [&mut device.status.initial_bytes, &mut device.status.dirty_bytes].into_iter().flatten()
        {
            *left = left.saturating_sub(bytes);
        }
    }

    fn note_nothing_now(&mut self, index: DeviceIndex) {
        let Some(device) = self.devices.get_mut(usize::from(index.0)) else { return };
        device.reading = false;
    }

    /// Sees the handover's own actions go by.
    fn watch(&mut self, now: Time, action: &handover::Action) {
        match action {
            handover::Action::Read(index) => {
                if let Some(device) = self.devices.get_mut(usize::from(index.0)) {
                    device.reading = true;
                }
            }
            handover::Action::Send(Message::SessionBegin { device, .. }) => {
                self.estimator.stream_begins(*device);
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    (d.poll_interval, d.poll_at) = (self.config.poll_min, now);
                }
            }
            handover::Action::Send(Message::InitialDataSent { device, offset, .. }) => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.initial_end = *offset;
                }
            }
            handover::Action::Send(Message::Describe { .. }) => {
                self.estimator.expect_telemetry(self.handover.features().telemetry);
            }
            handover::Action::SendStateEnd(_) => self.state_end_at = Some(now),
            handover::Action::Send(Message::Commit { .. }) => {
                self.promise.commit_sent_at = Some(now);
            }
            handover::Action::Resume => self.promise.resume_at = Some(now),
            handover::Action::Enter(State::Look) => {
                (self.promise.committing, self.promise.late_reinit) = (false, false);
                self.promise.stretches = vec![(Ahead::All, self.tried.modelled, now)];
            }
            handover::Action::Enter(State::Precopy) => {
                self.promise.begun_at.get_or_insert(now);
            }
            handover::Action::Report(notice) => self.count(now, notice),
            _ => {}
        }
    }

    fn count(&mut self, now: Time, notice: &Notice) {
        match notice {
            Notice::Reinit { device, late, .. } => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.status.reinits += 1;
                    d.status.late_reinits += u32::from(*late);
                }
                self.promise.late_reinit |= *late;
            }
            Notice::Acked { device, .. } => {
                if let Some(d) = self.devices.get_mut(usize::from(device.0)) {
                    d.status.acks += 1;
                    self.estimator.device_acked(*device, d.initial_end);
                }
            }
            Notice::Absorbing(_) => {
                self.absorptions += 1;
                self.promise.stretches.clear();
            }
            Notice::RollingBack { .. } => self.roll_backs += 1,
            Notice::Revoked(_) | Notice::RolledBack(_) => {
                let back_off = self.config.back_off.0 << self.revocations.min(5);
                self.not_before = now + Time(back_off);
                self.revocations += 1;
                self.promise.rehearsed |= std::mem::take(&mut self.promise.rehearsing);
                self.pass_step = Pass::Idle(now);
            }
            _ => {}
        }
    }

    // --- precopy ------------------------------------------------------------------------------

    fn precopy_timer(&self) -> Option<Time> {
        let pass = match self.pass_step {
            Pass::Idle(at) => Some(at),
            Pass::Looking(since) => Some(since + self.config.look_limit),
            Pass::Syncing | Pass::Synced | Pass::Sending => None,
        };
        let polls = self.devices.iter().enumerate().filter_map(|(index, device)| {
            let index = DeviceIndex(index as u16);
            let free = self.handover.can_ask(index) && !self.handover.is_calling(index);
            free.then_some(device.poll_at)
        });
        polls.chain(pass).min()
    }

    /// What a running guest's migration does next: polls, passes, the dry look, the try.
    fn precopy(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.handover.state() != State::Precopy {
            return;
        }
        if let Some(failure) = self.hopeless(now) {
            return self.drive(now, handover::Event::Fail(failure), out);
        }
        self.poll(now, out);
        let step = self.pass_step;
        match step {
            // The first pass takes all memory: there is nothing to sync yet.
            Pass::Idle(_) if self.pass == 0 => {
                self.synced_at = now;
                self.send_pass(now, out);
            }
            Pass::Idle(at) if at <= now => {
                self.pass_step = Pass::Syncing;
                out.push(Action::SyncPass);
            }
            Pass::Synced if self.rehearsal_due(now) => {
                self.promise.rehearsing = true;
                self.pass_step = Pass::Idle(now);
                self.tried = self.estimator.estimate(Ahead::All, now.since(self.synced_at));
                self.drive(now, handover::Event::Switchover, out);
            }
            Pass::Synced if self.worth_a_try(now) => self.dry_look(now, out),
            Pass::Synced => self.next_pass(now, out),
            Pass::Looking(since) => {
                let looked = (0..self.devices.len()).all(|index| {
                    self.devices[index].looked || !self.handover.can_ask(DeviceIndex(index as u16))
                });
                if looked && self.worth_a_try(now) {
                    self.tried = self.estimator.estimate(Ahead::All, now.since(self.synced_at));
                    self.pass_step = Pass::Idle(now);
                    self.drive(now, handover::Event::Switchover, out);
                } else if looked || since + self.config.look_limit <= now {
                    self.next_pass(now, out);
                }
            }
            Pass::Idle(_) | Pass::Syncing | Pass::Sending => {}
        }
    }

    /// Every device is asked, and drained where it has something, while the guest runs.
    fn dry_look(&mut self, now: Time, out: &mut Vec<Action>) {
        self.pass_step = Pass::Looking(now);
        for index in 0..self.devices.len() {
            self.devices[index].looked = false;
            self.ask(now, DeviceIndex(index as u16), out);
        }
        if self.devices.is_empty() {
            self.precopy(now, out);
        }
    }

    fn poll(&mut self, now: Time, out: &mut Vec<Action>) {
        for index in 0..self.devices.len() {
            if self.devices[index].poll_at <= now {
                self.ask(now, DeviceIndex(index as u16), out);
            }
        }
    }

    fn ask(&mut self, now: Time, index: DeviceIndex, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.handover.ask(index, &mut actions);
        out.extend(actions.into_iter().map(Action::Handover));
        if let Some(device) = self.devices.get_mut(usize::from(index.0)) {
            device.poll_at = now + self.config.poll_max;
        }
    }

    fn next_pass(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.estimator.ram_remaining_bytes() == 0 {
            self.pass_step = Pass::Idle(now + self.config.pass_min);
        } else {
            self.send_pass(now, out);
        }
    }

    fn send_pass(&mut self, now: Time, out: &mut Vec<Action>) {
        self.pass += 1;
        self.pass_begins(now);
        self.pass_step = Pass::Sending;
        let bytes = self.estimator.ram_remaining_bytes();
        let message = Message::Pass { number: self.pass, bytes };
        out.push(Action::Handover(handover::Action::Send(message)));
        out.push(Action::SendPass(self.pass));
    }

    fn pass_synced(&mut self, now: Time, dirty_bytes: u64) {
        let interval = now.since(self.synced_at).0.max(1);
        let rate = u128::from(dirty_bytes) * 1_000_000_000 / u128::from(interval);
        self.estimator.ram_dirty(dirty_bytes, rate.min(u128::from(u64::MAX)) as u64);
        self.synced_at = now;
        if now.since(self.faded_at) >= FADE_INTERVAL {
            self.estimator.fade();
            self.faded_at = now;
        }
        self.pass_step = Pass::Synced;
    }
}
