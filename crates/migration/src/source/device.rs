//! The thread that owns one device on the source: calls, reads and DMA reports, one at a time, and
//! commands before the next chunk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use switchover::Time;
use switchover::handover::{DeviceCall, DeviceState};
use switchover::message::{DeviceEnd, DeviceIndex, Failure, Session, Side};
use switchover::source::{Event, Info};
use vfio_migration::{DeviceCapabilities, DmaRange, PrecopyInfo, ReadOutcome};

use super::{Alive, Input, Mailbox};
use crate::bitmap::{Completeness, DirtyBitmap};
use crate::calls::OwnedDevice;
use crate::channel::{DataClass, DataSender, StreamChecksum};
use crate::clock;
use crate::cost::{Account, Held, Work};
use crate::memory::{PAGE_SIZE, RegionLayout};
use crate::vmm::{Device, Vmm};

/// Bytes asked of the device at once. Drivers copy page by page under one mutex; larger reads bring
/// nothing (reference: 128 MB and 1 GB reads gained nothing over 1 MiB).
const READ_BYTES: usize = 1 << 20;

/// What the owning thread is told.
pub(super) enum Command {
    Call(DeviceCall),
    /// The data channel is attached.
    Attach(DataSender),
    /// Frames from now on belong to this stream, from offset 0.
    BeginStream(Session),
    Read,
    StopReading,
    StartDmaLog {
        layout: Vec<RegionLayout>,
        reply: Sender<Result<(), Failure>>,
    },
    ReportDmaLog {
        bitmap: Box<DirtyBitmap>,
        reply: Sender<DmaReport>,
    },
    StopDmaLog,
    /// The guest reset the device: its log may have gone, and what it held with it.
    RestartDmaLog(Vec<RegionLayout>),
    Digest(Sender<Result<Option<[u8; 32]>, Failure>>),
}

/// A device's share of a sync.
pub(super) struct DmaReport {
    pub(super) bitmap: Box<DirtyBitmap>,
    pub(super) completeness: Completeness,
    /// Writes were not logged, or their log was lost, some time since the last report that was taken: all
    /// memory must be sent once more, whatever later reports say (L9).
    pub(super) lossy: bool,
}

/// What the stream carried, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamBytes {
    pub(super) initial: u64,
    pub(super) dirty: u64,
    pub(super) stop_copy: u64,
}

/// The owning thread, from outside. It ends when the last handle is dropped and its current call
/// returns; a call that hangs is not waited for.
#[derive(Clone)]
pub(super) struct DeviceThread {
    commands: Sender<Command>,
    /// A RestartDmaLog waits: a guest that resets its device all day needs no second one.
    restarting: Arc<AtomicBool>,
}

impl DeviceThread {
    pub(super) fn spawn(
        index: DeviceIndex,
        device: &Device,
        vmm: Arc<dyn Vmm>,
        mailbox: Mailbox,
        account: Account,
        alive: Alive,
    ) -> std::io::Result<Self> {
        let owned = OwnedDevice::new(Side::Source, device);
        let (commands, inbox) = channel();
        let restarting = Arc::new(AtomicBool::new(false));
        let restart = Arc::clone(&restarting);
        let name = format!("src-{}", owned.id);
        std::thread::Builder::new().name(name).spawn(move || {
            let _alive = alive;
            let _joined = account.join(Work::Devices);
            let capabilities = owned.lock().capabilities();
            Owner {
                index,
                capabilities,
                owned,
                vmm,
                mailbox,
                inbox,
                channel: None,
                reading: false,
                unnamed: false,
                stop_copy: false,
                ended: false,
                restarting: restart,
                lossy: false,
                initial_left: 0,
                stream: Session(0),
                offset: 0,
                checksum: StreamChecksum::default(),
                bytes: StreamBytes::default(),
                log_page_size: None,
                buffer: Vec::new(),
                held: Held::default(),
                unreported: Unreported::default(),
            }
            .run();
        })?;
        Ok(Self { commands, restarting })
    }

    /// Tells the thread; it may be gone only when it is being dropped.
    pub(super) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    pub(super) fn restart_dma_log(&self, layout: Vec<RegionLayout>) {
        if !self.restarting.swap(true, Ordering::AcqRel) {
            self.tell(Command::RestartDmaLog(layout));
        }
    }
}

struct Owner {
    index: DeviceIndex,
    capabilities: DeviceCapabilities,
    owned: OwnedDevice,
    vmm: Arc<dyn Vmm>,
    mailbox: Mailbox,
    inbox: Receiver<Command>,
    channel: Option<DataSender>,
    reading: bool,
    /// RUNNING was entered since the last stream began: whatever session follows has no name yet.
    unnamed: bool,
    stop_copy: bool,
    /// STOP_COPY was read to its end; a Read that comes late finds nothing to do.
    ended: bool,
    restarting: Arc<AtomicBool>,
    /// See [`DmaReport::lossy`].
    lossy: bool,
    /// Bytes still counted as initial: the source's bookkeeping, no statement of the device.
    initial_left: u64,
    stream: Session,
    offset: u64,
    checksum: StreamChecksum,
    bytes: StreamBytes,
    log_page_size: Option<u64>,
    buffer: Vec<u8>,
    /// What the buffer takes.
    held: Held,
    unreported: Unreported,
}

/// Progress that was not told yet: the brain sees counters at 1 kHz at the most, edges at once.
#[derive(Default)]
struct Unreported {
    bytes: u64,
    read: Time,
    since: Time,
}

const PROGRESS_INTERVAL: Time = Time::from_ms(1);

impl Owner {
    fn run(mut self) {
        loop {
            let command = if self.reading {
                match self.inbox.try_recv() {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                }
            } else {
                match self.inbox.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                }
            };
            match command {
                Some(command) => self.obey(command),
                None => self.read_chunk(),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Call(DeviceCall::Info) => self.info(),
            Command::Call(call) => self.call(call),
            Command::Attach(channel) => self.channel = Some(channel),
            Command::BeginStream(session) => {
                (self.stream, self.offset) = (session, 0);
                self.checksum = StreamChecksum::default();
                self.initial_left = u64::MAX;
                (self.reading, self.ended, self.unnamed) = (false, false, false);
            }
            Command::Read => self.reading = !self.ended && !self.unnamed,
            Command::StopReading => self.reading = false,
            Command::StartDmaLog { layout, reply } => {
                let _ = reply.send(self.start_dma_log(&layout));
            }
            Command::ReportDmaLog { bitmap, reply } => {
                let report = self.report_dma_log(bitmap);
                // Nobody waits for it any more: what it held is lost.
                self.lossy = reply.send(report).is_err();
            }
            Command::StopDmaLog => self.stop_dma_log(),
            Command::RestartDmaLog(layout) => {
                self.restarting.store(false, Ordering::Release);
                self.restart_dma_log(&layout);
            }
            Command::Digest(reply) => {
                let digest = self.owned.lock().state_digest();
                let _ = reply.send(digest.map_err(|error| self.owned.failure(&error)));
            }
        }
    }

    fn call(&mut self, call: DeviceCall) {
        let begin = clock::now();
        let result = match call {
            DeviceCall::SetState(target) => {
                let result = self.owned.set_state(target);
                self.stop_copy = target == DeviceState::StopCopy;
                self.ended = false;
                // A session that begins here is read once its stream has a name, and not before: its first
                // bytes would go out under the name of the last one.
                if target == DeviceState::Running {
                    (self.reading, self.unnamed) = (false, true);
                }
                result
            }
            DeviceCall::Reset => {
                (self.reading, self.unnamed) = (false, true);
                self.owned.reset(&*self.vmm)
            }
            DeviceCall::Info => return,
        };
        let took = clock::now().since(begin);
        self.tell(Event::CallDone { device: self.index, call, result, took });
    }

    fn info(&mut self) {
        self.report_progress(true);
        let begin = clock::now();
        let mut device = self.owned.lock();
        let info = if self.capabilities.precopy_info {
            match device.precopy_info() {
                Ok(info) => Some(info),
                Err(error) => {
                    tracing::debug!(device = self.owned.id, %error, "PRECOPY_INFO");
                    None
                }
            }
        } else {
            None
        };
        let size = self.capabilities.data_size.then(|| device.stop_copy_length().ok()).flatten();
        drop(device);
        if let Some(info) = info {
            self.initial_left = info.initial_bytes();
        }
        let info = info.map_or(Info::Unknown, |info: PrecopyInfo| Info::Known {
            initial_bytes: info.initial_bytes(),
            dirty_bytes: info.dirty_bytes(),
            reinit: info.reinit(),
        });
        let took = clock::now().since(begin);
        tracing::debug!(device = self.owned.id, ?info, ?size, offset = self.offset, %took, "asked");
        self.tell(Event::Info {
            device: self.index,
            info,
            stop_copy_bytes: size,
            offset: self.offset,
            took,
        });
    }

    fn read_chunk(&mut self) {
        if self.buffer.len() != READ_BYTES {
            self.buffer.resize(READ_BYTES, 0);
            self.held = Held::new(READ_BYTES as u64);
        }
        let begin = clock::now();
        let outcome = self.owned.lock().read_ahead(&mut self.buffer);
        let read = clock::now().since(begin);
        match outcome {
            Ok(ReadOutcome::Data(length)) => self.send_chunk(length.min(self.buffer.len()), read),
            Ok(ReadOutcome::NothingNow) => {
                self.report_progress(true);
                self.reading = false;
                self.initial_left = 0;
                self.tell(Event::NothingNow { device: self.index, offset: self.offset });
            }
            Ok(ReadOutcome::End) => {
                self.report_progress(true);
                (self.reading, self.ended) = (false, true);
                let end = DeviceEnd {
                    device: self.index,
                    bytes: self.offset,
                    checksum: self.checksum.value(),
                };
                self.mailbox.leave(Input::StreamEnd(end));
                self.tell(Event::StreamEnded { device: self.index });
            }
            Err(error) => self.read_failed(&error),
        }
    }

    fn read_failed(&mut self, error: &vfio_migration::DeviceError) {
        self.reading = false;
        // A stream that died because the guest reset the device is no failure: it begins anew.
        // ERROR is no such reset.
        let state = self.owned.lock().state();
        let reset = |state: vfio_migration::DeviceState| {
            !state.is_saving() && state != vfio_migration::DeviceState::Error
        };
        if state.is_ok_and(reset) {
            return self.tell(Event::DeviceReset(self.index));
        }
        self.tell(Event::Fail(self.owned.failure(error)));
    }

    fn send_chunk(&mut self, length: usize, read: Time) {
        let Some(channel) = &self.channel else {
            self.reading = false;
            let what = "data was read before a data channel was attached";
            return self.tell(Event::Fail(Failure::new(Side::Source, what)));
        };
        let bytes = length as u64;
        let class = if self.stop_copy {
            self.bytes.stop_copy += bytes;
            DataClass::StopCopy
        } else if self.initial_left > 0 {
            self.bytes.initial += bytes;
            DataClass::Initial
        } else {
            self.bytes.dirty += bytes;
            DataClass::Dirty
        };
        self.initial_left = self.initial_left.saturating_sub(bytes);
        let data = &self.buffer[..length];
        match channel.send_device(self.index, self.stream, class, self.offset, data) {
            Ok(checksum) => self.checksum.push(data, checksum),
            Err(error) => {
                self.reading = false;
                return self.mailbox.post(Input::DataLinkDown(error.to_string()));
            }
        }
        self.offset += bytes;
        self.unreported.bytes += bytes;
        self.unreported.read = self.unreported.read + read;
        if clock::now().since(self.unreported.since) >= PROGRESS_INTERVAL {
            self.report_progress(false);
        }
    }

    fn report_progress(&mut self, edge: bool) {
        let Unreported { bytes, read, .. } = std::mem::replace(
            &mut self.unreported,
            Unreported { since: clock::now(), ..Unreported::default() },
        );
        if bytes > 0 {
            self.mailbox.leave(Input::StreamBytes(self.index, self.bytes));
            let progress = Input::Event(Event::Progress { device: self.index, bytes, read });
            // An edge follows, and whoever acts on it takes this along; else this thread reads on.
            if edge { self.mailbox.leave(progress) } else { self.mailbox.post(progress) }
        }
    }

    // --- DMA logging --------------------------------------------------------------------------

    fn start_dma_log(&mut self, layout: &[RegionLayout]) -> Result<(), Failure> {
        if !self.capabilities.dma_logging {
            return Ok(());
        }
        let ranges: Vec<DmaRange> =
            layout.iter().map(|r| DmaRange { iova: r.gpa, length: r.len }).collect();
        let mut device = self.owned.lock();
        let started = match device.start_dma_logging(&ranges, PAGE_SIZE) {
            // One that an earlier migration could not stop: a second START is refused (L4).
            Err(_) if device.stop_dma_logging().is_ok() => {
                device.start_dma_logging(&ranges, PAGE_SIZE)
            }
            started => started,
        };
        drop(device);
        self.log_page_size = Some(started.map_err(|error| self.owned.failure(&error))?);
        Ok(())
    }

    fn stop_dma_log(&mut self) {
        if self.log_page_size.take().is_some()
            && let Err(error) = self.owned.lock().stop_dma_logging()
        {
            tracing::warn!(device = self.owned.id, %error, "DMA logging not stopped");
        }
    }

    /// Until the new log is there nothing is logged, and what the old one held is gone.
    fn restart_dma_log(&mut self, layout: &[RegionLayout]) {
        self.stop_dma_log();
        if let Err(failure) = self.start_dma_log(layout) {
            tracing::warn!(%failure, "no DMA log any more: at the end all memory is dirty");
        }
        self.lossy = true;
    }

    fn report_dma_log(&mut self, mut bitmap: Box<DirtyBitmap>) -> DmaReport {
        // Without a log every mapped page may have been written (L12).
        let mut completeness = match self.log_page_size {
            Some(_) => Completeness::Complete,
            None => Completeness::Incomplete,
        };
        let mut failed = false;
        if self.log_page_size.is_some() {
            let mut device = self.owned.lock();
            for (index, region) in bitmap.layout().to_vec().iter().enumerate() {
                let range = DmaRange { iova: region.gpa, length: region.len };
                // Reports are asked in our page size: devices repeat bits of a coarser log (L7).
                if let Err(error) =
                    device.report_dma_log(range, PAGE_SIZE, bitmap.region_mut(index))
                {
                    tracing::warn!(device = self.owned.id, %error, "DMA log: all memory is dirty");
                    completeness = Completeness::Incomplete;
                    failed = true;
                    break;
                }
            }
        }
        if failed {
            // The log is corrupt from here on, also where later reports succeed (L9).
            self.restart_dma_log(bitmap.layout());
        }
        DmaReport { bitmap, completeness, lossy: std::mem::take(&mut self.lossy) }
    }

    fn tell(&self, event: Event) {
        self.mailbox.send(Input::Event(event));
    }
}
