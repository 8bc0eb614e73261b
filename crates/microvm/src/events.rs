//! Guest events on their way from the machine's threads to whoever listens.

use std::sync::{Mutex, PoisonError};

use migration::{GuestEvent, GuestEventSink};

/// Hands guest events to the current sink; without one they are only logged.
#[derive(Default)]
pub struct Events {
    sink: Mutex<Option<GuestEventSink>>,
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

    /// Hands `event` on. The sink is called without the lock, so it may replace itself.
    pub fn emit(&self, event: GuestEvent) {
        tracing::info!(?event, "guest event");
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(sink) = sink {
            sink(event);
        }
    }
}
