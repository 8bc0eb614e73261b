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

mod device;
mod driver;
mod journal;
mod link;
mod worker;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use switchover::Time;
use switchover::message::{Connection, DeviceEnd, DeviceIndex, Features, Message};
use switchover::source::Event;

use crate::channel::{Address, ControlSender, DataSender};
use crate::clock;
use crate::gate::Permit;
use crate::observer::{NoObserver, Observer};
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
    /// Hash memory and devices on both sides between Ready and Commit; a difference ends the migration.
    pub verify: bool,
    /// Stop after the comparison.
    pub dry_run: bool,
    /// Checksums over RAM payloads too.
    pub ram_checksum: bool,
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
            verify: false,
            dry_run: false,
            ram_checksum: false,
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
        }
    }
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
    /// The hash of all memory here.
    MemoryDigest([u8; 32]),
    /// The digests of all devices here.
    DeviceDigests(Vec<Option<[u8; 32]>>),
    /// The guest did something.
    Guest(GuestEvent),
    /// The operator wants the guest to stay.
    Cancel,
    /// The operator sets the limit.
    Limit(Time),
}

/// Held by every thread of a migration; when the last one is dropped, all of them have ended.
type Alive = Sender<()>;

/// Where threads send their inputs.
#[derive(Clone)]
struct Mailbox(Sender<(Input, Time)>);

impl Mailbox {
    fn new() -> (Self, Receiver<(Input, Time)>) {
        let (sender, receiver) = channel();
        (Self(sender), receiver)
    }

    /// A driver that has gone needs nothing more.
    fn send(&self, input: Input) {
        let _ = self.0.send((input, clock::now()));
    }
}

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
        let (mailbox, inputs) = Mailbox::new();
        let shared = Arc::new(Shared::before(&*vmm, &config));
        let (thread_mailbox, thread_shared) = (mailbox.clone(), Arc::clone(&shared));
        let run = move || {
            let _ended = Ended(Arc::clone(&thread_shared));
            driver::run(vmm, config, thread_mailbox, &inputs, &thread_shared);
        };
        if let Err(error) = std::thread::Builder::new().name("src-driver".into()).spawn(run) {
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
        self.mailbox.send(Input::Cancel);
    }

    /// Changes the downtime limit while the migration runs.
    pub fn set_downtime_limit(&self, limit: Duration) {
        let ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.mailbox.send(Input::Limit(Time(ns)));
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
