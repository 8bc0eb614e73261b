//! Two hosts in a world that answers in any order: connections that are FIFO and can be cut, devices
//! with streams of abstract bytes, vCPUs, records. It checks the invariants at every step.

#![allow(dead_code)]

pub mod brains;
pub mod ways;

use std::collections::{BTreeMap, VecDeque};

use switchover::handover::destination::{self as dst, Destination};
use switchover::handover::source::{
    self as src, CallResult, InfoAnswer, Source, TimeLimit, Verdict,
};
use switchover::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve};
use switchover::message::{
    Attempt, Connection, DeviceEnd, DeviceIndex, Failure, Features, Id, Message, Session, Side,
};

/// A small generator of its own: a seed replays a walk exactly, on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A call of a device.
pub type Call = (DeviceIndex, DeviceCall);

#[derive(Clone, Debug, Default)]
pub struct Link {
    pub up: bool,
    pub to_destination: VecDeque<Message>,
    pub to_source: VecDeque<Message>,
    pub told_source: bool,
    pub told_destination: bool,
}

impl Link {
    /// It was cut, and not both sides know.
    fn has_news(&self) -> bool {
        let known = self.told_source && self.told_destination;
        !self.up && !known
    }
}

#[derive(Clone, Debug)]
pub struct SourceDevice {
    pub traits: DeviceTraits,
    pub state: DeviceState,
    /// First session of the stream that is read; 0 = none.
    pub stream: Session,
    /// Bytes read of this stream.
    pub offset: u64,
    /// Initial bytes that were not read.
    pub unread: u64,
    pub reinit: bool,
    pub ended: bool,
    /// A question or call hangs and is answered late.
    pub calls: u32,
}

#[derive(Clone, Debug)]
pub struct DestinationDevice {
    pub state: DeviceState,
    pub stream: Session,
    pub loaded: u64,
}

pub struct World {
    pub random: Random,
    pub source: Source,
    pub destination: Destination,
    pub links: BTreeMap<u64, Link>,
    pub next_connection: u64,
    pub source_devices: Vec<SourceDevice>,
    pub destination_devices: Vec<DestinationDevice>,
    /// Device bytes under way: device, stream, bytes.
    pub data: VecDeque<(DeviceIndex, Session, u64)>,
    pub source_answers: Vec<src::Event>,
    pub destination_answers: Vec<dst::Event>,
    pub source_runs: bool,
    pub destination_runs: bool,
    pub source_records: Vec<(Decision, Attempt)>,
    pub destination_records: Vec<(Decision, Attempt)>,
    /// Records under way: written when they are answered.
    pub source_writes: VecDeque<(Decision, Attempt)>,
    pub destination_writes: VecDeque<(Decision, Attempt)>,
    /// From now on no record can be written at the source, at the destination.
    pub fail_records: (bool, bool),
    /// The next device call of this kind fails at the source, at the destination.
    pub fail_calls: (Vec<Call>, Vec<Call>),
    /// Devices lost at the destination's start.
    pub lost_there: Vec<DeviceIndex>,
    /// What the operator heard at the destination.
    pub resolved_there: Vec<(Resolve, Result<(), String>)>,
    /// Dirty tracking is on.
    pub tracking: bool,
    pub armed: Vec<TimeLimit>,
    pub window: bool,
    pub awaited: Option<(Attempt, Vec<DeviceEnd>)>,
    pub source_outcome: Option<Outcome>,
    pub destination_outcome: Option<Outcome>,
    pub reconnect: bool,
    /// Verdicts to give before random ones.
    pub verdicts: VecDeque<Verdict>,
    /// Chance of a fault, one in so many; 0 = no faults.
    pub fault_in: usize,
    pub notices: Vec<src::Notice>,
    pub states: Vec<src::State>,
    pub log: Vec<String>,
}

pub fn failure(what: &str) -> Failure {
    Failure::new(Side::Source, what)
}

impl World {
    pub fn new(seed: u64, traits: &[DeviceTraits], verify: bool) -> Self {
        let features = Features { verify, telemetry: true, ..Features::default() };
        let setup = src::Setup {
            migration: Id(1),
            instance: Id(2),
            features,
            description: "description".into(),
            devices: traits.to_vec(),
            dry_run: false,
        };
        let device = |traits: &DeviceTraits| SourceDevice {
            traits: *traits,
            state: DeviceState::Running,
            stream: Session(0),
            offset: 0,
            unread: 0,
            reinit: false,
            ended: false,
            calls: 0,
        };
        let there =
            DestinationDevice { state: DeviceState::Running, stream: Session(0), loaded: 0 };
        Self {
            random: Random::new(seed),
            source: Source::new(setup),
            destination: Destination::new(Id(1), Id(3), Id(4), features, 5_000),
            links: BTreeMap::new(),
            next_connection: 1,
            source_devices: traits.iter().map(device).collect(),
            destination_devices: vec![there; traits.len()],
            data: VecDeque::new(),
            source_answers: Vec::new(),
            destination_answers: Vec::new(),
            source_runs: true,
            destination_runs: false,
            source_records: Vec::new(),
            destination_records: Vec::new(),
            source_writes: VecDeque::new(),
            destination_writes: VecDeque::new(),
            fail_records: (false, false),
            fail_calls: (Vec::new(), Vec::new()),
            lost_there: Vec::new(),
            resolved_there: Vec::new(),
            tracking: false,
            armed: Vec::new(),
            window: false,
            awaited: None,
            source_outcome: None,
            destination_outcome: None,
            reconnect: false,
            verdicts: VecDeque::new(),
            fault_in: 0,
            notices: Vec::new(),
            states: Vec::new(),
            log: Vec::new(),
        }
    }

    // --- driving ------------------------------------------------------------------------------

    pub fn connect(&mut self) {
        let connection = Connection(self.next_connection);
        self.next_connection += 1;
        self.links.insert(connection.0, Link { up: true, ..Link::default() });
        self.tell_source(src::Event::LinkUp(connection));
    }

    pub fn cut(&mut self, connection: u64) {
        if let Some(link) = self.links.get_mut(&connection) {
            link.up = false;
        }
    }

    pub fn newest(&self) -> u64 {
        self.next_connection - 1
    }

    pub fn tell_source(&mut self, event: src::Event) {
        if let src::Event::Recorded(answer) = &event {
            let write = self.source_writes.pop_front();
            self.source_records.extend(write.filter(|_| answer.is_ok()));
        }
        if let src::Event::TrackingStarted(Ok(())) = &event {
            self.tracking = true;
        }
        self.log.push(format!("S < {event:?}"));
        let mut actions = Vec::new();
        self.source.handle(event, &mut actions);
        for action in actions {
            self.source_does(action);
        }
        self.check();
    }

    pub fn tell_destination(&mut self, event: dst::Event) {
        if let dst::Event::Recorded(answer) = &event {
            let write = self.destination_writes.pop_front();
            if let Some((decision, attempt)) = write.filter(|_| answer.is_ok()) {
                let decided = |d| matches!(d, Decision::Running | Decision::Never);
                let before =
                    self.destination_records.iter().find(|(d, a)| *a == attempt && decided(*d));
                assert!(before.is_none_or(|(d, _)| *d == decision), "a decision changed");
                self.destination_records.push((decision, attempt));
            }
        }
        self.log.push(format!("D < {event:?}"));
        let mut actions = Vec::new();
        self.destination.handle(event, &mut actions);
        for action in actions {
            self.destination_does(action);
        }
        self.check();
    }

    fn source_does(&mut self, action: src::Action) {
        self.log.push(format!("S > {action:?}"));
        match action {
            src::Action::Enter(state) => self.states.push(state),
            src::Action::Send(message) => self.source_sends(message),
            src::Action::StartTracking => {
                self.source_answers.push(src::Event::TrackingStarted(Ok(())));
            }
            src::Action::Call(device, call) => self.source_calls(device, call),
            src::Action::Read(device) => self.source_reads(device),
            src::Action::Pause => {
                self.source_answers.push(src::Event::Paused(Ok(())));
            }
            src::Action::Resume => {
                self.source_runs = true;
                self.source_answers.push(src::Event::Resumed(Ok(())));
            }
            src::Action::Sync(sync) => self.source_answers.push(src::Event::Synced(sync, Ok(()))),
            src::Action::SendFinalRam => self.source_answers.push(src::Event::RamSent(Ok(()))),
            src::Action::SaveMachineState => {
                let failed = self.fault(8);
                let answer = if failed { Err(failure("machine state")) } else { Ok(()) };
                self.source_answers.push(src::Event::MachineStateSaved(answer));
            }
            src::Action::Reattach => self.source_answers.push(src::Event::Reattached(Ok(()))),
            src::Action::SendStateEnd(attempt) => {
                let end = |(index, device): (usize, &SourceDevice)| DeviceEnd {
                    device: DeviceIndex(index as u16),
                    bytes: device.offset,
                    checksum: 0,
                };
                let devices = self.source_devices.iter().enumerate().map(end).collect();
                let channels = Vec::new();
                self.source_sends(Message::StateEnd { attempt, channels, devices, sections: 0 });
            }
            src::Action::Verify(_) => {
                let answer = if self.fault(4) { Err(failure("not identical")) } else { Ok(()) };
                self.source_answers.push(src::Event::Verified(answer));
            }
            src::Action::Judge(_) => {
                let random = [Verdict::Go, Verdict::Go, Verdict::Absorb, Verdict::Revoke];
                let verdict = self.verdicts.pop_front().unwrap_or_else(|| match self.fault_in {
                    0 => Verdict::Go,
                    _ => random[self.random.below(4)],
                });
                self.source_answers.push(src::Event::Verdict(verdict));
            }
            src::Action::Record(decision, attempt) => {
                self.source_writes.push_back((decision, attempt));
                let failed =
                    self.fail_records.0 || decision == Decision::Committing && self.fault(8);
                let answer = if failed { Err(failure("disk full")) } else { Ok(()) };
                self.source_answers.push(src::Event::Recorded(answer));
            }
            src::Action::Arm(limit) => self.armed.push(limit),
            src::Action::Disarm(limit) => self.armed.retain(|armed| *armed != limit),
            src::Action::Reconnect => self.reconnect = true,
            src::Action::Report(notice) => self.notices.push(notice),
            src::Action::Finish(outcome) => self.source_outcome = Some(outcome),
            src::Action::StopTracking => self.tracking = false,
            src::Action::StopReading(_) | src::Action::RestoreDirty => {}
        }
    }

    fn source_sends(&mut self, message: Message) {
        if let Message::SessionBegin { device, session } = &message {
            let device = &mut self.source_devices[usize::from(device.0)];
            (device.stream, device.offset, device.ended) = (*session, 0, false);
        }
        if let Message::StopCopyBegin { .. } = &message {
            // Invariant 5: no known unread initial data goes into STOP_COPY.
            assert!(!self.source.unread_initial(), "unread initial data at StopCopy");
        }
        if let Message::Commit { attempt } = &message {
            let recorded = self.source_records.last();
            assert_eq!(recorded, Some(&(Decision::Committing, *attempt)), "Commit without record");
        }
        let newest = self.source.connection().map(|c| c.0);
        if let Some(link) = newest.and_then(|newest| self.links.get_mut(&newest)) {
            link.to_destination.push_back(message);
        }
    }

    fn source_calls(&mut self, index: DeviceIndex, call: DeviceCall) {
        let due = self.fail_calls.0.iter().position(|fails| *fails == (index, call));
        let failed = match due {
            Some(due) => self.fail_calls.0.remove(due).1 == call,
            None => call != DeviceCall::Info && self.fault(16),
        };
        let device = &mut self.source_devices[usize::from(index.0)];
        device.calls += 1;
        let event = match call {
            DeviceCall::Info => {
                let alive = matches!(device.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
                let answer = if alive {
                    let reinit = std::mem::take(&mut device.reinit);
                    InfoAnswer::Known { unread_initial: device.unread > 0, reinit }
                } else {
                    InfoAnswer::Unknown
                };
                src::Event::Info { device: index, answer, offset: device.offset }
            }
            _ if failed => {
                device.state = DeviceState::Error;
                let state = Some(DeviceState::Error);
                let result = CallResult::Failed { state, failure: failure("device") };
                src::Event::CallDone { device: index, call, result }
            }
            DeviceCall::SetState(target) => {
                let saving = |state| {
                    matches!(
                        state,
                        DeviceState::PreCopy | DeviceState::PreCopyP2p | DeviceState::StopCopy
                    )
                };
                if !saving(device.state) && saving(target) {
                    (device.unread, device.reinit) = (2, false);
                }
                let error = device.state == DeviceState::Error;
                let result = if error {
                    let state = Some(DeviceState::Error);
                    CallResult::Failed { state, failure: failure("in ERROR") }
                } else {
                    device.state = target;
                    CallResult::Done
                };
                src::Event::CallDone { device: index, call, result }
            }
            DeviceCall::Reset => {
                device.state = DeviceState::Running;
                src::Event::CallDone { device: index, call, result: CallResult::Done }
            }
        };
        self.source_answers.push(event);
    }

    /// What the brain does while the guest runs: asks every device, and reads what there is.
    pub fn poll(&mut self) {
        for index in (0..self.source_devices.len() as u16).map(DeviceIndex) {
            let mut actions = Vec::new();
            self.source.ask(index, &mut actions);
            if !actions.is_empty() {
                self.source_calls(index, DeviceCall::Info);
                self.source_reads(index);
            }
        }
    }

    fn source_reads(&mut self, index: DeviceIndex) {
        let device = &mut self.source_devices[usize::from(index.0)];
        let bytes = match device.state {
            DeviceState::PreCopy | DeviceState::PreCopyP2p => std::mem::take(&mut device.unread),
            DeviceState::StopCopy if !device.ended => {
                device.ended = true;
                std::mem::take(&mut device.unread) + 1
            }
            DeviceState::StopCopy => 0,
            _ => return,
        };
        device.offset += bytes;
        let (stream, offset) = (device.stream, device.offset);
        let event = match device.state {
            DeviceState::StopCopy => src::Event::StreamEnded { device: index },
            _ => src::Event::InitialRead { device: index, offset },
        };
        if bytes > 0 {
            self.data.push_back((index, stream, bytes));
        }
        self.source_answers.push(event);
    }

    fn destination_does(&mut self, action: dst::Action) {
        self.log.push(format!("D > {action:?}"));
        match action {
            dst::Action::Enter(_) => {}
            dst::Action::Send(connection, message) => self.destination_sends(connection, message),
            dst::Action::Compare(_) => {
                let traits = self.source_devices.iter().map(|d| d.traits).collect();
                self.destination_answers.push(dst::Event::Compared(Ok(traits)));
            }
            dst::Action::BeginStream(device, session) => {
                let device = &mut self.destination_devices[usize::from(device.0)];
                (device.stream, device.loaded) = (session, 0);
            }
            dst::Action::Call(device, call) => self.destination_calls(device, call),
            dst::Action::AwaitState(Message::StateEnd { attempt, devices, .. }) => {
                self.awaited = Some((attempt, devices));
            }
            dst::Action::AwaitState(_) => panic!("AwaitState carries StateEnd"),
            dst::Action::ApplyMachineState => {
                let answer = if self.fault(8) { Err(failure("nonsense")) } else { Ok(()) };
                self.destination_answers.push(dst::Event::MachineStateApplied(answer));
            }
            dst::Action::Wire => {
                let answer = if self.fault(4) { Err(failure("no vectors")) } else { Ok(()) };
                self.destination_answers.push(dst::Event::Wired(answer));
            }
            dst::Action::Record(decision, attempt) => {
                self.destination_writes.push_back((decision, attempt));
                let failed = self.fail_records.1 || decision != Decision::Never && self.fault(8);
                let answer = if failed { Err(failure("disk full")) } else { Ok(()) };
                self.destination_answers.push(dst::Event::Recorded(answer));
            }
            dst::Action::ArmWindow => self.window = true,
            dst::Action::Hash(..) => {}
            dst::Action::Unload(_) => {
                let destination = &self.destination;
                self.data.retain(|(device, stream, _)| *stream > destination.session(*device));
                self.awaited = None;
                self.destination_answers.push(dst::Event::Unloaded(Ok(())));
            }
            dst::Action::Resolved(resolve, answer) => self.resolved_there.push((resolve, answer)),
            dst::Action::Start => {
                let attempt = self.destination.attempt();
                assert!(self.destination_records.contains(&(Decision::Running, attempt)));
                self.nothing_left_behind();
                self.destination_runs = true;
                self.destination_answers.push(dst::Event::Started(Ok(())));
            }
            dst::Action::ReportDeviceLost(device, _) => self.lost_there.push(device),
            dst::Action::Finish(outcome) => self.destination_outcome = Some(outcome),
        }
    }

    fn destination_sends(&mut self, connection: Connection, message: Message) {
        if let Message::SwitchoverAck { device, .. } = &message {
            // Invariant 6, as far as one side can see it: only loaded bytes are acknowledged.
            let here = &self.destination_devices[usize::from(device.0)];
            let there = &self.source_devices[usize::from(device.0)];
            if here.stream == there.stream && there.stream.0 > 0 {
                assert!(here.loaded > 0, "acknowledged before anything was loaded");
            }
        }
        let recorded =
            |decision, attempt: &Attempt| self.destination_records.contains(&(decision, *attempt));
        match &message {
            Message::Ready { attempt, .. } => {
                assert!(recorded(Decision::Prepared, attempt), "Ready without record");
            }
            Message::Running { attempt } => {
                assert!(recorded(Decision::Running, attempt), "Running without record");
                assert!(self.destination_runs, "Running before the guest runs");
            }
            Message::Never { attempt, .. } => {
                assert!(
                    recorded(Decision::Never, attempt),
                    "Never without record\n{}",
                    self.tail()
                );
            }
            _ => {}
        }
        if let Some(link) = self.links.get_mut(&connection.0) {
            link.to_source.push_back(message);
        }
    }

    fn destination_calls(&mut self, index: DeviceIndex, call: DeviceCall) {
        let due = self.fail_calls.1.iter().position(|fails| *fails == (index, call));
        let failed = match due {
            Some(due) => self.fail_calls.1.remove(due).1 == call,
            None => self.fault(16),
        };
        let device = &mut self.destination_devices[usize::from(index.0)];
        let result = if failed {
            device.state = DeviceState::Error;
            CallResult::Failed { state: Some(DeviceState::Error), failure: failure("device") }
        } else {
            match call {
                DeviceCall::SetState(target) => device.state = target,
                // A device that was reset carries nothing of the guest.
                _ => {
                    let (state, stream) = (DeviceState::Running, Session(0));
                    *device = DestinationDevice { state, stream, loaded: 0 };
                }
            }
            CallResult::Done
        };
        self.destination_answers.push(dst::Event::CallDone { device: index, call, result });
    }

    fn fault(&mut self, weight: usize) -> bool {
        self.fault_in > 0 && self.random.once_in(self.fault_in * weight)
    }

    // --- what may happen next -----------------------------------------------------------------

    /// Lets one thing happen that is under way; false when nothing is.
    pub fn step(&mut self) -> bool {
        let mut choices: Vec<u8> = Vec::new();
        if !self.source_answers.is_empty() {
            choices.extend([0, 0]);
        }
        if !self.destination_answers.is_empty() {
            choices.extend([1, 1]);
        }
        if self.links.values().any(|link| !link.to_destination.is_empty()) {
            choices.extend([2, 2]);
        }
        if self.links.values().any(|link| !link.to_source.is_empty()) {
            choices.extend([3, 3]);
        }
        if !self.data.is_empty() {
            choices.push(4);
        }
        if self.links.values().any(Link::has_news) {
            choices.push(5);
        }
        if self.state_complete().is_some() {
            choices.push(6);
        }
        if self.reconnect {
            choices.push(7);
        }
        if choices.is_empty() {
            return false;
        }
        match choices[self.random.below(choices.len())] {
            0 => self.answer_source(),
            1 => {
                let event = self.destination_answers.remove(0);
                self.tell_destination(event);
            }
            2 => self.deliver(true),
            3 => self.deliver(false),
            4 => self.deliver_data(),
            5 => self.tell_of_cut(),
            6 => {
                if let Some(attempt) = self.state_complete() {
                    self.awaited = None;
                    self.tell_destination(dst::Event::StateComplete(attempt));
                }
            }
            _ => {
                self.reconnect = false;
                self.connect();
            }
        }
        true
    }

    /// Answers of different devices and helpers come in any order, those of one in order.
    fn answer_source(&mut self) {
        let pick = self.random.below(self.source_answers.len());
        let of = |event: &src::Event| match event {
            src::Event::CallDone { device, .. }
            | src::Event::Info { device, .. }
            | src::Event::InitialRead { device, .. }
            | src::Event::StreamEnded { device }
            | src::Event::DeviceReset(device) => Some(device.0),
            // Records are written in order.
            src::Event::Recorded(_) => Some(u16::MAX),
            _ => None,
        };
        let mut owner = of(&self.source_answers[pick]);
        // What a vCPU did is told before it counts as paused.
        if let src::Event::Paused(_) = self.source_answers[pick] {
            let told_first = |event: &&src::Event| matches!(event, src::Event::DeviceReset(_));
            if let Some(reset) = self.source_answers[..pick].iter().find(told_first) {
                owner = of(reset);
            }
        }
        let first = self.source_answers.iter().position(|event| of(event) == owner).unwrap();
        let event = self.source_answers.remove(first);
        if let src::Event::Paused(Ok(())) = event {
            self.source_runs = false;
        }
        self.tell_source(event);
    }

    /// Any connection that has something delivers its next message, old ones too.
    fn deliver(&mut self, to_destination: bool) {
        let ready: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, link)| match to_destination {
                true => !link.to_destination.is_empty() && !link.told_destination,
                false => !link.to_source.is_empty() && !link.told_source,
            })
            .map(|(connection, _)| *connection)
            .collect();
        if ready.is_empty() {
            // What a side was told is lost is never delivered to it.
            for link in self.links.values_mut() {
                if to_destination { link.to_destination.clear() } else { link.to_source.clear() }
            }
            return;
        }
        let connection = ready[self.random.below(ready.len())];
        let link = self.links.get_mut(&connection).unwrap();
        if !link.up && self.random.once_in(2) {
            // In flight when the connection was cut: this and what follows is lost.
            if to_destination {
                link.to_destination.clear()
            } else {
                link.to_source.clear()
            }
            return;
        }
        if to_destination {
            let message = link.to_destination.pop_front().unwrap();
            if let Message::Hello { features, connection, .. } = message {
                self.tell_destination(dst::Event::LinkUp(connection, features));
            } else {
                self.tell_destination(dst::Event::Message(Connection(connection), message));
            }
        } else {
            let message = link.to_source.pop_front().unwrap();
            self.tell_source(src::Event::Message(Connection(connection), message));
        }
    }

    fn deliver_data(&mut self) {
        let Some((index, stream, bytes)) = self.data.pop_front() else { return };
        let device = &mut self.destination_devices[usize::from(index.0)];
        if device.stream < stream && self.destination_outcome.is_none() {
            // Its stream has not begun here: it waits, and the channel behind it too.
            return self.data.push_front((index, stream, bytes));
        }
        if device.stream == stream && device.state == DeviceState::Resuming {
            device.loaded += bytes;
            let offset = device.loaded;
            self.destination_answers.push(dst::Event::Loaded { device: index, stream, offset });
        }
    }

    fn tell_of_cut(&mut self) {
        let found = self.links.iter().find(|(_, link)| link.has_news()).map(|(c, _)| *c);
        let Some(connection) = found else { return };
        let source_first = self.random.once_in(2);
        let link = self.links.get_mut(&connection).unwrap();
        let reason = failure("the link is down");
        if !link.told_source && (source_first || link.told_destination) {
            link.told_source = true;
            link.to_source.clear();
            self.tell_source(src::Event::LinkDown(Connection(connection), reason));
        } else {
            link.told_destination = true;
            link.to_destination.clear();
            self.tell_destination(dst::Event::LinkDown(Connection(connection), reason));
        }
    }

    fn state_complete(&self) -> Option<Attempt> {
        let (attempt, ends) = self.awaited.as_ref()?;
        let complete = ends.iter().all(|end| {
            let device = &self.destination_devices[usize::from(end.device.0)];
            device.loaded == end.bytes
        });
        complete.then_some(*attempt)
    }

    /// Runs until nothing is under way any more.
    pub fn settle(&mut self) {
        for _ in 0..20_000 {
            if !self.step() {
                return;
            }
        }
        panic!("never comes to rest:\n{}", self.tail());
    }

    /// Runs until `there`, then stops at once; false when it came to rest before.
    pub fn run_until(&mut self, there: impl Fn(&World) -> bool) -> bool {
        for _ in 0..20_000 {
            if there(self) {
                return true;
            }
            if !self.step() {
                return there(self);
            }
        }
        false
    }

    // --- invariants ---------------------------------------------------------------------------

    /// Checked after every event.
    fn check(&self) {
        assert!(
            !(self.source_runs && self.destination_runs),
            "invariant 1: the guest runs twice\n{}",
            self.tail()
        );
        let carries = |device: &DestinationDevice| {
            device.loaded > 0
                && matches!(device.state, DeviceState::Running | DeviceState::RunningP2p)
        };
        let active = self.destination_devices.iter().any(carries);
        let started = self.destination.decision() == Some(Decision::Running);
        assert!(
            !(active && !started && self.destination_outcome.is_none()),
            "a device runs with the guest's state before `running` is recorded\n{}",
            self.tail()
        );
        // Never two devices that carry this guest's state where they do something.
        let started = active || self.destination_runs;
        let still = |device: &SourceDevice| {
            matches!(device.state, DeviceState::Stop | DeviceState::StopCopy | DeviceState::Error)
        };
        assert!(
            !started || self.source_devices.iter().all(still),
            "invariant 1: a device runs on both sides\n{}",
            self.tail()
        );
        let done = matches!(self.source_outcome, Some(Outcome::Completed));
        assert!(!(done && self.source_runs), "Done, and the guest runs here\n{}", self.tail());
    }

    /// Invariant 3, over device bytes: at the start everything that was read is loaded.
    fn nothing_left_behind(&self) {
        for (here, there) in self.destination_devices.iter().zip(&self.source_devices) {
            assert_eq!(here.loaded, there.offset, "device bytes left behind\n{}", self.tail());
            assert!(there.ended, "a stream was not read to its end\n{}", self.tail());
        }
    }

    /// The last events, for a failed test.
    pub fn tail(&self) -> String {
        let from = self.log.len().saturating_sub(60);
        self.log[from..].join("\n")
    }
}
