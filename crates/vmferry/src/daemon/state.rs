//! What a daemon is doing, and what it shows of it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use microvm::vm::Lifecycle;
use microvm::{DirtyTracking, GuestKind, RingCounters, Vm};
use migration::destination::{Incoming, IncomingStatus};
use migration::report::{Progress, Report};
use migration::source::{Outgoing, OutgoingConfig};
use migration::{GuestEvent, Vmm};
use serde::Serialize;
use serde_json::{Value, json};
use switchover::handover::Resolve;
use switchover::message::Failure;
use vfio_kernel::InCall;

use super::gate::{Gate, Held};
use crate::api::ApiError;
use crate::cli::RunArgs;

/// What a daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The guest is about to run: its memory is being filled.
    Starting,
    /// It waits for a guest, or one is arriving.
    Incoming,
    /// The guest runs here.
    Running,
    /// The guest runs here, or stands still for the switchover, and is on its way elsewhere.
    Migrating,
    /// The guest runs elsewhere.
    Migrated,
    /// The guest powered off or died.
    Ended,
}

/// `status`, as the control socket gives it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    state: State,
    guest: &'static str,
    memory_bytes: u64,
    vcpus: u32,
    dirty_tracking: &'static str,
    /// Where that is by rings.
    dirty_ring: Option<DirtyRingView>,
    pid: u32,
    devices: Vec<DeviceStatus>,
    /// How the guest ended.
    ended: Option<String>,
    /// The outgoing migration under way or the last one.
    migration: Option<Progress>,
    /// Why the last migration, whichever way it went, came to nothing.
    failure: Option<Failure>,
    incoming: Option<IncomingView>,
    held: Option<Held>,
    phases: Vec<Held>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DeviceStatus {
    id: String,
    /// Who implements it, as on the command line.
    backend: String,
    /// How a device of the kernel was opened.
    opened: Option<String>,
    /// The call that has been under way longest on a device of the kernel.
    in_call: Option<CallView>,
    /// Why its server is gone.
    lost: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DirtyRingView {
    harvested: u64,
    full_exits: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CallView {
    call: &'static str,
    for_ms: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct IncomingView {
    listen: String,
    #[serde(flatten)]
    status: IncomingStatus,
}

/// A VM and what it takes part in.
pub struct Daemon {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Where migrations are held.
    pub gate: Arc<Gate>,
    /// Stay after the guest has moved away.
    pub keep: bool,
    incoming: Option<Arc<Incoming>>,
    incoming_outcome: Arc<Mutex<Option<Failure>>>,
    outgoing: Mutex<Option<Arc<Outgoing>>>,
    state_dir: Option<PathBuf>,
    durable: bool,
    quit: AtomicBool,
    report_taken: AtomicBool,
}

impl Daemon {
    /// The daemon of `vm`.
    pub fn new(vm: Arc<Vm>, gate: Arc<Gate>, incoming: Option<Incoming>, args: &RunArgs) -> Self {
        let incoming = incoming.map(Arc::new);
        let incoming_outcome = Arc::default();
        if let Some(incoming) = &incoming {
            watch(Arc::clone(incoming), Arc::clone(&incoming_outcome));
        }
        Self {
            vm,
            gate,
            incoming,
            incoming_outcome,
            outgoing: Mutex::default(),
            state_dir: args.state_dir.clone(),
            durable: args.durable,
            keep: args.keep,
            quit: AtomicBool::new(false),
            report_taken: AtomicBool::new(false),
        }
    }

    /// The incoming side, where there is one.
    pub fn incoming(&self) -> Option<&Incoming> {
        self.incoming.as_deref()
    }

    /// Why the incoming side ended without a guest.
    pub fn incoming_outcome(&self) -> Option<Failure> {
        locked(&self.incoming_outcome).clone()
    }

    /// `kvm` or `process`.
    pub fn guest_name(&self) -> &'static str {
        guest_name(self.vm.config().guest)
    }

    /// `log`, `ring`, or `pagemap-scan` of a process guest.
    fn dirty_tracking(&self) -> &'static str {
        let config = self.vm.config();
        match (config.guest, config.dirty_tracking) {
            (GuestKind::Process, _) => "pagemap-scan",
            (GuestKind::Kvm, DirtyTracking::Log) => "log",
            (GuestKind::Kvm, DirtyTracking::Ring(_)) => "ring",
        }
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        if let Some(outgoing) = self.outgoing() {
            match outgoing.report() {
                None => return State::Migrating,
                // Given up by the operator, it is gone from here as well.
                Some(report) if is_gone(&report) => return State::Migrated,
                Some(_) => {}
            }
        }
        if self.incoming.as_ref().is_some_and(|incoming| !incoming.is_running()) {
            return State::Incoming;
        }
        let status = self.vm.status();
        match status.ended {
            Some(GuestEvent::PowerOff | GuestEvent::Crashed { .. }) => State::Ended,
            _ if status.lifecycle == Lifecycle::New => State::Starting,
            _ => State::Running,
        }
    }

    /// Everything there is to see.
    pub fn status(&self) -> Status {
        let vm = self.vm.status();
        let config = self.vm.config();
        let lost = |id: &str| vm.lost_devices.iter().find(|(lost, _)| lost == id);
        let kernel = |id: &str| self.vm.kernel_device(id);
        let in_call = |id: &str| {
            let InCall { call, for_ms } = kernel(id)?.in_call()?;
            Some(CallView { call, for_ms })
        };
        let devices = config.devices.iter().map(|device| DeviceStatus {
            id: device.id.clone(),
            backend: device.backend.to_string(),
            opened: kernel(&device.id).map(|kernel| kernel.opened().to_string()),
            in_call: in_call(&device.id),
            lost: lost(&device.id).map(|(_, why)| why.clone()),
        });
        let outgoing = self.outgoing();
        let incoming = self.incoming.as_ref().map(|incoming| IncomingView {
            listen: incoming.local_address().to_string(),
            status: incoming.status(),
        });
        let failure = outgoing.as_ref().and_then(|outgoing| outgoing.report()?.failure);
        // What came to nothing before the guest arrived is over.
        let waiting = self.incoming.as_ref().is_some_and(|incoming| !incoming.is_running());
        let incoming_failure = incoming.as_ref().filter(|_| waiting);
        let incoming_failure = incoming_failure.and_then(|view| view.status.failure.clone());
        Status {
            state: self.state(),
            guest: self.guest_name(),
            memory_bytes: config.memory_bytes,
            vcpus: config.vcpus,
            dirty_tracking: self.dirty_tracking(),
            dirty_ring: self.vm.ring_counters().map(|counters| {
                let RingCounters { harvested, full_exits } = counters;
                DirtyRingView { harvested, full_exits }
            }),
            pid: std::process::id(),
            devices: devices.collect(),
            ended: vm.ended.map(|event| match event {
                GuestEvent::PowerOff => "power-off".into(),
                GuestEvent::Reset => "reset".into(),
                GuestEvent::Crashed { reason } => reason,
                GuestEvent::DeviceReset { id } => format!("reset of device {id}"),
            }),
            migration: outgoing.map(|outgoing| outgoing.progress()),
            failure: failure.or(incoming_failure),
            incoming,
            held: self.gate.held(),
            phases: self.gate.history(),
        }
    }

    /// Starts a migration to elsewhere.
    pub fn migrate(&self, config: OutgoingConfig) -> Result<(), ApiError> {
        let mut outgoing = locked(&self.outgoing);
        if let Some(before) = &*outgoing {
            match before.report() {
                None => {
                    return Err(ApiError::refused("a migration is under way; wait or cancel it"));
                }
                Some(report) if is_gone(&report) => {
                    return Err(ApiError::refused("the guest has moved away already"));
                }
                Some(_) => {}
            }
        }
        if self.incoming.as_ref().is_some_and(|incoming| !incoming.is_running()) {
            return Err(ApiError::refused("no guest runs here yet: it waits for one to arrive"));
        }
        let status = self.vm.status();
        if let Some(GuestEvent::PowerOff | GuestEvent::Crashed { .. }) = status.ended {
            return Err(ApiError::refused("the guest has ended"));
        }
        if status.lifecycle == Lifecycle::New {
            return Err(ApiError::refused("the guest is being started; try again"));
        }
        if status.lifecycle != Lifecycle::Running {
            return Err(ApiError::refused(format!(
                "the guest does not run: {:?}",
                status.lifecycle
            )));
        }
        self.report_taken.store(false, Ordering::Release);
        let config = OutgoingConfig {
            history: self.state_dir.as_ref().map(|dir| dir.join(migration::history::FILE_NAME)),
            state_dir: self.state_dir.clone(),
            durable: self.durable,
            observer: Arc::clone(&self.gate) as _,
            ..config
        };
        let vmm = Arc::clone(&self.vm) as Arc<dyn Vmm>;
        *outgoing = Some(Arc::new(Outgoing::start(vmm, config)));
        Ok(())
    }

    /// Asks for the end of the migration under way, on whichever side this is.
    pub fn cancel(&self) -> Result<(), ApiError> {
        if let Some(outgoing) = self.outgoing().filter(|outgoing| outgoing.report().is_none()) {
            if let "committed" | "in-doubt" | "done" = outgoing.progress().state.as_str() {
                return Err(ApiError::refused(
                    "too late: Commit was sent, and only the destination knows what became of the guest",
                ));
            }
            outgoing.cancel();
            return Ok(());
        }
        match &self.incoming {
            Some(incoming) if !incoming.is_running() && incoming_busy(&incoming.status()) => {
                incoming.cancel();
                Ok(())
            }
            _ => Err(ApiError::refused("no migration is under way")),
        }
    }

    /// Takes a switchover under way back; the migration goes on.
    pub fn take_back(&self) -> Result<(), ApiError> {
        let outgoing = self.outgoing().filter(|outgoing| outgoing.report().is_none());
        outgoing.ok_or_else(|| ApiError::refused("no migration is under way"))?.take_back();
        Ok(())
    }

    /// The operator's word for a source in doubt.
    pub fn resolve_here(&self, resolve: Resolve) -> Result<(), ApiError> {
        let outgoing = self.outgoing().filter(|outgoing| outgoing.report().is_none());
        let none = || ApiError::refused("no migration is under way from here");
        outgoing.ok_or_else(none)?.resolve(resolve).map_err(ApiError::refused)
    }

    /// The operator's word for a destination that holds a guest.
    pub fn resolve_there(&self, resolve: Resolve) -> Result<(), ApiError> {
        let none = || ApiError::refused("this is no destination");
        self.incoming.as_ref().ok_or_else(none)?.resolve(resolve).map_err(ApiError::refused)
    }

    /// Changes the limits of the migration under way: of the downtime, and of the bandwidth in bytes per second.
    pub fn set_limits(
        &self,
        downtime: Option<Duration>,
        bandwidth: Option<u64>,
    ) -> Result<(), ApiError> {
        let outgoing = self.outgoing().filter(|outgoing| outgoing.report().is_none());
        let none = || ApiError::refused("no migration is under way; say the limit with migrate");
        let outgoing = outgoing.ok_or_else(none)?;
        if let Some(limit) = downtime {
            outgoing.set_downtime_limit(limit);
        }
        if let Some(bytes_per_s) = bandwidth {
            outgoing.set_max_bandwidth(bytes_per_s);
        }
        Ok(())
    }

    /// How the outgoing migration stands: `{"done": …, "progress": …, "report": …}`.
    pub fn progress(&self) -> Option<Value> {
        let outgoing = self.outgoing()?;
        let report = outgoing.report();
        let done = report.is_some();
        if done {
            self.report_taken.store(true, Ordering::Release);
        }
        let report = report.map(|report| self.report_value(&report));
        Some(json!({"done": done, "progress": outgoing.progress(), "report": report}))
    }

    /// The report with what only the VMM knows.
    fn report_value(&self, report: &Report) -> Value {
        let mut value = json!(report);
        value["guest"] = json!(self.guest_name());
        value["dirty-tracking"] = json!(self.dirty_tracking());
        value
    }

    /// A migration is under way on either side.
    pub fn migration_under_way(&self) -> bool {
        self.outgoing().is_some_and(|outgoing| outgoing.report().is_none())
    }

    /// The outgoing migration's own word for where it is.
    pub fn migration_state(&self) -> String {
        self.outgoing().map(|outgoing| outgoing.progress().state).unwrap_or_default()
    }

    /// Cancels whatever can be cancelled.
    pub fn cancel_for_end(&self) {
        if let Some(outgoing) = self.outgoing() {
            outgoing.cancel();
        }
    }

    /// The last migration is over and nobody has its report yet.
    pub fn has_untaken_report(&self) -> bool {
        let over = self.outgoing().is_some_and(|outgoing| outgoing.report().is_some());
        over && !self.report_taken.load(Ordering::Acquire)
    }

    /// Asks the main loop to end.
    pub fn quit(&self) {
        self.quit.store(true, Ordering::Release);
    }

    /// Somebody asked for the end.
    pub fn quit_asked(&self) -> bool {
        self.quit.load(Ordering::Acquire)
    }

    /// Nothing is held from now on.
    pub fn open_gate(&self) {
        self.gate.open();
    }

    /// Ends what listens.
    pub fn close(&self) {
        self.open_gate();
        if let Some(incoming) = &self.incoming {
            incoming.stop();
        }
    }

    fn outgoing(&self) -> Option<Arc<Outgoing>> {
        locked(&self.outgoing).clone()
    }
}

/// Waits for the outcome of `incoming`, on a thread of its own.
fn watch(incoming: Arc<Incoming>, outcome: Arc<Mutex<Option<Failure>>>) {
    let wait = move || {
        if let Err(failure) = incoming.wait_running() {
            *locked(&outcome) = Some(failure);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("incoming-wait".into()).spawn(wait) {
        tracing::warn!(%error, "no thread waits for the incoming side; status still shows it");
    }
}

/// `kvm` or `process`.
pub fn guest_name(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Kvm => "kvm",
        GuestKind::Process => "process",
    }
}

/// The guest is not here any more.
fn is_gone(report: &Report) -> bool {
    matches!(report.status.as_str(), "completed" | "abandoned")
}

fn incoming_busy(status: &IncomingStatus) -> bool {
    status.state != "listening" && status.state != "aborted"
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
