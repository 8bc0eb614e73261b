//! Holding a migration in a phase, so that tests and demonstrations act at an exact moment.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::Observer;
use switchover::message::Side;

/// A hold that nobody releases ends after this time: a controller that died must not hold a guest.
pub const HOLD_LIMIT: Duration = Duration::from_secs(120);
/// Phases that are remembered.
const HISTORY_MAX: usize = 256;

/// Where a migration is held now.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Held {
    /// Which side of it.
    pub side: Side,
    /// The phase that is being entered.
    pub phase: String,
}

/// An [`Observer`] that holds where it was told to. A hold is good for once: it is armed anew for the next
/// time.
#[derive(Debug, Default)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    armed: BTreeSet<String>,
    held: Option<Held>,
    /// Nothing is held any more.
    open: bool,
    history: Vec<Held>,
}

impl Gate {
    /// Holds the next time one of `phases` is entered.
    pub fn arm(&self, phases: impl IntoIterator<Item = String>) {
        self.lock().armed.extend(phases);
    }

    /// Forgets what was armed; what is held stays.
    pub fn disarm(&self) {
        self.lock().armed.clear();
    }

    /// Lets go what is held; answers what it was.
    pub fn release(&self) -> Option<Held> {
        let held = self.lock().held.take();
        self.changed.notify_all();
        held
    }

    /// Lets go what is held and never holds again.
    pub fn open(&self) {
        self.lock().open = true;
        self.release();
    }

    /// Where it is held now.
    pub fn held(&self) -> Option<Held> {
        self.lock().held.clone()
    }

    /// The phases entered so far, oldest first; of very many, the last ones.
    pub fn history(&self) -> Vec<Held> {
        self.lock().history.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Gate {
    fn entered(&self, side: Side, phase: &'static str) {
        let here = Held { side, phase: phase.into() };
        let mut inner = self.lock();
        if inner.history.len() == HISTORY_MAX {
            inner.history.remove(0);
        }
        inner.history.push(here.clone());
        if inner.open || !inner.armed.remove(phase) {
            return;
        }
        inner.held = Some(here);
        self.changed.notify_all();
        let deadline = Instant::now() + HOLD_LIMIT;
        while inner.held.is_some() && !inner.open {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(%side, phase, "held for too long, going on");
                inner.held = None;
                break;
            }
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_hold_is_good_for_once() {
        let gate = Arc::new(Gate::default());
        gate.arm(["look".to_owned()]);
        gate.entered(Side::Source, "precopy");
        let engine = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                gate.entered(Side::Source, "look");
                gate.entered(Side::Source, "look");
            }
        });
        while gate.held().is_none() {
            std::thread::yield_now();
        }
        let look = Held { side: Side::Source, phase: "look".into() };
        assert_eq!(gate.history().last(), Some(&look));
        assert_eq!(gate.release(), Some(look));
        engine.join().unwrap();
        assert_eq!(gate.release(), None);
        assert_eq!(gate.history().len(), 3);
    }

    #[test]
    fn an_open_gate_holds_nothing() {
        let gate = Gate::default();
        gate.arm(["look".to_owned()]);
        gate.open();
        gate.entered(Side::Source, "look");
        assert_eq!(gate.held(), None);
    }
}
