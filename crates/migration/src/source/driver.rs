//! The driver's loop: one input at a time to the brain, its actions to whoever does them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use switchover::Time;
use switchover::estimate::{Knowledge, Range, remaining_bytes};
use switchover::handover::source::{Action as Handover, Notice};
use switchover::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve};
use switchover::message::{
    Attempt, Connection, DeviceEnd, DeviceIndex, Failure, Id, Message, Side,
};
use switchover::source::{Action, Event, Setup, Source, State, Sync};
use switchover::trace::{Header, Recorder, TracedDevice};

use super::device::{Command as DeviceCommand, DeviceThread};
use super::journal::Journal;
use super::link::{self, Binding};
use super::spread::spread;
use super::worker::{Command as WorkerCommand, Memory, Worker};
use super::{Input, Mailbox, OutgoingConfig, Shared};
use crate::channel::{BandwidthLimit, ControlSender, DataSender, RateSample};
use crate::cost::{Account, Work};
use crate::describe::Description;
use crate::late_log::LateLog;
use crate::lease::Lease;
use crate::mailbox::{BrokeOff, Driven, Seat};
use crate::record::{self, Record, RecordStore};
use crate::report::{CostReport, Report};
use crate::trace::TraceFile;
use crate::vmm::{GuestEvent, Vmm};
use crate::{clock, ids};

/// The most data channels that are opened if nobody says how many.
const CHANNELS_BY_DEFAULT_MAX: u16 = 4;
/// The time for a MiB at 1 GB/s, which one channel carries on one core.
const SLOW_LINK_NS_PER_MIB: u64 = 1_048_576;
/// How long a finished migration waits to hear of the guest's first heartbeat at the destination.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(2);
/// How long it waits for what the destination did of the blackout, which comes right behind Running.
const TIMELINE_LIMIT: Duration = Duration::from_millis(500);
/// A device call that takes longer shows in `status` and in the log.
const SLOW_CALL: Time = Time::from_ms(1_000);
/// How often progress is refreshed when nothing happens.
pub(super) const REFRESH: Duration = Duration::from_millis(100);
/// How long a lost data channel waits for the control channel to say why.
const DATA_LOST_GRACE: Time = Time::from_ms(300);
/// How long the threads of a migration that is over may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Pause between two tries to reach the destination while in doubt.
const RECONNECT: Duration = Duration::from_millis(500);

/// Runs one migration to its end.
pub(super) fn run(vmm: Arc<dyn Vmm>, config: OutgoingConfig, mailbox: Mailbox, shared: &Shared) {
    let account = Account::default();
    let _joined = account.join(Work::Control);
    let report = match Driver::new(vmm, config, mailbox, account.clone()) {
        Ok(mut driver) => {
            driver.begin();
            let mailbox = driver.mailbox.clone();
            let seat = Seat::new(driver, mailbox);
            match seat.run(|driver| driver.watch(shared)) {
                Ok(driver) => driver.end(shared),
                // The guard behind says so.
                Err(BrokeOff) => return,
            }
        }
        Err(failure) => {
            tracing::error!(%failure, "migration not started");
            let mut report = Report::not_started(String::new());
            report.failure = Some(failure.in_phase("setup"));
            report
        }
    };
    shared.end(report);
}

/// Both sides' hashes, as they come in.
#[derive(Default)]
struct Verification {
    attempt: Option<Attempt>,
    memory: Option<[u8; 32]>,
    /// Memory was written since guest and devices stopped.
    written: bool,
    devices: Option<Vec<Option<[u8; 32]>>>,
    remote: Option<(String, Vec<Option<String>>)>,
}

struct Driver {
    vmm: Arc<dyn Vmm>,
    config: OutgoingConfig,
    mailbox: Mailbox,
    brain: Source,
    migration: Id,
    records: RecordStore,
    devices: Vec<DeviceThread>,
    worker: Worker,
    /// What it costs here.
    account: Account,
    /// Closed once all threads of this migration have ended.
    ended: Receiver<()>,
    journal: Journal,
    recorder: Option<(Recorder, TraceFile)>,
    connection: Connection,
    control: Option<(Connection, ControlSender)>,
    channels: Vec<DataSender>,
    /// What each device has, as far as it matters for [`spread`].
    device_bytes: Vec<u64>,
    /// How many data channels the migration has.
    number: u16,
    /// What all of them may carry together.
    limit: BandwidthLimit,
    /// There was such a limit, or the link's rate was given: what is known of it says nothing of later migrations.
    was_limited: bool,
    /// DescribeOk or RolledBack: told to the brain once new data channels are attached.
    attaching: Option<(Connection, Message)>,
    /// The data channels were closed here, so that nothing waits for the other side on the way back.
    channels_closed: bool,
    /// Who wants to know whether the operator's decision is obeyed.
    resolving: Option<Sender<Result<(), String>>>,
    device_ends: Vec<DeviceEnd>,
    sections: u32,
    /// Memory is handed over; its page of who may write it.
    lease: Option<Arc<Lease>>,
    /// The destination took the memory while this side was about to take the attempt back.
    overtaken: bool,
    calls: HashMap<DeviceIndex, (DeviceCall, Time, bool)>,
    verification: Verification,
    outcome: Option<Outcome>,
    /// The destination was dialled again since Commit.
    redialed: bool,
    /// A data channel broke at this time.
    data_lost: Option<(Time, String)>,
    /// Events that performing actions brought about at once.
    follow_up: VecDeque<Event>,
    refreshed: Time,
    late_log: LateLog,
}

impl Driven for Driver {
    type Input = Input;

    fn act(&mut self, input: Input, at: Time) {
        self.take(input, at);
        if self.outcome.is_none() {
            self.measure_link();
        }
    }

    fn patience(&self) -> Duration {
        self.idle_limit()
    }

    fn ended(&self) -> bool {
        self.outcome.is_some()
    }
}

impl Driver {
    fn new(
        vmm: Arc<dyn Vmm>,
        config: OutgoingConfig,
        mailbox: Mailbox,
        account: Account,
    ) -> Result<Self, Failure> {
        let begun = clock::now();
        let devices = vmm.devices();
        let lease = match config.local {
            true => Some(Arc::new(lease(&*vmm, &config)?)),
            false => None,
        };
        let knowledge = knowledge(&config, &devices);
        let by_default = || channels_by_default(&knowledge, devices.len());
        let number = config.channels.unwrap_or_else(by_default);
        let device_bytes = device_bytes(&devices, number);
        let description = Description::of(&*vmm, number);
        let failed = |what: String| Failure::new(Side::Source, what);
        let traits = |device: &crate::Device| {
            let flags = device.description.migration_flags;
            DeviceTraits { pre_copy: flags & 4 != 0, p2p: flags & 2 != 0 }
        };
        let traits: Vec<_> = devices.iter().map(traits).collect();
        if let Some(without) = p2p_missing(&*vmm, &description, &traits) {
            let what =
                format!("device {without} has no P2P states, and device BARs are mapped for DMA");
            let remedy = "migrate with one device, or without BAR mappings";
            return Err(failed(what).device(without).remedy(remedy));
        }
        let body = serde_json::to_string(&description)
            .map_err(|error| failed(format!("Describe cannot be written: {error}")))?;
        let new_id =
            || ids::random().map_err(|error| failed(format!("no random numbers: {error}")));
        let migration = new_id()?;
        let setup = Setup {
            migration,
            instance: ids::instance()
                .map_err(|error| failed(format!("no instance id: {error}")))?,
            features: config.features(),
            description: body,
            devices: traits,
            dry_run: config.dry_run,
        };
        // What is handed over is not to be sent.
        let memory_bytes = vmm.memory().size_bytes();
        let ram_bytes = if config.local { 0 } else { memory_bytes };
        let recorder = match &config.trace {
            Some(path) => {
                let file = TraceFile::create(path)
                    .map_err(|error| failed(format!("no trace can be written: {error}")))?;
                let header = header(&config, &description, &knowledge, migration, ram_bytes);
                Some((Recorder::new(header, begun), file))
            }
            None => None,
        };
        let brain = Source::with(setup, config.brain, ram_bytes, knowledge);
        brain.admission().map_err(|failure| failure.in_phase("setup"))?;
        let limit = BandwidthLimit::default();
        limit.set(config.max_bandwidth_bytes_per_s);
        let was_limited = config.max_bandwidth_bytes_per_s > 0
            || config.avail_switchover_bandwidth_bytes_per_s.is_some();
        let (alive, ended) = channel();
        let no_thread = |error| failed(format!("no thread for the migration: {error}"));
        let threads: Vec<DeviceThread> = (0u16..)
            .zip(&devices)
            .map(|(index, device)| {
                let (vmm, mailbox) = (Arc::clone(&vmm), mailbox.clone());
                let (account, alive) = (account.clone(), alive.clone());
                DeviceThread::spawn(DeviceIndex(index), device, vmm, mailbox, account, alive)
            })
            .collect::<Result<_, _>>()
            .map_err(no_thread)?;
        let (worker_vmm, worker_mailbox) = (Arc::clone(&vmm), mailbox.clone());
        let goes = match &lease {
            None => Memory::Sent,
            Some(lease) => Memory::HandedOver { lease: Arc::clone(lease), verify: config.verify },
        };
        let (devices_too, controls) = (threads.clone(), config.controls);
        let worker = Worker::spawn(
            worker_vmm,
            devices_too,
            worker_mailbox,
            controls,
            goes,
            account.clone(),
            alive,
        )
        .map_err(no_thread)?;
        let ids = devices.iter().map(|d| d.description.id.clone()).collect();
        let records = match &config.state_dir {
            Some(dir) => RecordStore::new(dir.clone(), config.durable).map_err(|error| {
                failed(format!("{} cannot hold records: {error}", dir.display()))
            })?,
            None => RecordStore::in_memory(),
        };
        Ok(Self {
            journal: Journal::new(migration.to_string(), begun, ids, memory_bytes),
            device_ends: (0..threads.len() as u16)
                .map(|index| DeviceEnd { device: DeviceIndex(index), ..DeviceEnd::default() })
                .collect(),
            devices: threads,
            account,
            recorder,
            ended,
            vmm,
            config,
            mailbox,
            brain,
            migration,
            records,
            worker,
            connection: Connection(0),
            control: None,
            channels: Vec::new(),
            device_bytes,
            number,
            was_limited,
            limit,
            attaching: None,
            channels_closed: false,
            resolving: None,
            sections: 0,
            lease,
            overtaken: false,
            calls: HashMap::new(),
            verification: Verification::default(),
            outcome: None,
            redialed: false,
            data_lost: None,
            follow_up: VecDeque::with_capacity(16),
            refreshed: Time(0),
            late_log: LateLog::new(Side::Source),
        })
    }

    /// The migration begins.
    fn begin(&mut self) {
        tracing::info!(migration = %self.migration, destination = %self.config.destination, "migration begins");
        let guest = self.mailbox.clone();
        // From a vCPU's thread, which is not to be held up.
        self.vmm.set_guest_event_sink(Some(Arc::new(move |event| guest.post(Input::Guest(event)))));
        self.config.observer.entered(Side::Source, State::Setup.name());
        self.journal.note(clock::now(), State::Setup.name(), self.config.destination.to_string());
        self.dial(Duration::ZERO);
    }

    /// What only the driver's own thread looks at, each time it wakes.
    fn watch(&mut self, shared: &Shared) {
        self.late_log.flush(self.journal.ledger.is_open());
        if self.outcome.is_none() {
            self.feed(None);
            self.look_after_data_channels();
        }
        let now = clock::now();
        if now.since(self.refreshed) > Time(REFRESH.as_nanos() as u64 / 2) {
            self.refreshed = now;
            self.refresh(shared);
        }
    }

    fn end(mut self, shared: &Shared) -> Report {
        let ended = clock::now();
        self.late_log.flush(false);
        self.vmm.set_guest_event_sink(None);
        if self.brain.handover().state() == State::Done {
            self.await_last_words();
        }
        self.refresh(shared);
        self.finish(ended)
    }

    fn measure_link(&mut self) {
        for index in 0..self.channels.len() {
            let samples = self.channels.get(index).map(DataSender::take_rate_samples);
            for sample in samples.unwrap_or_default() {
                let known = self.config.avail_switchover_bandwidth_bytes_per_s;
                let RateSample { bytes, busy } = known.map_or(sample, |rate| sample.at(rate));
                self.feed(Some(Event::LinkSample { bytes, busy }));
            }
        }
    }

    /// A data channel that broke ends the migration, unless the control channel says in a moment why: a
    /// destination that fails closes both. With the guest standing still the moment is short.
    fn look_after_data_channels(&mut self) {
        let running = self.brain.handover().state() == State::Precopy;
        let grace = if running { DATA_LOST_GRACE } else { Time(DATA_LOST_GRACE.0 / 10) };
        let lost = self.data_lost.take_if(|(at, _)| clock::now().since(*at) >= grace);
        if let Some((_, what)) = lost {
            let what = format!("a data channel is down: {what}");
            self.feed(Some(Event::Fail(Failure::new(Side::Source, what))));
        }
    }

    fn idle_limit(&self) -> Duration {
        if self.data_lost.is_some() {
            return Duration::from_millis(5);
        }
        let due = self.brain.next_timer().map(|at| Duration::from_nanos(at.since(clock::now()).0));
        due.map_or(REFRESH, |due| due.min(REFRESH))
    }

    // --- inputs -------------------------------------------------------------------------------

    fn take(&mut self, input: Input, at: Time) {
        match input {
            Input::Event(event) => {
                self.observe(&event, at);
                self.feed(Some(event));
            }
            Input::Connected(connection, control) => {
                self.control = Some((connection, control));
                self.feed(Some(Event::LinkUp(connection)));
            }
            Input::NotConnected(what) => self.not_connected(what),
            Input::Message(connection, message, at, _permit) => {
                self.message(connection, message, at);
            }
            Input::LinkDown(connection, what) => {
                if self.control.as_ref().is_some_and(|(c, _)| *c == connection) {
                    self.control = None;
                }
                let failure = Failure::new(Side::Source, format!("the link is down: {what}"));
                self.feed(Some(Event::LinkDown(connection, failure)));
            }
            Input::Attached(Ok(channels)) => self.attached(channels),
            Input::Attached(Err(what)) => {
                let what = format!("no data channel: {what}");
                self.feed(Some(Event::Fail(Failure::new(Side::Source, what))));
            }
            Input::DataLinkDown(what) if !self.channels_closed => {
                self.data_lost.get_or_insert((at, what));
            }
            Input::DataLinkDown(_) => {}
            Input::StreamEnd(end) => {
                if let Some(slot) = self.device_ends.get_mut(usize::from(end.device.0)) {
                    *slot = end;
                }
            }
            Input::StreamBytes(device, bytes) => {
                if let Some(slot) = self.journal.stream_bytes.get_mut(usize::from(device.0)) {
                    *slot = bytes;
                }
            }
            Input::Sections(count) => self.sections = count,
            Input::MemoryDigest(attempt, digest, before)
                if self.verification.attempt == Some(attempt) =>
            {
                self.verification.memory = Some(digest);
                self.verification.written = before.is_some_and(|before| before != digest);
                self.compare_hashes();
            }
            Input::DeviceDigests(attempt, digests)
                if self.verification.attempt == Some(attempt) =>
            {
                self.verification.devices = Some(digests);
                self.compare_hashes();
            }
            // Of an attempt that was taken back.
            Input::MemoryDigest(..) | Input::DeviceDigests(..) => {}
            Input::Guest(event) => self.guest_event(event),
            Input::Cancel => {
                self.journal.note(at, "cancel", "");
                self.feed(Some(Event::Cancel));
            }
            Input::TakeBack => {
                let what = "taken back as wished";
                self.feed(Some(Event::TakeBack(Failure::new(Side::Source, what))));
            }
            Input::Resolve(resolve, reply) => {
                if let Some(why) = self.lease_forbids(resolve) {
                    let _ = reply.send(Err(why));
                    return;
                }
                self.resolving = Some(reply);
                self.feed(Some(Event::Operator(resolve)));
            }
            Input::Limit(limit) => self.feed(Some(Event::Limit(limit))),
            Input::Bandwidth(bytes_per_s) => {
                self.was_limited |= bytes_per_s > 0;
                self.limit.set(bytes_per_s);
            }
        }
    }

    /// Sees events go by that the journal wants the moment of.
    fn observe(&mut self, event: &Event, at: Time) {
        match event {
            Event::Paused(Ok(())) => {
                self.journal.paused(at);
                self.edge("pause", at, Some(self.worker.counters.step()));
            }
            Event::Resumed(Ok(())) => self.journal.resumed(at),
            Event::Synced { sync: Sync::Final, took, .. } => {
                self.journal.final_sync(at, *took);
                self.edge("final-sync", at, Some(*took));
            }
            Event::Synced { took, .. } => self.edge("provisional-sync", at, Some(*took)),
            Event::RamSent(Ok(())) if self.lease.is_some() => {
                let hashing = self.worker.counters.step();
                if self.config.verify {
                    self.journal.hashed = Some(hashing);
                    self.edge("verification", at, Some(hashing));
                }
                self.journal.final_ram_sent(at);
            }
            Event::RamSent(Ok(())) => {
                self.journal.final_ram_sent(at);
                self.edge("last-ram", at, Some(self.worker.counters.step()));
            }
            Event::Throttled(Err(failure)) => {
                self.journal.note(at, "throttle-refused", failure.what.clone());
            }
            Event::CallDone { device, call, took, .. } => {
                self.calls.remove(device);
                match call {
                    DeviceCall::SetState(DeviceState::StopCopy) => {
                        self.journal.device_stopped(*took);
                        self.edge("stop-devices", at, Some(*took));
                    }
                    DeviceCall::SetState(_) => self.edge("quiesce-devices", at, Some(*took)),
                    DeviceCall::Info | DeviceCall::Reset => {}
                }
            }
            Event::Info { device, took, .. } => {
                self.calls.remove(device);
                self.edge("ask-devices", at, Some(*took));
            }
            Event::Progress { read, .. } => self.edge("device-data", at, Some(*read)),
            Event::StreamEnded { .. } => self.edge("device-data", at, None),
            Event::MachineStateSaved { took, answer: Ok(()) } => {
                self.edge("machine-state", at, Some(*took));
            }
            Event::DeviceReset(device) => self.worker.tell(WorkerCommand::DeviceReset(*device)),
            _ => {}
        }
    }

    /// A line of the log; while the guest stands still it waits.
    fn log(&mut self, event: &'static str, detail: String) {
        self.late_log.keep(event, detail);
        self.late_log.flush(self.journal.ledger.is_open());
    }

    /// A part of the blackout is over; see [`Ledger`](super::blackout::Ledger).
    fn edge(&mut self, name: &'static str, at: Time, work: Option<Time>) {
        self.journal.ledger.edge(name, at, work);
    }

    fn not_connected(&mut self, what: String) {
        if self.brain.handover().state().is_committed() {
            tracing::warn!(what, "in doubt, and the destination cannot be reached");
            return self.dial(RECONNECT);
        }
        let failure = Failure::new(Side::Source, what)
            .remedy("see that the destination runs with --incoming and listens there");
        self.feed(Some(Event::Fail(failure)));
    }

    fn message(&mut self, connection: Connection, message: Message, at: Time) {
        match &message {
            Message::Accept { features, .. }
                if self.lease.is_some()
                    && !features.local
                    && self.brain.handover().state() == State::Setup =>
            {
                let what = "the destination does not take memory over: it is of another version, listens on \
                            TCP behind a proxy, or its VMM cannot";
                let failure =
                    Failure::new(Side::Destination, what).remedy("migrate without --local");
                return self.feed(Some(Event::Fail(failure)));
            }
            // Recorded, and so for good: one that took the memory and came no further does not use it.
            Message::Never { attempt, .. } if *attempt == self.brain.handover().attempt() => {
                if let Some(lease) = &self.lease {
                    lease.force();
                }
            }
            // The data channels belong to a migration that fits, and are there before it begins.
            Message::DescribeOk if !self.config.dry_run && self.channels.is_empty() => {
                self.attaching = Some((connection, message));
                return self.attach(connection);
            }
            // What comes next goes over new ones: the old were closed to be back soon.
            Message::RolledBack { attempt }
                if *attempt == self.brain.handover().attempt()
                    && self.brain.handover().state() == State::RollingBack =>
            {
                self.attaching = Some((connection, message));
                return self.attach(connection);
            }
            Message::Ready { attempt, .. } if *attempt == self.brain.handover().attempt() => {
                self.journal.ready(at);
                self.journal.note(at, "ready", "");
            }
            Message::Running { .. } => self.journal.running(at),
            Message::Telemetry { .. } => self.telemetry(&message),
            Message::Timeline { .. } => return self.timeline(message),
            Message::Cost { .. } => return self.cost_there(&message),
            Message::Hashes { attempt, memory, devices } => {
                if self.verification.attempt == Some(*attempt) {
                    self.verification.remote = Some((memory.clone(), devices.clone()));
                    self.compare_hashes();
                }
                return;
            }
            _ => {}
        }
        self.feed(Some(Event::Message(connection, message)));
    }

    fn guest_event(&mut self, event: GuestEvent) {
        let now = clock::now();
        let ended = |what: String| Failure::new(Side::Source, what);
        match event {
            GuestEvent::DeviceReset { id } => {
                self.journal.note(now, "device-reset", id.clone());
                let place = self.journal.device_ids.iter().position(|device| *device == id);
                if let Some(index) = place {
                    let event = Event::DeviceReset(DeviceIndex(index as u16));
                    self.observe(&event, now);
                    self.feed(Some(event));
                }
            }
            GuestEvent::Reset => {
                self.journal.note(now, "guest-reset", "");
                for index in 0..self.devices.len() {
                    let event = Event::DeviceReset(DeviceIndex(index as u16));
                    self.observe(&event, now);
                    self.feed(Some(event));
                }
            }
            GuestEvent::PowerOff => {
                self.feed(Some(Event::GuestEnded(ended("the guest powered off".into()))));
            }
            GuestEvent::Crashed { reason } => {
                let what = format!("the guest crashed: {reason}");
                self.feed(Some(Event::GuestEnded(ended(what))));
            }
        }
    }

    // --- the brain ----------------------------------------------------------------------------

    /// One event, or only the time, to the brain; then everything that follows at once.
    fn feed(&mut self, event: Option<Event>) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let now = clock::now();
            if let (Some((recorder, _)), Some(event)) = (&mut self.recorder, &event) {
                recorder.event(now, event);
            }
            for action in self.brain.handle(now, event) {
                if let Some((recorder, _)) = &mut self.recorder {
                    recorder.action(now, &action);
                }
                self.perform(action);
            }
            next = self.follow_up.pop_front().map(Some);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::SetThrottle { percent } => {
                tracing::info!(percent, "vCPUs throttled");
                self.journal.note(clock::now(), "throttle", format!("{percent} %"));
                self.worker.tell(WorkerCommand::SetThrottle(percent));
            }
            Action::SyncPass => self.worker.tell(WorkerCommand::SyncPass),
            Action::SendPass(number) => {
                let bytes = self.brain.status().ram_remaining_bytes;
                self.journal.note_pass(clock::now(), number, bytes);
                self.worker.tell(WorkerCommand::SendPass);
            }
            Action::OutOfReach(why) => {
                tracing::warn!(why, "the next good moment is taken");
                self.journal.note(clock::now(), "out-of-reach", why);
            }
            Action::Judged { point, verdict, estimate, elapsed } => {
                let detail = format!(
                    "{verdict:?} at {point:?}: {elapsed} gone, {} to come, limit {}",
                    estimate.total().map_or("unknown".into(), |t| t.to_string()),
                    self.brain.status().downtime_limit,
                );
                self.log("verdict", detail.clone());
                self.journal.note(clock::now(), "verdict", detail);
            }
            Action::Handover(action) => self.perform_handover(action),
        }
    }

    fn perform_handover(&mut self, action: Handover) {
        match action {
            Handover::Enter(state) => self.enter(state),
            Handover::Send(message) => self.send(message),
            Handover::StartTracking => self.worker.tell(WorkerCommand::StartTracking),
            Handover::StopTracking => self.worker.tell(WorkerCommand::StopTracking),
            // What is here of the guest's devices is not to move in memory that is the destination's.
            Handover::Call(..) | Handover::Read(_) | Handover::Reattach if self.overtaken => {}
            Handover::Call(device, call) => {
                self.calls.insert(device, (call, clock::now(), false));
                self.tell_device(device, DeviceCommand::Call(call));
            }
            Handover::Read(device) => self.tell_device(device, DeviceCommand::Read),
            Handover::StopReading(device) => self.tell_device(device, DeviceCommand::StopReading),
            Handover::Pause => {
                let estimate = self.brain.status().estimate;
                self.journal.pause_requested(clock::now(), estimate);
                self.follow_up.push_back(Event::PauseRequested);
                self.worker.tell(WorkerCommand::Pause);
            }
            Handover::Resume => self.worker.tell(WorkerCommand::Resume),
            Handover::Sync(sync) => self.worker.tell(WorkerCommand::Sync(sync)),
            Handover::RestoreDirty => self.worker.tell(WorkerCommand::RestoreDirty),
            Handover::SendFinalRam => self.worker.tell(WorkerCommand::SendFinalRam),
            Handover::SaveMachineState => {
                self.journal.last_heartbeat_ns = self.vmm.last_heartbeat_ns();
                let attempt = self.brain.handover().attempt();
                self.worker.tell(WorkerCommand::SaveMachineState(attempt));
            }
            Handover::Reattach => self.worker.tell(WorkerCommand::Reattach),
            Handover::SendStateEnd(attempt) => self.send_state_end(attempt),
            Handover::Verify(attempt) => self.verify(attempt),
            Handover::Record(decision, attempt) => {
                let binding = self.brain.handover().secret().map(|secret| record::Binding {
                    secret,
                    connection: self.connection,
                    destination: Some(self.config.destination.to_string()),
                });
                let record = Record {
                    role: Side::Source,
                    migration: self.migration,
                    attempt,
                    decision,
                    reason: self.journal.failure.clone(),
                    binding,
                };
                let written = self.records.write(&record);
                if decision == Decision::Committing {
                    self.edge("record-committing", clock::now(), None);
                }
                let written = written.map_err(|error| {
                    Failure::new(
                        Side::Source,
                        format!("the decision could not be recorded: {error}"),
                    )
                    .remedy("make --state-dir writable")
                });
                self.follow_up.push_back(Event::Recorded(written));
            }
            // Once at once; a destination that takes the connection and ends it is asked again in a while.
            Handover::Reconnect => {
                let first = !std::mem::replace(&mut self.redialed, true);
                self.dial(if first { Duration::ZERO } else { RECONNECT });
            }
            Handover::Report(notice) => self.report_notice(notice),
            Handover::Finish(outcome) => self.outcome = Some(outcome),
            // The brain answers these itself.
            Handover::Judge(_) | Handover::Arm(_) | Handover::Disarm(_) => {}
        }
    }

    fn enter(&mut self, state: State) {
        if matches!(state, State::Cancelling | State::RollingBack) {
            self.worker.cancel_pass();
            // A device thread that waits for a destination which takes nothing in could not bring its
            // device back, and the guest may stand still for that. What is under way still arrives there.
            self.channels.iter().for_each(DataSender::shutdown);
            (self.channels_closed, self.data_lost) = (true, None);
            self.verification = Verification::default();
        }
        self.overtaken &= state != State::Done;
        // A destination that starts the guest from here on would start it in memory in which it runs on.
        if state == State::RollingBack
            && let Some(lease) = &self.lease
        {
            // The other way round, its operator was faster than the link: the guest is there.
            self.overtaken = !lease.reclaim();
            if self.overtaken {
                let attempt = self.brain.handover().attempt();
                let runs = Event::Message(self.connection, Message::Running { attempt });
                self.follow_up.push_back(runs);
            }
        }
        // While the guest stands still, or somebody waits for the end, nothing waits for the limit.
        self.limit.lift(!matches!(state, State::Setup | State::Precopy));
        // A hold is not part of the phase it delays.
        self.config.observer.entered(Side::Source, state.name());
        let now = clock::now();
        self.log("phase", state.name().into());
        self.journal.entered(now, state);
        self.journal.note(now, state.name(), "");
    }

    fn send(&mut self, message: Message) {
        if let Message::SessionBegin { device, session } = message {
            self.tell_device(device, DeviceCommand::BeginStream(session));
        }
        // Before it is written: what comes then is the link's, and the other side may be quicker than we.
        if matches!(message, Message::Commit { .. }) {
            self.edge("send-commit", clock::now(), None);
        }
        let Some((connection, control)) = &self.control else { return };
        let sent = match (&self.lease, &message) {
            (Some(lease), Message::Describe { .. }) => {
                // It was seen before that there are files to share.
                let mut files = self.vmm.memory().files_to_share().unwrap_or_default();
                files.push(lease.file());
                control.send_with(message, files)
            }
            _ => control.send(message),
        };
        if let Err(error) = sent {
            tracing::warn!(%error, "not sent");
            // A message less is a connection less: what comes later rests on it.
            control.abort();
            self.mailbox.send(Input::LinkDown(*connection, error.to_string()));
        }
    }

    fn send_state_end(&mut self, attempt: Attempt) {
        let channels = self.channels.iter().map(DataSender::totals).collect();
        let (devices, sections) = (self.device_ends.clone(), self.sections);
        if let Some(lease) = &self.lease {
            lease.stand_still(attempt);
        }
        self.edge("send-state-end", clock::now(), None);
        self.send(Message::StateEnd { attempt, channels, devices, sections });
    }

    fn tell_device(&self, device: DeviceIndex, command: DeviceCommand) {
        if let Some(thread) = self.devices.get(usize::from(device.0)) {
            thread.tell(command);
        }
    }

    // --- connections --------------------------------------------------------------------------

    fn dial(&mut self, after: Duration) {
        self.connection.0 += 1;
        let (address, mailbox) = (self.config.destination.clone(), self.mailbox.clone());
        let (limit, account) = (self.config.connect_limit, self.account.clone());
        link::dial(address, self.connection, limit, after, mailbox, account);
    }

    fn attach(&mut self, connection: Connection) {
        let Some(secret) = self.brain.handover().secret() else { return };
        let features = self.brain.handover().features();
        let limit = self.limit.clone();
        let binding = Binding { migration: self.migration, secret, connection, features, limit };
        let (address, mailbox) = (self.config.destination.clone(), self.mailbox.clone());
        link::attach(address, binding, self.number, self.config.connect_limit, mailbox);
    }

    fn attached(&mut self, channels: Vec<DataSender>) {
        let places = spread(&self.device_bytes, channels.len());
        for (device, place) in self.devices.iter().zip(places) {
            if let Some(channel) = channels.get(place) {
                device.tell(DeviceCommand::Attach(channel.clone()));
            }
        }
        let state = self.brain.handover().state();
        if !matches!(state, State::Setup | State::RollingBack) {
            // It ended meanwhile.
            return channels.iter().for_each(DataSender::shutdown);
        }
        self.worker.allow_passes();
        self.worker.tell(WorkerCommand::Attach(channels.clone()));
        self.journal.channels = channels.len() as u16;
        (self.channels, self.channels_closed) = (channels, false);
        if let Some((connection, message)) = self.attaching.take() {
            self.feed(Some(Event::Message(connection, message)));
        }
    }

    // --- verification -------------------------------------------------------------------------

    fn verify(&mut self, attempt: Attempt) {
        self.verification = Verification { attempt: Some(attempt), ..Verification::default() };
        self.send(Message::HashRequest { attempt });
        self.worker.tell(WorkerCommand::Verify(attempt));
        let answers: Vec<_> = self
            .devices
            .iter()
            .map(|device| {
                let (reply, answer) = channel();
                device.tell(DeviceCommand::Digest(reply));
                answer
            })
            .collect();
        let mailbox = self.mailbox.clone();
        let collect = move || {
            let digest = |answer: Receiver<_>| match answer.recv() {
                Ok(Ok(digest)) => digest,
                _ => None,
            };
            let digests = answers.into_iter().map(digest).collect();
            mailbox.send(Input::DeviceDigests(attempt, digests));
        };
        if let Err(error) = std::thread::Builder::new().name("src-digest".into()).spawn(collect) {
            let what = format!("no thread for the devices' digests: {error}");
            self.follow_up.push_back(Event::Verified(Err(Failure::new(Side::Source, what))));
        }
    }

    fn compare_hashes(&mut self) {
        let v = &self.verification;
        let (Some(memory), Some(devices), Some((remote_memory, remote_devices))) =
            (&v.memory, &v.devices, &v.remote)
        else {
            return;
        };
        let hex = |digest: &[u8; 32]| crate::hash::hex(digest);
        let memory_identical = hex(memory) == *remote_memory && !v.written;
        let written = v.written;
        let mut different = Vec::new();
        let mut known = !devices.is_empty() && devices.len() == remote_devices.len();
        for (index, (here, there)) in devices.iter().zip(remote_devices).enumerate() {
            match (here.as_ref().map(hex), there) {
                (Some(here), Some(there)) if here == *there => {}
                (Some(_), Some(_)) => different.push(self.journal.device_ids[index].clone()),
                // A device without a side door leaves the question open.
                _ => known = false,
            }
        }
        self.verification = Verification::default();
        self.journal.memory_identical = Some(memory_identical);
        self.journal.device_state_identical =
            if different.is_empty() { known.then_some(true) } else { Some(false) };
        let mut wrong: Vec<String> = different.iter().map(|id| format!("device {id}")).collect();
        if !memory_identical {
            let how = if written { " (written while the guest stood still)" } else { "" };
            wrong.insert(0, format!("memory{how}"));
        }
        let answer = if wrong.is_empty() {
            self.journal.note(clock::now(), "verified", "");
            Ok(())
        } else {
            let what = format!("not identical on both sides: {}", wrong.join(", "));
            self.journal.note(clock::now(), "not-identical", what.clone());
            Err(Failure::new(Side::Source, what))
        };
        self.edge("verification", clock::now(), None);
        self.feed(Some(Event::Verified(answer)));
    }

    /// A guest that ran at the destination has written this memory: what is here of its vCPUs and devices is older.
    fn lease_forbids(&self, resolve: Resolve) -> Option<String> {
        let lease = self.lease.as_ref()?;
        match resolve {
            Resolve::RunHere { force: false } if lease.is_taken() => Some(
                "the destination took the guest's memory and may have run the guest in it: what is here of vCPUs \
                 and devices does not fit that memory any more"
                    .into(),
            ),
            // Where nothing is in doubt the brain refuses, and the lease stays what it is.
            Resolve::RunHere { force: true } => {
                if self.brain.handover().state().is_committed() {
                    lease.force();
                }
                None
            }
            _ => None,
        }
    }

    // --- telling ------------------------------------------------------------------------------

    fn report_notice(&mut self, notice: Notice) {
        let id = |device: DeviceIndex| {
            let ids = &self.journal.device_ids;
            ids.get(usize::from(device.0)).cloned().unwrap_or_default()
        };
        let (event, detail) = match notice {
            Notice::Reinit { device, session, late } => {
                let late = if late { ", after the decision" } else { "" };
                ("reinit", format!("{}, session {}{late}", id(device), session.0))
            }
            Notice::Acked { device, session } => {
                ("acknowledged", format!("{}, session {}", id(device), session.0))
            }
            Notice::StaleAck { device, session } => {
                ("stale-ack", format!("{}, session {}", id(device), session.0))
            }
            Notice::Absorbing(attempt) => ("absorb", format!("attempt {}", attempt.0)),
            Notice::Revoked(attempt) => ("revoked", format!("attempt {}", attempt.0)),
            Notice::DeviceStateLost { device, failure } => {
                let id = id(device);
                self.lose(device, &failure);
                ("device-state-lost", format!("{id}: {failure}"))
            }
            Notice::DeviceLost { device, failure } => {
                let id = id(device);
                self.lose(device, &failure);
                ("device-lost", format!("{id}: {failure}"))
            }
            Notice::CancelTooLate => ("cancel-too-late", "committed".into()),
            Notice::RollingBack { attempt, reason } => {
                ("rolling-back", format!("attempt {}: {reason}", attempt.0))
            }
            Notice::RolledBack(attempt) => ("rolled-back", format!("attempt {}", attempt.0)),
            Notice::NoAnswer(reason) => {
                // An operator decides by what the destination does know.
                self.journal.failure.clone_from(&reason);
                let nothing = || "no record there".to_owned();
                ("no-answer", reason.map_or_else(nothing, |reason| reason.to_string()))
            }
            Notice::Resolved(resolve) => {
                self.resolving.take().map(|reply| reply.send(Ok(())));
                ("resolved", format!("{resolve:?}"))
            }
            Notice::ResolveRefused(why) => {
                self.resolving.take().map(|reply| reply.send(Err(why.clone())));
                ("resolve-refused", why)
            }
            Notice::RunsThereToo(attempt) => {
                ("runs-there-too", format!("attempt {}: the guest runs twice", attempt.0))
            }
        };
        self.log(event, detail.clone());
        self.journal.note(clock::now(), event, detail);
    }

    fn lose(&mut self, device: DeviceIndex, failure: &Failure) {
        if let Some(lost) = self.journal.lost.get_mut(usize::from(device.0)) {
            *lost = Some(failure.to_string());
        }
    }

    fn refresh(&mut self, shared: &Shared) {
        let now = clock::now();
        let slow_call = self.slow_call(now);
        let (status, counters) = (self.brain.status(), &self.worker.counters);
        let progress = self.journal.progress(now, &status, counters, slow_call);
        *shared.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = progress;
    }

    /// The device call that has been out for longest, once that is long: over a second, or with the guest
    /// standing still over its bound.
    fn slow_call(&mut self, now: Time) -> Option<String> {
        let slowest = self.calls.iter_mut().min_by_key(|(_, (_, since, _))| *since)?;
        let (device, (call, since, warned)) = slowest;
        let took = now.since(*since);
        let bound = self.brain.call_bound(*device, *call);
        if took < SLOW_CALL && bound.is_none_or(|bound| took <= bound) {
            return None;
        }
        let id = self.journal.device_ids.get(usize::from(device.0)).cloned().unwrap_or_default();
        if !std::mem::replace(warned, true) {
            tracing::warn!(device = id, ?call, %took, "a device call takes long");
        }
        Some(format!("device {id}, {call:?}, {} ms", took.0 / 1_000_000))
    }

    // --- the end ------------------------------------------------------------------------------

    /// What of the destination's telemetry is for the report alone.
    fn telemetry(&mut self, message: &Message) {
        let Message::Telemetry {
            populated_bytes,
            populate_ns,
            mapped_bytes,
            map_ns,
            first_heartbeat_ns,
            boot_id,
            ..
        } = message
        else {
            return;
        };
        if let Some(bytes) = populated_bytes {
            self.journal.populated = Some((*bytes, Time(*populate_ns)));
        }
        if let (Some(bytes), None) = (mapped_bytes, self.journal.mapped) {
            let took = Time(*map_ns);
            self.journal.mapped = Some((*bytes, took));
            let detail =
                format!("{bytes} bytes of memory handed over, mapped and pinned in {took}");
            self.journal.note(clock::now(), "mapped", detail);
        }
        // Stamps of two boots do not compare.
        if first_heartbeat_ns.is_some() && boot_id.is_some() && *boot_id == clock::boot_id() {
            self.journal.first_heartbeat_ns = *first_heartbeat_ns;
        }
    }

    /// What the migration cost the destination so far.
    fn cost_there(&mut self, message: &Message) {
        let &Message::Cost { control_ns, data_ns, devices_ns, populate_ns, memory_peak_bytes } =
            message
        else {
            return;
        };
        let spent = [control_ns, data_ns, devices_ns, populate_ns].map(Time);
        self.journal.cost_there = Some(CostReport::of(spent, memory_peak_bytes));
    }

    /// What the destination did of the blackout.
    fn timeline(&mut self, message: Message) {
        let Message::Timeline { attempt, boot_id, spans } = message else { return };
        if attempt == self.brain.handover().attempt() {
            let same_clock = boot_id.is_some() && boot_id == clock::boot_id();
            self.journal.ledger.told(spans, same_clock);
        }
    }

    /// The guest runs there; its first heartbeat, and what the destination did of the blackout, complete the
    /// report. The blackout is over: this wait costs the guest nothing.
    fn await_last_words(&mut self) {
        let begun = clock::now();
        loop {
            let told = self.journal.ledger.is_told() || !self.brain.handover().features().telemetry;
            let beat = self.journal.last_heartbeat_ns.is_none()
                || self.journal.first_heartbeat_ns.is_some();
            let limit = match (told, beat) {
                (true, true) => return,
                (false, true) => TIMELINE_LIMIT,
                (_, false) => HEARTBEAT_LIMIT,
            };
            let left = Time(limit.as_nanos() as u64).since(clock::now().since(begun));
            if left == Time(0) {
                return;
            }
            match self.mailbox.take_within(Duration::from_nanos(left.0)) {
                Some((Input::Message(connection, message @ Message::Telemetry { .. }, ..), at)) => {
                    self.telemetry(&message);
                    if let Some((recorder, _)) = &mut self.recorder {
                        recorder.event(at, &Event::Message(connection, message));
                    }
                }
                Some((Input::Message(_, message @ Message::Timeline { .. }, ..), _)) => {
                    self.timeline(message);
                }
                Some((Input::Message(_, message @ Message::Cost { .. }, ..), _)) => {
                    self.cost_there(&message);
                }
                Some((Input::LinkDown(..), _)) | None => return,
                Some(_) => {}
            }
        }
    }

    fn finish(mut self, ended: Time) -> Report {
        let (outcome, failure) = failure_of(self.outcome.take());
        if let Some(failure) = &failure {
            tracing::error!(%failure, "migration failed; the guest runs on the source");
        }
        self.journal.failure = failure;
        if let (Some(path), "completed", false) = (&self.config.history, outcome, self.was_limited)
        {
            crate::history::save(path, &self.brain.history());
        }
        if let Some((_, control)) = self.control.take() {
            // Waits for a destination that does not read; nobody else needs to.
            let close = move || control.close();
            if let Err(error) = std::thread::Builder::new().name("src-close".into()).spawn(close) {
                tracing::warn!(%error, "the control channel is cut off");
            }
        }
        for channel in &self.channels {
            channel.shutdown();
        }
        if self.lease.is_some() && outcome == "completed" {
            self.worker.tell(WorkerCommand::LetGo);
        }
        self.journal.cost_here = Some(self.account.report());
        let report =
            self.journal.report(ended, outcome, &self.brain.status(), &self.worker.counters);
        if let Some((recorder, file)) = self.recorder.take()
            && let Err(error) = file.write(&recorder.finish(self.journal.end(ended, outcome)))
        {
            tracing::warn!(%error, "no trace is written");
        }
        self.end_threads();
        report
    }

    /// Another migration may begin as soon as this one's report is there: nothing of this one may then
    /// still stop the tracking or the DMA logs that the other has started.
    fn end_threads(self) {
        let Self { devices, worker, ended, .. } = self;
        drop((devices, worker));
        if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(END_LIMIT) {
            tracing::error!("a device or VMM call still hangs after the end of the migration");
        }
    }
}

/// What a local move needs of this side: that memory can be handed over, and where to.
fn lease(vmm: &dyn Vmm, config: &OutgoingConfig) -> Result<Lease, Failure> {
    let failed = |what: String| Failure::new(Side::Source, what).in_phase("setup");
    if !matches!(config.destination, crate::channel::Address::Unix(_)) {
        let what =
            format!("{} is no UNIX socket: memory cannot be handed over", config.destination);
        return Err(
            failed(what).remedy("name the destination unix:PATH, or migrate without --local")
        );
    }
    if !vmm.replaces_memory() {
        return Err(failed("this VMM cannot hand its guest's memory over".into()));
    }
    let files = vmm.memory().files_to_share().map_err(|error| {
        failed(error.to_string())
            .remedy("migrate without --local, or run the guest without --hugepages")
    })?;
    if files.len() >= crate::channel::FILES_MAX {
        return Err(failed(format!(
            "guest memory of {} files is too many to hand over",
            files.len()
        )));
    }
    Lease::new().map_err(|error| failed(error.to_string()))
}

/// An outcome in the words of a report.
pub(super) fn failure_of(outcome: Option<Outcome>) -> (&'static str, Option<Failure>) {
    match outcome {
        Some(Outcome::Completed) => ("completed", None),
        Some(Outcome::Cancelled) => ("cancelled", None),
        Some(Outcome::DryRun) => ("dry-run", None),
        Some(Outcome::Abandoned) => ("abandoned", None),
        Some(Outcome::Failed(failure)) => ("failed", Some(failure)),
        None => ("failed", Some(Failure::new(Side::Source, "the migration's driver was cut off"))),
    }
}

/// How many data channels a migration has if nobody says: half as many as the host has cores, since the guest wants
/// some as well, and two where there are two: with a guest that writes, one channel's threads get too little of
/// them (docs/performance.md). Devices are read and loaded side by side: two of them on two cores came to 2.5 GB/s
/// over one channel, and to 3.3 over two. A link that one core can fill needs no more than one.
fn channels_by_default(knowledge: &Knowledge, devices: usize) -> u16 {
    let link = knowledge.history.pair(&knowledge.host.pair).and_then(|pair| {
        // The best that was seen, in ns per MiB.
        pair.link.iter().min().copied()
    });
    if link.is_some_and(|ns_per_mib| ns_per_mib > SLOW_LINK_NS_PER_MIB) {
        return 1;
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let number = (cores / 2).max(devices).max(2).min(cores);
    u16::try_from(number).unwrap_or(u16::MAX).clamp(1, CHANNELS_BY_DEFAULT_MAX)
}

/// What each device says it has, where devices share a channel and it matters; 0 of one that does not say (rule Z1:
/// the size can be asked in any state).
fn device_bytes(devices: &[crate::Device], channels: u16) -> Vec<u64> {
    let asked = devices.len() > usize::from(channels) && channels > 1;
    let bytes = |device: &crate::Device| {
        if !asked || !device.description.data_size {
            return 0;
        }
        let mut handle = device.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        handle.stop_copy_length().unwrap_or(0)
    };
    devices.iter().map(bytes).collect()
}

/// Who migrates, for a trace.
fn header(
    config: &OutgoingConfig,
    description: &Description,
    knowledge: &Knowledge,
    migration: Id,
    memory_bytes: u64,
) -> Header {
    let device = |(about, known): (&crate::vmm::DeviceDescription, _)| {
        let known: &switchover::estimate::DeviceKnowledge = known;
        TracedDevice {
            id: about.id.clone(),
            kind: known.kind.clone(),
            pre_copy: about.migration_flags & 4 != 0,
            p2p: about.migration_flags & 2 != 0,
            precopy_info_v2: about.precopy_info_v2,
            data_size: about.data_size,
            dma_logging: about.dma_logging,
            stop_copy_bytes: known.stop_copy_bytes,
        }
    };
    Header {
        migration: migration.to_string(),
        machine: description.machine.machine.clone(),
        vcpus: description.machine.vcpus,
        memory_bytes,
        limit_us: config.brain.downtime_limit.0 / 1_000,
        mode: match config.brain.mode {
            switchover::decide::Mode::BestEffort => "best-effort".to_owned(),
            switchover::decide::Mode::Strict => "strict".to_owned(),
        },
        policy: config.brain.policy.name().to_owned(),
        devices: description.devices.iter().zip(&knowledge.devices).map(device).collect(),
        ..Header::default()
    }
}

/// What the brain is told: the devices in their order, what is known of each by its id, and the history.
fn knowledge(config: &OutgoingConfig, devices: &[crate::Device]) -> Knowledge {
    let mut knowledge = config.knowledge.clone();
    let known = std::mem::take(&mut knowledge.devices);
    knowledge.devices = devices
        .iter()
        .map(|device| {
            let about = &device.description;
            let found = known.iter().find(|known| known.name == about.id).cloned();
            let mut device_knowledge = found.unwrap_or_default();
            device_knowledge.name = about.id.clone();
            if device_knowledge.kind.is_empty() {
                let [vendor, id, ..] = about.pci_ids;
                device_knowledge.kind = format!("{} {vendor:04x}:{id:04x}", about.backend);
            }
            device_knowledge.reset_keeps_state |= !about.reset_runs;
            if about.data_size && about.migration_flags & 4 == 0 {
                // Without PRE_COPY nobody asks it later (rule Z1: the size can be asked in any state).
                let mut handle =
                    device.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let size = handle.stop_copy_length().ok();
                device_knowledge.stop_copy_bytes = remaining_bytes(size, None);
            }
            device_knowledge
        })
        .collect();
    if knowledge.host.pair.is_empty() {
        knowledge.host.pair = config.destination.host();
    }
    if config.local {
        // There is no memory to sync or to send; what that teaches says nothing of moves that have it.
        knowledge.host.pair.push_str(", local move");
        knowledge.host.final_sync = Range { min: 1_000, typical: 10_000, max: 100_000 };
        knowledge.host.bounds.sync = Time::from_ms(5);
    }
    if let Some(path) = &config.history {
        knowledge.history = crate::history::load(path);
    }
    knowledge
}

/// The device that must have P2P and has not.
fn p2p_missing(
    vmm: &dyn Vmm,
    description: &Description,
    traits: &[DeviceTraits],
) -> Option<String> {
    if traits.len() < 2 || !vmm.maps_bars_for_dma() {
        return None;
    }
    let without = traits.iter().position(|traits| !traits.p2p)?;
    description.devices.get(without).map(|device| device.id.clone())
}
