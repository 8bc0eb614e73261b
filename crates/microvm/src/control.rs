//! What the guest asks of its machine: heartbeats, power-off, reset, and how it ended.
//!
//! Called from vCPU threads; nothing here waits for them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use migration::GuestEvent;

use crate::body::Body;
use crate::events::Events;
use crate::time::boottime_ns;
use crate::witness::Witness;

/// The machine's control block.
pub(crate) struct Control {
    events: Arc<Events>,
    body: OnceLock<Weak<dyn Body>>,
    witness: Option<Witness>,
    /// Wakes the worker that performs a reset; one wake-up is as good as many.
    wake: Mutex<Option<SyncSender<()>>>,
    reset_pending: AtomicBool,
    first_beat_ns: AtomicU64,
    last_beat_ns: AtomicU64,
}

impl Control {
    pub(crate) fn new(
        events: Arc<Events>,
        witness: Option<Witness>,
        wake: SyncSender<()>,
    ) -> Arc<Self> {
        Arc::new(Self {
            events,
            body: OnceLock::new(),
            witness,
            wake: Mutex::new(Some(wake)),
            reset_pending: AtomicBool::new(false),
            first_beat_ns: AtomicU64::new(0),
            last_beat_ns: AtomicU64::new(0),
        })
    }

    /// Whom to halt; set once, before the guest starts.
    pub(crate) fn set_body(&self, body: Weak<dyn Body>) {
        let _ = self.body.set(body);
    }

    /// The guest gave a sign of life.
    pub(crate) fn beat(&self) {
        let now = boottime_ns();
        self.last_beat_ns.store(now, Ordering::Release);
        if self.first_beat_ns.load(Ordering::Relaxed) == 0 {
            // Only vCPU threads come here, and the first of them counts.
            let _ =
                self.first_beat_ns.compare_exchange(0, now, Ordering::AcqRel, Ordering::Relaxed);
        }
        if let Some(witness) = &self.witness {
            witness.stamp();
        }
    }

    /// From now on another beat is the first one.
    pub(crate) fn forget_first_beat(&self) {
        self.first_beat_ns.store(0, Ordering::Release);
    }

    pub(crate) fn first_beat_ns(&self) -> Option<u64> {
        Some(self.first_beat_ns.load(Ordering::Acquire)).filter(|ns| *ns != 0)
    }

    pub(crate) fn last_beat_ns(&self) -> Option<u64> {
        Some(self.last_beat_ns.load(Ordering::Acquire)).filter(|ns| *ns != 0)
    }

    /// The guest powers off.
    pub(crate) fn power_off(&self) {
        self.halt();
        self.events.emit(GuestEvent::PowerOff);
    }

    /// The workload found something it cannot go on with.
    pub(crate) fn fatal(&self, number: u8) {
        self.halt();
        let reason = match number {
            0..32 => format!("exception {number} in the workload"),
            _ => format!("fatal error {number:#x} of the workload"),
        };
        self.events.emit(GuestEvent::Crashed { reason });
    }

    /// The guest resets its machine. The vCPUs stop here; the worker does the rest.
    pub(crate) fn request_reset(&self) {
        self.reset_pending.store(true, Ordering::Release);
        self.halt();
        self.events.emit(GuestEvent::Reset);
        if let Some(wake) = &*self.wake.lock().unwrap_or_else(PoisonError::into_inner) {
            // Full: the worker has been woken already.
            let _ = wake.try_send(());
        }
    }

    /// Lets the worker end.
    pub(crate) fn close(&self) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A reset was asked for and not performed yet.
    pub(crate) fn is_reset_pending(&self) -> bool {
        self.reset_pending.load(Ordering::Acquire)
    }

    pub(crate) fn set_reset_pending(&self, pending: bool) {
        self.reset_pending.store(pending, Ordering::Release);
    }

    fn halt(&self) {
        if let Some(body) = self.body.get().and_then(Weak::upgrade) {
            body.halt();
        }
    }
}
