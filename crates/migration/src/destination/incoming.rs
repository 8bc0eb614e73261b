//! One incoming migration: its brain, and everything that exists because of it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use switchover::Time;
use switchover::destination::{Destination, State};
use switchover::message::{
    Attempt, ChannelEnd, Connection, DeviceEnd, DeviceIndex, DeviceTelemetry, Id, Message,
};

use super::device::DeviceThread;
use super::timeline::Timeline;
use super::worker::{Command as WorkerCommand, Worker};
use super::{Input, Mailbox};
use crate::channel::{
    Attach, ChannelError, ControlSender, DataReceiver, DataSink, DeviceFrame, ReceivedTotals,
    Stream, send_attach_ok, send_attach_refused,
};
use crate::cost::{Account, Held, Work};
use crate::describe::Description;
use crate::lease::Lease;
use crate::ram::{Background, Population};
use crate::vmm::{Section, Vmm, VmmError};

/// The most sections a machine state may have.
const SECTIONS_MAX: u32 = 4096;
/// The most memory that sections which wait to be applied may take, in bytes.
const SECTIONS_BYTES_MAX: usize = 128 << 20;
/// Control connections of one migration at a time.
const CONTROLS_MAX: usize = 8;
/// How long the data channels of an attempt that is rolled back may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// A data channel that is attached.
struct Channel {
    stream: Stream,
    totals: Arc<ReceivedTotals>,
    thread: JoinHandle<Result<(), ChannelError>>,
}

/// What StateEnd counted.
pub(super) struct Expected {
    pub(super) attempt: Attempt,
    channels: Vec<ChannelEnd>,
    devices: Vec<DeviceEnd>,
    sections: u32,
    channels_done: bool,
}

/// One incoming migration.
pub(super) struct Migration {
    /// Its number here; inputs of an earlier one never reach a later one.
    pub(super) place: u64,
    pub(super) brain: Destination,
    pub(super) source: Id,
    pub(super) controls: HashMap<Connection, ControlSender>,
    pub(super) description: Option<Description>,
    pub(super) devices: Vec<DeviceThread>,
    pub(super) worker: Option<Worker>,
    /// Memory that is populated ahead, by receivers and in the background.
    pub(super) population: Option<Arc<Population>>,
    pub(super) background: Option<Background>,
    /// Files that came along and nobody has looked at.
    pub(super) files: Vec<OwnedFd>,
    /// Memory was handed over: who may write it.
    pub(super) lease: Option<Lease>,
    /// It is just being mapped.
    pub(super) adopting: bool,
    /// How long that took.
    pub(super) mapped_in: Option<Time>,
    pub(super) expected: Option<Expected>,
    pub(super) lost_devices: Vec<String>,
    /// It is over for this side, one way or the other.
    pub(super) finished: bool,
    /// A data channel ended early; the control channel may say why in a moment.
    pub(super) data_lost: Option<(Time, String)>,
    pub(super) telemetry_at: Time,
    /// What the source was told to be loaded of each device, in bytes.
    telemetry_told: Vec<u64>,
    pub(super) heartbeat_told: bool,
    channels: BTreeMap<u16, Channel>,
    /// Those of an attempt that is rolled back, and who takes them in to their end.
    unloading: Option<(Vec<Stream>, JoinHandle<()>)>,
    /// By channels that are closed.
    ram_bytes_received: u64,
    sections: Arc<Mutex<Sections>>,
    /// Everything of the state has arrived: no data channel is taken any more.
    sealed: bool,
    pub(super) begun_at: Time,
    /// What is done here of the blackout.
    pub(super) timeline: Timeline,
    /// What it costs here.
    pub(super) account: Account,
    pub(super) cost_told_at: Time,
}

impl Migration {
    pub(super) fn new(place: u64, brain: Destination, source: Id) -> Self {
        let account = Account::default();
        let sections = Sections { held: Held::of(&account, 0), ..Sections::default() };
        Self {
            place,
            brain,
            source,
            controls: HashMap::new(),
            description: None,
            devices: Vec::new(),
            worker: None,
            population: None,
            background: None,
            files: Vec::new(),
            lease: None,
            adopting: false,
            mapped_in: None,
            expected: None,
            lost_devices: Vec::new(),
            finished: false,
            data_lost: None,
            telemetry_at: Time(0),
            telemetry_told: Vec::new(),
            heartbeat_told: false,
            channels: BTreeMap::new(),
            unloading: None,
            ram_bytes_received: 0,
            sections: Arc::new(Mutex::new(sections)),
            sealed: false,
            begun_at: crate::clock::now(),
            timeline: Timeline::new(),
            account,
            cost_told_at: Time(0),
        }
    }

    pub(super) fn id(&self) -> Id {
        self.brain.handover().migration()
    }

    /// Sends over `connection`, if it is still there.
    pub(super) fn send(&self, connection: Connection, message: Message) {
        let Some(control) = self.controls.get(&connection) else { return };
        if let Err(error) = control.send(message) {
            tracing::warn!(%error, "not sent");
            // A message less is a connection less: what comes later rests on it. Its reader tells the brain.
            control.abort();
        }
    }

    /// Why no control connection of this number is taken, if so. Ever newer ones only: an old number must
    /// not take the place of the connection that counts.
    pub(super) fn refuses_connection(&self, connection: Connection) -> Option<&'static str> {
        let newest = self.brain.handover().connection();
        if newest.is_some_and(|newest| newest >= connection) {
            return Some("a newer connection of this migration was there already");
        }
        (self.controls.len() >= CONTROLS_MAX).then_some("too many connections of this migration")
    }

    // --- data channels ------------------------------------------------------------------------

    /// Takes a data channel, or says why not.
    pub(super) fn attach(
        &mut self,
        mut stream: Stream,
        attach: &Attach,
        vmm: &dyn Vmm,
        mailbox: &Mailbox,
    ) {
        if let Err(why) = self.try_attach(&mut stream, attach, vmm, mailbox) {
            tracing::warn!(why, "a data channel was not taken");
            let _ = send_attach_refused(&mut stream, attach, &why);
            stream.shutdown();
        }
    }

    fn try_attach(
        &mut self,
        stream: &mut Stream,
        attach: &Attach,
        vmm: &dyn Vmm,
        mailbox: &Mailbox,
    ) -> Result<(), String> {
        let handover = self.brain.handover();
        let channels = self.description.as_ref().map_or(0, |d| d.channels);
        if attach.secret != handover.secret() {
            return Err("the secret is not this migration's".into());
        }
        if Some(attach.connection) != handover.connection() || self.finished {
            return Err("the connection it belongs to is over".into());
        }
        if handover.state() != State::Loading || !handover.takes_data() || self.sealed {
            return Err("nothing is being loaded here".into());
        }
        if attach.channel >= channels || self.channels.contains_key(&attach.channel) {
            return Err(format!("channel {} of {channels} is not awaited", attach.channel));
        }
        let clone = |stream: &Stream| stream.try_clone().map_err(|error| error.to_string());
        let mut receiver = DataReceiver::new(clone(stream)?, handover.features(), vmm.memory());
        if let Some(population) = &self.population {
            receiver = receiver.populating(Arc::clone(population));
        }
        let totals = receiver.totals();
        let place = self.place;
        let arrival = mailbox.clone();
        totals.on_arrival(move || arrival.send(Input::ChannelArrived(place)));
        let sections = Arc::clone(&self.sections);
        let (devices, mailbox) = (self.devices.clone(), mailbox.clone());
        let sink = Sink { devices, sections };
        send_attach_ok(stream, attach).map_err(|error| error.to_string())?;
        let account = self.account.clone();
        let run = move || {
            let _joined = account.join(Work::Data);
            let ended = receiver.run(&sink);
            let why = ended.as_ref().err().map(ToString::to_string);
            mailbox.post(Input::DataEnded(place, why));
            ended
        };
        let name = format!("dst-data{}", attach.channel);
        let thread = std::thread::Builder::new().name(name).spawn(run);
        let thread = thread.map_err(|error| format!("no thread for it: {error}"))?;
        let channel = Channel { stream: clone(stream)?, totals, thread };
        self.channels.insert(attach.channel, channel);
        Ok(())
    }

    /// Populating stands still while the guest does, which is while an attempt is under way.
    pub(super) fn pause_population(&self, paused: bool) {
        if let Some(background) = &self.background {
            background.pause(paused);
        }
    }

    pub(super) fn has_channels(&self) -> bool {
        !self.channels.is_empty()
    }

    pub(super) fn ram_bytes(&self) -> u64 {
        let open: u64 = self.channels.values().map(|channel| channel.totals.ram_bytes()).sum();
        open + self.ram_bytes_received
    }

    // --- the end of the state -----------------------------------------------------------------

    fn sections(&self) -> MutexGuard<'_, Sections> {
        self.sections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_sections(&self) {
        self.sections().clear();
    }

    pub(super) fn take_sections(&self) -> Vec<Section> {
        // Counted until the attempt is over: whoever applies them has them.
        std::mem::take(&mut self.sections().of_attempt).into_values().collect()
    }

    /// Watches for what StateEnd counted.
    ///
    /// # Errors
    /// When it counts what this migration does not have.
    pub(super) fn await_state(
        &mut self,
        attempt: Attempt,
        channels: &[ChannelEnd],
        devices: Vec<DeviceEnd>,
        sections: u32,
        mailbox: &Mailbox,
    ) -> Result<(), String> {
        if channels.len() != self.channels.len() || devices.len() != self.devices.len() {
            return Err(format!(
                "StateEnd counts {} data channels and {} devices, here are {} and {}",
                channels.len(),
                devices.len(),
                self.channels.len(),
                self.devices.len()
            ));
        }
        if self.expected.is_some() || self.sealed {
            return Err("StateEnd came twice".into());
        }
        // Each device once: one that is not counted would not be checked.
        if !(0u16..).zip(&devices).all(|(index, end)| end.device.0 == index) {
            return Err("StateEnd does not count every device once".into());
        }
        for (channel, end) in self.channels.values().zip(channels) {
            channel.totals.await_frames(end.frames);
        }
        let channels = channels.to_vec();
        self.expected =
            Some(Expected { attempt, channels, devices, sections, channels_done: false });
        // What was here before that is told by nobody.
        mailbox.leave(Input::ChannelArrived(self.place));
        Ok(())
    }

    /// Looks whether every channel brought exactly what StateEnd counted; answers true once that is so.
    ///
    /// # Errors
    /// The channel that brought something else.
    pub(super) fn channels_arrived(&mut self) -> Result<bool, String> {
        let Some(expected) = self.expected.as_mut().filter(|e| !e.channels_done) else {
            return Ok(false);
        };
        for (channel, end) in self.channels.values().zip(&expected.channels) {
            let arrived = channel.totals.end();
            if arrived.frames < end.frames {
                return Ok(false);
            }
            if arrived != *end {
                return Err(format!("a data channel brought {arrived:?}, StateEnd counts {end:?}"));
            }
        }
        expected.channels_done = true;
        Ok(true)
    }

    /// Whether exactly what StateEnd counted is here and loaded; `None` = not yet.
    ///
    /// # Errors
    /// What does not agree.
    pub(super) fn state_complete(&self) -> Result<Option<Attempt>, String> {
        let Some(expected) = self.expected.as_ref().filter(|e| e.channels_done) else {
            return Ok(None);
        };
        let sections = self.sections();
        let (arrived, of) = (sections.of_attempt.len() as u64, sections.attempt);
        drop(sections);
        // A machine without state has none that could name the attempt.
        let of_another = arrived > 0 && of != expected.attempt;
        if arrived != u64::from(expected.sections) || of_another {
            return Err(format!(
                "{arrived} sections of attempt {} arrived, StateEnd counts {} of attempt {}",
                of.0, expected.sections, expected.attempt.0
            ));
        }
        for end in &expected.devices {
            let Some(device) = self.devices.get(usize::from(end.device.0)) else {
                return Err(format!("StateEnd names device number {}", end.device.0));
            };
            let loaded = device.loaded();
            if loaded.bytes < end.bytes {
                return Ok(None);
            }
            if loaded.bytes != end.bytes || (end.bytes > 0 && loaded.checksum != end.checksum) {
                return Err(format!(
                    "device number {}: {} bytes with checksum {:08x} were loaded, {} with {:08x} sent",
                    end.device.0, loaded.bytes, loaded.checksum, end.bytes, end.checksum
                ));
            }
        }
        Ok(Some(expected.attempt))
    }

    /// A device has loaded everything that came, and the source was not told yet.
    pub(super) fn owes_telemetry(&self) -> bool {
        if self.brain.handover().state() != State::Loading {
            return false;
        }
        let told = self.telemetry_told.iter().copied().chain(std::iter::repeat(0));
        self.devices
            .iter()
            .zip(told)
            .any(|(thread, told)| thread.drained().is_some_and(|b| b != told))
    }

    /// What the devices' calls of the switchover took, for a source whose guest runs here.
    pub(super) fn call_times(&self) -> Vec<DeviceTelemetry> {
        let device = |(index, thread): (u16, &DeviceThread)| {
            let (loaded, calls) = (thread.loaded(), thread.call_times());
            DeviceTelemetry {
                device: DeviceIndex(index),
                loaded_bytes: loaded.bytes,
                load_ns: loaded.load_ns,
                validate_ns: calls.validate_ns,
                start_ns: calls.start_ns,
            }
        };
        (0u16..).zip(&self.devices).map(device).collect()
    }

    pub(super) fn telemetry(&mut self) -> Message {
        let device = |(index, thread): (u16, &DeviceThread)| {
            let loaded = thread.loaded();
            DeviceTelemetry {
                device: DeviceIndex(index),
                loaded_bytes: loaded.bytes,
                load_ns: loaded.load_ns,
                ..DeviceTelemetry::default()
            }
        };
        let devices: Vec<_> = (0u16..).zip(&self.devices).map(device).collect();
        self.telemetry_told = devices.iter().map(|device| device.loaded_bytes).collect();
        self.telemetry_of(devices)
    }

    /// What is measured of memory, with what is of `devices`.
    pub(super) fn telemetry_of(&self, devices: Vec<DeviceTelemetry>) -> Message {
        let (populated_bytes, populate_ns) = self.populated();
        let memory = self.description.as_ref().map_or(&[][..], |d| &d.machine.memory);
        let handed_over = memory.iter().map(|region| region.len).sum();
        Message::Telemetry {
            devices,
            ram_bytes: self.ram_bytes(),
            populated_bytes,
            populate_ns,
            mapped_bytes: self.mapped_in.map(|_| handed_over),
            map_ns: self.mapped_in.unwrap_or_default().0,
            first_heartbeat_ns: None,
            boot_id: None,
        }
    }

    /// Bytes of guest memory that are populated, and the time all threads spent on it in ns.
    pub(super) fn populated(&self) -> (Option<u64>, u64) {
        let population = self.population.as_ref();
        (population.map(|p| p.bytes()), population.map_or(0, |p| p.spent_ns()))
    }

    /// Everything of the state is here: whatever else a data channel brought would be written into the
    /// memory of a guest that is about to run.
    ///
    /// # Errors
    /// When one did bring more.
    pub(super) fn close_channels(&mut self) -> Result<(), String> {
        self.sealed = true;
        let channels: Vec<_> = std::mem::take(&mut self.channels).into_values().collect();
        for channel in &channels {
            channel.stream.shutdown();
        }
        // Receivers may wait for room in an inbox: that would be for ever.
        self.devices.iter().for_each(DeviceThread::seal);
        let taken = self.expected.take();
        let expected = taken.map(|expected| expected.channels.clone()).unwrap_or_default();
        let mut more = None;
        for (number, channel) in channels.into_iter().enumerate() {
            // Its thread ends by itself, and takes nothing in any more.
            channel.totals.seal();
            self.ram_bytes_received += channel.totals.ram_bytes();
            let arrived = channel.totals.end();
            if expected.get(number).is_some_and(|end| *end != arrived) {
                more = Some(format!("data channel {number} went on after the end of the state"));
            }
        }
        more.map_or(Ok(()), Err)
    }

    // --- rolling back -------------------------------------------------------------------------

    /// The attempt is rolled back. What its data channels still bring is taken in to their end, since pages of
    /// passes are among it, and device data is dropped; then everything of the attempt is forgotten. In a
    /// thread of its own, which answers with [`Input::Unloaded`].
    pub(super) fn unload(&mut self, mailbox: &Mailbox) -> std::io::Result<()> {
        let streams = self.channels.values().map(|channel| channel.stream.try_clone());
        let streams: Vec<_> = streams.collect::<Result<_, _>>()?;
        let channels: Vec<_> = std::mem::take(&mut self.channels).into_values().collect();
        (self.expected, self.data_lost, self.sealed) = (None, None, false);
        self.forget_sections();
        for (index, device) in (0u16..).zip(&self.devices) {
            device.end_streams(self.brain.handover().session(DeviceIndex(index)));
        }
        let (reply, done) = std::sync::mpsc::channel();
        if let Some(worker) = &self.worker {
            worker.tell(WorkerCommand::GiveUp(reply));
        }
        let (place, mailbox, devices) = (self.place, mailbox.clone(), self.devices.clone());
        let population = self.population.clone();
        let run = move || {
            let drained: Result<Vec<u64>, String> = channels.into_iter().map(drain).collect();
            // The worker may be in the middle of loading machine state.
            let _ = done.recv();
            // Whoever loads that may write memory, and so may a device that was started.
            if let Some(population) = population {
                population.look_again();
            }
            devices.iter().for_each(DeviceThread::unseal);
            let answer = drained.map(|bytes| bytes.iter().sum());
            mailbox.send(Input::Unloaded(place, answer));
        };
        let spawned = std::thread::Builder::new().name("dst-unload".into()).spawn(run);
        let thread = spawned.inspect_err(|_| streams.iter().for_each(Stream::shutdown))?;
        self.unloading = Some((streams, thread));
        Ok(())
    }

    pub(super) fn unloaded(&mut self, ram_bytes: u64) {
        self.unloading = None;
        self.ram_bytes_received += ram_bytes;
        self.forget_sections();
    }

    // --- the end of it all --------------------------------------------------------------------

    /// The guest runs here: nothing is loaded any more, control connections go on for questions.
    pub(super) fn release(&mut self, vmm: &dyn Vmm) {
        self.finished = true;
        vmm.memory().keep();
        self.account.close();
        if let Some(background) = self.background.take() {
            background.detach();
        }
        self.devices.iter().for_each(DeviceThread::close);
        let _ = self.close_channels();
        self.devices.clear();
        self.worker = None;
        self.forget_sections();
    }

    /// Nothing of it will run here: ends its threads, resets the devices and empties memory, in a
    /// thread of its own, since a device call that hangs must not hold anything else.
    pub(super) fn abandon(&mut self, vmm: Arc<dyn Vmm>, mailbox: Mailbox) {
        let place = self.place;
        let channels: Vec<_> = std::mem::take(&mut self.channels).into_values().collect();
        let devices = std::mem::take(&mut self.devices);
        self.finished = true;
        let worker = self.worker.take();
        let unloading = self.unloading.take();
        let background = self.background.take();
        self.expected = None;
        self.forget_sections();
        let clean = mailbox.clone();
        let run = move || {
            // Ends populating, as soon as the thread gets to run.
            drop(background);
            // Receivers first: they write to guest memory.
            for channel in &channels {
                channel.stream.shutdown();
            }
            // Also those of an attempt that is just being rolled back.
            if let Some((streams, thread)) = unloading {
                streams.iter().for_each(Stream::shutdown);
                devices.iter().for_each(DeviceThread::seal);
                let _ = thread.join();
            }
            // Then everybody who works on devices and the VM; a call under way is waited for.
            devices.iter().for_each(DeviceThread::close);
            devices.iter().for_each(DeviceThread::wait_ended);
            for channel in channels {
                let _ = channel.thread.join();
            }
            if let Some(worker) = worker {
                worker.end();
            }
            devices.iter().for_each(|device| device.reset_device(&*vmm));
            if let Err(error) = give_back(&*vmm) {
                tracing::error!(%error, "the memory of a guest elsewhere was not given back");
                return clean.send(Input::Unusable(error.to_string()));
            }
            if let Err(error) = vmm.discard_memory() {
                tracing::error!(%error, "the memory of an aborted migration was not discarded");
            }
            clean.send(Input::Clean(place));
        };
        if let Err(error) = std::thread::Builder::new().name("dst-cleanup".into()).spawn(run) {
            // Then it stays as it is, and nothing else can be loaded.
            tracing::error!(%error, "no thread to clean up an aborted migration");
        }
    }
}

/// The memory of a guest that stays where it is must not be discarded with what is this VM's.
fn give_back(vmm: &dyn Vmm) -> Result<(), VmmError> {
    match vmm.memory().give_back()? {
        true => vmm.memory_replaced(),
        false => Ok(()),
    }
}

/// Takes a channel in to its end, which the source has set; answers with the bytes of RAM it brought.
fn drain(channel: Channel) -> Result<u64, String> {
    let deadline = std::time::Instant::now() + DRAIN_LIMIT;
    while !channel.thread.is_finished() {
        if std::time::Instant::now() >= deadline {
            channel.stream.shutdown();
            let _ = channel.thread.join();
            return Err("a data channel did not end after the roll-back".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let ended = channel.thread.join().map_err(|_| "a data channel's thread broke off")?;
    match ended {
        // The source closed it in the middle of what belonged to the attempt.
        Ok(()) | Err(ChannelError::Truncated { .. }) => Ok(channel.totals.ram_bytes()),
        Err(error) => Err(error.to_string()),
    }
}

/// What a section takes of memory; one without bytes takes something too.
fn section_cost(section: &Section) -> usize {
    section.payload.len() + section.name.len() + section.kind.len() + size_of::<Section>()
}

/// Where a data channel's frames go.
struct Sink {
    devices: Vec<DeviceThread>,
    sections: Arc<Mutex<Sections>>,
}

/// Sections of the machine state that wait to be applied. Kept by the channels themselves: who counted the
/// frame that brought one finds it here.
#[derive(Default)]
struct Sections {
    attempt: Attempt,
    of_attempt: BTreeMap<u32, Section>,
    bytes: usize,
    held: Held,
}

impl Sections {
    fn clear(&mut self) {
        (self.attempt, self.bytes) = (Attempt::default(), 0);
        self.of_attempt.clear();
        self.held.set(0);
    }

    /// Those of an earlier attempt are forgotten.
    fn insert(&mut self, attempt: Attempt, index: u32, section: Section) -> Result<(), String> {
        if attempt != self.attempt {
            self.clear();
            self.attempt = attempt;
        }
        self.bytes += section_cost(&section);
        if self.bytes > SECTIONS_BYTES_MAX {
            return Err(format!("sections of more than {SECTIONS_BYTES_MAX} bytes in all"));
        }
        if let Some(before) = self.of_attempt.insert(index, section) {
            self.bytes -= section_cost(&before);
        }
        self.held.set(self.bytes as u64);
        Ok(())
    }
}

impl DataSink for Sink {
    fn device(&self, frame: DeviceFrame) -> Result<(), ChannelError> {
        let device = frame.device.0;
        let Some(thread) = self.devices.get(usize::from(device)) else {
            let what =
                format!("a frame is for device number {device}, which Describe did not name");
            return Err(ChannelError::sink(what));
        };
        if thread.push(frame) { Ok(()) } else { Err(ChannelError::sink("the migration is over")) }
    }

    fn section(&self, attempt: Attempt, index: u32, section: Section) -> Result<(), ChannelError> {
        if index >= SECTIONS_MAX {
            let what = format!("section number {index}, at most {SECTIONS_MAX} are taken");
            return Err(ChannelError::sink(what));
        }
        let mut sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        sections.insert(attempt, index, section).map_err(ChannelError::sink)
    }
}
