//! Guest events on their way from the machine's threads to whoever listens.

use std::sync::{Mutex, MutexGuard, PoisonError};

use migration::{GuestEvent, GuestEventSink};

/// Hands guest events to the current sink; without one they are only logged.
#[derive(Default)]
pub struct Events {
    sink: Mutex<Option<GuestEventSink>>,
    ended: Mutex<Option<GuestEvent>>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Replaces the sink.
    pub fn set_sink(&self, sink: Option<GuestEventSink>) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    /// How the guest ended, if it has: powered off or crashed.
    pub fn ended(&self) -> Option<GuestEvent> {
        self.ended_lock().clone()
    }

    /// Sets how the guest ended: from a saved state, or not at all after a reset.
    pub fn set_ended(&self, ended: Option<GuestEvent>) {
        *self.ended_lock() = ended;
    }

    fn ended_lock(&self) -> MutexGuard<'_, Option<GuestEvent>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `event` on. The sink is called without the lock, so it may replace itself.
    pub fn emit(&self, event: GuestEvent) {
        tracing::info!(?event, "guest event");
        if matches!(event, GuestEvent::PowerOff | GuestEvent::Crashed { .. }) {
            // The first reason is the reason.
            self.ended_lock().get_or_insert_with(|| event.clone());
        }
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(sink) = sink {
            sink(event);
        }
    }
}
