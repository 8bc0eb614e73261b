//! The source's machine.
//!
//! Most states are left by [`Source::advance`], which looks at what is still missing and asks for it:
//! an answer that comes late, twice or out of order changes a flag and nothing else.

use super::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome};
use crate::message::{
    Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Connecting and comparing.
    Setup,
    /// The guest runs, memory and devices are being copied.
    Precopy,
    /// Switching over: the vCPUs stop, devices are asked once more. Revocable.
    Look,
    /// Devices stop peer-to-peer DMA. Revocable.
    Quiesce,
    /// Devices stopped, the rest is being sent.
    StopCopy,
    /// Everything was sent.
    AwaitReady,
    /// Commit may have been sent: never back on its own guess.
    Committed,
    /// No answer to Commit, and the link is gone.
    InDoubt,
    /// The guest runs at the destination.
    Done,
    /// Back to Precopy from Look or Quiesce; no data is thrown away.
    Revoking,
    /// Back to a running guest from StopCopy or later.
    RollingBack,
    /// Ending the migration under a running guest.
    Cancelling,
    /// Ended, the guest runs here.
    Failed,
    /// Ended as wished, the guest runs here.
    Cancelled,
}

impl State {
    /// The name that `status`, logs and holds use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Look => "look",
            Self::Quiesce => "quiesce",
            Self::StopCopy => "stop-copy",
            Self::AwaitReady => "await-ready",
            Self::Committed => "committed",
            Self::InDoubt => "in-doubt",
            Self::Done => "done",
            Self::Revoking => "revoking",
            Self::RollingBack => "rolling-back",
            Self::Cancelling => "cancelling",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The migration is over.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// Commit may have been sent and no answer has come.
    pub fn is_committed(self) -> bool {
        matches!(self, Self::Committed | Self::InDoubt)
    }
}

/// The answer to a question that can be refused.
pub type Answer = Result<(), Failure>;

/// How a device call ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallResult {
    /// As wanted.
    Done,
    /// Failed; the device is now in `state`, `None` when it could not even be asked.
    Failed {
        /// Where it is now.
        state: Option<DeviceState>,
        /// Why.
        failure: Failure,
    },
}

/// A device's answer to PRECOPY_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InfoAnswer {
    /// It answered.
    Known {
        /// initial_bytes is not 0.
        unread_initial: bool,
        /// REINIT was set.
        reinit: bool,
    },
    /// It has no PRECOPY_INFO, or the query failed.
    Unknown,
}

/// Which sync of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sync {
    /// vCPUs stopped, devices still write.
    Provisional,
    /// Nobody writes any more.
    Final,
}

/// Where a verdict is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// vCPUs stopped, every device asked.
    Look,
    /// Devices P2P-quiescent, asked again.
    Quiesce,
    /// Ready has come.
    Commit,
}

/// The answer to [`Action::Judge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Go on.
    Go,
    /// Read, send and load the new initial data with the vCPUs stopped.
    Absorb,
    /// Back: the vCPUs resume.
    Revoke,
}

/// A time limit; the caller knows how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TimeLimit {
    /// Hello and Describe.
    Setup,
    /// A device's answer with the vCPUs stopped.
    Look,
    /// Ready after everything was sent.
    Ready,
    /// Running or Never after Commit.
    Answer,
}

/// What happened.
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
    /// A device call ended.
    CallDone {
        /// The device.
        device: DeviceIndex,
        /// The call.
        call: DeviceCall,
        /// How it ended.
        result: CallResult,
    },
    /// [`DeviceCall::Info`] was answered.
    Info {
        /// The device.
        device: DeviceIndex,
        /// Its answer.
        answer: InfoAnswer,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// A read found nothing more for now: all initial data lies before `offset`.
    InitialRead {
        /// The device.
        device: DeviceIndex,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// STOP_COPY: everything was read and sent.
    StreamEnded {
        /// The device.
        device: DeviceIndex,
    },
    /// Precopy is good enough: try to switch over.
    Switchover,
    /// The vCPUs are paused, or could not be.
    Paused(Answer),
    /// The vCPUs run again, or could not.
    Resumed(Answer),
    /// Dirty pages are synced.
    Synced(Sync, Answer),
    /// The last memory was sent.
    RamSent(Answer),
    /// The machine state is saved and sent.
    MachineStateSaved(Answer),
    /// Interrupts are attached again.
    Reattached(Answer),
    /// The independent hashes agree, or not.
    Verified(Answer),
    /// The answer to [`Action::Judge`].
    Verdict(Verdict),
    /// The decision is written, or could not be.
    Recorded(Answer),
    /// The guest reset a device.
    DeviceReset(DeviceIndex),
    /// The guest powered off or died.
    GuestEnded(Failure),
    /// Somebody wants the guest to stay.
    Cancel,
    /// Something else failed.
    Fail(Failure),
    /// A limit armed by [`Action::Arm`] struck.
    Timeout(TimeLimit),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A state is entered; comes before the actions of that state.
    Enter(State),
    /// Send on the newest connection.
    Send(Message),
    /// Start every source of dirty pages; answered by `TrackingStarted`.
    StartTracking,
    /// Stop them.
    StopTracking,
    /// Call a device; answered by `CallDone` or `Info`.
    Call(DeviceIndex, DeviceCall),
    /// Read and send a device's stream: in PRE_COPY until there is nothing now, in STOP_COPY to its end.
    Read(DeviceIndex),
    /// Stop reading; chunks under way are still sent.
    StopReading(DeviceIndex),
    /// Pause the vCPUs; answered by `Paused`.
    Pause,
    /// Resume them; answered by `Resumed`.
    Resume,
    /// Collect dirty pages; answered by `Synced`.
    Sync(Sync),
    /// Mark again what was collected and not sent, or sent in an attempt that does not count.
    RestoreDirty,
    /// Send all collected pages; answered by `RamSent`.
    SendFinalRam,
    /// Detach interrupts, save and send the machine state; answered by `MachineStateSaved`.
    SaveMachineState,
    /// Undo the detaching; answered by `Reattached`.
    Reattach,
    /// Send StateEnd with what every channel and device carried.
    SendStateEnd(Attempt),
    /// Hash memory and devices here and there and compare; answered by `Verified`.
    Verify(Attempt),
    /// Decide; answered by `Verdict`.
    Judge(Point),
    /// Write a decision down; answered by `Recorded`.
    Record(Decision, Attempt),
    /// Start a time limit.
    Arm(TimeLimit),
    /// Forget it.
    Disarm(TimeLimit),
    /// Connect again and again until the doubt is resolved.
    Reconnect,
    /// Tell people.
    Report(Notice),
    /// The end.
    Finish(Outcome),
}

/// What people are told, apart from states.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// New initial data was announced; `late` when the vCPUs were already stopped.
    Reinit {
        /// The device.
        device: DeviceIndex,
        /// The new session.
        session: Session,
        /// After the decision to switch over.
        late: bool,
    },
    /// A session's initial data is loaded at the destination.
    Acked {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// An acknowledgement of a session that is over was ignored.
    StaleAck {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// New initial data is taken along with the vCPUs stopped.
    Absorbing(Attempt),
    /// The switchover was taken back.
    Revoked(Attempt),
    /// The guest's device lost its state in a reset.
    DeviceStateLost {
        /// The device.
        device: DeviceIndex,
        /// What led to it.
        failure: Failure,
    },
    /// The device is gone altogether.
    DeviceLost {
        /// The device.
        device: DeviceIndex,
        /// Why.
        failure: Failure,
    },
    /// A cancel came after the point of no return.
    CancelTooLate,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Device {
    traits: DeviceTraits,
    state: DeviceState,
    pending: Option<DeviceCall>,
    session: Session,
    /// InitialDataSent of `session` went out.
    sent: bool,
    /// SwitchoverAck of `session` came.
    acked: bool,
    /// Known unread initial data.
    unread: bool,
    /// The last question had no useful answer.
    unknown: bool,
    /// Asked since the last pause or move.
    asked: bool,
    /// The question under way was asked before the last pause or move: its answer does not settle it.
    stale_question: bool,
    /// STOP_COPY was read to its end.
    ended: bool,
    /// Its session died under us (guest reset): begin anew once the guest runs.
    restart: bool,
    /// Not to be called any more.
    lost: bool,
}

impl Device {
    fn has_session(&self) -> bool {
        self.traits.pre_copy && !self.lost
    }

    fn ready(&self) -> bool {
        !self.has_session() || (self.sent && self.acked && !self.unread && !self.restart)
    }

    fn p2p_state(&self) -> DeviceState {
        if self.traits.pre_copy { DeviceState::PreCopyP2p } else { DeviceState::RunningP2p }
    }

    fn precopy_state(&self) -> DeviceState {
        if self.traits.pre_copy { DeviceState::PreCopy } else { DeviceState::Running }
    }
}

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
    Sync,
    Ram,
    MachineState,
    AwaitReady,
    Verify,
    Judge,
    Record,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vcpus {
    Running,
    Pausing,
    Paused,
    Resuming,
}

/// What the machine is told at the start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Setup {
    /// The migration's id.
    pub migration: Id,
    /// This process's id.
    pub instance: Id,
    /// What this side can do.
    pub features: Features,
    /// The body of Describe.
    pub description: String,
    /// The devices, in the order of Describe.
    pub devices: Vec<DeviceTraits>,
    /// Stop after the comparison.
    pub dry_run: bool,
}

/// The source's machine. See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    setup: Setup,
    state: State,
    connection: Option<Connection>,
    secret: Option<Id>,
    features: Features,
    attempt: Attempt,
    devices: Vec<Device>,
    vcpus: Vcpus,
    setup_step: SetupStep,
    stop_step: StopStep,
    tracking: bool,
    /// Pages collected in this attempt may be missing at the destination.
    collected: bool,
    synced: bool,
    judging: bool,
    absorbing: bool,
    /// Interrupts are detached from the guest.
    detached: bool,
    reattaching: bool,
    recorded: bool,
    /// What ends the migration once the guest runs again; `None` = go on with precopy.
    ending: Option<Outcome>,
}

impl Source {
    /// A machine in Setup that waits for its first connection.
    pub fn new(setup: Setup) -> Self {
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
            lost: false,
        };
        Self {
            devices: setup.devices.iter().map(device).collect(),
            setup,
            state: State::Setup,
            connection: None,
            secret: None,
            features: Features::default(),
            attempt: Attempt(0),
            vcpus: Vcpus::Running,
            setup_step: SetupStep::Hello,
            stop_step: StopStep::Devices,
            tracking: false,
            collected: false,
            synced: false,
            judging: false,
            absorbing: false,
            detached: false,
            reattaching: false,
            recorded: false,
            ending: None,
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
            Event::Timeout(limit) => self.timeout(limit, out),
            Event::TrackingStarted(answer) => self.answered(answer, out, |s, out| {
                s.tracking = true;
                if s.at_setup(SetupStep::Tracking) {
                    s.setup_step = SetupStep::Devices;
                    s.devices_to_precopy(out);
                }
            }),
            Event::Resumed(answer) => {
                self.vcpus = Vcpus::Running;
                self.answered(answer, out, |_, _| ());
            }
            Event::Synced(sync, answer) => self.answered(answer, out, |s, out| match sync {
                Sync::Provisional => s.synced = true,
                Sync::Final if s.stop_step == StopStep::Sync => {
                    s.stop_step = StopStep::Ram;
                    out.push(Action::SendFinalRam);
                }
                Sync::Final => {}
            }),
            Event::RamSent(answer) => self.answered(answer, out, |s, out| {
                if s.state == State::StopCopy && s.stop_step == StopStep::Ram {
                    s.stop_step = StopStep::MachineState;
                    s.detached = true;
                    out.push(Action::SaveMachineState);
                }
            }),
            Event::MachineStateSaved(answer) => self.answered(answer, out, |s, out| {
                if s.state == State::StopCopy && s.stop_step == StopStep::MachineState {
                    s.stop_step = StopStep::AwaitReady;
                    s.enter(State::AwaitReady, out);
                    out.push(Action::SendStateEnd(s.attempt));
                    out.push(Action::Arm(TimeLimit::Ready));
                }
            }),
            Event::Reattached(answer) => {
                self.reattaching = false;
                self.detached = false;
                if let Err(failure) = answer {
                    // The guest resumes all the same: an interrupt less is better than no guest.
                    self.ending = Some(Outcome::Failed(failure));
                }
            }
            Event::Verified(answer) => self.answered(answer, out, |s, out| {
                if s.state == State::AwaitReady && s.stop_step == StopStep::Verify {
                    s.judge_commit(out);
                }
            }),
        }
        self.advance(out);
    }

    // --- connections and messages -------------------------------------------------------------

    fn link_up(&mut self, connection: Connection, out: &mut Vec<Action>) {
        if self.state.is_end() || self.connection.is_some_and(|c| c >= connection) {
            return;
        }
        self.connection = Some(connection);
        out.push(Action::Send(Message::Hello {
            features: self.setup.features,
            migration: self.setup.migration,
            instance: self.setup.instance,
            connection,
            secret: self.secret,
        }));
        if self.state == State::Setup {
            out.push(Action::Arm(TimeLimit::Setup));
        }
    }

    fn link_down(&mut self, connection: Connection, failure: Failure, out: &mut Vec<Action>) {
        if self.connection != Some(connection) {
            return;
        }
        self.connection = None;
        match self.state {
            State::Committed => self.doubt(out),
            State::InDoubt => out.push(Action::Reconnect),
            _ => self.fail(failure, out),
        }
    }

    fn doubt(&mut self, out: &mut Vec<Action>) {
        self.enter(State::InDoubt, out);
        out.push(Action::Disarm(TimeLimit::Answer));
        out.push(Action::Reconnect);
    }

    fn message(&mut self, connection: Connection, message: Message, out: &mut Vec<Action>) {
        // A recorded decision never changes, so its answers count over any connection.
        match message {
            Message::Running { attempt } => return self.running(attempt, out),
            Message::Never { attempt, reason } => return self.never(attempt, reason, out),
            _ => {}
        }
        if self.connection != Some(connection) {
            return;
        }
        match message {
            Message::Accept { features, secret, .. } => self.accepted(features, secret, out),
            Message::DescribeOk if self.at_setup(SetupStep::Describe) => {
                out.push(Action::Disarm(TimeLimit::Setup));
                if self.setup.dry_run {
                    self.ending = Some(Outcome::DryRun);
                } else {
                    self.setup_step = SetupStep::Tracking;
                    out.push(Action::StartTracking);
                }
            }
            Message::Mismatch { list } if self.at_setup(SetupStep::Describe) => {
                let what = format!("the destination does not fit: {}", list.join("; "));
                let remedy = "start the destination with what the source has";
                self.fail(Failure::new(Side::Destination, what).remedy(remedy), out);
            }
            Message::Refuse { reason } if !self.state.is_committed() => self.fail(reason, out),
            Message::SwitchoverAck { device, session } => self.acked(device, session, out),
            Message::Ready { attempt, .. } => self.ready(attempt, out),
            Message::Failed { reason } => self.fail(reason, out),
            Message::Cancel => self.cancel(out),
            _ => {}
        }
    }

    fn at_setup(&self, step: SetupStep) -> bool {
        self.state == State::Setup && self.setup_step == step && self.ending.is_none()
    }

    fn accepted(&mut self, features: Features, secret: Id, out: &mut Vec<Action>) {
        if self.state.is_committed() {
            if self.secret == Some(secret) {
                out.push(Action::Send(Message::Query { attempt: self.attempt }));
            }
        } else if self.at_setup(SetupStep::Hello) {
            self.features = self.setup.features.intersect(features);
            self.secret = Some(secret);
            self.setup_step = SetupStep::Describe;
            let body = self.setup.description.clone();
            out.push(Action::Send(Message::Describe { body }));
        }
    }

    // --- setup and precopy --------------------------------------------------------------------

    fn devices_to_precopy(&mut self, out: &mut Vec<Action>) {
        for index in self.indices() {
            if self.devices[usize::from(index.0)].traits.pre_copy {
                self.call(index, DeviceCall::SetState(DeviceState::PreCopy), out);
            }
        }
    }

    fn begin_session(&mut self, index: DeviceIndex, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        device.session.0 += 1;
        (device.sent, device.acked, device.unread) = (false, false, device.traits.pre_copy);
        (device.ended, device.restart) = (false, false);
        let session = device.session;
        let read = device.traits.pre_copy;
        out.push(Action::Send(Message::SessionBegin { device: index, session }));
        if read {
            out.push(Action::Read(index));
        }
    }

    fn info(&mut self, index: DeviceIndex, answer: InfoAnswer, offset: u64, out: &mut Vec<Action>) {
        let late = self.vcpus != Vcpus::Running || self.state > State::Precopy;
        let Some(device) = self.device_mut(index) else { return };
        if device.pending == Some(DeviceCall::Info) {
            device.pending = None;
        }
        device.asked = !std::mem::take(&mut device.stale_question);
        if device.restart {
            return;
        }
        let InfoAnswer::Known { unread_initial, reinit } = answer else {
            device.unknown = true;
            return;
        };
        device.unknown = false;
        device.unread = unread_initial;
        if reinit {
            device.session.0 += 1;
            (device.sent, device.acked) = (false, false);
            let session = device.session;
            out.push(Action::Send(Message::Reinit { device: index, session, offset }));
            out.push(Action::Report(Notice::Reinit { device: index, session, late }));
        }
        if !unread_initial {
            self.initial_read(index, offset, out);
        }
    }

    /// All initial data of the session was read and handed to the channel: say so, once a session.
    fn initial_read(&mut self, index: DeviceIndex, offset: u64, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        if device.session.0 == 0 || device.restart {
            return;
        }
        device.unread = false;
        if !device.sent {
            device.sent = true;
            let session = device.session;
            out.push(Action::Send(Message::InitialDataSent { device: index, session, offset }));
        }
    }

    fn acked(&mut self, index: DeviceIndex, session: Session, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        if device.session == session && device.sent && !device.restart {
            device.acked = true;
            out.push(Action::Report(Notice::Acked { device: index, session }));
        } else {
            out.push(Action::Report(Notice::StaleAck { device: index, session }));
        }
    }

    fn device_reset(&mut self, index: DeviceIndex, out: &mut Vec<Action>) {
        let in_setup = self.state == State::Setup;
        let Some(device) = self.device_mut(index) else { return };
        device.state = DeviceState::Running;
        if device.session.0 > 0 || (in_setup && device.traits.pre_copy) {
            device.restart = true;
            device.acked = false;
            device.asked = true;
            if !in_setup {
                out.push(Action::StopReading(index));
            }
        }
    }

    // --- the switchover -----------------------------------------------------------------------

    fn switchover(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Precopy || self.ending.is_some() || !self.all_ready() {
            return;
        }
        self.attempt.0 += 1;
        (self.synced, self.judging, self.absorbing) = (false, false, false);
        self.enter(State::Look, out);
        self.vcpus = Vcpus::Pausing;
        out.push(Action::Pause);
    }

    fn look(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Look || self.ending.is_some() {
            return;
        }
        self.collected = true;
        out.push(Action::Sync(Sync::Provisional));
        self.ask_all(out);
    }

    /// Asks every device in PRE_COPY or PRE_COPY_P2P anew.
    fn ask_all(&mut self, out: &mut Vec<Action>) {
        let mut asked = false;
        for index in self.indices() {
            let can_ask = self.can_ask(index);
            let Some(device) = self.device_mut(index) else { continue };
            device.asked = !can_ask;
            if can_ask {
                asked = true;
                // A poll under way may have been answered before the pause: only a new one counts.
                device.stale_question = device.pending == Some(DeviceCall::Info);
                if device.pending.is_none() {
                    self.call(index, DeviceCall::Info, out);
                }
            }
        }
        if asked {
            out.push(Action::Arm(TimeLimit::Look));
        }
    }

    fn all_asked(&self) -> bool {
        self.devices.iter().all(|d| d.asked || d.lost)
    }

    fn verdict(&mut self, verdict: Verdict, out: &mut Vec<Action>) {
        if !self.judging {
            return;
        }
        self.judging = false;
        if self.ending.is_some() {
            return;
        }
        match (self.state, verdict) {
            (State::Look | State::Quiesce, Verdict::Absorb) if self.unread_initial() => {
                self.absorbing = true;
                out.push(Action::Report(Notice::Absorbing(self.attempt)));
                for index in self.indices() {
                    let device = &self.devices[usize::from(index.0)];
                    if device.has_session() && !device.ready() {
                        out.push(Action::Read(index));
                    }
                }
            }
            // Invariant 5: whatever the verdict, known unread initial data does not go into STOP_COPY.
            (State::Look | State::Quiesce, Verdict::Go) if self.unread_initial() => {
                self.revoke(out);
            }
            (State::Look, Verdict::Go | Verdict::Absorb) => self.quiesce(out),
            (State::Quiesce, Verdict::Go | Verdict::Absorb) => self.stop_copy(out),
            (State::Look | State::Quiesce, Verdict::Revoke) => self.revoke(out),
            (State::AwaitReady, Verdict::Go) => {
                self.stop_step = StopStep::Record;
                self.recorded = true;
                out.push(Action::Record(Decision::Committing, self.attempt));
            }
            (State::AwaitReady, Verdict::Absorb | Verdict::Revoke) => {
                let what = "the destination was ready too late for the downtime limit";
                self.fail(Failure::new(Side::Source, what), out);
            }
            _ => {}
        }
    }

    fn quiesce(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Quiesce, out);
        if !self.devices.iter().any(|d| d.traits.p2p && !d.lost) {
            return self.stop_copy(out);
        }
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            device.asked = !(device.traits.p2p && device.has_session());
            if device.traits.p2p && !device.lost {
                let target = device.p2p_state();
                self.call(index, DeviceCall::SetState(target), out);
            }
        }
    }

    fn revoke(&mut self, out: &mut Vec<Action>) {
        self.absorbing = false;
        self.enter(State::Revoking, out);
        out.push(Action::Disarm(TimeLimit::Look));
    }

    fn stop_copy(&mut self, out: &mut Vec<Action>) {
        self.enter(State::StopCopy, out);
        self.stop_step = StopStep::Devices;
        out.push(Action::Send(Message::StopCopyBegin { attempt: self.attempt }));
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            device.ended = device.lost;
            if !device.lost {
                self.call(index, DeviceCall::SetState(DeviceState::StopCopy), out);
            }
        }
    }

    fn ready(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        let awaited = self.state == State::AwaitReady && self.stop_step == StopStep::AwaitReady;
        if !awaited || attempt != self.attempt || self.ending.is_some() {
            return;
        }
        out.push(Action::Disarm(TimeLimit::Ready));
        if self.features.verify {
            self.stop_step = StopStep::Verify;
            out.push(Action::Verify(self.attempt));
        } else {
            self.judge_commit(out);
        }
    }

    fn judge_commit(&mut self, out: &mut Vec<Action>) {
        self.stop_step = StopStep::Judge;
        self.judging = true;
        out.push(Action::Judge(Point::Commit));
    }

    fn recorded(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.state != State::AwaitReady || self.stop_step != StopStep::Record {
            return;
        }
        match answer {
            // A link that went meanwhile has set `ending`: nothing was sent, so there is no doubt.
            Ok(()) if self.ending.is_none() && self.connection.is_some() => self.commit(out),
            Ok(()) => {}
            Err(failure) => self.fail(failure, out),
        }
    }

    /// The point of no return. The record `committing` is written; after the next action the
    /// destination may run the guest, whatever this side hears or does not hear. From here on the
    /// source resumes only on the destination's `Never`, and memory, devices and machine state stay
    /// as they are until `Running`.
    fn commit(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Committed, out);
        out.push(Action::Send(Message::Commit { attempt: self.attempt }));
        out.push(Action::Arm(TimeLimit::Answer));
    }

    fn running(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        // Not only after Commit: an operator may have started a Prepared destination. Wherever the
        // guest still stands here, it must not run here any more.
        let stands = self.vcpus == Vcpus::Paused;
        let ours = attempt == self.attempt && attempt.0 > 0;
        if !ours || !stands || self.state.is_end() || self.state < State::AwaitReady {
            return;
        }
        out.push(Action::Disarm(TimeLimit::Ready));
        out.push(Action::Disarm(TimeLimit::Answer));
        self.enter(State::Done, out);
        out.push(Action::Finish(Outcome::Completed));
    }

    fn never(&mut self, attempt: Attempt, reason: Failure, out: &mut Vec<Action>) {
        if attempt != self.attempt {
            return;
        }
        match self.state {
            State::Committed | State::InDoubt => {
                out.push(Action::Disarm(TimeLimit::Answer));
                self.ending = Some(Outcome::Failed(reason));
                self.roll_back(out);
            }
            State::StopCopy | State::AwaitReady => self.fail(reason, out),
            _ => {}
        }
    }

    // --- the ways back ------------------------------------------------------------------------

    fn cancel(&mut self, out: &mut Vec<Action>) {
        let committing = self.state == State::AwaitReady && self.stop_step == StopStep::Record;
        if self.state.is_committed() || committing {
            out.push(Action::Report(Notice::CancelTooLate));
        } else {
            self.end(Outcome::Cancelled, out);
        }
    }

    fn fail(&mut self, failure: Failure, out: &mut Vec<Action>) {
        let phase = self.state.name();
        self.end(Outcome::Failed(failure.in_phase(phase)), out);
    }

    /// Heads for an end with the guest running here; after Commit that is not ours to decide.
    fn end(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        if self.state.is_end() || self.state.is_committed() || self.ending.is_some() {
            return;
        }
        self.ending = Some(outcome);
        match self.state {
            State::Setup | State::Precopy => self.stop_migrating(out),
            State::Look | State::Quiesce => self.revoke(out),
            State::StopCopy | State::AwaitReady => self.roll_back(out),
            _ => {}
        }
    }

    fn roll_back(&mut self, out: &mut Vec<Action>) {
        self.enter(State::RollingBack, out);
        for limit in [TimeLimit::Ready, TimeLimit::Answer] {
            out.push(Action::Disarm(limit));
        }
        for index in self.indices() {
            out.push(Action::StopReading(index));
        }
        if self.recorded {
            self.recorded = false;
            out.push(Action::Record(Decision::Never, self.attempt));
        }
        if self.connection.is_some() {
            out.push(Action::Send(Message::Abort { attempt: self.attempt }));
        }
    }

    fn stop_migrating(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Cancelling, out);
        out.push(Action::Disarm(TimeLimit::Setup));
        for index in self.indices() {
            out.push(Action::StopReading(index));
        }
    }

    fn timeout(&mut self, limit: TimeLimit, out: &mut Vec<Action>) {
        let what = match (limit, self.state) {
            (TimeLimit::Setup, State::Setup) => "the destination did not answer Hello or Describe",
            (TimeLimit::Ready, State::AwaitReady) => "the destination did not become ready",
            (TimeLimit::Look, State::Look | State::Quiesce) if !self.all_asked() => {
                // A device that does not answer now is no device to stop: back, and it can take its time.
                return self.revoke(out);
            }
            (TimeLimit::Answer, State::Committed) => return self.doubt(out),
            _ => return,
        };
        self.fail(Failure::new(Side::Destination, format!("{what} in time")), out);
    }

    // --- device calls -------------------------------------------------------------------------

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
                out.push(Action::Report(Notice::DeviceLost { device: index, failure }));
            }
        }
    }

    fn backwards(&self) -> bool {
        matches!(self.state, State::Revoking | State::RollingBack | State::Cancelling)
    }

    // --- going on -----------------------------------------------------------------------------

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

    fn advance_setup(&mut self, out: &mut Vec<Action>) {
        if let Some(Outcome::DryRun) = self.ending {
            return self.stop_migrating(out);
        }
        let there = self.devices.iter().all(|d| {
            d.pending.is_none()
                && (!d.traits.pre_copy || d.state == DeviceState::PreCopy || d.restart)
        });
        if self.at_setup(SetupStep::Devices) && there {
            self.enter(State::Precopy, out);
            for index in self.indices() {
                if !self.devices[usize::from(index.0)].restart {
                    self.begin_session(index, out);
                }
            }
            self.advance_precopy(out);
        }
    }

    fn advance_precopy(&mut self, out: &mut Vec<Action>) {
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if !device.restart || device.pending.is_some() || device.lost {
                continue;
            }
            if device.traits.pre_copy && device.state != DeviceState::PreCopy {
                self.call(index, DeviceCall::SetState(DeviceState::PreCopy), out);
            } else {
                self.begin_session(index, out);
            }
        }
    }

    fn advance_look(&mut self, point: Point, out: &mut Vec<Action>) {
        if self.vcpus != Vcpus::Paused || self.judging || !self.synced {
            return;
        }
        // A device whose session died while we stopped cannot be taken along.
        if self.devices.iter().any(|d| d.restart) {
            return self.revoke(out);
        }
        // A question asked before the pause came back: ask the one that counts.
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if !device.asked && device.pending.is_none() && self.can_ask(index) {
                self.call(index, DeviceCall::Info, out);
            }
        }
        if !self.all_asked() {
            return;
        }
        if self.absorbing {
            if self.unread_initial() {
                return;
            }
            // Everything absorbed is loaded: look again before the next step.
            self.absorbing = false;
            return self.ask_all(out);
        }
        out.push(Action::Disarm(TimeLimit::Look));
        self.judging = true;
        out.push(Action::Judge(point));
    }

    fn advance_quiesce(&mut self, out: &mut Vec<Action>) {
        let there =
            self.devices.iter().all(|d| d.lost || !d.traits.p2p || d.state == d.p2p_state());
        if there {
            self.advance_look(Point::Quiesce, out);
        }
    }

    fn advance_stop_copy(&mut self, out: &mut Vec<Action>) {
        if self.stop_step == StopStep::Devices && self.devices.iter().all(|d| d.ended) {
            self.stop_step = StopStep::Sync;
            out.push(Action::Sync(Sync::Final));
        }
    }

    fn advance_revoking(&mut self, out: &mut Vec<Action>) {
        let mut there = self.vcpus != Vcpus::Pausing;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            let moving =
                matches!(device.pending, Some(DeviceCall::SetState(_) | DeviceCall::Reset));
            if device.lost {
                continue;
            }
            let quiesced =
                matches!(device.state, DeviceState::PreCopyP2p | DeviceState::RunningP2p);
            let target = device.precopy_state();
            if moving {
                there = false;
            } else if quiesced {
                there = false;
                if device.pending.is_none() {
                    self.call(index, DeviceCall::SetState(target), out);
                }
            } else if !matches!(device.state, DeviceState::PreCopy | DeviceState::Running) {
                there = false;
                if device.pending.is_none() {
                    self.call(index, DeviceCall::Reset, out);
                }
            }
        }
        if there && self.resume(out) {
            self.collected = false;
            out.push(Action::Report(Notice::Revoked(self.attempt)));
            if self.connection.is_some() {
                out.push(Action::Send(Message::Revoked { attempt: self.attempt }));
            }
            if self.ending.is_some() {
                self.stop_migrating(out);
                return self.advance_cancelling(out);
            }
            self.enter(State::Precopy, out);
            for index in self.indices() {
                if self.can_ask(index) {
                    out.push(Action::Read(index));
                }
            }
            self.advance_precopy(out);
        }
    }

    fn advance_rolling_back(&mut self, out: &mut Vec<Action>) {
        if self.detached {
            if !self.reattaching {
                self.reattaching = true;
                out.push(Action::Reattach);
            }
            return;
        }
        if !self.devices_run(out) {
            return;
        }
        if self.resume(out) {
            self.finish(out);
        }
    }

    /// All P2P-capable devices to RUNNING_P2P, then all to RUNNING; true when they are there.
    fn devices_run(&mut self, out: &mut Vec<Action>) -> bool {
        let waits = |d: &Device| {
            !d.lost
                && d.traits.p2p
                && !matches!(d.state, DeviceState::RunningP2p | DeviceState::Running)
        };
        let p2p_first = self.devices.iter().any(waits);
        let mut there = true;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if device.lost || device.state == DeviceState::Running && device.pending.is_none() {
                continue;
            }
            there = false;
            if device.pending.is_some() {
                continue;
            }
            if waits(device) {
                self.call(index, DeviceCall::SetState(DeviceState::RunningP2p), out);
            } else if !p2p_first {
                self.call(index, DeviceCall::SetState(DeviceState::Running), out);
            }
        }
        there
    }

    fn advance_cancelling(&mut self, out: &mut Vec<Action>) {
        let mut there = true;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if device.lost {
                continue;
            }
            if device.pending.is_some() {
                there = false;
            } else if device.state != DeviceState::Running {
                there = false;
                self.call(index, DeviceCall::SetState(DeviceState::Running), out);
            }
        }
        if there {
            self.finish(out);
        }
    }

    /// Asks for the vCPUs where they do not run; true once they do.
    fn resume(&mut self, out: &mut Vec<Action>) -> bool {
        match self.vcpus {
            Vcpus::Running => return true,
            Vcpus::Paused => {
                self.vcpus = Vcpus::Resuming;
                if self.collected {
                    out.push(Action::RestoreDirty);
                }
                out.push(Action::Resume);
            }
            Vcpus::Pausing | Vcpus::Resuming => {}
        }
        false
    }

    fn finish(&mut self, out: &mut Vec<Action>) {
        if self.tracking {
            self.tracking = false;
            out.push(Action::StopTracking);
        }
        let outcome = self.ending.clone().unwrap_or(Outcome::Cancelled);
        let message = match &outcome {
            Outcome::Failed(reason) => Message::Failed { reason: reason.clone() },
            _ => Message::Cancel,
        };
        if self.connection.is_some() {
            out.push(Action::Send(message));
        }
        let end = match outcome {
            Outcome::Failed(_) => State::Failed,
            _ => State::Cancelled,
        };
        self.enter(end, out);
        out.push(Action::Finish(outcome));
    }

    // --- small things -------------------------------------------------------------------------

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
