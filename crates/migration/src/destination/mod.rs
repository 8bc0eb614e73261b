//! The destination's body: performs what the brain decides.
//!
//! ```text
//!   listener ──▶ opening (one short thread each) ──▶ driver ──▶ control sender
//!   control readers ──────────────────────────────▶ driver ──▶ device threads ──▶ write()
//!   data receivers ──▶ guest memory                 driver ──▶ worker (machine state, vCPUs, hashes)
//!                  └─▶ device inboxes (bounded), sections
//! ```
//!
//! The listener lives as long as the VM: a source in doubt comes back and asks.

mod device;
mod driver;
mod incoming;
mod listener;
mod timeline;
mod worker;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use switchover::Time;
use switchover::destination::Event;
use switchover::handover::{DeviceTraits, Resolve};
use switchover::message::{Attempt, Connection, DeviceIndex, Failure, Message};

use crate::channel::{Address, Attach, ChannelError, Listener, Stream};
use crate::gate::Permit;
use crate::observer::{NoObserver, Observer};
use crate::ram::Populate;
use crate::vmm::Vmm;

/// Everything settable of an incoming migration.
#[derive(Clone)]
pub struct IncomingConfig {
    /// Where to listen.
    pub listen: Address,
    /// Where decisions are recorded; `None` = nowhere but in memory.
    pub state_dir: Option<PathBuf>,
    /// Records survive a crash of the host, not only of the process.
    pub durable: bool,
    /// Told of every phase.
    pub observer: Arc<dyn Observer>,
    /// How long a Commit is obeyed after Ready.
    pub window: Duration,
    /// The same where both sides hash everything in between.
    pub verify_window: Duration,
    /// Which memory is populated before it is written.
    pub populate: Populate,
}

impl IncomingConfig {
    /// Defaults, on `listen`.
    pub fn new(listen: Address) -> Self {
        Self {
            listen,
            state_dir: None,
            durable: false,
            observer: Arc::new(NoObserver),
            window: Duration::from_secs(5),
            verify_window: Duration::from_secs(600),
            populate: Populate::default(),
        }
    }
}

/// How an incoming migration stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IncomingStatus {
    /// `listening`, or the handover's state by its own name.
    pub state: String,
    /// The migration served now or last.
    pub migration: Option<String>,
    /// Why the last one came to nothing.
    pub failure: Option<Failure>,
    /// Bytes of RAM frames written to memory.
    pub ram_bytes: u64,
    /// Bytes of guest memory that are populated; `None` while no migration is under way.
    pub populated_bytes: Option<u64>,
    /// Bytes loaded into each device, by Describe's order.
    pub device_bytes: Vec<u64>,
    /// Frames of device streams that were over when they came.
    pub dropped_frames: u64,
    /// Devices that could not be started with the guest.
    pub lost_devices: Vec<String>,
}

/// What comes to the driver.
enum Input {
    /// A connection opened with Hello.
    Hello(Stream, Message),
    /// A data channel wants to attach.
    Attach(Stream, Attach),
    /// A message came on a control connection, at this time: the place of the migration it belongs to, the
    /// connection.
    Message(u64, Connection, Message, Time, Permit),
    /// Files came along with a Describe that follows.
    Files(u64, Vec<OwnedFd>),
    /// Memory that was handed over is mapped, here and for the devices, which took so long; the devices' traits
    /// are the answer to Describe.
    Adopted(u64, Vec<DeviceTraits>, Result<Time, String>),
    /// A control connection ended.
    LinkDown(u64, Connection, String),
    /// A data channel ended; `None` = in good order.
    DataEnded(u64, Option<String>),
    /// A data channel brought as much as StateEnd counted, or it is to be looked whether it has.
    ChannelArrived(u64),
    /// What an aborted migration left behind is cleaned up.
    Clean(u64),
    /// It could not be: memory that was handed over, or devices' mappings of it, are still here, for this reason.
    Unusable(String),
    /// More of a device's stream is loaded.
    Loaded(u64, DeviceIndex),
    /// For the brain of a migration.
    Event(u64, Event),
    /// The worker's hashes.
    Hashes(u64, Connection, Attempt, String, Vec<Option<String>>),
    /// An attempt that is rolled back is forgotten; its channels had brought so many bytes of RAM.
    Unloaded(u64, Result<u64, String>),
    /// The operator resolves what is left open, and hears whether that is obeyed.
    Resolve(Resolve, Sender<Result<(), String>>),
    /// The operator ends it.
    Cancel,
    /// The whole incoming side ends.
    Stop,
}

/// Where threads send their inputs.
type Mailbox = crate::mailbox::Mailbox<Input>;

#[derive(Default)]
struct Shared {
    status: Mutex<IncomingStatus>,
    outcome: Mutex<Option<Result<(), Failure>>>,
    ended: Condvar,
    stopping: AtomicBool,
}

impl Shared {
    fn end(&self, outcome: Result<(), Failure>) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(outcome);
        self.ended.notify_all();
    }
}

/// A VM that waits for a guest. One migration after another may fail; the first that completes makes
/// it the guest's home.
pub struct Incoming {
    mailbox: Mailbox,
    shared: Arc<Shared>,
    address: Address,
    listening: Mutex<Option<JoinHandle<()>>>,
}

impl Incoming {
    /// Listens and starts.
    ///
    /// # Errors
    /// [`ChannelError`] when the address cannot be listened on.
    pub fn start(vmm: Arc<dyn Vmm>, config: IncomingConfig) -> Result<Self, ChannelError> {
        let listener = Listener::bind(&config.listen)?;
        let address = listener.local_address().clone();
        let mailbox = Mailbox::new();
        let shared = Arc::new(Shared::default());
        let (accept_mailbox, accept_shared) = (mailbox.clone(), Arc::clone(&shared));
        let listening = spawn("dst-listener", &shared, move || {
            listener::run(&listener, &accept_mailbox, &accept_shared);
        });
        let incoming = Self {
            mailbox: mailbox.clone(),
            shared: Arc::clone(&shared),
            address,
            listening: Mutex::new(listening),
        };
        let driver_shared = Arc::clone(&shared);
        spawn("dst-driver", &shared, move || {
            driver::run(vmm, config, mailbox, driver_shared);
        });
        Ok(incoming)
    }

    /// Where it listens; a port that was 0 is the real one here.
    pub fn local_address(&self) -> Address {
        self.address.clone()
    }

    /// How it stands.
    pub fn status(&self) -> IncomingStatus {
        self.shared.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the migration under way, if it is not committed; listening goes on.
    pub fn cancel(&self) {
        self.mailbox.post(Input::Cancel);
    }

    /// Decides about a complete guest whose source is known to be dead: it runs here
    /// ([`Resolve::RunHere`]), or it is thrown away ([`Resolve::Discard`]). Refused once it is recorded that
    /// the guest never runs here.
    ///
    /// Whoever starts it must know that the source's guest does not run: a source that took the switchover
    /// back and ran on before it died leaves an older guest here.
    ///
    /// # Errors
    /// Why it is not obeyed.
    pub fn resolve(&self, resolve: Resolve) -> Result<(), String> {
        let (reply, answer) = channel();
        self.mailbox.post(Input::Resolve(resolve, reply));
        answer.recv().unwrap_or_else(|_| Err("the destination has ended".into()))
    }

    /// Waits until the guest runs here, or the incoming side is stopped.
    ///
    /// # Errors
    /// Why it will never run here.
    pub fn wait_running(&self) -> Result<(), Failure> {
        let mut outcome = self.shared.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self.shared.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The guest runs here.
    pub fn is_running(&self) -> bool {
        let outcome = self.shared.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(&*outcome, Some(Ok(())))
    }

    /// Ends listening and, where the guest does not run here, what is loaded. Nobody listens any more, and
    /// a socket is gone, when it returns.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.mailbox.post(Input::Stop);
        let listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = listening {
            let _ = thread.join();
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(
    name: &str,
    shared: &Shared,
    run: impl FnOnce() + Send + 'static,
) -> Option<JoinHandle<()>> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(run);
    let failed = |error: &std::io::Error| {
        let what = format!("no thread for {name}: {error}");
        shared.end(Err(Failure::new(switchover::message::Side::Destination, what)));
    };
    spawned.inspect_err(failed).ok()
}
