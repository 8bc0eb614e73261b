//! The driver's loop: one input at a time to the brain of the migration it belongs to.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use switchover::Time;
use switchover::destination::{Action, Destination, Event, State};
use switchover::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome};
use switchover::message::{Connection, DeviceIndex, Failure, Features, Id, Message, Side};

use super::device::{Command as DeviceCommand, DeviceThread};
use super::incoming::Migration;
use super::worker::{Command as WorkerCommand, Worker};
use super::{IncomingConfig, IncomingStatus, Input, Mailbox, Shared};
use crate::channel::{Attach, ControlReceiver, ControlSender, Stream};
use crate::cost::{Work, this_thread};
use crate::describe::{CHANNELS_MAX, Description};
use crate::gate::Gate;
use crate::late_log::LateLog;
use crate::lease::Lease;
use crate::mailbox::{BrokeOff, Driven, Seat};
use crate::ram::Population;
use crate::record::{Binding, Record, RecordStore};
use crate::vmm::{Device, Vmm};
use crate::{clock, ids};

/// How many migrations that are over are remembered, for sources that come back and ask.
const REMEMBERED_MAX: usize = 16;
/// How often the destination tells what it measures, and looks at slow things.
const TICK: Duration = Duration::from_millis(50);
const TELEMETRY: Time = Time::from_ms(100);
/// A device that has loaded all there is says so sooner: the source decides on what it takes for unloaded.
const TELEMETRY_DRAINED: Time = Time::from_ms(10);
/// How often it tells what the migration costs it.
const COST: Time = Time::from_ms(1_000);
/// How long a source may take from Hello to a Describe that fits.
const SETUP_LIMIT: Time = Time::from_ms(30_000);
/// Messages of one connection that wait for the driver; then its reader waits.
const MESSAGES_MAX: usize = 256;
/// How long a lost data channel waits for the control channel to say why.
const DATA_LOST_GRACE: Time = Time::from_ms(500);

/// Runs until stopped.
pub(super) fn run(
    vmm: Arc<dyn Vmm>,
    config: IncomingConfig,
    mailbox: Mailbox,
    shared: Arc<Shared>,
) {
    let instance = ids::instance();
    let records = match &config.state_dir {
        Some(dir) => RecordStore::new(dir.clone(), config.durable),
        None => Ok(RecordStore::in_memory()),
    };
    let (instance, records) = match (instance, records) {
        (Ok(instance), Ok(records)) => (instance, records),
        (Err(error), _) | (_, Err(error)) => {
            let what = format!("the destination cannot start: {error}");
            return shared.end(Err(Failure::new(Side::Destination, what)));
        }
    };
    let ended = Arc::clone(&shared);
    let driver = Driver {
        vmm,
        config,
        mailbox,
        instance,
        records,
        migrations: Vec::new(),
        places: 0,
        cleaning: None,
        unusable: None,
        waiting: None,
        resolving: None,
        stopping: false,
        shared,
        own_thread: this_thread(),
        late_log: LateLog::new(Side::Destination),
    };
    driver.publish(&driver.shared);
    let mailbox = driver.mailbox.clone();
    match Seat::new(driver, mailbox).run(Driver::watch) {
        Ok(driver) => driver.end(),
        Err(BrokeOff) => {
            let what = "the driver of the destination broke off";
            ended.end(Err(Failure::new(Side::Destination, what)));
        }
    }
}

struct Driver {
    vmm: Arc<dyn Vmm>,
    config: IncomingConfig,
    mailbox: Mailbox,
    instance: Id,
    records: RecordStore,
    /// The last one is the current one; earlier ones are over and only answer questions.
    migrations: Vec<Migration>,
    places: u64,
    /// The migration whose leftovers are being cleaned up.
    cleaning: Option<u64>,
    /// Why nothing else may be loaded: memory or devices here may still be those of a guest elsewhere.
    unusable: Option<String>,
    /// A Hello that waits for that.
    waiting: Option<(Stream, Message)>,
    /// Who wants to know whether the operator's decision is obeyed.
    resolving: Option<Sender<Result<(), String>>>,
    stopping: bool,
    shared: Arc<Shared>,
    /// The thread that outlives every migration.
    own_thread: libc::pid_t,
    late_log: LateLog,
}

impl Driven for Driver {
    type Input = Input;

    fn act(&mut self, input: Input, _: Time) {
        let shared = Arc::clone(&self.shared);
        self.take(input, &shared);
    }

    fn settled(&mut self) {
        self.publish(&self.shared);
    }

    fn patience(&self) -> Duration {
        self.idle_limit()
    }

    fn ended(&self) -> bool {
        self.stopping
    }
}

impl Driver {
    /// What only the driver's own thread looks at, each time it wakes.
    fn watch(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.flush_log();
        self.tick(&shared);
        self.publish(&shared);
    }

    fn end(mut self) {
        self.late_log.flush(false);
        for migration in &mut self.migrations {
            migration.controls.values().for_each(ControlSender::close);
            // A guest that is being started is no leftover.
            let starts = matches!(migration.brain.handover().state(), State::Starting);
            if !migration.finished && !starts {
                migration.abandon(Arc::clone(&self.vmm), self.mailbox.clone());
            }
        }
        self.shared.end(Err(Failure::new(Side::Destination, "the destination was stopped")));
    }

    fn idle_limit(&self) -> Duration {
        let timer = self.migrations.last().and_then(|migration| migration.brain.next_timer());
        let due = timer.map(|at| Duration::from_nanos(at.since(clock::now()).0));
        let owed = self.migrations.last().is_some_and(Migration::owes_telemetry);
        let tick = if owed { Duration::from_nanos(TELEMETRY_DRAINED.0) } else { TICK };
        due.map_or(tick, |due| due.min(tick))
    }

    // --- inputs -------------------------------------------------------------------------------

    fn take(&mut self, input: Input, shared: &Shared) {
        match input {
            Input::Hello(stream, hello) => self.hello(stream, hello, shared),
            Input::Attach(stream, attach) => self.attach(stream, &attach),
            Input::Message(place, connection, message, at, _permit) => {
                self.mind_population(place, &message);
                if let Some(migration) = self.find(place) {
                    match &message {
                        Message::StateEnd { .. } => migration.timeline.begin(at),
                        Message::Commit { .. } => migration.timeline.commit(at),
                        _ => {}
                    }
                }
                self.feed(place, Event::Message(connection, message), shared);
            }
            Input::Files(place, files) => {
                if let Some(migration) = self.find(place) {
                    migration.files = files;
                }
            }
            Input::Adopted(place, traits, answer) => self.adopted(place, traits, answer, shared),
            Input::LinkDown(place, connection, what) => {
                if let Some(migration) = self.find(place) {
                    migration.controls.remove(&connection);
                }
                let failure = Failure::new(Side::Destination, format!("the link is down: {what}"));
                self.feed(place, Event::LinkDown(connection, failure), shared);
            }
            Input::DataEnded(place, why) => {
                let now = clock::now();
                // Channels that were closed on purpose have been forgotten before.
                if let Some(migration) = self.find(place).filter(|m| m.has_channels()) {
                    let why = why.unwrap_or_else(|| "the source closed it".into());
                    migration.data_lost.get_or_insert((now, why));
                }
            }
            Input::ChannelArrived(place) => {
                let arrived = self.find(place).map(Migration::channels_arrived);
                match arrived {
                    Some(Ok(true)) => {
                        if let Some(migration) = self.find(place) {
                            migration.timeline.edge("arrival", clock::now(), Time(0));
                        }
                        self.look_for_completion(place, shared);
                    }
                    Some(Err(what)) => self.fail_loading(place, what, shared),
                    Some(Ok(false)) | None => {}
                }
            }
            Input::Unloaded(place, answer) => {
                if let (Some(migration), Ok(ram_bytes)) = (self.find(place), &answer) {
                    migration.unloaded(*ram_bytes);
                }
                let failed = |what: String| Failure::new(Side::Destination, what);
                self.feed(place, Event::Unloaded(answer.map(drop).map_err(failed)), shared);
            }
            Input::Resolve(resolve, reply) => match self.migrations.last().map(|m| m.place) {
                Some(place) => {
                    self.resolving = Some(reply);
                    self.feed(place, Event::Operator(resolve), shared);
                }
                None => {
                    let _ = reply.send(Err("no guest came here".into()));
                }
            },
            Input::Loaded(place, device) => self.loaded(place, device, shared),
            Input::Event(place, event) => {
                if matches!(event, Event::Wired(Err(_))) {
                    self.give_memory(place);
                }
                self.observe(place, &event);
                self.feed(place, event, shared);
            }
            Input::Hashes(place, connection, attempt, memory, devices) => {
                if let Some(migration) = self.find(place) {
                    let hashes = Message::Hashes { attempt, memory, devices };
                    migration.send(connection, hashes);
                }
            }
            Input::Clean(place) => {
                if self.cleaning == Some(place) {
                    self.cleaning = None;
                    if let Some((stream, hello)) = self.waiting.take() {
                        self.hello(stream, hello, shared);
                    }
                }
            }
            Input::Unusable(why) => {
                let why = format!("what is left of an aborted local move is in the way: {why}");
                if let Some((stream, _)) = self.waiting.take() {
                    refuse(stream, &why);
                }
                self.unusable = Some(why);
            }
            Input::Cancel => {
                if let Some(place) = self.migrations.last().map(|m| m.place) {
                    self.feed(place, Event::Cancel, shared);
                }
            }
            Input::Stop => self.stopping = true,
        }
    }

    /// While the guest stands still nothing is written to a log, which may be slow.
    fn flush_log(&mut self) {
        let stands_still = self.migrations.last().is_some_and(|m| m.timeline.is_open());
        self.late_log.flush(stands_still);
    }

    /// Sees events go by that end a part of the blackout.
    fn observe(&mut self, place: u64, event: &Event) {
        let Some(migration) = self.find(place) else { return };
        let name = match event {
            Event::CallDone { call: DeviceCall::SetState(state), .. } => match state {
                DeviceState::Stop => "validate",
                DeviceState::RunningP2p => "start-devices-p2p",
                DeviceState::Running => "start-devices",
                _ => return,
            },
            Event::MachineStateApplied(_) => "apply-machine-state",
            Event::Wired(_) => "wire",
            Event::Started(_) => "start-vcpus",
            _ => return,
        };
        let work = match event {
            Event::CallDone { device, .. } => {
                migration.devices.get(usize::from(device.0)).map(DeviceThread::last_call)
            }
            _ => migration.worker.as_ref().map(Worker::last_step),
        };
        migration.timeline.edge(name, clock::now(), work.unwrap_or_default());
    }

    /// Nothing is populated in the background while the guest stands still.
    fn mind_population(&mut self, place: u64, message: &Message) {
        let paused = match message {
            Message::StopCopyBegin { .. } => true,
            Message::RollBack { .. } | Message::Revoked { .. } => false,
            _ => return,
        };
        if let Some(migration) = self.find(place) {
            migration.pause_population(paused);
        }
    }

    fn find(&mut self, place: u64) -> Option<&mut Migration> {
        self.migrations.iter_mut().find(|migration| migration.place == place)
    }

    fn tick(&mut self, shared: &Shared) {
        let now = clock::now();
        let Some(migration) = self.migrations.last_mut() else { return };
        let place = migration.place;
        let state = migration.brain.handover().state();
        let since = now.since(migration.telemetry_at);
        if since >= TELEMETRY || (since >= TELEMETRY_DRAINED && migration.owes_telemetry()) {
            tell_telemetry(migration, now);
        }
        if state == State::Running && !migration.heartbeat_told {
            tell_heartbeat(migration, &*self.vmm);
        }
        let silent = state == State::Setup && !migration.adopting;
        if silent && now.since(migration.begun_at) >= SETUP_LIMIT {
            self.fail_loading(place, "the source did not describe itself in time".into(), shared);
            return;
        }
        // The guest stands still once the end of the state is awaited.
        let grace = if migration.expected.is_some() { 10 } else { 1 };
        let grace = Time(DATA_LOST_GRACE.0 / grace);
        let lost = migration.data_lost.take_if(|(at, _)| now.since(*at) >= grace);
        if let Some((_, why)) = lost {
            let failure = Failure::new(Side::Destination, format!("a data channel is down: {why}"));
            self.feed(place, Event::DataLost(failure), shared);
        }
        if self.migrations.last().is_some_and(|m| m.brain.next_timer().is_some_and(|t| t <= now)) {
            self.feed_time(place, shared);
        }
    }

    /// A failure of the data path matters only while something is still to be loaded.
    fn fail_loading(&mut self, place: u64, what: String, shared: &Shared) {
        let Some(migration) = self.find(place) else { return };
        if matches!(migration.brain.handover().state(), State::Setup | State::Loading) {
            let failure = Failure::new(Side::Destination, what);
            self.feed(place, Event::Fail(failure), shared);
        }
    }

    fn loaded(&mut self, place: u64, device: DeviceIndex, shared: &Shared) {
        let Some(migration) = self.find(place) else { return };
        let Some(thread) = migration.devices.get(usize::from(device.0)) else { return };
        let loaded = thread.take_loaded();
        let (stream, offset) = (loaded.stream, loaded.bytes);
        self.feed(place, Event::Loaded { device, stream, offset }, shared);
        self.look_for_completion(place, shared);
    }

    fn look_for_completion(&mut self, place: u64, shared: &Shared) {
        let Some(migration) = self.find(place) else { return };
        match migration.state_complete() {
            Ok(Some(attempt)) => match migration.close_channels() {
                Ok(()) => {
                    migration.timeline.edge("seal", clock::now(), Time(0));
                    self.feed(place, Event::StateComplete(attempt), shared);
                }
                Err(what) => self.fail_loading(place, what, shared),
            },
            Ok(None) => {}
            Err(what) => {
                migration.expected = None;
                self.fail_loading(place, what, shared);
            }
        }
    }

    // --- connections --------------------------------------------------------------------------

    fn hello(&mut self, stream: Stream, hello: Message, shared: &Shared) {
        let Message::Hello { features, migration, instance, connection, secret } = hello else {
            return stream.shutdown();
        };
        let known = self.migrations.iter().find(|m| m.id() == migration);
        if let Some(known) = known {
            if secret != Some(known.brain.handover().secret()) {
                return refuse(stream, "this migration is known here by another secret");
            }
            if let Some(why) = known.refuses_connection(connection) {
                return refuse(stream, why);
            }
            let place = known.place;
            return self.connect(place, stream, connection, features, shared);
        }
        if let Some(secret) = secret {
            let Some(place) = self.recover(migration, secret, instance) else {
                // In doubt about a migration that nobody here knows of: that does not end doubt.
                return refuse(stream, "this destination has no record of the migration");
            };
            return self.connect(place, stream, connection, features, shared);
        }
        if let Some(current) = self.migrations.last() {
            let place = current.place;
            match current.brain.handover().state() {
                State::Running | State::Starting => {
                    return refuse(stream, "a guest already runs here");
                }
                State::Prepared | State::Expired if current.source == instance => {
                    // Its own source begins anew: it never committed, and never will.
                    self.feed(place, Event::Superseded, shared);
                }
                State::Prepared | State::Expired => {
                    let what = "a complete guest of another source waits here";
                    return refuse(stream, what);
                }
                State::Setup | State::Loading if current.source == instance => {
                    let what = "the source began another migration";
                    let failure = Failure::new(Side::Source, what);
                    self.feed(place, Event::Fail(failure), shared);
                }
                State::Setup | State::Loading => {
                    return refuse(stream, "another migration is under way here");
                }
                State::Aborted => {}
            }
        }
        if let Some(why) = &self.unusable {
            return refuse(stream, why);
        }
        if self.cleaning.is_some() {
            let hello = Message::Hello { features, migration, instance, connection, secret };
            if let Some((older, _)) = self.waiting.replace((stream, hello)) {
                refuse(older, "another migration came meanwhile");
            }
            return;
        }
        self.begin(stream, (migration, instance, connection), features, shared);
    }

    /// A migration of an earlier process, if it left a record: this one can say what was decided, or decide
    /// that the guest never runs here.
    fn recover(&mut self, migration: Id, secret: Id, source: Id) -> Option<u64> {
        let found = match self.records.newest(Side::Destination, migration) {
            Ok(found) => found?,
            Err(error) => {
                tracing::error!(%error, "records cannot be read");
                return None;
            }
        };
        if found.binding.as_ref().is_none_or(|binding| binding.secret != secret) {
            tracing::warn!(%migration, "a source asks with another secret than is on record");
            return None;
        }
        let Record { attempt, decision, .. } = found;
        tracing::info!(%migration, ?decision, "on record of an earlier process");
        let brain = Destination::recovered(migration, self.instance, secret, attempt, decision);
        self.places += 1;
        let mut recovered = Migration::new(self.places, brain, source);
        recovered.finished = true;
        if self.migrations.len() >= REMEMBERED_MAX {
            self.migrations.remove(0);
        }
        // The last one is the current one, and stays that.
        self.migrations.insert(0, recovered);
        Some(self.places)
    }

    fn begin(
        &mut self,
        stream: Stream,
        (migration, source, connection): (Id, Id, Connection),
        features: Features,
        shared: &Shared,
    ) {
        let secret = match ids::random() {
            Ok(secret) => secret,
            Err(error) => return refuse(stream, &format!("no random numbers: {error}")),
        };
        let here = Features {
            verify: true,
            ram_checksum: true,
            device_checksum: true,
            telemetry: true,
            lz4: true,
            zstd: true,
            local: stream.carries_files() && self.vmm.replaces_memory(),
            echo: true,
        };
        let window = if features.verify { self.config.verify_window } else { self.config.window };
        let window = Time(u64::try_from(window.as_nanos()).unwrap_or(u64::MAX));
        let brain = Destination::new(migration, self.instance, secret, here, window);
        self.places += 1;
        if self.migrations.len() >= REMEMBERED_MAX {
            self.migrations.remove(0);
        }
        let begun = Migration::new(self.places, brain, source);
        begun.account.watch(self.own_thread, Work::Control);
        self.migrations.push(begun);
        tracing::info!(%migration, "a source connected");
        self.config.observer.entered(Side::Destination, State::Setup.name());
        self.connect(self.places, stream, connection, features, shared);
    }

    /// Makes `stream` a control connection of the migration at `place`.
    fn connect(
        &mut self,
        place: u64,
        stream: Stream,
        connection: Connection,
        features: Features,
        shared: &Shared,
    ) {
        let other = match stream.try_clone() {
            Ok(other) => other,
            Err(error) => {
                tracing::warn!(%error, "a control connection was not taken");
                stream.shutdown();
                // One that has no connection at all would be under way for ever.
                if self.find(place).is_some_and(|m| m.brain.handover().connection().is_none()) {
                    let what = format!("its control connection was not taken: {error}");
                    let failure = Failure::new(Side::Destination, what);
                    self.feed(place, Event::Fail(failure), shared);
                }
                return;
            }
        };
        let mailbox = self.mailbox.clone();
        let Some(migration) = self.find(place) else { return };
        let sender = ControlSender::new(stream);
        let answers = sender.weak();
        migration.controls.insert(connection, sender);
        let account = migration.account.clone();
        let run = move || {
            let _joined = account.join(Work::Control);
            let mut receiver = ControlReceiver::new(other).keeping_files();
            let gate = Gate::new(MESSAGES_MAX);
            loop {
                match receiver.recv() {
                    // At once: the source wants to know the way, not what else there is to do. Of answers that nobody
                    // reads, some do not go out.
                    Ok(Message::Echo { number }) => {
                        drop(receiver.take_files());
                        answers.send(Message::Echoed { number });
                    }
                    Ok(message) => {
                        // Those that come with anything else are closed.
                        let files = receiver.take_files();
                        if !files.is_empty() && matches!(message, Message::Describe { .. }) {
                            mailbox.send(Input::Files(place, files));
                        }
                        let (now, permit) = (clock::now(), gate.enter());
                        mailbox.send(Input::Message(place, connection, message, now, permit));
                    }
                    Err(error) => {
                        return mailbox.send(Input::LinkDown(place, connection, error.to_string()));
                    }
                }
            }
        };
        self.feed(place, Event::LinkUp(connection, features), shared);
        let name = format!("dst-control{}", connection.0);
        if let Err(error) = std::thread::Builder::new().name(name).spawn(run) {
            let what = format!("no thread for a control connection: {error}");
            self.mailbox.send(Input::LinkDown(place, connection, what));
        }
    }

    fn attach(&mut self, mut stream: Stream, attach: &Attach) {
        let (vmm, mailbox) = (Arc::clone(&self.vmm), self.mailbox.clone());
        match self.migrations.iter_mut().find(|m| m.id() == attach.migration) {
            Some(migration) => migration.attach(stream, attach, &*vmm, &mailbox),
            None => {
                let why = "no such migration is under way here";
                let _ = crate::channel::send_attach_refused(&mut stream, attach, why);
                stream.shutdown();
            }
        }
    }

    // --- the brain ----------------------------------------------------------------------------

    fn feed(&mut self, place: u64, event: Event, shared: &Shared) {
        self.drive(place, Some(event), shared);
    }

    fn feed_time(&mut self, place: u64, shared: &Shared) {
        self.drive(place, None, shared);
    }

    fn drive(&mut self, place: u64, event: Option<Event>, shared: &Shared) {
        let mut next = vec![event];
        while let Some(event) = next.pop() {
            let Some(migration) = self.find(place) else { return };
            let actions = migration.brain.handle(clock::now(), event);
            for action in actions {
                if let Some(event) = self.perform(place, action, shared) {
                    next.push(Some(event));
                }
            }
        }
    }

    /// Does one thing; answers with what is known at once.
    fn perform(&mut self, place: u64, action: Action, shared: &Shared) -> Option<Event> {
        match action {
            Action::Enter(state) => {
                self.config.observer.entered(Side::Destination, state.name());
                self.late_log.keep("phase", state.name().into());
                self.flush_log();
            }
            Action::Send(connection, message) => {
                let migration = self.find(place)?;
                let running = matches!(message, Message::Running { .. });
                let part = match message {
                    Message::Ready { .. } => Some("send-ready"),
                    Message::Running { .. } => Some("send-running"),
                    _ => None,
                };
                migration.send(connection, message);
                if let Some(part) = part {
                    migration.timeline.edge(part, clock::now(), Time(0));
                }
                if running {
                    tell_timeline(migration, connection);
                }
            }
            Action::Compare(body) => return self.compare(place, &body).map(Event::Compared),
            Action::BeginStream(device, session) => {
                self.tell_device(place, device, DeviceCommand::BeginStream(session));
            }
            Action::Call(device, call) => {
                self.tell_device(place, device, DeviceCommand::Call(call));
            }
            Action::AwaitState(Message::StateEnd { attempt, channels, devices, sections }) => {
                let mailbox = self.mailbox.clone();
                let migration = self.find(place)?;
                let awaited =
                    migration.await_state(attempt, &channels, devices, sections, &mailbox);
                if let Err(what) = awaited {
                    return Some(Event::Fail(Failure::new(Side::Source, what)));
                }
            }
            Action::ApplyMachineState => {
                let migration = self.find(place)?;
                let sections = migration.take_sections();
                migration.worker.as_ref()?.tell(WorkerCommand::Apply(sections));
            }
            Action::Wire => {
                if let Err(failure) = self.take_memory(place) {
                    return Some(Event::Wired(Err(failure)));
                }
                self.find(place)?.worker.as_ref()?.tell(WorkerCommand::Wire);
            }
            Action::Start => self.find(place)?.worker.as_ref()?.tell(WorkerCommand::Start),
            Action::Hash(connection, attempt) => {
                let command = WorkerCommand::Hash(connection, attempt);
                self.find(place)?.worker.as_ref()?.tell(command);
            }
            Action::Record(decision, attempt) => {
                let role = Side::Destination;
                let handover = self.find(place)?.brain.handover();
                let binding = Some(Binding {
                    secret: handover.secret(),
                    connection: handover.connection().unwrap_or_default(),
                    destination: None,
                });
                let migration = handover.migration();
                let record = Record { role, migration, attempt, decision, reason: None, binding };
                let written = self.records.write(&record);
                if written.is_err() && decision == Decision::Running {
                    self.give_memory(place);
                }
                let part = match decision {
                    Decision::Prepared => Some("record-prepared"),
                    Decision::Running => Some("record-running"),
                    _ => None,
                };
                if let (Some(part), Some(migration)) = (part, self.find(place)) {
                    migration.timeline.edge(part, clock::now(), Time(0));
                }
                let written = written.map_err(|error| {
                    let what = format!("the decision could not be recorded: {error}");
                    Failure::new(role, what).remedy("make --state-dir writable")
                });
                return Some(Event::Recorded(written));
            }
            Action::Unload(_) => {
                let mailbox = self.mailbox.clone();
                if let Err(error) = self.find(place)?.unload(&mailbox) {
                    let what = format!("no thread to roll back: {error}");
                    return Some(Event::Unloaded(Err(Failure::new(Side::Destination, what))));
                }
            }
            Action::Resolved(resolve, answer) => {
                tracing::warn!(?resolve, ?answer, "the operator resolves");
                if let Some(reply) = self.resolving.take() {
                    let _ = reply.send(answer);
                } else if let Err(why) = answer {
                    // It was obeyed, and came to nothing later.
                    let failure = Failure::new(Side::Destination, why);
                    shared
                        .status
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .failure = Some(failure);
                }
            }
            Action::ReportDeviceLost(device, failure) => {
                tracing::error!(%failure, "the guest runs without something");
                let migration = self.find(place)?;
                let named = migration.description.as_ref().and_then(|d| {
                    d.devices.get(usize::from(device.0)).map(|device| device.id.clone())
                });
                let id = named.unwrap_or_default();
                migration.lost_devices.push(format!("{id}: {failure}"));
            }
            Action::Finish(outcome) => self.finish(place, outcome, shared),
            // The brain counts the window itself; AwaitState carries nothing but StateEnd.
            Action::ArmWindow | Action::AwaitState(_) => {}
        }
        None
    }

    fn tell_device(&mut self, place: u64, device: DeviceIndex, command: DeviceCommand) {
        let Some(migration) = self.find(place) else { return };
        if let Some(thread) = migration.devices.get(usize::from(device.0)) {
            thread.tell(command);
        }
    }

    /// Before anything here can write memory that was handed over. This is the only guard where no source is there
    /// to ask.
    fn take_memory(&mut self, place: u64) -> Result<(), Failure> {
        let Some(migration) = self.find(place) else { return Ok(()) };
        let attempt = migration.brain.handover().attempt();
        match &migration.lease {
            Some(lease) if !lease.take(attempt) => {
                let what = "the source's guest ran on in its memory after it was handed over";
                Err(Failure::new(Side::Destination, what))
            }
            _ => Ok(()),
        }
    }

    fn give_memory(&mut self, place: u64) {
        let Some(migration) = self.find(place) else { return };
        let attempt = migration.brain.handover().attempt();
        if let Some(lease) = &migration.lease {
            lease.give(attempt);
        }
    }

    /// Compares Describe, and makes what loading needs when it fits. `None`: that takes a while, and is told by
    /// [`adopted`](Self::adopted).
    fn compare(
        &mut self,
        place: u64,
        body: &str,
    ) -> Option<Result<Vec<DeviceTraits>, Vec<String>>> {
        let traits = match self.try_compare(place, body) {
            Ok(traits) => traits,
            Err(mismatches) => return Some(Err(mismatches)),
        };
        let migration = self.find(place)?;
        let mut files = std::mem::take(&mut migration.files);
        if !migration.brain.handover().features().local {
            return Some(Ok(traits));
        }
        let lease = match files.pop().map(Lease::adopt) {
            Some(Ok(lease)) => lease,
            Some(Err(error)) => return Some(Err(vec![format!("lease: {error}")])),
            None => return Some(Err(vec!["no memory came with Describe".into()])),
        };
        (migration.lease, migration.adopting) = (Some(lease), true);
        migration.worker.as_ref()?.tell(WorkerCommand::Adopt(files, traits));
        None
    }

    fn adopted(
        &mut self,
        place: u64,
        traits: Vec<DeviceTraits>,
        answer: Result<Time, String>,
        shared: &Shared,
    ) {
        let Some(migration) = self.find(place) else { return };
        migration.adopting = false;
        migration.mapped_in = answer.as_ref().ok().copied();
        let compared = answer.map(|_| traits).map_err(|what| vec![format!("memory: {what}")]);
        self.feed(place, Event::Compared(compared), shared);
        if let Some(migration) = self.find(place) {
            tell_telemetry(migration, clock::now());
        }
    }

    fn try_compare(&mut self, place: u64, body: &str) -> Result<Vec<DeviceTraits>, Vec<String>> {
        let source: Description = serde_json::from_str(body)
            .map_err(|error| vec![format!("Describe cannot be read: {error}")])?;
        let here = Description::of(&*self.vmm, source.channels);
        let mut mismatches = source.mismatches(&here);
        if source.channels == 0 || source.channels > CHANNELS_MAX {
            let channels = source.channels;
            mismatches
                .push(format!("data channels: source {channels}, 1 to {CHANNELS_MAX} are taken"));
        }
        if !mismatches.is_empty() {
            return Err(mismatches);
        }
        self.prepare(place, source).map_err(|error| vec![format!("no thread: {error}")])
    }

    fn prepare(&mut self, place: u64, source: Description) -> std::io::Result<Vec<DeviceTraits>> {
        let (vmm, mailbox) = (Arc::clone(&self.vmm), self.mailbox.clone());
        let populate = self.config.populate;
        let here = vmm.devices();
        let Some(migration) = self.find(place) else { return Ok(Vec::new()) };
        let account = migration.account.clone();
        let mut traits = Vec::new();
        // In Describe's order: messages name devices by it.
        for (index, described) in (0u16..).zip(&source.devices) {
            let found = |device: &&Device| device.description.id == described.id;
            let Some(device) = here.iter().find(found) else { continue };
            let (vmm, mailbox) = (Arc::clone(&vmm), mailbox.clone());
            let index = DeviceIndex(index);
            let thread = DeviceThread::spawn(place, index, device, vmm, mailbox, account.clone())?;
            migration.devices.push(thread);
            let flags = described.migration_flags;
            traits.push(DeviceTraits { pre_copy: flags & 4 != 0, p2p: flags & 2 != 0 });
        }
        let ids = source.devices.iter().map(|device| device.id.clone()).collect();
        let devices = migration.devices.clone();
        let memory = vmm.memory();
        migration.worker = Some(Worker::spawn(place, vmm, devices, ids, mailbox, account.clone())?);
        // What was handed over is there.
        if !migration.brain.handover().features().local {
            let population = Arc::new(Population::new(memory, populate).counted(&account));
            migration.background = Some(population.start_for(&account)?);
            migration.population = Some(population);
        }
        migration.description = Some(source);
        Ok(traits)
    }

    fn finish(&mut self, place: u64, outcome: Outcome, shared: &Shared) {
        let (vmm, mailbox) = (Arc::clone(&self.vmm), self.mailbox.clone());
        let Some(migration) = self.find(place) else { return };
        if outcome == Outcome::Completed {
            tracing::info!(migration = %migration.id(), "the guest runs here");
            migration.release(&*vmm);
            return shared.end(Ok(()));
        }
        let failure = failure_of(&outcome);
        tracing::warn!(%failure, "an incoming migration came to nothing");
        shared.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner).failure =
            Some(failure);
        if !migration.finished {
            migration.abandon(vmm, mailbox);
            self.cleaning = Some(place);
        }
    }

    fn publish(&self, shared: &Shared) {
        let stopping = shared.stopping.load(Ordering::Acquire);
        let mut status = shared.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let current = self.migrations.last();
        let state = current.map(|m| m.brain.handover().state());
        let name = match state {
            _ if stopping && state != Some(State::Running) => "stopped",
            None | Some(State::Aborted) => "listening",
            Some(state) => state.name(),
        };
        if status.state != name {
            status.state = name.to_owned();
        }
        let Some(current) = current else { return };
        let IncomingStatus {
            migration,
            ram_bytes,
            populated_bytes,
            device_bytes,
            dropped_frames,
            ..
        } = &mut *status;
        *migration = Some(current.id().to_string());
        if !current.finished {
            *ram_bytes = current.ram_bytes();
            *populated_bytes = current.populated().0;
            *dropped_frames = current.devices.iter().map(|d| d.dropped_frames()).sum();
            *device_bytes = current.devices.iter().map(|d| d.loaded().bytes).collect();
        }
        status.lost_devices.clone_from(&current.lost_devices);
    }
}

/// The guest's first sign of life here completes the source's report.
fn tell_telemetry(migration: &mut Migration, now: Time) {
    let handover = migration.brain.handover();
    if let (State::Loading, Some(connection)) = (handover.state(), handover.connection()) {
        migration.telemetry_at = now;
        let telemetry = migration.telemetry();
        migration.send(connection, telemetry);
        if now.since(migration.cost_told_at) >= COST && !migration.timeline.is_open() {
            migration.cost_told_at = now;
            migration.send(connection, migration.account.message());
        }
    }
}

/// What was done here of the blackout, for the source's report; nothing on an answer that is only repeated.
fn tell_timeline(migration: &mut Migration, connection: Connection) {
    let spans = migration.timeline.take();
    let handover = migration.brain.handover();
    if !spans.is_empty() && handover.features().telemetry {
        let attempt = handover.attempt();
        // Before it: the source waits for the timeline.
        migration.send(connection, migration.account.message());
        migration.send(connection, Message::Timeline { attempt, boot_id: clock::boot_id(), spans });
    }
}

fn tell_heartbeat(migration: &mut Migration, vmm: &dyn Vmm) {
    let Some(first) = vmm.first_heartbeat_ns() else { return };
    migration.heartbeat_told = true;
    let Some(connection) = migration.brain.handover().connection() else { return };
    let mut telemetry = migration.telemetry_of(migration.call_times());
    if let Message::Telemetry { first_heartbeat_ns, boot_id, .. } = &mut telemetry {
        (*first_heartbeat_ns, *boot_id) = (Some(first), clock::boot_id());
    }
    migration.send(connection, telemetry);
}

fn failure_of(outcome: &Outcome) -> Failure {
    match outcome {
        Outcome::Failed(failure) => failure.clone(),
        _ => Failure::new(Side::Destination, "cancelled"),
    }
}

/// Says why a connection is not taken, and closes it.
fn refuse(stream: Stream, what: &str) {
    tracing::warn!(what, "a source was refused");
    let control = ControlSender::new(stream);
    let _ = control.send(Message::Refuse { reason: Failure::new(Side::Destination, what) });
    // Closing waits for a peer that reads slowly; the driver does not.
    let _ = std::thread::Builder::new().name("dst-refuse".into()).spawn(move || control.close());
}
