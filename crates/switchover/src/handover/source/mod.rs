//! The source's machine.
//!
//! Most states are left by `advance`, which looks at what is still missing and asks for it: an answer
//! that comes late, twice or out of order changes a flag and nothing else.
//!
//! | file | holds |
//! |---|---|
//! | `events.rs` | states, events, actions |
//! | `device.rs` | what is known of one device |
//! | `link.rs` | connections and messages |
//! | `precopy.rs` | setup, sessions, acknowledgements |
//! | `switchover.rs` | look, quiesce, stop-copy, ready, and **the point of no return** |
//! | `back.rs` | revoke, roll back, cancel, fail |

mod back;
mod device;
mod events;
mod link;
mod precopy;
mod switchover;

use device::Device;
pub use events::*;

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve, Rules};
use crate::message::{
    Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

/// How far Setup is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum SetupStep {
    Hello,
    Describe,
    Tracking,
    Devices,
}

/// How far StopCopy and AwaitReady are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum StopStep {
    Devices,
    JudgeSync,
    Sync,
    Ram,
    JudgeMachineState,
    MachineState,
    AwaitReady,
    Verify,
    Record,
    Judge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vcpus {
    Running,
    Pausing,
    Paused,
    Resuming,
    /// There is no guest: it died with an earlier process.
    Gone,
}

/// The source's machine. See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    setup: Arc<Setup>,
    rules: Rules,
    state: State,
    connection: Option<Connection>,
    /// The newest there ever was.
    seen: Connection,
    secret: Option<Id>,
    features: Features,
    attempt: Attempt,
    devices: Vec<Device>,
    vcpus: Vcpus,
    setup_step: SetupStep,
    stop_step: StopStep,
    tracking: bool,
    /// Dirty tracking was asked for, and there is no answer.
    tracking_asked: bool,
    /// Pages collected in this attempt may be missing at the destination.
    collected: bool,
    synced: bool,
    judging: bool,
    absorbing: bool,
    /// Interrupts are detached from the guest.
    detached: bool,
    reattaching: bool,
    /// Committing was asked to be recorded for this attempt.
    recorded: bool,
    /// Records under way, in order: an answer speaks of the first.
    recording: VecDeque<(Decision, Attempt)>,
    /// The destination rolled this attempt back, too.
    rolled_back_there: bool,
    /// The destination's window is over: a Commit is not obeyed any more.
    window_over: bool,
    /// What ends the migration once the guest runs again; `None` = go on with precopy.
    ending: Option<Outcome>,
    /// The destination was told.
    end_told: bool,
}

impl Source {
    /// A machine in Setup that waits for its first connection.
    pub fn new(setup: Setup) -> Self {
        Self::with_rules(setup, Rules::default())
    }

    /// The machine of a source whose process died after `committing` was recorded. The guest's memory died
    /// with it, so this one is in doubt for good unless the destination's answer or the operator ends that.
    /// It asks nothing: a question makes a prepared destination say `never`, and that may hold the only
    /// copy. A destination that has decided says so by itself on every new connection, which must be newer
    /// than `newest`.
    pub fn recovered(setup: Setup, secret: Id, attempt: Attempt, newest: Connection) -> Self {
        Self::recovered_with_rules(setup, secret, attempt, newest, Rules::default())
    }

    /// As [`recovered`](Self::recovered), for a check.
    pub fn recovered_with_rules(
        setup: Setup,
        secret: Id,
        attempt: Attempt,
        newest: Connection,
        rules: Rules,
    ) -> Self {
        Self {
            state: State::InDoubt,
            vcpus: Vcpus::Gone,
            secret: Some(secret),
            attempt,
            seen: newest,
            ..Self::with_rules(Setup { devices: Vec::new(), ..setup }, rules)
        }
    }

    /// As [`new`](Self::new), for a check.
    pub fn with_rules(setup: Setup, rules: Rules) -> Self {
        let device = |traits: &DeviceTraits| Device {
            traits: *traits,
            state: DeviceState::Running,
            pending: None,
            session: Session(0),
            sent: false,
            acked: false,
            unread: false,
            unknown: false,
            asked: false,
            stale_question: false,
            ended: false,
            restart: false,
            reset_meanwhile: false,
            lost: false,
        };
        Self {
            devices: setup.devices.iter().map(device).collect(),
            setup: Arc::new(setup),
            rules,
            state: State::Setup,
            connection: None,
            seen: Connection(0),
            secret: None,
            features: Features::default(),
            attempt: Attempt(0),
            vcpus: Vcpus::Running,
            setup_step: SetupStep::Hello,
            stop_step: StopStep::Devices,
            tracking: false,
            tracking_asked: false,
            collected: false,
            synced: false,
            judging: false,
            absorbing: false,
            detached: false,
            reattaching: false,
            recorded: false,
            recording: VecDeque::new(),
            rolled_back_there: false,
            window_over: false,
            ending: None,
            end_told: false,
        }
    }

    /// Where the machine is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The current or last attempt; 0 before the first.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// What both sides can do; known after Accept.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The migration's secret; known after Accept.
    pub fn secret(&self) -> Option<Id> {
        self.secret
    }

    /// The newest connection, while it is up.
    pub fn connection(&self) -> Option<Connection> {
        self.connection
    }

    /// The guest stands still, or is on its way there or back.
    pub fn stands_still(&self) -> bool {
        self.vcpus != Vcpus::Running
    }

    /// The device's current session; 0 before the first.
    pub fn session(&self, device: DeviceIndex) -> Session {
        self.devices.get(usize::from(device.0)).map_or(Session(0), |d| d.session)
    }

    /// The device's state, as far as the machine knows.
    pub fn device_state(&self, device: DeviceIndex) -> Option<DeviceState> {
        self.devices.get(usize::from(device.0)).map(|d| d.state)
    }

    /// Every session is acknowledged and nothing initial is known to be unread.
    pub fn all_ready(&self) -> bool {
        self.devices.iter().all(Device::ready)
    }

    /// Some device has unread initial data or an unacknowledged session.
    pub fn unread_initial(&self) -> bool {
        self.devices.iter().any(|d| d.has_session() && !d.ready())
    }

    /// Some device's last answer is unknown.
    pub fn unknown_answer(&self) -> bool {
        self.devices.iter().any(|d| d.has_session() && d.unknown)
    }

    /// A call on this device has not come back.
    pub fn is_calling(&self, device: DeviceIndex) -> bool {
        self.devices.get(usize::from(device.0)).is_some_and(|d| d.pending.is_some())
    }

    /// The device has a live PRE_COPY session that can be asked and read.
    pub fn can_ask(&self, device: DeviceIndex) -> bool {
        self.devices.get(usize::from(device.0)).is_some_and(|d| {
            d.has_session()
                && !d.restart
                && matches!(d.state, DeviceState::PreCopy | DeviceState::PreCopyP2p)
        })
    }

    /// Notes a question that the caller asks on its own while the guest runs (polls, the dry look).
    pub fn ask(&mut self, device: DeviceIndex, out: &mut Vec<Action>) {
        if self.can_ask(device) && !self.is_calling(device) {
            self.call(device, DeviceCall::Info, out);
        }
    }

    /// Takes an event and appends what to do about it.
    pub fn handle(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::LinkUp(connection) => self.link_up(connection, out),
            Event::LinkDown(connection, failure) => self.link_down(connection, failure, out),
            Event::Message(connection, message) => self.message(connection, message, out),
            Event::CallDone { device, call, result } => self.call_done(device, call, result, out),
            Event::Info { device, answer, offset } => self.info(device, answer, offset, out),
            Event::InitialRead { device, offset } => self.initial_read(device, offset, out),
            Event::StreamEnded { device } => {
                if self.state == State::StopCopy
                    && let Some(d) = self.device_mut(device)
                {
                    d.ended = true;
                }
            }
            Event::Switchover => self.switchover(out),
            Event::Paused(answer) => {
                self.vcpus = Vcpus::Paused;
                match answer {
                    Ok(()) => self.look(out),
                    Err(failure) => self.fail(failure, out),
                }
            }
            Event::Verdict(verdict) => self.verdict(verdict, out),
            Event::Recorded(answer) => self.recorded(answer, out),
            Event::DeviceReset(device) => self.device_reset(device, out),
            Event::GuestEnded(failure) | Event::Fail(failure) => self.fail(failure, out),
            Event::Cancel => self.cancel(out),
            Event::TakeBack(reason) => self.take_back(reason, out),
            Event::Operator(resolve) => self.resolve(resolve, out),
            Event::Timeout(limit) => self.timeout(limit, out),
            Event::TrackingStarted(answer) => {
                self.tracking_asked = false;
                self.answered(answer, out, |s, out| {
                    s.tracking = true;
                    if s.at_setup(SetupStep::Tracking) {
                        s.setup_step = SetupStep::Devices;
                        s.devices_to_precopy(out);
                    }
                });
            }
            Event::Resumed(answer) => {
                self.vcpus = Vcpus::Running;
                if self.state == State::RollingBack {
                    out.push(Action::Report(Notice::RolledBack(self.attempt)));
                }
                self.answered(answer, out, |_, _| ());
            }
            // What was collected is known only if the sync worked, on the way back, too.
            Event::Synced(sync, answer) => self.answered(answer, out, |s, out| match sync {
                Sync::Provisional => s.synced = true,
                Sync::Final if s.stops(StopStep::Sync) => s.send_final_ram(out),
                Sync::Final => {}
            }),
            // An attempt that is being rolled back does not need what could not be sent or saved for it.
            Event::RamSent(answer) if self.stops(StopStep::Ram) => {
                self.answered(answer, out, |s, out| {
                    s.judge_step(StopStep::JudgeMachineState, Point::MachineState, out);
                });
            }
            Event::MachineStateSaved(answer) if self.stops(StopStep::MachineState) => {
                self.answered(answer, out, |s, out| {
                    s.stop_step = StopStep::AwaitReady;
                    s.enter(State::AwaitReady, out);
                    out.push(Action::SendStateEnd(s.attempt));
                    out.push(Action::Arm(TimeLimit::Ready));
                });
            }
            Event::RamSent(_) | Event::MachineStateSaved(_) => {}
            Event::Reattached(answer) => {
                self.reattaching = false;
                self.detached = false;
                if let Err(failure) = answer {
                    // The guest resumes all the same: an interrupt less is better than no guest.
                    self.ending = Some(Outcome::Failed(failure));
                }
            }
            Event::Verified(answer) => {
                if self.state == State::AwaitReady && self.stop_step == StopStep::Verify {
                    self.answered(answer, out, Self::record_committing);
                }
            }
        }
        // A state whose work is already done is left at once.
        let mut before = None;
        while before != Some(self.state) {
            before = Some(self.state);
            self.advance(out);
        }
    }

    fn call(&mut self, index: DeviceIndex, call: DeviceCall, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        device.pending = Some(call);
        out.push(Action::Call(index, call));
    }

    fn call_done(
        &mut self,
        index: DeviceIndex,
        call: DeviceCall,
        result: CallResult,
        out: &mut Vec<Action>,
    ) {
        let Some(device) = self.device_mut(index) else { return };
        if device.pending == Some(call) {
            device.pending = None;
        }
        match (call, result) {
            (DeviceCall::SetState(_), CallResult::Done) if device.reset_meanwhile => {
                (device.state, device.reset_meanwhile) = (DeviceState::Error, false);
            }
            (DeviceCall::SetState(target), CallResult::Done) => {
                device.state = target;
                if target == DeviceState::StopCopy && self.state == State::StopCopy {
                    out.push(Action::Read(index));
                }
            }
            (DeviceCall::Reset, CallResult::Done) => {
                (device.state, device.restart) = (DeviceState::Running, true);
            }
            (DeviceCall::Info, _) => {
                device.asked = !std::mem::take(&mut device.stale_question);
                device.unknown = true;
            }
            (DeviceCall::SetState(_), CallResult::Failed { state, failure }) => {
                device.state = state.unwrap_or(DeviceState::Error);
                if self.backwards() {
                    // On the way back only one thing is left to try.
                    out.push(Action::Report(Notice::DeviceStateLost { device: index, failure }));
                    self.call(index, DeviceCall::Reset, out);
                } else {
                    self.fail(failure, out);
                }
            }
            (DeviceCall::Reset, CallResult::Failed { failure, .. }) => {
                device.lost = true;
                let lost = Notice::DeviceLost { device: index, failure: failure.clone() };
                out.push(Action::Report(lost));
                // A guest whose device is gone has nothing to move it with.
                self.fail(failure, out);
            }
        }
    }

    fn backwards(&self) -> bool {
        matches!(self.state, State::Revoking | State::RollingBack | State::Cancelling)
    }

    /// Takes the next step of the current state, if everything for it is there.
    fn advance(&mut self, out: &mut Vec<Action>) {
        match self.state {
            State::Setup => self.advance_setup(out),
            State::Precopy => self.advance_precopy(out),
            State::Look => self.advance_look(Point::Look, out),
            State::Quiesce => self.advance_quiesce(out),
            State::StopCopy => self.advance_stop_copy(out),
            State::Revoking => self.advance_revoking(out),
            State::RollingBack => self.advance_rolling_back(out),
            State::Cancelling => self.advance_cancelling(out),
            _ => {}
        }
    }

    fn answered(
        &mut self,
        answer: Answer,
        out: &mut Vec<Action>,
        then: impl FnOnce(&mut Self, &mut Vec<Action>),
    ) {
        match answer {
            Ok(()) => then(self, out),
            Err(failure) => self.fail(failure, out),
        }
    }

    fn stops(&self, step: StopStep) -> bool {
        self.state == State::StopCopy && self.stop_step == step
    }

    fn record(&mut self, decision: Decision, out: &mut Vec<Action>) {
        self.recording.push_back((decision, self.attempt));
        out.push(Action::Record(decision, self.attempt));
    }

    fn enter(&mut self, state: State, out: &mut Vec<Action>) {
        self.state = state;
        out.push(Action::Enter(state));
    }

    fn device_mut(&mut self, index: DeviceIndex) -> Option<&mut Device> {
        self.devices.get_mut(usize::from(index.0))
    }

    fn indices(&self) -> impl Iterator<Item = DeviceIndex> + use<> {
        (0..self.devices.len() as u16).map(DeviceIndex)
    }
}
