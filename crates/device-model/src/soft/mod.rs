//! [`SoftDevice`]: a [`DeviceCore`] with a thread, a clock, eventfds and guest memory.
//!
//! ```text
//!   vCPU threads ── SoftFunction ──┐                      ┌── worker thread: background DMA, the rest of
//!                                  ├── one lock ── core ──┤                  doorbells, DMA by calls
//!   engine thread ─ SoftMigration ─┘                      └── guest memory (pwrite), eventfds
//! ```
//!
//! The lock is held for a register access, for up to 1,024 stamps, or for one record of the stream
//! (64 KiB), so a vCPU does not wait behind a data read. It is never held while the device takes its
//! time, nor while guest memory is reached by calls: those may need the very thread that waits for the
//! lock.
//!
//! Guest memory behind a file is written with pwrite and not through a mapping: a file that its owner
//! shortens gives an error then, and not a SIGBUS.

mod eventfds;
mod function;
mod memory;
mod migration;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::{DeviceResult, PciFunction};

pub use crate::core::CoreOptions as SoftOptions;
pub use migration::SoftMigration;

use crate::core::DeviceCore;
use crate::error::ModelError;
use eventfds::Eventfds;
use function::SoftFunction;
use memory::DmaMap;
use worker::Worker;

/// A running software device. Clones and handles speak of one device; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct SoftDevice {
    device: Arc<Device>,
}

/// What the handles keep alive.
#[derive(Debug)]
struct Device {
    shared: Arc<Shared>,
    _worker: Worker,
}

/// What the worker shares with them.
#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// The worker has something new to look at.
    changed: Condvar,
    /// A DMA write by calls is done.
    settled: Condvar,
    epoch: Instant,
}

#[derive(Debug)]
struct Inner {
    core: DeviceCore,
    memory: DmaMap,
    eventfds: Eventfds,
    /// Resets of the core that the eventfds know of.
    resets_seen: u64,
    /// Callers that wait for the worker to have nothing under way.
    quiescing: u32,
    ending: bool,
}

impl SoftDevice {
    /// A device after power-on, and its worker thread.
    ///
    /// # Errors
    /// [`ModelError`] for a profile that is too large, or when the thread cannot be started.
    pub fn new(options: SoftOptions) -> Result<Self, ModelError> {
        let inner = Inner {
            core: DeviceCore::new(options)?,
            memory: DmaMap::default(),
            eventfds: Eventfds::default(),
            resets_seen: 0,
            quiescing: 0,
            ending: false,
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            settled: Condvar::new(),
            epoch: Instant::now(),
        });
        let worker = Worker::start(Arc::clone(&shared))?;
        Ok(Self { device: Arc::new(Device { shared, _worker: worker }) })
    }

    /// The function, as a VMM drives it.
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::new(SoftFunction::new(Arc::clone(&self.device)))
    }

    /// The migration side, as an engine drives it: opted in to INFOv2 where that is offered.
    pub fn migration(&self) -> SoftMigration {
        let migration = self.served_migration();
        self.with_core(|core| {
            if core.offers_precopy_info_v2()
                && let Err(error) = core.opt_in_precopy_info_v2()
            {
                tracing::warn!(%error, "opting in to INFOv2");
            }
        });
        migration
    }

    /// The migration side, for a server: the opt-in is left to its client, and
    /// [`precopy_info_v2`](vfio_migration::DeviceCapabilities::precopy_info_v2) says that it is offered.
    pub fn served_migration(&self) -> SoftMigration {
        SoftMigration::new(Arc::clone(&self.device))
    }

    /// Looks into the device, or changes its quirks while it runs. Interrupts that come of it are
    /// signalled.
    pub fn with_core<T>(&self, look: impl FnOnce(&mut DeviceCore) -> T) -> T {
        self.device.shared.with_inner(|inner| look(&mut inner.core))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// One access under the lock. What it fires is signalled before the lock is given back, so that
    /// nothing is signalled after a SET to STOP returned.
    fn with_inner<T>(&self, access: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let result = access(&mut inner);
        self.leave(inner);
        result
    }

    /// As [`with_inner`](Self::with_inner), with no DMA write under way.
    fn with_quiet_inner<T>(&self, access: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        inner.quiescing += 1;
        while inner.core.deferred().is_some() {
            inner = self.settled.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.quiescing -= 1;
        let result = access(&mut inner);
        self.leave(inner);
        result
    }

    /// Signals what is to be signalled, and wakes the worker where there is work.
    fn leave(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.settle_interrupts();
        let core = &inner.core;
        let work = core.deferred().is_some() || core.next_due_ns(self.now_ns()).is_some();
        drop(inner);
        if work {
            self.changed.notify_one();
        }
    }

    /// Resets the device and lets the time of it pass.
    fn reset(&self) -> DeviceResult<()> {
        let took_ns = self.with_quiet_inner(|inner| {
            inner.core.reset()?;
            Ok(inner.core.timing().reset_ns)
        })?;
        pass(took_ns);
        Ok(())
    }
}

impl Inner {
    /// Drops eventfds that a reset unwired, and signals what is to be signalled.
    fn settle_interrupts(&mut self) {
        if self.resets_seen != self.core.resets() {
            self.resets_seen = self.core.resets();
            self.eventfds.clear();
        }
        let fired = self.core.take_fired();
        if !fired.is_empty() {
            self.eventfds.signal(fired);
        }
    }
}

/// Lets time pass.
fn pass(ns: u64) {
    if ns > 0 {
        std::thread::sleep(Duration::from_nanos(ns));
    }
}
