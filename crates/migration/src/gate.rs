//! Bounds what waits for a driver: whoever brings more waits too.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// So many may be inside.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    shared: Arc<Shared>,
    max: usize,
}

#[derive(Debug, Default)]
struct Shared {
    inside: Mutex<usize>,
    left: Condvar,
}

/// Whoever holds it is inside.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Shared>);

impl Gate {
    pub(crate) fn new(max: usize) -> Self {
        Self { shared: Arc::default(), max }
    }

    /// Waits until there is room.
    pub(crate) fn enter(&self) -> Permit {
        let inside = self.shared.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |inside: &mut usize| *inside >= self.max;
        let waited = self.shared.left.wait_while(inside, full);
        *waited.unwrap_or_else(PoisonError::into_inner) += 1;
        Permit(Arc::clone(&self.shared))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.left.notify_one();
    }
}
