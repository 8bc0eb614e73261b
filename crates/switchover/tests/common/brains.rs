//! Both brains in virtual time: every action takes a while, connections have a latency, and nothing
//! sleeps. One device with rates, a guest that dirties memory.

use std::collections::BTreeMap;

use switchover::Time;
use switchover::destination as dst;
use switchover::handover::source::Action as Do;
use switchover::handover::{DeviceCall, DeviceState, DeviceTraits, Outcome};
use switchover::message::{
    Attempt, Connection, DeviceEnd, DeviceIndex, DeviceTelemetry, Failure, Features, Id, Message,
    Session, Side,
};
use switchover::source::{self as src, CallResult, Config, Info, Point, Setup, Verdict};

use super::Random;

const NIC: DeviceIndex = DeviceIndex(0);

/// How long things take, and what the device has.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// One way, on every connection.
    pub latency: Time,
    /// Every call, sync, save.
    pub call: Time,
    /// Reading, and loading, of the device's stream.
    pub bytes_per_ms: u64,
    /// The device's first initial data.
    pub initial_bytes: u64,
    /// The rest, once stopped.
    pub stop_bytes: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            latency: Time::from_us(200),
            call: Time::from_ms(1),
            bytes_per_ms: 1 << 20,
            initial_bytes: 8 << 20,
            stop_bytes: 4 << 20,
        }
    }
}

#[derive(Clone, Debug)]
enum What {
    Source(src::Event),
    Destination(dst::Event),
    ToSource(u64, Message),
    ToDestination(u64, Message),
    /// Bytes of a stream are loaded.
    Load(Session, u64),
}

pub struct Pair {
    pub now: Time,
    pub source: src::Source,
    pub destination: dst::Destination,
    pub costs: Costs,
    queue: BTreeMap<(Time, u64), What>,
    order: u64,
    /// Randomly longer, where there is a generator.
    pub random: Option<Random>,
    pub connection: u64,
    /// Connections that carry nothing any more.
    pub dead: Vec<u64>,
    pub device: DeviceState,
    pub device_there: DeviceState,
    stream: Session,
    offset: u64,
    pub unread: u64,
    pub reinit: bool,
    /// New initial data of this size appears whenever the vCPUs stop, so often.
    pub late: (u64, u32),
    /// Questions with the vCPUs stopped hang, so often.
    pub hangs: u32,
    held: Vec<src::Event>,
    stream_there: Session,
    loaded: u64,
    awaited: Option<(Attempt, u64)>,
    /// Ready is held up by this much.
    pub ready_delay: Time,
    pub source_runs: bool,
    pub destination_runs: bool,
    pub pause_requested: Option<Time>,
    /// Time the guest stood still, each time.
    pub pauses: Vec<Time>,
    pub verdicts: Vec<(Point, Verdict)>,
    pub states: Vec<(Time, src::State)>,
    pub states_there: Vec<(Time, dst::State)>,
    pub outcome: Option<Outcome>,
    pub outcome_there: Option<Outcome>,
    pub log: Vec<String>,
}

impl Pair {
    pub fn new(config: Config, costs: Costs) -> Self {
        Self::with(config, costs, true)
    }

    /// With a destination that tells what it loads, or does not.
    pub fn with(config: Config, costs: Costs, telemetry: bool) -> Self {
        let features = Features { telemetry: true, ..Features::default() };
        let setup = Setup {
            migration: Id(1),
            instance: Id(2),
            features,
            description: String::new(),
            devices: vec![DeviceTraits { pre_copy: true, p2p: true }],
            dry_run: false,
        };
        let window = Time::from_ms(5_000);
        Self {
            now: Time(0),
            source: src::Source::new(setup, config, 64 << 20),
            destination: dst::Destination::new(
                Id(1),
                Id(3),
                Id(4),
                Features { telemetry, ..features },
                window,
            ),
            costs,
            queue: BTreeMap::new(),
            order: 0,
            random: None,
            connection: 0,
            dead: Vec::new(),
            device: DeviceState::Running,
            device_there: DeviceState::Running,
            stream: Session(0),
            offset: 0,
            unread: 0,
            reinit: false,
            late: (0, 0),
            hangs: 0,
            held: Vec::new(),
            stream_there: Session(0),
            loaded: 0,
            awaited: None,
            ready_delay: Time(0),
            source_runs: true,
            destination_runs: false,
            pause_requested: None,
            pauses: Vec::new(),
            verdicts: Vec::new(),
            states: Vec::new(),
            states_there: Vec::new(),
            outcome: None,
            outcome_there: None,
            log: Vec::new(),
        }
    }

    fn after(&mut self, delay: Time, what: What) {
        let more = match &mut self.random {
            Some(random) => Time::from_us(random.below(3_000) as u64),
            None => Time(0),
        };
        self.order += 1;
        self.queue.insert((self.now + delay + more, self.order), what);
    }

    pub fn connect(&mut self) {
        self.connection += 1;
        self.tell_source(Some(src::Event::LinkUp(Connection(self.connection))));
    }

    /// The newest connection carries nothing any more; both sides hear of it.
    pub fn cut(&mut self) {
        let connection = self.connection;
        self.silence();
        let failure = || Failure::new(Side::Source, "the link is down");
        let latency = self.costs.latency;
        let down = src::Event::LinkDown(Connection(connection), failure());
        self.after(latency, What::Source(down));
        let down = dst::Event::LinkDown(Connection(connection), failure());
        self.after(latency, What::Destination(down));
    }

    /// The newest connection carries nothing any more, and nobody is told.
    pub fn silence(&mut self) {
        self.dead.push(self.connection);
    }

    /// Runs until `there`, or until `limit`, or until nothing is left to happen.
    pub fn run(&mut self, limit: Time, there: impl Fn(&Pair) -> bool) -> bool {
        while !there(self) {
            let timers = [self.source.next_timer(), self.destination.next_timer()];
            let timer = timers.into_iter().flatten().min();
            let first = self.queue.keys().next().copied();
            let Some(next) = first.map(|(at, _)| at).into_iter().chain(timer).min() else {
                return there(self);
            };
            if next > limit {
                self.now = limit;
                return there(self);
            }
            self.now = self.now.max(next);
            match first.filter(|(at, _)| *at <= self.now).and_then(|key| self.queue.remove(&key)) {
                Some(what) => self.happen(what),
                None => {
                    self.tell_source(None);
                    self.tell_destination(None);
                }
            }
            assert!(!(self.source_runs && self.destination_runs), "twice\n{}", self.tail());
            let active = matches!(self.device, DeviceState::Running | DeviceState::RunningP2p);
            assert!(!(self.destination_runs && active), "a device runs twice\n{}", self.tail());
        }
        true
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Source(event) => {
                if let src::Event::Paused(Ok(())) = event {
                    self.source_runs = false;
                    if self.late.1 > 0 {
                        self.late.1 -= 1;
                        (self.unread, self.reinit) = (self.unread + self.late.0, true);
                    }
                }
                self.tell_source(Some(event));
            }
            What::Destination(event) => self.tell_destination(Some(event)),
            What::ToSource(connection, _) | What::ToDestination(connection, _)
                if self.dead.contains(&connection) => {}
            What::ToSource(connection, message) => {
                self.tell_source(Some(src::Event::Message(Connection(connection), message)));
            }
            What::ToDestination(_, Message::Hello { features, connection, .. }) => {
                self.tell_destination(Some(dst::Event::LinkUp(connection, features)));
            }
            What::ToDestination(connection, message) => {
                self.tell_destination(Some(dst::Event::Message(Connection(connection), message)));
            }
            What::Load(stream, bytes) if self.outcome_there.is_none() => {
                let ready = self.device_there == DeviceState::Resuming;
                if self.stream_there < stream || (self.stream_there == stream && !ready) {
                    return self.after(self.costs.call, What::Load(stream, bytes));
                }
                if self.stream_there == stream {
                    self.loaded += bytes;
                    let offset = self.loaded;
                    self.tell_destination(Some(dst::Event::Loaded { device: NIC, stream, offset }));
                    self.complete();
                    if self.destination.handover().features().telemetry {
                        let load_ns = self.loaded * 1_000_000 / self.costs.bytes_per_ms;
                        let loaded_bytes = self.loaded;
                        let devices = vec![DeviceTelemetry {
                            device: NIC,
                            loaded_bytes,
                            load_ns,
                            ..DeviceTelemetry::default()
                        }];
                        let told = Message::Telemetry {
                            devices,
                            ram_bytes: 0,
                            populated_bytes: None,
                            populate_ns: 0,
                            mapped_bytes: None,
                            map_ns: 0,
                            first_heartbeat_ns: None,
                            boot_id: None,
                        };
                        self.queue_in_order(Time(0), What::ToSource(self.connection, told));
                    }
                }
            }
            What::Load(..) => {}
        }
    }

    fn complete(&mut self) {
        if let Some((attempt, bytes)) = self.awaited
            && bytes == self.loaded
        {
            self.awaited = None;
            self.after(Time(0), What::Destination(dst::Event::StateComplete(attempt)));
        }
    }

    pub fn tell_source(&mut self, event: Option<src::Event>) {
        self.log.push(format!("{} S < {event:?}", self.now));
        for action in self.source.handle(self.now, event) {
            if !matches!(action, src::Action::Judged { .. }) {
                self.log.push(format!("{} S > {action:?}", self.now));
            }
            self.source_does(action);
        }
    }

    pub fn tell_destination(&mut self, event: Option<dst::Event>) {
        self.log.push(format!("{} D < {event:?}", self.now));
        for action in self.destination.handle(self.now, event) {
            self.log.push(format!("{} D > {action:?}", self.now));
            self.destination_does(action);
        }
    }

    fn send(&mut self, message: Message) {
        if let Message::SessionBegin { session, .. } = message {
            (self.stream, self.offset) = (session, 0);
        }
        let connection = self.connection;
        self.queue_in_order(Time(0), What::ToDestination(connection, message));
    }

    /// Messages of a direction never overtake each other.
    fn queue_in_order(&mut self, more: Time, what: What) {
        let same = |other: &What| {
            matches!(
                (other, &what),
                (What::ToSource(..), What::ToSource(..))
                    | (What::ToDestination(..), What::ToDestination(..))
            )
        };
        let last = self.queue.iter().rev().find(|(_, other)| same(other)).map(|(key, _)| key.0);
        let at = (self.now + self.costs.latency + more).max(last.unwrap_or_default());
        self.order += 1;
        self.queue.insert((at, self.order), what);
    }

    fn source_does(&mut self, action: src::Action) {
        let took = self.costs.call;
        let answer = match action {
            src::Action::OutOfReach(_) => return,
            src::Action::Judged { point, verdict, .. } => {
                return self.verdicts.push((point, verdict));
            }
            src::Action::SetThrottle { .. } => src::Event::Throttled(Ok(())),
            src::Action::SyncPass => {
                let dirty_bytes = if self.source_runs { 1 << 20 } else { 0 };
                src::Event::PassSynced { dirty_bytes, exposed: None, answer: Ok(()) }
            }
            src::Action::SendPass(_) => {
                self.after(
                    took,
                    What::Source(src::Event::LinkSample { bytes: 1 << 20, busy: took }),
                );
                src::Event::PassSent(Ok(()))
            }
            src::Action::Handover(action) => match action {
                Do::Enter(state) => return self.states.push((self.now, state)),
                Do::Send(message) => return self.send(message),
                Do::StartTracking => src::Event::TrackingStarted(Ok(())),
                Do::Call(_, DeviceCall::Info) => {
                    let info = src::Event::Info {
                        device: NIC,
                        info: Info::Known {
                            initial_bytes: self.unread,
                            dirty_bytes: 0,
                            reinit: std::mem::take(&mut self.reinit),
                        },
                        stop_copy_bytes: Some(self.costs.stop_bytes + self.unread),
                        offset: self.offset,
                        took,
                    };
                    if !self.source_runs && self.hangs > 0 {
                        self.hangs -= 1;
                        return self.held.push(info);
                    }
                    info
                }
                Do::Call(_, call) => {
                    match call {
                        DeviceCall::SetState(state) => {
                            let before = std::mem::replace(&mut self.device, state);
                            if before == DeviceState::Running && state == DeviceState::PreCopy {
                                self.unread = self.costs.initial_bytes;
                            }
                        }
                        _ => self.device = DeviceState::Running,
                    }
                    src::Event::CallDone { device: NIC, call, result: CallResult::Done, took }
                }
                Do::Read(_) => return self.read(),
                Do::Pause => {
                    self.pause_requested = Some(self.now);
                    self.tell_source(Some(src::Event::PauseRequested));
                    src::Event::Paused(Ok(()))
                }
                Do::Resume => {
                    self.source_runs = true;
                    let since = self.pause_requested.take().unwrap_or_default();
                    self.pauses.push(self.now.since(since));
                    // A device that hung answers after all.
                    for info in std::mem::take(&mut self.held) {
                        self.after(took, What::Source(info));
                    }
                    src::Event::Resumed(Ok(()))
                }
                Do::Sync(sync) => {
                    src::Event::Synced { sync, dirty_bytes: 4096, took, answer: Ok(()) }
                }
                Do::SendFinalRam => src::Event::RamSent(Ok(())),
                Do::SaveMachineState => src::Event::MachineStateSaved { took, answer: Ok(()) },
                Do::SendStateEnd(attempt) => {
                    let devices = vec![DeviceEnd { device: NIC, bytes: self.offset, checksum: 0 }];
                    let channels = Vec::new();
                    let end = Message::StateEnd { attempt, channels, devices, sections: 0 };
                    return self.send(end);
                }
                Do::Verify(_) => src::Event::Verified(Ok(())),
                Do::Record(..) => src::Event::Recorded(Ok(())),
                Do::Reattach => src::Event::Reattached(Ok(())),
                Do::Reconnect => {
                    self.connection += 1;
                    src::Event::LinkUp(Connection(self.connection))
                }
                Do::Finish(outcome) => {
                    if let (Outcome::Completed, Some(since)) = (&outcome, self.pause_requested) {
                        self.pauses.push(self.now.since(since));
                    }
                    return self.outcome = Some(outcome);
                }
                Do::Judge(_) | Do::Arm(_) | Do::Disarm(_) => panic!("answered inside"),
                Do::StopTracking | Do::StopReading(_) | Do::RestoreDirty | Do::Report(_) => return,
            },
        };
        self.after(took, What::Source(answer));
    }

    fn read(&mut self) {
        let stopped = self.device == DeviceState::StopCopy;
        let rest = if stopped { self.costs.stop_bytes } else { 0 };
        let bytes = std::mem::take(&mut self.unread) + rest;
        self.offset += bytes;
        let took = Time::from_us(bytes * 1_000 / self.costs.bytes_per_ms);
        let progress = src::Event::Progress { device: NIC, bytes, read: took };
        let end = match stopped {
            true => src::Event::StreamEnded { device: NIC },
            false => src::Event::NothingNow { device: NIC, offset: self.offset },
        };
        self.tell_source(Some(progress));
        self.after(took, What::Source(end));
        if bytes > 0 {
            self.after(took + self.costs.latency, What::Load(self.stream, bytes));
        }
    }

    fn destination_does(&mut self, action: dst::Action) {
        let answer = match action {
            dst::Action::Enter(state) => return self.states_there.push((self.now, state)),
            dst::Action::Send(connection, message) => {
                let ready = matches!(message, Message::Ready { .. });
                let more = if ready { self.ready_delay } else { Time(0) };
                return self.queue_in_order(more, What::ToSource(connection.0, message));
            }
            dst::Action::Compare(_) => {
                dst::Event::Compared(Ok(vec![DeviceTraits { pre_copy: true, p2p: true }]))
            }
            dst::Action::BeginStream(_, session) => {
                return (self.stream_there, self.loaded) = (session, 0);
            }
            dst::Action::Call(device, call) => {
                self.device_there = match call {
                    DeviceCall::SetState(state) => state,
                    _ => DeviceState::Running,
                };
                dst::Event::CallDone { device, call, result: CallResult::Done }
            }
            dst::Action::AwaitState(Message::StateEnd { attempt, devices, .. }) => {
                self.awaited = devices.first().map(|end| (attempt, end.bytes));
                return self.complete();
            }
            dst::Action::ApplyMachineState => dst::Event::MachineStateApplied(Ok(())),
            dst::Action::Wire => dst::Event::Wired(Ok(())),
            dst::Action::Record(..) => dst::Event::Recorded(Ok(())),
            dst::Action::Start => {
                assert_eq!((self.stream_there, self.loaded), (self.stream, self.offset));
                self.destination_runs = true;
                dst::Event::Started(Ok(()))
            }
            dst::Action::Unload(_) => {
                (self.stream_there, self.loaded, self.awaited) = (Session(0), 0, None);
                dst::Event::Unloaded(Ok(()))
            }
            dst::Action::Finish(outcome) => return self.outcome_there = Some(outcome),
            dst::Action::ArmWindow => panic!("answered inside"),
            dst::Action::AwaitState(_)
            | dst::Action::Hash(..)
            | dst::Action::Resolved(..)
            | dst::Action::ReportDeviceLost(..) => return,
        };
        self.after(self.costs.call, What::Destination(answer));
    }

    pub fn entered(&self, state: src::State) -> Option<Time> {
        self.states.iter().find(|(_, entered)| *entered == state).map(|(at, _)| *at)
    }

    pub fn entered_there(&self, state: dst::State) -> Option<Time> {
        self.states_there.iter().find(|(_, entered)| *entered == state).map(|(at, _)| *at)
    }

    /// The last events, for a failed test.
    pub fn tail(&self) -> String {
        let from = self.log.len().saturating_sub(60);
        self.log[from..].join("\n")
    }
}
