//! Two hosts as a system of states and steps: both machines, one device, memory, links, disks, and everything
//! that may go wrong. Time is not in it: a limit strikes whenever it may.
//!
//! What is abstract: memory is one page (dirty, collected, sent, fresh at the destination); a device's stream
//! counts its bytes; every owning thread takes its commands in order and answers each at once, except a
//! question to a device, whose answer may be under way. A process that dies takes its guest, its device and
//! its end of every link along and leaves its records.

use std::collections::VecDeque;

use switchover::handover::destination::{self as dst, Destination};
use switchover::handover::source::{
    self as src, CallResult, InfoAnswer, Point, Source, Sync, TimeLimit, Verdict,
};
use switchover::handover::{
    Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve, Rules,
};
use switchover::message::{
    Attempt, Connection, DeviceEnd, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

use super::search::{Kind, Owes, System};

const NIC: DeviceIndex = DeviceIndex(0);
const RUN_HERE: Resolve = Resolve::RunHere { force: false };

#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// The next message of a link arrives.
    ToDestination(usize),
    ToSource(usize),
    /// A side hears that a link is down; what was on its way to it is lost.
    DownAtSource(usize),
    DownAtDestination(usize),
    Connect,
    /// A thread does the next thing it was told.
    Worker,
    Device,
    /// The answer to a question arrives.
    Answer,
    Disk,
    WorkerThere,
    DeviceThere,
    DiskThere,
    /// The next frame of the data channel arrives.
    Data,
    StateComplete,
    Verdict(Verdict),
    Switchover,
    Poll,
    /// The guest, or its device, writes memory.
    Write,
    /// A pass over memory.
    Pass,
    WindowEnds,
    /// The destination's window is over, and the source's own limit says so.
    AnswerLimit,
    /// A question was not answered in time.
    QueryLimit,
    RestartSource,
    RestartDestination,
    Operator(Resolve),
    OperatorThere(Resolve),
    /// One of the things that cost one of the faults there are.
    Fault(Fault),
}

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Cut(usize),
    CrashSource,
    CrashDestination,
    /// The guest reconfigures its device: new initial data.
    Reinit,
    /// The guest resets its device.
    Reset,
    Worker,
    Device,
    Disk,
    WorkerThere,
    DeviceThere,
    DiskThere,
    Limit(TimeLimit),
    Verdict,
    TakeBack,
    Cancel,
    CancelThere,
    Fail,
    FailThere,
    PowerOff,
    /// A poll whose answer may be under way when the vCPUs pause.
    IdlePoll,
    /// An acknowledgement of the session before.
    StaleAck,
    /// Somebody without a record answers a question.
    Unknown,
    /// A Commit that was sent once comes again, over this link.
    CommitAgain(usize),
    /// A Commit of the attempt before comes over the newest link.
    OldCommit,
}

/// Which faults there are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Faults {
    /// How many in all.
    pub left: u8,
    /// Links, processes, and words that come late, twice, or from somebody without a record.
    pub links: bool,
    /// The device, and the guest's doings with it.
    pub devices: bool,
    /// Disks, VMM calls, limits, people.
    pub hosts: bool,
}

impl Faults {
    /// So many of every kind.
    pub fn any(left: u8) -> Self {
        Self { left, links: true, devices: true, hosts: true }
    }

    fn has(self, fault: Fault) -> bool {
        use Fault::*;
        let of_kind = match fault {
            Cut(_) | CrashSource | CrashDestination | Unknown | CommitAgain(_) | OldCommit => {
                self.links
            }
            Reinit | Reset | Device | DeviceThere | IdlePoll | StaleAck => self.devices,
            // Whatever else goes wrong, it may be taken back for it.
            TakeBack | Verdict => true,
            _ => self.hosts,
        };
        self.left > 0 && of_kind
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Link {
    up: bool,
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    told_source: bool,
    told_destination: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    Track,
    Pause,
    Resume,
    Sync(Sync),
    Restore,
    FinalRam,
    Save(Attempt),
    Reattach,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum DeviceWork {
    Call(DeviceCall),
    Begin(Session),
    Read,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct DeviceHere {
    traits: DeviceTraits,
    state: DeviceState,
    stream: Session,
    offset: u64,
    /// Where the initial data of the newest session ends.
    initial_end: u64,
    unread: u64,
    reinit: bool,
    ended: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct DeviceThere {
    state: DeviceState,
    stream: Session,
    loaded: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum WorkThere {
    Compare,
    Apply,
    Wire,
    Start,
    Unload,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Frame {
    /// A page as it was when it was sent; of the last memory of an attempt, or of a pass.
    Page {
        stale: bool,
        last: bool,
    },
    Device(Session, u64),
    Section(Attempt),
}

/// The page that stands for memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Page {
    dirty: bool,
    /// Collected and not sent.
    collected: bool,
    /// Sent as the last memory of the attempt.
    in_attempt: bool,
    /// The destination has it as it is here.
    fresh: bool,
}

/// Two hosts.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Model {
    rules: Rules,
    faults: Faults,
    links: Vec<Link>,
    data: VecDeque<Frame>,
    page: Page,

    /// `None` = the process is dead.
    source: Option<Source>,
    /// It has finished and hears nothing any more.
    over: bool,
    /// The guest's memory is here.
    guest_here: bool,
    runs_here: bool,
    device: Option<DeviceHere>,
    work: VecDeque<Work>,
    device_work: VecDeque<DeviceWork>,
    answers: VecDeque<src::Event>,
    disk: VecDeque<(Decision, Attempt)>,
    record: Option<(Decision, Attempt)>,
    judging: Option<Point>,
    limits: Vec<TimeLimit>,
    reconnect: bool,

    destination: Option<Destination>,
    runs_there: bool,
    /// The process that loaded the guest lives, and has not thrown it away.
    memory_there: bool,
    device_there: Option<DeviceThere>,
    work_there: VecDeque<WorkThere>,
    device_work_there: VecDeque<DeviceCall>,
    disk_there: VecDeque<(Decision, Attempt)>,
    /// The decision of each attempt.
    records_there: Vec<(Decision, Attempt)>,
    sections: Option<Attempt>,
    applied: Option<Attempt>,
    awaited: Option<(Attempt, u64)>,
    window: bool,

    // What the checks need to know beyond that.
    /// The newest connection whose Hello arrived.
    heard: u64,
    committed: Option<Attempt>,
    /// Unread initial data that the source was told of.
    known_unread: bool,
    /// A question was asked after the vCPUs had paused.
    asked_paused: bool,
    /// A source with its guest told the destination that it goes on.
    took_back: bool,
    crashed: bool,
    /// The guest's memory here died with its process.
    died_here: bool,
    /// The guest ended with the host that was its home.
    excused: bool,
    wrong: Option<&'static str>,
}

fn failure() -> Failure {
    Failure::new(Side::Source, "x")
}

fn features() -> Features {
    Features::default()
}

fn setup(devices: Vec<DeviceTraits>) -> src::Setup {
    src::Setup {
        migration: Id(1),
        instance: Id(2),
        features: features(),
        description: String::new(),
        devices,
        dry_run: false,
    }
}

impl Model {
    /// Two hosts before the first connection, and so many faults to come.
    pub fn new(traits: Option<DeviceTraits>, rules: Rules, faults: Faults) -> Self {
        let device = |traits| DeviceHere {
            traits,
            state: DeviceState::Running,
            stream: Session(0),
            offset: 0,
            initial_end: 0,
            unread: 0,
            reinit: false,
            ended: false,
        };
        let there = DeviceThere { state: DeviceState::Running, stream: Session(0), loaded: 0 };
        Self {
            rules,
            faults,
            links: Vec::new(),
            data: VecDeque::new(),
            page: Page { dirty: false, collected: true, in_attempt: false, fresh: false },
            source: Some(Source::with_rules(setup(traits.into_iter().collect()), rules)),
            over: false,
            guest_here: true,
            runs_here: true,
            device: traits.map(device),
            work: VecDeque::new(),
            device_work: VecDeque::new(),
            answers: VecDeque::new(),
            disk: VecDeque::new(),
            record: None,
            judging: None,
            limits: Vec::new(),
            reconnect: true,
            destination: Some(Destination::with_rules(
                Id(1),
                Id(3),
                Id(4),
                features(),
                5_000,
                rules,
            )),
            runs_there: false,
            memory_there: true,
            device_there: traits.map(|_| there),
            work_there: VecDeque::new(),
            device_work_there: VecDeque::new(),
            disk_there: VecDeque::new(),
            records_there: Vec::new(),
            sections: None,
            applied: None,
            awaited: None,
            window: false,
            heard: 0,
            committed: None,
            known_unread: false,
            asked_paused: false,
            took_back: false,
            crashed: false,
            died_here: false,
            excused: false,
            wrong: None,
        }
    }

    /// The same once precopy has come to rest: the way there is the same for all.
    pub fn in_precopy(traits: Option<DeviceTraits>, rules: Rules, faults: Faults) -> Self {
        let mut model = Self::new(traits, rules, Faults::any(0));
        while let Some((_, step)) = model
            .steps()
            .into_iter()
            .find(|(_, step)| !matches!(step, Step::Write | Step::Switchover))
        {
            model = model.after(step);
        }
        assert!(model.source().is_some_and(|s| s.state() == src::State::Precopy && s.all_ready()));
        model.faults = faults;
        model
    }

    fn source(&self) -> Option<&Source> {
        self.source.as_ref().filter(|_| !self.over)
    }

    fn state(&self) -> Option<src::State> {
        self.source().map(Source::state)
    }

    fn state_there(&self) -> Option<dst::State> {
        self.destination.as_ref().map(Destination::state)
    }

    fn wrong(&mut self, what: &'static str) {
        self.wrong.get_or_insert(what);
    }

    fn require(&mut self, holds: bool, what: &'static str) {
        if !holds {
            self.wrong(what);
        }
    }

    /// The destination holds a complete guest, or runs it.
    fn guest_there(&self) -> bool {
        use dst::State::*;
        matches!(self.state_there(), Some(Prepared | Expired | Starting | Running))
    }

    // --- what the source does -----------------------------------------------------------------

    fn tell_source(&mut self, event: src::Event) {
        let Some(source) = self.source.as_mut().filter(|_| !self.over) else { return };
        match &event {
            src::Event::Info { answer: InfoAnswer::Known { unread_initial, .. }, .. } => {
                self.known_unread = *unread_initial;
            }
            src::Event::InitialRead { .. } | src::Event::DeviceReset(_) => {
                self.known_unread = false
            }
            _ => {}
        }
        let mut actions = Vec::new();
        source.handle(event, &mut actions);
        actions.into_iter().for_each(|action| self.source_does(action));
        self.check();
    }

    fn source_does(&mut self, action: src::Action) {
        use src::Action::*;
        match action {
            Enter(src::State::RollingBack) => {
                // The data channel is closed; what was the attempt's may not arrive any more.
                let lost = |f: &Frame| !matches!(f, Frame::Page { last: false, .. });
                self.data.retain(|frame| !lost(frame));
            }
            Send(message) => self.source_sends(message),
            StartTracking => self.work.push_back(Work::Track),
            Call(_, call) => self.device_work.push_back(DeviceWork::Call(call)),
            Read(_) => self.device_work.push_back(DeviceWork::Read),
            Pause => self.work.push_back(Work::Pause),
            Resume => self.work.push_back(Work::Resume),
            Sync(sync) => self.work.push_back(Work::Sync(sync)),
            RestoreDirty => self.work.push_back(Work::Restore),
            SendFinalRam => self.work.push_back(Work::FinalRam),
            SaveMachineState => {
                let attempt = self.source.as_ref().map_or(Attempt(0), Source::attempt);
                self.work.push_back(Work::Save(attempt));
            }
            Reattach => self.work.push_back(Work::Reattach),
            SendStateEnd(attempt) => {
                let end = |d: &DeviceHere| DeviceEnd { device: NIC, bytes: d.offset, checksum: 0 };
                let devices = self.device.iter().map(end).collect();
                self.source_sends(Message::StateEnd {
                    attempt,
                    channels: Vec::new(),
                    devices,
                    sections: 1,
                });
            }
            Judge(point) => self.judging = Some(point),
            Record(decision, attempt) => self.disk.push_back((decision, attempt)),
            Arm(limit) => {
                self.limits.push(limit);
                self.limits.sort();
                self.limits.dedup();
            }
            Disarm(limit) => self.limits.retain(|armed| *armed != limit),
            Reconnect => self.reconnect = true,
            Finish(outcome) => self.source_ends(&outcome),
            Enter(_) | StopTracking | StopReading(_) | Verify(_) | Report(_) => {}
        }
    }

    fn source_ends(&mut self, outcome: &Outcome) {
        let gone = matches!(outcome, Outcome::Completed | Outcome::Abandoned);
        self.over = true;
        // What is still to be written is written: nothing depends on when.
        while let Some(record) = self.disk.pop_front() {
            self.record = Some(record);
        }
        if gone {
            self.guest_here = false;
            self.device = None;
        } else {
            // A device that could not even be reset is lost; the guest runs without it.
            let there =
                |d: &DeviceHere| matches!(d.state, DeviceState::Running | DeviceState::Error);
            let running = self.device.as_ref().is_none_or(there);
            let guest = !self.guest_here || (self.runs_here && running);
            self.require(guest, "the migration ended and the guest does not run here");
        }
        self.work.clear();
        self.device_work.clear();
        self.answers.clear();
        self.limits.clear();
        (self.judging, self.reconnect) = (None, false);
        for link in &mut self.links {
            (link.up, link.told_source) = (false, true);
            link.to_source.clear();
        }
        self.lost();
    }

    fn source_sends(&mut self, message: Message) {
        match &message {
            Message::SessionBegin { session, .. } => {
                self.device_work.push_back(DeviceWork::Begin(*session));
                self.known_unread = false;
            }
            Message::StopCopyBegin { .. } => {
                self.took_back = false;
                self.check_stop_copy();
            }
            Message::Commit { attempt } => {
                let recorded = self.record == Some((Decision::Committing, *attempt));
                self.require(recorded, "Commit without a record");
                self.committed = Some(*attempt);
            }
            Message::Query { .. }
            | Message::Abort { .. }
            | Message::RollBack { .. }
            | Message::Cancel
            | Message::Failed { .. } => self.took_back |= self.guest_here,
            _ => {}
        }
        let newest = self.source.as_ref().and_then(Source::connection);
        let Some(link) = newest.and_then(|c| self.links.get_mut(c.0 as usize - 1)) else { return };
        if link.up && self.destination.is_some() {
            link.to_destination.push_back(message);
        }
    }

    /// Invariants 5 and 6, at the moment that cannot be taken back.
    fn check_stop_copy(&mut self) {
        let Some(device) = self.device.clone().filter(|d| d.traits.pre_copy) else { return };
        self.require(!self.known_unread, "invariant 5: known unread initial data in STOP_COPY");
        self.require(self.asked_paused, "invariant 5: the device was not asked after the pause");
        let Some(there) = self.device_there.clone() else { return };
        let loaded = there.stream == device.stream && there.loaded >= device.initial_end;
        // A REINIT the source could not know of yet is none of its business.
        let untold = device.reinit || device.unread > 0;
        self.require(loaded || untold, "invariant 6: initial data counts as loaded and is not");
    }

    /// The next thing the worker was told. `fails`: it cannot.
    fn work(&mut self, fails: bool) {
        let Some(work) = self.work.pop_front() else { return };
        let stopping = self.state() == Some(src::State::StopCopy);
        let answer = if fails { Err(failure()) } else { Ok(()) };
        match work {
            Work::Track => self.tell_source(src::Event::TrackingStarted(answer)),
            Work::Pause => {
                self.runs_here = false;
                self.asked_paused = false;
                self.tell_source(src::Event::Paused(Ok(())));
            }
            Work::Resume => {
                self.runs_here = true;
                self.tell_source(src::Event::Resumed(Ok(())));
            }
            Work::Sync(sync) => {
                self.page.collected |= std::mem::take(&mut self.page.dirty);
                if sync == Sync::Provisional {
                    self.page.in_attempt = false;
                }
                self.tell_source(src::Event::Synced(sync, answer));
            }
            Work::Restore => {
                self.page.collected |= std::mem::take(&mut self.page.in_attempt);
            }
            Work::FinalRam if stopping => {
                if std::mem::take(&mut self.page.collected) {
                    self.page.in_attempt = true;
                    self.data.push_back(Frame::Page { stale: false, last: true });
                }
                self.tell_source(src::Event::RamSent(answer));
            }
            Work::Save(attempt) if stopping && !fails => {
                self.data.push_back(Frame::Section(attempt));
                self.tell_source(src::Event::MachineStateSaved(Ok(())));
            }
            // The channel is closed under it.
            Work::FinalRam => self.tell_source(src::Event::RamSent(Err(failure()))),
            Work::Save(_) => self.tell_source(src::Event::MachineStateSaved(Err(failure()))),
            Work::Reattach => self.tell_source(src::Event::Reattached(answer)),
        }
    }

    /// The next thing the device's thread was told.
    fn device_works(&mut self, fails: bool) {
        let Some(work) = self.device_work.pop_front() else { return };
        let paused = !self.runs_here;
        let Some(device) = self.device.as_mut() else { return };
        let precopy = matches!(device.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        match work {
            DeviceWork::Begin(session) => {
                (device.stream, device.offset, device.ended) = (session, 0, false);
                device.initial_end = device.unread;
            }
            DeviceWork::Call(DeviceCall::Info) => {
                // No answer is one, too: what to make of it is the verdict's business.
                self.asked_paused |= paused && precopy;
                let answer = match precopy && !fails {
                    true => {
                        let reinit = std::mem::take(&mut device.reinit);
                        InfoAnswer::Known { unread_initial: device.unread > 0, reinit }
                    }
                    false => InfoAnswer::Unknown,
                };
                let offset = device.offset;
                self.answers.push_back(src::Event::Info { device: NIC, answer, offset });
            }
            DeviceWork::Call(call) => {
                let result = device.obey(call, fails);
                self.tell_source(src::Event::CallDone { device: NIC, call, result });
            }
            DeviceWork::Read => {
                let stopped = device.state == DeviceState::StopCopy && !device.ended;
                if !precopy && !stopped {
                    return;
                }
                let bytes = std::mem::take(&mut device.unread) + u64::from(stopped);
                device.offset += bytes;
                device.ended |= stopped;
                let (stream, offset) = (device.stream, device.offset);
                if bytes > 0 {
                    self.data.push_back(Frame::Device(stream, bytes));
                }
                self.tell_source(match stopped {
                    true => src::Event::StreamEnded { device: NIC },
                    false => src::Event::InitialRead { device: NIC, offset },
                });
            }
        }
    }

    fn write_record(&mut self, fails: bool) {
        let Some(record) = self.disk.pop_front() else { return };
        if !fails {
            self.record = Some(record);
        }
        let answer = if fails { Err(failure()) } else { Ok(()) };
        self.tell_source(src::Event::Recorded(answer));
    }

    // --- what the destination does ------------------------------------------------------------

    fn tell_destination(&mut self, event: dst::Event) {
        let Some(destination) = self.destination.as_mut() else { return };
        let before = destination.state();
        let by_commit = match &event {
            dst::Event::Message(connection, Message::Commit { attempt }) => {
                Some((connection.0, *attempt))
            }
            _ => None,
        };
        let attempt = destination.attempt();
        let mut actions = Vec::new();
        destination.handle(event, &mut actions);
        let obeyed = before != dst::State::Starting && destination.state() == dst::State::Starting;
        if let Some((connection, of)) = by_commit.filter(|_| obeyed) {
            self.require(connection == self.heard, "invariant 6: a Commit over an old connection");
            self.require(of == attempt, "invariant 6: a Commit of another attempt");
        }
        if self.state_there() != Some(dst::State::Prepared) {
            self.window = false;
        }
        actions.into_iter().for_each(|action| self.destination_does(action));
        self.check();
    }

    fn destination_does(&mut self, action: dst::Action) {
        use dst::Action::*;
        match action {
            Send(connection, message) => self.destination_sends(connection, message),
            Compare(_) => self.work_there.push_back(WorkThere::Compare),
            BeginStream(_, session) => {
                if let Some(device) = &mut self.device_there {
                    (device.stream, device.loaded) = (session, 0);
                }
            }
            Call(_, call) => self.device_work_there.push_back(call),
            AwaitState(Message::StateEnd { attempt, devices, .. }) => {
                self.awaited = Some((attempt, devices.first().map_or(0, |end| end.bytes)));
            }
            ApplyMachineState => self.work_there.push_back(WorkThere::Apply),
            Wire => self.work_there.push_back(WorkThere::Wire),
            Record(decision, attempt) => {
                if decision == Decision::Never {
                    self.took_back |= self.guest_here;
                }
                self.disk_there.push_back((decision, attempt));
            }
            ArmWindow => self.window = true,
            Unload(_) => self.work_there.push_back(WorkThere::Unload),
            Start => self.work_there.push_back(WorkThere::Start),
            Finish(Outcome::Completed) => {}
            Finish(_) => self.nothing_there(),
            Enter(_) | AwaitState(_) | Hash(..) | ReportDeviceLost(..) | Resolved(..) => {}
        }
    }

    /// Nothing of it will run there: threads end, devices are reset, memory is empty.
    fn nothing_there(&mut self) {
        self.work_there.clear();
        self.device_work_there.clear();
        self.data.clear();
        (self.sections, self.applied, self.awaited) = (None, None, None);
        self.device_there = None;
        (self.memory_there, self.page.fresh) = (false, false);
        self.window = false;
        self.lost();
    }

    fn destination_sends(&mut self, connection: Connection, message: Message) {
        let recorded =
            |decision, attempt: &Attempt| self.records_there.contains(&(decision, *attempt));
        let holds = match &message {
            Message::Ready { attempt, .. } => recorded(Decision::Prepared, attempt),
            Message::Never { attempt, .. } => recorded(Decision::Never, attempt),
            Message::Running { attempt } => recorded(Decision::Running, attempt),
            _ => true,
        };
        self.require(holds, "an answer without its record");
        let Some(link) = self.links.get_mut(connection.0 as usize - 1) else { return };
        if link.up && !link.told_source {
            link.to_source.push_back(message);
        }
    }

    fn work_there(&mut self, fails: bool) {
        let Some(work) = self.work_there.pop_front() else { return };
        let answer = if fails { Err(failure()) } else { Ok(()) };
        let event = match work {
            WorkThere::Compare => {
                let traits = self.device.iter().map(|d| d.traits).collect();
                dst::Event::Compared(Ok(traits))
            }
            WorkThere::Apply => {
                self.applied = self.sections.take();
                dst::Event::MachineStateApplied(answer)
            }
            WorkThere::Wire => dst::Event::Wired(answer),
            WorkThere::Start => {
                self.check_start();
                self.runs_there = true;
                dst::Event::Started(Ok(()))
            }
            WorkThere::Unload => {
                // Passes are drained; what was the attempt's is dropped.
                let whole = |f: &Frame| matches!(f, Frame::Page { stale: false, last: false });
                self.page.fresh |= self.data.iter().any(whole);
                self.data.clear();
                (self.sections, self.applied, self.awaited) = (None, None, None);
                dst::Event::Unloaded(answer)
            }
        };
        self.tell_destination(event);
    }

    /// Invariant 3, before the first instruction.
    fn check_start(&mut self) {
        let attempt = self.destination.as_ref().map(Destination::attempt);
        let recorded =
            attempt.is_some_and(|a| self.records_there.contains(&(Decision::Running, a)));
        self.require(recorded, "started without a record");
        self.require(self.page.fresh, "invariant 3: memory is not what it was");
        self.require(self.applied == attempt, "invariant 3: the machine state of another attempt");
        if let (Some(here), Some(there)) = (self.device.clone(), self.device_there.clone()) {
            let same = here.stream == there.stream && here.offset == there.loaded && here.ended;
            let lost = there.state != DeviceState::Running;
            self.require(same || lost, "invariant 3: device bytes are missing");
        }
    }

    fn device_works_there(&mut self, fails: bool) {
        let Some(call) = self.device_work_there.pop_front() else { return };
        let Some(device) = self.device_there.as_mut() else { return };
        let result = match call {
            _ if fails => {
                device.state = DeviceState::Error;
                let state = Some(DeviceState::Error);
                CallResult::Failed { state, failure: failure() }
            }
            DeviceCall::SetState(target) => {
                device.state = target;
                CallResult::Done
            }
            _ => {
                let state = DeviceState::Running;
                *device = DeviceThere { state, stream: Session(0), loaded: 0 };
                CallResult::Done
            }
        };
        self.tell_destination(dst::Event::CallDone { device: NIC, call, result });
    }

    fn write_record_there(&mut self, fails: bool) {
        let Some((decision, attempt)) = self.disk_there.pop_front() else { return };
        if !fails {
            let of = |(_, a): &&(Decision, Attempt)| *a == attempt;
            let final_one =
                |(d, _): &(Decision, Attempt)| *d != Decision::Prepared && *d != decision;
            let changed = self.records_there.iter().filter(of).any(final_one);
            self.require(!changed, "a recorded decision changed");
            self.records_there.retain(|(_, a)| *a != attempt);
            self.records_there.push((decision, attempt));
        }
        let answer = if fails { Err(failure()) } else { Ok(()) };
        self.tell_destination(dst::Event::Recorded(answer));
    }

    fn deliver_data(&mut self) {
        let Some(frame) = self.data.pop_front() else { return };
        match frame {
            Frame::Page { stale, .. } => self.page.fresh |= !stale,
            Frame::Section(attempt) => self.sections = Some(attempt),
            Frame::Device(stream, bytes) => {
                let Some(device) = self.device_there.as_mut() else { return };
                if device.stream == stream && device.state == DeviceState::Resuming {
                    device.loaded += bytes;
                    let offset = device.loaded;
                    self.tell_destination(dst::Event::Loaded { device: NIC, stream, offset });
                }
            }
        }
    }

    fn data_is_due(&self) -> bool {
        match (self.data.front(), &self.device_there) {
            // Its stream has not begun there: the channel waits.
            (Some(Frame::Device(stream, _)), Some(device)) => {
                device.stream > *stream
                    || device.stream == *stream && device.state == DeviceState::Resuming
                    || self.state_there() == Some(dst::State::Aborted)
            }
            (front, _) => front.is_some(),
        }
    }

    fn state_complete(&self) -> Option<Attempt> {
        let (attempt, bytes) = self.awaited?;
        let loaded = self.device_there.as_ref().is_none_or(|device| device.loaded == bytes);
        (loaded && self.sections == Some(attempt)).then_some(attempt)
    }

    // --- links and processes ------------------------------------------------------------------

    fn connect(&mut self) {
        self.reconnect = false;
        self.links.push(Link { up: true, ..Link::default() });
        self.tell_source(src::Event::LinkUp(Connection(self.links.len() as u64)));
    }

    fn crash_source(&mut self) {
        // A guest or device that ran here ended with its home: what the destination may hold is older.
        let active = self.device.as_ref().is_some_and(|d| !d.is_still());
        self.excused |= self.guest_here && (self.runs_here || active || !self.guest_there());
        self.crashed = true;
        self.died_here |= self.guest_here;
        (self.source, self.over) = (None, false);
        (self.guest_here, self.runs_here) = (false, false);
        self.device = None;
        self.work.clear();
        self.device_work.clear();
        self.answers.clear();
        self.disk.clear();
        self.limits.clear();
        (self.judging, self.reconnect) = (None, false);
        for link in &mut self.links {
            (link.up, link.told_source) = (false, true);
            link.to_source.clear();
        }
        self.lost();
        self.check();
    }

    fn restart_source(&mut self) {
        let Some((_, attempt)) = self.record else { return };
        let newest = Connection(self.links.len() as u64);
        let (setup, secret) = (setup(Vec::new()), Id(4));
        self.source =
            Some(Source::recovered_with_rules(setup, secret, attempt, newest, self.rules));
        self.reconnect = true;
    }

    fn crash_destination(&mut self) {
        // A guest that ran there ended with its home; one that had not started is the source's still.
        self.excused |= self.runs_there || !self.guest_here;
        self.crashed = true;
        self.destination = None;
        self.runs_there = false;
        self.disk_there.clear();
        for link in &mut self.links {
            (link.up, link.told_destination) = (false, true);
            link.to_destination.clear();
        }
        self.nothing_there();
        self.check();
    }

    fn restart_destination(&mut self) {
        let Some((decision, attempt)) = self.records_there.last().copied() else { return };
        let (migration, instance, secret) = (Id(1), Id(33), Id(4));
        self.destination = Some(Destination::recovered_with_rules(
            migration, instance, secret, attempt, decision, self.rules,
        ));
    }

    /// Nobody has the guest any more: that may only be because its home died.
    fn lost(&mut self) {
        if self.guest_here || self.guest_there() || self.excused {
            return;
        }
        // The living source had said that it goes on: the guest was its own again when it died.
        if self.took_back && self.died_here {
            self.excused = true;
            return;
        }
        self.wrong("invariant 2: nobody has the guest any more");
    }

    // --- invariants ---------------------------------------------------------------------------

    fn check(&mut self) {
        let twice = self.runs_here && self.runs_there;
        self.require(!twice, "invariant 1: the guest runs twice");
        self.lost();
        let runs = |state| matches!(state, DeviceState::Running | DeviceState::RunningP2p);
        let active_there =
            self.device_there.as_ref().is_some_and(|d| d.loaded > 0 && runs(d.state));
        let active_here = self.guest_here && self.device.as_ref().is_some_and(|d| !d.is_still());
        let both = (active_there || self.runs_there) && active_here;
        self.require(!both, "invariant 1: a device runs on both sides");
        let recorded = self.destination.as_ref().and_then(Destination::decision);
        let early = active_there && recorded != Some(Decision::Running);
        self.require(!early, "a device runs before `running` is recorded");
    }

    fn cost(&self, out: &mut Vec<(Kind, Step)>, fault: Fault) {
        if self.faults.has(fault) {
            out.push((Kind::Fault, Step::Fault(fault)));
        }
    }
}

impl DeviceHere {
    fn is_still(&self) -> bool {
        use DeviceState::*;
        matches!(self.state, Stop | StopCopy | Error)
    }

    fn obey(&mut self, call: DeviceCall, fails: bool) -> CallResult {
        use DeviceState::*;
        let saving = |state| matches!(state, PreCopy | PreCopyP2p | StopCopy);
        let error = CallResult::Failed { state: Some(Error), failure: failure() };
        match call {
            _ if fails => {
                self.state = Error;
                error
            }
            DeviceCall::SetState(_) if self.state == Error => error,
            DeviceCall::SetState(target) => {
                if !saving(self.state) && saving(target) {
                    (self.unread, self.reinit) = (u64::from(target != StopCopy), false);
                }
                if !saving(target) {
                    (self.unread, self.reinit) = (0, false);
                }
                self.state = target;
                CallResult::Done
            }
            _ => {
                (self.state, self.unread, self.reinit) = (Running, 0, false);
                CallResult::Done
            }
        }
    }
}

impl System for Model {
    type Step = Step;

    fn steps(&self) -> Vec<(Kind, Step)> {
        let mut out = Vec::new();
        if self.wrong.is_some() || self.excused {
            return out;
        }
        // A verdict is given at once, by the same call.
        if self.judging.is_some() {
            out.push((Kind::Plain, Step::Verdict(Verdict::Go)));
            if self.source().is_some_and(Source::unread_initial) {
                out.push((Kind::Plain, Step::Verdict(Verdict::Absorb)));
            }
            self.cost(&mut out, Fault::Verdict);
            return out;
        }
        self.steps_of_links(&mut out);
        self.steps_of_hosts(&mut out);
        self.steps_of_people(&mut out);
        if self.faults.left > 0 {
            self.faults(&mut out);
        }
        out
    }

    fn after(&self, step: Step) -> Self {
        let mut next = self.clone();
        next.take(step);
        next
    }

    fn violation(&self) -> Option<&'static str> {
        self.wrong
    }

    fn owes(&self) -> Owes {
        // Once the source has said that the guest is its own again, it goes with the source.
        let home_died = self.excused || self.took_back && self.died_here;
        match (home_died, self.crashed) {
            (true, _) => Owes::Nothing,
            (false, true) => Owes::WithOperator,
            (false, false) => Owes::ByItself,
        }
    }

    fn is_good(&self) -> bool {
        self.runs_here != self.runs_there
    }
}

impl Model {
    fn steps_of_links(&self, out: &mut Vec<(Kind, Step)>) {
        for (at, link) in self.links.iter().enumerate() {
            let mut can = |step| out.push((Kind::Plain, step));
            if !link.to_destination.is_empty() && !link.told_destination {
                can(Step::ToDestination(at));
            }
            if !link.to_source.is_empty() && !link.told_source {
                can(Step::ToSource(at));
            }
            if !link.up && !link.told_source {
                can(Step::DownAtSource(at));
            }
            if !link.up && !link.told_destination {
                can(Step::DownAtDestination(at));
            }
        }
        if self.reconnect && self.source().is_some() && self.destination.is_some() {
            out.push((Kind::Plain, Step::Connect));
        }
    }

    fn steps_of_hosts(&self, out: &mut Vec<(Kind, Step)>) {
        use src::State::*;
        let mut can = |enabled: bool, step| {
            if enabled {
                out.push((Kind::Plain, step));
            }
        };
        let reset_untold = self.answers.iter().any(|e| matches!(e, src::Event::DeviceReset(_)));
        let pauses = self.work.front() == Some(&Work::Pause);
        can(!(self.work.is_empty() || pauses && reset_untold), Step::Worker);
        can(!self.device_work.is_empty() && self.answers.is_empty(), Step::Device);
        can(!self.answers.is_empty(), Step::Answer);
        can(!self.disk.is_empty(), Step::Disk);
        can(!self.work_there.is_empty(), Step::WorkerThere);
        can(!self.device_work_there.is_empty(), Step::DeviceThere);
        can(!self.disk_there.is_empty(), Step::DiskThere);
        can(self.data_is_due(), Step::Data);
        can(self.state_complete().is_some(), Step::StateComplete);
        let precopy = self.state() == Some(Precopy);
        let source = self.source();
        can(precopy && source.is_some_and(Source::all_ready), Step::Switchover);
        let news = self.device.as_ref().is_some_and(|d| d.reinit || d.unread > 0);
        can(precopy && news && self.can_poll(), Step::Poll);
        can(self.can_write(), Step::Write);
        let in_data = self.data.iter().any(|f| matches!(f, Frame::Page { .. }));
        can(precopy && !in_data && (self.page.dirty || self.page.collected), Step::Pass);
        can(self.window, Step::WindowEnds);
        let answer = self.limits.contains(&TimeLimit::Answer) && !self.window;
        can(answer, Step::AnswerLimit);
        // Asked again where no word of it is under way.
        let idle = |link: &Link| link.to_destination.is_empty() && link.to_source.is_empty();
        let quiet = self.links.iter().all(idle) && self.disk_there.is_empty();
        can(self.limits.contains(&TimeLimit::Query) && quiet, Step::QueryLimit);
        let doubtful = matches!(self.record, Some((Decision::Committing, _)));
        can(self.source.is_none() && doubtful, Step::RestartSource);
        let recorded = !self.records_there.is_empty();
        can(self.destination.is_none() && recorded, Step::RestartDestination);
    }

    fn can_poll(&self) -> bool {
        let free = |s: &Source| s.can_ask(NIC) && !s.is_calling(NIC);
        self.source().is_some_and(free)
    }

    /// The guest writes while it runs, the device while it may; once where that changes nothing more.
    fn can_write(&self) -> bool {
        use DeviceState::*;
        let active =
            |d: &DeviceHere| matches!(d.state, Running | RunningP2p | PreCopy | PreCopyP2p);
        let writer = self.runs_here || self.device.as_ref().is_some_and(active);
        let tracked = self.state().is_some_and(|s| s >= src::State::Precopy);
        let whole = |f: &Frame| matches!(f, Frame::Page { stale: false, .. });
        let changes = self.page.fresh || self.data.iter().any(whole);
        self.guest_here && writer && tracked && changes
    }

    /// What people do who know what the two hosts show.
    fn steps_of_people(&self, out: &mut Vec<(Kind, Step)>) {
        use dst::State::*;
        let mut can = |enabled: bool, step| {
            if enabled {
                out.push((Kind::Operator, step));
            }
        };
        let doubt = self.state() == Some(src::State::InDoubt);
        let starts = matches!(self.state_there(), Some(Starting | Running));
        can(doubt && self.guest_here && !starts, Step::Operator(RUN_HERE));
        // Nothing runs there any more, whatever was obeyed.
        let nothing_there = !self.memory_there && !starts;
        let force = Resolve::RunHere { force: true };
        can(doubt && self.guest_here && nothing_there, Step::Operator(force));
        can(doubt && self.runs_there, Step::Operator(Resolve::Discard));
        let complete = matches!(self.state_there(), Some(Prepared | Expired));
        can(complete && !self.guest_here, Step::OperatorThere(RUN_HERE));
        can(complete && self.runs_here, Step::OperatorThere(Resolve::Discard));
    }

    fn faults(&self, out: &mut Vec<(Kind, Step)>) {
        use src::State::*;
        let mut can = |enabled: bool, fault| {
            if enabled {
                self.cost(out, fault);
            }
        };
        for (at, link) in self.links.iter().enumerate() {
            can(link.up, Fault::Cut(at));
            let again = self.committed.is_some() && !link.told_destination;
            can(again, Fault::CommitAgain(at));
        }
        can(
            self.source.is_some() && self.guest_here
                || self.record.is_some() && self.source().is_some(),
            Fault::CrashSource,
        );
        can(self.destination.is_some(), Fault::CrashDestination);
        let precopy =
            |d: &DeviceHere| matches!(d.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        let device = self.device.as_ref().filter(|_| self.source().is_some());
        can(device.is_some_and(precopy), Fault::Reinit);
        can(device.is_some() && self.runs_here, Fault::Reset);
        can(device.is_some() && self.runs_here, Fault::IdlePoll);
        let fails = matches!(
            self.work.front(),
            Some(Work::Track | Work::Sync(_) | Work::Save(_) | Work::Reattach)
        );
        can(fails, Fault::Worker);
        let called = matches!(self.device_work.front(), Some(DeviceWork::Call(_)));
        can(called && self.answers.is_empty(), Fault::Device);
        can(!self.disk.is_empty(), Fault::Disk);
        let fails = matches!(
            self.work_there.front(),
            Some(WorkThere::Apply | WorkThere::Wire | WorkThere::Unload)
        );
        can(fails, Fault::WorkerThere);
        can(!self.device_work_there.is_empty(), Fault::DeviceThere);
        can(!self.disk_there.is_empty(), Fault::DiskThere);
        for limit in &self.limits {
            let free = matches!(limit, TimeLimit::Answer | TimeLimit::Query);
            can(!free, Fault::Limit(*limit));
        }
        let state = self.state();
        let switching = matches!(state, Some(Look | Quiesce | StopCopy | AwaitReady));
        can(switching, Fault::TakeBack);
        can(state.is_some(), Fault::Cancel);
        can(state.is_some(), Fault::Fail);
        can(state.is_some() && self.runs_here, Fault::PowerOff);
        let waits = self.state_there().is_some_and(|s| s != dst::State::Aborted);
        can(waits && self.guest_here && state.is_some(), Fault::CancelThere);
        can(waits && self.guest_here && state.is_some(), Fault::FailThere);
        let newest = self.source().and_then(Source::connection);
        let session = self.source().map_or(0, |s| s.session(NIC).0);
        let unready = self.source().is_some_and(|s| !s.all_ready());
        let early = state.is_some_and(|s| s <= Quiesce);
        can(newest.is_some() && session > 1 && unready && early, Fault::StaleAck);
        can(newest.is_some() && state == Some(InDoubt), Fault::Unknown);
        let second = self.destination.as_ref().is_some_and(|d| d.attempt().0 > 1);
        can(second && self.heard > 0, Fault::OldCommit);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::ToDestination(at) => self.deliver_there(at),
            Step::ToSource(at) => {
                if let Some(message) = self.links[at].to_source.pop_front() {
                    self.tell_source(src::Event::Message(Connection(at as u64 + 1), message));
                }
            }
            Step::DownAtSource(at) => {
                self.links[at].told_source = true;
                self.links[at].to_source.clear();
                self.tell_source(src::Event::LinkDown(Connection(at as u64 + 1), failure()));
            }
            Step::DownAtDestination(at) => {
                self.links[at].told_destination = true;
                self.links[at].to_destination.clear();
                self.tell_destination(dst::Event::LinkDown(Connection(at as u64 + 1), failure()));
            }
            Step::Connect => self.connect(),
            Step::Worker => self.work(false),
            Step::Device => self.device_works(false),
            Step::Answer => {
                if let Some(answer) = self.answers.pop_front() {
                    self.tell_source(answer);
                }
            }
            Step::Disk => self.write_record(false),
            Step::WorkerThere => self.work_there(false),
            Step::DeviceThere => self.device_works_there(false),
            Step::DiskThere => self.write_record_there(false),
            Step::Data => self.deliver_data(),
            Step::StateComplete => {
                if let Some(attempt) = self.state_complete() {
                    self.awaited = None;
                    self.tell_destination(dst::Event::StateComplete(attempt));
                }
            }
            Step::Verdict(verdict) => {
                self.judging = None;
                self.tell_source(src::Event::Verdict(verdict));
            }
            Step::Switchover => self.tell_source(src::Event::Switchover),
            Step::Poll => self.poll(),
            Step::Write => {
                (self.page.dirty, self.page.fresh) = (true, false);
                for frame in &mut self.data {
                    if let Frame::Page { stale, .. } = frame {
                        *stale = true;
                    }
                }
            }
            Step::Pass => {
                (self.page.dirty, self.page.collected) = (false, false);
                self.data.push_back(Frame::Page { stale: false, last: false });
            }
            Step::WindowEnds => {
                self.window = false;
                self.tell_destination(dst::Event::WindowEnded);
            }
            Step::AnswerLimit => self.strike(TimeLimit::Answer),
            Step::QueryLimit => self.strike(TimeLimit::Query),
            Step::RestartSource => self.restart_source(),
            Step::RestartDestination => self.restart_destination(),
            Step::Operator(resolve) => self.tell_source(src::Event::Operator(resolve)),
            Step::OperatorThere(resolve) => self.tell_destination(dst::Event::Operator(resolve)),
            Step::Fault(fault) => {
                self.faults.left -= 1;
                self.suffer(fault);
            }
        }
    }

    fn suffer(&mut self, fault: Fault) {
        let newest = Connection(self.links.len() as u64);
        match fault {
            Fault::Cut(at) => self.links[at].up = false,
            Fault::CrashSource => self.crash_source(),
            Fault::CrashDestination => self.crash_destination(),
            Fault::Reinit => {
                if let Some(device) = &mut self.device {
                    (device.unread, device.reinit) = (device.unread + 1, true);
                    device.initial_end = device.offset + device.unread;
                }
            }
            Fault::Reset => {
                if let Some(device) = &mut self.device {
                    (device.state, device.unread, device.reinit) = (DeviceState::Running, 0, false);
                    self.answers.push_back(src::Event::DeviceReset(NIC));
                }
            }
            Fault::Worker => self.work(true),
            Fault::Device => self.device_works(true),
            Fault::Disk => self.write_record(true),
            Fault::WorkerThere => self.work_there(true),
            Fault::DeviceThere => self.device_works_there(true),
            Fault::DiskThere => self.write_record_there(true),
            Fault::Limit(limit) => self.strike(limit),
            Fault::Verdict => {
                self.judging = None;
                self.tell_source(src::Event::Verdict(Verdict::Revoke));
            }
            Fault::TakeBack => self.tell_source(src::Event::TakeBack(failure())),
            Fault::Cancel => self.tell_source(src::Event::Cancel),
            Fault::CancelThere => self.tell_destination(dst::Event::Cancel),
            Fault::Fail => self.tell_source(src::Event::Fail(failure())),
            Fault::FailThere => self.tell_destination(dst::Event::Fail(failure())),
            Fault::PowerOff => self.tell_source(src::Event::GuestEnded(failure())),
            Fault::IdlePoll => self.poll(),
            Fault::StaleAck => {
                let session = self.source().map_or(0, |s| s.session(NIC).0);
                let ack = Message::SwitchoverAck { device: NIC, session: Session(session - 1) };
                self.tell_source(src::Event::Message(newest, ack));
            }
            Fault::Unknown => {
                let attempt = self.source().map_or(Attempt(0), Source::attempt);
                let unknown = Message::Unknown { attempt, reason: None };
                self.tell_source(src::Event::Message(newest, unknown));
            }
            Fault::CommitAgain(at) => {
                let Some(attempt) = self.committed else { return };
                let connection = Connection(at as u64 + 1);
                self.tell_destination(dst::Event::Message(connection, Message::Commit { attempt }));
            }
            Fault::OldCommit => {
                let attempt = self.destination.as_ref().map_or(0, |d| d.attempt().0);
                let commit = Message::Commit { attempt: Attempt(attempt - 1) };
                self.tell_destination(dst::Event::Message(Connection(self.heard), commit));
            }
        }
    }

    fn strike(&mut self, limit: TimeLimit) {
        self.limits.retain(|armed| *armed != limit);
        self.tell_source(src::Event::Timeout(limit));
    }

    fn poll(&mut self) {
        if !self.can_poll() {
            return;
        }
        let mut actions = Vec::new();
        if let Some(source) = &mut self.source {
            source.ask(NIC, &mut actions);
        }
        actions.into_iter().for_each(|action| self.source_does(action));
        self.device_work.push_back(DeviceWork::Read);
    }

    fn deliver_there(&mut self, at: usize) {
        let Some(message) = self.links[at].to_destination.pop_front() else { return };
        let connection = Connection(at as u64 + 1);
        let event = match message {
            Message::Hello { features, .. } => {
                self.heard = self.heard.max(connection.0);
                dst::Event::LinkUp(connection, features)
            }
            message => dst::Event::Message(connection, message),
        };
        self.tell_destination(event);
    }
}
