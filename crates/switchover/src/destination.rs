//! The destination's brain: the handover machine and its commit window.

use crate::handover::Decision;
use crate::handover::destination as handover;
use crate::message::{Attempt, Features, Id};
use crate::time::Time;

pub use handover::{Action, Event, State};

/// The destination's brain. `handle(now, event)` is its only entry.
#[derive(Clone, Debug)]
pub struct Destination {
    handover: handover::Destination,
    window: Time,
    window_ends: Option<Time>,
}

impl Destination {
    /// A brain for the migration that a first Hello named.
    pub fn new(migration: Id, instance: Id, secret: Id, features: Features, window: Time) -> Self {
        let window_ms = window.0 / 1_000_000;
        let handover = handover::Destination::new(migration, instance, secret, features, window_ms);
        Self { handover, window, window_ends: None }
    }

    /// A brain for a migration whose decision an earlier process recorded, see
    /// [`handover::destination::Destination::recovered`](handover::Destination::recovered).
    pub fn recovered(
        migration: Id,
        instance: Id,
        secret: Id,
        attempt: Attempt,
        decision: Decision,
    ) -> Self {
        let handover =
            handover::Destination::recovered(migration, instance, secret, attempt, decision);
        Self { handover, window: Time(0), window_ends: None }
    }

    /// The machine behind it, to look at.
    pub fn handover(&self) -> &handover::Destination {
        &self.handover
    }

    /// When [`handle`](Self::handle) must be called at the latest, with or without an event.
    pub fn next_timer(&self) -> Option<Time> {
        self.window_ends
    }

    /// Takes an event, or only the time, and says what to do.
    pub fn handle(&mut self, now: Time, event: Option<Event>) -> Vec<Action> {
        let mut out = Vec::new();
        // The window is counted before anything that came after its end is looked at.
        if self.window_ends.is_some_and(|ends| ends <= now) {
            self.window_ends = None;
            self.handover.handle(Event::WindowEnded, &mut out);
        }
        if let Some(event) = event {
            self.handover.handle(event, &mut out);
        }
        let armed = out.iter().any(|action| matches!(action, Action::ArmWindow));
        out.retain(|action| !matches!(action, Action::ArmWindow));
        if armed {
            self.window_ends = Some(now + self.window);
        }
        if !matches!(self.handover.state(), State::Prepared) {
            self.window_ends = None;
        }
        out
    }
}
