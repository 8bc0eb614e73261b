//! The thread that works on memory and vCPUs on the source: syncs, passes, pause, machine state.
//!
//! Dirty pages are the union of four sources: the VMM's trackers of its vCPUs, the devices' DMA logs,
//! the VMM's own writes, and `pending`, pages that were collected and not sent. A source that cannot
//! name all its pages makes all memory dirty.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use switchover::Time;
use switchover::message::{Attempt, DeviceIndex, Failure, Side};
use switchover::source::{Answer, Event, Sync};

use super::device::{Command as DeviceCommand, DeviceThread, DmaReport};
use super::{Alive, Controls, Input, Mailbox};
use crate::bitmap::{Completeness, DirtyBitmap};
use crate::channel::DataSender;
use crate::clock;
use crate::cost::{Account, Held, Work};
use crate::hash::memory_digest;
use crate::lease::Lease;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::ram::{RamError, RamPass};
use crate::vmm::{DirtyClearer, DirtyTracker, Vmm, VmmError};

/// How long a device may take to report its DMA log before all memory is taken as dirty.
const DMA_REPORT_LIMIT: Duration = Duration::from_secs(5);

/// What the worker is told, in the order it does it.
pub(super) enum Command {
    Attach(Vec<DataSender>),
    StartTracking,
    StopTracking,
    SyncPass,
    SendPass,
    Sync(Sync),
    RestoreDirty,
    SendFinalRam,
    Pause,
    Resume,
    SetThrottle(u8),
    SaveMachineState(Attempt),
    Reattach,
    /// The guest reset a device: its log may have gone with it.
    DeviceReset(DeviceIndex),
    Verify(Attempt),
    /// Memory that was handed over is the destination's for good.
    LetGo,
}

/// What becomes of guest memory.
pub(super) enum Memory {
    /// Its pages are sent.
    Sent,
    /// Its files were handed over: the pages are there whatever is written, so nothing is tracked or sent.
    HandedOver {
        /// Who may write it.
        lease: Arc<Lease>,
        /// It is hashed as soon as nobody writes it any more.
        verify: bool,
    },
}

/// What was counted; read by reports while the worker goes on.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) normal_pages: AtomicU64,
    pub(super) zero_pages: AtomicU64,
    pub(super) packed_pages: AtomicU64,
    pub(super) packed_bytes: AtomicU64,
    /// Pages found dirty: all of memory at first, then what each sync added to what was still to be sent.
    pub(super) dirtied_pages: AtomicU64,
    pub(super) wire_bytes: AtomicU64,
    /// Time spent in passes.
    pub(super) send_ns: AtomicU64,
    pub(super) syncs: AtomicU64,
    /// Pages of the current pass already looked at.
    pub(super) pass_pages: AtomicU64,
    /// How long the worker's last step took: a pause, or the last memory.
    step_ns: AtomicU64,
}

impl Counters {
    /// How long the step that was just told of took.
    pub(super) fn step(&self) -> Time {
        Time(self.step_ns.load(Ordering::Relaxed))
    }
}

/// The worker, from outside.
pub(super) struct Worker {
    commands: Sender<Command>,
    pub(super) counters: Arc<Counters>,
    cancel: Arc<AtomicBool>,
}

impl Worker {
    pub(super) fn spawn(
        vmm: Arc<dyn Vmm>,
        devices: Vec<DeviceThread>,
        mailbox: Mailbox,
        controls: Controls,
        goes: Memory,
        account: Account,
        alive: Alive,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let counters = Arc::new(Counters::default());
        let cancel = Arc::new(AtomicBool::new(false));
        let layout = vmm.memory().layout();
        let (pending, in_attempt) = (DirtyBitmap::new(&layout), DirtyBitmap::new(&layout));
        let hands = Hands {
            memory: vmm.memory(),
            _held: Held::of(&account, pending.bytes() + in_attempt.bytes()),
            pending,
            in_attempt,
            dma_logs: devices.iter().map(|_| DmaLog::default()).collect(),
            vmm,
            devices,
            mailbox,
            controls,
            goes,
            stood_still: None,
            trackers: Vec::new(),
            clearers: Vec::new(),
            pass: None,
            tracking: false,
            throttled: false,
            channels: Vec::new(),
            counters: Arc::clone(&counters),
            cancel: Arc::clone(&cancel),
        };
        std::thread::Builder::new().name("src-memory".into()).spawn(move || {
            let _alive = alive;
            let _joined = account.join(Work::Data);
            hands.run(&inbox);
        })?;
        Ok(Self { commands, counters, cancel })
    }

    pub(super) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Passes may be sent again, over new channels.
    pub(super) fn allow_passes(&self) {
        self.cancel.store(false, Ordering::Release);
    }

    /// A pass under way ends at the next frame.
    pub(super) fn cancel_pass(&self) {
        self.cancel.store(true, Ordering::Release);
    }
}

/// A device's DMA log as it is asked for: one bitmap goes there and comes back.
#[derive(Default)]
struct DmaLog {
    bitmap: Option<Box<DirtyBitmap>>,
    /// The bitmap is on its way.
    answer: Option<Receiver<DmaReport>>,
    /// The answer is to the sync under way, not one that an earlier sync did not wait for.
    due: bool,
    held: Held,
}

impl DmaLog {
    /// A report is here: answers whether it says that pages may be missing.
    fn take(&mut self, report: DmaReport, into: &mut DirtyBitmap) -> (Completeness, bool) {
        into.union(&report.bitmap);
        (self.bitmap, self.answer) = (Some(report.bitmap), None);
        (report.completeness, report.lossy)
    }

    /// Asks, unless the device still has what it was asked last; answers whether nothing of that was lost.
    fn ask(&mut self, device: &DeviceThread, into: &mut DirtyBitmap) -> bool {
        let mut whole = true;
        self.due = false;
        match self.answer.as_ref().map(Receiver::try_recv) {
            // Late, and not lost.
            Some(Ok(report)) => whole = !self.take(report, into).1,
            Some(Err(TryRecvError::Empty)) => return false,
            Some(Err(TryRecvError::Disconnected)) | None => {}
        }
        let mut bitmap = self.bitmap.take().unwrap_or_else(|| {
            let bitmap = Box::new(DirtyBitmap::new(into.layout()));
            self.held = Held::new(bitmap.bytes());
            bitmap
        });
        bitmap.clear();
        let (reply, answer) = channel();
        device.tell(DeviceCommand::ReportDmaLog { bitmap, reply });
        (self.answer, self.due) = (Some(answer), true);
        whole
    }
}

struct Hands {
    vmm: Arc<dyn Vmm>,
    memory: Arc<GuestMemory>,
    devices: Vec<DeviceThread>,
    /// Of each device.
    dma_logs: Vec<DmaLog>,
    mailbox: Mailbox,
    controls: Controls,
    goes: Memory,
    /// The digest of memory that was handed over, when guest and devices had just stopped.
    stood_still: Option<[u8; 32]>,
    trackers: Vec<Box<dyn DirtyTracker>>,
    /// Those of them that forget what they reported only when it is sent.
    clearers: Vec<Arc<dyn DirtyClearer>>,
    /// The last pass since the last sync: when it began and ended.
    pass: Option<(Time, Time)>,
    tracking: bool,
    /// The vCPUs are slowed down.
    throttled: bool,
    channels: Vec<DataSender>,
    /// Pages that were collected and not sent.
    pending: DirtyBitmap,
    /// Pages sent as the last memory of the attempt, for a roll-back.
    in_attempt: DirtyBitmap,
    /// What both take.
    _held: Held,
    counters: Arc<Counters>,
    cancel: Arc<AtomicBool>,
}

impl Hands {
    fn run(mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            self.obey(command);
        }
        // The migration is over, however it ended: nothing is tracked or slowed down any more.
        self.stop_tracking();
        if self.throttled {
            let _ = self.set_throttle(0);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach(channels) => self.channels = channels,
            Command::StartTracking => {
                let answer = self.start_tracking();
                self.tell(Event::TrackingStarted(answer));
            }
            Command::StopTracking => self.stop_tracking(),
            Command::SyncPass => {
                let answer = self.collect(false);
                let exposed = self.exposed();
                self.tell(Event::PassSynced { dirty_bytes: self.dirty_bytes(), exposed, answer });
            }
            Command::SendPass => {
                if let Some(answer) = self.send(true) {
                    self.tell(Event::PassSent(answer));
                }
            }
            Command::Sync(sync) => {
                let begin = clock::now();
                if sync == Sync::Provisional && self.sends_memory() {
                    self.in_attempt.clear();
                }
                let answer = self.collect(true);
                let took = clock::now().since(begin);
                let dirty_bytes = self.dirty_bytes();
                self.tell(Event::Synced { sync, dirty_bytes, took, answer });
            }
            // What was collected and not sent is still in `pending`, and what passes sent arrives: the
            // destination takes in what is under way. Of what belonged to the attempt nothing counts.
            Command::RestoreDirty if !self.sends_memory() => {}
            Command::RestoreDirty => {
                self.pending.union(&self.in_attempt);
                self.in_attempt.clear();
            }
            Command::SendFinalRam => {
                let begin = clock::now();
                let answer = match self.goes {
                    Memory::Sent => {
                        self.in_attempt.union(&self.pending);
                        // Nobody writes any more, and the ways back take these pages as dirty anyway.
                        self.send(false)
                    }
                    Memory::HandedOver { verify, .. } => {
                        self.stood_still = verify.then(|| memory_digest(&self.memory));
                        Some(Ok(()))
                    }
                };
                if let Some(answer) = answer {
                    self.step_took(begin);
                    self.tell(Event::RamSent(answer));
                }
            }
            Command::Pause => {
                let begin = clock::now();
                let answer = self.vmm_answer(self.vmm.pause(), "pausing the vCPUs");
                self.step_took(begin);
                self.tell(Event::Paused(answer));
            }
            Command::Resume => {
                let answer = match &self.goes {
                    Memory::HandedOver { lease, .. } if !lease.reclaim() => {
                        let what =
                            "the destination has taken the guest's memory: it is not resumed here";
                        Err(Failure::new(Side::Source, what))
                    }
                    _ => self.vmm_answer(self.vmm.resume(), "resuming the vCPUs"),
                };
                self.tell(Event::Resumed(answer));
            }
            Command::SetThrottle(percent) => {
                let answer = self.set_throttle(percent);
                self.tell(Event::Throttled(answer));
            }
            Command::SaveMachineState(attempt) => self.save_machine_state(attempt),
            Command::Reattach => {
                // All of it, whatever fails on the way.
                let resources = self.vmm.outside_resources();
                let taken = resources.iter().map(|r| r.take_back()).fold(Ok(()), Result::and);
                let answer = taken.and(self.vmm.reattach());
                let answer = self.vmm_answer(answer, "attaching interrupts again");
                self.tell(Event::Reattached(answer));
            }
            Command::DeviceReset(device) => self.device_reset(device),
            Command::Verify(attempt) => {
                let (now, before) = (memory_digest(&self.memory), self.stood_still.take());
                self.mailbox.send(Input::MemoryDigest(attempt, now, before));
            }
            Command::LetGo => {
                let gone = self.memory.let_go().map_err(VmmError::from);
                // A destination's guest and this process's devices must not share memory.
                if let Err(error) = gone.and_then(|()| self.vmm.memory_replaced()) {
                    tracing::error!(%error, "the guest's memory is still mapped here");
                }
            }
        }
    }

    // --- dirty pages --------------------------------------------------------------------------

    /// Every source starts before the first page or hole is looked at.
    fn start_tracking(&mut self) -> Answer {
        if !self.sends_memory() {
            return Ok(());
        }
        self.tracking = true;
        self.memory.set_tracking(!self.controls.ignore_vmm_writes);
        let trackers = self.vmm.dirty_trackers();
        self.trackers = self.vmm_answer(trackers, "dirty tracking")?;
        self.clearers = self.trackers.iter_mut().filter_map(|tracker| tracker.defer()).collect();
        for tracker in &mut self.trackers {
            let started = tracker.start();
            started.map_err(|error| vmm_failure(error, tracker.name()))?;
        }
        if !self.controls.ignore_dma_log {
            let layout = self.memory.layout();
            let mut replies = Vec::new();
            for device in &self.devices {
                let (reply, answer) = channel();
                device.tell(DeviceCommand::StartDmaLog { layout: layout.clone(), reply });
                replies.push(answer);
            }
            for answer in replies {
                let silent = || Failure::new(Side::Source, "a device did not start DMA logging");
                answer.recv_timeout(DMA_REPORT_LIMIT).map_err(|_| silent())??;
            }
        }
        self.pending.set_all();
        self.counters.dirtied_pages.fetch_add(self.pending.count(), Ordering::Relaxed);
        Ok(())
    }

    fn stop_tracking(&mut self) {
        if !std::mem::take(&mut self.tracking) {
            return;
        }
        self.memory.set_tracking(false);
        self.clearers.clear();
        for mut tracker in self.trackers.drain(..) {
            if let Err(error) = tracker.stop() {
                tracing::warn!(tracker = tracker.name(), %error, "dirty tracking not stopped");
            }
        }
        for device in &self.devices {
            device.tell(DeviceCommand::StopDmaLog);
        }
    }

    fn sends_memory(&self) -> bool {
        matches!(self.goes, Memory::Sent)
    }

    /// Collects all sources into `pending`. While the guest runs (`stopped` false) a device without a
    /// log is only counted: sending everything again before the end would gain nothing.
    fn collect(&mut self, stopped: bool) -> Answer {
        if !self.sends_memory() {
            return Ok(());
        }
        self.counters.syncs.fetch_add(1, Ordering::Relaxed);
        let before = self.pending.count();
        let mut complete = self.ask_devices();
        for tracker in &mut self.trackers {
            match tracker.collect(&mut self.pending) {
                Ok(Completeness::Complete) => {}
                Ok(Completeness::Incomplete) => complete = false,
                Err(error) => return Err(vmm_failure(error, tracker.name())),
            }
        }
        self.memory.take_dirty(&mut self.pending);
        let mut unlogged = false;
        for log in self.dma_logs.iter_mut().filter(|log| log.due) {
            match log.answer.as_ref().map(|answer| answer.recv_timeout(DMA_REPORT_LIMIT)) {
                Some(Ok(report)) => {
                    let (completeness, lossy) = log.take(report, &mut self.pending);
                    unlogged |= completeness == Completeness::Incomplete;
                    complete &= !lossy;
                }
                // Its pages are in what comes late; until then the device is not asked again.
                Some(Err(_)) => complete = false,
                None => {}
            }
        }
        if !complete || (unlogged && stopped) {
            self.pending.set_all();
        }
        let added = self.pending.count().saturating_sub(before);
        self.counters.dirtied_pages.fetch_add(added, Ordering::Relaxed);
        Ok(())
    }

    /// What the device wrote and had not reported may be lost with its log: logging starts anew, and the
    /// next report says that all memory is dirty. Not earlier: until then nothing is logged.
    fn device_reset(&mut self, index: DeviceIndex) {
        if !self.tracking || self.controls.ignore_dma_log {
            return;
        }
        if let Some(device) = self.devices.get(usize::from(index.0)) {
            device.restart_dma_log(self.memory.layout());
        }
    }

    /// Answers whether all could be asked, and nothing was lost before.
    fn ask_devices(&mut self) -> bool {
        if self.controls.ignore_dma_log {
            return true;
        }
        let logs = self.dma_logs.iter_mut().zip(&self.devices);
        logs.fold(true, |whole, (log, device)| log.ask(device, &mut self.pending) & whole)
    }

    fn dirty_bytes(&self) -> u64 {
        if !self.sends_memory() {
            return 0;
        }
        self.pending.count() * PAGE_SIZE
    }

    /// How long a page could be written, on average, before the sync that just was: since it was forgotten, which
    /// was when it was sent. `None`: since the sync before.
    fn exposed(&mut self) -> Option<Time> {
        let (began, ended) = self.pass.take().filter(|_| !self.clearers.is_empty())?;
        let sent = Time(began.0 + ended.since(began).0 / 2);
        Some(clock::now().since(sent))
    }

    /// Sends `pending` and empties it, of a guest that `runs` or stands still; what could not be sent stays. `None` when a data channel broke: that
    /// ends the migration by the driver, which may learn a better reason first.
    fn send(&mut self, runs: bool) -> Option<Answer> {
        if !self.sends_memory() {
            return Some(Ok(()));
        }
        self.counters.pass_pages.store(0, Ordering::Relaxed);
        let begin = clock::now();
        let progress = &self.counters.pass_pages;
        let pass = RamPass {
            memory: &self.memory,
            dirty: &self.pending,
            channels: &self.channels,
            clearers: if runs { &self.clearers } else { &[] },
            cancel: &self.cancel,
            progress,
        };
        match pass.send() {
            Ok(stats) => {
                self.pass = Some((begin, clock::now()));
                self.pending.clear();
                let add = |counter: &AtomicU64, value| counter.fetch_add(value, Ordering::Relaxed);
                add(&self.counters.normal_pages, stats.normal_pages);
                add(&self.counters.zero_pages, stats.zero_pages);
                add(&self.counters.packed_pages, stats.packed_pages);
                add(&self.counters.packed_bytes, stats.packed_bytes);
                add(&self.counters.wire_bytes, stats.wire_bytes);
                add(&self.counters.send_ns, clock::now().since(begin).0);
                Some(Ok(()))
            }
            Err(RamError::Cancelled { .. }) => {
                Some(Err(Failure::new(Side::Source, "sending memory was cancelled")))
            }
            Err(RamError::Tracker(error)) => Some(Err(vmm_failure(error, "dirty tracking"))),
            Err(error) => {
                self.mailbox.post(Input::DataLinkDown(error.to_string()));
                None
            }
        }
    }

    fn set_throttle(&mut self, percent: u8) -> Answer {
        let set = self.vmm.set_cpu_throttle(percent);
        if let Err(error) = &set {
            tracing::warn!(percent, %error, "the vCPUs are not throttled");
        }
        self.throttled = percent > 0 && set.is_ok();
        self.vmm_answer(set, "throttling the vCPUs")
    }

    // --- machine state ------------------------------------------------------------------------

    fn save_machine_state(&mut self, attempt: Attempt) {
        let begin = clock::now();
        let answer = match self.try_save_machine_state(attempt) {
            Ok(true) => Ok(()),
            Ok(false) => return,
            Err(failure) => Err(failure),
        };
        self.tell(Event::MachineStateSaved { took: clock::now().since(begin), answer });
    }

    /// Answers whether all of it was sent; the link that broke otherwise is told of by itself.
    fn try_save_machine_state(&mut self, attempt: Attempt) -> Result<bool, Failure> {
        let sections =
            self.vmm_answer(self.vmm.save_machine_state(), "saving the machine state")?;
        let released = self.vmm.outside_resources().iter().try_for_each(|r| r.release());
        self.vmm_answer(released, "releasing what the guest holds outside")?;
        let Some(channel) = self.channels.first() else {
            return Err(Failure::new(Side::Source, "no data channel is attached"));
        };
        self.mailbox.leave(Input::Sections(sections.len() as u32));
        for (index, section) in (0u32..).zip(&sections) {
            if let Err(error) = channel.send_section(attempt, index, section) {
                let what = format!("sending state section {}: {error}", section.name);
                self.mailbox.post(Input::DataLinkDown(what));
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn vmm_answer<T>(&self, result: Result<T, VmmError>, doing: &str) -> Result<T, Failure> {
        result.map_err(|error| vmm_failure(error, doing))
    }

    fn step_took(&self, begin: Time) {
        self.counters.step_ns.store(clock::now().since(begin).0, Ordering::Relaxed);
    }

    fn tell(&self, event: Event) {
        self.mailbox.send(Input::Event(event));
    }
}

fn vmm_failure(error: VmmError, doing: &str) -> Failure {
    let mut failure = Failure::new(Side::Source, error.what);
    failure.call = Some(doing.to_owned());
    failure.errno = error.errno;
    failure
}
