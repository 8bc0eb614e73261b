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
//!
//! | file | holds |
//! |---|---|
//! | `event` | what goes in, what comes out |
//! | `precopy` | passes, polls, the dry look |
//! | `converge` | slows a guest down that dirties too fast |
//! | `echo` | the round trip of a message, asked now and then |
//! | `moment` | when a switchover is worth a try |
//! | `verdict` | go, absorb or revoke, at each point of it |
//! | `blackouts` | those that came to nothing, and why |
//! | `promise` | strict mode: admission, bounds, the timer, overruns |
//! | `give_up` | when a limit is out of reach, and what is said then |
//! | `measure` | what goes by is noted |
//! | `status` | a look from outside |

use std::collections::{BTreeMap, VecDeque};

use crate::decide::{self, Budget, Facts, Mode, RevocationLimits};
use crate::estimate::{self, Ahead, Estimate, Estimator, History, Knowledge, Range, Step, Stretch};
use crate::handover::source as handover;
use crate::handover::{DeviceCall, DeviceState, Resolve};
use crate::message::{Attempt, Connection, DeviceIndex, Failure, Id, Message};
use crate::policy::Policy;
use crate::time::Time;

mod blackouts;
mod converge;
mod echo;
mod event;
mod give_up;
mod measure;
mod moment;
mod precopy;
mod promise;
mod status;
mod verdict;

use blackouts::Blackouts;
pub use blackouts::{BLACKOUTS_MAX, Back, Blackout};
use converge::Converge;
pub use converge::{AutoConverge, Throttle};
use echo::Echoes;
pub use event::{Action, Event, Info};
use precopy::Pass;
pub use promise::Overrun;
use promise::Promise;
pub use status::{DeviceStatus, Status};

pub use handover::{
    Answer, CallResult, InfoAnswer, Notice, Point, Setup, State, Sync, TimeLimit, Verdict,
};

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
    /// When the limit has been out of reach for so long, even without memory to send, strict gives up and
    /// best effort takes the next good moment.
    pub give_up_after: Time,
    /// The same when nothing has become better for so long.
    pub stall_after: Time,
    /// How long a moment that fits is waited over for a better one.
    pub patience: Time,
    /// Rehearse the devices' way into P2P and back once, before the first switchover.
    pub rehearse: bool,
    /// Slow the vCPUs down where memory alone keeps the limit out of reach; `None` = never.
    pub auto_converge: Option<AutoConverge>,
    /// Shortest interval between two polls of PRECOPY_INFO.
    pub poll_min: Time,
    /// Longest interval between two polls of PRECOPY_INFO.
    pub poll_max: Time,
    /// Shortest interval between two passes over memory.
    pub pass_min: Time,
    /// Longest interval between two small ones while no switchover can be tried.
    pub pass_max: Time,
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
            auto_converge: None,
            revocations: RevocationLimits { count: 8, pause: Time::from_ms(1000) },
            poll_min: Time::from_ms(10),
            poll_max: Time::from_ms(200),
            pass_min: Time::from_ms(10),
            pass_max: Time::from_ms(100),
            back_off: Time::from_ms(20),
            setup_limit: Time::from_ms(30_000),
            look_limit: Time::from_ms(1_000),
            ready_limit: Time::from_ms(30_000),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Device {
    status: DeviceStatus,
    stop_copy_bytes: Option<u64>,
    /// There is more to read, and a Read is under way.
    reading: bool,
    /// Since the last answer: bytes came, or a read found nothing.
    got: bool,
    found_nothing: bool,
    /// The least unread initial data it told of since it is not ready.
    least_initial_bytes: Option<u64>,
    poll_at: Time,
    poll_interval: Time,
    /// Asked since the dry look began.
    looked: bool,
    /// End of the session's initial data in its stream.
    initial_end: u64,
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
    /// What the last sync of a pass took.
    sync_took: Option<Time>,
    faded_at: Time,
    not_before: Time,
    timers: BTreeMap<TimeLimit, Time>,
    answer_limit: Time,
    pause_requested_at: Option<Time>,
    /// When StateEnd went, and how long the devices went on loading from then on, by the last telemetry.
    state_end_at: Option<(Time, Time)>,
    telemetry_at: Time,
    hello_at: Option<Time>,
    echoes: Echoes,
    /// The estimate the last switchover began with.
    tried: Estimate,
    revocations: u32,
    roll_backs: u32,
    absorptions: u32,
    revoked_pause: Time,
    blackouts: Blackouts,
    converge: Converge,
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
        let mut devices = vec![Device::default(); setup.devices.len()];
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
        estimator.ram_total(ram_bytes);
        for (index, _) in setup.devices.iter().enumerate().filter(|(_, t)| !t.pre_copy) {
            // Nobody asks it while it runs: what was known before stands.
            let bytes = estimator.knowledge().devices[index].stop_copy_bytes;
            estimator.device_remaining(DeviceIndex(index as u16), bytes);
            estimator.loads_late(DeviceIndex(index as u16));
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
            sync_took: None,
            faded_at: Time(0),
            not_before: Time(0),
            timers: BTreeMap::new(),
            answer_limit: Time::from_ms(6_000),
            pause_requested_at: None,
            state_end_at: None,
            telemetry_at: Time(0),
            hello_at: None,
            echoes: Echoes::default(),
            tried: Estimate::default(),
            revocations: 0,
            roll_backs: 0,
            absorptions: 0,
            revoked_pause: Time(0),
            blackouts: Blackouts::default(),
            converge: Converge::default(),
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
        self.let_go(&mut out);
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
                self.echoes.begin();
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
                    let took = now.since(requested);
                    self.revoked_pause = self.revoked_pause + took;
                    self.blackouts.resumed(took);
                }
                handover::Event::Resumed(answer)
            }
            Event::PassSynced { dirty_bytes, exposed, answer } => match answer {
                Ok(()) => return self.pass_synced(now, dirty_bytes, exposed),
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
                self.converge.sent(bytes);
                self.pass_step = Pass::Idle(self.next_sync(now, bytes));
                match answer {
                    Ok(()) => return,
                    Err(failure) => handover::Event::Fail(failure),
                }
            }
            Event::Throttled(answer) => return self.converge.answered(&answer),
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
                if self.handover.stands_still() {
                    let name = self.estimator.device_name(device);
                    self.blackouts.blame(|| format!("the guest reset device {name}"));
                }
                handover::Event::DeviceReset(device)
            }
            Event::GuestEnded(failure) => handover::Event::GuestEnded(failure),
            Event::Cancel => handover::Event::Cancel,
            Event::TakeBack(reason) => {
                self.blackouts.blame(|| reason.to_string());
                handover::Event::TakeBack(reason)
            }
            Event::Operator(resolve) => handover::Event::Operator(resolve),
            Event::Limit(limit) => {
                self.config.downtime_limit = limit;
                return self.limit_changed();
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
                    handover::Action::Judge(point) => {
                        next = Some(match self.fails_late(point) {
                            Some(failure) => handover::Event::Fail(failure),
                            None => handover::Event::Verdict(self.judge(now, point, out)),
                        });
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
            if self.handover.state() == State::Revoking {
                self.blackouts.blame(|| match limit {
                    TimeLimit::Absorb => "new initial data was not loaded in time".to_owned(),
                    _ => "a device did not answer in time".to_owned(),
                });
            }
        }
    }
}
