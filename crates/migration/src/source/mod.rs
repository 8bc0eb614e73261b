//! The source's body: performs what the brain decides.
//!
//! ```text
//!            control reader ─┐                      ┌─▶ control sender
//!   device threads (1 each) ─┼─▶ driver: brain.handle ─▶ device threads ──┐
//!   memory and vCPU worker  ─┤        (this thread)  └─▶ worker ──────────┼─▶ data channel
//!   Outgoing::cancel, …     ─┘                                            ┘
//! ```
//!
//! The driver never blocks on a device, the network or the VMM: whatever may take time has a thread
//! of its own and answers with an event.

mod blackout;
mod device;
mod driver;
mod journal;
mod link;
mod recover;
mod spread;
mod worker;

use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use switchover::Time;
use switchover::handover::Resolve;
use switchover::message::{Attempt, Connection, DeviceEnd, DeviceIndex, Features, Message};
use switchover::source::Event;

use crate::channel::{Address, ControlSender, DataSender};
use crate::gate::Permit;
use crate::observer::{NoObserver, Observer};
use crate::ram::Codec;
use crate::record::Record;
use crate::report::{DeviceReport, Progress, Report};
use crate::vmm::{GuestEvent, Vmm};
use device::StreamBytes;

/// Switches that make a migration wrong on purpose, for negative controls: verification must then say
/// *not identical*.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// The devices' DMA logs are not read.
    pub ignore_dma_log: bool,
    /// The VMM's own writes are not tracked.
    pub ignore_vmm_writes: bool,
}

/// Everything settable of an outgoing migration.
#[derive(Clone)]
pub struct OutgoingConfig {
    /// Where the destination listens.
    pub destination: Address,
    /// Limits and intervals of the brain, the downtime limit among them.
    pub brain: switchover::source::Config,
    /// What is known beforehand of hosts and devices, the latter by their ids.
    pub knowledge: switchover::estimate::Knowledge,
    /// Where what migrations teach is kept (see [`history`](crate::history)); `None` = nowhere.
    pub history: Option<PathBuf>,
    /// Where a trace of this migration is written when it is over (see [`trace`](crate::trace)); `None` =
    /// nowhere.
    pub trace: Option<PathBuf>,
    /// Hash memory and devices on both sides between Ready and Commit; a difference ends the migration.
    pub verify: bool,
    /// Stop after the comparison.
    pub dry_run: bool,
    /// Hand the guest's memory over instead of sending it: to another process of this host, over a UNIX socket. A
    /// destination that cannot take it ends the migration.
    pub local: bool,
    /// Checksums over RAM payloads too.
    pub ram_checksum: bool,
    /// How memory is compressed where both sides can and it pays; `None` = never.
    pub compression: Option<Codec>,
    /// Number of data channels, 1 to [`CHANNELS_MAX`](crate::describe::CHANNELS_MAX); `None`: by cores, devices and link.
    pub channels: Option<u16>,
    /// The most bytes per second on all data channels together while the guest runs; 0 = no limit. While it stands
    /// still nothing is limited.
    pub max_bandwidth_bytes_per_s: u64,
    /// What the link carries while the guest stands still, as the operator knows it; `None`: as measured, which under
    /// a limit of the bandwidth is at most that.
    pub avail_switchover_bandwidth_bytes_per_s: Option<u64>,
    /// Where decisions are recorded; `None` = nowhere but in memory.
    pub state_dir: Option<PathBuf>,
    /// Records survive a crash of the host, not only of the process.
    pub durable: bool,
    /// Told of every phase.
    pub observer: Arc<dyn Observer>,
    /// Negative controls.
    pub controls: Controls,
    /// Limit of a connection's set-up.
    pub connect_limit: Duration,
}

impl OutgoingConfig {
    /// Defaults, to `destination`.
    pub fn new(destination: Address) -> Self {
        Self {
            destination,
            brain: switchover::source::Config::default(),
            knowledge: Default::default(),
            history: None,
            trace: None,
            verify: false,
            dry_run: false,
            local: false,
            ram_checksum: false,
            compression: None,
            channels: None,
            max_bandwidth_bytes_per_s: 0,
            avail_switchover_bandwidth_bytes_per_s: None,
            state_dir: None,
            durable: false,
            observer: Arc::new(NoObserver),
            controls: Controls::default(),
            connect_limit: Duration::from_secs(10),
        }
    }

    fn features(&self) -> Features {
        Features {
            verify: self.verify,
            ram_checksum: self.ram_checksum,
            device_checksum: true,
            telemetry: true,
            lz4: self.compression == Some(Codec::Lz4),
            zstd: self.compression == Some(Codec::Zstd),
            local: self.local,
            echo: true,
        }
    }
}

/// How a migration that an earlier process left in doubt is settled.
#[derive(Clone, Debug)]
pub struct RecoverConfig {
    /// Where its record is, and the decision is written.
    pub state_dir: PathBuf,
    /// Records survive a crash of the host, not only of the process.
    pub durable: bool,
    /// Limit of connecting.
    pub connect_limit: Duration,
}

/// What comes to the driver.
enum Input {
    /// For the brain.
    Event(Event),
    /// A connection is up.
    Connected(Connection, ControlSender),
    /// It could not be made.
    NotConnected(String),
    /// A message came, at this time.
    Message(Connection, Message, Time, Permit),
    /// A control connection ended.
    LinkDown(Connection, String),
    /// Data channels are attached.
    Attached(Result<Vec<DataSender>, String>),
    /// A data channel failed.
    DataLinkDown(String),
    /// A device's stream ended.
    StreamEnd(DeviceEnd),
    /// What a stream carried so far.
    StreamBytes(DeviceIndex, StreamBytes),
    /// So many sections make the machine state.
    Sections(u32),
    /// The hash of all memory here, for this attempt; and as it was when the guest and its devices had just
    /// stopped, where the destination has the same memory mapped.
    MemoryDigest(Attempt, [u8; 32], Option<[u8; 32]>),
    /// The digests of all devices here, for this attempt.
    DeviceDigests(Attempt, Vec<Option<[u8; 32]>>),
    /// The guest did something.
    Guest(GuestEvent),
    /// The operator wants the guest to stay.
    Cancel,
    /// The operator wants the switchover under way to be taken back.
    TakeBack,
    /// The operator resolves doubt, and hears whether that is obeyed.
    Resolve(Resolve, Sender<Result<(), String>>),
    /// The operator sets the limit.
    Limit(Time),
    /// The operator sets the limit of the bandwidth, in bytes per second.
    Bandwidth(u64),
}

/// Held by every thread of a migration; when the last one is dropped, all of them have ended.
type Alive = Sender<()>;

/// Where threads send their inputs.
type Mailbox = crate::mailbox::Mailbox<Input>;

/// What both sides of an [`Outgoing`] look at.
#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    report: Mutex<Option<Report>>,
    ended: Condvar,
}

/// Whoever waits for the report gets one, also from a driver that panicked.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        let mut report = self.0.report.lock().unwrap_or_else(PoisonError::into_inner);
        if report.is_none() {
            *report = Some(Report::not_started("the migration's driver broke off".into()));
            self.0.ended.notify_all();
        }
    }
}

/// A migration from here to somewhere else. Dropping it neither ends nor cancels the migration.
pub struct Outgoing {
    mailbox: Mailbox,
    shared: Arc<Shared>,
}

impl Outgoing {
    /// Starts; everything that goes wrong is in the report.
    pub fn start(vmm: Arc<dyn Vmm>, config: OutgoingConfig) -> Self {
        let mailbox = Mailbox::new();
        let shared = Arc::new(Shared::before(&*vmm, &config));
        let (thread_mailbox, thread_shared) = (mailbox.clone(), Arc::clone(&shared));
        let run = move || {
            let _ended = Ended(Arc::clone(&thread_shared));
            driver::run(vmm, config, thread_mailbox, &thread_shared);
        };
        if let Err(error) = std::thread::Builder::new().name("src-driver".into()).spawn(run) {
            shared.end(Report::not_started(format!("no thread for the migration: {error}")));
        }
        Self { mailbox, shared }
    }

    /// Goes on with a migration that an earlier process left in doubt
    /// ([`RecordStore::in_doubt`](crate::record::RecordStore::in_doubt)). Its guest died with that process:
    /// this only hears what the destination decided, or is told by [`resolve`](Self::resolve), and records
    /// it. The report says `completed` when the guest runs there, `abandoned`, or `failed`.
    pub fn recover(record: Record, config: RecoverConfig) -> Self {
        let mailbox = Mailbox::new();
        let shared = Arc::new(Shared::default());
        let (thread_mailbox, thread_shared) = (mailbox.clone(), Arc::clone(&shared));
        let run = move || {
            let _ended = Ended(Arc::clone(&thread_shared));
            recover::run(record, config, thread_mailbox, &thread_shared);
        };
        if let Err(error) = std::thread::Builder::new().name("src-recover".into()).spawn(run) {
            shared.end(Report::not_started(format!("no thread for the migration: {error}")));
        }
        Self { mailbox, shared }
    }

    /// How it stands.
    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for the guest to stay here. Accepted in every state before Commit.
    pub fn cancel(&self) {
        self.mailbox.post(Input::Cancel);
    }

    /// Takes a switchover under way back: the guest runs on here, and the migration tries again later. Nothing
    /// happens where none is under way, or where it is committed.
    pub fn take_back(&self) {
        self.mailbox.post(Input::TakeBack);
    }

    /// Decides what a source in doubt cannot: the guest runs here ([`Resolve::RunHere`]; refused until the
    /// destination's window is surely over, unless forced), or it is given up ([`Resolve::Discard`]).
    ///
    /// Whoever resumes the guest here must know that it does not run at the destination: it may have obeyed
    /// the Commit whose answer was lost.
    ///
    /// # Errors
    /// Why it is not obeyed.
    pub fn resolve(&self, resolve: Resolve) -> Result<(), String> {
        let (reply, answer) = channel();
        self.mailbox.post(Input::Resolve(resolve, reply));
        answer.recv().unwrap_or_else(|_| Err("the migration is over".into()))
    }

    /// Changes the downtime limit while the migration runs.
    pub fn set_downtime_limit(&self, limit: Duration) {
        let ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.mailbox.post(Input::Limit(Time(ns)));
    }

    /// Changes the limit of the bandwidth while the migration runs, in bytes per second; 0 = no limit.
    pub fn set_max_bandwidth(&self, bytes_per_s: u64) {
        self.mailbox.send(Input::Bandwidth(bytes_per_s));
    }

    /// The report, once it is over.
    pub fn report(&self) -> Option<Report> {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the end.
    pub fn wait(&self) -> Report {
        let mut report = self.shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(report) = &*report {
                return report.clone();
            }
            report = self.shared.ended.wait(report).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    /// What is known before anything happened.
    fn before(vmm: &dyn Vmm, config: &OutgoingConfig) -> Self {
        let device = |device: crate::Device| DeviceReport {
            id: device.description.id,
            ..DeviceReport::default()
        };
        let progress = Progress {
            status: "setup".into(),
            state: "setup".into(),
            devices: vmm.devices().into_iter().map(device).collect(),
            downtime_limit_ms: config.brain.downtime_limit.as_ms(),
            ..Progress::default()
        };
        Self { progress: Mutex::new(progress), ..Self::default() }
    }

    fn end(&self, report: Report) {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
        self.ended.notify_all();
    }
}
