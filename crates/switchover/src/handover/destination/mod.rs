//! The destination's machine.
//!
//! `events` takes what comes over the connections, `load` what becomes of it until all is there, `decision`
//! says whether the guest runs here and answers for it.

use super::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve, Rules};
use crate::handover::source::{Answer, CallResult};
use crate::message::{
    Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

mod decision;
mod events;
mod load;

/// Where the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Connected or not, comparing.
    Setup,
    /// Memory and devices are being loaded.
    Loading,
    /// Everything is here; a Commit is obeyed until the window ends.
    Prepared,
    /// The window ended: no Commit is obeyed any more, what is loaded is kept.
    Expired,
    /// The guest is being started.
    Starting,
    /// The guest runs here.
    Running,
    /// Nothing of this migration will run here.
    Aborted,
}

impl State {
    /// The name that `status`, logs and holds use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Loading => "loading",
            Self::Prepared => "prepared",
            Self::Expired => "expired",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Aborted => "aborted",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A control connection of this migration is the newest now. Its Hello was checked by the caller
    /// (migration and secret).
    LinkUp(Connection, Features),
    /// A control connection is down.
    LinkDown(Connection, Failure),
    /// A message came.
    Message(Connection, Message),
    /// Describe was compared: the traits of the devices, or every mismatch.
    Compared(Result<Vec<DeviceTraits>, Vec<String>>),
    /// A device call ended.
    CallDone {
        /// The device.
        device: DeviceIndex,
        /// The call.
        call: DeviceCall,
        /// How it ended.
        result: CallResult,
    },
    /// write() returned for every byte of the stream up to `offset`.
    Loaded {
        /// The device.
        device: DeviceIndex,
        /// The first session of the stream these bytes belong to.
        stream: Session,
        /// Bytes loaded so far.
        offset: u64,
    },
    /// Everything that StateEnd of this attempt counted has arrived and is written.
    StateComplete(Attempt),
    /// The machine state is applied, and outside resources are there.
    MachineStateApplied(Answer),
    /// PCI_COMMAND and vectors are set, everything is wired: only devices and vCPUs are to be started.
    Wired(Answer),
    /// The decision is written, or could not be.
    Recorded(Answer),
    /// The vCPUs run, or could not.
    Started(Answer),
    /// The commit window ended.
    WindowEnded,
    /// The answer to [`Action::Unload`].
    Unloaded(Answer),
    /// The operator decides what is left open here.
    Operator(Resolve),
    /// Somebody here ends it.
    Cancel,
    /// Another migration of the same source process begins: so it runs there and never committed.
    Superseded,
    /// A data channel ended early. Whether that is a failure the source knows, which may have closed it for a
    /// roll-back whose word is still on its way.
    DataLost(Failure),
    /// Something failed here.
    Fail(Failure),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A state is entered; comes before the actions of that state.
    Enter(State),
    /// Send on this connection.
    Send(Connection, Message),
    /// Compare Describe's body with what is here; answered by `Compared`.
    Compare(String),
    /// A stream begins with this session: load its data, from offset 0, once the device is RESUMING.
    BeginStream(DeviceIndex, Session),
    /// Call a device; answered by `CallDone`.
    Call(DeviceIndex, DeviceCall),
    /// Watch for what StateEnd counted; answered by `StateComplete`. The message is StateEnd itself.
    AwaitState(Message),
    /// Apply the machine state and obtain outside resources; answered by `MachineStateApplied`.
    ApplyMachineState,
    /// PCI_COMMAND written, vectors armed; answered by `Wired`.
    Wire,
    /// Write a decision down; answered by `Recorded`.
    Record(Decision, Attempt),
    /// Count the commit window from now on one's own clock; answered by `WindowEnded`.
    ArmWindow,
    /// The attempt is rolled back: what its data channels still bring is taken in or dropped and they are
    /// closed, its machine state is forgotten, outside resources are given up, and of each device's data
    /// nothing up to the [session](Destination::session) named last counts any more. Memory stays as it is.
    /// Answered by `Unloaded`; devices are reset beside it.
    Unload(Attempt),
    /// The operator's decision is obeyed, or not, and why.
    Resolved(Resolve, Result<(), String>),
    /// Hash memory and devices from scratch and send Hashes over this connection.
    Hash(Connection, Attempt),
    /// Start the vCPUs; answered by `Started`.
    Start,
    /// A device could not be started; the guest runs without it.
    ReportDeviceLost(DeviceIndex, Failure),
    /// The end: the guest runs here (`Completed`) or nothing of this migration ever will.
    Finish(Outcome),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Device {
    traits: DeviceTraits,
    state: DeviceState,
    pending: Option<DeviceCall>,
    /// First session of the current stream; 0 = none yet.
    stream: Session,
    /// A stream that waits for the device to be RESUMING.
    next_stream: Option<Session>,
    loaded: u64,
    /// InitialDataSent that is not acknowledged.
    unacked: Option<(Session, u64)>,
    /// The newest session the source named.
    session: Session,
    lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Step {
    /// Devices are reset, what was loaded is forgotten.
    RollBack,
    Load,
    Validate,
    Apply,
    RecordPrepared,
    Prepared,
    Wire,
    RecordRunning,
    P2p,
    Run,
    Vcpus,
    RecordNever,
}

/// The destination's machine. See the [parent module](super).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    rules: Rules,
    migration: Id,
    instance: Id,
    secret: Id,
    features: Features,
    window_ms: u64,
    state: State,
    step: Step,
    connection: Option<Connection>,
    link: bool,
    attempt: Attempt,
    /// The attempt whose StateEnd came.
    ended: Option<Attempt>,
    devices: Vec<Device>,
    /// The recorded decision. It never changes once it is `Running` or `Never`.
    decision: Option<Decision>,
    never_reason: Option<Failure>,
    /// Records under way, in order: an answer speaks of the first.
    recording: Vec<Decision>,
    /// Who asked and is answered once the decision is written.
    asked: Vec<Connection>,
    compared: bool,
    /// The engine has forgotten what belonged to the attempt that is rolled back.
    unloaded: bool,
    /// The operator starts the guest and hears how that went.
    by_operator: bool,
    /// The source asked while the guest was being started: it lives.
    queried: bool,
}

impl Destination {
    /// A machine in Setup; `migration` is what the first Hello named.
    pub fn new(
        migration: Id,
        instance: Id,
        secret: Id,
        features: Features,
        window_ms: u64,
    ) -> Self {
        Self::with_rules(migration, instance, secret, features, window_ms, Rules::default())
    }

    /// The machine of a destination whose process died after it had recorded `decision` about `attempt`.
    /// The guest's memory died with it, so nothing ever runs here; this one only answers: `Never` where
    /// that is recorded, or can be recorded now because nothing was started; and that it does not know
    /// where `running` is recorded, since the source may hold the only copy.
    pub fn recovered(
        migration: Id,
        instance: Id,
        secret: Id,
        attempt: Attempt,
        decision: Decision,
    ) -> Self {
        let rules = Rules::default();
        Self::recovered_with_rules(migration, instance, secret, attempt, decision, rules)
    }

    /// As [`recovered`](Self::recovered), for a check.
    pub fn recovered_with_rules(
        migration: Id,
        instance: Id,
        secret: Id,
        attempt: Attempt,
        decision: Decision,
        rules: Rules,
    ) -> Self {
        Self {
            state: State::Aborted,
            attempt,
            decision: Some(decision),
            ..Self::with_rules(migration, instance, secret, Features::default(), 0, rules)
        }
    }

    /// As [`new`](Self::new), for a check.
    pub fn with_rules(
        migration: Id,
        instance: Id,
        secret: Id,
        features: Features,
        window_ms: u64,
        rules: Rules,
    ) -> Self {
        Self {
            rules,
            migration,
            instance,
            secret,
            features,
            window_ms,
            state: State::Setup,
            step: Step::Load,
            connection: None,
            link: false,
            attempt: Attempt(0),
            ended: None,
            devices: Vec::new(),
            decision: None,
            never_reason: None,
            recording: Vec::new(),
            asked: Vec::new(),
            compared: false,
            unloaded: false,
            by_operator: false,
            queried: false,
        }
    }

    /// Where the machine is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The migration it serves.
    pub fn migration(&self) -> Id {
        self.migration
    }

    /// The migration's secret.
    pub fn secret(&self) -> Id {
        self.secret
    }

    /// What both sides can do.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The newest connection.
    pub fn connection(&self) -> Option<Connection> {
        self.connection
    }

    /// The attempt being loaded or committed.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// The newest session that the source named for this device; 0 = none.
    pub fn session(&self, device: DeviceIndex) -> Session {
        self.devices.get(usize::from(device.0)).map_or(Session(0), |d| d.session)
    }

    /// Data is taken in: nothing is being rolled back, validated or decided.
    pub fn takes_data(&self) -> bool {
        self.loading()
    }

    /// The recorded decision.
    pub fn decision(&self) -> Option<Decision> {
        self.decision
    }

    /// Takes an event and appends what to do about it.
    pub fn handle(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::LinkUp(connection, features) => self.link_up(connection, features, out),
            Event::LinkDown(connection, failure) => self.link_down(connection, failure, out),
            Event::Message(connection, message) => self.message(connection, message, out),
            Event::Compared(result) => self.compared(result, out),
            Event::CallDone { device, call, result } => self.call_done(device, call, result, out),
            Event::Loaded { device, stream, offset } => {
                if let Some(d) = self.device_mut(device)
                    && d.stream == stream
                {
                    d.loaded = offset;
                }
            }
            Event::StateComplete(attempt) => {
                if self.state == State::Loading
                    && self.step == Step::Load
                    && self.ended == Some(attempt)
                {
                    self.step = Step::Validate;
                    for index in self.indices() {
                        self.call(index, DeviceState::Stop, out);
                    }
                }
            }
            // An answer that comes after the end must not wake it up again.
            Event::MachineStateApplied(answer) if self.loads(Step::Apply) => match answer {
                Ok(()) => {
                    self.step = Step::RecordPrepared;
                    self.record(Decision::Prepared, out);
                }
                Err(failure) => self.fail(failure, out),
            },
            Event::Wired(answer) if self.step == Step::Wire => match answer {
                Ok(()) => {
                    self.step = Step::RecordRunning;
                    self.record(Decision::Running, out);
                }
                Err(failure) => self.not_started(failure, out),
            },
            Event::MachineStateApplied(_) | Event::Wired(_) => {}
            Event::Unloaded(answer) if self.step == Step::RollBack => match answer {
                Ok(()) => self.unloaded = true,
                Err(failure) => self.fail(failure, out),
            },
            Event::Unloaded(_) => {}
            Event::Operator(resolve) => self.resolve(resolve, out),
            Event::Recorded(answer) => self.recorded(answer, out),
            Event::Started(answer) => self.started(answer, out),
            Event::WindowEnded => {
                if self.state == State::Prepared && self.step == Step::Prepared {
                    self.enter(State::Expired, out);
                }
            }
            Event::Cancel => {
                let reason = Failure::new(Side::Destination, "cancelled at the destination");
                let ended = matches!(self.state, State::Starting | State::Running | State::Aborted);
                if let (false, true, Some(connection)) = (ended, self.link, self.connection) {
                    out.push(Action::Send(connection, Message::Cancel));
                }
                self.refuse_to_run(reason, out);
            }
            Event::Superseded => {
                let reason = Failure::new(Side::Source, "the source began another migration");
                self.refuse_to_run(reason, out);
            }
            Event::DataLost(failure) => self.data_lost(failure, out),
            Event::Fail(failure) => self.fail(failure, out),
        }
        self.advance(out);
    }

    // --- small things -------------------------------------------------------------------------

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
