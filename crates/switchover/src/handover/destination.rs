//! The destination's machine.

use super::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve, Rules};
use crate::handover::source::{Answer, CallResult};
use crate::message::{
    Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

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

    // --- connections and messages -------------------------------------------------------------

    fn link_up(&mut self, connection: Connection, features: Features, out: &mut Vec<Action>) {
        if self.connection.is_some_and(|newest| newest >= connection) {
            return;
        }
        if self.connection.is_none() {
            self.features = self.features.intersect(features);
        }
        self.connection = Some(connection);
        self.link = true;
        let accept = Message::Accept {
            features: self.features,
            instance: self.instance,
            secret: self.secret,
        };
        out.push(Action::Send(connection, accept));
        // A source that lost its guest does not ask, so what is decided is said without being asked.
        let decided = match self.decision {
            Some(Decision::Running) => self.state == State::Running || self.lost_guest(),
            Some(Decision::Never) => true,
            _ => false,
        };
        if decided {
            self.answer(connection, self.attempt, out);
        }
    }

    /// `running` is recorded, and the guest died with the process that recorded it.
    fn lost_guest(&self) -> bool {
        self.decision == Some(Decision::Running) && self.state == State::Aborted
    }

    fn link_down(&mut self, connection: Connection, failure: Failure, out: &mut Vec<Action>) {
        if self.connection != Some(connection) {
            return;
        }
        self.link = false;
        // Before Ready nothing can come of it: the source goes on at once. From Prepared on only the
        // window, the source's next connection or the operator decide.
        if matches!(self.state, State::Setup | State::Loading) && self.step < Step::RecordPrepared {
            self.abort(failure, out);
        }
    }

    fn message(&mut self, connection: Connection, message: Message, out: &mut Vec<Action>) {
        if let Message::Query { attempt } = message {
            return self.query(connection, attempt, out);
        }
        if self.connection != Some(connection) {
            match message {
                Message::Commit { attempt } if !self.rules.commit_on_newest_connection => {
                    self.commit(connection, attempt, out);
                }
                _ => {}
            }
            return;
        }
        match message {
            Message::Describe { body } if self.state == State::Setup && !self.compared => {
                self.compared = true;
                out.push(Action::Compare(body));
            }
            Message::SessionBegin { device, session } => self.session_begin(device, session, out),
            Message::InitialDataSent { device, session, offset } => {
                let Some(d) = self.device_mut(device) else {
                    return self.unknown_device(device, out);
                };
                if session == d.session {
                    d.unacked = Some((session, offset));
                }
            }
            Message::Reinit { device, session, .. } => {
                let Some(d) = self.device_mut(device) else {
                    return self.unknown_device(device, out);
                };
                if session > d.session {
                    d.session = session;
                    d.unacked = None;
                }
            }
            Message::StopCopyBegin { attempt } if self.loading() && attempt > self.attempt => {
                self.attempt = attempt;
            }
            Message::StateEnd { attempt, .. } if self.loading() && attempt == self.attempt => {
                self.ended = Some(attempt);
                out.push(Action::AwaitState(message));
            }
            Message::HashRequest { attempt }
                if self.state == State::Prepared && attempt == self.attempt =>
            {
                out.push(Action::Hash(connection, attempt));
            }
            Message::Commit { attempt } => self.commit(connection, attempt, out),
            Message::RollBack { attempt } => self.roll_back(connection, attempt, out),
            Message::Abort { attempt } => self.aborted_by_source(connection, attempt, out),
            Message::Cancel => {
                let reason = Failure::new(Side::Source, "cancelled at the source");
                self.refuse_to_run(reason, out);
            }
            Message::Failed { reason } => self.refuse_to_run(reason, out),
            _ => {}
        }
    }

    fn loading(&self) -> bool {
        self.loads(Step::Load)
    }

    fn loads(&self, step: Step) -> bool {
        self.state == State::Loading && self.step == step
    }

    fn unknown_device(&mut self, device: DeviceIndex, out: &mut Vec<Action>) {
        let what =
            format!("the source spoke of device number {}, which Describe did not", device.0);
        self.fail(Failure::new(Side::Source, what), out);
    }

    fn compared(&mut self, result: Result<Vec<DeviceTraits>, Vec<String>>, out: &mut Vec<Action>) {
        let (State::Setup, Some(connection)) = (self.state, self.connection) else { return };
        match result {
            Ok(traits) => {
                let device = |traits| Device {
                    traits,
                    state: DeviceState::Running,
                    pending: None,
                    stream: Session(0),
                    next_stream: None,
                    loaded: 0,
                    unacked: None,
                    session: Session(0),
                    lost: false,
                };
                self.devices = traits.into_iter().map(device).collect();
                self.enter(State::Loading, out);
                out.push(Action::Send(connection, Message::DescribeOk));
            }
            Err(list) => {
                let what = format!("the source does not fit: {}", list.join("; "));
                out.push(Action::Send(connection, Message::Mismatch { list }));
                self.abort(Failure::new(Side::Destination, what), out);
            }
        }
    }

    fn session_begin(&mut self, index: DeviceIndex, session: Session, out: &mut Vec<Action>) {
        if !self.loading() {
            return;
        }
        let Some(device) = self.device_mut(index) else { return self.unknown_device(index, out) };
        if session <= device.session {
            return;
        }
        device.session = session;
        device.unacked = None;
        device.next_stream = Some(session);
    }

    // --- loading ------------------------------------------------------------------------------

    fn call(&mut self, index: DeviceIndex, target: DeviceState, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        if device.lost {
            return;
        }
        device.pending = Some(DeviceCall::SetState(target));
        out.push(Action::Call(index, DeviceCall::SetState(target)));
    }

    fn call_done(
        &mut self,
        index: DeviceIndex,
        call: DeviceCall,
        result: CallResult,
        out: &mut Vec<Action>,
    ) {
        let step = self.step;
        let rolls_back = step == Step::RollBack && call != DeviceCall::Reset;
        let Some(device) = self.device_mut(index) else { return };
        if device.pending == Some(call) {
            device.pending = None;
        }
        match (call, result) {
            (DeviceCall::SetState(target), CallResult::Done) => {
                device.state = target;
                if target == DeviceState::Resuming
                    && let Some(session) = device.next_stream.take()
                {
                    (device.stream, device.loaded) = (session, 0);
                    out.push(Action::BeginStream(index, session));
                }
            }
            (DeviceCall::Reset, CallResult::Done) => device.state = DeviceState::Running,
            (DeviceCall::Info, _) => {}
            (_, CallResult::Failed { state, failure }) => {
                device.state = state.unwrap_or(DeviceState::Error);
                if step >= Step::P2p && step <= Step::Vcpus {
                    // `running` is recorded: the guest starts without this device rather than never.
                    device.lost = true;
                    out.push(Action::ReportDeviceLost(index, failure));
                } else if !rolls_back {
                    self.fail(failure, out);
                }
            }
        }
    }

    // --- the decision -------------------------------------------------------------------------

    fn commit(&mut self, connection: Connection, attempt: Attempt, out: &mut Vec<Action>) {
        let ours = attempt == self.attempt || !self.rules.commit_of_this_attempt;
        let reason = match (self.state, self.step) {
            _ if !ours => "another attempt is loaded here",
            (State::Prepared, Step::Prepared) => return self.start(out),
            (State::Expired, Step::Prepared) if !self.rules.commit_within_window => {
                return self.start(out);
            }
            (State::Running, _) | (_, Step::Wire | Step::RecordRunning | Step::P2p | Step::Run) => {
                return self.answer(connection, attempt, out);
            }
            // Not obeyed, and no `never` either: it was sent long ago, and if its source has died since, this
            // is the only copy. A source that lives asks, and then it is.
            (State::Expired, Step::Prepared) if self.rules.late_commit_is_kept => {
                let what = "Commit came after the window";
                let reason = Some(Failure::new(Side::Destination, what));
                return out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
            }
            _ => "Commit came to a destination that is not prepared",
        };
        let reason = Failure::new(Side::Destination, reason);
        if attempt == self.attempt {
            self.asks(connection);
            self.refuse_to_run(reason, out);
        } else {
            out.push(Action::Send(connection, Message::Unknown { attempt, reason: Some(reason) }));
        }
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        self.step = Step::Wire;
        self.enter(State::Starting, out);
        out.push(Action::Wire);
    }

    /// The guest could not be started, and nothing of it has. It is kept: whoever committed may have died
    /// since, and this may be the only copy. A source that lives hears of it and asks, and then it is
    /// `never`; an operator may try again.
    fn not_started(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if self.queried || !self.rules.failed_start_is_kept {
            return self.never(failure, out);
        }
        self.step = Step::Prepared;
        self.enter(State::Expired, out);
        if std::mem::take(&mut self.by_operator) {
            let why = Err(failure.to_string());
            out.push(Action::Resolved(Resolve::RunHere { force: false }, why));
        }
        self.asked.clear();
        if let (true, Some(connection)) = (self.link, self.connection) {
            let (attempt, reason) = (self.attempt, Some(failure.in_phase("starting")));
            out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
        }
    }

    /// The operator says who runs the guest where no source is there to ask.
    fn resolve(&mut self, resolve: Resolve, out: &mut Vec<Action>) {
        let complete =
            matches!(self.state, State::Prepared | State::Expired) && self.step == Step::Prepared;
        let refused = match (resolve, self.state) {
            _ if complete => None,
            (_, State::Starting | State::Running) => Some("the guest is started here already"),
            (_, State::Aborted) => Some("it is decided that the guest never runs here"),
            _ => Some("nothing complete is held here"),
        };
        if let Some(why) = refused {
            return out.push(Action::Resolved(resolve, Err(why.to_owned())));
        }
        out.push(Action::Resolved(resolve, Ok(())));
        match resolve {
            Resolve::RunHere { .. } => {
                self.by_operator = true;
                self.start(out);
            }
            Resolve::Discard => {
                let what = "discarded by the operator";
                self.never(Failure::new(Side::Destination, what), out);
            }
        }
    }

    // --- rolling back -------------------------------------------------------------------------

    /// The source takes the attempt back and goes on: what belonged to it is forgotten, and devices load
    /// new sessions. The attempt's record stays as it is: no Commit of it can come any more, since the next
    /// attempt has another number.
    fn roll_back(&mut self, connection: Connection, attempt: Attempt, out: &mut Vec<Action>) {
        if attempt != self.attempt || attempt.0 == 0 {
            return;
        }
        match self.state {
            State::Loading | State::Prepared | State::Expired
                if self.step >= Step::Load && self.step <= Step::Prepared =>
            {
                (self.step, self.unloaded, self.ended) = (Step::RollBack, false, None);
                self.enter(State::Loading, out);
                for device in &mut self.devices {
                    (device.stream, device.loaded) = (Session(0), 0);
                    (device.next_stream, device.unacked) = (None, None);
                }
                out.push(Action::Unload(attempt));
            }
            // The operator was faster, or it is over here: the source hears which it is.
            State::Starting | State::Running | State::Aborted if self.decision.is_some() => {
                self.answer(connection, attempt, out);
            }
            State::Starting => self.asks(connection),
            _ => {}
        }
    }

    fn advance_roll_back(&mut self, out: &mut Vec<Action>) {
        let mut there = self.unloaded && self.recording.is_empty();
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            if device.pending.is_some() {
                there = false;
            } else if device.state != DeviceState::Running {
                there = false;
                device.pending = Some(DeviceCall::Reset);
                out.push(Action::Call(index, DeviceCall::Reset));
            }
        }
        if !there {
            return;
        }
        (self.step, self.decision) = (Step::Load, None);
        self.asked.clear();
        if let (true, Some(connection)) = (self.link, self.connection) {
            let attempt = self.attempt;
            out.push(Action::Send(connection, Message::RolledBack { attempt }));
        }
    }

    // --- answers ------------------------------------------------------------------------------

    fn query(&mut self, connection: Connection, attempt: Attempt, out: &mut Vec<Action>) {
        if attempt != self.attempt || attempt.0 == 0 {
            return out.push(Action::Send(connection, Message::Unknown { attempt, reason: None }));
        }
        match self.state {
            // The source asks because its Commit may be lost with an old connection. Whichever way the
            // window stands, an answer is owed, and only `never` is safe without a Commit.
            State::Prepared | State::Expired | State::Loading if self.step <= Step::Prepared => {
                self.asks(connection);
                let what = "no Commit came before the source asked";
                self.refuse_to_run(Failure::new(Side::Destination, what), out);
            }
            // It ended without a record: nothing will run here, so that can be written now.
            State::Aborted if self.decision != Some(Decision::Never) && !self.lost_guest() => {
                self.asks(connection);
                self.step = Step::RecordNever;
                if self.recording.is_empty() {
                    self.record(Decision::Never, out);
                }
            }
            _ => {
                self.queried |= self.state == State::Starting;
                self.answer(connection, attempt, out);
            }
        }
    }

    /// Is answered once there is a decision.
    fn asks(&mut self, connection: Connection) {
        if !self.asked.contains(&connection) {
            self.asked.push(connection);
        }
    }

    /// Answers with the recorded decision, or once there is one.
    fn answer(&mut self, connection: Connection, attempt: Attempt, out: &mut Vec<Action>) {
        match (self.decision, self.state) {
            (Some(Decision::Never), _) => {
                let reason = self
                    .never_reason
                    .clone()
                    .unwrap_or_else(|| Failure::new(Side::Destination, "decided before"));
                out.push(Action::Send(connection, Message::Never { attempt, reason }));
            }
            (Some(Decision::Running), State::Running) => {
                out.push(Action::Send(connection, Message::Running { attempt }));
            }
            // It may have run and may not: the source's copy may be the only one.
            (Some(Decision::Running), State::Aborted) if self.rules.lost_guest_is_unknown => {
                let what = "the guest was started here, and lost with its process";
                let reason = Some(Failure::new(Side::Destination, what));
                out.push(Action::Send(connection, Message::Unknown { attempt, reason }));
            }
            (Some(Decision::Running), State::Aborted) => {
                out.push(Action::Send(connection, Message::Running { attempt }));
            }
            _ => self.asks(connection),
        }
    }

    fn aborted_by_source(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        if attempt == self.attempt && attempt.0 > 0 {
            self.asks(connection);
            let what = "the source took the attempt back";
            self.refuse_to_run(Failure::new(Side::Source, what), out);
        }
    }

    /// Ends in Aborted; where a Ready may have been sent, `never` is recorded first.
    fn refuse_to_run(&mut self, reason: Failure, out: &mut Vec<Action>) {
        match self.state {
            State::Setup | State::Loading if self.step < Step::RecordPrepared => {
                if self.attempt.0 > 0 {
                    self.never(reason, out);
                } else {
                    self.abort(reason, out);
                }
            }
            State::Setup | State::Loading | State::Prepared | State::Expired => {
                self.never(reason, out);
            }
            // Wiring may still fail, but it is not asked to: a Commit was obeyed.
            State::Starting | State::Running => {}
            State::Aborted => self.answer_asked(out),
        }
    }

    fn never(&mut self, reason: Failure, out: &mut Vec<Action>) {
        if self.decision == Some(Decision::Running) || self.step == Step::RecordNever {
            return;
        }
        self.never_reason.get_or_insert(reason.in_phase(self.state.name()));
        self.step = Step::RecordNever;
        self.record(Decision::Never, out);
    }

    fn record(&mut self, decision: Decision, out: &mut Vec<Action>) {
        self.recording.push(decision);
        out.push(Action::Record(decision, self.attempt));
    }

    fn recorded(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.recording.is_empty() {
            return;
        }
        // `never` may have overtaken `prepared` in the machine, not on the disk: the answer to one is
        // not taken for the answer to the other.
        let step = match self.recording.remove(0) {
            Decision::Prepared => Step::RecordPrepared,
            Decision::Running => Step::RecordRunning,
            Decision::Never | Decision::Committing | Decision::Gone => Step::RecordNever,
        };
        if step != self.step {
            return;
        }
        match (step, answer) {
            (Step::RecordPrepared, Ok(())) => {
                self.decision = Some(Decision::Prepared);
                self.step = Step::Prepared;
                self.enter(State::Prepared, out);
                out.push(Action::ArmWindow);
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let ready = Message::Ready { attempt: self.attempt, window_ms: self.window_ms };
                    out.push(Action::Send(connection, ready));
                }
            }
            (Step::RecordRunning, Ok(())) => {
                self.decision = Some(Decision::Running);
                self.step = Step::P2p;
                for index in self.indices() {
                    if self.devices[usize::from(index.0)].traits.p2p {
                        self.call(index, DeviceState::RunningP2p, out);
                    }
                }
            }
            (Step::RecordNever, Ok(())) => {
                self.decision = Some(Decision::Never);
                let reason = self
                    .never_reason
                    .clone()
                    .unwrap_or_else(|| Failure::new(Side::Destination, "decided before"));
                if let (true, Some(connection)) = (self.link, self.connection) {
                    self.asks(connection);
                }
                self.answer_asked(out);
                self.abort(reason, out);
            }
            // Without a record no step that it names: Prepared and Running do not happen.
            (Step::RecordPrepared, Err(failure)) => self.never(failure, out),
            (Step::RecordRunning, Err(failure)) => self.not_started(failure, out),
            (Step::RecordNever, Err(failure)) => {
                // Nothing can be promised, so nothing is answered; nothing will be started either. A
                // source that has not committed needs no promise to go on.
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let reason = failure.clone().in_phase(self.state.name());
                    out.push(Action::Send(connection, Message::Failed { reason }));
                }
                self.abort(failure, out);
            }
            _ => {}
        }
    }

    fn started(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.step != Step::Vcpus {
            return;
        }
        if let Err(failure) = answer {
            out.push(Action::ReportDeviceLost(DeviceIndex(u16::MAX), failure));
        }
        self.enter(State::Running, out);
        if let (true, Some(connection)) = (self.link, self.connection) {
            self.asks(connection);
        }
        self.answer_asked(out);
        out.push(Action::Finish(Outcome::Completed));
    }

    fn answer_asked(&mut self, out: &mut Vec<Action>) {
        let attempt = self.attempt;
        for connection in std::mem::take(&mut self.asked) {
            if self.decision.is_some() {
                self.answer(connection, attempt, out);
            }
        }
    }

    /// A failure here, told to the source; before Commit it ends the migration.
    fn fail(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if matches!(self.state, State::Starting | State::Running | State::Aborted) {
            return;
        }
        let failure = failure.in_phase(self.state.name());
        if let (true, Some(connection)) = (self.link, self.connection) {
            out.push(Action::Send(connection, Message::Failed { reason: failure.clone() }));
        }
        self.refuse_to_run(failure, out);
    }

    fn data_lost(&mut self, failure: Failure, out: &mut Vec<Action>) {
        if !self.loading() {
            return;
        }
        let reason = failure.in_phase(self.state.name());
        match (self.link, self.connection) {
            (true, Some(connection)) => {
                out.push(Action::Send(connection, Message::Failed { reason }));
            }
            _ => self.refuse_to_run(reason, out),
        }
    }

    fn abort(&mut self, reason: Failure, out: &mut Vec<Action>) {
        if self.state == State::Aborted {
            return;
        }
        let reason = reason.in_phase(self.state.name());
        self.enter(State::Aborted, out);
        out.push(Action::Finish(Outcome::Failed(reason)));
    }

    // --- going on -----------------------------------------------------------------------------

    fn advance(&mut self, out: &mut Vec<Action>) {
        match self.step {
            Step::RollBack if self.state == State::Loading => self.advance_roll_back(out),
            Step::Load => self.advance_load(out),
            Step::Validate
                if self.loads(Step::Validate)
                    && self
                        .devices
                        .iter()
                        .all(|d| d.pending.is_none() && d.state == DeviceState::Stop) =>
            {
                self.step = Step::Apply;
                out.push(Action::ApplyMachineState);
            }
            Step::P2p if self.calls_back() => {
                self.step = Step::Run;
                for index in self.indices() {
                    self.call(index, DeviceState::Running, out);
                }
                self.advance(out);
            }
            Step::Run if self.calls_back() => {
                self.step = Step::Vcpus;
                out.push(Action::Start);
            }
            _ => {}
        }
    }

    fn calls_back(&self) -> bool {
        self.devices.iter().all(|d| d.pending.is_none())
    }

    fn advance_load(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Loading {
            return;
        }
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            if device.next_stream.is_some() && device.pending.is_none() {
                if device.state == DeviceState::Running {
                    self.call(index, DeviceState::Resuming, out);
                } else {
                    // A new stream into a device that loaded an old one: RESUMING is left by reset (F14).
                    device.pending = Some(DeviceCall::Reset);
                    out.push(Action::Call(index, DeviceCall::Reset));
                }
                continue;
            }
            // Invariant 6: acknowledged is only what write() returned for, of the stream that counts.
            if let Some((session, offset)) = device.unacked
                && device.next_stream.is_none()
                && device.stream.0 > 0
                && device.loaded >= offset
            {
                device.unacked = None;
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let ack = Message::SwitchoverAck { device: index, session };
                    out.push(Action::Send(connection, ack));
                }
            }
        }
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
